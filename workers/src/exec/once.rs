//! A command that is started for each event: what it is given, and what its end means.

use std::{io, os::unix::process::ExitStatusExt, pin::pin, process::ExitStatus, time::Duration};

use anyhow::anyhow;
use futures_util::future::{Either, select};
use tokio::{io::AsyncWriteExt, process::ChildStdin, time::timeout};
use vestibule_events::SignUpEvent;

use super::{
    event_line,
    process::{DRAIN, Output, Pipes, start},
    settings::ExecSettings,
};
use crate::{Cause, HandleError};

/// How a command has gone about an event.
#[derive(Debug)]
pub(super) struct Ran {
    pub(super) end: End,
    pub(super) stdout: Output,
    pub(super) stderr: Output,
}

#[derive(Debug)]
pub(super) enum End {
    Itself(ExitStatus),
    TookTooLong(Duration),
    Unknown(io::Error),
}

/// Runs the command over one event.
pub(super) async fn run(
    settings: &ExecSettings,
    event: &SignUpEvent,
    attempt: u32,
) -> Result<Ran, HandleError> {
    let (mut started, Pipes { stdin, stdout, stderr }) =
        start(settings, about(settings, event, attempt))?;
    let (mut out, mut err) = (Output::default(), Output::default());
    let bytes_max = settings.output_bytes_max;
    let end = {
        let talking = pin!(async {
            let listening =
                async { tokio::join!(out.fill(stdout, bytes_max), err.fill(stderr, bytes_max)) };
            tokio::join!(feed(stdin, event), listening);
        });
        let ending = pin!(async {
            match timeout(settings.timeout, started.ended()).await {
                Ok(Ok(status)) => End::Itself(status),
                Ok(Err(error)) => End::Unknown(error),
                Err(_) => match started.stop().await {
                    Ok(_) => End::TookTooLong(settings.timeout),
                    Err(error) => End::Unknown(error),
                },
            }
        });
        match select(ending, talking).await {
            Either::Left((end, rest)) => {
                let _ = timeout(DRAIN, rest).await;
                end
            }
            Either::Right(((), ending)) => ending.await,
        }
    };
    Ok(Ran { end, stdout: out, stderr: err })
}

/// Whether the command reads its event is its own affair, so a closed pipe is no failure.
async fn feed(mut stdin: ChildStdin, event: &SignUpEvent) {
    let _ = stdin.write_all(&event_line(event)).await;
}

fn about(
    settings: &ExecSettings,
    event: &SignUpEvent,
    attempt: u32,
) -> impl Iterator<Item = (&'static str, String)> {
    let known = [
        ("VESTIBULE_SUBSCRIBER", settings.name.clone()),
        ("VESTIBULE_EVENT_ID", event.id.to_string()),
        ("VESTIBULE_EVENT_KIND", event.kind.to_string()),
        ("VESTIBULE_ATTEMPT", attempt.to_string()),
    ];
    known.into_iter().chain(event.traceparent.clone().map(|it| ("TRACEPARENT", it)))
}

impl Ran {
    /// To be shown to whoever tests the command.
    pub(super) fn lines(&self) -> Vec<String> {
        let mut lines = vec![match &self.end {
            End::Itself(status) => how_it_ended(*status),
            End::TookTooLong(limit) => format!("took longer than {limit:?} and was stopped"),
            End::Unknown(error) => format!("ended, and nobody knows how ({error})"),
        }];
        for (name, output) in [("stdout", &self.stdout), ("stderr", &self.stderr)] {
            lines.extend(output.lines().into_iter().map(|line| format!("{name}: {line}")));
        }
        lines
    }

    /// What the runtime is to make of it.
    ///
    /// What the command wrote is not told: it may quote the event. How much it was may help whoever
    /// looks for the reason.
    pub(super) fn outcome(&self) -> Result<(), HandleError> {
        let what = match &self.end {
            End::Itself(status) if status.success() => return Ok(()),
            End::Itself(status) => status,
            End::TookTooLong(limit) => {
                let error = anyhow!("the command took longer than {limit:?} and was stopped");
                return Err(HandleError::retry(Cause::Timeout, error));
            }
            End::Unknown(error) => {
                let error = anyhow!("could not learn how the command ended: {error}");
                return Err(HandleError::retry(Cause::Unavailable, error));
            }
        };
        let wrote = format!(
            "it wrote {} bytes to its output and {} to its error output",
            self.stdout.bytes, self.stderr.bytes
        );
        let error = anyhow!("the command {}; {wrote}", how_it_ended(*what));
        Err(match what.code().map_or(Fate::Retry(Cause::Unavailable), fate_of) {
            Fate::Retry(cause) => HandleError::retry(cause, error),
            Fate::Park(cause) => HandleError::park(cause, error),
        })
    }
}

/// As it is told to operators.
pub(super) fn how_it_ended(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => match EXIT_CODES.iter().find(|(it, ..)| *it == code) {
            Some((_, meaning, _)) => format!("ended with exit code {code} ({meaning})"),
            None => format!("ended with exit code {code}"),
        },
        (None, Some(signal)) => format!("was killed by signal {signal}"),
        (None, None) => "ended, nobody knows how".to_owned(),
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Retry(Cause),
    Park(Cause),
}

/// What a command may say by its exit code: the convention of `sysexits.h`, and the shell's own two.
/// A fault of the set-up concerns all events alike, so it parks none of them.
const EXIT_CODES: &[(i32, &str, Fate)] = &[
    (64, "wrong usage", Fate::Retry(Cause::NotPermitted)),
    (65, "the event's data are wrong", Fate::Park(Cause::Refused)),
    (66, "the event lacks something", Fate::Park(Cause::Refused)),
    (67, "no such user", Fate::Park(Cause::InvalidRecipient)),
    (68, "no such host", Fate::Park(Cause::InvalidRecipient)),
    (69, "a service is unavailable", Fate::Retry(Cause::Unavailable)),
    (70, "a fault of the program", Fate::Retry(Cause::Unavailable)),
    (71, "a fault of the system", Fate::Retry(Cause::Unavailable)),
    (72, "a file of the system is missing", Fate::Retry(Cause::NotPermitted)),
    (73, "a file could not be made", Fate::Retry(Cause::NotPermitted)),
    (74, "could not read or write", Fate::Retry(Cause::Unavailable)),
    (75, "a passing failure", Fate::Retry(Cause::Unavailable)),
    (76, "the event was refused", Fate::Park(Cause::Refused)),
    (77, "not permitted", Fate::Retry(Cause::NotPermitted)),
    (78, "a fault of the configuration", Fate::Retry(Cause::NotPermitted)),
    (126, "a program may not be run", Fate::Retry(Cause::NotPermitted)),
    (127, "a program was not found", Fate::Retry(Cause::NotPermitted)),
];

/// Any other code may mean anything, so the event is tried again.
fn fate_of(code: i32) -> Fate {
    let known = EXIT_CODES.iter().find(|(it, ..)| *it == code);
    known.map_or(Fate::Retry(Cause::Unavailable), |(.., fate)| *fate)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ran(end: End) -> Ran {
        Ran {
            end,
            stdout: Output::default(),
            stderr: Output { kept: b"ada@example.com".to_vec(), bytes: 15 },
        }
    }

    /// As `wait` has it.
    fn status(code: i32, signal: i32) -> ExitStatus {
        ExitStatus::from_raw(code << 8 | signal)
    }

    #[test]
    fn an_exit_code_says_what_becomes_of_the_event() {
        let fate = |end| match ran(end).outcome() {
            Ok(()) => "done".to_owned(),
            Err(HandleError::Retry { cause, after: None, .. }) => format!("retry {cause}"),
            Err(HandleError::Park { cause, .. }) => format!("park {cause}"),
            Err(other) => panic!("{other}"),
        };
        let exited = |code| fate(End::Itself(status(code, 0)));
        assert_eq!(exited(0), "done");
        for code in [65, 66, 76] {
            assert_eq!(exited(code), "park refused", "{code}");
        }
        for code in [67, 68] {
            assert_eq!(exited(code), "park invalid-recipient", "{code}");
        }
        for code in [64, 72, 73, 77, 78, 126, 127] {
            assert_eq!(exited(code), "retry not-permitted", "{code}");
        }
        for code in [1, 2, 63, 69, 70, 71, 74, 75, 79, 125, 128, 255] {
            assert_eq!(exited(code), "retry unavailable", "{code}");
        }
        assert_eq!(fate(End::Itself(status(0, 9))), "retry unavailable");
        assert_eq!(fate(End::TookTooLong(Duration::from_secs(1))), "retry timeout");
        assert_eq!(fate(End::Unknown(io::ErrorKind::Other.into())), "retry unavailable");
    }

    #[test]
    fn the_error_tells_the_code_and_nothing_of_what_was_written() {
        let error = ran(End::Itself(status(75, 0))).outcome().unwrap_err();
        let HandleError::Retry { source, .. } = error else { panic!("{error}") };
        assert_eq!(
            source.to_string(),
            "the command ended with exit code 75 (a passing failure); it wrote 0 bytes to its output \
             and 15 to its error output"
        );
        assert_eq!(how_it_ended(status(0, 9)), "was killed by signal 9");
        assert_eq!(how_it_ended(status(3, 0)), "ended with exit code 3");
    }
}
