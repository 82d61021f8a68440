//! What a rule's author has: `try`, `test`, `test --against-log`, and what `check` says of rules.

use std::{collections::BTreeMap, fs, path::Path, process::Command};

use anyhow::{Context, ensure};
use serde_json::{Value, json};
use vestibule_testkit::Process;

use crate::support::{EXAMPLE, Finished, LIMIT, Site};

const CASES: &str = r#"
connector = "partners"
step = "before-create"

[[case]]
name = "a throwaway address is turned away"
sign_up = { email = "x@mailinator.com" }
expect = { outcome = "block", rule = "no-throwaway-addresses" }

[[case]]
name = "a display name is made of the others"
payload = { email = "ada@example.org", givenName = "Ada", surname = "Lovelace" }
expect = { outcome = "continue", claims = { displayName = "Ada King" } }
"#;

/// A lookup, a list in a database and a rule for approval, of which nothing is reachable.
const REFERENCE: &str = r#"
[lists.staff]
database = "env:NO_SUCH_DATABASE"
query = "SELECT email FROM staff"

[lookups.crm]
url = "https://crm.invalid/people"
headers = { Authorization = "env:NO_SUCH_TOKEN" }
arguments = { mail = "signup.email" }
fields = { tier = "/data/tier" }

[[connectors.partners.rules]]
name = "account-is-known"
steps = ["before-token"]
when = "signup.object_id == ''"
on_error = "block"
block = "Who are you?"

[[connectors.partners.rules]]
name = "staff-goes-on"
when = "signup.email in lists.staff"
on_error = "reject"
accept = true

[[connectors.partners.rules]]
name = "gold-is-approved"
when = "lookups.crm.found && lookups.crm.tier == 'gold'"
require_approval = "Somebody will look at your registration."
"#;

fn write(site: &Site, path: &str, text: &str) -> anyhow::Result<()> {
    let path = site.path().join(path);
    fs::create_dir_all(path.parent().context("is in a folder")?)?;
    Ok(fs::write(path, text)?)
}

fn json_of(finished: &Finished) -> anyhow::Result<Value> {
    serde_json::from_str(&finished.stdout)
        .with_context(|| format!("no JSON: {}{}", finished.stdout, finished.stderr))
}

#[tokio::test]
async fn try_shows_why_and_the_answer_in_each_dialect() -> anyhow::Result<()> {
    let site = Site::new("")?;
    let payload = r#"{"email":"ada@example.org","country":"United States","postalCode":"x"}"#;
    write(&site, "payload.json", payload)?;
    let call = ["try", "--connector", "partners", "--step", "before-create", "payload.json"];

    let tried = json_of(&site.run(&[&call[..], &["--output", "json"]].concat()).await?)?;
    let table = site.run(&call).await?;

    assert_eq!(tried["decision"]["reasons"][0]["rule"], "postal-code-of-the-united-states");
    let answers = tried["answers"].as_array().context("no answers")?;
    let of = |it: &Value| (it["protocol"].clone(), it["status"].clone());
    let answers: Vec<_> = answers.iter().map(of).collect();
    let expected = [("api-connector", 400), ("custom-policy", 409), ("custom-extension", 200)];
    assert_eq!(answers, expected.map(|(protocol, status)| (json!(protocol), json!(status))));
    assert!(table.stdout.contains(r#""action":"ValidationError""#), "{}", table.stdout);
    assert!(!site.data().exists(), "something was recorded");
    Ok(())
}

#[tokio::test]
async fn try_teaches_how_to_call_it() -> anyhow::Result<()> {
    let site = Site::new("")?;
    write(&site, "good.json", r#"{"email":"ada@example.org"}"#)?;
    write(&site, "bad.json", "{\n  \"email\": }")?;
    for (arguments, code, said) in [
        (&["--connector", "partner", "good.json"][..], 1, "did you mean `partners`?"),
        (&["--connector", "partners", "good.json"], 1, "give --step: after-federation"),
        (
            &["--connector", "partners", "--step", "before-crate", "good.json"],
            2,
            "`before-create`?",
        ),
        (
            &["--connector", "partners", "--step", "before-create", "bad.json"],
            1,
            "line 2 column 12",
        ),
        (&["--connector", "partners", "--query", "a=b"], 1, "go with custom-policy only"),
    ] {
        let tried = site.run(&[&["try"], arguments].concat()).await?;
        assert_eq!(tried.code, code, "{arguments:?}");
        assert!(tried.stderr.contains(said), "{said} is not in {}", tried.stderr);
    }
    Ok(())
}

/// What only a custom policy does: it calls with claims in the URL and in headers.
#[tokio::test]
async fn try_takes_claims_from_the_url_of_a_custom_policy() -> anyhow::Result<()> {
    let config = EXAMPLE
        .replace("\"api-connector\"", "\"custom-policy\"")
        .replace("deadline = \"800ms\"", "deadline = \"800ms\"\nclaim_headers = [\"email\"]");
    let site = Site::with_config(&config)?;
    let call = ["try", "--connector", "partners", "--step", "before-create", "--output", "json"];
    let claims = ["--header", "email: ada@yopmail.com", "--query", "city=K%C3%B6ln"];

    let tried = json_of(&site.run(&[&call[..], &claims].concat()).await?)?;

    assert_eq!(tried["sign_up"]["claims"]["city"], "Köln", "{tried}");
    assert_eq!(tried["answers"][0]["protocol"], "custom-policy");
    assert_eq!(tried["answers"][0]["body"]["code"], "blocked", "{tried}");
    Ok(())
}

/// Identity verification: the service is asked, and what it says decides.
#[tokio::test]
async fn try_asks_a_service_that_verifies_identities() -> anyhow::Result<()> {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/examples/identity-verification");
    let mut service = Command::new("python3");
    service.args([&format!("{folder}/service.py"), "--port", "0"]);
    let mut service = Process::spawn(&service)?;
    let said = service.wait_for_line(LIMIT, |line| line.contains("listening on")).await?;
    let url = said.split_whitespace().last().context("no address")?;
    let config = fs::read_to_string(format!("{folder}/vestibule.toml"))?;
    let mut site = Site::with_config(&config.replace("http://127.0.0.1:8099", url))?;
    site.set("IDV_KEY", "try-me");
    let call = ["try", "--connector", "customers", "--step", "before-create", "payload.json"];
    let call = [&call[..], &["--output", "json"]].concat();
    let call_of = |given_name: &str, surname: &str, birth_date: &str| {
        json!({
            "email": "ada@example.org",
            "givenName": given_name,
            "surname": surname,
            "birthDate": birth_date,
        })
    };

    for (payload, outcome, answer) in [
        (call_of("Ada", "Lovelace", "1815-12-10"), "continue", "found"),
        (call_of("Ada", "Lovelace", "1815-12-11"), "block", "found"),
        (call_of("Eve", "Nobody", "1990-01-01"), "reject", "not-found"),
    ] {
        write(&site, "payload.json", &payload.to_string())?;
        let tried = json_of(&site.run(&call).await?)?;
        assert_eq!(tried["decision"]["outcome"]["action"], outcome, "{tried}");
        assert_eq!(tried["decision"]["lookups"][0]["answer"], answer, "{tried}");
    }
    let unasked = json_of(&site.run(&[&call[..], &["--without-lookups"]].concat()).await?)?;
    assert_eq!(unasked["decision"]["lookups"][0]["answer"], "not-asked", "{unasked}");
    let online = site.run(&["check", "--online"]).await?;
    assert!(!online.stdout.contains("lookups.idv"), "{}", online.stdout);
    service.terminate(LIMIT).await?;
    let online = site.run(&["check", "--online"]).await?;
    assert!(online.stdout.contains("cannot be reached"), "{}", online.stdout);
    Ok(())
}

#[tokio::test]
async fn cases_run_like_unit_tests() -> anyhow::Result<()> {
    let site = Site::new("")?;
    write(&site, "rules/deep/partners.toml", CASES)?;

    let test = site.run(&["test"]).await?;

    let line = CASES[..CASES.rfind("[[case]]").context("no case")?].lines().count() + 1;
    assert_eq!(test.code, 1, "{}", test.stderr);
    for said in [
        "ok    a throwaway address is turned away\n".to_owned(),
        format!("FAIL  a display name is made of the others  (./rules/deep/partners.toml:{line})"),
        r#"expected { displayName = "Ada King" }"#.to_owned(),
        r#"found { displayName = "Ada Lovelace" }"#.to_owned(),
        "1 passed, 1 failed".to_owned(),
        "no case reaches these rules:\n  partners: postal-code-of-the-united-states".to_owned(),
    ] {
        assert!(test.stdout.contains(&said), "{said} is not in {}", test.stdout);
    }
    let one = ["test", "rules/deep/partners.toml", "--filter", "throwaway", "--output", "json"];
    let one = site.run(&one).await?;
    assert_eq!((one.code, &json_of(&one)?["passed"]), (0, &json!(1)));
    Ok(())
}

#[tokio::test]
async fn a_case_asks_nobody_and_says_what_it_lacks() -> anyhow::Result<()> {
    let site = Site::new(REFERENCE)?;
    let case = |name: &str, world: &str, expect: &str| {
        format!(
            "[[case]]\nname = \"{name}\"\n{world}\nsign_up = {{ email = \"ada@example.org\" }}\n\
             expect = {{ outcome = \"{expect}\" }}\n"
        )
    };
    let cases = [
        case("list", "", "reject"),
        case("lookup", "lists = { staff = [] }", "continue"),
        // Fails for another reason than the list that is not there.
        case(
            "missing",
            "lookups = { crm = { tier = \"none\" } }\nstep = \"before-token\"",
            "block",
        ),
        case("staff", "lists = { staff = [\"Ada@example.org\"] }", "continue"),
        case("gold", "lists = { staff = [] }\nlookups = { crm = { tier = \"gold\" } }", "pending"),
        case("down", "lists = { staff = [] }\nlookups = { crm = \"fails\" }", "continue"),
        case(
            "denied",
            "lists = { staff = [] }\nlookups = { crm = { tier = \"gold\" } }\nstanding = \"denied\"",
            "block",
        ),
    ];
    let top = "connector = \"partners\"\nstep = \"before-create\"\n";
    write(&site, "rules/cases.toml", &format!("{top}{}", cases.concat()))?;

    let test = site.run(&["test", "--output", "json"]).await?;

    let found = json_of(&test)?;
    let cases = found["cases"].as_array().context("no cases")?;
    let failed = cases.iter().filter(|it| it["ok"] == false).map(|it| it["name"].clone());
    assert_eq!(failed.collect::<Vec<_>>(), ["list", "lookup"], "{found}");
    let hint = |index: usize| cases[index]["hints"][0].as_str().unwrap_or_default();
    assert!(hint(0).contains("`staff` is in a database"), "{}", hint(0));
    assert!(hint(1).contains("the lookup `crm` is asked"), "{}", hint(1));
    let missing = cases.iter().find(|it| it["name"] == "missing").context("no such case")?;
    let effects = missing["effects"].as_array().context("no effects")?;
    assert!(effects.contains(&json!("failed-block: missing member")), "{missing}");
    Ok(())
}

#[tokio::test]
async fn mistakes_in_cases_have_their_place_and_the_nearest_name() -> anyhow::Result<()> {
    let site = Site::new("")?;
    let wrong = CASES.replace("no-throwaway-addresses", "no-throwaway-adresses");
    write(&site, "rules/a.toml", &wrong.replace("sign_up =", "signup ="))?;

    let test = site.run(&["test"]).await?;

    assert_eq!(test.code, 1);
    assert!(test.stderr.contains("the cases have 2 mistakes"), "{}", test.stderr);
    for said in [
        "./rules/a.toml:8:38: case[0].expect.rule: there is no rule `no-throwaway-adresses`; did you \
         mean `no-throwaway-addresses`?",
        "./rules/a.toml:7:10: case[0].signup: there is no such key; did you mean `sign_up`?",
    ] {
        assert!(test.stderr.contains(said), "{said} is not in {}", test.stderr);
    }
    Ok(())
}

#[tokio::test]
async fn changed_rules_say_whom_they_would_decide_differently() -> anyhow::Result<()> {
    let site = Site::new("")?;
    let mut up = site.up().await?;
    for (email, city) in [("ada@example.org", "Paris"), ("x@yopmail.com", "Oslo")] {
        up.sign_up("before-create", &json!({ "email": email, "city": city })).await?;
    }
    up.sign_up("before-create", &json!({ "email": "eve@example.org", "city": "Rome" })).await?;
    up.process.terminate(LIMIT).await?;
    let changed = EXAMPLE.replace(", 'yopmail.com'", "").replace(
        "# ── The workers",
        "[[connectors.partners.rules]]\nname = \"nobody-from-paris\"\n\
         when = \"signup.claims.city == 'Paris'\"\nreject = \"Not from there.\"\n\n# ── The workers",
    );
    write(&site, "changed.toml", &changed)?;

    let against = ["test", "--against-log", "1h", "--config", "changed.toml"];
    let json = site.run(&[&against[..], &["--output", "json"]].concat()).await?;
    let strict = site.run(&[&against[..], &["--fail-on-difference"]].concat()).await?;
    let same = site.run(&["test", "--against-log", "1h", "--fail-on-difference"]).await?;

    let found = json_of(&json)?;
    assert_eq!(json.code, 0, "{}", json.stderr);
    assert_eq!(found["changes"], json!({ "accepted → rejected": 1, "blocked → accepted": 1 }));
    assert_eq!(found["same"], 1);
    let rules: Vec<_> = [0, 1].map(|it| found["differences"][it]["rule"].clone()).into();
    assert_eq!(rules, ["nobody-from-paris", "no-throwaway-addresses"]);
    assert_eq!((strict.code, same.code), (1, 0), "{}{}", strict.stderr, same.stdout);
    for output in [&json.stdout, &strict.stdout] {
        assert!(!output.contains('@') && !output.contains("Paris"), "{output}");
    }
    Ok(())
}

#[tokio::test]
async fn check_says_what_rules_cannot_do() -> anyhow::Result<()> {
    let rules = r#"
[messages]
folder = "texts"

[lists.nobody]
entries = []

[connectors.extension]
protocol = "custom-extension"
[[connectors.extension.credentials]]
user = "entra"
password = "example:try-me"
[[connectors.extension.rules]]
name = "too-late"
steps = ["before-token"]
when = "true"
block = "No."
[[connectors.extension.rules]]
name = "never"
steps = ["before-token"]
when = "signup.email in lists.nobody"
block = "No."
[[connectors.extension.rules]]
name = "no-form-yet"
steps = ["after-federation"]
when = "!has(signup.email)"
reject = "Which address?"
"#;
    let site = Site::new(&format!("{REFERENCE}{rules}"))?;
    write(&site, "texts/en.toml", "sorry = \"Sorry.\"\n")?;
    write(&site, "texts/fr.toml", "")?;

    let check = site.run(&["check", "--online", "--output", "json"]).await?;

    assert_eq!(check.code, 0, "{}", check.stderr);
    let said = json_of(&check)?["warnings"].to_string();
    for warning in [
        "connectors.extension.rules[0]: `too-late` turns nobody away at before-token",
        "connectors.extension.rules[1]: `never` never has an effect: `too-late` ends",
        "connectors.extension.rules[2]: `no-form-yet` shows a block page at after-federation",
        "`gold-is-approved` asks for approval, and no worker keeps the requests",
        "messages: the language fr lacks the message `sorry`",
        "lists.nobody: it is empty",
        "lists.staff: the environment variable NO_SUCH_DATABASE is not set",
        "lookups.crm: the environment variable NO_SUCH_TOKEN is not set",
    ] {
        assert!(said.contains(warning), "{warning} is not in {said}");
    }
    let lines = said.matches("vestibule.toml:").count();
    assert!(lines >= 7, "{lines} lines in {said}");
    Ok(())
}

/// What a start would refuse is no warning: whoever deploys goes by the exit code.
#[tokio::test]
async fn check_refuses_what_a_start_would() -> anyhow::Result<()> {
    let rules = r#"
[messages]
folder = "texts"

[lists.gone]
file = "gone.txt"

[lookups.people]
url = "https://crm.example/{mial}"
arguments = { mail = "signup.email" }

[[connectors.partners.rules]]
name = "says-sorry"
steps = ["before-crate"]
when = "signup.email in lists.gone"
block = "message:sorry"
"#;
    let site = Site::new(rules)?;
    write(&site, "texts/en.toml", "sorry = \"Sorry.\"\n")?;
    let said = site.run(&["check"]).await?.stderr;
    assert!(said.contains("1 mistake\n"), "{said}");
    assert!(said.contains("did you mean `before-create`?"), "{said}");

    let site = Site::new(&rules.replace("before-crate", "before-create"))?;
    write(&site, "texts/en.toml", "sorry = \"Sorry.\"\n")?;
    let check = site.run(&["check", "--output", "json"]).await?;
    assert_eq!(check.code, 1, "{}", check.stdout);
    let mistakes = json_of(&check)?["mistakes"].clone();
    assert_eq!(mistakes[0]["key"], "lists.gone", "{mistakes}");
    assert_eq!(mistakes[1]["key"], "lookups.people", "{mistakes}");
    assert!(mistakes[1]["message"].to_string().contains("`mial`"), "{mistakes}");
    assert_eq!(mistakes[0]["message"].to_string().matches("No such file").count(), 1);

    // One mistake in a file of messages is one mistake, whoever names a message of it.
    write(&site, "texts/en.toml", "sorry = \"Sorry.\"\nno = \"No.\n")?;
    let said = site.run(&["check"]).await?.stderr;
    assert!(said.contains("1 mistake\n"), "{said}");
    assert!(said.contains("texts/en.toml:2:"), "{said}");
    Ok(())
}

const MANUAL: &str = include_str!("../docs/rules.md");

/// Files of an example in the manual, by the path that the first line of each block names.
type Files = BTreeMap<String, String>;

/// The examples by their titles: the configuration of each, and its other files.
fn examples() -> anyhow::Result<Vec<(String, (String, Files))>> {
    let mut sections = MANUAL.split("\n## ");
    let opening = blocks(sections.next().context("the manual is empty")?);
    let base = opening.get("vestibule.toml").context("there is no configuration to begin with")?;
    let of = |section: &str| {
        let title = section.lines().next().unwrap_or_default().to_owned();
        let mut files = blocks(section);
        let rules = files.remove("vestibule.toml")?;
        Some((title, (format!("{base}\n{rules}"), files)))
    };
    Ok(sections.filter_map(of).collect())
}

/// The fenced blocks whose first line is a comment with a path.
fn blocks(section: &str) -> Files {
    let mut files = Files::new();
    for block in section.split("```").skip(1).step_by(2) {
        let Some((_, text)) = block.split_once('\n') else { continue };
        let path = text.lines().next().and_then(|line| line.strip_prefix("# "));
        if let Some(path) = path.filter(|it| Path::new(it).extension().is_some()) {
            files.entry(path.to_owned()).or_default().push_str(text);
        }
    }
    files
}

#[tokio::test]
async fn the_examples_of_the_manual_do_what_it_says() -> anyhow::Result<()> {
    let examples = examples()?;
    assert_eq!(examples.len(), 10, "the manual has ten examples");
    for (title, (config, files)) in examples {
        let site = Site::with_config(&config)?;
        for (path, text) in &files {
            write(&site, path, text)?;
        }

        let check = site.run(&["check"]).await?;
        let test = site.run(&["test", "--output", "json"]).await?;

        ensure!(check.code == 0, "{title}: {}", check.stderr);
        ensure!(test.code == 0, "{title}: {}{}", test.stdout, test.stderr);
        let found = json_of(&test)?;
        ensure!(found["unreached"] == json!([]), "{title}: {}", found["unreached"]);
        ensure!(found["passed"].as_u64() >= Some(2), "{title} has too few cases");
    }
    Ok(())
}
