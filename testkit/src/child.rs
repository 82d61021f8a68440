//! A child process that cannot outlive us.

use std::ffi::OsStr;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::sync::{LazyLock, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context as _;
pub(crate) use rustix::process::Signal;
use rustix::process::{Pid, kill_process};

use crate::tools;

/// Whom a server runs as, when that is not us.
#[derive(Debug, Clone, Copy)]
pub(crate) struct User {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
}

/// `program` under `setpriv`, so that the kernel sends it `last_will` when this process dies.
///
/// `setpriv` becomes the program (exec), so the child's process id is the program's.
pub(crate) fn command(
    program: &Path,
    last_will: &str,
    user: Option<User>,
) -> anyhow::Result<Command> {
    let mut command = Command::new(tools::setpriv()?);
    command.arg("--pdeathsig").arg(last_will);
    if let Some(User { uid, gid }) = user {
        command.arg(format!("--reuid={uid}")).arg(format!("--regid={gid}")).arg("--clear-groups");
    }
    command.arg("--").arg(program).stdin(Stdio::null());
    Ok(command)
}

/// Starts `command` from a thread that lives as long as this process.
///
/// The kernel delivers the parent-death signal when the *thread* that started the child ends, and threads
/// of a Tokio runtime come and go.
pub(crate) fn spawn(command: Command) -> anyhow::Result<Child> {
    type Order = (Command, mpsc::Sender<std::io::Result<std::process::Child>>);
    static SPAWNER: LazyLock<Mutex<mpsc::Sender<Order>>> = LazyLock::new(|| {
        let (orders, inbox) = mpsc::channel::<Order>();
        std::thread::spawn(move || {
            for (mut command, reply) in inbox {
                // Whoever ordered it waits for the reply; if it died, the child dies with the process.
                let _ = reply.send(command.spawn());
            }
        });
        Mutex::new(orders)
    });

    let name = command.get_program().to_owned();
    let (reply, answer) = mpsc::channel();
    SPAWNER
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .send((command, reply))
        .context("the thread that starts servers is gone")?;
    let child = answer
        .recv()
        .context("the thread that starts servers is gone")?
        .with_context(|| format!("could not start {}", name.display()))?;
    Ok(Child { inner: child })
}

/// Killed and waited for when dropped.
#[derive(Debug)]
pub(crate) struct Child {
    inner: std::process::Child,
}

impl Child {
    pub(crate) fn id(&self) -> u32 {
        self.inner.id()
    }

    pub(crate) fn take_output(
        &mut self,
    ) -> (Option<std::process::ChildStdout>, Option<std::process::ChildStderr>) {
        (self.inner.stdout.take(), self.inner.stderr.take())
    }

    pub(crate) fn take_input(&mut self) -> Option<std::process::ChildStdin> {
        self.inner.stdin.take()
    }

    /// `None` while it runs.
    pub(crate) fn status(&mut self) -> Option<std::process::ExitStatus> {
        self.inner.try_wait().ok().flatten()
    }

    /// Sends a signal, unless the child has ended.
    ///
    /// Only whoever holds `&mut self` can reap the child, so the process id is still its own here.
    pub(crate) fn signal(&self, signal: Signal) {
        signal_process(self.id(), signal);
    }

    /// Stops it in its tracks, as [`halt_process`] does.
    pub(crate) fn halt(&self) {
        halt_process(self.id());
    }

    pub(crate) fn kill(&mut self) {
        // It may have ended by itself: then there is nothing left to do.
        let _ = self.inner.kill();
        let _ = self.inner.wait();
    }

    /// Sends `signal` and waits; kills it when it is still there after `limit`.
    pub(crate) fn stop(&mut self, signal: Signal, limit: Duration) {
        let deadline = Instant::now() + limit;
        if self.status().is_none() {
            self.signal(signal);
            // A paused process would not hear the signal.
            self.signal(Signal::CONT);
        }
        while self.status().is_none() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(2));
        }
        self.kill();
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        self.kill();
    }
}

pub(crate) fn signal_process(id: u32, signal: Signal) {
    let pid = i32::try_from(id).ok().and_then(Pid::from_raw);
    if let Some(pid) = pid {
        // The only failure is that it has ended meanwhile.
        let _ = kill_process(pid, signal);
    }
}

/// SIGSTOP, and waits until no thread of the process runs any more: the signal alone returns while other
/// threads may still answer a request or two.
pub(crate) fn halt_process(id: u32) {
    signal_process(id, Signal::STOP);
    // What sits in the disk cannot be stopped before the disk lets it go.
    let deadline = Instant::now() + Duration::from_secs(5);
    while runs(id) && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Whether a thread of the process is neither stopped nor gone.
fn runs(id: u32) -> bool {
    let Ok(threads) = std::fs::read_dir(format!("/proc/{id}/task")) else { return false };
    threads.flatten().any(|thread| {
        let fields = fields_after_name(&thread.path().join("stat"));
        fields.is_some_and(|fields| !fields.starts_with(['T', 't', 'Z', 'X']))
    })
}

/// Whether the process has given back all it held; somebody may still have to ask how it ended.
pub(crate) fn has_ended(id: u32) -> bool {
    let fields = fields_after_name(Path::new(&format!("/proc/{id}/stat")));
    fields.is_none_or(|fields| fields.starts_with(['Z', 'X']))
}

/// The direct children of a process, by asking `/proc`.
pub(crate) fn children_of(parent: u32) -> Vec<u32> {
    let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
    let ids = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    ids.filter(|id| parent_of(*id) == Some(parent)).collect()
}

fn parent_of(id: u32) -> Option<u32> {
    let fields = fields_after_name(Path::new(&format!("/proc/{id}/stat")))?;
    fields.split_whitespace().nth(1)?.parse().ok()
}

/// The second field of such a file is the name in parentheses and may hold spaces; state and parent follow.
fn fields_after_name(stat: &Path) -> Option<String> {
    let text = std::fs::read_to_string(stat).ok()?;
    Some(text.rsplit_once(')')?.1.trim_start().to_owned())
}

/// The last lines of a log, to be shown when something failed.
pub(crate) fn tail(log: &Path) -> String {
    let text = std::fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().collect();
    let first = lines.len().saturating_sub(30);
    let name = log.file_name().unwrap_or(OsStr::new("log")).display();
    format!("the end of {name}:\n{}", lines[first..].join("\n"))
}
