//! What targets are to hold of what was granted, on both dialects.

use std::time::Duration;

use sqlx::Connection as _;
use time::OffsetDateTime;
use tokio::task::JoinSet;
use uuid::Uuid;
use vestibule_events::{ConfirmationSource, Person, PseudonymKey, SignUpEvent};
use vestibule_store::{
    Done, Grant, GrantFilter, GrantTarget, GrantTargetFilter, NewGrant, Revocation, Seen, Store,
    Wanted,
};
use vestibule_testkit::eventually;

use crate::home::{Home, NOW, event, file_in, given_up_after, time_of};

const WORKER: &str = "permissions";
const LEASE: Duration = Duration::from_secs(30);
const BY_GRACE: Revocation<'static> = Revocation { by: "grace", reason: "left us" };

fn role(role: &str) -> NewGrant {
    NewGrant { role: role.to_owned(), reason: "rule".to_owned(), expires_at: None }
}

fn targets(role: &str) -> Vec<String> {
    if role == "buyer" { vec!["erp".into(), "entra".into()] } else { vec!["entra".into()] }
}

async fn grant(store: &Store, event: &SignUpEvent, grants: &[NewGrant]) -> anyhow::Result<Done> {
    Ok(store.grant_at(WORKER, event, grants, targets, NOW).await?)
}

async fn rows(store: &Store) -> anyhow::Result<Vec<GrantTarget>> {
    Ok(store.grant_targets(&all()).await?)
}

fn all() -> GrantTargetFilter {
    GrantTargetFilter { limit: 1000, ..GrantTargetFilter::default() }
}

/// At all targets.
async fn due(store: &Store, now: OffsetDateTime) -> anyhow::Result<Vec<GrantTarget>> {
    let mut due = Vec::new();
    for target in ["entra", "erp", "scim"] {
        due.extend(store.due_grant_targets(target, now, 10).await?);
    }
    Ok(due)
}

/// Role, target, what is wanted, whether that is pending.
async fn shape(store: &Store) -> anyhow::Result<Vec<(String, String, Wanted, bool)>> {
    let rows = rows(store).await?.into_iter();
    Ok(rows.map(|it| (it.role, it.target, it.wanted, it.is_pending)).collect())
}

async fn apply(store: &Store, row: &GrantTarget) -> anyhow::Result<()> {
    let claimed = store.claim_grant_target(row, NOW, LEASE).await?.expect("it is free");
    let seen = Seen { account: Some("account".into()), membership: Some("membership".into()) };
    Ok(store.grant_target_applied(&claimed, &seen, time_of(9)).await?)
}

async fn apply_all(store: &Store, person: &Person) -> anyhow::Result<()> {
    for row in store.pending_by_event(person).await? {
        apply(store, &row).await?;
    }
    Ok(())
}

pub(crate) async fn what_is_granted_is_wanted_at_its_targets_until_it_is_seen_there(
    home: &Home,
) -> anyhow::Result<()> {
    let store = home.store().await?;
    let event = event(1, "ada");
    assert_eq!(grant(&store, &event, &[role("buyer"), role("guest")]).await?, Done::Now);
    assert_eq!(grant(&store, &event, &[role("other")]).await?, Done::Before);

    let present = |role: &str, target: &str, pending| {
        (role.to_owned(), target.to_owned(), Wanted::Present, pending)
    };
    let all = |pending| {
        [("buyer", "entra"), ("buyer", "erp"), ("guest", "entra")]
            .map(|(role, target)| present(role, target, pending))
    };
    assert_eq!(shape(&store).await?, all(true));
    assert!(store.due_grant_targets("entra", time_of(999), 10).await?.is_empty());
    apply_all(&store, &event.person).await?;
    assert_eq!(shape(&store).await?, all(false));
    let row = &rows(&store).await?[0];
    assert_eq!((row.seen.account.as_deref(), row.applied_at), (Some("account"), Some(time_of(9))));
    assert_eq!(row.email, event.sign_up.email);

    let again = crate::home::event(2, "ada");
    grant(&store, &again, &[role("buyer")]).await?;
    assert_eq!(shape(&store).await?, all(false), "what is so already is left alone");
    assert_eq!(rows(&store).await?[0].event_id, again.id);
    Ok(())
}

pub(crate) async fn a_row_is_in_one_hand_until_its_lease_is_over(
    home: &Home,
) -> anyhow::Result<()> {
    let store = home.store().await?;
    let event = event(1, "ada");
    grant(&store, &event, &[role("guest")]).await?;
    let row = rows(&store).await?.remove(0);

    let mut tasks = JoinSet::new();
    for _ in 0..12 {
        let (store, row) = (store.clone(), row.clone());
        tasks.spawn(async move { store.claim_grant_target(&row, NOW, LEASE).await });
    }
    let mut claims = Vec::new();
    while let Some(claim) = tasks.join_next().await {
        claims.extend(claim??);
    }
    assert_eq!(claims.len(), 1);
    let late = NOW + LEASE;
    assert!(
        store.claim_grant_target(&row, late - Duration::from_micros(1), LEASE).await?.is_none()
    );
    let second = store.claim_grant_target(&row, late, LEASE).await?.expect("the lease is over");

    store.grant_target_applied(&claims[0], &Seen::default(), late).await?;
    assert!(rows(&store).await?[0].is_pending, "who came too late says nothing");
    store.grant_target_failed(&second, &Seen::default(), "down", time_of(60)).await?;
    let row = rows(&store).await?.remove(0);
    assert_eq!((row.tries, row.error.as_deref(), row.due_at), (1, Some("down"), None));
    let third = store.claim_grant_target(&row, late, LEASE).await?.expect("it was let go of");
    store.grant_target_applied(&third, &Seen::default(), late).await?;
    assert!(store.claim_grant_target(&row, time_of(9999), LEASE).await?.is_none());
    Ok(())
}

pub(crate) async fn what_is_revoked_is_taken_from_its_targets(home: &Home) -> anyhow::Result<()> {
    let store = home.store().await?;
    let event = event(1, "ada");
    grant(&store, &event, &[role("buyer"), role("guest")]).await?;
    apply_all(&store, &event.person).await?;
    // Granted while it is being revoked: what was begun does not settle what is wanted now.
    let newer = crate::home::event(2, "ada");
    grant(&store, &newer, &[role("late")]).await?;
    let late = store.pending_by_event(&event.person).await?.remove(0);
    let claimed = store.claim_grant_target(&late, NOW, LEASE).await?.expect("it is free");

    let revoked = store.revoke_grants(&event.person, Some("buyer"), BY_GRACE, time_of(5)).await?;
    assert_eq!(revoked, ["buyer"]);
    let revoked = store.revoke_grants(&event.person, None, BY_GRACE, time_of(6)).await?;
    assert_eq!(revoked, ["guest", "late"]);
    assert!(store.revoke_grants(&event.person, None, BY_GRACE, NOW).await?.is_empty());

    store.grant_target_applied(&claimed, &Seen::default(), NOW).await?;
    let taken = due(&store, time_of(6)).await?;
    assert_eq!(taken.len(), 4);
    assert!(taken.iter().all(|it| it.wanted == Wanted::Absent));
    assert_eq!(store.due_grant_targets("erp", time_of(6), 10).await?.len(), 1);
    assert!(store.pending_by_event(&event.person).await?.is_empty(), "no event carries them");
    for grant in store.grants_of(&event.person).await? {
        let Grant { revoked_by, revoke_reason, .. } = &grant;
        let said = (revoked_by.as_deref(), revoke_reason.as_deref());
        assert_eq!(said, (Some("grace"), Some("left us")));
        assert!(!grant.is_in_force(time_of(7)));
    }

    let claimed =
        store.claim_grant_target(&taken[0], time_of(6), LEASE).await?.expect("it is free");
    store.grant_target_failed(&claimed, &Seen::default(), "down", time_of(60)).await?;
    assert_eq!(due(&store, time_of(59)).await?.len(), 3);
    assert_eq!(due(&store, time_of(60)).await?.len(), 4);

    // Late news of before the revocation change nothing; who signs up anew gets the role anew.
    grant(&store, &crate::home::event(4, "ada"), &[role("buyer")]).await?;
    assert!(store.grants_of(&event.person).await?[0].revoked_at.is_some());
    grant(&store, &crate::home::event(7, "ada"), &[role("buyer")]).await?;
    assert!(store.grants_of(&event.person).await?[0].is_in_force(NOW));
    assert_eq!(store.pending_by_event(&event.person).await?.len(), 2);
    Ok(())
}

pub(crate) async fn what_expires_is_wanted_no_more(home: &Home) -> anyhow::Result<()> {
    let store = home.store().await?;
    let until = |seconds| Some(time_of(seconds));
    let event = event(1, "ada");
    let grants = [
        NewGrant { expires_at: until(10), ..role("buyer") },
        NewGrant { expires_at: until(20), ..role("guest") },
        role("stays"),
    ];
    grant(&store, &event, &grants).await?;
    apply_all(&store, &event.person).await?;

    assert_eq!(store.expire_grant_targets(time_of(9)).await?, 0);
    assert_eq!(store.expire_grant_targets(time_of(10)).await?, 2, "both targets of the one");
    assert_eq!(store.expire_grant_targets(time_of(10)).await?, 0);
    let due = due(&store, time_of(10)).await?;
    let roles: Vec<_> = due.iter().map(|it| (it.role.as_str(), it.wanted)).collect();
    assert_eq!(roles, [("buyer", Wanted::Absent); 2]);

    // Handled when it was over already: it is seen to that nothing is left of it, whatever becomes
    // of the event.
    let late = crate::home::event(2, "bob");
    let over = [NewGrant { expires_at: Some(NOW), ..role("guest") }];
    grant(&store, &late, &over).await?;
    let taken = store.due_grant_targets("entra", NOW, 10).await?.remove(0);
    assert_eq!((&taken.person, taken.wanted), (&late.person, Wanted::Absent));
    assert_eq!(store.pending_by_event(&late.person).await?, []);
    apply(&store, &taken).await?;
    grant(&store, &crate::home::event(3, "bob"), &over).await?;
    assert_eq!(store.due_grant_targets("entra", NOW, 10).await?, [], "that is so already");

    // It was revoked, and is still to be taken away: news that it is over do not keep it.
    let revoked = crate::home::event(4, "eve");
    grant(&store, &revoked, &[role("guest")]).await?;
    apply_all(&store, &revoked.person).await?;
    store.revoke_grants(&revoked.person, None, BY_GRACE, time_of(5)).await?;
    grant(&store, &crate::home::event(6, "eve"), &over).await?;
    let taken = store.due_grant_targets("entra", NOW, 10).await?.remove(0);
    assert_eq!((&taken.person, taken.wanted), (&revoked.person, Wanted::Absent));
    Ok(())
}

pub(crate) async fn what_stems_from_a_sign_up_that_came_to_nothing_is_revoked(
    home: &Home,
) -> anyhow::Result<()> {
    let store = home.store().await?;
    let (first, second) = (event(1, "ada"), event(2, "ada"));
    grant(&store, &first, &[role("buyer"), role("guest")]).await?;
    grant(&store, &second, &[role("guest")]).await?;
    let over = event(5, "ada");

    let revoke = async |over: &SignUpEvent, origin| {
        store.revoke_grants_of(WORKER, over, origin, BY_GRACE, time_of(5)).await
    };
    assert_eq!(revoke(&over, first.id).await?, Done::Now);
    assert_eq!(revoke(&over, first.id).await?, Done::Before);
    let grants = store.grants_of(&first.person).await?;
    let in_force: Vec<_> = grants.iter().map(|it| it.is_in_force(NOW)).collect();
    assert_eq!(in_force, [false, true], "the other stems from another sign-up");
    let due = due(&store, time_of(5)).await?;
    let roles: Vec<_> = due.iter().map(|it| (it.role.as_str(), it.wanted)).collect();
    assert_eq!(roles, [("buyer", Wanted::Absent); 2], "that waits for no other event");
    assert!(store.is_done(WORKER, over.id).await?);

    // News of the end overtook those of the beginning.
    let (begun, over) = (event(6, "bob"), event(7, "bob"));
    revoke(&over, begun.id).await?;
    assert_eq!(grant(&store, &begun, &[role("guest")]).await?, Done::Before);
    assert_eq!(store.grants_of(&begun.person).await?, []);
    let effects = store.effects(&[begun.id, over.id]).await?;
    assert!(effects.values().all(|it| it.grant_sets == 1), "{effects:?}");
    Ok(())
}

/// What is heard of a person's sign-ups, which are numbered as they happened.
#[derive(Clone, Copy, Debug)]
enum News {
    /// It earned `guest`, and the first one `buyer`, too.
    Earned(u32),
    CameToNothing(u32),
}

/// All orders of them.
fn orders(news: &[News]) -> Vec<Vec<News>> {
    let Some((first, rest)) = news.split_first() else { return vec![Vec::new()] };
    let mut all = Vec::new();
    for order in orders(rest) {
        for place in 0..=order.len() {
            let mut order = order.clone();
            order.insert(place, *first);
            all.push(order);
        }
    }
    all
}

/// What is known of the accounts of the sign-ups before anything is heard of them here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Accounts {
    /// Nobody waits for any.
    Unknown,
    /// The newest is waited for, in the place of those before.
    Awaited,
    /// The first has one; then as above.
    FirstConfirmed,
}

async fn await_accounts(
    store: &Store,
    accounts: Accounts,
    sign_ups: &[SignUpEvent],
) -> anyhow::Result<()> {
    if accounts == Accounts::Unknown {
        return Ok(());
    }
    for (place, event) in sign_ups.iter().enumerate() {
        store.await_account("confirm", event, event.time, event.time).await?;
        if place == 0 && accounts == Accounts::FirstConfirmed {
            let (key, source) = (PseudonymKey::new(vec![7; 32]), ConfirmationSource::Token);
            let (id, at) = (Uuid::now_v7(), event.time);
            let outcome = SignUpEvent::confirmed(id, at, event, "object-1", source, &key);
            assert!(store.settle(&outcome, at).await?);
        }
    }
    Ok(())
}

pub(crate) async fn in_whatever_order_news_come_the_same_roles_are_held(
    home: &Home,
) -> anyhow::Result<()> {
    use Accounts::{Awaited, FirstConfirmed, Unknown};
    use News::{CameToNothing, Earned};
    let store = home.store().await?;
    let mut people = 0;
    // Which sign-up `buyer` and `guest` are held because of in the end.
    for (accounts, news, buyer, guest) in [
        (Unknown, &[Earned(1), CameToNothing(1), Earned(2)][..], None, Some(2)),
        (Unknown, &[Earned(1), Earned(2), CameToNothing(2)], Some(1), Some(1)),
        (Unknown, &[Earned(1), Earned(2), CameToNothing(1), CameToNothing(2)], None, None),
        (Unknown, &[Earned(1), Earned(2), Earned(3), CameToNothing(3)], Some(1), Some(2)),
        (Awaited, &[Earned(1), Earned(2), CameToNothing(2)], None, None),
        (FirstConfirmed, &[Earned(1), Earned(2), CameToNothing(2)], Some(1), Some(1)),
        (FirstConfirmed, &[Earned(1), Earned(2), Earned(3), CameToNothing(3)], Some(1), Some(1)),
    ] {
        for order in orders(news) {
            people += 1;
            let name = format!("person{people}");
            // Everybody's events have numbers of their own.
            let event = |number| event(100 * people + number, &name);
            let sign_ups = [1, 2, 3].map(event);
            await_accounts(&store, accounts, &sign_ups).await?;
            let sign_up = |number: u32| &sign_ups[number as usize - 1];
            for (place, news) in order.iter().enumerate() {
                // Each comes at least once, and long after all of it happened.
                for _ in 0..=place % 2 {
                    match *news {
                        Earned(number) => {
                            let roles = [role("guest"), role("buyer")];
                            let roles = if number == 1 { &roles[..] } else { &roles[..1] };
                            grant(&store, sign_up(number), roles).await?;
                        }
                        CameToNothing(number) => {
                            let (origin, over) = (sign_up(number).id, event(40 + number));
                            let now = over.time;
                            store.revoke_grants_of(WORKER, &over, origin, BY_GRACE, now).await?;
                        }
                    }
                }
            }

            let holder = |number: Option<u32>| number.map(|it| sign_up(it).id);
            let person = &sign_ups[0].person;
            let grants = store.grants_of(person).await?;
            let held = |role: &str| {
                let grant = grants.iter().find(|it| it.role == role && it.is_in_force(NOW));
                grant.map(|it| it.event_id)
            };
            let found = (held("buyer"), held("guest"));
            assert_eq!(found, (holder(buyer), holder(guest)), "{accounts:?} {order:?}");
            let one = GrantTargetFilter { person: Some(person.clone()), ..all() };
            for row in store.grant_targets(&one).await? {
                let wanted =
                    if held(&row.role).is_some() { Wanted::Present } else { Wanted::Absent };
                assert_eq!(row.wanted, wanted, "{accounts:?} {order:?} {row:?}");
                assert!(wanted == Wanted::Present || row.due_at.is_some(), "{order:?} {row:?}");
                assert!(held(&row.role).is_none_or(|it| it == row.event_id), "{order:?} {row:?}");
            }
        }
    }
    Ok(())
}

pub(crate) async fn what_is_held_because_of_an_older_event_again_is_held_as_that_said(
    home: &Home,
) -> anyhow::Result<()> {
    let store = home.store().await?;
    let until = |seconds| [NewGrant { expires_at: Some(time_of(seconds)), ..role("guest") }];
    let (first, second) = (event(1, "ada"), event(2, "ada"));
    grant(&store, &first, &until(30)).await?;
    grant(&store, &second, &until(60)).await?;
    apply_all(&store, &first.person).await?;
    let over = event(20, "ada");
    store.revoke_grants_of(WORKER, &over, second.id, BY_GRACE, time_of(20)).await?;

    let granted = store.grants_of(&first.person).await?.remove(0);
    assert_eq!((granted.event_id, granted.expires_at), (first.id, Some(time_of(30))));
    let row = rows(&store).await?.remove(0);
    assert_eq!(
        (row.is_pending, row.expires_at),
        (false, Some(time_of(30))),
        "nothing is to be done"
    );
    assert_eq!(store.expire_grant_targets(time_of(30)).await?, 1);

    // One that was over meanwhile, and one that nobody had carried through yet.
    let (first, second) = (event(3, "bob"), event(4, "bob"));
    grant(&store, &first, &until(30)).await?;
    grant(&store, &second, &until(60)).await?;
    let over = event(40, "bob");
    store.revoke_grants_of(WORKER, &over, second.id, BY_GRACE, time_of(40)).await?;
    let due = store.due_grant_targets("entra", time_of(40), 10).await?;
    let wanted: Vec<_> = due.iter().map(|it| (it.event_id, it.wanted)).collect();
    assert!(wanted.contains(&(first.id, Wanted::Absent)), "{wanted:?}");

    // What somebody revoked comes back by nothing that happened before.
    let (first, second) = (event(5, "eve"), event(7, "eve"));
    grant(&store, &first, &[role("guest")]).await?;
    store.revoke_grants(&first.person, None, BY_GRACE, time_of(6)).await?;
    grant(&store, &second, &[role("guest")]).await?;
    assert!(store.grants_of(&first.person).await?[0].is_in_force(NOW));
    let between = event(6, "eve");
    grant(&store, &between, &[role("guest")]).await?;
    let over = event(50, "eve");
    store.revoke_grants_of(WORKER, &over, second.id, BY_GRACE, time_of(50)).await?;
    let granted = store.grants_of(&first.person).await?.remove(0);
    assert_eq!(granted.revoked_at, Some(time_of(50)));
    assert!(!granted.is_in_force(NOW));
    Ok(())
}

pub(crate) async fn a_role_is_wanted_anew_for_another_account(home: &Home) -> anyhow::Result<()> {
    let store = home.store().await?;
    let with_account = |number, object_id: &str| {
        let mut event = event(number, "ada");
        event.sign_up.object_id = Some(object_id.to_owned());
        event
    };
    let event = event(1, "ada");
    grant(&store, &event, &[role("guest")]).await?;
    apply_all(&store, &event.person).await?;

    grant(&store, &with_account(2, "account"), &[role("guest")]).await?;
    assert!(!rows(&store).await?[0].is_pending, "that is the one which was found");
    let another = with_account(3, "another");
    grant(&store, &another, &[role("guest")]).await?;
    let row = store.pending_by_event(&event.person).await?.remove(0);
    assert_eq!((row.object_id.as_deref(), &row.seen), (Some("another"), &Seen::default()));

    // Whoever had it in hand when the news came says nothing of this account.
    let claimed = store.claim_grant_target(&row, NOW, LEASE).await?.expect("it is free");
    grant(&store, &with_account(4, "third"), &[role("guest")]).await?;
    let seen = Seen { account: Some("another".into()), membership: None };
    store.grant_target_applied(&claimed, &seen, NOW).await?;
    let row = store.pending_by_event(&event.person).await?.remove(0);
    assert_eq!((row.object_id.as_deref(), &row.seen), (Some("third"), &Seen::default()));
    let claimed = store.claim_grant_target(&row, NOW, LEASE).await?.expect("it was let go of");
    grant(&store, &with_account(5, "fourth"), &[role("guest")]).await?;
    store.grant_target_failed(&claimed, &seen, "down", NOW).await?;
    assert_eq!(rows(&store).await?[0].seen, Seen::default());
    Ok(())
}

pub(crate) async fn a_repair_is_due_at_once(home: &Home) -> anyhow::Result<()> {
    let store = home.store().await?;
    let event = event(1, "ada");
    grant(&store, &event, &[role("guest")]).await?;
    apply_all(&store, &event.person).await?;
    let granted = store.grants_of(&event.person).await?.remove(0);
    store.record_sign_up("database", &event, NOW).await?;
    let before = rows(&store).await?.remove(0);
    let repair = async |target, wanted, before| {
        store.repair_grant_target(&granted, target, wanted, before, time_of(5)).await
    };

    let row = repair("entra", Wanted::Present, Some(&before)).await?.expect("it was as before");
    assert!(row.is_pending && row.seen.account.is_some());
    assert_eq!(repair("entra", Wanted::Present, Some(&before)).await?, None, "it has changed");
    let new = repair("scim", Wanted::Present, None).await?.expect("there was none");
    assert_eq!((new.event_id, &new.email), (event.id, &event.sign_up.email));
    assert_eq!(repair("scim", Wanted::Present, None).await?, None, "somebody was faster");
    assert_eq!(due(&store, time_of(5)).await?.len(), 2);
    Ok(())
}

pub(crate) async fn rows_and_grants_come_page_by_page(home: &Home) -> anyhow::Result<()> {
    let store = home.store().await?;
    for number in 1..=5 {
        let event = event(number, &format!("person{number}"));
        grant(&store, &event, &[role("buyer"), role("guest")]).await?;
    }
    let mut filter = GrantTargetFilter { limit: 4, ..GrantTargetFilter::default() };
    let mut seen = Vec::new();
    loop {
        let page = store.grant_targets(&filter).await?;
        let Some(last) = page.last() else { break };
        filter.after = Some((last.person.clone(), last.role.clone(), last.target.clone()));
        seen.extend(page);
    }
    assert_eq!(seen, rows(&store).await?);
    assert_eq!(seen.len(), 15);
    let mut filter = GrantFilter { limit: 3, ..GrantFilter::default() };
    let mut count = 0;
    loop {
        let page = store.grants(&filter).await?;
        let Some(last) = page.last() else { break };
        filter.after = Some((last.person.clone(), last.role.clone()));
        count += page.len();
    }
    assert_eq!(count, 10);
    let filter = GrantFilter { role: Some("buyer".into()), limit: 100, ..GrantFilter::default() };
    assert_eq!(store.grants(&filter).await?.len(), 5);
    let pending = GrantTargetFilter { pending: true, limit: 100, ..GrantTargetFilter::default() };
    apply(&store, &seen[0]).await?;
    assert_eq!(store.grant_targets(&pending).await?.len(), 14);
    Ok(())
}

pub(crate) async fn a_grant_interrupted_anywhere_is_wanted_at_all_targets_or_none(
    home: &Home,
) -> anyhow::Result<()> {
    let store = home.store().await?;
    for points in 0..1000 {
        let event = event(points + 1, &format!("person{points}"));
        let grants = [role("buyer"), role("guest")];
        let ended = given_up_after(points, grant(&store, &event, &grants)).await;
        // A commit that nobody waited for may yet come, between our reads even.
        eventually(Duration::from_secs(20), "it is wanted everywhere or nowhere", async || {
            let is_granted = store.grants_of(&event.person).await?.len();
            let is_wanted = store.pending_by_event(&event.person).await?.len();
            anyhow::Ok(matches!((is_granted, is_wanted), (0, 0) | (2, 3)))
        })
        .await?;
        if ended.is_none() {
            grant(&store, &event, &grants).await?;
        }
        assert_eq!(store.pending_by_event(&event.person).await?.len(), 3);
        if ended.is_some() {
            return Ok(());
        }
    }
    anyhow::bail!("it never ends")
}

#[tokio::test]
async fn what_is_pending_is_counted_without_reading_what_is_not() -> anyhow::Result<()> {
    let home = Home::sqlite()?;
    let store = home.store().await?;
    grant(&store, &event(1, "ada"), &[role("buyer")]).await?;
    assert_eq!(store.grant_targets_pending().await?, 2);

    let Home::Sqlite(directory) = &home else { anyhow::bail!("a file was asked for") };
    let url = format!("sqlite://{}", file_in(directory).display());
    let mut operator = sqlx::SqliteConnection::connect(&url).await?;
    let plan = "EXPLAIN QUERY PLAN SELECT count(*) FROM grant_targets WHERE state = 'pending'";
    let (_, _, _, step): (i64, i64, i64, String) =
        sqlx::query_as(plan).fetch_one(&mut operator).await?;

    assert!(step.contains("INDEX grant_targets_pending"), "{step}");
    operator.close().await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn roles_are_locked_in_one_order_whatever_order_the_database_has() -> anyhow::Result<()> {
    let home = Home::postgres().await?;
    let store = home.store().await?;
    // To this order, and not to that of the bytes, `a` comes before `B`.
    home.execute(r#"ALTER TABLE grants ALTER COLUMN role TYPE text COLLATE "und-x-icu""#).await?;
    let Home::Postgres(server) = &home else { anyhow::bail!("a server was asked for") };
    let event = event(1, "ada");
    grant(&store, &event, &[role("a"), role("B")]).await?;
    let mut holder = sqlx::PgConnection::connect(&server.url()).await?;
    let mut held = holder.begin().await?;
    sqlx::raw_sql("SELECT FROM grants WHERE role = 'a' FOR UPDATE").execute(&mut *held).await?;

    let (revoking, person) = (store.clone(), event.person.clone());
    let revoking =
        tokio::spawn(
            async move { revoking.revoke_grants(&person, None, BY_GRACE, time_of(5)).await },
        );
    let mut other = sqlx::PgConnection::connect(&server.url()).await?;
    eventually(Duration::from_secs(20), "the first role is in hand", async || {
        let first = "SELECT role FROM grants WHERE role = 'B' FOR UPDATE SKIP LOCKED";
        let free = sqlx::query(first).fetch_optional(&mut other).await?;
        anyhow::Ok(free.is_none())
    })
    .await?;

    held.rollback().await?;
    assert_eq!(revoking.await??, ["B", "a"]);
    Ok(())
}
