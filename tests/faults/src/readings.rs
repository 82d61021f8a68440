//! What is left after a run: the archive and the store, read without the product's code.

use std::{collections::HashMap, fs::File, io::BufRead as _, io::BufReader, path::Path};

use anyhow::Context as _;
use serde::Deserialize;
use sqlx::{PgPool, SqlitePool, sqlite::SqliteConnectOptions};
use uuid::Uuid;

use crate::{
    journal::{Entry, Step},
    plan::Worker,
};

/// Everything that the checker compares.
#[derive(Clone, Debug, Default)]
pub struct Readings {
    /// The platform's, in the order of its lines.
    pub journal: Vec<Entry>,
    pub events: Vec<Event>,
    pub effects: Vec<Effect>,
    /// Dead letters that are parked.
    pub parked: Vec<(Worker, Uuid)>,
    /// What is still to be tried again.
    pub waiting: Vec<(Worker, Uuid)>,
    /// The idempotency keys of all notifications in the store, sent or not, and those under which
    /// subscribers are told.
    pub keys: Vec<String>,
    /// How often the target, or the command, was told, by key.
    pub told: HashMap<String, u64>,
}

/// An event, as far as it matters here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    pub id: Uuid,
    pub kind: String,
    /// `None` where it is none that we call at.
    pub step: Option<Step>,
    pub email: String,
    /// The event whose account this one says to be there, or given up.
    pub closes: Option<Uuid>,
}

/// One thing that a worker did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Effect {
    pub worker: Worker,
    pub what: &'static str,
    pub event: Uuid,
    /// Where somebody else was told: under which key.
    pub key: Option<String>,
}

/// Reads what `vestibule replay` printed.
pub(crate) fn events(file: &Path) -> anyhow::Result<Vec<Event>> {
    #[derive(Deserialize)]
    struct CloudEvent {
        id: Uuid,
        r#type: String,
        data: Data,
    }
    #[derive(Deserialize)]
    struct Data {
        step: serde_json::Value,
        #[serde(default)]
        email: String,
        #[serde(default)]
        confirmation: Option<Confirmation>,
    }
    #[derive(Deserialize)]
    struct Confirmation {
        of: Uuid,
    }
    let file = BufReader::new(File::open(file)?);
    let of_line = |line: std::io::Result<String>| {
        let CloudEvent { id, r#type, data } = serde_json::from_str(&line?)?;
        let kind = r#type.rsplit('.').next().unwrap_or_default().to_owned();
        let step = serde_json::from_value(data.step).ok();
        let closes = data.confirmation.map(|it| it.of);
        anyhow::Ok(Event { id, kind, step, email: data.email, closes })
    };
    file.lines().map(of_line).collect::<anyhow::Result<_>>().context("not what replay prints")
}

/// Reads the ids that the command wrote, a line each.
pub(crate) fn lines(file: &Path) -> anyhow::Result<HashMap<String, u64>> {
    let mut lines = HashMap::new();
    for line in std::fs::read_to_string(file).context("the command has written nothing")?.lines() {
        *lines.entry(line.to_owned()).or_default() += 1;
    }
    Ok(lines)
}

/// What the worker `confirm` did is seen in the archive.
pub(crate) fn closings(events: &[Event]) -> impl Iterator<Item = Effect> {
    events.iter().filter_map(|it| {
        let (worker, what) = (Worker::Confirm, "closing event");
        Some(Effect { worker, what, event: it.closes?, key: None })
    })
}

/// The business database, of either dialect.
#[derive(Debug)]
pub(crate) enum Database {
    Postgres(PgPool),
    Sqlite(SqlitePool),
}

/// How far the workers are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Progress {
    /// Events that the slowest worker has done or parked.
    pub(crate) dealt_with: u64,
    /// Events that wait for another try, of all workers, or to be brought to the log.
    pub(crate) waiting: u64,
}

impl Database {
    pub(crate) async fn postgres(url: &str) -> anyhow::Result<Self> {
        Ok(Self::Postgres(PgPool::connect(url).await?))
    }

    pub(crate) async fn sqlite(file: &Path) -> anyhow::Result<Self> {
        let options = SqliteConnectOptions::new().filename(file).read_only(true);
        Ok(Self::Sqlite(SqlitePool::connect_with(options).await?))
    }

    pub(crate) async fn progress(&self) -> anyhow::Result<Progress> {
        let mut dealt_with = u64::MAX;
        for (worker, done) in [
            (Worker::Database, "SELECT count(DISTINCT event_id) FROM sign_ups"),
            (Worker::Permissions, "SELECT count(DISTINCT event_id) FROM grant_sets"),
            (Worker::Notify, "SELECT count(*) FROM notifications WHERE state = 'sent'"),
            (Worker::Hook, "SELECT count(*) FROM inbox WHERE worker = 'hook'"),
            (Worker::Script, "SELECT count(*) FROM inbox WHERE worker = 'script'"),
            (Worker::Confirm, "SELECT count(*) FROM confirmations WHERE state <> 'waiting'"),
        ] {
            let parked = self.parked().await?.iter().filter(|it| it.0 == worker).count() as u64;
            dealt_with = dealt_with.min(self.count(done).await? + parked);
        }
        let waiting = self.count("SELECT count(*) FROM retries").await?
            + self.count("SELECT count(*) FROM outbox").await?;
        Ok(Progress { dealt_with, waiting })
    }

    pub(crate) async fn effects(&self) -> anyhow::Result<Vec<Effect>> {
        let mut effects = Vec::new();
        for (worker, what, sql) in [
            (Worker::Database, "sign-up", "SELECT event_id, '' FROM sign_ups"),
            (Worker::Database, "person change", "SELECT event_id, '' FROM person_changes"),
            (Worker::Permissions, "grant set", "SELECT event_id, '' FROM grant_sets"),
            (
                Worker::Notify,
                "notification",
                "SELECT event_id, idempotency_key FROM notifications WHERE state = 'sent'",
            ),
            (Worker::Hook, "delivery", "SELECT event_id, '' FROM inbox WHERE worker = 'hook'"),
            (Worker::Script, "delivery", "SELECT event_id, '' FROM inbox WHERE worker = 'script'"),
        ] {
            effects.extend(self.rows(sql).await?.into_iter().map(|(event, key)| {
                let key = if worker == Worker::Notify { Some(key) } else { worker.key(event) };
                Effect { worker, what, event, key }
            }));
        }
        Ok(effects)
    }

    pub(crate) async fn parked(&self) -> anyhow::Result<Vec<(Worker, Uuid)>> {
        self.of_workers("SELECT event_id, worker FROM dead_letters WHERE state = 'parked'").await
    }

    pub(crate) async fn waiting(&self) -> anyhow::Result<Vec<(Worker, Uuid)>> {
        self.of_workers("SELECT event_id, worker FROM retries").await
    }

    pub(crate) async fn keys(&self) -> anyhow::Result<Vec<String>> {
        let rows = self.rows("SELECT event_id, idempotency_key FROM notifications").await?;
        Ok(rows.into_iter().map(|(_, key)| key).collect())
    }

    async fn of_workers(&self, sql: &'static str) -> anyhow::Result<Vec<(Worker, Uuid)>> {
        let named = |(event, name): (Uuid, String)| {
            let worker = Worker::ALL.into_iter().find(|it| it.as_str() == name);
            Ok((worker.with_context(|| format!("there is no worker {name}"))?, event))
        };
        self.rows(sql).await?.into_iter().map(named).collect()
    }

    async fn rows(&self, sql: &'static str) -> anyhow::Result<Vec<(Uuid, String)>> {
        let rows: Result<Vec<(Option<Uuid>, String)>, _> = match self {
            Self::Postgres(pool) => sqlx::query_as(sql).fetch_all(pool).await,
            Self::Sqlite(pool) => sqlx::query_as(sql).fetch_all(pool).await,
        };
        let rows = rows.with_context(|| format!("could not read the store: {sql}"))?;
        // A letter of bytes that are no event has no id; here it is of an event that there is not.
        Ok(rows.into_iter().map(|(event, name)| (event.unwrap_or_default(), name)).collect())
    }

    async fn count(&self, sql: &'static str) -> anyhow::Result<u64> {
        let count: i64 = match self {
            Self::Postgres(pool) => sqlx::query_scalar(sql).fetch_one(pool).await?,
            Self::Sqlite(pool) => sqlx::query_scalar(sql).fetch_one(pool).await?,
        };
        Ok(count.unsigned_abs())
    }
}
