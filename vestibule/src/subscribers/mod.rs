//! `vestibule subscriber`: what operations teams do about the workers they add.
//!
//! A subscriber is a file; these commands write it, try it and look how it stands. Whatever runs takes
//! up the file by itself, so nothing here talks to a process.

mod add;
mod grant;
mod nats_conf;
mod remove;
mod sample;
mod snippets;

use std::{
    io,
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, chown},
    path::Path,
    process::ExitCode,
};

use anyhow::{Context, bail, ensure};
use clap::{Args, Subcommand};
use comfy_table::{Table, presets::NOTHING};
use serde_json::json;
use vestibule_events::Kind;

use self::{add::AddArgs, grant::GrantArgs};
use crate::{
    approvals::approver,
    cli::Output,
    config::{Config, EffectConfig, SubscriberConfig, WorkerConfig, did_you_mean},
    dead::reason,
    print::say,
    wiring, workers,
};

#[derive(Debug, Subcommand)]
pub(crate) enum SubscriberCommand {
    /// List the subscribers: how each is given its events, and where that is written
    List {
        #[arg(long, value_enum, default_value_t = Output::Table)]
        output: Output,
    },
    /// Add a subscriber: write its file, make its key and its consumer
    ///
    /// A running `vestibule up` or `vestibule worker` takes it up within seconds. Of one whose file is
    /// there already, only the consumer is made or brought in line with the file.
    Add(AddArgs),
    /// Give a subscriber one sample event, and show what passes
    ///
    /// The event is made up and marked (its subject is 32 zeros, its correlation id
    /// `vestibule-subscriber-test`). It is stored nowhere, and nobody else is given it.
    Test {
        #[command(flatten)]
        which: Which,
        #[arg(long, value_enum, default_value_t = Output::Table)]
        output: Output,
    },
    /// Show how far subscribers are: what waits, how old it is, what is tried again, what was given up
    Lag {
        /// Only this one
        #[arg(value_name = "NAME")]
        name: Option<String>,
        #[arg(long, value_enum, default_value_t = Output::Table)]
        output: Output,
    },
    /// Let a subscriber be given no events, in every process, until it is resumed
    Pause {
        #[command(flatten)]
        which: Which,
        /// Why; shown by `vestibule subscriber lag`
        #[arg(long, value_name = "TEXT", value_parser = reason)]
        reason: String,
        /// Who pauses it
        #[arg(long, value_name = "NAME", env = "USER", value_parser = approver)]
        by: String,
    },
    /// Let a paused subscriber go on where it was
    Resume {
        #[command(flatten)]
        which: Which,
    },
    /// Remove a subscriber: its file, its consumer, and what waits for it
    ///
    /// Shows first what is lost. To stop one and keep what waits for it, pause it, or take its file
    /// away.
    Remove {
        #[command(flatten)]
        which: Which,
        /// Do not ask
        #[arg(long)]
        yes: bool,
        /// Who removes it; kept with the dead letters that this drops
        #[arg(long, value_name = "NAME", env = "USER", value_parser = approver)]
        by: String,
    },
    /// Give a [nats] subscriber a user of NATS that can do no more than take its own events
    Grant(GrantArgs),
}

#[derive(Debug, Args)]
pub(crate) struct Which {
    /// The subscriber, as `vestibule subscriber list` names it
    #[arg(value_name = "NAME")]
    name: String,
}

pub(crate) async fn subscribers(
    command: SubscriberCommand,
    config: &Config,
) -> anyhow::Result<ExitCode> {
    match command {
        SubscriberCommand::List { output } => list(config, output)?,
        SubscriberCommand::Add(args) => add::add(config, &args).await?,
        SubscriberCommand::Test { which, output } => {
            return sample::test(config, &which.name, output).await;
        }
        SubscriberCommand::Lag { name, output } => lag(config, name.as_deref(), output).await?,
        SubscriberCommand::Pause { which, reason, by } => {
            let name = known(config, &which.name)?;
            ensure!(
                find(config, name).map_or(true, WorkerConfig::runs_here),
                "{name} takes its events from the stream itself, and nothing here keeps it from that; \
                 stop it where it runs: its events wait"
            );
            let store = wiring::existing_store(config).await?;
            workers::pause(config, &store, name, &by, &reason).await?;
        }
        SubscriberCommand::Resume { which } => {
            let store = wiring::existing_store(config).await?;
            workers::resume(config, &store, &which.name).await?;
        }
        SubscriberCommand::Remove { which, yes, by } => {
            remove::remove(config, &which.name, &by, yes).await?;
        }
        SubscriberCommand::Grant(args) => grant::grant(config, &args).await?,
    }
    Ok(ExitCode::SUCCESS)
}

fn list(config: &Config, output: Output) -> anyhow::Result<()> {
    let found = &config.subscribers;
    let subscribers = found.subscribers.iter().filter_map(|it| Some((it, subscriber(it)?)));
    if output == Output::Json {
        let usable = subscribers.map(|(worker, it)| {
            json!({
                "subscriber": it.name, "way": it.way.as_str(), "kinds": kinds(worker),
                "file": it.file.display().to_string(), "refused": null,
            })
        });
        let refused = found.refused.iter().map(|it| {
            json!({ "subscriber": it.name, "file": it.complaints.file, "refused": it.error() })
        });
        say!("{}", serde_json::Value::from_iter(usable.chain(refused)))?;
        return Ok(());
    }
    if found.names().next().is_none() {
        say!(
            "there is no subscriber in {}; `vestibule subscriber add` makes one",
            found.folder.display()
        )?;
        return Ok(());
    }
    let mut table = Table::new();
    table.load_style(NOTHING);
    table.set_header(["subscriber", "by", "events", "file"]);
    for (worker, it) in subscribers {
        let file = it.file.display().to_string();
        table.add_row([
            it.name.clone(),
            it.way.as_str().to_owned(),
            kinds(worker).join(", "),
            file,
        ]);
    }
    for it in &found.refused {
        table.add_row([it.name.as_str(), "refused", "", it.complaints.file.as_str()]);
    }
    say!("{table}")?;
    for refused in &found.refused {
        say!("\n{}", refused.complaints)?;
    }
    Ok(())
}

fn kinds(worker: &WorkerConfig) -> Vec<&'static str> {
    let kinds = &worker.settings.filter.kinds;
    if kinds.is_empty() { vec!["all"] } else { kinds.iter().map(|it| Kind::as_str(*it)).collect() }
}

async fn lag(config: &Config, name: Option<&str>, output: Output) -> anyhow::Result<()> {
    let name = name.map(|it| known(config, it)).transpose()?;
    let store = wiring::existing_store(config).await?;
    let wanted: Vec<_> = match name {
        Some(name) => vec![name],
        None => config.subscribers.names().collect(),
    };
    workers::show(config, &store, output, |it| wanted.contains(&it)).await
}

/// The name of a subscriber that there is, whether its file can be used or not.
fn known<'n>(config: &Config, name: &'n str) -> anyhow::Result<&'n str> {
    let names: Vec<_> = config.subscribers.names().collect();
    if !names.contains(&name) {
        bail!("there is no subscriber `{name}`{}", did_you_mean(name, &names));
    }
    Ok(name)
}

/// A subscriber that can be used.
fn find<'c>(config: &'c Config, name: &str) -> anyhow::Result<&'c WorkerConfig> {
    known(config, name)?;
    if let Some(refused) = config.subscribers.refused.iter().find(|it| it.name == name) {
        bail!("{}", refused.complaints);
    }
    let found = config.subscribers.subscribers.iter().find(|it| it.name() == name);
    found.context("it is known, so it can be used or is refused")
}

fn subscriber(worker: &WorkerConfig) -> Option<&SubscriberConfig> {
    match &worker.effect {
        EffectConfig::Subscriber(it) => Some(it),
        _ => None,
    }
}

/// Makes the folder of subscribers where there is none.
fn make_folder(folder: &Path) -> anyhow::Result<()> {
    if folder.is_dir() {
        return Ok(());
    }
    let made = std::fs::create_dir_all(folder).and_then(|()| pass_on(folder));
    made.with_context(|| format!("could not make the folder {}", folder.display()))
}

/// Writes a file that only its owner reads, and that was not there.
fn write_private(path: &Path, text: &str) -> anyhow::Result<()> {
    use std::io::Write as _;
    let file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
    let written = file.and_then(|mut file| file.write_all(text.as_bytes()));
    let written = written.and_then(|()| pass_on(path));
    written.with_context(|| format!("could not write {}", path.display()))
}

/// Gives what was made to whom the folder belongs to that it is in: an operator who is root makes it
/// for a process that is not.
fn pass_on(path: &Path) -> io::Result<()> {
    let folder = path.parent().filter(|it| *it != Path::new("")).unwrap_or(Path::new("."));
    let (folder, ours) = (folder.metadata()?, path.metadata()?);
    if folder.uid() == ours.uid() {
        return Ok(());
    }
    chown(path, Some(folder.uid()), Some(folder.gid()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn a_private_file_is_for_the_owner_of_its_folder_alone() {
        let folder = tempfile::tempdir().unwrap();
        // Whoever is not root has folders of one owner only.
        let given = chown(folder.path(), Some(12_345), Some(12_345));
        let owner = folder.path().metadata().unwrap().uid();
        assert_eq!(given.is_ok(), owner == 12_345);

        let subscribers = folder.path().join("subscribers");
        make_folder(&subscribers).unwrap();
        assert_eq!(subscribers.metadata().unwrap().uid(), owner);
        let file = subscribers.join("crm.key");
        write_private(&file, "whsec_").unwrap();

        let written = file.metadata().unwrap();
        assert_eq!((written.uid(), written.permissions().mode() & 0o777), (owner, 0o600));
        assert!(write_private(&file, "another").is_err(), "it was there");
    }
}
