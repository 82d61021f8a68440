//! What a wrong input gets: exact status and body, and never an event.

use std::{convert::Infallible, time::Duration};

use axum::{
    body::{Body, Bytes},
    http::{Method, Request, StatusCode, header},
};
use futures_util::stream;
use proptest::{prelude::*, test_runner::TestRunner};
use serde_json::{Value, json};
use vestibule_api::{ConnectorSettings, Credential, CredentialKind, Problem};

use crate::support::{AUTHORIZATION, Endpoint, partners, request, some_of_everything};

const PATH: &str = "/connectors/partners/before-create";

fn body_of(problem: Problem) -> Value {
    json!({
        "version": "1.0.0",
        "status": problem.status().as_u16(),
        "code": problem.code(),
        "userMessage": problem.message(),
    })
}

/// A request that is right but for what `spoil` does to it.
fn spoilt(spoil: impl FnOnce(&mut Request<Body>)) -> anyhow::Result<Request<Body>> {
    let mut request = request(PATH).body(Body::from(r#"{"email":"ada@example.com"}"#))?;
    spoil(&mut request);
    Ok(request)
}

fn with_body(body: impl Into<Body>) -> anyhow::Result<Request<Body>> {
    spoilt(|it| *it.body_mut() = body.into())
}

fn to(path: &str) -> anyhow::Result<Request<Body>> {
    let uri = path.parse()?;
    spoilt(|it| *it.uri_mut() = uri)
}

fn with_header(name: header::HeaderName, value: Option<&str>) -> anyhow::Result<Request<Body>> {
    let value = value.map(header::HeaderValue::from_str).transpose()?;
    spoilt(|it| {
        it.headers_mut().remove(&name);
        it.headers_mut().extend(value.map(|value| (name, value)));
    })
}

#[tokio::test]
async fn every_wrong_input_has_its_status_and_body() -> anyhow::Result<()> {
    let content_type = |value| with_header(header::CONTENT_TYPE, value);
    let authorization = |value| with_header(header::AUTHORIZATION, value);
    let method = |method| spoilt(|it| *it.method_mut() = method);
    let chunked = |bytes: usize| {
        let chunks =
            (0..bytes / 1024).map(|_| Ok::<_, Infallible>(Bytes::from_static(&[b' '; 1024])));
        Body::from_stream(stream::iter(chunks))
    };
    let cases = [
        ("no credentials", authorization(None)?, Problem::Unauthorized),
        (
            "wrong password",
            authorization(Some("Basic ZW50cmE6dHJ5LXlvdQ=="))?,
            Problem::Unauthorized,
        ),
        ("not basic", authorization(Some("Bearer abc"))?, Problem::Unauthorized),
        ("not base64", authorization(Some("Basic ****"))?, Problem::Unauthorized),
        ("unknown connector", to("/connectors/nobody/before-create")?, Problem::NotFound),
        ("unknown connector, no step", to("/connectors/nobody")?, Problem::NotFound),
        ("unknown step", to("/connectors/partners/after-create")?, Problem::NotFound),
        ("step in another case", to("/connectors/partners/Before-Create")?, Problem::NotFound),
        ("slash at the end", to("/connectors/partners/")?, Problem::NotFound),
        ("one segment more", to("/connectors/partners/before-create/x")?, Problem::NotFound),
        ("not text in the path", to("/connectors/%ff/before-create")?, Problem::NotFound),
        ("not ours", to("/")?, Problem::NotFound),
        ("GET", method(Method::GET)?, Problem::MethodNotAllowed),
        ("PUT", method(Method::PUT)?, Problem::MethodNotAllowed),
        ("OPTIONS", method(Method::OPTIONS)?, Problem::MethodNotAllowed),
        ("no content type", content_type(None)?, Problem::NotJsonContentType),
        ("text", content_type(Some("text/plain"))?, Problem::NotJsonContentType),
        (
            "a form",
            content_type(Some("application/x-www-form-urlencoded"))?,
            Problem::NotJsonContentType,
        ),
        ("json, almost", content_type(Some("application/jsonp"))?, Problem::NotJsonContentType),
        ("too large", with_body(vec![b' '; 64 * 1024 + 1])?, Problem::BodyTooLarge),
        ("too large, in chunks", with_body(chunked(65 * 1024))?, Problem::BodyTooLarge),
        ("breaks off", with_body(breaks_off())?, Problem::BodyUnreadable),
        ("empty", with_body("")?, Problem::NotJson),
        ("not JSON", with_body("email=ada@example.com")?, Problem::NotJson),
        ("half JSON", with_body(r#"{"email":"ada@exa"#)?, Problem::NotJson),
        ("more than JSON", with_body("{} {}")?, Problem::NotJson),
        ("not UTF-8", with_body(&b"{\"a\":\"\xff\"}"[..])?, Problem::NotJson),
        ("half a surrogate pair", with_body(r#"{"a":"\ud800"}"#)?, Problem::NotJson),
        ("nested too deeply", with_body(nested(200))?, Problem::NotJson),
        ("an array", with_body("[]")?, Problem::NotAnObject),
        ("null", with_body("null")?, Problem::NotAnObject),
        ("a text", with_body(r#""ada@example.com""#)?, Problem::NotAnObject),
        ("no step anywhere", to("/connectors/partners")?, Problem::MissingStep),
    ];
    let endpoint = Endpoint::new(partners()).await?;

    for (name, request, problem) in cases {
        let reply = endpoint.call(request).await?;

        assert_eq!(reply.status, problem.status(), "{name}");
        assert_eq!(reply.body, body_of(problem), "{name}");
        assert!(reply.body.get("action").is_none(), "{name}");
        assert_eq!(reply.headers[header::CONTENT_TYPE], "application/json", "{name}");
        assert_eq!(reply.headers[header::CACHE_CONTROL], "no-store", "{name}");
        let header = |name| reply.headers.get(name).and_then(|value| value.to_str().ok());
        let challenge = r#"Basic realm="vestibule", charset="UTF-8""#;
        let unauthorized = problem == Problem::Unauthorized;
        assert_eq!(header("www-authenticate"), unauthorized.then_some(challenge), "{name}");
        let wrong_method = problem == Problem::MethodNotAllowed;
        assert_eq!(header("allow"), wrong_method.then_some("POST"), "{name}");
    }

    assert!(endpoint.events().await?.is_empty());
    Ok(())
}

/// What is promised to whoever reads our answers with a program.
#[test]
fn statuses_and_codes_stay_what_they_are() {
    let table = Problem::ALL.map(|it| (it.status().as_u16(), it.code()));
    assert_eq!(
        table,
        [
            (401, "unauthorized"),
            (404, "not-found"),
            (405, "method-not-allowed"),
            (415, "not-json-content-type"),
            (413, "body-too-large"),
            (408, "body-too-slow"),
            (400, "body-unreadable"),
            (400, "not-json"),
            (400, "not-an-object"),
            (400, "not-text"),
            (400, "not-in-pairs"),
            (400, "missing-step"),
            (400, "unknown-step"),
            (400, "missing-event-type"),
            (422, "event-not-answered"),
            (400, "legacy-format"),
        ]
    );
}

#[tokio::test]
async fn what_is_only_unusual_is_taken() -> anyhow::Result<()> {
    let endpoint = Endpoint::new(partners()).await?;
    for value in ["application/json; charset=utf-8", "Application/JSON", "application/json ;x=1"] {
        let reply = endpoint.call(with_header(header::CONTENT_TYPE, Some(value))?).await?;
        assert_eq!(reply.status, StatusCode::OK, "{value}");
    }
    for body in [
        "{}".to_owned(),
        r#"{"email":"a@x.test","email":"b@x.test"}"#.to_owned(),
        r#"{"email":null,"identities":null,"surname":null,"ui_locales":null}"#.to_owned(),
        r#"{"email":7,"identities":"x","client_id":{},"ui_locales":[],"objectId":false}"#
            .to_owned(),
        r#"{"email":"","identities":[],"surname":""}"#.to_owned(),
        r#"{"identities":[{"issuer":"google.com"}]}"#.to_owned(),
        r#"{"identities":[7,null,[]]}"#.to_owned(),
        r#"{"n":123456789012345678901234567890,"m":-1e308,"o":18446744073709551615}"#.to_owned(),
        r#"{"a":"\u0000","\u0000":"a","":""}"#.to_owned(),
        nested(60),
    ] {
        let reply = endpoint.call(with_body(body.clone())?).await?;
        assert_eq!(reply.body["action"], "Continue", "{body}");
    }
    let padded = format!("{}{}", " ".repeat(64 * 1024 - 2), "{}");
    assert_eq!(endpoint.call(with_body(padded)?).await?.status, StatusCode::OK, "the limit itself");
    Ok(())
}

#[tokio::test]
async fn a_claim_of_an_unexpected_type_is_kept_as_it_is() -> anyhow::Result<()> {
    let endpoint = Endpoint::new(partners()).await?;
    let body = json!({
        "email": 7,
        "identities": [{ "signInType": "federated", "issuer": "google.com" }],
        "client_id": ["x"],
        "ui_locales": { "a": 1 },
        "objectId": null,
        "lastName": 5,
        "surName": "Lovelace",
        "city": ["London", "Paris"],
    });

    endpoint.post(PATH, &body).await?;

    let sign_up = endpoint.events().await?.remove(0).sign_up;
    let mut expected = body.clone();
    expected["surname"] = "Lovelace".into();
    expected.as_object_mut().map(|it| it.remove("surName"));
    assert_eq!(Value::Object(sign_up.claims), expected);
    assert_eq!(sign_up.email, None);
    assert!(sign_up.identities.is_empty());
    assert_eq!((sign_up.client, sign_up.locale, sign_up.object_id), (None, None, None));
    Ok(())
}

#[tokio::test]
async fn the_caller_is_known_before_anything_of_the_body_is_read() -> anyhow::Result<()> {
    let endpoint = Endpoint::new(partners()).await?;
    let never = || Body::from_stream(stream::pending::<Result<Bytes, Infallible>>());

    let mut stranger = with_header(header::AUTHORIZATION, None)?;
    *stranger.body_mut() = never();
    assert_eq!(endpoint.call(stranger).await?.status, StatusCode::UNAUTHORIZED);
    let metrics = endpoint.metrics()?;
    assert!(
        metrics.contains(r#"denied_total{connector="partners",cause="missing"} 1"#),
        "{metrics}"
    );
    Ok(())
}

#[tokio::test]
async fn every_configured_credential_is_valid_and_counted_by_its_name() -> anyhow::Result<()> {
    let credential = |name: &str, password: &str| Credential {
        name: name.to_owned(),
        kind: CredentialKind::Basic { user: "entra".to_owned(), password: password.into() },
    };
    let settings = ConnectorSettings {
        credentials: vec![credential("old", "try-me"), credential("new", "with:colons:")],
        ..partners()
    };
    let endpoint = Endpoint::new(settings).await?;
    for authorization in [AUTHORIZATION, "basic ZW50cmE6d2l0aDpjb2xvbnM6"] {
        let request = with_header(header::AUTHORIZATION, Some(authorization))?;
        assert_eq!(endpoint.call(request).await?.status, StatusCode::OK, "{authorization}");
    }

    let metrics = endpoint.metrics()?;

    for credential in ["old", "new"] {
        let line = format!(r#"uses_total{{connector="partners",credential="{credential}"}} 1"#);
        assert!(metrics.contains(&line), "no {line} in\n{metrics}");
    }
    Ok(())
}

#[tokio::test(start_paused = true)]
async fn a_body_that_trickles_in_is_not_waited_for() -> anyhow::Result<()> {
    let endpoint =
        Endpoint::over(crate::support::BadLog(crate::support::Misbehaviour::Hangs), partners());
    let drops = stream::unfold((), |()| async {
        tokio::time::sleep(Duration::from_millis(90)).await;
        Some((Ok::<_, Infallible>(Bytes::from_static(b" ")), ()))
    });
    let started = tokio::time::Instant::now();

    let reply = endpoint.call(with_body(Body::from_stream(drops))?).await?;

    assert_eq!(reply.status, StatusCode::REQUEST_TIMEOUT);
    assert_eq!(reply.body, body_of(Problem::BodyTooSlow));
    assert_eq!(reply.headers[header::CONNECTION], "close");
    assert!(started.elapsed() <= ConnectorSettings::DEADLINE, "{:?}", started.elapsed());
    Ok(())
}

/// Any object at all gets one of the legal answers.
#[test]
fn whatever_object_comes_there_is_a_legal_answer() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let endpoint = runtime.block_on(Endpoint::new(crate::support::some_of_everything())).unwrap();
    let mut runner = TestRunner::new(ProptestConfig::with_cases(300));
    let paths = prop::sample::select(vec![
        "/connectors/partners",
        "/connectors/partners/after-federation",
        "/connectors/partners/before-create",
        "/connectors/partners/before-token",
    ]);
    runner
        .run(&(paths, any_object()), |(path, body)| {
            let reply = runtime.block_on(endpoint.post(path, &body)).unwrap();
            let action = reply.body["action"].as_str();
            let code = reply.body["code"].as_str();
            let legal = match reply.status.as_u16() {
                200 => matches!(action, Some("Continue" | "ShowBlockPage")),
                400 if action == Some("ValidationError") => {
                    reply.body["status"] == 400 && path.ends_with("before-create")
                        || path == "/connectors/partners"
                }
                400 => matches!(code, Some("missing-step" | "unknown-step")),
                _ => false,
            };
            prop_assert!(legal, "{path} {body}: {} {}", reply.status, reply.body);
            prop_assert_eq!(&reply.body["version"], "1.0.0");
            Ok(())
        })
        .unwrap();
}

fn any_object() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        ".{0,12}".prop_map(Value::from),
        prop::sample::select(vec![
            "PostFederationSignup",
            "PostAttributeCollection",
            "PreTokenIssuance",
            "ada@spam.test",
            "@",
        ])
        .prop_map(Value::from),
    ];
    let value = leaf.prop_recursive(4, 32, 6, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
            prop::collection::btree_map(".{0,8}", inner, 0..6)
                .prop_map(|it| Value::Object(it.into_iter().collect())),
        ]
    });
    let name = prop_oneof![
        prop::sample::select(vec![
            "step",
            "email",
            "identities",
            "client_id",
            "clientId",
            "ui_locales",
            "objectId",
            "surname",
            "lastName",
            "surName",
            "city",
            "age",
            "version",
            "action",
            "status",
        ])
        .prop_map(str::to_owned),
        ".{0,10}",
    ];
    prop::collection::btree_map(name, value, 0..12)
        .prop_map(|it| Value::Object(it.into_iter().collect()))
}

/// In the log the claims lie deeper than in the body, and must be read back by everybody.
#[tokio::test]
async fn whatever_depth_is_taken_can_be_read_back() -> anyhow::Result<()> {
    let endpoint = Endpoint::new(some_of_everything()).await?;
    let mut taken = 0;
    for depth in 1..=130 {
        let body = format!(r#"{{"city":{}{}}}"#, "[".repeat(depth), "]".repeat(depth));
        let first = endpoint.call(with_body(body.clone())?).await?;
        let repeated = endpoint.call(with_body(body)?).await?;

        taken += usize::from(first.body.get("action").is_some());
        assert_eq!((first.status, first.body), (repeated.status, repeated.body), "{depth}");
    }
    assert_eq!(endpoint.events().await?.len(), taken);
    assert!((50..130).contains(&taken), "{taken}");
    Ok(())
}

fn nested(depth: usize) -> String {
    format!(r#"{{"a":{}{}}}"#, "[".repeat(depth), "]".repeat(depth))
}

fn breaks_off() -> Body {
    Body::from_stream(stream::iter([
        Ok(Bytes::from_static(b"{")),
        Err(std::io::Error::from(std::io::ErrorKind::ConnectionReset)),
    ]))
}
