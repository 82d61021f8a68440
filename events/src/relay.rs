//! Local log → stream: publishes in order, many at a time, and lets the local log go behind it. Events
//! go on as they were written, whatever version wrote them.
//!
//! The relay is a durable consumer of the local log, so after any restart it goes on where it was;
//! what was published and not yet acknowledged then is published again and stored once. It holds a
//! bounded number of events and waits, for ever, while the stream is away, is full, or is set up so
//! that it would lose events. Events keep their order, except those on their way at the moment
//! something failed: they may be stored after younger ones. An event that the stream will never take
//! is set aside in the local log, tried again now and then, and shouted about; it does not stop the
//! others.
//!
//! The stream recognises what is published twice for as long as its duplicate window. What may have
//! been published longer ago, by a relay that crashed or over a connection that broke, is looked for
//! in the stream before it is published again.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use anyhow::anyhow;
use futures_util::{FutureExt as _, StreamExt as _, future::BoxFuture, stream::FuturesUnordered};
use prometheus_client::{
    metrics::{counter::Counter, gauge::Gauge},
    registry::{Registry, Unit},
};
use time::OffsetDateTime;
use tokio::{
    sync::{oneshot, watch},
    time::{Instant, MissedTickBehavior, interval, sleep, sleep_until},
};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};
use uuid::Uuid;

use crate::{
    Backlog, Consumer, ConsumerSpec, Delivery, EventLog, Filter, JetStream, LocalLog, LogError,
    Replay, Start, WrittenEvent,
    jetstream::{PublishError, Publishing, Survey},
};

/// The relay's durable consumer in the local log: what [`crate::Retention::BehindConsumer`] names.
pub const CONSUMER: &str = "relay";

/// How long an event that the stream refuses is set aside.
const REFUSED_PAUSE: Duration = Duration::from_secs(60);

/// Room for events set aside, beside those on their way.
const SET_ASIDE_MAX: usize = 4096;

/// The local log must not deliver again what we hold through a long outage; after a crash it does
/// so at once, whatever this says.
const ACK_WAIT: Duration = Duration::from_secs(24 * 60 * 60);

const PAUSE_FIRST: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(5);

/// How often the backlog is counted.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// How often the stream is looked at while all is well, and while it is not.
const SURVEY_EVERY: Duration = Duration::from_secs(30);
const SURVEY_AGAIN: Duration = Duration::from_secs(2);

/// An event so much younger than the stream's duplicate window is left to that: an event is
/// published a moment after its own time, and clocks differ.
const WINDOW_MARGIN: time::Duration = time::Duration::minutes(5);

/// At most so many ids are looked for, some 32 MB. Beyond them an event may be stored twice.
const RECALLED_MAX: usize = 1_000_000;

/// How the relay works.
#[derive(Clone, Copy, Debug)]
pub struct RelayOptions {
    /// Events on their way to the stream at a time.
    pub in_flight: usize,
}

impl Default for RelayOptions {
    /// A stream that syncs each event reaches its full rate with some 64; 256 covers a network.
    fn default() -> Self {
        Self { in_flight: 256 }
    }
}

/// Relays until stopped; what is on its way then is finished.
///
/// # Errors
///
/// When the local log refuses to be read. The stream's troubles are waited out.
pub async fn run(
    local: LocalLog,
    stream: JetStream,
    options: RelayOptions,
    progress: Progress,
    stop: CancellationToken,
) -> Result<(), LogError> {
    let mut relay = Relay::open(local, stream, options, progress).await?;
    let mut look = interval(LOOK_EVERY);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        relay.send_what_may_go().await;
        // Only the waiting is raced; what happened is always dealt with to its end.
        let happened = tokio::select! {
            () = stop.cancelled() => break,
            _ = look.tick() => {
                relay.look().await;
                continue;
            }
            happened = relay.happens() => happened,
        };
        relay.deal_with(happened).await?;
    }
    relay.finish().await;
    Ok(())
}

/// Relays what the local log holds now and says how many events that were.
///
/// # Errors
///
/// [`LogError::Unavailable`] where the stream did not take an event; nothing is lost.
pub async fn step(local: &LocalLog, stream: &JetStream) -> Result<u64, LogError> {
    let progress = Progress::default();
    let options = RelayOptions::default();
    let mut relay = Relay::open(local.clone(), stream.clone(), options, progress.clone()).await?;
    while !relay.is_idle()
        || local.backlog(CONSUMER).await?.is_some_and(|backlog| !backlog.is_empty())
    {
        relay.send_what_may_go().await;
        let happened = relay.happens().await;
        relay.deal_with(happened).await?;
        if relay.course != Course::Steady || progress.inner.refused.get() > 0 {
            relay.finish().await;
            return Err(LogError::Unavailable(anyhow!("the stream did not take every event")));
        }
    }
    Ok(progress.inner.relayed.get())
}

struct Relay {
    local: LocalLog,
    stream: JetStream,
    options: RelayOptions,
    progress: Progress,
    consumer: Box<dyn Consumer>,
    /// Taken from the local log and not on their way, by sequence: what failed goes before what is
    /// newer.
    waiting: BTreeMap<u64, Delivery>,
    on_their_way: FuturesUnordered<BoxFuture<'static, Settled>>,
    course: Course,
    /// What the stream was last found to be, and over which connection, counted by losses.
    surveyed: watch::Receiver<Option<(u64, Survey)>>,
    _surveyor: AbortOnDropHandle<()>,
    /// Up to this sequence an event may have been published without our knowing.
    doubtful: u64,
    recollection: Recollection,
    resume_at: Instant,
    pause: Duration,
    /// The kind of failure that was logged last.
    said: Option<&'static str>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Course {
    Steady,
    /// Something failed. Nothing is sent before all on their way are back: otherwise each failure
    /// would bring more events out of order.
    Recovering,
    /// One event is on its way, to see whether it goes through: a stream that is full or away is
    /// not to be given hundreds at each attempt, nor a small one before a large one.
    Probing,
}

/// The ids of doubtful events, as far as the stream holds them.
enum Recollection {
    None,
    Reading(BoxFuture<'static, Result<HashSet<Uuid>, LogError>>),
    Held(HashSet<Uuid>),
}

/// What came of one event on its way.
type Settled = Result<(), (Delivery, PublishError)>;

enum Happened {
    Settled(Settled),
    Delivered(Result<Delivery, LogError>),
    Recalled(Result<HashSet<Uuid>, LogError>),
    MayResume,
}

impl Relay {
    async fn open(
        local: LocalLog,
        stream: JetStream,
        options: RelayOptions,
        progress: Progress,
    ) -> Result<Self, LogError> {
        let spec = ConsumerSpec {
            name: CONSUMER.into(),
            start: Start::Beginning,
            filter: Filter::default(),
            ack_wait: ACK_WAIT,
            max_in_flight: options.in_flight + SET_ASIDE_MAX,
        };
        let consumer = local.consumer(spec).await?;
        if let Some((cursor, undone)) = local.undone(CONSUMER) {
            progress.begins(cursor, undone);
        }
        let (tell, surveyed) = watch::channel(None);
        let surveyor = tokio::spawn(survey(stream.clone(), progress.clone(), tell));
        let mut relay = Self {
            // Whatever an earlier relay had taken.
            doubtful: local.last_sequence(),
            local,
            stream,
            options,
            progress,
            consumer,
            waiting: BTreeMap::new(),
            on_their_way: FuturesUnordered::new(),
            course: Course::Steady,
            surveyed,
            _surveyor: AbortOnDropHandle::new(surveyor),
            recollection: Recollection::None,
            resume_at: Instant::now(),
            pause: PAUSE_FIRST,
            said: None,
        };
        relay.look().await;
        Ok(relay)
    }

    /// Waits for the next thing. Dropping the future loses nothing.
    async fn happens(&mut self) -> Happened {
        let has_room = self.waiting.len() + self.on_their_way.len() < self.options.in_flight;
        let is_reading = matches!(self.recollection, Recollection::Reading(_));
        let may_resume = !self.waiting.is_empty() && self.on_their_way.is_empty() && !is_reading;
        let (stream, resume_at) = (&self.stream, self.resume_at);
        let mut surveyed = self.surveyed.clone();
        let resumable = async move {
            sleep_until(resume_at).await;
            stream.connected().await;
            let is_current = |it: &Option<_>| matches!(it, Some((at, _)) if *at == stream.losses());
            // The surveyor ends with us only.
            surveyed.wait_for(is_current).await.ok();
        };
        let recalled = async {
            match &mut self.recollection {
                Recollection::Reading(reading) => reading.await,
                Recollection::None | Recollection::Held(_) => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            Some(settled) = self.on_their_way.next() => Happened::Settled(settled),
            recalled = recalled => Happened::Recalled(recalled),
            delivery = self.consumer.next(), if has_room => Happened::Delivered(delivery),
            () = resumable, if may_resume => Happened::MayResume,
        }
    }

    async fn deal_with(&mut self, happened: Happened) -> Result<(), LogError> {
        match happened {
            Happened::Settled(Ok(())) => self.went_through(),
            Happened::Recalled(recalled) => self.recalled(recalled),
            Happened::Settled(Err((delivery, error))) => self.failed(delivery, error).await,
            Happened::Delivered(Ok(delivery)) => self.taken(delivery).await,
            Happened::Delivered(Err(LogError::Unavailable(error))) => {
                tracing::warn!(%error, "could not read the local log; trying on");
            }
            Happened::Delivered(Err(error)) => return Err(error),
            Happened::MayResume => {}
        }
        Ok(())
    }

    async fn taken(&mut self, delivery: Delivery) {
        let sequence = delivery.sequence;
        self.progress.took(sequence, delivery.event.as_ref().ok().map(|event| event.time));
        if let Err(error) = &delivery.event {
            tracing::error!(sequence, %error, "could not relay an event; it stays in the local log");
            self.set_aside(&delivery).await;
        } else {
            self.waiting.insert(sequence, delivery);
        }
    }

    /// Sends, in order, whatever may be sent now.
    async fn send_what_may_go(&mut self) {
        let now = Instant::now();
        let must_wait = match self.course {
            Course::Steady => false,
            Course::Recovering => !self.on_their_way.is_empty() || now < self.resume_at,
            Course::Probing => true,
        };
        while !must_wait && self.may_send() {
            let Some((sequence, delivery)) = self.waiting.pop_first() else { break };
            let Ok(event) = &delivery.event else { continue };
            if matches!(&self.recollection, Recollection::Held(ids) if ids.contains(&event.id)) {
                self.on_their_way.push(confirm(delivery, self.progress.clone()).boxed());
                continue;
            }
            let written = WrittenEvent { event: event.clone(), json: delivery.raw.clone() };
            match self.stream.send(written).now_or_never() {
                Some(Ok(publishing)) => {
                    let progress = self.progress.clone();
                    self.on_their_way.push(settle(delivery, publishing, progress).boxed());
                    if self.course == Course::Recovering {
                        self.course = Course::Probing;
                        return;
                    }
                }
                Some(Err(error)) => return self.failed(delivery, error).await,
                // The connection takes no more before it has written some.
                None => {
                    self.waiting.insert(sequence, delivery);
                    return;
                }
            }
        }
    }

    /// Whether the stream is there, keeps what it is given, and will recognise the next event if it
    /// holds it already. Where it would not, this begins to find out.
    fn may_send(&mut self) -> bool {
        let Some((losses, survey)) = *self.surveyed.borrow() else { return false };
        if !self.stream.is_connected() || losses != self.stream.losses() {
            return false;
        }
        let Some((sequence, delivery)) = self.waiting.first_key_value() else { return false };
        if *sequence > self.doubtful {
            self.recollection = Recollection::None;
            return true;
        }
        match &self.recollection {
            Recollection::Held(_) => true,
            Recollection::Reading(_) => false,
            Recollection::None => {
                let Ok(event) = &delivery.event else { return true };
                let age = OffsetDateTime::now_utc() - event.time;
                if age + WINDOW_MARGIN < survey.duplicate_window {
                    return true;
                }
                let reading = recall(self.stream.clone(), event.time - WINDOW_MARGIN);
                self.recollection = Recollection::Reading(reading.boxed());
                false
            }
        }
    }

    fn recalled(&mut self, recalled: Result<HashSet<Uuid>, LogError>) {
        self.recollection = match recalled {
            Ok(ids) => Recollection::Held(ids),
            Err(error) => {
                let error = format!("{:#}", anyhow!(error));
                tracing::warn!(error, "could not learn which old events the stream holds");
                self.course = Course::Recovering;
                self.resume_later();
                Recollection::None
            }
        };
    }

    fn went_through(&mut self) {
        // Of several on their way one may go through after another has failed.
        if self.course == Course::Recovering {
            return;
        }
        self.course = Course::Steady;
        self.pause = PAUSE_FIRST;
        if self.said.take().is_some() {
            tracing::info!("the stream takes events again");
            self.progress.inner.full.set(0);
            self.stream.set_trouble(None);
        }
    }

    async fn failed(&mut self, delivery: Delivery, error: PublishError) {
        let sequence = delivery.sequence;
        if let PublishError::Refused(error) = error {
            tracing::error!(
                sequence,
                error = format!("{error:#}"),
                "the stream refuses an event; it stays in the local log"
            );
            self.set_aside(&delivery).await;
            if self.course == Course::Probing {
                self.course = Course::Recovering;
            }
            return;
        }
        let kind = error.as_str();
        if matches!(error, PublishError::Unknown(_)) {
            self.doubtful = self.doubtful.max(sequence);
        }
        if matches!(error, PublishError::Full(_)) {
            self.progress.inner.full.set(1);
            self.stream.set_trouble(Some(FULL.to_owned()));
        }
        // One outage makes hundreds of failures; the first of a kind says it.
        if self.said.replace(kind) != Some(kind) {
            let error = format!("{:#}", anyhow!(error));
            tracing::warn!(sequence, error, "could not relay an event; trying again");
        }
        if self.course != Course::Recovering {
            self.course = Course::Recovering;
            self.resume_later();
        }
        self.waiting.insert(sequence, delivery);
    }

    fn resume_later(&mut self) {
        self.resume_at = Instant::now() + self.pause;
        self.pause = (self.pause * 2).min(PAUSE_MAX);
    }

    async fn set_aside(&mut self, delivery: &Delivery) {
        self.progress.inner.refused.inc();
        if let Err(error) = delivery.acknowledge.nack(REFUSED_PAUSE).await {
            tracing::warn!(%error, "could not set an event aside; the local log delivers it again");
        }
    }

    /// Counts what is left.
    async fn look(&mut self) {
        self.progress.inner.connected.set(self.stream.is_connected().into());
        // Read first: what is appended in between must not pass for relayed.
        let last = self.local.last_sequence();
        match self.local.backlog(CONSUMER).await {
            Ok(Some(backlog)) => self.progress.counted(backlog, last, OffsetDateTime::now_utc()),
            Ok(None) => {}
            Err(error) => tracing::warn!(%error, "could not count what is left to relay"),
        }
    }

    fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.on_their_way.is_empty()
    }

    async fn finish(&mut self) {
        while let Some(settled) = self.on_their_way.next().await {
            if let Err((delivery, error)) = settled {
                self.failed(delivery, error).await;
            }
        }
        self.look().await;
    }
}

/// What to do about a stream without room.
const FULL: &str = "the stream is full and refuses events, which wait in the local log: raise \
                    `nats.max_bytes` (and the server's max_file_store) and run `vestibule migrate`";

/// Looks at the stream before the first event goes to it over a connection, and now and then.
async fn survey(stream: JetStream, progress: Progress, tell: watch::Sender<Option<(u64, Survey)>>) {
    let mut said = None;
    loop {
        stream.connected().await;
        let losses = stream.losses();
        let pause = match stream.survey().await {
            Ok(survey) => {
                progress.surveyed(&survey);
                tell.send_replace(Some((losses, survey)));
                if said.take().is_some() {
                    stream.set_trouble(None);
                }
                SURVEY_EVERY
            }
            // A busy server; what it said half a minute ago holds until it says otherwise.
            Err(LogError::Unavailable(_)) if matches!(*tell.borrow(), Some((surveyed, _)) if surveyed == losses) => {
                SURVEY_AGAIN
            }
            Err(LogError::Unavailable(error)) => {
                let words = format!("{error:#}");
                if said.as_ref() != Some(&words) {
                    tracing::warn!(error = words, "could not look at the stream before publishing");
                    said = Some(words);
                }
                SURVEY_AGAIN
            }
            Err(LogError::Refused(error)) => {
                let words = format!("{error:#}");
                tell.send_replace(None);
                progress.inner.held_back.set(1);
                stream.set_trouble(Some(words.clone()));
                if said.as_ref() != Some(&words) {
                    tracing::error!(error = words, "nothing is published before this is mended");
                    said = Some(words);
                }
                SURVEY_AGAIN
            }
        };
        stream.unless_lost(losses, sleep(pause)).await;
    }
}

/// The ids of the events that the stream holds from some time on.
async fn recall(stream: JetStream, since: OffsetDateTime) -> Result<HashSet<Uuid>, LogError> {
    tracing::info!("looking whether the stream holds what may have been published long ago");
    let replay = Replay {
        start: Start::Time(since),
        until: None,
        filter: Filter::default(),
        person: None,
        follow: false,
    };
    let mut held = stream.replay(replay).await?;
    let mut ids = HashSet::new();
    while let Some(stored) = held.next().await {
        match stored {
            Ok(stored) => ids.insert(stored.event.id),
            // Not one of ours.
            Err(LogError::Refused(_)) => continue,
            Err(error) => return Err(error),
        };
        if ids.len() == RECALLED_MAX {
            tracing::warn!("the stream holds too many events to compare; some may be stored twice");
            break;
        }
    }
    Ok(ids)
}

/// Waits for the stream's answer, tells who waits for it, and lets the local log go on.
async fn settle(delivery: Delivery, publishing: Publishing, progress: Progress) -> Settled {
    if let Err(error) = publishing.settled().await {
        return Err((delivery, error));
    }
    confirm(delivery, progress).await
}

async fn confirm(delivery: Delivery, progress: Progress) -> Settled {
    progress.done(delivery.sequence);
    match delivery.acknowledge.ack().await {
        Ok(()) => Ok(()),
        // Published again it is a duplicate, and then acknowledged again.
        Err(error) => Err((delivery, PublishError::Unknown(anyhow!(error)))),
    }
}

/// What of the local log the stream has acknowledged: to wait for, and to measure.
#[derive(Clone, Default)]
pub struct Progress {
    inner: Arc<Inner>,
}

#[derive(Default)]
struct Inner {
    state: Mutex<State>,
    relayed: Counter,
    refused: Counter,
    backlog: Gauge,
    oldest: Gauge,
    connected: Gauge,
    full: Gauge,
    held_back: Gauge,
    used: Gauge,
    limit: Gauge,
}

#[derive(Default)]
struct State {
    /// All up to here is acknowledged.
    floor: u64,
    /// The youngest that the relay was given; the local log gives new ones in order.
    taken: u64,
    /// Taken and not acknowledged, with the event's time.
    in_hand: BTreeMap<u64, Option<OffsetDateTime>>,
    waiters: HashMap<u64, Vec<oneshot::Sender<()>>>,
}

impl State {
    fn is_acknowledged(&self, sequence: u64) -> bool {
        sequence <= self.floor || (sequence <= self.taken && !self.in_hand.contains_key(&sequence))
    }
}

impl fmt::Debug for Progress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.state();
        write!(f, "Progress({} taken, {} in hand)", state.taken, state.in_hand.len())
    }
}

impl Progress {
    /// Returns once the stream has acknowledged this sequence of the local log. Bound the wait.
    pub async fn acknowledged(&self, sequence: u64) {
        let waiter = {
            let mut state = self.state();
            if state.is_acknowledged(sequence) {
                return;
            }
            let (tell, waiter) = oneshot::channel();
            state.waiters.entry(sequence).or_default().push(tell);
            waiter
        };
        // The sender lives in the state that we hold, and is only dropped to be used.
        waiter.await.ok();
    }

    /// Adds the relay's metrics to a registry.
    pub fn register(&self, registry: &mut Registry) {
        let registry = registry.sub_registry_with_prefix("relay");
        let inner = &self.inner;
        registry.register("events", "Events relayed to the stream", inner.relayed.clone());
        registry.register(
            "refusals",
            "Times that an event was set aside because the stream refuses it",
            inner.refused.clone(),
        );
        registry.register(
            "backlog_events",
            "Events of the local log that the stream has not acknowledged",
            inner.backlog.clone(),
        );
        registry.register_with_unit(
            "oldest_age",
            "Age of the oldest event that the stream has not acknowledged",
            Unit::Seconds,
            inner.oldest.clone(),
        );
        registry.register(
            "stream_full",
            "1 while the stream refuses events because it has no room",
            inner.full.clone(),
        );
        registry.register(
            "held_back",
            "1 while nothing is published because the stream is set up to lose events",
            inner.held_back.clone(),
        );
        registry.register_with_unit(
            "stream_used",
            "How large the stream is",
            Unit::Bytes,
            inner.used.clone(),
        );
        registry.register_with_unit(
            "stream_limit",
            "How large the stream may grow before it refuses events; -1 without a limit",
            Unit::Bytes,
            inner.limit.clone(),
        );
        registry.register("connected", "1 while connected to NATS", inner.connected.clone());
    }

    /// What was acknowledged before this relay was there, it is not given again; nor is it given at
    /// once what an earlier one set aside.
    fn begins(&self, cursor: u64, undone: Vec<u64>) {
        let mut state = self.state();
        state.in_hand.extend(undone.into_iter().map(|sequence| (sequence, None)));
        state.taken = state.taken.max(cursor.saturating_sub(1));
    }

    fn surveyed(&self, survey: &Survey) {
        let number = |bytes| i64::try_from(bytes).unwrap_or(i64::MAX);
        self.inner.held_back.set(0);
        self.inner.used.set(number(survey.used_bytes));
        self.inner.limit.set(survey.limit_bytes.map_or(-1, number));
    }

    fn took(&self, sequence: u64, time: Option<OffsetDateTime>) {
        let mut state = self.state();
        state.in_hand.insert(sequence, time);
        state.taken = state.taken.max(sequence);
    }

    fn done(&self, sequence: u64) {
        let waiters = {
            let mut state = self.state();
            // A second time where only our own acknowledgement had failed.
            if state.in_hand.remove(&sequence).is_some() {
                self.inner.relayed.inc();
            }
            state.waiters.remove(&sequence)
        };
        for waiter in waiters.into_iter().flatten() {
            waiter.send(()).ok(); // Whoever stopped waiting need not know.
        }
    }

    fn counted(&self, backlog: Backlog, last: u64, now: OffsetDateTime) {
        let left = backlog.waiting + backlog.in_flight;
        self.inner.backlog.set(i64::try_from(left).unwrap_or(i64::MAX));
        let mut state = self.state();
        if backlog.is_empty() {
            state.floor = state.floor.max(last);
        }
        let oldest = state.in_hand.values().flatten().min();
        let age = oldest.map_or(0, |oldest| (now - *oldest).whole_seconds().max(0));
        self.inner.oldest.set(age);
        let mut waiters = std::mem::take(&mut state.waiters);
        // Drops, and so wakes, those whose event needs no waiting, and forgets who stopped waiting.
        waiters.retain(|sequence, waiters| {
            waiters.retain(|waiter| !waiter.is_closed());
            !waiters.is_empty() && !state.is_acknowledged(*sequence)
        });
        state.waiters = waiters;
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // A panic elsewhere leaves the state whole: each change of it is one step.
        self.inner.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use time::macros::datetime;

    use super::*;

    const NOW: OffsetDateTime = datetime!(2026-11-22 10:00 UTC);

    fn is_told(progress: &Progress, sequence: u64) -> bool {
        progress.acknowledged(sequence).now_or_never().is_some()
    }

    #[test]
    fn only_what_is_done_is_told_as_done() {
        let progress = Progress::default();
        assert!(!is_told(&progress, 1), "nothing is known yet");
        progress.took(5, Some(NOW));
        progress.took(6, Some(NOW));
        assert!(is_told(&progress, 4), "the relay began after it");
        assert!(!is_told(&progress, 5) && !is_told(&progress, 6) && !is_told(&progress, 7));
        progress.done(6);
        assert!(!is_told(&progress, 5) && is_told(&progress, 6));
    }

    #[test]
    fn what_an_earlier_relay_left_is_not_done_and_all_else_is() {
        let progress = Progress::default();
        progress.begins(9, vec![5, 7]);
        progress.took(9, Some(NOW));
        assert!(is_told(&progress, 4) && is_told(&progress, 6) && is_told(&progress, 8));
        assert!(!is_told(&progress, 5) && !is_told(&progress, 7) && !is_told(&progress, 9));
        progress.took(5, Some(NOW));
        progress.done(5);
        assert!(is_told(&progress, 5) && !is_told(&progress, 7));
    }

    #[test]
    fn an_empty_backlog_says_that_all_before_is_done() {
        let progress = Progress::default();
        progress.counted(Backlog { waiting: 1, in_flight: 0 }, 3, NOW);
        assert!(!is_told(&progress, 3));
        progress.counted(Backlog { waiting: 0, in_flight: 0 }, 3, NOW);
        assert!(is_told(&progress, 3) && !is_told(&progress, 4));
    }

    #[test]
    fn who_stopped_waiting_is_forgotten() {
        let progress = Progress::default();
        for _ in 0..10 {
            assert!(!is_told(&progress, 1));
        }
        progress.counted(Backlog { waiting: 1, in_flight: 0 }, 1, NOW);
        assert!(progress.state().waiters.is_empty());
    }

    #[test]
    fn the_oldest_in_hand_gives_the_age() {
        let progress = Progress::default();
        progress.took(1, Some(NOW - Duration::from_secs(90)));
        progress.took(2, Some(NOW - Duration::from_secs(30)));
        let backlog = Backlog { waiting: 0, in_flight: 2 };
        progress.counted(backlog, 2, NOW);
        assert_eq!(progress.inner.oldest.get(), 90);
        progress.done(1);
        progress.counted(backlog, 2, NOW);
        assert_eq!(progress.inner.oldest.get(), 30);
    }
}
