//! Events that a worker gave up on.

use std::fmt;

use time::OffsetDateTime;
use uuid::Uuid;
use vestibule_events::Person;

use crate::{Done, Store, StoreError};

/// An event that a worker has set aside, with why.
///
/// `Debug` leaves the payload out.
#[derive(Clone, PartialEq, Eq)]
pub struct DeadLetter {
    pub worker: String,
    /// `None` where the bytes could not be read as an event.
    pub event_id: Option<Uuid>,
    pub person: Option<Person>,
    pub sequence: u64,
    /// The event as it stood in the log.
    pub payload: Vec<u8>,
    /// Groups like failures: `refused`, `timeout`, …
    pub cause_class: String,
    /// What went wrong; must hold no personal data.
    pub error: String,
    pub parked_at: OffsetDateTime,
}

impl fmt::Debug for DeadLetter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeadLetter")
            .field("worker", &self.worker)
            .field("event_id", &self.event_id)
            .field("sequence", &self.sequence)
            .field("cause_class", &self.cause_class)
            .field("error", &self.error)
            .field("parked_at", &self.parked_at)
            .finish_non_exhaustive()
    }
}

impl Store {
    /// Keeps a dead letter, once per worker and event (or sequence, where there is no event).
    pub async fn park(&self, letter: &DeadLetter) -> Result<Done, StoreError> {
        let _ = letter;
        unimplemented!()
    }

    /// Dead letters of one worker or of all, the newest first.
    pub async fn dead_letters(
        &self,
        worker: Option<&str>,
        limit: u32,
    ) -> Result<Vec<DeadLetter>, StoreError> {
        let _ = (worker, limit);
        unimplemented!()
    }
}
