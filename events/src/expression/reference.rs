//! Runs the examples of the manual's page on the language of rules.

use std::collections::BTreeSet;

use serde_json::{Map, Value, json};
use time::macros::datetime;

use super::{
    ClaimValue, Claims, Facts, Known, LookupState, MEMBERS, Members, Sources, functions::FUNCTIONS,
};
use crate::SignUp;

const PAGE: &str = include_str!("../../../docs/rules-reference.md");

struct Manual(Map<String, Value>);

struct Partners;

impl Members for Partners {
    fn contains(&self, entry: &str) -> bool {
        entry == "mail.example.com"
    }
}

impl Sources for Manual {
    fn list(&self, name: &str) -> Option<&dyn Members> {
        (name == "partners").then_some(&Partners)
    }

    fn lookup(&self, _: &str) -> LookupState<'_> {
        LookupState::Is(&self.0)
    }
}

/// The expressions of the page, with their results.
fn examples() -> Vec<(&'static str, &'static str)> {
    let example = |line: &'static str| {
        let (expression, result) = line.strip_prefix("- `")?.split_once("` → `")?;
        Some((expression, result.strip_suffix('`').expect("ends with its result")))
    };
    PAGE.lines().filter_map(example).collect()
}

#[test]
fn every_example_gives_its_result() {
    let (_, sign_up) = PAGE.split_once("```json\n").unwrap();
    let (sign_up, _) = sign_up.split_once("```").unwrap();
    let sign_up: SignUp = serde_json::from_str(sign_up).unwrap();
    let crm = json!({ "found": true, "tier": "gold" });
    let sources = Manual(crm.as_object().unwrap().clone());
    let known = Known { lists: vec!["partners".into()], lookups: vec!["crm".into()] };
    let changed = Claims::new();
    let facts =
        Facts::new(&sign_up, &changed).with_sources(&sources).at(datetime!(2026-11-22 10:00 UTC));
    let value = |source: &str| {
        let compiled = ClaimValue::compile_with(source, &known);
        compiled.unwrap_or_else(|faults| panic!("{source}: {faults:?}")).evaluate(&facts)
    };

    let examples = examples();
    assert!(examples.len() > 75, "found {} examples only", examples.len());
    for (expression, result) in examples {
        assert!(value(expression).is_ok(), "{expression}: {:?}", value(expression));
        assert_eq!(value(expression), value(result), "{expression}");
    }
}

#[test]
fn every_member_and_function_is_on_the_page() {
    for member in MEMBERS {
        assert!(PAGE.contains(&format!("| `signup.{member}` |")), "{member}");
    }
    // Those are for types that no claim has, or for those who know CEL already.
    let left_out = BTreeSet::from([
        "bool",
        "bytes",
        "dyn",
        "type",
        "uint",
        "hasValue",
        "or",
        "value",
        "optional.of",
        "optional.none",
        "optional.ofNonZeroValue",
    ]);
    let examples: Vec<_> = examples().into_iter().map(|(expression, _)| expression).collect();
    for function in FUNCTIONS.iter().map(|it| it.name).filter(|it| !left_out.contains(it)) {
        let call = format!("{function}(");
        assert!(examples.iter().any(|it| it.contains(&call)), "{function} has no example");
    }
}
