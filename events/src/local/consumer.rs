//! A durable consumer of the local log.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::anyhow;
use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use serde_json::json;
use time::OffsetDateTime;
use tokio::{
    sync::{Notify, watch},
    time::{Instant, sleep_until},
};

use super::{
    Inner,
    book::{Book, Saved, Turn},
    file::Sync,
    read::Row,
};
use crate::{
    Acknowledge, Consumer, ConsumerSpec, Delivery, Filter, LogError, SignUpEvent, Undecodable,
    event::TYPE_PREFIX,
};

/// Between attempts to read while the file does not let itself be read.
const PAUSES: [Duration; 4] = [
    Duration::from_millis(50),
    Duration::from_millis(200),
    Duration::from_secs(1),
    Duration::from_secs(5),
];

/// What all handles of one consumer share, and what is saved of it.
#[derive(Debug)]
pub(super) struct Durable {
    name: String,
    state: Mutex<State>,
    /// Something was acknowledged or put off: there may be room, or something due.
    changed: Notify,
    open: AtomicBool,
}

#[derive(Debug)]
struct State {
    book: Book,
    filter: SavedFilter,
    /// How many events of concern there are from the cursor up to `counted`; so that a backlog
    /// with a filter reads each event once, not each time.
    waiting: u64,
    counted: u64,
}

impl Durable {
    /// Of a consumer that had nothing yet.
    pub(super) fn create(name: &str, cursor: u64, filter: &Filter) -> Self {
        Self::with(name, Book::new(cursor), SavedFilter::of(filter))
    }

    /// As it was saved.
    pub(super) fn load(
        name: &str,
        cursor: u64,
        pending: &str,
        filter: &str,
    ) -> Result<Self, LogError> {
        let damaged = |error: serde_json::Error| {
            LogError::Refused(anyhow!(error).context(format!(
                "what the log holds about consumer {name} is damaged; \
                 removing its row from the table consumers makes it start anew"
            )))
        };
        let saved = Saved { cursor, pending: serde_json::from_str(pending).map_err(damaged)? };
        let filter = serde_json::from_str(filter).map_err(damaged)?;
        let book = Book::load(&saved, OffsetDateTime::now_utc(), Instant::now());
        Ok(Self::with(name, book, filter))
    }

    fn with(name: &str, book: Book, filter: SavedFilter) -> Self {
        let state = State { book, filter, waiting: 0, counted: 0 };
        Self {
            name: name.to_owned(),
            state: Mutex::new(state),
            changed: Notify::new(),
            open: AtomicBool::new(false),
        }
    }

    /// Whether it was free: one at a time has it.
    pub(super) fn take(&self) -> bool {
        !self.open.swap(true, Ordering::AcqRel)
    }

    pub(super) fn give_back(&self) {
        self.open.store(false, Ordering::Release);
    }

    /// The row to save: name, cursor, pending, filter.
    pub(super) fn row(&self) -> serde_json::Value {
        let state = self.state();
        let saved = state.book.save(OffsetDateTime::now_utc(), Instant::now());
        json!([self.name, saved.cursor, saved.pending, state.filter])
    }

    /// Everything below is done.
    pub(super) fn floor(&self) -> u64 {
        self.state().book.floor()
    }

    /// The first sequence that was not delivered yet, and those before it that are not done.
    pub(super) fn undone(&self) -> (u64, Vec<u64>) {
        let state = self.state();
        (state.book.cursor(), state.book.pending().collect())
    }

    pub(super) fn in_flight(&self) -> u64 {
        self.state().book.in_flight() as u64
    }

    /// What is to be counted to know how many wait: from where, and of which. `None`: it is known.
    pub(super) fn uncounted(&self, last: u64) -> (u64, Option<(u64, SavedFilter)>) {
        let mut state = self.state();
        state.settle_count();
        let from = state.counted + 1;
        (state.waiting, (from <= last).then(|| (from, state.filter.clone())))
    }

    /// `found` events of concern are there from `from` through `through`.
    pub(super) fn counted(&self, from: u64, through: u64, found: u64) -> u64 {
        let mut state = self.state();
        // Meanwhile another may have counted, or the cursor may have moved on: then this count
        // starts at another place than it was taken for, and the next one tells.
        state.settle_count();
        if state.counted + 1 == from {
            state.counted = through;
            state.waiting += found;
        }
        state.waiting
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing panics half way through a change of the book.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn settle_count(&mut self) {
        if self.book.cursor() > self.counted {
            self.counted = self.book.cursor() - 1;
            self.waiting = 0;
        }
    }

    fn given(&mut self, sequence: u64) {
        if sequence >= self.book.cursor() && sequence <= self.counted {
            self.waiting = self.waiting.saturating_sub(1);
        }
    }
}

/// The open handle of a consumer.
pub(super) struct LocalConsumer {
    log: Arc<Inner>,
    durable: Arc<Durable>,
    filter: Filter,
    ack_wait: Duration,
    max_in_flight: usize,
    last: watch::Receiver<u64>,
    /// Read ahead, from the cursor on.
    ahead: VecDeque<Row>,
    /// The next one is to be new where there is a choice.
    prefer_new: bool,
    failures: usize,
    /// After a failure, when to try again; kept here so that giving up waiting does not prolong it.
    retry_at: Option<Instant>,
}

impl std::fmt::Debug for LocalConsumer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "LocalConsumer({})", self.durable.name)
    }
}

impl LocalConsumer {
    /// Takes the one handle there is, until it is dropped.
    pub(super) async fn open(
        log: Arc<Inner>,
        durable: Arc<Durable>,
        spec: ConsumerSpec,
    ) -> Result<Self, LogError> {
        if !durable.take() {
            return Err(LogError::Refused(anyhow!(
                "consumer {} is open already in this process; one at a time reads under a name",
                spec.name
            )));
        }
        let last = log.last.clone();
        // From here on dropping this gives the handle back.
        let consumer = Self {
            log,
            durable,
            filter: spec.filter,
            ack_wait: spec.ack_wait,
            max_in_flight: spec.max_in_flight.max(1),
            last,
            ahead: VecDeque::new(),
            prefer_new: false,
            failures: 0,
            retry_at: None,
        };
        {
            let mut state = consumer.durable.state();
            let filter = SavedFilter::of(&consumer.filter);
            if state.filter != filter {
                (state.filter, state.waiting, state.counted) = (filter, 0, 0);
            }
        }
        // Synced: where it starts counts once, at its creation.
        consumer.log.save(&consumer.durable, Sync::Full).await?;
        Ok(consumer)
    }

    async fn wait(&mut self, due: Option<Instant>, for_new: bool) {
        let seen = *self.last.borrow_and_update();
        if for_new && self.durable.state().book.cursor() <= seen {
            return;
        }
        let due = async {
            match due {
                Some(due) => sleep_until(due).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = self.durable.changed.notified() => {}
            _ = self.last.changed(), if for_new => {}
            () = due => {}
            () = self.log.stop.cancelled() => {}
        }
    }

    /// An event that was delivered before. `None` where it need not be delivered any more.
    async fn again(&mut self, sequence: u64) -> Result<Option<Delivery>, LogError> {
        let event = match self.log.reader.row(sequence).await? {
            // The filter may be another than it was at the first delivery.
            Some(raw) => decode(&raw, &self.filter).map(|event| (event, raw)),
            None => {
                tracing::warn!(
                    consumer = self.durable.name,
                    sequence,
                    "retention removed an event that the consumer had not acknowledged"
                );
                None
            }
        };
        let mut state = self.durable.state();
        let Some((event, raw)) = event else {
            state.book.ack(sequence);
            return Ok(None);
        };
        let deliveries = state.book.deliver(sequence, Instant::now() + self.ack_wait);
        drop(state);
        Ok(Some(self.delivery(sequence, deliveries, event, raw)))
    }

    /// The next new event of concern in what was read ahead.
    fn new_ahead(&mut self) -> Option<Delivery> {
        while let Some((sequence, raw)) = self.ahead.pop_front() {
            let event = decode(&raw, &self.filter);
            let mut state = self.durable.state();
            let Some(event) = event else {
                state.book.pass(sequence);
                continue;
            };
            state.given(sequence);
            let deliveries = state.book.deliver(sequence, Instant::now() + self.ack_wait);
            drop(state);
            return Some(self.delivery(sequence, deliveries, event, raw));
        }
        None
    }

    /// Says so where retention removed events before the consumer came to them: nobody else can.
    fn note_gap(&self, cursor: u64, last: u64) {
        let next = self.ahead.front().map_or(last + 1, |(sequence, _)| *sequence);
        if next > cursor {
            tracing::warn!(
                consumer = self.durable.name,
                from = cursor,
                through = next - 1,
                "retention removed events before the consumer was given them"
            );
            self.durable.state().book.pass(next - 1);
        }
    }

    fn delivery(
        &self,
        sequence: u64,
        deliveries: u64,
        event: Result<SignUpEvent, Undecodable>,
        raw: Vec<u8>,
    ) -> Delivery {
        let receipt = Receipt {
            log: Arc::clone(&self.log),
            durable: Arc::clone(&self.durable),
            sequence,
            delivery: deliveries,
            ack_wait: self.ack_wait,
        };
        Delivery { sequence, deliveries, event, raw, acknowledge: Box::new(receipt) }
    }

    async fn attempt(&mut self) -> Result<Delivery, LogError> {
        loop {
            if self.log.stop.is_cancelled() {
                return Err(LogError::Refused(anyhow!("the log was closed")));
            }
            let turn =
                self.durable.state().book.turn(Instant::now(), self.max_in_flight, self.prefer_new);
            match turn {
                Turn::Again(sequence) => {
                    if let Some(delivery) = self.again(sequence).await? {
                        self.prefer_new = true;
                        return Ok(delivery);
                    }
                }
                Turn::New { due } => {
                    if let Some(delivery) = self.new_ahead() {
                        self.prefer_new = false;
                        return Ok(delivery);
                    }
                    let cursor = self.durable.state().book.cursor();
                    let last = *self.last.borrow();
                    if cursor <= last {
                        self.ahead = self.log.reader.page(cursor).await?;
                        self.note_gap(cursor, last);
                    } else if due.is_some_and(|due| due <= Instant::now()) {
                        // A new one would have come first, but there is none.
                        self.prefer_new = false;
                    } else {
                        self.wait(due, true).await;
                    }
                }
                Turn::Wait { due } => self.wait(due, false).await,
            }
        }
    }
}

#[async_trait]
impl Consumer for LocalConsumer {
    async fn next(&mut self) -> Result<Delivery, LogError> {
        if let Some(retry_at) = self.retry_at {
            sleep_until(retry_at).await;
            self.retry_at = None;
        }
        let result = self.attempt().await;
        if result.is_err() {
            let pause = PAUSES[self.failures.min(PAUSES.len() - 1)];
            self.failures += 1;
            self.retry_at = Some(Instant::now() + pause);
        } else {
            self.failures = 0;
        }
        result
    }
}

impl Drop for LocalConsumer {
    fn drop(&mut self) {
        self.durable.give_back();
    }
}

/// One delivery, to be acknowledged.
struct Receipt {
    log: Arc<Inner>,
    durable: Arc<Durable>,
    sequence: u64,
    delivery: u64,
    ack_wait: Duration,
}

impl std::fmt::Debug for Receipt {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Receipt({} of {})", self.sequence, self.durable.name)
    }
}

impl Receipt {
    /// What is in memory holds at once. Should saving fail, the next thing saved brings it along;
    /// only a restart before that makes it a delivery more.
    async fn save(&self) -> Result<(), LogError> {
        self.durable.changed.notify_one();
        self.log.save(&self.durable, Sync::Lazy).await
    }
}

#[async_trait]
impl Acknowledge for Receipt {
    async fn ack(&self) -> Result<(), LogError> {
        self.durable.state().book.ack(self.sequence);
        self.save().await
    }

    async fn nack(&self, delay: Duration) -> Result<(), LogError> {
        let due = after(delay);
        self.durable.state().book.nack(self.sequence, self.delivery, due);
        match self.save().await {
            // It comes again, be it saved or not; that nothing can be saved the writer says, once and
            // not for each event.
            Err(LogError::Unavailable(_)) => Ok(()),
            other => other,
        }
    }

    async fn progress(&self) -> Result<(), LogError> {
        let due = after(self.ack_wait);
        self.durable.state().book.progress(self.sequence, self.delivery, due);
        self.durable.changed.notify_one();
        Ok(())
    }
}

fn after(delay: Duration) -> Instant {
    let now = Instant::now();
    // Beyond the clock's end, a century does as well.
    now.checked_add(delay).unwrap_or(now + Duration::from_secs(100 * 365 * 86_400))
}

/// An event if it is of concern. What cannot be read, nobody can tell about: it is for everybody,
/// so that it is parked somewhere and not passed over.
fn decode(raw: &[u8], filter: &Filter) -> Option<Result<SignUpEvent, Undecodable>> {
    match Undecodable::decode(raw) {
        Ok(event) => filter.matches(&event).then_some(Ok(event)),
        Err(error) => SavedFilter::of(filter).may_match(raw).then_some(Err(error)),
    }
}

/// A filter as it lies on disk and as SQLite applies it: by the attributes of the envelope.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct SavedFilter {
    types: Vec<String>,
    sources: Vec<String>,
}

impl SavedFilter {
    pub(super) fn of(filter: &Filter) -> Self {
        Self {
            types: filter.kinds.iter().map(|kind| format!("{TYPE_PREFIX}{kind}")).collect(),
            sources: filter.connectors.iter().map(|it| format!("/connectors/{it}")).collect(),
        }
    }

    pub(super) fn parse(saved: &str) -> Result<Self, LogError> {
        serde_json::from_str(saved).map_err(|error| LogError::Refused(error.into()))
    }

    pub(super) fn is_empty(&self) -> bool {
        self.types.is_empty() && self.sources.is_empty()
    }

    pub(super) fn types_json(&self) -> String {
        json!(self.types).to_string()
    }

    pub(super) fn sources_json(&self) -> String {
        json!(self.sources).to_string()
    }

    /// Whether something that is no event of ours is of concern all the same.
    fn may_match(&self, raw: &[u8]) -> bool {
        #[derive(Deserialize)]
        struct Envelope {
            #[serde(rename = "type")]
            kind: Option<String>,
            source: Option<String>,
        }
        let within = |wanted: &[String], found: Option<String>| {
            wanted.is_empty() || found.is_some_and(|it| wanted.contains(&it))
        };
        match serde_json::from_slice::<Envelope>(raw) {
            Ok(it) => within(&self.types, it.kind) && within(&self.sources, it.source),
            Err(_) => true,
        }
    }
}
