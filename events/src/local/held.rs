//! Which calls are repetitions: the fingerprints of the events that a repeated call may meet.
//!
//! Pure: the windows are measured on the events' own times, so whether a call repeats another does
//! not depend on when anybody asks.

use std::{
    collections::{HashMap, VecDeque, hash_map::Entry},
    time::Duration,
};

use time::OffsetDateTime;

use crate::{Fingerprint, SignUpEvent};

/// So many fingerprints are held at most, some 80 bytes each. Within ten minutes it takes over
/// 3,000 events a second to come here; then the oldest are forgotten before their time.
pub(super) const HELD_MAX: usize = 2_000_000;

/// Events of concurrent calls are appended in another order than they were stamped; nothing is
/// forgotten before its window is over by so much.
const DISORDER: Duration = Duration::from_secs(60);

/// How long a call repeated with the same fingerprint is the same event.
#[derive(Clone, Copy, Debug)]
pub(super) struct Windows {
    pub(super) duplicate: Duration,
    pub(super) refusal: Duration,
}

impl Windows {
    /// How far back an event may lie and still meet a repetition.
    pub(super) fn longest(self) -> Duration {
        self.duplicate.max(self.refusal) + DISORDER
    }

    /// Whether a call at `time` repeats the held one.
    ///
    /// Two calls may be appended in the other order than they were stamped, so what counts is the
    /// distance, not the direction.
    fn is_repeat(self, held: &Call, time: OffsetDateTime) -> bool {
        let window = if held.refusal { self.refusal } else { self.duplicate };
        (time - held.time()).unsigned_abs() < window
    }
}

/// What the suppression of repetitions needs to know of an event.
#[derive(Clone, Copy, Debug)]
pub(super) struct Call {
    pub(super) fingerprint: Fingerprint,
    time_ms: i64,
    refusal: bool,
}

impl Call {
    pub(super) fn of(event: &SignUpEvent) -> Self {
        Self::new(event.fingerprint, event.time, event.decision.outcome.is_refusal())
    }

    pub(super) fn new(fingerprint: Fingerprint, time: OffsetDateTime, refusal: bool) -> Self {
        let time_ms = i64::try_from(time.unix_timestamp_nanos() / 1_000_000)
            .expect("years up to 9999 fit in milliseconds");
        Self { fingerprint, time_ms, refusal }
    }

    fn time(&self) -> OffsetDateTime {
        OffsetDateTime::UNIX_EPOCH + time::Duration::milliseconds(self.time_ms)
    }
}

/// Where an appended event belongs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// Stored, under this sequence.
    New(u64),
    /// Not stored: the call was made before, and its event has this sequence.
    Repeat(u64),
}

/// The fingerprints within the windows, in memory.
#[derive(Debug)]
pub(super) struct Held {
    windows: Windows,
    capacity: usize,
    by_fingerprint: HashMap<Fingerprint, (Call, u64)>,
    by_age: VecDeque<(Fingerprint, u64)>,
    /// The latest that was stored. Not the youngest: one event stamped by a clock that was ahead for
    /// a moment must not make all after it look old.
    latest_ms: i64,
    forgotten_early: u64,
}

impl Held {
    pub(super) fn new(windows: Windows, capacity: usize) -> Self {
        Self {
            windows,
            capacity,
            by_fingerprint: HashMap::new(),
            by_age: VecDeque::new(),
            latest_ms: i64::MIN,
            forgotten_early: 0,
        }
    }

    /// Where each call of a group belongs when the first new one gets the sequence `next`.
    ///
    /// Changes nothing: the group may yet fail to be stored.
    pub(super) fn place(&self, group: &[Call], mut next: u64) -> Vec<Place> {
        let mut of_group: HashMap<Fingerprint, (Call, u64)> = HashMap::with_capacity(group.len());
        let place = |call: &Call| {
            let earlier = of_group
                .get(&call.fingerprint)
                .or_else(|| self.by_fingerprint.get(&call.fingerprint));
            if let Some((held, sequence)) = earlier
                && self.windows.is_repeat(held, call.time())
            {
                return Place::Repeat(*sequence);
            }
            let sequence = next;
            next += 1;
            of_group.insert(call.fingerprint, (*call, sequence));
            Place::New(sequence)
        };
        group.iter().map(place).collect()
    }

    /// Takes note of a stored event, and forgets those that no call can repeat any more.
    pub(super) fn remember(&mut self, call: Call, sequence: u64) {
        self.latest_ms = call.time_ms;
        self.by_fingerprint.insert(call.fingerprint, (call, sequence));
        self.by_age.push_back((call.fingerprint, sequence));
        while let Some(&(fingerprint, oldest)) = self.by_age.front() {
            let Entry::Occupied(entry) = self.by_fingerprint.entry(fingerprint) else {
                self.by_age.pop_front();
                continue;
            };
            let (held, at) = *entry.get();
            // Otherwise a later event took its place in the map and waits further back here.
            if at == oldest {
                let full = self.by_age.len() > self.capacity;
                if !full && !self.is_past(&held) {
                    break;
                }
                self.forgotten_early += u64::from(full && !self.is_past(&held));
                self.by_fingerprint.remove(&fingerprint);
            }
            self.by_age.pop_front();
        }
    }

    /// How many were forgotten while a call could still have repeated them.
    pub(super) fn forgotten_early(&self) -> u64 {
        self.forgotten_early
    }

    fn is_past(&self, held: &Call) -> bool {
        Duration::from_millis(self.latest_ms.abs_diff(held.time_ms)) >= self.windows.longest()
    }
}

#[cfg(test)]
mod tests {
    use time::macros::datetime;

    use super::*;

    const START: OffsetDateTime = datetime!(2026-11-22 10:00 UTC);
    const WINDOWS: Windows =
        Windows { duplicate: Duration::from_secs(600), refusal: Duration::from_secs(30) };

    fn fingerprint(number: u64) -> Fingerprint {
        serde_json::from_value(format!("{number:032x}").into()).unwrap()
    }

    fn call(number: u64, after_ms: i64) -> Call {
        Call::new(fingerprint(number), START + time::Duration::milliseconds(after_ms), false)
    }

    fn refusal(number: u64, after_ms: i64) -> Call {
        Call { refusal: true, ..call(number, after_ms) }
    }

    #[test]
    fn a_repetition_is_one_up_to_the_end_of_the_window_of_the_held_event() {
        for (first, window_ms) in [(call(1, 0), 600_000), (refusal(1, 0), 30_000)] {
            let mut held = Held::new(WINDOWS, HELD_MAX);
            held.remember(first, 7);
            let place = |later| held.place(&[later], 8)[0];
            assert_eq!(place(call(1, window_ms - 1)), Place::Repeat(7));
            assert_eq!(place(call(1, window_ms)), Place::New(8));
            assert_eq!(place(call(1, 1 - window_ms)), Place::Repeat(7), "stamped before");
            assert_eq!(place(call(2, 0)), Place::New(8));
        }
    }

    #[test]
    fn repetitions_within_a_group_are_one_event() {
        let held = Held::new(WINDOWS, HELD_MAX);
        let group = [call(1, 0), call(2, 0), call(1, 5), call(1, 600_000), call(1, 600_001)];
        assert_eq!(
            held.place(&group, 1),
            [Place::New(1), Place::New(2), Place::Repeat(1), Place::New(3), Place::Repeat(3)]
        );
        assert_eq!(held.place(&group[..1], 1), [Place::New(1)], "placing changes nothing");
    }

    #[test]
    fn what_no_call_can_repeat_is_forgotten() {
        let mut held = Held::new(WINDOWS, HELD_MAX);
        held.remember(call(1, 0), 1);
        held.remember(call(2, 600_000), 2);
        held.remember(call(1, 600_001), 3);
        assert_eq!(held.by_age.len(), 2, "the first has a successor");
        held.remember(call(3, 1_259_999), 4);
        assert_eq!(held.by_age.len(), 3, "within the window and the disorder that is allowed for");
        assert_eq!(held.place(&[call(1, 660_000)], 5), [Place::Repeat(3)]);
        held.remember(call(4, 1_260_000), 5);
        assert_eq!(held.by_age.len(), 3, "the second is past");
        held.remember(call(4, 5_000_000), 6);
        assert_eq!((held.by_age.len(), held.by_fingerprint.len()), (1, 1));
        assert_eq!(held.forgotten_early(), 0);
    }

    #[test]
    fn a_clock_that_was_wrong_for_a_moment_does_no_lasting_harm() {
        let mut held = Held::new(WINDOWS, HELD_MAX);
        held.remember(call(1, 0), 1);
        held.remember(call(2, 86_400_000), 2);
        held.remember(call(3, 1_000), 3);
        assert_eq!(held.place(&[call(3, 2_000)], 4), [Place::Repeat(3)]);
        held.remember(call(4, 3_000), 4);
        assert_eq!(held.place(&[call(3, 4_000)], 5), [Place::Repeat(3)]);
        assert_eq!(held.by_age.len(), 2, "what lies far in the future is repeated by nobody");
    }

    #[test]
    fn memory_has_a_bound_and_going_over_it_is_counted() {
        let mut held = Held::new(WINDOWS, 10);
        for number in 0..25 {
            held.remember(call(number, 0), number + 1);
        }
        assert_eq!((held.by_age.len(), held.by_fingerprint.len()), (10, 10));
        assert_eq!(held.forgotten_early(), 15);
    }

    proptest::proptest! {
        /// Against the plain definition: the last stored one with the fingerprint, if near enough.
        #[test]
        fn groups_of_any_cut_give_the_same_places(
            calls in proptest::collection::vec((0_u64..4, 0_i64..50_000, proptest::bool::ANY), 1..60),
            cut in 1_usize..20,
        ) {
            let mut stored: Vec<(Call, u64)> = vec![];
            let mut held = Held::new(WINDOWS, HELD_MAX);
            let calls: Vec<_> = calls
                .into_iter()
                .map(|(number, ms, refused)| if refused { refusal(number, ms) } else { call(number, ms) })
                .collect();
            for group in calls.chunks(cut) {
                let next = stored.len() as u64 + 1;
                for (place, call) in held.place(group, next).into_iter().zip(group) {
                    let last = stored.iter().rev().find(|(it, _)| it.fingerprint == call.fingerprint);
                    let expected = match last {
                        Some((it, at)) if WINDOWS.is_repeat(it, call.time()) => Place::Repeat(*at),
                        _ => Place::New(stored.len() as u64 + 1),
                    };
                    proptest::prop_assert_eq!(place, expected);
                    if let Place::New(at) = place {
                        stored.push((*call, at));
                        held.remember(*call, at);
                    }
                }
            }
        }
    }
}
