//! What a worker leaves behind that is no more.

use time::OffsetDateTime;

use crate::{
    Store, StoreError,
    session::execute,
    text::{Moment, storable, storable_time},
};

impl Store {
    /// Gives up everything that is set aside for a worker, all of it at once: what waits for an
    /// attempt is forgotten, dead letters are dropped, with who did it, and a pause is lifted.
    ///
    /// For a worker that no process runs any more. What it has done stays.
    pub async fn remove_worker(
        &self,
        worker: &str,
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
        session.commit().await
    }
}
