//! The SQLite file: how it is opened, what is in it, and who may have it open.

use std::{
    fs::{File, OpenOptions, TryLockError},
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, anyhow};
use sqlx::{
    ConnectOptions, Connection, SqliteConnection, SqlitePool,
    sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous},
};

use crate::LogError;

/// What this version writes. A file with a higher number comes from a later version.
const SCHEMA_VERSION: i64 = 1;

/// The events need no second index: their times rise with their sequences, and repetitions are
/// recognised in memory. `trimmed` keeps a sequence from being given twice when all are trimmed.
const SCHEMA: &str = "
    begin immediate;
    create table if not exists events (sequence integer primary key, event text not null) strict;
    create table if not exists consumers (
        name text primary key,
        cursor integer not null,
        pending text not null,
        filter text not null
    ) strict, without rowid;
    create table if not exists trimmed (
        one integer primary key check (one = 1),
        through integer not null
    ) strict;
    pragma user_version = 1;
    commit;
";

/// Readers at a time. Each is a thread; a reader in WAL mode waits for nobody.
const READERS: u32 = 4;

/// Another process writes for a few milliseconds at a time at most.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

/// In pages. Checkpoints are made beside the writer (see `upkeep`); this is the net below them.
const AUTOCHECKPOINT_PAGES: &str = "65536";

/// What a commit waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sync {
    /// The disk.
    Full,
    /// Nothing: a power cut may take back the last commits, a crash of the process none.
    Lazy,
}

/// Makes the file and its tables where they do not exist.
pub(super) async fn create(path: &Path) -> Result<(), LogError> {
    if let Some(directory) = path.parent().filter(|it| !it.as_os_str().is_empty()) {
        std::fs::create_dir_all(directory)
            .with_context(|| format!("could not create the directory {}", directory.display()))
            .map_err(LogError::Refused)?;
    }
    create_private(path)
        .with_context(|| format!("could not create {}", path.display()))
        .map_err(LogError::Refused)?;

    let mut connection = writer(path, Sync::Full).await?;
    match version(&mut connection).await.map_err(failed(path))? {
        SCHEMA_VERSION => {}
        0 => {
            sqlx::raw_sql(SCHEMA).execute(&mut connection).await.map_err(failed(path))?;
        }
        other => return Err(from_later_version(path, other)),
    }
    connection.close().await.map_err(failed(path))
}

/// An existing file is left as it is; a new one is for this user alone, as it holds personal data.
fn create_private(path: &Path) -> io::Result<()> {
    let mut options = OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    match options.open(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        other => other.map(drop),
    }
}

/// A connection that writes.
pub(super) async fn writer(path: &Path, sync: Sync) -> Result<SqliteConnection, LogError> {
    let synchronous = match sync {
        Sync::Full => SqliteSynchronous::Full,
        Sync::Lazy => SqliteSynchronous::Normal,
    };
    options(path)
        .journal_mode(SqliteJournalMode::Wal)
        .synchronous(synchronous)
        .pragma("wal_autocheckpoint", AUTOCHECKPOINT_PAGES)
        // Overwrites what is deleted where that costs no further write: trimmed events are
        // personal data.
        .pragma("secure_delete", "fast")
        .connect()
        .await
        .map_err(failed(path))
}

/// Connections that read.
pub(super) async fn readers(path: &Path) -> Result<SqlitePool, LogError> {
    SqlitePoolOptions::new()
        .max_connections(READERS)
        .test_before_acquire(false)
        .connect_with(options(path).read_only(true))
        .await
        .map_err(failed(path))
}

/// The same, for a log that somebody else made.
pub(super) async fn existing_readers(path: &Path) -> Result<SqlitePool, LogError> {
    if !path.exists() {
        let error =
            anyhow!("there is no log at {}; nothing was appended to it yet", path.display());
        return Err(LogError::Refused(error));
    }
    let pool = readers(path).await?;
    let mut connection = pool.acquire().await.map_err(failed(path))?;
    match version(&mut connection).await.map_err(failed(path))? {
        SCHEMA_VERSION => {}
        0 => {
            let error = anyhow!("{} is not a log", path.display());
            return Err(LogError::Refused(error));
        }
        other => return Err(from_later_version(path, other)),
    }
    drop(connection);
    Ok(pool)
}

fn options(path: &Path) -> SqliteConnectOptions {
    SqliteConnectOptions::new()
        .filename(path)
        .busy_timeout(BUSY_TIMEOUT)
        .foreign_keys(false)
        .disable_statement_logging()
}

async fn version(connection: &mut SqliteConnection) -> Result<i64, sqlx::Error> {
    sqlx::query_scalar("pragma user_version").fetch_one(connection).await
}

fn from_later_version(path: &Path, found: i64) -> LogError {
    LogError::Refused(anyhow!(
        "{} has format {found} and this version reads up to {SCHEMA_VERSION}; \
         a later version wrote it, so use that one",
        path.display()
    ))
}

/// Holds off a second process. The lock goes with the process, however that ends.
pub(super) fn lock(log: &Path, role: &str) -> Result<File, LogError> {
    let mut path = log.as_os_str().to_owned();
    path.push(format!(".{role}.lock"));
    let path = PathBuf::from(path);
    let refused = |error: io::Error| {
        LogError::Refused(
            anyhow::Error::from(error).context(format!("could not open {}", path.display())),
        )
    };
    if let Some(directory) = path.parent().filter(|it| !it.as_os_str().is_empty()) {
        std::fs::create_dir_all(directory).map_err(refused)?;
    }
    let mut options = OpenOptions::new();
    options.create(true).write(true).truncate(false);
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    let file = options.open(&path).map_err(refused)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(LogError::Refused(anyhow!(
            "the log {} is in use as {role} by another process (it holds {}); \
             stop that one, or give this one a data directory of its own",
            log.display(),
            path.display()
        ))),
        Err(TryLockError::Error(error)) => Err(refused(error)),
    }
}

/// Which file a path named. A file that was deleted takes writes as before, and loses all of them
/// with the process: whoever promises that something is stored has to look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Identity {
    device: u64,
    inode: u64,
}

impl Identity {
    pub(super) fn of(path: &Path) -> Result<Self, LogError> {
        let about = std::fs::metadata(path).with_context(|| {
            format!("the log {} is gone; bring it back and start again", path.display())
        });
        let about = about.map_err(LogError::Unavailable)?;
        Ok(Self { device: about.dev(), inode: about.ino() })
    }

    /// Whether `path` still names this file.
    pub(super) fn check(self, path: &Path) -> Result<(), LogError> {
        if Self::of(path)? == self {
            return Ok(());
        }
        Err(LogError::Unavailable(anyhow!(
            "the log {} was replaced by another file; start again to use that one",
            path.display()
        )))
    }
}

/// Turns an error of SQLite into what the caller can do about it.
pub(super) fn failed(path: &Path) -> impl FnOnce(sqlx::Error) -> LogError {
    let doing = format!("could not use the log {}", path.display());
    move |error| {
        let permanent = code(&error).is_some_and(is_permanent_code);
        let error = anyhow::Error::from(error).context(doing);
        if permanent { LogError::Refused(error) } else { LogError::Unavailable(error) }
    }
}

/// Somebody has to mend the file. That it cannot be opened does not say so: a process that has run
/// out of handles hears the same, and must not give its consumers up for it.
fn is_permanent_code(code: i32) -> bool {
    [PERM, READONLY, CORRUPT, NOTADB].contains(&(code & PRIMARY))
}

/// Whether a failed commit may be on disk all the same.
///
/// Everything else fails before the frame that makes a commit is written whole, or is rolled back.
/// But where the write went through and the sync failed, a crash decides.
pub(super) fn is_ambiguous(error: &sqlx::Error) -> bool {
    is_ambiguous_code(code(error))
}

/// Without a code it is not SQLite that speaks: its thread is gone, in the middle of who knows what.
fn is_ambiguous_code(code: Option<i32>) -> bool {
    code.is_none_or(|code| code & PRIMARY == IOERR)
}

/// The extended result code of SQLite.
fn code(error: &sqlx::Error) -> Option<i32> {
    error.as_database_error()?.code()?.parse().ok()
}

const PRIMARY: i32 = 0xff;
const PERM: i32 = 3;
const READONLY: i32 = 8;
const IOERR: i32 = 10;
const CORRUPT: i32 = 11;
const NOTADB: i32 = 26;

#[cfg(test)]
mod tests {
    use super::*;

    const CANTOPEN: i32 = 14;

    #[test]
    fn a_consumer_is_given_up_only_for_a_file_that_somebody_must_mend() {
        for code in [READONLY, CORRUPT, NOTADB, CORRUPT | 1 << 8] {
            assert!(is_permanent_code(code), "{code}");
        }
        for code in [5, IOERR, 13, CANTOPEN, CANTOPEN | 2 << 8] {
            assert!(!is_permanent_code(code), "{code}");
        }
    }

    #[test]
    fn only_what_may_hide_a_commit_is_ambiguous() {
        const BUSY: i32 = 5;
        const FULL: i32 = 13;
        const IOERR_WRITE: i32 = IOERR | 3 << 8;
        const IOERR_FSYNC: i32 = IOERR | 4 << 8;
        const CONSTRAINT_TRIGGER: i32 = 19 | 7 << 8;
        for code in [BUSY, READONLY, FULL, CORRUPT, CANTOPEN, CONSTRAINT_TRIGGER] {
            assert!(!is_ambiguous_code(Some(code)), "{code}");
        }
        for code in [Some(IOERR_WRITE), Some(IOERR_FSYNC), None] {
            assert!(is_ambiguous_code(code), "{code:?}");
        }
    }
}
