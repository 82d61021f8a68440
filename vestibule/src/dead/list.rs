//! `vestibule dead list`: what was given up, by worker and cause, or letter by letter.

use std::io;

use anyhow::Context;
use clap::Args;
use comfy_table::{CellAlignment, Table, presets::NOTHING};
use serde_json::{Value, json};
use time::OffsetDateTime;
use vestibule_store::{Letter, LetterFilter, LetterGroup, LetterState, Store};

use super::selection::{Narrowing, retry_command};
use crate::{approvals::at, cli::Output, print::say};

const EXAMPLES: &str = "\
Examples:
  vestibule dead list
      What is parked, by worker and cause, each with the command that sends it back.
  vestibule dead list --letters --worker notify --since 2h
      The letters themselves: what has `notify` given up in the last two hours?
  vestibule dead list --letters --state dropped --output json
      What has somebody dropped?

A time is a date (2026-11-22), a time in RFC 3339 (2026-11-22T10:00:00Z) or so long ago (2h, 30d).
The list holds no personal data.";

/// Which letters to list, and how.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct ListArgs {
    #[command(flatten)]
    narrowing: Narrowing,
    /// parked, retrying, delivered, dropped, or all
    #[arg(long, default_value = "parked", value_parser = state)]
    state: StateFilter,
    /// The letters themselves, the newest first, instead of groups
    #[arg(long)]
    letters: bool,
    /// At most so many letters
    #[arg(long, value_name = "N", default_value_t = 50, requires = "letters")]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=500))]
    limit: u32,
    #[arg(long, value_enum, default_value_t = Output::Table)]
    output: Output,
}

#[derive(Clone, Copy, Debug)]
struct StateFilter(Option<LetterState>);

fn state(word: &str) -> Result<StateFilter, String> {
    if word == "all" {
        return Ok(StateFilter(None));
    }
    word.parse()
        .map(|it| StateFilter(Some(it)))
        .map_err(|_| "expected parked, retrying, delivered, dropped or all".to_owned())
}

pub(super) async fn list(store: &Store, args: &ListArgs) -> anyhow::Result<()> {
    let filter = args.narrowing.filter(args.state.0, OffsetDateTime::now_utc());
    if args.letters {
        let letters = store.letters(&filter, None, args.limit).await.context(UNREADABLE)?;
        match args.output {
            Output::Json => {
                say!("{}", Value::from_iter(letters.iter().map(letter_as_json)))?;
            }
            Output::Table if letters.is_empty() => nothing(&filter)?,
            Output::Table => {
                say!("{}", letters_as_table(&letters))?;
                if letters.len() >= args.limit as usize {
                    say!("\nThere may be more; --limit shows up to 500.")?;
                }
            }
        }
        return Ok(());
    }
    let groups = groups(store, &filter).await?;
    match args.output {
        Output::Json => {
            let groups = groups.iter().map(|(state, it)| group_as_json(*state, it, &filter));
            say!("{}", Value::from_iter(groups))?;
        }
        Output::Table if groups.is_empty() => nothing(&filter)?,
        Output::Table => {
            say!("{}", groups_as_table(&groups))?;
            let mut commands =
                groups.iter().filter_map(|(state, it)| command(*state, it, &filter)).peekable();
            if commands.peek().is_some() {
                say!("\nOnce mended, this sends them back:")?;
            }
            commands.try_for_each(|it| say!("  {it}"))?;
        }
    }
    Ok(())
}

/// Letters by state, worker and cause.
pub(super) async fn groups(
    store: &Store,
    filter: &LetterFilter,
) -> anyhow::Result<Vec<(LetterState, LetterGroup)>> {
    let mut groups = Vec::new();
    for state in LetterState::ALL {
        if filter.state.is_none_or(|it| it == state) {
            let filter = LetterFilter { state: Some(state), ..filter.clone() };
            let found = store.letter_groups(&filter).await.context(UNREADABLE)?;
            groups.extend(found.into_iter().map(|it| (state, it)));
        }
    }
    Ok(groups)
}

/// What sends a group back, if it can be.
fn command(state: LetterState, group: &LetterGroup, listed: &LetterFilter) -> Option<String> {
    let is_parked = state == LetterState::Parked;
    is_parked.then(|| retry_command(&group.worker, &group.cause_class, listed))
}

pub(super) const UNREADABLE: &str = "could not read the dead letters";

fn nothing(filter: &LetterFilter) -> io::Result<()> {
    let state = filter.state.map_or(String::new(), |it| format!(" that is {it}"));
    say!("there is no dead letter{state}")
}

pub(super) fn groups_as_table(groups: &[(LetterState, LetterGroup)]) -> Table {
    let mut table = Table::new();
    table.load_style(NOTHING);
    let header = ["state", "worker", "cause", "letters", "oldest", "newest", "the newest error"];
    table.set_header(header);
    for (state, it) in groups {
        table.add_row([
            state.to_string(),
            it.worker.clone(),
            it.cause_class.clone(),
            it.count.to_string(),
            at(it.oldest),
            at(it.newest),
            it.sample_error.clone(),
        ]);
    }
    if let Some(count) = table.column_mut(3) {
        count.set_cell_alignment(CellAlignment::Right);
    }
    table
}

fn group_as_json(state: LetterState, group: &LetterGroup, filter: &LetterFilter) -> Value {
    json!({
        "state": state.as_str(),
        "worker": group.worker,
        "cause": group.cause_class,
        "letters": group.count,
        "oldest": at(group.oldest),
        "newest": at(group.newest),
        "error": group.sample_error,
        "retry": command(state, group, filter),
    })
}

fn letters_as_table(letters: &[Letter]) -> Table {
    let mut table = Table::new();
    table.load_style(NOTHING);
    table.set_header(["letter", "state", "parked", "worker", "cause", "event", "error"]);
    for it in letters {
        table.add_row([
            it.id.to_string(),
            it.state.to_string(),
            at(it.parked_at),
            it.worker.clone(),
            it.cause_class.clone(),
            it.event_id.map_or_else(|| "unreadable".to_owned(), |it| it.to_string()),
            it.error.clone(),
        ]);
    }
    table
}

pub(super) fn letter_as_json(letter: &Letter) -> Value {
    json!({
        "letter": letter.id,
        "state": letter.state.as_str(),
        "worker": letter.worker,
        "event": letter.event_id,
        "person": letter.person,
        "sequence": letter.sequence,
        "cause": letter.cause_class,
        "error": letter.error,
        "parked_at": at(letter.parked_at),
        "changed_at": at(letter.changed_at),
        "redrives": letter.redrives,
    })
}
