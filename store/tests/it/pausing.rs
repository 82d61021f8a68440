//! Pausing workers, on both dialects.

use vestibule_store::{Done, PausedWorker};

use crate::home::{Home, NOW, time_of};

pub(crate) async fn a_worker_is_paused_until_it_is_resumed(home: &Home) -> anyhow::Result<()> {
    let (store, of_other_process) = (home.store().await?, home.store().await?);
    let paused = |worker: &str| PausedWorker {
        worker: worker.to_owned(),
        paused_at: NOW,
        paused_by: "grace".to_owned(),
        reason: "the provider is moving".to_owned(),
    };
    assert_eq!(store.paused_workers().await?, []);

    for worker in ["permissions", "notify"] {
        let done = store.pause_worker(worker, "grace", "the provider is moving", NOW).await?;
        assert_eq!(done, Done::Now);
    }
    let again = store.pause_worker("notify", "eve", "another reason", time_of(5)).await?;
    assert_eq!(again, Done::Before);

    assert_eq!(of_other_process.paused("notify").await?, Some(paused("notify")));
    assert_eq!(store.paused("database").await?, None);
    assert_eq!(store.paused_workers().await?, [paused("notify"), paused("permissions")]);
    assert!(store.resume_worker("notify").await?);
    assert!(!store.resume_worker("notify").await?);
    assert_eq!(of_other_process.paused("notify").await?, None);
    assert_eq!(store.paused_workers().await?, [paused("permissions")]);
    Ok(())
}
