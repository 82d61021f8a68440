//! What the endpoint counts.
//!
//! Labels hold configured names and words of ours, so there are as many series as the
//! configuration makes, whatever is sent. A call finds its counters by index: no text is copied
//! and no map is searched.

use std::{
    array,
    sync::{Arc, OnceLock, atomic::AtomicU64},
    time::Duration,
};

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::{Registry, Unit},
};
use time::OffsetDateTime;
use vestibule_events::{Mode, Outcome, Step};

use crate::{ConnectorSettings, Credential, CredentialKind, Problem, Rules, auth::Denied};

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

    pub(crate) const fn as_str(self) -> &'static str {
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

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ModeLabels {
    connector: String,
    rule: String,
    mode: &'static str,
}

/// Every family, and the counters that belong to no connector.
#[derive(Debug)]
pub(crate) struct Metrics {
    calls: Family<CallLabels, Counter>,
    seconds: Seconds,
    deadline: Family<ConnectorLabels, Gauge<f64, AtomicU64>>,
    denied: Family<CauseLabels, Counter>,
    credential_uses: Family<CredentialLabels, Counter>,
    credential_last_used: Family<CredentialLabels, Gauge>,
    bearer_keys_fetched: Family<CredentialLabels, Gauge>,
    repeated: Family<ConnectorLabels, Counter>,
    storage_failures: Family<CauseLabels, Counter>,
    rule_matches: Family<ModeLabels, Counter>,
    rule_failures: Family<RuleLabels, Counter>,
    standing_unknown: Family<ConnectorLabels, Counter>,
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
            deadline: Family::default(),
            denied: Family::default(),
            credential_uses: Family::default(),
            credential_last_used: Family::default(),
            bearer_keys_fetched: Family::default(),
            repeated: Family::default(),
            storage_failures: Family::default(),
            rule_matches: Family::default(),
            rule_failures: Family::default(),
            standing_unknown: Family::default(),
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
        registry.register_with_unit(
            "vestibule_connector_deadline",
            "Time within which every call is to be answered, as it is configured",
            Unit::Seconds,
            it.deadline.clone(),
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
        registry.register_with_unit(
            "vestibule_connector_credential_last_used",
            "When a call last came with the credential, as Unix time; 0 if not since the start",
            Unit::Seconds,
            it.credential_last_used.clone(),
        );
        registry.register_with_unit(
            "vestibule_connector_bearer_keys_fetched",
            "When the keys of bearer tokens were last fetched, as Unix time; 0 if never",
            Unit::Seconds,
            it.bearer_keys_fetched.clone(),
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
            "vestibule_connector_rule_matches",
            "Rules whose condition held, by the mode that they have",
            it.rule_matches.clone(),
        );
        registry.register(
            "vestibule_connector_standing_unknown",
            "Calls that could not learn in time whether somebody was approved or denied before",
            it.standing_unknown.clone(),
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
    denied: [OnceLock<Counter>; Denied::ALL.len()],
    credentials: Vec<(Counter, Gauge)>,
    pub(crate) repeated: Counter,
    storage_failures: [Counter; StorageFailure::ALL.len()],
    pub(crate) standing_unknown: Counter,
    pub(crate) step_contradictions: Counter,
    claims_unsaid: Counter,
    pub(crate) refusals_unsaid: Counter,
}

impl ConnectorMetrics {
    pub(crate) fn new(
        metrics: Arc<Metrics>,
        ConnectorSettings { name, credentials, deadline, .. }: &ConnectorSettings,
    ) -> Self {
        let connector = name.as_str().to_owned();
        let by_connector = ConnectorLabels { connector: connector.clone() };
        metrics.deadline.get_or_create_owned(&by_connector).set(deadline.as_secs_f64());
        let by_cause = |cause| CauseLabels { connector: connector.clone(), cause };
        let denied = array::from_fn(|_| OnceLock::new());
        // Of every kind of credential; the other causes show once they occur.
        for (place, cause) in Denied::ALL.into_iter().enumerate().take(3) {
            let counter = metrics.denied.get_or_create_owned(&by_cause(cause.as_str()));
            denied[place].get_or_init(|| counter);
        }
        let by_credential = |it: &Credential| CredentialLabels {
            connector: connector.clone(),
            credential: it.name.clone(),
        };
        for credential in credentials {
            if let CredentialKind::Bearer(verifier) = &credential.kind {
                let labels = by_credential(credential);
                verifier.report_to(metrics.bearer_keys_fetched.get_or_create_owned(&labels));
            }
        }
        Self {
            answers: array::from_fn(|_| array::from_fn(|_| OnceLock::new())),
            denied,
            credentials: credentials
                .iter()
                .map(by_credential)
                .map(|labels| {
                    (
                        metrics.credential_uses.get_or_create_owned(&labels),
                        metrics.credential_last_used.get_or_create_owned(&labels),
                    )
                })
                .collect(),
            repeated: metrics.repeated.get_or_create_owned(&by_connector),
            storage_failures: StorageFailure::ALL.map(|cause| {
                metrics.storage_failures.get_or_create_owned(&by_cause(cause.as_str()))
            }),
            standing_unknown: metrics.standing_unknown.get_or_create_owned(&by_connector),
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
        let place = Denied::ALL.iter().position(|it| *it == denied).expect("ALL holds every one");
        let counter = self.denied[place].get_or_init(|| {
            let connector = self.connector.clone();
            let labels = CauseLabels { connector, cause: denied.as_str() };
            self.metrics.denied.get_or_create_owned(&labels)
        });
        counter.inc();
    }

    pub(crate) fn credential_used(&self, place: usize, now: OffsetDateTime) {
        let (uses, last_used) = &self.credentials[place];
        uses.inc();
        // Read first: many calls come in one second, and a write by each would have the cores fight
        // for the line.
        let now = now.unix_timestamp();
        if last_used.get() != now {
            last_used.set(now);
        }
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

    /// The counters of rules that are put into force.
    pub(crate) fn of_rules(&self, rules: &Rules) -> RuleMetrics {
        let counters = |(rule, mode): (&str, Mode)| {
            let (connector, rule) = (self.connector.clone(), rule.to_owned());
            let failures = RuleLabels { connector: connector.clone(), rule: rule.clone() };
            let matches = ModeLabels { connector, rule, mode: mode.as_str() };
            RuleCounters {
                matches: self.metrics.rule_matches.get_or_create_owned(&matches),
                failures: self.metrics.rule_failures.get_or_create_owned(&failures),
            }
        };
        RuleMetrics(rules.modes().map(counters).collect())
    }
}

/// The counters of a connector's rules, by their places.
pub(crate) struct RuleMetrics(Vec<RuleCounters>);

struct RuleCounters {
    matches: Counter,
    failures: Counter,
}

impl RuleMetrics {
    /// Counts, and says whether this rule never held before.
    pub(crate) fn matched(&self, place: usize) -> bool {
        self.0[place].matches.inc() == 0
    }

    /// Counts, and says whether this rule never failed before.
    pub(crate) fn failed(&self, place: usize) -> bool {
        self.0[place].failures.inc() == 0
    }
}

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
