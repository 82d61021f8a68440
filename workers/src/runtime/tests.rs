//! The runtime over the real log and the real store.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering},
    },
    time::Duration,
};

use anyhow::anyhow;
use secrecy::SecretString;
use tempfile::TempDir;
use tokio::sync::{Notify, Semaphore};
use uuid::Uuid;
use vestibule_events::{JetStream, JetStreamConfig, NatsCredentials, Role};
use vestibule_store::{DeadLetter, StoreUrl};
use vestibule_testkit::{Nats, Postgres, eventually};

use super::*;
use crate::{
    Database, GrantRule, Permissions, PermissionsSettings,
    testing::{LIMIT, SCRIPTED, Scripted, Shaky, Stage, settings},
};

fn later() -> HandleError {
    HandleError::retry(Cause::Unavailable, anyhow!("the provider is down"))
}

async fn dead_letters(stage: &Stage) -> anyhow::Result<Vec<DeadLetter>> {
    Ok(stage.store.dead_letters(Some(SCRIPTED), 100).await?)
}

#[tokio::test]
async fn events_of_a_person_take_turns_and_others_overtake() -> anyhow::Result<()> {
    let stage = Stage::open().await?;
    let (first, second) = (stage.sign_up("ada").await?, stage.sign_up("ada").await?);
    let other = stage.sign_up("bob").await?;
    let gate = Arc::new(Semaphore::new(0));
    let ended = Arc::new(Mutex::new(Vec::new()));
    let worker = {
        let (gate, ended, first) = (gate.clone(), ended.clone(), first.id);
        Scripted::new(move |task| {
            let (gate, ended) = (gate.clone(), ended.clone());
            async move {
                if task.event.id == first {
                    let _open = gate.acquire().await;
                }
                ended.lock().unwrap().push(task.event.id);
                Ok(())
            }
        })
    };
    let seen = worker.seen.clone();

    let running = stage.start(worker, settings(3));
    eventually(LIMIT, "the other person is dealt with", async || {
        ended.lock().unwrap().contains(&other.id)
    })
    .await?;
    assert!(!seen.lock().unwrap().contains(&second.id), "the second began before the first ended");
    gate.add_permits(1);
    stage.idle(SCRIPTED).await?;

    assert_eq!(*ended.lock().unwrap(), [other.id, first.id, second.id]);
    running.stop().await
}

#[tokio::test]
async fn hundreds_of_events_keep_the_order_of_each_person() -> anyhow::Result<()> {
    let stage = Stage::open().await?;
    let mut appended: HashMap<_, Vec<Uuid>> = HashMap::new();
    for round in 0..300 {
        let event = stage.sign_up(&format!("person{}", round % 40)).await?;
        appended.entry(event.person).or_default().push(event.id);
    }
    let handled: Arc<Mutex<HashMap<_, Vec<Uuid>>>> = Arc::default();
    let worker = {
        let handled = handled.clone();
        Scripted::new(move |task| {
            let handled = handled.clone();
            async move {
                tokio::task::yield_now().await;
                let mut handled = handled.lock().unwrap();
                handled.entry(task.event.person).or_default().push(task.event.id);
                Ok(())
            }
        })
    };

    let running = stage.start(worker, settings(3));
    stage.idle(SCRIPTED).await?;

    assert_eq!(*handled.lock().unwrap(), appended);
    assert_eq!(running.metrics(SCRIPTED).done.get(), 300);
    assert_eq!(running.metrics(SCRIPTED).in_hand.get(), 0);
    running.stop().await
}

#[tokio::test]
async fn so_many_attempts_run_at_a_time_and_no_more() -> anyhow::Result<()> {
    let stage = Stage::open().await?;
    for person in 0..12 {
        stage.sign_up(&format!("person{person}")).await?;
    }
    let (running_now, peak) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let (full, gate) = (Arc::new(Notify::new()), Arc::new(Semaphore::new(0)));
    let worker = {
        let (running_now, peak, full, gate) =
            (running_now.clone(), peak.clone(), full.clone(), gate.clone());
        Scripted::new(move |_| {
            let (running_now, peak, full, gate) =
                (running_now.clone(), peak.clone(), full.clone(), gate.clone());
            async move {
                let now = running_now.fetch_add(1, Ordering::SeqCst) + 1;
                peak.fetch_max(now, Ordering::SeqCst);
                if now == 3 {
                    full.notify_one();
                }
                gate.acquire().await.unwrap().forget();
                running_now.fetch_sub(1, Ordering::SeqCst);
                Ok(())
            }
        })
    };

    let running = stage.start(worker, WorkerSettings { concurrency: 3, ..settings(3) });
    full.notified().await;
    gate.add_permits(12);
    stage.idle(SCRIPTED).await?;

    assert_eq!(peak.load(Ordering::SeqCst), 3);
    running.stop().await
}

#[tokio::test]
async fn one_person_with_many_events_does_not_fill_the_worker() -> anyhow::Result<()> {
    let stage = Stage::open().await?;
    let crowd = stage.sign_up("ada").await?.person;
    for _ in 1..20 {
        stage.sign_up("ada").await?;
    }
    let other = stage.sign_up("bob").await?;
    let gate = Arc::new(Semaphore::new(0));
    let worker = {
        let (gate, crowd) = (gate.clone(), crowd.clone());
        Scripted::new(move |task| {
            let (gate, crowded) = (gate.clone(), task.event.person == crowd);
            async move {
                if crowded {
                    let _open = gate.acquire().await;
                }
                Ok(())
            }
        })
    };
    let seen = worker.seen.clone();

    let running = stage.start(worker, WorkerSettings { concurrency: 2, ..settings(3) });
    eventually(LIMIT, "the other person is served", async || {
        seen.lock().unwrap().contains(&other.id)
    })
    .await?;
    gate.add_permits(1);
    stage.idle(SCRIPTED).await?;

    assert_eq!(seen.lock().unwrap().len(), 21, "handed back means neither lost nor repeated");
    running.stop().await
}

#[tokio::test]
async fn what_fails_for_now_is_tried_again_until_it_goes_through() -> anyhow::Result<()> {
    let stage = Stage::open().await?;
    let event = stage.sign_up("ada").await?;
    let tries = Arc::new(AtomicU32::new(0));
    let worker = {
        let tries = tries.clone();
        Scripted::new(move |task| {
            let this = tries.fetch_add(1, Ordering::SeqCst) + 1;
            async move {
                assert_eq!(task.attempt, this);
                if this < 3 { Err(later()) } else { Ok(()) }
            }
        })
    };

    let running = stage.start(worker, settings(3));
    stage.idle(SCRIPTED).await?;

    let failed = stage.store.attempts_of(event.id).await?;
    let causes: Vec<_> = failed.iter().map(|it| (&*it.cause_class, &*it.error)).collect();
    assert_eq!(causes, [("unavailable", "the provider is down"); 2]);
    assert_eq!(dead_letters(&stage).await?, []);
    assert_eq!(running.metrics(SCRIPTED).retried.get(), 2);
    running.stop().await
}

#[tokio::test]
async fn after_the_last_try_an_event_is_parked_and_delays_nobody() -> anyhow::Result<()> {
    let stage = Stage::open().await?;
    let poisoned = stage.sign_up("ada").await?;
    let hopeless = stage.sign_up("bob").await?;
    let fine = stage.sign_up("eve").await?;
    let worker = {
        let (poisoned, hopeless) = (poisoned.id, hopeless.id);
        Scripted::new(move |task| async move {
            match task.event.id {
                id if id == poisoned => Err(later()),
                id if id == hopeless => {
                    let source = anyhow!("no such user <bob@example.com>");
                    Err(HandleError::park(Cause::Refused, source))
                }
                _ => Ok(()),
            }
        })
    };
    let seen = worker.seen.clone();

    let running = stage.start(worker, settings(3));
    stage.idle(SCRIPTED).await?;

    let count = |id| seen.lock().unwrap().iter().filter(|it| **it == id).count();
    assert_eq!((count(poisoned.id), count(hopeless.id), count(fine.id)), (3, 1, 1));
    let mut letters = dead_letters(&stage).await?;
    letters.sort_by_key(|it| it.sequence);
    let [last_try, at_once] = letters.as_slice() else {
        panic!("{letters:?}");
    };
    assert_eq!(last_try.event_id, Some(poisoned.id));
    assert_eq!(last_try.person, Some(poisoned.person.clone()));
    assert_eq!(last_try.cause_class, "unavailable");
    assert_eq!(serde_json::from_slice::<SignUpEvent>(&last_try.payload)?, poisoned);
    assert_eq!(at_once.cause_class, "refused");
    assert_eq!(at_once.error, "no such user …", "an address is not kept");
    assert_eq!(stage.store.attempts_of(poisoned.id).await?.len(), 3);
    assert_eq!(running.metrics(SCRIPTED).parked.get(), 2);
    running.stop().await
}

#[tokio::test]
async fn bytes_that_are_no_event_are_parked_as_they_are() -> anyhow::Result<()> {
    let stage = Stage::open().await?;
    stage.sign_up("ada").await?;
    let fine = stage.sign_up("bob").await?;
    let log = Shaky::new(stage.log.clone());
    log.faults.garbled.store(1, Ordering::SeqCst);
    let worker = Scripted::new(|_| async { Ok(()) });
    let seen = worker.seen.clone();

    let running = stage.start_over(Arc::new(log), worker, settings(3));
    stage.idle(SCRIPTED).await?;

    let letters = dead_letters(&stage).await?;
    assert_eq!(letters.len(), 1);
    assert_eq!((letters[0].sequence, letters[0].event_id), (1, None));
    assert_eq!(letters[0].cause_class, "undecodable");
    assert_eq!(letters[0].payload, br#"{"secret":"#);
    assert!(!letters[0].error.contains("secret"), "{}", letters[0].error);
    assert_eq!(*seen.lock().unwrap(), [fine.id]);
    running.stop().await
}

#[tokio::test]
async fn a_panic_is_a_failed_attempt_and_not_a_dead_worker() -> anyhow::Result<()> {
    let stage = Stage::open().await?;
    let event = stage.sign_up("ada").await?;
    let broken = Arc::new(AtomicBool::new(true));
    let worker = {
        let broken = broken.clone();
        Scripted::new(move |_| {
            let broken = broken.swap(false, Ordering::SeqCst);
            async move {
                assert!(!broken, "ada@example.com");
                Ok(())
            }
        })
    };

    let running = stage.start(worker, settings(3));
    stage.idle(SCRIPTED).await?;

    let failed = stage.store.attempts_of(event.id).await?;
    assert_eq!((&*failed[0].cause_class, &*failed[0].error), ("panic", "the worker panicked"));
    assert_eq!((failed.len(), dead_letters(&stage).await?.len()), (1, 0));
    running.stop().await
}

#[tokio::test]
async fn an_attempt_that_never_ends_is_cut_off() -> anyhow::Result<()> {
    let stage = Stage::open().await?;
    stage.sign_up("ada").await?;
    let worker = Scripted::new(|_| std::future::pending());

    let running =
        stage.start(worker, WorkerSettings { timeout: Duration::from_millis(50), ..settings(2) });
    stage.idle(SCRIPTED).await?;

    let letters = dead_letters(&stage).await?;
    assert_eq!((letters.len(), &*letters[0].cause_class), (1, "timeout"));
    running.stop().await
}

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
    assert_eq!(running.metrics(Database::NAME).done.get(), 3, "handled, and twice again");
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
    let event = stage.sign_up("ada").await?;
    postgres.kill();

    // One needs the store for its effect, the other only to note its failures.
    let database = stage.start(Database::new(stage.store.clone()), settings(1));
    let failing = Scripted::new(|_| async { Err(later()) });
    let seen = failing.seen.clone();
    let failing = stage.start(failing, settings(2));
    eventually(LIMIT, "both have been put off more often than they have tries", async || {
        database.metrics(Database::NAME).postponed.get() >= 3 && seen.lock().unwrap().len() >= 4
    })
    .await?;
    postgres.restart().await?;
    stage.idle(Database::NAME).await?;
    stage.idle(SCRIPTED).await?;

    assert_eq!(stage.store.effects(&[event.id]).await?[&event.id].sign_ups, 1);
    let failed = stage.store.attempts_of(event.id).await?;
    let workers: Vec<_> = failed.iter().map(|it| &*it.worker).collect();
    assert_eq!(workers, [SCRIPTED; 2]);
    assert_eq!(dead_letters(&stage).await?.len(), 1);
    database.stop().await?;
    failing.stop().await
}

#[tokio::test]
async fn roles_are_granted_once_however_often_the_event_comes() -> anyhow::Result<()> {
    let stage = Stage::open().await?;
    let event = stage.sign_up("ada").await?;
    let rule = |name: &str, when: &str, role: &str| GrantRule {
        name: name.into(),
        when: when.into(),
        role: role.into(),
        expires_after: None,
    };
    let rules = vec![
        rule("everybody", "true", "reader"),
        rule("samples", "signup.claims.surname == 'Ple'", "sampler"),
        rule("nobody", "signup.claims.surname == 'Other'", "other"),
    ];
    let worker = Permissions::new(PermissionsSettings { rules }, stage.store.clone())
        .map_err(|errors| anyhow!("{errors:?}"))?;
    worker.handle(&crate::testing::task(event.clone())).await?;

    let running = stage.start(worker, settings(3));
    stage.idle(Permissions::NAME).await?;

    let grants = stage.store.grants_of(&event.person).await?;
    let pairs: Vec<_> = grants.iter().map(|it| (&*it.role, &*it.reason, it.event_id)).collect();
    assert_eq!(pairs, [("reader", "everybody", event.id), ("sampler", "samples", event.id)]);
    assert_eq!(stage.store.effects(&[event.id]).await?[&event.id].grant_sets, 1);
    running.stop().await
}

#[tokio::test]
async fn the_stream_may_go_down_in_the_middle() -> anyhow::Result<()> {
    let stage = Stage::open().await?;
    let mut nats = Nats::start().await?;
    let stream = JetStream::connect(JetStreamConfig {
        url: nats.url(),
        credentials: NatsCredentials::None,
        role: Role::Provisioner,
        stream: "SIGNUPS".into(),
        duplicate_window: Duration::from_secs(600),
        refusal_window: Duration::from_secs(30),
        retention: Duration::from_secs(86_400),
        max_bytes: 64 << 20,
        replicas: 1,
    })
    .await?;
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
