//! The API connector of Entra B2B self-service sign-up and of B2C user flows.
//!
//! A flat JSON object of claims comes in; one of three answers goes out. The documented examples
//! contradict each other in a few names, so all spellings are read and one is kept.

use std::fmt;

use axum::http::StatusCode;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use vestibule_events::{Email, Outcome, Protocol, SignUp, Step};

use super::{
    Call, Problem, Received, Shape,
    claims::{self, step_named, take_identities, take_text, use_one_surname},
};

/// An answer as it stands on the wire.
///
/// Members that are not known are kept when an answer is read, and written back.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
pub struct Answer {
    /// Free text to the platform.
    pub version: String,
    /// The status code once more; only a validation error has it, as a number or as text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<Value>,
    pub action: Action,
    #[serde(default, rename = "userMessage", skip_serializing_if = "Option::is_none")]
    pub user_message: Option<String>,
    /// The claims of a `Continue`; in any answer that is read, whatever else it holds.
    #[serde(flatten)]
    pub others: Map<String, Value>,
}

/// What the platform is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Action {
    Continue,
    ShowBlockPage,
    ValidationError,
}

impl Answer {
    /// Says a decision in this dialect. Only `before-create` has a form to show an error on;
    /// elsewhere whoever is rejected sees a block page.
    #[must_use]
    pub fn new(version: &str, step: Step, outcome: &Outcome) -> Self {
        let answer = |action, message: Option<&str>| Self {
            version: version.to_owned(),
            status: None,
            action,
            user_message: message.map(str::to_owned),
            others: Map::new(),
        };
        match outcome {
            Outcome::Continue { claims } => {
                Self { others: claims.clone(), ..answer(Action::Continue, None) }
            }
            // The dialect has no word for the field that is meant.
            Outcome::Reject { message, field: _ } if step == Step::BeforeCreate => Self {
                status: Some(StatusCode::BAD_REQUEST.as_u16().into()),
                ..answer(Action::ValidationError, Some(message))
            },
            Outcome::Reject { message, .. }
            | Outcome::Block { message }
            | Outcome::Pending { message, .. } => answer(Action::ShowBlockPage, Some(message)),
        }
    }

    /// The HTTP status that belongs to it; the platform refuses an answer where they disagree.
    #[must_use]
    pub fn http_status(&self) -> StatusCode {
        match self.action {
            Action::Continue | Action::ShowBlockPage => StatusCode::OK,
            Action::ValidationError => StatusCode::BAD_REQUEST,
        }
    }
}

/// Leaves claims out: they are personal data.
impl fmt::Debug for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Answer({:?})", self.action)
    }
}

/// Reads a call to the URL of a step, or to the connector's own where the body says the step.
///
/// Where the two differ the URL holds: somebody chose it, whereas the documents do not even agree
/// on what the body says.
pub(super) fn read(received: &Received<'_>) -> Result<Call, Problem> {
    let mut claims = claims::object(received.body)?;
    let named = take_text(&mut claims, "step");
    let body_step = named.as_deref().map(step_named);
    let step = match (received.url_step, body_step) {
        (Some(step), _) => step,
        (None, Some(Some(step))) => step,
        (None, Some(None)) => return Err(Problem::UnknownStep),
        (None, None) => return Err(Problem::MissingStep),
    };
    use_one_surname(&mut claims);
    Ok(Call {
        contradicts_url: body_step.is_some_and(|named| named != Some(step)),
        shape: Shape::plain(step),
        tenant: None,
        extension: None,
        sign_up: SignUp {
            connector: received.connector.clone(),
            protocol: Protocol::ApiConnector,
            step,
            email: take_text(&mut claims, "email").map(Email::new),
            identities: take_identities(&mut claims),
            client: take_text(&mut claims, "client_id")
                .or_else(|| take_text(&mut claims, "clientId")),
            locale: take_text(&mut claims, "ui_locales"),
            object_id: take_text(&mut claims, "objectId"),
            correlation_id: None,
            ip: None,
            claims,
        },
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use time::OffsetDateTime;
    use uuid::Uuid;
    use vestibule_events::{Decision, PseudonymKey, SignUpEvent};

    use super::{super::claims::LEVELS_MAX, *};

    fn read(body: &Value) -> SignUp {
        let name = "partners".parse().unwrap();
        let body = body.to_string();
        let received = Received::json(&name, Some(Step::BeforeCreate), body.as_bytes());
        super::read(&received).unwrap().sign_up
    }

    #[test]
    fn a_body_is_nested_no_deeper_than_events_are_read() {
        let nested = |levels: usize| {
            let inner = format!("{}{}", "[".repeat(levels - 1), "]".repeat(levels - 1));
            let body = format!(r#"{{"c":{inner}}}"#);
            let name = "partners".parse().unwrap();
            let received = Received::json(&name, Some(Step::BeforeCreate), body.as_bytes());
            super::read(&received).map(|call| call.sign_up)
        };
        assert_eq!(nested(LEVELS_MAX + 1).err(), Some(Problem::NotJson));
        assert_eq!(nested(128).err(), Some(Problem::NotJson));

        let sign_up = nested(LEVELS_MAX).unwrap();
        let claims = sign_up.claims.clone();
        let key = PseudonymKey::new(vec![7; 32]);
        let (person, now) = (key.person(&sign_up), OffsetDateTime::now_utc());
        let decision = Decision::new(Outcome::Continue { claims });
        let fingerprint = key.fingerprint(&sign_up, &person);
        let event =
            SignUpEvent::decided(Uuid::now_v7(), now, person, fingerprint, sign_up, decision);
        let text = serde_json::to_string(&event.unwrap()).unwrap();
        assert!(serde_json::from_str::<SignUpEvent>(&text).is_ok(), "the event can be read");
    }

    #[test]
    fn the_family_name_has_one_name_wherever_it_can_be_told() {
        for (sent, kept) in [
            (json!({ "surname": "A" }), json!({ "surname": "A" })),
            (json!({ "lastName": "A" }), json!({ "surname": "A" })),
            (json!({ "surName": "A" }), json!({ "surname": "A" })),
            (json!({ "SURNAME": "A" }), json!({ "surname": "A" })),
            (
                json!({ "surname": "A", "lastName": "B" }),
                json!({ "surname": "A", "lastName": "B" }),
            ),
            (
                json!({ "surName": "A", "lastName": "B" }),
                json!({ "surName": "A", "lastName": "B" }),
            ),
            (json!({ "lastName": 5 }), json!({ "lastName": 5 })),
            (
                json!({ "surname": null, "lastName": "B" }),
                json!({ "surname": null, "lastName": "B" }),
            ),
            (json!({ "LastName": "A" }), json!({ "LastName": "A" })),
        ] {
            assert_eq!(Value::Object(read(&sent).claims), kept, "{sent}");
        }
    }

    #[test]
    fn the_application_comes_under_two_names() {
        let client = |body| read(&body).client;
        assert_eq!(client(json!({ "client_id": "a" })).as_deref(), Some("a"));
        assert_eq!(client(json!({ "clientId": "b" })).as_deref(), Some("b"));
        assert_eq!(client(json!({ "client_id": null, "clientId": "b" })).as_deref(), Some("b"));
        let both = read(&json!({ "client_id": "a", "clientId": "b" }));
        assert_eq!(both.client.as_deref(), Some("a"));
        assert_eq!(both.claims["clientId"], "b", "what contradicts is kept");
    }

    #[test]
    fn identities_are_taken_together_or_not_at_all() {
        let good = json!({
            "signInType": "federated", "issuer": "google.com", "issuerAssignedId": "1", "more": 1,
        });
        let sign_up = read(&json!({ "identities": [good] }));
        assert_eq!(sign_up.identities.len(), 1);
        assert!(sign_up.claims.is_empty());

        for bad in [json!([good, {}]), json!([good, 1]), json!({}), json!("x"), json!(null)] {
            let sign_up = read(&json!({ "identities": bad }));
            assert!(sign_up.identities.is_empty(), "{bad}");
            assert_eq!(sign_up.claims["identities"], bad);
        }
    }

    #[test]
    fn blank_text_names_nobody() {
        for blank in ["", "   ", "\t"] {
            let sign_up = read(&json!({ "email": blank, "client_id": blank }));
            assert_eq!((sign_up.email, sign_up.client), (None, None));
            assert_eq!(sign_up.claims["email"], blank, "it stays a claim");
        }
    }

    #[test]
    fn a_status_is_read_as_number_and_as_text() {
        for status in [json!(400), json!("400")] {
            let published = json!({
                "version": "1.0.0", "status": status, "action": "ValidationError",
                "userMessage": "m", "added": { "later": [1] },
            });
            let answer: Answer = serde_json::from_value(published.clone()).unwrap();
            assert_eq!(answer.status, Some(status));
            assert_eq!(serde_json::to_value(answer).unwrap(), published);
        }
    }

    #[test]
    fn what_is_no_answer_is_refused() {
        for body in [
            json!({ "version": "1.0.0", "action": "Allow" }),
            json!({ "version": "1.0.0", "action": "continue" }),
            json!({ "version": "1.0.0" }),
            json!({ "action": "Continue" }),
        ] {
            assert!(serde_json::from_value::<Answer>(body.clone()).is_err(), "{body}");
        }
    }

    #[test]
    fn debug_shows_no_personal_data() {
        let claims = json!({ "city": "London" }).as_object().unwrap().clone();
        let answer = Answer::new("1", Step::BeforeCreate, &Outcome::Continue { claims });
        assert_eq!(format!("{answer:?}"), "Answer(Continue)");
    }
}
