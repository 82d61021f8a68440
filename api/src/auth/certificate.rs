//! Client certificates: which are allowed, and whether one that is presented holds.
//!
//! The allow list names certificates by thumbprint or by issuer and subject. Whatever it names must
//! also be within its validity period, be made for clients where it says what it is made for, and
//! lead to one of the configured roots where there are any. That the caller holds the private key
//! was proved in the handshake: to us, or to the proxy that forwarded the certificate.
//!
//! Nothing asks whether a certificate was revoked: an entry is taken off the allow list instead.

use std::{fmt, str::FromStr, sync::Arc, time::Duration};

use data_encoding::HEXUPPER_PERMISSIVE;
use ring::digest;
use rustls::{
    RootCertStore,
    crypto::ring::default_provider,
    pki_types::{CertificateDer, UnixTime, pem::PemObject as _},
    server::{WebPkiClientVerifier, danger::ClientCertVerifier},
};
use time::OffsetDateTime;
use x509_cert::{
    Certificate,
    der::{Decode as _, oid::ObjectIdentifier},
    ext::pkix::ExtendedKeyUsage,
};

use super::{Caller, Denied, forwarded::ForwardedCertificate, name::DistinguishedName};

/// Which client certificates are one credential.
#[derive(Clone)]
pub struct CertificateSettings {
    source: CertificateSource,
    thumbprints: Vec<Thumbprint>,
    names: Vec<NamePair>,
    roots: Option<Arc<dyn ClientCertVerifier>>,
}

/// Where the certificate is taken from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CertificateSource {
    /// The TLS connection to us.
    Connection,
    /// A header, in which a proxy that ended TLS forwards it.
    Forwarded(ForwardedCertificate),
}

/// The issuer and the subject of an allowed certificate, whichever key it has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamePair {
    pub issuer: DistinguishedName,
    pub subject: DistinguishedName,
}

/// The SHA-1 or SHA-256 of a whole certificate: hexadecimal, with or without colons or spaces.
///
/// SHA-1 is what several platforms display. To be let in wrongly, a caller would need a second
/// certificate for a given SHA-1, which nobody can make; two for a SHA-1 of their own choice do not
/// help.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Thumbprint {
    Sha1([u8; 20]),
    Sha256([u8; 32]),
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "a thumbprint has 40 (SHA-1) or 64 (SHA-256) hexadecimal digits, which may be separated by \
     colons"
)]
pub struct ThumbprintError;

/// Why certificates cannot be told apart by such settings.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CertificateSettingsError {
    #[error("no certificate is allowed: name at least one thumbprint, or an issuer and subject")]
    NothingAllowed,
    #[error(
        "anybody can make a certificate with the issuer and subject that are allowed: name the \
         roots that vouch for it, or its thumbprint"
    )]
    NamesWithoutRoots,
    #[error("the roots cannot be read as certificates in PEM")]
    RootsUnreadable,
    #[error("there is no certificate in the roots")]
    NoRoots,
    #[error("nobody may forward a certificate: name the networks that the proxies call from")]
    NobodyForwards,
}

impl CertificateSettings {
    /// `roots` are certificates in PEM, one after the other; without them the thumbprints alone
    /// decide. A proxy forwards no intermediate certificates, or may not, so what issued the
    /// caller's certificate is best among the roots itself.
    pub fn new(
        source: CertificateSource,
        thumbprints: Vec<Thumbprint>,
        names: Vec<NamePair>,
        roots: Option<&[u8]>,
    ) -> Result<Self, CertificateSettingsError> {
        if thumbprints.is_empty() && names.is_empty() {
            return Err(CertificateSettingsError::NothingAllowed);
        }
        if roots.is_none() && !names.is_empty() {
            return Err(CertificateSettingsError::NamesWithoutRoots);
        }
        if let CertificateSource::Forwarded(forwarded) = &source
            && forwarded.peers.is_empty()
        {
            return Err(CertificateSettingsError::NobodyForwards);
        }
        let roots = roots.map(verifier).transpose()?;
        Ok(Self { source, thumbprints, names, roots })
    }

    /// Where the certificates come from: for those of the connection the listener must ask.
    #[must_use]
    pub fn source(&self) -> &CertificateSource {
        &self.source
    }

    pub(super) fn verify(
        &self,
        chain: &CertificateChain,
        now: OffsetDateTime,
    ) -> Result<(), Denied> {
        let leaf = chain.leaf.as_ref().ok_or(Denied::Malformed)?;
        // What costs least comes first, so that a stranger's certificate costs next to nothing.
        if !self.allows(leaf) {
            return Err(Denied::CertificateUnknown);
        }
        if now < leaf.not_before || leaf.not_after < now {
            return Err(Denied::CertificateExpired);
        }
        if !leaf.for_clients {
            return Err(Denied::CertificateUsage);
        }
        let Some(roots) = &self.roots else { return Ok(()) };
        let since_1970 = Duration::from_secs(now.unix_timestamp().unsigned_abs());
        roots
            .verify_client_cert(
                &leaf.der,
                &chain.intermediates,
                UnixTime::since_unix_epoch(since_1970),
            )
            .map(drop)
            .map_err(|_| Denied::CertificateUntrusted)
    }

    fn allows(&self, leaf: &Leaf) -> bool {
        let named = |it: &NamePair| it.issuer == leaf.issuer && it.subject == leaf.subject;
        self.thumbprints.iter().any(|it| it.is_of(leaf)) || self.names.iter().any(named)
    }
}

fn verifier(pem: &[u8]) -> Result<Arc<dyn ClientCertVerifier>, CertificateSettingsError> {
    let mut roots = RootCertStore::empty();
    for root in CertificateDer::pem_slice_iter(pem) {
        let root = root.map_err(|_| CertificateSettingsError::RootsUnreadable)?;
        roots.add(root).map_err(|_| CertificateSettingsError::RootsUnreadable)?;
    }
    if roots.is_empty() {
        return Err(CertificateSettingsError::NoRoots);
    }
    let provider = Arc::new(default_provider());
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build();
    Ok(verifier.expect("there is a root, and no revocation list"))
}

impl fmt::Debug for CertificateSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CertificateSettings")
            .field("source", &self.source)
            .field("thumbprints", &self.thumbprints)
            .field("names", &self.names)
            .field("roots", &self.roots.is_some())
            .finish()
    }
}

impl CertificateSource {
    pub(super) fn chain(&self, caller: &Caller<'_>) -> Result<Arc<CertificateChain>, Denied> {
        match self {
            Self::Connection => {
                caller.connection.and_then(|it| it.certificates.clone()).ok_or(Denied::Missing)
            }
            Self::Forwarded(forwarded) => forwarded.chain(caller).map(Arc::new),
        }
    }
}

impl Thumbprint {
    fn is_of(&self, leaf: &Leaf) -> bool {
        match self {
            Self::Sha1(it) => *it == leaf.sha1,
            Self::Sha256(it) => *it == leaf.sha256,
        }
    }
}

impl FromStr for Thumbprint {
    type Err = ThumbprintError;

    fn from_str(text: &str) -> Result<Self, ThumbprintError> {
        let digits: String = text.chars().filter(|it| !matches!(it, ':' | ' ')).collect();
        let bytes = HEXUPPER_PERMISSIVE.decode(digits.as_bytes()).map_err(|_| ThumbprintError)?;
        if let Ok(sha1) = bytes.as_slice().try_into() {
            return Ok(Self::Sha1(sha1));
        }
        bytes.as_slice().try_into().map(Self::Sha256).map_err(|_| ThumbprintError)
    }
}

impl fmt::Debug for Thumbprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bytes: &[u8] = match self {
            Self::Sha1(it) => it,
            Self::Sha256(it) => it,
        };
        f.write_str(&HEXUPPER_PERMISSIVE.encode(bytes))
    }
}

/// A certificate as it was presented, with those that lead from it towards a root; read once a
/// connection.
pub(crate) struct CertificateChain {
    /// None if it is not a certificate of version 3 in strict DER.
    leaf: Option<Leaf>,
    intermediates: Vec<CertificateDer<'static>>,
}

struct Leaf {
    der: CertificateDer<'static>,
    sha1: [u8; 20],
    sha256: [u8; 32],
    issuer: DistinguishedName,
    subject: DistinguishedName,
    not_before: OffsetDateTime,
    not_after: OffsetDateTime,
    /// It says that it is for clients, or does not say what it is for.
    for_clients: bool,
}

impl CertificateChain {
    /// None if there is no certificate.
    pub(crate) fn read(
        certificates: impl IntoIterator<Item = CertificateDer<'static>>,
    ) -> Option<Self> {
        let mut certificates = certificates.into_iter();
        let leaf = Leaf::read(certificates.next()?);
        Some(Self { leaf, intermediates: certificates.collect() })
    }
}

/// Whose it is may be a person: not for logs.
impl fmt::Debug for CertificateChain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CertificateChain").finish_non_exhaustive()
    }
}

impl Leaf {
    fn read(der: CertificateDer<'static>) -> Option<Self> {
        const CLIENT_AUTH: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.6.1.5.5.7.3.2");
        let certificate = Certificate::from_der(&der).ok()?;
        let content = certificate.tbs_certificate();
        let usage = content.get_extension::<ExtendedKeyUsage>().ok()?;
        let at = |time: x509_cert::time::Time| {
            let since_1970 = time.to_unix_duration().as_secs();
            OffsetDateTime::from_unix_timestamp(since_1970.try_into().ok()?).ok()
        };
        let hash = |algorithm| digest::digest(algorithm, &der);
        Some(Self {
            sha1: hash(&digest::SHA1_FOR_LEGACY_USE_ONLY).as_ref().try_into().ok()?,
            sha256: hash(&digest::SHA256).as_ref().try_into().ok()?,
            issuer: content.issuer().into(),
            subject: content.subject().into(),
            not_before: at(content.validity().not_before)?,
            not_after: at(content.validity().not_after)?,
            for_clients: usage.is_none_or(|(_, usage)| usage.0.contains(&CLIENT_AUTH)),
            der,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thumbprint_is_read_however_it_is_displayed() {
        let sha1 = Thumbprint::Sha1([0xab; 20]);
        for text in ["ab".repeat(20), "AB".repeat(20), ["ab"; 20].join(":"), ["AB"; 20].join(" ")] {
            assert_eq!(text.parse(), Ok(sha1), "{text}");
        }
        assert_eq!("0c".repeat(32).parse(), Ok(Thumbprint::Sha256([0x0c; 32])));
        for text in ["", "ab", "xy", &"ab".repeat(21), &"a".repeat(39)] {
            assert_eq!(text.parse::<Thumbprint>(), Err(ThumbprintError), "{text}");
        }
    }

    #[test]
    fn settings_that_would_let_anybody_in_are_refused() {
        let new = |thumbprints: &[Thumbprint], names: &[NamePair], roots: Option<&[u8]>| {
            let source = CertificateSource::Connection;
            CertificateSettings::new(source, thumbprints.to_vec(), names.to_vec(), roots)
                .map(drop)
                .unwrap_err()
        };
        let pair = NamePair { issuer: "CN=a".parse().unwrap(), subject: "CN=b".parse().unwrap() };
        let thumbprint = Thumbprint::Sha1([1; 20]);
        assert_eq!(new(&[], &[], None), CertificateSettingsError::NothingAllowed);
        assert_eq!(new(&[], &[pair], None), CertificateSettingsError::NamesWithoutRoots);
        assert_eq!(new(&[thumbprint], &[], Some(b"")), CertificateSettingsError::NoRoots);
        let broken = b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
        assert_eq!(
            new(&[thumbprint], &[], Some(broken)),
            CertificateSettingsError::RootsUnreadable
        );
    }

    #[test]
    fn what_is_no_certificate_is_no_leaf() {
        let chain = CertificateChain::read([CertificateDer::from(vec![1, 2, 3])]).unwrap();
        assert!(chain.leaf.is_none());
        assert!(CertificateChain::read([]).is_none());
    }
}
