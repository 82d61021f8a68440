//! What is bound to a statement's parameters: something out of the event.

use serde_json::Value;
use vestibule_events::{
    SignUpEvent,
    expression::{ClaimValue, Facts, Failure},
};

use super::in_words;

/// A named parameter and where its value comes from.
#[derive(Debug)]
pub(super) struct Parameter {
    pub(super) name: String,
    source: Source,
}

#[derive(Debug)]
enum Source {
    /// A JSON pointer into the event.
    Pointer(String),
    /// CEL over the sign-up.
    Expression(ClaimValue),
}

impl Parameter {
    /// What begins with `/` is a pointer: no expression does.
    pub(super) fn compile(name: &str, source: &str) -> Result<Self, String> {
        let source = if source.starts_with('/') {
            let is_escape = |it: &str| it.starts_with('0') || it.starts_with('1');
            if !source.split('~').skip(1).all(is_escape) {
                return Err("in a JSON pointer, `~` is written ~0 and `/` ~1".to_owned());
            }
            Source::Pointer(source.to_owned())
        } else {
            let words =
                |faults: Vec<_>| faults.into_iter().map(in_words).collect::<Vec<_>>().join("; ");
            Source::Expression(ClaimValue::compile(source).map_err(words)?)
        };
        Ok(Self { name: name.to_owned(), source })
    }

    /// What is not there is null. `json` is the event as JSON, once somebody wants it.
    pub(super) fn value(
        &self,
        event: &SignUpEvent,
        json: &mut Option<Value>,
        facts: &Facts<'_>,
    ) -> Result<Value, Failure> {
        match &self.source {
            Source::Pointer(pointer) => {
                let json =
                    json.get_or_insert_with(|| serde_json::to_value(event).unwrap_or_default());
                Ok(json.pointer(pointer).cloned().unwrap_or_default())
            }
            Source::Expression(expression) => match expression.evaluate(facts) {
                Err(Failure::Missing) => Ok(Value::Null),
                value => value,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::testing::sign_up;

    fn value(source: &str, event: &SignUpEvent) -> Result<Value, Failure> {
        let parameter = Parameter::compile("p", source).unwrap();
        parameter.value(event, &mut None, &Facts::of(event))
    }

    #[test]
    fn a_value_comes_from_the_event_or_from_an_expression() {
        let mut event = sign_up("ada");
        event.sign_up.claims.insert("a/b".into(), json!([1, null]));
        for (source, expected) in [
            ("/data/email", json!("ada@example.com")),
            ("/id", json!(event.id)),
            ("/type", json!("dev.vestibule.signup.accepted")),
            ("/data/claims/a~1b", json!([1, null])),
            ("/data/claims/none/of/it", Value::Null),
            ("signup.email_domain", json!("example.com")),
            ("signup.claims.none", Value::Null),
            ("size(signup.email) * 2", json!(30)),
            ("'fixed'", json!("fixed")),
        ] {
            assert_eq!(value(source, &event).unwrap(), expected, "{source}");
        }
        assert_eq!(value("signup.claims.surname * 2", &event), Err(Failure::Type));
    }

    #[test]
    fn what_is_neither_pointer_nor_expression_is_refused() {
        for source in ["/data/~x", "signup.nosuch", "signup.email * 2", "1 +", ""] {
            assert!(Parameter::compile("p", source).is_err(), "{source}");
        }
    }
}
