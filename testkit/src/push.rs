//! Stand-ins for the push services of browsers, of Firebase and of Apple, which nobody can run.
//!
//! Each checks what the real one checks (tokens and their signatures, headers that must be there) and
//! refuses as it does. Failures are planned by the test. A browser reads what it is sent; its key
//! serves for one message, later ones are only counted. They answer from a thread of their own, over
//! HTTP/1 and HTTP/2, so a test may block.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use anyhow::{Context, anyhow};
use axum::{
    Router,
    body::Bytes,
    extract::{Request, State},
    http::{HeaderMap, StatusCode, Version, header},
    response::{IntoResponse, Response},
};
use data_encoding::{BASE64, BASE64URL_NOPAD};
use ring::{
    aead::{AES_128_GCM, Aad, LessSafeKey, Nonce, UnboundKey},
    agreement::{ECDH_P256, EphemeralPrivateKey, UnparsedPublicKey, agree_ephemeral},
    hkdf::{HKDF_SHA256, KeyType, Salt},
    rand::{SecureRandom, SystemRandom},
    signature::{
        self, ECDSA_P256_SHA256_FIXED, ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair,
        RSA_PKCS1_2048_8192_SHA256, RsaKeyPair,
    },
};
use serde_json::{Value, json};
use time::OffsetDateTime;
use tokio::net::TcpListener;

use crate::background::Background;

/// Made for tests; it opens nothing anywhere.
const ACCOUNT_KEY: &str = include_str!("../../api/tests/keys/test-only-rsa-1.pem");

/// Push services; when they are dropped their server ends.
#[derive(Debug)]
pub struct PushServices {
    shared: Arc<Shared>,
    url: String,
    _server: Background,
}

/// Which service was called.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PushCall {
    Browser,
    /// Google's token service.
    Token,
    Firebase,
    Apple,
}

/// A call that came, whatever was answered.
#[derive(Clone, Debug)]
pub struct PushRequest {
    pub call: PushCall,
    pub path: String,
    pub headers: BTreeMap<String, String>,
    pub body: Vec<u8>,
    pub is_http2: bool,
    pub status: u16,
}

impl PushRequest {
    #[must_use]
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_default()
    }
}

#[derive(Debug)]
struct Shared {
    vapid: KeyHalves,
    apple: KeyHalves,
    apple_pem: String,
    account: RsaKeyPair,
    state: Mutex<Knows>,
}

#[derive(Debug)]
struct KeyHalves {
    private: Vec<u8>,
    public: Vec<u8>,
}

#[derive(Default)]
struct Knows {
    plans: HashMap<PushCall, VecDeque<Plan>>,
    requests: Vec<PushRequest>,
    browsers: HashMap<String, Browser>,
    tokens: u32,
}

impl std::fmt::Debug for Knows {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Knows({} requests)", self.requests.len())
    }
}

/// A status, a body and a `Retry-After`.
type Plan = (u16, String, Option<&'static str>);

struct Browser {
    key: Option<EphemeralPrivateKey>,
    public_key: Vec<u8>,
    auth: [u8; 16],
    read: Option<Vec<u8>>,
}

impl PushServices {
    pub const PROJECT: &str = "vestibule-test";
    pub const KEY_ID: &str = "ABC123DEFG";
    pub const TEAM_ID: &str = "DEF123GHIJ";
    pub const TOPIC: &str = "com.example.vestibule";

    pub async fn start() -> anyhow::Result<Self> {
        let lines = ACCOUNT_KEY.lines().skip_while(|line| !line.starts_with("-----BEGIN"));
        let body: String = lines.filter(|line| !line.starts_with('-')).collect();
        let account = RsaKeyPair::from_pkcs8(&BASE64.decode(body.as_bytes())?);
        let account = account.ok().context("could not read the key of the service account")?;
        let (vapid, _) = elliptic()?;
        let (apple, apple_pem) = elliptic()?;
        let state = Mutex::default();
        let shared = Arc::new(Shared { vapid, apple, apple_pem, account, state });
        let router = Router::new().fallback(answer).with_state(Arc::clone(&shared));
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let url = format!("http://{}", listener.local_addr()?);
        let server = Background::serve("push services", listener, router)?;
        Ok(Self { shared, url, _server: server })
    }

    /// Where Firebase and Apple are.
    #[must_use]
    pub fn url(&self) -> String {
        self.url.clone()
    }

    /// The key that pages subscribe with.
    #[must_use]
    pub fn vapid_public_key(&self) -> String {
        BASE64URL_NOPAD.encode(&self.shared.vapid.public)
    }

    #[must_use]
    pub fn vapid_private_key(&self) -> String {
        BASE64URL_NOPAD.encode(&self.shared.vapid.private)
    }

    /// The key file of a service account.
    #[must_use]
    pub fn service_account(&self) -> String {
        json!({
            "type": "service_account",
            "project_id": Self::PROJECT,
            "private_key_id": "key-1",
            "private_key": ACCOUNT_KEY,
            "client_email": "sender@vestibule-test.example",
            "token_uri": format!("{}/token", self.url),
        })
        .to_string()
    }

    /// The file of a signing key, in PEM.
    #[must_use]
    pub fn apple_key(&self) -> String {
        self.shared.apple_pem.clone()
    }

    /// A browser subscribes: its subscription, as it gives it to the page.
    pub fn subscribe(&self) -> anyhow::Result<Value> {
        let random = SystemRandom::new();
        let unspecified = |_| anyhow!("no random bytes");
        let mut auth = [0; 16];
        random.fill(&mut auth).map_err(unspecified)?;
        let key = EphemeralPrivateKey::generate(&ECDH_P256, &random).map_err(unspecified)?;
        let public_key = key.compute_public_key().map_err(unspecified)?.as_ref().to_vec();
        let keys = json!({
            "p256dh": BASE64URL_NOPAD.encode(&public_key),
            "auth": BASE64URL_NOPAD.encode(&auth),
        });
        let browser = Browser { key: Some(key), public_key, auth, read: None };
        Ok(self.subscribed(browser, &keys))
    }

    /// A browser subscribes whose keys somebody else holds, and who reads what it is sent.
    pub fn subscribe_with(&self, keys: &Value) -> Value {
        let browser = Browser { key: None, public_key: vec![], auth: [0; 16], read: None };
        self.subscribed(browser, keys)
    }

    fn subscribed(&self, browser: Browser, keys: &Value) -> Value {
        let mut knows = self.shared.knows();
        let path = format!("/browser/{}", knows.browsers.len());
        let endpoint = format!("{}{path}", self.url);
        knows.browsers.insert(path, browser);
        json!({ "endpoint": endpoint, "expirationTime": null, "keys": keys })
    }

    /// What a browser has read, by its subscription.
    #[must_use]
    pub fn read(&self, subscription: &Value) -> Option<Value> {
        let endpoint = subscription["endpoint"].as_str()?;
        let knows = self.shared.knows();
        let browser = knows.browsers.get(endpoint.strip_prefix(&self.url)?)?;
        serde_json::from_slice(browser.read.as_ref()?).ok()
    }

    /// The next calls of this sort are answered so, one plan each; then all is well again.
    pub fn plan(&self, call: PushCall, status: u16, body: &str, retry_after: Option<&'static str>) {
        let plan = (status, body.to_owned(), retry_after);
        self.shared.knows().plans.entry(call).or_default().push_back(plan);
    }

    /// The calls of a sort so far, in order.
    #[must_use]
    pub fn requests(&self, call: PushCall) -> Vec<PushRequest> {
        self.shared.knows().requests.iter().filter(|it| it.call == call).cloned().collect()
    }
}

impl Shared {
    fn knows(&self) -> MutexGuard<'_, Knows> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A key on P-256, and its PKCS #8 in PEM.
fn elliptic() -> anyhow::Result<(KeyHalves, String)> {
    let random = SystemRandom::new();
    let algorithm = &ECDSA_P256_SHA256_FIXED_SIGNING;
    let document = EcdsaKeyPair::generate_pkcs8(algorithm, &random);
    let document = document.ok().context("could not make a key")?;
    let pair = EcdsaKeyPair::from_pkcs8(algorithm, document.as_ref(), &random);
    let public = pair.ok().context("could not read a key")?.public_key().as_ref().to_vec();
    // Where ring's own template has it.
    let private = document.as_ref()[36..68].to_vec();
    let body = BASE64.encode(document.as_ref());
    let lines: Vec<_> = body.as_bytes().chunks(64).map(String::from_utf8_lossy).collect();
    let lines = lines.join("\n");
    let pem = format!("-----BEGIN PRIVATE KEY-----\n{lines}\n-----END PRIVATE KEY-----\n");
    Ok((KeyHalves { private, public }, pem))
}

async fn answer(State(shared): State<Arc<Shared>>, request: Request) -> Response {
    let (parts, body) = request.into_parts();
    let body = axum::body::to_bytes(body, 1 << 20).await.unwrap_or_default();
    let path = parts.uri.path().to_owned();
    let call = match path.as_str() {
        "/token" => PushCall::Token,
        path if path.starts_with("/browser/") => PushCall::Browser,
        path if path.starts_with("/v1/projects/") => PushCall::Firebase,
        path if path.starts_with("/3/device/") => PushCall::Apple,
        _ => return StatusCode::NOT_FOUND.into_response(),
    };
    let is_http2 = parts.version == Version::HTTP_2;
    let mut knows = shared.knows();
    let plan = knows.plans.entry(call).or_default().pop_front();
    let (status, text, retry_after) = plan.unwrap_or_else(|| {
        let (status, text) = match call {
            PushCall::Browser => browser(&shared, &mut knows, &path, &parts.headers, &body),
            PushCall::Token => token(&shared, &mut knows, &body),
            PushCall::Firebase => firebase(&knows, &path, &parts.headers, &body),
            PushCall::Apple => apple(&shared, is_http2, &parts.headers, &body),
        };
        (status, text, None)
    });
    let field = |(name, value): (&header::HeaderName, &header::HeaderValue)| {
        (name.as_str().to_owned(), String::from_utf8_lossy(value.as_bytes()).into_owned())
    };
    let headers = parts.headers.iter().map(field).collect();
    let body = body.to_vec();
    knows.requests.push(PushRequest { call, path, headers, body, is_http2, status });
    let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let mut response = (status, text).into_response();
    if let Some(pause) = retry_after {
        response.headers_mut().insert(header::RETRY_AFTER, header::HeaderValue::from_static(pause));
    }
    if call == PushCall::Apple
        && let Some(id) = parts.headers.get("apns-id")
    {
        response.headers_mut().insert("apns-id", id.clone());
    }
    response
}

fn text<'a>(headers: &'a HeaderMap, name: &str) -> &'a str {
    headers.get(name).and_then(|it| it.to_str().ok()).unwrap_or_default()
}

/// As RFC 8030 and RFC 8292 have it.
fn browser(
    shared: &Shared,
    knows: &mut Knows,
    path: &str,
    headers: &HeaderMap,
    body: &Bytes,
) -> (u16, String) {
    let refused = |status, why: &str| (status, why.to_owned());
    let authorization = text(headers, "authorization");
    let parts = authorization.strip_prefix("vapid t=").and_then(|it| it.split_once(", k="));
    let Some((token, key)) = parts else { return refused(401, "no VAPID") };
    if BASE64URL_NOPAD.decode(key.as_bytes()).ok().as_ref() != Some(&shared.vapid.public) {
        return refused(403, "another key than that of the subscription");
    }
    let Some((_, claims)) = read_token(token, &shared.vapid.public) else {
        return refused(403, "a wrong signature");
    };
    let now = OffsetDateTime::now_utc().unix_timestamp();
    let ends = claims["exp"].as_i64().unwrap_or_default();
    if claims["aud"] != format!("http://{}", text(headers, "host"))
        || !(now..=now + 86_400).contains(&ends)
        || !claims["sub"].as_str().is_some_and(|it| it.starts_with("mailto:"))
    {
        return refused(403, "a token for somebody else, or for another time");
    }
    let topic = text(headers, "topic");
    let is_topic = |it: char| it.is_ascii_alphanumeric() || matches!(it, '-' | '_');
    if text(headers, "ttl").parse::<u32>().is_err()
        || text(headers, "content-encoding") != "aes128gcm"
        || topic.len() > 32
        || !topic.chars().all(is_topic)
    {
        return refused(400, "a header is missing or wrong");
    }
    if body.len() > 4096 {
        return refused(413, "too long");
    }
    let Some(browser) = knows.browsers.get_mut(path) else {
        return refused(410, "no such subscription");
    };
    let Some(key) = browser.key.take() else { return (201, String::new()) };
    match open(key, browser, body) {
        Some(message) => {
            browser.read = Some(message);
            (201, String::new())
        }
        // The push service itself could not tell.
        None => refused(400, "the browser cannot read it"),
    }
}

/// RFC 8291, as the browser does it.
fn open(key: EphemeralPrivateKey, browser: &Browser, message: &[u8]) -> Option<Vec<u8>> {
    let (salt, rest) = message.split_at_checked(16)?;
    let (sizes, rest) = rest.split_at_checked(5)?;
    let (sender, record) = rest.split_at_checked(65)?;
    if sizes[4] != 65 {
        return None;
    }
    let theirs = UnparsedPublicKey::new(&ECDH_P256, sender);
    let opened = agree_ephemeral(key, &theirs, |shared| {
        let both_keys = [b"WebPush: info\0".as_slice(), &browser.public_key, sender];
        let secret = derive::<32>(&browser.auth, shared, &both_keys)?;
        let key = derive::<16>(salt, &secret, &[b"Content-Encoding: aes128gcm\0"])?;
        let nonce = derive::<12>(salt, &secret, &[b"Content-Encoding: nonce\0"])?;
        let key = LessSafeKey::new(UnboundKey::new(&AES_128_GCM, &key).ok()?);
        let mut record = record.to_vec();
        let nonce = Nonce::assume_unique_for_key(nonce);
        let plain = key.open_in_place(nonce, Aad::empty(), &mut record).ok()?;
        plain.strip_suffix(&[2]).map(<[u8]>::to_vec)
    });
    opened.ok()?
}

fn derive<const LENGTH: usize>(salt: &[u8], secret: &[u8], info: &[&[u8]]) -> Option<[u8; LENGTH]> {
    struct Length(usize);
    impl KeyType for Length {
        fn len(&self) -> usize {
            self.0
        }
    }
    let mut derived = [0; LENGTH];
    let extracted = Salt::new(HKDF_SHA256, salt).extract(secret);
    extracted.expand(info, Length(LENGTH)).ok()?.fill(&mut derived).ok()?;
    Some(derived)
}

/// Gives an access token for an assertion (RFC 7523).
fn token(shared: &Shared, knows: &mut Knows, body: &Bytes) -> (u16, String) {
    let refused = (400, json!({ "error": "invalid_grant" }).to_string());
    let form = String::from_utf8_lossy(body);
    let grant = "grant_type=urn%3Aietf%3Aparams%3Aoauth%3Agrant-type%3Ajwt-bearer&assertion=";
    let Some(assertion) = form.strip_prefix(grant) else { return refused };
    let key = shared.account.public().as_ref();
    let algorithm = &RSA_PKCS1_2048_8192_SHA256;
    let Some((head, claims)) = read_signed(assertion, algorithm, key) else { return refused };
    let now = OffsetDateTime::now_utc().unix_timestamp();
    let age = now - claims["iat"].as_i64().unwrap_or_default();
    let life = claims["exp"].as_i64().unwrap_or_default() - claims["iat"].as_i64().unwrap_or(0);
    let is_good = head["kid"] == "key-1"
        && claims["iss"] == "sender@vestibule-test.example"
        && claims["scope"] == "https://www.googleapis.com/auth/firebase.messaging"
        && claims["aud"].as_str().is_some_and(|it| it.ends_with("/token"))
        && (-5..=60).contains(&age)
        && (1..=3600).contains(&life);
    if !is_good {
        return refused;
    }
    knows.tokens += 1;
    let token = format!("access-{}", knows.tokens);
    (200, json!({ "access_token": token, "expires_in": 3599, "token_type": "Bearer" }).to_string())
}

/// Only the newest token is taken.
fn firebase(knows: &Knows, path: &str, headers: &HeaderMap, body: &Bytes) -> (u16, String) {
    let refused = |status: u16, code: &str| {
        let error = json!({ "code": status, "message": "quotes the message", "status": code });
        (status, json!({ "error": error }).to_string())
    };
    if text(headers, "authorization") != format!("Bearer access-{}", knows.tokens) {
        return refused(401, "UNAUTHENTICATED");
    }
    let message: Value = serde_json::from_slice(body).unwrap_or_default();
    let message = &message["message"];
    let project = PushServices::PROJECT;
    if path != format!("/v1/projects/{project}/messages:send")
        || !message["token"].is_string()
        || !message["notification"]["title"].is_string()
        || message["data"].as_object().into_iter().flatten().any(|(_, value)| !value.is_string())
        || body.len() > 4096
    {
        return refused(400, "INVALID_ARGUMENT");
    }
    (
        200,
        json!({ "name": format!("projects/{project}/messages/m-{}", knows.requests.len()) })
            .to_string(),
    )
}

fn apple(shared: &Shared, is_http2: bool, headers: &HeaderMap, body: &Bytes) -> (u16, String) {
    let refused = |status: u16, reason: &str| (status, json!({ "reason": reason }).to_string());
    if !is_http2 {
        return refused(505, "HttpVersion");
    }
    let token = text(headers, "authorization").strip_prefix("bearer ").unwrap_or_default();
    let Some((head, claims)) = read_token(token, &shared.apple.public) else {
        return refused(403, "InvalidProviderToken");
    };
    if head["kid"] != PushServices::KEY_ID || claims["iss"] != PushServices::TEAM_ID {
        return refused(403, "InvalidProviderToken");
    }
    let now = OffsetDateTime::now_utc().unix_timestamp();
    if now - claims["iat"].as_i64().unwrap_or_default() > 3600 {
        return refused(403, "ExpiredProviderToken");
    }
    for (is_good, reason) in [
        (text(headers, "apns-topic") == PushServices::TOPIC, "BadTopic"),
        (text(headers, "apns-push-type") == "alert", "InvalidPushType"),
        (uuid::Uuid::parse_str(text(headers, "apns-id")).is_ok(), "BadMessageId"),
        ((1..=64).contains(&text(headers, "apns-collapse-id").len()), "BadCollapseId"),
        (
            text(headers, "apns-expiration").parse::<i64>().is_ok_and(|it| it > now),
            "BadExpirationDate",
        ),
    ] {
        if !is_good {
            return refused(400, reason);
        }
    }
    let payload: Value = serde_json::from_slice(body).unwrap_or_default();
    if !payload["aps"]["alert"]["title"].is_string() {
        return refused(400, "PayloadEmpty");
    }
    if body.len() > 4096 {
        return refused(413, "PayloadTooLarge");
    }
    (200, String::new())
}

/// Header and claims of a token that is signed by an elliptic key.
fn read_token(token: &str, public_key: &[u8]) -> Option<(Value, Value)> {
    read_signed(token, &ECDSA_P256_SHA256_FIXED, public_key)
}

fn read_signed(
    token: &str,
    algorithm: &'static dyn signature::VerificationAlgorithm,
    public_key: &[u8],
) -> Option<(Value, Value)> {
    let (signed, given) = token.rsplit_once('.')?;
    let given = BASE64URL_NOPAD.decode(given.as_bytes()).ok()?;
    let key = signature::UnparsedPublicKey::new(algorithm, public_key);
    key.verify(signed.as_bytes(), &given).ok()?;
    let part = |text: &str| -> Option<Value> {
        serde_json::from_slice(&BASE64URL_NOPAD.decode(text.as_bytes()).ok()?).ok()
    };
    let (head, claims) = signed.split_once('.')?;
    Some((part(head)?, part(claims)?))
}
