//! What fails: tried again from the store, parked, sent back.

use std::sync::atomic::{AtomicBool, AtomicU32};

use time::OffsetDateTime;
use vestibule_store::{AfterFailure, FailedAttempt, FailedEvent, LetterState, Standing};

use super::*;
use crate::{GrantRule, PermissionTargets, Permissions, PermissionsSettings};

/// Failures wait for longer than the test.
fn patient(tries: u32) -> WorkerSettings {
    let mut settings = settings(tries);
    settings.retry.initial = LONG;
    settings.retry.max = LONG;
    settings
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
    reaches(&running.metrics(SCRIPTED).retried, 2).await?;
    running.stop().await
}

#[tokio::test]
async fn after_the_last_try_an_event_is_parked_and_delays_nobody() -> anyhow::Result<()> {
    let stage = Stage::open().await?;
    let poisoned = stage.sign_up("ada").await?;
    let nobody = stage.sign_up("bob").await?;
    let fine = stage.sign_up("eve").await?;
    let worker = {
        let (poisoned, nobody) = (poisoned.id, nobody.id);
        Scripted::new(move |task| async move {
            match task.event.id {
                id if id == poisoned => Err(later()),
                id if id == nobody => Err(hopeless()),
                _ => Ok(()),
            }
        })
    };
    let seen = worker.seen.clone();

    let running = stage.start(worker, settings(3));
    stage.idle(SCRIPTED).await?;

    let count = |id| seen.lock().unwrap().iter().filter(|it| **it == id).count();
    assert_eq!((count(poisoned.id), count(nobody.id), count(fine.id)), (3, 1, 1));
    let mut letters = dead_letters(&stage).await?;
    letters.sort_by_key(|it| it.sequence);
    let [last_try, at_once] = letters.as_slice() else {
        panic!("{letters:?}");
    };
    assert_eq!(last_try.event_id, Some(poisoned.id));
    assert_eq!(last_try.person, Some(poisoned.person.clone()));
    assert_eq!(last_try.cause_class, "unavailable");
    let whole = stage.store.letter(last_try.id).await?.expect("it is there");
    assert_eq!(serde_json::from_slice::<SignUpEvent>(&whole.payload)?, poisoned);
    assert_eq!(at_once.cause_class, "refused");
    assert_eq!(at_once.error, "no such user …", "an address is not kept");
    assert_eq!(stage.store.attempts_of(poisoned.id).await?.len(), 3);
    reaches(&running.metrics(SCRIPTED).parked, 2).await?;
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
    let whole = stage.store.letter(letters[0].id).await?.expect("it is there");
    assert_eq!(whole.payload, br#"{"secret":"#);
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

/// Does something besides its events: breaks at first, and then never ends.
#[derive(Clone, Debug, Default)]
struct Tending {
    begun: Arc<AtomicU32>,
    /// What goes on now.
    running: Arc<()>,
}

impl Tending {
    fn is_running(&self) -> bool {
        // The worker itself holds one, and so do we.
        Arc::strong_count(&self.running) > 2
    }
}

#[async_trait]
impl Worker for Tending {
    fn name(&self) -> &str {
        SCRIPTED
    }

    async fn handle(&self, _: &Task) -> Result<(), HandleError> {
        Ok(())
    }

    async fn tend(&self) -> Option<Duration> {
        let _running = Arc::clone(&self.running);
        let before = self.begun.fetch_add(1, Ordering::SeqCst);
        assert!(before > 0, "ada@example.com");
        std::future::pending().await
    }
}

#[tokio::test]
async fn what_goes_on_beside_the_events_breaks_no_worker_and_ends_with_a_pause()
-> anyhow::Result<()> {
    let stage = Stage::open().await?;
    let worker = Tending::default();
    let running = stage.start(worker.clone(), settings(3));
    let goes_on = async |wanted| {
        eventually(LIMIT, "it goes on as it should", async || worker.is_running() == wanted).await
    };

    eventually(LIMIT, "it was begun again", async || worker.begun.load(Ordering::SeqCst) == 2)
        .await?;
    goes_on(true).await?;
    stage.sign_up("ada").await?;
    stage.idle(SCRIPTED).await?;
    stage.store.pause_worker(SCRIPTED, "grace", "it moves", OffsetDateTime::now_utc()).await?;
    goes_on(false).await?;
    stage.store.resume_worker(SCRIPTED).await?;
    goes_on(true).await?;
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
    let store = stage.store.clone();
    let targets = PermissionTargets::new(vec![], store.clone(), LIMIT)
        .map_err(|errors| anyhow!("{errors:?}"))?;
    let worker = Permissions::new(PermissionsSettings { rules }, targets, store)
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
async fn a_thousand_that_failed_do_not_keep_new_ones_waiting() -> anyhow::Result<()> {
    let stage = Stage::open().await?;
    // More than a consumer may have unacknowledged.
    let failing = stage.sign_ups(1200).await?;
    let worker = {
        let failing: Arc<std::collections::HashSet<_>> =
            Arc::new(failing.iter().map(|it| it.id).collect());
        Scripted::new(move |task| {
            let fails = failing.contains(&task.event.id);
            async move { if fails { Err(later()) } else { Ok(()) } }
        })
    };
    let seen = worker.seen.clone();

    let running = stage.start(worker, patient(3));
    stage.acknowledged(SCRIPTED).await?;
    let fine = stage.sign_up("eve").await?;
    stage.acknowledged(SCRIPTED).await?;

    assert_eq!(seen.lock().unwrap().last(), Some(&fine.id));
    assert_eq!(stage.store.set_aside(SCRIPTED).await?.retries, 1200);
    eventually(LIMIT, "the gauge shows them", async || {
        running.metrics(SCRIPTED).retries.get() == 1200
    })
    .await?;
    assert_eq!(running.metrics(SCRIPTED).done.get(), 1);
    running.stop().await
}

#[tokio::test]
async fn what_was_sent_back_is_delivered_or_parked_again() -> anyhow::Result<()> {
    let stage = Stage::open().await?;
    let (mended, broken) = (stage.sign_up("ada").await?, stage.sign_up("bob").await?);
    let works = Arc::new(AtomicBool::new(false));
    let worker = {
        let (works, mended) = (works.clone(), mended.id);
        Scripted::new(move |task| {
            let works = works.load(Ordering::SeqCst) && task.event.id == mended;
            async move { if works { Ok(()) } else { Err(hopeless()) } }
        })
    };
    let seen = worker.seen.clone();
    let running = stage.start(worker, settings(3));
    stage.idle(SCRIPTED).await?;
    let letters: Vec<_> = dead_letters(&stage).await?.iter().map(|it| it.id).collect();
    assert_eq!(letters.len(), 2);

    works.store(true, Ordering::SeqCst);
    let now = OffsetDateTime::now_utc();
    let redriven = stage.store.redrive(&letters, |_| now, "grace", now).await?;
    assert_eq!((redriven.moved, redriven.skipped), (2, 0));
    stage.idle(SCRIPTED).await?;

    let letters = dead_letters(&stage).await?;
    let state = |event| letters.iter().find(|it| it.event_id == Some(event)).map(|it| it.state);
    assert_eq!(state(mended.id), Some(LetterState::Delivered));
    assert_eq!(state(broken.id), Some(LetterState::Parked));
    assert_eq!(seen.lock().unwrap().len(), 4);
    reaches(&running.metrics(SCRIPTED).parked, 3).await?;
    running.stop().await
}

#[tokio::test]
async fn an_event_that_is_set_aside_is_not_tried_when_the_log_gives_it_again() -> anyhow::Result<()>
{
    let stage = Stage::open().await?;
    let (waits, parked) = (stage.sign_up("ada").await?, stage.sign_up("bob").await?);
    let log = Shaky::new(stage.log.clone());
    log.faults.ack.store(4, Ordering::SeqCst);
    let worker = {
        let waits = waits.id;
        Scripted::new(move |task| async move {
            Err(if task.event.id == waits { later() } else { hopeless() })
        })
    };
    let seen = worker.seen.clone();
    let settings = WorkerSettings { ack_wait: Duration::from_millis(200), ..patient(3) };

    let running = stage.start_over(Arc::new(log.clone()), worker, settings);
    stage.acknowledged(SCRIPTED).await?;

    assert_eq!(log.faults.ack.load(Ordering::SeqCst), 0, "each was given again");
    assert_eq!(seen.lock().unwrap().len(), 2);
    assert_eq!(stage.store.standing(SCRIPTED, waits.id).await?, Standing::Waiting);
    assert_eq!(stage.store.standing(SCRIPTED, parked.id).await?, Standing::Parked);
    running.stop().await
}

#[tokio::test]
async fn what_waits_and_is_no_event_is_parked_and_does_not_come_again() -> anyhow::Result<()> {
    let stage = Stage::open().await?;
    let event = crate::testing::sign_up("ada");
    let failed = FailedEvent {
        attempt: FailedAttempt {
            worker: SCRIPTED.into(),
            event_id: event.id,
            sequence: 7,
            started_at: OffsetDateTime::now_utc(),
            took: Duration::ZERO,
            cause_class: "unavailable".into(),
            error: "the provider is down".into(),
        },
        person: event.person,
        payload: b"ada@example.com".to_vec(),
        counts: true,
    };
    let due_at = OffsetDateTime::now_utc();
    stage.store.fail(&failed, |_| AfterFailure::Retry { due_at }).await?;
    let worker = Scripted::new(|_| async { Ok(()) });
    let seen = worker.seen.clone();

    let running = stage.start(worker, settings(3));
    stage.idle(SCRIPTED).await?;

    let letters = dead_letters(&stage).await?;
    assert_eq!((letters.len(), &*letters[0].cause_class), (1, "undecodable"));
    assert!(!letters[0].error.contains("ada"), "{}", letters[0].error);
    assert!(seen.lock().unwrap().is_empty());
    running.stop().await
}

#[tokio::test]
async fn two_processes_share_what_waits_and_neither_repeats_the_other() -> anyhow::Result<()> {
    let stage = Stage::open().await?;
    stage.sign_ups(200).await?;
    let down = Arc::new(AtomicBool::new(true));
    let worker = || {
        let down = down.clone();
        Scripted::new(move |_| {
            let down = down.load(Ordering::SeqCst);
            async move { if down { Err(hopeless()) } else { Ok(()) } }
        })
    };
    let running = stage.start(worker(), settings(1));
    stage.idle(SCRIPTED).await?;
    running.stop().await?;

    down.store(false, Ordering::SeqCst);
    let letters: Vec<_> = dead_letters(&stage).await?.iter().map(|it| it.id).collect();
    let now = OffsetDateTime::now_utc();
    stage.store.redrive(&letters, |_| now, "grace", now).await?;
    // Each with a log of its own, as a consumer of the local log is open once; both are empty here.
    let (first, second) = (worker(), worker());
    let seen = [first.seen.clone(), second.seen.clone()];
    let other = Stage::open().await?;
    let first = stage.start(first, settings(1));
    let second = stage.start_over(Arc::new(other.log.clone()), second, settings(1));
    stage.idle(SCRIPTED).await?;

    let [first_seen, second_seen] = seen.map(|it| it.lock().unwrap().len());
    assert_eq!(first_seen + second_seen, 200, "{first_seen} and {second_seen}");
    let letters = dead_letters(&stage).await?;
    assert!(letters.iter().all(|it| it.state == LetterState::Delivered));
    first.stop().await?;
    second.stop().await
}

#[tokio::test]
async fn an_event_from_the_store_is_ours_for_as_long_as_its_attempt_takes() -> anyhow::Result<()> {
    let stage = Stage::open().await?;
    stage.sign_up("ada").await?;
    let brief = WorkerSettings { ack_wait: Duration::from_secs(3), ..settings(1) };
    let running = stage.start(Scripted::new(|_| async { Err(hopeless()) }), brief.clone());
    stage.idle(SCRIPTED).await?;
    running.stop().await?;
    let letters: Vec<_> = dead_letters(&stage).await?.iter().map(|it| it.id).collect();
    let now = OffsetDateTime::now_utc();
    stage.store.redrive(&letters, |_| now, "grace", now).await?;

    let (slow, gate, began) = gated();
    let slow = stage.start(slow, brief.clone());
    began.notified().await;
    let other = Stage::open().await?;
    let idle = Scripted::new(|_| async { Ok(()) });
    let seen = idle.seen.clone();
    let idle = stage.start_over(Arc::new(other.log.clone()), idle, brief.clone());
    let claimed = OffsetDateTime::now_utc();
    eventually(LIMIT, "the lease is extended again and again", async || {
        let until = stage.store.next_retry(SCRIPTED).await?;
        anyhow::Ok(until.is_some_and(|it| it > claimed + brief.ack_wait.mul_f64(1.5)))
    })
    .await?;
    gate.add_permits(1);
    stage.idle(SCRIPTED).await?;

    assert!(seen.lock().unwrap().is_empty(), "two had it at once");
    assert_eq!(dead_letters(&stage).await?[0].state, LetterState::Delivered);
    slow.stop().await?;
    idle.stop().await
}
