//! What a connector is, as the configuration says it: values only, checked before they come here.

use std::{fmt, sync::Arc, time::Duration};

use async_trait::async_trait;
use vestibule_events::{ConnectorName, Protocol};

use crate::{Credential, Decider, contract::Dialect};

/// One endpoint that a platform calls.
#[derive(Debug)]
pub struct ConnectorSettings {
    pub name: ConnectorName,
    pub protocol: Protocol,
    /// All of them are valid, so that one can be changed without an interruption. With none,
    /// every call is turned away.
    pub credentials: Vec<Credential>,
    pub decider: Decider,
    /// `custom-extension`: the tenants and the extensions that may call; empty lets all in.
    pub tenants: Vec<String>,
    pub extensions: Vec<String>,
    /// Within so much time of its arrival every call has its answer.
    pub deadline: Duration,
    /// A longer body is refused.
    pub body_bytes_max: usize,
    pub on_storage_failure: OnStorageFailure,
    /// The `version` that every answer carries; platforms treat it as free text.
    pub version: String,
    pub answer_after: AnswerAfter,
    pub contract: ContractSettings,
}

impl ConnectorSettings {
    pub const DEADLINE: Duration = Duration::from_millis(800);
    pub const BODY_BYTES_MAX: usize = 64 * 1024;
    pub const VERSION: &'static str = "1.0.0";

    /// The defaults, with no credentials and no rules.
    #[must_use]
    pub fn new(name: ConnectorName) -> Self {
        Self {
            name,
            protocol: Protocol::ApiConnector,
            credentials: Vec::new(),
            decider: Decider::default(),
            tenants: Vec::new(),
            extensions: Vec::new(),
            deadline: Self::DEADLINE,
            body_bytes_max: Self::BODY_BYTES_MAX,
            on_storage_failure: OnStorageFailure::default(),
            version: Self::VERSION.to_owned(),
            answer_after: AnswerAfter::default(),
            contract: ContractSettings::default(),
        }
    }

    /// How this connector speaks.
    #[must_use]
    pub fn dialect(&self) -> Dialect<'_> {
        Dialect { protocol: self.protocol, version: &self.version, settings: &self.contract }
    }
}

/// What can be said in more than one way, or is not the same everywhere. Each part concerns the
/// protocol it names and no other.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ContractSettings {
    /// `custom-policy`: the HTTP status of a refusal.
    pub error_status: ErrorStatus,
    /// `custom-policy`: the claims that a policy with `SendClaimsIn` `Header` sends, as rules are
    /// to call them; the case does not matter in headers. No other header is read.
    pub claim_headers: Vec<String>,
    /// `custom-extension`: the title of a block page; without one the platform's own.
    pub block_title: Option<String>,
}

/// The HTTP status of a refusal in a custom policy. The body says 409 either way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ErrorStatus {
    /// 409, which every version of the platform understands.
    #[default]
    Conflict,
    /// 400, for a gateway between that makes something else of a 409.
    BadRequest,
}

/// What a person is told whose event could not be stored in time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OnStorageFailure {
    /// A block page with this message, which should ask to try again.
    Refuse { message: String },
    /// The decision stands and is answered without an event. Rules still hold: whoever they turn
    /// away stays turned away.
    LetThrough,
}

impl Default for OnStorageFailure {
    fn default() -> Self {
        Self::Refuse {
            message: "We cannot take your sign-up at the moment. Please try again in a few \
                      minutes."
                .to_owned(),
        }
    }
}

/// What an answer waits for.
#[derive(Clone, Default)]
pub enum AnswerAfter {
    /// The local log is synced to disk.
    #[default]
    Disk,
    /// The stream has acknowledged the event as well: for hosts without a durable disk.
    Stream(Arc<dyn Durable>),
}

impl fmt::Debug for AnswerAfter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Disk => "Disk",
            Self::Stream(_) => "Stream",
        })
    }
}

/// Knows how far the stream has acknowledged the local log.
#[async_trait]
pub trait Durable: Send + Sync + 'static {
    /// Returns once the stream holds the event with this sequence of the local log.
    ///
    /// Waits for as long as it takes; the caller has a deadline and drops the future.
    async fn durable(&self, sequence: u64);
}
