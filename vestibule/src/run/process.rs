//! A process: its parts as tasks, the signals that stop it, and the order in which it stops.
//!
//! A stop loses no call and no event, and takes 25 seconds at most, whatever hangs. The
//! workers finish first, while the connector still answers, so that nobody waits for an event in
//! progress; then the last answers leave; then goes what they may have waited for; then the log is
//! closed. What does not finish in its time is named in the log and left: the local log and the
//! stream give its events again.

use std::{
    collections::HashMap,
    future::Future,
    net::{self, SocketAddr},
    sync::{Arc, OnceLock},
    time::Duration,
};

use anyhow::{Context, bail, ensure};
use async_trait::async_trait;
use axum::Router;
use prometheus_client::registry::Registry;
use time::OffsetDateTime;
use tokio::{
    net::TcpListener,
    signal::unix::{Signal, SignalKind, signal},
    task::{self, JoinError, JoinSet},
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};
use vestibule_api::{
    AnswerAfter, Api, ApprovalDesk, Approvals, Durable, ListMetrics, LookupMetrics, ServerLimits,
    Sightings, Stop, Tls, TlsSettings, admin_router, approvals_router, devices_router,
    expire_requests, publish_outbox, router, serve, serve_tls,
};
use vestibule_events::{JetStream, LocalLog, Role, relay};
use vestibule_store::Store;
use vestibule_workers::Permissions;

use super::{
    health::Health,
    open_files,
    permissions::count_pending,
    reload::{Reload, ReloadMetrics},
    systemd::{self, Sockets},
};
use crate::{
    config::{self, Config, NatsConfig, TlsConfig, WorkerConfig},
    deciding::{Deciding, Gauges},
    readiness::Parts,
    telemetry::Telemetry,
    wiring,
};

/// Parts of a process, in the order in which they are stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// What acts on events. The connector answers while they finish.
    Workers,
    /// What takes calls.
    Connector,
    /// What works for the connector; an answer in progress may wait for the relay.
    Behind,
    /// What says how it stands, to the end.
    Admin,
}

impl Stage {
    const ALL: [Self; 4] = [Self::Workers, Self::Connector, Self::Behind, Self::Admin];

    /// How long it may take to finish what is in progress.
    const fn limit(self) -> Duration {
        Duration::from_secs(match self {
            // Longer than most attempts take that end at all.
            Self::Workers => 15,
            Self::Connector => 5,
            // What is on its way to a stream that does not answer is sent again by the next start,
            // under the same message id; meanwhile calls wait.
            Self::Behind => 3,
            Self::Admin => 1,
        })
    }
}

const CLOSE_LIMIT: Duration = Duration::from_secs(1);

/// The running parts of a process.
pub(super) struct Process {
    pub(super) registry: Registry,
    telemetry: Telemetry,
    /// Closed at the end.
    pub(super) log: Option<LocalLog>,
    sockets: Sockets,
    /// Nothing is answered before everything is there.
    began: CancellationToken,
    /// The process is about to end.
    leave: CancellationToken,
    stops: [CancellationToken; Stage::ALL.len()],
    tasks: JoinSet<anyhow::Result<()>>,
    running: HashMap<task::Id, Part>,
    /// For so long at least the connector answers on when the process is to stop.
    drain: Duration,
    tls: Option<Tls>,
    reload: Option<ReloadMetrics>,
    /// How far the relay is, for answers that wait for the stream.
    progress: relay::Progress,
}

/// What a process is worth without a part that has ended by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Without {
    /// Nothing: the process ends too, so that whoever supervises it sees that.
    Ends,
    /// A worker that cannot go on is no reason to turn people away.
    GoesOn,
}

#[derive(Debug)]
struct Part {
    stage: Stage,
    name: String,
    without: Without,
}

/// The signals that stop a process.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
    /// Caught, so that a hangup, by which connectors reload, ends no other process.
    _hangup: Signal,
}

impl Signals {
    fn begin() -> anyhow::Result<Self> {
        let terminate = signal(SignalKind::terminate())?;
        let interrupt = signal(SignalKind::interrupt())?;
        Ok(Self { terminate, interrupt, _hangup: signal(SignalKind::hangup())? })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

/// Runs what `starting` starts until a signal comes or it is worth nothing any more, then stops it
/// in order.
pub(super) async fn run(
    starting: impl Future<Output = anyhow::Result<Process>>,
) -> anyhow::Result<()> {
    // Caught from the very beginning, for a start may wait for what is away.
    let mut signals = Signals::begin()?;
    let mut process = tokio::select! {
        () = signals.next() => {
            info!("stopped before it had started");
            return Ok(());
        }
        started = starting => started?,
    };
    process.began.cancel();
    systemd::notify("READY=1");
    let lost = tokio::select! {
        () = signals.next() => None,
        part = process.lost() => Some(part),
    };
    systemd::notify("STOPPING=1");
    info!("stopping: answers and events in progress are finished first");
    tokio::select! {
        () = process.stop() => info!("stopped"),
        // Whoever sends a second signal does not want to wait.
        () = signals.next() => warn!("stopped at once"),
    }
    process.telemetry.end().await;
    match lost {
        None => Ok(()),
        Some(part) => bail!("stopped, because there is no {part} any more; see the log above"),
    }
}

impl Process {
    pub(super) fn new(sockets: Sockets) -> Self {
        let mut registry = Registry::default();
        Self {
            telemetry: Telemetry::begin(&mut registry),
            registry,
            log: None,
            sockets,
            began: CancellationToken::new(),
            leave: CancellationToken::new(),
            stops: Default::default(),
            tasks: JoinSet::new(),
            running: HashMap::new(),
            drain: Duration::ZERO,
            tls: None,
            reload: None,
            progress: relay::Progress::default(),
        }
    }

    pub(super) fn spawn(
        &mut self,
        stage: Stage,
        name: impl Into<String>,
        without: Without,
        task: impl Future<Output = anyhow::Result<()>> + Send + 'static,
    ) {
        let task = self.tasks.spawn(task);
        self.running.insert(task.id(), Part { stage, name: name.into(), without });
    }

    /// Tells parts of a stage to stop.
    pub(super) fn stop_of(&self, stage: Stage) -> CancellationToken {
        self.stops[stage as usize].clone()
    }

    pub(super) async fn stream(
        &mut self,
        config: &Config,
        nats: &NatsConfig,
        role: Role,
    ) -> anyhow::Result<JetStream> {
        let stream = wiring::stream(config, nats, role).await?;
        // In the name, not a label: a name may stand in the metrics only once, and `up` has two.
        let registry = self.registry.sub_registry_with_prefix("vestibule");
        stream.register(registry.sub_registry_with_prefix(role.as_str()));
        Ok(stream)
    }

    /// Starts the relay and gives its stream.
    pub(super) async fn relay(
        &mut self,
        config: &Config,
        nats: &NatsConfig,
        log: &LocalLog,
    ) -> anyhow::Result<JetStream> {
        let stream = self.stream(config, nats, Role::Relay).await?;
        self.progress.register(self.registry.sub_registry_with_prefix("vestibule"));
        let (log, to, progress) = (log.clone(), stream.clone(), self.progress.clone());
        let stop = self.stop_of(Stage::Behind);
        self.spawn(Stage::Behind, "relay", Without::Ends, async move {
            let options = relay::RelayOptions::default();
            relay::run(log, to, options, progress, stop).await.context("the relay ended")
        });
        Ok(stream)
    }

    /// Starts to take calls; gives the address, as the configuration may say port 0.
    ///
    /// With a store, sooner or later open, requests for approval are decided here too, accounts
    /// noted that get a token, and what the store makes of both brought to the log.
    pub(super) async fn connector(
        &mut self,
        config: &Arc<Config>,
        store: Option<Arc<OnceLock<Store>>>,
        log: &LocalLog,
    ) -> anyhow::Result<SocketAddr> {
        let key = Arc::new(wiring::pseudonym_key(config)?);
        let desk = store.clone().filter(|_| config.has_approvals());
        let desk = desk.map(|store| ApprovalDesk::new(store, Arc::clone(&key)));
        desk.iter().for_each(|it| it.register(&mut self.registry));
        let approvals = desk.clone().map(|it| Arc::new(it) as Arc<dyn Approvals>);
        let gauges = Gauges {
            lists: ListMetrics::register(&mut self.registry),
            lookups: LookupMetrics::register(&mut self.registry),
        };
        let deciding = Deciding::load(config, approvals.clone(), &gauges, None).await?;
        for missing in &deciding.missing {
            warn!(error = %missing, "a list is not there yet; rules that ask it go by on_error");
        }
        let answer_after = match config.log.answer_after {
            config::AnswerAfter::Disk => AnswerAfter::Disk,
            config::AnswerAfter::Stream => {
                AnswerAfter::Stream(Arc::new(Relayed(self.progress.clone())))
            }
        };
        let mut connectors = Vec::new();
        for connector in &config.connectors {
            let decider = deciding.deciders[&connector.name].clone();
            let (connector, verifiers) =
                wiring::connector(connector, decider, answer_after.clone())?;
            connectors.push(connector);
            for verifier in verifiers {
                let stop = self.stop_of(Stage::Behind);
                self.spawn(Stage::Behind, "keys of bearer tokens", Without::GoesOn, async move {
                    verifier.run(stop).await;
                    Ok(())
                });
            }
        }
        let confirms = store.clone().filter(|_| config.has_confirm());
        let sightings =
            confirms.map(|store| Sightings::new(store, Arc::clone(&key), &mut self.registry));
        let api = Api::new(Arc::new(log.clone()), key, connectors, &mut self.registry)?;
        if let Some((sightings, writer)) = sightings {
            api.note_accounts(sightings);
            let stop = self.stop_of(Stage::Behind);
            self.spawn(Stage::Behind, "accounts seen", Without::GoesOn, async move {
                writer.run(stop).await;
                Ok(())
            });
        }
        log.register(&mut self.registry);
        let metrics = ReloadMetrics::register(&mut self.registry);
        self.reload = Some(metrics.clone());
        let config = Arc::clone(config);
        let reload = Reload {
            config: Arc::clone(&config),
            deciding,
            approvals,
            gauges,
            metrics,
            api: api.clone(),
        };
        let stop = self.stop_of(Stage::Behind);
        self.spawn(Stage::Behind, "reload", Without::GoesOn, reload.run(stop));

        let mut routes = router(api);
        if let Some(desk) = desk {
            routes = routes.merge(approvals_router(desk.clone()));
            let stop = self.stop_of(Stage::Behind);
            self.spawn(Stage::Behind, "requests for approval", Without::GoesOn, async move {
                expire_requests(desk, stop).await;
                Ok(())
            });
        }
        if let Some(store) = store {
            let stop = self.stop_of(Stage::Behind);
            let publishing = publish_outbox(store, Arc::new(log.clone()), stop);
            self.spawn(Stage::Behind, "outbox", Without::GoesOn, async move {
                publishing.await;
                Ok(())
            });
        }
        self.listen(&config, routes).await
    }

    async fn listen(&mut self, config: &Config, routes: Router) -> anyhow::Result<SocketAddr> {
        let tls = match &config.listen.tls {
            None => None,
            Some(TlsConfig { certificate, key }) => {
                let asks = |it: &config::CredentialConfig| it.is_certificate_of_connection();
                let mut credentials = config.connectors.iter().flat_map(|it| &it.credentials);
                let (certificate, key) = (certificate.clone(), key.clone());
                let ask_for_client_certificate = credentials.any(asks);
                let settings = TlsSettings { certificate, key, ask_for_client_certificate };
                let tls = Tls::load(settings).context("listen.tls")?;
                tls.register(&mut self.registry);
                if let Err(error) = tls.valid_at(OffsetDateTime::now_utc()) {
                    warn!(%error, "platforms do not connect until there is another certificate");
                }
                self.tls = Some(tls.clone());
                let (watched, stop) = (tls.clone(), self.stop_of(Stage::Behind));
                self.spawn(Stage::Behind, "certificate", Without::GoesOn, async move {
                    watched.watch(stop).await;
                    Ok(())
                });
                Some(tls)
            }
        };
        let socket = self.sockets.connector.take();
        let (listener, address) = bind(socket, config.listen.connector, "listen.connector").await?;
        self.drain = config.listen.drain;
        let began = self.began.clone();
        let stop = Stop { leave: self.leave.clone(), end: self.stop_of(Stage::Connector) };
        let limits = ServerLimits {
            max_connections: open_files::connections(),
            drain: Stage::Workers.limit() + Stage::Connector.limit(),
            ..ServerLimits::default()
        };
        self.spawn(Stage::Connector, "connector", Without::Ends, async move {
            began.cancelled().await;
            match tls {
                Some(tls) => serve_tls(listener, tls, routes, limits, stop).await?,
                None => serve(listener, routes, limits, stop).await?,
            }
            Ok(())
        });
        Ok(address)
    }

    /// Where the worker `permissions` runs, counts what it still has to do.
    pub(super) fn count_permissions<'a>(
        &mut self,
        workers: impl IntoIterator<Item = &'a WorkerConfig>,
        store: &Arc<OnceLock<Store>>,
    ) {
        if workers.into_iter().any(|it| it.name() == Permissions::NAME) {
            let stop = self.stop_of(Stage::Behind);
            let counting = count_pending(Arc::clone(store), &mut self.registry, stop);
            self.spawn(Stage::Behind, "pending permissions", Without::GoesOn, counting);
        }
    }

    /// Starts the admin listener, last: the metrics of everything else are in the registry by now.
    pub(super) async fn admin(
        &mut self,
        parts: Parts,
        config: &Config,
    ) -> anyhow::Result<SocketAddr> {
        ensure!(
            self.sockets.connector.is_none(),
            "a socket for a connector was handed over, and this process has none"
        );
        let registry = Arc::new(std::mem::take(&mut self.registry));
        let (tls, reload) = (self.tls.clone(), self.reload.clone());
        let store = parts.store.clone();
        let health = Health { parts, leave: self.leave.clone(), tls, reload };
        let mut router = admin_router(registry, Arc::new(health));
        if let (Some(devices), Some(store)) = (&config.devices, store) {
            router = router.merge(devices_router(wiring::device_desk(config, devices, store)?));
        }
        let listen = config.listen.admin;
        let (listener, address) = bind(self.sockets.admin.take(), listen, "listen.admin").await?;
        let stop = self.stop_of(Stage::Admin);
        // Nothing is lost with a request for metrics, and the next start waits for us.
        let limits = ServerLimits {
            max_connections: ADMIN_CONNECTIONS_MAX,
            silence: Duration::ZERO,
            drain: Stage::Admin.limit(),
            ..ServerLimits::default()
        };
        self.spawn(Stage::Admin, "admin", Without::Ends, async move {
            Ok(serve(listener, router, limits, stop).await?)
        });
        Ok(address)
    }

    /// Returns when the process is worth nothing any more, with the name of what it lacks.
    async fn lost(&mut self) -> String {
        loop {
            match self.next_ended().await {
                Some((part, false)) if part.without == Without::Ends => return part.name,
                Some(_) => {}
                // Nothing runs, and nothing was lost: only a signal ends that.
                None => std::future::pending().await,
            }
        }
    }

    /// The next part to end, said where it did so with an error, and whether it ended well.
    async fn next_ended(&mut self) -> Option<(Part, bool)> {
        let ended = self.tasks.join_next_with_id().await?;
        let id = ended.as_ref().map_or_else(JoinError::id, |(id, _)| *id);
        let part = self.running.remove(&id).expect("every task was noted when it was spawned");
        let name = part.name.as_str();
        let went_well = match ended {
            Ok((_, Ok(()))) => true,
            Ok((_, Err(error))) => {
                error!(part = name, error = format!("{error:#}"), "a part has ended");
                false
            }
            Err(error) => {
                error!(part = name, %error, "a part has panicked");
                // What state it leaves behind, nobody knows.
                return Some((Part { without: Without::Ends, ..part }, false));
            }
        };
        Some((part, went_well))
    }

    async fn stop(&mut self) {
        // Load balancers have to see that and turn to others before nobody answers here.
        self.leave.cancel();
        let drain = if self.runs(Stage::Connector) { self.drain } else { Duration::ZERO };
        let began = Instant::now();
        tokio::join!(sleep(drain), self.finish(Stage::Workers, Stage::Workers.limit()));
        // An answer may have a deadline of many seconds; what the workers did not need is for it.
        let unused = Stage::Workers.limit().saturating_sub(began.elapsed());
        self.finish(Stage::Connector, Stage::Connector.limit() + unused).await;
        self.finish(Stage::Behind, Stage::Behind.limit()).await;
        self.finish(Stage::Admin, Stage::Admin.limit()).await;
        self.tasks.abort_all();
        if let Some(log) = self.log.take() {
            match timeout(CLOSE_LIMIT, log.close()).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => warn!(%error, "the local log was not closed in order"),
                Err(_) => warn!("the local log did not close in its time; all events are in it"),
            }
        }
    }

    /// Tells a stage to stop, and waits until it has or its time is over.
    async fn finish(&mut self, stage: Stage, limit: Duration) {
        self.stops[stage as usize].cancel();
        let ended = timeout(limit, async {
            while self.runs(stage) {
                self.next_ended().await;
            }
        });
        if ended.await.is_err() {
            let left = self.running.values().filter(|it| it.stage == stage);
            let left: Vec<_> = left.map(|it| it.name.as_str()).collect();
            warn!(
                parts = left.join(", "),
                "left at the stop, for they did not finish in their time; the next start takes up \
                 what they held"
            );
        }
    }

    fn runs(&self, stage: Stage) -> bool {
        self.running.values().any(|it| it.stage == stage)
    }
}

/// Probes and scrapes, from few places.
const ADMIN_CONNECTIONS_MAX: usize = 256;

/// Takes the socket that was handed over, or else one of our own.
async fn bind(
    handed_over: Option<net::TcpListener>,
    configured: SocketAddr,
    key: &str,
) -> anyhow::Result<(TcpListener, SocketAddr)> {
    let Some(socket) = handed_over else {
        let listener = TcpListener::bind(configured).await.with_context(|| {
            format!(
                "could not listen on {configured}; is another process there? `{key}` names another"
            )
        })?;
        let address = listener.local_addr()?;
        return Ok((listener, address));
    };
    let address = socket.local_addr()?;
    ensure!(
        systemd::is_as_near(address, configured),
        "the socket that was handed over listens on {address}, and `{key}` says {configured}, \
         which only this machine reaches: write the socket's address there"
    );
    Ok((TcpListener::from_std(socket)?, address))
}

/// Lets answers wait for the relay.
struct Relayed(relay::Progress);

#[async_trait]
impl Durable for Relayed {
    async fn durable(&self, sequence: u64) {
        self.0.acknowledged(sequence).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stop_takes_no_longer_than_service_managers_allow() {
        // Kubernetes gives 30 seconds; threads that are stuck get one at the end.
        let stages: Duration = Stage::ALL.into_iter().map(Stage::limit).sum();
        assert_eq!(stages + CLOSE_LIMIT, Duration::from_secs(25));
        assert!(config::ListenConfig::DRAIN_MAX <= Stage::Workers.limit());
    }

    #[tokio::test(start_paused = true)]
    async fn what_hangs_is_left_within_the_limit() {
        let mut process = Process::new(Sockets::default());
        for stage in Stage::ALL {
            process.spawn(stage, "hung", Without::Ends, std::future::pending());
        }
        let start = tokio::time::Instant::now();
        process.stop().await;
        let stages: Duration = Stage::ALL.into_iter().map(Stage::limit).sum();
        assert_eq!(start.elapsed(), stages);
    }

    #[tokio::test(start_paused = true)]
    async fn stages_stop_one_after_the_other_and_the_connector_drains_beside_the_workers() {
        let mut process = Process::new(Sockets::default());
        process.drain = Duration::from_secs(2);
        let start = tokio::time::Instant::now();
        let (told, mut order) = tokio::sync::mpsc::unbounded_channel();
        for stage in Stage::ALL {
            let (told, stop) = (told.clone(), process.stop_of(stage));
            process.spawn(stage, "part", Without::Ends, async move {
                stop.cancelled().await;
                told.send((stage, start.elapsed().as_secs())).ok();
                sleep(Duration::from_secs(1)).await;
                Ok(())
            });
        }
        process.stop().await;
        let mut stops = Vec::new();
        order.recv_many(&mut stops, 4).await;
        use Stage::{Admin, Behind, Connector, Workers};
        assert_eq!(stops, [(Workers, 0), (Connector, 2), (Behind, 3), (Admin, 4)]);
    }
}
