//! `vestibule dead show`: one letter with all that is known about it.

use std::io;

use anyhow::{Context, bail};
use clap::Args;
use comfy_table::{Table, presets::NOTHING};
use data_encoding::BASE64;
use serde_json::{Value, json};
use vestibule_store::{FailedAttempt, Letter, LetterChange, LetterState, LetterWhole, Store};

use super::list::{UNREADABLE, letter_as_json};
use crate::{approvals::at, cli::Output, print::say};

#[derive(Debug, Args)]
pub(crate) struct ShowArgs {
    /// The letter, by the number that `vestibule dead list --letters` shows
    #[arg(value_name = "LETTER", value_parser = clap::value_parser!(i64).range(1..))]
    letter: i64,
    /// The event too, as it stands in the log. It holds personal data: take care where it goes
    #[arg(long)]
    event: bool,
    #[arg(long, value_enum, default_value_t = Output::Table)]
    output: Output,
}

pub(super) async fn show(store: &Store, args: &ShowArgs) -> anyhow::Result<()> {
    let Some(whole) = store.letter(args.letter).await.context(UNREADABLE)? else {
        bail!(
            "there is no dead letter {}; `vestibule dead list --letters --state all` shows which \
             there are",
            args.letter
        );
    };
    match args.output {
        Output::Json => say!("{}", as_json(&whole, args.event))?,
        Output::Table => print(&whole, args.event)?,
    }
    Ok(())
}

fn print(whole: &LetterWhole, with_event: bool) -> io::Result<()> {
    let LetterWhole { letter, payload, history, attempts } = whole;
    say!("{}", facts(letter))?;
    say!("\nWhat has become of it\n{}", changes(history))?;
    if attempts.is_empty() {
        say!("\nNo attempt was made: the bytes in the log could not be read as an event.")?;
    } else {
        say!("\nAttempts that failed\n{}", failures(attempts))?;
    }
    if with_event {
        say!("\nThe event\n{}", event_as_text(payload))?;
    }
    say!("\n{}", what_next(letter))
}

fn facts(letter: &Letter) -> Table {
    let mut table = Table::new();
    table.load_style(NOTHING);
    let mut row = |name: &str, value: String| {
        table.add_row([name.to_owned(), value]);
    };
    row("letter", letter.id.to_string());
    row("state", letter.state.to_string());
    row("worker", letter.worker.clone());
    if let Some(event) = letter.event_id {
        row("event", event.to_string());
    }
    if let Some(person) = &letter.person {
        row("person", person.to_string());
    }
    row("sequence", letter.sequence.to_string());
    row("cause", letter.cause_class.clone());
    row("error", letter.error.clone());
    row("parked", at(letter.parked_at));
    row("sent back", times(letter.redrives));
    table
}

fn times(count: u32) -> String {
    match count {
        0 => "never".to_owned(),
        1 => "once".to_owned(),
        many => format!("{many} times"),
    }
}

fn changes(history: &[LetterChange]) -> Table {
    let mut table = Table::new();
    table.load_style(NOTHING);
    for it in history {
        let by = it.actor.as_ref().map_or(String::new(), |actor| format!("by {actor}"));
        let why = [&it.cause_class, &it.error, &it.reason];
        let why: Vec<_> = why.into_iter().flatten().map(String::as_str).collect();
        table.add_row([at(it.at), it.state.to_string(), by, why.join(": ")]);
    }
    table
}

fn failures(attempts: &[FailedAttempt]) -> Table {
    let mut table = Table::new();
    table.load_style(NOTHING);
    table.set_header(["started", "took", "cause", "error"]);
    for it in attempts {
        let took = humantime::format_duration(it.took).to_string();
        table.add_row([at(it.started_at), took, it.cause_class.clone(), it.error.clone()]);
    }
    table
}

fn event_as_text(payload: &[u8]) -> String {
    let pretty = serde_json::from_slice::<Value>(payload)
        .and_then(|event| serde_json::to_string_pretty(&event));
    pretty.unwrap_or_else(|_| String::from_utf8_lossy(payload).escape_debug().to_string())
}

/// What somebody who has read it can do.
fn what_next(letter: &Letter) -> String {
    let Letter { id, worker, .. } = letter;
    match letter.state {
        LetterState::Parked => format!(
            "Mend what made it fail, then: vestibule dead retry {id}\n\
             Where it is never to be done: vestibule dead drop {id} --reason TEXT"
        ),
        LetterState::Retrying => format!(
            "It was sent back and waits for the worker `{worker}`; `vestibule worker list` shows \
             what keeps the worker from it."
        ),
        LetterState::Delivered => format!("The worker `{worker}` has dealt with it."),
        LetterState::Dropped => {
            "It is not tried again. The event is still in the log: vestibule replay".to_owned()
        }
    }
}

fn as_json(whole: &LetterWhole, with_event: bool) -> Value {
    let LetterWhole { letter, payload, history, attempts } = whole;
    let mut json = letter_as_json(letter);
    json["history"] = Value::from_iter(history.iter().map(change_as_json));
    json["attempts"] = Value::from_iter(attempts.iter().map(attempt_as_json));
    if with_event {
        match serde_json::from_slice::<Value>(payload) {
            Ok(payload) => json["payload"] = payload,
            Err(_) => json["payload_base64"] = json!(BASE64.encode(payload)),
        }
    }
    json
}

fn change_as_json(change: &LetterChange) -> Value {
    json!({
        "at": at(change.at),
        "state": change.state.as_str(),
        "cause": change.cause_class,
        "error": change.error,
        "by": change.actor,
        "reason": change.reason,
    })
}

fn attempt_as_json(attempt: &FailedAttempt) -> Value {
    json!({
        "started_at": at(attempt.started_at),
        "took_seconds": attempt.took.as_secs_f64(),
        "cause": attempt.cause_class,
        "error": attempt.error,
    })
}
