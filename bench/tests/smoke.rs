//! Every mode of the benchmark runs; what it measures in so short a time means nothing.

use std::process::Command;

use serde_json::Value;

#[test]
fn every_mode_runs_and_reports_figures() {
    let folder = tempfile::tempdir().unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_vestibule-bench"))
        .args(["all", "--rounds", "1", "--seconds", "0.1", "--connections", "2"])
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
