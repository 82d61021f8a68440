//! The way of a sign-up, from top to bottom.
//!
//! Authenticate, read, decide, store, answer. Every answer leaves within the connector's deadline,
//! and says only what the log holds: a decision is answered once its event is durable. Where the
//! log cannot say so in time the connector's `on_storage_failure` is the answer.

use std::{
    collections::HashMap,
    fmt,
    pin::pin,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
};

use arc_swap::ArcSwap;
use axum::{
    Router,
    body::{Body, Bytes, HttpBody as _},
    extract::{Path, Request, State, rejection::PathRejection},
    http::{HeaderName, HeaderValue, header, request::Parts},
    response::Response,
    routing::any,
};
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use prometheus_client::registry::Registry;
use time::OffsetDateTime;
use tokio::{
    sync::Semaphore,
    time::{Instant, timeout_at},
};
use tracing::{debug, error, info, warn};
use uuid::Uuid;
use vestibule_events::{
    AppendError, Appended, ConnectorName, Decision, EventLog, Kind, Mode, Outcome, Person,
    Protocol, PseudonymKey, Reason, SignUp, SignUpEvent, Step,
    trace::{Span, note},
};

use crate::{
    AnswerAfter, ConnectorSettings, ContractSettings, OnStorageFailure, Problem, Sightings,
    auth::{Authenticated, Caller, Credentials, Denied},
    contract::{BodyKind, Call, Dialect, Received, Reply, Shape, Written},
    decide::{Decided, Decider, Question},
    metrics::{ConnectorMetrics, Metrics, RuleMetrics, Served, StorageFailure},
    trace,
};

/// Handles to all that answering needs; cheap to clone.
#[derive(Clone)]
pub struct Api(Arc<Inner>);

struct Inner {
    log: Arc<dyn EventLog>,
    key: Arc<PseudonymKey>,
    connectors: HashMap<String, Connector>,
    metrics: Arc<Metrics>,
    /// An append goes on when its caller has stopped waiting, so what waits needs a bound.
    appends: Arc<Semaphore>,
    /// So that a full disk is reported once and not for every call.
    storage_fails: AtomicBool,
    /// Where accounts are noted that are about to get a token; empty where nobody wants to know.
    sightings: OnceLock<Sightings>,
}

/// A connector's settings, ready to use.
struct Connector {
    settings: ConnectorSettings,
    credentials: Credentials,
    challenges: Vec<HeaderValue>,
    metrics: ConnectorMetrics,
    /// What is in force now; the settings say what it was at the start.
    deciding: ArcSwap<Deciding>,
}

struct Deciding {
    decider: Decider,
    metrics: RuleMetrics,
}

/// At some 3 KB each, so many events waiting for a disk that hangs cost 30 MB.
const APPENDS_MAX: usize = 10_000;

/// Two connectors have the same name, so one of them could never be called.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("there are two connectors with the name {0}")]
pub struct DuplicateConnector(pub ConnectorName);

impl Api {
    /// Registers its metrics, `vestibule_connector_…`, in `registry`.
    pub fn new(
        log: Arc<dyn EventLog>,
        key: Arc<PseudonymKey>,
        connectors: Vec<ConnectorSettings>,
        registry: &mut Registry,
    ) -> Result<Self, DuplicateConnector> {
        let metrics = Metrics::register(registry);
        let mut by_name = HashMap::new();
        for settings in connectors {
            let name = settings.name.clone();
            let credentials = Credentials::new(&settings.credentials);
            let counters = ConnectorMetrics::new(Arc::clone(&metrics), &settings);
            let connector = Connector {
                challenges: credentials.challenges(),
                credentials,
                deciding: ArcSwap::from_pointee(Deciding {
                    metrics: counters.of_rules(&settings.decider.rules),
                    decider: settings.decider.clone(),
                }),
                metrics: counters,
                settings,
            };
            if by_name.insert(name.as_str().to_owned(), connector).is_some() {
                return Err(DuplicateConnector(name));
            }
        }
        Ok(Self(Arc::new(Inner {
            log,
            key,
            connectors: by_name,
            metrics,
            appends: Arc::new(Semaphore::new(APPENDS_MAX)),
            storage_fails: AtomicBool::new(false),
            sightings: OnceLock::new(),
        })))
    }

    /// Has accounts noted, from now on, that are about to get a token.
    pub fn note_accounts(&self, sightings: Sightings) {
        self.0.sightings.get_or_init(|| sightings);
    }

    /// Has a connector decide by something else from now on; calls in progress go on as they began.
    /// Says whether there is such a connector.
    pub fn decide_by(&self, connector: &ConnectorName, decider: Decider) -> bool {
        let Some(connector) = self.0.connectors.get(connector.as_str()) else { return false };
        let metrics = connector.metrics.of_rules(&decider.rules);
        connector.deciding.store(Arc::new(Deciding { decider, metrics }));
        true
    }
}

impl fmt::Debug for Api {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let connectors: Vec<_> = self.0.connectors.keys().collect();
        f.debug_struct("Api").field("connectors", &connectors).finish_non_exhaustive()
    }
}

/// `/connectors/<name>/<step>`, and `/connectors/<name>` where the call says the step. What follows
/// the step, if anything, are claims.
pub fn router(api: Api) -> Router {
    Router::new()
        .route("/connectors/{connector}/{step}/{*claims}", any(step_and_claims_url))
        .route("/connectors/{connector}/{step}", any(step_url))
        .route("/connectors/{connector}", any(combined_url))
        .fallback(unknown_url)
        .with_state(api)
}

async fn step_url(
    State(api): State<Api>,
    path: Result<Path<(String, String)>, PathRejection>,
    request: Request,
) -> Response {
    let Ok(Path((connector, step))) = path else { return unknown_url(State(api)).await };
    match step_called(&step) {
        Some(step) => answer(&api.0, &connector, Some(step), request).await,
        None => unknown_url(State(api)).await,
    }
}

/// Takes the path as it came: what is escaped in a claim need not be text, and is the dialect's to
/// refuse.
async fn step_and_claims_url(State(api): State<Api>, request: Request) -> Response {
    let mut segments = request.uri().path().split('/').skip(2).map(str::to_owned);
    let (Some(connector), Some(step)) = (segments.next(), segments.next()) else {
        return unknown_url(State(api)).await;
    };
    drop(segments);
    match step_called(&step) {
        Some(step) => answer(&api.0, &connector, Some(step), request).await,
        None => unknown_url(State(api)).await,
    }
}

fn step_called(name: &str) -> Option<Step> {
    Step::ALL.into_iter().find(|known| known.as_str() == name)
}

/// What follows `/connectors/<name>/<step>/`, still escaped: a slash within a claim is not one
/// between claims.
fn after_the_step(path: &str) -> Option<&str> {
    path.splitn(5, '/').nth(4)
}

async fn combined_url(
    State(api): State<Api>,
    path: Result<Path<String>, PathRejection>,
    request: Request,
) -> Response {
    let Ok(Path(connector)) = path else { return unknown_url(State(api)).await };
    answer(&api.0, &connector, None, request).await
}

async fn unknown_url(State(api): State<Api>) -> Response {
    api.0.metrics.unknown_url.inc();
    not_found()
}

/// Takes the time, counts, and puts what was found out into HTTP.
async fn answer(api: &Inner, name: &str, url_step: Option<Step>, request: Request) -> Response {
    let arrival = Instant::now();
    let Some(connector) = api.connectors.get(name) else {
        api.metrics.unknown_url.inc();
        return not_found();
    };
    let dialect = connector.settings.dialect();
    let span = Span::of_call("sign-up", || trace::parent(request.headers()));
    let taking = pin!(take(api, connector, url_step, arrival, request));
    let (step, served, response) = match span.within(taking).await {
        Ok(Answered { shape, served, outcome, event }) => {
            let reply = match served {
                Served::WithoutStorage => Reply::without_storage(&outcome),
                _ => Reply::new(&outcome, event),
            };
            let written = dialect.write(&shape, &reply);
            connector.unsaid(shape.step(), &written);
            (Some(shape.step()), served, json(written))
        }
        Err(it) => {
            let mut response = problem(&dialect, it);
            if it == Problem::Unauthorized {
                for challenge in &connector.challenges {
                    response.headers_mut().append(header::WWW_AUTHENTICATE, challenge.clone());
                }
            }
            (url_step, Served::Problem(it), response)
        }
    };
    connector.metrics.answered(step, served, arrival.elapsed());
    span.set("vestibule.connector", &connector.settings.name);
    span.set("vestibule.step", &step.map_or("none", Step::as_str));
    span.set("vestibule.answer", &served.as_str());
    response
}

struct Answered {
    shape: Shape,
    served: Served,
    outcome: Outcome,
    /// The event that holds the outcome.
    event: Option<Uuid>,
}

/// Authenticates, reads, decides, stores.
///
/// Nothing of the body is read before the caller is known. The event holds the decision and is
/// durable before the answer leaves, so whoever hears an answer can rely on the event. Asked again
/// about the same sign-up, as platforms do after a timeout, the log hands back the event it holds
/// and the first answer is given again, even if the rules have changed since.
async fn take(
    api: &Inner,
    connector: &Connector,
    url_step: Option<Step>,
    arrival: Instant,
    request: Request,
) -> Result<Answered, Problem> {
    let (head, body) = request.into_parts();
    let settings = &connector.settings;
    let dialect = settings.dialect();
    let deadline = arrival + settings.deadline;
    // The other half is for the decision and its event.
    let body_deadline = arrival + settings.deadline / 2;

    let path = after_the_step(head.uri.path());
    dialect.expect_call(&head.method, path)?;
    let caller = connector.authenticate(&head)?;
    let kind = dialect.expect_body(&head.method, &head.headers)?;
    let body = match kind {
        BodyKind::Json | BodyKind::Form => {
            read(body, settings.body_bytes_max, body_deadline).await?
        }
        BodyKind::Nothing => Bytes::new(),
    };
    let received = Received {
        connector: &settings.name,
        url_step,
        path,
        query: head.uri.query(),
        headers: Some(&head.headers),
        kind,
        body: &body,
    };
    if kind == BodyKind::Nothing
        && received.bytes_outside_the_body(&settings.contract) > settings.body_bytes_max
    {
        return Err(Problem::BodyTooLarge);
    }
    let Call { sign_up, contradicts_url, shape, tenant, extension } = dialect.read(&received)?;
    connector.expect_origin(&caller, tenant.as_deref(), extension.as_deref())?;
    if contradicts_url {
        connector.step_contradicted(sign_up.step);
    }

    let person = api.key.person(&sign_up);
    // What is left of the time is for the event.
    let decision_deadline = arrival + settings.deadline * 3 / 4;
    note("vestibule.person", &person);
    let decision = {
        let deciding = pin!(connector.decide(&sign_up, &person, decision_deadline));
        Span::part("decide").within(deciding).await
    };
    if Kind::of(sign_up.step, &decision.outcome).is_none() {
        // Called at every sign-in: there is nothing to tell anybody, and so nothing to wait for. That
        // there is an account is noted beside the call.
        if let (Some(sightings), Some(object_id)) = (api.sightings.get(), &sign_up.object_id) {
            sightings.saw(&settings.name, &person, object_id);
        }
        let outcome = decision.outcome;
        return Ok(Answered { shape, served: Served::from(&outcome), outcome, event: None });
    }

    let unless_stored = connector.unless_stored(&decision.outcome);
    let traceparent = trace::of_event(&head.headers);
    let event = event(&api.key, person, sign_up, decision, traceparent);
    Ok(match store(api, connector, event, deadline).await {
        Ok(event) => {
            if let (Some(sightings), Kind::Accepted) = (api.sightings.get(), event.kind) {
                sightings.forget(&settings.name, &event.person);
            }
            let outcome = event.decision.outcome;
            Answered { shape, served: Served::from(&outcome), outcome, event: Some(event.id) }
        }
        Err(failure) => {
            connector.metrics.storage_failed(failure);
            let (served, outcome) = unless_stored;
            Answered { shape, served, outcome, event: None }
        }
    })
}

fn event(
    key: &PseudonymKey,
    person: Person,
    sign_up: SignUp,
    decision: Decision,
    traceparent: Option<String>,
) -> SignUpEvent {
    let fingerprint = key.fingerprint(&sign_up, &person);
    let now = OffsetDateTime::now_utc();
    let event = SignUpEvent::decided(Uuid::now_v7(), now, person, fingerprint, sign_up, decision)
        .expect("the caller made sure that this step makes events");
    SignUpEvent { traceparent, ..event }
}

/// Stores the event and hands back the one to answer from: itself or, for a repeated call, the
/// first one.
async fn store(
    api: &Inner,
    connector: &Connector,
    event: SignUpEvent,
    deadline: Instant,
) -> Result<SignUpEvent, StorageFailure> {
    let appended = append(api, event, deadline).await;
    let appended = match (appended, &connector.settings.answer_after) {
        (Ok(appended), AnswerAfter::Stream(stream)) => {
            timeout_at(deadline, stream.durable(appended.stored.sequence))
                .await
                .map(|()| appended)
                .map_err(|_| StorageFailure::StreamLate)
        }
        (appended, _) => appended,
    };
    api.report_storage(appended.as_ref().err().copied());
    let Appended { stored, duplicate } = appended?;
    if duplicate {
        connector.metrics.repeated.inc();
    }
    let event = stored.event;
    note("vestibule.event", &event.id);
    debug!(
        event = %event.id,
        person = %event.person,
        connector = %event.sign_up.connector,
        step = %event.sign_up.step,
        decision = event.decision.outcome.as_str(),
        repeated = duplicate,
        "answering a sign-up"
    );
    Ok(event)
}

/// Appends on a task of its own: a platform that hangs up, or a deadline, ends the waiting for an
/// append and never the append itself.
async fn append(
    api: &Inner,
    event: SignUpEvent,
    deadline: Instant,
) -> Result<Appended, StorageFailure> {
    let permit =
        Arc::clone(&api.appends).try_acquire_owned().map_err(|_| StorageFailure::Crowded)?;
    let log = Arc::clone(&api.log);
    #[cfg(feature = "mutations")]
    if std::env::var("VESTIBULE_MUTATION").as_deref() == Ok("answer-before-append") {
        let stored = vestibule_events::Stored { sequence: 0, event: event.clone() };
        tokio::spawn(async move { log.append(event).await });
        return Ok(Appended { stored, duplicate: false });
    }
    let (id, person) = (event.id, event.person.clone());
    let span = Span::part("append");
    span.set("vestibule.event", &id);
    let append = tokio::spawn(async move {
        let appended = span.within(pin!(log.append(event))).await;
        if appended.is_err() {
            span.failed("not stored");
        }
        drop(permit);
        appended
    });
    match timeout_at(deadline, append).await {
        Ok(Ok(Ok(appended))) => Ok(appended),
        Ok(Ok(Err(error))) => {
            let failure = match error {
                AppendError::NotStored(_) => StorageFailure::NotStored,
                AppendError::Unknown(_) => StorageFailure::Unknown,
            };
            // Why, for the first ones; while it lasts only the counter moves.
            if !api.storage_fails.load(Ordering::Relaxed) {
                let error: &dyn std::error::Error = &error;
                warn!(event = %id, %person, error, "could not store an event");
            }
            Err(failure)
        }
        Ok(Err(_panicked)) => Err(StorageFailure::Unknown),
        Err(_elapsed) => Err(StorageFailure::Late),
    }
}

impl Inner {
    /// Tells the log of the process when storing begins to fail, and when it works again.
    fn report_storage(&self, failure: Option<StorageFailure>) {
        match failure {
            Some(failure) => {
                if !self.storage_fails.swap(true, Ordering::Relaxed) {
                    error!(
                        cause = failure.as_str(),
                        "events cannot be stored in time; sign-ups get the answer that \
                         on_storage_failure names"
                    );
                }
            }
            // Read first: a write by every call would have the cores fight for the line.
            None => {
                if self.storage_fails.load(Ordering::Relaxed)
                    && self.storage_fails.swap(false, Ordering::Relaxed)
                {
                    info!("events can be stored again");
                }
            }
        }
    }
}

impl Connector {
    fn authenticate(&self, head: &Parts) -> Result<Authenticated, Problem> {
        let caller = Caller {
            headers: &head.headers,
            connection: head.extensions.get(),
            now: OffsetDateTime::now_utc(),
        };
        match self.credentials.authenticate(&caller) {
            Ok(authenticated) => {
                self.metrics.credential_used(authenticated.place, caller.now);
                Ok(authenticated)
            }
            Err(denied) => {
                self.metrics.denied(denied);
                Err(Problem::Unauthorized)
            }
        }
    }

    /// A token of one tenant does not speak for another, and where tenants or extensions are
    /// named, only they may call (contract 5.6).
    fn expect_origin(
        &self,
        caller: &Authenticated,
        tenant: Option<&str>,
        extension: Option<&str>,
    ) -> Result<(), Problem> {
        let named = |allowed: &[String], given: Option<&str>| {
            allowed.is_empty()
                || given.is_some_and(|it| allowed.iter().any(|one| one.eq_ignore_ascii_case(it)))
        };
        let same = match (&caller.tenant, tenant) {
            (Some(of_token), Some(of_call)) => of_token.eq_ignore_ascii_case(of_call),
            _ => true,
        };
        let ConnectorSettings { tenants, extensions, .. } = &self.settings;
        if same && named(tenants, tenant) && named(extensions, extension) {
            return Ok(());
        }
        self.metrics.denied(Denied::Origin);
        Err(Problem::Unauthorized)
    }

    async fn decide(&self, sign_up: &SignUp, person: &Person, deadline: Instant) -> Decision {
        let deciding = self.deciding.load_full();
        let question = Question { sign_up, person, deadline, now: None };
        let Decided { decision, places, standing_unknown } =
            deciding.decider.decided(question).await;
        for (place, reason) in places.into_iter().zip(&decision.reasons) {
            self.count(&deciding.metrics, place, reason);
        }
        if standing_unknown && self.metrics.standing_unknown.inc() == 0 {
            warn!(
                connector = %self.settings.name,
                "could not learn in time whether somebody was approved or denied before; they are \
                 asked to wait for an approval, and from now on this is only counted"
            );
        }
        decision
    }

    fn count(&self, rules: &RuleMetrics, place: usize, reason: &Reason) {
        let Some(cause) = &reason.failure else {
            if rules.matched(place) && reason.mode == Mode::Warn {
                warn!(
                    connector = %self.settings.name,
                    rule = reason.rule,
                    would = reason.effect.as_str(),
                    "a rule in warn mode holds; from now on this is only counted"
                );
            }
            return;
        };
        if rules.failed(place) {
            warn!(
                connector = %self.settings.name,
                rule = reason.rule,
                cause,
                "a rule could not be evaluated and its on_error was applied; from now on this is \
                 only counted"
            );
        }
    }

    fn step_contradicted(&self, step: Step) {
        if self.metrics.step_contradictions.inc() == 0 {
            warn!(
                connector = %self.settings.name,
                %step,
                "a call to the URL of one step names another; this one holds, and from now on \
                 this is only counted"
            );
        }
    }

    fn unsaid(&self, step: Step, written: &Written) {
        if written.unsaid.claims > 0
            && self.metrics.claims_unsaid(written.unsaid.claims as u64) == 0
        {
            warn!(
                connector = %self.settings.name,
                %step,
                claims = written.unsaid.claims,
                "claims that rules set cannot be said in this dialect, or not with the type that \
                 the platform wants; they are left out, and from now on this is only counted"
            );
        }
        if written.unsaid.refusal && self.metrics.refusals_unsaid.inc() == 0 {
            warn!(
                connector = %self.settings.name,
                %step,
                "a rule refuses at a step where this dialect cannot turn anybody away; the person \
                 goes on, and from now on this is only counted"
            );
        }
    }

    /// What is answered if the log fails us; the event takes the decision itself with it.
    fn unless_stored(&self, decided: &Outcome) -> (Served, Outcome) {
        match &self.settings.on_storage_failure {
            OnStorageFailure::Refuse { message } => {
                (Served::WithoutStorage, Outcome::Block { message: message.clone() })
            }
            OnStorageFailure::LetThrough => (Served::LetThrough, decided.clone()),
        }
    }
}

async fn read(mut body: Body, bytes_max: usize, deadline: Instant) -> Result<Bytes, Problem> {
    // Where the length is announced there is no need to read first.
    if body.size_hint().lower() > bytes_max as u64 {
        discard(body, deadline).await;
        return Err(Problem::BodyTooLarge);
    }
    match timeout_at(deadline, Limited::new(&mut body, bytes_max).collect()).await {
        Ok(Ok(body)) => Ok(body.to_bytes()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => {
            discard(body, deadline).await;
            Err(Problem::BodyTooLarge)
        }
        Ok(Err(_)) => Err(Problem::BodyUnreadable),
        Err(_elapsed) => Err(Problem::BodyTooSlow),
    }
}

/// Lets a caller finish who is a little over the limit: to close on one who is still sending means
/// a reset, and the answer that says what is wrong is lost with it.
async fn discard(body: Body, deadline: Instant) {
    const BYTES_MAX: usize = 1024 * 1024;
    let mut body = Limited::new(body, BYTES_MAX);
    let _ = timeout_at(deadline, async { while let Some(Ok(_)) = body.frame().await {} }).await;
}

/// What a call gets that never became a sign-up, with the headers that go with it.
fn problem(dialect: &Dialect<'_>, problem: Problem) -> Response {
    let mut response = json(dialect.write_problem(problem));
    let header: Option<(HeaderName, &'static str)> = match problem {
        Problem::MethodNotAllowed => Some((header::ALLOW, dialect.allowed_methods())),
        // What is left of the body would be taken for the next call.
        Problem::BodyTooSlow | Problem::BodyTooLarge => Some((header::CONNECTION, "close")),
        _ => None,
    };
    if let Some((name, value)) = header {
        response.headers_mut().insert(name, HeaderValue::from_static(value));
    }
    response
}

/// To whoever calls nothing of ours, in the words of the oldest dialect.
fn not_found() -> Response {
    let dialect = Dialect {
        protocol: Protocol::ApiConnector,
        version: ConnectorSettings::VERSION,
        settings: &ContractSettings::default(),
    };
    problem(&dialect, Problem::NotFound)
}

fn json(written: Written) -> Response {
    let mut response = Response::new(Body::from(written.body));
    *response.status_mut() = written.status;
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}
