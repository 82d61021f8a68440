//! Runs subscribers, and follows their files while it does.
//!
//! The folder of subscribers and the configuration are looked at each second; a change counts once it
//! has been the same at two looks. A new subscriber starts; a changed one finishes what it has in hand
//! and starts anew, once it can; one whose file is gone stops, and its consumer stays with what waits
//! for it. A wrong file is refused, and its subscriber goes on as it was; so do all while the folder
//! cannot be read. One that cannot run yet (its consumer does not exist, a secret is missing) says so
//! once, and starts as soon as it can; no other waits for it.

use std::{
    collections::{BTreeMap, BTreeSet},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, anyhow, bail};
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};
use tokio::{
    sync::watch,
    task::{JoinError, JoinSet},
    time::{MissedTickBehavior, interval, sleep},
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};
use vestibule_api::FileStamp;
use vestibule_events::{EventLog, JetStream, LocalLog};
use vestibule_store::Store;
use vestibule_workers::{Worker, WorkerMetrics, WorkerSettings, consumer_spec};

use super::reload::{Look, Settling};
use crate::{
    config::{self, Config, SubscribersConfig, WorkerConfig},
    migrate, wiring,
};

const LOOK_EVERY: Duration = Duration::from_secs(1);

/// What cannot run is tried again this soon.
const RETRY_PAUSE: Duration = Duration::from_secs(5);

/// The subscribers of a process, and what each needs.
pub(super) struct Crew {
    pub(super) config: Arc<Config>,
    /// Those that this process runs; all where none is named.
    pub(super) names: Vec<String>,
    pub(super) metrics: SubscriberMetrics,
    pub(super) tools: Tools,
}

/// What it takes to run a worker.
#[derive(Clone)]
pub(super) struct Tools {
    pub(super) log: Arc<dyn EventLog>,
    /// Makes the consumers, where this process may.
    pub(super) provisioner: Option<JetStream>,
    /// The log, where it is ours alone and nobody else can forget a consumer.
    pub(super) local: Option<LocalLog>,
    pub(super) store: Store,
    pub(super) metrics: WorkerMetrics,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OutcomeLabels {
    outcome: &'static str,
}

/// How the subscribers' files stand.
#[derive(Clone, Debug, Default)]
pub(super) struct SubscriberMetrics {
    changes: Family<OutcomeLabels, Counter>,
    refused: Gauge,
    running: Gauge,
}

impl SubscriberMetrics {
    pub(super) fn register(registry: &mut Registry) -> Self {
        let it = Self::default();
        for outcome in ["taken", "refused"] {
            it.changes.get_or_create_owned(&OutcomeLabels { outcome });
        }
        registry.register(
            "vestibule_subscriber_changes",
            "Subscribers that were begun, changed or taken away, and files refused",
            it.changes.clone(),
        );
        registry.register(
            "vestibule_subscribers_refused",
            "Files of subscribers that cannot be used as they are now",
            it.refused.clone(),
        );
        registry.register(
            "vestibule_subscribers_running",
            "Subscribers that this process runs",
            it.running.clone(),
        );
        it
    }

    fn count(&self, outcome: &'static str) {
        self.changes.get_or_create_owned(&OutcomeLabels { outcome }).inc();
    }
}

/// A subscriber as it is to run.
struct Plan {
    config: Arc<Config>,
    name: String,
    /// Otherwise it takes its events from the stream itself, and needs its consumer only.
    runs_here: bool,
    /// Everything about it, to see whether it has changed.
    described: String,
}

impl Plan {
    fn worker(&self) -> anyhow::Result<&WorkerConfig> {
        let mut subscribers = self.config.subscribers.subscribers.iter();
        subscribers.find(|it| it.name() == self.name).context("it is configured no more")
    }
}

/// Somebody who runs a subscriber as it is told to, or nothing while it is told nothing.
type Post = watch::Sender<Option<Arc<Plan>>>;

/// Every file of which a subscriber may be made, as it is now.
type Stamps = Vec<(PathBuf, Option<FileStamp>)>;

impl Crew {
    pub(super) async fn run(mut self, stop: CancellationToken) -> anyhow::Result<()> {
        warn_if_others_may_write(&self.config.subscribers.folder);
        let (mut posts, mut tasks) = (BTreeMap::new(), JoinSet::new());
        let mut said = BTreeSet::new();
        self.assign(&mut posts, &mut tasks, &mut said, &stop);
        // As if nothing had been looked at: the files may have changed since they were read.
        let (mut seen, mut settling) = (Stamps::new(), Settling::default());
        let mut ticks = interval(LOOK_EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                biased;
                () = stop.cancelled() => break,
                _ = ticks.tick() => {}
            }
            self.remove_as_told(&posts).await;
            let now = self.stamps().await;
            if settling.look(&seen, &now) != Look::Changed {
                continue;
            }
            seen = now;
            let file = self.config.file.clone();
            match tokio::task::spawn_blocking(move || Config::load(&file)).await? {
                Ok(config) => {
                    let data = self.config.data.clone();
                    self.config = Arc::new(Config { data, ..config });
                    self.assign(&mut posts, &mut tasks, &mut said, &stop);
                }
                Err(error) => {
                    let error = format!("{error:#}");
                    warn!(error, "the configuration cannot be used; subscribers stay as they are");
                }
            }
        }
        while tasks.join_next().await.is_some() {}
        Ok(())
    }

    /// Forgets the consumers of subscribers that are removed, once they have been told to finish: one
    /// that is paused would begin anew as soon as it is paused no more.
    async fn remove_as_told(&self, posts: &BTreeMap<String, Post>) {
        let Some(log) = &self.tools.local else { return };
        let asked = SubscribersConfig::to_remove(&self.config.subscribers.folder);
        let runs = |name: &str| posts.get(name).is_some_and(|it| it.borrow().is_some());
        for (name, note) in asked.into_iter().filter(|(name, _)| !runs(name)) {
            // Refused while its worker has something in hand; the next look tries again.
            match log.remove_consumer(&name).await {
                Ok(_) => {
                    info!(subscriber = name, "its consumer is removed, as asked for");
                    drop(std::fs::remove_file(note));
                }
                Err(error) => {
                    let error = format!("{:#}", anyhow::Error::from(error));
                    debug!(subscriber = name, error, "its consumer is not removed yet");
                }
            }
        }
    }

    async fn stamps(&self) -> Stamps {
        let (folder, file) = (self.config.subscribers.folder.clone(), self.config.file.clone());
        let files: Vec<_> = self.config.subscribers.files().map(PathBuf::from).collect();
        // A file system may hang, and with it whoever asks.
        let look = move || {
            let mut stamps = config::stamps(&folder);
            let more = files.into_iter().chain([file]);
            stamps.extend(more.map(|it| (it.clone(), FileStamp::read(&it))));
            stamps
        };
        tokio::task::spawn_blocking(look).await.unwrap_or_default()
    }

    /// Tells every post what it is to run now.
    fn assign(
        &self,
        posts: &mut BTreeMap<String, Post>,
        tasks: &mut JoinSet<()>,
        said: &mut BTreeSet<String>,
        stop: &CancellationToken,
    ) {
        let found = &self.config.subscribers;
        for refused in &found.refused {
            let error = refused.error();
            if said.insert(error.clone()) {
                let name = &refused.name;
                self.metrics.count("refused");
                error!(subscriber = name, error, "refused; what was in force of it stays");
            }
        }
        // What is mended and broken again is said again.
        said.retain(|it| found.refused.iter().any(|refused| refused.error() == *it));
        self.metrics.refused.set(i64::try_from(found.refused.len()).unwrap_or(i64::MAX));

        let is_ours = |name: &str| self.names.is_empty() || self.names.iter().any(|it| it == name);
        let may_provision = self.tools.provisioner.is_some();
        let here = found.subscribers.iter().filter(|it| it.runs_here() || may_provision);
        let here = here.filter(|it| is_ours(it.name()));
        let plans: BTreeMap<_, _> = here.map(|it| (it.name().to_owned(), self.plan(it))).collect();
        for (name, post) in &*posts {
            let stays = plans.contains_key(name) || found.may_still_be(name);
            if !stays && post.send_replace(None).is_some() {
                self.metrics.count("taken");
                info!(
                    subscriber = name,
                    "let go, for its file is gone or says `enabled = false`; its consumer and what \
                     waits for it stay"
                );
            }
        }
        for (name, plan) in plans {
            let post = posts.entry(name.clone()).or_insert_with(|| {
                let (post, told) = watch::channel(None);
                let count = self.metrics.running.clone();
                tasks.spawn(tend(self.tools.clone(), name.clone(), told, count, stop.clone()));
                post
            });
            let before = post.borrow().as_ref().map(|it: &Arc<Plan>| it.described.clone());
            match before {
                Some(before) if before == plan.described => continue,
                Some(_) => info!(subscriber = name, "has changed: it starts anew"),
                None => info!(subscriber = name, "is taken up"),
            }
            self.metrics.count("taken");
            post.send_replace(Some(Arc::new(plan)));
        }
    }

    fn plan(&self, worker: &WorkerConfig) -> Plan {
        let files: Vec<_> = worker.files().map(|it| (it, FileStamp::read(it))).collect();
        Plan {
            config: Arc::clone(&self.config),
            name: worker.name().to_owned(),
            runs_here: worker.runs_here(),
            described: format!("{:?}", (worker, files)),
        }
    }
}

/// What runs is in these files, commands among it.
fn warn_if_others_may_write(folder: &Path) {
    let mode = std::fs::metadata(folder).map_or(0, |it| it.permissions().mode());
    if mode & 0o022 != 0 {
        warn!(
            folder = %folder.display(),
            "others than its owner may write into the folder of subscribers, and so have commands \
             run here: `chmod go-w` it"
        );
    }
}

/// Runs what it is told to until `stop`. What runs goes on until what is told next can begin.
async fn tend(
    tools: Tools,
    name: String,
    mut told: watch::Receiver<Option<Arc<Plan>>>,
    count: Gauge,
    stop: CancellationToken,
) {
    // Holds who runs, if anybody does.
    let mut running = JoinSet::new();
    let mut end = stop.child_token();
    let mut said = String::new();
    while !stop.is_cancelled() {
        let plan = told.borrow_and_update().clone();
        let Some(plan) = plan else {
            end.cancel();
            while running.join_next().await.is_some() {}
            tools.metrics.forget(&name);
            tokio::select! {
                () = stop.cancelled() => {}
                _ = told.changed() => {}
            }
            continue;
        };
        let prepared = tokio::select! {
            biased;
            () = stop.cancelled() => break,
            _ = told.changed() => continue,
            prepared = tools.prepare(&plan) => prepared,
        };
        let failed = match prepared {
            Ok(ready) => {
                end.cancel();
                // One consumer is not read by two: the next begins when this one has finished.
                while running.join_next().await.is_some() {}
                end = stop.child_token();
                running.spawn(tools.clone().run(ready, count.clone(), end.clone()));
                tokio::select! {
                    biased;
                    () = stop.cancelled() => break,
                    _ = told.changed() => {
                        said.clear();
                        continue;
                    }
                    ended = running.join_next() => why_it_ended(ended),
                }
            }
            Err(error) => error,
        };
        let error = format!("{failed:#}");
        if error != said {
            if running.is_empty() {
                warn!(subscriber = name, error, "cannot run yet; it is tried again");
            } else {
                warn!(
                    subscriber = name,
                    error,
                    "its change cannot be used yet, so it goes on as it was; it is tried again"
                );
            }
            said = error;
        }
        tokio::select! {
            biased;
            () = stop.cancelled() => {}
            _ = told.changed() => {}
            ended = running.join_next(), if !running.is_empty() => {
                let error = format!("{:#}", why_it_ended(ended));
                warn!(subscriber = name, error, "has ended, and its change cannot be used yet");
                // What keeps it from running now is to be said, even if it was said of the change.
                said.clear();
            }
            () = sleep(RETRY_PAUSE) => {}
        }
    }
    while running.join_next().await.is_some() {}
}

fn why_it_ended(ended: Option<Result<anyhow::Result<()>, JoinError>>) -> anyhow::Error {
    match ended {
        Some(Ok(Err(error))) => error,
        // What a panic says may quote an event.
        Some(Err(_panic)) => anyhow!("it panicked"),
        Some(Ok(Ok(()))) | None => anyhow!("it ended by itself"),
    }
}

/// Counts a subscriber for as long as it runs, however that ends.
struct Counted(Gauge);

impl Counted {
    fn by(gauge: Gauge) -> Self {
        gauge.inc();
        Self(gauge)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// A subscriber that can begin.
struct Ready {
    /// `None` where nothing runs here.
    effect: Option<Arc<dyn Worker>>,
    settings: WorkerSettings,
}

impl Tools {
    /// Everything that can fail without anything having changed for whoever runs.
    async fn prepare(&self, plan: &Plan) -> anyhow::Result<Ready> {
        let worker = plan.worker()?;
        let effect = if plan.runs_here {
            Some(wiring::worker(&plan.config, worker, &self.store)?)
        } else {
            None
        };
        self.consumer(&plan.config, worker).await?;
        Ok(Ready { effect, settings: worker.settings.clone() })
    }

    async fn run(self, ready: Ready, count: Gauge, stop: CancellationToken) -> anyhow::Result<()> {
        let Ready { effect, settings } = ready;
        let Some(effect) = effect else {
            stop.cancelled().await;
            return Ok(());
        };
        let _counted = Counted::by(count);
        vestibule_workers::run(effect, settings, self.log, self.store, self.metrics, stop).await
    }

    /// Sees to it that the stream has its consumer, and as it should be. The local log makes one when
    /// it is opened.
    async fn consumer(&self, config: &Config, worker: &WorkerConfig) -> anyhow::Result<()> {
        let Some(nats) = &config.nats else { return Ok(()) };
        let name = worker.name();
        let spec = consumer_spec(name, &worker.settings);
        if let Some(stream) = &self.provisioner {
            return migrate::provision_consumer(nats, stream, &spec).await.map(drop);
        }
        if self.log.backlog(name).await?.is_none() {
            bail!(
                "its consumer does not exist, and this process may not make it: run `vestibule \
                 subscriber add {name}` or `vestibule migrate`"
            );
        }
        // Nothing is taken from it here: this only looks whether it fits.
        self.log.consumer(spec).await.map(drop)?;
        Ok(())
    }
}
