//! What goes on beside the events: leases are kept, the operators' word is heard, what waits is
//! counted, and a log that has fallen silent is noticed.

use std::{
    convert::Infallible,
    sync::{Mutex, MutexGuard, PoisonError, atomic::Ordering},
    time::{Duration, Instant},
};

use time::OffsetDateTime;
use tokio::{
    sync::Notify,
    time::{MissedTickBehavior, interval},
};
use tracing::{debug, warn};
use vestibule_events::{Backlog, ConsumerSpec, EventLog};
use vestibule_store::{Store, StoreError};

use super::{
    attempt::Desk,
    retry::{Pace, Rest},
    text,
};

/// Does all of it, for as long as it is polled.
pub(super) async fn oversee(
    desk: &Desk,
    log: &dyn EventLog,
    spec: &ConsumerSpec,
    watch: &Watch,
) -> Infallible {
    tokio::select! {
        never = keep_leases(desk) => never,
        never = hear(desk, watch) => never,
        never = count_backlog(desk, log, spec, watch) => never,
    }
}

/// Whether somebody waits for the log, and how old what waits is.
#[derive(Debug, Default)]
pub(super) struct Watch {
    seen: Mutex<Seen>,
    stalled: Notify,
}

#[derive(Debug, Default)]
struct Seen {
    /// Since when the log has given nothing to somebody who waits for it.
    waits_since: Option<Instant>,
    /// Of what waits in the store, and in the log.
    oldest: [Option<OffsetDateTime>; 2],
}

impl Watch {
    /// Somebody waits for the log until this is dropped.
    pub(super) fn waits(&self) -> Waits<'_> {
        self.seen().waits_since = Some(Instant::now());
        Waits(self)
    }

    /// Resolves when the log seems to have forgotten us.
    pub(super) async fn stalled(&self) {
        self.stalled.notified().await;
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        // Nothing panics while it is held.
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

pub(super) struct Waits<'a>(&'a Watch);

impl Drop for Waits<'_> {
    fn drop(&mut self) {
        self.0.seen().waits_since = None;
    }
}

fn ticks(every: Duration) -> tokio::time::Interval {
    let mut ticks = interval(every);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks
}

/// Keeps the events from the store that are in hand from being given to others.
async fn keep_leases(desk: &Desk) -> Infallible {
    let mut beat = ticks(desk.settings.heartbeat());
    loop {
        beat.tick().await;
        let (name, in_hand) = (desk.name(), desk.leases.all());
        let until = OffsetDateTime::now_utc() + desk.settings.ack_wait;
        if let Err(error) = desk.store.extend_retries(name, &in_hand, until).await {
            let error = text::of(&error.into());
            debug!(worker = name, error, "the store extended no leases");
        }
    }
}

/// Learns whether the worker is paused, and what of its events is set aside.
async fn hear(desk: &Desk, watch: &Watch) -> Infallible {
    let mut pace = Pace::default();
    let mut beat = ticks(desk.rhythm.poll);
    let mut counted: Option<Instant> = None;
    loop {
        beat.tick().await;
        let count = counted.is_none_or(|at| at.elapsed() >= desk.rhythm.count);
        match hear_once(desk, &desk.store, watch, count).await {
            Ok(()) => {
                pace.succeeded();
                if count {
                    counted = Some(Instant::now());
                }
            }
            Err(error) => {
                let Rest { tell, .. } = pace.failed(Instant::now());
                if tell {
                    let error = text::of(&error.into());
                    warn!(worker = desk.name(), error, "cannot learn whether the worker is paused");
                }
            }
        }
    }
}

async fn hear_once(
    desk: &Desk,
    store: &Store,
    watch: &Watch,
    count: bool,
) -> Result<(), StoreError> {
    if count {
        // Whether the worker is paused must be heard all the same.
        let set_aside = match store.set_aside(desk.name()).await {
            Ok(set_aside) => set_aside,
            Err(error) => {
                desk.hear_whether_paused(store).await?;
                return Err(error);
            }
        };
        let gauge = |count: u64| i64::try_from(count).unwrap_or(i64::MAX);
        desk.metrics.retries.set(gauge(set_aside.retries));
        desk.metrics.dead_letters.set(gauge(set_aside.parked));
        desk.sets_aside.store(set_aside.retries + set_aside.parked > 0, Ordering::Relaxed);
        note_oldest(desk, watch, 0, set_aside.oldest_event);
    }
    // Last, as this is what opens the gate.
    desk.hear_whether_paused(store).await
}

fn note_oldest(desk: &Desk, watch: &Watch, place: usize, oldest: Option<OffsetDateTime>) {
    let mut seen = watch.seen();
    seen.oldest[place] = oldest;
    let oldest = seen.oldest.iter().flatten().min();
    let age = oldest.map(|it| (OffsetDateTime::now_utc() - *it).try_into().unwrap_or_default());
    desk.metrics.oldest(age.unwrap_or_default());
}

/// Counts what waits in the log, and says so where the log gives nothing of it.
async fn count_backlog(
    desk: &Desk,
    log: &dyn EventLog,
    spec: &ConsumerSpec,
    watch: &Watch,
) -> Infallible {
    let mut stall = Stall::default();
    let mut beat = ticks(desk.rhythm.count);
    loop {
        beat.tick().await;
        let Ok(Some(backlog)) = log.backlog(&spec.name).await else {
            // Why it does not answer is said by whoever takes events from it.
            stall = Stall::default();
            continue;
        };
        desk.metrics.backlog.set(i64::try_from(backlog.waiting).unwrap_or(i64::MAX));
        // What waits happened after what was given last; more is not known without reading it.
        let last_begun = desk.last_begun.load(Ordering::Relaxed);
        let oldest = (backlog.waiting > 0 && last_begun > 0)
            .then(|| OffsetDateTime::from_unix_timestamp(last_begun).ok());
        note_oldest(desk, watch, 1, oldest.flatten());

        let waits_since = watch.seen().waits_since;
        let silent_for = stall.silent_for(waits_since, backlog, spec.max_in_flight, Instant::now());
        if silent_for >= desk.rhythm.stall {
            stall = Stall::default();
            desk.metrics.stalls.inc();
            warn!(
                worker = desk.name(),
                events = backlog.waiting,
                ?silent_for,
                "events wait and the log gives none; the consumer is opened anew"
            );
            watch.stalled.notify_one();
        }
    }
}

/// Tells a log that has fallen silent from one that has nothing to give.
#[derive(Debug, Default)]
struct Stall {
    /// Who waited, and when it was first seen that events wait as well.
    seen: Option<(Instant, Instant)>,
}

impl Stall {
    /// For how long the log has been seen not to give the same waiter anything of what waits.
    fn silent_for(
        &mut self,
        waits_since: Option<Instant>,
        backlog: Backlog,
        max_in_flight: usize,
        now: Instant,
    ) -> Duration {
        // With too many unacknowledged, here or elsewhere, it gives none by agreement.
        let is_full = backlog.in_flight >= max_in_flight as u64;
        let Some(waiter) = waits_since.filter(|_| backlog.waiting > 0 && !is_full) else {
            self.seen = None;
            return Duration::ZERO;
        };
        match self.seen {
            Some((same, first)) if same == waiter => now.saturating_duration_since(first),
            _ => {
                self.seen = Some((waiter, now));
                Duration::ZERO
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_log_that_gives_nothing_of_what_waits_is_silent() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let waiting = |waiting| Backlog { waiting, in_flight: 0 };
        let mut stall = Stall::default();
        let mut look = |waits_since, backlog, now| {
            stall.silent_for(waits_since, backlog, 10, at(now)).as_secs()
        };
        let idle = Some(start);
        assert_eq!(look(idle, waiting(0), 100), 0, "idle for long");
        assert_eq!(look(idle, waiting(1), 105), 0, "came just now");
        assert_eq!(look(Some(at(106)), waiting(1), 110), 0, "was given");
        assert_eq!(look(Some(at(106)), waiting(1), 115), 5);
        assert_eq!(look(Some(at(106)), waiting(2), 130), 20);
        assert_eq!(look(None, waiting(2), 135), 0, "nobody waits");
        assert_eq!(look(Some(at(106)), waiting(2), 140), 0);
        let full = Backlog { waiting: 2, in_flight: 10 };
        assert_eq!(look(Some(at(106)), full, 150), 0, "all that may be are in hand");
    }
}
