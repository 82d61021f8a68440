//! Posts events to a subscriber: signed (Standard Webhooks), as CloudEvents or as a template says.

#[cfg(test)]
mod guard;
pub(crate) mod sign;

use std::time::Duration;

use ipnet::IpNet;
use secrecy::SecretString;

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
