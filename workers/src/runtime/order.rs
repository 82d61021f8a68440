//! One person at a time: who waits for whom.
//!
//! Events of one person take turns in the order in which they came; everyone else overtakes. What
//! is handed back to the log, for a later attempt or because too many wait, has given up its turn:
//! the person's next event goes on. Effects are guarded by the order of events, so an older one
//! that comes late overwrites nothing.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::oneshot;
use vestibule_events::Person;

/// The queues of all persons with an event in hand.
#[derive(Debug)]
pub(super) struct Order {
    lanes: Arc<Mutex<Lanes>>,
    /// So many of one person may be in hand; more would let one person fill the whole worker.
    each: usize,
}

type Lanes = HashMap<Person, Lane>;

#[derive(Debug)]
struct Lane {
    /// Resolves when the last of the lane has finished.
    last: oneshot::Receiver<()>,
    in_hand: usize,
}

/// A place in the queue of a person. Dropping it lets the next one go on, so neither a panic nor an
/// abort can block a person.
#[derive(Debug)]
pub(super) struct Turn {
    person: Person,
    lanes: Arc<Mutex<Lanes>>,
    before: Option<oneshot::Receiver<()>>,
    _done: oneshot::Sender<()>,
}

impl Order {
    pub(super) fn new(each: usize) -> Self {
        Self { lanes: Arc::default(), each }
    }

    /// The next place behind this person's earlier events, or `None` if too many wait already.
    pub(super) fn enter(&self, person: &Person) -> Option<Turn> {
        let (done, last) = oneshot::channel();
        let mut lanes = lock(&self.lanes);
        let before = match lanes.get_mut(person) {
            None => {
                lanes.insert(person.clone(), Lane { last, in_hand: 1 });
                None
            }
            Some(lane) if lane.in_hand >= self.each => return None,
            Some(lane) => {
                lane.in_hand += 1;
                Some(std::mem::replace(&mut lane.last, last))
            }
        };
        let lanes = self.lanes.clone();
        Some(Turn { person: person.clone(), lanes, before, _done: done })
    }
}

impl Turn {
    /// Waits until the earlier events of this person have been dealt with.
    pub(super) async fn comes(&mut self) {
        if let Some(before) = &mut self.before {
            // The sender never sends; that it is gone is the message.
            let _ = before.await;
            self.before = None;
        }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let mut lanes = lock(&self.lanes);
        if let Some(lane) = lanes.get_mut(&self.person) {
            lane.in_hand -= 1;
            if lane.in_hand == 0 {
                lanes.remove(&self.person);
            }
        }
    }
}

fn lock(lanes: &Mutex<Lanes>) -> MutexGuard<'_, Lanes> {
    // Nothing panics while it is held; and the map is whole between any two statements.
    lanes.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    fn person(name: &str) -> Person {
        Person::from_pseudonym(name)
    }

    #[test]
    fn one_person_waits_and_others_overtake() {
        let order = Order::new(8);
        let mut first = order.enter(&person("a")).unwrap();
        let mut second = order.enter(&person("a")).unwrap();
        let mut third = order.enter(&person("a")).unwrap();
        let mut other = order.enter(&person("b")).unwrap();

        assert!(first.comes().now_or_never().is_some());
        assert!(other.comes().now_or_never().is_some());
        assert!(second.comes().now_or_never().is_none());
        drop(first);
        assert!(second.comes().now_or_never().is_some());
        assert!(third.comes().now_or_never().is_none());
        drop(second);
        assert!(third.comes().now_or_never().is_some());
    }

    #[test]
    fn one_person_cannot_fill_the_worker_and_leaves_nothing_behind() {
        let order = Order::new(2);
        let first = order.enter(&person("a")).unwrap();
        let second = order.enter(&person("a")).unwrap();
        assert!(order.enter(&person("a")).is_none());
        assert!(order.enter(&person("b")).is_some());
        drop(first);
        let third = order.enter(&person("a")).unwrap();
        drop((second, third));
        assert!(lock(&order.lanes).is_empty());
    }
}
