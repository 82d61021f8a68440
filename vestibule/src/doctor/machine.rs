//! The machine: the data folder, its disk, and the limit of open files.

use std::{
    fs,
    io::{self, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use rustix::{
    fs::{statfs, statvfs},
    process::{Resource, getrlimit, getuid},
};
use vestibule_api::ServerLimits;

use super::{Finding, about, mebibytes};
use crate::config::Config;

/// With less free space the next hours are in danger; with much less, the next minutes.
const FREE_WARNING: u64 = 2 << 30;
const FREE_CRITICAL: u64 = 256 << 20;

/// An answer waits for one sync. Platforms give a call two seconds at the most.
const SYNC_WARNING: Duration = Duration::from_millis(100);
const SYNC_CRITICAL: Duration = Duration::from_millis(1000);

/// A disk that hangs is a finding too.
const LIMIT: Duration = Duration::from_secs(10);

const SYNCS: usize = 5;

pub(super) async fn findings(config: &Config) -> Vec<Finding> {
    let folder = config.data.clone();
    let gathered = tokio::task::spawn_blocking(move || Facts::gather(&folder));
    let mut findings = match tokio::time::timeout(LIMIT, gathered).await {
        Ok(Ok(facts)) => judge(&facts),
        Ok(Err(_)) | Err(_) => vec![Finding::critical(
            "data.folder",
            format!("{} did not answer within {}", config.data.display(), about(LIMIT)),
            "see whether its disk or its network share is there (`df`, `dmesg`)",
        )],
    };
    findings.push(judge_open_files(
        getrlimit(Resource::Nofile).maximum,
        ServerLimits::default().max_connections,
    ));
    findings
}

#[derive(Clone, Debug)]
struct Facts {
    folder: PathBuf,
    /// `None` where there is no such folder yet.
    access: Option<Access>,
    /// The kind of file system, by the number that the kernel gives it, and its free bytes.
    disk: Result<(u64, u64), String>,
    /// How long each sync of a small file took.
    syncs: Result<Vec<Duration>, String>,
}

#[derive(Clone, Copy, Debug)]
struct Access {
    mode: u32,
    is_ours: bool,
}

impl Facts {
    fn gather(folder: &Path) -> Self {
        let access = fs::metadata(folder)
            .ok()
            .map(|it| Access { mode: it.mode() & 0o777, is_ours: it.uid() == getuid().as_raw() });
        // Where it does not exist yet, it will be made on the disk of the nearest one that does.
        let existing = folder.ancestors().find(|it| it.exists());
        let existing = existing.filter(|it| !it.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let disk = statfs(existing).and_then(|fs| {
            let space = statvfs(existing)?;
            // The type's width and sign depend on the platform; the numbers have 32 bits.
            let kind = u64::from(fs.f_type as u32);
            Ok((kind, space.f_bavail.saturating_mul(space.f_frsize)))
        });
        Self {
            folder: folder.to_owned(),
            access,
            disk: disk.map_err(|error| error.to_string()),
            syncs: syncs(existing).map_err(|error| error.to_string()),
        }
    }
}

/// As the log does it: a little is written, then the answer waits for the disk.
fn syncs(folder: &Path) -> io::Result<Vec<Duration>> {
    let path = folder.join(format!(".vestibule-doctor-{}", std::process::id()));
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path)?;
    let mut sync = || {
        file.write_all(&[0; 4096])?;
        let begun = Instant::now();
        file.sync_data()?;
        Ok(begun.elapsed())
    };
    let syncs = (0..SYNCS).map(|_| sync()).collect();
    fs::remove_file(&path)?;
    syncs
}

fn judge(facts: &Facts) -> Vec<Finding> {
    let folder = facts.folder.display();
    let mut findings = vec![match facts.access {
        None => Finding::warning(
            "data.folder",
            format!("{folder} does not exist; the first start makes it"),
            "if there should be data already, name its folder with `data` or --data",
        ),
        Some(Access { mode, .. }) if mode & 0o077 != 0 => Finding::warning(
            "data.folder",
            format!("{folder} may be entered by others (mode {mode:o}); personal data lies in it"),
            format!("chmod 700 {folder}"),
        ),
        Some(Access { is_ours: false, .. }) => Finding::warning(
            "data.folder",
            format!("{folder} belongs to another user"),
            "run this as the user of the processes",
        ),
        Some(_) => Finding::ok("data.folder", format!("{folder} is for this user alone")),
    }];
    match &facts.disk {
        Ok((kind, free)) => findings.extend([judge_file_system(*kind), judge_space(*free)]),
        Err(error) => findings.push(Finding::critical(
            "data.disk",
            format!("could not look at the disk of {folder}: {error}"),
            "see whether it is mounted and may be entered",
        )),
    }
    findings.push(match &facts.syncs {
        Ok(syncs) => judge_syncs(syncs),
        Err(error) => Finding::critical(
            "data.sync",
            format!("could not write in {folder}: {error}; no event can be stored"),
            format!("make it writable for this user, with room on its disk: ls -ld {folder}; df {folder}"),
        ),
    });
    findings
}

/// Whether what is synced there stays, and whether locks hold.
fn judge_file_system(kind: u64) -> Finding {
    let name = "data.file-system";
    let memory = "it lies in memory: a restart of the machine loses every event that was answered";
    let container = "it is the container's own layer: with the container goes the data";
    match kind {
        0x0102_1994 | 0x8584_58f6 => Finding::warning(
            name,
            memory,
            "put `data` on a disk, or set log.answer_after = \"stream\"",
        ),
        0x794c_7630 => Finding::warning(name, container, "mount a volume at the data folder"),
        0x6969 | 0xff53_4d42 | 0xfe53_4d42 | 0x0102_1997 | 0x517b => Finding::critical(
            name,
            "it is a network share: locks and syncs of SQLite do not hold there",
            "put `data` on a disk of this machine",
        ),
        0x6573_5546 => Finding::warning(
            name,
            "it is in user space (FUSE); whether locks and syncs hold depends on the program",
            "put `data` on a disk of this machine",
        ),
        _ => Finding::ok(name, "a disk, as far as can be seen"),
    }
}

fn judge_space(free: u64) -> Finding {
    let name = "data.space";
    let found = format!("{} free", mebibytes(free));
    let remedy = "make room: a full disk stops sign-ups (log.on_storage_failure says how)";
    match free {
        ..FREE_CRITICAL => Finding::critical(name, found, remedy),
        FREE_CRITICAL..FREE_WARNING => Finding::warning(name, found, remedy),
        _ => Finding::ok(name, found),
    }
}

fn judge_syncs(syncs: &[Duration]) -> Finding {
    let name = "data.sync";
    let mut sorted = syncs.to_vec();
    sorted.sort_unstable();
    let middle = sorted.get(sorted.len() / 2).copied().unwrap_or_default();
    let found = format!("the disk syncs within {middle:.1?}");
    let remedy = "every answer waits for one sync: use a faster disk, or one with less to do";
    if middle >= SYNC_CRITICAL {
        Finding::critical(name, found, remedy)
    } else if middle >= SYNC_WARNING {
        Finding::warning(name, found, remedy)
    } else {
        Finding::ok(name, found)
    }
}

/// The limit that a process can raise itself to; `None` is no limit.
fn judge_open_files(limit: Option<u64>, connections: usize) -> Finding {
    let name = "machine.open-files";
    // A quarter is left for the log, the store, and what workers and lookups talk to.
    let needed = u64::try_from(connections).unwrap_or(u64::MAX) / 3 * 4;
    match limit {
        Some(limit) if limit < needed => Finding::warning(
            name,
            format!("at most {limit} open files; {connections} connections need about {needed}"),
            "raise it where processes are started: LimitNOFILE=65536 (systemd), or `ulimit -Hn 65536`",
        ),
        Some(limit) => Finding::ok(name, format!("at most {limit} open files")),
        None => Finding::ok(name, "no limit of open files"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::finding::State::{self, Critical, Ok as Fine, Warning};
    use super::*;

    fn facts(access: Option<Access>) -> Facts {
        Facts {
            folder: "data".into(),
            access,
            disk: Ok((0xef53, 100 << 30)),
            syncs: Ok(vec![Duration::from_millis(1)]),
        }
    }

    fn state(findings: &[Finding], check: &str) -> State {
        findings.iter().find(|it| it.check == check).unwrap().state
    }

    #[test]
    fn a_folder_is_private() {
        let folder =
            |mode, is_ours| state(&judge(&facts(Some(Access { mode, is_ours }))), "data.folder");
        assert_eq!(folder(0o700, true), Fine);
        assert_eq!([folder(0o755, true), folder(0o750, true), folder(0o700, false)], [Warning; 3]);
        assert_eq!(state(&judge(&facts(None)), "data.folder"), Warning);
    }

    #[test]
    fn a_folder_that_cannot_be_written_or_looked_at_is_critical() {
        let mut facts = facts(Some(Access { mode: 0o700, is_ours: true }));
        facts.syncs = Err("read-only file system".into());
        facts.disk = Err("stale file handle".into());
        let findings = judge(&facts);
        assert_eq!(state(&findings, "data.sync"), Critical);
        assert_eq!(state(&findings, "data.disk"), Critical);
    }

    #[test]
    fn what_is_synced_must_stay() {
        for (kind, expected) in [
            (0xef53, Fine),          // ext4
            (0x5846_5342, Fine),     // xfs
            (0x0102_1994, Warning),  // tmpfs
            (0x794c_7630, Warning),  // overlayfs
            (0x6969, Critical),      // nfs
            (0xfe53_4d42, Critical), // smb2
        ] {
            assert_eq!(judge_file_system(kind).state, expected, "{kind:#x}");
        }
    }

    #[test]
    fn space_and_time_have_limits() {
        let states =
            [FREE_CRITICAL - 1, FREE_CRITICAL, FREE_WARNING].map(|it| judge_space(it).state);
        assert_eq!(states, [Critical, Warning, Fine]);
        let syncs = |slow: u64| {
            let times = [1, 1, slow, slow, slow].map(Duration::from_millis);
            judge_syncs(&times).state
        };
        assert_eq!([99, 100, 1000].map(syncs), [Fine, Warning, Critical]);
    }

    #[test]
    fn open_files_suffice_for_connections() {
        let state = |limit| judge_open_files(limit, 9_000).state;
        assert_eq!([state(Some(11_999)), state(Some(12_000)), state(None)], [Warning, Fine, Fine]);
    }

    #[test]
    fn a_real_folder_is_looked_at_and_left_as_it_was() {
        let folder = tempfile::tempdir().unwrap();
        let facts = Facts::gather(folder.path());
        assert_eq!(facts.syncs.unwrap().len(), SYNCS);
        assert!(facts.disk.unwrap().1 > 0);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
        assert!(Facts::gather(&folder.path().join("none/yet")).access.is_none());
    }
}
