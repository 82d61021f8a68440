//! A PostgreSQL of our own.

use std::io::Write as _;
use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use sqlx::Connection as _;
use tempfile::TempDir;

use crate::child::{self, Child, Signal, User};
use crate::{eventually, free_port, tools, workdir};

const START_LIMIT: Duration = Duration::from_secs(30);

/// Role, and database that [`Postgres::url`] names.
const NAME: &str = "vestibule";

/// A PostgreSQL server, stopped and removed when dropped.
///
/// It keeps its port and its data over [`kill`](Self::kill) and [`restart`](Self::restart). Anyone who
/// can reach it may log in as the superuser `vestibule` without a password.
#[derive(Debug)]
pub struct Postgres {
    server: Option<Child>,
    port: u16,
    user: Option<User>,
    durable: bool,
    directory: TempDir,
}

impl Postgres {
    /// What was committed survives [`kill`](Self::kill), but would not survive a power cut: nothing is
    /// synced, which makes tests quick.
    pub async fn start() -> anyhow::Result<Self> {
        Self::launch_new(false).await
    }

    /// Syncs as a real installation does, for tests and benchmarks in which that matters.
    pub async fn start_durable() -> anyhow::Result<Self> {
        Self::launch_new(true).await
    }

    /// Over TCP, to the empty database `vestibule`.
    pub fn url(&self) -> String {
        self.database_url(NAME)
    }

    /// Over the Unix socket, to the same database.
    pub fn socket_url(&self) -> String {
        let socket = self.directory.path().display();
        format!("postgres://{NAME}@localhost:{}/{NAME}?host={socket}", self.port)
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// Creates an empty database and tells its URL.
    pub async fn create_database(&self, name: &str) -> anyhow::Result<String> {
        let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
        ensure!(name.chars().all(plain), "a test database is named in lower case: {name}");
        let mut connection = sqlx::PgConnection::connect(&self.url()).await?;
        let statement = sqlx::AssertSqlSafe(format!("create database \"{name}\""));
        sqlx::raw_sql(statement)
            .execute(&mut connection)
            .await
            .with_context(|| format!("could not create the test database {name}"))?;
        connection.close().await?;
        Ok(self.database_url(name))
    }

    /// What the server has written to its log so far, over all restarts.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(self.log_path()).unwrap_or_default()).into_owned()
    }

    /// SIGKILL to the server and all its processes: nothing of it is left when this returns.
    pub fn kill(&mut self) {
        let Some(mut server) = self.server.take() else { return };
        // Stopped first, so that it cannot start more processes while we count them.
        server.halt();
        let backends = child::children_of(server.id());
        for backend in &backends {
            child::signal_process(*backend, Signal::KILL);
        }
        server.kill();
        // Wait until they have ended, or a restart would find them holding the shared memory.
        for _ in 0..1000 {
            if backends.iter().all(|id| child::has_ended(*id)) {
                break;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// An orderly stop that breaks open connections (PostgreSQL's "fast").
    pub fn stop(&mut self) {
        if let Some(mut server) = self.server.take() {
            server.stop(Signal::INT, Duration::from_secs(20));
        }
    }

    /// Starts it again on the same port and data; kills it first if it runs. Returns when it takes
    /// connections.
    pub async fn restart(&mut self) -> anyhow::Result<()> {
        self.kill();
        self.launch().await
    }

    /// Stops all its processes in their tracks: connections stay open and nothing answers.
    pub fn pause(&self) {
        if let Some(server) = &self.server {
            server.halt();
            for backend in child::children_of(server.id()) {
                child::halt_process(backend);
            }
        }
    }

    pub fn resume(&self) {
        if let Some(server) = &self.server {
            for backend in child::children_of(server.id()) {
                child::signal_process(backend, Signal::CONT);
            }
            server.signal(Signal::CONT);
        }
    }

    async fn launch_new(durable: bool) -> anyhow::Result<Self> {
        let user = server_user()?;
        let directory = workdir::create()?;
        if let Some(User { uid, gid }) = user {
            chown(directory.path(), Some(uid), Some(gid))
                .context("could not hand the data directory to the user of PostgreSQL")?;
        }
        let template = template(user)?;
        copy_tree(&template, &directory.path().join("data"))?;
        let mut postgres = Self { server: None, port: 0, user, durable, directory };

        for _ in 0..5 {
            postgres.port = free_port();
            match postgres.launch().await {
                Err(_) if postgres.log().contains("Address already in use") => {}
                outcome => return outcome.map(|()| postgres),
            }
        }
        bail!("could not find a port for PostgreSQL: {}", child::tail(&postgres.log_path()))
    }

    /// Ready means: this very process says so in its own data directory.
    async fn launch(&mut self) -> anyhow::Result<()> {
        let directory = self.directory.path();
        let log = std::fs::File::options()
            .create(true)
            .append(true)
            .open(self.log_path())
            .context("could not open the log of PostgreSQL")?;
        // At our death an immediate shutdown: unlike SIGKILL it lets the server end its processes and
        // give back its shared memory.
        let program = tools::postgres_bin()?.join("postgres");
        let mut command = child::command(&program, "QUIT", self.user)?;
        command.arg("-D").arg(directory.join("data")).stdout(Stdio::null()).stderr(log);
        let mut set = |name: &str, value: &str| {
            command.arg("-c").arg(format!("{name}={value}"));
        };
        set("listen_addresses", "127.0.0.1");
        set("port", &self.port.to_string());
        set("unix_socket_directories", &directory.to_string_lossy());
        // In the data directory, where a killed server leaves nothing that outlives it.
        set("dynamic_shared_memory_type", "mmap");
        set("shared_buffers", "32MB");
        set("max_connections", "200");
        if !self.durable {
            set("fsync", "off");
            set("full_page_writes", "off");
        }
        self.server = Some(child::spawn(command)?);

        let ready = eventually(START_LIMIT, "PostgreSQL is ready or ends", async || {
            let server = self.server.as_mut()?;
            if server.status().is_some() {
                return Some(false);
            }
            let id = server.id().to_string();
            let status = std::fs::read_to_string(directory.join("data/postmaster.pid")).ok()?;
            let is_ours = status.lines().next() == Some(&id);
            (is_ours && status.lines().nth(7)?.trim() == "ready").then_some(true)
        });
        if !ready.await? {
            self.server = None;
            bail!("PostgreSQL ended at once; {}", child::tail(&self.log_path()));
        }
        Ok(())
    }

    fn database_url(&self, database: &str) -> String {
        format!("postgres://{NAME}@127.0.0.1:{}/{database}", self.port)
    }

    fn log_path(&self) -> PathBuf {
        self.directory.path().join("postgres.log")
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        // Nobody needs the data any more, so there is nothing to wait for.
        self.kill();
        // A killed server leaves a small segment of shared memory that only its file knows of.
        let status = self.directory.path().join("data/postmaster.pid");
        let Ok(status) = std::fs::read_to_string(status) else { return };
        let segment = status.lines().nth(6).and_then(|line| line.split_whitespace().nth(1));
        if let Some(segment) = segment {
            let _ = Command::new("ipcrm").args(["-m", segment]).stderr(Stdio::null()).status();
        }
    }
}

/// `None` if PostgreSQL can run as we do; as root it refuses to.
fn server_user() -> anyhow::Result<Option<User>> {
    if !rustix::process::geteuid().is_root() {
        return Ok(None);
    }
    let accounts = std::fs::read_to_string("/etc/passwd").context("could not read /etc/passwd")?;
    let user = |name: &str| {
        let line = accounts.lines().find(|line| line.split(':').next() == Some(name))?;
        let mut ids = line.split(':').skip(2).map(str::parse);
        Some(User { uid: ids.next()?.ok()?, gid: ids.next()?.ok()? })
    };
    user("postgres")
        .or_else(|| user("nobody"))
        .map(Some)
        .context("PostgreSQL does not run as root, and there is no user postgres or nobody")
}

/// A freshly made data directory to copy from, which takes a tenth of the time of making one.
///
/// It is kept with the other test tools. Of several tests that want it at once, one makes it and the
/// others wait.
fn template(user: Option<User>) -> anyhow::Result<PathBuf> {
    let bin = tools::postgres_bin()?;
    let version = run(Command::new(bin.join("postgres")).arg("--version"))?;
    let version: String = version
        .split_whitespace()
        .nth(2)
        .unwrap_or("unknown")
        .chars()
        .filter(|c| c.is_ascii_alphanumeric() || *c == '.')
        .collect();
    let owner = user.map_or_else(|| rustix::process::geteuid().as_raw(), |user| user.uid);
    let parent = tools::installed();
    let template = parent.join(format!("postgres-template-1-{version}-{owner}"));
    if template.exists() {
        return Ok(template);
    }

    std::fs::create_dir_all(&parent)
        .with_context(|| format!("could not create {}", parent.display()))?;
    // Given back when the file is closed, so also when we die.
    let turn = std::fs::File::create(parent.join("postgres-template.lock"))?;
    turn.lock().context("could not wait for another test that prepares PostgreSQL")?;
    if template.exists() {
        return Ok(template);
    }
    let workplace = workdir::create()?;
    if let Some(User { uid, gid }) = user {
        chown(workplace.path(), Some(uid), Some(gid))
            .context("could not hand a directory to the user of PostgreSQL")?;
    }
    let data = workplace.path().join("data");
    let mut initdb = child::command(&bin.join("initdb"), "KILL", user)?;
    initdb.arg("-D").arg(&data).args([
        "--username",
        NAME,
        "--auth=trust",
        "--no-sync",
        "--no-locale",
        "--encoding=UTF8",
        // Less to copy than the 16 MB of the default.
        "--wal-segsize=1",
    ]);
    run(&mut initdb)?;
    let mut single = child::command(&bin.join("postgres"), "KILL", user)?;
    single.args(["--single", "-F", "-D"]).arg(&data).arg("postgres").stdin(Stdio::piped());
    run_with_input(&mut single, &format!("create database {NAME}\n"))?;

    // Moved into place when complete: who finds the template need not ask whose turn it is.
    let mine = tempfile::Builder::new().prefix("postgres-template-").tempdir_in(&parent)?;
    copy_tree(&data, &mine.path().join("data"))?;
    std::fs::rename(mine.path().join("data"), &template)
        .context("could not keep the PostgreSQL template")?;
    Ok(template)
}

/// With owners and modes, both of which PostgreSQL insists on.
fn copy_tree(from: &Path, to: &Path) -> anyhow::Result<()> {
    run(Command::new("cp").args(["-a", "--reflink=auto", "--"]).arg(from).arg(to)).map(drop)
}

fn run(command: &mut Command) -> anyhow::Result<String> {
    run_with_input(command, "")
}

fn run_with_input(command: &mut Command, input: &str) -> anyhow::Result<String> {
    let what = format!("{} {:?}", command.get_program().display(), command.get_args());
    let mut child = command
        // Some of these insist on a working directory that their user may enter.
        .current_dir("/")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("could not start {what}"))?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(input.as_bytes())?;
    }
    let output = child.wait_with_output()?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{what} failed: {errors}");
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use sqlx::PgConnection;

    #[tokio::test]
    async fn a_killed_server_comes_back_with_what_was_committed_and_leaves_nothing()
    -> anyhow::Result<()> {
        let mut server = Postgres::start().await?;
        let url = server.url();
        let mut connection = PgConnection::connect(&url).await?;
        sqlx::raw_sql("create table t (n int); insert into t values (7)")
            .execute(&mut connection)
            .await?;

        server.kill();
        assert!(sqlx::query("select 1").execute(&mut connection).await.is_err());
        assert!(PgConnection::connect(&url).await.is_err());
        server.restart().await?;

        let mut connection = PgConnection::connect(&url).await?;
        let n: i32 = sqlx::query_scalar("select n from t").fetch_one(&mut connection).await?;
        assert_eq!(n, 7);
        let directory = server.directory.path().to_owned();
        let id = server.server.as_ref().map(Child::id).context("not running")?;
        drop(server);
        assert!(!directory.exists());
        assert!(!Path::new(&format!("/proc/{id}")).exists());
        Ok(())
    }

    #[tokio::test]
    async fn a_server_that_stays_killed_leaves_no_shared_memory() -> anyhow::Result<()> {
        let mut server = Postgres::start().await?;
        let status = std::fs::read_to_string(server.directory.path().join("data/postmaster.pid"))?;
        let segment = status.lines().nth(6).and_then(|line| line.split_whitespace().nth(1));
        let segment = segment.context("no segment")?.to_owned();
        let exists = || -> anyhow::Result<bool> {
            let segments = std::fs::read_to_string("/proc/sysvipc/shm")?;
            Ok(segments.lines().any(|line| line.split_whitespace().nth(1) == Some(&segment)))
        };
        assert!(exists()?);

        server.kill();
        drop(server);

        assert!(!exists()?);
        Ok(())
    }

    #[tokio::test]
    async fn databases_are_reached_over_tcp_and_over_the_socket() -> anyhow::Result<()> {
        let server = Postgres::start().await?;
        let other = server.create_database("other_1").await?;

        for (url, name) in
            [(server.url(), "vestibule"), (server.socket_url(), "vestibule"), (other, "other_1")]
        {
            let mut connection = PgConnection::connect(&url).await?;
            let database: String =
                sqlx::query_scalar("select current_database()").fetch_one(&mut connection).await?;
            assert_eq!(database, name);
        }
        Ok(())
    }

    #[tokio::test]
    async fn a_paused_server_answers_again_after_resume_and_can_be_dropped_while_paused()
    -> anyhow::Result<()> {
        let server = Postgres::start().await?;
        let mut connection = PgConnection::connect(&server.url()).await?;

        server.pause();
        let mut query = Box::pin(sqlx::query("select 1").execute(&mut connection));
        let silent = tokio::time::timeout(Duration::from_millis(300), &mut query).await;
        server.resume();

        assert!(silent.is_err(), "a paused server must not answer");
        query.await?;
        server.pause();
        Ok(())
    }
}
