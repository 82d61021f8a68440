//! What the process writes about a call: ids, and nothing personal.

use std::{
    io::{self, Write},
    sync::{Arc, Mutex, PoisonError},
};

use axum::body::Body;
use serde_json::json;
use tracing_subscriber::fmt::MakeWriter;
use vestibule_events::Protocol;

use crate::{
    dialects::partners_of,
    support::{BadLog, Endpoint, Misbehaviour, partners, request, some_of_everything},
};

#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<u8>>>);

impl Lines {
    fn text(&self) -> String {
        let bytes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl MakeWriter<'_> for Lines {
    type Writer = Self;

    fn make_writer(&self) -> Self {
        self.clone()
    }
}

#[tokio::test]
async fn nothing_personal_is_written_whatever_happens() -> anyhow::Result<()> {
    let lines = Lines::default();
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(tracing::Level::TRACE)
        .with_ansi(false)
        .with_writer(lines.clone())
        .finish();
    let _guard = tracing::subscriber::set_default(subscriber);
    // Every value below holds this word.
    let body = json!({
        "email": "secretive@secretive.test",
        "identities": [{ "signInType": "f", "issuer": "x", "issuerAssignedId": "secretive" }],
        "city": "secretive",
        "age": "secretive",
        "step": "secretive",
        "ui_locales": "secretive",
        "secretive": 1,
    });
    let path = "/connectors/partners/before-create?code=secretive";

    let working = Endpoint::new(some_of_everything()).await?;
    working.post(path, &body).await?;
    working.post(path, &body).await?;
    working.post("/connectors/secretive", &body).await?;
    for authorization in ["Basic c2VjcmV0aXZlOnNlY3JldGl2ZQ==", "secretive"] {
        let mut stranger = request(path).body(body.to_string().into())?;
        stranger.headers_mut().insert("authorization", authorization.parse()?);
        working.call(stranger).await?;
    }
    working.call(request(path).body("secretive".into())?).await?;
    for misbehaviour in [Misbehaviour::NotStored, Misbehaviour::Unknown] {
        Endpoint::over(BadLog(misbehaviour), partners()).post(path, &body).await?;
    }

    // What other dialects carry: codes, passwords, and claims in a URL.
    let extension = Endpoint::new(partners_of(Protocol::CustomExtension)).await?;
    for kind in ["emailOtpSend", "passwordSubmit", "attributeCollectionSubmit", "secretive"] {
        let kind = format!("microsoft.graph.authenticationEvent.{kind}");
        let attributes = json!({ "secretive": { "value": "secretive" } });
        let data = json!({
            "tenantId": "secretive",
            "customAuthenticationExtensionId": "secretive",
            "otpContext": { "identifier": "secretive", "oneTimeCode": "secretive" },
            "encryptedPasswordContext": "secretive",
            "userSignUpInfo": { "attributes": attributes },
        });
        extension.post("/connectors/partners", &json!({ "type": kind, "data": data })).await?;
    }
    let policy = Endpoint::new(partners_of(Protocol::CustomPolicy)).await?;
    for claims in ["?email=secretive", "/email/secretive", "/secretive", "?a=secretive%ff"] {
        let uri = format!("/connectors/partners/before-create{claims}");
        policy.call(request(&uri).method("GET").body(Body::empty())?).await?;
    }

    let text = lines.text();
    let event = working.events().await?.remove(0);
    for expected in [
        event.id.to_string(),
        event.person.to_string(),
        "a rule could not be evaluated".to_owned(),
        "names another; this one holds".to_owned(),
        "events cannot be stored in time".to_owned(),
    ] {
        assert!(text.contains(&expected), "no {expected} in\n{text}");
    }
    for line in text.lines() {
        assert!(!line.contains("secretive") && !line.contains("c2VjcmV0"), "{line}");
    }
    Ok(())
}
