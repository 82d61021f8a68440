//! PostgreSQL: placeholders have types, which the server finds in the query and we follow.

use futures_util::TryStreamExt;
use serde_json::{Map, Value};
use sqlx::{
    Column, Decode, Either, Executor, PgConnection, Postgres, Row, SqlStr, Statement, Type,
    TypeInfo, ValueRef,
    postgres::{PgArguments, PgConnectOptions, PgRow, PgTypeInfo, PgTypeKind, PgValueRef},
    types::{Decimal, Json, Uuid},
};
use time::{
    Date, OffsetDateTime, PrimitiveDateTime, Time, format_description::well_known::Rfc3339,
};

use super::{
    DATE, Dialect, Limits, SqlFault, failed, fits, from_date, from_decimal, from_float,
    from_moment, from_plain_moment, from_short_float, from_time, text, unprepared,
};

impl Dialect for Postgres {
    fn tame(options: PgConnectOptions, limits: Limits) -> PgConnectOptions {
        let milliseconds = limits.time.as_millis().max(1).to_string();
        options
            .application_name("vestibule")
            // With it off, the server would be told types of ours instead of finding its own.
            .statement_cache_capacity(8)
            .options([
                ("default_transaction_read_only", "on"),
                ("statement_timeout", &milliseconds),
                ("lock_timeout", &milliseconds),
            ])
    }

    async fn begin(_connection: &mut PgConnection, _limits: Limits) -> sqlx::Result<()> {
        Ok(())
    }

    async fn prepare(connection: &mut PgConnection, query: SqlStr) -> Result<usize, SqlFault> {
        let types = placeholders(connection, query).await?;
        for (place, it) in types.iter().enumerate() {
            if Placeholder::of(it).is_none() {
                let type_name = it.name().to_ascii_lowercase();
                return Err(SqlFault::Placeholder { place: place + 1, type_name });
            }
        }
        Ok(types.len())
    }

    async fn first_row(
        connection: &mut PgConnection,
        query: SqlStr,
        arguments: &[Value],
        _limits: Limits,
    ) -> Result<Option<Map<String, Value>>, SqlFault> {
        let types = placeholders(connection, query.clone()).await?;
        fits(types.len(), arguments.len())?;
        let mut bound = PgArguments::default();
        for (place, (it, value)) in types.iter().zip(arguments).enumerate() {
            Placeholder::of(it)
                .and_then(|placeholder| placeholder.bind(&mut bound, value))
                .ok_or(SqlFault::Argument(place + 1))?;
        }
        let row = sqlx::query_with(query, bound).fetch_optional(connection).await;
        row.map_err(|error| failed(&error))?.map(|row| columns(&row)).transpose()
    }

    async fn first_column(
        connection: &mut PgConnection,
        query: SqlStr,
        each: &mut (dyn FnMut(String) -> bool + Send),
        _limits: Limits,
    ) -> Result<(), SqlFault> {
        let mut rows = sqlx::query(query).fetch(connection);
        while let Some(row) = rows.try_next().await.map_err(|error| failed(&error))? {
            if let Some(entry) = column(&row, 0)?.and_then(text)
                && !each(entry)
            {
                break;
            }
        }
        Ok(())
    }
}

/// The statement is kept by the connection, so only the first call asks the server.
async fn placeholders(
    connection: &mut PgConnection,
    query: SqlStr,
) -> Result<Vec<PgTypeInfo>, SqlFault> {
    let statement = connection.prepare(query).await.map_err(|error| unprepared(&error))?;
    match statement.parameters() {
        Some(Either::Left(types)) => Ok(types.to_vec()),
        Some(Either::Right(_)) | None => Ok(Vec::new()),
    }
}

/// What can be bound. A value comes as JSON, where a platform often writes numbers and truth as
/// text: text that reads as what is wanted serves as well, as it does in the other databases.
#[derive(Clone, Copy)]
enum Placeholder {
    Bool,
    Int2,
    Int4,
    Int8,
    Float4,
    Float8,
    Numeric,
    Text,
    Uuid,
    Date,
    Timestamp,
    TimestampWithZone,
    Json,
    TextArray,
}

impl Placeholder {
    fn of(it: &PgTypeInfo) -> Option<Self> {
        match it.kind() {
            PgTypeKind::Domain(base) => return Self::of(base),
            // Both are sent as their text.
            PgTypeKind::Enum(_) => return Some(Self::Text),
            _ => {}
        }
        Some(match it.name().to_ascii_uppercase().as_str() {
            "BOOL" => Self::Bool,
            "INT2" => Self::Int2,
            "INT4" => Self::Int4,
            "INT8" => Self::Int8,
            "FLOAT4" => Self::Float4,
            "FLOAT8" => Self::Float8,
            "NUMERIC" => Self::Numeric,
            "TEXT" | "VARCHAR" | "CHAR" | "NAME" | "UNKNOWN" | "CITEXT" => Self::Text,
            "UUID" => Self::Uuid,
            "DATE" => Self::Date,
            "TIMESTAMP" => Self::Timestamp,
            "TIMESTAMPTZ" => Self::TimestampWithZone,
            "JSON" | "JSONB" => Self::Json,
            "TEXT[]" | "VARCHAR[]" => Self::TextArray,
            _ => return None,
        })
    }

    /// `None` where the value cannot be one of these.
    fn bind(self, bound: &mut PgArguments, value: &Value) -> Option<()> {
        use sqlx::Arguments;

        if value.is_null() {
            return bound.add(None::<String>).ok();
        }
        match self {
            Self::Bool => bound.add(match value {
                Value::Bool(truth) => *truth,
                other => parsed::<bool>(other)?,
            }),
            Self::Int2 => bound.add(parsed::<i16>(value)?),
            Self::Int4 => bound.add(parsed::<i32>(value)?),
            Self::Int8 => bound.add(parsed::<i64>(value)?),
            Self::Float4 => bound.add(parsed::<f32>(value)?),
            Self::Float8 => bound.add(parsed::<f64>(value)?),
            Self::Numeric => bound.add(parsed::<Decimal>(value)?),
            Self::Text => bound.add(text(value.clone())?),
            Self::Uuid => bound.add(parsed::<Uuid>(value)?),
            Self::Date => bound.add(Date::parse(value.as_str()?, DATE).ok()?),
            Self::Timestamp => {
                let moment = OffsetDateTime::parse(value.as_str()?, &Rfc3339).ok()?;
                let moment = moment.to_offset(time::UtcOffset::UTC);
                bound.add(PrimitiveDateTime::new(moment.date(), moment.time()))
            }
            Self::TimestampWithZone => {
                bound.add(OffsetDateTime::parse(value.as_str()?, &Rfc3339).ok()?)
            }
            Self::Json => bound.add(Json(value)),
            Self::TextArray => {
                let entries = value.as_array()?.iter().cloned().map(text);
                bound.add(entries.collect::<Option<Vec<String>>>()?)
            }
        }
        .ok()
    }
}

/// A number, or text that reads as one.
fn parsed<T: std::str::FromStr>(value: &Value) -> Option<T> {
    match value {
        Value::String(text) => text.trim().parse().ok(),
        Value::Number(number) => number.to_string().parse().ok(),
        _ => None,
    }
}

fn columns(row: &PgRow) -> Result<Map<String, Value>, SqlFault> {
    let mut answer = Map::new();
    for (place, it) in row.columns().iter().enumerate() {
        if let Some(value) = column(row, place)? {
            answer.insert(it.name().to_owned(), value);
        }
    }
    Ok(answer)
}

fn column(row: &PgRow, place: usize) -> Result<Option<Value>, SqlFault> {
    let raw = row.try_get_raw(place).map_err(|error| failed(&error))?;
    if raw.is_null() {
        return Ok(None);
    }
    let type_name = raw.type_info().name().to_ascii_lowercase();
    json(raw)
        .map(Some)
        .ok_or_else(|| SqlFault::Column { column: row.column(place).name().to_owned(), type_name })
}

fn json(raw: PgValueRef<'_>) -> Option<Value> {
    let it = raw.type_info().into_owned();
    if matches!(it.kind(), PgTypeKind::Enum(_)) {
        return read::<String>(raw).map(Value::String);
    }
    match it.name().to_ascii_uppercase().as_str() {
        "BOOL" => read::<bool>(raw).map(Value::Bool),
        "INT2" => read::<i16>(raw).map(Value::from),
        "INT4" => read::<i32>(raw).map(Value::from),
        "INT8" => read::<i64>(raw).map(Value::from),
        "FLOAT4" => read::<f32>(raw).and_then(from_short_float),
        "FLOAT8" => read::<f64>(raw).and_then(from_float),
        "NUMERIC" => read::<Decimal>(raw).and_then(from_decimal),
        "TEXT" | "VARCHAR" | "CHAR" | "NAME" | "UNKNOWN" | "CITEXT" => {
            read::<String>(raw).map(Value::String)
        }
        "UUID" => read::<Uuid>(raw).map(|id| id.to_string().into()),
        "DATE" => read::<Date>(raw).and_then(from_date),
        "TIME" => read::<Time>(raw).and_then(from_time),
        "TIMESTAMP" => read::<PrimitiveDateTime>(raw).and_then(from_plain_moment),
        "TIMESTAMPTZ" => read::<OffsetDateTime>(raw).and_then(from_moment),
        "JSON" | "JSONB" => read::<Json<Value>>(raw).map(|it| it.0),
        "BYTEA" => read::<Vec<u8>>(raw).map(|bytes| data_encoding::BASE64.encode(&bytes).into()),
        "BOOL[]" => array::<bool>(raw),
        "INT2[]" => array::<i16>(raw),
        "INT4[]" => array::<i32>(raw),
        "INT8[]" => array::<i64>(raw),
        "TEXT[]" | "VARCHAR[]" => array::<String>(raw),
        _ => None,
    }
}

fn read<'r, T: Decode<'r, Postgres>>(raw: PgValueRef<'r>) -> Option<T> {
    T::decode(raw).ok()
}

fn array<'r, T>(raw: PgValueRef<'r>) -> Option<Value>
where
    Vec<Option<T>>: Decode<'r, Postgres>,
    T: Type<Postgres> + Into<Value>,
{
    let entries = read::<Vec<Option<T>>>(raw)?;
    Some(entries.into_iter().map(|entry| entry.map_or(Value::Null, Into::into)).collect())
}
