//! Makes targets hold what is wanted, row by row.
//!
//! A row is taken in hand, the target is made so, and that is noted; each step may be the last one of
//! a process that dies, and then the row comes again. Calls that say what should be are made, not
//! calls that say what to change, so doing one again does no harm.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use anyhow::anyhow;
use futures_util::future::try_join_all;
use time::OffsetDateTime;
use tokio::time::{Instant, timeout};
use vestibule_events::{Identity, Person, SignUpEvent};
use vestibule_store::{
    Grant, GrantFilter, GrantTarget, GrantTargetFilter, Store, StoreError, Wanted,
};

use super::{
    drift::{self, Difference},
    targets::{Actual, Place, TargetError, TargetSettings, Whom, places},
};
use crate::{Cause, HandleError, RetryPolicy};

/// Longer than a row is worked at, so that nobody else begins while somebody still does.
const GRACE: Duration = Duration::from_secs(5);

/// Rows and grants read at a time.
const PAGE: u32 = 500;

/// What is due at one target, read at a time: what others do meanwhile is to be seen soon.
const DUE: u32 = 50;

/// Then what has expired is looked at again.
const PAGES_OF_DUE: usize = 10;

/// No sweep begins anything more at a target after so long: what has expired, and all other targets,
/// wait for the slowest of them.
const SWEEP: Duration = Duration::from_secs(5);

/// So long rests what the configuration does not say how to do.
const UNNAMED: Duration = Duration::from_secs(60 * 60);

/// How long what nobody sends an event for rests after a failure. It is never given up: somebody
/// would keep a role that was taken from them.
const REST: RetryPolicy = RetryPolicy {
    initial: Duration::from_secs(5),
    multiplier: 2.0,
    max: Duration::from_secs(15 * 60),
    jitter: 0.5,
    tries: u32::MAX,
    max_age: Duration::MAX,
};

/// All targets, and the store that knows what they should hold.
#[derive(Debug)]
pub struct PermissionTargets {
    places: Vec<Place>,
    store: Store,
    /// The longest that one row is worked at.
    limit: Duration,
    /// How long nobody else gets a row that somebody has in hand.
    lease: Duration,
    sweep: Duration,
}

impl PermissionTargets {
    /// Checks the settings, with all complaints at once. Nothing is called yet.
    pub fn new(
        settings: Vec<TargetSettings>,
        store: Store,
        limit: Duration,
    ) -> Result<Self, Vec<TargetError>> {
        Ok(Self { places: places(settings)?, store, limit, lease: limit + GRACE, sweep: SWEEP })
    }

    /// What `new` would complain about. Secrets may be stand-ins.
    pub fn check(settings: Vec<TargetSettings>) -> Result<(), Vec<TargetError>> {
        places(settings).map(drop)
    }

    pub(super) fn len(&self) -> usize {
        self.places.len()
    }

    /// The names of the targets that hold a role.
    pub(super) fn of_role(&self, role: &str) -> Vec<String> {
        let places = self.places.iter().filter(|it| it.role(role).is_some());
        places.map(|it| it.name.clone()).collect()
    }

    /// What holds a row, and what the role is called there; `None` where the configuration no longer
    /// says.
    fn place<'a>(&'a self, row: &'a GrantTarget) -> Option<(&'a Place, &'a str)> {
        let place = self.places.iter().find(|it| it.name == row.target)?;
        Some((place, place.role(&row.role)?))
    }

    /// Carries through what a person's events want, and says the worst of what went wrong.
    pub(super) async fn carry_through(&self, event: &SignUpEvent) -> Result<(), HandleError> {
        let mut failures = Vec::new();
        for row in self.store.pending_by_event(&event.person).await? {
            if let Err(failure) = self.settle(&row, &event.sign_up.identities).await {
                failures.push(failure);
            }
        }
        worst(failures).map_or(Ok(()), Err)
    }

    /// Takes on what is due without an event, each target for itself; says how much was tried.
    pub(super) async fn sweep(&self) -> Result<usize, StoreError> {
        self.store.expire_grant_targets(now()).await?;
        let tried = try_join_all(self.places.iter().map(|place| self.sweep_at(place))).await?;
        Ok(tried.into_iter().sum())
    }

    /// Until nothing is due at this target, its time is over, or it does not serve: the rest would
    /// fare no better.
    async fn sweep_at(&self, place: &Place) -> Result<usize, StoreError> {
        let end = Instant::now() + self.sweep;
        let (mut tried, mut unnamed, mut not_permitted) = (0, BTreeSet::new(), None);
        'pages: for _ in 0..PAGES_OF_DUE {
            let due = self.store.due_grant_targets(&place.name, now(), DUE).await?;
            let is_last = due.len() < DUE as usize;
            for row in due {
                if place.role(&row.role).is_none() {
                    self.put_off(&row).await?;
                    unnamed.insert(row.role);
                    continue;
                }
                tried += 1;
                match self.settle(&row, &[]).await {
                    // Somebody else does it.
                    Ok(()) | Err(HandleError::Retry { cause: Cause::NotYet, .. }) => {}
                    Err(HandleError::StoreUnavailable(_)) => break 'pages,
                    // Told once: where we are not let in, that is so for all of them. It may also be
                    // one role that is not there, so the others of the page are tried.
                    Err(error @ HandleError::Retry { cause: Cause::NotPermitted, .. }) => {
                        not_permitted.get_or_insert(error);
                    }
                    Err(error) => {
                        tracing::warn!(
                            person = %row.person,
                            target = row.target,
                            wanted = row.wanted.as_str(),
                            error = text(&error),
                            "a target could not be made to hold what it should; that is tried again"
                        );
                        if is_away(&error) {
                            break 'pages;
                        }
                    }
                }
                if Instant::now() >= end {
                    break 'pages;
                }
            }
            if is_last || not_permitted.is_some() {
                break;
            }
        }
        if let Some(error) = not_permitted {
            tracing::warn!(
                target = place.name,
                error = text(&error),
                "a target does not permit what it should be made to hold; that is tried again, see \
                 `vestibule permissions list` for what waits"
            );
        }
        if !unnamed.is_empty() {
            tracing::warn!(
                target = place.name,
                roles = ?unnamed,
                "roles are to be taken from a target, or given there, that its `roles` do not name any \
                 more; name them until `vestibule permissions list` shows that nothing is to be done"
            );
        }
        Ok(tried)
    }

    /// Lets rest what cannot be done as long as the configuration does not name the role.
    async fn put_off(&self, row: &GrantTarget) -> Result<(), StoreError> {
        let Some(claimed) = self.store.claim_grant_target(row, now(), self.lease).await? else {
            return Ok(());
        };
        let error = format!("the `roles` of target `{}` do not name the role any more", row.target);
        self.store.grant_target_failed(&claimed, &claimed.seen, &error, now() + UNNAMED).await
    }

    /// Makes a target hold what one row wants.
    async fn settle(&self, row: &GrantTarget, identities: &[Identity]) -> Result<(), HandleError> {
        let Some((place, role)) = self.place(row) else { return Ok(()) };
        let claimed = self.store.claim_grant_target(row, now(), self.lease).await?;
        let Some(claimed) = claimed else {
            let until = row.leased_until.map(|it| it - now());
            return Err(HandleError::Retry {
                source: anyhow!("target `{}` is in other hands for this person", place.name),
                cause: Cause::NotYet,
                after: until.and_then(|it| it.try_into().ok()),
            });
        };
        let mut whom = self.whom(&claimed, identities).await?;
        let work = async {
            match claimed.wanted {
                Wanted::Present => place.target.give(role, &mut whom).await,
                Wanted::Absent => place.target.take(role, &mut whom).await,
            }
        };
        let outcome = timeout(self.limit, work).await.unwrap_or_else(|_| {
            Err(HandleError::retry(Cause::Timeout, anyhow!("the target took too long")))
        });
        match outcome {
            Ok(()) => {
                if claimed.wanted == Wanted::Absent {
                    whom.seen.membership = None;
                }
                Ok(self.store.grant_target_applied(&claimed, &whom.seen, now()).await?)
            }
            Err(failure) => {
                let failure = at(&place.name, failure);
                let asked = match &failure {
                    HandleError::Retry { after, .. } => *after,
                    HandleError::Park { .. } | HandleError::StoreUnavailable(_) => None,
                };
                let rest = REST.pause_after(claimed.tries.saturating_add(1), Duration::ZERO, asked);
                let due_at = now() + rest.unwrap_or(REST.max);
                let error = text(&failure);
                self.store.grant_target_failed(&claimed, &whom.seen, &error, due_at).await?;
                Err(failure)
            }
        }
    }

    async fn whom(&self, row: &GrantTarget, identities: &[Identity]) -> Result<Whom, StoreError> {
        let object_id = match &row.object_id {
            Some(id) => Some(id.clone()),
            // Of an account that we made ourselves, the newest.
            None => {
                let accounts = self.store.accounts_of(&row.person).await?;
                accounts.into_iter().rev().find_map(|it| it.made).map(|it| it.object_id)
            }
        };
        Ok(Whom {
            person: row.person.clone(),
            email: row.email.clone(),
            identities: identities.to_vec(),
            object_id,
            seen: row.seen.clone(),
        })
    }

    /// Compares what targets hold with what they should, of one person or of all. A target that
    /// cannot be asked is among what is given.
    pub async fn compare(&self, person: Option<&Person>) -> Result<Comparison, StoreError> {
        let mut comparison = Comparison::default();
        for ((target, role), wishes) in self.wishes(person).await? {
            let place = self.places.iter().find(|it| it.name == target);
            let Some((place, there)) = place.and_then(|it| Some((it, it.role(&role)?))) else {
                continue;
            };
            let mut whom = Vec::with_capacity(wishes.len());
            for wish in &wishes {
                whom.push(self.whom_of(wish).await?);
            }
            let actual = match place.target.holds(there, &mut whom).await {
                Ok(actual) => actual,
                Err(error) => {
                    let error = text(&at(&target, error));
                    comparison.unreadable.push(Unreadable { target: target.clone(), role, error });
                    continue;
                }
            };
            comparison.compared += wishes.len();
            for (wish, actual) in wishes.into_iter().zip(actual) {
                if drift::differs(wish.wanted, actual) {
                    let Wish { grant, row, wanted } = wish;
                    let target = target.clone();
                    comparison.differences.push(Difference { grant, target, wanted, actual, row });
                } else if actual == Actual::Unknown {
                    comparison.unknown += 1;
                }
            }
        }
        comparison.differences.sort_by(|one, other| one.key().cmp(&other.key()));
        Ok(comparison)
    }

    /// Makes a target right again where it was found to differ.
    pub async fn repair(&self, difference: &Difference) -> Result<(), HandleError> {
        let Difference { grant, target, wanted, row, .. } = difference;
        let repaired =
            self.store.repair_grant_target(grant, target, *wanted, row.as_ref(), now()).await?;
        match repaired {
            Some(row) => self.settle(&row, &[]).await,
            None => {
                let source = anyhow!("what is wanted has changed meanwhile; compare once more");
                Err(HandleError::retry(Cause::NotYet, source))
            }
        }
    }

    /// What is wanted, by target and role.
    async fn wishes(
        &self,
        person: Option<&Person>,
    ) -> Result<BTreeMap<(String, String), Vec<Wish>>, StoreError> {
        let mut rows = BTreeMap::new();
        let mut filter = GrantTargetFilter {
            person: person.cloned(),
            limit: PAGE,
            ..GrantTargetFilter::default()
        };
        loop {
            let page = self.store.grant_targets(&filter).await?;
            let Some(last) = page.last() else { break };
            filter.after = Some((last.person.clone(), last.role.clone(), last.target.clone()));
            rows.extend(page.into_iter().map(|row| {
                ((row.person.as_str().to_owned(), row.role.clone(), row.target.clone()), row)
            }));
        }
        let mut filter =
            GrantFilter { person: person.cloned(), limit: PAGE, ..GrantFilter::default() };
        let mut wishes = BTreeMap::<_, Vec<_>>::new();
        loop {
            let page = self.store.grants(&filter).await?;
            let Some(last) = page.last() else { return Ok(wishes) };
            filter.after = Some((last.person.clone(), last.role.clone()));
            for grant in page {
                for target in self.of_role(&grant.role) {
                    let key =
                        (grant.person.as_str().to_owned(), grant.role.clone(), target.clone());
                    let row = rows.remove(&key);
                    if let Some(wanted) = drift::wanted(&grant, row.is_some(), now()) {
                        let wish = Wish { grant: grant.clone(), row, wanted };
                        wishes.entry((target, grant.role.clone())).or_default().push(wish);
                    }
                }
            }
        }
    }

    async fn whom_of(&self, wish: &Wish) -> Result<Whom, StoreError> {
        if let Some(row) = &wish.row {
            return self.whom(row, &[]).await;
        }
        let person = &wish.grant.person;
        let accounts = self.store.accounts_of(person).await?;
        let made = accounts.into_iter().rev().find_map(|it| it.made);
        Ok(Whom {
            person: person.clone(),
            email: self.store.person(person).await?.and_then(|it| it.email),
            identities: Vec::new(),
            object_id: made.map(|it| it.object_id),
            seen: vestibule_store::Seen::default(),
        })
    }
}

/// What one target should hold of one grant.
struct Wish {
    grant: Grant,
    row: Option<GrantTarget>,
    wanted: Wanted,
}

/// How what is wanted and what is there compare.
#[derive(Debug, Default)]
pub struct Comparison {
    /// How many grants at targets were looked at.
    pub compared: usize,
    /// Of them, whose target cannot tell.
    pub unknown: usize,
    pub differences: Vec<Difference>,
    pub unreadable: Vec<Unreadable>,
}

/// A role at a target that could not be read.
#[derive(Debug)]
pub struct Unreadable {
    pub target: String,
    pub role: String,
    pub error: String,
}

/// What is to be said of several failures: as long as one may pass, the event is tried again.
fn worst(failures: Vec<HandleError>) -> Option<HandleError> {
    let rank = |it: &HandleError| match it {
        HandleError::StoreUnavailable(_) => 2,
        HandleError::Retry { .. } => 1,
        HandleError::Park { .. } => 0,
    };
    let longest = failures.iter().filter_map(|it| match it {
        HandleError::Retry { after, .. } => *after,
        _ => None,
    });
    let longest = longest.max();
    // Of equal ones the first.
    let worst = failures.into_iter().rev().max_by_key(rank)?;
    Some(match worst {
        HandleError::Retry { source, cause, .. } => {
            HandleError::Retry { source, cause, after: longest }
        }
        other => other,
    })
}

/// Whether a failure says of a target that it serves nobody now.
const fn is_away(failure: &HandleError) -> bool {
    matches!(
        failure,
        HandleError::Retry { cause: Cause::Timeout | Cause::Unavailable | Cause::Throttled, .. }
    )
}

/// The same failure, with the name of the target.
fn at(target: &str, failure: HandleError) -> HandleError {
    let name = format!("target `{target}`");
    match failure {
        HandleError::Retry { source, cause, after } => {
            HandleError::Retry { source: source.context(name), cause, after }
        }
        HandleError::Park { source, cause } => {
            HandleError::Park { source: source.context(name), cause }
        }
        store @ HandleError::StoreUnavailable(_) => store,
    }
}

fn text(failure: &HandleError) -> String {
    match failure {
        HandleError::Retry { source, .. }
        | HandleError::Park { source, .. }
        | HandleError::StoreUnavailable(source) => format!("{source:#}"),
    }
}

fn now() -> OffsetDateTime {
    OffsetDateTime::now_utc()
}

#[cfg(test)]
impl PermissionTargets {
    /// Whoever dies in a test is forgotten at once.
    pub(super) fn without_lease(self) -> Self {
        Self { lease: Duration::ZERO, ..self }
    }

    /// How long a sweep goes on at one target.
    pub(super) fn sweeping_for(self, sweep: Duration) -> Self {
        Self { sweep, ..self }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_long_as_something_may_pass_the_event_is_tried_again() {
        let park = || HandleError::park(Cause::Refused, anyhow!("no"));
        let retry = |cause, seconds: Option<u64>| HandleError::Retry {
            source: anyhow!("later"),
            cause,
            after: seconds.map(Duration::from_secs),
        };
        assert!(worst(vec![]).is_none());
        assert!(matches!(worst(vec![park(), park()]), Some(HandleError::Park { .. })));
        let several = vec![
            park(),
            retry(Cause::Timeout, None),
            retry(Cause::Throttled, Some(7)),
            retry(Cause::Throttled, Some(3)),
        ];
        let Some(HandleError::Retry { cause, after, .. }) = worst(several) else { panic!() };
        assert_eq!((cause, after), (Cause::Timeout, Some(Duration::from_secs(7))));
        let store = HandleError::StoreUnavailable(anyhow!("down"));
        let worst = worst(vec![retry(Cause::Timeout, None), store, park()]);
        assert!(matches!(worst, Some(HandleError::StoreUnavailable(_))));
    }
}
