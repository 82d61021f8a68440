//! What a check found, and how it is told.

use std::{io::IsTerminal, process::ExitCode};

use comfy_table::{Cell, CellAlignment, Color, ContentArrangement, Table, presets::NOTHING};
use serde::Serialize;

use crate::{cli::Output, print::say};

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum State {
    Ok,
    /// The promises hold now, and may not for ever or not through everything.
    Warning,
    /// A promise does not hold, or nothing works.
    Critical,
}

impl State {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warning => "warning",
            Self::Critical => "critical",
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Finding {
    /// What was looked at, such as `stream.discard`.
    pub(super) check: String,
    pub(super) state: State,
    pub(super) found: String,
    /// What to change; nothing where all is well.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(super) remedy: String,
}

impl Finding {
    pub(super) fn ok(check: impl Into<String>, found: impl Into<String>) -> Self {
        let (check, found) = (check.into(), found.into());
        Self { check, state: State::Ok, found, remedy: String::new() }
    }

    pub(super) fn warning(
        check: impl Into<String>,
        found: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        let (found, remedy) = (found.into(), remedy.into());
        Self { check: check.into(), state: State::Warning, found, remedy }
    }

    pub(super) fn critical(
        check: impl Into<String>,
        found: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self { state: State::Critical, ..Self::warning(check, found, remedy) }
    }
}

/// Prints all findings; a critical one is a failure.
pub(super) fn report(findings: &[Finding], output: Output) -> anyhow::Result<ExitCode> {
    let worst = findings.iter().map(|it| it.state).max().unwrap_or(State::Ok);
    match output {
        Output::Json => {
            let findings = serde_json::json!({ "state": worst, "findings": findings });
            say!("{findings}")?;
        }
        Output::Table => {
            say!("{}", table(findings, std::io::stdout().is_terminal()))?;
            let count = |state| findings.iter().filter(|it| it.state == state).count();
            let [critical, warnings] = [State::Critical, State::Warning].map(count);
            say!("\n{} checks, {critical} critical, {warnings} warnings", findings.len())?;
        }
    }
    Ok(if worst == State::Critical { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// What to change stands below what was found, so that a command can be copied whole.
fn table(findings: &[Finding], is_terminal: bool) -> Table {
    let mut table = Table::new();
    table.load_style(NOTHING).set_content_arrangement(ContentArrangement::Dynamic);
    if !is_terminal {
        table.set_width(120);
    }
    for Finding { check, state, found, remedy } in findings {
        let color = match state {
            State::Ok => Color::Green,
            State::Warning => Color::Yellow,
            State::Critical => Color::Red,
        };
        let state = Cell::new(state.as_str()).set_alignment(CellAlignment::Left);
        let state = if is_terminal { state.fg(color) } else { state };
        let said = if remedy.is_empty() { found.clone() } else { format!("{found}\n→ {remedy}") };
        table.add_row(vec![state, Cell::new(check), Cell::new(said)]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_critical_finding_fails() {
        let ok = Finding::ok("a", "fine");
        let warning = Finding::warning("b", "so so", "do");
        let critical = Finding::critical("c", "bad", "do");
        let code = |findings: &[Finding]| format!("{:?}", report(findings, Output::Json).unwrap());
        let [success, failure] = [ExitCode::SUCCESS, ExitCode::FAILURE].map(|it| format!("{it:?}"));
        assert_eq!(code(&[ok.clone(), warning.clone()]), success);
        assert_eq!(code(&[critical, ok, warning]), failure);
    }

    #[test]
    fn what_to_change_stands_below_what_was_found() {
        let text = table(&[Finding::critical("stream.discard", "Old", "set New")], false);
        let text = text.to_string();
        assert!(text.contains("critical") && text.contains("stream.discard"), "{text}");
        assert!(text.contains("\n") && text.contains("→ set New"), "{text}");
    }
}
