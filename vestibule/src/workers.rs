//! `vestibule worker list|pause|resume|remove`: what waits for each worker, and what keeps it.
//!
//! What the log holds for a worker and what the store has set aside are looked at from outside:
//! whether a process runs cannot be known here, so nothing is said about it.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use anyhow::{Context, bail};
use clap::{Args, Subcommand};
use comfy_table::{CellAlignment, Table, presets::NOTHING};
use futures_util::StreamExt as _;
use serde_json::{Value, json};
use time::OffsetDateTime;
use vestibule_events::{Backlog, EventLog, LocalLog, Replay, Role, Start};
use vestibule_store::{Done, Memory, PausedWorker, SetAside, Store};

use crate::{
    approvals::{approver, at},
    cli::Output,
    config::{BUILT_IN, Config, WorkerConfig, did_you_mean, is_ours},
    dead::{answer, reason},
    migrate,
    print::say,
    replay, wiring,
};

/// What can be done about a worker. These words win over the name of a worker.
#[derive(Debug, Subcommand)]
pub(crate) enum WorkerCommand {
    /// List the workers: what waits for each, and which are paused
    List {
        #[arg(long, value_enum, default_value_t = Output::Table)]
        output: Output,
    },
    /// Let a worker take no events, in every process of it, until it is resumed
    ///
    /// It finishes what it has in hand and takes nothing more within about a second. What comes
    /// waits, in the log and in the store, and nothing of it is lost or given up meanwhile; events
    /// of an age that retention removes are gone from the log for everybody, so do not forget it.
    Pause {
        #[command(flatten)]
        which: Which,
        /// Why; shown by `vestibule worker list`
        #[arg(long, value_name = "TEXT", value_parser = reason)]
        reason: String,
        /// Who pauses it
        #[arg(long, value_name = "NAME", env = "USER", value_parser = approver)]
        by: String,
    },
    /// Let a paused worker go on where it was
    Resume {
        #[command(flatten)]
        which: Which,
    },
    /// Remove what a worker leaves behind that is configured no more: its durable consumer
    ///
    /// Shows first what is lost. A worker of that name that is configured later begins anew, where
    /// its `start` says.
    Remove {
        #[command(flatten)]
        which: Which,
        /// Do not ask
        #[arg(long)]
        yes: bool,
        /// Who removes it; kept with the dead letters that this drops
        #[arg(long, value_name = "NAME", env = "USER", value_parser = approver)]
        by: String,
    },
}

#[derive(Debug, Args)]
pub(crate) struct Which {
    /// The worker, as `vestibule worker list` names it
    #[arg(value_name = "NAME")]
    name: String,
}

pub(crate) async fn workers(command: WorkerCommand, config: &Config) -> anyhow::Result<()> {
    let store = wiring::existing_store(config).await?;
    match command {
        WorkerCommand::List { output } => show(config, &store, output, |_| true).await,
        WorkerCommand::Pause { which, reason, by } => {
            pause(config, &store, &which.name, &by, &reason).await
        }
        WorkerCommand::Resume { which } => resume(config, &store, &which.name).await,
        WorkerCommand::Remove { which, yes, by } => {
            remove(config, &store, &which.name, &by, yes).await
        }
    }
}

/// A worker as it is seen from outside.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    configured: bool,
    paused: Option<PausedWorker>,
    backlog: Waiting,
    /// When the oldest event happened that waits, in the log or in the store.
    oldest: Option<OffsetDateTime>,
    aside: SetAside,
}

/// What the log holds for a worker.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Waiting {
    /// The log could not be asked.
    #[default]
    Unknown,
    /// It knows nobody of that name.
    NoConsumer,
    Known(Backlog),
}

/// Shows the workers that are wanted.
pub(crate) async fn show(
    config: &Config,
    store: &Store,
    output: Output,
    wanted: impl Fn(&str) -> bool,
) -> anyhow::Result<()> {
    let log = replay::open_log(config).await;
    if let Err(error) = &log {
        eprintln!("warning: what waits in the log is not known: {error:#}");
    }
    let mut seen = look(config, store, log.ok(), None).await?;
    seen.retain(|name, _| wanted(name));
    match output {
        Output::Json => {
            say!("{}", Value::from_iter(seen.iter().map(|(name, it)| as_json(name, it))))?;
        }
        Output::Table if seen.is_empty() => {
            say!("the configuration has none; add a [workers.NAME] section or a subscriber")?;
        }
        Output::Table => {
            say!("{}", as_table(&seen))?;
            let remarks: Vec<_> = seen.iter().flat_map(|(name, it)| remarks(name, it)).collect();
            if !remarks.is_empty() {
                say!("\n{}", remarks.join("\n"))?;
            }
        }
    }
    Ok(())
}

/// Every worker that is configured or has left something behind.
async fn look(
    config: &Config,
    store: &Store,
    log: Option<Arc<dyn EventLog>>,
    also: Option<&str>,
) -> anyhow::Result<BTreeMap<String, Seen>> {
    let mut aside = store.set_aside_of_all().await.context(UNREADABLE)?;
    let paused = store.paused_workers().await.context(UNREADABLE)?;
    let mut paused: BTreeMap<_, _> = paused.into_iter().map(|it| (it.worker.clone(), it)).collect();
    let configured: BTreeSet<_> = configured(config).map(str::to_owned).collect();
    let names = configured.iter().chain(aside.keys()).chain(paused.keys()).cloned();
    let built_in = BUILT_IN.iter().copied().chain(also).map(str::to_owned);
    let mut seen = BTreeMap::new();
    for name in names.chain(built_in).collect::<BTreeSet<_>>() {
        let backlog = match &log {
            Some(log) => waiting(log.as_ref(), &name).await,
            None => Waiting::Unknown,
        };
        let aside = aside.remove(&name).unwrap_or_default();
        let in_log = match (&log, backlog) {
            (Some(log), Waiting::Known(it)) if !it.is_empty() => {
                oldest_in_log(config, log.as_ref(), &name).await
            }
            _ => None,
        };
        let it = Seen {
            configured: configured.contains(&name),
            paused: paused.remove(&name),
            oldest: [in_log, aside.oldest_event].into_iter().flatten().min(),
            aside,
            backlog,
        };
        if it.is_there() {
            seen.insert(name, it);
        }
    }
    Ok(seen)
}

/// The workers of the configuration; a subscriber whose file is refused now is one still.
fn configured(config: &Config) -> impl Iterator<Item = &str> {
    config.workers.iter().map(WorkerConfig::name).chain(config.subscribers.names())
}

const UNREADABLE: &str = "could not read what the store has set aside";

async fn waiting(log: &dyn EventLog, name: &str) -> Waiting {
    match log.backlog(name).await {
        Ok(Some(backlog)) => Waiting::Known(backlog),
        Ok(None) => Waiting::NoConsumer,
        Err(error) => {
            let error = anyhow::Error::from(error);
            eprintln!("warning: what waits in the log for `{name}` is not known: {error:#}");
            Waiting::Unknown
        }
    }
}

/// When the first event happened that a worker has not done. Not to know it is no reason to show
/// nothing.
async fn oldest_in_log(config: &Config, log: &dyn EventLog, name: &str) -> Option<OffsetDateTime> {
    let worker = config.all_workers().find(|it| it.name() == name)?;
    let first = log.first_undone(name).await.ok()??;
    let replay = Replay {
        start: Start::Sequence(first),
        until: None,
        filter: worker.settings.filter.clone(),
        person: None,
        follow: false,
    };
    let stored = log.replay(replay).await.ok()?.next().await?;
    Some(stored.ok()?.event.time)
}

impl Seen {
    fn is_there(&self) -> bool {
        let Self { configured, paused, backlog, aside, oldest: _ } = self;
        *configured
            || paused.is_some()
            || matches!(backlog, Waiting::Known(_))
            || aside.retries > 0
            || aside.parked > 0
    }
}

fn as_table(seen: &BTreeMap<String, Seen>) -> Table {
    let mut table = Table::new();
    table.load_style(NOTHING);
    table.set_header([
        "worker",
        "state",
        "waiting",
        "in hand",
        "oldest",
        "retries",
        "next retry",
        "dead letters",
    ]);
    for (name, it) in seen {
        let (waiting, in_hand) = match it.backlog {
            Waiting::Unknown => ("?".to_owned(), "?".to_owned()),
            Waiting::NoConsumer => ("-".to_owned(), "-".to_owned()),
            Waiting::Known(it) => (it.waiting.to_string(), it.in_flight.to_string()),
        };
        table.add_row([
            name.clone(),
            state(it).to_owned(),
            waiting,
            in_hand,
            it.oldest.map_or_else(|| "-".to_owned(), at),
            it.aside.retries.to_string(),
            it.aside.next_due.map_or_else(|| "-".to_owned(), at),
            it.aside.parked.to_string(),
        ]);
    }
    for column in [2, 3, 5, 7] {
        if let Some(numbers) = table.column_mut(column) {
            numbers.set_cell_alignment(CellAlignment::Right);
        }
    }
    table
}

fn state(seen: &Seen) -> &'static str {
    match seen {
        Seen { configured: false, .. } => "not configured",
        Seen { paused: Some(_), .. } => "paused",
        _ => "configured",
    }
}

/// What somebody could do something about.
fn remarks(name: &str, seen: &Seen) -> Vec<String> {
    let mut remarks = Vec::new();
    if let Some(it) = &seen.paused {
        let PausedWorker { paused_at, paused_by, reason, .. } = it;
        remarks.push(format!(
            "{name} was paused {} by {paused_by}: {reason}\n    vestibule worker resume {name}",
            at(*paused_at)
        ));
    }
    if !seen.configured {
        remarks.push(format!(
            "{name} is not configured, or not enabled: what waits for it stays where it is\n    \
             vestibule worker remove {name}"
        ));
    }
    if seen.configured && seen.backlog == Waiting::NoConsumer {
        remarks.push(format!("{name} has never run with this log"));
    }
    if seen.aside.parked > 0 {
        remarks.push(format!(
            "{name} has given up {}\n    vestibule dead list --worker {name}",
            count(seen.aside.parked, "event")
        ));
    }
    remarks
}

fn count(number: u64, what: &str) -> String {
    if number == 1 { format!("1 {what}") } else { format!("{number} {what}s") }
}

fn as_json(name: &str, seen: &Seen) -> Value {
    let Seen { configured, paused, backlog, oldest, aside } = seen;
    let backlog = match backlog {
        Waiting::Known(it) => Some(*it),
        Waiting::Unknown | Waiting::NoConsumer => None,
    };
    json!({
        "worker": name,
        "configured": configured,
        "paused": paused.as_ref().map(|it| json!({
            "at": at(it.paused_at), "by": it.paused_by, "reason": it.reason,
        })),
        "waiting": backlog.map(|it| it.waiting),
        "in_hand": backlog.map(|it| it.in_flight),
        "oldest": oldest.map(at),
        "retries": aside.retries,
        "next_retry": aside.next_due.map(at),
        "dead_letters": aside.parked,
        "oldest_dead_letter": aside.oldest_parked.map(at),
    })
}

pub(crate) async fn pause(
    config: &Config,
    store: &Store,
    name: &str,
    by: &str,
    reason: &str,
) -> anyhow::Result<()> {
    let configured: Vec<_> = configured(config).collect();
    if !configured.contains(&name) {
        bail!("no worker `{name}` is configured{}", did_you_mean(name, &configured));
    }
    let done = store.pause_worker(name, by, reason, OffsetDateTime::now_utc()).await;
    match done.with_context(|| format!("could not pause {name}; nothing has changed"))? {
        Done::Now => {
            say!(
                "{name} finishes what it has in hand and takes no more events; `vestibule worker \
                 resume {name}` lets it go on"
            )?;
            Ok(())
        }
        Done::Before => {
            let before = store.paused(name).await.context(UNREADABLE)?;
            let who = before.map_or(String::new(), |it| {
                format!(", {} by {}: {}", at(it.paused_at), it.paused_by, it.reason)
            });
            say!("{name} was paused before{who}; that stays")?;
            Ok(())
        }
    }
}

/// One that is configured no more can be resumed too: its pause would hold when it comes back.
pub(crate) async fn resume(config: &Config, store: &Store, name: &str) -> anyhow::Result<()> {
    let resumed = store.resume_worker(name).await;
    if resumed.with_context(|| format!("could not resume {name}; nothing has changed"))? {
        say!("{name} goes on within about a second where it was")?;
        return Ok(());
    }
    let configured: Vec<_> = configured(config).collect();
    if !configured.contains(&name) {
        bail!("no worker `{name}` is paused or configured{}", did_you_mean(name, &configured));
    }
    say!("{name} was not paused")?;
    Ok(())
}

async fn remove(
    config: &Config,
    store: &Store,
    name: &str,
    by: &str,
    yes: bool,
) -> anyhow::Result<()> {
    if config.subscribers.names().any(|it| it == name) {
        bail!("`{name}` is a subscriber: `vestibule subscriber remove {name}`");
    }
    if config.workers.iter().any(|it| it.name() == name) {
        bail!(
            "the worker `{name}` is configured: take [workers.{name}] out of the configuration, \
             stop its processes, and then remove it; `vestibule worker pause {name}` only stops it"
        );
    }
    // What is lost has to be known before it is.
    let log = replay::open_log(config).await?;
    let mut seen = look(config, store, Some(log), Some(name)).await?;
    let Some(left) = seen.remove(name) else {
        let others = seen.iter().filter(|(_, it)| !it.configured);
        let others: Vec<_> = others.map(|(name, _)| name.as_str()).collect();
        bail!("a worker `{name}` has left nothing behind{}", did_you_mean(name, &others));
    };
    say!("This removes what {name} has left behind:\n{}", left.leftovers().join("\n"))?;
    if !yes && !answer("\nRemove it?")?.unwrap_or(false) {
        bail!("nothing was removed; --yes removes it without a question");
    }
    remove_leftovers(config, store, name, by, &left, InUse::Refuse).await?;
    say!("\n{name} is removed")?;
    Ok(())
}

/// What a worker of this name has in the log and in the store, if anything.
pub(crate) async fn leaves(
    config: &Config,
    store: &Store,
    name: &str,
) -> anyhow::Result<Option<Seen>> {
    let log = replay::open_log(config).await?;
    let mut seen = look(config, store, Some(log), Some(name)).await?;
    let left = seen.remove(name).map(|it| Seen { configured: false, ..it });
    Ok(left.filter(Seen::is_there))
}

/// Removes it. Nobody asks any more.
pub(crate) async fn remove_leftovers(
    config: &Config,
    store: &Store,
    name: &str,
    by: &str,
    left: &Seen,
    in_use: InUse,
) -> anyhow::Result<()> {
    if left.backlog != Waiting::NoConsumer {
        remove_consumer(config, name, in_use).await?;
    }
    // What ours have done is there to be seen in the store. A subscriber of the same name may be
    // another one altogether.
    let memory = if is_ours(name) { Memory::Kept } else { Memory::Lost };
    let removed = store.remove_worker(name, memory, by, OffsetDateTime::now_utc()).await;
    removed.with_context(|| match memory {
        Memory::Kept => {
            "the consumer is removed, and what the store has set aside is not; try again".to_owned()
        }
        Memory::Lost => format!(
            "the consumer is removed, and what the store knows of {name} is not; `vestibule \
             subscriber add {name}` forgets it before it makes another one, and a file that is \
             written by hand does not"
        ),
    })
}

/// Forgets what the store still knows of a subscriber that was removed: over NATS a process notes what
/// it had in hand after the removal, and the store may have been away. Whoever is added under the name
/// would be given some of that, and be kept from the rest.
///
/// Refused where there is a consumer of that name, for then something waits for somebody. One that takes
/// its events itself may have made it.
pub(crate) async fn forget_former(config: &Config, worker: &WorkerConfig) -> anyhow::Result<()> {
    let name = worker.name();
    let backlog = match &config.nats {
        Some(nats) => {
            let stream = wiring::stream(config, nats, Role::Provisioner).await?;
            migrate::let_in(nats, &stream).await?;
            stream.backlog(name).await
        }
        // Nothing has run here yet.
        None if !config.log_file().exists() => return Ok(()),
        None => replay::open_log(config).await?.backlog(name).await,
    };
    let backlog = backlog.with_context(|| format!("could not look for a consumer {name}"))?;
    if let Some(Backlog { waiting, in_flight }) = backlog {
        if !worker.runs_here() {
            return Ok(());
        }
        bail!(
            "the consumer {name} of a former one is still there, with {} not done: `vestibule \
             subscriber remove {name}` removes it; to go on where it was, write the file by hand",
            count(waiting + in_flight, "event")
        );
    }
    if !wiring::store_is_made(config) {
        return Ok(());
    }
    let store = wiring::existing_store(config).await?;
    let now = OffsetDateTime::now_utc();
    let forgotten = store.remove_worker(name, Memory::Lost, "subscriber add", now).await;
    forgotten.with_context(|| format!("could not forget the former {name}"))
}

impl Seen {
    /// What goes with it, a line each.
    pub(crate) fn leftovers(&self) -> Vec<String> {
        let mut lines = Vec::new();
        if let Waiting::Known(Backlog { waiting, in_flight }) = self.backlog {
            let undone = count(waiting + in_flight, "event");
            lines.push(format!(
                "  its consumer, with {undone} that it was not given or has not done"
            ));
        }
        if self.aside.retries > 0 {
            let retries = count(self.aside.retries, "event");
            lines.push(format!("  {retries}, waiting in the store for another attempt"));
        }
        if self.aside.parked > 0 {
            let letters = count(self.aside.parked, "dead letter");
            lines.push(format!("  {letters}: dropped, and still to be looked at"));
        }
        if self.paused.is_some() {
            lines.push("  the note that it is paused".to_owned());
        }
        lines
    }
}

/// What to do about a consumer of an embedded log that a process has open.
#[derive(Clone, Copy, Debug)]
pub(crate) enum InUse {
    /// That process still runs the worker: what it began with holds until its end.
    Refuse,
    /// It has let go of the subscriber, and forgets the consumer when it is told.
    Tell,
}

async fn remove_consumer(config: &Config, name: &str, in_use: InUse) -> anyhow::Result<()> {
    let removed = match &config.nats {
        Some(nats) => {
            let stream = wiring::stream(config, nats, Role::Provisioner).await?;
            migrate::let_in(nats, &stream).await?;
            stream.remove_consumer(name).await
        }
        None => match (LocalLog::open(wiring::local_log_config(config)).await, in_use) {
            (Ok(log), _) => {
                let removed = log.remove_consumer(name).await;
                log.close().await.and(removed)
            }
            (Err(_), InUse::Tell) => return config.subscribers.ask_to_remove(name).await,
            (Err(error), InUse::Refuse) => {
                let error = anyhow::Error::from(error);
                return Err(error.context("the log must not be in use: stop `vestibule up` first"));
            }
        },
    };
    removed
        .with_context(|| format!("could not remove the consumer {name}; nothing has changed"))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use time::macros::datetime;

    use super::*;

    fn paused() -> PausedWorker {
        PausedWorker {
            worker: "notify".into(),
            paused_at: datetime!(2026-11-22 10:00 UTC),
            paused_by: "grace".into(),
            reason: "the channel moves".into(),
        }
    }

    fn known(waiting: u64, in_flight: u64) -> Waiting {
        Waiting::Known(Backlog { waiting, in_flight })
    }

    #[test]
    fn a_worker_is_shown_where_it_is_configured_or_has_left_something() {
        assert!(!Seen { backlog: Waiting::NoConsumer, ..Seen::default() }.is_there());
        assert!(!Seen { backlog: Waiting::Unknown, ..Seen::default() }.is_there());
        assert!(Seen { backlog: known(0, 0), ..Seen::default() }.is_there());
        assert!(Seen { configured: true, ..Seen::default() }.is_there());
        assert!(Seen { paused: Some(paused()), ..Seen::default() }.is_there());
        let parked = SetAside { parked: 1, ..SetAside::default() };
        assert!(Seen { aside: parked, ..Seen::default() }.is_there());
    }

    #[test]
    fn remarks_say_what_keeps_a_worker_and_the_command_that_helps() {
        let well = Seen { configured: true, backlog: known(3, 1), ..Seen::default() };
        assert!(remarks("notify", &well).is_empty());

        let parked = SetAside { parked: 2, ..SetAside::default() };
        let paused = Seen { paused: Some(paused()), aside: parked, ..well };
        let remarks_of = remarks("notify", &paused).join("\n");
        for part in
            ["by grace: the channel moves", "worker resume notify", "dead list --worker notify"]
        {
            assert!(remarks_of.contains(part), "{remarks_of}");
        }
        let gone = Seen { backlog: known(7, 0), ..Seen::default() };
        assert!(remarks("audit", &gone)[0].contains("vestibule worker remove audit"));
    }

    #[test]
    fn what_is_unknown_is_not_shown_as_nothing() {
        let seen =
            BTreeMap::from([("notify".to_owned(), Seen { configured: true, ..Seen::default() })]);
        assert!(as_table(&seen).to_string().contains('?'));
        assert_eq!(as_json("notify", &seen["notify"])["waiting"], Value::Null);
    }

    #[test]
    fn whoever_removes_a_worker_sees_what_goes_with_it() {
        let aside = SetAside { retries: 1, parked: 2, ..SetAside::default() };
        let left = Seen { backlog: known(3, 1), aside, paused: Some(paused()), ..Seen::default() };
        let lines = left.leftovers().join("\n");
        for part in ["4 events", "1 event,", "2 dead letters", "paused"] {
            assert!(lines.contains(part), "{lines}");
        }
    }
}
