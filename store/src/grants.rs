//! Which roles were granted to whom, by which rule, because of which event; and which were revoked.

use sqlx::QueryBuilder;
use time::OffsetDateTime;
use uuid::Uuid;
use vestibule_events::{Person, SignUpEvent};

use crate::{
    Done, Store, StoreError, grant_targets, inbox,
    session::{Dialect, Session, execute, fetch_all},
    text::{Moment, storable, storable_time},
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
    /// Who revoked it: somebody by name, or a worker.
    pub revoked_by: Option<String>,
    pub revoke_reason: Option<String>,
}

impl Grant {
    /// Whether the person has the role.
    #[must_use]
    pub fn is_in_force(&self, now: OffsetDateTime) -> bool {
        self.revoked_at.is_none() && self.expires_at.is_none_or(|it| it > now)
    }
}

/// Which grants to give.
#[derive(Clone, Debug, Default)]
pub struct GrantFilter {
    pub person: Option<Person>,
    pub role: Option<String>,
    /// Only what follows this person and role; grants come in that order.
    pub after: Option<(Person, String)>,
    pub limit: u32,
}

/// Who takes roles away, and why.
#[derive(Clone, Copy, Debug)]
pub struct Revocation<'a> {
    pub by: &'a str,
    pub reason: &'a str,
}

impl Store {
    /// Grants a set of roles, which may be empty, to the person of the event, at no target.
    ///
    /// A role that a newer event granted stays as that event granted it.
    pub async fn grant(
        &self,
        worker: &str,
        event: &SignUpEvent,
        grants: &[NewGrant],
        now: OffsetDateTime,
    ) -> Result<Done, StoreError> {
        self.grant_at(worker, event, grants, |_| Vec::new(), now).await
    }

    /// Grants like [`Store::grant`], and wants each role at the targets that `targets` names for it.
    /// Where there are any, the worker has dealt with the event only once they hold it, and that is
    /// for it to note ([`Store::mark_done`]); what is wanted is written once all the same.
    ///
    /// Nobody gets back what was revoked after the event had happened.
    pub async fn grant_at(
        &self,
        worker: &str,
        event: &SignUpEvent,
        grants: &[NewGrant],
        targets: impl Fn(&str) -> Vec<String> + Send,
        now: OffsetDateTime,
    ) -> Result<Done, StoreError> {
        let now = storable_time(now);
        let is_carried = grants.iter().any(|it| !targets(&it.role).is_empty());
        let mut session = self.write().await?;
        let done = enter_wanted(&mut session, worker, event.id, now).await?;
        if !is_carried {
            inbox::enter(&mut session, worker, event.id, now).await?;
        }
        if done == Done::Now {
            insert_set(&mut session, worker, event.id, &event.person, grants.len(), now).await?;
            let grants = in_lock_order(grants);
            let mut granted = Vec::new();
            for grant in grants {
                if insert_grant(&mut session, event, grant, now).await? {
                    granted.push(grant);
                }
            }
            for grant in granted {
                let mut targets = targets(&grant.role);
                targets.sort_unstable();
                for target in targets {
                    let expires_at = grant.expires_at;
                    grant_targets::want(&mut session, event, &grant.role, &target, expires_at, now)
                        .await?;
                }
            }
        }
        session.commit().await?;
        Ok(done)
    }

    /// Takes away what was granted because of the event `origin`, which another event says came to
    /// nothing. If `origin` has not been dealt with by then, it grants nothing any more. That the
    /// worker has dealt with `event` is for it to note, once targets hold nothing of it any more.
    pub async fn revoke_grants_of(
        &self,
        worker: &str,
        event: &SignUpEvent,
        origin: Uuid,
        revocation: Revocation<'_>,
        now: OffsetDateTime,
    ) -> Result<Done, StoreError> {
        let mut session = self.write().await?;
        let mut done = Done::Before;
        // Both rows in the order of their ids, as others who have one of them may wait for the other.
        let mut ids = [event.id, origin];
        ids.sort_unstable();
        for id in ids {
            let entered = enter_wanted(&mut session, worker, id, now).await?;
            if entered == Done::Now {
                insert_set(&mut session, worker, id, &event.person, 0, now).await?;
            }
            if id == event.id {
                done = entered;
            }
        }
        if done == Done::Now {
            let which = Which { origin: Some(origin), ..Which::of(&event.person) };
            revoke(&mut session, which, revocation, None, now).await?;
        }
        session.commit().await?;
        Ok(done)
    }

    /// Takes a role away from a person, or all of them; gives those that were in force. What
    /// targets hold of them is due to be taken away from now on.
    pub async fn revoke_grants(
        &self,
        person: &Person,
        role: Option<&str>,
        revocation: Revocation<'_>,
        now: OffsetDateTime,
    ) -> Result<Vec<String>, StoreError> {
        let mut session = self.write().await?;
        let which = Which { role, ..Which::of(person) };
        let roles = revoke(&mut session, which, revocation, Some(now), now).await?;
        session.commit().await?;
        Ok(roles)
    }

    /// Grants by person and role, expired and revoked ones included.
    pub async fn grants(&self, filter: &GrantFilter) -> Result<Vec<Grant>, StoreError> {
        let mut session = self.read().await?;
        let rows: Vec<GrantRow> = fetch_all!(
            &mut session,
            {
                let mut query = QueryBuilder::new("SELECT * FROM grants WHERE 1 = 1");
                if let Some(person) = &filter.person {
                    query.push(" AND person = ").push_bind(person.as_str());
                }
                if let Some(role) = &filter.role {
                    query.push(" AND role = ").push_bind(role);
                }
                if let Some((person, role)) = &filter.after {
                    query.push(" AND (person, role) > (").push_bind(person.as_str());
                    query.push(", ").push_bind(role).push(")");
                }
                query.push(" ORDER BY person, role LIMIT ").push_bind(i64::from(filter.limit));
                query
            }
            .build_query_as()
        )?;
        Ok(rows.into_iter().map(Grant::from).collect())
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
    revoked_by: Option<String>,
    revoke_reason: Option<String>,
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
            revoked_by: row.revoked_by,
            revoke_reason: row.revoke_reason,
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
    event_id: Uuid,
    person: &Person,
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
        .bind(event_id)
        .bind(worker)
        .bind(person.as_str())
        .bind(roles)
        .bind(now)
    )?;
    Ok(())
}

/// Notes that what an event wants is written; the note that the worker has dealt with it, which also
/// an older version made, says as much.
async fn enter_wanted(
    session: &mut Session,
    worker: &str,
    event_id: Uuid,
    now: OffsetDateTime,
) -> Result<Done, StoreError> {
    if inbox::holds(session, worker, event_id).await? {
        return Ok(Done::Before);
    }
    inbox::enter(session, &format!("{worker}:wanted"), event_id, now).await
}

/// Which grants of a person to take away.
struct Which<'a> {
    person: &'a Person,
    role: Option<&'a str>,
    origin: Option<Uuid>,
}

impl<'a> Which<'a> {
    const fn of(person: &'a Person) -> Self {
        Self { person, role: None, origin: None }
    }
}

async fn revoke(
    session: &mut Session,
    which: Which<'_>,
    revocation: Revocation<'_>,
    due_at: Option<OffsetDateTime>,
    now: OffsetDateTime,
) -> Result<Vec<String>, StoreError> {
    let Which { person, role, origin } = which;
    // By role, like everybody who locks grants.
    let lock = match session.dialect() {
        Dialect::Sqlite(_) => "",
        Dialect::Postgres(_) => " FOR UPDATE",
    };
    let rows: Vec<(String,)> = fetch_all!(
        session,
        {
            let mut query = QueryBuilder::new("SELECT role FROM grants WHERE person = ");
            query.push_bind(person.as_str()).push(" AND revoked_at IS NULL");
            if let Some(role) = role {
                query.push(" AND role = ").push_bind(role);
            }
            if let Some(origin) = origin {
                query.push(" AND event_id = ").push_bind(origin);
            }
            query.push(" ORDER BY role").push(lock);
            query
        }
        .build_query_as()
    )?;
    let roles: Vec<_> = rows.into_iter().map(|(role,)| role).collect();
    for role in &roles {
        execute!(
            session,
            sqlx::query(
                "UPDATE grants SET revoked_at = $3, revoked_by = $4, revoke_reason = $5
                 WHERE person = $1 AND role = $2"
            )
            .bind(person.as_str())
            .bind(role)
            .bind(Moment(now))
            .bind(storable(revocation.by))
            .bind(storable(revocation.reason))
        )?;
    }
    for role in &roles {
        grant_targets::want_no_more(session, person, role, due_at, now).await?;
    }
    Ok(roles)
}

/// Says whether the event has a say: it is newer than what granted the role, or took it away.
async fn insert_grant(
    session: &mut Session,
    event: &SignUpEvent,
    grant: &NewGrant,
    now: OffsetDateTime,
) -> Result<bool, StoreError> {
    let rows = execute!(
        session,
        sqlx::query(
            "INSERT INTO grants (person, role, reason, event_id, granted_at, expires_at)
             VALUES ($1, $2, $3, $4, $5, $6)
             ON CONFLICT (person, role) DO UPDATE SET
                 reason = excluded.reason, event_id = excluded.event_id,
                 granted_at = excluded.granted_at, expires_at = excluded.expires_at,
                 revoked_at = NULL, revoked_by = NULL, revoke_reason = NULL
             WHERE excluded.event_id > grants.event_id
                 AND (grants.revoked_at IS NULL OR grants.revoked_at < $7)"
        )
        .bind(event.person.as_str())
        .bind(storable(&grant.role))
        .bind(storable(&grant.reason))
        .bind(event.id)
        .bind(now)
        .bind(grant.expires_at.map(storable_time))
        .bind(Moment(event.time))
    )?;
    Ok(rows > 0)
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
