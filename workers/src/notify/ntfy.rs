//! A topic of an ntfy server.
//!
//! The message is published as JSON, in which a title may hold any letter. It goes out under a
//! stable sequence id: a server from 2.16 on takes the second one for an update of the first, which
//! nobody is told of again.

use reqwest::{
    Client, Url,
    header::{AUTHORIZATION, HeaderValue},
};
use secrecy::{ExposeSecret, SecretString};
use serde_json::json;

use super::{
    PATIENCE,
    channels::Fault,
    settings::{NtfyPriority, NtfySettings},
    stable,
    template::{Message, clip_bytes},
};
use crate::{HandleError, http};

/// A longer message becomes an attachment.
const MESSAGE_BYTES_MAX: usize = 4096;

pub(super) struct Ntfy {
    client: Client,
    server: Url,
    topic: String,
    authorization: Option<HeaderValue>,
    priority: NtfyPriority,
}

/// Leaves out topic and token: they are secrets.
impl std::fmt::Debug for Ntfy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Ntfy({:?})", self.priority)
    }
}

impl Ntfy {
    pub(super) fn new(settings: &NtfySettings, faults: &mut Vec<Fault>) -> Option<Self> {
        let place = place(&settings.url, settings.token.is_some());
        let place = place.map_err(|fault| faults.push(("url", fault.to_owned()))).ok();
        let authorization = match &settings.token {
            None => Some(None),
            Some(token) => {
                let value = format!("Bearer {}", token.expose_secret());
                let value = HeaderValue::try_from(value).map(|mut it| {
                    it.set_sensitive(true);
                    Some(it)
                });
                value.map_err(|_| faults.push(("token", "cannot be a header".to_owned()))).ok()
            }
        };
        let client = http::client(PATIENCE);
        let client = client
            .map_err(|_| faults.push(("url", "no HTTPS client on this machine".to_owned())))
            .ok();
        let ((server, topic), authorization) = (place?, authorization?);
        Some(Self { client: client?, server, topic, authorization, priority: settings.priority })
    }

    pub(super) async fn send(
        &self,
        message: &Message,
        idempotency_key: &str,
    ) -> Result<(), HandleError> {
        let body = json!({
            "topic": self.topic,
            "title": message.subject,
            "message": clip_bytes(&message.body, MESSAGE_BYTES_MAX),
            "priority": self.priority as u8,
        });
        let mut request = self.client.post(self.server.clone()).json(&body);
        request = request.header("x-sequence-id", stable::id(idempotency_key));
        if let Some(authorization) = &self.authorization {
            request = request.header(AUTHORIZATION, authorization);
        }
        let sent = request.send().await.map_err(|error| http::not_sent("ntfy", error))?;
        http::judged("ntfy", sent).await
    }
}

/// The server and the topic in an address.
fn place(url: &SecretString, has_token: bool) -> Result<(Url, String), &'static str> {
    const SHAPE: &str = "must be the address of a topic, such as https://ntfy.example.com/TOPIC";
    let mut url = Url::parse(url.expose_secret()).map_err(|_| SHAPE)?;
    if !matches!(url.scheme(), "http" | "https") || !url.has_host() || url.query().is_some() {
        return Err(SHAPE);
    }
    if has_token {
        http::secure_url(url.as_str())?;
    }
    let mut segments: Vec<_> = url.path_segments().into_iter().flatten().collect();
    segments.retain(|it| !it.is_empty());
    let topic = segments.pop().ok_or(SHAPE)?.to_owned();
    let is_plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_');
    if !topic.chars().all(is_plain) {
        return Err(SHAPE);
    }
    let above = format!("/{}", segments.join("/"));
    url.set_path(&above);
    Ok((url, topic))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_a_server_and_a_topic() {
        let place = |url: &str, has_token| {
            let (server, topic) = place(&url.to_owned().into(), has_token)?;
            Ok::<_, &str>(format!("{server} {topic}"))
        };
        assert_eq!(place("https://ntfy.sh/a-B_1", true), Ok("https://ntfy.sh/ a-B_1".into()));
        assert_eq!(place("http://ntfy.lan/x/top/", false), Ok("http://ntfy.lan/x top".into()));
        for bad in ["https://ntfy.sh", "https://ntfy.sh/a?b", "ntfy.sh/a", "https://ntfy.sh/a%20b"]
        {
            assert!(place(bad, false).is_err(), "{bad}");
        }
        let clear = place("http://ntfy.lan/top", true).unwrap_err();
        assert!(clear.contains("https"), "a token does not travel in the clear: {clear}");
    }
}
