//! The connector endpoint: what a platform calls during a sign-up.
//!
//! A call is authenticated, read, decided and stored in the log, and only then answered, all of it
//! within the connector's deadline. What the wire looks like is `contract`'s, who may call is
//! `auth`'s, what is decided is `decide`'s; `server` is the way through them. Where the event goes
//! afterwards is the log's business: nothing here waits for a worker, a broker or a database.

mod admin;
mod approvals;
mod auth;
mod contract;
mod contracts;
mod decide;
mod devices;
mod metrics;
mod outbox;
mod serve;
mod server;
mod settings;
mod sightings;
mod trace;

pub use admin::{Check, Readiness, ReadinessReport, Status, admin_router};
pub use approvals::{ApprovalDesk, DeskError, approvals_router, expire_requests};
pub use auth::{
    BearerSettings, BearerSettingsError, BearerVerifier, CertificateEncoding, CertificateSettings,
    CertificateSettingsError, CertificateSource, Credential, CredentialKind, DistinguishedName,
    FetchError, ForwardedCertificate, NameError, NamePair, Network, NetworkError, Thumbprint,
    ThumbprintError,
};
/// Names of headers stand in settings.
pub use axum::http::HeaderName;
pub use contract::{
    Action, Answer, AttributeKind, BodyKind, Call, Dialect, ExtensionAction, ExtensionAnswer,
    PolicyError, Problem, Received, Reply, Shape, Unsaid, Written,
};
pub use decide::lists::{
    EntryFault, FileStamp, List, ListError, ListFault, ListSettings, ListSource, Place,
};
pub use decide::lookups::{
    AnswerFrom, BreakerSettings, CacheSettings, DatabaseUrl, DatabaseUrlError, Fetched, HttpMethod,
    HttpSettings, ListMetrics, Lookup, LookupError, LookupFailure, LookupMetrics, LookupSettings,
    LookupSource, SettingFault, SqlFault,
};
pub use decide::{
    ApprovalSettings, Approvals, Decider, DescribedRule, Expression, LookupWithArguments,
    MessageError, MessageGap, Messages, OnError, Question, ReferenceData, RuleError, RuleOutcome,
    RuleSettings, Rules, StandIn, Standing, TRY_AGAIN, Text, Unreachable,
};
pub use devices::{DeviceDesk, devices_router};
pub use outbox::publish_outbox;
pub use serve::{Connection, ServerLimits, Stop, Tls, TlsError, TlsSettings, serve, serve_tls};
pub use server::{Api, DuplicateConnector, router};
pub use settings::{
    AnswerAfter, ConnectorSettings, ContractSettings, Durable, ErrorStatus, OnStorageFailure,
};
pub use sightings::{Sightings, SightingsWriter};
