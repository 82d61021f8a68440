//! Traces: one sign-up is one trace, from the call through the log into each worker.

use anyhow::Context as _;
use serde_json::{Value, json};
use vestibule_testkit::eventually;

use super::collector::{Collector, Span};
use crate::{
    scaled_out::Stack,
    support::{LIMIT, Site, http},
};

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const CALLER: &str = "00f067aa0ba902b7";

/// A webhook that nobody answers.
const FAILING: &str = r#"
[workers.notify.retry]
initial = "10ms"
max = "10ms"

[[workers.notify.channels]]
name = "away"
kind = "webhook"
subject = "s"
body = "b"
url = "env:NOBODY"
"#;

fn trace_to(site: &mut Site, collector: &str) {
    site.set("OTEL_EXPORTER_OTLP_ENDPOINT", collector);
    site.set("OTEL_BSP_SCHEDULE_DELAY", "50");
}

/// One call within the trace of its caller.
async fn sign_up(base: &str, person: &Value) -> anyhow::Result<u16> {
    let answer = http()
        .post(format!("{base}/connectors/partners/before-create"))
        .basic_auth("entra", Some("try-me"))
        .header("traceparent", format!("00-{TRACE}-{CALLER}-01"))
        .json(person)
        .send()
        .await?;
    Ok(answer.status().as_u16())
}

fn only<'a>(spans: &'a [Span], name: &str) -> anyhow::Result<&'a Span> {
    let mut named = spans.iter().filter(|it| it.name == name);
    let one = named.next().with_context(|| format!("no span `{name}` in {spans:#?}"))?;
    anyhow::ensure!(named.next().is_none(), "two spans `{name}` in {spans:#?}");
    Ok(one)
}

fn is_one_trace(spans: &[Span], event: &Value) -> anyhow::Result<()> {
    let call = only(spans, "sign-up")?;
    assert_eq!((&*call.trace, &*call.parent), (TRACE, CALLER));
    assert_eq!(call.attributes["vestibule.answer"], "continue");
    for name in ["decide", "append", "attempt notify", "attempt database", "attempt permissions"] {
        let part = only(spans, name)?;
        assert_eq!((&part.trace, &part.parent), (&call.trace, &call.id), "{name}");
    }
    let attempt = only(spans, "attempt database")?;
    assert_eq!(attempt.attributes["vestibule.event"], event["id"]);
    assert_eq!(attempt.attributes["vestibule.person"], event["subject"]);
    assert_eq!(event["traceparent"], format!("00-{}-{}-01", call.trace, call.id));
    Ok(())
}

#[tokio::test]
async fn a_sign_up_is_one_trace_from_the_call_to_each_worker() -> anyhow::Result<()> {
    let collector = Collector::start().await?;
    let mut site = Site::new("")?;
    trace_to(&mut site, &collector.url);
    site.set("VESTIBULE_LOG", "debug");
    site.set("VESTIBULE_LOG_FORMAT", "json");
    let mut up = site.up().await?;

    let person = json!({ "email": "ada.secret@example.com", "surname": "Lovelace-Secret" });
    assert_eq!(sign_up(&up.base, &person).await?, 200);
    collector.named("attempt ", 3).await?;
    collector.named("sign-up", 1).await?;
    let events = site.replay(&[]).await?;
    let stopped = up.process.terminate(LIMIT).await?;

    let spans = collector.spans();
    is_one_trace(&spans, &events[0])?;
    assert!(spans.iter().all(|it| it.service == "vestibule" && !it.failed), "{spans:#?}");
    let sent = String::from_utf8_lossy(&collector.bytes()).into_owned();
    assert!(!sent.contains("ecret"), "personal data in traces");
    let line = stopped.stderr.lines().find(|it| it.contains("answering a sign-up"));
    let line: Value = serde_json::from_str(line.context("no line about the answer")?)?;
    assert_eq!(line["trace_id"], TRACE);
    Ok(())
}

#[tokio::test]
async fn a_trace_goes_on_in_the_processes_behind_the_stream() -> anyhow::Result<()> {
    let collector = Collector::start().await?;
    let mut stack = Stack::start("").await?;
    trace_to(&mut stack.site, &collector.url);
    stack.site.set("OTEL_SERVICE_NAME", "workers");
    let _workers = stack.worker(&[]).await?;
    stack.site.set("OTEL_SERVICE_NAME", "connector");
    let (_api, base) = stack.api(&[]).await?;

    assert_eq!(sign_up(&base, &json!({ "email": "ada@example.com" })).await?, 200);
    collector.named("attempt ", 3).await?;
    collector.named("sign-up", 1).await?;

    let spans = collector.spans();
    let events = stack.site.replay(&[]).await?;
    is_one_trace(&spans, &events[0])?;
    let services: std::collections::BTreeSet<_> =
        spans.iter().map(|it| (&*it.service, it.name.starts_with("attempt"))).collect();
    assert_eq!(services.into_iter().collect::<Vec<_>>(), [("connector", false), ("workers", true)]);
    Ok(())
}

#[tokio::test]
async fn an_attempt_that_comes_late_is_a_trace_of_its_own_with_a_link() -> anyhow::Result<()> {
    let collector = Collector::start().await?;
    let mut site = Site::new(FAILING)?;
    site.set("NOBODY", &format!("http://127.0.0.1:{}/", vestibule_testkit::free_port()));
    trace_to(&mut site, &collector.url);
    let up = site.up().await?;

    assert_eq!(sign_up(&up.base, &json!({ "email": "ada@example.com" })).await?, 200);
    let attempts = collector.named("attempt notify", 2).await?;

    let call = collector.named("sign-up", 1).await?.remove(0);
    assert_eq!((&attempts[0].trace, &attempts[0].parent), (&call.trace, &call.id));
    assert_ne!(attempts[1].trace, call.trace);
    assert_eq!((&*attempts[1].parent, &attempts[1].links), ("", &vec![call.id]));
    assert!(attempts.iter().all(|it| it.failed), "{attempts:#?}");
    Ok(())
}

#[tokio::test]
async fn a_lookup_that_fails_is_a_part_of_the_decision() -> anyhow::Result<()> {
    let collector = Collector::start().await?;
    let mut site = Site::new(super::EVERYTHING)?;
    trace_to(&mut site, &collector.url);
    let up = site.up().await?;

    assert_eq!(sign_up(&up.base, &json!({ "email": "ada@example.com" })).await?, 200);
    let lookup = collector.named("lookup", 1).await?.remove(0);
    let decide = collector.named("decide", 1).await?.remove(0);

    assert_eq!((&lookup.parent, &*lookup.trace, lookup.failed), (&decide.id, TRACE, true));
    assert_eq!(lookup.attributes["vestibule.lookup"], "crm");
    Ok(())
}

#[tokio::test]
async fn a_collector_that_is_away_costs_its_spans_and_nothing_else() -> anyhow::Result<()> {
    let mut site = Site::new("")?;
    trace_to(&mut site, &format!("http://127.0.0.1:{}", vestibule_testkit::free_port()));
    let mut up = site.up().await?;

    for number in 0..20 {
        let person = json!({ "email": format!("person{number}@example.com") });
        assert_eq!(sign_up(&up.base, &person).await?, 200);
    }
    eventually(LIMIT, "spans are given up", async || -> anyhow::Result<bool> {
        Ok(up.metric(r#"vestibule_trace_spans_total{result="failed"}"#).await? >= 60.0)
    })
    .await?;

    let stopped = up.process.terminate(LIMIT).await?;
    assert!(stopped.status.success(), "{}", stopped.stderr);
    let told = stopped.stderr.matches("the collector does not take traces").count();
    assert_eq!(told, 1, "{}", stopped.stderr);
    Ok(())
}
