//! What is decided about a sign-up: rules in order, the first that ends it is the answer.
//!
//! A decision always comes, whatever the platform sent and whatever is down: it depends on the
//! rules, the sign-up, and where rules ask for them on lists, lookups and approvals, each within its
//! limit. A rule that cannot be evaluated has its own policy for that. Nothing here writes anything;
//! what the answer looks like on the wire is left to `contract`.

mod approvals;
pub(crate) mod lists;
pub(crate) mod lookups;
mod messages;
mod reference;
mod rules;

use std::{
    io,
    sync::Arc,
    time::{Duration, Instant as Clock},
};

use serde_json::Value;
use time::OffsetDateTime;
use tokio::time::Instant;
use vestibule_events::{
    Claims, Decision, Effect, Mode, Outcome, Person, Reason, SignUp, Step,
    expression::{Facts, Failure},
};

pub use self::{
    approvals::{ApprovalSettings, Approvals, Standing},
    messages::{MessageError, MessageGap, Messages, Text},
    reference::{LookupWithArguments, ReferenceData, StandIn},
    rules::{
        DescribedRule, Expression, OnError, RuleError, RuleOutcome, RuleSettings, Rules,
        Unreachable,
    },
};
use self::{
    reference::Gathered,
    rules::{Fallback, Rule, Verdict},
};

/// All that a connector decides by; cheap to clone. A reload puts another in its place.
#[derive(Clone, Debug, Default)]
pub struct Decider {
    pub rules: Arc<Rules>,
    pub reference: Arc<ReferenceData>,
    /// Who knows how people stand. Without it whoever needs an approval is asked about anew.
    pub approvals: Option<Arc<ApprovalSettings>>,
}

/// Rules that wait for nothing may take so much longer: their time is bounded one by one, but not
/// that of all of them together.
const GRACE: Duration = Duration::from_millis(50);

/// A rule that took longer is followed by whatever else waits for the processor.
const TURN: Duration = Duration::from_millis(1);

/// What somebody is told whose sign-up could not be decided or kept, unless something else is
/// configured.
pub const TRY_AGAIN: &str =
    "We could not take your registration just now. Please try again in a minute.";

/// Who asks, and until when.
#[derive(Clone, Copy, Debug)]
pub struct Question<'a> {
    pub sign_up: &'a SignUp,
    pub person: &'a Person,
    /// What has to be waited for counts as failed then.
    pub deadline: Instant,
    /// The time that rules go by: of the call, where a past one is decided again.
    pub now: Option<OffsetDateTime>,
}

/// A decision, and what is to be counted of it.
#[derive(Debug)]
pub(crate) struct Decided {
    pub(crate) decision: Decision,
    /// The place in the list of the rule of each reason, in the same order.
    pub(crate) places: Vec<usize>,
    /// It could not be learned in time whether the person was approved or denied before.
    pub(crate) standing_unknown: bool,
}

impl Decider {
    /// Decides by rules alone.
    #[must_use]
    pub fn new(rules: Rules) -> Self {
        Self { rules: Arc::new(rules), ..Self::default() }
    }

    /// Decides: the rules of this step in their order, until one ends the sign-up.
    ///
    /// A claim that one rule sets is what the rules after it see.
    pub async fn decide(&self, question: Question<'_>) -> Decision {
        self.decided(question).await.decision
    }

    pub(crate) async fn decided(&self, question: Question<'_>) -> Decided {
        let mut course = Course {
            decider: self,
            question,
            now: question.now.unwrap_or_else(OffsetDateTime::now_utc),
            changed: Claims::new(),
            gathered: Gathered::new(&self.reference),
            reasons: Vec::new(),
            places: Vec::new(),
            standing_unknown: false,
        };
        let end = match course.standing_before_the_form().await {
            Some(end) => Some(end),
            None => course.rules().await,
        };
        course.finish(end)
    }
}

/// What rules change, as JSON. As much as a whole call may send; with that, the event of the longest
/// call is still one that a stream takes.
const CHANGED_BYTES_MAX: usize = 64 * 1024;

/// How long a claim is in JSON.
fn json_bytes(name: &str, value: &Value) -> usize {
    struct Counted(usize);
    impl io::Write for Counted {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0 += bytes.len();
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let mut counted = Counted(0);
    match serde_json::to_writer(&mut counted, &(name, value)) {
        Ok(()) => counted.0,
        Err(_) => usize::MAX / 2,
    }
}

/// One decision while it is made.
struct Course<'a> {
    decider: &'a Decider,
    question: Question<'a>,
    /// One time for all rules.
    now: OffsetDateTime,
    changed: Claims,
    gathered: Gathered<'a>,
    reasons: Vec<Reason>,
    places: Vec<usize>,
    standing_unknown: bool,
}

/// How a sign-up ends before the last rule.
enum End {
    Accept,
    Reject { message: String, field: Option<String> },
    Block { message: String },
    Pending { message: String },
}

impl Course<'_> {
    /// Where rules may ask for approval, nobody fills in the form only to hear that they wait
    /// already, or that the answer was no.
    async fn standing_before_the_form(&mut self) -> Option<End> {
        if self.question.sign_up.step != Step::AfterFederation {
            return None;
        }
        let decider = self.decider;
        let (place, rule) = decider.rules.first_for_approval()?;
        let began = Clock::now();
        let (effect, end) = match self.standing().await? {
            Standing::Pending => {
                let message = self.tell(rule.approval_message()?);
                (Effect::AlreadyPending, End::Pending { message })
            }
            Standing::Denied { .. } => (Effect::Denied, self.denied()),
            Standing::None | Standing::Approved => return None,
        };
        self.note(place, rule, effect, None, began.elapsed());
        Some(end)
    }

    async fn rules(&mut self) -> Option<End> {
        let decider = self.decider;
        let mut began = Clock::now();
        let left = self.question.deadline.saturating_duration_since(Instant::now());
        let give_up = began + left + GRACE;
        for (place, rule) in decider.rules.at(self.question.sign_up.step) {
            if began > give_up {
                // Neither this rule nor those behind it can be asked any more, and what they would
                // have said nobody knows; so nobody is let in by having kept us busy.
                let (effect, failure) = (Effect::FailedBlock, Some(Failure::TooMuch));
                self.note(place, rule, effect, failure, Duration::ZERO);
                return Some(End::Block { message: TRY_AGAIN.to_owned() });
            }
            let asked = began;
            let verdict = self.judge(rule).await.and_then(|it| self.with_room(it));
            let failure = verdict.as_ref().err().copied();
            let happened = match verdict {
                Ok(None) => None,
                Ok(Some(verdict)) => Some(self.follow(verdict, rule.mode).await),
                Err(_) => Some(self.fall_back(&rule.on_error)),
            };
            let now = Clock::now();
            if let Some((effect, end)) = happened {
                self.note(place, rule, effect, failure, now - began);
                if end.is_some() && rule.mode == Mode::Enforce {
                    return end;
                }
            }
            began = now;
            if now.duration_since(asked) > TURN {
                // Others want the processor as well.
                tokio::task::yield_now().await;
                began = Clock::now();
            }
        }
        None
    }

    /// What one rule says: nothing, where its condition does not hold. A lookup is asked where the
    /// rule turns out to need it, and not before.
    async fn judge<'r>(&mut self, rule: &'r Rule) -> Result<Option<Verdict<'r>>, Failure> {
        loop {
            self.gathered.forget_wanted();
            let facts = self.facts().with_sources(&self.gathered);
            let verdict = match rule.when.holds(&facts) {
                Ok(true) => rule.outcome.verdict(&facts).map(Some),
                Ok(false) => Ok(None),
                Err(failure) => Err(failure),
            };
            match verdict {
                Err(Failure::Lookup) => {
                    let Some(wanted) = self.gathered.wanted(&self.facts()) else { return verdict };
                    self.gathered.ask(wanted, self.question.deadline).await;
                }
                verdict => return verdict,
            }
        }
    }

    /// What a rule says, unless it sets more than an event has room for.
    fn with_room<'r>(&self, verdict: Option<Verdict<'r>>) -> Result<Option<Verdict<'r>>, Failure> {
        let Some(Verdict::Set(claims)) = &verdict else { return Ok(verdict) };
        let kept = self.changed.iter().filter(|(name, _)| !claims.contains_key(*name));
        let bytes: usize = kept.chain(claims).map(|(name, value)| json_bytes(name, value)).sum();
        if bytes > CHANGED_BYTES_MAX { Err(Failure::TooMuch) } else { Ok(verdict) }
    }

    fn facts(&self) -> Facts<'_> {
        Facts::as_of(self.now, self.question.sign_up, &self.changed)
    }

    /// Does what a rule says or, where it is not enforced, only finds out what it would do.
    async fn follow(&mut self, verdict: Verdict<'_>, mode: Mode) -> (Effect, Option<End>) {
        match verdict {
            Verdict::Set(claims) => {
                if mode == Mode::Enforce {
                    self.changed.extend(claims);
                }
                (Effect::Set, None)
            }
            Verdict::Reject { message, field } => {
                let (message, field) = (self.tell(message), field.map(str::to_owned));
                (Effect::Reject, Some(End::Reject { message, field }))
            }
            Verdict::Block { message } => {
                (Effect::Block, Some(End::Block { message: self.tell(message) }))
            }
            Verdict::Accept => (Effect::Accept, Some(End::Accept)),
            Verdict::RequireApproval { message } => {
                let pending = |it: &Self| Some(End::Pending { message: it.tell(message) });
                if mode != Mode::Enforce {
                    return (Effect::RequireApproval, None);
                }
                match self.standing().await {
                    None | Some(Standing::None) => (Effect::RequireApproval, pending(self)),
                    Some(Standing::Pending) => (Effect::AlreadyPending, pending(self)),
                    Some(Standing::Approved) => (Effect::Approved, None),
                    Some(Standing::Denied { .. }) => (Effect::Denied, Some(self.denied())),
                }
            }
        }
    }

    fn fall_back(&self, policy: &Fallback) -> (Effect, Option<End>) {
        match policy {
            Fallback::Continue => (Effect::Failed, None),
            Fallback::Reject { message } => {
                let message = self.tell(message);
                (Effect::FailedReject, Some(End::Reject { message, field: None }))
            }
            Fallback::Block { message } => {
                (Effect::FailedBlock, Some(End::Block { message: self.tell(message) }))
            }
        }
    }

    /// How the person stands; `None` where that cannot be learned in time.
    async fn standing(&mut self) -> Option<Standing> {
        let approvals = self.decider.approvals.as_ref()?;
        let Question { sign_up, person, deadline, .. } = self.question;
        let standing = approvals.standing(person, &sign_up.connector, deadline).await;
        self.standing_unknown |= standing.is_none();
        standing
    }

    fn denied(&self) -> End {
        let denied = self.decider.approvals.as_ref().map(|it| self.tell(&it.denied));
        End::Block { message: denied.unwrap_or_else(|| ApprovalSettings::DENIED.to_owned()) }
    }

    fn tell(&self, text: &Text) -> String {
        text.for_locale(self.question.sign_up.locale.as_deref()).to_owned()
    }

    fn note(
        &mut self,
        place: usize,
        rule: &Rule,
        effect: Effect,
        failure: Option<Failure>,
        took: Duration,
    ) {
        let took_us = u32::try_from(took.as_micros()).unwrap_or(u32::MAX);
        let (rule, mode) = (rule.name.clone(), rule.mode);
        let failure = failure.map(|it| it.as_str().to_owned());
        self.reasons.push(Reason { rule, effect, mode, failure, took_us });
        self.places.push(place);
    }

    fn finish(self, end: Option<End>) -> Decided {
        let mut claims = self.changed;
        // The platform is told what is to change, not what is already so.
        claims.retain(|name, value| self.question.sign_up.claims.get(name) != Some(value));
        let outcome = match end {
            None | Some(End::Accept) => Outcome::Continue { claims },
            Some(End::Pending { message }) => Outcome::Pending { message, claims },
            Some(End::Reject { message, field }) => Outcome::Reject { message, field },
            Some(End::Block { message }) => Outcome::Block { message },
        };
        let (reasons, lookups) = (self.reasons, self.gathered.reasons());
        Decided {
            decision: Decision { outcome, reasons, lookups },
            places: self.places,
            standing_unknown: self.standing_unknown,
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use vestibule_events::{
        ConnectorName, Email, Identity, Protocol, PseudonymKey, Step, expression::Known,
    };

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
            mode: Mode::Enforce,
        }
    }

    fn set(name: &str, when: &str, claims: &[(&str, &str)]) -> RuleSettings {
        let claims =
            claims.iter().map(|(claim, value)| ((*claim).into(), (*value).into())).collect();
        RuleSettings { name: name.into(), outcome: RuleOutcome::Set { claims }, ..block_when(when) }
    }

    fn decided(rules: Vec<RuleSettings>, sign_up: &SignUp) -> Decision {
        decided_by(&Decider::new(Rules::compile(rules).unwrap()), sign_up).decision
    }

    fn decided_by(decider: &Decider, sign_up: &SignUp) -> Decided {
        let deadline = Instant::now() + Duration::from_secs(60);
        decided_until(decider, sign_up, deadline)
    }

    fn decided_until(decider: &Decider, sign_up: &SignUp, deadline: Instant) -> Decided {
        let person = PseudonymKey::new(vec![7; 32]).person(sign_up);
        let question = Question { sign_up, person: &person, deadline, now: None };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build();
        runtime.unwrap().block_on(decider.decided(question))
    }

    fn changed(decision: &Decision) -> Value {
        match &decision.outcome {
            Outcome::Continue { claims } => claims.clone().into(),
            other => panic!("{other:?}"),
        }
    }

    fn failures(decision: &Decision) -> Vec<Option<&str>> {
        decision.reasons.iter().map(|it| it.failure.as_deref()).collect()
    }

    fn effects(decision: &Decision) -> Vec<(&str, Effect)> {
        decision.reasons.iter().map(|it| (it.rule.as_str(), it.effect)).collect()
    }

    #[test]
    fn without_rules_everybody_goes_on_unchanged() {
        let decision = decided(vec![], &london());
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
    fn rules_set_no_more_than_an_event_has_room_for() {
        let long = "\u{1}".repeat(CHANGED_BYTES_MAX / 6 / 2 - 20);
        let rules = || {
            vec![
                set("one", "true", &[("one", "signup.claims.long")]),
                set("again", "true", &[("one", "signup.claims.long + '!'")]),
                set("two", "true", &[("two", "signup.claims.long")]),
                RuleSettings {
                    on_error: OnError::Block { message: "no".into() },
                    ..set("three", "true", &[("three", "'x'"), ("four", "signup.claims.long")])
                },
            ]
        };
        let decider = Decider::new(Rules::compile(rules()).unwrap());
        let end = decided_by(&decider, &sign_up(&json!({ "long": long })));
        assert_eq!(failures(&end.decision), [None, None, None, Some(Failure::TooMuch.as_str())]);
        assert_eq!(end.decision.outcome, Outcome::Block { message: "no".into() });
        let shorter = sign_up(&json!({ "long": "x".repeat(CHANGED_BYTES_MAX / 4) }));
        assert_eq!(effects(&decided(rules(), &shorter))[3], ("three", Effect::Set));
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
        for step in Step::ALL {
            let decision = decided(vec![rule.clone()], &SignUp { step, ..london() });
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
                let Decided { decision, places, .. } = decided_by(&Decider::new(rules), &london());
                assert_eq!(effects(&decision), [(when, effect)], "{when}");
                assert_eq!(decision.outcome.as_str(), outcome, "{when}");
                assert_eq!(places, [1], "{when}");
                assert_eq!(failures(&decision), [Some(cause.as_str())], "{when}");
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

    #[test]
    fn a_rule_that_is_not_enforced_is_only_a_reason() {
        for mode in [Mode::Warn, Mode::Audit] {
            let decision = decided(
                vec![
                    RuleSettings { mode, ..set("set", "true", &[("city", "'Paris'")]) },
                    RuleSettings { mode, ..block_when("true") },
                    RuleSettings { mode, outcome: RuleOutcome::Accept, ..block_when("1 == 1") },
                    RuleSettings {
                        mode,
                        on_error: OnError::Block { message: "m".into() },
                        ..block_when("signup.claims.town == ''")
                    },
                    set("seen", "signup.claims.city == 'London'", &[("seen", "true")]),
                ],
                &london(),
            );
            assert_eq!(changed(&decision), json!({ "seen": true }));
            let reasons: Vec<_> = decision.reasons.iter().map(|it| (it.effect, it.mode)).collect();
            let expected = [
                (Effect::Set, mode),
                (Effect::Block, mode),
                (Effect::Accept, mode),
                (Effect::FailedBlock, mode),
                (Effect::Set, Mode::Enforce),
            ];
            assert_eq!(reasons, expected);
        }
    }

    #[test]
    fn where_rules_take_too_long_together_nobody_gets_in() {
        let rules = vec![set("first", "true", &[("a", "1")]), block_when("false")];
        let decider = Decider::new(Rules::compile(rules).unwrap());
        let long_ago = Instant::now() - Duration::from_secs(1);
        let Decided { decision, places, .. } = decided_until(&decider, &london(), long_ago);
        // What is over is over: the grace counts from now.
        assert_eq!(decision.outcome.as_str(), "continue");
        assert_eq!(places.len(), 1);

        // Each takes a while, and all of them more than there is.
        let list = format!("{:?}", [1; 100]);
        let slow = format!("{list}.all(i, {list}.all(j, i * j < 1000))");
        let many = |n: usize| {
            let names = (0..n).map(|i| format!("r{i}"));
            names.map(|name| RuleSettings { name, ..set("", &slow, &[("a", "1")]) }).collect()
        };
        let decider = Decider::new(Rules::compile(many(40)).unwrap());
        let decided = decided_until(&decider, &london(), Instant::now());
        assert_eq!(decided.decision.outcome, Outcome::Block { message: TRY_AGAIN.to_owned() });
        let last = failures(&decided.decision).pop().unwrap();
        assert_eq!(last, Some(Failure::TooMuch.as_str()));
        assert!(*decided.places.last().unwrap() < 39, "it was given up in between");
    }

    #[test]
    fn a_rule_that_accepts_is_the_last_to_run() {
        let accept = RuleSettings { outcome: RuleOutcome::Accept, ..block_when("1 == 1") };
        let rules = vec![set("city", "true", &[("city", "'Paris'")]), accept, block_when("true")];
        let decision = decided(rules, &london());
        assert_eq!(effects(&decision), [("city", Effect::Set), ("1 == 1", Effect::Accept)]);
        assert_eq!(changed(&decision), json!({ "city": "Paris" }));
    }

    #[derive(Debug)]
    struct Stands(Option<Standing>);

    #[async_trait::async_trait]
    impl Approvals for Stands {
        async fn standing(&self, _: &Person, _: &ConnectorName) -> Option<Standing> {
            self.0
        }
    }

    fn asking(standing: Option<Standing>, reapply_after: Option<Duration>) -> Decider {
        let message = "message:wait".to_owned();
        let ask = RuleSettings {
            name: "ask".into(),
            outcome: RuleOutcome::RequireApproval { message },
            ..block_when("signup.step == 'before-create'")
        };
        let languages = [("en", "Please wait."), ("de", "Bitte warten.")]
            .map(|(tag, text)| (tag.to_owned(), [("wait".to_owned(), text.to_owned())].into()));
        let messages = Messages::new("en", &languages.into()).unwrap();
        let upper = set("upper", "true", &[("city", "'LONDON'")]);
        let rules = Rules::compile_with(vec![upper, ask], &Known::default(), &messages).unwrap();
        let approvals = ApprovalSettings {
            approvals: Arc::new(Stands(standing)),
            time_limit: Duration::from_secs(1),
            reapply_after,
            denied: Text::plain("Denied."),
        };
        Decider { approvals: Some(Arc::new(approvals)), ..Decider::new(rules) }
    }

    #[test]
    fn who_needs_an_approval_is_told_how_they_stand() {
        let ago = |duration| OffsetDateTime::now_utc() - duration;
        let hour = Duration::from_secs(3600);
        let denied = Some(Standing::Denied { at: ago(hour) });
        let german = SignUp { locale: Some("de-AT".into()), ..london() };
        // How they stand; when they may ask again; what that makes of both steps.
        for (standing, reapply_after, at_the_end, before_the_form) in [
            (Some(Standing::None), None, ("pending", Effect::RequireApproval), None),
            (None, None, ("pending", Effect::RequireApproval), None),
            (
                Some(Standing::Pending),
                None,
                ("pending", Effect::AlreadyPending),
                Some(("pending", Effect::AlreadyPending)),
            ),
            (Some(Standing::Approved), None, ("continue", Effect::Approved), None),
            (denied, None, ("block", Effect::Denied), Some(("block", Effect::Denied))),
            (denied, Some(2 * hour), ("block", Effect::Denied), Some(("block", Effect::Denied))),
            (denied, Some(hour / 2), ("pending", Effect::RequireApproval), None),
        ] {
            let decider = asking(standing, reapply_after);
            let ends = |decision: &Decision| {
                let last = decision.reasons.last().map(|it| it.effect);
                (decision.outcome.as_str(), last)
            };
            let end = decided_by(&decider, &german);
            assert_eq!(ends(&end.decision), (at_the_end.0, Some(at_the_end.1)), "{standing:?}");
            assert_eq!(end.standing_unknown, standing.is_none());
            if let Outcome::Pending { message, claims } = &end.decision.outcome {
                assert_eq!(message, "Bitte warten.");
                assert_eq!(claims["city"], "LONDON", "for the account that may be made");
            }
            let early = SignUp { step: Step::AfterFederation, ..german.clone() };
            let early = decided_by(&decider, &early).decision;
            match before_the_form {
                Some((outcome, effect)) => {
                    assert_eq!(ends(&early), (outcome, Some(effect)), "{standing:?}");
                    assert_eq!(early.reasons.len(), 1, "no rule ran before");
                }
                None => assert_eq!(ends(&early), ("continue", Some(Effect::Set)), "{standing:?}"),
            }
        }
    }

    #[test]
    fn a_rule_that_nothing_comes_to_is_found() {
        let accept = |when: &str| RuleSettings { outcome: RuleOutcome::Accept, ..block_when(when) };
        let at = |steps: &[Step], rule: RuleSettings| RuleSettings { steps: steps.into(), ..rule };
        let early = Step::AfterFederation;
        let late = Step::BeforeCreate;
        let unreachable = |rules| {
            let found = Rules::compile(rules).unwrap().unreachable();
            found.into_iter().map(|it| it.index).collect::<Vec<_>>()
        };
        let named = |name: &str, rule: RuleSettings| RuleSettings { name: name.into(), ..rule };
        let asks = "signup.claims.a == 1";
        assert!(unreachable(vec![block_when(asks), set("s", "true", &[("a", "1")])]).is_empty());
        assert_eq!(unreachable(vec![block_when("false")]), [0]);
        assert_eq!(unreachable(vec![accept("true"), block_when(asks)]), [1]);
        assert_eq!(unreachable(vec![at(&[early], accept("true")), block_when(asks)]), [0; 0]);
        let two = vec![
            at(&[early], accept("true")),
            at(&[late], accept("1 == 1")),
            at(&[early, late], block_when(asks)),
        ];
        assert_eq!(unreachable(two), [2]);
        assert_eq!(unreachable(vec![block_when(asks), named("again", block_when(asks))]), [1]);
        let audit = RuleSettings { mode: Mode::Audit, ..accept("true") };
        assert!(unreachable(vec![audit, block_when(asks)]).is_empty());
    }
}
