//! Compares three readings that know nothing of one another: what the platform heard, what the archive
//! holds, and what the workers did.
//!
//! A pure function, and fair in writing: a call counts as answered once its whole answer was read. A
//! call without an answer, or with "try again later", may have made its event or not, once. An answer
//! is late when it took longer than the deadline, `GRACE`, and the time for which this very machine let
//! the platform itself wait; unless a fault kept the connector, or its way to the platform, from
//! answering meanwhile. Differences name sign-ups by number and events by id, nobody by address.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    fmt,
    time::Duration,
};

use uuid::Uuid;

use crate::{
    journal::{Answer, Entry, Moment, Step, micros},
    plan::Worker,
    readings::{Effect, Event, Readings},
};

/// What the way to the connector and back may take, and the platform's own work, on a machine where
/// servers, workers and platform share two cores.
const GRACE: Duration = Duration::from_millis(250);

/// What was counted, and what should not be so.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    pub counts: BTreeMap<&'static str, u64>,
    pub differences: Vec<Difference>,
}

/// Something that should not be so.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Difference {
    /// An answered decision that no event holds.
    NoEvent { sign_up: u64, step: Step },
    /// One call, several events, or one event several times.
    SeveralEvents { sign_up: u64, step: Step, events: Vec<Uuid> },
    /// The event says another thing than the answer.
    EventContradicts { sign_up: u64, step: Step, event: Uuid },
    /// An event that no call can have made.
    EventOfNoCall { event: Uuid },
    /// The same call was answered in two ways.
    AnswersDiffer { sign_up: u64, step: Step },
    /// An answer that the contract does not know.
    NotOfTheContract { sign_up: u64, step: Step, status: u16 },
    /// It came when the platform need not wait any more.
    Late { sign_up: u64, step: Step, took: Duration },
    /// A worker has neither done nor parked what an event asks for.
    NoEffect { event: Uuid, worker: Worker, effect: &'static str },
    /// A worker has done it more than once.
    SeveralEffects { event: Uuid, worker: Worker, effect: &'static str, found: u64 },
    /// A worker has done something that no event asks for.
    EffectOfNoEvent { event: Uuid, worker: Worker, effect: &'static str },
    /// A worker has done it and parked it as well.
    DoneAndParked { event: Uuid, worker: Worker },
    /// All is healed, and a worker still has not dealt with it.
    StillWaiting { event: Uuid, worker: Worker },
    /// The store says that somebody was told, and they know nothing of it.
    NeverTold { event: Uuid, worker: Worker },
    /// Somebody was told under a key that is no event's.
    ToldOfNoEvent { key: String },
}

/// What every accepted sign-up asks of the workers.
const WANTED: [(Worker, &str); 7] = [
    (Worker::Database, "sign-up"),
    (Worker::Database, "person change"),
    (Worker::Permissions, "grant set"),
    (Worker::Notify, "notification"),
    (Worker::Hook, "delivery"),
    (Worker::Script, "delivery"),
    (Worker::Confirm, "closing event"),
];

/// Compares; `deadline` is the connector's.
#[must_use]
pub fn check(readings: &Readings, deadline: Duration) -> Verdict {
    let mut verdict = Verdict::default();
    let heard = Heard::from(&readings.journal);
    heard.judge_times(deadline, &mut verdict);
    compare_events(&heard, &readings.events, &mut verdict);
    compare_effects(readings, &mut verdict);
    verdict.differences.sort();
    verdict
}

/// A form or a federation of one person; every call about it says the same.
type Subject = (u64, Step);

/// The journal in order.
#[derive(Default)]
struct Heard<'a> {
    calls: HashMap<u64, (Subject, Moment)>,
    /// By address and step, as an event has them.
    subjects: HashMap<(&'a str, Step), Subject>,
    answers: BTreeMap<Subject, Vec<Answer>>,
    statuses: Vec<(Subject, u16, Answer)>,
    times: Vec<(Subject, Moment, Moment)>,
    kept: Vec<(Moment, Moment)>,
    stalled: Vec<(Moment, Moment)>,
    not_answered: u64,
}

impl<'a> Heard<'a> {
    fn from(journal: &'a [Entry]) -> Self {
        let mut heard = Self::default();
        for entry in journal {
            match entry {
                Entry::Call { call, sign_up, step, email, at } => {
                    let subject = (*sign_up, *step);
                    heard.calls.insert(*call, (subject, *at));
                    heard.subjects.insert((email, *step), subject);
                    heard.answers.entry(subject).or_default();
                }
                Entry::Answered { call, at, status, answer } => {
                    let Some((subject, sent)) = heard.calls.get(call) else { continue };
                    heard.answers.entry(*subject).or_default().push(*answer);
                    heard.statuses.push((*subject, *status, *answer));
                    heard.times.push((*subject, *sent, *at));
                }
                Entry::NotAnswered { .. } => heard.not_answered += 1,
                Entry::Kept { from, until, .. } => heard.kept.push((*from, *until)),
                Entry::Stalled { from, until } => heard.stalled.push((*from, *until)),
            }
        }
        heard
    }

    fn judge_times(&self, deadline: Duration, verdict: &mut Verdict) {
        let counts = &mut verdict.counts;
        counts.insert("calls", self.calls.len() as u64);
        counts.insert("answered", self.times.len() as u64);
        counts.insert("not answered", self.not_answered);
        let of = |wanted| self.statuses.iter().filter(|it| it.2 == wanted).count() as u64;
        counts.insert("answered: try again", of(Answer::TryAgain));
        let mut slowest = Duration::ZERO;
        let mut judged = 0;
        for (subject, sent, answered) in &self.times {
            let during = |(from, until): &&(Moment, Moment)| *from < *answered && *sent < *until;
            if self.kept.iter().any(|it| during(&it)) {
                continue;
            }
            judged += 1;
            let took = Duration::from_micros(answered.saturating_sub(*sent));
            slowest = slowest.max(took);
            let limit = deadline + GRACE;
            // Only for those few that are beyond it, because there may be many stalls.
            if took <= limit {
                continue;
            }
            let stalled = self.stalled.iter().filter(during);
            let stalled: Moment = stalled.map(|(from, until)| until - from).sum();
            if micros(took) > micros(limit) + stalled {
                let (sign_up, step) = *subject;
                verdict.differences.push(Difference::Late { sign_up, step, took });
            }
        }
        counts.insert("answers whose time was judged", judged);
        counts.insert("slowest of these, ms", micros(slowest) / 1000);
    }
}

fn compare_events(heard: &Heard<'_>, events: &[Event], verdict: &mut Verdict) {
    for (subject, status, answer) in &heard.statuses {
        let (sign_up, step) = *subject;
        if *answer == Answer::Unknown {
            let status = *status;
            verdict.differences.push(Difference::NotOfTheContract { sign_up, step, status });
        }
    }
    let mut by_subject: HashMap<Subject, Vec<&Event>> = HashMap::new();
    // Those that close another are what the worker `confirm` did.
    for event in events.iter().filter(|it| it.closes.is_none()) {
        match event.step.and_then(|step| heard.subjects.get(&(&*event.email, step))) {
            Some(subject) => by_subject.entry(*subject).or_default().push(event),
            None => verdict.differences.push(Difference::EventOfNoCall { event: event.id }),
        }
    }
    let (mut acceptances, mut unheard) = (0, 0);
    for (subject, answers) in &heard.answers {
        let (sign_up, step) = *subject;
        let decisions: BTreeSet<_> =
            answers.iter().filter_map(|answer| decided(step, *answer)).collect();
        acceptances += u64::from(decisions.contains("accepted"));
        let found = by_subject.get(subject).map_or(&[][..], Vec::as_slice);
        if decisions.len() > 1 {
            verdict.differences.push(Difference::AnswersDiffer { sign_up, step });
        }
        match (decisions.first(), found) {
            (None, []) => {}
            (Some(_), []) => verdict.differences.push(Difference::NoEvent { sign_up, step }),
            (None, [_]) => unheard += 1,
            (Some(decision), [event]) if **decision == *event.kind => {}
            (Some(_), [event]) => {
                let event = event.id;
                verdict.differences.push(Difference::EventContradicts { sign_up, step, event });
            }
            (_, several) => {
                let events = several.iter().map(|event| event.id).collect();
                verdict.differences.push(Difference::SeveralEvents { sign_up, step, events });
            }
        }
    }
    verdict.counts.insert("sign-ups that were told they are accepted", acceptances);
    verdict.counts.insert("events", events.len() as u64);
    verdict.counts.insert("events whose answer nobody heard", unheard);
}

/// The kind of event that an answer promises.
fn decided(step: Step, answer: Answer) -> Option<&'static str> {
    match (step, answer) {
        (Step::AfterFederation, Answer::Continue) => Some("screened"),
        (Step::BeforeCreate, Answer::Continue) => Some("accepted"),
        (_, Answer::Block) => Some("blocked"),
        (_, Answer::ValidationError) => Some("rejected"),
        (_, Answer::TryAgain | Answer::Unknown) => None,
    }
}

fn compare_effects(readings: &Readings, verdict: &mut Verdict) {
    let accepted: BTreeSet<Uuid> =
        readings.events.iter().filter(|it| it.kind == "accepted").map(|it| it.id).collect();
    let letters: HashSet<(Worker, Uuid)> = readings.parked.iter().copied().collect();
    let mut found: HashMap<(Worker, &str, Uuid), u64> = HashMap::new();
    for effect in &readings.effects {
        *found.entry((effect.worker, effect.what, effect.event)).or_default() += 1;
    }
    for (worker, effect) in WANTED {
        for &event in &accepted {
            let is_parked = letters.contains(&(worker, event));
            let difference = match found.remove(&(worker, effect, event)).unwrap_or_default() {
                0 if is_parked => continue,
                0 => Difference::NoEffect { event, worker, effect },
                1 if is_parked => Difference::DoneAndParked { event, worker },
                1 => continue,
                found => Difference::SeveralEffects { event, worker, effect, found },
            };
            verdict.differences.push(difference);
        }
    }
    let of_no_event = found.into_keys();
    let letters_of_no_event = readings.parked.iter().filter(|(_, event)| !accepted.contains(event));
    let letters_of_no_event =
        letters_of_no_event.map(|(worker, event)| (*worker, "dead letter", *event));
    for (worker, effect, event) in of_no_event.chain(letters_of_no_event) {
        verdict.differences.push(Difference::EffectOfNoEvent { event, worker, effect });
    }
    for (worker, event) in &readings.waiting {
        verdict.differences.push(Difference::StillWaiting { event: *event, worker: *worker });
    }
    compare_told(readings, &accepted, verdict);
    verdict.counts.insert("accepted events", accepted.len() as u64);
    verdict.counts.insert("effects", readings.effects.len() as u64);
    verdict.counts.insert("parked letters", readings.parked.len() as u64);
}

/// What the store says of who was told against what they say.
fn compare_told(readings: &Readings, accepted: &BTreeSet<Uuid>, verdict: &mut Verdict) {
    let told = &readings.told;
    for Effect { worker, event, key, .. } in &readings.effects {
        let is_untold = key.as_ref().is_some_and(|key| !told.contains_key(key));
        if is_untold && accepted.contains(event) {
            verdict.differences.push(Difference::NeverTold { event: *event, worker: *worker });
        }
    }
    let keys: HashSet<&str> = readings.keys.iter().map(String::as_str).collect();
    for key in told.keys().filter(|key| !keys.contains(key.as_str())) {
        verdict.differences.push(Difference::ToldOfNoEvent { key: key.clone() });
    }
    let again: u64 = told.values().map(|times| times.saturating_sub(1)).sum();
    verdict.counts.insert("told again under their key", again);
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoEvent { sign_up, step } => {
                write!(f, "sign-up {sign_up}: answered at {step}, and there is no event")
            }
            Self::SeveralEvents { sign_up, step, events } => {
                let events: Vec<_> = events.iter().map(Uuid::to_string).collect();
                write!(f, "sign-up {sign_up}: several events at {step}: {}", events.join(", "))
            }
            Self::EventContradicts { sign_up, step, event } => {
                write!(f, "sign-up {sign_up}: event {event} is not what was answered at {step}")
            }
            Self::EventOfNoCall { event } => write!(f, "event {event}: no call can have made it"),
            Self::AnswersDiffer { sign_up, step } => {
                write!(f, "sign-up {sign_up}: one call at {step} was answered in two ways")
            }
            Self::NotOfTheContract { sign_up, step, status } => write!(
                f,
                "sign-up {sign_up}: the answer at {step} (status {status}) is not of the contract"
            ),
            Self::Late { sign_up, step, took } => {
                write!(f, "sign-up {sign_up}: the answer at {step} took {took:?}")
            }
            Self::NoEffect { event, worker, effect } => {
                write!(f, "event {event}: no {effect} by {}", worker.as_str())
            }
            Self::SeveralEffects { event, worker, effect, found } => {
                write!(f, "event {event}: {found} × {effect} by {}", worker.as_str())
            }
            Self::EffectOfNoEvent { event, worker, effect } => {
                write!(f, "event {event}: does not ask for the {effect} of {}", worker.as_str())
            }
            Self::DoneAndParked { event, worker } => {
                write!(f, "event {event}: done and parked by {}", worker.as_str())
            }
            Self::StillWaiting { event, worker } => {
                write!(f, "event {event}: still waits for {}", worker.as_str())
            }
            Self::NeverTold { event, worker } => {
                write!(f, "event {event}: counts as told by {} and never arrived", worker.as_str())
            }
            Self::ToldOfNoEvent { key } => write!(f, "told under {key}: it is of no event"),
        }
    }
}

#[cfg(test)]
mod tests;
