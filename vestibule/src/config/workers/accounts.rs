//! `[workers.accounts]`: how accounts of approved people are made.

use secrecy::SecretString;
use vestibule_workers::{Accounts, AccountsSettings};

use super::graph::{self, GraphConfig};
use crate::config::{SecretSource, reader::Section};

/// How accounts of approved people are made.
#[derive(Debug)]
pub(crate) struct AccountsConfig {
    pub(super) graph: GraphConfig,
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
        let graph = self.graph.settings(fetch)?;
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
    let [domain, redirect] = ["domain", "invite_redirect_url"].map(&mut required);
    let graph = graph::read(section, None);
    let invitation_message = section.boolean("send_invitation_message", false);
    let accounts =
        AccountsConfig { graph: graph?, domain: domain?, redirect: redirect?, invitation_message };
    let stand_in = |_: &SecretSource| Ok("stand-in".into());
    let settings = accounts.settings(stand_in).expect("a stand-in is always there");
    for complaint in Accounts::check(&settings).err().into_iter().flatten() {
        section.complain(complaint.key, complaint.message);
    }
    Some(accounts)
}
