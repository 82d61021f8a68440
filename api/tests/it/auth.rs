//! Who is let in: keys, fixed tokens, and tokens of an issuer that publishes its keys.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::Context as _;
use axum::{
    Json, Router,
    body::Body,
    extract::State,
    http::{HeaderName, Request, StatusCode, header},
    response::{IntoResponse as _, Response},
    routing::get,
};
use data_encoding::BASE64URL_NOPAD;
use http_body_util::BodyExt as _;
use prometheus_client::registry::Registry;
use ring::{
    hmac,
    rand::SystemRandom,
    signature::{
        ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair as _, RSA_PKCS1_SHA256,
        RSA_PKCS1_SHA384, RSA_PKCS1_SHA512, RSA_PSS_SHA256, RSA_PSS_SHA384, RSA_PSS_SHA512,
        RsaEncoding, RsaKeyPair,
    },
};
use rustls::pki_types::{PrivatePkcs8KeyDer, pem::PemObject as _};
use serde_json::{Value, json};
use time::OffsetDateTime;
use tokio::{net::TcpListener, task::JoinHandle};
use tokio_util::sync::CancellationToken;
use tower::ServiceExt as _;
use vestibule_api::{
    Api, BearerSettings, BearerVerifier, ConnectorSettings, Credential, CredentialKind, FetchError,
    router,
};
use vestibule_events::{LocalLog, LocalLogConfig, PseudonymKey, Retention};
use vestibule_testkit::eventually;

/// A connector `partners` with these credentials alone.
pub(crate) struct Connector {
    pub(crate) router: Router,
    registry: Registry,
    _folder: tempfile::TempDir,
}

impl Connector {
    pub(crate) async fn new(credentials: Vec<Credential>) -> anyhow::Result<Self> {
        let folder = tempfile::tempdir()?;
        let log = LocalLog::open(LocalLogConfig {
            path: folder.path().join("events.db"),
            duplicate_window: Duration::from_secs(600),
            refusal_window: Duration::from_secs(30),
            retention: Retention::For(Duration::from_secs(86_400)),
        })
        .await?;
        let mut registry = Registry::default();
        let key = Arc::new(PseudonymKey::new(vec![7; 32]));
        let settings =
            ConnectorSettings { credentials, ..ConnectorSettings::new("partners".parse()?) };
        let api = Api::new(Arc::new(log), key, vec![settings], &mut registry)?;
        Ok(Self { router: router(api), registry, _folder: folder })
    }

    /// How a call with this header is answered, and how it is challenged.
    async fn call(
        &self,
        name: HeaderName,
        value: &str,
    ) -> anyhow::Result<(StatusCode, Vec<String>)> {
        let request = Request::post("/connectors/partners/before-create")
            .header(header::CONTENT_TYPE, "application/json")
            .header(name, value)
            .body(Body::from(r#"{"email":"ada@example.com"}"#))?;
        let (head, body) = self.router.clone().oneshot(request).await?.into_parts();
        body.collect().await?;
        let challenges = head.headers.get_all(header::WWW_AUTHENTICATE).iter();
        let challenges = challenges.map(|it| Ok(it.to_str()?.to_owned()));
        Ok((head.status, challenges.collect::<anyhow::Result<_>>()?))
    }

    async fn bearer(&self, token: &str) -> anyhow::Result<StatusCode> {
        Ok(self.call(header::AUTHORIZATION, &format!("Bearer {token}")).await?.0)
    }

    /// The value of a metric of this connector, 0 while there is none.
    pub(crate) fn metric(&self, name: &str, label: &str) -> anyhow::Result<f64> {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry)?;
        let series = format!(r#"{name}{{connector="partners",{label}}} "#);
        match text.lines().find_map(|line| line.strip_prefix(series.as_str())) {
            Some(value) => Ok(value.parse()?),
            None => Ok(0.0),
        }
    }

    /// Which refusals were counted, each time one.
    pub(crate) fn denied(&self, cause: &str) -> anyhow::Result<f64> {
        self.metric("vestibule_connector_denied_total", &format!(r#"cause="{cause}""#))
    }
}

/// So long a test waits for what is bound to come.
const LIMIT: Duration = Duration::from_secs(30);

/// A place where an issuer publishes what we want to know, and where all may go wrong.
struct Issuer {
    address: std::net::SocketAddr,
    published: Arc<Published>,
    serving: JoinHandle<()>,
}

struct Published {
    metadata: Mutex<Value>,
    keys: Mutex<Value>,
    down: Mutex<Option<StatusCode>>,
    fetches: AtomicUsize,
}

fn set<T>(place: &Mutex<T>, value: T) {
    *place.lock().unwrap_or_else(PoisonError::into_inner) = value;
}

fn read<T: Clone>(place: &Mutex<T>) -> T {
    place.lock().unwrap_or_else(PoisonError::into_inner).clone()
}

impl Issuer {
    const NAME: &'static str = "https://login.test/tenant-1/v2.0";

    async fn start(keys: &[Value]) -> anyhow::Result<Self> {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
        let address = listener.local_addr()?;
        let jwks_uri = format!("http://{address}/discovery/v2.0/keys");
        let published = Arc::new(Published {
            metadata: Mutex::new(json!({ "issuer": Self::NAME, "jwks_uri": jwks_uri, "more": 1 })),
            keys: Mutex::new(json!({ "keys": keys })),
            down: Mutex::new(None),
            fetches: AtomicUsize::new(0),
        });
        async fn give_metadata(State(published): State<Arc<Published>>) -> Response {
            published.fetches.fetch_add(1, Ordering::SeqCst);
            match read(&published.down) {
                Some(status) => (status, [(header::LOCATION, "/elsewhere")]).into_response(),
                None => Json(read(&published.metadata)).into_response(),
            }
        }
        async fn give_keys(State(published): State<Arc<Published>>) -> Response {
            Json(read(&published.keys)).into_response()
        }
        let router = Router::new()
            .route("/v2.0/.well-known/openid-configuration", get(give_metadata))
            .route("/elsewhere", get(give_metadata))
            .route("/discovery/v2.0/keys", get(give_keys))
            .with_state(Arc::clone(&published));
        let serving = tokio::spawn(async move {
            let _ = axum::serve(listener, router).await;
        });
        Ok(Self { address, published, serving })
    }

    fn publish(&self, keys: &[Value]) {
        set(&self.published.keys, json!({ "keys": keys }));
    }

    fn fetches(&self) -> usize {
        self.published.fetches.load(Ordering::SeqCst)
    }

    fn settings(&self) -> BearerSettings {
        let url = format!("http://{}/v2.0/.well-known/openid-configuration", self.address);
        let mut settings = BearerSettings::new(url, vec![AUDIENCE.to_owned()]);
        settings.tenants = vec![TENANT.to_owned()];
        settings
    }

    fn verifier(&self, settings: BearerSettings) -> anyhow::Result<Arc<BearerVerifier>> {
        let _ = rustls::crypto::ring::default_provider().install_default();
        Ok(Arc::new(BearerVerifier::new(settings, reqwest::Client::new())?))
    }
}

impl Drop for Issuer {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

const AUDIENCE: &str = "c0ffee00-0000-4000-8000-000000000001";
const TENANT: &str = "c0ffee00-0000-4000-8000-000000000002";

fn entra(verifier: &Arc<BearerVerifier>) -> Credential {
    let kind = CredentialKind::Bearer(Arc::clone(verifier));
    Credential { name: "entra".to_owned(), kind }
}

/// What signs tokens.
enum Signer {
    Rsa(RsaKeyPair),
    P256(EcdsaKeyPair),
}

impl Signer {
    /// One of two RSA keys made for these tests.
    fn rsa(number: usize) -> anyhow::Result<Self> {
        const KEYS: [&str; 2] = [
            include_str!("../keys/test-only-rsa-1.pem"),
            include_str!("../keys/test-only-rsa-2.pem"),
        ];
        let key = PrivatePkcs8KeyDer::from_pem_slice(KEYS[number].as_bytes())?;
        let pair = RsaKeyPair::from_pkcs8(key.secret_pkcs8_der());
        Ok(Self::Rsa(pair.map_err(|error| anyhow::anyhow!("{error}"))?))
    }

    fn p256() -> anyhow::Result<Self> {
        let (algorithm, random) = (&ECDSA_P256_SHA256_FIXED_SIGNING, SystemRandom::new());
        let unusable = |_| anyhow::anyhow!("could not make a key");
        let key = EcdsaKeyPair::generate_pkcs8(algorithm, &random).map_err(unusable)?;
        let pair = EcdsaKeyPair::from_pkcs8(algorithm, key.as_ref(), &random);
        Ok(Self::P256(pair.map_err(|error| anyhow::anyhow!("{error}"))?))
    }

    /// As an issuer publishes it.
    fn published(&self, id: &str) -> Value {
        match self {
            Self::Rsa(key) => {
                let public = ring::rsa::PublicKeyComponents::<Vec<u8>>::from(key.public());
                let (n, e) = (number(&public.n), number(&public.e));
                json!({ "kty": "RSA", "use": "sig", "kid": id, "n": n, "e": e, "x5c": ["MII"] })
            }
            Self::P256(key) => {
                let (x, y) = key.public_key().as_ref()[1..].split_at(32);
                json!({ "kty": "EC", "crv": "P-256", "kid": id, "x": number(x), "y": number(y) })
            }
        }
    }

    fn token(&self, algorithm: &str, id: &str, claims: &Value) -> anyhow::Result<String> {
        let signed = unsigned(&json!({ "typ": "JWT", "alg": algorithm, "kid": id }), claims);
        let random = SystemRandom::new();
        let signature = match self {
            Self::Rsa(key) => {
                let padding: &'static dyn RsaEncoding = match algorithm {
                    "RS256" => &RSA_PKCS1_SHA256,
                    "RS384" => &RSA_PKCS1_SHA384,
                    "RS512" => &RSA_PKCS1_SHA512,
                    "PS256" => &RSA_PSS_SHA256,
                    "PS384" => &RSA_PSS_SHA384,
                    _ => &RSA_PSS_SHA512,
                };
                let mut signature = vec![0; key.public().modulus_len()];
                key.sign(padding, &random, signed.as_bytes(), &mut signature)
                    .ok()
                    .context("could not sign")?;
                signature
            }
            Self::P256(key) => {
                let signature = key.sign(&random, signed.as_bytes()).ok();
                signature.context("could not sign")?.as_ref().to_vec()
            }
        };
        Ok(format!("{signed}.{}", number(&signature)))
    }
}

fn number(bytes: &[u8]) -> String {
    BASE64URL_NOPAD.encode(bytes)
}

fn unsigned(header: &Value, claims: &Value) -> String {
    let part = |it: &Value| number(it.to_string().as_bytes());
    format!("{}.{}", part(header), part(claims))
}

/// Claims as Entra makes them for custom authentication extensions, to spoil.
fn claims() -> Value {
    let now = OffsetDateTime::now_utc().unix_timestamp();
    json!({
        "aud": AUDIENCE, "iss": Issuer::NAME, "iat": now, "nbf": now, "exp": now + 3600,
        "azp": BearerSettings::MICROSOFT, "azpacr": "2", "tid": TENANT, "ver": "2.0",
    })
}

fn with(change: impl FnOnce(&mut Value)) -> Value {
    let mut claims = claims();
    change(&mut claims);
    claims
}

#[tokio::test]
async fn a_right_token_is_let_in_whatever_its_key() -> anyhow::Result<()> {
    let (rsa, p256) = (Signer::rsa(0)?, Signer::p256()?);
    let issuer = Issuer::start(&[rsa.published("r"), p256.published("e")]).await?;
    let verifier = issuer.verifier(issuer.settings())?;
    verifier.refresh().await?;
    let connector = Connector::new(vec![entra(&verifier)]).await?;

    for algorithm in ["RS256", "RS384", "RS512", "PS256", "PS384", "PS512"] {
        let token = rsa.token(algorithm, "r", &claims())?;
        assert_eq!(connector.bearer(&token).await?, StatusCode::OK, "{algorithm}");
    }
    let token = p256.token("ES256", "e", &claims())?;
    assert_eq!(connector.bearer(&token).await?, StatusCode::OK, "ES256");

    let label = r#"credential="entra""#;
    assert_eq!(connector.metric("vestibule_connector_credential_uses_total", label)?, 7.0);
    let used = connector.metric("vestibule_connector_credential_last_used_seconds", label)?;
    let now = OffsetDateTime::now_utc().unix_timestamp() as f64;
    assert!((now - 60.0..=now).contains(&used), "{used}");
    Ok(())
}

#[tokio::test]
async fn each_thing_that_is_wrong_is_enough() -> anyhow::Result<()> {
    let signer = Signer::rsa(0)?;
    let issuer = Issuer::start(&[signer.published("1")]).await?;
    let verifier = issuer.verifier(issuer.settings())?;
    verifier.refresh().await?;
    let connector = Connector::new(vec![entra(&verifier)]).await?;
    let now = OffsetDateTime::now_utc().unix_timestamp();

    let spoilt = [
        ("token-issuer", with(|it| it["iss"] = json!("https://login.test/tenant-2/v2.0"))),
        ("token-audience", with(|it| it["aud"] = json!("c0ffee00-0000-4000-8000-000000000009"))),
        ("token-caller", with(|it| it["azp"] = json!(AUDIENCE))),
        ("token-tenant", with(|it| it["tid"] = json!(AUDIENCE))),
        ("token-expired", with(|it| it["exp"] = json!(now - 120))),
        ("token-not-yet-valid", with(|it| it["nbf"] = json!(now + 120))),
    ];
    for (cause, claims) in spoilt {
        let token = signer.token("RS256", "1", &claims)?;
        let (status, challenges) =
            connector.call(header::AUTHORIZATION, &format!("Bearer {token}")).await?;
        assert_eq!(status, StatusCode::UNAUTHORIZED, "{cause}");
        assert_eq!(challenges, [r#"Bearer realm="vestibule""#]);
        assert_eq!(connector.denied(cause)?, 1.0, "{cause}");
    }
    let right = signer.token("RS256", "1", &claims())?;
    assert_eq!(connector.bearer(&right).await?, StatusCode::OK, "the rest of it was right");
    Ok(())
}

#[tokio::test]
async fn a_signature_by_anything_else_is_none() -> anyhow::Result<()> {
    let (signer, stranger, p256) = (Signer::rsa(0)?, Signer::rsa(1)?, Signer::p256()?);
    let issuer = Issuer::start(&[signer.published("r"), p256.published("e")]).await?;
    let verifier = issuer.verifier(issuer.settings())?;
    verifier.refresh().await?;
    let connector = Connector::new(vec![entra(&verifier)]).await?;
    let right = signer.token("RS256", "r", &claims())?;
    let (signed, signature) = right.rsplit_once('.').context("three parts")?;

    // A public key is no secret: whoever used it as one for HS256 would take anybody's token.
    let public = signer.published("r");
    let modulus = BASE64URL_NOPAD.decode(public["n"].as_str().context("n")?.as_bytes())?;
    let by_secret = |alg: &str| {
        let content = unsigned(&json!({ "alg": alg, "kid": "r" }), &claims());
        let key = hmac::Key::new(hmac::HMAC_SHA256, &modulus);
        format!("{content}.{}", number(hmac::sign(&key, content.as_bytes()).as_ref()))
    };
    let none = unsigned(&json!({ "alg": "none", "kid": "r" }), &claims());
    let own_key = json!({ "alg": "RS256", "kid": "r", "jwk": stranger.published("r") });
    let other_claims = unsigned(
        &json!({ "typ": "JWT", "alg": "RS256", "kid": "r" }),
        &with(|it| it["exp"] = json!(4_000_000_000_u64)),
    );
    for (cause, token) in [
        ("token-algorithm", format!("{none}.")),
        ("token-algorithm", format!("{none}.{signature}")),
        ("token-algorithm", by_secret("HS256")),
        ("token-signature", by_secret("RS256")),
        ("token-algorithm", p256.token("ES256", "r", &claims())?),
        ("token-algorithm", signer.token("RS256", "e", &claims())?),
        ("token-signature", stranger.token("RS256", "r", &claims())?),
        ("token-signature", format!("{}.{signature}", unsigned(&own_key, &claims()))),
        ("token-signature", format!("{other_claims}.{signature}")),
        ("token-signature", format!("{signed}.")),
        ("token-key-unknown", signer.token("RS256", "x", &claims())?),
        ("malformed", signed.to_owned()),
        ("malformed", format!("{right}.")),
    ] {
        let before = connector.denied(cause)?;
        assert_eq!(connector.bearer(&token).await?, StatusCode::UNAUTHORIZED, "{cause} {token}");
        assert_eq!(connector.denied(cause)?, before + 1.0, "{cause} {token}");
    }
    assert_eq!(connector.bearer(&right).await?, StatusCode::OK);
    Ok(())
}

#[tokio::test]
async fn a_second_issuer_is_accepted_where_it_was_named() -> anyhow::Result<()> {
    let signer = Signer::rsa(0)?;
    let issuer = Issuer::start(&[signer.published("1")]).await?;
    let extra = format!("https://{TENANT}.ciamlogin.com/{TENANT}/v2.0");
    let mut settings = issuer.settings();
    settings.issuers.push(extra.clone());
    let verifier = issuer.verifier(settings)?;
    verifier.refresh().await?;
    let connector = Connector::new(vec![entra(&verifier)]).await?;

    for (name, status) in [
        (extra.as_str(), StatusCode::OK),
        (Issuer::NAME, StatusCode::OK),
        (&format!("{extra}/"), StatusCode::UNAUTHORIZED),
        (&extra.replace("https", "http"), StatusCode::UNAUTHORIZED),
    ] {
        let token = signer.token("RS256", "1", &with(|it| it["iss"] = json!(name)))?;
        assert_eq!(connector.bearer(&token).await?, status, "{name}");
    }
    Ok(())
}

#[tokio::test]
async fn a_new_key_is_fetched_soon_after_a_token_came_with_it() -> anyhow::Result<()> {
    let (old, new) = (Signer::rsa(0)?, Signer::rsa(1)?);
    let issuer = Issuer::start(&[old.published("old")]).await?;
    let mut settings = issuer.settings();
    settings.ask_apart = Duration::from_millis(20);
    let verifier = issuer.verifier(settings)?;
    let connector = Connector::new(vec![entra(&verifier)]).await?;
    let stop = CancellationToken::new();
    let running = tokio::spawn(Arc::clone(&verifier).run(stop.clone()));
    eventually(LIMIT, "keys are there", async || anyhow::Ok(verifier.has_keys())).await?;
    let (by_old, by_new) =
        (old.token("RS256", "old", &claims())?, new.token("RS256", "new", &claims())?);
    assert_eq!(connector.bearer(&by_old).await?, StatusCode::OK);

    issuer.publish(&[new.published("new"), old.published("old")]);

    assert_eq!(connector.bearer(&by_new).await?, StatusCode::UNAUTHORIZED, "nothing is waited for");
    assert_eq!(connector.denied("token-key-unknown")?, 1.0);
    eventually(LIMIT, "the new key is known", async || {
        anyhow::Ok(connector.bearer(&by_new).await? == StatusCode::OK)
    })
    .await?;
    assert_eq!(connector.bearer(&by_old).await?, StatusCode::OK, "both are published");

    issuer.publish(&[new.published("new")]);
    verifier.refresh().await?;
    assert_eq!(connector.bearer(&by_old).await?, StatusCode::UNAUTHORIZED, "withdrawn");
    assert_eq!(connector.bearer(&by_new).await?, StatusCode::OK);
    stop.cancel();
    Ok(running.await?)
}

#[tokio::test]
async fn forged_keys_cause_no_storm() -> anyhow::Result<()> {
    let signer = Signer::rsa(0)?;
    let issuer = Issuer::start(&[signer.published("1")]).await?;
    let mut settings = issuer.settings();
    settings.ask_apart = Duration::from_millis(100);
    let (apart, verifier) = (settings.ask_apart, issuer.verifier(settings)?);
    let connector = Connector::new(vec![entra(&verifier)]).await?;
    let begun = Instant::now();
    let stop = CancellationToken::new();
    let running = tokio::spawn(Arc::clone(&verifier).run(stop.clone()));
    eventually(LIMIT, "keys are there", async || anyhow::Ok(verifier.has_keys())).await?;
    let forged = signer.token("RS256", "forged", &claims())?;

    eventually(LIMIT, "the forged key was asked for", async || {
        for _ in 0..50 {
            connector.bearer(&forged).await?;
        }
        anyhow::Ok(issuer.fetches() >= 4)
    })
    .await?;

    let most = 1 + begun.elapsed().as_millis() / apart.as_millis();
    assert!(issuer.fetches() as u128 <= most, "{} fetches, at most {most}", issuer.fetches());
    stop.cancel();
    Ok(running.await?)
}

#[tokio::test]
async fn tokens_for_somebody_else_have_no_keys_fetched() -> anyhow::Result<()> {
    let signer = Signer::rsa(0)?;
    let issuer = Issuer::start(&[signer.published("1")]).await?;
    let mut settings = issuer.settings();
    settings.ask_apart = Duration::ZERO;
    let verifier = issuer.verifier(settings)?;
    let connector = Connector::new(vec![entra(&verifier)]).await?;
    let stop = CancellationToken::new();
    let running = tokio::spawn(Arc::clone(&verifier).run(stop.clone()));
    eventually(LIMIT, "keys are there", async || anyhow::Ok(verifier.has_keys())).await?;

    let strange = signer.token("RS256", "unknown", &with(|it| it["aud"] = json!("them")))?;
    for _ in 0..100 {
        assert_eq!(connector.bearer(&strange).await?, StatusCode::UNAUTHORIZED);
    }
    assert_eq!(issuer.fetches(), 1);
    let ours = signer.token("RS256", "unknown", &claims())?;
    assert_eq!(connector.bearer(&ours).await?, StatusCode::UNAUTHORIZED);
    eventually(LIMIT, "keys are fetched for us", async || anyhow::Ok(issuer.fetches() == 2))
        .await?;
    stop.cancel();
    Ok(running.await?)
}

#[tokio::test]
async fn without_the_issuer_the_last_keys_hold_and_without_any_nobody_gets_in() -> anyhow::Result<()>
{
    let signer = Signer::rsa(0)?;
    let issuer = Issuer::start(&[signer.published("1")]).await?;
    set(&issuer.published.down, Some(StatusCode::SERVICE_UNAVAILABLE));
    let verifier = issuer.verifier(issuer.settings())?;
    let connector = Connector::new(vec![entra(&verifier)]).await?;
    let token = signer.token("RS256", "1", &claims())?;
    let stop = CancellationToken::new();
    let running = tokio::spawn(Arc::clone(&verifier).run(stop.clone()));
    eventually(LIMIT, "it was tried", async || anyhow::Ok(issuer.fetches() > 0)).await?;
    assert_eq!(connector.bearer(&token).await?, StatusCode::UNAUTHORIZED);
    assert_eq!(connector.denied("token-keys-missing")?, 1.0);
    assert!(!verifier.has_keys() && verifier.keys_fetched().is_none());
    let fetched = || {
        let label = r#"credential="entra""#;
        connector.metric("vestibule_connector_bearer_keys_fetched_seconds", label)
    };
    assert_eq!(fetched()?, 0.0);

    set(&issuer.published.down, None);
    eventually(LIMIT, "the keys were fetched in the end", async || anyhow::Ok(verifier.has_keys()))
        .await?;
    assert_eq!(connector.bearer(&token).await?, StatusCode::OK);
    let when = verifier.keys_fetched().context("they were fetched")?;
    assert_eq!(fetched()?, when.unix_timestamp() as f64);

    set(&issuer.published.down, Some(StatusCode::SERVICE_UNAVAILABLE));
    let refused = verifier.refresh().await;
    assert!(matches!(refused, Err(FetchError::Status(_, StatusCode::SERVICE_UNAVAILABLE))));
    assert_eq!(connector.bearer(&token).await?, StatusCode::OK, "the last keys stay in force");
    stop.cancel();
    Ok(running.await?)
}

#[tokio::test]
async fn what_is_no_set_of_keys_changes_nothing() -> anyhow::Result<()> {
    let signer = Signer::rsa(0)?;
    let issuer = Issuer::start(&[signer.published("1")]).await?;
    let verifier = issuer.verifier(issuer.settings())?;
    verifier.refresh().await?;
    let right = read(&issuer.published.metadata);

    issuer.publish(&[]);
    assert!(matches!(verifier.refresh().await, Err(FetchError::NoKeys(_))));
    issuer.publish(&[json!({ "kid": "x".repeat(600_000) })]);
    assert!(matches!(verifier.refresh().await, Err(FetchError::TooLong(_))));
    issuer.publish(&[signer.published("1")]);
    set(&issuer.published.metadata, json!({ "issuer": Issuer::NAME }));
    assert!(matches!(verifier.refresh().await, Err(FetchError::NotMetadata(_))));
    let mut of_all = right.clone();
    of_all["issuer"] = json!("https://login.test/{tenantid}/v2.0");
    set(&issuer.published.metadata, of_all);
    assert!(matches!(verifier.refresh().await, Err(FetchError::EveryTenant(_))));
    let elsewhere = json!({ "issuer": Issuer::NAME, "jwks_uri": "http://keys.test/keys" });
    set(&issuer.published.metadata, elsewhere);
    assert!(matches!(verifier.refresh().await, Err(FetchError::NotPrivate(_))));
    set(&issuer.published.metadata, right);
    set(&issuer.published.down, Some(StatusCode::FOUND));
    assert!(verifier.refresh().await.is_err());
    set(&issuer.published.down, None);

    let connector = Connector::new(vec![entra(&verifier)]).await?;
    let token = signer.token("RS256", "1", &claims())?;
    assert_eq!(connector.bearer(&token).await?, StatusCode::OK);
    Ok(())
}

#[tokio::test]
async fn old_and_new_credentials_of_several_kinds_at_once() -> anyhow::Result<()> {
    let signer = Signer::rsa(0)?;
    let issuer = Issuer::start(&[signer.published("1")]).await?;
    let other_issuer = Issuer::start(&[signer.published("1")]).await?;
    let mut settings = other_issuer.settings();
    settings.audiences = vec!["another".to_owned()];
    let (verifier, other) = (issuer.verifier(issuer.settings())?, issuer.verifier(settings)?);
    verifier.refresh().await?;
    other.refresh().await?;
    let key = HeaderName::from_static("x-functions-key");
    let connector = Connector::new(vec![
        Credential {
            name: "pair".to_owned(),
            kind: CredentialKind::Basic { user: "entra".to_owned(), password: "try-me".into() },
        },
        Credential {
            name: "key".to_owned(),
            kind: CredentialKind::ApiKey { header: key.clone(), key: "secret".into() },
        },
        Credential {
            name: "fixed".to_owned(),
            kind: CredentialKind::Token { token: "opaque".into() },
        },
        Credential { name: "other".to_owned(), kind: CredentialKind::Bearer(other) },
        entra(&verifier),
    ])
    .await?;
    let token = signer.token("RS256", "1", &claims())?;

    for (name, header, value) in [
        ("pair", header::AUTHORIZATION, crate::support::AUTHORIZATION),
        ("key", key.clone(), "secret"),
        ("fixed", header::AUTHORIZATION, "Bearer opaque"),
        ("entra", header::AUTHORIZATION, &format!("Bearer {token}")),
    ] {
        assert_eq!(connector.call(header, value).await?.0, StatusCode::OK, "{name}");
        let label = format!(r#"credential="{name}""#);
        assert_eq!(connector.metric("vestibule_connector_credential_uses_total", &label)?, 1.0);
    }
    let (status, challenges) = connector.call(key, "guess").await?;
    assert_eq!(status, StatusCode::UNAUTHORIZED);
    let schemes: Vec<_> = challenges.iter().filter_map(|it| it.split(' ').next()).collect();
    assert_eq!(schemes, ["Basic", "Bearer", "ApiKey"]);
    assert_eq!(connector.denied("wrong")?, 1.0);
    Ok(())
}
