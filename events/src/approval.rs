//! Approvals: what a person decided about a sign-up that waited for them.
//!
//! Here is what such a decision looks like as an event, and the signed links by which approvers
//! come to it. That there is one decision for a request is the store's business; who may decide is
//! that of whoever hands out the link.

use std::{fmt, str::FromStr};

use data_encoding::BASE64URL_NOPAD;
use hmac::{Hmac, KeyInit, Mac};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use sha2::Sha256;
use time::OffsetDateTime;
use uuid::Uuid;

use crate::{Claims, Decision, Kind, Outcome, PseudonymKey, SignUpEvent};

/// Who decided about a request for approval, and why; part of the event that this became.
///
/// `Debug` leaves out who and why: both are about people.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Approval {
    /// The request: the id of the `pending` event that opened it.
    pub request: Uuid,
    pub approver: String,
    /// In the approver's words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

impl fmt::Debug for Approval {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Approval({})", self.request)
    }
}

/// What an approver says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Verdict {
    Approve,
    Deny,
}

impl Verdict {
    /// The name on the command line.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Approve => "approve",
            Self::Deny => "deny",
        }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Verdict {
    type Err = UnknownVerdict;

    fn from_str(name: &str) -> Result<Self, UnknownVerdict> {
        match name {
            "approve" => Ok(Self::Approve),
            "deny" => Ok(Self::Deny),
            _ => Err(UnknownVerdict),
        }
    }
}

/// A word that names no [`Verdict`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a verdict is approve or deny")]
pub struct UnknownVerdict;

impl SignUpEvent {
    /// The event of an approver's decision about the request that `pending` opened.
    ///
    /// It carries the sign-up as it was, and an approval also what rules had changed by then: all
    /// that it takes to make the account. `id` must be a UUIDv7 of `now`.
    #[must_use]
    pub fn reviewed(
        id: Uuid,
        now: OffsetDateTime,
        pending: &Self,
        verdict: Verdict,
        approver: impl Into<String>,
        reason: Option<String>,
        key: &PseudonymKey,
    ) -> Self {
        let (kind, outcome) = match verdict {
            Verdict::Approve => (Kind::Approved, Outcome::Continue { claims: changed(pending) }),
            Verdict::Deny => {
                (Kind::Denied, Outcome::Block { message: "the request was denied".to_owned() })
            }
        };
        let approval = Approval { request: pending.id, approver: approver.into(), reason };
        closing(id, now, pending, kind, outcome, approval, key)
    }

    /// The event of a request that nobody decided about in time.
    #[must_use]
    pub fn expired(id: Uuid, now: OffsetDateTime, pending: &Self, key: &PseudonymKey) -> Self {
        let message = "nobody decided about the request in time".to_owned();
        let approval = Approval {
            request: pending.id,
            approver: Approval::NOBODY.to_owned(),
            reason: Some(message.clone()),
        };
        closing(id, now, pending, Kind::Abandoned, Outcome::Block { message }, approval, key)
    }
}

impl Approval {
    /// The approver of a request that expired.
    pub const NOBODY: &'static str = "nobody";
}

fn changed(pending: &SignUpEvent) -> Claims {
    pending.decision.outcome.changed_claims().cloned().unwrap_or_default()
}

fn closing(
    id: Uuid,
    now: OffsetDateTime,
    pending: &SignUpEvent,
    kind: Kind,
    outcome: Outcome,
    approval: Approval,
    key: &PseudonymKey,
) -> SignUpEvent {
    // JSON carries milliseconds; an event must equal itself after a round trip.
    let time = now
        .replace_millisecond(now.millisecond())
        .expect("a millisecond taken from a time is valid in it");
    SignUpEvent {
        id,
        time,
        kind,
        person: pending.person.clone(),
        // Of the request alone: it has one outcome, whichever it is, and whoever publishes it.
        fingerprint: key.fingerprint_of_request(pending.id),
        traceparent: pending.traceparent.clone(),
        sign_up: pending.sign_up.clone(),
        decision: Decision { outcome, ..pending.decision.clone() },
        approval: Some(approval),
        confirmation: None,
    }
}

/// Signs and checks the links that lead an approver to a request.
///
/// A link says which event it is about and how long it holds, and nothing about the person. It may
/// be opened any number of times; it can be used once because a request is decided once.
#[derive(Clone)]
pub struct ApprovalLinks {
    hmac: Hmac<Sha256>,
}

impl fmt::Debug for ApprovalLinks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ApprovalLinks(…)")
    }
}

/// The event, and the end of the link in seconds since 1970.
const SIGNED_BYTES: usize = 16 + 8;
const TOKEN_BYTES: usize = SIGNED_BYTES + 32;

impl ApprovalLinks {
    /// Every process with the same pseudonym key accepts the same links.
    #[must_use]
    pub fn new(key: &PseudonymKey) -> Self {
        let hmac = Hmac::new_from_slice(&key.derive("approval-links"))
            .expect("HMAC takes a key of any length");
        Self { hmac }
    }

    /// A token for any `pending` event of a request, to the second; safe in a URL as it is.
    #[must_use]
    pub fn token(&self, event: Uuid, expires: OffsetDateTime) -> String {
        let mut token = Vec::with_capacity(TOKEN_BYTES);
        token.extend(event.as_bytes());
        token.extend(expires.unix_timestamp().to_be_bytes());
        let signature = self.hmac.clone().chain_update(&token).finalize().into_bytes();
        token.extend(signature);
        BASE64URL_NOPAD.encode(&token)
    }

    /// The event that a token is about.
    ///
    /// # Errors
    ///
    /// Where we did not make the token, or it held until `now` or earlier.
    pub fn check(&self, token: &str, now: OffsetDateTime) -> Result<Uuid, LinkError> {
        // The decoder is strict: each token has one spelling.
        let token = BASE64URL_NOPAD.decode(token.as_bytes()).map_err(|_| LinkError::Malformed)?;
        let token: [u8; TOKEN_BYTES] = token.try_into().map_err(|_| LinkError::Malformed)?;
        let (signed, signature) = token.split_at(SIGNED_BYTES);
        // Compares in constant time.
        let checked = self.hmac.clone().chain_update(signed).verify_slice(signature);
        checked.map_err(|_| LinkError::Forged)?;
        let (event, expires) = signed.split_at(16);
        let expires = i64::from_be_bytes(expires.try_into().expect("split where it begins"));
        if now.unix_timestamp() >= expires {
            return Err(LinkError::Expired);
        }
        Ok(Uuid::from_slice(event).expect("an id has 16 bytes"))
    }
}

/// Why a link leads nowhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LinkError {
    /// Cut off on the way, perhaps.
    #[error("the link is not complete")]
    Malformed,
    #[error("the link was not made here")]
    Forged,
    #[error("the link has expired")]
    Expired,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;
    use time::macros::datetime;

    use super::*;
    use crate::{Email, Protocol, SignUp, Step};

    const NOW: OffsetDateTime = datetime!(2026-11-22 10:00:00.123456 UTC);

    fn key() -> PseudonymKey {
        PseudonymKey::new(vec![7; 32])
    }

    fn pending() -> SignUpEvent {
        let claims = json!({ "city": "london", "extension_1_Note": "x" });
        let sign_up = SignUp {
            connector: "partners".parse().unwrap(),
            protocol: Protocol::ApiConnector,
            step: Step::BeforeCreate,
            email: Some(Email::new("ada@example.com")),
            identities: vec![],
            claims: claims.as_object().unwrap().clone(),
            client: None,
            locale: Some("en-GB".into()),
            ip: None,
            object_id: None,
            correlation_id: None,
        };
        let person = key().person(&sign_up);
        let fingerprint = key().fingerprint(&sign_up, &person);
        let claims = json!({ "city": "London" }).as_object().unwrap().clone();
        let outcome = Outcome::Pending { message: "wait".into(), claims };
        let id = Uuid::from_u128(1);
        let decision = Decision::new(outcome);
        SignUpEvent::decided(id, NOW, person, fingerprint, sign_up, decision).unwrap()
    }

    fn reviewed(id: u128, verdict: Verdict) -> SignUpEvent {
        let reason = Some("known".to_owned());
        SignUpEvent::reviewed(
            Uuid::from_u128(id),
            NOW,
            &pending(),
            verdict,
            "grace",
            reason,
            &key(),
        )
    }

    #[test]
    fn an_approval_carries_all_that_the_account_needs() {
        let event = reviewed(2, Verdict::Approve);
        assert_eq!(event.subject(), "signups.partners.approved");
        assert_eq!((&event.person, &event.sign_up), (&pending().person, &pending().sign_up));
        let changed = event.decision.outcome.changed_claims().unwrap();
        assert_eq!(changed.get("city"), Some(&json!("London")));
        let approval = event.approval.clone().unwrap();
        assert_eq!((approval.request, approval.approver.as_str()), (pending().id, "grace"));
        let json = serde_json::to_string(&event).unwrap();
        assert_eq!(serde_json::from_str::<SignUpEvent>(&json).unwrap(), event);
    }

    #[test]
    fn a_denied_or_expired_request_lets_nobody_past() {
        let denied = reviewed(2, Verdict::Deny);
        let expired = SignUpEvent::expired(Uuid::from_u128(3), NOW, &pending(), &key());
        assert_eq!((denied.kind, expired.kind), (Kind::Denied, Kind::Abandoned));
        for event in [denied, expired] {
            assert_eq!(event.decision.outcome.as_str(), "block");
            assert_eq!(event.approval.unwrap().request, pending().id);
        }
    }

    #[test]
    fn a_request_has_one_fingerprint_whatever_is_decided() {
        let of = |event: SignUpEvent| event.fingerprint;
        let approved = of(reviewed(2, Verdict::Approve));
        assert_eq!(approved, of(reviewed(3, Verdict::Deny)));
        assert_eq!(approved, of(SignUpEvent::expired(Uuid::from_u128(4), NOW, &pending(), &key())));
        assert_ne!(approved, pending().fingerprint);
        let other = SignUpEvent { id: Uuid::from_u128(9), ..pending() };
        assert_ne!(approved, of(SignUpEvent::expired(Uuid::from_u128(4), NOW, &other, &key())));
    }

    #[test]
    fn debug_tells_nothing_of_people() {
        let event = reviewed(2, Verdict::Approve);
        let debug = format!("{event:?} {:?}", event.approval);
        assert!(!debug.contains("grace") && !debug.contains("known"), "{debug}");
    }

    #[test]
    fn a_link_holds_until_its_end_and_not_at_it() {
        let links = ApprovalLinks::new(&key());
        let end = datetime!(2026-11-23 10:00 UTC);
        let token = links.token(Uuid::from_u128(1), end);
        let at = |now| links.check(&token, now);
        assert_eq!(at(end - time::Duration::milliseconds(1)), Ok(Uuid::from_u128(1)));
        assert_eq!(at(end), Err(LinkError::Expired));
    }

    #[test]
    fn a_link_of_another_installation_is_forged() {
        let other = ApprovalLinks::new(&PseudonymKey::new(vec![8; 32]));
        let token = other.token(Uuid::from_u128(1), NOW + time::Duration::days(1));
        assert_eq!(ApprovalLinks::new(&key()).check(&token, NOW), Err(LinkError::Forged));
    }

    proptest! {
        #[test]
        fn whatever_was_signed_is_read_back(event: u128, seconds in 1_i64..4_000_000_000) {
            let links = ApprovalLinks::new(&key());
            let expires = NOW + time::Duration::seconds(seconds);
            let token = links.token(Uuid::from_u128(event), expires);
            prop_assert!(token.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_'));
            prop_assert_eq!(links.check(&token, NOW), Ok(Uuid::from_u128(event)));
        }

        #[test]
        fn a_token_changed_in_one_place_is_refused(event: u128, place: prop::sample::Index, to: char) {
            let links = ApprovalLinks::new(&key());
            let token = links.token(Uuid::from_u128(event), NOW + time::Duration::days(1));
            let mut changed: Vec<char> = token.chars().collect();
            let place = place.index(changed.len());
            prop_assume!(changed[place] != to);
            changed[place] = to;
            let changed: String = changed.into_iter().collect();
            let refused = links.check(&changed, NOW);
            prop_assert!(
                matches!(refused, Err(LinkError::Malformed | LinkError::Forged)), "{:?}", refused
            );
        }

        #[test]
        fn no_text_makes_it_panic_or_pass(token in ".{0,120}") {
            prop_assert!(ApprovalLinks::new(&key()).check(&token, NOW).is_err());
        }
    }

    #[test]
    fn a_token_cut_anywhere_is_malformed() {
        let links = ApprovalLinks::new(&key());
        let token = links.token(Uuid::from_u128(1), NOW + time::Duration::days(1));
        for length in 0..token.len() {
            assert_eq!(links.check(&token[..length], NOW), Err(LinkError::Malformed), "{length}");
        }
        assert_eq!(links.check(&format!("{token}A"), NOW), Err(LinkError::Malformed));
    }

    #[test]
    fn a_verdict_is_read_as_it_is_written() {
        for verdict in [Verdict::Approve, Verdict::Deny] {
            assert_eq!(verdict.as_str().parse(), Ok(verdict));
        }
        assert_eq!("yes".parse::<Verdict>(), Err(UnknownVerdict));
    }
}
