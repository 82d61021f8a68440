//! `vestibule dead drop`: gives letters up for good.

use std::process::ExitCode;

use anyhow::Context;
use clap::Args;
use serde_json::json;
use time::OffsetDateTime;
use vestibule_store::Store;

use super::{
    selection::Selection,
    sweep::{Plan, Sweep, Unasked, letters},
};
use crate::{approvals::approver, cli::Output, print::say};

const EXAMPLES: &str = "\
Examples:
  vestibule dead drop 12 --reason 'a test of ours'
  vestibule dead drop --worker notify --cause refused --until 2026-11-01 --dry-run \\
      --reason 'the channel is gone'
  vestibule dead list --letters --state dropped
      What was dropped; `vestibule dead show` tells by whom and why.";

/// Letters a transaction.
const BATCH: u64 = 100;

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct DropArgs {
    #[command(flatten)]
    selection: Selection,
    /// Why; kept with each letter. No personal data, please
    #[arg(long, value_name = "TEXT", value_parser = reason)]
    reason: String,
    /// Who drops them; kept with each letter
    #[arg(long, value_name = "NAME", env = "USER", value_parser = approver)]
    by: String,
    /// JSON: how many letters were meant and dropped
    #[arg(long, value_enum, default_value_t = Output::Table)]
    output: Output,
}

const REASON_CHARS_MAX: usize = 500;

/// Whoever finds the letter, or the paused worker, next year wants to know why.
pub(crate) fn reason(text: &str) -> Result<String, String> {
    let text = text.trim();
    if text.is_empty() {
        return Err("say why".to_owned());
    }
    if text.chars().count() > REASON_CHARS_MAX {
        return Err(format!("a reason has at most {REASON_CHARS_MAX} characters"));
    }
    Ok(text.to_owned())
}

pub(super) async fn drop(store: &Store, args: &DropArgs) -> anyhow::Result<ExitCode> {
    let DropArgs { selection, reason, by, output } = args;
    let plan = Plan::make(store, selection).await?;
    let (mut dropped, mut stopped) = (0, false);
    let goes = plan.go(selection, *output, "Drop", Unasked::Refused)?;
    if goes {
        let mut sweep = Sweep::begin(store, &plan, *output, "dropped")?;
        loop {
            let batch = sweep.next(BATCH).await?;
            if batch.is_empty() {
                break;
            }
            let now = OffsetDateTime::now_utc();
            let done = store.drop_letters(&batch, by, reason, now).await.with_context(|| {
                let before = letters(dropped);
                format!("stopped after {before} had been dropped; what was not stays parked")
            })?;
            dropped += u64::from(done);
            sweep.advance(batch.len());
        }
        stopped = sweep.end();
    }
    match output {
        Output::Json => say!("{}", json!({ "meant": plan.count, "dropped": dropped }))?,
        Output::Table if stopped => {
            say!("\nstopped: {} dropped; what was not stays parked", letters(dropped))?;
        }
        Output::Table if goes => say!("\n{} dropped", letters(dropped))?,
        Output::Table => {}
    }
    Ok(if stopped { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_says_something_and_is_no_document() {
        assert!(reason("").is_err() && reason(" \n").is_err());
        assert_eq!(reason(" a test ").as_deref(), Ok("a test"));
        let longest = "ä".repeat(REASON_CHARS_MAX);
        assert_eq!(reason(&longest), Ok(longest.clone()));
        assert!(reason(&(longest + "!")).is_err());
    }
}
