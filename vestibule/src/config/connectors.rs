//! The `[connectors.<name>]` tables.

use std::{net::SocketAddr, path::Path, sync::Arc, time::Duration};

use vestibule_api::{
    ContractSettings, ErrorStatus, Expression, OnError, OnStorageFailure, RuleError, RuleOutcome,
    RuleSettings, Rules, TRY_AGAIN,
};
use vestibule_events::{ConnectorName, InvalidName, Mode, Protocol, Step};

use super::{
    credentials::{self, CredentialConfig},
    reader::Section,
    reference::ReferenceConfig,
};

/// The event of a body may be three times as large, and `nats.conf` lets 256 KB pass.
const BODY_MAX: u64 = 64 << 10;

/// One endpoint that a platform calls.
#[derive(Debug)]
pub(crate) struct ConnectorConfig {
    pub(crate) name: ConnectorName,
    pub(crate) protocol: Protocol,
    pub(crate) credentials: Vec<CredentialConfig>,
    pub(crate) rules: Arc<Rules>,
    pub(crate) deadline: Duration,
    pub(crate) body_bytes_max: usize,
    pub(crate) on_storage_failure: OnStorageFailure,
    /// What answers call the version of our API (contract 1.3).
    pub(crate) version: String,
    pub(crate) contract: ContractSettings,
    /// `custom-extension`: calls of other tenants or extensions are turned away; empty lets all in.
    pub(crate) tenants: Vec<String>,
    pub(crate) extensions: Vec<String>,
}

impl ConnectorConfig {
    /// Everything that only a start can change, in a form to compare.
    pub(super) fn beyond_rules(&self) -> String {
        let Self { name, protocol, credentials, deadline, body_bytes_max, .. } = self;
        let Self { on_storage_failure, version, contract, tenants, extensions, .. } = self;
        let calls = (name, protocol, credentials, deadline, body_bytes_max);
        let answers = (on_storage_failure, version, contract, tenants, extensions);
        format!("{:?}", (calls, answers))
    }
}

/// What the file says elsewhere and connectors need.
#[derive(Clone, Copy)]
pub(super) struct Surroundings<'a> {
    pub(super) listen: SocketAddr,
    /// Where relative paths start.
    pub(super) folder: &'a Path,
    pub(super) reference: &'a ReferenceConfig,
}

pub(super) fn read(root: &mut Section<'_>, around: Surroundings<'_>) -> Vec<ConnectorConfig> {
    let connectors = root.named_sections("connectors", |name, section| {
        let name = name.parse::<ConnectorName>().unwrap_or_else(|InvalidName| {
            section.complain("", InvalidName.to_string());
            "invalid".parse().expect("is a name")
        });
        read_connector(name, section, around)
    });
    if connectors.is_empty() {
        root.complain("connectors", "needs at least one [connectors.NAME] table");
    }
    connectors
}

fn read_connector(
    name: ConnectorName,
    section: &mut Section<'_>,
    around: Surroundings<'_>,
) -> ConnectorConfig {
    let protocols = Protocol::ALL.map(|protocol| (protocol.as_str(), protocol));
    let protocol = section.choice("protocol", &protocols, Protocol::ApiConnector);
    let deadline = section.duration("deadline", Duration::from_millis(800));
    if deadline.is_zero() || deadline > Duration::from_secs(20) {
        section
            .complain("deadline", "must be above 0 and at most 20s, the longest a platform waits");
    }
    let body_bytes_max = section.bytes("body_max", 64 << 10);
    if !(256..=BODY_MAX).contains(&body_bytes_max) {
        section
            .complain("body_max", "must be from 256B to 64KiB: larger events fit into no stream");
    }
    let version = section.string("version").unwrap_or_else(|| "1.0.0".into());
    let message = section.string("storage_failure_message").unwrap_or_else(|| TRY_AGAIN.into());
    let refuse =
        section.choice("on_storage_failure", &[("refuse", true), ("let-through", false)], true);
    let credentials = credentials::read(section, around.listen, around.folder);
    let texts =
        |section: &mut Section<'_>, key| section.list(key, "texts", |text| Some(text.to_owned()));
    let tenants = texts(section, "tenants");
    let extensions = texts(section, "extensions");
    let contract = ContractSettings {
        error_status: match section.integer("error_status", 400..410, 409) {
            400 => ErrorStatus::BadRequest,
            409 => ErrorStatus::Conflict,
            _ => {
                section.complain("error_status", "expected 409 or 400");
                ErrorStatus::default()
            }
        },
        claim_headers: texts(section, "claim_headers"),
        block_title: section.string("block_title"),
    };
    for header in &contract.claim_headers {
        let is_of = |it: &CredentialConfig| {
            it.header().is_some_and(|of| of.as_str().eq_ignore_ascii_case(header))
        };
        if credentials.iter().any(is_of) {
            let message =
                format!("`{header}` holds a credential, which would stand in every event");
            section.complain("claim_headers", message);
        }
    }
    for (key, its) in [
        ("error_status", Protocol::CustomPolicy),
        ("claim_headers", Protocol::CustomPolicy),
        ("block_title", Protocol::CustomExtension),
        ("tenants", Protocol::CustomExtension),
        ("extensions", Protocol::CustomExtension),
    ] {
        if section.has(key) && its != protocol {
            section.complain(key, format!("goes with `protocol = \"{}\"` only", its.as_str()));
        }
    }
    let rules = read_rules(section, around.reference);
    ConnectorConfig {
        name,
        protocol,
        credentials,
        rules: Arc::new(rules),
        deadline,
        body_bytes_max: usize::try_from(body_bytes_max).unwrap_or(usize::MAX),
        on_storage_failure: if refuse {
            OnStorageFailure::Refuse { message }
        } else {
            OnStorageFailure::LetThrough
        },
        version,
        contract,
        tenants,
        extensions,
    }
}

/// What a rule does; exactly one of them.
const OUTCOMES: [&str; 5] = ["set", "reject", "block", "accept", "require_approval"];

fn read_rules(section: &mut Section<'_>, reference: &ReferenceConfig) -> Rules {
    let known = reference.known();
    let compile = |rules| Rules::compile_with(rules, &known, &reference.messages);
    let mut index = 0;
    let mut settings: Vec<RuleSettings> = Vec::new();
    // Each rule is compiled where it is read, so that a complaint has its line.
    section.sections("rules", |section| {
        let rule = read_rule(section, index);
        index += 1;
        if settings.iter().any(|other| other.name == rule.name) {
            section.complain("name", format!("there is a rule `{}` already", rule.name));
        }
        // A rule without an outcome has been complained of; that it sets nothing only follows.
        let has_outcome = OUTCOMES.iter().any(|key| section.has(key));
        for error in compile(vec![rule.clone()]).err().into_iter().flatten() {
            if has_outcome || error.expression != Expression::Name {
                complain(section, &error);
            }
        }
        settings.push(rule);
    });
    // What does not compile has been complained of, so the result is never used then.
    compile(settings).unwrap_or_default()
}

fn complain(section: &Section<'_>, error: &RuleError) {
    let text_key = || {
        let keys = ["reject", "block", "require_approval", "on_error_message"];
        keys.into_iter().find(|key| section.has(key)).unwrap_or_default()
    };
    let (key, what) = match &error.expression {
        Expression::Name => ("name", String::new()),
        Expression::When => ("when", String::new()),
        Expression::Claim(claim) => ("set", format!("`{claim}`: ")),
        Expression::Message => (text_key(), String::new()),
    };
    let place = match (error.line, error.column) {
        (1, 1) => String::new(),
        (1, column) => format!(" (at its column {column})"),
        (line, column) => format!(" (at its line {line}, column {column})"),
    };
    section.complain(key, format!("{what}{}{place}", error.message));
}

fn read_rule(section: &mut Section<'_>, index: usize) -> RuleSettings {
    let name = section.string("name").unwrap_or_else(|| format!("rule-{}", index + 1));
    let mut steps = section.words("steps", &Step::ALL.map(|step| (step.as_str(), step)));
    let when = section.string("when").unwrap_or_else(|| "true".into());
    let mode = section.choice("mode", &Mode::ALL.map(|mode| (mode.as_str(), mode)), Mode::Enforce);
    let set = section.strings("set");
    let reject = section.string("reject");
    let field = section.string("field");
    let block = section.string("block");
    let accept = section.boolean("accept", true);
    let require_approval = section.string("require_approval");
    let given = OUTCOMES.into_iter().filter(|key| section.has(key)).count();
    if given != 1 {
        section.complain(
            "",
            "needs exactly one of `set`, `reject`, `block`, `accept` and `require_approval`",
        );
    }
    if !accept {
        section.complain("accept", "can only be true; leave the rule out to not accept");
    }
    if field.is_some() && reject.is_none() {
        section.complain("field", "goes with `reject` only");
    }
    let outcome = match (reject, block, require_approval) {
        (Some(message), ..) => RuleOutcome::Reject { message, field },
        (_, Some(message), _) => RuleOutcome::Block { message },
        (.., Some(message)) => RuleOutcome::RequireApproval { message },
        // Without a `set` the mistake has been told: an outcome that is no text, or none at all.
        _ if section.has("accept") || !section.has("set") => RuleOutcome::Accept,
        _ => RuleOutcome::Set { claims: set.into_iter().collect() },
    };
    if section.has("require_approval") {
        // Whoever has an account already waits for nobody, and no event would open a request.
        if steps.contains(&Step::BeforeToken) {
            let message = "nobody can be asked to wait at before-token, where the account exists";
            section.complain("steps", message);
        }
        if steps.is_empty() {
            steps = vec![Step::AfterFederation, Step::BeforeCreate];
        }
    }
    let on_error_message = section.string("on_error_message").unwrap_or_else(|| TRY_AGAIN.into());
    let choices = [("continue", 0), ("reject", 1), ("block", 2)];
    let on_error = match section.choice("on_error", &choices, 0) {
        0 => OnError::Continue,
        1 => OnError::Reject { message: on_error_message },
        _ => OnError::Block { message: on_error_message },
    };
    RuleSettings { name, steps, when, outcome, on_error, mode }
}
