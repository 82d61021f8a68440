//! The client against a stand-in for Graph.

use futures_util::future::join_all;
use serde_json::json;
use vestibule_testkit::{Graph as Server, GraphCall, GraphFault, free_port};

use super::*;
use crate::{Cause, HandleError, testing::graph_settings};

fn graph(settings: &GraphSettings) -> Graph {
    let mut faults = Vec::new();
    Graph::new(settings, &mut faults).unwrap_or_else(|| panic!("{faults:?}"))
}

/// What becomes of an event whose call ended like this.
fn fate<T: fmt::Debug>(outcome: Result<T, GraphError>) -> (Cause, Option<Duration>, String) {
    match HandleError::from(outcome.unwrap_err()) {
        HandleError::Retry { source, cause, after } => (cause, after, format!("{source:#}")),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn many_calls_at_once_share_one_token() -> anyhow::Result<()> {
    let server = Server::start().await?;
    let graph = graph(&graph_settings(&server));

    let found = join_all((0..20).map(|_| graph.find_by_mail("ada@example.com"))).await;

    assert!(found.into_iter().all(|it| it.is_ok_and(|found| found.is_empty())));
    assert_eq!(server.requests_of(GraphCall::Token).len(), 1);
    Ok(())
}

#[tokio::test]
async fn those_who_wait_for_a_token_share_its_failure() -> anyhow::Result<()> {
    let server = Server::start().await?;
    let graph = graph(&graph_settings(&server));
    server.change_secret("another");

    let found = join_all((0..20).map(|_| graph.find_by_mail("ada@example.com"))).await;

    for outcome in found {
        let (cause, _, text) = fate(outcome);
        assert_eq!(cause, Cause::NotPermitted);
        assert!(text.contains("`client_secret`") && text.contains("AADSTS7000215"), "{text}");
        assert!(!text.contains(Server::CLIENT_SECRET) && !text.contains("ada"), "{text}");
    }
    assert_eq!(server.requests_of(GraphCall::Token).len(), 1);
    server.change_secret(Server::CLIENT_SECRET);
    assert_eq!(graph.find_by_mail("ada@example.com").await?, []);
    Ok(())
}

#[tokio::test]
async fn a_token_that_ends_is_renewed_and_one_that_is_refused_is_renewed_once() -> anyhow::Result<()>
{
    let server = Server::start().await?;
    let graph = graph(&graph_settings(&server));
    server.token_life(Duration::ZERO);
    fate(graph.find_by_mail("ada@example.com").await);
    assert_eq!(server.requests_of(GraphCall::Token).len(), 2, "the first ended at once");

    server.token_life(Duration::from_secs(3600));
    graph.find_by_mail("ada@example.com").await?;
    server.revoke_tokens();
    graph.find_by_mail("ada@example.com").await?;
    assert_eq!(server.requests_of(GraphCall::Token).len(), 4);

    for _ in 0..2 {
        server.plan(GraphCall::FindUser, GraphFault::Status(401));
    }
    let (cause, _, text) = fate(graph.find_by_mail("ada@example.com").await);
    assert_eq!(cause, Cause::NotPermitted);
    assert!(text.contains("does not accept our token"), "{text}");
    assert_eq!(server.requests_of(GraphCall::Token).len(), 5, "renewed once and no more");
    Ok(())
}

#[tokio::test]
async fn a_token_near_its_end_still_serves_while_the_token_service_is_down() -> anyhow::Result<()> {
    let server = Server::start().await?;
    let graph = graph(&graph_settings(&server));
    // From the first moment in the last fifth of its life.
    let token = graph.tokens.token().await.map_err(|error| anyhow::anyhow!("{error}"))?;
    graph.tokens.near_its_end(&token);
    server.plan(GraphCall::Token, GraphFault::Status(503));

    for _ in 0..3 {
        graph.find_by_mail("ada@example.com").await?;
    }

    assert_eq!(server.requests_of(GraphCall::Token).len(), 2, "after a failure there is a pause");
    Ok(())
}

#[tokio::test]
async fn searches_find_what_is_quoted_and_nothing_else() -> anyhow::Result<()> {
    let server = Server::start().await?;
    let graph = graph(&graph_settings(&server));
    let identities =
        json!([{ "signInType": "federated", "issuer": "google.com", "issuerAssignedId": "1'2" }]);
    let guest = json!({
        "mail": "o'neil+x@example.com", "userType": "Guest", "identities": identities,
        "createdDateTime": "2026-11-22T10:00:00Z",
    });
    let id = server.add_user(&guest);

    let by_mail = graph.find_by_mail("O'Neil+x@example.com").await?;
    assert_eq!((by_mail[0].id.as_str(), by_mail[0].is_guest), (id.as_str(), true));
    assert_eq!(by_mail[0].created, Some(time::macros::datetime!(2026-11-22 10:00 UTC)));
    let identity = |id: &str| Identity {
        sign_in_type: "federated".into(),
        issuer: "google.com".into(),
        issuer_assigned_id: id.into(),
    };
    assert_eq!(graph.find_by_identity(&identity("1'2")).await?, by_mail);
    assert_eq!(graph.find_by_identity(&identity("1")).await?, []);
    assert_eq!(graph.find_by_mail("x' or mail eq 'o''neil+x@example.com").await?, []);
    let filter = &server.requests_of(GraphCall::FindUser)[0].query;
    assert_eq!(
        filter,
        "$filter=mail eq 'O''Neil+x@example.com'&$select=id,userType,createdDateTime"
    );
    Ok(())
}

#[tokio::test]
async fn a_pause_that_graph_asks_for_is_told_on() -> anyhow::Result<()> {
    let server = Server::start().await?;
    let graph = graph(&graph_settings(&server));
    for (fault, expected) in [
        (GraphFault::Throttle(Some("7")), (Cause::Throttled, Some(7))),
        (GraphFault::Throttle(None), (Cause::Throttled, None)),
        (GraphFault::Busy("3"), (Cause::Unavailable, Some(3))),
        (GraphFault::Status(504), (Cause::Unavailable, None)),
    ] {
        server.plan(GraphCall::CreateUser, fault);
        let (cause, after, text) = fate(graph.create_user(&json!({ "mail": "ada@x.test" })).await);
        assert_eq!((cause, after.map(|it| it.as_secs())), expected);
        assert!(!text.contains("ada"), "{text}");
    }
    server.plan(GraphCall::Token, GraphFault::Throttle(Some("5")));
    server.revoke_tokens();
    let (cause, after, _) = fate(graph.find_by_mail("ada@x.test").await);
    assert_eq!((cause, after), (Cause::Throttled, Some(Duration::from_secs(5))));
    Ok(())
}

#[tokio::test]
async fn what_hangs_floods_or_leads_elsewhere_ends_within_limits() -> anyhow::Result<()> {
    let server = Server::start().await?;
    let timeout = Duration::from_millis(300);
    let graph = graph(&GraphSettings { timeout, ..graph_settings(&server) });
    let user = json!({ "mail": "ada@x.test" });

    for call in [GraphCall::Token, GraphCall::CreateUser] {
        server.plan(call, GraphFault::Hang);
        let (cause, _, text) = fate(graph.create_user(&user).await);
        assert_eq!(cause, Cause::Timeout, "{text}");
    }
    let graph = self::graph(&graph_settings(&server));
    server.plan(GraphCall::Token, GraphFault::FloodAnswer);
    server.revoke_tokens();
    let (cause, _, text) = fate(graph.create_user(&user).await);
    assert_eq!((cause, text.contains("cannot be read")), (Cause::Unavailable, true), "{text}");
    server.plan(GraphCall::FindUser, GraphFault::FloodAnswer);
    let (cause, _, text) = fate(graph.find_by_mail("ada@x.test").await);
    assert_eq!((cause, text.contains("cannot be read")), (Cause::Unavailable, true), "{text}");

    server.plan(GraphCall::FindUser, GraphFault::Redirect);
    let before = server.requests_of(GraphCall::FindUser).len();
    let error = graph.find_by_mail("ada@x.test").await.unwrap_err();
    assert!(matches!(HandleError::from(error), HandleError::Park { .. }));
    assert_eq!(server.requests_of(GraphCall::FindUser).len(), before + 1, "it was not followed");

    let dead = format!("http://127.0.0.1:{}/v1.0", free_port());
    let graph = self::graph(&GraphSettings { base_url: dead, ..graph_settings(&server) });
    let (cause, _, text) = fate(graph.find_by_mail("ada@x.test").await);
    assert_eq!(cause, Cause::Unavailable);
    assert!(text.contains("cannot be reached") && !text.contains("ada"), "{text}");
    Ok(())
}

#[test]
fn all_complaints_come_at_once() {
    let settings = GraphSettings {
        base_url: "http://graph.microsoft.com".into(),
        token_url: Some("login".into()),
        ..GraphSettings::new("a/b", "", "".into())
    };
    let mut faults = Vec::new();
    assert!(Graph::new(&settings, &mut faults).is_none());
    let keys: Vec<_> = faults.iter().map(|it| it.key).collect();
    assert_eq!(keys, ["tenant", "client_id", "client_secret", "graph_url", "token_url"]);
}

#[test]
fn without_an_override_the_token_comes_from_the_tenant() {
    let graph = graph(&GraphSettings::new("contoso.onmicrosoft.com", "id", "hidden".into()));
    assert_eq!(
        graph.tokens.url().as_str(),
        "https://login.microsoftonline.com/contoso.onmicrosoft.com/oauth2/v2.0/token"
    );
    assert!(!format!("{graph:?}").contains("hidden"));
}
