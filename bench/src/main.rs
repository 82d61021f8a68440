//! Benchmarks, each beside its ceiling in the same run.
//!
//! `connector` loads the real connector and a bare handler in turn; `pipeline` measures how many
//! events a second go from an append to a worker's effect, and through each part of that way alone;
//! `decide` measures what one decision costs, and each of its parts. What must not be felt has
//! benchmarks of its own: `outage` of everything behind the connector, `targets` of one dead target
//! among ten, `upkeep` of the log's own care.
//! Machines differ and are rarely quiet, so the ratios count and the absolute figures do not; how
//! much of the machine others took is shown beside them. What was found is in `docs/performance.md`.

mod cli;
mod connector;
mod decide;
mod load;
mod machine;
mod open_loop;
mod outage;
mod pipeline;
mod report;
mod rules;
mod sample;
mod server;
mod spread;
mod targets;
mod upkeep;

use std::{io, path::Path, process::ExitCode};

use clap::Parser;
use tracing_subscriber::EnvFilter;

use crate::{
    cli::{Cli, Command, OutageArgs, TargetsArgs, UpkeepArgs},
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

    let common = match &command {
        Command::Serve(server) => return server::run(server),
        Command::Connector(options)
        | Command::Pipeline(options)
        | Command::Decide(options)
        | Command::All(options) => &options.common,
        Command::Outage(OutageArgs { common, .. })
        | Command::Targets(TargetsArgs { common, .. })
        | Command::Upkeep(UpkeepArgs { common, .. }) => common,
    };
    let (folder, output) = (common.folder()?, common.output);
    let machine = Machine::look(folder.path())?;
    let report = Report { machine, ..measure(&command, folder.path())? };
    println!("{}", report.written_as(output)?);
    Ok(())
}

fn measure(command: &Command, folder: &Path) -> anyhow::Result<Report> {
    let mut report = Report::default();
    if let Command::Decide(options) | Command::All(options) = command {
        report.decide = Some(decide::measure(options, folder)?);
    }
    if let Command::Connector(options) | Command::All(options) = command {
        report.connector = connector::measure(options, folder)?;
    }
    if let Command::Pipeline(options) | Command::All(options) = command {
        report.pipeline = pipeline::measure(options, folder)?;
    }
    match command {
        Command::Outage(args) => report.outage = outage::measure(args, folder)?,
        Command::Targets(args) => report.targets = targets::measure(args, folder)?,
        Command::Upkeep(args) => report.upkeep = upkeep::measure(args, folder)?,
        _ => {}
    }
    Ok(report)
}
