//! A process: its parts as tasks, the signals that stop it, and the order in which it stops.

use std::{
    future::Future,
    net::SocketAddr,
    sync::{Arc, OnceLock},
    time::Duration,
};

use anyhow::{Context, bail};
use async_trait::async_trait;
use axum::Router;
use prometheus_client::registry::Registry;
use tokio::{
    net::TcpListener,
    signal::unix::{Signal, SignalKind, signal},
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};
use vestibule_api::{
    AnswerAfter, Api, ApprovalDesk, Approvals, Durable, ListMetrics, LookupMetrics, ServerLimits,
    Tls, TlsSettings, admin_router, approvals_router, publish_decisions, router, serve, serve_tls,
};
use vestibule_events::{JetStream, LocalLog, Role, relay};
use vestibule_store::Store;

use super::reload::{Reload, ReloadMetrics};
use crate::{
    config::{self, Config, NatsConfig, TlsConfig},
    deciding::{Deciding, Gauges},
    readiness::Parts,
    wiring,
};

/// How long a stop may take before what still runs is left to the next start.
const DRAIN_LIMIT: Duration = Duration::from_secs(25);

/// The running parts of a process.
pub(super) struct Process {
    pub(super) registry: Registry,
    /// Stops everything but the connector, which goes first.
    pub(super) stop: CancellationToken,
    /// Stops taking calls.
    stop_calls: CancellationToken,
    /// Cancelled once the last call has its answer; absent where there is no connector.
    answered: Option<CancellationToken>,
    tasks: JoinSet<Ended>,
    /// How far the relay is, for answers that wait for the stream.
    progress: relay::Progress,
    terminate: Signal,
    interrupt: Signal,
}

/// What a process is worth without a part that has ended by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Without {
    /// Nothing: the process ends too, so that whoever supervises it sees that.
    Ends,
    /// A worker that cannot go on is no reason to turn people away.
    GoesOn,
}

struct Ended {
    part: &'static str,
    without: Without,
    result: anyhow::Result<()>,
}

impl Process {
    /// Signals are caught from the very beginning, so that a stop during the start is orderly too.
    pub(super) fn begin() -> anyhow::Result<Self> {
        Ok(Self {
            registry: Registry::default(),
            stop: CancellationToken::new(),
            stop_calls: CancellationToken::new(),
            answered: None,
            tasks: JoinSet::new(),
            progress: relay::Progress::default(),
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }

    pub(super) fn spawn(
        &mut self,
        part: &'static str,
        without: Without,
        task: impl Future<Output = anyhow::Result<()>> + Send + 'static,
    ) {
        self.tasks.spawn(async move { Ended { part, without, result: task.await } });
    }

    /// The outcome of something that may take long, or `None` if a signal came first.
    pub(super) async fn unless_stopped<T>(&mut self, wanted: impl Future<Output = T>) -> Option<T> {
        tokio::select! {
            outcome = wanted => Some(outcome),
            () = self.signal() => None,
        }
    }

    async fn signal(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
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
        let stop = self.stop.clone();
        self.spawn("relay", Without::Ends, async move {
            let options = relay::RelayOptions::default();
            relay::run(log, to, options, progress, stop).await.context("the relay ended")
        });
        Ok(stream)
    }

    /// Starts to take calls; gives the address, as the configuration may say port 0.
    ///
    /// With a store, sooner or later open, requests for approval are decided here too, and their
    /// decisions brought to the log.
    pub(super) async fn connector(
        &mut self,
        config: &Arc<Config>,
        store: Option<Arc<OnceLock<Store>>>,
        log: &LocalLog,
    ) -> anyhow::Result<SocketAddr> {
        let key = Arc::new(wiring::pseudonym_key(config)?);
        let desk = store.map(|store| ApprovalDesk::new(store, Arc::clone(&key)));
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
                let stop = self.stop.clone();
                self.spawn("keys of bearer tokens", Without::GoesOn, async move {
                    verifier.run(stop).await;
                    Ok(())
                });
            }
        }
        let api = Api::new(Arc::new(log.clone()), key, connectors, &mut self.registry)?;
        log.register(&mut self.registry);
        let metrics = ReloadMetrics::register(&mut self.registry);
        let config = Arc::clone(config);
        let reload = Reload {
            config: Arc::clone(&config),
            deciding,
            approvals,
            gauges,
            metrics,
            api: api.clone(),
        };
        self.spawn("reload", Without::GoesOn, reload.run(self.stop.clone()));

        let mut routes = router(api);
        if let Some(desk) = desk {
            routes = routes.merge(approvals_router(desk.clone()));
            let publishing = publish_decisions(desk, Arc::new(log.clone()), self.stop.clone());
            self.spawn("decisions", Without::GoesOn, async move {
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
                let (watched, stop) = (tls.clone(), self.stop.clone());
                self.spawn("certificate", Without::GoesOn, async move {
                    watched.watch(stop).await;
                    Ok(())
                });
                Some(tls)
            }
        };
        let (listener, address) = bind(config.listen.connector, "listen.connector").await?;
        let answered = CancellationToken::new();
        let guard = answered.clone().drop_guard();
        self.answered = Some(answered);
        let stop = self.stop_calls.clone();
        self.spawn("connector", Without::Ends, async move {
            let _answered_at_the_end = guard;
            let limits = ServerLimits::default();
            match tls {
                Some(tls) => serve_tls(listener, tls, routes, limits, stop).await?,
                None => serve(listener, routes, limits, stop).await?,
            }
            Ok(())
        });
        Ok(address)
    }

    /// Starts the admin listener, last: the metrics of everything else are in the registry by now.
    pub(super) async fn admin(
        &mut self,
        parts: Parts,
        listen: SocketAddr,
    ) -> anyhow::Result<SocketAddr> {
        let registry = Arc::new(std::mem::take(&mut self.registry));
        let router = admin_router(registry, Arc::new(parts));
        let (listener, address) = bind(listen, "listen.admin").await?;
        let stop = self.stop.clone();
        self.spawn("admin", Without::Ends, async move {
            Ok(serve(listener, router, ServerLimits::default(), stop).await?)
        });
        Ok(address)
    }

    /// Runs until a signal comes or the process is worth nothing any more, then drains.
    pub(super) async fn run(mut self) -> anyhow::Result<()> {
        let lost = loop {
            tokio::select! {
                _ = self.terminate.recv() => break None,
                _ = self.interrupt.recv() => break None,
                Some(ended) = self.tasks.join_next() => {
                    if let Some(part) = report(ended) {
                        break Some(part);
                    }
                }
            }
        };
        info!("stopping: answers and events in progress are finished first");
        let drained = tokio::time::timeout(DRAIN_LIMIT, async {
            self.stop_calls.cancel();
            // An answer in progress may wait for the relay, so that goes on until then.
            if let Some(answered) = &self.answered {
                answered.cancelled().await;
            }
            self.stop.cancel();
            while let Some(ended) = self.tasks.join_next().await {
                report(ended);
            }
        });
        tokio::select! {
            drained = drained => match drained {
                Ok(()) => info!("stopped"),
                Err(_) => warn!("stopped with events in progress; they are delivered again"),
            },
            // A second signal: whoever sends it does not want to wait.
            _ = self.interrupt.recv() => warn!("stopped at once"),
        }
        match lost {
            None => Ok(()),
            Some(part) => bail!("stopped, because there is no {part} any more; see the log above"),
        }
    }
}

async fn bind(address: SocketAddr, key: &str) -> anyhow::Result<(TcpListener, SocketAddr)> {
    let listener = TcpListener::bind(address).await.with_context(|| {
        format!("could not listen on {address}; is another process there? `{key}` names another")
    })?;
    let address = listener.local_addr()?;
    Ok((listener, address))
}

/// Says how a part ended, and which one if the process is worth nothing without it.
fn report(ended: Result<Ended, tokio::task::JoinError>) -> Option<&'static str> {
    match ended {
        Ok(Ended { result: Ok(()), .. }) => None,
        Ok(Ended { part, without, result: Err(error) }) => {
            error!(part, error = format!("{error:#}"), "a part has ended");
            (without == Without::Ends).then_some(part)
        }
        Err(error) => {
            error!(%error, "a part has panicked");
            Some("panicked part")
        }
    }
}

/// Lets answers wait for the relay.
struct Relayed(relay::Progress);

#[async_trait]
impl Durable for Relayed {
    async fn durable(&self, sequence: u64) {
        self.0.acknowledged(sequence).await;
    }
}
