//! Files of cases: a sign-up each, and what is expected to be decided about it.
//!
//! Every mistake of every file is reported at once, with its place and the nearest valid name, as
//! those of the configuration are.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use anyhow::{Context, bail};
use serde_json::Value;
use time::{OffsetDateTime, format_description::well_known::Rfc3339};
use vestibule_api::{Dialect, Received, StandIn, Standing};
use vestibule_events::{Claims, Email, Identity, SignUp, Step};

use crate::{
    config::{Config, ConnectorConfig, Document, Section, did_you_mean},
    trial::{ListEntries, STANDINGS, StandIns},
};

pub(super) struct CaseFile {
    pub(super) path: PathBuf,
    pub(super) cases: Vec<Case>,
}

/// A sign-up in a world of its own, and what is expected.
pub(super) struct Case {
    pub(super) name: String,
    pub(super) line: usize,
    pub(super) sign_up: SignUp,
    pub(super) lookups: StandIns,
    pub(super) lists: ListEntries,
    pub(super) standing: Standing,
    pub(super) now: Option<OffsetDateTime>,
    pub(super) expect: Expect,
}

/// What is expected; what is not said may be anything.
pub(super) struct Expect {
    /// `continue`, `reject`, `block` or `pending`.
    pub(super) outcome: &'static str,
    pub(super) rule: Option<String>,
    pub(super) message: Option<String>,
    pub(super) field: Option<String>,
    /// All changed claims and no others.
    pub(super) claims: Option<Claims>,
}

/// What the top of a file says for all its cases.
struct Defaults {
    connector: Option<String>,
    step: Option<Step>,
    now: Option<OffsetDateTime>,
    standing: Standing,
    lookups: StandIns,
    lists: ListEntries,
}

/// Reads the files, or says everything that is wrong with any.
pub(super) fn read(paths: &[PathBuf], config: &Config) -> anyhow::Result<Vec<CaseFile>> {
    let mut files = Vec::new();
    let mut mistakes = Vec::new();
    for path in paths {
        let source = std::fs::read_to_string(path)
            .with_context(|| format!("could not read the cases in {}", path.display()))?;
        let folder = path.parent().unwrap_or(Path::new(""));
        match Document::read(path, &source, |root| read_cases(root, folder, config)) {
            Ok(cases) => {
                let cases = cases.into_iter().flatten().collect();
                files.push(CaseFile { path: path.clone(), cases });
            }
            Err(complaints) => mistakes.extend(complaints.lines()),
        }
    }
    match mistakes.len() {
        0 => Ok(files),
        1 => bail!("the cases have 1 mistake\n  {}", mistakes[0]),
        count => bail!("the cases have {count} mistakes\n  {}", mistakes.join("\n  ")),
    }
}

/// `None` for a case with a mistake, which has been complained of.
fn read_cases(root: &mut Section<'_>, folder: &Path, config: &Config) -> Vec<Option<Case>> {
    let defaults = Defaults {
        connector: root.string("connector"),
        step: read_step(root),
        now: read_time(root),
        standing: root.choice("standing", &STANDINGS, Standing::None),
        lookups: read_lookups(root, config),
        lists: read_lists(root, config),
    };
    if !root.has("case") {
        root.complain("", "needs at least one [[case]] table");
    }
    root.sections("case", |section| read_case(section, &defaults, folder, config))
}

fn read_case(
    section: &mut Section<'_>,
    defaults: &Defaults,
    folder: &Path,
    config: &Config,
) -> Option<Case> {
    let name = section.required("name");
    let connector = read_connector(section, defaults, config);
    let step = read_step(section).or(defaults.step);
    let now = read_time(section).or(defaults.now);
    let standing = section.choice("standing", &STANDINGS, defaults.standing);
    let lookups = with(&defaults.lookups, read_lookups(section, config));
    let lists = with(&defaults.lists, read_lists(section, config));
    let expect = section.section("expect", |it| read_expect(it, connector));
    let given = ["sign_up", "payload"].into_iter().filter(|key| section.has(key)).count();
    let payload = read_payload(section, connector, step, folder);
    let sign_up = section.section("sign_up", |it| read_sign_up(it, connector, step));
    if given == 2 || (given == 0 && !section.has_unknown()) {
        section.complain("", "needs exactly one of `sign_up` and `payload`");
    }
    let sign_up = if given == 1 { payload.or(sign_up) } else { None };
    let line = section.line();
    Some(Case { name, line, sign_up: sign_up?, lookups, lists, standing, now, expect: expect? })
}

/// What is said of all, and what is said of one, which goes first.
fn with<T: Clone>(all: &BTreeMap<String, T>, own: BTreeMap<String, T>) -> BTreeMap<String, T> {
    let mut merged = all.clone();
    merged.extend(own);
    merged
}

fn read_connector<'c>(
    section: &mut Section<'_>,
    defaults: &Defaults,
    config: &'c Config,
) -> Option<&'c ConnectorConfig> {
    let own = section.string("connector");
    let Some(name) = own.as_ref().or(defaults.connector.as_ref()) else {
        section.complain("", "needs the key `connector`, here or at the top of the file");
        return None;
    };
    let found = config.connectors.iter().find(|it| it.name.as_str() == name);
    if found.is_none() {
        let names: Vec<_> = config.connectors.iter().map(|it| it.name.as_str()).collect();
        let question = did_you_mean(name, &names);
        section.complain("connector", format!("there is no connector `{name}`{question}"));
    }
    found
}

fn read_step(section: &mut Section<'_>) -> Option<Step> {
    let steps = Step::ALL.map(|step| (step.as_str(), Some(step)));
    section.choice("step", &steps, None)
}

/// A time of TOML or one in a text.
fn read_time(section: &mut Section<'_>) -> Option<OffsetDateTime> {
    let written = section.json("now")?;
    let time = written.as_str().and_then(|it| OffsetDateTime::parse(it, &Rfc3339).ok());
    if time.is_none() {
        section.complain("now", "expected a time such as 2026-02-28T12:00:00Z");
    }
    time
}

fn read_lookups(section: &mut Section<'_>, config: &Config) -> StandIns {
    let known: Vec<_> = config.reference.lookups.iter().map(|it| it.name.as_str()).collect();
    let mut stand_ins = StandIns::new();
    for (name, answer) in section.table("lookups") {
        if !known.contains(&name.as_str()) {
            let question = did_you_mean(&name, &known);
            section.complain("lookups", format!("there is no lookup `{name}`{question}"));
        }
        match answer {
            Value::Object(answer) => drop(stand_ins.insert(name, StandIn::answer(answer))),
            Value::String(word) if word == "fails" => {
                stand_ins.insert(name, StandIn::Unavailable);
            }
            _ => section.complain(
                "lookups",
                format!("`{name}`: expected its answer, such as {{ found = true }}, or \"fails\""),
            ),
        }
    }
    stand_ins
}

fn read_lists(section: &mut Section<'_>, config: &Config) -> ListEntries {
    let known: Vec<_> = config.reference.lists.iter().map(|it| it.name.as_str()).collect();
    let mut lists = ListEntries::new();
    for (name, entries) in section.table("lists") {
        if !known.contains(&name.as_str()) {
            let question = did_you_mean(&name, &known);
            section.complain("lists", format!("there is no list `{name}`{question}"));
        }
        match serde_json::from_value(entries) {
            Ok(entries) => drop(lists.insert(name, entries)),
            Err(_) => section.complain("lists", format!("`{name}`: expected a list of texts")),
        }
    }
    lists
}

const OUTCOMES: [&str; 4] = ["continue", "reject", "block", "pending"];

fn read_expect(section: &mut Section<'_>, connector: Option<&ConnectorConfig>) -> Option<Expect> {
    let outcome = section.choice("outcome", &OUTCOMES.map(|it| (it, Some(it))), None);
    let rule = section.string("rule");
    let known: Vec<_> = connector.into_iter().flat_map(|it| it.rules.names()).collect();
    if let (Some(rule), Some(_)) = (&rule, connector)
        && !known.contains(&rule.as_str())
    {
        let question = did_you_mean(rule, &known);
        section.complain("rule", format!("there is no rule `{rule}`{question}"));
    }
    let message = section.string("message");
    let field = section.string("field");
    let claims = section.table("claims");
    let claims = section.has("claims").then_some(claims);
    if !section.has("outcome") && !section.has_unknown() {
        let outcomes = OUTCOMES.join(", ");
        section.complain("", format!("needs `expect = {{ outcome = … }}`, one of {outcomes}"));
    }
    Some(Expect { outcome: outcome?, rule, message, field, claims })
}

/// A call as the platform sends it: a file of JSON beside the cases, or a table.
fn read_payload(
    section: &mut Section<'_>,
    connector: Option<&ConnectorConfig>,
    step: Option<Step>,
    folder: &Path,
) -> Option<SignUp> {
    let body = match section.json("payload")? {
        Value::String(file) => {
            let file = folder.join(file);
            std::fs::read(&file).map_err(|error| format!("{}: {error}", file.display()))
        }
        payload @ Value::Object(_) => Ok(payload.to_string().into_bytes()),
        _ => Err("expected a file, or a table of claims".to_owned()),
    };
    let connector = connector?;
    let dialect = Dialect {
        protocol: connector.protocol,
        version: &connector.version,
        settings: &connector.contract,
    };
    let call = body.and_then(|body| {
        let received = Received::json(&connector.name, step, &body);
        dialect.read(&received).map_err(|problem| problem.message().to_owned())
    });
    match call {
        Ok(call) => Some(call.sign_up),
        Err(mistake) => {
            section.complain("payload", mistake);
            None
        }
    }
}

/// A sign-up in our own words, whatever the connector's dialect.
fn read_sign_up(
    section: &mut Section<'_>,
    connector: Option<&ConnectorConfig>,
    step: Option<Step>,
) -> Option<SignUp> {
    let email = section.string("email").map(Email::new);
    let identities = section.sections("identities", |it| Identity {
        sign_in_type: it.string("signInType").unwrap_or_else(|| "federated".into()),
        issuer: it.required("issuer"),
        issuer_assigned_id: it.string("issuerAssignedId").unwrap_or_else(|| "1".into()),
    });
    let claims = section.table("claims");
    let [client, locale, ip, object_id, correlation_id] =
        ["client", "locale", "ip", "object_id", "correlation_id"].map(|key| section.string(key));
    if !section.is_present() {
        return None;
    }
    if step.is_none() {
        section.complain("", "needs `step`, in the case or at the top of the file");
    }
    let connector = connector?;
    Some(SignUp {
        connector: connector.name.clone(),
        protocol: connector.protocol,
        step: step?,
        email,
        identities,
        claims,
        client,
        locale,
        ip,
        object_id,
        correlation_id,
    })
}
