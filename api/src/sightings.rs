//! Accounts that platforms were about to issue tokens to: the surest sign that a sign-up became one.
//!
//! A call before a token makes no event, and nobody waits for what is done here: what a call saw
//! goes into a bounded queue and from there into the store, which confirms the sign-up if it waits.
//! Where the queue is full it is dropped and counted, and the next sign-in says it again. Sign-ins
//! of somebody who was written down lately are not written again.

use std::{
    collections::HashMap,
    fmt,
    hash::{BuildHasher, RandomState},
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
    time::Duration,
};

use prometheus_client::{
    metrics::{counter::Counter, gauge::Gauge},
    registry::Registry,
};
use time::OffsetDateTime;
use tokio::{
    sync::mpsc,
    time::{Instant, sleep},
};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};
use uuid::Uuid;
use vestibule_events::{ConfirmationSource, ConnectorName, Person, PseudonymKey, SignUpEvent};
use vestibule_store::{Sighted, Store, StoreError};

/// At some 150 bytes each; a store that is away for a minute loses none of 150 sign-ins a second.
const QUEUE_MAX: usize = 10_000;

/// So many people are remembered as written down, twice over.
const KNOWN_MAX: usize = 100_000;

/// For so long, at the least: a sign-in is said again after this time, or twice it.
const KNOWN_FOR: Duration = Duration::from_secs(30 * 60);

/// While the store does not answer.
const PAUSE: Duration = Duration::from_secs(1);

/// Between two counts of the sign-ups that wait.
const COUNT_PAUSE: Duration = Duration::from_secs(5);

/// Takes what calls saw; cheap to clone.
#[derive(Clone)]
pub struct Sightings {
    queue: mpsc::Sender<Sighting>,
    known: Arc<Mutex<Known>>,
    counters: Counters,
}

/// Writes what calls saw into the store.
pub struct SightingsWriter {
    queue: mpsc::Receiver<Sighting>,
    known: Arc<Mutex<Known>>,
    counters: Counters,
    /// Empty until the store has been reached for the first time.
    store: Arc<OnceLock<Store>>,
    key: Arc<PseudonymKey>,
}

impl fmt::Debug for Sightings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Sightings(…)")
    }
}

impl fmt::Debug for SightingsWriter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SightingsWriter(…)")
    }
}

struct Sighting {
    connector: ConnectorName,
    person: Person,
    object_id: String,
    at: OffsetDateTime,
}

#[derive(Clone, Default)]
struct Counters {
    written: Counter,
    dropped: Counter,
    waiting: Gauge,
}

impl Sightings {
    /// Registers its metrics, `vestibule_confirm_…`, in `registry`.
    pub fn new(
        store: Arc<OnceLock<Store>>,
        key: Arc<PseudonymKey>,
        registry: &mut Registry,
    ) -> (Self, SightingsWriter) {
        let counters = Counters::default();
        let registry = registry.sub_registry_with_prefix("vestibule_confirm");
        registry.register(
            "accounts_seen",
            "Accounts that were about to get a token and were noted for their sign-ups",
            counters.written.clone(),
        );
        registry.register(
            "accounts_dropped",
            "Accounts that were about to get a token and could not be noted; the next sign-in says \
             it again",
            counters.dropped.clone(),
        );
        registry.register(
            "waiting",
            "Sign-ups that were let past and wait for their account",
            counters.waiting.clone(),
        );
        let (sender, receiver) = mpsc::channel(QUEUE_MAX);
        let known = Arc::new(Mutex::new(Known::default()));
        let writer = SightingsWriter {
            queue: receiver,
            known: Arc::clone(&known),
            counters: counters.clone(),
            store,
            key,
        };
        (Self { queue: sender, known, counters }, writer)
    }

    /// A platform is about to issue a token to somebody's account.
    pub(crate) fn saw(&self, connector: &ConnectorName, person: &Person, object_id: &str) {
        if lock(&self.known).knows(connector, person, object_id, Instant::now()) {
            return;
        }
        let sighting = Sighting {
            connector: connector.clone(),
            person: person.clone(),
            object_id: object_id.to_owned(),
            at: OffsetDateTime::now_utc(),
        };
        if self.queue.try_send(sighting).is_err() && self.counters.dropped.inc() == 0 {
            warn!(
                "an account that got a token could not be noted, for too many wait; the next \
                 sign-in says it again, and from now on this is only counted"
            );
        }
    }

    /// Somebody signs up: whatever account was seen before, the next token tells of a new one.
    pub(crate) fn forget(&self, connector: &ConnectorName, person: &Person) {
        lock(&self.known).forget(connector, person);
    }
}

impl SightingsWriter {
    /// Runs until `stop`, then writes what is left, as far as the store takes it.
    pub async fn run(mut self, stop: CancellationToken) {
        let mut counted = None;
        loop {
            if counted.is_none_or(|at: Instant| at.elapsed() >= COUNT_PAUSE) {
                counted = Some(Instant::now());
                self.count().await;
            }
            tokio::select! {
                biased;
                () = stop.cancelled() => break,
                sighting = self.queue.recv() => match sighting {
                    Some(sighting) => self.write_until(sighting, &stop).await,
                    None => break,
                },
                () = sleep(COUNT_PAUSE) => {}
            }
        }
        self.queue.close();
        while let Some(sighting) = self.queue.recv().await {
            self.write_until(sighting, &stop).await;
        }
    }

    /// Writes one down, as soon as the store takes it; after `stop` it is tried once.
    async fn write_until(&self, sighting: Sighting, stop: &CancellationToken) {
        let mut fails = false;
        loop {
            match self.write(&sighting).await {
                Ok(()) => {
                    if fails {
                        info!("accounts that got a token are noted again");
                    }
                    self.counters.written.inc();
                    let Sighting { connector, person, object_id, .. } = &sighting;
                    lock(&self.known).learn(connector, person, object_id, Instant::now());
                    return;
                }
                // What is refused now is refused later.
                Err(Some(StoreError::Refused(_))) => break,
                Err(_) if stop.is_cancelled() => break,
                Err(error) => {
                    if !fails && let Some(error) = error {
                        let error: &dyn std::error::Error = &error;
                        warn!(error, "accounts that get a token cannot be noted; they wait");
                    }
                    fails = true;
                    tokio::select! {
                        () = sleep(PAUSE) => {}
                        () = stop.cancelled() => {}
                    }
                }
            }
        }
        self.counters.dropped.inc();
    }

    /// `None` says that the store was never open so far.
    async fn write(&self, sighting: &Sighting) -> Result<(), Option<StoreError>> {
        let Sighting { connector, person, object_id, at } = sighting;
        let store = self.store.get().ok_or(None)?;
        let confirmed = |origin: &SignUpEvent| {
            let (id, now) = (Uuid::now_v7(), OffsetDateTime::now_utc());
            let source = ConfirmationSource::Token;
            SignUpEvent::confirmed(id, now, origin, object_id, source, &self.key)
        };
        let sighted = store.account_seen(person, connector, object_id, *at, confirmed).await?;
        if let Sighted::Unreadable(event) = sighted {
            warn!(
                %event,
                "an account was seen whose sign-up is in a form that this version cannot read; it is \
                 noted for a version that can"
            );
        }
        Ok(())
    }

    async fn count(&self) {
        let Some(store) = self.store.get() else { return };
        if let Ok(waiting) = store.confirmations_waiting().await {
            self.counters.waiting.set(i64::try_from(waiting).unwrap_or(i64::MAX));
        }
    }
}

fn lock(known: &Mutex<Known>) -> MutexGuard<'_, Known> {
    // Nothing panics while it is held.
    known.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Who was written down lately, as hashes: in two generations, the older of which is dropped when
/// the younger is full or has served its time.
struct Known {
    hasher: RandomState,
    young: HashMap<u64, u64>,
    old: HashMap<u64, u64>,
    since: Instant,
}

impl Default for Known {
    fn default() -> Self {
        Self {
            hasher: RandomState::new(),
            young: HashMap::new(),
            old: HashMap::new(),
            since: Instant::now(),
        }
    }
}

impl Known {
    fn knows(
        &mut self,
        connector: &ConnectorName,
        person: &Person,
        object_id: &str,
        now: Instant,
    ) -> bool {
        self.age(now);
        let (who, what) = self.hash(connector, person, object_id);
        [&self.young, &self.old].into_iter().any(|it| it.get(&who) == Some(&what))
    }

    fn learn(&mut self, connector: &ConnectorName, person: &Person, object_id: &str, now: Instant) {
        self.age(now);
        let (who, what) = self.hash(connector, person, object_id);
        self.old.remove(&who);
        self.young.insert(who, what);
    }

    fn forget(&mut self, connector: &ConnectorName, person: &Person) {
        let (who, _) = self.hash(connector, person, "");
        self.young.remove(&who);
        self.old.remove(&who);
    }

    fn age(&mut self, now: Instant) {
        if self.young.len() < KNOWN_MAX && now.duration_since(self.since) < KNOWN_FOR {
            return;
        }
        self.old = std::mem::take(&mut self.young);
        self.since = now;
    }

    fn hash(&self, connector: &ConnectorName, person: &Person, object_id: &str) -> (u64, u64) {
        let who = self.hasher.hash_one((connector.as_str(), person.as_str()));
        (who, self.hasher.hash_one(object_id))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn person(name: &str) -> Person {
        Person::from_pseudonym(name)
    }

    #[test]
    fn who_was_written_down_is_known_for_a_while() {
        let connector = "partners".parse().unwrap();
        let (mut known, start) = (Known::default(), Instant::now());
        let ada = person("ada");
        assert!(!known.knows(&connector, &ada, "1", start));
        known.learn(&connector, &ada, "1", start);
        assert!(known.knows(&connector, &ada, "1", start));
        assert!(!known.knows(&connector, &ada, "2", start), "another account");
        assert!(!known.knows(&"other".parse().unwrap(), &ada, "1", start), "another connector");
        assert!(!known.knows(&connector, &person("eve"), "1", start));

        assert!(known.knows(&connector, &ada, "1", start + KNOWN_FOR * 3 / 2), "one age later");
        assert!(!known.knows(&connector, &ada, "1", start + KNOWN_FOR * 3), "two ages later");
    }

    #[test]
    fn who_signs_up_again_is_not_known() {
        let connector = "partners".parse().unwrap();
        let (mut known, start) = (Known::default(), Instant::now());
        for name in ["ada", "eve"] {
            known.learn(&connector, &person(name), "1", start);
        }
        known.age(start + KNOWN_FOR * 3 / 2);
        known.forget(&connector, &person("ada"));
        assert!(!known.knows(&connector, &person("ada"), "1", start));
        assert!(known.knows(&connector, &person("eve"), "1", start));
    }

    #[test]
    fn only_so_many_are_remembered() {
        let connector = "partners".parse().unwrap();
        let (mut known, now) = (Known::default(), Instant::now());
        for number in 0..3 * KNOWN_MAX {
            known.learn(&connector, &person(&number.to_string()), "1", now);
        }
        assert!(known.young.len() + known.old.len() <= 2 * KNOWN_MAX);
        assert!(known.knows(&connector, &person(&(3 * KNOWN_MAX - 1).to_string()), "1", now));
    }

    #[tokio::test]
    async fn a_full_queue_drops_and_holds_nobody_up() {
        let (store, key) = (Arc::default(), Arc::new(PseudonymKey::new(vec![7; 32])));
        let (sightings, writer) = Sightings::new(store, key, &mut Registry::default());
        let connector = "partners".parse().unwrap();
        for number in 0..QUEUE_MAX + 3 {
            sightings.saw(&connector, &person(&number.to_string()), "1");
        }
        assert_eq!(sightings.counters.dropped.get(), 3);
        // Nor does a store that never was there hold up a stop.
        let stop = CancellationToken::new();
        stop.cancel();
        writer.run(stop).await;
        assert_eq!(sightings.counters.dropped.get(), QUEUE_MAX as u64 + 3);
        assert_eq!(sightings.counters.written.get(), 0);
    }
}
