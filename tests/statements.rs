//! Statements of the user's own, run in a database of the user's by the real binary.

use std::time::Duration;

use anyhow::{Context, ensure};
use serde_json::json;
use sqlx::{Connection, PgConnection};
use vestibule_events::{LocalLog, LocalLogConfig, Retention};
use vestibule_testkit::{Postgres, eventually};

use crate::support::{LIMIT, Site, Up};

const CRM: &str = r#"
[workers.statements.crm]
database = "env:CRM_URL"
ack_wait = "1s"
timeout = "8s"
retry = { initial = "100ms", max = "200ms", jitter = 0.1 }
breaker = { pause = "100ms", max_pause = "200ms" }

[[workers.statements.crm.run]]
sql = "INSERT INTO people (person, email, city) VALUES (:person, :email, :city)"
parameters = { person = "/subject", email = "/data/email", city = "signup.claims.city" }

[[workers.statements.crm.run]]
when = "signup.claims.city == 'London'"
sql = "UPDATE totals SET people = people + 1 WHERE city = :city"
parameters = { city = "signup.claims.city" }
"#;

const WORKER: &str = "statements-crm";

async fn site(server: &Postgres, more: &str) -> anyhow::Result<Site> {
    let mut site = Site::new(more)?;
    site.set("CRM_URL", &server.url());
    site.set("USER", "grace");
    let mut connection = PgConnection::connect(&server.url()).await?;
    let tables = "CREATE TABLE people (person text, email text UNIQUE, city varchar(20));
                  CREATE TABLE totals (city text, people integer);
                  INSERT INTO totals VALUES ('London', 0)";
    sqlx::raw_sql(tables).execute(&mut connection).await?;
    Ok(site)
}

async fn sign_up(up: &Up, person: &str, city: &str) -> anyhow::Result<()> {
    let body = json!({ "email": format!("{person}@example.com"), "surname": "L", "city": city });
    let (status, answer) = up.sign_up("before-create", &body).await?;
    ensure!(status == 200 && answer["action"] == "Continue", "{answer}");
    Ok(())
}

async fn number(server: &Postgres, sql: &'static str) -> anyhow::Result<i64> {
    let mut connection = PgConnection::connect(&server.url()).await?;
    Ok(sqlx::query_scalar(sql).fetch_one(&mut connection).await?)
}

async fn wait_for_people(server: &Postgres, wanted: i64) -> anyhow::Result<()> {
    eventually(LIMIT, &format!("{wanted} people are in the database"), async || {
        anyhow::Ok(number(server, "SELECT count(*) FROM people").await? == wanted)
    })
    .await
}

async fn wait_until_idle(site: &Site, parked: u64) -> anyhow::Result<()> {
    eventually(LIMIT, "the worker has nothing left to do", async || {
        let list = site.run(&["worker", "list", "--output", "json"]).await?;
        let workers: serde_json::Value = serde_json::from_str(&list.stdout)?;
        let workers = workers.as_array().context("no list")?;
        let Some(it) = workers.iter().find(|it| it["worker"] == WORKER) else { return Ok(false) };
        let undone = ["waiting", "in_hand", "retries"].map(|key| it[key].as_u64());
        anyhow::Ok(undone == [Some(0); 3] && it["dead_letters"].as_u64() == Some(parked))
    })
    .await
}

/// Lets the worker be given every event once more.
async fn begin_anew(site: &Site) -> anyhow::Result<()> {
    let log = LocalLog::open(LocalLogConfig {
        path: site.data().join("events.db"),
        duplicate_window: Duration::from_secs(600),
        refusal_window: Duration::from_secs(30),
        retention: Retention::For(Duration::from_secs(86_400)),
    })
    .await?;
    ensure!(log.remove_consumer(WORKER).await?, "there was no consumer");
    // Only then the file is free for whoever starts next.
    Ok(log.close().await?)
}

#[tokio::test]
async fn each_event_is_done_once_while_we_and_the_server_are_killed() -> anyhow::Result<()> {
    let mut server = Postgres::start().await?;
    let site = site(&server, CRM).await?;
    let mut up = site.up().await?;
    for person in 0..10 {
        sign_up(&up, &format!("p{person}"), "London").await?;
    }
    wait_for_people(&server, 10).await?;

    // What comes while the server is away waits for it, and costs nobody an answer.
    server.kill();
    for person in 10..20 {
        sign_up(&up, &format!("p{person}"), "London").await?;
    }
    server.restart().await?;
    wait_for_people(&server, 20).await?;

    // Killed in the middle, and then everything once more from the beginning.
    for round in 0..3 {
        for person in 0..5 {
            sign_up(&up, &format!("r{round}{person}"), "London").await?;
        }
        up.process.kill();
        begin_anew(&site).await?;
        up = site.up().await?;
    }

    wait_for_people(&server, 35).await?;
    wait_until_idle(&site, 0).await?;
    assert_eq!(number(&server, "SELECT people::int8 FROM totals").await?, 35);
    assert_eq!(number(&server, "SELECT count(*) FROM vestibule_inbox").await?, 35);
    Ok(())
}

#[tokio::test]
async fn what_the_database_refuses_is_parked_and_delivered_once_mended() -> anyhow::Result<()> {
    let server = Postgres::start().await?;
    let site = site(&server, CRM).await?;
    let up = site.up().await?;
    sign_up(&up, "ada", "Llanfairpwllgwyngyllgogerychwyrndrobwll").await?;
    sign_up(&up, "bob", "London").await?;
    wait_for_people(&server, 1).await?;
    wait_until_idle(&site, 1).await?;

    let list = site.run(&["dead", "list"]).await?.stdout;
    assert!(list.contains(WORKER) && list.contains("refused"), "{list}");
    assert!(list.contains("SQLSTATE 22001") && !list.contains("Llanfair"), "{list}");

    let mut connection = PgConnection::connect(&server.url()).await?;
    sqlx::raw_sql("ALTER TABLE people ALTER city TYPE text").execute(&mut connection).await?;
    let retry = site.run(&["dead", "retry", "--worker", WORKER, "--yes"]).await?;
    ensure!(retry.code == 0, "{retry:?}");
    wait_for_people(&server, 2).await?;
    wait_until_idle(&site, 0).await
}

#[tokio::test]
async fn a_column_that_is_not_there_is_said_at_a_start_and_by_check() -> anyhow::Result<()> {
    let server = Postgres::start().await?;
    let wrong = CRM.replace("city) VALUES", "town) VALUES");
    let site = site(&server, &wrong).await?;

    let check = site.run(&["check", "--online"]).await?;
    let said =
        "workers.statements.crm: run[0]: column \"town\" of relation \"people\" does not exist";
    assert!(check.stdout.contains(said), "{check:?}");

    let mut up = site.up().await?;
    sign_up(&up, "ada", "London").await?;
    eventually(LIMIT, "the log says what is wrong", async || {
        let said = up.process.stdout() + &up.process.stderr();
        said.contains("a statement does not fit the database") && said.contains("town")
    })
    .await?;
    // Nothing is lost: the event waits until somebody mends either.
    let mut connection = PgConnection::connect(&server.url()).await?;
    sqlx::raw_sql("ALTER TABLE people ADD COLUMN town text").execute(&mut connection).await?;
    wait_for_people(&server, 1).await?;
    up.process.kill();
    Ok(())
}
