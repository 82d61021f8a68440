//! A durable pull consumer that restores itself for ever.
//!
//! One pull at a time, for a few events and a few seconds, and the server says every two seconds
//! that it is still there. Silence, a new connection or a closed subscription means a new pull; so a
//! worker has its next event promptly after a broker's restart, and what the client library counts
//! wrongly after one does not matter here.

use std::{fmt, sync::Arc, time::Duration};

use anyhow::anyhow;
use async_nats::{
    Message, Request, StatusCode, Subject, Subscriber,
    client::RequestErrorKind,
    jetstream::{self, AckKind, consumer::pull::BatchConfig},
};
use async_trait::async_trait;
use futures_util::StreamExt as _;
use tokio::{
    sync::watch,
    time::{Instant, sleep_until, timeout},
};

use super::{
    CONNECTION_LOST, DENIED_LOOKS_LIKE_SILENCE, JetStream, NatsCredentials, Role,
    connection::{ANSWER_TIMEOUT, History},
    metrics::RebuildLabels,
    provision,
};
use crate::{Acknowledge, Backlog, Consumer, ConsumerSpec, Delivery, LogError, Undecodable};

/// A pull the server has forgotten, or we have, is over after so long.
const PULL_EXPIRES: Duration = Duration::from_secs(5);

/// The server refuses a heartbeat longer than half of the expiry.
const HEARTBEAT: Duration = Duration::from_secs(2);

/// Two heartbeats missed, and the third not waited for.
const SILENCE_MAX: Duration = Duration::from_secs(5);

/// Events asked for at once. What waits in our hands is lost to other workers until `ack_wait`, so
/// it is little.
const BATCH_MAX: usize = 32;

/// The slowest pace of restoring.
const PAUSE_MAX: Duration = Duration::from_secs(5);

/// How long a new consumer waits for the first connection.
const FIRST_CONNECTION: Duration = Duration::from_secs(5);

pub(super) async fn backlog(log: &JetStream, name: &str) -> Result<Option<Backlog>, LogError> {
    let info = provision::consumer_info(log, name).await?;
    Ok(info.map(|info| Backlog {
        waiting: info.num_pending,
        in_flight: u64::try_from(info.num_ack_pending).unwrap_or(u64::MAX),
    }))
}

pub(super) struct Durable {
    log: JetStream,
    spec: ConsumerSpec,
    name: Arc<str>,
    pull: Option<Pull>,
    connection: watch::Receiver<History>,
    failures: u32,
    not_before: Instant,
}

/// Why a consumer is restored.
const CAUSES: [&str; 4] = ["silence", "closed", "nobody", "status"];

/// A subscription of our own and the pull that is out for it.
struct Pull {
    inbox: Subscriber,
    prefix: String,
    /// Which pull is out: what the server says of an earlier one no longer counts.
    number: u64,
    outstanding: usize,
    heard: Instant,
}

impl fmt::Debug for Durable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Durable({} of {:?})", self.name, self.log)
    }
}

#[async_trait]
impl Consumer for Durable {
    async fn next(&mut self) -> Result<Delivery, LogError> {
        loop {
            self.ready_to_receive().await?;
            let Some(message) = self.receive().await else { continue };
            if let Some(delivery) = self.taken(message) {
                return Ok(delivery);
            }
        }
    }
}

impl Durable {
    pub(super) async fn open(log: JetStream, spec: ConsumerSpec) -> Result<Self, LogError> {
        let name = Arc::from(spec.name.as_str());
        log.inner.metrics.consumes(&name, &CAUSES);
        if timeout(FIRST_CONNECTION, log.connected()).await.is_err() {
            return Err(LogError::Unavailable(log.not_connected()));
        }
        settle(&log, &spec).await?;
        Ok(Self {
            name,
            connection: log.inner.connection.clone(),
            log,
            spec,
            pull: None,
            failures: 0,
            not_before: Instant::now(),
        })
    }

    /// Sees to it that a pull is out. Safe to drop at any point: what is not done is done next time.
    async fn ready_to_receive(&mut self) -> Result<(), LogError> {
        let wanted = self.spec.max_in_flight.clamp(1, BATCH_MAX);
        if self.pull.as_ref().is_some_and(|pull| pull.outstanding > 0) {
            return Ok(());
        }
        sleep_until(self.not_before).await;
        self.log.connected().await;
        self.connection.mark_unchanged();
        if self.pull.is_none() {
            match subscribe(&self.log, &self.spec).await {
                Ok(pull) => self.pull = Some(pull),
                Err(error) => {
                    self.pause();
                    return Err(error);
                }
            }
        }
        let Some(pull) = &mut self.pull else { return Ok(()) };
        pull.request(&self.log, &self.name, wanted).await
    }

    /// The next thing the server says, or `None` where something happened that needs a new pull.
    async fn receive(&mut self) -> Option<Message> {
        let pull = self.pull.as_mut()?;
        let silence = pull.heard + SILENCE_MAX;
        let cause = tokio::select! {
            // What has come counts before what did not: a worker that was busy for long has heard
            // nothing meanwhile because it did not listen.
            biased;
            message = pull.inbox.next() => match message {
                Some(message) => {
                    pull.heard = Instant::now();
                    return Some(message);
                }
                None => "closed",
            },
            changed = self.connection.changed() => {
                // The server forgets pulls when it restarts; the subscription is renewed for us.
                if changed.is_ok() && self.log.is_connected() {
                    pull.outstanding = 0;
                    return None;
                }
                // Down: no answer can come, so no silence is counted either.
                self.log.connected().await;
                pull.outstanding = 0;
                return None;
            }
            () = sleep_until(silence) => "silence",
        };
        self.rebuild(cause);
        None
    }

    fn taken(&mut self, message: Message) -> Option<Delivery> {
        let pull = self.pull.as_mut()?;
        match message.status {
            None => {
                pull.outstanding = pull.outstanding.saturating_sub(1);
                self.failures = 0;
                return deliver(&self.log, message);
            }
            Some(StatusCode::IDLE_HEARTBEAT) => {}
            _ if message.subject.as_str() != pull.subject() => {}
            // Expired, or the batch was cut short: nothing is wrong.
            Some(StatusCode::TIMEOUT | StatusCode::NOT_FOUND) => pull.outstanding = 0,
            Some(status) => {
                let said = message.description.as_deref().unwrap_or_default();
                tracing::warn!(consumer = %self.name, %status, said, "could not pull; trying on");
                self.rebuild(if status == StatusCode::NO_RESPONDERS { "nobody" } else { "status" });
                self.pause();
            }
        }
        None
    }

    fn rebuild(&mut self, cause: &'static str) {
        let labels = RebuildLabels { consumer: self.name.clone(), cause };
        self.log.inner.metrics.rebuilds.get_or_create(&labels).inc();
        if let Some(pull) = self.pull.take() {
            give_back(self.log.clone(), pull);
        }
    }

    fn pause(&mut self) {
        self.failures = self.failures.saturating_add(1);
        let pause = Duration::from_millis(50) * 2_u32.saturating_pow(self.failures.min(10) - 1);
        self.not_before = Instant::now() + pause.min(PAUSE_MAX);
    }
}

impl Drop for Durable {
    fn drop(&mut self) {
        if let Some(pull) = self.pull.take() {
            give_back(self.log.clone(), pull);
        }
    }
}

/// Hands back what was delivered to us and nobody asked for, so that it need not wait for
/// `ack_wait`.
fn give_back(log: JetStream, mut pull: Pull) {
    let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
    runtime.spawn(async move {
        if pull.inbox.drain().await.is_err() {
            return;
        }
        while let Ok(Some(message)) = timeout(ANSWER_TIMEOUT, pull.inbox.next()).await {
            if message.status.is_none()
                && let Some(reply) = message.reply
            {
                // Best effort: `ack_wait` does the same, later.
                let nak = AckKind::Nak(None).into();
                log.inner.client.publish(reply, nak).await.ok();
            }
        }
    });
}

/// Makes sure that the durable consumer is there and as we need it.
async fn settle(log: &JetStream, spec: &ConsumerSpec) -> Result<(), LogError> {
    let config = &log.inner.config;
    let may_provision =
        config.role == Role::Provisioner || matches!(config.credentials, NatsCredentials::None);
    if may_provision {
        return provision::provision_consumer(log, spec).await.map(|_| ());
    }
    let Some(info) = provision::consumer_info(log, &spec.name).await? else {
        return Err(LogError::Refused(anyhow!(
            "the consumer {} does not exist on the stream {}: run `vestibule migrate`",
            spec.name,
            config.stream
        )));
    };
    let what = format!("the consumer {} (run `vestibule migrate`)", spec.name);
    provision::refuse(&what, &provision::differences(&info.config, spec))
}

async fn subscribe(log: &JetStream, spec: &ConsumerSpec) -> Result<Pull, LogError> {
    settle(log, spec).await?;
    let prefix = log.inner.client.new_inbox();
    let inbox = log
        .inner
        .client
        .subscribe(format!("{prefix}.*"))
        .await
        .map_err(|error| LogError::Unavailable(anyhow!(error)))?;
    Ok(Pull { inbox, prefix, number: 0, outstanding: 0, heard: Instant::now() })
}

impl Pull {
    fn subject(&self) -> String {
        format!("{}.{}", self.prefix, self.number)
    }

    async fn request(
        &mut self,
        log: &JetStream,
        consumer: &str,
        batch: usize,
    ) -> Result<(), LogError> {
        let config = BatchConfig {
            batch,
            expires: Some(PULL_EXPIRES),
            idle_heartbeat: HEARTBEAT,
            ..BatchConfig::default()
        };
        let payload =
            serde_json::to_vec(&config).map_err(|error| LogError::Refused(anyhow!(error)))?;
        let stream = &log.inner.config.stream;
        let asked = format!("$JS.API.CONSUMER.MSG.NEXT.{stream}.{consumer}");
        self.number += 1;
        log.inner
            .client
            .publish_with_reply(asked, self.subject(), payload.into())
            .await
            .map_err(|error| LogError::Unavailable(anyhow!(error)))?;
        self.outstanding = batch;
        self.heard = Instant::now();
        Ok(())
    }
}

fn deliver(log: &JetStream, message: Message) -> Option<Delivery> {
    let message = jetstream::Message { message, context: log.inner.context.clone() };
    let (sequence, deliveries) = match message.info() {
        Ok(info) => (info.stream_sequence, u64::try_from(info.delivered).unwrap_or(1)),
        Err(error) => {
            tracing::error!(%error, "could not read what NATS says of a delivery; it comes again");
            return None;
        }
    };
    let raw = message.payload.to_vec();
    let event = Undecodable::decode(&raw);
    let subject = message.message.reply?;
    let acknowledge = Box::new(Reply { log: log.clone(), subject });
    Some(Delivery { sequence, deliveries, event, raw, acknowledge })
}

/// Where to say what became of a delivery.
#[derive(Debug)]
struct Reply {
    log: JetStream,
    subject: Subject,
}

#[async_trait]
impl Acknowledge for Reply {
    async fn ack(&self) -> Result<(), LogError> {
        self.say("ack", AckKind::Ack).await
    }

    async fn nack(&self, delay: Duration) -> Result<(), LogError> {
        let delay = (!delay.is_zero()).then_some(delay);
        self.say("nack", AckKind::Nak(delay)).await
    }

    async fn progress(&self) -> Result<(), LogError> {
        self.say("progress", AckKind::Progress).await
    }
}

impl Reply {
    async fn say(&self, word: &'static str, kind: AckKind) -> Result<(), LogError> {
        let said = self.ask(kind).await;
        let result = if said.is_ok() { "taken" } else { "failed" };
        self.log.inner.metrics.acknowledged(word, result);
        said
    }

    /// As a request, because only an answer says that the server has taken note.
    async fn ask(&self, kind: AckKind) -> Result<(), LogError> {
        if !self.log.is_connected() {
            return Err(LogError::Unavailable(self.log.not_connected()));
        }
        let request = Request::new().payload(kind.into()).timeout(Some(ANSWER_TIMEOUT));
        let answer = self.log.inner.client.send_request(self.subject.clone(), request);
        let Some(answer) = self.log.unless_lost(self.log.losses(), answer).await else {
            return Err(LogError::Unavailable(anyhow!(CONNECTION_LOST)));
        };
        match answer {
            Ok(answer) if answer.status.is_none_or(|status| status == StatusCode::OK) => Ok(()),
            Ok(answer) => Err(LogError::Unavailable(anyhow!(
                "NATS answered an acknowledgement with status {:?}",
                answer.status
            ))),
            Err(error) if error.kind() == RequestErrorKind::NoResponders => {
                Err(LogError::Unavailable(anyhow!("the consumer of this delivery is gone")))
            }
            Err(error) => Err(LogError::Unavailable(anyhow!(error).context(format!(
                "could not learn whether NATS took an acknowledgement; {DENIED_LOOKS_LIKE_SILENCE}"
            )))),
        }
    }
}
