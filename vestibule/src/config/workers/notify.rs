//! `[[workers.notify.channels]]`: whom to tell, what, and by which way.

mod targets;

use anyhow::Context;
use secrecy::SecretString;
use vestibule_events::{ApprovalLinks, Filter, PseudonymKey};
use vestibule_workers::{
    ApprovalPages, ApprovalsSettings, ChannelSettings, LocaleSettings, Notify, NotifySettings,
};

use self::targets::ChannelTarget;
use super::read_filter;
use crate::config::{ApprovalsConfig, SecretSource, reader::Section};

/// One way of telling somebody.
#[derive(Debug)]
pub(crate) struct ChannelConfig {
    pub(super) name: String,
    pub(crate) filter: Filter,
    subject: String,
    body: String,
    language: String,
    locales: Vec<LocaleSettings>,
    target: ChannelTarget,
}

impl ChannelConfig {
    /// What the worker needs, with the secrets that `fetch` brings.
    pub(crate) fn settings(
        &self,
        fetch: impl Fn(&SecretSource) -> anyhow::Result<SecretString>,
    ) -> anyhow::Result<ChannelSettings> {
        let fetch =
            |source: &SecretSource| fetch(source).with_context(|| format!("channel {}", self.name));
        Ok(ChannelSettings {
            name: self.name.clone(),
            filter: self.filter.clone(),
            subject: self.subject.clone(),
            body: self.body.clone(),
            language: self.language.clone(),
            locales: self.locales.clone(),
            kind: self.target.kind(&fetch)?,
        })
    }

    /// What the worker needs to say what it would say: stand-ins take the place of secrets, which may
    /// be out of reach, and links lead nowhere.
    pub(crate) fn without_secrets<'a>(
        channels: impl IntoIterator<Item = &'a Self>,
        approvals: &ApprovalsConfig,
    ) -> NotifySettings {
        // Good for a URL, a header and a password alike.
        let stand_in = |_: &SecretSource| Ok("https://stand-in.invalid/topic".into());
        let settings = |it: &Self| it.settings(stand_in).expect("a stand-in is always there");
        let links = ApprovalLinks::new(&PseudonymKey::new(b"a stand-in, too".to_vec()));
        let requests = ApprovalsSettings { expires_after: approvals.expires_after };
        let pages = |base: &String| ApprovalPages::new(base, links, requests).ok();
        let approvals = approvals.link_base.as_ref().and_then(pages);
        NotifySettings { channels: channels.into_iter().map(settings).collect(), approvals }
    }

    /// Whether it tells exactly once of each event.
    pub(crate) const fn tells_once(&self) -> bool {
        self.target.tells_once()
    }

    /// Complains of templates and addresses that would fail later.
    fn check(&self, section: &Section<'_>, approvals: &ApprovalsConfig) {
        if let Err(complaints) = Notify::check(&Self::without_secrets([self], approvals)) {
            let key = |key| if key == "login" { "user" } else { key };
            complaints.into_iter().for_each(|it| section.complain(key(it.key), it.message));
        }
    }
}

pub(super) fn read_channel(
    section: &mut Section<'_>,
    connectors: &[&str],
    approvals: &ApprovalsConfig,
) -> Option<ChannelConfig> {
    let name = section.required("name");
    let filter = read_filter(section, Filter::default(), connectors);
    let subject = section.required("subject");
    let body = section.required("body");
    let language = section.string("language").unwrap_or_else(|| "en".into());
    let locales = section.named_sections("locales", |language, texts| LocaleSettings {
        language: language.to_owned(),
        subject: texts.required("subject"),
        body: texts.required("body"),
    });
    let target = targets::read(section);
    let channel = ChannelConfig { name, filter, subject, body, language, locales, target: target? };
    let is_complete = ["name", "subject", "body"].iter().all(|key| section.has(key));
    if is_complete {
        channel.check(section, approvals);
    }
    Some(channel)
}
