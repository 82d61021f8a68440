//! The listener with TLS: versions, certificates that change, and callers with certificates.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::Context as _;
use axum::{Router, routing::get};
use data_encoding::{BASE64, HEXLOWER};
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa,
    KeyPair,
};
use ring::digest;
use rustls::{
    ClientConfig, HandshakeKind, ProtocolVersion, RootCertStore, SupportedProtocolVersion,
    crypto::ring::default_provider,
    pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName},
    version::{TLS12, TLS13},
};
use time::OffsetDateTime;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    task::JoinHandle,
    time::timeout,
};
use tokio_rustls::{TlsConnector, client::TlsStream};
use tokio_util::sync::CancellationToken;
use vestibule_api::{
    CertificateEncoding, CertificateSettings, CertificateSource, Credential, CredentialKind,
    ForwardedCertificate, NamePair, ServerLimits, Thumbprint, Tls, TlsError, TlsSettings, serve,
    serve_tls,
};
use vestibule_testkit::eventually;

use crate::{auth::Connector, support::AUTHORIZATION};

const LONG: Duration = Duration::from_secs(20);

type Authority = CertifiedIssuer<'static, KeyPair>;

fn authority(name: &str) -> anyhow::Result<Authority> {
    Ok(CertifiedIssuer::self_signed(params_of_authority(name), KeyPair::generate()?)?)
}

fn params_of_authority(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params
}

/// A certificate and its key.
struct Identity {
    /// With those above it, if it is presented with them.
    chain: Vec<CertificateDer<'static>>,
    key: KeyPair,
}

impl Identity {
    /// `change` spoils it, or makes it fit its use.
    fn new(
        issuer: &Authority,
        name: &str,
        change: impl FnOnce(&mut CertificateParams),
    ) -> anyhow::Result<Self> {
        let mut params = CertificateParams::new(vec!["localhost".to_owned()])?;
        params.distinguished_name.push(DnType::CommonName, name);
        params.distinguished_name.push(DnType::OrganizationName, "Contoso, Ltd");
        change(&mut params);
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, issuer)?;
        Ok(Self { chain: vec![certificate.der().clone()], key })
    }

    fn for_clients(issuer: &Authority, name: &str) -> anyhow::Result<Self> {
        Self::new(issuer, name, |it| {
            it.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        })
    }

    fn der(&self) -> &CertificateDer<'static> {
        &self.chain[0]
    }

    fn pem(&self) -> String {
        self.chain.iter().map(pem).collect()
    }

    fn sha1(&self) -> anyhow::Result<Thumbprint> {
        let hash = digest::digest(&digest::SHA1_FOR_LEGACY_USE_ONLY, self.der());
        Ok(HEXLOWER.encode(hash.as_ref()).to_uppercase().parse()?)
    }

    fn sha256(&self) -> anyhow::Result<Thumbprint> {
        let hash = digest::digest(&digest::SHA256, self.der());
        Ok(HEXLOWER.encode(hash.as_ref()).parse()?)
    }

    fn private_key(&self) -> PrivateKeyDer<'static> {
        PrivatePkcs8KeyDer::from(self.key.serialize_der()).into()
    }
}

fn pem(der: &CertificateDer<'_>) -> String {
    format!("-----BEGIN CERTIFICATE-----\n{}\n-----END CERTIFICATE-----\n", BASE64.encode(der))
}

/// Where the listener's certificate lies.
struct Files {
    folder: tempfile::TempDir,
    authority: Authority,
}

impl Files {
    fn new() -> anyhow::Result<Self> {
        Ok(Self { folder: tempfile::tempdir()?, authority: authority("Server CA")? })
    }

    /// With a certificate in it.
    fn with_certificate() -> anyhow::Result<Self> {
        let files = Self::new()?;
        files.write(&files.identity(|_| {})?)?;
        Ok(files)
    }

    fn identity(&self, change: impl FnOnce(&mut CertificateParams)) -> anyhow::Result<Identity> {
        Identity::new(&self.authority, "server", change)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn write(&self, identity: &Identity) -> anyhow::Result<()> {
        write_pair(self.folder.path(), identity)
    }

    fn settings(&self) -> TlsSettings {
        TlsSettings {
            certificate: self.path("tls.crt"),
            key: self.path("tls.key"),
            ask_for_client_certificate: true,
        }
    }
}

fn write_pair(folder: &Path, identity: &Identity) -> anyhow::Result<()> {
    std::fs::write(folder.join("tls.crt"), identity.pem())?;
    Ok(std::fs::write(folder.join("tls.key"), identity.key.serialize_pem())?)
}

struct Server {
    address: SocketAddr,
    stop: CancellationToken,
    running: JoinHandle<std::io::Result<()>>,
}

impl Server {
    async fn start(tls: Option<Tls>, router: Router, limits: ServerLimits) -> anyhow::Result<Self> {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
        let address = listener.local_addr()?;
        let stop = CancellationToken::new();
        let running = match tls {
            Some(tls) => tokio::spawn(serve_tls(listener, tls, router, limits, stop.clone())),
            None => tokio::spawn(serve(listener, router, limits, stop.clone())),
        };
        Ok(Self { address, stop, running })
    }

    async fn stopped(self) -> anyhow::Result<()> {
        self.stop.cancel();
        Ok(timeout(LONG, self.running).await???)
    }
}

fn hello() -> Router {
    Router::new().route("/", get(|| async { "hello" }))
}

const GET: &str = "GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";

/// A client that trusts the authority of the listener, and may have a certificate itself.
struct Client {
    versions: Vec<&'static SupportedProtocolVersion>,
    roots: RootCertStore,
    identity: Option<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>)>,
}

impl Client {
    fn new(files: &Files) -> anyhow::Result<Self> {
        let mut roots = RootCertStore::empty();
        roots.add(files.authority.der().clone())?;
        Ok(Self { versions: vec![&TLS13, &TLS12], roots, identity: None })
    }

    fn with(self, identity: &Identity) -> Self {
        let identity = (identity.chain.clone(), identity.private_key());
        Self { identity: Some(identity), ..self }
    }

    async fn connect(&self, address: SocketAddr) -> anyhow::Result<TlsStream<TcpStream>> {
        connect(self.config()?, address).await
    }

    fn config(&self) -> anyhow::Result<Arc<ClientConfig>> {
        let config = ClientConfig::builder_with_provider(Arc::new(default_provider()))
            .with_protocol_versions(&self.versions)?
            .with_root_certificates(self.roots.clone());
        let mut config = match &self.identity {
            Some((chain, key)) => config.with_client_auth_cert(chain.clone(), key.clone_key())?,
            None => config.with_no_client_auth(),
        };
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Ok(Arc::new(config))
    }
}

async fn connect(
    config: Arc<ClientConfig>,
    address: SocketAddr,
) -> anyhow::Result<TlsStream<TcpStream>> {
    let stream = TcpStream::connect(address).await?;
    let name = ServerName::try_from("localhost")?;
    Ok(timeout(LONG, TlsConnector::from(config).connect(name, stream)).await??)
}

/// Sends a request and reads until the connection ends.
async fn exchange(
    stream: &mut (impl tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin),
    request: &str,
) -> anyhow::Result<String> {
    stream.write_all(request.as_bytes()).await?;
    let mut reply = Vec::new();
    let _ = timeout(LONG, stream.read_to_end(&mut reply)).await?;
    Ok(String::from_utf8(reply)?)
}

fn presented(stream: &TlsStream<TcpStream>) -> anyhow::Result<CertificateDer<'static>> {
    let chain = stream.get_ref().1.peer_certificates().context("a certificate")?;
    Ok(chain.first().context("a certificate")?.clone().into_owned())
}

#[tokio::test]
async fn both_current_versions_are_spoken() -> anyhow::Result<()> {
    let files = Files::with_certificate()?;
    let tls = Tls::load(files.settings())?;
    let server = Server::start(Some(tls), hello(), ServerLimits::default()).await?;

    for (spoken, version) in
        [(&TLS12, ProtocolVersion::TLSv1_2), (&TLS13, ProtocolVersion::TLSv1_3)]
    {
        let client = Client { versions: vec![spoken], ..Client::new(&files)? };
        let mut stream = client.connect(server.address).await?;
        assert_eq!(stream.get_ref().1.protocol_version(), Some(version));
        assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"http/1.1"[..]));
        assert!(exchange(&mut stream, GET).await?.ends_with("hello"), "{version:?}");
    }
    server.stopped().await
}

#[tokio::test]
async fn what_is_not_current_tls_is_refused_and_counted() -> anyhow::Result<()> {
    let files = Files::with_certificate()?;
    let tls = Tls::load(files.settings())?;
    let mut registry = prometheus_client::registry::Registry::default();
    tls.register(&mut registry);
    let server = Server::start(Some(tls), hello(), ServerLimits::default()).await?;

    // A client of TLS 1.1, with suites and signatures as in 1.2, so that only the version is wrong.
    let mut hello = vec![3, 2];
    hello.extend([7; 32]);
    hello.extend([0, 0, 6, 0xc0, 0x13, 0xc0, 0x09, 0x00, 0x2f, 1, 0]);
    hello.extend([0, 10, 0, 13, 0, 6, 0, 4, 4, 1, 4, 3]);
    let length = u8::try_from(hello.len())?;
    let record = [&[22, 3, 1, 0, length + 4, 1, 0, 0, length][..], &hello].concat();
    let mut stream = TcpStream::connect(server.address).await?;
    stream.write_all(&record).await?;
    let mut alert = Vec::new();
    let _ = timeout(LONG, stream.read_to_end(&mut alert)).await?;
    assert_eq!(alert.first(), Some(&21), "an alert");
    assert_eq!(alert.last_chunk(), Some(&[2, 70]), "fatal: protocol version; {alert:?}");

    let mut plain = TcpStream::connect(server.address).await?;
    let mut reply = Vec::new();
    plain.write_all(GET.as_bytes()).await?;
    let _ = timeout(LONG, plain.read_to_end(&mut reply)).await?;
    assert!(!reply.starts_with(b"HTTP"), "answered without TLS");

    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &registry)?;
    assert!(text.contains("vestibule_tls_failed_handshakes_total 2\n"), "{text}");
    let expires = text
        .lines()
        .find_map(|line| line.strip_prefix("vestibule_tls_certificate_expires_seconds "))
        .context("when the certificate expires")?;
    assert_eq!(expires.parse::<i64>()?, rcgen::date_time_ymd(4096, 1, 1).unix_timestamp());
    server.stopped().await
}

#[tokio::test]
async fn who_never_finishes_a_handshake_holds_up_nobody() -> anyhow::Result<()> {
    let files = Files::with_certificate()?;
    let tls = Tls::load(files.settings())?;
    let limits = ServerLimits { max_connections: 3, ..ServerLimits::default() };
    let server = Server::start(Some(tls.clone()), hello(), limits).await?;
    let _silent = TcpStream::connect(server.address).await?;
    let mut slow = TcpStream::connect(server.address).await?;
    slow.write_all(&[22, 3, 1]).await?;

    let mut stream = Client::new(&files)?.connect(server.address).await?;
    assert!(exchange(&mut stream, GET).await?.ends_with("hello"), "beside the silent ones");
    // They hold their places, and are hung up on when it is time to stop.
    server.stopped().await?;

    let limits = ServerLimits {
        max_connections: 1,
        header_timeout: Duration::from_secs(3),
        ..ServerLimits::default()
    };
    let server = Server::start(Some(tls), hello(), limits).await?;
    let mut silent = TcpStream::connect(server.address).await?;
    let mut stream = Client::new(&files)?.connect(server.address).await?;
    assert!(exchange(&mut stream, GET).await?.ends_with("hello"), "after the silent one");
    let mut byte = [0];
    let closed = timeout(LONG, silent.read(&mut byte)).await?;
    assert!(!matches!(closed, Ok(1..)), "the silent one was closed");
    server.stopped().await
}

#[tokio::test]
async fn a_changed_certificate_is_taken_over_and_a_bad_one_is_not() -> anyhow::Result<()> {
    let files = Files::with_certificate()?;
    let tls = Tls::load(files.settings())?;
    let server = Server::start(Some(tls.clone()), hello(), ServerLimits::default()).await?;
    let client = Client::new(&files)?;
    let mut before = client.connect(server.address).await?;
    let now = OffsetDateTime::now_utc();
    let in_force = async || presented(&client.connect(server.address).await?);
    assert!(!tls.look(now)?, "nothing has changed");

    let second = files.identity(|_| {})?;
    files.write(&second)?;
    assert!(!tls.look(now)?, "it may not be complete yet");
    assert!(tls.look(now)?);
    assert_eq!(&in_force().await?, second.der());
    assert!(exchange(&mut before, GET).await?.ends_with("hello"), "what was open goes on");

    let day = time::Duration::days(1);
    let expired = files.identity(|it| it.not_after = now - day)?;
    let early = files.identity(|it| it.not_before = now + day)?;
    let other = files.identity(|_| {})?;
    type Spoil<'a> = &'a dyn Fn() -> anyhow::Result<()>;
    let write = |name: &str, text: &str| Ok(std::fs::write(files.path(name), text)?);
    let spoilt: [(Spoil<'_>, &str); 6] = [
        (&|| files.write(&expired), "tls.crt expired at"),
        (&|| files.write(&early), "tls.crt is not valid before"),
        (
            &|| {
                files.write(&other)?;
                write("tls.key", &second.key.serialize_pem())
            },
            "is not the one of the certificate",
        ),
        (&|| write("tls.crt", "x"), "tls.crt holds no certificate"),
        (
            &|| {
                files.write(&other)?;
                write("tls.key", "x")
            },
            "tls.key holds no private key",
        ),
        (&|| Ok(std::fs::remove_file(files.path("tls.crt"))?), "could not read"),
    ];
    for (spoil, reason) in spoilt {
        spoil()?;
        assert!(!tls.look(now)?);
        let refused = tls.look(now).err().context("a bad certificate was taken")?;
        assert!(refused.to_string().contains(reason), "{refused}");
        assert!(!tls.look(now)?, "said once");
        assert_eq!(&in_force().await?, second.der(), "after {refused}");
    }
    files.write(&early)?;
    assert!(!tls.look(now)?);
    assert!(tls.look(now).is_err());
    assert!(tls.look(now + day * 2)?, "time has mended it");
    server.stopped().await
}

#[tokio::test]
async fn a_certificate_behind_a_symbolic_link_is_watched() -> anyhow::Result<()> {
    // As Kubernetes lays secrets out: the files are links into a folder that is a link itself.
    let files = Files::new()?;
    let (first, second) = (files.identity(|_| {})?, files.identity(|_| {})?);
    for (folder, identity) in [("1", &first), ("2", &second)] {
        std::fs::create_dir(files.path(folder))?;
        write_pair(&files.path(folder), identity)?;
    }
    let link = |folder: &str| -> anyhow::Result<()> {
        std::os::unix::fs::symlink(folder, files.path("new"))?;
        Ok(std::fs::rename(files.path("new"), files.path("data"))?)
    };
    link("1")?;
    for name in ["tls.crt", "tls.key"] {
        std::os::unix::fs::symlink(format!("data/{name}"), files.path(name))?;
    }
    let tls = Tls::load(files.settings())?;
    let stop = CancellationToken::new();
    let watching = {
        let (tls, stop) = (tls.clone(), stop.clone());
        tokio::spawn(async move { tls.watch(stop).await })
    };
    let server = Server::start(Some(tls), hello(), ServerLimits::default()).await?;
    let client = Client::new(&files)?;
    assert_eq!(&presented(&client.connect(server.address).await?)?, first.der());

    link("2")?;

    eventually(LONG, "the second certificate is in force", async || {
        anyhow::Ok(&presented(&client.connect(server.address).await?)? == second.der())
    })
    .await?;
    stop.cancel();
    watching.await?;
    server.stopped().await
}

#[test]
fn what_cannot_be_served_with_is_refused_at_the_start() -> anyhow::Result<()> {
    let files = Files::new()?;
    assert!(matches!(Tls::load(files.settings()), Err(TlsError::Unreadable(..))));
    files.write(&files.identity(|_| {})?)?;
    std::fs::write(files.path("tls.key"), files.identity(|_| {})?.key.serialize_pem())?;
    assert!(matches!(Tls::load(files.settings()), Err(TlsError::Mismatch { .. })));
    Ok(())
}

#[tokio::test]
async fn an_expired_certificate_is_served_and_told_of_until_a_new_one_comes() -> anyhow::Result<()>
{
    let files = Files::new()?;
    files.write(&files.identity(|it| it.not_after = rcgen::date_time_ymd(2020, 1, 1))?)?;
    let tls = Tls::load(files.settings())?;
    let server = Server::start(Some(tls.clone()), hello(), ServerLimits::default()).await?;
    let now = OffsetDateTime::now_utc();

    let told = tls.valid_at(now).err().context("an expired certificate")?.to_string();
    assert!(told.ends_with("tls.crt expired at 2020-01-01T00:00:00Z"), "{told}");
    let refused = Client::new(&files)?.connect(server.address).await.err();
    let refused = format!("{:#}", refused.context("whoever checks does not connect")?);
    assert!(refused.contains("xpired"), "{refused}");

    files.write(&files.identity(|_| {})?)?;
    assert!(!tls.look(now)? && tls.look(now)?, "seen the same twice");
    tls.valid_at(now)?;
    let mut stream = Client::new(&files)?.connect(server.address).await?;
    assert!(exchange(&mut stream, GET).await?.ends_with("hello"));
    server.stopped().await
}

/// A call to `partners`, with these header lines beside the necessary ones.
fn sign_up(headers: &str) -> String {
    format!(
        "POST /connectors/partners/before-create HTTP/1.1\r\nHost: localhost\r\n\
         Content-Type: application/json\r\nContent-Length: 27\r\nConnection: close\r\n{headers}\r\n\
         {{\"email\":\"ada@example.com\"}}"
    )
}

fn is_let_in(reply: &str) -> anyhow::Result<bool> {
    match reply.split(' ').nth(1) {
        Some("200") => Ok(true),
        Some("401") => Ok(false),
        _ => anyhow::bail!("neither let in nor turned away: {reply}"),
    }
}

fn certificates(settings: CertificateSettings) -> Credential {
    Credential { name: "certificate".to_owned(), kind: CredentialKind::Certificate(settings) }
}

fn names(issuer: &str) -> anyhow::Result<Vec<NamePair>> {
    let subject = r#"O="Contoso, Ltd", CN=caller"#.parse()?;
    Ok(vec![NamePair { issuer: format!("CN={issuer}").parse()?, subject }])
}

#[tokio::test]
async fn a_client_certificate_is_taken_for_what_it_is() -> anyhow::Result<()> {
    let files = Files::with_certificate()?;
    let (root, other_root) = (authority("Callers")?, authority("Callers")?);
    let below = params_of_authority("Below");
    let below = CertifiedIssuer::signed_by(below, KeyPair::generate()?, &root)?;
    let now = OffsetDateTime::now_utc();
    let day = time::Duration::days(1);
    let client = |it: &mut CertificateParams| {
        it.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    };
    let by_sha1 = Identity::for_clients(&other_root, "first")?;
    let by_sha256 = Identity::new(&other_root, "second", |_| {})?;
    let named = Identity::for_clients(&root, "caller")?;
    let mut named_below = Identity::for_clients(&below, "caller")?;
    named_below.chain.push(below.der().clone());
    let alone_below = Identity::for_clients(&below, "caller")?;
    let unknown = Identity::for_clients(&root, "stranger")?;
    let forged = Identity::for_clients(&other_root, "caller")?;
    let for_servers = Identity::new(&root, "caller", |it| {
        it.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    })?;
    let expired = Identity::new(&root, "caller", |it| {
        client(it);
        it.not_after = now - day;
    })?;
    let early = Identity::new(&root, "caller", |it| {
        client(it);
        it.not_before = now + day;
    })?;
    let late_and_pinned = Identity::new(&other_root, "pinned", |it| it.not_after = now - day)?;

    let source = || CertificateSource::Connection;
    let pinned = vec![by_sha1.sha1()?, by_sha256.sha256()?, late_and_pinned.sha1()?];
    let roots = pem(root.der());
    let mut pairs = names("Callers")?;
    pairs.extend(names("Below")?);
    let basic = CredentialKind::Basic { user: "entra".to_owned(), password: "try-me".into() };
    let connector = Connector::new(vec![
        certificates(CertificateSettings::new(source(), pinned, vec![], None)?),
        certificates(CertificateSettings::new(source(), vec![], pairs, Some(roots.as_bytes()))?),
        Credential { name: "pair".to_owned(), kind: basic },
    ])
    .await?;
    let tls = Tls::load(files.settings())?;
    let router = connector.router.clone();
    let server = Server::start(Some(tls), router, ServerLimits::default()).await?;
    let call = async |identity: Option<&Identity>, headers: &str| {
        let client = Client::new(&files)?;
        let client = identity.map_or(Client::new(&files)?, |it| client.with(it));
        let mut stream = client.connect(server.address).await?;
        is_let_in(&exchange(&mut stream, &sign_up(headers)).await?)
    };

    for (what, identity) in [
        ("SHA-1", &by_sha1),
        ("SHA-256, and it does not say what it is for", &by_sha256),
        ("issuer and subject", &named),
        ("through an intermediate one", &named_below),
    ] {
        assert!(call(Some(identity), "").await?, "{what}");
    }
    for (cause, identity) in [
        ("certificate-unknown", &unknown),
        ("certificate-untrusted", &forged),
        ("certificate-untrusted", &alone_below),
        ("certificate-usage", &for_servers),
        ("certificate-expired", &expired),
        ("certificate-expired", &early),
        ("certificate-expired", &late_and_pinned),
    ] {
        let before = connector.denied(cause)?;
        assert!(!call(Some(identity), "").await?, "{cause}");
        assert_eq!(connector.denied(cause)?, before + 1.0, "{cause}");
    }
    assert!(!call(None, "").await?);
    assert_eq!(connector.denied("missing")?, 1.0);
    let password = format!("Authorization: {AUTHORIZATION}\r\n");
    assert!(call(None, &password).await?, "a password will do");
    assert!(call(Some(&unknown), &password).await?, "whatever else is presented");
    server.stopped().await
}

#[tokio::test]
async fn a_resumed_session_is_still_the_one_of_its_certificate() -> anyhow::Result<()> {
    let files = Files::with_certificate()?;
    let root = authority("Callers")?;
    let known = Identity::for_clients(&root, "known")?;
    let unknown = Identity::for_clients(&root, "unknown")?;
    let source = CertificateSource::Connection;
    let settings = CertificateSettings::new(source, vec![known.sha1()?], vec![], None)?;
    let connector = Connector::new(vec![certificates(settings)]).await?;
    let tls = Tls::load(files.settings())?;
    let router = connector.router.clone();
    let server = Server::start(Some(tls), router, ServerLimits::default()).await?;

    for version in [&TLS12, &TLS13] {
        for (identity, let_in) in [(&known, true), (&unknown, false)] {
            let client = Client { versions: vec![version], ..Client::new(&files)? };
            let config = client.with(identity).config()?;
            for kind in [HandshakeKind::Full, HandshakeKind::Resumed] {
                let mut stream = connect(Arc::clone(&config), server.address).await?;
                let reply = exchange(&mut stream, &sign_up("")).await?;
                assert_eq!(stream.get_ref().1.handshake_kind(), Some(kind), "{version:?}");
                assert_eq!(is_let_in(&reply)?, let_in, "{version:?} {kind:?}");
            }
        }
    }
    server.stopped().await
}

fn forwarded(encoding: CertificateEncoding, peers: &str) -> anyhow::Result<CertificateSource> {
    let header = match encoding {
        CertificateEncoding::Base64Der => "x-arr-clientcert",
        CertificateEncoding::UrlEscapedPem => "x-client-cert",
        CertificateEncoding::Xfcc => "x-forwarded-client-cert",
    };
    let (header, peers) = (header.parse()?, vec![peers.parse()?]);
    Ok(CertificateSource::Forwarded(ForwardedCertificate { header, encoding, peers }))
}

/// The header lines in which each kind of proxy forwards a certificate.
fn forwarding(identity: &Identity) -> [(CertificateEncoding, String); 3] {
    let escaped = utf8_percent_encode(&identity.pem(), NON_ALPHANUMERIC).to_string();
    [
        (
            CertificateEncoding::Base64Der,
            format!("X-ARR-ClientCert: {}\r\n", BASE64.encode(identity.der())),
        ),
        (CertificateEncoding::UrlEscapedPem, format!("X-Client-Cert: {escaped}\r\n")),
        (
            CertificateEncoding::Xfcc,
            format!(
                "X-Forwarded-Client-Cert: By=spiffe://x;Hash=00;Cert=\"{escaped}\";Subject=\"CN=a\"\r\n"
            ),
        ),
    ]
}

#[tokio::test]
async fn a_forwarded_certificate_counts_from_a_named_proxy_only() -> anyhow::Result<()> {
    let files = Files::with_certificate()?;
    let root = authority("Callers")?;
    let caller = Identity::for_clients(&root, "caller")?;
    let stranger = Identity::for_clients(&root, "stranger")?;
    for ((encoding, right), (_, wrong)) in
        forwarding(&caller).into_iter().zip(forwarding(&stranger))
    {
        let credential = |peers: &str| {
            let (source, allowed) = (forwarded(encoding, peers)?, vec![caller.sha1()?]);
            anyhow::Ok(certificates(CertificateSettings::new(source, allowed, vec![], None)?))
        };
        let near = Connector::new(vec![credential("127.0.0.0/8")?]).await?;
        let far = Connector::new(vec![credential("10.0.0.0/8")?]).await?;
        let limits = ServerLimits::default;
        let proxied = Server::start(None, near.router.clone(), limits()).await?;
        let direct = Server::start(None, far.router.clone(), limits()).await?;
        let with_tls =
            Server::start(Some(Tls::load(files.settings())?), near.router.clone(), limits())
                .await?;
        let call = async |server: &Server, headers: &str| {
            let mut stream = TcpStream::connect(server.address).await?;
            is_let_in(&exchange(&mut stream, &sign_up(headers)).await?)
        };

        assert!(call(&proxied, &right).await?, "{encoding:?}");
        assert!(!call(&proxied, &wrong).await?, "{encoding:?}");
        assert_eq!(near.denied("certificate-unknown")?, 1.0);
        assert!(!call(&proxied, "").await?);
        assert_eq!(near.denied("missing")?, 1.0);
        let (name, _) = right.split_once(':').context("a header")?;
        assert!(!call(&proxied, &format!("{name}: x\r\n")).await?);
        assert_eq!(near.denied("malformed")?, 1.0);
        // The caller's own header before that of the proxy: of the proxy's is asked, or of none.
        assert!(!call(&proxied, &format!("{right}{wrong}")).await?);

        assert!(!call(&direct, &right).await?, "{encoding:?} from elsewhere");
        assert_eq!(far.denied("forwarded-by-stranger")?, 1.0);
        let mut stream = Client::new(&files)?.connect(with_tls.address).await?;
        let reply = exchange(&mut stream, &sign_up(&right)).await?;
        assert!(!is_let_in(&reply)?, "{encoding:?} of a caller whose TLS ends here");
        assert_eq!(near.denied("forwarded-by-stranger")?, 1.0);
        for server in [proxied, direct, with_tls] {
            server.stopped().await?;
        }
    }
    Ok(())
}

#[tokio::test]
async fn a_forwarded_certificate_must_hold_like_any_other() -> anyhow::Result<()> {
    let (root, other_root) = (authority("Callers")?, authority("Callers")?);
    let now = OffsetDateTime::now_utc();
    let caller = Identity::for_clients(&root, "caller")?;
    let forged = Identity::for_clients(&other_root, "caller")?;
    let expired = Identity::new(&root, "caller", |it| {
        it.not_after = now - time::Duration::days(1);
    })?;
    let for_servers = Identity::new(&root, "caller", |it| {
        it.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    })?;
    let source = forwarded(CertificateEncoding::Base64Der, "127.0.0.1")?;
    let roots = pem(other_root.der()) + &pem(root.der());
    let first_root_only = pem(root.der());
    let both = CertificateSettings::new(
        source.clone(),
        vec![],
        names("Callers")?,
        Some(roots.as_bytes()),
    )?;
    let one = CertificateSettings::new(
        source,
        vec![],
        names("Callers")?,
        Some(first_root_only.as_bytes()),
    )?;
    let lax = Connector::new(vec![certificates(both)]).await?;
    let strict = Connector::new(vec![certificates(one)]).await?;
    let lax_server = Server::start(None, lax.router.clone(), ServerLimits::default()).await?;
    let strict_server = Server::start(None, strict.router.clone(), ServerLimits::default()).await?;
    let call = async |server: &Server, identity: &Identity| {
        let [(_, header), ..] = forwarding(identity);
        let mut stream = TcpStream::connect(server.address).await?;
        is_let_in(&exchange(&mut stream, &sign_up(&header)).await?)
    };

    assert!(call(&strict_server, &caller).await?);
    assert!(!call(&strict_server, &forged).await?);
    assert_eq!(strict.denied("certificate-untrusted")?, 1.0);
    assert!(!call(&strict_server, &expired).await?);
    assert_eq!(strict.denied("certificate-expired")?, 1.0);
    assert!(!call(&strict_server, &for_servers).await?);
    assert_eq!(strict.denied("certificate-usage")?, 1.0);
    assert!(call(&lax_server, &forged).await?, "where its root is among several");
    lax_server.stopped().await?;
    strict_server.stopped().await
}
