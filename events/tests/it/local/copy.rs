//! A copy that is made while the log is appended to.

use std::{sync::Arc, time::Duration};

use anyhow::{Context, ensure};
use vestibule_events::{EventLog, LocalLog, LocalLogConfig, LogCopy, LogError, Retention};

use super::LocalPlace;
use crate::{
    contract::{Place, all, append, next, spec},
    sample::call,
};

#[tokio::test]
async fn a_copy_has_every_event_up_to_its_end_and_consumers_as_they_were() -> anyhow::Result<()> {
    let place = LocalPlace::new()?;
    let log = place.open().await?;
    append(&log, 1..=2500).await?;
    let mut consumer = log.consumer(spec("worker")).await?;
    for _ in 0..10 {
        next(&mut consumer).await?.acknowledge.ack().await?;
    }
    let target = place.path().with_file_name("copy.db");
    let mut copy = LogCopy::begin(place.path(), &target, false).await?;

    ensure!(copy.step().await? == Some(1000));
    append(&log, 2501..=2600).await?;
    copy.consumers().await?;
    next(&mut consumer).await?.acknowledge.ack().await?;
    let mut through = 0;
    while let Some(reached) = copy.step().await? {
        through = reached;
    }
    let contents = copy.finish().await?;
    append(&log, 2601..=2610).await?;

    ensure!(through == 2600 && contents.last_sequence == 2600 && contents.events == 2600);
    ensure!(LocalLog::contents(&target).await? == contents);
    let copied = LocalLog::open(LocalLogConfig { path: target, ..place.config() }).await?;
    let copied: Arc<dyn EventLog> = Arc::new(copied);
    ensure!(all(&copied).await? == all(&log).await?[..2600]);
    let mut consumer = copied.consumer(spec("worker")).await?;
    ensure!(next(&mut consumer).await?.sequence == 11, "the copy's consumer is where it was then");
    ensure!(append(&copied, [9000]).await?[0].sequence == 2601);
    Ok(())
}

#[tokio::test]
async fn what_retention_removes_meanwhile_leaves_no_gap() -> anyhow::Result<()> {
    let place = LocalPlace::new()?;
    let hour = Duration::from_secs(3600);
    let config = LocalLogConfig { retention: Retention::For(hour), ..place.config() };
    let log = LocalLog::open(config.clone()).await?;
    let first = call(0).time;
    let events = (0..2000).map(|number| log.append(call(number).event()));
    futures_util::future::try_join_all(events).await?;
    let target = place.path().with_file_name("copy.db");
    let mut copy = LogCopy::begin(place.path(), &target, false).await?;
    copy.step().await?;
    log.append(call(3000).later(hour * 3).event()).await?;
    while log.trim(first + hour * 3).await? > 0 {}

    while copy.step().await?.is_some() {}
    let contents = copy.finish().await?;

    ensure!((contents.events, contents.last_sequence) == (1, 2001), "{contents:?}");

    while log.trim(first + hour * 9).await? > 0 {}
    let target = place.path().with_file_name("empty.db");
    let mut copy = LogCopy::begin(place.path(), &target, false).await?;
    ensure!(copy.step().await?.is_none());
    let contents = copy.finish().await?;
    ensure!((contents.events, contents.last_sequence) == (0, 2001), "{contents:?}");
    Ok(())
}

#[tokio::test]
async fn a_copy_is_never_written_over_something() -> anyhow::Result<()> {
    let place = LocalPlace::new()?;
    let log = place.open().await?;
    append(&log, 1..=1).await?;
    let target = place.path().with_file_name("mine.txt");
    std::fs::write(&target, "mine")?;

    let error = LogCopy::begin(place.path(), &target, false).await.err().context("was begun")?;

    ensure!(matches!(error, LogError::Refused(_)) && std::fs::read(&target)? == b"mine");
    Ok(())
}
