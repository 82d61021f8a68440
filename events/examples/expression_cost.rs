//! What expressions cost: `cargo run --release -p vestibule-events --example expression_cost`.
//!
//! Prints the time of one evaluation, and of one compilation, of expressions from trivial to dear.

use std::{collections::HashSet, hint::black_box, time::Instant};

use serde_json::{Map, Value, json};
use vestibule_events::{
    Claims, SignUp,
    expression::{ClaimValue, Condition, Facts, Known, LookupState, Members, Sources, sample},
};

struct Million(HashSet<String>);

impl Members for Million {
    fn contains(&self, entry: &str) -> bool {
        self.0.contains(entry)
    }
}

struct Both {
    list: Million,
    answer: Map<String, Value>,
}

impl Sources for Both {
    fn list(&self, _: &str) -> Option<&dyn Members> {
        Some(&self.list)
    }

    fn lookup(&self, _: &str) -> LookupState<'_> {
        LookupState::Is(&self.answer)
    }
}

fn main() {
    let claims = json!({
        "displayName": "ada LOVELACE", "givenName": "ada", "surname": "lovelace", "city": "London",
        "country": "United Kingdom", "birthday": "1990-12-10", "mobile": "020 7946 0018",
        "age": 36, "groups": (0..20).map(|it| format!("group-{it}")).collect::<Vec<_>>(),
    });
    let sign_up = SignUp { claims: object(claims), ..sample() };
    let list = Million((0..1_000_000).map(|it| format!("company-{it}.example")).collect());
    let answer = object(json!({ "found": true, "tier": "gold" }));
    let sources = Both { list, answer };
    let changed = Claims::new();
    let facts = Facts::new(&sign_up, &changed).with_sources(&sources);
    let known = Known { lists: vec!["partners".into()], lookups: vec!["crm".into()] };

    println!("{:>10} {:>10}  expression", "evaluate", "compile");
    for source in [
        "true",
        "signup.email_domain == 'example.com'",
        "signup.claims.city == 'London'",
        "has(signup.claims.city) && signup.claims.age >= 18",
        "signup.email.matches('^[a-z]+@example[.]com$')",
        "signup.email_domain in lists.partners",
        "lookups.crm.found",
        "lookups.crm.found && lookups.crm.tier == 'gold'",
        "signup.claims.groups.exists(g, g == 'group-19')",
        "signup.claims.city + '!'",
        "title_case(signup.claims.displayName)",
        "collapse_spaces(signup.claims.displayName)",
        "is_email(signup.email)",
        "in_domain(signup.email, 'example.com')",
        "ip_in(signup.ip, '10.0.0.0/8')",
        "years_since(signup.claims.birthday) >= 18",
        "country_code(signup.claims.country)",
        "phone(signup.claims.mobile, 'GB')",
    ] {
        let compile = || ClaimValue::compile_with(source, &known).expect("compiles");
        let compiled = compile();
        let evaluate = nanoseconds(100_000, || drop(black_box(compiled.evaluate(&facts))));
        let compiling = nanoseconds(200, || drop(black_box(compile())));
        println!("{evaluate:>8.0}ns {:>8.1}µs  {source}", compiling / 1000.0);
    }

    let rules: Vec<_> = (0..25)
        .map(|it| match it % 5 {
            0 => format!("signup.email_domain == 'company-{it}.example'"),
            1 => format!("has(signup.claims.city) && signup.claims.city == 'City {it}'"),
            2 => format!("signup.claims.age > {it}00"),
            3 => format!(
                "signup.step == 'before-create' && signup.claims.surname.startsWith('x{it}')"
            ),
            _ => format!("signup.email.endsWith('@company-{it}.example')"),
        })
        .map(|source| Condition::compile(&source).expect("compiles"))
        .collect();
    let all = nanoseconds(20_000, || {
        for rule in &rules {
            black_box(rule.holds(&facts)).ok();
        }
    });
    println!("{:>8.1}µs {:>10}  25 rules of everyday kinds", all / 1000.0, "");
}

fn object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(members) => members,
        _ => Map::new(),
    }
}

fn nanoseconds(times: u32, mut run: impl FnMut()) -> f64 {
    let start = Instant::now();
    for _ in 0..times {
        run();
    }
    start.elapsed().as_secs_f64() * 1e9 / f64::from(times)
}
