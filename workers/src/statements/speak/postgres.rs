//! PostgreSQL: parameters have types, which the server finds in the statement and we follow.

use serde_json::Value;
use sqlx::{
    Arguments, Either, Executor, PgConnection, Statement, TypeInfo,
    postgres::{PgArguments, PgTypeInfo, PgTypeKind},
    types::{Decimal, Json, Uuid},
};
use time::{
    Date, OffsetDateTime, PrimitiveDateTime, Time,
    format_description::{StaticFormatDescription, well_known::Rfc3339},
    macros::format_description,
};

use super::{does_not_fit, text};
use crate::statements::{
    database::Text,
    fault::{Fault, FaultKind},
};

pub(in crate::statements) async fn execute(
    connection: &mut PgConnection,
    statement: &Text,
    names: &[String],
    values: &[Value],
) -> Result<u64, Fault> {
    let parameters = parameters(connection, statement, names).await?;
    let mut bound = PgArguments::default();
    for ((parameter, name), value) in parameters.iter().zip(names).zip(values) {
        parameter
            .bind(&mut bound, value)
            .ok_or_else(|| does_not_fit(name, &format!("{parameter:?}").to_ascii_lowercase()))?;
    }
    let done = sqlx::query_with(statement.safe(), bound).execute(connection).await;
    done.map(|it| it.rows_affected()).map_err(|error| Fault::from(&error))
}

/// What the statement's parameters are. The connection keeps it, so only the first call asks.
pub(in crate::statements) async fn parameters(
    connection: &mut PgConnection,
    statement: &Text,
    names: &[String],
) -> Result<Vec<Parameter>, Fault> {
    use sqlx::SqlSafeStr;

    let prepared = connection.prepare(statement.safe().into_sql_str()).await;
    let prepared = prepared.map_err(|error| Fault::prepared(&error))?;
    let Some(Either::Left(types)) = prepared.parameters() else { return Ok(Vec::new()) };
    let parameter = |(it, name): (&PgTypeInfo, &String)| {
        Parameter::of(it).ok_or_else(|| {
            let type_name = it.name().to_ascii_lowercase();
            let what = format!(
                "parameter :{name} is of type {type_name}, to which nothing can be bound: write \
                 :{name}::text::{type_name}"
            );
            Fault::new(FaultKind::NotPermitted, what)
        })
    };
    types.iter().zip(names).map(parameter).collect()
}

/// What can be bound. A value comes as JSON, where a platform often writes numbers and truth as
/// text: text that reads as what is wanted serves as well, as it does in the other databases.
#[derive(Clone, Copy, Debug)]
pub(in crate::statements) enum Parameter {
    Boolean,
    SmallInt,
    Integer,
    BigInt,
    Real,
    Double,
    Numeric,
    Text,
    Uuid,
    Date,
    Time,
    Timestamp,
    TimestampWithZone,
    Json,
    TextArray,
}

const DATE: StaticFormatDescription = format_description!("[year]-[month]-[day]");
const TIME: StaticFormatDescription =
    format_description!("[hour]:[minute][optional [:[second][optional [.[subsecond digits:1+]]]]]");

impl Parameter {
    fn of(it: &PgTypeInfo) -> Option<Self> {
        match it.kind() {
            PgTypeKind::Domain(base) => return Self::of(base),
            // Sent as its text.
            PgTypeKind::Enum(_) => return Some(Self::Text),
            _ => {}
        }
        Some(match it.name().to_ascii_uppercase().as_str() {
            "BOOL" => Self::Boolean,
            "INT2" => Self::SmallInt,
            "INT4" => Self::Integer,
            "INT8" => Self::BigInt,
            "FLOAT4" => Self::Real,
            "FLOAT8" => Self::Double,
            "NUMERIC" => Self::Numeric,
            "TEXT" | "VARCHAR" | "CHAR" | "NAME" | "UNKNOWN" | "CITEXT" => Self::Text,
            "UUID" => Self::Uuid,
            "DATE" => Self::Date,
            "TIME" => Self::Time,
            "TIMESTAMP" => Self::Timestamp,
            "TIMESTAMPTZ" => Self::TimestampWithZone,
            "JSON" | "JSONB" => Self::Json,
            "TEXT[]" | "VARCHAR[]" => Self::TextArray,
            _ => return None,
        })
    }

    /// `None` where the value cannot be one of these.
    fn bind(self, bound: &mut PgArguments, value: &Value) -> Option<()> {
        if value.is_null() {
            return bound.add(None::<String>).ok();
        }
        match self {
            Self::Boolean => bound.add(match value {
                Value::Bool(truth) => *truth,
                other => parsed::<bool>(other)?,
            }),
            Self::SmallInt => bound.add(parsed::<i16>(value)?),
            Self::Integer => bound.add(parsed::<i32>(value)?),
            Self::BigInt => bound.add(parsed::<i64>(value)?),
            Self::Real => bound.add(parsed::<f32>(value)?),
            Self::Double => bound.add(parsed::<f64>(value)?),
            Self::Numeric => bound.add(parsed::<Decimal>(value)?),
            Self::Text => bound.add(text(value)),
            Self::Uuid => bound.add(parsed::<Uuid>(value)?),
            Self::Date => bound.add(Date::parse(value.as_str()?, DATE).ok()?),
            Self::Time => bound.add(Time::parse(value.as_str()?, TIME).ok()?),
            Self::Timestamp => {
                let moment = moment(value)?.to_offset(time::UtcOffset::UTC);
                bound.add(PrimitiveDateTime::new(moment.date(), moment.time()))
            }
            Self::TimestampWithZone => bound.add(moment(value)?),
            Self::Json => bound.add(Json(value)),
            Self::TextArray => {
                bound.add(value.as_array()?.iter().map(text).collect::<Vec<String>>())
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

fn moment(value: &Value) -> Option<OffsetDateTime> {
    OffsetDateTime::parse(value.as_str()?, &Rfc3339).ok()
}
