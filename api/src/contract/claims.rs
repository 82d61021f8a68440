//! What the dialects have in common in how they name a person's claims.

use serde_json::{Map, Value};
use vestibule_events::{Claims, Identity, Step};

use super::Problem;

/// How deeply a body may be nested. The event holds the claims some levels further down, and once
/// more in its decision; whatever reads events stops at 128 levels, so a call that uses them up
/// would become an event that nobody can read.
pub(super) const LEVELS_MAX: usize = 64;

/// A body that is one JSON object, nested no deeper than events are read.
pub(super) fn object(body: &[u8]) -> Result<Map<String, Value>, Problem> {
    let body: Value = serde_json::from_slice(body).map_err(|_| Problem::NotJson)?;
    if is_deeper_than(LEVELS_MAX, &body) {
        return Err(Problem::NotJson);
    }
    match body {
        Value::Object(members) => Ok(members),
        _ => Err(Problem::NotAnObject),
    }
}

fn is_deeper_than(levels: usize, value: &Value) -> bool {
    let inner_is_deeper = |value| is_deeper_than(levels - 1, value);
    match value {
        Value::Array(values) => levels == 0 || values.iter().any(inner_is_deeper),
        Value::Object(members) => levels == 0 || members.values().any(inner_is_deeper),
        _ => false,
    }
}

/// The step by the name that platforms give it. The token step has two, on two pages of the same
/// documentation.
pub(super) fn step_named(name: &str) -> Option<Step> {
    const NAMES: [(&str, Step); 4] = [
        ("PostFederationSignup", Step::AfterFederation),
        ("PostAttributeCollection", Step::BeforeCreate),
        ("PreTokenIssuance", Step::BeforeToken),
        ("PreTokenApplicationClaims", Step::BeforeToken),
    ];
    NAMES.iter().find(|(known, _)| known.eq_ignore_ascii_case(name.trim())).map(|(_, step)| *step)
}

/// Takes a member that holds text; anything else stays among the claims, as does text without a
/// single letter, which names nobody and nothing.
pub(super) fn take_text(claims: &mut Claims, name: &str) -> Option<String> {
    match claims.get(name) {
        Some(Value::String(text)) if !text.trim().is_empty() => {}
        _ => return None,
    }
    match claims.remove(name) {
        Some(Value::String(text)) => Some(text),
        _ => None,
    }
}

/// Calls the family name `surname`, whether it came as `lastName`, `surName` or `surname`, and
/// returns how it had come where that was otherwise.
///
/// Where it came twice, both stay as they are: nothing says which is right.
pub(super) fn use_one_surname(claims: &mut Claims) -> Option<String> {
    if claims.contains_key(SURNAME) {
        return None;
    }
    let is_surname = |name: &str| name.eq_ignore_ascii_case(SURNAME) || name == "lastName";
    let mut spellings = claims
        .iter()
        .filter(|(name, value)| value.is_string() && is_surname(name))
        .map(|(name, _)| name.clone());
    let (Some(spelling), None) = (spellings.next(), spellings.next()) else { return None };
    drop(spellings);
    let surname = claims.remove(&spelling)?;
    claims.insert(SURNAME.to_owned(), surname);
    Some(spelling)
}

pub(super) const SURNAME: &str = "surname";

/// Takes the identities where every one of them has the three members; otherwise none, and they
/// stay among the claims as they came.
pub(super) fn take_identities(claims: &mut Claims) -> Vec<Identity> {
    let identities =
        claims.get("identities").and_then(|it| identities(it, |it, name| it.get(name)));
    if identities.is_some() {
        claims.remove("identities");
    }
    identities.unwrap_or_default()
}

/// All of the identities, or nothing where one is not as it should be. `member` finds a member of
/// an object by its name.
pub(super) fn identities(
    value: &Value,
    member: impl for<'a> Fn(&'a Map<String, Value>, &str) -> Option<&'a Value>,
) -> Option<Vec<Identity>> {
    let read = |value: &Value| {
        let identity = value.as_object()?;
        let text = |name| member(identity, name).and_then(Value::as_str).map(str::to_owned);
        Some(Identity {
            sign_in_type: text("signInType")?,
            issuer: text("issuer")?,
            issuer_assigned_id: text("issuerAssignedId")?,
        })
    };
    value.as_array()?.iter().map(read).collect()
}
