//! Registering the devices of people, for the back end of the app or the page that they use.
//!
//! Whoever calls has signed the person in; here they show the one token that lets them. The person
//! is named by address or identity and kept as a pseudonym. How a device is reached is a secret: it
//! is taken, and never given back or logged. A browser's endpoint comes from the browser, so it is
//! believed only where it leads to a push service that the configuration names.

use std::{
    sync::{Arc, OnceLock},
    time::Duration,
};

use axum::{
    Json, Router,
    body::{Body, to_bytes},
    extract::{Path, RawQuery, Request, State},
    http::{HeaderMap, StatusCode, header},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::{delete, post},
};
use data_encoding::{BASE64URL_NOPAD, HEXLOWER_PERMISSIVE};
use reqwest::Url;
use secrecy::{ExposeSecret, SecretString};
use serde::Deserialize;
use serde_json::json;
use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq as _;
use time::{OffsetDateTime, format_description::well_known::Rfc3339};
use tokio::time::timeout;
use tracing::{info, warn};
use uuid::Uuid;
use vestibule_events::{Email, Identity, Person, PseudonymKey};
use vestibule_store::{DeviceAddress, DeviceRecord, Store, StoreError};

const BODY_BYTES_MAX: usize = 16 * 1024;
const LABEL_CHARS_MAX: usize = 100;
const TEXT_BYTES_MAX: usize = 4096;
const PATIENCE: Duration = Duration::from_secs(10);

/// Where devices are registered; cheap to clone.
#[derive(Clone)]
pub struct DeviceDesk(Arc<Inner>);

struct Inner {
    /// Empty until the store has been reached for the first time.
    store: Arc<OnceLock<Store>>,
    key: PseudonymKey,
    token: [u8; 32],
    push_services: Vec<String>,
}

impl std::fmt::Debug for DeviceDesk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DeviceDesk")
            .field("push_services", &self.0.push_services)
            .finish_non_exhaustive()
    }
}

impl DeviceDesk {
    /// The push services of the browsers that there are.
    pub const PUSH_SERVICES: [&str; 4] = [
        "fcm.googleapis.com",
        "push.services.mozilla.com",
        "web.push.apple.com",
        "notify.windows.com",
    ];

    /// `push_services` are hosts to whose subdomains endpoints of browsers may lead as well.
    #[must_use]
    pub fn new(
        store: Arc<OnceLock<Store>>,
        key: PseudonymKey,
        token: &SecretString,
        push_services: Vec<String>,
    ) -> Self {
        let token = Sha256::digest(token.expose_secret().as_bytes()).into();
        Self(Arc::new(Inner { store, key, token, push_services }))
    }

    /// In constant time, whatever was presented.
    fn lets_in(&self, headers: &HeaderMap) -> bool {
        let given = headers.get(header::AUTHORIZATION).and_then(|it| it.to_str().ok());
        let (scheme, token) = given.and_then(|it| it.split_once(' ')).unwrap_or_default();
        let presented: [u8; 32] = Sha256::digest(token.trim().as_bytes()).into();
        bool::from(self.0.token.ct_eq(&presented)) && scheme.eq_ignore_ascii_case("bearer")
    }

    /// What the store says in time; why not is logged here.
    async fn ask<T>(
        &self,
        question: impl AsyncFnOnce(&Store) -> Result<T, StoreError>,
    ) -> Result<T, Response> {
        let away = || refused(StatusCode::SERVICE_UNAVAILABLE, "away", "try again in a moment");
        let Some(store) = self.0.store.get() else { return Err(away()) };
        match timeout(PATIENCE, question(store)).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(error)) => {
                warn!(%error, cause = %error.cause(), "the devices cannot be reached");
                Err(away())
            }
            Err(_elapsed) => Err(away()),
        }
    }
}

/// `POST /devices`, `GET /devices?person=` and `DELETE /devices/<id>`.
pub fn devices_router(desk: DeviceDesk) -> Router {
    Router::new()
        .route("/devices", post(register).get(list))
        .route("/devices/{id}", delete(remove))
        .layer(middleware::from_fn_with_state(desk.clone(), let_in))
        .with_state(desk)
}

async fn let_in(State(desk): State<DeviceDesk>, request: Request, next: Next) -> Response {
    if desk.lets_in(request.headers()) {
        return next.run(request).await;
    }
    let message = "show the token of `devices.token` as a bearer token";
    let mut response = refused(StatusCode::UNAUTHORIZED, "unauthorized", message);
    let scheme = header::HeaderValue::from_static("Bearer");
    response.headers_mut().insert(header::WWW_AUTHENTICATE, scheme);
    response
}

async fn register(State(desk): State<DeviceDesk>, body: Body) -> Response {
    let body = match timeout(PATIENCE, to_bytes(body, BODY_BYTES_MAX)).await {
        Ok(Ok(body)) => body,
        Ok(Err(_)) => {
            let message = "a registration has at most 16 KiB";
            return refused(StatusCode::PAYLOAD_TOO_LARGE, "too-large", message);
        }
        Err(_elapsed) => {
            return refused(
                StatusCode::REQUEST_TIMEOUT,
                "timeout",
                "the body did not come in time",
            );
        }
    };
    let read = Registration::read(&body, &desk.0.push_services);
    let (whose, address, label) = match read {
        Ok(read) => read,
        Err(message) => return refused(StatusCode::BAD_REQUEST, "invalid", message),
    };
    let person = whose.person(&desk.0.key);
    let registered = desk.ask(async |store| {
        store.register_device(&person, &address, label.as_deref(), OffsetDateTime::now_utc()).await
    });
    match registered.await {
        Ok(id) => {
            info!(device = %id, kind = %address.kind(), %person, "a device was registered");
            (StatusCode::CREATED, Json(json!({ "id": id, "person": person }))).into_response()
        }
        Err(response) => response,
    }
}

async fn list(State(desk): State<DeviceDesk>, RawQuery(query): RawQuery) -> Response {
    let query = query.unwrap_or_default();
    let person = form_urlencoded::parse(query.as_bytes()).find(|(name, _)| name == "person");
    let Some((_, person)) = person else {
        // An address in a URL would be read in logs of whatever is in between.
        let message = "name the person by the pseudonym that registering gives: ?person=";
        return refused(StatusCode::BAD_REQUEST, "invalid", message);
    };
    let person = Person::from_pseudonym(person);
    match desk.ask(async |store| store.devices_of(&person).await).await {
        Ok(devices) => Json(devices.iter().map(shown).collect::<Vec<_>>()).into_response(),
        Err(response) => response,
    }
}

async fn remove(State(desk): State<DeviceDesk>, Path(id): Path<String>) -> Response {
    let not_found = || refused(StatusCode::NOT_FOUND, "not-found", "there is no such device");
    let Ok(id) = Uuid::parse_str(&id) else { return not_found() };
    let now = OffsetDateTime::now_utc();
    match desk.ask(async |store| store.remove_device(id, "unregistered", now).await).await {
        Ok(true) => {
            info!(device = %id, "a device was unregistered");
            StatusCode::NO_CONTENT.into_response()
        }
        Ok(false) => not_found(),
        Err(response) => response,
    }
}

fn refused(status: StatusCode, code: &str, message: &str) -> Response {
    let body = json!({ "status": status.as_u16(), "code": code, "userMessage": message });
    (status, Json(body)).into_response()
}

fn shown(device: &DeviceRecord) -> serde_json::Value {
    let time = |it: OffsetDateTime| it.format(&Rfc3339).unwrap_or_default();
    json!({
        "id": device.id,
        "kind": device.kind,
        "label": device.label,
        "created_at": time(device.created_at),
        "last_used_at": device.last_used_at.map(time),
        "removed_at": device.removed_at.map(time),
        "removed_reason": device.removed_reason,
    })
}

/// A registration as it comes.
#[derive(Deserialize)]
struct Registration {
    person: Whose,
    label: Option<String>,
    #[serde(flatten)]
    device: Given,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Whose {
    Email {
        email: String,
    },
    Identity {
        issuer: String,
        #[serde(rename = "issuerAssignedId")]
        issuer_assigned_id: String,
    },
}

#[derive(Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
enum Given {
    /// As browsers give it to the page.
    WebPush {
        subscription: Subscription,
    },
    Fcm {
        token: String,
    },
    Apns {
        token: String,
    },
}

#[derive(Deserialize)]
struct Subscription {
    endpoint: String,
    keys: SubscriptionKeys,
}

#[derive(Deserialize)]
struct SubscriptionKeys {
    p256dh: String,
    auth: String,
}

type Read = (Whose, DeviceAddress, Option<String>);

impl Registration {
    /// Or what is wrong with it, without repeating any of it.
    fn read(body: &[u8], push_services: &[String]) -> Result<Read, &'static str> {
        let Self { person, label, device } = serde_json::from_slice(body).map_err(|_| {
            "a registration has `person` ({\"email\": …}, or {\"issuer\": …, \
             \"issuerAssignedId\": …}) and `kind` (\"web-push\" with the browser's \
             `subscription`, or \"fcm\" or \"apns\" with the device's `token`)"
        })?;
        let named = match &person {
            Whose::Email { email } => email.contains('@') && email.len() <= 320,
            Whose::Identity { issuer, issuer_assigned_id } => {
                !issuer.is_empty() && !issuer_assigned_id.is_empty()
            }
        };
        if !named {
            return Err("`person` needs an address, or an issuer and the id that it gave");
        }
        if label.as_ref().is_some_and(|it| it.chars().count() > LABEL_CHARS_MAX) {
            return Err("`label` has at most 100 characters");
        }
        let address = match device {
            Given::WebPush { subscription } => subscription.address(push_services)?,
            Given::Fcm { token } => {
                let good = (1..=TEXT_BYTES_MAX).contains(&token.len());
                if !good || !token.bytes().all(|it| it.is_ascii_graphic()) {
                    return Err("`token` is none that Firebase gives");
                }
                DeviceAddress::Fcm { token: token.into() }
            }
            Given::Apns { token } => {
                let bytes = HEXLOWER_PERMISSIVE.decode(token.as_bytes()).unwrap_or_default();
                if !(1..=100).contains(&bytes.len()) {
                    return Err("`token` is the device token that Apple gives, in hexadecimal");
                }
                DeviceAddress::Apns { token: token.to_ascii_lowercase().into() }
            }
        };
        Ok((person, address, label))
    }
}

impl Whose {
    fn person(self, key: &PseudonymKey) -> Person {
        match self {
            Self::Email { email } => key.person_with_email(&Email::new(email)),
            Self::Identity { issuer, issuer_assigned_id } => key.person_with_identity(&Identity {
                // A pseudonym is made without it.
                sign_in_type: String::new(),
                issuer,
                issuer_assigned_id,
            }),
        }
    }
}

impl Subscription {
    fn address(self, push_services: &[String]) -> Result<DeviceAddress, &'static str> {
        let url = Url::parse(&self.endpoint).map_err(|_| "`endpoint` is no URL")?;
        let host = url.host_str().unwrap_or_default();
        let is_below = |service: &String| {
            host == service || host.strip_suffix(service).is_some_and(|it| it.ends_with('.'))
        };
        if self.endpoint.len() > TEXT_BYTES_MAX || !push_services.iter().any(is_below) {
            return Err("`endpoint` is not at a push service that `devices.push_services` names");
        }
        let is_local = matches!(host, "localhost" | "127.0.0.1" | "[::1]");
        if url.scheme() != "https" && !(url.scheme() == "http" && is_local) {
            return Err("`endpoint` must be an https URL");
        }
        let bytes = |text: &str| {
            let bytes = BASE64URL_NOPAD.decode(text.trim_end_matches('=').as_bytes());
            bytes.unwrap_or_default()
        };
        let (key, auth) = (bytes(&self.keys.p256dh), bytes(&self.keys.auth));
        if key.len() != 65 || key[0] != 4 || auth.len() != 16 {
            return Err("`keys` must be those that the browser gives, p256dh and auth");
        }
        Ok(DeviceAddress::WebPush {
            endpoint: self.endpoint.into(),
            public_key: self.keys.p256dh,
            auth: self.keys.auth.into(),
        })
    }
}

#[cfg(test)]
mod tests {
    use tower::ServiceExt as _;
    use vestibule_store::{StoreOptions, StoreUrl};

    use super::*;

    const TOKEN: &str = "let-me-in";

    fn web(endpoint: &str) -> serde_json::Value {
        let key = BASE64URL_NOPAD.encode(&[[4].as_slice(), &[7; 64]].concat());
        let auth = BASE64URL_NOPAD.encode(&[9; 16]);
        json!({
            "person": { "email": "Ada@Example.com" },
            "kind": "web-push",
            "label": "laptop",
            "subscription": { "endpoint": endpoint, "keys": { "p256dh": key, "auth": auth } },
        })
    }

    struct Desk {
        router: Router,
        _folder: tempfile::TempDir,
    }

    impl Desk {
        async fn open() -> Self {
            let folder = tempfile::tempdir().unwrap();
            let url = StoreUrl::Sqlite(folder.path().join("store.db"));
            let store = Store::open(&url, StoreOptions::default()).await.unwrap();
            store.migrate().await.unwrap();
            Self::with(Arc::new(OnceLock::from(store)), folder)
        }

        fn with(store: Arc<OnceLock<Store>>, folder: tempfile::TempDir) -> Self {
            let services = DeviceDesk::PUSH_SERVICES.map(str::to_owned).to_vec();
            let key = PseudonymKey::new(vec![1; 32]);
            let desk = DeviceDesk::new(store, key, &TOKEN.into(), services);
            Self { router: devices_router(desk), _folder: folder }
        }

        async fn call(
            &self,
            method: &str,
            uri: &str,
            token: &str,
            body: String,
        ) -> (u16, serde_json::Value) {
            let request = Request::builder()
                .method(method)
                .uri(uri)
                .header("authorization", token)
                .body(Body::from(body))
                .unwrap();
            let response = self.router.clone().oneshot(request).await.unwrap();
            let status = response.status().as_u16();
            let body = to_bytes(response.into_body(), 1 << 20).await.unwrap();
            (status, serde_json::from_slice(&body).unwrap_or_default())
        }

        async fn post(&self, body: &serde_json::Value) -> (u16, serde_json::Value) {
            self.call("POST", "/devices", "Bearer let-me-in", body.to_string()).await
        }
    }

    #[tokio::test]
    async fn a_device_is_registered_listed_and_removed() {
        let desk = Desk::open().await;
        let endpoint = "https://updates.push.services.mozilla.com/wpush/v2/abc";

        let (status, made) = desk.post(&web(endpoint)).await;
        assert_eq!(status, 201, "{made}");
        assert_eq!(desk.post(&web(endpoint)).await, (201, made.clone()), "the same device");
        for (kind, token) in [("fcm", "abc:def"), ("apns", "00FF")] {
            let device =
                json!({ "person": { "email": " ada@example.com" }, "kind": kind, "token": token });
            let (status, other) = desk.post(&device).await;
            assert_eq!((status, &other["person"]), (201, &made["person"]), "{kind}");
        }

        let list = format!("/devices?person={}", made["person"].as_str().unwrap());
        let (status, listed) = desk.call("GET", &list, "bearer let-me-in", String::new()).await;
        assert_eq!((status, listed.as_array().map(Vec::len)), (200, Some(3)));
        assert_eq!(
            (&listed[0]["kind"], &listed[0]["label"]),
            (&json!("web-push"), &json!("laptop"))
        );
        let text = listed.to_string();
        assert!(!text.contains("mozilla") && !text.contains("abc:def"), "{text}");

        let one = format!("/devices/{}", made["id"].as_str().unwrap());
        for expected in [204, 404] {
            let (status, _) = desk.call("DELETE", &one, "Bearer let-me-in", String::new()).await;
            assert_eq!(status, expected);
        }
        let (_, listed) = desk.call("GET", &list, "Bearer let-me-in", String::new()).await;
        assert_eq!(listed[0]["removed_reason"], "unregistered");
        let (status, _) =
            desk.call("DELETE", "/devices/1", "Bearer let-me-in", String::new()).await;
        assert_eq!(status, 404);
    }

    #[tokio::test]
    async fn without_the_token_nothing_is_read_and_nothing_done() {
        let desk = Desk::open().await;
        let body = web("https://fcm.googleapis.com/fcm/send/abc");
        for token in ["", "Bearer", "Bearer ", "Bearer let-me-im", "Basic let-me-in", "let-me-in"] {
            for (method, uri) in
                [("POST", "/devices"), ("GET", "/devices?person=x"), ("DELETE", "/devices/x")]
            {
                let (status, _) = desk.call(method, uri, token, body.to_string()).await;
                assert_eq!(status, 401, "{method} {token:?}");
            }
        }
        let folder = tempfile::tempdir().unwrap();
        let away = Desk::with(Arc::default(), folder);
        assert_eq!(away.post(&body).await.0, 503, "the store is not open yet");
    }

    #[tokio::test]
    async fn what_leads_elsewhere_or_is_no_device_is_refused() {
        let desk = Desk::open().await;
        for endpoint in [
            "",
            "https://example.com/",
            "https://evilfcm.googleapis.com.example.com/",
            "https://evil-fcm.googleapis.com/",
            "http://fcm.googleapis.com/",
            "http://127.0.0.1/",
            "http://169.254.169.254/",
            "https://fcm.googleapis.com@example.com/",
        ] {
            let (status, answer) = desk.post(&web(endpoint)).await;
            assert_eq!(status, 400, "{endpoint}: {answer}");
            assert!(!answer.to_string().contains("example.com"), "{answer}");
        }
        let person = json!({ "email": "ada@example.com" });
        let mut key = web("https://fcm.googleapis.com/x");
        key["subscription"]["keys"]["p256dh"] = json!("AAAA");
        let mut label = web("https://fcm.googleapis.com/x");
        label["label"] = json!("x".repeat(101));
        for body in [
            key,
            label,
            json!({}),
            json!([]),
            json!({ "person": person, "kind": "pager", "token": "x" }),
            json!({ "person": person, "kind": "fcm", "token": "" }),
            json!({ "person": person, "kind": "fcm", "token": "a b" }),
            json!({ "person": person, "kind": "apns", "token": "../../x" }),
            json!({ "person": { "email": "ada" }, "kind": "apns", "token": "00" }),
            json!({ "person": { "issuer": "google.com" }, "kind": "apns", "token": "00" }),
        ] {
            assert_eq!(desk.post(&body).await.0, 400, "{body}");
        }
        let long = format!("{{\"label\":\"{}\"}}", "x".repeat(BODY_BYTES_MAX));
        let (status, _) = desk.call("POST", "/devices", "Bearer let-me-in", long).await;
        assert_eq!(status, 413);
        let (status, _) = desk.call("GET", "/devices", "Bearer let-me-in", String::new()).await;
        assert_eq!(status, 400);
    }
}
