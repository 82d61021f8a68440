//! What was decided about a sign-up, and why.
//!
//! The reasons name rules, lookups and times; none of them holds anything of the person, whose
//! claims stand in the sign-up and in the outcome and nowhere else.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::Claims;

/// The answer in no dialect yet, with what led to it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Decision {
    pub outcome: Outcome,
    /// The rules that matched, in the order they ran.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub reasons: Vec<Reason>,
    /// The lookups that were asked, in the order they were.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub lookups: Vec<LookupReason>,
}

impl Decision {
    /// A decision that no rule had a part in.
    #[must_use]
    pub const fn new(outcome: Outcome) -> Self {
        Self { outcome, reasons: Vec::new(), lookups: Vec::new() }
    }
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
    /// An approver has to say yes first; `claims` is what rules had changed by then, for the
    /// account that may be made.
    Pending {
        message: String,
        #[serde(default, skip_serializing_if = "serde_json::Map::is_empty")]
        claims: Claims,
    },
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
            Self::Pending { .. } => "pending",
        }
    }

    /// What rules changed, where the sign-up may still lead to an account.
    #[must_use]
    pub const fn changed_claims(&self) -> Option<&Claims> {
        match self {
            Self::Continue { claims } | Self::Pending { claims, .. } => Some(claims),
            Self::Reject { .. } | Self::Block { .. } => None,
        }
    }

    /// What the person is told, where they do not simply go on.
    #[must_use]
    pub fn message(&self) -> Option<&str> {
        match self {
            Self::Continue { .. } => None,
            Self::Reject { message, .. }
            | Self::Block { message }
            | Self::Pending { message, .. } => Some(message),
        }
    }

    /// Whether the person was turned away, so that a mended rule should take hold soon.
    #[must_use]
    pub const fn is_refusal(&self) -> bool {
        matches!(self, Self::Reject { .. } | Self::Block { .. } | Self::Pending { .. })
    }
}

/// One rule that had a part in a decision.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Reason {
    pub rule: String,
    /// What it did or, where it is not enforced, would have done.
    pub effect: Effect,
    #[serde(default, skip_serializing_if = "Mode::is_enforce")]
    pub mode: Mode,
    /// Why it could not be evaluated, where it could not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure: Option<String>,
    /// How long it took, lookups included, in microseconds.
    #[serde(default)]
    pub took_us: u32,
}

/// How seriously a rule is meant.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// Its outcome takes hold.
    #[default]
    Enforce,
    /// Only logged and counted, and a reason in the event.
    Warn,
    /// Only a reason in the event.
    Audit,
}

impl Mode {
    pub const ALL: [Self; 3] = [Self::Enforce, Self::Warn, Self::Audit];

    /// The name in configuration and events.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Enforce => "enforce",
            Self::Warn => "warn",
            Self::Audit => "audit",
        }
    }

    #[expect(clippy::trivially_copy_pass_by_ref, reason = "serde calls it with a reference")]
    fn is_enforce(&self) -> bool {
        *self == Self::Enforce
    }
}

/// One lookup that was asked for a decision.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct LookupReason {
    pub lookup: String,
    /// `found`, `not-found`, or why there was no answer.
    pub answer: String,
    /// `source`, `cache`, or `stale` where the source failed and an older answer served.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<String>,
    /// In microseconds.
    #[serde(default)]
    pub took_us: u32,
}

/// What a rule did.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Effect {
    Set,
    Reject,
    Block,
    /// Let the sign-up go on; no rule after it ran.
    Accept,
    /// Asks for an approver's yes.
    RequireApproval,
    /// The person's request waits for an approver already.
    AlreadyPending,
    /// An approver has said yes before.
    Approved,
    /// An approver has said no before.
    Denied,
    /// The rule could not be evaluated, and its failure policy was to go on.
    Failed,
    /// The rule could not be evaluated, and its failure policy was to reject.
    FailedReject,
    /// The rule could not be evaluated, and its failure policy was to block.
    FailedBlock,
}

impl Effect {
    /// The name in events and on the command line.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Set => "set",
            Self::Reject => "reject",
            Self::Block => "block",
            Self::Accept => "accept",
            Self::RequireApproval => "require-approval",
            Self::AlreadyPending => "already-pending",
            Self::Approved => "approved",
            Self::Denied => "denied",
            Self::Failed => "failed",
            Self::FailedReject => "failed-reject",
            Self::FailedBlock => "failed-block",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_decision_of_an_older_version_can_be_read() {
        let text = r#"{"outcome":{"action":"continue"},"reasons":[{"rule":"r","effect":"set"}]}"#;
        let decision: Decision = serde_json::from_str(text).unwrap();
        assert_eq!((decision.reasons[0].mode, decision.lookups.len()), (Mode::Enforce, 0));
    }

    #[test]
    fn a_word_is_the_same_in_an_event_and_on_the_command_line() {
        for effect in [Effect::RequireApproval, Effect::AlreadyPending, Effect::FailedBlock] {
            assert_eq!(serde_json::to_value(effect).unwrap(), effect.as_str());
        }
        for mode in Mode::ALL {
            assert_eq!(serde_json::to_value(mode).unwrap(), mode.as_str());
        }
    }
}
