//! A client for Microsoft Graph: find, create, invite and update users; give and take what they may.
//!
//! Every call is bounded in time and in what is read of its answer, follows no redirect, and fails
//! with a [`GraphError`] that says whether it may go through later and, where somebody must act,
//! what to mend. Errors quote nothing that Graph says in words: it repeats people's data. Whether a
//! call may be made twice is left to the caller.

mod access;
mod failure;
#[cfg(test)]
mod tests;

use std::{fmt, time::Duration};

use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use reqwest::{Client, Method, Response, StatusCode, Url, header::CONTENT_TYPE};
use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::Value;
use time::OffsetDateTime;
use vestibule_events::Identity;

pub(crate) use self::failure::{GraphError, Problem};

use crate::{
    SettingError, http,
    token::{Token, Tokens},
};

/// A user with everything is some kilobytes; a page of them may be more.
const ANSWER_BYTES_MAX: usize = 256 * 1024;

/// Which directory, and who we are there.
#[derive(Clone, Debug)]
pub struct GraphSettings {
    /// The directory's id, or one of its domains.
    pub tenant: String,
    /// The application (client) id of the app registration.
    pub client_id: String,
    pub client_secret: SecretString,
    pub base_url: String,
    /// `None` derives it from the tenant.
    pub token_url: Option<String>,
    pub scope: String,
    /// The longest that one call may take.
    pub timeout: Duration,
}

impl GraphSettings {
    pub const BASE_URL: &'static str = "https://graph.microsoft.com/v1.0";
    pub const SCOPE: &'static str = "https://graph.microsoft.com/.default";
    /// Two calls fit into an attempt.
    pub const TIMEOUT: Duration = Duration::from_secs(10);

    /// The worldwide service, with the default limits.
    #[must_use]
    pub fn new(
        tenant: impl Into<String>,
        client_id: impl Into<String>,
        client_secret: SecretString,
    ) -> Self {
        Self {
            tenant: tenant.into(),
            client_id: client_id.into(),
            client_secret,
            base_url: Self::BASE_URL.to_owned(),
            token_url: None,
            scope: Self::SCOPE.to_owned(),
            timeout: Self::TIMEOUT,
        }
    }
}

/// Microsoft Graph, as one application sees one directory.
pub(crate) struct Graph {
    http: Client,
    base: Url,
    tokens: Tokens,
}

impl fmt::Debug for Graph {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Graph({})", self.base)
    }
}

/// A user that a search found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Found {
    pub(crate) id: String,
    pub(crate) is_guest: bool,
    pub(crate) created: Option<OffsetDateTime>,
}

/// What an invitation made.
#[derive(Debug)]
pub(crate) struct Invited {
    pub(crate) invitation: String,
    pub(crate) user: String,
}

impl Graph {
    pub(crate) fn new(settings: &GraphSettings, faults: &mut Vec<SettingError>) -> Option<Self> {
        let mut complain = |key, message: &str| {
            faults.push(SettingError { key, message: message.to_owned() });
        };
        for (key, value) in [("tenant", &settings.tenant), ("client_id", &settings.client_id)] {
            let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_');
            if value.is_empty() || !value.chars().all(plain) {
                complain(key, "must be an id or a domain name: letters, digits, dots and hyphens");
            }
        }
        if settings.client_secret.expose_secret().is_empty() {
            complain("client_secret", "must not be empty");
        }
        let base = http::secure_url(settings.base_url.trim_end_matches('/'));
        let base = base.map_err(|fault| complain("graph_url", fault)).ok();
        let token_url = settings.token_url.clone().unwrap_or_else(|| {
            format!("https://login.microsoftonline.com/{}/oauth2/v2.0/token", settings.tenant)
        });
        let token_url = http::secure_url(&token_url);
        let token_url = token_url.map_err(|fault| complain("token_url", fault)).ok();
        let http = http::client(settings.timeout);
        let http = http.map_err(|_| complain("graph_url", "no HTTPS client on this machine")).ok();
        let (http, base, token_url) = (http?, base?, token_url?);
        let form = [
            ("client_id", settings.client_id.as_str()),
            ("client_secret", settings.client_secret.expose_secret()),
            ("scope", settings.scope.as_str()),
        ];
        let tokens = Tokens::new(http.clone(), token_url, &form);
        Some(Self { http, base, tokens })
    }

    /// Users who sign in with an identity. The index behind a search lags behind what was written.
    pub(crate) async fn find_by_identity(
        &self,
        identity: &Identity,
    ) -> Result<Vec<Found>, GraphError> {
        let id = quoted(&identity.issuer_assigned_id);
        let issuer = quoted(&identity.issuer);
        let filter =
            format!("identities/any(i:i/issuerAssignedId eq {id} and i/issuer eq {issuer})");
        self.find(&filter).await
    }

    /// Users with a mail address.
    pub(crate) async fn find_by_mail(&self, mail: &str) -> Result<Vec<Found>, GraphError> {
        self.find(&format!("mail eq {}", quoted(mail))).await
    }

    /// Creates a user, and gives its id.
    pub(crate) async fn create_user(&self, user: &Value) -> Result<String, GraphError> {
        let answer = self.call(Call::CreateUser, self.url(&["users"]), Some(user)).await?;
        let User { id, .. } = self.read(Call::CreateUser, answer).await?;
        Ok(id)
    }

    /// Invites somebody. Inviting a guest again makes no second user.
    pub(crate) async fn invite(&self, invitation: &Value) -> Result<Invited, GraphError> {
        let answer = self.call(Call::Invite, self.url(&["invitations"]), Some(invitation)).await?;
        let Invitation { id, invited_user } = self.read(Call::Invite, answer).await?;
        Ok(Invited { invitation: id, user: invited_user.id })
    }

    /// Overwrites attributes of a user.
    pub(crate) async fn update_user(&self, id: &str, changes: &Value) -> Result<(), GraphError> {
        self.call(Call::UpdateUser, self.url(&["users", id]), Some(changes)).await.map(drop)
    }

    /// Whether there is a user of this id, also where no search shows it yet.
    pub(crate) async fn has_user(&self, id: &str) -> Result<bool, GraphError> {
        let mut url = self.url(&["users", id]);
        url.set_query(Some("$select=id"));
        match self.call(Call::ReadUser, url, None).await {
            Err(error) if matches!(error.problem, Problem::NotFound) => Ok(false),
            other => other.map(|_| true),
        }
    }

    async fn find(&self, filter: &str) -> Result<Vec<Found>, GraphError> {
        let mut url = self.url(&["users"]);
        // Written by hand: the usual `+` for a space is a plus sign to Graph.
        let filter = utf8_percent_encode(filter, NON_ALPHANUMERIC);
        url.set_query(Some(&format!("$filter={filter}&$select=id,userType,createdDateTime")));
        let answer = self.call(Call::FindUser, url, None).await?;
        let Page { value } = self.read(Call::FindUser, answer).await?;
        Ok(value.into_iter().map(Found::from).collect())
    }

    /// Ids come from Graph, and are still only one segment of a path.
    fn url(&self, path: &[&str]) -> Url {
        let mut url = self.base.clone();
        url.path_segments_mut().expect("an http address has a path").extend(path);
        url
    }

    /// One call. A token that Graph does not take is renewed once.
    async fn call(
        &self,
        call: Call,
        url: Url,
        body: Option<&Value>,
    ) -> Result<Response, GraphError> {
        let token = self.tokens.token().await.map_err(|it| call.failed(Problem::NoToken(it)))?;
        let answer = self.send(call, &url, body, &token).await?;
        if answer.status() != StatusCode::UNAUTHORIZED {
            return failure::judge(call, answer).await;
        }
        self.tokens.discard(&token);
        let token = self.tokens.token().await.map_err(|it| call.failed(Problem::NoToken(it)))?;
        failure::judge(call, self.send(call, &url, body, &token).await?).await
    }

    async fn send(
        &self,
        call: Call,
        url: &Url,
        body: Option<&Value>,
        token: &Token,
    ) -> Result<Response, GraphError> {
        let mut request = self.http.request(call.method(), url.clone()).bearer_auth(token.expose());
        if let Some(body) = body {
            request = request.header(CONTENT_TYPE, "application/json").body(body.to_string());
        }
        // The address holds the person's: it must not be in the error.
        let sent = request.send().await;
        sent.map_err(|error| call.failed(Problem::NoAnswer(error.without_url())))
    }

    async fn read<T: DeserializeOwned>(
        &self,
        call: Call,
        answer: Response,
    ) -> Result<T, GraphError> {
        self.read_at_most(call, answer, ANSWER_BYTES_MAX).await
    }

    async fn read_at_most<T: DeserializeOwned>(
        &self,
        call: Call,
        answer: Response,
        bytes_max: usize,
    ) -> Result<T, GraphError> {
        let body = http::body(answer, bytes_max).await;
        // What serde says quotes the answer.
        let read = body.and_then(|body| serde_json::from_slice(&body).ok());
        read.ok_or_else(|| call.failed(Problem::Unreadable))
    }
}

/// What we ask of Graph.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Call {
    FindUser,
    ReadUser,
    CreateUser,
    Invite,
    UpdateUser,
    AddMember,
    RemoveMember,
    ReadMembers,
    AssignRole,
    RemoveAssignment,
    ReadAssignments,
}

impl Call {
    const fn method(self) -> Method {
        match self {
            Self::FindUser | Self::ReadUser | Self::ReadMembers | Self::ReadAssignments => {
                Method::GET
            }
            Self::CreateUser | Self::Invite | Self::AddMember | Self::AssignRole => Method::POST,
            Self::UpdateUser => Method::PATCH,
            Self::RemoveMember | Self::RemoveAssignment => Method::DELETE,
        }
    }

    /// Whether it names nothing that may be missing.
    const fn is_of_collection(self) -> bool {
        matches!(self, Self::FindUser | Self::CreateUser | Self::Invite)
    }

    /// What did not work, after "could not".
    const fn as_words(self) -> &'static str {
        match self {
            Self::FindUser => "look for the person in the directory",
            Self::ReadUser => "see whether the account is still in the directory",
            Self::CreateUser => "create the account",
            Self::Invite => "invite the person",
            Self::UpdateUser => "write the attributes of the account",
            Self::AddMember => "add the account to the group",
            Self::RemoveMember => "take the account out of the group",
            Self::ReadMembers => "read the members of the group",
            Self::AssignRole => "assign the app role to the account",
            Self::RemoveAssignment => "take the app role from the account",
            Self::ReadAssignments => "read who has the app role",
        }
    }

    /// The least application permission.
    const fn permission(self) -> &'static str {
        match self {
            Self::FindUser | Self::ReadUser => "User.Read.All",
            Self::CreateUser | Self::UpdateUser => "User.ReadWrite.All",
            Self::Invite => "User.Invite.All",
            Self::AddMember | Self::RemoveMember => "GroupMember.ReadWrite.All",
            Self::ReadMembers => "GroupMember.Read.All",
            Self::AssignRole | Self::RemoveAssignment => "AppRoleAssignment.ReadWrite.All",
            Self::ReadAssignments => "Application.Read.All",
        }
    }

    const fn failed(self, problem: Problem) -> GraphError {
        GraphError { call: self, problem }
    }
}

/// Text within a filter.
fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}

#[derive(Deserialize)]
struct Page {
    value: Vec<User>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct User {
    id: String,
    #[serde(default)]
    user_type: Option<String>,
    #[serde(default)]
    created_date_time: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Invitation {
    id: String,
    invited_user: User,
}

impl From<User> for Found {
    fn from(user: User) -> Self {
        use time::format_description::well_known::Rfc3339;
        let created = user.created_date_time;
        Self {
            id: user.id,
            is_guest: user.user_type.is_some_and(|it| it.eq_ignore_ascii_case("guest")),
            created: created.and_then(|it| OffsetDateTime::parse(&it, &Rfc3339).ok()),
        }
    }
}
