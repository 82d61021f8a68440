//! The SQLite file: how it is opened, what is in it, and who may have it open.

use std::{
    fs::{File, OpenOptions, TryLockError},
    io,
    os::unix::fs::{FileExt, MetadataExt},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, anyhow};
use sqlx::{
    ConnectOptions, Connection, SqliteConnection, SqlitePool,
    sqlite::{
        SqliteAutoVacuum, SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions,
        SqliteSynchronous,
    },
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

/// Makes the file and its tables where they do not exist, for whoever holds `lock`.
pub(super) async fn create(path: &Path, lock: &Lock) -> Result<(), LogError> {
    let directory = path.parent().filter(|it| !it.as_os_str().is_empty());
    let directory = directory.unwrap_or(Path::new("."));
    std::fs::create_dir_all(directory)
        .with_context(|| format!("could not create the directory {}", directory.display()))
        .map_err(LogError::Refused)?;
    let _turn = turn(directory).await?;
    if lock.had_log && std::fs::metadata(path).map_or(0, |it| it.len()) == 0 {
        return Err(lost(path, &lock.path));
    }
    create_private(path)
        .with_context(|| format!("could not create {}", path.display()))
        .map_err(LogError::Refused)?;

    let mut connection = writer(path, Sync::Full).await?;
    lay_out(path, &mut connection).await?;
    connection.close().await.map_err(failed(path))?;
    lock.note_log();
    Ok(())
}

/// Lets a connector and a relay that begin at once lay the file out one after the other. Held until it is
/// dropped; the folder is locked, so that no further file is left in it.
async fn turn(directory: &Path) -> Result<File, LogError> {
    let named = |error| {
        let text = format!("could not lock the directory {}", directory.display());
        LogError::Refused(anyhow::Error::from(error).context(text))
    };
    let file = File::open(directory).map_err(named)?;
    let deadline = Instant::now() + BUSY_TIMEOUT;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::WouldBlock) if Instant::now() < deadline => {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            Err(TryLockError::WouldBlock) => {
                return Err(LogError::Unavailable(anyhow!(
                    "another process holds the directory {} locked",
                    directory.display()
                )));
            }
            Err(TryLockError::Error(error)) => return Err(named(error)),
        }
    }
}

async fn lay_out(path: &Path, connection: &mut SqliteConnection) -> Result<(), LogError> {
    match version(connection).await.map_err(failed(path))? {
        SCHEMA_VERSION => Ok(()),
        0 => {
            let others: i64 = sqlx::query_scalar("select count(*) from sqlite_master")
                .fetch_one(&mut *connection)
                .await
                .map_err(failed(path))?;
            if others > 0 {
                return Err(no_log(path));
            }
            sqlx::raw_sql(SCHEMA).execute(connection).await.map_err(failed(path)).map(drop)
        }
        other => Err(from_later_version(path, other)),
    }
}

/// An empty log in the place of one that was there would pass for it, and the events would never be
/// missed.
fn lost(path: &Path, lock: &Path) -> LogError {
    LogError::Refused(anyhow!(
        "the log {path} is gone or empty, and {lock} says that there was one: bring it back from a \
         backup (with its -wal file, if there is one), or remove {lock} and {path}* to begin with \
         an empty log",
        path = path.display(),
        lock = lock.display(),
    ))
}

fn no_log(path: &Path) -> LogError {
    LogError::Refused(anyhow!("{} is not a log; name another data folder", path.display()))
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
        // Of a new file; one that was made without keeps its size and uses its free pages again.
        .auto_vacuum(SqliteAutoVacuum::Incremental)
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

/// A connection to a new log that holds a copy: nobody else opens it before it is whole, so it needs
/// no journal, and whoever writes it says when it is to be synced.
pub(super) async fn copy_target(path: &Path) -> Result<SqliteConnection, LogError> {
    if path.exists() {
        return Err(LogError::Refused(anyhow!("{} is there already", path.display())));
    }
    create_private(path)
        .with_context(|| format!("could not create {}", path.display()))
        .map_err(LogError::Refused)?;
    let options = options(path)
        .auto_vacuum(SqliteAutoVacuum::Incremental)
        .journal_mode(SqliteJournalMode::Off)
        .synchronous(SqliteSynchronous::Off);
    let mut connection = options.connect().await.map_err(failed(path))?;
    lay_out(path, &mut connection).await?;
    Ok(connection)
}

/// A connection to a log that nobody writes, and that may lie where nothing can be written.
pub(super) async fn still(path: &Path) -> Result<SqliteConnection, LogError> {
    let options = options(path).read_only(true).immutable(true);
    let mut connection = options.connect().await.map_err(failed(path))?;
    match version(&mut connection).await.map_err(failed(path))? {
        SCHEMA_VERSION => Ok(connection),
        0 => Err(no_log(path)),
        other => Err(from_later_version(path, other)),
    }
}

/// Gives at most `most` unused pages back to the disk, where there are many; says how many.
pub(super) async fn shrink(
    connection: &mut SqliteConnection,
    most: u64,
) -> Result<u64, sqlx::Error> {
    let pragma = |name: &'static str| sqlx::query_scalar::<_, i64>(name);
    let free = pragma("pragma freelist_count").fetch_one(&mut *connection).await?;
    let pages = pragma("pragma page_count").fetch_one(&mut *connection).await?;
    let surplus = surplus_pages(pages.cast_unsigned(), free.cast_unsigned()).min(most);
    // 2 is incremental; a file that was made without cannot be shrunk in steps.
    if surplus == 0 || pragma("pragma auto_vacuum").fetch_one(&mut *connection).await? != 2 {
        return Ok(0);
    }
    let step = sqlx::AssertSqlSafe(format!("pragma incremental_vacuum({surplus})"));
    sqlx::query(step).execute(connection).await?;
    Ok(surplus)
}

/// How many of the free pages are not worth keeping. Those kept take the next events without the
/// file having to grow again.
fn surplus_pages(pages: u64, free: u64) -> u64 {
    const KEPT_MIN: u64 = 16 * 1024;
    let used = pages.saturating_sub(free);
    free.saturating_sub(KEPT_MIN.max(used / 4))
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
        0 => return Err(no_log(path)),
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
#[derive(Debug)]
pub(super) struct Lock {
    file: File,
    path: PathBuf,
    /// Whoever held it before had a log here.
    had_log: bool,
}

impl Lock {
    /// Says who holds it, and that there is a log from now on.
    pub(super) fn note_log(&self) {
        let holder = format!("process {}\n", std::process::id());
        // What is said helps whoever is refused; without it the lock is as good.
        let written = self.file.write_all_at(holder.as_bytes(), 0);
        let _ = written.and_then(|()| self.file.set_len(holder.len() as u64));
    }
}

pub(super) fn lock(log: &Path, role: &str) -> Result<Lock, LogError> {
    let path = beside(log, &format!(".{role}.lock"));
    let refused = |error: io::Error| {
        LogError::Refused(
            anyhow::Error::from(error).context(format!("could not open {}", path.display())),
        )
    };
    if let Some(directory) = path.parent().filter(|it| !it.as_os_str().is_empty()) {
        std::fs::create_dir_all(directory).map_err(refused)?;
    }
    let mut options = OpenOptions::new();
    options.create(true).read(true).write(true).truncate(false);
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    let file = options.open(&path).map_err(refused)?;
    let taken = file.try_lock();
    let mut said = [0; 64];
    let length = file.read_at(&mut said, 0).map_err(refused)?;
    match taken {
        Ok(()) => Ok(Lock { file, path, had_log: length > 0 }),
        Err(TryLockError::WouldBlock) => {
            let holder = std::str::from_utf8(&said[..length]).unwrap_or_default().trim();
            let holder = if holder.is_empty() { "another process" } else { holder };
            Err(LogError::Refused(anyhow!(
                "the log {} is in use as {role} by {holder}, which holds {}; stop that one, or \
                 give this one a data directory of its own",
                log.display(),
                path.display()
            )))
        }
        Err(TryLockError::Error(error)) => Err(refused(error)),
    }
}

/// A file beside the log whose name begins with the log's.
pub(super) fn beside(log: &Path, suffix: &str) -> PathBuf {
    let mut path = log.as_os_str().to_owned();
    path.push(suffix);
    path.into()
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

/// What the file's disk has left for us; `None` where it does not say.
pub(super) fn room(path: &Path) -> Option<u64> {
    let disk = rustix::fs::statvfs(path).ok()?;
    Some(disk.f_bavail.saturating_mul(disk.f_frsize))
}

/// Turns an error of SQLite into what the caller can do about it.
pub(super) fn failed(path: &Path) -> impl FnOnce(sqlx::Error) -> LogError {
    let doing = format!("could not use the log {}", path.display());
    move |error| {
        let code = code(&error);
        let doing = match code.and_then(remedy) {
            Some(remedy) => format!("{doing}; {remedy}"),
            None => doing,
        };
        let error = anyhow::Error::from(error).context(doing);
        if code.is_some_and(is_permanent_code) {
            LogError::Refused(error)
        } else {
            LogError::Unavailable(error)
        }
    }
}

/// What somebody can do, where it can be known.
fn remedy(code: i32) -> Option<&'static str> {
    Some(match code & PRIMARY {
        FULL => "its disk is full: free some space, and it goes on by itself",
        PERM | READONLY | CANTOPEN => {
            "see that its folder and the files in it can be written by this user, and that the \
             file system is not mounted read-only"
        }
        CORRUPT | NOTADB => {
            "the file is damaged: stop Vestibule and keep all files that begin with its name; \
             `vestibule backup --salvage DIR` copies what can still be read and says what is \
             lost, and a copy made by `vestibule backup` earlier can take its place"
        }
        _ => return None,
    })
}

/// Somebody has to mend the file. That it cannot be opened does not say so: a process that has run
/// out of handles hears the same, and must not give its consumers up for it.
fn is_permanent_code(code: i32) -> bool {
    [PERM, READONLY, CORRUPT, NOTADB].contains(&(code & PRIMARY))
}

/// Whether what was asked for lies in a damaged part of the file.
pub(super) fn is_damage(error: &sqlx::Error) -> bool {
    code(error).is_some_and(|it| [CORRUPT, NOTADB].contains(&(it & PRIMARY)))
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
const FULL: i32 = 13;
const CANTOPEN: i32 = 14;
const NOTADB: i32 = 26;

#[cfg(test)]
mod tests {
    use super::*;

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

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn of_two_processes_that_begin_at_once_both_find_a_log() -> anyhow::Result<()> {
        for _ in 0..100 {
            let folder = tempfile::tempdir()?;
            let path = folder.path().join("events.db");
            let begins = ["writer", "relay"].map(|role| {
                let path = path.clone();
                tokio::spawn(async move { create(&path, &lock(&path, role)?).await })
            });
            for began in begins {
                began.await??;
            }
        }
        Ok(())
    }

    #[test]
    fn room_is_given_back_once_there_is_much_of_it() {
        assert_eq!(surplus_pages(20_000, 16_384), 0, "so much is kept in any case");
        assert_eq!(surplus_pages(20_000, 16_400), 16);
        assert_eq!(surplus_pages(1_000_000, 190_000), 0, "a quarter of what is used is kept");
        assert_eq!(surplus_pages(1_000_000, 300_000), 125_000);
    }
}
