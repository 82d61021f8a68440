//! The worker runtime and the built-in workers: notify, database, permissions, approvals, accounts.
//!
//! A worker is a named consumer of the log with one effect. The runtime takes events from the
//! log and from what waits in the store, keeps the order of each person, retries, parks, leaves a
//! target alone that is down, and drains; a worker only says what its effect is, and whether a
//! failure may pass. How events travel is left to the log, and what is kept is left to the store.

mod accounts;
mod approvals;
mod claims;
mod database;
mod exchange;
mod exec;
mod graph;
mod http;
mod inbox;
mod metrics;
mod notify;
mod permissions;
mod runtime;
mod setting;
mod statements;
#[cfg(test)]
mod testing;
mod tls;
mod token;
mod webhook;

pub use accounts::{Accounts, AccountsSettings};
pub use approvals::{Approvals, ApprovalsSettings};
pub use database::Database;
pub use exchange::Exchange;
pub use exec::{ExecMode, ExecSettings, ExecSubscriber};
pub use graph::GraphSettings;
pub use inbox::Inbox;
pub use metrics::WorkerMetrics;
pub use notify::{
    ApnsSettings, ApprovalPages, ChannelKind, ChannelSettings, Complaint, FcmSettings,
    LocaleSettings, MailLogin, MailTls, Notify, NotifySettings, NtfyPriority, NtfySettings, Preview,
    PreviewText, Recipient, Urgency, WebPushSettings, WebhookFormat,
};
pub use permissions::{GrantRule, Permissions, PermissionsSettings, RuleError};
pub use runtime::{
    BreakerPolicy, Cause, HandleError, NoRate, Rate, RetryPolicy, Task, Worker, WorkerSettings,
    consumer_spec, run,
};
pub use setting::SettingError;
pub use statements::{
    StatementSettings, Statements, StatementsSettings, TargetDatabase, TargetDatabaseError,
};
pub use webhook::{WebhookAuth, WebhookMode, WebhookSettings};
