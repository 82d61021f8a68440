//! Questions to a SQL database: PostgreSQL, MySQL or MariaDB, SQLite.
//!
//! Whoever configures Vestibule writes the query; what a person sends is only ever bound to its
//! placeholders, which look as the database writes them (`$1`, `?`). Sessions are read-only and
//! their statements limited in time, by the server too. A pool connects when it is first asked, so
//! that a server that is away holds nothing up. Rows become JSON here and nowhere else; how long an
//! answer is good for, and what is done without one, is left to the callers.
//!
//! Faults say nothing that a row or an argument holds: what the database says when it runs a query
//! may quote either, so only its code is passed on. What it says when it prepares a query cannot.

mod mysql;
mod postgres;
mod sqlite;

use std::{
    fmt,
    str::FromStr,
    sync::{Arc, OnceLock},
    time::Duration,
};

use secrecy::{ExposeSecret, SecretString};
use serde_json::{Map, Number, Value};
use sqlx::{
    AssertSqlSafe, ConnectOptions, Connection, Database, MySql, Pool, Postgres, SqlSafeStr, SqlStr,
    Sqlite,
    mysql::MySqlConnectOptions,
    pool::{PoolConnection, PoolOptions},
    postgres::PgConnectOptions,
    sqlite::SqliteConnectOptions,
    types::Decimal,
};
use time::{
    Date, OffsetDateTime, PrimitiveDateTime, Time,
    format_description::{StaticFormatDescription, well_known::Rfc3339},
    macros::format_description,
};

/// Where a database is: `postgres://`, `mysql://`, `mariadb://` or `sqlite:PATH`.
#[derive(Clone)]
pub struct DatabaseUrl(Kind);

#[derive(Clone)]
enum Kind {
    Postgres(Box<PgConnectOptions>),
    MySql(Box<MySqlConnectOptions>),
    Sqlite(Box<SqliteConnectOptions>),
}

/// Says which database and leaves the rest out: a password stands in it.
impl fmt::Debug for DatabaseUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DatabaseUrl({}, …)", self.database())
    }
}

/// Does not quote the URL: a password stands in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DatabaseUrlError {
    #[error("expected a URL that begins with postgres://, mysql://, mariadb:// or sqlite:")]
    Scheme,
    #[error("the {0} URL cannot be read")]
    Unreadable(&'static str),
    #[error("a SQLite database must be a file: one in memory is empty")]
    InMemory,
}

impl DatabaseUrl {
    pub fn parse(url: &SecretString) -> Result<Self, DatabaseUrlError> {
        let url = url.expose_secret();
        let (scheme, _) = url.split_once(':').ok_or(DatabaseUrlError::Scheme)?;
        let kind = match scheme {
            "postgres" | "postgresql" => PgConnectOptions::from_str(url)
                .map(|it| Kind::Postgres(Box::new(it)))
                .map_err(|_| DatabaseUrlError::Unreadable("PostgreSQL"))?,
            "mysql" | "mariadb" => MySqlConnectOptions::from_str(url)
                .map(|it| Kind::MySql(Box::new(it)))
                .map_err(|_| DatabaseUrlError::Unreadable("MySQL"))?,
            "sqlite" if url.contains(":memory:") || url.contains("mode=memory") => {
                return Err(DatabaseUrlError::InMemory);
            }
            "sqlite" => SqliteConnectOptions::from_str(url)
                .map(|it| Kind::Sqlite(Box::new(it)))
                .map_err(|_| DatabaseUrlError::Unreadable("SQLite"))?,
            _ => return Err(DatabaseUrlError::Scheme),
        };
        Ok(Self(kind))
    }

    /// Its name, as a reader knows it.
    #[must_use]
    pub fn database(&self) -> &'static str {
        match self.0 {
            Kind::Postgres(_) => "PostgreSQL",
            Kind::MySql(_) => "MySQL",
            Kind::Sqlite(_) => "SQLite",
        }
    }
}

/// Why a database gave no answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SqlFault {
    #[error("the database did not answer in time")]
    Late,
    #[error("the database cannot be reached: {0}")]
    Unreachable(String),
    /// What the database says about the text of the query, before anything is bound to it.
    #[error("the database does not take the query: {0}")]
    Query(String),
    #[error("the query has {expected} placeholders, but there are {given} arguments")]
    Placeholders { expected: usize, given: usize },
    #[error(
        "placeholder {place} is of type {type_name}, to which nothing can be bound: write it as text and cast it in the query"
    )]
    Placeholder { place: usize, type_name: String },
    /// An argument does not fit its placeholder, or is nothing the database can work with.
    #[error("argument {0} does not fit its placeholder")]
    Argument(usize),
    #[error("the database refused its arguments{}", Code(.0))]
    Arguments(Option<String>),
    #[error("the query failed{}", Code(.0))]
    Failed(Option<String>),
    #[error(
        "column {column} is of type {type_name}, which cannot be read: cast it to text in the query"
    )]
    Column { column: String, type_name: String },
}

impl SqlFault {
    /// Whether it may be gone tomorrow without anybody changing the configuration.
    #[must_use]
    pub fn is_temporary(&self) -> bool {
        matches!(self, Self::Late | Self::Unreachable(_))
    }
}

struct Code<'a>(&'a Option<String>);

impl fmt::Display for Code<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.as_ref().map_or(Ok(()), |code| write!(f, " with code {code}"))
    }
}

/// A query and the database it is for.
pub(crate) struct Sql {
    server: Server,
    query: Arc<str>,
    limits: Limits,
}

enum Server {
    Postgres(Lazy<Postgres>),
    MySql(Lazy<MySql>),
    Sqlite(Lazy<Sqlite>),
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    pub(crate) connections: u32,
    /// For a statement, and for getting a connection.
    pub(crate) time: Duration,
}

/// The same words to each of the three: the expression is compiled once for each.
macro_rules! on_any {
    ($sql:expr, $server:ident => $answer:expr) => {
        match &$sql.server {
            Server::Postgres($server) => $answer,
            Server::MySql($server) => $answer,
            Server::Sqlite($server) => $answer,
        }
    };
}

impl Sql {
    pub(crate) fn new(database: &DatabaseUrl, query: &str, limits: Limits) -> Self {
        let server = match &database.0 {
            Kind::Postgres(options) => Server::Postgres(Lazy::new(options.as_ref(), limits)),
            Kind::MySql(options) => Server::MySql(Lazy::new(options.as_ref(), limits)),
            Kind::Sqlite(options) => Server::Sqlite(Lazy::new(options.as_ref(), limits)),
        };
        Self { server, query: query.into(), limits }
    }

    /// Asks the database whether it takes the query with this many arguments, without running it.
    pub(crate) async fn verify(&self, arguments: usize) -> Result<(), SqlFault> {
        let (query, limits) = (self.query(), self.limits);
        self.in_time(async {
            on_any!(self, server => server.verify(query, arguments, limits).await)
        })
        .await
    }

    /// The first row of the answer, its columns by name; those without a value are left out.
    pub(crate) async fn first_row(
        &self,
        arguments: &[Value],
    ) -> Result<Option<Map<String, Value>>, SqlFault> {
        let (query, limits) = (self.query(), self.limits);
        self.in_time(async {
            on_any!(self, server => server.first_row(query, arguments, limits).await)
        })
        .await
    }

    /// Hands over the first column of every row as text, until told to stop; rows without a value
    /// are left out.
    pub(crate) async fn first_column(
        &self,
        each: &mut (dyn FnMut(String) -> bool + Send),
    ) -> Result<(), SqlFault> {
        let (query, limits) = (self.query(), self.limits);
        self.in_time(async {
            on_any!(self, server => server.first_column(query, each, limits).await)
        })
        .await
    }

    /// The server's own limits do not help where the server is gone.
    async fn in_time<T>(
        &self,
        work: impl Future<Output = Result<T, SqlFault>>,
    ) -> Result<T, SqlFault> {
        tokio::time::timeout(self.limits.time, work).await.unwrap_or(Err(SqlFault::Late))
    }

    /// Safe as it stands: it is text of the configuration, and nothing is ever written into it.
    fn query(&self) -> SqlStr {
        AssertSqlSafe(Arc::clone(&self.query)).into_sql_str()
    }
}

/// What the databases do differently.
trait Dialect: Database {
    /// Read-only, with limits, and without logging statements.
    fn tame(
        options: <Self::Connection as Connection>::Options,
        limits: Limits,
    ) -> <Self::Connection as Connection>::Options;

    /// What a new session must be told; nothing, where the options could say it.
    fn begin(
        connection: &mut Self::Connection,
        limits: Limits,
    ) -> impl Future<Output = sqlx::Result<()>> + Send;

    /// How many placeholders the query has.
    fn prepare(
        connection: &mut Self::Connection,
        query: SqlStr,
    ) -> impl Future<Output = Result<usize, SqlFault>> + Send;

    fn first_row(
        connection: &mut Self::Connection,
        query: SqlStr,
        arguments: &[Value],
        limits: Limits,
    ) -> impl Future<Output = Result<Option<Map<String, Value>>, SqlFault>> + Send;

    fn first_column(
        connection: &mut Self::Connection,
        query: SqlStr,
        each: &mut (dyn FnMut(String) -> bool + Send),
        limits: Limits,
    ) -> impl Future<Output = Result<(), SqlFault>> + Send;
}

/// A pool that is made when it is first asked: making one takes a runtime, which whoever only
/// checks a configuration does not have.
struct Lazy<D: Dialect> {
    options: <D::Connection as Connection>::Options,
    pool: OnceLock<Pool<D>>,
}

/// Whoever waits longer for a connection waits for a server that is not there; a query may take its
/// time.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);

/// A connection that lay idle for longer is asked whether it is still there before it is used.
///
/// Short enough that after a restart of the server hardly anybody meets a dead connection, long
/// enough that under load nobody pays for asking.
const TRUSTED_IDLE: Duration = Duration::from_secs(1);

impl<D: Dialect> Lazy<D> {
    fn new(options: &<D::Connection as Connection>::Options, limits: Limits) -> Self {
        let options = D::tame(options.clone(), limits).disable_statement_logging();
        Self { options, pool: OnceLock::new() }
    }

    async fn verify(
        &self,
        query: SqlStr,
        arguments: usize,
        limits: Limits,
    ) -> Result<(), SqlFault> {
        let mut connection = self.connect(limits).await?;
        let checked = fits(D::prepare(&mut connection, query).await?, arguments);
        // The answer is there; whether the goodbye arrives does not matter.
        let _ = connection.close().await;
        checked
    }

    async fn first_row(
        &self,
        query: SqlStr,
        arguments: &[Value],
        limits: Limits,
    ) -> Result<Option<Map<String, Value>>, SqlFault> {
        let mut lent = self.borrow(limits).await?;
        let row = D::first_row(lent.connection(), query, arguments, limits).await;
        lent.settle(&row);
        row
    }

    async fn first_column(
        &self,
        query: SqlStr,
        each: &mut (dyn FnMut(String) -> bool + Send),
        limits: Limits,
    ) -> Result<(), SqlFault> {
        let mut connection = self.connect(limits).await?;
        fits(D::prepare(&mut connection, query.clone()).await?, 0)?;
        D::first_column(&mut connection, query, each, limits).await
    }

    /// A connection outside the pool. Unlike the pool it says at once when nobody is there.
    async fn connect(&self, limits: Limits) -> Result<D::Connection, SqlFault> {
        let connecting = async {
            let mut connection = self.options.connect().await?;
            D::begin(&mut connection, limits).await?;
            Ok(connection)
        };
        match tokio::time::timeout(limits.time.min(CONNECT_LIMIT), connecting).await {
            Ok(connected) => connected.map_err(|error| unreachable(&error)),
            Err(_) => Err(SqlFault::Late),
        }
    }

    async fn borrow(&self, limits: Limits) -> Result<Lent<D>, SqlFault> {
        let pool = self.pool.get_or_init(|| {
            PoolOptions::new()
                .max_connections(limits.connections)
                .acquire_timeout(limits.time)
                .after_connect(move |connection, _| Box::pin(D::begin(connection, limits)))
                .test_before_acquire(false)
                .before_acquire(|connection: &mut D::Connection, idle| {
                    Box::pin(async move {
                        if idle.idle_for > TRUSTED_IDLE {
                            connection.ping().await?;
                        }
                        Ok(true)
                    })
                })
                .connect_lazy_with(self.options.clone())
        });
        let connection = pool.acquire().await.map_err(|error| unreachable(&error))?;
        Ok(Lent { connection: Some(connection), in_doubt: true })
    }
}

fn fits(expected: usize, given: usize) -> Result<(), SqlFault> {
    if expected == given { Ok(()) } else { Err(SqlFault::Placeholders { expected, given }) }
}

/// A connection of the pool. One whose statement did not come to an end is not given back: its next
/// user would wait for that statement.
struct Lent<D: Dialect> {
    connection: Option<PoolConnection<D>>,
    in_doubt: bool,
}

impl<D: Dialect> Lent<D> {
    fn connection(&mut self) -> &mut D::Connection {
        self.connection.as_mut().expect("it is given back only when dropped")
    }

    /// A query that failed may have failed by what its session remembers: a table may have
    /// changed since the statement was prepared. A new session knows better.
    fn settle<T>(&mut self, outcome: &Result<T, SqlFault>) {
        self.in_doubt = matches!(
            outcome,
            Err(SqlFault::Late
                | SqlFault::Unreachable(_)
                | SqlFault::Failed(_)
                | SqlFault::Query(_))
        );
    }
}

impl<D: Dialect> Drop for Lent<D> {
    fn drop(&mut self) {
        if let Some(connection) = self.connection.take_if(|_| self.in_doubt) {
            // Without a goodbye, for which a server that hangs would let us wait.
            drop(connection.detach());
        }
    }
}

/// What went wrong while a connection was made: nobody's data is in that.
fn unreachable(error: &sqlx::Error) -> SqlFault {
    match error {
        sqlx::Error::PoolTimedOut => SqlFault::Late,
        // It may name the user, and even the password's kind; the code says enough.
        sqlx::Error::Database(error) => {
            let code = error.code().unwrap_or_default();
            SqlFault::Unreachable(format!("the server refused the connection with code {code}"))
        }
        sqlx::Error::Io(error) => SqlFault::Unreachable(error.kind().to_string()),
        sqlx::Error::Tls(_) => SqlFault::Unreachable("TLS could not be agreed on".to_owned()),
        _ => SqlFault::Unreachable("the connection could not be made".to_owned()),
    }
}

/// What went wrong while a query was prepared.
fn unprepared(error: &sqlx::Error) -> SqlFault {
    match error {
        sqlx::Error::Database(error) => SqlFault::Query(error.message().to_owned()),
        other => unreachable(other),
    }
}

/// What went wrong while a query ran.
fn failed(error: &sqlx::Error) -> SqlFault {
    match error {
        sqlx::Error::Database(error) => {
            let code = error.code().map(|code| code.into_owned());
            match code.as_deref() {
                // PostgreSQL: cancelled by statement_timeout, or by lock_timeout.
                Some("57014" | "55P03") => SqlFault::Late,
                // The class of data exceptions: text that is no number, a zero byte.
                Some(code) if code.len() == 5 && code.starts_with("22") => {
                    SqlFault::Arguments(Some(code.to_owned()))
                }
                _ => SqlFault::Failed(code),
            }
        }
        sqlx::Error::Encode(_) => SqlFault::Arguments(None),
        other => unreachable(other),
    }
}

fn text(value: Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text),
        Value::Number(number) => Some(number.to_string()),
        Value::Bool(truth) => Some(truth.to_string()),
        Value::Null | Value::Array(_) | Value::Object(_) => None,
    }
}

/// Whole numbers stay whole; others come as near as JSON readers get.
fn from_decimal(decimal: Decimal) -> Option<Value> {
    let plain = decimal.normalize().to_string();
    if let Ok(whole) = plain.parse::<i64>() {
        return Some(whole.into());
    }
    plain.parse().ok().and_then(Number::from_f64).map(Value::Number)
}

fn from_float(float: f64) -> Option<Value> {
    Number::from_f64(float).map(Value::Number)
}

/// The number that a reader sees, and not what is left of it in half as many bits.
fn from_short_float(float: f32) -> Option<Value> {
    float.to_string().parse().ok().and_then(from_float)
}

const DATE: StaticFormatDescription = format_description!("[year]-[month]-[day]");
const TIME: StaticFormatDescription =
    format_description!("[hour]:[minute]:[second][optional [.[subsecond digits:1+]]]");
const PLAIN_TIME: StaticFormatDescription = format_description!("[hour]:[minute]:[second]");

fn from_date(date: Date) -> Option<Value> {
    date.format(DATE).ok().map(Value::String)
}

fn from_time(time: Time) -> Option<Value> {
    let format = if time.nanosecond() == 0 { PLAIN_TIME } else { TIME };
    time.format(format).ok().map(Value::String)
}

/// Who stores no zone is taken to mean UTC.
fn from_plain_moment(moment: PrimitiveDateTime) -> Option<Value> {
    from_moment(moment.assume_utc())
}

fn from_moment(moment: OffsetDateTime) -> Option<Value> {
    moment.format(&Rfc3339).ok().map(Value::String)
}

/// Text where it is text, as columns with a binary collation are; otherwise base64.
fn from_bytes(bytes: &[u8]) -> Value {
    match std::str::from_utf8(bytes) {
        Ok(text) => text.into(),
        Err(_) => data_encoding::BASE64.encode(bytes).into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(url: &str) -> Result<DatabaseUrl, DatabaseUrlError> {
        DatabaseUrl::parse(&url.into())
    }

    #[test]
    fn the_scheme_says_which_database() {
        for (url, database) in [
            ("postgres://u:p@db/people", "PostgreSQL"),
            ("postgresql://db", "PostgreSQL"),
            ("mysql://u:p@db/people", "MySQL"),
            ("mariadb://u:p@db/people", "MySQL"),
            ("sqlite:people.db", "SQLite"),
            ("sqlite:///srv/people.db", "SQLite"),
        ] {
            assert_eq!(parse(url).unwrap().database(), database, "{url}");
        }
        for url in ["", "db", "oracle://db", "http://db", "Postgres ://"] {
            assert_eq!(parse(url).unwrap_err(), DatabaseUrlError::Scheme, "{url}");
        }
        assert_eq!(parse("sqlite::memory:").unwrap_err(), DatabaseUrlError::InMemory);
    }

    #[test]
    fn neither_a_url_nor_its_fault_shows_the_password() {
        let good = format!("{:?}", parse("postgres://u:hunter2@db/people").unwrap());
        let bad = parse("mysql://u:hunter2@db:port/people").unwrap_err().to_string();
        assert!(!good.contains("hunter2") && !bad.contains("hunter2"), "{good} {bad}");
    }

    #[test]
    fn numbers_and_moments_become_json_that_reads_the_same() {
        let decimal = |text: &str| from_decimal(text.parse().unwrap()).unwrap().to_string();
        assert_eq!(decimal("12.50"), "12.5");
        assert_eq!(decimal("9007199254740993"), "9007199254740993");
        assert_eq!(decimal("7.00"), "7");
        assert_eq!(from_short_float(0.1).unwrap().to_string(), "0.1");
        assert_eq!(from_float(f64::NAN), None);
        let moment = time::macros::datetime!(2024-02-29 12:30:05.25 UTC);
        assert_eq!(from_moment(moment).unwrap(), "2024-02-29T12:30:05.25Z");
        assert_eq!(from_date(moment.date()).unwrap(), "2024-02-29");
        assert_eq!(from_time(moment.time()).unwrap(), "12:30:05.25");
        assert_eq!(from_time(time::macros::time!(7:05)).unwrap(), "07:05:00");
        assert_eq!(from_bytes("Zoë".as_bytes()), "Zoë");
        assert_eq!(from_bytes(&[0xff, 0]), "/wA=");
    }
}
