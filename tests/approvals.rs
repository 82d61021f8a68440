//! Somebody waits for an approver's yes, and then has an account: with a crash in the middle, with
//! two approvers at once, and over processes of their own.

use anyhow::{Context, ensure};
use serde_json::{Value, json};
use vestibule_testkit::{Graph, GraphCall, GraphFault, eventually};

use crate::support::{LIMIT, Site, Up, http};

/// What the example configuration lacks for approvals; `graph` makes the accounts.
pub(crate) fn approvals(graph: &Graph, more: &str) -> String {
    format!(
        r#"
[approvals]
link_base = "http://approvals.invalid"
denied = "message:denied"
{more}

[messages]

[workers.approvals]

[workers.accounts]
tenant = "{tenant}"
client_id = "{client}"
client_secret = "env:GRAPH_SECRET"
domain = "contoso.onmicrosoft.com"
invite_redirect_url = "https://app.contoso.com"
graph_url = "{url}"
token_url = "{token}"
retry = {{ initial = "200ms", max = "500ms", tries = 1000 }}

[[workers.notify.channels]]
name = "approvers"
kind = "record"
kinds = ["pending"]
subject = "Please decide"
body = "{{{{ approval.link }}}}"

[[connectors.partners.rules]]
name = "suppliers-need-a-yes"
steps = ["before-create"]
when = "has(signup.claims.jobTitle) && signup.claims.jobTitle == 'Supplier'"
require_approval = "message:wait"
"#,
        tenant = Graph::TENANT,
        client = Graph::CLIENT_ID,
        url = graph.url(),
        token = graph.token_url(),
    )
}

pub(crate) fn write_messages(site: &Site) -> anyhow::Result<()> {
    let folder = site.path().join("messages");
    std::fs::create_dir(&folder)?;
    std::fs::write(folder.join("en.toml"), "wait = \"Please wait.\"\ndenied = \"Sorry, no.\"\n")?;
    std::fs::write(folder.join("de.toml"), "wait = \"Bitte warten.\"\n")?;
    Ok(())
}

/// A site whose people need an approval, and the directory that they are to be in.
async fn site(more: &str) -> anyhow::Result<(Site, Graph)> {
    let graph = Graph::start().await?;
    let mut site = Site::new(&approvals(&graph, more))?;
    site.set("GRAPH_SECRET", Graph::CLIENT_SECRET);
    site.set("USER", "grace");
    write_messages(&site)?;
    Ok((site, graph))
}

pub(crate) fn supplier(name: &str) -> Value {
    json!({
        "email": format!("{name}@gmail.example"),
        "identities": [{
            "signInType": "federated", "issuer": "google.com", "issuerAssignedId": name,
        }],
        "displayName": name,
        "jobTitle": "Supplier",
        "ui_locales": "de-AT",
    })
}

pub(crate) fn blocked(message: &str) -> Value {
    json!({ "version": "1.0.0", "action": "ShowBlockPage", "userMessage": message })
}

/// The only request that waits, once there is one.
pub(crate) async fn waiting(site: &Site) -> anyhow::Result<Value> {
    eventually(LIMIT, "there is a request", async || {
        anyhow::Ok(!list(site, "pending").await?.is_empty())
    })
    .await?;
    let mut requests = list(site, "pending").await?;
    ensure!(requests.len() == 1, "{requests:?}");
    requests.pop().context("was counted")
}

async fn list(site: &Site, state: &str) -> anyhow::Result<Vec<Value>> {
    let list = site.run(&["approvals", "list", "--state", state, "--output", "json"]).await?;
    ensure!(list.code == 0, "{}", list.stderr);
    Ok(serde_json::from_str(&list.stdout)?)
}

/// The link of the notification, as it leads to this test's listener.
async fn link(site: &Site, up: &Up) -> anyhow::Result<String> {
    let bodies = async || {
        let store = format!("sqlite://{}?mode=ro", site.data().join("store.db").display());
        let pool = sqlx::SqlitePool::connect(&store).await?;
        let sql = "SELECT body FROM notifications WHERE channel = 'approvers'";
        let bodies: Vec<String> = sqlx::query_scalar(sql).fetch_all(&pool).await?;
        pool.close().await;
        anyhow::Ok(bodies)
    };
    eventually(LIMIT, "an approver was told", async || anyhow::Ok(!bodies().await?.is_empty()))
        .await?;
    let bodies = bodies().await?;
    ensure!(bodies.len() == 1, "only the first attempt is worth a message: {bodies:?}");
    Ok(bodies[0].replace("http://approvals.invalid", &up.base))
}

async fn kinds(site: &Site) -> anyhow::Result<Vec<String>> {
    let events = site.replay(&[]).await?;
    Ok(events.iter().map(|it| it["type"].as_str().unwrap_or_default().to_owned()).collect())
}

#[tokio::test]
async fn approved_by_link_a_person_has_one_account_whatever_crashes_in_between()
-> anyhow::Result<()> {
    let (site, graph) = site("").await?;
    // The account is made, nobody hears of it, and then the process dies.
    graph.plan(GraphCall::CreateUser, GraphFault::LoseAnswer);
    let mut up = site.up().await?;
    let ada = supplier("ada");

    let early = json!({ "email": "ada@gmail.example" });
    assert_eq!(up.sign_up("after-federation", &early).await?.1["action"], "Continue");
    assert_eq!(up.sign_up("before-create", &ada).await?, (200, blocked("Bitte warten.")));
    waiting(&site).await?;
    let mut again = ada.clone();
    again["city"] = json!("Vienna");
    assert_eq!(up.sign_up("before-create", &again).await?, (200, blocked("Bitte warten.")));
    let mut early_again = early.clone();
    early_again["ui_locales"] = json!("en");
    early_again["city"] = json!("Vienna");
    let answer = up.sign_up("after-federation", &early_again).await?;
    assert_eq!(answer, (200, blocked("Please wait.")), "nobody fills in the form for nothing");

    let link = link(&site, &up).await?;
    let page = http().get(&link).send().await?;
    assert_eq!(page.headers()["cache-control"], "no-store");
    let page = page.text().await?;
    assert!(page.contains("ada@gmail.example") && page.contains("<form"), "{page}");
    assert_eq!(list(&site, "pending").await?.len(), 1, "to look decides nothing");
    let decide = |verdict: &str| {
        let form = format!("approver=Grace+Hopper&reason=known+to+us&verdict={verdict}");
        let form_type = "application/x-www-form-urlencoded";
        http().post(&link).header("content-type", form_type).body(form).send()
    };
    let decided = decide("approve").await?;
    assert_eq!(decided.status(), 200);
    let second = decide("deny").await?;
    assert_eq!(second.status(), 409, "a link is used once");
    assert!(second.text().await?.contains("Grace Hopper"), "who was first");
    let other = format!("{}x", &link[..link.len() - 1]);
    assert_eq!(http().get(&other).send().await?.status(), 404, "links are signed");

    eventually(LIMIT, "the account is being made", async || {
        anyhow::Ok(!graph.requests_of(GraphCall::CreateUser).is_empty())
    })
    .await?;
    up.process.kill();
    let up = site.up().await?;
    let mut late = ada.clone();
    late["city"] = json!("Graz");
    let (_, answer) = up.sign_up("before-create", &late).await?;
    assert_eq!(answer["action"], "Continue", "who was approved may go on by themselves");

    let done = "permissions are given and the account is noted";
    eventually(LIMIT, done, async || {
        let metrics = up.metrics().await?;
        let done = r#"vestibule_worker_attempts_total{worker="accounts",outcome="done"} 1"#;
        anyhow::Ok(metrics.lines().any(|line| line == done))
    })
    .await
    .with_context(|| format!("{:?}", graph.requests()))?;
    let users = graph.users();
    assert_eq!(users.len(), 1, "{users:?}");
    assert_eq!(users[0]["mail"], "ada@gmail.example");
    assert_eq!(users[0]["userPrincipalName"], "ada_gmail.example#EXT@contoso.onmicrosoft.com");
    assert_eq!(users[0]["identities"], ada["identities"]);

    let kinds = kinds(&site).await?;
    let count = |kind: &str| kinds.iter().filter(|it| it.ends_with(kind)).count();
    assert_eq!((count(".approved"), count(".pending"), count(".accepted")), (1, 3, 1), "{kinds:?}");
    let approved = site.replay(&["--kind", "approved"]).await?;
    let approval = &approved[0]["data"]["approval"];
    assert_eq!(approval["approver"], "Grace Hopper");
    assert_eq!(approval["reason"], "known to us");
    let told = site.run(&["replay", "--explain"]).await?.stdout;
    for line in [
        "rule suppliers-need-a-yes",
        "require-approval",
        "already-pending",
        "by Grace Hopper: known to us",
        "told: Bitte warten.",
    ] {
        assert!(told.contains(line), "{line}: {told}");
    }
    Ok(())
}

#[tokio::test]
async fn of_two_approvers_at_once_one_decides_and_a_denial_holds() -> anyhow::Result<()> {
    let (site, graph) = site("").await?;
    let up = site.up().await?;
    up.sign_up("before-create", &supplier("eve")).await?;
    let request = waiting(&site).await?;
    let id = request["request"].as_str().context("no id")?.to_owned();
    let deny = ["approvals", "deny", &id, "--reason", "unknown to us"];
    let (one, other) = tokio::try_join!(site.run(&deny), site.run(&deny))?;
    let mut codes = [one.code, other.code];
    codes.sort_unstable();
    assert_eq!(codes, [0, 1], "{one:?} {other:?}");
    let loser = if one.code == 1 { &one } else { &other };
    assert!(loser.stderr.contains("was denied by grace"), "{loser:?}");

    eventually(LIMIT, "the denial is an event", async || {
        anyhow::Ok(kinds(&site).await?.iter().filter(|it| it.ends_with(".denied")).count() == 1)
    })
    .await?;
    let mut again = supplier("eve");
    again["city"] = json!("Graz");
    assert_eq!(up.sign_up("before-create", &again).await?, (200, blocked("Sorry, no.")));
    let early = json!({ "email": "eve@gmail.example", "city": "Graz" });
    assert_eq!(up.sign_up("after-federation", &early).await?, (200, blocked("Sorry, no.")));
    assert!(graph.requests().is_empty(), "nobody was denied and made an account for");

    let shown = site.run(&["approvals", "show", &id]).await?;
    assert!(shown.stdout.contains("unknown to us"), "{shown:?}");
    let unknown = site.run(&["approvals", "show", "0000"]).await?;
    assert_eq!(unknown.code, 1);
    assert!(unknown.stderr.contains("approvals list --state all"), "{unknown:?}");
    Ok(())
}

#[tokio::test]
async fn a_request_that_nobody_decides_expires_and_may_be_made_again() -> anyhow::Result<()> {
    let (site, _graph) = site("expires_after = \"2s\"").await?;
    let up = site.up().await?;
    up.sign_up("before-create", &supplier("ida")).await?;
    eventually(LIMIT, "the request has expired", async || {
        anyhow::Ok(kinds(&site).await?.iter().any(|it| it.ends_with(".abandoned")))
    })
    .await?;
    let expired = list(&site, "expired").await?;
    let id = expired[0]["request"].as_str().context("no id")?;
    let late = site.run(&["approvals", "approve", id]).await?;
    assert_eq!(late.code, 1);
    assert!(late.stderr.contains("has expired"), "{late:?}");
    let explained = site.run(&["replay", "--explain", "--kind", "abandoned"]).await?.stdout;
    assert!(explained.contains(" by nobody: "), "{explained}");
    assert!(!explained.contains("told: "), "nobody was told: {explained}");

    let mut again = supplier("ida");
    again["city"] = json!("Graz");
    assert_eq!(up.sign_up("before-create", &again).await?, (200, blocked("Bitte warten.")));
    eventually(LIMIT, "there is another request", async || {
        anyhow::Ok(list(&site, "all").await?.len() == 2)
    })
    .await
}
