//! Dead letters and paused workers, as an operator deals with them: looked at, sent back once the
//! target is mended, dropped, and nothing lost or done twice whatever is killed meanwhile.

use std::{
    collections::HashMap,
    net::Ipv4Addr,
    ops::Range,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use anyhow::{Context, ensure};
use axum::{
    Router,
    extract::State,
    http::{HeaderMap, StatusCode},
    routing::post,
};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use vestibule_testkit::{Process, eventually};

use crate::{
    scaled_out::Stack,
    support::{EXAMPLE, Finished, LIMIT, Site, Up, http},
};

/// A chat that refuses every message until it is mended.
struct Target {
    url: String,
    calls: Arc<Calls>,
}

#[derive(Default)]
struct Calls {
    mended: AtomicBool,
    /// How often each message was taken, by its key.
    taken: Mutex<HashMap<String, u32>>,
}

impl Target {
    async fn start() -> anyhow::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let url = format!("http://{}/", listener.local_addr()?);
        let calls = Arc::<Calls>::default();
        let routes = Router::new().route("/", post(take)).with_state(Arc::clone(&calls));
        tokio::spawn(async move { axum::serve(listener, routes).await });
        Ok(Self { url, calls })
    }

    fn mend(&self) {
        self.calls.mended.store(true, Ordering::SeqCst);
    }

    fn taken(&self) -> MutexGuard<'_, HashMap<String, u32>> {
        self.calls.taken()
    }
}

impl Calls {
    fn taken(&self) -> MutexGuard<'_, HashMap<String, u32>> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn take(State(calls): State<Arc<Calls>>, headers: HeaderMap) -> StatusCode {
    let key = headers.get("idempotency-key").and_then(|it| it.to_str().ok());
    match key {
        Some(key) if calls.mended.load(Ordering::SeqCst) => {
            *calls.taken().entry(key.to_owned()).or_default() += 1;
            StatusCode::OK
        }
        // Refused for good, so the worker parks it at once.
        _ => StatusCode::NOT_FOUND,
    }
}

const CHANNEL: &str = r#"
[[workers.notify.channels]]
name = "ops"
kind = "webhook"
format = "json"
url = "env:OPS_URL"
subject = "Somebody has signed up"
body = "{{ signup.connector }}"
"#;

/// What a worker had in hand when it was killed is taken up soon.
const SOON: &str = "[workers.notify]\nack_wait = \"5s\"\n";

async fn site(more: &str) -> anyhow::Result<(Site, Target)> {
    let target = Target::start().await?;
    let mut site = Site::new(&[CHANNEL, more].concat())?;
    site.set("OPS_URL", &target.url);
    site.set("USER", "grace");
    Ok((site, target))
}

/// A site with so many letters of the worker `notify`.
async fn site_with_letters(more: &str, count: usize) -> anyhow::Result<(Site, Target, Up)> {
    let (site, target) = site(more).await?;
    let up = site.up().await?;
    sign_up_many(&up.base, 0..count).await?;
    wait_for(&site, "parked", count).await?;
    Ok((site, target, up))
}

async fn sign_up_many(base: &str, people: Range<usize>) -> anyhow::Result<()> {
    let client = http();
    let url = format!("{base}/connectors/partners/before-create");
    for n in people {
        let person = json!({ "email": format!("ada-{n}@example.com"), "surname": "Lovelace" });
        let call = client.post(&url).basic_auth("entra", Some("try-me")).json(&person);
        let answer: Value = call.send().await?.error_for_status()?.json().await?;
        ensure!(answer["action"] == "Continue", "{answer}");
    }
    Ok(())
}

async fn run(site: &Site, arguments: &[&str]) -> anyhow::Result<Finished> {
    let finished = site.run(arguments).await?;
    ensure!(finished.code == 0, "{arguments:?}: {finished:?}");
    Ok(finished)
}

async fn json_of(site: &Site, arguments: &[&str]) -> anyhow::Result<Value> {
    let finished = run(site, &[arguments, &["--output", "json"]].concat()).await?;
    Ok(serde_json::from_str(&finished.stdout)?)
}

/// How many letters are in this state.
async fn count(site: &Site, state: &str) -> anyhow::Result<usize> {
    let groups = json_of(site, &["dead", "list", "--state", state]).await?;
    let groups = groups.as_array().context("no list")?;
    let counts = groups.iter().map(|it| it["letters"].as_u64().context("no count"));
    let sum: u64 = counts.sum::<anyhow::Result<u64>>()?;
    Ok(usize::try_from(sum)?)
}

async fn wait_for(site: &Site, state: &str, wanted: usize) -> anyhow::Result<()> {
    eventually(LIMIT, &format!("{wanted} letters are {state}"), async || {
        anyhow::Ok(count(site, state).await? == wanted)
    })
    .await
}

async fn letters(site: &Site, state: &str) -> anyhow::Result<Vec<Value>> {
    let list = ["dead", "list", "--letters", "--limit", "500", "--state", state];
    Ok(json_of(site, &list).await?.as_array().context("no list")?.clone())
}

async fn show(site: &Site, letter: &Value) -> anyhow::Result<Value> {
    json_of(site, &["dead", "show", &letter["letter"].to_string()]).await
}

/// What happened to a letter, in order.
fn states(shown: &Value) -> Vec<&str> {
    let history = shown["history"].as_array().map(Vec::as_slice).unwrap_or_default();
    history.iter().filter_map(|it| it["state"].as_str()).collect()
}

/// What waits for a worker, as `worker list` tells.
async fn worker(site: &Site, name: &str) -> anyhow::Result<Value> {
    let workers = json_of(site, &["worker", "list"]).await?;
    let workers = workers.as_array().context("no list")?;
    Ok(workers.iter().find(|it| it["worker"] == name).cloned().unwrap_or_default())
}

/// Waits until so many events wait for a worker or are in its hands; what is said of it then.
async fn wait_for_undone(site: &Site, name: &str, wanted: u64) -> anyhow::Result<Value> {
    eventually(LIMIT, &format!("{wanted} events wait for {name}"), async || {
        let it = worker(site, name).await?;
        let undone = [&it["waiting"], &it["in_hand"], &it["retries"]].map(Value::as_u64);
        let undone: Option<u64> = undone.into_iter().sum();
        anyhow::Ok((undone == Some(wanted)).then_some(it))
    })
    .await
}

async fn wait_for_taken(target: &Target, wanted: usize) -> anyhow::Result<()> {
    eventually(LIMIT, &format!("{wanted} messages are taken"), async || {
        target.taken().len() >= wanted
    })
    .await
}

#[tokio::test]
async fn letters_are_listed_shown_and_once_mended_delivered_once() -> anyhow::Result<()> {
    let (site, target, _up) = site_with_letters("", 5).await?;

    let list = run(&site, &["dead", "list"]).await?.stdout;
    for part in ["notify", "refused", " 5 ", "the webhook answered 404"] {
        assert!(list.contains(part), "{part} is not in\n{list}");
    }
    let hint = list.lines().find(|it| it.contains("dead retry")).context("no command")?;
    let retry: Vec<_> = hint.split_whitespace().skip(1).collect();
    let parked = letters(&site, "parked").await?;
    let id = parked[0]["letter"].to_string();
    let table = run(&site, &["dead", "show", &id]).await?.stdout;
    assert!(table.contains(&format!("vestibule dead retry {id}")), "{table}");
    assert!(!table.contains("example.com") && !table.contains("Lovelace"), "{table}");
    let with_event = run(&site, &["dead", "show", &id, "--event"]).await?.stdout;
    assert!(with_event.contains("@example.com"), "{with_event}");

    let dry = run(&site, &[&retry[..], &["--dry-run"]].concat()).await?.stdout;
    assert!(dry.contains("nothing was changed"), "{dry}");
    assert_eq!(count(&site, "parked").await?, 5);

    target.mend();
    let sent = run(&site, &retry).await?.stdout;
    assert!(sent.contains("5 dead letters sent back"), "{sent}");
    wait_for(&site, "delivered", 5).await?;
    for letter in letters(&site, "delivered").await? {
        let shown = show(&site, &letter).await?;
        assert_eq!(states(&shown), ["parked", "retrying", "delivered"], "{shown:#}");
        assert_eq!(shown["history"][1]["by"], "grace");
        assert_eq!(shown["attempts"].as_array().map(Vec::len), Some(1), "{shown:#}");
        assert_eq!(shown["payload"], Value::Null, "the event is shown only when asked for");
    }
    assert_eq!(target.taken().values().copied().collect::<Vec<_>>(), [1; 5]);
    assert_eq!(json_of(&site, &["dead", "list"]).await?, json!([]));
    Ok(())
}

#[tokio::test]
async fn what_is_sent_back_too_early_is_parked_again_with_its_history() -> anyhow::Result<()> {
    let (site, target, _up) = site_with_letters("", 1).await?;
    let letter = &letters(&site, "parked").await?[0];
    let id = letter["letter"].to_string();

    run(&site, &["dead", "retry", &id]).await?;
    eventually(LIMIT, "it is parked again", async || {
        anyhow::Ok(states(&show(&site, letter).await?) == ["parked", "retrying", "parked"])
    })
    .await?;
    target.mend();
    run(&site, &["dead", "retry", &id, "--by", "heidi"]).await?;
    wait_for(&site, "delivered", 1).await?;

    let shown = show(&site, letter).await?;
    assert_eq!(states(&shown), ["parked", "retrying", "parked", "retrying", "delivered"]);
    assert_eq!(
        (&shown["history"][1]["by"], &shown["history"][3]["by"]),
        (&json!("grace"), &json!("heidi"))
    );
    assert_eq!(shown["attempts"].as_array().map(Vec::len), Some(2), "{shown:#}");
    let again = site.run(&["dead", "retry", &id]).await?;
    assert_eq!(again.code, 1);
    assert!(again.stderr.contains(&format!("letter {id} is delivered")), "{}", again.stderr);
    Ok(())
}

#[tokio::test]
async fn whatever_ends_a_redrive_each_letter_is_delivered_once_or_still_parked()
-> anyhow::Result<()> {
    const ALL: usize = 300;
    let (site, target, _up) = site_with_letters("", ALL).await?;
    target.mend();
    let slowly = ["dead", "retry", "--worker", "notify", "--rate", "40/s", "--yes"];

    let mut interrupted = Process::spawn(&site.command(&slowly))?;
    wait_for_taken(&target, 20).await?;
    let stopped = interrupted.interrupt(LIMIT).await?;
    assert_eq!(stopped.status.code(), Some(1), "{stopped:?}");
    let said = stopped.stdout.lines().find(|it| it.starts_with("stopped: ")).context("not said")?;
    let sent: usize = said.split(' ').nth(1).context("no number")?.parse()?;
    wait_for(&site, "delivered", sent).await?;
    assert_eq!(count(&site, "parked").await?, ALL - sent);
    assert!(
        stopped.stdout.contains(&format!("{} of those that fit are still parked", ALL - sent)),
        "{}",
        stopped.stdout
    );

    let mut killed = Process::spawn(&site.command(&slowly))?;
    wait_for_taken(&target, sent + 50).await?;
    killed.kill();
    wait_for(&site, "retrying", 0).await?;
    let (delivered, parked) = (count(&site, "delivered").await?, count(&site, "parked").await?);
    assert_eq!(delivered + parked, ALL);
    assert!(parked > 0 && delivered >= sent + 50, "{delivered} delivered, {parked} parked");
    assert_eq!(target.taken().len(), delivered);

    run(&site, &["dead", "retry", "--all", "--rate", "2000/s", "--yes"]).await?;
    wait_for(&site, "delivered", ALL).await?;
    assert_eq!(target.taken().len(), ALL);
    assert!(target.taken().values().all(|it| *it == 1), "a message was sent twice");
    Ok(())
}

#[tokio::test]
async fn a_worker_killed_in_the_middle_of_a_redrive_leaves_nothing_undone() -> anyhow::Result<()> {
    const ALL: usize = 200;
    let (site, target, mut up) = site_with_letters(SOON, ALL).await?;
    target.mend();

    let mut retry = Process::spawn(&site.command(&["dead", "retry", "--all", "--rate", "200/s"]))?;
    wait_for_taken(&target, 40).await?;
    up.process.kill();
    let stopped = retry.wait(LIMIT).await?;
    assert!(stopped.status.success(), "{stopped:?}");
    let _up = site.up().await?;

    wait_for(&site, "delivered", ALL).await?;
    // What was sent when the process died is sent again, under the same key.
    assert_eq!(target.taken().len(), ALL);
    Ok(())
}

#[tokio::test]
async fn what_is_dropped_is_kept_with_who_and_why_and_never_tried_again() -> anyhow::Result<()> {
    let (site, target, _up) = site_with_letters("", 3).await?;
    let parked = letters(&site, "parked").await?;
    let id = parked[0]["letter"].to_string();

    let unreasonable = site.run(&["dead", "drop", &id, "--reason", " "]).await?;
    let vague = site.run(&["dead", "drop", "--reason", "a test"]).await?;
    let mistyped = site.run(&["dead", "drop", &id, "9999", "--reason", "a test"]).await?;
    assert_eq!((unreasonable.code, vague.code, mistyped.code), (2, 2, 1));
    assert!(mistyped.stderr.contains("there is no letter 9999"), "{}", mistyped.stderr);
    let dry = ["dead", "drop", "--all", "--reason", "a test", "--dry-run"];
    run(&site, &dry).await?;
    let unasked = site.run(&["dead", "drop", "--all", "--reason", "a test"]).await?;
    assert_eq!(unasked.code, 1);
    assert!(unasked.stderr.contains("--yes"), "{}", unasked.stderr);
    assert_eq!(count(&site, "parked").await?, 3);
    run(&site, &["dead", "drop", &id, "--reason", "a test"]).await?;

    target.mend();
    let sent = json_of(&site, &["dead", "retry", "--all"]).await?;
    assert_eq!((&sent["meant"], &sent["sent_back"]), (&json!(2), &json!(2)));
    wait_for(&site, "delivered", 2).await?;
    let shown = show(&site, &parked[0]).await?;
    assert_eq!(states(&shown), ["parked", "dropped"]);
    let change = &shown["history"][1];
    assert_eq!((&change["by"], &change["reason"]), (&json!("grace"), &json!("a test")));
    assert_eq!(target.taken().len(), 2);
    Ok(())
}

#[tokio::test]
async fn what_no_version_can_read_is_parked_and_stays_so() -> anyhow::Result<()> {
    let (site, target) = site("").await?;
    target.mend();
    let mut up = site.up().await?;
    sign_up_many(&up.base, 0..1).await?;
    up.process.terminate(LIMIT).await?;
    let log = format!("sqlite://{}?mode=rw", site.data().join("events.db").display());
    let log = sqlx::SqlitePool::connect(&log).await?;
    sqlx::query("INSERT INTO events (sequence, event) VALUES (2, 'no event')")
        .execute(&log)
        .await?;
    log.close().await;
    let _up = site.up().await?;
    wait_for(&site, "parked", 3).await?;

    let parked = letters(&site, "parked").await?;
    assert!(parked.iter().all(|it| it["cause"] == "undecodable"), "{parked:?}");
    let id = parked[0]["letter"].to_string();
    let shown = run(&site, &["dead", "show", &id, "--event"]).await?.stdout;
    assert!(shown.contains("no event"), "{shown}");
    let retry = site.run(&["dead", "retry", "--all", "--output", "json"]).await?;
    let said: Value = serde_json::from_str(&retry.stdout)?;
    assert_eq!((retry.code, &said["sent_back"]), (1, &json!(0)));
    assert_eq!(said["unreadable"].as_array().map(Vec::len), Some(3), "{said}");
    assert_eq!(count(&site, "parked").await?, 3);
    Ok(())
}

#[tokio::test]
async fn a_paused_worker_keeps_its_backlog_and_resumed_delivers_it() -> anyhow::Result<()> {
    let (site, target) = site("").await?;
    target.mend();
    let mut up = site.up().await?;
    sign_up_many(&up.base, 0..1).await?;
    wait_for_taken(&target, 1).await?;

    let paused =
        run(&site, &["worker", "pause", "notify", "--reason", "the channel moves"]).await?;
    assert!(paused.stdout.contains("vestibule worker resume notify"), "{}", paused.stdout);
    eventually(LIMIT, "the process knows", async || {
        anyhow::Ok(up.metrics().await?.contains("vestibule_worker_paused{worker=\"notify\"} 1"))
    })
    .await?;
    sign_up_many(&up.base, 1..4).await?;
    wait_for_undone(&site, "database", 0).await?;
    let waits = wait_for_undone(&site, "notify", 3).await?;
    assert_eq!(
        (&waits["paused"]["by"], &waits["paused"]["reason"]),
        (&json!("grace"), &json!("the channel moves"))
    );
    let list = run(&site, &["worker", "list"]).await?.stdout;
    assert!(list.contains("by grace: the channel moves"), "{list}");

    // Neither a second pause nor a restart changes it.
    let again = run(&site, &["worker", "pause", "notify", "--reason", "other"]).await?;
    assert!(again.stdout.contains("the channel moves"), "{}", again.stdout);
    up.process.terminate(LIMIT).await?;
    let up = site.up().await?;
    sign_up_many(&up.base, 4..5).await?;
    wait_for_undone(&site, "database", 0).await?;
    wait_for_undone(&site, "notify", 4).await?;
    assert_eq!(target.taken().len(), 1);

    run(&site, &["worker", "resume", "notify"]).await?;
    wait_for_taken(&target, 5).await?;
    assert!(target.taken().values().all(|it| *it == 1));
    Ok(())
}

#[tokio::test]
async fn a_redrive_says_what_keeps_its_letters_from_being_taken() -> anyhow::Result<()> {
    let (site, target, _up) = site_with_letters("", 2).await?;
    target.mend();
    run(&site, &["worker", "pause", "notify", "--reason", "the channel moves"]).await?;

    let sent = run(&site, &["dead", "retry", "--all"]).await?;
    assert!(sent.stderr.contains("`notify` is paused (the channel moves)"), "{}", sent.stderr);
    let waits = wait_for_undone(&site, "notify", 2).await?;
    assert_eq!((&waits["retries"], &waits["dead_letters"]), (&json!(2), &json!(0)));
    assert_eq!(count(&site, "retrying").await?, 2);
    assert_eq!(target.taken().len(), 0);

    run(&site, &["worker", "resume", "notify"]).await?;
    wait_for(&site, "delivered", 2).await?;
    assert_eq!(target.taken().len(), 2);
    Ok(())
}

#[tokio::test]
async fn a_worker_that_is_configured_no_more_is_seen_and_removed_with_what_it_left()
-> anyhow::Result<()> {
    let (site, _target, mut up) = site_with_letters("", 2).await?;
    let configured = site.run(&["worker", "remove", "notify", "--yes"]).await?;
    assert_eq!(configured.code, 1);
    assert!(configured.stderr.contains("[workers.notify]"), "{}", configured.stderr);
    let (before, rest) = EXAMPLE.split_once("# Sends notifications.").context("no notify")?;
    let (_, after) = rest.split_once("# Keeps people").context("no database")?;
    site.write("vestibule.toml", &format!("{before}#{after}"))?;

    let in_use = site.run(&["worker", "remove", "notify", "--yes"]).await?;
    assert_eq!(in_use.code, 1);
    assert!(in_use.stderr.contains("stop `vestibule up` first"), "{}", in_use.stderr);
    up.process.terminate(LIMIT).await?;

    let left = worker(&site, "notify").await?;
    assert_eq!((&left["configured"], &left["dead_letters"]), (&json!(false), &json!(2)));
    let sent = run(&site, &["dead", "retry", "--all", "--dry-run"]).await?;
    assert!(sent.stderr.contains("no worker `notify` is configured"), "{}", sent.stderr);
    let unasked = site.run(&["worker", "remove", "notify"]).await?;
    assert_eq!(unasked.code, 1);
    assert!(unasked.stdout.contains("2 dead letters"), "{}", unasked.stdout);
    run(&site, &["worker", "remove", "notify", "--yes"]).await?;

    assert_eq!(worker(&site, "notify").await?, Value::Null);
    assert_eq!(count(&site, "dropped").await?, 2);
    let again = site.run(&["worker", "remove", "notify", "--yes"]).await?;
    assert!(again.stderr.contains("has left nothing behind"), "{}", again.stderr);
    Ok(())
}

#[tokio::test]
async fn over_nats_and_postgresql_it_is_the_same() -> anyhow::Result<()> {
    let target = Target::start().await?;
    let mut stack = Stack::start(&[CHANNEL, SOON].concat()).await?;
    stack.site.set("OPS_URL", &target.url);
    stack.site.set("USER", "grace");
    let site = &stack.site;
    let (_api, base) = stack.api(&[]).await?;
    let mut worker_process = stack.worker(&["notify"]).await?;
    let _others = stack.worker(&["database", "permissions"]).await?;
    sign_up_many(&base, 0..20).await?;
    wait_for(site, "parked", 20).await?;

    target.mend();
    let mut retry = Process::spawn(&site.command(&["dead", "retry", "--all", "--rate", "20/s"]))?;
    wait_for_taken(&target, 3).await?;
    worker_process.kill();
    let mut worker_process = stack.worker(&["notify"]).await?;
    let stopped = retry.wait(LIMIT).await?;
    assert!(stopped.status.success(), "{stopped:?}");
    wait_for(site, "delivered", 20).await?;
    assert_eq!(target.taken().len(), 20);

    run(site, &["worker", "pause", "notify", "--reason", "the channel moves"]).await?;
    worker_process.wait_for_line(LIMIT, |line| line.contains("the worker is paused")).await?;
    sign_up_many(&base, 20..25).await?;
    wait_for_undone(site, "database", 0).await?;
    wait_for_undone(site, "notify", 5).await?;
    run(site, &["worker", "resume", "notify"]).await?;
    wait_for_taken(&target, 25).await?;
    wait_for_undone(site, "notify", 0).await?;

    // The consumer of a worker that is configured no more is deleted by the provisioner.
    let config = std::fs::read_to_string(site.path().join("vestibule.toml"))?;
    site.write("vestibule.toml", &format!("{config}enabled = false\n"))?;
    assert_eq!(worker(site, "notify").await?["configured"], json!(false));
    worker_process.terminate(LIMIT).await?;
    run(site, &["worker", "remove", "notify", "--yes"]).await?;
    assert_eq!(worker(site, "notify").await?, Value::Null);
    Ok(())
}
