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

#[cfg(test)]
mod tests {
    use clap::Parser;
    use time::macros::datetime;

    use super::*;

    const NOW: OffsetDateTime = datetime!(2026-11-22 12:00 UTC);

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        selection: Selection,
    }

    fn selection(line: &str) -> Result<Selection, clap::Error> {
        let line = std::iter::once("retry").chain(line.split_whitespace());
        Line::try_parse_from(line).map(|line| line.selection)
    }

    #[test]
    fn letters_are_named_or_described_and_never_meant_by_accident() {
        for line in ["7", "7 8 9", "--all", "--worker notify", "--since 2h --max 10 --dry-run"] {
            assert!(selection(line).is_ok(), "{line}");
        }
        for line in [
            "",
            "--max 10",
            "--dry-run --yes",
            "0",
            "7 --all",
            "7 --worker notify",
            "--all --worker notify",
            "--worker notify --max 0",
            "--person ada@example.com",
        ] {
            assert!(selection(line).is_err(), "{line}");
        }
    }

    #[test]
    fn only_what_is_parked_is_meant() {
        let filter = selection("--worker notify --cause refused --since 2h").unwrap().filter(NOW);
        let expected = LetterFilter {
            worker: Some("notify".into()),
            cause_class: Some("refused".into()),
            state: Some(LetterState::Parked),
            parked_from: Some(datetime!(2026-11-22 10:00 UTC)),
            ..LetterFilter::default()
        };
        assert_eq!(filter, expected);
        let filter = selection("7 8").unwrap().filter(NOW);
        assert_eq!((filter.ids, filter.state), (vec![7, 8], Some(LetterState::Parked)));
    }

    #[test]
    fn the_command_for_a_group_means_what_was_listed_and_no_more() {
        let listed = selection("--since 2h --until 2026-11-22T11:00:00Z").unwrap().filter(NOW);
        let command = retry_command("notify", "refused", &listed);
        let again = command.strip_prefix("vestibule dead retry ").unwrap();
        let again = selection(again).unwrap().filter(NOW + time::Duration::hours(1));
        let expected = LetterFilter {
            worker: Some("notify".into()),
            cause_class: Some("refused".into()),
            ..listed
        };
        assert_eq!(again, expected, "{command}");
    }

    #[test]
    fn only_a_plain_yes_is_one() {
        let answer = |text: &str| ask("Really?", &mut text.as_bytes(), &mut Vec::new()).unwrap();
        assert!(["y\n", "Y\n", "yes\n", " YES \n"].into_iter().all(answer));
        assert!(!["", "\n", "n\n", "no\n", "yesterday\n"].into_iter().any(answer));
    }
}
