//! The RESTful technical profile of Azure AD B2C custom policies.
//!
//! The policy's author decides what is sent and how: a flat JSON object, a form, or a `GET` whose
//! claims stand in the query, in the path or in headers. What goes back is a flat object of the
//! claims that change, or an error with a message for the person. Values that come any other way
//! than in JSON are text.

use std::{borrow::Cow, net::IpAddr, str};

use axum::http::{HeaderMap, StatusCode};
use percent_encoding::percent_decode;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use uuid::Uuid;
use vestibule_events::{Claims, Email, Outcome, Protocol, SignUp, Step};

use super::{
    BodyKind, Call, Dialect, Problem, Received, Reply, Shape, Unsaid, Written,
    claims::{self, step_named, take_identities, take_text, use_one_surname},
};
use crate::{ContractSettings, ErrorStatus};

/// An error as it stands on the wire. The platform shows `user_message` to the person; it reads
/// what is optional in its debug mode only.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PolicyError {
    pub version: String,
    /// 409, whatever the HTTP status is.
    pub status: u16,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub code: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request_id: Option<String>,
    pub user_message: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub developer_message: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub more_info: Option<String>,
}

/// Leaves the message out, which a rule may have made of claims.
impl std::fmt::Debug for PolicyError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PolicyError({}, {:?})", self.status, self.code)
    }
}

impl PolicyError {
    /// The platform takes nothing else in the body.
    pub const STATUS: u16 = 409;

    fn new(version: &str, code: &str, event: Option<Uuid>, message: &str) -> Self {
        Self {
            version: version.to_owned(),
            status: Self::STATUS,
            code: Some(code.to_owned()),
            request_id: event.map(|id| id.to_string()),
            user_message: message.to_owned(),
            developer_message: None,
            more_info: None,
        }
    }
}

pub(super) fn read(settings: &ContractSettings, received: &Received<'_>) -> Result<Call, Problem> {
    let mut claims = match received.kind {
        BodyKind::Json => claims::object(received.body)?,
        BodyKind::Form => {
            let body = str::from_utf8(received.body).map_err(|_| Problem::NotText)?;
            let mut claims = Claims::new();
            add_pairs(body, &mut claims)?;
            claims
        }
        // A template may put claims into the path and the query of one URL, so both are read.
        BodyKind::Nothing => {
            let mut claims = Claims::new();
            if let Some(headers) = received.headers {
                add_headers(&settings.claim_headers, headers, &mut claims);
            }
            add_pairs(received.query.unwrap_or_default(), &mut claims)?;
            if let Some(path) = received.path {
                add_segments(path, &mut claims)?;
            }
            claims
        }
    };
    let (step, contradicts_url) = step(received.url_step, &mut claims)?;
    use_one_surname(&mut claims);
    Ok(Call {
        contradicts_url,
        shape: Shape::plain(step),
        tenant: None,
        extension: None,
        sign_up: SignUp {
            connector: received.connector.clone(),
            protocol: Protocol::CustomPolicy,
            step,
            email: take_email(&mut claims),
            identities: take_identities(&mut claims),
            client: take_text(&mut claims, "client_id"),
            locale: take_text(&mut claims, "ui_locales"),
            object_id: take_text(&mut claims, "objectId"),
            correlation_id: take_text(&mut claims, "correlationId"),
            ip: take_ip(&mut claims),
            claims,
        },
    })
}

/// The step of the URL or, at the connector's own URL, the one that a claim `step` names, in our
/// words or in those of the API connectors. Does the claim contradict the URL?
///
/// At the URL of a step a claim `step` that names none is one of the policy's own.
fn step(url_step: Option<Step>, claims: &mut Claims) -> Result<(Step, bool), Problem> {
    let named = |name: &str| {
        let ours = || Step::ALL.into_iter().find(|step| step.as_str() == name.trim());
        step_named(name).or_else(ours)
    };
    let claimed = match claims.get("step") {
        Some(Value::String(name)) if !name.trim().is_empty() => Some(named(name)),
        _ => None,
    };
    let step = match (url_step, claimed) {
        (Some(step), _) => step,
        (None, Some(Some(step))) => step,
        (None, Some(None)) => return Err(Problem::UnknownStep),
        (None, None) => return Err(Problem::MissingStep),
    };
    let claimed = claimed.flatten();
    if claimed.is_some() {
        claims.remove("step");
    }
    Ok((step, claimed.is_some_and(|claimed| claimed != step)))
}

/// The address, under the names that the policies of the starter packs give it. A sign-in name that
/// is no address stays a claim.
fn take_email(claims: &mut Claims) -> Option<Email> {
    take_text(claims, "email")
        .or_else(|| take_text(claims, "signInNames.emailAddress"))
        .or_else(|| match claims.get("signInName") {
            Some(Value::String(name)) if name.contains('@') => take_text(claims, "signInName"),
            _ => None,
        })
        .map(Email::new)
}

/// From where the person signs up, if the policy says so; what is no address stays a claim.
fn take_ip(claims: &mut Claims) -> Option<String> {
    match claims.get("ip") {
        Some(Value::String(text)) if text.parse::<IpAddr>().is_ok() => take_text(claims, "ip"),
        _ => None,
    }
}

/// Pairs as in a form or a query. Of two with the same name the last one holds, as in JSON.
fn add_pairs(text: &str, claims: &mut Claims) -> Result<(), Problem> {
    for pair in text.split('&').filter(|pair| !pair.is_empty()) {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        let [name, value] = [name, value].map(|it| it.replace('+', " "));
        claims.insert(unescaped(&name)?.into_owned(), unescaped(&value)?.into());
    }
    Ok(())
}

/// `name/value/name/value`, where a value may be empty.
fn add_segments(path: &str, claims: &mut Claims) -> Result<(), Problem> {
    let mut segments = path.split('/');
    while let Some(name) = segments.next() {
        let value = segments.next().ok_or(Problem::NotInPairs)?;
        claims.insert(unescaped(name)?.into_owned(), unescaped(value)?.into());
    }
    Ok(())
}

fn unescaped(text: &str) -> Result<Cow<'_, str>, Problem> {
    percent_decode(text.as_bytes()).decode_utf8().map_err(|_| Problem::NotText)
}

/// The headers that the settings name, and no other: what a proxy adds is nobody's claim. What a
/// caller proves itself with is none either, even where the settings name it.
///
/// HTTP does not say what the bytes of a header mean. We read UTF-8 and, where it is none,
/// Latin-1, which everything is.
fn add_headers(names: &[String], headers: &HeaderMap, claims: &mut Claims) {
    const SECRET: [&str; 3] = ["authorization", "proxy-authorization", "cookie"];
    for name in names {
        if SECRET.iter().any(|secret| secret.eq_ignore_ascii_case(name)) {
            continue;
        }
        let Some(value) = headers.get(name.as_str()) else { continue };
        let bytes = value.as_bytes();
        let text = match str::from_utf8(bytes) {
            Ok(text) => text.to_owned(),
            Err(_) => bytes.iter().map(|byte| char::from(*byte)).collect(),
        };
        claims.insert(name.clone(), text.into());
    }
}

pub(super) fn write(dialect: &Dialect<'_>, reply: &Reply<'_>) -> Written {
    let (message, field) = match reply.outcome {
        Outcome::Continue { claims } => return write_claims(claims),
        Outcome::Reject { message, field } => (message, field.as_deref()),
        Outcome::Block { message } | Outcome::Pending { message, .. } => (message, None),
    };
    let status = match dialect.settings.error_status {
        ErrorStatus::Conflict => StatusCode::CONFLICT,
        ErrorStatus::BadRequest => StatusCode::BAD_REQUEST,
    };
    let mut error = PolicyError::new(dialect.version, reply.code, reply.event, message);
    // The dialect has no word for the field that is meant.
    error.developer_message = field.map(|field| format!("the claim to correct is {field}"));
    Written::new(status, &error)
}

/// A null breaks the platform, and it takes an object apart only where it is told how; neither is
/// sent.
fn write_claims(claims: &Claims) -> Written {
    let is_flat = |value: &Value| !matches!(value, Value::Null | Value::Object(_));
    let can_be_said = |value: &Value| match value {
        Value::Array(values) => values.iter().all(|it| is_flat(it) && !it.is_array()),
        value => is_flat(value),
    };
    let said: serde_json::Map<_, _> = claims
        .iter()
        .filter(|(name, value)| !name.is_empty() && can_be_said(value))
        .map(|(name, value)| (name.clone(), value.clone()))
        .collect();
    let unsaid = Unsaid { claims: claims.len() - said.len(), refusal: false };
    Written::new(StatusCode::OK, &said).without(unsaid)
}
