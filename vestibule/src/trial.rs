//! Rules tried out: what connectors decide by, with as much of the world around as is wanted.
//!
//! Nothing here is remembered or counted, and nobody learns of it: lookups are asked only where that
//! is said, how a person stands with the approvers is said by the caller, and no store and no log
//! is opened.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Duration,
};

use anyhow::Context;
use async_trait::async_trait;
use vestibule_api::{
    ApprovalSettings, Approvals, Decider, List, Lookup, LookupMetrics, LookupWithArguments,
    ReferenceData, StandIn, Standing,
};
use vestibule_events::{ConnectorName, Decision, Effect, Mode, Person, Reason, Step};

use crate::config::{Config, ConnectorConfig, ListConfig, LookupConfig, did_you_mean};

/// Answers that stand in for those of lookups, by the lookup's name.
pub(crate) type StandIns = BTreeMap<String, StandIn>;

/// Entries that stand in for those of lists, by the list's name.
pub(crate) type ListEntries = BTreeMap<String, Vec<String>>;

/// Whom rules may ask.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Ask<'a> {
    /// Whoever the configuration names.
    Sources,
    /// Nobody but these; what is not among them is told by the reasons of a decision.
    StandIns(&'a StandIns),
}

/// A configuration to try sign-ups with, its lists loaded.
pub(crate) struct Trial<'a> {
    config: &'a Config,
    lists: HashMap<String, Option<Arc<List>>>,
    /// The lists that are not there, each with the reason.
    pub(crate) missing: Vec<(String, String)>,
}

impl<'a> Trial<'a> {
    /// Loads the lists; those of a database only where `databases` may be asked. A list that cannot
    /// be had from there is missing, and rules that ask it fail.
    pub(crate) async fn load(config: &'a Config, databases: bool) -> anyhow::Result<Self> {
        let mut lists = HashMap::new();
        let mut missing = Vec::new();
        for list in &config.reference.lists {
            let loaded = match load(list, databases).await {
                Ok(loaded) => Some(loaded),
                Err(error) if list.is_in_database() => {
                    missing.push((list.name.clone(), format!("{error:#}")));
                    None
                }
                Err(error) => return Err(error),
            };
            lists.insert(list.name.clone(), loaded);
        }
        Ok(Self { config, lists, missing })
    }

    /// What rules may refer to. `entries` take the place of those that lists have.
    pub(crate) async fn reference(
        &self,
        ask: Ask<'_>,
        entries: &ListEntries,
    ) -> anyhow::Result<Arc<ReferenceData>> {
        let mut lists = self.lists.clone();
        for list in &self.config.reference.lists {
            if let Some(entries) = entries.get(&list.name) {
                let stand_in = List::load(&list.settings_with(entries.clone())).await?;
                lists.insert(list.name.clone(), Some(Arc::new(stand_in)));
            }
        }
        let metrics = LookupMetrics::unregistered();
        let lookups = &self.config.reference.lookups;
        let lookups = lookups.iter().map(|it| lookup(it, ask, &metrics));
        Ok(Arc::new(ReferenceData::new(lists, lookups.collect::<anyhow::Result<_>>()?)))
    }

    /// What a connector decides by about somebody who stands like this with the approvers.
    pub(crate) fn decider(
        &self,
        connector: &ConnectorConfig,
        reference: &Arc<ReferenceData>,
        standing: Standing,
    ) -> Decider {
        let approvals = ApprovalSettings {
            approvals: Arc::new(Told(standing)),
            time_limit: Duration::from_secs(60),
            // How the person stands has been said; no time since then changes it.
            reapply_after: None,
            denied: self.config.approvals.denied.clone(),
        };
        Decider {
            rules: Arc::clone(&connector.rules),
            reference: Arc::clone(reference),
            approvals: Some(Arc::new(approvals)),
        }
    }
}

async fn load(list: &ListConfig, databases: bool) -> anyhow::Result<Arc<List>> {
    if list.is_in_database() && !databases {
        anyhow::bail!("it is in a database, which is not asked");
    }
    Ok(Arc::new(List::load(&list.settings()?).await?))
}

fn lookup(
    config: &LookupConfig,
    ask: Ask<'_>,
    metrics: &LookupMetrics,
) -> anyhow::Result<LookupWithArguments> {
    let LookupConfig { name, arguments, .. } = config;
    let lookup = match ask {
        Ask::Sources => {
            let settings = config.settings().with_context(|| format!("could not ask `{name}`"))?;
            LookupWithArguments::new(Lookup::new(settings, metrics)?, arguments)
        }
        Ask::StandIns(stand_ins) => {
            let stand_in = stand_ins.get(name).cloned().unwrap_or(StandIn::NotAsked);
            LookupWithArguments::stand_in(name.clone(), stand_in, arguments)
        }
    };
    lookup.ok().context("the arguments of a lookup were checked when the file was read")
}

/// Everybody stands like this.
#[derive(Debug)]
struct Told(Standing);

#[async_trait]
impl Approvals for Told {
    async fn standing(&self, _: &Person, _: &ConnectorName) -> Option<Standing> {
        Some(self.0)
    }
}

/// The words for how somebody stands.
pub(crate) const STANDINGS: [(&str, Standing); 4] = [
    ("none", Standing::None),
    ("pending", Standing::Pending),
    ("approved", Standing::Approved),
    ("denied", Standing::Denied { at: time::OffsetDateTime::UNIX_EPOCH }),
];

/// What each rule did, in the order of the reasons, and why where it could not be evaluated.
pub(crate) fn effects(decision: &Decision) -> Vec<String> {
    let effect = |reason: &Reason| match &reason.failure {
        Some(failure) => format!("{}: {failure}", reason.effect.as_str()),
        None => reason.effect.as_str().to_owned(),
    };
    decision.reasons.iter().map(effect).collect()
}

/// The rule that turned the person away or let them pass, where one did.
pub(crate) fn decisive(decision: &Decision) -> Option<&Reason> {
    let last = decision.reasons.last()?;
    let accepted = last.effect == Effect::Accept && last.mode == Mode::Enforce;
    (decision.outcome.is_refusal() || accepted).then_some(last)
}

/// The lookups that a decision needed, and that were not asked.
pub(crate) fn not_asked(decision: &Decision) -> impl Iterator<Item = &str> {
    let asked = decision.lookups.iter();
    asked.filter(|it| it.answer == StandIn::NOT_ASKED).map(|it| it.lookup.as_str())
}

/// The connector of this name; the error knows the nearest.
pub(crate) fn connector<'c>(config: &'c Config, name: &str) -> anyhow::Result<&'c ConnectorConfig> {
    let names: Vec<_> = config.connectors.iter().map(|it| it.name.as_str()).collect();
    let named = config.connectors.iter().find(|it| it.name.as_str() == name);
    named.with_context(|| format!("there is no connector `{name}`{}", did_you_mean(name, &names)))
}

pub(crate) fn parse_step(text: &str) -> Result<Step, String> {
    let names = Step::ALL.map(Step::as_str);
    let step = Step::ALL.into_iter().find(|step| step.as_str() == text);
    step.ok_or_else(|| format!("there is no such step{}", did_you_mean(text, &names)))
}

/// Microseconds as people read them.
pub(crate) fn took(microseconds: u32) -> String {
    if microseconds < 1000 {
        format!("{microseconds} µs")
    } else {
        format!("{:.1} ms", f64::from(microseconds) / 1000.0)
    }
}
