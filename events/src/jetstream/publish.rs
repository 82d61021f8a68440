//! Publishing: each call is stored once, whichever process publishes it and however often.
//!
//! The message id is the fingerprint. The server remembers ids for longer than our own windows, so
//! that a relay that was late still meets its repetitions there; what the server calls a duplicate is
//! therefore compared with the event it holds. A new call that the server would swallow is published
//! again under the fingerprint and the held event's id: a chain that every writer walks alike.
//!
//! What a relay brings was answered already, by a process that knew nothing of the held event. Where
//! the answers differ (other rules, during a roll-out) both were given, so both are events.
//!
//! Left to others: a call repeated through another process while the first event lies in a local log
//! that cannot reach the stream for longer than the server remembers is stored twice.

use std::{future::IntoFuture as _, time::Duration};

use anyhow::{Context as _, anyhow};
use async_nats::{
    HeaderMap,
    jetstream::{
        ErrorCode,
        context::{PublishAckFuture, PublishError as NatsError, PublishErrorKind},
        message::{PublishMessage, StreamMessage},
        stream::DirectGetErrorKind,
    },
};

use super::{CONNECTION_LOST, DENIED_LOOKS_LIKE_SILENCE, JetStream};
use crate::{
    AppendError, Appended, Kind, SignUpEvent, Stored, Undecodable, WrittenEvent, event::TYPE_PREFIX,
};

/// The server remembers message ids for so many duplicate windows: a relay may be late by all of
/// them but one.
pub(super) const WINDOWS_REMEMBERED: u32 = 6;

/// What can become of a publish, as the metrics call it.
pub(super) const RESULTS: [&str; 6] =
    ["stored", "duplicate", "unavailable", "full", "unknown", "refused"];

/// An event on its way to the stream.
#[derive(Debug)]
pub(crate) struct Publishing {
    stream: JetStream,
    event: SignUpEvent,
    message: Message,
    answer: PublishAckFuture,
    standing: Standing,
    /// How often the connection had been lost when it was sent.
    losses: u64,
}

/// What an event's decision means to its caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Standing {
    /// Whoever called waits; a repeated call is given the held answer instead.
    Proposed,
    /// It was given: nothing may take its place.
    Answered,
}

/// Why an event was not published, and so what to do with it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PublishError {
    /// Certainly not stored; the stream takes nothing for now.
    #[error("the stream does not take events")]
    Unavailable(#[source] anyhow::Error),
    /// Certainly not stored: there is no room, until events grow old or somebody makes some.
    #[error("the stream has no room for events")]
    Full(#[source] anyhow::Error),
    /// Perhaps stored. Publishing again is safe.
    #[error("could not learn whether the stream holds the event")]
    Unknown(#[source] anyhow::Error),
    /// Certainly not stored, and never will be as it is.
    #[error("the stream does not take this event")]
    Refused(#[source] anyhow::Error),
}

impl PublishError {
    pub(crate) const fn as_str(&self) -> &'static str {
        match self {
            Self::Unavailable(_) => "unavailable",
            Self::Full(_) => "full",
            Self::Unknown(_) => "unknown",
            Self::Refused(_) => "refused",
        }
    }
}

impl From<PublishError> for AppendError {
    fn from(error: PublishError) -> Self {
        match error {
            PublishError::Unavailable(source)
            | PublishError::Full(source)
            | PublishError::Refused(source) => Self::NotStored(source),
            PublishError::Unknown(source) => Self::Unknown(source),
        }
    }
}

pub(super) async fn append(
    stream: &JetStream,
    event: WrittenEvent,
) -> Result<Appended, AppendError> {
    Ok(send(stream, event, Standing::Proposed).await?.settled().await?)
}

/// Hands the event to the connection, in order, and does not wait for the stream.
///
/// Nothing is handed to a connection that is down: the client would keep it and send it whenever it
/// is back, long after we said that it failed.
pub(super) async fn send(
    stream: &JetStream,
    event: WrittenEvent,
    standing: Standing,
) -> Result<Publishing, PublishError> {
    let WrittenEvent { event, json } = event;
    let sent = async {
        if !stream.is_connected() {
            return Err(PublishError::Unavailable(stream.not_connected()));
        }
        let message = Message::of(&event, json, &stream.inner.config.stream);
        let id = event.fingerprint.to_string();
        let losses = stream.losses();
        let answer = message.send(stream, &id).await?;
        Ok((message, answer, losses))
    };
    match sent.await {
        Ok((message, answer, losses)) => {
            Ok(Publishing { stream: stream.clone(), event, message, answer, standing, losses })
        }
        Err(error) => {
            stream.inner.metrics.published(error.as_str());
            Err(error)
        }
    }
}

impl Publishing {
    /// Returns once the stream holds the event, or the one that it repeats.
    pub(crate) async fn settled(self) -> Result<Appended, PublishError> {
        let stream = self.stream.clone();
        let settled = self.walk().await;
        stream.inner.metrics.published(match &settled {
            Ok(Appended { duplicate: false, .. }) => "stored",
            Ok(Appended { duplicate: true, .. }) => "duplicate",
            Err(error) => error.as_str(),
        });
        settled
    }

    async fn walk(self) -> Result<Appended, PublishError> {
        let Self { stream, event, message, mut answer, standing, mut losses } = self;
        let config = &stream.inner.config;
        loop {
            let lost = || PublishError::Unknown(anyhow!(CONNECTION_LOST));
            let answered = stream.unless_lost(losses, answer.into_future()).await;
            let ack = answered.ok_or_else(lost)?.map_err(classify)?;
            let sequence = ack.sequence;
            if !ack.duplicate {
                let stored = Stored { sequence, event };
                return Ok(Appended { stored, duplicate: false });
            }
            let link = match held(&stream, sequence).await? {
                Some(Ok(held))
                    if held.id == event.id
                        || standing.gives_way(&event, &held)
                            && repeats(
                                &event,
                                &held,
                                config.duplicate_window,
                                config.refusal_window,
                            ) =>
                {
                    let stored = Stored { sequence, event: held };
                    return Ok(Appended { stored, duplicate: true });
                }
                Some(Ok(held)) => held.id.to_string(),
                // Nothing to compare with. Twice is better than never.
                Some(Err(_)) | None => sequence.to_string(),
            };
            losses = stream.losses();
            answer = message.send(&stream, &format!("{}.{link}", event.fingerprint)).await?;
        }
    }
}

impl Standing {
    /// Whether a repetition loses nothing when the held event stands for it.
    fn gives_way(self, event: &SignUpEvent, held: &SignUpEvent) -> bool {
        self == Self::Proposed || event.decision.outcome == held.decision.outcome
    }
}

/// Whether two events with one fingerprint are one call: the later came within the window of the
/// earlier, which is shorter after a refusal.
fn repeats(one: &SignUpEvent, other: &SignUpEvent, usual: Duration, refusal: Duration) -> bool {
    let (earlier, later) = if one.time <= other.time { (one, other) } else { (other, one) };
    let window = if earlier.decision.outcome.is_refusal() { refusal } else { usual };
    later.time - earlier.time < window
}

/// The event at a sequence, or `None` where it is gone.
async fn held(
    stream: &JetStream,
    sequence: u64,
) -> Result<Option<Result<SignUpEvent, Undecodable>>, PublishError> {
    // A replica may answer before it holds what the leader has just acknowledged.
    for pause in [0, 20, 100, 300, 1000] {
        tokio::time::sleep(Duration::from_millis(pause)).await;
        if let Some(message) = get(stream, sequence).await.map_err(PublishError::Unknown)? {
            return Ok(Some(Undecodable::decode(&message.payload)));
        }
    }
    Ok(None)
}

async fn get(stream: &JetStream, sequence: u64) -> anyhow::Result<Option<StreamMessage>> {
    let name = &stream.inner.config.stream;
    let handle = stream.inner.context.get_stream_no_info(name).await?;
    match handle.direct_get(sequence).await {
        Ok(message) => Ok(Some(message)),
        Err(error) if error.kind() == DirectGetErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| {
            format!("could not read the event held at {sequence}; {DENIED_LOOKS_LIKE_SILENCE}")
        }),
    }
}

/// What is published: kept, because the same goes out again under another id.
#[derive(Debug)]
struct Message {
    subject: String,
    payload: Vec<u8>,
    headers: HeaderMap,
    stream: String,
}

impl Message {
    fn of(event: &SignUpEvent, payload: Vec<u8>, stream: &str) -> Self {
        Self {
            subject: event.subject(),
            payload,
            headers: headers(event),
            stream: stream.to_owned(),
        }
    }

    async fn send(&self, stream: &JetStream, id: &str) -> Result<PublishAckFuture, PublishError> {
        if !stream.is_connected() {
            return Err(PublishError::Unavailable(stream.not_connected()));
        }
        let message = PublishMessage::build()
            .headers(self.headers.clone()) // first, because it replaces all others
            .payload(self.payload.clone().into())
            .message_id(id)
            .expected_stream(&self.stream);
        let sent = stream.inner.context.send_publish(self.subject.clone(), message).await;
        sent.map_err(classify)
    }
}

/// The CloudEvents binding: the structured content type, and each attribute again as a header so
/// that a subscriber can choose without reading the body.
fn headers(event: &SignUpEvent) -> HeaderMap {
    let time =
        event.time.format(&time::format_description::well_known::Rfc3339).unwrap_or_default();
    let attributes = [
        ("ce-specversion", "1.0".to_owned()),
        ("ce-id", event.id.to_string()),
        ("ce-source", format!("/connectors/{}", event.sign_up.connector)),
        ("ce-type", format!("{TYPE_PREFIX}{}", event.kind)),
        ("ce-subject", event.person.to_string()),
        ("ce-time", time),
        ("ce-fingerprint", event.fingerprint.to_string()),
    ];
    let mut headers = HeaderMap::new();
    headers.insert("Content-Type", "application/cloudevents+json; charset=utf-8");
    for (name, value) in attributes {
        headers.insert(name, percent_encoded(&value));
    }
    if let Some(traceparent) = &event.traceparent {
        headers.insert("traceparent", percent_encoded(traceparent));
    }
    headers
}

/// As the binding wants it: all but visible ASCII is encoded, so nothing can end a header line.
fn percent_encoded(value: &str) -> String {
    let mut encoded = String::with_capacity(value.len());
    for byte in value.bytes() {
        if byte.is_ascii_graphic() && byte != b'"' && byte != b'%' {
            encoded.push(char::from(byte));
        } else {
            encoded.push_str(&format!("%{byte:02X}"));
        }
    }
    encoded
}

/// What an error says about the event. Unless it is certain that nothing was stored, it is unknown.
fn classify(error: NatsError) -> PublishError {
    let code = std::error::Error::source(&error)
        .and_then(|source| source.downcast_ref::<async_nats::jetstream::Error>())
        .map(async_nats::jetstream::Error::error_code);
    match (error.kind(), code) {
        (PublishErrorKind::StreamNotFound, _) => PublishError::Unavailable(anyhow!(
            "no stream listens: it has no leader yet, or does not exist; \
             if this lasts, run `vestibule migrate`"
        )),
        (PublishErrorKind::MaxPayloadExceeded, _)
        | (_, Some(ErrorCode::STREAM_MESSAGE_EXCEEDS_MAXIMUM)) => {
            PublishError::Refused(anyhow!(error).context("the event is too large for the server"))
        }
        (PublishErrorKind::TimedOut, _) => PublishError::Unknown(
            anyhow!(error)
                .context(format!("the stream did not answer in time; {DENIED_LOOKS_LIKE_SILENCE}")),
        ),
        // Another copy with this id is being replicated: its outcome decides ours.
        (_, Some(ErrorCode::STREAM_DUPLICATE_MESSAGE_CONFLICT)) => {
            PublishError::Unknown(anyhow!(error))
        }
        (
            _,
            Some(
                ErrorCode::STREAM_STORE_FAILED
                | ErrorCode::STORAGE_RESOURCES_EXCEEDED
                | ErrorCode::ACCOUNT_RESOURCES_EXCEEDED
                | ErrorCode::INSUFFICIENT_RESOURCES,
            ),
        ) => PublishError::Full(anyhow!(error)),
        (PublishErrorKind::MaxAckPending, _) | (_, Some(_)) => {
            PublishError::Unavailable(anyhow!(error))
        }
        (_, None) => PublishError::Unknown(anyhow!(error)),
    }
}

/// All subjects that events of some connectors and kinds can have; none overlaps another.
pub(super) fn subjects(connectors: &[crate::ConnectorName], kinds: &[Kind]) -> Vec<String> {
    let connectors: Vec<&str> = match connectors {
        [] => vec!["*"],
        some => some.iter().map(crate::ConnectorName::as_str).collect(),
    };
    let kinds: Vec<&str> = match kinds {
        [] => vec!["*"],
        some => some.iter().map(|kind| kind.as_str()).collect(),
    };
    let mut subjects: Vec<_> = connectors
        .iter()
        .flat_map(|connector| kinds.iter().map(move |kind| format!("signups.{connector}.{kind}")))
        .collect();
    subjects.sort_unstable();
    subjects.dedup();
    subjects
}

#[cfg(test)]
mod tests {
    use time::{OffsetDateTime, macros::datetime};
    use uuid::Uuid;

    use super::*;
    use crate::{Claims, Decision, Outcome, Protocol, PseudonymKey, SignUp, Step};

    const USUAL: Duration = Duration::from_secs(600);
    const REFUSAL: Duration = Duration::from_secs(30);

    fn event(outcome: Outcome, seconds: u64) -> SignUpEvent {
        let sign_up = SignUp {
            connector: "partners".parse().unwrap(),
            protocol: Protocol::ApiConnector,
            step: Step::BeforeCreate,
            email: None,
            identities: vec![],
            claims: Claims::new(),
            client: None,
            locale: None,
            ip: None,
            object_id: None,
            correlation_id: None,
        };
        let key = PseudonymKey::new(vec![7; 32]);
        let person = key.person(&sign_up);
        let fingerprint = key.fingerprint(&sign_up, &person);
        let time: OffsetDateTime = datetime!(2026-11-22 10:00 UTC) + Duration::from_secs(seconds);
        let decision = Decision::new(outcome);
        SignUpEvent::decided(Uuid::from_u128(1), time, person, fingerprint, sign_up, decision)
            .unwrap()
    }

    #[test]
    fn a_repetition_lies_within_the_window_of_the_earlier_call_whichever_came_first() {
        let refused = || Outcome::Block { message: "no".into() };
        let cases = [
            (event(Outcome::unchanged(), 0), event(Outcome::unchanged(), 599), true),
            (event(Outcome::unchanged(), 0), event(Outcome::unchanged(), 600), false),
            (event(refused(), 0), event(Outcome::unchanged(), 29), true),
            (event(refused(), 0), event(Outcome::unchanged(), 30), false),
            (event(Outcome::unchanged(), 0), event(refused(), 599), true),
        ];
        for (one, other, expected) in cases {
            assert_eq!(repeats(&one, &other, USUAL, REFUSAL), expected, "{one:?} {other:?}");
            assert_eq!(repeats(&other, &one, USUAL, REFUSAL), expected, "{other:?} {one:?}");
        }
    }

    #[test]
    fn no_value_can_end_a_header_line() {
        assert_eq!(percent_encoded("00-4bf9-01"), "00-4bf9-01");
        assert_eq!(
            percent_encoded("a b\"%\r\nNats-Rollup: all"),
            "a%20b%22%25%0D%0ANats-Rollup:%20all"
        );
        assert_eq!(percent_encoded("\u{e9}"), "%C3%A9");
    }

    #[test]
    fn subjects_cover_a_filter_once() {
        let partners = ["partners".parse().unwrap(), "partners".parse().unwrap()];
        assert_eq!(subjects(&[], &[]), ["signups.*.*"]);
        assert_eq!(subjects(&partners, &[]), ["signups.partners.*"]);
        assert_eq!(
            subjects(&partners, &[Kind::Blocked, Kind::Accepted]),
            ["signups.partners.accepted", "signups.partners.blocked"]
        );
    }

    #[test]
    fn only_what_is_certain_is_called_not_stored() {
        let classified = |kind| classify(NatsError::new(kind));
        for kind in [PublishErrorKind::StreamNotFound, PublishErrorKind::MaxAckPending] {
            assert!(matches!(classified(kind), PublishError::Unavailable(_)), "{kind:?}");
        }
        for kind in
            [PublishErrorKind::TimedOut, PublishErrorKind::BrokenPipe, PublishErrorKind::Other]
        {
            assert!(matches!(classified(kind), PublishError::Unknown(_)), "{kind:?}");
        }
        assert!(matches!(
            classified(PublishErrorKind::MaxPayloadExceeded),
            PublishError::Refused(_)
        ));
        let with_code = |code: u64| {
            let json = serde_json::json!({ "code": 503, "err_code": code, "description": "" });
            let error: async_nats::jetstream::Error = serde_json::from_value(json).unwrap();
            classify(NatsError::with_source(PublishErrorKind::Other, error))
        };
        assert!(matches!(with_code(10077), PublishError::Full(_)), "full");
        assert!(matches!(with_code(10167), PublishError::Unavailable(_)), "too many at a time");
        assert!(matches!(with_code(10054), PublishError::Refused(_)), "too large");
        assert!(matches!(with_code(10158), PublishError::Unknown(_)), "being replicated");
    }

    #[test]
    fn a_timeout_says_that_it_may_be_a_denial() {
        let error = classify(NatsError::new(PublishErrorKind::TimedOut));
        assert!(format!("{:#}", anyhow!(error)).contains("lack the permission"));
    }
}
