//! Where an event in our hands came from, and so whom to tell what became of it.

use std::{
    collections::HashSet,
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use uuid::Uuid;
use vestibule_events::Acknowledge;

/// Who gave us an event.
#[derive(Debug)]
pub(super) enum Held {
    /// The log, which wants to hear of it.
    Log(Box<dyn Acknowledge>),
    /// The store, which keeps it from others for as long as the lease lasts.
    Store(Lease),
}

impl Held {
    pub(super) fn log(&self) -> Option<&dyn Acknowledge> {
        match self {
            Self::Log(acknowledge) => Some(&**acknowledge),
            Self::Store(_) => None,
        }
    }
}

/// The events from the store that are in our hands, so that their leases are extended together.
#[derive(Clone, Default)]
pub(super) struct Leases(Arc<Mutex<HashSet<Uuid>>>);

impl Leases {
    /// `None` if the event is in our hands already: then its lease ran out while the store could not
    /// be told to extend it.
    pub(super) fn take(&self, event_id: Uuid) -> Option<Lease> {
        let is_new = self.ids().insert(event_id);
        is_new.then(|| Lease { event_id, leases: self.clone(), ended: AtomicBool::new(false) })
    }

    pub(super) fn all(&self) -> Vec<Uuid> {
        self.ids().iter().copied().collect()
    }

    fn ids(&self) -> MutexGuard<'_, HashSet<Uuid>> {
        // Nothing panics while it is held.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Leases {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Leases({})", self.ids().len())
    }
}

/// The right to an event from the store. Ends when it is dropped, at the latest.
#[derive(Debug)]
pub(super) struct Lease {
    pub(super) event_id: Uuid,
    leases: Leases,
    ended: AtomicBool,
}

impl Lease {
    /// From now on it is not extended: the store is about to be told when the event is due, and that
    /// must hold. Once only, as the event may be in our hands anew thereafter.
    pub(super) fn end(&self) {
        if !self.ended.swap(true, Ordering::Relaxed) {
            self.leases.ids().remove(&self.event_id);
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.end();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_in_our_hands_once() {
        let (leases, event) = (Leases::default(), Uuid::now_v7());
        let lease = leases.take(event).unwrap();
        assert!(leases.take(event).is_none());
        assert_eq!(leases.all(), [event]);
        lease.end();
        assert!(leases.all().is_empty());
        let again = leases.take(event).unwrap();
        drop(lease);
        assert_eq!(leases.all(), [event], "an old lease ended a new one");
        drop(again);
        assert!(leases.all().is_empty());
    }
}
