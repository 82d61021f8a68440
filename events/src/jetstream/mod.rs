//! The log over NATS JetStream: publish, durable pull consumers, replay.
//!
//! Promises: an append that returns is on the stream's disk; a call repeated within its duplicate
//! window is stored once, whichever process publishes it; a consumer restores itself for ever. What
//! the server keeps of acknowledgements is weaker: on a single server a crash may deliver again what
//! was acknowledged, so handling twice must do no harm. Connecting never changes the server:
//! [`JetStream::provision`] does, and only it.

mod connection;
mod consumer;
mod inspect;
mod metrics;
mod provision;
mod publish;
mod replay;

use std::{
    fmt,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use anyhow::{Context as _, anyhow};
use async_nats::{
    connection::State,
    jetstream::{self, ErrorCode, response::Response, stream},
};
use async_trait::async_trait;
use futures_util::stream::BoxStream;
use prometheus_client::registry::Registry;
use secrecy::SecretString;
use serde::de::DeserializeOwned;
use tokio::sync::watch;

use crate::{
    AppendError, Appended, Backlog, Consumer, ConsumerSpec, EventLog, LogError, Replay, Stored,
    WrittenEvent,
};
pub use inspect::{ConsumerFacts, Inspector, Misfit, ServerFacts, StreamFacts};
pub use provision::{Difference, Provisioned, Provisioning};

use connection::InUse;
use metrics::Metrics;
use publish::Standing;
pub(crate) use publish::{PublishError, Publishing};

/// How to reach the stream and what it is to be.
#[derive(Clone, Debug)]
pub struct JetStreamConfig {
    /// `nats://host:port` or `tls://host:port`; several are separated by commas.
    pub url: String,
    pub credentials: NatsCredentials,
    pub role: Role,
    /// Where answers come; `None` for the prefix of the role. A user may listen to its own only.
    pub inbox_prefix: Option<String>,
    /// The stream's name, `SIGNUPS` unless several installations share an account.
    pub stream: String,
    /// How long a repeated call is the same event.
    pub duplicate_window: Duration,
    /// The same where the event is a refusal.
    pub refusal_window: Duration,
    /// How long the stream keeps events.
    pub retention: Duration,
    /// How large the stream may grow. A full stream refuses events, it deletes none.
    pub max_bytes: u64,
    pub replicas: usize,
}

/// Who we are to the server.
#[derive(Clone, Debug)]
pub enum NatsCredentials {
    None,
    UserPassword {
        user: String,
        password: SecretString,
    },
    /// The seed of an nkey.
    Nkey(SecretString),
    /// A `.creds` file: a JWT with its seed.
    File(PathBuf),
}

/// What this connection is for: its name at the server and its inbox prefix. What it may do is the
/// server's to say (`nats.conf`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    Relay,
    Worker,
    Auditor,
    Provisioner,
}

impl Role {
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Relay => "relay",
            Self::Worker => "worker",
            Self::Auditor => "auditor",
            Self::Provisioner => "provisioner",
        }
    }

    /// Nobody but this role may listen under it: the replies hold events.
    const fn inbox_prefix(self) -> &'static str {
        match self {
            Self::Relay => "_INBOX_relay",
            Self::Worker => "_INBOX_worker",
            Self::Auditor => "_INBOX_auditor",
            Self::Provisioner => "_INBOX_provisioner",
        }
    }
}

/// What a stream that loses nothing is like.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Survey {
    pub(crate) used_bytes: u64,
    /// `None` where it may grow for as long as there is disk.
    pub(crate) limit_bytes: Option<u64>,
    /// How long it recognises what is published twice.
    pub(crate) duplicate_window: Duration,
}

/// A log on a NATS JetStream stream. Cheap to clone.
#[derive(Clone)]
pub struct JetStream {
    inner: Arc<Inner>,
}

struct Inner {
    config: JetStreamConfig,
    client: async_nats::Client,
    context: jetstream::Context,
    connection: watch::Receiver<connection::History>,
    metrics: Metrics,
    /// Why events do not go into the stream although there is a connection.
    trouble: Mutex<Option<String>>,
    _in_use: Arc<InUse>,
}

impl fmt::Debug for JetStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let config = &self.inner.config;
        write!(f, "JetStream({} as {})", config.stream, config.role.as_str())
    }
}

impl JetStream {
    /// Returns at once; the connection comes about in the background and is renewed for ever.
    ///
    /// # Errors
    ///
    /// When the address or the credentials cannot be read. A server that is down is no error.
    pub async fn connect(config: JetStreamConfig) -> Result<Self, LogError> {
        let metrics = Metrics::default();
        let in_use = Arc::new(InUse);
        let (client, connection) =
            connection::open(&config, &metrics, Arc::downgrade(&in_use)).await?;
        let context = jetstream::ContextBuilder::new()
            .timeout(connection::ANSWER_TIMEOUT)
            .max_ack_inflight(connection::UNANSWERED_MAX)
            .build(client.clone());
        let trouble = Mutex::default();
        let inner =
            Inner { config, client, context, connection, metrics, trouble, _in_use: in_use };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Creates the stream and the durable consumers, or checks that they are what they should be.
    ///
    /// Only what loses nothing is changed in place: longer retention, more room, a wider window,
    /// another filter.
    ///
    /// # Errors
    ///
    /// [`LogError::Refused`] names each setting that differs, what was found and what is wanted.
    pub async fn provision(&self, consumers: &[ConsumerSpec]) -> Result<Provisioned, LogError> {
        provision::provision(self, consumers).await
    }

    #[must_use]
    pub fn is_connected(&self) -> bool {
        self.inner.client.connection_state() == State::Connected
    }

    /// Whether the stream can be used now; the reason, if not, is fit for an operator.
    ///
    /// # Errors
    ///
    /// [`LogError::Unavailable`] while there is no connection or no stream.
    pub async fn ready(&self) -> Result<(), LogError> {
        if !self.is_connected() {
            return Err(LogError::Unavailable(self.not_connected()));
        }
        if let Some(trouble) = self.trouble().clone() {
            return Err(LogError::Unavailable(anyhow!(trouble)));
        }
        // A worker may not ask about the stream; its consumer says whether there is one.
        if self.inner.config.role == Role::Worker {
            return Ok(());
        }
        self.existing_stream().await.map(drop)
    }

    /// Adds this connection's metrics to a registry.
    pub fn register(&self, registry: &mut Registry) {
        self.inner.metrics.register(registry);
    }

    /// Returns once there is a connection.
    pub async fn connected(&self) {
        let mut changed = self.inner.connection.clone();
        while !self.is_connected() {
            // Ticks can be lost under load, so we look for ourselves now and then.
            let tick = tokio::time::timeout(Duration::from_millis(200), changed.changed());
            if let Ok(Err(_closed)) = tick.await {
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
        }
    }

    /// Why there is no connection, as far as the server has said.
    fn not_connected(&self) -> anyhow::Error {
        if self.inner.connection.borrow().is_turned_away {
            anyhow!(connection::turned_away(self.inner.config.role.as_str()))
        } else {
            anyhow!("not connected to NATS")
        }
    }

    fn trouble(&self) -> MutexGuard<'_, Option<String>> {
        // A panic elsewhere leaves it whole: each change of it is one step.
        self.inner.trouble.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What readiness is to say of the stream; whoever publishes knows best.
    pub(crate) fn set_trouble(&self, trouble: Option<String>) {
        *self.trouble() = trouble;
    }

    /// Looks whether the stream keeps what it is given.
    ///
    /// # Errors
    ///
    /// [`LogError::Refused`] names each setting by which it would lose events.
    pub(crate) async fn survey(&self) -> Result<Survey, LogError> {
        let info = self.existing_stream().await?;
        let what = format!("the stream {} would lose events", self.inner.config.stream);
        provision::refuse(&what, &provision::losing(&info.config))?;
        Ok(Survey {
            used_bytes: info.state.bytes,
            limit_bytes: u64::try_from(info.config.max_bytes).ok().filter(|bytes| *bytes > 0),
            duplicate_window: info.config.duplicate_window,
        })
    }

    /// Deletes a durable consumer, and with it how far it was; says whether there was one.
    ///
    /// # Errors
    ///
    /// Only the provisioner may.
    pub async fn remove_consumer(&self, name: &str) -> Result<bool, LogError> {
        /// Says `success`, and nothing else of interest.
        #[derive(serde::Deserialize)]
        struct Removed {}
        let stream = &self.inner.config.stream;
        let removed: Option<Removed> = self
            .look_up(&format!("CONSUMER.DELETE.{stream}.{name}"))
            .await
            .with_context(|| format!("could not remove the consumer {name}"))
            .map_err(LogError::Unavailable)?;
        Ok(removed.is_some())
    }

    pub(crate) fn losses(&self) -> u64 {
        self.inner.connection.borrow().losses
    }

    /// The answer to what was asked when there had been so many losses of the connection, or `None`
    /// once it is lost again: then nothing will come, and waiting for the deadline is idle.
    pub(crate) async fn unless_lost<T>(
        &self,
        losses: u64,
        answer: impl Future<Output = T>,
    ) -> Option<T> {
        let mut connection = self.inner.connection.clone();
        tokio::select! {
            biased;
            answer = answer => Some(answer),
            Ok(_) = connection.wait_for(|history| history.losses > losses) => None,
        }
    }

    /// Sends an answered event on its way, so that events sent one after the other are stored in that order.
    pub(crate) async fn send(&self, event: WrittenEvent) -> Result<Publishing, PublishError> {
        publish::send(self, event, Standing::Answered).await
    }

    async fn stream_info(&self) -> Result<Option<stream::Info>, LogError> {
        let stream = &self.inner.config.stream;
        self.look_up(&format!("STREAM.INFO.{stream}"))
            .await
            .with_context(|| format!("could not ask about the stream {stream}"))
            .map_err(LogError::Unavailable)
    }

    async fn existing_stream(&self) -> Result<stream::Info, LogError> {
        self.stream_info().await?.ok_or_else(|| {
            LogError::Unavailable(anyhow!(
                "the stream {} does not exist: run `vestibule migrate`",
                self.inner.config.stream
            ))
        })
    }

    /// Asks the server about something, which may not exist.
    async fn look_up<T: DeserializeOwned>(&self, what: &str) -> anyhow::Result<Option<T>> {
        if !self.is_connected() {
            return Err(self.not_connected());
        }
        let subject = format!("$JS.API.{what}");
        let answer = self.inner.client.request(subject, "".into());
        let answer = self.unless_lost(self.losses(), answer).await;
        let answer = answer.context(CONNECTION_LOST)?.context(DENIED_LOOKS_LIKE_SILENCE)?;
        match serde_json::from_slice(&answer.payload)? {
            Response::Ok(found) => Ok(Some(found)),
            Response::Err { error }
                if error.error_code() == ErrorCode::STREAM_NOT_FOUND
                    || error.error_code() == ErrorCode::CONSUMER_NOT_FOUND =>
            {
                Ok(None)
            }
            Response::Err { error } => Err(error.into()),
        }
    }
}

/// The server answers a forbidden request with silence.
const DENIED_LOOKS_LIKE_SILENCE: &str = "if this lasts, the user may lack the permission for it";

const CONNECTION_LOST: &str = "lost the connection to NATS before an answer came";

#[async_trait]
impl EventLog for JetStream {
    async fn append_written(&self, event: WrittenEvent) -> Result<Appended, AppendError> {
        publish::append(self, event).await
    }

    async fn consumer(&self, spec: ConsumerSpec) -> Result<Box<dyn Consumer>, LogError> {
        Ok(Box::new(consumer::Durable::open(self.clone(), spec).await?))
    }

    async fn replay(
        &self,
        replay: Replay,
    ) -> Result<BoxStream<'static, Result<Stored, LogError>>, LogError> {
        replay::replay(self.clone(), replay).await
    }

    async fn backlog(&self, consumer: &str) -> Result<Option<Backlog>, LogError> {
        consumer::backlog(self, consumer).await
    }

    async fn first_undone(&self, consumer: &str) -> Result<Option<u64>, LogError> {
        let info = provision::consumer_info(self, consumer).await?;
        Ok(info.map(|info| info.ack_floor.stream_sequence + 1))
    }
}
