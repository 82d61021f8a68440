//! One run from its seed to its report.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, anyhow};
use tokio::{
    sync::watch,
    task::{JoinSet, LocalSet},
    time::sleep,
};
use vestibule_testkit::eventually;

use crate::{
    checker::check,
    journal::Journal,
    plan::{Fault, Kind, Plan, Topology, Worker},
    platform::Platform,
    readings::{self, Readings},
    report::Report,
    system::{DEADLINE, System},
};

/// Between two looks at log and store while we wait for the workers.
const LOOK: Duration = Duration::from_millis(300);

/// What to run.
#[derive(Clone, Debug)]
pub struct Settings {
    pub seed: u64,
    pub topology: Topology,
    pub sign_ups: u64,
    /// How many people begin to sign up in a second.
    pub rate: f64,
    pub faults: usize,
    /// How long the workers may take once all is healed.
    pub patience: Duration,
    pub binary: PathBuf,
    pub mutation: Option<Mutation>,
    /// Where the journal, the events and the logs of all processes are kept; absent, nowhere.
    pub keep: Option<PathBuf>,
}

/// A deliberate bug, in a binary that is built to have it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Mutation {
    AnswerBeforeAppend,
    AcknowledgeBeforeEffect,
    NoInbox,
}

impl Mutation {
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::AnswerBeforeAppend => "answer-before-append",
            Self::AcknowledgeBeforeEffect => "acknowledge-before-effect",
            Self::NoInbox => "no-inbox",
        }
    }
}

/// The program to run: beside this one in `target`, where Cargo puts what belongs together.
pub fn binary(mutation: Option<Mutation>) -> anyhow::Result<PathBuf> {
    let (name, build) = match mutation {
        None => ("vestibule", "cargo build -p vestibule"),
        Some(_) => (
            "vestibule-mutated",
            "cargo build -p vestibule --features mutations --bin vestibule-mutated",
        ),
    };
    let this = std::env::current_exe().context("could not find this very program")?;
    // Tests lie one folder deeper.
    let found = this.ancestors().skip(1).take(2).map(|folder| folder.join(name));
    found.into_iter().find(|it| it.is_file()).with_context(|| {
        format!("there is no {name} beside {}; build it first: {build}", this.display())
    })
}

/// Runs, heals, waits, reads and compares.
pub async fn run(settings: &Settings) -> anyhow::Result<Report> {
    let folder = tempfile::Builder::new().prefix("vestibule-faults-").tempdir()?;
    let path = folder.path().to_owned();
    let journal = Arc::new(Journal::create(path.join("journal.jsonl"))?);
    let begun = Instant::now();
    let system = Arc::new(System::start(settings, Arc::clone(&journal), folder).await?);
    let watched = Arc::clone(&journal);
    let mut watching = tokio::spawn(async move { watched.watch_the_machine().await });
    let report = tokio::select! {
        report = go_through(settings, &system, &journal) => report,
        Err(error) = system.supervise() => Err(error.context("could not start a process again")),
        ended = &mut watching => Err(anyhow!("nobody watches the machine: {ended:?}")),
    };
    watching.abort();
    if let Some(keep) = &settings.keep {
        system.keep_logs().await?;
        copy_files(&path, keep)?;
    }
    let mut report = report?;
    report.took = begun.elapsed();
    Ok(report)
}

async fn go_through(
    settings: &Settings,
    system: &Arc<System>,
    journal: &Arc<Journal>,
) -> anyhow::Result<Report> {
    let plan = Plan::new(settings.seed, settings.topology, settings.faults, settings.sign_ups);
    let platform = Platform::new(system.connector_url(), settings.seed, Arc::clone(journal))?;
    let platform = Arc::new(platform);
    let (progress, signing_up) = watch::channel(0);
    let (sign_ups, rate) = (settings.sign_ups, settings.rate);
    // On a thread of its own: whoever kills a server has to wait for its end.
    let platform =
        tokio::spawn(async move { platform.everybody_signs_up(sign_ups, rate, &progress).await });
    let injected = LocalSet::new().run_until(inject(system, plan, signing_up)).await;
    platform.await.context("the platform broke down")??;
    let injected = injected?;
    let settled = settle(system, settings.patience).await;
    let verdict = check(&read(system, journal).await?, DEADLINE);
    Ok(Report {
        seed: settings.seed,
        topology: settings.topology,
        mutation: settings.mutation,
        sign_ups: settings.sign_ups,
        took: Duration::ZERO,
        injected: injected.done,
        left_out: injected.left_out,
        mended: system.mended().await,
        unsettled: settled.err().map(|error| format!("{error:#}")),
        verdict,
    })
}

/// How often each fault happened.
#[derive(Debug, Default)]
struct Injected {
    done: BTreeMap<String, u64>,
    left_out: BTreeMap<String, u64>,
}

/// Each fault at its time, several at once where they overlap; returns when all are healed.
async fn inject(
    system: &Arc<System>,
    plan: Plan,
    mut signing_up: watch::Receiver<u64>,
) -> anyhow::Result<Injected> {
    let mut faults = JoinSet::new();
    for planned in plan.0 {
        signing_up.wait_for(|begun| *begun >= planned.at).await.context("the platform is gone")?;
        let system = Arc::clone(system);
        faults.spawn_local(async move {
            let Fault { kind, .. } = planned.fault;
            let done = system.suffer(planned.fault).await;
            anyhow::Ok((kind, done.with_context(|| format!("could not do to it: {kind}"))?))
        });
    }
    let mut injected = Injected::default();
    while let Some(ended) = faults.join_next().await {
        let (kind, done) = ended.context("a fault broke down")??;
        let counts = if done { &mut injected.done } else { &mut injected.left_out };
        *counts.entry(kind.to_string()).or_default() += 1;
    }
    Ok(injected)
}

/// Waits until every worker has dealt with all that is in the archive; then has them dealt with some of
/// it once more, which must change nothing.
async fn settle(system: &System, patience: Duration) -> anyhow::Result<()> {
    eventually(patience, "the relay and the consumers have nothing left", async || {
        sleep(LOOK).await;
        system.is_idle().await
    })
    .await?;
    let events = readings::events(&system.replay().await?)?;
    let accepted = events.iter().filter(|it| it.kind == "accepted").count() as u64;
    let database = system.database().await?;
    let all_is_dealt_with = async || {
        sleep(LOOK).await;
        let progress = database.progress().await?;
        let is_done = progress.waiting == 0 && progress.dealt_with >= accepted;
        anyhow::ensure!(is_done, "{progress:?} of {accepted}");
        system.is_idle().await
    };
    eventually(patience, "the workers have dealt with everything", all_is_dealt_with).await?;
    if system.has_brokers() {
        for worker in Worker::ALL {
            system.suffer(Fault { kind: Kind::Redeliver(worker), lasts: Duration::ZERO }).await?;
        }
        let again = "the workers have dealt with what was delivered again";
        eventually(patience, again, all_is_dealt_with).await?;
    }
    Ok(())
}

async fn read(system: &System, journal: &Journal) -> anyhow::Result<Readings> {
    let database = system.database().await?;
    let events = readings::events(&system.replay().await?)?;
    let mut effects = database.effects().await?;
    effects.extend(readings::closings(&events));
    let mut keys = database.keys().await?;
    for worker in Worker::ALL {
        keys.extend(events.iter().filter_map(|it| worker.key(it.id)));
    }
    let mut told = system.target().told();
    told.extend(readings::lines(&system.script_file())?);
    Ok(Readings {
        journal: journal.read()?,
        events,
        effects,
        parked: database.parked().await?,
        waiting: database.waiting().await?,
        keys,
        told,
    })
}

/// What lies in a folder, without the folders in it.
fn copy_files(from: &Path, to: &Path) -> anyhow::Result<()> {
    std::fs::create_dir_all(to)?;
    for entry in std::fs::read_dir(from)?.flatten() {
        if entry.path().is_file() {
            std::fs::copy(entry.path(), to.join(entry.file_name()))?;
        }
    }
    Ok(())
}
