//! What every call of a worker over HTTP has in common.

use std::time::Duration;

use anyhow::anyhow;
use reqwest::{
    Client, ClientBuilder, Response, StatusCode, Url,
    header::{HeaderMap, HeaderName, HeaderValue},
    redirect,
};
use secrecy::{ExposeSecret, SecretString};
use time::{OffsetDateTime, PrimitiveDateTime, macros::format_description};

use crate::{Cause, HandleError, tls};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// A client that goes where it was told to and nowhere else.
///
/// `timeout` bounds a call as a whole, the reading of its answer included.
pub(crate) fn client(timeout: Duration) -> reqwest::Result<Client> {
    builder(timeout).build()
}

/// The same, for more to be said of it.
pub(crate) fn builder(timeout: Duration) -> ClientBuilder {
    tls::install_provider();
    Client::builder()
        .user_agent(concat!("vestibule/", env!("CARGO_PKG_VERSION")))
        // A redirect would carry the message and its headers to somebody nobody configured.
        .redirect(redirect::Policy::none())
        .connect_timeout(CONNECT_TIMEOUT.min(timeout))
        .timeout(timeout)
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

/// Headers that the configuration adds to a call: secrets, and none of those that `is_ours`.
pub(crate) fn headers(
    given: &[(String, SecretString)],
    is_ours: impl Fn(&str) -> bool,
) -> Result<HeaderMap, Vec<String>> {
    let (mut headers, mut faults) = (HeaderMap::new(), Vec::new());
    for (name, value) in given {
        if is_ours(&name.to_ascii_lowercase()) {
            faults.push(format!("`{name}` is set by Vestibule itself"));
            continue;
        }
        let header = (HeaderName::try_from(name), HeaderValue::try_from(value.expose_secret()));
        if let (Ok(name), Ok(mut value)) = header {
            value.set_sensitive(true);
            headers.append(name, value);
        } else {
            faults.push(format!("`{name}` is no header, or its value cannot be one"));
        }
    }
    if faults.is_empty() { Ok(headers) } else { Err(faults) }
}

/// A post that got no answer. `whom` is called so in the error, as in "the subscriber".
pub(crate) fn not_sent(whom: &str, error: reqwest::Error) -> HandleError {
    let cause = if error.is_timeout() { Cause::Timeout } else { Cause::Unavailable };
    // The URL may be a secret.
    let error = anyhow::Error::from(error.without_url());
    HandleError::retry(cause, error.context(format!("could not post to {whom}")))
}

/// What an answer means where its status alone says so. Its body is neither kept nor shown: it may
/// quote what was sent.
pub(crate) fn judge(
    whom: &str,
    status: StatusCode,
    headers: &HeaderMap,
    now: OffsetDateTime,
) -> Result<(), HandleError> {
    if status.is_success() {
        return Ok(());
    }
    let source = anyhow!("{whom} answered {status}");
    let cause = match status {
        StatusCode::REQUEST_TIMEOUT => Cause::Timeout,
        StatusCode::TOO_EARLY | StatusCode::TOO_MANY_REQUESTS => Cause::Throttled,
        _ if status.is_server_error() => Cause::Unavailable,
        _ => return Err(HandleError::Park { source, cause: Cause::Refused }),
    };
    Err(HandleError::Retry { source, cause, after: retry_after(headers, now) })
}

/// So much of an answer that says nothing more is read, only to use the connection again; the rest
/// is not waited for.
const REST_BYTES_MAX: usize = 16 * 1024;
const REST_LIMIT: Duration = Duration::from_millis(200);

/// Reads the rest of an answer whose meaning is known. To wait long for it would only mean that the
/// same is sent again should the attempt run out of time.
pub(crate) async fn read_rest(answer: Response) {
    let _ = tokio::time::timeout(REST_LIMIT, body(answer, REST_BYTES_MAX)).await;
}

/// Judges an answer by its status alone, and reads what is there of it so that the connection can
/// serve again.
pub(crate) async fn judged(whom: &str, answer: Response) -> Result<(), HandleError> {
    let verdict = judge(whom, answer.status(), answer.headers(), OffsetDateTime::now_utc());
    read_rest(answer).await;
    verdict
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
    fn an_answer_is_done_or_for_later_or_for_good() {
        let verdict = |status: u16| {
            let status = StatusCode::from_u16(status).unwrap();
            match judge("it", status, &HeaderMap::new(), datetime!(2026-01-01 00:00 UTC)) {
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
    fn headers_that_are_ours_stay_ours_and_none_is_printed() {
        let given = |names: &[&str]| -> Vec<_> {
            names.iter().map(|it| ((*it).to_owned(), SecretString::from("hidden"))).collect()
        };
        let is_ours = |name: &str| name == "host";
        let twice = headers(&given(&["Authorization", "x-tenant", "x-tenant"]), is_ours).unwrap();
        assert_eq!(twice.get_all("x-tenant").iter().count(), 2);
        assert!(!format!("{twice:?}").contains("hidden"));
        let faults = headers(&given(&["Host", "bad name"]), is_ours).unwrap_err();
        assert!(faults[0].contains("`Host`") && faults[1].contains("`bad name`"), "{faults:?}");
        assert!(!format!("{faults:?}").contains("hidden"));
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
