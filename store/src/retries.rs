//! What waits for a worker outside the log: events whose last attempt failed, and dead letters that
//! were sent back.
//!
//! A failed attempt and what becomes of its event are one transaction: the event waits here until
//! it is due, or is parked as a dead letter. Only then its delivery is acknowledged, so an event is
//! always in the log's hands, or here, or done.
//!
//! Several processes of a worker take from here: who claims an event has it until its lease runs
//! out, and nobody else gets it before. Like a delivery of the log it may come twice.
//!
//! PostgreSQL's row locks are taken in this order: the row of `retries`, then that of the dead
//! letter; of several events, by the id of the letter. That of `retries` is what settles whose word
//! holds where two processes have one event.

use std::{collections::BTreeMap, fmt, time::Duration};

use sqlx::QueryBuilder;
use time::OffsetDateTime;
use uuid::Uuid;
use vestibule_events::Person;

use crate::{
    FailedAttempt, Failures, LetterState, Store, StoreError, attempts, dead_letters,
    session::{Dialect, Session, execute, fetch_all, fetch_one, fetch_optional},
    text::{Moment, storable_time},
};

/// An event at which an attempt has failed just now.
///
/// `Debug` leaves the payload out.
#[derive(Clone, PartialEq, Eq)]
pub struct FailedEvent {
    pub attempt: FailedAttempt,
    pub person: Person,
    /// The event as it stands in the log.
    pub payload: Vec<u8>,
    /// Whether the attempt costs the event a try. What only probes whether the target is back does
    /// not.
    pub counts: bool,
}

impl fmt::Debug for FailedEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FailedEvent")
            .field("attempt", &self.attempt)
            .field("person", &self.person)
            .field("counts", &self.counts)
            .finish_non_exhaustive()
    }
}

/// What is to become of an event after a failed attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AfterFailure {
    Retry { due_at: OffsetDateTime },
    Park,
}

/// What has become of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failed {
    /// It waits here.
    Waits { due_at: OffsetDateTime },
    /// It is a dead letter, with this id.
    Parked { letter: i64 },
    /// It was done or given up while the attempt ran (or before, if nobody asked): the attempt is
    /// kept, and what was settled stays. Never [`Standing::Open`] or [`Standing::Waiting`].
    Settled(Standing),
}

/// How things stand between a worker and an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// Nothing is known here: it is new, or with the log.
    Open,
    /// It waits here, and will be claimed when it is due.
    Waiting,
    /// A dead letter that waits for somebody to decide.
    Parked,
    /// A dead letter that somebody has dropped.
    Dropped,
    /// The worker has dealt with it.
    Done,
}

/// An event that waited, and is now in the hands of whoever claimed it.
///
/// `Debug` leaves the payload out.
#[derive(Clone, PartialEq, Eq)]
pub struct Retry {
    pub event_id: Uuid,
    pub person: Person,
    pub sequence: u64,
    /// The event as it stood in the log.
    pub payload: Vec<u8>,
    /// Failed attempts that count, since it came here.
    pub tries: u32,
    /// When the first of them was started.
    pub failing_since: Option<OffsetDateTime>,
}

impl fmt::Debug for Retry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Retry")
            .field("event_id", &self.event_id)
            .field("sequence", &self.sequence)
            .field("tries", &self.tries)
            .field("failing_since", &self.failing_since)
            .finish_non_exhaustive()
    }
}

/// What of a worker's events is not with the log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SetAside {
    /// Wait for their next attempt, or are in hand for it.
    pub retries: u64,
    /// When the first of them is due; in the past, if nobody takes it.
    pub next_due: Option<OffsetDateTime>,
    /// When the oldest of them happened.
    pub oldest_event: Option<OffsetDateTime>,
    /// Dead letters that wait for somebody to decide.
    pub parked: u64,
    /// When the oldest of them was parked.
    pub oldest_parked: Option<OffsetDateTime>,
}

impl Store {
    /// Keeps a failed attempt, and asks `decide` what is to become of the event.
    ///
    /// Attempts from before a redrive are not among those that `decide` is told of. Where the event
    /// is settled already `decide` is not asked: nothing brings back what was done, parked or
    /// dropped.
    pub async fn fail(
        &self,
        failed: &FailedEvent,
        decide: impl FnOnce(Failures) -> AfterFailure + Send,
    ) -> Result<Failed, StoreError> {
        let attempt = &failed.attempt;
        let mut session = self.write().await?;
        attempts::insert(&mut session, attempt).await?;
        let failures = count(&mut session, failed).await?;
        let outcome = match standing(&mut session, &attempt.worker, attempt.event_id).await? {
            Standing::Open | Standing::Waiting => match decide(failures) {
                AfterFailure::Retry { due_at } => {
                    move_due(&mut session, &attempt.worker, attempt.event_id, due_at).await?;
                    Failed::Waits { due_at }
                }
                AfterFailure::Park => {
                    remove(&mut session, &attempt.worker, attempt.event_id).await?;
                    let letter = dead_letters::park(&mut session, failed).await?;
                    Failed::Parked { letter }
                }
            },
            settled => {
                remove(&mut session, &attempt.worker, attempt.event_id).await?;
                if settled == Standing::Done {
                    let at = dead_letters::failed_at(attempt);
                    dead_letters::deliver(&mut session, &attempt.worker, attempt.event_id, at)
                        .await?;
                }
                Failed::Settled(settled)
            }
        };
        session.commit().await?;
        Ok(outcome)
    }

    /// Takes events that are due, those first that have been for longest, and gives them in the
    /// order they happened. Nobody else gets them until `lease` is over.
    ///
    /// Where nothing is due this is one read of an index.
    pub async fn claim_retries(
        &self,
        worker: &str,
        now: OffsetDateTime,
        lease: Duration,
        limit: u32,
    ) -> Result<Vec<Retry>, StoreError> {
        if self.next_retry(worker).await?.is_none_or(|due_at| due_at > now) {
            return Ok(Vec::new());
        }
        let mut session = self.write().await?;
        // Who comes second does not wait for who came first, but takes others. SQLite lets only one
        // write at a time anyway.
        let lock = match session.dialect() {
            Dialect::Sqlite(_) => "",
            Dialect::Postgres(_) => "FOR UPDATE SKIP LOCKED",
        };
        let rows: Vec<RetryRow> = fetch_all!(
            &mut session,
            {
                // Materialised: it locks rows, so it must run once.
                let mut query = QueryBuilder::new(
                    "WITH due AS MATERIALIZED (SELECT event_id FROM retries WHERE worker = ",
                );
                query.push_bind(worker).push(" AND due_at <= ").push_bind(Moment(now));
                query.push(" ORDER BY due_at LIMIT ").push_bind(i64::from(limit));
                query.push(format_args!(" {lock}) UPDATE retries SET due_at = "));
                query.push_bind(Moment(now + lease)).push(" WHERE worker = ").push_bind(worker);
                query.push(
                    " AND event_id IN (SELECT event_id FROM due)
                     RETURNING event_id, person, sequence, event, tries, failing_since",
                );
                query
            }
            .build_query_as()
        )?;
        session.commit().await?;
        let mut retries: Vec<_> = rows.into_iter().map(Retry::from).collect();
        retries.sort_unstable_by_key(|it| it.event_id);
        Ok(retries)
    }

    /// When the next event is due that waits here for `worker`; for one in hand, when its lease
    /// runs out. One read of an index.
    pub async fn next_retry(&self, worker: &str) -> Result<Option<OffsetDateTime>, StoreError> {
        let mut session = self.read().await?;
        let row: Option<(OffsetDateTime,)> = fetch_optional!(
            &mut session,
            sqlx::query_as("SELECT due_at FROM retries WHERE worker = $1 ORDER BY due_at LIMIT 1")
                .bind(worker)
        )?;
        Ok(row.map(|(due_at,)| due_at))
    }

    /// Keeps events in hand for longer. One that was let go of meanwhile may come this much later.
    pub async fn extend_retries(
        &self,
        worker: &str,
        events: &[Uuid],
        until: OffsetDateTime,
    ) -> Result<(), StoreError> {
        if events.is_empty() {
            return Ok(());
        }
        let mut session = self.write().await?;
        // Chunks, because both dialects bound the number of parameters of a statement.
        for some in events.chunks(1000) {
            execute!(
                &mut session,
                {
                    let mut query = QueryBuilder::new("UPDATE retries SET due_at = ");
                    query.push_bind(Moment(until)).push(" WHERE worker = ").push_bind(worker);
                    // A pause that was chosen meanwhile is not to be cut short.
                    query.push(" AND due_at < ").push_bind(Moment(until));
                    query.push(" AND event_id IN (");
                    let mut ids = query.separated(", ");
                    for event in some {
                        ids.push_bind(*event);
                    }
                    query.push(")");
                    query
                }
                .build()
            )?;
        }
        session.commit().await
    }

    /// Puts an event back that was claimed and not tried; it costs no try.
    pub async fn release_retry(
        &self,
        worker: &str,
        event_id: Uuid,
        due_at: OffsetDateTime,
    ) -> Result<(), StoreError> {
        let mut session = self.write().await?;
        move_due(&mut session, worker, event_id, due_at).await?;
        session.commit().await
    }

    /// Notes that the worker has dealt with an event that waited here: it waits no more, and a dead
    /// letter of it is delivered, whatever it was before. A second time changes nothing.
    pub async fn finish_retry(
        &self,
        worker: &str,
        event_id: Uuid,
        now: OffsetDateTime,
    ) -> Result<(), StoreError> {
        let mut session = self.write().await?;
        let waited = remove(&mut session, worker, event_id).await?;
        // Where nothing waits, somebody may be sending a letter back, unseen until they are done.
        let held = !waited && hold(&mut session, worker, event_id).await?;
        dead_letters::deliver(&mut session, worker, event_id, now).await?;
        if held {
            remove(&mut session, worker, event_id).await?;
        }
        session.commit().await
    }

    /// How things stand between a worker and an event that the log has delivered again.
    pub async fn standing(&self, worker: &str, event_id: Uuid) -> Result<Standing, StoreError> {
        standing(&mut self.read().await?, worker, event_id).await
    }

    /// What of the events of `worker` is not with the log.
    pub async fn set_aside(&self, worker: &str) -> Result<SetAside, StoreError> {
        let mut all = count_set_aside(&mut self.read().await?, Some(worker)).await?;
        Ok(all.remove(worker).unwrap_or_default())
    }

    /// The same for all workers of which something is set aside, configured or not.
    pub async fn set_aside_of_all(&self) -> Result<BTreeMap<String, SetAside>, StoreError> {
        count_set_aside(&mut self.read().await?, None).await
    }
}

/// Counts a failure, and holds the event until the transaction ends.
async fn count(session: &mut Session, failed: &FailedEvent) -> Result<Failures, StoreError> {
    let FailedEvent { attempt, person, payload, counts } = failed;
    let started_at = storable_time(attempt.started_at);
    let (tries, failing_since): (i64, Option<OffsetDateTime>) = fetch_one!(
        session,
        sqlx::query_as(
            "INSERT INTO retries (worker, event_id, person, sequence, event, due_at, tries,
                 failing_since)
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8)
             ON CONFLICT (worker, event_id) DO UPDATE SET
                 tries = retries.tries + excluded.tries,
                 failing_since = coalesce(retries.failing_since, excluded.failing_since)
             RETURNING tries, failing_since"
        )
        .bind(&attempt.worker)
        .bind(attempt.event_id)
        .bind(person.as_str())
        .bind(i64::try_from(attempt.sequence).unwrap_or(i64::MAX))
        .bind(payload)
        .bind(Moment(started_at))
        .bind(i64::from(*counts))
        .bind(counts.then_some(started_at))
    )?;
    Ok(Failures {
        count: u32::try_from(tries).unwrap_or(u32::MAX),
        first_at: failing_since.unwrap_or(started_at),
    })
}

/// Takes the place in which the event of a letter would wait, so that nobody else does until the
/// transaction ends; says whether there is such a letter.
async fn hold(session: &mut Session, worker: &str, event_id: Uuid) -> Result<bool, StoreError> {
    let rows = execute!(
        session,
        sqlx::query(
            "INSERT INTO retries (worker, event_id, person, sequence, event, due_at, tries)
             SELECT worker, event_id, person, sequence, payload, parked_at, 0 FROM dead_letters
             WHERE worker = $1 AND event_id = $2 AND state <> 'delivered'
             ON CONFLICT (worker, event_id) DO UPDATE SET due_at = retries.due_at"
        )
        .bind(worker)
        .bind(event_id)
    )?;
    Ok(rows > 0)
}

async fn move_due(
    session: &mut Session,
    worker: &str,
    event_id: Uuid,
    due_at: OffsetDateTime,
) -> Result<(), StoreError> {
    execute!(
        session,
        sqlx::query("UPDATE retries SET due_at = $3 WHERE worker = $1 AND event_id = $2")
            .bind(worker)
            .bind(event_id)
            .bind(Moment(due_at))
    )?;
    Ok(())
}

/// The event waits no more; says whether it did.
async fn remove(session: &mut Session, worker: &str, event_id: Uuid) -> Result<bool, StoreError> {
    let rows = execute!(
        session,
        sqlx::query("DELETE FROM retries WHERE worker = $1 AND event_id = $2")
            .bind(worker)
            .bind(event_id)
    )?;
    Ok(rows > 0)
}

async fn standing(
    session: &mut Session,
    worker: &str,
    event_id: Uuid,
) -> Result<Standing, StoreError> {
    let (done, waiting, letter): (i64, i64, Option<String>) = fetch_one!(
        session,
        sqlx::query_as(
            "SELECT (SELECT count(*) FROM inbox WHERE worker = $1 AND event_id = $2),
                 (SELECT count(*) FROM retries WHERE worker = $1 AND event_id = $2),
                 (SELECT state FROM dead_letters WHERE worker = $1 AND event_id = $2)"
        )
        .bind(worker)
        .bind(event_id)
    )?;
    let letter = letter.as_deref().map(dead_letters::parse_state).transpose()?;
    Ok(match letter {
        _ if done > 0 => Standing::Done,
        Some(LetterState::Delivered) => Standing::Done,
        Some(LetterState::Parked) => Standing::Parked,
        Some(LetterState::Dropped) => Standing::Dropped,
        Some(LetterState::Retrying) => Standing::Waiting,
        None if waiting > 0 => Standing::Waiting,
        None => Standing::Open,
    })
}

async fn count_set_aside(
    session: &mut Session,
    worker: Option<&str>,
) -> Result<BTreeMap<String, SetAside>, StoreError> {
    let rows: Vec<(String, bool, i64, OffsetDateTime, Option<Uuid>)> = fetch_all!(
        session,
        {
            let mut query = QueryBuilder::new(
                "SELECT worker, true, count(*), min(due_at),
                     (SELECT event_id FROM retries AS oldest WHERE oldest.worker = retries.worker
                      ORDER BY event_id LIMIT 1)
                 FROM retries",
            );
            if let Some(worker) = worker {
                query.push(" WHERE worker = ").push_bind(worker);
            }
            query.push(
                " GROUP BY worker
                 UNION ALL SELECT worker, false, count(*), min(parked_at), NULL
                 FROM dead_letters WHERE state = 'parked'",
            );
            if let Some(worker) = worker {
                query.push(" AND worker = ").push_bind(worker);
            }
            query.push(" GROUP BY worker");
            query
        }
        .build_query_as()
    )?;
    let mut all: BTreeMap<String, SetAside> = BTreeMap::new();
    for (worker, waits, count, first, oldest_event) in rows {
        let set_aside = all.entry(worker).or_default();
        if waits {
            set_aside.retries = count.unsigned_abs();
            set_aside.next_due = Some(first);
            set_aside.oldest_event = oldest_event.as_ref().and_then(time_of);
        } else {
            set_aside.parked = count.unsigned_abs();
            set_aside.oldest_parked = Some(first);
        }
    }
    Ok(all)
}

/// When an event happened: its id is a UUIDv7.
fn time_of(event_id: &Uuid) -> Option<OffsetDateTime> {
    let (seconds, nanoseconds) = event_id.get_timestamp()?.to_unix();
    let since = OffsetDateTime::from_unix_timestamp(i64::try_from(seconds).ok()?).ok()?;
    Some(since + Duration::from_nanos(nanoseconds.into()))
}

#[derive(sqlx::FromRow)]
struct RetryRow {
    event_id: Uuid,
    person: String,
    sequence: i64,
    event: Vec<u8>,
    tries: i64,
    failing_since: Option<OffsetDateTime>,
}

impl From<RetryRow> for Retry {
    fn from(row: RetryRow) -> Self {
        Self {
            event_id: row.event_id,
            person: Person::from_pseudonym(row.person),
            sequence: row.sequence.unsigned_abs(),
            payload: row.event,
            tries: u32::try_from(row.tries).unwrap_or(u32::MAX),
            failing_since: row.failing_since,
        }
    }
}
