//! `vestibule dead retry`: sends letters back to their workers, no faster than told.

use std::{process::ExitCode, time::Duration};

use anyhow::Context;
use clap::Args;
use serde_json::{Value, json};
use time::OffsetDateTime;
use tokio::time::{Instant, sleep_until};
use vestibule_store::{PausedWorker, Store};
use vestibule_workers::Rate;

use super::{
    selection::Selection,
    sweep::{Plan, Sweep, Unasked, letters},
};
use crate::{
    approvals::approver,
    cli::Output,
    config::{Config, WorkerConfig},
    print::say,
};

const EXAMPLES: &str = "\
Examples:
  vestibule dead retry 12
      One letter, once what made it fail is mended.
  vestibule dead retry --worker notify --cause refused --dry-run
      What would be sent back?
  vestibule dead retry --worker notify --cause refused --max 10
      The ten oldest first, to see whether they go through now.
  vestibule dead retry --all --rate 500/m --yes
      Everything, without a question, as fast as its targets may bear.";

/// Letters a transaction, at most. Few enough that none of them takes long.
const BATCH_MAX: u64 = 100;

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct RetryArgs {
    #[command(flatten)]
    selection: Selection,
    /// How fast: so many a second (50/s), a minute (500/m) or an hour
    #[arg(long, value_name = "RATE", default_value = "50/s")]
    rate: Rate,
    /// Who sends them back; kept with each letter
    #[arg(long, value_name = "NAME", env = "USER", value_parser = approver)]
    by: String,
    /// JSON: how many letters were meant and sent back, and which could not be read
    #[arg(long, value_enum, default_value_t = Output::Table)]
    output: Output,
}

/// What came of it.
#[derive(Debug, Default)]
struct Sent {
    back: u64,
    /// Somebody else was quicker.
    passed_over: u64,
    /// This version cannot read them either.
    unreadable: Vec<i64>,
    stopped: bool,
}

pub(super) async fn retry(
    config: &Config,
    store: &Store,
    args: &RetryArgs,
) -> anyhow::Result<ExitCode> {
    let RetryArgs { selection, output, .. } = args;
    let plan = Plan::make(store, selection).await?;
    let paused = store.paused_workers().await.context("could not read which workers are paused")?;
    let configured: Vec<_> = config.all_workers().map(WorkerConfig::name).collect();
    let workers = plan.groups.iter().map(|(_, it)| it.worker.as_str());
    for warning in warnings(workers, &configured, &paused) {
        eprintln!("warning: {warning}");
    }
    let goes = plan.go(selection, *output, "Send back", Unasked::Goes)?;
    let sent = if goes { send_back(store, args, &plan).await? } else { Sent::default() };
    match output {
        Output::Json => say!("{}", as_json(&plan, &sent))?,
        Output::Table if goes => tell(store, &plan, &sent).await?,
        Output::Table => {}
    }
    let all = !sent.stopped && sent.unreadable.is_empty();
    Ok(if all { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

async fn send_back(store: &Store, args: &RetryArgs, plan: &Plan) -> anyhow::Result<Sent> {
    let mut sweep = Sweep::begin(store, plan, args.output, "sent back")?;
    let spacing = spacing(args.rate);
    let mut turn = Instant::now();
    let mut sent = Sent::default();
    loop {
        tokio::select! {
            () = sleep_until(turn) => {}
            () = sweep.stop.cancelled() => {}
        }
        let batch = sweep.next(batch_size(spacing)).await?;
        let Ok(letters_of_batch @ 1..) = u32::try_from(batch.len()) else { break };
        // From now, not from the last turn: what a slow store has cost is not caught up in a burst.
        turn = Instant::now() + spacing * letters_of_batch;
        let now = OffsetDateTime::now_utc();
        let due = |nth| now + spacing * nth;
        let redriven = store.redrive(&batch, due, &args.by, now).await.with_context(|| {
            let back = letters(sent.back);
            format!("stopped after {back} had been sent back; what was not stays parked")
        })?;
        sent.back += u64::from(redriven.moved);
        sent.passed_over += u64::from(redriven.skipped);
        sent.unreadable.extend(redriven.undecodable);
        sweep.advance(batch.len());
    }
    sent.stopped = sweep.end();
    Ok(sent)
}

fn spacing(rate: Rate) -> Duration {
    Duration::from_secs_f64(1.0 / rate.per_second())
}

/// A second's worth, so that a stop is heard soon and what is killed has sent back little too much.
fn batch_size(spacing: Duration) -> u64 {
    let a_second = 1.0 / spacing.as_secs_f64();
    // A float that is too large for an integer becomes the largest.
    (a_second as u64).clamp(1, BATCH_MAX)
}

/// What keeps a letter from being taken although it is sent back.
fn warnings<'a>(
    workers: impl Iterator<Item = &'a str>,
    configured: &[&str],
    paused: &[PausedWorker],
) -> Vec<String> {
    // Groups stand by worker, so the same ones follow each other.
    let mut workers: Vec<_> = workers.collect();
    workers.dedup();
    let mut warnings = Vec::new();
    for worker in workers {
        if !configured.contains(&worker) {
            warnings.push(format!(
                "no worker `{worker}` is configured; what is sent back waits until there is one"
            ));
        }
        if let Some(it) = paused.iter().find(|it| it.worker == worker) {
            warnings.push(format!(
                "the worker `{worker}` is paused ({}); what is sent back waits for `vestibule \
                 worker resume {worker}`",
                it.reason
            ));
        }
    }
    warnings
}

async fn tell(store: &Store, plan: &Plan, sent: &Sent) -> anyhow::Result<()> {
    let Sent { back, passed_over, unreadable, stopped } = sent;
    let stopped = if *stopped { "stopped: " } else { "" };
    say!("\n{stopped}{} sent back; the workers take them", letters(*back))?;
    if *passed_over > 0 {
        say!("{} passed over: somebody else was quicker", letters(*passed_over))?;
    }
    if !unreadable.is_empty() {
        let ids: Vec<_> = unreadable.iter().map(ToString::to_string).collect();
        say!(
            "{} cannot be read as an event by this version either and stay parked: {}",
            letters(unreadable.len() as u64),
            ids.join(", ")
        )?;
    }
    say!("{} of those that fit are still parked", plan.still_parked(store).await?)?;
    say!("`vestibule dead list --letters --state retrying` shows what is not delivered yet")?;
    Ok(())
}

fn as_json(plan: &Plan, sent: &Sent) -> Value {
    json!({
        "meant": plan.count,
        "sent_back": sent.back,
        "passed_over": sent.passed_over,
        "unreadable": sent.unreadable,
        "stopped": sent.stopped,
    })
}

#[cfg(test)]
mod tests {
    use time::macros::datetime;

    use super::*;

    #[test]
    fn a_batch_is_a_second_at_most() {
        let size = |rate: &str| batch_size(spacing(rate.parse().unwrap()));
        assert_eq!(
            ["1/h", "30/m", "1/s", "50/s", "6000/m", "100000/s"].map(size),
            [1, 1, 1, 50, 100, 100]
        );
    }

    #[test]
    fn whoever_cannot_take_a_letter_is_named_once() {
        let paused = [PausedWorker {
            worker: "notify".into(),
            paused_at: datetime!(2026-11-22 10:00 UTC),
            paused_by: "grace".into(),
            reason: "the channel moves".into(),
        }];
        let workers = ["database", "gone", "gone", "notify", "notify"];
        let warnings = warnings(workers.into_iter(), &["database", "notify"], &paused);
        assert_eq!(warnings.len(), 2, "{warnings:?}");
        assert!(warnings[0].contains("`gone` is configured"), "{warnings:?}");
        assert!(warnings[1].contains("the channel moves"), "{warnings:?}");
    }
}
