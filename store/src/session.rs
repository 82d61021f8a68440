//! One conversation with a database, in whichever dialect.
//!
//! The SQL is written so that SQLite and PostgreSQL take the same statements; what differs is the
//! type of the connection. The macros below run a statement on either, within the time limit.

use std::{fmt, time::Duration};

use sqlx::{Executor, PgConnection, Postgres, Sqlite, SqliteConnection, pool::PoolConnection};

use crate::{StoreError, error::Cause, sqlite::Turn};

/// A connection of our own for a while.
pub(crate) struct Session {
    lent: Lent,
    limit: Duration,
    /// A statement or a transaction has begun and not ended. Whoever is dropped like this (a
    /// caller that gave up, a server that hangs) must not hand the connection to the next one.
    in_doubt: bool,
}

enum Lent {
    /// Part of a larger SQLite transaction.
    Turn(Turn),
    Sqlite(PoolConnection<Sqlite>),
    Postgres(PoolConnection<Postgres>),
}

/// The connection itself, by dialect.
#[derive(Debug)]
pub enum Dialect<'a> {
    Sqlite(&'a mut SqliteConnection),
    Postgres(&'a mut PgConnection),
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Session")
    }
}

impl Session {
    /// A turn at the one connection that writes to SQLite.
    pub(crate) fn turn(turn: Turn, limit: Duration) -> Self {
        Self { lent: Lent::Turn(turn), limit, in_doubt: false }
    }

    /// Reads from SQLite.
    pub(crate) fn sqlite(connection: PoolConnection<Sqlite>, limit: Duration) -> Self {
        Self { lent: Lent::Sqlite(connection), limit, in_doubt: false }
    }

    /// Reads from PostgreSQL; after [`Session::begin`] it writes, too.
    pub(crate) fn postgres(connection: PoolConnection<Postgres>, limit: Duration) -> Self {
        Self { lent: Lent::Postgres(connection), limit, in_doubt: false }
    }

    pub(crate) fn dialect(&mut self) -> Dialect<'_> {
        match &mut self.lent {
            Lent::Turn(turn) => Dialect::Sqlite(turn.connection()),
            Lent::Sqlite(connection) => Dialect::Sqlite(connection),
            Lent::Postgres(connection) => Dialect::Postgres(connection),
        }
    }

    pub(crate) fn limit(&self) -> Duration {
        self.limit
    }

    /// Says that a statement is about to run; [`Session::ran`] says that it has an outcome.
    pub(crate) fn runs(&mut self) -> bool {
        std::mem::replace(&mut self.in_doubt, true)
    }

    pub(crate) fn ran(&mut self, in_doubt_before: bool) {
        self.in_doubt = in_doubt_before;
    }

    /// Begins a transaction. A turn is one already.
    pub(crate) async fn begin(&mut self) -> Result<(), StoreError> {
        if let Lent::Postgres(connection) = &mut self.lent {
            self.in_doubt = true;
            within(self.limit, connection.execute("BEGIN")).await?;
        }
        Ok(())
    }

    /// Undoes everything since [`Session::begin`]. A turn is undone by whoever has the next one.
    pub(crate) async fn roll_back(mut self) -> Result<(), StoreError> {
        if let Lent::Postgres(connection) = &mut self.lent {
            within(self.limit, connection.execute("ROLLBACK")).await?;
        }
        self.in_doubt = false;
        Ok(())
    }

    /// Makes everything durable, or nothing. Dropping the session instead leaves nothing.
    pub(crate) async fn commit(mut self) -> Result<(), StoreError> {
        match &mut self.lent {
            Lent::Turn(turn) => turn.commit(self.limit).await?,
            Lent::Sqlite(_) => {}
            Lent::Postgres(connection) => {
                within(self.limit, connection.execute("COMMIT")).await?;
            }
        }
        self.in_doubt = false;
        Ok(())
    }
}

/// Closing the connection is what ends a statement that hangs and a transaction half done.
impl Drop for Session {
    fn drop(&mut self) {
        match &mut self.lent {
            Lent::Sqlite(connection) if self.in_doubt => connection.close_on_drop(),
            Lent::Postgres(connection) if self.in_doubt => connection.close_on_drop(),
            // A turn that was not committed is undone by whoever has the next one.
            Lent::Turn(_) | Lent::Sqlite(_) | Lent::Postgres(_) => {}
        }
    }
}

/// Waits for a statement, but not for ever: the server's own limit does not help where the server
/// is gone.
pub(crate) async fn within<T>(
    limit: Duration,
    statement: impl Future<Output = Result<T, sqlx::Error>>,
) -> Result<T, StoreError> {
    match tokio::time::timeout(limit, statement).await {
        Ok(outcome) => outcome.map_err(StoreError::from),
        Err(_) => Err(StoreError::Unavailable(Cause::new("no answer within the time limit"))),
    }
}

/// Runs a statement in either dialect: the expression is compiled once for each.
macro_rules! on_either {
    ($session:expr, $connection:ident => $statement:expr) => {{
        let session: &mut $crate::session::Session = $session;
        let limit = session.limit();
        let in_doubt = session.runs();
        let outcome = match session.dialect() {
            $crate::session::Dialect::Sqlite($connection) => {
                $crate::session::within(limit, $statement).await
            }
            $crate::session::Dialect::Postgres($connection) => {
                $crate::session::within(limit, $statement).await
            }
        };
        // After a timeout the statement may still be running: the connection stays in doubt.
        if !matches!(&outcome, Err($crate::StoreError::Unavailable(_))) {
            session.ran(in_doubt);
        }
        outcome
    }};
}

/// Runs a statement and says how many rows it changed.
macro_rules! execute {
    ($session:expr, $query:expr) => {
        $crate::session::on_either!($session, connection => async {
            $query.execute(connection).await.map(|done| done.rows_affected())
        })
    };
}

/// The rows, read into the type that the surroundings ask for.
macro_rules! fetch_all {
    ($session:expr, $query:expr) => {
        $crate::session::on_either!($session, connection => $query.fetch_all(connection))
    };
}

/// The one row that there always is.
macro_rules! fetch_one {
    ($session:expr, $query:expr) => {
        $crate::session::on_either!($session, connection => $query.fetch_one(connection))
    };
}

/// The row, if there is one.
macro_rules! fetch_optional {
    ($session:expr, $query:expr) => {
        $crate::session::on_either!($session, connection => $query.fetch_optional(connection))
    };
}

pub(crate) use {execute, fetch_all, fetch_one, fetch_optional, on_either};
