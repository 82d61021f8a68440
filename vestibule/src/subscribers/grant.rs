//! `vestibule subscriber grant`: the right to take one's own events from the stream, and no more.
//!
//! Whoever runs a [nats] subscriber is a user of the NATS server: it may look at its consumer, ask it
//! for events and acknowledge them. It may not make, change or remove a consumer, take another one's
//! events, or publish. The server's file holds a hash of its password.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, bail, ensure};
use clap::Args;
use data_encoding::BASE64URL_NOPAD;

use super::{find, nats_conf, snippets::Snippets, subscriber, write_private};
use crate::{
    config::{Config, Way},
    dead::say,
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
    let password = password(&file)?;
    // Made by us and long, so nobody guesses it: the cheapest hash is as good as any.
    let hash = bcrypt::hash_with_result(&password, 4).context("could not hash the password")?;
    let user = user(name, &nats.stream, &hash.format_for_version(bcrypt::Version::TwoB));
    match &args.apply {
        None => {
            say!("Among the users of the account {} in nats.conf:\n\n{user}", nats_conf::ACCOUNT)?;
        }
        Some(path) => {
            apply(path, name, &user)?;
            say!("{} has the user {name} now. Let the server read it:", path.display())?;
            say!("  nats-server --signal reload")?;
        }
    }
    say!("\nIts password is in {}: give it to the team, by a safe way.\n", file.display())?;
    let snippets = Snippets { name, url: &nats.url, stream: &nats.stream, password: &file };
    say!("{snippets}")?;
    Ok(())
}

/// The password of before, so that a grant can be printed again; or a new one.
fn password(file: &Path) -> anyhow::Result<String> {
    if file.exists() {
        let text = std::fs::read_to_string(file)
            .with_context(|| format!("could not read {}", file.display()))?;
        return Ok(text.trim().to_owned());
    }
    let password = BASE64URL_NOPAD.encode(&rand::random::<[u8; 24]>());
    write_private(file, &format!("{password}\n"))?;
    Ok(password)
}

/// Today's shape of acknowledgements, and the one that 2.16 uses by default.
fn user(name: &str, stream: &str, hash: &str) -> String {
    format!(
        r#"# The subscriber {name}: takes its own events and acknowledges them.
{{
  user: {name}
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

/// Changes the server's file as a whole or not at all, once the server would take it.
fn apply(path: &Path, name: &str, user: &str) -> anyhow::Result<()> {
    let text = std::fs::read_to_string(path)
        .with_context(|| format!("could not read {}", path.display()))?;
    let changed = nats_conf::with_user(&text, name, user)
        .map_err(|error| anyhow::anyhow!("{} is left as it is: {error}", path.display()))?;
    // Beside it, because what it includes is found from there.
    let new = path.with_extension("conf.new");
    std::fs::write(&new, &changed).with_context(|| format!("could not write {}", new.display()))?;
    let done = look_through(&new, &changed).and_then(|()| {
        std::fs::set_permissions(&new, std::fs::metadata(path)?.permissions())?;
        Ok(std::fs::rename(&new, path)?)
    });
    if done.is_err() {
        drop(std::fs::remove_file(&new));
    }
    done.with_context(|| format!("{} is left as it is", path.display()))
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
