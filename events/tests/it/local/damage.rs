//! A log that is damaged, gone or cannot be written: nothing starts empty in its place, the error says
//! what to do, and what can be read is read.

use std::{
    fs::{File, OpenOptions},
    os::unix::fs::FileExt,
    path::Path,
    sync::Arc,
};

use anyhow::{Context, ensure};
use vestibule_events::{EventLog, LocalLog, LocalLogConfig, LogCopy, LogError};

use super::LocalPlace;
use crate::{
    contract::{Place, all, append, next, number, spec},
    sample::call,
};

/// A closed log with so many events and a consumer that has had them all.
async fn closed_log(place: &LocalPlace, events: u64) -> anyhow::Result<()> {
    let log = place.open().await?;
    append(&log, 1..=events).await?;
    let mut consumer = log.consumer(spec("worker")).await?;
    for _ in 0..events {
        next(&mut consumer).await?.acknowledge.ack().await?;
    }
    drop(consumer);
    place.close().await
}

async fn refusal(place: &LocalPlace) -> anyhow::Result<String> {
    match LocalLog::open(place.config()).await {
        Err(LogError::Refused(error)) => Ok(format!("{error:#}")),
        Err(error) => Err(error.into()),
        Ok(_) => anyhow::bail!("was opened"),
    }
}

fn scribble(path: &Path, from: u64) -> anyhow::Result<()> {
    let file = OpenOptions::new().write(true).open(path)?;
    let length = file.metadata()?.len();
    // No bytes that mean anything, the same ones in each run.
    let noise: Vec<u8> = (0..length - from).map(|it| (it * 131 % 251) as u8).collect();
    Ok(file.write_all_at(&noise, from)?)
}

/// Copies what can be read, and opens the copy.
async fn salvage(place: &LocalPlace) -> anyhow::Result<(Arc<dyn EventLog>, Vec<(u64, u64)>)> {
    let copy = place.path().with_file_name("salvaged.db");
    let mut copying = LogCopy::begin(place.path(), &copy, true).await?;
    copying.consumers().await?;
    for _ in 0..2 {
        while copying.step().await?.is_some() {}
    }
    let contents = copying.finish().await?;
    let log = LocalLog::open(LocalLogConfig { path: copy, ..place.config() }).await?;
    Ok((Arc::new(log), contents.lost))
}

async fn numbers(log: &Arc<dyn EventLog>) -> anyhow::Result<Vec<u64>> {
    Ok(all(log).await?.iter().map(|it| number(&it.event)).collect())
}

#[tokio::test]
async fn a_damaged_end_is_named_with_its_remedy_and_what_is_before_it_is_salvaged()
-> anyhow::Result<()> {
    let place = LocalPlace::new()?;
    closed_log(&place, 400).await?;
    let length = std::fs::metadata(place.path())?.len();
    scribble(&place.path(), length - 10 * 4096)?;

    let error = refusal(&place).await?;
    for part in [&*place.path().to_string_lossy(), "damaged", "vestibule backup --salvage"] {
        ensure!(error.contains(part), "{part} is not in: {error}");
    }

    let (log, lost) = salvage(&place).await?;
    let found = numbers(&log).await?;
    ensure!(found.len() >= 300 && found.iter().copied().eq(1..=found.len() as u64), "{found:?}");
    ensure!(lost.len() == 1 && lost[0].0 == found.len() as u64 + 1, "{lost:?}");
    // Its sequence is beyond what the consumer had, so that it is delivered.
    let appended = append(&log, [1000]).await?;
    let mut consumer = log.consumer(spec("worker")).await?;
    ensure!(next(&mut consumer).await?.sequence == appended[0].sequence);
    Ok(())
}

#[tokio::test]
async fn damage_in_the_middle_costs_what_lies_there_and_no_more() -> anyhow::Result<()> {
    let place = LocalPlace::new()?;
    closed_log(&place, 400).await?;
    let file = OpenOptions::new().write(true).open(place.path())?;
    file.write_all_at(&[0xa5; 3 * 4096], 40 * 4096)?;

    let (log, lost) = salvage(&place).await?;

    let found = numbers(&log).await?;
    let gone: u64 = lost.iter().map(|(from, through)| through - from + 1).sum();
    ensure!(gone > 0 && gone < 40, "{lost:?}");
    ensure!(found.len() as u64 + gone == 400, "{} and {lost:?}", found.len());
    Ok(())
}

#[tokio::test]
async fn a_file_that_was_cut_is_refused() -> anyhow::Result<()> {
    let place = LocalPlace::new()?;
    closed_log(&place, 200).await?;
    let length = std::fs::metadata(place.path())?.len();
    OpenOptions::new().write(true).open(place.path())?.set_len(length / 2)?;

    let error = refusal(&place).await?;

    ensure!(error.contains("damaged"), "{error}");
    Ok(())
}

#[tokio::test]
async fn no_empty_log_takes_the_place_of_one_that_was_there() -> anyhow::Result<()> {
    let place = LocalPlace::new()?;
    closed_log(&place, 2).await?;
    let kept = place.path().with_extension("kept");
    std::fs::rename(place.path(), &kept)?;

    let gone = refusal(&place).await?;
    ensure!(!place.path().exists(), "made a new one");
    File::create(place.path())?;
    let empty = refusal(&place).await?;
    for error in [gone, empty] {
        ensure!(error.contains("bring it back from a backup"), "{error}");
        ensure!(error.contains("events.db.connector.lock"), "{error}");
    }

    std::fs::rename(kept, place.path())?;
    ensure!(all(&place.open().await?).await?.len() == 2);
    Ok(())
}

#[tokio::test]
async fn what_is_no_log_is_left_alone() -> anyhow::Result<()> {
    let place = LocalPlace::new()?;
    std::fs::create_dir_all(place.path().parent().context("has one")?)?;
    std::fs::write(
        place.path(),
        "Dear diary, today nothing was written into a database. ".repeat(90),
    )?;
    let text = refusal(&place).await?;
    ensure!(text.contains("damaged"), "{text}");

    std::fs::remove_file(place.path())?;
    let options = sqlx::sqlite::SqliteConnectOptions::new().filename(place.path());
    let options = options.create_if_missing(true);
    let mut other = <sqlx::SqliteConnection as sqlx::Connection>::connect_with(&options).await?;
    sqlx::raw_sql("create table diary (entry text)").execute(&mut other).await?;
    sqlx::Connection::close(other).await?;
    let other = refusal(&place).await?;
    ensure!(other.contains("is not a log"), "{other}");
    Ok(())
}

/// As a crash leaves it: a file and its write-ahead log, and in that a byte that is wrong.
#[tokio::test]
async fn what_was_written_before_the_damage_in_a_write_ahead_log_is_read() -> anyhow::Result<()> {
    let place = LocalPlace::new()?;
    let log = place.open().await?;
    for number in 1..=50 {
        append(&log, [number]).await?;
    }
    let crashed = LocalPlace::new()?;
    std::fs::create_dir_all(crashed.path().parent().context("has one")?)?;
    let wal = |path: &Path| path.with_file_name("events.db-wal");
    std::fs::copy(place.path(), crashed.path())?;
    std::fs::copy(wal(&place.path()), wal(&crashed.path()))?;
    let file = OpenOptions::new().read(true).write(true).open(wal(&crashed.path()))?;
    let middle = file.metadata()?.len() / 2;
    let mut byte = [0];
    file.read_exact_at(&mut byte, middle)?;
    file.write_all_at(&[!byte[0]], middle)?;

    let log = crashed.open().await?;

    let found = numbers(&log).await?;
    ensure!(!found.is_empty() && found.len() < 50, "{} were found", found.len());
    ensure!(found.iter().copied().eq(1..=found.len() as u64), "{found:?}");
    ensure!(crashed.path().with_file_name("events.db-wal.damaged").exists(), "was not kept");
    append(&log, [100]).await?;
    Ok(())
}

#[tokio::test]
async fn a_second_process_is_told_who_has_the_log() -> anyhow::Result<()> {
    let place = LocalPlace::new()?;
    let _log = place.open().await?;

    let error = refusal(&place).await?;

    ensure!(error.contains(&format!("by process {}", std::process::id())), "{error}");
    Ok(())
}

/// A clock that goes backwards takes no event away and puts none in another order.
#[tokio::test]
async fn events_keep_their_order_when_the_clock_goes_backwards() -> anyhow::Result<()> {
    let place = LocalPlace::new()?;
    let log = place.open().await?;
    let now = call(0).time;
    for number in 1..=30_u32 {
        let time = now - std::time::Duration::from_secs(3600) * number;
        log.append(crate::sample::Call { time, ..call(number.into()) }.event()).await?;
    }

    let log = place.restart(log).await?;

    ensure!(numbers(&log).await?.into_iter().eq(1..=30));
    let mut consumer = log.consumer(spec("worker")).await?;
    for expected in 1..=30 {
        ensure!(next(&mut consumer).await?.sequence == expected);
    }
    ensure!(append(&log, [31]).await?[0].sequence == 31);
    Ok(())
}
