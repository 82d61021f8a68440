//! The `[workers]` tables: the built-in workers and how each of them goes about its work.

mod accounts;
mod confirm;
mod graph;
mod notify;
mod permissions;
mod statements;

use std::{path::Path, time::Duration};

use time::{OffsetDateTime, format_description::well_known::Rfc3339};
use vestibule_events::{ConnectorName, Filter, Kind, Start};
use vestibule_workers::{
    Accounts, Approvals, ApprovalsSettings, BreakerPolicy, Confirm, Database, Notify, Permissions,
    RetryPolicy, Statements, WorkerSettings,
};

use self::accounts::AccountsConfig;
pub(crate) use self::{
    confirm::{ConfirmConfig, read_on},
    notify::ChannelConfig,
    permissions::PermissionsConfig,
    statements::StatementsConfig,
};
use super::{
    ApprovalsConfig, MINUTE, SubscriberConfig, Way,
    reader::{Section, quoted},
};

/// One worker that is to run.
#[derive(Debug)]
pub(crate) struct WorkerConfig {
    pub(crate) effect: EffectConfig,
    pub(crate) settings: WorkerSettings,
}

impl WorkerConfig {
    /// The name of the durable consumer, too.
    pub(crate) fn name(&self) -> &str {
        match &self.effect {
            EffectConfig::Notify(_) => Notify::NAME,
            EffectConfig::Database => Database::NAME,
            EffectConfig::Permissions(_) => Permissions::NAME,
            EffectConfig::Approvals(_) => Approvals::NAME,
            EffectConfig::Accounts(_) => Accounts::NAME,
            EffectConfig::Confirm(_) => Confirm::NAME,
            EffectConfig::Statements(it) => &it.worker,
            EffectConfig::Subscriber(it) => &it.name,
        }
    }

    /// Where it is configured.
    pub(crate) fn place(&self) -> String {
        match &self.effect {
            EffectConfig::Subscriber(it) => it.file.display().to_string(),
            EffectConfig::Statements(it) => format!("workers.statements.{}", it.name),
            _ => format!("workers.{}", self.name()),
        }
    }

    /// Whether a process of ours runs it.
    pub(crate) const fn runs_here(&self) -> bool {
        !matches!(&self.effect, EffectConfig::Subscriber(SubscriberConfig { way: Way::Nats, .. }))
    }

    /// What a subscriber reads besides its own file, and may change while it runs.
    pub(crate) fn files(&self) -> impl Iterator<Item = &Path> {
        let subscriber = match &self.effect {
            EffectConfig::Subscriber(it) => Some(it),
            _ => None,
        };
        subscriber.into_iter().flat_map(|it| it.way.files())
    }
}

/// Every worker of our own, configured or not.
pub(crate) const BUILT_IN: [&str; 6] = [
    Notify::NAME,
    Database::NAME,
    Permissions::NAME,
    Approvals::NAME,
    Accounts::NAME,
    Confirm::NAME,
];

/// What a worker does, with what only it needs.
#[derive(Debug)]
pub(crate) enum EffectConfig {
    Notify(Vec<ChannelConfig>),
    Database,
    Permissions(PermissionsConfig),
    Approvals(ApprovalsSettings),
    Accounts(AccountsConfig),
    Confirm(ConfirmConfig),
    Statements(StatementsConfig),
    Subscriber(SubscriberConfig),
}

/// `connectors` are those of the file: a worker that waits for another one's events waits for ever.
pub(super) fn read(
    root: &mut Section<'_>,
    connectors: &[&str],
    approvals: &ApprovalsConfig,
) -> Vec<WorkerConfig> {
    let expires_after = approvals.expires_after;
    root.section("workers", |section| {
        // Whoever makes accounts in a directory need not name it twice.
        let mut directory = None;
        let accounts = section.section("accounts", |it| {
            let accounts = accounts::read(it);
            directory = accounts.as_ref().map(|it| it.graph.clone());
            read_worker(it, accounts.map(EffectConfig::Accounts), Accounts::KINDS, connectors)
        });
        let confirm = section.section("confirm", |it| {
            let made_here = accounts.as_ref().map(|it| it.settings.filter.clone());
            let effect = EffectConfig::Confirm(confirm::read(it, directory.as_ref(), made_here));
            read_worker(it, Some(effect), Confirm::KINDS, connectors)
        });
        let has_confirm = confirm.is_some();
        let notify = section.section("notify", |it| {
            let channels = it.sections("channels", |channel| {
                let on = read_on(channel, has_confirm);
                let mut channel = notify::read_channel(channel, connectors, approvals)?;
                if channel.filter.kinds.is_empty() {
                    channel.filter.kinds = on.kinds(Notify::KINDS);
                }
                Some(channel)
            });
            if it.is_present() && channels.is_empty() {
                it.complain("", "needs at least one [[workers.notify.channels]] table");
            }
            let mut channels: Vec<_> = channels.into_iter().flatten().collect();
            let kinds = Notify::wanted_kinds(channels.iter_mut().map(|it| &mut it.filter));
            let notify = read_worker(it, Some(EffectConfig::Notify(channels)), &kinds, connectors);
            complain_of_idle_channels(it, notify.as_ref());
            notify
        });
        let database = section.section("database", |it| {
            read_worker(it, Some(EffectConfig::Database), Database::KINDS, connectors)
        });
        let asked = section.section("approvals", |it| {
            let effect = EffectConfig::Approvals(ApprovalsSettings { expires_after });
            read_worker(it, Some(effect), Approvals::KINDS, connectors)
        });
        let permissions = section.section("permissions", |it| {
            let kinds = read_on(it, has_confirm).kinds(Permissions::KINDS);
            let effect = EffectConfig::Permissions(permissions::read(it, directory.as_ref()));
            read_worker(it, Some(effect), &kinds, connectors)
        });
        let statements = section.named_sections("statements", |name, it| {
            let effect = EffectConfig::Statements(statements::read(name, it));
            let kinds = read_on(it, has_confirm).kinds(Statements::KINDS);
            let mut worker = read_worker(it, Some(effect), &kinds, connectors)?;
            if !it.has("concurrency") {
                // What is handled at the same time shares a transaction.
                worker.settings.concurrency = 64;
            }
            Some(worker)
        });
        let workers = [notify, database, permissions, asked, accounts, confirm];
        workers.into_iter().chain(statements).flatten().collect()
    })
}

/// A channel whose kinds the worker is not given would be silent for ever, and nobody would be told.
fn complain_of_idle_channels(section: &mut Section<'_>, notify: Option<&WorkerConfig>) {
    let Some(WorkerConfig { effect: EffectConfig::Notify(channels), settings }) = notify else {
        return;
    };
    let given = &settings.filter.kinds;
    for channel in channels {
        let wanted = &channel.filter.kinds;
        if !given.is_empty() && !wanted.iter().any(|it| given.contains(it)) {
            let wanted: Vec<_> = wanted.iter().map(|it| it.as_str()).collect();
            section.complain(
                "kinds",
                format!(
                    "leaves nothing for the channel `{}`, which wants {}; leave `kinds` out, or give \
                     the channel its own",
                    channel.name,
                    quoted(&wanted)
                ),
            );
        }
    }
}

/// What every worker has, or `None` where the file does not want this one. `kinds` is what it is
/// given where the file does not say; none of them are all.
pub(super) fn read_worker(
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

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::config::Config;

    /// The settings of the example's worker `database` with some keys more.
    fn database(keys: &str) -> Result<WorkerSettings, String> {
        let example = include_str!("../../../../vestibule.toml");
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
    fn a_channel_that_would_never_be_told_is_a_mistake() {
        let example = include_str!("../../../../vestibule.toml");
        let parse = |notify: &str| {
            let source = format!("{example}\n[workers.confirm]\n[workers.notify]\n{notify}");
            Config::parse(Path::new("vestibule.toml"), &source)
        };
        assert!(parse("").is_ok());
        let complaints = parse("kinds = [\"accepted\"]").unwrap_err().to_string();
        let said = "workers.notify.kinds: leaves nothing for the channel `kept`, which wants \"confirmed\"";
        assert!(complaints.contains(said), "{complaints}");
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
