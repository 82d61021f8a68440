//! What has to be done beside appending: checkpoints, trimming, learning of other processes.

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError, Weak,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use sqlx::Connection;
use time::OffsetDateTime;
use tokio::{
    sync::{mpsc, oneshot, watch},
    task::spawn_blocking,
    time::{MissedTickBehavior, interval, sleep},
};
use tokio_util::sync::CancellationToken;
use tracing::warn;

use super::{
    Inner, Retention,
    file::{self, Sync},
    held::Windows,
    metrics::Metrics,
    read::{Reader, before, time_of},
    writer::{Command, Health},
};
use crate::LogError;

/// How often retention is applied.
const TRIM_EVERY: Duration = Duration::from_secs(60);

/// Events removed in one step of trimming, more or less.
const TRIM_STEP: usize = 4096;

/// Between two steps: what is freed and moved has to reach the disk too, and sign-ups go first.
const BREATH: Duration = Duration::from_millis(5);

/// How soon another process learns of an append.
const POLL_EVERY: Duration = Duration::from_millis(25);

const CHECKPOINT_EVERY: Duration = Duration::from_millis(250);

/// Written since the last checkpoint before there is another: enough that pages written again and
/// again are copied once, little enough that the sync of the main file does not hold up the disk.
const CHECKPOINT_BYTES: u64 = 16 * 1024 * 1024;

const MEASURE_EVERY: Duration = Duration::from_secs(10);

const PROBE_EVERY: Duration = Duration::from_secs(1);

/// Writes go through in milliseconds; with one that takes so long nobody should be sent here.
const HANGS_AFTER: Duration = Duration::from_secs(5);

/// With less room than this it is high time: at a hundred sign-ups a second it lasts some hours.
const FREE_MIN: u64 = 1 << 30;

/// Below this no event is needed any more by whom retention waits for.
async fn floor(inner: &Inner) -> Result<u64, LogError> {
    let Retention::BehindConsumer(name) = &inner.retention else { return Ok(u64::MAX) };
    Ok(match inner.opened(name) {
        Some(durable) => durable.floor(),
        None => match inner.reader.consumer(name).await? {
            Some((cursor, pending, _)) => saved_floor(cursor, &pending),
            // Nobody has seen any of them.
            None => 0,
        },
    })
}

/// Up to where events are past their time at `now`: from the front on, as far as `most` events
/// that can be told; 0 where none is.
async fn expired(inner: &Inner, now: OffsetDateTime, most: usize) -> Result<u64, LogError> {
    let age = match &inner.retention {
        Retention::For(age) => *age,
        // A repeated call is answered from the event it repeats.
        Retention::BehindConsumer(_) => inner.windows.longest(),
    };
    let mut front = Front { cutoff: before(now, age), now, through: 0, told: 0 };
    let mut from = 0;
    loop {
        let page = inner.reader.page(from).await?;
        let Some((end, _)) = page.back() else { break };
        from = end + 1;
        let times = page.iter().map(|(sequence, raw)| (*sequence, time_of(raw)));
        if front.take(times) || front.told >= most {
            break;
        }
    }
    Ok(front.through)
}

/// The oldest events, looked at in order.
///
/// Not by their times alone: a clock that was wrong for a while stamped some with times long gone,
/// and they must not take everything before them along; others with times yet to come, and they must
/// not keep everything behind them here.
struct Front {
    cutoff: OffsetDateTime,
    now: OffsetDateTime,
    /// All up to here are before the cutoff.
    through: u64,
    /// How many of them had a time that can be believed.
    told: usize,
}

impl Front {
    /// Whether there was one that must stay.
    fn take(&mut self, events: impl Iterator<Item = (u64, Option<OffsetDateTime>)>) -> bool {
        for (sequence, time) in events {
            // What has no time that can be: the next that has one speaks for it.
            let Some(time) = time.filter(|it| *it <= self.now) else { continue };
            if time >= self.cutoff {
                return true;
            }
            self.through = sequence;
            self.told += 1;
        }
        false
    }
}

fn saved_floor(cursor: u64, pending: &str) -> u64 {
    // What cannot be read might concern any event.
    serde_json::from_str::<Vec<(u64, u64, Option<i64>)>>(pending)
        .map_or(0, |pending| pending.iter().map(|it| it.0).fold(cursor, u64::min))
}

/// One bounded step of trimming, in chunks between which appends have their turn.
pub(super) async fn trim(inner: &Inner, now: OffsetDateTime) -> Result<u64, LogError> {
    let expired = expired(inner, now, TRIM_STEP).await?;
    let through = expired.min(floor(inner).await?.saturating_sub(1));
    let mut removed = 0;
    loop {
        match inner.ask(|reply| Command::Trim { through, reply }).await? {
            0 => return Ok(removed),
            chunk => removed += chunk,
        }
    }
}

/// Gives some unused room at the end of the file back to the disk; says how many pages.
pub(super) async fn shrink(inner: &Inner) -> Result<u64, LogError> {
    inner.ask(|reply| Command::Shrink { reply }).await
}

/// Applies retention, and gives room back, for as long as anybody has the log open.
pub(super) async fn trim_regularly(inner: Weak<Inner>, stop: CancellationToken) {
    let mut ticks = interval(TRIM_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut clock = Clock { since: Instant::now(), then: OffsetDateTime::now_utc() };
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            () = stop.cancelled() => return,
        }
        let settled = clock.is_settled(Instant::now(), OffsetDateTime::now_utc());
        loop {
            let Some(inner) = inner.upgrade() else { return };
            if !settled && matches!(inner.retention, Retention::For(_)) {
                break;
            }
            let step = async {
                match trim(&inner, OffsetDateTime::now_utc()).await? {
                    // Freed pages are used again; only many of them are worth the work.
                    0 => shrink(&inner).await,
                    removed => Ok(removed),
                }
            };
            match step.await {
                Ok(0) => break,
                _ if stop.is_cancelled() => return,
                Ok(_) => sleep(BREATH).await,
                Err(error) => {
                    warn!(cause = ?error, "could not trim the local log; it is tried again in a minute");
                    break;
                }
            }
        }
    }
}

/// Whether the clock can be believed. One that is wrong when a computer starts is set by the network
/// some time later; until then an archive removes nothing, or it might remove everything.
struct Clock {
    since: Instant,
    then: OffsetDateTime,
}

impl Clock {
    const SETTLES_IN: Duration = Duration::from_secs(600);

    fn is_settled(&mut self, at: Instant, now: OffsetDateTime) -> bool {
        let expected = self.then + at.duration_since(self.since);
        if (now - expected).unsigned_abs() > Duration::from_secs(60) {
            *self = Self { since: at, then: now };
        }
        at.duration_since(self.since) >= Self::SETTLES_IN
    }
}

/// Tries the disk where nothing is known of it or nothing good, so that readiness is true also while
/// nobody signs up.
pub(super) async fn probe_regularly(
    health: Health,
    commands: mpsc::Sender<Command>,
    stop: CancellationToken,
) {
    let mut ticks = interval(PROBE_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            () = stop.cancelled() => return,
        }
        if !health.wants_probe() {
            continue;
        }
        let (done, probed) = oneshot::channel();
        let asked = async {
            commands.send(Command::Probe { done }).await.ok()?;
            probed.await.ok()
        };
        tokio::pin!(asked);
        let answer = tokio::select! {
            answer = &mut asked => answer,
            () = sleep(HANGS_AFTER) => {
                health.hangs(HANGS_AFTER);
                asked.await
            }
        };
        if answer.is_none() {
            return;
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

/// How large the log is, and how much room there is.
#[derive(Clone, Debug, Default)]
pub(super) struct Size(Arc<SizeState>);

#[derive(Debug)]
struct SizeState {
    /// More is worth a warning.
    warn_bytes: AtomicU64,
    warning: Mutex<Option<String>>,
}

impl Default for SizeState {
    fn default() -> Self {
        Self { warn_bytes: AtomicU64::new(10 << 30), warning: Mutex::default() }
    }
}

impl Size {
    pub(super) fn warn_above(&self, bytes: u64) {
        self.0.warn_bytes.store(bytes, Ordering::Relaxed);
    }

    pub(super) fn warning(&self) -> Option<String> {
        self.0.warning.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Says so once when it begins.
    fn note(&self, log: &Path, bytes: u64, free: Option<u64>) {
        let warn_above = self.0.warn_bytes.load(Ordering::Relaxed);
        let warning = too_little_room(bytes, free, warn_above);
        let mut known = self.0.warning.lock().unwrap_or_else(PoisonError::into_inner);
        if let (None, Some(warning)) = (&*known, &warning) {
            warn!(log = %log.display(), bytes, free, "{warning}");
        }
        *known = warning;
    }
}

/// What is wrong with the room that the log takes and has, early enough to do something.
fn too_little_room(bytes: u64, free: Option<u64>, warn_above: u64) -> Option<String> {
    let mib = |bytes: u64| bytes >> 20;
    if let Some(free) = free.filter(|it| *it < FREE_MIN) {
        return Some(format!(
            "only {} MiB are free on the disk of the local log; once it is full nobody can sign up",
            mib(free)
        ));
    }
    (bytes > warn_above).then(|| {
        format!(
            "the local log takes {} MiB, more than log.warn_size; see whether the relay publishes, \
             or shorten log.retention",
            mib(bytes)
        )
    })
}

/// Keeps the gauges true, and warns.
pub(super) async fn measure(
    path: PathBuf,
    reader: Reader,
    last: watch::Receiver<u64>,
    metrics: Metrics,
    size: Size,
    stop: CancellationToken,
) {
    let mut ticks = interval(MEASURE_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let gauge = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            () = stop.cancelled() => return,
        }
        if let Ok(first) = reader.page(0).await {
            let first = first.front();
            let held = first.map_or(0, |(first, _)| (*last.borrow() + 1).saturating_sub(*first));
            metrics.events.set(gauge(held));
            let age =
                first.and_then(|(_, raw)| time_of(raw)).map(|it| OffsetDateTime::now_utc() - it);
            metrics.oldest_seconds.set(age.map_or(0, |age| age.whole_seconds().max(0)));
        }
        // A disk that hangs may hang this too, and then not on a thread that answers sign-ups.
        let looked = path.clone();
        let Ok((bytes, free)) = spawn_blocking(move || look(&looked)).await else { continue };
        metrics.bytes.set(gauge(bytes));
        if let Some(free) = free {
            metrics.free_bytes.set(gauge(free));
        }
        size.note(&path, bytes, free);
    }
}

/// What the log takes, with its write-ahead log, and what its disk has left for us.
fn look(path: &Path) -> (u64, Option<u64>) {
    let bytes = |path: &Path| std::fs::metadata(path).map_or(0, |it| it.len());
    (bytes(path) + bytes(&file::beside(path, "-wal")), file::room(path))
}

impl From<&super::LocalLogConfig> for Windows {
    fn from(config: &super::LocalLogConfig) -> Self {
        Self { duplicate: config.duplicate_window, refusal: config.refusal_window }
    }
}

#[cfg(test)]
mod tests {
    use time::macros::datetime;

    use super::*;

    const NOW: OffsetDateTime = datetime!(2026-11-22 10:00 UTC);
    const DAY: time::Duration = time::Duration::DAY;

    /// Up to where events go that are so many days old, with a retention of ten.
    fn through(days: &[Option<i32>]) -> u64 {
        let mut front = Front { cutoff: NOW - DAY * 10, now: NOW, through: 0, told: 0 };
        let times = days.iter().map(|it| it.map(|days| NOW - DAY * days));
        front.take((1..).zip(times));
        front.through
    }

    #[test]
    fn events_go_from_the_front_up_to_the_first_that_is_young_enough() {
        assert_eq!(through(&[]), 0);
        assert_eq!(through(&[Some(10), Some(20)]), 0, "exactly as old stays, and holds the next");
        assert_eq!(through(&[Some(20), Some(11), Some(10), Some(9)]), 2);
        assert_eq!(through(&[Some(20), Some(11)]), 2);
    }

    #[test]
    fn a_clock_that_was_wrong_takes_no_others_along_and_holds_none_up() {
        let of_1970 = Some(20_000);
        assert_eq!(through(&[Some(5), of_1970, of_1970, Some(4)]), 0);
        assert_eq!(through(&[Some(11), of_1970, Some(4)]), 2);
        let in_the_future = Some(-5000);
        assert_eq!(through(&[Some(20), in_the_future, None, Some(11), Some(2)]), 4);
        assert_eq!(through(&[in_the_future, None]), 0, "nobody can tell yet");
    }

    proptest::proptest! {
        #[test]
        fn no_event_goes_that_is_young_or_behind_a_young_one(
            days in proptest::collection::vec(proptest::option::of(-30_i32..30), 0..40),
        ) {
            let through = usize::try_from(through(&days)).unwrap();
            for day in days[..through].iter().flatten() {
                proptest::prop_assert!(*day > 10 || *day < 0);
            }
            // And all go that may: what follows begins with nothing that is old and told.
            let next = days[through..].iter().flatten().find(|it| **it >= 0);
            proptest::prop_assert!(next.is_none_or(|day| *day <= 10));
        }
    }

    #[test]
    fn a_clock_is_believed_once_it_has_gone_evenly_for_a_while() {
        let start = Instant::now();
        let mut clock = Clock { since: start, then: NOW };
        let mut after = |seconds: u64, jumped: i64| {
            let now = NOW + Duration::from_secs(seconds) + time::Duration::seconds(jumped);
            clock.is_settled(start + Duration::from_secs(seconds), now)
        };
        assert!(!after(0, 0) && !after(599, 5));
        assert!(after(600, -20));
        assert!(!after(700, 86_400), "it was set forward");
        assert!(!after(1299, 86_400));
        assert!(after(1300, 86_400));
        assert!(!after(2000, 0), "and back");
    }

    #[test]
    fn warnings_come_before_the_disk_is_full() {
        let warn = |bytes, free| too_little_room(bytes, free, 1000).unwrap_or_default();
        assert_eq!(warn(1000, Some(FREE_MIN)), "");
        assert_eq!(warn(1000, None), "");
        assert!(warn(1001, Some(FREE_MIN)).contains("log.warn_size"));
        assert!(warn(0, Some(FREE_MIN - 1)).contains("1023 MiB are free"));
    }
}
