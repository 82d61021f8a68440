//! Which notifications were sent, or are being sent.
//!
//! Each channel of a worker has a row of its own for an event, so that one that fails does not make
//! the others send again.

use time::OffsetDateTime;
use uuid::Uuid;
use vestibule_events::SignUpEvent;

use crate::{
    Done, Store, StoreError,
    session::{execute, fetch_optional},
    text::{storable, storable_time},
};

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
        let mut session = self.write().await?;
        let key: Option<(String,)> = fetch_optional!(
            &mut session,
            sqlx::query_as(
                "INSERT INTO notifications (event_id, worker, channel, person, state,
                     idempotency_key, tries, begun_at)
                 VALUES ($1, $2, $3, $4, 'sending', $5, 1, $6)
                 ON CONFLICT (event_id, worker, channel) DO UPDATE SET
                     tries = notifications.tries + 1
                 WHERE notifications.state = 'sending'
                 RETURNING idempotency_key"
            )
            .bind(event.id)
            .bind(worker)
            .bind(channel)
            .bind(event.person.as_str())
            .bind(idempotency_key(worker, event.id, channel))
            .bind(storable_time(now))
        )?;
        session.commit().await?;
        Ok(match key {
            Some((idempotency_key,)) => Begun::Send { idempotency_key },
            None => Begun::SentBefore,
        })
    }

    /// Notes that a notification was sent, under the provider's own id where it gave one.
    pub async fn finish_notification(
        &self,
        worker: &str,
        event_id: Uuid,
        channel: &str,
        provider_id: Option<&str>,
        now: OffsetDateTime,
    ) -> Result<Done, StoreError> {
        let mut session = self.write().await?;
        let rows = execute!(
            &mut session,
            sqlx::query(
                "UPDATE notifications SET state = 'sent', provider_id = $4, finished_at = $5
                 WHERE event_id = $1 AND worker = $2 AND channel = $3 AND state = 'sending'"
            )
            .bind(event_id)
            .bind(worker)
            .bind(channel)
            .bind(provider_id.map(storable))
            .bind(storable_time(now))
        )?;
        session.commit().await?;
        Ok(Done::from_rows(rows))
    }

    /// Takes the note back that a notification is being sent: whom it was for is gone.
    pub async fn forget_notification(
        &self,
        worker: &str,
        event_id: Uuid,
        channel: &str,
    ) -> Result<(), StoreError> {
        let mut session = self.write().await?;
        execute!(
            &mut session,
            sqlx::query(
                "DELETE FROM notifications
                 WHERE event_id = $1 AND worker = $2 AND channel = $3 AND state = 'sending'"
            )
            .bind(event_id)
            .bind(worker)
            .bind(channel)
        )?;
        session.commit().await
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
        let mut session = self.write().await?;
        let rows = execute!(
            &mut session,
            sqlx::query(
                // A channel that sent before and only records now may have left a row behind.
                "INSERT INTO notifications (event_id, worker, channel, person, state,
                     idempotency_key, subject, body, tries, begun_at, finished_at)
                 VALUES ($1, $2, $3, $4, 'recorded', $5, $6, $7, 1, $8, $8)
                 ON CONFLICT (event_id, worker, channel) DO UPDATE SET
                     state = 'recorded', subject = excluded.subject, body = excluded.body,
                     tries = notifications.tries + 1, finished_at = excluded.finished_at
                 WHERE notifications.state = 'sending'"
            )
            .bind(event.id)
            .bind(worker)
            .bind(channel)
            .bind(event.person.as_str())
            .bind(idempotency_key(worker, event.id, channel))
            .bind(storable(subject))
            .bind(storable(body))
            .bind(storable_time(now))
        )?;
        session.commit().await?;
        Ok(Done::from_rows(rows))
    }
}

/// Readable, free of personal data, and safe in an HTTP header and in a `Message-ID`. A key that
/// was stored stays what it is, even if a later version makes them differently.
fn idempotency_key(worker: &str, event_id: Uuid, channel: &str) -> String {
    format!("{event_id}.{worker}.{channel}")
}
