//! The configuration file, read once into typed sections; below `main` there are only values.
//!
//! Every mistake is reported at once with file, line, key and remedy. Secrets are not in the file:
//! it only says where they are ([`SecretSource`]), and they are fetched by the process that needs
//! them.

mod approvals;
mod connectors;
mod credentials;
mod devices;
mod reader;
mod reference;
mod secret;
mod subscribers;
mod values;
mod workers;

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::Context;
use vestibule_api::FileStamp;

pub(crate) use self::{
    approvals::ApprovalsConfig,
    connectors::ConnectorConfig,
    credentials::CredentialConfig,
    devices::DevicesConfig,
    reader::{Complaint, Complaints, Document, Section, did_you_mean},
    reference::{ListConfig, LookupConfig, ReferenceConfig},
    secret::SecretSource,
    subscribers::{
        SubscriberConfig, SubscribersConfig, Way, WaySettings, check_name, is_ours, stamps,
    },
    workers::{
        BUILT_IN, ChannelConfig, ConfirmConfig, EffectConfig, PermissionsConfig, WorkerConfig,
    },
};
use self::{connectors::Surroundings, subscribers::Around};

const MINUTE: Duration = Duration::from_secs(60);
const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// Everything that `vestibule.toml` says, defaults filled in.
#[derive(Debug)]
pub(crate) struct Config {
    /// Where it was read from.
    pub(crate) file: PathBuf,
    /// All files that it was read from, and those with secrets of lookups, as they were just before.
    pub(crate) files: Vec<(PathBuf, Option<FileStamp>)>,
    /// Everything that only a start can change, as it stands in the file, in a form to compare.
    pub(crate) beyond_rules: String,
    /// The folder of the local log, the embedded store and the generated key.
    pub(crate) data: PathBuf,
    /// The key of pseudonyms and fingerprints; `None` means one generated in `data`.
    pub(crate) key: Option<SecretSource>,
    pub(crate) listen: ListenConfig,
    pub(crate) log: LogConfig,
    /// `None` means embedded: workers consume the local log.
    pub(crate) nats: Option<NatsConfig>,
    pub(crate) store: StoreConfig,
    /// Lists, lookups and messages: what rules refer to.
    pub(crate) reference: ReferenceConfig,
    pub(crate) approvals: ApprovalsConfig,
    /// `None` where nobody may register devices.
    pub(crate) devices: Option<DevicesConfig>,
    pub(crate) connectors: Vec<ConnectorConfig>,
    pub(crate) workers: Vec<WorkerConfig>,
    pub(crate) subscribers: SubscribersConfig,
}

#[derive(Debug)]
pub(crate) struct ListenConfig {
    pub(crate) connector: SocketAddr,
    /// `None` means plain HTTP, behind a proxy that ends TLS.
    pub(crate) tls: Option<TlsConfig>,
    pub(crate) admin: SocketAddr,
    /// When the process stops, calls are answered for so long still, so that load balancers can
    /// turn to another one.
    pub(crate) drain: Duration,
}

impl ListenConfig {
    /// A stop has a limit of its own.
    pub(crate) const DRAIN_MAX: Duration = Duration::from_secs(15);
}

/// Where the listener's certificate chain and key are, in PEM.
#[derive(Clone, Debug)]
pub(crate) struct TlsConfig {
    pub(crate) certificate: PathBuf,
    pub(crate) key: PathBuf,
}

#[derive(Debug)]
pub(crate) struct LogConfig {
    pub(crate) answer_after: AnswerAfter,
    pub(crate) duplicate_window: Duration,
    /// The duplicate window of a refusal: short, so that a mended rule takes hold soon.
    pub(crate) refusal_window: Duration,
    pub(crate) retention: Duration,
    /// A local log above so many bytes is worth a warning.
    pub(crate) warn_size: u64,
}

/// When a decision is durable enough to be answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum AnswerAfter {
    /// The local log is synced.
    Disk,
    /// JetStream has acknowledged: for hosts without a durable disk.
    Stream,
}

#[derive(Debug)]
pub(crate) struct NatsConfig {
    pub(crate) url: String,
    pub(crate) stream: String,
    pub(crate) max_bytes: u64,
    pub(crate) replicas: usize,
    pub(crate) relay: Option<Login>,
    pub(crate) worker: Option<Login>,
    pub(crate) auditor: Option<Login>,
    pub(crate) provisioner: Option<Login>,
}

/// A user and where its password is.
#[derive(Clone, Debug)]
pub(crate) struct Login {
    pub(crate) user: String,
    pub(crate) password: SecretSource,
}

#[derive(Debug)]
pub(crate) struct StoreConfig {
    pub(crate) target: StoreTarget,
    pub(crate) connections: u32,
}

#[derive(Debug)]
pub(crate) enum StoreTarget {
    /// `store.db` in the data folder.
    Sqlite,
    /// A URL without a password.
    Postgres(String),
    /// The URL is itself a secret, because it holds the password.
    Secret(SecretSource),
}

impl Config {
    pub(crate) fn load(file: &Path) -> anyhow::Result<Self> {
        // Before reading, so that a change meanwhile is noticed and not missed.
        let stamp = FileStamp::read(file);
        let source = std::fs::read_to_string(file).with_context(|| {
            format!(
                "could not read the configuration {}; name another with --config, or begin with \
                 the vestibule.toml of the repository",
                file.display()
            )
        })?;
        let mut config = Self::parse(file, &source)?;
        config.files = config.reference.message_files.clone();
        config.files.push((file.to_owned(), stamp));
        let secrets = config.reference.lookups.iter().flat_map(LookupConfig::secrets);
        let secrets = secrets.filter_map(SecretSource::file);
        config.files.extend(secrets.map(|it| (it.to_owned(), FileStamp::read(it))));
        config.beyond_rules = config.describe_beyond_rules();
        let names: Vec<_> = config.connectors.iter().map(|it| it.name.as_str()).collect();
        let (has_nats, has_confirm) = (config.nats.is_some(), config.has_confirm());
        let around = Around { connectors: &names, has_nats, has_confirm };
        config.subscribers.read_folder(around);
        Ok(config)
    }

    fn parse(file: &Path, source: &str) -> Result<Self, Complaints> {
        Document::read(file, source, |root| {
            let data = root.string("data").unwrap_or_else(|| "./data".into()).into();
            let key = secret(root, "key");
            let nats = root.section("nats", read_nats);
            if nats.is_some() && key.is_none() {
                root.complain(
                    "nats",
                    "with NATS, every process needs the same key for pseudonyms: set `key` to \
                     \"env:NAME\" or \"file:PATH\" at the top of the file",
                );
            }
            // Relative paths start where the file is, wherever we were started.
            let folder = file.parent().unwrap_or(Path::new(""));
            let listen = root.section("listen", |section| read_listen(section, folder));
            let log = root.section("log", |section| read_log(section, nats.is_some()));
            let store = root.section("store", read_store);
            let reference = reference::read(root, folder);
            let approvals =
                root.section("approvals", |section| approvals::read(section, &reference.messages));
            let devices = root.section("devices", devices::read);
            let around = Surroundings { listen: listen.connector, folder, reference: &reference };
            let connectors = connectors::read(root, around);
            let names: Vec<_> = connectors.iter().map(|it| it.name.as_str()).collect();
            let workers = workers::read(root, &names, &approvals);
            let has_confirm = confirm(&workers).is_some();
            let around = Around { connectors: &names, has_nats: nats.is_some(), has_confirm };
            let subscribers = SubscribersConfig::read(root, file, around);
            Self {
                file: file.to_owned(),
                files: Vec::new(),
                beyond_rules: String::new(),
                data,
                key,
                listen,
                log,
                nats,
                store,
                reference,
                approvals,
                devices,
                connectors,
                workers,
                subscribers,
            }
        })
    }

    fn describe_beyond_rules(&self) -> String {
        let connectors: Vec<_> =
            self.connectors.iter().map(ConnectorConfig::beyond_rules).collect();
        let Self { data, key, listen, log, nats, store, workers, devices, .. } = self;
        let approvals = (self.approvals.expires_after, &self.approvals.link_base);
        let rest = (approvals, devices, connectors);
        format!("{:?}", (data, key, listen, log, nats, store, workers, rest))
    }

    /// Whether anybody may have to wait for an approver, so that requests have to be kept.
    pub(crate) fn has_approvals(&self) -> bool {
        self.approvals.is_configured
            || self.connectors.iter().any(|it| it.rules.ask_for_approval())
            || self.workers.iter().any(|it| matches!(it.effect, EffectConfig::Approvals(_)))
    }

    /// A file of a subscriber as it would be read.
    pub(crate) fn parse_subscriber(
        &self,
        name: &str,
        file: &Path,
        source: &str,
    ) -> Result<Option<WorkerConfig>, Complaints> {
        let names: Vec<_> = self.connectors.iter().map(|it| it.name.as_str()).collect();
        let (has_nats, has_confirm) = (self.nats.is_some(), self.has_confirm());
        let around = Around { connectors: &names, has_nats, has_confirm };
        subscribers::parse(name, file, source, around)
    }

    /// All workers, subscribers among them.
    pub(crate) fn all_workers(&self) -> impl Iterator<Item = &WorkerConfig> {
        self.workers.iter().chain(&self.subscribers.subscribers)
    }

    /// How it is found out of which sign-ups an account comes to be, if anybody does.
    pub(crate) fn confirm(&self) -> Option<&ConfirmConfig> {
        confirm(&self.workers)
    }

    pub(crate) fn has_confirm(&self) -> bool {
        self.confirm().is_some()
    }

    /// Whether events are made in the store, so that a connector has to bring them to its log.
    pub(crate) fn has_outbox(&self) -> bool {
        self.has_approvals() || self.has_confirm()
    }

    /// The file of the local log.
    pub(crate) fn log_file(&self) -> PathBuf {
        self.data.join("events.db")
    }
}

fn confirm(workers: &[WorkerConfig]) -> Option<&ConfirmConfig> {
    workers.iter().find_map(|it| match &it.effect {
        EffectConfig::Confirm(confirm) => Some(confirm),
        _ => None,
    })
}

fn secret(section: &mut Section<'_>, key: &'static str) -> Option<SecretSource> {
    section.private(key, SecretSource::EXPECTED, SecretSource::parse)
}

/// A table of names, such as those of headers, each with a secret.
fn secrets(section: &mut Section<'_>, key: &'static str) -> Vec<(String, SecretSource)> {
    let entries = section.strings(key).into_iter().filter_map(|(name, value)| {
        let source = SecretSource::parse(&value);
        if source.is_none() {
            section.complain(key, format!("`{name}`: expected {}", SecretSource::EXPECTED));
        }
        Some((name, source?))
    });
    entries.collect()
}

fn read_listen(section: &mut Section<'_>, folder: &Path) -> ListenConfig {
    let tls = section.section("tls", |tls| {
        tls.is_present().then(|| TlsConfig {
            certificate: folder.join(tls.required("certificate")),
            key: folder.join(tls.required("key")),
        })
    });
    let drain = section.duration("drain", Duration::from_millis(500));
    if drain > ListenConfig::DRAIN_MAX {
        section.complain("drain", "must not be longer than \"15s\"");
    }
    let mut address = |key, default: &str| {
        let expected = "an address and port such as \"127.0.0.1:7171\"";
        section
            .parsed(key, expected, |text| text.parse().ok())
            .unwrap_or_else(|| default.parse().expect("the default is an address"))
    };
    ListenConfig {
        connector: address("connector", "127.0.0.1:7171"),
        admin: address("admin", "127.0.0.1:7172"),
        tls,
        drain,
    }
}

fn read_log(section: &mut Section<'_>, has_nats: bool) -> LogConfig {
    let choices = [("disk", AnswerAfter::Disk), ("stream", AnswerAfter::Stream)];
    let answer_after = section.choice("answer_after", &choices, AnswerAfter::Disk);
    if answer_after == AnswerAfter::Stream && !has_nats {
        section.complain("answer_after", "\"stream\" needs a [nats] section with a url");
    }
    let log = LogConfig {
        answer_after,
        duplicate_window: section.duration("duplicate_window", 10 * MINUTE),
        refusal_window: section.duration("refusal_window", MINUTE / 2),
        retention: section.duration("retention", 400 * DAY),
        warn_size: section.bytes("warn_size", 10 << 30),
    };
    if log.refusal_window.is_zero() {
        section.complain("refusal_window", "must be above 0: platforms repeat their calls");
    }
    if log.refusal_window > log.duplicate_window {
        section.complain("refusal_window", "must not be longer than `duplicate_window`");
    }
    if log.retention < log.duplicate_window {
        section.complain("retention", "must not be shorter than `duplicate_window`");
    }
    log
}

fn read_nats(section: &mut Section<'_>) -> Option<NatsConfig> {
    if !section.is_present() {
        return None;
    }
    let url = section.required("url");
    let scheme_is_wrong = |server: &str| {
        let scheme = server.split_once("://").map(|(scheme, _)| scheme.trim());
        scheme.is_some_and(|scheme| !["nats", "tls"].contains(&scheme))
    };
    if url.split(',').any(scheme_is_wrong) {
        section.complain("url", "expected \"nats://host:port\" or \"tls://host:port\"");
    } else if url.contains('@') {
        section.complain("url", "holds a password; give each role its `user` and `password`");
    }
    let stream = section.string("stream").unwrap_or_else(|| "SIGNUPS".into());
    if !stream.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-') {
        section.complain("stream", "a stream's name has only letters, digits, `_` and `-`");
    }
    let replicas = section.integer("replicas", 1..6, 1);
    if replicas.is_multiple_of(2) {
        section.complain("replicas", "must be 1, 3 or 5: an even number survives no more failures");
    }
    Some(NatsConfig {
        url,
        stream,
        max_bytes: section.bytes("max_bytes", 10 << 30),
        replicas: usize::try_from(replicas).unwrap_or(1),
        relay: section.section("relay", read_login),
        worker: section.section("worker", read_login),
        auditor: section.section("auditor", read_login),
        provisioner: section.section("provisioner", read_login),
    })
}

fn read_login(section: &mut Section<'_>) -> Option<Login> {
    if !section.is_present() {
        return None;
    }
    let user = section.required("user");
    let password = secret(section, "password");
    if !section.has("password") {
        section.complain("", "needs the key `password`");
    }
    Some(Login { user, password: password? })
}

fn read_store(section: &mut Section<'_>) -> StoreConfig {
    let expected = "\"sqlite\", a postgres:// URL without a password, or \"env:NAME\" or \
                    \"file:PATH\" where the whole URL is";
    let target = section.private("url", expected, |text| match text {
        "sqlite" => Some(StoreTarget::Sqlite),
        url if url.starts_with("postgres://") || url.starts_with("postgresql://") => {
            let authority = url.split("://").nth(1)?.split('/').next()?;
            let user = authority.rsplit_once('@').map_or("", |(user, _)| user);
            (!user.contains(':')).then(|| StoreTarget::Postgres(url.to_owned()))
        }
        text => match SecretSource::parse(text)? {
            SecretSource::Example(_) => None,
            source => Some(StoreTarget::Secret(source)),
        },
    });
    StoreConfig {
        target: target.unwrap_or(StoreTarget::Sqlite),
        connections: u32::try_from(section.integer("connections", 1..1000, 16)).unwrap_or(16),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXAMPLE: &str = include_str!("../../../vestibule.toml");

    fn parse(source: &str) -> Result<Config, Complaints> {
        Config::parse(Path::new("vestibule.toml"), source)
    }

    /// The example with one change, so that each test shows only its mistake.
    fn complaints(from: &str, to: &str) -> String {
        assert!(EXAMPLE.contains(from), "the example no longer has {from:?}");
        parse(&EXAMPLE.replacen(from, to, 1)).expect_err("is wrong").to_string()
    }

    fn line_of(text: &str) -> usize {
        EXAMPLE[..EXAMPLE.find(text).unwrap()].matches('\n').count() + 1
    }

    #[test]
    fn the_example_has_the_documented_defaults() {
        let config = parse(EXAMPLE).unwrap();
        assert_eq!(config.data, Path::new("./data"));
        assert_eq!(config.listen.connector.to_string(), "127.0.0.1:7171");
        assert_eq!(config.listen.admin.to_string(), "127.0.0.1:7172");
        assert_eq!(config.listen.drain, Duration::from_millis(500));
        assert_eq!(config.log.answer_after, AnswerAfter::Disk);
        assert_eq!(config.log.duplicate_window, Duration::from_secs(600));
        assert_eq!(config.log.refusal_window, Duration::from_secs(30));
        assert_eq!(config.log.retention, 400 * DAY);
        assert!(config.nats.is_none());
        let connector = &config.connectors[0];
        assert_eq!(connector.name.as_str(), "partners");
        assert_eq!(connector.deadline, Duration::from_millis(800));
        assert_eq!(connector.body_bytes_max, 65_536);
        assert_eq!(connector.credentials[0].name, "entra");
        let workers: Vec<_> = config.workers.iter().map(WorkerConfig::name).collect();
        assert_eq!(workers, ["notify", "database", "permissions"]);
    }

    #[test]
    fn a_misspelt_key_gets_its_place_and_the_nearest_name() {
        let complaints = complaints("deadline =", "deadlin =");
        let line = line_of("deadline =");
        assert_eq!(
            complaints,
            format!(
                "the configuration has 1 mistake\n  vestibule.toml:{line}:1: \
                 connectors.partners.deadlin: there is no such key; did you mean `deadline`?"
            )
        );
    }

    #[test]
    fn a_misspelt_section_gets_the_nearest_name() {
        let complaints = complaints("[workers.database]", "[workers.databse]");
        assert!(complaints.contains("workers.databse"), "{complaints}");
        assert!(complaints.contains("did you mean `database`?"), "{complaints}");
    }

    #[test]
    fn a_wrong_value_says_what_was_expected() {
        let complaints = complaints("\"800ms\"", "800");
        assert!(
            complaints.contains(
                "connectors.partners.deadline: expected a duration such as \"250ms\", \"10m\" or \
                 \"30d\", found a whole number"
            ),
            "{complaints}"
        );
    }

    #[test]
    fn a_word_that_is_none_of_the_choices_gets_the_nearest() {
        let complaints = complaints("\"api-connector\"", "\"api-conector\"");
        assert!(complaints.contains("did you mean `api-connector`?"), "{complaints}");
    }

    #[test]
    fn all_mistakes_come_at_once_in_the_order_of_the_file() {
        let source = EXAMPLE
            .replacen("\"./data\"", "7", 1)
            .replacen("127.0.0.1:7172", "here", 1)
            .replacen("steps = [\"before-create\"]", "steps = [\"before\"]", 1);
        let error = parse(&source).unwrap_err();
        let keys: Vec<_> = error.complaints.iter().map(|it| it.key.as_str()).collect();
        assert_eq!(keys, ["data", "listen.admin", "connectors.partners.rules[1].steps"]);
    }

    #[test]
    fn a_drain_beyond_the_limit_of_a_stop_is_complained_of() {
        let complaints = complaints("[listen]", "[listen]\ndrain = \"16s\"");
        assert!(
            complaints.contains("listen.drain: must not be longer than \"15s\""),
            "{complaints}"
        );
    }

    #[test]
    fn a_syntax_error_has_its_line() {
        let complaints = complaints("[listen]", "[listen");
        assert!(
            complaints.contains(&format!("vestibule.toml:{}:", line_of("[listen]"))),
            "{complaints}"
        );
    }

    #[test]
    fn the_example_password_is_refused_off_loopback() {
        let complaints = complaints("127.0.0.1:7171", "0.0.0.0:7171");
        assert!(complaints.contains("connectors.partners.credentials[0].password"), "{complaints}");
        assert!(
            complaints.contains("set a real one: \"env:NAME\" or \"file:PATH\""),
            "{complaints}"
        );
    }

    #[test]
    fn a_secret_in_the_file_is_refused_without_repeating_it() {
        let complaints = complaints("example:try-me", "hunter2");
        assert!(complaints.contains("never the secret itself"), "{complaints}");
        assert!(!complaints.contains("hunter2"), "{complaints}");
    }

    #[test]
    fn a_rule_that_does_not_compile_has_its_line() {
        let when = "when = \"signup.email_domain in ['mailinator.com', 'guerrillamail.com', 'yopmail.com']\"";
        let complaints = complaints(when, "when = \"signup.email_domain in [\"");
        assert!(complaints.contains(&format!("vestibule.toml:{}:", line_of(when))), "{complaints}");
        assert!(complaints.contains("connectors.partners.rules[0].when"), "{complaints}");
    }

    #[test]
    fn nats_needs_a_shared_key_and_keeps_passwords_out() {
        let nats = format!("{EXAMPLE}\n[nats]\nurl = \"nats://a:b@localhost\"\n");
        let error = parse(&nats).unwrap_err().to_string();
        assert!(error.contains("set `key`"), "{error}");
        assert!(error.contains("nats.url: holds a password"), "{error}");
    }

    #[test]
    fn a_database_url_with_a_password_is_refused_without_repeating_it() {
        let store = format!("{EXAMPLE}\n[store]\nurl = \"postgres://a:hunter2@localhost/x\"\n");
        let error = parse(&store).unwrap_err().to_string();
        assert!(error.contains("store.url: expected"), "{error}");
        assert!(!error.contains("hunter2"), "{error}");
    }

    #[test]
    fn a_worker_of_a_connector_that_is_not_there_is_complained_of() {
        let complaints =
            complaints("[workers.database]", "[workers.database]\nconnectors = [\"partner\"]");
        assert!(
            complaints.contains(
                "workers.database.connectors: expected a list of connectors of this file \
                 (\"partners\"), found `partner`"
            ),
            "{complaints}"
        );
    }

    /// In a runtime, as ever: a mail server's connections want one.
    #[tokio::test]
    async fn one_mistake_is_one_complaint() {
        let rule = "[[connectors.partners.rules]]\n";
        for (from, to) in [
            (
                rule,
                "[[connectors.partners.rules]]\nwhen = \"true\"\n[[connectors.partners.rules]]\n",
            ),
            (
                "name = \"kept\"\nkind = \"record\"",
                "name = \"kept\"\nkind = \"mail\"\nserver = \"x\"\nfrom = \"a@b.example\"\nto = [\"person\"]",
            ),
            (
                "name = \"kept\"\nkind = \"record\"",
                "name = \"kept\"\nkind = \"mail\"\nserver = \"smtp://x\"\nfrom = \"a@b.example\"\nto = []",
            ),
        ] {
            let complaints = complaints(from, to);
            assert!(complaints.starts_with("the configuration has 1 mistake\n"), "{complaints}");
        }
    }

    #[test]
    fn the_words_of_a_choice_are_listed_once() {
        let complaints = complaints("\"api-connector\"", "\"soap\"");
        assert!(
            complaints.ends_with(
                "expected one of \"api-connector\", \"custom-policy\", \"custom-extension\", found `soap`"
            ),
            "{complaints}"
        );
    }

    #[test]
    fn a_user_that_no_call_can_name_is_complained_of() {
        let complaints = complaints("user = \"entra\"", "user = \"entra:b2b\"");
        assert!(complaints.contains("credentials[0].user: a colon ends the user"), "{complaints}");
    }

    #[test]
    fn a_url_of_nats_has_a_scheme_of_nats() {
        for url in ["http://localhost:4222", "nats://a:4222,postgres://b:4222"] {
            let nats = format!("{EXAMPLE}\n[nats]\nurl = \"{url}\"\n");
            let error = parse(&nats).unwrap_err().to_string();
            assert!(error.contains("nats.url: expected \"nats://host:port\""), "{error}");
        }
    }
}
