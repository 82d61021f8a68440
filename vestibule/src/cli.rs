//! What can be said on the command line.

use std::{net::SocketAddr, path::PathBuf};

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::{
    approvals::ApprovalsCommand, backup::BackupArgs, check::CheckArgs, dead::DeadCommand,
    doctor::DoctorArgs, permissions::PermissionsCommand, replay::ReplayArgs,
    simulate::SimulateArgs, subscribers::SubscriberCommand, test::TestArgs, trying::TryArgs,
    workers::WorkerCommand,
};

/// The business-logic layer behind self-service sign-up.
///
/// An identity platform (Microsoft Entra, Azure AD B2C, Entra External ID) calls the connector
/// during sign-up. Vestibule decides in about a millisecond, keeps every decision as a durable
/// event, and lets independent workers act on it.
#[derive(Debug, Parser)]
#[command(version, propagate_version = true, max_term_width = 100)]
#[command(
    after_help = "Begin with `vestibule up`: everything in one process, nothing else needed."
)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) common: Common,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Options of every command")]
pub(crate) struct Common {
    /// The configuration file
    #[arg(long, global = true, value_name = "FILE", default_value = "./vestibule.toml")]
    #[arg(env = "VESTIBULE_CONFIG")]
    pub(crate) config: PathBuf,
    /// The data folder; wins over the configuration's `data` (default ./data)
    #[arg(long, global = true, value_name = "DIR", env = "VESTIBULE_DATA")]
    pub(crate) data: Option<PathBuf>,
    /// The address of the admin listener; wins over the configuration's `listen.admin`
    #[arg(long, global = true, value_name = "ADDRESS", env = "VESTIBULE_ADMIN")]
    pub(crate) admin: Option<SocketAddr>,
    /// How log lines on standard error look
    #[arg(long, global = true, value_enum, default_value_t = LogFormat::Text)]
    #[arg(env = "VESTIBULE_LOG_FORMAT")]
    pub(crate) log_format: LogFormat,
    /// Which log lines: error, warn, info, debug, trace, or by module as in `info,sqlx=warn`
    #[arg(long, global = true, value_name = "FILTER", default_value = DEFAULT_LOG)]
    #[arg(env = "VESTIBULE_LOG")]
    pub(crate) log: String,
}

/// What we say ourselves, and what of the libraries somebody should act on. Both say each lost or
/// made connection as well, once or twice for every one of a pool; that we do ourselves, once.
const DEFAULT_LOG: &str = "info,async_nats=warn,sqlx=error";

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogFormat {
    Text,
    Json,
}

/// How a result is printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Output {
    /// A table for people
    Table,
    /// JSON for programs
    Json,
}

const WORKER_USAGE: &str = "\
vestibule worker [OPTIONS] [NAME]...
       vestibule worker [OPTIONS] <COMMAND>";

const WORKER_EXAMPLES: &str = "\
Examples:
  vestibule worker notify database
      Run these two workers in this process, over NATS JetStream.
  vestibule worker list
      What waits for each worker, and which are paused? Works embedded, too.
  vestibule worker pause notify --reason 'the channel moves'
      Take no events for now, in every process of `notify`, `vestibule up` included.";

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run everything in one process, embedded: connector, log, workers, store
    ///
    /// Needs no other service. With a [nats] section in the configuration, the relay and the
    /// workers run in this process too, over NATS JetStream.
    Up,
    /// Run the connector endpoint, and the relay where NATS is configured
    Api {
        /// Leave the relay to a process of its own (`vestibule relay`)
        #[arg(long)]
        without_relay: bool,
    },
    /// Run workers over NATS JetStream; or list, pause, resume and remove workers
    ///
    /// Without one of the commands below, runs the workers that are named, or all.
    #[command(override_usage = WORKER_USAGE, after_help = WORKER_EXAMPLES)]
    Worker {
        /// Which workers to run, `subscribers` for all of these; everything where none is named
        #[arg(value_name = "NAME")]
        names: Vec<String>,
        #[command(subcommand)]
        command: Option<WorkerCommand>,
    },
    /// Add, try, watch and remove subscribers: workers of your own
    Subscriber {
        #[command(subcommand)]
        command: SubscriberCommand,
    },
    /// Look at dead letters: events that a worker gave up; send them back, or drop them
    Dead {
        #[command(subcommand)]
        command: DeadCommand,
    },
    /// Run only the relay: local log to JetStream, beside `vestibule api --without-relay`
    Relay,
    /// Bring the store's schema, and the stream where NATS is configured, up to date
    Migrate {
        #[arg(long, value_enum, default_value_t = Output::Table)]
        output: Output,
    },
    /// Check the configuration and say what it would do
    Check(CheckArgs),
    /// Look whether machine, log, NATS and store are so that no event is lost, and what to change
    Doctor(DoctorArgs),
    /// Try the rules: decide one call of a platform, and show why and the answer in each dialect
    Try(TryArgs),
    /// Test the rules: run cases like unit tests, or decide recorded sign-ups again
    Test(TestArgs),
    /// Play the platform: send realistic sign-ups and see whether each was acted on exactly once
    Simulate(SimulateArgs),
    /// Look at the requests for approval, and decide them
    Approvals {
        #[command(subcommand)]
        command: ApprovalsCommand,
    },
    /// Look at who has which role and whether targets hold them; take roles away
    Permissions {
        #[command(subcommand)]
        command: PermissionsCommand,
    },
    /// Print past events, one CloudEvent a line
    Replay(ReplayArgs),
    /// Copy what the data folder holds, also while it is in use; or check such a copy
    Backup(BackupArgs),
    /// Exit with 0 if the process behind the admin listener answers sign-ups; for health checks
    Ready,
    /// Print a completion script for a shell
    ///
    /// For example: vestibule completions bash > /etc/bash_completion.d/vestibule
    Completions { shell: clap_complete::Shell },
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, Parser};

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn workers_are_run_by_name_and_managed_by_command() {
        let parse = |line: &str| {
            let cli = Cli::try_parse_from(line.split_whitespace()).unwrap();
            let Command::Worker { names, command } = cli.command else { panic!("{line}") };
            (names.join(" "), command.is_some())
        };
        for (line, names, managed) in [
            ("vestibule worker", "", false),
            ("vestibule worker notify database", "notify database", false),
            ("vestibule worker notify --admin 127.0.0.1:7173", "notify", false),
            ("vestibule worker list", "", true),
            ("vestibule worker --config other.toml list", "", true),
            ("vestibule worker pause notify --reason moving --by grace", "", true),
        ] {
            assert_eq!(parse(line), (names.to_owned(), managed), "{line}");
        }
    }
}
