//! Keeps the business database up to date: the person, and the sign-up as it happened.
//!
//! The store writes both with its note of the event in one transaction, and lets no older event
//! overwrite a newer one; so neither redelivery nor overtaking does harm.

use async_trait::async_trait;
use time::OffsetDateTime;
use vestibule_events::Kind;
use vestibule_store::Store;

use crate::{HandleError, Task, Worker};

/// The worker `database`.
#[derive(Debug)]
pub struct Database {
    store: Store,
}

impl Database {
    pub const NAME: &'static str = "database";

    /// What it is given where the configuration does not say: whatever may lead to an account, and
    /// what became of it. Whoever was turned away at the door is nobody's business yet.
    pub const KINDS: &'static [Kind] = &[
        Kind::Accepted,
        Kind::Pending,
        Kind::Approved,
        Kind::Denied,
        Kind::Confirmed,
        Kind::Abandoned,
    ];

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

#[cfg(test)]
mod tests {
    use vestibule_events::{PseudonymKey, SignUpEvent, Verdict};

    use super::*;
    use crate::testing::{Stage, pending, settings};

    #[tokio::test]
    async fn a_person_is_known_as_of_their_newest_event_of_any_kind() -> anyhow::Result<()> {
        let stage = Stage::open().await?;
        let mut all = settings(3);
        all.filter.kinds = Database::KINDS.to_vec();
        let running = stage.start(Database::new(stage.store.clone()), all);
        let status = async |event: &SignUpEvent| {
            stage.idle(Database::NAME).await?;
            let person = stage.store.person(&event.person).await?;
            anyhow::Ok(person.map(|it| it.status).unwrap_or_default())
        };

        let asked = stage.append(pending("ada")).await?;
        assert_eq!(status(&asked).await?, "pending");
        let (id, now) = (uuid::Uuid::now_v7(), OffsetDateTime::now_utc());
        let key = PseudonymKey::new(vec![1; 32]);
        let denied = SignUpEvent::reviewed(id, now, &asked, Verdict::Deny, "grace", None, &key);
        stage.append(denied).await?;
        assert_eq!(status(&asked).await?, "denied");

        running.stop().await
    }
}
