//! The stream against a real nats-server that is killed, paused and restarted.

use std::{collections::BTreeSet, time::Duration};

use anyhow::Context as _;
use async_nats::jetstream::{self, consumer::pull, stream};
use futures_util::{StreamExt as _, TryStreamExt as _, future::try_join_all};
use prometheus_client::registry::Registry;
use time::OffsetDateTime;
use uuid::Uuid;
use vestibule_events::{
    AppendError, Claims, Consumer, ConsumerSpec, Decision, Delivery, Email, EventLog, Filter,
    Inspector, JetStream, JetStreamConfig, Kind, LogError, NatsCredentials, Outcome, Protocol,
    Provisioning, PseudonymKey, Replay, Role, SignUp, SignUpEvent, Start, Step,
};
use vestibule_testkit::{Nats, eventually};

/// Nothing that works takes so long, however busy the machine.
const LIMIT: Duration = Duration::from_secs(30);

pub(crate) fn config(nats: &Nats) -> JetStreamConfig {
    JetStreamConfig {
        url: nats.url(),
        credentials: NatsCredentials::None,
        role: Role::Provisioner,
        inbox_prefix: None,
        stream: "SIGNUPS".into(),
        duplicate_window: Duration::from_secs(600),
        refusal_window: Duration::from_secs(30),
        retention: Duration::from_secs(400 * 24 * 60 * 60),
        max_bytes: 64 * 1024 * 1024,
        replicas: 1,
    }
}

pub(crate) async fn connect(config: JetStreamConfig) -> anyhow::Result<JetStream> {
    let log = JetStream::connect(config).await?;
    eventually(LIMIT, "NATS is connected", async || log.is_connected()).await?;
    Ok(log)
}

pub(crate) async fn provisioned(nats: &Nats) -> anyhow::Result<JetStream> {
    let log = connect(config(nats)).await?;
    log.provision(&[]).await?;
    Ok(log)
}

/// Names the server as an operator would: with a client of its own.
pub(crate) async fn operator(nats: &Nats) -> anyhow::Result<jetstream::Context> {
    Ok(jetstream::new(async_nats::connect(nats.url()).await?))
}

pub(crate) async fn stored(nats: &Nats) -> anyhow::Result<u64> {
    Ok(operator(nats).await?.get_stream("SIGNUPS").await?.cached_info().state.messages)
}

pub(crate) fn event_at(person: &str, outcome: Outcome, time: OffsetDateTime) -> SignUpEvent {
    let sign_up = SignUp {
        connector: "partners".parse().expect("a valid name"),
        protocol: Protocol::ApiConnector,
        step: Step::BeforeCreate,
        email: Some(Email::new(format!("{person}@example.com"))),
        identities: vec![],
        claims: Claims::new(),
        client: None,
        locale: None,
        ip: None,
        object_id: None,
        correlation_id: None,
    };
    let key = PseudonymKey::new(vec![7; 32]);
    let person = key.person(&sign_up);
    let fingerprint = key.fingerprint(&sign_up, &person);
    let decision = Decision::new(outcome);
    SignUpEvent::decided(Uuid::now_v7(), time, person, fingerprint, sign_up, decision)
        .expect("this step makes an event")
}

pub(crate) fn event(person: &str) -> SignUpEvent {
    event_at(person, Outcome::unchanged(), OffsetDateTime::now_utc())
}

fn refusal() -> Outcome {
    Outcome::Block { message: "no".into() }
}

pub(crate) fn spec(name: &str) -> ConsumerSpec {
    ConsumerSpec {
        name: name.into(),
        start: Start::Beginning,
        filter: Filter::default(),
        ack_wait: Duration::from_secs(30),
        max_in_flight: 100,
    }
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

pub(crate) async fn next(consumer: &mut Box<dyn Consumer>) -> anyhow::Result<Delivery> {
    let limited = tokio::time::timeout(LIMIT, async {
        loop {
            match consumer.next().await {
                Err(LogError::Unavailable(_)) => {}
                other => return other,
            }
        }
    });
    Ok(limited.await.context("waited in vain for a delivery")??)
}

pub(crate) async fn ids(log: &JetStream) -> anyhow::Result<Vec<Uuid>> {
    Ok(log.replay(everything()).await?.map_ok(|stored| stored.event.id).try_collect().await?)
}

pub(crate) fn metric(registry: &Registry, name: &str) -> f64 {
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, registry).expect("a string takes all");
    let values = text.lines().filter(|line| line.starts_with(name));
    values.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
}

mod contract {
    use std::sync::Arc;

    use super::*;
    use crate::contract::{DUPLICATE_WINDOW, Place, REFUSAL_WINDOW};

    struct Server(Nats);

    #[async_trait::async_trait]
    impl Place for Server {
        async fn empty() -> anyhow::Result<Self> {
            here(|| async { Ok(Self(Nats::start().await?)) }).await
        }

        async fn open(&self) -> anyhow::Result<Arc<dyn EventLog>> {
            let windows = JetStreamConfig {
                duplicate_window: DUPLICATE_WINDOW,
                refusal_window: REFUSAL_WINDOW,
                ..config(&self.0)
            };
            let log = here(|| connect(windows)).await?;
            log.provision(&[]).await?;
            Ok(Arc::new(log))
        }

        async fn restart(&self, log: Arc<dyn EventLog>) -> anyhow::Result<Arc<dyn EventLog>> {
            drop(log);
            self.open().await
        }
    }

    /// Runs what waits with `eventually`, whose future cannot be sent, within one that must be.
    async fn here<T: Send + 'static, F: Future<Output = anyhow::Result<T>>>(
        make: impl FnOnce() -> F + Send + 'static,
    ) -> anyhow::Result<T> {
        let runtime = tokio::runtime::Handle::current();
        tokio::task::spawn_blocking(move || runtime.block_on(make())).await?
    }

    contract!(Server);
}

#[tokio::test]
async fn an_appended_event_is_in_the_stream_as_a_cloudevent() -> anyhow::Result<()> {
    let nats = Nats::start().await?;
    let log = provisioned(&nats).await?;
    let mut event = event("ada");
    event.traceparent = Some("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01".into());

    let appended = log.append(event.clone()).await?;

    assert!(!appended.duplicate);
    assert_eq!((appended.stored.sequence, &appended.stored.event), (1, &event));
    let stream = operator(&nats).await?.get_stream("SIGNUPS").await?;
    let message = stream.get_raw_message(1).await?;
    assert_eq!(message.subject.as_str(), "signups.partners.accepted");
    let header = |name: &str| message.headers.get(name).map(|value| value.as_str().to_owned());
    let content_type = header("Content-Type").unwrap_or_default();
    assert!(content_type.starts_with("application/cloudevents+json"), "{content_type}");
    assert_eq!(header("ce-id"), Some(event.id.to_string()));
    assert_eq!(header("ce-type"), Some("dev.vestibule.signup.accepted".into()));
    assert_eq!(header("ce-source"), Some("/connectors/partners".into()));
    assert_eq!(header("ce-subject"), Some(event.person.to_string()));
    assert_eq!(header("traceparent"), event.traceparent);
    assert_eq!(serde_json::from_slice::<SignUpEvent>(&message.payload)?, event);
    Ok(())
}

#[tokio::test]
async fn a_repeated_call_is_stored_once_within_its_window_and_anew_after_it() -> anyhow::Result<()>
{
    let nats = Nats::start().await?;
    let one = provisioned(&nats).await?;
    let other = connect(config(&nats)).await?;
    let start = OffsetDateTime::now_utc();
    let at = |seconds| event_at("ada", Outcome::unchanged(), start + Duration::from_secs(seconds));

    // Just within ten minutes of the first, through another process.
    let first = one.append(at(0)).await?.stored;
    let repeated = other.append(at(599)).await?;
    assert!(repeated.duplicate);
    assert_eq!(repeated.stored, first);

    // Ten minutes later it is a new sign-up, though the server still remembers the first one's id.
    let second = other.append(at(600)).await?;
    assert!(!second.duplicate);
    assert_eq!(second.stored.sequence, 2);

    // A repetition of the second, through the first process; and a third sign-up.
    let repeated = one.append(at(1100)).await?;
    assert_eq!((repeated.duplicate, repeated.stored.event.id), (true, second.stored.event.id));
    let third = one.append(at(1201)).await?;
    assert_eq!((third.duplicate, third.stored.sequence), (false, 3));

    // The same events again, as a relay sends them that learnt of nothing.
    for stored in [&first, &second.stored, &third.stored] {
        let again = other.append(stored.event.clone()).await?;
        assert_eq!((again.duplicate, &again.stored), (true, stored));
    }
    assert_eq!(stored(&nats).await?, 3);
    Ok(())
}

#[tokio::test]
async fn a_refusal_is_repeated_for_a_shorter_time() -> anyhow::Result<()> {
    let nats = Nats::start().await?;
    let log = provisioned(&nats).await?;
    let start = OffsetDateTime::now_utc();
    let at = |outcome, seconds| event_at("ada", outcome, start + Duration::from_secs(seconds));

    let refused = log.append(at(refusal(), 0)).await?.stored;
    let repeated = log.append(at(Outcome::unchanged(), 29)).await?;
    assert_eq!((repeated.duplicate, &repeated.stored), (true, &refused));

    let accepted = log.append(at(Outcome::unchanged(), 30)).await?;
    assert_eq!((accepted.duplicate, accepted.stored.sequence), (false, 2));
    let repeated = log.append(at(refusal(), 600)).await?;
    assert_eq!((repeated.duplicate, &repeated.stored), (true, &accepted.stored));
    Ok(())
}

#[tokio::test]
async fn an_older_call_that_arrives_later_is_measured_from_the_older_one() -> anyhow::Result<()> {
    let nats = Nats::start().await?;
    let log = provisioned(&nats).await?;
    let start = OffsetDateTime::now_utc();
    let at = |outcome, seconds| event_at("ada", outcome, start + Duration::from_secs(seconds));

    let newer = log.append(at(Outcome::unchanged(), 60)).await?.stored;

    // The refusal's own window was over when the newer call came: both happened.
    let refused = log.append(at(refusal(), 0)).await?;
    assert!(!refused.duplicate);
    let within = log.append(at(Outcome::unchanged(), 31)).await?;
    assert_eq!((within.duplicate, within.stored), (true, newer));
    Ok(())
}

#[tokio::test]
async fn one_call_through_many_processes_at_once_is_one_event() -> anyhow::Result<()> {
    let nats = Nats::start().await?;
    provisioned(&nats).await?;
    let logs = try_join_all((0..4).map(|_| connect(config(&nats)))).await?;
    let start = OffsetDateTime::now_utc();

    // Two sign-ups of one person, far enough apart; each call comes 32 times.
    for (minutes, expected) in [(0, 1), (15, 2), (30, 3)] {
        let time = start + Duration::from_secs(60 * minutes);
        let calls = (0..32).map(|n| {
            let event = event_at("ada", Outcome::unchanged(), time + Duration::from_millis(n));
            logs[n as usize % logs.len()].append(event)
        });
        let appended = try_join_all(calls).await?;
        assert_eq!(appended.iter().filter(|one| !one.duplicate).count(), 1);
        assert!(appended.iter().all(|one| one.stored == appended[0].stored));
        assert_eq!(stored(&nats).await?, expected);
    }
    Ok(())
}

#[tokio::test]
async fn what_failed_while_disconnected_never_turns_up_later() -> anyhow::Result<()> {
    let mut nats = Nats::start().await?;
    let log = provisioned(&nats).await?;
    log.append(event("before")).await?;

    nats.kill();
    eventually(LIMIT, "the loss is noticed", async || !log.is_connected()).await?;
    for n in 0..100 {
        let failed = log.append(event(&format!("ghost-{n}"))).await;
        assert!(matches!(failed, Err(AppendError::NotStored(_))), "{failed:?}");
    }
    nats.restart().await?;
    eventually(LIMIT, "NATS is back", async || log.is_connected()).await?;

    log.append(event("after")).await?;
    assert_eq!(stored(&nats).await?, 2);
    Ok(())
}

#[tokio::test]
async fn nothing_acknowledged_is_lost_or_doubled_by_kills_under_load() -> anyhow::Result<()> {
    let mut nats = Nats::start().await?;
    let log = provisioned(&nats).await?;

    // Each writer publishes until it learns that its event is stored, as the relay does.
    let writers = (0..32).map(|writer| {
        let log = log.clone();
        tokio::spawn(async move {
            let mut ids = vec![];
            for n in 0..30 {
                let event = event(&format!("{writer}-{n}"));
                while log.append(event.clone()).await.is_err() {
                    tokio::task::yield_now().await;
                }
                ids.push(event.id);
            }
            ids
        })
    });
    let writers: Vec<_> = writers.collect();
    for kill_at in [100, 400, 700] {
        eventually(LIMIT, "some are stored", async || anyhow::Ok(stored(&nats).await? >= kill_at))
            .await?;
        nats.kill();
        nats.restart().await?;
    }
    let acknowledged: BTreeSet<_> = try_join_all(writers).await?.into_iter().flatten().collect();

    let held = ids(&log).await?;
    assert_eq!(held.len(), 32 * 30, "an event is doubled or missing");
    assert_eq!(held.into_iter().collect::<BTreeSet<_>>(), acknowledged);
    Ok(())
}

#[tokio::test]
async fn a_consumer_has_its_next_event_promptly_after_a_restart() -> anyhow::Result<()> {
    let mut nats = Nats::start().await?;
    let log = provisioned(&nats).await?;
    let mut consumer = log.consumer(spec("worker")).await?;
    log.append(event("before")).await?;
    next(&mut consumer).await?.acknowledge.ack().await?;

    let mut soonest = LIMIT;
    // A busy machine may hold up one of them, and hardly all.
    for round in 1..=3 {
        let after = event(&format!("after-{round}"));
        // The consumer waits, as an idle worker does, while the server dies under it.
        let waiting = tokio::spawn({
            let id = after.id;
            async move {
                loop {
                    let delivery = next(&mut consumer).await?;
                    // Lost with the server, it only brings the event again.
                    let _ = delivery.acknowledge.ack().await;
                    if delivery.event?.id == id {
                        return anyhow::Ok((tokio::time::Instant::now(), consumer));
                    }
                }
            }
        });
        nats.kill();
        eventually(LIMIT, "the loss is noticed", async || !log.is_connected()).await?;
        nats.restart().await?;
        eventually(LIMIT, "NATS is back", async || log.is_connected()).await?;
        // It may still look for its stream.
        let stores = async || log.append(after.clone()).await.is_ok();
        eventually(LIMIT, "the event is stored", stores).await?;
        let appended = tokio::time::Instant::now();
        let (at, waited) = waiting.await??;
        consumer = waited;
        soonest = soonest.min(at.duration_since(appended));
    }
    assert!(soonest < Duration::from_secs(3), "{soonest:?}: waited for a pull to expire");
    Ok(())
}

#[tokio::test]
async fn a_consumer_that_hears_nothing_is_rebuilt_and_counted() -> anyhow::Result<()> {
    let nats = Nats::start().await?;
    let log = provisioned(&nats).await?;
    let mut registry = Registry::default();
    log.register(&mut registry);
    let mut consumer = log.consumer(spec("worker")).await?;
    let waiting = tokio::spawn(async move { next(&mut consumer).await?.event.context("decoded") });

    let stream = operator(&nats).await?.get_stream("SIGNUPS").await?;
    eventually(LIMIT, "a pull is out", async || {
        anyhow::Ok(stream.consumer_info("worker").await?.num_waiting > 0)
    })
    .await?;

    // Long enough for silence, too short for the connection to be given up.
    nats.pause();
    eventually(LIMIT, "silence is noticed", async || {
        metric(&registry, "stream_consumer_rebuilds_total") >= 1.0
    })
    .await?;
    nats.resume();

    let event = event("ada");
    eventually(LIMIT, "the event is stored", async || log.append(event.clone()).await.is_ok())
        .await?;
    assert_eq!(waiting.await??, event);
    Ok(())
}

#[tokio::test]
async fn a_worker_that_was_busy_takes_what_came_meanwhile() -> anyhow::Result<()> {
    let nats = Nats::start().await?;
    let log = provisioned(&nats).await?;
    let mut registry = Registry::default();
    log.register(&mut registry);
    for n in 0..3 {
        log.append(event(&n.to_string())).await?;
    }
    // Several at once, since it was left to chance which of both one took for true.
    let names: Vec<_> = (0..8).map(|n| format!("worker-{n}")).collect();
    let mut consumers = Vec::new();
    for name in &names {
        let mut consumer = log.consumer(spec(name)).await?;
        next(&mut consumer).await?.acknowledge.ack().await?;
        consumers.push(consumer);
    }

    // For longer than silence may last, nobody listens.
    let busy_since = std::time::Instant::now();
    eventually(LIMIT, "the silence is long", async || busy_since.elapsed().as_secs() >= 6).await?;

    for consumer in &mut consumers {
        for _ in 1..3 {
            let delivery = next(consumer).await?;
            assert_eq!(delivery.deliveries, 1, "handed back and delivered again");
            delivery.acknowledge.ack().await?;
        }
    }
    assert_eq!(metric(&registry, "stream_consumer_rebuilds_total"), 0.0);
    Ok(())
}

#[tokio::test]
async fn what_a_dropped_consumer_had_fetched_goes_to_the_next_at_once() -> anyhow::Result<()> {
    let nats = Nats::start().await?;
    let log = provisioned(&nats).await?;
    for n in 0..20 {
        log.append(event(&n.to_string())).await?;
    }
    let mut consumer = log.consumer(spec("worker")).await?;
    next(&mut consumer).await?.acknowledge.ack().await?;
    drop(consumer);

    // `ack_wait` is as long as the limit of one delivery, so nobody waits for it here.
    let mut consumer = log.consumer(spec("worker")).await?;
    let mut sequences = BTreeSet::new();
    while sequences.len() < 19 {
        let delivery = next(&mut consumer).await?;
        delivery.acknowledge.ack().await?;
        sequences.insert(delivery.sequence);
    }
    assert!(log.backlog("worker").await?.is_some_and(|backlog| backlog.is_empty()));
    Ok(())
}

#[tokio::test]
async fn an_acknowledgement_that_nobody_takes_is_an_error() -> anyhow::Result<()> {
    let nats = Nats::start().await?;
    let log = provisioned(&nats).await?;
    log.append(event("ada")).await?;
    let mut consumer = log.consumer(spec("worker")).await?;
    let delivery = next(&mut consumer).await?;
    operator(&nats).await?.get_stream("SIGNUPS").await?.delete_consumer("worker").await?;

    let acknowledged = delivery.acknowledge.ack().await;

    assert!(matches!(acknowledged, Err(LogError::Unavailable(_))), "{acknowledged:?}");
    Ok(())
}

#[tokio::test]
async fn bytes_that_are_no_event_are_delivered_as_such() -> anyhow::Result<()> {
    let nats = Nats::start().await?;
    let log = provisioned(&nats).await?;
    let foreign = r#"{"ada@example.com": 1}"#;
    operator(&nats).await?.publish("signups.partners.accepted", foreign.into()).await?.await?;
    log.append(event("ada")).await?;

    let mut consumer = log.consumer(spec("worker")).await?;
    let undecodable = next(&mut consumer).await?.event.expect_err("no event");
    assert_eq!(undecodable.raw, foreign.as_bytes());
    assert!(!undecodable.to_string().contains("ada"), "{undecodable}");
    assert!(next(&mut consumer).await?.event.is_ok());

    let items: Vec<_> = log.replay(everything()).await?.collect().await;
    assert!(matches!(&items[..], [Err(LogError::Refused(_)), Ok(_)]), "{items:?}");
    Ok(())
}

#[tokio::test]
async fn replay_reads_many_pages_and_chooses() -> anyhow::Result<()> {
    let nats = Nats::start().await?;
    let log = provisioned(&nats).await?;
    let start = OffsetDateTime::now_utc().replace_nanosecond(0)? - Duration::from_secs(3600);
    let at = |n: u64| start + Duration::from_secs(n);
    let events: Vec<_> = (0..600)
        .map(|n| {
            let outcome = if n % 3 == 0 { refusal() } else { Outcome::unchanged() };
            event_at(&n.to_string(), outcome, at(n))
        })
        .collect();
    for chunk in events.chunks(100) {
        // In order: the sequence is the index and one.
        for event in chunk {
            log.append(event.clone()).await?;
        }
    }
    let sequences = async |replay: Replay| -> anyhow::Result<Vec<u64>> {
        Ok(log.replay(replay).await?.map_ok(|stored| stored.sequence).try_collect().await?)
    };

    assert_eq!(sequences(everything()).await?, (1..=600).collect::<Vec<_>>());
    let tail = Replay { start: Start::Sequence(590), ..everything() };
    assert_eq!(sequences(tail).await?, (590..=600).collect::<Vec<_>>());
    let between = Replay { start: Start::Time(at(10)), until: Some(at(20)), ..everything() };
    assert_eq!(sequences(between).await?, (11..=20).collect::<Vec<_>>());
    let kinds = Filter { kinds: vec![Kind::Blocked], connectors: vec![] };
    let blocked = Replay { filter: kinds, ..everything() };
    assert_eq!(sequences(blocked).await?, (0..200).map(|n| n * 3 + 1).collect::<Vec<_>>());
    let nobody = Filter { kinds: vec![], connectors: vec!["other".parse()?] };
    assert!(sequences(Replay { filter: nobody, ..everything() }).await?.is_empty());
    let person = Replay { person: Some(events[7].person.clone()), ..everything() };
    assert_eq!(sequences(person).await?, [8]);
    assert!(sequences(Replay { start: Start::Now, ..everything() }).await?.is_empty());
    Ok(())
}

#[tokio::test]
async fn a_follower_sees_what_is_appended_later_over_a_restart() -> anyhow::Result<()> {
    let mut nats = Nats::start().await?;
    let log = provisioned(&nats).await?;
    log.append(event("old")).await?;
    let follow = Replay { start: Start::Now, follow: true, ..everything() };
    let mut followed = log.replay(follow).await?.filter_map(async |item| item.ok()).boxed();

    let one = event("one");
    log.append(one.clone()).await?;
    assert_eq!(followed.next().await.context("the stream ended")?.event, one);
    nats.kill();
    nats.restart().await?;
    let two = event("two");
    eventually(LIMIT, "the event is stored", async || log.append(two.clone()).await.is_ok())
        .await?;
    assert_eq!(followed.next().await.context("the stream ended")?.event, two);
    Ok(())
}

#[tokio::test]
async fn provisioning_makes_a_stream_that_loses_nothing_and_leaves_it_at_that() -> anyhow::Result<()>
{
    let nats = Nats::start().await?;
    let log = connect(config(&nats)).await?;
    assert!(log.ready().await.is_err(), "there is no stream yet");
    let specs = [spec("notify"), spec("database")];

    let created = log.provision(&specs).await?;
    assert_eq!(created.stream, Provisioning::Created);
    assert_eq!(created.consumers[1], ("database".into(), Provisioning::Created));
    log.ready().await?;

    let stream = operator(&nats).await?.get_stream("SIGNUPS").await?;
    let found = stream.cached_info().config.clone();
    assert_eq!(found.subjects, ["signups.>"]);
    assert_eq!(found.discard, stream::DiscardPolicy::New);
    assert!(found.deny_delete && found.deny_purge && found.allow_direct);
    assert!(!found.allow_rollup && !found.allow_message_ttl && !found.allow_message_schedules);
    assert!(stream.purge().await.is_err());
    let durable = stream.get_consumer::<pull::Config>("notify").await;
    let durable = durable.map_err(anyhow::Error::from_boxed)?;
    assert_eq!(durable.cached_info().config.max_deliver, -1);
    assert!(durable.cached_info().config.backoff.is_empty());

    let again = log.provision(&specs).await?;
    assert_eq!(again.stream, Provisioning::Unchanged);
    assert!(again.consumers.iter().all(|(_, it)| *it == Provisioning::Unchanged));
    Ok(())
}

#[tokio::test]
async fn provisioning_grants_more_and_refuses_to_take_away() -> anyhow::Result<()> {
    let nats = Nats::start().await?;
    let log = provisioned(&nats).await?;
    log.provision(&[spec("notify")]).await?;

    let mut roomier = config(&nats);
    roomier.max_bytes *= 2;
    let blocked = Filter { kinds: vec![Kind::Blocked], connectors: vec![] };
    let narrower = ConsumerSpec { filter: blocked, ..spec("notify") };
    let updated = connect(roomier).await?.provision(&[narrower]).await?;
    assert_eq!(updated.stream, Provisioning::Updated);
    assert_eq!(updated.consumers[0].1, Provisioning::Updated);

    let mut shorter = config(&nats);
    shorter.retention = Duration::from_secs(3600);
    let refused = connect(shorter).await?.provision(&[]).await;
    let Err(LogError::Refused(error)) = refused else {
        anyhow::bail!("not refused: {refused:?}");
    };
    let text = error.to_string();
    assert!(text.contains("max_age is 34560000s and should be 3600s"), "{text}");
    assert!(text.contains("max_bytes is 134217728 and should be 67108864"), "{text}");
    Ok(())
}

#[tokio::test]
async fn a_stream_or_consumer_that_could_lose_events_is_refused_by_name() -> anyhow::Result<()> {
    let nats = Nats::start().await?;
    let context = operator(&nats).await?;
    let config_ = stream::Config {
        name: "SIGNUPS".into(),
        subjects: vec!["signups.>".into()],
        allow_rollup: true,
        storage: stream::StorageType::Memory,
        ..Default::default()
    };
    let stream = context.create_stream(config_).await?;
    let durable =
        pull::Config { durable_name: Some("notify".into()), max_deliver: 3, ..Default::default() };
    stream.create_consumer(durable).await?;
    let log = connect(config(&nats)).await?;

    let error = format!("{:#}", anyhow::anyhow!(log.provision(&[]).await.expect_err("memory")));
    for setting in ["storage", "discard", "deny_delete", "deny_purge", "allow_rollup_hdrs"] {
        assert!(error.contains(setting), "{setting} is missing in: {error}");
    }
    let error = log.consumer(spec("notify")).await.expect_err("three deliveries");
    let error = format!("{:#}", anyhow::anyhow!(error));
    assert!(error.contains("max_deliver is 3 and should be -1"), "{error}");
    Ok(())
}

#[tokio::test]
async fn a_full_stream_refuses_and_keeps_what_it_has() -> anyhow::Result<()> {
    let nats = Nats::start().await?;
    let mut small = config(&nats);
    small.max_bytes = 4096;
    let log = connect(small).await?;
    log.provision(&[]).await?;

    let mut kept = 0;
    let error = loop {
        match log.append(event(&format!("{kept}"))).await {
            Ok(_) => kept += 1,
            Err(error) => break error,
        }
    };

    assert!(matches!(error, AppendError::NotStored(_)), "{error:?}");
    assert!(kept > 0);
    assert_eq!(stored(&nats).await?, kept);
    Ok(())
}

#[tokio::test]
async fn a_connection_that_nobody_holds_disturbs_no_server() -> anyhow::Result<()> {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    let nats = Nats::start().await?;
    let url = format!("nats://{}", listener.local_addr()?);
    let log = JetStream::connect(JetStreamConfig { url, ..config(&nats) }).await?;
    for _ in 0..3 {
        drop(listener.accept().await?); // as a server does that is on its way out
    }

    drop(log);

    // One attempt may have been on its way.
    let mut attempts = 0;
    let more = async {
        loop {
            drop(listener.accept().await);
            attempts += 1;
        }
    };
    let _: Result<(), _> = tokio::time::timeout(Duration::from_secs(1), more).await;
    assert!(attempts <= 1, "{attempts} attempts for nobody");
    Ok(())
}

#[tokio::test]
async fn an_inspector_tells_what_is_there_and_how_it_differs() -> anyhow::Result<()> {
    let nats = Nats::start().await?;
    let log = provisioned(&nats).await?;
    log.provision(&[spec("notify")]).await?;
    log.append(event("ada")).await?;
    let context = operator(&nats).await?;
    let mut stream = context.get_stream("SIGNUPS").await?.cached_info().config.clone();
    stream.discard = stream::DiscardPolicy::Old;
    stream.deny_purge = false;
    let rebuilt = context.update_stream(stream.clone()).await;
    // What was denied stays denied; how it discards can be changed.
    assert!(rebuilt.is_err());
    stream.deny_purge = true;
    context.update_stream(stream).await?;

    // One of the servers is away.
    let url = format!("nats://127.0.0.1:1,{}", nats.url());
    let inspector = Inspector::connect(JetStreamConfig { url, ..config(&nats) }).await?;

    let server = inspector.server();
    assert!(server.has_jetstream && !server.is_clustered, "{server:?}");
    let found = inspector.stream().await?.context("there is a stream")?;
    let losing: Vec<_> = found.losing.iter().map(ToString::to_string).collect();
    assert_eq!(losing, ["discard is Old and should be New"]);
    assert_eq!(found.otherwise, []);
    assert_eq!((found.messages, found.replicas), (1, 1));
    let clock = found.server_time.context("the server tells its time")?;
    assert!((OffsetDateTime::now_utc() - clock).abs() < time::Duration::MINUTE, "{found:?}");
    let notify = inspector.consumer(&spec("notify")).await?.context("there is a consumer")?;
    assert_eq!((notify.waiting, notify.in_flight, notify.pulls), (1, 0, 0));
    assert_eq!(notify.oldest, Some(found.first));
    assert_eq!(inspector.consumer(&spec("other")).await?, None);
    Ok(())
}
