//! `vestibule migrate`: brings the store's schema and the stream up to date.

use std::{collections::BTreeMap, time::Duration};

use anyhow::Context;
use serde_json::json;
use vestibule_events::{JetStream, Provisioned, Role};
use vestibule_workers::consumer_spec;

use crate::{
    cli::Output,
    config::{Config, NatsConfig, WorkerConfig},
    wiring,
};

pub(crate) async fn migrate(config: &Config, output: Output) -> anyhow::Result<()> {
    let store = wiring::store(config).await?;
    let migrations = store.migrate().await.context("could not update the store's schema")?;
    let provisioned = match &config.nats {
        Some(nats) => {
            let stream = wiring::stream(config, nats, Role::Provisioner).await?;
            Some(provision(config, nats, &stream).await?)
        }
        None => None,
    };
    match output {
        Output::Json => {
            let migrations: Vec<_> = migrations
                .iter()
                .map(|it| json!({ "version": it.version, "description": it.description }))
                .collect();
            let stream = provisioned.map(|Provisioned { stream, consumers }| {
                let consumers = consumers.into_iter().map(|(name, it)| (name, it.to_string()));
                json!({ "stream": stream.to_string(), "consumers": BTreeMap::from_iter(consumers) })
            });
            println!("{}", json!({ "migrations": migrations, "nats": stream }));
        }
        Output::Table => {
            if migrations.is_empty() {
                println!("store   the schema is up to date");
            }
            for migration in migrations {
                println!("store   applied {} {}", migration.version, migration.description);
            }
            if let Some(Provisioned { stream, consumers }) = provisioned {
                println!("stream  {stream}");
                for (name, provisioning) in consumers {
                    println!("stream  consumer {name} {provisioning}");
                }
            }
        }
    }
    Ok(())
}

/// How long a server that has just been started may take to let us in.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);

/// Creates or checks the stream and the durable consumers of the configured workers, over a
/// connection of the provisioner.
pub(crate) async fn provision(
    config: &Config,
    nats: &NatsConfig,
    stream: &JetStream,
) -> anyhow::Result<Provisioned> {
    let_in(nats, stream).await?;
    let spec = |worker: &WorkerConfig| consumer_spec(worker.name(), &worker.settings);
    let consumers: Vec<_> = config.all_workers().map(spec).collect();
    stream.provision(&consumers).await.context("could not prepare the stream")
}

/// Waits for the connection, but not for ever.
pub(crate) async fn let_in(nats: &NatsConfig, stream: &JetStream) -> anyhow::Result<()> {
    tokio::time::timeout(CONNECT_LIMIT, stream.connected()).await.with_context(|| {
        format!(
            "NATS at {} does not let us in; is it running, and is the password right?",
            nats.url
        )
    })
}
