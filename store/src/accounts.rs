//! Accounts made for approved sign-ups, and how far each is.
//!
//! A directory cannot take part in our transaction. So: begin, make the account, note its id, finish.
//! Who dies in between finds the row and looks in the directory before making anything.

use std::{fmt, str::FromStr};

use time::OffsetDateTime;
use uuid::Uuid;
use vestibule_events::{Person, SignUpEvent};

use crate::{
    Done, Store, StoreError,
    error::Cause,
    inbox,
    session::{Session, execute, fetch_all, fetch_one, fetch_optional},
    text::{storable, storable_time},
};

/// What is known about the account of one approved event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Account {
    pub event_id: Uuid,
    pub person: Person,
    /// How often making it was begun.
    pub tries: u32,
    /// When making it was begun for the first and for the last time.
    pub begun_at: OffsetDateTime,
    pub tried_at: OffsetDateTime,
    /// `None` until the directory's id is known.
    pub made: Option<MadeAccount>,
    pub made_at: Option<OffsetDateTime>,
    /// `None` while something is left to do.
    pub finished_at: Option<OffsetDateTime>,
}

/// An account that is in the directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MadeAccount {
    pub origin: AccountOrigin,
    /// The directory's id.
    pub object_id: String,
    /// Where an invitation made it, and its answer reached us.
    pub invitation_id: Option<String>,
}

/// How an account came to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AccountOrigin {
    /// We created it.
    Created,
    /// We invited the person.
    Invited,
    /// It was there already; nothing of it was changed.
    Found,
}

impl AccountOrigin {
    /// The name in the store and on the command line.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Invited => "invited",
            Self::Found => "found",
        }
    }
}

impl fmt::Display for AccountOrigin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for AccountOrigin {
    type Err = StoreError;

    fn from_str(name: &str) -> Result<Self, StoreError> {
        [Self::Created, Self::Invited, Self::Found]
            .into_iter()
            .find(|origin| origin.as_str() == name)
            .ok_or_else(|| {
                StoreError::Misconfigured(Cause::new("an account has an unknown origin"))
            })
    }
}

impl Store {
    /// Notes that the account of an approved event is about to be made, and says what was noted
    /// before: after an attempt that ended without a word, it may be in the directory already.
    pub async fn begin_account(
        &self,
        worker: &str,
        event: &SignUpEvent,
        now: OffsetDateTime,
    ) -> Result<Account, StoreError> {
        let mut session = self.write().await?;
        let row: AccountRow = fetch_one!(
            &mut session,
            sqlx::query_as(
                "INSERT INTO accounts (event_id, person, worker, tries, begun_at, tried_at)
                 VALUES ($1, $2, $3, 1, $4, $4)
                 ON CONFLICT (event_id) DO UPDATE SET
                     tries = accounts.tries + 1, tried_at = excluded.tried_at
                 RETURNING *"
            )
            .bind(event.id)
            .bind(event.person.as_str())
            .bind(worker)
            .bind(storable_time(now))
        )?;
        session.commit().await?;
        row.try_into()
    }

    /// Notes that an account is in the directory, while something is left to do about it.
    pub async fn account_made(
        &self,
        worker: &str,
        event: &SignUpEvent,
        made: &MadeAccount,
        now: OffsetDateTime,
    ) -> Result<(), StoreError> {
        let mut session = self.write().await?;
        note_made(&mut session, worker, event, made, now).await?;
        session.commit().await
    }

    /// Notes that nothing is left to do: the account is in the directory, and the worker has dealt
    /// with the event.
    pub async fn finish_account(
        &self,
        worker: &str,
        event: &SignUpEvent,
        made: &MadeAccount,
        now: OffsetDateTime,
    ) -> Result<Done, StoreError> {
        let mut session = self.write().await?;
        let done = inbox::enter(&mut session, worker, event.id, now).await?;
        if done == Done::Now {
            note_made(&mut session, worker, event, made, now).await?;
            execute!(
                &mut session,
                sqlx::query("UPDATE accounts SET finished_at = $2 WHERE event_id = $1")
                    .bind(event.id)
                    .bind(storable_time(now))
            )?;
        }
        session.commit().await?;
        Ok(done)
    }

    /// The account of an approved event, as far as it is.
    pub async fn account(&self, event_id: Uuid) -> Result<Option<Account>, StoreError> {
        let mut session = self.read().await?;
        let row: Option<AccountRow> = fetch_optional!(
            &mut session,
            sqlx::query_as("SELECT * FROM accounts WHERE event_id = $1").bind(event_id)
        )?;
        row.map(Account::try_from).transpose()
    }

    /// The accounts of a person, oldest first; at most a hundred.
    pub async fn accounts_of(&self, person: &Person) -> Result<Vec<Account>, StoreError> {
        let mut session = self.read().await?;
        let rows: Vec<AccountRow> = fetch_all!(
            &mut session,
            sqlx::query_as("SELECT * FROM accounts WHERE person = $1 ORDER BY event_id LIMIT 100")
                .bind(person.as_str())
        )?;
        rows.into_iter().map(Account::try_from).collect()
    }
}

/// What was noted first stays: a second id for one event would hide the first account.
async fn note_made(
    session: &mut Session,
    worker: &str,
    event: &SignUpEvent,
    made: &MadeAccount,
    now: OffsetDateTime,
) -> Result<(), StoreError> {
    execute!(
        session,
        sqlx::query(
            "INSERT INTO accounts (event_id, person, worker, tries, begun_at, tried_at,
                 origin, object_id, invitation_id, made_at)
             VALUES ($1, $2, $3, 1, $4, $4, $5, $6, $7, $4)
             ON CONFLICT (event_id) DO UPDATE SET
                 origin = excluded.origin, object_id = excluded.object_id,
                 invitation_id = excluded.invitation_id, made_at = excluded.made_at
             WHERE accounts.object_id IS NULL"
        )
        .bind(event.id)
        .bind(event.person.as_str())
        .bind(worker)
        .bind(storable_time(now))
        .bind(made.origin.as_str())
        .bind(storable(&made.object_id))
        .bind(made.invitation_id.as_deref().map(storable))
    )?;
    Ok(())
}

#[derive(sqlx::FromRow)]
struct AccountRow {
    event_id: Uuid,
    person: String,
    tries: i64,
    begun_at: OffsetDateTime,
    tried_at: OffsetDateTime,
    origin: Option<String>,
    object_id: Option<String>,
    invitation_id: Option<String>,
    made_at: Option<OffsetDateTime>,
    finished_at: Option<OffsetDateTime>,
}

impl TryFrom<AccountRow> for Account {
    type Error = StoreError;

    fn try_from(row: AccountRow) -> Result<Self, StoreError> {
        let made = match (row.origin, row.object_id) {
            (Some(origin), Some(object_id)) => Some(MadeAccount {
                origin: origin.parse()?,
                object_id,
                invitation_id: row.invitation_id,
            }),
            _ => None,
        };
        Ok(Self {
            event_id: row.event_id,
            person: Person::from_pseudonym(row.person),
            tries: u32::try_from(row.tries).unwrap_or(u32::MAX),
            begun_at: row.begun_at,
            tried_at: row.tried_at,
            made,
            made_at: row.made_at,
            finished_at: row.finished_at,
        })
    }
}
