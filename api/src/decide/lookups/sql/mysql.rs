//! MySQL and MariaDB: placeholders have no types; the server makes of a value what it needs.

use futures_util::TryStreamExt;
use serde_json::{Map, Value};
use sqlx::{
    Arguments, AssertSqlSafe, Column, Decode, Either, Executor, MySql, MySqlConnection, Row,
    SqlStr, Statement, TypeInfo, ValueRef,
    mysql::{MySqlArguments, MySqlConnectOptions, MySqlRow, MySqlValueRef},
    types::{Decimal, Json},
};
use time::{Date, OffsetDateTime, PrimitiveDateTime, Time};

use super::{
    Dialect, Limits, SqlFault, failed, fits, from_bytes, from_date, from_decimal, from_float,
    from_moment, from_plain_moment, from_short_float, from_time, text, unprepared,
};

impl Dialect for MySql {
    fn tame(options: MySqlConnectOptions, _limits: Limits) -> MySqlConnectOptions {
        options.statement_cache_capacity(8)
    }

    async fn begin(connection: &mut MySqlConnection, limits: Limits) -> sqlx::Result<()> {
        let version: String =
            sqlx::query_scalar("SELECT VERSION()").fetch_one(&mut *connection).await?;
        // Two names for one thing, in two units.
        let limit = if version.contains("MariaDB") {
            format!("SET SESSION max_statement_time = {}", limits.time.as_secs_f64().max(0.001))
        } else {
            format!("SET SESSION max_execution_time = {}", limits.time.as_millis().max(1))
        };
        sqlx::raw_sql(AssertSqlSafe(limit)).execute(&mut *connection).await?;
        sqlx::raw_sql("SET SESSION TRANSACTION READ ONLY").execute(connection).await?;
        Ok(())
    }

    async fn prepare(connection: &mut MySqlConnection, query: SqlStr) -> Result<usize, SqlFault> {
        let statement = connection.prepare(query).await.map_err(|error| unprepared(&error))?;
        Ok(match statement.parameters() {
            Some(Either::Right(count)) => count,
            Some(Either::Left(types)) => types.len(),
            None => 0,
        })
    }

    async fn first_row(
        connection: &mut MySqlConnection,
        query: SqlStr,
        arguments: &[Value],
        _limits: Limits,
    ) -> Result<Option<Map<String, Value>>, SqlFault> {
        fits(Self::prepare(connection, query.clone()).await?, arguments.len())?;
        let mut bound = MySqlArguments::default();
        for (place, value) in arguments.iter().enumerate() {
            bind(&mut bound, value).ok_or(SqlFault::Argument(place + 1))?;
        }
        let row = sqlx::query_with(query, bound).fetch_optional(connection).await;
        row.map_err(|error| late_or_failed(&error))?.map(|row| columns(&row)).transpose()
    }

    async fn first_column(
        connection: &mut MySqlConnection,
        query: SqlStr,
        each: &mut (dyn FnMut(String) -> bool + Send),
        _limits: Limits,
    ) -> Result<(), SqlFault> {
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

fn late_or_failed(error: &sqlx::Error) -> SqlFault {
    use sqlx::mysql::MySqlDatabaseError;

    let number = error
        .as_database_error()
        .and_then(|error| error.try_downcast_ref::<MySqlDatabaseError>())
        .map(MySqlDatabaseError::number);
    match number {
        // The time limit of MariaDB, that of MySQL, and a lock not given in time.
        Some(1969 | 3024 | 1205) => SqlFault::Late,
        // The code that clients are given is one for almost everything; this one can be looked up.
        Some(number) => match failed(error) {
            SqlFault::Failed(_) => SqlFault::Failed(Some(number.to_string())),
            other => other,
        },
        None => failed(error),
    }
}

fn bind(bound: &mut MySqlArguments, value: &Value) -> Option<()> {
    match value {
        Value::Null => bound.add(None::<String>),
        Value::Bool(truth) => bound.add(truth),
        Value::Number(number) => match (number.as_i64(), number.as_u64()) {
            (Some(whole), _) => bound.add(whole),
            (None, Some(whole)) => bound.add(whole),
            (None, None) => bound.add(number.as_f64()?),
        },
        Value::String(text) => bound.add(text),
        Value::Array(_) | Value::Object(_) => bound.add(Json(value)),
    }
    .ok()
}

fn columns(row: &MySqlRow) -> Result<Map<String, Value>, SqlFault> {
    let mut answer = Map::new();
    for (place, it) in row.columns().iter().enumerate() {
        if let Some(value) = column(row, place)? {
            answer.insert(it.name().to_owned(), value);
        }
    }
    Ok(answer)
}

fn column(row: &MySqlRow, place: usize) -> Result<Option<Value>, SqlFault> {
    let raw = row.try_get_raw(place).map_err(|error| failed(&error))?;
    if raw.is_null() {
        return Ok(None);
    }
    let type_name = raw.type_info().name().to_ascii_lowercase();
    json(raw)
        .map(Some)
        .ok_or_else(|| SqlFault::Column { column: row.column(place).name().to_owned(), type_name })
}

fn json(raw: MySqlValueRef<'_>) -> Option<Value> {
    let it = raw.type_info().into_owned();
    match it.name() {
        "BOOLEAN" => read::<bool>(raw).map(Value::Bool),
        "TINYINT" | "SMALLINT" | "MEDIUMINT" | "INT" | "BIGINT" => {
            read::<i64>(raw).map(Value::from)
        }
        "TINYINT UNSIGNED" | "SMALLINT UNSIGNED" | "MEDIUMINT UNSIGNED" | "INT UNSIGNED"
        | "BIGINT UNSIGNED" | "BIT" | "YEAR" => read::<u64>(raw).map(Value::from),
        "FLOAT" => read::<f32>(raw).and_then(from_short_float),
        "DOUBLE" => read::<f64>(raw).and_then(from_float),
        "DECIMAL" => read::<Decimal>(raw).and_then(from_decimal),
        "DATE" => read::<Date>(raw).and_then(from_date),
        "TIME" => read::<Time>(raw).and_then(from_time),
        "DATETIME" => read::<PrimitiveDateTime>(raw).and_then(from_plain_moment),
        // The session is in UTC.
        "TIMESTAMP" => read::<OffsetDateTime>(raw).and_then(from_moment),
        "JSON" => read::<Json<Value>>(raw).map(|it| it.0),
        "CHAR" | "VARCHAR" | "TINYTEXT" | "TEXT" | "MEDIUMTEXT" | "LONGTEXT" | "ENUM" | "SET" => {
            read::<String>(raw).map(Value::String)
        }
        "BINARY" | "VARBINARY" | "TINYBLOB" | "BLOB" | "MEDIUMBLOB" | "LONGBLOB" => {
            read::<&[u8]>(raw).map(from_bytes)
        }
        _ => None,
    }
}

fn read<'r, T: Decode<'r, MySql>>(raw: MySqlValueRef<'r>) -> Option<T> {
    T::decode(raw).ok()
}
