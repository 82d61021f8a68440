//! Conditions, compiled; what an event earns. Pure.

use std::{
    fmt,
    sync::{Arc, LazyLock},
    time::Duration,
};

use cel::{
    Context, Env, ExecutionError, IdedExpr, Program, Value,
    common::ast::{EntryExpr, Expr},
};
use vestibule_events::SignUpEvent;
use vestibule_store::NewGrant;

use super::GrantRule;
use crate::claims::{SignUpView, sample};

static ENV: LazyLock<Arc<Env>> = LazyLock::new(|| Arc::new(Env::stdlib()));

const SIGNUP: &str = "signup";

/// Longer than anybody stays, and far from where a date ends.
const LONGEST: Duration = Duration::from_secs(100 * 365 * 24 * 60 * 60);

/// Rules that can be evaluated.
#[derive(Debug)]
pub(super) struct Rules(Vec<Rule>);

#[derive(Debug)]
struct Rule {
    name: String,
    when: Program,
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
#[error("could not evaluate the rule `{rule}`: {what}")]
pub(super) struct RuleFailed {
    rule: String,
    what: &'static str,
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
            match condition(&when) {
                Ok(when) => compiled.push(Rule { name, when, role, expires_after }),
                Err(messages) => messages.into_iter().for_each(|it| complain("when", it)),
            }
        }
        if errors.is_empty() { Ok(Self(compiled)) } else { Err(errors) }
    }

    /// The grants that an event earns, in the order of the rules; each role once.
    pub(super) fn earned(&self, event: &SignUpEvent) -> Result<Vec<NewGrant>, RuleFailed> {
        let facts = Facts::of(event);
        let mut earned: Vec<NewGrant> = Vec::new();
        for rule in &self.0 {
            let holds = facts
                .hold(&rule.when)
                .map_err(|what| RuleFailed { rule: rule.name.clone(), what })?;
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

/// What conditions see.
struct Facts(Context<'static, 'static>);

impl Facts {
    fn of(event: &SignUpEvent) -> Self {
        let mut context = Context::with_env(Arc::clone(&ENV));
        let sign_up = cel::to_value(SignUpView::of(event)).expect("a sign-up is plain data");
        context.add_variable_from_value(SIGNUP, sign_up);
        Self(context)
    }

    /// Whether a condition holds. A claim that is not there fulfils none: who does not say that
    /// they are in sales does not get what sales gets. Everything else that goes wrong is the
    /// rule's fault, and somebody should hear of it.
    fn hold(&self, condition: &Program) -> Result<bool, &'static str> {
        match condition.execute(&self.0) {
            Ok(Value::Bool(holds)) => Ok(holds),
            Ok(_) => Err("the condition is neither true nor false"),
            Err(ExecutionError::NoSuchKey(_) | ExecutionError::IndexOutOfBounds(_)) => Ok(false),
            Err(ExecutionError::UndeclaredReference(_)) => {
                Err("it uses a function that does not exist")
            }
            Err(ExecutionError::NoSuchOverload(_) | ExecutionError::UnexpectedType { .. }) => {
                Err("a value is not of the type that it needs")
            }
            // The library's own words quote the values.
            Err(_) => Err("evaluation error"),
        }
    }
}

/// Compiles a condition, and finds what would fail with every event.
fn condition(source: &str) -> Result<Program, Vec<String>> {
    let program = ENV.compile(source).map_err(|errors| {
        errors
            .errors
            .into_iter()
            .map(|it| format!("line {} column {}: {}", it.pos.0, it.pos.1, it.msg))
            .collect::<Vec<_>>()
    })?;
    let mut names = Names::default();
    names.check(program.expression());
    let mut faults = names.faults;
    if faults.is_empty() {
        // A type that does not fit may be due to the sample; a missing function never is.
        match program.execute(&Facts::of(&sample()).0) {
            Ok(Value::Bool(_)) => {}
            Ok(_) => faults.push("must be true or false".into()),
            Err(ExecutionError::UndeclaredReference(name)) => {
                faults.push(format!("there is no function `{name}`"));
            }
            Err(_) => {}
        }
    }
    if faults.is_empty() { Ok(program) } else { Err(faults) }
}

/// Looks for names that do not exist.
#[derive(Default)]
struct Names<'a> {
    /// Variables of the comprehensions around.
    scope: Vec<&'a str>,
    faults: Vec<String>,
}

impl<'a> Names<'a> {
    /// CEL's own names for types, as in `type(x) == string`.
    const TYPES: [&'static str; 10] =
        ["bool", "bytes", "double", "int", "list", "map", "null_type", "string", "type", "uint"];

    fn check(&mut self, at: &'a IdedExpr) {
        match &at.expr {
            Expr::Unspecified | Expr::Literal(_) => {}
            Expr::Ident(name) => {
                let known = name == SIGNUP
                    || self.scope.contains(&name.as_str())
                    || Self::TYPES.contains(&name.as_str());
                if !known {
                    self.faults.push(format!("there is no `{name}`; all is under `{SIGNUP}`"));
                }
            }
            Expr::Select(select) => {
                self.check(&select.operand);
                let member = select.field.as_str();
                if matches!(&select.operand.expr, Expr::Ident(name) if name == SIGNUP)
                    && !SignUpView::MEMBERS.contains(&member)
                {
                    let members = SignUpView::MEMBERS.join(", ");
                    self.faults.push(format!("`{SIGNUP}` has no `{member}`; it has {members}"));
                }
            }
            Expr::Call(call) => {
                call.target.iter().for_each(|it| self.check(it));
                call.args.iter().for_each(|it| self.check(it));
            }
            Expr::List(list) => list.elements.iter().for_each(|it| self.check(it)),
            Expr::Map(map) => map.entries.iter().for_each(|it| self.check_entry(&it.expr)),
            Expr::Struct(it) => it.entries.iter().for_each(|it| self.check_entry(&it.expr)),
            Expr::Comprehension(it) => {
                self.check(&it.iter_range);
                self.check(&it.accu_init);
                let outside = self.scope.len();
                self.scope.extend([it.iter_var.as_str(), it.accu_var.as_str()]);
                self.scope.extend(it.iter_var2.as_deref());
                self.check(&it.loop_cond);
                self.check(&it.loop_step);
                self.check(&it.result);
                self.scope.truncate(outside);
            }
        }
    }

    fn check_entry(&mut self, entry: &'a EntryExpr) {
        match entry {
            EntryExpr::StructField(field) => self.check(&field.value),
            EntryExpr::MapEntry(entry) => {
                self.check(&entry.key);
                self.check(&entry.value);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use vestibule_events::Outcome;

    use super::*;

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
