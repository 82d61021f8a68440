//! `[workers.accounts]`: how accounts of approved people are made.

use secrecy::SecretString;
use vestibule_workers::{Accounts, AccountsSettings, GraphSettings};

use crate::config::{SecretSource, reader::Section, secret};

/// How accounts of approved people are made.
#[derive(Debug)]
pub(crate) struct AccountsConfig {
    tenant: String,
    client_id: String,
    client_secret: SecretSource,
    graph: Option<String>,
    token: Option<String>,
    domain: String,
    redirect: String,
    invitation_message: bool,
}

impl AccountsConfig {
    /// What the worker needs, with the secret that `fetch` brings.
    pub(crate) fn settings(
        &self,
        fetch: impl Fn(&SecretSource) -> anyhow::Result<SecretString>,
    ) -> anyhow::Result<AccountsSettings> {
        let secret = fetch(&self.client_secret)?;
        let mut graph = GraphSettings::new(&self.tenant, &self.client_id, secret);
        if let Some(url) = &self.graph {
            graph.base_url.clone_from(url);
        }
        graph.token_url.clone_from(&self.token);
        let mut settings = AccountsSettings::new(graph, &self.domain, &self.redirect);
        settings.send_invitation_message = self.invitation_message;
        Ok(settings)
    }
}

/// The account that the section asks for, unless something in it is wrong.
pub(super) fn read(section: &mut Section<'_>) -> Option<AccountsConfig> {
    let is_present = section.is_present();
    let mut required = |key| {
        let text = section.string(key);
        if is_present && !section.has(key) {
            section.complain("", format!("needs the key `{key}`"));
        }
        text
    };
    let [tenant, client_id, domain, redirect] =
        ["tenant", "client_id", "domain", "invite_redirect_url"].map(&mut required);
    let client_secret = secret(section, "client_secret");
    if is_present && !section.has("client_secret") {
        section.complain("", "needs the key `client_secret`");
    }
    let graph = section.string("graph_url");
    let token = section.string("token_url");
    let invitation_message = section.boolean("send_invitation_message", false);
    let accounts = AccountsConfig {
        tenant: tenant?,
        client_id: client_id?,
        client_secret: client_secret?,
        graph,
        token,
        domain: domain?,
        redirect: redirect?,
        invitation_message,
    };
    let stand_in = |_: &SecretSource| Ok("stand-in".into());
    let settings = accounts.settings(stand_in).expect("a stand-in is always there");
    for complaint in Accounts::check(&settings).err().into_iter().flatten() {
        section.complain(complaint.key, complaint.message);
    }
    Some(accounts)
}
