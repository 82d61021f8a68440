//! A command that is started once: events go in and answers come out, a line each.
//!
//! Promises: an event that is not answered in time, or while the command lasts, may be tried again;
//! a command that has ended is started for the next event, after a rest if it had answered nothing;
//! one that says nothing at all is stopped, and so started again. What it writes that is no answer
//! changes nothing.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use anyhow::anyhow;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWriteExt},
    process::ChildStdin,
    sync::{mpsc, oneshot},
    task::JoinSet,
    time::timeout,
};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};
use uuid::Uuid;
use vestibule_events::SignUpEvent;

use super::{
    answer::{Answer, Lines, parse},
    event_line,
    once::how_it_ended,
    process::{DRAIN, GRACE, Pipes, Started, start},
    settings::ExecSettings,
};
use crate::{Cause, HandleError, runtime::Pace};

/// Events that wait to be written. Those beyond wait where they are.
const UNWRITTEN_MAX: usize = 16;

/// So many lines are kept to be shown to whoever tests the command.
const SHOWN_MAX: usize = 100;

/// The command, whether it runs or not.
pub(super) struct Service {
    settings: Arc<ExecSettings>,
    state: tokio::sync::Mutex<State>,
    /// Whether what it writes is kept to be shown.
    shows: bool,
}

#[derive(Default)]
struct State {
    run: Option<Arc<Run>>,
    pace: Pace,
    rests: Option<Rests>,
}

/// It had answered nothing when it ended.
struct Rests {
    until: Instant,
    why: String,
}

impl Service {
    /// Nothing is started yet. With `shows` it remembers what the command writes.
    pub(super) fn new(settings: Arc<ExecSettings>, shows: bool) -> Self {
        Self { settings, state: tokio::sync::Mutex::default(), shows }
    }

    /// Gives the command an event and waits for its answer.
    pub(super) async fn ask(&self, event: &SignUpEvent) -> Result<(), HandleError> {
        let run = self.run().await?;
        let (asked, limit) = (Instant::now(), self.settings.timeout);
        match timeout(limit, run.ask(event)).await {
            Ok(Some(answer)) => answer.outcome(),
            Ok(None) => {
                let why = run.end().unwrap_or_default();
                let error = anyhow!("the command {why} before it had answered");
                Err(HandleError::retry(Cause::Unavailable, error))
            }
            Err(_) => {
                let has_hung = !run.has_answered_since(asked);
                if has_hung {
                    run.stop.cancel();
                }
                let error = anyhow!(
                    "the command has not answered within {limit:?}{}",
                    if has_hung {
                        "; as it answers nothing at all, it is started again"
                    } else {
                        ""
                    }
                );
                Err(HandleError::retry(Cause::Timeout, error))
            }
        }
    }

    /// The command as it runs, started if need be.
    async fn run(&self) -> Result<Arc<Run>, HandleError> {
        let mut state = self.state.lock().await;
        if let Some(run) = &state.run {
            let Some(why) = run.end() else { return Ok(Arc::clone(run)) };
            let has_answered = run.has_answered();
            state.run = None;
            if has_answered {
                state.pace.succeeded();
            } else {
                let now = Instant::now();
                let until = now + state.pace.failed(now).pause;
                state.rests = Some(Rests { until, why });
            }
        }
        if let Some(Rests { until, why }) = &state.rests {
            let left = until.saturating_duration_since(Instant::now());
            if !left.is_zero() {
                return Err(HandleError::Retry {
                    source: anyhow!("the command {why}, and is started again after a rest"),
                    cause: Cause::Unavailable,
                    after: Some(left),
                });
            }
        }
        let run = Run::start(&self.settings, self.shows)?;
        state.rests = None;
        state.run = Some(Arc::clone(&run));
        Ok(run)
    }

    /// Lets the command end, and waits for it: first its input ends, then it is asked to, then it is
    /// made to.
    pub(super) async fn close(&self) {
        let run = self.state.lock().await.run.clone();
        if let Some(run) = run {
            run.stop.cancel();
            run.is_over.cancelled().await;
        }
    }

    /// What the command has written so far.
    pub(super) async fn shown_lines(&self) -> Vec<String> {
        let state = self.state.lock().await;
        state.run.as_ref().map_or_else(Vec::new, |run| run.book().shown.clone())
    }
}

/// Whoever attends to the command does the rest.
impl Drop for Service {
    fn drop(&mut self) {
        if let Some(run) = &self.state.get_mut().run {
            run.stop.cancel();
        }
    }
}

impl fmt::Debug for Service {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Service({})", self.settings.name)
    }
}

/// One run of the command, from its start to its end.
struct Run {
    unwritten: mpsc::Sender<Vec<u8>>,
    book: Mutex<Book>,
    /// It is to end.
    stop: CancellationToken,
    /// Nothing of it is left.
    is_over: CancellationToken,
}

/// Who waits for which answer, and what has come.
#[derive(Default)]
struct Book {
    /// By number: an event may be asked about anew while somebody still waits.
    questions: BTreeMap<u64, (Uuid, oneshot::Sender<Answer>)>,
    numbers: u64,
    last_answer: Option<Instant>,
    /// Lines that answer nothing.
    meaningless: u64,
    /// Why there will be no more answers.
    end: Option<String>,
    shown: Vec<String>,
}

impl Run {
    fn start(settings: &Arc<ExecSettings>, shows: bool) -> Result<Arc<Self>, HandleError> {
        let about = [("VESTIBULE_SUBSCRIBER", settings.name.clone())];
        let (started, pipes) = start(settings, about)?;
        let (unwritten, lines) = mpsc::channel(UNWRITTEN_MAX);
        let run = Arc::new(Self {
            unwritten,
            book: Mutex::default(),
            stop: CancellationToken::new(),
            is_over: CancellationToken::new(),
        });
        let attending =
            attend(Arc::clone(&run), Arc::clone(settings), shows, started, pipes, lines);
        tokio::spawn(attending);
        Ok(run)
    }

    /// `None` if the command ends before it answers.
    async fn ask(&self, event: &SignUpEvent) -> Option<Answer> {
        let (reply, answer) = oneshot::channel();
        let _question = self.note(event.id, reply)?;
        // Fails only if the command has ended, and then so does the answer.
        let _ = self.unwritten.send(event_line(event)).await;
        answer.await.ok()
    }

    fn note(&self, event_id: Uuid, reply: oneshot::Sender<Answer>) -> Option<Question<'_>> {
        let mut book = self.book();
        if book.end.is_some() {
            return None;
        }
        book.numbers += 1;
        let number = book.numbers;
        book.questions.insert(number, (event_id, reply));
        Some(Question { run: self, number })
    }

    /// Takes a line that the command has written; says whether it is the first without a meaning.
    fn hear(&self, line: Option<&[u8]>) -> bool {
        let mut book = self.book();
        let Some((event_id, answer)) = line.and_then(parse) else {
            book.meaningless += 1;
            return book.meaningless == 1;
        };
        // One that comes too late shows all the same that the command is alive.
        book.last_answer = Some(Instant::now());
        let answered = book.questions.extract_if(.., |_, (id, _)| *id == event_id);
        for (_, (_, reply)) in answered {
            // Nobody waits any more: it took too long, and is asked again.
            let _ = reply.send(answer.clone());
        }
        false
    }

    fn show(&self, line: Option<&[u8]>, from: &str) {
        let line = line.map_or("… a line that is too long".into(), String::from_utf8_lossy);
        let mut book = self.book();
        if book.shown.len() < SHOWN_MAX {
            book.shown.push(format!("{from}{line}"));
        }
    }

    fn has_answered(&self) -> bool {
        self.book().last_answer.is_some()
    }

    fn has_answered_since(&self, then: Instant) -> bool {
        self.book().last_answer.is_some_and(|it| it > then)
    }

    fn end(&self) -> Option<String> {
        self.book().end.clone()
    }

    fn book(&self) -> MutexGuard<'_, Book> {
        // Nothing panics while it is held.
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Struck out when nobody waits for the answer any more.
struct Question<'a> {
    run: &'a Run,
    number: u64,
}

impl Drop for Question<'_> {
    fn drop(&mut self) {
        self.run.book().questions.remove(&self.number);
    }
}

/// Sees to the command until nothing of it is left.
async fn attend(
    run: Arc<Run>,
    settings: Arc<ExecSettings>,
    shows: bool,
    mut started: Started,
    pipes: Pipes,
    lines: mpsc::Receiver<Vec<u8>>,
) {
    let bytes_max = settings.output_bytes_max;
    let (mut talking, reads_no_more) = (JoinSet::new(), CancellationToken::new());
    talking.spawn(write(pipes.stdin, lines, run.stop.clone(), reads_no_more.clone()));
    let (hearing, worker) = (Arc::clone(&run), settings.name.clone());
    talking.spawn(read(pipes.stdout, bytes_max, move |line| {
        if shows {
            hearing.show(line, "stdout: ");
        }
        if hearing.hear(line) {
            warn!(worker, "the command writes lines that are no answers; they are only counted");
        }
    }));
    let hearing = Arc::clone(&run);
    talking.spawn(read(pipes.stderr, bytes_max, move |line| {
        if shows {
            hearing.show(line, "stderr: ");
        }
    }));

    let is_to_end = async {
        tokio::select! {
            () = run.stop.cancelled() => {}
            () = reads_no_more.cancelled() => {}
        }
    };
    let ended = tokio::select! {
        ended = started.ended() => ended,
        // Its input has ended with this, which is enough for most.
        () = is_to_end => match timeout(GRACE, started.ended()).await {
            Ok(ended) => ended,
            Err(_) => started.stop().await,
        },
    };
    let was_stopped = run.stop.is_cancelled();
    run.stop.cancel();
    // What it wrote last may be answers.
    let _ = timeout(DRAIN, async { while talking.join_next().await.is_some() {} }).await;
    let why = match ended {
        Ok(status) => how_it_ended(status),
        Err(error) => format!("ended, and nobody knows how ({error})"),
    };
    let (meaningless, unanswered) = {
        let mut book = run.book();
        book.end = Some(why.clone());
        let unanswered = book.questions.len();
        // Whoever waits learns now that nothing comes.
        book.questions.clear();
        (book.meaningless, unanswered)
    };
    let worker = settings.name.as_str();
    if was_stopped {
        info!(worker, meaningless, unanswered, "the command was stopped: it {why}");
    } else {
        warn!(worker, meaningless, unanswered, "the command {why}; the next event starts it again");
    }
    run.is_over.cancel();
}

/// Writes events until it is told to stop; then the command's input ends. A command that closes its
/// input cannot be given anything any more.
async fn write(
    mut stdin: ChildStdin,
    mut lines: mpsc::Receiver<Vec<u8>>,
    stop: CancellationToken,
    reads_no_more: CancellationToken,
) {
    let writing = async {
        while let Some(line) = lines.recv().await {
            if stdin.write_all(&line).await.is_err() {
                return reads_no_more.cancel();
            }
        }
    };
    stop.run_until_cancelled(writing).await;
}

async fn read(
    mut from: impl AsyncRead + Unpin,
    bytes_max: usize,
    mut take: impl FnMut(Option<&[u8]>),
) {
    let (mut lines, mut buffer) = (Lines::default(), [0; 8192]);
    while let Ok(read @ 1..) = from.read(&mut buffer).await {
        lines.feed(&buffer[..read], bytes_max, &mut take);
    }
}
