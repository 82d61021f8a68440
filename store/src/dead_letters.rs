//! Dead letters: events that a worker gave up on, and what became of each.
//!
//! There is one for each worker and event (or content, where it is no event). It is parked; somebody
//! sends it back, and it is delivered or parked again; or somebody drops it. Each change is one
//! transaction with its entry in the history, and nothing is ever removed.

use std::{collections::BTreeSet, fmt};

use sqlx::{Database, Encode, QueryBuilder, Type};
use time::OffsetDateTime;
use uuid::Uuid;
use vestibule_events::{Person, SignUpEvent, Undecodable};

use crate::{
    Done, FailedAttempt, FailedEvent, Store, StoreError, attempts,
    error::Cause,
    session::{Session, execute, fetch_all, fetch_one, fetch_optional},
    text::{Moment, storable, storable_time, to_the_second},
};

/// The cause class of what is no event.
const UNDECODABLE: &str = "undecodable";

/// An event that a worker has given up on, without its content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Letter {
    /// Rises in the order in which events were first parked.
    pub id: i64,
    pub worker: String,
    /// `None` where the bytes could not be read as an event.
    pub event_id: Option<Uuid>,
    pub person: Option<Person>,
    pub sequence: u64,
    /// Groups like failures: `refused`, `timeout`, … As it was parked last.
    pub cause_class: String,
    /// What went wrong, without personal data. As it was parked last.
    pub error: String,
    pub state: LetterState,
    /// For the first time.
    pub parked_at: OffsetDateTime,
    /// When it got its state.
    pub changed_at: OffsetDateTime,
    /// How often it was sent back.
    pub redrives: u32,
}

/// What became of a dead letter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LetterState {
    /// Waits for somebody to decide.
    Parked,
    /// Was sent back to its worker.
    Retrying,
    /// The worker has dealt with it after all.
    Delivered,
    /// Somebody decided against it.
    Dropped,
}

impl LetterState {
    pub const ALL: [Self; 4] = [Self::Parked, Self::Retrying, Self::Delivered, Self::Dropped];

    /// The name in the store and on the command line.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Parked => "parked",
            Self::Retrying => "retrying",
            Self::Delivered => "delivered",
            Self::Dropped => "dropped",
        }
    }
}

impl fmt::Display for LetterState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl std::str::FromStr for LetterState {
    type Err = UnknownLetterState;

    fn from_str(name: &str) -> Result<Self, UnknownLetterState> {
        Self::ALL.into_iter().find(|state| state.as_str() == name).ok_or(UnknownLetterState)
    }
}

/// A word that names no [`LetterState`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a state is one of parked, retrying, delivered, dropped")]
pub struct UnknownLetterState;

/// Which dead letters; all that are given must hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LetterFilter {
    /// Empty: all. Some thousand at most, because both dialects bound the number of parameters.
    pub ids: Vec<i64>,
    pub worker: Option<String>,
    pub cause_class: Option<String>,
    pub state: Option<LetterState>,
    pub event_id: Option<Uuid>,
    pub person: Option<Person>,
    /// First parked at this time or later; to the second.
    pub parked_from: Option<OffsetDateTime>,
    /// First parked before this time; to the second.
    pub parked_before: Option<OffsetDateTime>,
}

/// Dead letters of one worker that have one cause.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LetterGroup {
    pub worker: String,
    pub cause_class: String,
    pub count: u64,
    /// When the first and the last of them was first parked.
    pub oldest: OffsetDateTime,
    pub newest: OffsetDateTime,
    /// Of the letter with the highest id.
    pub sample_error: String,
}

/// All that is known of a dead letter.
///
/// `Debug` leaves the payload out.
#[derive(Clone, PartialEq, Eq)]
pub struct LetterWhole {
    pub letter: Letter,
    /// The event as it stood in the log.
    pub payload: Vec<u8>,
    /// In order, from the first parking on.
    pub history: Vec<LetterChange>,
    /// The failed attempts of its worker at its event, in order.
    pub attempts: Vec<FailedAttempt>,
}

impl fmt::Debug for LetterWhole {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LetterWhole")
            .field("letter", &self.letter)
            .field("history", &self.history)
            .field("attempts", &self.attempts)
            .finish_non_exhaustive()
    }
}

/// Something that happened to a dead letter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LetterChange {
    pub at: OffsetDateTime,
    pub state: LetterState,
    /// Why it was parked.
    pub cause_class: Option<String>,
    pub error: Option<String>,
    /// Who sent it back or dropped it.
    pub actor: Option<String>,
    /// Why it was dropped.
    pub reason: Option<String>,
}

/// What a redrive came to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Redriven {
    /// Are on their way to their workers.
    pub moved: u32,
    /// Are not there or not parked any more.
    pub skipped: u32,
    /// The ids of those that this version cannot read either: they stay parked.
    pub undecodable: Vec<i64>,
}

impl Store {
    /// Keeps bytes that are no event as a dead letter, once for each worker, sequence and content.
    pub async fn park_undecodable(
        &self,
        worker: &str,
        sequence: u64,
        undecodable: &Undecodable,
        now: OffsetDateTime,
    ) -> Result<Done, StoreError> {
        let mut session = self.write().await?;
        let row: Option<(i64,)> = fetch_optional!(
            &mut session,
            sqlx::query_as(
                "INSERT INTO dead_letters (worker, sequence, payload, cause_class, error,
                     parked_at, changed_at)
                 VALUES ($1, $2, $3, $4, $5, $6, $6)
                 ON CONFLICT DO NOTHING RETURNING id"
            )
            .bind(worker)
            .bind(i64::try_from(sequence).unwrap_or(i64::MAX))
            .bind(&undecodable.raw)
            .bind(UNDECODABLE)
            .bind(storable(&undecodable.reason))
            .bind(Moment(now))
        )?;
        if let Some((id,)) = row {
            let change = Change { cause: Some((UNDECODABLE, &undecodable.reason)), ..PARKED };
            note(&mut session, id, change, now).await?;
        }
        session.commit().await?;
        Ok(if row.is_some() { Done::Now } else { Done::Before })
    }

    /// Dead letters counted by worker and cause, in that order.
    pub async fn letter_groups(
        &self,
        filter: &LetterFilter,
    ) -> Result<Vec<LetterGroup>, StoreError> {
        let mut session = self.read().await?;
        let rows: Vec<GroupRow> = fetch_all!(
            &mut session,
            {
                let mut query = QueryBuilder::new(
                    "SELECT counted.*, dead_letters.error FROM (
                         SELECT worker, cause_class, count(*) AS letters, min(parked_at) AS oldest,
                             max(parked_at) AS newest, max(id) AS sample
                         FROM dead_letters WHERE true",
                );
                narrow(&mut query, filter);
                query.push(
                    " GROUP BY worker, cause_class) AS counted
                     JOIN dead_letters ON dead_letters.id = counted.sample
                     ORDER BY counted.worker, counted.cause_class",
                );
                query
            }
            .build_query_as()
        )?;
        Ok(rows.into_iter().map(LetterGroup::from).collect())
    }

    /// Dead letters, the newest first; of the next page all have an id `before` the last one here.
    pub async fn letters(
        &self,
        filter: &LetterFilter,
        before: Option<i64>,
        limit: u32,
    ) -> Result<Vec<Letter>, StoreError> {
        let mut session = self.read().await?;
        let rows: Vec<LetterRow> = fetch_all!(
            &mut session,
            {
                let mut query = QueryBuilder::new("SELECT ");
                query.push(OF_LETTER).push(" FROM dead_letters WHERE true");
                narrow(&mut query, filter);
                if let Some(before) = before {
                    query.push(" AND id < ").push_bind(before);
                }
                query.push(" ORDER BY id DESC LIMIT ").push_bind(i64::from(limit));
                query
            }
            .build_query_as()
        )?;
        rows.into_iter().map(Letter::try_from).collect()
    }

    /// The ids of dead letters, the oldest first, for who goes through them batch by batch; `after`
    /// is the last one of the batch before, or 0.
    pub async fn letter_ids(
        &self,
        filter: &LetterFilter,
        after: i64,
        limit: u32,
    ) -> Result<Vec<i64>, StoreError> {
        let mut session = self.read().await?;
        let rows: Vec<(i64,)> = fetch_all!(
            &mut session,
            {
                let mut query = QueryBuilder::new("SELECT id FROM dead_letters WHERE id > ");
                query.push_bind(after);
                narrow(&mut query, filter);
                query.push(" ORDER BY id LIMIT ").push_bind(i64::from(limit));
                query
            }
            .build_query_as()
        )?;
        Ok(rows.into_iter().map(|(id,)| id).collect())
    }

    /// A dead letter with its content, its history and the attempts at it.
    pub async fn letter(&self, id: i64) -> Result<Option<LetterWhole>, StoreError> {
        let filter = LetterFilter { ids: vec![id], ..LetterFilter::default() };
        let Some(letter) = self.letters(&filter, None, 1).await?.pop() else { return Ok(None) };
        let mut session = self.read().await?;
        let (payload,): (Vec<u8>,) = fetch_one!(
            &mut session,
            sqlx::query_as("SELECT payload FROM dead_letters WHERE id = $1").bind(id)
        )?;
        let history: Vec<ChangeRow> = fetch_all!(
            &mut session,
            sqlx::query_as(
                "SELECT at, state, cause_class, error, actor, reason FROM dead_letter_history
                 WHERE letter_id = $1 ORDER BY id"
            )
            .bind(id)
        )?;
        let history = history.into_iter().map(LetterChange::try_from);
        let mut history = history.collect::<Result<Vec<_>, StoreError>>()?;
        if history.is_empty() {
            history.push(LetterChange::parking_of(&letter));
        }
        let attempts = match letter.event_id {
            Some(event_id) => attempts::of(&mut session, event_id, Some(&letter.worker)).await?,
            None => Vec::new(),
        };
        Ok(Some(LetterWhole { letter, payload, history, attempts }))
    }

    /// Sends dead letters back to their workers: those of `letters` that are parked, in the order of
    /// their ids; the `n`th of them (from 0) is due at `due(n)`.
    ///
    /// All of them are one transaction, which others wait for: give a hundred or so at a time. Bytes
    /// that were no event for the version that parked them may be one for this version.
    pub async fn redrive(
        &self,
        letters: &[i64],
        due: impl Fn(u32) -> OffsetDateTime + Send,
        actor: &str,
        now: OffsetDateTime,
    ) -> Result<Redriven, StoreError> {
        let mut session = self.write().await?;
        let mut redriven = Redriven::default();
        // In a fixed order, so that two who do this at once do not wait in a circle.
        for id in letters.iter().copied().collect::<BTreeSet<_>>() {
            match send_back(&mut session, id, due(redriven.moved), actor, now).await? {
                SentBack::Now => redriven.moved += 1,
                SentBack::NotParked => redriven.skipped += 1,
                SentBack::Undecodable => redriven.undecodable.push(id),
            }
        }
        session.commit().await?;
        Ok(redriven)
    }

    /// Gives dead letters up for good: those of `letters` that are parked. Says how many that were.
    ///
    /// They stay in the store, with who did it and why; a blank reason is refused. All of them are
    /// one transaction, like those of [`Store::redrive`].
    pub async fn drop_letters(
        &self,
        letters: &[i64],
        actor: &str,
        reason: &str,
        now: OffsetDateTime,
    ) -> Result<u32, StoreError> {
        if reason.trim().is_empty() {
            let cause = "a dead letter is dropped only with a reason";
            return Err(StoreError::Refused(Cause::new(cause)));
        }
        let mut session = self.write().await?;
        let mut dropped = 0;
        for id in letters.iter().copied().collect::<BTreeSet<_>>() {
            let change = Change {
                state: LetterState::Dropped,
                actor: Some(actor),
                reason: Some(reason),
                cause: None,
            };
            dropped += u32::from(change_parked(&mut session, id, change, now).await?);
        }
        session.commit().await?;
        Ok(dropped)
    }
}

/// Parks an event at which an attempt failed, for the first time or again.
pub(crate) async fn park(session: &mut Session, failed: &FailedEvent) -> Result<i64, StoreError> {
    let FailedEvent { attempt, person, payload, .. } = failed;
    let now = failed_at(attempt);
    // One that is there has its earlier parking in the history before it is overwritten.
    let known: Option<(i64,)> = fetch_optional!(
        session,
        sqlx::query_as("SELECT id FROM dead_letters WHERE worker = $1 AND event_id = $2")
            .bind(&attempt.worker)
            .bind(attempt.event_id)
    )?;
    if let Some((id,)) = known {
        note_first_parking(session, id).await?;
    }
    let (id,): (i64,) = fetch_one!(
        session,
        sqlx::query_as(
            "INSERT INTO dead_letters (worker, event_id, person, sequence, payload, cause_class,
                 error, parked_at, changed_at)
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $8)
             ON CONFLICT (worker, event_id) WHERE event_id IS NOT NULL DO UPDATE SET
                 state = 'parked', cause_class = excluded.cause_class, error = excluded.error,
                 changed_at = excluded.changed_at
             RETURNING id"
        )
        .bind(&attempt.worker)
        .bind(attempt.event_id)
        .bind(person.as_str())
        .bind(i64::try_from(attempt.sequence).unwrap_or(i64::MAX))
        .bind(payload)
        .bind(&attempt.cause_class)
        .bind(storable(&attempt.error))
        .bind(Moment(now))
    )?;
    let change = Change { cause: Some((&attempt.cause_class, &attempt.error)), ..PARKED };
    note(session, id, change, now).await?;
    Ok(id)
}

pub(crate) fn failed_at(attempt: &FailedAttempt) -> OffsetDateTime {
    attempt.started_at.saturating_add(attempt.took.try_into().unwrap_or(time::Duration::MAX))
}

/// Notes that the worker has dealt with the event of a dead letter, if there is one.
///
/// That is a fact, whatever somebody had decided about the letter while the attempt ran.
pub(crate) async fn deliver(
    session: &mut Session,
    worker: &str,
    event_id: Uuid,
    now: OffsetDateTime,
) -> Result<(), StoreError> {
    let row: Option<(i64,)> = fetch_optional!(
        session,
        sqlx::query_as(
            "UPDATE dead_letters SET state = 'delivered', changed_at = $3
             WHERE worker = $1 AND event_id = $2 AND state <> 'delivered' RETURNING id"
        )
        .bind(worker)
        .bind(event_id)
        .bind(Moment(now))
    )?;
    if let Some((id,)) = row {
        note_first_parking(session, id).await?;
        let change = Change { state: LetterState::Delivered, ..PARKED };
        note(session, id, change, now).await?;
    }
    Ok(())
}

enum SentBack {
    Now,
    NotParked,
    Undecodable,
}

async fn send_back(
    session: &mut Session,
    id: i64,
    due_at: OffsetDateTime,
    actor: &str,
    now: OffsetDateTime,
) -> Result<SentBack, StoreError> {
    let parked: Option<(String, Option<Uuid>, Option<Vec<u8>>)> = fetch_optional!(
        session,
        sqlx::query_as(
            "SELECT worker, event_id, CASE WHEN event_id IS NULL THEN payload END
             FROM dead_letters WHERE id = $1 AND state = 'parked'"
        )
        .bind(id)
    )?;
    let Some((worker, event_id, payload)) = parked else { return Ok(SentBack::NotParked) };
    let event_id = match event_id {
        Some(event_id) => event_id,
        None => {
            let payload = payload.as_deref().unwrap_or_default();
            // Why it still is none stands in the letter.
            let Ok(event) = serde_json::from_slice::<SignUpEvent>(payload) else {
                return Ok(SentBack::Undecodable);
            };
            if !become_of_event(session, id, &worker, &event).await? {
                return Ok(SentBack::NotParked);
            }
            event.id
        }
    };
    // First the row of `retries`, then that of the letter: see there. One that is there is locked,
    // too, or whoever has its event in hand could take it away from under the letter.
    let held = execute!(
        session,
        sqlx::query(
            "INSERT INTO retries (worker, event_id, person, sequence, event, due_at, tries)
             SELECT worker, event_id, person, sequence, payload, $2, 0
             FROM dead_letters WHERE id = $1 AND state = 'parked'
             ON CONFLICT (worker, event_id) DO UPDATE SET due_at = retries.due_at"
        )
        .bind(id)
        .bind(Moment(due_at))
    )?;
    let change = Change { state: LetterState::Retrying, actor: Some(actor), ..PARKED };
    if held > 0 && change_parked(session, id, change, now).await? {
        return Ok(SentBack::Now);
    }
    // Somebody was faster. Only what they sent back goes on waiting.
    if held > 0 {
        execute!(
            session,
            sqlx::query(
                "DELETE FROM retries WHERE worker = $1 AND event_id = $2 AND NOT EXISTS (
                     SELECT 1 FROM dead_letters WHERE id = $3 AND state = 'retrying')"
            )
            .bind(worker)
            .bind(event_id)
            .bind(id)
        )?;
    }
    Ok(SentBack::NotParked)
}

/// A letter whose bytes turn out to be an event is about that event from now on, unless there is one
/// about it already.
async fn become_of_event(
    session: &mut Session,
    id: i64,
    worker: &str,
    event: &SignUpEvent,
) -> Result<bool, StoreError> {
    let rows = execute!(
        session,
        sqlx::query(
            "UPDATE dead_letters SET event_id = $2, person = $3
             WHERE id = $1 AND state = 'parked' AND event_id IS NULL AND NOT EXISTS (
                 SELECT 1 FROM dead_letters WHERE worker = $4 AND event_id = $2)"
        )
        .bind(id)
        .bind(event.id)
        .bind(event.person.as_str())
        .bind(worker)
    )?;
    Ok(rows > 0)
}

/// An entry of the history that is about to be written.
#[derive(Clone, Copy)]
struct Change<'a> {
    state: LetterState,
    /// Class and error.
    cause: Option<(&'a str, &'a str)>,
    actor: Option<&'a str>,
    reason: Option<&'a str>,
}

const PARKED: Change<'_> =
    Change { state: LetterState::Parked, cause: None, actor: None, reason: None };

/// Changes a letter that is parked; says whether it was.
async fn change_parked(
    session: &mut Session,
    id: i64,
    change: Change<'_>,
    now: OffsetDateTime,
) -> Result<bool, StoreError> {
    let rows = execute!(
        session,
        sqlx::query(
            "UPDATE dead_letters SET state = $2, changed_at = $3
             WHERE id = $1 AND state = 'parked'"
        )
        .bind(id)
        .bind(change.state.as_str())
        .bind(Moment(now))
    )?;
    if rows > 0 {
        note_first_parking(session, id).await?;
        note(session, id, change, now).await?;
    }
    Ok(rows > 0)
}

/// Writes into the history what the version before, which may still be running, does not.
async fn note_first_parking(session: &mut Session, id: i64) -> Result<(), StoreError> {
    execute!(
        session,
        sqlx::query(
            "INSERT INTO dead_letter_history (letter_id, at, state, cause_class, error)
             SELECT id, parked_at, 'parked', cause_class, error FROM dead_letters
             WHERE id = $1
                 AND NOT EXISTS (SELECT 1 FROM dead_letter_history WHERE letter_id = $1)"
        )
        .bind(id)
    )?;
    Ok(())
}

async fn note(
    session: &mut Session,
    id: i64,
    change: Change<'_>,
    now: OffsetDateTime,
) -> Result<(), StoreError> {
    execute!(
        session,
        sqlx::query(
            "INSERT INTO dead_letter_history (letter_id, at, state, cause_class, error, actor,
                 reason)
             VALUES ($1, $2, $3, $4, $5, $6, $7)"
        )
        .bind(id)
        .bind(storable_time(now))
        .bind(change.state.as_str())
        .bind(change.cause.map(|(class, _)| class))
        .bind(change.cause.map(|(_, error)| storable(error)))
        .bind(change.actor.map(storable))
        .bind(change.reason.map(storable))
    )?;
    Ok(())
}

/// Adds to a statement that ends in a condition.
fn narrow<D: Database>(query: &mut QueryBuilder<D>, filter: &LetterFilter)
where
    i64: for<'a> Encode<'a, D> + Type<D>,
    String: for<'a> Encode<'a, D> + Type<D>,
    Uuid: for<'a> Encode<'a, D> + Type<D>,
    Moment: for<'a> Encode<'a, D> + Type<D>,
{
    if !filter.ids.is_empty() {
        query.push(" AND id IN (");
        let mut ids = query.separated(", ");
        for id in &filter.ids {
            ids.push_bind(*id);
        }
        query.push(")");
    }
    if let Some(worker) = &filter.worker {
        query.push(" AND worker = ").push_bind(worker.clone());
    }
    if let Some(cause_class) = &filter.cause_class {
        query.push(" AND cause_class = ").push_bind(cause_class.clone());
    }
    if let Some(state) = filter.state {
        query.push(" AND state = ").push_bind(state.as_str().to_owned());
    }
    if let Some(event_id) = filter.event_id {
        query.push(" AND event_id = ").push_bind(event_id);
    }
    if let Some(person) = &filter.person {
        query.push(" AND person = ").push_bind(person.as_str().to_owned());
    }
    if let Some(from) = filter.parked_from {
        query.push(" AND parked_at >= ").push_bind(Moment(to_the_second(from)));
    }
    if let Some(before) = filter.parked_before {
        query.push(" AND parked_at < ").push_bind(Moment(to_the_second(before)));
    }
}

const OF_LETTER: &str = "id, worker, event_id, person, sequence, cause_class, error, state,
     parked_at, coalesce(changed_at, parked_at) AS changed_at,
     (SELECT count(*) FROM dead_letter_history
      WHERE letter_id = dead_letters.id AND dead_letter_history.state = 'retrying') AS redrives";

#[derive(sqlx::FromRow)]
struct LetterRow {
    id: i64,
    worker: String,
    event_id: Option<Uuid>,
    person: Option<String>,
    sequence: i64,
    cause_class: String,
    error: String,
    state: String,
    parked_at: OffsetDateTime,
    changed_at: OffsetDateTime,
    redrives: i64,
}

impl TryFrom<LetterRow> for Letter {
    type Error = StoreError;

    fn try_from(row: LetterRow) -> Result<Self, StoreError> {
        Ok(Self {
            id: row.id,
            worker: row.worker,
            event_id: row.event_id,
            person: row.person.map(Person::from_pseudonym),
            sequence: row.sequence.unsigned_abs(),
            cause_class: row.cause_class,
            error: row.error,
            state: parse_state(&row.state)?,
            parked_at: row.parked_at,
            changed_at: row.changed_at,
            redrives: u32::try_from(row.redrives).unwrap_or(u32::MAX),
        })
    }
}

#[derive(sqlx::FromRow)]
struct GroupRow {
    worker: String,
    cause_class: String,
    letters: i64,
    oldest: OffsetDateTime,
    newest: OffsetDateTime,
    error: String,
}

impl From<GroupRow> for LetterGroup {
    fn from(row: GroupRow) -> Self {
        Self {
            worker: row.worker,
            cause_class: row.cause_class,
            count: row.letters.unsigned_abs(),
            oldest: row.oldest,
            newest: row.newest,
            sample_error: row.error,
        }
    }
}

#[derive(sqlx::FromRow)]
struct ChangeRow {
    at: OffsetDateTime,
    state: String,
    cause_class: Option<String>,
    error: Option<String>,
    actor: Option<String>,
    reason: Option<String>,
}

impl TryFrom<ChangeRow> for LetterChange {
    type Error = StoreError;

    fn try_from(row: ChangeRow) -> Result<Self, StoreError> {
        Ok(Self {
            at: row.at,
            state: parse_state(&row.state)?,
            cause_class: row.cause_class,
            error: row.error,
            actor: row.actor,
            reason: row.reason,
        })
    }
}

impl LetterChange {
    /// The version before keeps no history; its letters are only ever parked.
    fn parking_of(letter: &Letter) -> Self {
        Self {
            at: letter.parked_at,
            state: LetterState::Parked,
            cause_class: Some(letter.cause_class.clone()),
            error: Some(letter.error.clone()),
            actor: None,
            reason: None,
        }
    }
}

pub(crate) fn parse_state(name: &str) -> Result<LetterState, StoreError> {
    name.parse().map_err(|_| {
        let cause = "a dead letter is in a state that this version does not know";
        StoreError::Misconfigured(Cause::new(cause))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_is_read_as_it_is_written() {
        for state in LetterState::ALL {
            assert_eq!(state.as_str().parse(), Ok(state));
        }
        assert_eq!("open".parse::<LetterState>(), Err(UnknownLetterState));
    }
}
