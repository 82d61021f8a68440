//! The machine itself, short: that the product holds, and that a bug would be found.
//!
//! The seed is fixed, and `VESTIBULE_FAULTS_SEED` chooses another.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use vestibule_faults::{Difference, Mutation, Report, Settings, Topology, binary, run};

const SEED: u64 = 4;

fn seed() -> anyhow::Result<u64> {
    let chosen = std::env::var("VESTIBULE_FAULTS_SEED").ok();
    chosen.map_or(Ok(SEED), |it| it.parse().context("VESTIBULE_FAULTS_SEED is a number"))
}

async fn short(topology: Topology, mutation: Option<Mutation>) -> anyhow::Result<Report> {
    let settings = Settings {
        seed: seed()?,
        topology,
        sign_ups: 800,
        rate: 40.0,
        // Each sort of fault once.
        faults: topology.kinds().len(),
        // With a bug some of it may never be done, and that need not be waited for long.
        patience: Duration::from_secs(if mutation.is_some() { 10 } else { 45 }),
        binary: binary(mutation)?,
        mutation,
        keep: None,
    };
    let report = run(&settings).await?;
    println!("{report}");
    Ok(report)
}

async fn holds(topology: Topology) -> anyhow::Result<()> {
    let report = short(topology, None).await?;
    ensure!(report.is_clean(), "{report}");
    let accepted = report.verdict.counts["accepted events"];
    ensure!(accepted > 100, "too few got through to say anything: {report}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn embedded_nothing_is_lost_and_nothing_done_twice() -> anyhow::Result<()> {
    holds(Topology::Embedded).await
}

#[tokio::test(flavor = "multi_thread")]
async fn over_nats_and_postgresql_nothing_is_lost_and_nothing_done_twice() -> anyhow::Result<()> {
    holds(Topology::Single).await
}

#[tokio::test(flavor = "multi_thread")]
async fn over_a_cluster_nothing_is_lost_and_nothing_done_twice() -> anyhow::Result<()> {
    holds(Topology::Cluster).await
}

async fn is_caught(
    mutation: Mutation,
    topology: Topology,
    is_expected: fn(&Difference) -> bool,
) -> anyhow::Result<()> {
    let report = short(topology, Some(mutation)).await?;
    ensure!(report.verdict.differences.iter().any(is_expected), "not found: {report}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_before_its_event_is_caught() -> anyhow::Result<()> {
    let lost = |it: &Difference| matches!(it, Difference::NoEvent { .. });
    is_caught(Mutation::AnswerBeforeAppend, Topology::Embedded, lost).await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_acknowledgement_before_the_effect_is_caught() -> anyhow::Result<()> {
    let lost = |it: &Difference| matches!(it, Difference::NoEffect { .. });
    is_caught(Mutation::AcknowledgeBeforeEffect, Topology::Single, lost).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_without_its_inbox_is_caught() -> anyhow::Result<()> {
    let twice = |it: &Difference| matches!(it, Difference::SeveralEffects { .. });
    is_caught(Mutation::NoInbox, Topology::Single, twice).await
}
