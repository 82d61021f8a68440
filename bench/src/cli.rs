//! What can be asked for.

use std::{path::PathBuf, time::Duration};

use anyhow::Context;
use clap::{Args, Parser, Subcommand, ValueEnum};
use tempfile::TempDir;

use crate::server::ServerArgs;

#[derive(Debug, Parser)]
#[command(name = "vestibule-bench", about = "Measures Vestibule beside its ceilings", version)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Answers a second of the connector, and of a bare handler in turn with it
    Connector(Options),
    /// Events a second from an append to a worker's effect
    Pipeline(Options),
    /// Microseconds of one decision: without rules, with 25, a long list and a cached lookup
    Decide(Options),
    /// These three
    All(Options),
    /// Answers at a steady rate while NATS, PostgreSQL and all targets are down and the disk is slow
    Outage(OutageArgs),
    /// What nine healthy webhooks feel of a tenth that is dead
    Targets(TargetsArgs),
    /// What appends feel of a copy of the log, and of the removal of old events
    Upkeep(UpkeepArgs),
    /// One of the servers under load; the benchmark starts it itself
    #[command(hide = true)]
    Serve(ServerArgs),
}

#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Length of one round of load
    #[arg(long, default_value_t = 4.0, value_parser = seconds)]
    pub(crate) seconds: f64,
    /// How often everything is measured
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) rounds: u32,
    /// Connections that call at the same time
    #[arg(long, value_delimiter = ',', default_values_t = [32, 128])]
    pub(crate) connections: Vec<usize>,
    /// The runtime of all servers; the binary uses the one with many threads
    #[arg(long, default_value = "threads")]
    pub(crate) runtime: RuntimeKind,
    /// Events in one round of the pipeline
    #[arg(long, default_value_t = 20_000, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) events: u32,
    /// Entries of the long list that decisions ask
    #[arg(long, default_value_t = 1_000_000, value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) list: u64,
    #[command(flatten)]
    pub(crate) common: Common,
}

#[derive(Debug, Args)]
pub(crate) struct Common {
    /// Where the logs are written: on the disk to be measured [default: the temporary folder]
    #[arg(long)]
    pub(crate) folder: Option<PathBuf>,
    #[arg(long, default_value = "table")]
    pub(crate) output: Output,
}

#[derive(Debug, Args)]
pub(crate) struct OutageArgs {
    /// Length of each of the four rounds
    #[arg(long, default_value_t = 30.0, value_parser = seconds)]
    pub(crate) seconds: f64,
    /// Sign-ups a second
    #[arg(long, default_value_t = 200.0, value_parser = rate)]
    pub(crate) rate: f64,
    /// So much longer does each fsync take on the slow disk, in milliseconds
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(0..=1000))]
    pub(crate) sync_ms: u32,
    /// The binary to be measured [default: the one beside the benchmark]
    #[arg(long)]
    pub(crate) vestibule: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) common: Common,
}

#[derive(Debug, Args)]
pub(crate) struct TargetsArgs {
    /// Length of each of the three parts of a round
    #[arg(long, default_value_t = 20.0, value_parser = seconds)]
    pub(crate) seconds: f64,
    /// How often everything is measured
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) rounds: u32,
    /// Sign-ups a second; each is delivered ten times
    #[arg(long, default_value_t = 20.0, value_parser = rate)]
    pub(crate) rate: f64,
    #[command(flatten)]
    pub(crate) common: Common,
}

#[derive(Debug, Args)]
pub(crate) struct UpkeepArgs {
    /// Old events in the log
    #[arg(long, default_value_t = 1_000_000, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) events: u32,
    /// Appends a second
    #[arg(long, default_value_t = 200.0, value_parser = rate)]
    pub(crate) rate: f64,
    /// How long appends are measured alone
    #[arg(long, default_value_t = 20.0, value_parser = seconds)]
    pub(crate) seconds: f64,
    #[command(flatten)]
    pub(crate) common: Common,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum RuntimeKind {
    /// A worker thread per core
    Threads,
    /// Everything on one thread
    Single,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Output {
    Table,
    Json,
}

impl Options {
    pub(crate) fn round(&self) -> Duration {
        Duration::from_secs_f64(self.seconds)
    }
}

impl Common {
    /// A folder for all that is written, removed when dropped.
    pub(crate) fn folder(&self) -> anyhow::Result<TempDir> {
        let parent = self.folder.clone().unwrap_or_else(std::env::temp_dir);
        tempfile::Builder::new()
            .prefix("vestibule-bench-")
            .tempdir_in(&parent)
            .with_context(|| format!("could not make a folder in {}", parent.display()))
    }
}

fn rate(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(rate) if (1.0..=100_000.0).contains(&rate) => Ok(rate),
        _ => Err("a number from 1 to 100000 is needed".to_owned()),
    }
}

fn seconds(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(seconds) if (0.05..=600.0).contains(&seconds) => Ok(seconds),
        _ => Err("a number from 0.05 to 600 is needed".to_owned()),
    }
}
