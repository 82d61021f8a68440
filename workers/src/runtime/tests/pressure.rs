//! Targets that are down, workers that are paused, and rates.

use std::{
    collections::HashSet,
    sync::atomic::{AtomicBool, AtomicUsize},
    time::Instant,
};

use vestibule_events::LogError;
use vestibule_testkit::Nats;

use super::*;
use crate::Database;

/// Opens soon and probes often.
const BREAKER: BreakerPolicy = BreakerPolicy {
    failures: 5,
    pause: Duration::from_millis(5),
    max_pause: Duration::from_millis(20),
};

const PROBE_PAUSE: Duration = Duration::from_secs(1);

/// A worker whose target is down while the flag says so.
fn reaching(down: &Arc<AtomicBool>) -> Scripted {
    let down = down.clone();
    Scripted::new(move |_| {
        let down = down.load(Ordering::SeqCst);
        async move { if down { Err(later()) } else { Ok(()) } }
    })
}

#[tokio::test]
async fn an_outage_burns_a_handful_of_tries_and_heals_by_itself() -> anyhow::Result<()> {
    let stage = Stage::open().await?;
    let events = stage.sign_ups(1000).await?;
    let down = Arc::new(AtomicBool::new(true));
    let worker = reaching(&down);
    let seen = worker.seen.clone();
    // With so few tries an outage would park everything.
    let settings = WorkerSettings { breaker: BREAKER, ..settings(2) };

    let running = stage.start(worker, settings);
    eventually(LIMIT, "it was probed again and again", async || seen.lock().unwrap().len() > 40)
        .await?;
    let metrics = running.metrics(SCRIPTED);
    let tried = seen.lock().unwrap().iter().collect::<HashSet<_>>().len();
    assert!(tried < 200, "an outage was tried out with {tried} events");
    eventually(LIMIT, "the gauge shows what waits", async || metrics.backlog.get() > 500).await?;

    down.store(false, Ordering::SeqCst);
    stage.idle(SCRIPTED).await?;
    assert_eq!(metrics.done.get(), 1000);
    assert_eq!(dead_letters(&stage).await?, []);
    let done: HashSet<_> = seen.lock().unwrap().iter().copied().collect();
    assert!(events.iter().all(|it| done.contains(&it.id)));
    running.stop().await
}

#[tokio::test]
async fn an_event_that_always_fails_does_not_keep_the_probe_from_others() -> anyhow::Result<()> {
    let stage = Stage::open().await?;
    let bad = stage.sign_ups(1).await?.remove(0).id;
    let worker = Scripted::new(move |task| {
        let is_bad = task.event.id == bad;
        async move { if is_bad { Err(later()) } else { Ok(()) } }
    });
    let seen = worker.seen.clone();
    let breaker = BreakerPolicy { failures: 1, pause: PROBE_PAUSE, max_pause: PROBE_PAUSE };
    let running = stage.start(worker, WorkerSettings { breaker, ..settings(u32::MAX) });
    let metrics = running.metrics(SCRIPTED);
    for done in 1..=5 {
        eventually(LIMIT, "it is left alone", async || metrics.breaker.get() == 2).await?;
        let probes = seen.lock().unwrap().len();
        stage.sign_ups(1).await?;
        eventually(LIMIT, "the other one is done", async || metrics.done.get() == done).await?;
        let probes = seen.lock().unwrap().len() - probes;
        assert!(probes <= 3, "it took {probes} attempts until a good event had its turn");
    }
    running.stop().await
}

#[tokio::test]
async fn a_worker_with_several_targets_goes_on_while_one_is_down() -> anyhow::Result<()> {
    let stage = Stage::open().await?;
    let events = stage.sign_ups(60).await?;
    let down: HashSet<_> = events.iter().take(30).map(|it| it.id).collect();
    let mut worker = Scripted::new(move |task| {
        let is_down = down.contains(&task.event.id);
        async move { if is_down { Err(later()) } else { Ok(()) } }
    });
    worker.has_one_target = false;
    let breaker = BreakerPolicy { failures: 5, pause: LONG, max_pause: LONG };
    let running = stage.start(worker, WorkerSettings { breaker, ..settings(u32::MAX) });
    let metrics = running.metrics(SCRIPTED);
    eventually(LIMIT, "the others are done", async || metrics.done.get() == 30).await?;
    assert_eq!(metrics.breaker.get(), 0);
    running.stop().await
}

#[tokio::test]
async fn no_event_grows_too_old_while_its_target_is_down() -> anyhow::Result<()> {
    let stage = Stage::open().await?;
    stage.sign_ups(1).await?;
    let down = Arc::new(AtomicBool::new(true));
    let worker = reaching(&down);
    let mut settings = WorkerSettings { breaker: BREAKER, ..settings(100) };
    settings.breaker.failures = 1;
    settings.retry.max_age = Duration::from_secs(2);

    let began = Instant::now();
    let running = stage.start(worker, settings);
    eventually(LIMIT, "it is too old", async || began.elapsed() > Duration::from_secs(3)).await?;
    assert_eq!(dead_letters(&stage).await?, []);
    down.store(false, Ordering::SeqCst);
    let metrics = running.metrics(SCRIPTED);
    eventually(LIMIT, "it is done", async || metrics.done.get() == 1).await?;
    running.stop().await
}

#[tokio::test]
async fn a_target_that_is_down_sees_one_probe_at_a_time() -> anyhow::Result<()> {
    let stage = Stage::open().await?;
    stage.sign_ups(100).await?;
    let (runs, peak) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let calls = Arc::new(AtomicUsize::new(0));
    let worker = {
        let (runs, peak, calls) = (runs.clone(), peak.clone(), calls.clone());
        Scripted::new(move |_| {
            let (runs, peak, calls) = (runs.clone(), peak.clone(), calls.clone());
            async move {
                let now = runs.fetch_add(1, Ordering::SeqCst) + 1;
                // One more than it takes to open, and those that had begun by then.
                if calls.fetch_add(1, Ordering::SeqCst) > 5 + 16 {
                    peak.fetch_max(now, Ordering::SeqCst);
                }
                tokio::task::yield_now().await;
                runs.fetch_sub(1, Ordering::SeqCst);
                Err(later())
            }
        })
    };
    let settings = WorkerSettings { breaker: BREAKER, ..settings(1000) };

    let running = stage.start(worker, settings);
    eventually(LIMIT, "it was probed", async || calls.load(Ordering::SeqCst) > 60).await?;
    assert_eq!(peak.load(Ordering::SeqCst), 1);
    running.stop().await
}

#[tokio::test]
async fn a_breaker_that_opens_hands_back_what_waits() -> anyhow::Result<()> {
    let stage = Stage::open().await?;
    stage.sign_ups(30).await?;
    let worker = Scripted::new(|_| async { Err(later()) });
    let seen = worker.seen.clone();
    let breaker = BreakerPolicy { failures: 5, pause: LONG, max_pause: LONG };
    let settings = WorkerSettings { breaker, concurrency: 2, ..settings(100) };

    let running = stage.start(worker, settings);
    let metrics = running.metrics(SCRIPTED);
    eventually(LIMIT, "the breaker is open and nothing is in hand", async || {
        metrics.breaker.get() == 2 && metrics.in_hand.get() == 0
    })
    .await?;

    // Those under way when the fifth failed end as well.
    assert!(seen.lock().unwrap().len() < 5 + 2);
    let failed = stage.store.set_aside(SCRIPTED).await?.retries;
    eventually(LIMIT, "the rest waits in the log", async || {
        let backlog = stage.log.backlog(SCRIPTED).await?.unwrap();
        Ok::<_, LogError>(backlog.waiting + backlog.in_flight + failed == 30)
    })
    .await?;
    running.stop().await
}

#[tokio::test]
async fn a_dead_target_delays_no_other_worker() -> anyhow::Result<()> {
    let stage = Stage::open().await?;
    stage.sign_ups(300).await?;
    // Without a breaker's mercy: each event fails as often and as fast as it can.
    let failing = stage.start(Scripted::new(|_| async { Err(later()) }), settings(10_000));
    eventually(LIMIT, "it fails all the time", async || {
        failing.metrics(SCRIPTED).retried.get() > 300
    })
    .await?;

    let database = stage.start(Database::new(stage.store.clone()), settings(3));
    stage.idle(Database::NAME).await?;
    assert_eq!(database.metrics(Database::NAME).done.get(), 300);
    database.stop().await?;
    failing.stop().await
}

#[tokio::test]
async fn a_storm_of_retries_and_new_events_do_not_starve_each_other() -> anyhow::Result<()> {
    let stage = Stage::open().await?;
    let storm: HashSet<_> = stage.sign_ups(300).await?.iter().map(|it| it.id).collect();
    let down = Arc::new(AtomicBool::new(true));
    let worker = {
        let down = down.clone();
        Scripted::new(move |task| {
            let fails = storm.contains(&task.event.id) && down.load(Ordering::SeqCst);
            async move { if fails { Err(later()) } else { Ok(()) } }
        })
    };
    let running = stage.start(worker, WorkerSettings { concurrency: 2, ..settings(u32::MAX) });
    let metrics = running.metrics(SCRIPTED);
    eventually(LIMIT, "all fail all the time", async || metrics.retried.get() > 600).await?;

    stage.sign_ups(300).await?;
    reaches(&metrics.done, 300).await?;
    let before = metrics.retried.get();
    eventually(LIMIT, "the others are still tried", async || metrics.retried.get() > before)
        .await?;
    down.store(false, Ordering::SeqCst);
    stage.idle(SCRIPTED).await?;
    assert_eq!(metrics.done.get(), 600);
    running.stop().await
}

#[tokio::test]
async fn what_a_shut_gate_has_fetched_ahead_goes_to_other_processes() -> anyhow::Result<()> {
    let stage = Stage::open().await?;
    let nats = Nats::start().await?;
    let stream = stream(&nats).await?;
    let breaker = BreakerPolicy { failures: 1, pause: LONG, max_pause: LONG };
    // What is not handed back would be missed for longer than the test lasts.
    let settings = WorkerSettings { ack_wait: LONG, concurrency: 2, breaker, ..settings(1000) };
    let spec = consumer_spec(SCRIPTED, &settings);
    eventually(LIMIT, "the stream is made", async || {
        stream.provision(std::slice::from_ref(&spec)).await.is_ok()
    })
    .await?;
    for person in 0..100 {
        stream.append(crate::testing::sign_up(&format!("person{person}"))).await?;
    }
    let log: Arc<dyn EventLog> = Arc::new(stream.clone());

    let failing = Scripted::new(|_| async { Err(later()) });
    let cut_off = stage.start_over(log.clone(), failing, settings.clone());
    eventually(LIMIT, "the first process leaves its target alone", async || {
        cut_off.metrics(SCRIPTED).breaker.get() == 2
    })
    .await?;
    let fine = stage.start_over(log, Scripted::new(|_| async { Ok(()) }), settings);
    eventually(LIMIT, "the second does it all", async || fine.metrics(SCRIPTED).done.get() == 100)
        .await?;

    eventually(LIMIT, "and everything is acknowledged", async || {
        let backlog = stream.backlog(SCRIPTED).await?;
        Ok::<_, LogError>(backlog.is_some_and(|it| it.is_empty()))
    })
    .await?;
    assert_eq!(dead_letters(&stage).await?, []);
    cut_off.stop().await?;
    fine.stop().await
}

#[tokio::test]
async fn a_paused_worker_takes_nothing_and_goes_on_where_it_was() -> anyhow::Result<()> {
    let stage = Stage::open().await?;
    let now = time::OffsetDateTime::now_utc();
    stage.store.pause_worker(SCRIPTED, "grace", "the provider moves", now).await?;
    stage.sign_ups(10).await?;
    let (worker, gate, began) = gated();
    let seen = worker.seen.clone();
    let running = stage.start(worker, WorkerSettings { concurrency: 1, ..settings(3) });
    let metrics = running.metrics(SCRIPTED);
    eventually(LIMIT, "the gauges show a paused worker's backlog", async || {
        metrics.paused.get() == 1 && metrics.backlog.get() == 10
    })
    .await?;
    assert!(seen.lock().unwrap().is_empty());

    stage.store.resume_worker(SCRIPTED).await?;
    began.notified().await;
    eventually(LIMIT, "others wait behind it", async || metrics.in_hand.get() > 1).await?;
    stage.store.pause_worker(SCRIPTED, "grace", "again", now).await?;
    eventually(LIMIT, "what waits is handed back", async || metrics.in_hand.get() == 1).await?;
    gate.add_permits(100);
    eventually(LIMIT, "what runs is finished", async || metrics.done.get() == 1).await?;
    stage.sign_up("eve").await?;
    eventually(LIMIT, "the next is counted and left", async || {
        let backlog = stage.log.backlog(SCRIPTED).await?.unwrap();
        Ok::<_, LogError>(metrics.in_hand.get() == 0 && backlog.waiting + backlog.in_flight == 10)
    })
    .await?;
    assert_eq!(seen.lock().unwrap().len(), 1);

    stage.store.resume_worker(SCRIPTED).await?;
    stage.idle(SCRIPTED).await?;
    assert_eq!(seen.lock().unwrap().len(), 11, "neither lost nor repeated");
    assert_eq!(metrics.paused.get(), 0);
    running.stop().await
}

#[tokio::test]
async fn a_paused_worker_leaves_what_waits_in_the_store() -> anyhow::Result<()> {
    let stage = Stage::open().await?;
    stage.sign_ups(3).await?;
    let down = Arc::new(AtomicBool::new(true));
    let worker = reaching(&down);
    let running = stage.start(worker, settings(100_000));
    let metrics = running.metrics(SCRIPTED);
    eventually(LIMIT, "all have failed", async || metrics.retried.get() > 10).await?;

    let now = time::OffsetDateTime::now_utc();
    stage.store.pause_worker(SCRIPTED, "grace", "the provider moves", now).await?;
    eventually(LIMIT, "the worker rests", async || {
        metrics.paused.get() == 1 && metrics.in_hand.get() == 0
    })
    .await?;
    let before = metrics.retried.get();
    down.store(false, Ordering::SeqCst);
    stage.sign_up("eve").await?;
    eventually(LIMIT, "the gauges show what waits", async || {
        metrics.retries.get() == 3 && metrics.backlog.get() == 1
    })
    .await?;
    assert_eq!((metrics.retried.get(), metrics.done.get()), (before, 0));

    stage.store.resume_worker(SCRIPTED).await?;
    stage.idle(SCRIPTED).await?;
    assert_eq!(metrics.done.get(), 4);
    running.stop().await
}

#[tokio::test]
async fn attempts_begin_no_faster_than_the_rate() -> anyhow::Result<()> {
    let stage = Stage::open().await?;
    stage.sign_ups(30).await?;
    let worker = Scripted::new(|_| async { Ok(()) });
    let rate = "20/s".parse().ok();

    let began = Instant::now();
    let running = stage.start(worker, WorkerSettings { rate, ..settings(3) });
    stage.idle(SCRIPTED).await?;

    // A burst of twenty, and ten more in half a second.
    assert!(began.elapsed() >= Duration::from_millis(499), "{:?}", began.elapsed());
    assert_eq!(running.metrics(SCRIPTED).done.get(), 30);
    running.stop().await
}
