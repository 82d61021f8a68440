//! Push messages to devices: browsers, Firebase Cloud Messaging, Apple.
//!
//! A message goes to one device at a time, under an identity that is the same each time, so that a
//! device which gets it twice shows it once. That a device is gone is an outcome and no failure.
//! Which devices there are is left to the caller.

mod apns;
mod encrypt;
mod fcm;
mod keys;
#[cfg(test)]
mod tests;
mod web;

use time::OffsetDateTime;
use vestibule_events::SignUpEvent;
use vestibule_store::{Device, DeviceAddress, DeviceKind};

use self::{apns::Apns, fcm::Fcm, web::WebPush};
use super::{
    channels::{Fault, Secrets},
    settings::{ApnsSettings, FcmSettings, Recipient, WebPushSettings},
    template::Message,
};
use crate::{Cause, HandleError};

/// A push service, and whose devices are told over it.
#[derive(Debug)]
pub(super) struct Push {
    /// `None` means whoever signs up.
    role: Option<String>,
    service: Service,
}

#[derive(Debug)]
enum Service {
    Web(WebPush),
    Fcm(Fcm),
    Apns(Apns),
}

/// What became of a message to a device.
#[derive(Debug)]
pub(super) enum Pushed {
    /// The service has taken it, under its own id where it gave one.
    Sent { id: Option<String> },
    /// The device is no more, and will not come back under this address. Said only where that is
    /// certain: what a wrong set-up may answer as well would remove everybody's devices.
    Gone { reason: &'static str },
}

impl Push {
    pub(super) fn web(
        settings: &WebPushSettings,
        secrets: Secrets,
        faults: &mut Vec<Fault>,
    ) -> Option<Self> {
        let role = role(&settings.to, faults);
        let service = WebPush::new(settings, secrets, faults).map(Service::Web);
        Some(Self { role: role?, service: service? })
    }

    pub(super) fn fcm(
        settings: &FcmSettings,
        secrets: Secrets,
        faults: &mut Vec<Fault>,
    ) -> Option<Self> {
        let role = role(&settings.to, faults);
        let service = Fcm::new(settings, secrets, faults).map(Service::Fcm);
        Some(Self { role: role?, service: service? })
    }

    pub(super) fn apns(
        settings: &ApnsSettings,
        secrets: Secrets,
        faults: &mut Vec<Fault>,
    ) -> Option<Self> {
        let role = role(&settings.to, faults);
        let service = Apns::new(settings, secrets, faults).map(Service::Apns);
        Some(Self { role: role?, service: service? })
    }

    pub(super) fn role(&self) -> Option<&str> {
        self.role.as_deref()
    }

    pub(super) const fn kind(&self) -> DeviceKind {
        match self.service {
            Service::Web(_) => DeviceKind::WebPush,
            Service::Fcm(_) => DeviceKind::Fcm,
            Service::Apns(_) => DeviceKind::Apns,
        }
    }

    /// Each browser brings a push service of its own; phones have one.
    pub(super) const fn has_one_target(&self) -> bool {
        !matches!(self.service, Service::Web(_))
    }

    pub(super) async fn send(
        &self,
        device: &Device,
        message: &Message,
        event: &SignUpEvent,
        idempotency_key: &str,
        now: OffsetDateTime,
    ) -> Result<Pushed, HandleError> {
        let note = Note { message, event, idempotency_key, now };
        match (&self.service, &device.address) {
            (Service::Web(web), DeviceAddress::WebPush { endpoint, public_key, auth }) => {
                web.send(endpoint, public_key, auth, &note).await
            }
            (Service::Fcm(fcm), DeviceAddress::Fcm { token }) => fcm.send(token, &note).await,
            (Service::Apns(apns), DeviceAddress::Apns { token }) => {
                apns.send(token, device.registered_at, &note).await
            }
            _ => {
                let source = anyhow::anyhow!("the device is of another kind than the channel");
                Err(HandleError::park(Cause::InvalidRecipient, source))
            }
        }
    }
}

/// What is sent, whichever the service.
struct Note<'a> {
    message: &'a Message,
    event: &'a SignUpEvent,
    idempotency_key: &'a str,
    now: OffsetDateTime,
}

/// The role whose holders are told; the outer `None` is a fault.
fn role(to: &Recipient, faults: &mut Vec<Fault>) -> Option<Option<String>> {
    match to {
        Recipient::Person => Some(None),
        Recipient::Role(role) => Some(Some(role.clone())),
        Recipient::Fixed(_) => {
            let expected = "devices are those of \"person\" or of \"role:NAME\"";
            faults.push(("to", expected.to_owned()));
            None
        }
    }
}

/// Says so where a time to live is longer than any service keeps a message.
fn check_ttl(ttl: std::time::Duration, faults: &mut Vec<Fault>) {
    const FOUR_WEEKS: std::time::Duration = std::time::Duration::from_secs(28 * 24 * 60 * 60);
    if ttl > FOUR_WEEKS {
        faults.push(("ttl", "must not be longer than 28d".to_owned()));
    }
}
