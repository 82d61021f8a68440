//! Has a change of rules, lists, lookups and messages take hold without a restart.
//!
//! The configuration, and every file it names for these, is looked at each second; a hangup signal
//! has it looked at at once. A change counts once it has been the same at two looks, or at a signal.
//! It is taken as a whole or not at all: with a mistake in it, it is refused with the same words as
//! at a start, and what was in force stays. It is tried again now and then, for what it lacks may lie
//! in a place that is not looked at: a file that only it names, a secret. Lists of a database are
//! loaded anew at their own pace.

use std::{collections::HashMap, path::PathBuf, sync::Arc, time::Duration};

use anyhow::Context;
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::{Registry, Unit},
};
use time::OffsetDateTime;
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    task::JoinSet,
    time::{Instant, MissedTickBehavior, interval},
};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};
use vestibule_api::{Api, Approvals, FileStamp, List, ListError};

use crate::{
    config::Config,
    deciding::{Deciding, Gauges},
};

const LOOK_EVERY: Duration = Duration::from_secs(1);

/// A list that a database could not give is asked for this soon again.
const MISSING_LIST_PAUSE: Duration = Duration::from_secs(5);

/// A refused change is tried again this soon, whether a file has changed or not.
const REFUSED_PAUSE: Duration = Duration::from_secs(5);

/// What watching the files needs.
pub(super) struct Reload {
    pub(super) config: Arc<Config>,
    pub(super) deciding: Deciding,
    pub(super) approvals: Option<Arc<dyn Approvals>>,
    pub(super) gauges: Gauges,
    pub(super) metrics: ReloadMetrics,
    pub(super) api: Api,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OutcomeLabels {
    outcome: &'static str,
}

/// Whether changes were taken, and when the last one was.
#[derive(Clone, Debug, Default)]
pub(super) struct ReloadMetrics {
    reloads: Family<OutcomeLabels, Counter>,
    last: Gauge,
    /// A refusal is counted once, and may stand for weeks: until a start that then fails.
    refused: Gauge,
}

impl ReloadMetrics {
    pub(super) fn register(registry: &mut Registry) -> Self {
        let it = Self::default();
        for outcome in ["taken", "refused"] {
            it.reloads.get_or_create_owned(&OutcomeLabels { outcome });
        }
        it.last.set(OffsetDateTime::now_utc().unix_timestamp());
        registry.register(
            "vestibule_configuration_reloads",
            "Changes of the configuration while it runs, taken or refused",
            it.reloads.clone(),
        );
        registry.register_with_unit(
            "vestibule_configuration_last_taken",
            "When the configuration in force was read, as Unix time",
            Unit::Seconds,
            it.last.clone(),
        );
        registry.register(
            "vestibule_configuration_refused",
            "1 while the configuration as it is now is refused and an older one is in force: a \
             start would fail",
            it.refused.clone(),
        );
        it
    }

    /// Whether the configuration as it is now is refused.
    pub(super) fn is_refused(&self) -> bool {
        self.refused.get() != 0
    }

    fn count(&self, outcome: &'static str) {
        self.reloads.get_or_create_owned(&OutcomeLabels { outcome }).inc();
    }
}

type Stamps = HashMap<PathBuf, Option<FileStamp>>;

/// Waits until a change is whole: a file is written piece by piece, and of several one comes after
/// the other. Half of a list is a list too, and lets in or turns away the wrong people.
pub(super) struct Settling<T> {
    last: Option<T>,
    looks: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Look {
    Same,
    /// Not the same twice yet.
    Changing,
    Changed,
}

impl<T> Default for Settling<T> {
    fn default() -> Self {
        Self { last: None, looks: 0 }
    }
}

impl<T: Clone + PartialEq> Settling<T> {
    /// What never comes to rest is taken as it is.
    const LOOKS_MAX: u32 = 10;

    pub(super) fn look(&mut self, seen: &T, now: &T) -> Look {
        if seen == now {
            *self = Self::default();
            return Look::Same;
        }
        self.looks += 1;
        if self.last.replace(now.clone()).as_ref() == Some(now) || self.looks >= Self::LOOKS_MAX {
            *self = Self::default();
            return Look::Changed;
        }
        Look::Changing
    }
}

/// A change that was not taken.
struct Refused {
    error: String,
    again: Instant,
}

impl Reload {
    pub(super) async fn run(mut self, stop: CancellationToken) -> anyhow::Result<()> {
        let mut hangup = signal(SignalKind::hangup()).context("could not listen for signals")?;
        let mut due = HashMap::new();
        self.plan_lists(&mut due);
        let mut loads = JoinSet::new();
        // As they were when they were read: they may have changed since.
        let mut seen = self.files();
        let mut settling = Settling::default();
        let mut refused: Option<Refused> = None;
        let mut ticks = interval(LOOK_EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let asked = tokio::select! {
                biased;
                () = stop.cancelled() => return Ok(()),
                asked = next_look(&mut hangup, &mut ticks) => asked,
                Some(loaded) = loads.join_next() => {
                    self.take_list(loaded, &mut due);
                    continue;
                }
            };
            self.load_due_lists(&mut due, &mut loads);
            let now = stamps(seen.keys().cloned().collect()).await;
            let look = settling.look(&seen, &now);
            let changed = asked || look == Look::Changed;
            let again = refused.as_ref().is_some_and(|it| it.again <= Instant::now());
            if !changed && (look == Look::Changing || !again) {
                continue;
            }
            let reloaded = tokio::select! {
                biased;
                // A database that hangs is no reason not to stop.
                () = stop.cancelled() => return Ok(()),
                reloaded = self.reload() => reloaded,
            };
            match reloaded {
                Ok(changed_beyond) => {
                    self.metrics.count("taken");
                    self.metrics.last.set(OffsetDateTime::now_utc().unix_timestamp());
                    info!("the changed configuration is in force: rules, lists, lookups, messages");
                    if changed_beyond {
                        warn!(
                            "the configuration has changed in more than rules, lists, lookups and \
                             messages; the rest takes hold at the next start"
                        );
                    }
                    // Of queries that may be others now.
                    loads.abort_all();
                    due.clear();
                    self.plan_lists(&mut due);
                    seen = self.files();
                    self.metrics.refused.set(0);
                    refused = None;
                }
                Err(error) => {
                    let error = format!("{error:#}");
                    if changed || refused.is_none_or(|it| it.error != error) {
                        self.metrics.count("refused");
                        error!(
                            error,
                            "the changed configuration is refused; what was in force stays"
                        );
                    }
                    seen = now;
                    self.metrics.refused.set(1);
                    refused = Some(Refused { error, again: Instant::now() + REFUSED_PAUSE });
                }
            }
        }
    }

    /// The files whose change may change how connectors decide, as they were when they were read.
    fn files(&self) -> Stamps {
        let lists = self.config.reference.lists.iter();
        let lists = lists
            .filter_map(|it| Some((it.file()?.to_owned(), self.deciding.stamp_of_list(&it.name))));
        self.config.files.iter().cloned().chain(lists).collect()
    }

    /// Takes what has changed; says whether something else has that it cannot take.
    async fn reload(&mut self) -> anyhow::Result<bool> {
        let file = self.config.file.clone();
        let config = tokio::task::spawn_blocking(move || Config::load(&file)).await??;
        let approvals = self.approvals.clone();
        let asks = |it: &crate::config::ConnectorConfig| it.rules.ask_for_approval();
        anyhow::ensure!(
            approvals.is_some() || !config.connectors.iter().any(asks),
            "a rule asks for an approval for the first time: that needs a restart, so that there \
             is somebody who keeps the requests"
        );
        let deciding =
            Deciding::load(&config, approvals, &self.gauges, Some(&self.deciding)).await?;
        for missing in &deciding.missing {
            warn!(error = %missing, "a list is not there yet; rules that ask it go by on_error");
        }
        // A connector that is new has no listener of its own to add to; it waits for a start.
        let changed_beyond = config.beyond_rules != self.config.beyond_rules;
        self.deciding = deciding;
        self.install();
        self.config = Arc::new(config);
        Ok(changed_beyond)
    }

    fn install(&self) {
        for (name, decider) in &self.deciding.deciders {
            self.api.decide_by(name, decider.clone());
        }
    }

    /// When each list of a database is to be loaded next.
    fn plan_lists(&self, due: &mut HashMap<String, Instant>) {
        for list in &self.config.reference.lists {
            if let Some(refresh) = list.refresh() {
                let is_missing = self.deciding.missing.iter().any(|it| it.list == list.name);
                let pause = if is_missing { MISSING_LIST_PAUSE.min(refresh) } else { refresh };
                due.insert(list.name.clone(), Instant::now() + pause);
            }
        }
    }

    fn load_due_lists(
        &self,
        due: &mut HashMap<String, Instant>,
        loads: &mut JoinSet<Result<List, ListError>>,
    ) {
        let now = Instant::now();
        for list in &self.config.reference.lists {
            if due.get(&list.name).is_none_or(|at| *at > now) {
                continue;
            }
            due.remove(&list.name);
            match list.settings() {
                Ok(settings) => drop(loads.spawn(async move { List::load(&settings).await })),
                Err(error) => {
                    warn!(list = list.name, error = format!("{error:#}"), "cannot load a list");
                    due.insert(list.name.clone(), now + MISSING_LIST_PAUSE);
                }
            }
        }
    }

    fn take_list(
        &mut self,
        loaded: Result<Result<List, ListError>, tokio::task::JoinError>,
        due: &mut HashMap<String, Instant>,
    ) {
        let again = |name: &str, config: &Config, failed: bool| {
            let list = config.reference.lists.iter().find(|it| it.name == name)?;
            let refresh = list.refresh()?;
            Some(Instant::now() + if failed { MISSING_LIST_PAUSE.min(refresh) } else { refresh })
        };
        let (name, failed) = match loaded {
            Ok(Ok(list)) => {
                let name = list.name().to_owned();
                self.gauges.lists.record(&list);
                if self.deciding.missing.iter().any(|it| it.list == name) {
                    info!(list = name, entries = list.len(), "a list that was missing is there");
                }
                self.deciding.replace_list(list);
                self.install();
                (name, false)
            }
            Ok(Err(error)) => {
                warn!(%error, "could not load a list anew; what was in force stays");
                (error.list, true)
            }
            Err(_) => return,
        };
        if let Some(at) = again(&name, &self.config, failed) {
            due.insert(name, at);
        }
    }
}

/// Waits for the time to look at the files; says whether somebody asked for it.
async fn next_look(hangup: &mut Signal, ticks: &mut tokio::time::Interval) -> bool {
    tokio::select! {
        Some(()) = hangup.recv() => true,
        _ = ticks.tick() => false,
    }
}

async fn stamps(files: Vec<PathBuf>) -> Stamps {
    // A file system may hang, and with it whoever asks.
    let look = move || files.into_iter().map(|it| (it.clone(), FileStamp::read(&it))).collect();
    tokio::task::spawn_blocking(look).await.unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_counts_once_it_has_been_the_same_twice() {
        let mut settling = Settling::default();
        let mut seen = 1;
        let looks = [1, 2, 3, 3, 3, 4, 3, 5, 5].map(|now| {
            let look = settling.look(&seen, &now);
            if look == Look::Changed {
                seen = now;
            }
            look
        });
        use Look::{Changed, Changing, Same};
        assert_eq!(
            looks,
            [Same, Changing, Changing, Changed, Same, Changing, Same, Changing, Changed]
        );
    }

    #[test]
    fn what_never_comes_to_rest_is_taken_in_the_end() {
        let mut settling = Settling::default();
        let looks: Vec<_> = (1..=20).map(|now| settling.look(&0, &now)).collect();
        let changed: Vec<_> =
            (1..).zip(looks).filter(|(_, it)| *it == Look::Changed).map(|(at, _)| at).collect();
        assert_eq!(changed, [10, 20]);
    }
}
