//! What targets (groups, app roles, accounts of other systems) are to hold of what was granted.
//!
//! A row says what is wanted of one role of one person at one target, and whether that was last seen
//! done. It is written with the grant, in its transaction. Whoever makes a target so claims the row
//! first, acts, and notes the outcome; if they die in between, the row is as before once the lease is
//! over, and the act is done again, which does no harm. Where what is wanted changes while somebody
//! acts, the row stays pending.
//!
//! A row that an event brought is that event's to carry through: it comes again until it is done.
//! What is to be taken away, or made so again, has a time when it is due, and is never given up.
//!
//! PostgreSQL's row locks: grants by role first, then these, by role and target.

use std::{fmt, str::FromStr, time::Duration};

use sqlx::QueryBuilder;
use time::OffsetDateTime;
use uuid::Uuid;
use vestibule_events::{Email, Person, SignUpEvent};

use crate::{
    Grant, Store, StoreError,
    error::Cause,
    session::{Dialect, Session, execute, fetch_all, fetch_one, fetch_optional},
    text::{Moment, storable, storable_time},
};

/// Of a role, what a target is to hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Wanted {
    Present,
    Absent,
}

impl Wanted {
    /// The name in the store and on the command line.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Present => "present",
            Self::Absent => "absent",
        }
    }
}

impl fmt::Display for Wanted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Wanted {
    type Err = StoreError;

    fn from_str(name: &str) -> Result<Self, StoreError> {
        [Self::Present, Self::Absent].into_iter().find(|it| it.as_str() == name).ok_or_else(|| {
            StoreError::Misconfigured(Cause::new("a target is to hold something unknown"))
        })
    }
}

/// One role of one person at one target.
///
/// `Debug` leaves the address out.
#[derive(Clone, PartialEq, Eq)]
pub struct GrantTarget {
    pub person: Person,
    pub role: String,
    /// As the configuration names it.
    pub target: String,
    pub wanted: Wanted,
    /// Whether the target is still to be made so.
    pub is_pending: bool,
    /// The event that the grant stems from.
    pub event_id: Uuid,
    pub email: Option<Email>,
    /// The directory's id of the account, where an event or the store knew it.
    pub object_id: Option<String>,
    /// What the target told of itself.
    pub seen: Seen,
    pub expires_at: Option<OffsetDateTime>,
    /// When what is wanted changed last.
    pub since: OffsetDateTime,
    /// When it is tried (again) though no event asks for it.
    pub due_at: Option<OffsetDateTime>,
    pub leased_until: Option<OffsetDateTime>,
    /// Failed ones since what is wanted changed.
    pub tries: u32,
    /// Why the last of them failed.
    pub error: Option<String>,
    pub applied_at: Option<OffsetDateTime>,
    version: i64,
}

/// Ids that a target has given.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// Of the person's account.
    pub account: Option<String>,
    /// Of what was made for the role, where that has an id of its own.
    pub membership: Option<String>,
}

impl fmt::Debug for GrantTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GrantTarget")
            .field("person", &self.person)
            .field("role", &self.role)
            .field("target", &self.target)
            .field("wanted", &self.wanted)
            .field("is_pending", &self.is_pending)
            .finish_non_exhaustive()
    }
}

/// Which rows to give.
#[derive(Clone, Debug, Default)]
pub struct GrantTargetFilter {
    pub person: Option<Person>,
    /// Only what is still to be made so.
    pub pending: bool,
    /// Only what follows this person, role and target; rows come in that order.
    pub after: Option<(Person, String, String)>,
    pub limit: u32,
}

impl Store {
    /// What targets are to hold, by person, role and target.
    pub async fn grant_targets(
        &self,
        filter: &GrantTargetFilter,
    ) -> Result<Vec<GrantTarget>, StoreError> {
        let mut session = self.read().await?;
        let rows: Vec<Row> = fetch_all!(
            &mut session,
            {
                let mut query = QueryBuilder::new("SELECT * FROM grant_targets WHERE 1 = 1");
                if let Some(person) = &filter.person {
                    query.push(" AND person = ").push_bind(person.as_str());
                }
                if filter.pending {
                    query.push(" AND state = 'pending'");
                }
                if let Some((person, role, target)) = &filter.after {
                    query.push(" AND (person, role, target) > (").push_bind(person.as_str());
                    query.push(", ").push_bind(role).push(", ").push_bind(target).push(")");
                }
                query.push(" ORDER BY person, role, target LIMIT ");
                query.push_bind(i64::from(filter.limit));
                query
            }
            .build_query_as()
        )?;
        rows.into_iter().map(GrantTarget::try_from).collect()
    }

    /// What is pending of a person and carried by their events.
    pub async fn pending_by_event(&self, person: &Person) -> Result<Vec<GrantTarget>, StoreError> {
        let mut session = self.read().await?;
        let rows: Vec<Row> = fetch_all!(
            &mut session,
            sqlx::query_as(
                "SELECT * FROM grant_targets
                 WHERE person = $1 AND state = 'pending' AND due_at IS NULL
                 ORDER BY role, target"
            )
            .bind(person.as_str())
        )?;
        rows.into_iter().map(GrantTarget::try_from).collect()
    }

    /// How much targets are yet to be made to hold, whoever does it and when.
    pub async fn grant_targets_pending(&self) -> Result<u64, StoreError> {
        let mut session = self.read().await?;
        let (count,): (i64,) = fetch_one!(
            &mut session,
            sqlx::query_as("SELECT count(*) FROM grant_targets WHERE state = 'pending'")
        )?;
        Ok(u64::try_from(count).unwrap_or_default())
    }

    /// What is due at a target and in nobody's hands, the longest due first.
    pub async fn due_grant_targets(
        &self,
        target: &str,
        now: OffsetDateTime,
        limit: u32,
    ) -> Result<Vec<GrantTarget>, StoreError> {
        let mut session = self.read().await?;
        let rows: Vec<Row> = fetch_all!(
            &mut session,
            sqlx::query_as(
                "SELECT * FROM grant_targets
                 WHERE target = $1 AND state = 'pending' AND due_at <= $2
                     AND (leased_until IS NULL OR leased_until <= $2)
                 ORDER BY due_at LIMIT $3"
            )
            .bind(target)
            .bind(Moment(now))
            .bind(i64::from(limit))
        )?;
        rows.into_iter().map(GrantTarget::try_from).collect()
    }

    /// Takes a pending row in hand: nobody else gets it until `lease` is over. `None` where it is in
    /// other hands, or no longer pending.
    pub async fn claim_grant_target(
        &self,
        row: &GrantTarget,
        now: OffsetDateTime,
        lease: Duration,
    ) -> Result<Option<GrantTarget>, StoreError> {
        let mut session = self.write().await?;
        let claimed: Option<Row> = fetch_optional!(
            &mut session,
            sqlx::query_as(
                "UPDATE grant_targets SET leased_until = $4
                 WHERE person = $1 AND role = $2 AND target = $3 AND state = 'pending'
                     AND (leased_until IS NULL OR leased_until <= $5)
                 RETURNING *"
            )
            .bind(row.person.as_str())
            .bind(&row.role)
            .bind(&row.target)
            .bind(Moment(now + lease))
            .bind(Moment(now))
        )?;
        session.commit().await?;
        claimed.map(GrantTarget::try_from).transpose()
    }

    /// Notes that a target is as `claimed` wants it, and lets go of the row. Where something else is
    /// wanted by now, that stays pending; where it is wanted for another account, what was seen is
    /// of no use.
    pub async fn grant_target_applied(
        &self,
        claimed: &GrantTarget,
        seen: &Seen,
        now: OffsetDateTime,
    ) -> Result<(), StoreError> {
        let mut session = self.write().await?;
        execute!(
            &mut session,
            sqlx::query(
                "UPDATE grant_targets SET
                     leased_until = NULL,
                     account = CASE WHEN object_id IS NOT DISTINCT FROM $9
                         THEN $5 ELSE account END,
                     membership = CASE WHEN object_id IS NOT DISTINCT FROM $9
                         THEN $6 ELSE membership END,
                     state = CASE WHEN version = $7 THEN 'applied' ELSE state END,
                     applied_at = CASE WHEN version = $7 THEN $8 ELSE applied_at END,
                     due_at = CASE WHEN version = $7 THEN NULL ELSE due_at END,
                     error = CASE WHEN version = $7 THEN NULL ELSE error END
                 WHERE person = $1 AND role = $2 AND target = $3 AND leased_until = $4"
            )
            .bind(claimed.person.as_str())
            .bind(&claimed.role)
            .bind(&claimed.target)
            .bind(claimed.leased_until.map(Moment))
            .bind(seen.account.as_deref().map(storable))
            .bind(seen.membership.as_deref().map(storable))
            .bind(claimed.version)
            .bind(storable_time(now))
            .bind(&claimed.object_id)
        )?;
        session.commit().await
    }

    /// Notes that a target could not be made so, and lets go of the row. What has a time when it is
    /// due is due again at `due_at`; what an event carries is left to it.
    pub async fn grant_target_failed(
        &self,
        claimed: &GrantTarget,
        seen: &Seen,
        error: &str,
        due_at: OffsetDateTime,
    ) -> Result<(), StoreError> {
        let mut session = self.write().await?;
        execute!(
            &mut session,
            sqlx::query(
                "UPDATE grant_targets SET
                     leased_until = NULL, tries = tries + 1, error = $8,
                     account = CASE WHEN object_id IS NOT DISTINCT FROM $10
                         THEN $5 ELSE account END,
                     membership = CASE WHEN object_id IS NOT DISTINCT FROM $10
                         THEN $6 ELSE membership END,
                     due_at = CASE
                         WHEN due_at IS NOT NULL AND version = $7 THEN $9 ELSE due_at END
                 WHERE person = $1 AND role = $2 AND target = $3 AND leased_until = $4"
            )
            .bind(claimed.person.as_str())
            .bind(&claimed.role)
            .bind(&claimed.target)
            .bind(claimed.leased_until.map(Moment))
            .bind(seen.account.as_deref().map(storable))
            .bind(seen.membership.as_deref().map(storable))
            .bind(claimed.version)
            .bind(storable(error))
            .bind(Moment(due_at))
            .bind(&claimed.object_id)
        )?;
        session.commit().await
    }

    /// Whatever has expired is no longer wanted; gives how much that was.
    pub async fn expire_grant_targets(&self, now: OffsetDateTime) -> Result<u64, StoreError> {
        // Looked for first: a write would wait for its turn, and mostly there is nothing.
        let mut session = self.read().await?;
        let first: Option<(OffsetDateTime,)> = fetch_optional!(
            &mut session,
            sqlx::query_as(
                "SELECT expires_at FROM grant_targets
                 WHERE wanted = 'present' AND expires_at <= $1 LIMIT 1"
            )
            .bind(Moment(now))
        )?;
        drop(session);
        if first.is_none() {
            return Ok(0);
        }
        let mut session = self.write().await?;
        // Who comes second does not wait for who came first.
        let lock = match session.dialect() {
            Dialect::Sqlite(_) => "",
            Dialect::Postgres(_) => " FOR UPDATE SKIP LOCKED",
        };
        let rows = execute!(
            &mut session,
            {
                let mut query = QueryBuilder::new(
                    "WITH over AS MATERIALIZED (SELECT person, role, target FROM grant_targets
                     WHERE wanted = 'present' AND expires_at <= ",
                );
                query.push_bind(Moment(now)).push(" LIMIT 1000").push(lock);
                query.push(
                    ") UPDATE grant_targets SET wanted = 'absent', state = 'pending',
                     version = version + 1, tries = 0, error = NULL, since = ",
                );
                query.push_bind(storable_time(now)).push(", due_at = ").push_bind(Moment(now));
                query.push(
                    " WHERE wanted = 'present'
                     AND (person, role, target) IN (SELECT person, role, target FROM over)",
                );
                query
            }
            .build()
        )?;
        session.commit().await?;
        Ok(rows)
    }

    /// Wants a target to be made as it should be, now: where it was found to hold something else, or
    /// where a grant is older than the target. `before` is the row as it was then; where it has
    /// changed meanwhile nothing happens.
    pub async fn repair_grant_target(
        &self,
        grant: &Grant,
        target: &str,
        wanted: Wanted,
        before: Option<&GrantTarget>,
        now: OffsetDateTime,
    ) -> Result<Option<GrantTarget>, StoreError> {
        let mut session = self.write().await?;
        let row: Option<Row> = fetch_optional!(
            &mut session,
            sqlx::query_as(
                "INSERT INTO grant_targets (person, role, target, wanted, state, version, event_id,
                     email, expires_at, since, due_at, tries)
                 VALUES ($1, $2, $3, $4, 'pending', 1, $5,
                     (SELECT email FROM people WHERE person = $1), $6, $7, $8, 0)
                 ON CONFLICT (person, role, target) DO UPDATE SET
                     wanted = excluded.wanted, state = 'pending',
                     version = grant_targets.version + 1, expires_at = excluded.expires_at,
                     email = COALESCE(grant_targets.email, excluded.email),
                     due_at = $8, tries = 0, error = NULL
                 WHERE grant_targets.version = $9
                 RETURNING *"
            )
            .bind(grant.person.as_str())
            .bind(storable(&grant.role))
            .bind(target)
            .bind(wanted.as_str())
            .bind(grant.event_id)
            .bind(grant.expires_at.map(Moment))
            .bind(storable_time(now))
            .bind(Moment(now))
            .bind(before.map_or(0, |it| it.version))
        )?;
        session.commit().await?;
        row.map(GrantTarget::try_from).transpose()
    }
}

/// Within the transaction of a grant: wants its role at a target. Where that is so already nothing
/// changes, unless the event tells of another account: then it is that one's role that is wanted.
/// What has expired by now is due: a role that is to be taken away is not left to an event, which may
/// be parked.
pub(crate) async fn want(
    session: &mut Session,
    event: &SignUpEvent,
    role: &str,
    target: &str,
    expires_at: Option<OffsetDateTime>,
    now: OffsetDateTime,
) -> Result<(), StoreError> {
    let object_id = event.sign_up.object_id.as_deref().map(storable);
    if let Some(object_id) = &object_id {
        forget_other_account(session, &event.person, role, target, object_id, now).await?;
    }
    let wanted = wanted_until(expires_at, now);
    execute!(
        session,
        sqlx::query(
            "INSERT INTO grant_targets (person, role, target, wanted, state, version, event_id,
                 email, object_id, expires_at, since, due_at, tries)
             VALUES ($1, $2, $3, $4, 'pending', 1, $5, $6, $7, $8, $9, $10, 0)
             ON CONFLICT (person, role, target) DO UPDATE SET
                 event_id = excluded.event_id, expires_at = excluded.expires_at,
                 email = COALESCE(excluded.email, grant_targets.email),
                 object_id = COALESCE(excluded.object_id, grant_targets.object_id),
                 state = CASE WHEN grant_targets.wanted = excluded.wanted
                     THEN grant_targets.state ELSE 'pending' END,
                 version = CASE WHEN grant_targets.wanted = excluded.wanted
                     THEN grant_targets.version ELSE grant_targets.version + 1 END,
                 since = CASE WHEN grant_targets.wanted = excluded.wanted
                     THEN grant_targets.since ELSE excluded.since END,
                 due_at = CASE WHEN grant_targets.wanted = excluded.wanted
                         AND grant_targets.state = 'applied'
                     THEN NULL ELSE excluded.due_at END,
                 tries = 0, error = NULL, wanted = excluded.wanted"
        )
        .bind(event.person.as_str())
        .bind(storable(role))
        .bind(target)
        .bind(wanted.as_str())
        .bind(event.id)
        .bind(event.sign_up.email.as_ref().map(|it| storable(it.expose())))
        .bind(object_id)
        .bind(expires_at.map(Moment))
        .bind(storable_time(now))
        .bind((wanted == Wanted::Absent).then_some(Moment(now)))
    )?;
    Ok(())
}

fn wanted_until(expires_at: Option<OffsetDateTime>, now: OffsetDateTime) -> Wanted {
    if expires_at.is_some_and(|it| it <= now) { Wanted::Absent } else { Wanted::Present }
}

/// What was seen at a target was of another account of the person: this one is still to be given what
/// is wanted.
async fn forget_other_account(
    session: &mut Session,
    person: &Person,
    role: &str,
    target: &str,
    object_id: &str,
    now: OffsetDateTime,
) -> Result<(), StoreError> {
    execute!(
        session,
        sqlx::query(
            "UPDATE grant_targets SET state = 'pending', version = version + 1, since = $5,
                 account = NULL, membership = NULL
             WHERE person = $1 AND role = $2 AND target = $3
                 AND COALESCE(object_id, account, '') <> $4"
        )
        .bind(person.as_str())
        .bind(storable(role))
        .bind(target)
        .bind(object_id)
        .bind(storable_time(now))
    )?;
    Ok(())
}

/// Within the transaction of a revocation: a role is wanted nowhere any more, and that is due.
pub(crate) async fn want_no_more(
    session: &mut Session,
    person: &Person,
    role: &str,
    now: OffsetDateTime,
) -> Result<(), StoreError> {
    execute!(
        session,
        sqlx::query(
            "UPDATE grant_targets SET wanted = 'absent', state = 'pending', version = version + 1,
                 since = $3, due_at = $4, tries = 0, error = NULL
             WHERE person = $1 AND role = $2 AND wanted = 'present'"
        )
        .bind(person.as_str())
        .bind(role)
        .bind(storable_time(now))
        .bind(Moment(now))
    )?;
    Ok(())
}

/// Within the transaction in which another event comes to hold a role: what is wanted is wanted
/// because of that one. What is not so yet is due, for the event that carried it may be over.
pub(crate) async fn hand_over(
    session: &mut Session,
    person: &Person,
    role: &str,
    event_id: Uuid,
    expires_at: Option<OffsetDateTime>,
    now: OffsetDateTime,
) -> Result<(), StoreError> {
    execute!(
        session,
        sqlx::query(
            "UPDATE grant_targets SET event_id = $3, expires_at = $4,
                 state = CASE WHEN wanted = $5 THEN state ELSE 'pending' END,
                 version = CASE WHEN wanted = $5 THEN version ELSE version + 1 END,
                 since = CASE WHEN wanted = $5 THEN since ELSE $6 END,
                 due_at = CASE WHEN wanted = $5 AND state = 'applied' THEN NULL ELSE $7 END,
                 wanted = $5
             WHERE person = $1 AND role = $2"
        )
        .bind(person.as_str())
        .bind(role)
        .bind(event_id)
        .bind(expires_at.map(Moment))
        .bind(wanted_until(expires_at, now).as_str())
        .bind(storable_time(now))
        .bind(Moment(now))
    )?;
    Ok(())
}

#[derive(sqlx::FromRow)]
struct Row {
    person: String,
    role: String,
    target: String,
    wanted: String,
    state: String,
    version: i64,
    event_id: Uuid,
    email: Option<String>,
    object_id: Option<String>,
    account: Option<String>,
    membership: Option<String>,
    expires_at: Option<OffsetDateTime>,
    since: OffsetDateTime,
    due_at: Option<OffsetDateTime>,
    leased_until: Option<OffsetDateTime>,
    tries: i64,
    error: Option<String>,
    applied_at: Option<OffsetDateTime>,
}

impl TryFrom<Row> for GrantTarget {
    type Error = StoreError;

    fn try_from(row: Row) -> Result<Self, StoreError> {
        Ok(Self {
            person: Person::from_pseudonym(row.person),
            role: row.role,
            target: row.target,
            wanted: row.wanted.parse()?,
            is_pending: row.state == "pending",
            version: row.version,
            event_id: row.event_id,
            email: row.email.map(Email::new),
            object_id: row.object_id,
            seen: Seen { account: row.account, membership: row.membership },
            expires_at: row.expires_at,
            since: row.since,
            due_at: row.due_at,
            leased_until: row.leased_until,
            tries: u32::try_from(row.tries).unwrap_or(u32::MAX),
            error: row.error,
            applied_at: row.applied_at,
        })
    }
}
