//! External ID's custom extensions: published calls and answers, the events we refuse, and the
//! table of error codes in the manual.

use std::{collections::BTreeSet, fs, path::Path};

use axum::http::{HeaderMap, StatusCode, header};
use proptest::{
    prelude::*,
    test_runner::{Config, TestRunner},
};
use serde_json::{Map, Value, json};
use vestibule_api::{
    Call, ConnectorSettings, ContractSettings, ExtensionAnswer, OnError, Received, Reply,
    RuleOutcome, RuleSettings,
};
use vestibule_events::{Mode, Outcome, Protocol, Step};

use crate::{
    dialects::{any_outcome, any_value, partners_of},
    entra::{Asked, Event, Type, judge, judge_reply},
    payloads::{files_ending_in, read},
    support::{BadLog, Endpoint, Misbehaviour, Reply as HttpReply, partners_with},
};

/// A published call of an event that we answer, and what it says.
struct Example {
    file: &'static str,
    event: Event,
    email: Option<&'static str>,
    client: Option<&'static str>,
    object_id: Option<&'static str>,
    correlation_id: Option<&'static str>,
    locale: Option<&'static str>,
    ip: Option<&'static str>,
    tenant: &'static str,
    extension: &'static str,
    claims: &'static [(&'static str, &'static str)],
}

const LARISSA: &str = "larissa.price@contoso.onmicrosoft.com";
const APP: &str = "<Your Test Application App Id>";
const TENANT: &str = "aaaabbbb-0000-cccc-1111-dddd2222eeee";
/// Names and values as JSON.
const COLLECTED: &[(&str, &str)] = &[
    ("givenName", r#""Larissa Price""#),
    ("companyName", r#""Contoso University""#),
    ("extension_<appid>_universityGroups", r#""Alumni,Faculty""#),
    ("extension_<appid>_graduationYear", "2010"),
    ("extension_<appid>_onMailingList", "false"),
];

const EXAMPLES: [Example; 4] = [
    Example {
        file: "extid-attributecollectionstart-request.json",
        event: Event::Start,
        email: Some(LARISSA),
        client: Some(APP),
        object_id: None,
        correlation_id: Some("<GUID>"),
        locale: Some("en-us"),
        ip: Some("30.51.176.110"),
        tenant: TENANT,
        extension: "11112222-bbbb-3333-cccc-4444dddd5555",
        claims: COLLECTED,
    },
    Example {
        file: "extid-attributecollectionsubmit-request.json",
        event: Event::Submit,
        email: Some(LARISSA),
        client: Some(APP),
        object_id: None,
        correlation_id: Some("<GUID>"),
        locale: Some("en-us"),
        ip: Some("30.51.176.110"),
        tenant: TENANT,
        extension: "11112222-bbbb-3333-cccc-4444dddd5555",
        claims: COLLECTED,
    },
    Example {
        file: "extid-preview202304-attributecollectionstart-request.json",
        event: Event::Start,
        email: None,
        client: None,
        object_id: None,
        correlation_id: None,
        locale: None,
        ip: None,
        tenant: "30000000-0000-0000-0000-000000000003",
        extension: "10000000-0000-0000-0000-000000000002",
        claims: &[
            ("givenName", r#""Larissa Price""#),
            ("companyName", r#""Contoso University""#),
            ("extension_<appid>_universityGroups", r#"["Alumni","Faculty"]"#),
            ("extension_<appid>_graduationYear", "2010"),
            ("extension_<appid>_onMailingList", "false"),
        ],
    },
    Example {
        file: "extid-tokenissuancestart-request.json",
        event: Event::Token,
        email: Some("casey@contoso.com"),
        client: Some("00001111-aaaa-2222-bbbb-3333cccc4444"),
        object_id: Some("00aa00aa-bb11-cc22-dd33-44ee44ee44ee"),
        correlation_id: Some("aaaa0000-bb11-2222-33cc-444444dddddd"),
        locale: Some("en-us"),
        ip: Some("127.0.0.1"),
        tenant: TENANT,
        extension: "22223333-cccc-4444-dddd-5555eeee6666",
        claims: &[
            ("companyName", r#""Casey Jensen""#),
            ("createdDateTime", r#""2023-08-16T00:00:00Z""#),
            ("displayName", r#""Casey Jensen""#),
            ("givenName", r#""Casey""#),
            ("onPremisesSamAccountName", r#""Casey Jensen""#),
            ("onPremisesSecurityIdentifier", r#""<Enter Security Identifier>""#),
            ("onPremisesUserPrincipalName", r#""Casey Jensen""#),
            ("preferredLanguage", r#""en-us""#),
            ("surname", r#""Jensen""#),
            ("userPrincipalName", r#""casey@contoso.com""#),
            ("userType", r#""Member""#),
        ],
    },
];

/// Published calls of events that are not ours to answer, each with what is secret in it.
const REFUSED: [(&str, &str); 3] = [
    ("extid-emailotpsend-request.json", "12345678"),
    ("extid-passwordsubmit-request.json", "{5-part-JWE}"),
    ("extid-verifiedidclaimvalidation-request.json", "1990-01-15"),
];

pub(crate) fn requests() -> impl Iterator<Item = &'static str> {
    EXAMPLES.iter().map(|it| it.file).chain(REFUSED.map(|(file, _)| file))
}

const PATH: &str = "/connectors/partners";

fn extension() -> ConnectorSettings {
    partners_of(Protocol::CustomExtension)
}

fn extension_with(rules: Vec<RuleSettings>) -> ConnectorSettings {
    ConnectorSettings { protocol: Protocol::CustomExtension, ..partners_with(rules) }
}

fn rule(outcome: RuleOutcome) -> RuleSettings {
    RuleSettings {
        name: "rule".to_owned(),
        steps: vec![],
        when: "true".to_owned(),
        outcome,
        on_error: OnError::Continue,
        mode: Mode::Enforce,
    }
}

fn set(claims: &[(&str, &str)]) -> RuleSettings {
    let claims = claims.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect();
    rule(RuleOutcome::Set { claims })
}

fn step_of(event: Event) -> Step {
    match event {
        Event::Start => Step::AfterFederation,
        Event::Submit => Step::BeforeCreate,
        Event::Token => Step::BeforeToken,
    }
}

/// What the platform remembers of a published call.
fn asked(event: Event, call: &Value) -> Asked {
    let attributes = call["data"]["userSignUpInfo"]["attributes"].as_object();
    let kind = |value: &Value| match value["value"] {
        Value::String(_) => Some(Type::Text),
        Value::Number(_) => Some(Type::Integer),
        Value::Bool(_) => Some(Type::Boolean),
        Value::Array(_) => Some(Type::Texts),
        _ => None,
    };
    let attributes = attributes.into_iter().flatten();
    Asked { event, attributes: attributes.map(|(name, it)| (name.clone(), kind(it))).collect() }
}

fn parsed(body: &Value) -> Call {
    let connector = "partners".parse().expect("a valid name");
    let body = body.to_string();
    let received = Received::json(&connector, None, body.as_bytes());
    extension().dialect().read(&received).expect("a call that we answer")
}

fn action(body: &Value) -> &Value {
    &body["data"]["actions"][0]
}

#[tokio::test]
async fn every_published_call_of_an_extension_is_answered_and_becomes_its_event()
-> anyhow::Result<()> {
    for example in EXAMPLES {
        let Example { file, event, .. } = example;
        let endpoint = Endpoint::new(extension()).await?;
        let body = read(file)?;

        let reply = endpoint.post(PATH, &body).await?;

        assert_eq!(judge_reply(&asked(event, &body), &reply), Ok(()), "{file}: {}", reply.body);
        let published = match event {
            Event::Start => read("extid-attributecollectionstart-continue-response.json")?,
            Event::Submit => read("extid-attributecollectionsubmit-continue-response.json")?,
            Event::Token => {
                let mut answer = read("extid-tokenissuancestart-provideclaims-response.json")?;
                answer["data"]["actions"][0]["claims"] = json!({});
                answer
            }
        };
        assert_eq!(reply.body, published, "{file}");

        let call = parsed(&body);
        assert_eq!(call.tenant.as_deref(), Some(example.tenant), "{file}");
        assert_eq!(call.extension.as_deref(), Some(example.extension), "{file}");
        let sign_up = call.sign_up;
        assert_eq!(sign_up.step, step_of(event), "{file}");
        assert_eq!(sign_up.email.as_ref().map(|it| it.expose()), example.email, "{file}");
        assert_eq!(sign_up.client.as_deref(), example.client, "{file}");
        assert_eq!(sign_up.object_id.as_deref(), example.object_id, "{file}");
        assert_eq!(sign_up.correlation_id.as_deref(), example.correlation_id, "{file}");
        assert_eq!(sign_up.locale.as_deref(), example.locale, "{file}");
        assert_eq!(sign_up.ip.as_deref(), example.ip, "{file}");
        let claims: Map<_, _> = example
            .claims
            .iter()
            .map(|(name, json)| Ok(((*name).to_owned(), serde_json::from_str(json)?)))
            .collect::<anyhow::Result<_>>()?;
        assert_eq!(sign_up.claims, claims, "{file}");

        let events = endpoint.events().await?;
        assert_eq!(events.len(), usize::from(event != Event::Token), "{file}");
        assert!(events.iter().all(|event| event.sign_up == sign_up), "{file}");
    }
    Ok(())
}

/// A decision for each published answer that gives exactly that answer.
#[test]
fn every_published_answer_to_an_extension_is_one_of_ours() -> anyhow::Result<()> {
    let message =
        "Your access request is already processing. You'll be notified when your request \
                   has been approved."
            .to_owned();
    let continued = |claims: Value| Outcome::Continue {
        claims: claims.as_object().expect("an object").clone(),
    };
    let some = json!({ "key1": "value1,value2,value3", "key2": true });
    let token = json!({
        "customClaim1": "customClaimValue1",
        "customClaim2": ["customClaimString1", "customClaimString2"],
    });
    let pending = Outcome::Pending { message: message.clone(), claims: Map::new() };
    let produced = [
        ("attributecollectionstart", "continue", Outcome::unchanged()),
        ("attributecollectionstart", "setprefillvalues", continued(some.clone())),
        ("attributecollectionstart", "showblockpage", pending),
        ("attributecollectionsubmit", "continue", Outcome::unchanged()),
        ("attributecollectionsubmit", "modifyattributevalues", continued(some)),
        ("attributecollectionsubmit", "showblockpage", Outcome::Block { message }),
        ("tokenissuancestart", "provideclaims", continued(token)),
    ];
    let contract =
        ContractSettings { block_title: Some("Hold tight...".to_owned()), ..Default::default() };
    let settings = ConnectorSettings { contract, ..extension() };
    let mut seen = BTreeSet::new();
    for (event, name, outcome) in produced {
        let shape = parsed(&read(&format!("extid-{event}-request.json"))?).shape;
        let written = settings.dialect().write(&shape, &Reply::new(&outcome, None));
        let file = format!("extid-{event}-{name}-response.json");
        assert_eq!(serde_json::from_slice::<Value>(&written.body)?, read(&file)?, "{file}");
        assert_eq!(written.unsaid, vestibule_api::Unsaid::default(), "{file}");
        seen.insert(file);
    }
    // Two errors at once, which no single rule makes.
    seen.insert("extid-attributecollectionsubmit-showvalidationerror-response.json".to_owned());
    for file in &seen {
        let published = read(file)?;
        let answer: ExtensionAnswer = serde_json::from_value(published.clone())?;
        assert_eq!(serde_json::to_value(answer)?, published, "{file}");
    }

    let ours = |file: &String| {
        let refused = ["emailotp", "passwordsubmit", "verifiedid"];
        file.starts_with("extid-") && !refused.iter().any(|it| file.contains(it))
    };
    let all: BTreeSet<_> = files_ending_in("-response.json")?.into_iter().filter(ours).collect();
    assert_eq!(seen, all);
    Ok(())
}

#[tokio::test]
async fn an_event_that_is_not_ours_is_refused_and_counted_and_nothing_of_it_kept()
-> anyhow::Result<()> {
    let endpoint = Endpoint::new(extension()).await?;
    let mut calls = Vec::new();
    for (file, secret) in REFUSED {
        calls.push((read(file)?, secret));
    }
    for kind in [
        "microsoft.graph.authenticationEvent.pageRenderStart",
        "microsoft.graph.authenticationEvent.somethingNew",
        "attributeCollection",
    ] {
        calls.push((json!({ "type": kind, "data": { "password": "hunter2" } }), "hunter2"));
    }
    let count = calls.len();
    for (body, secret) in calls {
        let reply = endpoint.post(PATH, &body).await?;
        assert_eq!(reply.status, StatusCode::UNPROCESSABLE_ENTITY, "{body}");
        assert_eq!(reply.body["error"]["code"], "event-not-answered", "{body}");
        let message = reply.body["error"]["message"].as_str().unwrap_or_default().to_owned();
        for event in ["attributeCollectionStart", "attributeCollectionSubmit", "tokenIssuanceStart"]
        {
            assert!(message.contains(event), "{message}");
        }
        assert!(!reply.body.to_string().contains(secret), "{body}");
    }
    assert!(endpoint.events().await?.is_empty());
    let line = format!(
        r#"calls_total{{connector="partners",step="none",answer="event-not-answered"}} {count}"#
    );
    let metrics = endpoint.metrics()?;
    assert!(metrics.contains(&line), "no {line} in\n{metrics}");
    Ok(())
}

#[tokio::test]
async fn what_is_no_call_of_today_says_what_is_wrong() -> anyhow::Result<()> {
    let endpoint = Endpoint::new(extension()).await?;
    let legacy = json!({
        "type": "onTokenIssuanceStartCustomExtension",
        "apiSchemaVersion": "10-01-2021-preview",
        "context": { "correlationId": "c" },
    });
    for (body, code) in [
        (legacy, "legacy-format"),
        (json!({}), "missing-event-type"),
        (json!({ "type": 5, "data": [] }), "missing-event-type"),
        (json!({ "type": "", "data": { "@odata.type": "x" } }), "missing-event-type"),
    ] {
        let reply = endpoint.post(PATH, &body).await?;
        assert_eq!(reply.status, StatusCode::BAD_REQUEST, "{body}");
        assert_eq!(reply.body["error"]["code"], code, "{body}");
    }
    assert!(endpoint.events().await?.is_empty());
    Ok(())
}

#[test]
fn the_type_is_known_in_every_form_it_comes_in() {
    for (body, step) in [
        (
            json!({ "type": "microsoft.graph.authenticationEvent.attributeCollectionStart" }),
            Step::AfterFederation,
        ),
        (
            json!({ "Type": "graph.AuthenticationEvent.AttributeCollectionSubmit" }),
            Step::BeforeCreate,
        ),
        (json!({ "type": "tokenissuancestart", "data": null }), Step::BeforeToken),
        (
            json!({ "data": { "@odata.Type": "microsoft.graph.onTokenIssuanceStartCalloutData" } }),
            Step::BeforeToken,
        ),
    ] {
        assert_eq!(parsed(&body).sign_up.step, step, "{body}");
    }
}

fn with_attributes(event: &str, attributes: Value, identities: Option<Value>) -> Value {
    let mut info = json!({ "attributes": attributes });
    if let Some(identities) = identities {
        info["identities"] = identities;
    }
    json!({
        "type": format!("microsoft.graph.authenticationEvent.{event}"),
        "data": { "userSignUpInfo": info },
    })
}

fn typed(kind: &str, value: impl Into<Value>) -> Value {
    let kind = format!("microsoft.graph.{kind}DirectoryAttributeValue");
    json!({ "@odata.type": kind, "value": value.into(), "attributeType": "builtIn" })
}

#[test]
fn the_address_is_found_under_each_of_its_names() {
    let identity = |kind: &str, issuer: &str, id: &str| json!([{ "signInType": kind, "issuer": issuer, "issuerAssignedId": id }]);
    let address = |name: &str| json!({ name: typed("string", "a@x.test") });
    for (attributes, identities, email) in [
        (address("email"), None, Some("a@x.test")),
        (address("EmailAddress"), None, Some("a@x.test")),
        (address("emailaddress"), None, Some("a@x.test")),
        (json!({}), Some(identity("email", "contoso.test", "b@x.test")), Some("b@x.test")),
        (json!({}), Some(identity("emailAddress", "contoso.test", "b@x.test")), Some("b@x.test")),
        (json!({}), Some(identity("federated", "mail", "b@x.test")), Some("b@x.test")),
        (json!({}), Some(identity("federated", "google.com", "12345")), None),
        (address("email"), Some(identity("federated", "mail", "b@x.test")), Some("a@x.test")),
        (json!({ "email": typed("string", " ") }), None, None),
        (json!({}), None, None),
    ] {
        for event in ["attributeCollectionStart", "attributeCollectionSubmit"] {
            let sign_up =
                parsed(&with_attributes(event, attributes.clone(), identities.clone())).sign_up;
            assert_eq!(sign_up.email.as_ref().map(|it| it.expose()), email, "{attributes}");
            let identities = identities.as_ref().and_then(Value::as_array).map_or(0, Vec::len);
            assert_eq!(sign_up.identities.len(), identities);
        }
    }
    let two = json!({ "email": typed("string", "a@x.test"), "EmailAddress": typed("string", "b@x.test") });
    let sign_up = parsed(&with_attributes("attributeCollectionSubmit", two, None)).sign_up;
    assert_eq!(sign_up.email.as_ref().map(|it| it.expose()), Some("a@x.test"));
    assert_eq!(sign_up.claims["EmailAddress"], "b@x.test", "what contradicts is kept");
}

#[test]
fn the_caller_is_found_in_every_form_it_comes_in() {
    let call = parsed(&json!({
        "TYPE": "microsoft.graph.authenticationEvent.attributeCollectionSubmit",
        "Data": {
            "TenantId": "t",
            "CustomAuthenticationExtensionID": "e",
            "AuthenticationContext": {
                "CorrelationID": "c",
                "client": { "clientIp": "10.0.0.1", "Locale": "fr-fr", "market": "x" },
                "clientServicePrincipal": { "AppId": "a" },
                "resourceServicePrincipal": null,
                "protocol": "OAUTH2",
            },
        },
        "specversion": "1.0",
    }));
    assert_eq!((call.tenant.as_deref(), call.extension.as_deref()), (Some("t"), Some("e")));
    let sign_up = call.sign_up;
    assert_eq!(sign_up.correlation_id.as_deref(), Some("c"));
    assert_eq!(sign_up.ip.as_deref(), Some("10.0.0.1"));
    assert_eq!(sign_up.locale.as_deref(), Some("fr-fr"));
    assert_eq!(sign_up.client.as_deref(), Some("a"));
    assert!(sign_up.claims.is_empty());
}

/// Somebody chose the URL, but the answer must match the event.
#[tokio::test]
async fn the_event_holds_where_the_url_names_another_step() -> anyhow::Result<()> {
    let endpoint = Endpoint::new(extension()).await?;
    let body = read("extid-attributecollectionsubmit-request.json")?;
    let reply = endpoint.post("/connectors/partners/after-federation", &body).await?;
    assert_eq!(judge_reply(&asked(Event::Submit, &body), &reply), Ok(()));
    assert_eq!(endpoint.events().await?.remove(0).sign_up.step, Step::BeforeCreate);
    let line = r#"step_contradictions_total{connector="partners"} 1"#;
    assert!(endpoint.metrics()?.contains(line));
    let deeper = endpoint.post("/connectors/partners/before-create/email/a", &body).await?;
    assert_eq!(deeper.status, StatusCode::NOT_FOUND);
    Ok(())
}

#[tokio::test]
async fn a_changed_attribute_has_the_name_and_the_type_that_came() -> anyhow::Result<()> {
    let attributes = json!({
        "EmailAddress": typed("string", "a@x.test"),
        "lastName": typed("string", "lovelace"),
        "City": typed("string", "london"),
        "extension_00aa_Year": typed("int64", 1815),
        "extension_00aa_List": typed("boolean", false),
        "extension_00aa_Empty": typed("int64", Value::Null),
        "tags": { "@odata.type": "graph.stringCollectionDirectoryAttributeValue", "value": ["a"] },
    });
    let rules = vec![set(&[
        ("surname", "'Lovelace'"),
        ("city", "true"),
        ("extension_Year", "'1816'"),
        ("extension_00aa_List", "'True'"),
        ("extension_Empty", "'many'"),
        ("tags", "'b,c'"),
        ("added", "7"),
        ("half", "0.5"),
    ])];
    for (event, kind, member) in [
        ("attributeCollectionStart", Event::Start, "inputs"),
        ("attributeCollectionSubmit", Event::Submit, "attributes"),
    ] {
        let endpoint = Endpoint::new(extension_with(rules.clone())).await?;
        let body = with_attributes(event, attributes.clone(), None);

        let reply = endpoint.post(PATH, &body).await?;

        let expected = json!({
            "lastName": "Lovelace",
            "City": "true",
            "extension_00aa_Year": 1816,
            "extension_00aa_List": true,
            "tags": ["b", "c"],
            "added": 7,
        });
        assert_eq!(action(&reply.body)[member], expected, "{event}");
        assert_eq!(judge_reply(&asked(kind, &body), &reply), Ok(()), "{event}");
        let line = r#"vestibule_connector_claims_unsaid_total{connector="partners"} 2"#;
        let metrics = endpoint.metrics()?;
        assert!(metrics.contains(line), "no {line} in\n{metrics}");
    }
    Ok(())
}

#[tokio::test]
async fn a_validation_error_stands_beside_the_field_that_is_meant() -> anyhow::Result<()> {
    let attributes = json!({
        "City": typed("string", "L0ndon"),
        "extension_00aa_Year": typed("int64", 1),
    });
    for (field, errors) in [
        (Some("city"), json!({ "City": "Please correct it." })),
        (Some("extension_Year"), json!({ "extension_00aa_Year": "Please correct it." })),
        (Some("shoeSize"), json!({})),
        (None, json!({})),
    ] {
        let outcome = RuleOutcome::Reject {
            message: "Please correct it.".to_owned(),
            field: field.map(str::to_owned),
        };
        let endpoint = Endpoint::new(extension_with(vec![rule(outcome)])).await?;
        let body = with_attributes("attributeCollectionSubmit", attributes.clone(), None);
        let reply = endpoint.post(PATH, &body).await?;
        assert_eq!(judge_reply(&asked(Event::Submit, &body), &reply), Ok(()), "{field:?}");
        let expected = json!({
            "@odata.type": "microsoft.graph.attributeCollectionSubmit.showValidationError",
            "message": "Please correct it.",
            "attributeErrors": errors,
        });
        assert_eq!(action(&reply.body), &expected, "{field:?}");

        let start = with_attributes("attributeCollectionStart", attributes.clone(), None);
        let reply = endpoint.post(PATH, &start).await?;
        let expected = json!({
            "@odata.type": "microsoft.graph.attributeCollectionStart.showBlockPage",
            "message": "Please correct it.",
        });
        assert_eq!(action(&reply.body), &expected, "there is no form yet");
    }
    Ok(())
}

/// The address and the surname have names of ours, and keep those of the platform.
#[tokio::test]
async fn what_a_rule_calls_as_the_platform_does_has_the_type_that_came() -> anyhow::Result<()> {
    let rules = vec![set(&[("emailaddress", "false"), ("lastName", "5")])];
    let endpoint = Endpoint::new(extension_with(rules)).await?;
    let kind = "microsoft.graph.stringDirectoryAttributeValue";
    let attributes = json!({
        "EmailAddress": { "@odata.type": kind, "value": "ada@example.com" },
        "lastName": { "@odata.type": kind, "value": "Byron" },
    });
    let body = with_attributes("attributeCollectionStart", attributes, None);

    let reply = endpoint.post(PATH, &body).await?;

    assert_eq!(judge_reply(&asked(Event::Start, &body), &reply), Ok(()), "{}", reply.body);
    let expected = json!({ "EmailAddress": "false", "lastName": "5" });
    assert_eq!(action(&reply.body)["inputs"], expected);
    Ok(())
}

#[tokio::test]
async fn token_claims_are_texts_within_three_kilobytes() -> anyhow::Result<()> {
    let long = format!("'{}'", "x".repeat(2000));
    let rules = vec![set(&[("a", long.as_str()), ("b", long.as_str()), ("c", "5"), ("d", "true")])];
    let endpoint = Endpoint::new(extension_with(rules)).await?;
    let body = read("extid-tokenissuancestart-request.json")?;

    let reply = endpoint.post(PATH, &body).await?;

    let asked = asked(Event::Token, &body);
    assert_eq!(judge_reply(&asked, &reply), Ok(()), "{}", reply.body);
    let claims = &action(&reply.body)["claims"];
    let expected = json!({ "a": "x".repeat(2000), "c": "5", "d": "true" });
    assert_eq!(claims, &expected, "what does not fit is left out");
    let line = r#"vestibule_connector_claims_unsaid_total{connector="partners"} 1"#;
    assert!(endpoint.metrics()?.contains(line));
    assert!(endpoint.events().await?.is_empty(), "a sign-in is no event");
    Ok(())
}

#[tokio::test]
async fn a_refusal_cannot_be_said_at_token_issuance_and_is_counted() -> anyhow::Result<()> {
    let outcome = RuleOutcome::Block { message: "No.".to_owned() };
    let endpoint = Endpoint::new(extension_with(vec![rule(outcome)])).await?;
    let body = read("extid-tokenissuancestart-request.json")?;
    let reply = endpoint.post(PATH, &body).await?;
    assert_eq!(judge_reply(&asked(Event::Token, &body), &reply), Ok(()));
    assert_eq!(action(&reply.body)["claims"], json!({}));
    let line = r#"vestibule_connector_refusals_unsaid_total{connector="partners"} 1"#;
    let metrics = endpoint.metrics()?;
    assert!(metrics.contains(line), "no {line} in\n{metrics}");
    Ok(())
}

/// The platform waits two seconds at the most; our deadline is below one.
#[tokio::test(start_paused = true)]
async fn an_extension_is_answered_within_the_deadline_whatever_hangs() -> anyhow::Result<()> {
    for misbehaviour in [Misbehaviour::Hangs, Misbehaviour::NotStored, Misbehaviour::Unknown] {
        let endpoint = Endpoint::over(BadLog(misbehaviour), extension());
        for Example { file, event, .. } in EXAMPLES {
            let body = read(file)?;
            let started = tokio::time::Instant::now();
            let reply = endpoint.post(PATH, &body).await?;
            assert_eq!(judge_reply(&asked(event, &body), &reply), Ok(()), "{file}");
            assert!(started.elapsed() < std::time::Duration::from_secs(1), "{file}");
            let kind = action(&reply.body)["@odata.type"].as_str().unwrap_or_default().to_owned();
            let refused = kind.ends_with("showBlockPage");
            assert_eq!(refused, event != Event::Token, "{file}: {kind}");
        }
    }
    Ok(())
}

#[tokio::test]
async fn a_repeated_call_of_an_extension_gets_its_first_answer() -> anyhow::Result<()> {
    let endpoint = Endpoint::new(extension_with(vec![set(&[("city", "'London'")])])).await?;
    let mut body = read("extid-attributecollectionsubmit-request.json")?;
    let first = endpoint.post(PATH, &body).await?;
    let again = endpoint.post(PATH, &body).await?;
    assert_eq!(first.body, again.body);
    assert_eq!(endpoint.events().await?.len(), 1);
    body["data"]["authenticationContext"]["correlationId"] = "another".into();
    endpoint.post(PATH, &body).await?;
    assert_eq!(endpoint.events().await?.len(), 2, "another correlation is another call");
    Ok(())
}

/// Somebody's call: what is in it, and how it is spelt.
fn any_call() -> impl Strategy<Value = (Asked, Value)> {
    let value = prop_oneof![
        ".{0,12}".prop_map(|it| (Some(Type::Text), "string", json!(it))),
        any::<i64>().prop_map(|it| (Some(Type::Integer), "int64", json!(it))),
        any::<bool>().prop_map(|it| (Some(Type::Boolean), "boolean", json!(it))),
        prop::collection::vec("[a-z]{0,5}", 0..4).prop_map(|it| (
            Some(Type::Texts),
            "stringCollection",
            json!(it)
        )),
        Just((Some(Type::Text), "string", Value::Null)),
        Just((Some(Type::Integer), "int64", Value::Null)),
        Just((None, "dateTime", Value::Null)),
    ];
    let name = prop_oneof![
        prop::sample::select(NAMES.to_vec()).prop_map(str::to_owned),
        "[a-zA-Z_]{1,10}",
    ];
    let attributes = prop::collection::btree_map(name, value, 0..8);
    let event = prop::sample::select(vec![Event::Start, Event::Submit, Event::Token]);
    let prefix = prop::sample::select(vec!["microsoft.graph", "graph", "Microsoft.Graph"]);
    (event, prefix, attributes, any::<bool>()).prop_map(|(event, prefix, attributes, upper)| {
        let name = match event {
            Event::Start => "attributeCollectionStart",
            Event::Submit => "attributeCollectionSubmit",
            Event::Token => "tokenIssuanceStart",
        };
        let spelt = |name: &str| if upper { name.to_uppercase() } else { name.to_owned() };
        let sent: Map<_, _> = attributes
            .iter()
            .map(|(name, (_, kind, value))| {
                let kind = format!("{prefix}.{kind}DirectoryAttributeValue");
                (name.clone(), json!({ spelt("@odata.type"): spelt(&kind), "value": value }))
            })
            .collect();
        let user: Map<_, _> =
            attributes.iter().map(|(name, (_, _, it))| (name.clone(), it.clone())).collect();
        let mut data = json!({ "authenticationContext": { "user": user } });
        if event != Event::Token {
            data = json!({ spelt("userSignUpInfo"): { spelt("attributes"): sent } });
        }
        let body = json!({
            spelt("type"): spelt(&format!("{prefix}.authenticationEvent.{name}")),
            spelt("data"): data,
        });
        let attributes = attributes.into_iter().map(|(name, (kind, ..))| (name, kind));
        let attributes = if event == Event::Token { vec![] } else { attributes.collect() };
        (Asked { event, attributes }, body)
    })
}

/// Names that calls and rules share.
const NAMES: &[&str] = &[
    "email",
    "EmailAddress",
    "city",
    "City",
    "surname",
    "lastName",
    "extension_00aa_Year",
    "extension_00bb_Year",
    "identities",
    "jobTitle",
];

/// Names that a rule might use, most of them those of the call.
fn any_claims() -> impl Strategy<Value = Map<String, Value>> {
    let name = prop_oneof![
        3 => prop::sample::select(NAMES.to_vec()).prop_map(str::to_owned),
        1 => Just("extension_Year".to_owned()),
        1 => ".{0,8}",
    ];
    let long = (1000_usize..40_000).prop_map(|length| json!("x".repeat(length)));
    let value = prop_oneof![6 => any_value(), 1 => long];
    prop::collection::btree_map(name, value, 0..8).prop_map(|it| it.into_iter().collect())
}

/// Whatever is decided about whatever call, Entra finds no fault with the answer.
#[test]
fn no_answer_to_an_extension_causes_an_error_code() {
    let mut headers = HeaderMap::new();
    headers.insert(header::CONTENT_TYPE, "application/json".parse().unwrap());
    let titled = ContractSettings { block_title: Some("Title".to_owned()), ..Default::default() };
    let untitled = ContractSettings::default();
    let strategy = (any_call(), any_outcome(any_claims()), any::<bool>());
    TestRunner::new(Config::with_cases(2000))
        .run(&strategy, |((asked, body), outcome, title)| {
            let contract = if title { titled.clone() } else { untitled.clone() };
            let settings = ConnectorSettings { contract, ..extension() };
            let call = parsed(&body);
            let written = settings.dialect().write(&call.shape, &Reply::new(&outcome, None));
            let judged = judge(&asked, written.status, &headers, &written.body);
            let text = String::from_utf8_lossy(&written.body);
            prop_assert_eq!(judged, Ok(()), "{} -> {}", body, text);
            if let Outcome::Continue { claims } = &outcome {
                prop_assert!(written.unsaid.claims <= claims.len());
            } else {
                prop_assert_eq!(written.unsaid.refusal, asked.event == Event::Token);
            }
            Ok(())
        })
        .unwrap();
}

/// What is refused is refused so that the platform's log says why: with a status that is not 200.
#[tokio::test]
async fn a_problem_is_never_taken_for_an_answer() -> anyhow::Result<()> {
    let endpoint = Endpoint::new(extension()).await?;
    for (file, _) in REFUSED {
        let body = read(file)?;
        let HttpReply { status, headers, body } = endpoint.post(PATH, &body).await?;
        assert_ne!(status, StatusCode::OK, "{file}");
        assert_eq!(headers[header::CONTENT_TYPE], "application/json");
        assert!(body.get("data").is_none(), "{file}");
    }
    Ok(())
}

/// The manual's table of codes names a test for each code, or says why we cannot cause it.
#[test]
fn the_manual_names_a_test_for_every_error_code() -> anyhow::Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let manual = fs::read_to_string(root.join("../docs/external-id.md"))?;
    let mut sources = String::new();
    for folder in ["tests/it", "src", "src/contract", "src/auth"] {
        for entry in fs::read_dir(root.join(folder))? {
            let path = entry?.path();
            if path.extension().is_some_and(|it| it == "rs") {
                sources.push_str(&fs::read_to_string(path)?);
            }
        }
    }
    let mut codes = BTreeSet::new();
    let mut tests = 0;
    for line in manual.lines().filter(|line| line.starts_with("| 1003")) {
        let cells: Vec<_> = line.trim_matches('|').split('|').map(str::trim).collect();
        let [code, _meaning, why] = cells.as_slice() else { anyhow::bail!("{line}") };
        codes.insert(code.parse::<u32>()?);
        let named: Vec<_> = why.split('`').skip(1).step_by(2).collect();
        assert!(!named.is_empty() || why.contains("not caused by an answer"), "{line}");
        for name in named {
            assert!(sources.contains(&format!("fn {name}(")), "there is no test {name}");
            tests += 1;
        }
    }
    // 1003013 is in no document.
    let all: BTreeSet<_> = (1_003_000..=1_003_027).filter(|code| *code != 1_003_013).collect();
    assert_eq!(codes, all);
    assert!(tests >= 12, "{tests}");
    Ok(())
}
