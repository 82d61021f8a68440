//! What happens behind the connector in `up`: store, stream and workers come to be in their own
//! time, however long their servers stay away. Sign-ups are answered all the while.

use std::{
    sync::{Arc, OnceLock},
    time::Duration,
};

use anyhow::Context;
use tokio::{task::JoinSet, time::sleep};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};
use vestibule_events::{ConsumerSpec, EventLog, JetStream, LocalLog, Role};
use vestibule_store::{Store, StoreError};
use vestibule_workers::{WorkerMetrics, consumer_spec};

use super::subscribers::{Crew, SubscriberMetrics, Tools};
use crate::{
    config::{Config, NatsConfig},
    migrate, wiring,
};

/// Between two looks at a server that is away.
const PAUSE: Duration = Duration::from_secs(1);

/// Opens the store, prepares the stream, and runs the workers and the subscribers.
pub(super) async fn run(
    config: Arc<Config>,
    (log, local): (Arc<dyn EventLog>, Option<LocalLog>),
    opened: Arc<OnceLock<Store>>,
    (metrics, subscribers): (WorkerMetrics, SubscriberMetrics),
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let prepare = async {
        open_store(Arc::clone(&config), Arc::clone(&opened)).await?;
        let provisioner = stream(&config).await?;
        anyhow::Ok((opened.get().expect("it was opened above").clone(), provisioner))
    };
    let (store, provisioner) = tokio::select! {
        () = stop.cancelled() => return Ok(()),
        prepared = prepare => prepared?,
    };
    let mut workers = JoinSet::new();
    for worker in &config.workers {
        let effect = wiring::worker(&config, worker, &store)
            .with_context(|| format!("could not set up the worker {}", worker.name()))?;
        let (settings, log) = (worker.settings.clone(), Arc::clone(&log));
        let (store, metrics, stop) = (store.clone(), metrics.clone(), stop.clone());
        let name = worker.name().to_owned();
        let (config, provisioner) = (Arc::clone(&config), provisioner.clone());
        workers.spawn(async move {
            if let (Some(nats), Some(stream)) = (&config.nats, &provisioner) {
                let spec = consumer_spec(&name, &settings);
                tokio::select! {
                    () = stop.cancelled() => return,
                    () = consumer(nats, stream, &spec) => {}
                }
            }
            let ended = vestibule_workers::run(effect, settings, log, store, metrics, stop).await;
            if let Err(error) = ended {
                error!(worker = name, error = format!("{error:#}"), "a worker has ended");
            }
        });
    }
    let tools = Tools { log, provisioner, local, store, metrics };
    let crew = Crew { config, names: Vec::new(), metrics: subscribers, tools };
    let ended = crew.run(stop).await;
    while workers.join_next().await.is_some() {}
    ended
}

/// Opens the store where nobody has, waiting for a server that is away.
pub(super) async fn open_store(
    config: Arc<Config>,
    opened: Arc<OnceLock<Store>>,
) -> anyhow::Result<()> {
    if opened.get().is_none() {
        let store = store(&config).await?;
        opened.get_or_init(|| store);
    }
    Ok(())
}

/// Opens the store and brings its schema up to date, waiting for a server that is away.
pub(super) async fn store(config: &Config) -> anyhow::Result<Store> {
    let mut was_away = false;
    loop {
        let opening = async {
            let store = wiring::store(config).await?;
            let migrations =
                store.migrate().await.context("could not update the store's schema")?;
            anyhow::Ok((store, migrations))
        };
        match opening.await {
            Ok((store, migrations)) => {
                for migration in migrations {
                    info!(version = migration.version, "the store's schema is updated");
                }
                return Ok(store);
            }
            Err(error) if is_unavailable(&error) => {
                if !was_away {
                    warn!(error = format!("{error:#}"), "the store does not answer; workers wait");
                }
                was_away = true;
                sleep(PAUSE).await;
            }
            Err(error) => return Err(error),
        }
    }
}

fn is_unavailable(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| matches!(cause.downcast_ref(), Some(StoreError::Unavailable(_))))
}

/// Prepares the stream as `vestibule migrate` does, as soon as it can be reached; gives who may make
/// the consumers.
async fn stream(config: &Config) -> anyhow::Result<Option<JetStream>> {
    let Some(nats) = &config.nats else { return Ok(None) };
    // One connection for all attempts: a client that is dropped while its server is away goes on
    // trying to reach it.
    let stream = wiring::stream(config, nats, Role::Provisioner).await?;
    let mut said = String::new();
    while let Err(error) = migrate::provision_stream(nats, &stream).await {
        let error = format!("{error:#}");
        if error != said {
            warn!(error, "could not prepare the stream; events wait in the local log");
            said = error;
        }
        sleep(PAUSE).await;
    }
    Ok(Some(stream))
}

/// Makes the consumer of a worker, however long that takes: no other worker waits for it.
async fn consumer(nats: &NatsConfig, stream: &JetStream, spec: &ConsumerSpec) {
    let mut said = String::new();
    while let Err(error) = migrate::provision_consumer(nats, stream, spec).await {
        let error = format!("{error:#}");
        if error != said {
            let worker = &spec.name;
            warn!(worker, error, "cannot run yet, and its events wait; it is tried again");
            said = error;
        }
        sleep(PAUSE).await;
    }
}
