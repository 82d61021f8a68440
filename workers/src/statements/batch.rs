//! Many events in one transaction, and an outcome for each.
//!
//! Whoever is free takes all events that wait, up to a bound, so that they share one commit. Each
//! event has a savepoint: one that fails is undone alone. Where the transaction as a whole fails and
//! one of them may be to blame, they are tried once more one by one, so that each gets what it
//! deserves.

use std::{sync::Arc, time::Duration};

use serde_json::Value;
use tokio::{
    sync::{Mutex, mpsc, oneshot},
    time::timeout,
};
use tracing::{error, info, warn};
use uuid::Uuid;
use vestibule_store::Done;

use super::{
    database::Text,
    fault::{Fault, FaultKind},
    session::{Idle, Place, Session},
};

/// One event's statements, and who waits for them.
#[derive(Debug)]
pub(super) struct Work {
    pub(super) event_id: Uuid,
    pub(super) calls: Vec<Call>,
    pub(super) outcome: oneshot::Sender<Result<(), Fault>>,
}

/// A statement, from 0, with its values.
#[derive(Debug)]
pub(super) struct Call {
    pub(super) statement: usize,
    pub(super) values: Vec<Value>,
}

/// A statement as the database is given it.
#[derive(Debug)]
pub(super) struct Prepared {
    pub(super) text: Text,
    pub(super) names: Vec<String>,
}

/// What all lanes share.
#[derive(Debug)]
pub(super) struct Lanes {
    pub(super) place: Place,
    pub(super) statements: Vec<Prepared>,
    /// At most so many events in a transaction.
    pub(super) batch: usize,
    /// For a transaction.
    pub(super) limit: Duration,
}

impl Lanes {
    /// Starts so many lanes, which end when nobody can send them anything any more.
    pub(super) fn start(self, count: usize, queue: mpsc::Receiver<Work>) {
        let (lanes, queue) = (Arc::new(self), Arc::new(Mutex::new(queue)));
        for number in 0..count {
            let mut lane = Lane { lanes: Arc::clone(&lanes), idle: None };
            let queue = Arc::clone(&queue);
            tokio::spawn(async move {
                if number == 0 {
                    lane.look().await;
                }
                while let Some(batch) = lane.next_batch(&queue).await {
                    lane.serve(batch).await;
                }
            });
        }
    }

    /// What the database says against the statements, each; an error where it could not be asked.
    pub(super) async fn verify(&self) -> Result<Vec<String>, Fault> {
        Lane { lanes: self, idle: None }.verify().await
    }
}

/// One connection's worth of work.
#[derive(Debug)]
struct Lane<L> {
    lanes: L,
    idle: Option<Idle>,
}

impl<L: std::ops::Deref<Target = Lanes>> Lane<L> {
    /// Says at once what would fail later; nothing is held up by it.
    async fn look(&mut self) {
        let outcome = self.verify().await;
        let worker = &self.lanes.place.worker;
        match outcome {
            Ok(complaints) => {
                if complaints.is_empty() {
                    info!(worker, "the database takes the statements");
                }
                for error in complaints {
                    error!(worker, error, "a statement does not fit the database; mend either");
                }
            }
            Err(fault) => {
                let error = fault.to_string();
                warn!(worker, error, "the statements could not be tried; events wait meanwhile");
            }
        }
    }

    async fn verify(&mut self) -> Result<Vec<String>, Fault> {
        let limit = self.lanes.limit;
        timeout(limit, self.prepare_all()).await.unwrap_or_else(|_| Err(Fault::late()))
    }

    async fn prepare_all(&mut self) -> Result<Vec<String>, Fault> {
        let mut complaints = Vec::new();
        let mut session =
            match Session::begin(&self.lanes.place, &mut self.idle, self.lanes.limit).await {
                Err(fault) if fault.kind == FaultKind::NotPermitted => {
                    return Ok(vec![fault.to_string()]);
                }
                begun => begun?,
            };
        for (index, statement) in self.lanes.statements.iter().enumerate() {
            session.link().command("SAVEPOINT event").await?;
            match session.link().prepare(&statement.text, &statement.names).await {
                Ok(()) => {}
                Err(fault) if fault.ends_transaction() => return Err(session.blame(fault)),
                Err(fault) => {
                    complaints.push(fault.of(&name_of(index)).to_string());
                    session.link().command("ROLLBACK TO SAVEPOINT event").await?;
                }
            }
        }
        session.roll_back(&mut self.idle).await?;
        Ok(complaints)
    }

    /// Waits for an event and takes those that wait with it; `None` at the end.
    async fn next_batch(&self, queue: &Mutex<mpsc::Receiver<Work>>) -> Option<Vec<Work>> {
        let mut queue = queue.lock().await;
        let mut batch = Vec::new();
        while batch.is_empty() {
            batch.push(queue.recv().await?);
            while batch.len() < self.lanes.batch
                && let Ok(work) = queue.try_recv()
            {
                batch.push(work);
            }
            // Nobody waits for these any more; their events come again.
            batch.retain(|it| !it.outcome.is_closed());
        }
        Some(batch)
    }

    async fn serve(&mut self, batch: Vec<Work>) {
        let outcomes = match self.together(&batch).await {
            Err(fault) if batch.len() > 1 && may_be_of_one(&fault) => {
                let mut outcomes = Vec::with_capacity(batch.len());
                for alone in batch.chunks(1) {
                    outcomes.extend(self.outcomes(alone).await);
                }
                outcomes
            }
            Err(fault) => vec![Err(fault); batch.len()],
            Ok(outcomes) => outcomes,
        };
        for (work, outcome) in batch.into_iter().zip(outcomes) {
            // Whoever gave up meanwhile is told when the event comes again.
            let _ = work.outcome.send(outcome);
        }
    }

    async fn outcomes(&mut self, batch: &[Work]) -> Vec<Result<(), Fault>> {
        let together = self.together(batch).await;
        together.unwrap_or_else(|fault| vec![Err(fault); batch.len()])
    }

    /// One transaction. An error is everybody's: nothing was done, or (a connection lost during the
    /// commit) nobody knows.
    async fn together(&mut self, batch: &[Work]) -> Result<Vec<Result<(), Fault>>, Fault> {
        let limit = self.lanes.limit;
        timeout(limit, self.transaction(batch)).await.unwrap_or_else(|_| Err(Fault::late()))
    }

    async fn transaction(&mut self, batch: &[Work]) -> Result<Vec<Result<(), Fault>>, Fault> {
        let lanes = &*self.lanes;
        let mut session = Session::begin(&lanes.place, &mut self.idle, lanes.limit).await?;
        if let [alone] = batch {
            return match one(lanes, &mut session, alone).await {
                Ok(()) => session.commit(&mut self.idle).await.map(|()| vec![Ok(())]),
                Err(fault) => {
                    // A session remembers statements: after a change of the schema, a new one
                    // knows better. And of a statement that was stopped it depends on the database
                    // whether there is a transaction left to undo.
                    let is_in_doubt =
                        matches!(fault.kind, FaultKind::NotPermitted | FaultKind::Late);
                    if !fault.ends_transaction() && !is_in_doubt {
                        session.roll_back(&mut self.idle).await?;
                    }
                    Err(fault)
                }
            };
        }
        let mut outcomes = Vec::with_capacity(batch.len());
        session.link().command("SAVEPOINT event").await?;
        for (index, work) in batch.iter().enumerate() {
            let outcome = one(lanes, &mut session, work).await;
            let is_last = index + 1 == batch.len();
            let next = match &outcome {
                Ok(()) if is_last => "RELEASE SAVEPOINT event",
                Ok(()) => "RELEASE SAVEPOINT event; SAVEPOINT event",
                Err(fault) if fault.ends_transaction() => return Err(fault.clone()),
                Err(_) => "ROLLBACK TO SAVEPOINT event",
            };
            session.link().command(next).await.map_err(|fault| session.blame(fault))?;
            outcomes.push(outcome);
        }
        session.commit(&mut self.idle).await?;
        if outcomes.iter().any(|it| it.as_ref().is_err_and(|it| it.kind == FaultKind::NotPermitted))
        {
            self.idle = None;
        }
        Ok(outcomes)
    }
}

/// One event: the note first, so that whoever has the same event elsewhere waits for it.
async fn one(lanes: &Lanes, session: &mut Session, work: &Work) -> Result<(), Fault> {
    let done = session.enter(&lanes.place, work.event_id).await;
    if done.map_err(|fault| session.blame(fault))? == Done::Before {
        return Ok(());
    }
    for Call { statement, values } in &work.calls {
        let Prepared { text, names } = &lanes.statements[*statement];
        let ran = session.link().execute(text, names, values).await;
        ran.map_err(|fault| session.blame(fault.of(&name_of(*statement))))?;
    }
    Ok(())
}

/// Whether one event of several may have failed a transaction that the others would not have: by a
/// constraint that is checked at the end, or by a lock.
const fn may_be_of_one(fault: &Fault) -> bool {
    matches!(fault.kind, FaultKind::Conflict | FaultKind::Duplicate | FaultKind::Refused)
}

/// As the configuration calls it.
fn name_of(statement: usize) -> String {
    format!("run[{statement}]")
}
