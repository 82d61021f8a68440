//! Events to append, each of a person and a call of its own unless said otherwise.

use std::time::Duration;

use serde_json::json;
use time::OffsetDateTime;
use uuid::Uuid;
use vestibule_events::{
    Decision, Email, Outcome, Protocol, PseudonymKey, SignUp, SignUpEvent, Step,
};

/// A call to be decided.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Call {
    pub(crate) number: u64,
    pub(crate) connector: &'static str,
    pub(crate) refused: bool,
    pub(crate) time: OffsetDateTime,
}

/// An accepted sign-up of person `number` at the connector `partners`, now.
pub(crate) fn call(number: u64) -> Call {
    Call { number, connector: "partners", refused: false, time: OffsetDateTime::now_utc() }
}

impl Call {
    pub(crate) fn refused(self) -> Self {
        Self { refused: true, ..self }
    }

    pub(crate) fn at(self, connector: &'static str) -> Self {
        Self { connector, ..self }
    }

    pub(crate) fn later(self, by: Duration) -> Self {
        Self { time: self.time + by, ..self }
    }

    /// A new event; two of the same call differ in their id.
    pub(crate) fn event(self) -> SignUpEvent {
        let sign_up = SignUp {
            connector: self.connector.parse().expect("a valid name"),
            protocol: Protocol::ApiConnector,
            step: Step::BeforeCreate,
            email: Some(Email::new(format!("person-{}@example.com", self.number))),
            identities: vec![],
            claims: json!({ "city": "Zürich \"\\\u{1f600}\n", "number": self.number })
                .as_object()
                .expect("an object")
                .clone(),
            client: None,
            locale: Some("en-US".into()),
            ip: None,
            object_id: None,
            correlation_id: None,
        };
        let outcome = if self.refused {
            Outcome::Reject { message: "Try another address.".into(), field: None }
        } else {
            Outcome::unchanged()
        };
        let key = PseudonymKey::new(vec![7; 32]);
        let person = key.person(&sign_up);
        let fingerprint = key.fingerprint(&sign_up, &person);
        let decision = Decision::new(outcome);
        SignUpEvent::decided(Uuid::now_v7(), self.time, person, fingerprint, sign_up, decision)
            .expect("the step makes an event")
    }
}
