//! `[workers.permissions]`: who gets a role, and where it is to be held.

use std::time::Duration;

use anyhow::Context;
use secrecy::SecretString;
use vestibule_workers::{
    GrantRule, PermissionTargets, Permissions, PermissionsSettings, ScimSettings, SqlSettings,
    TargetKind, TargetSettings,
};

use super::graph::{self, GraphConfig};
use crate::config::{SecretSource, reader::Section, secret};

/// Who gets a role, and where it is to be held.
#[derive(Debug)]
pub(crate) struct PermissionsConfig {
    pub(crate) rules: Vec<GrantRule>,
    pub(crate) targets: Vec<TargetConfig>,
}

/// Somewhere that granted roles are to be held.
#[derive(Debug)]
pub(crate) struct TargetConfig {
    name: String,
    kind: KindConfig,
    roles: Vec<(String, String)>,
}

#[derive(Debug)]
enum KindConfig {
    GraphGroup(GraphConfig),
    GraphAppRole { graph: GraphConfig, resource: String },
    Scim { url: String, token: SecretSource, create_users: bool },
    Sql { url: SecretSource, grant: String, revoke: String, holds: Option<String> },
}

impl TargetConfig {
    /// What the worker needs, with the secrets that `fetch` brings.
    pub(crate) fn settings(
        &self,
        fetch: impl Fn(&SecretSource) -> anyhow::Result<SecretString>,
    ) -> anyhow::Result<TargetSettings> {
        let name = self.name.clone();
        let fetch = |source: &SecretSource| fetch(source).with_context(|| format!("target {name}"));
        let kind = match &self.kind {
            KindConfig::GraphGroup(graph) => TargetKind::GraphGroup(graph.settings(fetch)?),
            KindConfig::GraphAppRole { graph, resource } => TargetKind::GraphAppRole {
                graph: graph.settings(fetch)?,
                resource: resource.clone(),
            },
            KindConfig::Scim { url, token, create_users } => TargetKind::Scim(ScimSettings {
                url: url.clone(),
                token: fetch(token)?,
                create_users: *create_users,
            }),
            KindConfig::Sql { url, grant, revoke, holds } => TargetKind::Sql(SqlSettings {
                url: fetch(url)?,
                grant: grant.clone(),
                revoke: revoke.clone(),
                holds: holds.clone(),
            }),
        };
        Ok(TargetSettings {
            name: self.name.clone(),
            kind,
            roles: self.roles.iter().cloned().collect(),
        })
    }

    /// Complains of what would fail later; of secrets there are stand-ins.
    fn check(&self, section: &Section<'_>) {
        // A database's URL is a secret, so nobody knows yet which dialect its statements are in.
        let errors = ["postgres://stand-in", "sqlite:stand-in"].map(|stand_in| {
            let settings = self.settings(|_| Ok(stand_in.into()));
            let settings = settings.expect("a stand-in is always there");
            PermissionTargets::check(vec![settings]).err().unwrap_or_default()
        });
        if errors.iter().all(|it| !it.is_empty()) {
            let [errors, _] = errors;
            errors.into_iter().for_each(|it| section.complain(it.error.key, it.error.message));
        }
    }
}

/// `directory` is the one of another worker, where the file has it.
pub(super) fn read(
    section: &mut Section<'_>,
    directory: Option<&GraphConfig>,
) -> PermissionsConfig {
    let rules = section.sections("rules", read_rule);
    if section.is_present() && rules.is_empty() {
        section.complain("", "needs at least one [[workers.permissions.rules]] table");
    }
    let mut names = Vec::new();
    let targets = section.sections("targets", |it| {
        let target = read_target(it, directory)?;
        if names.contains(&target.name) {
            it.complain("name", "there is another target of this name");
        }
        names.push(target.name.clone());
        Some(target)
    });
    PermissionsConfig { rules, targets: targets.into_iter().flatten().collect() }
}

fn read_rule(section: &mut Section<'_>) -> GrantRule {
    let role = section.required("role");
    let rule = GrantRule {
        name: section.string("name").unwrap_or_else(|| role.clone()),
        when: section.string("when").unwrap_or_else(|| "true".into()),
        role,
        expires_after: section
            .has("expires_after")
            .then(|| section.duration("expires_after", Duration::ZERO)),
    };
    if section.has("role")
        && let Err(errors) = Permissions::check(&PermissionsSettings { rules: vec![rule.clone()] })
    {
        errors.into_iter().for_each(|error| section.complain(error.key, error.message));
    }
    rule
}

#[derive(Clone, Copy)]
enum Word {
    GraphGroup,
    GraphAppRole,
    Scim,
    Sql,
}

const KINDS: [(&str, Word); 4] = [
    ("graph-group", Word::GraphGroup),
    ("graph-app-role", Word::GraphAppRole),
    ("scim", Word::Scim),
    ("sql", Word::Sql),
];

fn read_target(section: &mut Section<'_>, directory: Option<&GraphConfig>) -> Option<TargetConfig> {
    let name = section.required("name");
    let roles = section.strings("roles");
    if !section.has("kind") {
        section.required("kind");
        return None;
    }
    let kind = section.choice("kind", &KINDS.map(|(word, kind)| (word, Some(kind))), None)?;
    let kind = match kind {
        Word::GraphGroup => KindConfig::GraphGroup(graph::read(section, directory)?),
        Word::GraphAppRole => {
            let resource = section.required("resource");
            KindConfig::GraphAppRole { graph: graph::read(section, directory)?, resource }
        }
        Word::Scim => {
            let url = section.required("url");
            let create_users = section.boolean("create_users", true);
            KindConfig::Scim { url, token: required_secret(section, "token")?, create_users }
        }
        Word::Sql => {
            let [grant, revoke] = ["grant", "revoke"].map(|key| section.required(key));
            let holds = section.string("holds");
            KindConfig::Sql { url: required_secret(section, "url")?, grant, revoke, holds }
        }
    };
    let target = TargetConfig { name, kind, roles };
    let is_complete = |key: &&str| section.has(key);
    let required: &[&str] = match &target.kind {
        KindConfig::GraphGroup(_) => &["name"],
        KindConfig::GraphAppRole { .. } => &["name", "resource"],
        KindConfig::Scim { .. } => &["name", "url"],
        KindConfig::Sql { .. } => &["name", "grant", "revoke"],
    };
    if required.iter().all(is_complete) {
        target.check(section);
    }
    Some(target)
}

fn required_secret(section: &mut Section<'_>, key: &'static str) -> Option<SecretSource> {
    let source = secret(section, key);
    if !section.has(key) {
        section.complain("", format!("needs the key `{key}`"));
    }
    source
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use crate::config::Config;

    /// What is said of a target with these keys, beside a rule.
    fn complaints(keys: &str) -> String {
        let example = include_str!("../../../../vestibule.toml");
        let target = format!("\n[[workers.permissions.targets]]\n{keys}\n");
        match Config::parse(Path::new("vestibule.toml"), &format!("{example}{target}")) {
            Ok(_) => String::new(),
            Err(complaints) => complaints.to_string(),
        }
    }

    const ROLES: &str = "name = \"a\"\nroles = { guest = \"1\" }\n";
    const LOGIN: &str = "tenant = \"contoso.com\"\nclient_id = \"1\"\nclient_secret = \"env:X\"\n";

    #[test]
    fn a_target_is_reached_in_one_of_four_ways() {
        for keys in [
            format!("kind = \"graph-group\"\n{ROLES}{LOGIN}"),
            format!("kind = \"graph-app-role\"\nresource = \"2\"\n{ROLES}{LOGIN}"),
            format!(
                "kind = \"scim\"\nurl = \"https://x.test/scim/v2\"\ntoken = \"env:X\"\n{ROLES}"
            ),
            "kind = \"sql\"\nname = \"a\"\nurl = \"env:X\"\n\
             grant = \"INSERT INTO a VALUES (:person, :role)\"\n\
             revoke = \"DELETE FROM a WHERE person = :person AND role = :role\""
                .to_owned(),
        ] {
            assert_eq!(complaints(&keys), "", "{keys}");
        }
    }

    #[test]
    fn a_wrong_target_says_what_was_expected() {
        for (keys, complaint) in [
            (ROLES.to_owned(), "needs the key `kind`"),
            (format!("kind = \"grap-group\"\n{ROLES}"), "graph-group"),
            (format!("kind = \"graph-group\"\n{ROLES}"), "needs the key `tenant`"),
            (format!("kind = \"graph-group\"\nname = \"a\"\n{LOGIN}"), "roles"),
            (format!("kind = \"graph-app-role\"\n{ROLES}{LOGIN}"), "needs the key `resource`"),
            (
                format!("kind = \"scim\"\nurl = \"http://x.test\"\ntoken = \"env:X\"\n{ROLES}"),
                "must be an https URL",
            ),
            (
                "kind = \"sql\"\nname = \"a\"\nurl = \"env:X\"\ngrant = \"DROP\"\n\
                 revoke = \"DELETE FROM a WHERE b = :emial\""
                    .to_owned(),
                "there is no parameter :emial",
            ),
            (format!("kind = \"scim\"\n{ROLES}url = 1"), "needs the key `token`"),
        ] {
            let complaints = complaints(&keys);
            assert!(complaints.contains(complaint), "{keys} gave {complaints}");
        }
    }
}
