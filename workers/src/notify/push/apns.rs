//! Apple Push Notification service, over HTTP/2 with a provider token.
//!
//! The id to collapse by and the id of the notification are made of the idempotency key: a phone
//! that gets a message twice shows it once. Apple wants a provider token to be renewed at least
//! every hour, and not more often than every 20 minutes.

use std::{
    sync::{Mutex, PoisonError},
    time::Duration,
};

use anyhow::anyhow;
use reqwest::{
    Client, Response, StatusCode, Url,
    header::{AUTHORIZATION, HeaderMap, HeaderName, HeaderValue},
};
use secrecy::{ExposeSecret, SecretString};
use serde::Deserialize;
use serde_json::json;
use time::OffsetDateTime;

use super::{Note, Pushed, check_ttl, keys::SigningKey};
use crate::{
    Cause, HandleError, http,
    notify::{
        PATIENCE,
        channels::{Fault, Secrets},
        settings::ApnsSettings,
        stable,
        template::fitting,
    },
    tls,
};

const WHOM: &str = "Apple";

/// What Apple takes of a payload.
const PAYLOAD_BYTES_MAX: usize = 4096;

const ANSWER_BYTES_MAX: usize = 4 * 1024;

const ID: HeaderName = HeaderName::from_static("apns-id");

pub(super) struct Apns {
    client: Client,
    base: Url,
    topic: String,
    ttl: Duration,
    provider: Provider,
}

impl std::fmt::Debug for Apns {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Apns({} at {})", self.topic, self.base)
    }
}

impl Apns {
    pub(super) fn new(
        settings: &ApnsSettings,
        secrets: Secrets,
        faults: &mut Vec<Fault>,
    ) -> Option<Self> {
        let before = faults.len();
        check_ttl(settings.ttl, faults);
        for (key, id) in [("key_id", &settings.key_id), ("team_id", &settings.team_id)] {
            if id.is_empty() || !id.chars().all(|it| it.is_ascii_alphanumeric()) {
                faults.push((key, "must be letters and digits, as Apple gives it".to_owned()));
            }
        }
        let is_bundle = |it: char| it.is_ascii_alphanumeric() || matches!(it, '.' | '-');
        if settings.topic.is_empty() || !settings.topic.chars().all(is_bundle) {
            let expected = "must be the app's bundle id, such as com.example.app";
            faults.push(("topic", expected.to_owned()));
        }
        let base = http::secure_url(settings.base_url.trim_end_matches('/'));
        let base = base.map_err(|fault| faults.push(("url", fault.to_owned()))).ok();
        if secrets == Secrets::StandIns {
            return None;
        }
        let key = SigningKey::es256(settings.key.expose_secret());
        if key.is_none() {
            let expected = "must be the whole file AuthKey_….p8 that Apple gives";
            faults.push(("key", expected.to_owned()));
        }
        let client = client().map_err(|_| {
            faults.push(("url", "no HTTPS client on this machine".to_owned()));
        });
        let (base, key, client) = (base?, key?, client.ok()?);
        if faults.len() > before {
            return None;
        }
        let (key_id, team_id) = (settings.key_id.clone(), settings.team_id.clone());
        let provider = Provider { key, key_id, team_id, current: Mutex::default() };
        let topic = settings.topic.clone();
        Some(Self { client, base, topic, ttl: settings.ttl, provider })
    }

    /// A provider token that has expired is renewed once.
    pub(super) async fn send(
        &self,
        device: &SecretString,
        registered_at: OffsetDateTime,
        note: &Note<'_>,
    ) -> Result<Pushed, HandleError> {
        let used = self.provider.token(note.now);
        match self.post(device, registered_at, note, &used).await? {
            Answer::TokenExpired if self.provider.may_discard(&used, note.now) => {
                let renewed = self.provider.token(note.now);
                self.post(device, registered_at, note, &renewed).await?.verdict()
            }
            answer => answer.verdict(),
        }
    }

    async fn post(
        &self,
        device: &SecretString,
        registered_at: OffsetDateTime,
        note: &Note<'_>,
        token: &str,
    ) -> Result<Answer, HandleError> {
        let mut url = self.base.clone();
        url.path_segments_mut().expect("an http address has a path").pop_if_empty().extend([
            "3",
            "device",
            device.expose_secret(),
        ]);
        let headers = self.headers(note, token).ok_or_else(|| {
            HandleError::park(Cause::Refused, anyhow!("a push message whose header is none"))
        })?;
        let request = self.client.post(url).headers(headers).body(payload(note));
        let sent = request.send().await.map_err(|error| http::not_sent(WHOM, error))?;
        Ok(Answer::read(sent, registered_at).await)
    }

    fn headers(&self, note: &Note<'_>, token: &str) -> Option<HeaderMap> {
        let mut authorization = HeaderValue::try_from(format!("bearer {token}")).ok()?;
        authorization.set_sensitive(true);
        let expires = (note.now + self.ttl).unix_timestamp().to_string();
        let collapse = stable::id(note.idempotency_key);
        let id = stable::uuid(note.idempotency_key).to_string();
        let mut headers = HeaderMap::from_iter([(AUTHORIZATION, authorization)]);
        for (name, value) in [
            ("apns-topic", self.topic.as_str()),
            ("apns-push-type", "alert"),
            ("apns-priority", "10"),
            ("apns-expiration", &expires),
            ("apns-collapse-id", &collapse),
            ("apns-id", &id),
        ] {
            headers.insert(HeaderName::from_static(name), HeaderValue::try_from(value).ok()?);
        }
        Some(headers)
    }
}

/// Apple speaks HTTP/2 and nothing else, so that is what we begin with.
fn client() -> reqwest::Result<Client> {
    tls::install_provider();
    Client::builder()
        .user_agent(concat!("vestibule/", env!("CARGO_PKG_VERSION")))
        .redirect(reqwest::redirect::Policy::none())
        .http2_prior_knowledge()
        // Apple closes connections that say nothing for long; a ping finds out before a message does.
        .http2_keep_alive_interval(Duration::from_secs(60))
        .timeout(PATIENCE)
        .build()
}

fn payload(note: &Note<'_>) -> String {
    let text = &note.message;
    fitting(&text.body, PAYLOAD_BYTES_MAX, |body| {
        json!({
            "aps": { "alert": { "title": text.subject, "body": body }, "sound": "default" },
            "event": note.event.id,
            "kind": note.event.kind,
        })
        .to_string()
    })
}

/// What Apple has answered.
enum Answer {
    Judged(Result<Pushed, HandleError>),
    TokenExpired,
}

#[derive(Default, Deserialize)]
struct Refusal {
    #[serde(default)]
    reason: String,
    /// When Apple found that it cannot reach a device any more, in milliseconds since 1970.
    timestamp: Option<i64>,
}

impl Refusal {
    fn since(&self) -> Option<OffsetDateTime> {
        let nanoseconds = i128::from(self.timestamp?) * 1_000_000;
        OffsetDateTime::from_unix_timestamp_nanos(nanoseconds).ok()
    }
}

impl Answer {
    async fn read(answer: Response, registered_at: OffsetDateTime) -> Self {
        let status = answer.status();
        let id = answer.headers().get(ID).and_then(|it| it.to_str().ok()).map(str::to_owned);
        let verdict = http::judge(WHOM, status, answer.headers(), OffsetDateTime::now_utc());
        let body = http::body(answer, ANSWER_BYTES_MAX).await;
        let Err(error) = verdict else {
            return Self::Judged(Ok(Pushed::Sent { id }));
        };
        let refusal = body.and_then(|it| serde_json::from_slice::<Refusal>(&it).ok());
        let refusal = refusal.unwrap_or_default();
        let since = refusal.since();
        let mut reason = refusal.reason;
        reason.retain(|it| it.is_ascii_alphanumeric());
        reason.truncate(60);
        Self::Judged(match (status, reason.as_str()) {
            (StatusCode::FORBIDDEN, "ExpiredProviderToken") => return Self::TokenExpired,
            (StatusCode::GONE, "Unregistered") if since.is_some_and(|it| it > registered_at) => {
                Ok(Pushed::Gone { reason: "Apple: the device is unregistered" })
            }
            (StatusCode::GONE, _) => {
                let source = anyhow!(
                    "Apple cannot reach the device ({reason}), and does not say that this is so \
                     since it was registered here; have the app register the token that it has now"
                );
                Err(HandleError::park(Cause::InvalidRecipient, source))
            }
            (StatusCode::BAD_REQUEST, "BadDeviceToken") => {
                let source = anyhow!(
                    "Apple knows no such device (BadDeviceToken); see `environment`: \"sandbox\" is \
                     for builds from Xcode, \"production\" for all others"
                );
                Err(HandleError::park(Cause::InvalidRecipient, source))
            }
            (StatusCode::BAD_REQUEST, "DeviceTokenNotForTopic") => {
                let source = anyhow!(
                    "Apple knows the device as one of another app (DeviceTokenNotForTopic); see \
                     `topic`"
                );
                Err(HandleError::park(Cause::InvalidRecipient, source))
            }
            (StatusCode::FORBIDDEN, _) => {
                let source = anyhow!(
                    "Apple does not let us send ({reason}); see `key`, `key_id`, `team_id` and \
                     `topic`"
                );
                Err(HandleError::retry(Cause::NotPermitted, source))
            }
            _ => Err(with_reason(error, &reason)),
        })
    }

    /// Of the last try.
    fn verdict(self) -> Result<Pushed, HandleError> {
        match self {
            Self::Judged(verdict) => verdict,
            Self::TokenExpired => {
                let source = anyhow!(
                    "Apple takes a provider token for expired that is new; see that this machine's \
                     clock is right"
                );
                Err(HandleError::retry(Cause::NotPermitted, source))
            }
        }
    }
}

fn with_reason(error: HandleError, reason: &str) -> HandleError {
    match error {
        HandleError::Park { source, cause } if !reason.is_empty() => {
            HandleError::Park { source: anyhow!("{source} ({reason})"), cause }
        }
        other => other,
    }
}

/// Our provider token.
struct Provider {
    key: SigningKey,
    key_id: String,
    team_id: String,
    current: Mutex<Option<ProviderToken>>,
}

struct ProviderToken {
    token: SecretString,
    made_at: OffsetDateTime,
    /// When one before it was given up because Apple called it expired.
    discarded_at: Option<OffsetDateTime>,
}

impl Provider {
    /// Well within the hour after which Apple takes it no more.
    const LIFE: Duration = Duration::from_secs(40 * 60);

    /// More often, Apple refuses a new one.
    const PAUSE: Duration = Duration::from_secs(20 * 60);

    fn token(&self, now: OffsetDateTime) -> String {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        // A clock that was set back makes a token of the future, which is as bad as an old one.
        let serves = |it: &ProviderToken| it.made_at <= now && now < it.made_at + Self::LIFE;
        if let Some(token) = current.as_ref().filter(|it| serves(it)) {
            return token.token.expose_secret().to_owned();
        }
        let discarded_at = current.as_ref().and_then(|it| it.discarded_at);
        let claims = json!({ "iss": self.team_id, "iat": now.unix_timestamp() });
        let token = self.key.token(Some(&self.key_id), &claims);
        *current = Some(ProviderToken { token: token.clone().into(), made_at: now, discarded_at });
        token
    }

    /// Gives up a token that Apple calls expired; says whether there is another one to try. One that
    /// is new in its place is no better for being made anew.
    fn may_discard(&self, used: &str, now: OffsetDateTime) -> bool {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(token) = current.as_mut() else { return true };
        if token.token.expose_secret() != used {
            return true;
        }
        if token.discarded_at.is_some_and(|it| now < it + Self::PAUSE) {
            return false;
        }
        token.discarded_at = Some(now);
        token.made_at -= Self::LIFE;
        true
    }
}
