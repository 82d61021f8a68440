//! Which directory a worker asks by Microsoft Graph, and who it is there.

use secrecy::SecretString;
use vestibule_workers::GraphSettings;

use crate::config::{SecretSource, reader::Section, secret};

/// One application in one directory.
#[derive(Clone, Debug)]
pub(crate) struct GraphConfig {
    tenant: String,
    client_id: String,
    client_secret: SecretSource,
    graph: Option<String>,
    token: Option<String>,
}

impl GraphConfig {
    /// What a worker needs, with the secret that `fetch` brings.
    pub(crate) fn settings(
        &self,
        fetch: impl Fn(&SecretSource) -> anyhow::Result<SecretString>,
    ) -> anyhow::Result<GraphSettings> {
        let secret = fetch(&self.client_secret)?;
        let mut graph = GraphSettings::new(&self.tenant, &self.client_id, secret);
        if let Some(url) = &self.graph {
            graph.base_url.clone_from(url);
        }
        graph.token_url.clone_from(&self.token);
        Ok(graph)
    }
}

const KEYS: [&str; 5] = ["tenant", "client_id", "client_secret", "graph_url", "token_url"];

/// Whether the section says anything of an application.
pub(super) fn names_one(section: &Section<'_>) -> bool {
    KEYS.iter().any(|key| section.has(key))
}

/// The application that the section names, unless something is missing or wrong; where it names
/// none, `default`.
pub(super) fn read(
    section: &mut Section<'_>,
    default: Option<&GraphConfig>,
) -> Option<GraphConfig> {
    let names_one = names_one(section);
    let must_name = section.is_present() && (names_one || default.is_none());
    let mut required = |key| {
        let text = section.string(key);
        if must_name && !section.has(key) {
            section.complain("", format!("needs the key `{key}`"));
        }
        text
    };
    let [tenant, client_id] = ["tenant", "client_id"].map(&mut required);
    let client_secret = secret(section, "client_secret");
    if must_name && !section.has("client_secret") {
        section.complain("", "needs the key `client_secret`");
    }
    let graph = section.string("graph_url");
    let token = section.string("token_url");
    if !names_one {
        return default.cloned();
    }
    let (tenant, client_id) = (tenant?, client_id?);
    Some(GraphConfig { tenant, client_id, client_secret: client_secret?, graph, token })
}
