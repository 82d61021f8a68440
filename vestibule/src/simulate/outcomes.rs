//! Who was to be confirmed or given up, and who was.

use std::collections::BTreeMap;

use vestibule_events::{Kind, SignUpEvent};

use super::verify::Difference;

/// What becomes of people after their sign-up, by address.
#[derive(Clone, Debug, Default)]
pub(super) struct Outcomes {
    expected: BTreeMap<String, Expected>,
    found: BTreeMap<String, Found>,
}

#[derive(Clone, Copy, Debug)]
struct Expected {
    /// The number of the person in the run.
    sign_up: u64,
    comes_back: bool,
}

/// How many events there are of each outcome.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Found {
    confirmed: u32,
    abandoned: u32,
}

impl Outcomes {
    /// Somebody who was accepted has signed in, or will never come back.
    pub(super) fn expect(&mut self, sign_up: u64, email: &str, comes_back: bool) {
        self.expected.insert(email.to_owned(), Expected { sign_up, comes_back });
    }

    /// Takes in what is expected of other people.
    pub(super) fn add(&mut self, other: Self) {
        self.expected.extend(other.expected);
    }

    /// Takes note of an event, if it says what became of a sign-up.
    pub(super) fn find(&mut self, event: &SignUpEvent) {
        let Some(email) = &event.sign_up.email else { return };
        if event.confirmation.is_none() {
            return;
        }
        let found = self.found.entry(email.expose().to_owned()).or_default();
        match event.kind {
            Kind::Confirmed => found.confirmed += 1,
            _ => found.abandoned += 1,
        }
    }

    /// Of how many it is not known yet what became of them.
    pub(super) fn open(&self) -> usize {
        self.expected.keys().filter(|email| !self.found.contains_key(*email)).count()
    }

    /// Everybody has exactly one outcome, and the right one.
    pub(super) fn differences(&self) -> Vec<Difference> {
        let differs = |(email, expected): (&String, &Expected)| {
            let Found { confirmed, abandoned } = self.found.get(email).copied().unwrap_or_default();
            let is_right =
                (confirmed, abandoned) == if expected.comes_back { (1, 0) } else { (0, 1) };
            let Expected { sign_up, comes_back } = *expected;
            let differs = Difference::Outcome { sign_up, comes_back, confirmed, abandoned };
            (!is_right).then_some(differs)
        };
        self.expected.iter().filter_map(differs).collect()
    }
}

#[cfg(test)]
mod tests {
    use time::OffsetDateTime;
    use uuid::Uuid;
    use vestibule_events::{ConfirmationSource, Decision, Outcome, PseudonymKey, expression};

    use super::*;

    #[test]
    fn everybody_has_the_one_right_outcome() {
        let key = PseudonymKey::new(vec![7; 32]);
        let (id, now) = (Uuid::nil(), OffsetDateTime::UNIX_EPOCH);
        let sign_up = expression::sample();
        let email = sign_up.email.as_ref().unwrap().expose().to_owned();
        let person = key.person(&sign_up);
        let fingerprint = key.fingerprint(&sign_up, &person);
        let decision = Decision::new(Outcome::unchanged());
        let origin = SignUpEvent::decided(id, now, person, fingerprint, sign_up, decision).unwrap();
        let source = ConfirmationSource::Token;
        let confirmed = SignUpEvent::confirmed(id, now, &origin, "1", source, &key);
        let abandoned = SignUpEvent::given_up(id, now, &origin, &key);
        let after = |comes_back: bool, events: &[&SignUpEvent]| {
            let mut outcomes = Outcomes::default();
            outcomes.expect(1, &email, comes_back);
            events.iter().for_each(|it| outcomes.find(it));
            (outcomes.open(), outcomes.differences().len())
        };
        assert_eq!(after(true, &[&origin, &confirmed]), (0, 0));
        assert_eq!(after(false, &[&origin, &abandoned]), (0, 0));
        assert_eq!(after(true, &[&origin]), (1, 1));
        assert_eq!(after(false, &[&confirmed]), (0, 1));
        assert_eq!(after(true, &[&confirmed, &confirmed]), (0, 1), "one account");
        assert_eq!(after(true, &[&confirmed, &abandoned]), (0, 1));
    }
}
