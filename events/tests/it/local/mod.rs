//! The local log: what every log promises, and what only this one does.

mod copy;
mod crash;
mod damage;
mod faults;
mod full;
mod model;
mod processes;
mod trimming;

use std::{path::PathBuf, sync::Arc, time::Duration};

use anyhow::Context;
use async_trait::async_trait;
use sqlx::{Connection, SqliteConnection, sqlite::SqliteConnectOptions};
use tempfile::TempDir;
use vestibule_events::{EventLog, LocalLog, LocalLogConfig, Retention};

use crate::contract::{DUPLICATE_WINDOW, Place, REFUSAL_WINDOW};

/// A directory with a log in it, gone when dropped.
pub(crate) struct LocalPlace {
    directory: TempDir,
    opened: std::sync::Mutex<Option<LocalLog>>,
}

impl LocalPlace {
    pub(crate) fn new() -> anyhow::Result<Self> {
        Ok(Self { directory: tempfile::tempdir()?, opened: std::sync::Mutex::default() })
    }

    /// Closes what was opened last.
    pub(crate) async fn close(&self) -> anyhow::Result<()> {
        let opened = self.opened.lock().expect("no test panics here").take();
        Ok(opened.context("nothing is open")?.close().await?)
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.directory.path().join("data/events.db")
    }

    pub(crate) fn config(&self) -> LocalLogConfig {
        LocalLogConfig {
            path: self.path(),
            duplicate_window: DUPLICATE_WINDOW,
            refusal_window: REFUSAL_WINDOW,
            retention: Retention::For(Duration::from_secs(400 * 86_400)),
        }
    }
}

/// A connection to do to a log what no log does.
async fn sqlite(place: &LocalPlace) -> anyhow::Result<SqliteConnection> {
    let options = SqliteConnectOptions::new().filename(place.path());
    Ok(SqliteConnection::connect_with(&options).await?)
}

#[async_trait]
impl Place for LocalPlace {
    async fn empty() -> anyhow::Result<Self> {
        Self::new()
    }

    async fn open(&self) -> anyhow::Result<Arc<dyn EventLog>> {
        let log = LocalLog::open(self.config()).await?;
        *self.opened.lock().expect("no test panics here") = Some(log.clone());
        Ok(Arc::new(log))
    }

    async fn restart(&self, log: Arc<dyn EventLog>) -> anyhow::Result<Arc<dyn EventLog>> {
        drop(log);
        self.close().await?;
        self.open().await
    }
}

mod contract {
    contract!(super::LocalPlace);
}
