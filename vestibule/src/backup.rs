//! `vestibule backup`: a copy of what the data folder holds, taken while it is in use, and a look
//! whether such a copy is whole.
//!
//! The copies are of different moments, in an order that makes them fit: first how far each worker is
//! in the log, then the store, then the last events. So whatever the store knows of is in the log, and
//! whatever a worker has dealt with since its place was noted it is given again, and recognises.
//!
//! A backup without a manifest is not finished. It holds personal data and the key of pseudonyms: the
//! folder is for this user alone.

use std::{
    fs::{self, File},
    io::{Read, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, bail, ensure};
use clap::Args;
use data_encoding::HEXLOWER;
use indicatif::ProgressBar;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use sqlx::{ConnectOptions, Connection, SqliteConnection, sqlite::SqliteConnectOptions};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};
use tokio::{task::spawn_blocking, time::sleep};
use vestibule_events::{LocalLog, LogContents, LogCopy};

use crate::{
    cli::Output,
    config::{Config, StoreTarget},
    print::say,
    simulate::progress,
    wiring,
};

const LOG: &str = "events.db";
const STORE: &str = "store.db";
const KEY: &str = "pseudonym.key";
const MANIFEST: &str = "manifest.json";

/// While the store is copied, what was written is synced so often: much of it at once would hold up
/// the syncs that sign-ups wait for.
const SYNC_EVERY: Duration = Duration::from_millis(20);

const EXAMPLES: &str = "\
Examples:
  vestibule backup /backup/2026-11-22
      Copies the log, the embedded store and the generated key, also while `up` or `api` runs.
  vestibule backup --verify /backup/2026-11-22
      Reads the whole copy and says whether it is as it was made.
  vestibule backup --salvage /backup/rescued
      Of a damaged log, copies what can be read and says what is lost. Stop Vestibule before.

A scaled-out log is only what the stream does not have yet: back up the stream and PostgreSQL with
their own tools.";

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct BackupArgs {
    /// The folder of the backup; a new one, unless it is to be verified
    #[arg(value_name = "DIR")]
    folder: PathBuf,
    /// Check a backup instead of making one
    #[arg(long, conflicts_with = "salvage")]
    verify: bool,
    /// Pass over what is damaged in the log
    #[arg(long)]
    salvage: bool,
    #[arg(long, value_enum, default_value_t = Output::Table)]
    output: Output,
}

/// What a backup says of itself, written last.
#[derive(Debug, Serialize, Deserialize)]
struct Manifest {
    format: u32,
    /// The version that made it.
    vestibule: String,
    #[serde(with = "time::serde::rfc3339")]
    made_at: OffsetDateTime,
    /// Every event up to this one is in it, those aside that retention had removed, and `lost` ones.
    last_sequence: u64,
    events: u64,
    /// From where to where events could not be read.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    lost: Vec<(u64, u64)>,
    files: Vec<Copied>,
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Copied {
    name: String,
    bytes: u64,
    sha256: String,
}

const FORMAT: u32 = 1;

pub(crate) async fn backup(
    args: BackupArgs,
    load: impl Fn() -> anyhow::Result<Config>,
) -> anyhow::Result<()> {
    let BackupArgs { folder, verify: only_verify, salvage, output } = args;
    if only_verify {
        let manifest = verify(&folder, output).await?;
        return say(&manifest, output, || format!("the backup {} is whole", folder.display()));
    }
    let config = load()?;
    new_folder(&folder)?;
    let made = make(&config, &folder, salvage, output).await;
    if made.is_err() {
        // Half a backup helps nobody, and holds personal data.
        let _ = fs::remove_dir_all(&folder);
    }
    let manifest = made?;
    say(&manifest, output, || {
        let names: Vec<_> =
            manifest.files.iter().map(|it| format!("{}/{}", folder.display(), it.name)).collect();
        let (data, names) = (config.data.display(), names.join(" "));
        let mut text = format!(
            "backed up to {folder}\n\nTo restore it, stop Vestibule, move {data} out of the way, and\n  \
             mkdir -m 700 {data} && cp {names} {data}/\n\
             To check it: vestibule backup --verify {folder}",
            folder = folder.display(),
        );
        if !matches!(config.store.target, StoreTarget::Sqlite) {
            text += "\nThe store is in PostgreSQL and not in here: pg_dump it now, after the log.";
        }
        if config.nats.is_some() {
            text += "\nThe archive is the stream and not in here: nats stream backup.";
        }
        text
    })
}

fn say(manifest: &Manifest, output: Output, text: impl FnOnce() -> String) -> anyhow::Result<()> {
    match output {
        Output::Json => say!("{}", serde_json::to_string(manifest)?)?,
        Output::Table => {
            let Manifest { events, last_sequence, made_at, .. } = manifest;
            let made_at = made_at.format(&Rfc3339)?;
            say!("events up to sequence {last_sequence} ({events} of them), as of {made_at}")?;
            for (from, through) in &manifest.lost {
                say!("LOST: events {from} to {through} could not be read")?;
            }
            say!("{}", text())?;
        }
    }
    Ok(())
}

/// Never one that holds something: the only copy might be overwritten with a worse one.
fn new_folder(folder: &Path) -> anyhow::Result<()> {
    let made = fs::DirBuilder::new().mode(0o700).create(folder);
    made.with_context(|| {
        format!(
            "could not make the folder {}; a backup wants a new one, in a folder that exists",
            folder.display()
        )
    })
}

async fn make(
    config: &Config,
    folder: &Path,
    salvage: bool,
    output: Output,
) -> anyhow::Result<Manifest> {
    let source = config.log_file();
    let mut log = LogCopy::begin(&source, folder.join(LOG), salvage).await?;
    let bar = shown(output, "events", log.length().await.unwrap_or_default());
    // All there are by now, so that little is left for the moment when the parts must fit.
    while let Some(through) = log.step().await? {
        bar.set_position(through);
    }
    log.consumers().await?;
    let mut names = vec![LOG];
    if matches!(config.store.target, StoreTarget::Sqlite) && wiring::store_file(config).exists() {
        copy_store(&wiring::store_file(config), &folder.join(STORE)).await?;
        names.push(STORE);
    }
    while let Some(through) = log.step().await? {
        bar.set_position(through);
    }
    let made_at = OffsetDateTime::now_utc().replace_nanosecond(0)?;
    let LogContents { last_sequence, events, lost } = log.finish().await?;
    bar.finish_and_clear();

    let key = config.data.join(KEY);
    if key.exists() {
        fs::copy(&key, folder.join(KEY))
            .with_context(|| format!("could not copy {}", key.display()))?;
        names.push(KEY);
    }
    let mut files = vec![];
    for name in names {
        let path = folder.join(name);
        File::open(&path)?.sync_all().with_context(|| format!("could not sync {name}"))?;
        files.push(summed(path, name, ProgressBar::hidden()).await?);
    }
    let version = env!("CARGO_PKG_VERSION").to_owned();
    let manifest = Manifest {
        format: FORMAT,
        vestibule: version,
        made_at,
        last_sequence,
        events,
        lost,
        files,
    };
    write_manifest(folder, &manifest)?;
    Ok(manifest)
}

fn shown(output: Output, what: &'static str, length: u64) -> ProgressBar {
    match output {
        Output::Json => ProgressBar::hidden(),
        Output::Table => progress(what, length),
    }
}

/// In one statement of SQLite, which reads the store as it is at one moment and holds up nobody who
/// writes it.
async fn copy_store(source: &Path, target: &Path) -> anyhow::Result<()> {
    // Made first, as the copy is to be readable by nobody else.
    fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(target)?;
    let copying = async {
        let mut store = sqlite(source, false).await?;
        sqlx::query("vacuum into ?")
            .bind(target.to_string_lossy().into_owned())
            .execute(&mut store)
            .await?;
        store.close().await?;
        anyhow::Ok(())
    };
    let syncing = async {
        loop {
            sleep(SYNC_EVERY).await;
            let path = target.to_owned();
            // Should it fail, the sync at the end tells.
            let _ = spawn_blocking(move || File::open(path)?.sync_data()).await;
        }
    };
    tokio::select! {
        copied = copying => copied.with_context(|| format!("could not copy {}", source.display()))?,
        () = syncing => unreachable!("goes on for ever"),
    }
    check_store(target).await
}

async fn check_store(path: &Path) -> anyhow::Result<()> {
    let mut store = sqlite(path, true).await?;
    let told: String = sqlx::query_scalar("pragma quick_check(1)").fetch_one(&mut store).await?;
    ensure!(told == "ok", "{} is damaged: {told}", path.display());
    Ok(store.close().await?)
}

/// The embedded store's file as a file: what is in it is the store's own.
async fn sqlite(path: &Path, still: bool) -> anyhow::Result<SqliteConnection> {
    let options = SqliteConnectOptions::new()
        .filename(path)
        .read_only(true)
        .immutable(still)
        .busy_timeout(Duration::from_secs(5))
        .disable_statement_logging();
    options.connect().await.with_context(|| format!("could not open {}", path.display()))
}

fn write_manifest(folder: &Path, manifest: &Manifest) -> anyhow::Result<()> {
    let path = folder.join(MANIFEST);
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path)?;
    file.write_all(serde_json::to_string_pretty(manifest)?.as_bytes())?;
    file.write_all(b"\n")?;
    file.sync_all()?;
    // The names in it, too.
    Ok(File::open(folder)?.sync_all()?)
}

async fn summed(path: PathBuf, name: &str, bar: ProgressBar) -> anyhow::Result<Copied> {
    let reading = move || -> anyhow::Result<(u64, String)> {
        let mut file =
            File::open(&path).with_context(|| format!("could not open {}", path.display()))?;
        let (mut sum, mut bytes, mut buffer) = (Sha256::new(), 0, vec![0; 1 << 20]);
        loop {
            let read = file
                .read(&mut buffer)
                .with_context(|| format!("could not read {}", path.display()))?;
            if read == 0 {
                return Ok((bytes, HEXLOWER.encode(&sum.finalize())));
            }
            sum.update(&buffer[..read]);
            bytes += read as u64;
            bar.inc(read as u64);
        }
    };
    let (bytes, sha256) = spawn_blocking(reading).await??;
    Ok(Copied { name: name.to_owned(), bytes, sha256 })
}

/// Reads everything and compares it with the manifest.
async fn verify(folder: &Path, output: Output) -> anyhow::Result<Manifest> {
    let manifest = folder.join(MANIFEST);
    let text = fs::read_to_string(&manifest).with_context(|| {
        format!(
            "could not read {}; without it this is no backup, or one that was not finished",
            manifest.display()
        )
    })?;
    let manifest: Manifest = serde_json::from_str(&text)
        .with_context(|| format!("{} is damaged", manifest.display()))?;
    if manifest.format != FORMAT {
        bail!("this backup has format {}; use the version that made it", manifest.format);
    }
    let bytes = manifest.files.iter().map(|it| it.bytes).sum();
    let bar = shown(output, "bytes", bytes);
    for file in &manifest.files {
        ensure!(
            [LOG, STORE, KEY].contains(&file.name.as_str()),
            "the manifest names a file that is in no backup: {}",
            file.name
        );
        let found = summed(folder.join(&file.name), &file.name, bar.clone()).await?;
        ensure!(
            found == *file,
            "{} is not as it was made: {} bytes with SHA-256 {}, and the manifest says {} bytes \
             with {}; use another backup",
            file.name,
            found.bytes,
            found.sha256,
            file.bytes,
            file.sha256
        );
    }
    bar.finish_and_clear();
    let contents = LocalLog::contents(folder.join(LOG)).await?;
    ensure!(
        (contents.last_sequence, contents.events) == (manifest.last_sequence, manifest.events),
        "the log in it has {} events up to sequence {}, and the manifest says {} up to {}",
        contents.events,
        contents.last_sequence,
        manifest.events,
        manifest.last_sequence
    );
    if manifest.files.iter().any(|it| it.name == STORE) {
        check_store(&folder.join(STORE)).await?;
    }
    Ok(manifest)
}
