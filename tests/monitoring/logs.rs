//! Log lines: flat, with ids to search by, and without what people have said.

use std::{collections::BTreeSet, time::Duration};

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};
use vestibule_testkit::eventually;

use super::collector::Collector;
use crate::support::{LIMIT, Site};

/// A webhook that nobody answers, so that attempts fail and events are given up.
const FAILING_WORKER: &str = r#"
[workers.notify.retry]
tries = 2
initial = "10ms"
max = "10ms"

[[workers.notify.channels]]
name = "away"
kind = "webhook"
on = "accepted"
subject = "s"
body = "{{ signup.email }}"
url = "env:NOBODY"
"#;

fn failing_site(more: &str) -> anyhow::Result<Site> {
    let mut site = Site::new(&format!("{more}{FAILING_WORKER}"))?;
    site.set("NOBODY", &format!("http://127.0.0.1:{}/", vestibule_testkit::free_port()));
    Ok(site)
}

#[tokio::test]
async fn a_line_about_an_event_is_flat_and_names_event_and_person() -> anyhow::Result<()> {
    let mut site = failing_site("")?;
    site.set("VESTIBULE_LOG_FORMAT", "json");
    site.set("VESTIBULE_LOG", "debug");
    let mut up = site.up().await?;

    up.sign_up("before-create", &json!({ "email": "ada@example.com" })).await?;
    let parked = |it: &str| it.contains("dead letter");
    up.process.wait_for_line(LIMIT, parked).await?;
    let events = site.replay(&[]).await?;
    let stopped = up.process.terminate(LIMIT).await?;

    let mut about_it = 0;
    for line in stopped.stderr.lines().filter(|it| it.starts_with('{')) {
        let line: Value = serde_json::from_str(line).with_context(|| line.to_owned())?;
        let fields = line.as_object().context("no object")?;
        for field in ["timestamp", "level", "target", "message"] {
            ensure!(fields.get(field).is_some_and(Value::is_string), "no {field}: {line}");
        }
        let nested = fields.values().find(|it| it.is_object() || it.is_array());
        ensure!(nested.is_none(), "not flat: {line}");
        if fields.contains_key("event") {
            ensure!(line["event"] == events[0]["id"], "another event: {line}");
            ensure!(line["person"] == events[0]["subject"], "no person: {line}");
            about_it += 1;
        }
    }
    assert!(about_it >= 3, "answered, tried again, parked: {}", stopped.stderr);
    Ok(())
}

/// What the people of an event have said of themselves, as far as it is theirs alone.
fn personal(event: &Value, into: &mut BTreeSet<String>) {
    const THEIRS: [&str; 9] = [
        "email",
        "address",
        "displayName",
        "surname",
        "streetAddress",
        "mobilePhone",
        "telephoneNumber",
        "issuerAssignedId",
        "issuer_assigned_id",
    ];
    match event {
        Value::Object(fields) => {
            for (name, value) in fields {
                match value {
                    Value::String(text) if THEIRS.contains(&&**name) && text.len() > 6 => {
                        into.insert(text.clone());
                    }
                    other => personal(other, into),
                }
            }
        }
        Value::Array(values) => values.iter().for_each(|it| personal(it, into)),
        _ => {}
    }
}

#[tokio::test]
async fn nothing_of_a_person_is_in_logs_metrics_or_traces() -> anyhow::Result<()> {
    let collector = Collector::start().await?;
    let mut site = failing_site(super::EVERYTHING)?;
    site.set("VESTIBULE_LOG", "trace");
    site.set("OTEL_EXPORTER_OTLP_ENDPOINT", &collector.url);
    let mut up = site.up().await?;

    let url = up.connector();
    let simulate = ["simulate", "--url", &url, "--count", "60", "--seed", "11", "--no-verify"];
    let simulated = site.run_within(Duration::from_secs(60), &simulate).await?;
    up.sign_up("before-create", &super::person("ada")).await?;
    let events = site.replay(&[]).await?;
    ensure!(events.len() > 40, "too few to see much: {}", simulated.stderr);
    eventually(LIMIT, "workers have failed", async || -> anyhow::Result<bool> {
        let retried = r#"vestibule_worker_attempts_total{worker="notify",outcome="retried"}"#;
        Ok(up.metric(retried).await? >= 3.0)
    })
    .await?;
    let metrics = up.metrics().await?;
    let stopped = up.process.terminate(LIMIT).await?;

    let mut said = BTreeSet::from(["try-me".to_owned()]);
    events.iter().for_each(|it| personal(it, &mut said));
    assert!(said.len() > 80, "{said:?}");
    let traces = String::from_utf8_lossy(&collector.bytes()).into_owned();
    assert!(traces.contains("sign-up") && stopped.stderr.contains("TRACE"));
    for (place, text) in [("logs", &stopped.stderr), ("metrics", &metrics), ("traces", &traces)] {
        for secret in &said {
            let line = text.lines().find(|line| line.contains(&**secret));
            assert_eq!(line, None, "{secret} is in the {place}");
        }
    }
    Ok(())
}
