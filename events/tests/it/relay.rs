//! The relay between a real local log and a real nats-server that dies under it.

use std::{
    collections::BTreeSet,
    path::Path,
    time::{Duration, Instant},
};

use async_nats::{HeaderMap, jetstream::stream::DiscardPolicy};
use futures_util::{StreamExt as _, TryStreamExt as _, future::try_join_all};
use prometheus_client::registry::Registry;
use tempfile::TempDir;
use time::OffsetDateTime;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;
use vestibule_events::{
    ConsumerSpec, EventLog, Filter, JetStream, LocalLog, LocalLogConfig, LogError, Outcome, Replay,
    Retention, Start, WrittenEvent,
    relay::{self, Progress, RelayOptions},
};
use vestibule_testkit::{Nats, eventually};

use crate::jetstream::{config, connect, event, event_at, metric, operator, provisioned, stored};

const LIMIT: Duration = Duration::from_secs(60);

async fn open(directory: &Path) -> Result<LocalLog, LogError> {
    LocalLog::open(LocalLogConfig {
        path: directory.join("events.db"),
        duplicate_window: Duration::from_secs(600),
        refusal_window: Duration::from_secs(30),
        retention: Retention::BehindConsumer(relay::CONSUMER.into()),
    })
    .await
}

struct Running {
    stop: CancellationToken,
    progress: Progress,
    task: JoinHandle<Result<(), LogError>>,
}

impl Running {
    fn start(local: &LocalLog, stream: &JetStream) -> Self {
        let (stop, progress) = (CancellationToken::new(), Progress::default());
        let run = relay::run(
            local.clone(),
            stream.clone(),
            RelayOptions::default(),
            progress.clone(),
            stop.clone(),
        );
        Self { stop, progress, task: tokio::spawn(run) }
    }

    async fn end(self) -> anyhow::Result<()> {
        self.stop.cancel();
        Ok(self.task.await??)
    }
}

async fn append(local: &LocalLog, name: &str, count: usize) -> anyhow::Result<Vec<Uuid>> {
    let ids = futures_util::stream::iter(0..count)
        .map(async |n| {
            let event = event(&format!("{name}-{n}"));
            let id = event.id;
            local.append(event).await.map(|_| id)
        })
        .buffered(256);
    Ok(ids.try_collect().await?)
}

fn everything() -> Replay {
    Replay {
        start: Start::Beginning,
        until: None,
        filter: Filter::default(),
        person: None,
        follow: false,
    }
}

async fn read(log: &dyn EventLog) -> anyhow::Result<Vec<Uuid>> {
    Ok(log.replay(everything()).await?.map_ok(|stored| stored.event.id).try_collect().await?)
}

async fn drained(local: &LocalLog) -> anyhow::Result<()> {
    eventually(LIMIT, "the relay has caught up", async || {
        let backlog = local.backlog(relay::CONSUMER).await?;
        anyhow::Ok(backlog.is_some_and(|backlog| backlog.is_empty()))
    })
    .await
}

#[tokio::test]
async fn events_reach_the_stream_in_their_order() -> anyhow::Result<()> {
    let (nats, directory) = (Nats::start().await?, TempDir::new()?);
    let (stream, local) = (provisioned(&nats).await?, open(directory.path()).await?);
    append(&local, "person", 1000).await?;
    let appended = read(&local).await?;

    assert_eq!(relay::step(&local, &stream).await?, 1000);

    assert_eq!(read(&stream).await?, appended);
    assert_eq!(relay::step(&local, &stream).await?, 0, "something was relayed twice");
    Ok(())
}

#[tokio::test]
async fn an_event_reaches_the_stream_as_another_version_wrote_it() -> anyhow::Result<()> {
    let (nats, directory) = (Nats::start().await?, TempDir::new()?);
    let (stream, local) = (provisioned(&nats).await?, open(directory.path()).await?);
    let mut newer = serde_json::to_value(event("ada"))?;
    newer["data"]["decision"]["weight"] = 1.50.into();
    newer["extension"] = "new".into();
    // Neither the order of members nor spaces are ours.
    let written = format!(" {newer:#}").into_bytes();
    let spec = ConsumerSpec {
        name: "reader".into(),
        start: Start::Beginning,
        filter: Filter::default(),
        ack_wait: LIMIT,
        max_in_flight: 1,
    };

    local.append_written(WrittenEvent::read(written)?).await?;
    relay::step(&local, &stream).await?;

    let kept = local.consumer(spec.clone()).await?.next().await?.raw;
    assert_eq!(serde_json::from_slice::<serde_json::Value>(&kept)?, newer);
    let relayed = stream.consumer(spec).await?.next().await?.raw;
    assert_eq!(relayed, kept, "not as the local log has it");
    Ok(())
}

#[test]
fn what_is_no_event_is_not_taken_for_one() {
    let mut json = serde_json::to_vec(&event("ada")).unwrap();
    assert!(WrittenEvent::read(json.clone()).is_ok());
    // In a member that nobody reads.
    json.pop();
    json.extend(b",\"extension\":\"\xff\"}");
    for bytes in [json, b"{}".to_vec(), Vec::new()] {
        assert!(WrittenEvent::read(bytes).is_err());
    }
}

#[tokio::test]
async fn a_relay_goes_on_where_the_last_one_was() -> anyhow::Result<()> {
    let (nats, directory) = (Nats::start().await?, TempDir::new()?);
    let stream = provisioned(&nats).await?;
    let local = open(directory.path()).await?;
    append(&local, "first", 10).await?;
    relay::step(&local, &stream).await?;
    append(&local, "second", 10).await?;
    local.close().await?;

    let local = open(directory.path()).await?;
    let left = local.backlog(relay::CONSUMER).await?.map(|backlog| backlog.waiting);
    assert_eq!(left, Some(10));
    assert_eq!(relay::step(&local, &stream).await?, 10);
    assert_eq!(read(&stream).await?, read(&local).await?);
    Ok(())
}

#[tokio::test]
async fn who_waits_for_the_stream_is_told_when_it_has_the_event() -> anyhow::Result<()> {
    let (mut nats, directory) = (Nats::start().await?, TempDir::new()?);
    let (stream, local) = (provisioned(&nats).await?, open(directory.path()).await?);
    let relay = Running::start(&local, &stream);

    let one = local.append(event("one")).await?.stored;
    tokio::time::timeout(LIMIT, relay.progress.acknowledged(one.sequence)).await?;
    assert_eq!(read(&stream).await?, [one.event.id]);

    nats.kill();
    eventually(LIMIT, "the loss is noticed", async || !stream.is_connected()).await?;
    let two = local.append(event("two")).await?.stored;
    let early = relay.progress.acknowledged(two.sequence);
    assert!(tokio::time::timeout(Duration::from_millis(200), early).await.is_err());
    nats.restart().await?;
    tokio::time::timeout(LIMIT, relay.progress.acknowledged(two.sequence)).await?;
    assert_eq!(read(&stream).await?, [one.event.id, two.event.id]);
    relay.end().await?;

    // A new relay knows of both although it is given neither.
    let relay = Running::start(&local, &stream);
    for sequence in [one.sequence, two.sequence] {
        tokio::time::timeout(LIMIT, relay.progress.acknowledged(sequence)).await?;
    }
    relay.end().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backlog_of_an_outage_is_caught_up_with() -> anyhow::Result<()> {
    const COUNT: usize = 5000;
    let (mut nats, directory) = (Nats::start().await?, TempDir::new()?);
    let (stream, local) = (provisioned(&nats).await?, open(directory.path()).await?);
    let relay = Running::start(&local, &stream);
    let mut registry = Registry::default();
    relay.progress.register(&mut registry);

    nats.kill();
    append(&local, "person", COUNT).await?;
    eventually(LIMIT, "the backlog shows", async || {
        metric(&registry, "relay_backlog_events") as usize == COUNT
            && metric(&registry, "relay_connected") == 0.0
    })
    .await?;
    nats.restart().await?;
    let start = Instant::now();
    drained(&local).await?;
    println!("caught up with {COUNT} events in {:?}", start.elapsed());

    assert_eq!(read(&stream).await?, read(&local).await?);
    eventually(LIMIT, "the backlog is gone", async || {
        metric(&registry, "relay_backlog_events") == 0.0
            && metric(&registry, "relay_oldest_age_seconds") == 0.0
            && metric(&registry, "relay_connected") == 1.0
    })
    .await?;
    relay.end().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_lost_or_doubled_when_the_server_is_killed_under_load() -> anyhow::Result<()> {
    let (mut nats, directory) = (Nats::start().await?, TempDir::new()?);
    let (stream, local) = (provisioned(&nats).await?, open(directory.path()).await?);
    let relay = Running::start(&local, &stream);
    let mut registry = Registry::default();
    relay.progress.register(&mut registry);

    let appending = tokio::spawn({
        let local = local.clone();
        async move { append(&local, "person", 5000).await }
    });
    for relayed in [200.0, 1500.0, 3000.0] {
        eventually(LIMIT, "some are relayed", async || {
            metric(&registry, "relay_events_total") >= relayed
        })
        .await?;
        nats.kill();
        nats.restart().await?;
    }
    let appended = appending.await??;
    drained(&local).await?;
    relay.end().await?;

    let held = read(&stream).await?;
    assert_eq!(held.len(), appended.len());
    assert_eq!(held.into_iter().collect::<BTreeSet<_>>(), appended.into_iter().collect());
    Ok(())
}

#[tokio::test]
async fn two_relays_of_two_processes_store_one_call_once() -> anyhow::Result<()> {
    let nats = Nats::start().await?;
    let (one, other) = (TempDir::new()?, TempDir::new()?);
    let locals = try_join_all([open(one.path()), open(other.path())]).await?;
    provisioned(&nats).await?;

    // The platform's first attempt and its repetition reach different processes while NATS is away.
    for local in &locals {
        append(local, "person", 300).await?;
    }
    let streams = try_join_all([connect(config(&nats)), connect(config(&nats))]).await?;
    let relayed =
        try_join_all(locals.iter().zip(&streams).map(|(local, stream)| relay::step(local, stream)))
            .await?;

    assert_eq!(relayed, [300, 300]);
    assert_eq!(read(&streams[0]).await?.len(), 300);
    Ok(())
}

/// Each process has answered by its own decision, perhaps by other rules: both happened.
#[tokio::test]
async fn a_call_that_two_processes_answered_differently_is_two_events() -> anyhow::Result<()> {
    let nats = Nats::start().await?;
    let stream = provisioned(&nats).await?;
    let (one, other) = (TempDir::new()?, TempDir::new()?);
    let (one, other) = (open(one.path()).await?, open(other.path()).await?);
    let now = OffsetDateTime::now_utc();
    let refused = event_at("ada", Outcome::Block { message: "no".into() }, now);
    let later = now + Duration::from_secs(10);
    let accepted = event_at("ada", Outcome::unchanged(), later);
    let repeated = event_at("ada", Outcome::unchanged(), later);
    one.append(refused.clone()).await?;
    other.append(accepted.clone()).await?;

    assert_eq!(relay::step(&one, &stream).await?, 1);
    assert_eq!(relay::step(&other, &stream).await?, 1);

    assert_eq!(read(&stream).await?, [refused.id, accepted.id]);
    let third = TempDir::new()?;
    let third = open(third.path()).await?;
    third.append(repeated).await?;
    assert_eq!(relay::step(&third, &stream).await?, 1);
    assert_eq!(read(&stream).await?.len(), 2, "a repetition of the second is none of the first");
    Ok(())
}

#[tokio::test]
async fn after_a_restart_nobody_is_told_of_what_the_stream_has_not() -> anyhow::Result<()> {
    let small = "max_payload: 4KB\njetstream { sync_interval: always }";
    let (nats, directory) = (Nats::start_with_config(small).await?, TempDir::new()?);
    let (stream, local) = (provisioned(&nats).await?, open(directory.path()).await?);
    let mut large = event("large");
    large.sign_up.claims.insert("note".into(), "x".repeat(8192).into());
    let refused = local.append(large).await?.stored.sequence;
    let before = local.append(event("before")).await?.stored.sequence;
    let relay = Running::start(&local, &stream);
    tokio::time::timeout(LIMIT, relay.progress.acknowledged(before)).await?;
    relay.end().await?;
    local.close().await?;

    let local = open(directory.path()).await?;
    let relay = Running::start(&local, &stream);
    tokio::time::timeout(LIMIT, relay.progress.acknowledged(before)).await?;
    let after = local.append(event("after")).await?.stored.sequence;
    tokio::time::timeout(LIMIT, relay.progress.acknowledged(after)).await?;

    let early = relay.progress.acknowledged(refused);
    assert!(tokio::time::timeout(Duration::from_millis(200), early).await.is_err());
    relay.end().await
}

#[tokio::test]
async fn an_event_that_the_stream_refuses_stays_and_stops_no_other() -> anyhow::Result<()> {
    let small = "max_payload: 4KB\njetstream { sync_interval: always }";
    let (nats, directory) = (Nats::start_with_config(small).await?, TempDir::new()?);
    let (stream, local) = (provisioned(&nats).await?, open(directory.path()).await?);
    let mut large = event("large");
    large.sign_up.claims.insert("note".into(), "x".repeat(8192).into());
    local.append(large).await?;
    append(&local, "small", 10).await?;
    let relay = Running::start(&local, &stream);

    eventually(LIMIT, "the others are relayed", async || {
        anyhow::Ok(read(&stream).await?.len() == 10)
    })
    .await?;
    relay.end().await?;

    let left = local.backlog(relay::CONSUMER).await?;
    assert!(left.is_some_and(|left| left.waiting + left.in_flight == 1), "{left:?}");
    Ok(())
}

/// What readiness would say of the stream.
async fn trouble(stream: &JetStream) -> String {
    match stream.ready().await {
        Ok(()) => String::new(),
        Err(LogError::Unavailable(error) | LogError::Refused(error)) => error.to_string(),
    }
}

#[tokio::test]
async fn a_full_stream_keeps_what_it_has_and_the_relay_the_rest() -> anyhow::Result<()> {
    const COUNT: usize = 40;
    let (nats, directory) = (Nats::start().await?, TempDir::new()?);
    let mut small = config(&nats);
    small.max_bytes = 16 * 1024;
    let (stream, local) = (connect(small.clone()).await?, open(directory.path()).await?);
    stream.provision(&[]).await?;
    append(&local, "person", COUNT).await?;
    let relay = Running::start(&local, &stream);
    let mut registry = Registry::default();
    relay.progress.register(&mut registry);

    eventually(LIMIT, "the stream is full", async || {
        metric(&registry, "relay_stream_full") == 1.0 && trouble(&stream).await.contains("is full")
    })
    .await?;
    let kept = stored(&nats).await?;
    assert!(kept > 0 && kept < COUNT as u64, "{kept}");
    assert_eq!(read(&stream).await?[..], read(&local).await?[..kept as usize]);

    let roomier = connect(vestibule_events::JetStreamConfig { max_bytes: 1 << 20, ..small });
    roomier.await?.provision(&[]).await?;
    drained(&local).await?;
    assert_eq!(read(&stream).await?, read(&local).await?);
    eventually(LIMIT, "all is well", async || {
        metric(&registry, "relay_stream_full") == 0.0 && trouble(&stream).await.is_empty()
    })
    .await?;
    relay.end().await
}

#[tokio::test]
async fn a_stream_that_would_lose_events_is_given_none_before_it_is_mended() -> anyhow::Result<()> {
    let (nats, directory) = (Nats::start().await?, TempDir::new()?);
    let (stream, local) = (provisioned(&nats).await?, open(directory.path()).await?);
    let context = operator(&nats).await?;
    let mut settings = context.get_stream("SIGNUPS").await?.cached_info().config.clone();
    settings.discard = DiscardPolicy::Old;
    context.update_stream(&settings).await?;
    append(&local, "person", 3).await?;
    let relay = Running::start(&local, &stream);
    let mut registry = Registry::default();
    relay.progress.register(&mut registry);

    eventually(LIMIT, "nothing is published", async || {
        metric(&registry, "relay_held_back") == 1.0
            && trouble(&stream).await.contains("discard is Old and should be New")
    })
    .await?;
    assert_eq!(stored(&nats).await?, 0);

    settings.discard = DiscardPolicy::New;
    context.update_stream(&settings).await?;
    drained(&local).await?;
    assert_eq!(read(&stream).await?, read(&local).await?);
    assert_eq!(
        (metric(&registry, "relay_held_back"), trouble(&stream).await),
        (0.0, String::new())
    );
    relay.end().await
}

/// As it is when a relay crashes between publishing and acknowledging, and stays away for longer
/// than the server remembers message ids.
#[tokio::test]
async fn what_was_published_long_ago_is_not_published_again() -> anyhow::Result<()> {
    let (nats, directory) = (Nats::start().await?, TempDir::new()?);
    let mut forgetful = config(&nats);
    forgetful.duplicate_window = Duration::from_millis(50);
    forgetful.refusal_window = Duration::from_millis(50);
    let (stream, local) = (connect(forgetful).await?, open(directory.path()).await?);
    stream.provision(&[]).await?;
    append(&local, "person", 10).await?;
    let appended = read(&local).await?;
    let events: Vec<_> = local.replay(everything()).await?.try_collect().await?;
    for held in &events[..7] {
        stream.append(held.event.clone()).await?;
    }
    forgotten(&nats).await?;

    assert_eq!(relay::step(&local, &stream).await?, 10);

    let mut held = read_ours(&stream).await?;
    held.sort_unstable();
    let mut wanted = appended;
    wanted.sort_unstable();
    assert_eq!(held, wanted, "lost or doubled");
    Ok(())
}

/// Returns once the server no longer remembers the ids of what it was given before.
async fn forgotten(nats: &Nats) -> anyhow::Result<()> {
    let context = operator(nats).await?;
    let publish = async || {
        let mut headers = HeaderMap::new();
        headers.insert("Nats-Msg-Id", "marker");
        let subject = "signups.other.accepted";
        anyhow::Ok(context.publish_with_headers(subject, headers, "{}".into()).await?.await?)
    };
    publish().await?;
    eventually(LIMIT, "an id is forgotten", async || anyhow::Ok(!publish().await?.duplicate)).await
}

async fn read_ours(stream: &JetStream) -> anyhow::Result<Vec<Uuid>> {
    let items: Vec<_> = stream.replay(everything()).await?.collect().await;
    Ok(items.into_iter().filter_map(Result::ok).map(|it| it.event.id).collect())
}
