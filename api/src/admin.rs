//! Health, readiness, metrics and the contracts, on a listener of their own that platforms cannot
//! reach.

use std::{collections::BTreeMap, fmt, sync::Arc};

use async_trait::async_trait;
use axum::{
    Router,
    extract::State,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use prometheus_client::{encoding::text, registry::Registry};
use serde::{Serialize, Serializer};
use serde_json::json;

use crate::contracts;

/// `/healthz` says that the process lives, `/readyz` whether it should be sent calls, `/metrics`
/// the rest, in OpenMetrics text; `/schemas/` lists what others may rely on.
pub fn admin_router(registry: Arc<Registry>, readiness: Arc<dyn Readiness>) -> Router {
    Router::new()
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(readyz).with_state(readiness))
        .route("/metrics", get(metrics).with_state(registry))
        .merge(contracts::router())
        .fallback(what_there_is)
}

/// Says whether what this process depends on works.
#[async_trait]
pub trait Readiness: fmt::Debug + Send + Sync + 'static {
    /// Asked at every probe: answers from what is known, or within a short limit of its own.
    async fn check(&self) -> ReadinessReport;
}

/// What was found, by the name of what was looked at.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ReadinessReport {
    pub checks: BTreeMap<String, Check>,
}

impl ReadinessReport {
    /// As bad as the worst check.
    #[must_use]
    pub fn status(&self) -> Status {
        self.checks.values().map(Check::status).max().unwrap_or(Status::Ready)
    }
}

impl Serialize for ReadinessReport {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let checks: BTreeMap<_, _> =
            self.checks.iter().map(|(name, check)| (name, check.message())).collect();
        json!({ "status": self.status(), "checks": checks }).serialize(serializer)
    }
}

/// One thing looked at. Messages say what does not work, and hold no personal data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Check {
    Ok,
    /// Sign-ups are answered as before, and something behind them waits.
    Degraded(String),
    /// Sign-ups cannot be answered.
    Failed(String),
}

impl Check {
    fn status(&self) -> Status {
        match self {
            Self::Ok => Status::Ready,
            Self::Degraded(_) => Status::Degraded,
            Self::Failed(_) => Status::NotReady,
        }
    }

    fn message(&self) -> &str {
        match self {
            Self::Ok => "ok",
            Self::Degraded(message) | Self::Failed(message) => message,
        }
    }
}

/// From best to worst.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    Ready,
    /// Answering: a load balancer must keep sending calls, and somebody should have a look.
    Degraded,
    NotReady,
}

async fn readyz(State(readiness): State<Arc<dyn Readiness>>) -> Response {
    let report = readiness.check().await;
    let status = match report.status() {
        Status::Ready | Status::Degraded => StatusCode::OK,
        Status::NotReady => StatusCode::SERVICE_UNAVAILABLE,
    };
    (status, [(header::CACHE_CONTROL, "no-store")], axum::Json(report)).into_response()
}

async fn metrics(State(registry): State<Arc<Registry>>) -> Response {
    const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    let mut body = String::new();
    match text::encode(&mut body, &registry) {
        Ok(()) => ([(header::CONTENT_TYPE, OPEN_METRICS)], body).into_response(),
        Err(error) => {
            tracing::error!(%error, "could not write the metrics");
            StatusCode::INTERNAL_SERVER_ERROR.into_response()
        }
    }
}

async fn what_there_is() -> Response {
    let body = json!({
        "status": 404,
        "code": "not-found",
        "userMessage": "there are /healthz, /readyz, /metrics and /schemas/ here",
    });
    (StatusCode::NOT_FOUND, axum::Json(body)).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(checks: &[(&str, Check)]) -> ReadinessReport {
        let checks = checks.iter().map(|(name, it)| ((*name).to_owned(), it.clone())).collect();
        ReadinessReport { checks }
    }

    #[test]
    fn a_report_is_as_bad_as_its_worst_check() {
        let degraded = Check::Degraded("the stream is away".into());
        let failed = Check::Failed("the disk is full".into());
        assert_eq!(report(&[]).status(), Status::Ready);
        assert_eq!(report(&[("log", Check::Ok)]).status(), Status::Ready);
        assert_eq!(
            report(&[("log", Check::Ok), ("relay", degraded.clone())]).status(),
            Status::Degraded
        );
        assert_eq!(report(&[("log", failed), ("relay", degraded)]).status(), Status::NotReady);
    }

    #[test]
    fn a_report_in_json_names_each_check() {
        let report =
            report(&[("log", Check::Ok), ("relay", Check::Degraded("9 events wait".into()))]);
        let json = serde_json::to_value(report).unwrap();
        assert_eq!(
            json,
            json!({ "status": "degraded", "checks": { "log": "ok", "relay": "9 events wait" } })
        );
    }
}
