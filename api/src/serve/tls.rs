//! TLS of the listener, and certificates that change while it runs.
//!
//! TLS 1.2 and 1.3. The certificate and its key are read again when their files change, however
//! they are replaced; a pair that cannot be used is refused and the old one stays. At a start one that
//! has expired is served with all the same: who runs a process that does not start has two things to
//! mend, and the clock may be what is wrong. Where asked for,
//! a caller may present a client certificate and need not: here only the possession of its key is
//! proved, and whether it lets anybody in is for `auth` to say.

use std::{
    fmt, io,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError, RwLock,
        atomic::{AtomicI64, AtomicU64},
    },
    time::Duration,
};

use prometheus_client::{
    metrics::{counter::Counter, gauge::Gauge},
    registry::{Registry, Unit},
};
use rustls::{
    DigitallySignedStruct, DistinguishedName, Error, ServerConfig, SignatureScheme,
    crypto::{
        CryptoProvider, WebPkiSupportedAlgorithms, ring::default_provider, verify_tls12_signature,
        verify_tls13_signature,
    },
    pki_types::{
        CertificateDer, PrivateKeyDer, UnixTime,
        pem::{self, PemObject as _},
    },
    server::{
        ClientHello, NoClientAuth, ResolvesServerCert,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
    sign::CertifiedKey,
};
use sha2::{Digest as _, Sha256};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};
use tokio::{
    net::TcpStream,
    time::{MissedTickBehavior, interval, timeout},
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info};
use x509_cert::{Certificate, der::Decode as _};

use crate::auth::CertificateChain;

/// What a listener needs for TLS.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsSettings {
    /// The certificate in PEM, and after it those that lead from it towards its root.
    pub certificate: PathBuf,
    /// Its private key in PEM.
    pub key: PathBuf,
    /// Whether callers are asked for a certificate; they need not have one.
    pub ask_for_client_certificate: bool,
}

/// Why a certificate and its key cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("could not read {0}")]
    Unreadable(PathBuf, #[source] io::Error),
    #[error("{0} holds no certificate in PEM")]
    NoCertificate(PathBuf),
    #[error("{0} holds no private key in PEM")]
    NoKey(PathBuf),
    #[error("the key in {key} is not the one of the certificate in {certificate}")]
    Mismatch { certificate: PathBuf, key: PathBuf },
    #[error("the certificate in {0} expired at {1}")]
    Expired(PathBuf, String),
    #[error("the certificate in {0} is not valid before {1}")]
    NotYetValid(PathBuf, String),
    #[error("the certificate in {0} or its key cannot be used")]
    Unusable(PathBuf, #[source] Error),
}

/// TLS, ready to serve; cheap to clone.
#[derive(Clone)]
pub struct Tls(Arc<Inner>);

struct Inner {
    settings: TlsSettings,
    provider: Arc<CryptoProvider>,
    acceptor: TlsAcceptor,
    current: Arc<Current>,
    reload: Mutex<Reload>,
    expires: Gauge<i64, AtomicI64>,
    failed: Counter<u64, AtomicU64>,
}

/// What the files held: to see a change, not to keep them.
type Fingerprint = [u8; 32];

struct Reload {
    in_force: Fingerprint,
    /// At the last look; files are replaced one after the other, so a change counts once it has
    /// been the same twice.
    seen: Option<Fingerprint>,
    /// Complained about already.
    refused: Option<Fingerprint>,
}

impl Tls {
    /// Reads the certificate and its key; whether it is valid now, [`Self::valid_at`] says.
    pub fn load(settings: TlsSettings) -> Result<Self, TlsError> {
        let provider = Arc::new(default_provider());
        let files = Files::read(&settings)?;
        let pair = files.pair(&settings, &provider)?;
        let expires = Gauge::default();
        expires.set(pair.not_after.unix_timestamp());
        let current = Arc::new(Current(RwLock::new(Arc::new(pair))));

        let config = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&[&rustls::version::TLS13, &rustls::version::TLS12])
            .expect("the provider supports both versions")
            .with_client_cert_verifier(if settings.ask_for_client_certificate {
                Arc::new(AnyClient(provider.signature_verification_algorithms))
            } else {
                Arc::new(NoClientAuth)
            });
        let mut config = config.with_cert_resolver(Arc::clone(&current) as _);
        config.alpn_protocols = vec![b"http/1.1".to_vec()];

        let in_force = files.fingerprint();
        let reload = Mutex::new(Reload { in_force, seen: None, refused: None });
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let failed = Counter::default();
        let inner = Inner { settings, provider, acceptor, current, reload, expires, failed };
        Ok(Self(Arc::new(inner)))
    }

    /// Whether the certificate in force is valid at `now`; platforms connect to no other.
    pub fn valid_at(&self, now: OffsetDateTime) -> Result<(), TlsError> {
        self.0.current.pair().valid_at(&self.0.settings, now)
    }

    /// Puts its metrics, `vestibule_tls_…`, into `registry`.
    pub fn register(&self, registry: &mut Registry) {
        registry.register_with_unit(
            "vestibule_tls_certificate_expires",
            "When the certificate of the listener expires, as Unix time",
            Unit::Seconds,
            self.0.expires.clone(),
        );
        registry.register(
            "vestibule_tls_failed_handshakes",
            "Connections that ended before TLS was agreed on",
            self.0.failed.clone(),
        );
    }

    /// Looks at the files every second, until told to stop.
    ///
    /// At what they hold, for that is right however they are replaced: Kubernetes exchanges a
    /// symbolic link, and a time of modification can be the same before and after.
    pub async fn watch(&self, stop: CancellationToken) {
        let mut ticks = interval(LOOK_EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                biased;
                () = stop.cancelled() => return,
                _ = ticks.tick() => {}
            }
            let tls = self.clone();
            // Reading may take long where the files are on a network.
            let looked = tokio::task::spawn_blocking(move || tls.look(OffsetDateTime::now_utc()));
            match looked.await {
                Ok(Ok(true)) => info!(
                    certificate = %self.0.settings.certificate.display(),
                    "the listener has a new certificate"
                ),
                Ok(Ok(false)) | Err(_) => {}
                Ok(Err(refused)) => {
                    let error: &dyn std::error::Error = &refused;
                    error!(
                        error,
                        "could not take a changed certificate for the listener; the old one stays"
                    );
                }
            }
        }
    }

    /// One look at the files: takes over what has been the same twice and says so. What is wrong
    /// with them is said once, and tried again all the same: time may mend it.
    pub fn look(&self, now: OffsetDateTime) -> Result<bool, TlsError> {
        let Inner { settings, provider, current, expires, .. } = &*self.0;
        let mut reload = self.0.reload.lock().unwrap_or_else(PoisonError::into_inner);
        let files = Files::read(settings);
        let found = files.as_ref().map_or(MISSING, Files::fingerprint);
        if found == reload.in_force {
            (reload.seen, reload.refused) = (None, None);
            return Ok(false);
        }
        if reload.seen.replace(found) != Some(found) {
            return Ok(false);
        }
        let pair = files.and_then(|files| files.pair(settings, provider));
        match pair.and_then(|pair| pair.valid_at(settings, now).map(|()| pair)) {
            Ok(pair) => {
                expires.set(pair.not_after.unix_timestamp());
                current.replace(pair);
                *reload = Reload { in_force: found, seen: None, refused: None };
                Ok(true)
            }
            Err(_) if reload.refused == Some(found) => Ok(false),
            Err(error) => {
                reload.refused = Some(found);
                Err(error)
            }
        }
    }

    /// The agreed connection and what the caller presented, or None if there is none within the
    /// limit.
    pub(super) async fn accept(
        &self,
        stream: TcpStream,
        limit: Duration,
    ) -> Option<(TlsStream<TcpStream>, Option<Arc<CertificateChain>>)> {
        let stream = match timeout(limit, self.0.acceptor.accept(stream)).await {
            Ok(Ok(stream)) => stream,
            Ok(Err(error)) => {
                debug!(%error, "a connection ended before TLS was agreed on");
                self.0.failed.inc();
                return None;
            }
            Err(_elapsed) => {
                debug!("a connection took too long to agree on TLS");
                self.0.failed.inc();
                return None;
            }
        };
        let presented = stream.get_ref().1.peer_certificates().unwrap_or_default();
        let certificates =
            CertificateChain::read(presented.iter().cloned().map(CertificateDer::into_owned));
        Some((stream, certificates.map(Arc::new)))
    }
}

/// As long as it takes to notice, and no load.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// What is seen while a file is away.
const MISSING: Fingerprint = [0; 32];

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tls").field("settings", &self.0.settings).finish_non_exhaustive()
    }
}

/// What the two files hold.
struct Files {
    certificate: Vec<u8>,
    key: Vec<u8>,
}

#[derive(Debug)]
struct Pair {
    key: Arc<CertifiedKey>,
    not_before: OffsetDateTime,
    not_after: OffsetDateTime,
}

impl Pair {
    fn valid_at(&self, settings: &TlsSettings, now: OffsetDateTime) -> Result<(), TlsError> {
        let path = || settings.certificate.clone();
        let text = |at: OffsetDateTime| at.format(&Rfc3339).unwrap_or_default();
        if self.not_after < now {
            return Err(TlsError::Expired(path(), text(self.not_after)));
        }
        if now < self.not_before {
            return Err(TlsError::NotYetValid(path(), text(self.not_before)));
        }
        Ok(())
    }
}

impl Files {
    fn read(settings: &TlsSettings) -> Result<Self, TlsError> {
        let read = |path: &Path| {
            std::fs::read(path).map_err(|error| TlsError::Unreadable(path.to_owned(), error))
        };
        Ok(Self { certificate: read(&settings.certificate)?, key: read(&settings.key)? })
    }

    fn fingerprint(&self) -> Fingerprint {
        let mut hash = Sha256::new();
        hash.update((self.certificate.len() as u64).to_be_bytes());
        hash.update(&self.certificate);
        hash.update(&self.key);
        hash.finalize().into()
    }

    fn pair(&self, settings: &TlsSettings, provider: &CryptoProvider) -> Result<Pair, TlsError> {
        let path = || settings.certificate.clone();
        let chain = CertificateDer::pem_slice_iter(&self.certificate)
            .collect::<Result<Vec<_>, pem::Error>>()
            .map_err(|_| TlsError::NoCertificate(path()))?;
        let leaf = chain.first().ok_or_else(|| TlsError::NoCertificate(path()))?;
        let key = PrivateKeyDer::from_pem_slice(&self.key)
            .map_err(|_| TlsError::NoKey(settings.key.clone()))?;

        let (not_before, not_after) =
            validity(leaf).ok_or_else(|| TlsError::NoCertificate(path()))?;
        match CertifiedKey::from_der(chain, key, provider) {
            Ok(key) => Ok(Pair { key: Arc::new(key), not_before, not_after }),
            Err(Error::InconsistentKeys(_)) => {
                Err(TlsError::Mismatch { certificate: path(), key: settings.key.clone() })
            }
            Err(error) => Err(TlsError::Unusable(path(), error)),
        }
    }
}

fn validity(certificate: &CertificateDer<'_>) -> Option<(OffsetDateTime, OffsetDateTime)> {
    let certificate = Certificate::from_der(certificate).ok()?;
    let validity = certificate.tbs_certificate().validity();
    let at = |time: x509_cert::time::Time| {
        let since_1970 = time.to_unix_duration().as_secs();
        OffsetDateTime::from_unix_timestamp(since_1970.try_into().ok()?).ok()
    };
    Some((at(validity.not_before)?, at(validity.not_after)?))
}

/// The pair in force; a handshake that has begun keeps the one it began with.
#[derive(Debug)]
struct Current(RwLock<Arc<Pair>>);

impl Current {
    fn pair(&self) -> Arc<Pair> {
        Arc::clone(&self.0.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn replace(&self, pair: Pair) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(pair);
    }
}

impl ResolvesServerCert for Current {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.pair().key))
    }
}

/// Takes any client certificate whose private key the caller has, and none as well.
///
/// To refuse one here would be to hang up on a caller who may have a password too, without an
/// answer and without a count by connector: which connector is called is not known yet.
#[derive(Debug)]
struct AnyClient(WebPkiSupportedAlgorithms);

impl ClientCertVerifier for AnyClient {
    fn client_auth_mandatory(&self) -> bool {
        false
    }

    /// None: some clients send a certificate only if its issuer is hinted at, unless nobody is.
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, certificate, signed, &self.0)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, certificate, signed, &self.0)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_schemes()
    }
}
