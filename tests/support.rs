//! A Vestibule of a test's own: its binary, its folder, its ports.

use std::{
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, ensure};
use serde_json::Value;
use tempfile::TempDir;
use vestibule_testkit::Process;

pub(crate) const LIMIT: Duration = Duration::from_secs(60);
pub(crate) const EXAMPLE: &str = include_str!("../vestibule.toml");

/// The example configuration, on ports that the system chooses.
///
/// Its connector is patient: a machine that is busy with other things makes answers late, and not
/// others than were due. Tests of the deadline say one of their own.
pub(crate) fn example() -> String {
    EXAMPLE
        .replace("127.0.0.1:7171", "127.0.0.1:0")
        .replace("127.0.0.1:7172", "127.0.0.1:0")
        .replace("deadline = \"800ms\"", "deadline = \"10s\"")
}

/// A folder with a configuration in it, and commands that run there.
pub(crate) struct Site {
    folder: TempDir,
    environment: Vec<(String, String)>,
}

impl Site {
    /// [`example`] with `more` at its end.
    pub(crate) fn new(more: &str) -> anyhow::Result<Self> {
        Self::with_config(&format!("{}\n{more}", example()))
    }

    pub(crate) fn with_config(config: &str) -> anyhow::Result<Self> {
        let folder = tempfile::tempdir()?;
        std::fs::write(folder.path().join("vestibule.toml"), config)?;
        Ok(Self { folder, environment: Vec::new() })
    }

    pub(crate) fn set(&mut self, name: &str, value: &str) {
        self.environment.push((name.to_owned(), value.to_owned()));
    }

    pub(crate) fn path(&self) -> &Path {
        self.folder.path()
    }

    pub(crate) fn data(&self) -> PathBuf {
        self.path().join("data")
    }

    /// Writes a file, in one go as editors and deployments do: nobody sees half of it.
    pub(crate) fn write(&self, name: &str, text: &str) -> anyhow::Result<()> {
        let path = self.path().join(name);
        std::fs::create_dir_all(path.parent().context("a file lies in a folder")?)?;
        let new = path.with_extension("new");
        std::fs::write(&new, text)?;
        Ok(std::fs::rename(&new, &path)?)
    }

    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vestibule"));
        command.current_dir(self.path()).args(arguments);
        // Nothing from the machine of whoever runs the tests.
        for name in ["CONFIG", "DATA", "ADMIN", "LOG", "LOG_FORMAT"] {
            command.env_remove(format!("VESTIBULE_{name}"));
        }
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("OTEL_") {
                command.env_remove(name);
            }
        }
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        command
    }

    /// Runs a command to its end.
    pub(crate) async fn run(&self, arguments: &[&str]) -> anyhow::Result<Finished> {
        self.run_within(LIMIT, arguments).await
    }

    pub(crate) async fn run_within(
        &self,
        limit: Duration,
        arguments: &[&str],
    ) -> anyhow::Result<Finished> {
        let stopped = Process::spawn(&self.command(arguments))?.wait(limit).await?;
        Ok(Finished {
            code: stopped.status.code().context("ended by a signal")?,
            stdout: stopped.stdout,
            stderr: stopped.stderr,
        })
    }

    /// Starts `up` and waits until it answers.
    pub(crate) async fn up(&self) -> anyhow::Result<Up> {
        Up::of(Process::spawn(&self.command(&["up"]))?).await
    }

    /// The events so far, as `replay` prints them.
    pub(crate) async fn replay(&self, arguments: &[&str]) -> anyhow::Result<Vec<Value>> {
        let mut all = vec!["replay"];
        all.extend(arguments);
        let replay = self.run(&all).await?;
        ensure!(replay.code == 0, "replay failed: {}", replay.stderr);
        replay.stdout.lines().map(|line| Ok(serde_json::from_str(line)?)).collect()
    }
}

/// A command that has ended.
#[derive(Debug)]
pub(crate) struct Finished {
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

/// A running `up`.
pub(crate) struct Up {
    pub(crate) process: Process,
    /// `http://127.0.0.1:PORT`
    pub(crate) base: String,
    pub(crate) admin: String,
}

impl Up {
    /// Waits until it answers.
    pub(crate) async fn of(mut process: Process) -> anyhow::Result<Self> {
        let connector = process.wait_for_line(LIMIT, |line| line.contains("  connector  ")).await?;
        let admin = process.wait_for_line(LIMIT, |line| line.contains("  admin  ")).await?;
        let url = |line: &str| {
            let url = line.split_whitespace().nth(1).context("no address")?;
            anyhow::Ok(url.to_owned())
        };
        let connector = url(&connector)?;
        let base = connector.split("/connectors/").next().context("no address")?.to_owned();
        Ok(Self { process, base, admin: url(&admin)? })
    }

    pub(crate) async fn sign_up(&self, step: &str, body: &Value) -> anyhow::Result<(u16, Value)> {
        sign_up(&self.base, step, body).await
    }

    /// Where `simulate` is to call.
    pub(crate) fn connector(&self) -> String {
        format!("{}/connectors/partners", self.base)
    }

    /// The value of a series, 0 while there is none.
    pub(crate) async fn metric(&self, series: &str) -> anyhow::Result<f64> {
        let metrics = self.metrics().await?;
        let value = metrics.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
        value.map_or(Ok(0.0), |it| Ok(it.parse()?))
    }

    pub(crate) async fn metrics(&self) -> anyhow::Result<String> {
        Ok(http().get(format!("{}/metrics", self.admin)).send().await?.text().await?)
    }
}

/// A client for plain HTTP; it wants a provider of TLS all the same.
pub(crate) fn http() -> reqwest::Client {
    // Somebody else in the process may have been first.
    let _ = rustls::crypto::ring::default_provider().install_default();
    reqwest::Client::new()
}

/// One call of the platform, with the example's credential.
pub(crate) async fn sign_up(base: &str, step: &str, body: &Value) -> anyhow::Result<(u16, Value)> {
    let answer = http()
        .post(format!("{base}/connectors/partners/{step}"))
        .basic_auth("entra", Some("try-me"))
        .json(body)
        .send()
        .await?;
    Ok((answer.status().as_u16(), answer.json().await?))
}

/// What OpenMetrics asks of names, and the manual of ours.
pub(crate) fn assert_names_are_ours_and_stand_once(metrics: &str) {
    let families = metrics.lines().filter_map(|line| line.strip_prefix("# TYPE "));
    let mut names = std::collections::HashSet::new();
    for family in families {
        assert!(family.starts_with("vestibule_"), "{family}");
        assert!(names.insert(family), "stands twice: {family}");
    }
    assert!(!names.is_empty(), "no metrics at all");
}
