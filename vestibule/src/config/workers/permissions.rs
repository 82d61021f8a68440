//! `[[workers.permissions.rules]]`: who gets a role.

use std::time::Duration;

use vestibule_workers::{GrantRule, Permissions, PermissionsSettings};

use crate::config::reader::Section;

pub(super) fn read_rule(section: &mut Section<'_>) -> GrantRule {
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
