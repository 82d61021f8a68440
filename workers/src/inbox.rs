//! Once an event is done, it stays done: the note that keeps an effect outside our store from being
//! repeated.

use std::{
    collections::HashSet,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use time::OffsetDateTime;
use uuid::Uuid;
use vestibule_store::Store;

use crate::{HandleError, Task, Worker};

/// A worker around another that gives it no event which it has dealt with.
///
/// For effects that cannot be written in one transaction with that note (a command, a call of
/// somebody else's service). The note is made once the effect is there; so the effect is repeated
/// where the process dies in between, or where it is cut off, and nowhere else. A key that stays the
/// same for an event, such as its id, lets the other side know the repetition.
#[derive(Debug)]
pub struct Inbox {
    worker: Arc<dyn Worker>,
    store: Store,
    /// Done, and not noted because the store did not answer. No more than are handled at a time: while
    /// the store is away, nothing begins.
    unnoted: Mutex<HashSet<Uuid>>,
}

impl Inbox {
    #[must_use]
    pub fn new(worker: Arc<dyn Worker>, store: Store) -> Self {
        Self { worker, store, unnoted: Mutex::default() }
    }

    fn unnoted(&self) -> MutexGuard<'_, HashSet<Uuid>> {
        // Nothing panics while it is held.
        self.unnoted.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[async_trait]
impl Worker for Inbox {
    fn name(&self) -> &str {
        self.worker.name()
    }

    async fn handle(&self, task: &Task) -> Result<(), HandleError> {
        let id = task.event.id;
        if self.store.is_done(self.name(), id).await? {
            return Ok(());
        }
        let is_unnoted = self.unnoted().contains(&id);
        if !is_unnoted {
            self.worker.handle(task).await?;
            self.unnoted().insert(id);
        }
        self.store.mark_done(self.name(), id, OffsetDateTime::now_utc()).await?;
        self.unnoted().remove(&id);
        Ok(())
    }

    fn has_one_target(&self) -> bool {
        self.worker.has_one_target()
    }

    async fn tend(&self) -> Option<Duration> {
        self.worker.tend().await
    }

    async fn close(&self) {
        self.worker.close().await;
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        sync::atomic::{AtomicU32, Ordering},
    };

    use anyhow::anyhow;
    use vestibule_store::{StoreOptions, StoreUrl};

    use super::*;
    use crate::{
        Cause,
        testing::{SCRIPTED, Scripted, sign_up, task},
    };

    #[tokio::test]
    async fn what_is_done_is_not_done_again_and_what_failed_is() -> anyhow::Result<()> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("store.db");
        let store = Store::open(&StoreUrl::Sqlite(path.clone()), StoreOptions::default()).await?;
        store.migrate().await?;
        let (begun, away) = (Arc::new(AtomicU32::new(0)), folder.path().join("away.db"));
        let worker = {
            let (begun, away) = (Arc::clone(&begun), away.clone());
            Scripted::new(move |_| {
                let (path, away, begun) = (path.clone(), away.clone(), Arc::clone(&begun));
                async move {
                    match begun.fetch_add(1, Ordering::SeqCst) {
                        0 => Err(HandleError::retry(Cause::Unavailable, anyhow!("later"))),
                        // The store goes while the effect comes to be.
                        _ => fs::rename(&path, &away)
                            .map_err(|it| HandleError::park(Cause::Refused, it)),
                    }
                }
            })
        };
        let inbox = Inbox::new(Arc::new(worker), store.clone());
        let task = task(sign_up("ada"));

        assert!(matches!(inbox.handle(&task).await, Err(HandleError::Retry { .. })));
        assert!(matches!(inbox.handle(&task).await, Err(HandleError::StoreUnavailable(_))));
        assert!(matches!(inbox.handle(&task).await, Err(HandleError::StoreUnavailable(_))));
        fs::rename(&away, folder.path().join("store.db"))?;
        inbox.handle(&task).await?;
        inbox.handle(&task).await?;

        assert_eq!(begun.load(Ordering::SeqCst), 2, "a failure, and the effect once");
        assert!(store.is_done(SCRIPTED, task.event.id).await?);
        Ok(())
    }
}
