//! The sign-up as templates see it.

use serde::Serialize;
use vestibule_events::{
    Claims, Decision, Email, Identity, Outcome, Protocol, PseudonymKey, SignUp, SignUpEvent,
    expression,
};

/// The variable `signup` of templates, with the members that rules know ([`expression::MEMBERS`]).
///
/// What the platform did not send is absent, not null, so that `has(signup.email)` asks for it.
/// Claims are those in force: as sent, then as the decision changed them.
#[derive(Serialize)]
pub(crate) struct SignUpView<'a> {
    connector: &'a str,
    protocol: Protocol,
    step: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    email: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    email_domain: Option<String>,
    identities: &'a [Identity],
    claims: Claims,
    #[serde(skip_serializing_if = "Option::is_none")]
    client: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    locale: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ip: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    object_id: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    correlation_id: Option<&'a str>,
}

impl<'a> SignUpView<'a> {
    pub(crate) fn of(event: &'a SignUpEvent) -> Self {
        let sign_up = &event.sign_up;
        let domain = |email: &Email| email.domain().trim().to_ascii_lowercase();
        Self {
            connector: sign_up.connector.as_str(),
            protocol: sign_up.protocol,
            step: sign_up.step.as_str(),
            email: sign_up.email.as_ref().map(Email::expose),
            email_domain: sign_up.email.as_ref().map(domain),
            identities: &sign_up.identities,
            claims: claims_in_force(event),
            client: sign_up.client.as_deref(),
            locale: sign_up.locale.as_deref(),
            ip: sign_up.ip.as_deref(),
            object_id: sign_up.object_id.as_deref(),
            correlation_id: sign_up.correlation_id.as_deref(),
        }
    }
}

/// The claims as the platform will keep them: those sent, overlaid with what the decision set.
pub(crate) fn claims_in_force(event: &SignUpEvent) -> Claims {
    let mut claims = event.sign_up.claims.clone();
    if let Some(changed) = event.decision.outcome.changed_claims() {
        claims.extend(changed.iter().map(|(name, value)| (name.clone(), value.clone())));
    }
    claims
}

/// An event with every member, to try templates on before the first real one comes.
pub fn sample() -> SignUpEvent {
    use serde_json::json;
    use time::macros::datetime;

    let claims = json!({ "displayName": "Sample", "givenName": "Sam", "surname": "Ple" })
        .as_object()
        .cloned()
        .unwrap_or_default();
    let sign_up = SignUp { claims, ..expression::sample() };
    // Nobody's pseudonym: the key is no secret.
    let key = PseudonymKey::new(vec![0; 32]);
    let person = key.person(&sign_up);
    let fingerprint = key.fingerprint(&sign_up, &person);
    let decision = Decision::new(Outcome::unchanged());
    let time = datetime!(2026-01-01 00:00 UTC);
    SignUpEvent::decided(uuid::Uuid::nil(), time, person, fingerprint, sign_up, decision)
        .expect("this step makes an event")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_the_decision_changed_is_in_force() {
        let mut event = sample();
        let changed = json!({ "surname": "Changed", "added": 1 }).as_object().unwrap().clone();
        event.decision.outcome = Outcome::Continue { claims: changed };
        let view = serde_json::to_value(SignUpView::of(&event)).unwrap();
        assert_eq!(
            view["claims"],
            json!({ "displayName": "Sample", "givenName": "Sam", "surname": "Changed", "added": 1 })
        );
    }

    #[test]
    fn templates_know_the_members_that_rules_know() {
        let view = serde_json::to_value(SignUpView::of(&sample())).unwrap();
        let mut members: Vec<_> = view.as_object().unwrap().keys().map(String::as_str).collect();
        let mut known = expression::MEMBERS;
        members.sort_unstable();
        known.sort_unstable();
        assert_eq!(members, known);
    }
}
