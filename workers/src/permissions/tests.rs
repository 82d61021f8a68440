//! The worker against a stand-in for Graph, a SCIM server and databases.

use std::{collections::BTreeMap, future::poll_fn, pin::pin, task::Poll};

use proptest::prelude::*;
use secrecy::SecretString;
use serde_json::{Value, json};
use sqlx::{Connection, Row as _};
use uuid::Uuid;
use vestibule_events::{Email, PseudonymKey, SignUpEvent};
use vestibule_store::{GrantTargetFilter, NewGrant, Wanted};
use vestibule_testkit::{Graph, GraphCall, GraphFault, Postgres, Scim};

use super::*;
use crate::{
    GraphSettings,
    testing::{Stage, approved, graph_settings, settings, sign_up, task},
};

const LIMIT: Duration = Duration::from_secs(20);
const GROUP: &str = "group-1";
const APPLICATION: &str = "application-1";
const APP_ROLE: &str = "role-1";

fn everybody(role: &str) -> GrantRule {
    GrantRule {
        name: "everybody".into(),
        when: "true".into(),
        role: role.into(),
        expires_after: None,
    }
}

fn target(name: &str, kind: TargetKind, there: &str) -> TargetSettings {
    let roles = BTreeMap::from([("guest".to_owned(), there.to_owned())]);
    TargetSettings { name: name.into(), kind, roles }
}

fn group(server: &Graph) -> TargetSettings {
    server.add_group(GROUP);
    target("entra", TargetKind::GraphGroup(graph_settings(server)), GROUP)
}

fn worker(stage: &Stage, rules: Vec<GrantRule>, targets: Vec<TargetSettings>) -> Permissions {
    let store = stage.store.clone();
    let targets = PermissionTargets::new(targets, store.clone(), LIMIT).unwrap();
    // However slow the machine is, a sweep ends for a reason of its own.
    let targets = targets.without_lease().sweeping_for(Duration::from_secs(3600));
    Permissions::new(PermissionsSettings { rules }, targets, store).unwrap()
}

fn guest_worker(stage: &Stage, targets: Vec<TargetSettings>) -> Permissions {
    worker(stage, vec![everybody("guest")], targets)
}

/// The sign-up of somebody of whom nothing but the address is known.
fn by_address(person: &str) -> SignUpEvent {
    let mut event = sign_up(person);
    event.sign_up.object_id = None;
    event.sign_up.identities.clear();
    event
}

/// What says that a sign-up came to nothing.
fn given_up(origin: &SignUpEvent) -> SignUpEvent {
    let key = PseudonymKey::new(vec![1; 32]);
    SignUpEvent::given_up(Uuid::now_v7(), OffsetDateTime::now_utc(), origin, &key)
}

fn address(event: &SignUpEvent) -> &str {
    event.sign_up.email.as_ref().map(Email::expose).unwrap()
}

fn account(server: &Graph, event: &SignUpEvent) -> String {
    server.add_user(&json!({ "mail": address(event) }))
}

async fn handle(worker: &Permissions, event: &SignUpEvent) -> Result<(), HandleError> {
    worker.handle(&task(event.clone())).await
}

/// Whether it may pass, why, and what is said.
fn fate(outcome: Result<(), HandleError>) -> (bool, Cause, Option<Duration>, String) {
    match outcome.unwrap_err() {
        HandleError::Retry { source, cause, after } => (true, cause, after, format!("{source:#}")),
        HandleError::Park { source, cause } => (false, cause, None, format!("{source:#}")),
        HandleError::StoreUnavailable(error) => panic!("{error:#}"),
    }
}

async fn differences(worker: &Permissions) -> anyhow::Result<Vec<(Wanted, Actual)>> {
    let comparison = worker.targets.compare(None).await?;
    assert!(comparison.unreadable.is_empty(), "{comparison:?}");
    Ok(comparison.differences.iter().map(|it| (it.wanted, it.actual)).collect())
}

async fn revoke(stage: &Stage, event: &SignUpEvent) -> anyhow::Result<()> {
    let by_grace = Revocation { by: "grace", reason: "left us" };
    let now = OffsetDateTime::now_utc();
    let roles = stage.store.revoke_grants(&event.person, None, by_grace, now).await?;
    assert_eq!(roles, ["guest"]);
    Ok(())
}

#[tokio::test]
async fn only_a_yes_earns_roles_whatever_events_come() -> anyhow::Result<()> {
    let stage = Stage::open().await?;
    let worker = guest_worker(&stage, vec![]);
    let roles = async |event: SignUpEvent| {
        handle(&worker, &event).await?;
        anyhow::Ok(stage.store.grants_of(&event.person).await?.len())
    };

    for kind in Kind::ALL {
        let mut event = sign_up(kind.as_str());
        event.kind = kind;
        assert_eq!(roles(event).await?, usize::from(may_earn(kind)), "{kind}");
    }
    assert_eq!(roles(approved("ada")).await?, 1);
    for kind in Permissions::KINDS {
        assert!(may_earn(*kind) || *kind == Kind::Abandoned, "{kind}");
    }
    Ok(())
}

#[tokio::test]
async fn a_group_has_a_member_once_however_often_the_event_comes() -> anyhow::Result<()> {
    let (stage, server) = (Stage::open().await?, Graph::start().await?);
    let worker = guest_worker(&stage, vec![group(&server)]);
    let event = by_address("ada");
    let account = account(&server, &event);

    for _ in 0..20 {
        handle(&worker, &event).await?;
    }

    assert_eq!(server.members(GROUP), [account.as_str()]);
    assert_eq!(server.requests_of(GraphCall::AddMember).len(), 1);
    assert_eq!(differences(&worker).await?, []);
    // Somebody who is in already, by whatever way.
    let other = by_address("bob");
    let there = self::account(&server, &other);
    server.set_member(GROUP, &there, true);
    handle(&worker, &other).await?;
    assert_eq!(server.members(GROUP), [account, there]);
    Ok(())
}

#[tokio::test]
async fn an_event_is_dealt_with_once_the_targets_hold_what_it_wants() -> anyhow::Result<()> {
    let (stage, server) = (Stage::open().await?, Graph::start().await?);
    let event = by_address("ada");
    account(&server, &event);
    server.plan(GraphCall::AddMember, GraphFault::Status(503));
    server.plan(GraphCall::AddMember, GraphFault::Status(400));
    stage.append(event.clone()).await?;

    let worker = guest_worker(&stage, vec![group(&server)]);
    let running = stage.start(worker, settings(5));
    stage.idle(Permissions::NAME).await?;

    let attempts = stage.store.attempts_of(event.id).await?;
    let causes: Vec<_> = attempts.iter().map(|it| it.cause_class.as_str()).collect();
    assert_eq!(causes, ["unavailable", "refused"]);
    let aside = stage.store.set_aside(Permissions::NAME).await?;
    assert_eq!((aside.parked, server.members(GROUP).len()), (1, 0));
    assert!(!stage.store.is_done(Permissions::NAME, event.id).await?);
    running.stop().await
}

#[tokio::test]
async fn an_account_is_waited_for_and_found_by_what_is_known() -> anyhow::Result<()> {
    let (stage, server) = (Stage::open().await?, Graph::start().await?);
    let worker = guest_worker(&stage, vec![group(&server)]);
    let event = by_address("ada");

    let (may_pass, cause, _, text) = fate(handle(&worker, &event).await);
    assert_eq!((may_pass, cause), (true, Cause::NotYet));
    assert!(text.contains("target `entra`") && !text.contains("ada"), "{text}");
    server.hide_from(1);
    // In the directory, and not to be seen where we look first, nor where we write.
    let hidden = json!({
        "mail": address(&event), "userPrincipalName": format!("x@{}", Graph::TENANT),
        "displayName": "Ada", "accountEnabled": true,
    });
    let token = graph_client(&server).create_user(&hidden).await?;
    assert_eq!(fate(handle(&worker, &event).await).1, Cause::NotYet);
    handle(&worker, &event).await?;
    assert_eq!(server.members(GROUP), [token]);

    // An id that came with the event needs no search.
    server.hide_from(0);
    let mut known = by_address("bob");
    known.sign_up.object_id = Some(server.add_user(&json!({ "mail": "other@example.com" })));
    let before = server.requests_of(GraphCall::FindUser).len();
    handle(&worker, &known).await?;
    assert_eq!(server.requests_of(GraphCall::FindUser).len(), before);
    assert_eq!(server.members(GROUP).len(), 2);

    // Two of one address: whose role is it?
    let twin = by_address("eve");
    for _ in 0..2 {
        self::account(&server, &twin);
    }
    let (may_pass, _, _, text) = fate(handle(&worker, &twin).await);
    assert!(!may_pass && text.contains("several accounts"), "{text}");
    Ok(())
}

fn graph_client(server: &Graph) -> crate::graph::Graph {
    crate::graph::Graph::new(&graph_settings(server), &mut Vec::new()).unwrap()
}

#[tokio::test]
async fn what_graph_says_decides_what_becomes_of_the_event() -> anyhow::Result<()> {
    let (stage, server) = (Stage::open().await?, Graph::start().await?);
    let worker = guest_worker(&stage, vec![group(&server)]);
    let event = by_address("ada");
    account(&server, &event);

    for (fault, expected) in [
        (GraphFault::Throttle(Some("7")), (true, Cause::Throttled, Some(7))),
        (GraphFault::Throttle(None), (true, Cause::Throttled, None)),
        (GraphFault::Busy("3"), (true, Cause::Unavailable, Some(3))),
        (GraphFault::Status(404), (true, Cause::NotYet, None)),
        (GraphFault::Status(403), (true, Cause::NotPermitted, None)),
        (GraphFault::Status(400), (false, Cause::Refused, None)),
    ] {
        server.plan(GraphCall::AddMember, fault.clone());
        let (may_pass, cause, after, text) = fate(handle(&worker, &event).await);
        assert_eq!((may_pass, cause, after.map(|it| it.as_secs())), expected, "{fault:?}: {text}");
        assert!(!text.contains("ada"), "{text}");
    }
    assert_eq!(stage.store.pending_by_event(&event.person).await?[0].tries, 6);
    server.plan(GraphCall::AddMember, GraphFault::FloodAnswer);
    handle(&worker, &event).await?;
    assert_eq!(server.members(GROUP).len(), 1);
    Ok(())
}

#[tokio::test]
async fn what_is_revoked_expires_or_came_to_nothing_is_taken_away() -> anyhow::Result<()> {
    let (stage, server) = (Stage::open().await?, Graph::start().await?);
    let worker = guest_worker(&stage, vec![group(&server)]);
    let (ada, bob) = (by_address("ada"), by_address("bob"));
    for event in [&ada, &bob] {
        account(&server, event);
        handle(&worker, event).await?;
    }
    assert_eq!(server.members(GROUP).len(), 2);

    revoke(&stage, &ada).await?;
    assert_eq!(differences(&worker).await?, [(Wanted::Absent, Actual::Present)]);
    server.plan(GraphCall::RemoveMember, GraphFault::Busy("1"));
    assert_eq!(worker.targets.sweep().await?, 1);
    assert_eq!(worker.targets.sweep().await?, 0, "it rests after the failure");
    handle(&worker, &ada).await?;
    assert_eq!(server.members(GROUP).len(), 2, "it is not the event's any more");
    let comparison = worker.targets.compare(None).await?;
    worker.targets.repair(&comparison.differences[0]).await?;
    assert_eq!(server.members(GROUP).len(), 1);

    // Nothing waits for the target but the target itself.
    server.plan(GraphCall::RemoveMember, GraphFault::Status(400));
    let over = given_up(&bob);
    handle(&worker, &over).await?;
    assert!(stage.store.is_done(Permissions::NAME, over.id).await?);
    vestibule_testkit::eventually(crate::testing::LIMIT, "it is taken away", async || {
        worker.targets.sweep().await?;
        anyhow::Ok(server.members(GROUP).is_empty())
    })
    .await?;
    handle(&worker, &bob).await?;
    assert_eq!(server.members(GROUP).len(), 0, "late news of the beginning change nothing");

    let short = GrantRule { expires_after: Some(Duration::from_millis(1)), ..everybody("guest") };
    let worker = self::worker(&stage, vec![short], vec![group(&server)]);
    let mut eve = by_address("eve");
    eve.time = OffsetDateTime::now_utc() + Duration::from_secs(1);
    account(&server, &eve);
    handle(&worker, &eve).await?;
    assert_eq!(server.members(GROUP).len(), 1);
    vestibule_testkit::eventually(crate::testing::LIMIT, "it has expired", async || {
        worker.targets.sweep().await?;
        anyhow::Ok(server.members(GROUP).is_empty())
    })
    .await?;
    assert_eq!(differences(&worker).await?, []);
    Ok(())
}

#[tokio::test]
async fn an_account_made_anew_is_given_what_the_one_before_had() -> anyhow::Result<()> {
    let (stage, server) = (Stage::open().await?, Graph::start().await?);
    let kind = TargetKind::GraphAppRole {
        graph: graph_settings(&server),
        resource: APPLICATION.to_owned(),
    };
    let targets = vec![group(&server), target("shop", kind, APP_ROLE)];
    let worker = guest_worker(&stage, targets);
    let event = by_address("ada");
    let first = account(&server, &event);
    handle(&worker, &event).await?;
    let holders = || {
        let assigned = server.assignments().into_iter().map(|it| it["principalId"].clone());
        (server.members(GROUP), Vec::from_iter(assigned))
    };
    assert_eq!(holders(), (vec![first.clone()], vec![Value::from(&*first)]));

    // An event tells of another account.
    let mut known = by_address("ada");
    let second = server.add_user(&json!({ "mail": "other@example.com" }));
    known.sign_up.object_id = Some(second.clone());
    handle(&worker, &known).await?;
    assert!(server.members(GROUP).contains(&second));
    assert_eq!(server.assignments().len(), 2);

    // And one that nothing told of.
    server.remove_user(&first);
    server.remove_user(&second);
    let third = account(&server, &event);
    for difference in worker.targets.compare(None).await?.differences {
        worker.targets.repair(&difference).await?;
    }
    assert_eq!(holders(), (vec![third.clone()], vec![Value::from(&*third)]));
    assert_eq!(differences(&worker).await?, []);
    revoke(&stage, &event).await?;
    worker.targets.sweep().await?;
    assert_eq!(holders(), (vec![], vec![]));
    Ok(())
}

#[tokio::test]
async fn an_account_that_is_still_there_is_not_given_up_for_another() -> anyhow::Result<()> {
    let (stage, server) = (Stage::open().await?, Graph::start().await?);
    let kind = TargetKind::GraphAppRole {
        graph: graph_settings(&server),
        resource: APPLICATION.to_owned(),
    };
    let targets = vec![group(&server), target("shop", kind, APP_ROLE)];
    let worker = guest_worker(&stage, targets);
    let event = by_address("ada");
    let mut known = event.clone();
    let first = server.add_user(&json!({ "mail": "before@example.com" }));
    known.sign_up.object_id = Some(first.clone());
    handle(&worker, &known).await?;
    server.set_member(GROUP, &first, false);
    let comparison = worker.targets.compare(None).await?;

    // Whom a search shows by now is somebody else; what is not there is not the account.
    account(&server, &event);
    server.plan(GraphCall::AddMember, GraphFault::Status(404));
    let (_, cause, ..) = fate(worker.targets.repair(&comparison.differences[0]).await);
    assert_eq!(cause, Cause::NotYet);
    assert_eq!(server.members(GROUP), Vec::<String>::new());
    // Nor is it when nobody can tell.
    let comparison = worker.targets.compare(None).await?;
    server.plan(GraphCall::AddMember, GraphFault::Status(404));
    server.plan(GraphCall::ReadUser, GraphFault::Status(503));
    let (_, cause, ..) = fate(worker.targets.repair(&comparison.differences[0]).await);
    assert_eq!(cause, Cause::Unavailable);

    server.set_member(GROUP, &first, true);
    revoke(&stage, &event).await?;
    server.plan(GraphCall::RemoveAssignment, GraphFault::Status(400));
    worker.targets.sweep().await?;
    assert_eq!(server.members(GROUP), Vec::<String>::new());
    // What is to be taken is still known after a failure.
    let rows = stage.store.grant_targets(&all()).await?;
    let seen: Vec<_> = rows.iter().map(|it| it.seen.account.as_deref()).collect();
    assert_eq!(seen, [Some(&*first); 2]);
    assert!(rows[1].is_pending && rows[1].seen.membership.is_some());
    Ok(())
}

fn all() -> GrantTargetFilter {
    GrantTargetFilter { limit: 1000, ..GrantTargetFilter::default() }
}

#[tokio::test]
async fn an_account_that_is_not_to_be_seen_yet_is_not_taken_for_an_older_one() -> anyhow::Result<()>
{
    let (stage, server) = (Stage::open().await?, Graph::start().await?);
    let worker = guest_worker(&stage, vec![group(&server)]);
    let mut event = by_address("ada");
    account(&server, &event);
    event.sign_up.object_id = Some("not-replicated-yet".to_owned());

    for _ in 0..3 {
        assert_eq!(fate(handle(&worker, &event).await).1, Cause::NotYet);
    }
    assert_eq!(server.members(GROUP), Vec::<String>::new());
    Ok(())
}

#[tokio::test]
async fn what_the_configuration_does_not_name_any_more_keeps_nothing_waiting() -> anyhow::Result<()>
{
    let (stage, server) = (Stage::open().await?, Graph::start().await?);
    let worker = guest_worker(&stage, vec![group(&server)]);
    let former = [NewGrant { role: "former".into(), reason: "r".into(), expires_at: None }];
    let by_grace = Revocation { by: "grace", reason: "left us" };
    let now = OffsetDateTime::now_utc();
    let mut people = Vec::new();
    for number in 0..60 {
        let event = by_address(&format!("person{number}"));
        let at_entra = |_: &str| vec!["entra".to_owned()];
        stage.store.grant_at(Permissions::NAME, &event, &former, at_entra, now).await?;
        stage.store.revoke_grants(&event.person, None, by_grace, now).await?;
        people.push(event.person);
    }
    let ada = by_address("ada");
    account(&server, &ada);
    handle(&worker, &ada).await?;
    revoke(&stage, &ada).await?;

    assert_eq!(worker.targets.sweep().await?, 1);

    assert_eq!(server.members(GROUP), Vec::<String>::new());
    let later = OffsetDateTime::now_utc() + Duration::from_secs(30 * 60);
    assert_eq!(stage.store.due_grant_targets("entra", later, 100).await?, []);
    let later = later + Duration::from_secs(60 * 60);
    let due = stage.store.due_grant_targets("entra", later, 100).await?;
    assert_eq!(due.len(), people.len());
    let error = due[0].error.as_deref().unwrap_or_default();
    assert!(error.contains("`roles`") && error.contains("`entra`"), "{error}");
    Ok(())
}

#[tokio::test]
async fn a_target_that_hangs_is_asked_once_and_holds_up_no_other() -> anyhow::Result<()> {
    let stage = Stage::open().await?;
    let (hanging, server) = (Graph::start().await?, Graph::start().await?);
    let both = |timeout| {
        let graph = GraphSettings { timeout, ..graph_settings(&hanging) };
        hanging.add_group(GROUP);
        vec![target("hangs", TargetKind::GraphGroup(graph), GROUP), group(&server)]
    };
    let people = ["ada", "bob", "eve"].map(by_address);
    let worker = guest_worker(&stage, both(GraphSettings::TIMEOUT));
    for event in &people {
        account(&hanging, event);
        account(&server, event);
        handle(&worker, event).await?;
        revoke(&stage, event).await?;
    }
    for _ in 0..people.len() {
        hanging.plan(GraphCall::RemoveMember, GraphFault::Hang);
    }

    // Neither answers nor ends, however long that takes.
    let store = stage.store.clone();
    let patient = Duration::from_secs(3600);
    let targets = PermissionTargets::new(both(patient), store, patient).unwrap().without_lease();
    let sweep = tokio::spawn(async move { targets.sweep().await });
    vestibule_testkit::eventually(crate::testing::LIMIT, "the other one is done", async || {
        let due = stage.store.due_grant_targets("entra", OffsetDateTime::now_utc(), 10).await?;
        let asked = hanging.requests_of(GraphCall::RemoveMember).len();
        anyhow::Ok(due.is_empty() && asked == 1)
    })
    .await?;
    assert_eq!(server.members(GROUP), Vec::<String>::new());
    assert!(!sweep.is_finished());
    sweep.abort();

    // It answers that it does not serve: nor would it serve the others.
    let worker = guest_worker(&stage, both(Duration::from_millis(500)));
    assert_eq!(worker.targets.sweep().await?, 1);
    assert!(hanging.requests_of(GraphCall::RemoveMember).len() <= 2);
    assert_eq!(hanging.members(GROUP).len(), people.len());
    Ok(())
}

/// So many people are to lose a role at the directory.
async fn revoked(stage: &Stage, server: &Graph, people: u32) -> anyhow::Result<()> {
    let now = OffsetDateTime::now_utc();
    for number in 0..people {
        let mut event = by_address(&format!("person{number}"));
        event.sign_up.object_id = Some(account(server, &event));
        let guest = [NewGrant { role: "guest".into(), reason: "r".into(), expires_at: None }];
        let at_entra = |_: &str| vec!["entra".to_owned()];
        stage.store.grant_at(Permissions::NAME, &event, &guest, at_entra, now).await?;
        revoke(stage, &event).await?;
    }
    Ok(())
}

#[tokio::test]
async fn a_target_whose_time_is_over_goes_on_in_the_next_sweep() -> anyhow::Result<()> {
    let (stage, server) = (Stage::open().await?, Graph::start().await?);
    let targets = PermissionTargets::new(vec![group(&server)], stage.store.clone(), LIMIT);
    let targets = targets.unwrap().sweeping_for(Duration::ZERO);
    revoked(&stage, &server, 3).await?;

    for _ in 0..3 {
        assert_eq!(targets.sweep().await?, 1);
    }
    assert_eq!(targets.sweep().await?, 0);
    Ok(())
}

#[tokio::test]
async fn a_target_that_lets_nobody_in_is_not_asked_for_everything_that_is_due() -> anyhow::Result<()>
{
    let (stage, server) = (Stage::open().await?, Graph::start().await?);
    let worker = guest_worker(&stage, vec![group(&server)]);
    revoked(&stage, &server, 60).await?;
    for _ in 0..60 {
        server.plan(GraphCall::RemoveMember, GraphFault::Status(403));
    }

    assert_eq!(worker.targets.sweep().await?, 50, "the first page and no more");
    assert_eq!(server.requests_of(GraphCall::RemoveMember).len(), 50);
    Ok(())
}

#[tokio::test]
async fn an_app_role_is_assigned_once_and_taken_however_it_was_assigned() -> anyhow::Result<()> {
    let (stage, server) = (Stage::open().await?, Graph::start().await?);
    server.page_by(1);
    let kind = TargetKind::GraphAppRole {
        graph: graph_settings(&server),
        resource: APPLICATION.to_owned(),
    };
    let worker = guest_worker(&stage, vec![target("shop", kind, APP_ROLE)]);
    let people: Vec<_> = ["ada", "bob", "eve"].map(by_address).into();
    for event in &people {
        account(&server, event);
        // It happens, and nobody hears of it.
        server.plan(GraphCall::AssignRole, GraphFault::FloodAnswer);
        assert_eq!(fate(handle(&worker, event).await).1, Cause::Unavailable);
        handle(&worker, event).await?;
        handle(&worker, event).await?;
    }
    assert_eq!(server.assignments().len(), 3);
    assert_eq!(server.assignments()[0]["appRoleId"], APP_ROLE);
    assert_eq!(differences(&worker).await?, [], "over several pages");

    for event in &people {
        revoke(&stage, event).await?;
    }
    assert_eq!(worker.targets.sweep().await?, 3);
    assert_eq!(server.assignments(), Vec::<Value>::new());
    Ok(())
}

fn scim(server: &Scim, group: &str) -> TargetSettings {
    let settings =
        ScimSettings { url: server.url(), token: Scim::TOKEN.into(), create_users: true };
    target("crm", TargetKind::Scim(settings), group)
}

#[tokio::test]
async fn a_scim_service_learns_of_a_person_once() -> anyhow::Result<()> {
    let (stage, mut server) = (Stage::open().await?, Scim::start().await?);
    let group = server.add_group("guests").await?;
    let worker = guest_worker(&stage, vec![scim(&server, &group)]);
    let event = by_address("o'neil\"x");

    // Each time it happens, and the answer says otherwise.
    server.hide_next("POST").await?;
    assert_eq!(fate(handle(&worker, &event).await).1, Cause::Unavailable);
    server.hide_next("PATCH").await?;
    assert_eq!(fate(handle(&worker, &event).await).1, Cause::Unavailable);
    for _ in 0..20 {
        handle(&worker, &event).await?;
    }

    assert_eq!(server.members(&group).await?, [address(&event)]);
    let users = server.users().await?;
    assert_eq!(users.len(), 1);
    assert_eq!(users[0]["externalId"], event.person.as_str());
    assert_eq!(differences(&worker).await?, []);

    server.empty_group(&group).await?;
    assert_eq!(differences(&worker).await?, [(Wanted::Present, Actual::Absent)]);
    let comparison = worker.targets.compare(Some(&event.person)).await?;
    worker.targets.repair(&comparison.differences[0]).await?;
    assert_eq!(server.members(&group).await?, [address(&event)]);

    revoke(&stage, &event).await?;
    worker.targets.sweep().await?;
    assert_eq!(server.members(&group).await?, Vec::<String>::new());
    Ok(())
}

#[tokio::test]
async fn a_user_made_anew_at_a_scim_service_is_given_what_the_one_before_had() -> anyhow::Result<()>
{
    let (stage, mut server) = (Stage::open().await?, Scim::start().await?);
    let group = server.add_group("guests").await?;
    let worker = guest_worker(&stage, vec![scim(&server, &group)]);
    let event = by_address("ada");
    handle(&worker, &event).await?;

    // What services say of a member whom they do not know.
    for status in [404, 400] {
        let [user] = &server.users().await?[..] else { panic!("there is one user") };
        let former = user["id"].as_str().unwrap().to_owned();
        server.empty_group(&group).await?;
        server.remove_user(&former).await?;
        let comparison = worker.targets.compare(None).await?;
        server.refuse_next("PATCH", status, None).await?;
        worker.targets.repair(&comparison.differences[0]).await?;

        assert_eq!(server.members(&group).await?, [address(&event)], "{status}");
        let [user] = &server.users().await?[..] else { panic!("there is one user") };
        assert_ne!(user["id"], *former);
        assert_eq!(differences(&worker).await?, []);
    }
    Ok(())
}

#[tokio::test]
async fn a_user_who_is_still_at_a_scim_service_is_not_forgotten_nor_made_twice()
-> anyhow::Result<()> {
    let (stage, mut server) = (Stage::open().await?, Scim::start().await?);
    let group = server.add_group("guests").await?;
    let worker = guest_worker(&stage, vec![scim(&server, &group)]);
    let event = by_address("ada");
    handle(&worker, &event).await?;
    let [user] = &server.users().await?[..] else { panic!("there is one user") };
    let id = user["id"].as_str().unwrap().to_owned();
    server.rename_user(&id, "married").await?;

    // It is the group that is not there, or takes nobody; or nobody can tell.
    for (patched, read, expected) in [
        (404, None, Cause::NotPermitted),
        (400, None, Cause::Refused),
        (400, Some(503), Cause::Unavailable),
    ] {
        server.empty_group(&group).await?;
        let comparison = worker.targets.compare(None).await?;
        server.refuse_next("PATCH", patched, None).await?;
        if let Some(status) = read {
            server.refuse_next("GET", status, None).await?;
        }
        let (_, cause, _, text) = fate(worker.targets.repair(&comparison.differences[0]).await);
        assert_eq!(cause, expected, "{text}");
        let row = stage.store.grant_targets(&all()).await?.remove(0);
        assert_eq!(row.seen.account.as_ref(), Some(&id));
    }
    assert_eq!(server.users().await?.len(), 1);

    let comparison = worker.targets.compare(None).await?;
    worker.targets.repair(&comparison.differences[0]).await?;
    assert_eq!(server.members(&group).await?, ["married"]);
    revoke(&stage, &event).await?;
    worker.targets.sweep().await?;
    assert_eq!(server.members(&group).await?, Vec::<String>::new());
    Ok(())
}

#[tokio::test]
async fn what_a_scim_service_says_decides_what_becomes_of_the_event() -> anyhow::Result<()> {
    let (stage, mut server) = (Stage::open().await?, Scim::start().await?);
    let group = server.add_group("guests").await?;
    let worker = guest_worker(&stage, vec![scim(&server, &group)]);
    let event = by_address("ada");

    for (status, after, expected) in [
        (429, Some("7"), (true, Cause::Throttled, Some(7))),
        (503, Some("3"), (true, Cause::Unavailable, Some(3))),
        (503, None, (true, Cause::Unavailable, None)),
        (403, None, (true, Cause::NotPermitted, None)),
        (404, None, (true, Cause::NotPermitted, None)),
        (400, None, (false, Cause::Refused, None)),
    ] {
        server.refuse_next("PATCH", status, after).await?;
        let (may_pass, cause, after, text) = fate(handle(&worker, &event).await);
        assert_eq!((may_pass, cause, after.map(|it| it.as_secs())), expected, "{status}: {text}");
        assert!(!text.contains("ada"), "{text}");
    }
    handle(&worker, &event).await?;
    assert_eq!(server.members(&group).await?, ["ada@example.com"]);

    let settings = ScimSettings { url: server.url(), token: "another".into(), create_users: true };
    let wrong = guest_worker(&stage, vec![target("other", TargetKind::Scim(settings), &group)]);
    let (_, cause, _, text) = fate(handle(&wrong, &by_address("bob")).await);
    assert_eq!(cause, Cause::NotPermitted);
    assert!(text.contains("`token`") && !text.contains("another"), "{text}");
    let comparison = wrong.targets.compare(None).await?;
    assert_eq!(comparison.unreadable.len(), 1);
    Ok(())
}

const TABLE: &str =
    "CREATE TABLE access (person text, email text, role text, PRIMARY KEY (person, role))";

fn sql(url: &str) -> TargetSettings {
    let settings = SqlSettings {
        url: url.into(),
        grant: "INSERT INTO access (person, email, role) VALUES (:person, :email, :role)
                ON CONFLICT DO NOTHING"
            .into(),
        revoke: "DELETE FROM access WHERE person = :person AND role = :role".into(),
        holds: Some("SELECT 1 FROM access WHERE person = :person AND role = :role".into()),
    };
    TargetSettings { roles: BTreeMap::new(), ..target("erp", TargetKind::Sql(settings), "") }
}

#[tokio::test]
async fn a_database_gets_what_is_bound_and_never_pasted() -> anyhow::Result<()> {
    let stage = Stage::open().await?;
    let directory = tempfile::tempdir()?;
    let url = format!("sqlite:{}", directory.path().join("erp.db").display());
    let mut erp = sqlx::SqliteConnection::connect(&format!("{url}?mode=rwc")).await?;
    sqlx::raw_sql(TABLE).execute(&mut erp).await?;
    let worker = guest_worker(&stage, vec![sql(&url)]);
    let event = by_address("x'); DROP TABLE access; --");

    handle(&worker, &event).await?;
    handle(&worker, &event).await?;
    let rows = sqlx::query("SELECT email, role FROM access").fetch_all(&mut erp).await?;
    assert_eq!(rows.len(), 1);
    assert_eq!(rows[0].get::<String, _>(0), address(&event));
    assert_eq!(rows[0].get::<String, _>(1), "guest", "under its own name");
    assert_eq!(differences(&worker).await?, []);
    sqlx::raw_sql("DELETE FROM access").execute(&mut erp).await?;
    assert_eq!(differences(&worker).await?, [(Wanted::Present, Actual::Absent)]);

    sqlx::raw_sql("DROP TABLE access").execute(&mut erp).await?;
    let (may_pass, cause, _, text) = fate(handle(&worker, &by_address("ada")).await);
    assert_eq!((may_pass, cause), (true, Cause::NotPermitted), "{text}");
    assert!(text.contains("no such table"), "{text}");
    Ok(())
}

#[tokio::test]
async fn a_database_on_a_server_gives_and_takes() -> anyhow::Result<()> {
    let (stage, server) = (Stage::open().await?, Postgres::start().await?);
    let mut erp = sqlx::PgConnection::connect(&server.url()).await?;
    sqlx::raw_sql(TABLE).execute(&mut erp).await?;
    let worker = guest_worker(&stage, vec![sql(&server.url())]);
    let mut event = by_address("ada");
    event.sign_up.email = Some(Email::new("nul\0@example.com"));

    handle(&worker, &event).await?;
    handle(&worker, &event).await?;
    const COUNT: &str = "SELECT count(*) FROM access";
    let one: i64 = sqlx::query_scalar(COUNT).fetch_one(&mut erp).await?;
    revoke(&stage, &event).await?;
    worker.targets.sweep().await?;
    let none: i64 = sqlx::query_scalar(COUNT).fetch_one(&mut erp).await?;
    assert_eq!((one, none), (1, 0));
    assert_eq!(differences(&worker).await?, []);
    erp.close().await?;
    Ok(())
}

#[tokio::test]
async fn one_target_that_is_down_does_not_keep_the_others_from_being_made_so() -> anyhow::Result<()>
{
    let (stage, server) = (Stage::open().await?, Graph::start().await?);
    let dead = format!("http://127.0.0.1:{}/v1.0", vestibule_testkit::free_port());
    let dead = GraphSettings { base_url: dead, ..graph_settings(&server) };
    let worker = guest_worker(
        &stage,
        vec![target("down", TargetKind::GraphGroup(dead), GROUP), group(&server)],
    );
    let event = by_address("ada");
    account(&server, &event);

    let (_, cause, _, text) = fate(handle(&worker, &event).await);

    assert_eq!(cause, Cause::Unavailable);
    assert!(text.contains("target `down`"), "{text}");
    assert_eq!(server.members(GROUP).len(), 1);
    let comparison = worker.targets.compare(None).await?;
    assert_eq!((comparison.compared, comparison.unreadable.len()), (1, 1));
    assert!(!worker.has_one_target());
    Ok(())
}

#[tokio::test]
async fn a_target_that_was_added_later_is_made_so_by_a_repair() -> anyhow::Result<()> {
    let (stage, server) = (Stage::open().await?, Graph::start().await?);
    let event = by_address("ada");
    account(&server, &event);
    stage.store.record_sign_up("database", &event, OffsetDateTime::now_utc()).await?;
    handle(&guest_worker(&stage, vec![]), &event).await?;
    let worker = guest_worker(&stage, vec![group(&server)]);

    let comparison = worker.targets.compare(None).await?;
    assert_eq!(comparison.differences.len(), 1);
    worker.targets.repair(&comparison.differences[0]).await?;

    assert_eq!(server.members(GROUP).len(), 1);
    assert_eq!(differences(&worker).await?, []);
    Ok(())
}

#[test]
fn all_complaints_come_at_once_and_tell_no_secret() {
    let graph = GraphSettings::new("contoso.com", "id", "hunter2".into());
    let url: SecretString = "mysql://u:hunter2@db/x".into();
    let sql = |url: &SecretString, grant: &str| {
        TargetKind::Sql(SqlSettings {
            url: url.clone(),
            grant: grant.into(),
            revoke: "DELETE FROM a WHERE b = :role".into(),
            holds: None,
        })
    };
    let scim = ScimSettings { url: "http://x.test".into(), token: "".into(), create_users: true };
    let settings = vec![
        target("a", TargetKind::GraphGroup(graph.clone()), "g"),
        target("a", TargetKind::GraphGroup(graph.clone()), " "),
        TargetSettings {
            roles: BTreeMap::new(),
            ..target("b/c", TargetKind::GraphAppRole { graph, resource: "".into() }, "")
        },
        target("d", TargetKind::Scim(scim), "g"),
        target("e", sql(&url, ""), "x"),
        target("f", sql(&"sqlite:x.db".into(), "INSERT INTO a VALUES (:emial)"), "x"),
    ];
    let errors = PermissionTargets::check(settings).unwrap_err();
    let seen: Vec<_> = errors.iter().map(|it| (it.index, it.error.key)).collect();
    assert_eq!(
        seen,
        [
            (1, "name"),
            (1, "roles"),
            (2, "name"),
            (2, "roles"),
            (2, "resource"),
            (3, "token"),
            (3, "url"),
            (4, "url"),
            (5, "grant"),
            (5, "revoke"),
        ]
    );
    let text: Vec<_> = errors.iter().map(ToString::to_string).collect();
    assert!(!text.concat().contains("hunter2"), "{text:?}");
    assert!(text[8].contains(":emial") && text[8].contains(":email"), "{text:?}");
}

/// What may happen to one of two people.
#[derive(Clone, Copy, Debug)]
enum Happens {
    SignUp,
    GivenUp,
    Revoked,
    /// Somebody changes the group behind our back.
    Meddled(bool),
    /// The next call goes wrong in some way.
    Fails(u8),
    /// All that came so far comes again.
    ComesAgain,
    Sweep,
}

fn happens() -> impl Strategy<Value = Happens> {
    prop_oneof![
        3 => Just(Happens::SignUp),
        1 => Just(Happens::GivenUp),
        1 => Just(Happens::Revoked),
        1 => any::<bool>().prop_map(Happens::Meddled),
        2 => (0_u8..4).prop_map(Happens::Fails),
        1 => Just(Happens::ComesAgain),
        1 => Just(Happens::Sweep),
    ]
}

/// Drops an operation when it waits for the `points`th time, as a crash would.
async fn given_up_after(points: u32, operation: impl Future) {
    let mut operation = pin!(operation);
    let mut left = points;
    poll_fn(|context| match operation.as_mut().poll(context) {
        Poll::Pending if left > 0 => {
            left -= 1;
            Poll::Pending
        }
        _ => Poll::Ready(()),
    })
    .await;
}

/// Plays what happens, each step cut short somewhere, then lets everything be carried through.
async fn play(steps: &[(Happens, bool, u32)]) -> anyhow::Result<()> {
    let (stage, server) = (Stage::open().await?, Graph::start().await?);
    let worker = guest_worker(&stage, vec![group(&server)]);
    let mut came: Vec<SignUpEvent> = Vec::new();
    let people = ["ada", "bob"].map(|it| (by_address(it), account(&server, &by_address(it))));
    for (what, is_first, points) in steps {
        let (person, account) = &people[usize::from(!is_first)];
        let last = came.iter().rfind(|it| it.person == person.person && it.kind == Kind::Accepted);
        let mut again = Vec::new();
        match what {
            Happens::SignUp => {
                let name = if *is_first { "ada" } else { "bob" };
                came.push(by_address(name));
                again.extend(came.last().cloned());
            }
            Happens::GivenUp => {
                if let Some(over) = last.map(given_up) {
                    came.push(over.clone());
                    again.push(over);
                }
            }
            Happens::Revoked => {
                let by_grace = Revocation { by: "grace", reason: "left us" };
                let now = OffsetDateTime::now_utc();
                stage.store.revoke_grants(&person.person, None, by_grace, now).await?;
            }
            Happens::Meddled(is_member) => server.set_member(GROUP, account, *is_member),
            Happens::Fails(how) => {
                let call =
                    if how % 2 == 0 { GraphCall::AddMember } else { GraphCall::RemoveMember };
                let fault =
                    if *how < 2 { GraphFault::Status(503) } else { GraphFault::Status(400) };
                server.plan(call, fault);
            }
            Happens::ComesAgain => again.clone_from(&came),
            Happens::Sweep => given_up_after(*points, worker.targets.sweep()).await,
        }
        for event in again {
            given_up_after(*points, handle(&worker, &event)).await;
        }
    }
    // Every event comes until it is done, and what is found otherwise is mended. What was planned to go
    // wrong may still do so, each time once.
    for _ in 0..=steps.len() {
        for event in &came {
            while handle(&worker, event).await.is_err() {}
        }
        let differences = worker.targets.compare(None).await?.differences;
        if differences.is_empty() {
            break;
        }
        for difference in differences {
            let _ = worker.targets.repair(&difference).await;
        }
    }
    anyhow::ensure!(differences(&worker).await?.is_empty(), "targets differ in the end");
    for (person, account) in &people {
        let grants = stage.store.grants_of(&person.person).await?;
        let is_in_force = grants.iter().any(|it| it.is_in_force(OffsetDateTime::now_utc()));
        let is_member = server.members(GROUP).iter().filter(|it| *it == account).count();
        if !grants.is_empty() {
            anyhow::ensure!(is_member == usize::from(is_in_force), "{grants:?}");
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn whatever_happens_and_wherever_it_is_cut_short_targets_end_as_wanted(
        steps in proptest::collection::vec((happens(), any::<bool>(), 0_u32..12), 1..20),
    ) {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(play(&steps)).map_err(|error| TestCaseError::fail(format!("{error:#}")))?;
    }
}
