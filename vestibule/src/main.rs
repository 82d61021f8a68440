//! The binary: our processes and tools as subcommands.
//!
//! Configuration is read once here; below it there are only values. `wiring` turns it into logs,
//! stores, connectors and workers; each subcommand is one module.

mod approvals;
mod backup;
mod check;
mod cli;
mod config;
mod dead;
mod deciding;
mod doctor;
mod migrate;
mod permissions;
mod print;
mod readiness;
mod ready;
mod replay;
mod run;
mod simulate;
mod subscribers;
mod telemetry;
mod test;
mod trial;
mod trying;
mod wiring;
mod workers;

use std::process::ExitCode;

use clap::{CommandFactory, Parser};

use crate::{
    cli::{Cli, Command, Common},
    config::Config,
    print::say,
    telemetry::begin_logging,
};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let cli = Cli::parse();
    match start(cli) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("vestibule: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn start(cli: Cli) -> anyhow::Result<ExitCode> {
    if let Command::Completions { shell } = cli.command {
        let mut script = Vec::new();
        clap_complete::generate(shell, &mut Cli::command(), "vestibule", &mut script);
        say!("{}", String::from_utf8_lossy(&script).trim_end())?;
        return Ok(ExitCode::SUCCESS);
    }
    begin_logging(&cli.common)?;
    let sockets = run::Sockets::from_environment()?;
    // One provider for every client of TLS in the process; whoever comes first installs it.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let runtime = tokio::runtime::Runtime::new()?;
    let code = runtime.block_on(execute(cli, sockets));
    // A thread that is stuck in a system call must not hold up the exit.
    runtime.shutdown_timeout(std::time::Duration::from_secs(1));
    code
}

async fn execute(cli: Cli, sockets: run::Sockets) -> anyhow::Result<ExitCode> {
    let Common { config: file, data, admin, .. } = cli.common;
    let load = || {
        let mut config = Config::load(&file)?;
        config.data = data.clone().unwrap_or(config.data);
        config.listen.admin = admin.unwrap_or(config.listen.admin);
        anyhow::Ok(config)
    };
    match cli.command {
        Command::Up => run::up(load()?, &file, sockets).await?,
        Command::Api { without_relay } => run::api(load()?, without_relay, sockets).await?,
        Command::Worker { names, command: None } => {
            run::worker(load()?, &names, sockets).await?;
        }
        Command::Worker { names, command: Some(_) } if !names.is_empty() => {
            anyhow::bail!("name workers to run, or say what to do about one: not both");
        }
        Command::Worker { command: Some(command), .. } => {
            workers::workers(command, &load()?).await?;
        }
        Command::Subscriber { command } => {
            return subscribers::subscribers(command, &load()?).await;
        }
        Command::Dead { command } => return dead::dead(command, &load()?).await,
        Command::Relay => run::relay(load()?, sockets).await?,
        Command::Migrate { output } => migrate::migrate(&load()?, output).await?,
        Command::Check(args) => check::check(args, load(), &file).await?,
        Command::Doctor(args) => return doctor::doctor(args, load()).await,
        Command::Try(args) => trying::try_call(args, &load()?).await?,
        Command::Test(args) => return test::test(args, &load()?).await,
        Command::Simulate(args) => return simulate::simulate(args, load).await,
        Command::Approvals { command } => approvals::approvals(command, &load()?).await?,
        Command::Permissions { command } => {
            return permissions::permissions(command, &load()?).await;
        }
        Command::Replay(args) => replay::replay(args, &load()?).await?,
        Command::Backup(args) => backup::backup(args, load).await?,
        Command::Ready => return ready::ready(admin, load).await,
        Command::Completions { .. } => unreachable!("has been dealt with before the runtime"),
    }
    Ok(ExitCode::SUCCESS)
}
