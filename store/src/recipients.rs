//! Who is meant by "everybody with this role".

use time::OffsetDateTime;
use vestibule_events::{Email, Person};

use crate::{Store, StoreError, session::fetch_all};

/// Somebody who has a role.
///
/// `Debug` leaves the address out, as [`Email`] does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RoleHolder {
    pub person: Person,
    /// As of their newest event.
    pub email: Option<Email>,
}

impl Store {
    /// Everybody whom a role is granted at this time, by pseudonym; at most `limit` of them.
    pub async fn role_holders(
        &self,
        role: &str,
        now: OffsetDateTime,
        limit: u32,
    ) -> Result<Vec<RoleHolder>, StoreError> {
        let mut session = self.read().await?;
        let rows: Vec<(String, Option<OffsetDateTime>, Option<String>)> = fetch_all!(
            &mut session,
            sqlx::query_as(
                "SELECT grants.person, grants.expires_at, people.email
                 FROM grants LEFT JOIN people ON people.person = grants.person
                 WHERE grants.role = $1 AND grants.revoked_at IS NULL
                 ORDER BY grants.person"
            )
            .bind(role)
        )?;
        // Here and not in SQL: as text, not all times compare as times do.
        let holds = |expires_at: &Option<OffsetDateTime>| expires_at.is_none_or(|it| it > now);
        let holders = rows.into_iter().filter(|(_, expires_at, _)| holds(expires_at));
        let holder = |(person, _, email): (String, _, Option<String>)| RoleHolder {
            person: Person::from_pseudonym(person),
            email: email.map(Email::new),
        };
        Ok(holders.map(holder).take(usize::try_from(limit).unwrap_or(usize::MAX)).collect())
    }
}
