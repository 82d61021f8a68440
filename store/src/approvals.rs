//! Requests for approval: who waits for a yes, and who said it.
//!
//! A person has one open request with a connector; further attempts are noted on it. A request is
//! decided once: its decision and the event that tells of it (in the outbox) are one transaction,
//! so of two approvers at once one decides and the other learns what was decided.
//!
//! A decision holds until a newer request is opened, and only a person who was denied, or whose
//! request expired, opens one. Whether they may apply again is left to the connector.

use std::fmt;

use sqlx::QueryBuilder;
use time::OffsetDateTime;
use uuid::Uuid;
use vestibule_events::{Approval, ConnectorName, Effect, Kind, Person, SignUpEvent};

use crate::{
    Done, Store, StoreError,
    error::Cause,
    inbox, outbox,
    session::{Session, execute, fetch_all, fetch_one, fetch_optional},
    text::{storable, storable_time, to_the_second},
};

/// A request for approval, with the sign-up that it is about.
///
/// `Debug` leaves out whatever is about people.
#[derive(Clone, PartialEq)]
pub struct ApprovalRequest {
    /// The `pending` event that opened it.
    pub id: Uuid,
    pub person: Person,
    pub connector: ConnectorName,
    pub state: RequestState,
    /// When the opening event happened.
    pub requested_at: OffsetDateTime,
    /// To the second.
    pub expires_at: OffsetDateTime,
    /// How often the person has tried since, the first time included.
    pub attempts: u32,
    /// Or when it expired.
    pub decided_at: Option<OffsetDateTime>,
    pub decided_by: Option<String>,
    pub reason: Option<String>,
    /// The opening event as it came: claims, identities and locale are in it.
    pub event: SignUpEvent,
}

impl fmt::Debug for ApprovalRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ApprovalRequest")
            .field("id", &self.id)
            .field("person", &self.person)
            .field("connector", &self.connector)
            .field("state", &self.state)
            .field("expires_at", &self.expires_at)
            .field("attempts", &self.attempts)
            .finish_non_exhaustive()
    }
}

/// What became of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RequestState {
    Pending,
    Approved,
    Denied,
    /// Nobody decided in time.
    Expired,
}

impl RequestState {
    pub const ALL: [Self; 4] = [Self::Pending, Self::Approved, Self::Denied, Self::Expired];

    /// The name in the store and on the command line.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Approved => "approved",
            Self::Denied => "denied",
            Self::Expired => "expired",
        }
    }
}

impl fmt::Display for RequestState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl std::str::FromStr for RequestState {
    type Err = UnknownState;

    fn from_str(name: &str) -> Result<Self, UnknownState> {
        Self::ALL.into_iter().find(|state| state.as_str() == name).ok_or(UnknownState)
    }
}

/// A word that names no [`RequestState`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a state is one of pending, approved, denied, expired")]
pub struct UnknownState;

/// Where a person stands with a connector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ApprovalState {
    Pending { since: OffsetDateTime },
    Approved { at: OffsetDateTime },
    Denied { at: OffsetDateTime },
    Expired { at: OffsetDateTime },
}

/// What a `pending` event became.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Opened {
    /// A new request, under the id of the event.
    Now,
    /// One more attempt, noted on this request.
    Noted { request: Uuid },
    /// The worker had dealt with the event before; nothing was changed.
    Before,
}

/// What a decision came to.
#[derive(Clone, Debug, PartialEq)]
pub enum Decided {
    /// This is the decision, and its event is on its way to the log.
    Now,
    /// Somebody else was first; the request says who, and what they decided.
    Already(Box<ApprovalRequest>),
    /// It was too late.
    Expired,
    NotFound,
}

/// Which requests to list; all that are given must hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ApprovalFilter {
    pub state: Option<RequestState>,
    pub person: Option<Person>,
    pub connector: Option<ConnectorName>,
    /// Only older requests than this one: the last of the page before.
    pub before: Option<Uuid>,
    /// At most [`ApprovalFilter::LIMIT_MAX`].
    pub limit: u32,
}

impl ApprovalFilter {
    /// Each request comes with its whole sign-up, up to 64 KiB.
    pub const LIMIT_MAX: u32 = 500;
}

/// All of them are one transaction, which others wait for.
const EXPIRED_MAX: u32 = 500;

impl Store {
    /// Opens a request for the person of a `pending` event, or notes the attempt on the one there
    /// is.
    pub async fn open_request(
        &self,
        worker: &str,
        event: &SignUpEvent,
        expires_at: OffsetDateTime,
        now: OffsetDateTime,
    ) -> Result<Opened, StoreError> {
        let now = storable_time(now);
        let mut session = self.write().await?;
        let opened = if inbox::enter(&mut session, worker, event.id, now).await? == Done::Before {
            Opened::Before
        } else {
            open(&mut session, event, expires_at, now).await?
        };
        session.commit().await?;
        Ok(opened)
    }

    /// Where a person stands with a connector, by their newest request; one read of an index.
    pub async fn approval_state(
        &self,
        person: &Person,
        connector: &ConnectorName,
    ) -> Result<Option<ApprovalState>, StoreError> {
        let mut session = self.read().await?;
        let row: Option<StandingRow> = fetch_newest(&mut session, person, connector).await?;
        row.map(|row| row.state()).transpose()
    }

    /// Requests, the newest first.
    pub async fn approval_requests(
        &self,
        filter: &ApprovalFilter,
    ) -> Result<Vec<ApprovalRequest>, StoreError> {
        let mut session = self.read().await?;
        let limit = filter.limit.min(ApprovalFilter::LIMIT_MAX);
        let rows: Vec<RequestRow> = fetch_all!(
            &mut session,
            {
                let mut query = QueryBuilder::new("SELECT * FROM approval_requests");
                let mut glue = " WHERE ";
                if let Some(state) = filter.state {
                    query.push(glue).push("state = ").push_bind(state.as_str());
                    glue = " AND ";
                }
                if let Some(person) = &filter.person {
                    query.push(glue).push("person = ").push_bind(person.as_str());
                    glue = " AND ";
                }
                if let Some(connector) = &filter.connector {
                    query.push(glue).push("connector = ").push_bind(connector.as_str());
                    glue = " AND ";
                }
                if let Some(before) = filter.before {
                    query.push(glue).push("id < ").push_bind(before);
                }
                query.push(" ORDER BY id DESC LIMIT ").push_bind(i64::from(limit));
                query
            }
            .build_query_as()
        )?;
        rows.into_iter().map(ApprovalRequest::try_from).collect()
    }

    /// How many requests nobody has decided yet.
    pub async fn requests_waiting(&self) -> Result<u64, StoreError> {
        let mut session = self.read().await?;
        let (count,): (i64,) = fetch_one!(
            &mut session,
            sqlx::query_as("SELECT count(*) FROM approval_requests WHERE state = $1")
                .bind(RequestState::Pending.as_str())
        )?;
        Ok(u64::try_from(count).unwrap_or_default())
    }

    /// The request that an event opened or was noted on; so the id of a request finds it, too.
    pub async fn approval_request(
        &self,
        event_id: Uuid,
    ) -> Result<Option<ApprovalRequest>, StoreError> {
        let mut session = self.read().await?;
        fetch_request(&mut session, event_id).await
    }

    /// The requests whose id, or the id of an event noted on them, begins like this; ten at most,
    /// and none where it is no beginning of an id. More than one: it is not unique.
    pub async fn approval_requests_like(
        &self,
        prefix: &str,
    ) -> Result<Vec<ApprovalRequest>, StoreError> {
        let Some((first, last)) = ids_with(prefix) else { return Ok(Vec::new()) };
        let mut session = self.read().await?;
        let rows: Vec<RequestRow> = fetch_all!(
            &mut session,
            sqlx::query_as(
                "SELECT * FROM approval_requests WHERE id IN (
                     SELECT request_id FROM approval_attempts WHERE event_id BETWEEN $1 AND $2)
                 ORDER BY id LIMIT 10"
            )
            .bind(first)
            .bind(last)
        )?;
        rows.into_iter().map(ApprovalRequest::try_from).collect()
    }

    /// Decides the request that an `approved` or `denied` event is about, unless it is decided,
    /// and puts the event into the outbox.
    ///
    /// The same event again is the same decision: [`Decided::Now`], and nothing is changed.
    pub async fn decide_request(
        &self,
        event: &SignUpEvent,
        now: OffsetDateTime,
    ) -> Result<Decided, StoreError> {
        let (approval, state) = match (&event.approval, event.kind) {
            (Some(approval), Kind::Approved) => (approval, RequestState::Approved),
            (Some(approval), Kind::Denied) => (approval, RequestState::Denied),
            _ => return Err(no_decision()),
        };
        let mut session = self.write().await?;
        if close(&mut session, event, approval, state, now).await? {
            session.commit().await?;
            return Ok(Decided::Now);
        }
        // The statement waited for whoever was deciding, so what is read now is the outcome.
        let request: Option<RequestRow> = fetch_optional!(
            &mut session,
            sqlx::query_as("SELECT * FROM approval_requests WHERE id = $1").bind(approval.request)
        )?;
        session.commit().await?;
        let Some(row) = request else { return Ok(Decided::NotFound) };
        let decided_so_before = row.decision_event == Some(event.id);
        let request = ApprovalRequest::try_from(row)?;
        Ok(match request.state {
            RequestState::Approved | RequestState::Denied if decided_so_before => Decided::Now,
            RequestState::Approved | RequestState::Denied => Decided::Already(Box::new(request)),
            // Still pending: its time is over, and nobody has cleared it away yet.
            RequestState::Pending | RequestState::Expired => Decided::Expired,
        })
    }

    /// Closes requests whose time is over, with the event of each into the outbox; says how many.
    ///
    /// At most `limit` at once, and never more than 500: fewer than that, and there are no more. A
    /// request that cannot be read is an error, once the others are closed.
    pub async fn expire_requests(
        &self,
        now: OffsetDateTime,
        make_event: impl Fn(&ApprovalRequest) -> SignUpEvent + Send,
        limit: u32,
    ) -> Result<u64, StoreError> {
        let mut session = self.write().await?;
        let rows: Vec<RequestRow> = fetch_all!(
            &mut session,
            // In a fixed order, so that two who do this at once do not wait in a circle.
            sqlx::query_as(
                "SELECT * FROM approval_requests WHERE state = 'pending' AND expires_at <= $1
                 ORDER BY expires_at, id LIMIT $2"
            )
            .bind(to_the_second(now))
            .bind(i64::from(limit.min(EXPIRED_MAX)))
        )?;
        let mut expired = 0;
        let mut unreadable = None;
        for row in rows {
            // One that cannot be read must not keep the others from ending.
            let request = match ApprovalRequest::try_from(row) {
                Ok(request) => request,
                Err(error) => {
                    unreadable = Some(error);
                    continue;
                }
            };
            let event = make_event(&request);
            let Some(approval) = event.approval.as_ref().filter(|it| it.request == request.id)
            else {
                return Err(no_decision());
            };
            let closed = close(&mut session, &event, approval, RequestState::Expired, now).await?;
            expired += u64::from(closed);
        }
        session.commit().await?;
        unreadable.map_or(Ok(expired), Err)
    }
}

fn no_decision() -> StoreError {
    StoreError::Refused(Cause::new("the event decides about no request for approval"))
}

/// What to do with an attempt, given the person's newest request.
#[derive(Debug, PartialEq, Eq)]
enum Attempt {
    Opens,
    /// Belongs to the request there is.
    Joins,
}

impl Attempt {
    fn of(event: &SignUpEvent, newest: Option<&StandingRow>) -> Result<Self, StoreError> {
        let Some(newest) = newest else { return Ok(Self::Opens) };
        let closed_at = match newest.state()? {
            // An approved person was asked to wait only because the connector did not know.
            ApprovalState::Pending { .. } | ApprovalState::Approved { .. } => {
                return Ok(Self::Joins);
            }
            ApprovalState::Denied { at } | ApprovalState::Expired { at } => at,
        };
        // Events come late and out of order: what happened before the decision is settled by it.
        // So is what was answered in the knowledge of an open request.
        let applies_again = event.id > newest.id
            && event.time > closed_at
            && !event.decision.reasons.iter().any(|it| it.effect == Effect::AlreadyPending);
        Ok(if applies_again { Self::Opens } else { Self::Joins })
    }
}

async fn open(
    session: &mut Session,
    event: &SignUpEvent,
    expires_at: OffsetDateTime,
    now: OffsetDateTime,
) -> Result<Opened, StoreError> {
    // Another worker, or this one under an earlier name, may have noted it: there it stays.
    let noted: Option<(Uuid,)> = fetch_optional!(
        session,
        sqlx::query_as("SELECT request_id FROM approval_attempts WHERE event_id = $1")
            .bind(event.id)
    )?;
    if let Some((request,)) = noted {
        return Ok(Opened::Noted { request });
    }
    let connector = &event.sign_up.connector;
    let mut newest: Option<StandingRow> = fetch_newest(session, &event.person, connector).await?;
    if Attempt::of(event, newest.as_ref())? == Attempt::Opens {
        if insert_request(session, event, expires_at, now).await? == Done::Now {
            insert_attempt(session, event.id, event.id, now).await?;
            return Ok(Opened::Now);
        }
        // Somebody opened one in the meantime: the insert waited for them.
        newest = fetch_newest(session, &event.person, connector).await?;
    }
    let Some(StandingRow { id: request, .. }) = newest else {
        let cause = "a request for approval is in the way of another and cannot be seen";
        return Err(StoreError::Unavailable(Cause::new(cause)));
    };
    // Another worker may be noting the attempt just now.
    if insert_attempt(session, event.id, request, now).await? == Done::Now {
        execute!(
            session,
            sqlx::query("UPDATE approval_requests SET attempts = attempts + 1 WHERE id = $1")
                .bind(request)
        )?;
    }
    Ok(Opened::Noted { request })
}

async fn insert_request(
    session: &mut Session,
    event: &SignUpEvent,
    expires_at: OffsetDateTime,
    now: OffsetDateTime,
) -> Result<Done, StoreError> {
    let rows = execute!(
        session,
        sqlx::query(
            "INSERT INTO approval_requests (id, person, connector, state, attempts, requested_at,
                 opened_at, expires_at, event)
             VALUES ($1, $2, $3, 'pending', 1, $4, $5, $6, $7)
             ON CONFLICT DO NOTHING"
        )
        .bind(event.id)
        .bind(event.person.as_str())
        .bind(event.sign_up.connector.as_str())
        .bind(storable_time(event.time))
        .bind(now)
        .bind(to_the_second(expires_at))
        .bind(outbox::written(event))
    )?;
    Ok(Done::from_rows(rows))
}

async fn insert_attempt(
    session: &mut Session,
    event_id: Uuid,
    request: Uuid,
    now: OffsetDateTime,
) -> Result<Done, StoreError> {
    let rows = execute!(
        session,
        sqlx::query(
            "INSERT INTO approval_attempts (event_id, request_id, noted_at) VALUES ($1, $2, $3)
             ON CONFLICT DO NOTHING"
        )
        .bind(event_id)
        .bind(request)
        .bind(now)
    )?;
    Ok(Done::from_rows(rows))
}

/// Ends a pending request, in time or because its time is over; says whether it was this that
/// ended it.
async fn close(
    session: &mut Session,
    event: &SignUpEvent,
    approval: &Approval,
    state: RequestState,
    now: OffsetDateTime,
) -> Result<bool, StoreError> {
    let rows = execute!(
        session,
        sqlx::query(
            "UPDATE approval_requests SET state = $2, decided_at = $3, decided_by = $4,
                 reason = $5, decision_event = $6
             WHERE id = $1 AND state = 'pending' AND (expires_at <= $7) = $8"
        )
        .bind(approval.request)
        .bind(state.as_str())
        .bind(storable_time(now))
        .bind(storable(&approval.approver))
        .bind(approval.reason.as_deref().map(storable))
        .bind(event.id)
        .bind(to_the_second(now))
        .bind(state == RequestState::Expired)
    )?;
    if rows == 0 {
        return Ok(false);
    }
    outbox::insert(session, event, now).await?;
    Ok(true)
}

/// The first and the last id that begins like this; hyphens are optional.
fn ids_with(prefix: &str) -> Option<(Uuid, Uuid)> {
    let digits: String = prefix.trim().chars().filter(|it| *it != '-').collect();
    let is_hex = digits.bytes().all(|it| it.is_ascii_hexdigit());
    if digits.is_empty() || digits.len() > 32 || !is_hex {
        return None;
    }
    let filled = |with: &str| {
        let missing = with.repeat(32 - digits.len());
        Uuid::try_parse(&format!("{digits}{missing}")).ok()
    };
    Some((filled("0")?, filled("f")?))
}

async fn fetch_newest(
    session: &mut Session,
    person: &Person,
    connector: &ConnectorName,
) -> Result<Option<StandingRow>, StoreError> {
    fetch_optional!(
        session,
        sqlx::query_as(
            "SELECT id, state, requested_at, decided_at FROM approval_requests
             WHERE person = $1 AND connector = $2 ORDER BY id DESC LIMIT 1"
        )
        .bind(person.as_str())
        .bind(connector.as_str())
    )
}

async fn fetch_request(
    session: &mut Session,
    event_id: Uuid,
) -> Result<Option<ApprovalRequest>, StoreError> {
    let row: Option<RequestRow> = fetch_optional!(
        session,
        sqlx::query_as(
            "SELECT * FROM approval_requests WHERE id =
                 (SELECT request_id FROM approval_attempts WHERE event_id = $1)"
        )
        .bind(event_id)
    )?;
    row.map(ApprovalRequest::try_from).transpose()
}

/// As much of a request as says where its person stands.
#[derive(sqlx::FromRow)]
struct StandingRow {
    id: Uuid,
    state: String,
    requested_at: OffsetDateTime,
    decided_at: Option<OffsetDateTime>,
}

impl StandingRow {
    fn state(&self) -> Result<ApprovalState, StoreError> {
        let at = self.decided_at.unwrap_or(self.requested_at);
        Ok(match parse_state(&self.state)? {
            RequestState::Pending => ApprovalState::Pending { since: self.requested_at },
            RequestState::Approved => ApprovalState::Approved { at },
            RequestState::Denied => ApprovalState::Denied { at },
            RequestState::Expired => ApprovalState::Expired { at },
        })
    }
}

#[derive(sqlx::FromRow)]
struct RequestRow {
    id: Uuid,
    person: String,
    connector: String,
    state: String,
    attempts: i64,
    requested_at: OffsetDateTime,
    expires_at: OffsetDateTime,
    decided_at: Option<OffsetDateTime>,
    decided_by: Option<String>,
    reason: Option<String>,
    decision_event: Option<Uuid>,
    event: Vec<u8>,
}

impl TryFrom<RequestRow> for ApprovalRequest {
    type Error = StoreError;

    fn try_from(row: RequestRow) -> Result<Self, StoreError> {
        Ok(Self {
            id: row.id,
            person: Person::from_pseudonym(row.person),
            connector: row.connector.parse().map_err(|_| unreadable())?,
            state: parse_state(&row.state)?,
            requested_at: row.requested_at,
            expires_at: row.expires_at,
            attempts: u32::try_from(row.attempts).unwrap_or(u32::MAX),
            decided_at: row.decided_at,
            decided_by: row.decided_by,
            reason: row.reason,
            event: outbox::read(&row.event)?,
        })
    }
}

fn parse_state(name: &str) -> Result<RequestState, StoreError> {
    name.parse().map_err(|_| unreadable())
}

fn unreadable() -> StoreError {
    StoreError::Misconfigured(Cause::new(
        "a request for approval has a form this version cannot read",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_is_a_range_of_ids() {
        let id = |text: &str| Uuid::try_parse(text).unwrap();
        let whole = "019ab3c4-0000-7000-8000-000000000001";
        assert_eq!(ids_with(whole), Some((id(whole), id(whole))));
        assert_eq!(
            ids_with(" 019AB3c4-0 "),
            Some((
                id("019ab3c4-0000-0000-0000-000000000000"),
                id("019ab3c4-0fff-ffff-ffff-ffffffffffff")
            ))
        );
        for bad in ["", "-", "x", "019ab3c4%", "é", &"0".repeat(33)] {
            assert_eq!(ids_with(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_state_is_read_as_it_is_written() {
        for state in RequestState::ALL {
            assert_eq!(state.as_str().parse(), Ok(state));
        }
        assert_eq!("open".parse::<RequestState>(), Err(UnknownState));
    }
}
