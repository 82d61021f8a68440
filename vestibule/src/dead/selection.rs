//! Which dead letters a command is about.

use std::io::{self, BufRead, IsTerminal, Write};

use clap::{ArgGroup, Args};
use time::OffsetDateTime;
use uuid::Uuid;
use vestibule_events::Person;
use vestibule_store::{LetterFilter, LetterState};

use crate::{
    approvals::at,
    replay::{Moment, parse_moment, parse_pseudonym},
};

/// What letters have in common.
#[derive(Clone, Debug, Default, Args)]
pub(super) struct Narrowing {
    /// Only of this worker
    #[arg(long, value_name = "NAME")]
    worker: Option<String>,
    /// Only with this cause, as the list names it: refused, timeout, …
    #[arg(long, value_name = "CAUSE")]
    cause: Option<String>,
    /// Only of this person (the pseudonym in events)
    #[arg(long, value_name = "PSEUDONYM", value_parser = parse_pseudonym)]
    person: Option<Person>,
    /// Only of this event
    #[arg(long, value_name = "UUID")]
    event: Option<Uuid>,
    /// Only those parked from this time on, or from so long ago
    #[arg(long, value_name = "TIME", value_parser = parse_moment)]
    since: Option<Moment>,
    /// Only those parked before this time
    #[arg(long, value_name = "TIME", value_parser = parse_moment)]
    until: Option<Moment>,
}

/// Letters to do something with: one by one, or by what they have in common.
#[derive(Clone, Debug, Args)]
#[command(group(
    ArgGroup::new("which")
        .args(["letters", "worker", "cause", "person", "event", "since", "until", "all"])
        .multiple(true)
        .required(true)
))]
pub(super) struct Selection {
    /// These letters, by the numbers that `vestibule dead list --letters` shows
    #[arg(value_name = "LETTER", value_parser = clap::value_parser!(i64).range(1..))]
    #[arg(conflicts_with_all = ["worker", "cause", "person", "event", "since", "until", "all"])]
    pub(super) letters: Vec<i64>,
    #[command(flatten)]
    narrowing: Narrowing,
    /// All that are parked
    #[arg(long)]
    #[arg(conflicts_with_all = ["worker", "cause", "person", "event", "since", "until"])]
    all: bool,
    /// At most so many, the oldest first
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub(super) max: Option<u64>,
    /// Only say what would be done
    #[arg(long)]
    pub(super) dry_run: bool,
    /// Do not ask before more than one letter is touched
    #[arg(long)]
    pub(super) yes: bool,
}

impl Narrowing {
    pub(super) fn filter(&self, state: Option<LetterState>, now: OffsetDateTime) -> LetterFilter {
        LetterFilter {
            worker: self.worker.clone(),
            cause_class: self.cause.clone(),
            state,
            event_id: self.event,
            person: self.person.clone(),
            parked_from: self.since.map(|it| it.resolve(now)),
            parked_before: self.until.map(|it| it.resolve(now)),
            ..LetterFilter::default()
        }
    }
}

impl Selection {
    /// Only what is parked can be sent back or dropped.
    pub(super) fn filter(&self, now: OffsetDateTime) -> LetterFilter {
        let filter = self.narrowing.filter(Some(LetterState::Parked), now);
        LetterFilter { ids: self.letters.clone(), ..filter }
    }
}

/// The command that sends a group back, narrowed as the list was.
pub(super) fn retry_command(worker: &str, cause: &str, listed: &LetterFilter) -> String {
    let mut command = format!("vestibule dead retry --worker {worker} --cause {cause}");
    let mut more = |option: &str, value: Option<String>| {
        if let Some(value) = value {
            command.extend([" --", option, " ", &value]);
        }
    };
    more("person", listed.person.as_ref().map(ToString::to_string));
    more("event", listed.event_id.map(|it| it.to_string()));
    more("since", listed.parked_from.map(at));
    more("until", listed.parked_before.map(at));
    command
}

/// Asks whoever sits at the terminal; `None` where nobody does.
pub(crate) fn answer(question: &str) -> io::Result<Option<bool>> {
    if !(io::stdin().is_terminal() && io::stderr().is_terminal()) {
        return Ok(None);
    }
    ask(question, &mut io::stdin().lock(), &mut io::stderr()).map(Some)
}

/// Only a plain yes is one.
fn ask(question: &str, answers: &mut impl BufRead, out: &mut impl Write) -> io::Result<bool> {
    write!(out, "{question} [y/N] ")?;
    out.flush()?;
    let mut answer = String::new();
    answers.read_line(&mut answer)?;
    Ok(["y", "yes"].contains(&answer.trim().to_ascii_lowercase().as_str()))
}
