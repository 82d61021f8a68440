//! Brings events that were made in the store to the log: what approvers decided, and what became of
//! sign-ups that were let past.

use std::{
    sync::{Arc, OnceLock},
    time::Duration,
};

use futures_util::future::join_all;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};
use vestibule_events::EventLog;
use vestibule_store::Store;

/// Between two looks at the outbox: events may be made by other processes.
const PAUSE: Duration = Duration::from_millis(500);

/// After a failure.
const LONGER_PAUSE: Duration = Duration::from_secs(5);

/// So many events are read at once.
const BATCH: u32 = 100;

/// Runs until `stop`. The store may be opened later. Whatever fails is tried again: an event leaves
/// the outbox only once the log holds it, and to publish it twice does no harm, as it keeps its id.
pub async fn publish_outbox(
    store: Arc<OnceLock<Store>>,
    log: Arc<dyn EventLog>,
    stop: CancellationToken,
) {
    let rounds = async {
        let mut fails = false;
        loop {
            let published = match store.get() {
                Some(store) => publish(store, &*log).await,
                None => Ok(()),
            };
            match published {
                Ok(()) => {
                    if fails {
                        info!("events of the store's outbox are published again");
                    }
                    fails = false;
                    sleep(PAUSE).await;
                }
                Err(error) => {
                    if !fails {
                        warn!(
                            error = format!("{error:#}"),
                            "could not publish events of the store's outbox; trying again"
                        );
                    }
                    fails = true;
                    sleep(LONGER_PAUSE).await;
                }
            }
        }
    };
    tokio::select! {
        () = stop.cancelled() => {}
        () = rounds => {}
    }
}

/// Empties the outbox.
pub(crate) async fn publish(store: &Store, log: &dyn EventLog) -> anyhow::Result<()> {
    loop {
        let events = store.unpublished(BATCH).await?;
        if events.is_empty() {
            return Ok(());
        }
        let ids: Vec<_> = events.iter().map(|it| it.id).collect();
        // Together, so that they share the log's commit.
        let appended = join_all(events.into_iter().map(|it| log.append(it))).await;
        let (mut held, mut failed) = (Vec::new(), None);
        for (id, appended) in ids.into_iter().zip(appended) {
            match appended {
                Ok(_) => held.push(id),
                Err(error) => failed = Some(error),
            }
        }
        store.published(&held).await?;
        if let Some(error) = failed {
            return Err(error.into());
        }
    }
}
