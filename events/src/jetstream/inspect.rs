//! What a server, a stream, a consumer and a user are like, for whoever wants to know whether our
//! promises can be kept with them.
//!
//! Looks over a connection of its own, which does not wait for a server that is away and hears what
//! it was forbidden. It changes nothing: what it tries is nonsense wherever it would be allowed.
//! What is right and wrong is left to others, apart from the settings that `provision` knows.

use std::{fmt, time::Duration};

use anyhow::{Context as _, anyhow};
use async_nats::{
    Client, ConnectErrorKind, Event, HeaderMap, ServerError,
    jetstream::{ErrorCode, consumer, response::Response, stream},
};
use futures_util::StreamExt as _;
use serde::{Deserialize, de::DeserializeOwned};
use time::OffsetDateTime;
use tokio::{
    sync::mpsc,
    time::{Instant, timeout, timeout_at},
};

use super::{DENIED_LOOKS_LIKE_SILENCE, Difference, JetStreamConfig, Role, connection, provision};
use crate::{ConsumerSpec, LogError};

/// Somebody waits for the whole, so each answer gets little.
const ANSWER_LIMIT: Duration = Duration::from_secs(2);

/// A connector, stream and consumer that nobody has.
const NOBODY: &str = "vestibule-doctor";

/// One role's look at NATS.
pub struct Inspector {
    config: JetStreamConfig,
    client: Client,
    denials: mpsc::UnboundedReceiver<String>,
}

impl fmt::Debug for Inspector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Inspector({} as {})", self.config.stream, self.config.role.as_str())
    }
}

/// The server that we are connected to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerFacts {
    pub id: String,
    pub version: String,
    pub has_jetstream: bool,
    pub is_clustered: bool,
    pub max_payload: usize,
}

/// The stream: its settings against those that we need, and what is in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StreamFacts {
    /// Settings by which it loses events; nothing is published to it.
    pub losing: Vec<Difference>,
    /// Other settings that are not as configured and that only an operator changes.
    pub otherwise: Vec<Difference>,
    /// `None` keeps events for ever.
    pub max_age: Option<Duration>,
    pub max_bytes: Option<u64>,
    pub duplicate_window: Duration,
    /// What `migrate` would make of it.
    pub duplicate_window_wanted: Duration,
    pub replicas: usize,
    /// Replicas that are not there or behind.
    pub replicas_behind: usize,
    pub has_leader: bool,
    pub messages: u64,
    pub bytes: u64,
    /// When the first and the last of its events were stored; of no meaning where it is empty.
    pub first: OffsetDateTime,
    pub last: OffsetDateTime,
    /// What the server's clock said.
    pub server_time: Option<OffsetDateTime>,
}

/// A worker's durable consumer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConsumerFacts {
    pub otherwise: Vec<Difference>,
    pub waiting: u64,
    pub in_flight: u64,
    pub in_flight_max: u64,
    /// Workers that ask for events right now.
    pub pulls: u64,
    pub is_paused: bool,
    /// When the oldest event was stored that is not acknowledged, where there is one.
    pub oldest: Option<OffsetDateTime>,
}

/// What a user may do and must not, or must and may not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Misfit {
    pub subject: String,
    pub is_subscription: bool,
    /// It is allowed and must not be; otherwise the reverse.
    pub is_allowed: bool,
    pub what: &'static str,
}

impl Inspector {
    /// # Errors
    ///
    /// [`LogError::Refused`] where the server does not accept the role's user,
    /// [`LogError::Unavailable`] where it is away.
    pub async fn connect(config: JetStreamConfig) -> Result<Self, LogError> {
        let (tell, denials) = mpsc::unbounded_channel();
        let addresses = connection::addresses(&config)?;
        let options = connection::options(&config)
            .await?
            // Each server of a cluster once.
            .max_reconnects(addresses.len())
            .request_timeout(Some(ANSWER_LIMIT))
            .event_callback(move |event| {
                if let Event::ServerError(ServerError::Other(error)) = event {
                    tell.send(error.to_lowercase()).ok();
                }
                std::future::ready(())
            });
        let client = options.connect(addresses).await.map_err(|error| match error.kind() {
            ConnectErrorKind::AuthorizationViolation | ConnectErrorKind::Authentication => {
                LogError::Refused(anyhow!(connection::turned_away(config.role.as_str())))
            }
            _ => LogError::Unavailable(anyhow!(error)),
        })?;
        Ok(Self { config, client, denials })
    }

    #[must_use]
    pub fn server(&self) -> ServerFacts {
        let info = self.client.server_info();
        ServerFacts {
            id: info.server_id,
            version: info.version,
            has_jetstream: info.jetstream,
            is_clustered: info.cluster.is_some(),
            max_payload: info.max_payload,
        }
    }

    /// The stream, or `None` where it does not exist.
    ///
    /// # Errors
    ///
    /// Where the server does not answer, or not us.
    pub async fn stream(&self) -> Result<Option<StreamFacts>, LogError> {
        let subject = format!("STREAM.INFO.{}", self.config.stream);
        let Some(Timed { found, ts }) = self.look_up::<stream::Info>(&subject).await? else {
            return Ok(None);
        };
        let wanted = provision::wanted_stream(&self.config);
        let losing = provision::losing(&found.config);
        let (_, mut otherwise) = provision::compare_stream(&found.config, &wanted);
        otherwise.retain(|it| !losing.contains(it));
        let replicas = found.cluster.as_ref().map_or(&[][..], |it| it.replicas.as_slice());
        Ok(Some(StreamFacts {
            losing,
            otherwise,
            max_age: Some(found.config.max_age).filter(|it| !it.is_zero()),
            max_bytes: u64::try_from(found.config.max_bytes).ok().filter(|it| *it > 0),
            duplicate_window: found.config.duplicate_window,
            duplicate_window_wanted: wanted.duplicate_window,
            replicas: found.config.num_replicas,
            replicas_behind: replicas.iter().filter(|it| it.offline || !it.current).count(),
            has_leader: found.cluster.as_ref().is_none_or(|it| it.leader.is_some()),
            messages: found.state.messages,
            bytes: found.state.bytes,
            first: found.state.first_timestamp,
            last: found.state.last_timestamp,
            server_time: ts,
        }))
    }

    /// A worker's consumer against what the worker needs, or `None` where it does not exist.
    ///
    /// # Errors
    ///
    /// Where the server does not answer, or not us.
    pub async fn consumer(&self, spec: &ConsumerSpec) -> Result<Option<ConsumerFacts>, LogError> {
        let stream = &self.config.stream;
        let subject = format!("CONSUMER.INFO.{stream}.{}", spec.name);
        let Some(Timed { found, .. }) = self.look_up::<consumer::Info>(&subject).await? else {
            return Ok(None);
        };
        let in_flight = u64::try_from(found.num_ack_pending).unwrap_or(u64::MAX);
        let oldest = if found.num_pending == 0 && in_flight == 0 {
            None
        } else {
            self.stored_at(found.ack_floor.stream_sequence + 1).await
        };
        Ok(Some(ConsumerFacts {
            otherwise: provision::differences(&found.config, spec),
            waiting: found.num_pending,
            in_flight,
            in_flight_max: u64::try_from(found.config.max_ack_pending).unwrap_or(u64::MAX),
            pulls: u64::try_from(found.num_waiting).unwrap_or(0),
            is_paused: found.paused,
            oldest,
        }))
    }

    /// Tries what the role must and must not be able to do; gives what is not as it should be.
    ///
    /// # Errors
    ///
    /// Where the server does not answer in time.
    pub async fn misfits(&mut self, consumers: &[String]) -> Result<Vec<Misfit>, LogError> {
        self.misfits_in_time(consumers).await.map_err(LogError::Unavailable)
    }

    async fn misfits_in_time(&mut self, consumers: &[String]) -> anyhow::Result<Vec<Misfit>> {
        let mut probes = probes(self.config.role, &self.config.stream, consumers);
        let mut subscriptions = vec![];
        for probe in &probes {
            if probe.is_subscription {
                subscriptions.push(self.client.subscribe(probe.subject.clone()).await?);
            } else {
                let payload = probe.payload.into();
                let headers = probe.headers();
                self.client.publish_with_headers(probe.subject.clone(), headers, payload).await?;
            }
        }
        // The server handles what comes over a connection in order, so once it has dealt with this
        // it has said what of the above is forbidden: it forbids this too, or brings it to us.
        let end = format!("{NOBODY}.{}", uuid::Uuid::now_v7().simple());
        let mut ends = self.client.subscribe(end.clone()).await?;
        self.client.publish(end.clone(), "".into()).await?;
        let deadline = Instant::now() + ANSWER_LIMIT;
        let mut ended = false;
        while !ended {
            let denial = tokio::select! {
                // What was forbidden before the end is dealt with before the end.
                biased;
                denial = timeout_at(deadline, self.denials.recv()) => denial,
                Some(_) = ends.next() => break,
            };
            let denial = denial
                .context("the server did not say in time what it forbids")?
                .context("the connection was closed")?;
            ended = is_denied(&denial, false, &end);
            for probe in &mut probes {
                probe.is_allowed &= !is_denied(&denial, probe.is_subscription, &probe.subject);
            }
        }
        let misfits = probes.into_iter().filter(|it| it.is_allowed != it.must_be_allowed);
        Ok(misfits
            .map(|it| Misfit {
                subject: it.subject,
                is_subscription: it.is_subscription,
                is_allowed: it.is_allowed,
                what: it.what,
            })
            .collect())
    }

    /// When the event at a sequence, or the first after it, was stored.
    async fn stored_at(&self, sequence: u64) -> Option<OffsetDateTime> {
        let subject = format!("$JS.API.DIRECT.GET.{}", self.config.stream);
        let asked = serde_json::json!({ "seq": sequence, "next_by_subj": "signups.>" });
        let answer = self.client.request(subject, asked.to_string().into());
        let answer = timeout(ANSWER_LIMIT, answer).await.ok()?.ok()?;
        let at = answer.headers?.get("Nats-Time-Stamp")?.as_str().to_owned();
        OffsetDateTime::parse(&at, &time::format_description::well_known::Rfc3339).ok()
    }

    async fn look_up<T: DeserializeOwned>(&self, what: &str) -> Result<Option<Timed<T>>, LogError> {
        let answer = async {
            let subject = format!("$JS.API.{what}");
            let answer = self.client.request(subject, "".into()).await;
            let answer = answer.context(DENIED_LOOKS_LIKE_SILENCE)?;
            match serde_json::from_slice(&answer.payload)? {
                Response::Ok(found) => Ok(Some(found)),
                Response::Err { error }
                    if error.error_code() == ErrorCode::STREAM_NOT_FOUND
                        || error.error_code() == ErrorCode::CONSUMER_NOT_FOUND =>
                {
                    Ok(None)
                }
                Response::Err { error } => Err(anyhow!(error)),
            }
        };
        answer
            .await
            .with_context(|| format!("could not ask for {what}"))
            .map_err(LogError::Unavailable)
    }
}

/// Whether the server's words, in small letters, forbid this.
fn is_denied(denial: &str, is_subscription: bool, subject: &str) -> bool {
    denial.contains("for subscription") == is_subscription
        && denial.contains(&format!("\"{}\"", subject.to_lowercase()))
}

/// An answer with the server's time.
#[derive(Deserialize)]
struct Timed<T> {
    #[serde(flatten)]
    found: T,
    #[serde(default, with = "time::serde::rfc3339::option")]
    ts: Option<OffsetDateTime>,
}

/// Something to try.
#[derive(Debug)]
struct Probe {
    what: &'static str,
    subject: String,
    is_subscription: bool,
    /// Nothing that the server could act on.
    payload: &'static str,
    must_be_allowed: bool,
    is_allowed: bool,
}

impl Probe {
    /// A stream that took this for an event would keep it; so it is addressed to another one.
    fn headers(&self) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(async_nats::header::NATS_EXPECTED_STREAM, NOBODY);
        headers
    }
}

/// What a role must and must not be able to do with the stream and the consumers.
fn probes(role: Role, stream: &str, consumers: &[String]) -> Vec<Probe> {
    const CUT_OFF: &str = "{";
    let is = |roles: &[Role]| roles.contains(&role);
    let mut probes = Vec::new();
    let mut publish = |what, subject: String, payload, must_be_allowed| {
        let is_subscription = false;
        probes.push(Probe {
            what,
            subject,
            is_subscription,
            payload,
            must_be_allowed,
            is_allowed: true,
        });
    };
    let api = |what: &str| format!("$JS.API.{what}");
    use Role::{Auditor, Provisioner, Relay, Worker};

    publish("publish events", format!("signups.{NOBODY}.accepted"), "", is(&[Relay]));
    if !is(&[Worker]) {
        publish("look at the stream", api(&format!("STREAM.INFO.{stream}")), "", true);
    }
    if is(&[Relay, Auditor]) {
        publish("read past events", api(&format!("DIRECT.GET.{stream}")), CUT_OFF, true);
    }
    let nobody = [NOBODY.to_owned()];
    for consumer in if consumers.is_empty() { &nobody } else { consumers } {
        if is(&[Worker, Auditor, Provisioner]) {
            let info = api(&format!("CONSUMER.INFO.{stream}.{consumer}"));
            publish("look at a consumer", info, "", true);
        }
        let next = api(&format!("CONSUMER.MSG.NEXT.{stream}.{consumer}"));
        publish("take events", next, CUT_OFF, is(&[Worker]));
        for ack in [
            format!("$JS.ACK.{stream}.{consumer}.0.0.0.0.0"),
            format!("$JS.ACK._.{NOBODY}.{stream}.{consumer}.0.0.0.0.0"),
        ] {
            publish("acknowledge events", ack, "-DOCTOR", is(&[Worker]));
        }
    }
    if is(&[Provisioner]) {
        publish("ask for the account's limits", api("INFO"), "", true);
        publish("create the stream", api(&format!("STREAM.CREATE.{stream}")), CUT_OFF, true);
    }
    let update = api(&format!("STREAM.UPDATE.{stream}"));
    publish("change the stream", update, CUT_OFF, is(&[Provisioner]));
    let create = api(&format!("CONSUMER.CREATE.{stream}.{NOBODY}"));
    publish("create and change consumers", create, CUT_OFF, is(&[Provisioner]));
    let delete = api(&format!("CONSUMER.DELETE.{stream}.{NOBODY}"));
    publish("delete consumers", delete, "", is(&[Provisioner]));

    publish("delete streams", api(&format!("STREAM.DELETE.{NOBODY}")), CUT_OFF, false);
    publish("purge streams", api(&format!("STREAM.PURGE.{NOBODY}")), CUT_OFF, false);
    publish("delete events", api(&format!("STREAM.MSG.DELETE.{stream}")), CUT_OFF, false);
    publish("copy the stream", api(&format!("STREAM.SNAPSHOT.{stream}")), CUT_OFF, false);
    publish("replace the stream", api(&format!("STREAM.RESTORE.{stream}")), CUT_OFF, false);

    let mut subscribe = |what, subject: String, must_be_allowed| {
        let (is_subscription, payload) = (true, "");
        probes.push(Probe {
            what,
            subject,
            is_subscription,
            payload,
            must_be_allowed,
            is_allowed: true,
        });
    };
    for other in [Relay, Worker, Auditor, Provisioner] {
        let what = if other == role { "hear answers" } else { "hear another role's answers" };
        subscribe(what, format!("{}.>", other.inbox_prefix()), other == role);
    }
    subscribe("hear everybody's answers", "_INBOX.>".to_owned(), false);
    subscribe("hear events on their way", "signups.>".to_owned(), false);
    probes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_one_role_must_be_able_to_do_no_other_needs() {
        let may = |role, what: &str| {
            let probes = probes(role, "SIGNUPS", &["notify".to_owned()]);
            probes.iter().any(|it| it.what == what && it.must_be_allowed)
        };
        let all = [Role::Relay, Role::Worker, Role::Auditor, Role::Provisioner];
        let who = |what| all.map(|role| may(role, what));
        assert_eq!(who("publish events"), [true, false, false, false]);
        assert_eq!(who("acknowledge events"), [false, true, false, false]);
        assert_eq!(who("read past events"), [true, false, true, false]);
        assert_eq!(who("delete consumers"), [false, false, false, true]);
        assert_eq!(who("delete streams"), [false; 4]);
        assert_eq!(who("hear answers"), [true; 4]);
    }
}
