//! What both databases can keep.
//!
//! PostgreSQL keeps no NUL character, neither in text nor in JSON, but a platform may send one. An
//! event must not be refused for it, so it is replaced by U+FFFD, in both dialects alike. The event
//! in the log stays as it was.

use std::borrow::Cow;

use serde_json::Value;
use sqlx::{Database, Encode, Postgres, Sqlite, Type, encode::IsNull, error::BoxDynError};
use time::{
    OffsetDateTime,
    format_description::well_known::{
        Iso8601,
        iso8601::{Config, EncodedConfig, TimePrecision},
    },
};
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

/// SQLite compares times as text, which holds for times of the usual form only where none has a
/// fraction of a second; one without compares rightly with any, see [`Moment`].
pub(crate) fn to_the_second(time: OffsetDateTime) -> OffsetDateTime {
    storable_time(time).replace_nanosecond(0).expect("every second has a beginning")
}

/// A time that a statement compares. To SQLite it is text that sorts as the time does, because it
/// always has six places after the second; it is read like any other time.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Moment(pub(crate) OffsetDateTime);

impl Moment {
    fn sortable(self) -> String {
        const SIX_PLACES: EncodedConfig = Config::DEFAULT
            .set_time_precision(TimePrecision::Second { decimal_digits: std::num::NonZero::new(6) })
            .encode();
        let formatted = storable_time(self.0).format(&Iso8601::<SIX_PLACES>);
        formatted.expect("every time in UTC can be written")
    }
}

impl Type<Sqlite> for Moment {
    fn type_info() -> <Sqlite as Database>::TypeInfo {
        <OffsetDateTime as Type<Sqlite>>::type_info()
    }
}

impl Encode<'_, Sqlite> for Moment {
    fn encode_by_ref(
        &self,
        buffer: &mut <Sqlite as Database>::ArgumentBuffer,
    ) -> Result<IsNull, BoxDynError> {
        Encode::<Sqlite>::encode(self.sortable(), buffer)
    }
}

impl Type<Postgres> for Moment {
    fn type_info() -> <Postgres as Database>::TypeInfo {
        <OffsetDateTime as Type<Postgres>>::type_info()
    }
}

impl Encode<'_, Postgres> for Moment {
    fn encode_by_ref(
        &self,
        buffer: &mut <Postgres as Database>::ArgumentBuffer,
    ) -> Result<IsNull, BoxDynError> {
        Encode::<Postgres>::encode(storable_time(self.0), buffer)
    }
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

    #[test]
    fn moments_sort_as_text_even_beside_times_of_the_usual_form() {
        let second = datetime!(2026-11-22 10:00:05 UTC);
        let moment = |nanoseconds| Moment(second + time::Duration::nanoseconds(nanoseconds));
        assert_eq!(moment(0).sortable(), "2026-11-22T10:00:05.000000Z");
        assert_eq!(moment(120_000_999).sortable(), "2026-11-22T10:00:05.120000Z");
        let sorted = [0, 1_000, 500_000, 120_000_000, 999_999_000, 1_000_000_000];
        assert!(sorted.map(|it| moment(it).sortable()).is_sorted_by(|a, b| a < b));

        let bound = moment(0).sortable();
        let usual = |time: OffsetDateTime| {
            time.format(&time::format_description::well_known::Rfc3339).unwrap()
        };
        assert!(usual(second - time::Duration::microseconds(1)) < bound);
        for nanoseconds in [0, 1_000, 500_000_000] {
            assert!(usual(moment(nanoseconds).0) >= bound, "{nanoseconds}");
        }
    }
}
