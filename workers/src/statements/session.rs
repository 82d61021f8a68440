//! One transaction: the note that an event is dealt with, and what its statements write.

use std::time::{Duration, Instant as Moment};

use serde_json::json;
use time::OffsetDateTime;
use tokio::time::Instant;
use uuid::Uuid;
use vestibule_store::{Done, Store, StoreConnection, Transaction};

use super::{
    database::{Connection, Link, TargetDatabase, Text},
    fault::{Fault, FaultKind},
    named::Dialect,
    speak::sqlite,
};

/// Where statements run.
#[derive(Debug)]
pub(super) struct Place {
    pub(super) worker: String,
    pub(super) target: Target,
    /// For one statement.
    pub(super) limit: Duration,
}

#[derive(Debug)]
pub(super) enum Target {
    Store(Store),
    /// A database of the user's, with a table of ours in it.
    Other {
        database: TargetDatabase,
        inbox: Inbox,
    },
}

/// The table in which a database of the user's keeps what was dealt with.
#[derive(Debug)]
pub(super) struct Inbox {
    insert: Text,
    create: Text,
    names: Vec<String>,
}

impl Inbox {
    /// `table` is a plain name.
    pub(super) fn new(table: &str, dialect: Dialect) -> Self {
        let insert = format!("INSERT INTO {table} (worker, event_id, done_at) VALUES");
        let (insert, columns) = match dialect {
            Dialect::Postgres => (
                format!("{insert} ($1, $2, CURRENT_TIMESTAMP) ON CONFLICT DO NOTHING"),
                "worker text NOT NULL, event_id uuid NOT NULL, done_at timestamptz NOT NULL",
            ),
            Dialect::Sqlite => (
                format!("{insert} (?1, ?2, CURRENT_TIMESTAMP) ON CONFLICT DO NOTHING"),
                "worker TEXT NOT NULL, event_id TEXT NOT NULL, done_at TEXT NOT NULL",
            ),
            // Not INSERT IGNORE, which would cut what is too long and so take one event for
            // another.
            Dialect::MySql => (
                format!("{insert} (?, ?, CURRENT_TIMESTAMP)"),
                "worker varchar(100) CHARACTER SET ascii NOT NULL, \
                 event_id char(36) CHARACTER SET ascii NOT NULL, done_at datetime NOT NULL",
            ),
        };
        let create = format!(
            "CREATE TABLE IF NOT EXISTS {table} ({columns}, PRIMARY KEY (worker, event_id))"
        );
        let names = ["worker", "event_id"].map(str::to_owned).to_vec();
        Self { insert: Text::new(&insert), create: Text::new(&create), names }
    }

    /// Sees that the table is there, and makes it where it is not.
    async fn prepare(&self, link: &mut Link<'_>) -> Result<(), Fault> {
        match link.prepare(&self.insert, &self.names).await {
            Err(fault) if fault.kind == FaultKind::NotPermitted => {}
            prepared => return prepared,
        }
        // Another connection may be doing the same; what counts is that it is there afterwards.
        let created = link.define(&self.create).await;
        link.prepare(&self.insert, &self.names).await.map_err(|fault| {
            let create = self.create.as_str();
            let what = format!("the table of what was done is missing; make it with `{create}`");
            created.err().unwrap_or(fault).of(&what)
        })
    }

    async fn enter(
        &self,
        link: &mut Link<'_>,
        worker: &str,
        event_id: Uuid,
    ) -> Result<Done, Fault> {
        let values = [json!(worker), json!(event_id)];
        match link.execute(&self.insert, &self.names, &values).await {
            Ok(0) => Ok(Done::Before),
            Ok(_) => Ok(Done::Now),
            // MySQL undoes the one statement, and the transaction goes on.
            Err(fault) if fault.kind == FaultKind::Duplicate => Ok(Done::Before),
            Err(fault) => Err(fault),
        }
    }
}

/// A connection that waits for its next transaction.
#[derive(Debug)]
pub(super) struct Idle {
    connection: Connection,
    since: Instant,
}

/// A connection that lay idle for longer is asked whether it is still there before it is used.
const TRUSTED_IDLE: Duration = Duration::from_secs(1);

/// A transaction that has begun. Dropping it leaves nothing of it.
#[derive(Debug)]
pub(super) enum Session {
    Store(Transaction),
    Other(Connection),
}

impl Session {
    /// Begins a transaction, on a new connection where there is none.
    pub(super) async fn begin(
        place: &Place,
        idle: &mut Option<Idle>,
        limit: Duration,
    ) -> Result<Self, Fault> {
        let end = Moment::now() + limit;
        let (database, inbox) = match &place.target {
            Target::Store(store) => {
                let mut transaction = store.transaction().await?;
                if let StoreConnection::Sqlite(connection) = transaction.connection() {
                    sqlite::stop_at(connection, end).await?;
                }
                return Ok(Self::Store(transaction));
            }
            Target::Other { database, inbox } => (database, inbox),
        };
        let mut connection = match idle.take() {
            Some(Idle { mut connection, since }) => {
                let is_there = since.elapsed() < TRUSTED_IDLE || connection.is_there().await;
                is_there.then_some(connection)
            }
            None => None,
        };
        if connection.is_none() {
            let mut new = database.connect(place.limit).await?;
            inbox.prepare(&mut new.link()).await?;
            connection = Some(new);
        }
        let mut connection = connection.expect("there was one or it was made");
        if let Connection::Sqlite(connection) = &mut connection {
            sqlite::stop_at(connection, end).await?;
        }
        let begin = match connection {
            Connection::Postgres(_) => "BEGIN",
            Connection::MySql(_) => "START TRANSACTION",
            // Not later: who reads first and then wants to write may be refused at once.
            Connection::Sqlite(_) => "BEGIN IMMEDIATE",
        };
        connection.link().command(begin).await?;
        Ok(Self::Other(connection))
    }

    pub(super) async fn enter(&mut self, place: &Place, event_id: Uuid) -> Result<Done, Fault> {
        match (self, &place.target) {
            (Self::Store(transaction), _) => {
                let now = OffsetDateTime::now_utc();
                Ok(transaction.enter(&place.worker, event_id, now).await?)
            }
            (Self::Other(connection), Target::Other { inbox, .. }) => {
                inbox.enter(&mut connection.link(), &place.worker, event_id).await
            }
            (Self::Other(_), Target::Store(_)) => unreachable!("begun on the store"),
        }
    }

    pub(super) fn link(&mut self) -> Link<'_> {
        match self {
            Self::Store(transaction) => transaction.connection().into(),
            Self::Other(connection) => connection.link(),
        }
    }

    pub(super) async fn commit(self, idle: &mut Option<Idle>) -> Result<(), Fault> {
        match self {
            Self::Store(mut transaction) => {
                // Others write over the same connection. Where we do not come this far the store
                // does it, when it undoes what we did.
                if let StoreConnection::Sqlite(connection) = transaction.connection() {
                    sqlite::stop_no_more(connection).await?;
                }
                transaction.commit().await?;
            }
            Self::Other(mut connection) => {
                connection.link().command("COMMIT").await?;
                *idle = Some(Idle { connection, since: Instant::now() });
            }
        }
        Ok(())
    }

    pub(super) async fn roll_back(self, idle: &mut Option<Idle>) -> Result<(), Fault> {
        match self {
            Self::Store(transaction) => transaction.roll_back().await?,
            Self::Other(mut connection) => {
                connection.link().command("ROLLBACK").await?;
                *idle = Some(Idle { connection, since: Instant::now() });
            }
        }
        Ok(())
    }

    /// What a lost connection means depends on whose it was.
    pub(super) fn blame(&self, fault: Fault) -> Fault {
        if matches!(self, Self::Store(_)) { fault.of_store() } else { fault }
    }
}
