//! Brings decisions from the store's outbox to the log, and closes requests whose time is over.

use std::{sync::Arc, time::Duration};

use time::OffsetDateTime;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};
use uuid::Uuid;
use vestibule_events::{EventLog, SignUpEvent};
use vestibule_store::Store;

use super::ApprovalDesk;

/// Between two looks at the outbox: decisions may be made by other processes.
const PAUSE: Duration = Duration::from_millis(500);

/// After a failure.
const LONGER_PAUSE: Duration = Duration::from_secs(5);

/// Between two looks for requests whose time is over.
const EXPIRY_PAUSE: Duration = Duration::from_secs(5);

/// So many events are read at once.
const BATCH: u32 = 100;

/// Runs until `stop`. Whatever fails is tried again: an event is marked as published only once the
/// log holds it, and to publish it twice does no harm, as it keeps its id.
pub async fn publish_decisions(
    desk: ApprovalDesk,
    log: Arc<dyn EventLog>,
    stop: CancellationToken,
) {
    let rounds = async {
        let mut expired = None;
        let mut fails = false;
        loop {
            let round = async {
                let Some(store) = desk.store.get() else { return anyhow::Ok(()) };
                if expired.is_none_or(|at: Instant| at.elapsed() >= EXPIRY_PAUSE) {
                    expire(&desk, store).await?;
                    expired = Some(Instant::now());
                }
                publish(store, &*log).await
            };
            match round.await {
                Ok(()) => {
                    if fails {
                        info!("decisions about requests for approval are published again");
                    }
                    fails = false;
                    sleep(PAUSE).await;
                }
                Err(error) => {
                    if !fails {
                        warn!(
                            error = format!("{error:#}"),
                            "could not publish decisions about requests for approval; trying again"
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

async fn publish(store: &Store, log: &dyn EventLog) -> anyhow::Result<()> {
    loop {
        let events = store.unpublished(BATCH).await?;
        if events.is_empty() {
            return Ok(());
        }
        for event in events {
            let id = event.id;
            log.append(event).await?;
            store.mark_published(&[id], OffsetDateTime::now_utc()).await?;
        }
    }
}

async fn expire(desk: &ApprovalDesk, store: &Store) -> anyhow::Result<()> {
    let now = OffsetDateTime::now_utc();
    let event = |request: &vestibule_store::ApprovalRequest| {
        SignUpEvent::expired(Uuid::now_v7(), now, &request.event, &desk.key)
    };
    let expired = store.expire_requests(now, event, BATCH).await?;
    if expired > 0 {
        info!(requests = expired, "requests for approval have expired");
    }
    Ok(())
}
