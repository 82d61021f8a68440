//! What a worker leaves behind that is no more.

use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use crate::{
    Store, StoreError,
    session::{Session, execute},
    text::{Moment, storable, storable_time},
};

/// What a worker that comes back under the name of a removed one knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Memory {
    /// What was done stays done, and what was dropped stays dropped.
    Kept,
    /// Nothing: it is another worker, and is given every event from where it starts.
    Lost,
}

impl Store {
    /// Gives up everything that is set aside for a worker, all of it at once: what waits for an
    /// attempt is forgotten, dead letters are dropped, with who did it, and a pause is lifted.
    ///
    /// For a worker that no process runs any more. Where its memory is lost, its dead letters and
    /// attempts are kept under a name that says when it was removed, and that no worker can have.
    pub async fn remove_worker(
        &self,
        worker: &str,
        memory: Memory,
        actor: &str,
        now: OffsetDateTime,
    ) -> Result<(), StoreError> {
        let mut session = self.write().await?;
        // The rows of `retries` first: see there.
        execute!(&mut session, sqlx::query("DELETE FROM retries WHERE worker = $1").bind(worker))?;
        execute!(
            &mut session,
            sqlx::query(
                "INSERT INTO dead_letter_history (letter_id, at, state, actor, reason)
                 SELECT id, $2, 'dropped', $3, 'the worker was removed' FROM dead_letters
                 WHERE worker = $1 AND state IN ('parked', 'retrying') ORDER BY id"
            )
            .bind(worker)
            .bind(storable_time(now))
            .bind(storable(actor))
        )?;
        execute!(
            &mut session,
            sqlx::query(
                "UPDATE dead_letters SET state = 'dropped', changed_at = $2
                 WHERE worker = $1 AND state IN ('parked', 'retrying')"
            )
            .bind(worker)
            .bind(Moment(now))
        )?;
        execute!(
            &mut session,
            sqlx::query("DELETE FROM paused_workers WHERE worker = $1").bind(worker)
        )?;
        if memory == Memory::Lost {
            forget(&mut session, worker, now).await?;
        }
        session.commit().await
    }
}

/// An event that stands as done, dropped or delivered under a name is not given to that name again.
async fn forget(
    session: &mut Session,
    worker: &str,
    now: OffsetDateTime,
) -> Result<(), StoreError> {
    let at = storable_time(now).format(&Rfc3339).expect("every time in UTC can be written");
    let former = format!("{worker}, removed {at}");
    for statement in [
        "UPDATE dead_letters SET worker = $2 WHERE worker = $1",
        "UPDATE attempts SET worker = $2 WHERE worker = $1",
    ] {
        execute!(session, sqlx::query(statement).bind(worker).bind(&former))?;
    }
    execute!(session, sqlx::query("DELETE FROM inbox WHERE worker = $1").bind(worker))?;
    Ok(())
}
