//! Random rules decide about random people, and every decision comes, soon and the same twice.
//!
//! The rules are grown from the language's own members, functions, lists and lookups, and most of
//! what grows is sound enough to compile. The claims hold as much as a call may send. The search
//! goes on for some seconds; what it finds belongs into a test of its own.

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
    time::{Duration, Instant},
};

use proptest::{
    prelude::*, sample::select, strategy::ValueTree as _, string::string_regex,
    test_runner::TestRunner,
};
use rand::rngs::ThreadRng;
use serde_json::{Map, Value, json};
use vestibule_api::{
    Decider, List, ListSettings, ListSource, LookupWithArguments, Messages, OnError, Question,
    ReferenceData, RuleOutcome, RuleSettings, Rules, StandIn,
};
use vestibule_events::{
    Decision, Effect, Email, Identity, Mode, Outcome, Protocol, PseudonymKey, SignUp, Step,
};

use crate::dialects::any_value;

const SEARCH: Duration = Duration::from_secs(6);
const CASES_MIN: usize = 40;
const CASES_MAX: usize = 100_000;

/// How deep expressions are nested at most.
const DEPTH: u32 = 3;

/// A rule is stopped after some tens of milliseconds in an optimised build. This one is not, and
/// shares the machine.
const RULE_MAX: Duration = Duration::from_secs(4);

const CLAIM_BYTES_MAX: usize = 64 * 1024;

/// Ways to write a value of one kind: as it is, or made of others. `#T` stands for any text, `#N` for
/// a number, `#B` for yes or no, `#L` for a list and `#D` for a date; `x` is what a loop is at.
struct Ways {
    plain: &'static [&'static str],
    made: &'static [&'static str],
}

const TEXT: Ways = Ways {
    plain: &[
        "signup.email",
        "signup.email_domain",
        "signup.claims.a",
        "signup.claims.b",
        "signup.claims['c']",
        "signup.claims.?nobody.orValue('x')",
        "signup.claims.home.street",
        "signup.locale",
        "signup.ip",
        "signup.step",
        "signup.identities[0].issuer",
        "lookups.crm.tier",
        "lookups.down.name",
        "''",
        "'a'",
        "'Ünï ß'",
        "'020 7946 0018'",
        "'Germany'",
        "'2001-02-03'",
        "'10.0.0.0/8'",
        "'ada@example.com'",
        "'%s %d'",
        "'(a|aa)+$'",
    ],
    made: &[
        "#T + #T",
        "title_case(#T)",
        "collapse_spaces(#T)",
        "email_local(#T)",
        "email_domain(#T)",
        "email_canonical(#T)",
        "phone(#T, 'GB')",
        "country_code(#T)",
        "country_name(#T)",
        "#T.lowerAscii()",
        "#T.upperAscii()",
        "#T.trim()",
        "#T.reverse()",
        "#T.replace(#T, #T)",
        "#T.replace(#T, #T, #N)",
        "#T.substring(#N)",
        "#T.substring(#N, #N)",
        "#T.charAt(#N)",
        "string(#N)",
        "string(#D)",
        "#L.join(#T)",
        "#T.format([#T, #N])",
        "(#B ? #T : #T)",
        "string(#L[#N])",
    ],
};

const NUMBER: Ways = Ways {
    plain: &[
        "0",
        "1",
        "-1",
        "7",
        "1000000",
        "9223372036854775807",
        "0.5",
        "1e308",
        "signup.claims.n",
        "lookups.crm.seats",
    ],
    made: &[
        "(#N + #N)",
        "(#N - #N)",
        "(#N * #N)",
        "(#N / #N)",
        "(#N % #N)",
        "size(#T)",
        "size(#L)",
        "int(#T)",
        "double(#T)",
        "#T.indexOf(#T)",
        "#T.indexOf(#T, #N)",
        "#T.lastIndexOf(#T)",
        "years_since(#T)",
        "days_since(#D)",
        "days_until(#D)",
        "days_between(#D, #T)",
        "(#B ? #N : #N)",
    ],
};

const TRUTH: Ways = Ways {
    plain: &[
        "true",
        "false",
        "signup.claims.yes",
        "has(signup.claims.a)",
        "has(signup.email)",
        "'b' in signup.claims",
        "has(lookups.crm.tier)",
        "lookups.crm.found",
        "lookups.down.found",
    ],
    made: &[
        "(#B && #B)",
        "(#B || #B)",
        "!(#B)",
        "(#B ? #B : #B)",
        "#T == #T",
        "#T != #T",
        "#N < #N",
        "#N >= #N",
        "#D < #D",
        "#L == #L",
        "#T.startsWith(#T)",
        "#T.endsWith(#T)",
        "#T.contains(#T)",
        "#T.matches('^[a-z]+$')",
        "#T.matches(r'(\\w{1,3}\\s?){1,3}$')",
        "#T.matches(#T)",
        "#T in lists.partners",
        "lists.partners.contains(#T)",
        "#N in lists.partners",
        "#T in #L",
        "is_email(#T)",
        "is_phone(#T, 'DE')",
        "in_domain(#T, #T)",
        "in_domain(#T, ['example.com', 'example.org'])",
        "ip_in(#T, '10.0.0.0/8')",
        "ip_in(#T, [#T, #T])",
        "#L.exists(x, x == #T)",
        "#L.exists(x, x in lists.partners)",
        "#L.all(x, size(x) < #N)",
        "#L.all(x, #T.contains(x))",
        "#L.exists_one(x, x.matches(#T))",
        "#L.exists(x, title_case(x) == #T)",
        "#L.exists(x, #B)",
    ],
};

const LIST: Ways = Ways {
    plain: &[
        "signup.claims.many",
        "signup.claims.words",
        "signup.claims",
        "signup.identities",
        "lookups.crm.tags",
        "lookups.crm",
        "[]",
        "[1, 2, 3]",
        "['a', 'b', 'a']",
    ],
    made: &[
        "[#T, #T, #T]",
        "[#N, #N]",
        "[#L, #L]",
        "(#L + #L)",
        "#T.split(#T)",
        "#T.split(#T, #N)",
        "#L.filter(x, x != #T)",
        "#L.map(x, x + x)",
        "#L.map(x, #T)",
        "#L.map(x, [x, #T])",
        "#L.map(x, x.replace('', #T))",
        "{#T: #N, 'a': #L}",
    ],
};

const DATE: Ways = Ways {
    plain: &["today()", "now()", "date('2001-02-03')", "add_days(today(), 30)"],
    made: &["date(#T)", "timestamp(#T)", "add_days(#D, #N)", "(#B ? #D : #D)"],
};

/// An expression of that kind, nested so deep at most.
fn expression(random: &mut ThreadRng, kind: &str, depth: u32) -> String {
    let ways = match kind {
        "T" => &TEXT,
        "N" => &NUMBER,
        "B" => &TRUTH,
        "L" => &LIST,
        "D" => &DATE,
        other => unreachable!("{other} is no kind"),
    };
    if depth == 0 || random.random_ratio(1, 4) {
        return one_of(random, ways.plain).to_owned();
    }
    let mut parts = one_of(random, ways.made).split('#');
    let mut written = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let (kind, after) = part.split_at(1);
        written += &expression(random, kind, depth - 1);
        written += after;
    }
    written
}

fn one_of<T: Copy>(random: &mut ThreadRng, from: &[T]) -> T {
    from[random.random_range(0..from.len())]
}

fn rule(random: &mut ThreadRng, name: String) -> RuleSettings {
    let message = || "No.".to_owned();
    let outcome = match random.random_range(0..8) {
        0 => RuleOutcome::Reject { message: message(), field: Some("a".to_owned()) },
        1 => RuleOutcome::Block { message: message() },
        2 => RuleOutcome::Accept,
        3 => RuleOutcome::RequireApproval { message: message() },
        _ => {
            let claim = one_of(random, &["a", "n", "new"]).to_owned();
            let kind = one_of(random, &["T", "N", "B"]);
            RuleOutcome::Set { claims: [(claim, expression(random, kind, DEPTH))].into() }
        }
    };
    let on_error = match random.random_range(0..5) {
        0 => OnError::Reject { message: message() },
        1 => OnError::Block { message: message() },
        _ => OnError::Continue,
    };
    let modes = [Mode::Enforce, Mode::Enforce, Mode::Enforce, Mode::Warn, Mode::Audit];
    RuleSettings {
        name,
        steps: vec![],
        when: expression(random, "B", DEPTH),
        outcome,
        on_error,
        mode: one_of(random, &modes),
    }
}

/// Some of every shape, and some that fill the whole call.
fn any_claims() -> impl Strategy<Value = Map<String, Value>> {
    let short = string_regex(".{0,20}").expect("a valid pattern").boxed();
    let text = || prop_oneof![3 => short.clone().prop_map(Value::from), 1 => any_value()];
    let number =
        prop_oneof![any::<i64>().prop_map(Value::from), any::<f64>().prop_map(Value::from)];
    let home = prop_oneof![Just(json!({ "street": "1 High Street" })), any_value()];
    let unit = select(vec!["a", "aB ", "é", "ada@", "1 ", "\u{301}", "%s", "\0", "İ", "-'o "]);
    let large =
        (unit, 1..CLAIM_BYTES_MAX).prop_map(|(unit, bytes)| unit.repeat(bytes / unit.len()));
    let claims = (
        (text(), text(), text()),
        number,
        any::<bool>(),
        prop::collection::vec(any_value(), 0..3),
        home,
        prop::option::of((select(vec!["a", "b", "c", "many", "words"]), large)),
    );
    claims.prop_map(|((a, b, c), n, yes, many, home, large)| {
        let claims = json!({
            "a": a, "b": b, "c": c, "n": n, "yes": yes, "many": many, "home": home,
            "words": ["ada", "lovelace", "ada"],
        });
        let Value::Object(mut claims) = claims else { unreachable!("it is written above") };
        match large {
            Some((name @ ("many" | "words"), large)) => {
                // Each item takes a comma and quotes, too.
                let items = (large.len() / 8).min(CLAIM_BYTES_MAX / 6);
                let item = if name == "many" { json!(1) } else { json!("ab") };
                claims.insert(name.to_owned(), vec![item; items].into());
            }
            Some((name, large)) => drop(claims.insert(name.to_owned(), large.into())),
            None => {}
        }
        claims
    })
}

fn any_person() -> impl Strategy<Value = SignUp> {
    let email = prop_oneof![
        3 => Just(Some("Ada@Mail.Example.com".to_owned())),
        1 => prop::option::of(string_regex(".{0,40}").expect("a valid pattern")),
    ];
    let ip = prop::option::of(select(vec!["10.1.2.3", "2001:db8::1", "nowhere"]));
    let identities = prop::collection::vec(select(vec!["google.com", "facebook.com", ""]), 0..3);
    (select(Step::ALL.to_vec()), email, ip, identities, any_claims()).prop_map(
        |(step, email, ip, identities, claims)| SignUp {
            connector: "partners".parse().expect("a valid name"),
            protocol: Protocol::ApiConnector,
            step,
            email: email.map(Email::new),
            identities: identities
                .into_iter()
                .map(|issuer| Identity {
                    sign_in_type: "federated".to_owned(),
                    issuer: issuer.to_owned(),
                    issuer_assigned_id: "1".to_owned(),
                })
                .collect(),
            client: Some("app".to_owned()),
            locale: None,
            ip: ip.map(str::to_owned),
            object_id: None,
            correlation_id: None,
            claims,
        },
    )
}

async fn reference() -> anyhow::Result<ReferenceData> {
    let partners = ListSettings {
        name: "partners".to_owned(),
        source: ListSource::Inline(["example.com", "a", "1", "Germany"].map(str::to_owned).into()),
        ignore_case: true,
    };
    let lists =
        HashMap::from([("partners".to_owned(), Some(Arc::new(List::load(&partners).await?)))]);
    let crm = json!({ "tier": "gold", "seats": 5, "tags": ["a", "b", "ada"] });
    let Value::Object(crm) = crm else { unreachable!("it is written above") };
    let asked = ["signup.email_domain".to_owned()];
    let lookup = |name: &str, stand_in| {
        LookupWithArguments::stand_in(name.to_owned(), stand_in, &asked)
            .map_err(|faults| anyhow::anyhow!("{faults:?}"))
    };
    let lookups = vec![lookup("crm", StandIn::answer(crm))?, lookup("down", StandIn::Unavailable)?];
    Ok(ReferenceData::new(lists, lookups))
}

/// Tells of the case that a panic ended.
struct Case {
    rules: Vec<RuleSettings>,
    claims: Map<String, Value>,
}

impl Drop for Case {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{:#?}\n{}", self.rules, Value::Object(self.claims.clone()));
        }
    }
}

/// What was decided without how long it took.
fn untimed(decision: &Decision) -> (&Outcome, Vec<(&str, Effect)>) {
    let reasons = decision.reasons.iter().map(|it| (it.rule.as_str(), it.effect)).collect();
    (&decision.outcome, reasons)
}

#[tokio::test]
async fn whatever_rules_say_and_people_send_a_decision_comes_soon() -> anyhow::Result<()> {
    let reference = Arc::new(reference().await?);
    let known = reference.known();
    let people = any_person();
    let key = PseudonymKey::new(vec![7; 32]);
    let now = time::OffsetDateTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000);

    let (mut runner, mut random) = (TestRunner::default(), rand::rng());
    let (mut written, mut good, mut tried) = (0, 0, 0);
    let (mut outcomes, mut effects) = (BTreeSet::new(), BTreeSet::new());
    let mut longest = Duration::ZERO;
    let began = Instant::now();
    // Rules that all fail, or never hold, would try nothing.
    let is_trying = |outcomes: &BTreeSet<_>, effects: &BTreeSet<String>| {
        outcomes.len() > 1 && ["Set", "Failed"].iter().all(|it| effects.contains(*it))
    };
    while began.elapsed() < SEARCH || tried < CASES_MIN || !is_trying(&outcomes, &effects) {
        tried += 1;
        assert!(tried < CASES_MAX, "all are decided alike: {outcomes:?} {effects:?}");
        let person = people.new_tree(&mut runner).map_err(|why| anyhow::anyhow!("{why}"))?;
        let sign_up = person.current();
        let mut case = Case { rules: vec![], claims: sign_up.claims.clone() };
        for number in 0..random.random_range(1..6) {
            written += 1;
            case.rules.push(rule(&mut random, format!("{number}")));
            let added = case.rules[case.rules.len() - 1].clone();
            if let Err(errors) = Rules::compile_with(vec![added], &known, &Messages::default()) {
                assert!(errors.iter().all(|it| !it.message.is_empty()), "{errors:?}");
                case.rules.pop();
            }
        }
        good += case.rules.len();

        let rules = Rules::compile_with(case.rules.clone(), &known, &Messages::default());
        let rules = rules.map_err(|errors| anyhow::anyhow!("{errors:?}"))?;
        let decider =
            Decider { rules: Arc::new(rules), reference: Arc::clone(&reference), approvals: None };
        let person = key.person(&sign_up);
        let deadline = tokio::time::Instant::now() + Duration::from_secs(60);
        let question = Question { sign_up: &sign_up, person: &person, deadline, now: Some(now) };
        let decide = async || {
            let began = Instant::now();
            (decider.decide(question).await, began.elapsed())
        };
        let ((first, took), (second, took_again)) = (decide().await, decide().await);

        // A neighbour may hold one up, and hardly both.
        let took = took.min(took_again);
        longest = longest.max(took);
        let rules = u32::try_from(case.rules.len().max(1))?;
        assert!(took < RULE_MAX * rules, "a decision took {took:?}");
        assert_eq!(untimed(&first), untimed(&second));
        if let Outcome::Continue { claims } | Outcome::Pending { claims, .. } = &first.outcome {
            let plain = |it: &Value| it.is_string() || it.is_number() || it.is_boolean();
            assert!(claims.values().all(plain), "{claims:?}");
        }
        outcomes.insert(first.outcome.as_str());
        effects.extend(first.reasons.iter().map(|it| format!("{:?}", it.effect)));
    }

    println!(
        "{tried} people, {good} of {written} rules, the longest {longest:?}, {outcomes:?} {effects:?}"
    );
    assert!(good * 8 > written, "only {good} of {written} rules compile");
    Ok(())
}
