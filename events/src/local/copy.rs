//! A copy of the log, made while it is appended to.
//!
//! In small steps, each of which reads for some milliseconds and syncs what it wrote: a long read
//! would keep the write-ahead log from starting over, and much unsynced data would hold up the syncs
//! of sign-ups on the same disk. Events do not change, so their copies need no common moment. How
//! far consumers are is copied when the caller says, and what it does thereafter may refer to any
//! event that a later step brings.

use std::{
    fs::File,
    path::{Path, PathBuf},
};

use anyhow::Context;
use sqlx::{Connection, SqliteConnection};
use tokio::task::spawn_blocking;

use super::{file, read::signed};
use crate::LogError;

/// Events in one step: about a megabyte.
const STEP: i64 = 1000;

/// How far ahead of a damaged place a readable one is looked for.
const GAP_MAX: u64 = 1 << 40;

/// A copy in the making. Whatever is not finished is not to be used.
#[derive(Debug)]
pub struct LogCopy {
    source: PathBuf,
    target: PathBuf,
    connection: SqliteConnection,
    /// The last event that was copied or passed over.
    through: u64,
    salvage: bool,
    lost: Vec<(u64, u64)>,
}

/// What is in a log that nobody writes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LogContents {
    /// The sequence of the youngest event there ever was.
    pub last_sequence: u64,
    pub events: u64,
    /// From where to where events could not be read. Of what is lost at the end it may be more.
    pub lost: Vec<(u64, u64)>,
}

impl LogCopy {
    /// Begins a copy of the log `source` in the new file `target`. With `salvage` it passes over what
    /// is damaged, and says so at the end.
    pub async fn begin(
        source: impl Into<PathBuf>,
        target: impl Into<PathBuf>,
        salvage: bool,
    ) -> Result<Self, LogError> {
        let (source, target) = (source.into(), target.into());
        file::existing_readers(&source).await?.close().await;
        let mut connection = file::copy_target(&target).await?;
        sqlx::query("attach ? as source")
            .bind(source.to_string_lossy().into_owned())
            .execute(&mut connection)
            .await
            .map_err(file::failed(&source))?;
        Ok(Self { source, target, connection, through: 0, salvage, lost: vec![] })
    }

    /// The last sequence that is there by now, to show how far the copy is.
    pub async fn length(&mut self) -> Result<u64, LogError> {
        let last: Option<i64> = sqlx::query_scalar("select max(sequence) from source.events")
            .fetch_one(&mut self.connection)
            .await
            .map_err(file::failed(&self.source))?;
        Ok(last.map_or(0, i64::cast_unsigned))
    }

    /// Copies some more of the events that are there by now, and says up to which; `None` once it has
    /// them all.
    pub async fn step(&mut self) -> Result<Option<u64>, LogError> {
        let copied = match self.copy_some().await {
            Err(error) if self.salvage && file::is_damage(&error) => self.salvage_some().await,
            other => other,
        };
        let through = copied.map_err(file::failed(&self.source))?;
        self.sync().await?;
        Ok(through)
    }

    async fn copy_some(&mut self) -> Result<Option<u64>, sqlx::Error> {
        let found: (Option<i64>, Option<i64>) = sqlx::query_as(
            "select min(sequence), max(sequence) from
                 (select sequence from source.events where sequence > ? order by sequence limit ?)",
        )
        .bind(signed(self.through))
        .bind(STEP)
        .fetch_one(&mut self.connection)
        .await?;
        let (Some(first), Some(end)) = found else { return Ok(None) };
        // Retention has removed some meanwhile, and a log has no gaps.
        if first.cast_unsigned() > self.through + 1 && !self.salvage {
            sqlx::query("delete from main.events").execute(&mut self.connection).await?;
        }
        self.copy_between(first.cast_unsigned(), end.cast_unsigned()).await?;
        self.through = end.cast_unsigned();
        Ok(Some(self.through))
    }

    async fn copy_between(&mut self, first: u64, end: u64) -> Result<(), sqlx::Error> {
        sqlx::query(
            "insert into main.events select sequence, event from source.events
             where sequence between ? and ?",
        )
        .bind(signed(first))
        .bind(signed(end))
        .execute(&mut self.connection)
        .await
        .map(drop)
    }

    /// Copies one event after the other, as far as a step goes, and passes over what is damaged.
    async fn salvage_some(&mut self) -> Result<Option<u64>, sqlx::Error> {
        for _ in 0..STEP {
            let next = match self.next(self.through + 1).await {
                Err(error) if file::is_damage(&error) => self.behind_damage().await?,
                other => other?,
            };
            let Some(next) = next else { return Ok(None) };
            match self.copy_between(next, next).await {
                Err(error) if file::is_damage(&error) => self.lose(next, next),
                other => other?,
            }
            self.through = next;
        }
        Ok(Some(self.through))
    }

    /// The first event from `from` on.
    async fn next(&mut self, from: u64) -> Result<Option<u64>, sqlx::Error> {
        let next: Option<i64> = sqlx::query_scalar(
            "select sequence from source.events where sequence >= ? order by sequence limit 1",
        )
        .bind(signed(from))
        .fetch_optional(&mut self.connection)
        .await?;
        Ok(next.map(i64::cast_unsigned))
    }

    /// The next event that can be read behind a place that cannot.
    async fn behind_damage(&mut self) -> Result<Option<u64>, sqlx::Error> {
        let from = self.through + 1;
        let (mut vain, mut step) = (from, 1);
        let found = loop {
            match self.next(from + step).await {
                Ok(found) => break found,
                Err(_) if step < GAP_MAX => (vain, step) = (from + step, step * 2),
                // All behind it is lost: how much that is, only those tell who have had it.
                Err(_) => break None,
            }
        };
        let Some(mut found) = found else {
            let passed: Option<i64> =
                sqlx::query_scalar("select max(cursor) - 1 from main.consumers")
                    .fetch_one(&mut self.connection)
                    .await?;
            self.lose(from, from.max(passed.map_or(0, i64::cast_unsigned)));
            return Ok(None);
        };
        let mut reached = from + step;
        while reached - vain > 1 {
            let middle = vain + (reached - vain) / 2;
            match self.next(middle).await {
                Ok(Some(nearer)) => (reached, found) = (middle, nearer),
                _ => vain = middle,
            }
        }
        self.lose(from, found - 1);
        Ok(Some(found))
    }

    /// Copies how far consumers are by now. Before whatever must not be behind them.
    pub async fn consumers(&mut self) -> Result<(), LogError> {
        let copy = "insert or replace into main.consumers select * from source.consumers";
        match self.run(copy).await {
            // Without its place a worker begins anew; its own book says what it has done.
            Err(LogError::Refused(_)) if self.salvage => Ok(()),
            other => other,
        }
    }

    /// Ends the copy, synced, and says what is in it.
    pub async fn finish(mut self) -> Result<LogContents, LogError> {
        // No sequence is given twice: not when all events were trimmed, and not when the last ones are
        // lost that a consumer has passed already.
        let kept = self
            .run(
                "insert or replace into main.trimmed select 1, max(
                     coalesce((select through from source.trimmed), 0),
                     coalesce((select max(cursor) - 1 from main.consumers), 0))",
            )
            .await;
        if !self.salvage {
            kept?;
        }
        self.sync().await?;
        let Self { connection, target, lost, .. } = self;
        connection.close().await.map_err(file::failed(&target))?;
        Ok(LogContents { lost, ..contents(&target).await? })
    }

    fn lose(&mut self, from: u64, through: u64) {
        match self.lost.last_mut() {
            // The same end may be come upon more than once.
            Some((_, end)) if *end + 1 >= from => *end = through.max(*end),
            _ => self.lost.push((from, through)),
        }
    }

    async fn run(&mut self, statement: &'static str) -> Result<(), LogError> {
        let done = sqlx::query(statement).execute(&mut self.connection).await;
        done.map(drop).map_err(file::failed(&self.source))
    }

    async fn sync(&self) -> Result<(), LogError> {
        let path = self.target.clone();
        let synced = spawn_blocking(move || File::open(path)?.sync_data()).await;
        synced
            .map_err(anyhow::Error::from)
            .and_then(|it| Ok(it?))
            .with_context(|| format!("could not sync {}", self.target.display()))
            .map_err(LogError::Unavailable)
    }
}

/// Looks through a whole log that nobody writes, such as a copy, for damage.
pub(super) async fn contents(path: &Path) -> Result<LogContents, LogError> {
    let mut connection = file::still(path).await?;
    let told: String = sqlx::query_scalar("pragma quick_check(1)")
        .fetch_one(&mut connection)
        .await
        .map_err(file::failed(path))?;
    if told != "ok" {
        return Err(LogError::Refused(anyhow::anyhow!("{} is damaged: {told}", path.display())));
    }
    let (last, events): (i64, i64) = sqlx::query_as(
        "select max(coalesce((select max(sequence) from events), 0),
                    coalesce((select through from trimmed), 0)),
                (select count(*) from events)",
    )
    .fetch_one(&mut connection)
    .await
    .map_err(file::failed(path))?;
    connection.close().await.map_err(file::failed(path))?;
    Ok(LogContents {
        last_sequence: last.cast_unsigned(),
        events: events.cast_unsigned(),
        lost: vec![],
    })
}
