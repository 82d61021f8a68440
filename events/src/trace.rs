//! Spans: what happened to one sign-up, from the call through the log into each worker.
//!
//! A trace crosses the log in the event's `traceparent`, so connector and workers need not know of
//! each other. Spans hold ids, pseudonyms and configured names, never what a person has said.
//! Without a tracer, which is the default, nothing here does more than find that out. Where spans
//! go is the process's business, see [`trace_with`].

use std::{
    fmt,
    future::{Future, poll_fn},
    pin::Pin,
    sync::OnceLock,
};

use opentelemetry::{
    Context, KeyValue,
    global::BoxedTracer,
    trace::{
        Link, SpanContext, SpanId, SpanKind, Status, TraceContextExt, TraceFlags, TraceId,
        TraceState, Tracer,
    },
};

use crate::SignUpEvent;

static TRACER: OnceLock<BoxedTracer> = OnceLock::new();

/// Makes spans from now on. For the start of a process: the first tracer stays.
pub fn trace_with(tracer: BoxedTracer) {
    // A second one could only be a second start in one process, which has its tracer.
    let _ = TRACER.set(tracer);
}

/// Something that takes time; it ends when this is dropped. Nothing while there is no tracer.
#[derive(Default)]
#[must_use = "a span ends when it is dropped"]
pub struct Span(Option<Context>);

impl Span {
    /// A call from outside, in the caller's trace if its `traceparent` names one.
    pub fn of_call(name: &'static str, traceparent: impl FnOnce() -> Option<String>) -> Self {
        let Some(tracer) = TRACER.get() else { return Self(None) };
        let parent = traceparent().and_then(|it| parse(&it));
        Self::start(tracer, name.into(), SpanKind::Server, &within(parent), None)
    }

    /// An attempt at an event.
    ///
    /// The first one soon after the event belongs to its trace. One that comes late is a trace of
    /// its own with a link to the event's: what collects traces has long closed that one.
    pub fn of_attempt(worker: &str, event: &SignUpEvent, late: bool) -> Self {
        let Some(tracer) = TRACER.get() else { return Self(None) };
        let of_event = event.traceparent.as_deref().and_then(parse);
        let (parent, link) = if late { (None, of_event) } else { (of_event, None) };
        if link.as_ref().is_some_and(|it| !it.is_sampled()) {
            return Self(None);
        }
        let name = format!("attempt {worker}");
        let span = Self::start(tracer, name.into(), SpanKind::Consumer, &within(parent), link);
        span.set("vestibule.worker", &worker);
        span.set("vestibule.event", &event.id);
        span.set("vestibule.person", &event.person);
        span.set("vestibule.kind", &event.kind);
        span
    }

    /// A part of what goes on here.
    pub fn part(name: &'static str) -> Self {
        let Some(tracer) = TRACER.get() else { return Self(None) };
        Self::start(tracer, name.into(), SpanKind::Internal, &Context::current(), None)
    }

    fn start(
        tracer: &BoxedTracer,
        name: std::borrow::Cow<'static, str>,
        kind: SpanKind,
        parent: &Context,
        link: Option<SpanContext>,
    ) -> Self {
        let mut builder = tracer.span_builder(name).with_kind(kind);
        if let Some(link) = link {
            builder = builder.with_links(vec![Link::with_context(link)]);
        }
        let span = tracer.build_with_context(builder, parent);
        Self(Some(parent.with_span(span)))
    }

    /// Does something within this span: parts of it and log lines find it.
    pub async fn within<F: Future>(&self, mut work: Pin<&mut F>) -> F::Output {
        poll_fn(|cx| {
            let _within = self.0.clone().map(Context::attach);
            work.as_mut().poll(cx)
        })
        .await
    }

    /// Notes something that is known now. Never what a person has said.
    pub fn set(&self, key: &'static str, value: &dyn fmt::Display) {
        if let Some(context) = &self.0 {
            set(context, key, value);
        }
    }

    /// Marks it as failed, with a fixed word for the cause.
    pub fn failed(&self, cause: &'static str) {
        if let Some(context) = &self.0 {
            context.span().set_status(Status::error(cause));
        }
    }
}

impl Drop for Span {
    fn drop(&mut self) {
        if let Some(context) = &self.0 {
            context.span().end();
        }
    }
}

impl fmt::Debug for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let trace = self.0.as_ref().map(|it| it.span().span_context().trace_id());
        f.debug_tuple("Span").field(&trace).finish()
    }
}

/// Notes something about the span that we are in.
pub fn note(key: &'static str, value: &dyn fmt::Display) {
    if TRACER.get().is_some() {
        set(&Context::current(), key, value);
    }
}

/// Where we are now, as an event carries it.
#[must_use]
pub fn current_traceparent() -> Option<String> {
    let current = current()?;
    let (trace, span) = (current.trace_id(), current.span_id());
    Some(format!("00-{trace}-{span}-{:02x}", current.trace_flags().to_u8() & 1))
}

/// The trace that we are in, for log lines.
#[must_use]
pub fn current_trace() -> Option<TraceId> {
    current().map(|it| it.trace_id())
}

fn current() -> Option<SpanContext> {
    TRACER.get()?;
    let current = Context::map_current(|it| it.span().span_context().clone());
    current.is_valid().then_some(current)
}

fn set(context: &Context, key: &'static str, value: &dyn fmt::Display) {
    let span = context.span();
    // A span that is not sampled keeps nothing, so nothing need be written.
    if span.is_recording() {
        span.set_attribute(KeyValue::new(key, value.to_string()));
    }
}

fn within(parent: Option<SpanContext>) -> Context {
    parent.map_or_else(Context::new, |it| Context::new().with_remote_span_context(it))
}

/// What an event carries was checked when it came in; whatever else is there is no trace.
fn parse(traceparent: &str) -> Option<SpanContext> {
    let mut parts = traceparent.split('-');
    let (_version, trace, span, flags) =
        (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
    let flags = u8::from_str_radix(flags, 16).ok()? & 1;
    let context = SpanContext::new(
        TraceId::from_hex(trace).ok()?,
        SpanId::from_hex(span).ok()?,
        TraceFlags::new(flags),
        true,
        TraceState::default(),
    );
    context.is_valid().then_some(context)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_traceparent_is_read_and_anything_else_is_no_trace() {
        let context = parse("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01").unwrap();
        assert_eq!(context.trace_id().to_string(), "4bf92f3577b34da6a3ce929d0e0e4736");
        assert_eq!(context.span_id().to_string(), "00f067aa0ba902b7");
        assert!(context.is_sampled() && context.is_remote());
        for nothing in [
            "",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7",
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
            "00-somebody-00f067aa0ba902b7-01",
        ] {
            assert_eq!(parse(nothing), None, "{nothing}");
        }
    }

    /// The other tests of this crate run without a tracer, and so does this one.
    #[tokio::test]
    async fn without_a_tracer_there_is_nothing() {
        let span = Span::of_call("call", || panic!("nobody asks for the caller's trace"));
        let inside = span.within(std::pin::pin!(async { current_traceparent() })).await;
        assert_eq!((inside, current_trace()), (None, None));
    }
}
