//! Turns the configuration into the parts that run: log, stream, store, connectors, workers.

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
    time::Duration,
};

use anyhow::{Context, bail};
use data_encoding::HEXLOWER;
use secrecy::{ExposeSecret, SecretString};
use vestibule_api::{AnswerAfter, BearerVerifier, ConnectorSettings, Decider, DeviceDesk};
use vestibule_events::{
    ApprovalLinks, JetStream, JetStreamConfig, LocalLog, LocalLogConfig, NatsCredentials,
    PseudonymKey, Retention, Role, relay,
};
use vestibule_store::{Store, StoreOptions, StoreUrl};
use vestibule_workers::{
    Accounts, ApprovalPages, ApprovalsSettings, Confirm, Database, ExecSubscriber, Filtered, Inbox,
    Notify, NotifySettings, PermissionTargets, Permissions, PermissionsSettings, Statements,
    WebhookSubscriber, Worker,
};

use crate::config::{
    ChannelConfig, Config, ConnectorConfig, DevicesConfig, EffectConfig, Login, NatsConfig,
    PermissionsConfig, SecretSource, StoreTarget, SubscriberConfig, WaySettings, WorkerConfig,
};

/// Makes the data folder, readable by nobody else: what people typed into a form lies in it.
pub(crate) fn data_folder(config: &Config) -> anyhow::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&config.data)
        .with_context(|| format!("could not create the data folder {}", config.data.display()))
}

pub(crate) fn local_log_config(config: &Config) -> LocalLogConfig {
    LocalLogConfig {
        path: config.log_file(),
        duplicate_window: config.log.duplicate_window,
        refusal_window: config.log.refusal_window,
        retention: if config.nats.is_some() {
            Retention::BehindConsumer(relay::CONSUMER.to_owned())
        } else {
            Retention::For(config.log.retention)
        },
    }
}

/// The local log, open for a connector.
pub(crate) async fn local_log(config: &Config) -> anyhow::Result<LocalLog> {
    data_folder(config)?;
    let log = LocalLog::open(local_log_config(config)).await?;
    log.warn_above(config.log.warn_size);
    Ok(log)
}

/// Connects to the stream as one of our roles; returns at once, also when NATS is down.
pub(crate) async fn stream(
    config: &Config,
    nats: &NatsConfig,
    role: Role,
) -> anyhow::Result<JetStream> {
    Ok(JetStream::connect(stream_config(config, nats, role)?).await?)
}

pub(crate) fn stream_config(
    config: &Config,
    nats: &NatsConfig,
    role: Role,
) -> anyhow::Result<JetStreamConfig> {
    let login = match role {
        Role::Relay => &nats.relay,
        Role::Worker => &nats.worker,
        Role::Auditor => &nats.auditor,
        Role::Provisioner => &nats.provisioner,
    };
    let credentials = match login {
        Some(Login { user, password }) => NatsCredentials::UserPassword {
            user: user.clone(),
            password: password
                .fetch()
                .with_context(|| format!("could not log in to NATS as the {}", role.as_str()))?,
        },
        None => NatsCredentials::None,
    };
    Ok(JetStreamConfig {
        url: nats.url.clone(),
        credentials,
        role,
        inbox_prefix: None,
        stream: nats.stream.clone(),
        duplicate_window: config.log.duplicate_window,
        refusal_window: config.log.refusal_window,
        retention: config.log.retention,
        max_bytes: nats.max_bytes,
        replicas: nats.replicas,
    })
}

/// Where the embedded store is.
pub(crate) fn store_file(config: &Config) -> PathBuf {
    config.data.join("store.db")
}

pub(crate) fn store_url(config: &Config) -> anyhow::Result<StoreUrl> {
    Ok(match &config.store.target {
        StoreTarget::Sqlite => StoreUrl::Sqlite(store_file(config)),
        StoreTarget::Postgres(url) => StoreUrl::Postgres(SecretString::from(url.clone())),
        StoreTarget::Secret(source) => {
            StoreUrl::Postgres(source.fetch().context("could not learn where the store is")?)
        }
    })
}

/// Opens the store; its schema is left alone.
pub(crate) async fn store(config: &Config) -> anyhow::Result<Store> {
    let options = StoreOptions { connections: config.store.connections, ..StoreOptions::default() };
    data_folder(config)?;
    Store::open(&store_url(config)?, options).await.context("could not open the store")
}

/// Whether there may be something in the store: an embedded one is made when something first runs.
pub(crate) fn store_is_made(config: &Config) -> bool {
    !matches!(config.store.target, StoreTarget::Sqlite) || store_file(config).exists()
}

/// Opens the store to look at what is in it: nothing is made, and its schema must be there.
pub(crate) async fn existing_store(config: &Config) -> anyhow::Result<Store> {
    // Opening it would make an empty one, and the folder of some other place may be meant.
    let data = config.data.display();
    if !store_is_made(config) {
        bail!(
            "there is no store in {data}; `vestibule up` makes it, and --data names another folder"
        );
    }
    let store = store(config).await?;
    if !store.schema_is_current().await.context("could not read the store")? {
        bail!("the store's schema is older than this version; `vestibule migrate` updates it");
    }
    Ok(store)
}

/// The key of pseudonyms: the configured one, or one generated in the data folder.
pub(crate) fn pseudonym_key(config: &Config) -> anyhow::Result<PseudonymKey> {
    let secret = match &config.key {
        Some(source) => source.fetch().context("could not read the key of pseudonyms")?,
        None => generated_key(&config.data.join("pseudonym.key"))?,
    };
    let key = secret.expose_secret().as_bytes();
    if key.len() < 16 {
        bail!("the key of pseudonyms is too short to be secret; `openssl rand -hex 32` makes one");
    }
    Ok(PseudonymKey::new(key.to_vec()))
}

fn generated_key(path: &Path) -> anyhow::Result<SecretString> {
    use std::os::unix::fs::OpenOptionsExt;
    let created = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
    match created {
        Ok(mut file) => {
            let key = HEXLOWER.encode(&rand::random::<[u8; 32]>());
            // Synced before the first pseudonym is made with it: another key after a power cut
            // would make every person somebody else.
            file.write_all(key.as_bytes()).and_then(|()| file.sync_all())
        }
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(error),
    }
    .with_context(|| format!("could not write the key of pseudonyms {}", path.display()))?;
    let key = fs::read_to_string(path)
        .with_context(|| format!("could not read the key of pseudonyms {}", path.display()))?;
    Ok(key.into())
}

/// A connector, and who fetches the keys of its bearer tokens.
pub(crate) fn connector(
    connector: &ConnectorConfig,
    decider: Decider,
    answer_after: AnswerAfter,
) -> anyhow::Result<(ConnectorSettings, Vec<Arc<BearerVerifier>>)> {
    let (mut credentials, mut verifiers) = (Vec::new(), Vec::new());
    for config in &connector.credentials {
        let (credential, verifier) = config.credential().with_context(|| {
            let name = &connector.name;
            format!("could not make the credential `{}` of connector {name} ready", config.name)
        })?;
        credentials.push(credential);
        verifiers.extend(verifier);
    }
    let settings = ConnectorSettings {
        name: connector.name.clone(),
        protocol: connector.protocol,
        credentials,
        decider,
        tenants: connector.tenants.clone(),
        extensions: connector.extensions.clone(),
        deadline: connector.deadline,
        body_bytes_max: connector.body_bytes_max,
        on_storage_failure: connector.on_storage_failure.clone(),
        version: connector.version.clone(),
        answer_after,
        contract: connector.contract.clone(),
    };
    Ok((settings, verifiers))
}

/// Where devices are registered.
pub(crate) fn device_desk(
    config: &Config,
    devices: &DevicesConfig,
    store: Arc<OnceLock<Store>>,
) -> anyhow::Result<DeviceDesk> {
    let token = devices.token.fetch().context("could not read the token of [devices]")?;
    let services = devices.push_services.clone();
    Ok(DeviceDesk::new(store, pseudonym_key(config)?, &token, services))
}

/// Whether a worker's secrets are where the configuration says.
pub(crate) fn check_secrets(config: &WorkerConfig) -> anyhow::Result<()> {
    match &config.effect {
        EffectConfig::Notify(channels) => {
            channels.iter().try_for_each(|it| it.settings(SecretSource::fetch).map(drop))
        }
        EffectConfig::Accounts(accounts) => accounts.settings(SecretSource::fetch).map(drop),
        EffectConfig::Confirm(confirm) => confirm.settings(SecretSource::fetch).map(drop),
        EffectConfig::Statements(statements) => {
            statements.settings(config.settings.timeout, SecretSource::fetch).map(drop)
        }
        EffectConfig::Subscriber(subscriber) => {
            subscriber.way.secrets().into_iter().try_for_each(|it| it.fetch().map(drop))
        }
        EffectConfig::Permissions(permissions) => {
            permissions.targets.iter().try_for_each(|it| it.settings(SecretSource::fetch).map(drop))
        }
        EffectConfig::Database | EffectConfig::Approvals(_) => Ok(()),
    }
}

/// Where approvers decide, for the links in messages; `None` where the configuration does not say.
fn approval_pages(config: &Config) -> anyhow::Result<Option<ApprovalPages>> {
    let Some(base) = &config.approvals.link_base else { return Ok(None) };
    let links = ApprovalLinks::new(&pseudonym_key(config)?);
    let requests = ApprovalsSettings { expires_after: config.approvals.expires_after };
    let pages = ApprovalPages::new(base, links, requests);
    Ok(Some(pages.map_err(|error| anyhow::anyhow!("approvals.link_base: {}", error.message))?))
}

pub(crate) fn worker(
    config: &Config,
    worker: &WorkerConfig,
    store: &Store,
) -> anyhow::Result<Arc<dyn Worker>> {
    Ok(match &worker.effect {
        EffectConfig::Database => Arc::new(Database::new(store.clone())),
        EffectConfig::Notify(channels) => {
            let with_secrets = |it: &ChannelConfig| it.settings(SecretSource::fetch);
            let channels = channels.iter().map(with_secrets).collect::<anyhow::Result<_>>()?;
            let settings = NotifySettings { channels, approvals: approval_pages(config)? };
            Arc::new(Notify::new(settings, store.clone()).map_err(listed)?)
        }
        EffectConfig::Permissions(permissions) => {
            let targets = permission_targets(permissions, worker.settings.timeout, store)?;
            let settings = PermissionsSettings { rules: permissions.rules.clone() };
            Arc::new(Permissions::new(settings, targets, store.clone()).map_err(listed)?)
        }
        EffectConfig::Approvals(settings) => {
            Arc::new(vestibule_workers::Approvals::new(*settings, store.clone()))
        }
        EffectConfig::Accounts(accounts) => {
            let settings = accounts.settings(SecretSource::fetch)?;
            Arc::new(Accounts::new(settings, store.clone()).map_err(listed)?)
        }
        EffectConfig::Confirm(confirm) => {
            let settings = confirm.settings(SecretSource::fetch)?;
            let key = Arc::new(pseudonym_key(config)?);
            Arc::new(Confirm::new(settings, key, store.clone()).map_err(listed)?)
        }
        EffectConfig::Statements(statements) => {
            let settings = statements.settings(worker.settings.timeout, SecretSource::fetch)?;
            Arc::new(Statements::new(&settings, store).map_err(listed)?)
        }
        EffectConfig::Subscriber(it) => subscriber(it, worker.settings.timeout, store)?,
    })
}

fn subscriber(
    config: &SubscriberConfig,
    timeout: Duration,
    store: &Store,
) -> anyhow::Result<Arc<dyn Worker>> {
    let worker: Arc<dyn Worker> = match config.way.settings(&config.name, timeout)? {
        Some(WaySettings::Webhook(settings)) => {
            Arc::new(WebhookSubscriber::new(settings).map_err(listed)?)
        }
        Some(WaySettings::Exec(settings)) => {
            Arc::new(ExecSubscriber::new(settings).map_err(listed)?)
        }
        None => bail!("it takes its events from the stream itself"),
    };
    let worker: Arc<dyn Worker> = Arc::new(Inbox::new(worker, store.clone()));
    Ok(match &config.when {
        Some(when) => Arc::new(Filtered::new(when, worker).map_err(listed)?),
        None => worker,
    })
}

/// Where granted roles are to be held. `timeout` is of an attempt.
pub(crate) fn permission_targets(
    permissions: &PermissionsConfig,
    timeout: Duration,
    store: &Store,
) -> anyhow::Result<PermissionTargets> {
    let targets = permissions.targets.iter().map(|it| it.settings(SecretSource::fetch));
    let targets = targets.collect::<anyhow::Result<_>>()?;
    PermissionTargets::new(targets, store.clone(), timeout).map_err(listed)
}

pub(crate) fn listed(complaints: Vec<impl std::fmt::Display>) -> anyhow::Error {
    let lines: Vec<_> = complaints.iter().map(ToString::to_string).collect();
    anyhow::anyhow!(lines.join("\n"))
}
