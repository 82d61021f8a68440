//! Creates the stream and its durable consumers, or says how what is there differs.
//!
//! What is there is never made to lose anything: a shorter retention, less room or another storage is
//! an error that names the setting, not an update.

use std::{fmt, time::Duration};

use anyhow::{Context as _, anyhow};
use async_nats::jetstream::{
    consumer::{self, AckPolicy, DeliverPolicy, FromConsumer as _, pull},
    stream::{self, DiscardPolicy, RetentionPolicy, StorageType},
};

use super::{JetStream, JetStreamConfig, publish};
use crate::{ConsumerSpec, LogError, Start};

/// The largest message of the stream: an event's body is at most 64 KiB, its decision can hold the
/// claims once more, and JSON may escape them.
const MESSAGE_BYTES_MAX: i32 = 256 * 1024;

/// Workers and subscribers, with room to add some.
const CONSUMERS_MAX: i32 = 100;

/// What provisioning did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Provisioned {
    pub stream: Provisioning,
    /// By name, in the order asked for.
    pub consumers: Vec<(String, Provisioning)>,
}

/// What became of one thing that was to be there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Provisioning {
    Created,
    Updated,
    /// It was as it should be.
    Unchanged,
}

impl fmt::Display for Provisioning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Created => "created",
            Self::Updated => "updated",
            Self::Unchanged => "unchanged",
        })
    }
}

pub(super) async fn provision(
    log: &JetStream,
    consumers: &[ConsumerSpec],
) -> Result<Provisioned, LogError> {
    let stream = provision_stream(log).await?;
    let mut provisioned = Provisioned { stream, consumers: vec![] };
    for spec in consumers {
        provisioned.consumers.push((spec.name.clone(), provision_consumer(log, spec).await?));
    }
    Ok(provisioned)
}

async fn provision_stream(log: &JetStream) -> Result<Provisioning, LogError> {
    let wanted = wanted_stream(&log.inner.config);
    let context = &log.inner.context;
    let Some(info) = log.stream_info().await? else {
        let created = context.create_stream(wanted).await;
        created
            .with_context(|| format!("could not create the stream {}", log.inner.config.stream))
            .map_err(LogError::Refused)?;
        return Ok(Provisioning::Created);
    };
    let (update, differences) = compare_stream(&info.config, &wanted);
    refuse(&format!("the stream {}", wanted.name), &differences)?;
    let Some(update) = update else { return Ok(Provisioning::Unchanged) };
    context
        .update_stream(update)
        .await
        .with_context(|| format!("could not update the stream {}", wanted.name))
        .map_err(LogError::Refused)?;
    Ok(Provisioning::Updated)
}

/// The stream that loses nothing. Whatever could delete, roll up or replace a stored event stays off.
pub(super) fn wanted_stream(config: &JetStreamConfig) -> stream::Config {
    stream::Config {
        name: config.stream.clone(),
        description: Some("Sign-up events: the archive; nothing deletes from it but age".into()),
        subjects: vec!["signups.>".into()],
        storage: StorageType::File,
        retention: RetentionPolicy::Limits,
        // A full stream refuses what is new instead of forgetting what is old.
        discard: DiscardPolicy::New,
        max_age: config.retention,
        max_bytes: i64::try_from(config.max_bytes).unwrap_or(i64::MAX),
        max_messages: -1,
        max_messages_per_subject: -1,
        max_message_size: MESSAGE_BYTES_MAX,
        max_consumers: CONSUMERS_MAX,
        num_replicas: config.replicas,
        duplicate_window: remembered(config),
        deny_delete: true,
        deny_purge: true,
        allow_direct: true,
        ..stream::Config::default()
    }
}

/// How long the server remembers message ids; it cannot be longer than it keeps events.
fn remembered(config: &JetStreamConfig) -> Duration {
    let window = config.duplicate_window.max(config.refusal_window);
    (window * publish::WINDOWS_REMEMBERED).min(config.retention)
}

/// One setting that is not as it should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    pub setting: &'static str,
    pub found: String,
    pub wanted: String,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} is {} and should be {}", self.setting, self.found, self.wanted)
    }
}

pub(super) fn refuse(what: &str, differences: &[Difference]) -> Result<(), LogError> {
    if differences.is_empty() {
        return Ok(());
    }
    let list: Vec<_> = differences.iter().map(Difference::to_string).collect();
    Err(LogError::Refused(anyhow!("{what} is not as configured: {}", list.join("; "))))
}

/// Collects settings that must be equal.
#[derive(Default)]
struct Comparison(Vec<Difference>);

impl Comparison {
    fn equal<T: PartialEq + fmt::Debug>(&mut self, setting: &'static str, found: &T, wanted: &T) {
        if found != wanted {
            self.differs(setting, found, wanted);
        }
    }

    fn differs<T: fmt::Debug>(&mut self, setting: &'static str, found: &T, wanted: &T) {
        let (found, wanted) = (format!("{found:?}"), format!("{wanted:?}"));
        self.0.push(Difference { setting, found, wanted });
    }
}

/// What to update, if anything, and what only an operator may change.
pub(super) fn compare_stream(
    found: &stream::Config,
    wanted: &stream::Config,
) -> (Option<stream::Config>, Vec<Difference>) {
    let mut must = Comparison(losing(found));
    must.equal("subjects", &found.subjects, &wanted.subjects);
    must.equal("deny_delete", &found.deny_delete, &true);
    must.equal("deny_purge", &found.deny_purge, &true);
    must.equal("sealed", &found.sealed, &false);
    must.equal("max_msgs", &unlimited(found.max_messages), &-1);

    let mut update = found.clone();
    update.allow_direct = true;
    update.num_replicas = wanted.num_replicas;
    must.no_less("max_age", &mut update.max_age, wanted.max_age, Duration::is_zero);
    must.no_less("max_bytes", &mut update.max_bytes, wanted.max_bytes, |bytes| *bytes <= 0);
    must.no_less("max_msg_size", &mut update.max_message_size, wanted.max_message_size, |bytes| {
        *bytes <= 0
    });
    must.no_less("duplicate_window", &mut update.duplicate_window, wanted.duplicate_window, |_| {
        false
    });
    ((update != *found).then_some(update), must.0)
}

/// The settings by which a stream forgets what it has acknowledged, or acknowledges nothing. While
/// there is one, no event is given to it.
pub(super) fn losing(found: &stream::Config) -> Vec<Difference> {
    let mut must = Comparison::default();
    must.equal("storage", &found.storage, &StorageType::File);
    must.equal("persist_mode", &persistence(found), &"default");
    must.equal("retention", &found.retention, &RetentionPolicy::Limits);
    must.equal("discard", &found.discard, &DiscardPolicy::New);
    // However it discards, a subject that is full forgets its oldest.
    must.equal("max_msgs_per_subject", &unlimited(found.max_messages_per_subject), &-1);
    // With each of these a header of any publisher deletes.
    must.equal("allow_rollup_hdrs", &found.allow_rollup, &false);
    must.equal("allow_msg_ttl", &found.allow_message_ttl, &false);
    must.equal("allow_msg_schedules", &found.allow_message_schedules, &false);
    must.equal("no_ack", &found.no_ack, &false);
    must.0
}

/// Zero means no limit as well.
fn unlimited(limit: i64) -> i64 {
    if limit == 0 { -1 } else { limit.max(-1) }
}

fn persistence(config: &stream::Config) -> &'static str {
    match config.persist_mode {
        Some(stream::PersistenceMode::Async) => "async",
        Some(stream::PersistenceMode::Default) | None => "default",
    }
}

impl Comparison {
    /// More is granted; less would delete or forget, so it is for an operator to do.
    fn no_less<T: Copy + PartialOrd + fmt::Debug>(
        &mut self,
        setting: &'static str,
        found: &mut T,
        wanted: T,
        is_unlimited: impl Fn(&T) -> bool,
    ) {
        if is_unlimited(found) || *found > wanted {
            self.differs(setting, found, &wanted);
        } else {
            *found = wanted;
        }
    }
}

/// Creates a durable consumer or brings it in line; says what became of it.
pub(super) async fn provision_consumer(
    log: &JetStream,
    spec: &ConsumerSpec,
) -> Result<Provisioning, LogError> {
    let stream = &log.inner.config.stream;
    let context = &log.inner.context;
    let failed = || format!("could not set up the consumer {}", spec.name);
    let Some(info) = consumer_info(log, &spec.name).await? else {
        let wanted = wanted_consumer(spec);
        let created = context.create_consumer_strict_on_stream(wanted, stream).await;
        created.with_context(failed).map_err(LogError::Refused)?;
        return Ok(Provisioning::Created);
    };
    refuse(&format!("the consumer {}", spec.name), &fixed_differences(&info.config))?;
    let found = pull::Config::try_from_consumer_config(info.config)
        .map_err(|error| LogError::Refused(anyhow!(error).context(failed())))?;
    // Where it began is history: only filter and limits are brought in line.
    let update = pull::Config {
        deliver_policy: found.deliver_policy,
        metadata: found.metadata.clone(),
        num_replicas: found.num_replicas,
        max_waiting: found.max_waiting,
        ..wanted_consumer(spec)
    };
    if same_consumer(&found, &update) {
        return Ok(Provisioning::Unchanged);
    }
    context
        .update_consumer_on_stream(update, stream)
        .await
        .with_context(failed)
        .map_err(LogError::Refused)?;
    Ok(Provisioning::Updated)
}

fn same_consumer(found: &pull::Config, wanted: &pull::Config) -> bool {
    filters(&found.filter_subject, &found.filter_subjects)
        == filters(&wanted.filter_subject, &wanted.filter_subjects)
        && found.ack_wait == wanted.ack_wait
        && found.max_ack_pending == wanted.max_ack_pending
}

/// Retries are ours, so the server redelivers for ever and without a schedule of its own.
fn wanted_consumer(spec: &ConsumerSpec) -> pull::Config {
    let mut filters = publish::subjects(&spec.filter.connectors, &spec.filter.kinds);
    let filter_subject = if filters.len() == 1 { filters.remove(0) } else { String::new() };
    pull::Config {
        durable_name: Some(spec.name.clone()),
        deliver_policy: match spec.start {
            Start::Beginning => DeliverPolicy::All,
            Start::Now => DeliverPolicy::New,
            Start::Time(start_time) => DeliverPolicy::ByStartTime { start_time },
            Start::Sequence(sequence) => {
                DeliverPolicy::ByStartSequence { start_sequence: sequence.max(1) }
            }
        },
        ack_policy: AckPolicy::Explicit,
        ack_wait: spec.ack_wait,
        max_deliver: -1,
        max_ack_pending: i64::try_from(spec.max_in_flight).unwrap_or(i64::MAX),
        filter_subject,
        filter_subjects: filters,
        ..pull::Config::default()
    }
}

/// What no update can mend, or what would lose events if it were otherwise.
fn fixed_differences(found: &consumer::Config) -> Vec<Difference> {
    let mut must = Comparison::default();
    must.equal("deliver_subject", &found.deliver_subject, &None);
    must.equal("ack_policy", &found.ack_policy, &AckPolicy::Explicit);
    must.equal("max_deliver", &found.max_deliver.max(-1), &-1);
    must.equal("backoff", &found.backoff, &vec![]);
    must.equal("inactive_threshold", &found.inactive_threshold, &Duration::ZERO);
    must.0
}

/// What a worker, who may not change it, cannot work with.
pub(super) fn differences(found: &consumer::Config, spec: &ConsumerSpec) -> Vec<Difference> {
    let wanted = wanted_consumer(spec);
    let mut must = Comparison(fixed_differences(found));
    must.equal(
        "filter",
        &filters(&found.filter_subject, &found.filter_subjects),
        &filters(&wanted.filter_subject, &wanted.filter_subjects),
    );
    // A longer wait only delays a redelivery; a shorter one delivers what is still being handled.
    must.equal("ack_wait", &found.ack_wait.min(wanted.ack_wait), &wanted.ack_wait);
    must.0
}

fn filters(one: &str, several: &[String]) -> Vec<String> {
    let mut filters = several.to_vec();
    filters.extend((!one.is_empty()).then(|| one.to_owned()));
    filters.sort_unstable();
    // No filter at all is what older tools write for everything.
    if filters.is_empty() || filters == ["signups.>"] {
        vec!["signups.*.*".into()]
    } else {
        filters
    }
}

/// What the server knows of a durable consumer; `None` also where the stream does not exist.
pub(super) async fn consumer_info(
    log: &JetStream,
    name: &str,
) -> Result<Option<consumer::Info>, LogError> {
    log.look_up(&format!("CONSUMER.INFO.{}.{name}", log.inner.config.stream))
        .await
        .with_context(|| format!("could not ask about the consumer {name}"))
        .map_err(LogError::Unavailable)
}
