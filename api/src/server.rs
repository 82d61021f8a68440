//! The way of a sign-up.

use std::{collections::HashMap, fmt, sync::Arc};

use axum::Router;
use prometheus_client::registry::Registry;
use vestibule_events::{ConnectorName, EventLog, PseudonymKey};

use crate::ConnectorSettings;

/// Handles to all that answering needs; cheap to clone.
#[derive(Clone)]
pub struct Api(#[expect(dead_code, reason = "skeleton")] Arc<Inner>);

#[expect(dead_code, reason = "skeleton")]
struct Inner {
    log: Arc<dyn EventLog>,
    key: Arc<PseudonymKey>,
    connectors: HashMap<String, ConnectorSettings>,
}

/// Two connectors have the same name, so one of them could never be called.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("there are two connectors with the name {0}")]
pub struct DuplicateConnector(pub ConnectorName);

impl Api {
    /// Registers its metrics in `registry`.
    pub fn new(
        log: Arc<dyn EventLog>,
        key: Arc<PseudonymKey>,
        connectors: Vec<ConnectorSettings>,
        registry: &mut Registry,
    ) -> Result<Self, DuplicateConnector> {
        let _ = registry;
        let connectors =
            connectors.into_iter().map(|it| (it.name.as_str().to_owned(), it)).collect();
        Ok(Self(Arc::new(Inner { log, key, connectors })))
    }
}

impl fmt::Debug for Api {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Api")
    }
}

/// `POST /connectors/<name>/<step>`, and `POST /connectors/<name>` where the body says the step.
pub fn router(api: Api) -> Router {
    let _ = api;
    Router::new()
}
