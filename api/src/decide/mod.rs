//! What is decided about a sign-up: rules in order, the first refusal is the answer.
//!
//! Pure: a decision depends on the rules and the sign-up and on nothing else, and always comes,
//! whatever the platform sent. A rule that cannot be evaluated has its own policy for that. What
//! the answer looks like on the wire is left to `contract`.

mod expression;
mod rules;

use vestibule_events::{Claims, Decision, Effect, Outcome, Reason, SignUp};

use self::expression::{Facts, Failure};
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
        reasons.push(Reason { rule: rule.name.clone(), effect });
        if let Some(outcome) = refusal {
            return Decision { outcome, reasons };
        }
    }
    // The platform is told what is to change, not what is already so.
    changed.retain(|name, value| sign_up.claims.get(name) != Some(value));
    Decision { outcome: Outcome::Continue { claims: changed }, reasons }
}

/// What one rule says: nothing, where its condition does not hold.
fn judge(rule: &Rule, facts: &Facts<'_>) -> Result<Option<Verdict>, Failure> {
    if rule.when.holds(facts)? { rule.outcome.verdict(facts).map(Some) } else { Ok(None) }
}
