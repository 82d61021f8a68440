//! Grants roles to people by rules over their claims, and sees to it that targets hold them.
//!
//! Each rule is a CEL condition over `signup.*` and names a role. What an event earns is written
//! together, once, each grant with the rule as its reason and with the targets that are to hold it:
//! that is what is wanted. Then the targets are made so, one call at a time, each noted when it is
//! done; whatever stops in between, the event comes again and goes on where it stopped. An event that
//! turns a person away, or leaves them waiting, earns nothing, whatever the rules say.
//!
//! Beside the events goes what is taken away: roles that expire, that somebody revokes, or whose
//! sign-up came to nothing. That is tried until it is done, for ever, so no event waits for it.

mod drift;
mod reconcile;
mod rules;
mod targets;
#[cfg(test)]
mod tests;

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use async_trait::async_trait;
use time::OffsetDateTime;
use tracing::warn;
use vestibule_events::Kind;
use vestibule_store::{Revocation, Store};

use self::rules::Rules;
pub use self::{
    drift::Difference,
    reconcile::{Comparison, PermissionTargets, Unreadable},
    rules::RuleError,
    targets::{Actual, ScimSettings, SqlSettings, TargetError, TargetKind, TargetSettings},
};
use crate::{Cause, HandleError, Task, Worker};

/// The rules, in the order in which their grants are written.
#[derive(Clone, Debug, Default)]
pub struct PermissionsSettings {
    pub rules: Vec<GrantRule>,
}

/// Who gets a role.
#[derive(Clone, Debug)]
pub struct GrantRule {
    /// The reason that is written with the grant.
    pub name: String,
    /// CEL over `signup.*`, as in the rules of a connector.
    pub when: String,
    pub role: String,
    /// Counted from the event.
    pub expires_after: Option<Duration>,
}

/// Between two looks at what is due: roles expire, and are revoked by others, who tell nobody.
const POLL: Duration = Duration::from_secs(2);

/// The worker `permissions`.
#[derive(Debug)]
pub struct Permissions {
    rules: Rules,
    targets: PermissionTargets,
    store: Store,
    /// Whether the last look at what is due came through: only a change is told.
    is_well: AtomicBool,
}

impl Permissions {
    pub const NAME: &'static str = "permissions";

    /// What it is given where the configuration does not say: a yes, by rules or by an approver, and
    /// that it came to nothing.
    pub const KINDS: &'static [Kind] = &[Kind::Accepted, Kind::Approved, Kind::Abandoned];

    /// Compiles the rules, with all complaints at once.
    pub fn new(
        settings: PermissionsSettings,
        targets: PermissionTargets,
        store: Store,
    ) -> Result<Self, Vec<RuleError>> {
        Ok(Self {
            rules: Rules::compile(settings.rules)?,
            targets,
            store,
            is_well: AtomicBool::new(true),
        })
    }

    /// What `new` would complain about.
    pub fn check(settings: &PermissionsSettings) -> Result<(), Vec<RuleError>> {
        Rules::compile(settings.rules.clone()).map(drop)
    }
}

#[async_trait]
impl Worker for Permissions {
    fn name(&self) -> &str {
        Self::NAME
    }

    /// The store writes the grants and its note of that in one transaction, so an event that comes
    /// again grants nothing again, and only goes on with what targets still lack. It is dealt with
    /// once they lack nothing.
    async fn handle(&self, task: &Task) -> Result<(), HandleError> {
        let (event, now) = (&task.event, OffsetDateTime::now_utc());
        if let (Kind::Abandoned, Some(confirmation)) = (event.kind, &event.confirmation) {
            let revocation = Revocation { by: Self::NAME, reason: "the sign-up came to nothing" };
            self.store
                .revoke_grants_of(Self::NAME, event, confirmation.of, revocation, now)
                .await?;
            return Ok(());
        }
        if !may_earn(event.kind) {
            return Ok(());
        }
        let earned = self
            .rules
            .earned(event)
            .map_err(|failed| HandleError::park(Cause::InvalidRule, failed))?;
        let targets = |role: &str| self.targets.of_role(role);
        self.store.grant_at(Self::NAME, event, &earned, targets, now).await?;
        if earned.iter().all(|it| targets(&it.role).is_empty()) {
            return Ok(());
        }
        self.targets.carry_through(event).await?;
        self.store.mark_done(Self::NAME, event.id, OffsetDateTime::now_utc()).await?;
        Ok(())
    }

    fn has_one_target(&self) -> bool {
        self.targets.len() <= 1
    }

    /// Looks at what is due.
    async fn tend(&self) -> Option<Duration> {
        let looked = self.targets.sweep().await;
        let was_well = self.is_well.swap(looked.is_ok(), Ordering::Relaxed);
        if let (true, Err(error)) = (was_well, &looked) {
            warn!(
                worker = Self::NAME,
                error = %error.cause(),
                "cannot see which roles have expired or were revoked; trying again"
            );
        }
        Some(POLL)
    }
}

const fn may_earn(kind: Kind) -> bool {
    match kind {
        Kind::Screened | Kind::Accepted | Kind::Approved | Kind::Confirmed => true,
        Kind::Rejected | Kind::Blocked | Kind::Pending | Kind::Denied | Kind::Abandoned => false,
    }
}
