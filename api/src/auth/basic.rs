//! HTTP Basic with several valid pairs at once.
//!
//! How long a comparison takes says nothing about how much of a guess was right, nor about which
//! or how many credentials there are to match: digests of one length are compared, all of them,
//! every time.

use axum::http::{HeaderMap, header};
use data_encoding::BASE64;
use secrecy::{ExposeSecret, SecretString};
use sha2::{Digest, Sha256};
use subtle::{Choice, ConditionallySelectable, ConstantTimeEq};

/// One valid pair of user and password.
#[derive(Clone, Debug)]
pub struct BasicCredential {
    /// What metrics call it, so that one can see the old password fall silent. Not secret.
    pub name: String,
    /// Without a colon: on the wire the first one ends the user.
    pub user: String,
    pub password: SecretString,
}

/// The credentials of a connector, ready to compare.
pub(crate) struct BasicCredentials(Vec<[u8; 32]>);

/// Why a call was not let in. The caller is told none of this.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Denied {
    /// No `Authorization` at all: often a probe, or a connector set up without credentials.
    Missing,
    /// Not the Basic scheme, not base64, or no colon in it.
    Malformed,
    /// Well-formed and not one of ours.
    Wrong,
}

impl BasicCredentials {
    pub(crate) fn new(credentials: &[BasicCredential]) -> Self {
        Self(
            credentials
                .iter()
                .map(|it| digest(it.user.as_bytes(), it.password.expose_secret().as_bytes()))
                .collect(),
        )
    }

    /// Which credential the call carries: its place in the list.
    pub(crate) fn authenticate(&self, headers: &HeaderMap) -> Result<usize, Denied> {
        let mut values = headers.get_all(header::AUTHORIZATION).iter();
        let value = values.next().ok_or(Denied::Missing)?;
        if values.next().is_some() {
            return Err(Denied::Malformed);
        }
        let (user, password) = decode(value.as_bytes()).ok_or(Denied::Malformed)?;
        self.find(&digest(&user, &password)).ok_or(Denied::Wrong)
    }

    fn find(&self, presented: &[u8; 32]) -> Option<usize> {
        let mut found = Choice::from(0);
        let mut place = 0_u64;
        for (index, valid) in (0_u64..).zip(&self.0) {
            let equal = valid.ct_eq(presented);
            place.conditional_assign(&index, equal);
            found |= equal;
        }
        bool::from(found).then_some(place as usize)
    }
}

/// User and password of `Basic <base64>`; the first colon ends the user (RFC 7617), so a password
/// may hold more of them.
fn decode(value: &[u8]) -> Option<(Vec<u8>, Vec<u8>)> {
    const SCHEME: &[u8] = b"basic ";
    let (scheme, encoded) = value.split_at_checked(SCHEME.len())?;
    if !scheme.eq_ignore_ascii_case(SCHEME) {
        return None;
    }
    let mut user = BASE64.decode(encoded.trim_ascii()).ok()?;
    let colon = user.iter().position(|byte| *byte == b':')?;
    let password = user.split_off(colon + 1);
    user.truncate(colon);
    Some((user, password))
}

/// Of one length whatever it is made from, and unlike for any two different pairs.
fn digest(user: &[u8], password: &[u8]) -> [u8; 32] {
    let mut hash = Sha256::new();
    hash.update((user.len() as u64).to_be_bytes());
    hash.update(user);
    hash.update(password);
    hash.finalize().into()
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;

    use super::*;

    fn credentials() -> BasicCredentials {
        let credential = |name: &str, user: &str, password: &str| BasicCredential {
            name: name.into(),
            user: user.into(),
            password: password.into(),
        };
        BasicCredentials::new(&[
            credential("old", "entra", "try-me"),
            credential("new", "entra", "a:b:c"),
            credential("umlaut", "jürgen", "geheim ü"),
            credential("empty", "nobody", ""),
        ])
    }

    fn authenticate(value: &[u8]) -> Result<usize, Denied> {
        let mut headers = HeaderMap::new();
        headers.insert(header::AUTHORIZATION, HeaderValue::from_bytes(value).unwrap());
        credentials().authenticate(&headers)
    }

    fn basic(pair: &str) -> Result<usize, Denied> {
        authenticate(format!("Basic {}", BASE64.encode(pair.as_bytes())).as_bytes())
    }

    #[test]
    fn every_configured_pair_is_valid_at_the_same_time() {
        assert_eq!(basic("entra:try-me"), Ok(0));
        assert_eq!(basic("entra:a:b:c"), Ok(1), "a password may hold colons");
        assert_eq!(basic("jürgen:geheim ü"), Ok(2), "UTF-8, as the challenge announces");
        assert_eq!(basic("nobody:"), Ok(3));
    }

    #[test]
    fn what_is_not_a_configured_pair_is_wrong() {
        for pair in [
            "entra:try-me ",
            "entra:try-m",
            "Entra:try-me",
            "entra:",
            ":try-me",
            ":",
            "entra:a",
            "entra:a:b",
            "entra:a:b:c:",
            "nobody: ",
            "entr:atry-me",
            "entra::try-me",
        ] {
            assert_eq!(basic(pair), Err(Denied::Wrong), "{pair:?}");
        }
    }

    #[test]
    fn what_is_not_basic_is_malformed() {
        let pair = BASE64.encode(b"entra:try-me");
        for value in [
            "",
            "Basic",
            "Basic ",
            "Bearer x",
            "Basic ****",
            "Basic ZW50cmE=",
            &pair,
            &format!("Basic{pair}"),
            &format!("Basic {pair}=="),
            &format!("Basic {pair} x"),
        ] {
            assert_eq!(authenticate(value.as_bytes()), Err(Denied::Malformed), "{value:?}");
        }
        assert_eq!(authenticate(b"Basic \xff\xfe"), Err(Denied::Malformed));
    }

    #[test]
    fn the_scheme_has_no_case_and_may_be_followed_by_spaces() {
        let pair = BASE64.encode(b"entra:try-me");
        for scheme in ["Basic ", "basic ", "BASIC ", "Basic   "] {
            assert_eq!(authenticate(format!("{scheme}{pair}").as_bytes()), Ok(0), "{scheme:?}");
        }
    }

    #[test]
    fn none_or_two_headers_are_not_one() {
        assert_eq!(credentials().authenticate(&HeaderMap::new()), Err(Denied::Missing));
        let mut headers = HeaderMap::new();
        for _ in 0..2 {
            let value = HeaderValue::from_static("Basic ZW50cmE6dHJ5LW1l");
            headers.append(header::AUTHORIZATION, value);
        }
        assert_eq!(credentials().authenticate(&headers), Err(Denied::Malformed));
    }

    #[test]
    fn without_credentials_nobody_gets_in() {
        let none = BasicCredentials::new(&[]);
        let mut headers = HeaderMap::new();
        headers.insert(header::AUTHORIZATION, HeaderValue::from_static("Basic Og=="));
        assert_eq!(none.authenticate(&headers), Err(Denied::Wrong));
    }
}
