use std::sync::Arc;

use anyhow::Context;
use futures_util::future::join_all;
use sqlx::{Connection as _, MySqlConnection, PgConnection, SqliteConnection};
use tempfile::TempDir;
use vestibule_events::SignUpEvent;
use vestibule_store::{StoreConnection, StoreOptions, StoreUrl};
use vestibule_testkit::{MySql, Postgres, eventually};

use super::*;
use crate::testing::{LIMIT, Stage, settings, sign_up, task};

/// A database of the user's with a table in it.
struct Town {
    url: String,
    /// Gone when dropped.
    _server: Box<dyn Send>,
}

const PEOPLE: &str = "CREATE TABLE people (email varchar(200) NOT NULL UNIQUE, city varchar(20), \
                      seen integer CHECK (seen < 10))";

impl Town {
    async fn postgres() -> anyhow::Result<Self> {
        let server = Postgres::start().await?;
        Self::with(server.url(), server).await
    }

    async fn mysql() -> anyhow::Result<Self> {
        let server = MySql::start().await?;
        Self::with(server.create_database("town").await?, server).await
    }

    async fn sqlite() -> anyhow::Result<Self> {
        let folder = TempDir::new()?;
        let url = format!("sqlite:{}", folder.path().join("town.db").display());
        SqliteConnection::connect(&format!("{url}?mode=rwc")).await?.close().await?;
        Self::with(url, folder).await
    }

    async fn all() -> anyhow::Result<Vec<Self>> {
        Ok(vec![Self::postgres().await?, Self::mysql().await?, Self::sqlite().await?])
    }

    async fn with(url: String, server: impl Send + 'static) -> anyhow::Result<Self> {
        let town = Self { url, _server: Box::new(server) };
        town.run(PEOPLE).await?;
        Ok(town)
    }

    fn database(&self) -> TargetDatabase {
        TargetDatabase::parse(&self.url.as_str().into()).unwrap()
    }

    async fn run(&self, sql: &str) -> anyhow::Result<()> {
        let mut connection = self.database().connect(LIMIT).await?;
        Ok(connection.link().define(&Text::new(sql)).await?)
    }

    async fn number(&self, sql: &str) -> anyhow::Result<i64> {
        number(&self.url, sql).await
    }

    /// A worker on one connection, so that what comes together shares a transaction.
    fn worker(&self, statements: &[StatementSettings]) -> Statements {
        let settings = StatementsSettings { connections: 1, ..self.settings(statements) };
        // A database of one's own does not touch the store.
        let (statements, lanes) =
            prepared(&settings, self.database().dialect(), other(&settings, &self.database()))
                .unwrap();
        start(statements, lanes, 1)
    }

    fn settings(&self, statements: &[StatementSettings]) -> StatementsSettings {
        StatementsSettings { database: Some(self.database()), ..of_store(statements) }
    }
}

async fn number(url: &str, sql: &str) -> anyhow::Result<i64> {
    let sql = sqlx::AssertSqlSafe(sql.to_owned());
    Ok(match url.split(':').next() {
        Some("postgres") => {
            sqlx::query_scalar(sql).fetch_one(&mut PgConnection::connect(url).await?).await?
        }
        Some("mysql") => {
            sqlx::query_scalar(sql).fetch_one(&mut MySqlConnection::connect(url).await?).await?
        }
        _ => sqlx::query_scalar(sql).fetch_one(&mut SqliteConnection::connect(url).await?).await?,
    })
}

fn of_store(statements: &[StatementSettings]) -> StatementsSettings {
    StatementsSettings {
        name: "town".into(),
        database: None,
        statements: statements.to_vec(),
        inbox_table: Statements::INBOX_TABLE.into(),
        batch: 64,
        connections: 4,
        timeout: Duration::from_secs(120),
    }
}

fn statement(sql: &str, parameters: &[(&str, &str)]) -> StatementSettings {
    let own = |(name, source): &(&str, &str)| ((*name).to_owned(), (*source).to_owned());
    let parameters = parameters.iter().map(own).collect();
    StatementSettings { sql: sql.to_owned(), when: None, parameters }
}

/// Notes who signed up, and then counts how often we were there.
fn noted_and_counted() -> [StatementSettings; 2] {
    let city = StatementSettings {
        when: Some("signup.claims.city == 'London'".into()),
        ..statement(
            "UPDATE people SET city = 'LDN' WHERE email = :email",
            &[("email", "/data/email")],
        )
    };
    let insert = "INSERT INTO people (email, city, seen) VALUES (:email, :city, :seen)";
    let parameters =
        [("email", "/data/email"), ("city", "signup.claims.city"), ("seen", "/data/claims/seen")];
    [statement(insert, &parameters), city]
}

fn from(person: &str, city: &str, seen: i64) -> Task {
    let mut event: SignUpEvent = sign_up(person);
    event.sign_up.claims.insert("city".into(), city.into());
    event.sign_up.claims.insert("seen".into(), seen.into());
    task(event)
}

fn cause_of(outcome: &Result<(), HandleError>) -> (bool, Option<Cause>, String) {
    match outcome {
        Ok(()) => (false, None, String::new()),
        Err(HandleError::Retry { cause, source, .. }) => (true, Some(*cause), source.to_string()),
        Err(HandleError::Park { cause, source }) => (false, Some(*cause), source.to_string()),
        Err(HandleError::StoreUnavailable(source)) => (true, None, source.to_string()),
    }
}

#[tokio::test]
async fn an_event_is_done_once_however_often_it_comes() -> anyhow::Result<()> {
    for town in Town::all().await? {
        let tasks: Vec<_> = (0..40).map(|it| from(&format!("p{it}"), "London", 1)).collect();
        // Two workers of one name, as in two processes, each with several connections.
        let settings = town.settings(&noted_and_counted());
        let worker = || {
            let database = town.database();
            let target = other(&settings, &database);
            let (statements, lanes) = prepared(&settings, database.dialect(), target).unwrap();
            let count = if database.dialect() == Dialect::Sqlite { 1 } else { 4 };
            start(statements, lanes, count)
        };
        let (one, two) = (worker(), worker());
        let storm = tasks.iter().flat_map(|it| [one.handle(it), two.handle(it), one.handle(it)]);
        for outcome in join_all(storm).await {
            // Two transactions may have been in each other's way; then the event comes again.
            let (may_pass, _, error) = cause_of(&outcome);
            assert!(outcome.is_ok() || may_pass, "{}: {error}", town.url);
        }
        for task in &tasks {
            one.handle(task).await.with_context(|| town.url.clone())?;
        }
        assert_eq!(town.number("SELECT count(*) FROM people WHERE city = 'LDN'").await?, 40);
        assert_eq!(town.number("SELECT count(*) FROM vestibule_inbox").await?, 40);
    }
    Ok(())
}

#[tokio::test]
async fn of_a_batch_each_event_gets_its_own_outcome() -> anyhow::Result<()> {
    for town in Town::all().await? {
        let worker = town.worker(&noted_and_counted());
        worker.handle(&from("taken", "Paris", 1)).await?;
        let mut tasks: Vec<_> = (0..20).map(|it| from(&format!("p{it}"), "Rome", 1)).collect();
        tasks.insert(5, from("taken", "Rome", 1));
        tasks.insert(9, from("much", "Rome", 99));

        let outcomes = join_all(tasks.iter().map(|it| worker.handle(it))).await;

        for (task, outcome) in tasks.iter().zip(&outcomes) {
            let is_bad = [5, 9].iter().any(|it| tasks[*it].event.id == task.event.id);
            let (may_pass, cause, error) = cause_of(outcome);
            let expected = is_bad.then_some(Cause::Refused);
            assert_eq!((may_pass, cause), (false, expected), "{}: {error}", town.url);
            assert_eq!(error.starts_with("run[0]: "), is_bad, "{error}");
            assert!(!error.contains("example.com") && !error.contains("99"), "{error}");
        }
        assert_eq!(town.number("SELECT count(*) FROM people").await?, 21);
        // What was refused is not noted as done: sent back, it has its effect.
        assert_eq!(town.number("SELECT count(*) FROM vestibule_inbox").await?, 21);
        town.run("DELETE FROM people WHERE city = 'Paris'").await?;
        worker.handle(&tasks[5]).await?;
        assert_eq!(town.number("SELECT count(*) FROM people").await?, 21);
    }
    Ok(())
}

#[tokio::test]
async fn who_fails_a_commit_fails_it_for_nobody_else() -> anyhow::Result<()> {
    let town = Town::postgres().await?;
    town.run(
        "CREATE TABLE cities (name text PRIMARY KEY); INSERT INTO cities VALUES ('Rome');
         ALTER TABLE people ADD CONSTRAINT in_a_city FOREIGN KEY (city) REFERENCES cities
             DEFERRABLE INITIALLY DEFERRED",
    )
    .await?;
    let worker = town.worker(&noted_and_counted());
    let mut tasks: Vec<_> = (0..10).map(|it| from(&format!("p{it}"), "Rome", 1)).collect();
    tasks.push(from("lost", "Atlantis", 1));

    let outcomes = join_all(tasks.iter().map(|it| worker.handle(it))).await;

    let (bad, good) = outcomes.split_last().context("there are outcomes")?;
    assert!(good.iter().all(Result::is_ok), "{good:?}");
    let (may_pass, cause, error) = cause_of(bad);
    assert_eq!((may_pass, cause), (false, Some(Cause::Refused)), "{error}");
    assert!(error.contains("in_a_city") && !error.contains("Atlantis"), "{error}");
    assert_eq!(town.number("SELECT count(*) FROM people").await?, 10);
    Ok(())
}

#[tokio::test]
async fn a_server_that_is_away_is_waited_for() -> anyhow::Result<()> {
    let mut server = Postgres::start().await?;
    let town = Town { url: server.url(), _server: Box::new(()) };
    town.run(PEOPLE).await?;
    let worker = town.worker(&noted_and_counted());
    worker.handle(&from("ada", "Rome", 1)).await?;

    server.kill();
    let task = from("bob", "Rome", 1);
    let (may_pass, cause, error) = cause_of(&worker.handle(&task).await);
    assert_eq!((may_pass, cause), (true, Some(Cause::Unavailable)), "{error}");

    server.restart().await?;
    worker.handle(&task).await?;
    assert_eq!(town.number("SELECT count(*) FROM people").await?, 2);
    Ok(())
}

#[tokio::test]
async fn an_attempt_cut_short_in_the_middle_leaves_all_or_nothing() -> anyhow::Result<()> {
    let town = Town::postgres().await?;
    let worker = Arc::new(town.worker(&noted_and_counted()));
    let waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'";
    let begin = async |person: &str| {
        let mut lock = PgConnection::connect(&town.url).await?;
        sqlx::raw_sql("BEGIN; LOCK people IN SHARE MODE").execute(&mut lock).await?;
        let (worker, task) = (Arc::clone(&worker), from(person, "London", 1));
        let again = task.clone();
        let attempt = tokio::spawn(async move { worker.handle(&task).await });
        eventually(LIMIT, "the statement waits for the lock", async || {
            anyhow::Ok(town.number(waiting).await? == 1)
        })
        .await?;
        anyhow::Ok((lock, attempt, again))
    };

    // Whoever asked gives up; the transaction goes on and is known when the event comes again.
    let (lock, attempt, again) = begin("ada").await?;
    attempt.abort();
    lock.close().await?;
    worker.handle(&again).await?;
    assert_eq!(town.number("SELECT count(*) FROM people WHERE city = 'LDN'").await?, 1);

    // The server ends the session.
    let (lock, attempt, again) = begin("bob").await?;
    let end = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
               WHERE wait_event_type = 'Lock'";
    town.number(end).await?;
    let (may_pass, cause, error) = cause_of(&attempt.await?);
    assert_eq!((may_pass, cause), (true, Some(Cause::Unavailable)), "{error}");
    lock.close().await?;
    assert_eq!(town.number("SELECT count(*) FROM people").await?, 1);
    worker.handle(&again).await?;
    assert_eq!(town.number("SELECT count(*) FROM people WHERE city = 'LDN'").await?, 2);
    Ok(())
}

#[tokio::test]
async fn what_a_database_does_not_take_is_said_before_the_first_event() -> anyhow::Result<()> {
    for town in Town::all().await? {
        let wrong = statement("UPDATE people SET towm = :it", &[("it", "/id")]);
        let missing = statement("DELETE FROM poeple", &[]);
        let fine = statement("DELETE FROM people WHERE email = :it", &[("it", "/id")]);
        let statements = [fine, wrong.clone(), missing];
        let said = Statements::verify(&town.settings(&statements)).await?;
        let [column, table] = said.as_slice() else { panic!("{}: {said:?}", town.url) };
        assert!(column.starts_with("run[1]: ") && column.contains("towm"), "{column}");
        assert!(table.starts_with("run[2]: ") && table.contains("poeple"), "{table}");

        let worker = town.worker(&[wrong]);
        let task = from("ada", "Rome", 1);
        let (may_pass, cause, error) = cause_of(&worker.handle(&task).await);
        assert_eq!((may_pass, cause), (true, Some(Cause::NotPermitted)), "{error}");
        // Once the table is mended, no restart is needed.
        town.run("ALTER TABLE people ADD COLUMN towm varchar(40)").await?;
        worker.handle(&task).await?;
    }
    Ok(())
}

#[tokio::test]
async fn a_table_of_what_was_done_that_we_may_not_make_is_asked_for() -> anyhow::Result<()> {
    let town = Town::postgres().await?;
    town.run("CREATE ROLE app LOGIN; GRANT INSERT, SELECT, UPDATE ON people TO app").await?;
    let url = town.url.replace("vestibule@", "app@");
    let guest = Town { url, _server: Box::new(()) };
    let settings = guest.settings(&noted_and_counted());
    let said = Statements::verify(&settings).await?;
    let [said] = said.as_slice() else { panic!("{said:?}") };
    let create = said.split('`').nth(1).context("no statement to make it")?;
    town.run(create).await?;
    town.run("GRANT INSERT, SELECT ON vestibule_inbox TO app").await?;

    assert_eq!(Statements::verify(&settings).await?, [""; 0]);
    guest.worker(&noted_and_counted()).handle(&from("ada", "London", 1)).await?;
    assert_eq!(town.number("SELECT count(*) FROM people").await?, 1);
    Ok(())
}

#[tokio::test]
async fn values_become_what_columns_are() -> anyhow::Result<()> {
    let town = Town::postgres().await?;
    town.run(
        "CREATE DOMAIN mail AS text; CREATE TYPE size AS ENUM ('small', 'large');
         CREATE TABLE all_types (id uuid, at timestamptz, plain timestamp, day date, hour time,
             small int2, whole int4, big int8, short real, long float8, exact numeric, yes bool,
             mail mail, size size, address inet, extra jsonb, tags text[], words varchar(20))",
    )
    .await?;
    let insert = "INSERT INTO all_types VALUES (:id, :time, :time::timestamptz, :day, :hour, :n,
        :whole, :big, :short, :long, :exact, :yes, :mail, :size, :address::text::inet, :extra,
        :tags, :words)";
    let parameters = [
        ("id", "/id"),
        ("time", "/time"),
        ("day", "'2024-02-29'"),
        ("hour", "'12:30'"),
        ("n", "signup.claims.seen"),
        ("whole", "'17'"),
        ("big", "signup.claims.seen"),
        ("short", "1.5"),
        ("long", "1.5"),
        ("exact", "1.5"),
        ("words", "1.5"),
        ("yes", "'true'"),
        ("mail", "signup.email"),
        ("size", "'large'"),
        ("address", "'10.0.0.1'"),
        ("extra", "/data/claims"),
        ("tags", "/data/claims/tags"),
    ];
    let worker = town.worker(&[statement(insert, &parameters)]);
    let mut task = from("ada", "Rome", 7);
    task.event.sign_up.claims.insert("tags".into(), serde_json::json!(["a", "b"]));
    worker.handle(&task).await?;
    let right = "SELECT count(*) FROM all_types WHERE at > now() - interval '1 hour'
        AND day = '2024-02-29' AND hour = '12:30' AND small = 7 AND whole = 17 AND long = 1.5
        AND exact = 1.5 AND yes AND mail = 'ada@example.com' AND size = 'large'
        AND extra->>'city' = 'Rome' AND tags[2] = 'b' AND words = '1.5'";
    assert_eq!(town.number(right).await?, 1);

    let (_, cause, error) = cause_of(
        &town
            .worker(&[statement(
                "INSERT INTO all_types (day) VALUES (:day)",
                &[("day", "/data/email")],
            )])
            .handle(&from("eve", "Rome", 1))
            .await,
    );
    assert_eq!(cause, Some(Cause::Refused));
    assert_eq!(error, "run[0]: the value of :day does not fit its parameter, which is date");
    Ok(())
}

/// Stores of both kinds, each with a table of the user's in it.
async fn stores() -> anyhow::Result<Vec<(Store, Town)>> {
    let folder = TempDir::new()?;
    let file = folder.path().join("store.db");
    let server = Postgres::start().await?;
    let mut stores = Vec::new();
    let postgres = (StoreUrl::Postgres(server.url().into()), server.url());
    let sqlite = (StoreUrl::Sqlite(file.clone()), format!("sqlite:{}", file.display()));
    let mut servers: Vec<Box<dyn Send>> = vec![Box::new(folder), Box::new(server)];
    for (place, url) in [postgres, sqlite] {
        let store = Store::open(&place, StoreOptions::default()).await?;
        store.migrate().await?;
        let server = servers.pop().context("one for each")?;
        // The store has a table `people` of its own.
        let town = Town { url, _server: server };
        town.run(&PEOPLE.replace("people", "visitors")).await?;
        stores.push((store, town));
    }
    Ok(stores)
}

#[tokio::test]
async fn in_the_store_statements_and_inbox_are_one_transaction() -> anyhow::Result<()> {
    for (store, town) in stores().await? {
        let statements = noted_and_counted()
            .map(|it| StatementSettings { sql: it.sql.replace("people", "visitors"), ..it });
        let worker =
            Statements::new(&of_store(&statements), &store).map_err(|it| anyhow!(it.join("; ")))?;
        let mut tasks: Vec<_> = (0..20).map(|it| from(&format!("p{it}"), "London", 1)).collect();
        tasks.push(from("much", "London", 99));
        let twice = tasks.iter().chain(&tasks).map(|it| worker.handle(it));

        for (index, outcome) in join_all(twice).await.into_iter().enumerate() {
            let is_bad = index % 21 == 20;
            let (may_pass, cause, error) = cause_of(&outcome);
            let expected = is_bad.then_some(Cause::Refused);
            assert_eq!((may_pass, cause), (false, expected), "{}: {error}", town.url);
        }
        assert_eq!(town.number("SELECT count(*) FROM visitors WHERE city = 'LDN'").await?, 20);
        for task in &tasks {
            let is_done = store.is_done("statements-town", task.event.id).await?;
            assert_eq!(is_done, task.event.id != tasks[20].event.id);
        }
    }
    Ok(())
}

#[tokio::test]
async fn the_runtime_retries_and_parks_what_the_database_says() -> anyhow::Result<()> {
    let (stage, town) = (Stage::open().await?, Town::sqlite().await?);
    let bad = from("much", "Rome", 99).event;
    stage.append(bad.clone()).await?;
    for person in 0..30 {
        stage.append(from(&format!("p{person}"), "Rome", 1).event).await?;
    }
    let running = stage.start(town.worker(&noted_and_counted()), settings(3));
    eventually(LIMIT, "all but one are done", async || {
        anyhow::Ok(town.number("SELECT count(*) FROM people").await? == 30)
    })
    .await?;
    stage.idle("statements-town").await?;
    assert_eq!(stage.store.set_aside("statements-town").await?.parked, 1);
    running.stop().await
}

#[tokio::test]
async fn what_a_database_says_of_a_value_is_not_passed_on() -> anyhow::Result<()> {
    for town in Town::all().await? {
        // Each makes a message that quotes the address.
        let wrong = match town.database().dialect() {
            Dialect::Postgres => {
                "INSERT INTO people (email, seen) VALUES ('x', CAST(CAST(:it AS text) AS integer))"
            }
            Dialect::MySql => "INSERT INTO people (email, seen) VALUES ('x', :it)",
            Dialect::Sqlite => "INSERT INTO people (email) VALUES (json_extract('{}', :it))",
        };
        let taken = "INSERT INTO people (email) VALUES (:it)";
        let worker = town.worker(&[statement(taken, &[("it", "/data/email")])]);
        worker.handle(&from("ada", "Rome", 1)).await?;
        for sql in [wrong, taken] {
            let worker = town.worker(&[statement(sql, &[("it", "/data/email")])]);
            let (_, cause, error) = cause_of(&worker.handle(&from("ada", "Rome", 1)).await);
            assert_eq!(cause, Some(Cause::Refused), "{}: {error}", town.url);
            assert!(!error.contains("ada") && !error.contains("example"), "{error}");
            assert_eq!(error.contains("email"), sql == taken, "{error}");
        }
    }
    Ok(())
}

/// Goes on for as long as it is let.
const ENDLESS: &str = "UPDATE people SET seen = (WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL
    SELECT x + 1 FROM n) SELECT count(*) FROM n) WHERE email = :email";

#[tokio::test]
async fn a_statement_without_end_is_stopped_and_holds_up_nobody_else() -> anyhow::Result<()> {
    let endless = StatementSettings {
        when: Some("signup.claims.city == 'Rome'".into()),
        ..statement(ENDLESS, &[("email", "/data/email")])
    };
    let [insert, _] = noted_and_counted();
    let folder = TempDir::new()?;
    let file = folder.path().join("store.db");
    let store = Store::open(&StoreUrl::Sqlite(file.clone()), StoreOptions::default()).await?;
    store.migrate().await?;
    let ours = Town { url: format!("sqlite:{}", file.display()), _server: Box::new(folder) };
    ours.run(&PEOPLE.replace("people", "visitors")).await?;
    for (town, is_ours) in [(Town::sqlite().await?, false), (ours, true)] {
        let mut settings = of_store(&[insert.clone(), endless.clone()]);
        settings.timeout = Duration::from_secs(4);
        if is_ours {
            for statement in &mut settings.statements {
                statement.sql = statement.sql.replace("people", "visitors");
            }
        } else {
            settings.database = Some(town.database());
        }
        let worker = Statements::new(&settings, &store).map_err(|it| anyhow!(it.join("; ")))?;

        let (may_pass, cause, error) = cause_of(&worker.handle(&from("ada", "Rome", 1)).await);
        assert_eq!((may_pass, cause), (true, Some(Cause::Timeout)), "{error}");

        if is_ours {
            // That the limit is over concerns nobody who writes next, however much that is.
            let mut transaction = store.transaction().await?;
            let StoreConnection::Sqlite(connection) = transaction.connection() else {
                panic!("it is SQLite")
            };
            let much = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n
                WHERE x < 100000) SELECT count(*) FROM n";
            sqlx::query(much).execute(connection).await?;
            transaction.commit().await?;
        }
        // The next one may come before the last one's end is known.
        eventually(LIMIT, "others are served", async || {
            anyhow::Ok(worker.handle(&from("bob", "London", 1)).await.is_ok())
        })
        .await?;
    }
    Ok(())
}
