//! Browsers, by Web Push: RFC 8030, encrypted by RFC 8291, identified by RFC 8292 (VAPID).
//!
//! The topic is made of the idempotency key: while a browser is away, its push service keeps one
//! message of a topic; and the page's service worker is given it as the tag under which it shows
//! the message, so that a second one takes the place of the first.

use std::time::Duration;

use anyhow::anyhow;
use reqwest::{
    Client, StatusCode, Url,
    header::{AUTHORIZATION, CONTENT_ENCODING, CONTENT_TYPE, HeaderValue, LOCATION},
};
use secrecy::{ExposeSecret, SecretString};
use serde_json::json;
use time::OffsetDateTime;

use super::{
    Note, Pushed, check_ttl,
    encrypt::{Browser, PLAIN_BYTES_MAX, encrypt},
    keys::{SigningKey, decode},
};
use crate::{
    Cause, HandleError, http,
    notify::{
        PATIENCE,
        channels::{Fault, Secrets},
        settings::{Urgency, WebPushSettings},
        stable,
        template::fitting,
    },
};

const WHOM: &str = "the push service";

/// A token is good for a day at most (RFC 8292); clocks differ.
const TOKEN_LIFE: Duration = Duration::from_secs(12 * 60 * 60);

pub(super) struct WebPush {
    client: Client,
    key: SigningKey,
    public_key: String,
    contact: String,
    ttl: Duration,
    urgency: Urgency,
}

impl std::fmt::Debug for WebPush {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "WebPush({})", self.contact)
    }
}

impl WebPush {
    pub(super) fn new(
        settings: &WebPushSettings,
        secrets: Secrets,
        faults: &mut Vec<Fault>,
    ) -> Option<Self> {
        let contact = &settings.contact;
        if !contact.starts_with("mailto:") && !contact.starts_with("https:") {
            let expected = "must be \"mailto:ADDRESS\" or an https URL, for push services to ask";
            faults.push(("contact", expected.to_owned()));
        }
        check_ttl(settings.ttl, faults);
        let public_key = settings.public_key.trim().trim_end_matches('=');
        if decode(public_key).is_none_or(|it| it.len() != 65 || it[0] != 4) {
            let expected = "must be 65 bytes in base64url, as pages subscribe with it";
            faults.push(("public_key", expected.to_owned()));
        } else if secrets == Secrets::Real {
            let key = SigningKey::vapid(settings.private_key.expose_secret(), public_key);
            let client = http::client(PATIENCE).ok();
            match (key, client) {
                (Some(key), Some(client)) => {
                    return Some(Self {
                        client,
                        key,
                        public_key: public_key.to_owned(),
                        contact: contact.clone(),
                        ttl: settings.ttl,
                        urgency: settings.urgency,
                    });
                }
                (None, _) => {
                    let expected = "must be 32 bytes in base64url, the other half of `public_key`";
                    faults.push(("private_key", expected.to_owned()));
                }
                (_, None) => faults.push(("contact", "no HTTPS client on this machine".into())),
            }
        }
        None
    }

    pub(super) async fn send(
        &self,
        endpoint: &SecretString,
        public_key: &str,
        auth: &SecretString,
        note: &Note<'_>,
    ) -> Result<Pushed, HandleError> {
        let unusable = |what| HandleError::park(Cause::InvalidRecipient, anyhow!("{what}"));
        let endpoint = Url::parse(endpoint.expose_secret())
            .map_err(|_| unusable("the browser's endpoint is no address"))?;
        let keys = decode(public_key).zip(decode(auth.expose_secret()));
        let (public_key, auth) = keys.ok_or_else(|| unusable("the browser's keys are none"))?;
        let browser = Browser { public_key: &public_key, auth: &auth };
        let body = encrypt(self.payload(note).as_bytes(), &browser)
            .map_err(|_| unusable("the browser's keys are none"))?;
        let authorization = self.authorization(&endpoint, note.now)?;
        let request = self
            .client
            .post(endpoint)
            .header(AUTHORIZATION, authorization)
            .header(CONTENT_ENCODING, "aes128gcm")
            .header(CONTENT_TYPE, "application/octet-stream")
            .header("ttl", self.ttl.as_secs())
            .header("urgency", self.urgency.as_str())
            .header("topic", stable::id(note.idempotency_key))
            .body(body);
        let sent = request.send().await.map_err(|error| http::not_sent(WHOM, error))?;
        if matches!(sent.status(), StatusCode::NOT_FOUND | StatusCode::GONE) {
            return Ok(Pushed::Gone { reason: "the push service knows no such subscription" });
        }
        // Where the message can be asked after; only its last part is the message's own.
        let id = sent.headers().get(LOCATION).and_then(|it| it.to_str().ok());
        let id = id.and_then(|it| it.rsplit('/').next()).map(str::to_owned);
        http::judged(WHOM, sent).await?;
        Ok(Pushed::Sent { id })
    }

    /// What the service worker of the page is given.
    fn payload(&self, note: &Note<'_>) -> String {
        let Note { message, event, idempotency_key, .. } = note;
        fitting(&message.body, PLAIN_BYTES_MAX, |body| {
            json!({
                "title": message.subject,
                "body": body,
                "tag": stable::id(idempotency_key),
                "data": { "event": event.id, "kind": event.kind },
            })
            .to_string()
        })
    }

    /// A token for one push service, which cannot use it at another.
    fn authorization(&self, to: &Url, now: OffsetDateTime) -> Result<HeaderValue, HandleError> {
        let claims = json!({
            "aud": to.origin().ascii_serialization(),
            "exp": (now + TOKEN_LIFE).unix_timestamp(),
            "sub": self.contact,
        });
        let token = self.key.token(None, &claims);
        let mut value = HeaderValue::try_from(format!("vapid t={token}, k={}", self.public_key))
            .map_err(|_| HandleError::park(Cause::Refused, anyhow!("a token that is no header")))?;
        value.set_sensitive(true);
        Ok(value)
    }
}
