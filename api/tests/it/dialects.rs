//! What holds for all dialects: one sign-up is decided alike whichever it comes in, and no bytes at
//! all make a reader panic.

use axum::{
    body::Body,
    http::{HeaderMap, HeaderValue, Method, StatusCode, header},
};
use proptest::{
    prelude::*,
    strategy::ValueTree as _,
    test_runner::{Config, TestRunner},
};
use serde_json::{Map, Value, json};
use time::OffsetDateTime;
use uuid::Uuid;
use vestibule_api::{
    BodyKind, ConnectorSettings, ContractSettings, Dialect, Problem, Received, Reply,
};
use vestibule_events::{Decision, Outcome, Protocol, PseudonymKey, SignUp, SignUpEvent, Step};

use crate::{
    payloads::{files_ending_in, folder},
    support::{Endpoint, partners, request, some_of_everything},
};

const PROTOCOLS: [Protocol; 3] =
    [Protocol::ApiConnector, Protocol::CustomPolicy, Protocol::CustomExtension];

/// The connector of most tests, called in another dialect.
pub(crate) fn partners_of(protocol: Protocol) -> ConnectorSettings {
    ConnectorSettings { protocol, ..partners() }
}

pub(crate) fn any_value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<f64>().prop_filter_map("JSON has no infinities", |it| {
            serde_json::Number::from_f64(it).map(Value::from)
        }),
        ".{0,12}".prop_map(Value::from),
        prop::sample::select(vec!["5", "true", "a,b", "ada@spam.test", ""]).prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 16, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::btree_map(".{0,6}", inner, 0..4)
                .prop_map(|it| Value::Object(it.into_iter().collect())),
        ]
    })
}

pub(crate) fn any_outcome(
    claims: impl Strategy<Value = Map<String, Value>> + 'static,
) -> impl Strategy<Value = Outcome> {
    let field = prop::option::of(prop::sample::select(vec!["city", "EmailAddress", "x", ""]));
    prop_oneof![
        3 => claims.prop_map(|claims| Outcome::Continue { claims }),
        1 => (".{0,20}", field)
            .prop_map(|(message, field)| Outcome::Reject { message, field: field.map(str::to_owned) }),
        1 => ".{0,20}".prop_map(|message| Outcome::Block { message }),
        1 => ".{0,20}".prop_map(|message| Outcome::Pending { message, claims: Map::new() }),
    ]
}

/// A sign-up as all dialects can say it.
#[derive(Clone, Debug)]
struct Person {
    step: Step,
    email: String,
    identities: Option<Value>,
    claims: Map<String, Value>,
    client: Option<String>,
    locale: Option<String>,
    object_id: Option<String>,
    /// Only texts and no identities, so that a form or a URL can say it too.
    plain: bool,
}

fn any_person() -> impl Strategy<Value = Person> {
    let text = prop_oneof![
        prop::sample::select(vec!["a", "London", "x/y", "a b+c&d=e", "%41", "Ö", ""])
            .prop_map(str::to_owned),
        ".{0,10}",
    ];
    let value = prop_oneof![
        3 => text.clone().prop_map(Value::from),
        1 => any::<i64>().prop_map(Value::from),
        1 => (0_i64..80).prop_map(Value::from),
        1 => any::<bool>().prop_map(Value::from),
    ];
    let name = prop_oneof![
        4 => prop::sample::select(vec![
            "city", "age", "displayName", "surname", "extension_00aa_Year", "postalCode", "b",
        ])
        .prop_map(str::to_owned),
        1 => "[a-c]{4,8}",
    ];
    let claims = prop::collection::btree_map(name.clone(), value, 0..12);
    let texts = prop::collection::btree_map(name, text.prop_map(Value::from), 0..12);
    let identities = prop::option::of(prop::sample::select(vec![
        json!([{ "signInType": "federated", "issuer": "x", "issuerAssignedId": "1" }]),
        json!([{ "signInType": "federated", "issuer": "google.com", "issuerAssignedId": "2" }]),
    ]));
    let locale = prop::sample::select(vec!["en-US", "fr"]);
    let who = prop_oneof![
        (claims, identities).prop_map(|(claims, identities)| (claims, identities, false)),
        texts.prop_map(|claims| (claims, None, true)),
    ];
    (
        prop::sample::select(Step::ALL.to_vec()),
        prop::sample::select(vec!["ada@x.test", "eve@spam.test", "Ö@x.test"]),
        who,
        prop::option::of(Just("app".to_owned())),
        prop::option::of(locale.prop_map(str::to_owned)),
    )
        .prop_map(|(step, email, (claims, identities, plain), client, locale)| Person {
            step,
            email: email.to_owned(),
            identities,
            claims: claims.into_iter().collect(),
            client,
            locale,
            object_id: (step == Step::BeforeToken).then(|| "o-1".to_owned()),
            plain,
        })
}

impl Person {
    /// As an API connector and as a policy say it.
    fn flat(&self) -> Map<String, Value> {
        let mut flat = self.claims.clone();
        flat.insert("email".to_owned(), self.email.clone().into());
        let rest = [
            ("identities", self.identities.clone()),
            ("client_id", self.client.clone().map(Value::from)),
            ("ui_locales", self.locale.clone().map(Value::from)),
            ("objectId", self.object_id.clone().map(Value::from)),
        ];
        flat.extend(rest.into_iter().filter_map(|(name, it)| Some((name.to_owned(), it?))));
        flat
    }

    fn enveloped(&self) -> Value {
        let mut context = json!({
            "client": { "locale": self.locale },
            "clientServicePrincipal": { "appId": self.client },
        });
        let mut data = Map::new();
        let event = match self.step {
            Step::AfterFederation => "attributeCollectionStart",
            Step::BeforeCreate => "attributeCollectionSubmit",
            Step::BeforeToken => "tokenIssuanceStart",
        };
        if self.step == Step::BeforeToken {
            let mut user = self.claims.clone();
            user.insert("id".to_owned(), self.object_id.clone().into());
            user.insert("mail".to_owned(), self.email.clone().into());
            user.extend(self.identities.clone().map(|it| ("identities".to_owned(), it)));
            context["user"] = user.into();
        } else {
            let typed = |(name, value): (&String, &Value)| {
                let kind = match value {
                    Value::Bool(_) => "boolean",
                    Value::Number(_) => "int64",
                    _ => "string",
                };
                let kind = format!("microsoft.graph.{kind}DirectoryAttributeValue");
                (name.clone(), json!({ "@odata.type": kind, "value": value }))
            };
            let mut attributes: Map<_, _> = self.claims.iter().map(typed).collect();
            let email = typed((&"EmailAddress".to_owned(), &self.email.clone().into())).1;
            attributes.insert("EmailAddress".to_owned(), email);
            let mut info = json!({ "attributes": attributes });
            if let Some(identities) = &self.identities {
                info["identities"] = identities.clone();
            }
            data.insert("userSignUpInfo".to_owned(), info);
        }
        data.insert("authenticationContext".to_owned(), context);
        json!({ "type": format!("microsoft.graph.authenticationEvent.{event}"), "data": data })
    }

    /// As a query or a form.
    fn pairs(&self) -> String {
        let pairs: Vec<_> = self
            .flat()
            .into_iter()
            .map(|(name, value)| {
                format!("{}={}", escaped(&name), escaped(value.as_str().unwrap_or_default()))
            })
            .collect();
        pairs.join("&")
    }

    /// As segments of a path.
    fn segments(&self) -> String {
        let segments: Vec<_> = self
            .flat()
            .into_iter()
            .map(|(name, value)| {
                format!("{}/{}", escaped(&name), escaped(value.as_str().unwrap_or_default()))
            })
            .collect();
        segments.join("/")
    }
}

/// Every byte that is not a letter or a digit.
fn escaped(text: &str) -> String {
    text.bytes()
        .map(|byte| match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' => char::from(byte).to_string(),
            byte => format!("%{byte:02X}"),
        })
        .collect()
}

fn read(protocol: Protocol, received: &Received<'_>) -> Result<SignUp, Problem> {
    partners_of(protocol).dialect().read(received).map(|call| call.sign_up)
}

/// What is the same whatever the dialect.
fn without_protocol(sign_up: SignUp) -> SignUp {
    SignUp { protocol: Protocol::ApiConnector, ..sign_up }
}

#[test]
fn one_sign_up_is_the_same_in_every_dialect() {
    let connector = "partners".parse().unwrap();
    TestRunner::new(Config::with_cases(500))
        .run(&any_person(), |person| {
            let flat = Value::Object(person.flat()).to_string();
            let enveloped = person.enveloped().to_string();
            let json = Received::json(&connector, Some(person.step), flat.as_bytes());
            let envelope = Received::json(&connector, Some(person.step), enveloped.as_bytes());
            let first = without_protocol(read(Protocol::ApiConnector, &json).unwrap());
            prop_assert!(first.email.is_some());

            let mut others = vec![
                ("policy", read(Protocol::CustomPolicy, &json)),
                ("extension", read(Protocol::CustomExtension, &envelope)),
            ];
            let (pairs, segments) = (person.pairs(), person.segments());
            if person.plain {
                let get = Received { kind: BodyKind::Nothing, body: b"", ..json };
                let form = Received { kind: BodyKind::Form, body: pairs.as_bytes(), ..json };
                let query = Received { query: Some(&pairs), ..get };
                let path = Received { path: Some(&segments), ..get };
                others.extend([
                    ("form", read(Protocol::CustomPolicy, &form)),
                    ("query", read(Protocol::CustomPolicy, &query)),
                    ("path", read(Protocol::CustomPolicy, &path)),
                ]);
            }
            for (how, other) in others {
                let other = without_protocol(other.unwrap());
                prop_assert!(other == first, "{how}: {:?} {:?}", other.claims, first.claims);
            }
            Ok(())
        })
        .unwrap();
}

#[tokio::test]
async fn one_sign_up_is_decided_alike_in_every_dialect() -> anyhow::Result<()> {
    let settings = |protocol| ConnectorSettings { protocol, ..some_of_everything() };
    let mut runner = TestRunner::deterministic();
    let mut people = Vec::new();
    for number in 0..100 {
        let tree = any_person().new_tree(&mut runner);
        let mut person = tree.map_err(|why| anyhow::anyhow!("{why}"))?.current();
        // Everybody is somebody else: what is repeated makes no event.
        person.email = format!("{number}{}", person.email);
        people.push(person);
    }
    // How long each rule took is not part of what was decided.
    let untimed = |decision: Decision| {
        let reasons = decision.reasons.into_iter().map(|it| (it.rule, it.mode, it.effect));
        (decision.outcome, reasons.collect::<Vec<_>>())
    };
    let mut decided: Vec<Vec<_>> = Vec::new();
    for protocol in PROTOCOLS {
        let endpoint = Endpoint::new(settings(protocol)).await?;
        for person in &people {
            let path = format!("/connectors/partners/{}", person.step);
            match protocol {
                Protocol::ApiConnector => {
                    endpoint.post(&path, &Value::Object(person.flat())).await?;
                }
                Protocol::CustomPolicy if person.plain => {
                    let uri = format!("{path}?{}", person.pairs());
                    let get = request(&uri).method(Method::GET).body(Body::empty())?;
                    endpoint.call(get).await?;
                }
                Protocol::CustomPolicy => {
                    endpoint.post(&path, &Value::Object(person.flat())).await?;
                }
                Protocol::CustomExtension => {
                    endpoint.post("/connectors/partners", &person.enveloped()).await?;
                }
            }
        }
        let events = endpoint.events().await?;
        decided.push(events.into_iter().map(|event| untimed(event.decision)).collect());
    }

    let expected = people.iter().filter(|person| person.step != Step::BeforeToken).count();
    assert_eq!(decided[0].len(), expected);
    assert!(decided[0] == decided[1], "a policy is decided otherwise");
    assert!(decided[0] == decided[2], "an extension is decided otherwise");
    for kind in ["continue", "reject", "block"] {
        assert!(
            decided[0].iter().any(|(outcome, _)| outcome.as_str() == kind),
            "nobody gets {kind}"
        );
    }
    Ok(())
}

/// Whatever was read becomes an event that can be read back, and has an answer whatever is decided.
fn follow(
    protocol: Protocol,
    received: &Received<'_>,
    outcome: &Outcome,
) -> Result<(), TestCaseError> {
    let contract = ContractSettings {
        claim_headers: vec!["city".to_owned(), "not a header".to_owned()],
        ..ContractSettings::default()
    };
    let dialect = Dialect { protocol, version: "1.0.0", settings: &contract };
    let call = match dialect.read(received) {
        Ok(call) => call,
        Err(problem) => {
            let written = dialect.write_problem(problem);
            prop_assert!(written.status.is_client_error());
            prop_assert!(serde_json::from_slice::<Value>(&written.body).is_ok());
            return Ok(());
        }
    };
    let _ = format!("{call:?} {received:?}");

    let written = dialect.write(&call.shape, &Reply::new(outcome, Some(Uuid::nil())));
    prop_assert!(serde_json::from_slice::<Value>(&written.body).is_ok());
    let legal = match protocol {
        Protocol::ApiConnector => matches!(written.status.as_u16(), 200 | 400),
        Protocol::CustomPolicy => matches!(written.status.as_u16(), 200 | 409),
        Protocol::CustomExtension => written.status == StatusCode::OK,
    };
    prop_assert!(legal, "{}", written.status);

    let sign_up = call.sign_up;
    let key = PseudonymKey::new(vec![7; 32]);
    let (person, now) = (key.person(&sign_up), OffsetDateTime::now_utc());
    let fingerprint = key.fingerprint(&sign_up, &person);
    // The claims once more, as a decision holds those that rules copy.
    let decision = Decision::new(Outcome::Continue { claims: sign_up.claims.clone() });
    let event = SignUpEvent::decided(Uuid::now_v7(), now, person, fingerprint, sign_up, decision);
    if let Some(event) = event {
        let text = serde_json::to_string(&event).expect("an event serialises");
        let again: SignUpEvent = serde_json::from_str(&text).expect("an event can be read back");
        prop_assert!(
            again.sign_up == event.sign_up,
            "the event says something else when read back"
        );
    }
    Ok(())
}

fn any_claims() -> impl Strategy<Value = Map<String, Value>> {
    prop::collection::btree_map(".{0,8}", any_value(), 0..5).prop_map(|it| it.into_iter().collect())
}

fn any_protocol() -> impl Strategy<Value = Protocol> {
    prop::sample::select(PROTOCOLS.to_vec())
}

fn any_step() -> impl Strategy<Value = Option<Step>> {
    prop::option::of(prop::sample::select(Step::ALL.to_vec()))
}

/// However many cases somebody wants: `PROPTEST_CASES` says so.
fn cases(default: u32) -> Config {
    let asked = std::env::var("PROPTEST_CASES").ok().and_then(|it| it.parse().ok());
    Config::with_cases(asked.unwrap_or(default))
}

#[test]
fn no_bytes_make_a_reader_panic() {
    let connector = "partners".parse().unwrap();
    let bytes = prop_oneof![
        prop::collection::vec(any::<u8>(), 0..200),
        "[a-z0-9=&%+/\\[\\]{}\":, ]{0,80}".prop_map(String::into_bytes),
    ];
    let kind = prop::sample::select(vec![BodyKind::Json, BodyKind::Form, BodyKind::Nothing]);
    let url = "[a-zA-Z0-9=&%+/._~é-]{0,60}";
    let header = prop::collection::vec(0x20_u8..=0xff, 0..20);
    let strategy = (
        (any_protocol(), any_step(), kind, bytes),
        (prop::option::of(url), prop::option::of(url), header, any_outcome(any_claims())),
    );
    TestRunner::new(cases(3000))
        .run(&strategy, |((protocol, url_step, kind, body), (path, query, header, outcome))| {
            let mut headers = HeaderMap::new();
            if let Ok(value) = HeaderValue::from_bytes(&header) {
                headers.insert(header::HeaderName::from_static("city"), value);
            }
            let received = Received {
                path: path.as_deref(),
                query: query.as_deref(),
                headers: Some(&headers),
                kind,
                ..Received::json(&connector, url_step, &body)
            };
            follow(protocol, &received, &outcome)
        })
        .unwrap();
}

#[test]
fn no_json_makes_a_reader_panic() {
    let connector = "partners".parse().unwrap();
    let name = prop::sample::select(vec![
        "type",
        "data",
        "@odata.type",
        "authenticationContext",
        "userSignUpInfo",
        "attributes",
        "identities",
        "user",
        "value",
        "email",
        "EmailAddress",
        "surname",
        "lastName",
        "id",
        "mail",
        "client",
        "step",
        "ip",
        "apiSchemaVersion",
    ]);
    let leaf = prop_oneof![
        2 => any_value(),
        1 => prop::sample::select(vec![
            "microsoft.graph.authenticationEvent.attributeCollectionStart",
            "attributeCollectionSubmit",
            "graph.tokenIssuanceStart",
            "graph.int64DirectoryAttributeValue",
            "before-create",
            "PreTokenIssuance",
        ])
        .prop_map(Value::from),
    ];
    let tree = leaf.prop_recursive(6, 60, 8, move |inner| {
        prop_oneof![
            1 => prop::collection::vec(inner.clone(), 0..5).prop_map(Value::from),
            4 => prop::collection::btree_map(name.clone(), inner, 0..8).prop_map(|it| {
                Value::Object(it.into_iter().map(|(name, it)| (name.to_owned(), it)).collect())
            }),
        ]
    });
    let strategy = (any_protocol(), any_step(), tree, any_outcome(any_claims()));
    TestRunner::new(cases(2000))
        .run(&strategy, |(protocol, url_step, body, outcome)| {
            let body = body.to_string();
            follow(protocol, &Received::json(&connector, url_step, body.as_bytes()), &outcome)
        })
        .unwrap();
}

/// One of the published calls with something wrong in it: bytes changed, or a part of it replaced.
#[test]
fn no_published_call_makes_a_reader_panic_when_it_is_mutilated() {
    let connector = "partners".parse().unwrap();
    let files: Vec<Vec<u8>> = files_ending_in("-request.json")
        .unwrap()
        .into_iter()
        .map(|file| std::fs::read(folder().join(file)).unwrap())
        .collect();
    let wounds = prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0..4_u8), 0..4);
    let graft = prop::option::of((any::<prop::sample::Index>(), any_value()));
    let strategy = (
        (any_protocol(), any_step(), prop::sample::select(files)),
        (wounds, graft, any_outcome(any_claims())),
    );
    TestRunner::new(cases(3000))
        .run(&strategy, |((protocol, url_step, mut body), (wounds, graft, outcome))| {
            if let (Some((place, value)), Ok(mut tree)) = (graft, serde_json::from_slice(&body)) {
                let count = count_values(&tree);
                replace(&mut tree, &mut place.index(count), &value);
                body = tree.to_string().into_bytes();
            }
            for (place, byte, wound) in wounds {
                let place = place.index(body.len().max(1));
                match wound {
                    _ if body.is_empty() => {}
                    0 => body[place] = byte,
                    1 => body.insert(place, byte),
                    2 => body.truncate(place),
                    _ => drop(body.remove(place)),
                }
            }
            follow(protocol, &Received::json(&connector, url_step, &body), &outcome)
        })
        .unwrap();
}

fn count_values(value: &Value) -> usize {
    1 + match value {
        Value::Array(values) => values.iter().map(count_values).sum(),
        Value::Object(members) => members.values().map(count_values).sum(),
        _ => 0,
    }
}

/// Puts `graft` in the place of one value; `left` counts down to it.
fn replace(value: &mut Value, left: &mut usize, graft: &Value) {
    if *left == 0 {
        value.clone_from(graft);
        *left = usize::MAX;
        return;
    }
    *left -= 1;
    match value {
        Value::Array(values) => values.iter_mut().for_each(|it| replace(it, left, graft)),
        Value::Object(members) => members.values_mut().for_each(|it| replace(it, left, graft)),
        _ => {}
    }
}

/// A call that is right but for one thing, in the words of each dialect.
#[tokio::test]
async fn every_wrong_input_has_its_status_in_every_dialect() -> anyhow::Result<()> {
    const STEP: &str = "/connectors/partners/before-create";
    const COMBINED: &str = "/connectors/partners";
    const JSON: &str = "application/json";
    const FORM: &str = "application/x-www-form-urlencoded";
    use Protocol::{ApiConnector as Api, CustomExtension as Extension, CustomPolicy as Policy};

    type Case<'a> = (&'a [Protocol], Method, &'a str, &'a str, Vec<u8>, Problem);
    let post = || Method::POST;
    let get = || Method::GET;
    let nested = format!(r#"{{"a":{}{}}}"#, "[".repeat(200), "]".repeat(200)).into_bytes();
    let long = format!("{STEP}?city={}", "x".repeat(65_000));
    let cases: Vec<Case<'_>> = vec![
        (&PROTOCOLS, post(), "/connectors/partners/after-create", JSON, vec![], Problem::NotFound),
        (
            &PROTOCOLS,
            post(),
            "/connectors/partners/before-create/a/b",
            JSON,
            vec![],
            Problem::NotFound,
        ),
        (
            &[Api, Extension],
            get(),
            "/connectors/partners/before-create/a/b",
            JSON,
            vec![],
            Problem::NotFound,
        ),
        (&[Api, Extension], get(), STEP, JSON, vec![], Problem::MethodNotAllowed),
        (&PROTOCOLS, Method::PUT, STEP, JSON, b"{}".to_vec(), Problem::MethodNotAllowed),
        (&[Api, Extension], post(), STEP, FORM, b"a=b".to_vec(), Problem::NotJsonContentType),
        (&PROTOCOLS, post(), STEP, "text/plain", b"{}".to_vec(), Problem::NotJsonContentType),
        (&PROTOCOLS, post(), STEP, "", b"{}".to_vec(), Problem::NotJsonContentType),
        (&PROTOCOLS, post(), STEP, JSON, vec![b' '; 64 * 1024 + 1], Problem::BodyTooLarge),
        (&[Policy], post(), STEP, FORM, vec![b'a'; 64 * 1024 + 1], Problem::BodyTooLarge),
        (&PROTOCOLS, post(), STEP, JSON, vec![], Problem::NotJson),
        (&PROTOCOLS, post(), STEP, JSON, b"a=b".to_vec(), Problem::NotJson),
        (&PROTOCOLS, post(), STEP, JSON, b"\"\xff\"".to_vec(), Problem::NotJson),
        (&PROTOCOLS, post(), STEP, JSON, nested, Problem::NotJson),
        (&PROTOCOLS, post(), STEP, JSON, b"[]".to_vec(), Problem::NotAnObject),
        (&PROTOCOLS, post(), STEP, JSON, b"null".to_vec(), Problem::NotAnObject),
        (&[Policy], post(), STEP, FORM, b"city=%ff".to_vec(), Problem::NotText),
        (&[Policy], post(), STEP, FORM, b"city=\xff".to_vec(), Problem::NotText),
        (
            &[Policy],
            get(),
            "/connectors/partners/before-create?a=%c3",
            "",
            vec![],
            Problem::NotText,
        ),
        (
            &[Policy],
            get(),
            "/connectors/partners/before-create/city/%ff",
            "",
            vec![],
            Problem::NotText,
        ),
        (
            &[Policy],
            get(),
            "/connectors/partners/before-create/city",
            "",
            vec![],
            Problem::NotInPairs,
        ),
        (
            &[Policy],
            get(),
            "/connectors/partners/before-create/a/b/",
            "",
            vec![],
            Problem::NotInPairs,
        ),
        (&[Api, Policy], post(), COMBINED, JSON, b"{}".to_vec(), Problem::MissingStep),
        (&[Policy], get(), COMBINED, "", vec![], Problem::MissingStep),
        (&[Api, Policy], post(), COMBINED, JSON, br#"{"step":"x"}"#.to_vec(), Problem::UnknownStep),
        (&[Extension], post(), COMBINED, JSON, b"{}".to_vec(), Problem::MissingEventType),
        (&[Extension], post(), STEP, JSON, br#"{"type":"x"}"#.to_vec(), Problem::EventNotAnswered),
    ];
    for protocol in PROTOCOLS {
        let settings = ConnectorSettings { body_bytes_max: 64 * 1024, ..partners_of(protocol) };
        let endpoint = Endpoint::new(settings).await?;
        let mine = cases.iter().filter(|case| case.0.contains(&protocol));
        for (_, method, path, content_type, body, problem) in mine {
            let mut call = request(path).method(method.clone()).body(body.clone().into())?;
            call.headers_mut().remove(header::CONTENT_TYPE);
            if !content_type.is_empty() {
                call.headers_mut().insert(header::CONTENT_TYPE, content_type.parse()?);
            }
            let name = format!("{protocol:?} {method} {path} {problem:?}");

            let reply = endpoint.call(call).await?;

            assert_eq!(reply.status, problem.status(), "{name}: {}", reply.body);
            // Where nothing of ours is called there is no dialect to say so in.
            let nested = protocol == Extension && !path.contains("after-create");
            let code = if nested { &reply.body["error"]["code"] } else { &reply.body["code"] };
            assert_eq!(code, problem.code(), "{name}");
            assert!(reply.body.get("action").is_none() && reply.body.get("data").is_none());
            assert_eq!(reply.headers[header::CONTENT_TYPE], "application/json", "{name}");
            assert_eq!(reply.headers[header::CACHE_CONTROL], "no-store", "{name}");
            let methods = if protocol == Policy { "GET, POST" } else { "POST" };
            let allow = (*problem == Problem::MethodNotAllowed).then_some(methods);
            let allowed = reply.headers.get(header::ALLOW).and_then(|it| it.to_str().ok());
            assert_eq!(allowed, allow, "{name}");
        }
        let strangers = request(STEP).header(header::AUTHORIZATION, "Basic eDp5");
        let reply = endpoint.call(strangers.body(Body::empty())?).await?;
        assert_eq!(reply.status, StatusCode::UNAUTHORIZED);
        assert!(endpoint.events().await?.is_empty());
    }

    // What stands in the URL counts as a body does.
    let small = ConnectorSettings { body_bytes_max: 1000, ..partners_of(Policy) };
    let endpoint = Endpoint::new(small).await?;
    for (path, status) in [(long.as_str(), StatusCode::PAYLOAD_TOO_LARGE), (STEP, StatusCode::OK)] {
        let reply = endpoint.call(request(path).method(Method::GET).body(Body::empty())?).await?;
        assert_eq!(reply.status, status);
    }
    Ok(())
}

/// Whatever stands in a URL gets an answer or a problem, and no error of ours.
#[test]
fn no_url_makes_the_endpoint_fail() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let settings = ConnectorSettings { protocol: Protocol::CustomPolicy, ..some_of_everything() };
    let endpoint = runtime.block_on(Endpoint::new(settings)).unwrap();
    let text = prop_oneof![
        "[a-z0-9=&%+/._~?;:@!$'()*,-]{0,40}",
        "[a-d]{1,2}(=|/)(%[0-9a-f]{2}|[a-z&/]){0,12}",
    ];
    let start = prop::sample::select(vec![
        "/connectors/partners/before-create/",
        "/connectors/partners/before-create?",
        "/connectors/partners/after-federation/city/x?",
        "/connectors/partners?step=before-create&",
        "/connectors/",
        "/",
    ]);
    TestRunner::new(cases(300))
        .run(&(start, text), |(start, text)| {
            let uri = format!("{start}{text}");
            let Ok(call) = request(&uri).method(Method::GET).body(Body::empty()) else {
                return Ok(());
            };
            let reply = runtime.block_on(endpoint.call(call)).unwrap();
            let status = reply.status.as_u16();
            prop_assert!(matches!(status, 200 | 400 | 404 | 409), "{uri}: {status}");
            prop_assert_eq!(&reply.headers[header::CONTENT_TYPE], "application/json");
            Ok(())
        })
        .unwrap();
}
