//! Attempts that failed.

use std::time::Duration;

use time::OffsetDateTime;
use uuid::Uuid;

use crate::{Store, StoreError};

/// One try of one worker at one event that did not succeed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FailedAttempt {
    pub worker: String,
    pub event_id: Uuid,
    pub sequence: u64,
    pub started_at: OffsetDateTime,
    pub took: Duration,
    /// Groups like failures: `timeout`, `throttled`, …
    pub cause_class: String,
    /// What went wrong; must hold no personal data.
    pub error: String,
}

/// How often a worker has failed at an event, and since when.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Failures {
    pub count: u32,
    /// When the first attempt that failed was started.
    pub first_at: OffsetDateTime,
}

impl Store {
    /// Keeps a failed attempt, and says how many there are now.
    pub async fn record_failed_attempt(
        &self,
        attempt: &FailedAttempt,
    ) -> Result<Failures, StoreError> {
        let _ = attempt;
        unimplemented!()
    }

    /// The failed attempts at an event, of all workers, in order.
    pub async fn attempts_of(&self, event_id: Uuid) -> Result<Vec<FailedAttempt>, StoreError> {
        let _ = event_id;
        unimplemented!()
    }
}
