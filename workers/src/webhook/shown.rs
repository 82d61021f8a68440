//! An attempt as it is shown to whoever sets a subscriber up.

use reqwest::{
    Response, Url,
    header::{HeaderMap, HeaderValue},
};

use crate::http;

/// Longer than what tells why a subscriber does not take an event.
const SHOWN_CHARS_MAX: usize = 2_000;
const ANSWER_BYTES_MAX: usize = 64 * 1024;

pub(super) fn request(url: &Url, headers: &HeaderMap, body: &[u8]) -> Vec<String> {
    // What comes behind the host is often as good as a password.
    let mut lines = vec![format!("POST {}/…", url.origin().ascii_serialization())];
    lines.extend(header_lines(headers));
    lines.push(String::new());
    lines.extend(text_lines(body));
    lines
}

pub(super) async fn answer(answer: Response) -> Vec<String> {
    let mut lines = vec![format!("{:?} {}", answer.version(), answer.status())];
    lines.extend(header_lines(answer.headers()));
    lines.push(String::new());
    match http::body(answer, ANSWER_BYTES_MAX).await {
        Some(body) => lines.extend(text_lines(&body)),
        None => lines.push("(the body is too long, or broke off)".to_owned()),
    }
    lines
}

fn header_lines(headers: &HeaderMap) -> impl Iterator<Item = String> {
    let value = |value: &HeaderValue| match value.is_sensitive() {
        true => "…".to_owned(),
        false => plain(&String::from_utf8_lossy(value.as_bytes())),
    };
    headers.iter().map(move |(name, it)| format!("{name}: {}", value(it)))
}

fn text_lines(body: &[u8]) -> Vec<String> {
    let text = String::from_utf8_lossy(body);
    let mut lines: Vec<_> =
        text.chars().take(SHOWN_CHARS_MAX).collect::<String>().lines().map(plain).collect();
    if text.chars().nth(SHOWN_CHARS_MAX).is_some() {
        lines.push("…".to_owned());
    }
    lines
}

/// Nothing that could command somebody's terminal.
fn plain(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}
