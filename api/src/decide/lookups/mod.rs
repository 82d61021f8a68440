//! Lookups: named questions to a database or an HTTP service, answered in time or not at all.
//!
//! Whatever the source does, an answer or a failure is there within the time limit and the caller's
//! deadline. Answers are remembered: a fresh one is given without asking, a stale one where the
//! source gives none. Many calls with the same arguments make one request. A source that fails
//! again and again is left alone for a while, and never more requests than allowed are under way.
//!
//! A lookup is handed its arguments; where they come from, and what a rule does without an answer,
//! is left to its callers. Neither arguments nor answers are ever logged.

mod address;
mod answers;
mod breaker;
mod http;
mod metrics;
pub(super) mod sql;
mod template;

use std::{
    borrow::Cow,
    collections::HashMap,
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use serde_json::{Map, Value};
use tokio::{
    sync::{Semaphore, watch},
    time::{Instant, timeout_at},
};
use tracing::{info, warn};
use vestibule_events::trace::Span;

pub use self::{
    answers::CacheSettings,
    breaker::BreakerSettings,
    http::{HttpMethod, HttpSettings},
    metrics::{ListMetrics, LookupMetrics},
    sql::{DatabaseUrl, DatabaseUrlError, SqlFault},
};
use self::{
    answers::{Answer, Answers, Key},
    breaker::Breaker,
    http::Http,
    metrics::Counters,
    sql::{Limits, Sql},
};

/// What an answer says besides the source's own: whether there was anything to be found.
pub(crate) const FOUND: &str = "found";

#[derive(Clone, Debug)]
pub struct LookupSettings {
    pub name: String,
    pub source: LookupSource,
    /// How many arguments it is asked with.
    pub arguments: usize,
    pub time_limit: Duration,
    pub cache: CacheSettings,
    /// How many requests may be under way at once.
    pub concurrency: usize,
    pub breaker: BreakerSettings,
}

#[derive(Clone)]
pub enum LookupSource {
    Sql { database: DatabaseUrl, query: String },
    Http(HttpSettings),
}

impl fmt::Debug for LookupSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Sql { database, query } => write!(f, "Sql({database:?}, {query:?})"),
            Self::Http(settings) => settings.fmt(f),
        }
    }
}

/// A named question; cheap to clone.
#[derive(Clone)]
pub struct Lookup(Arc<Inner>);

/// Its name only.
impl fmt::Debug for Lookup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Lookup({})", self.0.name)
    }
}

/// An answer, and how it came.
#[derive(Clone)]
pub struct Fetched {
    /// What the source said, and under `found` whether there was anything.
    pub answer: Arc<Map<String, Value>>,
    pub from: AnswerFrom,
}

/// Leaves the answer out: it is about a person.
impl fmt::Debug for Fetched {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Fetched({})", self.from.as_str())
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AnswerFrom {
    Source,
    Cache,
    /// Remembered for longer than it is fresh, and given because the source failed.
    Stale,
}

impl AnswerFrom {
    pub const ALL: [Self; 3] = [Self::Source, Self::Cache, Self::Stale];

    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Cache => "cache",
            Self::Stale => "stale",
        }
    }
}

/// Why there is no answer. Nothing personal is in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LookupFailure {
    #[error("the source did not answer in time")]
    Late,
    #[error("the source cannot be reached or failed")]
    Unavailable,
    #[error("the source is left alone because it failed")]
    Open,
    #[error("too many requests to the source are under way")]
    Crowded,
    #[error("the source gave an answer that cannot be used")]
    BadAnswer,
    #[error("the arguments cannot be asked about")]
    BadArguments,
    #[error("the source stands in a private network, which is not allowed")]
    PrivateAddress,
}

impl LookupFailure {
    pub const ALL: [Self; 7] = [
        Self::Late,
        Self::Unavailable,
        Self::Open,
        Self::Crowded,
        Self::BadAnswer,
        Self::BadArguments,
        Self::PrivateAddress,
    ];

    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Late => "late",
            Self::Unavailable => "unavailable",
            Self::Open => "open",
            Self::Crowded => "crowded",
            Self::BadAnswer => "bad-answer",
            Self::BadArguments => "bad-arguments",
            Self::PrivateAddress => "private-address",
        }
    }
}

/// What is wrong with a lookup's settings: all of it, each with its key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LookupError {
    pub lookup: String,
    pub faults: Vec<SettingFault>,
}

/// A key of the settings, and what is wrong with its value.
pub type SettingFault = (&'static str, String);

impl std::error::Error for LookupError {}

impl fmt::Display for LookupError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the lookup `{}` cannot be used: ", self.lookup)?;
        for (number, (key, fault)) in self.faults.iter().enumerate() {
            let separator = if number == 0 { "" } else { "; " };
            write!(f, "{separator}`{key}` {fault}")?;
        }
        Ok(())
    }
}

struct Inner {
    name: String,
    arguments: usize,
    source: Source,
    time_limit: Duration,
    answers: Answers,
    places: Semaphore,
    health: Mutex<Health>,
    /// Requests under way, by what they ask.
    flights: Mutex<HashMap<Key, watch::Receiver<Option<Outcome>>>>,
    counters: Counters,
}

enum Source {
    Sql(Box<Sql>),
    Http(Box<Http>),
}

type Outcome = Result<Answer, LookupFailure>;

/// What a source has found.
struct Found {
    answer: Map<String, Value>,
    bytes: usize,
}

/// Why a source gave no answer.
#[derive(Debug)]
struct Failed {
    failure: LookupFailure,
    /// Whether that speaks against the source; if not, it was the arguments.
    is_ill: bool,
    /// For the log; nothing personal.
    cause: Cow<'static, str>,
}

impl Failed {
    fn source(failure: LookupFailure, cause: impl Into<Cow<'static, str>>) -> Self {
        Self { failure, is_ill: true, cause: cause.into() }
    }

    fn bad_answer(cause: impl Into<Cow<'static, str>>) -> Self {
        Self { failure: LookupFailure::BadAnswer, is_ill: false, cause: cause.into() }
    }

    fn arguments() -> Self {
        let cause = "the arguments do not fit the question".into();
        Self { failure: LookupFailure::BadArguments, is_ill: false, cause }
    }
}

struct Health {
    breaker: Breaker,
    last_warning: Option<Instant>,
}

/// A source that fails now and then is not worth more lines than this.
const WARNING_PAUSE: Duration = Duration::from_secs(60);

impl Lookup {
    /// Nothing is connected to before the first question.
    pub fn new(settings: LookupSettings, metrics: &LookupMetrics) -> Result<Self, LookupError> {
        let LookupSettings { name, source, arguments, time_limit, cache, concurrency, breaker } =
            settings;
        let mut faults = Vec::new();
        if time_limit.is_zero() {
            faults.push(("time_limit", "must be longer than nothing".to_owned()));
        }
        if !(1..=Self::CONCURRENCY_MAX).contains(&concurrency) {
            let fault = format!("must be from 1 to {}", Self::CONCURRENCY_MAX);
            faults.push(("concurrency", fault));
        }
        let source = match source {
            LookupSource::Sql { database, query } => {
                if query.trim().is_empty() {
                    faults.push(("query", "must not be empty".to_owned()));
                }
                let connections = u32::try_from(concurrency).unwrap_or(u32::MAX);
                let limits = Limits { connections, time: time_limit };
                Some(Source::Sql(Box::new(Sql::new(&database, &query, limits))))
            }
            LookupSource::Http(settings) => {
                if settings.arguments.len() != arguments {
                    faults.push(("arguments", "must each have one name".to_owned()));
                }
                Http::new(settings, time_limit, &mut faults).map(|it| Source::Http(Box::new(it)))
            }
        };
        let (Some(source), true) = (source, faults.is_empty()) else {
            return Err(LookupError { lookup: name, faults });
        };
        Ok(Self(Arc::new(Inner {
            counters: metrics.of(&name),
            name,
            arguments,
            source,
            time_limit,
            answers: Answers::new(cache),
            places: Semaphore::new(concurrency),
            health: Mutex::new(Health { breaker: Breaker::new(breaker), last_warning: None }),
            flights: Mutex::default(),
        })))
    }

    /// More would be a flood, and connections that a database server hardly has.
    pub const CONCURRENCY_MAX: usize = 1000;

    #[must_use]
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// Asks a database whether it takes the query with as many arguments as there will be, without
    /// running it. For start-up: a fault that is not temporary is a mistake in the configuration. An
    /// HTTP service is not asked.
    pub async fn verify(&self) -> Result<(), SqlFault> {
        match &self.0.source {
            Source::Sql(sql) => sql.verify(self.0.arguments).await,
            Source::Http(_) => Ok(()),
        }
    }

    /// A fresh answer, if one is remembered.
    #[must_use]
    pub fn peek(&self, arguments: &[Value]) -> Option<Fetched> {
        let key = self.0.answers.key(arguments)?;
        self.0.peek(&key)
    }

    /// The answer, from memory or from the source, within the time limit and before the deadline.
    ///
    /// A request goes on when its caller has given up, so that whoever asks next has the answer.
    pub async fn fetch(
        &self,
        arguments: &[Value],
        deadline: Instant,
    ) -> Result<Fetched, LookupFailure> {
        let key = self.0.answers.key(arguments).filter(|_| arguments.len() == self.0.arguments);
        let Some(key) = key else {
            let outcome = Err(LookupFailure::BadArguments);
            self.0.counters.count(&outcome);
            return outcome;
        };
        if let Some(fresh) = self.0.peek(&key) {
            return Ok(fresh);
        }
        let span = Span::part("lookup");
        span.set("vestibule.lookup", &self.0.name);
        let deadline = deadline.min(Instant::now() + self.0.time_limit);
        let mut flight = self.0.board(key, arguments);
        let landed = timeout_at(deadline, flight.wait_for(Option::is_some)).await;
        let outcome = match landed {
            Ok(Ok(outcome)) => outcome.clone().unwrap_or(Err(LookupFailure::Unavailable)),
            // It crashed, which its own place in the log tells.
            Ok(Err(_)) => Err(LookupFailure::Unavailable),
            Err(_) => Err(LookupFailure::Late),
        };
        let outcome = outcome
            .map(|answer| Fetched { answer, from: AnswerFrom::Source })
            .or_else(|failure| self.0.make_do(&key, failure));
        match &outcome {
            Ok(fetched) => span.set("vestibule.from", &fetched.from.as_str()),
            Err(failure) => span.failed(failure.as_str()),
        }
        self.0.counters.count(&outcome);
        outcome
    }
}

impl Inner {
    fn peek(&self, key: &Key) -> Option<Fetched> {
        let answer = self.answers.fresh(key, Instant::now())?;
        let outcome = Ok(Fetched { answer, from: AnswerFrom::Cache });
        self.counters.count(&outcome);
        outcome.ok()
    }

    /// What is given where the source failed.
    fn make_do(&self, key: &Key, failure: LookupFailure) -> Result<Fetched, LookupFailure> {
        let stale = match failure {
            // Asked again, the source would say the same, and be right.
            LookupFailure::BadArguments => None,
            _ => self.answers.stale(key, Instant::now()),
        };
        stale.map(|answer| Fetched { answer, from: AnswerFrom::Stale }).ok_or(failure)
    }

    /// The request that is under way for this key; one is sent off if there is none.
    fn board(self: &Arc<Self>, key: Key, arguments: &[Value]) -> watch::Receiver<Option<Outcome>> {
        let mut flights = self.flights.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(flight) = flights.get(&key) {
            return flight.clone();
        }
        let (landed, flight) = watch::channel(None);
        flights.insert(key, flight.clone());
        drop(flights);
        // Whatever happens to the task, its flight must not stay on the board.
        let board = Board { lookup: Arc::clone(self), key };
        let arguments = arguments.to_vec();
        tokio::spawn(async move {
            let outcome = board.lookup.request(board.key, &arguments).await;
            // First off the board, then the news: who boards later asks anew, or finds it cached.
            drop(board);
            let _ = landed.send(Some(outcome));
        });
        flight
    }

    async fn request(&self, key: Key, arguments: &[Value]) -> Outcome {
        if !self.health().breaker.lets_through(Instant::now()) {
            return Err(LookupFailure::Open);
        }
        let deadline = Instant::now() + self.time_limit;
        let Ok(Ok(_place)) = timeout_at(deadline, self.places.acquire()).await else {
            return Err(LookupFailure::Crowded);
        };
        // Another request may have brought it between the look into the memory and now.
        if let Some(answer) = self.answers.fresh(&key, Instant::now()) {
            return Ok(answer);
        }
        if !self.health().breaker.admit(Instant::now()) {
            return Err(LookupFailure::Open);
        }
        let start = Instant::now();
        let answered = timeout_at(deadline, self.source.ask(arguments)).await;
        self.counters.seconds.observe(start.elapsed().as_secs_f64());
        let answered = answered.unwrap_or_else(|_| {
            Err(Failed::source(LookupFailure::Late, "it did not answer in time"))
        });
        match answered {
            Ok(found) => {
                self.well();
                let is_found = found.is_some();
                let Found { mut answer, bytes } =
                    found.unwrap_or_else(|| Found { answer: Map::new(), bytes: 0 });
                answer.insert(FOUND.to_owned(), is_found.into());
                let answer = Arc::new(answer);
                self.answers.keep(key, Arc::clone(&answer), bytes, Instant::now());
                Ok(answer)
            }
            Err(failed) => {
                self.report(&failed);
                Err(failed.failure)
            }
        }
    }

    fn well(&self) {
        if self.health().breaker.succeeded() {
            self.counters.breaker_open.set(0);
            info!(lookup = self.name, "a lookup's source answers again");
        }
    }

    fn report(&self, failed: &Failed) {
        let now = Instant::now();
        let mut health = self.health();
        let mut opened = false;
        if failed.is_ill {
            opened = health.breaker.failed(now);
        } else if health.breaker.succeeded() {
            // It has seen the arguments, so it is there.
            self.counters.breaker_open.set(0);
        }
        let in_a_row = health.breaker.failures_in_a_row();
        let quiet = health.last_warning.is_some_and(|last| now < last + WARNING_PAUSE);
        if !opened && quiet {
            return;
        }
        health.last_warning = Some(now);
        drop(health);
        let (lookup, cause) = (&self.name, &failed.cause);
        if opened {
            self.counters.breaker_open.set(1);
            warn!(
                lookup,
                %cause,
                in_a_row,
                "a lookup's source failed too often and is left alone for a while; stale answers \
                 or the rules' failure policies take its place"
            );
        } else {
            warn!(
                lookup,
                %cause,
                "a lookup got no answer from its source; a stale one or the rules' failure \
                 policies take its place, and more of the kind are not told for a minute"
            );
        }
    }

    fn health(&self) -> std::sync::MutexGuard<'_, Health> {
        self.health.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A request under way takes itself off the board.
struct Board {
    lookup: Arc<Inner>,
    key: Key,
}

impl Drop for Board {
    fn drop(&mut self) {
        self.lookup.flights.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.key);
    }
}

impl Source {
    async fn ask(&self, arguments: &[Value]) -> Result<Option<Found>, Failed> {
        match self {
            Self::Http(http) => http.ask(arguments).await,
            Self::Sql(sql) => {
                let row = sql.first_row(arguments).await.map_err(from_sql)?;
                let Some(answer) = row else { return Ok(None) };
                let bytes = answer.iter().map(|(name, value)| name.len() + bytes(value)).sum();
                if bytes > HttpSettings::ANSWER_BYTES_MAX {
                    return Err(Failed::bad_answer("its answer is too large"));
                }
                Ok(Some(Found { answer, bytes }))
            }
        }
    }
}

/// About the memory that a value takes.
fn bytes(value: &Value) -> usize {
    match value {
        Value::Null | Value::Bool(_) | Value::Number(_) => 8,
        Value::String(text) => text.len(),
        Value::Array(entries) => entries.iter().map(bytes).sum(),
        Value::Object(members) => members.iter().map(|(name, it)| name.len() + bytes(it)).sum(),
    }
}

fn from_sql(fault: SqlFault) -> Failed {
    match fault {
        SqlFault::Late => Failed::source(LookupFailure::Late, fault.to_string()),
        SqlFault::Unreachable(_) | SqlFault::Query(_) | SqlFault::Failed(_) => {
            Failed::source(LookupFailure::Unavailable, fault.to_string())
        }
        SqlFault::Column { .. } => Failed::bad_answer(fault.to_string()),
        SqlFault::Placeholders { .. }
        | SqlFault::Placeholder { .. }
        | SqlFault::Argument(_)
        | SqlFault::Arguments(_) => {
            Failed { cause: fault.to_string().into(), ..Failed::arguments() }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_outcome_has_the_place_in_which_it_is_counted() {
        for (place, from) in AnswerFrom::ALL.into_iter().enumerate() {
            assert_eq!(from as usize, place);
        }
        for (place, failure) in LookupFailure::ALL.into_iter().enumerate() {
            assert_eq!(failure as usize, place);
        }
    }

    #[test]
    fn all_mistakes_of_the_settings_are_told_at_once() {
        let settings = LookupSettings {
            name: "crm".into(),
            source: LookupSource::Sql {
                database: DatabaseUrl::parse(&"sqlite:x.db".into()).unwrap(),
                query: " ".into(),
            },
            arguments: 0,
            time_limit: Duration::ZERO,
            cache: CacheSettings { fresh: Duration::ZERO, stale: Duration::ZERO, entries: 0 },
            concurrency: 0,
            breaker: BreakerSettings { failures: 0, pause: Duration::ZERO },
        };
        let error = Lookup::new(settings, &LookupMetrics::unregistered()).unwrap_err();
        let expected = "the lookup `crm` cannot be used: `time_limit` must be longer than nothing; \
                        `concurrency` must be from 1 to 1000; `query` must not be empty";
        assert_eq!(error.to_string(), expected);
    }
}
