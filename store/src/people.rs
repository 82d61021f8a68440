//! People and their sign-ups.
//!
//! A person is as their newest event left them; events are ordered by their id. Every sign-up is
//! counted to its person exactly once, newest or not, and each count is written down as a row of
//! `person_changes`, so that whether it was once can be checked for every single event.
//!
//! What became of a sign-up later (it was approved, denied, confirmed or abandoned) is no sign-up:
//! it changes its person and is not counted.

use std::fmt;

use sqlx::types::Json;
use time::OffsetDateTime;
use uuid::Uuid;
use vestibule_events::{Claims, Email, Identity, Kind, Person, SignUpEvent};

use crate::{
    Done, Store, StoreError, inbox,
    session::{Session, execute, fetch_optional},
    text::{storable, storable_claims, storable_time},
};

/// What is known about a person, as of their newest event.
///
/// `Debug` leaves address and claims out.
#[derive(Clone, PartialEq)]
pub struct PersonRecord {
    pub person: Person,
    pub email: Option<Email>,
    /// As the person gave them, with what the decision changed.
    pub claims: Claims,
    /// The kind of the newest event.
    pub status: String,
    pub first_event: Uuid,
    pub last_event: Uuid,
    /// How many sign-ups were counted to this person, late older ones included.
    pub changes: u32,
    pub created_at: OffsetDateTime,
    pub updated_at: OffsetDateTime,
}

impl fmt::Debug for PersonRecord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PersonRecord")
            .field("person", &self.person)
            .field("status", &self.status)
            .field("last_event", &self.last_event)
            .field("changes", &self.changes)
            .finish_non_exhaustive()
    }
}

impl Store {
    /// Records the sign-up and brings the person up to date, unless a newer event did already.
    pub async fn record_sign_up(
        &self,
        worker: &str,
        event: &SignUpEvent,
        now: OffsetDateTime,
    ) -> Result<Done, StoreError> {
        let now = storable_time(now);
        let mut session = self.write().await?;
        let done = match inbox::enter(&mut session, worker, event.id, now).await? {
            Done::Before => Done::Before,
            Done::Now if is_sign_up(event.kind) => count(&mut session, event, now).await?,
            Done::Now => {
                // Twice does no harm, should another worker have done it: nothing is counted.
                update_person(&mut session, event, Counted::No, now).await?;
                Done::Now
            }
        };
        session.commit().await?;
        Ok(done)
    }

    pub async fn person(&self, person: &Person) -> Result<Option<PersonRecord>, StoreError> {
        let mut session = self.read().await?;
        let row: Option<PersonRow> = fetch_optional!(
            &mut session,
            sqlx::query_as("SELECT * FROM people WHERE person = $1").bind(person.as_str())
        )?;
        Ok(row.map(PersonRecord::from))
    }
}

#[derive(sqlx::FromRow)]
struct PersonRow {
    person: String,
    email: Option<String>,
    claims: Json<Claims>,
    status: String,
    first_event: Uuid,
    last_event: Uuid,
    changes: i64,
    created_at: OffsetDateTime,
    updated_at: OffsetDateTime,
}

impl From<PersonRow> for PersonRecord {
    fn from(row: PersonRow) -> Self {
        Self {
            person: Person::from_pseudonym(row.person),
            email: row.email.map(Email::new),
            claims: row.claims.0,
            status: row.status,
            first_event: row.first_event,
            last_event: row.last_event,
            changes: u32::try_from(row.changes).unwrap_or(u32::MAX),
            created_at: row.created_at,
            updated_at: row.updated_at,
        }
    }
}

/// Whether an event is a call of a platform, and not what became of one.
const fn is_sign_up(kind: Kind) -> bool {
    match kind {
        Kind::Screened | Kind::Accepted | Kind::Rejected | Kind::Blocked | Kind::Pending => true,
        Kind::Approved | Kind::Denied | Kind::Confirmed | Kind::Abandoned => false,
    }
}

/// Whether an event counts as a sign-up of its person.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Counted {
    Yes,
    No,
}

/// Records the sign-up, unless another worker did: then our inbox row is all there is.
async fn count(
    session: &mut Session,
    event: &SignUpEvent,
    now: OffsetDateTime,
) -> Result<Done, StoreError> {
    if insert_sign_up(session, event, now).await? == Done::Before {
        return Ok(Done::Before);
    }
    let applied = update_person(session, event, Counted::Yes, now).await?;
    insert_change(session, event, applied, now).await?;
    Ok(Done::Now)
}

/// The claims that the account gets: as the person gave them, with what the decision changed.
fn claims_as_decided(event: &SignUpEvent) -> Claims {
    let mut claims = event.sign_up.claims.clone();
    for (name, value) in event.decision.outcome.changed_claims().into_iter().flatten() {
        claims.insert(name.clone(), value.clone());
    }
    claims
}

fn storable_identities(identities: &[Identity]) -> Vec<Identity> {
    let text = |text: &str| storable(text).into_owned();
    identities
        .iter()
        .map(|identity| Identity {
            sign_in_type: text(&identity.sign_in_type),
            issuer: text(&identity.issuer),
            issuer_assigned_id: text(&identity.issuer_assigned_id),
        })
        .collect()
}

async fn insert_sign_up(
    session: &mut Session,
    event: &SignUpEvent,
    now: OffsetDateTime,
) -> Result<Done, StoreError> {
    let sign_up = &event.sign_up;
    let none = Claims::new();
    let changed = storable_claims(event.decision.outcome.changed_claims().unwrap_or(&none));
    let claims = storable_claims(&sign_up.claims);
    let identities = storable_identities(&sign_up.identities);
    let rows = execute!(
        session,
        sqlx::query(
            "INSERT INTO sign_ups (event_id, person, connector, step, kind, client, locale,
                 identities, claims, changed_claims, occurred_at, recorded_at)
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12)
             ON CONFLICT DO NOTHING"
        )
        .bind(event.id)
        .bind(event.person.as_str())
        .bind(sign_up.connector.as_str())
        .bind(sign_up.step.as_str())
        .bind(event.kind.as_str())
        .bind(sign_up.client.as_deref().map(storable))
        .bind(sign_up.locale.as_deref().map(storable))
        .bind(Json(&identities))
        .bind(Json(&*claims))
        .bind(Json(&*changed))
        .bind(storable_time(event.time))
        .bind(now)
    )?;
    Ok(Done::from_rows(rows))
}

/// Says whether the event is the person's newest, so that more than the counter changed.
async fn update_person(
    session: &mut Session,
    event: &SignUpEvent,
    counted: Counted,
    now: OffsetDateTime,
) -> Result<bool, StoreError> {
    let decided = claims_as_decided(event);
    let claims = storable_claims(&decided);
    let row: Option<(Uuid,)> = fetch_optional!(
        session,
        sqlx::query_as(
            "INSERT INTO people (person, email, claims, status, first_event, last_event, changes,
                 created_at, updated_at)
             VALUES ($1, $2, $3, $4, $5, $5, $7, $6, $6)
             ON CONFLICT (person) DO UPDATE SET
                 email = CASE WHEN excluded.last_event > people.last_event
                     THEN excluded.email ELSE people.email END,
                 claims = CASE WHEN excluded.last_event > people.last_event
                     THEN excluded.claims ELSE people.claims END,
                 status = CASE WHEN excluded.last_event > people.last_event
                     THEN excluded.status ELSE people.status END,
                 last_event = CASE WHEN excluded.last_event > people.last_event
                     THEN excluded.last_event ELSE people.last_event END,
                 first_event = CASE WHEN excluded.first_event < people.first_event
                     THEN excluded.first_event ELSE people.first_event END,
                 changes = people.changes + excluded.changes,
                 updated_at = excluded.updated_at
             RETURNING last_event"
        )
        .bind(event.person.as_str())
        .bind(event.sign_up.email.as_ref().map(|email| storable(email.expose())))
        .bind(Json(&*claims))
        .bind(event.kind.as_str())
        .bind(event.id)
        .bind(now)
        .bind(i64::from(counted == Counted::Yes))
    )?;
    Ok(row == Some((event.id,)))
}

async fn insert_change(
    session: &mut Session,
    event: &SignUpEvent,
    applied: bool,
    now: OffsetDateTime,
) -> Result<(), StoreError> {
    execute!(
        session,
        sqlx::query(
            "INSERT INTO person_changes (event_id, person, applied, changed_at)
             VALUES ($1, $2, $3, $4)"
        )
        .bind(event.id)
        .bind(event.person.as_str())
        .bind(applied)
        .bind(now)
    )?;
    Ok(())
}
