//! How many effects a second the store takes, one transaction each, from concurrent callers.
//!
//! `cargo run --release -p vestibule-store --example effects_per_second [CALLERS]` measures both
//! dialects, each with everything synced, in a temporary folder and with a server of its own.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use secrecy::SecretString;
use time::OffsetDateTime;
use uuid::Uuid;
use vestibule_events::{
    Decision, Email, Outcome, Protocol, PseudonymKey, SignUp, SignUpEvent, Step,
};
use vestibule_store::{Store, StoreError, StoreOptions, StoreUrl};
use vestibule_testkit::Postgres;

const ROUND: Duration = Duration::from_secs(3);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let callers = std::env::args().nth(1).map_or(Ok(16), |callers| callers.parse())?;
    let directory = tempfile::tempdir()?;
    let server = Postgres::start_durable().await?;
    let urls = [
        ("SQLite", StoreUrl::Sqlite(directory.path().join("store.db"))),
        ("PostgreSQL", StoreUrl::Postgres(SecretString::from(server.url()))),
    ];
    for (name, url) in urls {
        let options = StoreOptions { connections: callers, ..StoreOptions::default() };
        let store = Store::open(&url, options).await?;
        store.migrate().await?;
        let marks = measure(callers, &store, mark_done).await?;
        let sign_ups = measure(callers, &store, record_sign_up).await?;
        println!("{name}, {callers} callers: {marks} inbox rows/s, {sign_ups} sign-ups/s");
    }
    Ok(())
}

async fn mark_done(store: Store, number: u64) -> Result<(), StoreError> {
    let event = event(number);
    store.mark_done("worker", event.id, event.time).await.map(drop)
}

async fn record_sign_up(store: Store, number: u64) -> Result<(), StoreError> {
    let event = event(number);
    store.record_sign_up("database", &event, event.time).await.map(drop)
}

/// Transactions per second.
async fn measure<F>(callers: u32, store: &Store, effect: fn(Store, u64) -> F) -> anyhow::Result<u64>
where
    F: Future<Output = Result<(), StoreError>> + Send + 'static,
{
    let (next, begun) = (Arc::new(AtomicU64::new(0)), Instant::now());
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..callers {
        let (store, next) = (store.clone(), Arc::clone(&next));
        tasks.spawn(async move {
            while begun.elapsed() < ROUND {
                effect(store.clone(), next.fetch_add(1, Ordering::Relaxed)).await?;
            }
            Ok::<_, StoreError>(())
        });
    }
    while let Some(outcome) = tasks.join_next().await {
        outcome??;
    }
    let milliseconds = u64::try_from(begun.elapsed().as_millis())?;
    Ok(next.load(Ordering::Relaxed) * 1000 / milliseconds)
}

fn event(number: u64) -> SignUpEvent {
    let sign_up = SignUp {
        connector: "partners".parse().expect("a valid name"),
        protocol: Protocol::ApiConnector,
        step: Step::BeforeCreate,
        email: Some(Email::new(format!("n{number}@example.com"))),
        identities: vec![],
        claims: serde_json::json!({ "givenName": "Ada", "city": "London" })
            .as_object()
            .cloned()
            .unwrap_or_default(),
        client: None,
        locale: None,
        ip: None,
        object_id: None,
        correlation_id: None,
    };
    let key = PseudonymKey::new(vec![7; 32]);
    let person = key.person(&sign_up);
    let fingerprint = key.fingerprint(&sign_up, &person);
    let decision = Decision::new(Outcome::unchanged());
    let now = OffsetDateTime::now_utc();
    SignUpEvent::decided(Uuid::now_v7(), now, person, fingerprint, sign_up, decision)
        .expect("this step makes an event")
}
