//! Who may have the file open at the same time.

use std::sync::Arc;

use anyhow::{Context, ensure};
use futures_util::StreamExt;
use sqlx::Connection;
use vestibule_events::{
    AppendError, EventLog, LocalLog, LocalLogConfig, LogError, Replay, Retention,
};

use super::{LocalPlace, sqlite};
use crate::{
    contract::{Place, all, append, next, number, number_of, replay, soon, spec},
    sample::call,
};

fn behind_relay(place: &LocalPlace) -> LocalLogConfig {
    LocalLogConfig { retention: Retention::BehindConsumer("relay".into()), ..place.config() }
}

fn refusal<T>(result: Result<T, LogError>) -> anyhow::Result<String> {
    match result {
        Err(LogError::Refused(error)) => Ok(format!("{error:#}")),
        Err(error) => Err(error.into()),
        Ok(_) => anyhow::bail!("was not refused"),
    }
}

#[tokio::test]
async fn a_second_appender_is_refused_and_told_what_to_do() -> anyhow::Result<()> {
    let place = LocalPlace::new()?;
    let log = place.open().await?;

    let error = refusal(LocalLog::open(place.config()).await)?;

    ensure!(error.contains("in use") && error.contains("stop that one"), "{error}");
    ensure!(error.contains(&*place.path().to_string_lossy()), "{error}");
    append(&log, 1..=1).await?;
    Ok(())
}

#[tokio::test]
async fn a_consumer_has_one_handle_at_a_time() -> anyhow::Result<()> {
    let place = LocalPlace::new()?;
    let log = place.open().await?;
    append(&log, 1..=2).await?;
    let mut consumer = log.consumer(spec("worker")).await?;
    let held = next(&mut consumer).await?;

    let error = refusal(log.consumer(spec("worker")).await)?;
    ensure!(error.contains("worker") && error.contains("open already"), "{error}");
    drop(consumer);
    let mut consumer = log.consumer(spec("worker")).await?;

    ensure!(number_of(&next(&mut consumer).await?)? == 2, "the first is in somebody's hands");
    held.acknowledge.ack().await?;
    for name in ["", "Worker", "a.b", "a b"] {
        refusal(log.consumer(spec(name)).await).context(name)?;
    }
    Ok(())
}

#[tokio::test]
async fn a_relay_of_its_own_is_given_what_another_process_appends() -> anyhow::Result<()> {
    let place = LocalPlace::new()?;
    let log: Arc<dyn EventLog> = Arc::new(LocalLog::open(behind_relay(&place)).await?);
    let relay = LocalLog::open_for_relay(behind_relay(&place)).await?;
    let mut consumer = relay.consumer(spec("relay")).await?;

    for number in 1..=3 {
        append(&log, [number]).await?;
        let delivery = next(&mut consumer).await?;
        ensure!(number_of(&delivery)? == number);
        delivery.acknowledge.ack().await?;
    }

    // What the relay did can be seen from the other side.
    ensure!(log.backlog("relay").await?.context("is there")?.is_empty());
    let appended = relay.append(call(9).event()).await;
    ensure!(matches!(appended, Err(AppendError::NotStored(_))), "{appended:?}");
    Ok(())
}

#[tokio::test]
async fn there_is_one_relay() -> anyhow::Result<()> {
    let place = LocalPlace::new()?;
    let log = LocalLog::open(behind_relay(&place)).await?;
    let relay = LocalLog::open_for_relay(behind_relay(&place)).await?;
    refusal(LocalLog::open_for_relay(behind_relay(&place)).await)?;
    let error = refusal(log.consumer(spec("relay")).await)?;
    ensure!(error.contains("in use as relay"), "{error}");

    relay.close().await?;
    let _relay = log.consumer(spec("relay")).await?;

    refusal(LocalLog::open_for_relay(behind_relay(&place)).await)?;
    Ok(())
}

#[tokio::test]
async fn anybody_may_look_while_it_is_appended_to() -> anyhow::Result<()> {
    let place = LocalPlace::new()?;
    let missing = refusal(LocalLog::open_read_only(place.path()).await)?;
    ensure!(missing.contains("there is no log at"), "{missing}");

    let log = place.open().await?;
    append(&log, 1..=2).await?;
    drop(log.consumer(spec("worker")).await?);
    let looks: Arc<dyn EventLog> = Arc::new(LocalLog::open_read_only(place.path()).await?);
    let mut follows = looks.replay(Replay { follow: true, ..replay() }).await?;
    append(&log, 3..=3).await?;

    for expected in 1..=3 {
        let found = soon(follows.next()).await?.context("does not follow")??;
        ensure!(number(&found.event) == expected);
    }
    ensure!(looks.backlog("worker").await?.context("is there")?.waiting == 3);
    ensure!(looks.backlog("nobody").await?.is_none());
    refusal(looks.consumer(spec("worker")).await)?;
    ensure!(matches!(looks.append(call(9).event()).await, Err(AppendError::NotStored(_))));

    place.close().await?;
    let alone: Arc<dyn EventLog> = Arc::new(LocalLog::open_read_only(place.path()).await?);
    ensure!(all(&alone).await?.len() == 3, "and when nobody appends");
    Ok(())
}

#[tokio::test]
async fn a_file_of_a_later_version_is_left_alone() -> anyhow::Result<()> {
    let place = LocalPlace::new()?;
    place.open().await?;
    place.close().await?;
    let mut sqlite = sqlite(&place).await?;
    sqlx::raw_sql("pragma user_version = 99").execute(&mut sqlite).await?;
    sqlite.close().await?;

    let error = refusal(LocalLog::open(place.config()).await)?;

    ensure!(error.contains("later version"), "{error}");
    Ok(())
}

#[cfg(unix)]
#[tokio::test]
async fn the_file_is_for_its_user_alone() -> anyhow::Result<()> {
    use std::os::unix::fs::PermissionsExt;

    let place = LocalPlace::new()?;
    let log = place.open().await?;
    append(&log, 1..=1).await?;

    for suffix in ["", "-wal", "-shm"] {
        let mut path = place.path().into_os_string();
        path.push(suffix);
        let mode = std::fs::metadata(&path)?.permissions().mode();
        ensure!(mode & 0o077 == 0, "{} is {mode:o}", path.display());
    }
    Ok(())
}
