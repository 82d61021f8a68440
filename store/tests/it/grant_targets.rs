//! What targets are to hold of what was granted, on both dialects.

use std::time::Duration;

use tokio::task::JoinSet;
use vestibule_events::{Person, SignUpEvent};
use vestibule_store::{
    Done, Grant, GrantFilter, GrantTarget, GrantTargetFilter, NewGrant, Revocation, Seen, Store,
    Wanted,
};

use crate::home::{Home, NOW, event, given_up_after, time_of};

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
    let all = GrantTargetFilter { limit: 1000, ..GrantTargetFilter::default() };
    Ok(store.grant_targets(&all).await?)
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
    assert!(store.due_grant_targets(&["entra".into()], time_of(999), 10).await?.is_empty());
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
    let due = store.due_grant_targets(&["entra".into(), "erp".into()], time_of(6), 10).await?;
    assert_eq!(due.len(), 4);
    assert!(due.iter().all(|it| it.wanted == Wanted::Absent));
    assert_eq!(store.due_grant_targets(&["erp".into()], time_of(6), 10).await?.len(), 1);
    assert!(store.pending_by_event(&event.person).await?.is_empty(), "no event carries them");
    for grant in store.grants_of(&event.person).await? {
        let Grant { revoked_by, revoke_reason, .. } = &grant;
        let said = (revoked_by.as_deref(), revoke_reason.as_deref());
        assert_eq!(said, (Some("grace"), Some("left us")));
        assert!(!grant.is_in_force(time_of(7)));
    }

    let claimed = store.claim_grant_target(&due[0], time_of(6), LEASE).await?.expect("it is free");
    store.grant_target_failed(&claimed, &Seen::default(), "down", time_of(60)).await?;
    let names = ["entra".into(), "erp".into()];
    assert_eq!(store.due_grant_targets(&names, time_of(59), 10).await?.len(), 3);
    assert_eq!(store.due_grant_targets(&names, time_of(60), 10).await?.len(), 4);

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
    let due = store.due_grant_targets(&["entra".into(), "erp".into()], time_of(10), 10).await?;
    let roles: Vec<_> = due.iter().map(|it| (it.role.as_str(), it.wanted)).collect();
    assert_eq!(roles, [("buyer", Wanted::Absent); 2]);

    // Handled when it was over already: it is seen to that nothing is left of it.
    let late = crate::home::event(2, "bob");
    let grants = [NewGrant { expires_at: Some(NOW), ..role("guest") }];
    grant(&store, &late, &grants).await?;
    let pending = store.pending_by_event(&late.person).await?;
    assert_eq!(pending[0].wanted, Wanted::Absent);
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
    let pending = store.pending_by_event(&first.person).await?;
    let absent = pending.iter().filter(|it| it.wanted == Wanted::Absent).count();
    assert_eq!((pending.len(), absent), (3, 2), "the event carries that through");

    // News of the end overtook those of the beginning.
    let (begun, over) = (event(6, "bob"), event(7, "bob"));
    revoke(&over, begun.id).await?;
    assert_eq!(grant(&store, &begun, &[role("guest")]).await?, Done::Before);
    assert_eq!(store.grants_of(&begun.person).await?, []);
    let effects = store.effects(&[begun.id, over.id]).await?;
    assert!(effects.values().all(|it| it.grant_sets == 1), "{effects:?}");
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
    let names = ["entra".into(), "scim".into()];
    assert_eq!(store.due_grant_targets(&names, time_of(5), 10).await?.len(), 2);
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
        let is_granted = store.grants_of(&event.person).await?.len();
        let is_wanted = store.pending_by_event(&event.person).await?.len();
        assert!(matches!((is_granted, is_wanted), (0, 0) | (2, 3)), "{is_granted} {is_wanted}");
        if ended.is_some() {
            assert_eq!(is_wanted, 3);
            return Ok(());
        }
        grant(&store, &event, &grants).await?;
        assert_eq!(store.pending_by_event(&event.person).await?.len(), 3);
    }
    anyhow::bail!("it never ends")
}
