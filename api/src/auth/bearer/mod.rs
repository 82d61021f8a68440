//! Signed bearer tokens (JWT), as Entra sends them to custom authentication extensions.
//!
//! [`BearerVerifier::verify`] is what a call waits for, and it waits for nothing: it knows the
//! issuer's keys or it does not. [`BearerVerifier::run`] fetches them ahead of time, again now and
//! then, and soon after a token came with an unknown key; through an outage the last ones stay in
//! force. Until the first are there, every token is refused.
//!
//! The price of not waiting: should an issuer sign with a key at the moment it publishes it, calls
//! are refused until the keys have been fetched again, at most [`BearerSettings::ask_apart`] plus
//! the fetch. Issuers publish a key well before they use it, and then nothing is refused. Likewise a
//! key that is withdrawn is accepted until the next fetch that succeeds.
//!
//! Signatures are checked by ring, which is the TLS provider too. The well-known JWT crates bring
//! either a second such provider or an RSA implementation with a known timing leak, and without
//! them they would do no more here than `token` does.

mod fetch;
mod keys;
mod token;

use std::{
    fmt,
    sync::{Arc, Mutex, PoisonError, RwLock},
    time::Duration,
};

use prometheus_client::metrics::gauge::Gauge;
use reqwest::{Client, Url};
use time::OffsetDateTime;
use tokio::{sync::Notify, time::sleep};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::Denied;
pub use fetch::FetchError;
use keys::Keys;
use token::{Expected, Token};

/// Which tokens are accepted.
#[derive(Clone, Debug)]
pub struct BearerSettings {
    /// The issuer's OpenID Connect metadata, which names the issuer and where its keys are.
    pub metadata_url: String,
    /// Accepted beside the issuer that the metadata names, letter by letter. External tenants have
    /// issued tokens as `https://{tenantId}.ciamlogin.com/{tenantId}/v2.0` whatever the metadata
    /// said.
    pub issuers: Vec<String>,
    /// Ours: the id of the app registration, as the tokens' `aud` has it.
    pub audiences: Vec<String>,
    /// The applications that may call, as `azp` or `appid` have them.
    pub callers: Vec<String>,
    /// The tenants that may call; with none, the issuer decides.
    pub tenants: Vec<String>,
    /// By how much clocks may differ.
    pub leeway: Duration,
    /// How often the keys are fetched when nothing happens.
    pub refresh_every: Duration,
    /// Unknown keys have them fetched at most so often, so that forged tokens cannot make us a
    /// nuisance to the issuer.
    pub ask_apart: Duration,
}

impl BearerSettings {
    /// The application in whose name Microsoft calls custom authentication extensions.
    pub const MICROSOFT: &'static str = "99045fe1-7639-4a75-9d4a-577b6ca3810f";

    #[must_use]
    pub fn new(metadata_url: String, audiences: Vec<String>) -> Self {
        Self {
            metadata_url,
            audiences,
            issuers: Vec::new(),
            callers: vec![Self::MICROSOFT.to_owned()],
            tenants: Vec::new(),
            leeway: Duration::from_secs(60),
            refresh_every: Duration::from_secs(60 * 60),
            ask_apart: Duration::from_secs(30),
        }
    }
}

/// Why no token can be verified by such settings.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BearerSettingsError {
    #[error("the metadata address `{0}` is not a URL")]
    NotAUrl(String),
    #[error("the metadata address `{0}` must begin with https, except on this machine")]
    NotPrivate(String),
    #[error("tokens for anybody else would be accepted: name at least one audience")]
    NoAudience,
    #[error("tokens of any application would be accepted: name at least one caller")]
    NoCaller,
}

/// Verifies tokens by the keys it keeps.
pub struct BearerVerifier {
    metadata_url: Url,
    settings: BearerSettings,
    client: Client,
    keys: RwLock<Option<Arc<Known>>>,
    /// Somebody came with a key that we do not know.
    wanted: Notify,
    /// Told when the keys were fetched.
    gauges: Mutex<Vec<Gauge>>,
}

struct Known {
    keys: Keys,
    expected: Expected,
    fetched: OffsetDateTime,
}

impl BearerVerifier {
    /// Without keys at first: [`Self::run`] fetches them.
    pub fn new(settings: BearerSettings, client: Client) -> Result<Self, BearerSettingsError> {
        let metadata_url = Url::parse(&settings.metadata_url)
            .map_err(|_| BearerSettingsError::NotAUrl(settings.metadata_url.clone()))?;
        if !fetch::is_private(&metadata_url) {
            return Err(BearerSettingsError::NotPrivate(settings.metadata_url));
        }
        if settings.audiences.is_empty() {
            return Err(BearerSettingsError::NoAudience);
        }
        if settings.callers.is_empty() {
            return Err(BearerSettingsError::NoCaller);
        }
        let (keys, wanted, gauges) = (RwLock::new(None), Notify::new(), Mutex::default());
        Ok(Self { metadata_url, settings, client, keys, wanted, gauges })
    }

    /// Fetches the keys at once and whenever it is due, until told to stop.
    pub async fn run(self: Arc<Self>, stop: CancellationToken) {
        let mut failures = 0_u32;
        loop {
            let fetched = tokio::select! {
                biased;
                () = stop.cancelled() => return,
                fetched = self.refresh() => fetched,
            };
            let pause = match fetched {
                Ok(()) => {
                    if failures > 0 {
                        info!(metadata = %self.metadata_url, "the keys of bearer tokens can be fetched again");
                    }
                    failures = 0;
                    self.settings.refresh_every
                }
                Err(error) => {
                    if failures == 0 {
                        let next = if self.has_keys() {
                            "the known ones stay in force"
                        } else {
                            "calls with a bearer token are refused until they are there"
                        };
                        let error: &dyn std::error::Error = &error;
                        warn!(metadata = %self.metadata_url, error, "could not fetch the keys of bearer tokens; {next}");
                    }
                    failures = failures.saturating_add(1);
                    pause_after(failures)
                }
            };
            let asked = async {
                sleep(self.settings.ask_apart).await;
                self.wanted.notified().await;
            };
            tokio::select! {
                biased;
                () = stop.cancelled() => return,
                () = sleep(pause) => {}
                () = asked => {}
            }
        }
    }

    /// One fetch. If it fails the keys stay as they are.
    pub async fn refresh(&self) -> Result<(), FetchError> {
        let (issuer, keys) = fetch::fetch(&self.client, &self.metadata_url).await?;
        let expected = Expected::new(&self.settings, issuer);
        let fetched = OffsetDateTime::now_utc();
        let known = Known { keys, expected, fetched };
        *self.keys.write().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(known));
        for gauge in &*self.gauges.lock().unwrap_or_else(PoisonError::into_inner) {
            gauge.set(fetched.unix_timestamp());
        }
        Ok(())
    }

    /// Whether any token can be accepted yet.
    #[must_use]
    pub fn has_keys(&self) -> bool {
        self.known().is_some()
    }

    /// When the keys were last fetched.
    #[must_use]
    pub fn keys_fetched(&self) -> Option<OffsetDateTime> {
        self.known().map(|it| it.fetched)
    }

    /// Has the gauge show when the keys were last fetched.
    pub(crate) fn report_to(&self, gauge: Gauge) {
        let mut gauges = self.gauges.lock().unwrap_or_else(PoisonError::into_inner);
        gauge.set(self.keys_fetched().map_or(0, OffsetDateTime::unix_timestamp));
        gauges.push(gauge);
    }

    /// Whether the token is one of those that are accepted, and by which tenant it was issued.
    pub(super) fn verify(
        &self,
        token: &[u8],
        now: OffsetDateTime,
    ) -> Result<Option<String>, Denied> {
        let token = Token::read(token)?;
        let known = self.known().ok_or(Denied::TokenKeysMissing)?;
        // All of it must hold, so the order is free: what costs least comes first. And only
        // somebody whose token would be fine otherwise may have the keys fetched.
        known.expected.check(&token.claims, now)?;
        known.keys.check(&token).inspect_err(|denied| {
            if *denied == Denied::TokenKeyUnknown {
                self.wanted.notify_one();
            }
        })?;
        Ok(token.claims.tid)
    }

    fn known(&self) -> Option<Arc<Known>> {
        self.keys.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl fmt::Debug for BearerVerifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BearerVerifier")
            .field("metadata_url", &self.metadata_url.as_str())
            .field("has_keys", &self.has_keys())
            .finish_non_exhaustive()
    }
}

/// How long to wait after so many failures in a row: soon at first, for a sign-up may wait.
fn pause_after(failures: u32) -> Duration {
    const LONGEST: Duration = Duration::from_secs(60);
    let doublings = 2_u32.saturating_pow(failures.saturating_sub(1));
    Duration::from_secs(1).saturating_mul(doublings).min(LONGEST)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_a_minute() {
        let pauses: Vec<_> = (1..=8).map(|it| pause_after(it).as_secs()).collect();
        assert_eq!(pauses, [1, 2, 4, 8, 16, 32, 60, 60]);
        assert_eq!(pause_after(u32::MAX).as_secs(), 60);
    }

    #[test]
    fn settings_that_would_let_anybody_in_are_refused() {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let new = |change: fn(&mut BearerSettings)| {
            let url = "https://login.test/.well-known/openid-configuration";
            let mut settings = BearerSettings::new(url.to_owned(), vec!["us".to_owned()]);
            change(&mut settings);
            BearerVerifier::new(settings, Client::new()).map(drop)
        };
        assert_eq!(new(|_| {}), Ok(()));
        assert_eq!(new(|it| it.metadata_url = "http://127.0.0.1:8/x".to_owned()), Ok(()));
        assert_eq!(
            new(|it| it.metadata_url = "http://login.test/x".to_owned()),
            Err(BearerSettingsError::NotPrivate("http://login.test/x".to_owned()))
        );
        assert_eq!(
            new(|it| it.metadata_url = "login".to_owned()),
            Err(BearerSettingsError::NotAUrl("login".to_owned()))
        );
        assert_eq!(new(|it| it.audiences.clear()), Err(BearerSettingsError::NoAudience));
        assert_eq!(new(|it| it.callers.clear()), Err(BearerSettingsError::NoCaller));
    }
}
