//! Opens a request for approval for each sign-up that waits for an approver.
//!
//! One person has at most one open request at a connector: an event that comes while it is open is
//! noted on it. The store settles that, whoever asks. Deciding, and giving up in time, is left to
//! others.

use std::time::Duration;

use async_trait::async_trait;
use time::OffsetDateTime;
use vestibule_events::Kind;
use vestibule_store::Store;

use crate::{HandleError, Task, Worker};

/// How requests are opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ApprovalsSettings {
    /// A request that nobody has decided for so long is given up.
    pub expires_after: Duration,
}

impl Default for ApprovalsSettings {
    /// A fortnight: an approver's holiday.
    fn default() -> Self {
        Self { expires_after: Duration::from_secs(14 * 24 * 60 * 60) }
    }
}

impl ApprovalsSettings {
    /// When a request that an event opens is given up. Links and messages say the same.
    ///
    /// From the event's own time: handled late, a request does not last longer.
    pub(crate) fn expires_at(&self, event_time: OffsetDateTime) -> OffsetDateTime {
        event_time
            .checked_add(self.expires_after.try_into().unwrap_or(time::Duration::MAX))
            .unwrap_or(time::PrimitiveDateTime::MAX.assume_utc())
    }
}

/// The worker `approvals`.
#[derive(Debug)]
pub struct Approvals {
    settings: ApprovalsSettings,
    store: Store,
}

impl Approvals {
    pub const NAME: &'static str = "approvals";

    /// What it acts on; other events pass by.
    pub const KINDS: [Kind; 1] = [Kind::Pending];

    #[must_use]
    pub const fn new(settings: ApprovalsSettings, store: Store) -> Self {
        Self { settings, store }
    }
}

#[async_trait]
impl Worker for Approvals {
    fn name(&self) -> &str {
        Self::NAME
    }

    async fn handle(&self, task: &Task) -> Result<(), HandleError> {
        let event = &task.event;
        if !Self::KINDS.contains(&event.kind) {
            return Ok(());
        }
        let expires_at = self.settings.expires_at(event.time);
        self.store.open_request(Self::NAME, event, expires_at, OffsetDateTime::now_utc()).await?;
        Ok(())
    }
}
