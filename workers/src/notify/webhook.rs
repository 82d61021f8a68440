//! Incoming webhooks: one POST of JSON, and what its answer means.
//!
//! All formats carry plain text only, so that what a person typed into the form cannot become a
//! link, a mention or a picture in somebody's chat.

use std::time::Duration;

use anyhow::anyhow;
use reqwest::{
    Client, Response, StatusCode, Url,
    header::{CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue},
};
use secrecy::{ExposeSecret, SecretString};
use serde_json::{Value, json};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};
use vestibule_events::SignUpEvent;

use super::{
    Fault, WebhookFormat,
    template::{Message, clip},
};
use crate::{Cause, HandleError, http};

/// Shorter than an attempt, so that a slow provider is told from a stuck worker.
const TIMEOUT: Duration = Duration::from_secs(15);

/// So much of an answer is read, only to use the connection again; the rest is not waited for.
const ANSWER_BYTES_MAX: usize = 16 * 1024;
const DRAIN_LIMIT: Duration = Duration::from_millis(200);

/// Slack's own limits for a header and a section.
const SLACK_HEADER_CHARS_MAX: usize = 150;
const SLACK_TEXT_CHARS_MAX: usize = 3000;

const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");

/// Set by us or by HTTP itself.
const OURS: [&str; 6] = [
    "content-type",
    "content-length",
    "host",
    "idempotency-key",
    "transfer-encoding",
    "connection",
];

/// Somewhere to post to.
pub(super) struct Webhook {
    client: Client,
    url: Url,
    headers: HeaderMap,
    format: WebhookFormat,
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
        faults: &mut Vec<Fault>,
    ) -> Option<Self> {
        let headers = parse_headers(headers, faults);
        let url = match Url::parse(url.expose_secret()) {
            Ok(url) if matches!(url.scheme(), "http" | "https") && url.has_host() => Some(url),
            _ => {
                faults.push(("url", "must be an http or https URL".to_owned()));
                None
            }
        };
        let client = match http::client(TIMEOUT) {
            Ok(client) => Some(client),
            Err(error) => {
                faults.push(("url", format!("no HTTPS client: {:#}", anyhow::Error::from(error))));
                None
            }
        };
        Some(Self { client: client?, url: url?, headers: headers?, format })
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
        let request = self.client.post(self.url.clone()).headers(headers).body(body);
        let answer = request.send().await.map_err(not_sent)?;
        let verdict = judge(answer.status(), answer.headers(), OffsetDateTime::now_utc());
        // What the answer means is known; to wait long for the rest of it would only mean that the
        // message is sent again should the attempt run out of time.
        let _ = tokio::time::timeout(DRAIN_LIMIT, drain(answer)).await;
        verdict
    }
}

fn parse_headers(headers: &[(String, SecretString)], faults: &mut Vec<Fault>) -> Option<HeaderMap> {
    let before = faults.len();
    let mut parsed = HeaderMap::new();
    for (name, value) in headers {
        if OURS.contains(&name.to_ascii_lowercase().as_str()) {
            faults.push(("headers", format!("`{name}` is set by Vestibule itself")));
            continue;
        }
        let header = (HeaderName::try_from(name), HeaderValue::try_from(value.expose_secret()));
        if let (Ok(name), Ok(mut value)) = header {
            value.set_sensitive(true);
            parsed.append(name, value);
        } else {
            faults.push(("headers", format!("`{name}` is no header, or its value cannot be one")));
        }
    }
    (faults.len() == before).then_some(parsed)
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

fn not_sent(error: reqwest::Error) -> HandleError {
    let cause = if error.is_timeout() { Cause::Timeout } else { Cause::Unavailable };
    let error = anyhow::Error::from(error.without_url());
    HandleError::retry(cause, error.context("could not post to the webhook"))
}

/// What an answer means. Its body is neither kept nor shown: it may quote the message.
fn judge(status: StatusCode, headers: &HeaderMap, now: OffsetDateTime) -> Result<(), HandleError> {
    if status.is_success() {
        return Ok(());
    }
    let source = anyhow!("the webhook answered {status}");
    let cause = match status {
        StatusCode::REQUEST_TIMEOUT => Cause::Timeout,
        StatusCode::TOO_EARLY | StatusCode::TOO_MANY_REQUESTS => Cause::Throttled,
        _ if status.is_server_error() => Cause::Unavailable,
        _ => return Err(HandleError::Park { source, cause: Cause::Refused }),
    };
    Err(HandleError::Retry { source, cause, after: http::retry_after(headers, now) })
}

/// Reads what is there, so that the connection can serve again; a long answer costs it.
async fn drain(mut answer: Response) {
    let mut bytes = 0;
    while let Ok(Some(chunk)) = answer.chunk().await {
        bytes += chunk.len();
        if bytes > ANSWER_BYTES_MAX {
            break;
        }
    }
}

#[cfg(test)]
mod tests {
    use time::macros::datetime;

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
    fn an_answer_is_done_or_for_later_or_for_good() {
        let verdict = |status: u16| {
            let status = StatusCode::from_u16(status).unwrap();
            match judge(status, &HeaderMap::new(), datetime!(2026-01-01 00:00 UTC)) {
                Ok(()) => None,
                Err(HandleError::Retry { cause, .. }) => Some((true, cause)),
                Err(HandleError::Park { cause, .. }) => Some((false, cause)),
                Err(HandleError::StoreUnavailable(_)) => unreachable!(),
            }
        };
        for done in [200, 201, 202, 204] {
            assert_eq!(verdict(done), None, "{done}");
        }
        assert_eq!(verdict(408), Some((true, Cause::Timeout)));
        for throttled in [425, 429] {
            assert_eq!(verdict(throttled), Some((true, Cause::Throttled)), "{throttled}");
        }
        for down in [500, 502, 503, 504, 599] {
            assert_eq!(verdict(down), Some((true, Cause::Unavailable)), "{down}");
        }
        for refused in [301, 302, 307, 400, 401, 403, 404, 410, 413, 422] {
            assert_eq!(verdict(refused), Some((false, Cause::Refused)), "{refused}");
        }
    }

    #[test]
    fn nothing_secret_is_printed_and_our_headers_are_ours() {
        let mut faults = Vec::new();
        let headers = [("Authorization".to_owned(), SecretString::from("hidden"))];
        let url = SecretString::from("https://example.com/hidden");
        let webhook = Webhook::new(&url, WebhookFormat::Json, &headers, &mut faults).unwrap();
        assert!(!format!("{webhook:?}").contains("hidden"));

        let headers = ["Host", "bad name"].map(|it| (it.to_owned(), SecretString::from("hidden")));
        let url = SecretString::from("ftp://hidden");
        assert!(Webhook::new(&url, WebhookFormat::Json, &headers, &mut faults).is_none());
        let keys: Vec<_> = faults.iter().map(|(key, _)| *key).collect();
        assert_eq!(keys, ["headers", "headers", "url"]);
        assert!(!format!("{faults:?}").contains("hidden"));
    }
}
