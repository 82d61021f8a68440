//! A typical sign-up, once for each person: as the platform's call, and as an event.

use time::OffsetDateTime;
use uuid::Uuid;
use vestibule_events::{
    Decision, Email, Outcome, Protocol, PseudonymKey, SignUp, SignUpEvent, Step,
};

pub(crate) const CONNECTOR: &str = "partners";
pub(crate) const USER: &str = "entra";
pub(crate) const PASSWORD: &str = "try-me";

/// The address of somebody, as the body has it.
pub(crate) fn email(person: u64) -> String {
    format!("ada.{}@example.com", String::from_utf8_lossy(&digits(person)))
}

/// Where the digits of the person's number stand in the body.
const PLACE: &str = "#########";

/// Fourteen members and two identities, as the platforms send them.
const BODY: &str = r##"{"email":"ada.#########@example.com","identities":[{"signInType":"federated","issuer":"google.com","issuerAssignedId":"1090000#########"},{"signInType":"emailAddress","issuer":"contoso.onmicrosoft.com","issuerAssignedId":"ada.#########@example.com"}],"displayName":"Ada #########","givenName":"Ada","surname":"Lovelace","jobTitle":"Supplier of refrigerated freight","streetAddress":"12 St James Square, Building 4, Suite 1","city":"Seattle","state":"Washington","postalCode":"98052","country":"United States","step":"PostAttributeCollection","client_id":"93fd07aa-333c-409d-955d-96008fd08dd9","ui_locales":"en-US"}"##;

/// A call, ready to send. Calls of different people differ in some digits, so that none repeats
/// another and to make the next one costs next to nothing.
#[derive(Clone, Debug)]
pub(crate) struct Call {
    bytes: Vec<u8>,
    places: Vec<usize>,
}

impl Call {
    pub(crate) fn to(path: &str) -> Self {
        let credential = data_encoding::BASE64.encode(format!("{USER}:{PASSWORD}").as_bytes());
        let text = format!(
            "POST {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Basic {credential}\r\n\
             Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{BODY}",
            BODY.len()
        );
        let places = text.match_indices(PLACE).map(|(place, _)| place).collect();
        Self { bytes: text.into_bytes(), places }
    }

    pub(crate) fn of(&mut self, person: u64) -> &[u8] {
        let digits = digits(person);
        for place in &self.places {
            self.bytes[*place..*place + PLACE.len()].copy_from_slice(&digits);
        }
        &self.bytes
    }
}

fn digits(mut number: u64) -> [u8; PLACE.len()] {
    let mut digits = [b'0'; PLACE.len()];
    for digit in digits.iter_mut().rev() {
        *digit = b'0' + u8::try_from(number % 10).expect("a digit fits");
        number /= 10;
    }
    digits
}

/// Accepted sign-ups of so many different people.
pub(crate) fn events(count: u32) -> Vec<SignUpEvent> {
    let key = key();
    (0..u64::from(count)).map(|person| event(&key, person)).collect()
}

pub(crate) fn key() -> PseudonymKey {
    PseudonymKey::new(vec![7; 32])
}

pub(crate) fn event(key: &PseudonymKey, person: u64) -> SignUpEvent {
    let number = String::from_utf8_lossy(&digits(person)).into_owned();
    let body: serde_json::Value =
        serde_json::from_str(&BODY.replace(PLACE, &number)).expect("the sample is JSON");
    let text = |name: &str| body[name].as_str().map(str::to_owned);
    let mut claims = body.as_object().expect("the sample is an object").clone();
    for not_a_claim in ["email", "identities", "step", "client_id", "ui_locales"] {
        claims.remove(not_a_claim);
    }
    let sign_up = SignUp {
        connector: CONNECTOR.parse().expect("a valid name"),
        protocol: Protocol::ApiConnector,
        step: Step::BeforeCreate,
        email: text("email").map(Email::new),
        identities: serde_json::from_value(body["identities"].clone()).expect("identities"),
        client: text("client_id"),
        locale: text("ui_locales"),
        ip: None,
        object_id: None,
        correlation_id: None,
        claims,
    };
    let person = key.person(&sign_up);
    let fingerprint = key.fingerprint(&sign_up, &person);
    let decision = Decision::new(Outcome::unchanged());
    let now = OffsetDateTime::now_utc();
    SignUpEvent::decided(Uuid::now_v7(), now, person, fingerprint, sign_up, decision)
        .expect("this step makes an event")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sample_is_of_the_size_that_the_figures_name() {
        let body: serde_json::Value = serde_json::from_str(BODY).unwrap();
        assert_eq!(body.as_object().unwrap().len(), 14);
        assert_eq!(body["identities"].as_array().unwrap().len(), 2);
        assert_eq!(BODY.len(), 614);
    }

    #[test]
    fn calls_of_different_people_differ_and_keep_their_length() {
        let mut call = Call::to("/");
        let first = call.of(1).to_owned();
        let second = call.of(999_999_999).to_owned();
        assert_eq!(first.len(), second.len());
        assert_ne!(first, second);
        assert!(!String::from_utf8(first).unwrap().contains('#'));
    }
}
