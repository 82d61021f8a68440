//! Load at a rate of its own: calls begin when they are due, however slow the answers are.
//!
//! A closed loop asks less of a server that has become slow, and so never sees those who would have
//! waited. Here every call is timed from when it should have begun.

use std::time::Duration;

use anyhow::Context;
use tokio::{
    task::JoinSet,
    time::{Instant, sleep_until},
};

use crate::load::quantile;

/// Begins a call every `1 / rate` seconds for so long, and hands back what each of them gave, in the
/// order in which they ended.
pub(crate) async fn at_rate<F>(
    rate: f64,
    length: Duration,
    mut call: impl FnMut(u64, Instant) -> F,
) -> anyhow::Result<Vec<F::Output>>
where
    F: Future<Output: Send + 'static> + Send + 'static,
{
    let (start, count) = (Instant::now(), (rate * length.as_secs_f64()) as u64);
    let mut calls = JoinSet::new();
    for number in 0..count {
        let due = start + Duration::from_secs_f64(number as f64 / rate);
        sleep_until(due).await;
        calls.spawn(call(number, due));
    }
    let mut given = vec![];
    while let Some(done) = calls.join_next().await {
        given.push(done.context("a call has panicked")?);
    }
    Ok(given)
}

/// What many calls took.
#[derive(Clone, Debug, Default)]
pub(crate) struct Latencies(Vec<Duration>);

impl FromIterator<Duration> for Latencies {
    fn from_iter<I: IntoIterator<Item = Duration>>(latencies: I) -> Self {
        let mut latencies: Vec<_> = latencies.into_iter().collect();
        latencies.sort_unstable();
        Self(latencies)
    }
}

impl Latencies {
    pub(crate) fn count(&self) -> usize {
        self.0.len()
    }

    pub(crate) fn ms(&self, share: f64) -> f64 {
        quantile(&self.0, share).as_secs_f64() * 1e3
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_slow_answer_delays_no_other_call_and_counts_from_when_it_was_due() {
        let started = Instant::now();
        let given = at_rate(100.0, Duration::from_millis(200), |number, due| async move {
            if number == 3 {
                tokio::time::sleep(Duration::from_secs(3)).await;
            }
            (number, due, due.elapsed())
        });
        let given = given.await.unwrap();

        assert_eq!(given.len(), 20);
        assert_eq!(given.last().unwrap().0, 3, "the slow one ends last");
        assert!(given.last().unwrap().2 >= Duration::from_secs(3));
        assert!(
            given
                .iter()
                .all(|(number, due, _)| *due >= started + Duration::from_millis(number * 10))
        );
    }
}
