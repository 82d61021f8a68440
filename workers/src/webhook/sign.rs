//! Signatures of Standard Webhooks: what a receiver checks before it believes a message.
//!
//! The message's id, the time of the attempt and the body are signed together, so that none of them
//! can be exchanged and an old message cannot be sent again. Each key makes a signature of its own
//! and a receiver needs one that fits; so a key is replaced without a gap. Pure.

use data_encoding::{BASE64, BASE64_NOPAD};
use reqwest::header::{HeaderName, HeaderValue};
use ring::{
    hmac,
    signature::{Ed25519KeyPair, KeyPair as _},
};
use secrecy::{ExposeSecret, SecretSlice, SecretString};
use time::OffsetDateTime;

pub(crate) const ID: HeaderName = HeaderName::from_static("webhook-id");
pub(crate) const TIMESTAMP: HeaderName = HeaderName::from_static("webhook-timestamp");
pub(crate) const SIGNATURE: HeaderName = HeaderName::from_static("webhook-signature");

/// The keys that sign, in the order of their signatures.
#[derive(Debug)]
pub(crate) struct SigningKeys(Vec<Key>);

#[derive(Debug)]
enum Key {
    /// `whsec_…`: both sides hold it.
    Shared(hmac::Key),
    /// `whsk_…`: receivers hold the public half only.
    Own(Ed25519KeyPair),
}

/// A key that cannot sign: which one, from 1, and why.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("key {number} {fault}")]
pub(crate) struct BadKey {
    number: usize,
    fault: &'static str,
}

impl SigningKeys {
    pub(crate) fn parse(keys: &[SecretString]) -> Result<Self, BadKey> {
        let numbered = (1..).zip(keys);
        let parsed = numbered.map(|(number, key)| {
            Key::parse(key.expose_secret()).map_err(|fault| BadKey { number, fault })
        });
        parsed.collect::<Result<_, _>>().map(Self)
    }

    /// The three headers of a message. `id` stays the same in all attempts and holds no full stop,
    /// which is what separates it from the rest; `at` is when this attempt is made.
    pub(crate) fn headers(
        &self,
        id: &HeaderValue,
        at: OffsetDateTime,
        body: &[u8],
    ) -> [(HeaderName, HeaderValue); 3] {
        let seconds = at.unix_timestamp();
        let signature = HeaderValue::try_from(self.sign(id.as_bytes(), seconds, body))
            .expect("Base64 can stand in a header");
        [(ID, id.clone()), (TIMESTAMP, seconds.into()), (SIGNATURE, signature)]
    }

    /// What receivers need to check the signatures of our own keys: `whpk_…`.
    pub(crate) fn public_keys(&self) -> impl Iterator<Item = String> {
        self.0.iter().filter_map(|key| match key {
            Key::Shared(_) => None,
            Key::Own(pair) => Some(format!("whpk_{}", BASE64.encode(pair.public_key().as_ref()))),
        })
    }

    fn sign(&self, id: &[u8], seconds: i64, body: &[u8]) -> String {
        let signed = [id, b".", seconds.to_string().as_bytes(), b".", body].concat();
        let signatures: Vec<_> = self.0.iter().map(|key| key.sign(&signed)).collect();
        signatures.join(" ")
    }
}

impl Key {
    fn parse(text: &str) -> Result<Self, &'static str> {
        const SHAPE: &str = "must be whsec_… (shared) or whsk_… (Ed25519), in Base64";
        let (prefix, encoded) = text.trim().split_once('_').ok_or(SHAPE)?;
        // Some tools write the padding, others do not.
        let decoded = BASE64_NOPAD.decode(encoded.trim_end_matches('=').as_bytes());
        let bytes = SecretSlice::from(decoded.map_err(|_| SHAPE)?);
        let bytes = bytes.expose_secret();
        let pair = match (prefix, bytes.len()) {
            ("whsec", 24..=64) => {
                return Ok(Self::Shared(hmac::Key::new(hmac::HMAC_SHA256, bytes)));
            }
            ("whsec", _) => return Err("must hold 24 to 64 bytes; take 32 random ones"),
            ("whsk", 32) => Ed25519KeyPair::from_seed_unchecked(bytes),
            // Some tools write the public half behind it.
            ("whsk", 64) => Ed25519KeyPair::from_seed_and_public_key(&bytes[..32], &bytes[32..]),
            ("whsk", _) => return Err("must hold 32 bytes, or 64 with the public half"),
            ("whpk", _) => return Err("is a public key; what signs is the secret one, whsk_…"),
            _ => return Err(SHAPE),
        };
        pair.map(Self::Own).map_err(|_| "holds a public half that is not of its secret one")
    }

    fn sign(&self, signed: &[u8]) -> String {
        match self {
            Self::Shared(key) => format!("v1,{}", BASE64.encode(hmac::sign(key, signed).as_ref())),
            Self::Own(pair) => format!("v1a,{}", BASE64.encode(pair.sign(signed).as_ref())),
        }
    }
}

#[cfg(test)]
mod tests {
    use ring::signature::{ED25519, UnparsedPublicKey};

    use super::*;

    // What the reference libraries of Standard Webhooks check themselves with.
    const ID: &str = "msg_p5jXN8AQM9LWM0D4loKWxJek";
    const SECONDS: i64 = 1_614_265_330;
    const BODY: &[u8] = br#"{"test": 2432232314}"#;
    const SHARED: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
    const SHARED_SIGNATURE: &str = "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=";
    const OWN: &str = "whsk_VEVTVFNJR05JTkdLRVlET05PVFVTRVRISVNGT1JBTlk=";
    const OWN_SIGNATURE: &str = "v1a,tQ9V2XOqn7jL/DQenEFpqIugdBVtiMmER5mhSkXBNwM0mkATuDe6KYYUuxqtaiHeYGb7KaaBRdM5WqyeFiL8Ag==";

    fn keys(keys: &[&str]) -> Result<SigningKeys, BadKey> {
        let keys: Vec<_> = keys.iter().map(|key| SecretString::from(*key)).collect();
        SigningKeys::parse(&keys)
    }

    fn signed(with: &[&str]) -> String {
        keys(with).unwrap().sign(ID.as_bytes(), SECONDS, BODY)
    }

    #[test]
    fn the_official_vectors_pass() {
        assert_eq!(signed(&[SHARED]), SHARED_SIGNATURE);
        assert_eq!(signed(&[OWN]), OWN_SIGNATURE);
    }

    #[test]
    fn each_key_signs_so_that_one_can_be_replaced() {
        assert_eq!(signed(&[SHARED, OWN]), format!("{SHARED_SIGNATURE} {OWN_SIGNATURE}"));
        assert_eq!(signed(&[OWN, SHARED]), format!("{OWN_SIGNATURE} {SHARED_SIGNATURE}"));
        let other = format!("whsec_{}", BASE64.encode(&[7; 64]));
        let signatures = signed(&[&other, SHARED]);
        assert!(
            !signatures.starts_with(SHARED_SIGNATURE) && signatures.ends_with(SHARED_SIGNATURE)
        );
    }

    #[test]
    fn the_public_key_checks_what_the_secret_one_signed() {
        let keys = keys(&[SHARED, OWN]).unwrap();
        let public: Vec<_> = keys.public_keys().collect();
        let [public] = &public[..] else { panic!("{public:?}") };
        let public = BASE64.decode(public.strip_prefix("whpk_").unwrap().as_bytes()).unwrap();
        let signature = BASE64.decode(OWN_SIGNATURE.strip_prefix("v1a,").unwrap().as_bytes());
        let signed = format!("{ID}.{SECONDS}.{}", str::from_utf8(BODY).unwrap());
        let public = UnparsedPublicKey::new(&ED25519, public);
        public.verify(signed.as_bytes(), &signature.unwrap()).unwrap();
    }

    #[test]
    fn the_headers_carry_what_was_signed() {
        let at = OffsetDateTime::from_unix_timestamp(SECONDS).unwrap();
        let id = HeaderValue::from_static(ID);
        let headers = keys(&[SHARED]).unwrap().headers(&id, at, BODY);
        let headers = headers.each_ref().map(|(name, value)| (name.as_str(), value.as_bytes()));
        assert_eq!(
            headers,
            [
                ("webhook-id", ID.as_bytes()),
                ("webhook-timestamp", b"1614265330"),
                ("webhook-signature", SHARED_SIGNATURE.as_bytes()),
            ]
        );
    }

    #[test]
    fn what_cannot_sign_is_refused_without_being_shown() {
        let of =
            |prefix: &str, bytes: usize| format!("{prefix}_{}", BASE64.encode(&vec![7; bytes]));
        for good in [of("whsec", 24), of("whsec", 64), of("whsk", 32)] {
            assert!(keys(&[&good]).is_ok(), "{good}");
            assert!(keys(&[good.trim_end_matches('=')]).is_ok(), "without padding: {good}");
        }
        let pair = keys(&[OWN]).unwrap();
        let public = pair.public_keys().next().unwrap();
        let half = |text: &str| BASE64.decode(text.split_once('_').unwrap().1.as_bytes()).unwrap();
        let both = format!("whsk_{}", BASE64.encode(&[half(OWN), half(&public)].concat()));
        assert_eq!(signed(&[&both]), OWN_SIGNATURE);

        for (bad, why) in [
            (of("whsec", 23), "24 to 64"),
            (of("whsec", 65), "24 to 64"),
            (of("whsk", 31), "32 bytes"),
            (of("whsk", 64), "public half"),
            (public, "public key"),
            ("whsec_ümlaut".into(), "Base64"),
            ("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw".into(), "whsec_"),
            (String::new(), "whsec_"),
        ] {
            let fault = keys(&[SHARED, &bad]).unwrap_err().to_string();
            assert!(fault.starts_with("key 2 ") && fault.contains(why), "{bad}: {fault}");
            let secret = bad.split_once('_').map_or(&*bad, |(_, secret)| secret);
            assert!(secret.is_empty() || !fault.contains(secret), "{fault}");
        }
        assert!(!format!("{:?}", keys(&[SHARED, OWN])).contains("MfKQ"));
    }
}
