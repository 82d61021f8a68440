//! How values are bound, in each of the three databases.

pub(super) mod mysql;
pub(super) mod postgres;
pub(super) mod sqlite;

use serde_json::Value;

use super::fault::{Fault, FaultKind};

/// A value that its parameter cannot take. It is not repeated: it is somebody's data.
fn does_not_fit(name: &str, type_name: &str) -> Fault {
    let what = format!("the value of :{name} does not fit its parameter, which is {type_name}");
    Fault::new(FaultKind::Refused, what)
}

/// The value as text; lists and objects as JSON.
///
/// Without the NUL character, which PostgreSQL keeps nowhere but a platform may send.
fn text(value: &Value) -> String {
    match value {
        Value::String(text) => text.replace('\0', "\u{fffd}"),
        other => other.to_string(),
    }
}
