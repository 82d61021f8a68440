//! Which roles were granted to whom, by which rule, because of which event; and which were revoked.
//!
//! Events come in any order, and the order makes no difference. A role that several of a person's
//! events earned is held by the newest of them; the others are kept, for that one may yet come to
//! nothing. What came to nothing is barred by its event, what somebody revoked by the time: nothing
//! that happened before earns it again.

use sqlx::QueryBuilder;
use time::OffsetDateTime;
use uuid::Uuid;
use vestibule_events::{Person, SignUpEvent};

use crate::{
    ConfirmationState, Done, Store, StoreError, grant_targets, inbox,
    session::{Dialect, Session, execute, fetch_all, fetch_one, fetch_optional},
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
    /// A role that a newer event granted stays as that event granted it, unless that comes to nothing.
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
    /// Nobody gets back what somebody revoked after the event had happened.
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
    /// nothing, and because of those in whose place it waited for the account. A role that another
    /// event earned, too, stays as that one granted it. What is taken is due to be taken from targets
    /// from now on. Any of them that has not been dealt with by then grants nothing any more.
    pub async fn revoke_grants_of(
        &self,
        worker: &str,
        event: &SignUpEvent,
        origin: Uuid,
        revocation: Revocation<'_>,
        now: OffsetDateTime,
    ) -> Result<Done, StoreError> {
        let now = storable_time(now);
        let mut session = self.write().await?;
        let over = came_to_nothing(&mut session, event, origin).await?;
        let mut done = Done::Before;
        // In the order of their ids, as others who have one of the rows may wait for another.
        let mut ids = [&over[..], &[event.id]].concat();
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
        inbox::enter(&mut session, worker, event.id, now).await?;
        if done == Done::Now {
            take_back(&mut session, &event.person, &over, revocation, now).await?;
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
        let now = storable_time(now);
        let mut session = self.write().await?;
        let held = lock_held(&mut session, person, role).await?;
        let roles: Vec<_> = held.into_iter().map(|(role, _)| role).collect();
        for role in &roles {
            revoke(&mut session, person, role, revocation, now).await?;
            execute!(
                &mut session,
                sqlx::query("UPDATE grants SET barred_until = $3 WHERE person = $1 AND role = $2")
                    .bind(person.as_str())
                    .bind(role)
                    .bind(now)
            )?;
            execute!(
                &mut session,
                sqlx::query("DELETE FROM older_grants WHERE person = $1 AND role = $2")
                    .bind(person.as_str())
                    .bind(role)
            )?;
        }
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

/// The sign-ups that come to nothing with `origin`: it, and those of the person at the connector in
/// whose place it waited. Where an account came to be after one of them, that one is not among them.
async fn came_to_nothing(
    session: &mut Session,
    event: &SignUpEvent,
    origin: Uuid,
) -> Result<Vec<Uuid>, StoreError> {
    type Row = (Uuid, String, OffsetDateTime, Option<OffsetDateTime>);
    let (superseded, confirmed) = (ConfirmationState::Superseded, ConfirmationState::Confirmed);
    let rows: Vec<Row> = fetch_all!(
        session,
        sqlx::query_as(
            "SELECT event_id, state, since, decided_at FROM confirmations
             WHERE person = $1 AND connector = $2 AND event_id < $3 AND state IN ($4, $5)"
        )
        .bind(event.person.as_str())
        .bind(event.sign_up.connector.as_str())
        .bind(origin)
        .bind(superseded.as_str())
        .bind(confirmed.as_str())
    )?;
    let is = |row: &Row, state: ConfirmationState| row.1 == state.as_str();
    let account_at = rows.iter().filter(|it| is(it, confirmed)).filter_map(|it| it.3).max();
    let rows = rows.iter().filter(|it| is(it, superseded));
    let before = rows.filter(|(_, _, since, _)| account_at.is_none_or(|at| *since > at));
    Ok(before.map(|it| it.0).chain([origin]).collect())
}

/// What an event made of a role.
#[derive(sqlx::FromRow)]
struct Earned {
    event_id: Uuid,
    reason: String,
    granted_at: OffsetDateTime,
    expires_at: Option<OffsetDateTime>,
}

/// The roles that a person holds, or one of them, and because of which events. Locked by role, like
/// everybody does who locks grants.
async fn lock_held(
    session: &mut Session,
    person: &Person,
    role: Option<&str>,
) -> Result<Vec<(String, Uuid)>, StoreError> {
    // By the bytes of the name, as who grants goes: a database may have an order of its own, and then
    // two would wait for each other in a circle.
    let in_order = match session.dialect() {
        Dialect::Sqlite(_) => " ORDER BY role",
        Dialect::Postgres(_) => " ORDER BY role COLLATE \"C\" FOR UPDATE",
    };
    fetch_all!(
        session,
        {
            let mut query = QueryBuilder::new("SELECT role, event_id FROM grants WHERE person = ");
            query.push_bind(person.as_str()).push(" AND revoked_at IS NULL");
            if let Some(role) = role {
                query.push(" AND role = ").push_bind(role);
            }
            query.push(in_order);
            query
        }
        .build_query_as()
    )
}

/// SQLite has one writer at a time anyway.
fn for_update(session: &mut Session) -> &'static str {
    match session.dialect() {
        Dialect::Sqlite(_) => "",
        Dialect::Postgres(_) => " FOR UPDATE",
    }
}

/// Takes from a person what they hold because of events that came to nothing, or lets it be held
/// because of another that earned it.
async fn take_back(
    session: &mut Session,
    person: &Person,
    over: &[Uuid],
    revocation: Revocation<'_>,
    now: OffsetDateTime,
) -> Result<(), StoreError> {
    // All of them: whoever adds to the older ones or takes from them has that of the newest.
    let held = lock_held(session, person, None).await?;
    execute!(
        session,
        {
            let mut query = QueryBuilder::new("DELETE FROM older_grants WHERE person = ");
            query.push_bind(person.as_str()).push(" AND event_id IN (");
            let mut ids = query.separated(", ");
            for id in over {
                ids.push_bind(id);
            }
            query.push(")");
            query
        }
        .build()
    )?;
    for (role, event_id) in held {
        if !over.contains(&event_id) {
            continue;
        }
        match take_newest_older(session, person, &role).await? {
            Some(older) => {
                let Earned { event_id, expires_at, .. } = older;
                hold(session, person, &role, &older).await?;
                grant_targets::hand_over(session, person, &role, event_id, expires_at, now).await?;
            }
            None => revoke(session, person, &role, revocation, now).await?,
        }
    }
    Ok(())
}

async fn take_newest_older(
    session: &mut Session,
    person: &Person,
    role: &str,
) -> Result<Option<Earned>, StoreError> {
    let older: Option<Earned> = fetch_optional!(
        session,
        sqlx::query_as(
            "SELECT event_id, reason, granted_at, expires_at FROM older_grants
             WHERE person = $1 AND role = $2 ORDER BY event_id DESC LIMIT 1"
        )
        .bind(person.as_str())
        .bind(role)
    )?;
    if let Some(Earned { event_id, .. }) = &older {
        execute!(
            session,
            sqlx::query(
                "DELETE FROM older_grants WHERE person = $1 AND role = $2 AND event_id = $3"
            )
            .bind(person.as_str())
            .bind(role)
            .bind(event_id)
        )?;
    }
    Ok(older)
}

async fn keep_older(
    session: &mut Session,
    person: &Person,
    role: &str,
    older: &Earned,
) -> Result<(), StoreError> {
    execute!(
        session,
        sqlx::query(
            "INSERT INTO older_grants (person, role, event_id, reason, granted_at, expires_at)
             VALUES ($1, $2, $3, $4, $5, $6)
             ON CONFLICT DO NOTHING"
        )
        .bind(person.as_str())
        .bind(role)
        .bind(older.event_id)
        .bind(&older.reason)
        .bind(older.granted_at)
        .bind(older.expires_at)
    )?;
    Ok(())
}

/// Lets a role be held because of an event, whatever was so before.
async fn hold(
    session: &mut Session,
    person: &Person,
    role: &str,
    earned: &Earned,
) -> Result<(), StoreError> {
    execute!(
        session,
        sqlx::query(
            "UPDATE grants SET event_id = $3, reason = $4, granted_at = $5, expires_at = $6,
                 revoked_at = NULL, revoked_by = NULL, revoke_reason = NULL
             WHERE person = $1 AND role = $2"
        )
        .bind(person.as_str())
        .bind(role)
        .bind(earned.event_id)
        .bind(&earned.reason)
        .bind(earned.granted_at)
        .bind(earned.expires_at)
    )?;
    Ok(())
}

async fn revoke(
    session: &mut Session,
    person: &Person,
    role: &str,
    revocation: Revocation<'_>,
    now: OffsetDateTime,
) -> Result<(), StoreError> {
    execute!(
        session,
        sqlx::query(
            "UPDATE grants SET revoked_at = $3, revoked_by = $4, revoke_reason = $5
             WHERE person = $1 AND role = $2"
        )
        .bind(person.as_str())
        .bind(role)
        .bind(now)
        .bind(storable(revocation.by))
        .bind(storable(revocation.reason))
    )?;
    grant_targets::want_no_more(session, person, role, now).await
}

/// Says whether the role is held because of this event now.
async fn insert_grant(
    session: &mut Session,
    event: &SignUpEvent,
    grant: &NewGrant,
    now: OffsetDateTime,
) -> Result<bool, StoreError> {
    let (person, role) = (&event.person, storable(&grant.role));
    let earned = Earned {
        event_id: event.id,
        reason: storable(&grant.reason).into_owned(),
        granted_at: now,
        expires_at: grant.expires_at.map(storable_time),
    };
    let rows = execute!(
        session,
        sqlx::query(
            "INSERT INTO grants (person, role, event_id, reason, granted_at, expires_at)
             VALUES ($1, $2, $3, $4, $5, $6)
             ON CONFLICT DO NOTHING"
        )
        .bind(person.as_str())
        .bind(&*role)
        .bind(earned.event_id)
        .bind(&earned.reason)
        .bind(earned.granted_at)
        .bind(earned.expires_at)
    )?;
    if rows > 0 {
        return Ok(true);
    }
    let lock = for_update(session);
    let Held { earned: before, revoked_at, barred_until } = fetch_one!(
        session,
        {
            let mut query = QueryBuilder::new("SELECT * FROM grants WHERE person = ");
            query.push_bind(person.as_str()).push(" AND role = ").push_bind(&*role).push(lock);
            query
        }
        .build_query_as()
    )?;
    if barred_until.is_some_and(|until| until >= event.time) {
        return Ok(false);
    }
    if revoked_at.is_none() {
        if before.event_id > event.id {
            keep_older(session, person, &role, &earned).await?;
            return Ok(false);
        }
        keep_older(session, person, &role, &before).await?;
    }
    hold(session, person, &role, &earned).await?;
    Ok(true)
}

/// How a role that was granted before is held, if it still is.
#[derive(sqlx::FromRow)]
struct Held {
    #[sqlx(flatten)]
    earned: Earned,
    revoked_at: Option<OffsetDateTime>,
    barred_until: Option<OffsetDateTime>,
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
