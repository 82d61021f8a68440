//! Access tokens by OAuth 2 client credentials: kept, and renewed ahead of their end.
//!
//! One renewal runs at a time. While a token still holds nobody waits for the next one; once it
//! does not, all wait for the same renewal and share its outcome.

use std::{
    fmt,
    sync::{PoisonError, RwLock},
    time::{Duration, Instant},
};

use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use reqwest::{Client, StatusCode, Url, header::CONTENT_TYPE};
use secrecy::{ExposeSecret, SecretString};
use serde::Deserialize;
use time::OffsetDateTime;
use tokio::sync::{Mutex, MutexGuard};

use crate::{Cause, http};

/// So long before its end a token is renewed, or a fifth of its life if that is less.
const AHEAD: Duration = Duration::from_secs(5 * 60);

/// A token that would end under way is not used any more.
const UNDER_WAY: Duration = Duration::from_secs(15);

/// After a renewal ahead of time has failed, so long the old token serves without another try.
const PAUSE: Duration = Duration::from_secs(30);

/// How long a token serves whose service does not say: that it does is only recommended (RFC 6749,
/// section 5.1).
const UNSAID_LIFE: Duration = Duration::from_secs(5 * 60);

/// The longest that Entra gives; more would only be a mistake.
const LIFE_MAX: Duration = Duration::from_secs(24 * 60 * 60);

/// A token with many groups is some kilobytes.
const ANSWER_BYTES_MAX: usize = 64 * 1024;

/// Our tokens.
pub(crate) struct Tokens {
    http: Client,
    url: Url,
    form: Form,
    current: RwLock<Option<Token>>,
    renewal: Mutex<Renewal>,
}

/// What we ask with, made anew each time where it says when it was made.
type Form = Box<dyn Fn(OffsetDateTime) -> SecretString + Send + Sync>;

/// How the last renewal went.
#[derive(Default)]
struct Renewal {
    failed: Option<(Instant, TokenError)>,
}

/// A token and how long it serves.
#[derive(Clone)]
pub(crate) struct Token {
    token: SecretString,
    renew_at: Instant,
    ends_at: Instant,
}

impl Token {
    fn new(token: SecretString, lifetime: Duration, now: Instant) -> Self {
        let ahead = AHEAD.min(lifetime / 5);
        Self {
            token,
            renew_at: now + (lifetime - ahead),
            ends_at: now + lifetime.saturating_sub(UNDER_WAY.min(lifetime / 10)),
        }
    }

    pub(crate) fn expose(&self) -> &str {
        self.token.expose_secret()
    }
}

impl Tokens {
    /// By what the form has to say; `grant_type` is added.
    pub(crate) fn new(http: Client, url: Url, fields: &[(&str, &str)]) -> Self {
        let field = |(name, value): &(&str, &str)| {
            format!("&{name}={}", utf8_percent_encode(value, NON_ALPHANUMERIC))
        };
        let fields: String = fields.iter().map(field).collect();
        let form = SecretString::from(format!("grant_type=client_credentials{fields}"));
        Self::with_form(http, url, Box::new(move |_| form.clone()))
    }

    /// By an assertion that we sign (RFC 7523).
    pub(crate) fn for_assertions(
        http: Client,
        url: Url,
        assertion: impl Fn(OffsetDateTime) -> SecretString + Send + Sync + 'static,
    ) -> Self {
        let form = move |now| {
            let assertion = assertion(now);
            // Letters, digits and what a form takes as it is.
            let assertion = assertion.expose_secret();
            format!(
                "grant_type=urn%3Aietf%3Aparams%3Aoauth%3Agrant-type%3Ajwt-bearer&assertion={assertion}"
            )
            .into()
        };
        Self::with_form(http, url, Box::new(form))
    }

    fn with_form(http: Client, url: Url, form: Form) -> Self {
        Self { http, url, form, current: RwLock::default(), renewal: Mutex::default() }
    }

    /// A token that holds.
    pub(crate) async fn token(&self) -> Result<Token, TokenError> {
        let came = Instant::now();
        if let Some(token) = self.current() {
            if came < token.renew_at {
                return Ok(token);
            }
            if came < token.ends_at {
                return Ok(self.renew_ahead(came).await.unwrap_or(token));
            }
        }
        let mut renewal = self.renewal.lock().await;
        if let Some(token) = self.current().filter(|it| Instant::now() < it.renew_at) {
            return Ok(token);
        }
        // It failed while we waited for it: to ask again would make a queue of those who wait.
        if let Some((failed_at, error)) = &renewal.failed
            && *failed_at >= came
        {
            return Err(error.clone());
        }
        self.renew(&mut renewal).await
    }

    /// Forgets a token that was not accepted, unless another one has taken its place.
    pub(crate) fn discard(&self, token: &Token) {
        let mut current = self.current.write().unwrap_or_else(PoisonError::into_inner);
        if current.as_ref().is_some_and(|it| it.expose() == token.expose()) {
            *current = None;
        }
    }

    fn current(&self) -> Option<Token> {
        self.current.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The next token, if it is our turn to get it and that succeeds.
    async fn renew_ahead(&self, now: Instant) -> Option<Token> {
        let mut renewal = self.renewal.try_lock().ok()?;
        let failed_lately =
            renewal.failed.as_ref().is_some_and(|(at, _)| now.duration_since(*at) < PAUSE);
        if failed_lately {
            return None;
        }
        self.renew(&mut renewal).await.ok()
    }

    async fn renew(&self, renewal: &mut MutexGuard<'_, Renewal>) -> Result<Token, TokenError> {
        match self.ask().await {
            Ok(token) => {
                renewal.failed = None;
                *self.current.write().unwrap_or_else(PoisonError::into_inner) = Some(token.clone());
                Ok(token)
            }
            Err(error) => {
                renewal.failed = Some((Instant::now(), error.clone()));
                Err(error)
            }
        }
    }

    async fn ask(&self) -> Result<Token, TokenError> {
        // Its life begins when it is made, which is after we asked and before we read it.
        let asked = Instant::now();
        let answer = self
            .http
            .post(self.url.clone())
            .header(CONTENT_TYPE, "application/x-www-form-urlencoded")
            .body((self.form)(OffsetDateTime::now_utc()).expose_secret().to_owned())
            .send()
            .await
            .map_err(|error| TokenError::NoAnswer { timeout: error.is_timeout() })?;
        let status = answer.status();
        let after = http::retry_after(answer.headers(), OffsetDateTime::now_utc());
        let body = http::body(answer, ANSWER_BYTES_MAX).await;
        judge(status, after, body.as_deref()).map(|(token, life)| Token::new(token, life, asked))
    }
}

/// Why there is no token. Says nothing of the secret.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum TokenError {
    NoAnswer { timeout: bool },
    Unavailable { status: StatusCode, after: Option<Duration> },
    Refused { status: StatusCode, error: String, code: Option<u64> },
    Unreadable,
}

impl TokenError {
    /// Never for good: it is about us and not about the event.
    pub(crate) fn cause(&self) -> (Cause, Option<Duration>) {
        match self {
            Self::NoAnswer { timeout: true } => (Cause::Timeout, None),
            Self::NoAnswer { .. } | Self::Unreadable => (Cause::Unavailable, None),
            Self::Unavailable { status: StatusCode::TOO_MANY_REQUESTS, after } => {
                (Cause::Throttled, *after)
            }
            Self::Unavailable { after, .. } => (Cause::Unavailable, *after),
            Self::Refused { .. } => (Cause::NotPermitted, None),
        }
    }
}

impl fmt::Display for TokenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoAnswer { timeout: true } => f.write_str("no access token came in time"),
            Self::NoAnswer { .. } => f.write_str("the token service cannot be reached"),
            Self::Unavailable { status, .. } => write!(f, "the token service answered {status}"),
            Self::Unreadable => f.write_str("the token service's answer cannot be read"),
            Self::Refused { status, error, code } => {
                write!(f, "the token service gave no access token ({status}")?;
                if !error.is_empty() {
                    write!(f, ", {error}")?;
                }
                if let Some(code) = code {
                    write!(f, ", AADSTS{code}")?;
                }
                write!(f, "): {}; the event is tried again", advice(*code))
            }
        }
    }
}

/// What to do about a refusal.
const fn advice(code: Option<u64>) -> &'static str {
    match code {
        Some(7_000_215) => {
            "the client secret is wrong; set `client_secret` to the secret's value, not its id"
        }
        Some(7_000_222) => "the client secret has expired; make a new one and set `client_secret`",
        Some(700_016) => "the directory knows no such application; see `client_id` and `tenant`",
        Some(90_002) => "there is no such directory; see `tenant`",
        _ => "see `client_id` and `client_secret`",
    }
}

#[derive(Deserialize)]
struct Granted {
    access_token: String,
    /// Seconds. Some token services write them as text.
    expires_in: Option<Seconds>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Seconds {
    Number(u64),
    Text(String),
}

#[derive(Default, Deserialize)]
struct Refusal {
    #[serde(default)]
    error: String,
    #[serde(default)]
    error_codes: Vec<u64>,
}

fn judge(
    status: StatusCode,
    after: Option<Duration>,
    body: Option<&[u8]>,
) -> Result<(SecretString, Duration), TokenError> {
    if status.is_success() {
        let granted = body.and_then(|body| serde_json::from_slice::<Granted>(body).ok());
        let Granted { access_token, expires_in } = granted.ok_or(TokenError::Unreadable)?;
        let life = match expires_in {
            Some(Seconds::Number(seconds)) => Duration::from_secs(seconds),
            Some(Seconds::Text(text)) => {
                Duration::from_secs(text.parse().map_err(|_| TokenError::Unreadable)?)
            }
            None => UNSAID_LIFE,
        };
        if access_token.is_empty() || !access_token.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(TokenError::Unreadable);
        }
        return Ok((access_token.into(), life.min(LIFE_MAX)));
    }
    let busy = matches!(status, StatusCode::TOO_MANY_REQUESTS | StatusCode::REQUEST_TIMEOUT);
    if busy || status.is_server_error() {
        return Err(TokenError::Unavailable { status, after });
    }
    let refusal = body.and_then(|it| serde_json::from_slice::<Refusal>(it).ok());
    let Refusal { error, error_codes } = refusal.unwrap_or_default();
    // A name such as `invalid_client`; the description beside it is longer than it is of use.
    let error = error.chars().filter(|c| c.is_ascii_lowercase() || *c == '_').take(60).collect();
    Err(TokenError::Refused { status, error, code: error_codes.first().copied() })
}

#[cfg(test)]
impl Tokens {
    pub(crate) fn url(&self) -> &Url {
        &self.url
    }

    /// Makes a token one that had better be renewed.
    pub(crate) fn near_its_end(&self, token: &Token) {
        let token = Token { renew_at: Instant::now(), ..token.clone() };
        *self.current.write().unwrap() = Some(token);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(status: u16, body: &str) -> Result<Duration, TokenError> {
        let status = StatusCode::from_u16(status).unwrap();
        judge(status, None, Some(body.as_bytes())).map(|(_, lifetime)| lifetime)
    }

    #[test]
    fn a_token_serves_until_shortly_before_its_end() {
        let now = Instant::now();
        let token = |seconds| Token::new("t".into(), Duration::from_secs(seconds), now);
        assert_eq!(token(3600).renew_at, now + Duration::from_secs(3300));
        assert_eq!(token(3600).ends_at, now + Duration::from_secs(3585));
        assert_eq!(token(100).renew_at, now + Duration::from_secs(80));
        assert_eq!(token(100).ends_at, now + Duration::from_secs(90));
        assert_eq!(token(0).ends_at, now);
    }

    #[test]
    fn what_the_token_service_answers_is_read_carefully() {
        let hour = Ok(Duration::from_secs(3600));
        assert_eq!(of(200, r#"{"access_token":"t","expires_in":3600}"#), hour);
        assert_eq!(of(200, r#"{"access_token":"t","expires_in":"3600"}"#), hour);
        let day = Ok(Duration::from_secs(86_400));
        assert_eq!(of(200, r#"{"access_token":"t","expires_in":18446744073709551615}"#), day);
        let unsaid = Ok(Duration::from_secs(300));
        assert_eq!(of(200, r#"{"access_token":"t","token_type":"Bearer"}"#), unsaid);
        assert_eq!(of(200, r#"{"access_token":"t","expires_in":null}"#), unsaid);
        for bad in [
            "",
            "{}",
            r#"{"access_token":"","expires_in":1}"#,
            r#"{"access_token":"a\r\nb","expires_in":1}"#,
            r#"{"access_token":"t","expires_in":"soon"}"#,
        ] {
            assert_eq!(of(200, bad), Err(TokenError::Unreadable), "{bad}");
        }
        for down in [408, 429, 500, 503] {
            assert!(matches!(of(down, ""), Err(TokenError::Unavailable { .. })), "{down}");
        }
    }

    #[test]
    fn a_refusal_says_what_to_do() {
        for (code, word) in [
            (7_000_215, "not its id"),
            (7_000_222, "expired"),
            (700_016, "client_id"),
            (90_002, "tenant"),
            (1, "client_secret"),
        ] {
            let body = format!(
                r#"{{"error":"invalid_client","error_description":"hidden","error_codes":[{code}]}}"#
            );
            let error = of(401, &body).unwrap_err();
            assert_eq!(error.cause(), (Cause::NotPermitted, None));
            let text = error.to_string();
            assert!(text.contains(word) && text.contains(&format!("AADSTS{code}")), "{text}");
            assert!(text.contains("invalid_client") && !text.contains("hidden"), "{text}");
        }
        assert!(of(400, "<html>").unwrap_err().to_string().contains("client_secret"));
    }
}
