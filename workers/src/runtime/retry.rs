//! When to try again; the only caller of the `backoff` crate.
//!
//! `backoff` is unmaintained, so nothing else may depend on it: should it have to go, it goes from
//! this file. A policy is a value, and asking it changes nothing.

use std::time::{Duration, Instant};

use backoff::{ExponentialBackoff, backoff::Backoff};

/// A provider may ask for a longer pause than planned (`Retry-After`), but not for more than so
/// many times the plan: a wrong clock or a hostile answer must not put an event off for ever.
const ASKED_AT_MOST: u32 = 10;

/// How long a failed event rests before the next attempt, and when it is given up.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RetryPolicy {
    /// The pause after the first failure.
    pub initial: Duration,
    /// Each pause is so many times the one before. Less than 1 counts as 1.
    pub multiplier: f64,
    /// No planned pause is longer; jitter comes on top.
    pub max: Duration,
    /// Adds up to this share of the pause, by chance, so that events which failed together do not
    /// come back together. It never shortens a pause: a provider that asked for rest gets it.
    pub jitter: f64,
    /// So many attempts, the first included, then the event is parked.
    pub tries: u32,
    /// No attempt begins later than this after the first one failed.
    pub max_age: Duration,
}

impl Default for RetryPolicy {
    /// Rides out an outage of about three hours.
    fn default() -> Self {
        Self {
            initial: Duration::from_secs(1),
            multiplier: 2.0,
            max: Duration::from_secs(15 * 60),
            jitter: 0.5,
            tries: 24,
            max_age: Duration::from_secs(24 * 60 * 60),
        }
    }
}

impl RetryPolicy {
    /// How long to wait after so many failed attempts, or `None` if that was the last.
    ///
    /// `failing_for` is the time since the first of them; `asked` is what the other side wants us
    /// to wait.
    #[must_use]
    pub fn pause_after(
        &self,
        failed_attempts: u32,
        failing_for: Duration,
        asked: Option<Duration>,
    ) -> Option<Duration> {
        if failed_attempts >= self.tries {
            return None;
        }
        let Pause { planned, chosen } = self.pause(failed_attempts);
        let asked = asked.unwrap_or_default().clamp(planned, planned.saturating_mul(ASKED_AT_MOST));
        let pause = asked.saturating_add(chosen - planned);
        (failing_for.saturating_add(pause) <= self.max_age).then_some(pause)
    }

    fn pause(&self, failed_attempts: u32) -> Pause {
        // `backoff` spreads by ±f around its interval i. With i = planned·(1 + jitter/2) and
        // f = jitter/(2 + jitter) the spread is exactly from planned to planned·(1 + jitter).
        let jitter = finite(self.jitter).clamp(0.0, 10.0);
        let max = self.max.min(LONGEST);
        let mut planned = ExponentialBackoff {
            current_interval: self.initial.min(max),
            initial_interval: self.initial.min(max),
            randomization_factor: 0.0,
            multiplier: finite(self.multiplier).clamp(1.0, 1e6),
            max_interval: max,
            max_elapsed_time: None,
            ..ExponentialBackoff::default()
        };
        for _ in 1..failed_attempts {
            let before = planned.current_interval;
            planned.next_backoff();
            if planned.current_interval == before {
                break;
            }
        }
        let planned = planned.current_interval;
        let interval = planned.mul_f64(1.0 + jitter / 2.0);
        let chosen = ExponentialBackoff {
            current_interval: interval,
            randomization_factor: jitter / (2.0 + jitter),
            max_elapsed_time: None,
            ..ExponentialBackoff::default()
        }
        .next_backoff()
        .unwrap_or(interval);
        // Floating point may miss a bound by a nanosecond.
        Pause { planned, chosen: chosen.clamp(planned, planned.mul_f64(1.0 + jitter)) }
    }
}

/// Far above any sensible pause, and far below what overflows a `Duration` once multiplied.
const LONGEST: Duration = Duration::from_secs(365 * 24 * 60 * 60);

/// A share or factor that is no number counts as none.
fn finite(number: f64) -> f64 {
    if number.is_finite() { number } else { 0.0 }
}

struct Pause {
    /// Without jitter.
    planned: Duration,
    /// With jitter; at least `planned`.
    chosen: Duration,
}

/// Paces calls to something of ours that is down (the log, the store) and costs no tries.
///
/// The rest is about as long as the outage has lasted so far, so many calls that fail together count
/// as one failure.
#[derive(Debug, Default)]
pub(crate) struct Pace {
    down_since: Option<Instant>,
    told: Option<Instant>,
}

/// What to do after a call that failed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rest {
    pub(crate) pause: Duration,
    /// Whether the failure is worth a line in the logs: the first of an outage is, and then one
    /// now and then. An outage fails thousands of calls, and they all say the same.
    pub(crate) tell: bool,
}

impl Pace {
    const SHORTEST: Duration = Duration::from_millis(250);
    const LONGEST: Duration = Duration::from_secs(15);

    const TELL_EVERY: Duration = Duration::from_secs(10);

    pub(crate) fn failed(&mut self, now: Instant) -> Rest {
        let down_for = now.saturating_duration_since(*self.down_since.get_or_insert(now));
        let rest = RetryPolicy {
            initial: down_for.clamp(Self::SHORTEST, Self::LONGEST),
            ..RetryPolicy::default()
        };
        let told = |at| now.saturating_duration_since(at) < Self::TELL_EVERY;
        let tell = !self.told.is_some_and(told);
        if tell {
            self.told = Some(now);
        }
        Rest { pause: rest.pause(1).chosen, tell }
    }

    pub(crate) fn succeeded(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const POLICY: RetryPolicy = RetryPolicy {
        initial: Duration::from_secs(5),
        multiplier: 2.0,
        max: Duration::from_secs(60),
        jitter: 0.0,
        tries: 6,
        max_age: Duration::from_secs(1000),
    };

    #[test]
    fn pauses_double_up_to_the_longest_and_then_stop() {
        let pause =
            |failed| POLICY.pause_after(failed, Duration::ZERO, None).map(|it| it.as_secs());
        let pauses: Vec<_> = (1..=6).map(pause).collect();
        assert_eq!(pauses, [Some(5), Some(10), Some(20), Some(40), Some(60), None]);
    }

    #[test]
    fn no_attempt_begins_past_the_age() {
        let pause = |age| POLICY.pause_after(1, Duration::from_secs(age), None);
        assert_eq!(pause(995), Some(Duration::from_secs(5)));
        assert_eq!(pause(996), None);
    }

    #[test]
    fn a_longer_pause_is_granted_within_bounds() {
        let pause = |asked| {
            let asked = Some(Duration::from_secs(asked));
            POLICY.pause_after(1, Duration::ZERO, asked).map(|it| it.as_secs())
        };
        assert_eq!(pause(0), Some(5), "never shorter than planned");
        assert_eq!(pause(30), Some(30));
        assert_eq!(pause(86_400), Some(50), "never more than ten times the plan");
    }

    #[test]
    fn the_default_rides_out_hours_and_ends_within_its_age() {
        let policy = RetryPolicy { jitter: 0.0, ..RetryPolicy::default() };
        let total: Duration =
            (1..policy.tries).map_while(|n| policy.pause_after(n, Duration::ZERO, None)).sum();
        assert!(total > Duration::from_secs(3 * 3600) && total < policy.max_age, "{total:?}");
    }

    #[test]
    fn the_pace_slows_down_and_starts_anew() {
        let (mut pace, start) = (Pace::default(), Instant::now());
        let first = pace.failed(start);
        let together = pace.failed(start);
        let later = pace.failed(start + Duration::from_secs(3600));
        assert!(first.pause < Duration::from_secs(1) && together.pause < Duration::from_secs(1));
        assert!(later.pause >= Pace::LONGEST && later.pause <= Pace::LONGEST * 2);
        assert_eq!([first.tell, together.tell, later.tell], [true, false, true]);
        pace.succeeded();
        let anew = pace.failed(start + Duration::from_secs(3601));
        assert!(anew.pause < Duration::from_secs(1) && anew.tell);
    }

    prop_compose! {
        fn any_policy()(
            initial in 0..100_000_u64,
            multiplier in prop_oneof![0.0..10.0_f64, Just(f64::NAN), Just(f64::INFINITY), Just(-1.0)],
            max in 0..10_000_000_u64,
            jitter in prop_oneof![0.0..3.0_f64, Just(f64::NAN), Just(f64::INFINITY), Just(-1.0)],
            tries in prop_oneof![0..50_u32, Just(u32::MAX)],
            max_age in prop_oneof![0..100_000_000_u64, Just(u64::MAX)],
        ) -> RetryPolicy {
            RetryPolicy {
                initial: Duration::from_millis(initial),
                multiplier,
                max: Duration::from_millis(max),
                jitter,
                tries,
                max_age: Duration::from_millis(max_age),
            }
        }
    }

    proptest! {
        #[test]
        fn every_policy_keeps_its_bounds(
            policy in any_policy(),
            failed in prop_oneof![0..60_u32, any::<u32>()],
            failing_for in 0..200_000_000_u64,
            asked in proptest::option::of(0..u64::MAX),
        ) {
            let failing_for = Duration::from_millis(failing_for);
            let asked = asked.map(Duration::from_secs);
            let plain = RetryPolicy { jitter: 0.0, max_age: Duration::MAX, ..policy };
            let planned = plain.pause_after(failed, Duration::ZERO, None);
            let Some(pause) = policy.pause_after(failed, failing_for, asked) else {
                let jitter = if policy.jitter.is_finite() { policy.jitter.clamp(0.0, 10.0) } else { 0.0 };
                let longest = planned.map(|it| it.mul_f64(f64::from(ASKED_AT_MOST) + jitter));
                let too_old = longest.is_some_and(|it| failing_for.saturating_add(it) >= policy.max_age);
                prop_assert!(failed >= policy.tries || too_old, "given up too early");
                return Ok(());
            };
            let planned = planned.expect("a policy without jitter and age gives at least as much");
            prop_assert!(failed < policy.tries);
            prop_assert!(failing_for + pause <= policy.max_age);
            prop_assert!(planned <= policy.max);
            prop_assert!(pause >= planned, "jitter shortened {planned:?} to {pause:?}");
            let jitter = if policy.jitter.is_finite() { policy.jitter.clamp(0.0, 10.0) } else { 0.0 };
            let most = asked.unwrap_or_default().clamp(planned, planned * ASKED_AT_MOST)
                + planned.mul_f64(jitter) + Duration::from_nanos(2);
            prop_assert!(pause <= most, "{pause:?} is more than {most:?}");
        }

        #[test]
        fn planned_pauses_never_shrink(policy in any_policy(), failed in 1..60_u32) {
            let plain = RetryPolicy { jitter: 0.0, tries: u32::MAX, max_age: Duration::MAX, ..policy };
            let pause = |failed| plain.pause_after(failed, Duration::ZERO, None).unwrap();
            prop_assert!(pause(failed) <= pause(failed + 1));
        }

        #[test]
        fn jitter_spreads_over_its_whole_range(_seed in 0..1_u8) {
            let policy = RetryPolicy { jitter: 1.0, ..POLICY };
            let pauses: Vec<_> = (0..400)
                .map(|_| policy.pause_after(1, Duration::ZERO, None).unwrap().as_secs_f64())
                .collect();
            prop_assert!(pauses.iter().any(|it| *it < 6.0) && pauses.iter().any(|it| *it > 9.0));
        }
    }
}
