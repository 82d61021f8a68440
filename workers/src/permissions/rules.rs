//! Conditions, compiled; what an event earns. Pure.

use std::fmt;

use cel::Program;

use super::{GrantRule, PermissionsSettings};

/// Why a rule cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RuleError {
    /// Which rule, from 0.
    pub index: usize,
    pub rule: String,
    /// The key that is at fault: `name`, `when` or `role`.
    pub key: &'static str,
    pub message: String,
}

impl fmt::Display for RuleError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rule `{}`: {}: {}", self.rule, self.key, self.message)
    }
}

impl std::error::Error for RuleError {}
