//! What the workers count. Labels are worker names and fixed words, so their number is bounded.

use std::time::Duration;

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::Registry,
};

/// The metrics of all workers of a process; cheap to clone.
#[derive(Clone, Debug)]
pub struct WorkerMetrics {
    attempts: Family<AttemptLabels, Counter>,
    seconds: Family<WorkerLabels, Histogram, fn() -> Histogram>,
    in_hand: Family<WorkerLabels, Gauge>,
    parked: Family<WorkerLabels, Counter>,
    lag: Family<WorkerLabels, Gauge>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct WorkerLabels {
    worker: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct AttemptLabels {
    worker: String,
    outcome: &'static str,
}

fn handle_seconds() -> Histogram {
    // From a single SQLite transaction to the slowest provider that an attempt waits for.
    Histogram::new([
        0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0,
    ])
}

impl Default for WorkerMetrics {
    fn default() -> Self {
        Self {
            attempts: Family::default(),
            seconds: Family::new_with_constructor(handle_seconds),
            in_hand: Family::default(),
            parked: Family::default(),
            lag: Family::default(),
        }
    }
}

impl WorkerMetrics {
    /// Adds `vestibule_worker_…` to the registry.
    pub fn register(registry: &mut Registry) -> Self {
        let it = Self::default();
        registry.register(
            "vestibule_worker_attempts",
            "Attempts at events, by what became of them",
            it.attempts.clone(),
        );
        registry.register(
            "vestibule_worker_handle_seconds",
            "How long attempts took",
            it.seconds.clone(),
        );
        registry.register(
            "vestibule_worker_in_hand",
            "Events being handled or waiting for their turn",
            it.in_hand.clone(),
        );
        registry.register(
            "vestibule_worker_parked",
            "Events set aside as dead letters",
            it.parked.clone(),
        );
        registry.register(
            "vestibule_worker_lag_seconds",
            "Age of the event whose handling began last",
            it.lag.clone(),
        );
        it
    }

    /// The handles of one worker, so that no label is built for an event.
    pub(crate) fn of(&self, worker: &str) -> OneWorker {
        let labels = WorkerLabels { worker: worker.to_owned() };
        let attempts = |outcome| {
            self.attempts.get_or_create_owned(&AttemptLabels { worker: worker.to_owned(), outcome })
        };
        OneWorker {
            done: attempts("done"),
            retried: attempts("retried"),
            refused: attempts("parked"),
            postponed: attempts("postponed"),
            seconds: self.seconds.get_or_create_owned(&labels),
            in_hand: self.in_hand.get_or_create_owned(&labels),
            parked: self.parked.get_or_create_owned(&labels),
            lag: self.lag.get_or_create_owned(&labels),
        }
    }
}

/// What one worker counts.
#[derive(Clone, Debug)]
pub(crate) struct OneWorker {
    pub(crate) done: Counter,
    pub(crate) retried: Counter,
    /// Failed for good, or for the last time.
    pub(crate) refused: Counter,
    /// Our own store was down, which costs no try.
    pub(crate) postponed: Counter,
    pub(crate) seconds: Histogram,
    pub(crate) in_hand: Gauge,
    pub(crate) parked: Counter,
    lag: Gauge,
}

impl OneWorker {
    pub(crate) fn began(&self, event_age: Duration) {
        self.lag.set(i64::try_from(event_age.as_secs()).unwrap_or(i64::MAX));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_is_seen_in_all_metrics_before_its_first_event() {
        let mut registry = Registry::default();
        let worker = WorkerMetrics::register(&mut registry).of("notify");
        worker.retried.inc();
        worker.began(Duration::from_secs(7));

        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();

        for line in [
            r#"vestibule_worker_attempts_total{worker="notify",outcome="done"} 0"#,
            r#"vestibule_worker_attempts_total{worker="notify",outcome="retried"} 1"#,
            r#"vestibule_worker_handle_seconds_count{worker="notify"} 0"#,
            r#"vestibule_worker_in_hand{worker="notify"} 0"#,
            r#"vestibule_worker_parked_total{worker="notify"} 0"#,
            r#"vestibule_worker_lag_seconds{worker="notify"} 7"#,
        ] {
            assert!(text.contains(line), "{line} is not in\n{text}");
        }
    }
}
