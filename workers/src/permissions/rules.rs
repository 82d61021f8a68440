//! Conditions, compiled; what an event earns. Pure.

use std::{fmt, time::Duration};

use vestibule_events::{
    SignUpEvent,
    expression::{Condition, Facts, Failure, Fault},
};
use vestibule_store::NewGrant;

use super::GrantRule;

/// Longer than anybody stays, and far from where a date ends.
const LONGEST: Duration = Duration::from_secs(100 * 365 * 24 * 60 * 60);

/// Rules that can be evaluated.
#[derive(Debug)]
pub(super) struct Rules(Vec<Rule>);

#[derive(Debug)]
struct Rule {
    name: String,
    when: Condition,
    role: String,
    expires_after: Option<Duration>,
}

/// Why a rule cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RuleError {
    /// Which rule, from 0.
    pub index: usize,
    pub rule: String,
    /// The key that is at fault: `name`, `when`, `role` or `expires_after`.
    pub key: &'static str,
    pub message: String,
}

impl fmt::Display for RuleError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rule `{}`: {}: {}", self.rule, self.key, self.message)
    }
}

impl std::error::Error for RuleError {}

/// A rule that failed with an event. Names the rule and nothing of what it looked at.
#[derive(Debug, thiserror::Error)]
#[error("could not evaluate the rule `{rule}`: {}", .failure.as_str())]
pub(super) struct RuleFailed {
    rule: String,
    failure: Failure,
}

impl Rules {
    pub(super) fn compile(rules: Vec<GrantRule>) -> Result<Self, Vec<RuleError>> {
        let mut errors = Vec::new();
        let mut names = std::collections::HashSet::new();
        let mut compiled = Vec::new();
        for (index, rule) in rules.into_iter().enumerate() {
            let GrantRule { name, when, role, expires_after } = rule;
            let mut complain = |key, message: String| {
                errors.push(RuleError { index, rule: name.clone(), key, message });
            };
            if name.trim().is_empty() {
                complain("name", "must not be empty: it is the reason of the grant".into());
            } else if !names.insert(name.clone()) {
                complain("name", "there is another rule of this name".into());
            }
            if role.trim().is_empty() {
                complain("role", "must not be empty".into());
            }
            if expires_after.is_some_and(|it| it > LONGEST) {
                complain("expires_after", "must be at most 100 years".into());
            }
            match Condition::compile(&when) {
                Ok(when) => compiled.push(Rule { name, when, role, expires_after }),
                Err(faults) => faults.into_iter().for_each(|it| complain("when", in_words(it))),
            }
        }
        if errors.is_empty() { Ok(Self(compiled)) } else { Err(errors) }
    }

    /// The grants that an event earns, in the order of the rules; each role once.
    pub(super) fn earned(&self, event: &SignUpEvent) -> Result<Vec<NewGrant>, RuleFailed> {
        let facts = Facts::of(event);
        let mut earned: Vec<NewGrant> = Vec::new();
        for rule in &self.0 {
            let holds = holds(&rule.when, &facts)
                .map_err(|failure| RuleFailed { rule: rule.name.clone(), failure })?;
            if holds && !earned.iter().any(|it| it.role == rule.role) {
                earned.push(NewGrant {
                    role: rule.role.clone(),
                    reason: rule.name.clone(),
                    // From the event's own time: handled late, a grant does not last longer.
                    expires_at: rule.expires_after.map(|after| event.time + after),
                });
            }
        }
        Ok(earned)
    }
}

/// Whether a condition holds. What is not there fulfils none: who does not say that they are in
/// sales does not get what sales gets. Everything else that goes wrong is the rule's fault, and
/// somebody should hear of it.
fn holds(condition: &Condition, facts: &Facts<'_>) -> Result<bool, Failure> {
    match condition.holds(facts) {
        Err(Failure::Missing) => Ok(false),
        holds => holds,
    }
}

fn in_words(Fault { message, line, column }: Fault) -> String {
    match (line, column) {
        (1, 1) => message,
        _ => format!("line {line} column {column}: {message}"),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use vestibule_events::Outcome;

    use super::*;
    use crate::claims::sample;

    fn rule(name: &str, when: &str, role: &str) -> GrantRule {
        GrantRule { name: name.into(), when: when.into(), role: role.into(), expires_after: None }
    }

    fn roles(when: &str, event: &SignUpEvent) -> Result<usize, RuleFailed> {
        Ok(Rules::compile(vec![rule("r", when, "role")]).unwrap().earned(event)?.len())
    }

    #[test]
    fn roles_follow_from_the_claims_in_force_and_each_comes_once() {
        let mut event = sample();
        event.decision.outcome = Outcome::Continue {
            claims: json!({ "department": "sales" }).as_object().unwrap().clone(),
        };
        let expires_after = Some(Duration::from_secs(60));
        let rules = Rules::compile(vec![
            rule("staff", "signup.email_domain == 'example.com'", "reader"),
            rule("sales", "signup.claims.department == 'sales'", "seller"),
            rule(
                "also-staff",
                "signup.identities.exists(it, it.issuer == 'example.com')",
                "reader",
            ),
            GrantRule { expires_after, ..rule("trial", "true", "trial") },
            rule("nobody", "signup.claims.department == 'legal'", "lawyer"),
        ])
        .unwrap();
        let earned = rules.earned(&event).unwrap();
        let pairs: Vec<_> = earned.iter().map(|it| (&*it.role, &*it.reason)).collect();
        assert_eq!(pairs, [("reader", "staff"), ("seller", "sales"), ("trial", "trial")]);
        assert_eq!(earned[2].expires_at, Some(event.time + Duration::from_secs(60)));
    }

    #[test]
    fn a_claim_that_is_not_there_earns_nothing() {
        for when in [
            "signup.claims.city == 'x'",
            "signup.claims.city != 'x'",
            "signup.claims['city'] == 'x'",
        ] {
            assert_eq!(roles(when, &sample()).unwrap(), 0, "{when}");
        }
        assert_eq!(roles("!has(signup.claims.city)", &sample()).unwrap(), 1);
    }

    #[test]
    fn a_condition_that_fails_names_its_rule_and_nothing_personal() {
        let mut event = sample();
        event.sign_up.claims.insert("age".into(), json!("secret"));
        for when in ["signup.claims.age > 17", "signup.claims.age + 1 > 2"] {
            let text = roles(when, &event).unwrap_err().to_string();
            assert!(text.contains("`r`") && !text.contains("secret"), "{text}");
        }
    }

    #[test]
    fn all_complaints_come_at_once_and_before_the_first_event() {
        let errors = Rules::compile(vec![
            rule("a", "signup.emial == ''", "x"),
            rule("a", "user.email == ''", "x"),
            rule("b", "signup.email ==", ""),
            rule("c", "signup.email.shout() == ''", "x"),
            rule("d", "signup.email", "x"),
            rule("", "true", "x"),
            GrantRule { expires_after: Some(Duration::MAX), ..rule("e", "true", "x") },
        ])
        .unwrap_err();
        let seen: Vec<_> = errors.iter().map(|it| (it.index, it.key)).collect();
        assert_eq!(
            seen,
            [
                (0, "when"),
                (1, "name"),
                (1, "when"),
                (2, "role"),
                (2, "when"),
                (3, "when"),
                (4, "when"),
                (5, "name"),
                (6, "expires_after")
            ]
        );
        assert!(errors[0].message.contains("has no `emial`"), "{}", errors[0]);
        assert!(errors[5].message.contains("shout"), "{}", errors[5]);
    }
}
