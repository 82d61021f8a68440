//! Checks what became of the answers: each acceptance is one event, and each event was acted on
//! exactly once by every worker that is configured for it.
//!
//! Reads the log and the store, and changes neither. What is found wrong is named by the ids of
//! events and the pseudonyms of people, never by their addresses.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fmt,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::Context;
use futures_util::{StreamExt, TryStreamExt, stream};
use indicatif::ProgressBar;
use serde::Serialize;
use time::OffsetDateTime;
use uuid::Uuid;
use vestibule_events::{
    EventLog, Filter, Kind, LogError, Person, Replay, SignUpEvent, Start, Step,
};
use vestibule_store::{Effects, Store, StoreError};

use super::{outcomes::Outcomes, people::form_of};
use crate::{
    config::{ChannelConfig, Config, EffectConfig, StoreTarget, WorkerConfig},
    replay, wiring,
};

/// Our clock and the connector's may differ by so much.
const CLOCK_SKEW_MAX: Duration = Duration::from_secs(60);

/// Between two looks at log and store.
const LOOK_PAUSE: Duration = Duration::from_millis(200);

/// Once all is done, how long we wait for deliveries that are still under way: one of them might
/// do something a second time.
const QUIET_MAX: Duration = Duration::from_secs(10);

/// Every form that was sent, by address and city.
#[derive(Clone, Debug, Default)]
pub(super) struct Forms(HashMap<(String, String), Form>);

/// What the platform knows about a form.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Form {
    /// The number of the person in the run.
    pub(super) sign_up: u64,
    /// An answer was read that accepts it.
    pub(super) accepted: bool,
    /// At least one call was not answered, so there may be an event without an answer.
    pub(super) unanswered: bool,
}

impl Forms {
    /// The note about a form, made where there is none.
    pub(super) fn form(&mut self, sign_up: u64, email: &str, form: &str) -> &mut Form {
        let key = (email.to_owned(), form.to_owned());
        self.0.entry(key).or_insert(Form { sign_up, ..Form::default() })
    }

    /// Takes in the forms of other people.
    pub(super) fn add(&mut self, other: Self) {
        self.0.extend(other.0);
    }

    pub(super) fn accepted(&self) -> usize {
        self.0.values().filter(|form| form.accepted).count()
    }
}

/// Something that should not be so.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "what", rename_all = "kebab-case")]
pub(super) enum Difference {
    /// The answer is none that the contract knows.
    NotOfTheContract { sign_up: u64, step: Step, status: u16 },
    /// A repeated call was answered otherwise than the first.
    RepeatDiffers { sign_up: u64, step: Step, first: &'static str, then: &'static str },
    /// Answered as accepted, and there is no event.
    MissingEvent { sign_up: u64 },
    /// There is an event about a form that was never sent.
    EventOfNoCall { person: Person, event: Uuid },
    /// One form, several events.
    SeveralEvents { sign_up: u64, person: Person, events: Vec<Uuid> },
    /// There is an event, and the answers said otherwise.
    AgainstTheAnswer { sign_up: u64, person: Person, event: Uuid },
    /// A worker has not done, or done too often, what it is for.
    Effect { event: Uuid, person: Person, effect: &'static str, wanted: u32, found: u32 },
    /// Somebody was not confirmed, or given up, as they came back or not; or more than once.
    Outcome { sign_up: u64, comes_back: bool, confirmed: u32, abandoned: u32 },
    /// More or fewer changes were counted to a person than there are events for it.
    PersonChanges { person: Person, wanted: u32, found: u32 },
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotOfTheContract { sign_up, step, status } => write!(
                f,
                "sign-up {sign_up}: the answer at {step} (status {status}) is not of the contract"
            ),
            Self::RepeatDiffers { sign_up, step, first, then } => write!(
                f,
                "sign-up {sign_up}: the call at {step} was answered {first}, and {then} when \
                 repeated"
            ),
            Self::MissingEvent { sign_up } => {
                write!(f, "sign-up {sign_up}: was accepted and has no event")
            }
            Self::EventOfNoCall { person, event } => {
                write!(f, "event {event} of {person} is about a form that was never sent")
            }
            Self::SeveralEvents { sign_up, person, events } => {
                let events: Vec<_> = events.iter().map(ToString::to_string).collect();
                let events = events.join(", ");
                write!(f, "sign-up {sign_up}: one form of {person} made several events: {events}")
            }
            Self::Outcome { sign_up, comes_back, confirmed, abandoned } => write!(
                f,
                "sign-up {sign_up}: {}, and was confirmed {confirmed} times and given up \
                 {abandoned} times",
                if *comes_back { "signed in" } else { "never came back" }
            ),
            Self::AgainstTheAnswer { sign_up, person, event } => write!(
                f,
                "sign-up {sign_up}: was not accepted, and event {event} of {person} says it was"
            ),
            Self::Effect { event, person, effect, wanted, found } => write!(
                f,
                "event {event} of {person}: {found} × {effect} where there should be {wanted}"
            ),
            Self::PersonChanges { person, wanted, found } => {
                write!(f, "person {person}: {found} changes counted where there should be {wanted}")
            }
        }
    }
}

/// What was found in log and store.
#[derive(Debug, Default)]
pub(super) struct Verified {
    /// Accepted events of this run.
    pub(super) accepted_events: usize,
    /// For each configured worker, how many of them it has dealt with exactly once.
    pub(super) acted_on: BTreeMap<String, usize>,
    pub(super) differences: Vec<Difference>,
    /// Something to consider, where all of it looks as if we looked in the wrong place.
    pub(super) hint: Option<String>,
}

/// An event of this run, with what workers should make of it.
#[derive(Clone, Debug)]
struct Seen {
    id: Uuid,
    person: Person,
    is_accepted: bool,
    form: Option<(String, String)>,
    wanted: Effects,
}

/// A view of log and store.
pub(super) struct Verifier {
    log: Arc<dyn EventLog>,
    store: Store,
    workers: Vec<Acting>,
    place: String,
    /// Where to go on reading.
    next: Start,
    seen: Vec<Seen>,
    outcomes: Outcomes,
}

impl Verifier {
    /// Opens log and store to look at them.
    pub(super) async fn open(config: Config, started: OffsetDateTime) -> anyhow::Result<Self> {
        let log = replay::open_log(&config).await?;
        let store_file = config.data.join("store.db");
        if matches!(config.store.target, StoreTarget::Sqlite) && !store_file.exists() {
            // Opening it would make it.
            anyhow::bail!("there is no store {} yet", store_file.display());
        }
        let store = wiring::store(&config).await?;
        let place = match &config.nats {
            Some(nats) => format!("the stream {} at {}", nats.stream, nats.url),
            None => config.log_file().display().to_string(),
        };
        let next = Start::Time(started - CLOCK_SKEW_MAX);
        let workers = config.workers.iter().map(Acting::new).collect::<anyhow::Result<_>>()?;
        Ok(Self {
            log,
            store,
            workers,
            place,
            next,
            seen: Vec::new(),
            outcomes: Outcomes::default(),
        })
    }

    /// Looks for what is expected of those who were accepted, too.
    pub(super) fn expecting(self, outcomes: Outcomes) -> Self {
        Self { outcomes, ..self }
    }

    /// Waits until everything has been acted on, at most so long, and says what is not so.
    pub(super) async fn verify(
        mut self,
        run: &str,
        forms: &Forms,
        wait: Duration,
        progress: &ProgressBar,
    ) -> anyhow::Result<Verified> {
        let deadline = Instant::now() + wait;
        let mut effects = HashMap::new();
        let mut quiet_since = None;
        loop {
            let look_begun = Instant::now();
            let is_last_look = look_begun >= deadline;
            match self.look(run, &mut effects).await {
                Ok(new) => {
                    progress.set_length(self.seen.len() as u64);
                    progress.set_position(self.settled(&effects) as u64);
                    let settled = new == 0
                        && self.settled(&effects) == self.seen.len()
                        && self.missing(forms) == 0
                        && self.outcomes.open() == 0;
                    if !settled {
                        quiet_since = None;
                    } else if self.is_quiet().await
                        || *quiet_since.get_or_insert_with(Instant::now) + QUIET_MAX
                            < Instant::now()
                    {
                        break;
                    }
                }
                Err(error) if is_last_look => return Err(error),
                // A server that is restarted comes back.
                Err(_) => {}
            }
            if is_last_look {
                break;
            }
            // Looking costs the store something, too: the workers should have most of it.
            tokio::time::sleep(LOOK_PAUSE.max(2 * look_begun.elapsed())).await;
        }
        // All of them once more: what was done a second time may have been done since.
        let ids: Vec<_> = self.seen.iter().map(|seen| seen.id).collect();
        let effects = self.effects(&ids).await?;
        let mut verified = compare(forms, &self.seen, &effects);
        verified.acted_on = self.acted_on(&effects);
        verified.differences.extend(self.outcomes.differences());
        if self.counts_changes() {
            verified.differences.extend(self.changes_of_people().await?);
        }
        if verified.accepted_events == 0 && forms.accepted() > 0 {
            verified.hint = Some(format!(
                "{} holds no event of this run: is this the configuration of the connector that \
                 was called?",
                self.place
            ));
        }
        Ok(verified)
    }

    /// Reads on in the log, and looks up what has not been done yet; says how many events are new.
    async fn look(
        &mut self,
        run: &str,
        effects: &mut HashMap<Uuid, Effects>,
    ) -> anyhow::Result<usize> {
        let before = self.seen.len();
        self.read_on(run).await.context("could not read the log")?;
        let is_open = |seen: &&Seen| effects.get(&seen.id) != Some(&seen.wanted);
        let open: Vec<_> = self.seen.iter().filter(is_open).map(|seen| seen.id).collect();
        effects.extend(self.effects(&open).await?);
        Ok(self.seen.len() - before)
    }

    async fn read_on(&mut self, run: &str) -> Result<(), LogError> {
        let replay = Replay {
            start: self.next,
            until: None,
            filter: Filter::default(),
            person: None,
            follow: false,
        };
        let mut events = self.log.replay(replay).await?;
        while let Some(stored) = events.next().await {
            match stored {
                Ok(stored) => {
                    self.next = Start::Sequence(stored.sequence + 1);
                    if is_of_run(&stored.event, run) {
                        self.take_note(&stored.event);
                    }
                }
                // A damaged event is not one of ours: we could not tell what was answered.
                Err(LogError::Refused(_)) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn take_note(&mut self, event: &SignUpEvent) {
        let seen = Seen::new(event, &self.workers);
        // That a sign-up came to nothing is noted of it, too: handled late it grants nothing more.
        if let (Kind::Abandoned, Some(confirmation)) = (event.kind, &event.confirmation)
            && let Some(origin) = self.seen.iter_mut().find(|seen| seen.id == confirmation.of)
        {
            origin.wanted.grant_sets = origin.wanted.grant_sets.max(seen.wanted.grant_sets);
        }
        self.outcomes.find(event);
        self.seen.push(seen);
    }

    async fn effects(&self, events: &[Uuid]) -> anyhow::Result<HashMap<Uuid, Effects>> {
        self.store.effects(events).await.context("could not look up in the store what was done")
    }

    /// How many events have had all their effects.
    fn settled(&self, effects: &HashMap<Uuid, Effects>) -> usize {
        let is_settled = |seen: &&Seen| {
            let found = effects.get(&seen.id).copied().unwrap_or_default();
            // Done too often or parked is bad enough; waiting will not make it better.
            found.dead_letters > 0
                || PARTS.iter().all(|(_, part)| part(&found) >= part(&seen.wanted))
        };
        self.seen.iter().filter(is_settled).count()
    }

    /// How many acceptances have no event yet.
    fn missing(&self, forms: &Forms) -> usize {
        let accepted = self.seen.iter().filter(|seen| seen.is_accepted);
        let seen: HashSet<_> = accepted.filter_map(|seen| seen.form.as_ref()).collect();
        forms.0.iter().filter(|(key, form)| form.accepted && !seen.contains(key)).count()
    }

    /// Whether no delivery is under way and nothing waits for another attempt, as far as we may
    /// know.
    async fn is_quiet(&self) -> bool {
        for worker in &self.workers {
            let backlog = self.log.backlog(&worker.name).await;
            let waits = self.store.next_retry(&worker.name).await;
            if backlog.is_ok_and(|it| it.is_some_and(|it| !it.is_empty()))
                || waits.is_ok_and(|it| it.is_some())
            {
                return false;
            }
        }
        true
    }

    fn acted_on(&self, effects: &HashMap<Uuid, Effects>) -> BTreeMap<String, usize> {
        let done = |worker: &Acting| {
            let is_done = |seen: &&Seen| {
                let found = effects.get(&seen.id).copied().unwrap_or_default();
                let parts = worker.parts();
                seen.is_accepted && parts.iter().all(|(_, part)| part(&found) == part(&seen.wanted))
            };
            self.seen.iter().filter(is_done).count()
        };
        self.workers.iter().map(|worker| (worker.name.clone(), done(worker))).collect()
    }

    fn counts_changes(&self) -> bool {
        self.workers.iter().any(|worker| matches!(worker.does, Does::Record))
    }

    /// Compares the changes counted to each person with the events there are for it: an effect
    /// without an event would show here.
    async fn changes_of_people(&self) -> anyhow::Result<Vec<Difference>> {
        let mut wanted: BTreeMap<&Person, u32> = BTreeMap::new();
        for seen in &self.seen {
            *wanted.entry(&seen.person).or_default() += seen.wanted.person_changes;
        }
        let counted = stream::iter(wanted).map(|(person, wanted)| async move {
            let record = self.store.person(person).await?;
            Ok::<_, StoreError>((person, wanted, record.map_or(0, |record| record.changes)))
        });
        let counted: Vec<_> = counted
            .buffer_unordered(8)
            .try_collect()
            .await
            .context("could not look up people in the store")?;
        Ok(counted
            .into_iter()
            .filter(|(_, wanted, found)| wanted != found)
            .map(|(person, wanted, found)| Difference::PersonChanges {
                person: person.clone(),
                wanted,
                found,
            })
            .collect())
    }
}

/// Whether an event is about one of this run's people: their addresses say so.
fn is_of_run(event: &SignUpEvent, run: &str) -> bool {
    let Some(email) = &event.sign_up.email else { return false };
    let mailbox = email.expose().rsplit_once('@').map_or("", |(mailbox, _)| mailbox);
    let tag = mailbox.rsplit_once('+').map_or("", |(_, tag)| tag);
    tag.strip_prefix(run).is_some_and(|rest| rest.starts_with('-'))
}

impl Seen {
    fn new(event: &SignUpEvent, workers: &[Acting]) -> Self {
        let email = event.sign_up.email.as_ref().map(|email| email.expose().to_owned());
        let form = form_of(&event.sign_up.claims).map(str::to_owned);
        Self {
            id: event.id,
            person: event.person.clone(),
            is_accepted: event.kind == Kind::Accepted,
            form: email.zip(form),
            wanted: wanted(event, workers),
        }
    }
}

/// A worker, as far as it matters what it should do.
#[derive(Debug)]
struct Acting {
    name: String,
    filter: Filter,
    does: Does,
}

#[derive(Debug)]
enum Does {
    Record,
    Grant,
    /// What leaves nothing of ours behind for every sign-up.
    Other,
    /// One notification for each of these channels.
    Notify(Vec<Filter>),
}

impl Acting {
    fn new(worker: &WorkerConfig) -> anyhow::Result<Self> {
        let does = match &worker.effect {
            EffectConfig::Database => Does::Record,
            EffectConfig::Permissions(_) => Does::Grant,
            EffectConfig::Approvals(_)
            | EffectConfig::Accounts(_)
            | EffectConfig::Confirm(_)
            | EffectConfig::Statements(_)
            | EffectConfig::Subscriber(_) => Does::Other,
            // How many devices people have, and how many hold a role, is not known here.
            EffectConfig::Notify(channels) if !channels.iter().all(ChannelConfig::tells_once) => {
                Does::Other
            }
            EffectConfig::Notify(channels) => {
                // Nothing is sent from here, so the secrets stay where they are.
                let filter = |channel: &ChannelConfig| {
                    anyhow::Ok(channel.settings(|_| Ok(String::new().into()))?.filter)
                };
                Does::Notify(channels.iter().map(filter).collect::<anyhow::Result<_>>()?)
            }
        };
        Ok(Self { name: worker.name().to_owned(), filter: worker.settings.filter.clone(), does })
    }

    const fn parts(&self) -> &'static [(&'static str, Part)] {
        match self.does {
            Does::Record => &[SIGN_UP, PERSON_CHANGE],
            Does::Grant => &[GRANT_SET],
            Does::Other => &[],
            Does::Notify(_) => &[NOTIFICATION],
        }
    }
}

/// What the workers should make of an event.
fn wanted(event: &SignUpEvent, workers: &[Acting]) -> Effects {
    let mut wanted = Effects::default();
    for worker in workers.iter().filter(|worker| worker.filter.matches(event)) {
        match &worker.does {
            // What becomes of a sign-up later is noted of its person, and is no second sign-up.
            Does::Record
                if Kind::of(event.sign_up.step, &event.decision.outcome) != Some(event.kind) => {}
            Does::Record => {
                wanted.sign_ups = 1;
                wanted.person_changes = 1;
            }
            // A sign-up that came to nothing takes roles away; a request that nobody decided about has
            // granted none.
            Does::Grant if event.kind == Kind::Abandoned => {
                wanted.grant_sets = u32::from(event.confirmation.is_some());
            }
            Does::Grant => wanted.grant_sets = 1,
            Does::Other => {}
            Does::Notify(channels) => {
                let channels = channels.iter().filter(|channel| channel.matches(event));
                wanted.notifications = u32::try_from(channels.count()).unwrap_or(u32::MAX);
            }
        }
    }
    wanted
}

type Part = fn(&Effects) -> u32;

const SIGN_UP: (&str, Part) = ("recorded sign-up", |it| it.sign_ups);
const PERSON_CHANGE: (&str, Part) = ("person change", |it| it.person_changes);
const GRANT_SET: (&str, Part) = ("set of grants", |it| it.grant_sets);
const NOTIFICATION: (&str, Part) = ("notification", |it| it.notifications);
const DEAD_LETTER: (&str, Part) = ("dead letter", |it| it.dead_letters);

const PARTS: [(&str, Part); 5] = [SIGN_UP, PERSON_CHANGE, GRANT_SET, NOTIFICATION, DEAD_LETTER];

/// Compares answers, events and effects.
fn compare(forms: &Forms, seen: &[Seen], effects: &HashMap<Uuid, Effects>) -> Verified {
    let mut verified = Verified::default();
    let mut events: HashMap<&(String, String), Vec<&Seen>> = HashMap::new();
    for seen in seen.iter().filter(|seen| seen.is_accepted) {
        verified.accepted_events += 1;
        match &seen.form {
            Some(form) if forms.0.contains_key(form) => events.entry(form).or_default().push(seen),
            _ => verified
                .differences
                .push(Difference::EventOfNoCall { person: seen.person.clone(), event: seen.id }),
        }
    }
    let mut by_sign_up: Vec<_> = forms.0.iter().collect();
    by_sign_up.sort_unstable_by_key(|(key, form)| (form.sign_up, *key));
    for (key, form) in by_sign_up {
        let events = events.get(key).map_or(&[][..], Vec::as_slice);
        verified.differences.extend(compare_form(*form, events));
    }
    for seen in seen {
        let found = effects.get(&seen.id).copied().unwrap_or_default();
        for (effect, part) in PARTS {
            let (wanted, found) = (part(&seen.wanted), part(&found));
            if wanted != found {
                let person = seen.person.clone();
                let event = seen.id;
                let difference = Difference::Effect { event, person, effect, wanted, found };
                verified.differences.push(difference);
            }
        }
    }
    verified
}

/// Compares what was answered about one form with its events.
fn compare_form(form: Form, events: &[&Seen]) -> Option<Difference> {
    let Form { sign_up, accepted, unanswered } = form;
    match events {
        [] if accepted => Some(Difference::MissingEvent { sign_up }),
        [] => None,
        [seen] if !accepted && !unanswered => Some(Difference::AgainstTheAnswer {
            sign_up,
            person: seen.person.clone(),
            event: seen.id,
        }),
        [_] => None,
        [first, ..] => Some(Difference::SeveralEvents {
            sign_up,
            person: first.person.clone(),
            events: events.iter().map(|seen| seen.id).collect(),
        }),
    }
}

#[cfg(test)]
mod tests;
