//! A worker of one's own as a program of one's own: everything around it, in one call.

use std::{fmt, sync::Arc, time::Duration};

use anyhow::{Context, bail};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use vestibule_events::{EventLog, Filter, JetStream, JetStreamConfig, Kind, NatsCredentials, Role};
use vestibule_store::{Store, StoreOptions, StoreUrl};

use crate::{Inbox, Worker, WorkerMetrics, WorkerSettings, consumer_spec, run, tls};

/// Runs a worker over the stream: as many processes of it as one likes share its events.
///
/// Each event is handled until that has succeeded once: what was done is noted in the store, and what
/// failed waits there for its next attempt, or lies there as a dead letter.
///
/// ```no_run
/// use vestibule_workers::{HandleError, Subscriber, Task, Worker, async_trait, store::StoreUrl};
///
/// #[derive(Debug)]
/// struct Welcome;
///
/// #[async_trait]
/// impl Worker for Welcome {
///     fn name(&self) -> &str {
///         "welcome"
///     }
///
///     async fn handle(&self, task: &Task) -> Result<(), HandleError> {
///         println!("welcome, {}", task.event.person);
///         Ok(())
///     }
/// }
///
/// # #[tokio::main]
/// # async fn main() -> anyhow::Result<()> {
/// let store = StoreUrl::Sqlite("welcome.db".into());
/// Subscriber::new("nats://127.0.0.1:4222", store).run(Arc::new(Welcome)).await
/// # }
/// # use std::sync::Arc;
/// ```
#[derive(Clone)]
#[must_use = "nothing happens before `run`"]
pub struct Subscriber {
    url: String,
    credentials: NatsCredentials,
    provisioner: Option<NatsCredentials>,
    stream: String,
    store: StoreUrl,
    settings: WorkerSettings,
    metrics: WorkerMetrics,
}

impl Subscriber {
    /// `nats_url` is `nats://host:port` or `tls://host:port`, several separated by commas.
    ///
    /// With the store of Vestibule itself (PostgreSQL), `vestibule worker list` and `vestibule dead`
    /// show this worker among the others. A SQLite file is its own, made where there is none; it
    /// serves one process.
    pub fn new(nats_url: impl Into<String>, store: StoreUrl) -> Self {
        Self {
            url: nats_url.into(),
            credentials: NatsCredentials::None,
            provisioner: None,
            stream: "SIGNUPS".to_owned(),
            store,
            settings: Self::default_settings(),
            metrics: WorkerMetrics::default(),
        }
    }

    /// Who we are to NATS: the user that `vestibule subscriber grant` makes, or `worker` of `nats.conf`.
    ///
    /// Answers come under `_INBOX_` and the user's name, which is all that these users may listen to;
    /// without a user's name, under `_INBOX_worker`.
    pub fn credentials(self, credentials: NatsCredentials) -> Self {
        Self { credentials, ..self }
    }

    /// Makes the worker's durable consumer, or brings it up to date, when it starts.
    ///
    /// It takes the rights of `provisioner` in `nats.conf`. Without this call the consumer must be
    /// there: `vestibule subscriber add` makes it. Where NATS asks for no credentials, every worker
    /// may do this, and does.
    pub fn provision_as(self, provisioner: NatsCredentials) -> Self {
        Self { provisioner: Some(provisioner), ..self }
    }

    /// The name of the stream; `SIGNUPS` unless said.
    pub fn stream(self, stream: impl Into<String>) -> Self {
        Self { stream: stream.into(), ..self }
    }

    /// Every accepted and every approved sign-up: what `vestibule subscriber add` makes a consumer for,
    /// too, where it is told nothing else.
    #[must_use]
    pub fn default_settings() -> WorkerSettings {
        let filter = Filter { kinds: vec![Kind::Accepted, Kind::Approved], connectors: vec![] };
        WorkerSettings { filter, ..WorkerSettings::default() }
    }

    /// Which events, how many at a time, how often and how fast. Filter and `ack_wait` must be those of
    /// the consumer, unless we may make it.
    pub fn settings(self, settings: WorkerSettings) -> Self {
        Self { settings, ..self }
    }

    /// Where to count, so that whoever has registered them can show them.
    pub fn metrics(self, metrics: WorkerMetrics) -> Self {
        Self { metrics, ..self }
    }

    /// Runs the worker until SIGTERM or SIGINT, then finishes what is being handled.
    ///
    /// # Errors
    ///
    /// When the store or the stream cannot be used as they are; the message says what to do. A NATS
    /// server that is away is waited for.
    pub async fn run(self, worker: Arc<dyn Worker>) -> anyhow::Result<()> {
        // Caught from the beginning: to start may take a while.
        let (mut terminate, mut interrupt) =
            (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        let signals = tokio::spawn(async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            stopped.cancel();
        });
        let ended = self.run_until(worker, stop).await;
        signals.abort();
        ended
    }

    /// The same until `stop`.
    ///
    /// # Errors
    ///
    /// As [`Subscriber::run`].
    pub async fn run_until(
        self,
        worker: Arc<dyn Worker>,
        stop: CancellationToken,
    ) -> anyhow::Result<()> {
        tls::install_provider();
        let Some(prepared) = stop.run_until_cancelled(self.prepare(&*worker)).await else {
            return Ok(());
        };
        let (stream, store) = prepared?;
        let name = worker.name().to_owned();
        let worker = Arc::new(Inbox::new(worker, store.clone()));
        run(worker, self.settings, Arc::new(stream), store, self.metrics, stop).await.with_context(
            || {
                format!(
                    "`vestibule subscriber add {name} --nats` makes the consumer of a subscriber"
                )
            },
        )
    }

    async fn prepare(&self, worker: &dyn Worker) -> anyhow::Result<(JetStream, Store)> {
        let store = Store::open(&self.store, StoreOptions::default()).await;
        let store = store.context("could not open the store")?;
        match &self.store {
            StoreUrl::Sqlite(_) => {
                store.migrate().await.context("could not update the store's schema")?;
            }
            // Others use it too, so it is changed by whoever is told to.
            StoreUrl::Postgres(_) => {
                if !store.schema_is_current().await.context("could not read the store")? {
                    bail!("the store lacks tables of this version; `vestibule migrate` makes them");
                }
            }
        }
        if let Some(provisioner) = &self.provisioner {
            let stream = self.connect(Role::Provisioner, provisioner).await?;
            let consumer = stream.consumer(consumer_spec(worker.name(), &self.settings)).await;
            consumer.with_context(|| format!("could not make the consumer {}", worker.name()))?;
        }
        Ok((self.connect(Role::Worker, &self.credentials).await?, store))
    }

    async fn connect(
        &self,
        role: Role,
        credentials: &NatsCredentials,
    ) -> anyhow::Result<JetStream> {
        const HOUR: Duration = Duration::from_secs(60 * 60);
        let inbox_prefix = match (role, credentials) {
            (Role::Worker, NatsCredentials::UserPassword { user, .. }) => {
                Some(format!("_INBOX_{user}"))
            }
            _ => None,
        };
        let config = JetStreamConfig {
            url: self.url.clone(),
            credentials: credentials.clone(),
            role,
            inbox_prefix,
            stream: self.stream.clone(),
            // What the stream is to be: only whoever makes or fills it asks for these.
            duplicate_window: HOUR,
            refusal_window: HOUR,
            retention: 24 * HOUR,
            max_bytes: 1 << 30,
            replicas: 1,
        };
        Ok(JetStream::connect(config).await?)
    }
}

/// Leaves the addresses out: passwords may stand in them.
impl fmt::Debug for Subscriber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Subscriber")
            .field("stream", &self.stream)
            .field("settings", &self.settings)
            .finish_non_exhaustive()
    }
}
