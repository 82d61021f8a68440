//! `vestibule subscriber test`: one made-up event, and what the subscriber makes of it.

use std::process::ExitCode;

use anyhow::{Context, bail};
use serde_json::json;
use time::OffsetDateTime;
use uuid::Uuid;
use vestibule_events::{Kind, SignUpEvent};
use vestibule_workers::{Exchange, ExecSubscriber, HandleError, WebhookSubscriber, sample_event};

use super::{find, subscriber};
use crate::{
    cli::Output,
    config::{Config, WaySettings, WorkerConfig},
    print::say,
    replay::parse_pseudonym,
    wiring::listed,
};

/// By these a subscriber can tell it from a sign-up.
const SUBJECT: &str = "00000000000000000000000000000000";
const CORRELATION_ID: &str = "vestibule-subscriber-test";

/// Exits with 1 where the event would not have been done.
pub(super) async fn test(config: &Config, name: &str, output: Output) -> anyhow::Result<ExitCode> {
    let worker = find(config, name)?;
    let subscriber = subscriber(worker).context("it was found among the subscribers")?;
    let event = sample(config, worker)?;
    let exchange = match subscriber.way.settings(name, worker.settings.timeout)? {
        Some(WaySettings::Webhook(settings)) => {
            WebhookSubscriber::new(settings).map_err(listed)?.exchange(&event).await
        }
        Some(WaySettings::Exec(settings)) => {
            ExecSubscriber::new(settings).map_err(listed)?.exchange(&event).await
        }
        None => bail!(
            "`{name}` takes its events from the stream itself, so there is nothing to call. This is \
             what one looks like:\n{}",
            serde_json::to_string_pretty(&event)?
        ),
    };
    show(&exchange, output)
}

/// The first event that would concern it.
fn sample(config: &Config, worker: &WorkerConfig) -> anyhow::Result<SignUpEvent> {
    let mut event = sample_event();
    let now = OffsetDateTime::now_utc();
    // Another one each time, for a subscriber knows an event again by its id.
    event.id = Uuid::now_v7();
    event.time = now.replace_millisecond(now.millisecond())?;
    event.person = parse_pseudonym(SUBJECT).map_err(anyhow::Error::msg)?;
    event.kind = worker.settings.filter.kinds.first().copied().unwrap_or(Kind::Accepted);
    let first = config.connectors.first().map(|it| it.name.clone());
    if let Some(connector) = worker.settings.filter.connectors.first().cloned().or(first) {
        event.sign_up.connector = connector;
    }
    event.sign_up.correlation_id = Some(CORRELATION_ID.to_owned());
    Ok(event)
}

fn show(exchange: &Exchange, output: Output) -> anyhow::Result<ExitCode> {
    let Exchange { sent, received, outcome } = exchange;
    let (word, cause) = match outcome {
        Ok(()) => ("done", None),
        Err(HandleError::Park { source, .. }) => ("park", Some(format!("{source:#}"))),
        Err(HandleError::Retry { source, .. }) => ("retry", Some(format!("{source:#}"))),
        Err(HandleError::StoreUnavailable(source)) => ("retry", Some(format!("{source:#}"))),
    };
    match output {
        Output::Json => say!(
            "{}",
            json!({ "sent": sent, "received": received, "outcome": word, "cause": cause })
        )?,
        Output::Table => {
            for line in sent {
                say!("> {line}")?;
            }
            for line in received {
                say!("< {line}")?;
            }
            let meaning = match word {
                "done" => "done: an event that is answered so is not sent again".to_owned(),
                "park" => format!(
                    "parked: {}\n    an event that is answered so is given up at once, as a dead \
                     letter",
                    cause.unwrap_or_default()
                ),
                _ => format!(
                    "tried again: {}\n    an event that is answered so comes again later",
                    cause.unwrap_or_default()
                ),
            };
            say!("\n{meaning}")?;
        }
    }
    Ok(if outcome.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
