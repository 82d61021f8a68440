//! Every mode of the benchmark runs; what it measures in so short a time means nothing.

use std::process::Command;

use anyhow::{Context, ensure};
use serde_json::Value;

#[test]
fn every_mode_runs_and_reports_figures() {
    let folder = tempfile::tempdir().unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_vestibule-bench"))
        .args(["all", "--rounds", "1", "--seconds", "0.5", "--connections", "2"])
        .args(["--events", "100", "--list", "1000", "--output", "json", "--folder"])
        .arg(folder.path())
        .output()
        .unwrap();

    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let rows = |part: &str| report[part].as_array().unwrap().clone();
    let rates = |part| rows(part).iter().map(|it| it["per_second"]["median"].clone()).collect();

    let connector: Vec<Value> = rates("connector");
    let pipeline: Vec<Value> = rates("pipeline");
    assert_eq!((connector.len(), pipeline.len()), (4, 10), "{report:#}");
    for rate in connector.iter().chain(&pipeline) {
        assert!(rate.as_f64().unwrap() > 0.0, "{report:#}");
    }
    for row in rows("connector") {
        assert_eq!(row["refusals"], 0, "{said}");
        assert_eq!(row["ratio"].is_null(), row["server"] == "hello");
    }
    let decisions = report["decide"]["rows"].as_array().unwrap();
    assert_eq!(decisions.len(), 4, "{report:#}");
    for row in decisions {
        assert!(row["micros"]["median"].as_f64().unwrap() > 0.0, "{report:#}");
        assert_eq!(row["adds"].is_null(), row["by"] == "no-rules");
    }
    let left = std::fs::read_dir(folder.path()).unwrap().count();
    assert_eq!(left, 0, "the benchmark left something behind");
}

fn report(arguments: &[&str]) -> anyhow::Result<Value> {
    let folder = tempfile::tempdir()?;
    let output = Command::new(env!("CARGO_BIN_EXE_vestibule-bench"))
        .args(arguments)
        .args(["--output", "json", "--folder"])
        .arg(folder.path())
        .output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let left = std::fs::read_dir(folder.path())?.count();
    ensure!(left == 0, "the benchmark left something behind");
    Ok(serde_json::from_slice(&output.stdout)?)
}

/// With the binary of the same build beside the benchmark.
#[test]
fn an_outage_is_measured_with_the_real_binary() -> anyhow::Result<()> {
    let report = report(&["outage", "--seconds", "1", "--rate", "20"])?;
    let rows = report["outage"].as_array().context("no rows")?;
    ensure!(rows.len() == 4 && rows.iter().all(|row| row["calls"] == 20), "{report:#}");
    // Each call waits for at least one sync, of which each waits for 10 ms.
    let slow = rows.iter().skip(1).all(|row| row["p50_ms"].as_f64() > Some(10.0));
    ensure!(slow, "the disk was not slow: {report:#}");
    Ok(())
}

#[test]
fn targets_are_compared_in_turn() -> anyhow::Result<()> {
    let report = report(&["targets", "--rounds", "1", "--seconds", "1", "--rate", "5"])?;
    let rows = report["targets"].as_array().context("no rows")?;
    ensure!(rows.len() == 3, "{report:#}");
    for row in rows {
        ensure!(row["deliveries"].as_u64() >= Some(9), "{report:#}");
        ensure!(row["ratio"].is_null() == (row["tenth"] == "healthy"), "{report:#}");
    }
    Ok(())
}

#[test]
fn the_care_of_the_log_is_measured_beside_appends() -> anyhow::Result<()> {
    let report = report(&["upkeep", "--events", "3000", "--seconds", "1.2", "--rate", "50"])?;
    ensure!(report["upkeep"].as_array().context("no rows")?.len() == 3, "{report:#}");
    Ok(())
}
