//! Spans to a collector, by OTLP over HTTP, as the standard variables `OTEL_…` say.
//!
//! Spans wait in a queue with a bound and are sent by a thread of their own. What a collector that
//! is away costs are the spans, which are counted.

use std::{
    env, fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use anyhow::Context as _;
use opentelemetry::{Context, KeyValue, global::BoxedTracer, trace::TracerProvider};
use opentelemetry_otlp::{
    OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_EXPORTER_OTLP_PROTOCOL, OTEL_EXPORTER_OTLP_TRACES_ENDPOINT,
    OTEL_EXPORTER_OTLP_TRACES_PROTOCOL,
};
use opentelemetry_sdk::{
    Resource,
    error::{OTelSdkError, OTelSdkResult},
    trace::{
        BatchConfigBuilder, BatchSpanProcessor, SdkTracerProvider, Span, SpanData, SpanExporter,
        SpanProcessor,
    },
};
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family},
    registry::Registry,
};
use tokio::{runtime::Handle, task::spawn_blocking};
use tracing::{info, warn};

/// At some 500 bytes each: a few megabytes while a collector is away.
const QUEUE: usize = 4096;

/// How long a stop waits for the collector to take the last spans.
const LAST_SPANS: Duration = Duration::from_secs(2);

/// The spans of this process, and where they go.
#[derive(Debug)]
pub(super) struct Traces {
    provider: SdkTracerProvider,
}

impl Traces {
    /// Begins traces if the environment names a collector. Whatever is wrong with it is said once:
    /// no sign-up may fail because it is not traced.
    pub(super) fn begin(registry: &mut Registry) -> Option<Self> {
        match wanted(&|name| env::var(name).ok().filter(|it| !it.is_empty())) {
            Ok(false) => None,
            Ok(true) => match Self::to_collector(registry) {
                Ok(traces) => {
                    info!("traces go to the collector that the environment names");
                    Some(traces)
                }
                Err(error) => {
                    warn!(error = format!("{error:#}"), "there are no traces");
                    None
                }
            },
            Err(error) => {
                warn!(error, "there are no traces");
                None
            }
        }
    }

    fn to_collector(registry: &mut Registry) -> anyhow::Result<Self> {
        let exporter = opentelemetry_otlp::SpanExporter::builder()
            .with_http()
            .build()
            .context("could not set up the sending of traces; see the variables OTEL_…")?;
        let counts = Counts::register(registry);
        let waiting = Arc::new(AtomicUsize::new(0));
        let exporter = Sender {
            exporter: Arc::new(exporter),
            runtime: Handle::current(),
            waiting: Arc::clone(&waiting),
            counts: counts.clone(),
            failing: AtomicBool::new(false),
        };
        let batches = BatchConfigBuilder::default().with_max_queue_size(QUEUE).build();
        let queue = BatchSpanProcessor::builder(exporter).with_batch_config(batches).build();
        let provider = SdkTracerProvider::builder()
            .with_span_processor(Queue { queue, waiting, counts })
            .with_resource(resource())
            .build();
        vestibule_events::trace::trace_with(BoxedTracer::new(Box::new(
            provider.tracer("vestibule"),
        )));
        Ok(Self { provider })
    }

    pub(super) async fn end(self) {
        // It waits for its thread, which in turn waits for this runtime.
        let ended = spawn_blocking(move || self.provider.shutdown_with_timeout(LAST_SPANS)).await;
        if !matches!(ended, Ok(Ok(()))) {
            warn!("stopped before the collector had all traces");
        }
    }
}

/// Whether traces are asked for, or why they cannot be had.
fn wanted(variable: &dyn Fn(&str) -> Option<String>) -> Result<bool, String> {
    let is = |name, value: &str| variable(name).is_some_and(|it| it.eq_ignore_ascii_case(value));
    let endpoint = variable(OTEL_EXPORTER_OTLP_TRACES_ENDPOINT)
        .or_else(|| variable(OTEL_EXPORTER_OTLP_ENDPOINT));
    if endpoint.is_none() || is("OTEL_SDK_DISABLED", "true") || is("OTEL_TRACES_EXPORTER", "none") {
        return Ok(false);
    }
    let protocol = variable(OTEL_EXPORTER_OTLP_TRACES_PROTOCOL)
        .or_else(|| variable(OTEL_EXPORTER_OTLP_PROTOCOL));
    match protocol.as_deref() {
        None | Some("http/protobuf") => Ok(true),
        Some(other) => Err(format!(
            "OTEL_EXPORTER_OTLP_PROTOCOL asks for `{other}`; traces are sent by `http/protobuf`, \
             to port 4318 of most collectors"
        )),
    }
}

/// Who sends: `OTEL_SERVICE_NAME` and `OTEL_RESOURCE_ATTRIBUTES`, and `vestibule` where they do not
/// name a service.
fn resource() -> Resource {
    let version = KeyValue::new("service.version", env!("CARGO_PKG_VERSION"));
    let resource = Resource::builder().with_attribute(version);
    let named = env::var("OTEL_SERVICE_NAME").is_ok_and(|it| !it.is_empty())
        || env::var("OTEL_RESOURCE_ATTRIBUTES").is_ok_and(|it| it.contains("service.name="));
    if named { resource.build() } else { resource.with_service_name("vestibule").build() }
}

#[derive(Clone, Debug)]
struct Counts {
    sent: Counter,
    failed: Counter,
    dropped: Counter,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Labels {
    result: &'static str,
}

impl Counts {
    fn register(registry: &mut Registry) -> Self {
        let spans = Family::<Labels, Counter>::default();
        registry.register(
            "vestibule_trace_spans",
            "Spans by what became of them: sent, failed (the collector did not take them) or \
             dropped (too many waited)",
            spans.clone(),
        );
        let of = |result| spans.get_or_create_owned(&Labels { result });
        Self { sent: of("sent"), failed: of("failed"), dropped: of("dropped") }
    }
}

/// Lets no more spans wait than the queue behind it takes, and counts those that it turns away.
#[derive(Debug)]
struct Queue {
    queue: BatchSpanProcessor,
    waiting: Arc<AtomicUsize>,
    counts: Counts,
}

impl SpanProcessor for Queue {
    fn on_start(&self, span: &mut Span, context: &Context) {
        self.queue.on_start(span, context);
    }

    fn on_end(&self, span: SpanData) {
        if self.waiting.fetch_add(1, Ordering::Relaxed) < QUEUE {
            self.queue.on_end(span);
        } else {
            self.waiting.fetch_sub(1, Ordering::Relaxed);
            self.counts.dropped.inc();
        }
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.queue.force_flush()
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.queue.shutdown_with_timeout(timeout)
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.queue.set_resource(resource);
    }
}

/// Sends on our runtime: the queue's thread has none, and the client needs one.
struct Sender {
    exporter: Arc<opentelemetry_otlp::SpanExporter>,
    runtime: Handle,
    waiting: Arc<AtomicUsize>,
    counts: Counts,
    failing: AtomicBool,
}

impl SpanExporter for Sender {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let spans = batch.len();
        self.waiting.fetch_sub(spans, Ordering::Relaxed);
        let exporter = Arc::clone(&self.exporter);
        let sending = self.runtime.spawn(async move { exporter.export(batch).await });
        let sent = sending.await.unwrap_or_else(|error| {
            Err(OTelSdkError::InternalFailure(format!("the sending ended: {error}")))
        });
        match &sent {
            Ok(()) => {
                self.counts.sent.inc_by(spans as u64);
                if self.failing.swap(false, Ordering::Relaxed) {
                    info!("the collector takes traces again");
                }
            }
            Err(error) => {
                self.counts.failed.inc_by(spans as u64);
                if !self.failing.swap(true, Ordering::Relaxed) {
                    warn!(
                        %error,
                        "the collector does not take traces; they are dropped, and from now on \
                         only counted"
                    );
                }
            }
        }
        sent
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.exporter.shutdown_with_timeout(timeout)
    }

    fn set_resource(&mut self, resource: &Resource) {
        // Set at the start, while nobody sends.
        if let Some(exporter) = Arc::get_mut(&mut self.exporter) {
            exporter.set_resource(resource);
        }
    }
}

impl fmt::Debug for Sender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The exporter holds the headers that the environment names, which may be secrets.
        f.debug_struct("Sender").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(variables: &[(&str, &str)]) -> Result<bool, String> {
        wanted(&|name| {
            let found = variables.iter().find(|(it, _)| *it == name);
            found.map(|(_, value)| (*value).to_owned())
        })
    }

    #[test]
    fn traces_are_off_unless_a_collector_is_named() {
        let collector = (OTEL_EXPORTER_OTLP_ENDPOINT, "http://127.0.0.1:4318");
        assert_eq!(asked(&[]), Ok(false));
        assert_eq!(asked(&[collector]), Ok(true));
        assert_eq!(asked(&[(OTEL_EXPORTER_OTLP_TRACES_ENDPOINT, "http://it/v1/traces")]), Ok(true));
        assert_eq!(asked(&[collector, ("OTEL_SDK_DISABLED", "TRUE")]), Ok(false));
        assert_eq!(asked(&[collector, ("OTEL_TRACES_EXPORTER", "none")]), Ok(false));
        assert_eq!(asked(&[collector, ("OTEL_TRACES_EXPORTER", "otlp")]), Ok(true));
        assert_eq!(asked(&[collector, (OTEL_EXPORTER_OTLP_PROTOCOL, "http/protobuf")]), Ok(true));
        let error = asked(&[collector, (OTEL_EXPORTER_OTLP_PROTOCOL, "grpc")]).unwrap_err();
        assert!(error.contains("http/protobuf"), "{error}");
    }
}
