//! What lists and lookups count. Labels hold configured names and words of ours.

use std::sync::atomic::AtomicU64;

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::{Registry, Unit},
};

use super::{AnswerFrom, Fetched, LookupFailure};

/// From a database in the next rack to a slow service on another continent.
const SECONDS: [f64; 14] =
    [0.000_5, 0.001, 0.002, 0.004, 0.008, 0.016, 0.03, 0.06, 0.12, 0.25, 0.5, 1.0, 2.0, 5.0];

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct AnswerLabels {
    lookup: String,
    answer: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct LookupLabels {
    lookup: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ListLabels {
    list: String,
}

/// The families that all lookups share; cheap to clone.
///
/// Registered once for the process: lookups made anew after a reload go on counting where those of
/// the same name left off.
#[derive(Clone, Debug)]
pub struct LookupMetrics {
    calls: Family<AnswerLabels, Counter>,
    seconds: Family<LookupLabels, Histogram, fn() -> Histogram>,
    breaker_open: Family<LookupLabels, Gauge>,
}

impl LookupMetrics {
    #[must_use]
    pub fn register(registry: &mut Registry) -> Self {
        let it = Self::unregistered();
        registry.register(
            "vestibule_lookup_calls",
            "Lookups by what was answered, or why nothing was",
            it.calls.clone(),
        );
        registry.register_with_unit(
            "vestibule_lookup",
            "Time that the source of a lookup took to answer, or to fail",
            Unit::Seconds,
            it.seconds.clone(),
        );
        registry.register(
            "vestibule_lookup_breaker_open",
            "1 while the source of a lookup is left alone because it failed",
            it.breaker_open.clone(),
        );
        it
    }

    /// Counts for nobody: for a tool that does not serve metrics.
    #[must_use]
    pub fn unregistered() -> Self {
        Self {
            calls: Family::default(),
            seconds: Family::new_with_constructor(|| Histogram::new(SECONDS)),
            breaker_open: Family::default(),
        }
    }

    pub(super) fn of(&self, lookup: &str) -> Counters {
        let by_answer = |answer| {
            let labels = AnswerLabels { lookup: lookup.to_owned(), answer };
            self.calls.get_or_create_owned(&labels)
        };
        let by_lookup = LookupLabels { lookup: lookup.to_owned() };
        let breaker_open = self.breaker_open.get_or_create_owned(&by_lookup);
        breaker_open.set(0);
        Counters {
            answered: AnswerFrom::ALL.map(|from| by_answer(from.as_str())),
            failed: LookupFailure::ALL.map(|failure| by_answer(failure.as_str())),
            seconds: self.seconds.get_or_create_owned(&by_lookup),
            breaker_open,
        }
    }
}

/// Those of one lookup, found once.
#[derive(Debug)]
pub(super) struct Counters {
    answered: [Counter; AnswerFrom::ALL.len()],
    failed: [Counter; LookupFailure::ALL.len()],
    pub(super) seconds: Histogram,
    pub(super) breaker_open: Gauge,
}

impl Counters {
    pub(super) fn count(&self, outcome: &Result<Fetched, LookupFailure>) {
        let counter = match outcome {
            Ok(fetched) => &self.answered[fetched.from as usize],
            Err(failure) => &self.failed[*failure as usize],
        };
        counter.inc();
    }
}

/// How many entries each list has; cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct ListMetrics {
    entries: Family<ListLabels, Gauge<u64, AtomicU64>>,
}

impl ListMetrics {
    #[must_use]
    pub fn register(registry: &mut Registry) -> Self {
        let it = Self::default();
        registry.register("vestibule_list_entries", "Entries in a list", it.entries.clone());
        it
    }

    /// Call this with every list that comes into force.
    pub fn record(&self, list: &crate::List) {
        let labels = ListLabels { list: list.name().to_owned() };
        self.entries.get_or_create(&labels).set(u64::try_from(list.len()).unwrap_or(u64::MAX));
    }
}
