//! The `[workers]` tables: the built-in workers and how each of them goes about its work.

use std::time::Duration;

use anyhow::Context;
use secrecy::SecretString;
use time::{OffsetDateTime, format_description::well_known::Rfc3339};
use vestibule_events::{ApprovalLinks, ConnectorName, Filter, Kind, PseudonymKey, Start};
use vestibule_workers::{
    Accounts, AccountsSettings, ApprovalPages, Approvals, ApprovalsSettings, BreakerPolicy,
    ChannelKind, ChannelSettings, Database, GrantRule, GraphSettings, MailLogin, MailTls, Notify,
    NotifySettings, Permissions, PermissionsSettings, Recipient, RetryPolicy, WebhookFormat,
    WorkerSettings,
};

use super::{
    ApprovalsConfig, Login, MINUTE, SecretSource,
    reader::{Section, quoted},
    secret,
};

/// One worker that is to run.
#[derive(Debug)]
pub(crate) struct WorkerConfig {
    pub(crate) effect: EffectConfig,
    pub(crate) settings: WorkerSettings,
}

impl WorkerConfig {
    /// The name of the durable consumer, too.
    pub(crate) const fn name(&self) -> &'static str {
        match self.effect {
            EffectConfig::Notify(_) => "notify",
            EffectConfig::Database => "database",
            EffectConfig::Permissions(_) => "permissions",
            EffectConfig::Approvals(_) => "approvals",
            EffectConfig::Accounts(_) => "accounts",
        }
    }
}

/// What a worker does, with what only it needs.
#[derive(Debug)]
pub(crate) enum EffectConfig {
    Notify(Vec<ChannelConfig>),
    Database,
    Permissions(Vec<GrantRule>),
    Approvals(ApprovalsSettings),
    Accounts(AccountsConfig),
}

/// How accounts of approved people are made.
#[derive(Debug)]
pub(crate) struct AccountsConfig {
    tenant: String,
    client_id: String,
    client_secret: SecretSource,
    graph: Option<String>,
    token: Option<String>,
    domain: String,
    redirect: String,
    invitation_message: bool,
}

impl AccountsConfig {
    /// What the worker needs, with the secret that `fetch` brings.
    pub(crate) fn settings(
        &self,
        fetch: impl Fn(&SecretSource) -> anyhow::Result<SecretString>,
    ) -> anyhow::Result<AccountsSettings> {
        let secret = fetch(&self.client_secret)?;
        let mut graph = GraphSettings::new(&self.tenant, &self.client_id, secret);
        if let Some(url) = &self.graph {
            graph.base_url.clone_from(url);
        }
        graph.token_url.clone_from(&self.token);
        let mut settings = AccountsSettings::new(graph, &self.domain, &self.redirect);
        settings.send_invitation_message = self.invitation_message;
        Ok(settings)
    }
}

/// One way of telling somebody.
#[derive(Debug)]
pub(crate) struct ChannelConfig {
    name: String,
    pub(crate) filter: Filter,
    subject: String,
    body: String,
    target: ChannelTarget,
}

#[derive(Debug)]
enum ChannelTarget {
    Record,
    Webhook { url: SecretSource, format: WebhookFormat, headers: Vec<(String, SecretSource)> },
    Mail { server: String, login: Option<Login>, from: String, to: Vec<String>, tls: MailTls },
}

impl ChannelConfig {
    /// What the worker needs, with the secrets that `fetch` brings.
    pub(crate) fn settings(
        &self,
        fetch: impl Fn(&SecretSource) -> anyhow::Result<SecretString>,
    ) -> anyhow::Result<ChannelSettings> {
        let fetch =
            |source: &SecretSource| fetch(source).with_context(|| format!("channel {}", self.name));
        let kind = match &self.target {
            ChannelTarget::Record => ChannelKind::Record,
            ChannelTarget::Webhook { url, format, headers } => {
                let header = |(name, value): &(String, _)| Ok((name.clone(), fetch(value)?));
                let headers = headers.iter().map(header).collect::<anyhow::Result<_>>()?;
                ChannelKind::Webhook { url: fetch(url)?, format: *format, headers }
            }
            ChannelTarget::Mail { server, login, from, to, tls } => {
                let login = match login {
                    Some(Login { user, password }) => {
                        Some(MailLogin { user: user.clone(), password: fetch(password)? })
                    }
                    None => None,
                };
                let to = match to.as_slice() {
                    [only] if only == THE_PERSON => Recipient::Person,
                    addresses => Recipient::Fixed(addresses.to_vec()),
                };
                ChannelKind::Mail {
                    server: server.clone(),
                    login,
                    from: from.clone(),
                    to,
                    tls: *tls,
                }
            }
        };
        Ok(ChannelSettings {
            name: self.name.clone(),
            filter: self.filter.clone(),
            subject: self.subject.clone(),
            body: self.body.clone(),
            kind,
        })
    }

    /// Complains of templates and addresses that would fail later.
    fn check(&self, section: &Section<'_>, approvals: &ApprovalsConfig) {
        // Good for a URL, a header and a password alike; the real ones may be out of reach here.
        let stand_in = |_: &SecretSource| Ok("https://stand-in.invalid/".into());
        let channel = self.settings(stand_in).expect("a stand-in is always there");
        let links = ApprovalLinks::new(&PseudonymKey::new(b"a stand-in, too".to_vec()));
        let requests = ApprovalsSettings { expires_after: approvals.expires_after };
        let pages = |base: &String| ApprovalPages::new(base, links, requests).ok();
        let approvals = approvals.link_base.as_ref().and_then(pages);
        let settings = NotifySettings { channels: vec![channel], approvals };
        if let Err(complaints) = Notify::check(&settings) {
            let key = |key| if key == "login" { "user" } else { key };
            complaints.into_iter().for_each(|it| section.complain(key(it.key), it.message));
        }
    }
}

/// In `to`, this word stands for whoever signs up.
const THE_PERSON: &str = "person";

/// `connectors` are those of the file: a worker that waits for another one's events waits for ever.
pub(super) fn read(
    root: &mut Section<'_>,
    connectors: &[&str],
    approvals: &ApprovalsConfig,
) -> Vec<WorkerConfig> {
    let expires_after = approvals.expires_after;
    root.section("workers", |section| {
        let notify = section.section("notify", |it| {
            let channels =
                it.sections("channels", |channel| read_channel(channel, connectors, approvals));
            if it.is_present() && channels.is_empty() {
                it.complain("", "needs at least one [[workers.notify.channels]] table");
            }
            let mut channels: Vec<_> = channels.into_iter().flatten().collect();
            let kinds = Notify::wanted_kinds(channels.iter_mut().map(|it| &mut it.filter));
            read_worker(it, Some(EffectConfig::Notify(channels)), &kinds, connectors)
        });
        let database = section.section("database", |it| {
            read_worker(it, Some(EffectConfig::Database), Database::KINDS, connectors)
        });
        let permissions = section.section("permissions", |it| {
            let rules = it.sections("rules", read_grant_rule);
            if it.is_present() && rules.is_empty() {
                it.complain("", "needs at least one [[workers.permissions.rules]] table");
            }
            let effect = EffectConfig::Permissions(rules);
            read_worker(it, Some(effect), Permissions::KINDS, connectors)
        });
        let asked = section.section("approvals", |it| {
            let effect = EffectConfig::Approvals(ApprovalsSettings { expires_after });
            read_worker(it, Some(effect), Approvals::KINDS, connectors)
        });
        let accounts = section.section("accounts", |it| {
            let effect = read_accounts(it).map(EffectConfig::Accounts);
            read_worker(it, effect, Accounts::KINDS, connectors)
        });
        let workers = [notify, database, permissions, asked, accounts];
        workers.into_iter().flatten().collect()
    })
}

fn read_accounts(section: &mut Section<'_>) -> Option<AccountsConfig> {
    let is_present = section.is_present();
    let mut required = |key| {
        let text = section.string(key);
        if is_present && !section.has(key) {
            section.complain("", format!("needs the key `{key}`"));
        }
        text
    };
    let [tenant, client_id, domain, redirect] =
        ["tenant", "client_id", "domain", "invite_redirect_url"].map(&mut required);
    let client_secret = secret(section, "client_secret");
    if is_present && !section.has("client_secret") {
        section.complain("", "needs the key `client_secret`");
    }
    let graph = section.string("graph_url");
    let token = section.string("token_url");
    let invitation_message = section.boolean("send_invitation_message", false);
    let accounts = AccountsConfig {
        tenant: tenant?,
        client_id: client_id?,
        client_secret: client_secret?,
        graph,
        token,
        domain: domain?,
        redirect: redirect?,
        invitation_message,
    };
    let stand_in = |_: &SecretSource| Ok("stand-in".into());
    let settings = accounts.settings(stand_in).expect("a stand-in is always there");
    for complaint in Accounts::check(&settings).err().into_iter().flatten() {
        section.complain(complaint.key, complaint.message);
    }
    Some(accounts)
}

/// What every worker has, or `None` where the file does not want this one. `kinds` is what it is
/// given where the file does not say; none of them are all.
fn read_worker(
    section: &mut Section<'_>,
    effect: Option<EffectConfig>,
    kinds: &[Kind],
    connectors: &[&str],
) -> Option<WorkerConfig> {
    let defaults = WorkerSettings::default();
    let settings = WorkerSettings {
        filter: read_filter(
            section,
            Filter { kinds: kinds.to_vec(), ..Filter::default() },
            connectors,
        ),
        start: section.parsed("start", START_EXPECTED, parse_start).unwrap_or(defaults.start),
        concurrency: usize::try_from(section.integer("concurrency", 1..1001, 16)).unwrap_or(16),
        ack_wait: section.duration("ack_wait", defaults.ack_wait),
        timeout: section.duration("timeout", defaults.timeout),
        retry: section.section("retry", |retry| read_retry(retry, defaults.retry)),
        rate: section.parsed("rate", RATE_EXPECTED, |it| it.parse().ok()),
        breaker: section.section("breaker", |breaker| read_breaker(breaker, defaults.breaker)),
    };
    for (key, given) in [("ack_wait", settings.ack_wait), ("timeout", settings.timeout)] {
        if given < Duration::from_secs(1) || given > 60 * MINUTE {
            section.complain(key, "must be from 1s to 1h");
        }
    }
    let enabled = section.boolean("enabled", true) && section.is_present();
    effect.filter(|_| enabled).map(|effect| WorkerConfig { effect, settings })
}

fn read_retry(section: &mut Section<'_>, defaults: RetryPolicy) -> RetryPolicy {
    RetryPolicy {
        initial: section.duration("initial", defaults.initial),
        multiplier: section.number("multiplier", 1.0..=100.0, defaults.multiplier),
        max: section.duration("max", defaults.max),
        jitter: section.number("jitter", 0.0..=10.0, defaults.jitter),
        tries: u32::try_from(section.integer("tries", 1..1_000_001, defaults.tries.into()))
            .unwrap_or(defaults.tries),
        max_age: section.duration("max_age", defaults.max_age),
    }
}

const RATE_EXPECTED: &str =
    "so many attempts a second, minute or hour, such as \"100/s\", \"6000/m\" or \"500/h\"";

fn read_breaker(section: &mut Section<'_>, defaults: BreakerPolicy) -> BreakerPolicy {
    let breaker = BreakerPolicy {
        failures: u32::try_from(section.integer(
            "failures",
            1..1_000_001,
            defaults.failures.into(),
        ))
        .unwrap_or(defaults.failures),
        pause: section.duration("pause", defaults.pause),
        max_pause: section.duration("max_pause", defaults.max_pause),
    };
    // Less would be no pause, and more would leave a target alone that has long been mended.
    let sensible = Duration::from_millis(100)..=60 * MINUTE;
    for (key, given) in [("pause", breaker.pause), ("max_pause", breaker.max_pause)] {
        if !sensible.contains(&given) {
            section.complain(key, "must be from 100ms to 1h");
        }
    }
    if breaker.pause > breaker.max_pause {
        section.complain("pause", "must not be longer than `max_pause`");
    }
    breaker
}

fn read_filter(section: &mut Section<'_>, defaults: Filter, known: &[&str]) -> Filter {
    let kinds = Kind::ALL.map(Kind::as_str);
    let expected = format!("kinds, each one of {}", quoted(&kinds));
    let kinds = section.list("kinds", &expected, |it| it.parse::<Kind>().ok());
    let expected = format!("connectors of this file ({})", quoted(known));
    let connectors = section.list("connectors", &expected, |it| {
        it.parse::<ConnectorName>().ok().filter(|name| known.contains(&name.as_str()))
    });
    Filter { kinds: if section.has("kinds") { kinds } else { defaults.kinds }, connectors }
}

const START_EXPECTED: &str = "\"beginning\", \"now\" or a time such as \"2026-11-22T10:00:00Z\"";

fn parse_start(text: &str) -> Option<Start> {
    match text {
        "beginning" => Some(Start::Beginning),
        "now" => Some(Start::Now),
        text => OffsetDateTime::parse(text, &Rfc3339).ok().map(Start::Time),
    }
}

fn read_grant_rule(section: &mut Section<'_>) -> GrantRule {
    let role = section.required("role");
    let rule = GrantRule {
        name: section.string("name").unwrap_or_else(|| role.clone()),
        when: section.string("when").unwrap_or_else(|| "true".into()),
        role,
        expires_after: section
            .has("expires_after")
            .then(|| section.duration("expires_after", Duration::ZERO)),
    };
    if section.has("role")
        && let Err(errors) = Permissions::check(&PermissionsSettings { rules: vec![rule.clone()] })
    {
        errors.into_iter().for_each(|error| section.complain(error.key, error.message));
    }
    rule
}

#[derive(Clone, Copy)]
enum KindWord {
    Record,
    Webhook,
    Mail,
}

fn read_channel(
    section: &mut Section<'_>,
    connectors: &[&str],
    approvals: &ApprovalsConfig,
) -> Option<ChannelConfig> {
    let name = section.required("name");
    let filter = read_filter(section, Filter::default(), connectors);
    let subject = section.required("subject");
    let body = section.required("body");
    let kinds =
        [("record", KindWord::Record), ("webhook", KindWord::Webhook), ("mail", KindWord::Mail)];
    if !section.has("kind") {
        section.complain("", "needs the key `kind`: \"record\", \"webhook\" or \"mail\"");
    }
    let target = match section.choice("kind", &kinds, KindWord::Record) {
        KindWord::Record => Some(ChannelTarget::Record),
        KindWord::Webhook => read_webhook(section),
        KindWord::Mail => Some(read_mail(section)),
    };
    let channel = ChannelConfig { name, filter, subject, body, target: target? };
    let is_complete = ["name", "subject", "body"].iter().all(|key| section.has(key));
    if is_complete {
        channel.check(section, approvals);
    }
    Some(channel)
}

fn read_webhook(section: &mut Section<'_>) -> Option<ChannelTarget> {
    let formats = [
        ("teams", WebhookFormat::Teams),
        ("slack", WebhookFormat::Slack),
        ("json", WebhookFormat::Json),
    ];
    let format = section.choice("format", &formats, WebhookFormat::Json);
    if !section.has("url") {
        section.complain("", "needs the key `url`");
    }
    // The URL of an incoming webhook is the right to post there, so it is a secret.
    let url = secret(section, "url");
    let headers = super::secrets(section, "headers");
    Some(ChannelTarget::Webhook { url: url?, format, headers })
}

fn read_mail(section: &mut Section<'_>) -> ChannelTarget {
    let server = section.required("server");
    let tls = [
        ("required", MailTls::Required),
        ("opportunistic", MailTls::Opportunistic),
        ("none", MailTls::None),
    ];
    let tls = section.choice("tls", &tls, MailTls::Required);
    let user = section.string("user");
    let password = secret(section, "password");
    if user.is_some() != section.has("password") {
        section.complain("user", "`user` and `password` go together");
    }
    let from = section.required("from");
    let to = section.list("to", "addresses, or the word \"person\"", |it| Some(it.to_owned()));
    if !section.has("to") {
        section.complain("", "needs the key `to`: addresses, or [\"person\"] for whoever signs up");
    }
    if to.len() > 1 && to.iter().any(|it| it == THE_PERSON) {
        section.complain("to", "\"person\" stands alone; make a second channel for the others");
    }
    let login = user.zip(password).map(|(user, password)| Login { user, password });
    ChannelTarget::Mail { server, login, from, to, tls }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::{super::Config, *};

    /// The settings of the example's worker `database` with some keys more.
    fn database(keys: &str) -> Result<WorkerSettings, String> {
        let example = include_str!("../../../vestibule.toml");
        let section = "[workers.database]\n";
        let source = example.replacen(section, &format!("{section}{keys}\n"), 1);
        let config = Config::parse(Path::new("vestibule.toml"), &source);
        let config = config.map_err(|complaints| complaints.to_string())?;
        let worker = config.workers.into_iter().find(|it| it.name() == "database");
        Ok(worker.expect("the example has it").settings)
    }

    #[test]
    fn a_worker_may_be_slowed_down_and_given_a_breaker() {
        let settings = database("").unwrap();
        assert_eq!((settings.rate, settings.breaker), (None, BreakerPolicy::default()));
        let breaker = r#"breaker = { failures = 3, pause = "2s", max_pause = "5m" }"#;
        let settings = database(&format!("rate = \"6000/m\"\n{breaker}")).unwrap();
        assert_eq!(settings.rate, "6000/m".parse().ok());
        let breaker = BreakerPolicy { failures: 3, pause: 2 * MINUTE / 60, max_pause: 5 * MINUTE };
        assert_eq!(settings.breaker, breaker);
    }

    #[test]
    fn a_wrong_rate_or_breaker_says_what_was_expected() {
        for (keys, complaint) in [
            ("rate = \"100\"", "workers.database.rate: expected so many attempts a second"),
            ("rate = 100", "found a whole number"),
            ("breaker = { failures = 0 }", "a whole number from 1 to 1000000, found 0"),
            ("breaker = { pause = \"0s\" }", "workers.database.breaker.pause: must be from 100ms"),
            ("breaker = { max_pause = \"2h\" }", "must be from 100ms to 1h"),
            ("breaker = { pause = \"2m\" }", "must not be longer than `max_pause`"),
            ("breaker = { pauses = \"1s\" }", "did you mean `pause`?"),
        ] {
            let complaints = database(keys).expect_err(keys);
            assert!(complaints.contains(complaint), "{keys} gave {complaints}");
            assert!(complaints.contains("has 1 mistake\n"), "{keys} gave {complaints}");
        }
    }
}
