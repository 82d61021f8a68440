//! Rules as they are written, and compiled.

use std::collections::BTreeMap;

use serde_json::Value;
use vestibule_events::{
    Claims, Step,
    expression::{ClaimValue, Condition, Facts, Failure, Fault},
};

/// One rule as the configuration says it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RuleSettings {
    /// Stands in events and metrics as the reason of a decision.
    pub name: String,
    /// Where it runs; empty means everywhere.
    pub steps: Vec<Step>,
    /// CEL; true means that the outcome takes hold.
    pub when: String,
    pub outcome: RuleOutcome,
    pub on_error: OnError,
}

/// What follows where the condition holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RuleOutcome {
    /// Claims get the values of these CEL expressions; all of them or, where one fails, none.
    Set { claims: BTreeMap<String, String> },
    /// The person is asked to correct the form.
    Reject { message: String, field: Option<String> },
    /// The sign-up ends here.
    Block { message: String },
}

/// What to do where a rule cannot be evaluated.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum OnError {
    /// As if the rule were not there.
    #[default]
    Continue,
    Reject {
        message: String,
    },
    Block {
        message: String,
    },
}

/// Something wrong with a rule, found before it ever runs.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("rule {rule:?}: {expression}: {message}")]
pub struct RuleError {
    /// Place in the list, from 0.
    pub index: usize,
    pub rule: String,
    pub expression: Expression,
    pub message: String,
    /// Within the expression, from 1; both 1 where the whole of it is meant.
    pub line: usize,
    pub column: usize,
}

/// Which part of a rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Expression {
    Name,
    When,
    /// The value of this claim.
    Claim(String),
}

impl std::fmt::Display for Expression {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Name => f.write_str("name"),
            Self::When => f.write_str("when"),
            Self::Claim(claim) => write!(f, "set.{claim}"),
        }
    }
}

/// Compiled rules in their order. The default is none: everybody goes on.
#[derive(Debug, Default)]
pub struct Rules {
    rules: Vec<Rule>,
}

#[derive(Debug)]
pub(super) struct Rule {
    pub(super) name: String,
    steps: Vec<Step>,
    pub(super) when: Condition,
    pub(super) outcome: Outcome,
    pub(super) on_error: OnError,
}

#[derive(Debug)]
pub(super) enum Outcome {
    Set(Vec<(String, ClaimValue)>),
    Reject { message: String, field: Option<String> },
    Block { message: String },
}

/// An outcome with its expressions evaluated.
#[derive(Debug)]
pub(super) enum Verdict {
    Set(Claims),
    Reject { message: String, field: Option<String> },
    Block { message: String },
}

/// Names that mean something else in an answer, or that say who the person is.
const NOT_CLAIMS: [&str; 11] = [
    "version",
    "action",
    "status",
    "userMessage",
    "step",
    "email",
    "identities",
    "objectId",
    "client_id",
    "clientId",
    "ui_locales",
];

impl Rules {
    /// Compiles all of them, or says everything that is wrong with any.
    pub fn compile(settings: Vec<RuleSettings>) -> Result<Self, Vec<RuleError>> {
        let mut errors = Vec::new();
        let mut names = std::collections::HashSet::new();
        let mut rules = Vec::with_capacity(settings.len());
        for (index, rule) in settings.into_iter().enumerate() {
            let mut complaints = Complaints { index, rule: rule.name.clone(), errors: &mut errors };
            if rule.name.is_empty() {
                complaints.about(Expression::Name, "a rule needs a name: it stands in events");
            } else if !names.insert(rule.name.clone()) {
                complaints.about(Expression::Name, "another rule has this name already");
            }
            rules.extend(compile(rule, &mut complaints));
        }
        if errors.is_empty() { Ok(Self { rules }) } else { Err(errors) }
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.rules.is_empty()
    }

    /// The names in the order in which the rules run.
    pub fn names(&self) -> impl ExactSizeIterator<Item = &str> {
        self.rules.iter().map(|rule| rule.name.as_str())
    }

    /// The rules of a step with their places in the list.
    pub(super) fn at(&self, step: Step) -> impl Iterator<Item = (usize, &Rule)> {
        self.rules
            .iter()
            .enumerate()
            .filter(move |(_, rule)| rule.steps.is_empty() || rule.steps.contains(&step))
    }
}

fn compile(rule: RuleSettings, complaints: &mut Complaints<'_>) -> Option<Rule> {
    let RuleSettings { name, steps, when, outcome, on_error } = rule;
    // Both are compiled before either is given up, so that all complaints come at once.
    let when = complaints.compiled(Expression::When, Condition::compile(&when));
    let outcome = match outcome {
        RuleOutcome::Set { claims } => {
            if claims.is_empty() {
                complaints.about(Expression::Name, "the rule sets no claim");
            }
            let claims: Vec<_> = claims
                .into_iter()
                .map(|(claim, source)| {
                    let expression = Expression::Claim(claim.clone());
                    if NOT_CLAIMS.contains(&claim.as_str()) {
                        complaints.about(expression.clone(), "this is no claim that can be set");
                    }
                    complaints
                        .compiled(expression, ClaimValue::compile(&source))
                        .map(|value| (claim, value))
                })
                .collect();
            claims.into_iter().collect::<Option<Vec<_>>>().map(Outcome::Set)
        }
        RuleOutcome::Reject { message, field } => Some(Outcome::Reject { message, field }),
        RuleOutcome::Block { message } => Some(Outcome::Block { message }),
    };
    Some(Rule { name, steps, when: when?, outcome: outcome?, on_error })
}

impl Outcome {
    pub(super) fn verdict(&self, facts: &Facts<'_>) -> Result<Verdict, Failure> {
        Ok(match self {
            Self::Set(claims) => {
                let mut set = Claims::new();
                for (claim, value) in claims {
                    // Platforms know no null: to them a claim without a value is left out.
                    match value.evaluate(facts)? {
                        Value::Null => {}
                        value => drop(set.insert(claim.clone(), value)),
                    }
                }
                Verdict::Set(set)
            }
            Self::Reject { message, field } => {
                Verdict::Reject { message: message.clone(), field: field.clone() }
            }
            Self::Block { message } => Verdict::Block { message: message.clone() },
        })
    }
}

struct Complaints<'a> {
    index: usize,
    rule: String,
    errors: &'a mut Vec<RuleError>,
}

impl Complaints<'_> {
    fn compiled<T>(&mut self, expression: Expression, result: Result<T, Vec<Fault>>) -> Option<T> {
        result
            .map_err(|faults| {
                faults.into_iter().for_each(|fault| self.push(expression.clone(), fault));
            })
            .ok()
    }

    fn about(&mut self, expression: Expression, message: &str) {
        self.push(expression, Fault { message: message.to_owned(), line: 1, column: 1 });
    }

    fn push(&mut self, expression: Expression, Fault { message, line, column }: Fault) {
        self.errors.push(RuleError {
            index: self.index,
            rule: self.rule.clone(),
            expression,
            message,
            line,
            column,
        });
    }
}
