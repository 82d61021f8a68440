//! `vestibule subscriber remove`: its file, its consumer and what waits for it.

use anyhow::{Context, Error, bail};

use super::{known, nats_conf};
use crate::{
    config::{Config, check_name},
    dead::answer,
    print::say,
    wiring,
    workers::{self, InUse},
};

/// The file goes first, so that whatever runs lets go of the consumer.
pub(super) async fn remove(config: &Config, name: &str, by: &str, yes: bool) -> anyhow::Result<()> {
    // The name becomes that of a file and of a consumer, and no worker of ours is removed here.
    check_name(name).map_err(Error::msg)?;
    let found = &config.subscribers;
    if found
        .subscribers
        .iter()
        .any(|it| it.name() == name && it.place() == config.file.display().to_string())
    {
        bail!(
            "`{name}` stands in {}: take [subscribers.{name}] out of it, and then remove what it \
             leaves behind",
            config.file.display()
        );
    }
    let store = wiring::existing_store(config).await?;
    let leaves = workers::leaves(config, &store, name).await?;
    let file = found.folder.join(format!("{name}.toml"));
    if !file.exists() && leaves.is_none() {
        known(config, name)?;
    }
    let files = ["toml", "key", "password"].map(|extension| file.with_extension(extension));
    let files: Vec<_> = files.into_iter().filter(|it| it.exists()).collect();
    say!("This removes {name}:")?;
    for file in &files {
        say!("  {}", file.display())?;
    }
    for line in leaves.iter().flat_map(workers::Seen::leftovers) {
        say!("{line}")?;
    }
    say!("  what is known of it: one that is added under this name later is another one")?;
    if !yes && !answer("\nRemove it?")?.unwrap_or(false) {
        bail!("nothing was removed; --yes removes it without a question");
    }
    for file in &files {
        std::fs::remove_file(file)
            .with_context(|| format!("could not remove {}", file.display()))?;
    }
    let leaves = leaves.unwrap_or_default();
    workers::remove_leftovers(config, &store, name, by, &leaves, InUse::Tell).await?;
    say!("\n{name} is removed")?;
    // Only whoever was granted one has a password.
    if files.iter().any(|it| it.extension().is_some_and(|it| it == "password")) {
        say!(
            "\nIts user of NATS is not: take the user {name} out of the account {} in nats.conf, and \
             let the server read it:\n  nats-server --signal reload",
            nats_conf::ACCOUNT
        )?;
    }
    Ok(())
}
