//! What was decided about a sign-up, and why.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::Claims;

/// The answer in no dialect yet, with the rules that led to it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Decision {
    pub outcome: Outcome,
    /// The rules that matched, in the order they ran.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub reasons: Vec<Reason>,
}

/// What becomes of the sign-up. Each dialect has its own words for these.
#[derive(Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "action", rename_all = "kebab-case")]
pub enum Outcome {
    /// Goes on; `claims` holds only what the platform is to change.
    Continue {
        #[serde(default, skip_serializing_if = "serde_json::Map::is_empty")]
        claims: Claims,
    },
    /// The person is asked to correct the form.
    Reject {
        message: String,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        field: Option<String>,
    },
    /// The sign-up ends here.
    Block { message: String },
}

/// Leaves claims out: they are personal data.
impl std::fmt::Debug for Outcome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

impl Outcome {
    /// Goes on without a change.
    #[must_use]
    pub fn unchanged() -> Self {
        Self::Continue { claims: Claims::new() }
    }

    /// A short name for logs and metrics.
    #[must_use]
    pub const fn as_str(&self) -> &'static str {
        match self {
            Self::Continue { .. } => "continue",
            Self::Reject { .. } => "reject",
            Self::Block { .. } => "block",
        }
    }

    /// Whether the person was turned away, so that a mended rule should take hold soon.
    #[must_use]
    pub const fn is_refusal(&self) -> bool {
        matches!(self, Self::Reject { .. } | Self::Block { .. })
    }
}

/// One rule that had a part in a decision.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Reason {
    pub rule: String,
    pub effect: Effect,
}

/// What a rule did.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Effect {
    Set,
    Reject,
    Block,
    /// The rule could not be evaluated, and its failure policy was to go on.
    Failed,
    /// The rule could not be evaluated, and its failure policy was to reject.
    FailedReject,
    /// The rule could not be evaluated, and its failure policy was to block.
    FailedBlock,
}
