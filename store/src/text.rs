//! What both databases can keep.
//!
//! PostgreSQL keeps no NUL character, neither in text nor in JSON, but a platform may send one. An
//! event must not be refused for it, so it is replaced by U+FFFD, in both dialects alike. The event
//! in the log stays as it was.

use std::borrow::Cow;

use serde_json::Value;
use time::OffsetDateTime;
use vestibule_events::Claims;

pub(crate) fn storable(text: &str) -> Cow<'_, str> {
    if text.contains('\0') {
        Cow::Owned(text.replace('\0', "\u{fffd}"))
    } else {
        Cow::Borrowed(text)
    }
}

pub(crate) fn storable_claims(claims: &Claims) -> Cow<'_, Claims> {
    if claims.iter().any(|(name, value)| name.contains('\0') || holds_nul(value)) {
        Cow::Owned(clean_object(claims))
    } else {
        Cow::Borrowed(claims)
    }
}

/// To the microsecond: PostgreSQL keeps no more, and both are to give back the same.
pub(crate) fn storable_time(time: OffsetDateTime) -> OffsetDateTime {
    let time = time.to_offset(time::UtcOffset::UTC);
    time.replace_microsecond(time.microsecond()).expect("a microsecond taken from a time fits it")
}

fn holds_nul(value: &Value) -> bool {
    match value {
        Value::String(text) => text.contains('\0'),
        Value::Array(items) => items.iter().any(holds_nul),
        Value::Object(object) => {
            object.iter().any(|(name, value)| name.contains('\0') || holds_nul(value))
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => false,
    }
}

fn clean_object(object: &Claims) -> Claims {
    object.iter().map(|(name, value)| (storable(name).into_owned(), clean(value))).collect()
}

fn clean(value: &Value) -> Value {
    match value {
        Value::String(text) => Value::String(storable(text).into_owned()),
        Value::Array(items) => Value::Array(items.iter().map(clean).collect()),
        Value::Object(object) => Value::Object(clean_object(object)),
        Value::Null | Value::Bool(_) | Value::Number(_) => value.clone(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use time::macros::datetime;

    use super::*;

    #[test]
    fn a_nul_is_replaced_wherever_it_hides() {
        let claims = json!({ "a\0": 1, "b": ["x\0y", { "c": "\0" }], "d": null });
        let clean = storable_claims(claims.as_object().unwrap()).into_owned();
        let expected =
            json!({ "a\u{fffd}": 1, "b": ["x\u{fffd}y", { "c": "\u{fffd}" }], "d": null });
        assert_eq!(Value::Object(clean), expected);
        assert_eq!(storable("a\0"), "a\u{fffd}");
    }

    #[test]
    fn what_holds_no_nul_is_not_copied() {
        let claims = json!({ "city": "London", "tags": ["\u{1}"] });
        assert!(matches!(storable_claims(claims.as_object().unwrap()), Cow::Borrowed(_)));
    }

    #[test]
    fn times_are_cut_to_the_microsecond() {
        let time = datetime!(2026-11-22 12:00:00.123456789 +2);
        assert_eq!(storable_time(time), datetime!(2026-11-22 10:00:00.123456 UTC));
    }
}
