//! `vestibule dead`: looks at dead letters, sends them back to their workers, drops them.
//!
//! A dead letter is an event that a worker gave up, with its cause and every attempt. Works on the
//! store alone, so it can be run wherever the store can be reached; the workers of a running `up`
//! or `worker` take what is sent back. Whatever interrupts a command, a letter is either as it was
//! or as it was to become: each batch is one transaction of the store's.

mod drop;
mod list;
mod retry;
mod selection;
mod show;
mod sweep;

use std::process::ExitCode;

use clap::Subcommand;

use self::{drop::DropArgs, list::ListArgs, retry::RetryArgs, show::ShowArgs};
pub(crate) use self::{drop::reason, selection::answer};
use crate::{config::Config, wiring};

#[derive(Debug, Subcommand)]
pub(crate) enum DeadCommand {
    /// List what is parked, by worker and cause, or letter by letter
    List(ListArgs),
    /// Show one letter: why it was parked, every attempt, and what has become of it
    Show(ShowArgs),
    /// Send letters back to their workers, the oldest first
    ///
    /// Mend first what made them fail. A letter that is sent back has all its tries again, and is
    /// parked again where they fail; what has been done already is not done twice. At most --rate
    /// letters are sent back a second, so that a target that has just come back is not run over;
    /// Ctrl-C stops after the batch at hand, and what was not sent back stays parked.
    Retry(RetryArgs),
    /// Drop letters: they are never tried again, and kept with who dropped them and why
    ///
    /// The event stays in the log, and what the worker was to do is left undone.
    Drop(DropArgs),
}

pub(crate) async fn dead(command: DeadCommand, config: &Config) -> anyhow::Result<ExitCode> {
    let store = wiring::existing_store(config).await?;
    match command {
        DeadCommand::List(args) => list::list(&store, &args).await?,
        DeadCommand::Show(args) => show::show(&store, &args).await?,
        DeadCommand::Retry(args) => return retry::retry(config, &store, &args).await,
        DeadCommand::Drop(args) => return drop::drop(&store, &args).await,
    }
    Ok(ExitCode::SUCCESS)
}
