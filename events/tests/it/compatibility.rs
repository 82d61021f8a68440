//! Whether whoever relies on a JSON Schema can rely on its successor.
//!
//! A contract of events has two sides. Events lie in archives for years and are read by newer
//! programs, so what was valid stays valid; subscribers are older programs that read newer events,
//! so what they find today they find tomorrow, of the types that they know. Between the two, what
//! the manual announces is free: properties nobody had before, and further words where there are
//! words to choose from.
//!
//! A keyword that is not known here must not change at all: better a false alarm than a silent
//! break.

use std::collections::BTreeSet;

use serde_json::{Map, Value};

/// What in `new` breaks a promise of `old`; empty if nothing does.
pub(crate) fn breaks(old: &Value, new: &Value) -> BTreeSet<String> {
    let mut comparison = Comparison { old, new, found: BTreeSet::new(), entered: BTreeSet::new() };
    comparison.compare("", old, new);
    comparison.found
}

struct Comparison<'a> {
    /// The documents that references are into.
    old: &'a Value,
    new: &'a Value,
    found: BTreeSet<String>,
    /// Definitions compared already, or being compared: they may contain themselves.
    entered: BTreeSet<(String, String)>,
}

/// What a value can be, and so how an alternative is found again in the other schema.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Anything,
    Type(String),
    /// One of several constants.
    Word(String),
    /// An object that says by one of its properties which of several it is.
    Tagged(String, String),
}

impl std::fmt::Display for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Anything => f.write_str("anything"),
            Self::Type(name) => f.write_str(name),
            Self::Word(word) => f.write_str(word),
            Self::Tagged(property, word) => write!(f, "an object whose {property} is {word}"),
        }
    }
}

impl Kind {
    /// Whether those who know `others` were told to expect more like this.
    fn is_one_more_of(&self, others: &[(Kind, &Value)]) -> bool {
        others.iter().any(|(other, _)| match (self, other) {
            (Self::Word(_), Self::Word(_)) => true,
            (Self::Tagged(one, _), Self::Tagged(another, _)) => one == another,
            _ => false,
        })
    }
}

/// They say something to people only.
const ANNOTATIONS: [&str; 7] =
    ["$schema", "$defs", "$comment", "title", "description", "default", "examples"];

/// They say what a value can be, which [`alternatives`] reads.
const KINDS: [&str; 6] = ["type", "const", "enum", "oneOf", "anyOf", "$ref"];

impl<'a> Comparison<'a> {
    fn compare(&mut self, path: &str, old: &'a Value, new: &'a Value) {
        if let (Some(one), Some(other)) = (reference(old), reference(new))
            && !self.entered.insert((one.to_owned(), other.to_owned()))
        {
            return;
        }
        let (olds, news) = (alternatives(self.old, old), alternatives(self.new, new));
        for (kind, was) in &olds {
            match news.iter().find(|(other, _)| other == kind) {
                Some((_, is)) => self.compare_alike(path, was, is),
                None => self.add(path, &format!("can no longer be {kind}")),
            }
        }
        for (kind, _) in &news {
            let is_known = olds.iter().any(|(other, _)| other == kind);
            if !is_known && !kind.is_one_more_of(&olds) {
                self.add(path, &format!("can now be {kind} too"));
            }
        }
    }

    /// Two schemas of one kind.
    fn compare_alike(&mut self, path: &str, old: &'a Value, new: &'a Value) {
        for (name, was) in properties(old) {
            let path = format!("{path}/{name}");
            match properties(new).find(|(other, _)| *other == name) {
                Some((_, is)) => self.compare(&path, was, is),
                None => self.add(&path, "is gone"),
            }
        }
        for name in required(new).difference(&required(old)) {
            self.add(&format!("{path}/{name}"), "is now required, and older events may lack it");
        }
        for name in required(old).difference(&required(new)) {
            self.add(&format!("{path}/{name}"), "is no longer always there");
        }
        // Where they are not mentioned they can be anything.
        static ANYTHING: Value = Value::Bool(true);
        for (keyword, place) in [("items", "*"), ("additionalProperties", "?")] {
            let (was, is) = (old.get(keyword), new.get(keyword));
            if was.is_some() || is.is_some() {
                let path = format!("{path}/{place}");
                self.compare(&path, was.unwrap_or(&ANYTHING), is.unwrap_or(&ANYTHING));
            }
        }

        let handled = ["properties", "required", "items", "additionalProperties"];
        let is_plain = |keyword: &&String| {
            ![&ANNOTATIONS[..], &KINDS, &handled].concat().contains(&keyword.as_str())
        };
        let keywords: BTreeSet<_> =
            [old, new].into_iter().filter_map(Value::as_object).flat_map(Map::keys).collect();
        for keyword in keywords.into_iter().filter(is_plain) {
            if old.get(keyword) != new.get(keyword) {
                self.add(path, &format!("has another {keyword}"));
            }
        }
    }

    fn add(&mut self, path: &str, what: &str) {
        let path = if path.is_empty() { "/" } else { path };
        self.found.insert(format!("{path} {what}"));
    }
}

/// What a value can be, each with the schema that says more about it.
fn alternatives<'a>(document: &'a Value, schema: &'a Value) -> Vec<(Kind, &'a Value)> {
    if let Some(pointer) = reference(schema) {
        // Beside a reference stand annotations only, as long as we generate them.
        let target = document.pointer(pointer).expect("a reference leads somewhere");
        return alternatives(document, target);
    }
    let list = |keyword: &str| schema.get(keyword).and_then(Value::as_array);
    if let Some(several) = list("oneOf").or_else(|| list("anyOf")) {
        return several.iter().flat_map(|one| alternatives(document, one)).collect();
    }
    if let Some(word) = schema.get("const") {
        return vec![(Kind::Word(word.to_string()), schema)];
    }
    if let Some(words) = list("enum") {
        return words.iter().map(|word| (Kind::Word(word.to_string()), schema)).collect();
    }
    match schema.get("type") {
        Some(Value::Array(types)) => types.iter().map(|name| (kind_of(name), schema)).collect(),
        Some(name) => vec![(tag_of(schema).unwrap_or_else(|| kind_of(name)), schema)],
        None if schema == &Value::Bool(false) => vec![],
        None => vec![(Kind::Anything, schema)],
    }
}

fn kind_of(name: &Value) -> Kind {
    Kind::Type(name.as_str().unwrap_or("a type that is no text").to_owned())
}

/// The one property by which an object tells what it is.
fn tag_of(schema: &Value) -> Option<Kind> {
    let required = required(schema);
    properties(schema).filter(|(name, _)| required.contains(name)).find_map(|(name, property)| {
        let word = property.get("const")?;
        Some(Kind::Tagged(name.to_owned(), word.to_string()))
    })
}

/// As a pointer into the document.
fn reference(schema: &Value) -> Option<&str> {
    schema.get("$ref")?.as_str()?.strip_prefix('#')
}

fn properties(schema: &Value) -> impl Iterator<Item = (&str, &Value)> {
    let properties = schema.get("properties").and_then(Value::as_object);
    properties.into_iter().flatten().map(|(name, property)| (name.as_str(), property))
}

fn required(schema: &Value) -> BTreeSet<&str> {
    let names = schema.get("required").and_then(Value::as_array);
    names.into_iter().flatten().filter_map(Value::as_str).collect()
}

mod tests {
    use serde_json::json;
    use vestibule_events::event_schema;

    use super::*;

    /// With something of everything that the real one has.
    fn schema() -> Value {
        json!({
            "title": "A",
            "type": "object",
            "properties": {
                "name": { "type": "string", "format": "uuid" },
                "note": { "type": ["string", "null"] },
                "step": { "$ref": "#/$defs/Step" },
                "outcome": { "$ref": "#/$defs/Outcome" },
                "who": { "anyOf": [{ "$ref": "#/$defs/Who" }, { "type": "null" }] },
                "list": { "type": "array", "items": { "$ref": "#/$defs/Who" } },
                "claims": { "type": "object", "additionalProperties": true },
            },
            "required": ["name", "step"],
            "$defs": {
                "Step": { "oneOf": [
                    { "type": "string", "const": "one" },
                    { "type": "string", "const": "two" },
                ] },
                "Outcome": { "oneOf": [
                    {
                        "type": "object",
                        "properties": {
                            "action": { "type": "string", "const": "go" },
                            "claims": { "type": "object" },
                        },
                        "required": ["action"],
                    },
                    {
                        "type": "object",
                        "properties": { "action": { "type": "string", "const": "stop" } },
                        "required": ["action"],
                    },
                ] },
                "Who": {
                    "type": "object",
                    "properties": {
                        "id": { "type": "integer", "minimum": 0 },
                        "knows": { "$ref": "#/$defs/Who" },
                    },
                    "required": ["id"],
                },
            },
        })
    }

    /// What is found once the value at a place is another one.
    fn found_with(pointer: &str, value: Value) -> BTreeSet<String> {
        let mut changed = schema();
        *changed.pointer_mut(pointer).expect("a place in the schema") = value;
        breaks(&schema(), &changed)
    }

    #[test]
    fn each_break_is_found_and_named() {
        for (pointer, value, expected) in [
            ("/required", json!(["name", "step", "note"]), "/note is now required"),
            ("/required", json!(["name"]), "/step is no longer always there"),
            ("/properties/name/type", json!("integer"), "/name can no longer be string"),
            ("/properties/name/type", json!(["string", "null"]), "/name can now be null too"),
            ("/properties/name/format", json!("email"), "/name has another format"),
            ("/properties/name", json!({ "type": "string" }), "/name has another format"),
            (
                "/properties/name",
                json!({ "type": "string", "format": "uuid", "maxLength": 9 }),
                "/name has another maxLength",
            ),
            ("/properties/note/type", json!("string"), "/note can no longer be null"),
            ("/properties/note/type", json!("null"), "/note can no longer be string"),
            (
                "/properties/claims/additionalProperties",
                json!(false),
                "/claims/? can no longer be anything",
            ),
            (
                "/properties/claims/additionalProperties",
                json!({ "type": "string" }),
                "/claims/? can no longer be anything",
            ),
            ("/properties/list/items", json!({ "type": "string" }), "/list/* can now be string"),
            ("/properties/list", json!({ "$ref": "#/$defs/Who" }), "/list can now be object"),
            ("/properties/who", json!({ "$ref": "#/$defs/Who" }), "/who can no longer be null"),
            ("/properties", json!({}), "/list is gone"),
            ("/$defs/Step/oneOf", json!([{ "const": "one" }]), "/step can no longer be \"two\""),
            ("/$defs/Step", json!({ "type": "string" }), "/step can now be string too"),
            (
                "/$defs/Outcome/oneOf/1/properties/action/const",
                json!("halt"),
                "/outcome can no longer be an object whose action is \"stop\"",
            ),
            (
                "/$defs/Outcome/oneOf/0/properties",
                json!({ "action": { "const": "go" } }),
                "/outcome/claims is gone",
            ),
            ("/$defs/Who/properties/id/minimum", json!(1), "has another minimum"),
            ("/$defs/Who/required", json!([]), "/id is no longer always there"),
            ("/type", json!("array"), "/ can no longer be object"),
        ] {
            let found = found_with(pointer, value.clone());
            assert!(found.iter().any(|it| it.contains(expected)), "{pointer} {value}: {found:?}");
        }
    }

    #[test]
    fn what_only_adds_breaks_nothing() {
        let step = |words: &[&str]| json!({ "oneOf": words.iter().map(|it| json!({ "const": it })).collect::<Vec<_>>() });
        let further = json!({
            "type": "object",
            "properties": { "action": { "const": "wait" }, "until": { "type": "string" } },
            "required": ["action", "until"],
        });
        let mut outcomes = schema()["$defs"]["Outcome"]["oneOf"].clone();
        outcomes.as_array_mut().expect("a list").push(further);
        let mut properties = schema()["properties"].clone();
        properties["added"] = json!({ "type": "string" });
        for (pointer, value) in [
            ("/title", json!("B")),
            ("/properties/name", json!({ "type": "string", "format": "uuid", "description": "x" })),
            ("/properties", properties),
            ("/$defs/Step", step(&["one", "two", "three"])),
            ("/$defs/Step", json!({ "enum": ["two", "one"] })),
            ("/$defs/Outcome/oneOf", outcomes),
            // A definition may be written out where it is used.
            ("/properties/step", step(&["one", "two"])),
        ] {
            assert_eq!(found_with(pointer, value.clone()), BTreeSet::new(), "{pointer} {value}");
        }
    }

    /// Not by example but throughout: nothing of the real schema can go unnoticed.
    #[test]
    fn whatever_is_taken_from_the_real_schema_is_found() {
        let real = event_schema().to_value();
        let mut places = Vec::new();
        collect(&real, String::new(), &mut places);
        assert!(places.len() > 100, "{places:?}");
        for (parent, name) in places {
            let mut changed = real.clone();
            match changed.pointer_mut(&parent) {
                Some(Value::Object(members)) => {
                    members.remove(&name);
                }
                Some(Value::Array(members)) => {
                    members.remove(name.parse().expect("a number"));
                }
                other => panic!("{parent}: {other:?}"),
            }
            assert!(!breaks(&real, &changed).is_empty(), "{parent} without {name}");
        }
    }

    /// Each property, required name, word, alternative and limit in a schema: the place of what holds it, and
    /// how it is called there.
    fn collect(schema: &Value, at: String, places: &mut Vec<(String, String)>) {
        const WHOLE: [&str; 4] = ["const", "format", "minimum", "enum"];
        const PARTS: [&str; 4] = ["properties", "required", "oneOf", "anyOf"];
        let members: Vec<(String, &Value)> = match schema {
            Value::Object(members) => members.iter().map(|(k, v)| (k.clone(), v)).collect(),
            Value::Array(members) => {
                members.iter().enumerate().map(|(n, v)| (n.to_string(), v)).collect()
            }
            _ => return,
        };
        let keyword = at.rsplit('/').next().unwrap_or_default();
        for (name, value) in members {
            if PARTS.contains(&keyword) || WHOLE.contains(&name.as_str()) {
                places.push((at.clone(), name.clone()));
            }
            collect(value, format!("{at}/{name}"), places);
        }
    }
}
