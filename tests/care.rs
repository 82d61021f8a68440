//! What keeps a data folder well: backups, and a disk that is watched.

use std::{collections::HashSet, path::Path, time::Duration};

use anyhow::{Context, ensure};
use serde_json::{Value, json};
use uuid::Uuid;
use vestibule_store::{Store, StoreOptions, StoreUrl};
use vestibule_testkit::{Process, eventually};

use crate::support::{LIMIT, Site, http};

/// The manifest that a backup prints.
async fn back_up(site: &Site, folder: &str) -> anyhow::Result<Value> {
    let made = site.run(&["backup", folder, "--output", "json"]).await?;
    ensure!(made.code == 0, "{}", made.stderr);
    Ok(serde_json::from_str(&made.stdout)?)
}

fn restore(backup: &Path, to: &Site, manifest: &Value) -> anyhow::Result<()> {
    std::fs::create_dir(to.data())?;
    for file in manifest["files"].as_array().context("no files")? {
        let name = file["name"].as_str().context("no name")?;
        std::fs::copy(backup.join(name), to.data().join(name))?;
    }
    Ok(())
}

async fn acted_once(site: &Site, ids: &[Uuid]) -> anyhow::Result<()> {
    let url = StoreUrl::Sqlite(site.data().join("store.db"));
    let store = Store::open(&url, StoreOptions::default()).await?;
    let done = eventually(Duration::from_secs(100), "every event is acted on", async || {
        let effects = store.effects(ids).await?;
        let acted = |it: &vestibule_store::Effects| {
            it.person_changes > 0 && it.grant_sets > 0 && it.notifications > 0
        };
        anyhow::Ok((effects.len() == ids.len() && effects.values().all(acted)).then_some(effects))
    })
    .await?;
    for (id, effects) in done {
        let counts = (effects.person_changes, effects.grant_sets, effects.notifications);
        ensure!(counts == (1, 1, 1) && effects.dead_letters == 0, "{id}: {effects:?}");
    }
    Ok(())
}

#[tokio::test]
async fn a_backup_made_under_load_has_all_and_goes_on_where_it_was() -> anyhow::Result<()> {
    let site = Site::new("")?;
    let up = site.up().await?;
    let mut simulate = Process::spawn(&site.command(&[
        "simulate",
        "--url",
        &up.connector(),
        "--count",
        "4000",
        "--seed",
        "5",
        "--output",
        "json",
    ]))?;
    eventually(LIMIT, "many have signed up", async || {
        let answered = up.metric("vestibule_log_appends_total{result=\"stored\"}").await?;
        anyhow::Ok(answered > 800.0)
    })
    .await?;

    let manifest = back_up(&site, "copy").await?;
    let last = manifest["last_sequence"].as_u64().context("no sequence")?;
    ensure!(simulate.is_running(), "the load was over before the backup");
    let finished = simulate.wait(Duration::from_secs(150)).await?;
    let summary: Value = serde_json::from_str(&finished.stdout)?;
    ensure!(summary["ok"] == json!(true), "the backup disturbed the sign-ups: {summary:#}");
    drop(up);

    let verified = site.run(&["backup", "--verify", "copy"]).await?;
    ensure!(verified.code == 0 && verified.stdout.contains("is whole"), "{}", verified.stderr);
    let restored = Site::new("")?;
    restore(&site.path().join("copy"), &restored, &manifest)?;
    let up = restored.up().await?;
    let (status, _) = up.sign_up("before-create", &json!({ "email": "new@example.com" })).await?;
    ensure!(status == 200);

    let (all, copied) = (site.replay(&[]).await?, restored.replay(&[]).await?);
    ensure!(last >= 800 && copied.len() as u64 == last + 1, "{} of {last}", copied.len());
    ensure!(copied[..last as usize] == all[..last as usize], "the copy has other events");
    let accepted = copied.iter().filter(|it| it["type"] == "dev.vestibule.signup.accepted");
    let ids: HashSet<Uuid> = accepted
        .map(|it| Ok(it["id"].as_str().context("no id")?.parse()?))
        .collect::<anyhow::Result<_>>()?;
    acted_once(&restored, &ids.into_iter().collect::<Vec<_>>()).await
}

#[tokio::test]
async fn a_backup_is_never_written_over_something_and_a_changed_one_is_found_out()
-> anyhow::Result<()> {
    let site = Site::new("")?;
    let none = site.run(&["backup", "copy"]).await?;
    ensure!(none.code == 1 && none.stderr.contains("there is no log"), "{}", none.stderr);
    ensure!(!site.path().join("copy").exists(), "left half a backup");
    let up = site.up().await?;
    up.sign_up("before-create", &json!({ "email": "ada@example.com" })).await?;

    let made = site.run(&["backup", "copy"]).await?;
    ensure!(made.code == 0, "{}", made.stderr);
    for part in [
        "up to sequence 1 (1 of them)",
        "To restore it",
        "cp copy/events.db copy/store.db copy/pseudonym.key",
    ] {
        ensure!(made.stdout.contains(part), "{part} is not in {}", made.stdout);
    }
    let again = site.run(&["backup", "copy"]).await?;
    ensure!(again.code == 1 && again.stderr.contains("a new one"), "{}", again.stderr);

    use std::os::unix::fs::{FileExt, PermissionsExt};
    for entry in std::fs::read_dir(site.path().join("copy"))? {
        let mode = entry?.metadata()?.permissions().mode();
        ensure!(mode & 0o077 == 0, "others may read it: {mode:o}");
    }
    let log = site.path().join("copy/events.db");
    let file = std::fs::OpenOptions::new().write(true).open(log)?;
    file.write_all_at(b"x", file.metadata()?.len() - 700)?;
    let verified = site.run(&["backup", "--verify", "copy"]).await?;
    ensure!(verified.code == 1, "{}", verified.stdout);
    ensure!(verified.stderr.contains("events.db is not as it was made"), "{}", verified.stderr);

    std::fs::remove_file(site.path().join("copy/manifest.json"))?;
    let unfinished = site.run(&["backup", "--verify", "copy"]).await?;
    ensure!(unfinished.stderr.contains("not finished"), "{}", unfinished.stderr);
    Ok(())
}

#[tokio::test]
async fn a_large_log_is_told_of_before_the_disk_is_full() -> anyhow::Result<()> {
    let site = Site::new("[log]\nwarn_size = \"1KiB\"\n")?;
    let mut up = site.up().await?;
    up.sign_up("before-create", &json!({ "email": "ada@example.com" })).await?;

    let said = eventually(LIMIT, "readiness says so", async || {
        let answer = http().get(format!("{}/readyz", up.admin)).send().await?;
        ensure!(answer.status() == 200, "sign-ups are answered all the same");
        let report: Value = answer.json().await?;
        Ok((report["status"] == "degraded").then(|| report["checks"]["log"].clone()))
    })
    .await?;

    ensure!(said.as_str().is_some_and(|it| it.contains("log.warn_size")), "{said}");
    for metric in ["vestibule_log_bytes", "vestibule_log_free_bytes"] {
        ensure!(up.metric(metric).await? > 1024.0, "{metric}");
    }
    let stopped = up.process.terminate(LIMIT).await?;
    ensure!(stopped.stderr.contains("log.warn_size"), "{}", stopped.stderr);
    Ok(())
}

#[tokio::test]
async fn a_damaged_log_ends_the_start_with_what_to_do_and_salvaging_works() -> anyhow::Result<()> {
    let site = Site::new("")?;
    let mut up = site.up().await?;
    for number in 0..100 {
        let person = json!({ "email": format!("person{number}@example.com") });
        up.sign_up("before-create", &person).await?;
    }
    up.process.terminate(LIMIT).await?;
    let log = site.data().join("events.db");
    let length = std::fs::metadata(&log)?.len();
    let file = std::fs::OpenOptions::new().write(true).open(&log)?;
    std::os::unix::fs::FileExt::write_all_at(&file, &[0x5a; 3 * 4096], length - 3 * 4096)?;

    let start = site.run(&["up"]).await?;
    ensure!(start.code == 1, "started with a damaged log");
    for part in ["events.db", "damaged", "vestibule backup --salvage"] {
        ensure!(start.stderr.contains(part), "{part} is not in {}", start.stderr);
    }

    let salvaged = site.run(&["backup", "--salvage", "rescued"]).await?;
    ensure!(salvaged.code == 0, "{}", salvaged.stderr);
    ensure!(salvaged.stdout.contains("LOST: events"), "{}", salvaged.stdout);
    std::fs::rename(&log, log.with_extension("damaged"))?;
    std::fs::copy(site.path().join("rescued/events.db"), &log)?;
    let up = site.up().await?;
    let (status, _) = up.sign_up("before-create", &json!({ "email": "new@example.com" })).await?;
    ensure!(status == 200 && site.replay(&[]).await?.len() > 50);
    Ok(())
}
