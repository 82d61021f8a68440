//! The local log: whether it can be read and is whole, how it grows, and what waits for the relay.

use std::{path::Path, time::Duration};

use futures_util::StreamExt;
use sqlx::{ConnectOptions, Row, sqlite::SqliteConnectOptions};
use time::OffsetDateTime;
use tokio::time::timeout;
use vestibule_events::{Backlog, EventLog, Filter, LocalLog, LogError, Replay, Start, relay};

use super::{Finding, about, mebibytes};
use crate::config::Config;

/// A large file is not read to its end: whoever waits for this wants an answer.
const LIMIT: Duration = Duration::from_secs(10);

/// While NATS is there, events wait for a moment only.
const WAITING_WARNING: Duration = Duration::from_secs(60);

pub(super) async fn findings(config: &Config) -> Vec<Finding> {
    let file = config.log_file();
    if !file.exists() {
        let found = format!("{} does not exist; the first start makes it", file.display());
        return vec![Finding::ok("log", found)];
    }
    let facts = match timeout(LIMIT, gather(&file)).await {
        Ok(Ok(facts)) => facts,
        Ok(Err(error)) => return vec![unreadable(&file, &format!("{:#}", anyhow::anyhow!(error)))],
        Err(_) => return vec![unreadable(&file, "it did not answer in time")],
    };
    let free = rustix::fs::statvfs(&config.data).ok();
    let free = free.map(|it| it.f_bavail.saturating_mul(it.f_frsize));
    let now = OffsetDateTime::now_utc();
    let mut findings = vec![
        judge_integrity(integrity(&file).await),
        judge_growth(&facts, config.nats.is_none().then_some(config.log.retention), free, now),
    ];
    if config.nats.is_some() {
        findings.push(judge_backlog(&facts, config.log.duplicate_window, now));
    }
    findings
}

fn unreadable(file: &Path, error: &str) -> Finding {
    Finding::critical(
        "log",
        format!("could not read {}: {error}", file.display()),
        "see who owns it, and whether its disk is well; `vestibule backup --salvage DIR` copies what \
         can be read of a damaged log",
    )
}

#[derive(Clone, Debug, Default)]
struct Facts {
    bytes: u64,
    /// When the oldest event in the file was decided.
    first: Option<OffsetDateTime>,
    /// Of the relay; `None` where there was none yet.
    backlog: Option<Backlog>,
    /// When the oldest event was decided that waits for the relay.
    oldest_waiting: Option<OffsetDateTime>,
}

async fn gather(file: &Path) -> Result<Facts, LogError> {
    let log = LocalLog::open_read_only(file).await?;
    let backlog = log.backlog(relay::CONSUMER).await?;
    let waiting = backlog.map_or(0, |it| it.waiting + it.in_flight);
    let facts = Facts {
        bytes: size(file),
        first: decided_at(&log, Start::Beginning).await?,
        backlog,
        oldest_waiting: match waiting {
            0 => None,
            waiting => {
                let from = log.last_sequence().saturating_sub(waiting) + 1;
                decided_at(&log, Start::Sequence(from)).await?
            }
        },
    };
    log.close().await?;
    Ok(facts)
}

/// The file, with what was not yet moved into it.
fn size(file: &Path) -> u64 {
    let mut wal = file.as_os_str().to_owned();
    wal.push("-wal");
    let files = [file, Path::new(&wal)];
    files.iter().filter_map(|it| Some(it.metadata().ok()?.len())).sum()
}

async fn decided_at(log: &LocalLog, start: Start) -> Result<Option<OffsetDateTime>, LogError> {
    let (until, person) = (None, None);
    let replay = Replay { start, until, person, filter: Filter::default(), follow: false };
    let mut events = log.replay(replay).await?;
    Ok(events.next().await.and_then(Result::ok).map(|stored| stored.event.time))
}

/// What SQLite says of the file's structure; `None` where that would take too long. A reader of a WAL
/// holds nobody up.
async fn integrity(file: &Path) -> Option<Result<(), String>> {
    let options = SqliteConnectOptions::new().filename(file).read_only(true);
    let look = async {
        let mut connection = options.disable_statement_logging().connect().await?;
        let row = sqlx::query("PRAGMA quick_check(1)").fetch_one(&mut connection).await?;
        row.try_get::<String, _>(0)
    };
    Some(match timeout(LIMIT, look).await.ok()? {
        Ok(word) if word == "ok" => Ok(()),
        Ok(problem) => Err(problem),
        Err(error) => Err(error.to_string()),
    })
}

fn judge_integrity(integrity: Option<Result<(), String>>) -> Finding {
    let name = "log.integrity";
    match integrity {
        Some(Ok(())) => Finding::ok(name, "the file is whole"),
        Some(Err(problem)) => Finding::critical(
            name,
            format!("the file is damaged: {problem}"),
            "stop Vestibule, copy what can be read with `vestibule backup --salvage DIR`, and see to \
             the disk",
        ),
        None => Finding::warning(
            name,
            format!("too large to be read within {}", about(LIMIT)),
            "`vestibule backup DIR`, then `vestibule backup --verify DIR`, reads it to its end",
        ),
    }
}

/// `retention` where the log is the archive. Room that trimming gave back makes the rate an upper
/// bound.
fn judge_growth(
    facts: &Facts,
    retention: Option<Duration>,
    free: Option<u64>,
    now: OffsetDateTime,
) -> Finding {
    let name = "log.size";
    let size = mebibytes(facts.bytes);
    let age = facts.first.map(|first| now - first).and_then(|it| Duration::try_from(it).ok());
    let (Some(retention), Some(age), Some(free)) = (retention, age, free) else {
        return Finding::ok(name, size);
    };
    // In the first days everything is a guess.
    if age < Duration::from_secs(86_400) {
        return Finding::ok(name, size);
    }
    let (bytes, days) = (facts.bytes as f64, age.as_secs_f64() / 86_400.0);
    let left = Duration::from_secs_f64((free as f64 / (bytes / days) * 86_400.0).min(1e10));
    if left + age < retention {
        let found = format!("{size}; at this rate the disk is full in {}", about(left));
        let remedy = "make room, or shorten log.retention";
        if left < Duration::from_secs(7 * 86_400) {
            return Finding::critical(name, found, remedy);
        }
        return Finding::warning(name, found, remedy);
    }
    Finding::ok(name, format!("{size}; the disk has room for all of log.retention"))
}

fn judge_backlog(facts: &Facts, duplicate_window: Duration, now: OffsetDateTime) -> Finding {
    let name = "log.relay";
    let Some(backlog) = facts.backlog else {
        return Finding::warning(
            name,
            "no relay has run yet: nothing goes from this log to NATS",
            "start `vestibule up`, `vestibule api`, or `vestibule relay` beside `api --without-relay`",
        );
    };
    let waiting = backlog.waiting + backlog.in_flight;
    let age = facts.oldest_waiting.map(|it| now - it).and_then(|it| Duration::try_from(it).ok());
    let age = age.unwrap_or_default();
    if waiting == 0 || age < WAITING_WARNING {
        return Finding::ok(name, format!("{waiting} events wait for the relay"));
    }
    let found = format!("{waiting} events wait for the relay, the oldest for {}", about(age));
    let remedy = "see whether the relay runs and NATS takes events (the checks of NATS below)";
    if age >= duplicate_window {
        let found = format!(
            "{found}: longer than log.duplicate_window, so a call repeated through another process may \
             become a second event"
        );
        return Finding::critical(name, found, remedy);
    }
    Finding::warning(name, found, remedy)
}

#[cfg(test)]
mod tests {
    use time::macros::datetime;

    use super::super::finding::State::{Critical, Ok as Fine, Warning};
    use super::*;

    const NOW: OffsetDateTime = datetime!(2026-11-22 10:00 UTC);
    const DAY: Duration = Duration::from_secs(86_400);

    #[test]
    fn a_file_is_whole_damaged_or_too_large_to_tell() {
        let states = [Some(Ok(())), None, Some(Err("page 3".to_owned()))];
        assert_eq!(states.map(|it| judge_integrity(it).state), [Fine, Warning, Critical]);
    }

    #[test]
    fn a_log_that_fills_the_disk_before_it_lets_events_go_is_told_of() {
        // 10 MiB a day.
        let facts = Facts { bytes: 1000 << 20, first: Some(NOW - 100 * DAY), ..Facts::default() };
        let state = |free_mebibytes: u64| {
            judge_growth(&facts, Some(400 * DAY), Some(free_mebibytes << 20), NOW).state
        };
        assert_eq!([3100, 2900, 60].map(state), [Fine, Warning, Critical]);
        assert_eq!(judge_growth(&facts, None, Some(0), NOW).state, Fine, "trimmed by the relay");
        let young = Facts { first: Some(NOW - DAY / 2), ..facts };
        assert_eq!(judge_growth(&young, Some(400 * DAY), Some(0), NOW).state, Fine);
    }

    #[test]
    fn what_waits_for_the_relay_is_measured_by_its_age() {
        let state = |waiting, age| {
            let facts = Facts {
                backlog: Some(Backlog { waiting, in_flight: 0 }),
                oldest_waiting: Some(NOW - age),
                ..Facts::default()
            };
            judge_backlog(&facts, Duration::from_secs(600), NOW).state
        };
        assert_eq!(state(0, DAY), Fine);
        assert_eq!(state(9, Duration::from_secs(59)), Fine);
        assert_eq!(state(9, Duration::from_secs(60)), Warning);
        assert_eq!(state(9, Duration::from_secs(600)), Critical);
        assert_eq!(judge_backlog(&Facts::default(), DAY, NOW).state, Warning, "no relay yet");
    }
}
