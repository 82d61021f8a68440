//! What a target should hold, and whether it does. Pure.

use time::OffsetDateTime;
use vestibule_store::{Grant, GrantTarget, Wanted};

use super::targets::Actual;

/// A target that holds something else than it should.
#[derive(Clone, Debug)]
pub struct Difference {
    pub grant: Grant,
    pub target: String,
    pub wanted: Wanted,
    pub actual: Actual,
    /// What the store knew of it; `None` where the grant is older than the target.
    pub row: Option<GrantTarget>,
}

impl Difference {
    /// By which they are sorted.
    pub(super) fn key(&self) -> (&str, &str, &str) {
        (self.grant.person.as_str(), &self.grant.role, &self.target)
    }

    /// Whether it is being seen to already.
    #[must_use]
    pub fn is_pending(&self) -> bool {
        self.row.as_ref().is_some_and(|it| it.is_pending)
    }
}

/// What a target should hold of a grant; nothing is said where it never was to hold it.
pub(super) fn wanted(grant: &Grant, is_known_there: bool, now: OffsetDateTime) -> Option<Wanted> {
    match (grant.is_in_force(now), is_known_there) {
        (true, _) => Some(Wanted::Present),
        (false, true) => Some(Wanted::Absent),
        (false, false) => None,
    }
}

/// Whoever has no account holds nothing.
pub(super) const fn differs(wanted: Wanted, actual: Actual) -> bool {
    match (wanted, actual) {
        (_, Actual::Unknown)
        | (Wanted::Present, Actual::Present)
        | (Wanted::Absent, Actual::Absent | Actual::NoAccount) => false,
        (Wanted::Present, Actual::Absent | Actual::NoAccount)
        | (Wanted::Absent, Actual::Present) => true,
    }
}

#[cfg(test)]
mod tests {
    use time::macros::datetime;
    use uuid::Uuid;
    use vestibule_events::Person;

    use super::*;

    const NOW: OffsetDateTime = datetime!(2026-11-22 10:00 UTC);

    #[test]
    fn a_role_is_wanted_while_it_is_in_force_and_then_gone_where_it_was() {
        let mut grant = Grant {
            person: Person::from_pseudonym("p"),
            role: "buyer".into(),
            reason: "rule".into(),
            event_id: Uuid::nil(),
            granted_at: NOW,
            expires_at: None,
            revoked_at: None,
            revoked_by: None,
            revoke_reason: None,
        };
        assert_eq!(wanted(&grant, false, NOW), Some(Wanted::Present));
        grant.expires_at = Some(NOW + time::Duration::SECOND);
        assert_eq!(wanted(&grant, true, NOW), Some(Wanted::Present));
        grant.expires_at = Some(NOW);
        assert_eq!(wanted(&grant, true, NOW), Some(Wanted::Absent));
        assert_eq!(wanted(&grant, false, NOW), None, "it was never given there");
        grant = Grant { expires_at: None, revoked_at: Some(NOW), ..grant };
        assert_eq!(wanted(&grant, true, NOW), Some(Wanted::Absent));
    }

    #[test]
    fn only_what_is_known_to_be_otherwise_differs() {
        use Actual::{Absent, NoAccount, Present, Unknown};
        for (want, actual, expected) in [
            (Wanted::Present, Present, false),
            (Wanted::Present, Absent, true),
            (Wanted::Present, NoAccount, true),
            (Wanted::Present, Unknown, false),
            (Wanted::Absent, Present, true),
            (Wanted::Absent, Absent, false),
            (Wanted::Absent, NoAccount, false),
            (Wanted::Absent, Unknown, false),
        ] {
            assert_eq!(differs(want, actual), expected, "{want} {actual:?}");
        }
    }
}
