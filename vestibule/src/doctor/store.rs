//! The store: whether it answers, has the schema of this version, and keeps what it commits.

use std::time::{Duration, Instant};

use secrecy::ExposeSecret;
use sqlx::{Connection, PgConnection, Row};
use time::OffsetDateTime;
use tokio::time::timeout;
use vestibule_store::StoreUrl;

use super::{Finding, about, ahead, clock};
use crate::{
    config::{Config, StoreTarget},
    wiring,
};

const LIMIT: Duration = Duration::from_secs(10);

pub(super) async fn findings(config: &Config) -> Vec<Finding> {
    if matches!(config.store.target, StoreTarget::Sqlite) {
        let file = wiring::store_file(config);
        if !file.exists() {
            let found = format!("{} does not exist; the first start makes it", file.display());
            return vec![Finding::ok("store", found)];
        }
    }
    let mut findings = match timeout(LIMIT, schema(config)).await {
        Ok(Ok(is_current)) => vec![judge_schema(is_current)],
        Ok(Err(error)) => return vec![unreachable(&format!("{error:#}"))],
        Err(_) => return vec![unreachable(&format!("no answer within {}", about(LIMIT)))],
    };
    if let Ok(StoreUrl::Postgres(url)) = wiring::store_url(config) {
        match timeout(LIMIT, Server::ask(url.expose_secret())).await {
            Ok(Ok(server)) => findings.extend(judge_server(&server, config.store.connections)),
            // The error may quote the URL, and with it the password.
            Ok(Err(_)) | Err(_) => findings.push(Finding::warning(
                "store.settings",
                "could not read the settings of PostgreSQL",
                "run this again; if it lasts, see PostgreSQL's log",
            )),
        }
    }
    findings
}

fn unreachable(error: &str) -> Finding {
    Finding::critical(
        "store",
        format!("{error}; sign-ups are answered, workers wait"),
        "start it, or mend `store.url` or the network",
    )
}

async fn schema(config: &Config) -> anyhow::Result<bool> {
    Ok(wiring::store(config).await?.schema_is_current().await?)
}

fn judge_schema(is_current: bool) -> Finding {
    if is_current {
        return Finding::ok("store.schema", "has all that this version needs");
    }
    Finding::critical(
        "store.schema",
        "is older than this version: its workers cannot work with it",
        "vestibule migrate",
    )
}

/// A PostgreSQL server as our user meets it.
#[derive(Clone, Debug)]
struct Server {
    fsync: String,
    synchronous_commit: String,
    full_page_writes: String,
    connections: i64,
    connections_max: i64,
    clock_ahead: time::Duration,
}

impl Server {
    async fn ask(url: &str) -> Result<Self, sqlx::Error> {
        let mut connection = PgConnection::connect(url).await?;
        let (before, asked) = (OffsetDateTime::now_utc(), Instant::now());
        let now: OffsetDateTime =
            sqlx::query("SELECT clock_timestamp()").fetch_one(&mut connection).await?.try_get(0)?;
        let clock_ahead = ahead(now, before, asked.elapsed());
        let row = sqlx::query(
            "SELECT current_setting('fsync'), current_setting('synchronous_commit'), \
                 current_setting('full_page_writes'), current_setting('max_connections')::bigint, \
                 (SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend')",
        );
        let row = row.fetch_one(&mut connection).await?;
        connection.close().await?;
        Ok(Self {
            fsync: row.try_get(0)?,
            synchronous_commit: row.try_get(1)?,
            full_page_writes: row.try_get(2)?,
            connections_max: row.try_get(3)?,
            connections: row.try_get(4)?,
            clock_ahead,
        })
    }
}

fn judge_server(server: &Server, ours: u32) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (setting, value, what) in [
        ("fsync", &server.fsync, "a crash of the machine can destroy the database"),
        ("synchronous_commit", &server.synchronous_commit, "a crash loses what was committed"),
        ("full_page_writes", &server.full_page_writes, "a crash can tear pages"),
    ] {
        if value == "off" {
            findings.push(Finding::critical(
                format!("store.{setting}"),
                format!("is off: {what}, and what a worker has done is forgotten or done again"),
                format!("{setting} = on in postgresql.conf, and for this user and database"),
            ));
        }
    }
    if findings.is_empty() {
        findings.push(Finding::ok("store.settings", "what is committed is on the disk"));
    }
    findings.push(judge_connections(server.connections, server.connections_max, ours));
    findings.push(clock("clock.store", "PostgreSQL", server.clock_ahead));
    findings
}

/// Whether one more process would find room.
fn judge_connections(used: i64, most: i64, ours: u32) -> Finding {
    let name = "store.connections";
    let found =
        format!("{used} of {most} connections are taken; each of our processes takes up to {ours}");
    // Some are kept for administrators.
    if used + i64::from(ours) > most - 3 {
        let remedy = "raise max_connections of PostgreSQL, or lower store.connections";
        return Finding::warning(name, found, remedy);
    }
    Finding::ok(name, found)
}

#[cfg(test)]
mod tests {
    use super::super::finding::State::{Critical, Ok as Fine, Warning};
    use super::*;

    fn server() -> Server {
        Server {
            fsync: "on".into(),
            synchronous_commit: "on".into(),
            full_page_writes: "on".into(),
            connections: 12,
            connections_max: 100,
            clock_ahead: time::Duration::ZERO,
        }
    }

    #[test]
    fn a_server_that_keeps_what_it_commits_is_fine() {
        let states = judge_server(&server(), 8).into_iter().map(|it| it.state);
        assert!(states.into_iter().all(|it| it == Fine));
        let lazy = Server { synchronous_commit: "local".into(), ..server() };
        assert_eq!(judge_server(&lazy, 8)[0].state, Fine, "without a standby that is as good");
    }

    #[test]
    fn each_setting_that_forgets_is_critical() {
        let off = || "off".to_owned();
        for (name, server) in [
            ("store.fsync", Server { fsync: off(), ..server() }),
            ("store.synchronous_commit", Server { synchronous_commit: off(), ..server() }),
            ("store.full_page_writes", Server { full_page_writes: off(), ..server() }),
        ] {
            let finding = judge_server(&server, 8).remove(0);
            assert_eq!((finding.check.as_str(), finding.state), (name, Critical));
        }
    }

    #[test]
    fn one_more_process_finds_room() {
        let state = |used| judge_connections(used, 100, 8).state;
        assert_eq!([state(89), state(90)], [Fine, Warning]);
        assert_eq!([judge_schema(true).state, judge_schema(false).state], [Fine, Critical]);
    }
}
