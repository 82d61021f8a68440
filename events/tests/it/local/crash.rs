//! A process killed in the middle of its work loses no append and no acknowledgement that returned.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{BufRead, BufReader, Write},
    process::{Command, Stdio},
    sync::Arc,
};

use anyhow::{Context, ensure};
use vestibule_events::{EventLog, LocalLog, LocalLogConfig};

use super::LocalPlace;
use crate::{
    contract::{Place, all, next, number, number_of, spec},
    sample::call,
};

/// In the environment of the child: where its log lies.
const CHILD: &str = "LOCAL_LOG_OF_CHILD";
const NAME: &str = "local::crash::a_killed_process_loses_nothing_that_returned";
const WRITERS: u64 = 16;

/// Is its own child, as nothing else is at hand that can be killed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_process_loses_nothing_that_returned() -> anyhow::Result<()> {
    if let Some(path) = std::env::var_os(CHILD) {
        return append_for_ever(path.into()).await;
    }
    let place = LocalPlace::new()?;
    let (mut returned, mut acknowledged) = (BTreeMap::new(), BTreeSet::new());
    for round in 0..3 {
        let mut child = Command::new(std::env::current_exe()?)
            .args([NAME, "--exact", "--nocapture"])
            .env(CHILD, place.path())
            .stdout(Stdio::piped())
            .spawn()?;
        let lines = BufReader::new(child.stdout.take().context("piped")?).lines();
        let (mut seen, mut killed) = (0, false);
        for line in lines {
            let line = line?;
            // The last line may have been cut off by the kill; the test runner prints some too.
            if let Some((number, _)) = parse(&line, "acknowledged ") {
                acknowledged.insert(number);
            }
            let Some((number, sequence)) = parse(&line, "appended ") else { continue };
            returned.insert(number, sequence);
            seen += 1;
            if seen == 300 && !killed {
                child.kill()?;
                killed = true;
            }
        }
        child.wait()?;
        ensure!(killed, "round {round}: the child ended by itself after {seen} appends");

        let log = place.open().await?;
        let stored: BTreeMap<_, _> =
            all(&log).await?.iter().map(|it| (number(&it.event), it.sequence)).collect();
        for (number, sequence) in &returned {
            ensure!(stored.get(number) == Some(sequence), "round {round}: lost {number}");
        }
        let mut consumer = log.consumer(spec("worker")).await?;
        let backlog = log.backlog("worker").await?.context("is there")?;
        for _ in 0..backlog.waiting + backlog.in_flight {
            let delivery = next(&mut consumer).await?;
            let number = number_of(&delivery)?;
            ensure!(acknowledged.insert(number), "round {round}: {number} came back");
            delivery.acknowledge.ack().await?;
        }
        // The child acknowledges one event after the other and then says so; killed in between, it
        // took one that we did not hear of, and no more.
        let unheard: Vec<_> = stored.keys().filter(|it| !acknowledged.contains(it)).collect();
        ensure!(unheard.len() <= 1, "round {round}: never delivered: {unheard:?}");
        acknowledged.extend(unheard);
        drop(consumer);
        // Closed in order, so that the next child finds the lock free.
        place.close().await?;
    }
    Ok(())
}

fn parse(line: &str, prefix: &str) -> Option<(u64, u64)> {
    let (number, sequence) = line.strip_prefix(prefix)?.strip_suffix('.')?.split_once(' ')?;
    Some((number.parse().ok()?, sequence.parse().ok()?))
}

async fn append_for_ever(path: std::path::PathBuf) -> anyhow::Result<()> {
    let config = LocalLogConfig { path, ..LocalPlace::new()?.config() };
    let log = Arc::new(LocalLog::open(config).await?);
    let first = log.last_sequence() * 1000;
    let mut writers = tokio::task::JoinSet::new();
    for writer in 0..WRITERS {
        let log = Arc::clone(&log);
        writers.spawn(async move {
            for turn in 0.. {
                let number = first + turn * WRITERS + writer;
                let stored = log.append(call(number).event()).await?.stored;
                let mut out = std::io::stdout().lock();
                writeln!(out, "appended {number} {}.", stored.sequence)?;
                out.flush()?;
            }
            anyhow::Ok(())
        });
    }
    let mut consumer = log.consumer(spec("worker")).await?;
    writers.spawn(async move {
        for turn in 0.. {
            let delivery = consumer.next().await?;
            if turn % 7 == 0 {
                // In hand when the process is killed.
                continue;
            }
            delivery.acknowledge.ack().await?;
            let mut out = std::io::stdout().lock();
            writeln!(out, "acknowledged {} {}.", number_of(&delivery)?, delivery.sequence)?;
            out.flush()?;
        }
        anyhow::Ok(())
    });
    while let Some(ended) = writers.join_next().await {
        ended??;
    }
    Ok(())
}
