//! The sign-up as rules and templates see it.

use serde::Serialize;
use vestibule_events::{Claims, Email, Identity, Outcome, SignUpEvent};

/// The variable `signup` of rules and templates.
///
/// What the platform did not send is absent, not null, so that `has(signup.email)` asks for it.
/// Claims are those in force: as sent, then as the decision changed them.
#[derive(Serialize)]
pub(crate) struct SignUpView<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    email: Option<&'a str>,
    connector: &'a str,
    step: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    client: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    locale: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    object_id: Option<&'a str>,
    identities: &'a [Identity],
    claims: Claims,
}

impl<'a> SignUpView<'a> {
    pub(crate) fn of(event: &'a SignUpEvent) -> Self {
        let sign_up = &event.sign_up;
        Self {
            email: sign_up.email.as_ref().map(Email::expose),
            connector: sign_up.connector.as_str(),
            step: sign_up.step.as_str(),
            client: sign_up.client.as_deref(),
            locale: sign_up.locale.as_deref(),
            object_id: sign_up.object_id.as_deref(),
            identities: &sign_up.identities,
            claims: claims_in_force(event),
        }
    }
}

/// The claims as the platform will keep them: those sent, overlaid with what the decision set.
pub(crate) fn claims_in_force(event: &SignUpEvent) -> Claims {
    let mut claims = event.sign_up.claims.clone();
    if let Outcome::Continue { claims: changed } = &event.decision.outcome {
        claims.extend(changed.iter().map(|(name, value)| (name.clone(), value.clone())));
    }
    claims
}
