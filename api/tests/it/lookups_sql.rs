//! Lists and lookups in real databases: PostgreSQL, MariaDB and SQLite.

use std::{path::Path, time::Duration};

use serde_json::{Value, json};
use sqlx::{ConnectOptions, Connection};
use tokio::time::Instant;
use vestibule_api::{
    AnswerFrom, BreakerSettings, CacheSettings, DatabaseUrl, Fetched, List, ListFault,
    ListSettings, ListSource, Lookup, LookupFailure, LookupMetrics, LookupSettings, LookupSource,
    SqlFault,
};
use vestibule_testkit::{MySql, Postgres, eventually};

const LONG: Duration = Duration::from_secs(60);

/// A database with people in it, and its way of saying things.
struct Case {
    url: String,
    placeholder: &'static str,
    /// Would take half a minute.
    slow: &'static str,
    answer: Value,
}

const COLUMNS: &str = "id, name, score, rate, vip, born, seen, note";

impl Case {
    fn lookup(
        &self,
        query: &str,
        arguments: usize,
        time_limit: Duration,
    ) -> anyhow::Result<Lookup> {
        let settings = LookupSettings {
            name: "crm".into(),
            source: LookupSource::Sql { database: self.database()?, query: query.into() },
            arguments,
            time_limit,
            cache: CacheSettings { fresh: Duration::ZERO, stale: Duration::ZERO, entries: 0 },
            concurrency: 2,
            breaker: BreakerSettings { failures: 0, pause: LONG },
        };
        Ok(Lookup::new(settings, &LookupMetrics::unregistered())?)
    }

    fn database(&self) -> anyhow::Result<DatabaseUrl> {
        Ok(DatabaseUrl::parse(&self.url.as_str().into())?)
    }

    fn by_name(&self) -> String {
        format!("SELECT {COLUMNS} FROM people WHERE name = {}", self.placeholder)
    }

    fn list(&self, query: &str) -> anyhow::Result<ListSettings> {
        Ok(ListSettings {
            name: "names".into(),
            source: ListSource::Sql {
                database: self.database()?,
                query: query.into(),
                refresh: LONG,
            },
            ignore_case: true,
        })
    }
}

async fn fetch(lookup: &Lookup, arguments: &[Value]) -> Result<Fetched, LookupFailure> {
    lookup.fetch(arguments, Instant::now() + LONG).await
}

/// All that the three have in common.
async fn try_all(case: &Case) -> anyhow::Result<()> {
    rows_become_json(case).await?;
    arguments_are_bound_and_nothing_else(case).await?;
    mistakes_are_found_before_the_first_call(case).await?;
    nothing_is_written(case).await?;
    a_slow_query_is_late_and_leaves_no_mark(case).await?;
    a_list_is_the_first_column(case).await?;
    Ok(())
}

async fn rows_become_json(case: &Case) -> anyhow::Result<()> {
    let lookup = case.lookup(&case.by_name(), 1, LONG)?;
    lookup.verify().await?;
    let ada = fetch(&lookup, &[json!("Ada")]).await?;
    assert_eq!(ada.from, AnswerFrom::Source);
    assert_eq!(Value::Object((*ada.answer).clone()), case.answer);
    // All that may be absent is.
    let bob = fetch(&lookup, &[json!("Bob")]).await?;
    let expected = json!({ "found": true, "id": 2, "name": "Bob" });
    assert_eq!(Value::Object((*bob.answer).clone()), expected);
    Ok(())
}

async fn arguments_are_bound_and_nothing_else(case: &Case) -> anyhow::Result<()> {
    let nobody = json!({ "found": false });
    let lookup = case.lookup(&case.by_name(), 1, LONG)?;
    for who in ["", "' OR '1'='1", "Ada'; DROP TABLE people; --", "\\", "Ada\u{301}", "%"] {
        let answer = fetch(&lookup, &[json!(who)]).await?.answer;
        assert_eq!(Value::Object((*answer).clone()), nobody, "{who}");
    }
    let none = fetch(&lookup, &[Value::Null]).await?.answer;
    assert_eq!(Value::Object((*none).clone()), nobody);

    let by_id = format!("SELECT name FROM people WHERE id = {}", case.placeholder);
    let lookup = case.lookup(&by_id, 1, LONG)?;
    // A platform may well write a number as text.
    for id in [json!(1), json!("1")] {
        assert_eq!(fetch(&lookup, &[id]).await?.answer["name"], "Ada");
    }
    let too_many = fetch(&lookup, &[json!(1), json!(2)]).await.err();
    assert_eq!(too_many, Some(LookupFailure::BadArguments));
    Ok(())
}

async fn mistakes_are_found_before_the_first_call(case: &Case) -> anyhow::Result<()> {
    for arguments in [0, 2] {
        let checked = case.lookup(&case.by_name(), arguments, LONG)?.verify().await;
        assert_eq!(checked, Err(SqlFault::Placeholders { expected: 1, given: arguments }));
    }
    let fault = case.lookup("SELECT nothing_of_the_kind FROM people", 0, LONG)?.verify().await;
    let Err(SqlFault::Query(message)) = fault else { anyhow::bail!("{fault:?}") };
    assert!(message.contains("nothing_of_the_kind"), "{message}");
    Ok(())
}

async fn nothing_is_written(case: &Case) -> anyhow::Result<()> {
    let write =
        format!("INSERT INTO people (id, name) VALUES (3, {}) RETURNING id", case.placeholder);
    let failure = fetch(&case.lookup(&write, 1, LONG)?, &[json!("Eve")]).await.err();
    assert_eq!(failure, Some(LookupFailure::Unavailable));
    let lookup = case.lookup(&case.by_name(), 1, LONG)?;
    assert_eq!(fetch(&lookup, &[json!("Eve")]).await?.answer["found"], false);
    Ok(())
}

async fn a_slow_query_is_late_and_leaves_no_mark(case: &Case) -> anyhow::Result<()> {
    // Twice the connections, so that one left behind by each would be missed.
    let lookup = case.lookup(case.slow, 1, Duration::from_millis(300))?;
    for _ in 0..4 {
        let failure = fetch(&lookup, &[json!("slow")]).await.err();
        assert_eq!(failure, Some(LookupFailure::Late));
    }
    // The same query lets this one through at once. A busy machine may take it for slow, too.
    eventually(LONG, "the connections are there again", async || {
        fetch(&lookup, &[json!("quick")]).await.is_ok_and(|it| it.answer["found"] == true)
    })
    .await
}

async fn a_list_is_the_first_column(case: &Case) -> anyhow::Result<()> {
    let settings = case.list("SELECT name, id FROM people UNION ALL SELECT NULL, 0")?;
    let list = List::load(&settings).await?;
    assert_eq!(list.len(), 2);
    assert!(list.contains("ADA") && list.contains("bob") && !list.contains("Eve"));
    let ids = List::load(&case.list("SELECT id FROM people")?).await?;
    assert!(ids.contains("1") && ids.contains("2") && ids.len() == 2);

    let query = format!("SELECT name FROM people WHERE name = {}", case.placeholder);
    let Err(error) = List::load(&case.list(&query)?).await else {
        anyhow::bail!("a list has nothing to bind")
    };
    let is_expected =
        matches!(error.fault, ListFault::Sql(SqlFault::Placeholders { expected: 1, given: 0 }));
    assert!(is_expected && !error.is_temporary(), "{error}");
    Ok(())
}

#[tokio::test]
async fn postgresql_answers_lookups_and_fills_lists() -> anyhow::Result<()> {
    let mut server = Postgres::start().await?;
    let mut connection = sqlx::PgConnection::connect(&server.url()).await?;
    sqlx::raw_sql(
        "CREATE TYPE tier AS ENUM ('gold', 'tin');
         CREATE TABLE people (id int PRIMARY KEY, name text, score numeric(8, 2), rate real,
             vip boolean, born date, seen timestamptz, note jsonb, tier tier, tags text[],
             uid uuid, plain timestamp);
         INSERT INTO people VALUES (1, 'Ada', 12.50, 0.1, true, '1815-12-10',
             '2024-02-29 13:30:00+01', '{\"a\": [1, null]}', 'gold', '{x,y}',
             '018f2f6e-0000-7000-8000-000000000000', '2024-02-29 12:30:00.5');
         INSERT INTO people (id, name) VALUES (2, 'Bob')",
    )
    .execute(&mut connection)
    .await?;
    let case = Case {
        url: server.url(),
        placeholder: "$1",
        slow: "SELECT pg_sleep(CASE $1 WHEN 'slow' THEN 30 ELSE 0 END)::text",
        answer: json!({
            "found": true, "id": 1, "name": "Ada", "score": 12.5, "rate": 0.1, "vip": true,
            "born": "1815-12-10", "seen": "2024-02-29T12:30:00Z", "note": { "a": [1, null] },
        }),
    };
    try_all(&case).await?;

    // Placeholders have types here; all that are taken, in one query.
    let typed = "SELECT tier, tags, plain FROM people WHERE tier = $1 AND uid = $2 AND born < $3
        AND seen < $4 AND vip = $5 AND score > $6 AND rate < $7 AND note @> $8 AND tags = $9";
    let arguments = [
        json!("gold"),
        json!("018f2f6e-0000-7000-8000-000000000000"),
        json!("1900-01-01"),
        json!("2024-03-01T00:00:00+02:00"),
        json!("true"),
        json!("12.49"),
        json!(0.5),
        json!({ "a": [1] }),
        json!(["x", "y"]),
    ];
    let lookup = case.lookup(typed, arguments.len(), LONG)?;
    lookup.verify().await?;
    let answer = fetch(&lookup, &arguments).await?.answer;
    let expected = json!({
        "found": true, "tier": "gold", "tags": ["x", "y"], "plain": "2024-02-29T12:30:00.5Z",
    });
    assert_eq!(Value::Object((*answer).clone()), expected);
    for (place, wrong) in [(0, json!("lead")), (1, json!("x")), (2, json!("soon")), (6, json!("a"))]
    {
        let mut arguments = arguments.clone();
        arguments[place] = wrong;
        let failure = fetch(&lookup, &arguments).await.unwrap_err();
        assert_eq!(failure, LookupFailure::BadArguments, "argument {place}");
    }
    let fault = case.lookup("SELECT 1 WHERE $1 << inet '10.0.0.0/8'", 1, LONG)?.verify().await;
    assert!(matches!(fault, Err(SqlFault::Placeholder { place: 1, .. })), "{fault:?}");

    // A table that changes under a prepared statement.
    let everything = case.lookup("SELECT * FROM people WHERE name = $1", 1, LONG)?;
    fetch(&everything, &[json!("Ada")]).await?;
    sqlx::raw_sql("ALTER TABLE people ADD COLUMN extra int DEFAULT 5")
        .execute(&mut connection)
        .await?;
    eventually(LONG, "the new column is seen", async || {
        fetch(&everything, &[json!("Ada")]).await.is_ok_and(|it| it.answer["extra"] == 5)
    })
    .await?;

    // A server that hangs, dies and comes back.
    let lookup = case.lookup(&case.by_name(), 1, Duration::from_millis(500))?;
    eventually(LONG, "it answers", async || fetch(&lookup, &[json!("Ada")]).await.is_ok()).await?;
    server.pause();
    assert_eq!(fetch(&lookup, &[json!("Ada")]).await.unwrap_err(), LookupFailure::Late);
    server.resume();
    eventually(LONG, "it answers again", async || fetch(&lookup, &[json!("Ada")]).await.is_ok())
        .await?;
    server.kill();
    assert!(fetch(&lookup, &[json!("Ada")]).await.is_err());
    let fault = lookup.verify().await.unwrap_err();
    assert!(fault.is_temporary(), "{fault}");
    let error = List::load(&case.list("SELECT name FROM people")?).await.unwrap_err();
    assert!(error.is_temporary(), "{error}");
    server.restart().await?;
    eventually(LONG, "it answers at last", async || fetch(&lookup, &[json!("Ada")]).await.is_ok())
        .await
}

#[tokio::test]
async fn mariadb_answers_lookups_and_fills_lists() -> anyhow::Result<()> {
    let server = MySql::start().await?;
    let url = server.create_database("shop").await?;
    let mut connection = sqlx::MySqlConnection::connect(&url).await?;
    sqlx::raw_sql(
        "CREATE TABLE people (id int unsigned PRIMARY KEY, name varchar(100) COLLATE utf8mb4_bin,
             score decimal(8, 2), rate float, vip boolean, born date, seen timestamp NULL,
             note enum('a', 'b'));
         INSERT INTO people VALUES (1, 'Ada', 12.50, 0.1, true, '1815-12-10',
             '2024-02-29 12:30:00', 'b');
         INSERT INTO people (id, name) VALUES (2, 'Bob')",
    )
    .execute(&mut connection)
    .await?;
    let case = Case {
        url,
        placeholder: "?",
        slow: "SELECT SLEEP(IF(? = 'slow', 30, 0))",
        answer: json!({
            "found": true, "id": 1, "name": "Ada", "score": 12.5, "rate": 0.1, "vip": true,
            "born": "1815-12-10", "seen": "2024-02-29T12:30:00Z", "note": "b",
        }),
    };
    try_all(&case).await?;

    let lookup = case.lookup(&case.by_name(), 1, Duration::from_millis(500))?;
    eventually(LONG, "it answers", async || fetch(&lookup, &[json!("Ada")]).await.is_ok()).await?;
    server.pause();
    assert_eq!(fetch(&lookup, &[json!("Ada")]).await.unwrap_err(), LookupFailure::Late);
    server.resume();
    eventually(LONG, "it answers again", async || fetch(&lookup, &[json!("Ada")]).await.is_ok())
        .await
}

#[tokio::test]
async fn sqlite_answers_lookups_and_fills_lists() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let case = sqlite(&folder.path().join("people.db")).await?;
    try_all(&case).await?;
    // A file that is not there is not made.
    let missing = folder.path().join("missing.db");
    let lost = Case { url: format!("sqlite:{}", missing.display()), ..case };
    let fault = lost.lookup(&lost.by_name(), 1, LONG)?.verify().await.unwrap_err();
    assert!(fault.is_temporary() && !missing.exists(), "{fault}");
    Ok(())
}

async fn sqlite(file: &Path) -> anyhow::Result<Case> {
    let options = sqlx::sqlite::SqliteConnectOptions::new().filename(file).create_if_missing(true);
    let mut connection = options.connect().await?;
    sqlx::raw_sql(
        "CREATE TABLE people (id INTEGER PRIMARY KEY, name TEXT, score REAL, rate REAL,
             vip BOOLEAN, born DATE, seen TEXT, note BLOB);
         INSERT INTO people VALUES (1, 'Ada', 12.5, 0.1, true, '1815-12-10',
             '2024-02-29T12:30:00Z', x'ff00');
         INSERT INTO people (id, name) VALUES (2, 'Bob')",
    )
    .execute(&mut connection)
    .await?;
    connection.close().await?;
    Ok(Case {
        url: format!("sqlite:{}", file.display()),
        placeholder: "?",
        slow: "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n
                   WHERE i < CASE ? WHEN 'slow' THEN 1000000000 ELSE 1 END)
               SELECT count(*) FROM n",
        answer: json!({
            "found": true, "id": 1, "name": "Ada", "score": 12.5, "rate": 0.1, "vip": true,
            "born": "1815-12-10", "seen": "2024-02-29T12:30:00Z", "note": "/wA=",
        }),
    })
}
