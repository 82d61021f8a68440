//! What a channel is told: where it sends, what it says, and to whom.

use std::{fmt, time::Duration};

use secrecy::SecretString;
use time::OffsetDateTime;
use vestibule_events::{ApprovalLinks, Filter, SignUpEvent};

use crate::{ApprovalsSettings, SettingError, http};

/// Where notifications go.
#[derive(Clone, Debug, Default)]
pub struct NotifySettings {
    pub channels: Vec<ChannelSettings>,
    /// `None` where nobody has said; then no message can hold a link.
    pub approvals: Option<ApprovalPages>,
}

/// Where approvers decide requests, for the links in messages.
#[derive(Clone, Debug)]
pub struct ApprovalPages {
    base_url: String,
    /// `None` where messages may say until when somebody decides, and not where.
    links: Option<ApprovalLinks>,
    requests: ApprovalsSettings,
}

impl ApprovalPages {
    /// `base_url` is what approvers' browsers call, without `/approvals`. `requests` must be those
    /// of the worker `approvals`: a link ends with its request.
    pub fn new(
        base_url: &str,
        links: ApprovalLinks,
        requests: ApprovalsSettings,
    ) -> Result<Self, SettingError> {
        let base_url = base_url.trim_end_matches('/').to_owned();
        match http::address(&base_url) {
            Ok(()) => Ok(Self { base_url, links: Some(links), requests }),
            Err(message) => Err(SettingError { key: "base_url", message: message.to_owned() }),
        }
    }

    /// The right to decide this request, so it goes to approvers and nowhere else.
    pub(super) fn link(&self, event: &SignUpEvent) -> Option<String> {
        let token = self.links.as_ref()?.token(event.id, self.expires_at(event));
        Some(format!("{}/approvals/{token}", self.base_url))
    }

    pub(super) const fn has_links(&self) -> bool {
        self.links.is_some()
    }

    /// For messages to others, whom it still tells until when somebody decides.
    pub(super) fn without_links(&self) -> Self {
        Self { links: None, ..self.clone() }
    }

    pub(super) fn expires_at(&self, event: &SignUpEvent) -> OffsetDateTime {
        self.requests.expires_at(event.time)
    }

    #[cfg(test)]
    pub(super) fn sample() -> Self {
        let links = ApprovalLinks::new(&vestibule_events::PseudonymKey::new(vec![1; 32]));
        let requests = ApprovalsSettings { expires_after: Duration::from_secs(3600) };
        Self::new("https://sign-up.example.com/", links, requests).unwrap()
    }

    #[cfg(test)]
    pub(super) fn links(&self) -> &ApprovalLinks {
        self.links.as_ref().unwrap()
    }
}

/// One way of telling somebody.
#[derive(Clone, Debug)]
pub struct ChannelSettings {
    /// Part of the idempotency key: renaming a channel makes it a new one.
    pub name: String,
    /// Which of the worker's events; empty means all of them.
    pub filter: Filter,
    /// A minijinja template; one line.
    pub subject: String,
    /// A minijinja template.
    pub body: String,
    /// Which language `subject` and `body` are in, a BCP 47 tag such as `en`.
    pub language: String,
    /// The same in other languages, for sign-ups whose `locale` asks for them.
    pub locales: Vec<LocaleSettings>,
    pub kind: ChannelKind,
}

/// What a channel says in one more language.
#[derive(Clone, Debug)]
pub struct LocaleSettings {
    /// A BCP 47 tag such as `de` or `pt-BR`.
    pub language: String,
    pub subject: String,
    pub body: String,
}

/// How a channel sends.
#[derive(Clone, Debug)]
pub enum ChannelKind {
    /// Kept in the store, sent nowhere.
    Record,
    Webhook {
        /// Incoming webhooks carry their secret in the URL.
        url: SecretString,
        format: WebhookFormat,
        /// Sent with every message, such as `Authorization`.
        headers: Vec<(String, SecretString)>,
        /// `whsec_…` or `whsk_…`: the JSON is signed as Standard Webhooks says.
        signing_key: Option<SecretString>,
    },
    Ntfy(NtfySettings),
    Mail {
        /// `smtp://host:25` or `smtps://host:465` (TLS from the first byte).
        server: String,
        login: Option<MailLogin>,
        /// `Name <address>` or an address.
        from: String,
        to: Recipient,
        /// For `smtp://`; `smtps://` is always encrypted.
        tls: MailTls,
    },
    WebPush(WebPushSettings),
    Fcm(FcmSettings),
    Apns(ApnsSettings),
}

impl ChannelKind {
    /// As configuration names it.
    #[must_use]
    pub const fn as_str(&self) -> &'static str {
        match self {
            Self::Record => "record",
            Self::Webhook { .. } => "webhook",
            Self::Ntfy(_) => "ntfy",
            Self::Mail { .. } => "mail",
            Self::WebPush(_) => "web-push",
            Self::Fcm(_) => "fcm",
            Self::Apns(_) => "apns",
        }
    }

    /// Who is told, where the channel itself says so; the others tell whoever reads there.
    pub(super) const fn recipient(&self) -> Option<&Recipient> {
        match self {
            Self::Record | Self::Webhook { .. } | Self::Ntfy(_) => None,
            Self::Mail { to, .. } => Some(to),
            Self::WebPush(settings) => Some(&settings.to),
            Self::Fcm(settings) => Some(&settings.to),
            Self::Apns(settings) => Some(&settings.to),
        }
    }
}

/// The shape of a webhook's body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WebhookFormat {
    /// An Adaptive Card, as Teams workflows take it.
    Teams,
    /// Blocks of plain text.
    Slack,
    /// A CloudEvent with the rendered texts.
    Json,
}

/// A topic of an ntfy server.
#[derive(Clone, Debug)]
pub struct NtfySettings {
    /// `https://ntfy.example.com/TOPIC`. Who knows a topic may read it, so it is a secret.
    pub url: SecretString,
    pub token: Option<SecretString>,
    pub priority: NtfyPriority,
}

/// How loudly ntfy tells.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum NtfyPriority {
    Min = 1,
    Low = 2,
    #[default]
    Default = 3,
    High = 4,
    Max = 5,
}

/// Browsers, by Web Push.
#[derive(Clone, Debug)]
pub struct WebPushSettings {
    pub to: Recipient,
    /// Whom push services can ask about us: `mailto:` or `https:`.
    pub contact: String,
    /// The application server key that pages subscribe with: 65 bytes in base64url.
    pub public_key: String,
    /// Its private half: 32 bytes in base64url.
    pub private_key: SecretString,
    /// How long a push service keeps a message for a device that is away.
    pub ttl: Duration,
    pub urgency: Urgency,
}

/// What a message is worth to a battery (RFC 8030).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Urgency {
    VeryLow,
    Low,
    #[default]
    Normal,
    High,
}

impl Urgency {
    pub const ALL: [Self; 4] = [Self::VeryLow, Self::Low, Self::Normal, Self::High];

    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::VeryLow => "very-low",
            Self::Low => "low",
            Self::Normal => "normal",
            Self::High => "high",
        }
    }
}

/// Firebase Cloud Messaging, HTTP v1.
#[derive(Clone, Debug)]
pub struct FcmSettings {
    pub to: Recipient,
    /// The key file of a service account, in JSON, as the Firebase console gives it.
    pub service_account: SecretString,
    pub base_url: String,
    pub ttl: Duration,
}

impl FcmSettings {
    pub const BASE_URL: &'static str = "https://fcm.googleapis.com";
}

/// Apple Push Notification service, by provider token.
#[derive(Clone, Debug)]
pub struct ApnsSettings {
    pub to: Recipient,
    /// The signing key (`AuthKey_….p8`), in PEM.
    pub key: SecretString,
    pub key_id: String,
    pub team_id: String,
    /// The app's bundle id.
    pub topic: String,
    pub base_url: String,
    pub ttl: Duration,
}

impl ApnsSettings {
    pub const BASE_URL: &'static str = "https://api.push.apple.com";
    /// For apps that were installed by Xcode.
    pub const SANDBOX_URL: &'static str = "https://api.sandbox.push.apple.com";
}

/// Who a message goes to.
#[derive(Clone, PartialEq, Eq)]
pub enum Recipient {
    /// Whoever signs up. Without an address, or a device, nothing is sent.
    Person,
    /// Everybody whom this role is granted when the message goes out, but for whoever signs up.
    Role(String),
    /// Addresses, for mail.
    Fixed(Vec<String>),
}

/// Addresses are personal data, even those of a team.
impl fmt::Debug for Recipient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Person => f.write_str("Person"),
            Self::Role(role) => write!(f, "Role({role})"),
            Self::Fixed(addresses) => write!(f, "Fixed({} addresses)", addresses.len()),
        }
    }
}

/// Name and password for the mail server.
#[derive(Clone, Debug)]
pub struct MailLogin {
    pub user: String,
    pub password: SecretString,
}

/// Whether a mail may travel in the clear.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MailTls {
    /// Never.
    Required,
    /// Only if the server offers no TLS.
    Opportunistic,
    /// Always: a relay on the same machine.
    None,
}
