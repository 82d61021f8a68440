//! Health, readiness and metrics as a load balancer and a scraper see them.

use std::sync::Arc;

use async_trait::async_trait;
use axum::{
    Router,
    body::Body,
    http::{Request, StatusCode, header},
};
use http_body_util::BodyExt as _;
use prometheus_client::{metrics::counter::Counter, registry::Registry};
use tower::ServiceExt as _;
use vestibule_api::{Check, Readiness, ReadinessReport, admin_router};

#[derive(Debug)]
struct Fixed(Check);

#[async_trait]
impl Readiness for Fixed {
    async fn check(&self) -> ReadinessReport {
        ReadinessReport { checks: [("log".to_owned(), self.0.clone())].into() }
    }
}

pub(crate) fn admin(check: Check) -> Router {
    let mut registry = Registry::default();
    let counter = Counter::<u64>::default();
    counter.inc();
    registry.register("seen", "Seen", counter);
    admin_router(Arc::new(registry), Arc::new(Fixed(check)))
}

pub(crate) async fn get(
    router: Router,
    path: &str,
) -> anyhow::Result<(StatusCode, String, String)> {
    let reply = router.oneshot(Request::get(path).body(Body::empty())?).await?;
    let status = reply.status();
    let content_type = reply.headers()[header::CONTENT_TYPE].to_str()?.to_owned();
    let body = String::from_utf8(reply.into_body().collect().await?.to_bytes().to_vec())?;
    Ok((status, content_type, body))
}

#[tokio::test]
async fn readiness_tells_degraded_from_not_ready() -> anyhow::Result<()> {
    for (check, status, body) in [
        (Check::Ok, 200, r#"{"checks":{"log":"ok"},"status":"ready"}"#),
        (
            Check::Degraded("the stream is away".to_owned()),
            200,
            r#"{"checks":{"log":"the stream is away"},"status":"degraded"}"#,
        ),
        (
            Check::Failed("the disk is full".to_owned()),
            503,
            r#"{"checks":{"log":"the disk is full"},"status":"not_ready"}"#,
        ),
    ] {
        let reply = get(admin(check), "/readyz").await?;
        let (got, content_type, text) = reply;
        assert_eq!(got.as_u16(), status);
        assert_eq!(content_type, "application/json");
        let (text, body): (serde_json::Value, serde_json::Value) =
            (serde_json::from_str(&text)?, serde_json::from_str(body)?);
        assert_eq!(text, body);
    }
    Ok(())
}

#[tokio::test]
async fn a_process_that_is_not_ready_lives_all_the_same() -> anyhow::Result<()> {
    let failed = admin(Check::Failed("the disk is full".to_owned()));

    let (status, _, body) = get(failed, "/healthz").await?;

    assert_eq!((status, body.as_str()), (StatusCode::OK, "ok\n"));
    Ok(())
}

#[tokio::test]
async fn metrics_are_open_metrics() -> anyhow::Result<()> {
    let (status, content_type, body) = get(admin(Check::Ok), "/metrics").await?;

    assert_eq!(status, StatusCode::OK);
    assert_eq!(content_type, "application/openmetrics-text; version=1.0.0; charset=utf-8");
    assert!(body.contains("seen_total 1\n") && body.ends_with("# EOF\n"), "{body}");
    Ok(())
}

#[tokio::test]
async fn the_admin_listener_says_what_it_has() -> anyhow::Result<()> {
    let (status, _, body) = get(admin(Check::Ok), "/connectors/partners").await?;

    assert_eq!(status, StatusCode::NOT_FOUND);
    assert!(body.contains("/readyz"), "{body}");
    Ok(())
}
