//! The worker runtime: consume, keep order, retry, park, drain.
//!
//! A worker takes events from the log and from what waits for it in the store. It promises that
//! every event ends in exactly one of three ways: done after the worker's effect, kept in the store
//! for a later attempt, or parked there as a dead letter; and only what is done or kept is
//! acknowledged to the log, so nothing that waits is an unacknowledged message. What cannot be begun
//! now is handed back to where it came from.
//!
//! A failing worker delays no other worker, a poisoned event no other person, however many have
//! failed. A target that is down costs a handful of tries, our own store being down none. What the
//! effect is, and that doing it twice does no harm, is the worker's part.

mod attempt;
mod breaker;
mod gate;
mod held;
mod order;
mod oversee;
mod rate;
mod retry;
mod take;
#[cfg(test)]
mod tests;
mod text;

use std::{convert::Infallible, fmt, panic::AssertUnwindSafe, sync::Arc, time::Duration};

use anyhow::Context;
use async_trait::async_trait;
use futures_util::FutureExt;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};
use vestibule_events::{ConsumerSpec, EventLog, Filter, Kind, SignUpEvent, Start};
use vestibule_store::{Store, StoreError};

use self::{attempt::Desk, oversee::Watch, take::Hands};
pub use self::{
    breaker::BreakerPolicy,
    rate::{NoRate, Rate},
    retry::RetryPolicy,
};
pub(crate) use self::{breaker::Flow, retry::Pace};
use crate::WorkerMetrics;

/// What an attempt needs after its time is up: to note the failure and tell the log.
const SETTLING: Duration = Duration::from_secs(10);

/// A worker that broke beside its events would mostly break again at once.
const AFTER_PANIC: Duration = Duration::from_secs(5);

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
    run_at(Rhythm::default(), worker, settings, log, store, metrics, stop).await
}

/// How often what goes on beside the events is looked at.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rhythm {
    /// Between two looks at the operators' word and at what is due in the store: both are changed
    /// by others, who tell nobody.
    pub(crate) poll: Duration,
    /// Between two counts of what waits.
    pub(crate) count: Duration,
    /// So long may a log be seen to give nothing of what waits.
    pub(crate) stall: Duration,
}

impl Default for Rhythm {
    fn default() -> Self {
        Self {
            poll: Duration::from_secs(1),
            count: Duration::from_secs(5),
            stall: Duration::from_secs(20),
        }
    }
}

pub(crate) async fn run_at(
    rhythm: Rhythm,
    worker: Arc<dyn Worker>,
    settings: WorkerSettings,
    log: Arc<dyn EventLog>,
    store: Store,
    metrics: WorkerMetrics,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let name = worker.name().to_owned();
    let spec = consumer_spec(&name, &settings);
    let patience = settings.timeout + SETTLING;
    // Ours to cancel, so that what waits for its turn is handed back however the run ends.
    let stop = stop.child_token();
    let (hands, watch) = (Hands::new(&settings), Watch::default());
    let desk =
        Arc::new(Desk::new(Arc::clone(&worker), settings, rhythm, store, &metrics, stop.clone()));

    let working = async {
        let from_log = async {
            let ended = take::from_log(&desk, &hands, &*log, &spec, &watch, &stop).await;
            stop.cancel();
            ended
        };
        let (ended, ()) = tokio::join!(from_log, take::from_store(&desk, &hands, &stop));
        if timeout(patience, hands.emptied(&desk)).await.is_err() {
            warn!(worker = name, "stopped before all attempts ended; their events come again");
        }
        if timeout(SETTLING, worker.close()).await.is_err() {
            warn!(worker = name, "stopped before the worker had let go of what it holds");
        }
        ended
    };
    let ended = tokio::select! {
        ended = working => ended,
        // While what is in hand is finished, too: its leases are still to be kept.
        never = oversee::oversee(&desk, &*log, &spec, &watch) => match never {},
        never = tend(&*worker, &desk, &stop) => match never {},
    };
    info!(worker = name, "worker has stopped");
    ended.with_context(|| refused(&name))
}

/// Has the worker do what it does besides handling events, until `stop` and not while it is paused.
/// A panic ends what it was at, and not the worker.
async fn tend(worker: &dyn Worker, desk: &Desk, stop: &CancellationToken) -> Infallible {
    let tending = async {
        loop {
            desk.gate.opens().await;
            let tended = AssertUnwindSafe(worker.tend()).catch_unwind();
            let pause = tokio::select! {
                tended = tended => tended.unwrap_or_else(|_panic| {
                    // What a panic says may quote an event, so it is not repeated here.
                    error!(
                        worker = worker.name(),
                        "the worker broke beside its events; that is tried again"
                    );
                    Some(AFTER_PANIC)
                }),
                () = desk.gate.shuts() => continue,
            };
            let Some(pause) = pause else { break };
            sleep(pause).await;
        }
    };
    tokio::select! {
        () = stop.cancelled() => {}
        () = tending => {}
    }
    std::future::pending().await
}

fn refused(worker: &str) -> String {
    format!(
        "worker `{worker}` cannot get its events; see that its consumer exists and that it may \
         read it, then start the worker again"
    )
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

    /// Whether all its events go to one target. If not, the worker is never left alone because a
    /// target is down: that would hold up the others.
    fn has_one_target(&self) -> bool {
        true
    }

    /// What the worker does besides handling events: asked for again after the pause that it gives,
    /// or not any more. Not while the worker is paused; dropped in the middle when it is to pause or to
    /// stop.
    async fn tend(&self) -> Option<Duration> {
        None
    }

    /// Lets go of what it holds beyond an attempt, such as a process. Called once, when its attempts
    /// have ended and no more will come; what is cut off by a harder stop, dropping it has to end.
    async fn close(&self) {}
}

/// An event to be handled.
#[derive(Clone, Debug)]
pub struct Task {
    pub event: SignUpEvent,
    /// Its place in the log.
    pub sequence: u64,
    /// Which attempt this is, from 1. Best knowledge: deliveries of the log that never led to an
    /// attempt count too, and what was sent back as a dead letter begins anew.
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
    /// The other side answers, and cannot do this yet: it has not replicated what this needs, or a
    /// mailbox is busy.
    NotYet,
    /// The other side wants no more events. With [`HandleError::Retry`] that costs no try, and the
    /// worker is paused as operators pause it: its events wait until somebody resumes it.
    Gone,
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
            Self::NotYet => "not-yet",
            Self::Gone => "gone",
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
    /// How fast attempts may begin, in this process; `None` is as fast as they can.
    pub rate: Option<Rate>,
    pub breaker: BreakerPolicy,
}

impl WorkerSettings {
    /// How often to say that an event is still in hand: two may be lost before it is missed.
    fn heartbeat(&self) -> Duration {
        (self.ack_wait / 3).max(Duration::from_millis(10))
    }
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
            rate: None,
            breaker: BreakerPolicy::default(),
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
        // What all processes of the worker have in hand. Events that wait for a retry are not
        // among them, but those are that were handed back while our store was down.
        max_in_flight: settings.concurrency.saturating_mul(8).max(1000),
    }
}
