//! What can be seen of a local log from outside.

use prometheus_client::{
    encoding::{EncodeLabelSet, EncodeLabelValue},
    metrics::{
        counter::Counter,
        family::Family,
        gauge::Gauge,
        histogram::{Histogram, exponential_buckets},
    },
    registry::{Registry, Unit},
};

#[derive(Clone, Debug)]
pub(super) struct Metrics {
    pub(super) appends: Family<AppendLabels, Counter>,
    pub(super) group_events: Histogram,
    pub(super) commit_seconds: Histogram,
    pub(super) events: Gauge,
    pub(super) oldest_seconds: Gauge,
    pub(super) bytes: Gauge,
    pub(super) free_bytes: Gauge,
    pub(super) trimmed: Counter,
    pub(super) forgotten: Counter,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct AppendLabels {
    pub(super) result: AppendResult,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
#[expect(non_camel_case_types, reason = "these are the label's values as they are written")]
pub(super) enum AppendResult {
    stored,
    duplicate,
    failed,
}

impl Metrics {
    pub(super) fn new() -> Self {
        Self {
            appends: Family::default(),
            group_events: Histogram::new(exponential_buckets(1.0, 2.0, 10)),
            commit_seconds: Histogram::new(exponential_buckets(0.000_1, 2.0, 15)),
            events: Gauge::default(),
            oldest_seconds: Gauge::default(),
            bytes: Gauge::default(),
            free_bytes: Gauge::default(),
            trimmed: Counter::default(),
            forgotten: Counter::default(),
        }
    }

    pub(super) fn appended(&self, result: AppendResult, count: usize) {
        if count > 0 {
            self.appends.get_or_create(&AppendLabels { result }).inc_by(count as u64);
        }
    }

    pub(super) fn register(&self, registry: &mut Registry) {
        registry.sub_registry_with_prefix("vestibule").register_with_unit(
            "log",
            "Size of the local log with its write-ahead log",
            Unit::Bytes,
            self.bytes.clone(),
        );
        let log = registry.sub_registry_with_prefix("vestibule_log");
        log.register("appends", "Appended events by result", self.appends.clone());
        log.register("group_events", "Events in one commit", self.group_events.clone());
        log.register_with_unit(
            "commit",
            "Time from the start of a commit to its end on disk",
            Unit::Seconds,
            self.commit_seconds.clone(),
        );
        log.register("events", "Events in the local log", self.events.clone());
        log.register_with_unit(
            "oldest",
            "Age of the oldest event in the local log",
            Unit::Seconds,
            self.oldest_seconds.clone(),
        );
        log.register_with_unit(
            "free",
            "Free space on the disk of the local log",
            Unit::Bytes,
            self.free_bytes.clone(),
        );
        log.register("trimmed", "Events removed by retention", self.trimmed.clone());
        log.register(
            "fingerprints_forgotten",
            "Fingerprints dropped within their window because there were too many",
            self.forgotten.clone(),
        );
    }
}
