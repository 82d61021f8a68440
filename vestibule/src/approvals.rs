//! `vestibule approvals`: looks at the requests for approval, and decides them.
//!
//! Works on the store alone, so it can be run wherever the store can be reached; a running `up` or
//! `api` publishes the events of what was decided.

use std::sync::{Arc, OnceLock};

use anyhow::{Context, bail};
use clap::{Args, Subcommand};
use comfy_table::{Table, presets::NOTHING};
use serde_json::{Value, json};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};
use vestibule_api::ApprovalDesk;
use vestibule_events::{ConnectorName, Person, Verdict};
use vestibule_store::{ApprovalFilter, ApprovalRequest, Decided, RequestState, Store};

use crate::{cli::Output, config::Config, print::say, wiring};

#[derive(Debug, Subcommand)]
pub(crate) enum ApprovalsCommand {
    /// List requests, the newest first; those that wait, unless another state is named
    List(ListArgs),
    /// Show one request with everything an approver needs to know
    Show {
        #[command(flatten)]
        which: Which,
        #[arg(long, value_enum, default_value_t = Output::Table)]
        output: Output,
    },
    /// Approve a request: the person may go on, and the worker `accounts` makes the account
    Approve(DecideArgs),
    /// Deny a request
    Deny(DecideArgs),
}

#[derive(Debug, Args)]
pub(crate) struct ListArgs {
    /// pending, approved, denied, expired, or all
    #[arg(long, default_value = "pending", value_parser = state)]
    state: StateFilter,
    /// Only of this connector
    #[arg(long, value_name = "NAME")]
    connector: Option<ConnectorName>,
    /// Only of this person (the pseudonym in events)
    #[arg(long, value_name = "PSEUDONYM")]
    person: Option<String>,
    /// At most so many
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=500))]
    limit: u32,
    #[arg(long, value_enum, default_value_t = Output::Table)]
    output: Output,
}

#[derive(Debug, Args)]
pub(crate) struct Which {
    /// The request: its id or the beginning of it, or the id of any of its `pending` events
    #[arg(value_name = "REQUEST")]
    request: String,
}

#[derive(Debug, Args)]
pub(crate) struct DecideArgs {
    #[command(flatten)]
    which: Which,
    /// Why; kept with the decision and in its event
    #[arg(long, value_name = "TEXT", value_parser = reason)]
    reason: Option<String>,
    /// Who decides; kept with the decision and in its event
    #[arg(long, value_name = "NAME", env = "USER", value_parser = approver)]
    by: String,
    #[arg(long, value_enum, default_value_t = Output::Table)]
    output: Output,
}

#[derive(Clone, Copy, Debug)]
struct StateFilter(Option<RequestState>);

fn state(word: &str) -> Result<StateFilter, vestibule_store::UnknownState> {
    if word == "all" { Ok(StateFilter(None)) } else { word.parse().map(|it| StateFilter(Some(it))) }
}

/// A decision that is nobody's is none.
pub(crate) fn approver(name: &str) -> Result<String, String> {
    let name = name.trim();
    if name.is_empty() {
        return Err("name who decides".to_owned());
    }
    Ok(name.to_owned())
}

/// It goes into an event, and an event has to fit into a stream.
fn reason(text: &str) -> Result<String, String> {
    let longest = ApprovalDesk::REASON_CHARS_MAX;
    if text.chars().count() > longest {
        return Err(format!("a reason has at most {longest} characters"));
    }
    Ok(text.to_owned())
}

pub(crate) async fn approvals(command: ApprovalsCommand, config: &Config) -> anyhow::Result<()> {
    let store = wiring::existing_store(config).await?;
    match command {
        ApprovalsCommand::List(args) => list(&store, args).await,
        ApprovalsCommand::Show { which, output } => {
            show(&find(&store, &which.request).await?, output)
        }
        ApprovalsCommand::Approve(args) => decide(config, &store, Verdict::Approve, args).await,
        ApprovalsCommand::Deny(args) => decide(config, &store, Verdict::Deny, args).await,
    }
}

async fn list(store: &Store, args: ListArgs) -> anyhow::Result<()> {
    let ListArgs { state: StateFilter(state), connector, person, limit, output } = args;
    let person = person.map(Person::from_pseudonym);
    let filter = ApprovalFilter { state, person, connector, before: None, limit };
    let requests = store.approval_requests(&filter).await.context("could not read the requests")?;
    match output {
        Output::Json => {
            let requests: Vec<_> = requests.iter().map(as_json).collect();
            say!("{}", Value::from(requests))?;
        }
        Output::Table if requests.is_empty() => {
            let state = state.map_or(String::new(), |it| format!("{it} "));
            say!("there is no {state}request for approval")?;
        }
        Output::Table => {
            let mut table = Table::new();
            table.load_style(NOTHING);
            table.set_header(["request", "state", "requested", "expires", "connector", "e-mail"]);
            for it in &requests {
                table.add_row([
                    it.id.to_string(),
                    it.state.to_string(),
                    at(it.requested_at),
                    at(it.expires_at),
                    it.connector.to_string(),
                    email(it).unwrap_or("-").to_owned(),
                ]);
            }
            say!("{table}")?;
            if requests.len() == usize::try_from(limit).unwrap_or(usize::MAX) {
                say!("there may be more; --limit shows up to 500")?;
            }
        }
    }
    Ok(())
}

async fn find(store: &Store, request: &str) -> anyhow::Result<ApprovalRequest> {
    let mut found = store
        .approval_requests_like(request.trim())
        .await
        .context("could not read the requests")?;
    match (found.pop(), found.len()) {
        (Some(request), 0) => Ok(request),
        (Some(_), others) => {
            bail!("`{request}` is the beginning of {} requests; write more of it", others + 1)
        }
        (None, _) => bail!(
            "there is no request `{request}`; `vestibule approvals list --state all` shows which \
             there are"
        ),
    }
}

fn show(request: &ApprovalRequest, output: Output) -> anyhow::Result<()> {
    if output == Output::Json {
        say!("{}", as_json(request))?;
        return Ok(());
    }
    let sign_up = &request.event.sign_up;
    let mut table = Table::new();
    table.load_style(NOTHING);
    let mut row = |name: &str, value: Option<String>| {
        if let Some(value) = value {
            table.add_row([name.to_owned(), value]);
        }
    };
    row("request", Some(request.id.to_string()));
    row("state", Some(request.state.to_string()));
    row("decided by", request.decided_by.clone());
    row("decided at", request.decided_at.map(at));
    row("reason", request.reason.clone());
    row("requested", Some(at(request.requested_at)));
    row("expires", Some(at(request.expires_at)));
    row("attempts", Some(request.attempts.to_string()));
    row("connector", Some(request.connector.to_string()));
    row("person", Some(request.person.to_string()));
    row("e-mail", email(request).map(str::to_owned));
    for identity in &sign_up.identities {
        row("signs in with", Some(identity.issuer.clone()));
    }
    let changed = request.event.decision.outcome.changed_claims();
    for (name, value) in &sign_up.claims {
        let value = changed.and_then(|it| it.get(name)).unwrap_or(value);
        row(name, Some(value.as_str().map_or_else(|| value.to_string(), str::to_owned)));
    }
    let rules = request.event.decision.reasons.iter();
    let rules = rules.map(|it| format!("{} ({})", it.rule, it.effect.as_str()));
    row("rules", Some(rules.collect::<Vec<_>>().join(", ")));
    say!("{table}")?;
    Ok(())
}

async fn decide(
    config: &Config,
    store: &Store,
    verdict: Verdict,
    args: DecideArgs,
) -> anyhow::Result<()> {
    let DecideArgs { which, reason, by, output } = args;
    let request = find(store, &which.request).await?;
    let key = Arc::new(wiring::pseudonym_key(config)?);
    let desk = ApprovalDesk::new(Arc::new(OnceLock::from(store.clone())), key);
    let decided = desk.decide(&request, verdict, by.trim(), reason).await;
    let id = request.id;
    match decided.context("could not decide the request; nothing has changed")? {
        Decided::Now => {
            let request = find(store, &id.to_string()).await?;
            match output {
                Output::Json => say!("{}", as_json(&request))?,
                Output::Table => say!(
                    "request {id} is {}; its event is published by the running `vestibule up` or \
                     `vestibule api`",
                    request.state
                )?,
            }
            Ok(())
        }
        Decided::Already(by_other) => {
            let state = by_other.state;
            let by = by_other.decided_by.as_deref().unwrap_or("somebody");
            let when = by_other.decided_at.map(at).unwrap_or_default();
            bail!("request {id} was {state} by {by} at {when} already; nothing has changed")
        }
        Decided::Expired => bail!(
            "request {id} has expired: nobody decided until {}; the person may sign up again",
            at(request.expires_at)
        ),
        Decided::NotFound => bail!("request {id} is not there any more"),
    }
}

fn as_json(request: &ApprovalRequest) -> Value {
    json!({
        "request": request.id,
        "state": request.state.as_str(),
        "person": request.person,
        "connector": request.connector,
        "requested_at": at(request.requested_at),
        "expires_at": at(request.expires_at),
        "attempts": request.attempts,
        "decided_at": request.decided_at.map(at),
        "decided_by": request.decided_by,
        "reason": request.reason,
        "event": request.event,
    })
}

fn email(request: &ApprovalRequest) -> Option<&str> {
    request.event.sign_up.email.as_ref().map(vestibule_events::Email::expose)
}

pub(crate) fn at(time: OffsetDateTime) -> String {
    let seconds = time.replace_nanosecond(0).unwrap_or(time);
    seconds.format(&Rfc3339).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_decision_is_somebodys() {
        assert!(approver("").is_err() && approver(" ").is_err());
        assert_eq!(approver(" Grace ").as_deref(), Ok("Grace"));
    }

    #[test]
    fn a_reason_is_no_document() {
        let longest = "ä".repeat(ApprovalDesk::REASON_CHARS_MAX);
        assert_eq!(reason(&longest), Ok(longest.clone()));
        assert!(reason(&(longest + "!")).is_err());
    }
}
