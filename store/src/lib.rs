//! Everything that is SQL to the business data: people, sign-ups, requests for approval, grants,
//! notifications, attempts, retries and dead letters, in SQLite (embedded) or PostgreSQL (scaled
//! out).
//!
//! An effect and the note that a worker has dealt with an event (its inbox row) are written in one
//! transaction, so an event that is delivered again changes nothing; and a late older event never
//! overwrites what a newer one wrote. Whether to try again is left to the caller, who learns from
//! [`StoreError`] whether it can help.

mod accounts;
mod approvals;
mod attempts;
mod confirmations;
mod dead_letters;
mod devices;
mod effects;
mod error;
mod file;
mod grant_targets;
mod grants;
mod inbox;
mod migrations;
mod notifications;
mod outbox;
mod pausing;
mod people;
mod recipients;
mod removal;
mod retries;
mod session;
mod sqlite;
mod store;
mod text;
mod transaction;

pub use accounts::{Account, AccountOrigin, MadeAccount};
pub use approvals::{
    ApprovalFilter, ApprovalRequest, ApprovalState, Decided, Opened, RequestState, UnknownState,
};
pub use attempts::{FailedAttempt, Failures};
pub use confirmations::{Claimed, ConfirmationRecord, ConfirmationState, Sighted, Unconfirmed};
pub use dead_letters::{
    Letter, LetterChange, LetterFilter, LetterGroup, LetterState, LetterWhole, Redriven,
    UnknownLetterState,
};
pub use devices::{Device, DeviceAddress, DeviceKind, DeviceRecord, UnknownDeviceKind};
pub use effects::Effects;
pub use error::{Cause, StoreError, sqlite_in_words};
pub use grant_targets::{GrantTarget, GrantTargetFilter, Seen, Wanted};
pub use grants::{Grant, GrantFilter, NewGrant, Revocation};
pub use inbox::Done;
pub use migrations::Migration;
pub use notifications::Begun;
pub use outbox::Unpublished;
pub use pausing::PausedWorker;
pub use people::PersonRecord;
pub use recipients::RoleHolder;
pub use removal::Memory;
pub use retries::{AfterFailure, Failed, FailedEvent, Retry, SetAside, Standing};
pub use session::Dialect as StoreConnection;
pub use store::{Store, StoreOptions, StoreUrl};
pub use transaction::Transaction;
