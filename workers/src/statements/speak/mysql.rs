//! MySQL and MariaDB: parameters have no types; the server makes of a value what it needs.

use serde_json::Value;
use sqlx::{
    Arguments, Executor, MySqlConnection, SqlSafeStr, error::BoxDynError, mysql::MySqlArguments,
};

use super::text;
use crate::statements::{database::Text, fault::Fault};

pub(in crate::statements) async fn execute(
    connection: &mut MySqlConnection,
    statement: &Text,
    values: &[Value],
) -> Result<u64, Fault> {
    // First of all, so that what is wrong with the statement is told from what is with values.
    prepare(connection, statement).await?;
    let mut bound = MySqlArguments::default();
    for value in values {
        bind(&mut bound, value).map_err(|error| Fault::from(&sqlx::Error::Encode(error)))?;
    }
    let done = sqlx::query_with(statement.safe(), bound).execute(connection).await;
    done.map(|it| it.rows_affected()).map_err(|error| Fault::from(&error))
}

/// The connection keeps the statement, so only the first call asks.
pub(in crate::statements) async fn prepare(
    connection: &mut MySqlConnection,
    statement: &Text,
) -> Result<(), Fault> {
    let prepared = connection.prepare(statement.safe().into_sql_str()).await;
    prepared.map(drop).map_err(|error| Fault::prepared(&error))
}

fn bind(bound: &mut MySqlArguments, value: &Value) -> Result<(), BoxDynError> {
    match value {
        Value::Null => bound.add(None::<String>),
        Value::Bool(truth) => bound.add(truth),
        Value::Number(number) => match (number.as_i64(), number.as_u64()) {
            (Some(whole), _) => bound.add(whole),
            (None, Some(whole)) => bound.add(whole),
            (None, None) => bound.add(number.as_f64()),
        },
        Value::String(_) | Value::Array(_) | Value::Object(_) => bound.add(text(value)),
    }
}
