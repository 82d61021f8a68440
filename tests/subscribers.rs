//! Subscribers as operations teams have them: added, watched and removed while everything runs, and
//! let into NATS with no more than they need.

mod manual;
mod operation;

use std::{collections::BTreeSet, time::Duration};

use anyhow::{Context, ensure};
use async_nats::{Client, ConnectOptions, Event, jetstream};
use serde_json::{Value, json};
use tokio::sync::mpsc;
use vestibule_testkit::{Process, eventually};

use crate::{
    scaled_out::Stack,
    support::{Finished, LIMIT, Site, Up, example, sign_up},
};

/// A command that keeps the ids of its events.
const KEEPS: &str = "cat >> seen.jsonl";

async fn run(site: &Site, arguments: &[&str]) -> anyhow::Result<Finished> {
    let finished = site.run(arguments).await?;
    ensure!(finished.code == 0, "{arguments:?}: {finished:?}");
    Ok(finished)
}

/// The people whose events a command has been given, each as often as it was.
fn seen(site: &Site) -> anyhow::Result<Vec<String>> {
    let text = std::fs::read_to_string(site.path().join("seen.jsonl")).unwrap_or_default();
    let events = text.lines().map(serde_json::from_str::<Value>);
    let email = |event: Value| Some(event["data"]["email"].as_str()?.to_owned());
    events.map(|it| email(it?).context("an event without an address")).collect()
}

async fn wait_for_seen(site: &Site, people: &[&str]) -> anyhow::Result<()> {
    eventually(LIMIT, &format!("{people:?} are seen"), async || {
        let seen = seen(site)?;
        anyhow::Ok(people.iter().all(|it| seen.iter().any(|seen| seen == it)))
    })
    .await
}

async fn accept(base: &str, email: &str) -> anyhow::Result<()> {
    let (status, answer) = sign_up(base, "before-create", &json!({ "email": email })).await?;
    ensure!((status, &answer["action"]) == (200, &json!("Continue")), "{status} {answer}");
    Ok(())
}

/// What `subscriber lag` says of one.
async fn lag(site: &Site, name: &str) -> anyhow::Result<Value> {
    let lag = run(site, &["subscriber", "lag", name, "--output", "json"]).await?;
    let lag: Value = serde_json::from_str(&lag.stdout)?;
    Ok(lag[0].clone())
}

async fn pause(site: &Site, up: &Up, name: &str) -> anyhow::Result<()> {
    run(site, &["subscriber", "pause", name, "--reason", "the disk moves"]).await?;
    let metric = format!("vestibule_worker_paused{{worker=\"{name}\"}}");
    eventually(LIMIT, "it is paused", async || anyhow::Ok(up.metric(&metric).await? == 1.0)).await
}

async fn wait_for_running(up: &Up, count: f64) -> anyhow::Result<()> {
    eventually(LIMIT, &format!("{count} subscribers run"), async || {
        anyhow::Ok(up.metric("vestibule_subscribers_running").await? == count)
    })
    .await
}

#[tokio::test]
async fn a_subscriber_comes_and_goes_while_everything_runs() -> anyhow::Result<()> {
    let mut site = Site::new("")?;
    site.set("USER", "grace");
    let up = site.up().await?;
    accept(&up.base, "before@example.com").await?;

    let add = ["subscriber", "add", "audit", "--exec", "sh", "-c", KEEPS];
    let added = run(&site, &add).await?.stdout;
    assert!(added.contains("vestibule subscriber test audit"), "{added}");
    wait_for_running(&up, 1.0).await?;
    accept(&up.base, "ada@example.com").await?;
    wait_for_seen(&site, &["ada@example.com"]).await?;

    pause(&site, &up, "audit").await?;
    accept(&up.base, "bea@example.com").await?;
    let waits = eventually(LIMIT, "an event waits", async || {
        let it = lag(&site, "audit").await?;
        let undone = [&it["waiting"], &it["in_hand"]].map(Value::as_u64);
        anyhow::Ok((undone.into_iter().sum::<Option<u64>>() == Some(1)).then_some(it))
    })
    .await?;
    assert_eq!(waits["paused"]["reason"], "the disk moves");
    assert!(waits["oldest"].is_string(), "{waits}");
    run(&site, &["subscriber", "resume", "audit"]).await?;
    wait_for_seen(&site, &["bea@example.com"]).await?;
    assert_eq!(seen(&site)?, ["ada@example.com", "bea@example.com"], "no more, and each once");

    for not_a_subscriber in ["notify", "../vestibule"] {
        let refused = site.run(&["subscriber", "remove", not_a_subscriber, "--yes"]).await?;
        assert!(refused.code == 1 && refused.stderr.contains(not_a_subscriber), "{refused:?}");
    }
    assert!(site.path().join("vestibule.toml").exists());
    // What waits for one that is paused goes with it, and is not given to it at the last moment.
    pause(&site, &up, "audit").await?;
    accept(&up.base, "carl@example.com").await?;
    let refused = site.run(&["subscriber", "remove", "audit"]).await?;
    assert!(refused.stdout.contains("its consumer, with 1 event"), "{refused:?}");
    assert_eq!(refused.code, 1, "nobody is there to ask");
    run(&site, &["subscriber", "remove", "audit", "--yes"]).await?;
    wait_for_running(&up, 0.0).await?;
    assert!(!site.path().join("subscribers/audit.toml").exists());
    let list = run(&site, &["worker", "list"]).await?.stdout;
    assert!(!list.contains("audit"), "{list}");
    assert_eq!(seen(&site)?, ["ada@example.com", "bea@example.com"]);
    Ok(())
}

#[tokio::test]
async fn a_file_that_is_wrong_changes_nothing_until_it_is_mended() -> anyhow::Result<()> {
    let file = |more: &str| format!("{more}\n[exec]\ncommand = [\"sh\", \"-c\", \"{KEEPS}\"]\n");
    let site = Site::new("")?;
    site.write("subscribers/audit.toml", &file(""))?;
    site.write("subscribers/never.toml", "kinds = []\n")?;
    let up = site.up().await?;
    wait_for_running(&up, 1.0).await?;
    assert_eq!(up.metric("vestibule_subscribers_refused").await?, 1.0);

    site.write("subscribers/audit.toml", &file("kind = [\"blocked\"]"))?;
    eventually(LIMIT, "it is refused", async || {
        anyhow::Ok(up.metric("vestibule_subscribers_refused").await? == 2.0)
    })
    .await?;
    accept(&up.base, "ada@example.com").await?;
    wait_for_seen(&site, &["ada@example.com"]).await?;
    let check = site.run(&["check"]).await?;
    assert_eq!(check.code, 1);
    for part in [
        "subscribers/audit.toml:1:1: kind: there is no such key; did you mean `kinds`?",
        "subscribers/never.toml:1:1: needs exactly one of the tables",
    ] {
        assert!(check.stderr.contains(part), "{part} is not in\n{}", check.stderr);
    }

    std::fs::remove_file(site.path().join("subscribers/never.toml"))?;
    site.write("subscribers/audit.toml", &file("when = \"signup.email_domain == 'example.net'\""))?;
    eventually(LIMIT, "it is taken", async || {
        let refused = up.metric("vestibule_subscribers_refused").await?;
        let taken = up.metric("vestibule_subscriber_changes_total{outcome=\"taken\"}").await?;
        anyhow::Ok(refused == 0.0 && taken == 2.0)
    })
    .await?;
    // Whichever of the two settings the first of them meets, the last one meets the new one.
    for person in ["bea@example.com", "cleo@example.net"] {
        accept(&up.base, person).await?;
    }
    wait_for_seen(&site, &["cleo@example.net"]).await?;
    let seen = seen(&site)?;
    let distinct: BTreeSet<_> = seen.iter().collect();
    assert_eq!(seen.len(), distinct.len(), "each once: {seen:?}");
    Ok(())
}

#[tokio::test]
async fn a_process_that_may_make_no_consumer_waits_until_somebody_does() -> anyhow::Result<()> {
    let stack = Stack::start("").await?;
    let site = &stack.site;
    let (_api, base) = stack.api(&[]).await?;
    let mut worker = Process::spawn(&site.command(&["worker"]))?;
    worker.wait_for_line(LIMIT, |line| line.contains("the workers run")).await?;

    let file = format!("[exec]\ncommand = [\"sh\", \"-c\", \"{KEEPS}\"]\n");
    site.write("subscribers/audit.toml", &file)?;
    let said = worker.wait_for_line(LIMIT, |line| line.contains("cannot run yet")).await?;
    assert!(said.contains("vestibule subscriber add audit"), "{said}");
    accept(&base, "ada@example.com").await?;
    let made = run(site, &["subscriber", "add", "audit"]).await?.stdout;
    assert!(made.contains("created"), "{made}");
    wait_for_seen(site, &["ada@example.com"]).await?;
    Ok(())
}

/// A team with the password that it was granted.
struct Team {
    client: Client,
    violations: mpsc::UnboundedReceiver<String>,
}

impl Team {
    async fn connect(url: &str, name: &str, password: &str) -> anyhow::Result<Self> {
        let (tell, violations) = mpsc::unbounded_channel();
        let client = ConnectOptions::with_user_and_password(name.into(), password.into())
            .custom_inbox_prefix(format!("_INBOX_{name}"))
            .event_callback(move |event| {
                if let Event::ServerError(error) = event {
                    tell.send(error.to_string()).ok();
                }
                std::future::ready(())
            })
            .connect(url)
            .await?;
        Ok(Self { client, violations })
    }

    async fn may_not(&mut self, subject: &str) -> anyhow::Result<()> {
        let denied = async {
            loop {
                let said = self.violations.recv().await.context("the connection ended")?;
                if said.to_lowercase().contains(&subject.to_lowercase()) {
                    return anyhow::Ok(());
                }
            }
        };
        tokio::time::timeout(Duration::from_secs(10), denied)
            .await
            .with_context(|| format!("{subject} is not forbidden"))?
    }

    async fn may_not_publish(&mut self, subject: &str) -> anyhow::Result<()> {
        self.client.publish(subject.to_owned(), "{}".into()).await?;
        self.may_not(subject).await
    }
}

/// `nats.conf` with a user more that a subscriber is granted, and that user's password.
pub(crate) async fn granted(name: &str) -> anyhow::Result<(String, String)> {
    // The user goes into the file before there is a server that reads it.
    let config = example().replace("data = \"./data\"", "data = \"./data\"\nkey = \"env:KEY\"");
    let site = Site::with_config(&format!("{config}\n[nats]\nurl = \"nats://127.0.0.1:4222\"\n"))?;
    site.write(&format!("subscribers/{name}.toml"), "[nats]\n")?;
    site.write("nats.conf", include_str!("../nats.conf"))?;
    let granted = run(&site, &["subscriber", "grant", name, "--apply", "nats.conf"]).await?;
    assert!(granted.stdout.contains("nats-server --signal reload"), "{granted:?}");
    let again = site.run(&["subscriber", "grant", name, "--apply", "nats.conf"]).await?;
    assert!(again.stderr.contains(&format!("has a user {name} already")), "{again:?}");
    let configuration = std::fs::read_to_string(site.path().join("nats.conf"))?;
    let password = site.path().join(format!("subscribers/{name}.password"));
    let password = std::fs::read_to_string(password)?.trim().to_owned();
    assert!(!configuration.contains(&password), "only a hash of it is for the server");
    Ok((configuration, password))
}

#[tokio::test]
async fn a_team_takes_its_own_events_from_the_stream_and_can_do_nothing_else() -> anyhow::Result<()>
{
    let (configuration, password) = granted("warehouse").await?;
    let stack = Stack::start_with(&configuration, "").await?;
    stack.site.write("subscribers/warehouse.toml", "[nats]\n")?;
    stack.migrate().await?;
    let (_api, base) = stack.api(&[]).await?;
    accept(&base, "ada@example.com").await?;

    let url = stack.nats.url();
    let mut team = Team::connect(&url, "warehouse", &password).await?;
    let context = jetstream::new(team.client.clone());
    let consumer: jetstream::consumer::PullConsumer =
        context.get_consumer_from_stream("warehouse", "SIGNUPS").await?;
    let message = eventually(LIMIT, "the event comes", async || {
        use futures_util::StreamExt as _;
        let mut batch = consumer.fetch().max_messages(1).messages().await?;
        anyhow::Ok(batch.next().await.transpose().map_err(anyhow::Error::from_boxed)?)
    })
    .await?;
    let event: Value = serde_json::from_slice(&message.payload)?;
    assert_eq!(event["data"]["email"], "ada@example.com");
    message.double_ack().await.map_err(anyhow::Error::from_boxed)?;
    eventually(LIMIT, "nothing waits", async || {
        let it = lag(&stack.site, "warehouse").await?;
        anyhow::Ok((it["waiting"] == 0 && it["in_hand"] == 0).then_some(()))
    })
    .await?;

    for subject in [
        "signups.partners.accepted",
        "$JS.API.CONSUMER.MSG.NEXT.SIGNUPS.notify",
        "$JS.API.CONSUMER.INFO.SIGNUPS.notify",
        "$JS.API.CONSUMER.DELETE.SIGNUPS.warehouse",
        "$JS.API.CONSUMER.CREATE.SIGNUPS.warehouse",
        "$JS.API.CONSUMER.RESET.SIGNUPS.warehouse",
        "$JS.API.STREAM.DELETE.SIGNUPS",
        "$JS.API.DIRECT.GET.SIGNUPS",
        "$JS.ACK.SIGNUPS.notify.1.1.1.1.0",
    ] {
        team.may_not_publish(subject).await?;
    }
    let inbox = team.client.subscribe("_INBOX_worker.>").await?;
    team.may_not("_INBOX_worker.>").await?;
    drop(inbox);
    Ok(())
}
