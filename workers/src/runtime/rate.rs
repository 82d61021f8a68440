//! How fast attempts may begin: a token bucket.
//!
//! Pure: time is passed in. The rate holds for one process; so many processes, so many times it.

use std::{
    fmt,
    str::FromStr,
    time::{Duration, Instant},
};

/// Attempts in a span of time: `100/s`, `6000/m`, `500/h`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    attempts: u32,
    per: Unit,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Unit {
    Second,
    Minute,
    Hour,
}

impl Unit {
    const ALL: [(&str, Self); 3] = [("s", Self::Second), ("m", Self::Minute), ("h", Self::Hour)];

    const fn seconds(self) -> f64 {
        match self {
            Self::Second => 1.0,
            Self::Minute => 60.0,
            Self::Hour => 3600.0,
        }
    }
}

/// A text that is no rate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a rate such as \"100/s\", \"6000/m\" or \"500/h\"")]
pub struct NoRate;

impl FromStr for Rate {
    type Err = NoRate;

    fn from_str(text: &str) -> Result<Self, NoRate> {
        let (attempts, unit) = text.split_once('/').ok_or(NoRate)?;
        let digits = !attempts.is_empty() && attempts.bytes().all(|it| it.is_ascii_digit());
        let attempts = attempts.parse().ok().filter(|it| digits && *it > 0).ok_or(NoRate)?;
        let known = Unit::ALL.into_iter().find(|(name, _)| *name == unit);
        Ok(Self { attempts, per: known.ok_or(NoRate)?.1 })
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let unit = Unit::ALL.into_iter().find(|(_, unit)| *unit == self.per);
        write!(f, "{}/{}", self.attempts, unit.map_or("s", |(name, _)| name))
    }
}

impl Rate {
    #[must_use]
    pub fn per_second(self) -> f64 {
        f64::from(self.attempts) / self.per.seconds()
    }

    /// So many may begin in a row after a rest: a second's worth, and one where that is less. More
    /// would let a provider's own limit be met after every quiet hour.
    fn burst(self) -> f64 {
        self.per_second().max(1.0)
    }

    /// How many may begin within a span of time, roughly.
    pub(super) fn within(self, span: Duration) -> usize {
        // A float that is too large for an integer becomes the largest.
        (self.per_second() * span.as_secs_f64() + self.burst()) as usize
    }
}

/// Attempts that may begin now, refilled by time.
#[derive(Debug)]
pub(super) struct Bucket {
    rate: Rate,
    tokens: f64,
    at: Instant,
}

impl Bucket {
    pub(super) fn new(rate: Rate, now: Instant) -> Self {
        Self { rate, tokens: rate.burst(), at: now }
    }

    /// Takes a token if there is one, or says when there will be.
    pub(super) fn take(&mut self, now: Instant) -> Result<(), Instant> {
        let passed = now.saturating_duration_since(self.at).as_secs_f64();
        self.at = self.at.max(now);
        self.tokens = (self.tokens + passed * self.rate.per_second()).min(self.rate.burst());
        // A billionth is what rounding loses; without it a waiter could come just too early.
        if self.tokens >= 1.0 - 1e-9 {
            self.tokens -= 1.0;
            return Ok(());
        }
        let missing = (1.0 - self.tokens) / self.rate.per_second();
        Err(self.at + Duration::from_secs_f64(missing))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_rate_is_read_as_it_is_written() {
        for text in ["1/s", "100/s", "6000/m", "500/h", "4294967295/s"] {
            assert_eq!(text.parse::<Rate>().unwrap().to_string(), text);
        }
        for text in [
            "",
            "/",
            "100",
            "0/s",
            "-1/s",
            "+1/s",
            "1.5/s",
            "100/d",
            "100 / s",
            "1/s ",
            "4294967296/s",
        ] {
            assert_eq!(text.parse::<Rate>(), Err(NoRate), "{text}");
        }
    }

    #[test]
    fn after_a_burst_attempts_begin_at_the_rate() {
        let start = Instant::now();
        let mut bucket = Bucket::new("2/s".parse().unwrap(), start);
        assert_eq!([bucket.take(start), bucket.take(start)], [Ok(()); 2]);
        let next = bucket.take(start).unwrap_err();
        assert_eq!(next - start, Duration::from_millis(500));
        assert!(bucket.take(next - Duration::from_millis(1)).is_err());
        assert_eq!(bucket.take(next), Ok(()));
        let hours_later = next + Duration::from_secs(7200);
        assert_eq!([bucket.take(hours_later), bucket.take(hours_later)], [Ok(()); 2]);
        assert!(bucket.take(hours_later).is_err(), "a rest saves up no more than a burst");
    }

    proptest! {
        #[test]
        fn no_span_of_time_sees_more_than_the_rate(
            attempts in 1..2_000_u32,
            unit in 0..3_usize,
            steps in proptest::collection::vec((0..3_000_u64, 1..20_u32), 1..200),
        ) {
            let rate = Rate { attempts, per: Unit::ALL[unit].1 };
            let start = Instant::now();
            let mut bucket = Bucket::new(rate, start);
            let mut now = start;
            let mut begun = 0_u32;
            for (passed, asked) in steps {
                now += Duration::from_millis(passed);
                for _ in 0..asked {
                    match bucket.take(now) {
                        Ok(()) => begun += 1,
                        Err(at) => {
                            prop_assert!(at > now, "told to come back at once");
                            // Who comes when told is served, if nobody was in between.
                            let mut other = Bucket { rate, ..bucket };
                            prop_assert_eq!(other.take(at + Duration::from_nanos(1)), Ok(()));
                        }
                    }
                }
                let elapsed = (now - start).as_secs_f64();
                prop_assert!(f64::from(begun) <= rate.burst() + elapsed * rate.per_second() + 1e-3);
            }
        }
    }
}
