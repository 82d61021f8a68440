//! Whether a worker may take events now: what its operators say, and what its target shows.
//!
//! While the gate is shut nothing is taken from either source and nothing is begun; what runs is
//! finished. Whoever waits here is told of every change, so nobody polls.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use tokio::{sync::watch, time::sleep_until};
use tracing::{info, warn};

use super::breaker::{Breaker, BreakerPolicy, Flow, Sign};
use crate::metrics::OneWorker;

/// How events may be taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    Free,
    /// The target is probed: one event from each source, and no other until that one is settled.
    OneByOne,
    Shut,
}

#[derive(Debug)]
pub(super) struct Gate {
    worker: String,
    metrics: OneWorker,
    state: Mutex<State>,
    changed: watch::Sender<()>,
}

#[derive(Debug)]
struct State {
    /// `None` until we have learnt it: who was told to pause must not begin with a few events just
    /// because the process has.
    paused: Option<bool>,
    breaker: Breaker,
}

impl State {
    fn flow(&self, now: Instant) -> Option<Flow> {
        (self.paused == Some(false)).then(|| self.breaker.flow(now))
    }

    fn way(&self, now: Instant) -> Way {
        match self.flow(now) {
            Some(Flow::Free) => Way::Free,
            Some(Flow::Probe { .. }) => Way::OneByOne,
            Some(Flow::Shut { .. }) | None => Way::Shut,
        }
    }
}

impl Gate {
    pub(super) fn new(worker: &str, policy: BreakerPolicy, metrics: OneWorker) -> Self {
        let state = State { paused: None, breaker: Breaker::new(policy) };
        let (state, changed) = (Mutex::new(state), watch::Sender::default());
        Self { worker: worker.to_owned(), metrics, state, changed }
    }

    /// Waits until we have heard whether the worker is paused.
    pub(super) async fn is_known(&self) {
        self.until(|state, _| state.paused.map(|_| ())).await;
    }

    /// Waits while the gate is shut.
    pub(super) async fn opens(&self) -> Way {
        self.until(|state, now| Some(state.way(now)).filter(|way| *way != Way::Shut)).await
    }

    /// Waits while the gate is as it is.
    pub(super) async fn is_other_than(&self, way: Way) {
        self.until(|state, now| (state.way(now) != way).then_some(())).await;
    }

    pub(super) async fn shuts(&self) {
        self.until(|state, now| (state.way(now) == Way::Shut).then_some(())).await;
    }

    /// Lets one attempt begin; while a probe runs, not before its outcome. `None` if the gate is
    /// shut.
    pub(super) async fn enter(&self) -> Option<Pass<'_>> {
        let entered = self.until(|state, now| match state.flow(now) {
            Some(Flow::Free | Flow::Probe { runs: false }) => Some(Some(state.breaker.begins())),
            Some(Flow::Probe { runs: true }) => None,
            Some(Flow::Shut { .. }) | None => Some(None),
        });
        entered.await.map(|is_probe| Pass { gate: self, is_probe, told: false })
    }

    /// What the operators want.
    pub(super) fn set_paused(&self, paused: bool) {
        let before = self.state().paused.replace(paused);
        if before == Some(paused) {
            return;
        }
        self.metrics.paused.set(i64::from(paused));
        if paused {
            info!(worker = self.worker, "the worker is paused: it takes no events; they wait");
        } else if before.is_some() {
            info!(worker = self.worker, "the worker is resumed");
        }
        self.changed.send_replace(());
    }

    /// How long the target is left alone from now on, if it is.
    pub(super) fn shut_for(&self) -> Option<Duration> {
        let now = Instant::now();
        match self.state().breaker.flow(now) {
            Flow::Shut { until } => Some(until.saturating_duration_since(now)),
            Flow::Free | Flow::Probe { .. } => None,
        }
    }

    fn ended(&self, was_probe: bool, sign: Sign) -> bool {
        let now = Instant::now();
        let mut state = self.state();
        let before = state.breaker.flow(now);
        let counts = state.breaker.ended(was_probe, sign, now);
        let after = state.breaker.flow(now);
        drop(state);
        if before == after {
            return counts;
        }
        match (before, after) {
            // Told once for each outage; the probes of a long one would all say the same.
            (Flow::Free, Flow::Shut { until }) => warn!(
                worker = self.worker,
                pause = ?until - now,
                "the target fails again and again; it is left alone and probed, and events wait"
            ),
            (_, Flow::Free) => info!(worker = self.worker, "the target answers again"),
            _ => {}
        }
        self.changed.send_replace(());
        counts
    }

    /// Waits until `look` finds something in the state, which time may change as well.
    async fn until<T>(&self, mut look: impl FnMut(&mut State, Instant) -> Option<T>) -> T {
        // Before the first look, so that no change falls in between.
        let mut changed = self.changed.subscribe();
        loop {
            let half_opens = {
                let now = Instant::now();
                let mut state = self.state();
                let found = look(&mut state, now);
                let flow = state.breaker.flow(now);
                self.metrics.breaker_is(flow);
                if let Some(found) = found {
                    return found;
                }
                match flow {
                    Flow::Shut { until } => Some(until),
                    Flow::Free | Flow::Probe { .. } => None,
                }
            };
            let half_opens = async {
                match half_opens {
                    Some(at) => sleep_until(at.into()).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                // The sender is ours, so it is not gone.
                _ = changed.changed() => {}
                () = half_opens => {}
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing panics while it is held.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The leave to make one attempt. Dropped without a word, it said nothing about the target.
#[derive(Debug)]
pub(super) struct Pass<'a> {
    gate: &'a Gate,
    is_probe: bool,
    told: bool,
}

impl Pass<'_> {
    /// Says what the attempt showed, and learns whether a failure costs a try.
    pub(super) fn ended(mut self, sign: Sign) -> bool {
        self.told = true;
        self.gate.ended(self.is_probe, sign)
    }
}

impl Drop for Pass<'_> {
    fn drop(&mut self) {
        if !self.told {
            self.gate.ended(self.is_probe, Sign::Nothing);
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;
    use crate::WorkerMetrics;

    const PAUSE: Duration = Duration::from_millis(500);

    fn gate() -> Gate {
        let policy = BreakerPolicy { failures: 1, pause: PAUSE, max_pause: PAUSE };
        Gate::new("test", policy, WorkerMetrics::default().of("test"))
    }

    #[tokio::test]
    async fn it_is_shut_until_we_know_that_nobody_paused_the_worker() {
        let gate = gate();
        assert!(gate.opens().now_or_never().is_none());
        assert!(gate.enter().now_or_never().unwrap().is_none());
        gate.set_paused(false);
        assert_eq!(gate.opens().await, Way::Free);
        let pass = gate.enter().await.unwrap();
        gate.set_paused(true);
        gate.shuts().await;
        assert!(gate.enter().await.is_none());
        assert!(pass.ended(Sign::Answered));
    }

    #[tokio::test]
    async fn an_open_breaker_lets_one_probe_through_and_the_others_wait_for_it() {
        let gate = gate();
        gate.set_paused(false);
        let counts = gate.enter().await.unwrap().ended(Sign::Failed { asked: None });
        assert!(counts);
        gate.shuts().await;

        assert_eq!(gate.opens().await, Way::OneByOne);
        let probe = gate.enter().await.unwrap();
        assert!(gate.enter().now_or_never().is_none(), "a second probe");
        drop(probe);
        let probe = gate.enter().await.unwrap();
        let (counts, next) =
            tokio::join!(async { probe.ended(Sign::Failed { asked: None }) }, gate.enter());
        assert!(!counts && next.is_none(), "who waited for a probe that failed is sent back");

        gate.opens().await;
        let probe = gate.enter().await.unwrap();
        let (_, next) = tokio::join!(async { probe.ended(Sign::Answered) }, gate.enter());
        assert!(next.is_some());
        assert_eq!(gate.opens().await, Way::Free);
    }
}
