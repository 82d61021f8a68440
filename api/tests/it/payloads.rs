//! Every published example of an API connector: each call gets a legal answer and becomes the event
//! it should, each answer survives the answer types. The examples of the other dialects are in the
//! modules of these; here is the test that none was forgotten.

use std::{collections::BTreeSet, fs, path::PathBuf};

use axum::http::StatusCode;
use serde_json::{Value, json};
use vestibule_api::{Action, Answer};
use vestibule_events::{Kind, Step};

use crate::{
    custom_extension, custom_policy,
    support::{Endpoint, partners},
};

pub(crate) fn folder() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/payloads"))
}

pub(crate) fn read(file: &str) -> anyhow::Result<Value> {
    Ok(serde_json::from_slice(&fs::read(folder().join(file))?)?)
}

pub(crate) fn files_ending_in(end: &str) -> anyhow::Result<BTreeSet<String>> {
    let mut files = BTreeSet::new();
    for entry in fs::read_dir(folder())? {
        files.extend(entry?.file_name().into_string().ok().filter(|name| name.ends_with(end)));
    }
    Ok(files)
}

/// A published call and what it says once the contradictions between the documents are gone.
struct Example {
    file: &'static str,
    step: Step,
    /// The body names the step, so the connector's own URL is enough.
    names_step: bool,
    email: &'static str,
    issuer: Option<&'static str>,
    client: Option<&'static str>,
    object_id: Option<&'static str>,
    surname: Option<&'static str>,
    /// Names of all claims.
    claims: &'static [&'static str],
}

const FABRIKAM: &str = "johnsmith@fabrikam.onmicrosoft.com";
const CUSTOM: &str = "extension_<extensions-app-id>_CustomAttribute";
const CUSTOM_1: &str = "extension_<extensions-app-id>_CustomAttribute1";
const CUSTOM_2: &str = "extension_<extensions-app-id>_CustomAttribute2";

const EXAMPLES: [Example; 10] = [
    Example {
        file: "entra-b2b-postfederationsignup-request.json",
        step: Step::AfterFederation,
        names_step: false,
        email: FABRIKAM,
        issuer: Some("facebook.com"),
        client: None,
        object_id: None,
        surname: Some("Smith"), // Comes as `lastName`.
        claims: &["displayName", "givenName", "surname"],
    },
    Example {
        file: "entra-b2b-postattributecollection-request.json",
        step: Step::BeforeCreate,
        names_step: false,
        email: FABRIKAM,
        issuer: Some("facebook.com"),
        client: None,
        object_id: None,
        surname: Some("Smith"),
        claims: &[
            "displayName",
            "givenName",
            "surname",
            "jobTitle",
            "streetAddress",
            "city",
            "postalCode",
            "state",
            "country",
            CUSTOM_1,
            CUSTOM_2,
        ],
    },
    Example {
        file: "entra-b2b-postattributecollection-socialidp-request.json",
        step: Step::BeforeCreate,
        names_step: false,
        email: "johnsmith@outlook.com",
        issuer: Some("facebook.com"),
        client: None,
        object_id: None,
        surname: None,
        claims: &["displayName", "city", CUSTOM],
    },
    Example {
        file: "entra-b2b-postattributecollection-entraidp-request.json",
        step: Step::BeforeCreate,
        names_step: false,
        email: FABRIKAM,
        issuer: None, // Entra accounts come without identities.
        client: None,
        object_id: None,
        surname: None,
        claims: &["displayName", "city", CUSTOM],
    },
    Example {
        file: "entra-b2b-preview202006-request.json",
        step: Step::BeforeCreate,
        names_step: false,
        email: FABRIKAM,
        issuer: Some("facebook.com"),
        client: None,
        object_id: None,
        surname: None,
        claims: &["displayName", "postalCode", CUSTOM_1, CUSTOM_2],
    },
    Example {
        file: "b2c-userflow-postfederationsignup-request.json",
        step: Step::AfterFederation,
        names_step: true,
        email: FABRIKAM,
        issuer: Some("facebook.com"),
        client: Some("<guid>"),
        object_id: None,
        surname: Some("Smith"),
        claims: &["displayName", "givenName", "surname"],
    },
    Example {
        file: "b2c-userflow-postattributecollection-request.json",
        step: Step::BeforeCreate,
        names_step: true,
        email: FABRIKAM,
        issuer: Some("facebook.com"),
        client: Some("93fd07aa-333c-409d-955d-96008fd08dd9"),
        object_id: None,
        surname: Some("Smith"),
        claims: &[
            "displayName",
            "givenName",
            "surname",
            "jobTitle",
            "streetAddress",
            "city",
            "postalCode",
            "state",
            "country",
            CUSTOM_1,
            CUSTOM_2,
        ],
    },
    Example {
        file: "b2c-userflow-postattributecollection-captured-request.json",
        step: Step::BeforeCreate,
        names_step: true,
        email: "example@gmail.com",
        issuer: Some("google.com"),
        client: Some("1245b6b5-5555-0000-8817-7cb62727fa81"),
        object_id: None,
        surname: Some("LastName"),
        claims: &["displayName", "givenName", "surname", "city", "country"],
    },
    Example {
        file: "b2c-userflow-pretokenissuance-request.json",
        step: Step::BeforeToken,
        names_step: true,
        email: FABRIKAM,
        issuer: Some("facebook.com"),
        client: Some("231c70e8-8424-48ac-9b5d-5623b9e4ccf3"),
        object_id: Some("ab3ec3b2-a435-45e4-b93a-56a005e88bb7"),
        surname: None,
        claims: &["displayName", CUSTOM_1, CUSTOM_2],
    },
    Example {
        file: "b2c-userflow-pretokenapplicationclaims-request.json",
        step: Step::BeforeToken,
        names_step: true,
        email: FABRIKAM,
        issuer: Some("facebook.com"),
        client: Some("231c70e8-8424-48ac-9b5d-5623b9e4ccf3"), // Comes as `clientId`.
        object_id: None,
        surname: None,
        claims: &["displayName", CUSTOM_1, CUSTOM_2],
    },
];

#[test]
fn there_is_an_example_for_every_published_call() -> anyhow::Result<()> {
    let examples: BTreeSet<_> = EXAMPLES
        .iter()
        .map(|it| it.file)
        .chain(custom_policy::REQUESTS)
        .chain(custom_extension::requests())
        .map(str::to_owned)
        .collect();
    assert_eq!(examples, files_ending_in("-request.json")?);
    Ok(())
}

#[tokio::test]
async fn every_published_call_is_answered_and_becomes_its_event() -> anyhow::Result<()> {
    for example in EXAMPLES {
        let Example { file, step, .. } = example;
        let endpoint = Endpoint::new(partners()).await?;
        let body = read(file)?;

        let reply = endpoint.post(&format!("/connectors/partners/{step}"), &body).await?;
        assert_eq!(reply.status, StatusCode::OK, "{file}");
        assert_eq!(reply.body, json!({ "version": "1.0.0", "action": "Continue" }), "{file}");

        let mut events = endpoint.events().await?;
        if step == Step::BeforeToken {
            assert!(events.is_empty(), "{file}: a sign-in is no event");
            continue;
        }
        assert_eq!(events.len(), 1, "{file}");
        let event = events.remove(0);
        let kind = if step == Step::BeforeCreate { Kind::Accepted } else { Kind::Screened };
        assert_eq!(event.kind, kind, "{file}");
        let sign_up = event.sign_up;
        assert_eq!(sign_up.step, step, "{file}");
        assert_eq!(sign_up.email.as_ref().map(|it| it.expose()), Some(example.email), "{file}");
        let issuers: Vec<_> = sign_up.identities.iter().map(|it| it.issuer.as_str()).collect();
        assert_eq!(issuers, example.issuer.into_iter().collect::<Vec<_>>(), "{file}");
        assert_eq!(sign_up.client.as_deref(), example.client, "{file}");
        assert_eq!(sign_up.object_id.as_deref(), example.object_id, "{file}");
        assert_eq!(sign_up.locale.as_deref(), Some("en-US"), "{file}");
        let surname = sign_up.claims.get("surname").and_then(Value::as_str);
        assert_eq!(surname, example.surname, "{file}");
        let claims: BTreeSet<_> = sign_up.claims.keys().map(String::as_str).collect();
        assert_eq!(claims, example.claims.iter().copied().collect(), "{file}");
        for (name, value) in sign_up.claims.iter().filter(|(name, _)| *name != "surname") {
            assert_eq!(Some(value), body.get(name), "{file}: {name}");
        }
    }
    Ok(())
}

#[tokio::test]
async fn the_connectors_own_url_takes_the_step_from_the_body() -> anyhow::Result<()> {
    for example in EXAMPLES {
        let Example { file, step, names_step, .. } = example;
        let endpoint = Endpoint::new(partners()).await?;

        let reply = endpoint.post("/connectors/partners", &read(file)?).await?;

        if names_step {
            assert_eq!(reply.status, StatusCode::OK, "{file}");
            let steps: Vec<_> =
                endpoint.events().await?.iter().map(|event| event.sign_up.step).collect();
            let expected = if step == Step::BeforeToken { vec![] } else { vec![step] };
            assert_eq!(steps, expected, "{file}");
        } else {
            assert_eq!(reply.status, StatusCode::BAD_REQUEST, "{file}");
            assert_eq!(reply.body["code"], "missing-step", "{file}");
            assert!(endpoint.events().await?.is_empty(), "{file}");
        }
    }
    Ok(())
}

#[test]
fn every_published_answer_survives_the_answer_types() -> anyhow::Result<()> {
    let files = files_ending_in("-response.json")?;
    let ours = files.into_iter().filter(|file| file.starts_with("apiconnector-"));
    let files: BTreeSet<_> = ours.collect();
    assert_eq!(files.len(), 9);
    for file in files {
        let published = read(&file)?;
        let answer: Answer = serde_json::from_value(published.clone())?;
        let (action, status) = match published["action"].as_str() {
            Some("Continue") => (Action::Continue, StatusCode::OK),
            Some("ShowBlockPage") => (Action::ShowBlockPage, StatusCode::OK),
            Some("ValidationError") => (Action::ValidationError, StatusCode::BAD_REQUEST),
            other => anyhow::bail!("{file}: {other:?}"),
        };
        assert_eq!(answer.action, action, "{file}");
        assert_eq!(answer.http_status(), status, "{file}");
        assert_eq!(serde_json::to_value(answer)?, published, "{file}");
    }
    Ok(())
}
