//! Which workers were told to take no events.
//!
//! That holds for every process of a worker and across restarts, until somebody lifts it.
//! Operators pause workers; one is paused by itself only where its target says that it wants no more
//! events. A paused worker keeps its backlog.

use time::OffsetDateTime;

use crate::{
    Done, Store, StoreError,
    session::{execute, fetch_all, fetch_optional},
    text::{storable, storable_time},
};

/// A worker that takes no events until it is resumed.
#[derive(Clone, Debug, PartialEq, Eq, sqlx::FromRow)]
pub struct PausedWorker {
    pub worker: String,
    pub paused_at: OffsetDateTime,
    pub paused_by: String,
    pub reason: String,
}

impl Store {
    /// Tells a worker to take no events. If it was told before ([`Done::Before`]), that stays, with
    /// who said so and why.
    pub async fn pause_worker(
        &self,
        worker: &str,
        by: &str,
        reason: &str,
        now: OffsetDateTime,
    ) -> Result<Done, StoreError> {
        let mut session = self.write().await?;
        let rows = execute!(
            &mut session,
            sqlx::query(
                "INSERT INTO paused_workers (worker, paused_at, paused_by, reason)
                 VALUES ($1, $2, $3, $4)
                 ON CONFLICT DO NOTHING"
            )
            .bind(worker)
            .bind(storable_time(now))
            .bind(storable(by))
            .bind(storable(reason))
        )?;
        session.commit().await?;
        Ok(Done::from_rows(rows))
    }

    /// Lets a worker take events again; says whether it was paused.
    pub async fn resume_worker(&self, worker: &str) -> Result<bool, StoreError> {
        let mut session = self.write().await?;
        let rows = execute!(
            &mut session,
            sqlx::query("DELETE FROM paused_workers WHERE worker = $1").bind(worker)
        )?;
        session.commit().await?;
        Ok(rows > 0)
    }

    /// Whether a worker is paused, and since when, by whom and why.
    pub async fn paused(&self, worker: &str) -> Result<Option<PausedWorker>, StoreError> {
        let mut session = self.read().await?;
        fetch_optional!(
            &mut session,
            sqlx::query_as("SELECT * FROM paused_workers WHERE worker = $1").bind(worker)
        )
    }

    /// All that are paused, by name.
    pub async fn paused_workers(&self) -> Result<Vec<PausedWorker>, StoreError> {
        let mut session = self.read().await?;
        fetch_all!(&mut session, sqlx::query_as("SELECT * FROM paused_workers ORDER BY worker"))
    }
}
