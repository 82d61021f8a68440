//! Benchmarks, each beside its ceiling in the same run.
//!
//! `connector` loads the real connector and a bare handler in turn; `pipeline` measures how many
//! events a second go from an append to a worker's effect, and through each part of that way alone.
//! Machines differ and are rarely quiet, so the ratios count and the absolute figures do not; how
//! much of the machine others took is shown beside them. What was found is in `docs/performance.md`.

mod cli;
mod connector;
mod load;
mod machine;
mod pipeline;
mod report;
mod sample;
mod server;
mod spread;

use std::{io, process::ExitCode};

use clap::Parser;
use tracing_subscriber::EnvFilter;

use crate::{
    cli::{Cli, Command},
    machine::Machine,
    report::Report,
};

/// The real binary's allocator, for the bare handler too.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    match start(Cli::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vestibule-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn start(command: Command) -> anyhow::Result<()> {
    // As in the real binary: what is not written has its price too.
    let warnings = EnvFilter::new("warn");
    tracing_subscriber::fmt().with_env_filter(warnings).with_writer(io::stderr).init();

    let (options, measures_connector, measures_pipeline) = match command {
        Command::Serve(server) => return server::run(&server),
        Command::Connector(options) => (options, true, false),
        Command::Pipeline(options) => (options, false, true),
        Command::All(options) => (options, true, true),
    };
    let folder = options.folder()?;
    let machine = Machine::look(folder.path())?;
    let mut report = Report { machine, ..Report::default() };
    if measures_connector {
        report.connector = connector::measure(&options, folder.path())?;
    }
    if measures_pipeline {
        report.pipeline = pipeline::measure(&options, folder.path())?;
    }
    println!("{}", report.written_as(options.output)?);
    Ok(())
}
