//! A command as a process: how it is started, and that nothing of it is left.
//!
//! Each is the leader of a process group of its own, and the group is ended with it, or when its value
//! is dropped; so a time-out, a stop and the end of our own process leave nothing behind. Where we are
//! killed ourselves (`kill -9`), only the end of its standard input tells it: the kernel's own way of
//! saying so (`PR_SET_PDEATHSIG`) cannot be had without unsafe code. What leaves the group
//! (`setsid`) is on its own.

use std::{
    fmt, io,
    process::{ExitStatus, Stdio},
    time::Duration,
};

use anyhow::anyhow;
use rustix::process::{Pid, Signal, kill_process_group};
use secrecy::ExposeSecret;
use tokio::{
    io::{AsyncRead, AsyncReadExt},
    process::{Child, ChildStderr, ChildStdin, ChildStdout, Command},
    time::timeout,
};

use super::settings::{ExecSettings, inherited};
use crate::{Cause, HandleError};

/// How long what is asked to end may take over it.
pub(super) const GRACE: Duration = Duration::from_secs(2);

/// How long to wait for what an ended command wrote last: a descendant that has left the group may hold
/// its output open.
pub(super) const DRAIN: Duration = Duration::from_millis(500);

/// A process group at work.
pub(super) struct Started {
    // Before the child: fields drop in order, and its number is its own until it is waited for.
    group: Group,
    child: Child,
}

/// What a command reads from and writes to.
pub(super) struct Pipes {
    pub(super) stdin: ChildStdin,
    pub(super) stdout: ChildStdout,
    pub(super) stderr: ChildStderr,
}

/// Starts a command; `about` is what its environment says of the event.
pub(super) fn start(
    settings: &ExecSettings,
    about: impl IntoIterator<Item = (&'static str, String)>,
) -> Result<(Started, Pipes), HandleError> {
    let (program, arguments) = settings.command.split_first().expect("the settings were checked");
    let mut command = Command::new(program);
    command.args(arguments).env_clear().envs(inherited()).envs(about);
    command.envs(settings.environment.iter().map(|(name, value)| (name, value.expose_secret())));
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
    if let Some(directory) = &settings.directory {
        command.current_dir(directory);
    }
    let mut child = command.spawn().map_err(|error| not_started(settings, &error))?;
    let pipes = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let id = child.id().and_then(|it| Pid::from_raw(i32::try_from(it).ok()?));
    let group = Group { id, is_over: false };
    match pipes {
        (Some(stdin), Some(stdout), Some(stderr)) => {
            Ok((Started { group, child }, Pipes { stdin, stdout, stderr }))
        }
        _ => unreachable!("all three were asked for"),
    }
}

/// A program that is missing or may not be run is nobody's fault but the set-up's.
fn not_started(settings: &ExecSettings, error: &io::Error) -> HandleError {
    let reason = match settings.find_program() {
        Err(complaint) => complaint.message,
        Ok(_) => error.to_string(),
    };
    let cause = match error.kind() {
        io::ErrorKind::NotFound
        | io::ErrorKind::PermissionDenied
        | io::ErrorKind::NotADirectory
        | io::ErrorKind::ArgumentListTooLong => Cause::NotPermitted,
        // The kernel knows no such format: no interpreter is named in the first line, as a rule.
        _ if error.raw_os_error() == Some(rustix::io::Errno::NOEXEC.raw_os_error()) => {
            Cause::NotPermitted
        }
        // Too many processes or open files, a file that is being written: that may pass.
        _ => Cause::Unavailable,
    };
    HandleError::retry(cause, anyhow!("could not start the command: {reason}"))
}

impl Started {
    /// Waits for its end, and ends what it has left running. May be dropped and called again.
    pub(super) async fn ended(&mut self) -> io::Result<ExitStatus> {
        let status = self.child.wait().await?;
        self.group.end();
        Ok(status)
    }

    /// Asks all of it to end; what has not after a while is ended.
    pub(super) async fn stop(&mut self) -> io::Result<ExitStatus> {
        self.group.signal(Signal::TERM);
        if let Ok(ended) = timeout(GRACE, self.ended()).await {
            return ended;
        }
        self.group.signal(Signal::KILL);
        self.ended().await
    }
}

impl fmt::Debug for Started {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Started({:?})", self.group.id)
    }
}

/// The processes that a command consists of; none of them outlives it.
#[derive(Debug)]
struct Group {
    /// Of the leader, and so of the group. Nobody else gets it while the leader has not been waited
    /// for or anything of the group runs.
    id: Option<Pid>,
    is_over: bool,
}

impl Group {
    fn signal(&self, signal: Signal) {
        if let (Some(id), false) = (self.id, self.is_over) {
            // The only failure is that nothing of it is left.
            let _ = kill_process_group(id, signal);
        }
    }

    /// Called at once when the leader has been waited for: later, the number could be somebody else's.
    fn end(&mut self) {
        self.signal(Signal::KILL);
        self.is_over = true;
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.end();
    }
}

/// What a command has written to one of its outputs.
#[derive(Debug, Default)]
pub(super) struct Output {
    /// The beginning of it.
    pub(super) kept: Vec<u8>,
    pub(super) bytes: u64,
}

impl Output {
    /// Reads to the end, keeping no more than `bytes_max`. What was read is there even if this is
    /// dropped.
    pub(super) async fn fill(&mut self, mut from: impl AsyncRead + Unpin, bytes_max: usize) {
        let mut buffer = [0; 8192];
        while let Ok(read @ 1..) = from.read(&mut buffer).await {
            let room = bytes_max.saturating_sub(self.kept.len()).min(read);
            self.kept.extend_from_slice(&buffer[..room]);
            self.bytes += read as u64;
        }
    }

    /// To be shown to whoever tests the command.
    pub(super) fn lines(&self) -> Vec<String> {
        let mut lines: Vec<_> =
            String::from_utf8_lossy(&self.kept).lines().map(str::to_owned).collect();
        let left_out = self.bytes - self.kept.len() as u64;
        if left_out > 0 {
            lines.push(format!("… and {left_out} bytes more"));
        }
        lines
    }
}
