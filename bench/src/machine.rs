//! The machine: what it is, and who uses how much of it.

use std::{fs, path::Path};

use anyhow::Context;
use serde::Serialize;

/// What a reader must know to judge the figures.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct Machine {
    pub(crate) cores: usize,
    pub(crate) processor: String,
    pub(crate) kernel: String,
    /// Of the folder that is written to.
    pub(crate) file_system: String,
    /// Of the last minute, before anything was measured.
    pub(crate) load: f64,
    /// Figures of another build say nothing.
    pub(crate) release_build: bool,
}

impl Machine {
    pub(crate) fn look(folder: &Path) -> anyhow::Result<Self> {
        let processors = read("/proc/cpuinfo")?;
        let processor = processors
            .lines()
            .find_map(|line| line.strip_prefix("model name")?.split_once(": "))
            .map_or("unknown", |(_, model)| model);
        let load = read("/proc/loadavg")?;
        Ok(Self {
            cores: std::thread::available_parallelism()?.get(),
            processor: processor.to_owned(),
            kernel: read("/proc/sys/kernel/osrelease")?.trim().to_owned(),
            file_system: file_system(&read("/proc/mounts")?, &folder.canonicalize()?),
            load: load.split(' ').next().and_then(|load| load.parse().ok()).unwrap_or_default(),
            release_build: !cfg!(debug_assertions),
        })
    }
}

/// The type of the file system that holds a path.
fn file_system(mounts: &str, path: &Path) -> String {
    mounts
        .lines()
        .filter_map(|line| {
            let mut fields = line.split(' ').skip(1);
            Some((fields.next()?, fields.next()?))
        })
        .filter(|(place, _)| path.starts_with(place))
        // Of two at one place the later hides the earlier.
        .max_by_key(|(place, _)| place.len())
        .map_or_else(|| "unknown".to_owned(), |(_, kind)| kind.to_owned())
}

/// Processor time used so far, in hundredths of a second.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Usage {
    server: u64,
    client: u64,
    /// By everybody, and by those whom the hypervisor gave our cores to.
    busy: u64,
    /// In all states, so that differences say how long that took.
    all: u64,
    cores: u64,
}

/// How many cores were busy, on average.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Spent {
    pub(crate) server: f64,
    pub(crate) client: f64,
    /// Everybody else, this machine's kernel included.
    pub(crate) others: f64,
}

impl Usage {
    pub(crate) fn now(server: u32) -> anyhow::Result<Self> {
        let total = read("/proc/stat")?;
        let total: Vec<u64> = total
            .lines()
            .next()
            .map(|line| line.split_ascii_whitespace().filter_map(|it| it.parse().ok()).collect())
            .unwrap_or_default();
        let [user, nice, system, idle, iowait, irq, softirq, steal, ..] = total[..] else {
            anyhow::bail!("could not read how busy the machine is");
        };
        let busy = user + nice + system + irq + softirq + steal;
        Ok(Self {
            server: of_process(&server.to_string())?,
            client: of_process("self")?,
            busy,
            all: busy + idle + iowait,
            cores: std::thread::available_parallelism()?.get() as u64,
        })
    }

    pub(crate) fn since(&self, before: &Self) -> Spent {
        let difference = |of: fn(&Self) -> u64| of(self).saturating_sub(of(before)) as f64;
        let cores = |ticks: f64| ticks * self.cores as f64 / difference(|it| it.all).max(1.0);
        let (server, client) = (difference(|it| it.server), difference(|it| it.client));
        let others = (difference(|it| it.busy) - server - client).max(0.0);
        Spent { server: cores(server), client: cores(client), others: cores(others) }
    }
}

fn of_process(id: &str) -> anyhow::Result<u64> {
    let text = read(&format!("/proc/{id}/stat"))?;
    // The name may hold anything, and ends with the last parenthesis.
    let fields = text.rsplit_once(") ").map_or("", |(_, fields)| fields);
    let field = |place| fields.split(' ').nth(place).and_then(|it| it.parse::<u64>().ok());
    let (user, system) = field(11).zip(field(12)).context("could not read a process's usage")?;
    Ok(user + system)
}

/// The most memory that a process held so far, in megabytes.
pub(crate) fn peak_memory(process: u32) -> anyhow::Result<f64> {
    let text = read(&format!("/proc/{process}/status"))?;
    let kilobytes = text
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB")?.parse().ok())
        .unwrap_or(0.0);
    Ok(kilobytes / 1024.0)
}

fn read(path: &str) -> anyhow::Result<String> {
    fs::read_to_string(path).with_context(|| format!("could not read {path}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_innermost_mount_holds_a_path() {
        let mounts = "/dev/a / ext4 rw 0 0\nnone /tmp tmpfs rw 0 0\n/dev/b /tmp/disk xfs rw 0 0\n";
        let of = |path: &str| file_system(mounts, Path::new(path));
        assert_eq!(of("/home"), "ext4");
        assert_eq!(of("/tmp/a"), "tmpfs");
        assert_eq!(of("/tmp/disk/a"), "xfs");
        assert_eq!(of("/tmpfile"), "ext4");
    }

    #[test]
    fn what_is_spent_adds_up_to_the_busy_time() {
        let usage = |server, client, busy, all| Usage { server, client, busy, all, cores: 2 };
        let spent = usage(150, 60, 350, 1400).since(&usage(50, 10, 150, 1000));
        let rounded = [spent.server, spent.client, spent.others].map(|it| (it * 100.0).round());
        assert_eq!(rounded, [50.0, 25.0, 25.0]);
    }
}
