//! Log lines on standard error; standard output belongs to results.

use std::{fmt, io};

use serde_json::{Map, Value};
use tracing::{Event, Subscriber};
use tracing_subscriber::{
    EnvFilter,
    fmt::{
        FmtContext, FormatEvent, FormatFields, FormattedFields,
        format::{Format, Json, JsonFields, Writer},
    },
    registry::LookupSpan,
};
use vestibule_events::trace::current_trace;

use crate::cli::{Common, LogFormat};

pub(crate) fn begin_logging(common: &Common) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(&common.log)
        .map_err(|error| anyhow::anyhow!("--log does not say which lines: {error}"))?;
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr);
    match common.log_format {
        LogFormat::Text => {
            builder.with_ansi(io::IsTerminal::is_terminal(&io::stderr())).init();
        }
        LogFormat::Json => {
            builder.fmt_fields(JsonFields::new()).event_format(flat_json()).init();
        }
    }
    Ok(())
}

/// One object a line without objects in it, so that every field has one name for ever.
fn flat_json() -> Flat {
    let format = Format::default().json().flatten_event(true);
    Flat(format.with_current_span(false).with_span_list(false))
}

/// Adds what a line is about where only its surroundings know: the fields of the spans that it lies
/// in, and the trace.
struct Flat(Format<Json>);

impl<S, N> FormatEvent<S, N> for Flat
where
    S: Subscriber + for<'lookup> LookupSpan<'lookup>,
    N: for<'writer> FormatFields<'writer> + 'static,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let mut around = Map::new();
        if let Some(trace) = current_trace() {
            around.insert("trace_id".to_owned(), trace.to_string().into());
        }
        for span in context.event_scope().into_iter().flatten() {
            if let Some(fields) = span.extensions().get::<FormattedFields<N>>()
                && let Ok(Value::Object(fields)) = serde_json::from_str(&fields.fields)
            {
                merge(&mut around, fields);
            }
        }
        if around.is_empty() {
            return self.0.format_event(context, writer, event);
        }
        let mut line = String::new();
        self.0.format_event(context, Writer::new(&mut line), event)?;
        let Ok(Value::Object(mut fields)) = serde_json::from_str(&line) else {
            return writer.write_str(&line);
        };
        merge(&mut fields, around);
        writeln!(writer, "{}", Value::Object(fields))
    }
}

/// What is nearer to the line has the word.
fn merge(fields: &mut Map<String, Value>, further: Map<String, Value>) {
    for (name, value) in further {
        fields.entry(name).or_insert(value);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex, PoisonError};

    use serde_json::json;
    use tracing::{info, info_span};

    use super::*;

    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap_or_else(PoisonError::into_inner).write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_line_in_json_is_flat_and_says_what_its_surroundings_know() {
        let lines = Lines::default();
        let writer = lines.clone();
        let subscriber = tracing_subscriber::fmt()
            .with_writer(move || writer.clone())
            .fmt_fields(JsonFields::new())
            .event_format(flat_json())
            .finish();

        tracing::subscriber::with_default(subscriber, || {
            info!(worker = "notify", attempts = 2, "alone");
            let _attempt = info_span!("attempt", worker = "database", event = %7).entered();
            info!(worker = "notify", "within");
        });

        let text = String::from_utf8(lines.0.lock().unwrap().clone()).unwrap();
        let mut found = text.lines().map(|line| {
            let mut line: Value = serde_json::from_str(line).unwrap();
            let fields = line.as_object_mut().unwrap();
            assert!(fields.remove("timestamp").is_some_and(|it| it.is_string()));
            line
        });
        let target = "vestibule::telemetry::logging::tests";
        assert_eq!(
            found.next().unwrap(),
            json!({ "level": "INFO", "target": target, "worker": "notify", "attempts": 2,
                    "message": "alone" })
        );
        assert_eq!(
            found.next().unwrap(),
            json!({ "level": "INFO", "target": target, "worker": "notify", "event": "7",
                    "message": "within" })
        );
        assert_eq!(found.next(), None);
    }
}
