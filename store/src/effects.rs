//! What became of events: whether each was acted on, and exactly once.

use std::collections::HashMap;

use sqlx::QueryBuilder;
use uuid::Uuid;

use crate::{
    Store, StoreError,
    session::{Session, fetch_all},
};

/// How often each effect of one event is in the store.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Effects {
    pub sign_ups: u32,
    pub person_changes: u32,
    pub grant_sets: u32,
    /// Sent or recorded, over all channels.
    pub notifications: u32,
    /// In which the event has ended without its effect: parked or dropped. One that was sent back
    /// still waits for its effect, and of one that was delivered there is the effect.
    pub dead_letters: u32,
}

impl Store {
    /// The effects of each of `events`; of one the store has never heard of, none.
    pub async fn effects(&self, events: &[Uuid]) -> Result<HashMap<Uuid, Effects>, StoreError> {
        let mut effects: HashMap<_, _> =
            events.iter().map(|event| (*event, Effects::default())).collect();
        let mut session = self.read().await?;
        for (table, count) in COUNTED {
            // Chunks, because both dialects bound the number of parameters of a statement.
            for some in events.chunks(1000) {
                for (event, rows) in count_rows(&mut session, table, some).await? {
                    let effects = effects.entry(event).or_default();
                    *count(effects) = u32::try_from(rows).unwrap_or(u32::MAX);
                }
            }
        }
        Ok(effects)
    }
}

/// Where the rows of each effect are, and where their number goes.
const COUNTED: [(&str, Field); 5] = [
    ("sign_ups WHERE", |effects| &mut effects.sign_ups),
    ("person_changes WHERE", |effects| &mut effects.person_changes),
    ("grant_sets WHERE", |effects| &mut effects.grant_sets),
    // One that is being sent has not happened yet.
    ("notifications WHERE state <> 'sending' AND", |effects| &mut effects.notifications),
    ("dead_letters WHERE state IN ('parked', 'dropped') AND", |effects| &mut effects.dead_letters),
];

type Field = fn(&mut Effects) -> &mut u32;

async fn count_rows(
    session: &mut Session,
    table: &str,
    events: &[Uuid],
) -> Result<Vec<(Uuid, i64)>, StoreError> {
    fetch_all!(
        session,
        {
            let mut query = QueryBuilder::new("SELECT event_id, count(*) FROM ");
            query.push(table).push(" event_id IN (");
            let mut ids = query.separated(", ");
            for event in events {
                ids.push_bind(*event);
            }
            query.push(") GROUP BY event_id");
            query
        }
        .build_query_as()
    )
}
