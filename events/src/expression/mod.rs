//! CEL over a sign-up: the language of every rule, whoever evaluates it.
//!
//! An expression is compiled once. Whatever would fail at each evaluation is complained of then,
//! with its place; afterwards a rule means the same to a connector and to a worker: the same
//! members, the same functions, the same failures. It sees `signup`, and the lists and lookups
//! that it may name. It costs what it looks at: nothing is copied for it, no pattern is compiled
//! twice; and whatever it says and looks at, it ends within bounds.
//! What follows from a condition, and from a [`Failure`], is left to the caller, and so is fetching
//! what a lookup has not answered yet.

mod bounded;
mod checker;
mod functions;
mod pattern;
#[cfg(test)]
mod reference;
mod sources;
mod syntax;
mod view;

use std::{
    fmt,
    sync::{Arc, LazyLock},
};

use cel::{Context, Env, ExecutionError};
use serde_json::Value;
use time::OffsetDateTime;

pub use self::sources::{Known, LookupState, Members, Sources};
use self::{bounded::within_budget, checker::Checked, functions::Kind, view::Scope};
use crate::{Claims, Email, Identity, Protocol, SignUp, SignUpEvent, Step};

/// The variable that holds the sign-up.
const SIGNUP: &str = "signup";

/// What `signup` has. What the platform did not send is absent, so that `has(signup.email)` asks
/// for it.
pub const MEMBERS: [&str; 12] = [
    "connector",
    "protocol",
    "step",
    "email",
    "email_domain",
    "identities",
    "claims",
    "client",
    "locale",
    "ip",
    "object_id",
    "correlation_id",
];

/// The functions that expressions may call: CEL's standard library, its extension for text, and
/// ours.
static ENV: LazyLock<Arc<Env>> = LazyLock::new(|| {
    let mut env = Env::stdlib();
    for extension in
        [cel::extensions::strings, pattern::extension, bounded::extension, functions::extension]
    {
        env.add_extension(extension).expect("nothing in it has the name of something else");
    }
    Arc::new(env)
});

/// An expression that is true or false.
#[derive(Debug)]
pub struct Condition(Compiled);

impl Condition {
    /// Compiles a condition that names nothing beside `signup`, or says everything that is wrong
    /// with it.
    pub fn compile(source: &str) -> Result<Self, Vec<Fault>> {
        Self::compile_with(source, &Known::default())
    }

    /// Compiles a condition that may name these lists and lookups, or says everything that is
    /// wrong with it.
    pub fn compile_with(source: &str, known: &Known) -> Result<Self, Vec<Fault>> {
        let condition = Self(Compiled::compile(source, known)?);
        let neither = |what: &str| {
            let message = format!("a condition is true or false, and this is {what}");
            Err(vec![Fault { message, line: 1, column: 1 }])
        };
        match condition.0.0.kind {
            Kind::Bool | Kind::Any => {}
            kind => return neither(kind.name()),
        }
        // What fails with the sample may well go through with another sign-up. But the types of
        // members are the same for all, and the sample has no claims, whose types are not.
        match condition.holds(&Facts::new(&sample(), &Claims::new())) {
            Err(Failure::Result) => neither("neither"),
            _ => Ok(condition),
        }
    }

    /// Whether it holds.
    pub fn holds(&self, facts: &Facts<'_>) -> Result<bool, Failure> {
        self.0.evaluate(facts, truth)
    }

    /// The lookups that it names, each once.
    #[must_use]
    pub fn lookups(&self) -> &[String] {
        self.0.lookups()
    }

    /// Whether it holds, where that is the same for every sign-up.
    #[must_use]
    pub fn constant(&self) -> Option<bool> {
        self.0.read(&Scope::empty(&self.0.0), truth).ok()
    }
}

fn truth(value: &cel::Value) -> Result<bool, Failure> {
    match value {
        cel::Value::Bool(holds) => Ok(*holds),
        _ => Err(Failure::Result),
    }
}

/// An expression with a plain value: what a claim is set to, or a lookup asked with.
#[derive(Debug)]
pub struct ClaimValue(Compiled);

impl ClaimValue {
    /// Compiles an expression that names nothing beside `signup`, or says everything that is wrong
    /// with it.
    pub fn compile(source: &str) -> Result<Self, Vec<Fault>> {
        Self::compile_with(source, &Known::default())
    }

    /// Compiles an expression that may name these lists and lookups, or says everything that is
    /// wrong with it.
    pub fn compile_with(source: &str, known: &Known) -> Result<Self, Vec<Fault>> {
        Compiled::compile(source, known).map(Self)
    }

    /// Text, a number, yes or no; null where the claim is to stay as it is.
    pub fn evaluate(&self, facts: &Facts<'_>) -> Result<Value, Failure> {
        self.0.evaluate(facts, claim)
    }

    /// The lookups that it names, each once.
    #[must_use]
    pub fn lookups(&self) -> &[String] {
        self.0.lookups()
    }
}

/// The value as a claim can have it. Platforms take no collections (contract 1.2).
fn claim(value: &cel::Value) -> Result<Value, Failure> {
    match value {
        cel::Value::String(text) => Ok(text.as_str().into()),
        cel::Value::Bool(yes) => Ok((*yes).into()),
        cel::Value::Int(number) => Ok((*number).into()),
        cel::Value::UInt(number) => Ok((*number).into()),
        cel::Value::Float(number) if number.is_finite() => Ok((*number).into()),
        cel::Value::Null => Ok(Value::Null),
        _ => Err(Failure::Result),
    }
}

/// What expressions see: a sign-up with the claims that changed since it came, lists and lookups,
/// and what time it is.
#[derive(Clone, Copy)]
pub struct Facts<'a> {
    sign_up: &'a SignUp,
    changed: Option<&'a Claims>,
    sources: Option<&'a dyn Sources>,
    now: OffsetDateTime,
}

impl<'a> Facts<'a> {
    /// The sign-up while it is decided, now, with what earlier rules changed.
    #[must_use]
    pub fn new(sign_up: &'a SignUp, changed: &'a Claims) -> Self {
        Self::as_of(OffsetDateTime::now_utc(), sign_up, changed)
    }

    /// The same where the time is known: to read the clock takes as long as a simple rule.
    #[must_use]
    pub const fn as_of(now: OffsetDateTime, sign_up: &'a SignUp, changed: &'a Claims) -> Self {
        Self { sign_up, changed: Some(changed), sources: None, now }
    }

    /// The sign-up of an event, with the claims in force after the decision, and at its time: asked
    /// about an event again, an expression says the same again.
    #[must_use]
    pub fn of(event: &'a SignUpEvent) -> Self {
        let changed = event.decision.outcome.changed_claims();
        Self { sign_up: &event.sign_up, changed, sources: None, now: event.time }
    }

    /// The same, with lists and lookups.
    #[must_use]
    pub fn with_sources(self, sources: &'a dyn Sources) -> Self {
        Self { sources: Some(sources), ..self }
    }

    /// The same at another time: in tests, and to decide a past sign-up as it would have been.
    #[must_use]
    pub fn at(self, now: OffsetDateTime) -> Self {
        Self { now, ..self }
    }
}

/// Leaves the claims out: they are personal data.
impl fmt::Debug for Facts<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Facts").field(self.sign_up).finish()
    }
}

/// What is wrong with an expression, and where in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    pub message: String,
    /// From 1, as `column`; both 1 where the whole of it is meant.
    pub line: usize,
    pub column: usize,
}

/// Why an expression gave no usable value. Holds nothing of what it looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// A member that is not there, for which the expression does not ask with `has()`.
    Missing,
    /// A value is not of the type that an operator or function needs.
    Type,
    /// A condition is neither true nor false, or a claim neither text, number nor yes or no.
    Result,
    /// A lookup that was not asked yet or gave no answer, or a list that is not there. Who
    /// evaluates knows which: his [`Sources`] were asked.
    Lookup,
    /// More work than a decision may take.
    TooMuch,
    /// An overflow, a division by zero, a bad pattern, a text of which a function can make nothing.
    Other,
}

impl Failure {
    /// A short name for logs and metrics.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Missing => "missing member",
            Self::Type => "unexpected type",
            Self::Result => "unusable result",
            Self::Lookup => "no answer of a lookup",
            Self::TooMuch => "too much work",
            Self::Other => "evaluation error",
        }
    }
}

impl From<ExecutionError> for Failure {
    /// The library's own words quote the values, so they are dropped.
    fn from(error: ExecutionError) -> Self {
        match error {
            ExecutionError::NoSuchKey(_) | ExecutionError::IndexOutOfBounds(_) => Self::Missing,
            ExecutionError::NoSuchOverload(_)
            | ExecutionError::UnexpectedType { .. }
            | ExecutionError::UnsupportedTargetType { .. }
            | ExecutionError::ValuesNotComparable(..)
            | ExecutionError::UnsupportedBinaryOperator(..) => Self::Type,
            _ => Self::Other,
        }
    }
}

/// An expression without the faults that can be found beforehand.
struct Compiled(Checked);

impl Compiled {
    fn compile(source: &str, known: &Known) -> Result<Self, Vec<Fault>> {
        syntax::read(source, known).map(Self)
    }

    fn lookups(&self) -> &[String] {
        &self.0.lookups
    }

    fn evaluate<T>(
        &self,
        facts: &Facts<'_>,
        read: impl FnOnce(&cel::Value) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        self.read(&Scope::new(facts, &self.0), read)
    }

    fn read<T>(
        &self,
        scope: &Scope<'_>,
        read: impl FnOnce(&cel::Value) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        let mut context = Context::with_env(Arc::clone(&ENV));
        context.set_variable_resolver(scope);
        // Not `resolve_val`, which would be compiled once more, as deep as this crate is optimised.
        let (value, used_up) = within_budget(|| cel::Value::resolve(&self.0.expression, &context));
        match value {
            _ if used_up => Err(Failure::TooMuch),
            Ok(value) => read(&value),
            // Whatever else is wrong, it may not be once the answer is there.
            Err(_) if scope.was_wanting() => Err(Failure::Lookup),
            Err(error) => Err(error.into()),
        }
    }
}

impl fmt::Debug for Compiled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Compiled").field("lookups", &self.0.lookups).finish_non_exhaustive()
    }
}

/// Nobody's sign-up: with every member and no claims, to try things on before the first real one
/// comes.
#[must_use]
pub fn sample() -> SignUp {
    const ID: &str = "00000000-0000-0000-0000-000000000000";
    SignUp {
        connector: "sample".parse().expect("is a name"),
        protocol: Protocol::ApiConnector,
        step: Step::BeforeCreate,
        email: Some(Email::new("sample@example.com")),
        identities: vec![Identity {
            sign_in_type: "federated".into(),
            issuer: "example.com".into(),
            issuer_assigned_id: "0".into(),
        }],
        claims: Claims::new(),
        client: Some(ID.into()),
        locale: Some("en-US".into()),
        ip: Some("192.0.2.1".into()),
        object_id: Some(ID.into()),
        correlation_id: Some(ID.into()),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Map, json};

    use super::*;
    use crate::{Decision, Outcome, PseudonymKey};

    fn sign_up(claims: &Value) -> SignUp {
        SignUp {
            connector: "partners".parse().unwrap(),
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
            ..sample()
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

    fn holds(condition: &str, sign_up: &SignUp) -> Result<bool, Failure> {
        Condition::compile(condition).unwrap().holds(&Facts::new(sign_up, &Claims::new()))
    }

    fn value(expression: &str, sign_up: &SignUp) -> Result<Value, Failure> {
        ClaimValue::compile(expression).unwrap().evaluate(&Facts::new(sign_up, &Claims::new()))
    }

    #[test]
    fn every_part_of_the_sign_up_can_be_seen() {
        for condition in [
            "signup.connector == 'partners'",
            "signup.protocol == 'api-connector'",
            "signup.step == 'before-create'",
            "signup.email == 'Ada@Example.COM'",
            "signup.email_domain == 'example.com'",
            "signup.email_domain in ['example.com', 'example.org']",
            "signup.client == 'app'",
            "!has(signup.ip)",
            "!has(signup.locale) && !has(signup.object_id) && !has(signup.correlation_id)",
            "signup.identities[0].issuer == 'google.com'",
            "signup.identities.exists(i, i.issuer.startsWith('google') && i.signInType != 'x')",
            "signup.identities[0].issuerAssignedId == '1'",
            "size(signup.identities) == 1",
            "signup.claims.city == 'London'",
            "signup.claims['city'] == 'London'",
            "has(signup.claims.city) && !has(signup.claims.town)",
            "'city' in signup.claims && !('town' in signup.claims)",
            "'claims' in signup && 'email' in signup && !('locale' in signup)",
            "signup.claims.city.lowerAscii() == 'london'",
            "' a,b '.trim().split(',').join('/') == 'a/b' && 'abc'.substring(1) == 'bc'",
            "signup.claims.city.matches('^Lon') && signup.claims.city.contains('nd')",
            "signup.claims.age == 36 && signup.claims.age > 35.5",
            "signup.claims.big == 18446744073709551615u",
            "signup.claims.half * 2.0 == 1.0",
            "signup.claims.vip",
            "signup.claims.nothing == null && has(signup.claims.nothing)",
            "signup.claims.tags == ['a', 'b'] && 'a' in signup.claims.tags",
            "signup.claims.home.street.startsWith('1 ') && signup.claims.home.rooms[1] == 2",
            "size(signup.claims) == 8",
            "signup.claims.exists(name, name == 'vip')",
            "signup.claims.all(name, name != 'town')",
            "size(signup.claims.filter(name, name.startsWith('h'))) == 2",
            "type(signup.claims.city) == string && type(signup.claims) == map",
            "signup.claims.?town.orValue('x') == 'x'",
            "size(signup.claims.map(name, signup.claims[name])) == 8",
        ] {
            assert_eq!(holds(condition, &london()), Ok(true), "{condition}");
        }
    }

    #[test]
    fn a_loop_within_a_loop_walks_only_what_the_rule_itself_says() {
        let refused = "signup.claims.tags.all(x, signup.claims.tags.all(y, x == y))";
        let faults = Condition::compile(refused).unwrap_err();
        assert!(faults[0].message.starts_with("a loop within a loop"), "{faults:?}");
        for fine in [
            "signup.identities.exists(i, ['google', 'mail'].exists(x, i.issuer.startsWith(x)))",
            "size(signup.claims.tags.filter(x, x != 'b').map(x, x + x)) == 1",
        ] {
            assert_eq!(holds(fine, &london()), Ok(true), "{fine}");
        }
    }

    /// A list `partners` and the lookups `crm`, answered, `slow`, not asked yet, and `broken`.
    struct TestSources(Map<String, Value>);

    struct Partners;

    impl Members for Partners {
        fn contains(&self, entry: &str) -> bool {
            ["example.com", "36", "true"].contains(&entry)
        }
    }

    impl Sources for TestSources {
        fn list(&self, name: &str) -> Option<&dyn Members> {
            (name == "partners").then_some(&Partners)
        }

        fn lookup(&self, name: &str) -> LookupState<'_> {
            match name {
                "crm" => LookupState::Is(&self.0),
                "slow" => LookupState::NotYet,
                "broken" => LookupState::Failed,
                _ => panic!("nobody should ask for {name}"),
            }
        }
    }

    fn known() -> Known {
        let names = |names: &[&str]| names.iter().copied().map(str::to_owned).collect();
        Known {
            lists: names(&["partners", "gone", "with-hyphen"]),
            lookups: names(&["crm", "slow", "broken"]),
        }
    }

    fn crm() -> TestSources {
        let answer = json!({ "found": true, "tier": "gold", "seats": 5, "tags": ["a", "b"] });
        TestSources(answer.as_object().unwrap().clone())
    }

    fn holds_with_sources(condition: &str, sign_up: &SignUp) -> Result<bool, Failure> {
        let (sources, changed) = (crm(), Claims::new());
        let facts = Facts::new(sign_up, &changed).with_sources(&sources);
        let condition = Condition::compile_with(condition, &known());
        condition.unwrap_or_else(|faults| panic!("{faults:?}")).holds(&facts)
    }

    #[test]
    fn lists_and_lookups_can_be_asked() {
        for condition in [
            "signup.email_domain in lists.partners",
            "lists.partners.contains(signup.email_domain)",
            "signup.email_domain in lists['partners']",
            "!(signup.claims.city in lists.partners)",
            "signup.claims.age in lists.partners && signup.claims.vip in lists.partners",
            "['x', 'example.com'].exists(it, it in lists.partners)",
            "lookups.crm.found && lookups.crm.tier == 'gold'",
            "lookups['crm'].tier == 'gold' && lookups.crm['tier'] == 'gold'",
            "has(lookups.crm.tier) && !has(lookups.crm.name)",
            "'tier' in lookups.crm && size(lookups.crm) == 4",
            "lookups.crm.tags.exists(tag, tag == 'b')",
            "lookups.crm.?tier.orValue('none') == 'gold'",
            "lookups.crm.?name.orValue('none') == 'none'",
            "lookups.crm.seats in [4, 5]",
            "[1].exists(lists, lists == 1) && [1].exists(lookups, lookups == 1)",
            "true || lookups.slow.found",
            "lookups.broken.found || signup.claims.vip",
            "!(signup.claims.city == 'Paris' && lookups.slow.found)",
        ] {
            assert_eq!(holds_with_sources(condition, &london()), Ok(true), "{condition}");
        }
    }

    #[test]
    fn an_answer_that_is_not_there_is_told_from_one_that_says_no() {
        for condition in [
            "lookups.slow.found",
            "lookups.broken.found",
            "has(lookups.slow.found)",
            "lookups.slow.?found.orValue(false)",
            "lookups.slow[?'found'].orValue(false)",
            "size(lookups.slow) == 0",
            "'found' in lookups.slow",
            "lookups.slow == {}",
            "signup.claims.vip && lookups.slow.found",
            "lookups.crm.missing || lookups.slow.found",
            "lookups.slow.found || lookups.crm.missing",
            "signup.email_domain in lists.gone",
        ] {
            assert_eq!(
                holds_with_sources(condition, &london()),
                Err(Failure::Lookup),
                "{condition}"
            );
        }
        let nothing = Condition::compile_with("'x' in lists.partners", &known()).unwrap();
        let (sign_up, changed) = (london(), Claims::new());
        assert_eq!(nothing.holds(&Facts::new(&sign_up, &changed)), Err(Failure::Lookup));
    }

    #[test]
    fn a_list_takes_text_numbers_and_yes_or_no() {
        for condition in [
            "signup.claims.half in lists.partners",
            "signup.claims.tags in lists.partners",
            "null in lists.partners",
        ] {
            assert_eq!(holds_with_sources(condition, &london()), Err(Failure::Type), "{condition}");
        }
    }

    #[test]
    fn what_lists_and_lookups_cannot_do_is_found_before_the_first_evaluation() {
        for (condition, message) in [
            ("'x' in lists.partner", "there is no list `partner`; did you mean `partners`?"),
            ("'x' in lists.nothing_like_it", "there is no list `nothing_like_it`"),
            ("lookups.cmr.found", "there is no lookup `cmr`; did you mean `crm`?"),
            ("lookup.crm.found", "there is no `lookup`; did you mean `lookups`?"),
            ("size(lists.partners) > 1", "a list can only be asked with `in`"),
            ("lists.partners.exists(x, x == 'a')", "a list can only be asked with `in`"),
            ("lists.partners == ['a']", "a list can only be asked with `in`"),
            ("'x' in lists", "`lists` needs the name of one"),
            ("lookups == {}", "`lookups` needs the name of one"),
            ("lookups[signup.email].found", "`lookups` needs the name of one"),
            ("has(lookups.crm)", "`lookups.crm` is always there"),
            ("has(lists.partners)", "`lists.partners` is always there"),
        ] {
            let faults = Condition::compile_with(condition, &known()).unwrap_err();
            assert!(faults[0].message.starts_with(message), "{condition}: {faults:?}");
        }
        assert!(Condition::compile("'x' in lists.partners").is_err(), "workers have no lists");
    }

    #[test]
    fn an_expression_says_which_lookups_it_names() {
        let condition = "lookups.slow.found || lookups.crm.found && lookups['slow'].x == 1";
        let condition = Condition::compile_with(condition, &known()).unwrap();
        assert_eq!(condition.lookups(), ["slow", "crm"]);
        let value = ClaimValue::compile_with("lookups.crm.tier", &known()).unwrap();
        assert_eq!(value.lookups(), ["crm"]);
        let (sources, sign_up, changed) = (crm(), london(), Claims::new());
        let facts = Facts::new(&sign_up, &changed).with_sources(&sources);
        assert_eq!(value.evaluate(&facts), Ok(json!("gold")));
    }

    #[test]
    fn a_condition_says_whether_it_holds_for_all() {
        for (condition, constant) in [
            ("true", Some(true)),
            ("1 > 2", Some(false)),
            ("true || signup.claims.vip", Some(true)),
            ("lookups.crm.found && false", Some(false)),
            ("[1, 2].exists(x, x == 2)", Some(true)),
            ("'a'.matches('^a$')", Some(true)),
            ("signup.claims.vip", None),
            ("has(signup.email)", None),
            ("signup.claims.?vip.orValue(true)", None),
            ("'x' in lists.partners", None),
            ("has(lookups.crm.tier)", None),
            ("1 / 0 == 1", None),
        ] {
            let compiled = Condition::compile_with(condition, &known()).unwrap();
            assert_eq!(compiled.constant(), constant, "{condition}");
        }
    }

    #[test]
    fn what_cannot_fit_is_found_before_the_first_evaluation() {
        for (condition, message) in [
            ("signup.email == 5", "text on the left of `==` never equals a number"),
            ("signup.identities != 'x'", "a list on the left of `!=` never equals text"),
            ("signup.email > 5", "`>` cannot compare text with a number"),
            ("signup.email + 5 == 'x'", "`+` cannot add text and a number"),
            ("signup.email * 2 == 4", "`*` needs numbers, and has text"),
            ("!signup.email", "`!` needs true or false, and has text"),
            ("signup.email && true", "`&&` needs true or false, and has text"),
            ("signup.email.length == 5", "text has no `length`"),
            ("signup.email[0] == 'a'", "`[…]` needs a list or a map, and has text"),
            ("'a' in signup.email", "`in` needs a list on its right, and has text"),
            ("signup.email.exists(x, x == 'a')", "a loop needs a list or a map, and this is text"),
            ("title_case(5) == 'x'", "`title_case` needs text, and has a number"),
            ("title_case() == 'x'", "`title_case` takes 1 values in its brackets, and has 0"),
            ("signup.email.split(',', 1, 2) == []", "`split` takes 1 or 2 values in its brackets"),
            ("signup.email.ip_in('10.0.0.0/8')", "`ip_in` is called as `ip_in(x)`"),
            ("trim(signup.email) == 'x'", "`trim` is called as `x.trim()`"),
            (
                "titel_case('x') == 'x'",
                "there is no function `titel_case`; did you mean `title_case`",
            ),
            ("ip_in(signup.ip, '10.0.0.0/33')", "`10.0.0.0/33` is no address and no network"),
            ("ip_in(signup.ip, ['10.0.0.0/8', 'x'])", "`x` is no address and no network"),
            ("phone('1', 'UK') == ''", "`UK` is no country code"),
            ("in_domain(signup.email, '@x')", "`@x` is no domain"),
            ("date('1.2.2003') < today()", "`1.2.2003` is no date"),
            ("years_since(5) > 18", "`years_since` needs a date, and has a number"),
            ("days_until(5) > 18", "`days_until` needs a date, and has a number"),
            ("today() == '2001-01-01'", "a date on the left of `==` never equals text"),
            ("today() + 1 > today()", "`+` cannot add a date and a number"),
            ("signup.locale.orValue('x') == 'x'", "`orValue` needs an optional value"),
            ("signup.emial == ''", "`signup` has no `emial`; did you mean `email`?"),
            ("Point{x: 1} == 1", "there is no type `Point`"),
            ("signup.email", "a condition is true or false, and this is text"),
            ("years_since('2001-01-01')", "a condition is true or false, and this is a number"),
        ] {
            let faults = Condition::compile(condition).unwrap_err();
            assert!(faults[0].message.starts_with(message), "{condition}: {faults:?}");
        }
    }

    #[test]
    fn functions_can_be_called() {
        let sign_up = SignUp { ip: Some("10.1.2.3".into()), ..london() };
        for condition in [
            "signup.email.email_local() == 'Ada' && email_domain(signup.email) == 'example.com'",
            "is_email(signup.email) && !is_email(signup.claims.city)",
            "in_domain(signup.email, 'example.com') && signup.email.in_domain(['x.test', 'example.com'])",
            "title_case('ada LOVELACE') == 'Ada Lovelace' && 'o\\'brien'.title_case() == 'O\\'Brien'",
            "collapse_spaces('  a   b ') == 'a b'",
            "phone('020 7946 0018', 'GB') == '+442079460018' && !is_phone('12', 'GB')",
            "country_code('Germany') == 'DE' && country_name('de') == 'Germany'",
            "ip_in(signup.ip, '10.0.0.0/8') && !ip_in(signup.ip, ['192.0.2.0/24', '2001:db8::/32'])",
            "years_since('2008-11-22') == 18 && years_since('2008-11-23') == 17",
            "today() == date('2026-11-22') && now() > today() && string(today()) == '2026-11-22'",
            "days_since('2026-11-20') == 2 && days_until('2026-12-01') == 9",
            "add_days(today(), -2) == date('2026-11-20') && add_days('2026-11-22', 1) > today()",
            "years_between('2000-01-01', today()) == 26 && days_between(today(), '2026-11-23') == 1",
            "timestamp('2026-11-22T09:00:00Z') < now() && type(now()) == date",
            "'a,b'.split(',').map(x, x + x).join('-') == 'aa-bb' && 'abcabc'.replace('b', '').size() == 4",
            "'abcabc'.indexOf('c', 3) == 5 && 'abcabc'.lastIndexOf('c') == 5 && 'ä'.indexOf('x') == -1",
            "'abc'.split('') == ['a', 'b', 'c'] && 'a,b,c'.split(',', 2) == ['a', 'b,c']",
            "'a,b'.split(',', 0) == [] && ''.split(',') == [''] && ''.split('') == []",
            "'abab'.replace('a', 'x', 1) == 'xbab' && 'ab'.replace('', '-') == '-a-b-'",
            "'%s has %d'.format(['it', 5]) == 'it has 5'",
            "[1] + [2] == [1, 2] && b'a' + b'b' == b'ab' && 1.5 + 1.5 == 3.0",
        ] {
            let changed = Claims::new();
            let facts =
                Facts::new(&sign_up, &changed).at(time::macros::datetime!(2026-11-22 10:00 UTC));
            let compiled = Condition::compile(condition);
            let compiled = compiled.unwrap_or_else(|faults| panic!("{condition}: {faults:?}"));
            assert_eq!(compiled.holds(&facts), Ok(true), "{condition}");
        }
        for (value_of, expected) in [
            ("date('2001-02-03')", json!("2001-02-03")),
            ("timestamp('2001-02-03T04:05:06+01:00')", json!("2001-02-03T03:05:06Z")),
            ("title_case(signup.claims.city)", json!("London")),
        ] {
            assert_eq!(value(value_of, &london()), Ok(expected), "{value_of}");
        }
        for fails in
            ["phone(signup.claims.city, 'GB')", "date(signup.claims.city)", "email_domain('x')"]
        {
            assert_eq!(value(fails, &london()), Err(Failure::Other), "{fails}");
        }
    }

    #[test]
    fn an_absent_address_is_absent() {
        let nobody = SignUp { email: None, identities: vec![], ..london() };
        let condition =
            "!has(signup.email) && !has(signup.email_domain) && size(signup.identities) == 0";
        assert_eq!(holds(condition, &nobody), Ok(true));
    }

    #[test]
    fn the_sample_has_every_member_and_no_claims() {
        for member in MEMBERS {
            assert_eq!(holds(&format!("has(signup.{member})"), &sample()), Ok(true), "{member}");
        }
        assert_eq!(holds("size(signup.claims) == 0", &sample()), Ok(true));
    }

    #[test]
    fn of_an_event_the_claims_in_force_are_seen() {
        let key = PseudonymKey::new(vec![7; 32]);
        let sign_up = sign_up(&json!({ "city": "London", "age": 36 }));
        let person = key.person(&sign_up);
        let fingerprint = key.fingerprint(&sign_up, &person);
        let claims = json!({ "city": "LONDON", "added": true }).as_object().unwrap().clone();
        let decision = Decision::new(Outcome::Continue { claims });
        let time = time::macros::datetime!(2026-11-22 10:00 UTC);
        let id = uuid::Uuid::nil();
        let mut event =
            SignUpEvent::decided(id, time, person, fingerprint, sign_up, decision).unwrap();

        let condition = Condition::compile(
            "signup.claims.city == 'LONDON' && signup.claims.added && signup.claims.age == 36
             && size(signup.claims) == 3",
        );
        assert_eq!(condition.unwrap().holds(&Facts::of(&event)), Ok(true));

        event.decision.outcome = Outcome::Block { message: "no".into() };
        let condition = Condition::compile("signup.claims.city == 'London'").unwrap();
        assert_eq!(condition.holds(&Facts::of(&event)), Ok(true));
    }

    #[test]
    fn a_failure_says_of_which_kind_it_is() {
        for (condition, failure) in [
            ("signup.claims.town == 'x'", Failure::Missing),
            ("signup.claims.home.garden.size == 1", Failure::Missing),
            ("signup.locale == 'x'", Failure::Missing),
            ("signup.identities[7].issuer == 'x'", Failure::Missing),
            ("signup.claims.tags.startsWith('x')", Failure::Type),
            ("signup.claims.city > 5", Failure::Type),
            ("signup.claims.city + 5 == 'x'", Failure::Type),
            ("signup.claims[5] == 'x'", Failure::Type),
            ("signup.claims.age.matches('3')", Failure::Type),
            ("signup.claims.city", Failure::Result),
            ("signup.claims.home", Failure::Result),
            ("5 / (signup.claims.age - 36) == 1", Failure::Other),
            ("9223372036854775807 + signup.claims.age > 0", Failure::Other),
            ("signup.claims.city.matches(signup.claims.city + '(')", Failure::Other),
        ] {
            assert_eq!(holds(condition, &london()), Err(failure), "{condition}");
        }
    }

    #[test]
    fn a_claim_is_text_a_number_or_yes_or_no() {
        for (expression, expected) in [
            ("signup.claims.city + '!'", json!("London!")),
            ("signup.claims.age + 1", json!(37)),
            ("signup.claims.big", json!(u64::MAX)),
            ("signup.claims.half", json!(0.5)),
            ("!signup.claims.vip", json!(false)),
            ("signup.claims.nothing", Value::Null),
        ] {
            assert_eq!(value(expression, &london()), Ok(expected), "{expression}");
        }
        for unusable in
            ["[1]", "{'a': 1}", "signup", "signup.claims", "signup.identities", "1.0 / 0.0", "b'x'"]
        {
            assert_eq!(value(unusable, &london()), Err(Failure::Result), "{unusable}");
        }
    }

    #[test]
    fn what_cannot_work_is_found_before_the_first_evaluation() {
        for (condition, message, line, column) in [
            ("signup.claims.city ==", "", 1, 22),
            ("", "", 1, 1),
            ("sign_up.email == ''", "there is no `sign_up`", 1, 1),
            ("true ||\n  sighnup.email == ''", "there is no `sighnup`", 2, 3),
            ("'Ærø' == signup.mail", "`signup` has no `mail`", 1, 16),
            ("signup.mail == ''", "`signup` has no `mail`", 1, 7),
            ("has(signup.mail)", "`signup` has no `mail`", 1, 4),
            ("signup.email.beginsWith('x')", "there is no function `beginsWith`", 1, 24),
            ("lenght(signup.email) > 1", "there is no function `lenght`", 1, 7),
            ("signup.email.matches('(')", "`(` is no pattern: unclosed group", 1, 22),
            ("[1].exists(x, matches('', '+'))", "`+` is no pattern", 1, 27),
            ("[1].exists(x, x == 1) && x == 1", "there is no `x`", 1, 26),
        ] {
            let faults = Condition::compile(condition).unwrap_err();
            let Fault { message: found, .. } = &faults[0];
            assert!(found.starts_with(message), "{condition}: {found}");
            assert_eq!((faults[0].line, faults[0].column), (line, column), "{condition}: {found}");
        }
        let all = Condition::compile("signup.a == b && c(signup.email.matches('['))").unwrap_err();
        assert_eq!(all.len(), 4, "{all:?}");
    }

    #[test]
    fn a_condition_that_is_always_something_else_is_refused() {
        for condition in [
            "signup",
            "signup.email",
            "signup.claims",
            "size(signup.claims)",
            "'x'",
            "null",
            "[true]",
            "has(signup.claims.vip) ? signup.claims.vip : 'no'",
        ] {
            let faults = Condition::compile(condition).unwrap_err();
            assert!(faults[0].message.starts_with("a condition is"), "{condition}: {faults:?}");
            assert!(ClaimValue::compile(condition).is_ok(), "{condition}");
        }
        assert!(Condition::compile("signup.claims.vip").is_ok(), "it may well be");
    }

    #[test]
    fn names_within_a_comprehension_are_no_complaint() {
        for condition in [
            "[1, 2].exists(signup, signup == 1)",
            "signup.identities.map(i, i.issuer).exists(x, x == 'google.com')",
            "optional.of(1).hasValue()",
            "[1].all(x, [x].all(y, y == x))",
            "[{'email': 'x'}].all(signup, signup.email == 'x')",
            "[{'claims': {'city': 'x'}}].all(signup, signup.claims.city == 'x')",
            "dyn(1) == 1 && type(1) == int",
        ] {
            assert_eq!(holds(condition, &london()), Ok(true), "{condition}");
        }
    }

    #[test]
    fn a_dot_selects_and_is_no_part_of_a_name() {
        let sign_up = sign_up(&json!({ "a.b": 1, "a": { "b": 2, "b.c": 3 }, "c.d": 4 }));
        for condition in [
            "signup.claims.a.b == 2 && signup.claims['a.b'] == 1",
            "signup.claims.a['b.c'] == 3 && !has(signup.claims.c)",
        ] {
            assert_eq!(holds(condition, &sign_up), Ok(true), "{condition}");
        }
        assert_eq!(holds("signup.claims.c.d == 4", &sign_up), Err(Failure::Missing));
    }

    #[test]
    fn a_pattern_may_be_written_or_come_from_a_claim() {
        let sign_up = sign_up(&json!({ "city": "London", "pattern": "^L.*n$" }));
        for (condition, expected) in [
            ("signup.claims.city.matches('^L.*n$')", true),
            ("matches(signup.claims.city, '^l')", false),
            ("signup.claims.city.matches(signup.claims.pattern)", true),
            ("matches(signup.claims.city, signup.claims.pattern)", true),
            ("['x', 'o'].all(it, signup.claims.city.matches('Lon') && it.matches('^[ox]$'))", true),
            ("['x', 'o'].exists(it, signup.claims.city.matches(it + 'ndon'))", true),
            ("'a'.matches('a') && 'b'.matches('b') && !'a'.matches('b')", true),
            ("'@pattern a'.matches('@pattern a') && !'a'.matches('@pattern a')", true),
        ] {
            assert_eq!(holds(condition, &sign_up), Ok(expected), "{condition}");
        }
    }

    #[test]
    fn a_pattern_that_would_take_too_much_memory_is_refused() {
        let huge = r"(\pL{1,100}){100}";
        let faults = Condition::compile(&format!("signup.email.matches(r'{huge}')")).unwrap_err();
        assert!(faults[0].message.contains("size limit"), "{faults:?}");
        let sign_up = sign_up(&json!({ "pattern": huge }));
        assert_eq!(
            holds("signup.email.matches(signup.claims.pattern)", &sign_up),
            Err(Failure::Other)
        );
    }

    #[test]
    fn facts_print_nothing_personal() {
        let (sign_up, changed) = (london(), london().claims);
        let debug = format!("{:?}", Facts::new(&sign_up, &changed));
        assert!(!debug.contains("London") && !debug.contains("Ada"), "{debug}");
    }

    proptest! {
        /// A written pattern takes a way of its own; nobody should see a difference.
        #[test]
        fn a_written_pattern_means_what_the_same_claim_means(
            text in "[a-c. ]{0,6}",
            pattern in "\\^?[a-c.?*+|()\\[\\] -]{0,6}\\$?",
        ) {
            let sign_up = sign_up(&json!({ "text": text, "pattern": pattern }));
            let from_claim = holds("signup.claims.text.matches(signup.claims.pattern)", &sign_up);
            let written = format!("signup.claims.text.matches(r'{pattern}')");
            match Condition::compile(&written) {
                Ok(condition) => prop_assert_eq!(
                    condition.holds(&Facts::new(&sign_up, &Claims::new())),
                    from_claim
                ),
                Err(_) => prop_assert_eq!(from_claim, Err(Failure::Other)),
            }
        }
    }
}
