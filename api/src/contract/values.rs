//! Values with the types that a custom extension wants them to have.
//!
//! An answer must give an attribute the type that the call gave it, and a token takes nothing but
//! text. What can be said another way without a loss is; the rest is left out.

use serde_json::{Map, Number, Value};

/// The type of an attribute in the directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttributeKind {
    Text,
    Integer,
    Boolean,
    /// Only in calls of the first preview; today several values are one text with commas.
    Collection,
    /// The call does not say.
    Unknown,
}

impl AttributeKind {
    /// By the name that a call gives the type: `microsoft.graph.int64DirectoryAttributeValue`, with
    /// another prefix in the first preview.
    pub(super) fn named(name: &str) -> Self {
        const SUFFIX: &str = "directoryattributevalue";
        let name = name.rsplit('.').next().unwrap_or(name).to_ascii_lowercase();
        match name.strip_suffix(SUFFIX) {
            Some("string") => Self::Text,
            Some("int64") => Self::Integer,
            Some("boolean") => Self::Boolean,
            Some("stringcollection") => Self::Collection,
            _ => Self::Unknown,
        }
    }

    /// By a value of it.
    pub(super) fn of_value(value: &Value) -> Self {
        match value {
            Value::String(_) => Self::Text,
            Value::Number(number) if number.is_i64() => Self::Integer,
            Value::Bool(_) => Self::Boolean,
            Value::Array(_) => Self::Collection,
            Value::Number(_) | Value::Null | Value::Object(_) => Self::Unknown,
        }
    }

    /// The value as one of this type, where nothing is lost by it.
    pub(super) fn convert(self, value: &Value) -> Option<Value> {
        match self {
            Self::Text => text(value).map(Value::from),
            Self::Integer => integer(value).map(Value::from),
            Self::Boolean => boolean(value).map(Value::from),
            Self::Collection => collection(value).map(Value::from),
            // Of the types there are, the one that the value has itself.
            Self::Unknown => match Self::of_value(value) {
                Self::Unknown => None,
                Self::Collection => text(value).map(Value::from),
                kind => kind.convert(value),
            },
        }
    }
}

/// Several values become one text with commas, unless one of them has a comma itself.
fn text(value: &Value) -> Option<String> {
    let Value::Array(values) = value else { return scalar_text(value) };
    let texts = values
        .iter()
        .map(|value| scalar_text(value).filter(|text| !text.contains(',')))
        .collect::<Option<Vec<_>>>()?;
    Some(texts.join(","))
}

fn scalar_text(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        Value::Bool(true) => Some("true".to_owned()),
        Value::Bool(false) => Some("false".to_owned()),
        Value::Null | Value::Array(_) | Value::Object(_) => None,
    }
}

fn integer(value: &Value) -> Option<i64> {
    match value {
        Value::Number(number) => number.as_i64().or_else(|| whole(number)),
        Value::String(text) => text.trim().parse().ok(),
        _ => None,
    }
}

/// A floating-point number that is a whole one. Beyond 2⁵³ not every whole number is one of them,
/// so that nobody knows which was meant.
fn whole(number: &Number) -> Option<i64> {
    const LARGEST: f64 = 9_007_199_254_740_992.0;
    let number = number.as_f64()?;
    #[expect(clippy::cast_possible_truncation, reason = "it is whole and within 2⁵³")]
    (number.fract() == 0.0 && number.abs() <= LARGEST).then_some(number as i64)
}

fn boolean(value: &Value) -> Option<bool> {
    match value {
        Value::Bool(value) => Some(*value),
        Value::String(text) if text.trim().eq_ignore_ascii_case("true") => Some(true),
        Value::String(text) if text.trim().eq_ignore_ascii_case("false") => Some(false),
        _ => None,
    }
}

fn collection(value: &Value) -> Option<Vec<String>> {
    match value {
        Value::Array(values) => values.iter().map(scalar_text).collect(),
        Value::String(text) => Some(text.split(',').map(|it| it.trim().to_owned()).collect()),
        value => scalar_text(value).map(|text| vec![text]),
    }
}

/// A claim for a token: one text or a list of them, and nothing else.
pub(super) fn token_claim(value: &Value) -> Option<Value> {
    match value {
        Value::Array(values) => {
            values.iter().map(|it| scalar_text(it).map(Value::from)).collect::<Option<_>>()
        }
        value => scalar_text(value).map(Value::from),
    }
}

/// As many of the values as fit: in the order of their names, each that still fits.
///
/// What counts is how long names and values are in JSON, which is at least as long as whatever the
/// platform counts.
pub(super) fn fitting(values: Map<String, Value>, bytes_max: usize) -> Map<String, Value> {
    let mut left = bytes_max;
    let mut sorted: Vec<_> = values.into_iter().collect();
    sorted.sort_unstable_by(|(one, _), (other, _)| one.cmp(other));
    sorted
        .into_iter()
        .filter(|(name, value)| {
            let bytes = json_bytes(name) + json_bytes(value);
            let fits = bytes <= left;
            if fits {
                left -= bytes;
            }
            fits
        })
        .collect()
}

fn json_bytes(value: &impl serde::Serialize) -> usize {
    serde_json::to_vec(value).map_or(usize::MAX / 2, |json| json.len())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn types_are_known_by_their_names_of_any_year() {
        for (name, kind) in [
            ("microsoft.graph.stringDirectoryAttributeValue", AttributeKind::Text),
            ("microsoft.graph.int64DirectoryAttributeValue", AttributeKind::Integer),
            ("microsoft.graph.booleanDirectoryAttributeValue", AttributeKind::Boolean),
            ("graph.stringCollectionDirectoryAttributeValue", AttributeKind::Collection),
            ("#Microsoft.Graph.INT64directoryAttributeValue", AttributeKind::Integer),
            ("microsoft.graph.dateTimeDirectoryAttributeValue", AttributeKind::Unknown),
            ("", AttributeKind::Unknown),
        ] {
            assert_eq!(AttributeKind::named(name), kind, "{name}");
        }
    }

    #[test]
    fn a_value_takes_the_type_of_the_attribute_where_nothing_is_lost() {
        use AttributeKind::{Boolean, Collection, Integer, Text, Unknown};
        for (kind, value, expected) in [
            (Text, json!("a"), Some(json!("a"))),
            (Text, json!(5), Some(json!("5"))),
            (Text, json!(5.5), Some(json!("5.5"))),
            (Text, json!(true), Some(json!("true"))),
            (Text, json!(["a", 1, false]), Some(json!("a,1,false"))),
            (Text, json!(["a,b", "c"]), None),
            (Text, json!([["a"]]), None),
            (Text, json!([]), Some(json!(""))),
            (Text, json!(null), None),
            (Text, json!({}), None),
            (Integer, json!(5), Some(json!(5))),
            (Integer, json!("5"), Some(json!(5))),
            (Integer, json!(" -5 "), Some(json!(-5))),
            (Integer, json!(5.0), Some(json!(5))),
            (Integer, json!(5.5), None),
            (Integer, json!(1e300), None),
            (Integer, json!(u64::MAX), None),
            (Integer, json!("5.0"), None),
            (Integer, json!("five"), None),
            (Integer, json!(true), None),
            (Boolean, json!(false), Some(json!(false))),
            (Boolean, json!("True"), Some(json!(true))),
            (Boolean, json!("yes"), None),
            (Boolean, json!(1), None),
            (Collection, json!(["a", 1]), Some(json!(["a", "1"]))),
            (Collection, json!("a, b"), Some(json!(["a", "b"]))),
            (Collection, json!(true), Some(json!(["true"]))),
            (Collection, json!([null]), None),
            (Unknown, json!("a"), Some(json!("a"))),
            (Unknown, json!(7), Some(json!(7))),
            (Unknown, json!(true), Some(json!(true))),
            (Unknown, json!(["a", "b"]), Some(json!("a,b"))),
            (Unknown, json!(0.5), None),
            (Unknown, json!(null), None),
            (Unknown, json!({ "a": 1 }), None),
        ] {
            assert_eq!(kind.convert(&value), expected, "{kind:?} {value}");
        }
    }

    #[test]
    fn a_token_takes_texts_and_lists_of_them() {
        for (value, expected) in [
            (json!("a"), Some(json!("a"))),
            (json!(true), Some(json!("true"))),
            (json!(1.5), Some(json!("1.5"))),
            (json!(["a", 2, true]), Some(json!(["a", "2", "true"]))),
            (json!([]), Some(json!([]))),
            (json!(["a", null]), None),
            (json!([["a"]]), None),
            (json!(null), None),
            (json!({}), None),
        ] {
            assert_eq!(token_claim(&value), expected, "{value}");
        }
    }

    #[test]
    fn what_does_not_fit_is_left_out_by_name() {
        let values = json!({ "c": "3", "a": "1", "b": "long".repeat(10), "d": "4" });
        let values = values.as_object().unwrap();
        let names = |bytes| fitting(values.clone(), bytes).keys().cloned().collect::<Vec<_>>();
        // A name and a text of one letter each are six bytes of JSON.
        assert_eq!(names(18), ["a", "c", "d"]);
        assert_eq!(names(17), ["a", "c"]);
        assert_eq!(names(63), ["a", "b", "c", "d"]);
        assert_eq!(names(5), [""; 0]);
    }
}
