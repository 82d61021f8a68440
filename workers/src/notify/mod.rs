//! Tells somebody: templates rendered with the event, sent over channels.
//!
//! Each channel keeps its own state, and within it each device and each holder of a role, so that
//! one which fails does not make the others send again. A message goes out under a stable key
//! (`Idempotency-Key`, `Message-ID`, a topic or an id to collapse by): if we die between sending and
//! taking note, the provider can tell the second one from a new one. The channel `record` keeps the
//! message in the store and sends nothing. Approvers are told once of each request: what a person
//! tries again while theirs is open is told to nobody.

mod channels;
mod mail;
mod ntfy;
mod preview;
mod push;
mod settings;
mod stable;
mod template;
#[cfg(test)]
mod tests;
mod webhook;

use std::time::Duration;

use anyhow::anyhow;
use async_trait::async_trait;
use futures_util::future::join_all;
use lettre::message::Mailbox;
use time::OffsetDateTime;
use tokio::time::sleep;
use vestibule_events::{Effect, Filter, Kind, Person, SignUpEvent};
use vestibule_store::{Begun, Device, RoleHolder, Store, StoreError};

pub use self::{
    channels::Complaint,
    preview::{Preview, PreviewText},
    settings::{
        ApnsSettings, ApprovalPages, ChannelKind, ChannelSettings, FcmSettings, LocaleSettings,
        MailLogin, MailTls, NotifySettings, NtfyPriority, NtfySettings, Recipient, Urgency,
        WebPushSettings, WebhookFormat,
    },
};
use self::{
    channels::{Channel, Secrets, Way, channels},
    mail::{Mail, To},
    push::{Push, Pushed},
    template::Message,
};
use crate::{Cause, HandleError, Task, Worker};

/// A role that more people have is told to so many of them; that is what a mailing list is for.
const ROLE_HOLDERS_MAX: u32 = 500;

/// Of more devices than anybody carries, the newest are told.
const DEVICES_MAX: u32 = 20;

/// So many devices, or holders of a role, are told at a time.
const AT_A_TIME: usize = 8;

/// How long an answer is waited for: shorter than an attempt, so that a slow provider is told from a
/// stuck worker.
const PATIENCE: Duration = Duration::from_secs(15);

/// The worker `notify`.
#[derive(Debug)]
pub struct Notify {
    channels: Vec<Channel>,
    store: Store,
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
        Ok(Self { channels: channels(settings, Secrets::Real)?, store })
    }

    /// What `new` would complain about. Secrets may be stand-ins: an HTTPS URL is one for all of
    /// them, and the keys of push services are not looked into.
    pub fn check(settings: &NotifySettings) -> Result<(), Vec<Complaint>> {
        channels(settings.clone(), Secrets::StandIns).map(drop)
    }

    /// One channel: render, begin, send, finish. What was sent before is not sent again.
    async fn tell(&self, channel: &Channel, event: &SignUpEvent) -> Result<(), HandleError> {
        let message = channel
            .templates
            .render(event)
            .map_err(|failed| HandleError::park(Cause::InvalidTemplate, failed))?;
        let name = channel.name.as_str();
        match &channel.way {
            Way::Record => {
                let Message { subject, body } = &message;
                let now = OffsetDateTime::now_utc();
                self.store.record_notification(Self::NAME, event, name, subject, body, now).await?;
                Ok(())
            }
            Way::Webhook(webhook) => {
                if let Some(key) = self.begin(event, name).await? {
                    webhook.send(&message, event, name, &key).await?;
                    self.finish(event, name, None).await?;
                }
                Ok(())
            }
            Way::Ntfy(ntfy) => {
                if let Some(key) = self.begin(event, name).await? {
                    ntfy.send(&message, &key).await?;
                    self.finish(event, name, None).await?;
                }
                Ok(())
            }
            Way::Mail(mail) => self.write(mail, name, event, &message).await,
            Way::Push(push) => self.push(push, name, event, &message).await,
        }
    }

    /// Mail, to everybody whom a channel is for; to each holder of a role one of their own.
    async fn write(
        &self,
        mail: &Mail,
        channel: &str,
        event: &SignUpEvent,
        message: &Message,
    ) -> Result<(), HandleError> {
        match mail.recipients() {
            To::Fixed(boxes) => {
                self.write_to(mail, Ok(boxes.clone()), channel, event, message).await
            }
            To::Person => {
                // Without an address there is nobody to tell, and nothing to retry or to mend.
                let Some(email) = &event.sign_up.email else { return Ok(()) };
                let to = mail::person(email).map(|it| vec![it]);
                self.write_to(mail, to, channel, event, message).await
            }
            To::Role(role) => {
                let mut outcome = Ok(());
                for some in self.holders(role, event).await?.chunks(AT_A_TIME) {
                    let outcomes = join_all(some.iter().map(async |holder| {
                        let Some(email) = &holder.email else { return Ok(()) };
                        let to = mail::person(email).map(|it| vec![it]);
                        let row = format!("{channel}.{}", holder.person);
                        self.write_to(mail, to, &row, event, message).await
                    }));
                    outcome = outcomes.await.into_iter().fold(outcome, worst);
                }
                outcome
            }
        }
    }

    async fn write_to(
        &self,
        mail: &Mail,
        to: Result<Vec<Mailbox>, HandleError>,
        row: &str,
        event: &SignUpEvent,
        message: &Message,
    ) -> Result<(), HandleError> {
        let letter = mail.to(to?, event, row, message)?;
        if self.begin(event, row).await?.is_some() {
            letter.send().await?;
            self.finish(event, row, None).await?;
        }
        Ok(())
    }

    /// A push message, to every device of everybody whom a channel is for. Without a device there is
    /// nobody to tell.
    async fn push(
        &self,
        push: &Push,
        channel: &str,
        event: &SignUpEvent,
        message: &Message,
    ) -> Result<(), HandleError> {
        let people: Vec<Person> = match push.role() {
            None => vec![event.person.clone()],
            Some(role) => {
                self.holders(role, event).await?.into_iter().map(|it| it.person).collect()
            }
        };
        let mut outcome = Ok(());
        for person in &people {
            let devices = self.store.reachable_devices(person, push.kind(), DEVICES_MAX).await?;
            for some in devices.chunks(AT_A_TIME) {
                let outcomes =
                    join_all(some.iter().map(async |device| {
                        self.push_to(push, device, channel, event, message).await
                    }));
                outcome = outcomes.await.into_iter().fold(outcome, worst);
            }
        }
        outcome
    }

    async fn push_to(
        &self,
        push: &Push,
        device: &Device,
        channel: &str,
        event: &SignUpEvent,
        message: &Message,
    ) -> Result<(), HandleError> {
        let row = format!("{channel}.{}", device.id);
        let Some(key) = self.begin(event, &row).await? else { return Ok(()) };
        let now = OffsetDateTime::now_utc();
        let pushed = push.send(device, message, event, &key, now).await;
        match pushed.map_err(|error| named(error, &format!("device {}", device.id)))? {
            Pushed::Sent { id } => {
                self.finish(event, &row, id.as_deref()).await?;
                self.store.device_used(device.id, now).await?;
            }
            Pushed::Gone { reason } => {
                self.store.remove_device(device.id, reason, now).await?;
                self.store.forget_notification(Self::NAME, event.id, &row).await?;
                tracing::info!(device = %device.id, reason, "a device is gone and was removed");
            }
        }
        Ok(())
    }

    /// Everybody with a role, but for whoever signs up: nobody decides about themselves.
    async fn holders(
        &self,
        role: &str,
        event: &SignUpEvent,
    ) -> Result<Vec<RoleHolder>, StoreError> {
        let now = OffsetDateTime::now_utc();
        let mut holders = self.store.role_holders(role, now, ROLE_HOLDERS_MAX).await?;
        holders.retain(|it| it.person != event.person);
        Ok(holders)
    }

    /// The key to send under, or `None` if it was sent before.
    async fn begin(&self, event: &SignUpEvent, row: &str) -> Result<Option<String>, StoreError> {
        let now = OffsetDateTime::now_utc();
        Ok(match self.store.begin_notification(Self::NAME, event, row, now).await? {
            Begun::Send { idempotency_key } => Some(idempotency_key),
            Begun::SentBefore => None,
        })
    }

    /// Notes that a message is out. Insists a little: if the note fails, the message goes out again.
    async fn finish(
        &self,
        event: &SignUpEvent,
        row: &str,
        provider_id: Option<&str>,
    ) -> Result<(), StoreError> {
        for pause in [50, 200, 1000].map(Duration::from_millis) {
            match self.finish_once(event, row, provider_id).await {
                Err(StoreError::Unavailable(_)) => sleep(pause).await,
                other => return other,
            }
        }
        self.finish_once(event, row, provider_id).await
    }

    async fn finish_once(
        &self,
        event: &SignUpEvent,
        row: &str,
        provider_id: Option<&str>,
    ) -> Result<(), StoreError> {
        let now = OffsetDateTime::now_utc();
        self.store.finish_notification(Self::NAME, event.id, row, provider_id, now).await.map(drop)
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
            outcome.map_err(|error| named(error, &format!("channel `{}`", channel.name)))
        }))
        .await;
        outcomes.into_iter().fold(Ok(()), worst)
    }

    fn has_one_target(&self) -> bool {
        match self.channels.as_slice() {
            [] => true,
            [Channel { way: Way::Push(push), .. }] => push.has_one_target(),
            [_] => true,
            _ => false,
        }
    }
}

/// Whether somebody tried again whose request is open: approvers know of it already.
fn is_repetition(event: &SignUpEvent) -> bool {
    let reasons = &event.decision.reasons;
    event.kind == Kind::Pending && reasons.iter().any(|it| it.effect == Effect::AlreadyPending)
}

/// Says where it failed.
fn named(error: HandleError, place: &str) -> HandleError {
    match error {
        HandleError::Retry { source, cause, after } => {
            HandleError::Retry { source: source.context(place.to_owned()), cause, after }
        }
        HandleError::Park { source, cause } => {
            HandleError::Park { source: source.context(place.to_owned()), cause }
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
