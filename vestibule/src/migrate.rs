//! `vestibule migrate`: brings the store's schema and the stream up to date.

use std::{collections::BTreeMap, time::Duration};

use anyhow::{Context, ensure};
use serde_json::json;
use vestibule_events::{ConsumerSpec, JetStream, LogError, Provisioning, Role};
use vestibule_workers::consumer_spec;

use crate::{
    cli::Output,
    config::{Config, NatsConfig},
    print::say,
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
            let stream = provisioned.as_ref().map(|(stream, consumers)| {
                let consumers = consumers.iter().map(|(name, it)| (name, outcome(it)));
                json!({ "stream": stream.to_string(), "consumers": BTreeMap::from_iter(consumers) })
            });
            say!("{}", json!({ "migrations": migrations, "nats": stream }))?;
        }
        Output::Table => {
            if migrations.is_empty() {
                say!("store   the schema is up to date")?;
            }
            for migration in migrations {
                say!("store   applied {} {}", migration.version, migration.description)?;
            }
            if let Some((stream, consumers)) = &provisioned {
                say!("stream  {stream}")?;
                for (name, provisioning) in consumers {
                    say!("stream  consumer {name} {}", outcome(provisioning))?;
                }
            }
        }
    }
    let consumers = provisioned.into_iter().flat_map(|(_, consumers)| consumers);
    let errors: Vec<_> = consumers.filter_map(|(_, it)| Some(format!("{:#}", it.err()?))).collect();
    ensure!(errors.is_empty(), "{}", errors.join("\n"));
    Ok(())
}

fn outcome(consumer: &anyhow::Result<Provisioning>) -> String {
    consumer.as_ref().map_or_else(|_| "failed".to_owned(), Provisioning::to_string)
}

/// How long a server that has just been started may take to let us in.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);

/// Creates or checks the stream, and then the durable consumer of each configured worker, over a
/// connection of the provisioner. What is wrong with one consumer keeps no other from being made.
async fn provision(
    config: &Config,
    nats: &NatsConfig,
    stream: &JetStream,
) -> anyhow::Result<(Provisioning, Vec<(String, anyhow::Result<Provisioning>)>)> {
    let provisioned = provision_stream(nats, stream).await?;
    let mut consumers = Vec::new();
    for worker in config.all_workers() {
        let spec = consumer_spec(worker.name(), &worker.settings);
        consumers.push((spec.name.clone(), provision_consumer(nats, stream, &spec).await));
    }
    Ok((provisioned, consumers))
}

/// The same for the stream alone.
pub(crate) async fn provision_stream(
    nats: &NatsConfig,
    stream: &JetStream,
) -> anyhow::Result<Provisioning> {
    let_in(nats, stream).await?;
    let provisioned = stream.provision(&[]).await.context("could not prepare the stream")?;
    Ok(provisioned.stream)
}

/// The same for one consumer of it.
pub(crate) async fn provision_consumer(
    nats: &NatsConfig,
    stream: &JetStream,
    spec: &ConsumerSpec,
) -> anyhow::Result<Provisioning> {
    let_in(nats, stream).await?;
    let name = &spec.name;
    let provisioned =
        stream.provision(std::slice::from_ref(spec)).await.map_err(|error| match error {
            LogError::Refused(cause) => cause.context(format!(
                "could not make the consumer {name}; if it is somebody else's, delete it at the \
                 server, or give the worker another name"
            )),
            error => {
                anyhow::Error::from(error).context(format!("could not make the consumer {name}"))
            }
        })?;
    let (_, provisioning) = provisioned.consumers.first().context("one was asked for")?;
    Ok(*provisioning)
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
