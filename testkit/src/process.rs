//! A program of ours as a child, with everything it says.

use std::fmt;
use std::io::{BufRead as _, BufReader, Read, Write as _};
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::Context as _;

use crate::child::{self, Child, Signal};
use crate::eventually;

/// A running program; killed when dropped. What it wrote then goes to the test's own error output, which
/// the test runner shows when the test fails.
pub struct Process {
    name: String,
    child: Child,
    output: Arc<Mutex<Output>>,
    stdin: Option<std::process::ChildStdin>,
    is_quiet: bool,
}

/// How a process ended.
#[derive(Debug)]
pub struct Stopped {
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
}

#[derive(Default)]
struct Output {
    stdout: Vec<String>,
    stderr: Vec<String>,
    /// How many of the two streams have ended.
    ended: u8,
}

impl Process {
    /// Starts a command; its program, arguments, environment and directory count, its streams are ours.
    ///
    /// Takes a command by reference, so that one can be written as
    /// `Process::spawn(Command::new(program).arg("up"))`.
    pub fn spawn(command: &std::process::Command) -> anyhow::Result<Self> {
        let program = PathBuf::from(command.get_program());
        let mut guarded = child::command(&program, "KILL", None)?;
        guarded.args(command.get_args());
        for (name, value) in command.get_envs() {
            match value {
                Some(value) => guarded.env(name, value),
                None => guarded.env_remove(name),
            };
        }
        if let Some(directory) = command.get_current_dir() {
            guarded.current_dir(directory);
        }
        guarded.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());

        let mut child = child::spawn(guarded)?;
        let output = Arc::new(Mutex::new(Output::default()));
        let (stdout, stderr) = child.take_output();
        collect(stdout.context("stdout was not captured")?, &output, |output| &mut output.stdout);
        collect(stderr.context("stderr was not captured")?, &output, |output| &mut output.stderr);
        let stdin = child.take_input();
        let name = Path::new(&program).file_name().unwrap_or(command.get_program());
        Ok(Self {
            name: name.to_string_lossy().into_owned(),
            child,
            output,
            stdin,
            is_quiet: false,
        })
    }

    /// From now on nothing is shown when it is dropped, for one that is killed by the dozen.
    pub fn quiet(&mut self) {
        self.is_quiet = true;
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    pub fn is_running(&mut self) -> bool {
        self.child.status().is_none()
    }

    /// The first line, of either stream and from the start on, that `wanted` accepts. Fails at once, with
    /// the output, when the process ends without one.
    pub async fn wait_for_line(
        &mut self,
        limit: Duration,
        wanted: impl Fn(&str) -> bool,
    ) -> anyhow::Result<String> {
        let found = eventually(limit, "the process writes the line", async || {
            // Whether it has ended comes first: what it wrote last is then seen below.
            let is_over = self.is_over();
            let output = self.output();
            let line = output.stdout.iter().chain(&output.stderr).find(|line| wanted(line));
            line.cloned().map(Some).or_else(|| is_over.then_some(None))
        });
        let line = found.await.and_then(|line| line.context("the process ended without the line"));
        line.with_context(|| self.report())
    }

    /// Writes a line to its standard input.
    pub fn write_line(&mut self, line: &str) -> anyhow::Result<()> {
        let stdin = self.stdin.as_mut().context("the standard input is closed")?;
        writeln!(stdin, "{line}")
            .and_then(|()| stdin.flush())
            .with_context(|| format!("could not write to the standard input of {}", self.name))
    }

    pub fn close_stdin(&mut self) {
        self.stdin = None;
    }

    /// Complete lines so far.
    pub fn stdout(&self) -> String {
        joined(&self.output().stdout)
    }

    /// Complete lines so far.
    pub fn stderr(&self) -> String {
        joined(&self.output().stderr)
    }

    /// SIGKILL; gone when this returns.
    pub fn kill(&mut self) {
        self.child.kill();
    }

    pub fn pause(&self) {
        self.child.halt();
    }

    pub fn resume(&self) {
        self.child.signal(Signal::CONT);
    }

    /// SIGHUP, which asks servers to read their configuration again.
    pub fn hangup(&self) {
        self.child.signal(Signal::HUP);
    }

    /// SIGTERM, then as [`wait`](Self::wait).
    pub async fn terminate(&mut self, limit: Duration) -> anyhow::Result<Stopped> {
        if self.is_running() {
            self.child.signal(Signal::TERM);
        }
        self.wait(limit).await
    }

    /// SIGINT, as Ctrl-C sends it, then as [`wait`](Self::wait).
    pub async fn interrupt(&mut self, limit: Duration) -> anyhow::Result<Stopped> {
        if self.is_running() {
            self.child.signal(Signal::INT);
        }
        self.wait(limit).await
    }

    /// Waits for its end and for all of its output.
    pub async fn wait(&mut self, limit: Duration) -> anyhow::Result<Stopped> {
        let ended = eventually(limit, "the process ends", async || {
            if self.is_over() { self.child.status() } else { None }
        });
        let status = ended.await.with_context(|| self.report())?;
        Ok(Stopped { status, stdout: self.stdout(), stderr: self.stderr() })
    }

    fn is_over(&mut self) -> bool {
        let has_ended = self.child.status().is_some();
        // Both streams too, or the last lines could still be on their way.
        has_ended && self.output().ended == 2
    }

    fn output(&self) -> MutexGuard<'_, Output> {
        self.output.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn report(&self) -> String {
        let output = self.output();
        let part = |lines: &[String]| joined(&lines[lines.len().saturating_sub(200)..]);
        let (name, id) = (&self.name, self.child.id());
        let (stdout, stderr) = (part(&output.stdout), part(&output.stderr));
        format!("--- {name} ({id}) wrote to stdout:\n{stdout}--- and to stderr:\n{stderr}---")
    }
}

impl fmt::Debug for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.name, self.child.id())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
        if !self.is_quiet {
            eprintln!("{}", self.report());
        }
    }
}

fn collect(
    stream: impl Read + Send + 'static,
    output: &Arc<Mutex<Output>>,
    lines_of: fn(&mut Output) -> &mut Vec<String>,
) {
    let output = Arc::clone(output);
    std::thread::spawn(move || {
        let lock = || output.lock().unwrap_or_else(PoisonError::into_inner);
        let mut stream = BufReader::new(stream);
        let mut line = Vec::new();
        while stream.read_until(b'\n', &mut line).is_ok_and(|read| read > 0) {
            let text = String::from_utf8_lossy(&line);
            lines_of(&mut lock()).push(text.trim_end_matches(['\r', '\n']).to_owned());
            line.clear();
        }
        lock().ended += 1;
    });
}

fn joined(lines: &[String]) -> String {
    lines.iter().flat_map(|line| [line, "\n"]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    const LIMIT: Duration = Duration::from_secs(10);

    fn shell(script: &str) -> anyhow::Result<Process> {
        Process::spawn(Command::new("sh").args(["-c", script]).env("GREETING", "hello"))
    }

    #[tokio::test]
    async fn lines_of_both_streams_are_found_and_kept() -> anyhow::Result<()> {
        let mut process =
            shell("echo $GREETING; echo oops >&2; read line; echo got $line; exit 3")?;

        assert_eq!(process.wait_for_line(LIMIT, |line| line == "hello").await?, "hello");
        process.wait_for_line(LIMIT, |line| line.contains("oops")).await?;
        process.write_line("this")?;
        let stopped = process.wait(LIMIT).await?;

        assert_eq!(stopped.status.code(), Some(3));
        assert_eq!(stopped.stdout, "hello\ngot this\n");
        assert_eq!(stopped.stderr, "oops\n");
        Ok(())
    }

    #[tokio::test]
    async fn an_end_without_the_line_is_an_error_that_shows_the_output() -> anyhow::Result<()> {
        let mut process = shell("echo only this")?;
        let error = process.wait_for_line(LIMIT, |line| line == "never").await.unwrap_err();
        assert!(format!("{error:#}").contains("only this"), "{error:#}");
        Ok(())
    }

    #[tokio::test]
    async fn a_process_can_be_terminated_and_killed() -> anyhow::Result<()> {
        let mut polite =
            shell("trap 'echo bye; exit 0' TERM; echo up; while :; do sleep 0.01; done")?;
        polite.wait_for_line(LIMIT, |line| line == "up").await?;
        let stopped = polite.terminate(LIMIT).await?;
        assert!(stopped.status.success() && stopped.stdout.ends_with("bye\n"));

        let mut stubborn = shell("trap '' TERM; echo up; exec sleep 60")?;
        stubborn.wait_for_line(LIMIT, |line| line == "up").await?;
        assert!(stubborn.terminate(Duration::from_millis(100)).await.is_err());
        stubborn.kill();
        assert!(!stubborn.is_running());
        Ok(())
    }

    #[tokio::test]
    async fn a_child_dies_with_the_process_that_started_it_but_not_with_a_thread()
    -> anyhow::Result<()> {
        let mut from_thread = std::thread::spawn(|| shell("echo up; exec sleep 60"))
            .join()
            .map_err(|_| anyhow::anyhow!("the thread panicked"))??;
        from_thread.wait_for_line(LIMIT, |line| line == "up").await?;
        assert!(from_thread.is_running());

        // The child's own child has the same guard; it must go when its parent is killed.
        let script = "setpriv --pdeathsig KILL -- sleep 60 & echo $!; wait";
        let mut parent = shell(script)?;
        let id = parent.wait_for_line(LIMIT, |line| line.parse::<u32>().is_ok()).await?;
        let sleeps = || std::fs::read_to_string(format!("/proc/{id}/comm")).ok();
        eventually(LIMIT, "the grandchild sleeps", async || {
            sleeps().is_some_and(|it| it == "sleep\n")
        })
        .await?;
        parent.kill();
        let alive = format!("/proc/{id}/exe");
        eventually(LIMIT, "the grandchild is gone", async || !Path::new(&alive).exists()).await
    }
}
