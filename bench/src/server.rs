//! The servers under load, each in a process of its own: the real connector and a bare handler.
//!
//! A server prints its address and serves until its standard input ends; so it cannot outlive the
//! benchmark. Then it says what it stored.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    sync::Arc,
    time::Duration,
};

use anyhow::Context;
use axum::{Json, Router, response::IntoResponse, routing::post, serve::ListenerExt};
use clap::{Args, ValueEnum};
use prometheus_client::registry::Registry;
use serde::{Deserialize, Serialize};
use tokio::{net::TcpListener, runtime::Builder};
use tokio_util::sync::CancellationToken;
use vestibule_api::{
    Api, ConnectorSettings, Credential, CredentialKind, Decider, ServerLimits, router, serve,
};
use vestibule_events::{LocalLog, LocalLogConfig, Retention};

use crate::{
    cli::{Options, RuntimeKind},
    rules::{self, Extent},
    sample,
};

#[derive(Clone, Debug, Args)]
pub(crate) struct ServerArgs {
    #[arg(long)]
    pub(crate) kind: ServerKind,
    #[arg(long)]
    pub(crate) runtime: RuntimeKind,
    /// Entries of the long list.
    #[arg(long)]
    pub(crate) list: u64,
    /// Where the connector's log lies.
    #[arg(long)]
    pub(crate) folder: PathBuf,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum ServerKind {
    /// Parses the body into a struct and answers, the ceiling of everything that does more.
    Hello,
    /// The real connector, without rules.
    Connector,
    /// The real connector with the rules of the example configuration.
    ConnectorWithRules,
    /// The real connector with 25 rules, one that asks a long list and one that asks a lookup.
    ConnectorWithAll,
}

impl ServerKind {
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Hello => "hello",
            Self::Connector => "connector",
            Self::ConnectorWithRules => "connector, 3 rules",
            Self::ConnectorWithAll => "connector, 25 rules, list, lookup",
        }
    }
}

/// A server in a child process.
#[derive(Debug)]
pub(crate) struct Server {
    pub(crate) kind: ServerKind,
    pub(crate) address: SocketAddr,
    child: Child,
    /// Open as long as the server is to run.
    stdin: Option<ChildStdin>,
    stdout: BufReader<ChildStdout>,
}

/// What a connector stored in all, from its log's own metrics.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Stored {
    pub(crate) events: f64,
    pub(crate) commits: f64,
}

impl Server {
    pub(crate) fn start(
        kind: ServerKind,
        options: &Options,
        folder: &Path,
    ) -> anyhow::Result<Self> {
        let value = |it: Option<clap::builder::PossibleValue>| {
            it.map_or_else(String::new, |it| it.get_name().to_owned())
        };
        let program = std::env::current_exe().context("could not find the benchmark itself")?;
        let mut child = Command::new(program)
            .args(["serve", "--kind", &value(kind.to_possible_value())])
            .args(["--runtime", &value(options.runtime.to_possible_value())])
            .args(["--list", &options.list.to_string()])
            .arg("--folder")
            .arg(folder)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("could not start a server")?;
        let stdin = child.stdin.take();
        let mut stdout = BufReader::new(child.stdout.take().expect("it is piped"));
        let mut line = String::new();
        stdout.read_line(&mut line)?;
        let address = line.trim().parse().with_context(|| {
            format!("the {} server did not start; it says why above", kind.as_str())
        })?;
        Ok(Self { kind, address, child, stdin, stdout })
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Stops it and hears what it stored.
    pub(crate) fn stop(mut self) -> anyhow::Result<Stored> {
        drop(self.stdin.take());
        let mut text = String::new();
        self.stdout.read_to_string(&mut text)?;
        let status = self.child.wait()?;
        serde_json::from_str(&text).with_context(|| {
            format!("the {} server ended early ({status}); it says why above", self.kind.as_str())
        })
    }
}

impl Drop for Server {
    /// Also when the benchmark fails: the end of its input stops the server.
    fn drop(&mut self) {
        drop(self.stdin.take());
        let _ = self.child.wait();
    }
}

/// Runs one of the servers in this process.
pub(crate) fn run(args: &ServerArgs) -> anyhow::Result<()> {
    let mut runtime = match args.runtime {
        RuntimeKind::Threads => Builder::new_multi_thread(),
        RuntimeKind::Single => Builder::new_current_thread(),
    };
    let runtime = runtime.enable_all().build()?;
    let stored = runtime.block_on(async {
        // Loaded before anybody is told the address: a list takes a while.
        let decider = match args.kind {
            ServerKind::Hello => None,
            ServerKind::Connector => Some(Decider::default()),
            ServerKind::ConnectorWithRules => Some(Decider::new(rules::compiled(rules::few())?)),
            ServerKind::ConnectorWithAll => Some(
                rules::Facts::prepare(&args.folder, args.list).await?.decider(Extent::AndLookup)?,
            ),
        };
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        println!("{}", listener.local_addr()?);
        std::io::stdout().flush()?;
        let stop = stopped_with_input();
        match decider {
            None => hello(listener, stop).await.map(|()| Stored::default()),
            Some(decider) => connector(listener, &args.folder, decider, stop).await,
        }
    })?;
    println!("{}", serde_json::to_string(&stored)?);
    Ok(())
}

fn stopped_with_input() -> CancellationToken {
    let stop = CancellationToken::new();
    let stopping = stop.clone();
    std::thread::spawn(move || {
        let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
        stopping.cancel();
    });
    stop
}

async fn hello(listener: TcpListener, stop: CancellationToken) -> anyhow::Result<()> {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    #[expect(dead_code, reason = "to parse is all that is measured")]
    struct Form {
        email: String,
        identities: Vec<Identity>,
        display_name: String,
        given_name: String,
        surname: String,
        job_title: String,
        street_address: String,
        city: String,
        state: String,
        postal_code: String,
        country: String,
        step: String,
        #[serde(rename = "client_id")]
        client: String,
        #[serde(rename = "ui_locales")]
        locale: String,
    }

    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    #[expect(dead_code, reason = "to parse is all that is measured")]
    struct Identity {
        sign_in_type: String,
        issuer: String,
        issuer_assigned_id: String,
    }

    #[derive(Serialize)]
    struct Answer {
        version: &'static str,
        action: &'static str,
    }

    async fn answer(Json(form): Json<Form>) -> impl IntoResponse {
        std::hint::black_box(form);
        Json(Answer { version: "1.0.0", action: "Continue" })
    }

    let router = Router::new().route("/", post(answer));
    // The connector does this too; without it small answers may wait.
    let listener = listener.tap_io(|stream| {
        let _ = stream.set_nodelay(true);
    });
    axum::serve(listener, router).with_graceful_shutdown(stop.cancelled_owned()).await?;
    Ok(())
}

/// The connector as the binary runs it: authenticates, decides, and answers from the disk.
async fn connector(
    listener: TcpListener,
    folder: &Path,
    decider: Decider,
    stop: CancellationToken,
) -> anyhow::Result<Stored> {
    let log = LocalLog::open(local_log(folder, Retention::For(RETENTION))).await?;
    let name = sample::CONNECTOR.parse()?;
    let credential = Credential {
        name: sample::USER.to_owned(),
        kind: CredentialKind::Basic {
            user: sample::USER.to_owned(),
            password: sample::PASSWORD.into(),
        },
    };
    let settings = ConnectorSettings {
        credentials: vec![credential],
        decider,
        ..ConnectorSettings::new(name)
    };
    let mut registry = Registry::default();
    log.register(&mut registry);
    let key = Arc::new(sample::key());
    let api = Api::new(Arc::new(log.clone()), key, vec![settings], &mut registry)?;

    serve(listener, router(api), ServerLimits::default(), stop).await?;
    log.close().await?;
    let mut metrics = String::new();
    prometheus_client::encoding::text::encode(&mut metrics, &registry)?;
    Ok(Stored {
        events: metric(&metrics, "vestibule_log_group_events_sum")?,
        commits: metric(&metrics, "vestibule_log_group_events_count")?,
    })
}

/// The defaults of the configuration.
pub(crate) fn local_log(folder: &Path, retention: Retention) -> LocalLogConfig {
    LocalLogConfig {
        path: folder.join("events.db"),
        duplicate_window: Duration::from_secs(600),
        refusal_window: Duration::from_secs(30),
        retention,
    }
}

pub(crate) const RETENTION: Duration = Duration::from_secs(400 * 24 * 60 * 60);

fn metric(metrics: &str, name: &str) -> anyhow::Result<f64> {
    metrics
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok())
        .with_context(|| format!("the log has no metric {name}"))
}
