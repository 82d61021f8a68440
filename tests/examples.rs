//! The examples of subscribers in other languages, against a real NATS server, as users with the permissions that
//! the AsyncAPI document says are enough: each event is handled once, whatever is killed, and nothing disappears.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
    path::{Path, PathBuf},
    process::Command,
    sync::{Arc, Mutex, PoisonError},
};

use anyhow::{Context, ensure};
use async_nats::jetstream::{self, consumer::pull};
use axum::{
    Router,
    extract::State,
    http::{HeaderMap, StatusCode, header},
    routing::post,
};
use serde_json::{Value, json};
use sqlx::{ConnectOptions as _, Connection as _, SqliteConnection, sqlite::SqliteConnectOptions};
use tempfile::TempDir;
use tokio::{net::TcpListener, sync::mpsc};
use tokio_util::sync::CancellationToken;
use vestibule_events::NatsCredentials;
use vestibule_store::StoreUrl;
use vestibule_testkit::{Process, eventually, node, packages, python};
use vestibule_workers::{HandleError, Subscriber, Task, Worker, async_trait};

use crate::{
    scaled_out::Stack,
    subscribers::granted,
    support::{LIMIT, http},
};

const NAME: &str = "crm";
const PASSWORD: &str = "crm-secret";

fn example(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples").join(name)
}

/// `nats.conf` with one user more: the permissions of the AsyncAPI document, and no others.
fn nats_conf() -> anyhow::Result<String> {
    let document: Value = serde_json::from_str(include_str!("../events/asyncapi.json"))?;
    let permissions = &document["operations"]["publishSignUps"]["x-permissions"];
    let allowed = |what: &str| permissions[what].to_string().replace("{consumer}", NAME);
    let user = format!(
        "{{ user: {NAME}, password: \"{PASSWORD}\", permissions {{ \
           publish {{ allow: {} }}, subscribe {{ allow: {} }} }} }}\n",
        allowed("publish"),
        allowed("subscribe"),
    );
    let users = "users: [\n";
    let conf = include_str!("../nats.conf");
    ensure!(conf.matches(users).count() == 1, "one list of users");
    Ok(conf.replace(users, &format!("{users}{user}")))
}

/// A stack with an `api`, a consumer for the subscriber, and a folder for what it keeps.
struct Subscribed {
    stack: Stack,
    base: String,
    folder: TempDir,
    _api: Process,
}

impl Subscribed {
    async fn start() -> anyhow::Result<Self> {
        let stack = Stack::start_with(&nats_conf()?, "").await?;
        stack.migrate().await?;
        let (api, base) = stack.api(&[]).await?;
        let this = Self { stack, base, folder: tempfile::tempdir()?, _api: api };
        let consumer = pull::Config {
            durable_name: Some(NAME.to_owned()),
            filter_subject: "signups.*.accepted".to_owned(),
            // Whoever was killed gives its event up soon.
            ack_wait: std::time::Duration::from_secs(3),
            ..pull::Config::default()
        };
        this.client("provisioner").await?.create_consumer_on_stream(consumer, "SIGNUPS").await?;
        Ok(this)
    }

    async fn client(&self, role: &str) -> anyhow::Result<jetstream::Context> {
        let options = async_nats::ConnectOptions::with_user_and_password(
            role.to_owned(),
            format!("{role}-secret"),
        );
        let options = options.custom_inbox_prefix(format!("_INBOX_{role}"));
        Ok(jetstream::new(options.connect(self.stack.nats.url()).await?))
    }

    /// Everybody's sign-up is accepted.
    async fn sign_up(&self, people: std::ops::Range<usize>) -> anyhow::Result<()> {
        sign_up(&self.base, people).await
    }

    /// The ids of all accepted sign-ups.
    async fn accepted(&self) -> anyhow::Result<BTreeSet<String>> {
        // It fails over the poison, after it has printed the others.
        let replay = self.stack.site.run(&["replay", "--kind", "accepted"]).await?;
        let ids = replay.stdout.lines().map(|line| {
            let event: Value = serde_json::from_str(line)?;
            Ok(event["id"].as_str().context("no id")?.to_owned())
        });
        ids.collect()
    }

    /// What no subscriber can make sense of.
    async fn publish_poison(&self) -> anyhow::Result<()> {
        let relay = self.client("relay").await?;
        relay
            .publish("signups.partners.accepted", "{\"specversion\":\"1.0\"}".into())
            .await?
            .await?;
        Ok(())
    }

    /// The environment of the subscriber, in its folder.
    fn set_up(&self, command: &mut Command) {
        command
            .current_dir(self.folder.path())
            .env("NATS_URL", self.stack.nats.url())
            .env("CONSUMER", NAME)
            .env("NATS_PASSWORD", PASSWORD);
    }

    /// What was parked, by why.
    fn parked(&self) -> anyhow::Result<Vec<Value>> {
        let path = self.folder.path().join("parked.jsonl");
        let text = if path.exists() { std::fs::read_to_string(path)? } else { String::new() };
        text.lines().map(|line| Ok(serde_json::from_str(line)?)).collect()
    }

    /// Waits until the consumer has nothing left.
    async fn wait_until_done(&self) -> anyhow::Result<()> {
        let auditor = self.client("auditor").await?;
        eventually(LIMIT, "the consumer has nothing left", async || -> anyhow::Result<bool> {
            let stream = auditor.get_stream_no_info("SIGNUPS").await?;
            let info = stream.consumer_info(NAME).await?;
            Ok(info.num_pending == 0 && info.num_ack_pending == 0)
        })
        .await
    }
}

async fn sign_up(base: &str, people: std::ops::Range<usize>) -> anyhow::Result<()> {
    let url = format!("{base}/connectors/partners/before-create");
    let client = http();
    for n in people {
        let person = json!({ "email": format!("person-{n}@example.com") });
        let call = client.post(&url).basic_auth("entra", Some("try-me")).json(&person);
        let answer: Value = call.send().await?.error_for_status()?.json().await?;
        ensure!(answer["action"] == "Continue", "{answer}");
    }
    Ok(())
}

async fn started(command: &Command) -> anyhow::Result<Process> {
    let mut process = Process::spawn(command)?;
    process.wait_for_line(LIMIT, |line| line.contains("taking events of crm")).await?;
    Ok(process)
}

/// No personal data in what the example writes.
fn assert_discreet(process: &Process) {
    let said = process.stdout() + &process.stderr();
    assert!(!said.contains("example.com"), "{said}");
}

#[tokio::test]
async fn the_python_subscriber_handles_each_event_once() -> anyhow::Result<()> {
    let mut this = Subscribed::start().await?;
    let mut command = Command::new(python()?);
    command.arg(example("python-subscriber").join("subscriber.py"));
    command.env("PYTHONPATH", packages("nats-py")?).env("PYTHONDONTWRITEBYTECODE", "1");
    this.set_up(&mut command);
    let database = this.folder.path().join("people.db");
    let open = async || -> anyhow::Result<SqliteConnection> {
        Ok(SqliteConnectOptions::new().filename(&database).connect().await?)
    };
    let handled = async || -> anyhow::Result<i64> {
        let mut database = open().await?;
        let count =
            sqlx::query_scalar("SELECT count(*) FROM handled").fetch_one(&mut database).await;
        database.close().await?;
        Ok(count?)
    };

    // Killed in the midst of it, it goes on where it was.
    let mut subscriber = started(&command).await?;
    this.sign_up(0..60).await?;
    eventually(LIMIT, "some are handled", async || -> anyhow::Result<bool> {
        Ok(handled().await? >= 5)
    })
    .await?;
    subscriber.kill();
    assert_discreet(&subscriber);

    // While its database is locked events are tried again later, and while NATS is away it waits.
    let mut subscriber = started(&command).await?;
    let mut lock = open().await?;
    sqlx::query("BEGIN IMMEDIATE").execute(&mut lock).await?;
    this.sign_up(60..70).await?;
    this.publish_poison().await?;
    subscriber
        .wait_for_line(LIMIT, |line| line.contains("failed for now (OperationalError)"))
        .await?;
    sqlx::query("ROLLBACK").execute(&mut lock).await?;
    lock.close().await?;
    this.stack.nats.kill();
    this.stack.nats.restart().await?;
    this.sign_up(70..80).await?;

    let accepted = eventually(LIMIT, "80 sign-ups are in the stream", async || {
        let accepted = this.accepted().await?;
        anyhow::Ok((accepted.len() == 80).then_some(accepted))
    })
    .await?;
    eventually(2 * LIMIT, "all are handled", async || -> anyhow::Result<bool> {
        Ok(handled().await? >= 80 && !this.parked()?.is_empty())
    })
    .await?;
    this.wait_until_done().await?;
    let stopped = subscriber.terminate(LIMIT).await?;

    assert!(stopped.status.success() && stopped.stdout.contains("stopped"), "{stopped:?}");
    let mut rows = open().await?;
    let ids: Vec<String> =
        sqlx::query_scalar("SELECT id FROM handled").fetch_all(&mut rows).await?;
    assert_eq!(ids.into_iter().collect::<BTreeSet<_>>(), accepted);
    let events: Vec<i64> =
        sqlx::query_scalar("SELECT events FROM people").fetch_all(&mut rows).await?;
    assert_eq!(events, [1; 80], "each took effect once");
    rows.close().await?;
    // Parked twice where the word of the first time got lost with the server.
    assert!(this.parked()?.iter().all(|it| it["why"] == "not an event: KeyError"));
    assert_discreet(&subscriber);
    Ok(())
}

/// A service that does what it is asked to once for each key, and is moody.
#[derive(Default)]
struct Service {
    /// How often each key came.
    calls: Mutex<BTreeMap<String, usize>>,
    refused: Mutex<Option<String>>,
}

async fn serve(
    State(service): State<Arc<Service>>,
    headers: HeaderMap,
) -> (StatusCode, [(header::HeaderName, &'static str); 1]) {
    let answer = |status| (status, [(header::RETRY_AFTER, "1")]);
    let Some(key) = headers.get("idempotency-key").and_then(|it| it.to_str().ok()) else {
        return answer(StatusCode::BAD_REQUEST);
    };
    let mut calls = service.calls.lock().unwrap_or_else(PoisonError::into_inner);
    let number = calls.len();
    let count = calls.entry(key.to_owned()).or_default();
    *count += 1;
    let first = *count == 1;
    drop(calls);
    let mut refused = service.refused.lock().unwrap_or_else(PoisonError::into_inner);
    if refused.as_deref() == Some(key) || (number == 7 && first) {
        *refused = Some(key.to_owned());
        answer(StatusCode::UNPROCESSABLE_ENTITY)
    } else if number % 10 == 3 && first {
        answer(StatusCode::SERVICE_UNAVAILABLE)
    } else {
        answer(StatusCode::OK)
    }
}

/// Compiles the example where its packages are: Node.js looks for them beside the program.
async fn compiled(folder: &Path) -> anyhow::Result<PathBuf> {
    let packages = packages("node/examples/typescript-subscriber")?.join("node_modules");
    let source = example("typescript-subscriber");
    std::fs::create_dir(folder.join("src"))?;
    for file in ["src/main.ts", "tsconfig.json", "package.json"] {
        std::fs::copy(source.join(file), folder.join(file))?;
    }
    std::os::unix::fs::symlink(&packages, folder.join("node_modules"))?;
    let mut compiler = Command::new(node()?);
    compiler.arg(packages.join("typescript/bin/tsc")).current_dir(folder);
    let compiled = Process::spawn(&compiler)?.wait(3 * LIMIT).await?;
    ensure!(compiled.status.success(), "{}", compiled.stdout);
    Ok(folder.join("dist/main.js"))
}

#[tokio::test]
async fn the_typescript_subscriber_hands_each_event_on_once() -> anyhow::Result<()> {
    let mut this = Subscribed::start().await?;
    let program = tempfile::tempdir()?;
    let service = Arc::<Service>::default();
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    let url = format!("http://{}/", listener.local_addr()?);
    let routes = Router::new().route("/", post(serve)).with_state(Arc::clone(&service));
    tokio::spawn(async move { axum::serve(listener, routes).await });
    let calls = || service.calls.lock().unwrap_or_else(PoisonError::into_inner).clone();
    let mut command = Command::new(node()?);
    command.arg(compiled(program.path()).await?).env("TARGET_URL", &url);
    this.set_up(&mut command);

    let mut subscriber = started(&command).await?;
    this.sign_up(0..40).await?;
    eventually(LIMIT, "some are handed on", async || calls().len() >= 12).await?;
    subscriber.kill();
    assert_discreet(&subscriber);

    let mut subscriber = started(&command).await?;
    this.publish_poison().await?;
    this.stack.nats.kill();
    this.stack.nats.restart().await?;
    this.sign_up(40..50).await?;

    let accepted = eventually(LIMIT, "50 sign-ups are in the stream", async || {
        let accepted = this.accepted().await?;
        anyhow::Ok((accepted.len() == 50).then_some(accepted))
    })
    .await?;
    eventually(2 * LIMIT, "all are handed on", async || -> anyhow::Result<bool> {
        Ok(calls().len() == 50 && this.parked()?.len() >= 2)
    })
    .await?;
    this.wait_until_done().await?;
    let stopped = subscriber.terminate(LIMIT).await?;

    assert!(stopped.status.success() && stopped.stdout.contains("stopped"), "{stopped:?}");
    let calls = calls();
    assert_eq!(calls.keys().cloned().collect::<BTreeSet<_>>(), accepted);
    assert!(calls.values().any(|count| *count > 1), "those that failed for now came again");
    let whys: BTreeSet<_> = this.parked()?.iter().map(|it| it["why"].to_string()).collect();
    assert_eq!(
        whys.into_iter().collect::<Vec<_>>(),
        ["\"not an event: something is missing\"", "\"the service answered 422\""]
    );
    let refused = service.refused.lock().unwrap_or_else(PoisonError::into_inner).clone();
    let refused = refused.context("nothing was refused")?;
    let parked = this.parked()?;
    assert!(parked.iter().any(|it| it["event"].as_str().is_some_and(|it| it.contains(&refused))));
    assert_discreet(&subscriber);
    Ok(())
}

/// Tells whom it was given.
#[derive(Debug)]
struct Welcome(mpsc::UnboundedSender<String>);

#[async_trait]
impl Worker for Welcome {
    fn name(&self) -> &str {
        "welcome"
    }

    async fn handle(&self, task: &Task) -> Result<(), HandleError> {
        self.0.send(task.event.id.to_string()).ok();
        Ok(())
    }
}

#[tokio::test]
async fn the_rust_library_works_as_the_user_that_a_subscriber_is_granted() -> anyhow::Result<()> {
    let (configuration, password) = granted("welcome").await?;
    let stack = Stack::start_with(&configuration, "").await?;
    stack.site.write("subscribers/welcome.toml", "[nats]\n")?;
    stack.migrate().await?;
    let (_api, base) = stack.api(&[]).await?;
    let folder = tempfile::tempdir()?;
    let store = StoreUrl::Sqlite(folder.path().join("welcome.db"));
    let user = NatsCredentials::UserPassword { user: "welcome".into(), password: password.into() };
    let subscriber = Subscriber::new(stack.nats.url(), store).credentials(user);
    let (tell, mut told) = mpsc::unbounded_channel();
    let stop = CancellationToken::new();

    sign_up(&base, 0..5).await?;
    let running = tokio::spawn(subscriber.run_until(Arc::new(Welcome(tell)), stop.clone()));
    let mut welcomed = BTreeSet::new();
    while welcomed.len() < 5 {
        let next = tokio::time::timeout(LIMIT, told.recv()).await.context("nobody comes")?;
        let next = next.context("the subscriber has ended")?;
        assert!(welcomed.insert(next), "nobody is welcomed twice");
    }
    eventually(LIMIT, "all are acknowledged", async || -> anyhow::Result<bool> {
        let lag = stack.site.run(&["subscriber", "lag", "welcome", "--output", "json"]).await?;
        let lag: Value = serde_json::from_str(&lag.stdout)?;
        Ok(lag[0]["waiting"] == 0 && lag[0]["in_hand"] == 0)
    })
    .await?;
    stop.cancel();
    tokio::time::timeout(LIMIT, running).await.context("it does not stop")???;
    assert!(told.recv().await.is_none(), "nobody is welcomed twice");
    Ok(())
}
