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
}
