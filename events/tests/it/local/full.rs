//! A disk that is full or read-only, really: a small file system of the test's own.

use std::{io::Read, path::Path, process::Command, time::Duration};

use anyhow::{Context, ensure};
use vestibule_events::{AppendError, EventLog, LocalLog, LocalLogConfig};
use vestibule_testkit::eventually;

use super::LocalPlace;
use crate::{contract::spec, sample::call};

const LIMIT: Duration = Duration::from_secs(30);

/// In the environment of the child: where its file system is to be.
const CHILD: &str = "FULL_DISK_OF_CHILD";
/// The same, where no file system may be mounted: then the size of files is limited.
const LIMITED: &str = "FULL_DISK_IS_A_LIMIT";

/// Mounts where nobody else sees it, and it goes with the process. What is written beyond a limit
/// must be an error, as on a full disk, and not the end of the process.
const SCRIPT: &str = r#"
    trap '' XFSZ
    mount -t tmpfs -o size=3m none "$FULL_DISK_OF_CHILD" 2>/dev/null || export FULL_DISK_IS_A_LIMIT=yes
    exec "$@"
"#;

/// Is its own child, in a mount name space of its own where the system allows that.
fn run_child(test: &str) -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let test_program = std::env::current_exe()?;
    let apart = Command::new("unshare").args(["--mount", "true"]).output();
    let mut command = if apart.is_ok_and(|it| it.status.success()) {
        let mut unshare = Command::new("unshare");
        unshare.arg("--mount");
        unshare
    } else {
        Command::new("env")
    };
    let status = command
        .args(["sh", "-c", SCRIPT, "sh"])
        .arg(test_program)
        .args([test, "--exact", "--nocapture"])
        .env(CHILD, folder.path())
        .status()?;
    ensure!(status.success(), "the child failed; it says why above");
    Ok(())
}

/// Takes the room away, and gives it back.
struct Room<'a>(&'a Path);

impl Room<'_> {
    fn is_limit() -> bool {
        std::env::var_os(LIMITED).is_some()
    }

    fn limit(size: &str) -> anyhow::Result<()> {
        let process = std::process::id().to_string();
        let done = Command::new("prlimit")
            .args(["--pid", &process, &format!("--fsize={size}:unlimited")])
            .status()?;
        ensure!(done.success(), "could not limit the size of files");
        Ok(())
    }

    fn take(&self) -> anyhow::Result<()> {
        if Self::is_limit() {
            return Self::limit("1000000");
        }
        // Up to the last byte: a write fails when it finds no room, not before.
        let mut ballast = std::fs::File::create(self.0.join("ballast"))?;
        let full = std::io::copy(&mut std::io::repeat(0).take(2_000_000), &mut ballast);
        full.map(drop).or_else(|error| match error.kind() {
            std::io::ErrorKind::StorageFull => Ok(()),
            _ => Err(error.into()),
        })
    }

    fn give_back(&self) -> anyhow::Result<()> {
        if Self::is_limit() {
            return Self::limit("unlimited");
        }
        Ok(std::fs::remove_file(self.0.join("ballast"))?)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn on_a_full_disk_nothing_is_accepted_and_it_goes_on_by_itself() -> anyhow::Result<()> {
    let Some(disk) = std::env::var_os(CHILD) else {
        return run_child(
            "local::full::on_a_full_disk_nothing_is_accepted_and_it_goes_on_by_itself",
        );
    };
    let disk = Path::new(&disk);
    let room = Room(disk);
    let path = disk.join("events.db");
    let log = LocalLog::open(LocalLogConfig { path, ..LocalPlace::new()?.config() }).await?;
    let mut stored = vec![log.append(call(0).event()).await?.stored];
    room.take()?;

    let mut error = None;
    for number in 1..5000 {
        match log.append(call(number).event()).await {
            Ok(appended) => stored.push(appended.stored),
            Err(failed) => {
                error = Some(failed);
                break;
            }
        }
    }
    let error = error.context("the disk never became full")?;
    // A limit is an error of the device to SQLite, of which nobody knows what it did.
    if !Room::is_limit() {
        ensure!(matches!(error, AppendError::NotStored(_)), "{error:?}");
        let said = format!("{error:?}");
        ensure!(said.contains("its disk is full") && said.contains("events.db"), "{said}");
    }
    let not_ready = log.ready().await.err().context("ready with a full disk")?;
    ensure!(format!("{not_ready:?}").contains("events.db"), "{not_ready:?}");
    // Reading goes on, and what was answered is there.
    ensure!(log.last_sequence() == stored.len() as u64);

    room.give_back()?;
    eventually(LIMIT, "the log finds out by itself", async || log.ready().await.map(|()| true))
        .await?;
    stored.push(log.append(call(9999).event()).await?.stored);
    let mut consumer = log.consumer(spec("worker")).await?;
    for expected in stored {
        let delivery = consumer.next().await?;
        delivery.acknowledge.ack().await?;
        let sequence = delivery.sequence;
        ensure!(sequence == expected.sequence, "{sequence} instead of {}", expected.sequence);
        ensure!(delivery.event? == expected.event, "another event with sequence {sequence}");
    }
    Ok(())
}

#[tokio::test]
async fn a_read_only_folder_is_named() -> anyhow::Result<()> {
    let Some(disk) = std::env::var_os(CHILD) else {
        return run_child("local::full::a_read_only_folder_is_named");
    };
    if Room::is_limit() {
        // Root may write where nobody may, and nothing could be mounted.
        return Ok(());
    }
    let path = Path::new(&disk).join("events.db");
    let config = LocalLogConfig { path, ..LocalPlace::new()?.config() };
    LocalLog::open(config.clone()).await?.close().await?;
    let remounted = Command::new("mount").args(["-o", "remount,ro"]).arg(&disk).status()?;
    ensure!(remounted.success());

    let error = LocalLog::open(config).await.err().context("was opened")?;

    let said = format!("{error:?}");
    ensure!(said.contains("events.db") && said.contains("Read-only"), "{said}");
    Ok(())
}
