//! The real binary with real servers, and what can be done to them.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use async_nats::ConnectOptions;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::{sync::Mutex, time::sleep};
use vestibule_testkit::{
    Nats, NatsCluster, Postgres, Process, Proxy, Weather, eventually, free_port,
};

use crate::{
    clock::Clocks,
    disk::Disk,
    journal::{Entry, Journal},
    plan::{Fault, Kind, Link, Mood, Part, Topology, Worker},
    platform::TRY_AGAIN,
    readings::Database,
    run::{Mutation, Settings},
    target::Target,
};

/// How long a process or server may take to start on a busy machine.
const START_LIMIT: Duration = Duration::from_secs(60);

/// By how much a slow network is slow.
const SLOWNESS: Duration = Duration::from_millis(120);

/// How far clocks jump. From behind to ahead is less than the window of refusals, with time to spare for
/// the person: a repeated call is no longer one beyond it.
const JUMP_SECONDS: i64 = 10;

/// How often we look whether a process has ended by itself, as a supervisor does.
const LOOK: Duration = Duration::from_millis(200);

/// What every answer must hold.
pub(crate) const DEADLINE: Duration = Duration::from_millis(800);

const ROLES: [&str; 5] = ["relay", "worker", "auditor", "provisioner", "saboteur"];
const KEY: &str = "0123456789abcdef0123456789abcdef";
const HOOK_KEY: &str = "whsec_MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY=";
const CONFIGURATION: &str = include_str!("configuration.toml");
const NATS_CONFIGURATION: &str = include_str!("../../../nats.conf");

/// Everything that runs. What is on its way to end ends when this is dropped.
#[derive(Debug)]
pub(crate) struct System {
    binary: PathBuf,
    mutation: Option<Mutation>,
    topology: Topology,
    /// Kept over restarts; what the platform knows is the port of its link.
    connector: SocketAddr,
    relay_admin: SocketAddr,
    // Processes before the servers and folders that they use.
    processes: BTreeMap<Part, Mutex<Slot>>,
    links: BTreeMap<Link, Vec<Proxy>>,
    brokers: Mutex<Option<Brokers>>,
    /// In the order of the servers.
    nats_ports: Vec<u16>,
    postgres: Mutex<Option<Postgres>>,
    postgres_port: Option<u16>,
    disk: Option<Disk>,
    full: Mutex<()>,
    clocks: Clocks,
    jump: Mutex<()>,
    target: Target,
    mood: Mutex<()>,
    journal: Arc<Journal>,
    folder: TempDir,
}

#[derive(Debug)]
enum Brokers {
    One(Nats),
    Three(NatsCluster),
}

/// A process that is started again when it has ended.
#[derive(Debug)]
struct Slot {
    process: Option<Process>,
    starts: u32,
    /// Starts because it had ended without our doing.
    mended: u32,
}

impl System {
    /// Starts everything, and returns when the connector answers.
    pub(crate) async fn start(
        settings: &Settings,
        journal: Arc<Journal>,
        folder: TempDir,
    ) -> anyhow::Result<Self> {
        let topology = settings.topology;
        let target = Target::start().await?;
        let (brokers, postgres) = match topology {
            Topology::Embedded => (None, None),
            _ => {
                let (brokers, postgres) =
                    tokio::try_join!(Brokers::start(topology), Postgres::start_durable())?;
                (Some(brokers), Some(postgres))
            }
        };
        let nats_ports: Vec<_> = brokers.iter().flat_map(|it| it.nodes()).map(Nats::port).collect();
        let postgres_port = postgres.as_ref().map(Postgres::port);
        // Embedded, a sign-up leaves less than 10 KB in log and store; else the relay trims the log.
        let megabytes = 256 + if brokers.is_none() { settings.sign_ups / 100 } else { 0 };
        let disk = Disk::mount(&folder.path().join("data"), megabytes)?;
        let mut system = Self {
            binary: settings.binary.clone(),
            mutation: settings.mutation,
            topology,
            connector: loopback(free_port()),
            relay_admin: loopback(free_port()),
            processes: BTreeMap::new(),
            links: BTreeMap::new(),
            brokers: Mutex::new(brokers),
            nats_ports,
            postgres: Mutex::new(postgres),
            postgres_port,
            disk,
            full: Mutex::new(()),
            clocks: Clocks::build(folder.path())?,
            jump: Mutex::new(()),
            target,
            mood: Mutex::new(()),
            journal,
            folder,
        };
        system.lay_links()?;
        system.write_configurations()?;
        system.run_to_its_end(&["migrate"], None).await?;
        system.begin().await?;
        Ok(system)
    }

    /// Where the platform calls.
    pub(crate) fn connector_url(&self) -> String {
        format!("http://127.0.0.1:{}/connectors/partners", self.port(Link::PlatformToConnector))
    }

    pub(crate) fn target(&self) -> &Target {
        &self.target
    }

    /// Whether events go over a stream.
    pub(crate) fn has_brokers(&self) -> bool {
        self.topology != Topology::Embedded
    }

    fn lay_links(&mut self) -> anyhow::Result<()> {
        let mut links = vec![(Link::PlatformToConnector, vec![self.connector])];
        links.extend(
            Worker::CALLERS.map(|it| (Link::WorkerToTarget(it), vec![self.target.address()])),
        );
        if self.topology != Topology::Embedded {
            let nats: Vec<_> = self.nats_ports.iter().map(|port| loopback(*port)).collect();
            let postgres: Vec<_> = self.postgres_port.map(loopback).into_iter().collect();
            links.push((Link::RelayToNats, nats.clone()));
            for worker in Worker::HOSTS {
                links.push((Link::WorkerToNats(worker), nats.clone()));
                links.push((Link::WorkerToPostgres(worker), postgres.clone()));
            }
        }
        for (link, targets) in links {
            let proxies = targets.into_iter().map(Proxy::start).collect::<anyhow::Result<_>>()?;
            self.links.insert(link, proxies);
        }
        Ok(())
    }

    fn port(&self, link: Link) -> u16 {
        self.links[&link][0].port()
    }

    /// One file for each process, because each has links of its own; and one without any for us.
    fn write_configurations(&self) -> anyhow::Result<()> {
        let direct = |ports: &[u16]| {
            let urls: Vec<_> =
                ports.iter().map(|port| format!("nats://127.0.0.1:{port}")).collect();
            urls.join(",")
        };
        let of_link = |link| {
            let ports: Vec<_> = self.links[&link].iter().map(Proxy::port).collect();
            direct(&ports)
        };
        let base = CONFIGURATION
            .replace("@DATA@", &self.data().to_string_lossy())
            .replace("@CONNECTOR@", &self.connector.to_string())
            .replace("@TRY_AGAIN@", TRY_AGAIN)
            .replace("@SCRIPT@", &self.script_file().to_string_lossy())
            .replace("@DEADLINE@", &format!("{}ms", DEADLINE.as_millis()));
        let over = |nats: &str, postgres: u16| {
            let replicas = self.nats_ports.len();
            let logins = ROLES[..4].iter().map(|role| {
                format!("{role} = {{ user = \"{role}\", password = \"env:{}\" }}\n", password(role))
            });
            format!(
                "{base}\n[nats]\nurl = \"{nats}\"\nmax_bytes = \"2GiB\"\nreplicas = {replicas}\n{}[store]\n\
                 url = \"postgres://vestibule@127.0.0.1:{postgres}/vestibule\"\n",
                logins.collect::<String>()
            )
        };
        let Some(postgres) = self.postgres_port else {
            for name in ["direct", "connector"] {
                self.write(&format!("{name}.toml"), &base)?;
            }
            return Ok(());
        };
        self.write("direct.toml", &over(&direct(&self.nats_ports), postgres))?;
        let relay = over(&of_link(Link::RelayToNats), postgres);
        self.write("connector.toml", &relay)?;
        self.write("relay.toml", &relay)?;
        for worker in Worker::HOSTS {
            let postgres = self.port(Link::WorkerToPostgres(worker));
            let text = over(&of_link(Link::WorkerToNats(worker)), postgres);
            self.write(&format!("{}.toml", worker.as_str()), &text)?;
        }
        Ok(())
    }

    fn write(&self, name: &str, text: &str) -> anyhow::Result<()> {
        std::fs::write(self.folder.path().join(name), text)
            .with_context(|| format!("could not write {name}"))
    }

    /// Where the subscriber's command writes what it is told.
    pub(crate) fn script_file(&self) -> PathBuf {
        self.folder.path().join("script.txt")
    }

    fn data(&self) -> PathBuf {
        self.folder.path().join("data")
    }

    async fn begin(&mut self) -> anyhow::Result<()> {
        let mut parts = vec![Part::Connector];
        if self.topology != Topology::Embedded {
            parts.push(Part::Relay);
            parts.extend(Worker::HOSTS.map(Part::Worker));
        }
        for part in parts {
            let slot = Slot { process: None, starts: 0, mended: 0 };
            self.processes.insert(part, Mutex::new(slot));
        }
        for part in self.processes.keys().copied() {
            self.spawn(part, &mut *self.processes[&part].lock().await)?;
        }
        eventually(START_LIMIT, "the connector listens", async || {
            tokio::net::TcpStream::connect(self.connector).await.is_ok()
        })
        .await
        .with_context(|| self.log_of(Part::Connector))
    }

    fn arguments(&self, part: Part) -> Vec<String> {
        let (file, command) = match part {
            Part::Connector if self.topology == Topology::Embedded => ("connector", vec!["up"]),
            Part::Connector => ("connector", vec!["api", "--without-relay"]),
            Part::Relay => ("relay", vec!["relay"]),
            Part::Worker(worker) => {
                let others = worker.beside().iter().map(|it| it.as_str());
                (worker.as_str(), ["worker", worker.as_str()].into_iter().chain(others).collect())
            }
            Part::Nats | Part::Postgres => unreachable!("these are servers"),
        };
        let file = self.folder.path().join(format!("{file}.toml"));
        let mut arguments = vec!["--config".to_owned(), file.to_string_lossy().into_owned()];
        if part == Part::Relay {
            arguments.extend(["--admin".to_owned(), self.relay_admin.to_string()]);
        }
        arguments.extend(command.iter().map(|it| (*it).to_owned()));
        arguments
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.binary);
        command.current_dir(self.folder.path());
        for name in ["CONFIG", "DATA", "ADMIN", "LOG", "LOG_FORMAT"] {
            command.env_remove(format!("VESTIBULE_{name}"));
        }
        let target = |it| format!("http://127.0.0.1:{}/", self.port(Link::WorkerToTarget(it)));
        command.env("VESTIBULE_KEY", KEY).env("VESTIBULE_TARGET", target(Worker::Notify));
        command.env("VESTIBULE_HOOK", target(Worker::Hook)).env("VESTIBULE_HOOK_KEY", HOOK_KEY);
        command.envs(ROLES.map(|role| (password(role), role_password(role))));
        if let Some(mutation) = self.mutation {
            command.env("VESTIBULE_MUTATION", mutation.as_str());
        }
        command
    }

    fn spawn(&self, part: Part, slot: &mut Slot) -> anyhow::Result<()> {
        self.bury(part, slot)?;
        let mut command = self.command();
        self.clocks.give(&part.to_string(), &mut command)?;
        let mut process = Process::spawn(command.args(self.arguments(part)))?;
        process.quiet();
        slot.process = Some(process);
        slot.starts += 1;
        Ok(())
    }

    /// Keeps what a process said.
    fn bury(&self, part: Part, slot: &mut Slot) -> anyhow::Result<()> {
        let Some(mut process) = slot.process.take() else { return Ok(()) };
        process.kill();
        self.write(&format!("{part} {}.log", slot.starts), &process.stderr())
    }

    fn log_of(&self, part: Part) -> String {
        let Ok(slot) = self.processes[&part].try_lock() else { return String::new() };
        slot.process.as_ref().map_or_else(String::new, Process::stderr)
    }

    /// Starts again what has ended by itself; never returns while all is well.
    pub(crate) async fn supervise(&self) -> anyhow::Result<()> {
        loop {
            sleep(LOOK).await;
            for (part, slot) in &self.processes {
                // Who holds it is about to start it again.
                let Ok(mut slot) = slot.try_lock() else { continue };
                if slot.process.as_mut().is_some_and(|it| !it.is_running()) {
                    slot.mended += 1;
                    self.spawn(*part, &mut slot)?;
                }
            }
        }
    }

    /// Writes the logs of what runs to the folder, beside those of what has ended.
    pub(crate) async fn keep_logs(&self) -> anyhow::Result<()> {
        for (part, slot) in &self.processes {
            self.bury(*part, &mut *slot.lock().await)?;
        }
        if let Some(brokers) = &*self.brokers.lock().await {
            for (number, node) in brokers.nodes().iter().enumerate() {
                self.write(&format!("nats-server {number}.log"), &node.log())?;
            }
        }
        if let Some(postgres) = &*self.postgres.lock().await {
            self.write("PostgreSQL.log", &postgres.log())?;
        }
        Ok(())
    }

    /// How often processes had to be started because they ended by themselves.
    pub(crate) async fn mended(&self) -> u32 {
        let mut mended = 0;
        for slot in self.processes.values() {
            mended += slot.lock().await.mended;
        }
        mended
    }

    /// Does what a fault says, and heals it. `false` where that cannot be done here.
    pub(crate) async fn suffer(&self, fault: Fault) -> anyhow::Result<bool> {
        let from = self.journal.now();
        match fault.kind {
            Kind::Kill(part) => self.kill(part, fault.lasts).await?,
            Kind::Pause(part) => self.pause(part, fault.lasts).await?,
            Kind::Cut(link) => self.weather(link, Weather::Cut, fault.lasts).await,
            Kind::Silence(link) => self.weather(link, Weather::Silent, fault.lasts).await,
            Kind::Slow(link) => self.weather(link, Weather::Slow(SLOWNESS), fault.lasts).await,
            Kind::ClockAhead(part) => self.jump(part, JUMP_SECONDS, fault.lasts).await?,
            Kind::ClockBehind(part) => self.jump(part, -JUMP_SECONDS, fault.lasts).await?,
            Kind::FullDisk => {
                let Some(disk) = &self.disk else { return Ok(false) };
                let _one_at_a_time = self.full.lock().await;
                disk.fill()?;
                sleep(fault.lasts).await;
                disk.clear()?;
            }
            Kind::Redeliver(worker) => self.redeliver(worker).await?,
            Kind::Target(mood) => {
                let _one_at_a_time = self.mood.lock().await;
                self.target.set(mood);
                sleep(fault.lasts).await;
                self.target.set(Mood::Fine);
            }
        }
        let keeps_from_answering = match fault.kind {
            Kind::Pause(part) => part == Part::Connector,
            Kind::Cut(link) | Kind::Silence(link) | Kind::Slow(link) => {
                link == Link::PlatformToConnector
            }
            _ => false,
        };
        if keeps_from_answering {
            let (until, by) = (self.journal.now(), fault.kind.to_string());
            self.journal.write(&Entry::Kept { from, until, by })?;
        }
        Ok(true)
    }

    async fn kill(&self, part: Part, away: Duration) -> anyhow::Result<()> {
        match part {
            Part::Nats => {
                let mut brokers = self.brokers.lock().await;
                let brokers = brokers.as_mut().context("there is no nats-server")?;
                let leader = brokers.leader().await;
                brokers.nodes_mut()[leader].kill();
                sleep(away).await;
                brokers.nodes_mut()[leader].restart().await
            }
            Part::Postgres => {
                let mut postgres = self.postgres.lock().await;
                let postgres = postgres.as_mut().context("there is no PostgreSQL")?;
                postgres.kill();
                sleep(away).await;
                postgres.restart().await
            }
            part => {
                let mut slot = self.processes[&part].lock().await;
                self.bury(part, &mut slot)?;
                sleep(away).await;
                self.spawn(part, &mut slot)
            }
        }
    }

    async fn pause(&self, part: Part, lasts: Duration) -> anyhow::Result<()> {
        match part {
            Part::Nats => {
                let brokers = self.brokers.lock().await;
                let brokers = brokers.as_ref().context("there is no nats-server")?;
                let leader = brokers.leader().await;
                brokers.nodes()[leader].pause();
                sleep(lasts).await;
                brokers.nodes()[leader].resume();
            }
            Part::Postgres => {
                let postgres = self.postgres.lock().await;
                let postgres = postgres.as_ref().context("there is no PostgreSQL")?;
                postgres.pause();
                sleep(lasts).await;
                postgres.resume();
            }
            part => {
                let slot = self.processes[&part].lock().await;
                let process = slot.process.as_ref().context("it is always there")?;
                process.pause();
                sleep(lasts).await;
                process.resume();
            }
        }
        Ok(())
    }

    async fn jump(&self, part: Part, seconds: i64, lasts: Duration) -> anyhow::Result<()> {
        let _one_at_a_time = self.jump.lock().await;
        self.clocks.set(&part.to_string(), seconds)?;
        sleep(lasts).await;
        self.clocks.set(&part.to_string(), 0)
    }

    async fn weather(&self, link: Link, weather: Weather, lasts: Duration) {
        self.set_weather(link, weather);
        sleep(lasts).await;
        self.set_weather(link, Weather::Fine);
    }

    fn set_weather(&self, link: Link, weather: Weather) {
        self.links[&link].iter().for_each(|proxy| proxy.set(weather));
    }

    /// Has the stream deliver again the last hundreds of what the worker acknowledged.
    async fn redeliver(&self, worker: Worker) -> anyhow::Result<()> {
        // The stream may be away itself, for longest while it elects a leader.
        let deadline = Instant::now() + START_LIMIT;
        loop {
            match self.reset_consumer(worker.as_str()).await {
                Ok(()) => return Ok(()),
                Err(error) if Instant::now() > deadline => return Err(error),
                Err(_) => sleep(LOOK).await,
            }
        }
    }

    async fn reset_consumer(&self, name: &str) -> anyhow::Result<()> {
        const AGAIN: u64 = 200;
        let info = self.ask_nats(&format!("CONSUMER.INFO.SIGNUPS.{name}"), &json!({})).await?;
        let floor = info["ack_floor"]["stream_seq"].as_u64().context("no consumer")?;
        let from = json!({ "seq": floor.saturating_sub(AGAIN).max(1) });
        let answer = self.ask_nats(&format!("CONSUMER.RESET.SIGNUPS.{name}"), &from).await?;
        ensure!(answer["error"].is_null(), "the consumer is not reset: {answer}");
        Ok(())
    }

    /// Asks the API of JetStream, as somebody who may do everything.
    async fn ask_nats(&self, subject: &str, body: &Value) -> anyhow::Result<Value> {
        let urls = self.nats_ports.iter().map(|port| format!("nats://127.0.0.1:{port}"));
        let urls: Vec<_> = urls.collect();
        let (user, password) = ("saboteur".to_owned(), role_password("saboteur"));
        let asking = async {
            let options = ConnectOptions::with_user_and_password(user, password);
            let client = options.connect(urls).await?;
            let body = body.to_string().into();
            let answer = client.request(format!("$JS.API.{subject}"), body).await?;
            anyhow::Ok(serde_json::from_slice(&answer.payload)?)
        };
        tokio::time::timeout(Duration::from_secs(5), asking).await?
    }

    /// Whether the consumers have nothing left and nothing in hand, and the relay has published all.
    pub(crate) async fn is_idle(&self) -> anyhow::Result<bool> {
        if self.topology == Topology::Embedded {
            return Ok(true);
        }
        let metrics = reqwest::get(format!("http://{}/metrics", self.relay_admin)).await?;
        let metrics = metrics.text().await?;
        let backlog =
            metrics.lines().find_map(|it| it.strip_prefix("vestibule_relay_backlog_events "));
        if backlog.context("the relay does not say its backlog")? != "0" {
            return Ok(false);
        }
        for worker in Worker::ALL {
            let subject = format!("CONSUMER.INFO.SIGNUPS.{}", worker.as_str());
            let info = self.ask_nats(&subject, &json!({})).await?;
            let number = |name: &str| info[name].as_u64().context("no consumer");
            if number("num_pending")? + number("num_ack_pending")? > 0 {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Writes the archive to a file, as the auditor reads it.
    pub(crate) async fn replay(&self) -> anyhow::Result<PathBuf> {
        let file = self.folder.path().join("events.jsonl");
        self.run_to_its_end(&["replay"], Some(&file)).await?;
        Ok(file)
    }

    pub(crate) async fn database(&self) -> anyhow::Result<Database> {
        if let Some(port) = self.postgres_port {
            return Database::postgres(&format!("postgres://vestibule@127.0.0.1:{port}/vestibule"))
                .await;
        }
        Database::sqlite(&self.data().join("store.db")).await
    }

    /// Runs a command of the binary, whose output goes to a file.
    async fn run_to_its_end(&self, command: &[&str], output: Option<&Path>) -> anyhow::Result<()> {
        let mut child = self.command();
        child.arg("--config").arg(self.folder.path().join("direct.toml")).args(command);
        let stdout = match output {
            Some(file) => std::fs::File::create(file)?.into(),
            None => Stdio::null(),
        };
        child.stdin(Stdio::null()).stdout(stdout).stderr(Stdio::piped());
        let child = tokio::process::Command::from(child).kill_on_drop(true).spawn()?;
        let ended = tokio::time::timeout(10 * START_LIMIT, child.wait_with_output()).await??;
        let said = String::from_utf8_lossy(&ended.stderr);
        ensure!(ended.status.success(), "`vestibule {}` failed: {said}", command.join(" "));
        Ok(())
    }
}

impl Brokers {
    async fn start(topology: Topology) -> anyhow::Result<Self> {
        // The shipped file, and one more user, who may do everything.
        let users = "    users: [\n";
        let saboteur =
            format!("{users}      {{ user: saboteur, password: ${} }}\n", password("saboteur"));
        let text = NATS_CONFIGURATION.replacen(users, &saboteur, 1);
        ensure!(text != NATS_CONFIGURATION, "nats.conf has no users any more");
        let environment = ROLES.map(|role| (password(role), role_password(role)));
        let environment = environment.each_ref().map(|(name, value)| (&**name, &**value));
        Ok(match topology {
            Topology::Cluster => Self::Three(NatsCluster::start(&text, &environment).await?),
            _ => Self::One(Nats::start_with_config_and_env(&text, &environment).await?),
        })
    }

    fn nodes(&self) -> &[Nats] {
        match self {
            Self::One(nats) => std::slice::from_ref(nats),
            Self::Three(cluster) => cluster.nodes(),
        }
    }

    fn nodes_mut(&mut self) -> &mut [Nats] {
        match self {
            Self::One(nats) => std::slice::from_mut(nats),
            Self::Three(cluster) => cluster.nodes_mut(),
        }
    }

    /// While nobody knows who leads, the first is as good as another.
    async fn leader(&self) -> usize {
        match self {
            Self::One(_) => 0,
            Self::Three(cluster) => cluster.leader("SIGNUPS").await.unwrap_or(0),
        }
    }
}

fn loopback(port: u16) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], port))
}

/// The variable with the password of a role.
fn password(role: &str) -> String {
    format!("VESTIBULE_NATS_{}_PASSWORD", role.to_uppercase())
}

fn role_password(role: &str) -> String {
    format!("{role}-secret")
}
