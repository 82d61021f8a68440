//! SQLite: a parameter takes whatever comes. There is no server to set a limit, so a statement is
//! told to stop.

use std::time::Instant;

use serde_json::Value;
use sqlx::{
    Arguments, Executor, SqlSafeStr, SqliteConnection, error::BoxDynError, sqlite::SqliteArguments,
};

use super::{does_not_fit, text};
use crate::statements::{database::Text, fault::Fault};

/// So many of SQLite's own steps (some hundred thousand a millisecond) go by between two looks at
/// the clock.
const STEPS: i32 = 10_000;

pub(in crate::statements) async fn execute(
    connection: &mut SqliteConnection,
    statement: &Text,
    names: &[String],
    values: &[Value],
) -> Result<u64, Fault> {
    prepare(connection, statement).await?;
    let mut bound = SqliteArguments::default();
    for (name, value) in names.iter().zip(values) {
        bind(&mut bound, value).map_err(|_| does_not_fit(name, "a number of 64 bits"))?;
    }
    let done = sqlx::query_with(statement.safe(), bound).execute(connection).await;
    done.map(|it| it.rows_affected()).map_err(|error| Fault::from(&error))
}

/// The connection keeps the statement, so only the first call asks.
pub(in crate::statements) async fn prepare(
    connection: &mut SqliteConnection,
    statement: &Text,
) -> Result<(), Fault> {
    let prepared = connection.prepare(statement.safe().into_sql_str()).await;
    prepared.map(drop).map_err(|error| Fault::prepared(&error))
}

/// Without it a statement would keep its thread busy, and the file locked, long after we stopped
/// waiting.
pub(in crate::statements) async fn stop_at(
    connection: &mut SqliteConnection,
    end: Instant,
) -> Result<(), Fault> {
    let mut handle = connection.lock_handle().await.map_err(|error| Fault::from(&error))?;
    handle.set_progress_handler(STEPS, move || Instant::now() < end);
    Ok(())
}

pub(in crate::statements) async fn stop_no_more(
    connection: &mut SqliteConnection,
) -> Result<(), Fault> {
    let mut handle = connection.lock_handle().await.map_err(|error| Fault::from(&error))?;
    handle.remove_progress_handler();
    Ok(())
}

fn bind(bound: &mut SqliteArguments, value: &Value) -> Result<(), BoxDynError> {
    match value {
        Value::Null => bound.add(None::<String>),
        Value::Bool(truth) => bound.add(*truth),
        Value::Number(number) => match number.as_i64() {
            Some(whole) => bound.add(whole),
            None if number.is_u64() => Err("beyond 63 bits".into()),
            None => bound.add(number.as_f64()),
        },
        Value::String(_) | Value::Array(_) | Value::Object(_) => bound.add(text(value)),
    }
}
