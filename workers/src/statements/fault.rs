//! What a database says when it does not do what it was asked, and what follows from it.
//!
//! Messages of databases quote the values they complain about, and those are people's data: once
//! something is bound, only codes and the names of tables, columns and constraints are passed on.

use anyhow::anyhow;
use sqlx::{
    error::DatabaseError, mysql::MySqlDatabaseError, postgres::PgDatabaseError, sqlite::SqliteError,
};
use vestibule_store::{StoreError, sqlite_in_words};

use crate::{Cause, HandleError};

/// Why statements did not run.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{what}")]
pub(super) struct Fault {
    pub(super) kind: FaultKind,
    what: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FaultKind {
    /// Nobody answers, or the server cannot serve.
    Unavailable,
    /// A statement took too long, or waited too long for a lock.
    Late,
    /// Somebody else was in the way, and the transaction is gone.
    Conflict,
    /// The statement and the database do not go together, or a privilege is missing.
    NotPermitted,
    /// The row is there already.
    Duplicate,
    /// The database does not take these values.
    Refused,
    /// Our own store cannot serve.
    Store,
}

impl Fault {
    pub(super) fn new(kind: FaultKind, what: impl Into<String>) -> Self {
        Self { kind, what: what.into() }
    }

    pub(super) fn late() -> Self {
        Self::new(FaultKind::Late, "the database did not answer in time")
    }

    /// What went wrong while a statement was prepared: nothing is bound yet, so the database's own
    /// words may be passed on.
    pub(super) fn prepared(error: &sqlx::Error) -> Self {
        let fault = Self::from(error);
        match (error, fault.kind) {
            // SQLite has one code for everything that is wrong with a statement.
            (sqlx::Error::Database(error), FaultKind::Refused | FaultKind::NotPermitted) => {
                Self::new(FaultKind::NotPermitted, error.message())
            }
            _ => fault,
        }
    }

    /// The same, with what it is about in front.
    pub(super) fn of(self, subject: &str) -> Self {
        Self { what: format!("{subject}: {}", self.what), ..self }
    }

    /// The same from our own store, which is not the target's to be away.
    pub(super) fn of_store(self) -> Self {
        match self.kind {
            FaultKind::Unavailable => Self { kind: FaultKind::Store, ..self },
            _ => self,
        }
    }

    /// Whether the transaction cannot go on; otherwise going back to a savepoint is enough.
    pub(super) const fn ends_transaction(&self) -> bool {
        matches!(self.kind, FaultKind::Unavailable | FaultKind::Conflict | FaultKind::Store)
    }
}

impl From<&sqlx::Error> for Fault {
    fn from(error: &sqlx::Error) -> Self {
        match error {
            sqlx::Error::Database(error) => of_database(error.as_ref()),
            sqlx::Error::Io(error) => Self::new(FaultKind::Unavailable, error.kind().to_string()),
            sqlx::Error::Tls(_) => {
                Self::new(FaultKind::NotPermitted, "the server and we do not agree on TLS")
            }
            sqlx::Error::Encode(_) => {
                Self::new(FaultKind::Refused, "a value does not fit its parameter")
            }
            // An answer cut short looks like a violation of the protocol.
            _ => Self::new(FaultKind::Unavailable, "the connection was lost"),
        }
    }
}

/// What our own store says about its own part.
impl From<StoreError> for Fault {
    fn from(error: StoreError) -> Self {
        let kind = if error.may_pass() { FaultKind::Store } else { FaultKind::Refused };
        Self::new(kind, format!("{error}: {}", error.cause()))
    }
}

impl From<Fault> for HandleError {
    fn from(fault: Fault) -> Self {
        let cause = match fault.kind {
            FaultKind::Unavailable | FaultKind::Conflict => Cause::Unavailable,
            FaultKind::Late => Cause::Timeout,
            FaultKind::NotPermitted => Cause::NotPermitted,
            FaultKind::Duplicate | FaultKind::Refused => return Self::park(Cause::Refused, fault),
            FaultKind::Store => return Self::StoreUnavailable(anyhow!(fault)),
        };
        Self::retry(cause, fault)
    }
}

fn of_database(error: &(dyn DatabaseError + 'static)) -> Fault {
    if let Some(error) = error.try_downcast_ref::<PgDatabaseError>() {
        let mut what = format!("PostgreSQL: SQLSTATE {}", error.code());
        for (kind, name) in [
            ("table", error.table()),
            ("column", error.column()),
            ("constraint", error.constraint()),
        ] {
            if let Some(name) = name {
                what.push_str(&format!(", {kind} {name}"));
            }
        }
        return Fault::new(of_postgres(error.code()), what);
    }
    if let Some(error) = error.try_downcast_ref::<MySqlDatabaseError>() {
        let (number, state) = (error.number(), error.code().unwrap_or_default());
        let mut what = format!("MySQL: error {number}");
        if let Some(name) = name_in(number, error.message()) {
            what.push_str(&format!(", {name}"));
        }
        return Fault::new(of_mysql(number, state), what);
    }
    if let Some(error) = error.try_downcast_ref::<SqliteError>() {
        let code = error.code().and_then(|code| code.parse().ok()).unwrap_or_default();
        return Fault::new(of_sqlite(code), sqlite_in_words(code, error.message()));
    }
    Fault::new(FaultKind::Unavailable, "the database failed")
}

/// By the class of the SQLSTATE, which is its first two characters.
fn of_postgres(state: &str) -> FaultKind {
    match (state, state.get(..2).unwrap_or_default()) {
        ("23505", _) => FaultKind::Duplicate,
        // Cancelled by `statement_timeout` or `lock_timeout`.
        ("57014" | "55P03", _) => FaultKind::Late,
        // A standby that was asked to write: a failover is on its way.
        ("25006", _) => FaultKind::Unavailable,
        (_, "40") => FaultKind::Conflict,
        // Cardinality, data, constraints, triggers, checks of views, functions, what `RAISE` says,
        // limits exceeded: the values.
        (_, "21" | "22" | "23" | "27" | "38" | "39" | "44" | "54" | "P0") => FaultKind::Refused,
        // Features, authorisation, catalogue, schema, syntax and privileges, configuration.
        (_, "0A" | "0L" | "0P" | "28" | "3D" | "3F" | "42" | "F0") => FaultKind::NotPermitted,
        // Nothing is lost by trying again.
        _ => FaultKind::Unavailable,
    }
}

fn of_mysql(number: u16, state: &str) -> FaultKind {
    match number {
        1062 | 1586 => FaultKind::Duplicate,
        // A deadlock; a row that has changed since the transaction's snapshot.
        1213 | 1020 => FaultKind::Conflict,
        // A lock not given in time; the limits of MariaDB and of MySQL; a statement killed.
        1205 | 1969 | 3024 | 1317 => FaultKind::Late,
        // Disk or table full, too many connections, stopping, lines cut, read only.
        1021 | 1114 | 1040 | 1203 | 1226 | 1053 | 1077..=1079 | 1158..=1161 | 1290 | 1836 => {
            FaultKind::Unavailable
        }
        // Users and privileges, databases, a column that has no default and is not given.
        1044 | 1045 | 1046 | 1049 | 1698 | 1364 => FaultKind::NotPermitted,
        _ => match state.get(..2).unwrap_or_default() {
            "08" => FaultKind::Unavailable,
            "40" => FaultKind::Conflict,
            "42" | "28" | "0A" => FaultKind::NotPermitted,
            // Data, constraints, what `SIGNAL` says, and what has no class of its own.
            _ => FaultKind::Refused,
        },
    }
}

/// By the primary result code, which is the low byte of the extended one.
fn of_sqlite(code: i32) -> FaultKind {
    match (code, code & 0xff) {
        // CONSTRAINT_PRIMARYKEY, CONSTRAINT_UNIQUE.
        (1555 | 2067, _) => FaultKind::Duplicate,
        // INTERRUPT: our own limit.
        (_, 9) => FaultKind::Late,
        // BUSY, LOCKED, NOMEM, READONLY, IOERR, FULL, CANTOPEN, PROTOCOL, SCHEMA.
        (_, 5..=8 | 10 | 13..=15 | 17) => FaultKind::Unavailable,
        // ERROR: where the statement could be prepared, a function did not take a value. TOOBIG,
        // CONSTRAINT, MISMATCH, RANGE: the data.
        (_, 1 | 4 | 18..=20 | 25) => FaultKind::Refused,
        // PERM, CORRUPT, NOTADB and the rest: the file.
        _ => FaultKind::NotPermitted,
    }
}

/// The name in a message of MySQL: only of those whose form is known, because most quote values.
fn name_in(number: u16, message: &str) -> Option<&str> {
    let (before, behind) = match number {
        // At the very end: a value may look like a name, but stands in front of it.
        1062 => ("for key '", "'"),
        1048 => ("olumn '", "' cannot be null"),
        1264 | 1406 => ("olumn '", ""),
        1364 => ("Field '", ""),
        _ => return None,
    };
    let (_, name) = message.strip_suffix(behind)?.rsplit_once(before)?;
    let name = name.split('\'').next()?;
    let is_plain = |it: char| it.is_ascii_alphanumeric() || "_.-$".contains(it);
    (!name.is_empty() && name.chars().all(is_plain)).then_some(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_may_pass_is_told_from_what_will_not() {
        use FaultKind::{Conflict, Duplicate, Late, NotPermitted, Refused, Unavailable};

        for (state, kind) in [
            ("08006", Unavailable),
            ("53300", Unavailable),
            ("57P01", Unavailable),
            ("25006", Unavailable),
            ("40001", Conflict),
            ("40P01", Conflict),
            ("57014", Late),
            ("55P03", Late),
            ("23505", Duplicate),
            ("23502", Refused),
            ("22P02", Refused),
            ("P0001", Refused),
            ("42P01", NotPermitted),
            ("42501", NotPermitted),
            ("28P01", NotPermitted),
        ] {
            assert_eq!(of_postgres(state), kind, "{state}");
        }
        for (number, state, kind) in [
            (1040, "08004", Unavailable),
            (1213, "40001", Conflict),
            (1205, "HY000", Late),
            (1062, "23000", Duplicate),
            (1048, "23000", Refused),
            (4025, "23000", Refused),
            (1406, "22001", Refused),
            (1644, "45000", Refused),
            (1366, "HY000", Refused),
            (1054, "42S22", NotPermitted),
            (1146, "42S02", NotPermitted),
            (1142, "42000", NotPermitted),
        ] {
            assert_eq!(of_mysql(number, state), kind, "{number}");
        }
        for (code, kind) in [
            (5, Unavailable),
            (13, Unavailable),
            (9, Late),
            (2067, Duplicate),
            (275, Refused),
            (26, NotPermitted),
        ] {
            assert_eq!(of_sqlite(code), kind, "{code}");
        }
    }

    #[test]
    fn no_value_is_taken_for_a_name() {
        for (number, message, name) in [
            (1062, "Duplicate entry 'a@b.c' for key 'people.email'", Some("people.email")),
            (1062, "Duplicate entry 'for key 'x' for key 'PRIMARY'", Some("PRIMARY")),
            (1062, "Duplicate entry 'for key 'ada' and what was cut o", None),
            (1048, "Column 'email' cannot be null", Some("email")),
            (1406, "Data too long for column 'city' at row 1", Some("city")),
            (1366, "Incorrect integer value: 'column 'ada' for column `a`.`b` at row 1", None),
            (1292, "Incorrect datetime value: 'ada'", None),
        ] {
            assert_eq!(name_in(number, message), name, "{message}");
        }
    }
}
