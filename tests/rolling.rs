//! Restarts under load: no call fails, no effect is missing, none is there twice.
//!
//! `VESTIBULE_ROLLING_RATE` names the sign-ups a second, 100 if it does not.

use std::{
    collections::BTreeSet,
    net::{SocketAddr, TcpListener},
    os::{fd::AsRawFd as _, linux::net::SocketAddrExt as _, unix::net::UnixDatagram},
    process::Command,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use anyhow::{Context, bail, ensure};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, copy_bidirectional},
    net::TcpStream,
    task::{AbortHandle, JoinSet},
    time::{Instant, MissedTickBehavior, interval_at, timeout},
};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;
use vestibule_store::{Store, StoreOptions, StoreUrl};
use vestibule_testkit::{Process, eventually};

use crate::{
    scaled_out::Stack,
    support::{LIMIT, Site, Up, http, sign_up},
};

/// Longer than any platform waits, so that a slow machine makes answers slow and nothing else.
const PATIENCE: Duration = Duration::from_secs(40);

fn rate() -> anyhow::Result<u32> {
    match std::env::var("VESTIBULE_ROLLING_RATE") {
        Ok(rate) => rate.parse().context("VESTIBULE_ROLLING_RATE is not a number"),
        Err(_) => Ok(100),
    }
}

/// Sends sign-ups at a steady rate over connections that it keeps, and none of them twice.
struct Platform {
    stop: CancellationToken,
    answered: Arc<AtomicU64>,
    callers: JoinSet<Caller>,
}

#[derive(Default)]
struct Caller {
    sent: u64,
    /// From when a call was due; of a call that waited in a queue, all of that.
    slowest: Duration,
    failures: Vec<String>,
}

impl Platform {
    const CONNECTIONS: u32 = 20;

    fn start(to: SocketAddr) -> anyhow::Result<Self> {
        let every = Duration::from_secs(1) * Self::CONNECTIONS / rate()?;
        let (stop, answered) = (CancellationToken::new(), Arc::new(AtomicU64::new(0)));
        let start = Instant::now();
        let callers = (0..Self::CONNECTIONS).map(|number| {
            let (stop, answered) = (stop.clone(), Arc::clone(&answered));
            let start = start + every * number / Self::CONNECTIONS;
            call_regularly(to, number, start, every, stop, answered)
        });
        Ok(Self { callers: callers.collect(), stop, answered })
    }

    /// Waits until a second's worth of calls more has been answered.
    async fn goes_on(&self) -> anyhow::Result<()> {
        let enough = self.answered.load(Ordering::Relaxed) + u64::from(rate()?);
        eventually(LIMIT, "more sign-ups have been answered", async || {
            self.answered.load(Ordering::Relaxed) >= enough
        })
        .await
    }

    /// How many were sent; an error if one of them failed.
    async fn finish(self) -> anyhow::Result<u64> {
        self.stop.cancel();
        let callers = timeout(PATIENCE * 2, self.callers.join_all()).await?;
        let failures: Vec<_> = callers.iter().flat_map(|it| &it.failures).collect();
        let sent = callers.iter().map(|it| it.sent).sum();
        let slowest = callers.iter().map(|it| it.slowest).max().unwrap_or_default();
        println!("{sent} sign-ups, {} failed, slowest answer {slowest:?}", failures.len());
        ensure!(failures.is_empty(), "{} of {sent} failed: {failures:#?}", failures.len());
        ensure!(sent > 0, "nothing was sent");
        Ok(sent)
    }
}

async fn call_regularly(
    to: SocketAddr,
    number: u32,
    start: Instant,
    every: Duration,
    stop: CancellationToken,
    answered: Arc<AtomicU64>,
) -> Caller {
    let mut caller = Caller::default();
    let mut connection = None;
    // What was due while a call waited is sent after it: the rate holds over all.
    let mut due = interval_at(start, every);
    due.set_missed_tick_behavior(MissedTickBehavior::Burst);
    loop {
        let was_due = tokio::select! {
            biased;
            () = stop.cancelled() => return caller,
            was_due = due.tick() => was_due,
        };
        let body = json!({
            "email": format!("{number}-{}@example.com", caller.sent),
            "givenName": "Ada", "surname": "Lovelace", "jobTitle": "Supplier",
        });
        caller.sent += 1;
        let called = timeout(PATIENCE, call(to, &mut connection, &body.to_string())).await;
        match called.map_err(anyhow::Error::from).flatten() {
            Ok(()) => {
                answered.fetch_add(1, Ordering::Relaxed);
            }
            Err(error) => {
                connection = None;
                caller.failures.push(format!("{number}-{}: {error:#}", caller.sent));
            }
        }
        caller.slowest = caller.slowest.max(was_due.elapsed());
    }
}

/// A connection unused for longer is not used again: shortly afterwards a process that stops closes it, and
/// what is sent at that very moment is nobody's fault.
const KEPT: Duration = Duration::from_millis(225);

/// One call over a connection that is kept while the other side does not say otherwise.
async fn call(
    to: SocketAddr,
    kept: &mut Option<(TcpStream, Instant)>,
    body: &str,
) -> anyhow::Result<()> {
    // As every client does, for the other side may close what is not used.
    let is_open = |it: &TcpStream| !matches!(it.try_read(&mut [0]), Ok(0));
    let reused = kept.take().filter(|(it, used)| used.elapsed() < KEPT && is_open(it));
    let age = if reused.is_some() { "a kept connection" } else { "a new connection" };
    let mut stream = match reused {
        Some((stream, _)) => stream,
        None => TcpStream::connect(to).await.context("could not connect")?,
    };
    let request = format!(
        "POST /connectors/partners/before-create HTTP/1.1\r\nHost: localhost\r\n\
         Authorization: Basic ZW50cmE6dHJ5LW1l\r\nContent-Type: application/json\r\n\
         Content-Length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(request.as_bytes()).await.with_context(|| format!("writing to {age}"))?;
    let answer = read_answer(&mut stream).await.with_context(|| format!("reading from {age}"))?;
    ensure!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    ensure!(answer.contains(r#""action":"Continue""#), "{answer}");
    if !answer.contains("\r\nconnection: close\r\n") {
        *kept = Some((stream, Instant::now()));
    }
    Ok(())
}

/// Reads one answer to its end.
async fn read_answer(stream: &mut TcpStream) -> anyhow::Result<String> {
    let mut bytes = Vec::new();
    loop {
        let text = String::from_utf8_lossy(&bytes);
        if let Some((head, body)) = text.split_once("\r\n\r\n") {
            let length = head.lines().find_map(|it| it.strip_prefix("content-length: "));
            if body.len() >= length.context("an answer without a length")?.parse()? {
                return Ok(text.into_owned());
            }
        }
        if stream.read_buf(&mut bytes).await? == 0 {
            bail!("closed after {} bytes", bytes.len());
        }
    }
}

/// A socket that outlives the processes it is handed to, as a service manager keeps it.
struct Socket(TcpListener);

impl Socket {
    fn new(host: &str) -> anyhow::Result<Self> {
        let listener = TcpListener::bind((host, 0))?;
        // Whatever is started from here on inherits it.
        rustix::io::fcntl_setfd(&listener, rustix::io::FdFlags::empty())?;
        Ok(Self(listener))
    }

    fn address(&self) -> anyhow::Result<SocketAddr> {
        Ok(self.0.local_addr()?)
    }

    /// The command with the socket where the protocol has it: descriptor 3, for this process.
    fn handed_to(&self, command: &Command) -> Command {
        const SCRIPT: &str = "fd=$1 && shift && { [[ $fd == 3 ]] || exec 3<&\"$fd\"-; } && \
                              LISTEN_PID=$$ exec \"$@\"";
        let mut shell = Command::new("bash");
        shell.args(["-c", SCRIPT, "bash", &self.0.as_raw_fd().to_string()]);
        shell.arg(command.get_program()).args(command.get_args());
        for (name, value) in command.get_envs() {
            match value {
                Some(value) => shell.env(name, value),
                None => shell.env_remove(name),
            };
        }
        if let Some(directory) = command.get_current_dir() {
            shell.current_dir(directory);
        }
        shell.env("LISTEN_FDS", "1").env("LISTEN_FDNAMES", "connector");
        shell
    }
}

/// Sends calls in turn to those that are ready, and looks at their readiness all the time: the
/// least that a load balancer does. It tries nothing twice.
struct Balancer {
    address: SocketAddr,
    backends: Arc<Backends>,
    tasks: Vec<AbortHandle>,
}

#[derive(Default)]
struct Backends {
    all: [Backend; 2],
    next: AtomicUsize,
}

#[derive(Default)]
struct Backend {
    /// Connector and admin listener, of the process that is there now.
    addresses: Mutex<Option<(SocketAddr, SocketAddr)>>,
    is_ready: AtomicBool,
}

impl Backend {
    fn addresses(&self) -> Option<(SocketAddr, SocketAddr)> {
        *self.addresses.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Backends {
    /// The connector whose turn it is.
    fn pick(&self) -> Option<SocketAddr> {
        let turn = self.next.fetch_add(1, Ordering::Relaxed);
        let in_turn = (0..self.all.len()).map(|it| &self.all[(turn + it) % self.all.len()]);
        let mut ready = in_turn.filter(|it| it.is_ready.load(Ordering::Relaxed));
        ready.next()?.addresses().map(|(connector, _)| connector)
    }

    async fn look(&self) {
        let http = http();
        loop {
            for backend in &self.all {
                let Some((_, admin)) = backend.addresses() else { continue };
                let ready = http.get(format!("http://{admin}/readyz")).send().await;
                let is_ready = ready.is_ok_and(|it| it.status().is_success());
                // Unless another process has come meanwhile, of which this was not the answer.
                if backend.addresses().is_some_and(|it| it.1 == admin) {
                    backend.is_ready.store(is_ready, Ordering::Relaxed);
                }
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

impl Balancer {
    async fn start() -> anyhow::Result<Self> {
        let listener = tokio::net::TcpListener::bind(("127.0.0.1", 0)).await?;
        let address = listener.local_addr()?;
        let backends = Arc::new(Backends::default());
        let looking = Arc::clone(&backends);
        let picking = Arc::clone(&backends);
        let looking = tokio::spawn(async move { looking.look().await });
        let accepting = tokio::spawn(async move {
            while let Ok((mut caller, _)) = listener.accept().await {
                let to = picking.pick();
                tokio::spawn(async move {
                    // Hung up on without an answer where nobody is ready: the caller counts it.
                    let Some(to) = to else { return };
                    if let Ok(mut backend) = TcpStream::connect(to).await {
                        let _ = copy_bidirectional(&mut caller, &mut backend).await;
                    }
                });
            }
        });
        let tasks = vec![looking.abort_handle(), accepting.abort_handle()];
        Ok(Self { address, backends, tasks })
    }

    /// Has it know another process, and waits until that is sent calls.
    async fn know(&self, place: usize, api: &Api) -> anyhow::Result<()> {
        let backend = &self.backends.all[place];
        *backend.addresses.lock().unwrap_or_else(PoisonError::into_inner) =
            Some((api.connector, api.admin));
        eventually(LIMIT, "the balancer sends calls to it", async || {
            backend.is_ready.load(Ordering::Relaxed)
        })
        .await
    }
}

impl Drop for Balancer {
    fn drop(&mut self) {
        self.tasks.iter().for_each(AbortHandle::abort);
    }
}

/// A running `api`.
struct Api {
    process: Process,
    connector: SocketAddr,
    admin: SocketAddr,
}

impl Api {
    async fn start(stack: &Stack, arguments: &[&str]) -> anyhow::Result<Self> {
        let all = [&["--log-format", "json", "api"], arguments].concat();
        let mut process = Process::spawn(&stack.site.command(&all))?;
        let line =
            process.wait_for_line(LIMIT, |line| line.contains("the connector answers")).await?;
        let line: Value = serde_json::from_str(&line)?;
        let address = |key: &str| line[key].as_str().context("no address")?.parse().context("odd");
        Ok(Self { connector: address("connector")?, admin: address("admin")?, process })
    }
}

/// Changes the configuration of what will be started.
fn change(site: &Site, changes: &[(&str, &str)]) -> anyhow::Result<()> {
    let mut config = std::fs::read_to_string(site.path().join("vestibule.toml"))?;
    for (from, to) in changes {
        ensure!(config.contains(from), "the example no longer has {from}");
        config = config.replacen(from, to, 1);
    }
    site.write("vestibule.toml", &config)
}

/// SIGTERM, and nothing more.
fn tell_to_stop(process: &Process) -> anyhow::Result<()> {
    let id = rustix::process::Pid::from_raw(process.id().try_into()?).context("no process id")?;
    Ok(rustix::process::kill_process(id, rustix::process::Signal::TERM)?)
}

/// Stops it, and gives what it has said.
async fn stop(process: &mut Process) -> anyhow::Result<String> {
    let stopped = process.terminate(LIMIT).await?;
    ensure!(stopped.status.success(), "{}", stopped.stderr);
    Ok(stopped.stderr)
}

/// One event for each sign-up, and one effect of each worker for each event.
async fn assert_each_was_acted_on_once(
    site: &Site,
    store: &Store,
    sent: u64,
) -> anyhow::Result<()> {
    let events = eventually(LIMIT, "every event is in the archive", async || {
        let events = site.replay(&[]).await?;
        anyhow::Ok((u64::try_from(events.len())? >= sent).then_some(events))
    })
    .await?;
    let people: BTreeSet<_> = events.iter().map(|it| it["subject"].to_string()).collect();
    assert_eq!((events.len(), people.len()), (usize::try_from(sent)?, usize::try_from(sent)?));
    let ids = events.iter().map(|it| Ok(it["id"].as_str().context("no id")?.parse()?));
    let ids = ids.collect::<anyhow::Result<Vec<Uuid>>>()?;
    eventually(Duration::from_secs(60), "every worker has acted on every event", async || {
        let effects = store.effects(&ids).await?;
        let once = effects
            .values()
            .filter(|it| (it.person_changes, it.grant_sets, it.notifications) == (1, 1, 1));
        let once = once.count();
        ensure!(once == ids.len(), "{once} of {} were acted on exactly once", ids.len());
        anyhow::Ok(true)
    })
    .await
}

#[tokio::test]
async fn up_is_restarted_five_times_over_one_socket_and_no_call_fails() -> anyhow::Result<()> {
    let mut site = Site::new("")?;
    let socket = Socket::new("127.0.0.1")?;
    let name = format!("vestibule-{}", Uuid::now_v7());
    let manager = std::os::unix::net::SocketAddr::from_abstract_name(&name)?;
    let manager = UnixDatagram::bind_addr(&manager)?;
    manager.set_read_timeout(Some(LIMIT))?;
    site.set("NOTIFY_SOCKET", &format!("@{name}"));
    let told = || {
        let mut state = [0; 64];
        let length = manager.recv(&mut state).context("the service manager was not told")?;
        anyhow::Ok(String::from_utf8_lossy(&state[..length]).into_owned())
    };
    let start = async || {
        let process = Process::spawn(&socket.handed_to(&site.command(&["up"])))?;
        let up = Up::of(process).await?;
        ensure!(told()? == "READY=1", "told when it is ready");
        anyhow::Ok(up)
    };
    let mut up = start().await?;
    let platform = Platform::start(socket.address()?)?;

    for _ in 0..5 {
        platform.goes_on().await?;
        let said = stop(&mut up.process).await?;
        ensure!(!said.contains("left at the stop"), "{said}");
        ensure!(told()? == "STOPPING=1", "told when it stops");
        up = start().await?;
    }
    platform.goes_on().await?;

    let sent = platform.finish().await?;
    let store = StoreUrl::Sqlite(site.data().join("store.db"));
    let store = Store::open(&store, StoreOptions::default()).await?;
    assert_each_was_acted_on_once(&site, &store, sent).await
}

#[tokio::test]
async fn every_process_is_restarted_behind_a_balancer_and_no_call_fails() -> anyhow::Result<()> {
    let stack = Stack::start("").await?;
    // Longer than the balancer needs to look, on a machine that is busy with other things.
    change(&stack.site, &[("[listen]", "[listen]\ndrain = \"6s\"")])?;
    let folders = [&["--data", "one", "--without-relay"][..], &["--data", "other"]];
    let mut apis = Vec::new();
    let balancer = Balancer::start().await?;
    for (place, folder) in folders.into_iter().enumerate() {
        let api = Api::start(&stack, folder).await?;
        balancer.know(place, &api).await?;
        apis.push(api);
    }
    let relay = ["relay", "--data", "one"];
    let mut relay_process = stack.start_until(&relay, "the relay runs").await?;
    let names = ["notify", "database", "permissions"];
    let mut workers = Vec::new();
    for name in names {
        workers.push(stack.worker(&[name]).await?);
    }
    let platform = Platform::start(balancer.address)?;

    for (place, folder) in folders.into_iter().enumerate() {
        platform.goes_on().await?;
        stop(&mut apis[place].process).await?;
        apis[place] = Api::start(&stack, folder).await?;
        balancer.know(place, &apis[place]).await?;
    }
    platform.goes_on().await?;
    stop(&mut relay_process).await?;
    relay_process = stack.start_until(&relay, "the relay runs").await?;
    for (name, worker) in names.into_iter().zip(&mut workers) {
        platform.goes_on().await?;
        stop(worker).await?;
        *worker = stack.worker(&[name]).await?;
    }
    platform.goes_on().await?;

    let sent = platform.finish().await?;
    let store = StoreUrl::Postgres(stack.postgres.url().into());
    let store = Store::open(&store, StoreOptions::default()).await?;
    assert_each_was_acted_on_once(&stack.site, &store, sent).await?;
    ensure!(relay_process.is_running(), "the relay runs to the end");
    Ok(())
}

#[tokio::test]
async fn while_it_leaves_it_wants_no_calls_and_answers_those_that_come() -> anyhow::Result<()> {
    let site = Site::new("")?;
    change(&site, &[("[listen]", "[listen]\ndrain = \"15s\"")])?;
    let mut up = site.up().await?;
    let address: SocketAddr = up.base.trim_start_matches("http://").parse()?;
    let body = json!({ "email": "ada@example.com" }).to_string();
    let mut kept = None;
    call(address, &mut kept, &body).await?;
    assert!(kept.is_some(), "a connection is kept as long as it runs");

    tell_to_stop(&up.process)?;
    let ready = eventually(LIMIT, "it says that it drains", async || {
        let ready = http().get(format!("{}/readyz", up.admin)).send().await?;
        anyhow::Ok((ready.status() == 503).then_some(ready))
    })
    .await?;
    let ready: Value = ready.json().await?;
    assert!(ready["checks"]["process"].to_string().contains("draining"), "{ready}");
    for mut connection in [kept, None] {
        call(address, &mut connection, &body).await?;
        assert!(connection.is_none(), "each answer is the last of its connection");
    }

    tell_to_stop(&up.process)?;
    let stopped = up.process.wait(Duration::from_secs(10)).await?;
    assert!(stopped.stderr.contains("stopped at once"), "{}", stopped.stderr);
    assert_eq!(stopped.status.code(), Some(0));
    Ok(())
}

#[tokio::test]
async fn a_stop_does_not_wait_for_what_is_away() -> anyhow::Result<()> {
    let mut stack = Stack::start("").await?;
    let mut api = Api::start(&stack, &[]).await?;
    let mut worker = stack.worker(&[]).await?;
    // It neither refuses nor answers: the worst that a network does.
    stack.nats.pause();
    stack.postgres.kill();
    let base = format!("http://{}", api.connector);
    for person in ["ada", "eve"] {
        let person = json!({ "email": format!("{person}@example.com") });
        assert_eq!(sign_up(&base, "before-create", &person).await?.0, 200);
    }
    let mut late = Process::spawn(&stack.site.command(&["worker", "database"]))?;
    late.wait_for_line(LIMIT, |line| line.contains("the store does not answer")).await?;

    for process in [&mut api.process, &mut worker, &mut late] {
        let began = std::time::Instant::now();
        let stopped = process.terminate(LIMIT).await?;
        assert!(stopped.status.success(), "{}", stopped.stderr);
        assert!(began.elapsed() < Duration::from_secs(29), "{:?}", began.elapsed());
    }
    stack.nats.resume();
    stack.postgres.restart().await?;
    let _api = Api::start(&stack, &[]).await?;
    eventually(LIMIT, "what was answered is in the archive", async || {
        Ok::<_, anyhow::Error>(stack.site.replay(&[]).await?.len() == 2)
    })
    .await
}

#[tokio::test]
async fn a_socket_that_others_reach_does_not_open_what_is_for_this_machine() -> anyhow::Result<()> {
    let site = Site::new("")?;
    let far = Socket::new("0.0.0.0")?;

    let up = Process::spawn(&far.handed_to(&site.command(&["up"])))?.wait(LIMIT).await?;

    assert_eq!(up.status.code(), Some(1));
    assert!(up.stderr.contains("write the socket's address there"), "{}", up.stderr);
    Ok(())
}

#[tokio::test]
async fn a_refused_configuration_shows_in_readiness() -> anyhow::Result<()> {
    let site = Site::new("")?;
    let up = site.up().await?;
    let config = std::fs::read_to_string(site.path().join("vestibule.toml"))?;
    let configuration = async || {
        let ready = http().get(format!("{}/readyz", up.admin)).send().await?;
        ensure!(ready.status() == 200, "it answers sign-ups");
        let ready: Value = ready.json().await?;
        anyhow::Ok(ready["checks"]["configuration"].as_str().context("no check")?.to_owned())
    };
    assert_eq!(configuration().await?, "ok");

    site.write("vestibule.toml", &config.replace("when = \"", "when = \"("))?;
    eventually(LIMIT, "it says so", async || {
        anyhow::Ok(configuration().await?.contains("refused"))
    })
    .await?;

    site.write("vestibule.toml", &config)?;
    eventually(LIMIT, "all is well", async || anyhow::Ok(configuration().await? == "ok")).await
}

#[tokio::test]
async fn an_expired_certificate_keeps_nobody_from_starting_and_shows() -> anyhow::Result<()> {
    let tls = "[listen.tls]\ncertificate = \"tls.crt\"\nkey = \"tls.key\"\n";
    let site = Site::new(tls)?;
    let mut parameters = rcgen::CertificateParams::new(vec!["localhost".to_owned()])?;
    parameters.not_after = rcgen::date_time_ymd(2020, 1, 1);
    let key = rcgen::KeyPair::generate()?;
    site.write("tls.crt", &parameters.self_signed(&key)?.pem())?;
    site.write("tls.key", &key.serialize_pem())?;

    let up = site.up().await?;
    let ready = http().get(format!("{}/readyz", up.admin)).send().await?;
    assert_eq!(ready.status(), 200, "degraded, and answering whoever does not look");
    let ready: Value = ready.json().await?;
    assert_eq!(ready["status"], "degraded");
    let certificate = ready["checks"]["certificate"].as_str().context("no check")?;
    assert!(certificate.contains("tls.crt expired at 2020-01-01"), "{certificate}");

    parameters.not_after = rcgen::date_time_ymd(4096, 1, 1);
    site.write("tls.crt", &parameters.self_signed(&key)?.pem())?;
    eventually(LIMIT, "the new one is in force", async || {
        let ready = http().get(format!("{}/readyz", up.admin)).send().await?;
        anyhow::Ok(ready.json::<Value>().await?["checks"]["certificate"] == "ok")
    })
    .await
}
