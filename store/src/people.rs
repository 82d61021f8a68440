//! People and their sign-ups.

use std::fmt;

use time::OffsetDateTime;
use uuid::Uuid;
use vestibule_events::{Claims, Email, Person, SignUpEvent};

use crate::{Done, Store, StoreError};

/// What is known about a person, as of their newest event.
///
/// `Debug` leaves address and claims out.
#[derive(Clone, PartialEq)]
pub struct PersonRecord {
    pub person: Person,
    pub email: Option<Email>,
    /// As the person gave them, with what the decision changed.
    pub claims: Claims,
    /// The kind of the newest event.
    pub status: String,
    pub first_event: Uuid,
    pub last_event: Uuid,
    /// How many sign-ups were counted to this person, late older ones included.
    pub changes: u32,
    pub created_at: OffsetDateTime,
    pub updated_at: OffsetDateTime,
}

impl fmt::Debug for PersonRecord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PersonRecord")
            .field("person", &self.person)
            .field("status", &self.status)
            .field("last_event", &self.last_event)
            .field("changes", &self.changes)
            .finish_non_exhaustive()
    }
}

impl Store {
    /// Records the sign-up and brings the person up to date, unless a newer event did already.
    pub async fn record_sign_up(
        &self,
        worker: &str,
        event: &SignUpEvent,
        now: OffsetDateTime,
    ) -> Result<Done, StoreError> {
        let _ = (worker, event, now);
        unimplemented!()
    }

    pub async fn person(&self, person: &Person) -> Result<Option<PersonRecord>, StoreError> {
        let _ = person;
        unimplemented!()
    }
}
