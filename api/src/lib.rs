//! The connector endpoint: what a platform calls during a sign-up.
//!
//! A call is authenticated, read, decided and stored in the log, and only then answered, all of it
//! within the connector's deadline. What the wire looks like is `contract`'s, who may call is
//! `auth`'s, what is decided is `decide`'s; `server` is the way through them. Where the event goes
//! afterwards is the log's business: nothing here waits for a worker, a broker or a database.

mod admin;
mod auth;
mod contract;
mod decide;
mod metrics;
mod serve;
mod server;
mod settings;
mod trace;

pub use admin::{Check, Readiness, ReadinessReport, Status, admin_router};
pub use auth::BasicCredential;
pub use contract::{
    Action, Answer, AttributeKind, BodyKind, Call, Dialect, ExtensionAction, ExtensionAnswer,
    PolicyError, Problem, Received, Reply, Shape, Unsaid, Written,
};
pub use decide::{Expression, OnError, RuleError, RuleOutcome, RuleSettings, Rules, decide};
pub use serve::{ServerLimits, serve};
pub use server::{Api, DuplicateConnector, router};
pub use settings::{
    AnswerAfter, ConnectorSettings, ContractSettings, Durable, ErrorStatus, OnStorageFailure,
};
