//! `nats.conf` as it is shipped: what each role may do, and what it may not.

use std::time::Duration;

use anyhow::Context as _;
use async_nats::{Client, ConnectOptions, Event, jetstream};
use futures_util::{StreamExt as _, TryStreamExt as _};
use tokio::sync::mpsc;
use vestibule_events::{
    Backlog, ConsumerSpec, EventLog, Filter, Inspector, JetStream, JetStreamConfig, Kind, LogError,
    NatsCredentials, Replay, Role, Start,
};
use vestibule_testkit::{Nats, eventually};

use crate::jetstream::{config, connect, event, ids, next, spec};

const NATS_CONF: &str = include_str!("../../../nats.conf");

const ENVIRONMENT: [(&str, &str); 4] = [
    ("VESTIBULE_NATS_RELAY_PASSWORD", "relay-secret"),
    ("VESTIBULE_NATS_WORKER_PASSWORD", "worker-secret"),
    ("VESTIBULE_NATS_AUDITOR_PASSWORD", "auditor-secret"),
    ("VESTIBULE_NATS_PROVISIONER_PASSWORD", "provisioner-secret"),
];

const WORKERS: [&str; 3] = ["notify", "database", "permissions"];

/// The shipped configuration, with the stream and the durables that `migrate` makes.
async fn installed() -> anyhow::Result<Nats> {
    installed_with(NATS_CONF).await
}

async fn installed_with(text: &str) -> anyhow::Result<Nats> {
    let nats = Nats::start_with_config_and_env(text, &ENVIRONMENT).await?;
    let filtered = ConsumerSpec {
        filter: Filter { kinds: vec![Kind::Accepted], connectors: vec![] },
        ..spec("database")
    };
    let specs = [spec("notify"), filtered, spec("permissions")];
    as_role(&nats, Role::Provisioner).await?.provision(&specs).await?;
    Ok(nats)
}

fn credentials(role: Role) -> NatsCredentials {
    NatsCredentials::UserPassword {
        user: role.as_str().to_owned(),
        password: format!("{}-secret", role.as_str()).into(),
    }
}

async fn as_role(nats: &Nats, role: Role) -> anyhow::Result<JetStream> {
    connect(JetStreamConfig { credentials: credentials(role), role, ..config(nats) }).await
}

/// A client of its own under a role's user: someone who got hold of its password.
struct Intruder {
    client: Client,
    violations: mpsc::UnboundedReceiver<String>,
}

impl Intruder {
    async fn with_password_of(nats: &Nats, role: Role) -> anyhow::Result<Self> {
        let (tell, violations) = mpsc::unbounded_channel();
        let name = role.as_str();
        let client = ConnectOptions::with_user_and_password(name.into(), format!("{name}-secret"))
            .custom_inbox_prefix(format!("_INBOX_{name}"))
            .event_callback(move |event| {
                if let Event::ServerError(error) = event {
                    tell.send(error.to_string()).ok();
                }
                std::future::ready(())
            })
            .connect(nats.url())
            .await?;
        Ok(Self { client, violations })
    }

    /// Publishes and waits for the server to say that this was forbidden.
    async fn may_not_publish(&mut self, subject: &str) -> anyhow::Result<()> {
        self.client.publish(subject.to_owned(), "{}".into()).await?;
        self.violation(subject).await
    }

    async fn may_not_subscribe(&mut self, subject: &str) -> anyhow::Result<()> {
        let subscription = self.client.subscribe(subject.to_owned()).await?;
        self.violation(subject).await?;
        drop(subscription);
        Ok(())
    }

    async fn violation(&mut self, subject: &str) -> anyhow::Result<()> {
        let denied = async {
            loop {
                let said = self.violations.recv().await.context("the connection ended")?;
                // The server quotes the subject in its own case or in lower case.
                if said.to_lowercase().contains(&subject.to_lowercase()) {
                    return anyhow::Ok(());
                }
            }
        };
        tokio::time::timeout(Duration::from_secs(10), denied)
            .await
            .with_context(|| format!("{subject} is not forbidden"))?
    }
}

/// What no role may do, whatever else it may.
const NOBODY_MAY_PUBLISH: [&str; 13] = [
    "$JS.API.STREAM.DELETE.SIGNUPS",
    "$JS.API.STREAM.PURGE.SIGNUPS",
    "$JS.API.STREAM.MSG.DELETE.SIGNUPS",
    "$JS.API.STREAM.SNAPSHOT.SIGNUPS",
    "$JS.API.STREAM.RESTORE.SIGNUPS",
    "$JS.API.STREAM.CREATE.OTHER",
    "$JS.API.CONSUMER.CREATE.SIGNUPS",
    "$JS.API.CONSUMER.DURABLE.CREATE.SIGNUPS.notify",
    "$JS.API.CONSUMER.RESET.SIGNUPS.notify",
    "$SYS.REQ.SERVER.PING",
    "_INBOX_worker.forged",
    "signups",
    "elsewhere",
];

#[tokio::test]
async fn nobody_deletes_purges_or_listens_to_all() -> anyhow::Result<()> {
    let nats = installed().await?;
    for role in [Role::Relay, Role::Worker, Role::Auditor, Role::Provisioner] {
        let mut intruder = Intruder::with_password_of(&nats, role).await?;
        for subject in NOBODY_MAY_PUBLISH {
            intruder.may_not_publish(subject).await.with_context(|| format!("as {role:?}"))?;
        }
        for subject in ["_INBOX.>", ">", "$JS.>", "signups.>"] {
            intruder.may_not_subscribe(subject).await.with_context(|| format!("as {role:?}"))?;
        }
        for other in [Role::Relay, Role::Worker, Role::Auditor, Role::Provisioner] {
            if other != role {
                intruder.may_not_subscribe(&format!("_INBOX_{}.>", other.as_str())).await?;
            }
        }
    }
    Ok(())
}

#[tokio::test]
async fn only_the_provisioner_changes_consumers_and_only_the_relay_publishes() -> anyhow::Result<()>
{
    let nats = installed().await?;
    for role in [Role::Relay, Role::Worker, Role::Auditor] {
        let mut intruder = Intruder::with_password_of(&nats, role).await?;
        for subject in [
            "$JS.API.STREAM.UPDATE.SIGNUPS",
            "$JS.API.STREAM.CREATE.SIGNUPS",
            "$JS.API.CONSUMER.CREATE.SIGNUPS.notify",
            "$JS.API.CONSUMER.CREATE.SIGNUPS.notify.signups.*.accepted",
            "$JS.API.CONSUMER.DELETE.SIGNUPS.notify",
        ] {
            intruder.may_not_publish(subject).await.with_context(|| format!("as {role:?}"))?;
        }
    }
    for role in [Role::Worker, Role::Auditor, Role::Provisioner] {
        let mut intruder = Intruder::with_password_of(&nats, role).await?;
        intruder.may_not_publish("signups.partners.accepted").await?;
    }
    for role in [Role::Relay, Role::Auditor, Role::Provisioner] {
        let mut intruder = Intruder::with_password_of(&nats, role).await?;
        intruder.may_not_publish("$JS.API.CONSUMER.MSG.NEXT.SIGNUPS.notify").await?;
        intruder.may_not_publish("$JS.ACK.SIGNUPS.notify.1.1.1.1.0").await?;
    }
    let mut worker = Intruder::with_password_of(&nats, Role::Worker).await?;
    worker.may_not_publish("$JS.API.DIRECT.GET.SIGNUPS").await
}

#[tokio::test]
async fn each_role_can_do_its_work() -> anyhow::Result<()> {
    let nats = installed().await?;
    each_works(&nats, "$JS.ACK.SIGNUPS.").await
}

/// 2.16 acknowledges on another subject by default; the flag makes this server do so now.
#[tokio::test]
async fn each_role_can_do_its_work_with_the_acknowledgements_to_come() -> anyhow::Result<()> {
    let text = format!("{NATS_CONF}\nfeature_flags {{ js_ack_fc_v2: true }}\n");
    let nats = installed_with(&text).await?;
    each_works(&nats, "$JS.ACK._.").await
}

async fn each_works(nats: &Nats, acknowledged_on: &str) -> anyhow::Result<()> {
    // The relay publishes, is told of a repetition, and reads back what it repeats.
    let relay = as_role(nats, Role::Relay).await?;
    relay.ready().await?;
    let stored = relay.append(event("ada")).await?.stored;
    let repeated = relay.append(event("ada")).await?;
    assert_eq!((repeated.duplicate, &repeated.stored), (true, &stored));

    // A worker receives, puts off, reports progress and acknowledges.
    let worker = as_role(nats, Role::Worker).await?;
    worker.ready().await?;
    for name in WORKERS {
        let kinds = if name == "database" { vec![Kind::Accepted] } else { vec![] };
        let filter = Filter { kinds, connectors: vec![] };
        let mut consumer = worker.consumer(ConsumerSpec { filter, ..spec(name) }).await?;
        let delivery = next(&mut consumer).await?;
        delivery.acknowledge.progress().await?;
        delivery.acknowledge.nack(Duration::ZERO).await?;
        let delivery = next(&mut consumer).await?;
        let subject = format!("{:?}", delivery.acknowledge);
        assert!(subject.contains(acknowledged_on), "{subject}");
        assert_eq!(delivery.event?, stored.event);
        delivery.acknowledge.ack().await?;
        let backlog = worker.backlog(name).await?;
        assert!(backlog.is_some_and(|backlog| backlog.is_empty()), "{backlog:?}");
    }

    // An auditor reads the past and how far everybody is.
    let auditor = as_role(nats, Role::Auditor).await?;
    auditor.ready().await?;
    let replay = Replay {
        start: Start::Beginning,
        until: None,
        filter: Filter::default(),
        person: Some(stored.event.person.clone()),
        follow: false,
    };
    let found: Vec<_> = auditor.replay(replay).await?.try_collect().await?;
    assert_eq!(found, [stored]);
    assert!(auditor.backlog("notify").await?.is_some());
    Ok(())
}

#[tokio::test]
async fn a_worker_whose_consumer_is_missing_or_otherwise_says_what_to_run() -> anyhow::Result<()> {
    let nats = installed().await?;
    let worker = as_role(&nats, Role::Worker).await?;
    let blocked = Filter { kinds: vec![Kind::Blocked], connectors: vec![] };
    for spec in [spec("unheard-of"), ConsumerSpec { filter: blocked, ..spec("notify") }] {
        let refused = worker.consumer(spec).await;
        let Err(LogError::Refused(error)) = refused else {
            anyhow::bail!("not refused: {refused:?}");
        };
        assert!(error.to_string().contains("vestibule migrate"), "{error}");
    }
    Ok(())
}

#[tokio::test]
async fn a_header_of_a_publisher_erases_nothing() -> anyhow::Result<()> {
    let nats = installed().await?;
    let relay = as_role(&nats, Role::Relay).await?;
    for n in 0..5 {
        relay.append(event(&n.to_string())).await?;
    }
    let intruder = Intruder::with_password_of(&nats, Role::Relay).await?;
    let context = jetstream::new(intruder.client);
    for (name, value) in [
        ("Nats-Rollup", "all"),
        ("Nats-TTL", "1s"),
        ("Nats-Schedule", "@at 2020-01-01T00:00:00Z"),
        ("Nats-Incr", "+1"),
    ] {
        let mut headers = async_nats::HeaderMap::new();
        headers.insert(name, value);
        let published =
            context.publish_with_headers("signups.partners.accepted", headers, "{}".into());
        assert!(published.await?.await.is_err(), "{name} was taken");
    }
    let all = Replay {
        start: Start::Beginning,
        until: None,
        filter: Filter::default(),
        person: None,
        follow: false,
    };
    assert_eq!(relay.replay(all).await?.count().await, 5);
    Ok(())
}

#[tokio::test]
async fn the_provisioner_removes_a_consumer_for_good() -> anyhow::Result<()> {
    let nats = installed().await?;
    let provisioner = as_role(&nats, Role::Provisioner).await?;

    assert!(provisioner.remove_consumer("notify").await?);

    assert!(!provisioner.remove_consumer("notify").await?, "there is none any more");
    assert!(provisioner.backlog("notify").await?.is_none());
    assert!(provisioner.backlog("database").await?.is_some());
    Ok(())
}

#[tokio::test]
async fn the_shipped_users_can_do_what_they_must_and_no_more() -> anyhow::Result<()> {
    let nats = installed().await?;
    let consumers = WORKERS.map(String::from);
    for role in [Role::Relay, Role::Worker, Role::Auditor, Role::Provisioner] {
        let config = JetStreamConfig { credentials: credentials(role), role, ..config(&nats) };
        let misfits = Inspector::connect(config).await?.misfits(&consumers).await?;
        assert_eq!(misfits, [], "{role:?}");
    }
    let relay = as_role(&nats, Role::Relay).await?;
    assert!(ids(&relay).await?.is_empty(), "trying has left something");
    for name in WORKERS {
        assert!(backlog_of(&nats, name).await?.is_empty(), "trying has taken something");
    }
    Ok(())
}

async fn backlog_of(nats: &Nats, name: &str) -> anyhow::Result<Backlog> {
    let auditor = as_role(nats, Role::Auditor).await?;
    auditor.backlog(name).await?.context("no consumer")
}

#[tokio::test]
async fn users_with_other_rights_are_found_and_trying_them_does_no_harm() -> anyhow::Result<()> {
    // The relay may do everything, the worker may not acknowledge in the old way.
    let text = NATS_CONF
        .replacen("\"signups.*.*\"", "\">\"", 1)
        .replacen("\"_INBOX_relay.>\"", "\">\"", 1)
        .replacen("\"$JS.ACK.SIGNUPS.*.>\"", "", 1);
    let nats = installed_with(&text).await?;
    let relay = as_role(&nats, Role::Relay).await?;
    for n in 0..3 {
        relay.append(event(&n.to_string())).await?;
    }
    let misfits = async |role| {
        let config = JetStreamConfig { credentials: credentials(role), role, ..config(&nats) };
        let mut inspector = Inspector::connect(config).await?;
        anyhow::Ok(inspector.misfits(&WORKERS.map(String::from)).await?)
    };

    let of_relay = misfits(Role::Relay).await?;
    for what in ["delete streams", "purge streams", "delete events", "take events"] {
        assert!(
            of_relay.iter().any(|it| it.what == what && it.is_allowed),
            "{what}: {of_relay:#?}"
        );
    }
    let of_worker = misfits(Role::Worker).await?;
    assert!(of_worker.iter().all(|it| !it.is_allowed && it.what == "acknowledge events"));
    assert_eq!(of_worker.len(), WORKERS.len(), "{of_worker:#?}");

    assert_eq!(ids(&relay).await?.len(), 3);
    for name in WORKERS {
        let backlog = backlog_of(&nats, name).await?;
        assert_eq!((backlog.waiting, backlog.in_flight), (3, 0));
    }
    Ok(())
}

#[tokio::test]
async fn a_wrong_password_is_never_let_in() -> anyhow::Result<()> {
    let nats = installed().await?;
    let wrong = NatsCredentials::UserPassword { user: "relay".into(), password: "guess".into() };
    let log = JetStream::connect(JetStreamConfig {
        credentials: wrong,
        role: Role::Relay,
        ..config(&nats)
    })
    .await?;

    eventually(Duration::from_secs(10), "the server has refused it", async || {
        nats.log().contains("authentication error")
    })
    .await?;
    assert!(!log.is_connected());
    // An outage would say otherwise: nobody has to look at the network for this.
    eventually(Duration::from_secs(10), "we say so", async || {
        let Err(LogError::Unavailable(error)) = log.ready().await else { return false };
        error.to_string().contains("does not accept the user or the password of the relay")
    })
    .await?;
    let inspector = Inspector::connect(JetStreamConfig {
        credentials: NatsCredentials::UserPassword { user: "relay".into(), password: "no".into() },
        role: Role::Relay,
        ..config(&nats)
    });
    assert!(matches!(inspector.await, Err(LogError::Refused(_))));
    Ok(())
}
