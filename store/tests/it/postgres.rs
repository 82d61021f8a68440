//! What concerns only a server: it can go away and come back, hang, and be somebody else's.

use std::time::{Duration, Instant};

use secrecy::SecretString;
use vestibule_store::{Done, Store, StoreError, StoreOptions, StoreUrl};
use vestibule_testkit::{Postgres, eventually};

use crate::home::{Home, NOW, event, impatient};

fn url(server: &Postgres) -> StoreUrl {
    StoreUrl::Postgres(SecretString::from(server.url()))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_dies_and_comes_back_is_used_again() -> anyhow::Result<()> {
    let mut server = Postgres::start().await?;
    let store = Store::open(&url(&server), impatient()).await?;
    store.migrate().await?;
    assert_eq!(store.record_sign_up("database", &event(1, "ada"), NOW).await?, Done::Now);

    server.kill();
    let error = store.record_sign_up("database", &event(2, "eve"), NOW).await.unwrap_err();
    assert!(matches!(error, StoreError::Unavailable(_)), "{error:?}");
    assert!(store.ping().await.is_err());
    server.restart().await?;

    let limit = Duration::from_secs(20);
    eventually(limit, "the store works again", async || store.ping().await.is_ok()).await?;
    assert_eq!(store.record_sign_up("database", &event(1, "ada"), NOW).await?, Done::Before);
    assert_eq!(store.record_sign_up("database", &event(2, "eve"), NOW).await?, Done::Now);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_hangs_costs_no_more_than_the_limits() -> anyhow::Result<()> {
    let server = Postgres::start().await?;
    let store = Store::open(&url(&server), impatient()).await?;
    store.migrate().await?;

    server.pause();
    let begun = Instant::now();
    let error = store.record_sign_up("database", &event(1, "ada"), NOW).await.unwrap_err();
    let took = begun.elapsed();
    server.resume();

    assert!(matches!(error, StoreError::Unavailable(_)), "{error:?}");
    assert!(took < Duration::from_secs(20), "took {took:?}");
    let limit = Duration::from_secs(20);
    let event = event(1, "ada");
    eventually(limit, "the store works again", async || {
        store.record_sign_up("database", &event, NOW).await.is_ok()
    })
    .await?;
    assert_eq!(store.effects(&[event.id]).await?[&event.id].person_changes, 1);
    Ok(())
}

#[tokio::test]
async fn a_server_that_is_down_at_the_start_is_unavailable() -> anyhow::Result<()> {
    let mut server = Postgres::start().await?;
    server.kill();

    let error = Store::open(&url(&server), impatient()).await.unwrap_err();

    assert!(matches!(error, StoreError::Unavailable(_)), "{error:?}");
    Ok(())
}

fn another_database(server: &Postgres) -> String {
    let url = server.url();
    let (server, _database) = url.rsplit_once('/').unwrap_or((&url, ""));
    format!("{server}/nowhere")
}

#[tokio::test]
async fn a_database_that_does_not_exist_is_misconfigured() -> anyhow::Result<()> {
    let server = Postgres::start().await?;
    let wrong = another_database(&server);

    for url in [wrong, "postgres://user:hunter2@[".to_owned()] {
        let url = StoreUrl::Postgres(SecretString::from(url));
        let error = Store::open(&url, impatient()).await.unwrap_err();
        assert!(matches!(error, StoreError::Misconfigured(_)), "{error:?}");
        let told = format!("{error:?} {url:?}");
        assert!(!told.contains("hunter2"), "{told}");
    }
    Ok(())
}

#[tokio::test]
async fn what_is_wrong_at_the_start_is_said_in_words() -> anyhow::Result<()> {
    let mut server = Postgres::start().await?;
    let told = async |url: String| -> anyhow::Result<String> {
        let url = StoreUrl::Postgres(SecretString::from(url));
        let error = Store::open(&url, StoreOptions::default()).await.unwrap_err();
        let told = format!("{:#}", anyhow::Error::from(error));
        anyhow::ensure!(!told.contains("hunter2"), "{told}");
        Ok(told)
    };
    let right = server.url();
    let (_, address) =
        right.split_once('@').unwrap_or(("", right.trim_start_matches("postgres://")));
    let database = told(another_database(&server)).await?;
    let user = told(format!("postgres://nobody:hunter2@{address}")).await?;
    let unknown = "postgres://user:hunter2@nowhere.invalid/vestibule".to_owned();
    let host = told(unknown).await?;
    server.kill();
    let dead = told(right.clone()).await?;

    assert!(database.contains("no database of this name; create it"), "{database}");
    assert!(user.contains("does not let this user in"), "{user}");
    assert!(host.contains("nowhere.invalid:5432") && host.contains("its address"), "{host}");
    assert!(dead.contains("refused") && dead.contains("is running"), "{dead}");
    assert!(dead.contains(&server.port().to_string()), "{dead}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lock_that_somebody_holds_is_unavailable() -> anyhow::Result<()> {
    use sqlx::Connection as _;
    let server = Postgres::start().await?;
    let store = Store::open(&url(&server), impatient()).await?;
    store.migrate().await?;
    let mut operator = sqlx::PgConnection::connect(&server.url()).await?;
    let mut held = operator.begin().await?;
    sqlx::raw_sql("LOCK TABLE people").execute(&mut *held).await?;

    let error = store.record_sign_up("database", &event(1, "ada"), NOW).await.unwrap_err();
    held.rollback().await?;

    assert!(matches!(error, StoreError::Unavailable(_)), "{error:?}");
    assert_eq!(store.record_sign_up("database", &event(1, "ada"), NOW).await?, Done::Now);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_processes_share_the_work_without_doing_it_twice() -> anyhow::Result<()> {
    let home = Home::postgres().await?;
    let stores = [home.store().await?, home.store().await?];
    let mut tasks = tokio::task::JoinSet::new();
    for number in 0..40 {
        for store in stores.clone() {
            // Four people, so that both wait for the same rows all the time.
            let event = event(number, &format!("n{}", number % 4));
            tasks.spawn(async move { store.record_sign_up("database", &event, NOW).await });
        }
    }
    let mut now = 0;
    while let Some(outcome) = tasks.join_next().await {
        now += u32::from(outcome?? == Done::Now);
    }

    assert_eq!(now, 40);
    let person = event(0, "n0").person;
    assert_eq!(stores[0].person(&person).await?.map(|person| person.changes), Some(10));
    Ok(())
}
