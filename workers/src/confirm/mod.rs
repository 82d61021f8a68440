//! Finds out whether an account came to be of a sign-up that was let past.
//!
//! An accepted sign-up is not an account: the platform makes it, or the person never comes back.
//! Each waits in the store until its account shows, which makes a `confirmed` event, or has not for
//! too long, which makes an `abandoned` one; whoever comes first settles it, once. The account shows
//! in the directory, where we look for it now and then; in a token that the platform issues, which
//! the connector writes into the store; or because we made it ourselves.
//!
//! A directory that does not answer gives nobody up, and is left alone for a while; one that fails
//! for somebody alone has them wait, and nobody else. Bringing the events to the log is left to
//! whoever empties the store's outbox.

mod schedule;
#[cfg(test)]
mod tests;

use std::{
    collections::HashSet,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use anyhow::anyhow;
use async_trait::async_trait;
use futures_util::{StreamExt as _, stream};
use time::OffsetDateTime;
use tokio::time::timeout;
use tracing::{debug, info, warn};
use uuid::Uuid;
use vestibule_events::{
    ConfirmationSource, Email, Filter, Identity, Kind, PseudonymKey, SignUpEvent,
};
use vestibule_store::{Claimed, Standing, Store, StoreError, Unconfirmed};

pub use self::schedule::ConfirmSchedule;
use self::schedule::{Finding, Next};
use crate::{
    Accounts, Cause, GraphSettings, HandleError, SettingError, Task, Worker,
    graph::{Graph, GraphError},
};

/// Clocks of ours and of the directory may differ by so much.
const SKEW: Duration = Duration::from_secs(5 * 60);

/// Between two looks at what is due: a token or an account may show at any time.
const POLL: Duration = Duration::from_secs(1);

/// So many are looked for at once, and so many before the store is asked again.
const AT_ONCE: usize = 16;
const BATCH: u32 = 32;

/// Whoever has not finished looking by then may find that somebody else has begun, which does no
/// harm; after a crash nobody waits for longer.
const LEASE: Duration = Duration::from_secs(15);

/// Whose account cannot be found out within this time holds up the others no longer.
const LOOK_LIMIT: Duration = Duration::from_secs(10);

/// Where look-ups of so many people failed and none went through in between, it is not about them: the
/// directory is down. Until it answers only so many are looked for at a time.
const OUTAGE_PEOPLE: u32 = 3;

/// How long a directory that is down is left alone, at first and at the longest.
const OUTAGE_PAUSE: Duration = Duration::from_secs(1);
const OUTAGE_PAUSE_MAX: Duration = Duration::from_secs(60);

/// Between two times that old tokens are forgotten.
const SWEEP: time::Duration = time::Duration::hours(1);

/// So long at least a token is remembered for a sign-up that comes here late, because the worker was
/// paused or away: as long as the log keeps the sign-up where nobody says otherwise.
const REMEMBER_MIN: Duration = Duration::from_secs(400 * 24 * 60 * 60);

/// How accounts are confirmed.
#[derive(Clone, Debug, Default)]
pub struct ConfirmSettings {
    /// Where to look for accounts. Without it only tokens show them.
    pub graph: Option<GraphSettings>,
    pub schedule: ConfirmSchedule,
    /// The events whose accounts the worker `accounts` makes: what it says of them holds.
    pub accounts: Option<Filter>,
}

/// The worker `confirm`.
#[derive(Debug)]
pub struct Confirm {
    directory: Option<Directory>,
    schedule: ConfirmSchedule,
    accounts: Option<Filter>,
    key: Arc<PseudonymKey>,
    store: Store,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// How often in a row the directory, or the store, was found to be down.
    outages: u32,
    /// The last of them was the store's.
    of_store: bool,
    /// Sign-ups whose look-ups failed since the directory answered anything.
    unanswered: HashSet<Uuid>,
    swept_at: Option<OffsetDateTime>,
}

impl State {
    const fn is_down(&self) -> bool {
        self.outages > 0
    }
}

impl Confirm {
    pub const NAME: &'static str = "confirm";

    /// What it acts on; other events pass by.
    pub const KINDS: &'static [Kind] = &[Kind::Accepted, Kind::Approved];

    /// Checks the settings, with all complaints at once. Nothing is called yet.
    pub fn new(
        settings: ConfirmSettings,
        key: Arc<PseudonymKey>,
        store: Store,
    ) -> Result<Self, Vec<SettingError>> {
        Ok(Self {
            directory: directory(&settings)?,
            schedule: settings.schedule,
            accounts: settings.accounts,
            key,
            store,
            state: Mutex::default(),
        })
    }

    /// What `new` would complain about. The secret may be a stand-in.
    pub fn check(settings: &ConfirmSettings) -> Result<(), Vec<SettingError>> {
        directory(settings).map(drop)
    }

    /// Looks for accounts that are due; says whether there may be more.
    async fn look(&self) -> Result<bool, Outage> {
        self.sweep().await?;
        let now = OffsetDateTime::now_utc();
        let batch = if self.state().is_down() { OUTAGE_PEOPLE } else { BATCH };
        let Claimed { sign_ups, unreadable } =
            self.store.claim_unconfirmed(now, LEASE, batch).await?;
        for event in unreadable {
            warn!(
                %event,
                "a sign-up waits for its account in a form that this version cannot read; it waits \
                 on, for a version that can"
            );
        }
        let is_full = sign_ups.len() == batch as usize;
        let outage: Mutex<Option<Outage>> = Mutex::default();
        stream::iter(sign_ups)
            .for_each_concurrent(AT_ONCE, async |unconfirmed| {
                // The others need not find out for themselves. Their lease runs out soon.
                if lock(&outage).is_some() {
                    return;
                }
                if let Err(failed) = self.look_for(unconfirmed).await {
                    lock(&outage).get_or_insert(failed);
                }
            })
            .await;
        let outage = outage.into_inner().unwrap_or_else(PoisonError::into_inner);
        outage.map_or(Ok(is_full), Err)
    }

    async fn look_for(&self, unconfirmed: Unconfirmed) -> Result<(), Outage> {
        let Unconfirmed { event, seen, .. } = unconfirmed;
        let source = ConfirmationSource::Token;
        let found = match seen {
            Some(object_id) => Ok(Finding::There { object_id, source }),
            None => self.find(&event).await,
        };
        let (finding, outage) = match found {
            Ok(finding) => (finding, Ok(())),
            Err(outage) => (Finding::Unknown, Err(outage)),
        };
        let now = OffsetDateTime::now_utc();
        let outcome = match self.schedule.judge(finding, event.time, now) {
            Next::WaitOn { due_at, tried } => {
                self.store.wait_on(event.id, due_at, tried).await?;
                return outage;
            }
            Next::Confirm { object_id, source } => {
                SignUpEvent::confirmed(Uuid::now_v7(), now, &event, object_id, source, &self.key)
            }
            Next::Abandon => SignUpEvent::given_up(Uuid::now_v7(), now, &event, &self.key),
        };
        if self.store.settle(&outcome, now).await? {
            debug!(
                event = %event.id,
                person = %event.person,
                outcome = outcome.kind.as_str(),
                "it is known whether a sign-up became an account"
            );
        }
        Ok(())
    }

    async fn find(&self, event: &SignUpEvent) -> Result<Finding, Outage> {
        let makes_accounts = self.accounts.is_some();
        if makes_accounts && let Some(object_id) = self.made_here(event).await? {
            return Ok(Finding::There { object_id, source: ConfirmationSource::Account });
        }
        let is_ours = self.accounts.as_ref().is_some_and(|filter| filter.matches(event));
        if is_ours && event.kind == Kind::Approved {
            // It is being made, or an operator has to see to it; given up it is by them alone.
            let standing = self.store.standing(Accounts::NAME, event.id).await?;
            if standing != Standing::Dropped {
                return Ok(Finding::Unknown);
            }
        }
        let Some(directory) = &self.directory else { return Ok(Finding::NotThere) };
        let error = match timeout(LOOK_LIMIT, directory.find(event)).await {
            Ok(Ok(found)) => {
                self.answered();
                let source = ConfirmationSource::Directory;
                return Ok(match found {
                    Some(object_id) => Finding::There { object_id, source },
                    None => Finding::NotThere,
                });
            }
            Ok(Err(error)) => HandleError::from(error),
            Err(_) => HandleError::retry(Cause::Timeout, anyhow!("the directory took too long")),
        };
        let error = match error {
            HandleError::Retry { source, cause, after } => {
                // It lets nobody in, or asks for rest: that is about us and not about the person.
                let is_ours =
                    matches!(cause, Cause::Throttled | Cause::NotPermitted) || after.is_some();
                if is_ours || self.unanswered(event.id) >= OUTAGE_PEOPLE {
                    return Err(Outage { error: source, after, of_store: false });
                }
                source
            }
            HandleError::Park { source, .. } => {
                self.answered();
                source
            }
            HandleError::StoreUnavailable(source) => {
                return Err(Outage { error: source, after: None, of_store: true });
            }
        };
        // About this one person, as far as is known: nobody else waits for it.
        warn!(
            event = %event.id,
            error = format!("{error:#}"),
            "the directory could not be asked for the account of a sign-up; it waits on"
        );
        Ok(Finding::Unknown)
    }

    /// The account that we made for the person: for this sign-up, or for another one since.
    async fn made_here(&self, event: &SignUpEvent) -> Result<Option<String>, StoreError> {
        let accounts = self.store.accounts_of(&event.person).await?;
        let ours = accounts.into_iter().filter(|it| it.finished_at.is_some()).find(|it| {
            it.event_id == event.id || it.made_at.is_some_and(|at| at + SKEW >= event.time)
        });
        Ok(ours.and_then(|it| it.made).map(|it| it.object_id))
    }

    /// Forgets tokens whose sign-ups have come here long since.
    async fn sweep(&self) -> Result<(), StoreError> {
        let now = OffsetDateTime::now_utc();
        if self.state().swept_at.is_some_and(|at| now - at < SWEEP) {
            return Ok(());
        }
        let keep = self.schedule.abandon_after.max(REMEMBER_MIN);
        let before = now.saturating_sub(keep.try_into().unwrap_or(time::Duration::MAX));
        self.store.forget_sightings(before).await?;
        self.state().swept_at = Some(now);
        Ok(())
    }

    /// How long to leave alone what fails. Said once for each outage.
    fn pause_after(&self, outage: &Outage) -> Duration {
        let outages = {
            let mut state = self.state();
            state.outages = state.outages.saturating_add(1);
            state.of_store = outage.of_store;
            state.outages
        };
        if outages == 1 {
            warn!(
                worker = Self::NAME,
                error = format!("{:#}", outage.error),
                "accounts cannot be looked for; nobody is given up meanwhile"
            );
        }
        let pause = OUTAGE_PAUSE.saturating_mul(2_u32.saturating_pow(outages - 1));
        pause.max(outage.after.unwrap_or_default()).min(OUTAGE_PAUSE_MAX)
    }

    /// Whoever was down is there again: the directory said something, whatever it was, or the store
    /// did.
    fn answered(&self) {
        let was_down = {
            let mut state = self.state();
            let was_down = state.is_down();
            (state.outages, state.of_store) = (0, false);
            state.unanswered.clear();
            was_down
        };
        if was_down {
            info!(worker = Self::NAME, "accounts can be looked for again");
        }
    }

    /// It said nothing of this sign-up. How many there are of these by now.
    fn unanswered(&self, event_id: Uuid) -> u32 {
        let mut state = self.state();
        // More of them say nothing new, and they may be many.
        if state.unanswered.len() < OUTAGE_PEOPLE as usize {
            state.unanswered.insert(event_id);
        }
        u32::try_from(state.unanswered.len()).unwrap_or(u32::MAX)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}

#[async_trait]
impl Worker for Confirm {
    fn name(&self) -> &str {
        Self::NAME
    }

    async fn handle(&self, task: &Task) -> Result<(), HandleError> {
        let event = &task.event;
        if !Self::KINDS.contains(&event.kind) {
            return Ok(());
        }
        let now = OffsetDateTime::now_utc();
        let due_at = self.schedule.first_due(event.time);
        self.store.await_account(Self::NAME, event, due_at, now).await?;
        Ok(())
    }

    async fn tend(&self) -> Option<Duration> {
        Some(match self.look().await {
            Ok(more) => {
                // That nobody was due says nothing about the directory.
                if self.state().of_store {
                    self.answered();
                }
                if more { Duration::ZERO } else { POLL }
            }
            Err(outage) => self.pause_after(&outage),
        })
    }
}

/// Somebody whom we ask does not answer, and says nothing about any sign-up.
struct Outage {
    error: anyhow::Error,
    /// They asked for this pause.
    after: Option<Duration>,
    of_store: bool,
}

impl From<StoreError> for Outage {
    fn from(error: StoreError) -> Self {
        Self { error: error.into(), after: None, of_store: true }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing panics while it is held.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Where accounts are looked for.
struct Directory {
    graph: Graph,
    tenant: String,
}

impl fmt::Debug for Directory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Directory({:?})", self.graph)
    }
}

impl Directory {
    /// The account of a sign-up: by how the person signs in, else by their address.
    async fn find(&self, event: &SignUpEvent) -> Result<Option<String>, GraphError> {
        let sign_up = &event.sign_up;
        let mail = sign_up.email.as_ref().map(|it| Email::expose(it).trim());
        let mail = mail.filter(|it| !it.is_empty());
        // Who signs in with an address and a password of the directory itself comes without an
        // identity. The issuer of such a one is not looked at (contract 7).
        let local = mail.filter(|_| sign_up.identities.is_empty()).map(|mail| Identity {
            sign_in_type: "emailAddress".to_owned(),
            issuer: self.tenant.clone(),
            issuer_assigned_id: mail.to_owned(),
        });
        for identity in sign_up.identities.iter().chain(&local) {
            if let Some(found) = self.graph.find_by_identity(identity).await?.into_iter().next() {
                return Ok(Some(found.id));
            }
        }
        let Some(mail) = mail else { return Ok(None) };
        let found = self.graph.find_by_mail(mail).await?;
        // An older account with the same address is not the one of this sign-up: who has one signs
        // in, and is not signed up.
        let new = |at: OffsetDateTime| at + SKEW >= event.time;
        Ok(found.into_iter().find(|it| it.created.is_none_or(new)).map(|it| it.id))
    }
}

fn directory(settings: &ConfirmSettings) -> Result<Option<Directory>, Vec<SettingError>> {
    let mut faults = Vec::new();
    let schedule = &settings.schedule;
    let mut complain = |key, message: &str| {
        faults.push(SettingError { key, message: message.to_owned() });
    };
    for (key, given) in [
        ("first_look", schedule.first_look),
        ("longest_pause", schedule.longest_pause),
        ("abandon_after", schedule.abandon_after),
    ] {
        // Less would keep the directory busy, and more is beyond what a date can be.
        if given < Duration::from_secs(1) || given > LONGEST {
            complain(key, "must be from 1s to 10 years");
        }
    }
    let Some(graph) = &settings.graph else {
        return if faults.is_empty() { Ok(None) } else { Err(faults) };
    };
    let tenant = graph.tenant.clone();
    match Graph::new(graph, &mut faults) {
        Some(graph) if faults.is_empty() => Ok(Some(Directory { graph, tenant })),
        _ => Err(faults),
    }
}

const LONGEST: Duration = Duration::from_secs(10 * 365 * 24 * 60 * 60);
