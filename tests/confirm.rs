//! A sign-up that was let past becomes an account, or comes to nothing: by the directory, by a token,
//! with a crash in the middle; and only then anybody is told.

use std::time::Duration;

use anyhow::Context;
use serde_json::{Value, json};
use vestibule_testkit::{Graph, eventually};

use crate::support::{LIMIT, Site, Up};

/// The example with a worker `confirm`, where somebody is welcomed once they have an account.
fn site(confirm: &str) -> anyhow::Result<Site> {
    let welcome = r#"
[[workers.notify.channels]]
name = "welcome-once-there"
kind = "record"
subject = "Welcome"
body = "{{ signup.object_id }}"
"#;
    Site::new(&format!("[workers.confirm]\n{confirm}\n{welcome}"))
}

fn person(name: &str) -> Value {
    json!({
        "email": format!("{name}@gmail.example"),
        "identities": [{
            "signInType": "federated", "issuer": "google.com", "issuerAssignedId": name,
        }],
        "displayName": name,
        "city": "Graz",
    })
}

async fn accept(up: &Up, name: &str) -> anyhow::Result<()> {
    let (status, answer) = up.sign_up("before-create", &person(name)).await?;
    assert_eq!((status, &answer["action"]), (200, &json!("Continue")), "{answer}");
    Ok(())
}

async fn sign_in(up: &Up, name: &str) -> anyhow::Result<()> {
    let body = json!({
        "email": format!("{name}@gmail.example"),
        "objectId": format!("object-{name}"),
        "step": "PreTokenIssuance",
        "client_id": "app",
        "ui_locales": "en-US",
    });
    let (status, answer) = up.sign_up("before-token", &body).await?;
    assert_eq!((status, &answer["action"]), (200, &json!("Continue")), "{answer}");
    Ok(())
}

/// Who was confirmed, or who was given up, in the order of their names.
async fn people(site: &Site, kind: &str) -> anyhow::Result<Vec<String>> {
    let events = site.replay(&["--kind", kind]).await?;
    let name = |event: &Value| {
        let email = event["data"]["email"].as_str().context("no address")?;
        anyhow::Ok(email.split('@').next().unwrap_or_default().to_owned())
    };
    let mut names: Vec<_> = events.iter().map(name).collect::<anyhow::Result<_>>()?;
    names.sort_unstable();
    Ok(names)
}

/// What the channel of this test has told, a body for each.
async fn welcomes(site: &Site) -> anyhow::Result<Vec<String>> {
    let store = format!("sqlite://{}?mode=ro", site.data().join("store.db").display());
    let pool = sqlx::SqlitePool::connect(&store).await?;
    let sql = "SELECT body FROM notifications WHERE channel = 'welcome-once-there' ORDER BY body";
    let bodies = sqlx::query_scalar(sql).fetch_all(&pool).await?;
    pool.close().await;
    Ok(bodies)
}

const SEEN: &str = "vestibule_confirm_accounts_seen_total";

#[tokio::test]
async fn a_token_confirms_and_who_never_comes_back_is_given_up() -> anyhow::Result<()> {
    let site = site("first_look = \"1s\"\nlongest_pause = \"1s\"\nabandon_after = \"8s\"")?;
    let up = site.up().await?;
    for name in ["ada", "bob", "eve"] {
        accept(&up, name).await?;
    }
    for name in ["ada", "bob", "nobody"] {
        sign_in(&up, name).await?;
        sign_in(&up, name).await?;
    }
    eventually(LIMIT, "all have an outcome", async || {
        let outcomes = (people(&site, "confirmed").await?, people(&site, "abandoned").await?);
        anyhow::Ok(outcomes.0.len() >= 2 && !outcomes.1.is_empty())
    })
    .await?;
    eventually(LIMIT, "those with an account are welcomed", async || {
        anyhow::Ok(welcomes(&site).await?.len() == 2)
    })
    .await?;

    // The second sign-in of somebody may come before the first is written down.
    let seen = up.metric(SEEN).await?;
    assert!((3.0..=6.0).contains(&seen), "{seen}");
    sign_in(&up, "ada").await?;
    assert_eq!(people(&site, "confirmed").await?, ["ada", "bob"]);
    assert_eq!(people(&site, "abandoned").await?, ["eve"]);
    assert_eq!(welcomes(&site).await?, ["object-ada", "object-bob"]);
    let confirmed = site.replay(&["--kind", "confirmed"]).await?;
    let accepted = site.replay(&["--kind", "accepted"]).await?;
    assert_eq!(confirmed[0]["data"]["confirmation"]["source"], "token");
    assert!(accepted.iter().any(|it| it["id"] == confirmed[0]["data"]["confirmation"]["of"]));
    assert_eq!(up.metric(SEEN).await?, seen, "later ones cost nothing");
    Ok(())
}

#[tokio::test]
async fn what_the_directory_shows_is_confirmed_once_whatever_dies_in_between() -> anyhow::Result<()>
{
    let graph = Graph::start().await?;
    let mut site = site(&format!(
        r#"
tenant = "{tenant}"
client_id = "{client}"
client_secret = "env:GRAPH_SECRET"
graph_url = "{url}"
token_url = "{token}"
first_look = "1s"
longest_pause = "1s"
"#,
        tenant = Graph::TENANT,
        client = Graph::CLIENT_ID,
        url = graph.url(),
        token = graph.token_url(),
    ))?;
    site.set("GRAPH_SECRET", Graph::CLIENT_SECRET);
    let check = site.run(&["check"]).await?;
    assert!(check.stdout.contains("by the directory and tokens"), "{}", check.stdout);

    let mut up = site.up().await?;
    let names: Vec<_> = (0..12).map(|number| format!("person{number:02}")).collect();
    for (number, name) in names.iter().enumerate() {
        accept(&up, name).await?;
        graph.add_user(&json!({ "identities": person(name)["identities"] }));
        if number % 4 == 3 {
            up.process.kill();
            up = site.up().await?;
        }
    }
    accept(&up, "waits").await?;

    eventually(LIMIT, "all who have an account are confirmed and welcomed", async || {
        let confirmed = people(&site, "confirmed").await?.len() >= names.len();
        anyhow::Ok(confirmed && welcomes(&site).await?.len() >= names.len())
    })
    .await?;
    up.process.kill();
    let _up = site.up().await?;
    assert_eq!(people(&site, "confirmed").await?, names);
    assert!(people(&site, "abandoned").await?.is_empty());
    let ids: Vec<_> =
        graph.users().iter().map(|it| it["id"].as_str().unwrap_or("").to_owned()).collect();
    let mut welcomed = welcomes(&site).await?;
    welcomed.sort_unstable();
    let mut expected = ids;
    expected.sort_unstable();
    assert_eq!(welcomed, expected);
    Ok(())
}

#[tokio::test]
async fn of_simulated_people_those_who_never_come_back_get_nothing() -> anyhow::Result<()> {
    let site = site("first_look = \"1s\"\nlongest_pause = \"1s\"\nabandon_after = \"10s\"")?;
    let up = site.up().await?;
    let url = up.connector();
    let arguments = [
        "simulate",
        "--url",
        &url,
        "--count",
        "60",
        "--abandon",
        "0.2",
        "--seed",
        "7",
        "--wait",
        "90s",
        "--output",
        "json",
    ];
    let run = site.run_within(Duration::from_secs(120), &arguments).await?;
    assert_eq!(run.code, 0, "{} {}", run.stdout, run.stderr);

    let confirmed = people(&site, "confirmed").await?;
    let abandoned = people(&site, "abandoned").await?;
    assert!(!confirmed.is_empty() && !abandoned.is_empty(), "{confirmed:?} {abandoned:?}");
    assert_eq!(welcomes(&site).await?.len(), confirmed.len());
    let store = format!("sqlite://{}?mode=ro", site.data().join("store.db").display());
    let pool = sqlx::SqlitePool::connect(&store).await?;
    let sql = "SELECT count(DISTINCT person) FROM grants WHERE revoked_at IS NULL";
    let granted: i64 = sqlx::query_scalar(sql).fetch_one(&pool).await?;
    pool.close().await;
    assert_eq!(usize::try_from(granted)?, confirmed.len());
    Ok(())
}
