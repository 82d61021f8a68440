//! A token taken apart, and what its claims must say. No I/O, and no signature yet.

use std::borrow::Cow;

use data_encoding::BASE64URL_NOPAD;
use serde::{Deserialize, de::DeserializeOwned};
use time::OffsetDateTime;

use super::{super::Denied, BearerSettings};

/// A signed token in the compact form, not yet believed.
pub(super) struct Token<'a> {
    pub(super) algorithm: Algorithm,
    pub(super) key_id: String,
    pub(super) claims: Claims,
    /// What the signature is of.
    pub(super) signed: &'a [u8],
    pub(super) signature: Vec<u8>,
}

/// The algorithms with which an issuer signs so that only its public key is needed to verify.
/// Unsigned tokens (`none`) and shared secrets (`HS256`) are none of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Algorithm {
    Rs256,
    Rs384,
    Rs512,
    Ps256,
    Ps384,
    Ps512,
    Es256,
}

/// What is asked of a token, and never believed before its signature holds.
#[derive(Debug, Default, Deserialize)]
pub(super) struct Claims {
    iss: Option<String>,
    aud: Option<Audience>,
    exp: Option<f64>,
    nbf: Option<f64>,
    /// The calling application in tokens of version 2 …
    azp: Option<String>,
    /// … and of version 1.
    appid: Option<String>,
    pub(super) tid: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Audience {
    One(String),
    Several(Vec<String>),
}

#[derive(Deserialize)]
struct Header<'a> {
    #[serde(borrow)]
    alg: Cow<'a, str>,
    kid: Option<String>,
    /// Extensions that a reader must understand, and we know none.
    crit: Option<serde::de::IgnoredAny>,
}

/// Entra's tokens have some 2 KB.
const BYTES_MAX: usize = 16 * 1024;

impl<'a> Token<'a> {
    pub(super) fn read(token: &'a [u8]) -> Result<Self, Denied> {
        if token.len() > BYTES_MAX {
            return Err(Denied::Malformed);
        }
        let mut parts = token.split(|byte| *byte == b'.');
        let (Some(header), Some(claims), Some(signature), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(Denied::Malformed);
        };
        let signed = &token[..header.len() + 1 + claims.len()];
        let header = decode(header)?;
        let Header { alg, kid, crit: None } =
            serde_json::from_slice(&header).map_err(|_| Denied::Malformed)?
        else {
            return Err(Denied::Malformed);
        };
        Ok(Self {
            algorithm: Algorithm::named(&alg).ok_or(Denied::TokenAlgorithm)?,
            key_id: kid.ok_or(Denied::Malformed)?,
            claims: json(&decode(claims)?)?,
            signed,
            signature: decode(signature)?,
        })
    }
}

fn decode(part: &[u8]) -> Result<Vec<u8>, Denied> {
    BASE64URL_NOPAD.decode(part).map_err(|_| Denied::Malformed)
}

fn json<T: DeserializeOwned>(text: &[u8]) -> Result<T, Denied> {
    serde_json::from_slice(text).map_err(|_| Denied::Malformed)
}

impl Algorithm {
    pub(super) fn named(name: &str) -> Option<Self> {
        Some(match name {
            "RS256" => Self::Rs256,
            "RS384" => Self::Rs384,
            "RS512" => Self::Rs512,
            "PS256" => Self::Ps256,
            "PS384" => Self::Ps384,
            "PS512" => Self::Ps512,
            "ES256" => Self::Es256,
            _ => return None,
        })
    }
}

/// What the claims of an accepted token say.
#[derive(Debug)]
pub(super) struct Expected {
    issuers: Vec<String>,
    audiences: Vec<String>,
    callers: Vec<String>,
    tenants: Vec<String>,
    leeway: f64,
}

impl Expected {
    pub(super) fn new(settings: &BearerSettings, issuer: String) -> Self {
        let mut issuers = settings.issuers.clone();
        issuers.push(issuer);
        Self {
            issuers,
            audiences: settings.audiences.clone(),
            callers: settings.callers.clone(),
            tenants: settings.tenants.clone(),
            leeway: settings.leeway.as_secs_f64(),
        }
    }

    /// What is not said is not as expected, save that a token without a beginning has begun.
    pub(super) fn check(&self, claims: &Claims, now: OffsetDateTime) -> Result<(), Denied> {
        let now = now.unix_timestamp() as f64;
        if !claims.iss.as_ref().is_some_and(|it| self.issuers.contains(it)) {
            return Err(Denied::TokenIssuer);
        }
        let for_us = match &claims.aud {
            Some(Audience::One(one)) => self.audiences.contains(one),
            Some(Audience::Several(several)) => {
                several.iter().any(|it| self.audiences.contains(it))
            }
            None => false,
        };
        if !for_us {
            return Err(Denied::TokenAudience);
        }
        // A token says it one way or the other; one that says both must mean the same.
        let mut callers = [&claims.azp, &claims.appid].into_iter().flatten().peekable();
        if callers.peek().is_none() || !callers.all(|it| one_of(&self.callers, it)) {
            return Err(Denied::TokenCaller);
        }
        let tenant_fits = || claims.tid.as_ref().is_some_and(|it| one_of(&self.tenants, it));
        if !self.tenants.is_empty() && !tenant_fits() {
            return Err(Denied::TokenTenant);
        }
        if !claims.exp.is_some_and(|exp| now < exp + self.leeway) {
            return Err(Denied::TokenExpired);
        }
        if claims.nbf.is_some_and(|nbf| now < nbf - self.leeway) {
            return Err(Denied::TokenNotYetValid);
        }
        Ok(())
    }
}

/// Applications and tenants have GUIDs, whose letters have no case.
fn one_of(allowed: &[String], id: &str) -> bool {
    allowed.iter().any(|it| it.eq_ignore_ascii_case(id))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    const NOW: i64 = 1_800_000_000;

    fn check(change: impl Fn(&mut Value)) -> Result<(), Denied> {
        let mut settings = BearerSettings::new(String::new(), vec!["us".to_owned()]);
        settings.issuers = vec!["extra".to_owned()];
        settings.tenants = vec!["T-1".to_owned(), "t-2".to_owned()];
        let expected = Expected::new(&settings, "issuer".to_owned());
        let mut claims = json!({
            "iss": "issuer", "aud": "us", "azp": BearerSettings::MICROSOFT, "tid": "t-1",
            "nbf": NOW - 5, "exp": NOW + 5, "more": [1],
        });
        change(&mut claims);
        let claims = serde_json::from_value(claims).map_err(|_| Denied::Malformed)?;
        expected.check(&claims, OffsetDateTime::from_unix_timestamp(NOW).unwrap())
    }

    fn with(name: &str, value: Value) -> Result<(), Denied> {
        check(|claims| claims[name] = value.clone())
    }

    #[test]
    fn claims_must_say_what_is_expected() {
        assert_eq!(check(|_| {}), Ok(()));
        assert_eq!(with("iss", json!("extra")), Ok(()));
        assert_eq!(with("aud", json!(["them", "us"])), Ok(()));
        assert_eq!(with("tid", json!("T-2")), Ok(()));
        for (claim, denied) in [
            ("iss", Denied::TokenIssuer),
            ("aud", Denied::TokenAudience),
            ("azp", Denied::TokenCaller),
            ("tid", Denied::TokenTenant),
            ("exp", Denied::TokenExpired),
        ] {
            assert_eq!(with(claim, Value::Null), Err(denied), "no {claim}");
            if claim != "exp" {
                assert_eq!(with(claim, json!("other")), Err(denied), "another {claim}");
                assert_eq!(with(claim, json!("")), Err(denied), "an empty {claim}");
            }
        }
        assert_eq!(with("iss", json!("Issuer")), Err(Denied::TokenIssuer));
        assert_eq!(with("aud", json!([])), Err(Denied::TokenAudience));
    }

    #[test]
    fn the_caller_is_named_in_either_claim_and_never_differently() {
        let both = |azp: Value, appid: Value| {
            check(|claims| {
                claims["azp"] = azp.clone();
                claims["appid"] = appid.clone();
            })
        };
        let microsoft = || json!(BearerSettings::MICROSOFT);
        assert_eq!(both(Value::Null, microsoft()), Ok(()));
        assert_eq!(both(microsoft(), microsoft()), Ok(()));
        assert_eq!(both(microsoft(), json!("other")), Err(Denied::TokenCaller));
        assert_eq!(both(json!("other"), microsoft()), Err(Denied::TokenCaller));
    }

    #[test]
    fn clocks_may_differ_by_the_leeway_and_not_more() {
        assert_eq!(with("exp", json!(NOW - 59)), Ok(()));
        assert_eq!(with("exp", json!(NOW - 60)), Err(Denied::TokenExpired));
        assert_eq!(with("nbf", json!(NOW + 60)), Ok(()));
        assert_eq!(with("nbf", json!(NOW + 61)), Err(Denied::TokenNotYetValid));
        assert_eq!(with("nbf", Value::Null), Ok(()));
        assert_eq!(with("exp", json!(NOW as f64 + 0.5)), Ok(()));
    }

    #[test]
    fn claims_of_another_type_are_malformed() {
        for (claim, value) in [
            ("iss", json!(["issuer"])),
            ("aud", json!(1)),
            ("exp", json!("1800000005")),
            ("exp", json!({})),
            ("tid", json!(["t-1"])),
        ] {
            assert_eq!(with(claim, value), Err(Denied::Malformed), "{claim}");
        }
    }

    fn read(header: &Value) -> Result<(), Denied> {
        let part = |it: &Value| BASE64URL_NOPAD.encode(it.to_string().as_bytes());
        let token = format!("{}.{}.", part(header), part(&json!({})));
        Token::read(token.as_bytes()).map(drop)
    }

    #[test]
    fn only_signatures_of_key_pairs_are_read() {
        for alg in ["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256"] {
            assert_eq!(read(&json!({ "alg": alg, "kid": "1" })), Ok(()), "{alg}");
        }
        for alg in ["none", "None", "NONE", "HS256", "HS384", "HS512", "ES384", "EdDSA", "rs256"] {
            let read = read(&json!({ "alg": alg, "kid": "1" }));
            assert_eq!(read, Err(Denied::TokenAlgorithm), "{alg}");
        }
        for header in [
            json!({ "alg": "RS256" }),
            json!({ "kid": "1" }),
            json!({ "alg": "RS256", "kid": 1 }),
            json!({ "alg": "RS256", "kid": "1", "crit": ["b64"], "b64": false }),
            json!([]),
        ] {
            assert_eq!(read(&header), Err(Denied::Malformed), "{header}");
        }
    }

    #[test]
    fn what_is_not_three_parts_of_base64_is_malformed() {
        for token in ["", ".", "..", "a.b", "a.b.c.d", "e30.e30.e30=", "e30.e30. e30", "{}.{}.x"] {
            assert_eq!(Token::read(token.as_bytes()).map(drop), Err(Denied::Malformed), "{token}");
        }
        let long = vec![b'a'; BYTES_MAX + 1];
        assert_eq!(Token::read(&long).map(drop), Err(Denied::Malformed));
    }

    proptest! {
        #[test]
        fn no_token_is_too_much(token in prop::collection::vec(any::<u8>(), 0..100)) {
            let _ = Token::read(&token);
        }

        #[test]
        fn no_content_is_too_much(header in ".{0,40}", claims in ".{0,40}") {
            let part = |it: &str| BASE64URL_NOPAD.encode(it.as_bytes());
            let _ = Token::read(format!("{}.{}.x", part(&header), part(&claims)).as_bytes());
        }
    }
}
