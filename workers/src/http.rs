//! What every call of a worker over HTTP has in common.

use std::time::Duration;

use reqwest::{Client, Response, Url, header::HeaderMap, redirect};
use time::{OffsetDateTime, PrimitiveDateTime, macros::format_description};

use crate::tls;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// A client that goes where it was told to and nowhere else.
///
/// `timeout` bounds a call as a whole, the reading of its answer included.
pub(crate) fn client(timeout: Duration) -> reqwest::Result<Client> {
    tls::install_provider();
    Client::builder()
        .user_agent(concat!("vestibule/", env!("CARGO_PKG_VERSION")))
        // A redirect would carry the message and its headers to somebody nobody configured.
        .redirect(redirect::Policy::none())
        .connect_timeout(CONNECT_TIMEOUT.min(timeout))
        .timeout(timeout)
        .build()
}

/// An address for calls that carry a secret: HTTPS, in the clear only on this machine.
pub(crate) fn secure_url(text: &str) -> Result<Url, &'static str> {
    const SHAPE: &str = "must be an https URL; http only to this machine (localhost, 127.0.0.1)";
    let url = Url::parse(text).map_err(|_| SHAPE)?;
    let local = matches!(url.host_str(), Some("localhost" | "127.0.0.1" | "[::1]"));
    let plain = url.query().is_none() && url.fragment().is_none() && url.username().is_empty();
    match url.scheme() {
        _ if !plain || url.password().is_some() => Err("must be without a name, query or fragment"),
        "https" if url.has_host() => Ok(url),
        "http" if local => Ok(url),
        _ => Err(SHAPE),
    }
}

/// An address that somebody's browser is sent to.
pub(crate) fn address(text: &str) -> Result<(), &'static str> {
    match Url::parse(text) {
        Ok(url) if matches!(url.scheme(), "http" | "https") && url.has_host() => Ok(()),
        _ => Err("must be an http or https URL"),
    }
}

/// The pause that an answer asks for (`Retry-After`): seconds, or the date of HTTP. What is neither
/// is as if it were not there.
pub(crate) fn retry_after(headers: &HeaderMap, now: OffsetDateTime) -> Option<Duration> {
    let text = headers.get(reqwest::header::RETRY_AFTER)?.to_str().ok()?;
    pause(text, now)
}

fn pause(text: &str, now: OffsetDateTime) -> Option<Duration> {
    let text = text.trim();
    if let Ok(seconds) = text.parse::<u64>() {
        return Some(Duration::from_secs(seconds));
    }
    let http_date = format_description!(
        "[weekday repr:short], [day] [month repr:short] [year] [hour]:[minute]:[second] GMT"
    );
    let date = PrimitiveDateTime::parse(text, http_date).ok()?.assume_utc();
    Some((date - now).try_into().unwrap_or_default())
}

/// The body of an answer, or `None` where it is longer than `bytes_max` or breaks off.
pub(crate) async fn body(mut answer: Response, bytes_max: usize) -> Option<Vec<u8>> {
    let mut body = Vec::new();
    while let Some(chunk) = answer.chunk().await.ok()? {
        if body.len() + chunk.len() > bytes_max {
            return None;
        }
        body.extend_from_slice(&chunk);
    }
    Some(body)
}

#[cfg(test)]
mod tests {
    use time::macros::datetime;

    use super::*;

    #[test]
    fn a_pause_is_asked_for_in_seconds_or_as_a_date() {
        let now = datetime!(2026-11-22 10:00:00 UTC);
        let seconds = |text| pause(text, now).map(|it| it.as_secs());
        assert_eq!(seconds("120"), Some(120));
        assert_eq!(seconds(" 0 "), Some(0));
        assert_eq!(seconds("Sun, 22 Nov 2026 10:01:30 GMT"), Some(90));
        assert_eq!(seconds("Sun, 22 Nov 2026 09:00:00 GMT"), Some(0));
        for nonsense in ["", "-1", "soon", "1.5", "Sun, 32 Nov 2026 09:00:00 GMT"] {
            assert_eq!(seconds(nonsense), None, "{nonsense}");
        }
    }

    #[test]
    fn a_secret_travels_in_the_clear_only_on_this_machine() {
        for good in
            ["https://graph.microsoft.com/v1.0", "http://127.0.0.1:8080", "http://localhost/x"]
        {
            assert!(secure_url(good).is_ok(), "{good}");
        }
        for bad in [
            "",
            "graph.microsoft.com",
            "http://graph.microsoft.com/v1.0",
            "http://127.0.0.1.example.com/",
            "ftp://localhost/",
            "https://user@example.com/",
            "https://example.com/?a=b",
        ] {
            assert!(secure_url(bad).is_err(), "{bad}");
        }
    }
}
