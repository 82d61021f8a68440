//! A stand-in for an issuer of bearer tokens: it publishes its metadata and its keys, and signs.
//!
//! Its tokens look as Entra makes them for custom authentication extensions, signed with RSA. It answers
//! from a thread of its own, so a test may block.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicUsize, Ordering},
};

use anyhow::Context as _;
use axum::{Json, Router, extract::State, http::StatusCode, response::IntoResponse, routing::get};
use data_encoding::{BASE64, BASE64URL_NOPAD};
use ring::{
    rand::SystemRandom,
    rsa::PublicKeyComponents,
    signature::{RSA_PKCS1_SHA256, RsaKeyPair},
};
use serde_json::{Value, json};
use time::OffsetDateTime;
use tokio::net::TcpListener;

use crate::background::Background;

/// Made for tests; it opens nothing anywhere.
const KEY: &str = include_str!("../../api/tests/keys/test-only-rsa-1.pem");

/// An issuer; when it is dropped its server ends.
#[derive(Debug)]
pub struct Issuer {
    key: RsaKeyPair,
    published: Arc<Published>,
    address: String,
    _server: Background,
}

#[derive(Debug)]
struct Published {
    keys: Value,
    is_away: AtomicBool,
    fetches: AtomicUsize,
}

impl Issuer {
    /// What tokens name as their issuer.
    pub const NAME: &str = "https://login.test/tenant/v2.0";
    pub const AUDIENCE: &str = "c0ffee00-0000-4000-8000-000000000001";
    /// The tenant of the published example calls.
    pub const TENANT: &str = "aaaabbbb-0000-cccc-1111-dddd2222eeee";
    /// Whom Microsoft calls as.
    pub const CALLER: &str = "99045fe1-7639-4a75-9d4a-577b6ca3810f";

    pub async fn start() -> anyhow::Result<Self> {
        let lines = KEY.lines().skip_while(|line| !line.starts_with("-----BEGIN"));
        let body: String = lines.filter(|line| !line.starts_with('-')).collect();
        let key = RsaKeyPair::from_pkcs8(&BASE64.decode(body.as_bytes())?);
        let key = key.ok().context("could not read the key of the issuer")?;
        let public = PublicKeyComponents::<Vec<u8>>::from(key.public());
        let (n, e) = (BASE64URL_NOPAD.encode(&public.n), BASE64URL_NOPAD.encode(&public.e));
        let published = Arc::new(Published {
            keys: json!({ "keys": [{ "kty": "RSA", "use": "sig", "kid": "1", "n": n, "e": e }] }),
            is_away: AtomicBool::new(false),
            fetches: AtomicUsize::new(0),
        });
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = format!("http://{}", listener.local_addr()?);
        let jwks_uri = format!("{address}/keys");
        let metadata = json!({ "issuer": Self::NAME, "jwks_uri": jwks_uri });
        let give_metadata = async move |State(published): State<Arc<Published>>| {
            published.fetches.fetch_add(1, Ordering::SeqCst);
            if published.is_away.load(Ordering::SeqCst) {
                StatusCode::SERVICE_UNAVAILABLE.into_response()
            } else {
                Json(metadata).into_response()
            }
        };
        let give_keys =
            async |State(published): State<Arc<Published>>| Json(published.keys.clone());
        let router = Router::new()
            .route("/metadata", get(give_metadata))
            .route("/keys", get(give_keys))
            .with_state(Arc::clone(&published));
        let server = Background::serve("issuer", listener, router)?;
        Ok(Self { key, published, address, _server: server })
    }

    pub fn metadata_url(&self) -> String {
        format!("{}/metadata", self.address)
    }

    /// From now on the metadata cannot be had, or can.
    pub fn be_away(&self, away: bool) {
        self.published.is_away.store(away, Ordering::SeqCst);
    }

    /// How often the metadata was asked for.
    pub fn fetches(&self) -> usize {
        self.published.fetches.load(Ordering::SeqCst)
    }

    /// A token with the claims that Entra puts in, after `change` has spoilt them.
    pub fn token(&self, change: impl FnOnce(&mut Value)) -> anyhow::Result<String> {
        let now = OffsetDateTime::now_utc().unix_timestamp();
        let mut claims = json!({
            "aud": Self::AUDIENCE, "iss": Self::NAME, "iat": now, "nbf": now, "exp": now + 3600,
            "azp": Self::CALLER, "azpacr": "2", "tid": Self::TENANT, "ver": "2.0",
        });
        change(&mut claims);
        let part = |it: &Value| BASE64URL_NOPAD.encode(it.to_string().as_bytes());
        let header = json!({ "typ": "JWT", "alg": "RS256", "kid": "1" });
        let signed = format!("{}.{}", part(&header), part(&claims));
        let mut signature = vec![0; self.key.public().modulus_len()];
        let random = SystemRandom::new();
        let outcome = self.key.sign(&RSA_PKCS1_SHA256, &random, signed.as_bytes(), &mut signature);
        outcome.ok().context("could not sign a token")?;
        Ok(format!("{signed}.{}", BASE64URL_NOPAD.encode(&signature)))
    }
}
