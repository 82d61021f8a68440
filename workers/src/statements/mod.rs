//! Statements of the user's own, run in a database for each event.
//!
//! The statements of an event are done together, in one transaction with the note that this worker
//! has dealt with the event, so that redelivery does no harm. In our own store that note is the
//! inbox's; elsewhere it is a table beside the user's. Values are bound to parameters and never
//! written into the text. That a late older event does not overwrite a newer one is for the
//! statements to see to: events sort by their `id`.

mod batch;
mod database;
mod fault;
mod named;
mod parameter;
mod session;
mod speak;
#[cfg(test)]
mod tests;

use std::{fmt, time::Duration};

use anyhow::anyhow;
use async_trait::async_trait;
use tokio::sync::{mpsc, oneshot};
use vestibule_events::{
    Kind,
    expression::{Condition, Facts, Failure, Fault as ExpressionFault},
};
use vestibule_store::Store;

pub use self::database::{TargetDatabase, TargetDatabaseError};
pub(crate) use self::named::{Dialect, NamedStatement};
use self::{
    batch::{Call, Lanes, Prepared, Work},
    database::Text,
    parameter::Parameter,
    session::{Inbox, Place, Target},
};
use crate::{Cause, HandleError, SettingError, Task, Worker};

/// What a worker `statements-NAME` is to do.
#[derive(Clone, Debug)]
pub struct StatementsSettings {
    /// The name in the configuration.
    pub name: String,
    /// `None` is our own store.
    pub database: Option<TargetDatabase>,
    pub statements: Vec<StatementSettings>,
    /// Where a database of the user's keeps what was dealt with.
    pub inbox_table: String,
    /// At most so many events in a transaction.
    pub batch: usize,
    /// So many transactions at a time. SQLite has one.
    pub connections: usize,
    /// The longest that an attempt may take.
    pub timeout: Duration,
}

/// One statement, and with what it runs.
#[derive(Clone, Debug)]
pub struct StatementSettings {
    /// With parameters by name, such as `:email`.
    pub sql: String,
    /// CEL: for which events; without it, for all.
    pub when: Option<String>,
    /// By name: a JSON pointer into the event where it begins with `/`, or else CEL.
    pub parameters: Vec<(String, String)>,
}

/// The worker `statements-NAME`.
pub struct Statements {
    name: String,
    statements: Vec<Statement>,
    queue: mpsc::Sender<Work>,
}

/// A statement's conditions and values; its text has gone to those who run it.
struct Statement {
    when: Option<Condition>,
    parameters: Vec<Parameter>,
}

/// So many may wait to be taken; the runtime keeps it to as many as it may handle at a time.
const QUEUE: usize = 1000;

impl fmt::Debug for Statements {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Statements({})", self.name)
    }
}

impl Statements {
    /// Accepted sign-ups, as with most workers.
    pub const KINDS: &'static [Kind] = &[Kind::Accepted];

    pub const INBOX_TABLE: &'static str = "vestibule_inbox";

    /// The durable consumer of the worker that is configured under `name`.
    #[must_use]
    pub fn worker_name(name: &str) -> String {
        format!("statements-{name}")
    }

    /// What is wrong with a statement whichever database it is for. Keys are those of its table.
    #[must_use]
    pub fn check(settings: &StatementSettings) -> Vec<SettingError> {
        let mut errors = Vec::new();
        for dialect in Dialect::ALL {
            match compile(settings, dialect) {
                // What one of them takes may be meant for it.
                Ok(_) => return Vec::new(),
                Err(more) if errors.is_empty() => errors = more,
                Err(_) => {}
            }
        }
        errors
    }

    /// Whether a name can be that of the table of what was done: it is written into statements.
    #[must_use]
    pub fn is_table_name(name: &str) -> bool {
        let is_word = |it: &str| {
            it.starts_with(|it: char| it.is_ascii_alphabetic() || it == '_')
                && it.chars().all(|it| it.is_ascii_alphanumeric() || it == '_')
        };
        name.len() <= 60 && name.split('.').count() <= 2 && name.split('.').all(is_word)
    }

    /// Asks a database of the user's whether it takes the statements, and says what it says against
    /// each. The table of what was done is made if it is missing.
    pub async fn verify(settings: &StatementsSettings) -> anyhow::Result<Vec<String>> {
        let Some(database) = &settings.database else { return Ok(Vec::new()) };
        match prepared(settings, database.dialect(), other(settings, database)) {
            Ok((_, lanes)) => Ok(lanes.verify().await?),
            Err(complaints) => Ok(complaints),
        }
    }

    /// Begins to look at the database at once, in tasks of their own; so there must be a runtime.
    pub fn new(settings: &StatementsSettings, store: &Store) -> Result<Self, Vec<String>> {
        let (dialect, target) = match &settings.database {
            Some(database) => (database.dialect(), other(settings, database)),
            None if store.is_postgres() => (Dialect::Postgres, Target::Store(store.clone())),
            None => (Dialect::Sqlite, Target::Store(store.clone())),
        };
        let (statements, lanes) = prepared(settings, dialect, target)?;
        // SQLite has one writer.
        let count = if dialect == Dialect::Sqlite { 1 } else { settings.connections.max(1) };
        Ok(start(statements, lanes, count))
    }

    /// The statements that an event asks for, with their values.
    fn calls(&self, task: &Task) -> Result<Vec<Call>, HandleError> {
        let facts = Facts::of(&task.event);
        let mut json = None;
        let mut calls = Vec::new();
        for (index, statement) in self.statements.iter().enumerate() {
            let failed = |what: &str, failure: Failure| {
                let why = failure.as_str();
                let source = anyhow!("run[{index}]: could not evaluate {what}: {why}");
                HandleError::park(Cause::InvalidRule, source)
            };
            match statement.when.as_ref().map_or(Ok(true), |it| it.holds(&facts)) {
                Ok(true) => {}
                // What is not there fulfils no condition.
                Ok(false) | Err(Failure::Missing) => continue,
                Err(failure) => return Err(failed("`when`", failure)),
            }
            let values = statement.parameters.iter().map(|it| {
                let value = it.value(&task.event, &mut json, &facts);
                value.map_err(|failure| failed(&format!("the parameter :{}", it.name), failure))
            });
            calls.push(Call { statement: index, values: values.collect::<Result<_, _>>()? });
        }
        Ok(calls)
    }
}

#[async_trait]
impl Worker for Statements {
    fn name(&self) -> &str {
        &self.name
    }

    async fn handle(&self, task: &Task) -> Result<(), HandleError> {
        let calls = self.calls(task)?;
        if calls.is_empty() {
            return Ok(());
        }
        let gone = || HandleError::retry(Cause::Panic, anyhow!("who runs the statements is gone"));
        let (outcome, answer) = oneshot::channel();
        let work = Work { event_id: task.event.id, calls, outcome };
        self.queue.send(work).await.map_err(|_| gone())?;
        Ok(answer.await.map_err(|_| gone())??)
    }
}

fn start(statements: Vec<Statement>, lanes: Lanes, count: usize) -> Statements {
    let (queue, waiting) = mpsc::channel(QUEUE);
    let name = lanes.place.worker.clone();
    lanes.start(count, waiting);
    Statements { name, statements, queue }
}

fn other(settings: &StatementsSettings, database: &TargetDatabase) -> Target {
    let inbox = Inbox::new(&settings.inbox_table, database.dialect());
    Target::Other { database: database.clone(), inbox }
}

/// What is evaluated here, and what is run over there.
fn prepared(
    settings: &StatementsSettings,
    dialect: Dialect,
    target: Target,
) -> Result<(Vec<Statement>, Lanes), Vec<String>> {
    let (mut statements, mut texts, mut complaints) = (Vec::new(), Vec::new(), Vec::new());
    for (index, statement) in settings.statements.iter().enumerate() {
        match compile(statement, dialect) {
            Ok((statement, text)) => {
                statements.push(statement);
                texts.push(text);
            }
            Err(errors) => {
                complaints.extend(errors.iter().map(|error| format!("run[{index}].{error}")));
            }
        }
    }
    if !Statements::is_table_name(&settings.inbox_table) {
        complaints.push("inbox_table: is no plain name of a table".to_owned());
    }
    if !complaints.is_empty() {
        return Err(complaints);
    }
    let lanes = Lanes {
        place: Place {
            worker: Statements::worker_name(&settings.name),
            target,
            // Some statements may be late without the attempts of the others being so, too.
            limit: settings.timeout / 4,
        },
        statements: texts,
        batch: settings.batch.max(1),
        limit: settings.timeout * 3 / 4,
    };
    Ok((statements, lanes))
}

fn compile(
    settings: &StatementSettings,
    dialect: Dialect,
) -> Result<(Statement, Prepared), Vec<SettingError>> {
    let mut errors = Vec::new();
    let mut complain = |key, message: String| errors.push(SettingError { key, message });
    let when = settings.when.as_deref().map(Condition::compile).and_then(|compiled| {
        compiled
            .map_err(|faults| faults.into_iter().for_each(|it| complain("when", in_words(it))))
            .ok()
    });
    let named = NamedStatement::parse(&settings.sql, dialect)
        .map_err(|error| complain("sql", error.to_string()))
        .ok();
    let mut parameters = Vec::new();
    for name in named.iter().flat_map(|it| &it.parameters) {
        match settings.parameters.iter().find(|(given, _)| given == name) {
            None => complain("parameters", format!("does not say what :{name} is")),
            Some((_, source)) => match Parameter::compile(name, source) {
                Ok(parameter) => parameters.push(parameter),
                Err(message) => complain("parameters", format!("{name}: {message}")),
            },
        }
    }
    for (given, _) in &settings.parameters {
        if named.as_ref().is_some_and(|it| !it.parameters.contains(given)) {
            complain("parameters", format!("`{given}` is not in the statement as :{given}"));
        }
    }
    match named {
        Some(named) if errors.is_empty() => {
            let prepared = Prepared { text: Text::new(&named.text), names: named.parameters };
            Ok((Statement { when, parameters }, prepared))
        }
        _ => Err(errors),
    }
}

fn in_words(ExpressionFault { message, line, column }: ExpressionFault) -> String {
    match (line, column) {
        (1, 1) => message,
        _ => format!("line {line} column {column}: {message}"),
    }
}
