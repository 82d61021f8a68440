//! Processes of their own over NATS JetStream, as `nats.conf` sets it up, and PostgreSQL.

use std::time::Duration;

use anyhow::{Context, ensure};
use serde_json::{Value, json};
use vestibule_testkit::{Graph, Nats, Postgres, Process, eventually};

use crate::{
    approvals,
    support::{LIMIT, Site, assert_names_are_ours_and_stand_once, example, http, sign_up},
};

pub(crate) const ROLES: [&str; 4] = ["relay", "worker", "auditor", "provisioner"];

/// The servers, and the folder from which the processes run.
pub(crate) struct Stack {
    pub(crate) site: Site,
    pub(crate) nats: Nats,
    pub(crate) postgres: Postgres,
}

impl Stack {
    pub(crate) async fn start(more: &str) -> anyhow::Result<Self> {
        let stack = Self::start_bare(more).await?;
        stack.migrate().await?;
        Ok(stack)
    }

    pub(crate) async fn migrate(&self) -> anyhow::Result<()> {
        let migrate = self.site.run(&["migrate"]).await?;
        ensure!(migrate.code == 0, "migrate failed: {}", migrate.stderr);
        Ok(())
    }

    /// Without tables, stream and consumers.
    pub(crate) async fn start_bare(more: &str) -> anyhow::Result<Self> {
        Self::start_with(include_str!("../nats.conf"), more).await
    }

    /// The same with another configuration of NATS.
    pub(crate) async fn start_with(configuration: &str, more: &str) -> anyhow::Result<Self> {
        let passwords = ROLES.map(|role| {
            (format!("VESTIBULE_NATS_{}_PASSWORD", role.to_uppercase()), format!("{role}-secret"))
        });
        let environment: Vec<_> =
            passwords.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        let (nats, postgres) = tokio::try_join!(
            Nats::start_with_config_and_env(configuration, &environment),
            Postgres::start()
        )?;
        let logins = ROLES.map(|role| {
            let name = role.to_uppercase();
            format!("{role} = {{ user = \"{role}\", password = \"env:VESTIBULE_NATS_{name}_PASSWORD\" }}\n")
        });
        let key = "data = \"./data\"\nkey = \"env:VESTIBULE_KEY\"";
        let config = example().replace("data = \"./data\"", key);
        let config = format!(
            "{config}\n[nats]\nurl = \"{}\"\n{}[store]\nurl = \"env:VESTIBULE_STORE_URL\"\n{more}",
            nats.url(),
            logins.concat()
        );
        let mut site = Site::with_config(&config)?;
        for (name, value) in &passwords {
            site.set(name, value);
        }
        site.set("VESTIBULE_KEY", "0123456789abcdef0123456789abcdef");
        site.set("VESTIBULE_STORE_URL", &postgres.url());
        Ok(Self { site, nats, postgres })
    }

    /// Starts an `api` and gives it with its address.
    pub(crate) async fn api(&self, arguments: &[&str]) -> anyhow::Result<(Process, String)> {
        let mut all = vec!["--log-format", "json", "api"];
        all.extend(arguments);
        let mut api = Process::spawn(&self.site.command(&all))?;
        let line = api.wait_for_line(LIMIT, |line| line.contains("the connector answers")).await?;
        let line: Value = serde_json::from_str(&line)?;
        let base = format!("http://{}", line["connector"].as_str().context("no address")?);
        Ok((api, base))
    }

    pub(crate) async fn worker(&self, names: &[&str]) -> anyhow::Result<Process> {
        self.start_until(&[&["worker"], names].concat(), "the workers run").await
    }

    pub(crate) async fn start_until(
        &self,
        arguments: &[&str],
        line: &str,
    ) -> anyhow::Result<Process> {
        let mut process = Process::spawn(&self.site.command(arguments))?;
        process.wait_for_line(LIMIT, |it| it.contains(line)).await?;
        Ok(process)
    }

    pub(crate) async fn simulate(&self, base: &str, count: &str) -> anyhow::Result<Value> {
        let simulate = self
            .site
            .run_within(
                Duration::from_secs(220),
                &[
                    "simulate",
                    "--url",
                    &format!("{base}/connectors/partners"),
                    "--count",
                    count,
                    "--output",
                    "json",
                ],
            )
            .await?;
        let summary: Value = serde_json::from_str(&simulate.stdout)
            .with_context(|| format!("{} {}", simulate.stdout, simulate.stderr))?;
        ensure!(simulate.code == 0 && summary["ok"] == json!(true), "{summary:#}");
        Ok(summary)
    }
}

#[tokio::test]
async fn ten_thousand_sign_ups_over_nats_and_postgresql_are_each_acted_on_exactly_once()
-> anyhow::Result<()> {
    let stack = Stack::start("").await?;
    let (_api, base) = stack.api(&["--without-relay"]).await?;
    let _relay = stack.start_until(&["relay"], "the relay runs").await?;
    let _notify = stack.worker(&["notify"]).await?;
    let _others = stack.worker(&["database", "permissions"]).await?;

    let summary = stack.simulate(&base, "10000").await?;

    let accepted = summary["accepted_answered"].as_u64().context("no count")?;
    assert!(accepted > 3000, "{summary:#}");
    for worker in ["database", "permissions", "notify"] {
        assert_eq!(summary["acted_on"][worker], json!(accepted), "{worker}");
    }
    Ok(())
}

#[tokio::test]
async fn with_nats_stopped_sign_ups_are_answered_and_the_relay_catches_up() -> anyhow::Result<()> {
    let mut stack = Stack::start("").await?;
    let (_api, base) = stack.api(&[]).await?;
    let _workers = stack.worker(&[]).await?;
    sign_up(&base, "before-create", &json!({ "email": "before@example.com" })).await?;

    stack.nats.stop();
    for n in 0..200 {
        let person = json!({ "email": format!("during-{n}@example.com") });
        let (status, answer) = sign_up(&base, "before-create", &person).await?;
        assert_eq!((status, &answer["action"]), (200, &json!("Continue")));
    }
    stack.nats.restart().await?;

    eventually(LIMIT, "the relay has caught up", async || -> anyhow::Result<bool> {
        Ok(stack.site.replay(&[]).await?.len() == 201)
    })
    .await?;
    // After the outage everything works as before it, the 200 included.
    let summary = stack.simulate(&base, "200").await?;
    assert!(summary["accepted_answered"].as_u64() > Some(0));
    Ok(())
}

#[tokio::test]
async fn a_call_repeated_at_another_api_makes_no_second_event() -> anyhow::Result<()> {
    let stack = Stack::start("").await?;
    let (_one, first) = stack.api(&["--data", "one"]).await?;
    let (_other, second) = stack.api(&["--data", "other"]).await?;
    let _workers = stack.worker(&[]).await?;
    let person = json!({ "email": "ada@example.com", "displayName": "Ada" });

    let answer = sign_up(&first, "before-create", &person).await?;
    let again = sign_up(&second, "before-create", &person).await?;
    let other = sign_up(&second, "before-create", &json!({ "email": "eve@example.com" })).await?;

    assert_eq!(answer, again);
    assert_eq!(other.0, 200);
    // Both relays have published all they have once their events are all there.
    let events = eventually(LIMIT, "both relays have published", async || {
        let events = stack.site.replay(&[]).await?;
        anyhow::Ok((events.len() >= 2).then_some(events))
    })
    .await?;
    let people: std::collections::BTreeSet<_> =
        events.iter().map(|it| it["subject"].to_string()).collect();
    assert_eq!((events.len(), people.len()), (2, 2), "{events:#?}");
    Ok(())
}

#[tokio::test]
async fn answers_after_the_stream_wait_for_it_and_say_so_when_it_is_away() -> anyhow::Result<()> {
    let mut stack = Stack::start("[log]\nanswer_after = \"stream\"\n").await?;
    let (_api, base) = stack.api(&[]).await?;

    let (status, answer) =
        sign_up(&base, "before-create", &json!({ "email": "ada@example.com" })).await?;
    assert_eq!((status, &answer["action"]), (200, &json!("Continue")));
    assert_eq!(stack.site.replay(&[]).await?.len(), 1, "answered before the stream held it");

    stack.nats.stop();
    let (status, answer) =
        sign_up(&base, "before-create", &json!({ "email": "eve@example.com" })).await?;
    assert_eq!((status, &answer["action"]), (200, &json!("ShowBlockPage")));
    Ok(())
}

#[tokio::test]
async fn up_answers_while_its_servers_are_away_and_acts_when_they_come() -> anyhow::Result<()> {
    let mut stack = Stack::start_bare("").await?;
    stack.nats.stop();
    stack.postgres.kill();

    let up = stack.site.up().await?;
    let (status, answer) =
        up.sign_up("before-create", &json!({ "email": "ada@example.com" })).await?;
    let ready = http().get(format!("{}/readyz", up.admin)).send().await?;

    assert_eq!((status, &answer["action"]), (200, &json!("Continue")));
    assert_eq!(ready.status(), 200, "degraded, and answering");
    assert_eq!(ready.json::<Value>().await?["status"], "degraded");
    stack.nats.restart().await?;
    stack.postgres.restart().await?;
    eventually(LIMIT, "all three workers have acted", async || -> anyhow::Result<bool> {
        Ok(up.metrics().await?.matches("outcome=\"done\"} 1").count() == 3)
    })
    .await?;
    let metrics = up.metrics().await?;
    assert_names_are_ours_and_stand_once(&metrics);
    // As the manual calls it.
    assert!(metrics.contains("\nvestibule_relay_backlog_events "), "{metrics}");
    Ok(())
}

#[tokio::test]
async fn a_worker_without_its_consumer_says_what_to_run() -> anyhow::Result<()> {
    let stack = Stack::start_bare("").await?;

    let worker = stack.site.run(&["worker", "notify"]).await?;

    assert_eq!(worker.code, 1);
    assert!(worker.stderr.contains("`vestibule migrate`"), "{}", worker.stderr);
    Ok(())
}

/// Connector, workers and approver share nothing but NATS, PostgreSQL and the key.
#[tokio::test]
async fn an_approval_goes_its_way_over_processes_of_their_own() -> anyhow::Result<()> {
    let graph = Graph::start().await?;
    let mut stack = Stack::start_bare(&approvals::approvals(&graph, "")).await?;
    stack.site.set("GRAPH_SECRET", Graph::CLIENT_SECRET);
    stack.site.set("USER", "grace");
    approvals::write_messages(&stack.site)?;
    stack.migrate().await?;
    let (_api, base) = stack.api(&[]).await?;
    let _workers = stack.worker(&[]).await?;

    let waits = (200, approvals::blocked("Bitte warten."));
    assert_eq!(sign_up(&base, "before-create", &approvals::supplier("ada")).await?, waits);
    let request = approvals::waiting(&stack.site).await?;
    let id = request["request"].as_str().context("no id")?;
    let approve = stack.site.run(&["approvals", "approve", id]).await?;
    ensure!(approve.code == 0, "{approve:?}");

    eventually(LIMIT, "there is an account", async || anyhow::Ok(graph.users().len() == 1)).await?;
    eventually(LIMIT, "the archive tells of it", async || {
        Ok::<_, anyhow::Error>(stack.site.replay(&["--kind", "approved"]).await?.len() == 1)
    })
    .await
}
