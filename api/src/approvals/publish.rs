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

/// Between two looks for requests whose time is over, and at how many wait.
const EXPIRY_PAUSE: Duration = Duration::from_secs(5);

/// So many events are read at once.
const BATCH: u32 = 100;

/// Runs until `stop`. Whatever fails is tried again: an event leaves the outbox only once the
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
            let is_due = expired.is_none_or(|at: Instant| at.elapsed() >= EXPIRY_PAUSE);
            if is_due {
                expired = Some(Instant::now());
            }
            match round(&desk, &*log, is_due).await {
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

/// What was decided comes first: should there be a request that cannot be closed, nobody else waits
/// for it.
async fn round(desk: &ApprovalDesk, log: &dyn EventLog, expires: bool) -> anyhow::Result<()> {
    let Some(store) = desk.store.get() else { return Ok(()) };
    publish(store, log).await?;
    if expires { expire(desk, store).await } else { Ok(()) }
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
            store.published(&[id]).await?;
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
    let waiting = store.requests_waiting().await?;
    desk.waiting.set(i64::try_from(waiting).unwrap_or(i64::MAX));
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::OnceLock;

    use sqlx::{Connection as _, SqliteConnection};
    use vestibule_events::{
        Claims, Decision, Email, LocalLog, LocalLogConfig, Outcome, Protocol, PseudonymKey,
        Retention, SignUp, Step, Verdict,
    };
    use vestibule_store::{Decided, StoreOptions, StoreUrl};

    use super::*;

    fn pending(key: &PseudonymKey, person: &str) -> SignUpEvent {
        let sign_up = SignUp {
            connector: "partners".parse().unwrap(),
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
        let outcome = Outcome::Pending { message: "wait".into(), claims: Claims::new() };
        let (who, now) = (key.person(&sign_up), OffsetDateTime::now_utc());
        let fingerprint = key.fingerprint(&sign_up, &who);
        let decision = Decision::new(outcome);
        SignUpEvent::decided(Uuid::now_v7(), now, who, fingerprint, sign_up, decision).unwrap()
    }

    #[tokio::test]
    async fn a_request_that_cannot_be_closed_holds_up_no_decision() -> anyhow::Result<()> {
        let folder = tempfile::tempdir()?;
        let file = folder.path().join("store.db");
        let store = Store::open(&StoreUrl::Sqlite(file.clone()), StoreOptions::default()).await?;
        store.migrate().await?;
        let log = LocalLog::open(LocalLogConfig {
            path: folder.path().join("events.db"),
            duplicate_window: Duration::from_secs(600),
            refusal_window: Duration::from_secs(30),
            retention: Retention::For(Duration::from_secs(86_400)),
        })
        .await?;
        let key = Arc::new(PseudonymKey::new(vec![7; 32]));
        let desk = ApprovalDesk::new(Arc::new(OnceLock::from(store.clone())), Arc::clone(&key));
        let now = OffsetDateTime::now_utc();
        let hour = Duration::from_secs(3600);
        for (person, expires_at) in [("ada", now - hour), ("bob", now + hour)] {
            store.open_request("approvals", &pending(&key, person), expires_at, now).await?;
        }
        let mut behind = SqliteConnection::connect(&format!("sqlite://{}", file.display())).await?;
        sqlx::query("UPDATE approval_requests SET event = x'00' WHERE person = $1")
            .bind(pending(&key, "ada").person.as_str())
            .execute(&mut behind)
            .await?;
        behind.close().await?;
        let filter = vestibule_store::ApprovalFilter {
            person: Some(pending(&key, "bob").person),
            limit: 1,
            ..Default::default()
        };
        let bobs = store.approval_requests(&filter).await?.remove(0);
        let decided = desk.decide(&bobs, Verdict::Approve, "grace", None).await?;
        assert_eq!(decided, Decided::Now);

        let closed = round(&desk, &log, true).await;

        assert!(closed.is_err(), "ada's is not readable");
        assert_eq!((log.last_sequence(), store.unpublished(1).await?.len()), (1, 0));
        Ok(())
    }
}
