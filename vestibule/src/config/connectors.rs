//! The `[connectors.<name>]` tables.

use std::{net::SocketAddr, time::Duration};

use vestibule_api::{Expression, OnError, OnStorageFailure, RuleOutcome, RuleSettings, Rules};
use vestibule_events::{ConnectorName, InvalidName, Protocol, Step};

use super::{reader::Section, secret, secret::SecretSource};

const TRY_AGAIN: &str =
    "We could not take your registration just now. Please try again in a minute.";

/// The event of a body may be three times as large, and `nats.conf` lets 256 KB pass.
const BODY_MAX: u64 = 64 << 10;

/// One endpoint that a platform calls.
#[derive(Debug)]
pub(crate) struct ConnectorConfig {
    pub(crate) name: ConnectorName,
    pub(crate) protocol: Protocol,
    pub(crate) credentials: Vec<CredentialConfig>,
    pub(crate) rules: Rules,
    pub(crate) deadline: Duration,
    pub(crate) body_bytes_max: usize,
    pub(crate) on_storage_failure: OnStorageFailure,
    /// What answers call the version of our API (contract 1.3).
    pub(crate) version: String,
}

/// A Basic credential; several are valid at once, so that they can be rotated.
#[derive(Debug)]
pub(crate) struct CredentialConfig {
    /// For metrics: which credential is still in use.
    pub(crate) name: String,
    pub(crate) user: String,
    pub(crate) password: SecretSource,
}

pub(super) fn read(root: &mut Section<'_>, listen: SocketAddr) -> Vec<ConnectorConfig> {
    let connectors = root.named_sections("connectors", |name, section| {
        let name = name.parse::<ConnectorName>().unwrap_or_else(|InvalidName| {
            section.complain("", InvalidName.to_string());
            "invalid".parse().expect("is a name")
        });
        read_connector(name, section, listen)
    });
    if connectors.is_empty() {
        root.complain("connectors", "needs at least one [connectors.NAME] table");
    }
    connectors
}

fn read_connector(
    name: ConnectorName,
    section: &mut Section<'_>,
    listen: SocketAddr,
) -> ConnectorConfig {
    let protocol = section.choice(
        "protocol",
        &[("api-connector", Protocol::ApiConnector)],
        Protocol::ApiConnector,
    );
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
    let credentials = section.sections("credentials", |credential| {
        let user = credential.required("user");
        if user.contains(':') {
            credential.complain("user", "a colon ends the user in a Basic credential: leave it out");
        }
        let password = secret(credential, "password");
        if !credential.has("password") {
            credential.complain("", "needs the key `password`");
        }
        if matches!(password, Some(SecretSource::Example(_))) && !listen.ip().is_loopback() {
            credential.complain(
                "password",
                format!(
                    "an example password is only for trying out on loopback, and `listen.connector` \
                     is {listen}; set a real one: \"env:NAME\" or \"file:PATH\""
                ),
            );
        }
        let name = credential.string("name").unwrap_or_else(|| user.clone());
        password.map(|password| CredentialConfig { name, user, password })
    });
    if !section.has("credentials") {
        section.complain("", "needs at least one [[credentials]] table with `user` and `password`");
    }
    let rules = read_rules(section);
    ConnectorConfig {
        name,
        protocol,
        credentials: credentials.into_iter().flatten().collect(),
        rules,
        deadline,
        body_bytes_max: usize::try_from(body_bytes_max).unwrap_or(usize::MAX),
        on_storage_failure: if refuse {
            OnStorageFailure::Refuse { message }
        } else {
            OnStorageFailure::LetThrough
        },
        version,
    }
}

fn read_rules(section: &mut Section<'_>) -> Rules {
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
        let has_outcome = ["set", "reject", "block"].iter().any(|key| section.has(key));
        if let Err(errors) = Rules::compile(vec![rule.clone()]) {
            for error in errors {
                if !has_outcome && error.expression == Expression::Name {
                    continue;
                }
                let (key, what) = match &error.expression {
                    Expression::Name => ("name", String::new()),
                    Expression::When => ("when", String::new()),
                    Expression::Claim(claim) => ("set", format!("`{claim}`: ")),
                };
                section.complain(key, format!("{what}{}", error.message));
            }
        }
        settings.push(rule);
    });
    // What does not compile has been complained of, so the result is never used then.
    Rules::compile(settings).unwrap_or_default()
}

fn read_rule(section: &mut Section<'_>, index: usize) -> RuleSettings {
    let name = section.string("name").unwrap_or_else(|| format!("rule-{}", index + 1));
    let steps = section.list(
        "steps",
        "\"after-federation\", \"before-create\", \"before-token\"",
        |text| Step::ALL.into_iter().find(|step| step.as_str() == text),
    );
    let when = section.string("when").unwrap_or_else(|| "true".into());
    let set = section.strings("set");
    let reject = section.string("reject");
    let field = section.string("field");
    let block = section.string("block");
    let given = ["set", "reject", "block"].into_iter().filter(|key| section.has(key)).count();
    if given != 1 {
        section.complain("", "needs exactly one of `set`, `reject` and `block`");
    }
    if field.is_some() && reject.is_none() {
        section.complain("field", "goes with `reject` only");
    }
    let outcome = match (reject, block) {
        (Some(message), _) => RuleOutcome::Reject { message, field },
        (_, Some(message)) => RuleOutcome::Block { message },
        _ => RuleOutcome::Set { claims: set.into_iter().collect() },
    };
    let on_error_message = section.string("on_error_message").unwrap_or_else(|| TRY_AGAIN.into());
    let choices = [("continue", 0), ("reject", 1), ("block", 2)];
    let on_error = match section.choice("on_error", &choices, 0) {
        0 => OnError::Continue,
        1 => OnError::Reject { message: on_error_message },
        _ => OnError::Block { message: on_error_message },
    };
    RuleSettings { name, steps, when, outcome, on_error }
}
