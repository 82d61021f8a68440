//! `vestibule check`: reads the configuration as a start would, and says what it would do.
//!
//! What is wrong was found by the reader and is a failure. Here is what is not wrong and yet not
//! what somebody wants: `rules` looks at what rules can do, `reference` at what they refer to.

mod places;
mod reference;
mod rules;
mod statements;

use std::path::Path;

use clap::Args;
use comfy_table::{Table, presets::NOTHING};
use serde_json::json;
use time::OffsetDateTime;
use vestibule_api::{Tls, TlsSettings};

use self::{places::Places, reference::Findings};
use crate::{
    cli::Output,
    config::{Complaints, Config, SecretSource, StoreTarget, TlsConfig, WorkerConfig},
    print::say,
    wiring,
};

/// How thoroughly to check.
#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct CheckArgs {
    /// Also load lists from their databases, see whether the servers of lookups are there, and
    /// whether databases take the statements that are for them
    #[arg(long)]
    online: bool,
    #[arg(long, value_enum, default_value_t = Output::Table)]
    output: Output,
}

/// A configuration with mistakes is a failure; with `Output::Json` it is also said in JSON.
pub(crate) async fn check(
    args: CheckArgs,
    config: anyhow::Result<Config>,
    file: &Path,
) -> anyhow::Result<()> {
    let CheckArgs { online, output } = args;
    let config = match config {
        Ok(config) => config,
        Err(error) => {
            if let (Output::Json, Some(mistakes)) = (output, error.downcast_ref::<Complaints>()) {
                say!("{}", json!({ "ok": false, "mistakes": mistakes.complaints }))?;
            }
            return Err(error);
        }
    };
    let refused = || config.subscribers.refused.iter().map(|it| &it.complaints);
    if refused().next().is_some() {
        let mistakes: Vec<_> = refused().flat_map(|it| &it.complaints).collect();
        if output == Output::Json {
            say!("{}", json!({ "ok": false, "mistakes": mistakes }))?;
        }
        let refused: Vec<_> = refused().map(ToString::to_string).collect();
        anyhow::bail!(refused.join("\n"));
    }
    let places = Places::read(file);
    let mut warnings = warnings(&config);
    warnings.extend(rules::warnings(&config, &places));
    let Findings { mistakes, warnings: more } = reference::look(&config, &places, online).await;
    warnings.extend(more);
    if online {
        warnings.extend(statements::warnings(&config).await);
    }
    if !mistakes.is_empty() {
        if output == Output::Json {
            say!("{}", json!({ "ok": false, "mistakes": mistakes, "warnings": warnings }))?;
        }
        return Err(places.mistakes(mistakes).into());
    }
    say(&config, &warnings, file, output)
}

fn say(config: &Config, warnings: &[String], file: &Path, output: Output) -> anyhow::Result<()> {
    match output {
        Output::Json => say!("{}", json!({ "ok": true, "warnings": warnings }))?,
        Output::Table => {
            let mut table = Table::new();
            table.load_style(NOTHING);
            table.add_rows(summary(config));
            say!("{table}")?;
            for warning in warnings {
                say!("warning: {warning}")?;
            }
            say!("{} is fine", file.display())?;
        }
    }
    Ok(())
}

/// What a start would make of it, a line each.
fn summary(config: &Config) -> Vec<[String; 2]> {
    let connector = |it: &crate::config::ConnectorConfig| {
        let what = format!(
            "{}://{}/connectors/{} · {} credentials · {} rules · answers within {}",
            if config.listen.tls.is_some() { "https" } else { "http" },
            config.listen.connector,
            it.name,
            it.credentials.len(),
            it.rules.names().len(),
            humantime::format_duration(it.deadline),
        );
        [format!("connector {}", it.name), what]
    };
    let log = match &config.nats {
        Some(nats) => {
            format!("{} → stream {} at {}", config.log_file().display(), nats.stream, nats.url)
        }
        None => config.log_file().display().to_string(),
    };
    let store = match &config.store.target {
        StoreTarget::Sqlite => config.data.join("store.db").display().to_string(),
        StoreTarget::Postgres(url) => url.clone(),
        StoreTarget::Secret(source) => format!("the URL in {source}"),
    };
    let workers: Vec<_> = config.workers.iter().map(WorkerConfig::name).collect();
    let subscribers = config.subscribers.subscribers.iter().map(|it| it.name());
    let subscribers: Vec<_> = subscribers.collect();
    let mut rows: Vec<_> = config.connectors.iter().map(connector).collect();
    let reference = &config.reference;
    rows.extend(reference.lists.iter().map(|it| [format!("list {}", it.name), it.origin()]));
    rows.extend(reference.lookups.iter().map(|it| [format!("lookup {}", it.name), it.origin()]));
    rows.push(["log".into(), log]);
    rows.push(["store".into(), store]);
    rows.push(["workers".into(), workers.join(", ")]);
    rows.extend(config.confirm().map(|it| {
        let given_up = humantime::format_duration(it.schedule().abandon_after);
        let what = format!(
            "by {} · given up after {given_up} · whoever does not say `on` waits for it",
            it.sources()
        );
        ["accounts confirmed".into(), what]
    }));
    if !subscribers.is_empty() {
        rows.push(["subscribers".into(), subscribers.join(", ")]);
    }
    rows.push(["admin".into(), format!("http://{}", config.listen.admin)]);
    rows
}

/// What is not wrong and yet worth knowing. Secrets may well be absent where `check` runs.
pub(crate) fn warnings(config: &Config) -> Vec<String> {
    let mut warnings = Vec::new();
    for connector in &config.connectors {
        for credential in &connector.credentials {
            if matches!(credential.secret(), Some((_, SecretSource::Example(_)))) {
                warnings.push(format!(
                    "connector {} takes an example password; fine for trying out, not for a platform",
                    connector.name
                ));
            }
        }
    }
    for (key, source) in secrets(config) {
        if let Err(error) = source.fetch() {
            warnings.push(format!("{key}: {error:#}"));
        }
    }
    for worker in config.all_workers() {
        if let Err(error) = wiring::check_secrets(worker) {
            warnings.push(format!("{}: {error:#}", worker.place()));
        }
    }
    if let Some(TlsConfig { certificate, key }) = &config.listen.tls {
        let (certificate, key) = (certificate.clone(), key.clone());
        let settings = TlsSettings { certificate, key, ask_for_client_certificate: false };
        let valid = Tls::load(settings).and_then(|it| it.valid_at(OffsetDateTime::now_utc()));
        if let Err(error) = valid {
            warnings.push(format!("listen.tls: {:#}", anyhow::Error::from(error)));
        }
    }
    if config.all_workers().next().is_none() {
        warnings.push("there is no worker, so nothing acts on the events".into());
    }
    if config.nats.is_some() && matches!(config.store.target, StoreTarget::Sqlite) {
        warnings.push(
            "with NATS, workers on other machines need the same store: set `store.url` to PostgreSQL"
                .into(),
        );
    }
    warnings
}

/// Every secret outside the workers that some process would fetch, by its key in the file.
fn secrets(config: &Config) -> Vec<(String, &SecretSource)> {
    let mut secrets = Vec::new();
    secrets.extend(config.key.iter().map(|key| ("key".to_owned(), key)));
    if let Some(nats) = &config.nats {
        let roles = [
            ("relay", &nats.relay),
            ("worker", &nats.worker),
            ("auditor", &nats.auditor),
            ("provisioner", &nats.provisioner),
        ];
        secrets.extend(roles.into_iter().filter_map(|(role, login)| {
            Some((format!("nats.{role}.password"), &login.as_ref()?.password))
        }));
    }
    if let StoreTarget::Secret(url) = &config.store.target {
        secrets.push(("store.url".into(), url));
    }
    for connector in &config.connectors {
        for (index, credential) in connector.credentials.iter().enumerate() {
            if let Some((key, secret)) = credential.secret() {
                let key = format!("connectors.{}.credentials[{index}].{key}", connector.name);
                secrets.push((key, secret));
            }
        }
    }
    secrets
}
