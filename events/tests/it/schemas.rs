//! What is published about events: that it agrees with the program, and breaks nobody.

use std::{collections::BTreeSet, fs, path::Path};

use serde_json::{Value, json};
use vestibule_events::{EventLog as _, Kind, SignUpEvent, event_schema};
use vestibule_testkit::Nats;

use crate::{
    compatibility::breaks,
    jetstream::{operator, provisioned},
    sample,
};

fn read(file: &str) -> anyhow::Result<Value> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(file);
    Ok(serde_json::from_slice(&fs::read(path)?)?)
}

/// `schemas/released/` is what subscribers have; it changes by hand, when a version is released, and
/// only so that this test held before.
#[test]
fn the_schema_breaks_nobody_who_relies_on_the_released_one() -> anyhow::Result<()> {
    let released = read("schemas/released/signup-event.v1.json")?;
    let found = breaks(&released, &event_schema().to_value());
    assert!(
        found.is_empty(),
        "subscribers rely on what this takes away; a change that must be is a version 2 beside \
         version 1 (docs/contracts.md):\n{}",
        found.into_iter().collect::<Vec<_>>().join("\n")
    );
    Ok(())
}

/// The document is written by hand, for its readers; this holds it to what the program does.
#[test]
fn the_asyncapi_document_speaks_of_these_kinds_and_subjects() -> anyhow::Result<()> {
    let document = read("asyncapi.json")?;
    let channel = &document["channels"]["signUps"];

    let kinds: Vec<_> = Kind::ALL.iter().map(|kind| json!(kind.as_str())).collect();
    assert_eq!(channel["parameters"]["kind"]["enum"], json!(kinds));
    let about_kinds = channel["parameters"]["kind"]["description"].as_str().unwrap_or_default();
    for kind in Kind::ALL {
        assert!(about_kinds.contains(&format!("`{kind}`")), "{kind} is not explained");
    }
    let event = sample::call(1).event();
    let address = channel["address"].as_str().unwrap_or_default();
    let subject = address
        .replace("{connector}", event.sign_up.connector.as_str())
        .replace("{kind}", event.kind.as_str());
    assert_eq!(subject, event.subject());
    assert_eq!(document["servers"]["nats"]["x-jetstream"]["stream"], "SIGNUPS");
    Ok(())
}

#[test]
fn the_example_of_the_asyncapi_document_is_an_event() -> anyhow::Result<()> {
    let document = read("asyncapi.json")?;
    let example = &document["components"]["messages"]["signUpEvent"]["examples"][0];

    let event: SignUpEvent = serde_json::from_value(example["payload"].clone())?;

    assert_eq!(serde_json::to_value(&event)?, example["payload"], "as the program writes it");
    for (header, attribute) in [
        ("ce-id", "id"),
        ("ce-source", "source"),
        ("ce-type", "type"),
        ("ce-subject", "subject"),
        ("ce-time", "time"),
        ("ce-specversion", "specversion"),
        ("ce-fingerprint", "fingerprint"),
    ] {
        assert_eq!(example["headers"][header], example["payload"][attribute], "{header}");
    }
    Ok(())
}

/// A subscriber that filters on headers relies on these.
#[tokio::test]
async fn an_event_is_published_with_the_headers_of_the_asyncapi_document() -> anyhow::Result<()> {
    let document = read("asyncapi.json")?;
    let documented = &document["components"]["schemas"]["headers"];
    let names = |list: Vec<&str>| list.into_iter().map(str::to_owned).collect::<BTreeSet<_>>();
    let required = documented["required"].as_array().into_iter().flatten();
    let required = names(required.filter_map(Value::as_str).collect());
    let known = documented["properties"].as_object().into_iter().flatten();
    let known = names(known.map(|(name, _)| name.as_str()).collect());

    let nats = Nats::start().await?;
    let log = provisioned(&nats).await?;
    let traced = SignUpEvent {
        traceparent: Some("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01".into()),
        ..sample::call(1).event()
    };
    log.append(traced).await?;
    let stream = operator(&nats).await?.get_stream("SIGNUPS").await?;
    let message = stream.direct_get(1).await?;

    let sent: BTreeSet<_> = message.headers.iter().map(|(name, _)| name.to_string()).collect();
    // The server has its own, and ours is a condition that it checks.
    let sent: BTreeSet<_> = sent
        .into_iter()
        .filter(|name| !name.starts_with("Nats-") || name == "Nats-Msg-Id")
        .collect();
    assert!(required.is_subset(&sent), "{sent:?}");
    assert_eq!(sent, known);
    Ok(())
}
