//! What appends feel of the log's own care: a copy being made, old events being removed.
//!
//! One append after the other at a steady rate, as a connector has them on an ordinary day, each with
//! its fsync; first alone, then beside a copy of the whole log, then beside the removal of all old
//! events and the return of their room.

use std::{path::Path, sync::Arc, time::Duration};

use anyhow::ensure;
use serde::Serialize;
use time::OffsetDateTime;
use tokio::{
    task::JoinSet,
    time::{Instant, sleep},
};
use vestibule_events::{EventLog, LocalLog, LogCopy, Retention};

use crate::{
    cli::UpkeepArgs,
    open_loop::{Latencies, at_rate},
    sample,
    server::{RETENTION, local_log},
};

/// Tasks that fill the log, so that many events share an fsync.
const FILLERS: u64 = 128;

/// As the open log has it between two steps of its own.
const BREATH: Duration = Duration::from_millis(5);

#[derive(Debug, Serialize)]
pub(crate) struct Row {
    pub(crate) beside: &'static str,
    pub(crate) appends: usize,
    pub(crate) p50_ms: f64,
    pub(crate) p99_ms: f64,
    pub(crate) max_ms: f64,
    /// How long the care took; as long as was asked where there was none.
    pub(crate) seconds: f64,
}

pub(crate) fn measure(args: &UpkeepArgs, folder: &Path) -> anyhow::Result<Vec<Row>> {
    let runtime = tokio::runtime::Runtime::new()?;
    runtime.block_on(async {
        let log = LocalLog::open(local_log(folder, Retention::For(RETENTION))).await?;
        eprintln!("upkeep: filling the log with {} old events", args.events);
        fill(&log, u64::from(args.events)).await?;
        let measured = Beside { args, log: &log };
        let length = Duration::from_secs_f64(args.seconds);

        let nothing = measured.row("nothing", 0, async {
            sleep(length).await;
            Ok(())
        });
        let mut rows = vec![nothing.await?];
        let path = folder.join("events.db");
        let copying = measured.row("a copy", 1, async {
            let mut copy = LogCopy::begin(&path, folder.join("copy.db"), false).await?;
            copy.consumers().await?;
            while copy.step().await?.is_some() {}
            let copied = copy.finish().await?.events;
            ensure!(copied >= u64::from(args.events), "only {copied} events were copied");
            Ok(())
        });
        rows.push(copying.await?);
        let trimming = measured.row("removal", 2, async {
            let mut removed = 0;
            while let step @ 1.. = log.trim(OffsetDateTime::now_utc()).await? {
                removed += step;
                sleep(BREATH).await;
            }
            ensure!(removed == u64::from(args.events), "{removed} events were removed");
            while log.shrink().await? > 0 {
                sleep(BREATH).await;
            }
            Ok(())
        });
        rows.push(trimming.await?);
        log.close().await?;
        Ok(rows)
    })
}

async fn fill(log: &LocalLog, count: u64) -> anyhow::Result<()> {
    let mut fillers = JoinSet::new();
    for filler in 0..FILLERS {
        let log = log.clone();
        fillers.spawn(async move {
            let key = sample::key();
            let long_ago = OffsetDateTime::now_utc() - RETENTION * 2;
            let mut person = filler;
            while person < count {
                let mut event = sample::event(&key, person);
                event.time = long_ago;
                log.append(event).await?;
                person += FILLERS;
            }
            anyhow::Ok(())
        });
    }
    while let Some(done) = fillers.join_next().await {
        done??;
    }
    Ok(())
}

struct Beside<'a> {
    args: &'a UpkeepArgs,
    log: &'a LocalLog,
}

impl Beside<'_> {
    /// Appends for as long as the work beside it takes.
    async fn row(
        &self,
        beside: &'static str,
        turn: u64,
        work: impl Future<Output = anyhow::Result<()>>,
    ) -> anyhow::Result<Row> {
        eprintln!("upkeep: beside {beside}");
        let begun = Instant::now();
        let key = Arc::new(sample::key());
        let mut latencies = vec![];
        let mut second = 0;
        let appending = async {
            loop {
                // None is taken for a repeat of another.
                let first = 100_000_000 * (turn + 1) + 1_000_000 * second;
                second += 1;
                let appends = at_rate(self.args.rate, Duration::from_secs(1), |number, due| {
                    let (log, event) = (self.log.clone(), sample::event(&key, first + number));
                    async move { log.append(event).await.map(|_| due.elapsed()) }
                });
                match appends.await {
                    Ok(appends) => latencies.extend(appends),
                    Err(error) => return error,
                }
            }
        };
        tokio::select! {
            worked = work => worked?,
            error = appending => return Err(error),
        }
        let seconds = begun.elapsed().as_secs_f64();
        let latencies: Latencies = latencies.into_iter().collect::<Result<_, _>>()?;
        Ok(Row {
            beside,
            appends: latencies.count(),
            p50_ms: latencies.ms(0.5),
            p99_ms: latencies.ms(0.99),
            max_ms: latencies.ms(1.0),
            seconds,
        })
    }
}
