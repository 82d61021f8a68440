//! Closes requests for approval whose time is over.

use std::time::Duration;

use time::OffsetDateTime;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};
use uuid::Uuid;
use vestibule_events::SignUpEvent;
use vestibule_store::Store;

use super::ApprovalDesk;

/// Between two looks for requests whose time is over, and at how many wait.
const PAUSE: Duration = Duration::from_secs(5);

/// So many are closed at once.
const BATCH: u32 = 100;

/// Runs until `stop`. Whatever fails is tried again.
pub async fn expire_requests(desk: ApprovalDesk, stop: CancellationToken) {
    let rounds = async {
        let mut fails = false;
        loop {
            let expired = match desk.store.get() {
                Some(store) => expire(&desk, store).await,
                None => Ok(()),
            };
            if let Err(error) = &expired
                && !fails
            {
                warn!(
                    error = format!("{error:#}"),
                    "could not close requests for approval whose time is over; trying again"
                );
            }
            fails = expired.is_err();
            sleep(PAUSE).await;
        }
    };
    tokio::select! {
        () = stop.cancelled() => {}
        () = rounds => {}
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
    use std::{
        collections::HashSet,
        sync::{Arc, OnceLock},
    };

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

        let closed = expire(&desk, &store).await;
        crate::outbox::publish(&store, &log, &mut HashSet::new()).await?;

        assert!(closed.is_err(), "ada's is not readable");
        assert_eq!((log.last_sequence(), store.unpublished(0, 1).await?.len()), (1, 0));
        Ok(())
    }
}
