//! The one task that writes: it takes whatever waits and commits it as one group.
//!
//! So N concurrent appends cost one sync of the disk, and each of them returns only after it.
//! Appends and what consumers say are written by different connections, because losing the latter
//! in a power cut only means a delivery more: they do not wait for the disk.

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::anyhow;
use sqlx::{Connection, SqliteConnection};
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use super::{
    consumer::Durable,
    file::{self, Identity, Lock, Sync},
    held::{Call, Held, Place},
    metrics::{AppendResult, Metrics},
    read::{Reader, signed},
};
use crate::{AppendError, LogError};

/// Commands in one group at most: a group takes a few milliseconds and some 30 MB at worst.
const GROUP_MAX: usize = 512;

/// Events deleted in one transaction: about a millisecond, which is what an append may wait for it.
const TRIM_CHUNK: u64 = 256;

/// Pages moved in one step of giving room back; some tenths of a millisecond.
const SHRINK_PAGES: u64 = 32;

/// Less room than this is none.
const GROUP_ROOM: u64 = 256 * 1024;

/// Without a write for so long, one is tried.
const SILENCE_MAX: Duration = Duration::from_secs(10);

/// The events of a group come as one JSON array: SQLite gives the text of each element back as it
/// stood, and one statement needs neither a transaction of its own nor a round trip per event.
const INSERT: &str =
    "insert into events (sequence, event) select ?1 + key, value from json_each(?2)";

const SAVE_CONSUMERS: &str = "
    insert into consumers (name, cursor, pending, filter)
    select value ->> 0, value ->> 1, value -> 2, value -> 3 from json_each(?) where true
    on conflict (name) do update set
        cursor = excluded.cursor, pending = excluded.pending, filter = excluded.filter";

/// What the writer is asked for. Whoever asked may be gone when it is done: that harms nobody.
#[derive(Debug)]
pub(super) enum Command {
    Append(Append),
    /// Saves the consumer as it is when its turn comes.
    Save(Save),
    /// Removes events up to a sequence: one chunk, whose size is the answer.
    Trim {
        through: u64,
        reply: oneshot::Sender<Result<u64, LogError>>,
    },
    /// Moves what the last checkpoint left, while nothing is written.
    Checkpoint,
    /// Gives some unused pages at the end of the file back to the disk; says how many.
    Shrink {
        reply: oneshot::Sender<Result<u64, LogError>>,
    },
    /// Writes to the disk as an append does, and leaves everything as it was.
    Probe {
        done: oneshot::Sender<()>,
    },
    /// Forgets a consumer that nobody has open; says whether there was one.
    Remove {
        consumer: String,
        reply: oneshot::Sender<Result<bool, LogError>>,
    },
}

#[derive(Debug)]
pub(super) struct Save {
    pub(super) consumer: Arc<Durable>,
    pub(super) sync: Sync,
    pub(super) reply: oneshot::Sender<Result<(), LogError>>,
}

#[derive(Debug)]
pub(super) struct Append {
    pub(super) json: String,
    pub(super) call: Call,
    pub(super) reply: oneshot::Sender<Result<Place, AppendError>>,
}

#[derive(Debug)]
pub(super) struct Writer {
    pub(super) path: PathBuf,
    pub(super) identity: Identity,
    pub(super) reader: Reader,
    pub(super) held: Held,
    /// The last sequence that is stored, as everybody sees it.
    pub(super) last: watch::Sender<u64>,
    pub(super) metrics: Metrics,
    /// Bytes written since the last checkpoint, roughly.
    pub(super) unsettled_bytes: Arc<AtomicU64>,
    pub(super) connections: Connections,
    pub(super) health: Health,
    /// The last saving of what consumers say failed, and somebody was told.
    pub(super) saving_fails: bool,
    /// Kept until nothing is written any more.
    pub(super) lock: Lock,
}

/// Whether the last write of events went through, and when there was one.
#[derive(Clone, Debug)]
pub(super) struct Health(Arc<Mutex<Written>>);

#[derive(Debug)]
struct Written {
    last: Instant,
    /// Why the last write failed; empty once one went through.
    trouble: Option<String>,
}

impl Health {
    pub(super) fn new() -> Self {
        Self(Arc::new(Mutex::new(Written { last: Instant::now(), trouble: None })))
    }

    fn set(&self, trouble: Option<String>) {
        *self.state() = Written { last: Instant::now(), trouble };
    }

    /// Why nothing can be written.
    pub(super) fn trouble(&self) -> Option<String> {
        self.state().trouble.clone()
    }

    /// Whether to try a write for its own sake: at once while there is trouble, or nobody would
    /// learn that it is over; and after a while of silence, so that it is known before somebody
    /// wants to sign up.
    pub(super) fn wants_probe(&self) -> bool {
        let state = self.state();
        state.trouble.is_some() || state.last.elapsed() >= SILENCE_MAX
    }

    /// Nothing is heard of a write.
    pub(super) fn hangs(&self, since: Duration) {
        self.set(Some(format!("the disk does not answer: a write has not ended for {since:?}")));
    }

    fn state(&self) -> MutexGuard<'_, Written> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Opened when they are needed, and anew after an error.
#[derive(Debug, Default)]
pub(super) struct Connections {
    full: Option<SqliteConnection>,
    lazy: Option<SqliteConnection>,
}

impl Writer {
    /// Writes until `stop`; then what was asked for before, and no more.
    pub(super) async fn run(
        mut self,
        mut commands: mpsc::Receiver<Command>,
        stop: CancellationToken,
    ) {
        let mut group = Vec::with_capacity(GROUP_MAX);
        loop {
            let taken = tokio::select! {
                biased;
                () = stop.cancelled(), if !commands.is_closed() => {
                    commands.close();
                    continue;
                }
                taken = commands.recv_many(&mut group, GROUP_MAX) => taken,
            };
            if taken == 0 {
                break;
            }
            self.write(&mut group).await;
        }
        self.close().await;
    }

    async fn write(&mut self, group: &mut Vec<Command>) {
        let mut appends = Vec::with_capacity(group.len());
        let mut saves = vec![];
        let mut rest = vec![];
        for command in group.drain(..) {
            match command {
                Command::Append(append) => appends.push(append),
                Command::Save(save) => saves.push(save),
                other => rest.push(other),
            }
        }
        // Somebody waits to sign up for the appends, and nobody for the rest.
        if !appends.is_empty() {
            self.append(appends).await;
        }
        if !saves.is_empty() {
            self.save(saves).await;
        }
        for command in rest {
            match command {
                Command::Trim { through, reply } => drop(reply.send(self.trim(through).await)),
                Command::Shrink { reply } => drop(reply.send(self.shrink().await)),
                Command::Remove { consumer, reply } => {
                    drop(reply.send(self.remove(&consumer).await));
                }
                Command::Probe { done } => {
                    self.probe().await;
                    let _ = done.send(());
                }
                _ => self.checkpoint().await,
            }
        }
    }

    async fn append(&mut self, appends: Vec<Append>) {
        let calls: Vec<_> = appends.iter().map(|it| it.call).collect();
        let last = *self.last.borrow();
        let places = self.held.place(&calls, last + 1);
        let new: Vec<_> = appends.iter().zip(&places).filter_map(new_event).collect();

        let started = Instant::now();
        let stored = if new.is_empty() { Ok(()) } else { self.insert(last + 1, &new).await };
        let count = new.len();
        if stored.is_ok() && count > 0 {
            self.went_through();
            self.metrics.group_events.observe(count as f64);
            self.metrics.commit_seconds.observe(started.elapsed().as_secs_f64());
            let forgotten = self.held.forgotten_early();
            for (call, place) in calls.iter().zip(&places) {
                if let Place::New(sequence) = place {
                    self.held.remember(*call, *sequence);
                }
            }
            self.metrics.forgotten.inc_by(self.held.forgotten_early() - forgotten);
            // Before the answers: whoever hears of an event can read it and is counted with it.
            self.last.send_replace(last + count as u64);
        }

        // Before the answers, too: whoever hears of a failure finds readiness to say the same.
        if let Err(failure) = &stored {
            self.went_wrong(failure);
        }
        let (mut duplicates, mut failed) = (0, 0);
        for (append, place) in appends.into_iter().zip(places) {
            let answer = match (&stored, place) {
                // Durable before this group, so the failure does not concern it.
                (_, Place::Repeat(sequence)) if sequence <= last => Ok(place),
                (Ok(()), _) => Ok(place),
                (Err(error), _) => Err(error.for_append()),
            };
            duplicates += usize::from(matches!(answer, Ok(Place::Repeat(_))));
            failed += usize::from(answer.is_err());
            // An append that nobody waits for any more is stored all the same.
            let _ = append.reply.send(answer);
        }
        self.metrics.appended(AppendResult::stored, if stored.is_ok() { count } else { 0 });
        self.metrics.appended(AppendResult::duplicate, duplicates);
        self.metrics.appended(AppendResult::failed, failed);

        if stored.is_err() {
            self.recover().await;
        }
    }

    /// Tries what an append needs of the disk, where nothing is known of it or nothing good.
    async fn probe(&mut self) {
        // An append may have come in between and told.
        if !self.health.wants_probe() {
            return;
        }
        match self.write_and_take_back().await {
            Ok(()) => self.went_through(),
            Err(failure) => {
                self.went_wrong(&failure);
                self.recover().await;
            }
        }
    }

    async fn write_and_take_back(&mut self) -> Result<(), Failure> {
        let next = signed(*self.last.borrow() + 1);
        self.identity.check(&self.path).map_err(Failure::before_commit)?;
        // The write is a small one, and finds room where a group of events does not.
        if let Some(message) = self.health.trouble()
            && file::room(&self.path).is_some_and(|room| room < GROUP_ROOM)
        {
            return Err(Failure { ambiguous: false, message });
        }
        let connection = self.connections.get(&self.path, Sync::Full).await?;
        let done = async {
            let mut transaction = connection.begin_with("begin immediate").await?;
            sqlx::query("insert into events (sequence, event) values (?, '')")
                .bind(next)
                .execute(&mut *transaction)
                .await?;
            sqlx::query("delete from events where sequence = ?")
                .bind(next)
                .execute(&mut *transaction)
                .await?;
            transaction.commit().await
        };
        done.await.map_err(|error| Failure::of_commit(&self.path, error))?;
        self.unsettled_bytes.fetch_add(8192, Ordering::Relaxed);
        Ok(())
    }

    fn went_through(&self) {
        if self.health.trouble().is_some() {
            info!(log = %self.path.display(), "the local log can be written again");
        }
        self.health.set(None);
    }

    fn went_wrong(&self, failure: &Failure) {
        // A full disk fails every write; the first says it, and the metrics count.
        if self.health.trouble().is_none() {
            error!(
                log = %self.path.display(),
                ambiguous = failure.ambiguous,
                cause = failure.message,
                "the local log cannot be written; it is tried again each second"
            );
        }
        self.health.set(Some(failure.message.clone()));
    }

    async fn insert(&mut self, first: u64, events: &[&str]) -> Result<(), Failure> {
        let bytes: usize = events.iter().map(|it| it.len() + 1).sum();
        let mut array = String::with_capacity(bytes + 2);
        array.push('[');
        for (index, event) in events.iter().enumerate() {
            if index > 0 {
                array.push(',');
            }
            array.push_str(event);
        }
        array.push(']');

        self.identity.check(&self.path).map_err(Failure::before_commit)?;
        let connection = self.connections.get(&self.path, Sync::Full).await?;
        let done = sqlx::query(INSERT)
            .bind(signed(first))
            .bind(array)
            .execute(connection)
            .await
            .map_err(|error| Failure::of_commit(&self.path, error))?;
        debug_assert_eq!(done.rows_affected(), events.len() as u64, "one row for each event");
        // The pages of the events, the last page of before, and the frames' heads.
        self.unsettled_bytes.fetch_add(bytes as u64 * 5 / 4 + 8192, Ordering::Relaxed);
        Ok(())
    }

    /// Brings what is in memory in line with the file after a failure: a commit whose success
    /// could not be learnt may have succeeded.
    async fn recover(&mut self) {
        self.connections = Connections::default();
        let known = *self.last.borrow();
        let held = &mut self.held;
        let found = async {
            let last = self.reader.last().await?;
            self.reader.calls_from(known + 1, last, |call, at| held.remember(call, at)).await?;
            Ok::<_, LogError>(last)
        };
        match found.await {
            Ok(last) if last > known => drop(self.last.send_replace(last)),
            Ok(_) => {}
            // The next insert fails on the same sequence if there is one, and leads here again.
            Err(error) => warn!(cause = %error, "could not read the local log back"),
        }
    }

    async fn save(&mut self, saves: Vec<Save>) {
        let mut consumers: Vec<&Arc<Durable>> = vec![];
        let mut sync = Sync::Lazy;
        for Save { consumer, sync: wanted, .. } in &saves {
            if !consumers.iter().any(|it| Arc::ptr_eq(it, consumer)) {
                consumers.push(consumer);
            }
            if *wanted == Sync::Full {
                sync = Sync::Full;
            }
        }
        let rows: Vec<_> = consumers.iter().map(|it| it.row()).collect();
        let saved = self.save_rows(rows, sync).await;
        if let Err(failure) = &saved {
            if !self.saving_fails {
                warn!(
                    cause = failure.message,
                    "could not save how far consumers are; it is tried again with their next acknowledgement"
                );
            }
            self.connections = Connections::default();
        }
        self.saving_fails = saved.is_err();
        for Save { reply, .. } in saves {
            let _ = reply.send(saved.as_ref().copied().map_err(Failure::for_log));
        }
    }

    async fn save_rows(&mut self, rows: Vec<serde_json::Value>, sync: Sync) -> Result<(), Failure> {
        let rows = serde_json::Value::Array(rows).to_string();
        self.unsettled_bytes.fetch_add(rows.len() as u64 + 8192, Ordering::Relaxed);
        let connection = self.connections.get(&self.path, sync).await?;
        sqlx::query(SAVE_CONSUMERS)
            .bind(rows)
            .execute(connection)
            .await
            .map_err(|error| Failure::of_commit(&self.path, error))?;
        Ok(())
    }

    async fn trim(&mut self, through: u64) -> Result<u64, LogError> {
        let removed = self.trim_chunk(through).await;
        if let Ok(removed) = &removed {
            self.metrics.trimmed.inc_by(*removed);
            self.unsettled_bytes.fetch_add(removed * 2048, Ordering::Relaxed);
        }
        removed.map_err(file::failed(&self.path))
    }

    async fn trim_chunk(&mut self, through: u64) -> Result<u64, sqlx::Error> {
        let connection = match self.connections.get(&self.path, Sync::Lazy).await {
            Ok(connection) => connection,
            Err(failure) => return Err(sqlx::Error::Protocol(failure.message)),
        };
        let mut transaction = connection.begin_with("begin immediate").await?;
        let end: Option<i64> = sqlx::query_scalar(
            "select max(sequence) from
                 (select sequence from events where sequence <= ? order by sequence limit ?)",
        )
        .bind(signed(through))
        .bind(signed(TRIM_CHUNK))
        .fetch_one(&mut *transaction)
        .await?;
        let Some(end) = end else { return Ok(0) };
        let removed = sqlx::query("delete from events where sequence <= ?")
            .bind(end)
            .execute(&mut *transaction)
            .await?;
        sqlx::query(
            "insert into trimmed (one, through) values (1, ?)
             on conflict (one) do update set through = excluded.through",
        )
        .bind(end)
        .execute(&mut *transaction)
        .await?;
        transaction.commit().await?;
        Ok(removed.rows_affected())
    }

    async fn shrink(&mut self) -> Result<u64, LogError> {
        let connection = match self.connections.get(&self.path, Sync::Lazy).await {
            Ok(connection) => connection,
            Err(failure) => return Err(failure.for_log()),
        };
        let shrunk = file::shrink(connection, SHRINK_PAGES).await;
        let pages = shrunk.map_err(file::failed(&self.path))?;
        self.unsettled_bytes.fetch_add(pages * 4096 * 2, Ordering::Relaxed);
        Ok(pages)
    }

    async fn remove(&mut self, consumer: &str) -> Result<bool, LogError> {
        let connection = match self.connections.get(&self.path, Sync::Full).await {
            Ok(connection) => connection,
            Err(failure) => return Err(failure.for_log()),
        };
        let removed = sqlx::query("delete from consumers where name = ?")
            .bind(consumer)
            .execute(connection)
            .await
            .map_err(file::failed(&self.path))?;
        Ok(removed.rows_affected() > 0)
    }

    async fn checkpoint(&mut self) {
        let Ok(connection) = self.connections.get(&self.path, Sync::Full).await else { return };
        let done = sqlx::query("pragma wal_checkpoint(passive)").execute(connection).await;
        if let Err(error) = done {
            warn!(cause = %error, "could not finish a checkpoint of the local log; it grows until one succeeds");
        }
    }

    async fn close(self) {
        let Self { mut connections, lock, path, reader, .. } = self;
        // Before the writers: the last connection to close moves everything into the one file, and
        // a reader cannot.
        reader.close().await;
        let close = async {
            let last = connections.get(&path, Sync::Full).await?;
            sqlx::query("pragma wal_checkpoint(truncate)")
                .execute(last)
                .await
                .map_err(|error| Failure::of_commit(&path, error))?;
            for connection in [connections.full, connections.lazy].into_iter().flatten() {
                connection.close().await.map_err(|error| Failure::of_commit(&path, error))?;
            }
            Ok::<_, Failure>(())
        };
        if let Err(failure) = close.await {
            warn!(
                cause = failure.message,
                "could not close the local log in order; the next start recovers it"
            );
        }
        drop(lock);
    }
}

fn new_event<'a>((append, place): (&'a Append, &Place)) -> Option<&'a str> {
    matches!(place, Place::New(_)).then_some(append.json.as_str())
}

impl Connections {
    async fn get(&mut self, path: &Path, sync: Sync) -> Result<&mut SqliteConnection, Failure> {
        let place = match sync {
            Sync::Full => &mut self.full,
            Sync::Lazy => &mut self.lazy,
        };
        match place {
            Some(connection) => Ok(connection),
            none => {
                let opened = file::writer(path, sync).await;
                let opened = opened.map_err(Failure::before_commit)?;
                Ok(none.insert(opened))
            }
        }
    }
}

/// Why a group failed; told to everybody in it.
#[derive(Clone, Debug)]
struct Failure {
    message: String,
    ambiguous: bool,
}

impl Failure {
    fn before_commit(error: LogError) -> Self {
        Self { ambiguous: false, message: message_of(error) }
    }

    fn of_commit(path: &Path, error: sqlx::Error) -> Self {
        let ambiguous = file::is_ambiguous(&error);
        Self { ambiguous, message: message_of(file::failed(path)(error)) }
    }

    fn for_append(&self) -> AppendError {
        let error = anyhow!("{}", self.message);
        if self.ambiguous { AppendError::Unknown(error) } else { AppendError::NotStored(error) }
    }

    fn for_log(&self) -> LogError {
        LogError::Unavailable(anyhow!("{}", self.message))
    }
}

/// Without the outermost words, which each of the two errors it ends up in has of its own.
fn message_of(error: LogError) -> String {
    let (LogError::Unavailable(cause) | LogError::Refused(cause)) = error;
    format!("{cause:#}")
}
