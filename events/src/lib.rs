//! The sign-up event and the log that carries it; the only crate that speaks NATS.
//!
//! A connector appends a [`SignUpEvent`] and gets an answer once it is durable. A worker opens a
//! [`Consumer`] and is given each event at least once. Subjects, acknowledgements, redelivery and
//! the suppression of repeated calls are settled here; what an event means, and whether handling
//! it twice does harm, is not.
//!
//! The language of rules is here as well ([`expression`]): connectors and workers both ask about
//! sign-ups, and mean the same.

mod approval;
mod confirmation;
mod decision;
mod event;
pub mod expression;
mod fingerprint;
mod jetstream;
mod local;
mod locale;
mod log;
pub mod relay;
mod signup;
pub mod trace;

pub use approval::{Approval, ApprovalLinks, LinkError, UnknownVerdict, Verdict};
pub use confirmation::{Confirmation, ConfirmationSource, UnknownSource};
pub use decision::{Decision, Effect, LookupReason, Mode, Outcome, Reason};
pub use event::{Kind, SignUpEvent, event_schema};
pub use fingerprint::{Fingerprint, Person, PseudonymKey};
pub use jetstream::{
    ConsumerFacts, Difference, Inspector, JetStream, JetStreamConfig, Misfit, NatsCredentials,
    Provisioned, Provisioning, Role, ServerFacts, StreamFacts,
};
pub use local::{LocalLog, LocalLogConfig, LogContents, LogCopy, Retention};
pub use locale::{for_languages, normal_language};
pub use log::{
    Acknowledge, AppendError, Appended, Backlog, Consumer, ConsumerSpec, Delivery, EventLog,
    Filter, LogError, Replay, Start, Stored, Undecodable, WrittenEvent,
};
pub use signup::{Claims, ConnectorName, Email, Identity, InvalidName, Protocol, SignUp, Step};
