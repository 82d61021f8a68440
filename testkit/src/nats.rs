//! A nats-server of our own.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, bail};
use tempfile::TempDir;

use crate::child::{self, Child, Signal};
use crate::{eventually, free_port, tools, workdir};

/// JetStream that has written to disk what it acknowledged, and nothing else.
const SAFE: &str = "jetstream { sync_interval: always }";

const START_LIMIT: Duration = Duration::from_secs(20);

/// A nats-server with JetStream, stopped and removed when dropped.
///
/// It keeps its port and its store over [`kill`](Self::kill) and [`restart`](Self::restart).
#[derive(Debug)]
pub struct Nats {
    // Before the directory: fields drop in order, and the server must not write into a removed one.
    child: Option<Child>,
    port: u16,
    environment: Vec<(String, String)>,
    arguments: Vec<String>,
    directory: TempDir,
}

impl Nats {
    /// JetStream with `sync_interval: always`, no authentication, monitoring on.
    pub async fn start() -> anyhow::Result<Self> {
        Self::start_with_config(SAFE).await
    }

    /// With this configuration file.
    ///
    /// The address, both ports and the store directory are ours and go before what the text says; so
    /// the configuration of a real installation can be given as it is.
    pub async fn start_with_config(text: &str) -> anyhow::Result<Self> {
        Self::start_with_config_and_env(text, &[]).await
    }

    /// The same, with values for the `$NAMES` in the text.
    pub async fn start_with_config_and_env(
        text: &str,
        environment: &[(&str, &str)],
    ) -> anyhow::Result<Self> {
        Self::start_with(text, environment, vec![]).await
    }

    /// Arguments win over the configuration.
    pub(crate) async fn start_with(
        text: &str,
        environment: &[(&str, &str)],
        arguments: Vec<String>,
    ) -> anyhow::Result<Self> {
        let directory = workdir::create()?;
        let text = without_store(text);
        std::fs::write(directory.path().join("nats.conf"), text)
            .context("could not write the configuration of nats-server")?;
        let environment =
            environment.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect();
        let mut server = Self { child: None, port: 0, environment, arguments, directory };

        for _ in 0..5 {
            server.port = free_port();
            match server.launch().await {
                Err(_) if server.log().contains("address already in use") => {}
                outcome => return outcome.map(|()| server),
            }
        }
        bail!("could not find a port for nats-server: {}", child::tail(&server.log_path()))
    }

    pub fn url(&self) -> String {
        format!("nats://127.0.0.1:{}", self.port)
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// The monitoring endpoint; another one after each restart.
    pub fn http_url(&self) -> anyhow::Result<String> {
        let ports = self.ports().context("nats-server is not running")?;
        let url = ports["monitoring"][0].as_str();
        url.map(str::to_owned).context("nats-server offers no monitoring")
    }

    pub fn store_dir(&self) -> PathBuf {
        self.directory.path().join("store")
    }

    /// What the server has written to its log so far, over all restarts.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(self.log_path()).unwrap_or_default()).into_owned()
    }

    /// SIGKILL: the process is gone when this returns, its store is as it was at that moment.
    pub fn kill(&mut self) {
        self.child = None;
    }

    /// SIGTERM, and waits for the end.
    pub fn stop(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.stop(Signal::TERM, Duration::from_secs(10));
        }
    }

    /// Starts it again on the same port and store; kills it first if it runs. Returns when it takes
    /// connections.
    pub async fn restart(&mut self) -> anyhow::Result<()> {
        self.kill();
        self.launch().await
    }

    /// Stops the process in its tracks: connections stay open and nothing answers.
    pub fn pause(&self) {
        if let Some(child) = &self.child {
            child.halt();
        }
    }

    pub fn resume(&self) {
        if let Some(child) = &self.child {
            child.signal(Signal::CONT);
        }
    }

    /// Ready means: this very process has written the file with the ports it listens on.
    async fn launch(&mut self) -> anyhow::Result<()> {
        let directory = self.directory.path();
        let log = std::fs::File::options()
            .create(true)
            .append(true)
            .open(self.log_path())
            .context("could not open the log of nats-server")?;
        let mut command = child::command(&tools::nats_server()?, "KILL", None)?;
        command
            .arg("--config")
            .arg(directory.join("nats.conf"))
            .args(["--addr", "127.0.0.1", "--port", &self.port.to_string(), "--http_port", "-1"])
            .arg("--store_dir")
            .arg(self.store_dir())
            .arg("--ports_file_dir")
            .arg(directory)
            .args(&self.arguments)
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .stdout(Stdio::null())
            .stderr(log);
        self.child = Some(child::spawn(command)?);

        let ready = eventually(START_LIMIT, "nats-server listens or ends", async || {
            let ended = self.child.as_mut().and_then(Child::status).is_some();
            if ended { Some(false) } else { self.ports().map(|_| true) }
        });
        if !ready.await? {
            self.child = None;
            bail!("nats-server ended at once; {}", child::tail(&self.log_path()));
        }
        Ok(())
    }

    fn ports(&self) -> Option<serde_json::Value> {
        let suffix = format!("_{}.ports", self.child.as_ref()?.id());
        let entries = std::fs::read_dir(self.directory.path()).ok()?;
        let file = entries
            .flatten()
            .map(|entry| entry.path())
            .find(|path| path.to_str().is_some_and(|path| path.ends_with(&suffix)))?;
        // A half-written file does not parse, and we look again.
        serde_json::from_slice(&std::fs::read(file).ok()?).ok()
    }

    fn log_path(&self) -> PathBuf {
        Path::join(self.directory.path(), "nats.log")
    }
}

/// The configuration without its store directory, which the server does not allow to be overridden.
///
/// Goes by lines, as the files of an installation do: the value ends with its line, or before a `,` or
/// `}`.
fn without_store(text: &str) -> String {
    let without = |line: &str| {
        let code = line.split(['#']).next().unwrap_or_default();
        let Some(start) = code.find("store_dir") else { return line.to_owned() };
        let end = code[start..].find([',', '}']).map_or(line.len(), |length| start + length);
        format!("{}{}", &line[..start], line[end..].trim_start_matches(','))
    };
    text.lines().map(without).map(|line| line + "\n").collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use async_nats::jetstream::{self, stream};

    async fn count_after_publish(server: &Nats) -> anyhow::Result<u64> {
        let context = jetstream::new(async_nats::connect(server.url()).await?);
        let config = stream::Config {
            name: "S".to_owned(),
            subjects: vec!["s.>".to_owned()],
            ..Default::default()
        };
        context.get_or_create_stream(config).await?;
        Ok(context.publish("s.a", "x".into()).await?.await?.sequence)
    }

    #[tokio::test]
    async fn a_killed_server_comes_back_on_its_port_with_its_store_and_leaves_nothing()
    -> anyhow::Result<()> {
        let mut server = Nats::start().await?;
        let url = server.url();
        assert_eq!(count_after_publish(&server).await?, 1);

        server.kill();
        assert!(async_nats::connect(&url).await.is_err());
        server.restart().await?;
        assert_eq!(server.url(), url);
        assert_eq!(count_after_publish(&server).await?, 2);
        assert!(server.http_url()?.starts_with("http://127.0.0.1:"));
        assert!(server.store_dir().join("jetstream").exists());

        let directory = server.directory.path().to_owned();
        let id = server.child.as_ref().map(Child::id).context("not running")?;
        drop(server);
        assert!(!directory.exists());
        assert!(!Path::new(&format!("/proc/{id}")).exists());
        Ok(())
    }

    #[tokio::test]
    async fn a_paused_server_answers_again_after_resume() -> anyhow::Result<()> {
        let server = Nats::start().await?;
        let client = async_nats::connect(server.url()).await?;
        let context = jetstream::new(client);

        server.pause();
        let silent =
            tokio::time::timeout(Duration::from_millis(300), context.query_account()).await;
        server.resume();

        assert!(silent.is_err(), "a paused server must not answer");
        context.query_account().await?;
        Ok(())
    }

    #[tokio::test]
    async fn the_address_ports_and_store_of_a_real_configuration_are_replaced() -> anyhow::Result<()>
    {
        let text = r#"
            listen: 0.0.0.0:4222
            http: 0.0.0.0:8222
            jetstream { store_dir: "/nowhere/at/all", sync_interval: always }
            authorization { users: [{ user: a, password: $SECRET }] }
        "#;
        let server = Nats::start_with_config_and_env(text, &[("SECRET", "s3cret")]).await?;

        assert!(async_nats::connect(server.url()).await.is_err());
        let options =
            async_nats::ConnectOptions::with_user_and_password("a".into(), "s3cret".into());
        options.connect(server.url()).await?;
        assert!(server.store_dir().exists());
        Ok(())
    }

    #[test]
    fn only_the_store_directory_is_taken_out_of_a_configuration() {
        let cases = [
            ("jetstream { store_dir: \"/a b\", max_mem: 1 }", "jetstream {  max_mem: 1 }"),
            ("jetstream { max_mem: 1, store_dir = data/js }", "jetstream { max_mem: 1, }"),
            ("  store_dir: /var/lib/nats # store_dir is big", "  "),
            ("  # store_dir: data", "  # store_dir: data"),
        ];
        for (text, expected) in cases {
            assert_eq!(without_store(text), format!("{expected}\n"));
        }
    }

    #[tokio::test]
    async fn a_bad_configuration_is_shown_in_the_error() {
        let error = Nats::start_with_config("jetstream {").await.unwrap_err();
        assert!(format!("{error:#}").contains("Parse error"), "{error:#}");
    }
}
