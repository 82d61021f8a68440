//! What people who sign up see of an outage: the real binary with NATS, PostgreSQL and every target
//! gone and a slow disk, at a steady rate.
//!
//! Nothing listens where they should be. The disk is made slow by a library that is loaded into the
//! process before the system's own and waits before each sync.

use std::{
    collections::VecDeque,
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Command,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use anyhow::{Context, ensure};
use serde::Serialize;
use tokio::{
    net::TcpStream,
    time::{Instant, timeout},
};
use vestibule_events::LocalLog;
use vestibule_testkit::{Process, eventually, free_port};

use crate::{
    cli::OutageArgs,
    load::Caller,
    open_loop::{Latencies, at_rate},
    sample::{self, Call},
};

const PATH: &str = "/connectors/partners/before-create";

/// Of the example configuration: an answer after it is none.
const DEADLINE: Duration = Duration::from_millis(800);

const LIMIT: Duration = Duration::from_secs(30);

const SLOW_SYNC: &str = r#"
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <unistd.h>

static void wait_first(void) { usleep(1000 * atoi(getenv("SLOW_SYNC_MS"))); }

#define SLOW(name)                                                                                 \
    int name(int file) {                                                                           \
        static int (*real)(int);                                                                   \
        if (!real) real = (int (*)(int))dlsym(RTLD_NEXT, #name);                                   \
        wait_first();                                                                              \
        return real(file);                                                                         \
    }

SLOW(fsync)
SLOW(fdatasync)
"#;

/// What is wrong in a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Weather {
    /// Embedded, everything there, the disk as it is.
    Fine,
    /// Embedded, the disk slow.
    SlowDisk,
    /// Embedded, no webhook and no mail server answers, the disk slow.
    TargetsDown,
    /// `api` with neither NATS nor PostgreSQL, the disk slow.
    ServersDown,
}

impl Weather {
    const ALL: [Self; 4] = [Self::Fine, Self::SlowDisk, Self::TargetsDown, Self::ServersDown];

    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Fine => "up, nothing wrong",
            Self::SlowDisk => "up, slow disk",
            Self::TargetsDown => "up, slow disk, webhook and mail down",
            Self::ServersDown => "api, slow disk, NATS and PostgreSQL down",
        }
    }

    const fn command(self) -> &'static str {
        if matches!(self, Self::ServersDown) { "api" } else { "up" }
    }
}

#[derive(Debug, Serialize)]
pub(crate) struct Row {
    pub(crate) weather: Weather,
    pub(crate) calls: u64,
    pub(crate) p50_ms: f64,
    pub(crate) p99_ms: f64,
    pub(crate) p999_ms: f64,
    pub(crate) max_ms: f64,
    /// Answers after the deadline, answers other than to continue, and calls without any.
    pub(crate) missed: u64,
}

pub(crate) fn measure(args: &OutageArgs, folder: &Path) -> anyhow::Result<Vec<Row>> {
    let binary = binary(args)?;
    let slow_sync = slow_sync(folder)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let rounds = Weather::ALL.into_iter().map(|weather| {
        eprintln!("outage: {}", weather.as_str());
        let folder = folder.join(format!("{weather:?}"));
        let round = Round { args, binary: &binary, slow_sync: &slow_sync, folder, weather };
        runtime.block_on(round.measure()).with_context(|| weather.as_str())
    });
    rounds.collect()
}

/// The real one, which lies beside the benchmark.
fn binary(args: &OutageArgs) -> anyhow::Result<PathBuf> {
    let beside = || Some(std::env::current_exe().ok()?.parent()?.join("vestibule"));
    let binary = args.vestibule.clone().or_else(beside).context("could not find the benchmark")?;
    ensure!(
        binary.exists(),
        "there is no {}; build it first (cargo build --release), or name it with --vestibule",
        binary.display()
    );
    Ok(binary)
}

fn slow_sync(folder: &Path) -> anyhow::Result<PathBuf> {
    let (source, library) = (folder.join("slow_sync.c"), folder.join("slow_sync.so"));
    fs::write(&source, SLOW_SYNC)?;
    let compiled = Command::new("cc")
        .args(["-shared", "-fPIC", "-O2", "-o"])
        .args([&library, &source])
        .arg("-ldl")
        .status()
        .context("could not run cc; a C compiler is needed to make the disk slow")?;
    ensure!(compiled.success(), "cc could not compile {}", source.display());
    Ok(library)
}

struct Round<'a> {
    args: &'a OutageArgs,
    binary: &'a Path,
    slow_sync: &'a Path,
    folder: PathBuf,
    weather: Weather,
}

impl Round<'_> {
    async fn measure(&self) -> anyhow::Result<Row> {
        fs::create_dir(&self.folder)?;
        let address = SocketAddr::from(([127, 0, 0, 1], free_port()));
        fs::write(self.folder.join("vestibule.toml"), self.configuration(address))?;
        fs::write(self.folder.join("key"), "a key of nobody, for a benchmark")?;
        let mut command = Command::new(self.binary);
        command.arg(self.weather.command()).current_dir(&self.folder);
        command.env("VESTIBULE_LOG", "error");
        if self.weather != Weather::Fine {
            command.env("LD_PRELOAD", self.slow_sync);
            command.env("SLOW_SYNC_MS", self.args.sync_ms.to_string());
        }
        let mut process = Process::spawn(&command)?;
        eventually(LIMIT, "the connector listens", async || {
            TcpStream::connect(address).await.map(|_| true)
        })
        .await?;

        let row = self.load(address).await?;
        process.terminate(LIMIT).await?;
        let log = LocalLog::open_read_only(self.folder.join("data/events.db")).await?;
        let (stored, answered) = (log.last_sequence(), row.calls - row.missed);
        // A call that was answered late is stored, too.
        ensure!(stored >= answered, "{answered} were answered and {stored} are stored");
        log.close().await?;
        Ok(row)
    }

    async fn load(&self, address: SocketAddr) -> anyhow::Result<Row> {
        let callers = Arc::new(Callers { address, free: Mutex::default() });
        // Connections and caches are warm before it counts.
        let warm_up = (self.args.seconds / 10.0).min(2.0);
        let mut next_person = 0;
        let mut rounds = vec![];
        for seconds in [warm_up, self.args.seconds] {
            let first = next_person;
            let length = Duration::from_secs_f64(seconds);
            let calls = at_rate(self.args.rate, length, |number, due| {
                next_person = first + number + 1;
                let callers = Arc::clone(&callers);
                async move { callers.call(first + number, due).await }
            });
            rounds.push(calls.await?);
        }
        let answers = rounds.pop().unwrap_or_default();
        let latencies: Latencies = answers.iter().map(|it| it.took).collect();
        Ok(Row {
            weather: self.weather,
            calls: answers.len() as u64,
            p50_ms: latencies.ms(0.5),
            p99_ms: latencies.ms(0.99),
            p999_ms: latencies.ms(0.999),
            max_ms: latencies.ms(1.0),
            missed: answers.iter().filter(|it| !it.continues || it.took > DEADLINE).count() as u64,
        })
    }

    fn configuration(&self, connector: SocketAddr) -> String {
        let (user, password) = (sample::USER, sample::PASSWORD);
        let away = || free_port();
        let more = match self.weather {
            Weather::Fine | Weather::SlowDisk => "[[workers.notify.channels]]\n\
                 name = \"kept\"\nkind = \"record\"\nsubject = \"Welcome\"\nbody = \"Hello\"\n"
                .to_owned(),
            Weather::TargetsDown => format!(
                "[[workers.notify.channels]]\nname = \"chat\"\nkind = \"webhook\"\n\
                 url = \"file:webhook\"\nformat = \"json\"\nsubject = \"Welcome\"\nbody = \"Hello\"\n\
                 [[workers.notify.channels]]\nname = \"mail\"\nkind = \"mail\"\ntls = \"none\"\n\
                 server = \"smtp://127.0.0.1:{}\"\nfrom = \"us@example.com\"\nto = [\"team@example.com\"]\n\
                 subject = \"Welcome\"\nbody = \"Hello\"\n",
                away()
            ),
            Weather::ServersDown => format!(
                "[nats]\nurl = \"nats://127.0.0.1:{}\"\n\
                 [store]\nurl = \"postgres://vestibule@127.0.0.1:{}/vestibule\"\n",
                away(),
                away()
            ),
        };
        // The file is there in any case; only one channel reads it.
        let _ = fs::write(self.folder.join("webhook"), format!("http://127.0.0.1:{}/", away()));
        format!(
            "key = \"file:key\"\n[listen]\nconnector = \"{connector}\"\nadmin = \"127.0.0.1:0\"\n\
             [connectors.partners]\nprotocol = \"api-connector\"\ndeadline = \"800ms\"\n\
             [[connectors.partners.credentials]]\nuser = \"{user}\"\npassword = \"example:{password}\"\n\
             [workers.database]\n\
             [[workers.permissions.rules]]\nname = \"everybody\"\nwhen = \"true\"\nrole = \"guest\"\n{more}"
        )
    }
}

struct Answer {
    took: Duration,
    continues: bool,
}

/// Connections that are kept; a call that finds none free opens one.
struct Callers {
    address: SocketAddr,
    free: Mutex<VecDeque<Caller>>,
}

impl Callers {
    async fn call(&self, person: u64, due: Instant) -> Answer {
        // Nobody waits longer; the call counts as missed.
        let heard = timeout(DEADLINE * 5, self.ask(person)).await;
        let continues = matches!(heard, Ok(Ok(true)));
        Answer { took: due.elapsed(), continues }
    }

    async fn ask(&self, person: u64) -> anyhow::Result<bool> {
        let free = || self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let kept = free().pop_back();
        let mut caller = match kept {
            Some(caller) => caller,
            None => Caller::connect(self.address, Call::to(PATH)).await?,
        };
        let continues = caller.call(person).await?;
        free().push_back(caller);
        Ok(continues)
    }
}
