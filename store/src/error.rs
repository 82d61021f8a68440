//! Why the store did not do what it was asked, and so what the caller should do.

use std::{fmt, io::ErrorKind};

use sqlx::error::DatabaseError;

/// Why an operation failed. Nothing of it has happened, or (a connection lost during the commit)
/// all of it; asking again is safe either way.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// No connection, a lock, a timeout, a full disk: the same may go through later.
    #[error("the store does not answer for now")]
    Unavailable(#[source] Cause),
    /// The database does not take this data: trying again will not help.
    #[error("the store refuses the data")]
    Refused(#[source] Cause),
    /// The database as it is set up does not fit: credentials, permissions, missing tables.
    /// Somebody must act; no event is to blame.
    #[error("the store is not set up for this")]
    Misconfigured(#[source] Cause),
}

impl StoreError {
    /// Whether waiting can help while nobody touches the data: everything but a refusal.
    #[must_use]
    pub const fn may_pass(&self) -> bool {
        !matches!(self, Self::Refused(_))
    }

    #[must_use]
    pub const fn cause(&self) -> &Cause {
        match self {
            Self::Unavailable(cause) | Self::Refused(cause) | Self::Misconfigured(cause) => cause,
        }
    }
}

/// What the database said, without the values it said it about: those are people's data.
pub struct Cause(String);

impl Cause {
    pub(crate) fn new(what: impl Into<String>) -> Self {
        Self(what.into())
    }
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Cause {}

/// What an error code asks for; the variants are those of [`StoreError`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Unavailable,
    Refused,
    Misconfigured,
}

impl Verdict {
    fn with(self, what: impl Into<String>) -> StoreError {
        let cause = Cause::new(what);
        match self {
            Self::Unavailable => StoreError::Unavailable(cause),
            Self::Refused => StoreError::Refused(cause),
            Self::Misconfigured => StoreError::Misconfigured(cause),
        }
    }
}

impl From<sqlx::Error> for StoreError {
    fn from(error: sqlx::Error) -> Self {
        match &error {
            sqlx::Error::Database(error) => from_database(error.as_ref()),
            // A certificate that does not hold; a connection that breaks has other kinds.
            sqlx::Error::Io(error) if error.kind() == ErrorKind::InvalidData => {
                Verdict::Misconfigured.with(error.to_string())
            }
            sqlx::Error::Io(error) => Verdict::Unavailable.with(error.to_string()),
            sqlx::Error::PoolTimedOut => {
                Verdict::Unavailable.with("no connection within the time limit")
            }
            // An answer cut short looks like a violation of the protocol.
            sqlx::Error::Protocol(_)
            | sqlx::Error::PoolClosed
            | sqlx::Error::WorkerCrashed
            | sqlx::Error::BeginFailed => Verdict::Unavailable.with("the connection was lost"),
            sqlx::Error::Tls(_) => {
                Verdict::Misconfigured.with("the server and we do not agree on TLS")
            }
            sqlx::Error::Configuration(_) => {
                Verdict::Misconfigured.with("the address of the database cannot be read")
            }
            // The source of a decoding error can quote the value.
            sqlx::Error::ColumnDecode { index, .. } => {
                Verdict::Misconfigured.with(format!("column {index} does not have its type"))
            }
            sqlx::Error::ColumnNotFound(column) => {
                Verdict::Misconfigured.with(format!("there is no column {column}"))
            }
            _ => Verdict::Refused.with("the statement or its values do not fit the database"),
        }
    }
}

fn from_database(error: &(dyn DatabaseError + 'static)) -> StoreError {
    if let Some(error) = error.try_downcast_ref::<sqlx::sqlite::SqliteError>() {
        let code = error.code().and_then(|code| code.parse().ok()).unwrap_or_default();
        return of_sqlite(code).with(sqlite_in_words(code, error.message()));
    }
    let state = error.code().unwrap_or_default();
    // PostgreSQL quotes values in its messages and details; state and names are enough.
    let mut what = match in_words(&state) {
        Some(words) => format!("PostgreSQL: {words} (SQLSTATE {state})"),
        None => format!("PostgreSQL: SQLSTATE {state}"),
    };
    for name in [error.table(), error.constraint()].into_iter().flatten() {
        what.push_str(", ");
        what.push_str(name);
    }
    of_postgres(&state).with(what)
}

/// By the primary result code, which is the low byte of the extended one.
fn of_sqlite(code: i32) -> Verdict {
    match code & 0xff {
        // ABORT, BUSY, LOCKED, NOMEM, READONLY, INTERRUPT, IOERR, FULL, CANTOPEN, PROTOCOL,
        // SCHEMA: the surroundings.
        4..=10 | 13..=15 | 17 => Verdict::Unavailable,
        // TOOBIG, CONSTRAINT, MISMATCH, RANGE: the data.
        18..=20 | 25 => Verdict::Refused,
        // ERROR (no such table), PERM, CORRUPT, NOTADB and the rest: the file.
        _ => Verdict::Misconfigured,
    }
}

/// What SQLite says, by its extended result code, and the names in its message where the form of that
/// is known. The rest of a message is not passed on: functions and triggers quote values in it.
#[must_use]
pub fn sqlite_in_words(code: i32, message: &str) -> String {
    let (words, before_name) = match (code, code & 0xff) {
        (275, _) => ("a CHECK constraint failed", "constraint failed: "),
        (787, _) => ("a FOREIGN KEY constraint failed", ""),
        (1299, _) => ("a NOT NULL constraint failed", "constraint failed: "),
        (1555, _) => ("a PRIMARY KEY constraint failed", "constraint failed: "),
        (1811, _) => ("a trigger refused it", ""),
        (2067, _) => ("a UNIQUE constraint failed", "constraint failed: "),
        (3091, _) => ("a value is not of its column's type", " column "),
        (_, 1) if message.starts_with("no such table: ") => ("no such table", "no such table: "),
        (_, 1) if message.starts_with("no such column: ") => ("no such column", "no such column: "),
        (_, 1) => ("the statement or a value in it has an error", ""),
        (_, 5 | 6) => ("the database is locked", ""),
        (_, 7) => ("out of memory", ""),
        (_, 8) => ("the database is read only", ""),
        (_, 9) => ("the statement took too long", ""),
        (_, 10) => ("the disk fails", ""),
        (_, 11) => ("the file is damaged", ""),
        (_, 13) => ("the disk is full", ""),
        (_, 14) => ("the file cannot be opened", ""),
        (_, 17) => ("the schema has changed", ""),
        (_, 18) => ("a value is too large", ""),
        (_, 19) => ("a constraint failed", ""),
        (_, 20) => ("a value is not of the type that is wanted", ""),
        (_, 26) => ("the file is no SQLite database", ""),
        _ => ("it failed", ""),
    };
    let is_name = |it: char| it.is_ascii_alphanumeric() || "_.$, ".contains(it);
    let name = message.split_once(before_name).map(|(_, name)| name);
    match name.filter(|it| !before_name.is_empty() && it.chars().all(is_name)) {
        Some(name) => format!("SQLite: {words} ({code}), {name}"),
        None => format!("SQLite: {words} ({code})"),
    }
}

/// What somebody can do about it, where that is known.
fn in_words(state: &str) -> Option<&'static str> {
    Some(match state {
        "28P01" | "28000" => {
            "the server does not let this user in; see the user and the password in the URL, and \
             the server's pg_hba.conf"
        }
        "3D000" => {
            "the server has no database of this name; create it, or correct the name in the URL"
        }
        "42501" => "the user lacks a privilege; make it the owner of the database, or grant it",
        "42P01" | "42703" => {
            "a table or a column is missing; bring the schema up to date with `vestibule migrate`"
        }
        "25006" => "the server takes no changes for now: a standby, or set to read only",
        "53100" => "the server's disk is full",
        "53300" => {
            "the server has no connection left; raise its max_connections, or use fewer processes"
        }
        "55P03" => "somebody holds a lock for too long",
        "57014" => "the statement took too long",
        "57P01" | "57P02" => "the server is stopping",
        "57P03" => "the server is starting",
        _ => return None,
    })
}

/// By the class of the SQLSTATE, which is its first two characters.
fn of_postgres(state: &str) -> Verdict {
    match state {
        // A standby that was asked to write: a failover is on its way.
        "25006" => Verdict::Unavailable,
        _ => match state.get(..2).unwrap_or_default() {
            // Data exception, constraint.
            "22" | "23" => Verdict::Refused,
            // Authorisation, catalogue, schema, syntax and privileges, configuration file.
            "0P" | "28" | "3D" | "3F" | "42" | "F0" | "0A" => Verdict::Misconfigured,
            // A program limit exceeded, e.g. an index row too long: the data.
            "54" => Verdict::Refused,
            // Connection, rollback, resources, object state, operator, system, and what we do
            // not know: nothing is lost by trying again.
            _ => Verdict::Unavailable,
        },
    }
}

#[cfg(test)]
mod tests {
    use sqlx::{Connection as _, SqliteConnection};

    use super::*;

    #[tokio::test]
    async fn no_value_is_in_what_sqlite_says() {
        let mut connection = SqliteConnection::connect("sqlite::memory:").await.unwrap();
        let setup =
            "CREATE TABLE people (email TEXT NOT NULL UNIQUE CHECK (email <> 'x'), seen INTEGER,
                CHECK (seen < 10)) STRICT;
            INSERT INTO people (email) VALUES ('ada@example.com');
            CREATE TRIGGER refuses BEFORE UPDATE ON people
                BEGIN SELECT RAISE(ABORT, 'ada@example.com is refused'); END";
        sqlx::raw_sql(setup).execute(&mut connection).await.unwrap();
        for (statement, expected) in [
            (
                "INSERT INTO people (email) VALUES ($1)",
                "a UNIQUE constraint failed (2067), people.email",
            ),
            (
                "INSERT INTO people (email) SELECT NULL WHERE $1 <> ''",
                "a NOT NULL constraint failed (1299), people.email",
            ),
            (
                "INSERT INTO people (email, seen) VALUES ('x' || $1, 99)",
                "a CHECK constraint failed (275)",
            ),
            (
                "INSERT INTO people (email, seen) VALUES ('y', $1)",
                "a value is not of its column's type (3091), people.seen",
            ),
            ("UPDATE people SET seen = 1 WHERE email = $1", "a trigger refused it (1811)"),
            ("SELECT json_extract('{}', $1)", "the statement or a value in it has an error (1)"),
            ("DELETE FROM peopel WHERE email = $1", "no such table (1), peopel"),
        ] {
            let ran = sqlx::query(statement).bind("ada@example.com").execute(&mut connection).await;
            let said = StoreError::from(ran.unwrap_err());
            assert_eq!(said.cause().to_string(), format!("SQLite: {expected}"), "{statement}");
        }
    }

    #[test]
    fn what_may_pass_is_told_from_what_will_not() {
        for state in [
            "08006", "40001", "40P01", "53300", "55P03", "57014", "57P01", "57P03", "25006",
            "XX000",
        ] {
            assert_eq!(of_postgres(state), Verdict::Unavailable, "{state}");
        }
        for state in ["22P02", "22021", "23505", "23503", "54000"] {
            assert_eq!(of_postgres(state), Verdict::Refused, "{state}");
        }
        for state in ["28P01", "3D000", "42P01", "42501", "42601"] {
            assert_eq!(of_postgres(state), Verdict::Misconfigured, "{state}");
        }
        // BUSY, BUSY_SNAPSHOT, IOERR_WRITE, FULL, READONLY, CANTOPEN.
        for code in [5, 517, 778, 13, 8, 14] {
            assert_eq!(of_sqlite(code), Verdict::Unavailable, "{code}");
        }
        // CONSTRAINT_UNIQUE, CONSTRAINT_CHECK, MISMATCH.
        for code in [2067, 275, 20] {
            assert_eq!(of_sqlite(code), Verdict::Refused, "{code}");
        }
        // ERROR, CORRUPT, NOTADB.
        for code in [1, 11, 26] {
            assert_eq!(of_sqlite(code), Verdict::Misconfigured, "{code}");
        }
    }
}
