//! Anything in any order, against a model: nothing is lost, and nothing done comes back.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use anyhow::ensure;
use futures_util::future::try_join_all;
use proptest::prelude::*;
use sqlx::Connection;
use vestibule_events::{Acknowledge, Consumer, ConsumerSpec, EventLog};

use super::{LocalPlace, sqlite};
use crate::{
    contract::{Place, append, next, number_of, spec},
    sample::call,
};

#[derive(Clone, Copy, Debug)]
enum Step {
    Append,
    AppendMany(u64),
    Repeat(prop::sample::Index),
    Deliver,
    Ack(prop::sample::Index),
    Nack(prop::sample::Index),
    /// Opens the consumer anew.
    Reopen,
    /// Ends the process in order and starts it again.
    Restart,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let any_one = any::<prop::sample::Index>;
    let step = prop_oneof![
        4 => Just(Step::Append),
        1 => (2_u64..20).prop_map(Step::AppendMany),
        1 => any_one().prop_map(Step::Repeat),
        6 => Just(Step::Deliver),
        5 => any_one().prop_map(Step::Ack),
        2 => any_one().prop_map(Step::Nack),
        1 => Just(Step::Reopen),
        1 => Just(Step::Restart),
    ];
    prop::collection::vec(step, 1..60)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..Default::default() })]

    #[test]
    fn nothing_is_lost_and_nothing_done_comes_back(steps in steps()) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let result = runtime.block_on(run(&steps));
        prop_assert!(result.is_ok(), "{:?}", result);
    }
}

/// Any JSON, nested a little.
fn json() -> impl Strategy<Value = serde_json::Value> {
    let leaf = prop_oneof![
        Just(serde_json::Value::Null),
        any::<bool>().prop_map(Into::into),
        any::<i64>().prop_map(Into::into),
        any::<u64>().prop_map(Into::into),
        any::<f64>().prop_map(Into::into),
        any::<String>().prop_map(Into::into),
    ];
    leaf.prop_recursive(4, 24, 6, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..6).prop_map(Into::into),
            prop::collection::hash_map(any::<String>(), inner, 0..6)
                .prop_map(|it| serde_json::Value::Object(it.into_iter().collect())),
        ]
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 8, failure_persistence: None, ..Default::default() })]

    /// A group is stored by one statement that takes it apart again, so everything depends on
    /// every event coming out as it went in, to the letter.
    #[test]
    fn whatever_a_claim_is_it_comes_back(claims in prop::collection::vec(json(), 1..40)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let result = runtime.block_on(async {
            let place = LocalPlace::new()?;
            let log = place.open().await?;
            let events = claims.iter().zip(0..).map(|(claim, number)| {
                let mut event = call(number).event();
                event.sign_up.claims.insert("any".into(), claim.clone());
                event
            });
            let events: Vec<_> = events.collect();
            let appends = events.iter().map(|event| log.append(event.clone()));
            let appended = try_join_all(appends).await?;
            let mut sqlite = sqlite(&place).await?;
            for (event, appended) in events.iter().zip(appended) {
                let text: String = sqlx::query_scalar("select event from events where sequence = ?")
                    .bind(i64::try_from(appended.stored.sequence)?)
                    .fetch_one(&mut sqlite)
                    .await?;
                ensure!(text == serde_json::to_string(event)?, "came back as {text}");
            }
            sqlite.close().await?;
            place.close().await
        });
        prop_assert!(result.is_ok(), "{:?}", result);
    }
}

struct Model {
    place: LocalPlace,
    log: Arc<dyn EventLog>,
    consumer: Box<dyn Consumer>,
    appended: u64,
    waiting: BTreeSet<u64>,
    in_hand: BTreeMap<u64, Box<dyn Acknowledge>>,
    done: BTreeSet<u64>,
}

/// Waits far longer than a test takes, so that only a restart brings back what is in hand.
fn worker() -> ConsumerSpec {
    ConsumerSpec { ack_wait: Duration::from_secs(3600), max_in_flight: 8, ..spec("worker") }
}

async fn run(steps: &[Step]) -> anyhow::Result<()> {
    let place = LocalPlace::new()?;
    let log = place.open().await?;
    let consumer = log.consumer(worker()).await?;
    let mut model = Model {
        place,
        log,
        consumer,
        appended: 0,
        waiting: BTreeSet::new(),
        in_hand: BTreeMap::new(),
        done: BTreeSet::new(),
    };
    for step in steps {
        model = model.step(*step).await?;
    }
    // Whatever happened, a worker that does its work gets everything done.
    while !model.waiting.is_empty() || !model.in_hand.is_empty() {
        if let Some((number, acknowledge)) = model.in_hand.pop_first() {
            acknowledge.ack().await?;
            model.done.insert(number);
        } else {
            model.deliver().await?;
        }
    }
    ensure!(model.done == (1..=model.appended).collect());
    ensure!(model.log.backlog("worker").await?.is_some_and(|it| it.is_empty()));
    model.place.close().await
}

impl Model {
    async fn step(mut self, step: Step) -> anyhow::Result<Self> {
        match step {
            Step::Append => self.append(1).await?,
            Step::AppendMany(count) => self.append(count).await?,
            Step::Repeat(which) => {
                if self.appended > 0 {
                    let number = 1 + which.index(self.appended as usize) as u64;
                    ensure!(self.log.append(call(number).event()).await?.duplicate);
                }
            }
            Step::Deliver => {
                if !self.waiting.is_empty() && self.in_hand.len() < worker().max_in_flight {
                    self.deliver().await?;
                }
            }
            Step::Ack(which) => {
                if let Some(number) = self.pick(which) {
                    let acknowledge = self.in_hand.remove(&number);
                    if let Some(it) = acknowledge {
                        it.ack().await?;
                    }
                    self.done.insert(number);
                }
            }
            Step::Nack(which) => {
                if let Some(number) = self.pick(which) {
                    if let Some(it) = self.in_hand.remove(&number) {
                        it.nack(Duration::ZERO).await?;
                    }
                    self.waiting.insert(number);
                }
            }
            Step::Reopen => {
                drop(self.consumer);
                self.consumer = self.log.consumer(worker()).await?;
            }
            Step::Restart => {
                drop(self.consumer);
                self.log = self.place.restart(self.log).await?;
                self.consumer = self.log.consumer(worker()).await?;
                self.waiting.extend(std::mem::take(&mut self.in_hand).into_keys());
            }
        }
        let backlog = self.log.backlog("worker").await?;
        let left = (self.waiting.len() + self.in_hand.len()) as u64;
        ensure!(
            backlog.is_some_and(|it| it.waiting + it.in_flight == left),
            "{backlog:?}, not {left}"
        );
        Ok(self)
    }

    fn pick(&self, which: prop::sample::Index) -> Option<u64> {
        let count = self.in_hand.len();
        (count > 0).then(|| *self.in_hand.keys().nth(which.index(count)).expect("within"))
    }

    async fn append(&mut self, count: u64) -> anyhow::Result<()> {
        let first = self.appended + 1;
        append(&self.log, first..first + count).await?;
        self.appended += count;
        self.waiting.extend(first..first + count);
        Ok(())
    }

    async fn deliver(&mut self) -> anyhow::Result<()> {
        let delivery = next(&mut self.consumer).await?;
        let number = number_of(&delivery)?;
        ensure!(self.waiting.remove(&number), "{number} was in hand or done already");
        self.in_hand.insert(number, delivery.acknowledge);
        Ok(())
    }
}
