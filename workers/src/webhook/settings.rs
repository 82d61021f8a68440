//! Where events go to, and as what.

use std::time::Duration;

use ipnet::IpNet;
use reqwest::Url;
use secrecy::SecretString;

use super::guard;

/// Where events go to, and as what.
#[derive(Clone, Debug)]
pub struct WebhookSettings {
    /// The subscriber's, and so the worker's.
    pub name: String,
    /// A secret, because many services put a token into it.
    pub url: SecretString,
    /// Each signs: `whsec_…` (shared, HMAC-SHA256) or `whsk_…` (Ed25519). At least one; several while
    /// a key is being replaced.
    pub keys: Vec<SecretString>,
    pub mode: WebhookMode,
    /// Makes the body, which must be JSON, in place of the event.
    pub template: Option<String>,
    /// Sent with each event, besides ours.
    pub headers: Vec<(String, SecretString)>,
    pub auth: Option<WebhookAuth>,
    /// Certificates (PEM) of authorities that are trusted besides the system's.
    pub authorities: Option<String>,
    /// The longest that one call may take, the reading of its answer included. An attempt takes a
    /// few of them where a token has to be fetched.
    pub timeout: Duration,
    /// Where a subscriber may be besides the public internet, such as `10.1.0.0/16`. Only there may
    /// it be called without TLS.
    pub networks: Vec<IpNet>,
}

impl WebhookSettings {
    /// Less than an attempt may take as a rule, and as long as the standard recommends.
    pub const TIMEOUT: Duration = Duration::from_secs(15);

    /// One key, structured events, no authentication besides the signature, public addresses only.
    #[must_use]
    pub fn new(name: impl Into<String>, url: SecretString, key: SecretString) -> Self {
        Self {
            name: name.into(),
            url,
            keys: vec![key],
            mode: WebhookMode::Structured,
            template: None,
            headers: Vec::new(),
            auth: None,
            authorities: None,
            timeout: Self::TIMEOUT,
            networks: Vec::new(),
        }
    }
}

impl WebhookSettings {
    /// A URL that may be posted to; its host, where it is a name, is judged when it is called.
    pub(super) fn address(
        &self,
        key: &'static str,
        text: &str,
        complain: &mut impl FnMut(&'static str, String),
    ) -> Option<Url> {
        let url = match Url::parse(text) {
            Ok(url) if matches!(url.scheme(), "http" | "https") && url.has_host() => url,
            _ => {
                complain(key, "must be an https URL".to_owned());
                return None;
            }
        };
        if url.scheme() == "http" && self.networks.is_empty() {
            let only = "must be an https URL; http is for the private networks in `networks` only";
            complain(key, only.to_owned());
            return None;
        }
        let judged = guard::check(&url, &self.networks);
        judged.map_err(|refused| complain(key, refused.to_string())).ok()?;
        Some(url)
    }
}

/// Headers that are set by us or by HTTP itself.
pub(super) fn is_ours(name: &str) -> bool {
    let of_http = ["content-type", "content-length", "host", "transfer-encoding", "connection"];
    of_http.contains(&name) || name.starts_with("webhook-") || name.starts_with("ce-")
}

/// How an event travels in HTTP (CloudEvents HTTP binding).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WebhookMode {
    /// All of it in the body, so all of it is signed.
    #[default]
    Structured,
    /// Its data in the body, the rest in `ce-…` headers.
    Binary,
}

/// How we show the subscriber who we are, besides by the signature.
#[derive(Clone, Debug)]
pub enum WebhookAuth {
    /// OAuth 2 client credentials: a token that is fetched, kept and renewed.
    ClientCredentials {
        token_url: String,
        client_id: String,
        client_secret: SecretString,
        scope: Option<String>,
    },
    /// A client certificate: its chain and its key (PEM), in one text.
    Certificate(SecretString),
}
