//! The wire dialects: a call is read, an answer is written; no I/O.
//!
//! Everything that only one dialect knows stays in its module: names of members, legal answers,
//! status codes. What comes out of a call is a [`SignUp`], whatever the dialect, and what goes into
//! an answer is an [`Outcome`]; nothing in here panics or refuses because of what a claim holds.
//! What a dialect has no words for is left out of the answer and reported as [`Unsaid`].

mod api_connector;
mod claims;
mod custom_extension;
mod custom_policy;
mod problem;
mod values;

use std::fmt;

use axum::http::{HeaderMap, Method, StatusCode, header};
use serde::Serialize;
use uuid::Uuid;
use vestibule_events::{ConnectorName, Outcome, Protocol, SignUp, Step};

pub use api_connector::{Action, Answer};
pub use custom_extension::{ExtensionAction, ExtensionAnswer};
pub use custom_policy::PolicyError;
pub use problem::Problem;
pub use values::AttributeKind;

use crate::ContractSettings;

/// A protocol, and what a connector's settings say about its answers.
#[derive(Clone, Copy, Debug)]
pub struct Dialect<'a> {
    pub protocol: Protocol,
    /// The `version` of an answer; platforms treat it as free text.
    pub version: &'a str,
    pub settings: &'a ContractSettings,
}

/// A call as it came.
#[derive(Clone, Copy)]
pub struct Received<'a> {
    pub connector: &'a ConnectorName,
    /// The step that the URL names; `None` at the connector's own URL.
    pub url_step: Option<Step>,
    /// What follows the step in the path, without the slash between them, still escaped.
    pub path: Option<&'a str>,
    /// Still escaped.
    pub query: Option<&'a str>,
    /// `None` where there are none: a call out of a file.
    pub headers: Option<&'a HeaderMap>,
    pub kind: BodyKind,
    pub body: &'a [u8],
}

/// What a body holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BodyKind {
    Json,
    /// `application/x-www-form-urlencoded`
    Form,
    /// A `GET`: whatever is said stands in the URL and in headers.
    Nothing,
}

impl<'a> Received<'a> {
    /// A call whose claims all stand in a JSON body, as most do.
    #[must_use]
    pub const fn json(
        connector: &'a ConnectorName,
        url_step: Option<Step>,
        body: &'a [u8],
    ) -> Self {
        let kind = BodyKind::Json;
        Self { connector, url_step, path: None, query: None, headers: None, kind, body }
    }
}

impl Received<'_> {
    /// How much is said in the URL and in headers, for the limit that a body has as well.
    pub(crate) fn bytes_outside_the_body(&self, settings: &ContractSettings) -> usize {
        let header = |name: &String| self.headers?.get(name.as_str()).map(|value| value.len());
        let headers: usize = settings.claim_headers.iter().filter_map(header).sum();
        self.path.map_or(0, str::len) + self.query.map_or(0, str::len) + headers
    }
}

/// Says how much there is, and nothing of it.
impl fmt::Debug for Received<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Received({:?} for {}, {} bytes)", self.kind, self.connector, self.body.len())
    }
}

/// A call, read.
#[derive(Debug)]
pub struct Call {
    pub sign_up: SignUp,
    /// Call and URL name two different steps. In a dialect whose calls are of a type that the answer
    /// must match the call holds; elsewhere the URL does, for somebody chose it.
    pub contradicts_url: bool,
    pub shape: Shape,
    /// The tenant that the call says it comes from; only custom extensions say so.
    pub tenant: Option<String>,
    /// The registered extension that the call says it is.
    pub extension: Option<String>,
}

/// What an answer has to know of its call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shape {
    step: Step,
    /// Only where the dialect wants values to have the types that came.
    attributes: Vec<Attribute>,
}

/// An attribute of the call, whether it had a value or not.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Attribute {
    /// What rules call it.
    claim: String,
    /// What the platform calls it.
    spelling: String,
    kind: AttributeKind,
}

/// The names of attributes tell what an organisation asks of people, and nothing of a person.
impl fmt::Debug for Attribute {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {:?}", self.spelling, self.kind)
    }
}

impl Shape {
    /// For a sign-up that came some other way, as if it had come in the dialect of the answer.
    #[must_use]
    pub fn of(sign_up: &SignUp) -> Self {
        let mut shape = Self::plain(sign_up.step);
        let email = sign_up.email.iter().map(|_| ("email", AttributeKind::Text));
        let claims = sign_up
            .claims
            .iter()
            .map(|(name, value)| (name.as_str(), AttributeKind::of_value(value)));
        shape.attributes = email
            .chain(claims)
            .map(|(name, kind)| Attribute {
                claim: name.to_owned(),
                spelling: name.to_owned(),
                kind,
            })
            .collect();
        shape
    }

    /// Nothing is known but the step.
    const fn plain(step: Step) -> Self {
        Self { step, attributes: Vec::new() }
    }

    #[must_use]
    pub const fn step(&self) -> Step {
        self.step
    }
}

/// An outcome on its way to a platform.
#[derive(Clone, Copy, Debug)]
pub struct Reply<'a> {
    pub outcome: &'a Outcome,
    /// The event that holds it, where there is one.
    pub event: Option<Uuid>,
    /// A stable word for whoever reads answers with a program, where the dialect has a place for it.
    pub code: &'static str,
}

impl<'a> Reply<'a> {
    #[must_use]
    pub const fn new(outcome: &'a Outcome, event: Option<Uuid>) -> Self {
        let code = match outcome {
            Outcome::Continue { .. } => "continued",
            Outcome::Reject { .. } => "rejected",
            Outcome::Block { .. } => "blocked",
            Outcome::Pending { .. } => "pending",
        };
        Self { outcome, event, code }
    }

    /// What is said because the event could not be stored.
    #[must_use]
    pub const fn without_storage(outcome: &'a Outcome) -> Self {
        Self { outcome, event: None, code: "not-stored" }
    }
}

/// An answer, ready to send. Always `application/json`.
#[derive(Clone, PartialEq, Eq)]
pub struct Written {
    pub status: StatusCode,
    pub body: Vec<u8>,
    pub unsaid: Unsaid,
}

impl Written {
    fn new(status: StatusCode, body: &impl Serialize) -> Self {
        let body = serde_json::to_vec(body).expect("text keys and JSON values always serialise");
        Self { status, body, unsaid: Unsaid::default() }
    }

    fn without(self, unsaid: Unsaid) -> Self {
        Self { unsaid, ..self }
    }
}

/// Leaves claims out: they are personal data.
impl fmt::Debug for Written {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Written({}, {:?})", self.status, self.unsaid)
    }
}

/// What was decided and the dialect has no way to say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Unsaid {
    /// So many changed claims are not in the answer.
    pub claims: usize,
    /// The answer does not turn the person away, although the decision does.
    pub refusal: bool,
}

impl Dialect<'_> {
    /// Whether this dialect is ever called like this; asked before anything else.
    pub fn expect_call(&self, method: &Method, path: Option<&str>) -> Result<(), Problem> {
        let gets = self.protocol == Protocol::CustomPolicy;
        match *method {
            // Only a policy that sends claims in the URL knows URLs that go on after the step.
            Method::POST if path.is_some() => Err(Problem::NotFound),
            Method::POST => Ok(()),
            Method::GET if gets => Ok(()),
            _ if path.is_some() && !gets => Err(Problem::NotFound),
            _ => Err(Problem::MethodNotAllowed),
        }
    }

    /// The value of an `Allow` header.
    #[must_use]
    pub const fn allowed_methods(&self) -> &'static str {
        match self.protocol {
            Protocol::ApiConnector | Protocol::CustomExtension => "POST",
            Protocol::CustomPolicy => "GET, POST",
        }
    }

    /// What the body will hold, as far as method and headers tell.
    pub fn expect_body(&self, method: &Method, headers: &HeaderMap) -> Result<BodyKind, Problem> {
        if method == Method::GET {
            return Ok(BodyKind::Nothing);
        }
        // `application/json` with whatever parameters.
        let essence = headers
            .get(header::CONTENT_TYPE)
            .and_then(|value| value.as_bytes().split(|byte| *byte == b';').next())
            .unwrap_or_default()
            .trim_ascii();
        if essence.eq_ignore_ascii_case(b"application/json") {
            Ok(BodyKind::Json)
        } else if self.protocol == Protocol::CustomPolicy
            && essence.eq_ignore_ascii_case(b"application/x-www-form-urlencoded")
        {
            Ok(BodyKind::Form)
        } else {
            Err(Problem::NotJsonContentType)
        }
    }

    /// Reads a call to the URL of a step, or to the connector's own where the call says the step.
    pub fn read(&self, received: &Received<'_>) -> Result<Call, Problem> {
        match self.protocol {
            Protocol::ApiConnector => api_connector::read(received),
            Protocol::CustomPolicy => custom_policy::read(self.settings, received),
            Protocol::CustomExtension => custom_extension::read(received),
        }
    }

    /// Says a decision.
    #[must_use]
    pub fn write(&self, shape: &Shape, reply: &Reply<'_>) -> Written {
        match self.protocol {
            Protocol::ApiConnector => {
                let answer = Answer::new(self.version, shape.step, reply.outcome);
                Written::new(answer.http_status(), &answer)
            }
            Protocol::CustomPolicy => custom_policy::write(self, reply),
            Protocol::CustomExtension => custom_extension::write(self, shape, reply),
        }
    }

    /// What a call gets that never became a sign-up. It names no action: an answer with one would
    /// be shown to the person as if it were a decision.
    #[must_use]
    pub fn write_problem(&self, problem: Problem) -> Written {
        let code = problem.code();
        let message = problem.message();
        match self.protocol {
            Protocol::ApiConnector | Protocol::CustomPolicy => {
                let status = problem.status();
                let flat = Flat {
                    version: self.version,
                    status: status.as_u16(),
                    code,
                    user_message: message,
                };
                Written::new(status, &flat)
            }
            // As Microsoft's own services say errors; the dialect says nothing about them.
            Protocol::CustomExtension => {
                Written::new(problem.status(), &Nested { error: Described { code, message } })
            }
        }
    }
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Flat<'a> {
    version: &'a str,
    /// The HTTP status, and not the 409 with which a custom policy would show the message to the
    /// person: it is for whoever set the connector up.
    status: u16,
    code: &'a str,
    user_message: &'a str,
}

#[derive(Serialize)]
struct Nested<'a> {
    error: Described<'a>,
}

#[derive(Serialize)]
struct Described<'a> {
    code: &'a str,
    message: &'a str,
}
