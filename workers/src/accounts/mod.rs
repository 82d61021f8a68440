//! Makes the account of an approved sign-up through Microsoft Graph.
//!
//! The platform does not go on with a sign-up that waited for an approver, so we make the account:
//! we create it where the person signs in with Google, Facebook or codes by mail, and invite them
//! otherwise, with the claims in force after the decision. One approved event makes at most one
//! account: we look for the person first, note in the store what we are about to do, and do each
//! step again only where it does no harm. An account that was there before is left as it is, for
//! what somebody typed into a form is no reason to overwrite it. Taking accounts away is left to
//! others.

mod plan;
#[cfg(test)]
mod tests;

use std::time::Duration;

use anyhow::anyhow;
use async_trait::async_trait;
use serde_json::{Map, Value};
use time::OffsetDateTime;
use tracing::info;
use vestibule_events::{Identity, Kind, SignUpEvent};
use vestibule_store::{Account, AccountOrigin, Done, MadeAccount, Store};

use self::plan::{House, Plan};
use crate::{
    Cause, GraphSettings, HandleError, SettingError, Task, Worker,
    graph::{Found, Graph, GraphError, Problem},
    http,
};

/// Clocks of ours and of the directory may differ by so much.
const SKEW: Duration = Duration::from_secs(5 * 60);

/// How accounts are made.
#[derive(Clone, Debug)]
pub struct AccountsSettings {
    pub graph: GraphSettings,
    /// The directory's first domain, such as `contoso.onmicrosoft.com`; accounts are named in it.
    pub domain: String,
    /// Where an invited person goes after accepting.
    pub invite_redirect_url: String,
    /// Whether Microsoft writes to an invited person. Otherwise a notification should.
    pub send_invitation_message: bool,
    /// How long what we made may stay invisible to us before we give up.
    pub replication_window: Duration,
    /// After an invitation that ended without an answer, so long none is sent again: the first one
    /// may have worked, and be found by then.
    pub settling: Duration,
}

impl AccountsSettings {
    pub const REPLICATION_WINDOW: Duration = Duration::from_secs(10 * 60);
    pub const SETTLING: Duration = Duration::from_secs(30);

    #[must_use]
    pub fn new(
        graph: GraphSettings,
        domain: impl Into<String>,
        invite_redirect_url: impl Into<String>,
    ) -> Self {
        Self {
            graph,
            domain: domain.into(),
            invite_redirect_url: invite_redirect_url.into(),
            send_invitation_message: false,
            replication_window: Self::REPLICATION_WINDOW,
            settling: Self::SETTLING,
        }
    }
}

/// The worker `accounts`.
#[derive(Debug)]
pub struct Accounts {
    graph: Graph,
    house: House,
    replication_window: Duration,
    settling: Duration,
    store: Store,
}

impl Accounts {
    pub const NAME: &'static str = "accounts";

    /// What it acts on; other events pass by.
    pub const KINDS: &'static [Kind] = &[Kind::Approved];

    /// Checks the settings, with all complaints at once. Nothing is called yet.
    pub fn new(settings: AccountsSettings, store: Store) -> Result<Self, Vec<SettingError>> {
        let graph = parts(&settings)?;
        Ok(Self {
            graph,
            house: House {
                domain: settings.domain,
                invite_redirect_url: settings.invite_redirect_url,
                send_invitation_message: settings.send_invitation_message,
            },
            replication_window: settings.replication_window,
            settling: settings.settling,
            store,
        })
    }

    /// What `new` would complain about. The secret may be a stand-in.
    pub fn check(settings: &AccountsSettings) -> Result<(), Vec<SettingError>> {
        parts(settings).map(drop)
    }

    async fn create(
        &self,
        event: &SignUpEvent,
        identity: &Identity,
        user: &Value,
    ) -> Result<(), HandleError> {
        let found = self.graph.find_by_identity(identity).await?;
        let before = self.store.account(event.id).await?;
        if let Some(account) = account_among(found, before.as_ref(), AccountOrigin::Created) {
            return self.finish(event, &account).await;
        }
        let begun = self.store.begin_account(Self::NAME, event, now()).await?;
        let error = match self.graph.create_user(user).await {
            Ok(id) => return self.finish(event, &made(AccountOrigin::Created, id)).await,
            Err(error) => error,
        };
        // An account with this name or address is there. It may be the one that an attempt before
        // made, and lost the answer; a search may show it by now.
        if !matches!(error.problem, Problem::Conflict(_) | Problem::Invalid(_)) {
            return Err(error.into());
        }
        let found = self.graph.find_by_identity(identity).await?;
        if let Some(account) = account_among(found, Some(&begun), AccountOrigin::Created) {
            return self.finish(event, &account).await;
        }
        self.not_to_be_seen(error, begun.begun_at)
    }

    async fn invite(
        &self,
        event: &SignUpEvent,
        mail: &str,
        invitation: &Value,
    ) -> Result<MadeAccount, HandleError> {
        let found = self.graph.find_by_mail(mail).await?;
        // Read after the search: what another process made while we searched, it had noted before.
        let before = self.store.account(event.id).await?;
        if let Some(account) = account_among(found, before.as_ref(), AccountOrigin::Invited) {
            return Ok(account);
        }
        if let Some(before) = before {
            // It may have worked, and not be to be seen yet. To invite again makes no second
            // account, but the person might get a second mail.
            let rested = (now() - before.tried_at).try_into().unwrap_or(Duration::ZERO);
            if let Some(rest) = self.settling.checked_sub(rested).filter(|it| !it.is_zero()) {
                return Err(HandleError::Retry {
                    source: anyhow!("the invitation before this one may still show its effect"),
                    cause: Cause::NotYet,
                    after: Some(rest),
                });
            }
        }
        let begun = self.store.begin_account(Self::NAME, event, now()).await?;
        let error = match self.graph.invite(invitation).await {
            Ok(invited) => {
                let invitation_id = Some(invited.invitation);
                return Ok(MadeAccount {
                    invitation_id,
                    ..made(AccountOrigin::Invited, invited.user)
                });
            }
            Err(error) => error,
        };
        if !matches!(error.problem, Problem::Conflict(_)) {
            return Err(error.into());
        }
        let found = self.graph.find_by_mail(mail).await?;
        if let Some(account) = account_among(found, Some(&begun), AccountOrigin::Invited) {
            return Ok(account);
        }
        self.not_to_be_seen(error, begun.begun_at)
    }

    /// Writes the collected attributes into the account that an invitation made.
    async fn complete(
        &self,
        account: &MadeAccount,
        made_at: OffsetDateTime,
        attributes: Map<String, Value>,
    ) -> Result<(), HandleError> {
        if attributes.is_empty() {
            return Ok(());
        }
        let updated = self.graph.update_user(&account.object_id, &attributes.into()).await;
        match updated {
            Err(error) if matches!(error.problem, Problem::NotFound) => {
                self.not_to_be_seen(error, made_at)
            }
            other => Ok(other?),
        }
    }

    /// The directory has it, and another part of the directory does not show it. That passes; where
    /// it does not, somebody should look.
    fn not_to_be_seen<T>(
        &self,
        error: GraphError,
        since: OffsetDateTime,
    ) -> Result<T, HandleError> {
        let passes = matches!(error.problem, Problem::NotFound | Problem::Conflict(_));
        let waited = now() - since;
        if passes && waited < self.replication_window {
            return Err(HandleError::retry(Cause::NotYet, error));
        }
        if matches!(error.problem, Problem::Conflict(_)) {
            let source = anyhow::Error::from(error).context(
                "another account holds the name or the address of this person, and none with the \
                 person's identity is found; mend that in the directory, then redrive the event",
            );
            return Err(HandleError::park(Cause::Refused, source));
        }
        Err(error.into())
    }

    async fn finish(&self, event: &SignUpEvent, account: &MadeAccount) -> Result<(), HandleError> {
        let done = self.store.finish_account(Self::NAME, event, account, now()).await?;
        if done == Done::Now {
            info!(
                event = %event.id,
                person = %event.person,
                account = account.object_id,
                origin = account.origin.as_str(),
                "an approved person has an account"
            );
        }
        Ok(())
    }
}

#[async_trait]
impl Worker for Accounts {
    fn name(&self) -> &str {
        Self::NAME
    }

    async fn handle(&self, task: &Task) -> Result<(), HandleError> {
        let event = &task.event;
        if !Self::KINDS.contains(&event.kind) {
            return Ok(());
        }
        let before = self.store.account(event.id).await?;
        if before.as_ref().is_some_and(|it| it.finished_at.is_some()) {
            return Ok(());
        }
        let plan = Plan::of(event, &self.house)
            .map_err(|none| HandleError::park(Cause::InvalidRecipient, none))?;
        match plan {
            Plan::Create { identity, user } => self.create(event, &identity, &user).await,
            Plan::Invite { mail, invitation, attributes } => {
                let noted = before.and_then(|it| it.made.zip(it.made_at));
                let (account, made_at) = match noted {
                    Some(noted) => noted,
                    None => {
                        let account = self.invite(event, &mail, &invitation).await?;
                        let made_at = now();
                        self.store.account_made(Self::NAME, event, &account, made_at).await?;
                        (account, made_at)
                    }
                };
                if account.origin != AccountOrigin::Found {
                    self.complete(&account, made_at, attributes).await?;
                }
                self.finish(event, &account).await
            }
        }
    }
}

fn parts(settings: &AccountsSettings) -> Result<Graph, Vec<SettingError>> {
    let mut faults = Vec::new();
    let graph = Graph::new(&settings.graph, &mut faults);
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.');
    if !settings.domain.contains('.') || !settings.domain.chars().all(plain) {
        let message = "must be the directory's first domain, such as contoso.onmicrosoft.com";
        faults.push(SettingError { key: "domain", message: message.to_owned() });
    }
    if let Err(message) = http::address(&settings.invite_redirect_url) {
        faults.push(SettingError { key: "invite_redirect_url", message: message.to_owned() });
    }
    match graph {
        Some(graph) if faults.is_empty() => Ok(graph),
        _ => Err(faults),
    }
}

const fn made(origin: AccountOrigin, object_id: String) -> MadeAccount {
    MadeAccount { origin, object_id, invitation_id: None }
}

/// The person's account among those that a search shows: the one that we made and could not note,
/// or else one that was there before.
fn account_among(
    mut found: Vec<Found>,
    before: Option<&Account>,
    ours: AccountOrigin,
) -> Option<MadeAccount> {
    let is_ours = |found: &Found| {
        before.is_some_and(|before| {
            found.is_guest && found.created.is_some_and(|it| it >= before.begun_at - SKEW)
        })
    };
    if let Some(index) = found.iter().position(is_ours) {
        return Some(made(ours, found.swap_remove(index).id));
    }
    found.into_iter().next().map(|it| made(AccountOrigin::Found, it.id))
}

fn now() -> OffsetDateTime {
    OffsetDateTime::now_utc()
}
