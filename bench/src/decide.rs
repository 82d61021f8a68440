//! What one decision costs, and each of its parts.
//!
//! Decisions by more and more are made in turn, a batch of each, on one thread and without a server
//! around them. What a part costs is the difference to the decisions without it in the same round.
//! The median of many short batches is hardly moved by a neighbour who takes the processor now and
//! then.

use std::{
    hint::black_box,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::ensure;
use serde::Serialize;
use tokio::time::Instant as Deadline;
use vestibule_api::{Decider, List, Question};
use vestibule_events::{Outcome, SignUpEvent};

use crate::{
    cli::Options,
    rules::{self, Extent, Facts},
    sample,
    spread::Spread,
};

#[derive(Debug, Serialize)]
pub(crate) struct Figures {
    pub(crate) rows: Vec<Row>,
    pub(crate) list_entries: u64,
    /// To load the long list from its file.
    pub(crate) list_seconds: Spread,
}

#[derive(Debug, Serialize)]
pub(crate) struct Row {
    pub(crate) by: Extent,
    pub(crate) micros: Spread,
    /// To the decisions of the row before, in the same round.
    pub(crate) adds: Option<Spread>,
    /// What it may add.
    pub(crate) aim: Option<f64>,
}

/// So many different people, so that neither their sign-ups nor their places in the list are all
/// in the processor's caches.
const PEOPLE: u64 = 10_000;

/// Less than a millisecond, so that most are over before anybody takes the processor.
const BATCH: usize = 25;

pub(crate) fn measure(options: &Options, folder: &Path) -> anyhow::Result<Figures> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let facts = Facts::prepare(folder, options.list).await?;
        let deciders = Extent::EACH
            .into_iter()
            .map(|extent| facts.decider(extent))
            .collect::<anyhow::Result<Vec<_>>>()?;
        let people = people(options.list);
        for decider in &deciders {
            let decision = decider.decide(question(&people[0], hour_from_now())).await;
            ensure!(decision.outcome == Outcome::unchanged(), "a rule changes the sample");
        }

        let mut list_seconds = vec![];
        let mut rounds = vec![];
        for round in 1..=options.rounds {
            eprintln!("decisions, round {round} of {}", options.rounds);
            let list = rules::long_list(folder, options.list)?;
            let began = Instant::now();
            let list = List::load(&list).await?;
            list_seconds.push(began.elapsed().as_secs_f64());
            ensure!(list.len() as u64 == options.list, "the list is not whole");
            drop(list);
            rounds.push(round_of(&deciders, &people, options.round()).await);
        }
        Ok(Figures {
            rows: rows(&rounds),
            list_entries: options.list,
            list_seconds: Spread::of(list_seconds),
        })
    })
}

/// People all over the list.
fn people(list: u64) -> Vec<SignUpEvent> {
    let key = sample::key();
    let apart = (list / PEOPLE).max(1);
    (0..PEOPLE).map(|person| sample::event(&key, 1 + person * apart)).collect()
}

fn question(event: &SignUpEvent, deadline: Deadline) -> Question<'_> {
    Question { sign_up: &event.sign_up, person: &event.person, deadline, now: None }
}

fn hour_from_now() -> Deadline {
    Deadline::now() + Duration::from_secs(60 * 60)
}

/// The median time of a decision by each, in microseconds.
async fn round_of(deciders: &[Decider], people: &[SignUpEvent], length: Duration) -> Vec<f64> {
    let mut batches: Vec<Vec<f64>> = deciders.iter().map(|_| vec![]).collect();
    let (began, mut people) = (Instant::now(), people.chunks_exact(BATCH).cycle());
    while began.elapsed() < length {
        for (decider, batches) in deciders.iter().zip(&mut batches) {
            // Others for each, or the first would find nothing in the caches, and the rest all.
            let people = people.next().expect("it goes round");
            let deadline = hour_from_now();
            let began = Instant::now();
            for person in people {
                black_box(decider.decide(question(person, deadline)).await);
            }
            batches.push(began.elapsed().as_secs_f64() * 1e6 / BATCH as f64);
        }
    }
    batches.into_iter().map(|batches| Spread::of(batches).median).collect()
}

fn rows(rounds: &[Vec<f64>]) -> Vec<Row> {
    let each = Extent::EACH.into_iter().enumerate();
    each.map(|(place, by)| {
        let adds = |before: usize| Spread::of(rounds.iter().map(|it| it[place] - it[before]));
        Row {
            by,
            micros: Spread::of(rounds.iter().map(|it| it[place])),
            adds: place.checked_sub(1).map(adds),
            aim: match by {
                Extent::NoRules => None,
                Extent::Rules => Some(25.0),
                Extent::AndList | Extent::AndLookup => Some(2.0),
            },
        }
    })
    .collect()
}
