//! Grants roles to people by rules over their claims.
//!
//! Each rule is a CEL condition over `signup.*` and names a role. What an event earns is written
//! together, once, each grant with the rule as its reason. Taking roles away is left to others.

mod rules;

use std::time::Duration;

use async_trait::async_trait;
use time::OffsetDateTime;
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
        let earned = self
            .rules
            .earned(&task.event)
            .map_err(|failed| HandleError::park(Cause::InvalidRule, failed))?;
        let now = OffsetDateTime::now_utc();
        self.store.grant(Self::NAME, &task.event, &earned, now).await?;
        Ok(())
    }
}
