//! The processes: `up`, `api`, `worker`, `relay`. Each starts its parts, says where they are, and
//! stops them in order: answers in progress first, then events in progress, then the log.

use std::{
    future::Future,
    net::SocketAddr,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use async_trait::async_trait;
use prometheus_client::registry::Registry;
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};
use vestibule_api::{AnswerAfter, Api, Durable, ServerLimits, admin_router, router, serve};
use vestibule_events::{EventLog, JetStream, LocalLog, Role, relay};
use vestibule_store::Store;
use vestibule_workers::WorkerMetrics;

use crate::{
    config::{self, Config, NatsConfig, SecretSource, WorkerConfig, did_you_mean},
    readiness::Parts,
    wiring,
};

/// How long a stop may take before what still runs is left to the next start.
const DRAIN_LIMIT: Duration = Duration::from_secs(25);

/// Everything in one process.
pub(crate) async fn up(config: Config, file: &Path) -> anyhow::Result<()> {
    let mut process = Process::begin()?;
    let log = wiring::local_log(&config).await?;
    let store = open_store(&config).await?;
    let mut parts = Parts { log: Some(log.clone()), store: Some(store.clone()), stream: None };

    let worker_log: Arc<dyn EventLog> = match &config.nats {
        None => Arc::new(log.clone()),
        Some(nats) => {
            provision_when_reachable(&config, nats).await?;
            parts.stream = Some(process.relay(&config, nats, &log).await?);
            Arc::new(process.stream(&config, nats, Role::Worker).await?)
        }
    };
    let workers: Vec<_> = config.workers.iter().collect();
    process.workers(&workers, &worker_log, &store)?;
    let banner = Banner::new(&config, file);
    let connector = process.connector(config, &log).await?;
    let admin = process.admin(parts, banner.admin).await?;
    banner.print(connector, admin);
    process.run().await;
    log.close().await?;
    Ok(())
}

/// The connector endpoint, with the relay unless that is a process of its own.
pub(crate) async fn api(config: Config, without_relay: bool) -> anyhow::Result<()> {
    let mut process = Process::begin()?;
    let nats = needs_nats(&config, "vestibule api")?;
    let log = wiring::local_log(&config).await?;
    let mut parts = Parts { log: Some(log.clone()), ..Parts::default() };
    if without_relay {
        if config.log.answer_after == config::AnswerAfter::Stream {
            bail!(
                "answer_after = \"stream\" needs the relay in this process: leave out --without-relay"
            );
        }
    } else {
        parts.stream = Some(process.relay(&config, nats, &log).await?);
    }
    let admin = config.listen.admin;
    let connector = process.connector(config, &log).await?;
    let admin = process.admin(parts, admin).await?;
    info!(%connector, %admin, "the connector answers");
    process.run().await;
    log.close().await?;
    Ok(())
}

/// Workers over JetStream.
pub(crate) async fn worker(config: Config, names: &[String]) -> anyhow::Result<()> {
    let mut process = Process::begin()?;
    let nats = needs_nats(&config, "vestibule worker")?;
    let workers = chosen_workers(&config, names)?;
    let store = open_store(&config).await?;
    let stream = process.stream(&config, nats, Role::Worker).await?;
    let log: Arc<dyn EventLog> = Arc::new(stream.clone());
    process.workers(&workers, &log, &store)?;
    let parts = Parts { stream: Some(stream), store: Some(store), ..Parts::default() };
    let admin = process.admin(parts, config.listen.admin).await?;
    let names: Vec<_> = workers.iter().map(|worker| worker.name()).collect();
    info!(workers = names.join(", "), %admin, "the workers run");
    process.run().await;
    Ok(())
}

/// The relay beside an `api --without-relay`.
pub(crate) async fn relay(config: Config) -> anyhow::Result<()> {
    let mut process = Process::begin()?;
    let nats = needs_nats(&config, "vestibule relay")?;
    wiring::data_folder(&config)?;
    let log = LocalLog::open_for_relay(wiring::local_log_config(&config)).await?;
    let stream = process.relay(&config, nats, &log).await?;
    let parts = Parts { stream: Some(stream), ..Parts::default() };
    let admin = process.admin(parts, config.listen.admin).await?;
    info!(%admin, log = %config.log_file().display(), "the relay runs");
    process.run().await;
    log.close().await?;
    Ok(())
}

fn needs_nats<'a>(config: &'a Config, command: &str) -> anyhow::Result<&'a NatsConfig> {
    config.nats.as_ref().with_context(|| {
        format!(
            "`{command}` is for NATS JetStream, and the configuration has no [nats] section with a \
             url; without NATS, `vestibule up` runs everything in one process"
        )
    })
}

fn chosen_workers<'a>(
    config: &'a Config,
    names: &[String],
) -> anyhow::Result<Vec<&'a WorkerConfig>> {
    let configured: Vec<_> = config.workers.iter().map(WorkerConfig::name).collect();
    if configured.is_empty() {
        bail!("the configuration has no worker; add a [workers.NAME] section");
    }
    for name in names {
        if !configured.contains(&name.as_str()) {
            bail!("there is no worker `{name}`{}", did_you_mean(name, &configured));
        }
    }
    let chosen = config.workers.iter();
    Ok(chosen.filter(|it| names.is_empty() || names.iter().any(|name| name == it.name())).collect())
}

/// Opens the store and brings its schema up to date, waiting for a server that is still starting.
async fn open_store(config: &Config) -> anyhow::Result<Store> {
    const PATIENCE: Duration = Duration::from_secs(60);
    let begun = Instant::now();
    loop {
        let opened = async {
            let store = wiring::store(config).await?;
            let migrations =
                store.migrate().await.context("could not update the store's schema")?;
            anyhow::Ok((store, migrations))
        };
        match opened.await {
            Ok((store, migrations)) => {
                for migration in migrations {
                    info!(version = migration.version, "the store's schema is updated");
                }
                return Ok(store);
            }
            Err(error) if begun.elapsed() < PATIENCE && is_unavailable(&error) => {
                warn!(error = format!("{error:#}"), "the store does not answer yet; trying again");
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
            Err(error) => return Err(error),
        }
    }
}

fn is_unavailable(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        matches!(
            cause.downcast_ref::<vestibule_store::StoreError>(),
            Some(vestibule_store::StoreError::Unavailable(_))
        )
    })
}

/// Creates the stream and its consumers if NATS is there; if not, sign-ups are answered all the
/// same, and `vestibule migrate` or the next start does it.
async fn provision_when_reachable(config: &Config, nats: &NatsConfig) -> anyhow::Result<()> {
    match crate::migrate::provision(config, nats).await {
        Ok(_) => Ok(()),
        Err(error) => {
            warn!(
                error = format!("{error:#}"),
                "could not prepare the stream; sign-ups are answered and wait in the local log. \
                 When NATS is there, run `vestibule migrate`"
            );
            Ok(())
        }
    }
}

/// The running parts of a process and how they are stopped.
struct Process {
    registry: Registry,
    tasks: JoinSet<(&'static str, anyhow::Result<()>)>,
    /// How far the relay is, for answers that wait for the stream.
    progress: relay::Progress,
    stop: CancellationToken,
    terminate: tokio::signal::unix::Signal,
    interrupt: tokio::signal::unix::Signal,
}

impl Process {
    /// Signals are caught from the very beginning, so that a stop during the start is orderly too.
    fn begin() -> anyhow::Result<Self> {
        Ok(Self {
            registry: Registry::default(),
            tasks: JoinSet::new(),
            progress: relay::Progress::default(),
            stop: CancellationToken::new(),
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }

    fn spawn(
        &mut self,
        name: &'static str,
        task: impl Future<Output = anyhow::Result<()>> + Send + 'static,
    ) {
        self.tasks.spawn(async move { (name, task.await) });
    }

    async fn stream(
        &mut self,
        config: &Config,
        nats: &NatsConfig,
        role: Role,
    ) -> anyhow::Result<JetStream> {
        let stream = wiring::stream(config, nats, role).await?;
        stream
            .register(self.registry.sub_registry_with_label(("role".into(), role.as_str().into())));
        Ok(stream)
    }
}

impl Process {
    /// Starts the relay and gives its stream.
    async fn relay(
        &mut self,
        config: &Config,
        nats: &NatsConfig,
        log: &LocalLog,
    ) -> anyhow::Result<JetStream> {
        let stream = self.stream(config, nats, Role::Relay).await?;
        self.progress.register(&mut self.registry);
        let (log, to, progress) = (log.clone(), stream.clone(), self.progress.clone());
        let stop = self.stop.clone();
        self.spawn("relay", async move {
            relay::run(log, to, relay::RelayOptions::default(), progress, stop)
                .await
                .context("the relay ended")
        });
        Ok(stream)
    }

    fn workers(
        &mut self,
        workers: &[&WorkerConfig],
        log: &Arc<dyn EventLog>,
        store: &Store,
    ) -> anyhow::Result<()> {
        let metrics = WorkerMetrics::register(&mut self.registry);
        for config in workers {
            let name = config.name();
            let worker = wiring::worker(config, store)
                .with_context(|| format!("could not set up the worker {name}"))?;
            let (settings, log) = (config.settings.clone(), Arc::clone(log));
            let (store, metrics, stop) = (store.clone(), metrics.clone(), self.stop.clone());
            self.spawn(name, vestibule_workers::run(worker, settings, log, store, metrics, stop));
        }
        Ok(())
    }

    /// Starts to take calls; gives the address, as the configuration may say port 0.
    async fn connector(&mut self, config: Config, log: &LocalLog) -> anyhow::Result<SocketAddr> {
        let key = wiring::pseudonym_key(&config)?;
        let answer_after = match config.log.answer_after {
            config::AnswerAfter::Disk => AnswerAfter::Disk,
            config::AnswerAfter::Stream => {
                AnswerAfter::Stream(Arc::new(Relayed(self.progress.clone())))
            }
        };
        let listen = config.listen.connector;
        let connectors = config
            .connectors
            .into_iter()
            .map(|it| wiring::connector(it, answer_after.clone()))
            .collect::<anyhow::Result<_>>()?;
        let api = Api::new(Arc::new(log.clone()), Arc::new(key), connectors, &mut self.registry)?;
        log.register(&mut self.registry);
        let (listener, address) = bind(listen, "listen.connector").await?;
        let stop = self.stop.clone();
        self.spawn("connector", async move {
            Ok(serve(listener, router(api), ServerLimits::default(), stop).await?)
        });
        Ok(address)
    }

    /// Starts the admin listener, last: the metrics of everything else are in the registry by now.
    async fn admin(&mut self, parts: Parts, listen: SocketAddr) -> anyhow::Result<SocketAddr> {
        let (listener, address) = bind(listen, "listen.admin").await?;
        let registry = Arc::new(std::mem::take(&mut self.registry));
        let router = admin_router(registry, Arc::new(parts));
        let stop = self.stop.clone();
        self.spawn("admin", async move {
            Ok(serve(listener, router, ServerLimits::default(), stop).await?)
        });
        Ok(address)
    }

    /// Runs until a signal comes, then drains. A part that ends by itself is reported; the others
    /// go on, because a worker that cannot go on is no reason to turn people away.
    async fn run(mut self) {
        loop {
            tokio::select! {
                _ = self.terminate.recv() => break,
                _ = self.interrupt.recv() => break,
                Some(ended) = self.tasks.join_next() => report(ended),
            }
        }
        info!("stopping: answers and events in progress are finished first");
        self.stop.cancel();
        let drained = tokio::time::timeout(DRAIN_LIMIT, async {
            while let Some(ended) = self.tasks.join_next().await {
                report(ended);
            }
        });
        tokio::select! {
            drained = drained => match drained {
                Ok(()) => info!("stopped"),
                Err(_) => warn!("stopped with events in progress; they are delivered again"),
            },
            // A second signal: whoever sends it does not want to wait.
            _ = self.interrupt.recv() => warn!("stopped at once"),
        }
    }
}

fn report(ended: Result<(&'static str, anyhow::Result<()>), tokio::task::JoinError>) {
    match ended {
        Ok((_, Ok(()))) => {}
        Ok((part, Err(error))) => error!(part, error = format!("{error:#}"), "a part has ended"),
        Err(error) => error!(%error, "a part has panicked"),
    }
}

async fn bind(address: SocketAddr, key: &str) -> anyhow::Result<(TcpListener, SocketAddr)> {
    let listener = TcpListener::bind(address).await.with_context(|| {
        format!("could not listen on {address}; is another process there? `{key}` names another")
    })?;
    let address = listener.local_addr()?;
    Ok((listener, address))
}

/// Lets answers wait for the relay.
struct Relayed(relay::Progress);

#[async_trait]
impl Durable for Relayed {
    async fn durable(&self, sequence: u64) {
        self.0.acknowledged(sequence).await;
    }
}

/// What `up` prints: where things are and a line to try.
struct Banner {
    admin: SocketAddr,
    text: String,
    connector: String,
    credential: String,
    command: String,
}

impl Banner {
    fn new(config: &Config, file: &Path) -> Self {
        let first = config.connectors.first();
        let credential =
            first.and_then(|it| it.credentials.first()).map_or_else(String::new, |it| {
                match &it.password {
                    SecretSource::Example(password) => format!("{}:{password}", it.user),
                    // curl asks for the password.
                    _ => it.user.clone(),
                }
            });
        let workers: Vec<_> = config.workers.iter().map(WorkerConfig::name).collect();
        let over = config.nats.as_ref().map_or("the local log".to_owned(), |nats| {
            format!("the stream {} at {}", nats.stream, nats.url)
        });
        let data = config.data.display();
        let text = format!(
            "  workers    {} (over {over})\n  data       {data}\n  settings   {}\n",
            if workers.is_empty() { "none".to_owned() } else { workers.join(", ") },
            file.display(),
        );
        let default_data = config.data == Path::new("./data");
        let program = std::env::args().next().unwrap_or_else(|| "vestibule".into());
        Self {
            admin: config.listen.admin,
            text,
            connector: first.map_or_else(String::new, |it| it.name.to_string()),
            credential,
            command: if default_data {
                format!("{program} replay")
            } else {
                format!("{program} replay --data {data}")
            },
        }
    }

    fn print(&self, connector: SocketAddr, admin: SocketAddr) {
        let Self { text, connector: name, credential, command, .. } = self;
        let url = format!("http://{connector}/connectors/{name}/before-create");
        println!(
            "Vestibule is up.\n\n  connector  {url}\n  admin      http://{admin} (/healthz, \
             /readyz, /metrics)\n{text}\nTry a sign-up:\n\n  \
             curl -u {credential} -H 'Content-Type: application/json' \\\n    \
             -d '{{\"email\":\"ada@example.com\",\"givenName\":\"Ada\",\"surname\":\"Lovelace\"}}' \
             \\\n    {url}\n\nand see its event:  {command}\n\nCtrl-C stops.",
        );
    }
}
