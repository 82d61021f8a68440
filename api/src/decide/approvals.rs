//! Whether an approver has been asked about somebody, and what the answer was.
//!
//! The connector only reads, and within a limit: where it cannot learn how somebody stands, it asks
//! for approval once more, and whoever keeps the requests knows that there is one already.

use std::{fmt, sync::Arc, time::Duration};

use async_trait::async_trait;
use time::OffsetDateTime;
use tokio::time::{Instant, timeout_at};
use vestibule_events::{ConnectorName, Person};

use super::Text;

/// How the newest request of a person stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// Never asked for, or run out.
    None,
    Pending,
    Approved,
    Denied {
        at: OffsetDateTime,
    },
}

/// Knows how people stand.
#[async_trait]
pub trait Approvals: Send + Sync + 'static {
    /// `None` where it cannot be learned now. The caller has a deadline and drops the future.
    async fn standing(&self, person: &Person, connector: &ConnectorName) -> Option<Standing>;
}

/// How a connector asks for approval.
#[derive(Clone)]
pub struct ApprovalSettings {
    pub approvals: Arc<dyn Approvals>,
    /// So long a call waits to learn how somebody stands.
    pub time_limit: Duration,
    /// So long after a denial the same person may ask again; never, where there is none.
    pub reapply_after: Option<Duration>,
    /// What somebody is told who was denied.
    pub denied: Text,
}

impl ApprovalSettings {
    pub const TIME_LIMIT: Duration = Duration::from_millis(150);
    pub const DENIED: &'static str = "Your registration was not approved.";
}

impl fmt::Debug for ApprovalSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ApprovalSettings")
            .field("time_limit", &self.time_limit)
            .field("reapply_after", &self.reapply_after)
            .finish_non_exhaustive()
    }
}

impl ApprovalSettings {
    /// How somebody stands now; a denial that is old enough counts no more. `None` where it cannot
    /// be learned in time.
    pub(super) async fn standing(
        &self,
        person: &Person,
        connector: &ConnectorName,
        deadline: Instant,
    ) -> Option<Standing> {
        let limit = deadline.min(Instant::now() + self.time_limit);
        let standing = timeout_at(limit, self.approvals.standing(person, connector));
        Some(match standing.await.ok()?? {
            Standing::Denied { at } if self.may_reapply(at, OffsetDateTime::now_utc()) => {
                Standing::None
            }
            standing => standing,
        })
    }

    fn may_reapply(&self, denied_at: OffsetDateTime, now: OffsetDateTime) -> bool {
        self.reapply_after.is_some_and(|after| denied_at + after <= now)
    }
}
