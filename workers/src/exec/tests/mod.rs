//! Commands over real processes: small scripts of sh and Python.

mod once;
mod service;

use std::{fs, path::Path, time::Duration};

use uuid::Uuid;
use vestibule_testkit::eventually;

use super::*;
use crate::{
    Cause, HandleError,
    testing::{LIMIT, sign_up, task},
};

/// Scripts and what they write, and a mark by which their processes are known.
struct Place {
    folder: tempfile::TempDir,
    mark: String,
}

impl Place {
    fn new() -> anyhow::Result<Self> {
        Ok(Self { folder: tempfile::tempdir()?, mark: format!("mark-{}", Uuid::now_v7()) })
    }

    fn path(&self) -> &Path {
        self.folder.path()
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path().join(name)).unwrap_or_default()
    }

    /// Settings that no slow machine can miss; the command runs in the folder.
    fn settings(&self, command: &[&str]) -> ExecSettings {
        let command = command.iter().map(|it| (*it).to_owned()).collect();
        ExecSettings {
            directory: Some(self.path().to_owned()),
            environment: vec![("MARK".to_owned(), self.mark.clone().into())],
            timeout: LIMIT,
            ..ExecSettings::new("audit", command)
        }
    }

    fn shell(&self, script: &str) -> ExecSettings {
        self.settings(&["sh", "-c", script])
    }

    /// How many processes run that were started from here, descendants included.
    fn processes(&self) -> usize {
        let mark = format!("MARK={}", self.mark);
        let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
        let is_ours = |it: &fs::DirEntry| {
            let environment = fs::read(it.path().join("environ")).unwrap_or_default();
            environment.split(|byte| *byte == 0).any(|it| it == mark.as_bytes())
        };
        entries.filter(is_ours).count()
    }

    async fn is_empty(&self) -> anyhow::Result<()> {
        eventually(LIMIT, "nothing is left of the command", async || self.processes() == 0).await
    }
}

/// What becomes of an attempt, with the cause and the words of a failure.
fn told(outcome: Result<(), HandleError>) -> Result<(), (Cause, String)> {
    outcome.map_err(|error| match error {
        HandleError::Retry { cause, source, .. } => (cause, format!("retry: {source:#}")),
        HandleError::Park { cause, source } => (cause, format!("park: {source:#}")),
        HandleError::StoreUnavailable(source) => panic!("{source:#}"),
    })
}

fn subscriber(settings: ExecSettings) -> ExecSubscriber {
    ExecSubscriber::new(settings).unwrap()
}

#[tokio::test]
async fn the_manuals_commands_do_what_it_says() -> anyhow::Result<()> {
    let manual = include_str!("../../../../docs/subscribers/exec.md");
    let block = |language: &str| {
        let (_, rest) = manual.split_once(&format!("```{language}\n")).unwrap();
        rest.split_once("```").unwrap().0.to_owned()
    };
    let place = Place::new()?;
    let list = subscriber(place.shell(&block("sh")));
    let (ada, bob) = (sign_up("ada"), sign_up("bob"));
    for event in [&ada, &bob, &ada] {
        assert_eq!(told(list.handle(&task(event.clone())).await), Ok(()));
    }
    let ids: Vec<_> = [&ada, &bob].map(|it| it.id.to_string()).into();
    let listed = place.read("list");
    assert!(listed.lines().filter_map(|it| it.split(' ').next()).eq(&ids), "{listed}");

    let python = place.settings(&["python3", "-c", &block("python")]);
    let desk = subscriber(ExecSettings { mode: ExecMode::LongRunning, ..python });
    let mut with = sign_up("ada");
    with.sign_up.claims.insert("department".to_owned(), "Sales".into());
    let mut without = sign_up("bob");
    without.sign_up.claims.remove("department");
    assert_eq!(told(desk.handle(&task(with)).await), Ok(()));
    let words = "park: the command gives it up: without a department".to_owned();
    assert_eq!(told(desk.handle(&task(without)).await), Err((Cause::Refused, words)));
    desk.close().await;
    place.is_empty().await
}
