//! Keeps the business database up to date: the person, and the sign-up as it happened.
//!
//! The store writes both with its note of the event in one transaction, and lets no older event
//! overwrite a newer one; so neither redelivery nor overtaking does harm.

use async_trait::async_trait;
use time::OffsetDateTime;
use vestibule_store::Store;

use crate::{HandleError, Task, Worker};

/// The worker `database`.
#[derive(Debug)]
pub struct Database {
    store: Store,
}

impl Database {
    pub const NAME: &'static str = "database";

    #[must_use]
    pub const fn new(store: Store) -> Self {
        Self { store }
    }
}

#[async_trait]
impl Worker for Database {
    fn name(&self) -> &str {
        Self::NAME
    }

    async fn handle(&self, task: &Task) -> Result<(), HandleError> {
        self.store.record_sign_up(Self::NAME, &task.event, OffsetDateTime::now_utc()).await?;
        Ok(())
    }
}
