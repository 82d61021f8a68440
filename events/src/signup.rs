//! A sign-up: one call of a platform, normalised, whatever dialect it came in.

use std::{fmt, str::FromStr};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Attributes of the person under their Graph names, as the platform sent them.
pub type Claims = serde_json::Map<String, serde_json::Value>;

/// The call, normalised: where in which sign-up, and who with which claims.
///
/// `Debug` leaves the person out, so that `?sign_up` in a log line is safe.
#[derive(Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct SignUp {
    pub connector: ConnectorName,
    pub protocol: Protocol,
    pub step: Step,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub email: Option<Email>,
    /// How the person signs in; absent for Entra and Microsoft accounts (contract 1.2).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub identities: Vec<Identity>,
    /// Every other attribute. A known attribute of an unexpected type stays here too, untouched.
    #[serde(default, skip_serializing_if = "serde_json::Map::is_empty")]
    pub claims: Claims,
    /// The application being signed in to (`client_id`), not the resource.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub client: Option<String>,
    /// `ui_locales`: one or more BCP 47 tags, separated by spaces.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub locale: Option<String>,
    /// The address that the person's browser calls from, where the dialect carries one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ip: Option<String>,
    /// The account, where it exists already (`before-token` only).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub object_id: Option<String>,
    /// The platform's own id of the sign-up, where the dialect carries one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub correlation_id: Option<String>,
}

impl fmt::Debug for SignUp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SignUp")
            .field("connector", &self.connector)
            .field("protocol", &self.protocol)
            .field("step", &self.step)
            .finish_non_exhaustive()
    }
}

/// A configured endpoint: lower-case letters, digits and hyphens, at most 63, a letter first.
///
/// Such a name is safe as a path segment, as a NATS subject token and in a metric label.
#[derive(
    Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema,
)]
#[serde(try_from = "String", into = "String")]
#[schemars(with = "String")]
pub struct ConnectorName(String);

impl ConnectorName {
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ConnectorName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for ConnectorName {
    type Err = InvalidName;

    fn from_str(name: &str) -> Result<Self, InvalidName> {
        Self::try_from(name.to_owned())
    }
}

impl TryFrom<String> for ConnectorName {
    type Error = InvalidName;

    fn try_from(name: String) -> Result<Self, InvalidName> {
        let starts_with_letter = name.starts_with(|c: char| c.is_ascii_lowercase());
        let all_plain =
            name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
        if starts_with_letter && all_plain && name.len() <= 63 {
            Ok(Self(name))
        } else {
            Err(InvalidName)
        }
    }
}

impl From<ConnectorName> for String {
    fn from(name: ConnectorName) -> Self {
        name.0
    }
}

/// A name that cannot stand in a path, a subject and a metric alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a name is 1 to 63 lower-case letters, digits and hyphens, and starts with a letter")]
pub struct InvalidName;

/// The wire dialect that a platform speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Protocol {
    /// Entra B2B self-service sign-up and B2C user flows.
    ApiConnector,
    /// RESTful technical profiles of B2C custom policies.
    CustomPolicy,
    /// Custom authentication extensions of Entra External ID.
    CustomExtension,
}

impl Protocol {
    pub const ALL: [Self; 3] = [Self::ApiConnector, Self::CustomPolicy, Self::CustomExtension];

    /// The name in configuration and events.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::ApiConnector => "api-connector",
            Self::CustomPolicy => "custom-policy",
            Self::CustomExtension => "custom-extension",
        }
    }
}

/// Where in the sign-up the call happens.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "kebab-case")]
pub enum Step {
    /// Right after the identity provider, before the attribute page.
    AfterFederation,
    /// After the attribute page, before the account is written.
    BeforeCreate,
    /// A token is about to be issued; the account exists. Called at every sign-in.
    BeforeToken,
}

impl Step {
    pub const ALL: [Self; 3] = [Self::AfterFederation, Self::BeforeCreate, Self::BeforeToken];

    /// The name in paths, configuration and events.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::AfterFederation => "after-federation",
            Self::BeforeCreate => "before-create",
            Self::BeforeToken => "before-token",
        }
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// An e-mail address as the platform sent it; unverified, and never printed whole.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(transparent)]
pub struct Email(String);

impl Email {
    #[must_use]
    pub fn new(address: impl Into<String>) -> Self {
        Self(address.into())
    }

    /// The whole address. Personal data: not for logs, metrics or errors.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// What follows the last `@`; empty where there is none.
    #[must_use]
    pub fn domain(&self) -> &str {
        self.0.rsplit_once('@').map_or("", |(_, domain)| domain)
    }
}

impl fmt::Debug for Email {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "…@{}", self.domain())
    }
}

/// One way in which the person signs in (Graph `objectIdentity`).
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Identity {
    pub sign_in_type: String,
    pub issuer: String,
    pub issuer_assigned_id: String,
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Identity({}, …)", self.issuer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connector_name_is_safe_in_paths_and_subjects() {
        for good in ["a", "partners", "b2c-flow-1"] {
            assert!(good.parse::<ConnectorName>().is_ok(), "{good}");
        }
        let too_long = "a".repeat(64);
        for bad in ["", "1a", "-a", "A", "a.b", "a*", "a>b", "a b", "ä", too_long.as_str()] {
            assert_eq!(bad.parse::<ConnectorName>(), Err(InvalidName), "{bad}");
        }
    }

    #[test]
    fn nothing_personal_is_printed() {
        let email = Email::new("ada@example.com");
        let identity = Identity {
            sign_in_type: "federated".into(),
            issuer: "google.com".into(),
            issuer_assigned_id: "1234567890".into(),
        };
        assert_eq!(format!("{email:?}"), "…@example.com");
        assert_eq!(format!("{identity:?}"), "Identity(google.com, …)");
    }
}
