//! The worker runtime and the built-in workers: notify, database, permissions, approvals, accounts.
//!
//! A worker is a named consumer of the log with one effect. The runtime takes events from the
//! log and from what waits in the store, keeps the order of each person, retries, parks, leaves a
//! target alone that is down, and drains; a worker only says what its effect is, and whether a
//! failure may pass. How events travel is left to the log, and what is kept is left to the store.
//!
//! # A worker of your own
//!
//! Implement [`Worker`] and give it to a [`Subscriber`], which brings the stream, the store and the
//! runtime. What follows has a log and a store in a folder instead, and shows what becomes of an event
//! that fails twice:
//!
//! ```
//! use std::{sync::Arc, time::Duration};
//!
//! use vestibule_workers::{
//!     CancellationToken, Cause, HandleError, RetryPolicy, Task, Worker, WorkerMetrics,
//!     WorkerSettings, async_trait,
//!     events::{EventLog, LocalLog, LocalLogConfig, Retention},
//!     run, sample_event,
//!     store::{LetterFilter, Store, StoreOptions, StoreUrl},
//! };
//!
//! #[derive(Debug)]
//! struct Desk;
//!
//! #[async_trait]
//! impl Worker for Desk {
//!     fn name(&self) -> &str {
//!         "desk"
//!     }
//!
//!     async fn handle(&self, task: &Task) -> Result<(), HandleError> {
//!         match task.attempt {
//!             // It is tried again, after a pause.
//!             1 => Err(HandleError::retry(Cause::Unavailable, anyhow::anyhow!("the desk is closed"))),
//!             // It is parked at once: a dead letter, for somebody to look at.
//!             _ => Err(HandleError::park(Cause::Refused, anyhow::anyhow!("the desk says no"))),
//!         }
//!     }
//! }
//!
//! # #[tokio::main]
//! # async fn main() -> anyhow::Result<()> {
//! let folder = tempfile::tempdir()?;
//! let log = LocalLog::open(LocalLogConfig {
//!     path: folder.path().join("events.db"),
//!     duplicate_window: Duration::from_secs(600),
//!     refusal_window: Duration::from_secs(30),
//!     retention: Retention::For(Duration::MAX),
//! });
//! let log = Arc::new(log.await?);
//! let store = StoreUrl::Sqlite(folder.path().join("store.db"));
//! let store = Store::open(&store, StoreOptions::default()).await?;
//! store.migrate().await?;
//! let event = log.append(sample_event()).await?.stored.event;
//!
//! let retry = RetryPolicy { initial: Duration::from_millis(10), ..RetryPolicy::default() };
//! let settings = WorkerSettings { retry, ..WorkerSettings::default() };
//! let (metrics, stop) = (WorkerMetrics::default(), CancellationToken::new());
//! let worker = run(Arc::new(Desk), settings, log, store.clone(), metrics, stop.clone());
//! let worker = tokio::spawn(worker);
//!
//! let of_desk = LetterFilter { worker: Some("desk".to_owned()), ..LetterFilter::default() };
//! let letter = loop {
//!     if let Some(letter) = store.letters(&of_desk, None, 1).await?.pop() {
//!         break letter;
//!     }
//!     tokio::time::sleep(Duration::from_millis(10)).await;
//! };
//! assert_eq!(letter.event_id, Some(event.id));
//! assert_eq!((letter.cause_class.as_str(), letter.error.as_str()), ("refused", "the desk says no"));
//!
//! stop.cancel();
//! worker.await?
//! # }
//! ```

mod accounts;
mod approvals;
mod claims;
mod confirm;
mod database;
mod exchange;
mod exec;
mod filtered;
mod graph;
mod http;
mod inbox;
mod metrics;
mod notify;
mod permissions;
mod runtime;
mod setting;
mod statements;
mod subscriber;
#[cfg(test)]
mod testing;
mod tls;
mod token;
mod webhook;

pub use accounts::{Accounts, AccountsSettings};
pub use approvals::{Approvals, ApprovalsSettings};
pub use claims::sample as sample_event;
pub use confirm::{Confirm, ConfirmSchedule, ConfirmSettings};
pub use database::Database;
pub use exchange::Exchange;
pub use exec::{ExecMode, ExecSettings, ExecSubscriber};
pub use filtered::Filtered;
pub use graph::GraphSettings;
pub use inbox::Inbox;
pub use metrics::WorkerMetrics;
pub use notify::{
    ApnsSettings, ApprovalPages, ChannelKind, ChannelSettings, Complaint, FcmSettings,
    LocaleSettings, MailLogin, MailTls, Notify, NotifySettings, NtfyPriority, NtfySettings,
    Preview, PreviewText, Recipient, Urgency, WebPushSettings, WebhookFormat,
};
pub use permissions::{
    Actual, Comparison, Difference, GrantRule, PermissionTargets, Permissions, PermissionsSettings,
    RuleError, ScimSettings, SqlSettings, TargetError, TargetKind, TargetSettings, Unreadable,
};
pub use runtime::{
    BreakerPolicy, Cause, HandleError, NoRate, Rate, RetryPolicy, Task, Worker, WorkerSettings,
    consumer_spec, run,
};
pub use setting::SettingError;
pub use statements::{
    StatementSettings, Statements, StatementsSettings, TargetDatabase, TargetDatabaseError,
};
pub use subscriber::Subscriber;
pub use webhook::{WebhookAuth, WebhookMode, WebhookSettings, WebhookSubscriber};

/// What a worker of one's own needs beside this crate.
pub use async_trait::async_trait;
pub use tokio_util::sync::CancellationToken;
pub use {vestibule_events as events, vestibule_store as store};
