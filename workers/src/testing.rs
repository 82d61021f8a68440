//! What the tests of all workers share: a real log and a real store, in a directory of their own.

use std::{
    fmt,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use anyhow::{Context, anyhow};
use async_trait::async_trait;
use futures_util::{
    future::{BoxFuture, try_join_all},
    stream::BoxStream,
};
use tempfile::TempDir;
use time::OffsetDateTime;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;
use vestibule_events::{
    Acknowledge, AppendError, Appended, Backlog, Claims, Consumer, ConsumerSpec, Delivery, Email,
    EventLog, Kind, LocalLog, LocalLogConfig, LogError, Outcome, PseudonymKey, Replay, Retention,
    SignUpEvent, Stored, Undecodable, Verdict, WrittenEvent,
};
use vestibule_store::{Store, StoreError, StoreOptions, StoreUrl};
use vestibule_testkit::{Graph, eventually};

use crate::{
    BreakerPolicy, GraphSettings, HandleError, RetryPolicy, Task, Worker, WorkerMetrics,
    WorkerSettings, claims,
    runtime::{Rhythm, run_at},
};

pub(crate) const LIMIT: Duration = Duration::from_secs(30);

/// Nobody wants to wait for what is looked at now and then; and in a test nothing stalls.
pub(crate) const RHYTHM: Rhythm = Rhythm {
    poll: Duration::from_millis(20),
    count: Duration::from_millis(20),
    stall: Duration::from_secs(3600),
};

/// A log and a store.
pub(crate) struct Stage {
    pub(crate) log: LocalLog,
    pub(crate) store: Store,
    /// Goes when the stage goes.
    _directory: TempDir,
}

impl Stage {
    pub(crate) async fn open() -> anyhow::Result<Self> {
        let directory = TempDir::new()?;
        let url = StoreUrl::Sqlite(directory.path().join("store.db"));
        Self::with_store(directory, &url).await
    }

    pub(crate) async fn with_store(directory: TempDir, url: &StoreUrl) -> anyhow::Result<Self> {
        let options =
            StoreOptions { acquire_timeout: Duration::from_millis(500), ..StoreOptions::default() };
        let store = Store::open(url, options).await?;
        store.migrate().await?;
        let log = LocalLog::open(log_config(&directory)).await?;
        Ok(Self { log, store, _directory: directory })
    }

    /// Appends the sign-up of a person, each time a new one.
    pub(crate) async fn sign_up(&self, person: &str) -> anyhow::Result<SignUpEvent> {
        self.append(sign_up(person)).await
    }

    /// The sign-ups of so many persons, together.
    pub(crate) async fn sign_ups(&self, many: usize) -> anyhow::Result<Vec<SignUpEvent>> {
        try_join_all((0..many).map(|it| self.append(sign_up(&format!("person{it}"))))).await
    }

    pub(crate) async fn append(&self, event: SignUpEvent) -> anyhow::Result<SignUpEvent> {
        Ok(self.log.append(event).await?.stored.event)
    }

    pub(crate) fn start(&self, worker: impl Worker, settings: WorkerSettings) -> Running {
        self.start_over(Arc::new(self.log.clone()), worker, settings)
    }

    pub(crate) fn start_over(
        &self,
        log: Arc<dyn EventLog>,
        worker: impl Worker,
        settings: WorkerSettings,
    ) -> Running {
        self.start_at(RHYTHM, log, worker, settings)
    }

    pub(crate) fn start_at(
        &self,
        rhythm: Rhythm,
        log: Arc<dyn EventLog>,
        worker: impl Worker,
        settings: WorkerSettings,
    ) -> Running {
        let (stop, metrics) = (CancellationToken::new(), WorkerMetrics::default());
        let worker = Arc::new(worker);
        let store = self.store.clone();
        let (metrics_of_run, stop_of_run) = (metrics.clone(), stop.clone());
        let run = run_at(rhythm, worker, settings, log, store, metrics_of_run, stop_of_run);
        Running { task: tokio::spawn(run), stop, metrics }
    }

    /// Waits until a worker has nothing left to do: neither in the log nor in the store.
    pub(crate) async fn idle(&self, worker: &str) -> anyhow::Result<()> {
        self.acknowledged(worker).await?;
        eventually(LIMIT, "nothing waits for the worker in the store", async || {
            Ok::<_, StoreError>(self.store.set_aside(worker).await?.retries == 0)
        })
        .await
    }

    /// Waits until everything in the log is done or set aside.
    pub(crate) async fn acknowledged(&self, worker: &str) -> anyhow::Result<()> {
        eventually(LIMIT, "the worker has acknowledged everything", async || {
            // More than once, as a count that the consumer overtakes says that nothing waits.
            for _ in 0..3 {
                if !self.log.backlog(worker).await?.is_some_and(|it| it.is_empty()) {
                    return Ok(false);
                }
            }
            Ok::<_, LogError>(true)
        })
        .await
    }
}

fn log_config(directory: &TempDir) -> LocalLogConfig {
    LocalLogConfig {
        path: directory.path().join("events.db"),
        duplicate_window: Duration::from_secs(600),
        refusal_window: Duration::from_secs(30),
        retention: Retention::For(Duration::from_secs(86_400)),
    }
}

pub(crate) fn sign_up(person: &str) -> SignUpEvent {
    let mut event = claims::sample();
    event.id = Uuid::now_v7();
    let now = OffsetDateTime::now_utc();
    event.time = now.replace_millisecond(now.millisecond()).unwrap();
    event.sign_up.email = Some(Email::new(format!("{person}@example.com")));
    event.sign_up.correlation_id = Some(event.id.to_string());
    let key = PseudonymKey::new(vec![1; 32]);
    event.person = key.person(&event.sign_up);
    event.fingerprint = key.fingerprint(&event.sign_up, &event.person);
    event
}

pub(crate) fn task(event: SignUpEvent) -> Task {
    Task { event, sequence: 1, attempt: 1 }
}

/// The sign-up of a person, once an approver has said yes.
pub(crate) fn approved(person: &str) -> SignUpEvent {
    let pending = pending(person);
    let now = OffsetDateTime::now_utc();
    let key = PseudonymKey::new(vec![1; 32]);
    let reason = Some("known to us".to_owned());
    SignUpEvent::reviewed(Uuid::now_v7(), now, &pending, Verdict::Approve, "grace", reason, &key)
}

/// The sign-up of a person that waits for an approver.
pub(crate) fn pending(person: &str) -> SignUpEvent {
    let mut event = sign_up(person);
    event.kind = Kind::Pending;
    let message = "an approver looks at it".to_owned();
    event.decision.outcome = Outcome::Pending { message, claims: Claims::new() };
    event
}

/// How the stand-in for Graph is reached.
pub(crate) fn graph_settings(server: &Graph) -> GraphSettings {
    let secret = Graph::CLIENT_SECRET.to_owned().into();
    GraphSettings {
        base_url: server.url(),
        token_url: Some(server.token_url()),
        ..GraphSettings::new(Graph::TENANT, Graph::CLIENT_ID, secret)
    }
}

/// Settings that fail fast, each event for itself.
pub(crate) fn settings(tries: u32) -> WorkerSettings {
    let retry = RetryPolicy {
        initial: Duration::from_millis(5),
        multiplier: 1.0,
        jitter: 0.0,
        tries,
        ..RetryPolicy::default()
    };
    let breaker = BreakerPolicy { failures: u32::MAX, ..BreakerPolicy::default() };
    WorkerSettings { retry, breaker, ..WorkerSettings::default() }
}

/// A worker at work.
pub(crate) struct Running {
    pub(crate) task: JoinHandle<anyhow::Result<()>>,
    pub(crate) stop: CancellationToken,
    pub(crate) metrics: WorkerMetrics,
}

impl Running {
    pub(crate) async fn stop(self) -> anyhow::Result<()> {
        self.stop.cancel();
        tokio::time::timeout(LIMIT, self.task).await.context("the worker did not stop")??
    }

    pub(crate) fn metrics(&self, worker: &str) -> crate::metrics::OneWorker {
        self.metrics.of(worker)
    }
}

/// A worker that does what the test says, and remembers whose events it was given.
pub(crate) struct Scripted {
    act: Box<dyn Fn(Task) -> BoxFuture<'static, Result<(), HandleError>> + Send + Sync>,
    pub(crate) seen: Arc<Mutex<Vec<Uuid>>>,
    pub(crate) has_one_target: bool,
}

pub(crate) const SCRIPTED: &str = "scripted";

impl Scripted {
    pub(crate) fn new<F>(act: impl Fn(Task) -> F + Send + Sync + 'static) -> Self
    where
        F: Future<Output = Result<(), HandleError>> + Send + 'static,
    {
        let act = Box::new(move |task| Box::pin(act(task)) as BoxFuture<'static, _>);
        Self { act, seen: Arc::default(), has_one_target: true }
    }
}

impl fmt::Debug for Scripted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Scripted")
    }
}

#[async_trait]
impl Worker for Scripted {
    fn name(&self) -> &str {
        SCRIPTED
    }

    async fn handle(&self, task: &Task) -> Result<(), HandleError> {
        self.seen.lock().unwrap().push(task.event.id);
        (self.act)(task.clone()).await
    }

    fn has_one_target(&self) -> bool {
        self.has_one_target
    }
}

/// A log with a bad connection: it loses as many calls of each sort as it is told to.
#[derive(Clone, Debug)]
pub(crate) struct Shaky {
    log: LocalLog,
    pub(crate) faults: Arc<Faults>,
}

#[derive(Debug, Default)]
pub(crate) struct Faults {
    pub(crate) consumer: AtomicU32,
    pub(crate) next: AtomicU32,
    pub(crate) ack: AtomicU32,
    /// So many events come as bytes that nobody can read.
    pub(crate) garbled: AtomicU32,
    /// So many consumers, once opened, never give anything.
    pub(crate) silent: AtomicU32,
    /// How often the backlog was asked for.
    pub(crate) backlogs: AtomicU32,
    /// From now on, `next` is refused for good.
    pub(crate) refuse: std::sync::atomic::AtomicBool,
    /// How often a heartbeat came through.
    pub(crate) progress: AtomicU32,
    pub(crate) changed: tokio::sync::Notify,
}

impl Shaky {
    pub(crate) fn new(log: LocalLog) -> Self {
        Self { log, faults: Arc::default() }
    }
}

fn lost(left: &AtomicU32) -> Result<(), LogError> {
    let lost = left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1));
    lost.map_or(Ok(()), |_| Err(LogError::Unavailable(anyhow!("the test cut the line"))))
}

#[async_trait]
impl EventLog for Shaky {
    async fn append_written(&self, event: WrittenEvent) -> Result<Appended, AppendError> {
        self.log.append_written(event).await
    }

    async fn consumer(&self, spec: ConsumerSpec) -> Result<Box<dyn Consumer>, LogError> {
        lost(&self.faults.consumer)?;
        let is_silent = lost(&self.faults.silent).is_err();
        let consumer = self.log.consumer(spec).await?;
        Ok(Box::new(ShakyConsumer { consumer, is_silent, faults: self.faults.clone() }))
    }

    async fn replay(
        &self,
        replay: Replay,
    ) -> Result<BoxStream<'static, Result<Stored, LogError>>, LogError> {
        self.log.replay(replay).await
    }

    async fn backlog(&self, consumer: &str) -> Result<Option<Backlog>, LogError> {
        self.faults.backlogs.fetch_add(1, Ordering::SeqCst);
        self.log.backlog(consumer).await
    }
}

#[derive(Debug)]
struct ShakyConsumer {
    consumer: Box<dyn Consumer>,
    is_silent: bool,
    faults: Arc<Faults>,
}

#[async_trait]
impl Consumer for ShakyConsumer {
    async fn next(&mut self) -> Result<Delivery, LogError> {
        if self.is_silent {
            return std::future::pending().await;
        }
        lost(&self.faults.next)?;
        if self.faults.refuse.load(Ordering::SeqCst) {
            return Err(LogError::Refused(anyhow!("the test forbids it")));
        }
        let mut delivery = self.consumer.next().await?;
        if lost(&self.faults.garbled).is_err() {
            let raw = br#"{"secret":"#.to_vec();
            delivery.event = Err(Undecodable { raw, reason: "Eof error at line 1".into() });
        }
        let faults = self.faults.clone();
        let acknowledge = Box::new(ShakyAck { acknowledge: delivery.acknowledge, faults });
        Ok(Delivery { acknowledge, ..delivery })
    }
}

#[derive(Debug)]
struct ShakyAck {
    acknowledge: Box<dyn Acknowledge>,
    faults: Arc<Faults>,
}

#[async_trait]
impl Acknowledge for ShakyAck {
    async fn ack(&self) -> Result<(), LogError> {
        lost(&self.faults.ack)?;
        self.acknowledge.ack().await
    }

    async fn nack(&self, delay: Duration) -> Result<(), LogError> {
        self.acknowledge.nack(delay).await
    }

    async fn progress(&self) -> Result<(), LogError> {
        self.acknowledge.progress().await?;
        self.faults.progress.fetch_add(1, Ordering::SeqCst);
        self.faults.changed.notify_waiters();
        Ok(())
    }
}
