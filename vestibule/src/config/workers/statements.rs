//! `[workers.statements.NAME]`: statements of the user's own, and the database they run in.

use std::time::Duration;

use anyhow::Context;
use secrecy::SecretString;
use vestibule_workers::{StatementSettings, Statements, StatementsSettings, TargetDatabase};

use crate::config::{SecretSource, reader::Section, secret};

/// The statements for one database.
#[derive(Debug)]
pub(crate) struct StatementsConfig {
    pub(crate) name: String,
    /// The name of the worker.
    pub(crate) worker: String,
    /// `None` is our own store.
    database: Option<SecretSource>,
    statements: Vec<StatementSettings>,
    inbox_table: String,
    batch: usize,
    connections: usize,
}

impl StatementsConfig {
    /// What the worker needs, with the secret that `fetch` brings.
    pub(crate) fn settings(
        &self,
        timeout: Duration,
        fetch: impl Fn(&SecretSource) -> anyhow::Result<SecretString>,
    ) -> anyhow::Result<StatementsSettings> {
        let parse = |source: &SecretSource| {
            TargetDatabase::parse(&fetch(source)?).with_context(|| format!("database: {source}"))
        };
        Ok(StatementsSettings {
            name: self.name.clone(),
            database: self.database.as_ref().map(parse).transpose()?,
            statements: self.statements.clone(),
            inbox_table: self.inbox_table.clone(),
            batch: self.batch,
            connections: self.connections,
            timeout,
        })
    }
}

pub(super) fn read(name: &str, section: &mut Section<'_>) -> StatementsConfig {
    // A name of a consumer in NATS, and short enough for any database.
    let is_plain = |it: char| it.is_ascii_lowercase() || it.is_ascii_digit() || "-_".contains(it);
    if name.is_empty() || name.len() > 40 || !name.chars().all(is_plain) {
        section.complain("", "is named by up to 40 of a-z, 0-9, - and _");
    }
    let statements = section.sections("run", read_statement);
    if statements.is_empty() {
        section.complain("", format!("needs at least one [[workers.statements.{name}.run]] table"));
    }
    let inbox_table = section.string("inbox_table");
    if inbox_table.as_deref().is_some_and(|it| !Statements::is_table_name(it)) {
        section.complain("inbox_table", "must be the plain name of a table");
    }
    let mut count = |key, most: u64, default| {
        usize::try_from(section.integer(key, 1..most + 1, default)).unwrap_or(1)
    };
    let (batch, connections) = (count("batch", 1000, 64), count("connections", 64, 4));
    let database = secret(section, "database");
    if !section.has("database") && section.has("inbox_table") {
        section.complain("inbox_table", "is for a database of your own: the store has its inbox");
    }
    StatementsConfig {
        name: name.to_owned(),
        worker: Statements::worker_name(name),
        database,
        statements,
        inbox_table: inbox_table.unwrap_or_else(|| Statements::INBOX_TABLE.to_owned()),
        batch,
        connections,
    }
}

fn read_statement(section: &mut Section<'_>) -> StatementSettings {
    let statement = StatementSettings {
        sql: section.required("sql"),
        when: section.string("when"),
        parameters: section.strings("parameters"),
    };
    if section.has("sql") {
        for error in Statements::check(&statement) {
            section.complain(error.key, error.message);
        }
    }
    statement
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use crate::config::Config;

    fn parse(section: &str) -> Result<Config, String> {
        let example = include_str!("../../../../vestibule.toml");
        let source = format!("{example}\n{section}");
        Config::parse(Path::new("vestibule.toml"), &source).map_err(|it| it.to_string())
    }

    #[test]
    fn each_database_is_a_worker_of_its_own() {
        let config = parse(
            r#"
            [workers.statements.crm]
            database = "env:CRM_URL"
            [[workers.statements.crm.run]]
            sql = "INSERT INTO people VALUES (:email, :city)"
            when = "signup.claims.city != ''"
            parameters = { email = "/data/email", city = "signup.claims.city" }
            [workers.statements.own]
            concurrency = 2
            [[workers.statements.own.run]]
            sql = "DELETE FROM waiting WHERE person = :person"
            parameters = { person = "/subject" }
            "#,
        )
        .unwrap();
        let worker = |name: &str| config.workers.iter().find(|it| it.name() == name).unwrap();
        assert_eq!(worker("statements-crm").settings.concurrency, 64);
        assert_eq!(worker("statements-own").settings.concurrency, 2);
    }

    #[test]
    fn a_statement_that_cannot_work_is_refused_with_its_place() {
        let run = "[[workers.statements.crm.run]]\n";
        for (section, complaint) in [
            ("[workers.statements.crm]", "needs at least one [[workers.statements.crm.run]] table"),
            (run, "workers.statements.crm.run[0]: needs the key `sql`"),
            (
                &format!("{run}sql = \"DROP TABLE x\""),
                "workers.statements.crm.run[0].sql: begins with DROP; valid here: INSERT",
            ),
            (&format!("{run}sql = \"SELECT 1; SELECT 2\""), "more than one statement"),
            (&format!("{run}sql = \"SELECT :a\""), "does not say what :a is"),
            (
                &format!("{run}sql = \"SELECT 1\"\nparameters = {{ a = \"/id\" }}"),
                "`a` is not in the statement as :a",
            ),
            (
                &format!("{run}sql = \"SELECT :a\"\nparameters = {{ a = \"signup.nosuch\" }}"),
                "run[0].parameters: a: ",
            ),
            (&format!("{run}sql = \"SELECT 1\"\nwhen = \"1 +\""), "run[0].when: "),
            (
                &format!("[workers.statements.\"C R M\"]\n{}", run.replace("crm", "\"C R M\"")),
                "is named by up to 40 of a-z",
            ),
            (
                &format!("[workers.statements.crm]\ninbox_table = \"x\"\n{run}sql = \"SELECT 1\""),
                "the store has its inbox",
            ),
        ] {
            let complaints = parse(section).expect_err(section);
            assert!(complaints.contains(complaint), "{section} gave {complaints}");
        }
    }
}
