//! Brings events that were made in the store to the log: what approvers decided, and what became of
//! sign-ups that were let past.

use std::{
    collections::HashSet,
    sync::{Arc, OnceLock},
    time::Duration,
};

use futures_util::future::join_all;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};
use uuid::Uuid;
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
/// One that this version cannot read stays there and holds up no other.
pub async fn publish_outbox(
    store: Arc<OnceLock<Store>>,
    log: Arc<dyn EventLog>,
    stop: CancellationToken,
) {
    let rounds = async {
        let mut fails = false;
        let mut unreadable = HashSet::new();
        loop {
            let published = match store.get() {
                Some(store) => publish(store, &*log, &mut unreadable).await,
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

/// Empties the outbox, but for what cannot be read: that is said once for each event, and kept in
/// `unreadable` as said.
pub(crate) async fn publish(
    store: &Store,
    log: &dyn EventLog,
    unreadable: &mut HashSet<Uuid>,
) -> anyhow::Result<()> {
    let mut place = 0;
    loop {
        let rows = store.unpublished(place, BATCH).await?;
        let Some(last) = rows.last() else { return Ok(()) };
        place = last.place;
        let (mut ids, mut events) = (Vec::new(), Vec::new());
        for row in rows {
            match row.event {
                Ok(event) => {
                    ids.push(row.event_id);
                    events.push(event);
                }
                Err(error) if unreadable.insert(row.event_id) => warn!(
                    event = %row.event_id,
                    reason = error.reason,
                    "an event in the store's outbox is in a form that this version cannot read; it \
                     stays there for a version that can"
                ),
                Err(_) => {}
            }
        }
        // Together, so that they share the log's commit.
        let appended = join_all(events.into_iter().map(|it| log.append_written(it))).await;
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

#[cfg(test)]
mod tests {
    use futures_util::TryStreamExt as _;
    use sqlx::{Connection as _, SqliteConnection};
    use time::OffsetDateTime;
    use vestibule_events::{
        Claims, ConsumerSpec, Decision, Email, Filter, LocalLog, LocalLogConfig, Outcome, Protocol,
        PseudonymKey, Replay, Retention, SignUp, SignUpEvent, Start, Step,
    };
    use vestibule_store::{StoreOptions, StoreUrl};

    use super::*;

    fn accepted() -> SignUpEvent {
        let sign_up = SignUp {
            connector: "partners".parse().unwrap(),
            protocol: Protocol::ApiConnector,
            step: Step::BeforeCreate,
            email: Some(Email::new("ada@example.com")),
            identities: vec![],
            claims: Claims::new(),
            client: None,
            locale: None,
            ip: None,
            object_id: None,
            correlation_id: None,
        };
        let key = PseudonymKey::new(vec![7; 32]);
        let (who, now) = (key.person(&sign_up), OffsetDateTime::now_utc());
        let fingerprint = key.fingerprint(&sign_up, &who);
        let decision = Decision::new(Outcome::unchanged());
        SignUpEvent::decided(Uuid::now_v7(), now, who, fingerprint, sign_up, decision).unwrap()
    }

    #[tokio::test]
    async fn what_a_newer_version_wrote_is_published_whole_or_left_to_it() -> anyhow::Result<()> {
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
        let event = accepted();
        let mut newer = serde_json::to_value(&event)?;
        newer["data"]["decision"]["weight"] = 7.into();
        let mut behind = SqliteConnection::connect(&format!("sqlite://{}", file.display())).await?;
        // More of them than are read at once, and all of them in front.
        let unreadable = BATCH + 5;
        sqlx::query(
            "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < $1)
             INSERT INTO outbox (event_id, event, written_at)
             SELECT randomblob(16), x'7b7d', '2026-11-22' FROM n",
        )
        .bind(unreadable)
        .execute(&mut behind)
        .await?;
        sqlx::query(
            "INSERT INTO outbox (event_id, event, written_at) VALUES ($1, $2, '2026-11-22')",
        )
        .bind(event.id)
        .bind(newer.to_string().into_bytes())
        .execute(&mut behind)
        .await?;
        let mut said = HashSet::new();

        publish(&store, &log, &mut said).await?;
        publish(&store, &log, &mut said).await?;

        let everything = Replay {
            start: Start::Beginning,
            until: None,
            filter: Filter::default(),
            person: None,
            follow: false,
        };
        let stored: Vec<_> = log.replay(everything).await?.try_collect().await?;
        assert_eq!(stored.iter().map(|it| it.event.id).collect::<Vec<_>>(), [event.id]);
        let spec = ConsumerSpec {
            name: "reader".into(),
            start: Start::Beginning,
            filter: Filter::default(),
            ack_wait: Duration::from_secs(60),
            max_in_flight: 1,
        };
        let raw = log.consumer(spec).await?.next().await?.raw;
        assert_eq!(serde_json::from_slice::<serde_json::Value>(&raw)?, newer);
        let left = store.unpublished(0, 1000).await?;
        assert_eq!((left.len(), said.len()), (unreadable as usize, unreadable as usize));
        assert!(left.iter().all(|it| it.event.is_err()));
        Ok(())
    }
}
