//! What a process tells of itself: log lines, metrics of the process, traces.
//!
//! Log lines go to standard error, one event each, in text or in flat JSON. Metrics of what the
//! parts do are theirs; here are those of the process. Traces are off unless the environment names
//! a collector. None of it holds personal data, and none of it can slow a sign-up.

mod logging;
mod process;
mod traces;

use prometheus_client::registry::Registry;

pub(crate) use self::logging::begin_logging;
use self::traces::Traces;

/// Of a process that runs until it is stopped; tools have only log lines.
#[derive(Debug)]
pub(crate) struct Telemetry(Option<Traces>);

impl Telemetry {
    /// Adds the process's metrics to the registry, and begins traces if there is a collector.
    pub(crate) fn begin(registry: &mut Registry) -> Self {
        process::register(registry);
        Self(Traces::begin(registry))
    }

    /// Sends the spans that still wait, as far as a short time allows.
    pub(crate) async fn end(&mut self) {
        if let Some(traces) = self.0.take() {
            traces.end().await;
        }
    }
}
