//! Why the store did not do what it was asked, and so what the caller should do.

use std::fmt;

/// Why an operation failed. Nothing of it has happened, or (a lost connection during the commit)
/// all of it; trying again is safe either way.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// No connection, a lock, a timeout, a full disk: the same may go through later.
    #[error("the store does not answer for now")]
    Unavailable(#[source] Cause),
    /// The database does not take this data: trying again will not help.
    #[error("the store refuses the data")]
    Refused(#[source] Cause),
    /// The database as it is set up does not fit: credentials, permissions, missing tables.
    /// Somebody must act; no event is to blame.
    #[error("the store is not set up for this")]
    Misconfigured(#[source] Cause),
}

/// What the database said, without the values it said it about.
pub struct Cause(String);

impl Cause {
    pub(crate) fn new(what: impl Into<String>) -> Self {
        Self(what.into())
    }
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Cause {}
