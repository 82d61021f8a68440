//! A transaction in which somebody else's statements run beside our note of the event.
//!
//! The note and whatever the caller writes become durable together, or nothing does.

use time::OffsetDateTime;
use uuid::Uuid;

use crate::{
    Done, Store, StoreError, inbox,
    session::{Dialect, Session},
    store::Database,
};

/// A transaction that has begun. Dropping it leaves nothing of it.
#[derive(Debug)]
pub struct Transaction(Session);

impl Store {
    pub async fn transaction(&self) -> Result<Transaction, StoreError> {
        Ok(Transaction(self.write().await?))
    }

    /// Whose SQL its transactions take: PostgreSQL's, or else SQLite's.
    #[must_use]
    pub fn is_postgres(&self) -> bool {
        matches!(*self.database, Database::Postgres { .. })
    }
}

impl Transaction {
    /// Notes that `worker` deals with an event.
    pub async fn enter(
        &mut self,
        worker: &str,
        event_id: Uuid,
        now: OffsetDateTime,
    ) -> Result<Done, StoreError> {
        inbox::enter(&mut self.0, worker, event_id, now).await
    }

    /// Where the caller's statements run. They must neither begin nor end a transaction; savepoints
    /// of their own are fine.
    pub fn connection(&mut self) -> Dialect<'_> {
        self.0.dialect()
    }

    /// Makes everything durable, or nothing.
    pub async fn commit(self) -> Result<(), StoreError> {
        self.0.commit().await
    }

    /// Undoes everything. Dropping does the same, at the price of a connection.
    pub async fn roll_back(self) -> Result<(), StoreError> {
        self.0.roll_back().await
    }
}
