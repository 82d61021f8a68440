//! The runtime over the real log and the real store.

mod faults;
mod order;
mod pressure;
mod retries;

use std::{
    sync::{Arc, Mutex, atomic::Ordering},
    time::Duration,
};

use anyhow::anyhow;
use prometheus_client::metrics::counter::Counter;
use tokio::sync::{Notify, Semaphore};
use uuid::Uuid;
use vestibule_events::{JetStream, JetStreamConfig, NatsCredentials, Role};
use vestibule_store::{Letter, LetterFilter};
use vestibule_testkit::{Nats, eventually};

use super::*;
use crate::testing::{LIMIT, SCRIPTED, Scripted, Shaky, Stage, settings};

/// Longer than any test.
const LONG: Duration = Duration::from_secs(3600);

fn later() -> HandleError {
    HandleError::retry(Cause::Unavailable, anyhow!("the provider is down"))
}

fn hopeless() -> HandleError {
    HandleError::park(Cause::Refused, anyhow!("no such user <bob@example.com>"))
}

/// The dead letters of the scripted worker, the oldest first.
async fn dead_letters(stage: &Stage) -> anyhow::Result<Vec<Letter>> {
    let mut letters = stage.store.letters(&LetterFilter::default(), None, 10_000).await?;
    letters.retain(|it| it.worker == SCRIPTED);
    letters.reverse();
    Ok(letters)
}

/// Waits until something was counted so often: the store may tell of it before the counter does.
async fn reaches(counter: &Counter, count: u64) -> anyhow::Result<()> {
    eventually(LIMIT, &format!("it is counted {count} times"), async || counter.get() == count)
        .await
}

/// A worker whose attempts each wait for a permit, and how many have begun.
fn gated() -> (Scripted, Arc<Semaphore>, Arc<Notify>) {
    let (gate, began) = (Arc::new(Semaphore::new(0)), Arc::new(Notify::new()));
    let worker = {
        let (gate, began) = (gate.clone(), began.clone());
        Scripted::new(move |_| {
            let (gate, began) = (gate.clone(), began.clone());
            async move {
                began.notify_one();
                gate.acquire().await.unwrap().forget();
                Ok(())
            }
        })
    };
    (worker, gate, began)
}

async fn stream(nats: &Nats) -> anyhow::Result<JetStream> {
    Ok(JetStream::connect(JetStreamConfig {
        url: nats.url(),
        credentials: NatsCredentials::None,
        role: Role::Provisioner,
        inbox_prefix: None,
        stream: "SIGNUPS".into(),
        duplicate_window: Duration::from_secs(600),
        refusal_window: Duration::from_secs(30),
        retention: Duration::from_secs(86_400),
        max_bytes: 64 << 20,
        replicas: 1,
    })
    .await?)
}
