//! What the endpoint counts.
//!
//! Labels hold configured names and words of ours, so there are as many series as the
//! configuration makes, whatever is sent. A call finds its counters by index: no text is copied
//! and no map is searched.

use std::{
    array,
    sync::{Arc, OnceLock},
    time::Duration,
};

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, histogram::Histogram},
    registry::{Registry, Unit},
};
use vestibule_events::{ConnectorName, Outcome, Step};

use crate::{BasicCredential, Problem, Rules, auth::Denied};

/// Fine where answers are expected, coarse where the deadline is near.
const SECONDS: [f64; 20] = [
    0.000_25, 0.000_5, 0.000_75, 0.001, 0.001_5, 0.002, 0.003, 0.004, 0.006, 0.008, 0.012, 0.016,
    0.025, 0.035, 0.05, 0.1, 0.2, 0.4, 0.8, 2.0,
];

/// What a call got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Served {
    Continue,
    Reject,
    Block,
    /// An approver has to say yes first.
    Pending,
    /// Refused because its event could not be stored in time.
    WithoutStorage,
    /// Answered although its event could not be stored in time.
    LetThrough,
    Problem(Problem),
}

impl Served {
    const COUNT: usize = 6 + Problem::ALL.len();

    fn all() -> impl Iterator<Item = Self> {
        [
            Self::Continue,
            Self::Reject,
            Self::Block,
            Self::Pending,
            Self::WithoutStorage,
            Self::LetThrough,
        ]
        .into_iter()
        .chain(Problem::ALL.map(Self::Problem))
    }

    fn index(self) -> usize {
        Self::all().position(|it| it == self).expect("all() holds every one")
    }

    const fn as_str(self) -> &'static str {
        match self {
            Self::Continue => "continue",
            Self::Reject => "reject",
            Self::Block => "block",
            Self::Pending => "pending",
            Self::WithoutStorage => "refused-without-storage",
            Self::LetThrough => "let-through",
            Self::Problem(problem) => problem.code(),
        }
    }
}

impl From<&Outcome> for Served {
    fn from(outcome: &Outcome) -> Self {
        match outcome {
            Outcome::Continue { .. } => Self::Continue,
            Outcome::Reject { .. } => Self::Reject,
            Outcome::Block { .. } => Self::Block,
            Outcome::Pending { .. } => Self::Pending,
        }
    }
}

/// Why an event was not known to be stored when its answer was due.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum StorageFailure {
    /// So many appends wait already that another one would only make it worse.
    Crowded,
    NotStored,
    Unknown,
    /// The log took longer than the deadline.
    Late,
    /// The stream took longer than the deadline to acknowledge what the local log holds.
    StreamLate,
}

impl StorageFailure {
    const ALL: [Self; 5] =
        [Self::Crowded, Self::NotStored, Self::Unknown, Self::Late, Self::StreamLate];

    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Crowded => "crowded",
            Self::NotStored => "not-stored",
            Self::Unknown => "unknown",
            Self::Late => "late",
            Self::StreamLate => "stream-late",
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CallLabels {
    connector: String,
    step: &'static str,
    answer: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ConnectorLabels {
    connector: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CauseLabels {
    connector: String,
    cause: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CredentialLabels {
    connector: String,
    credential: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RuleLabels {
    connector: String,
    rule: String,
}

/// Every family, and the counters that belong to no connector.
#[derive(Debug)]
pub(crate) struct Metrics {
    calls: Family<CallLabels, Counter>,
    seconds: Seconds,
    denied: Family<CauseLabels, Counter>,
    credential_uses: Family<CredentialLabels, Counter>,
    repeated: Family<ConnectorLabels, Counter>,
    storage_failures: Family<CauseLabels, Counter>,
    rule_failures: Family<RuleLabels, Counter>,
    step_contradictions: Family<ConnectorLabels, Counter>,
    claims_unsaid: Family<ConnectorLabels, Counter>,
    refusals_unsaid: Family<ConnectorLabels, Counter>,
    /// Calls to a URL that belongs to no connector.
    pub(crate) unknown_url: Counter,
}

type Seconds = Family<CallLabels, Histogram, fn() -> Histogram>;

impl Metrics {
    pub(crate) fn register(registry: &mut Registry) -> Arc<Self> {
        let it = Self {
            calls: Family::default(),
            seconds: Family::new_with_constructor(|| Histogram::new(SECONDS)),
            denied: Family::default(),
            credential_uses: Family::default(),
            repeated: Family::default(),
            storage_failures: Family::default(),
            rule_failures: Family::default(),
            step_contradictions: Family::default(),
            claims_unsaid: Family::default(),
            refusals_unsaid: Family::default(),
            unknown_url: Counter::default(),
        };
        registry.register(
            "vestibule_connector_calls",
            "Calls by connector, step and answer",
            it.calls.clone(),
        );
        registry.register_with_unit(
            "vestibule_connector_answer",
            "Time from the arrival of a call to its answer",
            Unit::Seconds,
            it.seconds.clone(),
        );
        registry.register(
            "vestibule_connector_denied",
            "Calls without a valid credential",
            it.denied.clone(),
        );
        registry.register(
            "vestibule_connector_credential_uses",
            "Calls by the credential they came with",
            it.credential_uses.clone(),
        );
        registry.register(
            "vestibule_connector_repeated",
            "Repeated calls that got their first answer again",
            it.repeated.clone(),
        );
        registry.register(
            "vestibule_connector_storage_failures",
            "Calls whose event was not known to be stored when the answer was due",
            it.storage_failures.clone(),
        );
        registry.register(
            "vestibule_connector_rule_failures",
            "Rules that could not be evaluated, so that their failure policy was applied",
            it.rule_failures.clone(),
        );
        registry.register(
            "vestibule_connector_step_contradictions",
            "Calls to the URL of one step that name another",
            it.step_contradictions.clone(),
        );
        registry.register(
            "vestibule_connector_claims_unsaid",
            "Claims that rules set and the dialect could not say, so that answers left them out",
            it.claims_unsaid.clone(),
        );
        registry.register(
            "vestibule_connector_refusals_unsaid",
            "Refusals at a step where the dialect cannot turn anybody away",
            it.refusals_unsaid.clone(),
        );
        registry.register(
            "vestibule_connector_unknown_urls",
            "Calls to no connector or step of ours",
            it.unknown_url.clone(),
        );
        Arc::new(it)
    }
}

/// The counters of one connector, found once.
pub(crate) struct ConnectorMetrics {
    metrics: Arc<Metrics>,
    connector: String,
    /// By step (the last is for calls whose step never became known) and answer. Made at first
    /// use: most pairs never occur.
    answers: [[OnceLock<(Counter, Histogram)>; Served::COUNT]; Step::ALL.len() + 1],
    denied: [Counter; 3],
    credential_uses: Vec<Counter>,
    pub(crate) repeated: Counter,
    storage_failures: [Counter; StorageFailure::ALL.len()],
    rule_failures: Vec<Counter>,
    pub(crate) step_contradictions: Counter,
    claims_unsaid: Counter,
    pub(crate) refusals_unsaid: Counter,
}

impl ConnectorMetrics {
    pub(crate) fn new(
        metrics: Arc<Metrics>,
        connector: &ConnectorName,
        credentials: &[BasicCredential],
        rules: &Rules,
    ) -> Self {
        let connector = connector.as_str().to_owned();
        let by_connector = ConnectorLabels { connector: connector.clone() };
        let by_cause = |cause| CauseLabels { connector: connector.clone(), cause };
        let by_credential = |it: &BasicCredential| CredentialLabels {
            connector: connector.clone(),
            credential: it.name.clone(),
        };
        let by_rule =
            |rule: &str| RuleLabels { connector: connector.clone(), rule: rule.to_owned() };
        Self {
            answers: array::from_fn(|_| array::from_fn(|_| OnceLock::new())),
            denied: DENIED.map(|(_, cause)| metrics.denied.get_or_create_owned(&by_cause(cause))),
            credential_uses: credentials
                .iter()
                .map(|it| metrics.credential_uses.get_or_create_owned(&by_credential(it)))
                .collect(),
            repeated: metrics.repeated.get_or_create_owned(&by_connector),
            storage_failures: StorageFailure::ALL.map(|cause| {
                metrics.storage_failures.get_or_create_owned(&by_cause(cause.as_str()))
            }),
            rule_failures: rules
                .names()
                .map(|rule| metrics.rule_failures.get_or_create_owned(&by_rule(rule)))
                .collect(),
            step_contradictions: metrics.step_contradictions.get_or_create_owned(&by_connector),
            claims_unsaid: metrics.claims_unsaid.get_or_create_owned(&by_connector),
            refusals_unsaid: metrics.refusals_unsaid.get_or_create_owned(&by_connector),
            metrics,
            connector,
        }
    }

    pub(crate) fn answered(&self, step: Option<Step>, served: Served, took: Duration) {
        let row = step
            .and_then(|step| Step::ALL.iter().position(|it| *it == step))
            .unwrap_or(Step::ALL.len());
        let (calls, seconds) = self.answers[row][served.index()].get_or_init(|| {
            let labels = CallLabels {
                connector: self.connector.clone(),
                step: step.map_or("none", Step::as_str),
                answer: served.as_str(),
            };
            (
                self.metrics.calls.get_or_create_owned(&labels),
                self.metrics.seconds.get_or_create_owned(&labels),
            )
        });
        calls.inc();
        seconds.observe(took.as_secs_f64());
    }

    pub(crate) fn denied(&self, denied: Denied) {
        if let Some(place) = DENIED.iter().position(|(it, _)| *it == denied) {
            self.denied[place].inc();
        }
    }

    pub(crate) fn credential_used(&self, place: usize) {
        self.credential_uses[place].inc();
    }

    pub(crate) fn storage_failed(&self, failure: StorageFailure) {
        if let Some(place) = StorageFailure::ALL.iter().position(|it| *it == failure) {
            self.storage_failures[place].inc();
        }
    }

    /// Counts, and says how many there were before.
    pub(crate) fn claims_unsaid(&self, claims: u64) -> u64 {
        self.claims_unsaid.inc_by(claims)
    }

    /// Counts, and says whether this rule never failed before.
    pub(crate) fn rule_failed(&self, place: usize) -> bool {
        self.rule_failures[place].inc() == 0
    }
}

const DENIED: [(Denied, &str); 3] =
    [(Denied::Missing, "missing"), (Denied::Malformed, "malformed"), (Denied::Wrong, "wrong")];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_answer_has_a_place_and_a_name_of_its_own() {
        let places: Vec<_> = Served::all().map(Served::index).collect();
        assert_eq!(places, (0..Served::COUNT).collect::<Vec<_>>());
        let names: std::collections::HashSet<_> = Served::all().map(Served::as_str).collect();
        assert_eq!(names.len(), Served::COUNT);
    }
}
