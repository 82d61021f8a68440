//! What the admin listener says about this process.

use std::{
    sync::{Arc, OnceLock},
    time::Duration,
};

use async_trait::async_trait;
use vestibule_api::{Check, Readiness, ReadinessReport};
use vestibule_events::{EventLog, JetStream, LocalLog, relay};
use vestibule_store::Store;

/// A probe must not hang on what it probes.
const PROBE_LIMIT: Duration = Duration::from_millis(500);

/// The parts of this process that can fail. Only the local log can keep sign-ups from being
/// answered; without the others they wait for what comes after.
#[derive(Clone, Debug, Default)]
pub(crate) struct Parts {
    pub(crate) log: Option<LocalLog>,
    pub(crate) stream: Option<JetStream>,
    /// Set once it is open, which may take as long as its server stays away.
    pub(crate) store: Option<Arc<OnceLock<Store>>>,
}

#[async_trait]
impl Readiness for Parts {
    async fn check(&self) -> ReadinessReport {
        let mut report = ReadinessReport::default();
        let checks = &mut report.checks;
        if let Some(log) = &self.log {
            let check = match within(log.ready()).await {
                None => log.warning().map_or(Check::Ok, Check::Degraded),
                Some(problem) => Check::Failed(format!("events cannot be stored: {problem}")),
            };
            checks.insert("log".to_owned(), check);
        }
        if let Some(stream) = &self.stream {
            let check = match within(stream.ready()).await {
                None => Check::Ok,
                Some(problem) => Check::Degraded(match self.waiting_for_relay().await {
                    Some(waiting) => format!("{waiting} events wait for NATS: {problem}"),
                    None => format!("NATS: {problem}"),
                }),
            };
            checks.insert("stream".to_owned(), check);
        }
        if let Some(store) = &self.store {
            let check = match store.get() {
                Some(store) => within(store.ping()).await.map_or(Check::Ok, Check::Degraded),
                None => Check::Degraded("does not answer yet; workers wait for it".to_owned()),
            };
            checks.insert("store".to_owned(), check);
        }
        report
    }
}

impl Parts {
    async fn waiting_for_relay(&self) -> Option<u64> {
        let backlog = self.log.as_ref()?.backlog(relay::CONSUMER).await.ok()??;
        Some(backlog.waiting + backlog.in_flight)
    }
}

/// The problem that a probe found, if any.
async fn within<E: std::error::Error>(
    probe: impl Future<Output = Result<(), E>>,
) -> Option<String> {
    match tokio::time::timeout(PROBE_LIMIT, probe).await {
        Ok(Ok(())) => None,
        Ok(Err(error)) => Some(match error.source() {
            Some(source) => format!("{error}: {source}"),
            None => error.to_string(),
        }),
        Err(_) => Some("does not answer".to_owned()),
    }
}
