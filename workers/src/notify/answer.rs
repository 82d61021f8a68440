//! What the answer of an HTTP service means, where it says so by its status alone.

use std::time::Duration;

use anyhow::anyhow;
use reqwest::{Response, StatusCode, header::HeaderMap};
use time::OffsetDateTime;

use crate::{Cause, HandleError, http};

/// Shorter than an attempt, so that a slow provider is told from a stuck worker.
pub(super) const TIMEOUT: Duration = Duration::from_secs(15);

/// So much of an answer is read, only to use the connection again; the rest is not waited for.
const ANSWER_BYTES_MAX: usize = 16 * 1024;
const DRAIN_LIMIT: Duration = Duration::from_millis(200);

/// A call that got no answer. `whom` is called so in the error, as in "the webhook".
pub(super) fn not_sent(whom: &str, error: reqwest::Error) -> HandleError {
    let cause = if error.is_timeout() { Cause::Timeout } else { Cause::Unavailable };
    // The URL may be a secret.
    let error = anyhow::Error::from(error.without_url());
    HandleError::retry(cause, error.context(format!("could not post to {whom}")))
}

/// What an answer means. Its body is neither kept nor shown: it may quote the message.
pub(super) fn judge(
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
    Err(HandleError::Retry { source, cause, after: http::retry_after(headers, now) })
}

/// Judges an answer, and reads what is there of it so that the connection can serve again.
pub(super) async fn judged(whom: &str, answer: Response) -> Result<(), HandleError> {
    let verdict = judge(whom, answer.status(), answer.headers(), OffsetDateTime::now_utc());
    // What the answer means is known; to wait long for the rest of it would only mean that the
    // message is sent again should the attempt run out of time.
    let _ = tokio::time::timeout(DRAIN_LIMIT, http::body(answer, ANSWER_BYTES_MAX)).await;
    verdict
}

#[cfg(test)]
mod tests {
    use time::macros::datetime;

    use super::*;

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
}
