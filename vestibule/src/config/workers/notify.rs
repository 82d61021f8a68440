//! `[[workers.notify.channels]]`: whom to tell, what, and by which way.

use anyhow::Context;
use secrecy::SecretString;
use vestibule_events::{ApprovalLinks, Filter, PseudonymKey};
use vestibule_workers::{
    ApprovalPages, ApprovalsSettings, ChannelKind, ChannelSettings, MailLogin, MailTls, Notify,
    NotifySettings, Recipient, WebhookFormat,
};

use super::read_filter;
use crate::config::{ApprovalsConfig, Login, SecretSource, reader::Section, secret, secrets};

/// One way of telling somebody.
#[derive(Debug)]
pub(crate) struct ChannelConfig {
    name: String,
    pub(crate) filter: Filter,
    subject: String,
    body: String,
    target: ChannelTarget,
}

#[derive(Debug)]
enum ChannelTarget {
    Record,
    Webhook { url: SecretSource, format: WebhookFormat, headers: Vec<(String, SecretSource)> },
    Mail { server: String, login: Option<Login>, from: String, to: Vec<String>, tls: MailTls },
}

impl ChannelConfig {
    /// What the worker needs, with the secrets that `fetch` brings.
    pub(crate) fn settings(
        &self,
        fetch: impl Fn(&SecretSource) -> anyhow::Result<SecretString>,
    ) -> anyhow::Result<ChannelSettings> {
        let fetch =
            |source: &SecretSource| fetch(source).with_context(|| format!("channel {}", self.name));
        let kind = match &self.target {
            ChannelTarget::Record => ChannelKind::Record,
            ChannelTarget::Webhook { url, format, headers } => {
                let header = |(name, value): &(String, _)| Ok((name.clone(), fetch(value)?));
                let headers = headers.iter().map(header).collect::<anyhow::Result<_>>()?;
                ChannelKind::Webhook { url: fetch(url)?, format: *format, headers }
            }
            ChannelTarget::Mail { server, login, from, to, tls } => {
                let login = match login {
                    Some(Login { user, password }) => {
                        Some(MailLogin { user: user.clone(), password: fetch(password)? })
                    }
                    None => None,
                };
                let to = match to.as_slice() {
                    [only] if only == THE_PERSON => Recipient::Person,
                    addresses => Recipient::Fixed(addresses.to_vec()),
                };
                ChannelKind::Mail {
                    server: server.clone(),
                    login,
                    from: from.clone(),
                    to,
                    tls: *tls,
                }
            }
        };
        Ok(ChannelSettings {
            name: self.name.clone(),
            filter: self.filter.clone(),
            subject: self.subject.clone(),
            body: self.body.clone(),
            kind,
        })
    }

    /// Complains of templates and addresses that would fail later.
    fn check(&self, section: &Section<'_>, approvals: &ApprovalsConfig) {
        // Good for a URL, a header and a password alike; the real ones may be out of reach here.
        let stand_in = |_: &SecretSource| Ok("https://stand-in.invalid/".into());
        let channel = self.settings(stand_in).expect("a stand-in is always there");
        let links = ApprovalLinks::new(&PseudonymKey::new(b"a stand-in, too".to_vec()));
        let requests = ApprovalsSettings { expires_after: approvals.expires_after };
        let pages = |base: &String| ApprovalPages::new(base, links, requests).ok();
        let approvals = approvals.link_base.as_ref().and_then(pages);
        let settings = NotifySettings { channels: vec![channel], approvals };
        if let Err(complaints) = Notify::check(&settings) {
            let key = |key| if key == "login" { "user" } else { key };
            complaints.into_iter().for_each(|it| section.complain(key(it.key), it.message));
        }
    }
}

/// In `to`, this word stands for whoever signs up.
const THE_PERSON: &str = "person";

#[derive(Clone, Copy)]
enum KindWord {
    Record,
    Webhook,
    Mail,
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
    let kinds =
        [("record", KindWord::Record), ("webhook", KindWord::Webhook), ("mail", KindWord::Mail)];
    if !section.has("kind") {
        section.complain("", "needs the key `kind`: \"record\", \"webhook\" or \"mail\"");
    }
    let target = match section.choice("kind", &kinds, KindWord::Record) {
        KindWord::Record => Some(ChannelTarget::Record),
        KindWord::Webhook => read_webhook(section),
        KindWord::Mail => Some(read_mail(section)),
    };
    let channel = ChannelConfig { name, filter, subject, body, target: target? };
    let is_complete = ["name", "subject", "body"].iter().all(|key| section.has(key));
    if is_complete {
        channel.check(section, approvals);
    }
    Some(channel)
}

fn read_webhook(section: &mut Section<'_>) -> Option<ChannelTarget> {
    let formats = [
        ("teams", WebhookFormat::Teams),
        ("slack", WebhookFormat::Slack),
        ("json", WebhookFormat::Json),
    ];
    let format = section.choice("format", &formats, WebhookFormat::Json);
    if !section.has("url") {
        section.complain("", "needs the key `url`");
    }
    // The URL of an incoming webhook is the right to post there, so it is a secret.
    let url = secret(section, "url");
    let headers = secrets(section, "headers");
    Some(ChannelTarget::Webhook { url: url?, format, headers })
}

fn read_mail(section: &mut Section<'_>) -> ChannelTarget {
    let server = section.required("server");
    let tls = [
        ("required", MailTls::Required),
        ("opportunistic", MailTls::Opportunistic),
        ("none", MailTls::None),
    ];
    let tls = section.choice("tls", &tls, MailTls::Required);
    let user = section.string("user");
    let password = secret(section, "password");
    if user.is_some() != section.has("password") {
        section.complain("user", "`user` and `password` go together");
    }
    let from = section.required("from");
    let to = section.list("to", "addresses, or the word \"person\"", |it| Some(it.to_owned()));
    if !section.has("to") {
        section.complain("", "needs the key `to`: addresses, or [\"person\"] for whoever signs up");
    }
    if to.len() > 1 && to.iter().any(|it| it == THE_PERSON) {
        section.complain("to", "\"person\" stands alone; make a second channel for the others");
    }
    let login = user.zip(password).map(|(user, password)| Login { user, password });
    ChannelTarget::Mail { server, login, from, to, tls }
}
