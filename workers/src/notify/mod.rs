//! Tells somebody: templates rendered with the event, sent over channels.
//!
//! Each channel keeps its own state, so that one which fails does not make the others send again.
//! A message goes out under a stable key (`Idempotency-Key`, `Message-ID`): if we die between
//! sending and taking note, the provider can tell the second one from a new one. The channel
//! `record` keeps the message in the store and sends nothing.

use std::fmt;

use secrecy::SecretString;
use vestibule_events::Filter;

/// Where notifications go.
#[derive(Clone, Debug, Default)]
pub struct NotifySettings {
    pub channels: Vec<ChannelSettings>,
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
    pub kind: ChannelKind,
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
    },
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

/// Who a mail goes to.
#[derive(Clone, PartialEq, Eq)]
pub enum Recipient {
    /// Whoever signs up. Without an address nothing is sent.
    Person,
    Fixed(Vec<String>),
}

/// Addresses are personal data, even those of a team.
impl fmt::Debug for Recipient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Person => f.write_str("Person"),
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
