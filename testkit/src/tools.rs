//! Finds the programs that tests run.

use std::path::{Path, PathBuf};

use anyhow::Context as _;

/// Where `scripts/test` installs what the system lacks.
pub(crate) fn installed() -> PathBuf {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let target = std::env::var_os("CARGO_TARGET_DIR").unwrap_or_else(|| "target".into());
    // An absolute path replaces the workspace's; Cargo reads a relative one from there too, as a rule.
    workspace.join(target).join("tools")
}

/// `NATS_SERVER` if set, then what `scripts/test` installed, then the `PATH`.
pub(crate) fn nats_server() -> anyhow::Result<PathBuf> {
    if let Some(chosen) = std::env::var_os("NATS_SERVER") {
        return Ok(chosen.into());
    }
    let installed = installed().join("bin/nats-server");
    if installed.exists() {
        return Ok(installed);
    }
    on_path("nats-server").context(
        "nats-server was not found: run ./scripts/test, or install nats-server 2.15.1 or newer on the PATH",
    )
}

/// The directory with `initdb` and `postgres`; the newest of several.
pub(crate) fn postgres_bin() -> anyhow::Result<PathBuf> {
    let has_both = |dir: &Path| dir.join("initdb").exists() && dir.join("postgres").exists();
    let packaged = std::fs::read_dir("/usr/lib/postgresql").ok();
    let newest = packaged
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            let version: u32 = entry.file_name().to_str()?.parse().ok()?;
            Some((version, entry.path().join("bin")))
        })
        .filter(|(_, bin)| has_both(bin))
        .max();
    newest
        .map(|(_, bin)| bin)
        .or_else(|| on_path("initdb")?.parent().filter(|dir| has_both(dir)).map(Path::to_owned))
        .context("PostgreSQL was not found: run ./scripts/test, or install the PostgreSQL server (Debian: apt-get install postgresql)")
}

/// Debian keeps it where only administrators look for programs.
pub(crate) fn mariadbd() -> anyhow::Result<PathBuf> {
    on_path("mariadbd")
        .or_else(|| Some(PathBuf::from("/usr/sbin/mariadbd")).filter(|file| file.is_file()))
        .context("mariadbd was not found: run ./scripts/test, or install the MariaDB server (Debian: apt-get install mariadb-server-core)")
}

/// `PROMTOOL` if set, then what `scripts/test` installed, then the `PATH`.
pub fn promtool() -> anyhow::Result<PathBuf> {
    if let Some(chosen) = std::env::var_os("PROMTOOL") {
        return Ok(chosen.into());
    }
    let installed = installed().join("bin/promtool");
    if installed.exists() {
        return Ok(installed);
    }
    on_path("promtool").context(
        "promtool was not found: run ./scripts/test, or install Prometheus (Debian: apt-get install prometheus)",
    )
}

/// A folder with packages of Python or Node.js that `scripts/test` has installed: `openapi`, or `node/` and a
/// folder of ours that has a `package.json`.
pub fn packages(name: &str) -> anyhow::Result<PathBuf> {
    let folder = installed().join(name);
    anyhow::ensure!(folder.is_dir(), "the packages of {name} were not found: run ./scripts/test");
    Ok(folder.canonicalize()?)
}

pub fn node() -> anyhow::Result<PathBuf> {
    on_path("node")
        .context("node was not found: run ./scripts/test, or install Node.js 18.19 or newer")
}

/// A Python that can import aiosmtpd is the caller's hope: the child says so if it cannot.
pub fn python() -> anyhow::Result<PathBuf> {
    on_path("python3")
        .context("python3 was not found: run ./scripts/test, or install Python 3 and aiosmtpd")
}

pub(crate) fn setpriv() -> anyhow::Result<PathBuf> {
    on_path("setpriv").context(
        "setpriv was not found: run ./scripts/test, or install util-linux (the tests need Linux)",
    )
}

fn on_path(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|dir| dir.join(program)).find(|file| file.is_file())
}
