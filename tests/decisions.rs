//! What decides changes while calls come, and what it asks goes away: nobody who signs up notices.

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU16, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use axum::{
    Json, Router,
    extract::{Path as UrlPath, State},
    http::{HeaderMap, StatusCode},
    response::{IntoResponse, Response},
    routing::get,
};
use serde_json::{Value, json};
use sqlx::{Connection, PgConnection};
use tokio::{net::TcpListener, task::JoinHandle};
use tokio_util::sync::CancellationToken;
use vestibule_testkit::{Postgres, eventually};

use crate::support::{LIMIT, Site, Up, http};

const LISTEN: &str = r#"
[listen]
connector = "127.0.0.1:0"
admin = "127.0.0.1:0"
"#;

const CREDENTIAL: &str = r#"
[[connectors.partners.credentials]]
user = "entra"
password = "example:try-me"
"#;

/// A service on this machine that tells the tier of a customer, whom it knows by address.
#[derive(Clone)]
struct Service {
    url: String,
    /// What it answers with.
    status: Arc<AtomicU16>,
}

/// A part of the service's answers that nobody asked for.
const UNASKED: &str = "unasked-4711";

impl Service {
    async fn start() -> anyhow::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let url = format!("http://{}", listener.local_addr()?);
        let service = Self { url, status: Arc::new(AtomicU16::new(200)) };
        let router =
            Router::new().route("/{tier}/{email}", get(Self::answer)).with_state(service.clone());
        // The task ends with the runtime of the test.
        tokio::spawn(async move { axum::serve(listener, router).await });
        Ok(service)
    }

    async fn answer(
        State(service): State<Self>,
        UrlPath((tier, _)): UrlPath<(String, String)>,
        headers: HeaderMap,
    ) -> Response {
        let key = headers.get("x-key").and_then(|it| it.to_str().ok());
        match service.status.load(Ordering::SeqCst) {
            200 => {
                let customer = json!({ "tier": tier, "asked_with": key });
                Json(json!({ "customer": customer, "more": UNASKED })).into_response()
            }
            other => StatusCode::from_u16(other).unwrap_or_default().into_response(),
        }
    }

    fn answers_with(&self, status: u16) {
        self.status.store(status, Ordering::SeqCst);
    }
}

/// Somebody whom nobody has seen before, so that no answer repeats an earlier one.
fn somebody(domain: &str) -> String {
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    format!("p{}@{domain}", NUMBER.fetch_add(1, Ordering::Relaxed))
}

async fn answer_for(up: &Up, person: &Value) -> anyhow::Result<Value> {
    let (status, answer) = up.sign_up("before-create", person).await?;
    let expected = if answer["action"] == "ValidationError" { 400 } else { 200 };
    ensure!(status == expected, "{status} {answer}");
    Ok(answer)
}

async fn answer_at(up: &Up, domain: &str) -> anyhow::Result<Value> {
    answer_for(up, &json!({ "email": somebody(domain) })).await
}

/// Waits until people of a domain are answered with `value` under `member`.
async fn takes_hold(up: &Up, domain: &str, member: &str, value: &str) -> anyhow::Result<()> {
    let what = format!("{member} is {value}");
    eventually(LIMIT, &what, async || {
        let answer = answer_at(up, domain).await?;
        ensure!(answer[member] == value, "{answer}");
        anyhow::Ok(true)
    })
    .await
}

async fn reloads(up: &Up, outcome: &str) -> anyhow::Result<f64> {
    let name = "vestibule_configuration_reloads_total";
    up.metric(&format!("{name}{{outcome=\"{outcome}\"}}")).await
}

/// Calls one after the other, until told to stop.
struct Calling {
    stop: CancellationToken,
    task: JoinHandle<anyhow::Result<u64>>,
}

impl Calling {
    fn start(up: &Up) -> Self {
        let stop = CancellationToken::new();
        let (base, stopped) = (up.base.clone(), stop.clone());
        let task = tokio::spawn(async move {
            let client = http();
            let mut calls = 0;
            while !stopped.is_cancelled() {
                let url = format!("{base}/connectors/partners/before-create");
                let call = client.post(url).basic_auth("entra", Some("try-me"));
                let answer = call.json(&json!({ "email": somebody("example.org") })).send().await?;
                let status = answer.status();
                let answer: Value = answer.json().await?;
                ensure!(status == 200 && answer["action"] == "Continue", "{status} {answer}");
                calls += 1;
            }
            Ok(calls)
        });
        Self { stop, task }
    }

    /// How many calls there were; fails if one of them did.
    async fn stop(self) -> anyhow::Result<u64> {
        self.stop.cancel();
        self.task.await?
    }
}

#[tokio::test]
async fn rules_lists_messages_and_lookups_change_while_calls_come_and_none_fails()
-> anyhow::Result<()> {
    let service = Service::start().await?;
    let config = format!(
        r#"{LISTEN}
[messages]

[lists.banned]
file = "banned.txt"

[lookups.crm]
url = "{}/old-tier/{{email}}"
arguments = {{ email = "signup.email" }}
headers = {{ x-key = "file:crm.key" }}
fields = {{ tier = "/customer/tier", key = "/customer/asked_with" }}
time_limit = "10s"
allow_private = true

[connectors.partners]
deadline = "10s"
{CREDENTIAL}
[[connectors.partners.rules]]
name = "banned"
when = "signup.email_domain in lists.banned"
block = "message:banned"

[[connectors.partners.rules]]
name = "tier"
when = "lookups.crm.found"
set = {{ jobTitle = "lookups.crm.tier", department = "lookups.crm.key" }}

[[connectors.partners.rules]]
name = "city"
set = {{ city = "'Vienna'" }}
"#,
        service.url
    );
    let site = Site::with_config(&config)?;
    site.write("banned.txt", "spam.example\n")?;
    site.write("crm.key", "old-key\n")?;
    site.write("messages/en.toml", "banned = \"Not here.\"\n")?;
    let up = site.up().await?;
    assert_eq!(answer_at(&up, "spam.example").await?["userMessage"], "Not here.");
    let answer = answer_at(&up, "example.org").await?;
    assert_eq!((&answer["jobTitle"], &answer["city"]), (&json!("old-tier"), &json!("Vienna")));
    let calling = Calling::start(&up);

    let config = config.replace("'Vienna'", "'Graz'");
    site.write("vestibule.toml", &config)?;
    takes_hold(&up, "example.org", "city", "Graz").await?;

    site.write("banned.txt", "spam.example\nexample.net\n")?;
    takes_hold(&up, "example.net", "userMessage", "Not here.").await?;

    site.write("messages/en.toml", "banned = \"Not today.\"\n")?;
    takes_hold(&up, "spam.example", "userMessage", "Not today.").await?;

    site.write("messages/de.toml", "banned = \"Heute nicht.\"\n")?;
    eventually(LIMIT, "another language is spoken", async || {
        let person = json!({ "email": somebody("spam.example"), "ui_locales": "de-AT" });
        anyhow::Ok(answer_for(&up, &person).await?["userMessage"] == "Heute nicht.")
    })
    .await?;

    site.write("vestibule.toml", &config.replace("/old-tier/", "/new-tier/"))?;
    takes_hold(&up, "example.org", "jobTitle", "new-tier").await?;

    site.write("crm.key", "new-key\n")?;
    takes_hold(&up, "example.org", "department", "new-key").await?;

    let calls = calling.stop().await?;
    assert!(calls > 20, "only {calls} calls while it changed");
    assert!(reloads(&up, "taken").await? >= 6.0);
    assert_eq!(reloads(&up, "refused").await?, 0.0);
    let said = up.process.stderr();
    assert!(!said.contains("next start"), "nothing else has changed: {said}");
    Ok(())
}

#[tokio::test]
async fn a_bad_change_is_refused_with_its_place_and_the_old_one_stays() -> anyhow::Result<()> {
    let config = format!(
        r#"
[listen]
connector = "127.0.0.1:0"

[connectors.partners]
deadline = "10s"
{CREDENTIAL}
[[connectors.partners.rules]]
name = "city"
when = "signup.email != ''"
set = {{ city = "'Vienna'" }}
"#
    );
    let mut site = Site::with_config(&config)?;
    // What the command line overrides has not changed because the file says something else.
    site.set("VESTIBULE_ADMIN", "127.0.0.1:0");
    site.set("VESTIBULE_DATA", "./elsewhere");
    let mut up = site.up().await?;

    let line = config[..config.find("when =").context("a rule")?].lines().count() + 1;
    site.write("vestibule.toml", &config.replace("signup.email !=", "signup.emial !="))?;
    let said =
        up.process.wait_for_line(LIMIT, |line| line.contains("what was in force stays")).await?;
    let place = format!("vestibule.toml:{line}:8: connectors.partners.rules[0].when: ");
    assert!(said.contains(&place), "{place} is not in {said}");
    assert_eq!(reloads(&up, "refused").await?, 1.0);
    assert_eq!(reloads(&up, "taken").await?, 0.0);
    assert_eq!(up.metric("vestibule_configuration_refused").await?, 1.0);
    assert_eq!(answer_at(&up, "example.org").await?["city"], "Vienna");

    // Mended by a file that only the refused configuration names.
    let listed = config.replace("signup.email != ''", "signup.email_domain in lists.towns");
    let listed = format!("{listed}\n[lists.towns]\nfile = \"towns.txt\"\n");
    site.write("vestibule.toml", &listed.replace("'Vienna'", "'Graz'"))?;
    up.process.wait_for_line(LIMIT, |line| line.contains("could not load the list")).await?;
    assert_eq!(answer_at(&up, "graz.example").await?["city"], "Vienna");
    site.write("towns.txt", "graz.example\n")?;
    takes_hold(&up, "graz.example", "city", "Graz").await?;
    assert_eq!(reloads(&up, "refused").await?, 2.0, "said once, however often it was tried");
    assert_eq!(up.metric("vestibule_configuration_refused").await?, 0.0);

    // A signal has it looked at, whether or not anything has changed.
    let taken = reloads(&up, "taken").await?;
    up.process.hangup();
    eventually(LIMIT, "it was looked at", async || {
        anyhow::Ok(reloads(&up, "taken").await? == taken + 1.0)
    })
    .await?;
    assert!(!up.process.stderr().contains("next start"), "{}", up.process.stderr());

    let slower = config.replace("deadline = \"10s\"", "deadline = \"11s\"");
    site.write("vestibule.toml", &slower)?;
    up.process.wait_for_line(LIMIT, |line| line.contains("at the next start")).await?;
    takes_hold(&up, "graz.example", "city", "Vienna").await?;
    assert!(up.process.is_running());
    Ok(())
}

/// Writes a configuration as Kubernetes does: into a folder of its own, to which a link then points.
fn deploy(site: &Path, version: &str, config: &str, message: &str) -> anyhow::Result<()> {
    use std::os::unix::fs::symlink;
    let folder = site.join(version);
    std::fs::create_dir_all(folder.join("messages"))?;
    std::fs::write(folder.join("vestibule.toml"), config)?;
    std::fs::write(folder.join("messages/en.toml"), format!("no = \"{message}\"\n"))?;
    symlink(version, site.join("..data_tmp"))?;
    Ok(std::fs::rename(site.join("..data_tmp"), site.join("..data"))?)
}

#[tokio::test]
async fn a_folder_that_is_swapped_as_kubernetes_does_it_takes_hold() -> anyhow::Result<()> {
    use std::os::unix::fs::symlink;
    let config = format!(
        r#"{LISTEN}
[messages]

[connectors.partners]
deadline = "10s"
{CREDENTIAL}
[[connectors.partners.rules]]
name = "city"
when = "signup.email_domain == 'example.org'"
set = {{ city = "'Vienna'" }}

[[connectors.partners.rules]]
name = "no"
when = "signup.email_domain == 'spam.example'"
block = "message:no"
"#
    );
    let site = Site::with_config(&config)?;
    std::fs::remove_file(site.path().join("vestibule.toml"))?;
    deploy(site.path(), "..1", &config, "Not here.")?;
    symlink("..data/vestibule.toml", site.path().join("vestibule.toml"))?;
    symlink("..data/messages", site.path().join("messages"))?;
    let up = site.up().await?;
    assert_eq!(answer_at(&up, "example.org").await?["city"], "Vienna");

    // As long as before: it is not the size that tells.
    deploy(site.path(), "..2", &config.replace("Vienna", "Geneva"), "Not here.")?;
    std::fs::remove_dir_all(site.path().join("..1"))?;
    takes_hold(&up, "example.org", "city", "Geneva").await?;

    deploy(site.path(), "..3", &config.replace("Vienna", "Geneva"), "Go there.")?;
    std::fs::remove_dir_all(site.path().join("..2"))?;
    takes_hold(&up, "spam.example", "userMessage", "Go there.").await?;
    assert_eq!(reloads(&up, "refused").await?, 0.0);
    Ok(())
}

/// Which lookups were asked for an event, and what came of it.
fn lookups(event: &Value) -> Vec<(String, String, Option<String>)> {
    let text = |it: &Value| it.as_str().map(str::to_owned);
    let reasons = event["data"]["decision"]["lookups"].as_array().cloned().unwrap_or_default();
    let reason = |it: &Value| {
        let (lookup, answer) = (text(&it["lookup"]), text(&it["answer"]));
        (lookup.unwrap_or_default(), answer.unwrap_or_default(), text(&it["from"]))
    };
    reasons.iter().map(reason).collect()
}

/// What came of the only lookup of the last event.
async fn last_lookup(site: &Site) -> anyhow::Result<(String, Option<String>)> {
    let events = site.replay(&[]).await?;
    let mut asked = lookups(events.last().context("there is no event")?);
    ensure!(asked.len() == 1, "{asked:?}");
    let (_, answer, from) = asked.remove(0);
    Ok((answer, from))
}

fn came(answer: &str, from: &str) -> (String, Option<String>) {
    (answer.to_owned(), (!from.is_empty()).then(|| from.to_owned()))
}

#[tokio::test]
async fn with_its_database_gone_answers_are_stale_or_fall_back_and_come_in_time()
-> anyhow::Result<()> {
    let mut postgres = Postgres::start().await?;
    let mut database = PgConnection::connect(&postgres.url()).await?;
    sqlx::raw_sql(
        "CREATE TABLE banned (domain text); INSERT INTO banned VALUES ('spam.example'); \
         CREATE TABLE customers (email text, tier text); \
         INSERT INTO customers VALUES ('ada@example.org', 'platinum-4711')",
    )
    .execute(&mut database)
    .await?;
    database.close().await?;
    postgres.stop();
    let mut site = Site::with_config(&format!(
        r#"{LISTEN}
[lists.banned]
database = "env:CRM"
query = "SELECT domain FROM banned"
refresh = "1s"

# Longer than the deadline: the deadline counts all the same.
[lookups.crm]
database = "env:CRM"
query = "SELECT tier FROM customers WHERE email = $1"
arguments = ["signup.email"]
fresh = "1ms"
time_limit = "6s"
breaker_failures = 3
breaker_pause = "1s"

[connectors.partners]
deadline = "2s"
{CREDENTIAL}
[[connectors.partners.rules]]
name = "banned"
when = "signup.email_domain in lists.banned"
block = "Not here."
on_error = "block"
on_error_message = "Not now."

[[connectors.partners.rules]]
name = "customers"
steps = ["before-create"]
when = "lookups.crm.found && lookups.crm.tier.startsWith('platinum')"
set = {{ jobTitle = "'Customer'" }}
on_error = "reject"
on_error_message = "Please try again."
"#
    ))?;
    site.set("CRM", &postgres.url());
    site.set("VESTIBULE_LOG", "debug");
    // A database that is away is no reason not to start.
    let mut up = site.up().await?;
    // Ada is somebody whom the database knows; what she fills in makes each a sign-up of its own.
    let ada = |city: &str| json!({ "email": "ada@example.org", "city": city });
    let mut slowest = Duration::ZERO;
    let mut timed = async |person: Value| {
        let began = Instant::now();
        let answer = answer_for(&up, &person).await?;
        slowest = slowest.max(began.elapsed());
        anyhow::Ok(answer)
    };

    let answer = timed(json!({ "email": somebody("spam.example") })).await?;
    assert_eq!(answer["userMessage"], "Not now.", "the list is not there yet");

    postgres.restart().await?;
    takes_hold(&up, "spam.example", "userMessage", "Not here.").await?;
    assert_eq!(timed(ada("Vienna")).await?["jobTitle"], "Customer");
    assert_eq!(last_lookup(&site).await?, came("found", "source"));
    assert_eq!(timed(json!({ "email": somebody("example.org") })).await?["action"], "Continue");
    assert_eq!(last_lookup(&site).await?, came("not-found", "source"));

    // It hangs.
    postgres.pause();
    assert_eq!(timed(ada("Graz")).await?["jobTitle"], "Customer");
    assert_eq!(last_lookup(&site).await?, came("found", "stale"));
    let answer = timed(json!({ "email": somebody("example.org") })).await?;
    assert_eq!(answer["userMessage"], "Please try again.");
    assert_eq!(last_lookup(&site).await?, came("late", ""));
    let answer = timed(json!({ "email": somebody("spam.example") })).await?;
    assert_eq!(answer["userMessage"], "Not here.", "the list is still in force");

    // It is gone.
    postgres.kill();
    assert_eq!(timed(ada("Linz")).await?["jobTitle"], "Customer");
    assert_eq!(last_lookup(&site).await?, came("found", "stale"));
    eventually(LIMIT, "it is left alone", async || {
        let answer = timed(json!({ "email": somebody("example.org") })).await?;
        ensure!(answer["userMessage"] == "Please try again.", "{answer}");
        anyhow::Ok(last_lookup(&site).await? == came("open", ""))
    })
    .await?;

    postgres.restart().await?;
    let mut number = 0;
    eventually(LIMIT, "it is asked again", async || {
        number += 1;
        let answer = timed(ada(&format!("town {number}"))).await?;
        ensure!(answer["jobTitle"] == "Customer", "{answer}");
        anyhow::Ok(last_lookup(&site).await? == came("found", "source"))
    })
    .await?;

    assert!(slowest < Duration::from_secs(6), "an answer took {slowest:?}, the deadline is 2s");
    let late = "refused-without-storage";
    assert!(!up.metrics().await?.contains(late), "an answer came without its event");
    let events = serde_json::to_string(&site.replay(&[]).await?)?;
    assert!(!events.contains("platinum"), "what a lookup answered is in an event");
    let stopped = up.process.terminate(LIMIT).await?;
    assert!(!stopped.stderr.contains("platinum") && !stopped.stderr.contains("ada@"));
    Ok(())
}

#[tokio::test]
async fn what_a_service_answers_decides_and_stays_between_us() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let config = format!(
        r#"{LISTEN}
[lookups.crm]
url = "{}/gold/{{email}}"
arguments = {{ email = "signup.email" }}
fields = {{ tier = "/customer/tier" }}
fresh = "1ms"
stale = "1ms"
time_limit = "5s"
allow_private = true

[connectors.partners]
deadline = "5s"
{CREDENTIAL}
[[connectors.partners.rules]]
name = "known-already"
when = "lookups.crm.found && lookups.crm.tier == 'gold'"
block = "You are here already."
on_error = "reject"
on_error_message = "Please try again."
"#,
        service.url.replace("127.0.0.1", "localhost")
    );
    let mut site = Site::with_config(&config)?;
    site.set("VESTIBULE_LOG", "debug");
    let mut up = site.up().await?;

    for (status, message, reason) in [
        (200, json!("You are here already."), came("found", "source")),
        (404, Value::Null, came("not-found", "source")),
        (503, json!("Please try again."), came("unavailable", "")),
    ] {
        service.answers_with(status);
        assert_eq!(answer_at(&up, "example.org").await?["userMessage"], message, "{status}");
        assert_eq!(last_lookup(&site).await?, reason, "{status}");
    }
    service.answers_with(200);
    site.write("vestibule.toml", &config.replace("allow_private = true", ""))?;
    eventually(LIMIT, "a private address is not asked any more", async || {
        answer_at(&up, "example.org").await?;
        anyhow::Ok(last_lookup(&site).await? == came("private-address", ""))
    })
    .await?;

    let events = serde_json::to_string(&site.replay(&[]).await?)?;
    assert!(!events.contains("gold"), "what a lookup answered is in an event");
    let stopped = up.process.terminate(LIMIT).await?;
    for (what, text) in [("an event", &events), ("the log", &stopped.stderr)] {
        assert!(!text.contains(UNASKED), "what a service answered is in {what}");
    }
    assert!(!stopped.stderr.contains("@example.org"), "an address is in the log");
    Ok(())
}

#[tokio::test]
async fn a_lookup_that_can_never_be_asked_is_told_at_the_start_without_its_secret()
-> anyhow::Result<()> {
    let start = async |lookup: &str| {
        let mut site = Site::with_config(&format!(
            r#"{LISTEN}
[lookups.crm]
{lookup}

[connectors.partners]
deadline = "10s"
{CREDENTIAL}
[[connectors.partners.rules]]
name = "known"
when = "lookups.crm.found"
block = "Not here."
"#
        ))?;
        site.set("CRM", "oracle://scott:tiger@db");
        site.run(&["up"]).await
    };

    for (lookup, said) in [
        ("database = \"env:NOWHERE\"\nquery = \"SELECT 1\"", "NOWHERE is not set"),
        ("database = \"env:CRM\"\nquery = \"SELECT 1\"", "postgres://"),
        ("url = \"http://127.0.0.1:1/x\"", "unless `allow_private` is set"),
    ] {
        let up = start(lookup).await?;
        assert_eq!(up.code, 1, "{lookup}");
        assert!(up.stderr.contains(said) && up.stderr.contains("crm"), "{}", up.stderr);
        assert!(!up.stderr.contains("tiger"), "a password is told");
    }
    Ok(())
}
