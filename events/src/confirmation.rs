//! Confirmation: whether an account came to be of a sign-up that was let past.
//!
//! Here is what that looks like as an event. How it is found out, and that there is one outcome for
//! a sign-up, is left to others.

use std::{fmt, str::FromStr};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use uuid::Uuid;

use crate::{Kind, PseudonymKey, SignUpEvent};

/// Which sign-up was confirmed or given up, and how that is known; part of the event of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Confirmation {
    /// The id of the `accepted` or `approved` event.
    pub of: Uuid,
    /// What showed the account; absent where none came to be.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<ConfirmationSource>,
}

/// What showed that an account exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ConfirmationSource {
    /// The platform was about to issue a token to it.
    Token,
    /// It was found in the directory.
    Directory,
    /// We made it ourselves, after an approval.
    Account,
}

impl ConfirmationSource {
    pub const ALL: [Self; 3] = [Self::Token, Self::Directory, Self::Account];

    /// The name in events and in the store.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Token => "token",
            Self::Directory => "directory",
            Self::Account => "account",
        }
    }
}

impl fmt::Display for ConfirmationSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for ConfirmationSource {
    type Err = UnknownSource;

    fn from_str(name: &str) -> Result<Self, UnknownSource> {
        Self::ALL.into_iter().find(|it| it.as_str() == name).ok_or(UnknownSource)
    }
}

/// A word that names no [`ConfirmationSource`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a confirmation's source is one of token, directory, account")]
pub struct UnknownSource;

impl SignUpEvent {
    /// The event of an account that came to be of the sign-up `origin`.
    ///
    /// It carries the sign-up and its decision as they were, with the id of the account. `id` must
    /// be a UUIDv7 of `now`.
    #[must_use]
    pub fn confirmed(
        id: Uuid,
        now: OffsetDateTime,
        origin: &Self,
        object_id: impl Into<String>,
        source: ConfirmationSource,
        key: &PseudonymKey,
    ) -> Self {
        let mut event = outcome(id, now, origin, Kind::Confirmed, Some(source), key);
        event.sign_up.object_id = Some(object_id.into());
        event
    }

    /// The event of a sign-up `origin` of which no account came to be in time.
    #[must_use]
    pub fn given_up(id: Uuid, now: OffsetDateTime, origin: &Self, key: &PseudonymKey) -> Self {
        outcome(id, now, origin, Kind::Abandoned, None, key)
    }
}

fn outcome(
    id: Uuid,
    now: OffsetDateTime,
    origin: &SignUpEvent,
    kind: Kind,
    source: Option<ConfirmationSource>,
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
        person: origin.person.clone(),
        // Of the origin alone: it has one outcome, whichever it is, and whoever publishes it.
        fingerprint: key.fingerprint_of_confirmation(origin.id),
        traceparent: origin.traceparent.clone(),
        sign_up: origin.sign_up.clone(),
        decision: origin.decision.clone(),
        approval: None,
        confirmation: Some(Confirmation { of: origin.id, source }),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use time::macros::datetime;

    use super::*;
    use crate::{Decision, Outcome, expression};

    const NOW: OffsetDateTime = datetime!(2026-11-22 10:00:00.123456 UTC);

    fn key() -> PseudonymKey {
        PseudonymKey::new(vec![7; 32])
    }

    fn accepted() -> SignUpEvent {
        let mut sign_up = expression::sample();
        sign_up.object_id = None;
        let person = key().person(&sign_up);
        let fingerprint = key().fingerprint(&sign_up, &person);
        let claims = json!({ "city": "London" }).as_object().unwrap().clone();
        let decision = Decision::new(Outcome::Continue { claims });
        let id = Uuid::from_u128(1);
        SignUpEvent::decided(id, NOW, person, fingerprint, sign_up, decision).unwrap()
    }

    fn confirmed(id: u128, source: ConfirmationSource) -> SignUpEvent {
        SignUpEvent::confirmed(Uuid::from_u128(id), NOW, &accepted(), "object-1", source, &key())
    }

    #[test]
    fn a_confirmed_sign_up_is_the_accepted_one_with_its_account() {
        let (origin, event) = (accepted(), confirmed(2, ConfirmationSource::Token));
        assert_eq!(event.subject(), format!("signups.{}.confirmed", origin.sign_up.connector));
        assert_eq!((&event.person, &event.decision), (&origin.person, &origin.decision));
        assert_eq!(event.sign_up.object_id.as_deref(), Some("object-1"));
        let without = crate::SignUp { object_id: None, ..event.sign_up.clone() };
        assert_eq!(without, origin.sign_up);
        let json = serde_json::to_value(&event).unwrap();
        assert_eq!(json["data"]["confirmation"], json!({ "of": origin.id, "source": "token" }));
        assert_eq!(serde_json::from_value::<SignUpEvent>(json).unwrap(), event);
    }

    #[test]
    fn a_sign_up_given_up_has_no_account() {
        let event = SignUpEvent::given_up(Uuid::from_u128(2), NOW, &accepted(), &key());
        assert_eq!((event.kind, event.sign_up.object_id), (Kind::Abandoned, None));
        assert_eq!(event.confirmation, Some(Confirmation { of: accepted().id, source: None }));
    }

    #[test]
    fn a_sign_up_has_one_fingerprint_of_its_outcome_whatever_that_is() {
        let of = |event: SignUpEvent| event.fingerprint;
        let one = of(confirmed(2, ConfirmationSource::Token));
        assert_eq!(one, of(confirmed(3, ConfirmationSource::Directory)));
        assert_eq!(one, of(SignUpEvent::given_up(Uuid::from_u128(4), NOW, &accepted(), &key())));
        assert_ne!(one, accepted().fingerprint);
        let other = SignUpEvent { id: Uuid::from_u128(9), ..accepted() };
        assert_ne!(one, of(SignUpEvent::given_up(Uuid::from_u128(4), NOW, &other, &key())));
        let request = SignUpEvent::expired(Uuid::from_u128(5), NOW, &accepted(), &key());
        assert_ne!(one, of(request), "an approved event is not the request it came of");
    }

    #[test]
    fn a_source_is_read_as_it_is_written() {
        for source in ConfirmationSource::ALL {
            assert_eq!(source.as_str().parse(), Ok(source));
            assert_eq!(serde_json::to_value(source).unwrap(), source.as_str());
        }
        assert_eq!("guess".parse::<ConfirmationSource>(), Err(UnknownSource));
    }
}
