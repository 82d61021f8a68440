//! Which database statements run in, and the connections to it.

use std::{fmt, str::FromStr, time::Duration};

use secrecy::{ExposeSecret, SecretString};
use sqlx::{
    AssertSqlSafe, ConnectOptions, Connection as _, Executor, MySqlConnection, PgConnection,
    SqliteConnection, mysql::MySqlConnectOptions, postgres::PgConnectOptions,
    sqlite::SqliteConnectOptions,
};
use tokio::time::timeout;
use vestibule_store::StoreConnection;

use super::{
    fault::{Fault, FaultKind},
    named::Dialect,
    speak::{mysql, postgres, sqlite},
};

/// A database of the user's: `postgres://`, `mysql://`, `mariadb://` or `sqlite:PATH`.
#[derive(Clone)]
pub struct TargetDatabase(Options);

#[derive(Clone)]
enum Options {
    Postgres(Box<PgConnectOptions>),
    MySql(Box<MySqlConnectOptions>),
    Sqlite(Box<SqliteConnectOptions>),
}

/// Says which database and leaves the rest out: a password stands in it.
impl fmt::Debug for TargetDatabase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TargetDatabase({:?}, …)", self.dialect())
    }
}

/// Does not quote the URL: a password stands in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TargetDatabaseError {
    #[error("expected a URL that begins with postgres://, mysql://, mariadb:// or sqlite:")]
    Scheme,
    #[error("the {0} URL cannot be read")]
    Unreadable(&'static str),
    #[error("a SQLite database must be a file: one in memory is gone with the connection")]
    InMemory,
}

/// Nobody waits longer for a server that is not there.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);

/// More statements than anybody has: what a statement's parameters are is kept by the connection,
/// and one that was forgotten would be prepared anew with types of ours.
const STATEMENTS_KEPT: usize = 1000;

impl TargetDatabase {
    pub fn parse(url: &SecretString) -> Result<Self, TargetDatabaseError> {
        use TargetDatabaseError::{InMemory, Scheme, Unreadable};

        let url = url.expose_secret();
        let (scheme, _) = url.split_once(':').ok_or(Scheme)?;
        Ok(Self(match scheme {
            "postgres" | "postgresql" => {
                let options = PgConnectOptions::from_str(url);
                Options::Postgres(Box::new(options.map_err(|_| Unreadable("PostgreSQL"))?))
            }
            "mysql" | "mariadb" => {
                let options = MySqlConnectOptions::from_str(url);
                Options::MySql(Box::new(options.map_err(|_| Unreadable("MySQL"))?))
            }
            "sqlite" if url.contains(":memory:") || url.contains("mode=memory") => {
                return Err(InMemory);
            }
            "sqlite" => {
                let options = SqliteConnectOptions::from_str(url);
                Options::Sqlite(Box::new(options.map_err(|_| Unreadable("SQLite"))?))
            }
            _ => return Err(Scheme),
        }))
    }

    pub(super) const fn dialect(&self) -> Dialect {
        match self.0 {
            Options::Postgres(_) => Dialect::Postgres,
            Options::MySql(_) => Dialect::MySql,
            Options::Sqlite(_) => Dialect::Sqlite,
        }
    }

    /// `limit` is for a statement; whoever waits for a lock is told so after half of it.
    pub(super) async fn connect(&self, limit: Duration) -> Result<Connection, Fault> {
        let connecting = async {
            Ok(match &self.0 {
                Options::Postgres(options) => {
                    let milliseconds = |it: Duration| it.as_millis().max(1).to_string();
                    let options = options
                        .as_ref()
                        .clone()
                        .application_name("vestibule")
                        .statement_cache_capacity(STATEMENTS_KEPT)
                        .options([
                            ("statement_timeout", milliseconds(limit)),
                            ("lock_timeout", milliseconds(limit / 2)),
                        ]);
                    Connection::Postgres(options.disable_statement_logging().connect().await?)
                }
                Options::MySql(options) => {
                    let options =
                        options.as_ref().clone().statement_cache_capacity(STATEMENTS_KEPT);
                    let mut connection = options.disable_statement_logging().connect().await?;
                    limit_mysql(&mut connection, limit).await?;
                    Connection::MySql(connection)
                }
                Options::Sqlite(options) => {
                    let options = options
                        .as_ref()
                        .clone()
                        .create_if_missing(false)
                        .busy_timeout(limit / 2)
                        .statement_cache_capacity(STATEMENTS_KEPT);
                    Connection::Sqlite(options.disable_statement_logging().connect().await?)
                }
            })
        };
        match timeout(CONNECT_LIMIT, connecting).await {
            Ok(connected) => connected.map_err(|error: sqlx::Error| {
                Fault::from(&error).of("the database cannot be reached")
            }),
            Err(_) => {
                let what = "the database cannot be reached: no answer in time";
                Err(Fault::new(FaultKind::Unavailable, what))
            }
        }
    }
}

async fn limit_mysql(connection: &mut MySqlConnection, limit: Duration) -> sqlx::Result<()> {
    let version: String =
        sqlx::query_scalar("SELECT VERSION()").fetch_one(&mut *connection).await?;
    let mut set =
        format!("SET SESSION innodb_lock_wait_timeout = {}", (limit / 2).as_secs().max(1));
    // MySQL itself limits nothing but SELECT; there our own patience has to do.
    if version.contains("MariaDB") {
        set.push_str(&format!(", max_statement_time = {}", limit.as_secs_f64().max(0.001)));
    }
    connection.execute(sqlx::raw_sql(AssertSqlSafe(set))).await?;
    Ok(())
}

/// A connection of our own.
#[derive(Debug)]
pub(super) enum Connection {
    Postgres(PgConnection),
    MySql(MySqlConnection),
    Sqlite(SqliteConnection),
}

impl Connection {
    pub(super) fn link(&mut self) -> Link<'_> {
        match self {
            Self::Postgres(connection) => Link::Postgres(connection),
            Self::MySql(connection) => Link::MySql(connection),
            Self::Sqlite(connection) => Link::Sqlite(connection),
        }
    }

    pub(super) async fn is_there(&mut self) -> bool {
        match self {
            Self::Postgres(connection) => connection.ping().await,
            Self::MySql(connection) => connection.ping().await,
            Self::Sqlite(connection) => connection.ping().await,
        }
        .is_ok()
    }
}

/// A connection of somebody's, on which statements run.
#[derive(Debug)]
pub(super) enum Link<'a> {
    Postgres(&'a mut PgConnection),
    MySql(&'a mut MySqlConnection),
    Sqlite(&'a mut SqliteConnection),
}

impl<'a> From<StoreConnection<'a>> for Link<'a> {
    fn from(connection: StoreConnection<'a>) -> Self {
        match connection {
            StoreConnection::Sqlite(connection) => Self::Sqlite(connection),
            StoreConnection::Postgres(connection) => Self::Postgres(connection),
        }
    }
}

impl Link<'_> {
    /// A command without parameters, such as `COMMIT`.
    pub(super) async fn command(&mut self, text: &'static str) -> Result<(), Fault> {
        match self {
            Self::Postgres(connection) => connection.execute(text).await.map(drop),
            Self::MySql(connection) => connection.execute(text).await.map(drop),
            Self::Sqlite(connection) => connection.execute(text).await.map(drop),
        }
        .map_err(|error| Fault::from(&error))
    }

    /// The same where the text is made at run time.
    pub(super) async fn define(&mut self, text: &Text) -> Result<(), Fault> {
        let text = sqlx::raw_sql(text.safe());
        match self {
            Self::Postgres(connection) => connection.execute(text).await.map(drop),
            Self::MySql(connection) => connection.execute(text).await.map(drop),
            Self::Sqlite(connection) => connection.execute(text).await.map(drop),
        }
        .map_err(|error| Fault::prepared(&error))
    }

    /// Whether the database takes a statement, without running it.
    pub(super) async fn prepare(&mut self, text: &Text, names: &[String]) -> Result<(), Fault> {
        match self {
            Self::Postgres(connection) => {
                postgres::parameters(connection, text, names).await.map(drop)
            }
            Self::MySql(connection) => mysql::prepare(connection, text).await,
            Self::Sqlite(connection) => sqlite::prepare(connection, text).await,
        }
    }

    /// Runs a statement with a value for each of its parameters; says how many rows it changed.
    pub(super) async fn execute(
        &mut self,
        text: &Text,
        names: &[String],
        values: &[serde_json::Value],
    ) -> Result<u64, Fault> {
        match self {
            Self::Postgres(connection) => postgres::execute(connection, text, names, values).await,
            Self::MySql(connection) => mysql::execute(connection, text, values).await,
            Self::Sqlite(connection) => sqlite::execute(connection, text, names, values).await,
        }
    }
}

/// The text of a statement.
#[derive(Clone, Debug)]
pub(super) struct Text(std::sync::Arc<str>);

impl Text {
    pub(super) fn new(text: &str) -> Self {
        Self(text.into())
    }

    pub(super) fn as_str(&self) -> &str {
        &self.0
    }

    /// Safe as it stands: it is text of the configuration, and nothing is ever written into it.
    pub(super) fn safe(&self) -> AssertSqlSafe<std::sync::Arc<str>> {
        AssertSqlSafe(std::sync::Arc::clone(&self.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_scheme_says_which_database_and_nothing_shows_the_password() {
        let parse = |url: &str| TargetDatabase::parse(&url.into());
        for (url, dialect) in [
            ("postgres://u:hunter2@db/people", Dialect::Postgres),
            ("mariadb://u:hunter2@db/people", Dialect::MySql),
            ("sqlite:people.db", Dialect::Sqlite),
        ] {
            let database = parse(url).unwrap();
            assert_eq!(database.dialect(), dialect, "{url}");
            assert!(!format!("{database:?}").contains("hunter2"), "{url}");
        }
        assert_eq!(parse("oracle://db").unwrap_err(), TargetDatabaseError::Scheme);
        assert_eq!(parse("sqlite::memory:").unwrap_err(), TargetDatabaseError::InMemory);
        let unreadable = parse("mysql://u:hunter2@db:port/people").unwrap_err();
        assert!(!unreadable.to_string().contains("hunter2"), "{unreadable}");
    }
}
