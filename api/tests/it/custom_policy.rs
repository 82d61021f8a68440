//! B2C custom policies: however the policy sends the claims, they are the same sign-up.

use axum::{
    body::Body,
    http::{HeaderMap, HeaderValue, Method, Request, StatusCode, header},
};
use serde_json::{Value, json};
use vestibule_api::{
    BodyKind, ConnectorSettings, ContractSettings, ErrorStatus, OnError, PolicyError, Problem,
    Received, Reply, RuleOutcome, RuleSettings, Shape,
};
use vestibule_events::{Kind, Mode, Outcome, Protocol, SignUp, Step};

use crate::{
    dialects::partners_of,
    payloads::read,
    support::{BadLog, Endpoint, Misbehaviour, partners_with, request},
};

/// The published calls, in the order of the table below.
pub(crate) const REQUESTS: [&str; 2] =
    ["b2c-custompolicy-getprofile-request.json", "b2c-custompolicy-validateprofile-request.json"];

fn policy() -> ConnectorSettings {
    partners_of(Protocol::CustomPolicy)
}

fn policy_with(rules: Vec<RuleSettings>) -> ConnectorSettings {
    ConnectorSettings { protocol: Protocol::CustomPolicy, ..partners_with(rules) }
}

fn rule(name: &str, when: &str, outcome: RuleOutcome) -> RuleSettings {
    RuleSettings {
        name: name.to_owned(),
        steps: vec![],
        when: when.to_owned(),
        outcome,
        on_error: OnError::Continue,
        mode: Mode::Enforce,
    }
}

fn set(name: &str, claims: &[(&str, &str)]) -> RuleSettings {
    let claims = claims.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect();
    rule(name, "true", RuleOutcome::Set { claims })
}

/// A `GET` with the right credentials.
fn get(path: &str) -> anyhow::Result<Request<Body>> {
    let mut request = request(path).method(Method::GET).body(Body::empty())?;
    request.headers_mut().remove(header::CONTENT_TYPE);
    Ok(request)
}

#[tokio::test]
async fn every_published_call_of_a_policy_is_answered_and_becomes_its_event() -> anyhow::Result<()>
{
    let endpoint = Endpoint::new(policy()).await?;
    let expected = [
        (None, Some("User objectId"), json!({ "lang": "Current UI language" })),
        (
            Some("User email address"),
            None,
            json!({ "language": "Current UI language", "loyaltyId": "User loyalty ID" }),
        ),
    ];
    for (file, (email, object_id, claims)) in REQUESTS.into_iter().zip(expected) {
        let reply = endpoint.post("/connectors/partners/before-create", &read(file)?).await?;

        assert_eq!((reply.status, reply.body), (StatusCode::OK, json!({})), "{file}");
        let event = endpoint.events().await?.pop().expect("the event of the call");
        assert_eq!(event.kind, Kind::Accepted, "{file}");
        let sign_up = event.sign_up;
        assert_eq!(sign_up.protocol, Protocol::CustomPolicy);
        assert_eq!(sign_up.email.as_ref().map(|it| it.expose()), email, "{file}");
        assert_eq!(sign_up.object_id.as_deref(), object_id, "{file}");
        assert_eq!(Value::Object(sign_up.claims), claims, "{file}");
    }
    Ok(())
}

#[test]
fn every_published_answer_to_a_policy_is_one_of_ours() -> anyhow::Result<()> {
    let settings = policy();
    for file in [
        "b2c-custompolicy-getprofile-response.json",
        "b2c-custompolicy-validateprofile-response.json",
        "b2c-custompolicy-nullhandling-response.json",
    ] {
        let published = read(file)?;
        let claims = published.as_object().expect("an object").clone();
        let outcome = Outcome::Continue { claims };
        let written = settings.dialect().write(&shape(), &Reply::new(&outcome, None));
        assert_eq!(written.status, StatusCode::OK, "{file}");
        assert_eq!(serde_json::from_slice::<Value>(&written.body)?, published, "{file}");
    }
    for file in [
        "b2c-custompolicy-conflict-full-response.json",
        "b2c-custompolicy-validateprofile-conflict-response.json",
    ] {
        let published = read(file)?;
        let error: PolicyError = serde_json::from_value(published.clone())?;
        assert_eq!(error.status, PolicyError::STATUS, "{file}");
        assert_eq!(serde_json::to_value(error)?, published, "{file}");
    }
    Ok(())
}

fn shape() -> Shape {
    let connector = "partners".parse().expect("a valid name");
    let received = Received::json(&connector, Some(Step::BeforeCreate), b"{}");
    policy().dialect().read(&received).expect("an empty object is a call").shape
}

#[test]
fn json_form_query_path_and_headers_say_the_same_sign_up() {
    let contract = ContractSettings {
        claim_headers: ["email", "displayName", "city", "correlationId", "client_id", "ui_locales"]
            .map(str::to_owned)
            .into(),
        ..ContractSettings::default()
    };
    let settings = ConnectorSettings { contract, ..policy() };
    let connector = settings.name.clone();
    let base = Received::json(&connector, Some(Step::BeforeCreate), b"");
    let read = |received: Received<'_>| -> Result<SignUp, Problem> {
        settings.dialect().read(&received).map(|call| call.sign_up)
    };
    let get = Received { kind: BodyKind::Nothing, ..base };
    let mut headers = HeaderMap::new();
    for (name, value) in [
        ("email", "ada@example.com"),
        ("DISPLAYNAME", "Ada L\u{f6}velace"),
        ("City", "A/B & C+D"),
        ("correlationid", "c-1"),
        ("client_id", "app"),
        ("ui_locales", "en-US"),
        ("x-forwarded-for", "10.0.0.1"),
    ] {
        let value = HeaderValue::from_bytes(value.as_bytes()).expect("a valid header");
        let name = header::HeaderName::from_bytes(name.as_bytes()).expect("a valid name");
        headers.insert(name, value);
    }
    let some_headers: HeaderMap = headers
        .iter()
        .filter(|(name, _)| *name == "city")
        .map(|(a, b)| (a.clone(), b.clone()))
        .collect();

    let json = read(Received {
        body: r#"{"email":"ada@example.com","displayName":"Ada Lövelace","city":"A/B & C+D",
                  "correlationId":"c-1","client_id":"app","ui_locales":"en-US"}"#
            .as_bytes(),
        ..base
    });
    let pairs = "email=ada%40example.com&displayName=Ada+L%C3%B6velace&city=A%2FB%20%26+C%2BD\
                 &correlationId=c-1&&client_id=app&ui_locales=en-US";
    let path = "email/ada@example.com/displayName/Ada%20L%C3%B6velace/city/A%2FB%20&%20C+D\
                /correlationId/c-1/client_id/app/ui_locales/en-US";
    let form = read(Received {
        kind: BodyKind::Form,
        body: pairs.as_bytes(),
        query: Some("code=x"),
        ..base
    });
    let query = read(Received { query: Some(pairs), ..get });
    let in_path = read(Received { path: Some(path), ..get });
    let in_headers = read(Received { headers: Some(&headers), ..get });
    let mixed = read(Received {
        path: Some("email/ada@example.com/displayName/Ada%20L%C3%B6velace"),
        query: Some("correlationId=c-1&client_id=app&ui_locales=en-US"),
        headers: Some(&some_headers),
        ..get
    });

    let json = json.expect("a call");
    assert_eq!(json.email.as_ref().map(|it| it.expose()), Some("ada@example.com"));
    assert_eq!(json.correlation_id.as_deref(), Some("c-1"));
    assert_eq!((json.client.as_deref(), json.locale.as_deref()), (Some("app"), Some("en-US")));
    let claims = json!({ "displayName": "Ada Lövelace", "city": "A/B & C+D" });
    assert_eq!(Value::Object(json.claims.clone()), claims);
    for (how, other) in [
        ("form", form),
        ("query", query),
        ("path", in_path),
        ("headers", in_headers),
        ("mixed", mixed),
    ] {
        assert!(other.as_ref() == Ok(&json), "{how} says something else: {other:?}");
    }
}

#[test]
fn a_header_that_is_not_utf_8_is_latin_1() {
    let contract = ContractSettings {
        claim_headers: vec!["displayName".to_owned(), "Authorization".to_owned()],
        ..ContractSettings::default()
    };
    let settings = ConnectorSettings { contract, ..policy() };
    let connector = settings.name.clone();
    for (bytes, text) in [(&b"J\xfcrgen"[..], "Jürgen"), ("Jürgen".as_bytes(), "Jürgen")] {
        let mut headers = HeaderMap::new();
        headers.insert("displayname", HeaderValue::from_bytes(bytes).expect("a valid header"));
        headers.insert("authorization", HeaderValue::from_static("secret"));
        let received = Received {
            kind: BodyKind::Nothing,
            headers: Some(&headers),
            ..Received::json(&connector, Some(Step::BeforeCreate), b"")
        };
        let call = settings.dialect().read(&received).expect("a call");
        assert_eq!(Value::Object(call.sign_up.claims), json!({ "displayName": text }));
    }
}

#[test]
fn the_names_that_policies_give_are_known() {
    let connector = "partners".parse().expect("a valid name");
    let settings = policy();
    let read = |body: &Value| {
        let body = body.to_string();
        let received = Received::json(&connector, Some(Step::BeforeCreate), body.as_bytes());
        settings.dialect().read(&received).expect("a call").sign_up
    };
    for (body, email, claims) in [
        (json!({ "email": "a@x.test" }), Some("a@x.test"), json!({})),
        (json!({ "signInName": "a@x.test" }), Some("a@x.test"), json!({})),
        (json!({ "signInNames.emailAddress": "a@x.test" }), Some("a@x.test"), json!({})),
        (json!({ "signInName": "ada" }), None, json!({ "signInName": "ada" })),
        (
            json!({ "email": "a@x.test", "signInName": "b@x.test" }),
            Some("a@x.test"),
            json!({ "signInName": "b@x.test" }),
        ),
        (json!({ "email": 5 }), None, json!({ "email": 5 })),
        (json!({ "lastName": "L" }), None, json!({ "surname": "L" })),
        (json!({ "step": "one of ours" }), None, json!({ "step": "one of ours" })),
        (json!({ "ip": "nowhere" }), None, json!({ "ip": "nowhere" })),
        (json!({ "language": "1033" }), None, json!({ "language": "1033" })),
    ] {
        let sign_up = read(&body);
        assert_eq!(sign_up.email.as_ref().map(|it| it.expose()), email, "{body}");
        assert_eq!(Value::Object(sign_up.claims), claims, "{body}");
    }
    assert_eq!(read(&json!({ "ip": "2001:db8::1" })).ip.as_deref(), Some("2001:db8::1"));
    let identity = json!({ "signInType": "f", "issuer": "g", "issuerAssignedId": "1" });
    assert_eq!(read(&json!({ "identities": [identity] })).identities.len(), 1);
}

#[tokio::test]
async fn the_connectors_own_url_needs_a_claim_that_names_the_step() -> anyhow::Result<()> {
    let endpoint = Endpoint::new(policy()).await?;
    for (name, expected) in [
        ("before-create", Some(Step::BeforeCreate)),
        ("PostAttributeCollection", Some(Step::BeforeCreate)),
        ("after-federation", Some(Step::AfterFederation)),
        ("postfederationsignup", Some(Step::AfterFederation)),
        ("after-create", None),
    ] {
        let path = format!("/connectors/partners?step={name}&email={name}@x.test");
        let reply = endpoint.call(get(&path)?).await?;
        let step = endpoint.events().await?.pop().map(|event| event.sign_up.step);
        match expected {
            Some(expected) => {
                assert_eq!((reply.status, step), (StatusCode::OK, Some(expected)), "{name}");
            }
            None => assert_eq!(reply.body["code"], "unknown-step", "{name}"),
        }
    }
    let reply = endpoint.call(get("/connectors/partners?email=a@x.test")?).await?;
    assert_eq!(reply.body["code"], "missing-step");

    let path = "/connectors/partners/before-create/step/after-federation";
    let reply = endpoint.call(get(path)?).await?;
    assert_eq!(reply.status, StatusCode::OK);
    let event = endpoint.events().await?.pop().expect("an event");
    assert_eq!(event.sign_up.step, Step::BeforeCreate, "the URL holds");
    let line = r#"step_contradictions_total{connector="partners"} 1"#;
    assert!(endpoint.metrics()?.contains(line));
    Ok(())
}

#[tokio::test]
async fn each_decision_has_its_answer_for_a_policy() -> anyhow::Result<()> {
    let reject = RuleOutcome::Reject {
        message: "Please enter a valid Postal Code.".to_owned(),
        field: Some("postalCode".to_owned()),
    };
    let block = RuleOutcome::Block { message: "Not from there.".to_owned() };
    let rules = || {
        vec![
            rule("reject", "signup.claims.postalCode == '0'", reject.clone()),
            rule("block", "signup.email_domain == 'spam.test'", block.clone()),
            set("set", &[("promoCode", "'24534'"), ("points", "5")]),
        ]
    };
    for (error_status, status) in [
        (ErrorStatus::Conflict, StatusCode::CONFLICT),
        (ErrorStatus::BadRequest, StatusCode::BAD_REQUEST),
    ] {
        let contract = ContractSettings { error_status, ..ContractSettings::default() };
        let settings = ConnectorSettings { contract, ..policy_with(rules()) };
        let endpoint = Endpoint::new(settings).await?;
        for step in Step::ALL {
            let path = format!("/connectors/partners/{step}");
            let event_id = || async {
                let event = endpoint.events().await?.pop().filter(|_| step != Step::BeforeToken);
                anyhow::Ok(event.map_or(Value::Null, |event| event.id.to_string().into()))
            };

            let goes_on = endpoint.post(&path, &json!({ "email": "a@x.test" })).await?;
            let claims = json!({ "promoCode": "24534", "points": 5 });
            assert_eq!((goes_on.status, goes_on.body), (StatusCode::OK, claims), "{step}");

            let body = json!({ "email": "b@x.test", "postalCode": "0" });
            let rejected = endpoint.post(&path, &body).await?;
            assert_eq!(rejected.status, status, "{step}");
            assert_eq!(rejected.body["status"], 409, "{step}");
            assert_eq!(rejected.body["version"], "1.0.0", "{step}");
            assert_eq!(rejected.body["code"], "rejected", "{step}");
            assert_eq!(rejected.body["userMessage"], "Please enter a valid Postal Code.");
            assert_eq!(rejected.body["developerMessage"], "the claim to correct is postalCode");
            assert_eq!(rejected.body["requestId"], event_id().await?, "{step}");

            let blocked = endpoint.post(&path, &json!({ "email": "c@spam.test" })).await?;
            assert_eq!(blocked.status, status, "{step}");
            let mut expected = json!({
                "version": "1.0.0",
                "status": 409,
                "code": "blocked",
                "requestId": event_id().await?,
                "userMessage": "Not from there.",
            });
            if step == Step::BeforeToken {
                expected.as_object_mut().map(|it| it.remove("requestId"));
            }
            assert_eq!(blocked.body, expected, "{step}");
        }
    }
    Ok(())
}

#[test]
fn a_pending_sign_up_looks_like_a_refusal_with_a_code_of_its_own() -> anyhow::Result<()> {
    let outcome =
        Outcome::Pending { message: "Please wait.".to_owned(), claims: serde_json::Map::new() };
    let written = policy().dialect().write(&shape(), &Reply::new(&outcome, None));
    assert_eq!(written.status, StatusCode::CONFLICT);
    let expected = json!({
        "version": "1.0.0", "status": 409, "code": "pending", "userMessage": "Please wait.",
    });
    assert_eq!(serde_json::from_slice::<Value>(&written.body)?, expected);
    Ok(())
}

#[tokio::test]
async fn without_storage_a_policy_hears_an_error_that_asks_to_try_again() -> anyhow::Result<()> {
    let endpoint = Endpoint::over(BadLog(Misbehaviour::NotStored), policy());
    let reply = endpoint.call(get("/connectors/partners/before-create?email=a@x.test")?).await?;
    assert_eq!(reply.status, StatusCode::CONFLICT);
    let expected = json!({
        "version": "1.0.0",
        "status": 409,
        "code": "not-stored",
        "userMessage":
            "We cannot take your sign-up at the moment. Please try again in a few minutes.",
    });
    assert_eq!(reply.body, expected);
    Ok(())
}

/// A null breaks the platform, and it takes no object apart.
#[test]
fn what_a_policy_cannot_read_is_left_out_and_reported() -> anyhow::Result<()> {
    let claims = json!({
        "a": null, "b": { "c": 1 }, "d": [[1]], "e": [null], "": "f", "g": ["h", 1], "i": "kept",
    });
    let outcome = Outcome::Continue { claims: claims.as_object().expect("an object").clone() };
    let written = policy().dialect().write(&shape(), &Reply::new(&outcome, None));
    let body: Value = serde_json::from_slice(&written.body)?;
    assert_eq!(body, json!({ "g": ["h", 1], "i": "kept" }));
    assert_eq!((written.unsaid.claims, written.unsaid.refusal), (5, false));
    Ok(())
}

#[tokio::test]
async fn a_repeated_get_gets_its_first_answer() -> anyhow::Result<()> {
    let endpoint = Endpoint::new(policy()).await?;
    let paths = ["before-create?email=a@x.test&city=X", "before-create/city/X/email/A@x.test"];
    for path in paths {
        let reply = endpoint.call(get(&format!("/connectors/partners/{path}"))?).await?;
        assert_eq!(reply.status, StatusCode::OK, "{path}");
    }
    assert_eq!(endpoint.events().await?.len(), 1);
    let other = "before-create?email=a@x.test&city=X&correlationId=2";
    endpoint.call(get(&format!("/connectors/partners/{other}"))?).await?;
    assert_eq!(endpoint.events().await?.len(), 2, "another correlation is another call");
    Ok(())
}
