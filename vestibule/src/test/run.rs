//! Decides a case, and compares the decision with what was expected.

use std::time::Duration;

use anyhow::Context;
use serde::Serialize;
use tokio::time::Instant;
use vestibule_api::Question;
use vestibule_events::{Claims, Decision, Effect, Outcome, PseudonymKey};

use super::cases::{Case, Expect};
use crate::{
    config::Config,
    trial::{self, Ask, ListEntries, Trial},
};

/// Nobody is asked, so nothing has to be waited for; a machine may be busy all the same.
const DEADLINE: Duration = Duration::from_secs(60);

/// A case that was decided.
pub(super) struct Ran {
    pub(super) decision: Decision,
    /// What each rule did, in the order of the reasons.
    pub(super) effects: Vec<String>,
    pub(super) differences: Vec<Difference>,
    /// What the case lacks to mean anything.
    pub(super) hints: Vec<String>,
}

/// A part of the decision that is not as expected.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub(super) struct Difference {
    pub(super) part: &'static str,
    pub(super) expected: String,
    pub(super) found: String,
}

impl Ran {
    pub(super) fn passed(&self) -> bool {
        self.differences.is_empty() && self.hints.is_empty()
    }
}

pub(super) async fn run(case: &Case, config: &Config, trial: &Trial<'_>) -> anyhow::Result<Ran> {
    let connector = config.connectors.iter().find(|it| it.name == case.sign_up.connector);
    let connector = connector.context("the connector of a case was found when it was read")?;
    let decide = async |lists: &ListEntries| {
        let reference = trial.reference(Ask::StandIns(&case.lookups), lists).await?;
        let decider = trial.decider(connector, &reference, case.standing);
        let person = PseudonymKey::new(vec![0; 32]).person(&case.sign_up);
        let deadline = Instant::now() + DEADLINE;
        let sign_up = &case.sign_up;
        let question = Question { sign_up, person: &person, deadline, now: case.now };
        anyhow::Ok(decider.decide(question).await)
    };
    let decision = decide(&case.lists).await?;
    let differences = compare(&case.expect, &decision);
    let mut hints: Vec<_> = trial::not_asked(&decision).map(needs_lookup).collect();
    // A list was needed where the decision is another one without it than with it, empty.
    let absent = || trial.missing.iter().filter(|(name, _)| !case.lists.contains_key(name));
    let mut lists = case.lists.clone();
    lists.extend(absent().map(|(name, _)| (name.clone(), Vec::new())));
    let with_all = effects(&decide(&lists).await?);
    for (name, _) in absent() {
        let mut lists = lists.clone();
        lists.remove(name);
        if effects(&decide(&lists).await?) != with_all {
            hints.push(needs_list(name));
        }
    }
    let effects = trial::effects(&decision);
    Ok(Ran { decision, effects, differences, hints })
}

// A rule that needed what the case does not give was not tested, whatever came out.

fn needs_lookup(name: &str) -> String {
    format!(
        "the lookup `{name}` is asked, and the case has no answer for it: give it \
         `lookups = {{ {name} = {{ found = true }} }}`"
    )
}

fn needs_list(name: &str) -> String {
    format!(
        "the list `{name}` is in a database, which a test does not ask: give the case \
         `lists = {{ {name} = [\"…\"] }}`"
    )
}

fn effects(decision: &Decision) -> Vec<(String, Effect)> {
    decision.reasons.iter().map(|it| (it.rule.clone(), it.effect)).collect()
}

fn compare(expect: &Expect, decision: &Decision) -> Vec<Difference> {
    let outcome = &decision.outcome;
    let mut differences = Vec::new();
    let mut differ = |part, expected: String, found: String| {
        if expected != found {
            differences.push(Difference { part, expected, found });
        }
    };
    differ("outcome", expect.outcome.to_owned(), outcome.as_str().to_owned());
    let or_none = |text: Option<&str>| text.map_or("none".to_owned(), |it| format!("{it:?}"));
    if let Some(message) = &expect.message {
        differ("message", format!("{message:?}"), or_none(outcome.message()));
    }
    if let Some(field) = &expect.field {
        let found = match outcome {
            Outcome::Reject { field, .. } => field.as_deref(),
            _ => None,
        };
        differ("field", format!("{field:?}"), or_none(found));
    }
    if let Some(claims) = &expect.claims {
        let none = Claims::new();
        let found = outcome.changed_claims().unwrap_or(&none);
        differ("claims", shown(claims), shown(found));
    }
    if let Some(rule) = &expect.rule {
        let decisive = trial::decisive(decision).map(|it| it.rule.as_str());
        // Where nobody was turned away, any rule that had a part in it will do.
        let had_a_part =
            !outcome.is_refusal() && decision.reasons.iter().any(|it| it.rule == *rule);
        let found = if had_a_part { Some(rule.as_str()) } else { decisive };
        differ("rule", rule.clone(), found.unwrap_or("none").to_owned());
    }
    differences
}

/// In the order of their names, so that two of them can be compared.
fn shown(claims: &Claims) -> String {
    let mut claims: Vec<_> = claims.iter().map(|(name, it)| format!("{name} = {it}")).collect();
    claims.sort_unstable();
    format!("{{ {} }}", claims.join(", "))
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use vestibule_events::{Mode, Reason};

    use super::*;

    fn decision(outcome: Outcome) -> Decision {
        let reason = |rule: &str, effect, mode| Reason {
            rule: rule.to_owned(),
            effect,
            mode,
            failure: None,
            took_us: 1,
        };
        let reasons = vec![
            reason("noted", Effect::Block, Mode::Audit),
            reason("last", Effect::Block, Mode::Enforce),
        ];
        Decision { reasons, ..Decision::new(outcome) }
    }

    fn expect(outcome: &'static str) -> Expect {
        Expect { outcome, rule: None, message: None, field: None, claims: None }
    }

    fn parts(expect: &Expect, decision: &Decision) -> Vec<&'static str> {
        compare(expect, decision).into_iter().map(|it| it.part).collect()
    }

    #[test]
    fn what_is_not_expected_may_be_anything() {
        let decision = decision(Outcome::Block { message: "no".into() });
        assert!(parts(&expect("block"), &decision).is_empty());
        assert_eq!(parts(&expect("continue"), &decision), ["outcome"]);
    }

    #[test]
    fn the_rule_of_a_refusal_is_the_one_that_ended_it() {
        let refused = decision(Outcome::Block { message: "no".into() });
        let noted = Expect { rule: Some("noted".into()), ..expect("block") };
        assert_eq!(parts(&noted, &refused), ["rule"]);
        let last = Expect { rule: Some("last".into()), ..expect("block") };
        assert!(parts(&last, &refused).is_empty());
        let noted = Expect { rule: Some("noted".into()), ..expect("continue") };
        assert!(parts(&noted, &decision(Outcome::unchanged())).is_empty());
    }

    #[test]
    fn every_other_part_is_compared_where_it_is_expected() {
        let claims = |value| json!({ "city": value }).as_object().unwrap().clone();
        let found = decision(Outcome::Continue { claims: claims("Köln") });
        let same = Expect { claims: Some(claims("Köln")), ..expect("continue") };
        assert!(parts(&same, &found).is_empty());
        for (other, part) in [
            (Expect { claims: Some(claims("Bonn")), ..expect("continue") }, "claims"),
            (Expect { claims: Some(Claims::new()), ..expect("continue") }, "claims"),
            (Expect { message: Some("no".into()), ..expect("continue") }, "message"),
            (Expect { field: Some("city".into()), ..expect("continue") }, "field"),
        ] {
            assert_eq!(parts(&other, &found), [part]);
        }
    }
}
