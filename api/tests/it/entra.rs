//! Judges an answer to a custom extension as Entra does: by the code it would show for it.
//!
//! Written from the platform's documentation and from nothing of ours, so that what our answers
//! claim is measured by somebody else.

use axum::http::{HeaderMap, StatusCode, header};
use serde_json::{Map, Value, json};

use crate::support::Reply;

/// What the platform knows when an answer comes in.
#[derive(Clone, Debug)]
pub(crate) struct Asked {
    pub(crate) event: Event,
    /// Names of the attributes in the call, with the type of each; `None` for a type that the
    /// documentation does not know.
    pub(crate) attributes: Vec<(String, Option<Type>)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    Start,
    Submit,
    Token,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Type {
    Text,
    Integer,
    Boolean,
    Texts,
}

/// The code of an answer that Entra would fail the sign-up for.
pub(crate) type Code = u32;

/// Nobody knows the limit; this is the least that a service might have.
const ANSWER_BYTES_MAX: usize = 64 * 1024;

pub(crate) fn judge_reply(asked: &Asked, reply: &Reply) -> Result<(), Code> {
    judge(asked, reply.status, &reply.headers, reply.body.to_string().as_bytes())
}

pub(crate) fn judge(
    asked: &Asked,
    status: StatusCode,
    headers: &HeaderMap,
    body: &[u8],
) -> Result<(), Code> {
    let ensure = |holds: bool, code: Code| if holds { Ok(()) } else { Err(code) };
    ensure(status == StatusCode::OK, 1_003_002)?;
    let json = "application/json";
    ensure(headers.get(header::CONTENT_TYPE).is_some_and(|it| it == json), 1_003_006)?;
    ensure(!body.is_empty(), 1_003_009)?;
    ensure(body.len() <= ANSWER_BYTES_MAX, 1_003_024)?;
    let answer: Value = serde_json::from_slice(body).map_err(|_| 1_003_003_u32)?;
    ensure(answer.get("apiSchemaVersion").is_none(), 1_003_008)?;
    let data = answer["data"].as_object().ok_or(1_003_003_u32)?;
    let (kind, actions) = match asked.event {
        Event::Start => ("microsoft.graph.onAttributeCollectionStartResponseData", START),
        Event::Submit => ("microsoft.graph.onAttributeCollectionSubmitResponseData", SUBMIT),
        Event::Token => ("microsoft.graph.onTokenIssuanceStartResponseData", TOKEN),
    };
    ensure(data.get("@odata.type") == Some(&json!(kind)), 1_003_003)?;
    let given = data.get("actions").and_then(Value::as_array).ok_or(1_003_010_u32)?;
    let [action] = given.as_slice() else { return Err(1_003_010) };
    let action = action.as_object().ok_or(1_003_012_u32)?;
    let name = action.get("@odata.type").and_then(Value::as_str).ok_or(1_003_012_u32)?;
    ensure(actions.contains(&name), 1_003_012)?;

    match name.rsplit('.').next().unwrap_or_default() {
        "setPrefillValues" => values(asked, action.get("inputs")),
        "modifyAttributeValues" => values(asked, action.get("attributes")),
        "showBlockPage" => {
            let title = action.get("title");
            ensure(title.is_none_or(Value::is_string), 1_003_003)?;
            ensure(action.get("message").is_some_and(Value::is_string), 1_003_003)
        }
        "showValidationError" => {
            ensure(action.get("message").is_some_and(Value::is_string), 1_003_003)?;
            let errors = action.get("attributeErrors").and_then(Value::as_object);
            let known = |name: &String| asked.attributes.iter().any(|(known, _)| known == name);
            let fits = |errors: &Map<String, Value>| {
                errors.iter().all(|(name, text)| known(name) && text.is_string())
            };
            ensure(errors.is_some_and(fits), 1_003_003)
        }
        "provideClaimsForToken" => token_claims(action.get("claims")),
        _ => Ok(()),
    }
}

const START: &[&str] = &[
    "microsoft.graph.attributeCollectionStart.continueWithDefaultBehavior",
    "microsoft.graph.attributeCollectionStart.setPrefillValues",
    "microsoft.graph.attributeCollectionStart.showBlockPage",
];
const SUBMIT: &[&str] = &[
    "microsoft.graph.attributeCollectionSubmit.continueWithDefaultBehavior",
    "microsoft.graph.attributeCollectionSubmit.modifyAttributeValues",
    "microsoft.graph.attributeCollectionSubmit.showValidationError",
    "microsoft.graph.attributeCollectionSubmit.showBlockPage",
];
const TOKEN: &[&str] = &["microsoft.graph.tokenIssuanceStart.provideClaimsForToken"];

/// Every value has the type that the call gave its attribute; one that the call does not have is
/// ignored, whatever plain value it has.
fn values(asked: &Asked, values: Option<&Value>) -> Result<(), Code> {
    let values = values.and_then(Value::as_object).ok_or(1_003_003_u32)?;
    for (name, value) in values {
        let asked_type =
            asked.attributes.iter().find(|(known, _)| known == name).and_then(|(_, it)| *it);
        let fits = match asked_type {
            Some(Type::Text) => value.is_string(),
            Some(Type::Integer) => value.is_i64(),
            Some(Type::Boolean) => value.is_boolean(),
            Some(Type::Texts) => is_texts(value),
            None => value.is_string() || value.is_i64() || value.is_boolean(),
        };
        if !fits || name.is_empty() {
            return Err(1_003_003);
        }
    }
    Ok(())
}

fn token_claims(claims: Option<&Value>) -> Result<(), Code> {
    let claims = claims.and_then(Value::as_object).ok_or(1_003_007_u32)?;
    let mut bytes = 0;
    for (name, value) in claims {
        if name.trim().is_empty() {
            return Err(1_003_026);
        }
        bytes += name.len();
        match value {
            Value::String(text) => bytes += text.len(),
            value if is_texts(value) => {
                let texts = value.as_array().into_iter().flatten().filter_map(Value::as_str);
                bytes += texts.map(str::len).sum::<usize>();
            }
            _ => return Err(1_003_003),
        }
    }
    if bytes > 3 * 1024 { Err(1_003_025) } else { Ok(()) }
}

fn is_texts(value: &Value) -> bool {
    value.as_array().is_some_and(|values| values.iter().all(Value::is_string))
}

/// The judge finds each fault that it is there to find.
#[test]
fn the_judge_knows_a_bad_answer_of_each_kind() -> anyhow::Result<()> {
    let mut headers = HeaderMap::new();
    headers.insert(header::CONTENT_TYPE, "application/json".parse()?);
    let asked = |event| Asked {
        event,
        attributes: vec![
            ("city".to_owned(), Some(Type::Text)),
            ("year".to_owned(), Some(Type::Integer)),
        ],
    };
    let answer = |kind: &str, actions: Value| json!({ "data": { "@odata.type": format!("microsoft.graph.{kind}"), "actions": actions } });
    let start = |actions| answer("onAttributeCollectionStartResponseData", actions);
    let submit = |name: &str, rest: Value| {
        let mut action = rest;
        action["@odata.type"] = format!("microsoft.graph.attributeCollectionSubmit.{name}").into();
        answer("onAttributeCollectionSubmitResponseData", json!([action]))
    };
    let token = |claims: Value| {
        let kind = "microsoft.graph.tokenIssuanceStart.provideClaimsForToken";
        answer(
            "onTokenIssuanceStartResponseData",
            json!([{ "@odata.type": kind, "claims": claims }]),
        )
    };
    let go_on = json!({
        "@odata.type": "microsoft.graph.attributeCollectionStart.continueWithDefaultBehavior",
    });
    let modify = |values: Value| submit("modifyAttributeValues", json!({ "attributes": values }));
    let cases = [
        (Event::Start, start(json!([go_on])), Ok(())),
        (Event::Start, start(json!([])), Err(1_003_010)),
        (Event::Start, start(json!([go_on, go_on])), Err(1_003_010)),
        (Event::Submit, start(json!([go_on])), Err(1_003_003)),
        (Event::Start, json!({}), Err(1_003_003)),
        (Event::Start, json!({ "apiSchemaVersion": "10-01-2021-preview" }), Err(1_003_008)),
        (Event::Submit, submit("ShowBlockPage", json!({ "message": "m" })), Err(1_003_012)),
        (Event::Submit, submit("showBlockPage", json!({})), Err(1_003_003)),
        (Event::Submit, submit("showValidationError", json!({ "message": "m" })), Err(1_003_003)),
        (Event::Submit, modify(json!({ "city": "a", "year": 1, "other": true })), Ok(())),
        (Event::Submit, modify(json!({ "city": 1 })), Err(1_003_003)),
        (Event::Submit, modify(json!({ "year": "1" })), Err(1_003_003)),
        (Event::Submit, modify(json!({ "other": null })), Err(1_003_003)),
        (Event::Token, token(json!({ "a": "b", "c": ["d"] })), Ok(())),
        (Event::Token, token(json!(null)), Err(1_003_007)),
        (Event::Token, token(json!({ "": "b" })), Err(1_003_026)),
        (Event::Token, token(json!({ "a": true })), Err(1_003_003)),
        (Event::Token, token(json!({ "a": "b".repeat(3071) })), Ok(())),
        (Event::Token, token(json!({ "a": "b".repeat(3072) })), Err(1_003_025)),
        (Event::Token, token(json!({ "a": "b".repeat(70_000) })), Err(1_003_024)),
    ];
    for (event, body, expected) in cases {
        let body = body.to_string();
        let judged = judge(&asked(event), StatusCode::OK, &headers, body.as_bytes());
        assert_eq!(judged, expected, "{body}");
    }
    let asked = asked(Event::Start);
    let good = start(json!([go_on])).to_string();
    let status = judge(&asked, StatusCode::BAD_REQUEST, &headers, good.as_bytes());
    assert_eq!(status, Err(1_003_002));
    assert_eq!(judge(&asked, StatusCode::OK, &headers, b""), Err(1_003_009));
    assert_eq!(judge(&asked, StatusCode::OK, &headers, b"{"), Err(1_003_003));
    let none = HeaderMap::new();
    assert_eq!(judge(&asked, StatusCode::OK, &none, good.as_bytes()), Err(1_003_006));
    Ok(())
}
