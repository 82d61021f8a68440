//! What concerns only a file: it outlives us, and somebody else may hold its lock.

use std::time::Duration;

use sqlx::Connection as _;
use vestibule_store::{Done, Store, StoreError};

use crate::{
    home::{Home, NOW, event, failed, file_in, impatient, time_of},
    retries::{WORKER, wait},
};

#[tokio::test]
async fn effects_are_still_there_after_a_restart() -> anyhow::Result<()> {
    let home = Home::sqlite()?;
    let store = home.store().await?;
    store.record_sign_up("database", &event(1, "ada"), NOW).await?;
    drop(store);

    let store = home.empty_store().await?;

    assert!(store.schema_is_current().await?);
    assert_eq!(store.record_sign_up("database", &event(1, "ada"), NOW).await?, Done::Before);
    Ok(())
}

#[tokio::test]
async fn a_lock_that_somebody_holds_is_unavailable() -> anyhow::Result<()> {
    let home = Home::sqlite()?;
    let Home::Sqlite(directory) = &home else { anyhow::bail!("a file was asked for") };
    home.store().await?;
    let store = Store::open(&home.url(), impatient()).await?;
    let url = format!("sqlite://{}", file_in(directory).display());
    let mut operator = sqlx::SqliteConnection::connect(&url).await?;
    let held = operator.begin_with("BEGIN IMMEDIATE").await?;

    let error = store.record_sign_up("database", &event(1, "ada"), NOW).await.unwrap_err();
    assert!(matches!(error, StoreError::Unavailable(_)), "{error:?}");
    assert_eq!(store.person(&event(1, "ada").person).await?, None, "reading goes on");
    held.rollback().await?;

    assert_eq!(store.record_sign_up("database", &event(1, "ada"), NOW).await?, Done::Now);
    Ok(())
}

#[tokio::test]
async fn a_file_that_is_no_database_is_misconfigured() -> anyhow::Result<()> {
    let home = Home::sqlite()?;
    let Home::Sqlite(directory) = &home else { anyhow::bail!("a file was asked for") };
    std::fs::write(
        file_in(directory),
        "certainly not a database file, but long enough".repeat(99),
    )?;

    let error = home.empty_store().await.unwrap_err();

    let error = error.downcast::<StoreError>()?;
    assert!(matches!(error, StoreError::Misconfigured(_)), "{error:?}");
    Ok(())
}

#[tokio::test]
async fn a_file_that_is_gone_or_another_takes_nothing_more() -> anyhow::Result<()> {
    let home = Home::sqlite()?;
    let Home::Sqlite(directory) = &home else { anyhow::bail!("a file was asked for") };
    let store = home.store().await?;
    let (path, elsewhere) = (file_in(directory), directory.path().join("elsewhere.db"));
    store.ping().await?;

    std::fs::rename(&path, &elsewhere)?;
    for replaced in [false, true] {
        if replaced {
            std::fs::write(&path, "")?;
        }
        let recorded = store.record_sign_up("database", &event(1, "ada"), NOW).await;
        for error in [store.ping().await.unwrap_err(), recorded.unwrap_err()] {
            assert!(matches!(error, StoreError::Unavailable(_)), "{error:?}");
            let told = error.cause().to_string();
            let expected = if replaced { "replaced" } else { "gone" };
            assert!(told.contains(expected) && told.contains("start again"), "{told}");
        }
    }

    std::fs::rename(&elsewhere, &path)?;
    store.ping().await?;
    assert_eq!(store.record_sign_up("database", &event(1, "ada"), NOW).await?, Done::Now);
    Ok(())
}

#[tokio::test]
async fn who_finds_nothing_due_needs_no_lock() -> anyhow::Result<()> {
    let home = Home::sqlite()?;
    let Home::Sqlite(directory) = &home else { anyhow::bail!("a file was asked for") };
    home.store().await?;
    let store = Store::open(&home.url(), impatient()).await?;
    wait(&store, &failed(WORKER, &event(1, "ada"), 1), time_of(1)).await?;
    let url = format!("sqlite://{}", file_in(directory).display());
    let mut operator = sqlx::SqliteConnection::connect(&url).await?;
    let held = operator.begin_with("BEGIN IMMEDIATE").await?;

    let lease = Duration::from_secs(30);
    assert_eq!(store.claim_retries(WORKER, time_of(0), lease, 10).await?, []);
    let error = store.claim_retries(WORKER, time_of(1), lease, 10).await.unwrap_err();
    assert!(matches!(error, StoreError::Unavailable(_)), "{error:?}");
    held.rollback().await?;

    assert_eq!(store.claim_retries(WORKER, time_of(1), lease, 10).await?.len(), 1);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_refused_effect_does_not_take_its_group_with_it() -> anyhow::Result<()> {
    let home = Home::sqlite()?;
    let store = home.store().await?;
    home.execute(
        "CREATE TRIGGER refuse BEFORE INSERT ON person_changes
         WHEN NEW.person IN (SELECT person FROM people WHERE email LIKE 'bad%')
         BEGIN SELECT RAISE(ABORT, 'refused'); END",
    )
    .await?;
    let mut tasks = tokio::task::JoinSet::new();
    for number in 0..64 {
        let store = store.clone();
        let name = if number % 4 == 0 { "bad" } else { "good" };
        let event = event(number, &format!("{name}{number}"));
        tasks.spawn(async move { (number, store.record_sign_up("database", &event, NOW).await) });
    }

    while let Some(outcome) = tasks.join_next().await {
        let (number, outcome) = outcome?;
        if number % 4 == 0 {
            assert!(matches!(outcome, Err(StoreError::Refused(_))), "{number}: {outcome:?}");
        } else {
            assert_eq!(outcome?, Done::Now, "{number}");
        }
    }
    let ids: Vec<_> = (0..64).map(|number| event(number, "n").id).collect();
    let effects = store.effects(&ids).await?;
    assert_eq!(effects.values().filter(|it| it.person_changes == 1).count(), 48);
    assert_eq!(effects.values().filter(|it| it.sign_ups == 1).count(), 48);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_is_told_of_success_before_a_commit_that_fails() -> anyhow::Result<()> {
    let home = Home::sqlite()?;
    let store = home.store().await?;
    // Deferred, so that it fails only at the commit, for everybody in the group.
    home.execute(
        "CREATE TABLE parts (person TEXT REFERENCES people (person) DEFERRABLE INITIALLY DEFERRED);
         CREATE TRIGGER lose AFTER INSERT ON person_changes
         WHEN NEW.person IN (SELECT person FROM people WHERE email LIKE 'bad%')
         BEGIN INSERT INTO parts VALUES ('nobody'); END",
    )
    .await?;
    let name = |number: u32| if number.is_multiple_of(16) { "bad" } else { "good" };
    let mut tasks = tokio::task::JoinSet::new();
    for number in 0..64 {
        let store = store.clone();
        let event = event(number, &format!("{}{number}", name(number)));
        tasks.spawn(async move { (number, store.record_sign_up("database", &event, NOW).await) });
    }
    let mut told = std::collections::HashSet::new();
    while let Some(outcome) = tasks.join_next().await {
        if let (number, Ok(Done::Now)) = outcome? {
            told.insert(event(number, "n").id);
        }
    }
    let ids: Vec<_> = (0..64).map(|number| event(number, "n").id).collect();
    for (event, effects) in store.effects(&ids).await? {
        assert_eq!(effects.person_changes, u32::from(told.contains(&event)), "{event}");
    }
    assert!(told.len() <= 60, "the bad ones cannot have gone through");

    for number in 0..64 {
        let event = event(number, &format!("{}{number}", name(number)));
        let outcome = store.record_sign_up("database", &event, NOW).await;
        match name(number) {
            "bad" => assert!(matches!(outcome, Err(StoreError::Refused(_))), "{outcome:?}"),
            _ => assert!(outcome.is_ok(), "{outcome:?}"),
        }
    }
    let kept = store.effects(&ids).await?.values().filter(|it| it.person_changes == 1).count();
    assert_eq!(kept, 60);
    Ok(())
}

#[cfg(unix)]
#[tokio::test]
async fn nobody_else_may_read_the_file() -> anyhow::Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    let home = Home::sqlite()?;
    let Home::Sqlite(directory) = &home else { anyhow::bail!("a file was asked for") };
    let _store = home.store().await?;

    for entry in std::fs::read_dir(directory.path())? {
        let entry = entry?;
        let mode = entry.metadata()?.permissions().mode();
        assert_eq!(mode & 0o077, 0, "{:?} has mode {mode:o}", entry.file_name());
    }
    Ok(())
}
