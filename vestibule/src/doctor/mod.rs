//! `vestibule doctor`: whether everything is so that the promises can be kept, and what to change.
//!
//! Each subject is a module: it gathers facts, and a pure function judges them. A server that is down
//! is a finding and no error; each look is bounded in time. Nothing is changed, so it may run beside
//! running processes; it sees with the eyes of whoever runs it, and with the secrets found there.

mod finding;
mod log;
mod machine;
mod nats;
mod store;

use std::{process::ExitCode, time::Duration};

use clap::Args;
use time::OffsetDateTime;

use self::finding::Finding;
use crate::{check, cli::Output, config::Config};

const EXAMPLES: &str = "\
Examples:
  vestibule doctor
      Look at everything; exit with 1 if a promise does not hold.
  vestibule doctor --output json | jq '.findings[] | select(.state != \"ok\")'
      What is not well, for programs.

Run it where a process runs, as its user, with its configuration and its secrets.";

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct DoctorArgs {
    /// Where the NATS server's monitoring listens; port 8222 of its host unless said otherwise
    #[arg(long, value_name = "URL")]
    monitoring: Option<String>,
    #[arg(long, value_enum, default_value_t = Output::Table)]
    output: Output,
}

pub(crate) async fn doctor(
    args: DoctorArgs,
    config: anyhow::Result<Config>,
) -> anyhow::Result<ExitCode> {
    let config = match config {
        Ok(config) => config,
        Err(error) => {
            let remedy = "mend the configuration; `vestibule check` says the same";
            let finding = Finding::critical("configuration", format!("{error:#}"), remedy);
            return finding::report(&[finding], args.output);
        }
    };
    let mut findings = configuration(&config);
    findings.extend(machine::findings(&config).await);
    findings.extend(log::findings(&config).await);
    if let Some(nats) = &config.nats {
        findings.extend(nats::findings(&config, nats, args.monitoring.as_deref()).await);
    }
    findings.extend(store::findings(&config).await);
    finding::report(&findings, args.output)
}

fn configuration(config: &Config) -> Vec<Finding> {
    let name = "configuration";
    let warnings = check::warnings(config);
    if warnings.is_empty() {
        return vec![Finding::ok(name, format!("{} is fine", config.file.display()))];
    }
    let remedy = "as `vestibule check` says; a secret may be absent where no process needs it";
    warnings.into_iter().map(|it| Finding::warning(name, it, remedy)).collect()
}

/// By how much a server's clock is ahead of ours at the least, if it read it within `took` after
/// `before`; negative where it is behind.
fn ahead(server: OffsetDateTime, before: OffsetDateTime, took: Duration) -> time::Duration {
    let at_most = server - before;
    (at_most - took).max(time::Duration::ZERO) + at_most.min(time::Duration::ZERO)
}

fn clock(check: &str, whose: &str, ahead: time::Duration) -> Finding {
    let off = ahead.unsigned_abs();
    if off <= Duration::from_secs(1) {
        return Finding::ok(check, format!("{whose} has our time"));
    }
    let found = format!(
        "the clock of {whose} is {} {} ours: ages, windows and order are judged wrongly",
        about(off),
        if ahead.is_negative() { "behind" } else { "ahead of" }
    );
    let remedy = "synchronise both clocks (chrony or systemd-timesyncd; `timedatectl`)";
    if off > Duration::from_secs(30) {
        return Finding::critical(check, found, remedy);
    }
    Finding::warning(check, found, remedy)
}

/// A duration as people say it: no more exact than it helps.
fn about(duration: Duration) -> String {
    let seconds = duration.as_secs();
    let exact = match seconds {
        0 => Duration::from_millis(duration.as_millis().try_into().unwrap_or(u64::MAX)),
        1..3600 => Duration::from_secs(seconds),
        3600..172_800 => Duration::from_secs(seconds / 60 * 60),
        _ => return format!("{} days", seconds / 86_400),
    };
    humantime::format_duration(exact).to_string()
}

fn mebibytes(bytes: u64) -> String {
    match bytes / (1 << 20) {
        0..10_240 => format!("{} MiB", bytes.div_ceil(1 << 20)),
        large => format!("{} GiB", large >> 10),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clocks_may_differ_by_a_second() {
        use finding::State::{Critical, Ok as Fine, Warning};
        let state = |seconds| clock("clock", "it", time::Duration::seconds(seconds)).state;
        let states = [0, -1, 2, -30, 31, -31].map(state);
        assert_eq!(states, [Fine, Fine, Warning, Warning, Critical, Critical]);
    }

    #[test]
    fn the_way_there_and_back_explains_some_of_it() {
        let before = OffsetDateTime::UNIX_EPOCH;
        let off = |seconds: i64| {
            let server = before + time::Duration::seconds(seconds);
            ahead(server, before, Duration::from_secs(2)).whole_seconds()
        };
        assert_eq!([-5, 0, 1, 2, 5].map(off), [-5, 0, 0, 0, 3]);
    }

    #[test]
    fn sizes_and_durations_are_short() {
        assert_eq!(about(Duration::from_micros(3_200)), "3ms");
        assert_eq!(about(Duration::from_millis(90_500)), "1m 30s");
        assert_eq!(about(Duration::from_secs(7_265)), "2h 1m");
        assert_eq!(about(Duration::from_secs(400 * 86_400 + 5)), "400 days");
        assert_eq!(mebibytes(1), "1 MiB");
        assert_eq!(mebibytes(20 << 30), "20 GiB");
    }
}
