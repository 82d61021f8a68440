//! Devices that people registered for push notifications.
//!
//! A device is known by what reaches it: registered again, it stays the same device; registered by
//! somebody else, it is theirs from then on. What reaches a device is a secret and is forgotten when
//! the device is removed; that it was there, and why it went, is kept.

use std::{fmt, str::FromStr};

use secrecy::{ExposeSecret, SecretString};
use time::OffsetDateTime;
use uuid::Uuid;
use vestibule_events::Person;

use crate::{
    Store, StoreError,
    error::Cause,
    session::{execute, fetch_all, fetch_one},
    text::{storable, storable_time},
};

/// By which service a device is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceKind {
    /// A browser (RFC 8030).
    WebPush,
    /// Firebase Cloud Messaging.
    Fcm,
    /// Apple Push Notification service.
    Apns,
}

impl DeviceKind {
    pub const ALL: [Self; 3] = [Self::WebPush, Self::Fcm, Self::Apns];

    /// The name in the store and in configuration.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::WebPush => "web-push",
            Self::Fcm => "fcm",
            Self::Apns => "apns",
        }
    }
}

impl fmt::Display for DeviceKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A word that is no [`DeviceKind`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("there is no kind of device `{0}`; there are web-push, fcm and apns")]
pub struct UnknownDeviceKind(String);

impl FromStr for DeviceKind {
    type Err = UnknownDeviceKind;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let found = Self::ALL.into_iter().find(|it| it.as_str() == text);
        found.ok_or_else(|| UnknownDeviceKind(text.to_owned()))
    }
}

/// What reaches a device.
#[derive(Clone, Debug)]
pub enum DeviceAddress {
    WebPush {
        endpoint: SecretString,
        /// The browser's public key (`p256dh`), as it gave it.
        public_key: String,
        auth: SecretString,
    },
    Fcm {
        token: SecretString,
    },
    Apns {
        token: SecretString,
    },
}

impl DeviceAddress {
    #[must_use]
    pub const fn kind(&self) -> DeviceKind {
        match self {
            Self::WebPush { .. } => DeviceKind::WebPush,
            Self::Fcm { .. } => DeviceKind::Fcm,
            Self::Apns { .. } => DeviceKind::Apns,
        }
    }

    const fn secret(&self) -> &SecretString {
        match self {
            Self::WebPush { endpoint, .. } => endpoint,
            Self::Fcm { token } | Self::Apns { token } => token,
        }
    }
}

/// A device that can be reached.
#[derive(Clone, Debug)]
pub struct Device {
    pub id: Uuid,
    pub person: Person,
    /// The last time: an app may register what it is reached by at each start.
    pub registered_at: OffsetDateTime,
    pub address: DeviceAddress,
}

/// A device as it can be shown: not how it is reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceRecord {
    pub id: Uuid,
    pub person: Person,
    /// As [`DeviceKind`] names it; a newer version may have stored one that this one lacks.
    pub kind: String,
    pub label: Option<String>,
    pub created_at: OffsetDateTime,
    /// When a message was last taken for it.
    pub last_used_at: Option<OffsetDateTime>,
    pub removed_at: Option<OffsetDateTime>,
    pub removed_reason: Option<String>,
}

impl Store {
    /// Registers a device for a person, and gives its id: that of before where the person had
    /// registered it already.
    pub async fn register_device(
        &self,
        person: &Person,
        address: &DeviceAddress,
        label: Option<&str>,
        now: OffsetDateTime,
    ) -> Result<Uuid, StoreError> {
        let (public_key, auth) = match address {
            DeviceAddress::WebPush { public_key, auth, .. } => {
                (Some(storable(public_key)), Some(storable(auth.expose_secret())))
            }
            DeviceAddress::Fcm { .. } | DeviceAddress::Apns { .. } => (None, None),
        };
        let mut session = self.write().await?;
        let (id,): (Uuid,) = fetch_one!(
            &mut session,
            sqlx::query_as(
                "INSERT INTO devices (id, person, kind, address, public_key, auth, label,
                     created_at, registered_at)
                 VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $8)
                 ON CONFLICT (kind, address) WHERE removed_at IS NULL DO UPDATE SET
                     id = CASE WHEN devices.person = excluded.person
                          THEN devices.id ELSE excluded.id END,
                     created_at = CASE WHEN devices.person = excluded.person
                          THEN devices.created_at ELSE excluded.created_at END,
                     last_used_at = CASE WHEN devices.person = excluded.person
                          THEN devices.last_used_at ELSE NULL END,
                     person = excluded.person, public_key = excluded.public_key,
                     auth = excluded.auth, label = excluded.label,
                     registered_at = excluded.registered_at
                 RETURNING id"
            )
            .bind(Uuid::now_v7())
            .bind(person.as_str())
            .bind(address.kind().as_str())
            .bind(storable(address.secret().expose_secret()))
            .bind(public_key)
            .bind(auth)
            .bind(label.map(storable))
            .bind(storable_time(now))
        )?;
        session.commit().await?;
        Ok(id)
    }

    /// All devices of a person that were ever registered, the oldest first.
    pub async fn devices_of(&self, person: &Person) -> Result<Vec<DeviceRecord>, StoreError> {
        let mut session = self.read().await?;
        let rows: Vec<RecordRow> = fetch_all!(
            &mut session,
            sqlx::query_as(
                "SELECT id, person, kind, label, created_at, last_used_at, removed_at,
                     removed_reason
                 FROM devices WHERE person = $1 ORDER BY id"
            )
            .bind(person.as_str())
        )?;
        Ok(rows.into_iter().map(DeviceRecord::from).collect())
    }

    /// The devices of a person that can be reached by a service, the newest `limit` of them.
    pub async fn reachable_devices(
        &self,
        person: &Person,
        kind: DeviceKind,
        limit: u32,
    ) -> Result<Vec<Device>, StoreError> {
        let mut session = self.read().await?;
        let rows: Vec<DeviceRow> = fetch_all!(
            &mut session,
            sqlx::query_as(
                "SELECT id, person, registered_at, address, public_key, auth FROM devices
                 WHERE person = $1 AND kind = $2 AND removed_at IS NULL
                 ORDER BY id DESC LIMIT $3"
            )
            .bind(person.as_str())
            .bind(kind.as_str())
            .bind(i64::from(limit))
        )?;
        rows.into_iter().map(|row| row.device(kind)).collect()
    }

    /// Notes that a message was taken for a device.
    pub async fn device_used(&self, device: Uuid, now: OffsetDateTime) -> Result<(), StoreError> {
        let mut session = self.write().await?;
        execute!(
            &mut session,
            sqlx::query("UPDATE devices SET last_used_at = $2 WHERE id = $1")
                .bind(device)
                .bind(storable_time(now))
        )?;
        session.commit().await
    }

    /// Removes a device and forgets how it is reached; says whether it was there.
    pub async fn remove_device(
        &self,
        device: Uuid,
        reason: &str,
        now: OffsetDateTime,
    ) -> Result<bool, StoreError> {
        let mut session = self.write().await?;
        let rows = execute!(
            &mut session,
            sqlx::query(
                "UPDATE devices SET removed_at = $2, removed_reason = $3, address = NULL,
                     public_key = NULL, auth = NULL
                 WHERE id = $1 AND removed_at IS NULL"
            )
            .bind(device)
            .bind(storable_time(now))
            .bind(storable(reason))
        )?;
        session.commit().await?;
        Ok(rows > 0)
    }
}

#[derive(sqlx::FromRow)]
struct RecordRow {
    id: Uuid,
    person: String,
    kind: String,
    label: Option<String>,
    created_at: OffsetDateTime,
    last_used_at: Option<OffsetDateTime>,
    removed_at: Option<OffsetDateTime>,
    removed_reason: Option<String>,
}

impl From<RecordRow> for DeviceRecord {
    fn from(row: RecordRow) -> Self {
        Self {
            id: row.id,
            person: Person::from_pseudonym(row.person),
            kind: row.kind,
            label: row.label,
            created_at: row.created_at,
            last_used_at: row.last_used_at,
            removed_at: row.removed_at,
            removed_reason: row.removed_reason,
        }
    }
}

#[derive(sqlx::FromRow)]
struct DeviceRow {
    id: Uuid,
    person: String,
    registered_at: OffsetDateTime,
    address: Option<String>,
    public_key: Option<String>,
    auth: Option<String>,
}

impl DeviceRow {
    fn device(self, kind: DeviceKind) -> Result<Device, StoreError> {
        let broken =
            || StoreError::Misconfigured(Cause::new(format!("device {} is not whole", self.id)));
        let secret: SecretString = self.address.clone().ok_or_else(broken)?.into();
        let address = match kind {
            DeviceKind::WebPush => DeviceAddress::WebPush {
                endpoint: secret,
                public_key: self.public_key.clone().ok_or_else(broken)?,
                auth: self.auth.clone().ok_or_else(broken)?.into(),
            },
            DeviceKind::Fcm => DeviceAddress::Fcm { token: secret },
            DeviceKind::Apns => DeviceAddress::Apns { token: secret },
        };
        Ok(Device {
            id: self.id,
            person: Person::from_pseudonym(self.person),
            registered_at: self.registered_at,
            address,
        })
    }
}
