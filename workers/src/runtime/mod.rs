//! The worker runtime: consume, keep order, retry, park, drain.
//!
//! It promises that every event the consumer hands out ends in exactly one of three ways:
//! acknowledged after the worker's effect, handed back for later, or parked as a dead letter and
//! only then acknowledged. A failing worker delays no other worker, a poisoned event no other
//! person, and our own store being down costs an event no tries. What the effect is, and that
//! doing it twice does no harm, is the worker's part.

mod order;
mod retry;

use std::{fmt, sync::Arc, time::Duration};

use async_trait::async_trait;
use vestibule_events::{ConsumerSpec, Filter, Kind, SignUpEvent, Start};

pub use self::retry::RetryPolicy;

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
    /// Our own store is down. That says nothing about the event, so it costs no try.
    #[error("the store does not answer for now")]
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

/// What kind of failure it was; dead letters are grouped by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Cause {
    /// The other side could not be reached or said that it cannot serve now.
    Unavailable,
    /// No answer in time.
    Timeout,
    /// The other side asked us to slow down.
    Throttled,
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
