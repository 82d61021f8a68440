//! Random sequences of operations, against a model that is simple enough to be seen to be right.

use std::{collections::BTreeMap, time::Duration};

use proptest::{
    collection::vec,
    prelude::*,
    test_runner::{Config, TestRunner},
};
use time::OffsetDateTime;
use vestibule_events::SignUpEvent;
use vestibule_store::{
    AfterFailure, Failed, FailedEvent, Failures, LetterFilter, LetterState, Standing, Store,
};

use crate::home::{Home, NOW, event, failed};

const EVENTS: usize = 4;
const LEASE: Duration = Duration::from_secs(30);

#[derive(Clone, Debug)]
enum Operation {
    Fail { event: usize, counts: bool, retry_after: Option<u8> },
    MarkDone { event: usize },
    Finish { event: usize },
    Claim { limit: u8 },
    Release { event: usize, after: u8 },
    Extend { events: Vec<usize>, by: u8 },
    Redrive { events: Vec<usize>, spacing: u8 },
    Drop { events: Vec<usize> },
    Wait { seconds: u8 },
}

fn operations() -> impl Strategy<Value = Vec<Operation>> {
    let event = || 0..EVENTS;
    let events = || vec(0..EVENTS, 0..3);
    let operation = prop_oneof![
        6 => (event(), any::<bool>(), proptest::option::of(0..60_u8)).prop_map(
            |(event, counts, retry_after)| Operation::Fail { event, counts, retry_after }
        ),
        1 => event().prop_map(|event| Operation::MarkDone { event }),
        2 => event().prop_map(|event| Operation::Finish { event }),
        4 => (0..4_u8).prop_map(|limit| Operation::Claim { limit }),
        1 => (event(), 0..60_u8).prop_map(|(event, after)| Operation::Release { event, after }),
        1 => (events(), 0..60_u8).prop_map(|(events, by)| Operation::Extend { events, by }),
        4 => (events(), 0..10_u8)
            .prop_map(|(events, spacing)| Operation::Redrive { events, spacing }),
        1 => events().prop_map(|events| Operation::Drop { events }),
        3 => (0..60_u8).prop_map(|seconds| Operation::Wait { seconds }),
    ];
    vec(operation, 1..40)
}

/// What the store should know of one event.
#[derive(Clone, Debug, Default)]
struct Known {
    done: bool,
    waits: Option<Waiting>,
    /// The states of its letter, in order.
    letter: Vec<LetterState>,
    attempts: usize,
}

#[derive(Clone, Copy, Debug)]
struct Waiting {
    due_at: OffsetDateTime,
    tries: u32,
    since: Option<OffsetDateTime>,
}

impl Known {
    fn standing(&self) -> Standing {
        match self.letter.last() {
            _ if self.done => Standing::Done,
            Some(LetterState::Delivered) => Standing::Done,
            Some(LetterState::Parked) => Standing::Parked,
            Some(LetterState::Dropped) => Standing::Dropped,
            Some(LetterState::Retrying) => Standing::Waiting,
            None if self.waits.is_some() => Standing::Waiting,
            None => Standing::Open,
        }
    }

    fn fail(&mut self, failed: &FailedEvent, due_at: Option<OffsetDateTime>) -> Standing {
        self.attempts += 1;
        let standing = self.standing();
        let waited = self.waits.take();
        match (standing, due_at) {
            (Standing::Open | Standing::Waiting, Some(due_at)) => {
                let Failures { count, .. } = Self::failures(waited, failed);
                let counted = failed.counts.then_some(failed.attempt.started_at);
                let since = waited.and_then(|it| it.since).or(counted);
                self.waits = Some(Waiting { due_at, tries: count, since });
            }
            (Standing::Open | Standing::Waiting, None) => self.letter.push(LetterState::Parked),
            (Standing::Done, _) => self.deliver(),
            (Standing::Parked | Standing::Dropped, _) => {}
        }
        standing
    }

    fn failures(waited: Option<Waiting>, failed: &FailedEvent) -> Failures {
        Failures {
            count: waited.map_or(0, |it| it.tries) + u32::from(failed.counts),
            first_at: waited.and_then(|it| it.since).unwrap_or(failed.attempt.started_at),
        }
    }

    fn deliver(&mut self) {
        if self.letter.last().is_some_and(|it| *it != LetterState::Delivered) {
            self.letter.push(LetterState::Delivered);
        }
    }

    fn is_parked(&self) -> bool {
        self.letter.last() == Some(&LetterState::Parked)
    }
}

/// A store and what it should hold, for a worker whose name nobody else has.
struct Case<'a> {
    store: &'a Store,
    worker: String,
    events: [SignUpEvent; EVENTS],
    known: [Known; EVENTS],
    letters: BTreeMap<usize, i64>,
    now: OffsetDateTime,
    attempts: u32,
}

impl Case<'_> {
    async fn apply(&mut self, operation: &Operation) -> anyhow::Result<()> {
        match operation {
            Operation::Fail { event, counts, retry_after } => {
                let due_at = retry_after.map(|it| self.later(it));
                self.fail(*event, *counts, due_at).await?;
            }
            Operation::MarkDone { event } => {
                self.store.mark_done(&self.worker, self.events[*event].id, self.now).await?;
                self.known[*event].done = true;
            }
            Operation::Finish { event } => {
                self.store.finish_retry(&self.worker, self.events[*event].id, self.now).await?;
                self.known[*event].waits = None;
                self.known[*event].deliver();
            }
            Operation::Claim { limit } => self.claim(*limit).await?,
            Operation::Release { event, after } => {
                let due_at = self.later(*after);
                let id = self.events[*event].id;
                self.store.release_retry(&self.worker, id, due_at).await?;
                if let Some(waits) = &mut self.known[*event].waits {
                    waits.due_at = due_at;
                }
            }
            Operation::Extend { events, by } => {
                let until = self.later(*by);
                let ids: Vec<_> = events.iter().map(|event| self.events[*event].id).collect();
                self.store.extend_retries(&self.worker, &ids, until).await?;
                for event in events {
                    if let Some(waits) = &mut self.known[*event].waits {
                        waits.due_at = waits.due_at.max(until);
                    }
                }
            }
            Operation::Redrive { events, spacing } => self.redrive(events, *spacing).await?,
            Operation::Drop { events } => {
                let ids: Vec<_> = events.iter().filter_map(|it| self.letters.get(it)).collect();
                let ids: Vec<_> = ids.into_iter().copied().collect();
                let mut expected = 0;
                for event in events {
                    let known = &mut self.known[*event];
                    if known.is_parked() {
                        known.letter.push(LetterState::Dropped);
                        expected += 1;
                    }
                }
                let dropped = self.store.drop_letters(&ids, "grace", "a test", self.now).await?;
                assert_eq!(dropped, expected);
            }
            Operation::Wait { seconds } => self.now = self.later(*seconds),
        }
        Ok(())
    }

    fn later(&self, seconds: u8) -> OffsetDateTime {
        self.now + Duration::from_secs(seconds.into())
    }

    async fn fail(
        &mut self,
        number: usize,
        counts: bool,
        due_at: Option<OffsetDateTime>,
    ) -> anyhow::Result<()> {
        self.attempts += 1;
        let mut failed = failed(&self.worker, &self.events[number], self.attempts);
        failed.counts = counts;
        let expected = Known::failures(self.known[number].waits, &failed);
        let outcome = self
            .store
            .fail(&failed, |failures| {
                assert_eq!(failures, expected);
                due_at.map_or(AfterFailure::Park, |due_at| AfterFailure::Retry { due_at })
            })
            .await?;
        match (self.known[number].fail(&failed, due_at), due_at) {
            (Standing::Open | Standing::Waiting, Some(due_at)) => {
                assert_eq!(outcome, Failed::Waits { due_at });
            }
            (Standing::Open | Standing::Waiting, None) => {
                let Failed::Parked { letter } = outcome else { anyhow::bail!("{outcome:?}") };
                let before = self.letters.insert(number, letter);
                assert!(before.is_none_or(|it| it == letter), "an event has one letter");
            }
            (settled, _) => assert_eq!(outcome, Failed::Settled(settled)),
        }
        Ok(())
    }

    async fn claim(&mut self, limit: u8) -> anyhow::Result<()> {
        let limit = u32::from(limit);
        let claimed = self.store.claim_retries(&self.worker, self.now, LEASE, limit).await?;
        let now = self.now;
        let waiting = |known: &Known| known.waits.filter(|it| it.due_at <= now);
        let mut due: Vec<_> = self.known.iter().filter_map(waiting).map(|it| it.due_at).collect();
        due.sort_unstable();
        due.truncate(usize::try_from(limit)?);
        let mut found = Vec::new();
        for retry in &claimed {
            let number = self.events.iter().position(|it| it.id == retry.event_id);
            let known = &mut self.known[number.expect("one of ours")];
            let waits = known.waits.as_mut().expect("it waits");
            assert_eq!((retry.tries, retry.failing_since), (waits.tries, waits.since));
            found.push(std::mem::replace(&mut waits.due_at, now + LEASE));
        }
        assert!(claimed.is_sorted_by_key(|it| it.event_id));
        // Of several that are due since the same time, any may come first.
        found.sort_unstable();
        assert_eq!(found, due);
        Ok(())
    }

    async fn redrive(&mut self, events: &[usize], spacing: u8) -> anyhow::Result<()> {
        let ids: Vec<_> = events.iter().filter_map(|it| self.letters.get(it)).copied().collect();
        let (now, spacing) = (self.now, Duration::from_secs(spacing.into()));
        let due = |n: u32| now + spacing * n;
        let redriven = self.store.redrive(&ids, due, "grace", now).await?;
        let mut in_order: Vec<_> = self
            .letters
            .iter()
            .filter(|(_, id)| ids.contains(id))
            .map(|(e, id)| (*id, *e))
            .collect();
        in_order.sort_unstable();
        let mut moved = 0;
        for (_, event) in &in_order {
            let known = &mut self.known[*event];
            if known.is_parked() {
                known.letter.push(LetterState::Retrying);
                known.waits = Some(Waiting { due_at: due(moved), tries: 0, since: None });
                moved += 1;
            }
        }
        assert_eq!(redriven.moved, moved);
        assert_eq!(usize::try_from(redriven.moved + redriven.skipped)?, in_order.len());
        Ok(())
    }

    /// Whether the store knows what the model knows.
    async fn compare(&self) -> anyhow::Result<()> {
        for (known, event) in self.known.iter().zip(&self.events) {
            let standing = self.store.standing(&self.worker, event.id).await?;
            assert_eq!(standing, known.standing(), "{known:?}");
        }
        let due: Vec<_> = self.known.iter().filter_map(|it| it.waits).map(|it| it.due_at).collect();
        assert_eq!(self.store.next_retry(&self.worker).await?, due.iter().min().copied());
        let set_aside = self.store.set_aside(&self.worker).await?;
        assert_eq!(usize::try_from(set_aside.retries)?, due.len());
        let parked = self.known.iter().filter(|it| it.is_parked()).count();
        assert_eq!(usize::try_from(set_aside.parked)?, parked);
        Ok(())
    }

    async fn compare_letters(&self) -> anyhow::Result<()> {
        let filter = LetterFilter { worker: Some(self.worker.clone()), ..LetterFilter::default() };
        let letters = self.store.letters(&filter, None, 100).await?;
        assert_eq!(letters.len(), self.letters.len());
        for (number, id) in &self.letters {
            let whole = self.store.letter(*id).await?.expect("a letter stays");
            let states: Vec<_> = whole.history.iter().map(|it| it.state).collect();
            assert_eq!(states, self.known[*number].letter);
            assert_eq!(Some(&whole.letter.state), states.last());
            assert_eq!(whole.attempts.len(), self.known[*number].attempts);
        }
        Ok(())
    }
}

pub(crate) async fn whatever_is_done_in_whatever_order_the_store_does_as_a_simple_model(
    home: &Home,
) -> anyhow::Result<()> {
    let store = home.store().await?;
    let runtime = tokio::runtime::Handle::current();
    let number = std::cell::Cell::new(0_u32);
    let mut runner =
        TestRunner::new(Config { cases: 48, failure_persistence: None, ..Config::default() });
    let outcome = tokio::task::block_in_place(|| {
        runner.run(&operations(), |operations| {
            number.set(number.get() + 1);
            let mut case = Case {
                store: &store,
                worker: format!("worker-{}", number.get()),
                events: [1, 2, 3, 4].map(|number| event(number, "ada")),
                known: Default::default(),
                letters: BTreeMap::new(),
                now: NOW,
                attempts: 0,
            };
            let done = runtime.block_on(async {
                for operation in &operations {
                    case.apply(operation).await?;
                    case.compare().await?;
                }
                case.compare_letters().await
            });
            done.map_err(|error| TestCaseError::fail(format!("{error:#}")))
        })
    });
    outcome?;
    Ok(())
}
