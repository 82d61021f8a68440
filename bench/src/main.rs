//! Benchmarks, each beside its ceiling in the same run.
//!
//! `connector` loads the real connector and a bare handler in turn; `pipeline` measures how many
//! events a second go from an append to a worker's effect, and through each part of that way alone;
//! `decide` measures what one decision costs, and each of its parts.
//! Machines differ and are rarely quiet, so the ratios count and the absolute figures do not; how
//! much of the machine others took is shown beside them. What was found is in `docs/performance.md`.

mod cli;
mod connector;
mod decide;
mod load;
mod machine;
mod pipeline;
mod report;
mod rules;
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

    let (options, parts) = match command {
        Command::Serve(server) => return server::run(&server),
        Command::Connector(options) => (options, &[Part::Connector][..]),
        Command::Pipeline(options) => (options, &[Part::Pipeline][..]),
        Command::Decide(options) => (options, &[Part::Decide][..]),
        Command::All(options) => (options, &[Part::Decide, Part::Connector, Part::Pipeline][..]),
    };
    let folder = options.folder()?;
    let machine = Machine::look(folder.path())?;
    let mut report = Report { machine, ..Report::default() };
    for part in parts {
        match part {
            Part::Connector => report.connector = connector::measure(&options, folder.path())?,
            Part::Pipeline => report.pipeline = pipeline::measure(&options, folder.path())?,
            Part::Decide => report.decide = Some(decide::measure(&options, folder.path())?),
        }
    }
    println!("{}", report.written_as(options.output)?);
    Ok(())
}

enum Part {
    Connector,
    Pipeline,
    Decide,
}
