//! What expressions may name beside the sign-up: lists and lookups.
//!
//! Which ones there are is said when an expression is compiled ([`Known`]); what is in them, when
//! it is evaluated ([`Sources`]). Nothing is fetched from here: a lookup that has no answer yet
//! fails the evaluation, and who evaluates may fetch it and evaluate again.

use serde_json::{Map, Value};

/// The variable that holds the lists, and the one that holds the answers of lookups.
pub(super) const LISTS: &str = "lists";
pub(super) const LOOKUPS: &str = "lookups";

/// The lists and lookups that there are, by name. An expression that names another is refused.
#[derive(Clone, Debug, Default)]
pub struct Known {
    pub lists: Vec<String>,
    pub lookups: Vec<String>,
}

/// What the lists hold and the lookups answered, for one sign-up.
pub trait Sources: Sync {
    /// `None` where there is no such list.
    fn list(&self, name: &str) -> Option<&dyn Members>;

    fn lookup(&self, name: &str) -> LookupState<'_>;
}

/// A list, of which nothing but membership can be asked.
pub trait Members: Sync {
    fn contains(&self, entry: &str) -> bool;
}

/// How far a lookup has come.
#[derive(Clone, Copy)]
pub enum LookupState<'a> {
    Is(&'a Map<String, Value>),
    /// Nobody has asked yet: whoever evaluates may do so, and evaluate again.
    NotYet,
    /// It gave no answer.
    Failed,
}

/// Leaves the answer out: it is about a person.
impl std::fmt::Debug for LookupState<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Is(_) => "Is",
            Self::NotYet => "NotYet",
            Self::Failed => "Failed",
        })
    }
}
