//! What every log promises, written once. `contract!(Place)` runs all of it against one.

use std::{
    collections::BTreeSet,
    future::Future,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use async_trait::async_trait;
use futures_util::{StreamExt, TryStreamExt, future::try_join_all};
use time::OffsetDateTime;
use vestibule_events::{
    Backlog, Consumer, ConsumerSpec, Delivery, EventLog, Filter, Kind, Replay, SignUpEvent, Start,
    Stored,
};

use crate::sample::call;

type Result = anyhow::Result<()>;

/// The windows with which a place opens its log.
pub(crate) const DUPLICATE_WINDOW: Duration = Duration::from_secs(600);
pub(crate) const REFUSAL_WINDOW: Duration = Duration::from_secs(30);

/// Somewhere with one log in it.
#[async_trait]
pub(crate) trait Place: Sized + Send + Sync {
    /// A place with nothing in it.
    async fn empty() -> anyhow::Result<Self>;

    /// Opens the log, and makes it at the first time.
    async fn open(&self) -> anyhow::Result<Arc<dyn EventLog>>;

    /// Ends the log's process in order and starts it again.
    async fn restart(&self, log: Arc<dyn EventLog>) -> anyhow::Result<Arc<dyn EventLog>>;
}

macro_rules! contract {
    ($place:ty) => {
        contract!(@ $place:
            events_are_read_in_the_order_of_their_appends
            what_was_appended_survives_a_restart
            a_repeated_call_is_handed_the_first_event
            a_repetition_is_recognised_after_a_restart
            after_its_window_the_same_call_is_a_new_event
            of_concurrent_repetitions_one_is_stored
            a_consumer_starts_where_it_is_told
            a_consumer_starts_once
            a_consumer_is_given_only_what_its_filter_lets_through
            a_waiting_consumer_is_given_what_is_appended
            what_is_acknowledged_does_not_come_again
            what_is_put_off_comes_again_after_its_delay
            what_is_put_off_holds_up_no_other
            what_is_not_acknowledged_comes_again_after_the_wait
            who_reports_progress_is_not_overtaken
            no_more_than_the_bound_is_in_flight
            giving_up_waiting_loses_nothing
            a_consumer_goes_on_after_a_restart
            consumers_do_not_know_of_each_other
            a_backlog_says_what_waits_and_what_is_in_flight
            replay_reads_by_place_kind_connector_person_and_time
            replay_ends_with_what_was_there_or_follows
        );
    };
    (@ $place:ty: $($name:ident)*) => {
        $(
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $name() -> anyhow::Result<()> {
                $crate::contract::$name::<$place>().await
            }
        )*
    };
}

pub(crate) async fn events_are_read_in_the_order_of_their_appends<P: Place>() -> Result {
    let place = P::empty().await?;
    let log = place.open().await?;

    let stored = append(&log, 1..=5).await?;

    ensure!(stored.windows(2).all(|it| it[0].sequence < it[1].sequence), "sequences rise");
    ensure!(all(&log).await? == stored);
    Ok(())
}

pub(crate) async fn what_was_appended_survives_a_restart<P: Place>() -> Result {
    let place = P::empty().await?;
    let log = place.open().await?;
    let mut stored = append(&log, 1..=3).await?;

    let log = place.restart(log).await?;
    stored.extend(append(&log, 4..=4).await?);

    ensure!(stored[3].sequence > stored[2].sequence, "no sequence is given twice");
    ensure!(all(&log).await? == stored);
    Ok(())
}

pub(crate) async fn a_repeated_call_is_handed_the_first_event<P: Place>() -> Result {
    let place = P::empty().await?;
    let log = place.open().await?;
    for first in [call(1), call(2).refused()] {
        let window = if first.refused { REFUSAL_WINDOW } else { DUPLICATE_WINDOW };
        let mut again = first.later(window - Duration::from_millis(1));
        // The facts have changed since, and so would the answer.
        again.refused = !first.refused;

        let stored = log.append(first.event()).await?;
        let repeated = log.append(again.event()).await?;

        ensure!(!stored.duplicate && repeated.duplicate);
        ensure!(repeated.stored == stored.stored, "the first event, with its decision");
    }
    ensure!(all(&log).await?.len() == 2);
    Ok(())
}

pub(crate) async fn a_repetition_is_recognised_after_a_restart<P: Place>() -> Result {
    let place = P::empty().await?;
    let log = place.open().await?;
    let stored = append(&log, 1..=3).await?;

    let log = place.restart(log).await?;
    let repeated = log.append(call(2).event()).await?;

    ensure!(repeated.duplicate && repeated.stored == stored[1]);
    ensure!(all(&log).await? == stored);
    Ok(())
}

pub(crate) async fn after_its_window_the_same_call_is_a_new_event<P: Place>() -> Result {
    let place = P::empty().await?;
    let log = place.open().await?;
    for (first, window) in [(call(1), DUPLICATE_WINDOW), (call(2).refused(), REFUSAL_WINDOW)] {
        let second = first.later(window);
        let third = second.later(Duration::from_secs(1));

        let one = log.append(first.event()).await?;
        let two = log.append(second.event()).await?;
        let repeated = log.append(third.event()).await?;

        ensure!(!two.duplicate && two.stored.sequence > one.stored.sequence);
        ensure!(repeated.duplicate && repeated.stored == two.stored, "the latest one counts");
    }
    ensure!(all(&log).await?.len() == 4);
    Ok(())
}

pub(crate) async fn of_concurrent_repetitions_one_is_stored<P: Place>() -> Result {
    let place = P::empty().await?;
    let log = place.open().await?;

    let appends = (0..40).map(|number| log.append(call(number % 4).event()));
    let appended = try_join_all(appends).await?;

    let stored = all(&log).await?;
    ensure!(stored.len() == 4, "{} stored", stored.len());
    ensure!(appended.iter().filter(|it| !it.duplicate).count() == 4);
    for (index, appended) in appended.iter().enumerate() {
        ensure!(stored.contains(&appended.stored));
        ensure!(appended.stored.event.fingerprint == call(index as u64 % 4).event().fingerprint);
    }
    Ok(())
}

pub(crate) async fn a_consumer_starts_where_it_is_told<P: Place>() -> Result {
    let place = P::empty().await?;
    let log = place.open().await?;
    let mut stored = append(&log, 1..=3).await?;
    let time = next_millisecond();
    stored.extend(append(&log, 4..=5).await?);

    let starts = [
        ("beginning", Start::Beginning, 0),
        ("sequence", Start::Sequence(stored[1].sequence), 1),
        ("time", Start::Time(time), 3),
        ("now", Start::Now, 5),
    ];
    let mut consumers = vec![];
    for (name, start, first) in starts {
        consumers.push((log.consumer(ConsumerSpec { start, ..spec(name) }).await?, first));
    }
    stored.extend(append(&log, 6..=6).await?);

    for (consumer, first) in &mut consumers {
        for expected in &stored[*first..] {
            let delivery = next(consumer).await?;
            ensure!(delivery.sequence == expected.sequence, "{consumer:?}: {delivery:?}");
            ensure!(delivery.event.as_ref().ok() == Some(&expected.event));
            delivery.acknowledge.ack().await?;
        }
    }
    Ok(())
}

pub(crate) async fn a_consumer_starts_once<P: Place>() -> Result {
    let place = P::empty().await?;
    let log = place.open().await?;
    let now = ConsumerSpec { start: Start::Now, ..spec("worker") };
    append(&log, 1..=1).await?;
    drop(log.consumer(now.clone()).await?);

    let stored = append(&log, 2..=2).await?;
    let log = place.restart(log).await?;
    let mut consumer = log.consumer(now).await?;

    ensure!(next(&mut consumer).await?.sequence == stored[0].sequence);
    Ok(())
}

pub(crate) async fn a_consumer_is_given_only_what_its_filter_lets_through<P: Place>() -> Result {
    let place = P::empty().await?;
    let log = place.open().await?;
    let calls = [
        call(1),
        call(2).refused(),
        call(3).at("customers"),
        call(4).at("customers").refused(),
        call(5),
    ];
    for call in calls {
        log.append(call.event()).await?;
    }
    let filters = [
        ("kinds", Filter { kinds: vec![Kind::Rejected], connectors: vec![] }, vec![2, 4]),
        (
            "connectors",
            Filter { kinds: vec![], connectors: vec!["customers".parse()?] },
            vec![3, 4],
        ),
        (
            "both",
            Filter { kinds: vec![Kind::Accepted], connectors: vec!["partners".parse()?] },
            vec![1, 5],
        ),
    ];
    for (name, filter, expected) in filters {
        let mut consumer = log.consumer(ConsumerSpec { filter, ..spec(name) }).await?;
        let waiting = backlog(&log, name).await?.waiting;
        ensure!(waiting == expected.len() as u64, "{name}: {waiting} wait");
        for number in expected {
            let delivery = next(&mut consumer).await?;
            ensure!(number_of(&delivery)? == number, "{name}: {delivery:?}");
            delivery.acknowledge.ack().await?;
        }
        let left = backlog(&log, name).await?;
        ensure!(left.is_empty(), "{name}: {left:?}");
    }
    Ok(())
}

pub(crate) async fn a_waiting_consumer_is_given_what_is_appended<P: Place>() -> Result {
    let place = P::empty().await?;
    let log = place.open().await?;
    let mut consumer = log.consumer(spec("worker")).await?;
    for number in 1..=3 {
        let waiting = tokio::spawn(async move {
            let delivery = next(&mut consumer).await;
            (consumer, delivery)
        });
        append(&log, number..=number).await?;
        let (back, delivery) = waiting.await?;
        let delivery = delivery?;
        ensure!(number_of(&delivery)? == number && delivery.deliveries == 1);
        delivery.acknowledge.ack().await?;
        consumer = back;
    }
    Ok(())
}

pub(crate) async fn what_is_acknowledged_does_not_come_again<P: Place>() -> Result {
    let place = P::empty().await?;
    let log = place.open().await?;
    let short = ConsumerSpec { ack_wait: Duration::from_secs(2), ..spec("worker") };
    let mut consumer = log.consumer(short.clone()).await?;
    append(&log, 1..=3).await?;
    for _ in 1..=3 {
        next(&mut consumer).await?.acknowledge.ack().await?;
    }
    // Far longer than the wait: anything to be delivered again would be by now.
    ensure!(nothing_within(Duration::from_secs(4), &mut consumer).await?);
    drop(consumer);

    let log = place.restart(log).await?;
    append(&log, 4..=4).await?;
    let mut consumer = log.consumer(short).await?;

    ensure!(number_of(&next(&mut consumer).await?)? == 4);
    Ok(())
}

pub(crate) async fn what_is_put_off_comes_again_after_its_delay<P: Place>() -> Result {
    let place = P::empty().await?;
    let log = place.open().await?;
    let mut consumer = log.consumer(spec("worker")).await?;
    append(&log, 1..=1).await?;
    let delay = Duration::from_millis(400);

    let first = next(&mut consumer).await?;
    let since = Instant::now();
    first.acknowledge.nack(delay).await?;
    let second = next(&mut consumer).await?;

    ensure!(since.elapsed() >= delay, "after {:?}", since.elapsed());
    ensure!((first.deliveries, second.deliveries) == (1, 2));
    ensure!(second.sequence == first.sequence);
    second.acknowledge.nack(Duration::ZERO).await?;
    let third = next(&mut consumer).await?;
    ensure!((third.sequence, third.deliveries) == (first.sequence, 3));
    third.acknowledge.ack().await?;
    ensure!(backlog(&log, "worker").await?.is_empty());
    Ok(())
}

pub(crate) async fn what_is_put_off_holds_up_no_other<P: Place>() -> Result {
    let place = P::empty().await?;
    let log = place.open().await?;
    let mut consumer = log.consumer(spec("worker")).await?;
    append(&log, 1..=3).await?;

    next(&mut consumer).await?.acknowledge.nack(Duration::from_secs(3600)).await?;

    for number in 2..=3 {
        let delivery = next(&mut consumer).await?;
        ensure!(number_of(&delivery)? == number);
        delivery.acknowledge.ack().await?;
    }
    let left = backlog(&log, "worker").await?;
    ensure!(left == Backlog { waiting: 0, in_flight: 1 }, "{left:?}");
    Ok(())
}

pub(crate) async fn what_is_not_acknowledged_comes_again_after_the_wait<P: Place>() -> Result {
    let place = P::empty().await?;
    let log = place.open().await?;
    let ack_wait = Duration::from_secs(2);
    let mut consumer = log.consumer(ConsumerSpec { ack_wait, ..spec("worker") }).await?;
    append(&log, 1..=1).await?;

    let before = Instant::now();
    let first = next(&mut consumer).await?;
    let second = next(&mut consumer).await?;

    ensure!(before.elapsed() >= ack_wait, "after {:?}", before.elapsed());
    ensure!(second.sequence == first.sequence && second.deliveries == 2);
    // Done is done, whoever says so.
    first.acknowledge.ack().await?;
    drop(second);
    ensure!(nothing_within(ack_wait * 2, &mut consumer).await?);
    Ok(())
}

pub(crate) async fn who_reports_progress_is_not_overtaken<P: Place>() -> Result {
    let place = P::empty().await?;
    let log = place.open().await?;
    let ack_wait = Duration::from_secs(5);
    let mut consumer = log.consumer(ConsumerSpec { ack_wait, ..spec("worker") }).await?;
    append(&log, 1..=1).await?;

    let delivery = next(&mut consumer).await?;
    for _ in 0..5 {
        delivery.acknowledge.progress().await?;
        ensure!(nothing_within(ack_wait / 4, &mut consumer).await?);
    }

    delivery.acknowledge.ack().await?;
    ensure!(backlog(&log, "worker").await?.is_empty());
    Ok(())
}

pub(crate) async fn no_more_than_the_bound_is_in_flight<P: Place>() -> Result {
    let place = P::empty().await?;
    let log = place.open().await?;
    let mut consumer = log.consumer(ConsumerSpec { max_in_flight: 2, ..spec("worker") }).await?;
    append(&log, 1..=4).await?;

    let one = next(&mut consumer).await?;
    let two = next(&mut consumer).await?;
    ensure!(nothing_within(Duration::from_millis(300), &mut consumer).await?);
    two.acknowledge.nack(Duration::from_secs(3600)).await?;
    ensure!(nothing_within(Duration::from_millis(300), &mut consumer).await?, "delayed ones count");
    one.acknowledge.ack().await?;

    let three = next(&mut consumer).await?;
    ensure!(number_of(&three)? == 3);
    let left = backlog(&log, "worker").await?;
    ensure!(left == Backlog { waiting: 1, in_flight: 2 }, "{left:?}");
    Ok(())
}

pub(crate) async fn giving_up_waiting_loses_nothing<P: Place>() -> Result {
    let place = P::empty().await?;
    let log = place.open().await?;
    let mut consumer = log.consumer(spec("worker")).await?;
    let mut delivered = BTreeSet::new();

    for number in 1..=20 {
        let append = log.append(call(number).event());
        // Whichever comes first ends the other in the middle of what it does, or nearly so.
        let (delivery, appended) = tokio::join!(
            tokio::time::timeout(Duration::from_micros(number * 150), consumer.next()),
            append
        );
        appended?;
        if let Ok(delivery) = delivery {
            let delivery = delivery?;
            delivered.insert(number_of(&delivery)?);
            delivery.acknowledge.ack().await?;
        }
    }
    while delivered.len() < 20 {
        let delivery = next(&mut consumer).await?;
        ensure!(delivery.deliveries == 1, "{delivery:?} was lost on the way before");
        delivered.insert(number_of(&delivery)?);
        delivery.acknowledge.ack().await?;
    }
    Ok(())
}

pub(crate) async fn a_consumer_goes_on_after_a_restart<P: Place>() -> Result {
    let place = P::empty().await?;
    let log = place.open().await?;
    let spec = ConsumerSpec { ack_wait: Duration::from_secs(4), ..spec("worker") };
    let mut consumer = log.consumer(spec.clone()).await?;
    append(&log, 1..=6).await?;
    let mut given = vec![];
    for _ in 1..=4 {
        given.push(next(&mut consumer).await?);
    }
    given[0].acknowledge.ack().await?;
    given[2].acknowledge.ack().await?;
    drop((consumer, given));

    let log = place.restart(log).await?;
    let mut consumer = log.consumer(spec).await?;
    let mut left = BTreeSet::new();
    while left.len() < 4 {
        let delivery = next(&mut consumer).await?;
        left.insert(number_of(&delivery)?);
        delivery.acknowledge.ack().await?;
    }

    ensure!(left == BTreeSet::from([2, 4, 5, 6]), "{left:?}");
    ensure!(backlog(&log, "worker").await?.is_empty());
    Ok(())
}

pub(crate) async fn consumers_do_not_know_of_each_other<P: Place>() -> Result {
    let place = P::empty().await?;
    let log = place.open().await?;
    let stuck = ConsumerSpec { max_in_flight: 1, ..spec("stuck") };
    let (mut stuck, mut swift) = (log.consumer(stuck).await?, log.consumer(spec("swift")).await?);
    append(&log, 1..=3).await?;

    let held = next(&mut stuck).await?;
    for number in 1..=3 {
        let delivery = next(&mut swift).await?;
        ensure!(number_of(&delivery)? == number);
        delivery.acknowledge.ack().await?;
    }

    ensure!(backlog(&log, "swift").await?.is_empty());
    ensure!(backlog(&log, "stuck").await? == Backlog { waiting: 2, in_flight: 1 });
    drop(held);
    Ok(())
}

pub(crate) async fn a_backlog_says_what_waits_and_what_is_in_flight<P: Place>() -> Result {
    let place = P::empty().await?;
    let log = place.open().await?;
    ensure!(log.backlog("worker").await?.is_none());
    append(&log, 1..=2).await?;
    let mut consumer = log.consumer(spec("worker")).await?;
    ensure!(backlog(&log, "worker").await? == Backlog { waiting: 2, in_flight: 0 });

    append(&log, 3..=5).await?;
    let delivery = next(&mut consumer).await?;
    let other = next(&mut consumer).await?;
    delivery.acknowledge.ack().await?;

    let found = backlog(&log, "worker").await?;
    // A log may deliver ahead of what it is asked for.
    ensure!(found.waiting + found.in_flight == 4 && found.in_flight >= 1, "{found:?}");
    drop(other);
    Ok(())
}

pub(crate) async fn replay_reads_by_place_kind_connector_person_and_time<P: Place>() -> Result {
    let place = P::empty().await?;
    let log = place.open().await?;
    let mut stored = append(&log, 1..=2).await?;
    let from = next_millisecond();
    for call in [call(3).refused(), call(4).at("customers")] {
        stored.push(log.append(call.event()).await?.stored);
    }
    let until = next_millisecond();
    stored.extend(append(&log, 5..=6).await?);

    let numbers = |replay: Replay| {
        let log = Arc::clone(&log);
        async move {
            let found: Vec<_> = log.replay(replay).await?.try_collect().await?;
            anyhow::Ok(found.iter().map(|it| number(&it.event)).collect::<Vec<_>>())
        }
    };
    let kinds = Filter { kinds: vec![Kind::Rejected], connectors: vec![] };
    let connectors = Filter { kinds: vec![], connectors: vec!["customers".parse()?] };
    let person = Some(stored[4].event.person.clone());
    let replays = [
        (Replay { start: Start::Sequence(stored[4].sequence), ..replay() }, vec![5, 6]),
        (Replay { start: Start::Sequence(stored[5].sequence + 1), ..replay() }, vec![]),
        (Replay { start: Start::Time(from), ..replay() }, vec![3, 4, 5, 6]),
        (Replay { start: Start::Time(until), ..replay() }, vec![5, 6]),
        (Replay { until: Some(until), ..replay() }, vec![1, 2, 3, 4]),
        (Replay { start: Start::Time(from), until: Some(until), ..replay() }, vec![3, 4]),
        (Replay { filter: kinds, ..replay() }, vec![3]),
        (Replay { filter: connectors, ..replay() }, vec![4]),
        (Replay { person, ..replay() }, vec![5]),
        (Replay { start: Start::Now, ..replay() }, vec![]),
    ];
    for (replay, expected) in replays {
        let shown = format!("{replay:?}");
        let found = soon(numbers(replay)).await??;
        ensure!(found == expected, "{shown} gave {found:?}");
    }
    Ok(())
}

pub(crate) async fn replay_ends_with_what_was_there_or_follows<P: Place>() -> Result {
    let place = P::empty().await?;
    let log = place.open().await?;
    append(&log, 1..=2).await?;

    let mut ends = log.replay(replay()).await?;
    let mut follows = log.replay(Replay { follow: true, ..replay() }).await?;
    let mut tail = log.replay(Replay { follow: true, start: Start::Now, ..replay() }).await?;
    append(&log, 3..=3).await?;

    for expected in 1..=2 {
        let found = soon(ends.next()).await?.context("ended too soon")??;
        ensure!(number(&found.event) == expected);
    }
    ensure!(soon(ends.next()).await?.is_none(), "what came later is not part of it");
    for expected in 1..=3 {
        let found = soon(follows.next()).await?.context("does not follow")??;
        ensure!(number(&found.event) == expected);
    }
    let found = soon(tail.next()).await?.context("does not follow")??;
    ensure!(number(&found.event) == 3);
    Ok(())
}

/// A consumer of everything from the beginning.
pub(crate) fn spec(name: &str) -> ConsumerSpec {
    ConsumerSpec {
        name: name.to_owned(),
        start: Start::Beginning,
        filter: Filter::default(),
        ack_wait: Duration::from_secs(30),
        max_in_flight: 100,
    }
}

/// A replay of everything that is there.
pub(crate) fn replay() -> Replay {
    Replay {
        start: Start::Beginning,
        until: None,
        filter: Filter::default(),
        person: None,
        follow: false,
    }
}

/// Appends an event of each number.
pub(crate) async fn append(
    log: &Arc<dyn EventLog>,
    numbers: impl IntoIterator<Item = u64>,
) -> anyhow::Result<Vec<Stored>> {
    let mut stored = vec![];
    for number in numbers {
        stored.push(log.append(call(number).event()).await?.stored);
    }
    Ok(stored)
}

/// Everything in the log.
pub(crate) async fn all(log: &Arc<dyn EventLog>) -> anyhow::Result<Vec<Stored>> {
    Ok(soon(log.replay(replay()).await?.try_collect()).await??)
}

/// The next delivery, which is expected.
pub(crate) async fn next(consumer: &mut Box<dyn Consumer>) -> anyhow::Result<Delivery> {
    Ok(soon(consumer.next()).await??)
}

async fn backlog(log: &Arc<dyn EventLog>, consumer: &str) -> anyhow::Result<Backlog> {
    log.backlog(consumer).await?.context("no such consumer")
}

/// Waits for what has to come; the limit is for a machine with much to do.
pub(crate) async fn soon<T>(future: impl Future<Output = T>) -> anyhow::Result<T> {
    tokio::time::timeout(Duration::from_secs(20), future).await.context("did not come")
}

/// That nothing comes can only be seen by waiting for it.
async fn nothing_within(time: Duration, consumer: &mut Box<dyn Consumer>) -> anyhow::Result<bool> {
    match tokio::time::timeout(time, consumer.next()).await {
        Err(_) => Ok(true),
        Ok(delivery) => Ok(delivery.map(|_| false)?),
    }
}

pub(crate) fn number(event: &SignUpEvent) -> u64 {
    event.sign_up.claims["number"].as_u64().unwrap_or_default()
}

pub(crate) fn number_of(delivery: &Delivery) -> anyhow::Result<u64> {
    Ok(number(delivery.event.as_ref().map_err(Clone::clone)?))
}

/// A time that is later than that of every event before, and of none after.
fn next_millisecond() -> OffsetDateTime {
    let to_the_millisecond =
        |time: OffsetDateTime| time.replace_millisecond(time.millisecond()).unwrap_or(time);
    let before = to_the_millisecond(OffsetDateTime::now_utc());
    loop {
        let now = to_the_millisecond(OffsetDateTime::now_utc());
        if now > before + Duration::from_millis(1) {
            return now;
        }
        std::thread::yield_now();
    }
}
