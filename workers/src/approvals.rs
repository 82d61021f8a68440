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
    /// From the event's own time: handled late, a request does not last longer. To the second, as
    /// the store and links keep it.
    pub(crate) fn expires_at(&self, event_time: OffsetDateTime) -> OffsetDateTime {
        let whole = event_time.replace_nanosecond(0).unwrap_or(event_time);
        whole.saturating_add(self.expires_after.min(LONGEST).try_into().unwrap_or_default())
    }
}

/// Longer than anybody waits, and far from where dates end.
const LONGEST: Duration = Duration::from_secs(100 * 365 * 24 * 60 * 60);

/// The worker `approvals`.
#[derive(Debug)]
pub struct Approvals {
    settings: ApprovalsSettings,
    store: Store,
}

impl Approvals {
    pub const NAME: &'static str = "approvals";

    /// What it acts on; other events pass by.
    pub const KINDS: &'static [Kind] = &[Kind::Pending];

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

#[cfg(test)]
mod tests {
    use vestibule_store::{ApprovalFilter, RequestState};

    use super::*;
    use crate::testing::{Stage, approved, pending, settings};

    #[tokio::test]
    async fn a_person_has_one_request_however_often_they_try() -> anyhow::Result<()> {
        let stage = Stage::open().await?;
        let expires_after = Duration::from_secs(3600);
        let worker = Approvals::new(ApprovalsSettings { expires_after }, stage.store.clone());
        let first = stage.append(pending("ada")).await?;
        for event in [pending("ada"), pending("bob"), approved("eve")] {
            stage.append(event).await?;
        }

        let mut all_kinds = settings(3);
        all_kinds.filter.kinds.clear();
        let running = stage.start(worker, all_kinds);
        stage.idle(Approvals::NAME).await?;

        let filter = ApprovalFilter { limit: 10, ..ApprovalFilter::default() };
        let requests = stage.store.approval_requests(&filter).await?;
        assert_eq!(requests.len(), 2);
        let ada = requests.iter().find(|it| it.person == first.person).expect("she asked");
        assert_eq!((ada.attempts, ada.state), (2, RequestState::Pending));
        let whole = first.time.replace_nanosecond(0)?;
        let hour_later = |event: &OffsetDateTime| *event - whole <= Duration::from_secs(3601);
        assert!(ada.expires_at > whole && hour_later(&ada.expires_at), "{ada:?}");
        running.stop().await
    }

    #[test]
    fn no_expiry_is_beyond_what_a_date_can_be() {
        let settings = ApprovalsSettings { expires_after: Duration::MAX };
        let now = time::macros::datetime!(2026-11-22 10:00:00.5 UTC);
        let expires_at = settings.expires_at(now);
        assert_eq!((expires_at.year(), expires_at.nanosecond()), (2126, 0), "{expires_at}");
    }
}
