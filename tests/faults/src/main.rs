//! `vestibule-faults`: tries to break a Vestibule, and says whether it did.

use std::{path::PathBuf, process::ExitCode, time::Duration};

use clap::Parser;
use vestibule_faults::{Mutation, Settings, Topology, binary, run};

const EXAMPLES: &str = "\
Examples:
  vestibule-faults --seed 7
      What happens to 20000 sign-ups under 60 faults.
  vestibule-faults --seed 7 --topology cluster --keep run
      The same over three nats-servers; journal, events and logs are kept in the folder run.
  vestibule-faults --mutation no-inbox
      Whether a bug of this kind would be found.

Builds nothing: `vestibule`, and for a mutation `vestibule-mutated`, must lie beside this program.
Exit code 0 means that nothing differs, 1 that something does or failed.";

/// Tries to break a Vestibule with real processes and servers, and compares what is left of every
/// sign-up with what was answered.
#[derive(Debug, Parser)]
#[command(version, max_term_width = 100, after_help = EXAMPLES)]
struct Cli {
    /// Decides who signs up and what goes wrong when; a random one where absent
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// How many people sign up
    #[arg(long, value_name = "N", default_value_t = 20_000, value_parser = clap::value_parser!(u64).range(1..))]
    sign_ups: u64,
    /// How many people begin in a second
    #[arg(long, value_name = "N", default_value_t = 200)]
    rate: u32,
    /// How many faults happen meanwhile
    #[arg(long, value_name = "N", default_value_t = 60)]
    faults: usize,
    #[arg(long, value_enum, default_value_t = Topology::Single)]
    topology: Topology,
    /// How many seconds the workers may take once all is healed
    #[arg(long, value_name = "SECONDS", default_value_t = 300)]
    patience: u64,
    /// A deliberate bug that must be found
    #[arg(long, value_enum)]
    mutation: Option<Mutation>,
    /// Keep journal, events and logs in this folder
    #[arg(long, value_name = "FOLDER")]
    keep: Option<PathBuf>,
}

#[tokio::main]
async fn main() -> ExitCode {
    match start(Cli::parse()).await {
        Ok(code) => code,
        Err(error) => {
            eprintln!("vestibule-faults: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn start(cli: Cli) -> anyhow::Result<ExitCode> {
    let settings = Settings {
        seed: cli.seed.unwrap_or_else(rand::random),
        topology: cli.topology,
        sign_ups: cli.sign_ups,
        rate: f64::from(cli.rate.max(1)),
        faults: cli.faults,
        patience: Duration::from_secs(cli.patience),
        binary: binary(cli.mutation)?,
        mutation: cli.mutation,
        keep: cli.keep,
    };
    eprintln!("seed {}", settings.seed);
    let report = run(&settings).await?;
    println!("{report}");
    Ok(if report.is_clean() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
