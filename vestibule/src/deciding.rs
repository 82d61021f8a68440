//! What connectors decide by, made from the configuration: lists and lookups loaded, rules with them.
//!
//! Made at the start, and again whenever a file changes. What has not changed is taken over, so that
//! a lookup keeps the answers it remembers and a list of a million entries is not read again for a
//! comma in a rule.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Duration,
};

use anyhow::Context;
use futures_util::future::join_all;
use secrecy::{ExposeSecret, SecretString};
use tokio::time::timeout;
use vestibule_api::{
    ApprovalSettings, Approvals, Decider, FileStamp, List, ListError, ListMetrics, Lookup,
    LookupMetrics, LookupWithArguments, ReferenceData,
};
use vestibule_events::ConnectorName;

use crate::config::{Config, ListConfig, LookupConfig, SecretSource};

/// The deciders of all connectors, and what they share.
pub(crate) struct Deciding {
    pub(crate) deciders: BTreeMap<ConnectorName, Decider>,
    /// Lists that a database could not give yet.
    pub(crate) missing: Vec<ListError>,
    lists: HashMap<String, LoadedList>,
    lookups: HashMap<String, LoadedLookup>,
}

struct LoadedList {
    settings: String,
    stamp: Option<FileStamp>,
    list: Option<Arc<List>>,
}

struct LoadedLookup {
    settings: String,
    /// As they were when it was made: a password may be changed for another.
    secrets: Vec<SecretString>,
    lookup: Lookup,
    /// Taken over from before, and known to work.
    is_old: bool,
}

/// A database that does not answer by then is away, and nothing else is known of it.
const VERIFY_LIMIT: Duration = Duration::from_secs(2);

/// Has databases look at the queries of new lookups: one that cannot work is a mistake of the
/// configuration, to be told now and not with the first sign-up.
async fn verify(lookups: impl Iterator<Item = &LoadedLookup>) -> anyhow::Result<()> {
    let new = lookups.filter(|it| !it.is_old).map(|it| async {
        let verified = timeout(VERIFY_LIMIT, it.lookup.verify()).await;
        (it.lookup.name(), verified)
    });
    for (name, verified) in join_all(new).await {
        if let Ok(Err(fault)) = verified
            && !fault.is_temporary()
        {
            return Err(fault).with_context(|| format!("lookup {name}"));
        }
    }
    Ok(())
}

/// What counts them.
#[derive(Clone, Debug)]
pub(crate) struct Gauges {
    pub(crate) lists: ListMetrics,
    pub(crate) lookups: LookupMetrics,
}

impl Deciding {
    /// Loads everything, or says what cannot be. A database that is away is no reason not to start:
    /// until it gives its list, rules that ask the list go by their `on_error`.
    pub(crate) async fn load(
        config: &Config,
        approvals: Option<Arc<dyn Approvals>>,
        gauges: &Gauges,
        earlier: Option<&Self>,
    ) -> anyhow::Result<Self> {
        let mut missing = Vec::new();
        let mut lists = HashMap::new();
        for list in &config.reference.lists {
            let loaded = load_list(list, gauges, earlier, &mut missing).await?;
            lists.insert(list.name.clone(), loaded);
        }
        let mut lookups = HashMap::new();
        for lookup in &config.reference.lookups {
            lookups.insert(lookup.name.clone(), open_lookup(lookup, gauges, earlier)?);
        }
        verify(lookups.values()).await?;
        let with_arguments = |config: &LookupConfig| {
            let lookup = lookups[&config.name].lookup.clone();
            LookupWithArguments::new(lookup, &config.arguments)
                .ok()
                .context("the arguments of a lookup were checked when the file was read")
        };
        let in_lists = lists.iter().map(|(name, it)| (name.clone(), it.list.clone())).collect();
        let in_lookups =
            config.reference.lookups.iter().map(with_arguments).collect::<anyhow::Result<_>>()?;
        let reference = Arc::new(ReferenceData::new(in_lists, in_lookups));
        let approvals = approvals.map(|approvals| {
            Arc::new(ApprovalSettings {
                approvals,
                time_limit: config.approvals.time_limit,
                reapply_after: config.approvals.reapply_after,
                denied: config.approvals.denied.clone(),
            })
        });
        let decider = |it: &crate::config::ConnectorConfig| Decider {
            rules: Arc::clone(&it.rules),
            reference: Arc::clone(&reference),
            approvals: approvals.clone(),
        };
        let deciders = config.connectors.iter().map(|it| (it.name.clone(), decider(it))).collect();
        Ok(Self { deciders, missing, lists, lookups })
    }

    /// What the file of a list was when the list was read.
    pub(crate) fn stamp_of_list(&self, name: &str) -> Option<FileStamp> {
        self.lists.get(name)?.stamp
    }

    /// Puts a list that was loaded anew into every decider.
    pub(crate) fn replace_list(&mut self, list: List) {
        let list = Arc::new(list);
        let name = list.name().to_owned();
        if let Some(loaded) = self.lists.get_mut(&name) {
            loaded.list = Some(Arc::clone(&list));
        }
        self.missing.retain(|it| it.list != name);
        let Some(any) = self.deciders.values().next() else { return };
        let reference = Arc::new(any.reference.with_list(name, list));
        for decider in self.deciders.values_mut() {
            decider.reference = Arc::clone(&reference);
        }
    }
}

async fn load_list(
    config: &ListConfig,
    gauges: &Gauges,
    earlier: Option<&Deciding>,
    missing: &mut Vec<ListError>,
) -> anyhow::Result<LoadedList> {
    let settings = config.settings()?;
    let described = format!("{config:?}");
    let stamp = settings.stamp();
    let same = earlier
        .and_then(|it| it.lists.get(&config.name))
        .filter(|it| it.settings == described && it.stamp == stamp && it.list.is_some());
    if let Some(LoadedList { list, .. }) = same {
        return Ok(LoadedList { settings: described, stamp, list: list.clone() });
    }
    let list = match List::load(&settings).await {
        Ok(list) => {
            gauges.lists.record(&list);
            Some(Arc::new(list))
        }
        Err(error) if error.is_temporary() => {
            missing.push(error);
            None
        }
        Err(error) => return Err(error.into()),
    };
    Ok(LoadedList { settings: described, stamp, list })
}

fn open_lookup(
    config: &LookupConfig,
    gauges: &Gauges,
    earlier: Option<&Deciding>,
) -> anyhow::Result<LoadedLookup> {
    let settings = format!("{config:?}");
    let secrets = config.secrets().into_iter().map(SecretSource::fetch);
    let secrets = secrets
        .collect::<anyhow::Result<Vec<_>>>()
        .with_context(|| format!("lookup {}", config.name))?;
    let same = earlier.and_then(|it| it.lookups.get(&config.name)).filter(|it| {
        let exposed = |secrets: &[SecretString]| -> Vec<String> {
            secrets.iter().map(|it| it.expose_secret().to_owned()).collect()
        };
        it.settings == settings && exposed(&it.secrets) == exposed(&secrets)
    });
    if let Some(LoadedLookup { lookup, .. }) = same {
        return Ok(LoadedLookup { settings, secrets, lookup: lookup.clone(), is_old: true });
    }
    let lookup = Lookup::new(config.settings()?, &gauges.lookups)?;
    Ok(LoadedLookup { settings, secrets, lookup, is_old: false })
}
