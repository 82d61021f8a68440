//! `vestibule test`: rules held to what their author expects of them.
//!
//! `cases` reads files of cases, `run` decides each and compares; nobody is asked and nothing is
//! kept, so that they run anywhere. `against_log` decides recorded sign-ups again instead, and
//! tells whom changed rules would treat differently.

mod against_log;
mod cases;
mod run;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context, bail};
use clap::Args;
use serde_json::{Value, json};
use vestibule_events::{ConnectorName, Mode, Reason};

use self::{
    cases::{Case, CaseFile},
    run::{Ran, run},
};
use crate::{
    cli::Output,
    config::Config,
    print::say,
    replay::{Moment, parse_moment},
    trial::Trial,
};

const EXAMPLES: &str = "\
Examples:
  vestibule test
      Runs the cases in every file of the folder `rules/` beside the configuration.
  vestibule test rules/partners.toml --filter postal
      Only those of one file whose names have `postal` in them.
  vestibule test --against-log 30d --config changed.toml
      Decides the sign-ups of the last thirty days again, by the rules of `changed.toml`, and says
      who would be decided differently. Addresses are never printed.

A case:
  connector = \"partners\"
  step = \"before-create\"
  [[case]]
  name = \"a throwaway address is turned away\"
  sign_up = { email = \"x@mailinator.com\" }
  expect = { outcome = \"block\", rule = \"no-throwaway-addresses\" }

Exit code 0 means that every case passed, 1 that one did not. With --against-log it is 0, unless
--fail-on-difference was given and there is one.";

/// What to test the rules with.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct TestArgs {
    /// Files of cases, or folders of them; `rules/` beside the configuration where none is named
    #[arg(value_name = "PATH")]
    paths: Vec<PathBuf>,
    /// Only cases whose names have this text in them
    #[arg(long, value_name = "TEXT")]
    filter: Option<String>,
    /// Decide what was recorded since this time, or since so long ago, again
    #[arg(long, value_name = "TIME", value_parser = parse_moment)]
    #[arg(conflicts_with_all = ["paths", "filter"])]
    against_log: Option<Moment>,
    /// Against the log: only sign-ups of this connector; may be given several times
    #[arg(long = "connector", value_name = "NAME", requires = "against_log")]
    connectors: Vec<ConnectorName>,
    /// Against the log: ask lookups, with the claims of the recorded sign-ups
    #[arg(long, requires = "against_log")]
    ask_lookups: bool,
    /// Against the log: exit with 1 where anybody would be decided differently
    #[arg(long, requires = "against_log")]
    fail_on_difference: bool,
    /// Against the log: at most so many differences are listed; all are counted
    #[arg(long, value_name = "N", default_value_t = 100, requires = "against_log")]
    #[arg(value_parser = clap::value_parser!(u32).range(0..=10_000))]
    limit: u32,
    #[arg(long, value_enum, default_value_t = Output::Table)]
    output: Output,
}

pub(crate) async fn test(args: TestArgs, config: &Config) -> anyhow::Result<ExitCode> {
    let all_is_well = match args.against_log {
        Some(since) => against_log::test(&args, since, config).await?,
        None => run_cases(&args, config).await?,
    };
    Ok(if all_is_well { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

async fn run_cases(args: &TestArgs, config: &Config) -> anyhow::Result<bool> {
    let files = cases::read(&files(args, config)?, config)?;
    let is_wanted = |case: &Case| args.filter.as_ref().is_none_or(|it| case.name.contains(it));
    let trial = Trial::load(config, false).await?;
    let mut summary = Summary::default();
    for CaseFile { path, cases } in &files {
        for case in cases.iter().filter(|case| is_wanted(case)) {
            let ran = run(case, config, &trial).await?;
            if args.output == Output::Table {
                print!("{}", lines(path, case, &ran)?);
            }
            summary.add(path, case, &ran);
        }
    }
    if summary.passed + summary.failed == 0 {
        bail!("no case has `{}` in its name", args.filter.as_deref().unwrap_or_default());
    }
    // A part of the cases tells nothing of the rules that the others reach.
    if args.filter.is_none() {
        summary.unreached = unreached(config, &summary.reached);
    }
    match args.output {
        Output::Json => say!("{}", summary.json())?,
        Output::Table => say!("{}", summary.text()?)?,
    }
    Ok(summary.failed == 0)
}

/// The files that the arguments mean.
fn files(args: &TestArgs, config: &Config) -> anyhow::Result<Vec<PathBuf>> {
    let beside = config.file.parent().unwrap_or(Path::new("")).join("rules");
    let mut paths = args.paths.clone();
    if paths.is_empty() {
        if !beside.is_dir() {
            bail!(
                "there is no folder {}; name files of cases, or see `vestibule test --help` for \
                 how to write the first",
                beside.display()
            );
        }
        paths.push(beside);
    }
    let mut files = BTreeSet::new();
    for path in &paths {
        let before = files.len();
        let is_folder = path.is_dir();
        find(path, is_folder, &mut files)?;
        if is_folder && files.len() == before {
            bail!("there is no file of cases (*.toml) in {}", path.display());
        }
    }
    Ok(files.into_iter().collect())
}

/// Folders are looked through to their ends; a link into a circle would have no end.
fn find(path: &Path, is_folder: bool, files: &mut BTreeSet<PathBuf>) -> anyhow::Result<()> {
    if !is_folder {
        files.insert(path.to_owned());
        return Ok(());
    }
    let entries = std::fs::read_dir(path)
        .with_context(|| format!("could not look into the folder {}", path.display()))?;
    for entry in entries {
        let entry = entry?;
        let path = entry.path();
        if entry.file_type()?.is_dir() {
            find(&path, true, files)?;
        } else if path.extension().is_some_and(|it| it == "toml") {
            files.insert(path);
        }
    }
    Ok(())
}

/// A case as a line and, where it failed, all that helps to see why.
fn lines(path: &Path, case: &Case, ran: &Ran) -> anyhow::Result<String> {
    let mut text = String::new();
    let name = &case.name;
    if ran.passed() {
        writeln!(text, "ok    {name}")?;
        return Ok(text);
    }
    writeln!(text, "FAIL  {name}  ({}:{})", path.display(), case.line)?;
    for difference in &ran.differences {
        writeln!(text, "      {}: expected {}", difference.part, difference.expected)?;
        let indent = difference.part.len();
        writeln!(text, "      {:indent$}     found {}", "", difference.found)?;
    }
    for hint in &ran.hints {
        writeln!(text, "      {hint}")?;
    }
    let reason = |(it, effect): (&Reason, &String)| match it.mode {
        Mode::Enforce => format!("{} ({effect})", it.rule),
        mode => format!("{} ({effect}, {})", it.rule, mode.as_str()),
    };
    let reasons = ran.decision.reasons.iter().zip(&ran.effects).map(reason);
    let reasons = reasons.collect::<Vec<_>>().join(", ");
    let reasons = if reasons.is_empty() { "no rule had a part in it" } else { &reasons };
    writeln!(text, "      rules: {reasons}")?;
    Ok(text)
}

/// Rules of the tested connectors that had a part in no decision.
fn unreached(
    config: &Config,
    reached: &BTreeMap<ConnectorName, BTreeSet<String>>,
) -> Vec<(ConnectorName, String)> {
    let of = |(name, reached): (&ConnectorName, &BTreeSet<String>)| {
        let connector = config.connectors.iter().find(|it| it.name == *name);
        let rules = connector.into_iter().flat_map(|it| it.rules.names());
        rules
            .filter(|rule| !reached.contains(*rule))
            .map(|rule| (name.clone(), rule.to_owned()))
            .collect::<Vec<_>>()
    };
    reached.iter().flat_map(of).collect()
}

/// What all cases came to.
#[derive(Default)]
struct Summary {
    passed: usize,
    failed: usize,
    cases: Vec<Value>,
    /// Of each tested connector, the rules that had a part in a decision.
    reached: BTreeMap<ConnectorName, BTreeSet<String>>,
    unreached: Vec<(ConnectorName, String)>,
}

impl Summary {
    fn add(&mut self, path: &Path, case: &Case, ran: &Ran) {
        let count = if ran.passed() { &mut self.passed } else { &mut self.failed };
        *count += 1;
        let reached = self.reached.entry(case.sign_up.connector.clone()).or_default();
        reached.extend(ran.decision.reasons.iter().map(|it| it.rule.clone()));
        self.cases.push(json!({
            "name": case.name,
            "file": path.display().to_string(),
            "line": case.line,
            "connector": case.sign_up.connector,
            "step": case.sign_up.step,
            "ok": ran.passed(),
            "differences": ran.differences,
            "hints": ran.hints,
            "decision": ran.decision,
            "effects": ran.effects,
        }));
    }

    fn json(&self) -> Value {
        let rule = |(connector, rule): &(ConnectorName, String)| json!({ "connector": connector, "rule": rule });
        json!({
            "ok": self.failed == 0,
            "passed": self.passed,
            "failed": self.failed,
            "cases": self.cases,
            "unreached": self.unreached.iter().map(rule).collect::<Vec<_>>(),
        })
    }

    fn text(&self) -> anyhow::Result<String> {
        let mut text = format!("\n{} passed, {} failed", self.passed, self.failed);
        if !self.unreached.is_empty() {
            write!(text, "\n\nno case reaches these rules:")?;
            for (connector, rule) in &self.unreached {
                write!(text, "\n  {connector}: {rule}")?;
            }
        }
        Ok(text)
    }
}
