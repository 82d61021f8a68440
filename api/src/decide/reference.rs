//! What rules may ask for beyond the sign-up: lists and lookups, and what one decision has asked.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Instant as Clock,
};

use serde_json::{Map, Value};
use tokio::time::Instant;
use vestibule_events::{
    LookupReason,
    expression::{ClaimValue, Facts, Fault, Known, LookupState, Members, Sources},
};

use super::{
    lists::List,
    lookups::{AnswerFrom, FOUND, Fetched, Lookup, LookupFailure},
};

/// The lists and lookups that rules may name; all connectors share them.
#[derive(Debug, Default)]
pub struct ReferenceData {
    /// `None` where a list has not been loaded yet; what asks it fails until then.
    lists: HashMap<String, Option<Arc<List>>>,
    lookups: Vec<LookupWithArguments>,
}

/// A lookup, and what of a sign-up it is asked with.
#[derive(Clone, Debug)]
pub struct LookupWithArguments {
    asked: Asks,
    arguments: Arc<[ClaimValue]>,
}

#[derive(Clone, Debug)]
enum Asks {
    Source(Lookup),
    Nobody { name: String, stand_in: StandIn },
}

/// What is given in the place of a lookup's answer where rules are tried out.
#[derive(Clone)]
pub enum StandIn {
    /// This answer. It has found something unless it says `found = false`.
    Answer(Arc<Map<String, Value>>),
    /// As if the source could not be reached.
    Unavailable,
    /// Nothing; the decision's reasons tell that it was wanted.
    NotAsked,
}

/// Leaves the answer out: it may be about a person.
impl std::fmt::Debug for StandIn {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Answer(_) => "Answer",
            Self::Unavailable => "Unavailable",
            Self::NotAsked => "NotAsked",
        })
    }
}

impl StandIn {
    /// The `answer` of a [`LookupReason`] where a lookup was wanted and not asked.
    pub const NOT_ASKED: &'static str = "not-asked";

    #[must_use]
    pub fn answer(mut answer: Map<String, Value>) -> Self {
        answer.entry(FOUND).or_insert(Value::Bool(true));
        Self::Answer(Arc::new(answer))
    }
}

impl LookupWithArguments {
    /// `arguments` are CEL over the sign-up, in the order in which the lookup takes them; what is
    /// wrong with one comes with its place.
    pub fn new(lookup: Lookup, arguments: &[String]) -> Result<Self, Vec<(usize, Fault)>> {
        Self::with(Asks::Source(lookup), arguments)
    }

    /// A lookup that asks nobody.
    pub fn stand_in(
        name: String,
        stand_in: StandIn,
        arguments: &[String],
    ) -> Result<Self, Vec<(usize, Fault)>> {
        Self::with(Asks::Nobody { name, stand_in }, arguments)
    }

    fn with(asked: Asks, arguments: &[String]) -> Result<Self, Vec<(usize, Fault)>> {
        let mut faults = Vec::new();
        let compiled: Vec<_> = arguments
            .iter()
            .enumerate()
            .filter_map(|(place, source)| match ClaimValue::compile(source) {
                Ok(argument) => Some(argument),
                Err(found) => {
                    faults.extend(found.into_iter().map(|fault| (place, fault)));
                    None
                }
            })
            .collect();
        if faults.is_empty() { Ok(Self { asked, arguments: compiled.into() }) } else { Err(faults) }
    }

    fn name(&self) -> &str {
        match &self.asked {
            Asks::Source(lookup) => lookup.name(),
            Asks::Nobody { name, .. } => name,
        }
    }

    async fn ask(&self, arguments: &[Value], deadline: Instant) -> Answered {
        let given = |fetched: Fetched| (fetched.answer, Some(fetched.from));
        match &self.asked {
            Asks::Source(lookup) => match lookup.peek(arguments) {
                Some(fetched) => Ok(given(fetched)),
                None => {
                    lookup.fetch(arguments, deadline).await.map(given).map_err(|it| it.as_str())
                }
            },
            Asks::Nobody { stand_in: StandIn::Answer(answer), .. } => {
                Ok((Arc::clone(answer), None))
            }
            Asks::Nobody { stand_in: StandIn::Unavailable, .. } => {
                Err(LookupFailure::Unavailable.as_str())
            }
            Asks::Nobody { stand_in: StandIn::NotAsked, .. } => Err(StandIn::NOT_ASKED),
        }
    }
}

/// An answer and where it comes from (nowhere, where it stands in for another), or why there is none.
type Answered = Result<(Arc<Map<String, Value>>, Option<AnswerFrom>), &'static str>;

impl ReferenceData {
    #[must_use]
    pub fn new(
        lists: HashMap<String, Option<Arc<List>>>,
        lookups: Vec<LookupWithArguments>,
    ) -> Self {
        Self { lists, lookups }
    }

    /// The same with another list in the place of the one of that name: lists are loaded anew while
    /// everything else stays.
    #[must_use]
    pub fn with_list(&self, name: String, list: Arc<List>) -> Self {
        let mut lists = self.lists.clone();
        lists.insert(name, Some(list));
        Self { lists, lookups: self.lookups.clone() }
    }

    /// What rules may name.
    #[must_use]
    pub fn known(&self) -> Known {
        Known {
            lists: self.lists.keys().cloned().collect(),
            lookups: self.lookups.iter().map(|it| it.name().to_owned()).collect(),
        }
    }
}

/// What one decision has asked lookups, and what they answered.
pub(super) struct Gathered<'a> {
    reference: &'a ReferenceData,
    answers: Vec<Asked>,
    /// The lookup that an evaluation came upon and had no answer of, from 1.
    wanted: AtomicUsize,
}

/// One lookup, asked once a decision.
struct Asked {
    place: usize,
    answer: Answered,
    took_us: u32,
}

/// A lookup that has to be asked, with what.
pub(super) struct Wanted {
    place: usize,
    /// `None` where the sign-up lacks what it is asked with.
    arguments: Option<Vec<Value>>,
}

impl<'a> Gathered<'a> {
    pub(super) const fn new(reference: &'a ReferenceData) -> Self {
        Self { reference, answers: Vec::new(), wanted: AtomicUsize::new(0) }
    }

    /// Before an evaluation: one before it may have come upon a lookup and done without.
    pub(super) fn forget_wanted(&self) {
        self.wanted.store(0, Ordering::Relaxed);
    }

    /// What the last evaluation came upon; `None` where it failed for another reason.
    pub(super) fn wanted(&self, facts: &Facts<'_>) -> Option<Wanted> {
        let place = self.wanted.swap(0, Ordering::Relaxed).checked_sub(1)?;
        let arguments = &self.reference.lookups[place].arguments;
        let arguments = arguments.iter().map(|it| it.evaluate(facts)).collect();
        Some(Wanted { place, arguments: Result::ok(arguments) })
    }

    /// Asks it; afterwards it has an answer, or has failed.
    pub(super) async fn ask(&mut self, wanted: Wanted, deadline: Instant) {
        let Wanted { place, arguments } = wanted;
        let began = Clock::now();
        let answer = match arguments {
            // Nobody to ask about: an address or a claim is not there.
            None => Err("no-argument"),
            Some(arguments) => self.reference.lookups[place].ask(&arguments, deadline).await,
        };
        let took_us = u32::try_from(began.elapsed().as_micros()).unwrap_or(u32::MAX);
        self.answers.push(Asked { place, answer, took_us });
    }

    /// Which lookups were asked, for the event: whether they found something, never what.
    pub(super) fn reasons(&self) -> Vec<LookupReason> {
        let reason = |asked: &Asked| {
            let (answer, from) = match &asked.answer {
                Ok((answer, from)) if answer.get(FOUND) == Some(&Value::Bool(false)) => {
                    ("not-found", *from)
                }
                Ok((_, from)) => ("found", *from),
                Err(failure) => (*failure, None),
            };
            let from = from.map(|it| it.as_str().to_owned());
            let lookup = self.reference.lookups[asked.place].name();
            LookupReason {
                lookup: lookup.to_owned(),
                answer: answer.to_owned(),
                from,
                took_us: asked.took_us,
            }
        };
        self.answers.iter().map(reason).collect()
    }
}

impl Sources for Gathered<'_> {
    fn list(&self, name: &str) -> Option<&dyn Members> {
        let list = self.reference.lists.get(name)?.as_deref()?;
        Some(list)
    }

    fn lookup(&self, name: &str) -> LookupState<'_> {
        let Some(place) = self.reference.lookups.iter().position(|it| it.name() == name) else {
            return LookupState::Failed;
        };
        match self.answers.iter().find(|it| it.place == place) {
            Some(Asked { answer: Ok((answer, _)), .. }) => LookupState::Is(answer),
            Some(Asked { answer: Err(_), .. }) => LookupState::Failed,
            None => {
                self.wanted.store(place + 1, Ordering::Relaxed);
                LookupState::NotYet
            }
        }
    }
}

impl Members for List {
    fn contains(&self, entry: &str) -> bool {
        Self::contains(self, entry)
    }
}
