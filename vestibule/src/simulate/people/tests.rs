use std::collections::HashSet;

use super::*;

fn crowd(seed: u64, run: &str) -> Crowd {
    Crowd { seed, run: run.to_owned(), abandon: None }
}

fn calls(count: u64) -> Vec<Call> {
    let crowd = crowd(7, "r");
    (0..count).flat_map(|number| crowd.person(number).journey).collect()
}

#[test]
fn a_seed_gives_the_same_people_in_any_order() {
    let forwards: Vec<_> = (0..200).map(|number| crowd(7, "r").person(number)).collect();
    let mut backwards: Vec<_> = (0..200).rev().map(|number| crowd(7, "r").person(number)).collect();
    backwards.reverse();
    assert_eq!(forwards, backwards);
    let others: Vec<_> = (0..200).map(|number| crowd(8, "r").person(number)).collect();
    assert_ne!(forwards, others);
}

#[test]
fn another_run_has_other_addresses_and_the_same_people() {
    let addresses = |run: &str| -> HashSet<String> {
        let crowd = crowd(7, run);
        (0..200).map(|number| crowd.person(number).journey[0].body["email"].to_string()).collect()
    };
    let (one, other) = (addresses("aaaa"), addresses("bbbb"));
    assert_eq!(one.len(), 200);
    assert!(one.is_disjoint(&other));
    let other = other.into_iter().map(|it| it.replace("bbbb", "aaaa")).collect();
    assert_eq!(one, other);
}

#[test]
fn every_shape_appears() {
    let calls = calls(2000);
    type Shape = fn(&Call) -> bool;
    let shapes: [(&str, Shape); 22] = [
        ("google", |it| issuer(it) == Some("google.com")),
        ("facebook", |it| issuer(it) == Some("facebook.com")),
        ("mail code", |it| issuer(it) == Some("mail")),
        ("no identities", |it| issuer(it).is_none()),
        ("b2b", |it| !it.body.contains_key("step") && !it.body.contains_key("client_id")),
        ("b2c", |it| it.body.contains_key("step") && it.body.contains_key("client_id")),
        ("combined", |it| it.route == Route::Combined),
        ("lastName", |it| it.body.contains_key("lastName")),
        ("surname", |it| it.body.contains_key("surname")),
        ("no name", |it| !it.body.contains_key("displayName")),
        ("text", |it| custom(it).any(|(_, value)| value.is_string())),
        ("number", |it| custom(it).any(|(_, value)| value.is_number())),
        ("boolean", |it| custom(it).any(|(_, value)| value.is_boolean())),
        ("several locales", |it| it.body["ui_locales"].as_str().unwrap().contains(' ')),
        ("international", |it| !it.body["ui_locales"].as_str().unwrap().starts_with("en")),
        ("throwaway", |it| THROWAWAY.iter().any(|domain| address(it).ends_with(domain))),
        ("corrected", |it| it.correction.is_some()),
        ("once", |it| it.delivery == Delivery::Once),
        ("again", |it| it.delivery == Delivery::Again),
        ("hang-up", |it| matches!(it.delivery, Delivery::HangUp(_))),
        ("after federation", |it| it.step == Step::AfterFederation),
        ("before create", |it| it.step == Step::BeforeCreate),
    ];
    for (name, is) in shapes {
        assert!(calls.iter().any(is), "{name}");
        assert!(!calls.iter().all(is), "{name}");
    }
    let crowd = crowd(7, "r");
    let journeys: HashSet<Vec<Step>> = (0..2000)
        .map(|number| crowd.person(number).journey.iter().map(|call| call.step).collect())
        .collect();
    let (screen, create) = (Step::AfterFederation, Step::BeforeCreate);
    for journey in [
        vec![screen, create],
        vec![create],                 // a local account
        vec![screen],                 // abandoned
        vec![screen, screen, create], // began again
        vec![screen, create, create], // sent another form
    ] {
        assert!(journeys.contains(&journey), "{journey:?}");
    }
}

#[test]
fn every_call_is_one_of_the_contract() {
    for call in calls(2000) {
        for body in [Some(&call.body), call.correction.as_ref()].into_iter().flatten() {
            assert!(body["email"].as_str().unwrap().contains("@"));
            assert!(!body.values().any(Value::is_null), "a claim without a value is left out");
            assert!(!body.contains_key("objectId"), "there is no account yet");
            let step = match call.step {
                Step::AfterFederation => "PostFederationSignup",
                _ => "PostAttributeCollection",
            };
            assert!(body.get("step").is_none_or(|it| it == step));
            assert_eq!(body.contains_key("step"), body.contains_key("client_id"));
            for (name, value) in body.iter().filter(|(name, _)| name.starts_with("extension_")) {
                let application = name.split('_').nth(1).unwrap();
                assert_eq!(application.len(), 32, "{name}");
                assert!(application.bytes().all(|b| b.is_ascii_hexdigit()), "{name}");
                assert!(!value.is_array() && !value.is_object(), "no collections");
            }
            for text in body.values().filter_map(Value::as_str) {
                assert!(text.chars().count() <= 250, "the directory takes no longer text");
            }
            assert_eq!(form_of(body).is_some(), call.step == Step::BeforeCreate);
        }
        assert!(call.route == Route::Step || call.body.contains_key("step"));
        assert!(call.correction.is_none() || call.step == Step::BeforeCreate);
    }
}

#[test]
fn the_forms_of_a_person_can_be_told_apart() {
    let crowd = crowd(7, "r");
    for number in 0..2000 {
        let journey = crowd.person(number).journey;
        let forms: Vec<_> = journey.iter().filter_map(|call| form_of(&call.body)).collect();
        let distinct: HashSet<_> = forms.iter().collect();
        assert_eq!(distinct.len(), forms.len(), "{number}");
    }
}

fn issuer(call: &Call) -> Option<&str> {
    call.body.get("identities")?[0]["issuer"].as_str()
}

fn address(call: &Call) -> &str {
    call.body["email"].as_str().unwrap()
}

fn custom(call: &Call) -> impl Iterator<Item = (&String, &Value)> {
    call.body.iter().filter(|(name, _)| name.starts_with("extension_"))
}
