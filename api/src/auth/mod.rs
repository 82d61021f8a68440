//! Who may call a connector.
//!
//! A connector has any number of credentials of any kind, and one of them is enough, so that each
//! can be changed for another without an interruption; which of them calls come with is counted.
//! [`Credentials::authenticate`] is given what the connection and the headers tell, and the time. It
//! waits for nothing: the keys of bearer tokens are fetched beside it, by [`BearerVerifier::run`].
//!
//! Secrets are compared in constant time, and no reason for a refusal reaches the caller: there is
//! one 401 for all of them. The reasons are counted, and hold nothing of what was presented.
//! Whether the connection itself is private is `serve`'s.

mod basic;
mod bearer;
mod certificate;
mod forwarded;
mod name;
mod secret;
#[cfg(test)]
mod tests;

use std::{fmt, sync::Arc};

use axum::http::{HeaderMap, HeaderName, HeaderValue, header};
use secrecy::{ExposeSecret as _, SecretString};
use time::OffsetDateTime;

use crate::Connection;
pub use bearer::{BearerSettings, BearerSettingsError, BearerVerifier, FetchError};
pub(crate) use certificate::CertificateChain;
pub use certificate::{
    CertificateSettings, CertificateSettingsError, CertificateSource, NamePair, Thumbprint,
    ThumbprintError,
};
pub use forwarded::{CertificateEncoding, ForwardedCertificate, Network, NetworkError};
pub use name::{DistinguishedName, NameError};
use secret::SecretSet;

/// One way to be let in.
#[derive(Clone, Debug)]
pub struct Credential {
    /// What metrics call it, so that one can see the old one fall silent. Not secret.
    pub name: String,
    pub kind: CredentialKind,
}

#[derive(Clone)]
pub enum CredentialKind {
    /// HTTP Basic. The user is without a colon: on the wire the first one ends it.
    Basic { user: String, password: SecretString },
    /// A secret in a header of its own, such as `x-functions-key`.
    ApiKey { header: HeaderName, key: SecretString },
    /// A fixed bearer token: any text that both sides know.
    Token { token: SecretString },
    /// A client certificate, of the connection or forwarded by a proxy.
    Certificate(CertificateSettings),
    /// A signed bearer token (JWT) of an issuer whose keys are published.
    Bearer(Arc<BearerVerifier>),
}

/// Without the secrets.
impl fmt::Debug for CredentialKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Basic { .. } => f.write_str("Basic"),
            Self::ApiKey { header, .. } => write!(f, "ApiKey({header})"),
            Self::Token { .. } => f.write_str("Token"),
            Self::Certificate(settings) => f.debug_tuple("Certificate").field(settings).finish(),
            Self::Bearer(verifier) => f.debug_tuple("Bearer").field(verifier).finish(),
        }
    }
}

/// Who calls, as far as the connection and the headers tell.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Caller<'a> {
    pub(crate) headers: &'a HeaderMap,
    /// None where there is no connection, as in a test without a listener.
    pub(crate) connection: Option<&'a Connection>,
    pub(crate) now: OffsetDateTime,
}

/// A call that was let in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Authenticated {
    /// Which credential it came with: its place in the list.
    pub(crate) place: usize,
    /// The tenant that a bearer token was issued by.
    pub(crate) tenant: Option<String>,
}

/// Why a call was not let in. The caller is told none of this.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Denied {
    /// Nothing was presented: often a probe, or a connector set up without credentials.
    Missing,
    /// What was presented cannot be read, or is of a kind that this connector does not know.
    Malformed,
    /// A well-formed secret, and not one of ours.
    Wrong,
    /// On no allow list.
    CertificateUnknown,
    /// Allowed, but outside of its validity period.
    CertificateExpired,
    /// Allowed, but not made for clients.
    CertificateUsage,
    /// Allowed, but no configured root vouches for it.
    CertificateUntrusted,
    /// A forwarded certificate that does not come from a proxy we were told of.
    ForwardedByStranger,
    /// The keys of the issuer could not be fetched yet.
    TokenKeysMissing,
    /// Signed with a key that the issuer had not published when we last looked.
    TokenKeyUnknown,
    /// No signature at all, by a shared secret, or otherwise not of the kind that the key is for.
    TokenAlgorithm,
    TokenSignature,
    TokenIssuer,
    TokenAudience,
    /// Issued to another application.
    TokenCaller,
    TokenTenant,
    TokenExpired,
    TokenNotYetValid,
    /// A call about a tenant that its token is not of, or of a tenant or an extension that was not
    /// named.
    Origin,
}

impl Denied {
    pub(crate) const ALL: [Self; 19] = [
        Self::Missing,
        Self::Malformed,
        Self::Wrong,
        Self::CertificateUnknown,
        Self::CertificateExpired,
        Self::CertificateUsage,
        Self::CertificateUntrusted,
        Self::ForwardedByStranger,
        Self::TokenKeysMissing,
        Self::TokenKeyUnknown,
        Self::TokenAlgorithm,
        Self::TokenSignature,
        Self::TokenIssuer,
        Self::TokenAudience,
        Self::TokenCaller,
        Self::TokenTenant,
        Self::TokenExpired,
        Self::TokenNotYetValid,
        Self::Origin,
    ];

    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Missing => "missing",
            Self::Malformed => "malformed",
            Self::Wrong => "wrong",
            Self::CertificateUnknown => "certificate-unknown",
            Self::CertificateExpired => "certificate-expired",
            Self::CertificateUsage => "certificate-usage",
            Self::CertificateUntrusted => "certificate-untrusted",
            Self::ForwardedByStranger => "forwarded-by-stranger",
            Self::TokenKeysMissing => "token-keys-missing",
            Self::TokenKeyUnknown => "token-key-unknown",
            Self::TokenAlgorithm => "token-algorithm",
            Self::TokenSignature => "token-signature",
            Self::TokenIssuer => "token-issuer",
            Self::TokenAudience => "token-audience",
            Self::TokenCaller => "token-caller",
            Self::TokenTenant => "token-tenant",
            Self::TokenExpired => "token-expired",
            Self::TokenNotYetValid => "token-not-yet-valid",
            Self::Origin => "origin",
        }
    }

    /// The one that says more, of two credentials that did not fit.
    ///
    /// That one credential does not know what fits another one better is to be expected, so the
    /// general reasons give way to the particular ones.
    fn or(self, other: Self) -> Self {
        let particular = |it: Self| match it {
            Self::Missing => 0,
            Self::Malformed | Self::Wrong | Self::CertificateUnknown => 1,
            Self::TokenIssuer | Self::TokenKeysMissing => 2,
            _ => 3,
        };
        if particular(other) > particular(self) { other } else { self }
    }
}

/// The credentials of a connector, ready to compare.
#[derive(Default)]
pub(crate) struct Credentials {
    basic: SecretSet,
    tokens: SecretSet,
    keys: Vec<(HeaderName, SecretSet)>,
    /// By where the certificate comes from, so that it is read once for all of them.
    certificates: Vec<(CertificateSource, Vec<(usize, CertificateSettings)>)>,
    bearers: Vec<(usize, Arc<BearerVerifier>)>,
}

impl Credentials {
    pub(crate) fn new<'a>(credentials: impl IntoIterator<Item = &'a Credential>) -> Self {
        let mut it = Self::default();
        for (place, credential) in credentials.into_iter().enumerate() {
            match &credential.kind {
                CredentialKind::Basic { user, password } => {
                    let password = password.expose_secret().as_bytes();
                    it.basic.insert(place, secret::digest_pair(user.as_bytes(), password));
                }
                CredentialKind::Token { token } => {
                    it.tokens.insert(place, secret::digest(token.expose_secret().as_bytes()));
                }
                CredentialKind::ApiKey { header, key } => {
                    let digest = secret::digest(key.expose_secret().as_bytes());
                    group(&mut it.keys, header).insert(place, digest);
                }
                CredentialKind::Certificate(settings) => {
                    let group = group(&mut it.certificates, settings.source());
                    group.push((place, settings.clone()));
                }
                CredentialKind::Bearer(verifier) => it.bearers.push((place, Arc::clone(verifier))),
            }
        }
        it
    }

    /// Which credential the call comes with. What it presents is tried kind by kind; the first that
    /// fits is enough.
    pub(crate) fn authenticate(&self, caller: &Caller<'_>) -> Result<Authenticated, Denied> {
        let first = match self.by_authorization(caller) {
            Ok(authenticated) => return Ok(authenticated),
            Err(denied) => denied,
        };
        let second = match self.by_key(caller) {
            Ok(place) => return Ok(Authenticated { place, tenant: None }),
            Err(denied) => denied,
        };
        match self.by_certificate(caller) {
            Ok(place) => Ok(Authenticated { place, tenant: None }),
            Err(third) => Err(first.or(second).or(third)),
        }
    }

    /// What `WWW-Authenticate` says to a caller who was not let in: one challenge for each kind.
    pub(crate) fn challenges(&self) -> Vec<HeaderValue> {
        // HTTP wants a challenge in every 401. The last two are not in the registry of schemes,
        // where there is none that fits.
        let challenges = [
            (!self.basic.is_empty(), r#"Basic realm="vestibule", charset="UTF-8""#),
            (!self.tokens.is_empty() || !self.bearers.is_empty(), r#"Bearer realm="vestibule""#),
            (!self.keys.is_empty(), r#"ApiKey realm="vestibule""#),
            (!self.certificates.is_empty(), r#"Certificate realm="vestibule""#),
        ];
        let configured: Vec<_> = challenges
            .iter()
            .filter(|(configured, _)| *configured)
            .map(|(_, challenge)| HeaderValue::from_static(challenge))
            .collect();
        if configured.is_empty() {
            return vec![HeaderValue::from_static(challenges[0].1)];
        }
        configured
    }

    fn by_authorization(&self, caller: &Caller<'_>) -> Result<Authenticated, Denied> {
        let value = single(caller.headers, &header::AUTHORIZATION)?.as_bytes();
        if let Some(encoded) = after_scheme(value, b"basic ") {
            let pair = basic::Pair::read(encoded).ok_or(Denied::Malformed)?;
            let place = self.basic.find(&secret::digest_pair(pair.user(), pair.password()));
            return place.map(|place| Authenticated { place, tenant: None }).ok_or(Denied::Wrong);
        }
        match after_scheme(value, b"bearer ") {
            Some(token) if !(self.tokens.is_empty() && self.bearers.is_empty()) => {
                self.by_token(token.trim_ascii(), caller.now)
            }
            _ => Err(Denied::Malformed),
        }
    }

    fn by_token(&self, token: &[u8], now: OffsetDateTime) -> Result<Authenticated, Denied> {
        if let Some(place) = self.tokens.find(&secret::digest(token)) {
            return Ok(Authenticated { place, tenant: None });
        }
        let mut denied = if self.tokens.is_empty() { Denied::Missing } else { Denied::Wrong };
        for (place, verifier) in &self.bearers {
            match verifier.verify(token, now) {
                Ok(tenant) => return Ok(Authenticated { place: *place, tenant }),
                Err(reason) => denied = denied.or(reason),
            }
        }
        Err(denied)
    }

    fn by_key(&self, caller: &Caller<'_>) -> Result<usize, Denied> {
        let mut denied = Denied::Missing;
        for (header, keys) in &self.keys {
            let found = single(caller.headers, header).and_then(|value| {
                keys.find(&secret::digest(value.as_bytes())).ok_or(Denied::Wrong)
            });
            match found {
                Ok(place) => return Ok(place),
                Err(reason) => denied = denied.or(reason),
            }
        }
        Err(denied)
    }

    fn by_certificate(&self, caller: &Caller<'_>) -> Result<usize, Denied> {
        let mut denied = Denied::Missing;
        for (source, credentials) in &self.certificates {
            let chain = match source.chain(caller) {
                Ok(chain) => chain,
                Err(reason) => {
                    denied = denied.or(reason);
                    continue;
                }
            };
            for (place, settings) in credentials {
                match settings.verify(&chain, caller.now) {
                    Ok(()) => return Ok(*place),
                    Err(reason) => denied = denied.or(reason),
                }
            }
        }
        Err(denied)
    }
}

/// The only value of a header: of two, one may be the caller's own and the other a proxy's, and
/// which is to hold nobody can say.
fn single<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Result<&'a HeaderValue, Denied> {
    let mut values = headers.get_all(name).iter();
    let value = values.next().ok_or(Denied::Missing)?;
    if values.next().is_some() {
        return Err(Denied::Malformed);
    }
    Ok(value)
}

/// What follows a scheme, which has no case and ends with its space.
fn after_scheme<'a>(value: &'a [u8], scheme: &[u8]) -> Option<&'a [u8]> {
    let (start, rest) = value.split_at_checked(scheme.len())?;
    start.eq_ignore_ascii_case(scheme).then_some(rest)
}

/// The group of a key, made where there is none.
fn group<'a, K: Clone + PartialEq, V: Default>(groups: &'a mut Vec<(K, V)>, key: &K) -> &'a mut V {
    let place = groups.iter().position(|(it, _)| it == key).unwrap_or_else(|| {
        groups.push((key.clone(), V::default()));
        groups.len() - 1
    });
    &mut groups[place].1
}
