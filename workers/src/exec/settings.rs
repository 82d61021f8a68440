//! Which command is run, how, and with what.

use std::{
    collections::HashSet,
    env,
    ffi::{OsStr, OsString},
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    time::Duration,
};

use secrecy::SecretString;

use crate::{SettingError, WorkerSettings};

/// A command that is given events.
#[derive(Clone, Debug)]
pub struct ExecSettings {
    /// Of the worker, and so of its durable consumer.
    pub name: String,
    /// The program and its arguments, as they are: no shell reads them.
    pub command: Vec<String>,
    pub mode: ExecMode,
    /// How long it may take over an event: less than an attempt of the worker, see
    /// [`ExecSettings::timeout_within`].
    pub timeout: Duration,
    /// What its environment holds beside [`ExecSettings::INHERITED`] and what tells it of the event.
    pub environment: Vec<(String, SecretString)>,
    /// Where it runs; `None` is where this process does.
    pub directory: Option<PathBuf>,
    /// So much is kept of what it writes to each of its outputs for an event; the rest is read and
    /// forgotten. In long-running mode no answer may be longer.
    pub output_bytes_max: usize,
}

/// How a command is given its events.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExecMode {
    /// Started for each event, which it reads from its standard input; its exit code is the answer.
    PerEvent,
    /// Started once. It reads an event a line, and writes an answer a line, in any order.
    LongRunning,
}

impl ExecSettings {
    /// What a command takes over of our own environment, where it is set. Nothing else: the secrets
    /// in there are ours.
    pub const INHERITED: &'static [&'static str] =
        &["PATH", "HOME", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "TMPDIR"];

    pub const OUTPUT_BYTES_MAX: usize = 64 * 1024;

    /// Stopping a command that does not want to stop takes less than this.
    pub const STOPPING: Duration = Duration::from_secs(5);

    /// How long a command may take within an attempt of the worker that takes `attempt`
    /// ([`WorkerSettings::timeout`](crate::WorkerSettings)), so that one that hangs is asked to stop,
    /// and not cut off by the runtime.
    #[must_use]
    pub fn timeout_within(attempt: Duration) -> Duration {
        attempt - Self::STOPPING.min(attempt / 2)
    }

    /// A command for each event, with the time that an attempt has by default.
    #[must_use]
    pub fn new(name: impl Into<String>, command: Vec<String>) -> Self {
        Self {
            name: name.into(),
            command,
            mode: ExecMode::PerEvent,
            timeout: Self::timeout_within(WorkerSettings::default().timeout),
            environment: Vec::new(),
            directory: None,
            output_bytes_max: Self::OUTPUT_BYTES_MAX,
        }
    }

    /// What is wrong with them, all at once. A program that is missing is not among it: it may be
    /// there when it is wanted, see [`ExecSettings::find_program`].
    ///
    /// # Errors
    ///
    /// A complaint for each setting that cannot be used.
    pub fn check(&self) -> Result<(), Vec<SettingError>> {
        let mut complaints = Vec::new();
        let mut complain = |key, message: String| complaints.push(SettingError { key, message });
        match self.command.first() {
            None => complain("command", "needs a program, such as [\"/usr/bin/true\"]".into()),
            Some(program) if program.is_empty() => {
                complain("command", "begins with the program, which must not be empty".into());
            }
            Some(_) => {}
        }
        if self.command.iter().any(|it| it.contains('\0')) {
            complain("command", "must not contain the character NUL".into());
        }
        if self.timeout.is_zero() {
            complain("timeout", "must be longer than nothing".into());
        }
        if !(256..=16 * 1024 * 1024).contains(&self.output_bytes_max) {
            complain("output_bytes_max", "must be from 256 to 16777216".into());
        }
        if self.directory.as_ref().is_some_and(|it| it.as_os_str().is_empty()) {
            complain("directory", "must not be empty".into());
        }
        let mut names = HashSet::new();
        for (name, _) in &self.environment {
            if name.is_empty() || name.contains(['=', '\0']) {
                complain("environment", format!("`{name}` cannot be the name of a variable"));
            } else if name.starts_with(OURS) {
                complain("environment", format!("`{name}` is set by Vestibule itself"));
            } else if !names.insert(name) {
                complain("environment", format!("`{name}` is set twice"));
            }
        }
        if complaints.is_empty() { Ok(()) } else { Err(complaints) }
    }

    /// Whether the program can be found and run on this machine now, as far as its file tells.
    ///
    /// # Errors
    ///
    /// What is amiss, for whoever sets it up.
    pub fn find_program(&self) -> Result<PathBuf, SettingError> {
        let complaint = |key, message| SettingError { key, message };
        let directory = self.directory.as_deref().unwrap_or(Path::new(""));
        if !directory.as_os_str().is_empty() && !directory.is_dir() {
            let message = format!("there is no folder {}", directory.display());
            return Err(complaint("directory", message));
        }
        let program = self.command.first().map_or("", String::as_str);
        let path = env::var_os("PATH").unwrap_or_default();
        let candidates = candidates(program, directory, &path);
        let found: Vec<_> = candidates.iter().filter(|it| it.is_file()).collect();
        match found.iter().find(|it| is_executable(it)) {
            Some(file) => Ok((**file).clone()),
            None if found.is_empty() => {
                let place = if program.contains('/') { "" } else { " on the PATH" };
                Err(complaint("command", format!("there is no program `{program}`{place}")))
            }
            None => Err(complaint(
                "command",
                format!("`{program}` is not executable; `chmod +x` makes it so"),
            )),
        }
    }
}

/// How the names of variables begin that tell a command of its event.
const OURS: &str = "VESTIBULE_";

/// As `execvp` looks for it.
fn candidates(program: &str, directory: &Path, path: &OsStr) -> Vec<PathBuf> {
    if program.contains('/') {
        return vec![directory.join(program)];
    }
    env::split_paths(path).map(|it| directory.join(it).join(program)).collect()
}

fn is_executable(file: &Path) -> bool {
    fs::metadata(file).is_ok_and(|it| it.permissions().mode() & 0o111 != 0)
}

/// The inherited part of a command's environment.
pub(super) fn inherited() -> impl Iterator<Item = (&'static str, OsString)> {
    ExecSettings::INHERITED.iter().filter_map(|name| Some((*name, env::var_os(name)?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn complaints(change: impl FnOnce(&mut ExecSettings)) -> Vec<String> {
        let mut settings = ExecSettings::new("audit", vec!["true".to_owned()]);
        change(&mut settings);
        let complaints = settings.check().err().unwrap_or_default();
        complaints.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn what_cannot_be_run_is_said_all_at_once() {
        assert!(complaints(|_| {}).is_empty());
        let all = complaints(|it| {
            it.command = vec![];
            it.timeout = Duration::ZERO;
            it.output_bytes_max = 1;
            it.directory = Some(PathBuf::new());
            let names = ["", "A=B", "VESTIBULE_EVENT_ID", "A", "A"];
            it.environment = names.map(|name| (name.to_owned(), "x".into())).to_vec();
        });
        let keys: Vec<_> = all.iter().filter_map(|it| it.split(':').next()).collect();
        assert_eq!(
            keys,
            [
                "command",
                "timeout",
                "output_bytes_max",
                "directory",
                "environment",
                "environment",
                "environment",
                "environment"
            ]
        );
        assert!(complaints(|it| it.command = vec![String::new()])[0].contains("must not be empty"));
        assert!(complaints(|it| it.command.push("\0".to_owned()))[0].contains("NUL"));
    }

    #[test]
    fn an_attempt_leaves_time_to_stop_a_command() {
        let within = |seconds| ExecSettings::timeout_within(Duration::from_secs(seconds));
        assert_eq!(within(20), Duration::from_secs(15));
        assert_eq!(within(4), Duration::from_secs(2));
    }

    #[test]
    fn a_program_is_found_as_the_system_will_find_it() -> anyhow::Result<()> {
        let folder = tempfile::tempdir()?;
        fs::write(folder.path().join("notes.txt"), "no program")?;
        let mut settings = ExecSettings::new("audit", vec!["sh".to_owned()]);
        assert!(settings.find_program().is_ok());
        settings.directory = Some(folder.path().to_owned());
        assert!(settings.find_program().is_ok(), "the PATH counts in every folder");

        for (program, complaint) in [
            ("no-such-program", "there is no program `no-such-program` on the PATH"),
            ("./no-such-program", "there is no program `./no-such-program`"),
            ("./notes.txt", "`./notes.txt` is not executable"),
        ] {
            settings.command = vec![program.to_owned()];
            let error = settings.find_program().unwrap_err().to_string();
            assert!(error.contains(complaint), "{error}");
        }
        settings.directory = Some(folder.path().join("gone"));
        assert!(settings.find_program().unwrap_err().to_string().contains("there is no folder"));
        Ok(())
    }
}
