//! Who waits for whom.

use std::{collections::HashMap, sync::atomic::AtomicUsize};

use super::*;

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
    let metrics = running.metrics(SCRIPTED);
    eventually(LIMIT, "nothing is in hand", async || metrics.in_hand.get() == 0).await?;
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
async fn what_comes_from_the_store_waits_for_its_person_too() -> anyhow::Result<()> {
    let stage = Stage::open().await?;
    let (first, second) = (stage.sign_up("ada").await?, stage.sign_up("ada").await?);
    let (gate, ended) = (Arc::new(Semaphore::new(0)), Arc::new(Mutex::new(Vec::new())));
    let worker = {
        let (gate, ended, first) = (gate.clone(), ended.clone(), first.id);
        Scripted::new(move |task| {
            let (gate, ended) = (gate.clone(), ended.clone());
            async move {
                if task.event.id == first && task.attempt == 1 {
                    return Err(later());
                }
                if task.event.id != first {
                    gate.acquire().await.unwrap().forget();
                }
                ended.lock().unwrap().push(task.event.id);
                Ok(())
            }
        })
    };
    let seen = worker.seen.clone();

    let running = stage.start(worker, settings(3));
    eventually(LIMIT, "the first is back from the store and the second runs", async || {
        let metrics = running.metrics(SCRIPTED);
        let (retried, begun) = (metrics.retried.get(), seen.lock().unwrap().len());
        (retried, begun, metrics.in_hand.get()) == (1, 2, 2)
    })
    .await?;
    assert_eq!(*seen.lock().unwrap(), [first.id, second.id]);
    gate.add_permits(1);
    stage.idle(SCRIPTED).await?;

    assert_eq!(*ended.lock().unwrap(), [second.id, first.id]);
    running.stop().await
}
