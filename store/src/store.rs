//! The store: which database, and how to reach it.

use std::{fmt, path::PathBuf, time::Duration};

use secrecy::SecretString;

use crate::StoreError;

/// A handle to the business data; cheap to clone.
#[derive(Clone, Debug)]
pub struct Store {}

/// Where the business data is.
#[derive(Clone)]
pub enum StoreUrl {
    /// A file, created where there is none.
    Sqlite(PathBuf),
    /// `postgres://user:password@host/database`.
    Postgres(SecretString),
}

/// Leaves the URL out: a password stands in it.
impl fmt::Debug for StoreUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Sqlite(path) => write!(f, "Sqlite({})", path.display()),
            Self::Postgres(_) => f.write_str("Postgres(…)"),
        }
    }
}

/// Limits of the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StoreOptions {
    pub connections: u32,
    /// How long an operation waits for a connection, and so for a server that is down.
    pub acquire_timeout: Duration,
    pub statement_timeout: Duration,
}

impl Default for StoreOptions {
    fn default() -> Self {
        Self {
            connections: 8,
            acquire_timeout: Duration::from_secs(5),
            statement_timeout: Duration::from_secs(10),
        }
    }
}

impl Store {
    /// Opens the store; the schema is left as it is, see [`Store::migrate`].
    ///
    /// A server that is down is [`StoreError::Unavailable`] after `acquire_timeout`.
    pub async fn open(url: &StoreUrl, options: StoreOptions) -> Result<Self, StoreError> {
        let _ = (url, options);
        unimplemented!()
    }

    /// Whether the database answers.
    pub async fn ping(&self) -> Result<(), StoreError> {
        unimplemented!()
    }
}
