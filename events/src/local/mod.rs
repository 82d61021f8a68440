//! The local log: an append-only SQLite file beside a connector.
//!
//! Many appends become durable with one sync of the disk, and an append returns only after it.
//! Consumers are durable, repetitions are recognised, and past events can be read by anybody who
//! can read the file, while it is appended to. One process appends at a time; a relay may consume
//! and trim from another. What happens to an event behind a consumer is left to it.
//!
//! `writer` is the one task that writes. `held` knows which calls are repetitions and `book` what a
//! consumer was given; both are pure. `consumer` and `read` are the reading side, `upkeep` does
//! what has to be done meanwhile, and `file` knows SQLite.

mod book;
mod consumer;
mod copy;
mod file;
mod held;
mod metrics;
mod read;
mod upkeep;
mod wal;
mod writer;

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::AtomicU64},
    time::Duration,
};

use anyhow::{Context, anyhow};
use async_trait::async_trait;
use futures_util::stream::BoxStream;
use prometheus_client::registry::Registry;
use time::OffsetDateTime;
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

pub use self::copy::{LogContents, LogCopy};
use self::{
    consumer::{Durable, LocalConsumer, SavedFilter},
    file::{Identity, Lock, Sync},
    held::{Call, HELD_MAX, Held, Place, Windows},
    metrics::Metrics,
    read::Reader,
    upkeep::Size,
    writer::{Append, Command, Connections, Health, Save, Writer},
};
use crate::{
    AppendError, Appended, Backlog, Consumer, ConsumerSpec, EventLog, LogError, Replay, Stored,
    Undecodable, WrittenEvent,
};

/// Commands that may wait for the writer; whoever comes then waits to be let in.
const QUEUE_MAX: usize = 4096;

/// Where a local log lies and how long it remembers.
#[derive(Clone, Debug)]
pub struct LocalLogConfig {
    /// The file, for instance `data/events.db`. It and its directory are made where they do not
    /// exist, and there will be files beside it that begin with its name.
    pub path: PathBuf,
    /// A call repeated within this time is the same event.
    pub duplicate_window: Duration,
    /// The same for a refusal, so that a mended rule takes hold when the person tries again.
    pub refusal_window: Duration,
    pub retention: Retention,
}

/// When an event may leave the local log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Retention {
    /// Once it is so old: the local log is the archive.
    For(Duration),
    /// Once the named consumer has acknowledged it and no repeated call can ask for it any more:
    /// the archive is elsewhere. That consumer is the relay: one process at a time can open it.
    BehindConsumer(String),
}

/// The SQLite log. Cloning gives another handle of the same log.
///
/// Dropping the last handle closes it in the background; [`Self::close`] waits for that.
#[derive(Clone, Debug)]
pub struct LocalLog {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    role: Role,
    windows: Windows,
    retention: Retention,
    path: PathBuf,
    identity: Identity,
    reader: Reader,
    /// Absent where the log is only looked at.
    commands: Option<mpsc::Sender<Command>>,
    health: Health,
    size: Size,
    last: watch::Receiver<u64>,
    consumers: Mutex<HashMap<String, Arc<Durable>>>,
    /// Held from when the consumer that retention waits for is opened here.
    relay_lock: Mutex<Option<Lock>>,
    metrics: Metrics,
    stop: CancellationToken,
    tasks: TaskTracker,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Appender,
    Relay,
    Observer,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

impl LocalLog {
    /// Opens the log to append and consume, and makes it where there is none. One process at a
    /// time can: a second one is refused with the path and what to do.
    pub async fn open(config: LocalLogConfig) -> Result<Self, LogError> {
        let lock = file::lock(&config.path, "connector")?;
        wal::look_for_damage(&config.path);
        file::create(&config.path, &lock).await?;
        Self::start(config, Role::Appender, lock).await
    }

    /// Opens the log for a relay in a process of its own: it consumes and trims what another
    /// process appends, and learns of that within 50 ms.
    pub async fn open_for_relay(config: LocalLogConfig) -> Result<Self, LogError> {
        let lock = file::lock(&config.path, "relay")?;
        file::create(&config.path, &lock).await?;
        Self::start(config, Role::Relay, lock).await
    }

    /// Opens a log that exists to read past events, whoever else has it open.
    pub async fn open_read_only(path: impl Into<PathBuf>) -> Result<Self, LogError> {
        let path = path.into();
        let reader = Reader::new(path.clone(), file::existing_readers(&path).await?);
        let identity = Identity::of(&path)?;
        let (last, seen) = watch::channel(reader.last().await?);
        let stop = CancellationToken::new();
        let tasks = TaskTracker::new();
        tasks.spawn(upkeep::poll(reader.clone(), last, stop.clone()));
        let none = Windows { duplicate: Duration::ZERO, refusal: Duration::ZERO };
        Ok(Self {
            inner: Arc::new(Inner {
                role: Role::Observer,
                windows: none,
                retention: Retention::For(Duration::MAX),
                path,
                identity,
                reader,
                commands: None,
                health: Health::new(),
                size: Size::default(),
                last: seen,
                consumers: Mutex::default(),
                relay_lock: Mutex::default(),
                metrics: Metrics::new(),
                stop,
                tasks,
            }),
        })
    }

    async fn start(config: LocalLogConfig, role: Role, lock: Lock) -> Result<Self, LogError> {
        let path = config.path.clone();
        let windows = Windows::from(&config);
        let reader = Reader::new(path.clone(), file::readers(&path).await?);
        let identity = Identity::of(&path)?;
        let last = reader.last().await?;
        let mut held = Held::new(windows, HELD_MAX);
        if role == Role::Appender {
            reader.calls(windows, last, HELD_MAX, |call, at| held.remember(call, at)).await?;
        }

        let (last, seen) = watch::channel(last);
        let (commands, queue) = mpsc::channel(QUEUE_MAX);
        let unsettled_bytes = Arc::new(AtomicU64::new(0));
        let metrics = Metrics::new();
        let health = Health::new();
        let stop = CancellationToken::new();
        let tasks = TaskTracker::new();
        if role == Role::Relay {
            tasks.spawn(upkeep::poll(reader.clone(), last.clone(), stop.clone()));
        }
        let writer = Writer {
            path: path.clone(),
            identity,
            reader: reader.clone(),
            held,
            last,
            metrics: metrics.clone(),
            unsettled_bytes: Arc::clone(&unsettled_bytes),
            connections: Connections::default(),
            health: health.clone(),
            saving_fails: false,
            lock,
        };
        tasks.spawn(writer.run(queue, stop.clone()));
        tasks.spawn(upkeep::checkpoint_regularly(
            path.clone(),
            unsettled_bytes,
            commands.clone(),
            stop.clone(),
        ));
        let size = Size::default();
        tasks.spawn(upkeep::measure(
            path.clone(),
            reader.clone(),
            seen.clone(),
            metrics.clone(),
            size.clone(),
            stop.clone(),
        ));
        if role == Role::Appender {
            let probing = upkeep::probe_regularly(health.clone(), commands.clone(), stop.clone());
            tasks.spawn(probing);
        }
        let inner = Arc::new(Inner {
            role,
            windows,
            retention: config.retention,
            path,
            identity,
            reader,
            commands: Some(commands),
            health,
            size,
            last: seen,
            consumers: Mutex::default(),
            relay_lock: Mutex::default(),
            metrics,
            stop: stop.clone(),
            tasks,
        });
        inner.tasks.spawn(upkeep::trim_regularly(Arc::downgrade(&inner), stop));
        Ok(Self { inner })
    }

    /// Removes some of the events that retention lets go at `now`, and says how many: 0 once there
    /// are none. The open log does this by itself about every minute.
    pub async fn trim(&self, now: OffsetDateTime) -> Result<u64, LogError> {
        upkeep::trim(&self.inner, now).await
    }

    /// Gives some of the room that trimming left back to the disk, and says how many pages: 0 once
    /// what is left is worth keeping for the next events. The open log does this by itself as well.
    pub async fn shrink(&self) -> Result<u64, LogError> {
        upkeep::shrink(&self.inner).await
    }

    /// The sequence of the youngest event there ever was; 0 while there was none.
    #[must_use]
    pub fn last_sequence(&self) -> u64 {
        *self.inner.last.borrow()
    }

    /// Whether events can be stored: a write that failed says no until one has gone through, and one
    /// is tried whenever there was none for some seconds. A file that is gone says no, too.
    pub async fn ready(&self) -> Result<(), LogError> {
        self.inner.identity.check(&self.inner.path)?;
        match self.inner.health.trouble() {
            Some(cause) => Err(LogError::Unavailable(anyhow!(cause))),
            None => self.inner.reader.last().await.map(drop),
        }
    }

    /// A log above so many bytes is worth a [warning](Self::warning); 10 GiB where nobody says.
    pub fn warn_above(&self, bytes: u64) {
        self.inner.size.warn_above(bytes);
    }

    /// What will keep events from being stored before long: the log is large, or its disk nearly full.
    #[must_use]
    pub fn warning(&self) -> Option<String> {
        self.inner.size.warning()
    }

    /// Forgets a consumer, so that one of the same name begins anew; says whether there was one.
    ///
    /// Refused while it is open, and for the one that retention waits for.
    pub async fn remove_consumer(&self, name: &str) -> Result<bool, LogError> {
        if matches!(&self.inner.retention, Retention::BehindConsumer(it) if it == name) {
            return Err(LogError::Refused(anyhow!(
                "{name} is the consumer that brings events to the stream; without it they stay here"
            )));
        }
        let opened = self.inner.opened(name);
        // Taken as if it were opened, so that nobody opens it meanwhile.
        if opened.as_ref().is_some_and(|it| !it.take()) {
            return Err(LogError::Refused(anyhow!(
                "consumer {name} is open in this process; stop its worker first"
            )));
        }
        let consumer = name.to_owned();
        let removed = self.inner.ask(|reply| Command::Remove { consumer, reply }).await;
        if let Some(opened) = opened {
            if removed.is_ok() {
                self.inner.consumers().remove(name);
            }
            opened.give_back();
        }
        removed
    }

    /// Looks through a whole file that nobody writes, such as a finished copy, and says what is in it.
    pub async fn contents(path: impl AsRef<Path>) -> Result<LogContents, LogError> {
        copy::contents(path.as_ref()).await
    }

    /// Of a consumer that is open here: the first sequence that it was not given yet, and those
    /// before it that it has not acknowledged.
    pub(crate) fn undone(&self, consumer: &str) -> Option<(u64, Vec<u64>)> {
        self.inner.opened(consumer).map(|durable| durable.undone())
    }

    /// Finishes what is being written, and lets the file go. All handles and consumers of this log
    /// end with it.
    pub async fn close(&self) -> Result<(), LogError> {
        // What consumers were given is only saved with what they say; a start from here is better.
        let consumers: Vec<_> = self.inner.consumers().values().cloned().collect();
        let mut saved = Ok(());
        for durable in consumers {
            if !self.inner.stop.is_cancelled() {
                saved = saved.and(self.inner.save(&durable, Sync::Lazy).await);
            }
        }
        self.inner.stop.cancel();
        self.inner.tasks.close();
        self.inner.tasks.wait().await;
        // The writer did this, where there is one.
        self.inner.reader.close().await;
        drop(self.inner.relay_lock().take());
        saved
    }

    /// Adds the metrics of this log.
    pub fn register(&self, registry: &mut Registry) {
        self.inner.metrics.register(registry);
    }
}

impl Inner {
    async fn command(&self, command: Command) -> Result<(), LogError> {
        let Some(commands) = &self.commands else { return Err(read_only()) };
        commands.send(command).await.map_err(|_| closed())
    }

    /// Sends the writer a command and hears its answer.
    async fn ask<T>(
        &self,
        command: impl FnOnce(oneshot::Sender<Result<T, LogError>>) -> Command,
    ) -> Result<T, LogError> {
        let (reply, answer) = oneshot::channel();
        self.command(command(reply)).await?;
        answer.await.map_err(|_| closed())?
    }

    async fn save(&self, durable: &Arc<Durable>, sync: Sync) -> Result<(), LogError> {
        let consumer = Arc::clone(durable);
        self.ask(|reply| Command::Save(Save { consumer, sync, reply })).await
    }

    fn consumers(&self) -> MutexGuard<'_, HashMap<String, Arc<Durable>>> {
        self.consumers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn relay_lock(&self) -> MutexGuard<'_, Option<Lock>> {
        self.relay_lock.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn opened(&self, name: &str) -> Option<Arc<Durable>> {
        self.consumers().get(name).cloned()
    }

    /// The consumer of that name as it was left, or a new one.
    async fn durable(&self, spec: &ConsumerSpec) -> Result<Arc<Durable>, LogError> {
        if let Some(durable) = self.opened(&spec.name) {
            return Ok(durable);
        }
        let durable = match self.reader.consumer(&spec.name).await? {
            Some((cursor, pending, filter)) => {
                Durable::load(&spec.name, cursor, &pending, &filter)?
            }
            None => {
                let last = *self.last.borrow();
                let start = self.reader.start(spec.start, last).await?;
                Durable::create(&spec.name, start, &spec.filter)
            }
        };
        // Another may have been quicker; then this one is forgotten.
        Ok(Arc::clone(self.consumers().entry(spec.name.clone()).or_insert(Arc::new(durable))))
    }

    /// Two relays would each undo what the other has noted.
    fn lock_relay(&self, name: &str) -> Result<(), LogError> {
        let is_relays = matches!(&self.retention, Retention::BehindConsumer(it) if it == name);
        let mut lock = self.relay_lock();
        if is_relays && self.role == Role::Appender && lock.is_none() {
            lock.insert(file::lock(&self.path, "relay")?).note_log();
        }
        Ok(())
    }
}

#[async_trait]
impl EventLog for LocalLog {
    async fn append_written(&self, event: WrittenEvent) -> Result<Appended, AppendError> {
        if self.inner.role != Role::Appender {
            return Err(AppendError::NotStored(read_only().into()));
        }
        let WrittenEvent { event, json } = event;
        let json = String::from_utf8(json)
            .context("the event is not UTF-8")
            .map_err(AppendError::NotStored)?;
        let (reply, place) = oneshot::channel();
        let append = Append { json, call: Call::of(&event), reply };
        self.inner
            .command(Command::Append(append))
            .await
            .map_err(|error| AppendError::NotStored(error.into()))?;
        // The writer answers whatever happens, unless it is ended in the middle of a group.
        let place = place.await.map_err(|_| AppendError::Unknown(closed().into()))??;
        match place {
            Place::New(sequence) => {
                Ok(Appended { stored: Stored { sequence, event }, duplicate: false })
            }
            Place::Repeat(sequence) => {
                let unread = |error: anyhow::Error| {
                    AppendError::Unknown(
                        error.context(format!("could not read back event {sequence}")),
                    )
                };
                let raw = self.inner.reader.row(sequence).await.map_err(|it| unread(it.into()))?;
                let raw = raw.ok_or_else(|| unread(anyhow!("retention has removed it")))?;
                let event = Undecodable::decode(&raw).map_err(|it| unread(it.into()))?;
                Ok(Appended { stored: Stored { sequence, event }, duplicate: true })
            }
        }
    }

    /// One handle at a time is open under a name: a second one is refused until the first is
    /// dropped. Then it goes on with the same state: what was delivered comes again after its
    /// `ack_wait`, because whoever has it may still be at it.
    async fn consumer(&self, spec: ConsumerSpec) -> Result<Box<dyn Consumer>, LogError> {
        if self.inner.role == Role::Observer {
            return Err(read_only());
        }
        let plain = |it: u8| matches!(it, b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_');
        if spec.name.is_empty() || !spec.name.bytes().all(plain) {
            return Err(LogError::Refused(anyhow!(
                "`{}` cannot name a consumer: a name is lower-case letters, digits, hyphens and \
                 underscores",
                spec.name
            )));
        }
        self.inner.lock_relay(&spec.name)?;
        let durable = self.inner.durable(&spec).await?;
        Ok(Box::new(LocalConsumer::open(Arc::clone(&self.inner), durable, spec).await?))
    }

    async fn replay(
        &self,
        replay: Replay,
    ) -> Result<BoxStream<'static, Result<Stored, LogError>>, LogError> {
        let Inner { reader, last, stop, .. } = &*self.inner;
        reader.clone().replay(replay, last.clone(), stop.clone()).await
    }

    async fn backlog(&self, consumer: &str) -> Result<Option<Backlog>, LogError> {
        let reader = &self.inner.reader;
        let last = self.last_sequence();
        if let Some(durable) = self.inner.opened(consumer) {
            let waiting = match durable.uncounted(last) {
                (waiting, None) => waiting,
                (_, Some((from, filter))) => {
                    let found = reader.count(from, last, &filter).await?;
                    durable.counted(from, last, found)
                }
            };
            return Ok(Some(Backlog { waiting, in_flight: durable.in_flight() }));
        }
        // Nobody has it open here, so what was saved is all there is to know.
        let Some((cursor, pending, filter)) = reader.consumer(consumer).await? else {
            return Ok(None);
        };
        let waiting = reader.count(cursor, last, &SavedFilter::parse(&filter)?).await?;
        let in_flight = Durable::load(consumer, cursor, &pending, &filter)?.in_flight();
        Ok(Some(Backlog { waiting, in_flight }))
    }

    async fn first_undone(&self, consumer: &str) -> Result<Option<u64>, LogError> {
        if let Some(durable) = self.inner.opened(consumer) {
            return Ok(Some(durable.floor()));
        }
        let saved = self.inner.reader.consumer(consumer).await?;
        saved
            .map(|(cursor, pending, filter)| {
                Ok(Durable::load(consumer, cursor, &pending, &filter)?.floor())
            })
            .transpose()
    }
}

fn closed() -> LogError {
    LogError::Refused(anyhow!("the log was closed"))
}

fn read_only() -> LogError {
    LogError::Refused(anyhow!("the log is open for reading only"))
}
