//! A subscriber that is a command: it is given each event, and says what became of it.
//!
//! Promises: every attempt ends, by the command's word or by its time; what the command starts does
//! not outlive it, nor us; its output is bounded, and neither kept nor logged, as it may quote the
//! event. Of our environment it gets [`ExecSettings::INHERITED`] and nothing else.
//!
//! What a command does is outside our store, so it may happen again: where we die, or are cut off,
//! between its success and our note of it. It is told the event's id, the same each time. That it is
//! not run again otherwise is the part of [`Inbox`](crate::Inbox).

mod answer;
mod once;
mod process;
mod service;
mod settings;
#[cfg(test)]
mod tests;

use std::{fmt, sync::Arc};

use async_trait::async_trait;
use vestibule_events::SignUpEvent;

use self::service::Service;
pub use self::settings::{ExecMode, ExecSettings};
use crate::{Exchange, HandleError, SettingError, Task, Worker};

/// A worker that hands its events to a command.
///
/// Started for each event ([`ExecMode::PerEvent`]), the command reads the event, a CloudEvent in
/// JSON, from its standard input, and its exit code says what became of it: 0 is done; 65, 66, 67,
/// 68 and 76 of `sysexits.h` park the event; any other code, a signal, or taking too long means that
/// it is tried again.
///
/// Long-running ([`ExecMode::LongRunning`]), it reads an event a line and writes an answer a line, in
/// any order: `{"id": "…", "ok": true}`, `{"id": "…", "retry": "why", "after": "30s"}` or
/// `{"id": "…", "park": "why"}`. The reason is kept and shown, so it must hold no personal data.
pub struct ExecSubscriber {
    settings: Arc<ExecSettings>,
    /// In long-running mode.
    service: Option<Service>,
}

impl ExecSubscriber {
    /// Checks the settings, with all complaints at once. Nothing is started yet.
    ///
    /// # Errors
    ///
    /// What [`ExecSettings::check`] complains about.
    pub fn new(settings: ExecSettings) -> Result<Self, Vec<SettingError>> {
        settings.check()?;
        let settings = Arc::new(settings);
        let service = match settings.mode {
            ExecMode::PerEvent => None,
            ExecMode::LongRunning => Some(Service::new(Arc::clone(&settings), false)),
        };
        Ok(Self { settings, service })
    }

    /// One attempt with everything that passes, for whoever sets the command up. A long-running
    /// command is started for it, and stopped.
    pub async fn exchange(&self, event: &SignUpEvent) -> Exchange {
        let mut sent = vec![format!("{:?}", self.settings.command)];
        sent.extend(String::from_utf8_lossy(&event_line(event)).lines().map(str::to_owned));
        let (received, outcome) = match self.settings.mode {
            ExecMode::PerEvent => match once::run(&self.settings, event, 1).await {
                Ok(ran) => (ran.lines(), ran.outcome()),
                Err(error) => (vec![], Err(error)),
            },
            ExecMode::LongRunning => {
                let service = Service::new(Arc::clone(&self.settings), true);
                let outcome = service.ask(event).await;
                service.close().await;
                (service.shown_lines().await, outcome)
            }
        };
        Exchange { sent, received, outcome }
    }
}

/// An event as commands read it: on one line.
fn event_line(event: &SignUpEvent) -> Vec<u8> {
    let mut line = serde_json::to_vec(event).expect("an event serialises");
    line.push(b'\n');
    line
}

/// Leaves the arguments out: somebody may have put a secret there.
impl fmt::Debug for ExecSubscriber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ExecSubscriber({}, {:?})", self.settings.name, self.settings.mode)
    }
}

#[async_trait]
impl Worker for ExecSubscriber {
    fn name(&self) -> &str {
        &self.settings.name
    }

    async fn handle(&self, task: &Task) -> Result<(), HandleError> {
        match &self.service {
            None => once::run(&self.settings, &task.event, task.attempt).await?.outcome(),
            Some(service) => service.ask(&task.event).await,
        }
    }

    async fn close(&self) {
        if let Some(service) = &self.service {
            service.close().await;
        }
    }
}
