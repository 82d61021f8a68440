//! `vestibule permissions`: which roles people have, and whether targets hold what they should.
//!
//! `list` and `revoke` work on the store alone, so they can be run wherever the store can be reached;
//! a running worker takes from the targets what was revoked. `diff` asks the targets themselves, and
//! needs their secrets. People are named by their pseudonym; whoever has the key may name them by
//! their address, which is never printed.

use std::{collections::BTreeMap, process::ExitCode};

use anyhow::{Context, bail};
use clap::{Args, Subcommand};
use comfy_table::{Table, presets::NOTHING};
use serde_json::{Value, json};
use time::OffsetDateTime;
use vestibule_events::{Email, Person};
use vestibule_store::{Grant, GrantFilter, GrantTarget, GrantTargetFilter, Revocation, Store};
use vestibule_workers::{Comparison, Difference, HandleError, PermissionTargets, Permissions};

use crate::{
    approvals::{approver, at},
    cli::Output,
    config::{Config, EffectConfig},
    dead::reason,
    print::say,
    replay::parse_pseudonym,
    wiring,
};

const EXAMPLES: &str = "\
Examples:
  vestibule permissions list --person ada@example.com
      Which roles does this person have, and which targets hold them?
  vestibule permissions diff
      Do the targets hold what they should? Exits with 1 where they do not.
  vestibule permissions diff --fix
      And make them so.
  vestibule permissions revoke ada@example.com --role orders.create --reason 'left us'";

#[derive(Debug, Subcommand)]
#[command(after_help = EXAMPLES)]
pub(crate) enum PermissionsCommand {
    /// List who was granted which role, and what targets hold of it
    List(ListArgs),
    /// Compare what targets hold with what they should; exits with 1 where they differ
    Diff(DiffArgs),
    /// Take a role from a person, or all of them
    ///
    /// A running worker `permissions` takes it from the targets, and goes on trying where one is down;
    /// without one, `vestibule permissions diff --fix` does. Whoever signs up anew may earn it again.
    Revoke(RevokeArgs),
}

#[derive(Debug, Args)]
pub(crate) struct ListArgs {
    /// Only of this person: the pseudonym in events, or the mail address
    #[arg(long, value_name = "PERSON", value_parser = named)]
    person: Option<Named>,
    /// Only this role
    #[arg(long, value_name = "NAME")]
    role: Option<String>,
    /// At most so many
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    limit: u32,
    #[arg(long, value_enum, default_value_t = Output::Table)]
    output: Output,
}

#[derive(Debug, Args)]
pub(crate) struct DiffArgs {
    /// Only of this person: the pseudonym in events, or the mail address
    #[arg(long, value_name = "PERSON", value_parser = named)]
    person: Option<Named>,
    /// Make the targets hold what they should
    #[arg(long)]
    fix: bool,
    #[arg(long, value_enum, default_value_t = Output::Table)]
    output: Output,
}

#[derive(Debug, Args)]
pub(crate) struct RevokeArgs {
    /// From whom: the pseudonym in events, or the mail address
    #[arg(value_name = "PERSON", value_parser = named)]
    person: Named,
    /// Only this role; without it, all
    #[arg(long, value_name = "NAME")]
    role: Option<String>,
    /// Why; kept with the grant. No personal data, please
    #[arg(long, value_name = "TEXT", value_parser = reason)]
    reason: String,
    /// Who revokes it; kept with the grant
    #[arg(long, value_name = "NAME", env = "USER", value_parser = approver)]
    by: String,
    /// Only say what would be revoked
    #[arg(long)]
    dry_run: bool,
    #[arg(long, value_enum, default_value_t = Output::Table)]
    output: Output,
}

/// A person as somebody names them.
#[derive(Clone, Debug)]
enum Named {
    Pseudonym(Person),
    Address(Email),
}

fn named(text: &str) -> Result<Named, String> {
    let text = text.trim();
    if text.contains('@') {
        return Ok(Named::Address(Email::new(text)));
    }
    parse_pseudonym(text).map(Named::Pseudonym).map_err(|error| format!("{error}; or an address"))
}

impl Named {
    fn person(&self, config: &Config) -> anyhow::Result<Person> {
        Ok(match self {
            Self::Pseudonym(person) => person.clone(),
            Self::Address(email) => {
                let key = wiring::pseudonym_key(config);
                key.context("without the key nobody can be found by their address")?
                    .person_with_email(email)
            }
        })
    }
}

pub(crate) async fn permissions(
    command: PermissionsCommand,
    config: &Config,
) -> anyhow::Result<ExitCode> {
    let store = wiring::existing_store(config).await?;
    match command {
        PermissionsCommand::List(args) => list(config, &store, &args).await,
        PermissionsCommand::Diff(args) => return diff(config, &store, &args).await,
        PermissionsCommand::Revoke(args) => revoke(config, &store, &args).await,
    }?;
    Ok(ExitCode::SUCCESS)
}

async fn list(config: &Config, store: &Store, args: &ListArgs) -> anyhow::Result<()> {
    let ListArgs { person, role, limit, output } = args;
    let person = person.as_ref().map(|it| it.person(config)).transpose()?;
    let filter = GrantFilter { person, role: role.clone(), after: None, limit: *limit };
    let grants = store.grants(&filter).await.context("could not read the grants")?;
    let mut held = held(store, &grants).await?;
    let now = OffsetDateTime::now_utc();
    let mut of =
        |it: &Grant| held.remove(&(it.person.clone(), it.role.clone())).unwrap_or_default();
    match output {
        Output::Json => {
            let grants: Vec<_> = grants.iter().map(|it| grant_as_json(it, &of(it), now)).collect();
            say!("{}", Value::from(grants))?;
        }
        Output::Table if grants.is_empty() => say!("no role was granted")?,
        Output::Table => {
            let mut table = Table::new();
            table.load_style(NOTHING);
            table.set_header(["person", "role", "state", "granted", "expires", "by", "targets"]);
            for it in &grants {
                table.add_row([
                    it.person.to_string(),
                    it.role.clone(),
                    state(it, now).to_owned(),
                    at(it.granted_at),
                    it.expires_at.map_or("-".to_owned(), at),
                    it.reason.clone(),
                    of(it).iter().map(in_words).collect::<Vec<_>>().join(", "),
                ]);
            }
            say!("{table}")?;
            if grants.len() == usize::try_from(*limit).unwrap_or(usize::MAX) {
                say!("there may be more; --limit shows up to 10000")?;
            }
        }
    }
    Ok(())
}

type Held = BTreeMap<(Person, String), Vec<GrantTarget>>;

/// What targets hold of grants, which come by person.
async fn held(store: &Store, grants: &[Grant]) -> anyhow::Result<Held> {
    let mut held = Held::new();
    let mut persons: Vec<_> = grants.iter().map(|it| it.person.clone()).collect();
    persons.dedup();
    for person in persons {
        let filter = GrantTargetFilter {
            person: Some(person),
            limit: 10_000,
            ..GrantTargetFilter::default()
        };
        let rows = store.grant_targets(&filter).await.context("could not read the grants")?;
        for row in rows {
            held.entry((row.person.clone(), row.role.clone())).or_default().push(row);
        }
    }
    Ok(held)
}

fn state(grant: &Grant, now: OffsetDateTime) -> &'static str {
    match grant {
        it if it.revoked_at.is_some() => "revoked",
        it if it.is_in_force(now) => "in force",
        _ => "expired",
    }
}

fn in_words(row: &GrantTarget) -> String {
    let GrantTarget { target, wanted, tries, .. } = row;
    match (row.is_pending, tries) {
        (false, _) => format!("{target}: {wanted}"),
        (true, 0) => format!("{target}: to be {wanted}"),
        (true, tries) => format!("{target}: to be {wanted}, failed {tries} times"),
    }
}

fn grant_as_json(grant: &Grant, rows: &[GrantTarget], now: OffsetDateTime) -> Value {
    let rows: Vec<_> = rows
        .iter()
        .map(|it| {
            json!({
                "target": it.target,
                "wanted": it.wanted.as_str(),
                "state": if it.is_pending { "pending" } else { "applied" },
                "since": at(it.since),
                "applied_at": it.applied_at.map(at),
                "tries": it.tries,
                "error": it.error,
                "due_at": it.due_at.map(at),
                "account": it.seen.account,
            })
        })
        .collect();
    json!({
        "person": grant.person,
        "role": grant.role,
        "state": state(grant, now),
        "rule": grant.reason,
        "event": grant.event_id,
        "granted_at": at(grant.granted_at),
        "expires_at": grant.expires_at.map(at),
        "revoked_at": grant.revoked_at.map(at),
        "revoked_by": grant.revoked_by,
        "revoke_reason": grant.revoke_reason,
        "targets": rows,
    })
}

async fn diff(config: &Config, store: &Store, args: &DiffArgs) -> anyhow::Result<ExitCode> {
    let DiffArgs { person, fix, output } = args;
    let person = person.as_ref().map(|it| it.person(config)).transpose()?;
    let targets = targets(config, store)?;
    let comparison = targets.compare(person.as_ref()).await.context("could not read the grants")?;
    let mut found = Vec::with_capacity(comparison.differences.len());
    for difference in &comparison.differences {
        let outcome = if *fix { Some(repaired(&targets, difference).await) } else { None };
        found.push((difference, outcome));
    }
    match output {
        Output::Json => say!("{}", comparison_as_json(&comparison, &found))?,
        Output::Table => show(&comparison, &found, *fix)?,
    }
    let is_well = found.iter().all(|(_, outcome)| matches!(outcome, Some(None)));
    Ok(if is_well && comparison.unreadable.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn targets(config: &Config, store: &Store) -> anyhow::Result<PermissionTargets> {
    let worker = config.workers.iter().find(|it| it.name() == Permissions::NAME);
    let Some((worker, EffectConfig::Permissions(permissions))) = worker.map(|it| (it, &it.effect))
    else {
        bail!("the configuration has no [workers.permissions]");
    };
    if permissions.targets.is_empty() {
        bail!("the configuration has no [[workers.permissions.targets]] to compare with");
    }
    wiring::permission_targets(permissions, worker.settings.timeout, store)
}

/// Why a difference could not be mended; `None` where it was.
async fn repaired(targets: &PermissionTargets, difference: &Difference) -> Option<String> {
    match targets.repair(difference).await.err()? {
        HandleError::Retry { source, .. }
        | HandleError::Park { source, .. }
        | HandleError::StoreUnavailable(source) => Some(format!("{source:#}")),
    }
}

/// With what became of it, where it was to be mended.
type Found<'a> = (&'a Difference, Option<Option<String>>);

fn show(comparison: &Comparison, found: &[Found<'_>], fix: bool) -> anyhow::Result<()> {
    if !found.is_empty() {
        let mut table = Table::new();
        table.load_style(NOTHING);
        table.set_header(["person", "role", "target", "wanted", "actual", ""]);
        for (it, outcome) in found {
            table.add_row([
                it.grant.person.to_string(),
                it.grant.role.clone(),
                it.target.clone(),
                it.wanted.to_string(),
                it.actual.as_str().to_owned(),
                remark(it, outcome.as_ref()),
            ]);
        }
        say!("{table}\n")?;
    }
    for it in &comparison.unreadable {
        say!("could not compare role {} at {}: {}", it.role, it.target, it.error)?;
    }
    let failed = found.iter().filter(|(_, outcome)| matches!(outcome, Some(Some(_)))).count();
    let (compared, differ) = (comparison.compared, found.len());
    match (differ, fix) {
        (0, _) => say!("{compared} compared: the targets hold what they should")?,
        (_, false) => {
            say!(
                "{compared} compared, {differ} differ; `vestibule permissions diff --fix` mends them"
            )?;
        }
        (_, true) => say!("{compared} compared, {differ} differed, {} mended", differ - failed)?,
    }
    if comparison.unknown > 0 {
        let unknown = comparison.unknown;
        say!("{unknown} of them cannot be compared: the target has no statement `holds`")?;
    }
    Ok(())
}

fn remark(difference: &Difference, outcome: Option<&Option<String>>) -> String {
    match outcome {
        Some(None) => "mended".to_owned(),
        Some(Some(error)) => error.clone(),
        None if difference.is_pending() => "is being seen to".to_owned(),
        None => String::new(),
    }
}

fn comparison_as_json(comparison: &Comparison, found: &[Found<'_>]) -> Value {
    let differences: Vec<_> = found
        .iter()
        .map(|(it, outcome)| {
            json!({
                "person": it.grant.person,
                "role": it.grant.role,
                "target": it.target,
                "wanted": it.wanted.as_str(),
                "actual": it.actual.as_str(),
                "pending": it.is_pending(),
                "fixed": outcome.as_ref().map(Option::is_none),
                "error": outcome.as_ref().and_then(Option::as_ref),
            })
        })
        .collect();
    let unreadable: Vec<_> = comparison
        .unreadable
        .iter()
        .map(|it| json!({ "target": it.target, "role": it.role, "error": it.error }))
        .collect();
    json!({
        "compared": comparison.compared,
        "unknown": comparison.unknown,
        "differences": differences,
        "unreadable": unreadable,
    })
}

async fn revoke(config: &Config, store: &Store, args: &RevokeArgs) -> anyhow::Result<()> {
    let RevokeArgs { person, role, reason, by, dry_run, output } = args;
    let person = person.person(config)?;
    let now = OffsetDateTime::now_utc();
    let roles = if *dry_run {
        let grants = store.grants_of(&person).await.context("could not read the grants")?;
        let meant = |it: &Grant| {
            it.revoked_at.is_none() && role.as_ref().is_none_or(|role| *role == it.role)
        };
        grants.into_iter().filter(meant).map(|it| it.role).collect()
    } else {
        let revocation = Revocation { by, reason };
        let revoked = store.revoke_grants(&person, role.as_deref(), revocation, now).await;
        revoked.context("could not revoke; nothing has changed")?
    };
    match output {
        Output::Json => {
            say!("{}", json!({ "person": person, "dry_run": dry_run, "revoked": roles }))?;
        }
        Output::Table if roles.is_empty() => {
            say!("{person} has no such role; nothing has changed")?;
        }
        Output::Table if *dry_run => {
            say!("{} would be revoked of {person}; nothing was changed", roles.join(", "))?;
        }
        Output::Table => {
            let roles = roles.join(", ");
            say!(
                "{roles} revoked of {person}; the running worker takes them from the targets, and \
                 `vestibule permissions diff` shows what is left"
            )?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn people_are_named_by_pseudonym_or_address() {
        assert!(matches!(named(" ada@example.com "), Ok(Named::Address(_))));
        assert!(matches!(named(&"0123456789abcdef".repeat(2)), Ok(Named::Pseudonym(_))));
        assert!(named("ada").is_err() && named("").is_err());
        let shown = format!("{:?}", named("ada@example.com"));
        assert!(!shown.contains("ada"), "{shown}");
    }
}
