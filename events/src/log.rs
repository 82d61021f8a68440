//! The log that carries events, and what a consumer of it is.

use std::{fmt, time::Duration};

use anyhow::Context;
use async_trait::async_trait;
use futures_util::stream::BoxStream;
use time::OffsetDateTime;

use crate::{ConnectorName, Kind, Person, SignUpEvent};

/// An append-only, ordered log of events with durable named consumers.
///
/// There are two: the local log (SQLite, beside a connector) and the stream (NATS JetStream). One
/// suite of tests runs against both.
#[async_trait]
pub trait EventLog: fmt::Debug + Send + Sync + 'static {
    /// Stores an event and returns once it is durable.
    ///
    /// Where the log holds an event with the same fingerprint that is younger than the duplicate
    /// window (of that event: a refusal has a shorter one), nothing is stored and the held event is
    /// handed back: the call was repeated, and its first answer must be given again.
    async fn append(&self, event: SignUpEvent) -> Result<Appended, AppendError> {
        let written = WrittenEvent::new(event)
            .context("could not write the event as JSON")
            .map_err(AppendError::NotStored)?;
        self.append_written(written).await
    }

    /// The same for an event that was written before, perhaps by another version: it is stored as it
    /// was written.
    async fn append_written(&self, event: WrittenEvent) -> Result<Appended, AppendError>;

    /// Opens a durable consumer, and creates it where it does not exist yet.
    ///
    /// `spec.start` counts only at its creation; an existing consumer goes on where it was. Filter
    /// and limits are those of `spec` from now on.
    async fn consumer(&self, spec: ConsumerSpec) -> Result<Box<dyn Consumer>, LogError>;

    /// Past events in order; acknowledges nothing and moves no consumer.
    async fn replay(
        &self,
        replay: Replay,
    ) -> Result<BoxStream<'static, Result<Stored, LogError>>, LogError>;

    /// How far a durable consumer is, or `None` where there is none of that name.
    async fn backlog(&self, consumer: &str) -> Result<Option<Backlog>, LogError>;

    /// Where the first event stands, or later, that a durable consumer has not done: everything
    /// before it is done or does not concern it. `None` where there is none of that name, and from a
    /// log that does not know.
    async fn first_undone(&self, _consumer: &str) -> Result<Option<u64>, LogError> {
        Ok(None)
    }
}

/// An event and its place in its log.
#[derive(Clone, Debug, PartialEq)]
pub struct Stored {
    /// From 1, rising, with gaps where events were trimmed.
    pub sequence: u64,
    pub event: SignUpEvent,
}

/// An event and its JSON, which may say more than this version reads.
#[derive(Clone)]
pub struct WrittenEvent {
    pub(crate) event: SignUpEvent,
    pub(crate) json: Vec<u8>,
}

/// Leaves the content out: it is personal data.
impl fmt::Debug for WrittenEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "WrittenEvent({:?})", self.event)
    }
}

impl WrittenEvent {
    fn new(event: SignUpEvent) -> serde_json::Result<Self> {
        let json = serde_json::to_vec(&event)?;
        Ok(Self { event, json })
    }

    /// Reads an event as it was written.
    pub fn read(json: Vec<u8>) -> Result<Self, Undecodable> {
        // What is passed over while it is read need not be text, but a log takes nothing else.
        if std::str::from_utf8(&json).is_err() {
            return Err(Undecodable { raw: json, reason: "not UTF-8".to_owned() });
        }
        let event = Undecodable::decode(&json)?;
        Ok(Self { event, json })
    }

    #[must_use]
    pub const fn event(&self) -> &SignUpEvent {
        &self.event
    }
}

/// What became of an append.
#[derive(Clone, Debug, PartialEq)]
pub struct Appended {
    /// The appended event, or the one the log holds already.
    pub stored: Stored,
    /// The call was a repetition: `stored` is the event of the first one.
    pub duplicate: bool,
}

/// Why an append failed, and so whether the event may be in the log.
#[derive(Debug, thiserror::Error)]
pub enum AppendError {
    /// Certainly not stored.
    #[error("could not append to the log")]
    NotStored(#[source] anyhow::Error),
    /// Nobody can tell. Appending the same event again is safe: it is stored once.
    #[error("could not learn whether the log holds the event")]
    Unknown(#[source] anyhow::Error),
}

/// Why a log could not be read, or a consumer opened or moved.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// A lost connection, a lock, a restart: the same may go through later.
    #[error("the log does not answer for now")]
    Unavailable(#[source] anyhow::Error),
    /// Trying again will not help: configuration, permissions, a damaged file.
    #[error("the log refuses")]
    Refused(#[source] anyhow::Error),
}

/// What a durable consumer is to be.
#[derive(Clone, Debug)]
pub struct ConsumerSpec {
    /// Lower-case letters, digits, hyphens and underscores. Another name is another consumer.
    pub name: String,
    pub start: Start,
    pub filter: Filter,
    /// An event neither acknowledged nor reported in progress for so long is delivered again.
    pub ack_wait: Duration,
    /// At most so many delivered and unacknowledged, delayed ones included.
    pub max_in_flight: usize,
}

/// Where in the log to begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    Beginning,
    /// Only what is appended from now on.
    Now,
    /// The first event stored at or after this time.
    Time(OffsetDateTime),
    /// This sequence, or the first after it.
    Sequence(u64),
}

/// Which events; an empty list means all.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Filter {
    pub kinds: Vec<Kind>,
    pub connectors: Vec<ConnectorName>,
}

impl Filter {
    #[must_use]
    pub fn matches(&self, event: &SignUpEvent) -> bool {
        (self.kinds.is_empty() || self.kinds.contains(&event.kind))
            && (self.connectors.is_empty() || self.connectors.contains(&event.sign_up.connector))
    }
}

/// Which past events to read.
#[derive(Clone, Debug)]
pub struct Replay {
    pub start: Start,
    /// Exclusive.
    pub until: Option<OffsetDateTime>,
    pub filter: Filter,
    pub person: Option<Person>,
    /// Goes on with what is appended later, until dropped; otherwise ends with the last event that
    /// the log held at the start.
    pub follow: bool,
}

/// How far a durable consumer is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backlog {
    /// Not delivered yet.
    pub waiting: u64,
    /// Delivered and not acknowledged, delayed ones included.
    pub in_flight: u64,
}

impl Backlog {
    /// Everything is acknowledged.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.waiting == 0 && self.in_flight == 0
    }
}

/// A durable consumer, opened.
#[async_trait]
pub trait Consumer: fmt::Debug + Send {
    /// The next event that is due, waiting for one if need be; at most `max_in_flight` at a time.
    ///
    /// Dropping the future loses nothing. After [`LogError::Unavailable`] call again: the consumer
    /// restores itself and paces its own attempts.
    async fn next(&mut self) -> Result<Delivery, LogError>;
}

/// One delivery of one event.
#[derive(Debug)]
pub struct Delivery {
    pub sequence: u64,
    /// How often this consumer was given the event, from 1. A lost connection counts too, so this
    /// is not the number of attempts.
    pub deliveries: u64,
    pub event: Result<SignUpEvent, Undecodable>,
    /// As it stands in the log.
    pub raw: Vec<u8>,
    pub acknowledge: Box<dyn Acknowledge>,
}

/// Bytes in the log that this version cannot read as an event.
#[derive(Clone, thiserror::Error)]
#[error("could not read an event: {reason}")]
pub struct Undecodable {
    pub raw: Vec<u8>,
    /// Where and why; holds nothing of the content.
    pub reason: String,
}

impl fmt::Debug for Undecodable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Undecodable({} bytes: {})", self.raw.len(), self.reason)
    }
}

impl Undecodable {
    /// Reads an event as it stands in a log.
    pub(crate) fn decode(raw: &[u8]) -> Result<SignUpEvent, Self> {
        serde_json::from_slice(raw).map_err(|error| Self {
            raw: raw.to_vec(),
            // serde's own message can quote the value, which may be personal data.
            reason: format!(
                "{:?} error at line {} column {}",
                error.classify(),
                error.line(),
                error.column()
            ),
        })
    }
}

/// What to tell the log about a delivery. Dropping it without a word means delivery again after
/// `ack_wait`.
#[async_trait]
pub trait Acknowledge: fmt::Debug + Send + Sync {
    /// Done. Returns once the log has taken note; even so it may deliver again after a crash.
    async fn ack(&self) -> Result<(), LogError>;

    /// Deliver again after `delay`.
    async fn nack(&self, delay: Duration) -> Result<(), LogError>;

    /// Still at it: starts `ack_wait` anew.
    async fn progress(&self) -> Result<(), LogError>;
}
