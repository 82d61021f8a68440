//! What the platform did and heard, line by line, as it happens.

use std::{
    fmt,
    fs::File,
    io::{BufRead as _, BufReader, BufWriter, Write as _},
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use anyhow::Context as _;
use serde::{Deserialize, Serialize};

/// Microseconds since the run began.
pub type Moment = u64;

/// Where in the sign-up a call happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Step {
    AfterFederation,
    BeforeCreate,
}

impl fmt::Display for Step {
    /// The name in a URL.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::AfterFederation => "after-federation",
            Self::BeforeCreate => "before-create",
        })
    }
}

/// What an answer tells the platform.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    Continue,
    Block,
    ValidationError,
    /// A block page because the event could not be stored: it says nothing about the person.
    TryAgain,
    /// None that the contract knows.
    Unknown,
}

/// One line of the journal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "entry", rename_all = "kebab-case")]
pub enum Entry {
    /// About to be sent.
    Call {
        call: u64,
        sign_up: u64,
        step: Step,
        email: String,
        at: Moment,
    },
    Answered {
        call: u64,
        at: Moment,
        status: u16,
        answer: Answer,
    },
    /// The connection was refused or lost, or the platform's patience was at its end.
    NotAnswered {
        call: u64,
        at: Moment,
    },
    /// Between these two the connector, or its way to the platform, was kept from answering by a fault.
    Kept {
        from: Moment,
        until: Moment,
        by: String,
    },
    /// This machine let us wait as long when there was nothing to wait for.
    Stalled {
        from: Moment,
        until: Moment,
    },
}

/// A file of entries. Cheap to share: the clock and the file are in it.
#[derive(Debug)]
pub(crate) struct Journal {
    path: PathBuf,
    begun: Instant,
    file: Mutex<BufWriter<File>>,
}

impl Journal {
    pub(crate) fn create(path: PathBuf) -> anyhow::Result<Self> {
        let file = File::create(&path).context("could not create the journal")?;
        Ok(Self { path, begun: Instant::now(), file: Mutex::new(BufWriter::new(file)) })
    }

    pub(crate) fn now(&self) -> Moment {
        micros(self.begun.elapsed())
    }

    pub(crate) fn write(&self, entry: &Entry) -> anyhow::Result<()> {
        let mut line = serde_json::to_vec(entry)?;
        line.push(b'\n');
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        file.write_all(&line).context("could not write the journal")
    }

    /// Everything so far, as it stands in the file.
    pub(crate) fn read(&self) -> anyhow::Result<Vec<Entry>> {
        self.file.lock().unwrap_or_else(PoisonError::into_inner).flush()?;
        read(&self.path)
    }

    /// Notes, until dropped, when this machine lets us wait.
    pub(crate) async fn watch_the_machine(&self) -> anyhow::Result<()> {
        const TICK: Duration = Duration::from_millis(10);
        const USUAL: Duration = Duration::from_millis(10);
        loop {
            let from = Instant::now();
            tokio::time::sleep(TICK).await;
            let late = from.elapsed().saturating_sub(TICK);
            if late > USUAL {
                let until = self.now();
                let from = until.saturating_sub(micros(late));
                self.write(&Entry::Stalled { from, until })?;
            }
        }
    }
}

fn read(path: &Path) -> anyhow::Result<Vec<Entry>> {
    let file = BufReader::new(File::open(path).context("could not open the journal")?);
    file.lines().map(|line| Ok(serde_json::from_str(&line?)?)).collect()
}

pub(crate) fn micros(duration: Duration) -> Moment {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
