//! Keyed hashes: who a person is without saying so, and which call repeats which.

use std::fmt;

use data_encoding::HEXLOWER;
use hmac::{Hmac, KeyInit, Mac};
use schemars::JsonSchema;
use secrecy::{ExposeSecret, SecretBox};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::Sha256;
use uuid::Uuid;

use crate::{Email, Identity, SignUp};

type HmacSha256 = Hmac<Sha256>;

/// A stable pseudonym of whoever signs up: 32 hexadecimal digits.
#[derive(
    Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema,
)]
#[serde(transparent)]
pub struct Person(String);

impl Person {
    /// A pseudonym that was made earlier, as it is read back from a store or a command line.
    #[must_use]
    pub fn from_pseudonym(pseudonym: impl Into<String>) -> Self {
        Self(pseudonym.into())
    }

    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Person {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The derived idempotency key of a call; platforms send none (contract 1.2).
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Fingerprint([u8; 16]);

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&HEXLOWER.encode(&self.0))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Fingerprint({self})")
    }
}

impl Serialize for Fingerprint {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Fingerprint {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        HEXLOWER
            .decode(text.as_bytes())
            .ok()
            .and_then(|bytes| bytes.try_into().ok())
            .map(Self)
            .ok_or_else(|| serde::de::Error::custom("a fingerprint is 32 hexadecimal digits"))
    }
}

/// The key of all pseudonyms and fingerprints of an installation.
///
/// Every process that answers for the same organisation needs the same key: it is what makes a
/// repeated call recognisable, and what keeps a pseudonym from being guessed from an address.
pub struct PseudonymKey {
    /// Already keyed: cloning the state is cheaper than hashing the key again for each call.
    hmac: HmacSha256,
    // Kept so that dropping the key wipes it.
    _key: SecretBox<Vec<u8>>,
}

impl fmt::Debug for PseudonymKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PseudonymKey(…)")
    }
}

impl PseudonymKey {
    /// Any length works; 32 random bytes are right.
    #[must_use]
    pub fn new(key: Vec<u8>) -> Self {
        let key = SecretBox::new(Box::new(key));
        let hmac = HmacSha256::new_from_slice(key.expose_secret())
            .expect("HMAC takes a key of any length");
        Self { hmac, _key: key }
    }

    /// Who this is: the address without regard to case, else the first identity, else the claims.
    ///
    /// The address comes first because it is the one thing that both sign-up steps carry for every
    /// kind of account (contract 1.2).
    #[must_use]
    pub fn person(&self, sign_up: &SignUp) -> Person {
        if let Some(email) = &sign_up.email {
            return self.person_with_email(email);
        }
        if let Some(identity) = sign_up.identities.iter().min() {
            return self.person_with_identity(identity);
        }
        let mut hash = Canonical(self.hmac.clone());
        hash.text("person");
        hash.text("claims");
        hash.object(&sign_up.claims);
        Person(HEXLOWER.encode(&hash.finish()))
    }

    /// Who signs up with this address.
    #[must_use]
    pub fn person_with_email(&self, email: &Email) -> Person {
        let mut hash = Canonical(self.hmac.clone());
        hash.text("person");
        hash.text("email");
        hash.text(&email.expose().trim().to_lowercase());
        Person(HEXLOWER.encode(&hash.finish()))
    }

    /// Who signs up with this identity, and without an address.
    #[must_use]
    pub fn person_with_identity(&self, identity: &Identity) -> Person {
        let mut hash = Canonical(self.hmac.clone());
        hash.text("person");
        hash.text("identity");
        hash.text(&identity.issuer);
        hash.text(&identity.issuer_assigned_id);
        Person(HEXLOWER.encode(&hash.finish()))
    }

    /// Which call this is. Two calls with the same fingerprint are one call, repeated.
    #[must_use]
    pub fn fingerprint(&self, sign_up: &SignUp, person: &Person) -> Fingerprint {
        let mut hash = Canonical(self.hmac.clone());
        hash.text("call");
        hash.text(sign_up.connector.as_str());
        hash.text(sign_up.step.as_str());
        hash.optional(sign_up.client.as_deref());
        hash.text(person.as_str());
        hash.optional(sign_up.correlation_id.as_deref());
        let mut identities: Vec<_> = sign_up.identities.iter().collect();
        identities.sort_unstable();
        for identity in identities {
            hash.text(&identity.sign_in_type);
            hash.text(&identity.issuer);
            hash.text(&identity.issuer_assigned_id);
        }
        hash.object(&sign_up.claims);
        Fingerprint(hash.finish())
    }

    /// Which decision about a request for approval this is: there is one for each request.
    pub(crate) fn fingerprint_of_request(&self, request: Uuid) -> Fingerprint {
        let mut hash = Canonical(self.hmac.clone());
        hash.text("request");
        hash.0.update(request.as_bytes());
        Fingerprint(hash.finish())
    }

    /// Which outcome of a sign-up that was let past this is: there is one for each.
    pub(crate) fn fingerprint_of_confirmation(&self, origin: Uuid) -> Fingerprint {
        let mut hash = Canonical(self.hmac.clone());
        hash.text("confirmation");
        hash.0.update(origin.as_bytes());
        Fingerprint(hash.finish())
    }

    /// A key of its own for another purpose, named by `label`.
    #[must_use]
    pub fn derive(&self, label: &str) -> [u8; 32] {
        let mut hash = Canonical(self.hmac.clone());
        hash.text("key");
        hash.text(label);
        hash.0.finalize().into_bytes().into()
    }
}

/// Feeds values to the hash so that no two different values feed the same bytes.
struct Canonical(HmacSha256);

impl Canonical {
    fn finish(self) -> [u8; 16] {
        let digest = self.0.finalize().into_bytes();
        digest[..16].try_into().expect("SHA-256 has 32 bytes")
    }

    fn text(&mut self, text: &str) {
        self.0.update(&(text.len() as u64).to_be_bytes());
        self.0.update(text.as_bytes());
    }

    fn optional(&mut self, text: Option<&str>) {
        self.0.update(&[u8::from(text.is_some())]);
        self.text(text.unwrap_or_default());
    }

    /// Keys in sorted order: the order in which a platform wrote them says nothing.
    fn object(&mut self, object: &serde_json::Map<String, Value>) {
        let mut entries: Vec<_> = object.iter().collect();
        entries.sort_unstable_by_key(|(key, _)| *key);
        self.0.update(b"{");
        for (key, value) in entries {
            self.text(key);
            self.value(value);
        }
        self.0.update(b"}");
    }

    fn value(&mut self, value: &Value) {
        match value {
            Value::Null => self.0.update(b"n"),
            Value::Bool(true) => self.0.update(b"t"),
            Value::Bool(false) => self.0.update(b"f"),
            Value::Number(number) => {
                self.0.update(b"#");
                self.text(&number.to_string());
            }
            Value::String(text) => {
                self.0.update(b"\"");
                self.text(text);
            }
            Value::Array(items) => {
                self.0.update(b"[");
                items.iter().for_each(|item| self.value(item));
                self.0.update(b"]");
            }
            Value::Object(object) => self.object(object),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::{Email, Identity, Protocol, Step};

    fn key() -> PseudonymKey {
        PseudonymKey::new(vec![7; 32])
    }

    fn sign_up() -> SignUp {
        SignUp {
            connector: "partners".parse().unwrap(),
            protocol: Protocol::ApiConnector,
            step: Step::BeforeCreate,
            email: Some(Email::new("Ada@Example.com")),
            identities: vec![],
            claims: json!({ "city": "London", "tags": ["a", { "b": 1, "c": null }] })
                .as_object()
                .unwrap()
                .clone(),
            client: None,
            locale: None,
            ip: None,
            object_id: None,
            correlation_id: None,
        }
    }

    fn fingerprint(sign_up: &SignUp) -> Fingerprint {
        key().fingerprint(sign_up, &key().person(sign_up))
    }

    #[test]
    fn a_person_is_the_address_whatever_its_case() {
        let mut other = sign_up();
        other.email = Some(Email::new(" ada@example.COM"));
        assert_eq!(key().person(&sign_up()), key().person(&other));
        other.email = Some(Email::new("eve@example.com"));
        assert_ne!(key().person(&sign_up()), key().person(&other));
    }

    #[test]
    fn without_an_address_a_person_is_their_first_identity() {
        let identity = |issuer: &str| Identity {
            sign_in_type: "federated".into(),
            issuer: issuer.into(),
            issuer_assigned_id: "1".into(),
        };
        let mut one = sign_up();
        one.email = None;
        one.identities = vec![identity("google.com"), identity("facebook.com")];
        let mut other = one.clone();
        other.identities.reverse();
        assert_eq!(key().person(&one), key().person(&other));
        other.identities.remove(0);
        assert_ne!(key().person(&one), key().person(&other));
    }

    #[test]
    fn another_key_gives_another_pseudonym() {
        let other = PseudonymKey::new(vec![8; 32]);
        assert_ne!(key().person(&sign_up()), other.person(&sign_up()));
    }

    #[test]
    fn every_part_of_a_call_counts_but_the_language() {
        let changes: [fn(&mut SignUp); 6] = [
            |it| it.connector = "other".parse().unwrap(),
            |it| it.step = Step::AfterFederation,
            |it| it.client = Some(String::new()),
            |it| it.correlation_id = Some("1".into()),
            |it| it.email = None,
            |it| drop(it.claims.insert("city".into(), json!("Paris"))),
        ];
        for (index, change) in changes.iter().enumerate() {
            let mut changed = sign_up();
            change(&mut changed);
            assert_ne!(fingerprint(&sign_up()), fingerprint(&changed), "change {index}");
        }
        let mut same = sign_up();
        same.locale = Some("fr-FR".into());
        assert_eq!(fingerprint(&sign_up()), fingerprint(&same));
    }

    proptest::proptest! {
        #[test]
        fn moving_text_from_one_claim_to_the_next_is_a_change(a in ".{1,4}", b in ".{0,4}") {
            let with = |x: &str, y: &str| {
                let mut it = sign_up();
                it.claims = json!({ "x": x, "y": y }).as_object().unwrap().clone();
                fingerprint(&it)
            };
            proptest::prop_assert_ne!(with(&a, &b), with("", &format!("{a}{b}")));
        }
    }
}
