//! Requests for approval and the outbox, on both dialects.

use std::time::Duration;

use time::OffsetDateTime;
use tokio::task::JoinSet;
use uuid::Uuid;
use vestibule_events::{Effect, Mode, Reason, SignUpEvent, Verdict};
use vestibule_store::{
    ApprovalFilter, ApprovalRequest, ApprovalState, Decided, Done, Opened, RequestState, Store,
    StoreError,
};

use crate::home::{
    Home, NOW, event, expired, pending, reviewed, time_of, unknown_event, unpublished,
};

const WORKER: &str = "approvals";

fn later() -> OffsetDateTime {
    time_of(1_000_000)
}

async fn open(store: &Store, event: &SignUpEvent) -> Result<Opened, StoreError> {
    store.open_request(WORKER, event, later(), NOW).await
}

async fn request_of(store: &Store, event: &SignUpEvent) -> anyhow::Result<ApprovalRequest> {
    store.approval_request(event.id).await?.ok_or_else(|| anyhow::anyhow!("there is no request"))
}

async fn standing(store: &Store, event: &SignUpEvent) -> anyhow::Result<Option<ApprovalState>> {
    Ok(store.approval_state(&event.person, &event.sign_up.connector).await?)
}

/// The requests that these events decide.
fn about(decisions: &[SignUpEvent]) -> Vec<Uuid> {
    decisions.iter().filter_map(|it| it.approval.as_ref()).map(|it| it.request).collect()
}

async fn all(store: &Store) -> anyhow::Result<Vec<ApprovalRequest>> {
    let filter = ApprovalFilter { limit: 100, ..ApprovalFilter::default() };
    Ok(store.approval_requests(&filter).await?)
}

pub(crate) async fn a_request_is_opened_once_and_keeps_the_sign_up_as_it_came(
    home: &Home,
) -> anyhow::Result<()> {
    let store = home.store().await?;
    let event = pending(1, "ada");

    assert_eq!(standing(&store, &event).await?, None);
    assert_eq!(open(&store, &event).await?, Opened::Now);
    assert_eq!(open(&store, &event).await?, Opened::Before);

    let request = request_of(&store, &event).await?;
    assert_eq!((request.id, &request.person), (event.id, &event.person));
    assert_eq!((request.connector.as_str(), request.state), ("partners", RequestState::Pending));
    assert_eq!(request.event, event, "with the NUL and the number that jsonb does not keep");
    assert_eq!(request.requested_at, event.time);
    assert_eq!(request.expires_at, later().replace_nanosecond(0)?);
    assert_eq!(request.attempts, 1);
    assert_eq!((request.decided_at, &request.decided_by, &request.reason), (None, &None, &None));
    assert_eq!(standing(&store, &event).await?, Some(ApprovalState::Pending { since: event.time }));
    assert_eq!(unpublished(&store, 10).await?, []);
    let debug = format!("{request:?}");
    assert!(!debug.contains("ada") && !debug.contains("London"), "{debug}");
    Ok(())
}

pub(crate) async fn a_further_attempt_is_noted_and_changes_nothing_else(
    home: &Home,
) -> anyhow::Result<()> {
    let store = home.store().await?;
    let (first, second, third) = (pending(1, "ada"), pending(2, "ada"), pending(3, "ada"));
    let mut elsewhere = pending(4, "ada");
    elsewhere.sign_up.connector = "suppliers".parse()?;
    let somebody_else = pending(5, "eve");
    open(&store, &first).await?;
    let before = request_of(&store, &first).await?;

    for event in [&second, &third] {
        let expires_at = later() + Duration::from_secs(60);
        let opened = store.open_request(WORKER, event, expires_at, time_of(9)).await?;
        assert_eq!(opened, Opened::Noted { request: first.id });
        assert_eq!(open(&store, event).await?, Opened::Before);
    }
    assert_eq!(open(&store, &elsewhere).await?, Opened::Now);
    assert_eq!(open(&store, &somebody_else).await?, Opened::Now);

    let after = ApprovalRequest { attempts: 3, ..before };
    for event in [&first, &second, &third] {
        assert_eq!(request_of(&store, event).await?, after, "any of its events finds it");
    }
    assert_eq!(store.approval_request(unknown_event()).await?, None);
    assert_eq!(all(&store).await?.len(), 3);
    Ok(())
}

pub(crate) async fn attempts_at_once_open_one_request(home: &Home) -> anyhow::Result<()> {
    let store = home.store().await?;
    let mut tasks = JoinSet::new();
    for number in 0..20 {
        // Stores of their own, as in processes of their own.
        let store = if number % 5 == 0 { home.store().await? } else { store.clone() };
        tasks.spawn(async move { open(&store, &pending(number, "ada")).await });
    }
    let mut opened = Vec::new();
    while let Some(outcome) = tasks.join_next().await {
        opened.push(outcome??);
    }

    assert_eq!(opened.iter().filter(|it| **it == Opened::Now).count(), 1);
    let [request] = &all(&store).await?[..] else { anyhow::bail!("not one request") };
    assert_eq!(request.attempts, 20);
    let noted = Opened::Noted { request: request.id };
    assert_eq!(opened.iter().filter(|it| **it == noted).count(), 19);
    Ok(())
}

pub(crate) async fn of_many_approvers_at_once_one_decides(home: &Home) -> anyhow::Result<()> {
    let store = home.store().await?;
    let event = pending(1, "ada");
    open(&store, &event).await?;

    let mut tasks = JoinSet::new();
    for number in 0..20 {
        let store = if number % 5 == 0 { home.store().await? } else { store.clone() };
        let verdict = if number % 2 == 0 { Verdict::Approve } else { Verdict::Deny };
        let decision = reviewed(2, &event, verdict, &format!("approver-{number}"));
        tasks.spawn(async move {
            let decided = store.decide_request(&decision, time_of(2)).await?;
            Ok::<_, StoreError>((decision, decided))
        });
    }
    let (mut winners, mut losers) = (Vec::new(), Vec::new());
    while let Some(outcome) = tasks.join_next().await {
        match outcome?? {
            (decision, Decided::Now) => winners.push(decision),
            (_, Decided::Already(request)) => losers.push(*request),
            (_, other) => anyhow::bail!("{other:?}"),
        }
    }

    let [winner] = &winners[..] else { anyhow::bail!("{} decided", winners.len()) };
    assert_eq!(losers.len(), 19);
    let request = request_of(&store, &event).await?;
    let approval = winner.approval.clone().expect("a decision says whose it is");
    assert_eq!(request.decided_by.as_deref(), Some(approval.approver.as_str()));
    assert_eq!((request.reason.clone(), request.decided_at), (approval.reason, Some(time_of(2))));
    assert!(losers.iter().all(|told| *told == request), "each is told who decided what");
    assert_eq!(unpublished(&store, 100).await?, winners);
    let debug = format!("{request:?}");
    assert!(!debug.contains("approver") && !debug.contains("knows"), "{debug}");
    Ok(())
}

pub(crate) async fn a_decision_waits_in_the_outbox_until_it_is_published(
    home: &Home,
) -> anyhow::Result<()> {
    let store = home.store().await?;
    let mut decisions = Vec::new();
    // Not in the order of their ids: the order is that in which they were decided.
    for number in [3, 1, 2] {
        let event = pending(number, &format!("n{number}"));
        open(&store, &event).await?;
        let decision = reviewed(10 + number, &event, Verdict::Approve, "grace");
        assert_eq!(store.decide_request(&decision, time_of(20)).await?, Decided::Now);
        decisions.push(decision);
    }

    assert_eq!(unpublished(&store, 100).await?, decisions);
    assert_eq!(unpublished(&store, 2).await?, decisions[..2]);
    store.published(&[decisions[1].id, unknown_event()]).await?;
    assert_eq!(unpublished(&store, 100).await?, [decisions[0].clone(), decisions[2].clone()]);
    // Said again by another process that published the same.
    let ids: Vec<Uuid> = decisions.iter().map(|it| it.id).collect();
    store.published(&ids).await?;
    store.published(&[]).await?;

    assert_eq!(unpublished(&store, 100).await?, []);
    // The same decision again is none, and is not published again.
    assert_eq!(store.decide_request(&decisions[0], time_of(40)).await?, Decided::Now);
    assert_eq!(unpublished(&store, 100).await?, []);
    assert_eq!(
        standing(&store, &pending(1, "n1")).await?,
        Some(ApprovalState::Approved { at: time_of(20) })
    );
    Ok(())
}

pub(crate) async fn the_same_decision_again_is_still_the_decision(
    home: &Home,
) -> anyhow::Result<()> {
    let store = home.store().await?;
    let event = pending(1, "ada");
    open(&store, &event).await?;
    let decision = reviewed(2, &event, Verdict::Deny, "grace");
    let other = reviewed(3, &event, Verdict::Approve, "grace");

    // As by somebody whose connection was lost during the commit.
    for _ in 0..2 {
        assert_eq!(store.decide_request(&decision, time_of(2)).await?, Decided::Now);
    }

    let Decided::Already(request) = store.decide_request(&other, time_of(3)).await? else {
        anyhow::bail!("decided twice");
    };
    assert_eq!((request.state, request.decided_at), (RequestState::Denied, Some(time_of(2))));
    assert_eq!(unpublished(&store, 100).await?, [decision]);
    Ok(())
}

pub(crate) async fn a_request_expires_at_its_end_and_not_before(home: &Home) -> anyhow::Result<()> {
    let store = home.store().await?;
    let end = time_of(100).replace_nanosecond(0)?;
    let just_before = end - Duration::from_micros(1);
    let (event, decided, stays) = (pending(1, "ada"), pending(2, "eve"), pending(3, "joan"));
    for event in [&event, &decided] {
        // Whatever the fraction, the request ends with the second.
        let with_fraction = end + Duration::from_millis(987);
        store.open_request(WORKER, event, with_fraction, NOW).await?;
    }
    open(&store, &stays).await?;
    let make_event = |request: &ApprovalRequest| expired(200, &request.event);

    assert_eq!(store.expire_requests(just_before, make_event, 100).await?, 0);
    let in_time = reviewed(99, &decided, Verdict::Approve, "grace");
    assert_eq!(store.decide_request(&in_time, just_before).await?, Decided::Now);
    let too_late = reviewed(101, &event, Verdict::Approve, "grace");
    assert_eq!(store.decide_request(&too_late, end).await?, Decided::Expired);
    assert_eq!(request_of(&store, &event).await?.state, RequestState::Pending);
    assert_eq!(store.expire_requests(end, make_event, 0).await?, 0);
    assert_eq!(store.expire_requests(end, make_event, 100).await?, 1);
    assert_eq!(store.expire_requests(end, make_event, 100).await?, 0);

    assert_eq!(store.decide_request(&too_late, end).await?, Decided::Expired);
    assert_eq!(standing(&store, &event).await?, Some(ApprovalState::Expired { at: end }));
    assert_eq!(standing(&store, &stays).await?, Some(ApprovalState::Pending { since: stays.time }));
    assert_eq!(unpublished(&store, 100).await?, [in_time, expired(200, &event)]);
    Ok(())
}

pub(crate) async fn deciding_and_expiring_at_once_have_one_outcome(
    home: &Home,
) -> anyhow::Result<()> {
    let store = home.store().await?;
    let events: Vec<_> = (0..20).map(|number| pending(number, &format!("n{number}"))).collect();
    let end = time_of(100).replace_nanosecond(0)?;
    for event in &events {
        store.open_request(WORKER, event, end, NOW).await?;
    }

    // The approvers' clocks are behind, so that both may have it their way.
    let mut approvers = JoinSet::new();
    for event in events.clone() {
        let store = store.clone();
        let decision =
            reviewed(50, &event, Verdict::Approve, &event.sign_up.identities[0].issuer_assigned_id);
        approvers.spawn(async move { store.decide_request(&decision, time_of(50)).await });
    }
    let mut sweepers = JoinSet::new();
    for _ in 0..3 {
        let store = home.store().await?;
        sweepers.spawn(async move {
            let mut expired_by_this = 0;
            for _ in 0..10 {
                let make_event = |request: &ApprovalRequest| expired_as(&request.event);
                expired_by_this += store.expire_requests(end, make_event, 2).await?;
            }
            Ok::<_, StoreError>(expired_by_this)
        });
    }
    let (mut decided, mut swept) = (0_u64, 0);
    while let Some(outcome) = approvers.join_next().await {
        decided += u64::from(outcome?? == Decided::Now);
    }
    while let Some(outcome) = sweepers.join_next().await {
        swept += outcome??;
    }

    assert_eq!(decided + swept, 20);
    let mut told = about(&unpublished(&store, 100).await?);
    told.sort_unstable();
    assert_eq!(told, events.iter().map(|it| it.id).collect::<Vec<_>>());
    Ok(())
}

/// With an id of its own for each request.
fn expired_as(event: &SignUpEvent) -> SignUpEvent {
    let mut closing = expired(200, event);
    closing.id = Uuid::from_u128(closing.id.as_u128() ^ (event.id.as_u128() >> 64));
    closing
}

pub(crate) async fn giving_up_in_the_middle_leaves_no_decision_without_its_event(
    home: &Home,
) -> anyhow::Result<()> {
    let store = home.store().await?;
    let events: Vec<_> = (0..40).map(|number| pending(number, &format!("n{number}"))).collect();
    for event in &events {
        open(&store, event).await?;
    }
    let decision_about = |event: &SignUpEvent| {
        let name = &event.sign_up.identities[0].issuer_assigned_id;
        reviewed(50, event, Verdict::Approve, name)
    };

    let mut tasks = JoinSet::new();
    for (number, event) in (0_u64..).zip(&events) {
        let (store, decision) = (store.clone(), decision_about(event));
        let limit = Duration::from_micros(number * 100);
        tasks.spawn(tokio::time::timeout(limit, async move {
            store.decide_request(&decision, time_of(50)).await
        }));
    }
    let mut gave_up = 0;
    while let Some(outcome) = tasks.join_next().await {
        match outcome? {
            Ok(decided) => assert_eq!(decided?, Decided::Now),
            Err(_) => gave_up += 1,
        }
    }
    assert!(gave_up > 0, "nobody gave up, so nothing was tried");
    // What somebody gave up may yet become durable, so each of two reads may see more than the
    // one before, but never one thing without the other.
    let approved = all(&store).await?.into_iter().filter(|it| it.state == RequestState::Approved);
    let told = about(&unpublished(&store, 100).await?);
    assert!(approved.map(|it| it.id).all(|id| told.contains(&id)));
    for id in about(&unpublished(&store, 100).await?) {
        let request = store.approval_request(id).await?.expect("the request was opened");
        assert_eq!(request.state, RequestState::Approved);
    }

    for event in &events {
        let decided = store.decide_request(&decision_about(event), time_of(51)).await?;
        assert_eq!(decided, Decided::Now);
    }
    let mut told = about(&unpublished(&store, 100).await?);
    told.sort_unstable();
    assert_eq!(told, events.iter().map(|it| it.id).collect::<Vec<_>>());
    Ok(())
}

pub(crate) async fn who_was_denied_may_apply_again(home: &Home) -> anyhow::Result<()> {
    let store = home.store().await?;
    let (first, second, third) = (pending(1, "ada"), pending(10, "ada"), pending(20, "ada"));
    open(&store, &first).await?;
    let denied = reviewed(5, &first, Verdict::Deny, "grace");
    store.decide_request(&denied, time_of(5)).await?;
    assert_eq!(standing(&store, &first).await?, Some(ApprovalState::Denied { at: time_of(5) }));

    assert_eq!(open(&store, &second).await?, Opened::Now);
    let since = second.time;
    assert_eq!(standing(&store, &first).await?, Some(ApprovalState::Pending { since }));
    let make_event = |request: &ApprovalRequest| expired(15, &request.event);
    store.expire_requests(later(), make_event, 100).await?;
    assert_eq!(open(&store, &third).await?, Opened::Noted { request: second.id }, "before its end");
    let fourth = pending(2_000_000, "ada");
    assert_eq!(open(&store, &fourth).await?, Opened::Now);

    let states: Vec<_> = all(&store).await?.iter().map(|it| (it.id, it.state)).collect();
    assert_eq!(
        states,
        [
            (fourth.id, RequestState::Pending),
            (second.id, RequestState::Expired),
            (first.id, RequestState::Denied)
        ]
    );
    Ok(())
}

pub(crate) async fn what_happened_before_a_decision_is_settled_by_it(
    home: &Home,
) -> anyhow::Result<()> {
    let store = home.store().await?;
    let (early, first, late) = (pending(1, "ada"), pending(2, "ada"), pending(3, "ada"));
    let mut knowing = pending(20, "ada");
    knowing.decision.reasons = vec![Reason {
        rule: "suppliers".to_owned(),
        effect: Effect::AlreadyPending,
        mode: Mode::Enforce,
        failure: None,
        took_us: 0,
    }];
    open(&store, &first).await?;
    store.decide_request(&reviewed(5, &first, Verdict::Deny, "grace"), time_of(5)).await?;

    for event in [&early, &late, &knowing] {
        assert_eq!(open(&store, event).await?, Opened::Noted { request: first.id });
    }

    assert_eq!(request_of(&store, &knowing).await?.attempts, 4);
    assert_eq!(standing(&store, &first).await?, Some(ApprovalState::Denied { at: time_of(5) }));
    Ok(())
}

pub(crate) async fn an_approval_lasts(home: &Home) -> anyhow::Result<()> {
    let store = home.store().await?;
    let first = pending(1, "ada");
    open(&store, &first).await?;
    store.decide_request(&reviewed(5, &first, Verdict::Approve, "grace"), time_of(5)).await?;

    // From a connector that did not know, because the store was down.
    assert_eq!(open(&store, &pending(9, "ada")).await?, Opened::Noted { request: first.id });
    let make_event = |request: &ApprovalRequest| expired(15, &request.event);
    assert_eq!(store.expire_requests(time_of(2_000_000), make_event, 100).await?, 0);

    assert_eq!(standing(&store, &first).await?, Some(ApprovalState::Approved { at: time_of(5) }));
    Ok(())
}

pub(crate) async fn an_attempt_noted_once_stays_where_it_is(home: &Home) -> anyhow::Result<()> {
    let store = home.store().await?;
    let (first, noted, newest) = (pending(1, "ada"), pending(7, "ada"), pending(9, "ada"));
    open(&store, &first).await?;
    open(&store, &noted).await?;
    // The approver's clock is behind, so the noted attempt looks as if it came after the decision.
    store.decide_request(&reviewed(5, &first, Verdict::Deny, "grace"), time_of(5)).await?;
    open(&store, &newest).await?;

    // The whole stream again, as for a worker under a new name.
    for (event, request) in [(&first, &first), (&noted, &first), (&newest, &newest)] {
        let opened = store.open_request("approvals-2", event, later(), NOW).await?;
        assert_eq!(opened, Opened::Noted { request: request.id });
    }

    let attempts: Vec<_> = all(&store).await?.iter().map(|it| (it.id, it.attempts)).collect();
    assert_eq!(attempts, [(newest.id, 1), (first.id, 2)]);
    Ok(())
}

pub(crate) async fn requests_are_listed_page_by_page_the_newest_first(
    home: &Home,
) -> anyhow::Result<()> {
    let store = home.store().await?;
    for number in 0..10 {
        let mut event = pending(number, &format!("n{number}"));
        if number % 2 == 1 {
            event.sign_up.connector = "suppliers".parse()?;
        }
        open(&store, &event).await?;
        if number < 4 {
            let decision = reviewed(50, &event, Verdict::Deny, &format!("g{number}"));
            store.decide_request(&decision, time_of(50)).await?;
        }
    }
    let ids = |numbers: &[u32]| -> Vec<Uuid> {
        numbers.iter().map(|number| pending(*number, "").id).collect()
    };
    let list = async |filter: ApprovalFilter| -> anyhow::Result<Vec<Uuid>> {
        let filter = ApprovalFilter { limit: filter.limit.max(4), ..filter };
        Ok(store.approval_requests(&filter).await?.into_iter().map(|it| it.id).collect())
    };
    let any = ApprovalFilter::default;

    assert_eq!(list(any()).await?, ids(&[9, 8, 7, 6]));
    let next = ApprovalFilter { before: Some(pending(6, "").id), ..any() };
    assert_eq!(list(next).await?, ids(&[5, 4, 3, 2]));
    let open = ApprovalFilter { state: Some(RequestState::Pending), limit: 50, ..any() };
    assert_eq!(list(open).await?, ids(&[9, 8, 7, 6, 5, 4]));
    let suppliers = || Some("suppliers".parse().expect("a valid name"));
    assert_eq!(list(ApprovalFilter { connector: suppliers(), ..any() }).await?, ids(&[9, 7, 5, 3]));
    let all_at_once = ApprovalFilter {
        state: Some(RequestState::Denied),
        person: Some(pending(3, "n3").person),
        connector: suppliers(),
        before: Some(pending(4, "").id),
        ..any()
    };
    assert_eq!(list(all_at_once).await?, ids(&[3]));
    let nobody = ApprovalFilter { person: Some(event(1, "nobody").person), ..any() };
    assert!(list(nobody).await?.is_empty());
    assert_eq!(store.approval_requests(&any()).await?, [], "a limit of none");
    let no_limit = ApprovalFilter { limit: u32::MAX, ..any() };
    assert_eq!(list(no_limit).await?.len(), 10);
    Ok(())
}

pub(crate) async fn a_request_is_found_by_the_beginning_of_its_id(
    home: &Home,
) -> anyhow::Result<()> {
    let store = home.store().await?;
    let (first, noted, other) = (pending(1, "ada"), pending(2, "ada"), pending(1_000, "eve"));
    for event in [&first, &noted, &other] {
        open(&store, event).await?;
    }
    let found = async |prefix: &str| -> anyhow::Result<Vec<Uuid>> {
        Ok(store.approval_requests_like(prefix).await?.into_iter().map(|it| it.id).collect())
    };

    let whole = first.id.to_string();
    for prefix in [&whole, &whole.to_uppercase(), &first.id.simple().to_string(), &whole[..13]] {
        assert_eq!(found(prefix).await?, [first.id], "{prefix}");
    }
    assert_eq!(found(&noted.id.to_string()).await?, [first.id], "by an attempt noted on it");
    assert_eq!(found(&whole[..4]).await?, [first.id, other.id], "not unique");
    for prefix in ["", "ffff", "' OR 1=1", "%", &format!("{whole}0")] {
        assert!(found(prefix).await?.is_empty(), "{prefix}");
    }
    Ok(())
}

pub(crate) async fn what_is_no_decision_decides_nothing(home: &Home) -> anyhow::Result<()> {
    let store = home.store().await?;
    let event = pending(1, "ada");
    open(&store, &event).await?;

    let unknown = reviewed(2, &pending(7, "eve"), Verdict::Approve, "grace");
    assert_eq!(store.decide_request(&unknown, time_of(2)).await?, Decided::NotFound);
    for no_decision in [&event, &expired(2, &event)] {
        let error = store.decide_request(no_decision, time_of(2)).await.expect_err("no decision");
        assert!(matches!(error, StoreError::Refused(_)), "{error:?}");
    }
    // About another request than the one it was asked for.
    let wrong = |_: &ApprovalRequest| expired(2, &pending(7, "eve"));
    let error = store.expire_requests(later(), wrong, 10).await.expect_err("no decision");
    assert!(matches!(error, StoreError::Refused(_)), "{error:?}");

    assert_eq!(request_of(&store, &event).await?.state, RequestState::Pending);
    assert_eq!(unpublished(&store, 10).await?, []);
    let mut nul = reviewed(3, &event, Verdict::Approve, "gra\0ce'; --");
    if let Some(approval) = &mut nul.approval {
        approval.reason = None;
    }
    assert_eq!(store.decide_request(&nul, time_of(3)).await?, Decided::Now);
    let request = request_of(&store, &event).await?;
    assert_eq!(request.decided_by.as_deref(), Some("gra\u{fffd}ce'; --"));
    assert_eq!(request.reason, None);
    assert_eq!(unpublished(&store, 10).await?, [nul]);
    Ok(())
}

pub(crate) async fn what_became_of_a_sign_up_changes_the_person_and_is_no_sign_up(
    home: &Home,
) -> anyhow::Result<()> {
    let store = home.store().await?;
    let kinds = |name: &str| {
        let event = pending(if name == "ada" { 1 } else { 5 }, name);
        let approved = reviewed(6, &event, Verdict::Approve, name);
        let denied = reviewed(7, &event, Verdict::Deny, name);
        let abandoned = expired(8, &event);
        [event, approved, denied, abandoned]
    };

    // In order, and each a second time by redelivery and by another worker.
    for event in kinds("ada") {
        assert_eq!(store.record_sign_up("database", &event, NOW).await?, Done::Now);
        assert_eq!(store.record_sign_up("database", &event, NOW).await?, Done::Before);
        store.record_sign_up("database-2", &event, NOW).await?;
        let person = store.person(&event.person).await?.expect("the person was recorded");
        assert_eq!((person.status.as_str(), person.last_event), (event.kind.as_str(), event.id));
        assert_eq!(person.changes, 1, "{}", event.kind);
        let counted = u32::from(event.id == kinds("ada")[0].id);
        let effects = store.effects(&[event.id]).await?[&event.id];
        assert_eq!((effects.sign_ups, effects.person_changes), (counted, counted));
    }

    // What was decided comes before what it was decided about.
    let [event, approved, ..] = kinds("eve");
    for event in [&approved, &event] {
        assert_eq!(store.record_sign_up("database", event, NOW).await?, Done::Now);
    }
    let person = store.person(&event.person).await?.expect("the person was recorded");
    assert_eq!((person.status.as_str(), person.changes), ("approved", 1));
    assert_eq!((person.first_event, person.last_event), (event.id, approved.id));
    assert_eq!(person.claims["city"], "London", "what rules had changed is approved with it");
    assert_eq!(person.claims["extension_1_Note"], "a\u{fffd}b");

    // An accepted sign-up after the approval counts as its own.
    let accepted = crate::home::event(9, "eve");
    store.record_sign_up("database", &accepted, NOW).await?;
    let person = store.person(&event.person).await?.expect("the person was recorded");
    assert_eq!((person.status.as_str(), person.changes), ("accepted", 2));
    Ok(())
}

pub(crate) async fn a_database_of_the_version_before_is_brought_up_to_date(
    home: &Home,
) -> anyhow::Result<()> {
    let store = home.store().await?;
    // As the version before left it.
    home.execute(
        "DROP TABLE approval_attempts; DROP TABLE approval_requests; DROP TABLE outbox;
         DELETE FROM _sqlx_migrations WHERE version = 2;",
    )
    .await?;
    assert!(!store.schema_is_current().await?);
    let sign_up = event(1, "ada");
    assert_eq!(store.record_sign_up("database", &sign_up, NOW).await?, Done::Now);
    let error = open(&store, &pending(2, "ada")).await.expect_err("there are no tables");
    assert!(matches!(error, StoreError::Misconfigured(_)), "{error:?}");

    store.migrate().await?;

    assert!(store.schema_is_current().await?);
    assert_eq!(open(&store, &pending(2, "ada")).await?, Opened::Now);
    assert_eq!(store.record_sign_up("database", &sign_up, NOW).await?, Done::Before);
    Ok(())
}
