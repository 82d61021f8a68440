//! The public keys of an issuer, and whether one of them made a signature.

use std::collections::HashMap;

use data_encoding::BASE64URL_NOPAD;
use ring::signature::{
    ECDSA_P256_SHA256_FIXED, RSA_PKCS1_2048_8192_SHA256, RSA_PKCS1_2048_8192_SHA384,
    RSA_PKCS1_2048_8192_SHA512, RSA_PSS_2048_8192_SHA256, RSA_PSS_2048_8192_SHA384,
    RSA_PSS_2048_8192_SHA512, RsaParameters, RsaPublicKeyComponents, UnparsedPublicKey,
};
use serde::Deserialize;
use serde_json::Value;

use super::{
    super::Denied,
    token::{Algorithm, Token},
};

/// By their ids; never empty.
#[derive(Debug)]
pub(super) struct Keys(HashMap<String, Key>);

#[derive(Debug)]
struct Key {
    public: PublicKey,
    /// The only algorithm it is for, if its issuer says so.
    only: Option<Algorithm>,
}

#[derive(Debug)]
enum PublicKey {
    Rsa {
        modulus: Vec<u8>,
        exponent: Vec<u8>,
    },
    /// An uncompressed point.
    P256(Vec<u8>),
}

#[derive(Deserialize)]
struct KeySet {
    keys: Vec<Value>,
}

#[derive(Deserialize)]
struct PublishedKey {
    kty: String,
    kid: String,
    #[serde(rename = "use")]
    usage: Option<String>,
    alg: Option<String>,
    n: Option<String>,
    e: Option<String>,
    crv: Option<String>,
    x: Option<String>,
    y: Option<String>,
}

/// Entra publishes about ten.
const KEYS_MAX: usize = 200;

impl Keys {
    /// The usable keys of a set, or None if there are none: those of kinds we do not know are for
    /// somebody else.
    pub(super) fn read(set: &[u8]) -> Option<Self> {
        let set: KeySet = serde_json::from_slice(set).ok()?;
        let mut keys = HashMap::new();
        for key in set.keys.into_iter().take(KEYS_MAX) {
            let Ok(published) = serde_json::from_value::<PublishedKey>(key) else { continue };
            if let Some(key) = Key::read(&published) {
                keys.entry(published.kid).or_insert(key);
            }
        }
        (!keys.is_empty()).then_some(Self(keys))
    }

    /// Whether one of the keys made the token's signature.
    pub(super) fn check(&self, token: &Token<'_>) -> Result<(), Denied> {
        let key = self.0.get(&token.key_id).ok_or(Denied::TokenKeyUnknown)?;
        if key.only.is_some_and(|only| only != token.algorithm) {
            return Err(Denied::TokenAlgorithm);
        }
        // The key says what kind of signature it makes; the token has no say in it.
        let holds = match (&key.public, rsa(token.algorithm)) {
            (PublicKey::Rsa { modulus, exponent }, Some(parameters)) => {
                RsaPublicKeyComponents { n: modulus, e: exponent }.verify(
                    parameters,
                    token.signed,
                    &token.signature,
                )
            }
            (PublicKey::P256(point), None) => {
                UnparsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, point)
                    .verify(token.signed, &token.signature)
            }
            _ => return Err(Denied::TokenAlgorithm),
        };
        holds.map_err(|_| Denied::TokenSignature)
    }
}

impl Key {
    fn read(published: &PublishedKey) -> Option<Self> {
        if published.usage.as_ref().is_some_and(|it| it != "sig") {
            return None;
        }
        let only = match &published.alg {
            Some(name) => Some(Algorithm::named(name)?),
            None => None,
        };
        let number = |text: &Option<String>| BASE64URL_NOPAD.decode(text.as_ref()?.as_bytes()).ok();
        let public = match published.kty.as_str() {
            "RSA" => {
                // Some write a zero in front, as ASN.1 does; the verification takes none.
                let trimmed = |text| {
                    let number: Vec<u8> = number(text)?;
                    let zeros = number.iter().take_while(|byte| **byte == 0).count();
                    Some(number[zeros..].to_vec())
                };
                let (modulus, exponent) = (trimmed(&published.n)?, trimmed(&published.e)?);
                // Others would be refused at every call.
                if !(256..=1024).contains(&modulus.len()) {
                    return None;
                }
                PublicKey::Rsa { modulus, exponent }
            }
            "EC" if published.crv.as_deref() == Some("P-256") => {
                let (x, y) = (number(&published.x)?, number(&published.y)?);
                if x.len() != 32 || y.len() != 32 {
                    return None;
                }
                PublicKey::P256([&[4][..], &x, &y].concat())
            }
            _ => return None,
        };
        Some(Self { public, only })
    }
}

fn rsa(algorithm: Algorithm) -> Option<&'static RsaParameters> {
    match algorithm {
        Algorithm::Rs256 => Some(&RSA_PKCS1_2048_8192_SHA256),
        Algorithm::Rs384 => Some(&RSA_PKCS1_2048_8192_SHA384),
        Algorithm::Rs512 => Some(&RSA_PKCS1_2048_8192_SHA512),
        Algorithm::Ps256 => Some(&RSA_PSS_2048_8192_SHA256),
        Algorithm::Ps384 => Some(&RSA_PSS_2048_8192_SHA384),
        Algorithm::Ps512 => Some(&RSA_PSS_2048_8192_SHA512),
        Algorithm::Es256 => None,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn ids(keys: &Value) -> Vec<String> {
        let set = json!({ "keys": keys }).to_string();
        let mut ids: Vec<_> =
            Keys::read(set.as_bytes()).map(|it| it.0.into_keys().collect()).unwrap_or_default();
        ids.sort();
        ids
    }

    #[test]
    fn keys_of_no_use_are_passed_over() {
        let number = |bytes| BASE64URL_NOPAD.encode(&vec![1; bytes]);
        let rsa =
            |kid: &str, bytes| json!({ "kty": "RSA", "kid": kid, "n": number(bytes), "e": "AQAB" });
        let with = |mut key: Value, name: &str, value: &str| {
            key[name] = json!(value);
            key
        };
        let ec =
            json!({ "kty": "EC", "kid": "ec", "crv": "P-256", "x": number(32), "y": number(32) });
        let found = ids(&json!([
            rsa("plain", 256),
            rsa("short", 128),
            rsa("long", 1025),
            with(rsa("signing", 256), "use", "sig"),
            with(rsa("encrypting", 256), "use", "enc"),
            with(rsa("algorithm", 256), "alg", "RS256"),
            with(rsa("secret", 256), "alg", "HS256"),
            with(rsa("broken", 256), "n", "*"),
            { "kty": "oct", "kid": "oct", "k": "c2VjcmV0" },
            { "kty": "RSA", "n": number(256), "e": "AQAB" },
            ec.clone(),
            with(with(ec.clone(), "kid", "ec-short"), "x", "AQ"),
            with(with(ec, "kid", "ec-other"), "crv", "P-384"),
            1,
        ]));
        assert_eq!(found, ["algorithm", "ec", "plain", "signing"]);
    }

    #[test]
    fn a_set_without_a_usable_key_is_none() {
        for set in ["", "[]", "{}", r#"{"keys":{}}"#, r#"{"keys":[]}"#, r#"{"keys":[{}]}"#] {
            assert!(Keys::read(set.as_bytes()).is_none(), "{set}");
        }
    }

    /// Made by OpenSSL, of whose keys these are the public halves.
    const MODULUS: &str = "pX5SF6UYKy8BdYymDFv7ifyLDQTw83yKAbXF4vJkAU92WAhrxc633pPJJoUdY7YiTmCBj_2ntojcght3T9iz\
         IVlu4MwP8-uy5p72iNslFn5DtsuhDeD4RWu-FTgEJ1pRMskha1gdVjmCoVhtUWppSmjB5jGdvlWje9Gl8yFM\
         t1vIp1dC5gk1KnDf1Dirx7I7-vAs2gMP1KKbup7dSQ2OD1q3ew_Ziooef-00GmePxPxW6ipW9EnBFZyCaH1b\
         ye_tyqolnoyBrFQzuQ-orttFA3g3HXxQ5uLeyDXHEZ-0ZG5_hoUHi4o2uvy41jv9F5cp1P0DPwXdMqoUXcnV\
         WjXWBQ";
    const POINT: [&str; 2] = [
        "jS-w2qZX1349ItZGRrhp-yOzVVbU-Jw_EpRwHX4XUR4",
        "ckiUfpSgDDpXzXFO93YL_lYsAId056x31hI1r8L5UtU",
    ];
    const RS256: &str = "eyJhbGciOiJSUzI1NiIsImtpZCI6IjEifQ.eyJ0aWQiOiJ0In0.QNoZYEEPQ-eKJR0gX8jp9oIqFzWcBjTi_\
         LOp9AwWnqZZZbZyl_JU7MRTBwft2JIb4Uc1osg1N3lblvb2Et7fBxXgass1a6mOA0_ocA-WdTMH024QpFAul\
         Scwri8rUP4IjewDFZUuAIgT9twuW1o0gBAlHlvPRQLZ5IFDXrSeygCs8nmKt2DiNCaksdn35rXrvqbtFqTNU\
         DTPLZPQGcR48Y3-Jwk5ZXoqRkrHccd-ZdVGEPgwfKaMEBqquvQCOWGMkpv88ftyB4QNKAE-NCWYkNwFiBhYI\
         GktvKk5HvUo9uDTzn3f2VOJiem1aDOXatGNygO_xEP1Y0gZOPJcRjuanA";
    const PS256: &str = "eyJhbGciOiJQUzI1NiIsImtpZCI6IjEifQ.eyJ0aWQiOiJ0In0.JGtu0_fkicqENTCSJN_vFgcj3k02n8CGE\
         6Lp-sMU7sqkx4tdOXgJ1KP11wfk22xDzAFMnRwf1YwTcVj6H3KC7RdFvDzdpoUfP7nfLWc6VHgMLXVqhXszN\
         ZWqxOTZI5RKuDEI0CHtGUB4-lbrFLxl0740kCFIDaYMeQQ-ZB3b0oi3t5Xu8K8l7q4qL3H3DjQnVm6eEQ--n\
         qAALvpRVdFHMjNX4G9sicZbItMjxWph-mHN7g4Wz5N-ZA-4N8q34m7JQ84m7ZZqDigx7GyEFUl8uxcrIDFU5\
         awjUEDyY-zuxIrFwywlNjjbf44T6N8k5HjcjTn8MSWOrcwokfv3xfYl3w";
    const ES256: &str = "eyJhbGciOiJFUzI1NiIsImtpZCI6IjIifQ.eyJ0aWQiOiJ0In0.FqJDJy6bfZGzV6OE2rRVOsLud7oAf8htW\
         9AExUFHkwzJAZ82knBb0Zqpv8IoJ7cUu1Snktu1tVDCjUPbXF9XxA";

    fn published() -> Keys {
        let (rsa, [x, y]) = (MODULUS, POINT);
        let set = json!({ "keys": [
            { "kty": "RSA", "kid": "1", "n": rsa, "e": "AQAB" },
            { "kty": "EC", "kid": "2", "crv": "P-256", "x": x, "y": y },
        ]});
        Keys::read(set.to_string().as_bytes()).unwrap()
    }

    fn check(token: &str) -> Result<(), Denied> {
        published().check(&Token::read(token.as_bytes())?)
    }

    #[test]
    fn what_another_library_signed_is_verified() {
        for token in [RS256, PS256, ES256] {
            assert_eq!(check(token), Ok(()), "{token}");
        }
    }

    #[test]
    fn no_letter_of_a_token_can_be_another_one() {
        for place in 0..ES256.len() {
            for letter in ["A", "z", "-", "."] {
                let mut token = ES256.to_owned();
                token.replace_range(place..=place, letter);
                assert_eq!(check(&token).is_ok(), token == ES256, "{letter} at {place}");
            }
        }
    }
}
