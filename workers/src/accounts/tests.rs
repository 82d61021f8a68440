//! The worker against a stand-in for Graph, a real log and a real store.

use serde_json::json;
use vestibule_testkit::{Graph as Server, GraphCall, GraphFault, eventually};

use super::*;
use crate::{
    WorkerSettings,
    testing::{LIMIT, Stage, approved, graph_settings, settings, sign_up, task},
};

fn accounts_settings(server: &Server) -> AccountsSettings {
    AccountsSettings {
        settling: Duration::ZERO,
        ..AccountsSettings::new(graph_settings(server), Server::TENANT, "https://app.example.com/")
    }
}

fn accounts(server: &Server, stage: &Stage) -> Accounts {
    with(accounts_settings(server), stage)
}

fn with(settings: AccountsSettings, stage: &Stage) -> Accounts {
    Accounts::new(settings, stage.store.clone()).unwrap_or_else(|faults| panic!("{faults:?}"))
}

/// Somebody who signs in with Google.
fn federated(person: &str) -> SignUpEvent {
    let mut event = approved(person);
    event.sign_up.identities = vec![Identity {
        sign_in_type: "federated".into(),
        issuer: "google.com".into(),
        issuer_assigned_id: format!("{person}'s"),
    }];
    event.sign_up.claims.insert("extension_1a_Team".into(), json!(["x"]));
    event
}

/// Somebody who signs in with an Entra or Microsoft account.
fn other(person: &str) -> SignUpEvent {
    let mut event = approved(person);
    event.sign_up.identities.clear();
    event.sign_up.claims.insert("city".into(), json!("Hogsmeade"));
    event
}

async fn account(stage: &Stage, event: &SignUpEvent) -> Account {
    stage.store.account(event.id).await.unwrap().expect("it was noted")
}

fn text(outcome: Result<(), HandleError>) -> (Cause, String) {
    match outcome {
        Err(HandleError::Retry { source, cause, .. } | HandleError::Park { source, cause }) => {
            (cause, format!("{source:#}"))
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn who_signs_in_with_google_gets_an_account_once() -> anyhow::Result<()> {
    let (server, stage) = (Server::start().await?, Stage::open().await?);
    let worker = accounts(&server, &stage);
    let event = federated("ada");

    for _ in 0..3 {
        worker.handle(&task(event.clone())).await?;
    }

    let users = server.users();
    assert_eq!(users.len(), 1);
    assert_eq!(users[0]["userPrincipalName"], "ada_example.com#EXT@contoso.onmicrosoft.com");
    assert_eq!(users[0]["identities"], json!(event.sign_up.identities));
    assert_eq!(users[0]["extension_1a_Team"], json!(["x"]));
    assert_eq!(users[0]["displayName"], "Sample");
    let account = account(&stage, &event).await;
    let made = account.made.expect("its id was noted");
    assert_eq!(
        (made.origin, json!(made.object_id)),
        (AccountOrigin::Created, users[0]["id"].clone())
    );
    assert!(account.finished_at.is_some() && stage.store.is_done(Accounts::NAME, event.id).await?);
    Ok(())
}

#[tokio::test]
async fn others_are_invited_and_get_their_attributes_once_they_can_be_seen() -> anyhow::Result<()> {
    let (server, stage) = (Server::start().await?, Stage::open().await?);
    server.hide_from(2);
    let event = stage.append(other("ada")).await?;
    let mut wanted = accounts_settings(&server);
    wanted.send_invitation_message = true;

    let running = stage.start(with(wanted, &stage), approved_only(5));
    stage.idle(Accounts::NAME).await?;

    let (users, invitations) = (server.users(), server.invitations());
    assert_eq!((users.len(), invitations.len()), (1, 1));
    assert_eq!((&users[0]["city"], &users[0]["surname"]), (&json!("Hogsmeade"), &json!("Ple")));
    assert_eq!(invitations[0]["inviteRedirectUrl"], "https://app.example.com/");
    assert_eq!(invitations[0]["sendInvitationMessage"], true);
    assert_eq!(server.requests_of(GraphCall::UpdateUser).len(), 3, "two were too early");
    let account = account(&stage, &event).await;
    let made = account.made.expect("its id was noted");
    assert_eq!(made.origin, AccountOrigin::Invited);
    assert_eq!(json!(made.invitation_id), invitations[0]["id"]);
    running.stop().await
}

fn approved_only(tries: u32) -> WorkerSettings {
    let mut settings = settings(tries);
    settings.filter.kinds = Accounts::KINDS.to_vec();
    settings
}

#[tokio::test]
async fn only_an_approval_makes_an_account() -> anyhow::Result<()> {
    let (server, stage) = (Server::start().await?, Stage::open().await?);
    let worker = accounts(&server, &stage);
    for kind in Kind::ALL.into_iter().filter(|kind| *kind != Kind::Approved) {
        let mut event = sign_up("ada");
        event.kind = kind;
        worker.handle(&task(event)).await?;
    }
    assert_eq!(server.requests().len(), 0);
    Ok(())
}

#[tokio::test]
async fn a_crash_after_the_account_was_made_makes_no_second_one() -> anyhow::Result<()> {
    for (call, event) in
        [(GraphCall::CreateUser, federated("ada")), (GraphCall::Invite, other("ada"))]
    {
        for hidden in [0, 1] {
            let (server, stage) = (Server::start().await?, Stage::open().await?);
            server.hide_from(hidden);
            server.plan(call, GraphFault::LoseAnswer);
            let (worker, task) = (accounts(&server, &stage), task(event.clone()));

            // The process goes down between the directory's deed and our note of it.
            let made = eventually(LIMIT, "the account is made", async || server.users().len() == 1);
            tokio::select! {
                outcome = worker.handle(&task) => panic!("{outcome:?}"),
                made = made => made?,
            }
            assert_eq!(account(&stage, &event).await.made, None);
            while let Err(error) = worker.handle(&task).await {
                assert!(matches!(error, HandleError::Retry { .. }), "{error:?}");
            }

            assert_eq!(server.users().len(), 1, "{call:?}, hidden from {hidden}");
            let made = account(&stage, &event).await.made.expect("its id was noted");
            assert_ne!(made.origin, AccountOrigin::Found, "it is ours");
            if call == GraphCall::Invite {
                assert_eq!(server.users()[0]["city"], "Hogsmeade", "it is complete");
            }
        }
    }
    Ok(())
}

#[tokio::test]
async fn two_processes_with_one_event_make_one_account() -> anyhow::Result<()> {
    for event in [federated("ada"), other("ada")] {
        let (server, stage) = (Server::start().await?, Stage::open().await?);
        let task = task(event.clone());
        let handle = async || accounts(&server, &stage).handle(&task).await;

        let (one, another) = tokio::join!(handle(), handle());

        one?;
        another?;
        assert_eq!(server.users().len(), 1);
        assert_ne!(account(&stage, &event).await.made.unwrap().origin, AccountOrigin::Found);
        assert_eq!(stage.store.accounts_of(&event.person).await?.len(), 1);
    }
    Ok(())
}

#[tokio::test]
async fn after_an_invitation_without_an_answer_none_is_sent_too_soon() -> anyhow::Result<()> {
    let (server, stage) = (Server::start().await?, Stage::open().await?);
    server.hide_from(1);
    server.plan(GraphCall::Invite, GraphFault::Status(502));
    let mut wanted = accounts_settings(&server);
    wanted.settling = Duration::from_secs(60);
    let (worker, task) = (with(wanted, &stage), task(other("ada")));

    assert_eq!(text(worker.handle(&task).await).0, Cause::Unavailable);
    let Err(HandleError::Retry { after: Some(after), .. }) = worker.handle(&task).await else {
        panic!("it must wait");
    };

    assert!(after <= Duration::from_secs(60) && after > Duration::from_secs(30), "{after:?}");
    assert_eq!(server.requests_of(GraphCall::Invite).len(), 1);
    Ok(())
}

#[tokio::test]
async fn an_account_that_was_there_is_noted_and_left_as_it_is() -> anyhow::Result<()> {
    let (server, stage) = (Server::start().await?, Stage::open().await?);
    let worker = accounts(&server, &stage);
    let (by_mail, by_identity) = (other("ada"), federated("bob"));
    server.add_user(&json!({ "mail": "ada@example.com", "city": "London", "userType": "Guest",
        "createdDateTime": "2020-01-01T00:00:00Z" }));
    server.add_user(&json!({ "identities": by_identity.sign_up.identities, "city": "London" }));

    for event in [&by_mail, &by_identity] {
        worker.handle(&task(event.clone())).await?;
        let made = account(&stage, event).await.made.expect("it was noted");
        assert_eq!(made.origin, AccountOrigin::Found);
    }

    assert!(server.users().len() == 2 && server.users().iter().all(|it| it["city"] == "London"));
    assert_eq!(server.invitations().len(), 0);
    Ok(())
}

#[tokio::test]
async fn a_member_of_that_address_is_neither_invited_nor_changed_after_a_failure()
-> anyhow::Result<()> {
    let (server, stage) = (Server::start().await?, Stage::open().await?);
    let (worker, task) = (accounts(&server, &stage), task(other("ada")));
    server.plan(GraphCall::Invite, GraphFault::Status(500));
    assert_eq!(text(worker.handle(&task).await).0, Cause::Unavailable);
    // Made by somebody else after we had begun.
    server.add_user(&json!({ "mail": "ada@example.com", "userType": "Member", "city": "London" }));

    worker.handle(&task).await?;

    assert_eq!(server.users()[0]["city"], "London");
    let made = account(&stage, &task.event).await.made.expect("it was noted");
    assert_eq!(made.origin, AccountOrigin::Found);
    Ok(())
}

#[tokio::test]
async fn a_name_that_another_account_holds_is_for_somebody_to_mend() -> anyhow::Result<()> {
    let (server, stage) = (Server::start().await?, Stage::open().await?);
    server.add_user(&json!({ "mail": "ada@example.com" }));
    let task = task(federated("ada"));

    // It might be the effect of a write that is not to be seen yet.
    let outcome = accounts(&server, &stage).handle(&task).await;
    assert!(matches!(outcome, Err(HandleError::Retry { .. })), "{outcome:?}");
    let mut impatient = accounts_settings(&server);
    impatient.replication_window = Duration::ZERO;
    let outcome = with(impatient, &stage).handle(&task).await;

    assert!(matches!(outcome, Err(HandleError::Park { .. })), "{outcome:?}");
    let (_, text) = text(outcome);
    assert!(text.contains("another account") && text.contains("proxyAddresses"), "{text}");
    assert!(!text.contains("ada"), "{text}");
    Ok(())
}

#[tokio::test]
async fn what_never_shows_up_is_parked_after_the_window() -> anyhow::Result<()> {
    let (server, stage) = (Server::start().await?, Stage::open().await?);
    server.hide_from(1000);
    let mut impatient = accounts_settings(&server);
    impatient.replication_window = Duration::ZERO;
    let (worker, task) = (with(impatient, &stage), task(other("ada")));

    let outcome = worker.handle(&task).await;

    assert!(matches!(outcome, Err(HandleError::Park { .. })), "{outcome:?}");
    assert_eq!(server.invitations().len(), 1);
    Ok(())
}

#[tokio::test]
async fn throttling_costs_time_and_nothing_else() -> anyhow::Result<()> {
    let (server, stage) = (Server::start().await?, Stage::open().await?);
    for call in [GraphCall::Token, GraphCall::FindUser, GraphCall::CreateUser] {
        server.plan(call, GraphFault::Throttle(None));
        server.plan(call, GraphFault::Throttle(Some("0")));
        server.plan(call, GraphFault::Busy("0"));
    }
    let event = stage.append(federated("ada")).await?;

    let running = stage.start(accounts(&server, &stage), approved_only(20));
    stage.idle(Accounts::NAME).await?;

    assert_eq!(server.users().len(), 1);
    let failures = stage.store.attempts_of(event.id).await?;
    let causes: Vec<_> = failures.iter().map(|it| &*it.cause_class).collect();
    assert_eq!(causes, ["throttled", "throttled", "unavailable"].repeat(3));
    assert!(failures.iter().all(|it| !it.error.contains("ada")), "{failures:?}");
    running.stop().await
}

#[tokio::test]
async fn a_hanging_directory_holds_up_an_attempt_within_its_limits() -> anyhow::Result<()> {
    let (server, stage) = (Server::start().await?, Stage::open().await?);
    server.plan(GraphCall::CreateUser, GraphFault::Hang);
    let mut hurried = accounts_settings(&server);
    hurried.graph.timeout = Duration::from_secs(3);
    let event = stage.append(federated("ada")).await?;

    let running = stage.start(with(hurried, &stage), approved_only(3));
    stage.idle(Accounts::NAME).await?;

    assert_eq!(server.users().len(), 1);
    let failures = stage.store.attempts_of(event.id).await?;
    assert_eq!((failures.len(), &*failures[0].cause_class), (1, "timeout"));
    running.stop().await
}

#[tokio::test]
async fn what_is_missing_in_the_set_up_is_said_and_blames_no_event() -> anyhow::Result<()> {
    let (server, stage) = (Server::start().await?, Stage::open().await?);
    let worker = accounts(&server, &stage);
    for (call, event, word) in [
        (GraphCall::FindUser, other("ada"), "User.Read.All"),
        (GraphCall::CreateUser, federated("ada"), "User.ReadWrite.All"),
        (GraphCall::Invite, other("ada"), "User.Invite.All"),
        (GraphCall::UpdateUser, other("ada"), "User.ReadWrite.All"),
    ] {
        server.plan(call, GraphFault::Status(403));
        let outcome = worker.handle(&task(event)).await;
        assert!(matches!(outcome, Err(HandleError::Retry { .. })), "{outcome:?}");
        let (cause, text) = text(outcome);
        assert_eq!(cause, Cause::NotPermitted);
        assert!(text.contains(word) && !text.contains("ada"), "{text}");
    }
    Ok(())
}

#[tokio::test]
async fn values_that_graph_does_not_take_are_named_without_them() -> anyhow::Result<()> {
    let (server, stage) = (Server::start().await?, Stage::open().await?);
    let mut event = federated("ada");
    event.sign_up.claims.insert("extension_1a_Team".into(), json!({ "secret": 1 }));

    let outcome = accounts(&server, &stage).handle(&task(event)).await;

    assert!(matches!(outcome, Err(HandleError::Park { .. })), "{outcome:?}");
    let (cause, text) = text(outcome);
    assert_eq!(cause, Cause::Refused);
    assert!(text.contains("extension_1a_Team") && !text.contains("secret"), "{text}");
    Ok(())
}

#[tokio::test]
async fn without_an_address_the_event_is_parked() -> anyhow::Result<()> {
    let (server, stage) = (Server::start().await?, Stage::open().await?);
    let mut event = other("ada");
    event.sign_up.email = None;

    let outcome = accounts(&server, &stage).handle(&task(event)).await;

    assert_eq!(text(outcome).0, Cause::InvalidRecipient);
    assert_eq!(server.requests().len(), 0);
    Ok(())
}

#[test]
fn all_complaints_come_at_once_without_secrets() {
    let graph = GraphSettings::new("", "id", "hidden".into());
    let settings = AccountsSettings::new(graph, "contoso", "ftp://x");
    let faults = Accounts::check(&settings).unwrap_err();
    let keys: Vec<_> = faults.iter().map(|it| it.key).collect();
    assert_eq!(keys, ["tenant", "domain", "invite_redirect_url"]);
    assert!(!format!("{settings:?}").contains("hidden"));
}
