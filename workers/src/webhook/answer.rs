//! What a subscriber's answer means.

use anyhow::anyhow;
use reqwest::{StatusCode, header::HeaderMap};
use time::OffsetDateTime;

use crate::{Cause, HandleError, http};

pub(super) const WHOM: &str = "the subscriber";

/// As the standard suggests: 2xx is done; what may pass is tried again; the rest is for good. What is
/// wrong with the set-up and not with the event is `NotPermitted`, by which the breaker opens, so that
/// not everything that waits is parked for it.
pub(super) fn judge(
    status: StatusCode,
    headers: &HeaderMap,
    now: OffsetDateTime,
) -> Result<(), HandleError> {
    match status {
        StatusCode::GONE => {
            let told = anyhow!(
                "{WHOM} answered {status}: it wants no more events; once its team wants them again, \
                 `vestibule subscriber resume`"
            );
            Err(HandleError::retry(Cause::Gone, told))
        }
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
            let told = anyhow!("{WHOM} answered {status}; see its keys, `headers` and `auth`");
            Err(HandleError::park(Cause::NotPermitted, told))
        }
        StatusCode::NOT_FOUND | StatusCode::METHOD_NOT_ALLOWED => {
            let told =
                anyhow!("{WHOM} answered {status}: nothing takes events there; look at its `url`");
            Err(HandleError::park(Cause::NotPermitted, told))
        }
        _ if status.is_redirection() => {
            let told = anyhow!(
                "{WHOM} answered {status}: redirects are not followed; set `url` to the new address"
            );
            Err(HandleError::park(Cause::NotPermitted, told))
        }
        _ => http::judge(WHOM, status, headers, now),
    }
}
