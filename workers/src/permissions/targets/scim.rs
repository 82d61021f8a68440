//! Groups of a SCIM 2.0 service (RFC 7644).
//!
//! Somebody is known there by their address (`userName`), else by their pseudonym (`externalId`),
//! and made known where nobody is found. Groups are never made: they are the service's own.

use std::{collections::HashSet, fmt, time::Duration};

use anyhow::anyhow;
use async_trait::async_trait;
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use reqwest::{
    Client, Method, Response, StatusCode, Url,
    header::{ACCEPT, CONTENT_TYPE},
};
use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::{Value, json};
use time::OffsetDateTime;
use vestibule_events::Email;
use vestibule_store::Seen;

use super::{Actual, ScimSettings, Target, Whom};
use crate::{Cause, HandleError, SettingError, http};

const JSON: &str = "application/scim+json";

/// Two calls fit into an attempt.
const TIMEOUT: Duration = Duration::from_secs(10);

/// A user is some kilobytes, an error less.
const ANSWER_BYTES_MAX: usize = 256 * 1024;

/// A group comes with all its members.
const GROUP_BYTES_MAX: usize = 64 * 1024 * 1024;

pub(super) struct Scim {
    http: Client,
    base: Url,
    token: SecretString,
    create_users: bool,
}

impl fmt::Debug for Scim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Scim({})", self.base)
    }
}

impl Scim {
    pub(super) fn new(settings: ScimSettings, faults: &mut Vec<SettingError>) -> Option<Self> {
        let ScimSettings { url, token, create_users } = settings;
        let mut complain = |key, message: &str| {
            faults.push(SettingError { key, message: message.to_owned() });
        };
        let secret = token.expose_secret();
        if secret.is_empty() || !secret.bytes().all(|it| it.is_ascii_graphic()) {
            complain("token", "must be a bearer token: visible ASCII without spaces");
        }
        let base = http::secure_url(url.trim_end_matches('/'));
        let base = base.map_err(|fault| complain("url", fault)).ok()?;
        let http = http::client(TIMEOUT);
        let http = http.map_err(|_| complain("url", "no HTTPS client on this machine")).ok()?;
        Some(Self { http, base, token, create_users })
    }

    /// The service's id of somebody, if it knows them.
    async fn find(&self, whom: &mut Whom) -> Result<Option<String>, ScimError> {
        if let Some(account) = &whom.seen.account {
            return Ok(Some(account.clone()));
        }
        let email = whom.email.as_ref().map(|it| ("userName", it.expose().to_owned()));
        let pseudonym = ("externalId", whom.person.as_str().to_owned());
        for (attribute, value) in email.into_iter().chain([pseudonym]) {
            let mut url = self.url(&["Users"]);
            let filter = format!("{attribute} eq {}", Value::from(value));
            let filter = utf8_percent_encode(&filter, NON_ALPHANUMERIC);
            url.set_query(Some(&format!("filter={filter}")));
            let answer = self.call(Call::Find, url, None).await?;
            let found: Found = read(Call::Find, answer, ANSWER_BYTES_MAX).await?;
            if let Some(user) = found.resources.into_iter().next() {
                whom.seen.account = Some(user.id.clone());
                return Ok(Some(user.id));
            }
        }
        Ok(None)
    }

    /// Whether the service still knows an account.
    async fn has(&self, account: &str) -> Result<bool, ScimError> {
        match self.call(Call::Check, self.url(&["Users", account]), None).await {
            Err(error) if matches!(error.problem, Problem::NotFound) => Ok(false),
            other => other.map(|_| true),
        }
    }

    async fn create(&self, whom: &mut Whom, email: &Email) -> Result<String, HandleError> {
        let user = json!({
            "schemas": ["urn:ietf:params:scim:schemas:core:2.0:User"],
            "userName": email.expose(),
            "externalId": whom.person.as_str(),
            "active": true,
            "emails": [{ "value": email.expose(), "type": "work", "primary": true }],
        });
        let created = self.call(Call::Create, self.url(&["Users"]), Some(&user)).await;
        let error = match created {
            Ok(answer) => {
                let user: User = read(Call::Create, answer, ANSWER_BYTES_MAX).await?;
                whom.seen.account = Some(user.id.clone());
                return Ok(user.id);
            }
            Err(error) => error,
        };
        if !matches!(error.problem, Problem::Conflict) {
            return Err(error.into());
        }
        // Somebody was faster, or an attempt of before whose answer was lost.
        self.find(whom).await?.ok_or_else(|| HandleError::retry(Cause::NotYet, error))
    }

    async fn account_to_give(&self, whom: &mut Whom) -> Result<String, HandleError> {
        match (self.find(whom).await?, whom.email.clone()) {
            (Some(account), _) => Ok(account),
            (None, Some(email)) if self.create_users => self.create(whom, &email).await,
            (None, Some(_)) => {
                let source = anyhow!("the service knows no user with the person's address yet");
                Err(HandleError::retry(Cause::NotYet, source))
            }
            (None, None) => {
                let source = anyhow!("the person has no mail address to be known by");
                Err(HandleError::park(Cause::InvalidRecipient, source))
            }
        }
    }

    async fn add(&self, group: &str, account: &str) -> Result<(), ScimError> {
        let add = json!({ "op": "add", "path": "members", "value": [{ "value": account }] });
        self.patch(Call::Add, group, add).await
    }

    async fn patch(&self, call: Call, group: &str, operation: Value) -> Result<(), ScimError> {
        let patch = json!({
            "schemas": ["urn:ietf:params:scim:api:messages:2.0:PatchOp"],
            "Operations": [operation],
        });
        self.call(call, self.url(&["Groups", group]), Some(&patch)).await.map(drop)
    }

    fn url(&self, path: &[&str]) -> Url {
        let mut url = self.base.clone();
        url.path_segments_mut().expect("an http address has a path").extend(path);
        url
    }

    async fn call(
        &self,
        call: Call,
        url: Url,
        body: Option<&Value>,
    ) -> Result<Response, ScimError> {
        let mut request = self.http.request(call.method(), url);
        request = request.bearer_auth(self.token.expose_secret()).header(ACCEPT, JSON);
        if let Some(body) = body {
            request = request.header(CONTENT_TYPE, JSON).body(body.to_string());
        }
        // The address may hold the person's: it must not be in the error.
        let sent = request.send().await;
        let answer = sent.map_err(|error| call.failed(Problem::NoAnswer(error.without_url())))?;
        judge(call, answer).await
    }
}

#[async_trait]
impl Target for Scim {
    async fn give(&self, group: &str, whom: &mut Whom) -> Result<(), HandleError> {
        let was_known = whom.seen.account.is_some();
        let account = self.account_to_give(whom).await?;
        let failed = match self.add(group, &account).await {
            Err(error) if was_known && may_be_gone(&error) => error,
            other => return Ok(other?),
        };
        // It may be the group that is not there or takes nobody: only the account itself tells that it
        // is gone. As long as it is not, it may be a member, and nobody else is given its role.
        if self.has(&account).await? {
            return Err(failed.into());
        }
        // Somebody deleted the user whom we knew, and may have made them anew. Who comes in that one's
        // place is noted before being given anything: the answer to that may be lost.
        let mut anew = Whom { seen: Seen::default(), ..whom.clone() };
        let other = self.account_to_give(&mut anew).await?;
        whom.seen = anew.seen;
        Ok(self.add(group, &other).await?)
    }

    async fn take(&self, group: &str, whom: &mut Whom) -> Result<(), HandleError> {
        let Some(account) = self.find(whom).await? else { return Ok(()) };
        let path = format!("members[value eq {}]", Value::from(account));
        match self.patch(Call::Remove, group, json!({ "op": "remove", "path": path })).await {
            // Nothing of that sort is in the group, or the group is gone.
            Err(error) if matches!(error.problem, Problem::NoTarget | Problem::NotFound) => Ok(()),
            other => Ok(other?),
        }
    }

    async fn holds(&self, group: &str, whom: &mut [Whom]) -> Result<Vec<Actual>, HandleError> {
        let answer = self.call(Call::Read, self.url(&["Groups", group]), None).await?;
        let group: Group = read(Call::Read, answer, GROUP_BYTES_MAX).await?;
        let members: HashSet<_> = group.members.into_iter().map(|it| it.value).collect();
        let mut actual = Vec::with_capacity(whom.len());
        for whom in whom {
            let account = self.find(whom).await?;
            actual.push(account.map_or(Actual::NoAccount, |it| Actual::of(members.contains(&it))));
        }
        Ok(actual)
    }
}

/// What we ask of the service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Call {
    Find,
    Check,
    Create,
    Add,
    Remove,
    Read,
}

impl Call {
    const fn method(self) -> Method {
        match self {
            Self::Find | Self::Check | Self::Read => Method::GET,
            Self::Create => Method::POST,
            Self::Add | Self::Remove => Method::PATCH,
        }
    }

    /// What did not work, after "could not".
    const fn as_words(self) -> &'static str {
        match self {
            Self::Find => "look for the person at the SCIM service",
            Self::Check => "see whether the SCIM service still has the person's account",
            Self::Create => "make the person known to the SCIM service",
            Self::Add => "add the person to the group of the SCIM service",
            Self::Remove => "take the person out of the group of the SCIM service",
            Self::Read => "read the group of the SCIM service",
        }
    }

    const fn failed(self, problem: Problem) -> ScimError {
        ScimError { call: self, problem }
    }
}

/// A call that came to nothing. Says nothing that the service said in words: it repeats people's data.
#[derive(Debug, thiserror::Error)]
#[error("could not {}: {problem}", .call.as_words())]
struct ScimError {
    call: Call,
    problem: Problem,
}

#[derive(Debug, thiserror::Error)]
enum Problem {
    #[error("{}", no_answer(.0))]
    NoAnswer(reqwest::Error),
    #[error("it answered {status}")]
    Unavailable { status: StatusCode, after: Option<Duration> },
    #[error("it asks us to slow down")]
    Throttled { after: Option<Duration> },
    #[error(
        "it does not let us in ({0}); see `token` and what it permits, the event is tried again"
    )]
    NotPermitted(StatusCode),
    #[error("it is not there; see `url` and `roles`, the event is tried again")]
    NotFound,
    #[error("it has somebody of that name already")]
    Conflict,
    #[error("it has nothing of that sort")]
    NoTarget,
    #[error("it answered {0}")]
    Refused(StatusCode),
    #[error("its answer cannot be read")]
    Unreadable,
}

/// Services say of a member whom they do not know that they are not there, or that they do not take it.
const fn may_be_gone(error: &ScimError) -> bool {
    matches!(error.problem, Problem::NotFound | Problem::Refused(_))
}

fn no_answer(error: &reqwest::Error) -> &'static str {
    match error {
        error if error.is_timeout() => "it did not answer in time",
        error if error.is_connect() => "it cannot be reached",
        _ => "the connection was lost",
    }
}

impl From<ScimError> for HandleError {
    fn from(error: ScimError) -> Self {
        let (cause, after) = match &error.problem {
            Problem::NoAnswer(it) if it.is_timeout() => (Cause::Timeout, None),
            Problem::NoAnswer(_) | Problem::Unreadable => (Cause::Unavailable, None),
            Problem::Unavailable { after, .. } => (Cause::Unavailable, *after),
            Problem::Throttled { after } => (Cause::Throttled, *after),
            // About us and not about the person: once somebody has mended it, the event goes through.
            Problem::NotPermitted(_) | Problem::NotFound => (Cause::NotPermitted, None),
            Problem::Conflict | Problem::NoTarget | Problem::Refused(_) => {
                return Self::park(Cause::Refused, error);
            }
        };
        Self::Retry { source: error.into(), cause, after }
    }
}

async fn judge(call: Call, answer: Response) -> Result<Response, ScimError> {
    let status = answer.status();
    if status.is_success() {
        return Ok(answer);
    }
    let after = http::retry_after(answer.headers(), OffsetDateTime::now_utc());
    Err(call.failed(match status {
        StatusCode::TOO_MANY_REQUESTS => Problem::Throttled { after },
        StatusCode::REQUEST_TIMEOUT => Problem::Unavailable { status, after },
        _ if status.is_server_error() => Problem::Unavailable { status, after },
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => Problem::NotPermitted(status),
        StatusCode::NOT_FOUND => Problem::NotFound,
        StatusCode::CONFLICT => Problem::Conflict,
        StatusCode::BAD_REQUEST => {
            let body = http::body(answer, ANSWER_BYTES_MAX).await.unwrap_or_default();
            let told: Told = serde_json::from_slice(&body).unwrap_or_default();
            if told.scim_type == "noTarget" { Problem::NoTarget } else { Problem::Refused(status) }
        }
        _ => Problem::Refused(status),
    }))
}

async fn read<T: DeserializeOwned>(
    call: Call,
    answer: Response,
    bytes_max: usize,
) -> Result<T, ScimError> {
    let body = http::body(answer, bytes_max).await;
    // What serde says quotes the answer.
    let read = body.and_then(|body| serde_json::from_slice(&body).ok());
    read.ok_or_else(|| call.failed(Problem::Unreadable))
}

#[derive(Deserialize)]
struct Found {
    #[serde(default, rename = "Resources")]
    resources: Vec<User>,
}

#[derive(Deserialize)]
struct User {
    id: String,
}

#[derive(Deserialize)]
struct Group {
    #[serde(default)]
    members: Vec<Member>,
}

#[derive(Deserialize)]
struct Member {
    value: String,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Told {
    #[serde(default)]
    scim_type: String,
}
