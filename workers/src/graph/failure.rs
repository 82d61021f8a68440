//! What an answer of Graph means.

use std::{fmt, time::Duration};

use anyhow::anyhow;
use reqwest::{Response, StatusCode, header::HeaderMap};
use serde::Deserialize;
use time::OffsetDateTime;

use super::Call;
use crate::{Cause, HandleError, http, token::TokenError};

/// An error is short; more of it is not read.
const ERROR_BYTES_MAX: usize = 16 * 1024;

/// A call that came to nothing. Holds no personal data.
#[derive(Debug, thiserror::Error)]
#[error("could not {}: {problem}", .call.as_words())]
pub(crate) struct GraphError {
    pub(super) call: Call,
    pub(crate) problem: Problem,
}

/// Why.
#[derive(Debug)]
pub(crate) enum Problem {
    /// Nobody can tell whether Graph has acted.
    NoAnswer(reqwest::Error),
    /// Graph has not acted.
    Throttled {
        after: Option<Duration>,
    },
    /// Graph may have acted.
    Unavailable {
        status: StatusCode,
        after: Option<Duration>,
    },
    /// It is not there, or not to be seen yet.
    NotFound,
    /// Something of these values is there already.
    Conflict(Told),
    /// The values are not to Graph's liking.
    Invalid(Told),
    /// A new token did not help.
    NotLetIn,
    NotPermitted,
    NoToken(TokenError),
    Refused {
        status: StatusCode,
        told: Told,
    },
    /// Graph has acted, and its answer cannot be read.
    Unreadable,
}

/// What Graph told, without its words: they quote values.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Told {
    code: String,
    /// The properties that are at fault.
    properties: Vec<String>,
    conflict: bool,
    /// What the call refers to is not there; it may not be to be seen yet.
    missing: bool,
}

impl fmt::Display for Told {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.code.is_empty() { "no error code" } else { &self.code })?;
        if self.properties.is_empty() {
            return Ok(());
        }
        write!(f, " because of {}", self.properties.join(", "))
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoAnswer(error) if error.is_timeout() => {
                f.write_str("Graph did not answer in time")
            }
            Self::NoAnswer(error) if error.is_connect() => f.write_str("Graph cannot be reached"),
            Self::NoAnswer(_) => f.write_str("the connection to Graph was lost"),
            Self::Throttled { .. } => f.write_str("Graph asks us to slow down"),
            Self::Unavailable { status, .. } => write!(f, "Graph answered {status}"),
            Self::NotFound => f.write_str("Graph does not know it, or not yet"),
            Self::Conflict(told) => write!(f, "the directory has it already ({told})"),
            Self::Invalid(told) => write!(f, "Graph does not take the values ({told})"),
            Self::NotLetIn => f.write_str(
                "Graph does not accept our token; see that `graph_url` and `token_url` belong \
                 together, the event is tried again",
            ),
            Self::NotPermitted => f.write_str("Graph does not permit it"),
            Self::NoToken(error) => write!(f, "{error}"),
            Self::Refused { status, told } => write!(f, "Graph answered {status} ({told})"),
            Self::Unreadable => f.write_str("Graph's answer cannot be read"),
        }
    }
}

impl From<GraphError> for HandleError {
    fn from(error: GraphError) -> Self {
        let (cause, after) = match &error.problem {
            Problem::NoAnswer(it) if it.is_timeout() => (Cause::Timeout, None),
            Problem::NoAnswer(_) | Problem::Unreadable => (Cause::Unavailable, None),
            Problem::Throttled { after } => (Cause::Throttled, *after),
            Problem::Unavailable { after, .. } => (Cause::Unavailable, *after),
            Problem::NotLetIn => (Cause::NotPermitted, None),
            Problem::NoToken(it) => it.cause(),
            Problem::NotPermitted => {
                // About us and not about the person: once an administrator has consented, the same
                // event goes through.
                let permission = error.call.permission();
                let hint = match error.call {
                    Call::Invite => {
                        "; or the directory's settings for guests forbid invitations by applications"
                    }
                    _ => "",
                };
                let source = anyhow!(
                    "{error}: give the application the permission {permission} with an \
                     administrator's consent{hint}; the event is tried again"
                );
                return Self::retry(Cause::NotPermitted, source);
            }
            // The collections are always there, so it is our address that is wrong.
            Problem::NotFound if error.call.is_of_collection() => {
                let source = anyhow!("{error}: see `graph_url`; the event is tried again");
                return Self::retry(Cause::Unavailable, source);
            }
            Problem::NotFound
            | Problem::Conflict(_)
            | Problem::Invalid(_)
            | Problem::Refused { .. } => return Self::park(Cause::Refused, error),
        };
        Self::Retry { source: error.into(), cause, after }
    }
}

/// Lets a success through.
pub(super) async fn judge(call: Call, answer: Response) -> Result<Response, GraphError> {
    let status = answer.status();
    if status.is_success() {
        return Ok(answer);
    }
    let headers = answer.headers().clone();
    // Where the body says more than the status, and only there, it is waited for.
    let told = match status {
        StatusCode::BAD_REQUEST | StatusCode::CONFLICT => {
            told(&http::body(answer, ERROR_BYTES_MAX).await.unwrap_or_default())
        }
        _ => Told::default(),
    };
    Err(call.failed(problem(status, &headers, told, OffsetDateTime::now_utc())))
}

fn problem(status: StatusCode, headers: &HeaderMap, told: Told, now: OffsetDateTime) -> Problem {
    let after = http::retry_after(headers, now);
    match status {
        StatusCode::TOO_MANY_REQUESTS => Problem::Throttled { after },
        StatusCode::REQUEST_TIMEOUT => Problem::Unavailable { status, after },
        _ if status.is_server_error() => Problem::Unavailable { status, after },
        StatusCode::UNAUTHORIZED => Problem::NotLetIn,
        StatusCode::FORBIDDEN => Problem::NotPermitted,
        StatusCode::NOT_FOUND => Problem::NotFound,
        StatusCode::CONFLICT => Problem::Conflict(told),
        StatusCode::BAD_REQUEST if told.conflict => Problem::Conflict(told),
        StatusCode::BAD_REQUEST if told.missing => Problem::NotFound,
        StatusCode::BAD_REQUEST => Problem::Invalid(told),
        _ => Problem::Refused { status, told },
    }
}

#[derive(Deserialize)]
struct Envelope {
    error: Told400,
}

#[derive(Deserialize)]
struct Told400 {
    #[serde(default)]
    code: String,
    #[serde(default)]
    message: String,
    #[serde(default)]
    details: Vec<Detail>,
}

#[derive(Deserialize)]
struct Detail {
    #[serde(default)]
    code: String,
    #[serde(default)]
    target: Option<String>,
}

/// Of what Graph tells, only names: those of errors and of properties.
fn told(body: &[u8]) -> Told {
    let Ok(Envelope { error }) = serde_json::from_slice(body) else {
        return Told::default();
    };
    let mut properties: Vec<_> = error.details.iter().filter_map(|it| it.target.clone()).collect();
    // `Invalid value specified for property 'city' of resource 'User'.`
    let named = error.message.split("property ").skip(1).filter_map(|rest| {
        rest.trim_start_matches('\'').split(|c: char| !is_name(c)).next().map(str::to_owned)
    });
    properties.extend(named);
    properties.retain(|it| it.len() <= 100 && !it.is_empty() && it.chars().all(is_name));
    properties.dedup();
    let words = error.message.to_ascii_lowercase();
    // The words are not documented, so several are known.
    let conflict = error.details.iter().any(|it| it.code.contains("Conflict"))
        || words.contains("already exist")
        || words.contains("conflicting object");
    let missing = words.contains("being referenced do not exist");
    let code: String = error.code.chars().filter(|c| is_name(*c)).take(60).collect();
    Told { code, properties, conflict, missing }
}

fn is_name(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_'
}

#[cfg(test)]
mod tests {
    use reqwest::header::{HeaderValue, RETRY_AFTER};
    use serde_json::json;
    use time::macros::datetime;

    use super::*;

    const NOW: OffsetDateTime = datetime!(2026-11-22 10:00 UTC);

    fn fate(status: u16, told: Told) -> (bool, Cause) {
        fate_of(Call::CreateUser, status, told)
    }

    fn fate_of(call: Call, status: u16, told: Told) -> (bool, Cause) {
        let status = StatusCode::from_u16(status).unwrap();
        let problem = problem(status, &HeaderMap::new(), told, NOW);
        match HandleError::from(call.failed(problem)) {
            HandleError::Retry { cause, .. } => (true, cause),
            HandleError::Park { cause, .. } => (false, cause),
            HandleError::StoreUnavailable(_) => unreachable!(),
        }
    }

    #[test]
    fn an_answer_is_for_later_or_for_good() {
        let fate = |status| fate(status, Told::default());
        assert_eq!(fate(429), (true, Cause::Throttled));
        for down in [408, 500, 502, 503, 504] {
            assert_eq!(fate(down), (true, Cause::Unavailable), "{down}");
        }
        for ours in [401, 403] {
            assert_eq!(fate(ours), (true, Cause::NotPermitted), "{ours}");
        }
        for refused in [301, 307, 400, 405, 409, 410, 413, 422] {
            assert_eq!(fate(refused), (false, Cause::Refused), "{refused}");
        }
        assert_eq!(fate(404), (true, Cause::Unavailable), "a wrong address blames no event");
        let gone = fate_of(Call::UpdateUser, 404, Told::default());
        assert_eq!(gone, (false, Cause::Refused), "an account that went away");
    }

    #[test]
    fn a_pause_that_is_asked_for_is_kept() {
        let mut headers = HeaderMap::new();
        headers.insert(RETRY_AFTER, HeaderValue::from_static("Sun, 22 Nov 2026 10:00:07 GMT"));
        for status in [StatusCode::TOO_MANY_REQUESTS, StatusCode::SERVICE_UNAVAILABLE] {
            let problem = problem(status, &headers, Told::default(), NOW);
            let HandleError::Retry { after, .. } = Call::Invite.failed(problem).into() else {
                panic!("{status} is for later");
            };
            assert_eq!(after, Some(Duration::from_secs(7)), "{status}");
        }
    }

    #[test]
    fn of_what_graph_tells_only_names_are_kept() {
        let conflict = json!({ "error": {
            "code": "Request_BadRequest",
            "message": "Another object with the same value for property userPrincipalName already exists.",
            "details": [{ "target": "userPrincipalName", "code": "ObjectConflict" }],
        }});
        let told_conflict = told(conflict.to_string().as_bytes());
        assert!(told_conflict.conflict);
        assert_eq!(told_conflict.to_string(), "Request_BadRequest because of userPrincipalName");

        let invited = json!({ "error": { "code": "BadRequest", "message":
            "The invited user already exists in the directory as object ID: ada@example.com." }});
        let told_invited = told(invited.to_string().as_bytes());
        assert!(told_invited.conflict);
        assert_eq!(told_invited.to_string(), "BadRequest");

        let invalid = json!({ "error": {
            "code": "Request_BadRequest: ada@example.com",
            "message": "Invalid value 'ada@example.com' specified for property 'city' of resource 'User'.",
            "details": [{ "target": "ada@example.com", "code": "X" }],
        }});
        let told_invalid = told(invalid.to_string().as_bytes());
        assert!(!told_invalid.conflict);
        assert_eq!(told_invalid.properties, ["city"]);
        assert!(!told_invalid.to_string().contains('@'), "{told_invalid}");
        for nonsense in ["", "null", "[]", "<html>", r#"{"error":"x"}"#] {
            assert_eq!(told(nonsense.as_bytes()), Told::default(), "{nonsense}");
        }
    }

    #[test]
    fn a_missing_permission_is_named() {
        let error = HandleError::from(Call::Invite.failed(Problem::NotPermitted));
        let HandleError::Retry { source, .. } = error else { panic!("{error:?}") };
        let text = source.to_string();
        assert!(text.contains("User.Invite.All") && text.contains("consent"), "{text}");
    }
}
