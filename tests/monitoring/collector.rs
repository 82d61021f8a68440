//! A collector of traces: what a process sends by OTLP over HTTP, read with the protocol's own types.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

use axum::{Router, body::Bytes, extract::State, http::StatusCode, routing::post};
use data_encoding::HEXLOWER;
use opentelemetry_proto::tonic::{
    collector::trace::v1::ExportTraceServiceRequest,
    common::v1::{KeyValue, any_value::Value},
};
use prost::Message as _;
use vestibule_testkit::eventually;

use crate::support::LIMIT;

/// A span as a person would look at it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Span {
    pub(super) service: String,
    pub(super) name: String,
    pub(super) trace: String,
    pub(super) id: String,
    pub(super) parent: String,
    pub(super) attributes: BTreeMap<String, String>,
    /// The spans that it is linked to.
    pub(super) links: Vec<String>,
    pub(super) failed: bool,
}

#[derive(Clone, Default)]
struct Seen {
    spans: Arc<Mutex<Vec<Span>>>,
    bytes: Arc<Mutex<Vec<u8>>>,
}

pub(super) struct Collector {
    pub(super) url: String,
    seen: Seen,
    server: tokio::task::JoinHandle<()>,
}

impl Collector {
    pub(super) async fn start() -> anyhow::Result<Self> {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
        let url = format!("http://{}", listener.local_addr()?);
        let seen = Seen::default();
        let router = Router::new().route("/v1/traces", post(take)).with_state(seen.clone());
        let server = tokio::spawn(async move {
            axum::serve(listener, router).await.expect("a listener goes on listening");
        });
        Ok(Self { url, seen, server })
    }

    pub(super) fn spans(&self) -> Vec<Span> {
        self.seen.spans.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Waits until there are so many spans with such a name.
    pub(super) async fn named(&self, start: &str, count: usize) -> anyhow::Result<Vec<Span>> {
        let what = format!("the collector has {count} spans `{start}…`");
        eventually(LIMIT, &what, async || {
            let mut spans = self.spans();
            spans.retain(|it| it.name.starts_with(start));
            (spans.len() >= count).then_some(spans)
        })
        .await
    }

    /// Everything that came, as it came.
    pub(super) fn bytes(&self) -> Vec<u8> {
        self.seen.bytes.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for Collector {
    fn drop(&mut self) {
        self.server.abort();
    }
}

async fn take(State(seen): State<Seen>, body: Bytes) -> StatusCode {
    let Ok(request) = ExportTraceServiceRequest::decode(body.clone()) else {
        return StatusCode::BAD_REQUEST;
    };
    seen.bytes.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(&body);
    let mut spans = seen.spans.lock().unwrap_or_else(PoisonError::into_inner);
    for of_service in request.resource_spans {
        let attributes = of_service.resource.map(|it| it.attributes).unwrap_or_default();
        let service = texts(attributes).remove("service.name").unwrap_or_default();
        for span in of_service.scope_spans.into_iter().flat_map(|it| it.spans) {
            spans.push(Span {
                service: service.clone(),
                name: span.name,
                trace: HEXLOWER.encode(&span.trace_id),
                id: HEXLOWER.encode(&span.span_id),
                parent: HEXLOWER.encode(&span.parent_span_id),
                attributes: texts(span.attributes),
                links: span.links.iter().map(|it| HEXLOWER.encode(&it.span_id)).collect(),
                failed: span.status.is_some_and(|it| it.code == 2),
            });
        }
    }
    StatusCode::OK
}

fn texts(attributes: Vec<KeyValue>) -> BTreeMap<String, String> {
    let text = |it: KeyValue| match it.value?.value? {
        Value::StringValue(text) => Some((it.key, text)),
        _ => None,
    };
    attributes.into_iter().filter_map(text).collect()
}
