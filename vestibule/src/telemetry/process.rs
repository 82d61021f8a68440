//! What the system knows of this process, read whenever somebody asks for the metrics.

use std::{
    fmt, fs,
    time::{Duration, SystemTime},
};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::{counter::ConstCounter, gauge::ConstGauge, info::Info},
    registry::{Registry, Unit},
};

/// The unit of times in `/proc`: Linux counts them in hundredths of a second, whatever its own
/// clock does.
const TICKS_PER_SECOND: f64 = 100.0;

pub(super) fn register(registry: &mut Registry) {
    registry.register(
        "vestibule_build",
        "Version of Vestibule that runs; always 1",
        Info::new([("version", env!("CARGO_PKG_VERSION"))]),
    );
    let started = SystemTime::UNIX_EPOCH.elapsed().as_ref().map_or(0.0, Duration::as_secs_f64);
    registry.register_collector(Box::new(Process { started }));
}

#[derive(Debug)]
struct Process {
    started: f64,
}

impl Collector for Process {
    fn encode(&self, mut to: DescriptorEncoder) -> Result<(), fmt::Error> {
        let mut tell = |name, help, unit, metric: &dyn EncodeMetric| {
            let name = format!("vestibule_process_{name}");
            metric.encode(to.encode_descriptor(&name, help, unit, metric.metric_type())?)
        };
        // With a full stop, as the registry ends the others.
        let (seconds, bytes) = (Some(&Unit::Seconds), Some(&Unit::Bytes));
        let help = "When the process started, as Unix time.";
        tell("start_time", help, seconds, &ConstGauge::new(self.started))?;
        // What cannot be read is left out: on systems without /proc, all of it.
        if let Some(used) = cpu_seconds() {
            let help = "Time of processors that the process has used.";
            tell("cpu", help, seconds, &ConstCounter::new(used))?;
        }
        if let Some(held) = resident_bytes() {
            let help = "Memory that the process holds, without what is swapped out.";
            tell("resident_memory", help, bytes, &ConstGauge::new(held))?;
        }
        if let Some(open) = open_files() {
            let help = "Files and connections that the process has open.";
            tell("open_files", help, None, &ConstGauge::new(open))?;
        }
        if let Some(most) = open_files_most() {
            let help = "Files and connections that the process may have open.";
            tell("open_files_limit", help, None, &ConstGauge::new(most))?;
        }
        Ok(())
    }
}

fn cpu_seconds() -> Option<f64> {
    cpu_seconds_in(&fs::read_to_string("/proc/self/stat").ok()?)
}

/// The 14th and the 15th field; the second is a name in brackets, with anything in it.
fn cpu_seconds_in(stat: &str) -> Option<f64> {
    let mut after_the_name = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
    let user: f64 = after_the_name.next()?.parse().ok()?;
    let system: f64 = after_the_name.next()?.parse().ok()?;
    Some((user + system) / TICKS_PER_SECOND)
}

fn resident_bytes() -> Option<i64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let kilobytes = status.lines().find_map(|it| it.strip_prefix("VmRSS:"))?;
    let kilobytes: i64 = kilobytes.trim().strip_suffix(" kB")?.trim().parse().ok()?;
    kilobytes.checked_mul(1024)
}

fn open_files() -> Option<i64> {
    // Without the one that the reading itself opens.
    i64::try_from(fs::read_dir("/proc/self/fd").ok()?.count()).ok()?.checked_sub(1)
}

fn open_files_most() -> Option<i64> {
    let limits = fs::read_to_string("/proc/self/limits").ok()?;
    let of_files = limits.lines().find_map(|it| it.strip_prefix("Max open files"))?;
    of_files.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_of_processors_is_read_past_any_name() {
        let stat = "42 (a ) name) S 1 42 42 0 -1 4194560 900 0 0 0 123 45 0 0 20 0 4 0 7 8 9";
        assert_eq!(cpu_seconds_in(stat), Some(1.68));
        assert_eq!(cpu_seconds_in("42 (name) S 1"), None);
    }

    #[test]
    fn this_very_process_has_all_of_it() {
        let mut registry = Registry::default();
        register(&mut registry);
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        let value = |name: &str| -> f64 {
            let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
            line.unwrap_or_else(|| panic!("{name} is not in\n{text}")).parse().unwrap()
        };
        assert!(value("vestibule_process_start_time_seconds") > 1.7e9);
        assert!(value("vestibule_process_resident_memory_bytes") > 100_000.0);
        assert!(value("vestibule_process_open_files") >= 3.0);
        assert!(
            value("vestibule_process_open_files_limit") >= value("vestibule_process_open_files")
        );
        value("vestibule_process_cpu_seconds_total");
        assert!(text.contains("vestibule_build_info{version=\""), "{text}");
    }
}
