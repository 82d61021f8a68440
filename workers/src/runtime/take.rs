//! Taking events, from the log and from what waits in the store.
//!
//! Both queue for the same places in hand, so neither starves the other; and both stop at the gate.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use time::OffsetDateTime;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    task::{JoinError, JoinSet},
    time::sleep,
};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};
use vestibule_events::{Consumer, ConsumerSpec, Delivery, EventLog, LogError, SignUpEvent};
use vestibule_store::{Retry, StoreError};

use super::{
    Task, WorkerSettings,
    attempt::{Desk, InHand},
    gate::{Gate, Way},
    held::Held,
    order::Order,
    oversee::Watch,
    retry::{Pace, Rest},
    text,
};

/// Per attempt that may run there are so many events in hand: those that wait for their turn
/// behind an event of the same person must not keep the others from running.
const IN_HAND_PER_ATTEMPT: usize = 4;

/// One person may have so much of what is in hand, as a share.
const ONE_PERSON: usize = 4;

/// When more events of one person come than may wait, they come back after this.
const CROWDED: Duration = Duration::from_secs(1);

/// The same from the store, where each time is two writes.
const CROWDED_IN_STORE: Duration = Duration::from_secs(5);

/// So many are claimed from the store at once; a claim is a write.
const CLAIMED_AT_ONCE: usize = 16;

/// Between two looks into the store, however soon something is said to be due: what fails together
/// is claimed together.
const LOOK_AT_MOST_EVERY: Duration = Duration::from_millis(10);

/// With a rate, so many events are in hand as may begin while the slowest attempt runs, and in this
/// time: more would only be kept from other processes.
const WAITS_FOR_RATE: Duration = Duration::from_secs(5);

/// The events in hand of a worker.
#[derive(Debug)]
pub(super) struct Hands {
    tasks: Mutex<JoinSet<()>>,
    order: Order,
    places: Arc<Semaphore>,
    /// The one place of each source while the target is probed.
    probes: [Arc<Semaphore>; 2],
}

#[derive(Clone, Copy, Debug)]
enum Source {
    Log,
    Store,
}

impl Hands {
    pub(super) fn new(settings: &WorkerSettings) -> Self {
        let most = settings.concurrency.max(1).saturating_mul(IN_HAND_PER_ATTEMPT);
        let by_rate = settings.rate.map(|it| it.within(settings.timeout + WAITS_FOR_RATE));
        // Whoever waits for the log has a place in hand, and another is for the store.
        let most = most.min(by_rate.unwrap_or(usize::MAX)).clamp(2, Semaphore::MAX_PERMITS);
        Self {
            tasks: Mutex::default(),
            order: Order::new((most / ONE_PERSON).max(1)),
            places: Arc::new(Semaphore::new(most)),
            probes: [(); 2].map(|()| Arc::new(Semaphore::new(1))),
        }
    }

    /// Waits until the gate is open and there is a place in hand.
    async fn place(&self, gate: &Gate, source: Source) -> (Way, OwnedSemaphorePermit) {
        loop {
            let way = gate.opens().await;
            let places = match way {
                Way::Free => &self.places,
                Way::OneByOne | Way::Shut => &self.probes[source as usize],
            };
            tokio::select! {
                biased;
                () = gate.is_other_than(way) => {}
                place = Arc::clone(places).acquire_owned() => {
                    return (way, place.expect("nobody closes it"));
                }
            }
        }
    }

    /// As many more places as are free, up to `most` in all.
    fn more(&self, place: &mut OwnedSemaphorePermit, most: usize) {
        while place.num_permits() < most
            && let Ok(another) = Arc::clone(&self.places).try_acquire_owned()
        {
            place.merge(another);
        }
    }

    fn spawn(
        &self,
        desk: &Desk,
        place: OwnedSemaphorePermit,
        work: impl Future<Output = ()> + Send + 'static,
    ) {
        let mut tasks = self.tasks();
        while let Some(ended) = tasks.try_join_next() {
            complain_if_broken(desk, ended);
        }
        tasks.spawn(async move {
            work.await;
            drop(place);
        });
    }

    /// Waits until nothing is in hand any more. Aborts what is, if dropped before.
    pub(super) async fn emptied(&self, desk: &Desk) {
        let mut tasks = std::mem::take(&mut *self.tasks());
        while let Some(ended) = tasks.join_next().await {
            complain_if_broken(desk, ended);
        }
    }

    fn tasks(&self) -> MutexGuard<'_, JoinSet<()>> {
        // Nothing panics while it is held.
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn complain_if_broken(desk: &Desk, ended: Result<(), JoinError>) {
    if let Err(broken) = ended
        && broken.is_panic()
    {
        error!(worker = desk.name(), "the runtime broke at an event; it comes again");
    }
}

/// Takes events from the log until stopped or refused.
///
/// The consumer is open only while events are taken: what it has fetched ahead goes back to the log
/// when it is closed, for other processes, and so that it does not grow old in our hands.
pub(super) async fn from_log(
    desk: &Arc<Desk>,
    hands: &Hands,
    log: &dyn EventLog,
    spec: &ConsumerSpec,
    watch: &Watch,
    stop: &CancellationToken,
) -> Result<(), LogError> {
    // At once even if the worker is paused: where a new one starts counts from here.
    let mut consumer = open(log, spec, stop).await?;
    tokio::select! {
        biased;
        () = stop.cancelled() => return Ok(()),
        () = desk.gate.is_known() => {}
    }
    info!(worker = desk.name(), "worker runs");
    let mut pace = Pace::default();
    loop {
        let (_, place) = tokio::select! {
            biased;
            () = stop.cancelled() => return Ok(()),
            () = desk.gate.shuts(), if consumer.is_some() => {
                consumer = None;
                continue;
            }
            place = hands.place(&desk.gate, Source::Log) => place,
            () = sleep(desk.settings.heartbeat()), if consumer.is_some() => {
                consumer = None;
                continue;
            }
        };
        let open = match &mut consumer {
            Some(open) => open,
            None => match open(log, spec, stop).await? {
                Some(opened) => consumer.insert(opened),
                None => return Ok(()),
            },
        };
        let given = {
            let _waits = watch.waits();
            tokio::select! {
                biased;
                () = stop.cancelled() => return Ok(()),
                () = desk.gate.shuts() => None,
                () = watch.stalled() => None,
                given = open.next() => Some(given),
            }
        };
        match given {
            Some(Ok(delivery)) => {
                pace.succeeded();
                begin(desk, hands, place, delivery);
            }
            Some(Err(LogError::Unavailable(source))) => {
                // The consumer restores itself; this only keeps us from spinning if it does not
                // wait.
                let Rest { pause, tell } = pace.failed(std::time::Instant::now());
                let error = text::of(&source);
                if tell {
                    warn!(
                        worker = desk.name(),
                        error,
                        ?pause,
                        "the log gives no events; trying again"
                    );
                }
                rest(pause, stop).await;
            }
            Some(Err(refused @ LogError::Refused(_))) => return Err(refused),
            None => consumer = None,
        }
    }
}

async fn rest(pause: Duration, stop: &CancellationToken) {
    tokio::select! {
        () = stop.cancelled() => {}
        () = sleep(pause) => {}
    }
}

/// Opens the consumer, however long that takes. `None` if stopped meanwhile.
async fn open(
    log: &dyn EventLog,
    spec: &ConsumerSpec,
    stop: &CancellationToken,
) -> Result<Option<Box<dyn Consumer>>, LogError> {
    let mut pace = Pace::default();
    let opening = async {
        loop {
            match log.consumer(spec.clone()).await {
                Err(LogError::Unavailable(source)) => {
                    let Rest { pause, tell } = pace.failed(std::time::Instant::now());
                    let error = text::of(&source);
                    if tell {
                        warn!(
                            worker = spec.name,
                            error,
                            ?pause,
                            "cannot open the consumer; trying again"
                        );
                    }
                    sleep(pause).await;
                }
                other => return other,
            }
        }
    };
    tokio::select! {
        biased;
        () = stop.cancelled() => Ok(None),
        opened = opening => opened.map(Some),
    }
}

fn begin(desk: &Arc<Desk>, hands: &Hands, place: OwnedSemaphorePermit, delivery: Delivery) {
    let this = Arc::clone(desk);
    let Delivery { sequence, deliveries, event, acknowledge, .. } = delivery;
    let held = Held::Log(acknowledge);
    let event = match event {
        Ok(event) => event,
        Err(undecodable) => {
            hands.spawn(desk, place, async move {
                this.park_undecodable(sequence, &undecodable, held).await;
            });
            return;
        }
    };
    let Some(turn) = hands.order.enter(&event.person) else {
        hands.spawn(desk, place, async move { this.hand_back(held, CROWDED).await });
        return;
    };
    let attempt = u32::try_from(deliveries.max(1)).unwrap_or(u32::MAX);
    let task = Task { event, sequence, attempt };
    // The log forgets in a crash what it has delivered, so its count alone does not tell.
    let may_be_settled = deliveries > 1 || desk.has_set_aside();
    let in_hand = InHand { task, turn, held, may_be_settled };
    hands.spawn(desk, place, async move { this.deal_with(in_hand).await });
}

/// Takes events from the store as they are due, until stopped.
pub(super) async fn from_store(desk: &Arc<Desk>, hands: &Hands, stop: &CancellationToken) {
    let mut pace = Pace::default();
    loop {
        tokio::select! {
            biased;
            () = stop.cancelled() => return,
            _ = desk.gate.opens() => {}
        }
        // Not given up half way, for a claim that nobody hears of would wait for its lease to end.
        let pause = match take_due(desk, hands, stop).await {
            Ok(next_due) => {
                pace.succeeded();
                let until_due = next_due.map(|due_at| due_at - OffsetDateTime::now_utc());
                until_due.map_or(desk.rhythm.poll, |it| it.try_into().unwrap_or_default())
            }
            Err(error) => {
                let Rest { pause, tell } = pace.failed(std::time::Instant::now());
                if tell {
                    let error = text::of(&error.into());
                    warn!(
                        worker = desk.name(),
                        error,
                        ?pause,
                        "cannot learn what waits in the store; trying again"
                    );
                }
                pause
            }
        };
        rest(LOOK_AT_MOST_EVERY, stop).await;
        tokio::select! {
            () = rest(pause.min(desk.rhythm.poll), stop) => {}
            () = desk.due_sooner.notified() => {}
        }
    }
}

/// Claims what is due and there is room for. Says when the next is due.
async fn take_due(
    desk: &Arc<Desk>,
    hands: &Hands,
    stop: &CancellationToken,
) -> Result<Option<OffsetDateTime>, StoreError> {
    let store = &desk.store;
    loop {
        let next_due = store.next_retry(desk.name()).await?;
        if next_due.is_none_or(|it| it > OffsetDateTime::now_utc()) {
            return Ok(next_due);
        }
        let (way, mut places) = tokio::select! {
            biased;
            () = stop.cancelled() => return Ok(None),
            place = hands.place(&desk.gate, Source::Store) => place,
        };
        if way == Way::Free {
            hands.more(&mut places, CLAIMED_AT_ONCE);
        }
        let now = OffsetDateTime::now_utc();
        let limit = u32::try_from(places.num_permits()).unwrap_or(1);
        let lease = desk.settings.ack_wait;
        let claimed = store.claim_retries(desk.name(), now, lease, limit).await?;
        if claimed.is_empty() {
            // Another process has what is due in its hands, maybe for long: look again later.
            return Ok(None);
        }
        for retry in claimed {
            let place = places.split(1).expect("no more are claimed than there are places");
            begin_again(desk, hands, place, retry);
        }
    }
}

fn begin_again(desk: &Arc<Desk>, hands: &Hands, place: OwnedSemaphorePermit, retry: Retry) {
    let Some(lease) = desk.leases.take(retry.event_id) else { return };
    let this = Arc::clone(desk);
    let Ok(event) = serde_json::from_slice::<SignUpEvent>(&retry.payload) else {
        hands.spawn(desk, place, async move { this.park_unreadable_retry(retry, lease).await });
        return;
    };
    let held = Held::Store(lease);
    let Some(turn) = hands.order.enter(&event.person) else {
        hands.spawn(desk, place, async move { this.hand_back(held, CROWDED_IN_STORE).await });
        return;
    };
    let attempt = retry.tries.saturating_add(1);
    let task = Task { event, sequence: retry.sequence, attempt };
    let in_hand = InHand { task, turn, held, may_be_settled: false };
    hands.spawn(desk, place, async move { this.deal_with(in_hand).await });
}
