//! What becomes of the others, and of what was in force, when something about a subscriber is wrong.

use std::{
    io,
    os::unix::fs::{PermissionsExt as _, symlink},
    process::Stdio,
};

use anyhow::Context;
use async_nats::{ConnectOptions, jetstream};
use serde_json::{Value, json};
use time::OffsetDateTime;
use vestibule_store::{Store, StoreOptions, StoreUrl};
use vestibule_testkit::{Process, eventually};

use super::{KEEPS, accept, run, wait_for_running, wait_for_seen};
use crate::{
    scaled_out::Stack,
    support::{LIMIT, Site, example, http},
};

/// A command that keeps its events in a file.
fn keeps(file: &str) -> String {
    format!("[exec]\ncommand = [\"sh\", \"-c\", \"cat >> {file}\"]\n")
}

async fn provisioner(stack: &Stack) -> anyhow::Result<jetstream::Context> {
    let client =
        ConnectOptions::with_user_and_password("provisioner".into(), "provisioner-secret".into())
            .custom_inbox_prefix("_INBOX_provisioner")
            .connect(stack.nats.url())
            .await?;
    Ok(jetstream::new(client))
}

#[tokio::test]
async fn a_consumer_that_cannot_be_made_keeps_no_other_worker_from_its_events() -> anyhow::Result<()>
{
    let stack = Stack::start("").await?;
    let site = &stack.site;
    let context = provisioner(&stack).await?;
    let somebody_elses = jetstream::consumer::pull::Config {
        durable_name: Some("broken".to_owned()),
        max_deliver: 3,
        ..Default::default()
    };
    context.create_consumer_on_stream(somebody_elses, "SIGNUPS").await?;
    site.write("subscribers/audit.toml", &keeps("seen.jsonl"))?;
    site.write("subscribers/broken.toml", &keeps("broken.jsonl"))?;

    let migrate = site.run(&["migrate"]).await?;
    assert_eq!(migrate.code, 1);
    assert!(migrate.stdout.contains("consumer audit created"), "{migrate:?}");
    assert!(migrate.stderr.contains("could not make the consumer broken"), "{migrate:?}");
    let mut up = site.up().await?;
    let said = up.process.wait_for_line(LIMIT, |line| line.contains("cannot run yet")).await?;
    assert!(said.contains("max_deliver is 3") && said.contains("another name"), "{said}");
    accept(&up.base, "ada@example.com").await?;
    wait_for_seen(site, &["ada@example.com"]).await?;
    eventually(LIMIT, "the workers of our own have acted", async || -> anyhow::Result<bool> {
        Ok(up.metrics().await?.matches("outcome=\"done\"} 1").count() == 4)
    })
    .await?;

    context.delete_consumer_from_stream("broken", "SIGNUPS").await?;
    eventually(LIMIT, "it begins once it can", async || site.path().join("broken.jsonl").exists())
        .await
}

#[tokio::test]
async fn one_process_runs_every_subscriber_and_those_in_force_until_others_fit()
-> anyhow::Result<()> {
    let stack = Stack::start("").await?;
    let site = &stack.site;
    let (_api, base) = stack.api(&[]).await?;
    let mut worker = Process::spawn(&site.command(&["worker", "subscribers"]))?;
    worker.wait_for_line(LIMIT, |line| line.contains("the workers run")).await?;
    run(site, &["subscriber", "add", "audit", "--start", "beginning", "--exec", "sh", "-c", KEEPS])
        .await?;
    accept(&base, "ada@example.com").await?;
    wait_for_seen(site, &["ada@example.com"]).await?;

    // Another filter: the consumer has to be brought in line first, and this process may not do that.
    site.write("subscribers/audit.toml", &format!("kinds = []\n{}", keeps("other.jsonl")))?;
    let said = worker.wait_for_line(LIMIT, |line| line.contains("goes on as it was")).await?;
    assert!(said.contains("vestibule migrate"), "{said}");
    accept(&base, "bea@example.com").await?;
    wait_for_seen(site, &["bea@example.com"]).await?;
    run(site, &["subscriber", "add", "audit"]).await?;
    eventually(LIMIT, "the new one is given events", async || {
        accept(&base, &format!("{}@example.com", uuid::Uuid::now_v7())).await?;
        anyhow::Ok(site.path().join("other.jsonl").exists())
    })
    .await?;
    assert!(!worker.stdout().contains("worker=\"notify\""), "{}", worker.stdout());
    Ok(())
}

#[tokio::test]
async fn one_that_is_added_again_is_another_one() -> anyhow::Result<()> {
    let mut site = Site::new("")?;
    site.set("USER", "grace");
    site.write("subscribers/audit.toml", &keeps("seen.jsonl"))?;
    let up = site.up().await?;
    accept(&up.base, "ada@example.com").await?;
    wait_for_seen(&site, &["ada@example.com"]).await?;
    run(&site, &["subscriber", "remove", "audit", "--yes"]).await?;
    wait_for_running(&up, 0.0).await?;
    std::fs::remove_file(site.path().join("seen.jsonl"))?;

    site.write("subscribers/audit.toml", &keeps("seen.jsonl"))?;

    wait_for_seen(&site, &["ada@example.com"]).await
}

/// A process over NATS notes what it had in hand also after the removal: as here, in the store.
#[tokio::test]
async fn what_is_noted_after_a_removal_is_not_held_against_who_is_added() -> anyhow::Result<()> {
    let stack = Stack::start("").await?;
    let site = &stack.site;
    let (_api, base) = stack.api(&[]).await?;
    accept(&base, "ada@example.com").await?;
    let events = eventually(LIMIT, "the event is in the stream", async || {
        let events = site.replay(&[]).await?;
        anyhow::Ok((!events.is_empty()).then_some(events))
    })
    .await?;
    let id = events[0]["id"].as_str().context("no id")?.parse()?;
    let url = StoreUrl::Postgres(stack.postgres.url().into());
    let store = Store::open(&url, StoreOptions::default()).await?;
    store.mark_done("audit", id, OffsetDateTime::now_utc()).await?;

    let command = ["--start", "beginning", "--exec", "sh", "-c", KEEPS];
    let add = [&["subscriber", "add", "audit"], &command[..]].concat();
    run(site, &add).await?;
    let _worker = stack.worker(&["subscribers"]).await?;
    wait_for_seen(site, &["ada@example.com"]).await?;

    // What waits for one whose file only went away is not given up for another one.
    std::fs::remove_file(site.path().join("subscribers/audit.toml"))?;
    let refused = site.run(&add).await?;
    assert!(refused.code == 1 && refused.stderr.contains("subscriber remove audit"), "{refused:?}");
    assert_eq!(std::fs::read_dir(site.path().join("subscribers"))?.count(), 0);
    run(site, &["subscriber", "remove", "audit", "--yes", "--by", "grace"]).await?;
    run(site, &add).await?;
    Ok(())
}

#[tokio::test]
async fn one_that_ends_while_its_change_cannot_be_used_is_told_of() -> anyhow::Result<()> {
    let stack = Stack::start("").await?;
    let site = &stack.site;
    run(site, &["subscriber", "add", "audit", "--exec", "sh", "-c", KEEPS]).await?;
    let mut worker =
        Process::spawn(&site.command(&["--log-format", "json", "worker", "subscribers"]))?;
    let line = worker.wait_for_line(LIMIT, |line| line.contains("the workers run")).await?;
    let line: Value = serde_json::from_str(&line)?;
    let metrics = format!("http://{}/metrics", line["admin"].as_str().context("no address")?);
    let wait_for_running = async |count: u8| {
        let line = format!("vestibule_subscribers_running {count}");
        eventually(LIMIT, &line, async || {
            let metrics = http().get(&metrics).send().await?.text().await?;
            anyhow::Ok(metrics.lines().any(|it| it == line))
        })
        .await
    };
    wait_for_running(1).await?;
    site.write("subscribers/audit.toml", &format!("kinds = []\n{}", keeps("other.jsonl")))?;
    worker.wait_for_line(LIMIT, |line| line.contains("goes on as it was")).await?;

    let provisioner = provisioner(&stack).await?;
    provisioner.delete_consumer_from_stream("audit", "SIGNUPS").await?;

    let ended =
        worker.wait_for_line(LIMIT, |line| line.contains("has ended, and its change")).await?;
    assert!(ended.contains("cannot get its events"), "{ended}");
    worker.wait_for_line(LIMIT, |line| line.contains("cannot run yet")).await?;
    wait_for_running(0).await?;
    run(site, &["subscriber", "add", "audit"]).await?;
    wait_for_running(1).await
}

#[tokio::test]
async fn what_runs_goes_on_while_its_change_or_its_folder_cannot_be_used() -> anyhow::Result<()> {
    let site = Site::new("")?;
    let folder = site.path().join("subscribers");
    site.write("subscribers/audit.toml", &keeps("seen.jsonl"))?;
    std::fs::set_permissions(&folder, std::fs::Permissions::from_mode(0o777))?;
    let mut up = site.up().await?;
    up.process.wait_for_line(LIMIT, |line| line.contains("`chmod go-w` it")).await?;
    wait_for_running(&up, 1.0).await?;

    let needs = "environment = { TOKEN = \"file:token\" }\n";
    site.write("subscribers/audit.toml", &format!("{}{needs}", keeps("other.jsonl")))?;
    up.process.wait_for_line(LIMIT, |line| line.contains("goes on as it was")).await?;
    accept(&up.base, "ada@example.com").await?;
    wait_for_seen(&site, &["ada@example.com"]).await?;

    // A file in its place cannot be read as a folder by anybody, not even by root.
    let away = site.path().join("away");
    std::fs::rename(&folder, &away)?;
    std::fs::write(&folder, "")?;
    eventually(LIMIT, "it is noticed", async || {
        anyhow::Ok(up.metric("vestibule_subscribers_refused").await? == 1.0)
    })
    .await?;
    accept(&up.base, "bea@example.com").await?;
    wait_for_seen(&site, &["bea@example.com"]).await?;
    assert_eq!(up.metric("vestibule_subscribers_running").await?, 1.0);

    std::fs::remove_file(&folder)?;
    std::fs::rename(&away, &folder)?;
    site.write("token", "secret")?;
    eventually(LIMIT, "the changed one is given events", async || {
        accept(&up.base, &format!("{}@example.com", uuid::Uuid::now_v7())).await?;
        anyhow::Ok(site.path().join("other.jsonl").exists())
    })
    .await
}

#[tokio::test]
async fn a_grant_changes_what_a_link_names_or_leaves_nothing_behind() -> anyhow::Result<()> {
    let config = example().replace("data = \"./data\"", "data = \"./data\"\nkey = \"env:KEY\"");
    let site = Site::with_config(&format!("{config}\n[nats]\nurl = \"nats://127.0.0.1:4222\"\n"))?;
    // The server takes this word for something else than a text.
    for name in ["on", "relay-2"] {
        site.write(&format!("subscribers/{name}.toml"), "[nats]\n")?;
    }
    let shipped = include_str!("../../nats.conf").replace("user: relay\n", "user: relay-2\n");
    site.write("etc/nats.conf", &shipped)?;
    let (real, link) = (site.path().join("etc/nats.conf"), site.path().join("nats.conf"));
    std::fs::set_permissions(&real, std::fs::Permissions::from_mode(0o640))?;
    symlink("etc/nats.conf", &link)?;

    let refused = site.run(&["subscriber", "grant", "relay-2", "--apply", "nats.conf"]).await?;
    assert_eq!(refused.code, 1);
    assert!(refused.stderr.contains("has a user relay-2 already"), "{refused:?}");
    assert!(!site.path().join("subscribers/relay-2.password").exists());

    run(&site, &["subscriber", "grant", "on", "--apply", "nats.conf"]).await?;
    assert!(link.is_symlink());
    assert_eq!(std::fs::metadata(&real)?.permissions().mode() & 0o777, 0o640);
    assert!(std::fs::read_to_string(&real)?.contains("user: \"on\"\n"));
    let beside: Vec<_> = std::fs::read_dir(site.path().join("etc"))?.collect();
    assert_eq!(beside.len(), 1, "{beside:?}");
    Ok(())
}

#[tokio::test]
async fn a_reader_who_has_had_enough_breaks_no_command() -> anyhow::Result<()> {
    let site = Site::new("")?;
    let call = json!({ "email": "ada@example.com" }).to_string();
    site.write("payload.json", &call)?;
    for arguments in [
        &["migrate"][..],
        &["check"],
        &["try", "--connector", "partners", "--step", "before-create", "payload.json"],
        &["approvals", "list"],
        &["permissions", "list"],
        &["subscriber", "list"],
        &["worker", "list"],
        &["doctor", "--output", "json"],
        &["completions", "bash"],
    ] {
        let (reader, writer) = io::pipe()?;
        drop(reader);
        let mut command = site.command(arguments);
        command.stdin(Stdio::null()).stdout(writer).stderr(Stdio::piped());
        let ended = tokio::task::spawn_blocking(move || command.output()).await??;
        let said = String::from_utf8_lossy(&ended.stderr).into_owned();
        assert!(ended.status.code().is_some_and(|it| it <= 1), "{arguments:?}: {ended:?}");
        assert!(!said.contains("panicked") && !said.contains("Broken pipe"), "{said}");
    }
    Ok(())
}
