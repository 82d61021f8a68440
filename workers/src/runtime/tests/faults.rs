//! Stops, crashes, and a log or a store with a bad day.

use std::collections::HashMap;

use secrecy::SecretString;
use tempfile::TempDir;
use time::OffsetDateTime;
use vestibule_events::LogError;
use vestibule_store::{Done, LetterState, Standing, StoreUrl};
use vestibule_testkit::{Nats, Postgres};

use super::*;
use crate::{
    Database,
    testing::{RHYTHM, Running},
};

#[tokio::test]
async fn heartbeats_keep_a_slow_event_and_those_behind_it_in_our_hands() -> anyhow::Result<()> {
    let stage = Stage::open().await?;
    let (slow, behind) = (stage.sign_up("ada").await?, stage.sign_up("ada").await?);
    let log = Shaky::new(stage.log.clone());
    let worker = {
        let (faults, slow) = (log.faults.clone(), slow.id);
        Scripted::new(move |task| {
            let faults = faults.clone();
            async move {
                // Two events, three heartbeats of each in an `ack_wait`: more than three of them.
                while task.event.id == slow && faults.progress.load(Ordering::SeqCst) < 20 {
                    faults.changed.notified().await;
                }
                Ok(())
            }
        })
    };
    let seen = worker.seen.clone();
    let settings = WorkerSettings { ack_wait: Duration::from_millis(300), ..settings(3) };

    let running = stage.start_over(Arc::new(log), worker, settings);
    stage.idle(SCRIPTED).await?;

    assert_eq!(*seen.lock().unwrap(), [slow.id, behind.id]);
    running.stop().await
}

#[tokio::test]
async fn a_stop_finishes_what_runs_and_hands_back_what_waits() -> anyhow::Result<()> {
    let stage = Stage::open().await?;
    let (runs, waits) = (stage.sign_up("ada").await?, stage.sign_up("ada").await?);
    let (began, gate) = (Arc::new(Notify::new()), Arc::new(Semaphore::new(0)));
    let worker = {
        let (began, gate) = (began.clone(), gate.clone());
        Scripted::new(move |_| {
            let (began, gate) = (began.clone(), gate.clone());
            async move {
                began.notify_one();
                let _open = gate.acquire().await;
                Ok(())
            }
        })
    };
    let seen = worker.seen.clone();

    let running = stage.start(worker, settings(3));
    began.notified().await;
    running.stop.cancel();
    eventually(LIMIT, "the waiting event is handed back", async || {
        running.metrics(SCRIPTED).in_hand.get() == 1
    })
    .await?;
    gate.add_permits(1);
    running.stop().await?;
    assert_eq!(*seen.lock().unwrap(), [runs.id]);

    let worker = Scripted::new(|_| async { Ok(()) });
    let seen = worker.seen.clone();
    let running = stage.start(worker, settings(3));
    stage.idle(SCRIPTED).await?;
    assert_eq!(*seen.lock().unwrap(), [waits.id], "done is done, and what was handed back comes");
    running.stop().await
}

#[tokio::test]
async fn a_bad_line_to_the_log_is_waited_out_and_an_effect_stays_single() -> anyhow::Result<()> {
    let stage = Stage::open().await?;
    let event = stage.sign_up("ada").await?;
    let log = Shaky::new(stage.log.clone());
    log.faults.consumer.store(2, Ordering::SeqCst);
    log.faults.next.store(2, Ordering::SeqCst);
    log.faults.ack.store(2, Ordering::SeqCst);
    let settings = WorkerSettings { ack_wait: Duration::from_millis(200), ..settings(3) };

    let worker = Database::new(stage.store.clone());
    let running = stage.start_over(Arc::new(log), worker, settings);
    stage.idle(Database::NAME).await?;

    let effects = stage.store.effects(&[event.id]).await?;
    assert_eq!((effects[&event.id].sign_ups, effects[&event.id].person_changes), (1, 1));
    assert_eq!(running.metrics(Database::NAME).done.get(), 1, "it was known to be done");
    running.stop().await
}

#[tokio::test]
async fn a_log_that_refuses_ends_the_run_and_says_what_to_do() -> anyhow::Result<()> {
    let stage = Stage::open().await?;
    let log = Shaky::new(stage.log.clone());
    log.faults.refuse.store(true, Ordering::SeqCst);

    let running = stage.start_over(Arc::new(log), Scripted::new(|_| async { Ok(()) }), settings(3));
    let error = running.task.await?.unwrap_err();

    let text = format!("{error:#}");
    assert!(text.contains("worker `scripted`") && text.contains("the test forbids it"), "{text}");
    Ok(())
}

#[tokio::test]
async fn a_store_that_is_down_costs_no_tries() -> anyhow::Result<()> {
    let mut postgres = Postgres::start().await?;
    let url = StoreUrl::Postgres(SecretString::from(postgres.url()));
    let stage = Stage::with_store(TempDir::new()?, &url).await?;
    // One needs the store for its effect, the other only to note its failures. The first event
    // shows that both have heard that they are not paused.
    let warm_up = stage.sign_up("eve").await?;
    let database = stage.start(Database::new(stage.store.clone()), settings(1));
    let failing = {
        let fine = warm_up.id;
        Scripted::new(move |task| async move {
            if task.event.id == fine { Ok(()) } else { Err(later()) }
        })
    };
    let seen = failing.seen.clone();
    let failing = stage.start(failing, settings(2));
    stage.idle(Database::NAME).await?;
    stage.idle(SCRIPTED).await?;

    postgres.kill();
    let event = stage.sign_up("ada").await?;
    eventually(LIMIT, "both have been put off", async || {
        let put_off = |it: &Running, name| it.metrics(name).postponed.get() > 0;
        put_off(&database, Database::NAME) && put_off(&failing, SCRIPTED)
    })
    .await?;
    postgres.restart().await?;
    stage.idle(Database::NAME).await?;
    stage.idle(SCRIPTED).await?;

    assert_eq!(stage.store.effects(&[event.id]).await?[&event.id].sign_ups, 1);
    let failed = stage.store.attempts_of(event.id).await?;
    let workers: Vec<_> = failed.iter().map(|it| &*it.worker).collect();
    assert_eq!(workers, [SCRIPTED; 2]);
    assert!(seen.lock().unwrap().len() > 3, "no attempt met the store that was down");
    assert_eq!(dead_letters(&stage).await?.len(), 1);
    database.stop().await?;
    failing.stop().await
}

#[tokio::test]
async fn the_stream_may_go_down_in_the_middle() -> anyhow::Result<()> {
    let stage = Stage::open().await?;
    let mut nats = Nats::start().await?;
    let stream = stream(&nats).await?;
    let patient = WorkerSettings { ack_wait: Duration::from_secs(2), ..settings(2) };
    let specs = [consumer_spec(SCRIPTED, &patient), consumer_spec(Database::NAME, &patient)];
    eventually(LIMIT, "the stream is made", async || stream.provision(&specs).await.is_ok())
        .await?;
    let mut events = Vec::new();
    for round in 0..60 {
        let event = crate::testing::sign_up(&format!("person{}", round % 12));
        events.push(stream.append(event).await?.stored.event);
    }
    let poisoned = events[5].id;
    let (half, gate) = (Arc::new(Notify::new()), Arc::new(Semaphore::new(30)));
    let worker = {
        let (half, gate) = (half.clone(), gate.clone());
        Scripted::new(move |task| {
            let (half, gate) = (half.clone(), gate.clone());
            async move {
                if gate.available_permits() == 0 {
                    half.notify_one();
                }
                gate.acquire().await.unwrap().forget();
                if task.event.id == poisoned { Err(later()) } else { Ok(()) }
            }
        })
    };
    let seen = worker.seen.clone();

    let log: Arc<dyn EventLog> = Arc::new(stream.clone());
    let scripted = stage.start_over(log.clone(), worker, patient.clone());
    let database = stage.start_over(log, Database::new(stage.store.clone()), patient);
    half.notified().await;
    nats.restart().await?;
    gate.add_permits(1000);
    for name in [SCRIPTED, Database::NAME] {
        eventually(LIMIT, "everything is acknowledged", async || {
            Ok::<_, LogError>(stream.backlog(name).await?.is_some_and(|it| it.is_empty()))
        })
        .await?;
    }

    let seen: std::collections::HashSet<_> = seen.lock().unwrap().iter().copied().collect();
    assert_eq!(seen, events.iter().map(|it| it.id).collect());
    let letters = dead_letters(&stage).await?;
    assert_eq!((letters.len(), letters[0].event_id), (1, Some(poisoned)));
    let ids: Vec<_> = events.iter().map(|it| it.id).collect();
    let effects = stage.store.effects(&ids).await?;
    assert!(ids.iter().all(|id| effects[id].sign_ups == 1), "{effects:?}");
    scripted.stop().await?;
    database.stop().await
}

#[tokio::test]
async fn a_stop_hands_back_what_came_from_the_store() -> anyhow::Result<()> {
    let stage = Stage::open().await?;
    stage.sign_ups(6).await?;
    let running = stage.start(Scripted::new(|_| async { Err(hopeless()) }), settings(1));
    stage.idle(SCRIPTED).await?;
    running.stop().await?;
    let letters: Vec<_> = dead_letters(&stage).await?.iter().map(|it| it.id).collect();
    let now = OffsetDateTime::now_utc();
    stage.store.redrive(&letters, |_| now, "grace", now).await?;

    // A lease as long as this would show if one were left behind.
    let one = WorkerSettings { ack_wait: LONG, concurrency: 1, ..settings(3) };
    let (worker, gate, began) = gated();
    let running = stage.start(worker, one.clone());
    began.notified().await;
    eventually(LIMIT, "the others are claimed, too", async || {
        running.metrics(SCRIPTED).in_hand.get() > 1
    })
    .await?;
    running.stop.cancel();
    gate.add_permits(1);
    running.stop().await?;
    assert_eq!(stage.store.set_aside(SCRIPTED).await?.retries, 5);

    let running = stage.start(Scripted::new(|_| async { Ok(()) }), one);
    stage.idle(SCRIPTED).await?;
    let letters = dead_letters(&stage).await?;
    assert!(letters.iter().all(|it| it.state == LetterState::Delivered), "{letters:?}");
    running.stop().await
}

#[tokio::test]
async fn wherever_it_crashes_each_event_is_done_once_or_parked_once() -> anyhow::Result<()> {
    let stage = Stage::open().await?;
    let events = stage.sign_ups(120).await?;
    let place: HashMap<_, _> = events.iter().enumerate().map(|(at, it)| (it.id, at)).collect();
    let place = Arc::new(place);
    let effects: Arc<Mutex<HashMap<Uuid, u32>>> = Arc::default();
    let worker = || {
        let (place, effects, store) = (place.clone(), effects.clone(), stage.store.clone());
        Scripted::new(move |task| {
            let (place, effects, store) = (place.clone(), effects.clone(), store.clone());
            async move {
                let event = task.event.id;
                match place[&event] % 4 {
                    0 => return Err(hopeless()),
                    1 if task.attempt < 3 => return Err(later()),
                    2 => return Err(later()),
                    _ => {}
                }
                if store.mark_done(SCRIPTED, event, OffsetDateTime::now_utc()).await? == Done::Now {
                    *effects.lock().unwrap().entry(event).or_default() += 1;
                }
                Ok(())
            }
        })
    };
    let brief = WorkerSettings { ack_wait: Duration::from_millis(300), ..settings(4) };

    for round in 1..=15 {
        let worker = worker();
        let seen = worker.seen.clone();
        let running = stage.start(worker, brief.clone());
        // At another point each time; and never where there is nothing left to do.
        eventually(LIMIT, "a few attempts have begun", async || {
            let undone = stage.store.set_aside(SCRIPTED).await?.retries > 0;
            let backlog = stage.log.backlog(SCRIPTED).await?;
            let is_idle = !undone && backlog.is_some_and(|it| it.is_empty());
            anyhow::Ok(seen.lock().unwrap().len() >= round || is_idle)
        })
        .await?;
        running.task.abort();
        assert!(running.task.await.is_err_and(|it| it.is_cancelled()));
    }
    let running = stage.start(worker(), brief);
    stage.idle(SCRIPTED).await?;

    let letters = dead_letters(&stage).await?;
    assert_eq!(letters.len(), 60);
    let effects = effects.lock().unwrap().clone();
    for event in &events {
        let standing = stage.store.standing(SCRIPTED, event.id).await?;
        let letters = letters.iter().filter(|it| it.event_id == Some(event.id)).count();
        let effects = effects.get(&event.id).copied().unwrap_or_default();
        match place[&event.id] % 4 {
            0 | 2 => assert_eq!((standing, letters, effects), (Standing::Parked, 1, 0)),
            // The note that it happened may be lost in the crash, the effect not.
            _ => assert!(standing == Standing::Done && letters == 0 && effects <= 1),
        }
    }
    running.stop().await
}

#[tokio::test]
async fn a_log_that_falls_silent_is_noticed_and_one_that_is_idle_is_left_alone()
-> anyhow::Result<()> {
    let stage = Stage::open().await?;
    let log = Shaky::new(stage.log.clone());
    log.faults.silent.store(1, Ordering::SeqCst);
    let event = stage.sign_up("ada").await?;
    let worker = Scripted::new(|_| async { Ok(()) });
    let seen = worker.seen.clone();
    let rhythm = Rhythm { stall: Duration::from_millis(200), ..RHYTHM };

    let running = stage.start_at(rhythm, Arc::new(log.clone()), worker, settings(3));
    stage.idle(SCRIPTED).await?;
    assert_eq!(*seen.lock().unwrap(), [event.id]);
    assert_eq!(running.metrics(SCRIPTED).stalls.get(), 1);

    let looks = |log: &Shaky| log.faults.backlogs.load(Ordering::SeqCst);
    let before = looks(&log);
    eventually(LIMIT, "it was looked at for as long as a stall takes, and again", async || {
        looks(&log) > before + 12
    })
    .await?;
    stage.sign_up("bob").await?;
    stage.idle(SCRIPTED).await?;
    assert_eq!(running.metrics(SCRIPTED).stalls.get(), 1, "idle was taken for a stall");
    running.stop().await
}
