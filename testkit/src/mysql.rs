//! A MariaDB of our own, for what speaks MySQL.

use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use sqlx::Connection as _;
use tempfile::TempDir;

use crate::child::{self, Child, Signal};
use crate::{eventually, free_port, tools, workdir};

const START_LIMIT: Duration = Duration::from_secs(30);

/// A MariaDB server, killed and removed when dropped.
///
/// It has no accounts: anyone who can reach it may do everything, whatever name and password they give.
/// It keeps its port and its data over [`kill`](Self::kill) and [`restart`](Self::restart).
#[derive(Debug)]
pub struct MySql {
    server: Option<Child>,
    port: u16,
    directory: TempDir,
}

impl MySql {
    /// An empty server, ready within a second or two.
    pub async fn start() -> anyhow::Result<Self> {
        let directory = workdir::create()?;
        std::fs::create_dir(directory.path().join("data"))?;
        let mut mysql = Self { server: None, port: 0, directory };
        for _ in 0..5 {
            mysql.port = free_port();
            match mysql.launch().await {
                Err(_) if mysql.log().contains("Address already in use") => {}
                outcome => return outcome.map(|()| mysql),
            }
        }
        bail!("could not find a port for MariaDB: {}", child::tail(&mysql.log_path()))
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// Creates an empty database and tells its URL.
    pub async fn create_database(&self, name: &str) -> anyhow::Result<String> {
        let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
        ensure!(name.chars().all(plain), "a test database is named in lower case: {name}");
        let mut connection = sqlx::MySqlConnection::connect(&self.url("")).await?;
        let statement =
            sqlx::AssertSqlSafe(format!("create database {name} character set utf8mb4"));
        sqlx::raw_sql(statement)
            .execute(&mut connection)
            .await
            .with_context(|| format!("could not create the test database {name}"))?;
        connection.close().await?;
        Ok(self.url(name))
    }

    /// What the server has written to its log so far, over all restarts.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(self.log_path()).unwrap_or_default()).into_owned()
    }

    pub fn kill(&mut self) {
        if let Some(mut server) = self.server.take() {
            server.kill();
        }
    }

    /// Starts it again on the same port and data; kills it first if it runs.
    pub async fn restart(&mut self) -> anyhow::Result<()> {
        self.kill();
        self.launch().await
    }

    /// Stops it in its tracks: connections stay open and nothing answers.
    pub fn pause(&self) {
        if let Some(server) = &self.server {
            server.halt();
        }
    }

    pub fn resume(&self) {
        if let Some(server) = &self.server {
            server.signal(Signal::CONT);
        }
    }

    /// Ready means: this very process says so in its log.
    async fn launch(&mut self) -> anyhow::Result<()> {
        let directory = self.directory.path();
        let before = self.log().len();
        let log = std::fs::File::options()
            .create(true)
            .append(true)
            .open(self.log_path())
            .context("could not open the log of MariaDB")?;
        let mut command = child::command(&tools::mariadbd()?, "KILL", None)?;
        // First of all, or it is none: files of the system are not ours to read.
        command.arg("--no-defaults").stdout(Stdio::null()).stderr(log);
        if rustix::process::geteuid().is_root() {
            command.arg("--user=root");
        }
        let mut set = |name: &str, value: &str| {
            command.arg(format!("--{name}={value}"));
        };
        set("datadir", &directory.join("data").to_string_lossy());
        set("socket", &directory.join("socket").to_string_lossy());
        set("pid-file", &directory.join("pid").to_string_lossy());
        set("tmpdir", &directory.to_string_lossy());
        set("bind-address", "127.0.0.1");
        set("port", &self.port.to_string());
        // No accounts need no system tables, so an empty directory will do.
        set("skip-grant-tables", "on");
        set("skip-name-resolve", "on");
        set("max-connections", "200");
        set("innodb-buffer-pool-size", "16M");
        set("innodb-log-file-size", "4M");
        set("innodb-data-file-path", "ibdata1:1M:autoextend");
        // What was committed survives a kill, though it would not survive a power cut.
        set("innodb-flush-log-at-trx-commit", "2");
        set("innodb-doublewrite", "off");
        // Machines for tests do not always let it.
        set("innodb-use-native-aio", "off");
        self.server = Some(child::spawn(command)?);

        let ready = eventually(START_LIMIT, "MariaDB is ready or ends", async || {
            let server = self.server.as_mut()?;
            if server.status().is_some() {
                return Some(false);
            }
            let log = std::fs::read(directory.join("mariadb.log")).ok()?;
            let ours = String::from_utf8_lossy(log.get(before..)?).into_owned();
            ours.contains("ready for connections").then_some(true)
        });
        if !ready.await? {
            self.server = None;
            bail!("MariaDB ended at once; {}", child::tail(&self.log_path()));
        }
        Ok(())
    }

    fn url(&self, database: &str) -> String {
        format!("mysql://vestibule@127.0.0.1:{}/{database}", self.port)
    }

    fn log_path(&self) -> PathBuf {
        self.directory.path().join("mariadb.log")
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use sqlx::MySqlConnection;

    use super::*;

    #[tokio::test]
    async fn a_killed_server_comes_back_and_leaves_nothing() -> anyhow::Result<()> {
        let mut server = MySql::start().await?;
        let url = server.create_database("shop").await?;
        let mut connection = MySqlConnection::connect(&url).await?;
        sqlx::raw_sql("create table t (n int); insert into t values (7)")
            .execute(&mut connection)
            .await?;

        server.kill();
        assert!(MySqlConnection::connect(&url).await.is_err());
        server.restart().await?;

        let mut connection = MySqlConnection::connect(&url).await?;
        let n: i32 = sqlx::query_scalar("select n from t").fetch_one(&mut connection).await?;
        assert_eq!(n, 7);
        let directory = server.directory.path().to_owned();
        let id = server.server.as_ref().map(Child::id).context("not running")?;
        drop(server);
        assert!(!directory.exists());
        assert!(!Path::new(&format!("/proc/{id}")).exists());
        Ok(())
    }
}
