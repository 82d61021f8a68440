//! Grants roles to people by rules over their claims.
//!
//! Each rule is a CEL condition over `signup.*` and names a role. What an event earns is written
//! together, once, each grant with the rule as its reason. Taking roles away is left to others.

mod rules;

use std::time::Duration;

pub use self::rules::RuleError;

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
