//! `vestibule subscriber grant`: the right to take one's own events from the stream, and no more.
//!
//! Whoever runs a [nats] subscriber is a user of the NATS server: it may look at its consumer, ask it
//! for events and acknowledge them. It may not make, change or remove a consumer, take another one's
//! events, or publish. The server's file holds a hash of its password.

use std::{
    os::unix::fs::{MetadataExt as _, chown},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, anyhow, bail, ensure};
use clap::Args;
use data_encoding::BASE64URL_NOPAD;

use super::{find, nats_conf, snippets::Snippets, subscriber, write_private};
use crate::{
    config::{Config, Way},
    print::say,
};

#[derive(Debug, Args)]
pub(crate) struct GrantArgs {
    /// The subscriber, as `vestibule subscriber list` names it
    #[arg(value_name = "NAME")]
    name: String,
    /// Write the user into this configuration of the NATS server; otherwise it is only printed
    #[arg(long, value_name = "NATS.CONF")]
    apply: Option<PathBuf>,
}

pub(super) async fn grant(config: &Config, args: &GrantArgs) -> anyhow::Result<()> {
    let name = args.name.as_str();
    let worker = find(config, name)?;
    let way = subscriber(worker).map(|it| &it.way);
    ensure!(
        matches!(way, Some(Way::Nats)),
        "`{name}` is given its events by a worker of ours, so it needs no user of NATS"
    );
    let nats = config.nats.as_ref().context("a [nats] subscriber needs a [nats] section")?;
    let file = config.subscribers.folder.join(format!("{name}.password"));
    let (password, is_new) = password(&file)?;
    // Made by us and long, so nobody guesses it: the cheapest hash is as good as any.
    let hash = bcrypt::hash_with_result(&password, 4).context("could not hash the password")?;
    let user = user(name, &nats.stream, &hash.format_for_version(bcrypt::Version::TwoB));
    let changed =
        args.apply.as_deref().map(|path| Changed::prepare(path, name, &user)).transpose()?;
    // Nothing can be wrong any more but the disk; and the server must not have a user whose password
    // nobody knows.
    if is_new {
        write_private(&file, &format!("{password}\n"))?;
    }
    match changed {
        None => {
            say!("Among the users of the account {} in nats.conf:\n\n{user}", nats_conf::ACCOUNT)?;
        }
        Some(changed) => {
            let path = changed.path.clone();
            changed.install()?;
            say!("{} has the user {name} now. Let the server read it:", path.display())?;
            say!("  nats-server --signal reload")?;
        }
    }
    say!("\nIts password is in {}: give it to the team, by a safe way.\n", file.display())?;
    let snippets = Snippets { name, url: &nats.url, stream: &nats.stream, password: &file };
    say!("{snippets}")?;
    Ok(())
}

/// The password of before, so that a grant can be printed again, or a new one; and whether it is new.
fn password(file: &Path) -> anyhow::Result<(String, bool)> {
    if file.exists() {
        let text = std::fs::read_to_string(file)
            .with_context(|| format!("could not read {}", file.display()))?;
        return Ok((text.trim().to_owned(), false));
    }
    Ok((BASE64URL_NOPAD.encode(&rand::random::<[u8; 24]>()), true))
}

/// Today's shape of acknowledgements, and the one that 2.16 uses by default. The name is in quotes:
/// the server takes `on` or `no` for something else than a text.
fn user(name: &str, stream: &str, hash: &str) -> String {
    format!(
        r#"# The subscriber {name}: takes its own events and acknowledges them.
{{
  user: "{name}"
  password: "{hash}"
  permissions {{
    publish {{
      allow: [
        "$JS.API.CONSUMER.INFO.{stream}.{name}"
        "$JS.API.CONSUMER.MSG.NEXT.{stream}.{name}"
        "$JS.ACK.{stream}.{name}.>"
        "$JS.ACK.*.*.{stream}.{name}.>"
      ]
    }}
    subscribe {{ allow: [ "_INBOX_{name}.>" ] }}
  }}
}}"#
    )
}

/// The server's file with one user more, beside what it is to replace: as a whole or not at all.
struct Changed {
    path: PathBuf,
    new: PathBuf,
}

impl Changed {
    /// Refuses what the server would not take.
    fn prepare(path: &Path, name: &str, user: &str) -> anyhow::Result<Self> {
        let unreadable = || format!("could not read {}", path.display());
        // A link stays one: what it names is changed.
        let path = std::fs::canonicalize(path).with_context(unreadable)?;
        let text = std::fs::read_to_string(&path).with_context(unreadable)?;
        let changed = nats_conf::with_user(&text, name, user)
            .map_err(|error| anyhow!("{} is left as it is: {error}", path.display()))?;
        // Beside it, because what it includes is found from there.
        let mut new = path.clone().into_os_string();
        new.push(".new");
        let it = Self { new: new.into(), path };
        // What somebody left behind who was interrupted.
        drop(std::fs::remove_file(&it.new));
        it.write(&changed)
            .and_then(|()| look_through(&it.new, &changed))
            .with_context(|| format!("{} is left as it is", it.path.display()))?;
        Ok(it)
    }

    /// For the eyes of whoever may read the file of before: secrets stand in it.
    fn write(&self, text: &str) -> anyhow::Result<()> {
        write_private(&self.new, text)?;
        let (before, now) = (std::fs::metadata(&self.path)?, std::fs::metadata(&self.new)?);
        if (before.uid(), before.gid()) != (now.uid(), now.gid()) {
            chown(&self.new, Some(before.uid()), Some(before.gid())).with_context(|| {
                format!(
                    "could not keep its owner, {}:{}; run this as root, or as its owner",
                    before.uid(),
                    before.gid()
                )
            })?;
        }
        std::fs::set_permissions(&self.new, before.permissions())?;
        Ok(std::fs::File::open(&self.new)?.sync_all()?)
    }

    fn install(self) -> anyhow::Result<()> {
        std::fs::rename(&self.new, &self.path)
            .with_context(|| format!("{} is left as it is", self.path.display()))
    }
}

/// Nothing is left of what was not installed.
impl Drop for Changed {
    fn drop(&mut self) {
        drop(std::fs::remove_file(&self.new));
    }
}

/// Has the server look at its configuration, where there is one on this machine.
fn look_through(path: &Path, text: &str) -> anyhow::Result<()> {
    let mut server = Command::new("nats-server");
    server.arg("-t").arg("-c").arg(path);
    // Only the server's own environment has its passwords, and for a look any will do.
    for name in nats_conf::variables(text) {
        if std::env::var_os(name).is_none() {
            server.env(name, "stand-in");
        }
    }
    let looked = match server.output() {
        Ok(looked) => looked,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            eprintln!("warning: no nats-server is here that could check the file");
            return Ok(());
        }
        Err(error) => return Err(error).context("could not run nats-server"),
    };
    if !looked.status.success() {
        bail!("nats-server does not take it: {}", String::from_utf8_lossy(&looked.stderr).trim());
    }
    Ok(())
}
