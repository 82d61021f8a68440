//! Firebase Cloud Messaging, HTTP v1.
//!
//! We are a service account: its key signs an assertion (RFC 7523) for which Google's token service
//! gives an access token. The collapse key and the tag are made of the idempotency key: a phone that
//! gets a message twice shows it once.

use std::time::Duration;

use anyhow::anyhow;
use reqwest::{Client, Response, StatusCode, Url};
use secrecy::{ExposeSecret, SecretString};
use serde::Deserialize;
use serde_json::{Value, json};
use time::OffsetDateTime;

use super::{Note, Pushed, check_ttl, keys::SigningKey};
use crate::{
    Cause, HandleError, http,
    notify::{
        PATIENCE,
        channels::{Fault, Secrets},
        settings::FcmSettings,
        stable,
        template::fitting,
    },
    token::{Token, TokenError, Tokens},
};

const WHOM: &str = "Firebase";

const SCOPE: &str = "https://www.googleapis.com/auth/firebase.messaging";

/// An assertion is good for an hour at most.
const ASSERTION_LIFE: Duration = Duration::from_secs(60 * 60);

/// Of a message; with some room for what Firebase adds.
const TEXT_BYTES_MAX: usize = 3500;

const ANSWER_BYTES_MAX: usize = 16 * 1024;

pub(super) struct Fcm {
    client: Client,
    url: Url,
    tokens: Tokens,
    ttl: Duration,
}

impl std::fmt::Debug for Fcm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Fcm({})", self.url)
    }
}

/// A key file of a service account; what else is in it we do not need.
#[derive(Deserialize)]
struct ServiceAccount {
    project_id: String,
    private_key_id: String,
    private_key: String,
    client_email: String,
    token_uri: String,
}

impl Fcm {
    pub(super) fn new(
        settings: &FcmSettings,
        secrets: Secrets,
        faults: &mut Vec<Fault>,
    ) -> Option<Self> {
        check_ttl(settings.ttl, faults);
        let base = http::secure_url(settings.base_url.trim_end_matches('/'));
        let base = base.map_err(|fault| faults.push(("url", fault.to_owned()))).ok();
        if secrets == Secrets::StandIns {
            return None;
        }
        let mut wrong = |what: &str| faults.push(("service_account", what.to_owned()));
        let mut account: ServiceAccount =
            serde_json::from_str(settings.service_account.expose_secret())
                .map_err(|_| {
                    wrong("must be the whole JSON file that the Firebase console gives");
                })
                .ok()?;
        let pem = SecretString::from(std::mem::take(&mut account.private_key));
        let key = SigningKey::rs256(pem.expose_secret());
        let token_url = http::secure_url(&account.token_uri);
        let client = http::client(PATIENCE).ok();
        if key.is_none() {
            wrong("its `private_key` is no RSA key in PEM");
        }
        if token_url.is_err() {
            wrong("its `token_uri` is no https URL");
        }
        if client.is_none() {
            wrong("no HTTPS client on this machine");
        }
        let (mut url, key, token_url, client) = (base?, key?, token_url.ok()?, client?);
        url.path_segments_mut().expect("an http address has a path").pop_if_empty().extend([
            "v1",
            "projects",
            &account.project_id,
            "messages:send",
        ]);
        let assertion = move |now: OffsetDateTime| assertion(&account, &key, now);
        let tokens = Tokens::for_assertions(client.clone(), token_url, assertion);
        Some(Self { client, url, tokens, ttl: settings.ttl })
    }

    /// A token that Firebase does not take is renewed once.
    pub(super) async fn send(
        &self,
        device: &SecretString,
        note: &Note<'_>,
    ) -> Result<Pushed, HandleError> {
        let message = self.message(device, note);
        let token = self.token().await?;
        let answer = self.post(&message, &token).await?;
        if answer.status() != StatusCode::UNAUTHORIZED {
            return judge(answer).await;
        }
        self.tokens.discard(&token);
        let token = self.token().await?;
        judge(self.post(&message, &token).await?).await
    }

    async fn token(&self) -> Result<Token, HandleError> {
        self.tokens.token().await.map_err(|error| {
            let (cause, after) = error.cause();
            let source = match error {
                TokenError::Refused { status, error, .. } => anyhow!(
                    "Google gave no access token ({status}, {error}); see `service_account`, and \
                     that this machine's clock is right"
                ),
                other => anyhow!("{other}"),
            };
            HandleError::Retry { source, cause, after }
        })
    }

    async fn post(&self, message: &str, token: &Token) -> Result<Response, HandleError> {
        let request = self.client.post(self.url.clone()).bearer_auth(token.expose());
        let request = request.header("content-type", "application/json");
        let sent = request.body(message.to_owned()).send().await;
        sent.map_err(|error| http::not_sent(WHOM, error))
    }

    fn message(&self, device: &SecretString, note: &Note<'_>) -> String {
        let id = stable::id(note.idempotency_key);
        let text = &note.message;
        fitting(&text.body, TEXT_BYTES_MAX, |body| {
            json!({
                "message": {
                    "token": device.expose_secret(),
                    "notification": { "title": text.subject, "body": body },
                    "data": { "event": note.event.id, "kind": note.event.kind },
                    "android": {
                        "collapse_key": id,
                        "ttl": format!("{}s", self.ttl.as_secs()),
                        "notification": { "tag": id },
                    },
                    "apns": { "headers": { "apns-collapse-id": id } },
                    "webpush": { "headers": { "Topic": id } },
                },
            })
            .to_string()
        })
    }
}

/// What we ask the token service with.
fn assertion(account: &ServiceAccount, key: &SigningKey, now: OffsetDateTime) -> SecretString {
    let claims = json!({
        "iss": account.client_email,
        "scope": SCOPE,
        "aud": account.token_uri,
        "iat": now.unix_timestamp(),
        "exp": (now + ASSERTION_LIFE).unix_timestamp(),
    });
    key.token(Some(&account.private_key_id), &claims).into()
}

/// What an answer means. Only its codes are looked at: its words may quote the message.
async fn judge(answer: Response) -> Result<Pushed, HandleError> {
    let status = answer.status();
    let verdict = http::judge(WHOM, status, answer.headers(), OffsetDateTime::now_utc());
    let body = http::body(answer, ANSWER_BYTES_MAX).await;
    let body: Value = body.and_then(|it| serde_json::from_slice(&it).ok()).unwrap_or_default();
    if status.is_success() {
        // `projects/PROJECT/messages/ID`
        let id = body["name"].as_str().and_then(|it| it.rsplit('/').next()).map(str::to_owned);
        return Ok(Pushed::Sent { id });
    }
    match (status, code(&body)) {
        (StatusCode::NOT_FOUND, "UNREGISTERED") => {
            Ok(Pushed::Gone { reason: "Firebase: the device is unregistered" })
        }
        // It does not say what it has not found, and may mean the project.
        (StatusCode::NOT_FOUND, "NOT_FOUND") => {
            let source = anyhow!(
                "Firebase has not found it ({status}); see that `service_account` is of the app's \
                 project"
            );
            Err(HandleError::park(Cause::InvalidRecipient, source))
        }
        (StatusCode::FORBIDDEN, "SENDER_ID_MISMATCH") => {
            let source = anyhow!(
                "Firebase knows the device in another project (SENDER_ID_MISMATCH); see that \
                 `service_account` is of the app's project"
            );
            Err(HandleError::park(Cause::InvalidRecipient, source))
        }
        (StatusCode::UNAUTHORIZED, _) | (StatusCode::FORBIDDEN, "PERMISSION_DENIED") => {
            let source = anyhow!(
                "Firebase does not let us send ({status}); see that the service account may use \
                 the messaging API of its project"
            );
            Err(HandleError::retry(Cause::NotPermitted, source))
        }
        (_, code) => match verdict {
            Err(HandleError::Park { source, cause }) if !code.is_empty() => {
                Err(HandleError::Park { source: anyhow!("{source} ({code})"), cause })
            }
            Err(error) => Err(error),
            Ok(()) => unreachable!("what succeeds was returned above"),
        },
    }
}

/// Firebase's own code, or else the general one: upper-case words without anything of the message.
fn code(body: &Value) -> &str {
    let error = &body["error"];
    let details = error["details"].as_array().map(Vec::as_slice).unwrap_or_default();
    let mut own = details.iter().filter_map(|it| it["errorCode"].as_str());
    let code =
        own.find(|it| !it.is_empty()).or_else(|| error["status"].as_str()).unwrap_or_default();
    let is_code = code.len() <= 60 && code.bytes().all(|it| it.is_ascii_uppercase() || it == b'_');
    if is_code { code } else { "" }
}
