//! The example over a real server with the rights that `nats.conf` gives.

use std::{process::Command, time::Duration};

use anyhow::ensure;
use uuid::Uuid;
use vestibule_testkit::{Nats, Process};
use vestibule_workers::{
    Subscriber, consumer_spec,
    events::{
        EventLog, JetStream, JetStreamConfig, NatsCredentials, PseudonymKey, Role, SignUpEvent,
    },
    sample_event,
};

const LIMIT: Duration = Duration::from_secs(30);

async fn connect(nats: &Nats, role: Role) -> anyhow::Result<JetStream> {
    let stream = JetStream::connect(JetStreamConfig {
        url: nats.url(),
        credentials: NatsCredentials::UserPassword {
            user: role.as_str().to_owned(),
            password: "secret".into(),
        },
        role,
        inbox_prefix: None,
        stream: "SIGNUPS".to_owned(),
        duplicate_window: Duration::from_secs(600),
        refusal_window: Duration::from_secs(30),
        retention: Duration::from_secs(86_400),
        max_bytes: 64 << 20,
        replicas: 1,
    })
    .await?;
    stream.connected().await;
    Ok(stream)
}

/// The sign-up of somebody new.
fn sign_up() -> SignUpEvent {
    let mut event = sample_event();
    event.id = Uuid::now_v7();
    event.sign_up.correlation_id = Some(event.id.to_string());
    let key = PseudonymKey::new(event.id.as_bytes().to_vec());
    event.person = key.person(&event.sign_up);
    event.fingerprint = key.fingerprint(&event.sign_up, &event.person);
    event
}

#[tokio::test]
async fn it_handles_each_event_once_and_says_what_is_missing() -> anyhow::Result<()> {
    let passwords = ["RELAY", "WORKER", "AUDITOR", "PROVISIONER"]
        .map(|role| (format!("VESTIBULE_NATS_{role}_PASSWORD"), "secret"));
    let passwords: Vec<_> = passwords.iter().map(|(name, value)| (name.as_str(), *value)).collect();
    let configuration = include_str!("../../../nats.conf");
    let nats = Nats::start_with_config_and_env(configuration, &passwords).await?;
    let provisioner = connect(&nats, Role::Provisioner).await?;
    provisioner.provision(&[]).await?;
    let relay = connect(&nats, Role::Relay).await?;
    let folder = tempfile::tempdir()?;
    let start = || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_rust-subscriber"));
        command.current_dir(folder.path()).env("NATS_URL", nats.url());
        Process::spawn(command.env("NATS_USER", "worker").env("NATS_PASSWORD", "secret"))
    };

    let without_consumer = start()?.wait(LIMIT).await?;
    ensure!(!without_consumer.status.success(), "it runs without a consumer");
    for words in ["the consumer welcome does not exist", "vestibule subscriber add welcome --nats"]
    {
        ensure!(without_consumer.stderr.contains(words), "{}", without_consumer.stderr);
    }

    provisioner.provision(&[consumer_spec("welcome", &Subscriber::default_settings())]).await?;
    let (first, second) = (sign_up(), sign_up());
    let mut running = start()?;
    for event in [&first, &second] {
        relay.append(event.clone()).await?;
        let welcome = format!("welcome, {}", event.person);
        running.wait_for_line(LIMIT, |line| line == welcome).await?;
    }
    let stopped = running.terminate(LIMIT).await?;
    ensure!(stopped.status.success(), "{}", stopped.stderr);

    let third = sign_up();
    relay.append(third.clone()).await?;
    let mut running = start()?;
    let welcome = format!("welcome, {}", third.person);
    running.wait_for_line(LIMIT, |line| line == welcome).await?;
    let again = running.stdout();
    ensure!(again.lines().eq([welcome.as_str()]), "what was done is done again: {again}");
    Ok(())
}
