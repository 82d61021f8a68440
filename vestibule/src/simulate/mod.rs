//! `vestibule simulate`: plays the platform, and sees whether what it was told is what happened.
//!
//! `people` makes up who signs up and how, `platform` calls the connector, `verify` compares the
//! answers with the log and the store, `summary` says what came of it. The connector, the log and
//! the store may be anywhere; where they cannot be seen, only the answers are judged.

mod outcomes;
mod people;
mod platform;
mod summary;
mod verify;

use std::{
    fs::File,
    path::PathBuf,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::{Context, bail};
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use time::OffsetDateTime;
use tokio::{task::JoinSet, time::Instant};
use vestibule_api::OnStorageFailure;
use vestibule_events::Protocol;

use self::{
    people::Crowd,
    platform::{Platform, Tally, Target},
    summary::{Checked, Summary},
    verify::Verifier,
};
use crate::{
    cli::Output,
    config::{Config, ConnectorConfig, CredentialConfig, SecretSource, did_you_mean},
    print::say,
};

const EXAMPLES: &str = "\
Examples:
  vestibule simulate --count 1000
      A thousand sign-ups at the first connector of the configuration, with its first credential;
      then looks into log and store whether each accepted one was acted on exactly once.
  vestibule simulate --rate 50 --count 3000
      A steady minute of 50 sign-ups a second.
  vestibule simulate --seed 7 --output json --answers answers.jsonl
      The same people as last time; a summary for programs, and every answer as a line of JSON.
  vestibule simulate --count 500 --abandon 0.2
      Of those who are accepted a fifth never comes back, and the others sign in; needs
      [workers.confirm], with an `abandon_after` that is shorter than --wait.
  vestibule simulate --url https://signup.example.org/connectors/partners --user entra \\
      --password env:PARTNERS_PASSWORD --no-verify
      A connector elsewhere, of which only the answers can be seen.

The people are made up and their addresses end in `.example`, apart from a few at throwaway domains.
Every run has people of its own. Exit code 0 means that every call was answered and nothing differs
from what was answered, 1 that something does or failed.";

/// What to simulate.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct SimulateArgs {
    /// How many people sign up
    #[arg(long, value_name = "N", default_value_t = 10_000)]
    count: u64,
    /// The connector's URL, without a step; where absent, the one of the configuration
    #[arg(long, value_name = "URL", value_parser = parse_url)]
    url: Option<String>,
    /// Which connector of the configuration; the first where absent
    #[arg(long, value_name = "NAME")]
    connector: Option<String>,
    /// The user of the credential; where absent, that of the connector's first credential
    #[arg(long, value_name = "USER", requires = "password")]
    user: Option<String>,
    /// Where the password is: env:NAME, file:PATH or example:TEXT
    #[arg(long, value_name = "WHERE", requires = "user", value_parser = parse_secret)]
    password: Option<SecretSource>,
    /// How many people sign up at the same time
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = 1..=10_000)]
    concurrency: i64,
    /// At most so many people begin per second; as many as can where absent
    #[arg(long, value_name = "N", value_parser = parse_rate)]
    rate: Option<f64>,
    /// Decides who signs up and how; a random one, printed, where absent
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// So many of those who are accepted never come back, from 0 to 1; the others sign in. Where
    /// absent nobody does either
    #[arg(long, value_name = "SHARE", value_parser = parse_share)]
    abandon: Option<f64>,
    /// How long nobody may answer before the run ends, as while the connector restarts
    #[arg(long, value_name = "DURATION", default_value = "30s")]
    #[arg(value_parser = humantime::parse_duration)]
    patience: Duration,
    /// Do not look whether accepted sign-ups were acted on
    #[arg(long)]
    no_verify: bool,
    /// How long workers may take until everything has been acted on
    #[arg(long, value_name = "DURATION", default_value = "120s")]
    #[arg(value_parser = humantime::parse_duration)]
    wait: Duration,
    /// Write every answered call to this file, a line of JSON each
    #[arg(long, value_name = "FILE")]
    answers: Option<PathBuf>,
    /// How the summary is printed
    #[arg(long, value_enum, default_value_t = Output::Table)]
    output: Output,
}

/// Calls, verifies, says what came of it.
pub(crate) async fn simulate(
    args: SimulateArgs,
    load: impl Fn() -> anyhow::Result<Config>,
) -> anyhow::Result<ExitCode> {
    let config = load();
    if args.abandon.is_some() && config.as_ref().is_ok_and(|it| !it.has_confirm()) {
        bail!(
            "--abandon plays people who never come back, and nothing would notice: the \
             configuration has no [workers.confirm] section"
        );
    }
    let target = target(&args, &config)?;
    let url = target.url.clone();
    let run = format!("{:08x}", rand::random::<u32>());
    let seed = args.seed.unwrap_or_else(rand::random);
    let crowd = Crowd { seed, run: run.clone(), abandon: args.abandon };
    let answers = args.answers.as_ref().map(|path| {
        File::create(path)
            .with_context(|| format!("could not create the file of answers {}", path.display()))
    });
    let concurrency = usize::try_from(args.concurrency).unwrap_or(1);
    let platform =
        Platform::new(target, run.clone(), answers.transpose()?, args.patience, concurrency)?;
    let platform = Arc::new(platform);

    let started = OffsetDateTime::now_utc();
    let begun = Instant::now();
    let (tally, sign_ups) = everybody_signs_up(&args, crowd, &platform).await?;
    let took = begun.elapsed();

    let checked = if args.no_verify {
        Checked::No("--no-verify was given".into())
    } else {
        check(&args, config, started, &run, &tally).await
    };
    let ended_early = platform.hopeless();
    let summary = Summary { run, seed, url, sign_ups, took, tally, checked, ended_early };
    match args.output {
        Output::Json => say!("{}", summary.json())?,
        Output::Table => say!("{summary}")?,
    }
    Ok(if summary.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Whom to call, from the command line and, for what it does not say, the configuration.
fn target(args: &SimulateArgs, config: &anyhow::Result<Config>) -> anyhow::Result<Target> {
    let given = args.user.clone().zip(args.password.as_ref());
    let config = match config {
        Ok(config) => config,
        Err(error) => {
            // The command line says it all; the configuration is only for looking, then.
            let (Some(url), Some((user, password)), None) = (&args.url, given, &args.connector)
            else {
                bail!("{error:#}");
            };
            let url = url.trim_end_matches('/').to_owned();
            return Ok(Target { url, user, password: password.fetch()?, try_again_message: None });
        }
    };
    let connector = connector(args, config)?;
    anyhow::ensure!(
        connector.protocol == Protocol::ApiConnector,
        "connector {} speaks {}, and this plays a platform that speaks api-connector; name another \
         with --connector",
        connector.name,
        connector.protocol.as_str()
    );
    let url = args.url.clone().unwrap_or_else(|| {
        let mut address = config.listen.connector;
        // Listening everywhere includes here.
        if address.ip().is_unspecified() {
            address.set_ip(if address.is_ipv4() {
                std::net::Ipv4Addr::LOCALHOST.into()
            } else {
                std::net::Ipv6Addr::LOCALHOST.into()
            });
        }
        let scheme = if config.listen.tls.is_some() { "https" } else { "http" };
        format!("{scheme}://{address}/connectors/{}", connector.name)
    });
    let (user, password) = match given {
        Some(given) => given,
        None => {
            let basic = connector.credentials.iter().find_map(CredentialConfig::basic);
            let (user, password) = basic.with_context(|| {
                format!(
                    "connector {} has no Basic credential; give --user and --password",
                    connector.name
                )
            })?;
            (user.to_owned(), password)
        }
    };
    let password = password.fetch().context("could not read the password to call with")?;
    let try_again_message = match &connector.on_storage_failure {
        OnStorageFailure::Refuse { message } => Some(message.clone()),
        OnStorageFailure::LetThrough => None,
    };
    let url = url.trim_end_matches('/').to_owned();
    Ok(Target { url, user, password, try_again_message })
}

fn connector<'a>(args: &SimulateArgs, config: &'a Config) -> anyhow::Result<&'a ConnectorConfig> {
    let names: Vec<_> = config.connectors.iter().map(|it| it.name.as_str()).collect();
    let named = match &args.connector {
        Some(name) => config.connectors.iter().find(|it| it.name.as_str() == name),
        None => config.connectors.first(),
    };
    let name = args.connector.as_deref().unwrap_or_default();
    named.with_context(|| format!("there is no connector `{name}`{}", did_you_mean(name, &names)))
}

/// Lets people sign up, several at a time, until all have or going on is of no use.
async fn everybody_signs_up(
    args: &SimulateArgs,
    crowd: Crowd,
    platform: &Arc<Platform>,
) -> anyhow::Result<(Tally, u64)> {
    let progress = progress("signing up", args.count);
    let next = Arc::new(AtomicU64::new(0));
    let begun = Instant::now();
    let mut callers = JoinSet::new();
    for _ in 0..args.concurrency {
        let (crowd, platform, next) = (crowd.clone(), platform.clone(), next.clone());
        let (progress, count, rate) = (progress.clone(), args.count, args.rate);
        callers.spawn(async move {
            let mut tally = Tally::default();
            while !platform.stop.is_cancelled() {
                let number = next.fetch_add(1, Ordering::Relaxed);
                if number >= count {
                    break;
                }
                if let Some(rate) = rate {
                    #[expect(clippy::cast_precision_loss, reason = "a run has fewer people")]
                    let due = begun + Duration::from_secs_f64(number as f64 / rate);
                    tokio::select! {
                        () = tokio::time::sleep_until(due) => {}
                        () = platform.stop.cancelled() => break,
                    }
                }
                platform.sign_up(crowd.person(number), &mut tally).await?;
                progress.inc(1);
            }
            anyhow::Ok(tally)
        });
    }
    let mut all = Tally::default();
    let mut is_interrupted = false;
    loop {
        tokio::select! {
            joined = callers.join_next() => match joined {
                Some(tally) => all.add(tally.context("a caller broke down")??),
                None => break,
            },
            // Whoever is about to sign up may finish; nobody else begins.
            _ = tokio::signal::ctrl_c(), if !is_interrupted => {
                is_interrupted = true;
                platform.stop.cancel();
            }
        }
    }
    let signed_up = progress.position();
    progress.finish_and_clear();
    Ok((all, signed_up))
}

/// Compares the answers with log and store, where they can be seen.
async fn check(
    args: &SimulateArgs,
    config: anyhow::Result<Config>,
    started: OffsetDateTime,
    run: &str,
    tally: &Tally,
) -> Checked {
    let config = match config {
        Ok(config) => config,
        Err(error) => return Checked::No(format!("{error:#}")),
    };
    let verifier = match Verifier::open(config, started).await {
        Ok(verifier) => verifier.expecting(tally.outcomes.clone()),
        Err(error) => return Checked::No(format!("{error:#}")),
    };
    let progress = progress("acted on", tally.forms.accepted() as u64);
    let verified = tokio::select! {
        verified = verifier.verify(run, &tally.forms, args.wait, &progress) => verified,
        _ = tokio::signal::ctrl_c() => Err(anyhow::anyhow!("interrupted")),
    };
    progress.finish_and_clear();
    match verified {
        Ok(verified) => Checked::Yes(verified),
        Err(error) => Checked::Failed(format!("{error:#}")),
    }
}

/// A bar on standard error; it hides itself where that is no terminal.
pub(crate) fn progress(what: &'static str, length: u64) -> ProgressBar {
    let style = ProgressStyle::with_template(
        "{prefix:>11} {bar:40} {human_pos}/{human_len} {per_sec} {eta}",
    )
    .expect("the template is valid");
    ProgressBar::new(length).with_style(style).with_prefix(what)
}

fn parse_secret(text: &str) -> Result<SecretSource, String> {
    SecretSource::parse(text).ok_or_else(|| {
        "expected env:NAME, file:PATH or example:TEXT, never the secret itself".into()
    })
}

fn parse_url(text: &str) -> Result<String, String> {
    match reqwest::Url::parse(text) {
        Ok(url) if ["http", "https"].contains(&url.scheme()) => Ok(text.to_owned()),
        _ => Err("expected a URL such as https://signup.example.org/connectors/partners".into()),
    }
}

fn parse_share(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(share) if (0.0..=1.0).contains(&share) => Ok(share),
        _ => Err("expected a share from 0 to 1, such as 0.2".into()),
    }
}

fn parse_rate(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(rate) if rate > 0.0 && f64::is_finite(rate) => Ok(rate),
        _ => Err("expected a number above 0".into()),
    }
}
