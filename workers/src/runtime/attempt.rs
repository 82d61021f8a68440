//! One event in a worker's hands: its turn, the attempt, and what becomes of it.

use std::{
    panic::AssertUnwindSafe,
    pin::pin,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, AtomicI64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::anyhow;
use futures_util::FutureExt;
use time::OffsetDateTime;
use tokio::{
    sync::{Notify, Semaphore, SemaphorePermit},
    time::{MissedTickBehavior, interval_at, sleep_until, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::{Instrument, debug, error, info_span, warn};
use uuid::Uuid;
use vestibule_events::{Acknowledge, Person, Undecodable, trace::Span};
use vestibule_store::{
    AfterFailure, Done, Failed, FailedAttempt, FailedEvent, Failures, Retry, Standing, Store,
    StoreError,
};

use super::{
    Cause, HandleError, Rhythm, Task, Worker, WorkerSettings,
    breaker::Sign,
    gate::{Gate, Pass},
    held::{Held, Lease, Leases},
    order::Turn,
    rate::Bucket,
    retry::{Pace, Rest},
    text,
};
use crate::metrics::{OneWorker, WorkerMetrics};

/// Traces are closed some minutes after they began: an attempt later than this begins its own.
const LATE: Duration = Duration::from_secs(120);

/// What all events in the hands of a worker share.
#[derive(Debug)]
pub(super) struct Desk {
    worker: std::sync::Arc<dyn Worker>,
    pub(super) settings: WorkerSettings,
    pub(super) rhythm: Rhythm,
    pub(super) store: Store,
    pub(super) metrics: OneWorker,
    pub(super) gate: Gate,
    pub(super) leases: Leases,
    /// Something is due in the store sooner than whoever looks there expects.
    pub(super) due_sooner: Notify,
    /// Something of this worker is set aside in the store, or may be while nobody has counted, so an
    /// event may be one of those.
    pub(super) sets_aside: AtomicBool,
    /// When the event of the log happened whose handling began last, in seconds since 1970; 0
    /// before it.
    pub(super) last_begun: AtomicI64,
    /// One permit for each attempt that may run.
    seats: Semaphore,
    bucket: Option<Mutex<Bucket>>,
    store_pace: Mutex<Pace>,
    /// Whether the worker is paused is read or written, and the gate set, by one at a time: what was
    /// read before cannot undo what was written since.
    pausing: tokio::sync::Mutex<()>,
    stop: CancellationToken,
}

/// An event in hand that waits for its attempt.
#[derive(Debug)]
pub(super) struct InHand {
    pub(super) task: Task,
    pub(super) turn: Turn,
    pub(super) held: Held,
    /// The log may have given it before, so the store is asked what became of it.
    pub(super) may_be_settled: bool,
}

/// What comes of waiting for an attempt.
enum Ready<'a> {
    Go(SemaphorePermit<'a>, Pass<'a>),
    /// It is done, waits in the store or was given up: nothing is to be done with it here.
    Settled(Standing),
    NotNow,
    NobodyKnows(StoreError),
}

/// An attempt that failed for reasons of the event or of the other side, not of our store.
struct Failure {
    source: anyhow::Error,
    cause: Cause,
    fate: Fate,
}

#[derive(Clone, Copy)]
enum Fate {
    MayPass { after: Option<Duration> },
    Hopeless,
}

impl Desk {
    pub(super) fn new(
        worker: std::sync::Arc<dyn Worker>,
        settings: WorkerSettings,
        rhythm: Rhythm,
        store: Store,
        metrics: &WorkerMetrics,
        stop: CancellationToken,
    ) -> Self {
        let metrics = metrics.of(worker.name());
        let gate = Gate::new(worker.name(), settings.breaker, metrics.clone());
        let seats = Semaphore::new(settings.concurrency.clamp(1, Semaphore::MAX_PERMITS));
        let bucket = settings.rate.map(|rate| Mutex::new(Bucket::new(rate, Instant::now())));
        Self {
            worker,
            settings,
            rhythm,
            store,
            metrics,
            gate,
            leases: Leases::default(),
            due_sooner: Notify::new(),
            sets_aside: AtomicBool::new(true),
            last_begun: AtomicI64::new(0),
            seats,
            bucket,
            store_pace: Mutex::default(),
            pausing: tokio::sync::Mutex::default(),
            stop,
        }
    }

    pub(super) fn name(&self) -> &str {
        self.worker.name()
    }

    pub(super) fn has_set_aside(&self) -> bool {
        self.sets_aside.load(Ordering::Relaxed)
    }

    /// Waits for the event's turn, makes one attempt, and settles it.
    pub(super) async fn deal_with(&self, in_hand: InHand) {
        let InHand { task, mut turn, held, may_be_settled } = in_hand;
        self.in_hand(held.log(), async {
            #[cfg(feature = "mutations")]
            if std::env::var("VESTIBULE_MUTATION").as_deref() == Ok("acknowledge-before-effect") {
                self.let_go(&held).await;
            }
            let (seat, pass) = match self.ready(&task, &mut turn, may_be_settled).await {
                Ready::Go(seat, pass) => (seat, pass),
                Ready::Settled(standing) => {
                    debug!(
                        worker = self.name(),
                        event = %task.event.id,
                        person = %task.event.person,
                        ?standing,
                        "the log gave an event again that is settled"
                    );
                    return self.let_go(&held).await;
                }
                Ready::NotNow => return self.put_back(&held, Duration::ZERO).await,
                Ready::NobodyKnows(error) => return self.postpone(&held, &error.into()).await,
            };
            let now = OffsetDateTime::now_utc();
            if held.log().is_some() {
                self.metrics.began((now - task.event.time).try_into().unwrap_or_default());
                self.last_begun.store(task.event.time.unix_timestamp(), Ordering::Relaxed);
            }
            let began = Instant::now();
            let span = Span::of_attempt(self.name(), &task.event, is_late(&task, now));
            let outcome = span.within(pin!(self.attempt(&task))).await;
            if let Err(error) = &outcome {
                span.failed(word_for(error));
            }
            let took = began.elapsed();
            let counts = pass.ended(self.sign_of(&outcome));
            // The next attempt need not wait until this one is noted; the same person's must.
            drop(seat);
            self.metrics.seconds.observe(took.as_secs_f64());
            let failure = match outcome {
                Ok(()) => {
                    self.metrics.done.inc();
                    return self.done(&task, &held).await;
                }
                Err(HandleError::StoreUnavailable(source)) => {
                    self.metrics.postponed.inc();
                    return self.postpone(&held, &source).await;
                }
                Err(HandleError::Retry { source, cause: Cause::Gone, .. }) => {
                    self.metrics.postponed.inc();
                    return self.pause_worker(&held, &source).await;
                }
                Err(HandleError::Retry { source, cause, after }) => {
                    Failure { source, cause, fate: Fate::MayPass { after } }
                }
                Err(HandleError::Park { source, cause }) => {
                    Failure { source, cause, fate: Fate::Hopeless }
                }
            };
            let failed = FailedEvent {
                attempt: FailedAttempt {
                    worker: self.name().to_owned(),
                    event_id: task.event.id,
                    sequence: task.sequence,
                    started_at: now,
                    took,
                    cause_class: failure.cause.to_string(),
                    error: text::of(&failure.source),
                },
                person: task.event.person.clone(),
                payload: serde_json::to_vec(&task.event).expect("an event serialises"),
                counts,
            };
            span.within(pin!(self.set_aside(&held, &failed, failure.fate))).await;
        })
        .await;
    }

    /// Bytes in the log that are no event: no attempt can help, so they are parked as they are.
    pub(super) async fn park_undecodable(
        &self,
        sequence: u64,
        undecodable: &Undecodable,
        held: Held,
    ) {
        let now = OffsetDateTime::now_utc();
        self.in_hand(held.log(), async {
            match self.store.park_undecodable(self.name(), sequence, undecodable, now).await {
                // Parked before means that only the acknowledgement was lost; it has been told.
                Ok(Done::Before) => {}
                Ok(Done::Now) => {
                    self.parked(Cause::Undecodable.as_str(), &undecodable.reason, sequence, None);
                }
                Err(error) => return self.postpone(&held, &error.into()).await,
            }
            self.let_go(&held).await;
        })
        .await;
    }

    /// The same of what waits in the store.
    pub(super) async fn park_unreadable_retry(&self, retry: Retry, lease: Lease) {
        let failed = FailedEvent {
            attempt: FailedAttempt {
                worker: self.name().to_owned(),
                event_id: retry.event_id,
                sequence: retry.sequence,
                started_at: OffsetDateTime::now_utc(),
                took: Duration::ZERO,
                cause_class: Cause::Undecodable.to_string(),
                error: "what waits in the store is no event that this version can read".into(),
            },
            person: retry.person,
            payload: retry.payload,
            counts: true,
        };
        self.in_hand(None, self.set_aside(&Held::Store(lease), &failed, Fate::Hopeless)).await;
    }

    /// Lets whoever gave the event give it again after `delay`.
    pub(super) async fn hand_back(&self, held: Held, delay: Duration) {
        self.in_hand(held.log(), self.put_back(&held, delay)).await;
    }

    /// Keeps the log from giving the event to somebody else while it is dealt with here. For what
    /// is the store's, all leases are extended together.
    async fn in_hand(&self, log: Option<&dyn Acknowledge>, work: impl Future<Output = ()>) {
        let every = self.settings.heartbeat();
        let heartbeat = async {
            let Some(acknowledge) = log else { return std::future::pending().await };
            let mut beat = interval_at(tokio::time::Instant::now() + every, every);
            beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
            loop {
                beat.tick().await;
                if let Err(error) = acknowledge.progress().await {
                    let error = text::of(&error.into());
                    debug!(worker = self.name(), error, "the log took no heartbeat");
                }
            }
        };
        self.metrics.in_hand.inc();
        let _counted = Counted(&self.metrics);
        let mut work = pin!(work);
        tokio::select! {
            biased;
            () = &mut work => {}
            () = heartbeat => {}
        }
    }

    /// Waits until the attempt may begin: the person's earlier events have been dealt with, there is
    /// a seat, the target is not left alone, and the rate allows it.
    async fn ready(&self, task: &Task, turn: &mut Turn, may_be_settled: bool) -> Ready<'_> {
        tokio::select! {
            // Biased: when all that wait are handed back at once, none may take the turn that
            // another one has just given up.
            biased;
            () = self.stop.cancelled() => Ready::NotNow,
            () = self.gate.shuts() => Ready::NotNow,
            ready = async {
                turn.comes().await;
                if may_be_settled {
                    match self.store.standing(self.name(), task.event.id).await {
                        Ok(Standing::Open) => {}
                        Ok(settled) => return Ready::Settled(settled),
                        Err(error) => return Ready::NobodyKnows(error),
                    }
                }
                let Ok(seat) = self.seats.acquire().await else { return Ready::NotNow };
                let Some(pass) = self.gate.enter().await else { return Ready::NotNow };
                self.token().await;
                Ready::Go(seat, pass)
            } => ready,
        }
    }

    async fn token(&self) {
        let Some(bucket) = &self.bucket else { return };
        loop {
            let taken = bucket.lock().unwrap_or_else(PoisonError::into_inner).take(Instant::now());
            match taken {
                Ok(()) => return,
                Err(at) => sleep_until(at.into()).await,
            }
        }
    }

    /// One call of the worker, bounded in time; a panic is a failure like others.
    async fn attempt(&self, task: &Task) -> Result<(), HandleError> {
        let handling = self.worker.handle(task).instrument(fields(self.name(), task));
        match timeout(self.settings.timeout, AssertUnwindSafe(handling).catch_unwind()).await {
            Ok(Ok(outcome)) => outcome,
            // What a panic says may quote the event, so it is not repeated here.
            Ok(Err(_panic)) => {
                Err(HandleError::retry(Cause::Panic, anyhow!("the worker panicked")))
            }
            Err(_elapsed) => Err(HandleError::retry(
                Cause::Timeout,
                anyhow!("the attempt took longer than {:?}", self.settings.timeout),
            )),
        }
    }

    fn sign_of(&self, outcome: &Result<(), HandleError>) -> Sign {
        match outcome {
            Ok(()) => Sign::Answered,
            Err(_) if !self.worker.has_one_target() => Sign::Nothing,
            Err(HandleError::Retry { cause, after, .. }) => Sign::of(*cause, *after),
            Err(HandleError::Park { cause, .. }) => Sign::of(*cause, None),
            Err(HandleError::StoreUnavailable(_)) => Sign::Nothing,
        }
    }

    async fn done(&self, task: &Task, held: &Held) {
        self.store_answers();
        match held {
            Held::Log(acknowledge) => self.acknowledge(&**acknowledge).await,
            Held::Store(lease) => {
                let now = OffsetDateTime::now_utc();
                let Err(error) = self.store.finish_retry(self.name(), lease.event_id, now).await
                else {
                    return;
                };
                let error = text::of(&error.into());
                warn!(
                    worker = self.name(),
                    event = %task.event.id,
                    person = %task.event.person,
                    error,
                    "could not note that an event is done; it comes again and changes nothing"
                );
            }
        }
    }

    /// First kept in the store, to be tried again or as a dead letter, and only then taken from the
    /// log's hands: in between, it is in both.
    async fn set_aside(&self, held: &Held, failed: &FailedEvent, fate: Fate) {
        if let Held::Store(lease) = held {
            lease.end();
        }
        let mut tries = 0;
        let decide = |failures: Failures| {
            tries = failures.count;
            self.after_failure(failures, failed.counts, fate)
        };
        let outcome = match self.store.fail(failed, decide).await {
            Ok(outcome) => outcome,
            Err(error) => {
                self.metrics.postponed.inc();
                return self.postpone(held, &error.into()).await;
            }
        };
        let FailedEvent { attempt, person, .. } = failed;
        self.store_answers();
        self.sets_aside.store(true, Ordering::Relaxed);
        match outcome {
            Failed::Waits { due_at } => {
                self.metrics.retried.inc();
                let pause = due_at - OffsetDateTime::now_utc();
                warn!(
                    worker = self.name(),
                    event = %attempt.event_id,
                    %person,
                    tries,
                    cause = attempt.cause_class,
                    error = attempt.error,
                    pause = %pause,
                    "an attempt failed; the event is tried again after a pause"
                );
                if pause < self.rhythm.poll {
                    self.due_sooner.notify_one();
                }
            }
            Failed::Parked { .. } => {
                self.metrics.refused.inc();
                let about = Some((attempt.event_id, person));
                self.parked(&attempt.cause_class, &attempt.error, attempt.sequence, about);
            }
            Failed::Settled(standing) => {
                self.metrics.refused.inc();
                debug!(
                    worker = self.name(),
                    event = %attempt.event_id,
                    %person,
                    ?standing,
                    "an attempt failed at an event that was settled meanwhile"
                );
            }
        }
        self.let_go(held).await;
    }

    fn after_failure(&self, failures: Failures, counts: bool, fate: Fate) -> AfterFailure {
        let Fate::MayPass { after } = fate else { return AfterFailure::Park };
        let mut retry = self.settings.retry;
        if !counts {
            // What costs no try cannot have been the last one, however long its target is away.
            retry.tries = u32::MAX;
            retry.max_age = Duration::MAX;
        }
        let now = OffsetDateTime::now_utc();
        let failing_for = (now - failures.first_at).try_into().unwrap_or_default();
        let pause = retry.pause_after(failures.count.max(1), failing_for, after);
        let Some(pause) = pause else { return AfterFailure::Park };
        // Whoever probed in vain lets another event probe next: maybe it alone is what fails.
        let behind_others = self.gate.shut_for().map(|it| it + self.rhythm.poll);
        let pause = if counts { pause } else { pause.max(behind_others.unwrap_or_default()) };
        AfterFailure::Retry { due_at: now + pause }
    }

    fn parked(&self, cause: &str, error: &str, sequence: u64, about: Option<(Uuid, &Person)>) {
        self.metrics.parked.inc();
        self.sets_aside.store(true, Ordering::Relaxed);
        error!(
            worker = self.name(),
            event = about.map(|(event, _)| tracing::field::display(event)),
            person = about.map(|(_, person)| tracing::field::display(person)),
            sequence,
            cause,
            error,
            "an event is parked as a dead letter; mend the cause, then redrive it"
        );
    }

    /// Our own store cannot serve: the event comes back later, and this attempt does not count.
    async fn postpone(&self, held: &Held, source: &anyhow::Error) {
        let pause = self.rest(source);
        self.put_back(held, pause).await;
    }

    /// What the operators want.
    pub(super) async fn hear_whether_paused(&self, store: &Store) -> Result<(), StoreError> {
        let _one_at_a_time = self.pausing.lock().await;
        self.gate.set_paused(store.paused(self.name()).await?.is_some());
        Ok(())
    }

    /// The target wants no more events. Who goes on sending it some does not do as the answer says,
    /// and who parked them all would leave nothing to resume with.
    async fn pause_worker(&self, held: &Held, source: &anyhow::Error) {
        let _one_at_a_time = self.pausing.lock().await;
        let (reason, now) = (text::of(source), OffsetDateTime::now_utc());
        match self.store.pause_worker(self.name(), "vestibule", &reason, now).await {
            Ok(Done::Now) => error!(
                worker = self.name(),
                reason,
                "the worker is paused, as its target wants no more events; they wait until the \
                 worker is resumed"
            ),
            Ok(Done::Before) => {}
            Err(error) => return self.postpone(held, &error.into()).await,
        }
        self.store_answers();
        self.gate.set_paused(true);
        self.put_back(held, Duration::ZERO).await;
    }

    fn rest(&self, source: &anyhow::Error) -> Duration {
        let Rest { pause, tell } = self.pace(|pace| pace.failed(Instant::now()));
        let error = text::of(source);
        if matches!(source.downcast_ref(), Some(StoreError::Misconfigured(_))) && tell {
            error!(worker = self.name(), error, "the store is not set up; mend it, events wait");
        } else if tell {
            warn!(worker = self.name(), error, ?pause, "the store cannot serve; events wait");
        }
        pause
    }

    fn store_answers(&self) {
        self.pace(Pace::succeeded);
    }

    fn pace<T>(&self, with: impl FnOnce(&mut Pace) -> T) -> T {
        with(&mut self.store_pace.lock().unwrap_or_else(PoisonError::into_inner))
    }

    async fn put_back(&self, held: &Held, delay: Duration) {
        match held {
            Held::Log(acknowledge) => self.nack(&**acknowledge, delay).await,
            Held::Store(lease) => {
                lease.end();
                self.release(lease.event_id, delay).await;
            }
        }
    }

    /// The store knows what became of the event; the log may forget it.
    async fn let_go(&self, held: &Held) {
        if let Some(acknowledge) = held.log() {
            self.acknowledge(acknowledge).await;
        }
    }

    async fn acknowledge(&self, acknowledge: &dyn Acknowledge) {
        if let Err(error) = acknowledge.ack().await {
            let error = text::of(&error.into());
            warn!(
                worker = self.name(),
                error, "the log took no acknowledgement; the event comes again and changes nothing"
            );
        }
    }

    async fn nack(&self, acknowledge: &dyn Acknowledge, delay: Duration) {
        if let Err(error) = acknowledge.nack(delay).await {
            let error = text::of(&error.into());
            warn!(
                worker = self.name(),
                error, "an event could not be handed back; it comes again once the log misses us"
            );
        }
    }

    async fn release(&self, event_id: Uuid, delay: Duration) {
        let due_at = OffsetDateTime::now_utc() + delay;
        if let Err(error) = self.store.release_retry(self.name(), event_id, due_at).await {
            let error = text::of(&error.into());
            debug!(
                worker = self.name(),
                event = %event_id,
                error,
                "an event could not be put back; it is due once its lease is over"
            );
        }
    }
}

/// What is said within an attempt is said of these.
fn fields(worker: &str, task: &Task) -> tracing::Span {
    info_span!("attempt", worker, event = %task.event.id, person = %task.event.person)
}

/// Whether the event's trace is over for whoever collects traces.
fn is_late(task: &Task, now: OffsetDateTime) -> bool {
    task.attempt > 1 || now - task.event.time > LATE
}

fn word_for(error: &HandleError) -> &'static str {
    match error {
        HandleError::Retry { cause, .. } | HandleError::Park { cause, .. } => cause.as_str(),
        HandleError::StoreUnavailable(_) => "store",
    }
}

struct Counted<'a>(&'a OneWorker);

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.in_hand.dec();
    }
}
