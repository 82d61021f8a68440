//! When an account is looked for, and what follows from what was found. Pure.

use std::time::Duration;

use time::OffsetDateTime;
use vestibule_events::ConfirmationSource;

/// When the account of a sign-up is looked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConfirmSchedule {
    /// So long after the sign-up for the first time. The pauses grow with its age from there.
    pub first_look: Duration,
    /// The longest pause between two looks.
    pub longest_pause: Duration,
    /// A sign-up of this age without an account is given up.
    pub abandon_after: Duration,
}

impl Default for ConfirmSchedule {
    fn default() -> Self {
        Self {
            // Platforms make the account at once, and directories show it some seconds later.
            first_look: Duration::from_secs(5),
            longest_pause: Duration::from_secs(60 * 60),
            abandon_after: Duration::from_secs(7 * 24 * 60 * 60),
        }
    }
}

/// What is known about the account of a sign-up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Finding {
    There {
        object_id: String,
        source: ConfirmationSource,
    },
    /// Whoever knows was asked, and said so.
    NotThere,
    /// Nobody could say.
    Unknown,
}

/// What follows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Next {
    Confirm {
        object_id: String,
        source: ConfirmationSource,
    },
    Abandon,
    /// `tried` where the account was looked for and not there.
    WaitOn {
        due_at: OffsetDateTime,
        tried: bool,
    },
}

impl ConfirmSchedule {
    /// When the account of a sign-up is looked for first.
    pub(super) fn first_due(&self, since: OffsetDateTime) -> OffsetDateTime {
        later(since, self.first_look)
    }

    /// When the account of a sign-up is looked for next: after as long as it has waited already, so
    /// that there are many looks while most accounts come to be and few later; and once when its
    /// time is over.
    pub(super) fn next_look(&self, since: OffsetDateTime, now: OffsetDateTime) -> OffsetDateTime {
        let age = age(since, now);
        let pause = match self.first_look.checked_sub(age) {
            Some(rest) if !rest.is_zero() => rest,
            _ => age.clamp(self.first_look, self.longest_pause.max(self.first_look)),
        };
        let end = self.end(since);
        let next = later(now, pause);
        if end > now { next.min(end) } else { next }
    }

    pub(super) fn judge(
        &self,
        finding: Finding,
        since: OffsetDateTime,
        now: OffsetDateTime,
    ) -> Next {
        match finding {
            Finding::There { object_id, source } => Next::Confirm { object_id, source },
            Finding::NotThere if now >= self.end(since) => Next::Abandon,
            // Past its time, too: only a no is a no.
            finding => Next::WaitOn {
                due_at: self.next_look(since, now),
                tried: finding == Finding::NotThere,
            },
        }
    }

    fn end(&self, since: OffsetDateTime) -> OffsetDateTime {
        later(since, self.abandon_after)
    }
}

/// How old something is; what is dated in the future, by another clock, is new.
fn age(since: OffsetDateTime, now: OffsetDateTime) -> Duration {
    (now - since).try_into().unwrap_or(Duration::ZERO)
}

fn later(time: OffsetDateTime, pause: Duration) -> OffsetDateTime {
    time.saturating_add(pause.try_into().unwrap_or(time::Duration::MAX))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use time::macros::datetime;

    use super::*;

    const SINCE: OffsetDateTime = datetime!(2026-11-22 10:00 UTC);

    fn seconds(schedule: &ConfirmSchedule, until: u64) -> Vec<u64> {
        let mut looks = Vec::new();
        let mut now = SINCE;
        loop {
            now = schedule.next_look(SINCE, now);
            let age = age(SINCE, now).as_secs();
            if age > until {
                return looks;
            }
            looks.push(age);
        }
    }

    #[test]
    fn looks_become_rarer_and_one_is_at_the_end() {
        let schedule = ConfirmSchedule::default();
        let looks = seconds(&schedule, 20_000);
        let expected =
            [5, 10, 20, 40, 80, 160, 320, 640, 1280, 2560, 5120, 8720, 12_320, 15_920, 19_520];
        assert_eq!(looks, expected);
        let week = schedule.abandon_after.as_secs();
        assert!(seconds(&schedule, week).contains(&week), "once at the end");
        assert!(seconds(&schedule, 2 * week).len() > 300, "and on, if nobody knows");
        let late = SINCE - Duration::from_secs(60);
        assert_eq!(schedule.next_look(SINCE, late), late + schedule.first_look);
    }

    #[test]
    fn only_a_no_when_the_time_is_over_gives_a_sign_up_up() {
        let schedule = ConfirmSchedule::default();
        let end = SINCE + schedule.abandon_after;
        let before = end - Duration::from_millis(1);
        assert_eq!(schedule.judge(Finding::NotThere, SINCE, end), Next::Abandon);
        let wait = |tried, due_at| Next::WaitOn { due_at, tried };
        assert_eq!(schedule.judge(Finding::NotThere, SINCE, before), wait(true, end));
        let hour_later = end + schedule.longest_pause;
        assert_eq!(schedule.judge(Finding::Unknown, SINCE, end), wait(false, hour_later));
        let source = ConfirmationSource::Directory;
        let there = Finding::There { object_id: "1".into(), source };
        let confirm = Next::Confirm { object_id: "1".into(), source };
        assert_eq!(schedule.judge(there, SINCE, end), confirm);
    }

    proptest! {
        #[test]
        fn the_next_look_is_later_whatever_the_settings(
            first in 1_u64..100_000, longest in 1_u64..100_000, end: u64, age in -1000_i64..1_000_000,
        ) {
            let schedule = ConfirmSchedule {
                first_look: Duration::from_secs(first),
                longest_pause: Duration::from_secs(longest),
                abandon_after: Duration::from_secs(end),
            };
            let now = SINCE + time::Duration::seconds(age);
            let next = schedule.next_look(SINCE, now);
            prop_assert!(next > now && next <= now + Duration::from_secs(first.max(longest)));
        }
    }
}
