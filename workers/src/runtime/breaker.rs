//! When to leave a target alone that is down.
//!
//! Pure: time is passed in. A breaker opens after so many failures in a row that are the target's,
//! so that an outage costs a handful of tries and not those of every event. While it is open
//! nothing is attempted; after a pause one attempt probes, and any answer of the target closes it.
//! It never stays open for good and turns nobody off.

use std::time::{Duration, Instant};

use super::{Cause, RetryPolicy};

/// A target may ask for a longer pause (`Retry-After`), but not for more than so many times the
/// longest of ours: a wrong clock or a hostile answer must not stop a worker for ever.
const ASKED_AT_MOST: u32 = 10;

/// When a worker leaves its target alone, and for how long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BreakerPolicy {
    /// So many failures of the target in a row open the breaker. Less than 1 counts as 1.
    pub failures: u32,
    /// How long it stays open at first; twice as long each time that a probe fails.
    pub pause: Duration,
    /// No planned pause is longer; jitter comes on top.
    pub max_pause: Duration,
}

impl Default for BreakerPolicy {
    /// A blip of a second costs a second, and an outage of hours a call a minute.
    fn default() -> Self {
        Self { failures: 5, pause: Duration::from_secs(1), max_pause: Duration::from_secs(60) }
    }
}

impl BreakerPolicy {
    /// How long to stay open, for the `opening`-th time in a row, where the target asked for a pause.
    fn pause_after(&self, opening: u32, asked: Option<Duration>) -> Duration {
        let max = self.max_pause.max(self.pause);
        let schedule = RetryPolicy {
            initial: self.pause,
            multiplier: 2.0,
            max,
            tries: u32::MAX,
            max_age: Duration::MAX,
            ..RetryPolicy::default()
        };
        let planned = schedule.pause_after(opening.min(u32::MAX - 1), Duration::ZERO, None);
        let asked = asked.unwrap_or_default().min(max.saturating_mul(ASKED_AT_MOST));
        planned.unwrap_or(max).max(asked)
    }
}

/// What an attempt says about its target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sign {
    Answered,
    /// It is down, or does not let us in; it may have asked for a pause.
    Failed {
        asked: Option<Duration>,
    },
    /// The attempt did not get as far as the target.
    Nothing,
}

impl Sign {
    /// Of a failed attempt.
    pub(super) fn of(cause: Cause, asked: Option<Duration>) -> Self {
        match cause {
            Cause::Unavailable | Cause::Timeout | Cause::Throttled | Cause::NotPermitted => {
                Self::Failed { asked }
            }
            Cause::NotYet | Cause::Gone | Cause::Refused | Cause::InvalidRecipient => {
                Self::Answered
            }
            Cause::InvalidTemplate | Cause::InvalidRule | Cause::Undecodable | Cause::Panic => {
                Self::Nothing
            }
        }
    }
}

/// What may be done now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Flow {
    /// Attempts, as many as there are.
    Free,
    /// One attempt, as a probe; or none while that one runs.
    Probe { runs: bool },
    /// Nothing before then.
    Shut { until: Instant },
}

/// The state of a target, as the attempts at it tell.
#[derive(Debug)]
pub(super) struct Breaker {
    policy: BreakerPolicy,
    state: State,
}

#[derive(Clone, Copy, Debug)]
enum State {
    Closed {
        failures: u32,
    },
    /// `openings` in a row without an answer in between; half-open once `until` is over.
    Open {
        until: Instant,
        openings: u32,
        probing: bool,
    },
}

impl Breaker {
    pub(super) const fn new(policy: BreakerPolicy) -> Self {
        Self { policy, state: State::Closed { failures: 0 } }
    }

    pub(super) fn flow(&self, now: Instant) -> Flow {
        match self.state {
            State::Closed { .. } => Flow::Free,
            State::Open { probing: true, .. } => Flow::Probe { runs: true },
            State::Open { until, .. } if now >= until => Flow::Probe { runs: false },
            State::Open { until, .. } => Flow::Shut { until },
        }
    }

    /// An attempt begins, which [`Self::flow`] allowed. Says whether it is the probe.
    pub(super) fn begins(&mut self) -> bool {
        match &mut self.state {
            State::Closed { .. } => false,
            State::Open { probing, .. } => {
                *probing = true;
                true
            }
        }
    }

    /// An attempt has ended. Says whether a failure costs its event a try: the probe's does not, nor
    /// that of one which began before the breaker opened, as it says nothing new.
    pub(super) fn ended(&mut self, was_probe: bool, sign: Sign, now: Instant) -> bool {
        match (self.state, sign) {
            (_, Sign::Answered) => self.state = State::Closed { failures: 0 },
            (State::Closed { failures }, Sign::Failed { asked }) => {
                let failures = failures.saturating_add(1);
                self.state = State::Closed { failures };
                if failures >= self.policy.failures {
                    self.open(1, asked, now);
                }
                return !was_probe;
            }
            (State::Open { openings, .. }, Sign::Failed { asked }) => {
                if was_probe {
                    self.open(openings.saturating_add(1), asked, now);
                }
                return false;
            }
            (State::Open { until, openings, probing }, Sign::Nothing) => {
                let probing = probing && !was_probe;
                self.state = State::Open { until, openings, probing };
            }
            (State::Closed { .. }, Sign::Nothing) => {}
        }
        true
    }

    fn open(&mut self, openings: u32, asked: Option<Duration>, now: Instant) {
        let pause = self.policy.pause_after(openings, asked);
        // Too far to be a time means as far as it takes: such a pause is no sensible setting.
        let until = now.checked_add(pause).unwrap_or(now + Duration::from_secs(365 * 24 * 3600));
        self.state = State::Open { until, openings, probing: false };
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const POLICY: BreakerPolicy = BreakerPolicy {
        failures: 3,
        pause: Duration::from_secs(1),
        max_pause: Duration::from_secs(8),
    };
    const DOWN: Sign = Sign::Failed { asked: None };

    /// Lets one attempt end that `flow` allows, and says whether it was the probe.
    fn attempt(breaker: &mut Breaker, sign: Sign, now: Instant) -> bool {
        let probe = breaker.begins();
        breaker.ended(probe, sign, now);
        probe
    }

    fn opened(now: Instant) -> Breaker {
        let mut breaker = Breaker::new(POLICY);
        for _ in 0..3 {
            attempt(&mut breaker, DOWN, now);
        }
        breaker
    }

    fn pause(breaker: &Breaker, now: Instant) -> Duration {
        match breaker.flow(now) {
            Flow::Shut { until } => until - now,
            other => panic!("not open: {other:?}"),
        }
    }

    #[test]
    fn it_opens_after_failures_in_a_row_and_not_before() {
        let now = Instant::now();
        let mut breaker = Breaker::new(POLICY);
        for sign in [DOWN, DOWN, Sign::Answered, DOWN, Sign::Nothing, DOWN] {
            attempt(&mut breaker, sign, now);
            assert_eq!(breaker.flow(now), Flow::Free, "{sign:?}");
        }
        attempt(&mut breaker, DOWN, now);
        let pause = pause(&breaker, now);
        assert!(pause >= POLICY.pause && pause <= POLICY.pause * 2, "{pause:?}");
    }

    #[test]
    fn one_probe_goes_through_and_costs_no_try() {
        let now = Instant::now();
        let mut breaker = opened(now);
        let later = now + Duration::from_secs(2);
        assert_eq!(breaker.flow(later), Flow::Probe { runs: false });
        assert!(breaker.begins());
        assert_eq!(breaker.flow(later), Flow::Probe { runs: true });
        assert!(!breaker.ended(true, DOWN, later), "the probe cost a try");
        assert!(pause(&breaker, later) >= POLICY.pause * 2);

        let healed = later + Duration::from_secs(4);
        assert!(attempt(&mut breaker, Sign::Answered, healed));
        assert_eq!(breaker.flow(healed), Flow::Free);
        assert!(breaker.ended(false, DOWN, healed), "a failure counts again");
    }

    #[test]
    fn a_probe_that_says_nothing_leaves_room_for_the_next() {
        let now = Instant::now();
        let mut breaker = opened(now);
        let later = now + Duration::from_secs(2);
        attempt(&mut breaker, Sign::Nothing, later);
        assert_eq!(breaker.flow(later), Flow::Probe { runs: false });
    }

    #[test]
    fn those_under_way_neither_prolong_an_outage_nor_pay_for_it() {
        let now = Instant::now();
        let mut breaker = opened(now);
        let before = pause(&breaker, now);
        assert!(!breaker.ended(false, DOWN, now), "what is known already cost a try");
        assert_eq!(pause(&breaker, now), before);
        assert!(breaker.ended(false, Sign::Answered, now));
        assert_eq!(breaker.flow(now), Flow::Free, "an answer is an answer");
    }

    #[test]
    fn a_target_that_asks_for_rest_gets_it_within_bounds() {
        let now = Instant::now();
        for (asked, least, most) in [(0, 1, 2), (30, 30, 31), (86_400, 80, 81)] {
            let mut breaker = opened(now);
            breaker.ended(true, Sign::Answered, now);
            let asked = Some(Duration::from_secs(asked));
            for _ in 0..3 {
                attempt(&mut breaker, Sign::Failed { asked }, now);
            }
            let pause = pause(&breaker, now);
            assert!((least..=most).contains(&pause.as_secs()), "{asked:?} gave {pause:?}");
        }
    }

    fn any_sign() -> impl Strategy<Value = Sign> {
        prop_oneof![
            2 => Just(Sign::Answered),
            6 => proptest::option::of(0..1_000_u64).prop_map(|asked| Sign::Failed {
                asked: asked.map(Duration::from_secs)
            }),
            1 => Just(Sign::Nothing),
        ]
    }

    proptest! {
        #[test]
        fn any_history_keeps_the_promises(
            failures in 0..6_u32,
            pause in 0..100_000_u64,
            max_pause in prop_oneof![0..1_000_000_u64, Just(u64::MAX)],
            steps in proptest::collection::vec((any_sign(), 0..200_000_u64), 1..200),
        ) {
            let millis = Duration::from_millis;
            let policy = BreakerPolicy { failures, pause: millis(pause), max_pause: millis(max_pause) };
            let mut breaker = Breaker::new(policy);
            let mut now = Instant::now();
            let (mut in_a_row, mut tries, mut last_pause) = (0, 0, Duration::ZERO);
            for (sign, passed) in steps {
                now += millis(passed);
                let flow = breaker.flow(now);
                if let Flow::Shut { until } = flow {
                    prop_assert!(until > now);
                    prop_assert_eq!(breaker.flow(until), Flow::Probe { runs: false }, "stays shut");
                    continue;
                }
                let probe = breaker.begins();
                prop_assert_eq!(probe, flow == Flow::Probe { runs: false });
                prop_assert_eq!(breaker.flow(now), if probe { Flow::Probe { runs: true } } else { Flow::Free });
                let counts = breaker.ended(probe, sign, now);
                match sign {
                    Sign::Answered => {
                        prop_assert_eq!(breaker.flow(now), Flow::Free);
                        (in_a_row, tries, last_pause) = (0, 0, Duration::ZERO);
                    }
                    Sign::Nothing => {}
                    Sign::Failed { asked } => {
                        prop_assert_eq!(counts, !probe);
                        in_a_row += 1;
                        tries += u32::from(counts);
                        prop_assert!(tries <= failures.max(1), "an outage cost {tries} tries");
                        match breaker.flow(now) {
                            Flow::Free => prop_assert!(in_a_row < failures.max(1)),
                            Flow::Probe { .. } => prop_assert!(policy.pause.is_zero()),
                            Flow::Shut { until } => {
                                let pause = until - now;
                                let max = policy.max_pause.max(policy.pause);
                                let planned = policy.pause.saturating_mul(1 << (in_a_row - failures.max(1)).min(30)).min(max);
                                prop_assert!(pause >= planned.min(Duration::from_secs(365 * 24 * 3600)));
                                let asked = asked.unwrap_or_default().min(max.saturating_mul(ASKED_AT_MOST));
                                let jittered = Duration::from_secs_f64(planned.as_secs_f64() * 1.5) + millis(1);
                                prop_assert!(pause <= jittered.max(asked), "{pause:?} for {planned:?}");
                                prop_assert!(pause.mul_f64(1.5) + millis(1) >= last_pause || asked < last_pause);
                                last_pause = pause;
                            }
                        }
                    }
                }
            }
        }
    }
}
