//! The local log: an append-only SQLite file beside a connector.

use std::{path::PathBuf, time::Duration};

use async_trait::async_trait;
use futures_util::stream::BoxStream;
use prometheus_client::registry::Registry;
use time::OffsetDateTime;

use crate::{
    AppendError, Appended, Backlog, Consumer, ConsumerSpec, EventLog, LogError, Replay,
    SignUpEvent, Stored,
};

/// Where a local log lies and how long it remembers.
#[derive(Clone, Debug)]
pub struct LocalLogConfig {
    /// The file, for instance `data/events.db`.
    pub path: PathBuf,
    /// A call repeated within this time is the same event.
    pub duplicate_window: Duration,
    /// The same for a refusal, so that a mended rule takes hold when the person tries again.
    pub refusal_window: Duration,
    pub retention: Retention,
}

/// When an event may leave the local log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Retention {
    /// Once it is so old: the local log is the archive.
    For(Duration),
    /// Once the named consumer has acknowledged it and no repeated call can ask for it any more:
    /// the archive is elsewhere.
    BehindConsumer(String),
}

/// The SQLite log. Cloning gives another handle of the same log.
#[derive(Clone, Debug)]
pub struct LocalLog {}

impl LocalLog {
    /// Opens the log to append and consume. One process at a time.
    pub async fn open(_config: LocalLogConfig) -> Result<Self, LogError> {
        Err(unbuilt())
    }

    /// Opens the log to consume and trim while another process appends.
    pub async fn open_for_relay(_config: LocalLogConfig) -> Result<Self, LogError> {
        Err(unbuilt())
    }

    /// Opens the log to look at it, whoever else has it open.
    pub async fn open_read_only(_path: impl Into<PathBuf>) -> Result<Self, LogError> {
        Err(unbuilt())
    }

    /// Removes some of the events that retention lets go, and says how many.
    pub async fn trim(&self, _now: OffsetDateTime) -> Result<u64, LogError> {
        Err(unbuilt())
    }

    /// The sequence of the youngest event; 0 while there was none.
    #[must_use]
    pub fn last_sequence(&self) -> u64 {
        0
    }

    /// Finishes what is being appended and lets the file go.
    pub async fn close(&self) -> Result<(), LogError> {
        Ok(())
    }

    /// Adds this log's metrics.
    pub fn register(&self, _registry: &mut Registry) {}
}

fn unbuilt() -> LogError {
    LogError::Unavailable(anyhow::anyhow!("the local log is not built yet"))
}

#[async_trait]
impl EventLog for LocalLog {
    async fn append(&self, _event: SignUpEvent) -> Result<Appended, AppendError> {
        Err(AppendError::NotStored(unbuilt().into()))
    }

    async fn consumer(&self, _spec: ConsumerSpec) -> Result<Box<dyn Consumer>, LogError> {
        Err(unbuilt())
    }

    async fn replay(
        &self,
        _replay: Replay,
    ) -> Result<BoxStream<'static, Result<Stored, LogError>>, LogError> {
        Err(unbuilt())
    }

    async fn backlog(&self, _consumer: &str) -> Result<Option<Backlog>, LogError> {
        Err(unbuilt())
    }
}
