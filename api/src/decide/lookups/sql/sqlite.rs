//! SQLite: opened to read only. There is no server to set a limit, so the query is told to stop.

use std::time::Instant;

use futures_util::TryStreamExt;
use serde_json::{Map, Value};
use sqlx::{
    Arguments, Column, Decode, Either, Executor, Row, SqlStr, Sqlite, SqliteConnection, Statement,
    TypeInfo, ValueRef,
    sqlite::{SqliteArguments, SqliteConnectOptions, SqliteRow, SqliteValueRef},
};

use super::{Dialect, Limits, SqlFault, failed, fits, from_bytes, from_float, text, unprepared};

/// So many of SQLite's own steps (some hundred thousand a millisecond) go by between two looks at
/// the clock.
const STEPS: i32 = 10_000;

/// What SQLite calls an interrupted query.
const INTERRUPTED: &str = "9";

impl Dialect for Sqlite {
    fn tame(options: SqliteConnectOptions, limits: Limits) -> SqliteConnectOptions {
        options
            .read_only(true)
            .create_if_missing(false)
            .busy_timeout(limits.time)
            .statement_cache_capacity(8)
            .pragma("query_only", "on")
    }

    async fn begin(_connection: &mut SqliteConnection, _limits: Limits) -> sqlx::Result<()> {
        Ok(())
    }

    async fn prepare(connection: &mut SqliteConnection, query: SqlStr) -> Result<usize, SqlFault> {
        let statement = connection.prepare(query).await.map_err(|error| unprepared(&error))?;
        Ok(match statement.parameters() {
            Some(Either::Right(count)) => count,
            Some(Either::Left(types)) => types.len(),
            None => 0,
        })
    }

    async fn first_row(
        connection: &mut SqliteConnection,
        query: SqlStr,
        arguments: &[Value],
        limits: Limits,
    ) -> Result<Option<Map<String, Value>>, SqlFault> {
        fits(Self::prepare(connection, query.clone()).await?, arguments.len())?;
        let mut bound = SqliteArguments::default();
        for (place, value) in arguments.iter().enumerate() {
            bind(&mut bound, value).ok_or(SqlFault::Argument(place + 1))?;
        }
        stop_after(connection, limits).await?;
        let row = sqlx::query_with(query, bound).fetch_optional(connection).await;
        row.map_err(|error| late_or_failed(&error))?.map(|row| columns(&row)).transpose()
    }

    async fn first_column(
        connection: &mut SqliteConnection,
        query: SqlStr,
        each: &mut (dyn FnMut(String) -> bool + Send),
        limits: Limits,
    ) -> Result<(), SqlFault> {
        stop_after(connection, limits).await?;
        let mut rows = sqlx::query(query).fetch(connection);
        while let Some(row) = rows.try_next().await.map_err(|error| late_or_failed(&error))? {
            if let Some(entry) = column(&row, 0)?.and_then(text)
                && !each(entry)
            {
                break;
            }
        }
        Ok(())
    }
}

/// Without it a query would keep its thread busy long after we stopped waiting.
async fn stop_after(connection: &mut SqliteConnection, limits: Limits) -> Result<(), SqlFault> {
    let mut handle = connection.lock_handle().await.map_err(|error| failed(&error))?;
    let end = Instant::now() + limits.time;
    handle.set_progress_handler(STEPS, move || Instant::now() < end);
    Ok(())
}

fn late_or_failed(error: &sqlx::Error) -> SqlFault {
    match failed(error) {
        SqlFault::Failed(Some(code)) if code == INTERRUPTED => SqlFault::Late,
        other => other,
    }
}

fn bind(bound: &mut SqliteArguments, value: &Value) -> Option<()> {
    match value {
        Value::Null => bound.add(None::<String>),
        Value::Bool(truth) => bound.add(*truth),
        Value::Number(number) => match number.as_i64() {
            Some(whole) => bound.add(whole),
            None if number.is_u64() => return None,
            None => bound.add(number.as_f64()?),
        },
        Value::String(text) => bound.add(text.clone()),
        Value::Array(_) | Value::Object(_) => bound.add(value.to_string()),
    }
    .ok()
}

fn columns(row: &SqliteRow) -> Result<Map<String, Value>, SqlFault> {
    let mut answer = Map::new();
    for (place, it) in row.columns().iter().enumerate() {
        if let Some(value) = column(row, place)? {
            answer.insert(it.name().to_owned(), value);
        }
    }
    Ok(answer)
}

fn column(row: &SqliteRow, place: usize) -> Result<Option<Value>, SqlFault> {
    let raw = row.try_get_raw(place).map_err(|error| failed(&error))?;
    if raw.is_null() {
        return Ok(None);
    }
    let column = row.column(place);
    let stored = raw.type_info().name().to_owned();
    // SQLite itself knows no truth: what the column was declared as says more. Dates are text or
    // numbers, however they were written, and are given like that.
    let value = match (stored.as_str(), column.type_info().name()) {
        ("INTEGER", "BOOLEAN") => read::<bool>(raw).map(Value::Bool),
        ("INTEGER", _) => read::<i64>(raw).map(Value::from),
        ("REAL", _) => read::<f64>(raw).and_then(from_float),
        ("TEXT", _) => read::<String>(raw).map(Value::String),
        ("BLOB", _) => read::<Vec<u8>>(raw).map(|bytes| from_bytes(&bytes)),
        _ => None,
    };
    value.map(Some).ok_or_else(|| SqlFault::Column {
        column: column.name().to_owned(),
        type_name: stored.to_ascii_lowercase(),
    })
}

fn read<'r, T: Decode<'r, Sqlite>>(raw: SqliteValueRef<'r>) -> Option<T> {
    T::decode(raw).ok()
}
