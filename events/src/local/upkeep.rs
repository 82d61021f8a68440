//! What has to be done beside appending: checkpoints, trimming, learning of other processes.

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc, Weak,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use sqlx::Connection;
use time::OffsetDateTime;
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::{MissedTickBehavior, interval},
};
use tokio_util::sync::CancellationToken;
use tracing::warn;

use super::{
    Inner, Retention,
    file::{self, Sync},
    held::Windows,
    metrics::Metrics,
    read::{Reader, before},
    writer::Command,
};
use crate::LogError;

/// How often retention is applied.
const TRIM_EVERY: Duration = Duration::from_secs(60);

/// Chunks in one step of trimming.
const TRIM_CHUNKS: usize = 16;

/// How soon another process learns of an append.
const POLL_EVERY: Duration = Duration::from_millis(25);

const CHECKPOINT_EVERY: Duration = Duration::from_millis(250);

/// Written since the last checkpoint before there is another: enough that pages written again and
/// again are copied once, little enough that the sync of the main file does not hold up the disk.
const CHECKPOINT_BYTES: u64 = 16 * 1024 * 1024;

const MEASURE_EVERY: Duration = Duration::from_secs(10);

/// Up to where events may leave the log at `now`; 0 where none may.
pub(super) async fn removable(inner: &Inner, now: OffsetDateTime) -> Result<u64, LogError> {
    let last = *inner.last.borrow();
    let older_than = |age: Duration| async move {
        let place = inner.reader.place_of(before(now, age), last).await?;
        Ok::<_, LogError>(place - 1)
    };
    match &inner.retention {
        Retention::For(age) => older_than(*age).await,
        Retention::BehindConsumer(name) => {
            let floor = match inner.opened(name) {
                Some(durable) => durable.floor(),
                None => match inner.reader.consumer(name).await? {
                    Some((cursor, pending, _)) => saved_floor(cursor, &pending),
                    // Nobody has seen any of them.
                    None => return Ok(0),
                },
            };
            // A repeated call is answered from the event it repeats.
            Ok(older_than(inner.windows.longest()).await?.min(floor.saturating_sub(1)))
        }
    }
}

fn saved_floor(cursor: u64, pending: &str) -> u64 {
    // What cannot be read might concern any event.
    serde_json::from_str::<Vec<(u64, u64, Option<i64>)>>(pending)
        .map_or(0, |pending| pending.iter().map(|it| it.0).fold(cursor, u64::min))
}

/// One bounded step of trimming, in chunks between which appends have their turn.
pub(super) async fn trim(inner: &Inner, now: OffsetDateTime) -> Result<u64, LogError> {
    let through = removable(inner, now).await?;
    let mut removed = 0;
    for _ in 0..TRIM_CHUNKS {
        let (reply, answer) = oneshot::channel();
        inner.command(Command::Trim { through, reply }).await?;
        match answer.await.map_err(|_| super::closed())?? {
            0 => break,
            chunk => removed += chunk,
        }
    }
    Ok(removed)
}

/// Applies retention for as long as anybody has the log open.
pub(super) async fn trim_regularly(inner: Weak<Inner>, stop: CancellationToken) {
    let mut ticks = interval(TRIM_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            () = stop.cancelled() => return,
        }
        loop {
            let Some(inner) = inner.upgrade() else { return };
            match trim(&inner, OffsetDateTime::now_utc()).await {
                Ok(0) => break,
                Ok(_) if stop.is_cancelled() => return,
                Ok(_) => {}
                Err(_) if stop.is_cancelled() => return,
                Err(error) => {
                    warn!(cause = ?error, "could not trim the local log; it is tried again in a minute");
                    break;
                }
            }
        }
    }
}

/// Keeps the write-ahead log small without holding up the writer.
///
/// A checkpoint beside the writer copies and syncs nearly everything while appends go on. What was
/// appended meanwhile it has to leave; the writer does that rest between two groups, and with
/// nothing left the log starts over at its beginning.
pub(super) async fn checkpoint_regularly(
    path: PathBuf,
    unsettled_bytes: Arc<AtomicU64>,
    commands: mpsc::Sender<Command>,
    stop: CancellationToken,
) {
    let mut ticks = interval(CHECKPOINT_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            () = stop.cancelled() => return,
        }
        if unsettled_bytes.load(Ordering::Relaxed) < CHECKPOINT_BYTES {
            continue;
        }
        unsettled_bytes.store(0, Ordering::Relaxed);
        if let Err(error) = checkpoint(&path).await {
            warn!(cause = ?error, "could not make a checkpoint of the local log; it grows until one succeeds");
        }
        if commands.send(Command::Checkpoint).await.is_err() {
            return;
        }
    }
}

async fn checkpoint(path: &Path) -> Result<(), LogError> {
    let mut connection = file::writer(path, Sync::Lazy).await?;
    sqlx::query("pragma wal_checkpoint(passive)")
        .execute(&mut connection)
        .await
        .map_err(file::failed(path))?;
    connection.close().await.map_err(file::failed(path))
}

/// Learns of what another process appends.
pub(super) async fn poll(reader: Reader, last: watch::Sender<u64>, stop: CancellationToken) {
    let mut ticks = interval(POLL_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            () = stop.cancelled() => return,
        }
        // An error here is one for whoever reads next, and is told there.
        if let Ok(found) = reader.last().await {
            last.send_if_modified(|known| {
                let newer = found > *known;
                *known = found.max(*known);
                newer
            });
        }
    }
}

/// Keeps the gauges true.
pub(super) async fn measure(
    path: PathBuf,
    reader: Reader,
    last: watch::Receiver<u64>,
    metrics: Metrics,
    stop: CancellationToken,
) {
    let mut ticks = interval(MEASURE_EVERY);
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            () = stop.cancelled() => return,
        }
        if let Ok(first) = reader.first().await {
            let held = first.map_or(0, |first| (*last.borrow() + 1).saturating_sub(first));
            metrics.events.set(i64::try_from(held).unwrap_or(i64::MAX));
        }
        let mut wal = path.clone().into_os_string();
        wal.push("-wal");
        // A disk that hangs may hang this too, and then not on a thread that answers sign-ups.
        let bytes = async |path: &Path| tokio::fs::metadata(path).await.map_or(0, |it| it.len());
        let bytes = bytes(&path).await + bytes(Path::new(&wal)).await;
        metrics.file_bytes.set(i64::try_from(bytes).unwrap_or(i64::MAX));
    }
}

impl From<&super::LocalLogConfig> for Windows {
    fn from(config: &super::LocalLogConfig) -> Self {
        Self { duplicate: config.duplicate_window, refusal: config.refusal_window }
    }
}
