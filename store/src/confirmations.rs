//! Sign-ups that were let past, and whether an account came to be of each.
//!
//! A sign-up waits here until it is confirmed or given up. It has one outcome, and that and the
//! event that tells of it (in the outbox) are one transaction, so whoever comes first settles it:
//! a process that looked into the directory, or one that saw the platform issue a token. A token
//! may be seen before the sign-up is known here, so what was seen is kept for those who come later.
//!
//! Of several sign-ups of a person at a connector only the newest waits: there is one account, and
//! one confirmation of it. When to look, and when to give up, is left to the caller.
//!
//! The event is kept while it waits and no longer: its outcome carries what it said.

use std::{fmt, time::Duration};

use sqlx::QueryBuilder;
use time::OffsetDateTime;
use uuid::Uuid;
use vestibule_events::{ConfirmationSource, ConnectorName, Kind, Person, SignUpEvent};

use crate::{
    Done, Store, StoreError,
    error::Cause,
    inbox, outbox,
    session::{Dialect, Session, execute, fetch_all, fetch_one, fetch_optional},
    text::{Moment, storable, storable_time},
};

/// So long a sign-up is left alone that this version cannot read: one that can may be running soon.
const UNREADABLE_PAUSE: Duration = Duration::from_secs(10 * 60);

/// Clocks of those who see tokens and of those who let people past may differ by so much.
const SKEW: Duration = Duration::from_secs(5 * 60);

/// What became of a sign-up that was let past.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfirmationRecord {
    /// The `accepted` or `approved` event.
    pub event_id: Uuid,
    pub person: Person,
    pub state: ConfirmationState,
    /// When the event happened.
    pub since: OffsetDateTime,
    /// When it is looked for next.
    pub due_at: OffsetDateTime,
    /// How often the account was looked for and not there.
    pub tries: u32,
    /// The account, once it is confirmed, and what showed it.
    pub object_id: Option<String>,
    pub source: Option<ConfirmationSource>,
    pub decided_at: Option<OffsetDateTime>,
    pub decision_event: Option<Uuid>,
}

/// How far a sign-up is on the way to an account.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ConfirmationState {
    Waiting,
    Confirmed,
    Abandoned,
    /// A newer sign-up of the person waits, or waited, in its place.
    Superseded,
}

impl ConfirmationState {
    pub const ALL: [Self; 4] = [Self::Waiting, Self::Confirmed, Self::Abandoned, Self::Superseded];

    /// The name in the store and on the command line.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Waiting => "waiting",
            Self::Confirmed => "confirmed",
            Self::Abandoned => "abandoned",
            Self::Superseded => "superseded",
        }
    }
}

impl fmt::Display for ConfirmationState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A sign-up that waits, in the hands of whoever claimed it.
#[derive(Clone, Debug, PartialEq)]
pub struct Unconfirmed {
    /// The `accepted` or `approved` event as it came.
    pub event: SignUpEvent,
    /// How often the account was looked for and not there.
    pub tries: u32,
    /// The account, where a token for it was seen before the sign-up came here.
    pub seen: Option<String>,
}

/// What [`Store::claim_unconfirmed`] found.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Claimed {
    pub sign_ups: Vec<Unconfirmed>,
    /// Sign-ups in a form that this version cannot read. They wait on.
    pub unreadable: Vec<Uuid>,
}

/// What came of it that an account was seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sighted {
    /// Nobody waits for it, or not yet.
    Noted,
    /// It confirmed the sign-up that waited for it.
    Confirmed,
    /// A sign-up waits for it in a form that this version cannot read; the note is there for one
    /// that can.
    Unreadable(Uuid),
}

impl Store {
    /// Notes that the account of an `accepted` or `approved` event is waited for. Older sign-ups of
    /// the person at the connector wait no more; one that is itself older does not begin to.
    pub async fn await_account(
        &self,
        worker: &str,
        event: &SignUpEvent,
        due_at: OffsetDateTime,
        now: OffsetDateTime,
    ) -> Result<Done, StoreError> {
        let now = storable_time(now);
        let mut session = self.write().await?;
        let done = inbox::enter(&mut session, worker, event.id, now).await?;
        if done == Done::Now {
            begin(&mut session, event, due_at, now).await?;
        }
        session.commit().await?;
        Ok(done)
    }

    /// Takes sign-ups whose account is to be looked for, those first that have been due for longest.
    /// Nobody else gets them until `lease` is over.
    ///
    /// Where none is due this is one read of an index. One that cannot be read holds up no other.
    pub async fn claim_unconfirmed(
        &self,
        now: OffsetDateTime,
        lease: Duration,
        limit: u32,
    ) -> Result<Claimed, StoreError> {
        if self.next_confirmation().await?.is_none_or(|due_at| due_at > now) {
            return Ok(Claimed::default());
        }
        let mut session = self.write().await?;
        // Who comes second does not wait for who came first, but takes others. SQLite lets only one
        // write at a time anyway.
        let lock = match session.dialect() {
            Dialect::Sqlite(_) => "",
            Dialect::Postgres(_) => "FOR UPDATE SKIP LOCKED",
        };
        let rows: Vec<(Uuid, Vec<u8>, i64)> = fetch_all!(
            &mut session,
            {
                let mut query = QueryBuilder::new(
                    "WITH due AS MATERIALIZED (SELECT event_id FROM confirmations
                     WHERE state = 'waiting' AND due_at <= ",
                );
                query.push_bind(Moment(now)).push(" ORDER BY due_at LIMIT ");
                query.push_bind(i64::from(limit));
                query.push(format_args!(" {lock}) UPDATE confirmations SET due_at = "));
                query.push_bind(Moment(now + lease));
                query.push(
                    " WHERE event_id IN (SELECT event_id FROM due)
                     RETURNING event_id, event, tries",
                );
                query
            }
            .build_query_as()
        )?;
        let ids: Vec<_> = rows.iter().map(|(id, ..)| *id).collect();
        let seen = sightings(&mut session, &ids).await?;
        let mut claimed = Claimed::default();
        for (id, event, tries) in rows {
            match outbox::read(&event) {
                Ok(event) => {
                    let of_event = seen.iter().find(|it| it.0 == id);
                    let counts = |at: &OffsetDateTime| *at + SKEW >= event.time;
                    let seen = of_event.filter(|it| counts(&it.2)).map(|it| it.1.clone());
                    let tries = u32::try_from(tries).unwrap_or(u32::MAX);
                    claimed.sign_ups.push(Unconfirmed { event, tries, seen });
                }
                Err(_) => {
                    wait_on(&mut session, id, now + UNREADABLE_PAUSE, false).await?;
                    claimed.unreadable.push(id);
                }
            }
        }
        session.commit().await?;
        claimed.sign_ups.sort_unstable_by_key(|it| it.event.id);
        Ok(claimed)
    }

    /// When the next account is to be looked for; of one in hand, when its lease runs out.
    pub async fn next_confirmation(&self) -> Result<Option<OffsetDateTime>, StoreError> {
        let mut session = self.read().await?;
        let row: Option<(OffsetDateTime,)> = fetch_optional!(
            &mut session,
            sqlx::query_as(
                "SELECT due_at FROM confirmations WHERE state = 'waiting' ORDER BY due_at LIMIT 1"
            )
        )?;
        Ok(row.map(|(due_at,)| due_at))
    }

    /// Has a sign-up that was claimed wait on; `tried` says that its account was looked for and was
    /// not there.
    pub async fn wait_on(
        &self,
        event_id: Uuid,
        due_at: OffsetDateTime,
        tried: bool,
    ) -> Result<(), StoreError> {
        let mut session = self.write().await?;
        wait_on(&mut session, event_id, due_at, tried).await?;
        session.commit().await
    }

    /// Settles the sign-up that a `confirmed` or `abandoned` event is about, unless it waits no more,
    /// and puts the event into the outbox; says whether it was this that settled it.
    pub async fn settle(
        &self,
        outcome: &SignUpEvent,
        now: OffsetDateTime,
    ) -> Result<bool, StoreError> {
        let mut session = self.write().await?;
        let settled = settle(&mut session, outcome, now).await?;
        session.commit().await?;
        Ok(settled)
    }

    /// Notes that a platform was about to issue a token to the account of a person. Where their
    /// sign-up waits it is confirmed by the event that `confirmed` makes of it.
    pub async fn account_seen(
        &self,
        person: &Person,
        connector: &ConnectorName,
        object_id: &str,
        now: OffsetDateTime,
        confirmed: impl FnOnce(&SignUpEvent) -> SignUpEvent + Send,
    ) -> Result<Sighted, StoreError> {
        let mut session = self.write().await?;
        execute!(
            &mut session,
            sqlx::query(
                "INSERT INTO account_sightings (person, connector, object_id, seen_at)
                 VALUES ($1, $2, $3, $4)
                 ON CONFLICT (person, connector) DO UPDATE SET
                     object_id = excluded.object_id, seen_at = excluded.seen_at"
            )
            .bind(person.as_str())
            .bind(connector.as_str())
            .bind(storable(object_id))
            .bind(Moment(now))
        )?;
        let waiting: Option<(Uuid, Vec<u8>)> = fetch_optional!(
            &mut session,
            sqlx::query_as(
                "SELECT event_id, event FROM confirmations
                 WHERE person = $1 AND connector = $2 AND state = 'waiting'"
            )
            .bind(person.as_str())
            .bind(connector.as_str())
        )?;
        let sighted = match waiting {
            Some((event_id, event)) => match outbox::read(&event) {
                Ok(event) if settle(&mut session, &confirmed(&event), now).await? => {
                    Sighted::Confirmed
                }
                Ok(_) => Sighted::Noted,
                Err(_) => Sighted::Unreadable(event_id),
            },
            None => Sighted::Noted,
        };
        session.commit().await?;
        Ok(sighted)
    }

    /// Forgets which accounts were seen before `time`: their sign-ups have come here long since.
    pub async fn forget_sightings(&self, time: OffsetDateTime) -> Result<u64, StoreError> {
        let mut session = self.write().await?;
        let rows = execute!(
            &mut session,
            sqlx::query("DELETE FROM account_sightings WHERE seen_at < $1").bind(Moment(time))
        )?;
        session.commit().await?;
        Ok(rows)
    }

    /// What became of the account of an `accepted` or `approved` event.
    pub async fn confirmation(
        &self,
        event_id: Uuid,
    ) -> Result<Option<ConfirmationRecord>, StoreError> {
        let mut session = self.read().await?;
        let row: Option<ConfirmationRow> = fetch_optional!(
            &mut session,
            sqlx::query_as("SELECT * FROM confirmations WHERE event_id = $1").bind(event_id)
        )?;
        row.map(ConfirmationRecord::try_from).transpose()
    }

    /// How many sign-ups wait for their account.
    pub async fn confirmations_waiting(&self) -> Result<u64, StoreError> {
        let mut session = self.read().await?;
        let (count,): (i64,) = fetch_one!(
            &mut session,
            sqlx::query_as("SELECT count(*) FROM confirmations WHERE state = 'waiting'")
        )?;
        Ok(u64::try_from(count).unwrap_or_default())
    }
}

async fn begin(
    session: &mut Session,
    event: &SignUpEvent,
    due_at: OffsetDateTime,
    now: OffsetDateTime,
) -> Result<(), StoreError> {
    // Again as often as an older one began to wait meanwhile: the insert waited for it.
    loop {
        execute!(
            session,
            sqlx::query(
                "UPDATE confirmations SET state = 'superseded', decided_at = $4, event = NULL
                 WHERE person = $1 AND connector = $2 AND state = 'waiting' AND event_id < $3"
            )
            .bind(event.person.as_str())
            .bind(event.sign_up.connector.as_str())
            .bind(event.id)
            .bind(now)
        )?;
        if confirmed_since(session, event).await? {
            break;
        }
        if insert(session, event, ConfirmationState::Waiting, due_at, now).await? == Done::Now {
            return Ok(());
        }
        if is_stood_for(session, event).await? {
            break;
        }
    }
    insert(session, event, ConfirmationState::Superseded, due_at, now).await.map(drop)
}

/// Whether a newer sign-up of the person waits. Or another worker noted this very one: there it stays
/// as it is.
async fn is_stood_for(session: &mut Session, event: &SignUpEvent) -> Result<bool, StoreError> {
    let row: Option<(Uuid,)> = fetch_optional!(
        session,
        sqlx::query_as(
            "SELECT event_id FROM confirmations
             WHERE event_id = $3
                 OR (person = $1 AND connector = $2 AND state = 'waiting' AND event_id > $3)
             LIMIT 1"
        )
        .bind(event.person.as_str())
        .bind(event.sign_up.connector.as_str())
        .bind(event.id)
    )?;
    Ok(row.is_some())
}

/// Whether another sign-up of the person was confirmed after this one was let past: that is the
/// account, and we were only late to hear of this sign-up.
async fn confirmed_since(session: &mut Session, event: &SignUpEvent) -> Result<bool, StoreError> {
    let rows: Vec<(OffsetDateTime,)> = fetch_all!(
        session,
        sqlx::query_as(
            "SELECT decided_at FROM confirmations
             WHERE person = $1 AND connector = $2 AND state = 'confirmed'
             ORDER BY event_id DESC LIMIT 1"
        )
        .bind(event.person.as_str())
        .bind(event.sign_up.connector.as_str())
    )?;
    Ok(rows.iter().any(|(decided_at,)| *decided_at >= event.time))
}

async fn insert(
    session: &mut Session,
    event: &SignUpEvent,
    state: ConfirmationState,
    due_at: OffsetDateTime,
    now: OffsetDateTime,
) -> Result<Done, StoreError> {
    let rows = execute!(
        session,
        sqlx::query(
            "INSERT INTO confirmations (event_id, person, connector, state, since, due_at, tries,
                 decided_at, event)
             VALUES ($1, $2, $3, $4, $5, $6, 0, $7, $8)
             ON CONFLICT DO NOTHING"
        )
        .bind(event.id)
        .bind(event.person.as_str())
        .bind(event.sign_up.connector.as_str())
        .bind(state.as_str())
        .bind(storable_time(event.time))
        .bind(Moment(due_at))
        .bind((state != ConfirmationState::Waiting).then_some(now))
        .bind((state == ConfirmationState::Waiting).then(|| outbox::written(event)))
    )?;
    Ok(Done::from_rows(rows))
}

async fn wait_on(
    session: &mut Session,
    event_id: Uuid,
    due_at: OffsetDateTime,
    tried: bool,
) -> Result<(), StoreError> {
    execute!(
        session,
        sqlx::query(
            "UPDATE confirmations SET due_at = $2, tries = tries + $3
             WHERE event_id = $1 AND state = 'waiting'"
        )
        .bind(event_id)
        .bind(Moment(due_at))
        .bind(i64::from(tried))
    )?;
    Ok(())
}

/// The accounts that were seen of the people of these sign-ups, and when.
async fn sightings(
    session: &mut Session,
    events: &[Uuid],
) -> Result<Vec<(Uuid, String, OffsetDateTime)>, StoreError> {
    if events.is_empty() {
        return Ok(Vec::new());
    }
    fetch_all!(
        session,
        {
            let mut query = QueryBuilder::new(
                "SELECT event_id, account_sightings.object_id, seen_at
                 FROM confirmations JOIN account_sightings
                     ON account_sightings.person = confirmations.person
                     AND account_sightings.connector = confirmations.connector
                 WHERE event_id IN (",
            );
            let mut ids = query.separated(", ");
            for event in events {
                ids.push_bind(*event);
            }
            query.push(")");
            query
        }
        .build_query_as()
    )
}

async fn settle(
    session: &mut Session,
    outcome: &SignUpEvent,
    now: OffsetDateTime,
) -> Result<bool, StoreError> {
    let state = match outcome.kind {
        Kind::Confirmed => ConfirmationState::Confirmed,
        Kind::Abandoned => ConfirmationState::Abandoned,
        _ => return Err(no_outcome()),
    };
    let confirmation = outcome.confirmation.as_ref().ok_or_else(no_outcome)?;
    let rows = execute!(
        session,
        sqlx::query(
            "UPDATE confirmations SET state = $2, object_id = $3, source = $4, decided_at = $5,
                 decision_event = $6, event = NULL
             WHERE event_id = $1 AND state = 'waiting'"
        )
        .bind(confirmation.of)
        .bind(state.as_str())
        .bind(outcome.sign_up.object_id.as_deref().map(storable))
        .bind(confirmation.source.map(ConfirmationSource::as_str))
        .bind(storable_time(now))
        .bind(outcome.id)
    )?;
    if rows == 0 {
        return Ok(false);
    }
    outbox::insert(session, outcome, now).await?;
    Ok(true)
}

fn no_outcome() -> StoreError {
    StoreError::Refused(Cause::new("the event does not say whether an account came to be"))
}

#[derive(sqlx::FromRow)]
struct ConfirmationRow {
    event_id: Uuid,
    person: String,
    state: String,
    since: OffsetDateTime,
    due_at: OffsetDateTime,
    tries: i64,
    object_id: Option<String>,
    source: Option<String>,
    decided_at: Option<OffsetDateTime>,
    decision_event: Option<Uuid>,
}

impl TryFrom<ConfirmationRow> for ConfirmationRecord {
    type Error = StoreError;

    fn try_from(row: ConfirmationRow) -> Result<Self, StoreError> {
        let unreadable = || {
            StoreError::Misconfigured(Cause::new(
                "a confirmation has a form this version cannot read",
            ))
        };
        let state = ConfirmationState::ALL.into_iter().find(|it| it.as_str() == row.state);
        let source = row.source.map(|it| it.parse()).transpose().map_err(|_| unreadable())?;
        Ok(Self {
            event_id: row.event_id,
            person: Person::from_pseudonym(row.person),
            state: state.ok_or_else(unreadable)?,
            since: row.since,
            due_at: row.due_at,
            tries: u32::try_from(row.tries).unwrap_or(u32::MAX),
            object_id: row.object_id,
            source,
            decided_at: row.decided_at,
            decision_event: row.decision_event,
        })
    }
}
