//! The processes: `up`, `api`, `worker`, `relay`. Each starts its parts and says where they are; how
//! they are stopped, `process` says.

mod backstage;
mod banner;
mod health;
mod open_files;
mod permissions;
mod process;
mod reload;
mod subscribers;
mod systemd;

use std::{
    path::Path,
    sync::{Arc, OnceLock},
};

use anyhow::{Context, bail};
use tracing::info;
use vestibule_events::{EventLog, LocalLog, Role};
use vestibule_workers::WorkerMetrics;

pub(crate) use self::systemd::Sockets;
use self::{
    banner::Banner,
    process::{Process, Stage, Without},
    subscribers::{Crew, SubscriberMetrics, Tools},
};
use crate::{
    config::{
        self, BUILT_IN, Config, NatsConfig, StoreTarget, SubscribersConfig, WorkerConfig,
        did_you_mean,
    },
    readiness::Parts,
    wiring,
};

/// Everything in one process.
pub(crate) async fn up(config: Config, file: &Path, sockets: Sockets) -> anyhow::Result<()> {
    process::run(start_up(config, file, sockets)).await
}

async fn start_up(config: Config, file: &Path, sockets: Sockets) -> anyhow::Result<Process> {
    let mut process = Process::new(sockets);
    let log = wiring::local_log(&config).await?;
    process.log = Some(log.clone());
    let mut parts = Parts { log: Some(log.clone()), ..Parts::default() };
    let banner = Banner::new(&config, file);
    let config = Arc::new(config);

    let mut local = None;
    let worker_log: Arc<dyn EventLog> = match &config.nats {
        None => {
            local = Some(log.clone());
            Arc::new(log.clone())
        }
        Some(nats) => {
            parts.stream = Some(process.relay(&config, nats, &log).await?);
            Arc::new(process.stream(&config, nats, Role::Worker).await?)
        }
    };
    // What is wrong with the configuration must be seen now, not when the servers are there. A file
    // is there at once; a server may stay away for as long as it likes.
    config.workers.iter().try_for_each(wiring::check_secrets)?;
    let store = Arc::new(OnceLock::new());
    if matches!(config.store.target, StoreTarget::Sqlite) {
        let opened = backstage::store(&config).await?;
        store.get_or_init(|| opened);
    }
    parts.store = Some(Arc::clone(&store));
    let registry = &mut process.registry;
    let metrics = (WorkerMetrics::register(registry), SubscriberMetrics::register(registry));
    process.count_permissions(&config.workers, &store);
    let requests = config.has_outbox().then(|| Arc::clone(&store));
    let connector = process.connector(&config, requests, &log).await?;
    let stop = process.stop_of(Stage::Workers);
    let backstage = backstage::run(Arc::clone(&config), (worker_log, local), store, metrics, stop);
    process.spawn(Stage::Workers, "workers", Without::GoesOn, backstage);
    let admin = process.admin(parts, &config).await?;
    banner.print(connector, admin);
    Ok(process)
}

/// The connector endpoint, with the relay unless that is a process of its own.
pub(crate) async fn api(
    config: Config,
    without_relay: bool,
    sockets: Sockets,
) -> anyhow::Result<()> {
    process::run(start_api(config, without_relay, sockets)).await
}

async fn start_api(
    config: Config,
    without_relay: bool,
    sockets: Sockets,
) -> anyhow::Result<Process> {
    let mut process = Process::new(sockets);
    let config = Arc::new(config);
    let nats = needs_nats(&config, "vestibule api")?;
    let log = wiring::local_log(&config).await?;
    process.log = Some(log.clone());
    let mut parts = Parts { log: Some(log.clone()), ..Parts::default() };
    if without_relay {
        if config.log.answer_after == config::AnswerAfter::Stream {
            bail!(
                "answer_after = \"stream\" needs the relay in this process: leave out \
                 --without-relay"
            );
        }
    } else {
        parts.stream = Some(process.relay(&config, nats, &log).await?);
    }
    // The connector itself needs no store; requests for approval, who waits for an account and
    // devices are kept there.
    if config.has_outbox() || config.devices.is_some() {
        let store = Arc::new(OnceLock::new());
        let opening = backstage::open_store(Arc::clone(&config), Arc::clone(&store));
        let stop = process.stop_of(Stage::Behind);
        process.spawn(Stage::Behind, "store", Without::GoesOn, async move {
            tokio::select! {
                () = stop.cancelled() => Ok(()),
                opened = opening => opened,
            }
        });
        parts.store = Some(store);
    }
    let requests = parts.store.clone().filter(|_| config.has_outbox());
    let connector = process.connector(&config, requests, &log).await?;
    let admin = process.admin(parts, &config).await?;
    info!(%connector, %admin, "the connector answers");
    Ok(process)
}

/// Workers over JetStream.
pub(crate) async fn worker(
    config: Config,
    names: &[String],
    sockets: Sockets,
) -> anyhow::Result<()> {
    process::run(start_worker(config, names, sockets)).await
}

async fn start_worker(
    config: Config,
    names: &[String],
    sockets: Sockets,
) -> anyhow::Result<Process> {
    let mut process = Process::new(sockets);
    let config = Arc::new(config);
    let nats = needs_nats(&config, "vestibule worker")?;
    let workers = chosen_workers(&config, names)?;
    let opened = backstage::store(&config).await?;
    let store = Arc::new(OnceLock::from(opened.clone()));
    let stream = process.stream(&config, nats, Role::Worker).await?;
    let metrics = WorkerMetrics::register(&mut process.registry);
    process.count_permissions(workers.iter().copied(), &store);
    for worker in &workers {
        let effect = wiring::worker(&config, worker, &opened)
            .with_context(|| format!("could not set up the worker {}", worker.name()))?;
        let run = vestibule_workers::run(
            effect,
            worker.settings.clone(),
            Arc::new(stream.clone()),
            opened.clone(),
            metrics.clone(),
            process.stop_of(Stage::Workers),
        );
        process.spawn(Stage::Workers, worker.name(), Without::Ends, run);
    }
    if names.is_empty() || names.iter().any(|it| !BUILT_IN.contains(&it.as_str())) {
        let runs_all = names.iter().any(|it| it == SubscribersConfig::ALL);
        let crew = Crew {
            config: Arc::clone(&config),
            names: if runs_all { Vec::new() } else { names.to_vec() },
            metrics: SubscriberMetrics::register(&mut process.registry),
            tools: Tools {
                log: Arc::new(stream.clone()),
                // A worker's process may not make consumers: it could rewrite any.
                provisioner: None,
                local: None,
                store: opened,
                metrics,
            },
        };
        let run = crew.run(process.stop_of(Stage::Workers));
        process.spawn(Stage::Workers, "subscribers", Without::Ends, run);
    }
    let parts = Parts { stream: Some(stream), store: Some(store), log: None };
    let admin = process.admin(parts, &config).await?;
    let names: Vec<_> = workers.iter().map(|worker| worker.name()).collect();
    info!(workers = names.join(", "), %admin, "the workers run");
    Ok(process)
}

/// The relay beside an `api --without-relay`.
pub(crate) async fn relay(config: Config, sockets: Sockets) -> anyhow::Result<()> {
    process::run(start_relay(config, sockets)).await
}

async fn start_relay(config: Config, sockets: Sockets) -> anyhow::Result<Process> {
    let mut process = Process::new(sockets);
    let nats = needs_nats(&config, "vestibule relay")?;
    wiring::data_folder(&config)?;
    let log = LocalLog::open_for_relay(wiring::local_log_config(&config)).await?;
    process.log = Some(log.clone());
    let stream = process.relay(&config, nats, &log).await?;
    let parts = Parts { stream: Some(stream), ..Parts::default() };
    let admin = process.admin(parts, &config).await?;
    info!(%admin, log = %config.log_file().display(), "the relay runs");
    Ok(process)
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
    let subscribers = &config.subscribers;
    let built_in = config.workers.iter().map(WorkerConfig::name);
    let configured: Vec<_> = built_in.chain(subscribers.names()).collect();
    // A folder that is there may be filled while we run.
    if configured.is_empty() && !subscribers.folder.is_dir() {
        bail!("the configuration has no worker; add a [workers.NAME] section or a subscriber");
    }
    for name in names.iter().filter(|it| *it != SubscribersConfig::ALL) {
        if !configured.contains(&name.as_str()) {
            bail!("there is no worker `{name}`{}", did_you_mean(name, &configured));
        }
        if subscribers.subscribers.iter().any(|it| it.name() == name && !it.runs_here()) {
            bail!("`{name}` takes its events from the stream itself; no process of ours runs it");
        }
    }
    let chosen = config.workers.iter();
    Ok(chosen.filter(|it| names.is_empty() || names.iter().any(|name| name == it.name())).collect())
}
