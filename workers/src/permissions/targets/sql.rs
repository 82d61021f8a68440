//! Roles as rows of a database: a statement gives one, another takes it.
//!
//! Statements are the operator's own and run again where nobody knows whether they ran, so each must
//! do no harm when it is repeated (`INSERT … ON CONFLICT DO NOTHING`, `DELETE`). Values are bound to
//! named parameters, never written into the text.

use std::{fmt, str::FromStr, sync::OnceLock, time::Duration};

use anyhow::anyhow;
use async_trait::async_trait;
use secrecy::ExposeSecret;
use sqlx::{
    AssertSqlSafe, ConnectOptions, PgPool, SqlitePool, pool::PoolOptions,
    postgres::PgConnectOptions, sqlite::SqliteConnectOptions,
};
use tokio::time::timeout;
use vestibule_store::StoreError;

use super::{Actual, SqlSettings, Target, Whom};
use crate::{
    Cause, HandleError, SettingError,
    statements::{Dialect, NamedStatement},
};

/// How long for a connection, and then for a statement.
const LIMIT: Duration = Duration::from_secs(8);

/// Roles change now and then.
const CONNECTIONS: u32 = 2;

/// What a statement may name.
const PARAMETERS: [&str; 4] = ["person", "email", "object_id", "role"];

#[derive(Debug)]
pub(super) struct Sql {
    database: Database,
    give: NamedStatement,
    take: NamedStatement,
    holds: Option<NamedStatement>,
}

/// Opened when it is first needed: settings are checked where nothing runs.
enum Database {
    Postgres { options: Box<PgConnectOptions>, pool: OnceLock<PgPool> },
    Sqlite { options: Box<SqliteConnectOptions>, pool: OnceLock<SqlitePool> },
}

/// Says which database and leaves the rest out: a password may stand in it.
impl fmt::Debug for Database {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Postgres { .. } => "PostgreSQL",
            Self::Sqlite { .. } => "SQLite",
        })
    }
}

impl Sql {
    pub(super) fn new(settings: &SqlSettings, faults: &mut Vec<SettingError>) -> Option<Self> {
        let (database, dialect) = match Database::new(settings.url.expose_secret()) {
            Ok(database) => database,
            Err(message) => {
                faults.push(SettingError { key: "url", message: message.to_owned() });
                return None;
            }
        };
        let give = statement("grant", &settings.grant, dialect, faults);
        let take = statement("revoke", &settings.revoke, dialect, faults);
        let holds = match &settings.holds {
            Some(text) => Some(statement("holds", text, dialect, faults)?),
            None => None,
        };
        Some(Self { database, give: give?, take: take?, holds })
    }
}

/// A statement whose parameters we know.
fn statement(
    key: &'static str,
    text: &str,
    dialect: Dialect,
    faults: &mut Vec<SettingError>,
) -> Option<NamedStatement> {
    let mut complain = |message| faults.push(SettingError { key, message });
    let statement =
        NamedStatement::parse(text, dialect).map_err(|error| complain(error.to_string())).ok()?;
    let unknown = statement.parameters.iter().find(|it| !PARAMETERS.contains(&it.as_str()));
    if let Some(unknown) = unknown {
        let known = PARAMETERS.map(|it| format!(":{it}")).join(", ");
        complain(format!("there is no parameter :{unknown}; there are {known}"));
    }
    let knows_whom = |it: &String| it != "role";
    if !statement.parameters.iter().any(knows_whom) {
        complain("must name whom it is about: :person, :email or :object_id".to_owned());
    }
    Some(statement)
}

impl Database {
    fn new(url: &str) -> Result<(Self, Dialect), &'static str> {
        let (scheme, _) = url.split_once(':').unwrap_or_default();
        match scheme {
            "postgres" | "postgresql" => {
                let options = PgConnectOptions::from_str(url);
                let options = options.map_err(|_| "the PostgreSQL URL cannot be read")?;
                let limit = LIMIT.as_millis().to_string();
                let options = options
                    .application_name("vestibule")
                    .options([("statement_timeout", limit)])
                    .disable_statement_logging();
                let pool = OnceLock::new();
                Ok((Self::Postgres { options: Box::new(options), pool }, Dialect::Postgres))
            }
            "sqlite" => {
                let options = SqliteConnectOptions::from_str(url);
                let options = options
                    .map_err(|_| "the SQLite URL cannot be read: sqlite:PATH")?
                    .create_if_missing(false)
                    .busy_timeout(LIMIT / 2)
                    .disable_statement_logging();
                let pool = OnceLock::new();
                Ok((Self::Sqlite { options: Box::new(options), pool }, Dialect::Sqlite))
            }
            _ => Err("must be a URL that begins with postgres:// or sqlite:"),
        }
    }

    /// Runs a statement, and says whether it gave a row.
    async fn run(
        &self,
        statement: &NamedStatement,
        role: &str,
        whom: &Whom,
    ) -> Result<bool, HandleError> {
        let values = statement.parameters.iter().map(|name| value(name, role, whom));
        // Safe as it stands: it is text of the configuration, and nothing is ever written into it.
        let text = AssertSqlSafe(statement.text.clone());
        let ran = async {
            Ok::<_, sqlx::Error>(match self {
                Self::Postgres { options, pool } => {
                    let pool =
                        pool.get_or_init(|| connections().connect_lazy_with(*options.clone()));
                    let query = values.fold(sqlx::query(text), |query, value| query.bind(value));
                    query.fetch_optional(pool).await?.is_some()
                }
                Self::Sqlite { options, pool } => {
                    let pool =
                        pool.get_or_init(|| connections().connect_lazy_with(*options.clone()));
                    let query = values.fold(sqlx::query(text), |query, value| query.bind(value));
                    query.fetch_optional(pool).await?.is_some()
                }
            })
        };
        match timeout(2 * LIMIT, ran).await {
            Ok(ran) => ran.map_err(|error| failed(error.into())),
            Err(_) => {
                let source = anyhow!("the target's database did not answer in time");
                Err(HandleError::retry(Cause::Timeout, source))
            }
        }
    }
}

fn connections<DB: sqlx::Database>() -> PoolOptions<DB> {
    PoolOptions::new().max_connections(CONNECTIONS).acquire_timeout(LIMIT)
}

fn value(name: &str, role: &str, whom: &Whom) -> Option<String> {
    let value = match name {
        "person" => Some(whom.person.as_str()),
        "email" => whom.email.as_ref().map(vestibule_events::Email::expose),
        "object_id" => whom.object_id.as_deref(),
        _ => Some(role),
    };
    // PostgreSQL keeps no NUL character, but a platform may send one.
    value.map(|it| it.replace('\0', "\u{fffd}"))
}

/// What the database said holds no values; whose it is, is said here.
fn failed(error: StoreError) -> HandleError {
    let cause = match &error {
        StoreError::Unavailable(_) => Cause::Unavailable,
        StoreError::Misconfigured(_) => Cause::NotPermitted,
        StoreError::Refused(_) => Cause::Refused,
    };
    let source = anyhow!("the target's database did not run the statement: {}", error.cause());
    match cause {
        Cause::Refused => HandleError::park(cause, source),
        cause => HandleError::retry(cause, source),
    }
}

#[async_trait]
impl Target for Sql {
    async fn give(&self, role: &str, whom: &mut Whom) -> Result<(), HandleError> {
        self.database.run(&self.give, role, whom).await.map(drop)
    }

    async fn take(&self, role: &str, whom: &mut Whom) -> Result<(), HandleError> {
        self.database.run(&self.take, role, whom).await.map(drop)
    }

    async fn holds(&self, role: &str, whom: &mut [Whom]) -> Result<Vec<Actual>, HandleError> {
        let Some(holds) = &self.holds else { return Ok(vec![Actual::Unknown; whom.len()]) };
        let mut actual = Vec::with_capacity(whom.len());
        for whom in whom {
            actual.push(Actual::of(self.database.run(holds, role, whom).await?));
        }
        Ok(actual)
    }
}
