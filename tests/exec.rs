//! A command as a subscriber, through the binary: what it is given, how often, and what its exit code
//! does.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, ensure};
use serde_json::json;
use vestibule_store::{LetterFilter, LetterState, Store, StoreOptions, StoreUrl};
use vestibule_testkit::eventually;

use crate::support::{LIMIT, Site};

/// So many commands run at a time.
const CONCURRENCY: usize = 4;

const SUBSCRIBER: &str = r#"
kinds = ["accepted"]
concurrency = 4
retry = { initial = "20ms" }

[exec]
command = ["sh", "journal.sh"]
directory = "."
"#;

/// A site whose subscriber `journal` runs this script.
fn site(script: &str) -> anyhow::Result<Site> {
    let site = Site::new("")?;
    site.write("subscribers/journal.sh", script)?;
    site.write("subscribers/journal.toml", SUBSCRIBER)?;
    Ok(site)
}

/// How often each event stands in a file of the script.
fn counts(site: &Site, file: &str) -> BTreeMap<String, usize> {
    let text = std::fs::read_to_string(site.path().join("subscribers").join(file));
    let mut counts = BTreeMap::new();
    for line in text.unwrap_or_default().lines() {
        *counts.entry(line.to_owned()).or_default() += 1;
    }
    counts
}

/// The ids of the accepted sign-ups so far.
async fn accepted(site: &Site) -> anyhow::Result<BTreeSet<String>> {
    let events = site.replay(&["--kind", "accepted"]).await?;
    events.iter().map(|it| Ok(it["id"].as_str().context("no id")?.to_owned())).collect()
}

async fn store(site: &Site) -> anyhow::Result<Store> {
    let url = StoreUrl::Sqlite(site.data().join("store.db"));
    Ok(Store::open(&url, StoreOptions::default()).await?)
}

#[tokio::test]
async fn a_command_is_done_with_each_event_once_and_its_exit_code_says_when() -> anyhow::Result<()>
{
    let site = site(
        r#"event=$(cat)
echo "$VESTIBULE_EVENT_ID" >>runs
case $event in
*later-*) [ "$(grep -c "$VESTIBULE_EVENT_ID" runs)" -gt 1 ] || exit 75 ;;
*never-*) exit 65 ;;
esac
echo "$VESTIBULE_EVENT_ID" >>done
"#,
    )?;
    // Each stop lets what has begun finish, and hands back what has not: the events come again.
    for round in 0..3 {
        let mut up = site.up().await?;
        for n in 0..8 {
            for name in ["now", "later", "never"] {
                let person = json!({ "email": format!("{name}-{round}-{n}@example.com") });
                let (status, answer) = up.sign_up("before-create", &person).await?;
                ensure!((status, &answer["action"]) == (200, &json!("Continue")), "{answer}");
            }
        }
        let stopped = up.process.terminate(LIMIT).await?;
        ensure!(stopped.status.success(), "{}", stopped.stderr);
        ensure!(!stopped.stderr.contains("now-"), "personal data in the log: {}", stopped.stderr);
    }
    let _up = site.up().await?;

    let (store, accepted) = (store(&site).await?, accepted(&site).await?);
    ensure!(accepted.len() == 72);
    let parked = LetterFilter {
        worker: Some("journal".to_owned()),
        cause_class: Some("refused".to_owned()),
        state: Some(LetterState::Parked),
        ..LetterFilter::default()
    };
    eventually(LIMIT, "each event is done or parked", async || -> anyhow::Result<bool> {
        Ok(counts(&site, "done").len() == 48
            && store.letters(&parked, None, 100).await?.len() == 24)
    })
    .await?;
    let (runs, done) = (counts(&site, "runs"), counts(&site, "done"));
    ensure!(done.values().all(|times| *times == 1), "done twice: {done:?}");
    ensure!(runs.keys().cloned().collect::<BTreeSet<_>>() == accepted);
    let twice = runs.values().filter(|times| **times == 2).count();
    ensure!((twice, runs.values().sum::<usize>()) == (24, 96), "{runs:?}");
    Ok(())
}

#[tokio::test]
async fn killed_in_the_middle_no_event_is_lost_and_only_those_in_hand_come_again()
-> anyhow::Result<()> {
    const KILLS: usize = 3;
    let site = site("sleep 0.02\necho \"$VESTIBULE_EVENT_ID\" >>done\n")?;
    for kill in 1..=KILLS {
        let mut up = site.up().await?;
        let before = counts(&site, "done").len();
        for n in 0..40 {
            let person = json!({ "email": format!("person-{kill}-{n}@example.com") });
            up.sign_up("before-create", &person).await?;
        }
        eventually(LIMIT, "some more events are done", async || {
            counts(&site, "done").len() > before + 5
        })
        .await?;
        up.process.kill();
    }
    let _up = site.up().await?;

    let (store, accepted) = (store(&site).await?, accepted(&site).await?);
    ensure!(accepted.len() == 40 * KILLS);
    for event in &accepted {
        let id = event.parse()?;
        eventually(LIMIT, "each event is noted as done", async || {
            store.is_done("journal", id).await
        })
        .await?;
    }
    let done = counts(&site, "done");
    ensure!(done.keys().cloned().collect::<BTreeSet<_>>() == accepted, "{done:?}");
    let again: usize = done.values().map(|times| times - 1).sum();
    ensure!(again <= KILLS * CONCURRENCY, "{again} commands were run again: {done:?}");
    Ok(())
}
