//! Welcomes everybody whose sign-up was accepted or approved.
//!
//! Several of it share the events of `welcome`. One that fails is tried again, and is a dead letter if
//! that does not help. It stops at SIGTERM or Ctrl-C, when what is in hand is done.

use std::{env, sync::Arc};

use vestibule_workers::{
    HandleError, Subscriber, Task, Worker, async_trait, events::NatsCredentials, store::StoreUrl,
};

#[derive(Debug)]
struct Welcome;

#[async_trait]
impl Worker for Welcome {
    /// Of its durable consumer, too.
    fn name(&self) -> &str {
        "welcome"
    }

    /// May be called again with the same event after a crash; `task.event.id` is the key by which
    /// another service would know that.
    async fn handle(&self, task: &Task) -> Result<(), HandleError> {
        println!("welcome, {}", task.event.person);
        Ok(())
    }
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    tracing_subscriber::fmt().with_writer(std::io::stderr).init();
    let nats = env::var("NATS_URL").unwrap_or_else(|_| "nats://127.0.0.1:4222".to_owned());
    let mut subscriber = Subscriber::new(nats, StoreUrl::Sqlite("welcome.db".into()));
    if let (Ok(user), Ok(password)) = (env::var("NATS_USER"), env::var("NATS_PASSWORD")) {
        let password = password.into();
        subscriber = subscriber.credentials(NatsCredentials::UserPassword { user, password });
    }
    subscriber.run(Arc::new(Welcome)).await
}
