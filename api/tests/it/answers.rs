//! The ordinary way: decisions, their events, repeated calls.

use axum::http::{StatusCode, header};
use prometheus_client::registry::Registry;
use serde_json::json;
use vestibule_api::{
    Api, ConnectorSettings, DuplicateConnector, OnError, RuleOutcome, RuleSettings,
};
use vestibule_events::{Kind, Mode, PseudonymKey, Step};

use crate::support::{BadLog, Endpoint, Misbehaviour, partners, partners_with, request};

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

fn title_case_city() -> RuleSettings {
    let claims = [("city".to_owned(), "'London'".to_owned())].into();
    rule("title-case", "signup.claims.city == 'london'", RuleOutcome::Set { claims })
}

fn reject_postal_code() -> RuleSettings {
    let outcome = RuleOutcome::Reject {
        message: "Please enter a valid Postal Code.".to_owned(),
        field: Some("postalCode".to_owned()),
    };
    rule("postal-code", "signup.claims.postalCode == '0'", outcome)
}

fn block_domain() -> RuleSettings {
    let outcome = RuleOutcome::Block { message: "Not from there.".to_owned() };
    rule("domain", "signup.email_domain == 'spam.test'", outcome)
}

#[tokio::test]
async fn each_decision_has_its_answer_at_each_step() -> anyhow::Result<()> {
    let endpoint =
        Endpoint::new(partners_with(vec![title_case_city(), reject_postal_code(), block_domain()]))
            .await?;
    let goes_on = json!({ "version": "1.0.0", "action": "Continue" });
    let changed = json!({ "version": "1.0.0", "action": "Continue", "city": "London" });
    let corrected = json!({
        "version": "1.0.0",
        "status": 400,
        "action": "ValidationError",
        "userMessage": "Please enter a valid Postal Code.",
    });
    let no_form = json!({
        "version": "1.0.0",
        "action": "ShowBlockPage",
        "userMessage": "Please enter a valid Postal Code.",
    });
    let blocked = json!({
        "version": "1.0.0",
        "action": "ShowBlockPage",
        "userMessage": "Not from there.",
    });
    let calls = [
        (json!({ "email": "a@x.test", "city": "Paris" }), &goes_on, &goes_on),
        (json!({ "email": "b@x.test", "city": "london" }), &changed, &changed),
        (json!({ "email": "c@x.test", "postalCode": "0" }), &corrected, &no_form),
        (json!({ "email": "d@Spam.Test" }), &blocked, &blocked),
    ];

    for (body, at_before_create, elsewhere) in calls {
        for step in Step::ALL {
            let expected = if step == Step::BeforeCreate { at_before_create } else { elsewhere };
            let reply = endpoint.post(&format!("/connectors/partners/{step}"), &body).await?;
            assert_eq!(&reply.body, expected, "{step} {body}");
            let status = if expected.get("status").is_some() { 400 } else { 200 };
            assert_eq!(reply.status.as_u16(), status, "{step} {body}");
            assert_eq!(reply.headers[header::CONTENT_TYPE], "application/json");
            assert_eq!(reply.headers[header::CACHE_CONTROL], "no-store");
        }
    }

    let kinds: Vec<_> = endpoint.events().await?.iter().map(|event| event.kind).collect();
    assert_eq!(
        kinds,
        [
            Kind::Screened,
            Kind::Accepted,
            Kind::Screened,
            Kind::Accepted,
            Kind::Blocked,
            Kind::Rejected,
            Kind::Blocked,
            Kind::Blocked,
        ]
    );
    Ok(())
}

#[tokio::test]
async fn a_repeated_call_gets_its_first_answer_and_makes_no_second_event() -> anyhow::Result<()> {
    let strict = Endpoint::new(partners_with(vec![block_domain()])).await?;
    let body = json!({ "email": "eve@spam.test", "city": "X" });
    let path = "/connectors/partners/before-create";

    let first = strict.post(path, &body).await?;
    // The same log, where the rule is gone in the meantime.
    let lenient = Endpoint::over(vestibule_events::LocalLog::clone(&strict.log), partners());
    let again = lenient.post(path, &body).await?;
    let reordered = json!({ "city": "X", "email": "EVE@spam.test", "ui_locales": "fr-FR" });
    let third = lenient.post(path, &reordered).await?;
    let other = lenient.post(path, &json!({ "email": "eve@spam.test", "city": "Y" })).await?;

    assert_eq!(first.body["action"], "ShowBlockPage");
    assert_eq!(again.body, first.body);
    assert_eq!(third.body, first.body, "order, case and language do not make another call");
    assert_eq!(other.body["action"], "Continue", "other claims do");
    assert_eq!(strict.events().await?.len(), 2);
    let metrics = lenient.metrics()?;
    assert!(
        metrics.contains(r#"vestibule_connector_repeated_total{connector="partners"} 2"#),
        "{metrics}"
    );
    Ok(())
}

#[tokio::test]
async fn many_callers_of_one_sign_up_make_one_event() -> anyhow::Result<()> {
    let endpoint = Endpoint::new(partners()).await?;
    let body = json!({ "email": "ada@example.com" });

    let calls = (0..20).map(|_| endpoint.post("/connectors/partners/before-create", &body));
    for reply in futures_util::future::join_all(calls).await {
        assert_eq!(reply?.body["action"], "Continue");
    }

    assert_eq!(endpoint.events().await?.len(), 1);
    Ok(())
}

#[tokio::test]
async fn the_trace_context_of_the_call_travels_in_the_event() -> anyhow::Result<()> {
    let endpoint = Endpoint::new(partners()).await?;
    let parent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    for (email, traceparent) in [("a@x.test", parent), ("b@x.test", "ada@example.com")] {
        let request = request("/connectors/partners/before-create")
            .header("traceparent", traceparent)
            .body(json!({ "email": email }).to_string().into())?;
        assert_eq!(endpoint.call(request).await?.status, StatusCode::OK);
    }

    let events = endpoint.events().await?;

    let parents: Vec<_> = events.iter().map(|event| event.traceparent.as_deref()).collect();
    assert_eq!(parents, [Some(parent), None]);
    Ok(())
}

#[tokio::test]
async fn the_url_holds_where_the_body_names_another_step() -> anyhow::Result<()> {
    let endpoint = Endpoint::new(partners()).await?;
    for (email, step) in [
        ("a@x.test", json!("PostFederationSignup")),
        ("b@x.test", json!("unheard of")),
        ("c@x.test", json!("postattributecollection")),
        ("d@x.test", json!(7)),
    ] {
        let body = json!({ "email": email, "step": step });
        let reply = endpoint.post("/connectors/partners/before-create", &body).await?;
        assert_eq!(reply.body["action"], "Continue", "{body}");
    }

    let events = endpoint.events().await?;

    assert!(events.iter().all(|event| event.sign_up.step == Step::BeforeCreate));
    let steps: Vec<_> = events.iter().map(|event| event.sign_up.claims.get("step")).collect();
    assert_eq!(steps, [None, None, None, Some(&json!(7))], "a step that is no text is a claim");
    let metrics = endpoint.metrics()?;
    assert!(
        metrics
            .contains(r#"vestibule_connector_step_contradictions_total{connector="partners"} 2"#),
        "{metrics}"
    );
    Ok(())
}

#[tokio::test]
async fn the_step_in_the_body_has_no_case() -> anyhow::Result<()> {
    let endpoint = Endpoint::new(partners()).await?;
    for (step, expected) in [
        ("PostFederationSignup", StatusCode::OK),
        ("POSTATTRIBUTECOLLECTION", StatusCode::OK),
        ("pretokenissuance", StatusCode::OK),
        ("PreTokenApplicationClaims", StatusCode::OK),
        ("PostEverything", StatusCode::BAD_REQUEST),
    ] {
        let body = json!({ "email": "ada@example.com", "step": step });
        let reply = endpoint.post("/connectors/partners", &body).await?;
        assert_eq!(reply.status, expected, "{step}");
    }
    Ok(())
}

#[tokio::test]
async fn the_version_of_the_answers_is_the_configured_one() -> anyhow::Result<()> {
    let settings = ConnectorSettings { version: "0.0.1".to_owned(), ..partners() };
    let endpoint = Endpoint::new(settings).await?;
    let body = json!({ "email": "ada@example.com" });

    let reply = endpoint.post("/connectors/partners/before-create", &body).await?;

    assert_eq!(reply.body["version"], "0.0.1");
    Ok(())
}

#[tokio::test]
async fn calls_are_counted_by_what_they_got() -> anyhow::Result<()> {
    let endpoint = Endpoint::new(partners_with(vec![block_domain()])).await?;
    let path = "/connectors/partners/before-create";
    endpoint.post(path, &json!({ "email": "a@x.test" })).await?;
    endpoint.post(path, &json!({ "email": "b@x.test" })).await?;
    endpoint.post(path, &json!({ "email": "c@spam.test" })).await?;

    let metrics = endpoint.metrics()?;

    for line in [
        r#"vestibule_connector_calls_total{connector="partners",step="before-create",answer="continue"} 2"#,
        r#"vestibule_connector_calls_total{connector="partners",step="before-create",answer="block"} 1"#,
        r#"vestibule_connector_answer_seconds_count{connector="partners",step="before-create",answer="continue"} 2"#,
        r#"vestibule_connector_credential_uses_total{connector="partners",credential="first"} 3"#,
        r#"vestibule_connector_denied_total{connector="partners",cause="wrong"} 0"#,
    ] {
        assert!(metrics.contains(line), "no {line} in\n{metrics}");
    }
    assert!(!metrics.contains("x.test"), "personal data in metrics");
    Ok(())
}

#[test]
fn two_connectors_cannot_have_one_name() {
    let log = std::sync::Arc::new(BadLog(Misbehaviour::Hangs));
    let key = std::sync::Arc::new(PseudonymKey::new(vec![7; 32]));
    let connectors = vec![partners(), partners()];

    let api = Api::new(log, key, connectors, &mut Registry::default());

    assert_eq!(api.unwrap_err(), DuplicateConnector("partners".parse().unwrap()));
}
