//! What people were granted, and what groups, a SCIM service and a database hold of it: however
//! often events come, whatever goes wrong, and whoever is killed meanwhile.

use std::{ops::Range, time::Duration};

use anyhow::{Context, ensure};
use serde_json::{Value, json};
use sqlx::Connection;
use vestibule_events::{LocalLog, LocalLogConfig, Retention};
use vestibule_testkit::{Graph, GraphCall, GraphFault, Scim, eventually};

use crate::support::{Finished, LIMIT, Site, http};

pub(crate) const GROUP: &str = "0e2d6a3c-guests";

/// Longer than what one who was killed had in hand is kept from others.
const LONG: Duration = Duration::from_secs(60);

/// Tries again soon, and gives up what somebody had in hand soon after.
const SOON: &str = r#"
[workers.permissions]
timeout = "2s"
ack_wait = "5s"
retry = { initial = "200ms", max = "1s", tries = 1000 }
"#;

pub(crate) fn group(graph: &Graph) -> String {
    format!(
        r#"
[[workers.permissions.targets]]
name = "entra"
kind = "graph-group"
tenant = "{}"
client_id = "{}"
client_secret = "env:GRAPH_SECRET"
graph_url = "{}"
token_url = "{}"
roles = {{ guest = "{GROUP}" }}
"#,
        Graph::TENANT,
        Graph::CLIENT_ID,
        graph.url(),
        graph.token_url(),
    )
}

/// A group of a SCIM service, and the table `access` of a database.
pub(crate) fn scim_and_sql(scim: &Scim, group: &str) -> String {
    format!(
        r#"
[[workers.permissions.targets]]
name = "crm"
kind = "scim"
url = "{}"
token = "env:SCIM_TOKEN"
roles = {{ guest = "{group}" }}

[[workers.permissions.targets]]
name = "erp"
kind = "sql"
url = "env:ERP"
grant = "INSERT INTO access (email, role) VALUES (:email, :role) ON CONFLICT DO NOTHING"
revoke = "DELETE FROM access WHERE email = :email AND role = :role"
holds = "SELECT 1 FROM access WHERE email = :email AND role = :role"
"#,
        scim.url()
    )
}

async fn site(more: &str) -> anyhow::Result<(Site, Graph)> {
    let graph = Graph::start().await?;
    graph.add_group(GROUP);
    let mut site = Site::new(&[&group(&graph), more].concat())?;
    site.set("GRAPH_SECRET", Graph::CLIENT_SECRET);
    site.set("USER", "grace");
    Ok((site, graph))
}

fn address(n: usize) -> String {
    format!("ada-{n}@example.com")
}

/// People who have accounts by the time they are let in; gives the ids of those.
fn accounts(graph: &Graph, people: Range<usize>) -> Vec<String> {
    let mut ids: Vec<_> = people.map(|n| graph.add_user(&json!({ "mail": address(n) }))).collect();
    ids.sort_unstable();
    ids
}

async fn sign_up(base: &str, people: Range<usize>) -> anyhow::Result<()> {
    let client = http();
    let url = format!("{base}/connectors/partners/before-create");
    for n in people {
        let person = json!({ "email": address(n), "surname": "Lovelace" });
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

async fn diff(site: &Site, more: &[&str]) -> anyhow::Result<(i32, Value)> {
    let arguments = [&["permissions", "diff", "--output", "json"], more].concat();
    let finished = site.run(&arguments).await?;
    let found = serde_json::from_str(&finished.stdout).with_context(|| finished.stderr.clone())?;
    Ok((finished.code, found))
}

/// Waits until so many grants are where they should be, and nothing else.
async fn wait_until_so(site: &Site, compared: usize) -> anyhow::Result<()> {
    eventually(LONG, &format!("{compared} grants are at their targets"), async || {
        let (code, found) = diff(site, &[]).await?;
        anyhow::Ok(code == 0 && found["compared"] == compared)
    })
    .await
}

pub(crate) fn sorted(mut ids: Vec<String>) -> Vec<String> {
    ids.sort_unstable();
    ids
}

/// Everything in the log comes to the worker once more. Nobody may have the log open.
async fn deliver_again(site: &Site) -> anyhow::Result<()> {
    let log = LocalLog::open(LocalLogConfig {
        path: site.data().join("events.db"),
        duplicate_window: Duration::from_secs(600),
        refusal_window: Duration::from_secs(30),
        retention: Retention::For(Duration::from_secs(86_400)),
    })
    .await?;
    log.remove_consumer("permissions").await?;
    Ok(log.close().await?)
}

async fn is_idle(site: &Site) -> anyhow::Result<bool> {
    let list = run(site, &["worker", "list", "--output", "json"]).await?;
    let workers: Vec<Value> = serde_json::from_str(&list.stdout)?;
    let worker = workers.iter().find(|it| it["worker"] == "permissions");
    Ok(worker
        .is_some_and(|it| ["waiting", "in_hand", "retries"].iter().all(|key| it[key] == json!(0))))
}

#[tokio::test]
async fn what_is_granted_is_at_every_target_once_however_often_events_come() -> anyhow::Result<()> {
    const ALL: usize = 6;
    let mut scim = Scim::start().await?;
    let guests = scim.add_group("guests").await?;
    let erp = tempfile::tempdir()?;
    let erp = format!("sqlite:{}", erp.path().join("erp.db").display());
    let mut database = sqlx::SqliteConnection::connect(&format!("{erp}?mode=rwc")).await?;
    let table = "CREATE TABLE access (email text, role text, PRIMARY KEY (email, role))";
    sqlx::raw_sql(table).execute(&mut database).await?;
    let (mut site, graph) = site(&[&scim_and_sql(&scim, &guests), SOON].concat()).await?;
    site.set("SCIM_TOKEN", Scim::TOKEN);
    site.set("ERP", &erp);
    let ids = accounts(&graph, 0..ALL);
    graph.plan(GraphCall::AddMember, GraphFault::Throttle(Some("1")));
    graph.plan(GraphCall::AddMember, GraphFault::Busy("1"));
    scim.refuse_next("PATCH", 503, Some("1")).await?;
    scim.hide_next("POST").await?;

    let mut up = site.up().await?;
    sign_up(&up.base, 0..ALL).await?;
    wait_until_so(&site, 3 * ALL).await?;
    for kill in [true, false, true, false] {
        if kill {
            up.process.kill();
        } else {
            up.process.terminate(LIMIT).await?;
        }
        drop(up);
        deliver_again(&site).await?;
        up = site.up().await?;
        eventually(LIMIT, "all has been dealt with again", async || is_idle(&site).await).await?;
    }

    assert_eq!(sorted(graph.members(GROUP)), ids);
    let addresses: Vec<_> = (0..ALL).map(address).collect();
    assert_eq!(scim.members(&guests).await?, addresses);
    assert_eq!(scim.users().await?.len(), ALL);
    let count = "SELECT count(*) FROM access";
    let rows: i64 = sqlx::query_scalar(count).fetch_one(&mut database).await?;
    assert_eq!(usize::try_from(rows)?, ALL);
    let added =
        graph.requests_of(GraphCall::AddMember).iter().filter(|it| it.status == 204).count();
    assert_eq!(added, ALL, "nobody was added again");

    // Somebody leaves.
    let revoke = ["permissions", "revoke", "ada-0@example.com", "--reason", "left us"];
    let dry = run(&site, &[&revoke[..], &["--dry-run"]].concat()).await?.stdout;
    assert!(dry.contains("guest would be revoked") && !dry.contains("ada-0"), "{dry}");
    assert_eq!(graph.members(GROUP).len(), ALL);
    let revoked = run(&site, &revoke).await?.stdout;
    assert!(revoked.contains("guest revoked") && !revoked.contains("ada-0"), "{revoked}");
    wait_until_so(&site, 3 * ALL).await?;
    assert_eq!(graph.members(GROUP).len(), ALL - 1);
    assert_eq!(scim.members(&guests).await?, addresses[1..]);
    let rows: i64 = sqlx::query_scalar(count).fetch_one(&mut database).await?;
    assert_eq!(usize::try_from(rows)?, ALL - 1);
    let list = run(&site, &["permissions", "list", "--person", "ada-0@example.com"]).await?.stdout;
    for part in ["guest", "revoked", "entra: absent", "crm: absent", "erp: absent"] {
        assert!(list.contains(part), "{part} is not in\n{list}");
    }

    // And somebody meddles.
    graph.set_member(GROUP, &graph.members(GROUP)[0], false);
    scim.empty_group(&guests).await?;
    let (code, found) = diff(&site, &[]).await?;
    assert_eq!((code, found["differences"].as_array().map(Vec::len)), (1, Some(ALL)), "{found}");
    let table = site.run(&["permissions", "diff"]).await?;
    assert!(table.code == 1 && table.stdout.contains("diff --fix"), "{table:?}");
    assert!(!table.stdout.contains("example.com"), "{table:?}");
    let (code, found) = diff(&site, &["--fix"]).await?;
    assert_eq!(code, 0, "{found}");
    assert_eq!(diff(&site, &[]).await?.0, 0);
    assert_eq!(graph.members(GROUP).len(), ALL - 1);
    Ok(())
}

#[tokio::test]
async fn whoever_is_killed_while_many_are_made_members_all_of_them_end_as_such()
-> anyhow::Result<()> {
    const ALL: usize = 60;
    let (site, graph) = site(SOON).await?;
    let ids = accounts(&graph, 0..ALL);
    let mut up = site.up().await?;
    sign_up(&up.base, 0..ALL / 2).await?;
    for many in [10, 25, 45] {
        eventually(LIMIT, "some are members", async || graph.members(GROUP).len() >= many).await?;
        up.process.kill();
        drop(up);
        up = site.up().await?;
        if many == 10 {
            sign_up(&up.base, ALL / 2..ALL).await?;
        }
    }

    wait_until_so(&site, ALL).await?;
    assert_eq!(sorted(graph.members(GROUP)), ids);
    Ok(())
}

#[tokio::test]
async fn what_a_target_refuses_is_parked_and_delivered_once_it_is_mended() -> anyhow::Result<()> {
    let few = SOON.replace("tries = 1000", "tries = 2");
    let (site, graph) = site(&few).await?;
    accounts(&graph, 0..2);
    // One is refused for good, and one is not permitted, which is tried again first.
    graph.plan(GraphCall::AddMember, GraphFault::Status(400));
    let up = site.up().await?;
    sign_up(&up.base, 0..1).await?;
    let letters = async |wanted: usize| {
        eventually(LIMIT, &format!("{wanted} letters are parked"), async || {
            let list = run(&site, &["dead", "list", "--letters", "--output", "json"]).await?;
            let letters: Vec<Value> = serde_json::from_str(&list.stdout)?;
            anyhow::Ok((letters.len() == wanted).then_some(letters))
        })
        .await
    };
    letters(1).await?;
    for _ in 0..2 {
        graph.plan(GraphCall::AddMember, GraphFault::Status(403));
    }
    sign_up(&up.base, 1..2).await?;
    let letters = letters(2).await?;

    let causes: Vec<_> = letters.iter().filter_map(|it| it["cause"].as_str()).collect();
    assert!(causes.contains(&"refused") && causes.contains(&"not-permitted"), "{letters:?}");
    let list = run(&site, &["dead", "list"]).await?.stdout;
    assert!(list.contains("target `entra`"), "{list}");
    assert_eq!(graph.members(GROUP).len(), 0);
    let (code, found) = diff(&site, &[]).await?;
    assert_eq!((code, &found["differences"][0]["pending"]), (1, &json!(true)));

    run(&site, &["dead", "retry", "--all", "--yes"]).await?;
    wait_until_so(&site, 2).await?;
    assert_eq!(graph.members(GROUP).len(), 2);
    Ok(())
}

#[tokio::test]
async fn a_role_that_expires_is_taken_from_its_targets() -> anyhow::Result<()> {
    const TRIAL: &str = "
[[workers.permissions.rules]]
name = \"a-short-trial\"
when = \"true\"
role = \"trial\"
expires_after = \"10s\"
";
    let graph = Graph::start().await?;
    graph.add_group(GROUP);
    let target = group(&graph).replace("guest =", "trial =");
    let mut site = Site::new(&[TRIAL, &target, SOON].concat())?;
    site.set("GRAPH_SECRET", Graph::CLIENT_SECRET);
    let ids = accounts(&graph, 0..1);
    let up = site.up().await?;
    sign_up(&up.base, 0..1).await?;

    let added = || graph.requests_of(GraphCall::AddMember).iter().any(|it| it.status == 204);
    eventually(LIMIT, "it is there", async || added()).await?;
    eventually(LIMIT, "it is gone", async || !graph.members(GROUP).contains(&ids[0])).await?;

    let list = run(&site, &["permissions", "list", "--role", "trial"]).await?.stdout;
    assert!(list.contains("expired"), "{list}");
    wait_until_so(&site, 1).await
}
