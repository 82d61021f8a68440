//! Grants roles to people by rules over their claims.
//!
//! Each rule is a CEL condition over `signup.*` and names a role. What an event earns is written
//! together, once, each grant with the rule as its reason. An event that turns a person away, or
//! leaves them waiting, earns nothing, whatever the rules say. Taking roles away is left to others.

mod rules;

use std::time::Duration;

use async_trait::async_trait;
use time::OffsetDateTime;
use vestibule_events::Kind;
use vestibule_store::Store;

pub use self::rules::RuleError;
use self::rules::Rules;
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

/// The worker `permissions`.
#[derive(Debug)]
pub struct Permissions {
    rules: Rules,
    store: Store,
}

impl Permissions {
    pub const NAME: &'static str = "permissions";

    /// What it is given where the configuration does not say: a yes, by rules or by an approver.
    pub const KINDS: &'static [Kind] = &[Kind::Accepted, Kind::Approved];

    /// Compiles the rules, with all complaints at once.
    pub fn new(settings: PermissionsSettings, store: Store) -> Result<Self, Vec<RuleError>> {
        Ok(Self { rules: Rules::compile(settings.rules)?, store })
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

    /// The store writes the grants and its note of the event in one transaction, so an event that
    /// comes again grants nothing again.
    async fn handle(&self, task: &Task) -> Result<(), HandleError> {
        if !may_earn(task.event.kind) {
            return Ok(());
        }
        let earned = self
            .rules
            .earned(&task.event)
            .map_err(|failed| HandleError::park(Cause::InvalidRule, failed))?;
        let now = OffsetDateTime::now_utc();
        self.store.grant(Self::NAME, &task.event, &earned, now).await?;
        Ok(())
    }
}

const fn may_earn(kind: Kind) -> bool {
    match kind {
        Kind::Screened | Kind::Accepted | Kind::Approved | Kind::Confirmed => true,
        Kind::Rejected | Kind::Blocked | Kind::Pending | Kind::Denied | Kind::Abandoned => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Stage, approved, sign_up, task};

    #[tokio::test]
    async fn only_a_yes_earns_roles_whatever_events_come() -> anyhow::Result<()> {
        let stage = Stage::open().await?;
        let rule = GrantRule {
            name: "everybody".into(),
            when: "true".into(),
            role: "guest".into(),
            expires_after: None,
        };
        let worker =
            Permissions::new(PermissionsSettings { rules: vec![rule] }, stage.store.clone())
                .unwrap();
        let roles = async |event: vestibule_events::SignUpEvent| {
            worker.handle(&task(event.clone())).await?;
            anyhow::Ok(stage.store.grants_of(&event.person).await?.len())
        };

        for kind in Kind::ALL {
            let mut event = sign_up(kind.as_str());
            event.kind = kind;
            assert_eq!(roles(event).await?, usize::from(may_earn(kind)), "{kind}");
        }
        assert_eq!(roles(approved("ada")).await?, 1);
        for kind in Permissions::KINDS {
            assert!(may_earn(*kind), "{kind}");
        }
        Ok(())
    }
}
