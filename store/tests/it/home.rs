//! A database of our own, and events to put into it.

use std::{future::poll_fn, path::PathBuf, pin::pin, task::Poll, time::Duration};

use secrecy::SecretString;
use serde_json::Value;
use sqlx::{AssertSqlSafe, Connection};
use tempfile::TempDir;
use time::{OffsetDateTime, macros::datetime};
use uuid::Uuid;
use vestibule_events::{
    Decision, Email, Identity, Kind, Outcome, Protocol, PseudonymKey, SignUp, SignUpEvent, Step,
    Verdict,
};
use vestibule_store::{FailedAttempt, FailedEvent, Store, StoreOptions, StoreUrl};
use vestibule_testkit::Postgres;

pub(crate) const NOW: OffsetDateTime = datetime!(2026-11-22 10:00:00.123456 UTC);

/// A server or a directory, taken away when dropped.
pub(crate) enum Home {
    Sqlite(TempDir),
    Postgres(Postgres),
}

impl Home {
    pub(crate) fn sqlite() -> anyhow::Result<Self> {
        Ok(Self::Sqlite(tempfile::tempdir()?))
    }

    pub(crate) async fn postgres() -> anyhow::Result<Self> {
        Ok(Self::Postgres(Postgres::start().await?))
    }

    pub(crate) fn url(&self) -> StoreUrl {
        match self {
            Self::Sqlite(directory) => StoreUrl::Sqlite(file_in(directory)),
            Self::Postgres(server) => StoreUrl::Postgres(SecretString::from(server.url())),
        }
    }

    /// The store as it is found at the first start.
    pub(crate) async fn empty_store(&self) -> anyhow::Result<Store> {
        Ok(Store::open(&self.url(), options()).await?)
    }

    pub(crate) async fn store(&self) -> anyhow::Result<Store> {
        let store = self.empty_store().await?;
        store.migrate().await?;
        Ok(store)
    }

    /// Statements behind the store's back.
    pub(crate) async fn execute(&self, sql: &str) -> anyhow::Result<()> {
        let sql = AssertSqlSafe(sql.to_owned());
        match self {
            Self::Sqlite(directory) => {
                let url = format!("sqlite://{}", file_in(directory).display());
                let mut connection = sqlx::SqliteConnection::connect(&url).await?;
                sqlx::raw_sql(sql).execute(&mut connection).await?;
                connection.close().await?;
            }
            Self::Postgres(server) => {
                let mut connection = sqlx::PgConnection::connect(&server.url()).await?;
                sqlx::raw_sql(sql).execute(&mut connection).await?;
                connection.close().await?;
            }
        }
        Ok(())
    }
}

pub(crate) fn file_in(directory: &TempDir) -> PathBuf {
    directory.path().join("store.db")
}

/// What is in the outbox; all of it can be read.
pub(crate) async fn unpublished(store: &Store, limit: u32) -> anyhow::Result<Vec<SignUpEvent>> {
    let rows = store.unpublished(0, limit).await?;
    rows.into_iter().map(|it| Ok(it.event?.event().clone())).collect()
}

/// Long enough for a busy machine.
pub(crate) fn options() -> StoreOptions {
    StoreOptions {
        connections: 4,
        acquire_timeout: Duration::from_secs(20),
        statement_timeout: Duration::from_secs(20),
    }
}

/// So that a test of a limit does not take long.
pub(crate) fn impatient() -> StoreOptions {
    StoreOptions {
        connections: 4,
        acquire_timeout: Duration::from_secs(3),
        statement_timeout: Duration::from_secs(2),
    }
}

/// The `number`th event, by somebody of that name; a higher number is a newer event.
pub(crate) fn event(number: u32, name: &str) -> SignUpEvent {
    event_with(number, name, serde_json::json!({ "city": "London" }), serde_json::json!({}))
}

pub(crate) fn event_with(number: u32, name: &str, claims: Value, changed: Value) -> SignUpEvent {
    let object = |value: Value| value.as_object().cloned().unwrap_or_default();
    let sign_up = SignUp {
        connector: "partners".parse().expect("a valid name"),
        protocol: Protocol::ApiConnector,
        step: Step::BeforeCreate,
        email: Some(Email::new(format!("{name}@example.com"))),
        identities: vec![],
        claims: object(claims),
        client: Some("client".to_owned()),
        locale: Some("en-GB".to_owned()),
        ip: None,
        object_id: None,
        correlation_id: None,
    };
    let key = key();
    let person = key.person(&sign_up);
    let fingerprint = key.fingerprint(&sign_up, &person);
    let decision = Decision::new(Outcome::Continue { claims: object(changed) });
    let time = NOW + Duration::from_secs(number.into());
    let milliseconds = u64::try_from(time.unix_timestamp_nanos() / 1_000_000).expect("after 1970");
    let id = uuid::Builder::from_unix_timestamp_millis(milliseconds, &[7; 10]).into_uuid();
    SignUpEvent::decided(id, time, person, fingerprint, sign_up, decision)
        .expect("this step makes an event")
}

/// Like [`event_with`], but an approver has to say yes first.
pub(crate) fn pending(number: u32, name: &str) -> SignUpEvent {
    let mut event = event_with(
        number,
        name,
        serde_json::json!({ "city": "london", "extension_1_Note": "a\0b", "big": u64::MAX }),
        serde_json::json!({}),
    );
    let claims = serde_json::json!({ "city": "London" });
    event.kind = Kind::Pending;
    event.decision.outcome = Outcome::Pending {
        message: "Please wait.".to_owned(),
        claims: claims.as_object().cloned().unwrap_or_default(),
    };
    event.sign_up.identities = vec![Identity {
        sign_in_type: "federated".to_owned(),
        issuer: "google.com".to_owned(),
        issuer_assigned_id: name.to_owned(),
    }];
    event
}

/// What `approver` decides about the request that `pending` opened, so many seconds after [`NOW`].
pub(crate) fn reviewed(
    number: u32,
    pending: &SignUpEvent,
    verdict: Verdict,
    approver: &str,
) -> SignUpEvent {
    let (id, time) = (id_of(number, approver), time_of(number));
    let reason = Some(format!("{approver} knows"));
    SignUpEvent::reviewed(id, time, pending, verdict, approver, reason, &key())
}

pub(crate) fn expired(number: u32, pending: &SignUpEvent) -> SignUpEvent {
    SignUpEvent::expired(id_of(number, "nobody"), time_of(number), pending, &key())
}

pub(crate) fn time_of(number: u32) -> OffsetDateTime {
    NOW + Duration::from_secs(number.into())
}

fn key() -> PseudonymKey {
    PseudonymKey::new(vec![7; 32])
}

/// Different for different names at the same time.
fn id_of(number: u32, name: &str) -> Uuid {
    let milliseconds = time_of(number).unix_timestamp_nanos() / 1_000_000;
    let milliseconds = u64::try_from(milliseconds).expect("after 1970");
    let hash =
        name.bytes().fold(0_u64, |hash, byte| hash.wrapping_mul(257).wrapping_add(byte.into()));
    let mut random = [0; 10];
    // The first bytes share theirs with version and variant.
    random[3..].copy_from_slice(&hash.to_be_bytes()[1..]);
    uuid::Builder::from_unix_timestamp_millis(milliseconds, &random).into_uuid()
}

pub(crate) fn unknown_event() -> Uuid {
    event(1_000_000, "nobody").id
}

/// Attempt `number` of `worker` at an event, so many seconds after [`NOW`]; it took as many
/// milliseconds.
pub(crate) fn failed(worker: &str, event: &SignUpEvent, number: u32) -> FailedEvent {
    FailedEvent {
        attempt: FailedAttempt {
            worker: worker.to_owned(),
            event_id: event.id,
            sequence: number.into(),
            started_at: time_of(number),
            took: Duration::from_millis(number.into()),
            cause_class: "timeout".to_owned(),
            error: format!("no answer to request {number}"),
        },
        person: event.person.clone(),
        payload: serde_json::to_vec(event).expect("an event serialises"),
        counts: true,
    }
}

/// Drops an operation when it waits for the `points`th time (from 0), as a crash would; `None` if it
/// had not ended by then.
pub(crate) async fn given_up_after<T>(
    points: u32,
    operation: impl Future<Output = T>,
) -> Option<T> {
    let mut operation = pin!(operation);
    let mut left = points;
    poll_fn(|context| match operation.as_mut().poll(context) {
        Poll::Ready(outcome) => Poll::Ready(Some(outcome)),
        Poll::Pending if left == 0 => Poll::Ready(None),
        Poll::Pending => {
            left -= 1;
            Poll::Pending
        }
    })
    .await
}
