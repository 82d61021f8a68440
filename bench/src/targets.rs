//! What nine healthy workers feel of a tenth whose target is dead.
//!
//! Ten workers post each accepted sign-up to a target of their own, in one process over one local log
//! and one store: nowhere do they share more. Every round measures the nine three times in turn, with
//! the tenth target healthy, refusing connections, and taking calls that it never answers.

use std::{
    collections::HashMap,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use anyhow::Context;
use async_trait::async_trait;
use axum::{
    Router,
    body::Bytes,
    extract::{Path as UrlPath, State},
    routing::post,
};
use serde::{Deserialize, Serialize};
use tokio::{
    net::TcpListener,
    task::JoinSet,
    time::{Instant, timeout},
};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;
use vestibule_events::{EventLog, Filter, LocalLog, Retention};
use vestibule_store::{Store, StoreOptions, StoreUrl};
use vestibule_testkit::{eventually, free_port};
use vestibule_workers::{
    ChannelKind, ChannelSettings, HandleError, Notify, NotifySettings, Task, WebhookFormat, Worker,
    WorkerMetrics, WorkerSettings, run,
};

use crate::{
    cli::TargetsArgs,
    open_loop::{Latencies, at_rate},
    sample,
    server::{RETENTION, local_log},
    spread::Spread,
};

const WORKERS: usize = 10;

/// At the start of a round connections are opened and statements prepared: these do not count.
const WARM_UP: f64 = 0.1;

const LIMIT: Duration = Duration::from_secs(60);

/// What the first target is like; the others are well.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Tenth {
    Healthy,
    Refuses,
    Hangs,
}

impl Tenth {
    const ALL: [Self; 3] = [Self::Healthy, Self::Refuses, Self::Hangs];

    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Healthy => "healthy",
            Self::Refuses => "refuses connections",
            Self::Hangs => "never answers",
        }
    }
}

#[derive(Debug, Serialize)]
pub(crate) struct Row {
    pub(crate) tenth: Tenth,
    /// To the nine healthy targets, over all rounds.
    pub(crate) deliveries: usize,
    pub(crate) p50_ms: Spread,
    pub(crate) p99_ms: Spread,
    /// Of the p99 to that of the same round with all ten healthy.
    pub(crate) ratio: Option<Spread>,
}

pub(crate) fn measure(args: &TargetsArgs, folder: &Path) -> anyhow::Result<Vec<Row>> {
    let mut taken: Vec<Vec<Latencies>> = Tenth::ALL.iter().map(|_| vec![]).collect();
    for round in 1..=args.rounds {
        for (tenth, taken) in Tenth::ALL.into_iter().zip(&mut taken) {
            eprintln!("targets, round {round} of {}: the tenth {}", args.rounds, tenth.as_str());
            let folder = folder.join(format!("{round}-{tenth:?}"));
            let runtime = tokio::runtime::Runtime::new()?;
            taken.push(runtime.block_on(deliver(args, &folder, tenth))?);
            // What hangs on the dead target is not waited for.
            runtime.shutdown_background();
        }
    }
    let healthy: Vec<_> = taken[0].iter().map(|it| it.ms(0.99)).collect();
    let rows = Tenth::ALL.into_iter().zip(&taken).map(|(tenth, taken)| Row {
        tenth,
        deliveries: taken.iter().map(Latencies::count).sum(),
        p50_ms: Spread::of(taken.iter().map(|it| it.ms(0.5))),
        p99_ms: Spread::of(taken.iter().map(|it| it.ms(0.99))),
        ratio: (tenth != Tenth::Healthy)
            .then(|| Spread::of(taken.iter().zip(&healthy).map(|(it, base)| it.ms(0.99) / base))),
    });
    Ok(rows.collect())
}

/// When which event came to which target.
#[derive(Debug, Default)]
struct Receipts(Mutex<HashMap<(usize, Uuid), Instant>>);

async fn deliver(args: &TargetsArgs, folder: &Path, tenth: Tenth) -> anyhow::Result<Latencies> {
    let log = LocalLog::open(local_log(folder, Retention::For(RETENTION))).await?;
    let store = StoreUrl::Sqlite(folder.join("store.db"));
    let store = Store::open(&store, StoreOptions::default()).await?;
    store.migrate().await?;

    let receipts = Arc::<Receipts>::default();
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let well = listener.local_addr()?.to_string();
    let router = Router::new().route("/{worker}", post(receive)).with_state(Arc::clone(&receipts));
    let serving = tokio::spawn(async move { axum::serve(listener, router).await });
    // The system takes connections for whoever listens; nobody ever reads from them.
    let deaf = TcpListener::bind("127.0.0.1:0").await?;
    let first = match tenth {
        Tenth::Healthy => well.clone(),
        Tenth::Refuses => format!("127.0.0.1:{}", free_port()),
        Tenth::Hangs => deaf.local_addr()?.to_string(),
    };

    let stop = CancellationToken::new();
    let mut workers = JoinSet::new();
    for number in 0..WORKERS {
        let target = if number == 0 { &first } else { &well };
        let worker = Arc::new(Numbered::new(number, target, &store)?);
        let log: Arc<dyn EventLog> = Arc::new(log.clone());
        let (settings, metrics) = (WorkerSettings::default(), WorkerMetrics::default());
        workers.spawn(run(worker, settings, log, store.clone(), metrics, stop.clone()));
    }

    let length = Duration::from_secs_f64(args.seconds);
    let key = sample::key();
    let appended = at_rate(args.rate, length, |person, due| {
        let (log, event) = (log.clone(), sample::event(&key, person));
        async move {
            let id = event.id;
            log.append(event).await.map(|_| (id, due))
        }
    });
    let appended: HashMap<Uuid, Instant> = appended.await?.into_iter().collect::<Result<_, _>>()?;
    let wanted = appended.len() * (WORKERS - 1);
    eventually(LIMIT, "the nine have had everything", async || receipts.of_the_nine() == wanted)
        .await?;

    stop.cancel();
    let stopped = async { while workers.join_next().await.is_some() {} };
    let _ = timeout(Duration::from_secs(1), stopped).await;
    serving.abort();
    drop(deaf);
    let counted_from =
        appended.values().min().copied().context("nothing was sent")? + length.mul_f64(WARM_UP);
    Ok(receipts.latencies(&appended, counted_from))
}

#[derive(Deserialize)]
struct Notification {
    data: NotificationData,
}

#[derive(Deserialize)]
struct NotificationData {
    event: Uuid,
}

async fn receive(
    State(receipts): State<Arc<Receipts>>,
    UrlPath(worker): UrlPath<usize>,
    body: Bytes,
) -> axum::http::StatusCode {
    let now = Instant::now();
    match serde_json::from_slice::<Notification>(&body) {
        Ok(Notification { data }) => {
            let mut receipts = receipts.0.lock().unwrap_or_else(PoisonError::into_inner);
            receipts.entry((worker, data.event)).or_insert(now);
            axum::http::StatusCode::OK
        }
        Err(_) => axum::http::StatusCode::BAD_REQUEST,
    }
}

impl Receipts {
    fn of_the_nine(&self) -> usize {
        let receipts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        receipts.keys().filter(|(worker, _)| *worker != 0).count()
    }

    fn latencies(&self, appended: &HashMap<Uuid, Instant>, counted_from: Instant) -> Latencies {
        let receipts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let healthy = receipts.iter().filter(|((worker, _), _)| *worker != 0);
        healthy
            .filter_map(|((_, event), at)| Some((*appended.get(event)?, *at)))
            .filter(|(due, _)| *due >= counted_from)
            .map(|(due, at)| at.duration_since(due))
            .collect()
    }
}

/// One of ten workers that do the same under names of their own.
#[derive(Debug)]
struct Numbered {
    name: String,
    notify: Notify,
}

impl Numbered {
    fn new(number: usize, target: &str, store: &Store) -> anyhow::Result<Self> {
        let channel = ChannelSettings {
            name: format!("target-{number}"),
            filter: Filter::default(),
            subject: "Welcome".to_owned(),
            body: "{{ signup.email_domain }}".to_owned(),
            language: "en".to_owned(),
            locales: vec![],
            kind: ChannelKind::Webhook {
                url: format!("http://{target}/{number}").into(),
                format: WebhookFormat::Json,
                headers: vec![],
                signing_key: None,
            },
        };
        let settings = NotifySettings { channels: vec![channel], approvals: None };
        let notify = Notify::new(settings, store.clone())
            .map_err(|complaints| anyhow::anyhow!("{complaints:?}"))?;
        Ok(Self { name: format!("target-{number}"), notify })
    }
}

#[async_trait]
impl Worker for Numbered {
    fn name(&self) -> &str {
        &self.name
    }

    async fn handle(&self, task: &Task) -> Result<(), HandleError> {
        self.notify.handle(task).await
    }
}
