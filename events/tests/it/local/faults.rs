//! What goes wrong on a disk, and what becomes of it.

use std::{sync::Arc, time::Duration};

use anyhow::{Context, ensure};
use futures_util::{StreamExt, future::join_all};
use sqlx::Connection;
use vestibule_events::{AppendError, ConsumerSpec, EventLog, Filter, Kind, LocalLog, LogError};

use super::{LocalPlace, sqlite};
use crate::{
    contract::{Place, all, append, next, number_of, replay, soon, spec},
    sample::call,
};

#[tokio::test]
async fn a_group_that_fails_is_not_stored_and_the_next_one_is() -> anyhow::Result<()> {
    let place = LocalPlace::new()?;
    let log = place.open().await?;
    let mut stored = append(&log, 1..=2).await?;
    let mut sqlite = sqlite(&place).await?;

    sqlx::raw_sql(
        "create trigger full before insert on events when new.sequence > 4
         begin select raise(abort, 'full'); end",
    )
    .execute(&mut sqlite)
    .await?;
    let failed = join_all((3..=40).map(|number| log.append(call(number).event()))).await;
    let repeated = log.append(call(1).event()).await?;
    sqlx::raw_sql("drop trigger full").execute(&mut sqlite).await?;

    let kept: Vec<_> = failed.iter().filter_map(|it| it.as_ref().ok()).collect();
    ensure!(kept.len() <= 2, "no more than what came before the failing sequence");
    for error in failed.iter().filter_map(|it| it.as_ref().err()) {
        ensure!(matches!(error, AppendError::NotStored(_)), "{error:?}");
    }
    ensure!(repeated.duplicate, "what is stored is there for whoever repeats a call");
    stored.extend(kept.iter().map(|it| it.stored.clone()));
    stored.sort_by_key(|it| it.sequence);
    stored.extend(append(&log, 50..=51).await?);
    ensure!(all(&log).await? == stored);
    sqlite.close().await?;
    Ok(())
}

#[tokio::test]
async fn a_failed_call_may_be_made_again() -> anyhow::Result<()> {
    let place = LocalPlace::new()?;
    let log = LocalLog::open(place.config()).await?;
    let mut sqlite = sqlite(&place).await?;
    sqlx::raw_sql(
        "create trigger full before insert on events begin select raise(fail, 'full'); end",
    )
    .execute(&mut sqlite)
    .await?;
    ensure!(log.append(call(1).event()).await.is_err());
    ensure!(log.ready().await.is_err(), "ready, although the last append failed");
    sqlx::raw_sql("drop trigger full").execute(&mut sqlite).await?;

    let appended = log.append(call(1).event()).await?;
    log.ready().await?;
    let log: Arc<dyn EventLog> = Arc::new(log);

    ensure!(!appended.duplicate && all(&log).await? == [appended.stored]);
    sqlite.close().await?;
    Ok(())
}

/// Without a call that would tell.
#[tokio::test]
async fn the_log_says_that_it_cannot_be_written_until_a_write_went_through() -> anyhow::Result<()> {
    let place = LocalPlace::new()?;
    let log = LocalLog::open(place.config()).await?;
    let mut sqlite = sqlite(&place).await?;
    sqlx::raw_sql(
        "create trigger full before insert on events begin select raise(fail, 'full'); end",
    )
    .execute(&mut sqlite)
    .await?;
    ensure!(log.append(call(1).event()).await.is_err());
    // Several writes are tried meanwhile, and fail as well.
    let mut asked = tokio::time::interval(Duration::from_millis(500));
    for _ in 0..6 {
        asked.tick().await;
        ensure!(log.ready().await.is_err(), "ready, although nothing was written");
    }

    sqlx::raw_sql("drop trigger full").execute(&mut sqlite).await?;
    let limit = Duration::from_secs(20);
    vestibule_testkit::eventually(limit, "it is found out", async || {
        log.ready().await.map(|()| true)
    })
    .await?;

    ensure!(log.last_sequence() == 0, "a trial write is not an event");
    let appended = log.append(call(1).event()).await?;
    ensure!(!appended.duplicate && appended.stored.sequence == 1);
    sqlite.close().await?;
    Ok(())
}

#[tokio::test]
async fn a_consumer_that_is_removed_begins_anew() -> anyhow::Result<()> {
    let place = LocalPlace::new()?;
    let local = LocalLog::open(place.config()).await?;
    let log: Arc<dyn EventLog> = Arc::new(local.clone());
    append(&log, 1..=2).await?;
    let mut consumer = log.consumer(spec("worker")).await?;
    next(&mut consumer).await?.acknowledge.ack().await?;

    let refused = local.remove_consumer("worker").await;
    ensure!(matches!(refused, Err(LogError::Refused(_))), "it is open: {refused:?}");
    drop(consumer);
    ensure!(local.remove_consumer("worker").await?);
    ensure!(!local.remove_consumer("worker").await?);
    ensure!(log.backlog("worker").await?.is_none());

    let mut consumer = log.consumer(spec("worker")).await?;
    ensure!(number_of(&next(&mut consumer).await?)? == 1);
    Ok(())
}

#[tokio::test]
async fn a_repetition_is_known_after_a_restart_though_the_clock_was_wrong_for_a_moment()
-> anyhow::Result<()> {
    let place = LocalPlace::new()?;
    let log = place.open().await?;
    log.append(call(1).later(Duration::from_secs(86_400)).event()).await?;
    let first = log.append(call(2).event()).await?.stored;

    let log = place.restart(log).await?;
    let repeated = log.append(call(2).event()).await?;

    ensure!(repeated.duplicate && repeated.stored == first);
    Ok(())
}

/// As after a commit of which nobody learnt that it succeeded.
#[tokio::test]
async fn what_is_in_the_file_and_not_in_memory_is_found_at_the_next_failure() -> anyhow::Result<()>
{
    let place = LocalPlace::new()?;
    let log = place.open().await?;
    append(&log, 1..=1).await?;
    let unheard = call(2).event();
    let mut sqlite = sqlite(&place).await?;
    sqlx::query("insert into events (sequence, event) values (2, ?)")
        .bind(serde_json::to_string(&unheard)?)
        .execute(&mut sqlite)
        .await?;

    let failed = log.append(call(3).event()).await;
    let appended = log.append(call(3).event()).await?;
    let repeated = log.append(call(2).event()).await?;

    ensure!(failed.is_err());
    ensure!(!appended.duplicate && appended.stored.sequence == 3);
    ensure!(repeated.duplicate && repeated.stored.event == unheard);
    ensure!(all(&log).await?.len() == 3);
    sqlite.close().await?;
    Ok(())
}

#[tokio::test]
async fn an_acknowledgement_that_is_not_saved_says_so_and_holds_in_this_process()
-> anyhow::Result<()> {
    let place = LocalPlace::new()?;
    let log = place.open().await?;
    append(&log, 1..=2).await?;
    let mut consumer = log.consumer(spec("worker")).await?;
    let mut sqlite = sqlite(&place).await?;
    sqlx::raw_sql(
        "create trigger full before update on consumers begin select raise(abort, 'full'); end",
    )
    .execute(&mut sqlite)
    .await?;

    let first = next(&mut consumer).await?;
    let unsaved = first.acknowledge.ack().await;
    sqlx::raw_sql("drop trigger full").execute(&mut sqlite).await?;
    ensure!(matches!(unsaved, Err(LogError::Unavailable(_))), "{unsaved:?}");
    next(&mut consumer).await?.acknowledge.ack().await?;

    drop(consumer);
    let log = place.restart(log).await?;
    ensure!(log.backlog("worker").await?.context("is there")?.is_empty());
    sqlite.close().await?;
    Ok(())
}

/// A worker whose disk is full puts one event after the other off, and must not be told each time.
#[tokio::test]
async fn an_event_that_is_put_off_comes_again_although_that_could_not_be_saved()
-> anyhow::Result<()> {
    let place = LocalPlace::new()?;
    let log = place.open().await?;
    append(&log, 1..=1).await?;
    let mut consumer = log.consumer(spec("worker")).await?;
    let mut sqlite = sqlite(&place).await?;
    sqlx::raw_sql(
        "create trigger full before update on consumers begin select raise(abort, 'full'); end",
    )
    .execute(&mut sqlite)
    .await?;

    next(&mut consumer).await?.acknowledge.nack(Duration::from_millis(1)).await?;

    ensure!(next(&mut consumer).await?.deliveries == 2);
    sqlite.close().await?;
    Ok(())
}

#[tokio::test]
async fn an_append_that_nobody_waits_for_harms_no_other() -> anyhow::Result<()> {
    let place = LocalPlace::new()?;
    let log = place.open().await?;

    for number in 0..50 {
        let given_up = log.append(call(2 * number).event());
        let waited_for = log.append(call(2 * number + 1).event());
        let limit = Duration::from_micros(number * 20);
        let (_, appended) = tokio::join!(tokio::time::timeout(limit, given_up), waited_for);
        appended?;
    }

    let stored = all(&log).await?;
    ensure!(stored.windows(2).all(|it| it[0].sequence + 1 == it[1].sequence));
    ensure!(stored.len() >= 50);
    Ok(())
}

#[tokio::test]
async fn what_cannot_be_read_is_delivered_as_that() -> anyhow::Result<()> {
    let place = LocalPlace::new()?;
    let log = place.open().await?;
    append(&log, 1..=1).await?;
    place.close().await?;
    let mut sqlite = sqlite(&place).await?;
    let later_kind =
        serde_json::to_string(&call(9).event())?.replace("signup.accepted", "signup.new");
    for event in ["{ no event", later_kind.as_str()] {
        sqlx::query("insert into events (event) values (?)")
            .bind(event)
            .execute(&mut sqlite)
            .await?;
    }
    sqlite.close().await?;
    let log = place.open().await?;
    append(&log, 4..=4).await?;

    let mut everything = log.consumer(spec("everything")).await?;
    ensure!(number_of(&next(&mut everything).await?)? == 1);
    for sequence in 2..=3 {
        let delivery = next(&mut everything).await?;
        let error = delivery.event.as_ref().err().context("cannot be read")?;
        ensure!(delivery.sequence == sequence && !error.raw.is_empty());
        ensure!(
            !format!("{error:?} {error}").contains("no event"),
            "quotes what it could not read"
        );
    }
    ensure!(number_of(&next(&mut everything).await?)? == 4);

    // Of a kind that this version does not know, it is known that nobody asked for it.
    let filter = Filter { kinds: vec![Kind::Accepted], connectors: vec![] };
    let mut accepted = log.consumer(ConsumerSpec { filter, ..spec("accepted") }).await?;
    let waiting = log.backlog("accepted").await?.context("is there")?.waiting;
    ensure!(waiting == 3, "{waiting} wait");
    for sequence in [1, 2, 4] {
        ensure!(next(&mut accepted).await?.sequence == sequence);
    }

    let replayed: Vec<_> = soon(log.replay(replay()).await?.collect()).await?;
    let readable: Vec<_> = replayed.iter().map(Result::is_ok).collect();
    ensure!(readable == [true, false, false, true], "and the replay goes on after them");
    Ok(())
}

#[tokio::test]
async fn after_closing_everybody_is_told() -> anyhow::Result<()> {
    let place = LocalPlace::new()?;
    let log = place.open().await?;
    let mut consumer = log.consumer(spec("worker")).await?;
    let mut follows = log.replay(vestibule_events::Replay { follow: true, ..replay() }).await?;
    let waiting = tokio::spawn(async move { (consumer.next().await, consumer) });

    place.close().await?;

    let (told, _consumer) = soon(waiting).await??;
    ensure!(matches!(told, Err(LogError::Refused(_))), "{told:?}");
    ensure!(soon(follows.next()).await?.is_none());
    let appended = log.append(call(1).event()).await;
    ensure!(matches!(appended, Err(AppendError::NotStored(_))), "{appended:?}");
    Ok(())
}

#[tokio::test]
async fn a_closed_log_is_one_file_and_its_lock() -> anyhow::Result<()> {
    let place = LocalPlace::new()?;
    let log = place.open().await?;
    append(&log, 1..=10).await?;
    let _consumer = log.consumer(spec("worker")).await?;

    place.close().await?;

    let directory = place.path().parent().context("has one")?.to_owned();
    let files: std::collections::BTreeSet<_> = std::fs::read_dir(directory)?
        .map(|it| Ok(it?.file_name()))
        .collect::<anyhow::Result<_>>()?;
    ensure!(files == ["events.db", "events.db.connector.lock"].map(Into::into).into(), "{files:?}");
    Ok(())
}

#[tokio::test]
async fn dropping_every_handle_lets_the_file_go() -> anyhow::Result<()> {
    let place = LocalPlace::new()?;
    let log = LocalLog::open(place.config()).await?;
    let log: Arc<dyn EventLog> = Arc::new(log);
    append(&log, 1..=1).await?;

    drop(log);

    let again = soon(async {
        loop {
            match LocalLog::open(place.config()).await {
                Err(LogError::Refused(_)) => tokio::task::yield_now().await,
                other => return other,
            }
        }
    });
    ensure!(again.await??.last_sequence() == 1);
    Ok(())
}

/// A file that is deleted takes writes until the process ends, and then they are gone.
#[tokio::test]
async fn nothing_is_stored_in_a_file_that_is_gone() -> anyhow::Result<()> {
    let place = LocalPlace::new()?;
    let log = LocalLog::open(place.config()).await?;
    log.append(call(1).event()).await?;
    let path = place.config().path;

    std::fs::remove_file(&path)?;
    let error = log.append(call(2).event()).await;
    ensure!(matches!(error, Err(AppendError::NotStored(_))), "{error:?}");
    ensure!(log.ready().await.is_err(), "ready, although the file is gone");

    // What somebody puts in its place is another log, which this one does not know.
    std::fs::write(&path, "")?;
    let error = log.append(call(3).event()).await;
    ensure!(matches!(error, Err(AppendError::NotStored(_))), "{error:?}");
    ensure!(log.ready().await.is_err(), "ready, although it is another file");
    Ok(())
}
