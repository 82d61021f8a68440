//! What became of events: whether each was acted on, and exactly once.

use std::collections::HashMap;

use uuid::Uuid;

use crate::{Store, StoreError};

/// How often each effect of one event is in the store.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Effects {
    pub sign_ups: u32,
    pub person_changes: u32,
    pub grant_sets: u32,
    /// Sent or recorded, over all channels.
    pub notifications: u32,
    pub dead_letters: u32,
}

impl Store {
    /// The effects of each of `events`; of one the store has never heard of, none.
    pub async fn effects(&self, events: &[Uuid]) -> Result<HashMap<Uuid, Effects>, StoreError> {
        let _ = events;
        unimplemented!()
    }
}
