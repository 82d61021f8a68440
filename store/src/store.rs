//! The store: which database, and how to reach it.

use std::{
    fmt,
    path::{Path, PathBuf},
    str::FromStr,
    sync::Arc,
    time::Duration,
};

use secrecy::{ExposeSecret, SecretString};
use sqlx::{
    ConnectOptions, Connection, PgPool, SqlitePool,
    postgres::{PgConnectOptions, PgPoolOptions},
    sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous},
};

use crate::{
    StoreError,
    error::Cause,
    file::{self, Identity},
    session::{Session, fetch_optional, within},
    sqlite::Writer,
};

/// A handle to the business data; cheap to clone.
///
/// A server that goes away and comes back needs nothing from us: operations fail with
/// [`StoreError::Unavailable`] meanwhile, each within its limits, and then go through again.
#[derive(Clone)]
pub struct Store {
    pub(crate) database: Arc<Database>,
    pub(crate) options: StoreOptions,
}

pub(crate) enum Database {
    Sqlite { file: SqliteConnectOptions, identity: Identity, writer: Writer, readers: SqlitePool },
    Postgres { server: PgConnectOptions, pool: PgPool },
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match *self.database {
            Database::Sqlite { .. } => "Store(SQLite)",
            Database::Postgres { .. } => "Store(PostgreSQL)",
        })
    }
}

/// Where the business data is.
#[derive(Clone)]
pub enum StoreUrl {
    /// A file, created where there is none.
    Sqlite(PathBuf),
    /// `postgres://user:password@host/database`.
    Postgres(SecretString),
}

/// Leaves the URL out: a password stands in it.
impl fmt::Debug for StoreUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Sqlite(path) => write!(f, "Sqlite({})", path.display()),
            Self::Postgres(_) => f.write_str("Postgres(…)"),
        }
    }
}

/// Limits of the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StoreOptions {
    pub connections: u32,
    /// How long an operation waits for a connection, and so for a server that is down.
    pub acquire_timeout: Duration,
    pub statement_timeout: Duration,
}

impl Default for StoreOptions {
    fn default() -> Self {
        Self {
            connections: 8,
            acquire_timeout: Duration::from_secs(5),
            statement_timeout: Duration::from_secs(10),
        }
    }
}

impl StoreOptions {
    /// The server ends a statement by itself; this much later we stop waiting for its word.
    pub(crate) fn patience(&self) -> Duration {
        self.statement_timeout + Duration::from_secs(1)
    }
}

/// A connection that lay idle for longer is asked whether it is still there before it is used.
///
/// Short enough that after a restart of the server hardly anybody meets a dead connection, long
/// enough that under load nobody pays for asking.
const TRUSTED_IDLE: Duration = Duration::from_secs(1);

/// How long to look for the reason why a server cannot be reached.
const REASON: Duration = Duration::from_secs(1);

impl Store {
    /// Opens the store; the schema is left as it is, see [`Store::migrate`].
    ///
    /// A server that is down is [`StoreError::Unavailable`] after `acquire_timeout`.
    pub async fn open(url: &StoreUrl, options: StoreOptions) -> Result<Self, StoreError> {
        let database = match url {
            StoreUrl::Sqlite(path) => open_sqlite(path, options).await?,
            StoreUrl::Postgres(url) => open_postgres(url, options)?,
        };
        let store = Self { database: Arc::new(database), options };
        match store.ping().await {
            Ok(()) => Ok(store),
            Err(StoreError::Unavailable(cause)) => Err(store.say_where(cause).await),
            Err(error) => Err(error),
        }
    }

    /// Whether the database answers, and a file is still where it was.
    pub async fn ping(&self) -> Result<(), StoreError> {
        self.check_file()?;
        let mut session = self.read().await?;
        let _: Option<(i32,)> = fetch_optional!(&mut session, sqlx::query_as("SELECT 1"))?;
        Ok(())
    }

    fn check_file(&self) -> Result<(), StoreError> {
        match &*self.database {
            Database::Sqlite { identity, .. } => identity.check(),
            Database::Postgres { .. } => Ok(()),
        }
    }

    /// Adds to why the store could not be opened what somebody who starts it has to look at.
    async fn say_where(&self, cause: Cause) -> StoreError {
        let Database::Postgres { server, .. } = &*self.database else {
            return StoreError::Unavailable(cause);
        };
        // The pool only says that it took too long; whoever asks once more hears why.
        let cause = match within(REASON, server.connect()).await {
            Err(StoreError::Unavailable(reason)) => reason,
            Err(other) => return other,
            Ok(_) => cause,
        };
        let (host, port) = (server.get_host(), server.get_port());
        let place = match server.get_socket() {
            Some(folder) => format!("{}, port {port}", folder.display()),
            None => format!("{host}:{port}"),
        };
        StoreError::Unavailable(Cause::new(format!(
            "no PostgreSQL server answers at {place} ({cause}); see that it is running and that \
             this is its address"
        )))
    }

    /// A session that reads.
    pub(crate) async fn read(&self) -> Result<Session, StoreError> {
        let limit = self.options.patience();
        Ok(match &*self.database {
            Database::Sqlite { readers, .. } => Session::sqlite(readers.acquire().await?, limit),
            Database::Postgres { pool, .. } => Session::postgres(pool.acquire().await?, limit),
        })
    }

    /// A session with a transaction begun; nothing of it stays unless it is committed.
    pub(crate) async fn write(&self) -> Result<Session, StoreError> {
        self.check_file()?;
        let limit = self.options.patience();
        let mut session = match &*self.database {
            Database::Sqlite { writer, .. } => {
                Session::turn(writer.turn(self.options.acquire_timeout, limit).await?, limit)
            }
            Database::Postgres { .. } => self.read().await?,
        };
        session.begin().await?;
        Ok(session)
    }
}

async fn open_sqlite(path: &Path, options: StoreOptions) -> Result<Database, StoreError> {
    file::create_private(path)?;
    let file = SqliteConnectOptions::new()
        .filename(path)
        .create_if_missing(true)
        .journal_mode(SqliteJournalMode::Wal)
        // An effect must not vanish in a power cut: its event may be acknowledged already.
        .synchronous(SqliteSynchronous::Full)
        .foreign_keys(true)
        .busy_timeout(options.statement_timeout)
        .disable_statement_logging();
    let writer = Writer::open(file.clone(), options.patience()).await?;
    let identity = Identity::of(path)?;
    let readers = SqlitePoolOptions::new()
        .max_connections(options.connections)
        .acquire_timeout(options.acquire_timeout)
        .test_before_acquire(false)
        .connect_lazy_with(file.clone().create_if_missing(false).pragma("query_only", "on"));
    Ok(Database::Sqlite { file, identity, writer, readers })
}

fn open_postgres(url: &SecretString, options: StoreOptions) -> Result<Database, StoreError> {
    let milliseconds = |duration: Duration| duration.as_millis().to_string();
    let server = PgConnectOptions::from_str(url.expose_secret())
        .map_err(|_| {
            // The error may quote the URL, and with it the password.
            StoreError::Misconfigured(Cause::new("the PostgreSQL URL cannot be read"))
        })?
        .application_name("vestibule")
        .disable_statement_logging();
    let limited = server.clone().options([
        ("statement_timeout", milliseconds(options.statement_timeout)),
        // Shorter, so that who waits for a lock is told so and not just that it took long.
        ("lock_timeout", milliseconds(options.statement_timeout / 2)),
    ]);
    let pool = PgPoolOptions::new()
        .max_connections(options.connections)
        .acquire_timeout(options.acquire_timeout)
        .test_before_acquire(false)
        .before_acquire(|connection, idle| {
            Box::pin(async move {
                if idle.idle_for > TRUSTED_IDLE {
                    connection.ping().await?;
                }
                Ok(true)
            })
        })
        .connect_lazy_with(limited);
    Ok(Database::Postgres { server, pool })
}
