//! Leaves a source alone that fails again and again. Pure: the time is an argument.

use std::time::Duration;

use tokio::time::Instant;

/// When a source is left alone, and for how long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BreakerSettings {
    /// So many failures in a row open the breaker; with zero it never opens.
    pub failures: u32,
    /// How long the source is left alone before one call tries it again.
    pub pause: Duration,
}

#[derive(Debug)]
pub(super) struct Breaker {
    settings: BreakerSettings,
    failures_in_a_row: u32,
    open_until: Option<Instant>,
}

impl Breaker {
    pub(super) fn new(settings: BreakerSettings) -> Self {
        Self { settings, failures_in_a_row: 0, open_until: None }
    }

    /// Whether a call would be let through.
    pub(super) fn lets_through(&self, now: Instant) -> bool {
        self.open_until.is_none_or(|until| until <= now)
    }

    /// Lets a call through, or not. After a pause that is one call; should it never report back,
    /// another one may try after a further pause.
    pub(super) fn admit(&mut self, now: Instant) -> bool {
        let admitted = self.lets_through(now);
        if admitted && self.open_until.is_some() {
            self.open_until = Some(now + self.settings.pause);
        }
        admitted
    }

    /// True if the breaker was open and is closed now.
    pub(super) fn succeeded(&mut self) -> bool {
        self.failures_in_a_row = 0;
        self.open_until.take().is_some()
    }

    /// True if the breaker was closed and is open now.
    pub(super) fn failed(&mut self, now: Instant) -> bool {
        self.failures_in_a_row = self.failures_in_a_row.saturating_add(1);
        if self.settings.failures == 0 || self.failures_in_a_row < self.settings.failures {
            return false;
        }
        self.open_until.replace(now + self.settings.pause).is_none()
    }

    pub(super) fn failures_in_a_row(&self) -> u32 {
        self.failures_in_a_row
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAUSE: Duration = Duration::from_secs(10);

    fn breaker(failures: u32) -> Breaker {
        Breaker::new(BreakerSettings { failures, pause: PAUSE })
    }

    #[tokio::test(start_paused = true)]
    async fn it_opens_at_the_last_failure_in_a_row_and_not_before() {
        let (mut breaker, now) = (breaker(3), Instant::now());
        assert!(!breaker.failed(now) && !breaker.failed(now));
        assert!(!breaker.succeeded(), "it was not open");
        assert!(!breaker.failed(now) && !breaker.failed(now) && breaker.admit(now));
        assert!(breaker.failed(now), "the third in a row");
        assert!(!breaker.admit(now));
    }

    #[tokio::test(start_paused = true)]
    async fn after_the_pause_one_call_tries_and_decides() {
        let (mut breaker, start) = (breaker(1), Instant::now());
        breaker.failed(start);
        let (early, later) = (start + PAUSE - Duration::from_millis(1), start + PAUSE);
        assert!(!breaker.admit(early));
        assert!(breaker.admit(later), "one trial");
        assert!(!breaker.admit(later), "and no second one");

        assert!(!breaker.failed(later), "it was open before");
        assert!(!breaker.admit(later + PAUSE - Duration::from_millis(1)));
        assert!(breaker.admit(later + PAUSE));
        assert!(breaker.succeeded());
        assert!(breaker.admit(later + PAUSE) && breaker.admit(later + PAUSE));
    }

    #[tokio::test(start_paused = true)]
    async fn a_trial_that_never_reports_is_followed_by_another() {
        let (mut breaker, start) = (breaker(1), Instant::now());
        breaker.failed(start);
        assert!(breaker.admit(start + PAUSE) && !breaker.admit(start + PAUSE));
        assert!(breaker.admit(start + PAUSE * 2));
    }

    #[tokio::test(start_paused = true)]
    async fn without_a_number_it_never_opens() {
        let (mut breaker, now) = (breaker(0), Instant::now());
        for _ in 0..1000 {
            assert!(!breaker.failed(now) && breaker.admit(now));
        }
    }
}
