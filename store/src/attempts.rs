//! Attempts that failed.

use std::time::Duration;

use time::OffsetDateTime;
use uuid::Uuid;

use crate::{
    Store, StoreError,
    session::{Session, execute, fetch_all},
    text::{storable, storable_time},
};

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

/// How often a worker has failed at an event since it waits for another attempt, and since when.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Failures {
    pub count: u32,
    /// When the first attempt that failed was started.
    pub first_at: OffsetDateTime,
}

impl Store {
    /// The failed attempts at an event, of all workers, in order.
    pub async fn attempts_of(&self, event_id: Uuid) -> Result<Vec<FailedAttempt>, StoreError> {
        of(&mut self.read().await?, event_id, None).await
    }
}

/// The failed attempts at an event, of one worker or all, in order.
pub(crate) async fn of(
    session: &mut Session,
    event_id: Uuid,
    worker: Option<&str>,
) -> Result<Vec<FailedAttempt>, StoreError> {
    let rows: Vec<AttemptRow> = fetch_all!(
        session,
        sqlx::query_as(
            "SELECT * FROM attempts WHERE event_id = $1 AND ($2 IS NULL OR worker = $2)
             ORDER BY id"
        )
        .bind(event_id)
        .bind(worker)
    )?;
    Ok(rows.into_iter().map(FailedAttempt::from).collect())
}

#[derive(sqlx::FromRow)]
struct AttemptRow {
    worker: String,
    event_id: Uuid,
    sequence: i64,
    started_at: OffsetDateTime,
    took_ms: i64,
    cause_class: String,
    error: String,
}

impl From<AttemptRow> for FailedAttempt {
    fn from(row: AttemptRow) -> Self {
        Self {
            worker: row.worker,
            event_id: row.event_id,
            sequence: row.sequence.unsigned_abs(),
            started_at: row.started_at,
            took: Duration::from_millis(row.took_ms.unsigned_abs()),
            cause_class: row.cause_class,
            error: row.error,
        }
    }
}

pub(crate) async fn insert(
    session: &mut Session,
    attempt: &FailedAttempt,
) -> Result<(), StoreError> {
    execute!(
        session,
        sqlx::query(
            "INSERT INTO attempts (worker, event_id, sequence, started_at, took_ms, cause_class,
                 error)
             VALUES ($1, $2, $3, $4, $5, $6, $7)"
        )
        .bind(&attempt.worker)
        .bind(attempt.event_id)
        .bind(i64::try_from(attempt.sequence).unwrap_or(i64::MAX))
        .bind(storable_time(attempt.started_at))
        .bind(i64::try_from(attempt.took.as_millis()).unwrap_or(i64::MAX))
        .bind(&attempt.cause_class)
        .bind(storable(&attempt.error))
    )?;
    Ok(())
}
