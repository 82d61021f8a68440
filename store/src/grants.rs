//! Which roles were granted to whom, by which rule, because of which event.

use time::OffsetDateTime;
use uuid::Uuid;
use vestibule_events::{Person, SignUpEvent};

use crate::{
    Done, Store, StoreError, inbox,
    session::{Session, execute, fetch_all},
    text::{storable, storable_time},
};

/// A role to grant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewGrant {
    pub role: String,
    /// The rule that grants it.
    pub reason: String,
    pub expires_at: Option<OffsetDateTime>,
}

/// A role that was granted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grant {
    pub person: Person,
    pub role: String,
    /// The rule that granted it.
    pub reason: String,
    pub event_id: Uuid,
    pub granted_at: OffsetDateTime,
    pub expires_at: Option<OffsetDateTime>,
    pub revoked_at: Option<OffsetDateTime>,
}

impl Store {
    /// Grants a set of roles, which may be empty, to the person of the event.
    ///
    /// A role that a newer event granted stays as that event granted it.
    pub async fn grant(
        &self,
        worker: &str,
        event: &SignUpEvent,
        grants: &[NewGrant],
        now: OffsetDateTime,
    ) -> Result<Done, StoreError> {
        let now = storable_time(now);
        let mut session = self.write().await?;
        let done = inbox::enter(&mut session, worker, event.id, now).await?;
        if done == Done::Now {
            insert_set(&mut session, worker, event, grants.len(), now).await?;
            for grant in in_lock_order(grants) {
                insert_grant(&mut session, event, grant, now).await?;
            }
        }
        session.commit().await?;
        Ok(done)
    }

    /// All roles of a person, by name, expired and revoked ones included.
    pub async fn grants_of(&self, person: &Person) -> Result<Vec<Grant>, StoreError> {
        let mut session = self.read().await?;
        let rows: Vec<GrantRow> = fetch_all!(
            &mut session,
            sqlx::query_as("SELECT * FROM grants WHERE person = $1 ORDER BY role")
                .bind(person.as_str())
        )?;
        Ok(rows.into_iter().map(Grant::from).collect())
    }
}

#[derive(sqlx::FromRow)]
struct GrantRow {
    person: String,
    role: String,
    reason: String,
    event_id: Uuid,
    granted_at: OffsetDateTime,
    expires_at: Option<OffsetDateTime>,
    revoked_at: Option<OffsetDateTime>,
}

impl From<GrantRow> for Grant {
    fn from(row: GrantRow) -> Self {
        Self {
            person: Person::from_pseudonym(row.person),
            role: row.role,
            reason: row.reason,
            event_id: row.event_id,
            granted_at: row.granted_at,
            expires_at: row.expires_at,
            revoked_at: row.revoked_at,
        }
    }
}

/// By role, so that two transactions for one person never wait for each other in a circle. Where
/// several rules grant one role, the first of them stays.
fn in_lock_order(grants: &[NewGrant]) -> Vec<&NewGrant> {
    let mut grants: Vec<_> = grants.iter().collect();
    grants.sort_by(|one, other| one.role.cmp(&other.role));
    grants.dedup_by(|later, earlier| later.role == earlier.role);
    grants
}

async fn insert_set(
    session: &mut Session,
    worker: &str,
    event: &SignUpEvent,
    roles: usize,
    now: OffsetDateTime,
) -> Result<(), StoreError> {
    let roles = i64::try_from(roles).unwrap_or(i64::MAX);
    execute!(
        session,
        sqlx::query(
            "INSERT INTO grant_sets (event_id, worker, person, roles, granted_at)
             VALUES ($1, $2, $3, $4, $5)"
        )
        .bind(event.id)
        .bind(worker)
        .bind(event.person.as_str())
        .bind(roles)
        .bind(now)
    )?;
    Ok(())
}

async fn insert_grant(
    session: &mut Session,
    event: &SignUpEvent,
    grant: &NewGrant,
    now: OffsetDateTime,
) -> Result<(), StoreError> {
    execute!(
        session,
        sqlx::query(
            "INSERT INTO grants (person, role, reason, event_id, granted_at, expires_at)
             VALUES ($1, $2, $3, $4, $5, $6)
             ON CONFLICT (person, role) DO UPDATE SET
                 reason = excluded.reason, event_id = excluded.event_id,
                 granted_at = excluded.granted_at, expires_at = excluded.expires_at,
                 revoked_at = NULL
             WHERE excluded.event_id > grants.event_id"
        )
        .bind(event.person.as_str())
        .bind(storable(&grant.role))
        .bind(storable(&grant.reason))
        .bind(event.id)
        .bind(now)
        .bind(grant.expires_at.map(storable_time))
    )?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roles_are_sorted_and_the_first_rule_for_each_stays() {
        let grant = |role: &str, reason: &str| NewGrant {
            role: role.to_owned(),
            reason: reason.to_owned(),
            expires_at: None,
        };
        let grants = [grant("b", "1"), grant("a", "2"), grant("b", "3")];
        assert_eq!(in_lock_order(&grants), [&grants[1], &grants[0]]);
    }
}
