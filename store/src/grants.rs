//! Which roles were granted to whom, by which rule, because of which event.

use time::OffsetDateTime;
use uuid::Uuid;
use vestibule_events::{Person, SignUpEvent};

use crate::{Done, Store, StoreError};

/// A role to grant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewGrant {
    pub role: String,
    /// The rule that grants it.
    pub reason: String,
    pub expires_at: Option<OffsetDateTime>,
}

/// A role that was granted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grant {
    pub person: Person,
    pub role: String,
    /// The rule that granted it.
    pub reason: String,
    pub event_id: Uuid,
    pub granted_at: OffsetDateTime,
    pub expires_at: Option<OffsetDateTime>,
    pub revoked_at: Option<OffsetDateTime>,
}

impl Store {
    /// Grants a set of roles, which may be empty, to the person of the event.
    ///
    /// A role that a newer event granted stays as that event granted it.
    pub async fn grant(
        &self,
        worker: &str,
        event: &SignUpEvent,
        grants: &[NewGrant],
        now: OffsetDateTime,
    ) -> Result<Done, StoreError> {
        let _ = (worker, event, grants, now);
        unimplemented!()
    }

    /// All roles of a person, by name, expired and revoked ones included.
    pub async fn grants_of(&self, person: &Person) -> Result<Vec<Grant>, StoreError> {
        let _ = person;
        unimplemented!()
    }
}
