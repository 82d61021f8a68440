//! Which notifications were sent, or are being sent.

use time::OffsetDateTime;
use uuid::Uuid;
use vestibule_events::SignUpEvent;

use crate::{Done, Store, StoreError};

/// What to do about a notification.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Begun {
    /// Send it, under this key: the same one each time, however often sending is begun.
    Send {
        idempotency_key: String,
    },
    SentBefore,
}

impl Store {
    /// Notes that a notification is about to be sent.
    ///
    /// A provider cannot take part in our transaction. So: begin, send with the key, finish. Who
    /// dies between sending and finishing sends again with the same key, by which the provider
    /// knows the repetition.
    pub async fn begin_notification(
        &self,
        worker: &str,
        event: &SignUpEvent,
        channel: &str,
        now: OffsetDateTime,
    ) -> Result<Begun, StoreError> {
        let _ = (worker, event, channel, now);
        unimplemented!()
    }

    /// Notes that a notification was sent, under the provider's own id where it gave one.
    pub async fn finish_notification(
        &self,
        worker: &str,
        event_id: Uuid,
        channel: &str,
        provider_id: Option<&str>,
        now: OffsetDateTime,
    ) -> Result<(), StoreError> {
        let _ = (worker, event_id, channel, provider_id, now);
        unimplemented!()
    }

    /// Keeps a notification in the store and sends it nowhere.
    pub async fn record_notification(
        &self,
        worker: &str,
        event: &SignUpEvent,
        channel: &str,
        subject: &str,
        body: &str,
        now: OffsetDateTime,
    ) -> Result<Done, StoreError> {
        let _ = (worker, event, channel, subject, body, now);
        unimplemented!()
    }
}
