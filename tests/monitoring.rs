//! What operators see: metrics, the dashboard and the alerts over them, traces, log lines.

mod collector;
mod logs;
mod openmetrics;
mod promql;
mod traces;

use std::{collections::BTreeSet, path::PathBuf, process::Command};

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};
use vestibule_testkit::{Issuer, Process, eventually};

use self::openmetrics::{Family, Scrape};
use crate::{
    scaled_out::Stack,
    support::{LIMIT, Site, http, sign_up},
};

/// Something of everything that can be configured and has metrics of its own.
const EVERYTHING: &str = r#"
[lists.partners]
entries = ["contoso.com"]

[lookups.crm]
url = "http://127.0.0.1:9/"
allow_private = true

[approvals]
expires_after = "30d"

[workers.approvals]

[workers.confirm]

[[connectors.partners.rules]]
name = "partners-only"
mode = "audit"
when = "!(signup.email_domain in lists.partners) && lookups.crm.found"
reject = "Not a partner."

[[connectors.partners.rules]]
name = "somebody-looks"
when = "signup.email_domain == 'looked-at.example.com'"
require_approval = "Somebody looks at it."
"#;

/// Labels hold configured names and words of ours. A new one is worth a thought: nothing of a
/// person may be in it, and nothing that has no end.
const LABELS: [&str; 14] = [
    "answer",
    "cause",
    "connector",
    "consumer",
    "credential",
    "kind",
    "list",
    "lookup",
    "mode",
    "outcome",
    "result",
    "rule",
    "step",
    "version",
];
const LABEL_OF_WORKERS: &str = "worker";

/// Names of durations, sizes and shares end in their unit.
const UNITS: [&str; 3] = ["seconds", "bytes", "ratio"];

fn person(name: &str) -> Value {
    json!({
        "email": format!("{name}.secret@looked-at.example.com"),
        "givenName": "Ada-Secret", "surname": "Lovelace-Secret", "jobTitle": "Supplier",
    })
}

/// The metrics of everything, in one process and in many, after a few sign-ups of every kind.
async fn all_metrics() -> anyhow::Result<Scrape> {
    let (mut all, scaled_out, over_tls) =
        tokio::try_join!(embedded_metrics(), scaled_out_metrics(), metrics_over_tls())?;
    all.merge(scaled_out);
    all.merge(over_tls);
    Ok(all)
}

/// With a certificate of our own and the keys of somebody else's tokens.
async fn metrics_over_tls() -> anyhow::Result<Scrape> {
    let issuer = Issuer::start().await?;
    let site = Site::new(&format!(
        "[listen.tls]\ncertificate = \"tls.crt\"\nkey = \"tls.key\"\n\
         [[connectors.partners.credentials]]\nkind = \"bearer\"\nname = \"tokens\"\n\
         metadata = \"{}\"\naudiences = [\"{}\"]\n",
        issuer.metadata_url(),
        Issuer::AUDIENCE
    ))?;
    let key = rcgen::KeyPair::generate()?;
    let certificate = rcgen::CertificateParams::new(vec!["localhost".to_owned()])?;
    site.write("tls.crt", &certificate.self_signed(&key)?.pem())?;
    site.write("tls.key", &key.serialize_pem())?;
    let up = site.up().await?;
    Scrape::parse(&up.metrics().await?)
}

async fn embedded_metrics() -> anyhow::Result<Scrape> {
    let collector = collector::Collector::start().await?;
    let mut site = Site::new(EVERYTHING)?;
    site.set("OTEL_EXPORTER_OTLP_ENDPOINT", &collector.url);
    let up = site.up().await?;
    busy(&up.base).await?;
    eventually(LIMIT, "both wait for an approver", async || -> anyhow::Result<bool> {
        Ok(up.metric("vestibule_approvals_waiting").await? == 2.0)
    })
    .await?;
    Scrape::parse(&up.metrics().await?)
}

async fn scaled_out_metrics() -> anyhow::Result<Scrape> {
    let stack = Stack::start(EVERYTHING).await?;
    let (mut api, base) = stack.api(&["--without-relay"]).await?;
    let mut relay = stack.start_until(&["relay"], "the relay runs").await?;
    let mut worker = stack.worker(&[]).await?;
    busy(&base).await?;
    let mut all = Scrape::default();
    for process in [&mut api, &mut relay, &mut worker] {
        let url = metrics_of(process).await?;
        let metrics = eventually(LIMIT, "events are relayed and handled", async || {
            let metrics = http().get(&url).send().await?.text().await?;
            let counts = |series: &str| {
                let mut values = metrics.lines().filter_map(|line| line.strip_prefix(series));
                values.next().is_none_or(|it| it.trim() != "0")
            };
            let done = counts("vestibule_relay_events_total")
                && counts(
                    r#"vestibule_worker_stream_acknowledgements_total{kind="ack",result="taken"}"#,
                );
            anyhow::Ok(done.then_some(metrics))
        });
        all.merge(Scrape::parse(&metrics.await?)?);
    }
    Ok(all)
}

async fn busy(base: &str) -> anyhow::Result<()> {
    for (name, step) in [("ada", "before-create"), ("eve", "after-federation")] {
        let (status, _) = sign_up(base, step, &person(name)).await?;
        ensure!(status == 200, "{status}");
    }
    let denied = http().post(format!("{base}/connectors/partners/before-create")).send().await?;
    ensure!(denied.status() == 401, "{denied:?}");
    Ok(())
}

/// Where the metrics of a process are that says in its log where its admin listener is.
async fn metrics_of(process: &mut Process) -> anyhow::Result<String> {
    let line = process.wait_for_line(LIMIT, |it| it.contains("admin")).await?;
    let after = line.split_once("admin").context("no address")?.1;
    let is_address = |it: char| it.is_ascii_digit() || matches!(it, '.' | ':');
    let address = after.trim_start_matches(|it: char| !it.is_ascii_digit());
    let address = &address[..address.find(|it| !is_address(it)).unwrap_or(address.len())];
    Ok(format!("http://{address}/metrics"))
}

/// What is wrong with a metric for somebody who has never heard of it.
fn faults(name: &str, family: &Family) -> Vec<String> {
    let Family { kind, help, unit, labels, values } = family;
    let mut faults = Vec::new();
    let mut check = |holds: bool, fault: &str| {
        if !holds {
            faults.push(format!("{name}: {fault}: {help}"));
        }
    };
    check(name.starts_with("vestibule_"), "the name is not ours");
    let words = help.split_whitespace().count();
    check(
        words >= 3 && help.ends_with('.') && !help.starts_with(|it: char| it.is_ascii_lowercase()),
        "the help is no sentence",
    );
    let ends_in_unit = UNITS.iter().any(|unit| name.ends_with(&format!("_{unit}")));
    check(unit.is_empty() || name.ends_with(&format!("_{unit}")), "the name lacks its unit");
    check(!ends_in_unit || !unit.is_empty(), "`# UNIT` is missing");
    let said = help.to_lowercase();
    let measures = ["time ", "age of", "size of", "how long", "how large", "when ", "free space"];
    check(
        !measures.iter().any(|it| said.starts_with(it)) || ends_in_unit,
        "measures something and has no unit",
    );
    check(["counter", "gauge", "histogram", "info"].contains(&&**kind), "a kind of its own");
    for label in labels {
        check(LABELS.contains(&&**label) || label == LABEL_OF_WORKERS, "an unknown label");
    }
    for value in values {
        let personal = value.contains('@') || value.contains("ecret") || value.contains("example");
        check(!personal, "personal data in a label");
    }
    faults
}

#[tokio::test]
async fn every_metric_explains_itself_and_what_is_written_about_them_is_true() -> anyhow::Result<()>
{
    let scrape = all_metrics().await?;

    let faults: Vec<_> = scrape.0.iter().flat_map(|(name, it)| faults(name, it)).collect();
    assert!(faults.is_empty(), "{faults:#?}");

    let series = scrape.series();
    let mut unknown = Vec::new();
    let (dashboard, rules) = (dashboard_queries()?, rule_expressions());
    assert!(dashboard.len() > 40 && rules.len() > 15, "too few to be all");
    for expression in dashboard.iter().chain(&rules) {
        unknown.extend(promql::unknown(expression, &series)?);
    }
    assert!(unknown.is_empty(), "there is no such thing: {unknown:#?}");

    the_manual_lists(&scrape)
}

#[tokio::test]
async fn roles_that_a_target_is_yet_to_be_given_are_counted() -> anyhow::Result<()> {
    let target = "[[workers.permissions.targets]]\nname = \"crm\"\nkind = \"scim\"\n\
                  url = \"http://127.0.0.1:9/\"\ntoken = \"env:CRM_TOKEN\"\n\
                  roles = { \"orders.create\" = \"g\" }\n";
    let mut site = Site::new(target)?;
    site.set("CRM_TOKEN", "of-the-crm");
    let up = site.up().await?;
    assert!(
        up.metrics().await?.contains("vestibule_permissions_pending 0"),
        "as long as nothing is"
    );

    let supplier = json!({ "email": "ada@example.com", "jobTitle": "Supplier" });
    let (status, _) = sign_up(&up.base, "before-create", &supplier).await?;

    assert_eq!(status, 200);
    eventually(LIMIT, "one waits for its target", async || -> anyhow::Result<bool> {
        Ok(up.metric("vestibule_permissions_pending").await? == 1.0)
    })
    .await
}

const DASHBOARD: &str = include_str!("../docs/examples/grafana/vestibule.json");
const RULES: &str = include_str!("../docs/examples/prometheus/vestibule.rules.yml");

/// The queries of all panels and variables, with something in the place of Grafana's variables.
fn dashboard_queries() -> anyhow::Result<Vec<String>> {
    let dashboard: Value = serde_json::from_str(DASHBOARD)?;
    let mut queries = Vec::new();
    for panel in dashboard["panels"].as_array().context("no panels")? {
        let targets = panel["targets"].as_array().map(Vec::as_slice).unwrap_or_default();
        let title = panel["title"].as_str().context("a panel without a title")?;
        ensure!(!targets.is_empty() || panel["type"] == "row", "{title} shows nothing");
        for target in targets {
            queries.push(target["expr"].as_str().context("no query")?.to_owned());
        }
    }
    for variable in dashboard["templating"]["list"].as_array().context("no variables")? {
        if let Some(definition) = variable["definition"].as_str() {
            let inside = definition.strip_prefix("label_values(").context("another query")?;
            let (metric, label) =
                inside.trim_end_matches(')').split_once(", ").context("no label")?;
            queries.push(format!("max by ({label}) ({metric})"));
        }
    }
    let filled = |it: String| it.replace("$__rate_interval", "5m").replace('$', "");
    Ok(queries.into_iter().map(filled).collect())
}

/// The expressions of the alerts: one line each, or a block that is indented further.
fn rule_expressions() -> Vec<String> {
    let mut lines = RULES.lines().peekable();
    let mut expressions = Vec::new();
    while let Some(line) = lines.next() {
        let Some(expression) = line.trim_start().strip_prefix("expr:") else { continue };
        let mut expression = expression.trim().trim_start_matches('|').to_owned();
        let indent = line.len() - line.trim_start().len();
        while let Some(more) = lines.next_if(|it| it.len() - it.trim_start().len() > indent) {
            expression.push(' ');
            expression.push_str(more.trim());
        }
        expressions.push(expression);
    }
    expressions
}

/// The table of all metrics in the manual is what a scrape says. `UPDATE_DOCS=1` writes it anew.
fn the_manual_lists(scrape: &Scrape) -> anyhow::Result<()> {
    const BEGIN: &str = "<!-- metrics: begin -->\n";
    const END: &str = "<!-- metrics: end -->";
    let file = root().join("docs/monitoring.md");
    let manual = std::fs::read_to_string(&file)?;
    let (before, rest) = manual.split_once(BEGIN).context("the table's begin is not marked")?;
    let (table, after) = rest.split_once(END).context("the table's end is not marked")?;
    let mut now = String::from("| metric | type | labels | says |\n|---|---|---|---|\n");
    for (name, family) in &scrape.0 {
        let labels: Vec<_> = family.labels.iter().map(|it| format!("`{it}`")).collect();
        let name = match &*family.kind {
            "counter" => format!("{name}_total"),
            "info" => format!("{name}_info"),
            _ => name.clone(),
        };
        let says = family.help.trim_end_matches('.').replace('|', "\\|");
        now += &format!("| `{name}` | {} | {} | {says} |\n", family.kind, labels.join(", "));
    }
    if std::env::var_os("UPDATE_DOCS").is_some() {
        std::fs::write(&file, format!("{before}{BEGIN}{now}{END}{after}"))?;
    } else {
        assert_eq!(table, now, "docs/monitoring.md: run this test with UPDATE_DOCS=1");
    }
    Ok(())
}

#[test]
fn every_alert_says_what_it_means_and_where_to_read_on() {
    let manual = std::fs::read_to_string(root().join("docs/monitoring.md")).unwrap();
    let anchors: BTreeSet<_> = manual
        .lines()
        .filter_map(|line| Some(line.strip_prefix("### ")?.to_lowercase().replace(' ', "-")))
        .collect();
    let alerts: Vec<_> = RULES.split("- alert: ").skip(1).collect();
    assert!(alerts.len() > 15);
    for alert in alerts {
        let name = alert.lines().next().unwrap_or_default();
        for part in ["expr:", "severity:", "summary:", "impact:", "first_steps:"] {
            assert!(alert.contains(part), "{name} has no {part}");
        }
        let anchor = format!("docs/monitoring.md#{}", name.to_lowercase());
        assert!(alert.contains(&anchor), "{name} does not lead to {anchor}");
        assert!(anchors.contains(&name.to_lowercase()), "{name} is not explained in the manual");
    }
}

#[tokio::test]
async fn prometheus_takes_the_alerts_and_they_fire_when_they_should() -> anyhow::Result<()> {
    let folder = root().join("docs/examples/prometheus");
    let tests = root().join("tests/monitoring");
    for (arguments, file) in [
        (["check", "rules"], folder.join("vestibule.rules.yml")),
        (["check", "config"], folder.join("prometheus.yml")),
        (["test", "rules"], tests.join("rules.test.yml")),
    ] {
        let mut promtool = Command::new(vestibule_testkit::promtool()?);
        let promtool = promtool.args(arguments).arg(&file).current_dir(root());
        let done = Process::spawn(promtool)?.wait(LIMIT).await?;
        ensure!(done.status.success(), "{}: {} {}", file.display(), done.stdout, done.stderr);
    }
    Ok(())
}

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..")
}
