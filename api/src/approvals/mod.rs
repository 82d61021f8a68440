//! Requests for approval: who decides them, and how the decision becomes an event.
//!
//! The connector only asks for an approval and reads how somebody stands; the store holds the
//! requests. A decision, by a link or on the command line, is one transaction of the store, which
//! lays its event into an outbox; [`publish_outbox`](crate::publish_outbox) brings that to the log. Nobody who signs up
//! waits for any of this.

mod expire;
mod page;

use std::sync::{Arc, OnceLock};

use async_trait::async_trait;
use prometheus_client::{metrics::gauge::Gauge, registry::Registry};
use time::OffsetDateTime;
use uuid::Uuid;
use vestibule_events::{
    ApprovalLinks, ConnectorName, LinkError, Person, PseudonymKey, SignUpEvent, Verdict,
};
use vestibule_store::{ApprovalRequest, ApprovalState, Decided, Store, StoreError};

pub use self::{expire::expire_requests, page::approvals_router};
use crate::{Approvals, Standing};

/// Where requests are decided; cheap to clone.
#[derive(Clone, Debug)]
pub struct ApprovalDesk {
    /// Empty until the store has been reached for the first time.
    store: Arc<OnceLock<Store>>,
    key: Arc<PseudonymKey>,
    links: ApprovalLinks,
    waiting: Gauge,
}

/// Why a request could not be looked at or decided.
#[derive(Debug, thiserror::Error)]
pub enum DeskError {
    #[error(transparent)]
    Link(#[from] LinkError),
    #[error("there is no such request for approval")]
    NotFound,
    #[error("the requests for approval cannot be reached now")]
    Away(#[source] Option<StoreError>),
}

impl From<StoreError> for DeskError {
    fn from(error: StoreError) -> Self {
        Self::Away(Some(error))
    }
}

impl ApprovalDesk {
    /// An approver's reason goes into an event, and is no place for documents.
    pub const REASON_CHARS_MAX: usize = 1000;

    #[must_use]
    pub fn new(store: Arc<OnceLock<Store>>, key: Arc<PseudonymKey>) -> Self {
        Self { store, links: ApprovalLinks::new(&key), key, waiting: Gauge::default() }
    }

    /// Puts its metric into `registry`; [`expire_requests`] keeps it true.
    pub fn register(&self, registry: &mut Registry) {
        registry.register(
            "vestibule_approvals_waiting",
            "Requests for approval that nobody has decided yet",
            self.waiting.clone(),
        );
    }

    fn store(&self) -> Result<&Store, DeskError> {
        self.store.get().ok_or(DeskError::Away(None))
    }

    /// The request that a link leads to.
    async fn request(&self, token: &str) -> Result<ApprovalRequest, DeskError> {
        let event = self.links.check(token, OffsetDateTime::now_utc())?;
        self.store()?.approval_request(event).await?.ok_or(DeskError::NotFound)
    }

    /// Decides a request, unless somebody else has; of two at once one is first.
    pub async fn decide(
        &self,
        request: &ApprovalRequest,
        verdict: Verdict,
        approver: &str,
        reason: Option<String>,
    ) -> Result<Decided, DeskError> {
        let now = OffsetDateTime::now_utc();
        let id = Uuid::now_v7();
        let opening = &request.event;
        let event = SignUpEvent::reviewed(id, now, opening, verdict, approver, reason, &self.key);
        Ok(self.store()?.decide_request(&event, now).await?)
    }
}

#[async_trait]
impl Approvals for ApprovalDesk {
    async fn standing(&self, person: &Person, connector: &ConnectorName) -> Option<Standing> {
        let state = self.store.get()?.approval_state(person, connector).await.ok()?;
        Some(match state {
            None | Some(ApprovalState::Expired { .. }) => Standing::None,
            Some(ApprovalState::Pending { .. }) => Standing::Pending,
            Some(ApprovalState::Approved { .. }) => Standing::Approved,
            Some(ApprovalState::Denied { at }) => Standing::Denied { at },
        })
    }
}
