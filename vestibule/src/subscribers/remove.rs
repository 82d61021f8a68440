//! `vestibule subscriber remove`: its file, its consumer and what waits for it.

use anyhow::{Context, Error, bail};

use super::known;
use crate::{
    config::{Config, check_name},
    dead::{answer, say},
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
    say!("This removes {name}:")?;
    if file.exists() {
        say!("  {}", file.display())?;
    }
    for line in leaves.iter().flat_map(workers::Seen::leftovers) {
        say!("{line}")?;
    }
    if !yes && !answer("\nRemove it?")?.unwrap_or(false) {
        bail!("nothing was removed; --yes removes it without a question");
    }
    for extension in ["toml", "key", "password"] {
        let file = file.with_extension(extension);
        match std::fs::remove_file(&file) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("could not remove {}", file.display()));
            }
            _ => {}
        }
    }
    if let Some(leaves) = leaves {
        workers::remove_leftovers(config, &store, name, by, &leaves, InUse::Tell).await?;
    }
    say!("\n{name} is removed")?;
    Ok(())
}
