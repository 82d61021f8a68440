//! `[workers.confirm]`: how it is found out of which sign-ups an account comes to be; and the key
//! `on`, by which others wait for that.

use secrecy::SecretString;
use vestibule_events::{Filter, Kind};
use vestibule_workers::{Confirm, ConfirmSchedule, ConfirmSettings};

use super::graph::{self, GraphConfig};
use crate::config::{SecretSource, reader::Section};

/// How accounts are confirmed.
#[derive(Debug)]
pub(crate) struct ConfirmConfig {
    graph: Option<GraphConfig>,
    schedule: ConfirmSchedule,
    /// What the worker `accounts` is given, if there is one.
    accounts: Option<Filter>,
}

impl ConfirmConfig {
    /// What the worker needs, with the secret that `fetch` brings.
    pub(crate) fn settings(
        &self,
        fetch: impl Fn(&SecretSource) -> anyhow::Result<SecretString>,
    ) -> anyhow::Result<ConfirmSettings> {
        let graph = self.graph.as_ref().map(|it| it.settings(fetch)).transpose()?;
        Ok(ConfirmSettings { graph, schedule: self.schedule, accounts: self.accounts.clone() })
    }

    /// What shows that an account exists, for people to read.
    pub(crate) const fn sources(&self) -> &'static str {
        match (&self.graph, &self.accounts) {
            (Some(_), Some(_)) => "the directory, tokens and accounts made here",
            (Some(_), None) => "the directory and tokens",
            (None, Some(_)) => "tokens and accounts made here",
            (None, None) => "tokens",
        }
    }

    pub(crate) const fn schedule(&self) -> ConfirmSchedule {
        self.schedule
    }
}

/// `directory` is that of the worker `accounts`, which need not be named twice.
pub(super) fn read(
    section: &mut Section<'_>,
    directory: Option<&GraphConfig>,
    accounts: Option<Filter>,
) -> ConfirmConfig {
    let defaults = ConfirmSchedule::default();
    let schedule = ConfirmSchedule {
        first_look: section.duration("first_look", defaults.first_look),
        longest_pause: section.duration("longest_pause", defaults.longest_pause),
        abandon_after: section.duration("abandon_after", defaults.abandon_after),
    };
    // Without a directory tokens are enough.
    let names_one = directory.is_some() || graph::names_one(section);
    let graph = if names_one { graph::read(section, directory) } else { None };
    let confirm = ConfirmConfig { graph, schedule, accounts };
    let stand_in = |_: &SecretSource| Ok("stand-in".into());
    let settings = confirm.settings(stand_in).expect("a stand-in is always there");
    for complaint in Confirm::check(&settings).err().into_iter().flatten() {
        section.complain(complaint.key, complaint.message);
    }
    confirm
}

/// When somebody is to act on a sign-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum On {
    /// As soon as it is let past; the account may never come to exist.
    Accepted,
    /// Once the account exists.
    Confirmed,
}

/// The key `on` of a worker, a channel or a subscriber. Where it is not there they wait for the
/// account, if anybody finds out about it.
pub(crate) fn read_on(section: &mut Section<'_>, has_confirm: bool) -> On {
    let default = if has_confirm { On::Confirmed } else { On::Accepted };
    let choices = [("accepted", On::Accepted), ("confirmed", On::Confirmed)];
    let on = section.choice("on", &choices, default);
    if section.has("on") && section.has("kinds") {
        section.complain("on", "goes without `kinds`: either of them says which events are wanted");
    }
    if on == On::Confirmed && !has_confirm {
        section.complain(
            "on",
            "nothing confirms accounts, so nothing would ever come: add a [workers.confirm] \
             section, or say \"accepted\"",
        );
    }
    on
}

impl On {
    /// The kinds for somebody who would be given `usual` without anything that confirms.
    pub(crate) fn kinds(self, usual: &[Kind]) -> Vec<Kind> {
        let kind = |kind: &Kind| match (self, *kind) {
            (Self::Confirmed, Kind::Accepted | Kind::Approved) => Kind::Confirmed,
            (_, kind) => kind,
        };
        let mut kinds: Vec<_> = usual.iter().map(kind).collect();
        kinds.sort_unstable();
        kinds.dedup();
        kinds
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::config::Config;

    const CONFIRM: &str = "\n[workers.confirm]\n";

    /// The kinds of the worker `permissions` and of the only channel, with keys more in each.
    fn kinds(permissions: &str, channel: &str, more: &str) -> Result<[Vec<Kind>; 2], String> {
        let example = include_str!("../../../../vestibule.toml");
        let (before, _) = example.split_once("\n[[workers").expect("the example has workers");
        let workers = format!(
            "\n[workers.permissions]\n{permissions}\n[[workers.permissions.rules]]\nrole = \"r\"\n\
             [[workers.notify.channels]]\nname = \"c\"\nkind = \"record\"\nsubject = \"s\"\n\
             body = \"b\"\n{channel}\n{more}"
        );
        let config = Config::parse(Path::new("vestibule.toml"), &format!("{before}{workers}"));
        let config = config.map_err(|complaints| complaints.to_string())?;
        let kinds = |name: &str| {
            let worker = config.workers.iter().find(|it| it.name() == name);
            worker.expect("it is there").settings.filter.kinds.clone()
        };
        Ok([kinds("permissions"), kinds("notify")])
    }

    #[test]
    fn who_does_not_say_waits_for_the_account_where_that_is_known() {
        use Kind::{Abandoned, Accepted, Approved, Blocked, Confirmed};
        let at_once = [vec![Accepted, Approved, Abandoned], vec![Accepted]];
        let later = [vec![Confirmed, Abandoned], vec![Confirmed]];
        assert_eq!(kinds("", "", "").unwrap(), at_once);
        assert_eq!(kinds("", "", CONFIRM).unwrap(), later);
        let on = |it: &str| format!("on = \"{it}\"");
        assert_eq!(kinds(&on("accepted"), &on("accepted"), CONFIRM).unwrap(), at_once);
        assert_eq!(kinds(&on("confirmed"), &on("confirmed"), CONFIRM).unwrap(), later);
        let given = "kinds = [\"blocked\"]";
        assert_eq!(kinds(given, given, CONFIRM).unwrap(), [vec![Blocked], vec![Blocked]]);
    }

    #[test]
    fn a_wish_that_cannot_be_met_is_a_mistake() {
        let disabled = "\n[workers.confirm]\nenabled = false\n";
        for (permissions, channel, more, complaint) in [
            ("on = \"confirmed\"", "", "", "add a [workers.confirm] section"),
            ("on = \"confirmed\"", "", disabled, "add a [workers.confirm] section"),
            ("", "on = \"confirmed\"", "", "add a [workers.confirm] section"),
            ("on = \"confirmed\"\nkinds = [\"blocked\"]", "", CONFIRM, "goes without `kinds`"),
            ("", "on = \"accepted\"\nkinds = [\"blocked\"]", CONFIRM, "goes without `kinds`"),
            ("", "on = \"later\"", CONFIRM, "\"accepted\""),
            ("", "", "\n[workers.confirm]\nabandon_after = \"0s\"", "must be from 1s to 10 years"),
            ("", "", "\n[workers.confirm]\ntenant = \"contoso.com\"", "needs the key `client_id`"),
        ] {
            let complaints = kinds(permissions, channel, more).expect_err(complaint);
            assert!(complaints.contains(complaint), "{complaint}: {complaints}");
        }
    }
}
