//! The processes: `up`, `api`, `worker`, `relay`. Each starts its parts, says where they are, and
//! stops them in order: answers in progress first, then events in progress, then the log.

mod backstage;
mod banner;
mod process;
mod reload;

use std::{
    path::Path,
    sync::{Arc, OnceLock},
};

use anyhow::{Context, bail};
use tracing::info;
use vestibule_events::{EventLog, LocalLog, Role};
use vestibule_workers::WorkerMetrics;

use self::{
    banner::Banner,
    process::{Process, Without},
};
use crate::{
    config::{self, Config, NatsConfig, StoreTarget, WorkerConfig, did_you_mean},
    readiness::Parts,
    wiring,
};

/// Everything in one process.
pub(crate) async fn up(config: Config, file: &Path) -> anyhow::Result<()> {
    let mut process = Process::begin()?;
    let log = wiring::local_log(&config).await?;
    let mut parts = Parts { log: Some(log.clone()), ..Parts::default() };
    let banner = Banner::new(&config, file);
    let config = Arc::new(config);

    let worker_log: Arc<dyn EventLog> = match &config.nats {
        None => Arc::new(log.clone()),
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
        let Some(opened) = process.unless_stopped(backstage::store(&config)).await else {
            return Ok(());
        };
        let opened = opened?;
        store.get_or_init(|| opened);
    }
    parts.store = Some(Arc::clone(&store));
    let metrics = WorkerMetrics::register(&mut process.registry);
    let requests = config.has_approvals().then(|| Arc::clone(&store));
    let connector = process.connector(&config, requests, &log).await?;
    let backstage =
        backstage::run(Arc::clone(&config), worker_log, store, metrics, process.stop.clone());
    process.spawn("workers", Without::GoesOn, backstage);
    let admin = process.admin(parts, config.listen.admin).await?;
    banner.print(connector, admin);
    let ended = process.run().await;
    log.close().await?;
    ended
}

/// The connector endpoint, with the relay unless that is a process of its own.
pub(crate) async fn api(config: Config, without_relay: bool) -> anyhow::Result<()> {
    let mut process = Process::begin()?;
    let config = Arc::new(config);
    let nats = needs_nats(&config, "vestibule api")?;
    let log = wiring::local_log(&config).await?;
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
    // The connector itself needs no store; requests for approval are kept there.
    if config.has_approvals() {
        let store = Arc::new(OnceLock::new());
        let opening = backstage::open_store(Arc::clone(&config), Arc::clone(&store));
        let stop = process.stop.clone();
        process.spawn("store", Without::GoesOn, async move {
            tokio::select! {
                () = stop.cancelled() => Ok(()),
                opened = opening => opened,
            }
        });
        parts.store = Some(store);
    }
    let connector = process.connector(&config, parts.store.clone(), &log).await?;
    let admin = process.admin(parts, config.listen.admin).await?;
    info!(%connector, %admin, "the connector answers");
    let ended = process.run().await;
    log.close().await?;
    ended
}

/// Workers over JetStream.
pub(crate) async fn worker(config: Config, names: &[String]) -> anyhow::Result<()> {
    let mut process = Process::begin()?;
    let nats = needs_nats(&config, "vestibule worker")?;
    let workers = chosen_workers(&config, names)?;
    let Some(opened) = process.unless_stopped(backstage::store(&config)).await else {
        return Ok(());
    };
    let opened = opened?;
    let store = Arc::new(OnceLock::from(opened.clone()));
    let stream = process.stream(&config, nats, Role::Worker).await?;
    let metrics = WorkerMetrics::register(&mut process.registry);
    for worker in &workers {
        let effect = wiring::worker(&config, worker, &opened)
            .with_context(|| format!("could not set up the worker {}", worker.name()))?;
        let run = vestibule_workers::run(
            effect,
            worker.settings.clone(),
            Arc::new(stream.clone()),
            opened.clone(),
            metrics.clone(),
            process.stop.clone(),
        );
        process.spawn(worker.name(), Without::Ends, run);
    }
    let parts = Parts { stream: Some(stream), store: Some(store), log: None };
    let admin = process.admin(parts, config.listen.admin).await?;
    let names: Vec<_> = workers.iter().map(|worker| worker.name()).collect();
    info!(workers = names.join(", "), %admin, "the workers run");
    process.run().await
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
    let ended = process.run().await;
    log.close().await?;
    ended
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
