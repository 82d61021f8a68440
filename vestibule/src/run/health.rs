//! What `/readyz` says of the process itself, beside what it says of its parts.

use async_trait::async_trait;
use time::OffsetDateTime;
use tokio_util::sync::CancellationToken;
use vestibule_api::{Check, Readiness, ReadinessReport, Tls};

use super::reload::ReloadMetrics;
use crate::readiness::Parts;

/// Its parts, and what only the process knows.
#[derive(Debug)]
pub(super) struct Health {
    pub(super) parts: Parts,
    /// Cancelled once the process is about to end: load balancers are to turn to others.
    pub(super) leave: CancellationToken,
    pub(super) tls: Option<Tls>,
    pub(super) reload: Option<ReloadMetrics>,
}

#[async_trait]
impl Readiness for Health {
    async fn check(&self) -> ReadinessReport {
        let mut report = self.parts.check().await;
        let checks = &mut report.checks;
        if let Some(tls) = &self.tls {
            let check = match tls.valid_at(OffsetDateTime::now_utc()) {
                Ok(()) => Check::Ok,
                Err(error) => Check::Degraded(format!("platforms do not connect: {error}")),
            };
            checks.insert("certificate".to_owned(), check);
        }
        if let Some(reload) = &self.reload {
            let check = if reload.is_refused() {
                let said = "the changed configuration is refused, and a start with it would fail; \
                            `vestibule check` says why";
                Check::Degraded(said.to_owned())
            } else {
                Check::Ok
            };
            checks.insert("configuration".to_owned(), check);
        }
        if self.leave.is_cancelled() {
            let said = "draining: it stops, and answers for a moment still";
            checks.insert("process".to_owned(), Check::Failed(said.to_owned()));
        }
        report
    }
}

#[cfg(test)]
mod tests {
    use prometheus_client::registry::Registry;
    use vestibule_api::Status;

    use super::*;

    #[tokio::test]
    async fn a_process_that_leaves_wants_no_calls() {
        let leave = CancellationToken::new();
        let reload = ReloadMetrics::register(&mut Registry::default());
        let reload = Some(reload);
        let health = Health { parts: Parts::default(), leave: leave.clone(), tls: None, reload };
        assert_eq!(health.check().await.status(), Status::Ready);
        leave.cancel();
        let report = health.check().await;
        assert_eq!(report.status(), Status::NotReady);
        let json = serde_json::to_value(report).unwrap();
        assert!(json["checks"]["process"].as_str().unwrap().starts_with("draining"), "{json}");
    }
}
