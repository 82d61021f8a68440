//! What the workers count. Labels are worker names and fixed words, so their number is bounded.

use std::time::Duration;

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::{Registry, Unit},
};

use crate::runtime::Flow;

/// The metrics of all workers of a process; cheap to clone.
#[derive(Clone, Debug)]
pub struct WorkerMetrics {
    attempts: Family<AttemptLabels, Counter>,
    seconds: Family<WorkerLabels, Histogram, fn() -> Histogram>,
    in_hand: Family<WorkerLabels, Gauge>,
    parked: Family<WorkerLabels, Counter>,
    lag: Family<WorkerLabels, Gauge>,
    backlog: Family<WorkerLabels, Gauge>,
    retries: Family<WorkerLabels, Gauge>,
    dead_letters: Family<WorkerLabels, Gauge>,
    oldest: Family<WorkerLabels, Gauge>,
    breaker: Family<WorkerLabels, Gauge>,
    paused: Family<WorkerLabels, Gauge>,
    stalls: Family<WorkerLabels, Counter>,
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
            backlog: Family::default(),
            retries: Family::default(),
            dead_letters: Family::default(),
            oldest: Family::default(),
            breaker: Family::default(),
            paused: Family::default(),
            stalls: Family::default(),
        }
    }
}

impl WorkerMetrics {
    /// Adds `vestibule_worker_…` to the registry.
    pub fn register(registry: &mut Registry) -> Self {
        let it = Self::default();
        let registry = registry.sub_registry_with_prefix("vestibule_worker");
        registry.register(
            "attempts",
            "Attempts at events, by what became of them",
            it.attempts.clone(),
        );
        registry.register_with_unit(
            "handle",
            "How long attempts took",
            Unit::Seconds,
            it.seconds.clone(),
        );
        registry.register(
            "in_hand",
            "Events being handled or waiting for their turn",
            it.in_hand.clone(),
        );
        registry.register("parked", "Events set aside as dead letters", it.parked.clone());
        registry.register_with_unit(
            "lag",
            "Age of the event of the log whose handling began last",
            Unit::Seconds,
            it.lag.clone(),
        );
        registry.register(
            "backlog_events",
            "Events in the log that the worker has not been given",
            it.backlog.clone(),
        );
        registry.register(
            "retries_waiting",
            "Events that wait in the store for their next attempt",
            it.retries.clone(),
        );
        registry.register(
            "dead_letters",
            "Dead letters that nobody has sent back or dropped",
            it.dead_letters.clone(),
        );
        registry.register_with_unit(
            "oldest_waiting",
            "Age of the oldest event that is known to wait, 0 if none does",
            Unit::Seconds,
            it.oldest.clone(),
        );
        registry.register(
            "breaker_state",
            "Whether the target is left alone: 0 closed, 1 half-open, 2 open",
            it.breaker.clone(),
        );
        registry.register(
            "paused",
            "1 while the worker is told to take no events",
            it.paused.clone(),
        );
        registry.register(
            "stalls",
            "How often the consumer was opened anew because it gave none of the events that wait",
            it.stalls.clone(),
        );
        it
    }

    /// Shows no more how a worker stands that this process has stopped running. What it has done
    /// stays counted.
    pub fn forget(&self, worker: &str) {
        let labels = WorkerLabels { worker: worker.to_owned() };
        let Self { in_hand, lag, backlog, retries, dead_letters, oldest, breaker, paused, .. } =
            self;
        for gauge in [in_hand, lag, backlog, retries, dead_letters, oldest, breaker, paused] {
            gauge.remove(&labels);
        }
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
            backlog: self.backlog.get_or_create_owned(&labels),
            retries: self.retries.get_or_create_owned(&labels),
            dead_letters: self.dead_letters.get_or_create_owned(&labels),
            oldest: self.oldest.get_or_create_owned(&labels),
            breaker: self.breaker.get_or_create_owned(&labels),
            paused: self.paused.get_or_create_owned(&labels),
            stalls: self.stalls.get_or_create_owned(&labels),
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
    pub(crate) backlog: Gauge,
    pub(crate) retries: Gauge,
    pub(crate) dead_letters: Gauge,
    pub(crate) paused: Gauge,
    pub(crate) stalls: Counter,
    lag: Gauge,
    oldest: Gauge,
    pub(crate) breaker: Gauge,
}

impl OneWorker {
    pub(crate) fn began(&self, event_age: Duration) {
        self.lag.set(seconds(event_age));
    }

    pub(crate) fn oldest(&self, age: Duration) {
        self.oldest.set(seconds(age));
    }

    pub(crate) fn breaker_is(&self, flow: Flow) {
        self.breaker.set(match flow {
            Flow::Free => 0,
            Flow::Probe { .. } => 1,
            Flow::Shut { .. } => 2,
        });
    }
}

fn seconds(duration: Duration) -> i64 {
    i64::try_from(duration.as_secs()).unwrap_or(i64::MAX)
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
        worker.breaker_is(Flow::Shut { until: std::time::Instant::now() });

        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();

        for line in [
            r#"vestibule_worker_attempts_total{worker="notify",outcome="done"} 0"#,
            r#"vestibule_worker_attempts_total{worker="notify",outcome="retried"} 1"#,
            r#"vestibule_worker_handle_seconds_count{worker="notify"} 0"#,
            r#"vestibule_worker_in_hand{worker="notify"} 0"#,
            r#"vestibule_worker_parked_total{worker="notify"} 0"#,
            r#"vestibule_worker_lag_seconds{worker="notify"} 7"#,
            r#"vestibule_worker_backlog_events{worker="notify"} 0"#,
            r#"vestibule_worker_retries_waiting{worker="notify"} 0"#,
            r#"vestibule_worker_dead_letters{worker="notify"} 0"#,
            r#"vestibule_worker_oldest_waiting_seconds{worker="notify"} 0"#,
            r#"vestibule_worker_breaker_state{worker="notify"} 2"#,
            r#"vestibule_worker_paused{worker="notify"} 0"#,
            r#"vestibule_worker_stalls_total{worker="notify"} 0"#,
        ] {
            assert!(text.contains(line), "{line} is not in\n{text}");
        }
    }

    #[test]
    fn a_worker_that_is_stopped_is_said_nothing_of_but_what_it_has_done() {
        let mut registry = Registry::default();
        let metrics = WorkerMetrics::register(&mut registry);
        metrics.of("crm").backlog.set(7);
        metrics.of("notify").backlog.set(3);
        metrics.forget("crm");

        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        assert!(!text.contains(r#"backlog_events{worker="crm"}"#), "{text}");
        assert!(text.contains(r#"backlog_events{worker="notify"} 3"#), "{text}");
        assert!(text.contains(r#"attempts_total{worker="crm",outcome="done"} 0"#), "{text}");
    }
}
