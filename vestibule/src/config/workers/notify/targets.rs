//! How a channel sends, and to whom: the keys that belong to its `kind`.

use std::time::Duration;

use secrecy::SecretString;
use vestibule_workers::{
    ApnsSettings, ChannelKind, FcmSettings, MailLogin, MailTls, NtfyPriority, NtfySettings,
    Recipient, Urgency, WebPushSettings, WebhookFormat,
};

use crate::config::{DAY, Login, SecretSource, reader::Section, secret, secrets};

#[derive(Debug)]
pub(super) enum ChannelTarget {
    Record,
    Webhook {
        url: SecretSource,
        format: WebhookFormat,
        headers: Vec<(String, SecretSource)>,
        signing_key: Option<SecretSource>,
    },
    Ntfy {
        url: SecretSource,
        token: Option<SecretSource>,
        priority: NtfyPriority,
    },
    Mail {
        server: String,
        login: Option<Login>,
        from: String,
        to: Recipient,
        tls: MailTls,
    },
    WebPush {
        to: Recipient,
        contact: String,
        public_key: String,
        private_key: SecretSource,
        ttl: Duration,
        urgency: Urgency,
    },
    Fcm {
        to: Recipient,
        service_account: SecretSource,
        url: String,
        ttl: Duration,
    },
    Apns {
        to: Recipient,
        key: SecretSource,
        key_id: String,
        team_id: String,
        topic: String,
        url: String,
        ttl: Duration,
    },
}

impl ChannelTarget {
    /// What the worker needs, with the secrets that `fetch` brings.
    pub(super) fn kind(
        &self,
        fetch: &impl Fn(&SecretSource) -> anyhow::Result<SecretString>,
    ) -> anyhow::Result<ChannelKind> {
        let perhaps = |source: &Option<SecretSource>| source.as_ref().map(fetch).transpose();
        Ok(match self {
            Self::Record => ChannelKind::Record,
            Self::Webhook { url, format, headers, signing_key } => {
                let header = |(name, value): &(String, _)| Ok((name.clone(), fetch(value)?));
                let headers = headers.iter().map(header).collect::<anyhow::Result<_>>()?;
                let (url, signing_key) = (fetch(url)?, perhaps(signing_key)?);
                ChannelKind::Webhook { url, format: *format, headers, signing_key }
            }
            Self::Ntfy { url, token, priority } => ChannelKind::Ntfy(NtfySettings {
                url: fetch(url)?,
                token: perhaps(token)?,
                priority: *priority,
            }),
            Self::Mail { server, login, from, to, tls } => {
                let login = match login {
                    Some(Login { user, password }) => {
                        Some(MailLogin { user: user.clone(), password: fetch(password)? })
                    }
                    None => None,
                };
                let (server, from, to) = (server.clone(), from.clone(), to.clone());
                ChannelKind::Mail { server, login, from, to, tls: *tls }
            }
            Self::WebPush { to, contact, public_key, private_key, ttl, urgency } => {
                ChannelKind::WebPush(WebPushSettings {
                    to: to.clone(),
                    contact: contact.clone(),
                    public_key: public_key.clone(),
                    private_key: fetch(private_key)?,
                    ttl: *ttl,
                    urgency: *urgency,
                })
            }
            Self::Fcm { to, service_account, url, ttl } => ChannelKind::Fcm(FcmSettings {
                to: to.clone(),
                service_account: fetch(service_account)?,
                base_url: url.clone(),
                ttl: *ttl,
            }),
            Self::Apns { to, key, key_id, team_id, topic, url, ttl } => {
                ChannelKind::Apns(ApnsSettings {
                    to: to.clone(),
                    key: fetch(key)?,
                    key_id: key_id.clone(),
                    team_id: team_id.clone(),
                    topic: topic.clone(),
                    base_url: url.clone(),
                    ttl: *ttl,
                })
            }
        })
    }

    /// Whether there is one message for each event, however many are told by it.
    pub(super) const fn tells_once(&self) -> bool {
        match self {
            Self::Record | Self::Webhook { .. } | Self::Ntfy { .. } => true,
            Self::Mail { to, .. } => !matches!(to, Recipient::Role(_)),
            Self::WebPush { .. } | Self::Fcm { .. } | Self::Apns { .. } => false,
        }
    }
}

#[derive(Clone, Copy)]
enum KindWord {
    Record,
    Webhook,
    Ntfy,
    Mail,
    WebPush,
    Fcm,
    Apns,
}

pub(super) fn read(section: &mut Section<'_>) -> Option<ChannelTarget> {
    let kinds = [
        ("record", KindWord::Record),
        ("webhook", KindWord::Webhook),
        ("ntfy", KindWord::Ntfy),
        ("mail", KindWord::Mail),
        ("web-push", KindWord::WebPush),
        ("fcm", KindWord::Fcm),
        ("apns", KindWord::Apns),
    ];
    if !section.has("kind") {
        let words = kinds.map(|(word, _)| format!("\"{word}\"")).join(", ");
        section.complain("", format!("needs the key `kind`: one of {words}"));
    }
    match section.choice("kind", &kinds, KindWord::Record) {
        KindWord::Record => Some(ChannelTarget::Record),
        KindWord::Webhook => read_webhook(section),
        KindWord::Ntfy => read_ntfy(section),
        KindWord::Mail => Some(read_mail(section)),
        KindWord::WebPush => read_web_push(section),
        KindWord::Fcm => read_fcm(section),
        KindWord::Apns => read_apns(section),
    }
}

fn read_webhook(section: &mut Section<'_>) -> Option<ChannelTarget> {
    let formats = [
        ("teams", WebhookFormat::Teams),
        ("slack", WebhookFormat::Slack),
        ("json", WebhookFormat::Json),
    ];
    let format = section.choice("format", &formats, WebhookFormat::Json);
    // The URL of an incoming webhook is the right to post there, so it is a secret.
    let url = required_secret(section, "url");
    let headers = secrets(section, "headers");
    let signing_key = secret(section, "signing_key");
    Some(ChannelTarget::Webhook { url: url?, format, headers, signing_key })
}

fn read_ntfy(section: &mut Section<'_>) -> Option<ChannelTarget> {
    let priorities = [
        ("min", NtfyPriority::Min),
        ("low", NtfyPriority::Low),
        ("default", NtfyPriority::Default),
        ("high", NtfyPriority::High),
        ("max", NtfyPriority::Max),
    ];
    let priority = section.choice("priority", &priorities, NtfyPriority::Default);
    let url = required_secret(section, "url");
    let token = secret(section, "token");
    Some(ChannelTarget::Ntfy { url: url?, token, priority })
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
    if !section.has("to") {
        section.complain(
            "",
            "needs the key `to`: addresses, [\"person\"] for whoever signs up, or [\"role:NAME\"]",
        );
    }
    let to = read_recipient(section, "addresses, or the word \"person\" or \"role:NAME\"");
    let login = user.zip(password).map(|(user, password)| Login { user, password });
    ChannelTarget::Mail { server, login, from, to: to.unwrap_or(Recipient::Fixed(vec![])), tls }
}

fn read_web_push(section: &mut Section<'_>) -> Option<ChannelTarget> {
    let to = read_devices(section);
    let contact = section.required("contact");
    let public_key = section.required("public_key");
    let private_key = required_secret(section, "private_key");
    let ttl = section.duration("ttl", DAY);
    let urgencies = Urgency::ALL.map(|it| (it.as_str(), it));
    let urgency = section.choice("urgency", &urgencies, Urgency::Normal);
    let is_complete = ["contact", "public_key"].iter().all(|key| section.has(key));
    let private_key = private_key.filter(|_| is_complete)?;
    Some(ChannelTarget::WebPush { to, contact, public_key, private_key, ttl, urgency })
}

fn read_fcm(section: &mut Section<'_>) -> Option<ChannelTarget> {
    let to = read_devices(section);
    let service_account = required_secret(section, "service_account");
    let url = section.string("url").unwrap_or_else(|| FcmSettings::BASE_URL.into());
    let ttl = section.duration("ttl", DAY);
    Some(ChannelTarget::Fcm { to, service_account: service_account?, url, ttl })
}

fn read_apns(section: &mut Section<'_>) -> Option<ChannelTarget> {
    let to = read_devices(section);
    let key = required_secret(section, "key");
    let [key_id, team_id, topic] = ["key_id", "team_id", "topic"].map(|it| section.required(it));
    let environments =
        [("production", ApnsSettings::BASE_URL), ("sandbox", ApnsSettings::SANDBOX_URL)];
    let environment = section.choice("environment", &environments, ApnsSettings::BASE_URL);
    let url = section.string("url").unwrap_or_else(|| environment.into());
    let ttl = section.duration("ttl", DAY);
    let is_complete = ["key_id", "team_id", "topic"].iter().all(|key| section.has(key));
    let key = key.filter(|_| is_complete)?;
    Some(ChannelTarget::Apns { to, key, key_id, team_id, topic, url, ttl })
}

fn required_secret(section: &mut Section<'_>, key: &'static str) -> Option<SecretSource> {
    if !section.has(key) {
        section.complain("", format!("needs the key `{key}`"));
    }
    secret(section, key)
}

/// In `to`, this word stands for whoever signs up.
const THE_PERSON: &str = "person";

/// In `to`, this begins the name of a role whose holders are meant.
const ROLE: &str = "role:";

/// Whose devices are told.
fn read_devices(section: &mut Section<'_>) -> Recipient {
    let to = read_recipient(section, "the word \"person\" or \"role:NAME\"");
    to.unwrap_or(Recipient::Person)
}

fn read_recipient(section: &mut Section<'_>, expected: &str) -> Option<Recipient> {
    let to = section.list("to", expected, |it| Some(it.to_owned()));
    let is_word = |it: &String| it == THE_PERSON || it.starts_with(ROLE);
    if to.len() > 1 && to.iter().any(is_word) {
        section.complain(
            "to",
            "\"person\" and \"role:NAME\" stand alone; make a second channel for the others",
        );
    }
    if to.iter().any(|it| it == ROLE) {
        section.complain("to", "\"role:\" needs the name of a role");
    }
    if !section.has("to") {
        return None;
    }
    Some(match to.as_slice() {
        [only] if only == THE_PERSON => Recipient::Person,
        [only] if only.starts_with(ROLE) => Recipient::Role(only[ROLE.len()..].to_owned()),
        _ => Recipient::Fixed(to),
    })
}
