//! What each worker has dealt with.
//!
//! The inbox row is the first thing that every effect writes. A second delivery of the same event,
//! at the same time in another process, waits there until the first is committed, and so learns
//! that nothing is left to do.
//!
//! That also settles the order in which PostgreSQL takes its row locks, the same everywhere: inbox,
//! sign-up, person, grants by role, what targets hold of them, requests for approval by expiry,
//! sightings of accounts, confirmations, outbox. Nobody waits for an earlier one while holding a later
//! one, so there are no deadlocks.

use time::OffsetDateTime;
use uuid::Uuid;

use crate::{
    Store, StoreError,
    session::{Session, execute, fetch_optional},
    text::storable_time,
};

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
        let mut session = self.write().await?;
        let done = enter(&mut session, worker, event_id, now).await?;
        session.commit().await?;
        Ok(done)
    }

    /// Whether `worker` has dealt with an event.
    pub async fn is_done(&self, worker: &str, event_id: Uuid) -> Result<bool, StoreError> {
        let mut session = self.read().await?;
        holds(&mut session, worker, event_id).await
    }
}

/// Whether `worker` has dealt with an event, as a transaction sees it.
pub(crate) async fn holds(
    session: &mut Session,
    worker: &str,
    event_id: Uuid,
) -> Result<bool, StoreError> {
    let row: Option<(i64,)> = fetch_optional!(
        session,
        sqlx::query_as("SELECT count(*) FROM inbox WHERE worker = $1 AND event_id = $2")
            .bind(worker)
            .bind(event_id)
    )?;
    Ok(row.is_some_and(|(rows,)| rows > 0))
}

/// Notes within a transaction that `worker` deals with an event.
pub(crate) async fn enter(
    session: &mut Session,
    worker: &str,
    event_id: Uuid,
    now: OffsetDateTime,
) -> Result<Done, StoreError> {
    #[cfg(feature = "mutations")]
    if std::env::var("VESTIBULE_MUTATION").as_deref() == Ok("no-inbox") {
        return Ok(Done::Now);
    }
    let rows = execute!(
        session,
        sqlx::query(
            "INSERT INTO inbox (worker, event_id, done_at) VALUES ($1, $2, $3)
             ON CONFLICT DO NOTHING"
        )
        .bind(worker)
        .bind(event_id)
        .bind(storable_time(now))
    )?;
    Ok(Done::from_rows(rows))
}

impl Done {
    /// An insert that changes nothing met a row that was there before.
    pub(crate) const fn from_rows(rows: u64) -> Self {
        if rows == 0 { Self::Before } else { Self::Now }
    }
}
