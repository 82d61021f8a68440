//! Where granted roles are to be held: groups and app roles of the directory, groups of a SCIM
//! service, tables of a database.
//!
//! A target knows roles under names of its own. Giving what is there already and taking what is not
//! are no failures, so each may be done again; which of them is wanted is left to others.

mod entra;
mod scim;
mod sql;

use std::{collections::BTreeMap, fmt};

use async_trait::async_trait;
use secrecy::SecretString;
use vestibule_events::{Email, Identity, Person};
use vestibule_store::Seen;

use self::{
    entra::{AppRoles, Groups},
    scim::Scim,
    sql::Sql,
};
use crate::{GraphSettings, HandleError, SettingError, graph::Graph};

/// Somewhere that granted roles are to be held.
#[derive(Clone, Debug)]
pub struct TargetSettings {
    /// What the store and the operators know it by. Under another name it is another target.
    pub name: String,
    pub kind: TargetKind,
    /// The roles that it holds, and what each is called there. For a database, none means all, each
    /// under its own name.
    pub roles: BTreeMap<String, String>,
}

/// What sort of target, and how it is reached.
#[derive(Clone, Debug)]
pub enum TargetKind {
    /// Groups of the directory; a role is a group's id.
    GraphGroup(GraphSettings),
    /// Roles of an application; a role is an app role's id.
    GraphAppRole {
        graph: GraphSettings,
        /// The object id of the application's service principal.
        resource: String,
    },
    /// Groups of a SCIM 2.0 service; a role is a group's id.
    Scim(ScimSettings),
    /// Statements in a database.
    Sql(SqlSettings),
}

/// How a SCIM service is reached.
#[derive(Clone, Debug)]
pub struct ScimSettings {
    /// Up to what comes before `/Users`.
    pub url: String,
    pub token: SecretString,
    /// Whether somebody whom the service does not know yet is made known to it.
    pub create_users: bool,
}

/// Which database, and what to do there. Statements name their parameters: `:person`, `:email`,
/// `:object_id` and `:role`; they are bound, and a value that is not known is null.
#[derive(Clone, Debug)]
pub struct SqlSettings {
    /// `postgres://…` or `sqlite:PATH`.
    pub url: SecretString,
    pub grant: String,
    pub revoke: String,
    /// Gives a row where the person has the role; without it nobody can compare.
    pub holds: Option<String>,
}

/// What is wrong with a target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TargetError {
    /// Which target, from 0.
    pub index: usize,
    pub target: String,
    pub error: SettingError,
}

impl fmt::Display for TargetError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "target `{}`: {}", self.target, self.error)
    }
}

impl std::error::Error for TargetError {}

/// Whom a role is given to or taken from.
///
/// `Debug` leaves out how a target knows them.
#[derive(Clone)]
pub(super) struct Whom {
    pub(super) person: Person,
    pub(super) email: Option<Email>,
    /// With which they sign in; of an event, and else none.
    pub(super) identities: Vec<Identity>,
    /// The directory's id of their account.
    pub(super) object_id: Option<String>,
    /// What the target told before.
    pub(super) seen: Seen,
}

impl fmt::Debug for Whom {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Whom({})", self.person)
    }
}

/// Whether somebody holds a role at a target.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Actual {
    Present,
    Absent,
    /// The target knows nobody of that name.
    NoAccount,
    /// The target cannot be asked.
    Unknown,
}

impl Actual {
    /// The name on the command line.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Present => "present",
            Self::Absent => "absent",
            Self::NoAccount => "no account",
            Self::Unknown => "unknown",
        }
    }

    pub(super) const fn of(is_present: bool) -> Self {
        if is_present { Self::Present } else { Self::Absent }
    }
}

/// What every target can do. `role` is what the target calls it; `seen` of whom it was given is
/// brought up to date, also where the call fails.
#[async_trait]
pub(super) trait Target: fmt::Debug + Send + Sync {
    async fn give(&self, role: &str, whom: &mut Whom) -> Result<(), HandleError>;

    async fn take(&self, role: &str, whom: &mut Whom) -> Result<(), HandleError>;

    /// Of each of them, whether they hold the role.
    async fn holds(&self, role: &str, whom: &mut [Whom]) -> Result<Vec<Actual>, HandleError>;
}

/// A target with its name and its roles.
#[derive(Debug)]
pub(super) struct Place {
    pub(super) name: String,
    roles: BTreeMap<String, String>,
    has_all: bool,
    pub(super) target: Box<dyn Target>,
}

impl Place {
    /// What the target calls a role, if it holds it at all.
    pub(super) fn role<'a>(&'a self, role: &'a str) -> Option<&'a str> {
        if self.has_all { Some(role) } else { self.roles.get(role).map(String::as_str) }
    }
}

/// Makes targets ready; nothing is called yet. All complaints come at once.
pub(super) fn places(settings: Vec<TargetSettings>) -> Result<Vec<Place>, Vec<TargetError>> {
    let (mut places, mut errors) = (Vec::<Place>::new(), Vec::new());
    for (index, settings) in settings.into_iter().enumerate() {
        let TargetSettings { name, kind, roles } = settings;
        let mut faults = Vec::new();
        let mut complain = |key, message: &str| {
            faults.push(SettingError { key, message: message.to_owned() });
        };
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        if name.is_empty() || name.len() > 100 || !name.chars().all(plain) {
            complain("name", "must be of letters, digits, dots and hyphens, at most 100");
        } else if places.iter().any(|it| it.name == name) {
            complain("name", "there is another target of this name");
        }
        let has_all = roles.is_empty() && matches!(kind, TargetKind::Sql(_));
        if roles.is_empty() && !has_all {
            complain("roles", "must name at least one role and what it is called there");
        }
        if roles.iter().any(|(role, there)| role.trim().is_empty() || there.trim().is_empty()) {
            complain("roles", "must hold no empty name");
        }
        match (target(kind, &mut faults), faults.is_empty()) {
            (Some(target), true) => places.push(Place { name, roles, has_all, target }),
            _ => errors.extend(faults.into_iter().map(|error| TargetError {
                index,
                target: name.clone(),
                error,
            })),
        }
    }
    if errors.is_empty() { Ok(places) } else { Err(errors) }
}

fn target(kind: TargetKind, faults: &mut Vec<SettingError>) -> Option<Box<dyn Target>> {
    Some(match kind {
        TargetKind::GraphGroup(graph) => Box::new(Groups::new(Graph::new(&graph, faults)?)),
        TargetKind::GraphAppRole { graph, resource } => {
            if resource.trim().is_empty() {
                let message = "must be the object id of the application's service principal";
                faults.push(SettingError { key: "resource", message: message.to_owned() });
            }
            Box::new(AppRoles::new(Graph::new(&graph, faults)?, resource))
        }
        TargetKind::Scim(settings) => Box::new(Scim::new(settings, faults)?),
        TargetKind::Sql(settings) => Box::new(Sql::new(&settings, faults)?),
    })
}
