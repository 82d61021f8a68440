//! `vestibule doctor` against servers as they should be, and as they should not.

use std::{collections::BTreeMap, os::unix::fs::PermissionsExt};

use anyhow::Context;
use async_nats::jetstream::{self, stream::DiscardPolicy};
use serde_json::{Value, json};
use vestibule_testkit::Nats;

use crate::{
    scaled_out::{ROLES, Stack},
    support::{LIMIT, Site, sign_up},
};

/// What a doctor said of each check, and how it ended.
struct Report {
    code: i32,
    findings: BTreeMap<String, Value>,
}

impl Report {
    async fn of(site: &Site, monitoring: Option<&str>) -> anyhow::Result<Self> {
        let mut arguments = vec!["doctor", "--output", "json"];
        arguments.extend(monitoring.iter().flat_map(|url| ["--monitoring", url]));
        let doctor = site.run(&arguments).await?;
        let said: Value = serde_json::from_str(&doctor.stdout)
            .with_context(|| format!("{} {}", doctor.stdout, doctor.stderr))?;
        let findings = said["findings"].as_array().context("no findings")?.iter();
        let findings = findings
            .map(|it| Some((it["check"].as_str()?.to_owned(), it.clone())))
            .collect::<Option<_>>();
        Ok(Self { code: doctor.code, findings: findings.context("a check without a name")? })
    }

    fn state(&self, check: &str) -> &str {
        self.findings.get(check).and_then(|it| it["state"].as_str()).unwrap_or("not looked at")
    }

    fn found(&self, check: &str) -> &str {
        self.findings.get(check).and_then(|it| it["found"].as_str()).unwrap_or_default()
    }

    fn critical(&self) -> Vec<&str> {
        let critical = self.findings.iter().filter(|(_, it)| it["state"] == "critical");
        critical.map(|(check, _)| check.as_str()).collect()
    }
}

async fn operator(nats: &Nats) -> anyhow::Result<jetstream::Context> {
    // The shipped users may not do what an operator can; the provisioner may change the stream.
    let password = "provisioner-secret".to_owned();
    let options =
        async_nats::ConnectOptions::with_user_and_password("provisioner".into(), password);
    let options = options.custom_inbox_prefix("_INBOX_provisioner");
    Ok(jetstream::new(options.connect(nats.url()).await?))
}

#[tokio::test]
async fn an_installation_as_shipped_is_well_while_it_runs() -> anyhow::Result<()> {
    let stack = Stack::start("").await?;
    let monitoring = stack.nats.http_url()?;
    let (_api, base) = stack.api(&[]).await?;
    let _workers = stack.worker(&[]).await?;
    stack.simulate(&base, "20").await?;

    let report = Report::of(&stack.site, Some(&monitoring)).await?;

    // Test servers forget in a power cut, to be quick: that, and only that, is wrong.
    let quick = ["store.fsync", "store.full_page_writes"];
    assert_eq!(report.critical(), quick, "{:#?}", report.findings);
    let roles = ROLES.map(|role| format!("nats.{role}"));
    let mut fine: Vec<_> = roles.iter().map(String::as_str).collect();
    fine.extend(["data.folder", "data.sync", "log.integrity", "log.relay", "nats.sync_interval"]);
    fine.extend(["stream.settings", "stream.max_bytes", "clock.nats", "clock.store"]);
    fine.extend(["consumer.notify", "consumer.database", "store.schema"]);
    for check in fine {
        // Neighbours may keep the disk busy.
        if check == "data.sync" && report.state(check) == "warning" {
            continue;
        }
        assert_eq!(report.state(check), "ok", "{check}: {:?}", report.findings.get(check));
    }
    // One server and one copy: allowed, and said.
    assert_eq!(report.state("stream.replicas"), "warning");
    Ok(())
}

#[tokio::test]
async fn servers_that_lose_are_found_with_what_to_change() -> anyhow::Result<()> {
    let conf =
        include_str!("../nats.conf").replace("sync_interval: always", "sync_interval: \"2m\"");
    // The relay may delete streams; the worker may not acknowledge.
    let conf = conf.replacen("\"signups.*.*\"", "\"signups.*.*\", \"$JS.API.STREAM.>\"", 1);
    let conf = conf.replacen("\"$JS.ACK.SIGNUPS.*.>\"", "", 1);
    let stack = Stack::start_with(&conf, "").await?;
    stack.migrate().await?;
    let context = operator(&stack.nats).await?;
    let mut settings = context.get_stream("SIGNUPS").await?.cached_info().config.clone();
    settings.discard = DiscardPolicy::Old;
    settings.max_age = std::time::Duration::from_secs(86_400);
    context.update_stream(settings).await?;
    let monitoring = stack.nats.http_url()?;
    std::fs::set_permissions(stack.site.data(), std::fs::Permissions::from_mode(0o755))?;

    let report = Report::of(&stack.site, Some(&monitoring)).await?;

    assert_eq!(report.code, 1);
    for check in
        ["nats.sync_interval", "stream.discard", "stream.max_age", "nats.relay", "nats.worker"]
    {
        assert_eq!(report.state(check), "critical", "{check}: {:#?}", report.findings);
        assert!(report.findings[check]["remedy"].as_str().is_some_and(|it| !it.is_empty()));
    }
    assert!(
        report.found("nats.relay").contains("delete streams"),
        "{}",
        report.found("nats.relay")
    );
    assert!(report.found("nats.worker").contains("may not acknowledge events"));
    assert_eq!(report.state("data.folder"), "warning");
    // A relay looks for itself before it publishes, and says what it waits for.
    let (mut api, base) = stack.api(&[]).await?;
    let person = json!({ "email": "ada@example.com" });
    assert_eq!(sign_up(&base, "before-create", &person).await?.0, 200);
    let held_back = |line: &str| line.contains("discard is Old and should be New");
    api.wait_for_line(LIMIT, held_back).await?;
    assert_eq!(context.get_stream("SIGNUPS").await?.cached_info().state.messages, 0);

    let blind = Report::of(&stack.site, Some("http://127.0.0.1:1")).await?;
    assert_eq!(blind.state("nats.sync_interval"), "warning", "it cannot be seen");

    let table = stack.site.run(&["doctor"]).await?;
    assert!(table.stdout.contains("→ "), "{}", table.stdout);
    assert!(table.stdout.contains("stream.discard"), "{}", table.stdout);
    Ok(())
}

#[tokio::test]
async fn what_is_not_there_is_a_finding_and_no_error() -> anyhow::Result<()> {
    let mut stack = Stack::start_bare("").await?;

    let bare = Report::of(&stack.site, None).await?;
    assert_eq!(bare.state("stream"), "critical", "{:#?}", bare.findings);
    assert_eq!(bare.state("store.schema"), "critical", "{:#?}", bare.findings);

    stack.site.set("VESTIBULE_NATS_RELAY_PASSWORD", "guess");
    let stranger = Report::of(&stack.site, None).await?;
    assert_eq!(stranger.state("nats.relay"), "critical", "{:#?}", stranger.findings);
    assert!(stranger.found("nats.relay").contains("does not accept"), "{:?}", stranger.findings);

    stack.nats.pause();
    let silent = Report::of(&stack.site, None).await?;
    assert_eq!(silent.state("nats"), "critical", "{:#?}", silent.findings);
    stack.nats.resume();

    stack.nats.stop();
    stack.postgres.kill();
    let alone = Report::of(&stack.site, None).await?;
    assert_eq!((alone.code, alone.critical()), (1, vec!["nats", "store"]), "{:#?}", alone.findings);
    Ok(())
}

#[tokio::test]
async fn an_embedded_installation_is_looked_at_while_it_runs() -> anyhow::Result<()> {
    let site = Site::new("")?;
    let fresh = Report::of(&site, None).await?;
    assert_eq!((fresh.code, fresh.state("log")), (0, "ok"), "{:#?}", fresh.findings);
    assert!(!site.data().exists(), "looking has made something");

    let up = site.up().await?;
    up.sign_up("before-create", &json!({ "email": "ada@example.com" })).await?;
    let running = Report::of(&site, None).await?;
    assert_eq!((running.code, running.critical()), (0, vec![]), "{:#?}", running.findings);
    for check in ["data.folder", "log.integrity", "log.size", "store.schema"] {
        assert_eq!(running.state(check), "ok", "{check}: {:#?}", running.findings);
    }
    let (status, _) = up.sign_up("before-create", &json!({ "email": "eve@example.com" })).await?;
    assert_eq!(status, 200);
    Ok(())
}

#[tokio::test]
async fn a_configuration_with_mistakes_and_a_damaged_log_are_critical() -> anyhow::Result<()> {
    let site = Site::with_config("lissten = 1\n")?;
    let wrong = Report::of(&site, None).await?;
    assert_eq!((wrong.code, wrong.critical()), (1, vec!["configuration"]));

    let site = Site::new("")?;
    std::fs::create_dir_all(site.data())?;
    std::fs::write(
        site.data().join("events.db"),
        "this is no database at all, by its first bytes",
    )?;
    let damaged = Report::of(&site, None).await?;
    assert_eq!((damaged.code, damaged.critical()), (1, vec!["log"]), "{:#?}", damaged.findings);
    Ok(())
}
