//! Posts events to a subscriber: signed (Standard Webhooks), as CloudEvents or as a template says.
//!
//! Each attempt is one POST with the same `webhook-id`, by which the subscriber knows an event that it
//! has seen, and a signature of its own. The answer says what becomes of the event; redirects are not
//! followed, and nothing is sent to an address that is neither public nor allowed. No proxy is taken
//! from the environment: it would make the connection in our place, and judge nothing.

mod answer;
mod content;
mod guard;
mod settings;
mod shown;
pub(crate) mod sign;
#[cfg(test)]
mod tests;

use std::{error::Error, fmt, sync::Arc};

use anyhow::anyhow;
use async_trait::async_trait;
use reqwest::{
    Client, Identity, Response, StatusCode, Url,
    header::{AUTHORIZATION, HeaderMap, HeaderValue},
};
use secrecy::ExposeSecret;
use time::OffsetDateTime;
use vestibule_events::SignUpEvent;

pub use self::settings::{WebhookAuth, WebhookMode, WebhookSettings};
use self::{
    answer::{WHOM, judge},
    content::{Content, Message},
    guard::{Guard, Lookup, Refused},
    sign::SigningKeys,
};
use crate::{
    Exchange, HandleError, SettingError, Task, Worker, http,
    token::{Token, TokenError, Tokens},
};

/// A worker that posts its events to somebody's HTTP endpoint.
pub struct WebhookSubscriber {
    name: String,
    url: Url,
    keys: SigningKeys,
    content: Content,
    headers: HeaderMap,
    client: Client,
    tokens: Option<Tokens>,
}

/// Leaves out where it posts to and with what: secrets.
impl fmt::Debug for WebhookSubscriber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "WebhookSubscriber({})", self.name)
    }
}

/// One request, and what came of it.
struct Posted {
    headers: HeaderMap,
    answer: Result<Response, HandleError>,
}

#[async_trait]
impl Worker for WebhookSubscriber {
    fn name(&self) -> &str {
        &self.name
    }

    async fn handle(&self, task: &Task) -> Result<(), HandleError> {
        let message = self.content.of(&task.event)?;
        let answer = self.post(&task.event, &message).await.answer?;
        let verdict = judge(answer.status(), answer.headers(), OffsetDateTime::now_utc());
        http::read_rest(answer).await;
        verdict
    }
}

impl WebhookSubscriber {
    /// Compiles and checks everything that needs no network, with all complaints at once.
    ///
    /// # Errors
    ///
    /// One for each setting that cannot be used.
    pub fn new(settings: WebhookSettings) -> Result<Self, Vec<SettingError>> {
        Self::with_lookup(settings, guard::ask_the_system())
    }

    /// What `new` would complain about.
    ///
    /// # Errors
    ///
    /// As `new`.
    pub fn check(settings: &WebhookSettings) -> Result<(), Vec<SettingError>> {
        Self::new(settings.clone()).map(drop)
    }

    /// One attempt with everything that passes, for whoever sets the subscriber up. Shows no secret:
    /// neither the path of the URL, nor what the settings put into headers.
    pub async fn exchange(&self, event: &SignUpEvent) -> Exchange {
        let message = match self.content.of(event) {
            Ok(message) => message,
            Err(failed) => {
                return Exchange { sent: vec![], received: vec![], outcome: Err(failed.into()) };
            }
        };
        let Posted { headers, answer } = self.post(event, &message).await;
        let mut sent = shown::request(&self.url, &headers, &message.body);
        let public = self.keys.public_keys();
        sent.extend(public.map(|key| format!("(the public key of a signature v1a: {key})")));
        let (received, outcome) = match answer {
            Ok(answer) => {
                let now = OffsetDateTime::now_utc();
                let outcome = judge(answer.status(), answer.headers(), now);
                (shown::answer(answer).await, outcome)
            }
            Err(error) => (vec![], Err(error)),
        };
        Exchange { sent, received, outcome }
    }

    fn with_lookup(settings: WebhookSettings, lookup: Lookup) -> Result<Self, Vec<SettingError>> {
        let mut faults = Vec::new();
        let mut complain = |key, message: String| faults.push(SettingError { key, message });

        // It is a part of each message's id, in which a full stop separates.
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_');
        if settings.name.is_empty() || !settings.name.chars().all(plain) {
            complain("name", "must be letters, digits, hyphens and underscores".to_owned());
        }
        let keys = match &settings.keys[..] {
            [] => {
                complain("keys", "must name at least one key, by which messages are signed".into());
                None
            }
            keys => SigningKeys::parse(keys).map_err(|bad| complain("keys", bad.to_string())).ok(),
        };
        let content = Content::new(settings.mode, settings.template.as_deref());
        let content = content.map_err(|fault| complain("template", fault)).ok();
        let with_token = matches!(settings.auth, Some(WebhookAuth::ClientCredentials { .. }));
        let is_ours = |name: &str| settings::is_ours(name) || (with_token && name == AUTHORIZATION);
        let headers = http::headers(&settings.headers, is_ours);
        let headers = headers
            .map_err(|faults| faults.into_iter().for_each(|it| complain("headers", it)))
            .ok();
        if settings.timeout.is_zero() {
            complain("timeout", "must be longer than nothing".to_owned());
        }

        let url = settings.address("url", settings.url.expose_secret(), &mut complain);
        let client = url.as_ref().and_then(|url| client(&settings, url, &lookup, &mut complain));
        let tokens = match &settings.auth {
            Some(WebhookAuth::ClientCredentials { token_url, .. }) => {
                let url = settings.address("token_url", token_url, &mut complain);
                url.and_then(|url| tokens(&settings, url, &lookup, &mut complain)).map(Some)
            }
            Some(WebhookAuth::Certificate(_)) | None => Some(None),
        };
        match (url, keys, content, headers, client, tokens) {
            (Some(url), Some(keys), Some(content), Some(headers), Some(client), Some(tokens))
                if faults.is_empty() =>
            {
                Ok(Self { name: settings.name, url, keys, content, headers, client, tokens })
            }
            _ => Err(faults),
        }
    }

    /// Posts a message. A token that the subscriber does not take is renewed once.
    async fn post(&self, event: &SignUpEvent, message: &Message) -> Posted {
        let Some(tokens) = &self.tokens else { return self.send(event, message, None).await };
        let first = match tokens.token().await {
            Ok(token) => token,
            Err(error) => return Posted::not_sent(message, error),
        };
        let posted = self.send(event, message, Some(&first)).await;
        if !posted.answer.as_ref().is_ok_and(|it| it.status() == StatusCode::UNAUTHORIZED) {
            return posted;
        }
        tokens.discard(&first);
        match tokens.token().await {
            Ok(token) => self.send(event, message, Some(&token)).await,
            Err(error) => Posted::not_sent(message, error),
        }
    }

    async fn send(&self, event: &SignUpEvent, message: &Message, token: Option<&Token>) -> Posted {
        let mut headers = self.headers.clone();
        headers.extend(message.headers.clone());
        let id = HeaderValue::try_from(format!("{}:{}", event.id, self.name))
            .expect("a plain name can stand in a header");
        headers.extend(self.keys.headers(&id, OffsetDateTime::now_utc(), &message.body));
        if let Some(token) = token {
            let mut bearer = HeaderValue::try_from(format!("Bearer {}", token.expose()))
                .expect("tokens are checked to be printable");
            bearer.set_sensitive(true);
            headers.insert(AUTHORIZATION, bearer);
        }
        let request = self.client.post(self.url.clone()).headers(headers.clone());
        let answer = request.body(message.body.clone()).send().await.map_err(not_sent);
        Posted { headers, answer }
    }
}

impl Posted {
    fn not_sent(message: &Message, error: TokenError) -> Self {
        let (cause, after) = error.cause();
        let source = anyhow!("{error}");
        let answer = Err(HandleError::Retry { source, cause, after });
        Self { headers: message.headers.clone(), answer }
    }
}

/// An address that is refused is no target that is down: somebody has to mend the set-up, or the
/// name of whoever is there.
fn not_sent(error: reqwest::Error) -> HandleError {
    let mut cause: Option<&(dyn Error + 'static)> = Some(&error);
    while let Some(error) = cause {
        if let Some(refused) = error.downcast_ref::<Refused>() {
            return refused.clone().into();
        }
        cause = error.source();
    }
    http::not_sent(WHOM, error)
}

/// A client that goes to this URL, if its address passes, and nowhere else.
fn client(
    settings: &WebhookSettings,
    url: &Url,
    lookup: &Lookup,
    complain: &mut impl FnMut(&'static str, String),
) -> Option<Client> {
    let guard = Guard::new(url, &settings.networks, Arc::clone(lookup));
    let mut builder = http::builder(settings.timeout).no_proxy().dns_resolver(guard);
    if let Some(authorities) = &settings.authorities {
        match reqwest::Certificate::from_pem_bundle(authorities.as_bytes()) {
            Ok(certificates) if !certificates.is_empty() => {
                builder = builder.tls_certs_merge(certificates);
            }
            _ => complain("authorities", "must hold certificates in PEM".to_owned()),
        }
    }
    if let Some(WebhookAuth::Certificate(pem)) = &settings.auth {
        match Identity::from_pem(pem.expose_secret().as_bytes()) {
            Ok(identity) => builder = builder.identity(identity),
            Err(_) => {
                let what = "must hold the client's certificate, its chain and its key in PEM";
                complain("certificate", what.to_owned());
            }
        }
        if url.scheme() != "https" {
            complain("certificate", "needs an https URL: it is shown in TLS only".to_owned());
        }
    }
    let unusable = |error: reqwest::Error| {
        let error = anyhow::Error::from(error.without_url());
        complain("url", format!("no HTTPS client with these settings: {error:#}"));
    };
    builder.build().map_err(unusable).ok()
}

fn tokens(
    settings: &WebhookSettings,
    url: Url,
    lookup: &Lookup,
    complain: &mut impl FnMut(&'static str, String),
) -> Option<Tokens> {
    let Some(WebhookAuth::ClientCredentials { client_id, client_secret, scope, .. }) =
        &settings.auth
    else {
        return None;
    };
    let client_secret = client_secret.expose_secret();
    for (key, value) in [("client_id", client_id.as_str()), ("client_secret", client_secret)] {
        if value.is_empty() {
            complain(key, "must not be empty".to_owned());
        }
    }
    let mut form = vec![("client_id", client_id.as_str()), ("client_secret", client_secret)];
    form.extend(scope.as_deref().map(|scope| ("scope", scope)));
    Some(Tokens::new(client(settings, &url, lookup, complain)?, url, &form))
}
