//! Incoming webhooks: one POST of JSON, and what its answer means.
//!
//! All formats carry plain text only, so that what a person typed into the form cannot become a
//! link, a mention or a picture in somebody's chat.

use anyhow::anyhow;
use reqwest::{
    Client, Url,
    header::{CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue},
};
use secrecy::{ExposeSecret, SecretString};
use serde_json::{Value, json};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};
use vestibule_events::SignUpEvent;

use super::{
    PATIENCE,
    channels::{Fault, Secrets},
    settings::WebhookFormat,
    stable,
    template::{Message, clip},
};
use crate::{Cause, HandleError, http, webhook::sign::SigningKeys};

/// Slack's own limits for a header and a section.
const SLACK_HEADER_CHARS_MAX: usize = 150;
const SLACK_TEXT_CHARS_MAX: usize = 3000;

const WHOM: &str = "the webhook";

const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");

/// Set by us or by HTTP itself.
const OURS: [&str; 9] = [
    "content-type",
    "content-length",
    "host",
    "idempotency-key",
    "webhook-id",
    "webhook-timestamp",
    "webhook-signature",
    "transfer-encoding",
    "connection",
];

/// Somewhere to post to.
pub(super) struct Webhook {
    client: Client,
    url: Url,
    headers: HeaderMap,
    format: WebhookFormat,
    signing: Option<SigningKeys>,
}

/// Leaves URL and headers out: they are secrets.
impl std::fmt::Debug for Webhook {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Webhook({:?})", self.format)
    }
}

impl Webhook {
    pub(super) fn new(
        url: &SecretString,
        format: WebhookFormat,
        headers: &[(String, SecretString)],
        signing_key: Option<&SecretString>,
        secrets: Secrets,
        faults: &mut Vec<Fault>,
    ) -> Option<Self> {
        let headers = parse_headers(headers, faults);
        let signing = signing(signing_key, format, secrets, faults);
        let url = match Url::parse(url.expose_secret()) {
            Ok(url) if matches!(url.scheme(), "http" | "https") && url.has_host() => Some(url),
            _ => {
                faults.push(("url", "must be an http or https URL".to_owned()));
                None
            }
        };
        let client = match http::client(PATIENCE) {
            Ok(client) => Some(client),
            Err(error) => {
                faults.push(("url", format!("no HTTPS client: {:#}", anyhow::Error::from(error))));
                None
            }
        };
        Some(Self { client: client?, url: url?, headers: headers?, format, signing: signing? })
    }

    /// Posts a message. The key is the same however often this event is told.
    pub(super) async fn send(
        &self,
        message: &Message,
        event: &SignUpEvent,
        channel: &str,
        idempotency_key: &str,
    ) -> Result<(), HandleError> {
        let mut headers = self.headers.clone();
        let key = HeaderValue::from_str(idempotency_key)
            .map_err(|_| HandleError::park(Cause::Refused, anyhow!("a key that is no header")))?;
        headers.insert(IDEMPOTENCY_KEY, key);
        headers.insert(CONTENT_TYPE, HeaderValue::from_static(content_type(self.format)));
        let body = body(self.format, message, event, channel, idempotency_key).to_string();
        if let Some(keys) = &self.signing {
            // An id of Standard Webhooks holds no full stop, which our keys do.
            let id = HeaderValue::try_from(stable::id(idempotency_key))
                .expect("letters, digits, hyphens and underscores can stand in a header");
            headers.extend(keys.headers(&id, OffsetDateTime::now_utc(), body.as_bytes()));
        }
        let request = self.client.post(self.url.clone()).headers(headers).body(body);
        let sent = request.send().await.map_err(|error| http::not_sent(WHOM, error))?;
        http::judged(WHOM, sent).await
    }
}

/// The keys that sign, if any; the outer `None` is a fault, or a key that was not looked into.
fn signing(
    key: Option<&SecretString>,
    format: WebhookFormat,
    secrets: Secrets,
    faults: &mut Vec<Fault>,
) -> Option<Option<SigningKeys>> {
    let Some(key) = key else { return Some(None) };
    if format != WebhookFormat::Json {
        let fault = "only the format \"json\" is signed: chats do not check signatures";
        faults.push(("signing_key", fault.to_owned()));
        return None;
    }
    if secrets == Secrets::StandIns {
        return None;
    }
    let keys = SigningKeys::parse(std::slice::from_ref(key));
    keys.map(Some).map_err(|error| faults.push(("signing_key", error.to_string()))).ok()
}

fn parse_headers(headers: &[(String, SecretString)], faults: &mut Vec<Fault>) -> Option<HeaderMap> {
    let parsed = http::headers(headers, |name| OURS.contains(&name));
    parsed.map_err(|them| faults.extend(them.into_iter().map(|it| ("headers", it)))).ok()
}

const fn content_type(format: WebhookFormat) -> &'static str {
    match format {
        WebhookFormat::Teams | WebhookFormat::Slack => "application/json",
        WebhookFormat::Json => "application/cloudevents+json",
    }
}

fn body(
    format: WebhookFormat,
    message: &Message,
    event: &SignUpEvent,
    channel: &str,
    idempotency_key: &str,
) -> Value {
    let Message { subject, body } = message;
    match format {
        // A text run, unlike a text block, knows no Markdown.
        WebhookFormat::Teams => {
            let run = |run: Value| json!({ "type": "RichTextBlock", "inlines": [run] });
            let bold =
                json!({ "type": "TextRun", "text": subject, "weight": "Bolder", "size": "Medium" });
            let mut blocks = vec![run(bold)];
            if !body.is_empty() {
                blocks.push(run(json!({ "type": "TextRun", "text": body })));
            }
            json!({
                "type": "message",
                "attachments": [{
                    "contentType": "application/vnd.microsoft.card.adaptive",
                    "contentUrl": null,
                    "content": {
                        "$schema": "http://adaptivecards.io/schemas/adaptive-card.json",
                        "type": "AdaptiveCard",
                        "version": "1.4",
                        "body": blocks,
                    },
                }],
            })
        }
        WebhookFormat::Slack => {
            let plain =
                |text: String| json!({ "type": "plain_text", "text": text, "emoji": false });
            let header = plain(clip(subject, SLACK_HEADER_CHARS_MAX));
            let mut blocks = vec![json!({ "type": "header", "text": header })];
            if !body.is_empty() {
                let text = plain(clip(body, SLACK_TEXT_CHARS_MAX));
                blocks.push(json!({ "type": "section", "text": text }));
            }
            json!({ "text": slack_escape(subject), "blocks": blocks })
        }
        WebhookFormat::Json => json!({
            "specversion": "1.0",
            "id": idempotency_key,
            "source": format!("/workers/{}/{channel}", super::Notify::NAME),
            "type": "dev.vestibule.notification",
            "subject": event.person,
            "time": event.time.format(&Rfc3339).unwrap_or_default(),
            "datacontenttype": "application/json",
            "data": {
                "subject": subject,
                "body": body,
                "event": event.id,
                "kind": event.kind,
                "connector": event.sign_up.connector,
            },
        }),
    }
}

/// The text beside the blocks is Slack's own markup, in which `<!channel>` calls everybody.
fn slack_escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::claims::sample;

    fn message() -> Message {
        Message { subject: "A <!channel> & [b](c)".into(), body: "line\nline".into() }
    }

    #[test]
    fn each_format_is_what_its_service_takes_and_plain_text() {
        let body = |format| body(format, &message(), &sample(), "ops", "k1");

        let teams = body(WebhookFormat::Teams);
        let card = &teams["attachments"][0]["content"];
        assert_eq!(teams["type"], "message");
        assert_eq!(card["type"], "AdaptiveCard");
        assert_eq!(card["body"][0]["type"], "RichTextBlock");
        assert_eq!(card["body"][0]["inlines"][0]["text"], "A <!channel> & [b](c)");
        assert_eq!(card["body"][1]["inlines"][0]["text"], "line\nline");

        let slack = body(WebhookFormat::Slack);
        assert_eq!(slack["text"], "A &lt;!channel&gt; &amp; [b](c)");
        assert_eq!(slack["blocks"][0]["text"]["type"], "plain_text");
        assert_eq!(slack["blocks"][1]["text"]["text"], "line\nline");

        let json = body(WebhookFormat::Json);
        assert_eq!(json["id"], "k1");
        assert_eq!(json["source"], "/workers/notify/ops");
        assert_eq!(json["data"]["kind"], "accepted");
        assert_eq!(json["data"]["body"], "line\nline");
        assert!(!json.to_string().contains("sample@example.com"), "claims stay here");
    }

    #[test]
    fn nothing_secret_is_printed_and_our_headers_are_ours() {
        let mut faults = Vec::new();
        let headers = [("Authorization".to_owned(), SecretString::from("hidden"))];
        let url = SecretString::from("https://example.com/hidden");
        let webhook =
            Webhook::new(&url, WebhookFormat::Json, &headers, None, Secrets::Real, &mut faults)
                .unwrap();
        assert!(!format!("{webhook:?}").contains("hidden"));

        let headers = ["Host", "bad name"].map(|it| (it.to_owned(), SecretString::from("hidden")));
        let url = SecretString::from("ftp://hidden");
        let key = SecretString::from("hidden");
        for format in [WebhookFormat::Json, WebhookFormat::Slack] {
            let made = Webhook::new(&url, format, &headers, Some(&key), Secrets::Real, &mut faults);
            assert!(made.is_none());
        }
        let keys: Vec<_> = faults.iter().map(|(key, _)| *key).collect();
        let each = ["headers", "headers", "signing_key", "url"];
        assert_eq!(keys, [each, each].concat());
        assert!(!format!("{faults:?}").contains("hidden"));
    }
}
