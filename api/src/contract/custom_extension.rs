//! The custom authentication extensions of Entra External ID.
//!
//! Three events come in: the attribute page is about to be shown (`after-federation`), it was
//! filled in (`before-create`), a token is about to be issued (`before-token`). Each answer holds
//! exactly one action and has the HTTP status 200, a refusal too. The platform takes the whole
//! answer or fails the sign-up with an error that tells nobody anything, so that every value in it
//! has the type the platform expects or is not in it.
//!
//! Calls are read with patience: names in any case, the forms of the first preview, members that
//! are missing. Calls about other events, among them those that carry codes and passwords, are
//! refused, and nothing of them is kept.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use vestibule_events::{Claims, Email, Identity, Outcome, Protocol, SignUp, Step};

use super::{
    Attribute, AttributeKind, Call, Dialect, Problem, Received, Reply, Shape, Unsaid, Written,
    claims::{self, SURNAME, use_one_surname},
    values::{fitting, token_claim},
};
use axum::http::StatusCode;

/// An answer as it stands on the wire.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
pub struct ExtensionAnswer {
    data: Data,
}

#[derive(Clone, PartialEq, Serialize, Deserialize)]
struct Data {
    #[serde(rename = "@odata.type")]
    kind: String,
    /// Exactly one.
    actions: [ExtensionAction; 1],
}

/// What the platform is to do.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "@odata.type")]
pub enum ExtensionAction {
    #[serde(rename = "microsoft.graph.attributeCollectionStart.continueWithDefaultBehavior")]
    StartContinue,
    #[serde(rename = "microsoft.graph.attributeCollectionStart.setPrefillValues")]
    StartPrefill { inputs: Map<String, Value> },
    #[serde(rename = "microsoft.graph.attributeCollectionStart.showBlockPage")]
    StartBlock {
        #[serde(default, skip_serializing_if = "Option::is_none")]
        title: Option<String>,
        message: String,
    },
    #[serde(rename = "microsoft.graph.attributeCollectionSubmit.continueWithDefaultBehavior")]
    SubmitContinue,
    #[serde(rename = "microsoft.graph.attributeCollectionSubmit.modifyAttributeValues")]
    SubmitModify { attributes: Map<String, Value> },
    #[serde(rename = "microsoft.graph.attributeCollectionSubmit.showValidationError")]
    SubmitReject {
        message: String,
        /// By the name of the attribute; empty where the whole form is meant.
        #[serde(rename = "attributeErrors")]
        attribute_errors: Map<String, Value>,
    },
    #[serde(rename = "microsoft.graph.attributeCollectionSubmit.showBlockPage")]
    SubmitBlock {
        #[serde(default, skip_serializing_if = "Option::is_none")]
        title: Option<String>,
        message: String,
    },
    #[serde(rename = "microsoft.graph.tokenIssuanceStart.provideClaimsForToken")]
    TokenClaims { claims: Map<String, Value> },
}

impl ExtensionAnswer {
    /// The one action.
    #[must_use]
    pub const fn action(&self) -> &ExtensionAction {
        let [action] = &self.data.actions;
        action
    }
}

/// Leaves claims out: they are personal data.
impl std::fmt::Debug for ExtensionAnswer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ExtensionAnswer({:?})", self.action())
    }
}

impl std::fmt::Debug for ExtensionAction {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::StartContinue | Self::SubmitContinue => "continueWithDefaultBehavior",
            Self::StartPrefill { .. } => "setPrefillValues",
            Self::StartBlock { .. } | Self::SubmitBlock { .. } => "showBlockPage",
            Self::SubmitModify { .. } => "modifyAttributeValues",
            Self::SubmitReject { .. } => "showValidationError",
            Self::TokenClaims { .. } => "provideClaimsForToken",
        })
    }
}

/// The events we answer, by the last part of their type.
const EVENTS: [(&str, Step); 3] = [
    ("attributeCollectionStart", Step::AfterFederation),
    ("attributeCollectionSubmit", Step::BeforeCreate),
    ("tokenIssuanceStart", Step::BeforeToken),
];

/// So much names and values of token claims may be together.
const TOKEN_BYTES_MAX: usize = 3 * 1024;

/// An answer has a limit that nobody publishes. A hundred attributes of 250 letters fit in this.
const ATTRIBUTE_BYTES_MAX: usize = 32 * 1024;

pub(super) fn read(received: &Received<'_>) -> Result<Call, Problem> {
    let mut envelope = claims::object(received.body)?;
    let step = step_of(&envelope)?;
    let mut data = take_object(&mut envelope, "data");
    let mut context = take_object(&mut data, "authenticationContext");
    let mut client = take_object(&mut context, "client");
    let mut application = take_object(&mut context, "clientServicePrincipal");
    let person = if step == Step::BeforeToken {
        account(take_object(&mut context, "user"))
    } else {
        applicant(take_object(&mut data, "userSignUpInfo"))
    };
    Ok(Call {
        contradicts_url: received.url_step.is_some_and(|url_step| url_step != step),
        shape: Shape { step, attributes: person.attributes },
        tenant: take_text(&mut data, "tenantId"),
        extension: take_text(&mut data, "customAuthenticationExtensionId"),
        sign_up: SignUp {
            connector: received.connector.clone(),
            protocol: Protocol::CustomExtension,
            step,
            email: person.email.map(Email::new),
            identities: person.identities,
            claims: person.claims,
            client: take_text(&mut application, "appId"),
            locale: take_text(&mut client, "locale"),
            object_id: person.object_id,
            correlation_id: take_text(&mut context, "correlationId"),
            ip: take_text(&mut client, "ip").or_else(|| take_text(&mut client, "clientIp")),
        },
    })
}

/// Which event it is. The type stands in the envelope and, in other words, in `data`.
fn step_of(envelope: &Map<String, Value>) -> Result<Step, Problem> {
    if member(envelope, "apiSchemaVersion").is_some() {
        return Err(Problem::LegacyFormat);
    }
    let last_part = |name: &str| name.trim().rsplit('.').next().unwrap_or_default().to_owned();
    let text = |object, name| member(object, name).and_then(Value::as_str);
    let of_data = || {
        let name = last_part(text(member(envelope, "data")?.as_object()?, "@odata.type")?);
        let name = name.to_ascii_lowercase();
        Some(name.strip_prefix("on")?.strip_suffix("calloutdata")?.to_owned())
    };
    let name = text(envelope, "type")
        .map(last_part)
        .filter(|name| !name.is_empty())
        .or_else(of_data)
        .ok_or(Problem::MissingEventType)?;
    EVENTS
        .iter()
        .find(|(event, _)| event.eq_ignore_ascii_case(&name))
        .map(|(_, step)| *step)
        .ok_or(Problem::EventNotAnswered)
}

/// Whoever it is about.
#[derive(Default)]
struct Person {
    email: Option<String>,
    identities: Vec<Identity>,
    claims: Claims,
    object_id: Option<String>,
    attributes: Vec<Attribute>,
}

/// Someone who has no account yet: `userSignUpInfo`.
fn applicant(mut info: Map<String, Value>) -> Person {
    let mut person = Person::default();
    for (name, value) in take_object(&mut info, "attributes") {
        let (kind, value) = attribute(value);
        person.attributes.push(Attribute { claim: name.clone(), spelling: name.clone(), kind });
        // What has no value is not sent by the other dialects.
        if !value.is_null() {
            person.claims.insert(name, value);
        }
    }
    person.rename_surname();
    person.email = person.take_email_attribute();
    person.take_identities(take(&mut info, "identities"));
    person
}

/// Someone whose account exists: `user`.
fn account(mut user: Map<String, Value>) -> Person {
    let object_id = take_text(&mut user, "id");
    let email = take_text(&mut user, "mail");
    let identities = take(&mut user, "identities");
    user.retain(|_, value| !value.is_null());
    let mut person = Person { object_id, email, claims: user, ..Person::default() };
    person.rename_surname();
    person.take_identities(identities);
    person
}

impl Person {
    /// The address is called `email` on submission and `EmailAddress` at the start. Where both
    /// came, and differ, the second one stays a claim.
    fn take_email_attribute(&mut self) -> Option<String> {
        const NAMES: [&str; 2] = ["email", "EmailAddress"];
        let mut email: Option<String> = None;
        for name in NAMES {
            let Some(key) = self.claims.keys().find(|key| key.eq_ignore_ascii_case(name)).cloned()
            else {
                continue;
            };
            match (&email, self.claims.get(&key)) {
                (None, Some(Value::String(text))) if !text.trim().is_empty() => {
                    email = Some(text.clone());
                }
                (Some(email), Some(Value::String(text))) if email.eq_ignore_ascii_case(text) => {}
                _ => continue,
            }
            self.claims.remove(&key);
            if let Some(attribute) = self.attributes.iter_mut().find(|it| it.claim == key) {
                "email".clone_into(&mut attribute.claim);
            }
        }
        email
    }

    /// Where the attributes tell no address, the identity of someone who signs in with one does.
    fn take_identities(&mut self, came: Option<Value>) {
        let Some(came) = came.filter(|it| !it.is_null()) else { return };
        match claims::identities(&came, member) {
            Some(identities) => self.identities = identities,
            // Kept as it came, as by the other dialects.
            None => {
                self.claims.entry("identities").or_insert(came);
            }
        }
        let by_mail = |it: &&Identity| {
            let kind = it.sign_in_type.as_bytes();
            it.issuer.eq_ignore_ascii_case("mail")
                || kind.get(..5).is_some_and(|kind| kind.eq_ignore_ascii_case(b"email"))
        };
        if self.email.is_none() {
            self.email = self
                .identities
                .iter()
                .find(by_mail)
                .map(|it| it.issuer_assigned_id.clone())
                .filter(|address| !address.trim().is_empty());
        }
    }

    fn rename_surname(&mut self) {
        let Some(spelling) = use_one_surname(&mut self.claims) else { return };
        if let Some(attribute) = self.attributes.iter_mut().find(|it| it.claim == spelling) {
            SURNAME.clone_into(&mut attribute.claim);
        }
    }
}

/// Type and value of an attribute: `{"@odata.type": …, "value": …}`, or the bare value.
fn attribute(value: Value) -> (AttributeKind, Value) {
    let Value::Object(mut wrapped) = value else { return (AttributeKind::of_value(&value), value) };
    let named = member(&wrapped, "@odata.type")
        .and_then(Value::as_str)
        .map_or(AttributeKind::Unknown, AttributeKind::named);
    let Some(value) = take(&mut wrapped, "value") else {
        // Without a value, and without anything else that would be one.
        let wrapper = named != AttributeKind::Unknown || wrapped.is_empty();
        return (named, if wrapper { Value::Null } else { Value::Object(wrapped) });
    };
    let kind = match named {
        AttributeKind::Unknown => AttributeKind::of_value(&value),
        // The preview's type of a single text could hold several.
        AttributeKind::Text if value.is_array() => AttributeKind::Collection,
        named => named,
    };
    (kind, value)
}

/// A member by its name in any case; the case that is documented goes first.
fn member<'a>(object: &'a Map<String, Value>, name: &str) -> Option<&'a Value> {
    object.get(name).or_else(|| {
        object.iter().find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value)
    })
}

fn take(object: &mut Map<String, Value>, name: &str) -> Option<Value> {
    object.remove(name).or_else(|| {
        let key = object.keys().find(|key| key.eq_ignore_ascii_case(name)).cloned()?;
        object.remove(&key)
    })
}

/// Empty where there is none.
fn take_object(object: &mut Map<String, Value>, name: &str) -> Map<String, Value> {
    match take(object, name) {
        Some(Value::Object(object)) => object,
        _ => Map::new(),
    }
}

fn take_text(object: &mut Map<String, Value>, name: &str) -> Option<String> {
    match take(object, name) {
        Some(Value::String(text)) if !text.trim().is_empty() => Some(text),
        _ => None,
    }
}

pub(super) fn write(dialect: &Dialect<'_>, shape: &Shape, reply: &Reply<'_>) -> Written {
    let title = || dialect.settings.block_title.clone();
    let (action, unsaid) = match shape.step {
        Step::AfterFederation => match reply.outcome {
            Outcome::Continue { claims } => {
                let (inputs, left_out) = attributes(shape, claims);
                let action = if inputs.is_empty() {
                    ExtensionAction::StartContinue
                } else {
                    ExtensionAction::StartPrefill { inputs }
                };
                (action, Unsaid { claims: left_out, refusal: false })
            }
            // Nothing has been filled in that could be corrected.
            Outcome::Reject { message, .. }
            | Outcome::Block { message }
            | Outcome::Pending { message, .. } => (
                ExtensionAction::StartBlock { title: title(), message: message.clone() },
                Unsaid::default(),
            ),
        },
        Step::BeforeCreate => match reply.outcome {
            Outcome::Continue { claims } => {
                let (attributes, left_out) = attributes(shape, claims);
                let action = if attributes.is_empty() {
                    ExtensionAction::SubmitContinue
                } else {
                    ExtensionAction::SubmitModify { attributes }
                };
                (action, Unsaid { claims: left_out, refusal: false })
            }
            Outcome::Reject { message, field } => {
                let action = ExtensionAction::SubmitReject {
                    message: message.clone(),
                    attribute_errors: attribute_errors(shape, field.as_deref(), message),
                };
                (action, Unsaid::default())
            }
            Outcome::Block { message } | Outcome::Pending { message, .. } => (
                ExtensionAction::SubmitBlock { title: title(), message: message.clone() },
                Unsaid::default(),
            ),
        },
        Step::BeforeToken => {
            let (claims, unsaid) = match reply.outcome {
                Outcome::Continue { claims } => {
                    let (claims, left_out) = token_claims(claims);
                    (claims, Unsaid { claims: left_out, refusal: false })
                }
                // The event has no action that turns anybody away.
                _ => (Map::new(), Unsaid { claims: 0, refusal: true }),
            };
            (ExtensionAction::TokenClaims { claims }, unsaid)
        }
    };
    let kind = match shape.step {
        Step::AfterFederation => "microsoft.graph.onAttributeCollectionStartResponseData",
        Step::BeforeCreate => "microsoft.graph.onAttributeCollectionSubmitResponseData",
        Step::BeforeToken => "microsoft.graph.onTokenIssuanceStartResponseData",
    };
    let answer = ExtensionAnswer { data: Data { kind: kind.to_owned(), actions: [action] } };
    Written::new(StatusCode::OK, &answer).without(unsaid)
}

/// Changed claims under the names that the call had, as the types that the call had, and how many
/// could not be.
fn attributes(shape: &Shape, changed: &Claims) -> (Map<String, Value>, usize) {
    let mut said = Map::new();
    for (name, value) in changed.iter().filter(|(name, _)| !name.is_empty()) {
        // What is not in the call the platform takes or ignores, but does not choke on.
        let (spelling, kind) = shape
            .attribute(name)
            .map_or((name, AttributeKind::Unknown), |it| (&it.spelling, it.kind));
        if let Some(value) = kind.convert(value) {
            said.insert(spelling.clone(), value);
        }
    }
    let said = fitting(said, ATTRIBUTE_BYTES_MAX);
    let left_out = changed.len() - said.len();
    (said, left_out)
}

/// An error beside the field that a rule names, where the page has that field.
fn attribute_errors(shape: &Shape, field: Option<&str>, message: &str) -> Map<String, Value> {
    field
        .and_then(|field| shape.attribute(field))
        .map(|attribute| (attribute.spelling.clone(), message.into()))
        .into_iter()
        .collect()
}

fn token_claims(changed: &Claims) -> (Map<String, Value>, usize) {
    let said = changed
        .iter()
        .filter(|(name, _)| !name.trim().is_empty())
        .filter_map(|(name, value)| Some((name.clone(), token_claim(value)?)))
        .collect();
    let said = fitting(said, TOKEN_BYTES_MAX);
    let left_out = changed.len() - said.len();
    (said, left_out)
}

impl Shape {
    /// The attribute that a rule means: by its name, by its name in another case, or by the name
    /// of an extension without the id of the application that it belongs to, which differs from
    /// tenant to tenant.
    fn attribute(&self, name: &str) -> Option<&Attribute> {
        let short = name.strip_prefix("extension_");
        let is_short_for = |it: &Attribute| {
            let full = it.claim.strip_prefix("extension_").and_then(|rest| rest.split_once('_'));
            full.is_some_and(|(_, rest)| short == Some(rest))
        };
        self.attributes
            .iter()
            .find(|it| it.claim == name)
            .or_else(|| self.attributes.iter().find(|it| it.claim.eq_ignore_ascii_case(name)))
            .or_else(|| self.attributes.iter().find(|it| is_short_for(it)))
            // A rule may use the platform's own name where ours is another, as with the address.
            .or_else(|| self.attributes.iter().find(|it| it.spelling.eq_ignore_ascii_case(name)))
    }
}
