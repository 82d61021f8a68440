//! Everything in one process, with the configuration of the repository.

use std::{process::Command, time::Duration};

use anyhow::{Context, ensure};
use serde_json::{Value, json};
use vestibule_store::{Store, StoreOptions, StoreUrl};
use vestibule_testkit::{Process, eventually};

use crate::support::{EXAMPLE, LIMIT, Site, assert_names_are_ours_and_stand_once, http};

const README: &str = include_str!("../README.md");

#[tokio::test]
async fn the_readmes_curl_line_gets_the_readmes_answer() -> anyhow::Result<()> {
    let site = Site::new("")?;
    let up = site.up().await?;

    let blocks: Vec<&str> = README.split("```").collect();
    let curl = blocks.iter().find(|it| it.contains("\ncurl -u")).context("no curl line")?;
    let expected = blocks.iter().find(|it| it.starts_with("json")).context("no answer")?;
    let curl = curl.trim_start_matches("sh").replace("http://127.0.0.1:7171", &up.base);
    let answer = Process::spawn(Command::new("sh").args(["-c", &format!("{curl} -sS")]))?
        .wait(LIMIT)
        .await?;

    let answer: Value = serde_json::from_str(&answer.stdout)
        .with_context(|| format!("curl: {} {}", answer.stdout, answer.stderr))?;
    let expected: Value = serde_json::from_str(expected.trim_start_matches("json"))?;
    assert_eq!(answer, expected);
    Ok(())
}

#[tokio::test]
async fn a_sign_up_becomes_one_event_and_three_effects() -> anyhow::Result<()> {
    let site = Site::new("")?;
    let up = site.up().await?;
    let person = json!({
        "email": "ada@example.com", "givenName": "Ada", "surname": "Lovelace",
        "jobTitle": "Supplier", "ui_locales": "en-GB",
    });

    let (status, answer) = up.sign_up("before-create", &person).await?;
    let again = up.sign_up("before-create", &person).await?;
    let events = site.replay(&[]).await?;

    assert_eq!(status, 200);
    assert_eq!(answer["action"], "Continue");
    assert_eq!(answer["displayName"], "Ada Lovelace");
    assert_eq!(again, (status, answer), "a repeated call gets the same answer");
    assert_eq!(events.len(), 1, "a repeated call makes no second event");
    assert_eq!(events[0]["type"], "dev.vestibule.signup.accepted");
    assert_eq!(events[0]["data"]["decision"]["reasons"][0]["rule"], "fill-in-the-display-name");

    let id = events[0]["id"].as_str().context("no id")?.parse()?;
    let store =
        Store::open(&StoreUrl::Sqlite(site.data().join("store.db")), StoreOptions::default())
            .await?;
    eventually(LIMIT, "all three workers have acted", async || -> anyhow::Result<bool> {
        let effects = store.effects(&[id]).await?;
        let Some(it) = effects.get(&id) else { return Ok(false) };
        ensure!(it.dead_letters == 0, "parked");
        Ok((it.person_changes, it.grant_sets, it.notifications) == (1, 1, 1))
    })
    .await
}

#[tokio::test]
async fn a_stop_lets_answers_and_events_in_progress_finish() -> anyhow::Result<()> {
    let site = Site::new("")?;
    let mut up = site.up().await?;
    up.sign_up("before-create", &json!({ "email": "ada@example.com" })).await?;

    let stopped = up.process.terminate(LIMIT).await?;

    ensure!(stopped.status.success(), "{}", stopped.stderr);
    ensure!(stopped.stderr.contains("stopped"), "{}", stopped.stderr);
    let up = site.up().await?;
    let (status, _) = up.sign_up("before-create", &json!({ "email": "eve@example.com" })).await?;
    assert_eq!(status, 200);
    assert_eq!(site.replay(&[]).await?.len(), 2);
    Ok(())
}

#[tokio::test]
async fn health_and_metrics_say_what_happens() -> anyhow::Result<()> {
    let site = Site::new("")?;
    let up = site.up().await?;
    up.sign_up("before-create", &json!({ "email": "ada@mailinator.com" })).await?;

    for path in ["healthz", "readyz"] {
        let answer = http().get(format!("{}/{path}", up.admin)).send().await?;
        assert_eq!(answer.status(), 200, "{path}");
    }
    let metrics = up.metrics().await?;
    assert_names_are_ours_and_stand_once(&metrics);
    assert!(metrics.contains("answer=\"block\""), "{metrics}");
    assert!(!metrics.contains("mailinator"), "personal data in metrics");
    Ok(())
}

#[tokio::test]
async fn nothing_personal_is_logged_even_when_everything_is() -> anyhow::Result<()> {
    let mut site = Site::new("")?;
    site.set("VESTIBULE_LOG", "trace");
    let mut up = site.up().await?;
    let secrets = ["ada.secret@", "Lovelace-Secret", "998877665544", "try-me"];
    let person = json!({
        "email": "ada.secret@example.com", "givenName": "Ada", "surname": "Lovelace-Secret",
        "identities": [{ "signInType": "federated", "issuer": "google.com", "issuerAssignedId": "998877665544" }],
    });
    up.sign_up("before-create", &person).await?;
    eventually(LIMIT, "workers have acted", async || -> anyhow::Result<bool> {
        let metrics = up.metrics().await?;
        let done =
            metrics.lines().filter(|it| it.contains("outcome=\"done\"") && it.ends_with(" 1"));
        Ok(done.count() == 3)
    })
    .await?;

    let stopped = up.process.terminate(LIMIT).await?;

    for secret in secrets {
        let leak = stopped.stderr.lines().find(|line| line.contains(secret));
        assert_eq!(leak, None, "{secret} was logged");
    }
    Ok(())
}

/// Ten thousand sign-ups of every shape: each accepted one is acted on exactly once.
#[tokio::test]
async fn ten_thousand_sign_ups_are_each_acted_on_exactly_once() -> anyhow::Result<()> {
    let site = Site::new("")?;
    let up = site.up().await?;
    let simulate = site
        .run_within(
            Duration::from_secs(220),
            &[
                "simulate",
                "--url",
                &up.connector(),
                "--count",
                "10000",
                "--seed",
                "7",
                "--output",
                "json",
            ],
        )
        .await?;
    let summary: Value = serde_json::from_str(&simulate.stdout)
        .with_context(|| format!("{} {}", simulate.stdout, simulate.stderr))?;
    ensure!(simulate.code == 0 && summary["ok"] == json!(true), "{summary:#}");
    let accepted = summary["accepted_answered"].as_u64().context("no count")?;
    assert!(accepted > 3000, "{summary:#}");
    for worker in ["database", "permissions", "notify"] {
        assert_eq!(summary["acted_on"][worker], json!(accepted), "{worker}");
    }
    Ok(())
}

#[tokio::test]
async fn two_processes_do_not_share_a_data_folder() -> anyhow::Result<()> {
    let site = Site::new("")?;
    let _up = site.up().await?;

    let second = site.run(&["up"]).await?;

    assert_eq!(second.code, 1);
    assert!(second.stderr.contains("events.db"), "{}", second.stderr);
    Ok(())
}

#[tokio::test]
async fn the_example_names_the_documented_defaults() -> anyhow::Result<()> {
    let site = Site::with_config(EXAMPLE)?;
    let check = site.run(&["check"]).await?;
    assert_eq!(check.code, 0, "{}", check.stderr);
    for fact in
        ["http://127.0.0.1:7171/connectors/partners", "http://127.0.0.1:7172", "./data/events.db"]
    {
        assert!(check.stdout.contains(fact), "{fact} is not in\n{}", check.stdout);
    }
    Ok(())
}
