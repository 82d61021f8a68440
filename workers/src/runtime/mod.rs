//! The worker runtime: consume, keep order, retry, park, drain.
//!
//! It promises that every event the consumer hands out ends in exactly one of three ways:
//! acknowledged after the worker's effect, handed back for later, or parked as a dead letter and
//! only then acknowledged. A failing worker delays no other worker, a poisoned event no other
//! person, and our own store being down costs an event no tries. What the effect is, and that
//! doing it twice does no harm, is the worker's part.

mod attempt;
mod order;
mod retry;
#[cfg(test)]
mod tests;
mod text;

use std::{fmt, sync::Arc, time::Duration};

use anyhow::Context;
use async_trait::async_trait;
use tokio::{
    task::JoinSet,
    time::{Instant, sleep, sleep_until, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};
use vestibule_events::{
    Consumer, ConsumerSpec, Delivery, EventLog, Filter, Kind, LogError, SignUpEvent, Start,
};
use vestibule_store::{Store, StoreError};

pub use self::retry::RetryPolicy;
use self::{
    attempt::Desk,
    order::Order,
    retry::{Pace, Rest},
};
use crate::WorkerMetrics;

/// Per attempt that may run there are so many events in hand: those that wait for their turn
/// behind an event of the same person must not keep the others from running.
const IN_HAND_PER_ATTEMPT: usize = 4;

/// One person may have so much of what is in hand, as a share.
const ONE_PERSON: usize = 4;

/// When more events of one person come than may wait, they come back after this.
const CROWDED: Duration = Duration::from_secs(1);

/// What an attempt needs after its time is up: to note the failure and tell the log.
const SETTLING: Duration = Duration::from_secs(10);

/// Runs a worker until `stop`, then finishes what is being handled and hands the rest back.
///
/// Ends with an error only if the log refuses the worker its events: a lost connection is waited
/// out.
pub async fn run(
    worker: Arc<dyn Worker>,
    settings: WorkerSettings,
    log: Arc<dyn EventLog>,
    store: Store,
    metrics: WorkerMetrics,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let name = worker.name().to_owned();
    // Ours to cancel, so that what waits for its turn is handed back however the run ends.
    let stop = stop.child_token();
    let opened = open(&*log, &consumer_spec(&name, &settings), &stop).await;
    let Some(mut consumer) = opened.with_context(|| refused(&name))? else {
        return Ok(());
    };
    info!(worker = name, "worker takes events");

    let patience = settings.timeout + SETTLING;
    let desk = Arc::new(Desk::new(worker, settings, store, &metrics, stop.clone()));
    let mut in_hand = JoinSet::new();
    let ended = take(&desk, &mut *consumer, &mut in_hand, &stop).await;

    stop.cancel();
    let finished = timeout(patience, async { while in_hand.join_next().await.is_some() {} }).await;
    if finished.is_err() {
        warn!(
            worker = name,
            events = in_hand.len(),
            "stopped before all attempts ended; the log will give their events again"
        );
        in_hand.shutdown().await;
    }
    info!(worker = name, "worker has stopped");
    ended.with_context(|| refused(&name))
}

fn refused(worker: &str) -> String {
    format!(
        "worker `{worker}` cannot get its events; see that its consumer exists and that it may \
         read it, then start the worker again"
    )
}

/// Opens the consumer, however long that takes. `None` if stopped meanwhile.
async fn open(
    log: &dyn EventLog,
    spec: &ConsumerSpec,
    stop: &CancellationToken,
) -> Result<Option<Box<dyn Consumer>>, LogError> {
    let mut pace = Pace::default();
    let opening = async {
        loop {
            match log.consumer(spec.clone()).await {
                Err(LogError::Unavailable(source)) => {
                    let Rest { pause, tell } = pace.failed(std::time::Instant::now());
                    let error = text::of(&source);
                    if tell {
                        warn!(
                            worker = spec.name,
                            error,
                            ?pause,
                            "cannot open the consumer; trying again"
                        );
                    }
                    sleep(pause).await;
                }
                other => return other,
            }
        }
    };
    tokio::select! {
        biased;
        () = stop.cancelled() => Ok(None),
        opened = opening => opened.map(Some),
    }
}

/// Takes events and sets a task on each, until stopped or refused.
async fn take(
    desk: &Arc<Desk>,
    consumer: &mut dyn Consumer,
    in_hand: &mut JoinSet<()>,
    stop: &CancellationToken,
) -> Result<(), LogError> {
    let most = desk.concurrency().saturating_mul(IN_HAND_PER_ATTEMPT);
    let order = Order::new((most / ONE_PERSON).max(1));
    let mut pace = Pace::default();
    let mut rest_until = Instant::now();
    loop {
        while let Some(ended) = in_hand.try_join_next() {
            complain_if_broken(desk, ended);
        }
        tokio::select! {
                    biased;
                    () = stop.cancelled() => return Ok(()),
                    Some(ended) = in_hand.join_next(), if in_hand.len() >= most => {
                        complain_if_broken(desk, ended);
                    }
                    delivery = async { sleep_until(rest_until).await; consumer.next().await },
                        if in_hand.len() < most => match delivery
                    {
                        Ok(delivery) => {
                            pace.succeeded();
                            begin(desk, &order, in_hand, delivery);
                        }
                        Err(LogError::Unavailable(source)) => {
                            // The consumer restores itself; this only keeps us from spinning if it does
                            // not wait.
                            let Rest { pause, tell } = pace.failed(std::time::Instant::now());
                            rest_until = Instant::now() + pause;
                            let error = text::of(&source);
                            if tell {
                            warn!(worker = desk.name(), error, ?pause, "the log gives no events; trying again");
        }
                        }
                        Err(refused @ LogError::Refused(_)) => return Err(refused),
                    }
                }
    }
}

fn begin(desk: &Arc<Desk>, order: &Order, in_hand: &mut JoinSet<()>, delivery: Delivery) {
    let desk = desk.clone();
    let Delivery { sequence, deliveries, event, acknowledge } = delivery;
    match event {
        Err(undecodable) => {
            in_hand.spawn(async move {
                desk.park_undecodable(sequence, &undecodable, &*acknowledge).await;
            });
        }
        Ok(event) => match order.enter(&event.person) {
            Some(turn) => {
                let attempt = u32::try_from(deliveries.max(1)).unwrap_or(u32::MAX);
                let task = Task { event, sequence, attempt };
                in_hand.spawn(async move { desk.deal_with(task, turn, &*acknowledge).await });
            }
            None => {
                in_hand.spawn(async move { desk.hand_back(CROWDED, &*acknowledge).await });
            }
        },
    }
}

fn complain_if_broken(desk: &Desk, ended: Result<(), tokio::task::JoinError>) {
    if let Err(broken) = ended
        && broken.is_panic()
    {
        error!(worker = desk.name(), "the runtime broke at an event; the log will give it again");
    }
}

/// A named consumer with an effect.
///
/// Delivery is at least once: `handle` may run again with an event it has already dealt with, and
/// must do no harm when it does.
#[async_trait]
pub trait Worker: fmt::Debug + Send + Sync + 'static {
    /// Names the durable consumer. Renaming it reads the whole log again.
    fn name(&self) -> &str;

    /// One attempt at one event. Dropped when the attempt takes too long.
    async fn handle(&self, task: &Task) -> Result<(), HandleError>;
}

/// An event to be handled.
#[derive(Clone, Debug)]
pub struct Task {
    pub event: SignUpEvent,
    /// Its place in the log.
    pub sequence: u64,
    /// Which attempt this is, from 1. Best knowledge: after a restart, deliveries that never led
    /// to an attempt count too.
    pub attempt: u32,
}

/// Why an event was not handled, and so what becomes of it.
///
/// The text of `source` is kept and logged: it must hold no personal data.
#[derive(Debug, thiserror::Error)]
pub enum HandleError {
    /// The same event may go through later.
    #[error("handling failed for now ({cause})")]
    Retry {
        source: anyhow::Error,
        cause: Cause,
        /// The other side asked for this pause. Honoured within bounds.
        after: Option<Duration>,
    },
    /// No number of attempts will help, so the event is set aside.
    #[error("handling failed for good ({cause})")]
    Park { source: anyhow::Error, cause: Cause },
    /// Our own store cannot serve. That says nothing about the event, so it costs no try.
    #[error("the store cannot serve for now")]
    StoreUnavailable(#[source] anyhow::Error),
}

impl HandleError {
    pub fn retry(cause: Cause, source: impl Into<anyhow::Error>) -> Self {
        Self::Retry { source: source.into(), cause, after: None }
    }

    pub fn park(cause: Cause, source: impl Into<anyhow::Error>) -> Self {
        Self::Park { source: source.into(), cause }
    }
}

/// A store that is down or not set up says nothing about the event; one that refuses it does.
impl From<StoreError> for HandleError {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Unavailable(_) | StoreError::Misconfigured(_) => {
                Self::StoreUnavailable(error.into())
            }
            StoreError::Refused(_) => Self::park(Cause::Refused, error),
        }
    }
}

/// What kind of failure it was; dead letters are grouped by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Cause {
    /// The other side could not be reached or said that it cannot serve now.
    Unavailable,
    /// No answer in time.
    Timeout,
    /// The other side asked us to slow down.
    Throttled,
    /// The other side does not let us in, or does not permit what we ask: somebody must mend the
    /// set-up, and no event is to blame.
    NotPermitted,
    /// The other side, or the store, refuses this event.
    Refused,
    /// There is no usable address to send to.
    InvalidRecipient,
    /// A template failed with this event.
    InvalidTemplate,
    /// A rule failed with this event.
    InvalidRule,
    /// The bytes in the log are no event that this version can read.
    Undecodable,
    /// The worker itself broke.
    Panic,
}

impl Cause {
    /// The name in the store, in metrics and on the command line.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Unavailable => "unavailable",
            Self::Timeout => "timeout",
            Self::Throttled => "throttled",
            Self::NotPermitted => "not-permitted",
            Self::Refused => "refused",
            Self::InvalidRecipient => "invalid-recipient",
            Self::InvalidTemplate => "invalid-template",
            Self::InvalidRule => "invalid-rule",
            Self::Undecodable => "undecodable",
            Self::Panic => "panic",
        }
    }
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// How a worker goes about its work.
#[derive(Clone, Debug)]
pub struct WorkerSettings {
    pub filter: Filter,
    /// Where a new worker begins; one that is known goes on where it was.
    pub start: Start,
    /// At most so many attempts at a time.
    pub concurrency: usize,
    /// How soon the log gives an event to somebody else once we fall silent.
    pub ack_wait: Duration,
    /// The longest that one attempt may take.
    pub timeout: Duration,
    pub retry: RetryPolicy,
}

impl Default for WorkerSettings {
    /// Every accepted sign-up, from the beginning of the log.
    fn default() -> Self {
        Self {
            filter: Filter { kinds: vec![Kind::Accepted], connectors: vec![] },
            start: Start::Beginning,
            concurrency: 16,
            ack_wait: Duration::from_secs(30),
            timeout: Duration::from_secs(20),
            retry: RetryPolicy::default(),
        }
    }
}

/// The durable consumer of a worker.
#[must_use]
pub fn consumer_spec(name: &str, settings: &WorkerSettings) -> ConsumerSpec {
    ConsumerSpec {
        name: name.to_owned(),
        start: settings.start,
        filter: settings.filter.clone(),
        ack_wait: settings.ack_wait,
        // Events that wait for a retry count too. A thousand of them leave room for those behind,
        // and bound what a provider's outage can keep open in the log.
        max_in_flight: settings.concurrency.saturating_mul(8).max(1000),
    }
}
