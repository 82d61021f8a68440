//! What a durable consumer was given and what became of it.
//!
//! Pure. Everything below the cursor was delivered or did not concern the consumer, and what was
//! delivered and is not done stands in `pending`; so the whole is as small as what is in flight.
//! Delivering writes nothing: what is saved is a state in which at most too much counts as not
//! delivered.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use tokio::time::Instant;

/// The state of a durable consumer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Book {
    cursor: u64,
    pending: BTreeMap<u64, Pending>,
    /// The same by the time at which each is to be delivered again.
    due: BTreeSet<(Instant, u64)>,
    /// The highest sequence that was acknowledged or put off. Nothing above it needs saving.
    settled: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Pending {
    deliveries: u64,
    due: Instant,
    put_off: bool,
}

/// What a consumer should be given next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Turn {
    /// This one, once more.
    Again(u64),
    /// The next new one, from the cursor on; `due` says when to look for an old one instead.
    New { due: Option<Instant> },
    /// Nothing before something is acknowledged or due.
    Wait { due: Option<Instant> },
}

/// A book as it lies on disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Saved {
    pub(super) cursor: u64,
    /// Sequence, deliveries so far, and when it is due in milliseconds since 1970, where it was
    /// put off.
    pub(super) pending: Vec<(u64, u64, Option<i64>)>,
}

impl Book {
    /// Of a consumer that has had nothing yet and begins at `cursor`.
    pub(super) fn new(cursor: u64) -> Self {
        Self { cursor, pending: BTreeMap::new(), due: BTreeSet::new(), settled: 0 }
    }

    /// The first sequence that was not looked at yet.
    pub(super) fn cursor(&self) -> u64 {
        self.cursor
    }

    pub(super) fn in_flight(&self) -> usize {
        self.pending.len()
    }

    /// Everything below is done.
    pub(super) fn floor(&self) -> u64 {
        self.pending.keys().next().copied().unwrap_or(self.cursor)
    }

    /// What was delivered and is not done.
    pub(super) fn pending(&self) -> impl Iterator<Item = u64> {
        self.pending.keys().copied()
    }

    /// What comes next. `prefer_new` decides where both an old and a new one could: taken in turn,
    /// neither a storm of retries nor a flood of new events starves the other.
    pub(super) fn turn(&self, now: Instant, max_in_flight: usize, prefer_new: bool) -> Turn {
        let room = self.pending.len() < max_in_flight;
        match self.due.first() {
            Some(&(due, sequence)) if due <= now && !(prefer_new && room) => Turn::Again(sequence),
            first => {
                let due = first.map(|(due, _)| *due);
                if room { Turn::New { due } } else { Turn::Wait { due } }
            }
        }
    }

    /// The event at the cursor, or the first after it, does not concern the consumer.
    pub(super) fn pass(&mut self, sequence: u64) {
        self.cursor = self.cursor.max(sequence + 1);
    }

    /// Delivers an event, to be delivered again at `due`. Says how often it was, with this time.
    pub(super) fn deliver(&mut self, sequence: u64, due: Instant) -> u64 {
        self.pass(sequence);
        let deliveries = self.pending.get(&sequence).map_or(0, |it| it.deliveries) + 1;
        self.schedule(sequence, Pending { deliveries, due, put_off: false });
        deliveries
    }

    /// Done, whichever delivery says so.
    pub(super) fn ack(&mut self, sequence: u64) {
        if let Some(pending) = self.pending.remove(&sequence) {
            self.due.remove(&(pending.due, sequence));
            self.settled = self.settled.max(sequence);
        }
    }

    /// Puts an event off. Only its latest delivery may: an earlier one was given up already.
    pub(super) fn nack(&mut self, sequence: u64, delivery: u64, due: Instant) {
        if let Some(pending) = self.latest(sequence, delivery) {
            self.schedule(sequence, Pending { due, put_off: true, ..pending });
            self.settled = self.settled.max(sequence);
        }
    }

    /// Starts the wait of an event anew; like [`Self::nack`] only for its latest delivery.
    pub(super) fn progress(&mut self, sequence: u64, delivery: u64, due: Instant) {
        if let Some(pending) = self.latest(sequence, delivery) {
            self.schedule(sequence, Pending { due, ..pending });
        }
    }

    fn latest(&self, sequence: u64, delivery: u64) -> Option<Pending> {
        let pending = *self.pending.get(&sequence)?;
        (pending.deliveries == delivery && !pending.put_off).then_some(pending)
    }

    fn schedule(&mut self, sequence: u64, pending: Pending) {
        if let Some(before) = self.pending.insert(sequence, pending) {
            self.due.remove(&(before.due, sequence));
        }
        self.due.insert((pending.due, sequence));
    }

    /// What to save. `now` and `instant` are the same moment on both clocks.
    ///
    /// What was delivered once and not spoken of since, at the end, counts as not delivered: that
    /// keeps the state of a consumer that acknowledges in order down to its cursor.
    pub(super) fn save(&self, now: OffsetDateTime, instant: Instant) -> Saved {
        let cursor =
            self.pending.range(self.settled + 1..).next().map_or(self.cursor, |(it, _)| *it);
        let pending = self.pending.range(..cursor).map(|(&sequence, pending)| {
            let due = pending.put_off.then(|| {
                let delay = pending.due.saturating_duration_since(instant);
                milliseconds(now)
                    .saturating_add(i64::try_from(delay.as_millis()).unwrap_or(i64::MAX))
            });
            (sequence, pending.deliveries, due)
        });
        Saved { cursor, pending: pending.collect() }
    }

    /// A book as it was saved. What was delivered is due at once: whoever had it is gone.
    pub(super) fn load(saved: &Saved, now: OffsetDateTime, instant: Instant) -> Self {
        let mut book = Self::new(saved.cursor);
        for &(sequence, deliveries, due_ms) in &saved.pending {
            let delay = due_ms.map_or(0, |due| due.saturating_sub(milliseconds(now)));
            let delay = Duration::from_millis(u64::try_from(delay).unwrap_or(0));
            // A delay that leads beyond the clock's end is none that anybody meant.
            let due = instant.checked_add(delay).unwrap_or(instant);
            book.schedule(sequence, Pending { deliveries, due, put_off: due_ms.is_some() });
            book.settled = book.settled.max(sequence);
        }
        book
    }
}

fn milliseconds(time: OffsetDateTime) -> i64 {
    i64::try_from(time.unix_timestamp_nanos() / 1_000_000).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use time::macros::datetime;

    use super::*;

    const NOW: OffsetDateTime = datetime!(2026-11-22 10:00 UTC);
    const WAIT: Duration = Duration::from_secs(30);

    fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn what_is_delivered_comes_again_after_the_wait_unless_acknowledged() {
        let now = Instant::now();
        let mut book = Book::new(1);
        assert_eq!(book.turn(now, 10, false), Turn::New { due: None });
        assert_eq!((book.deliver(1, now + WAIT), book.deliver(2, now + WAIT)), (1, 1));

        book.ack(1);

        let early = now + WAIT - Duration::from_millis(1);
        assert_eq!(book.turn(early, 10, false), Turn::New { due: Some(now + WAIT) });
        assert_eq!(book.turn(now + WAIT, 10, false), Turn::Again(2));
        assert_eq!(book.deliver(2, now + WAIT + WAIT), 2);
        book.progress(2, 2, now + seconds(100));
        assert_eq!(
            book.turn(now + seconds(99), 10, false),
            Turn::New { due: Some(now + seconds(100)) }
        );
        assert_eq!((book.floor(), book.cursor()), (2, 3));
        book.ack(2);
        assert_eq!((book.floor(), book.in_flight()), (3, 0));
    }

    #[test]
    fn a_delayed_event_counts_as_in_flight_and_holds_up_no_other() {
        let now = Instant::now();
        let mut book = Book::new(1);
        book.deliver(1, now + WAIT);
        book.nack(1, 1, now + seconds(5));
        assert_eq!(book.turn(now, 2, false), Turn::New { due: Some(now + seconds(5)) });
        book.deliver(2, now + WAIT);
        assert_eq!(book.turn(now, 2, false), Turn::Wait { due: Some(now + seconds(5)) });
        assert_eq!(book.turn(now + seconds(5), 2, true), Turn::Again(1));
        assert_eq!(book.turn(now + seconds(5), 3, true), Turn::New { due: Some(now + seconds(5)) });
    }

    #[test]
    fn only_the_latest_delivery_can_put_off_and_any_can_acknowledge() {
        let now = Instant::now();
        let mut book = Book::new(1);
        book.deliver(1, now);
        book.deliver(1, now + WAIT);
        let before = book.clone();
        book.nack(1, 1, now + seconds(999));
        book.progress(1, 1, now + seconds(999));
        assert_eq!(book, before);
        book.nack(1, 2, now + seconds(5));
        let put_off = book.clone();
        book.progress(1, 2, now + seconds(1));
        assert_eq!(book, put_off, "what was put off is in nobody's hands");
        book.ack(1);
        assert_eq!(book.in_flight(), 0);
    }

    #[test]
    fn in_order_only_the_cursor_is_saved() {
        let now = Instant::now();
        let mut book = Book::new(1);
        for sequence in 1..=300 {
            book.deliver(sequence, now + WAIT);
        }
        for sequence in 1..=40 {
            book.ack(sequence);
        }
        assert_eq!(book.save(NOW, now), Saved { cursor: 41, pending: vec![] });
    }

    #[test]
    fn a_saved_book_knows_what_is_done_what_is_not_and_what_is_due_when() {
        let now = Instant::now();
        let mut book = Book::new(1);
        for sequence in [1, 2, 4, 7, 9] {
            book.deliver(sequence, now + WAIT);
        }
        book.ack(2);
        book.nack(7, 1, now + seconds(60));

        let saved = book.save(NOW, now);
        let later = Book::load(&saved, NOW + seconds(20), now);

        let due = milliseconds(NOW + seconds(60));
        let pending = vec![(1, 1, None), (4, 1, None), (7, 1, Some(due))];
        assert_eq!(saved, Saved { cursor: 9, pending });
        assert_eq!(later.turn(now, 10, false), Turn::Again(1));
        assert_eq!(later.pending[&7].due, now + seconds(40));
        assert_eq!(later.save(NOW + seconds(20), now), saved);
    }
}
