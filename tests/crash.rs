//! `kill -9` in the middle: what was answered, what is in the log and what was acted on agree.

use std::time::Duration;

use anyhow::{Context, ensure};
use serde_json::{Value, json};
use vestibule_testkit::{Process, eventually, free_port};

use crate::support::{LIMIT, Site, example, http};

#[tokio::test]
async fn killed_in_the_middle_nothing_answered_is_lost_and_nothing_is_done_twice()
-> anyhow::Result<()> {
    // The address must stay the same, as it does for a platform.
    let port = free_port();
    let connector = format!("connector = \"127.0.0.1:{port}\"");
    let config = example().replace("connector = \"127.0.0.1:0\"", &connector);
    let site = Site::with_config(&config)?;
    let mut up = site.up().await?;
    let mut simulate = Process::spawn(&site.command(&[
        "simulate",
        "--count",
        "3000",
        "--seed",
        "11",
        "--output",
        "json",
        "--patience",
        "60s",
    ]))?;

    for kill in 1..=3_u64 {
        let base = up.admin.clone();
        eventually(LIMIT, "some more sign-ups have been answered", async || {
            let metrics = http().get(format!("{base}/metrics")).send().await?.text().await?;
            anyhow::Ok(answered(&metrics) >= 300)
        })
        .await
        .with_context(|| format!("before kill {kill}: {}", simulate.stderr()))?;
        ensure!(simulate.is_running(), "the simulation was over before kill {kill}");
        up.process.kill();
        up = site.up().await?;
    }

    let finished = simulate.wait(Duration::from_secs(100)).await?;
    let summary: Value = serde_json::from_str(&finished.stdout)
        .with_context(|| format!("{} {}", finished.stdout, finished.stderr))?;
    ensure!(finished.status.success() && summary["ok"] == json!(true), "{summary:#}");
    let answered = summary["accepted_answered"].as_u64().context("no count")?;
    assert!(answered > 500, "{summary:#}");
    Ok(())
}

/// How many calls this process has answered.
fn answered(metrics: &str) -> u64 {
    let counts =
        metrics.lines().filter(|line| line.starts_with("vestibule_connector_calls_total{"));
    counts.filter_map(|line| line.rsplit(' ').next()?.parse::<u64>().ok()).sum()
}
