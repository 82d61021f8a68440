//! Writing to SQLite: one connection, and one commit for everybody who waits.
//!
//! SQLite lets one connection write at a time, and a commit costs an fsync. So writers take turns
//! at a single connection: each turn is a savepoint in a transaction that is left open, and a task
//! of its own queues for the connection like everybody else and commits. By then all who stood in
//! the queue before it have had their turn, and share its fsync. Nobody is told of success before
//! that commit; if it fails, it fails for all of them, and they try again.

use std::{sync::Arc, time::Duration};

use sqlx::{ConnectOptions, Connection, Executor, SqliteConnection, sqlite::SqliteConnectOptions};
use tokio::sync::{Mutex, OwnedMutexGuard, mpsc, oneshot};

use crate::{StoreError, error::Cause, session::within};

/// The one connection that writes. Dropping all clones of it ends its task.
#[derive(Clone)]
pub(crate) struct Writer {
    group: Arc<Mutex<Group>>,
    /// Wakes the task that commits; a second wake-up before it got there adds nothing.
    commit: mpsc::Sender<()>,
}

/// The turns that will be committed together.
struct Group {
    options: SqliteConnectOptions,
    /// `None` after a failure: the next turn opens it anew.
    connection: Option<SqliteConnection>,
    transaction: Stage,
    /// The savepoint of a turn. One that is not ended must be undone before anything else happens.
    turn: Stage,
    waiting: Vec<oneshot::Sender<Result<(), StoreError>>>,
}

/// How far something that begins with one statement and ends with another has come.
///
/// Callers give up in the middle of a statement, and then nobody knows whether it took effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Ended,
    /// Begun or not.
    Beginning,
    Begun,
    /// Ended or not.
    Ending,
}

impl Writer {
    /// Opens the file, creating it where there is none.
    pub(crate) async fn open(
        options: SqliteConnectOptions,
        limit: Duration,
    ) -> Result<Self, StoreError> {
        let connection = within(limit, options.connect()).await?;
        let group = Arc::new(Mutex::new(Group {
            options,
            connection: Some(connection),
            transaction: Stage::Ended,
            turn: Stage::Ended,
            waiting: Vec::new(),
        }));
        let (commit, mut wake) = mpsc::channel(1);
        let committed = Arc::clone(&group);
        tokio::spawn(async move {
            while wake.recv().await.is_some() {
                committed.lock().await.commit(limit).await;
            }
        });
        Ok(Self { group, commit })
    }

    /// Waits for a turn. Dropping it undoes what it did.
    pub(crate) async fn turn(&self, wait: Duration, limit: Duration) -> Result<Turn, StoreError> {
        let queue = Arc::clone(&self.group).lock_owned();
        let Ok(group) = tokio::time::timeout(wait, queue).await else {
            return Err(StoreError::Unavailable(Cause::new("too many wait to write")));
        };
        // From here on the task that commits is woken, whatever happens: an open transaction must
        // not be left lying.
        let mut turn = Turn { group: Some(group), commit: self.commit.clone() };
        turn.group().begin_turn(limit).await?;
        Ok(turn)
    }
}

/// One caller's part of a group.
pub(crate) struct Turn {
    /// `None` once it was committed.
    group: Option<OwnedMutexGuard<Group>>,
    commit: mpsc::Sender<()>,
}

impl Turn {
    pub(crate) fn connection(&mut self) -> &mut SqliteConnection {
        self.group().connection.as_mut().expect("a turn begins with a connection")
    }

    fn group(&mut self) -> &mut Group {
        self.group.as_mut().expect("a turn has its group until it is committed")
    }

    /// Ends the turn and waits until its group is durable.
    pub(crate) async fn commit(&mut self, limit: Duration) -> Result<(), StoreError> {
        let group = self.group();
        let connection = group.connection.as_mut().expect("a turn begins with a connection");
        group.turn = Stage::Ending;
        within(limit, connection.execute("RELEASE turn")).await?;
        group.turn = Stage::Ended;
        let (durable, outcome) = oneshot::channel();
        group.waiting.push(durable);
        self.hand_over();
        match tokio::time::timeout(limit, outcome).await {
            Ok(Ok(outcome)) => outcome,
            Ok(Err(_)) | Err(_) => {
                Err(StoreError::Unavailable(Cause::new("no commit within the time limit")))
            }
        }
    }

    /// The next in the queue may have the connection, and sooner or later that is the commit.
    fn hand_over(&mut self) {
        if self.group.take().is_some() {
            // A full channel means that the wake-up is on its way already.
            let _ = self.commit.try_send(());
        }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.hand_over();
    }
}

impl Group {
    async fn begin_turn(&mut self, limit: Duration) -> Result<(), StoreError> {
        if let Err(error) = self.undo_unfinished(limit).await {
            self.fail(&error).await;
        }
        let begun = self.begin(limit).await;
        if let Err(error) = &begun {
            self.fail(error).await;
        }
        begun
    }

    async fn begin(&mut self, limit: Duration) -> Result<(), StoreError> {
        let connection = match &mut self.connection {
            Some(connection) => connection,
            None => self.connection.insert(within(limit, self.options.connect()).await?),
        };
        if self.transaction == Stage::Ended {
            self.transaction = Stage::Beginning;
            within(limit, connection.execute("BEGIN IMMEDIATE")).await?;
            self.transaction = Stage::Begun;
        }
        self.turn = Stage::Beginning;
        within(limit, connection.execute("SAVEPOINT turn")).await?;
        self.turn = Stage::Begun;
        Ok(())
    }

    /// Makes the group durable and tells everybody who waits for it.
    async fn commit(&mut self, limit: Duration) {
        if let Err(error) = self.undo_unfinished(limit).await {
            return self.fail(&error).await;
        }
        if let Err(error) = self.commit_open(limit).await {
            // Who is alone in the group is told the error itself. Of several nobody can say whose
            // fault it was; they try again, sooner or later alone.
            let alone = if self.waiting.len() == 1 { self.waiting.pop() } else { None };
            self.fail(&error).await;
            if let Some(waiting) = alone {
                let _ = waiting.send(Err(error));
            }
            return;
        }
        for waiting in self.waiting.drain(..) {
            let _ = waiting.send(Ok(()));
        }
    }

    async fn commit_open(&mut self, limit: Duration) -> Result<(), StoreError> {
        let open = self.transaction != Stage::Ended;
        if let Some(connection) = self.connection.as_mut().filter(|_| open) {
            // Only the task that commits does this, and nobody gives it up.
            within(limit, connection.execute("COMMIT")).await?;
            self.transaction = Stage::Ended;
        }
        Ok(())
    }

    async fn undo_unfinished(&mut self, limit: Duration) -> Result<(), StoreError> {
        if self.transaction == Stage::Beginning {
            // It is the first thing of a group, so there is nobody yet whom it would hurt.
            self.close().await;
        }
        let Some(connection) = self.connection.as_mut() else { return Ok(()) };
        if self.turn == Stage::Ended {
            return Ok(());
        }
        let in_doubt = self.turn != Stage::Begun;
        let undone = async {
            // A limit that the turn set to its statements is not one of those who come next.
            connection.lock_handle().await?.remove_progress_handler();
            match connection.execute("ROLLBACK TO turn").await {
                // The turn did nothing yet, or it was over and stays.
                Err(error) if in_doubt && is_no_savepoint(&error) => Ok(false),
                outcome => outcome.map(|_| true),
            }
        };
        if within(limit, undone).await? {
            self.turn = Stage::Ending;
            within(limit, connection.execute("RELEASE turn")).await?;
        }
        self.turn = Stage::Ended;
        Ok(())
    }

    /// Gives up the whole group. SQLite may have rolled the transaction back by itself (a full
    /// disk), so nothing is assumed about the connection: closing it ends whatever was open.
    async fn fail(&mut self, error: &StoreError) {
        self.close().await;
        for waiting in self.waiting.drain(..) {
            let what = format!("a commit shared with others failed: {}", error.cause());
            let _ = waiting.send(Err(StoreError::Unavailable(Cause::new(what))));
        }
    }

    async fn close(&mut self) {
        if let Some(connection) = self.connection.take() {
            let _ = connection.close_hard().await;
        }
        self.transaction = Stage::Ended;
        self.turn = Stage::Ended;
    }
}

fn is_no_savepoint(error: &sqlx::Error) -> bool {
    // SQLite has no code of its own for it.
    error.as_database_error().is_some_and(|it| it.message().starts_with("no such savepoint"))
}
