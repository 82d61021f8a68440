//! Events that a worker gave up on.

use std::fmt;

use time::OffsetDateTime;
use uuid::Uuid;
use vestibule_events::Person;

use crate::{
    Done, Store, StoreError,
    session::{execute, fetch_all},
    text::{storable, storable_time},
};

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
        let mut session = self.write().await?;
        let rows = execute!(
            &mut session,
            sqlx::query(
                "INSERT INTO dead_letters (worker, event_id, person, sequence, payload,
                     cause_class, error, parked_at)
                 VALUES ($1, $2, $3, $4, $5, $6, $7, $8)
                 ON CONFLICT DO NOTHING"
            )
            .bind(&letter.worker)
            .bind(letter.event_id)
            .bind(letter.person.as_ref().map(Person::as_str))
            .bind(i64::try_from(letter.sequence).unwrap_or(i64::MAX))
            .bind(&letter.payload)
            .bind(&letter.cause_class)
            .bind(storable(&letter.error))
            .bind(storable_time(letter.parked_at))
        )?;
        session.commit().await?;
        Ok(Done::from_rows(rows))
    }

    /// Dead letters of one worker or of all, the newest first.
    pub async fn dead_letters(
        &self,
        worker: Option<&str>,
        limit: u32,
    ) -> Result<Vec<DeadLetter>, StoreError> {
        let mut session = self.read().await?;
        let rows: Vec<DeadLetterRow> = fetch_all!(
            &mut session,
            sqlx::query_as(
                "SELECT * FROM dead_letters WHERE $1 IS NULL OR worker = $1
                 ORDER BY id DESC LIMIT $2"
            )
            .bind(worker)
            .bind(i64::from(limit))
        )?;
        Ok(rows.into_iter().map(DeadLetter::from).collect())
    }
}

#[derive(sqlx::FromRow)]
struct DeadLetterRow {
    worker: String,
    event_id: Option<Uuid>,
    person: Option<String>,
    sequence: i64,
    payload: Vec<u8>,
    cause_class: String,
    error: String,
    parked_at: OffsetDateTime,
}

impl From<DeadLetterRow> for DeadLetter {
    fn from(row: DeadLetterRow) -> Self {
        Self {
            worker: row.worker,
            event_id: row.event_id,
            person: row.person.map(Person::from_pseudonym),
            sequence: row.sequence.unsigned_abs(),
            payload: row.payload,
            cause_class: row.cause_class,
            error: row.error,
            parked_at: row.parked_at,
        }
    }
}
