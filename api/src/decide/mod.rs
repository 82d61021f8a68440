//! What is decided about a sign-up: rules in order, the first refusal is the answer.
//!
//! Pure: a decision depends on the rules and the sign-up and on nothing else, and always comes,
//! whatever the platform sent. A rule that cannot be evaluated has its own policy for that. What
//! the answer looks like on the wire is left to `contract`.

mod rules;

use vestibule_events::{
    Claims, Decision, Effect, Mode, Outcome, Reason, SignUp,
    expression::{Facts, Failure},
};

pub use self::rules::{Expression, OnError, RuleError, RuleOutcome, RuleSettings, Rules};
use self::rules::{Rule, Verdict};

/// Decides: the rules of this step in their order, until one turns the sign-up away.
///
/// A claim that one rule sets is what the rules after it see.
#[must_use]
pub fn decide(rules: &Rules, sign_up: &SignUp) -> Decision {
    evaluate(rules, sign_up, |_, _| {})
}

/// Decides, and tells which rule could not be evaluated and why, for counting.
pub(crate) fn evaluate(
    rules: &Rules,
    sign_up: &SignUp,
    mut failed: impl FnMut(usize, Failure),
) -> Decision {
    let mut changed = Claims::new();
    let mut reasons = Vec::new();
    for (index, rule) in rules.at(sign_up.step) {
        let verdict = judge(rule, &Facts::new(sign_up, &changed));
        let (effect, refusal) = match verdict {
            Ok(None) => continue,
            Ok(Some(Verdict::Set(claims))) => {
                changed.extend(claims);
                (Effect::Set, None)
            }
            Ok(Some(Verdict::Reject { message, field })) => {
                (Effect::Reject, Some(Outcome::Reject { message, field }))
            }
            Ok(Some(Verdict::Block { message })) => {
                (Effect::Block, Some(Outcome::Block { message }))
            }
            Err(failure) => {
                failed(index, failure);
                match rule.on_error.clone() {
                    OnError::Continue => (Effect::Failed, None),
                    OnError::Reject { message } => {
                        (Effect::FailedReject, Some(Outcome::Reject { message, field: None }))
                    }
                    OnError::Block { message } => {
                        (Effect::FailedBlock, Some(Outcome::Block { message }))
                    }
                }
            }
        };
        let (mode, took_us) = (Mode::Enforce, 0);
        reasons.push(Reason { rule: rule.name.clone(), effect, mode, took_us });
        if let Some(outcome) = refusal {
            return Decision { outcome, reasons, lookups: Vec::new() };
        }
    }
    // The platform is told what is to change, not what is already so.
    changed.retain(|name, value| sign_up.claims.get(name) != Some(value));
    Decision { outcome: Outcome::Continue { claims: changed }, reasons, lookups: Vec::new() }
}

/// What one rule says: nothing, where its condition does not hold.
fn judge(rule: &Rule, facts: &Facts<'_>) -> Result<Option<Verdict>, Failure> {
    if rule.when.holds(facts)? { rule.outcome.verdict(facts).map(Some) } else { Ok(None) }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};
    use vestibule_events::{Email, Identity, Protocol, Step};

    use super::*;

    fn sign_up(claims: &Value) -> SignUp {
        SignUp {
            connector: "partners".parse().unwrap(),
            protocol: Protocol::ApiConnector,
            step: Step::BeforeCreate,
            email: Some(Email::new("Ada@Example.COM")),
            identities: vec![Identity {
                sign_in_type: "federated".into(),
                issuer: "google.com".into(),
                issuer_assigned_id: "1".into(),
            }],
            claims: claims.as_object().unwrap().clone(),
            client: Some("app".into()),
            locale: None,
            ip: None,
            object_id: None,
            correlation_id: None,
        }
    }

    fn london() -> SignUp {
        sign_up(&json!({
            "city": "London",
            "age": 36,
            "big": u64::MAX,
            "half": 0.5,
            "vip": true,
            "nothing": null,
            "tags": ["a", "b"],
            "home": { "street": "1 High Street", "rooms": [1, 2] },
        }))
    }

    fn block_when(when: &str) -> RuleSettings {
        RuleSettings {
            name: when.into(),
            steps: vec![],
            when: when.into(),
            outcome: RuleOutcome::Block { message: "no".into() },
            on_error: OnError::Continue,
        }
    }

    fn set(name: &str, when: &str, claims: &[(&str, &str)]) -> RuleSettings {
        let claims =
            claims.iter().map(|(claim, value)| ((*claim).into(), (*value).into())).collect();
        RuleSettings { name: name.into(), outcome: RuleOutcome::Set { claims }, ..block_when(when) }
    }

    fn decided(rules: Vec<RuleSettings>, sign_up: &SignUp) -> Decision {
        decide(&Rules::compile(rules).unwrap(), sign_up)
    }

    fn changed(decision: &Decision) -> Value {
        match &decision.outcome {
            Outcome::Continue { claims } => claims.clone().into(),
            other => panic!("{other:?}"),
        }
    }

    fn effects(decision: &Decision) -> Vec<(&str, Effect)> {
        decision.reasons.iter().map(|it| (it.rule.as_str(), it.effect)).collect()
    }

    #[test]
    fn without_rules_everybody_goes_on_unchanged() {
        let decision = decide(&Rules::default(), &london());
        assert_eq!(decision, Decision::new(Outcome::unchanged()));
    }

    #[test]
    fn rules_run_in_order_and_the_first_refusal_ends() {
        let reject = RuleSettings {
            name: "reject".into(),
            outcome: RuleOutcome::Reject { message: "which?".into(), field: Some("city".into()) },
            ..block_when("true")
        };
        let decision = decided(
            vec![
                block_when("false"),
                set("upper", "true", &[("city", "'LONDON'")]),
                reject,
                block_when("1 == 1"),
            ],
            &london(),
        );
        assert_eq!(effects(&decision), [("upper", Effect::Set), ("reject", Effect::Reject)]);
        assert_eq!(
            decision.outcome,
            Outcome::Reject { message: "which?".into(), field: Some("city".into()) }
        );
    }

    #[test]
    fn a_claim_that_one_rule_sets_is_what_later_rules_see() {
        let decision = decided(
            vec![
                set("town", "true", &[("town", "signup.claims.city + '!'")]),
                set("city", "signup.claims.town == 'London!'", &[("city", "signup.claims.town")]),
                set("count", "true", &[("count", "size(signup.claims)")]),
                set("seen", "signup.claims.exists(c, c == 'town')", &[("seen", "true")]),
                set("age", "true", &[("age", "signup.claims.age + 1"), ("half", "0.25")]),
            ],
            &london(),
        );
        assert_eq!(
            changed(&decision),
            json!({
                "town": "London!", "city": "London!", "count": 9, "seen": true,
                "age": 37, "half": 0.25,
            })
        );
    }

    #[test]
    fn the_platform_is_told_only_what_changes() {
        let decision = decided(
            vec![
                set("same", "true", &[("city", "'London'")]),
                set("there", "true", &[("age", "1")]),
                set("and back", "true", &[("age", "36")]),
                set("null", "true", &[("vip", "null"), ("town", "signup.claims.nothing")]),
            ],
            &london(),
        );
        assert_eq!(changed(&decision), json!({}));
        assert_eq!(decision.reasons.len(), 4, "a rule that ran is a reason all the same");
    }

    #[test]
    fn a_rule_runs_at_its_steps_only() {
        let rule = RuleSettings { steps: vec![Step::AfterFederation], ..block_when("true") };
        let rules = Rules::compile(vec![rule]).unwrap();
        for step in Step::ALL {
            let decision = decide(&rules, &SignUp { step, ..london() });
            let expected = if step == Step::AfterFederation { "block" } else { "continue" };
            assert_eq!(decision.outcome.as_str(), expected, "{step}");
        }
    }

    #[test]
    fn a_rule_that_cannot_be_evaluated_has_its_own_policy() {
        for (when, cause) in [
            ("signup.claims.town == 'x'", Failure::Missing),
            ("signup.claims.city > 5", Failure::Type),
            ("signup.claims.city", Failure::Result),
            ("5 / (signup.claims.age - 36) == 1", Failure::Other),
        ] {
            for (on_error, effect, outcome) in [
                (OnError::Continue, Effect::Failed, "continue"),
                (OnError::Reject { message: "m".into() }, Effect::FailedReject, "reject"),
                (OnError::Block { message: "m".into() }, Effect::FailedBlock, "block"),
            ] {
                let rule = RuleSettings { on_error, ..block_when(when) };
                let rules = Rules::compile(vec![block_when("false"), rule]).unwrap();
                let mut failures = Vec::new();
                let decision =
                    evaluate(&rules, &london(), |place, cause| failures.push((place, cause)));
                assert_eq!(effects(&decision), [(when, effect)], "{when}");
                assert_eq!(decision.outcome.as_str(), outcome, "{when}");
                assert_eq!(failures, [(1, cause)], "{when}");
            }
        }
    }

    #[test]
    fn a_rule_sets_all_of_its_claims_or_none() {
        for bad in ["signup.claims.town", "[1]", "signup.claims"] {
            let decision =
                decided(vec![set("both", "true", &[("a", "'set'"), ("b", bad)])], &london());
            assert_eq!(effects(&decision), [("both", Effect::Failed)], "{bad}");
            assert_eq!(changed(&decision), json!({}), "{bad}");
        }
    }

    #[test]
    fn all_complaints_come_at_once_each_with_its_place() {
        let errors = Rules::compile(vec![
            set("", "true", &[("a", "1")]),
            block_when("signup.claims.city =="),
            set("twice", "sign_up.email == ''", &[("action", "1"), ("b", "signup.mail")]),
            set("twice", "true ||\n  sighnup.email == ''", &[]),
            block_when("signup.email.beginsWith('x')"),
            block_when("lenght(signup.email) > 1"),
            block_when("signup.email.matches('(')"),
            RuleSettings { name: "empty".into(), ..block_when("") },
        ])
        .unwrap_err();
        let found: Vec<_> = errors
            .iter()
            .map(|it| (it.index, it.expression.to_string(), it.line, it.column))
            .collect();
        let expected = [
            (0, "name", 1, 1),
            (1, "when", 1, 22),
            (2, "when", 1, 1),
            (2, "set.action", 1, 1),
            (2, "set.b", 1, 7),
            (3, "name", 1, 1),
            (3, "when", 2, 3),
            (3, "name", 1, 1),
            (4, "when", 1, 24),
            (5, "when", 1, 7),
            (6, "when", 1, 22),
            (7, "when", 1, 1),
        ]
        .map(|(index, expression, line, column)| (index, expression.to_owned(), line, column));
        assert_eq!(found, expected, "{errors:#?}");
    }
}
