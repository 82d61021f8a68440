//! One person at a time: who waits for whom.
//!
//! Events of one person take turns in the order in which they came; everyone else overtakes. The
//! book-keeping is done by the loop alone, so it needs no lock; the waiting is done by the task
//! that holds a [`Turn`].

use std::collections::HashMap;

use tokio::sync::oneshot;
use vestibule_events::Person;

/// The queues of all persons with an event in hand.
#[derive(Debug)]
pub(crate) struct Order {
    lanes: HashMap<Person, Lane>,
    /// So many of one person may be in hand; more would let one person fill the whole worker.
    each: usize,
}

#[derive(Debug)]
struct Lane {
    /// Resolves when the last of the lane has finished.
    last: oneshot::Receiver<()>,
    in_hand: usize,
}

/// A place in the queue of a person. Dropping it lets the next one go on, so neither a panic nor an
/// abort can block a person.
#[derive(Debug)]
pub(crate) struct Turn {
    before: Option<oneshot::Receiver<()>>,
    _done: oneshot::Sender<()>,
}

impl Turn {
    /// Waits until the earlier events of this person have been dealt with.
    pub(crate) async fn comes(&mut self) {
        if let Some(before) = &mut self.before {
            // The sender never sends; that it is gone is the message.
            let _ = before.await;
            self.before = None;
        }
    }
}

impl Order {
    pub(crate) fn new(each: usize) -> Self {
        Self { lanes: HashMap::new(), each }
    }

    /// The next place behind this person's earlier events, or `None` if too many wait already.
    pub(crate) fn enter(&mut self, person: &Person) -> Option<Turn> {
        let (done, last) = oneshot::channel();
        let Some(lane) = self.lanes.get_mut(person) else {
            self.lanes.insert(person.clone(), Lane { last, in_hand: 1 });
            return Some(Turn { before: None, _done: done });
        };
        if lane.in_hand >= self.each {
            return None;
        }
        lane.in_hand += 1;
        Some(Turn { before: Some(std::mem::replace(&mut lane.last, last)), _done: done })
    }

    /// To be called once for each turn that was taken and has ended.
    pub(crate) fn leave(&mut self, person: &Person) {
        if let Some(lane) = self.lanes.get_mut(person) {
            lane.in_hand -= 1;
            if lane.in_hand == 0 {
                self.lanes.remove(person);
            }
        }
    }
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
        let mut order = Order::new(8);
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
        let mut order = Order::new(2);
        let turns = [order.enter(&person("a")).unwrap(), order.enter(&person("a")).unwrap()];
        assert!(order.enter(&person("a")).is_none());
        assert!(order.enter(&person("b")).is_some());
        drop(turns);
        order.leave(&person("a"));
        assert!(order.enter(&person("a")).is_some());
        order.leave(&person("a"));
        order.leave(&person("a"));
        order.leave(&person("b"));
        assert!(order.lanes.is_empty());
    }
}
