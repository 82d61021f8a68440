//! What happened, immutable: a CloudEvents 1.0 event in structured JSON.

use std::fmt;

use schemars::{JsonSchema, Schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use time::OffsetDateTime;
use uuid::Uuid;

use crate::{Approval, Confirmation, Decision, Fingerprint, Outcome, Person, SignUp, Step};

/// The `dataschema` of the events this version writes. A breaking change takes the next number.
pub(crate) const DATA_SCHEMA: &str = "urn:vestibule:schema:signup:1";

pub(crate) const TYPE_PREFIX: &str = "dev.vestibule.signup.";

/// Something that happened in a sign-up.
///
/// Serialises as CloudEvents 1.0 structured JSON: `id` is a UUIDv7, `source` is
/// `/connectors/<name>`, `type` is `dev.vestibule.signup.<kind>`, `subject` is the person, and
/// `data` is the sign-up with its decision. `Debug` prints no personal data.
#[derive(Clone, PartialEq)]
pub struct SignUpEvent {
    pub id: Uuid,
    /// UTC, to the millisecond.
    pub time: OffsetDateTime,
    pub kind: Kind,
    pub person: Person,
    pub fingerprint: Fingerprint,
    /// W3C trace context of the call, so that traces join over the log.
    pub traceparent: Option<String>,
    pub sign_up: SignUp,
    pub decision: Decision,
    /// Who decided a request for approval, in the events that this makes.
    pub approval: Option<Approval>,
    /// Which sign-up this is the outcome of, in the events that say whether an account came to be.
    pub confirmation: Option<Confirmation>,
}

impl SignUpEvent {
    /// The event of a decision, or `None` where the step makes none (`before-token`).
    ///
    /// `id` must be a UUIDv7 of `now`, so that events sort by time of decision.
    #[must_use]
    pub fn decided(
        id: Uuid,
        now: OffsetDateTime,
        person: Person,
        fingerprint: Fingerprint,
        sign_up: SignUp,
        decision: Decision,
    ) -> Option<Self> {
        let kind = Kind::of(sign_up.step, &decision.outcome)?;
        // JSON carries milliseconds; an event must equal itself after a round trip.
        let time = now
            .replace_millisecond(now.millisecond())
            .expect("a millisecond taken from a time is valid in it");
        Some(Self {
            id,
            time,
            kind,
            person,
            fingerprint,
            traceparent: None,
            sign_up,
            decision,
            approval: None,
            confirmation: None,
        })
    }

    /// `signups.<connector>.<kind>`: what a NATS subscription filters on.
    #[must_use]
    pub fn subject(&self) -> String {
        format!("signups.{}.{}", self.sign_up.connector, self.kind)
    }
}

impl fmt::Debug for SignUpEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SignUpEvent({} {} of {})", self.id, self.kind, self.person)
    }
}

/// What happened.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// Let past the first step.
    Screened,
    /// Let past the last step: the account may now be created, and may yet never be.
    Accepted,
    /// Asked to correct the form.
    Rejected,
    /// Turned away.
    Blocked,
    /// Waits for an approver.
    Pending,
    Approved,
    Denied,
    /// The account exists.
    Confirmed,
    /// The account will not come to exist.
    Abandoned,
}

impl Kind {
    pub const ALL: [Self; 9] = [
        Self::Screened,
        Self::Accepted,
        Self::Rejected,
        Self::Blocked,
        Self::Pending,
        Self::Approved,
        Self::Denied,
        Self::Confirmed,
        Self::Abandoned,
    ];

    /// What a decision at a step becomes. At `before-token`, called at every sign-in, nothing.
    #[must_use]
    pub const fn of(step: Step, outcome: &Outcome) -> Option<Self> {
        match (step, outcome) {
            (Step::BeforeToken, _) => None,
            (Step::AfterFederation, Outcome::Continue { .. }) => Some(Self::Screened),
            (Step::BeforeCreate, Outcome::Continue { .. }) => Some(Self::Accepted),
            (Step::BeforeCreate, Outcome::Reject { .. }) => Some(Self::Rejected),
            (_, Outcome::Pending { .. }) => Some(Self::Pending),
            // Only `before-create` can show an error on the form; elsewhere it is a block page.
            (_, Outcome::Block { .. } | Outcome::Reject { .. }) => Some(Self::Blocked),
        }
    }

    /// The name in subjects, configuration and on the command line.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Screened => "screened",
            Self::Accepted => "accepted",
            Self::Rejected => "rejected",
            Self::Blocked => "blocked",
            Self::Pending => "pending",
            Self::Approved => "approved",
            Self::Denied => "denied",
            Self::Confirmed => "confirmed",
            Self::Abandoned => "abandoned",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl std::str::FromStr for Kind {
    type Err = UnknownKind;

    fn from_str(name: &str) -> Result<Self, UnknownKind> {
        Self::ALL.into_iter().find(|kind| kind.as_str() == name).ok_or(UnknownKind)
    }
}

/// A word that names no [`Kind`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "a kind is one of screened, accepted, rejected, blocked, pending, approved, denied, confirmed, abandoned"
)]
pub struct UnknownKind;

/// The envelope as it is written; borrows, because every sign-up is serialised once.
#[derive(Serialize)]
struct Written<'a> {
    specversion: &'static str,
    id: Uuid,
    source: String,
    #[serde(rename = "type")]
    kind: String,
    subject: &'a Person,
    #[serde(with = "time::serde::rfc3339")]
    time: OffsetDateTime,
    datacontenttype: &'static str,
    dataschema: &'static str,
    fingerprint: Fingerprint,
    #[serde(skip_serializing_if = "Option::is_none")]
    traceparent: Option<&'a str>,
    data: WrittenData<'a>,
}

#[derive(Serialize)]
struct WrittenData<'a> {
    #[serde(flatten)]
    sign_up: &'a SignUp,
    decision: &'a Decision,
    #[serde(skip_serializing_if = "Option::is_none")]
    approval: Option<&'a Approval>,
    #[serde(skip_serializing_if = "Option::is_none")]
    confirmation: Option<&'a Confirmation>,
}

/// The envelope as it is read; what we do not know is ignored, so that a newer version's
/// additions do no harm.
#[derive(Deserialize, JsonSchema)]
#[schemars(
    title = "SignUpEvent",
    description = "A sign-up event: CloudEvents 1.0, structured JSON"
)]
struct Read {
    /// Always `1.0`.
    specversion: String,
    /// A UUIDv7.
    id: Uuid,
    /// `/connectors/<name>`.
    #[expect(dead_code, reason = "stands in data too; here for the schema")]
    source: String,
    /// `dev.vestibule.signup.<kind>`.
    #[serde(rename = "type")]
    kind: String,
    /// The pseudonym of the person: 32 hexadecimal digits.
    subject: Person,
    #[serde(with = "time::serde::rfc3339")]
    #[schemars(with = "String", extend("format" = "date-time"))]
    time: OffsetDateTime,
    /// Always `application/json`.
    #[serde(default)]
    #[expect(dead_code, reason = "for the schema")]
    datacontenttype: Option<String>,
    /// `urn:vestibule:schema:signup:<version>`.
    #[expect(dead_code, reason = "for the schema; within one major version nothing depends on it")]
    dataschema: String,
    /// The derived idempotency key of the call: 32 hexadecimal digits.
    #[schemars(with = "String")]
    fingerprint: Fingerprint,
    /// W3C trace context of the call.
    #[serde(default)]
    traceparent: Option<String>,
    data: ReadData,
}

#[derive(Deserialize, JsonSchema)]
#[schemars(title = "SignUpData")]
struct ReadData {
    #[serde(flatten)]
    sign_up: SignUp,
    decision: Decision,
    /// Who decided a request for approval, in the events that this makes.
    #[serde(default)]
    approval: Option<Approval>,
    /// Which sign-up this is the outcome of, in the events that say whether an account came to be.
    #[serde(default)]
    confirmation: Option<Confirmation>,
}

impl Serialize for SignUpEvent {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        Written {
            specversion: "1.0",
            id: self.id,
            source: format!("/connectors/{}", self.sign_up.connector),
            kind: format!("{TYPE_PREFIX}{}", self.kind),
            subject: &self.person,
            time: self.time,
            datacontenttype: "application/json",
            dataschema: DATA_SCHEMA,
            fingerprint: self.fingerprint,
            traceparent: self.traceparent.as_deref(),
            data: WrittenData {
                sign_up: &self.sign_up,
                decision: &self.decision,
                approval: self.approval.as_ref(),
                confirmation: self.confirmation.as_ref(),
            },
        }
        .serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for SignUpEvent {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        use serde::de::Error;
        let read = Read::deserialize(deserializer)?;
        if read.specversion != "1.0" {
            return Err(Error::custom("the event is not CloudEvents 1.0"));
        }
        let kind = read
            .kind
            .strip_prefix(TYPE_PREFIX)
            .and_then(|kind| kind.parse().ok())
            .ok_or_else(|| Error::custom("the event's type is not one of ours"))?;
        Ok(Self {
            id: read.id,
            time: read.time,
            kind,
            person: read.subject,
            fingerprint: read.fingerprint,
            traceparent: read.traceparent,
            sign_up: read.data.sign_up,
            decision: read.data.decision,
            approval: read.data.approval,
            confirmation: read.data.confirmation,
        })
    }
}

/// The JSON Schema of an event, generated from the types that read it.
#[must_use]
pub fn event_schema() -> Schema {
    schemars::schema_for!(Read)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};
    use time::macros::datetime;

    use super::*;
    use crate::{Claims, Effect, Email, Mode, Protocol, PseudonymKey, Reason};

    fn event() -> SignUpEvent {
        let sign_up = SignUp {
            connector: "partners".parse().unwrap(),
            protocol: Protocol::ApiConnector,
            step: Step::BeforeCreate,
            email: Some(Email::new("ada@example.com")),
            identities: vec![],
            claims: json!({ "city": "London" }).as_object().unwrap().clone(),
            client: None,
            locale: Some("en-US".into()),
            ip: None,
            object_id: None,
            correlation_id: None,
        };
        let key = PseudonymKey::new(vec![7; 32]);
        let person = key.person(&sign_up);
        let fingerprint = key.fingerprint(&sign_up, &person);
        let decision = Decision {
            outcome: Outcome::Continue { claims: Claims::new() },
            reasons: vec![Reason {
                rule: "title-case".into(),
                effect: Effect::Set,
                mode: Mode::Enforce,
                failure: None,
                took_us: 7,
            }],
            lookups: vec![],
        };
        let now = datetime!(2026-11-22 10:00:00.123456 UTC);
        SignUpEvent::decided(Uuid::from_u128(1), now, person, fingerprint, sign_up, decision)
            .unwrap()
    }

    #[test]
    fn an_event_is_a_cloudevent() {
        let event = event();
        let json = serde_json::to_value(&event).unwrap();
        assert_eq!(json["specversion"], "1.0");
        assert_eq!(json["type"], "dev.vestibule.signup.accepted");
        assert_eq!(json["source"], "/connectors/partners");
        assert_eq!(json["subject"], event.person.as_str());
        assert_eq!(json["time"], "2026-11-22T10:00:00.123Z");
        assert_eq!(json["dataschema"], DATA_SCHEMA);
        assert_eq!(json["data"]["email"], "ada@example.com");
        assert_eq!(json["data"]["decision"]["outcome"]["action"], "continue");
        assert_eq!(event.subject(), "signups.partners.accepted");
    }

    #[test]
    fn an_event_survives_the_round_trip_and_ignores_what_is_new() {
        let event = event();
        let mut json = serde_json::to_value(&event).unwrap();
        json["extension"] = Value::from("new");
        json["data"]["added"] = Value::from(1);
        assert_eq!(serde_json::from_value::<SignUpEvent>(json).unwrap(), event);
    }

    #[test]
    fn what_is_not_ours_is_refused() {
        for (key, value) in [("specversion", "0.3"), ("type", "com.example.other"), ("id", "x")] {
            let mut json = serde_json::to_value(event()).unwrap();
            json[key] = Value::from(value);
            assert!(serde_json::from_value::<SignUpEvent>(json).is_err(), "{key}");
        }
    }

    #[test]
    fn each_step_and_outcome_has_its_kind() {
        let outcomes = [
            Outcome::unchanged(),
            Outcome::Reject { message: "m".into(), field: None },
            Outcome::Block { message: "m".into() },
            Outcome::Pending { message: "m".into(), claims: Claims::new() },
        ];
        let kinds = |step| outcomes.each_ref().map(|outcome| Kind::of(step, outcome));
        assert_eq!(
            kinds(Step::AfterFederation),
            [Some(Kind::Screened), Some(Kind::Blocked), Some(Kind::Blocked), Some(Kind::Pending)]
        );
        assert_eq!(
            kinds(Step::BeforeCreate),
            [Some(Kind::Accepted), Some(Kind::Rejected), Some(Kind::Blocked), Some(Kind::Pending)]
        );
        assert_eq!(kinds(Step::BeforeToken), [None, None, None, None]);
    }

    #[test]
    fn debug_shows_no_personal_data() {
        let debug = format!("{:?} {:?}", event(), event().sign_up);
        assert!(!debug.contains("ada") && !debug.contains("London"), "{debug}");
    }

    /// Subscribers rely on the checked-in schema; `UPDATE_SCHEMAS=1` writes it anew.
    #[test]
    fn the_checked_in_schema_is_the_one_of_the_types() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/schemas/signup-event.v1.json");
        let generated = serde_json::to_string_pretty(&event_schema()).unwrap() + "\n";
        if std::env::var_os("UPDATE_SCHEMAS").is_some() {
            std::fs::write(path, &generated).unwrap();
        }
        assert_eq!(std::fs::read_to_string(path).unwrap(), generated);
    }
}
