//! The worker against a stand-in for Graph, a real log and a real store.

use serde_json::json;
use vestibule_store::{AccountOrigin, ConfirmationRecord, ConfirmationState, MadeAccount, Sighted};
use vestibule_testkit::{Graph as Server, GraphCall, GraphFault, eventually};

use super::*;
use crate::testing::{LIMIT, Stage, approved, graph_settings, settings, sign_up, task};

/// So that nobody waits, and nobody is given up.
const SOON: ConfirmSchedule = ConfirmSchedule {
    first_look: Duration::from_secs(1),
    longest_pause: Duration::from_secs(1),
    abandon_after: Duration::from_secs(3600),
};

/// So that whoever was looked for is not due again in the same test.
const ONCE: ConfirmSchedule = ConfirmSchedule { longest_pause: Duration::from_secs(3600), ..SOON };

fn confirm(server: Option<&Server>, stage: &Stage, schedule: ConfirmSchedule) -> Confirm {
    let settings = ConfirmSettings { graph: server.map(graph_settings), schedule, accounts: None };
    with(settings, stage)
}

fn with(settings: ConfirmSettings, stage: &Stage) -> Confirm {
    let key = Arc::new(PseudonymKey::new(vec![1; 32]));
    Confirm::new(settings, key, stage.store.clone()).unwrap_or_else(|faults| panic!("{faults:?}"))
}

/// A sign-up of so long ago: what was due since is due now.
fn earlier(mut event: SignUpEvent, ago: Duration) -> SignUpEvent {
    event.time -= ago;
    event
}

const MINUTE: Duration = Duration::from_secs(60);

/// Somebody who signs in with Google.
fn federated(person: &str) -> SignUpEvent {
    let mut event = earlier(sign_up(person), MINUTE);
    event.sign_up.identities = vec![Identity {
        sign_in_type: "federated".into(),
        issuer: "google.com".into(),
        issuer_assigned_id: format!("{person}'s"),
    }];
    event
}

/// Somebody whose identity is not told.
fn plain(person: &str) -> SignUpEvent {
    let mut event = earlier(sign_up(person), MINUTE);
    event.sign_up.identities.clear();
    event
}

async fn record(stage: &Stage, event: &SignUpEvent) -> anyhow::Result<ConfirmationRecord> {
    Ok(stage.store.confirmation(event.id).await?.expect("it was noted"))
}

async fn unpublished(stage: &Stage) -> anyhow::Result<Vec<SignUpEvent>> {
    let rows = stage.store.unpublished(0, 10).await?;
    rows.into_iter().map(|it| Ok(it.event?.event().clone())).collect()
}

async fn state(stage: &Stage, event: &SignUpEvent) -> anyhow::Result<ConfirmationState> {
    Ok(record(stage, event).await?.state)
}

#[tokio::test]
async fn accounts_that_the_directory_shows_are_confirmed_and_others_waited_for()
-> anyhow::Result<()> {
    let (server, stage) = (Server::start().await?, Stage::open().await?);
    let worker = confirm(Some(&server), &stage, SOON);
    let (google, mail, local) = (federated("ada"), plain("bob"), plain("cleo"));
    let (stranger, namesake, nobody) = (federated("dora"), plain("eve"), plain("finn"));
    for event in [&google, &mail, &local, &stranger, &namesake, &nobody] {
        worker.handle(&task(event.clone())).await?;
        worker.handle(&task(event.clone())).await?;
    }
    let identities = |event: &SignUpEvent| json!(event.sign_up.identities);
    let google_id = server.add_user(&json!({ "identities": identities(&google) }));
    let mail_id = server.add_user(&json!({ "mail": "bob@example.com" }));
    let local_id = server.add_user(&json!({ "identities": [{
        "signInType": "emailAddress", "issuer": Server::TENANT,
        "issuerAssignedId": "cleo@example.com",
    }]}));
    let old = "2020-01-01T00:00:00Z";
    server.add_user(&json!({ "mail": "eve@example.com", "createdDateTime": old }));

    assert_eq!(worker.tend().await, Some(POLL));

    for (event, id) in [(&google, google_id), (&mail, mail_id), (&local, local_id)] {
        let confirmed = record(&stage, event).await?;
        assert_eq!(confirmed.object_id, Some(id));
        assert_eq!(confirmed.source, Some(ConfirmationSource::Directory));
    }
    for event in [&stranger, &namesake, &nobody] {
        let waits = record(&stage, event).await?;
        assert_eq!((waits.state, waits.tries), (ConfirmationState::Waiting, 1));
    }
    let outbox = unpublished(&stage).await?;
    assert_eq!(outbox.len(), 3);
    for event in outbox {
        assert_eq!(event.kind, Kind::Confirmed);
        assert!(event.sign_up.object_id.is_some());
    }
    Ok(())
}

#[tokio::test]
async fn nobody_is_given_up_while_the_directory_cannot_say() -> anyhow::Result<()> {
    let (server, stage) = (Server::start().await?, Stage::open().await?);
    let schedule = ConfirmSchedule { abandon_after: Duration::from_secs(30), ..SOON };
    let worker = confirm(Some(&server), &stage, schedule);
    let event = plain("ada");
    worker.handle(&task(event.clone())).await?;

    // About one person alone nobody can tell more than that it fails.
    server.plan(GraphCall::FindUser, GraphFault::Status(500));
    assert_eq!(worker.tend().await, Some(POLL));
    let waits = record(&stage, &event).await?;
    assert_eq!((waits.state, waits.tries), (ConfirmationState::Waiting, 0));
    stage.store.wait_on(event.id, event.time, false).await?;

    // Each costs a longer pause, and the sign-up nothing.
    let faults = [
        (GraphFault::Throttle(Some("7")), 7),
        (GraphFault::Busy("3"), 3),
        (GraphFault::Status(403), 4),
        (GraphFault::Status(401), 8),
    ];
    for (fault, pause) in faults {
        server.plan(GraphCall::FindUser, fault.clone());
        if fault == GraphFault::Status(401) {
            // A new token is tried, too.
            server.plan(GraphCall::FindUser, fault.clone());
        }
        assert_eq!(worker.tend().await, Some(Duration::from_secs(pause)), "{fault:?}");
        let waits = record(&stage, &event).await?;
        assert_eq!((waits.state, waits.tries), (ConfirmationState::Waiting, 0), "{fault:?}");
        // As if its lease had run out.
        stage.store.wait_on(event.id, event.time, false).await?;
    }
    // Nor by a directory that does not understand what it is asked of this one person.
    server.plan(GraphCall::FindUser, GraphFault::Status(400));
    assert_eq!(worker.tend().await, Some(POLL));
    assert_eq!(state(&stage, &event).await?, ConfirmationState::Waiting);

    stage.store.wait_on(event.id, event.time, false).await?;
    assert_eq!(worker.tend().await, Some(POLL));
    assert_eq!(state(&stage, &event).await?, ConfirmationState::Abandoned);
    let outbox = unpublished(&stage).await?;
    assert_eq!(outbox.iter().map(|it| it.kind).collect::<Vec<_>>(), [Kind::Abandoned]);
    Ok(())
}

#[tokio::test]
async fn whoever_the_directory_fails_for_waits_alone() -> anyhow::Result<()> {
    let (server, stage) = (Server::start().await?, Stage::open().await?);
    let worker = confirm(Some(&server), &stage, ONCE);
    let broken = plain("ada");
    worker.handle(&task(broken.clone())).await?;
    for round in 0..3 {
        for _ in 0..=OUTAGE_PEOPLE {
            stage.store.wait_on(broken.id, broken.time, false).await?;
            server.plan(GraphCall::FindUser, GraphFault::Status(500));
            assert_eq!(worker.tend().await, Some(POLL), "{round}");
        }
        let other = plain(&format!("p{round}"));
        server.add_user(&json!({ "mail": format!("p{round}@example.com") }));
        worker.handle(&task(other.clone())).await?;
        assert_eq!(worker.tend().await, Some(POLL), "{round}");
        assert_eq!(state(&stage, &other).await?, ConfirmationState::Confirmed, "{round}");
    }
    let waits = record(&stage, &broken).await?;
    assert_eq!((waits.state, waits.tries), (ConfirmationState::Waiting, 0));
    Ok(())
}

#[tokio::test]
async fn a_directory_that_is_down_is_left_alone_until_it_answers() -> anyhow::Result<()> {
    let (server, stage) = (Server::start().await?, Stage::open().await?);
    let worker = confirm(Some(&server), &stage, ONCE);
    let events: Vec<_> = (0..40).map(|it| plain(&format!("p{it:02}"))).collect();
    for event in &events {
        worker.handle(&task(event.clone())).await?;
        server.plan(GraphCall::FindUser, GraphFault::Status(500));
    }
    let calls = || server.requests_of(GraphCall::FindUser).len();

    assert_eq!(worker.tend().await, Some(Duration::from_secs(1)));
    assert!(calls() < BATCH as usize, "{} were asked for", calls());
    let mut before = calls();
    for pause in [2, 4, 8] {
        assert_eq!(worker.tend().await, Some(Duration::from_secs(pause)));
        let more = calls() - before;
        assert!((1..=OUTAGE_PEOPLE as usize).contains(&more), "{more}");
        before = calls();
    }

    let all_are_due = async || {
        for event in &events {
            stage.store.wait_on(event.id, event.time, false).await?;
        }
        anyhow::Ok(())
    };
    // Whoever probes finds it up at last, and then there is no more need to be careful.
    while worker.state().is_down() {
        all_are_due().await?;
        worker.tend().await;
    }
    all_are_due().await?;
    assert_eq!(worker.tend().await, Some(Duration::ZERO), "as many as there is room for");
    assert_eq!(worker.tend().await, Some(POLL));
    for event in &events {
        assert!(record(&stage, event).await?.tries > 0);
    }
    Ok(())
}

#[tokio::test]
async fn a_token_is_remembered_for_a_sign_up_that_comes_weeks_later() -> anyhow::Result<()> {
    let stage = Stage::open().await?;
    let schedule = ConfirmSchedule { abandon_after: Duration::from_secs(30), ..SOON };
    let month = Duration::from_secs(30 * 24 * 3600);
    let event = earlier(plain("ada"), month);
    let at = event.time + MINUTE;
    let unasked = |_: &SignUpEvent| unreachable!("nobody waits yet");
    let (person, connector) = (&event.person, &event.sign_up.connector);
    stage.store.account_seen(person, connector, "object-1", at, unasked).await?;

    let worker = confirm(None, &stage, schedule);
    worker.tend().await;
    worker.handle(&task(event.clone())).await?;
    worker.tend().await;

    assert_eq!(state(&stage, &event).await?, ConfirmationState::Confirmed);
    Ok(())
}

#[tokio::test]
async fn without_a_directory_only_tokens_confirm() -> anyhow::Result<()> {
    let stage = Stage::open().await?;
    let schedule = ConfirmSchedule { abandon_after: Duration::from_secs(30), ..SOON };
    let worker = confirm(None, &stage, schedule);
    let (seen_first, seen_later) = (plain("ada"), sign_up("bob"));
    let (gone, young) = (plain("eve"), sign_up("finn"));
    let key = PseudonymKey::new(vec![1; 32]);
    let see = async |event: &SignUpEvent| {
        let now = OffsetDateTime::now_utc();
        let (person, connector) = (&event.person, &event.sign_up.connector);
        let source = ConfirmationSource::Token;
        let by_token = |origin: &SignUpEvent| {
            SignUpEvent::confirmed(Uuid::now_v7(), now, origin, "object-1", source, &key)
        };
        stage.store.account_seen(person, connector, "object-1", now, by_token).await
    };
    assert_eq!(see(&seen_first).await?, Sighted::Noted);
    for event in [&seen_first, &seen_later, &gone, &young] {
        worker.handle(&task(event.clone())).await?;
    }
    assert_eq!(see(&seen_later).await?, Sighted::Confirmed);

    assert_eq!(worker.tend().await, Some(POLL));

    for event in [&seen_first, &seen_later] {
        let confirmed = record(&stage, event).await?;
        assert_eq!(confirmed.object_id.as_deref(), Some("object-1"));
        assert_eq!(confirmed.source, Some(ConfirmationSource::Token));
    }
    assert_eq!(state(&stage, &gone).await?, ConfirmationState::Abandoned);
    assert_eq!(state(&stage, &young).await?, ConfirmationState::Waiting);
    Ok(())
}

#[tokio::test]
async fn an_approved_sign_up_is_what_the_worker_accounts_says() -> anyhow::Result<()> {
    let (server, stage) = (Server::start().await?, Stage::open().await?);
    let worker = with(
        ConfirmSettings {
            graph: Some(graph_settings(&server)),
            schedule: ConfirmSchedule { abandon_after: Duration::from_secs(30), ..SOON },
            accounts: Some(Filter::default()),
        },
        &stage,
    );
    let (made, being_made) = (earlier(approved("ada"), MINUTE), earlier(approved("eve"), MINUTE));
    for event in [&made, &being_made] {
        worker.handle(&task(event.clone())).await?;
        stage.store.begin_account(Accounts::NAME, event, OffsetDateTime::now_utc()).await?;
    }
    let account = MadeAccount {
        origin: AccountOrigin::Created,
        object_id: "object-2".into(),
        invitation_id: None,
    };
    let now = OffsetDateTime::now_utc();
    stage.store.finish_account(Accounts::NAME, &made, &account, now).await?;

    worker.tend().await;

    let confirmed = record(&stage, &made).await?;
    assert_eq!(confirmed.source, Some(ConfirmationSource::Account));
    assert_eq!(confirmed.object_id.as_deref(), Some("object-2"));
    assert_eq!(state(&stage, &being_made).await?, ConfirmationState::Waiting);
    assert!(server.requests_of(GraphCall::FindUser).is_empty(), "there was no need to ask");

    // Who goes on by themselves while we make the account has that one.
    let by_themselves = earlier(sign_up("eve"), MINUTE);
    assert_eq!(by_themselves.person, being_made.person);
    worker.handle(&task(by_themselves.clone())).await?;
    assert_eq!(state(&stage, &being_made).await?, ConfirmationState::Superseded);
    stage.store.finish_account(Accounts::NAME, &being_made, &account, now).await?;
    worker.tend().await;
    let confirmed = record(&stage, &by_themselves).await?;
    assert_eq!(confirmed.source, Some(ConfirmationSource::Account));
    assert_eq!(unpublished(&stage).await?.len(), 2);
    Ok(())
}

#[tokio::test]
async fn over_the_runtime_it_looks_until_it_is_told_to_stop() -> anyhow::Result<()> {
    let (server, stage) = (Server::start().await?, Stage::open().await?);
    let worker = confirm(Some(&server), &stage, SOON);
    let event = stage.append(plain("ada")).await?;
    let mut settings = settings(3);
    settings.filter.kinds.clear();
    let running = stage.start(worker, settings);
    stage.idle(Confirm::NAME).await?;
    eventually(LIMIT, "the account was looked for", async || {
        anyhow::Ok(record(&stage, &event).await?.tries > 0)
    })
    .await?;
    server.add_user(&json!({ "mail": "ada@example.com" }));
    eventually(LIMIT, "the account is confirmed", async || {
        anyhow::Ok(state(&stage, &event).await? == ConfirmationState::Confirmed)
    })
    .await?;
    running.stop().await
}

#[test]
fn all_complaints_about_the_settings_come_at_once() {
    let second = Duration::from_secs(1);
    let schedule = ConfirmSchedule {
        first_look: Duration::ZERO,
        longest_pause: Duration::MAX,
        abandon_after: second,
    };
    let graph = Some(GraphSettings::new("a/b", "id", "secret".into()));
    let faults = Confirm::check(&ConfirmSettings { graph, schedule, accounts: None }).unwrap_err();
    let keys: Vec<_> = faults.iter().map(|it| it.key).collect();
    assert_eq!(keys, ["first_look", "longest_pause", "tenant"]);
    assert!(Confirm::check(&ConfirmSettings::default()).is_ok());
}
