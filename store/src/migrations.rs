//! Bringing a database to the schema of this version.

use crate::{Store, StoreError};

/// A step from one schema to the next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Migration {
    pub version: i64,
    pub description: String,
}

impl Store {
    /// Applies what is missing and says what that was; several processes at once are safe.
    pub async fn migrate(&self) -> Result<Vec<Migration>, StoreError> {
        unimplemented!()
    }

    /// Whether nothing is missing. A database that is newer than this version is current too.
    pub async fn schema_is_current(&self) -> Result<bool, StoreError> {
        unimplemented!()
    }
}
