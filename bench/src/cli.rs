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
    /// All of them
    All(Options),
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
    /// Where the logs are written: on the disk to be measured [default: the temporary folder]
    #[arg(long)]
    pub(crate) folder: Option<PathBuf>,
    #[arg(long, default_value = "table")]
    pub(crate) output: Output,
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

    /// A folder for all that is written, removed when dropped.
    pub(crate) fn folder(&self) -> anyhow::Result<TempDir> {
        let parent = self.folder.clone().unwrap_or_else(std::env::temp_dir);
        tempfile::Builder::new()
            .prefix("vestibule-bench-")
            .tempdir_in(&parent)
            .with_context(|| format!("could not make a folder in {}", parent.display()))
    }
}

fn seconds(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(seconds) if (0.05..=600.0).contains(&seconds) => Ok(seconds),
        _ => Err("a number from 0.05 to 600 is needed".to_owned()),
    }
}
