//! Events a second from an append to a worker's effect, and through each part of that way alone.
//!
//! Over NATS and PostgreSQL it is append, relay, stream, worker, each of which syncs what it
//! acknowledges; embedded it is append and worker. A part alone is the ceiling of the whole, and
//! the worker that does nothing is the ceiling of those that do something. An event counts once the
//! log has taken note that it was handled.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use async_trait::async_trait;
use secrecy::SecretString;
use serde::Serialize;
use tokio::{
    sync::Notify,
    task::{JoinHandle, JoinSet},
    time::timeout,
};
use tokio_util::sync::CancellationToken;
use vestibule_events::{
    EventLog, JetStream, JetStreamConfig, LocalLog, NatsCredentials, Retention, Role, SignUpEvent,
    relay,
};
use vestibule_store::{Store, StoreOptions, StoreUrl};
use vestibule_testkit::{Nats, Postgres, eventually};
use vestibule_workers::{
    Database, HandleError, Task, Worker, WorkerMetrics, WorkerSettings, consumer_spec, run,
};

use crate::{
    cli::Options,
    sample,
    server::{RETENTION, local_log},
    spread::Spread,
};

/// Tasks that append at the same time, like calls in progress.
const APPENDERS: usize = 128;

/// One way, or one part of one.
#[derive(Debug, Serialize)]
pub(crate) struct Row {
    pub(crate) name: &'static str,
    pub(crate) events: u32,
    pub(crate) per_second: Spread,
}

pub(crate) fn measure(options: &Options, folder: &Path) -> anyhow::Result<Vec<Row>> {
    let mut rounds = vec![];
    for number in 1..=options.rounds {
        eprintln!("pipeline, round {number} of {}", options.rounds);
        let mut round = Round {
            events: sample::events(options.events),
            folder: folder.join(format!("pipeline-{number}")),
            postgres: None,
            nats: vec![],
        };
        // Ends before the servers do, or what is still connected would look for them.
        let runtime = tokio::runtime::Runtime::new()?;
        rounds.push(runtime.block_on(round.measure())?);
    }
    Ok(rows(options.events, &rounds))
}

/// Names with seconds, the same names in the same order in each round.
type Times = Vec<(&'static str, Duration)>;

fn rows(events: u32, rounds: &[Times]) -> Vec<Row> {
    let rate = |time: Duration| f64::from(events) / time.as_secs_f64();
    let names = rounds.first().into_iter().flatten().map(|(name, _)| *name);
    names
        .enumerate()
        .map(|(place, name)| {
            let per_second = Spread::of(rounds.iter().map(|times| rate(times[place].1)));
            Row { name, events, per_second }
        })
        .collect()
}

struct Round {
    events: Vec<SignUpEvent>,
    folder: PathBuf,
    /// What was started runs until the round is over.
    postgres: Option<Postgres>,
    nats: Vec<Nats>,
}

impl Round {
    async fn measure(&mut self) -> anyhow::Result<Times> {
        let mut times = vec![];
        self.postgres = Some(Postgres::start_durable().await?);
        self.over_the_stream(&mut times).await?;
        self.embedded(&mut times).await?;
        fs::remove_dir_all(&self.folder)?;
        Ok(times)
    }

    async fn over_the_stream(&mut self, times: &mut Times) -> anyhow::Result<()> {
        let behind_relay = || Retention::BehindConsumer(relay::CONSUMER.to_owned());

        // One part after the other, each with all of the machine.
        let log = self.log("parts", behind_relay()).await?;
        let stream = self.stream(&["nothing", Database::NAME]).await?;
        times.push(("append", self.append(&log).await?));
        let ceiling = self.stream(&[]).await?;
        let in_flight = relay::RelayOptions::default().in_flight;
        let name = "stream without a relay, as many in flight";
        times.push((name, self.append_to(Arc::new(ceiling), in_flight).await?));
        times.push(("relay, log full", self.relay(&log, &stream).await?));
        log.close().await?;
        let store = self.postgres_store("parts").await?;
        let nothing = Counted::new(Arc::new(Nothing), self.count());
        let name = "worker that does nothing, stream full";
        times.push((name, self.work(nothing, Arc::new(stream.clone()), &store).await?));
        let database = Counted::new(Arc::new(Database::new(store.clone())), self.count());
        let name = "database worker (PostgreSQL), stream full";
        times.push((name, self.work(database, Arc::new(stream.clone()), &store).await?));

        // All of them at the same time.
        for (name, with_database) in [
            ("append, relay, worker that does nothing", false),
            ("append, relay, database worker (PostgreSQL)", true),
        ] {
            let store = self.postgres_store(if with_database { "all" } else { "none" }).await?;
            let worker: Arc<dyn Worker> = if with_database {
                Arc::new(Database::new(store.clone()))
            } else {
                Arc::new(Nothing)
            };
            let log = self.log(worker.name(), behind_relay()).await?;
            let stream = self.stream(&[worker.name()]).await?;
            let worker = Counted::new(worker, self.count());
            let working = Working::start(worker, Arc::new(stream.clone()), store);
            let relaying = Relaying::start(&log, &stream);
            let begun = Instant::now();
            self.append(&log).await?;
            working.done(self.limit()).await?;
            times.push((name, begun.elapsed()));
            working.stop().await?;
            relaying.stop().await?;
            log.close().await?;
        }
        Ok(())
    }

    async fn embedded(&self, times: &mut Times) -> anyhow::Result<()> {
        let log = self.log("embedded-parts", Retention::For(RETENTION)).await?;
        self.append(&log).await?;
        let store = self.sqlite_store("parts").await?;
        let nothing = Counted::new(Arc::new(Nothing), self.count());
        let name = "embedded: worker that does nothing, log full";
        times.push((name, self.work(nothing, Arc::new(log.clone()), &store).await?));
        let database = Counted::new(Arc::new(Database::new(store.clone())), self.count());
        let name = "embedded: database worker (SQLite), log full";
        times.push((name, self.work(database, Arc::new(log.clone()), &store).await?));
        log.close().await?;

        let log = self.log("embedded-all", Retention::For(RETENTION)).await?;
        let store = self.sqlite_store("all").await?;
        let database = Counted::new(Arc::new(Database::new(store.clone())), self.count());
        let working = Working::start(database, Arc::new(log.clone()), store);
        let begun = Instant::now();
        self.append(&log).await?;
        working.done(self.limit()).await?;
        times.push(("embedded: append, database worker (SQLite)", begun.elapsed()));
        working.stop().await?;
        log.close().await?;
        Ok(())
    }

    fn count(&self) -> u64 {
        self.events.len() as u64
    }

    /// After this something is wrong: no part is slower than a hundred events a second.
    fn limit(&self) -> Duration {
        Duration::from_secs(30 + self.count() / 100)
    }

    async fn log(&self, name: &str, retention: Retention) -> anyhow::Result<LocalLog> {
        Ok(LocalLog::open(local_log(&self.folder.join(name), retention)).await?)
    }

    async fn postgres_store(&self, name: &str) -> anyhow::Result<Store> {
        let server = self.postgres.as_ref().context("PostgreSQL was started first")?;
        let url = server.create_database(name).await?;
        opened(StoreUrl::Postgres(SecretString::from(url))).await
    }

    async fn sqlite_store(&self, name: &str) -> anyhow::Result<Store> {
        opened(StoreUrl::Sqlite(self.folder.join(format!("{name}.db")))).await
    }

    /// A stream on a nats-server of its own, which syncs every event before it acknowledges it.
    async fn stream(&mut self, workers: &[&str]) -> anyhow::Result<JetStream> {
        let server = Nats::start().await?;
        let stream = JetStream::connect(JetStreamConfig {
            url: server.url(),
            credentials: NatsCredentials::None,
            role: Role::Provisioner,
            inbox_prefix: None,
            stream: "SIGNUPS".to_owned(),
            duplicate_window: Duration::from_secs(600),
            refusal_window: Duration::from_secs(30),
            retention: RETENTION,
            max_bytes: 4 << 30,
            replicas: 1,
        })
        .await?;
        let consumers: Vec<_> =
            workers.iter().map(|name| consumer_spec(name, &WorkerSettings::default())).collect();
        eventually(Duration::from_secs(10), "the stream is there", async || {
            stream.provision(&consumers).await.map(|_| true)
        })
        .await?;
        self.nats.push(server);
        Ok(stream)
    }

    async fn append(&self, log: &LocalLog) -> anyhow::Result<Duration> {
        let elapsed = self.append_to(Arc::new(log.clone()), APPENDERS).await?;
        ensure!(log.last_sequence() == self.count(), "events were lost or taken for repeats");
        Ok(elapsed)
    }

    async fn append_to(
        &self,
        log: Arc<dyn EventLog>,
        appenders: usize,
    ) -> anyhow::Result<Duration> {
        let mut shares = vec![vec![]; appenders];
        for (place, event) in self.events.iter().enumerate() {
            shares[place % appenders].push(event.clone());
        }
        let begun = Instant::now();
        let mut appenders = JoinSet::new();
        for share in shares {
            let log = Arc::clone(&log);
            appenders.spawn(async move {
                for event in share {
                    log.append(event).await?;
                }
                anyhow::Ok(())
            });
        }
        while let Some(done) = appenders.join_next().await {
            done??;
        }
        Ok(begun.elapsed())
    }

    async fn relay(&self, log: &LocalLog, stream: &JetStream) -> anyhow::Result<Duration> {
        let begun = Instant::now();
        let relaying = Relaying::start(log, stream);
        let relayed = relaying.progress.acknowledged(log.last_sequence());
        timeout(self.limit(), relayed).await.context("the relay does not come to its end")?;
        let elapsed = begun.elapsed();
        relaying.stop().await?;
        let backlog = log.backlog(relay::CONSUMER).await?.context("the relay has a consumer")?;
        ensure!(backlog.is_empty(), "the relay left events behind: {backlog:?}");
        Ok(elapsed)
    }

    async fn work(
        &self,
        worker: Arc<Counted>,
        log: Arc<dyn EventLog>,
        store: &Store,
    ) -> anyhow::Result<Duration> {
        let begun = Instant::now();
        let working = Working::start(worker, log, store.clone());
        working.done(self.limit()).await?;
        let elapsed = begun.elapsed();
        working.stop().await?;
        Ok(elapsed)
    }
}

async fn opened(url: StoreUrl) -> anyhow::Result<Store> {
    let store = Store::open(&url, StoreOptions::default()).await?;
    store.migrate().await?;
    Ok(store)
}

/// The relay, running.
struct Relaying {
    progress: relay::Progress,
    stop: CancellationToken,
    task: JoinHandle<Result<(), vestibule_events::LogError>>,
}

impl Relaying {
    fn start(log: &LocalLog, stream: &JetStream) -> Self {
        let (progress, stop) = (relay::Progress::default(), CancellationToken::new());
        let options = relay::RelayOptions::default();
        let (log, stream) = (log.clone(), stream.clone());
        let task = tokio::spawn(relay::run(log, stream, options, progress.clone(), stop.clone()));
        Self { progress, stop, task }
    }

    async fn stop(self) -> anyhow::Result<()> {
        self.stop.cancel();
        Ok(self.task.await??)
    }
}

/// A worker, running with the settings it has by default.
struct Working {
    worker: Arc<Counted>,
    log: Arc<dyn EventLog>,
    stop: CancellationToken,
    task: JoinHandle<anyhow::Result<()>>,
}

impl Working {
    fn start(worker: Arc<Counted>, log: Arc<dyn EventLog>, store: Store) -> Self {
        let stop = CancellationToken::new();
        let running = run(
            Arc::<Counted>::clone(&worker),
            WorkerSettings::default(),
            Arc::clone(&log),
            store,
            WorkerMetrics::default(),
            stop.clone(),
        );
        Self { worker, log, stop, task: tokio::spawn(running) }
    }

    /// Returns once everything is handled and the log has taken note.
    async fn done(&self, limit: Duration) -> anyhow::Result<()> {
        let name = self.worker.name();
        timeout(limit, self.worker.handled_all.notified())
            .await
            .with_context(|| format!("{name} does not come to its end"))?;
        eventually(Duration::from_secs(30), "the log has taken note of all", async || {
            self.log.backlog(name).await.map(|it| it.is_some_and(|backlog| backlog.is_empty()))
        })
        .await
    }

    async fn stop(self) -> anyhow::Result<()> {
        self.stop.cancel();
        self.task.await?
    }
}

/// A worker whose successes are counted.
#[derive(Debug)]
struct Counted {
    worker: Arc<dyn Worker>,
    wanted: u64,
    handled: AtomicU64,
    handled_all: Notify,
}

impl Counted {
    fn new(worker: Arc<dyn Worker>, wanted: u64) -> Arc<Self> {
        Arc::new(Self { worker, wanted, handled: AtomicU64::new(0), handled_all: Notify::new() })
    }
}

#[async_trait]
impl Worker for Counted {
    fn name(&self) -> &str {
        self.worker.name()
    }

    async fn handle(&self, task: &Task) -> Result<(), HandleError> {
        self.worker.handle(task).await?;
        if self.handled.fetch_add(1, Ordering::Relaxed) + 1 == self.wanted {
            self.handled_all.notify_one();
        }
        Ok(())
    }
}

/// What is left when the effect costs nothing.
#[derive(Debug)]
struct Nothing;

#[async_trait]
impl Worker for Nothing {
    fn name(&self) -> &str {
        "nothing"
    }

    async fn handle(&self, _: &Task) -> Result<(), HandleError> {
        Ok(())
    }
}
