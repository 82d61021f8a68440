//! A stand-in for Microsoft Graph and its token service.
//!
//! It knows users, invitations, members of groups and assignments of app roles, and does what Graph does to those who rely on it: names, addresses
//! and identities are unique at once, but what was written is not to be seen for a while; searches of a
//! shape it does not know find nothing; tokens end. Failures are planned by the test. It answers from a
//! thread of its own, so a test may block.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use axum::{
    Router,
    body::Bytes,
    extract::{Request, State},
    http::{HeaderMap, Method, StatusCode, header},
    response::{IntoResponse, Response},
};
use percent_encoding::percent_decode_str;
use serde_json::{Map, Value, json};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};
use tokio::net::TcpListener;
use uuid::Uuid;

use crate::background::Background;

/// A directory with users and invitations.
///
/// When it is dropped the server ends.
#[derive(Debug)]
pub struct Graph {
    directory: Shared,
    address: String,
    _server: Background,
}

/// A sort of call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GraphCall {
    Token,
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

/// What is to become of a call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GraphFault {
    /// This status, with an error that quotes what it was sent.
    Status(u16),
    /// 429, with or without a `Retry-After`.
    Throttle(Option<&'static str>),
    /// 503 with a `Retry-After`.
    Busy(&'static str),
    /// Nothing happens, and no answer comes.
    Hang,
    /// It happens, and no answer comes.
    LoseAnswer,
    /// It happens, and the answer is longer than anybody reads.
    FloodAnswer,
    /// A redirect to the same place.
    Redirect,
}

/// A call as it came.
#[derive(Clone, Debug)]
pub struct GraphRequest {
    pub call: GraphCall,
    /// Without the `/v1.0` in front.
    pub path: String,
    /// Decoded.
    pub query: String,
    /// `Null` where there was none.
    pub body: Value,
    /// What it was answered; 0 for no answer.
    pub status: u16,
}

type Shared = Arc<Mutex<Directory>>;

#[derive(Debug)]
struct Directory {
    secret: String,
    token_life: Duration,
    /// With their ends.
    tokens: HashMap<String, Instant>,
    users: Vec<User>,
    invitations: Vec<Value>,
    requests: Vec<GraphRequest>,
    plan: HashMap<GraphCall, VecDeque<GraphFault>>,
    /// So many reads do not see what was written.
    blind_reads: u32,
    /// Ids of members by group.
    groups: HashMap<String, Vec<String>>,
    assignments: Vec<Value>,
    /// So many items are on a page of a list, whatever was asked for.
    page: usize,
}

#[derive(Debug)]
struct User {
    properties: Map<String, Value>,
    blind_reads: u32,
}

impl Graph {
    pub const TENANT: &str = "contoso.onmicrosoft.com";
    pub const CLIENT_ID: &str = "11111111-2222-3333-4444-555555555555";
    pub const CLIENT_SECRET: &str = "try~me+&=";

    pub async fn start() -> anyhow::Result<Self> {
        let directory: Shared = Arc::new(Mutex::new(Directory {
            secret: Self::CLIENT_SECRET.to_owned(),
            token_life: Duration::from_secs(3600),
            tokens: HashMap::new(),
            users: Vec::new(),
            invitations: Vec::new(),
            requests: Vec::new(),
            plan: HashMap::new(),
            blind_reads: 0,
            groups: HashMap::new(),
            assignments: Vec::new(),
            page: 100,
        }));
        let router = Router::new().fallback(answer).with_state(Arc::clone(&directory));
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = format!("http://{}", listener.local_addr()?);
        let server = Background::serve("graph", listener, router)?;
        Ok(Self { directory, address, _server: server })
    }

    /// The base URL: `http://127.0.0.1:…/v1.0`.
    pub fn url(&self) -> String {
        format!("{}/v1.0", self.address)
    }

    pub fn token_url(&self) -> String {
        format!("{}/{}/oauth2/v2.0/token", self.address, Self::TENANT)
    }

    /// Plans the failure of the next call of a sort; those planned before come first.
    pub fn plan(&self, call: GraphCall, fault: GraphFault) {
        self.lock().plan.entry(call).or_default().push_back(fault);
    }

    /// From now on, what is written is not to be seen by so many reads.
    pub fn hide_from(&self, reads: u32) {
        self.lock().blind_reads = reads;
    }

    /// Tokens from now on live so long.
    pub fn token_life(&self, life: Duration) {
        self.lock().token_life = life;
    }

    /// No token given so far is accepted any more.
    pub fn revoke_tokens(&self) {
        self.lock().tokens.clear();
    }

    /// Another client secret is in force.
    pub fn change_secret(&self, secret: &str) {
        secret.clone_into(&mut self.lock().secret);
    }

    /// Puts a user into the directory, at once to be seen. What is missing is filled in.
    pub fn add_user(&self, properties: &Value) -> String {
        let mut directory = self.lock();
        let properties = properties.as_object().cloned().unwrap_or_default();
        let id = directory.insert(properties);
        directory.see_all();
        id
    }

    /// Deletes a user, with what they were given.
    pub fn remove_user(&self, id: &str) {
        let mut directory = self.lock();
        directory.users.retain(|it| it.text("id") != id);
        for members in directory.groups.values_mut() {
            members.retain(|it| it != id);
        }
        directory.assignments.retain(|it| it["principalId"] != id);
    }

    /// All users with all properties, also those that are not to be seen yet.
    pub fn users(&self) -> Vec<Value> {
        self.lock().users.iter().map(|it| it.properties.clone().into()).collect()
    }

    pub fn invitations(&self) -> Vec<Value> {
        self.lock().invitations.clone()
    }

    /// Makes an empty group; no other group is known.
    pub fn add_group(&self, id: &str) {
        self.lock().groups.entry(id.to_owned()).or_default();
    }

    /// Who is in a group; each as often as they are in it.
    pub fn members(&self, group: &str) -> Vec<String> {
        self.lock().groups.get(group).cloned().unwrap_or_default()
    }

    /// Puts somebody into a group, or takes them out, behind everybody's back.
    pub fn set_member(&self, group: &str, user: &str, is_member: bool) {
        let mut directory = self.lock();
        let members = directory.groups.entry(group.to_owned()).or_default();
        members.retain(|it| it != user);
        if is_member {
            members.push(user.to_owned());
        }
    }

    /// All assignments of app roles.
    pub fn assignments(&self) -> Vec<Value> {
        self.lock().assignments.clone()
    }

    /// From now on, a page of a list holds so many items.
    pub fn page_by(&self, items: usize) {
        self.lock().page = items.max(1);
    }

    /// All calls so far.
    pub fn requests(&self) -> Vec<GraphRequest> {
        self.lock().requests.clone()
    }

    /// The calls of a sort so far.
    pub fn requests_of(&self, call: GraphCall) -> Vec<GraphRequest> {
        self.lock().requests.iter().filter(|it| it.call == call).cloned().collect()
    }

    fn lock(&self) -> MutexGuard<'_, Directory> {
        lock(&self.directory)
    }
}

fn lock(directory: &Shared) -> MutexGuard<'_, Directory> {
    directory.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a call is answered, before it is known whether the answer arrives.
struct Answer {
    status: u16,
    headers: Vec<(&'static str, String)>,
    body: Value,
}

impl Answer {
    fn new(status: u16, body: Value) -> Self {
        Self { status, headers: vec![("x-ms-resource-unit", "1".to_owned())], body }
    }

    fn error(status: u16, code: &str, message: &str) -> Self {
        let inner = json!({ "date": "2026-01-01T00:00:00", "request-id": Uuid::now_v7() });
        let error = json!({ "code": code, "message": message, "innerError": inner });
        Self::new(status, json!({ "error": error }))
    }

    fn with(mut self, name: &'static str, value: &str) -> Self {
        self.headers.push((name, value.to_owned()));
        self
    }
}

async fn answer(State(directory): State<Shared>, request: Request) -> Response {
    let (parts, body) = request.into_parts();
    let body = axum::body::to_bytes(body, 1 << 20).await.unwrap_or_default();
    let path = parts.uri.path().to_owned();
    // A plus sign is itself here, as it is in OData.
    let query = parts.uri.query().unwrap_or_default().to_owned();
    let Some((call, path)) = call_of(&parts.method, &path) else {
        return Answer::error(404, "BadRequest", "Resource not found for the segment")
            .into_response();
    };
    let (fault, answer) = {
        let mut directory = lock(&directory);
        let fault = directory.plan.get_mut(&call).and_then(VecDeque::pop_front);
        let answer = directory.deal(call, &path, &query, &parts.headers, &body, fault.as_ref());
        let lost = matches!(fault, Some(GraphFault::Hang | GraphFault::LoseAnswer));
        directory.requests.push(GraphRequest {
            call,
            path,
            query: decoded(&query),
            body: if call == GraphCall::Token {
                Value::Null
            } else {
                serde_json::from_slice(&body).unwrap_or_default()
            },
            status: if lost { 0 } else { answer.status },
        });
        (fault, answer)
    };
    match fault {
        Some(GraphFault::Hang | GraphFault::LoseAnswer) => std::future::pending().await,
        Some(GraphFault::FloodAnswer) => {
            let flood = format!("{{\"id\":\"{}\"}}", "x".repeat(4 << 20));
            (StatusCode::CREATED, flood).into_response()
        }
        _ => answer.into_response(),
    }
}

fn call_of(method: &Method, path: &str) -> Option<(GraphCall, String)> {
    if path.ends_with("/oauth2/v2.0/token") && *method == Method::POST {
        return Some((GraphCall::Token, path.to_owned()));
    }
    let path = path.strip_prefix("/v1.0")?;
    let call = match (method.as_str(), path) {
        ("GET", "/users") => GraphCall::FindUser,
        ("POST", "/users") => GraphCall::CreateUser,
        ("POST", "/invitations") => GraphCall::Invite,
        ("PATCH", path) if path.starts_with("/users/") => GraphCall::UpdateUser,
        (method, path) => {
            let parts: Vec<_> = path.split('/').skip(1).collect();
            match (method, &parts[..]) {
                ("GET", ["users", _]) => GraphCall::ReadUser,
                ("POST", ["groups", _, "members", "$ref"]) => GraphCall::AddMember,
                ("DELETE", ["groups", _, "members", _, "$ref"]) => GraphCall::RemoveMember,
                ("GET", ["groups", _, "members"]) => GraphCall::ReadMembers,
                ("POST", ["servicePrincipals", _, "appRoleAssignedTo"]) => GraphCall::AssignRole,
                ("DELETE", ["servicePrincipals", _, "appRoleAssignedTo", _]) => {
                    GraphCall::RemoveAssignment
                }
                ("GET", ["servicePrincipals", _, "appRoleAssignedTo"])
                | ("GET", ["users", _, "appRoleAssignments"]) => GraphCall::ReadAssignments,
                _ => return None,
            }
        }
    };
    Some((call, decoded(path)))
}

fn decoded(text: &str) -> String {
    percent_decode_str(text).decode_utf8_lossy().into_owned()
}

fn parameter(query: &str, name: &str) -> Option<String> {
    query.split('&').find_map(|pair| {
        let (key, value) = pair.split_once('=')?;
        (decoded(key) == name).then(|| decoded(value))
    })
}

impl IntoResponse for Answer {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.status).unwrap_or(StatusCode::OK);
        let body = if self.body.is_null() { String::new() } else { self.body.to_string() };
        let mut response = (status, body).into_response();
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, header::HeaderValue::from_static("application/json"));
        for (name, value) in self.headers {
            if let Ok(value) = value.parse() {
                headers.insert(name, value);
            }
        }
        response
    }
}

impl Directory {
    fn deal(
        &mut self,
        call: GraphCall,
        path: &str,
        query: &str,
        headers: &HeaderMap,
        body: &Bytes,
        fault: Option<&GraphFault>,
    ) -> Answer {
        let sent = String::from_utf8_lossy(body);
        match fault {
            Some(GraphFault::Status(status)) => {
                let message = format!("This went wrong: {sent} {}", decoded(query));
                return Answer::error(*status, "Planned", &message);
            }
            Some(GraphFault::Throttle(after)) => {
                let answer = Answer::error(429, "TooManyRequests", &format!("Too many: {sent}"))
                    .with("x-ms-throttle-limit-percentage", "1.2")
                    .with("x-ms-throttle-scope", "Tenant_Application/ReadWrite")
                    .with("x-ms-throttle-information", "WriteLimitExceeded");
                return match after {
                    Some(after) => answer.with("retry-after", after),
                    None => answer,
                };
            }
            Some(GraphFault::Busy(after)) => {
                return Answer::error(503, "serviceNotAvailable", "Later")
                    .with("retry-after", after);
            }
            Some(GraphFault::Redirect) => {
                return Answer::new(307, Value::Null).with("location", &format!("/v1.0{path}"));
            }
            Some(GraphFault::Hang) => return Answer::new(0, Value::Null),
            Some(GraphFault::LoseAnswer | GraphFault::FloodAnswer) | None => {}
        }
        if call == GraphCall::Token {
            return self.give_token(&sent);
        }
        if !self.lets_in(headers) {
            let message = "Lifetime validation failed, the token is expired.";
            return Answer::error(401, "InvalidAuthenticationToken", message);
        }
        let body: Value = serde_json::from_slice(body).unwrap_or_default();
        match call {
            GraphCall::FindUser => self.find(query),
            GraphCall::ReadUser => match path.trim_start_matches("/users/") {
                id if self.is_seen(id) => Answer::new(200, json!({ "id": id })),
                id => not_found(id),
            },
            GraphCall::CreateUser => self.create(&body),
            GraphCall::Invite => self.invite(&body),
            GraphCall::UpdateUser => self.update(path.trim_start_matches("/users/"), &body),
            GraphCall::AddMember
            | GraphCall::RemoveMember
            | GraphCall::ReadMembers
            | GraphCall::AssignRole
            | GraphCall::RemoveAssignment
            | GraphCall::ReadAssignments => self.access(call, path, query, headers, &body),
            GraphCall::Token => unreachable!("answered above"),
        }
    }

    fn give_token(&mut self, form: &str) -> Answer {
        let refuse = |status, error: &str, code: u32, message: &str| {
            let description = format!("AADSTS{code}: {message} Trace ID: 0 Correlation ID: 0");
            Answer::new(
                status,
                json!({ "error": error, "error_description": description, "error_codes": [code] }),
            )
        };
        let field = |name| parameter(form, name).unwrap_or_default();
        if field("grant_type") != "client_credentials" || !field("scope").ends_with("/.default") {
            return refuse(
                400,
                "invalid_request",
                900_144,
                "The request body is not as it must be.",
            );
        }
        if field("client_id") != Graph::CLIENT_ID {
            return refuse(400, "unauthorized_client", 700_016, "Application not found.");
        }
        if field("client_secret") != self.secret {
            return refuse(401, "invalid_client", 7_000_215, "Invalid client secret provided.");
        }
        let token = Uuid::now_v7().simple().to_string();
        self.tokens.insert(token.clone(), Instant::now() + self.token_life);
        let life = self.token_life.as_secs();
        let body = json!({ "token_type": "Bearer", "expires_in": life, "access_token": token });
        Answer::new(200, body)
    }

    fn lets_in(&self, headers: &HeaderMap) -> bool {
        let value = headers.get(header::AUTHORIZATION).and_then(|it| it.to_str().ok());
        let token = value.and_then(|it| it.strip_prefix("Bearer "));
        let end = token.and_then(|it| self.tokens.get(it));
        end.is_some_and(|end| Instant::now() < *end)
    }

    /// The two shapes that we know to be supported; another one finds nothing.
    fn find(&mut self, query: &str) -> Answer {
        let filter = parameter(query, "$filter").unwrap_or_default();
        let select = parameter(query, "$select").unwrap_or_default();
        let wanted: Box<dyn Fn(&User) -> bool> = match Filter::parse(&filter) {
            Some(Filter::Mail(mail)) => Box::new(move |user| user.has_mail(&mail)),
            Some(Filter::Identity { id, issuer }) => {
                Box::new(move |user| user.identities().any(|it| it == (&*id, &*issuer)))
            }
            None => Box::new(|_| false),
        };
        let mut found = Vec::new();
        for user in self.users.iter_mut().filter(|user| wanted(user)) {
            if user.is_seen() {
                found.push(user.selected(&select));
            }
        }
        Answer::new(200, json!({ "value": found }))
    }

    fn create(&mut self, body: &Value) -> Answer {
        let Some(properties) = body.as_object().cloned() else {
            return Answer::error(400, "BadRequest", "Unable to read JSON request payload.");
        };
        let required = ["accountEnabled", "displayName", "userPrincipalName"];
        if let Some(missing) = required.iter().find(|it| !properties.contains_key(**it)) {
            let message =
                format!("A value is required for property '{missing}' of resource 'User'.");
            return Answer::error(400, "Request_BadRequest", &message);
        }
        if let Some(refused) = refused(&properties) {
            return refused;
        }
        let upn = properties["userPrincipalName"].as_str().unwrap_or_default();
        let mut halves = upn.split('@');
        let local = halves.next().unwrap_or_default();
        let plain = |c: char| c.is_ascii_alphanumeric() || "'.-_!#^~".contains(c);
        let fits = halves.next() == Some(Graph::TENANT) && halves.next().is_none();
        if !fits || !local.chars().all(plain) || local.len() > 64 {
            let message = format!("Property userPrincipalName is invalid: {upn}");
            return Answer::error(400, "Request_BadRequest", &message);
        }
        if let Some(conflict) = self.conflict(&properties) {
            return conflict;
        }
        self.insert(properties);
        let user = self.users.last().expect("it was inserted above");
        Answer::new(201, user.properties.clone().into())
    }

    fn invite(&mut self, body: &Value) -> Answer {
        let text = |name: &str| body[name].as_str().unwrap_or_default().to_owned();
        let (mail, redirect) = (text("invitedUserEmailAddress"), text("inviteRedirectUrl"));
        if mail.is_empty() || redirect.is_empty() {
            return Answer::error(400, "BadRequest", "Invitation is missing a required property.");
        }
        let known = self.users.iter().find(|user| user.has_mail(&mail));
        let id = match known {
            // A guest may be invited again.
            Some(user) if user.text("userType") == "Guest" => user.text("id").to_owned(),
            Some(user) => {
                let message = format!(
                    "The invited user already exists in the directory as object ID: {}. They can use \
                     that account to sign in to shared apps and resources.",
                    user.text("id")
                );
                return Answer::error(400, "BadRequest", &message);
            }
            None => {
                let local = mail.replace('@', "_");
                let name = body["invitedUserDisplayName"].as_str();
                let user = json!({
                    "userPrincipalName": format!("{local}#EXT#@{}", Graph::TENANT),
                    "displayName": name.unwrap_or_else(|| mail.split('@').next().unwrap_or("")),
                    "mail": mail,
                    "userType": "Guest",
                    "accountEnabled": true,
                    "creationType": "Invitation",
                    "externalUserState": "PendingAcceptance",
                });
                self.insert(user.as_object().cloned().unwrap_or_default())
            }
        };
        let invitation = json!({
            "id": Uuid::now_v7(),
            "inviteRedeemUrl": "https://login.microsoftonline.com/redeem?rd=planned",
            "invitedUserDisplayName": body["invitedUserDisplayName"],
            "invitedUserType": "Guest",
            "invitedUserEmailAddress": mail,
            "sendInvitationMessage": body["sendInvitationMessage"].as_bool().unwrap_or(false),
            "inviteRedirectUrl": redirect,
            "status": "PendingAcceptance",
            "invitedUserMessageInfo": body["invitedUserMessageInfo"],
            "invitedUser": { "id": id },
        });
        self.invitations.push(invitation.clone());
        Answer::new(201, invitation)
    }

    fn update(&mut self, id: &str, body: &Value) -> Answer {
        let changes = body.as_object().cloned().unwrap_or_default();
        if let Some(refused) = refused(&changes) {
            return refused;
        }
        let user = self.users.iter_mut().find(|user| user.text("id") == id);
        let Some(user) = user.filter(|user| user.blind_reads == 0) else {
            // Looking is what brings the day nearer.
            if let Some(user) = self.users.iter_mut().find(|user| user.text("id") == id) {
                user.blind_reads -= 1;
            }
            return not_found(id);
        };
        user.properties.extend(changes);
        Answer::new(204, Value::Null)
    }

    fn access(
        &mut self,
        call: GraphCall,
        path: &str,
        query: &str,
        headers: &HeaderMap,
        body: &Value,
    ) -> Answer {
        let parts: Vec<_> = path.split('/').skip(1).collect();
        let id = parts.get(1).copied().unwrap_or_default();
        let last = parts.get(3).copied().unwrap_or_default();
        let host = headers.get(header::HOST).and_then(|it| it.to_str().ok()).unwrap_or_default();
        let text = |name: &str| body[name].as_str().unwrap_or_default().to_owned();
        match call {
            GraphCall::AddMember => self.add_member(id, &text("@odata.id")),
            GraphCall::RemoveMember => {
                let Some(members) = self.groups.get_mut(id) else { return not_found(id) };
                let before = members.len();
                members.retain(|it| it != last);
                if members.len() == before {
                    return not_found(last);
                }
                Answer::new(204, Value::Null)
            }
            GraphCall::ReadMembers => match self.groups.get(id) {
                Some(members) => {
                    let all = members.iter().map(|it| json!({ "id": it })).collect();
                    self.paged(all, host, path, query)
                }
                None => not_found(id),
            },
            GraphCall::AssignRole => {
                let (principal, role) = (text("principalId"), text("appRoleId"));
                if !self.is_seen(&principal) {
                    return not_found(&principal);
                }
                let same = |it: &Value| {
                    it["principalId"] == principal
                        && it["appRoleId"] == role
                        && it["resourceId"] == id
                };
                if self.assignments.iter().any(same) {
                    let message = "Permission being assigned already exists on the object";
                    return Answer::error(400, "Request_BadRequest", message);
                }
                let assignment = json!({
                    "id": Uuid::now_v7().simple().to_string(),
                    "principalId": principal, "resourceId": id, "appRoleId": role,
                });
                self.assignments.push(assignment.clone());
                Answer::new(201, assignment)
            }
            GraphCall::RemoveAssignment => {
                let before = self.assignments.len();
                self.assignments.retain(|it| it["id"] != last);
                if self.assignments.len() == before {
                    return not_found(last);
                }
                Answer::new(204, Value::Null)
            }
            _ => {
                let key = if parts[0] == "users" { "principalId" } else { "resourceId" };
                let of = self.assignments.iter().filter(|it| it[key] == id).cloned().collect();
                self.paged(of, host, path, query)
            }
        }
    }

    fn add_member(&mut self, group: &str, reference: &str) -> Answer {
        let user = reference.rsplit('/').next().unwrap_or_default().to_owned();
        if !self.groups.contains_key(group) || !self.is_seen(&user) {
            return not_found(&user);
        }
        let members = self.groups.entry(group.to_owned()).or_default();
        if members.contains(&user) {
            let message = "One or more added object references already exist for the following \
                           modified properties: 'members'.";
            return Answer::error(400, "Request_BadRequest", message);
        }
        members.push(user);
        Answer::new(204, Value::Null)
    }

    fn is_seen(&mut self, id: &str) -> bool {
        let user = self.users.iter_mut().find(|user| user.text("id") == id);
        user.is_some_and(User::is_seen)
    }

    /// One page, with a link to the next.
    fn paged(&self, all: Vec<Value>, host: &str, path: &str, query: &str) -> Answer {
        let skip: usize =
            parameter(query, "$skiptoken").and_then(|it| it.parse().ok()).unwrap_or(0);
        let more = skip + self.page < all.len();
        let items: Vec<_> = all.into_iter().skip(skip).take(self.page).collect();
        let mut page = json!({ "value": items });
        if more {
            let next = skip + self.page;
            page["@odata.nextLink"] = format!("http://{host}/v1.0{path}?$skiptoken={next}").into();
        }
        Answer::new(200, page)
    }

    fn insert(&mut self, mut properties: Map<String, Value>) -> String {
        let id = Uuid::now_v7().to_string();
        let created = OffsetDateTime::now_utc().format(&Rfc3339).unwrap_or_default();
        properties.insert("id".into(), id.clone().into());
        properties.entry("createdDateTime").or_insert(created.into());
        properties.entry("userType").or_insert("Member".into());
        self.users.push(User { properties, blind_reads: self.blind_reads });
        id
    }

    fn see_all(&mut self) {
        if let Some(user) = self.users.last_mut() {
            user.blind_reads = 0;
        }
    }

    /// What is unique is so at once, to be seen or not.
    fn conflict(&self, new: &Map<String, Value>) -> Option<Answer> {
        let new = User { properties: new.clone(), blind_reads: 0 };
        let same = |name: &str, user: &User| {
            let (one, other) = (user.text(name), new.text(name));
            !one.is_empty() && one.eq_ignore_ascii_case(other)
        };
        let property = self.users.iter().find_map(|user| {
            if same("userPrincipalName", user) {
                Some("userPrincipalName")
            } else if same("mail", user) {
                Some("proxyAddresses")
            } else {
                new.identities()
                    .any(|one| user.identities().any(|other| one == other))
                    .then_some("identities")
            }
        })?;
        let message =
            format!("Another object with the same value for property {property} already exists.");
        let mut answer = Answer::error(400, "Request_BadRequest", &message);
        answer.body["error"]["details"] = json!([{ "code": "ObjectConflict", "target": property }]);
        Some(answer)
    }
}

fn not_found(id: &str) -> Answer {
    let message = format!(
        "Resource '{id}' does not exist or one of its queried \
         reference-property objects are not present."
    );
    Answer::error(404, "Request_ResourceNotFound", &message)
}

/// Properties that Graph does not know, and text that it does not take.
fn refused(properties: &Map<String, Value>) -> Option<Answer> {
    const KNOWN: [&str; 24] = [
        "accountEnabled",
        "ageGroup",
        "city",
        "companyName",
        "consentProvidedForMinor",
        "country",
        "department",
        "displayName",
        "faxNumber",
        "givenName",
        "identities",
        "jobTitle",
        "mail",
        "mailNickname",
        "mobilePhone",
        "officeLocation",
        "passwordPolicies",
        "postalCode",
        "preferredLanguage",
        "state",
        "streetAddress",
        "surname",
        "userPrincipalName",
        "userType",
    ];
    let (name, value) = properties.iter().find(|(name, value)| {
        let is_custom = name.starts_with("extension_");
        let is_known = KNOWN.contains(&name.as_str());
        let is_empty = value.as_str().is_some_and(str::is_empty) && !is_custom;
        !(is_custom || is_known) || is_empty || value.is_object()
    })?;
    let message =
        format!("Invalid value {value} specified for property '{name}' of resource 'User'.");
    Some(Answer::error(400, "Request_BadRequest", &message))
}

impl User {
    fn text(&self, name: &str) -> &str {
        self.properties.get(name).and_then(Value::as_str).unwrap_or_default()
    }

    fn has_mail(&self, mail: &str) -> bool {
        !mail.is_empty() && self.text("mail").eq_ignore_ascii_case(mail)
    }

    /// Id and issuer of each.
    fn identities(&self) -> impl Iterator<Item = (&str, &str)> {
        let identities = self.properties.get("identities").and_then(Value::as_array);
        identities
            .into_iter()
            .flatten()
            .filter_map(|it| Some((it["issuerAssignedId"].as_str()?, it["issuer"].as_str()?)))
    }

    fn is_seen(&mut self) -> bool {
        let seen = self.blind_reads == 0;
        self.blind_reads = self.blind_reads.saturating_sub(1);
        seen
    }

    fn selected(&self, select: &str) -> Value {
        let names: Vec<_> = select.split(',').collect();
        let chosen = self.properties.iter().filter(|(name, _)| names.contains(&name.as_str()));
        chosen.map(|(name, value)| (name.clone(), value.clone())).collect::<Map<_, _>>().into()
    }
}

enum Filter {
    Mail(String),
    Identity { id: String, issuer: String },
}

impl Filter {
    fn parse(filter: &str) -> Option<Self> {
        if let Some(rest) = filter.strip_prefix("mail eq ") {
            return match literal(rest)? {
                (mail, "") => Some(Self::Mail(mail)),
                _ => None,
            };
        }
        let rest = filter.strip_prefix("identities/any(i:i/issuerAssignedId eq ")?;
        let (id, rest) = literal(rest)?;
        let (issuer, rest) = literal(rest.strip_prefix(" and i/issuer eq ")?)?;
        (rest == ")").then_some(Self::Identity { id, issuer })
    }
}

/// Text in quotes, in which a quote is doubled, and what follows it.
fn literal(text: &str) -> Option<(String, &str)> {
    let text = text.strip_prefix('\'')?;
    let mut value = String::new();
    let mut rest = text;
    loop {
        let (before, after) = rest.split_once('\'')?;
        value.push_str(before);
        match after.strip_prefix('\'') {
            Some(more) => {
                value.push('\'');
                rest = more;
            }
            None => return Some((value, after)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_search_is_of_a_known_shape_and_its_quotes_are_closed() {
        assert!(
            matches!(Filter::parse("mail eq 'o''neil@x'"), Some(Filter::Mail(it)) if it == "o'neil@x")
        );
        let identity = "identities/any(i:i/issuerAssignedId eq '1' and i/issuer eq 'mail')";
        assert!(matches!(Filter::parse(identity), Some(Filter::Identity { id, issuer })
            if id == "1" && issuer == "mail"));
        for other in ["", "mail eq 'a' or true", "mail eq 'a''", "mail ne 'a'", "mail+eq+'a'"] {
            assert!(Filter::parse(other).is_none(), "{other}");
        }
    }
}
