//! Tells somebody: templates rendered with the event, sent over channels.
//!
//! Each channel keeps its own state, so that one which fails does not make the others send again.
//! A message goes out under a stable key (`Idempotency-Key`, `Message-ID`): if we die between
//! sending and taking note, the provider can tell the second one from a new one. The channel
//! `record` keeps the message in the store and sends nothing. Approvers are told once of each
//! request: what a person tries again while theirs is open is told to nobody.

mod mail;
mod template;
#[cfg(test)]
mod tests;
mod webhook;

use std::{fmt, time::Duration};

use anyhow::anyhow;
use async_trait::async_trait;
use futures_util::future::join_all;
use secrecy::SecretString;
use time::OffsetDateTime;
use tokio::time::sleep;
use vestibule_events::{ApprovalLinks, ConnectorName, Effect, Filter, Kind, SignUpEvent};
use vestibule_store::{Begun, Store, StoreError};

use self::{
    mail::Mail,
    template::{Message, Templates},
    webhook::Webhook,
};
use crate::{ApprovalsSettings, Cause, HandleError, SettingError, Task, Worker, http};

/// The worker `notify`.
#[derive(Debug)]
pub struct Notify {
    channels: Vec<Channel>,
    store: Store,
}

#[derive(Debug)]
struct Channel {
    name: String,
    filter: Filter,
    templates: Templates,
    way: Way,
}

#[derive(Debug)]
enum Way {
    Record,
    Webhook(Webhook),
    Mail(Mail),
}

impl Notify {
    pub const NAME: &'static str = "notify";

    /// What a channel is given that does not say which kinds it wants.
    pub const KINDS: &'static [Kind] = &[Kind::Accepted];

    /// The kinds that the worker as a whole takes where the configuration does not say: those that
    /// its channels want. A channel that does not say is given its [`Notify::KINDS`], so that
    /// another one's wishes change nothing for it.
    pub fn wanted_kinds<'a>(channels: impl IntoIterator<Item = &'a mut Filter>) -> Vec<Kind> {
        let mut wanted = Vec::new();
        for filter in channels {
            if filter.kinds.is_empty() {
                filter.kinds = Self::KINDS.to_vec();
            }
            wanted.extend_from_slice(&filter.kinds);
        }
        wanted.sort_unstable();
        wanted.dedup();
        wanted
    }

    /// Compiles templates and addresses, with all complaints at once.
    pub fn new(settings: NotifySettings, store: Store) -> Result<Self, Vec<Complaint>> {
        Ok(Self { channels: channels(settings)?, store })
    }

    /// What `new` would complain about. Secrets may be stand-ins of the right shape.
    pub fn check(settings: &NotifySettings) -> Result<(), Vec<Complaint>> {
        channels(settings.clone()).map(drop)
    }

    /// One channel: render, begin, send, finish. What was sent before is not sent again.
    async fn tell(&self, channel: &Channel, event: &SignUpEvent) -> Result<(), HandleError> {
        let message = channel
            .templates
            .render(event)
            .map_err(|failed| HandleError::park(Cause::InvalidTemplate, failed))?;
        let now = OffsetDateTime::now_utc();
        let name = channel.name.as_str();
        match &channel.way {
            Way::Record => {
                let Message { subject, body } = &message;
                self.store.record_notification(Self::NAME, event, name, subject, body, now).await?;
            }
            Way::Webhook(webhook) => {
                let begun = self.store.begin_notification(Self::NAME, event, name, now).await?;
                if let Begun::Send { idempotency_key } = begun {
                    webhook.send(&message, event, name, &idempotency_key).await?;
                    self.finish(event, name).await?;
                }
            }
            Way::Mail(mail) => {
                // Without an address there is nobody to tell, and nothing to retry or to mend.
                let Some(mail) = mail.to(event, name, &message)? else {
                    return Ok(());
                };
                let begun = self.store.begin_notification(Self::NAME, event, name, now).await?;
                if let Begun::Send { .. } = begun {
                    mail.send().await?;
                    self.finish(event, name).await?;
                }
            }
        }
        Ok(())
    }

    /// Notes that a message is out. Insists a little: if the note fails, the message goes out again.
    async fn finish(&self, event: &SignUpEvent, channel: &str) -> Result<(), StoreError> {
        for pause in [50, 200, 1000].map(Duration::from_millis) {
            match self.finish_once(event, channel).await {
                Err(StoreError::Unavailable(_)) => sleep(pause).await,
                other => return other,
            }
        }
        self.finish_once(event, channel).await
    }

    async fn finish_once(&self, event: &SignUpEvent, channel: &str) -> Result<(), StoreError> {
        let now = OffsetDateTime::now_utc();
        self.store.finish_notification(Self::NAME, event.id, channel, None, now).await.map(drop)
    }
}

#[async_trait]
impl Worker for Notify {
    fn name(&self) -> &str {
        Self::NAME
    }

    /// All channels side by side, so that a slow one does not use up the time of the others.
    async fn handle(&self, task: &Task) -> Result<(), HandleError> {
        let event = &task.event;
        if is_repetition(event) {
            return Ok(());
        }
        let concerned = self.channels.iter().filter(|channel| channel.filter.matches(event));
        let outcomes = join_all(concerned.map(async |channel| {
            let outcome = self.tell(channel, event).await;
            outcome.map_err(|error| named(error, &channel.name))
        }))
        .await;
        outcomes.into_iter().fold(Ok(()), worst)
    }

    fn has_one_target(&self) -> bool {
        self.channels.len() < 2
    }
}

/// Whether somebody tried again whose request is open: approvers know of it already.
fn is_repetition(event: &SignUpEvent) -> bool {
    let reasons = &event.decision.reasons;
    event.kind == Kind::Pending && reasons.iter().any(|it| it.effect == Effect::AlreadyPending)
}

fn named(error: HandleError, channel: &str) -> HandleError {
    let naming = || format!("channel `{channel}`");
    match error {
        HandleError::Retry { source, cause, after } => {
            HandleError::Retry { source: source.context(naming()), cause, after }
        }
        HandleError::Park { source, cause } => {
            HandleError::Park { source: source.context(naming()), cause }
        }
        store @ HandleError::StoreUnavailable(_) => store,
    }
}

/// What becomes of an event whose channels ended differently.
///
/// As long as one channel may still get through, the event is tried again: those that are done are
/// not told again, and those that refuse say so once more. It is parked when only they are left.
fn worst(one: Result<(), HandleError>, other: Result<(), HandleError>) -> Result<(), HandleError> {
    use HandleError::{Park, Retry, StoreUnavailable};
    let both = |one: anyhow::Error, other: anyhow::Error| anyhow!("{one:#}; {other:#}");
    match (one, other) {
        (Ok(()), outcome) | (outcome, Ok(())) => outcome,
        (Err(StoreUnavailable(source)), _) | (_, Err(StoreUnavailable(source))) => {
            Err(StoreUnavailable(source))
        }
        (Err(Retry { source, cause, after }), Err(Retry { source: other, after: also, .. })) => {
            Err(Retry { source: both(source, other), cause, after: after.max(also) })
        }
        (Err(Retry { source, cause, after }), Err(Park { source: other, .. }))
        | (Err(Park { source: other, .. }), Err(Retry { source, cause, after })) => {
            Err(Retry { source: both(source, other), cause, after })
        }
        (Err(Park { source, cause }), Err(Park { source: other, .. })) => {
            Err(Park { source: both(source, other), cause })
        }
    }
}

/// Why a channel cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Complaint {
    /// Which channel, from 0.
    pub index: usize,
    pub channel: String,
    /// The setting that is at fault: `name`, `subject`, `body`, `url`, `headers`, `server`,
    /// `login`, `from` or `to`.
    pub key: &'static str,
    pub message: String,
}

impl fmt::Display for Complaint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "channel `{}`: {}: {}", self.channel, self.key, self.message)
    }
}

impl std::error::Error for Complaint {}

/// A setting and what is wrong with it.
type Fault = (&'static str, String);

fn channels(settings: NotifySettings) -> Result<Vec<Channel>, Vec<Complaint>> {
    let mut complaints = Vec::new();
    let mut names = std::collections::HashSet::new();
    let mut channels = Vec::new();
    let pages = settings.approvals.as_ref();
    for (index, settings) in settings.channels.into_iter().enumerate() {
        let name = settings.name.clone();
        let mut faults = Vec::new();
        // The name goes into header fields and file names of mail, so it is kept plain.
        if name.parse::<ConnectorName>().is_err() {
            let rule = "must be lower-case letters, digits and hyphens, a letter first";
            faults.push(("name", rule.to_owned()));
        } else if !names.insert(name.clone()) {
            faults.push(("name", "there is another channel of this name".to_owned()));
        }
        channels.extend(channel(settings, pages, &mut faults));
        complaints.extend(faults.into_iter().map(|(key, message)| Complaint {
            index,
            channel: name.clone(),
            key,
            message,
        }));
    }
    if complaints.is_empty() { Ok(channels) } else { Err(complaints) }
}

fn channel(
    settings: ChannelSettings,
    pages: Option<&ApprovalPages>,
    faults: &mut Vec<Fault>,
) -> Option<Channel> {
    let ChannelSettings { name, filter, subject, body, kind } = settings;
    // Whoever has the link decides, so it never goes to the one whom the decision is about.
    let is_for_person = matches!(&kind, ChannelKind::Mail { to: Recipient::Person, .. });
    let pages = pages.map(|it| if is_for_person { it.without_links() } else { it.clone() });
    let templates = Templates::compile(subject, body, pages.as_ref(), faults);
    let way = match kind {
        ChannelKind::Record => Some(Way::Record),
        ChannelKind::Webhook { url, format, headers } => {
            Webhook::new(&url, format, &headers, faults).map(Way::Webhook)
        }
        ChannelKind::Mail { server, login, from, to, tls } => {
            Mail::new(&server, login.as_ref(), &from, &to, tls, faults).map(Way::Mail)
        }
    };
    Some(Channel { name, filter, templates: templates?, way: way? })
}

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
    fn link(&self, event: &SignUpEvent) -> Option<String> {
        let token = self.links.as_ref()?.token(event.id, self.expires_at(event));
        Some(format!("{}/approvals/{token}", self.base_url))
    }

    /// For messages to others, whom it still tells until when somebody decides.
    fn without_links(&self) -> Self {
        Self { links: None, ..self.clone() }
    }

    fn expires_at(&self, event: &SignUpEvent) -> OffsetDateTime {
        self.requests.expires_at(event.time)
    }

    #[cfg(test)]
    fn sample() -> Self {
        let links = ApprovalLinks::new(&vestibule_events::PseudonymKey::new(vec![1; 32]));
        let requests = ApprovalsSettings { expires_after: Duration::from_secs(3600) };
        Self::new("https://sign-up.example.com/", links, requests).unwrap()
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
