//! Rules as they are written, and compiled.

use std::collections::BTreeMap;

use serde_json::Value;
use vestibule_events::{
    Claims, Mode, Step,
    expression::{ClaimValue, Condition, Facts, Failure, Fault, Known},
};

use super::{Messages, Text};

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
    pub mode: Mode,
}

/// What follows where the condition holds. A message is what it says or `message:KEY`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RuleOutcome {
    /// Claims get the values of these CEL expressions; all of them or, where one fails, none.
    Set { claims: BTreeMap<String, String> },
    /// The person is asked to correct the form.
    Reject { message: String, field: Option<String> },
    /// The sign-up ends here.
    Block { message: String },
    /// The sign-up goes on, and no further rule runs.
    Accept,
    /// An approver has to say yes first.
    RequireApproval { message: String },
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
    /// What the person is told.
    Message,
}

impl std::fmt::Display for Expression {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Name => f.write_str("name"),
            Self::When => f.write_str("when"),
            Self::Claim(claim) => write!(f, "set.{claim}"),
            Self::Message => f.write_str("message"),
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
    /// The condition as it is written.
    source: String,
    pub(super) when: Condition,
    pub(super) outcome: Outcome,
    pub(super) on_error: Fallback,
    pub(super) mode: Mode,
}

#[derive(Debug)]
pub(super) enum Outcome {
    Set(Vec<(String, ClaimValue)>),
    Reject { message: Text, field: Option<String> },
    Block { message: Text },
    Accept,
    RequireApproval { message: Text },
}

impl Outcome {
    /// Its key in the configuration.
    const fn as_str(&self) -> &'static str {
        match self {
            Self::Set(_) => "set",
            Self::Reject { .. } => "reject",
            Self::Block { .. } => "block",
            Self::Accept => "accept",
            Self::RequireApproval { .. } => "require_approval",
        }
    }

    /// Whether no rule after it runs.
    const fn ends(&self) -> bool {
        !matches!(self, Self::Set(_))
    }
}

/// [`OnError`] with its text found.
#[derive(Debug)]
pub(super) enum Fallback {
    Continue,
    Reject { message: Text },
    Block { message: Text },
}

/// An outcome with its expressions evaluated.
#[derive(Debug)]
pub(super) enum Verdict<'a> {
    Set(Claims),
    Reject { message: &'a Text, field: Option<&'a str> },
    Block { message: &'a Text },
    Accept,
    RequireApproval { message: &'a Text },
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
    /// Compiles rules that need no lists, lookups and messages.
    pub fn compile(settings: Vec<RuleSettings>) -> Result<Self, Vec<RuleError>> {
        Self::compile_with(settings, &Known::default(), &Messages::default())
    }

    /// Compiles all of them, or says everything that is wrong with any. `known` are the lists and
    /// lookups that they may name.
    pub fn compile_with(
        settings: Vec<RuleSettings>,
        known: &Known,
        messages: &Messages,
    ) -> Result<Self, Vec<RuleError>> {
        let mut errors = Vec::new();
        let mut names = std::collections::HashSet::new();
        let mut rules = Vec::with_capacity(settings.len());
        for (index, rule) in settings.into_iter().enumerate() {
            let mut complaints =
                Complaints { index, rule: rule.name.clone(), messages, errors: &mut errors };
            if rule.name.is_empty() {
                complaints.about(Expression::Name, "a rule needs a name: it stands in events");
            } else if !names.insert(rule.name.clone()) {
                complaints.about(Expression::Name, "another rule has this name already");
            }
            rules.extend(compile(rule, known, &mut complaints));
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

    /// The names with the modes, in the order in which the rules run.
    pub(crate) fn modes(&self) -> impl ExactSizeIterator<Item = (&str, Mode)> {
        self.rules.iter().map(|rule| (rule.name.as_str(), rule.mode))
    }

    /// What stands in the configuration, rule for rule, for who wants to say something about it.
    pub fn described(&self) -> impl ExactSizeIterator<Item = DescribedRule<'_>> {
        self.rules.iter().map(|rule| DescribedRule {
            name: &rule.name,
            steps: rule.steps(),
            mode: rule.mode,
            outcome: rule.outcome.as_str(),
            turns_away: !matches!(rule.outcome, Outcome::Set(_) | Outcome::Accept),
            on_error_turns_away: !matches!(rule.on_error, Fallback::Continue),
        })
    }

    /// The first rule that may ask for approval.
    pub(super) fn first_for_approval(&self) -> Option<(usize, &Rule)> {
        let asks = |rule: &Rule| {
            rule.mode == Mode::Enforce && matches!(rule.outcome, Outcome::RequireApproval { .. })
        };
        self.rules.iter().enumerate().find(|(_, rule)| asks(rule))
    }

    /// Whether any rule may ask for approval, so that somebody has to know how people stand.
    #[must_use]
    pub fn ask_for_approval(&self) -> bool {
        self.first_for_approval().is_some()
    }

    /// Rules that can never have an effect, each with the reason.
    #[must_use]
    pub fn unreachable(&self) -> Vec<Unreachable> {
        let mut found = Vec::new();
        for (index, rule) in self.rules.iter().enumerate() {
            let steps = rule.steps();
            let ends_before = |step: &Step| {
                self.rules[..index].iter().find(|earlier| {
                    earlier.mode == Mode::Enforce
                        && earlier.outcome.ends()
                        && earlier.steps().contains(step)
                        && (earlier.when.constant() == Some(true) || earlier.source == rule.source)
                })
            };
            let because = if rule.when.constant() == Some(false) {
                Some("its condition never holds".to_owned())
            } else {
                let ends: Option<Vec<_>> = steps.iter().map(ends_before).collect();
                ends.and_then(|ends| {
                    let first = ends.first()?;
                    Some(format!(
                        "`{}` ends every sign-up before it comes to this rule",
                        first.name
                    ))
                })
            };
            found.extend(because.map(|because| Unreachable {
                index,
                rule: rule.name.clone(),
                because,
            }));
        }
        found
    }

    /// The rules of a step with their places in the list.
    pub(super) fn at(&self, step: Step) -> impl Iterator<Item = (usize, &Rule)> {
        self.rules
            .iter()
            .enumerate()
            .filter(move |(_, rule)| rule.steps.is_empty() || rule.steps.contains(&step))
    }
}

impl Rule {
    /// What somebody is told who waits for an approver.
    pub(super) const fn approval_message(&self) -> Option<&Text> {
        match &self.outcome {
            Outcome::RequireApproval { message } => Some(message),
            _ => None,
        }
    }

    /// Where it runs.
    fn steps(&self) -> &[Step] {
        if self.steps.is_empty() { &Step::ALL } else { &self.steps }
    }
}

/// What can be told of a rule without running it.
#[derive(Clone, Copy, Debug)]
pub struct DescribedRule<'a> {
    pub name: &'a str,
    /// Where it runs; never empty.
    pub steps: &'a [Step],
    pub mode: Mode,
    /// The key in the configuration: `set`, `reject`, `block`, `accept` or `require_approval`.
    pub outcome: &'static str,
    /// Whether the outcome keeps a person from going on.
    pub turns_away: bool,
    /// The same where the rule cannot be evaluated.
    pub on_error_turns_away: bool,
}

/// A rule that can never have an effect.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unreachable {
    /// Place in the list, from 0.
    pub index: usize,
    pub rule: String,
    pub because: String,
}

fn compile(rule: RuleSettings, known: &Known, complaints: &mut Complaints<'_>) -> Option<Rule> {
    let RuleSettings { name, steps, when: source, outcome, on_error, mode } = rule;
    // All is compiled before any of it is given up, so that all complaints come at once.
    let when = complaints.compiled(Expression::When, Condition::compile_with(&source, known));
    let on_error = match on_error {
        OnError::Continue => Some(Fallback::Continue),
        OnError::Reject { message } => {
            complaints.text(&message).map(|message| Fallback::Reject { message })
        }
        OnError::Block { message } => {
            complaints.text(&message).map(|message| Fallback::Block { message })
        }
    };
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
                        .compiled(expression, ClaimValue::compile_with(&source, known))
                        .map(|value| (claim, value))
                })
                .collect();
            claims.into_iter().collect::<Option<Vec<_>>>().map(Outcome::Set)
        }
        RuleOutcome::Reject { message, field } => {
            complaints.text(&message).map(|message| Outcome::Reject { message, field })
        }
        RuleOutcome::Block { message } => {
            complaints.text(&message).map(|message| Outcome::Block { message })
        }
        RuleOutcome::Accept => Some(Outcome::Accept),
        RuleOutcome::RequireApproval { message } => {
            complaints.text(&message).map(|message| Outcome::RequireApproval { message })
        }
    };
    let (when, outcome, on_error) = (when?, outcome?, on_error?);
    Some(Rule { name, steps, source, when, outcome, on_error, mode })
}

impl Outcome {
    pub(super) fn verdict(&self, facts: &Facts<'_>) -> Result<Verdict<'_>, Failure> {
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
            Self::Reject { message, field } => Verdict::Reject { message, field: field.as_deref() },
            Self::Block { message } => Verdict::Block { message },
            Self::Accept => Verdict::Accept,
            Self::RequireApproval { message } => Verdict::RequireApproval { message },
        })
    }
}

struct Complaints<'a> {
    index: usize,
    rule: String,
    messages: &'a Messages,
    errors: &'a mut Vec<RuleError>,
}

impl Complaints<'_> {
    fn text(&mut self, written: &str) -> Option<Text> {
        self.messages
            .text(written)
            .map_err(|error| self.about(Expression::Message, &error.to_string()))
            .ok()
    }

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
