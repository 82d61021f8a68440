//! What each worker has dealt with.

use time::OffsetDateTime;
use uuid::Uuid;

use crate::{Store, StoreError};

/// Whether an effect happened now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Done {
    Now,
    /// The worker had dealt with the event before; nothing was changed.
    Before,
}

impl Store {
    /// Notes that `worker` has dealt with an event.
    pub async fn mark_done(
        &self,
        worker: &str,
        event_id: Uuid,
        now: OffsetDateTime,
    ) -> Result<Done, StoreError> {
        let _ = (worker, event_id, now);
        unimplemented!()
    }

    /// Whether `worker` has dealt with an event.
    pub async fn is_done(&self, worker: &str, event_id: Uuid) -> Result<bool, StoreError> {
        let _ = (worker, event_id);
        unimplemented!()
    }
}
