//! Events that were made here and have to go to the log.
//!
//! An event is written in the transaction of what it tells of, and published later: a crash in
//! between delays it and loses nothing. It may be published twice, by a crash before it is taken out
//! or by two processes at once; that does no harm, because it keeps its id and its fingerprint. Once
//! the log has it nothing of it stays here: how long events are kept is the log's to say.
//!
//! It is published as it was written, for whoever wrote it may know more than whoever publishes it.
//! What a version cannot read at all stays for one that can.

use sqlx::QueryBuilder;
use time::OffsetDateTime;
use uuid::Uuid;
use vestibule_events::{SignUpEvent, Undecodable, WrittenEvent};

use crate::{
    Store, StoreError,
    error::Cause,
    session::{Session, execute, fetch_all},
    text::storable_time,
};

/// An event that the log may not have yet.
#[derive(Clone, Debug)]
pub struct Unpublished {
    /// Rising, in the order they were written.
    pub place: i64,
    pub event_id: Uuid,
    pub event: Result<WrittenEvent, Undecodable>,
}

impl Store {
    /// The oldest events that the log may not have yet, of those behind a place in the outbox; 0 is
    /// before them all.
    pub async fn unpublished(
        &self,
        after: i64,
        limit: u32,
    ) -> Result<Vec<Unpublished>, StoreError> {
        let mut session = self.read().await?;
        let rows: Vec<(i64, Uuid, Vec<u8>)> = fetch_all!(
            &mut session,
            sqlx::query_as(
                "SELECT id, event_id, event FROM outbox WHERE id > $1 ORDER BY id LIMIT $2"
            )
            .bind(after)
            .bind(i64::from(limit))
        )?;
        let unpublished = |(place, event_id, event)| Unpublished {
            place,
            event_id,
            event: WrittenEvent::read(event),
        };
        Ok(rows.into_iter().map(unpublished).collect())
    }

    /// Takes out events that the log has; another process may have done so before.
    pub async fn published(&self, events: &[Uuid]) -> Result<(), StoreError> {
        let mut session = self.write().await?;
        // Chunks, because both dialects bound the number of parameters of a statement.
        for some in events.chunks(1000) {
            execute!(
                &mut session,
                {
                    let mut query = QueryBuilder::new("DELETE FROM outbox WHERE event_id IN (");
                    let mut ids = query.separated(", ");
                    for event in some {
                        ids.push_bind(*event);
                    }
                    query.push(")");
                    query
                }
                .build()
            )?;
        }
        session.commit().await
    }
}

/// Puts an event into the outbox, once, within a transaction.
pub(crate) async fn insert(
    session: &mut Session,
    event: &SignUpEvent,
    now: OffsetDateTime,
) -> Result<(), StoreError> {
    execute!(
        session,
        sqlx::query(
            "INSERT INTO outbox (event_id, event, written_at) VALUES ($1, $2, $3)
             ON CONFLICT DO NOTHING"
        )
        .bind(event.id)
        .bind(written(event))
        .bind(storable_time(now))
    )?;
    Ok(())
}

/// As it stands in the log. Bytes, because `jsonb` knows neither NUL nor every number.
pub(crate) fn written(event: &SignUpEvent) -> Vec<u8> {
    serde_json::to_vec(event).expect("an event has only text keys")
}

pub(crate) fn read(event: &[u8]) -> Result<SignUpEvent, StoreError> {
    // The source of the error can quote the event.
    serde_json::from_slice(event).map_err(|_| {
        StoreError::Misconfigured(Cause::new("a stored event has a form this version cannot read"))
    })
}
