//! One event in a worker's hands: its turn, the attempt, and what becomes of it.

use std::{
    panic::AssertUnwindSafe,
    pin::pin,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use anyhow::anyhow;
use futures_util::FutureExt;
use time::OffsetDateTime;
use tokio::{
    sync::{Semaphore, SemaphorePermit},
    time::{MissedTickBehavior, interval_at, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, warn};
use vestibule_events::{Acknowledge, SignUpEvent, Undecodable};
use vestibule_store::{DeadLetter, Done, FailedAttempt, Failures, Store, StoreError};

use super::{
    Cause, HandleError, Task, Worker, WorkerSettings,
    order::Turn,
    retry::{Pace, Rest},
    text,
};
use crate::metrics::{OneWorker, WorkerMetrics};

/// What all events in the hands of a worker share.
#[derive(Debug)]
pub(super) struct Desk {
    worker: Arc<dyn Worker>,
    settings: WorkerSettings,
    store: Store,
    metrics: OneWorker,
    /// One permit for each attempt that may run.
    seats: Semaphore,
    store_pace: Mutex<Pace>,
    stop: CancellationToken,
}

/// An attempt that failed for reasons of the event or of the other side, not of our store.
struct Failure {
    source: anyhow::Error,
    cause: Cause,
    fate: Fate,
}

enum Fate {
    MayPass { after: Option<Duration> },
    Hopeless,
}

impl Desk {
    pub(super) fn new(
        worker: Arc<dyn Worker>,
        settings: WorkerSettings,
        store: Store,
        metrics: &WorkerMetrics,
        stop: CancellationToken,
    ) -> Self {
        let metrics = metrics.of(worker.name());
        let seats = Semaphore::new(settings.concurrency.clamp(1, Semaphore::MAX_PERMITS));
        Self { worker, settings, store, metrics, seats, store_pace: Mutex::default(), stop }
    }

    pub(super) fn name(&self) -> &str {
        self.worker.name()
    }

    pub(super) fn concurrency(&self) -> usize {
        self.settings.concurrency.max(1)
    }

    /// Waits for the event's turn, makes one attempt, and settles it with the log.
    pub(super) async fn deal_with(
        &self,
        task: Task,
        mut turn: Turn,
        acknowledge: &dyn Acknowledge,
    ) {
        self.in_hand(acknowledge, async {
            let Some(seat) = self.seat(&mut turn).await else {
                self.give_back(Duration::ZERO, acknowledge).await;
                return;
            };
            let now = OffsetDateTime::now_utc();
            self.metrics.began((now - task.event.time).try_into().unwrap_or_default());
            let began = Instant::now();
            let outcome = self.attempt(&task).await;
            let took = began.elapsed();
            // The next attempt need not wait until this one is noted; the same person's must.
            drop(seat);
            self.metrics.seconds.observe(took.as_secs_f64());
            self.settle(&task, now, took, outcome, acknowledge).await;
        })
        .await;
    }

    /// Bytes that are no event: no attempt can help, so they are parked as they are.
    pub(super) async fn park_undecodable(
        &self,
        sequence: u64,
        undecodable: &Undecodable,
        acknowledge: &dyn Acknowledge,
    ) {
        let letter = DeadLetter {
            worker: self.name().to_owned(),
            event_id: None,
            person: None,
            sequence,
            payload: undecodable.raw.clone(),
            cause_class: Cause::Undecodable.to_string(),
            error: undecodable.reason.clone(),
            parked_at: OffsetDateTime::now_utc(),
        };
        self.in_hand(acknowledge, self.park(&letter, acknowledge)).await;
    }

    /// Tells the log to give the event again after `delay`.
    pub(super) async fn hand_back(&self, delay: Duration, acknowledge: &dyn Acknowledge) {
        self.in_hand(acknowledge, self.give_back(delay, acknowledge)).await;
    }

    /// Keeps the log from giving the event to somebody else while it is dealt with here.
    async fn in_hand(&self, acknowledge: &dyn Acknowledge, work: impl Future<Output = ()>) {
        let every = (self.settings.ack_wait / 3).max(Duration::from_millis(10));
        let heartbeat = async {
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

    /// A seat, once the person's earlier events have been dealt with; `None` if we stop before.
    async fn seat(&self, turn: &mut Turn) -> Option<SemaphorePermit<'_>> {
        tokio::select! {
            // Biased: when all that wait are handed back at once, none may take the turn that
            // another one has just given up.
            biased;
            () = self.stop.cancelled() => None,
            seat = async { turn.comes().await; self.seats.acquire().await } => seat.ok(),
        }
    }

    /// One call of the worker, bounded in time; a panic is a failure like others.
    async fn attempt(&self, task: &Task) -> Result<(), HandleError> {
        let handling = AssertUnwindSafe(self.worker.handle(task)).catch_unwind();
        match timeout(self.settings.timeout, handling).await {
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

    async fn settle(
        &self,
        task: &Task,
        began: OffsetDateTime,
        took: Duration,
        outcome: Result<(), HandleError>,
        acknowledge: &dyn Acknowledge,
    ) {
        let failure = match outcome {
            Ok(()) => {
                self.metrics.done.inc();
                self.store_answers();
                return self.acknowledge(acknowledge).await;
            }
            Err(HandleError::StoreUnavailable(source)) => {
                self.metrics.postponed.inc();
                return self.postpone(&source, acknowledge).await;
            }
            Err(HandleError::Retry { source, cause, after }) => {
                Failure { source, cause, fate: Fate::MayPass { after } }
            }
            Err(HandleError::Park { source, cause }) => {
                Failure { source, cause, fate: Fate::Hopeless }
            }
        };
        let failed = FailedAttempt {
            worker: self.name().to_owned(),
            event_id: task.event.id,
            sequence: task.sequence,
            started_at: began,
            took,
            cause_class: failure.cause.to_string(),
            error: text::of(&failure.source),
        };
        match self.store.record_failed_attempt(&failed).await {
            Ok(failures) => {
                self.store_answers();
                self.retry_or_park(task, &failed, &failure, failures, acknowledge).await;
            }
            Err(error) => {
                self.metrics.postponed.inc();
                self.postpone(&error.into(), acknowledge).await;
            }
        }
    }

    async fn retry_or_park(
        &self,
        task: &Task,
        failed: &FailedAttempt,
        failure: &Failure,
        failures: Failures,
        acknowledge: &dyn Acknowledge,
    ) {
        let failing_for = OffsetDateTime::now_utc() - failures.first_at;
        let pause = match failure.fate {
            Fate::Hopeless => None,
            Fate::MayPass { after } => self.settings.retry.pause_after(
                failures.count,
                failing_for.try_into().unwrap_or_default(),
                after,
            ),
        };
        let SignUpEvent { id, person, .. } = &task.event;
        let Some(pause) = pause else {
            self.metrics.refused.inc();
            let letter = DeadLetter {
                worker: failed.worker.clone(),
                event_id: Some(*id),
                person: Some(person.clone()),
                sequence: task.sequence,
                payload: serde_json::to_vec(&task.event).expect("an event serialises"),
                cause_class: failed.cause_class.clone(),
                error: failed.error.clone(),
                parked_at: OffsetDateTime::now_utc(),
            };
            return self.park(&letter, acknowledge).await;
        };
        self.metrics.retried.inc();
        warn!(
            worker = failed.worker,
            event = %id,
            %person,
            attempts = failures.count,
            cause = failed.cause_class,
            error = failed.error,
            ?pause,
            "an attempt failed; the event is tried again after a pause"
        );
        self.give_back(pause, acknowledge).await;
    }

    /// First kept as a dead letter, only then taken from the log's hands: in between, it is in both.
    async fn park(&self, letter: &DeadLetter, acknowledge: &dyn Acknowledge) {
        let done = match self.store.park(letter).await {
            Ok(done) => done,
            Err(error) => return self.postpone(&error.into(), acknowledge).await,
        };
        self.store_answers();
        // Parked before means that only the acknowledgement was lost; it has been told.
        if done == Done::Now {
            self.metrics.parked.inc();
            error!(
                worker = letter.worker,
                event = letter.event_id.map(tracing::field::display),
                person = letter.person.as_ref().map(tracing::field::display),
                sequence = letter.sequence,
                cause = letter.cause_class,
                error = letter.error,
                "an event is parked as a dead letter; mend the cause, then redrive it"
            );
        }
        self.acknowledge(acknowledge).await;
    }

    /// Our own store cannot serve: the event comes back later, and this attempt does not count.
    async fn postpone(&self, source: &anyhow::Error, acknowledge: &dyn Acknowledge) {
        let Rest { pause, tell } = self.pace(|pace| pace.failed(Instant::now()));
        let error = text::of(source);
        if matches!(source.downcast_ref(), Some(StoreError::Misconfigured(_))) && tell {
            error!(worker = self.name(), error, "the store is not set up; mend it, events wait");
        } else if tell {
            warn!(worker = self.name(), error, ?pause, "the store cannot serve; events wait");
        }
        self.give_back(pause, acknowledge).await;
    }

    fn store_answers(&self) {
        self.pace(Pace::succeeded);
    }

    fn pace<T>(&self, with: impl FnOnce(&mut Pace) -> T) -> T {
        with(&mut self.store_pace.lock().unwrap_or_else(PoisonError::into_inner))
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

    async fn give_back(&self, delay: Duration, acknowledge: &dyn Acknowledge) {
        if let Err(error) = acknowledge.nack(delay).await {
            let error = text::of(&error.into());
            warn!(
                worker = self.name(),
                error, "an event could not be handed back; it comes again once the log misses us"
            );
        }
    }
}

struct Counted<'a>(&'a OneWorker);

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.in_hand.dec();
    }
}
