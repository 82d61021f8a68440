//! Goes through chosen letters in batches: says first what will be touched, asks, stops when told.

use anyhow::{Context, bail};
use indicatif::ProgressBar;
use time::OffsetDateTime;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use vestibule_store::{LetterFilter, LetterGroup, LetterState, Store};

use super::{
    list::{UNREADABLE, groups, groups_as_table},
    selection::{Selection, answer},
};
use crate::{cli::Output, print::say, simulate};

/// What a command is about to touch.
pub(super) struct Plan {
    filter: LetterFilter,
    pub(super) groups: Vec<(LetterState, LetterGroup)>,
    /// How many letters are parked and meant.
    pub(super) parked: u64,
    /// How many of them are touched, the oldest.
    pub(super) count: u64,
}

/// What is done where more than one letter is meant and nobody can be asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unasked {
    /// Whoever wrote the command has decided.
    Goes,
    /// What cannot be undone needs `--yes`.
    Refused,
}

impl Plan {
    pub(super) async fn make(store: &Store, selection: &Selection) -> anyhow::Result<Self> {
        let filter = selection.filter(OffsetDateTime::now_utc());
        let groups = groups(store, &filter).await?;
        let parked = sum(&groups);
        // A number that is mistyped must not be passed over.
        let strangers = not_parked(store, &selection.letters).await?;
        if !strangers.is_empty() {
            bail!("nothing was changed: {}", strangers.join("; "));
        }
        let count = selection.max.map_or(parked, |max| parked.min(max));
        Ok(Self { filter, groups, parked, count })
    }

    /// How many of the letters that fit are parked now.
    pub(super) async fn still_parked(&self, store: &Store) -> anyhow::Result<u64> {
        Ok(sum(&groups(store, &self.filter).await?))
    }

    /// Shows what is meant and says whether to go on; `verb` as in "send back".
    pub(super) fn go(
        &self,
        selection: &Selection,
        output: Output,
        verb: &str,
        unasked: Unasked,
    ) -> anyhow::Result<bool> {
        let Self { groups, parked, count, .. } = self;
        let people = output == Output::Table;
        if people && *count == 0 {
            say!("no dead letter that is parked is meant")?;
        } else if people {
            say!("{}", groups_as_table(groups))?;
            if count < parked {
                say!("\nmeant are the {count} oldest of them")?;
            }
        }
        let asks = *count > 1 && !selection.yes && !selection.dry_run;
        let question = format!("\n{verb} {}?", letters(*count));
        let yes = !asks
            || match answer(&question)? {
                Some(yes) => yes,
                None if unasked == Unasked::Goes => true,
                None => bail!("{}: nobody can be asked here; --yes says so", question.trim()),
            };
        let go = yes && *count > 0 && !selection.dry_run;
        if people && *count > 0 && !go {
            say!("\nnothing was changed")?;
        }
        Ok(go)
    }
}

fn sum(groups: &[(LetterState, LetterGroup)]) -> u64 {
    groups.iter().map(|(_, it)| it.count).sum()
}

async fn not_parked(store: &Store, named: &[i64]) -> anyhow::Result<Vec<String>> {
    let mut strangers = Vec::new();
    for id in named {
        match store.letter(*id).await.context(UNREADABLE)? {
            None => strangers.push(format!("there is no letter {id}")),
            Some(it) if it.letter.state == LetterState::Parked => {}
            Some(it) => strangers.push(format!("letter {id} is {}", it.letter.state)),
        }
    }
    Ok(strangers)
}

/// Letters in the order of their numbers, a batch at a time.
///
/// No more than were meant at the start: what is parked meanwhile nobody was asked about.
pub(super) struct Sweep<'a> {
    store: &'a Store,
    filter: LetterFilter,
    after: i64,
    left: u64,
    pub(super) stop: CancellationToken,
    progress: ProgressBar,
}

impl<'a> Sweep<'a> {
    /// `what` stands before the bar.
    pub(super) fn begin(
        store: &'a Store,
        plan: &Plan,
        output: Output,
        what: &'static str,
    ) -> anyhow::Result<Self> {
        let progress = match output {
            Output::Table => simulate::progress(what, plan.count),
            Output::Json => ProgressBar::hidden(),
        };
        let filter = plan.filter.clone();
        Ok(Self { store, filter, after: 0, left: plan.count, stop: stop_on_signal()?, progress })
    }

    /// The next letters, at most so many; none when all is done or somebody wants us to stop.
    pub(super) async fn next(&mut self, most: u64) -> anyhow::Result<Vec<i64>> {
        if self.stop.is_cancelled() || self.left == 0 {
            return Ok(vec![]);
        }
        let limit = u32::try_from(most.min(self.left)).unwrap_or(u32::MAX);
        let found = self.store.letter_ids(&self.filter, self.after, limit).await;
        let ids = found.context(UNREADABLE)?;
        self.after = ids.last().copied().unwrap_or(self.after);
        self.left = self.left.saturating_sub(ids.len() as u64);
        Ok(ids)
    }

    /// So many more are dealt with.
    pub(super) fn advance(&self, letters: usize) {
        self.progress.inc(letters as u64);
    }

    /// Whether it was stopped before it was through.
    pub(super) fn end(self) -> bool {
        self.progress.finish_and_clear();
        self.left > 0 && self.stop.is_cancelled()
    }
}

/// Ctrl-C asks us to stop, and a batch that is under way is finished first.
fn stop_on_signal() -> anyhow::Result<CancellationToken> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let stop = CancellationToken::new();
    let asked = stop.clone();
    tokio::spawn(async move {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
        asked.cancel();
    });
    Ok(stop)
}

pub(super) fn letters(count: u64) -> String {
    if count == 1 { "1 dead letter".to_owned() } else { format!("{count} dead letters") }
}
