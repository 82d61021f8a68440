//! Dead letters, on both dialects.

use std::time::Duration;

use time::OffsetDateTime;
use tokio::task::JoinSet;
use vestibule_events::{SignUpEvent, Undecodable};
use vestibule_store::{
    AfterFailure, Done, Effects, Failed, Letter, LetterChange, LetterFilter, LetterGroup,
    LetterState, LetterWhole, Redriven, Standing, Store, StoreError,
};
use vestibule_testkit::eventually;

use crate::{
    home::{Home, NOW, event, failed, given_up_after, time_of},
    retries::{INTERRUPTIONS, WORKER, consistent, park, wait},
};

const LEASE: Duration = Duration::from_secs(30);

async fn parked(store: &Store, event: &SignUpEvent) -> anyhow::Result<i64> {
    match park(store, event).await? {
        Failed::Parked { letter } => Ok(letter),
        other => anyhow::bail!("{other:?}"),
    }
}

async fn whole(store: &Store, id: i64) -> anyhow::Result<LetterWhole> {
    store.letter(id).await?.ok_or_else(|| anyhow::anyhow!("there is no letter {id}"))
}

async fn states(store: &Store) -> Result<Vec<LetterState>, StoreError> {
    let mut letters = store.letters(&LetterFilter::default(), None, 1_000).await?;
    letters.reverse();
    Ok(letters.into_iter().map(|it| it.state).collect())
}

fn moved(moved: u32) -> Redriven {
    Redriven { moved, ..Redriven::default() }
}

fn undecodable(raw: &[u8]) -> Undecodable {
    Undecodable { raw: raw.to_vec(), reason: "Syntax error at line 1 column 1".to_owned() }
}

pub(crate) async fn what_happens_to_a_letter_is_kept(home: &Home) -> anyhow::Result<()> {
    let store = home.store().await?;
    let event = event(1, "ada");
    let effects = async || anyhow::Ok(store.effects(&[event.id]).await?[&event.id].dead_letters);
    let at = |number: u32| time_of(number) + Duration::from_millis(number.into());
    let fail = async |number, fate| {
        let outcome = store.fail(&failed(WORKER, &event, number), move |_| fate).await?;
        anyhow::Ok(outcome)
    };

    let Failed::Parked { letter: id } = fail(1, AfterFailure::Park).await? else {
        anyhow::bail!("it was not parked");
    };
    let letter = Letter {
        id,
        worker: WORKER.to_owned(),
        event_id: Some(event.id),
        person: Some(event.person.clone()),
        sequence: 1,
        cause_class: "timeout".to_owned(),
        error: "no answer to request 1".to_owned(),
        state: LetterState::Parked,
        parked_at: at(1),
        changed_at: at(1),
        redrives: 0,
    };
    assert_eq!(whole(&store, id).await?.letter, letter);
    assert_eq!(effects().await?, 1);

    // Sent back, tried twice, parked again, sent back, delivered.
    assert_eq!(store.redrive(&[id], |_| at(3), "grace", at(2)).await?, moved(1));
    let sent_back =
        Letter { state: LetterState::Retrying, changed_at: at(2), redrives: 1, ..letter.clone() };
    assert_eq!(whole(&store, id).await?.letter, sent_back);
    assert_eq!(effects().await?, 0, "it still waits for its effect");
    assert_eq!(store.next_retry(WORKER).await?, Some(at(3)));
    let claimed = store.claim_retries(WORKER, at(3), LEASE, 10).await?;
    assert_eq!((claimed[0].tries, claimed[0].failing_since), (0, None));
    fail(4, AfterFailure::Retry { due_at: at(5) }).await?;
    assert_eq!(fail(5, AfterFailure::Park).await?, Failed::Parked { letter: id });
    let again = Letter {
        error: "no answer to request 5".to_owned(),
        changed_at: at(5),
        redrives: 1,
        ..letter.clone()
    };
    assert_eq!(whole(&store, id).await?.letter, again);
    assert_eq!(store.redrive(&[id], |_| NOW, "eve", at(6)).await?, moved(1));
    store.finish_retry(WORKER, event.id, at(7)).await?;
    store.finish_retry(WORKER, event.id, at(8)).await?;

    let LetterWhole { letter, payload, history, attempts } = whole(&store, id).await?;
    assert_eq!((letter.state, letter.redrives), (LetterState::Delivered, 2));
    assert_eq!((letter.parked_at, letter.changed_at), (at(1), at(7)));
    assert_eq!(payload, serde_json::to_vec(&event)?);
    let parked = |number: u32| LetterChange {
        at: at(number),
        state: LetterState::Parked,
        cause_class: Some("timeout".to_owned()),
        error: Some(format!("no answer to request {number}")),
        actor: None,
        reason: None,
    };
    let changed = |number, state, actor: Option<&str>| LetterChange {
        at: at(number),
        state,
        cause_class: None,
        error: None,
        actor: actor.map(str::to_owned),
        reason: None,
    };
    let expected = [
        parked(1),
        changed(2, LetterState::Retrying, Some("grace")),
        parked(5),
        changed(6, LetterState::Retrying, Some("eve")),
        changed(7, LetterState::Delivered, None),
    ];
    assert_eq!(history, expected);
    let expected: Vec<_> = [1, 4, 5].map(|it| failed(WORKER, &event, it).attempt).into();
    assert_eq!(attempts, expected);
    assert_eq!(effects().await?, 0);
    assert_eq!(store.letter(id + 1).await?, None);
    let debug = format!("{:?}", whole(&store, id).await?);
    assert!(!debug.contains("ada") && !debug.contains("London"), "{debug}");
    Ok(())
}

pub(crate) async fn only_what_is_parked_is_sent_back_at_the_pace_asked_for(
    home: &Home,
) -> anyhow::Result<()> {
    let store = home.store().await?;
    let mut ids = Vec::new();
    for number in 0..6 {
        ids.push(parked(&store, &event(number, "ada")).await?);
    }
    store.drop_letters(&ids[1..2], "grace", "a test", NOW).await?;
    store.redrive(&ids[2..3], |_| NOW, "grace", NOW).await?;

    // In any order, twice, and one that there is not.
    let asked = [ids[5], ids[0], ids[1], ids[2], ids[0], ids[3], i64::MAX];
    let redriven = store.redrive(&asked, |n| time_of(10 * (n + 1)), "eve", NOW).await?;

    assert_eq!(redriven, Redriven { moved: 3, skipped: 3, undecodable: vec![] });
    let due = async |at| {
        let claimed = store.claim_retries(WORKER, time_of(at), LEASE, 10).await?;
        anyhow::Ok(claimed.into_iter().map(|it| it.event_id).collect::<Vec<_>>())
    };
    assert_eq!(due(9).await?, [event(2, "ada").id], "that was sent back before");
    assert_eq!(due(10).await?, [event(0, "ada").id]);
    assert_eq!(due(20).await?, [event(3, "ada").id]);
    assert!(due(29).await?.is_empty());
    assert_eq!(due(30).await?, [event(5, "ada").id]);
    use LetterState::{Dropped, Parked, Retrying};
    let expected = [Retrying, Dropped, Retrying, Retrying, Parked, Retrying];
    assert_eq!(states(&store).await?, expected);
    assert_eq!(store.redrive(&[], |_| NOW, "eve", NOW).await?, moved(0));
    Ok(())
}

pub(crate) async fn a_letter_is_dropped_only_with_a_reason(home: &Home) -> anyhow::Result<()> {
    let store = home.store().await?;
    let event = event(1, "ada");
    let id = parked(&store, &event).await?;

    for blank in ["", " \t\n"] {
        let error = store.drop_letters(&[id], "grace", blank, NOW).await.expect_err("no reason");
        assert!(matches!(error, StoreError::Refused(_)), "{error:?}");
    }
    assert_eq!(whole(&store, id).await?.letter.state, LetterState::Parked);
    let ids = [id, id, i64::MAX];
    let drop = || store.drop_letters(&ids, "grace", "a\0 test", time_of(5));
    assert_eq!(drop().await?, 1);
    assert_eq!(drop().await?, 0);

    let LetterWhole { letter, history, .. } = whole(&store, id).await?;
    assert_eq!((letter.state, letter.changed_at), (LetterState::Dropped, time_of(5)));
    let [_, dropped] = &history[..] else { anyhow::bail!("{history:?}") };
    assert_eq!((dropped.state, dropped.at), (LetterState::Dropped, time_of(5)));
    assert_eq!(dropped.actor.as_deref(), Some("grace"));
    assert_eq!(dropped.reason.as_deref(), Some("a\u{fffd} test"));
    assert_eq!(store.redrive(&[id], |_| NOW, "eve", NOW).await?.skipped, 1);
    assert_eq!(store.effects(&[event.id]).await?[&event.id].dead_letters, 1);

    // Another attempt was under way and succeeded: that is a fact.
    store.finish_retry(WORKER, event.id, time_of(6)).await?;
    assert_eq!(whole(&store, id).await?.letter.state, LetterState::Delivered);
    assert_eq!(store.effects(&[event.id]).await?[&event.id], Effects::default());
    Ok(())
}

pub(crate) async fn what_is_no_event_is_kept_once_for_each_content(
    home: &Home,
) -> anyhow::Result<()> {
    let store = home.store().await?;
    let long = "x".repeat(100_000);
    let contents: [&[u8]; 4] =
        [b"\0\xff not JSON", b"\0\xff not JSON either", b"", long.as_bytes()];
    for round in [Done::Now, Done::Before] {
        for content in contents {
            let done = store.park_undecodable(WORKER, 8, &undecodable(content), NOW).await?;
            assert_eq!(done, round);
        }
    }
    for (worker, sequence) in [(WORKER, 9), ("permissions", 8)] {
        let done = store.park_undecodable(worker, sequence, &undecodable(b""), NOW).await?;
        assert_eq!(done, Done::Now);
    }

    let letters = store.letters(&LetterFilter::default(), None, 10).await?;
    assert_eq!(letters.len(), 6);
    let first = whole(&store, letters[5].id).await?;
    assert_eq!((first.letter.event_id, &first.letter.person), (None, &None));
    assert_eq!((first.letter.cause_class.as_str(), first.letter.sequence), ("undecodable", 8));
    assert_eq!(first.payload, contents[0]);
    assert_eq!((first.history.len(), first.attempts.len()), (1, 0));
    let debug = format!("{first:?}");
    assert!(!debug.contains("not JSON"), "{debug}");

    let ids: Vec<_> = letters.iter().rev().map(|it| it.id).collect();
    let redriven = store.redrive(&ids, |_| NOW, "grace", NOW).await?;
    assert_eq!(redriven, Redriven { undecodable: ids, ..Redriven::default() });
    assert_eq!(store.letters(&LetterFilter::default(), None, 10).await?, letters);
    consistent(&store).await
}

pub(crate) async fn what_was_no_event_may_be_one_for_this_version(
    home: &Home,
) -> anyhow::Result<()> {
    let store = home.store().await?;
    let (readable, known) = (event(1, "ada"), event(2, "ada"));
    // As if the version that parked them had not known them.
    for (sequence, event) in [(1, &readable), (2, &known), (3, &readable)] {
        let raw = undecodable(&serde_json::to_vec(event)?);
        store.park_undecodable(WORKER, sequence, &raw, NOW).await?;
    }
    let of_known = parked(&store, &known).await?;
    let letters = store.letters(&LetterFilter::default(), None, 10).await?;
    let ids: Vec<_> = letters.iter().rev().map(|it| it.id).take(3).collect();

    let redriven = store.redrive(&ids, |_| NOW, "grace", NOW).await?;

    // The second is about an event that has a letter of its own, and so is the third.
    assert_eq!(redriven, Redriven { moved: 1, skipped: 2, undecodable: vec![] });
    assert_eq!(store.standing(WORKER, readable.id).await?, Standing::Waiting);
    let claimed = store.claim_retries(WORKER, NOW, LEASE, 10).await?;
    assert_eq!(claimed.len(), 1);
    assert_eq!(serde_json::from_slice::<SignUpEvent>(&claimed[0].payload)?, readable);
    assert_eq!((&claimed[0].person, claimed[0].sequence), (&readable.person, 1));
    store.finish_retry(WORKER, readable.id, NOW).await?;
    let first = whole(&store, ids[0]).await?.letter;
    assert_eq!((first.event_id, first.state), (Some(readable.id), LetterState::Delivered));
    assert_eq!(first.person, Some(readable.person));
    assert_eq!(whole(&store, of_known).await?.letter.state, LetterState::Parked);
    consistent(&store).await
}

pub(crate) async fn letters_are_found_page_by_page_and_group_by_group(
    home: &Home,
) -> anyhow::Result<()> {
    let store = home.store().await?;
    let mut ids = Vec::new();
    for number in 0..12_u32 {
        let worker = if number % 2 == 0 { WORKER } else { "permissions" };
        let mut failed = failed(worker, &event(number, &format!("n{}", number % 5)), number);
        if number % 3 == 0 {
            failed.attempt.cause_class = "refused".to_owned();
        }
        match store.fail(&failed, |_| AfterFailure::Park).await? {
            Failed::Parked { letter } => ids.push(letter),
            other => anyhow::bail!("{other:?}"),
        }
    }
    store.drop_letters(&ids[..3], "grace", "a test", NOW).await?;
    let any = LetterFilter::default;
    // By the numbers of the events, which the letters' errors tell.
    let found = async |filter: LetterFilter| -> anyhow::Result<Vec<usize>> {
        let letters = store.letters(&filter, None, 100).await?;
        let ascending = store.letter_ids(&filter, 0, 100).await?;
        assert!(letters.iter().rev().map(|it| it.id).eq(ascending.iter().copied()));
        Ok(ascending.iter().filter_map(|id| ids.iter().position(|it| it == id)).collect())
    };

    assert_eq!(found(any()).await?, (0..12).collect::<Vec<_>>());
    let filter = LetterFilter { worker: Some(WORKER.to_owned()), ..any() };
    assert_eq!(found(filter).await?, [0, 2, 4, 6, 8, 10]);
    let filter = LetterFilter { cause_class: Some("refused".to_owned()), ..any() };
    assert_eq!(found(filter).await?, [0, 3, 6, 9]);
    let filter = LetterFilter { state: Some(LetterState::Dropped), ..any() };
    assert_eq!(found(filter).await?, [0, 1, 2]);
    let filter = LetterFilter { event_id: Some(event(7, "").id), ..any() };
    assert_eq!(found(filter).await?, [7]);
    let filter = LetterFilter { person: Some(event(1, "n1").person), ..any() };
    assert_eq!(found(filter).await?, [1, 6, 11]);
    let filter = LetterFilter { ids: vec![ids[4], ids[2], i64::MAX], ..any() };
    assert_eq!(found(filter).await?, [2, 4]);
    let filter = LetterFilter { parked_from: Some(time_of(9)), ..any() };
    assert_eq!(found(filter).await?, [9, 10, 11], "to the second");
    let filter = LetterFilter { parked_before: Some(time_of(2)), ..any() };
    assert_eq!(found(filter).await?, [0, 1]);
    let all_at_once = LetterFilter {
        ids: ids.clone(),
        worker: Some(WORKER.to_owned()),
        cause_class: Some("timeout".to_owned()),
        state: Some(LetterState::Parked),
        event_id: Some(event(4, "").id),
        person: Some(event(4, "n4").person),
        parked_from: Some(time_of(4)),
        parked_before: Some(time_of(5)),
    };
    assert_eq!(found(all_at_once).await?, [4]);

    // Pages in both directions.
    let page = |before| {
        let store = store.clone();
        async move {
            let page = store.letters(&any(), before, 5).await?;
            anyhow::Ok(page.into_iter().map(|it| it.id).collect::<Vec<_>>())
        }
    };
    let newest_first: Vec<_> = ids.iter().rev().copied().collect();
    assert_eq!(page(None).await?, newest_first[..5]);
    assert_eq!(page(Some(newest_first[4])).await?, newest_first[5..10]);
    assert_eq!(page(Some(newest_first[9])).await?, newest_first[10..]);
    assert_eq!(store.letter_ids(&any(), ids[6], 3).await?, ids[7..10]);

    let filter = LetterFilter { state: Some(LetterState::Parked), ..any() };
    let at = |number: u32| time_of(number) + Duration::from_millis(number.into());
    let group = |worker: &str, cause: &str, count, oldest, newest| LetterGroup {
        worker: worker.to_owned(),
        cause_class: cause.to_owned(),
        count,
        oldest: at(oldest),
        newest: at(newest),
        sample_error: format!("no answer to request {newest}"),
    };
    let expected = [
        group(WORKER, "refused", 1, 6, 6),
        group(WORKER, "timeout", 3, 4, 10),
        group("permissions", "refused", 2, 3, 9),
        group("permissions", "timeout", 3, 5, 11),
    ];
    assert_eq!(store.letter_groups(&filter).await?, expected);
    let nobody = LetterFilter { worker: Some("nobody".to_owned()), ..any() };
    assert_eq!(store.letter_groups(&nobody).await?, []);
    Ok(())
}

pub(crate) async fn a_redrive_interrupted_anywhere_has_happened_or_not(
    home: &Home,
) -> anyhow::Result<()> {
    const LETTERS: u32 = 3;
    let store = home.store().await?;
    let mut interrupted = 0;
    for round in 0..INTERRUPTIONS {
        let mut ids = Vec::new();
        for number in 0..LETTERS {
            ids.push(parked(&store, &event(round * LETTERS + number, "ada")).await?);
        }
        let filter = LetterFilter { ids: ids.clone(), ..LetterFilter::default() };
        let in_state = async |state| {
            let filter = LetterFilter { state: Some(state), ..filter.clone() };
            store.letter_ids(&filter, 0, 10).await
        };

        let redrive = store.redrive(&ids, |_| NOW, "grace", NOW);
        let ended = given_up_after(round % 24, redrive).await;

        // A commit that nobody waited for may yet come, between two of our reads even.
        let limit = Duration::from_secs(20);
        eventually(limit, "all letters are sent back or none", async || {
            let sent_back = in_state(LetterState::Retrying).await;
            sent_back.is_ok_and(|it| it.is_empty() || it == ids)
        })
        .await?;
        let again = store.redrive(&ids, |_| NOW, "grace", NOW).await?;
        assert_eq!(in_state(LetterState::Retrying).await?, ids);
        assert!([(0, LETTERS), (LETTERS, 0)].contains(&(again.moved, again.skipped)), "{again:?}");
        match ended {
            Some(outcome) => {
                assert_eq!(outcome?, moved(LETTERS));
                assert_eq!(again.skipped, LETTERS);
            }
            None => interrupted += 1,
        }
    }
    assert!(interrupted > 0, "nothing was interrupted, so nothing was tried");
    consistent(&store).await
}

pub(crate) async fn whatever_happens_at_once_each_letter_has_one_fate(
    home: &Home,
) -> anyhow::Result<()> {
    const LETTERS: u32 = 60;
    let stores = [home.store().await?, home.store().await?];
    let mut ids = Vec::new();
    for number in 0..LETTERS {
        ids.push(parked(&stores[0], &event(number, "ada")).await?);
    }
    let now = || OffsetDateTime::now_utc().max(NOW + Duration::from_secs(1_000));

    let mut tasks: JoinSet<Result<u32, StoreError>> = JoinSet::new();
    for store in &stores {
        // In batches that overlap, and not in order.
        for some in ids.chunks(20).chain([&ids[10..50]]) {
            let (store, mut some) = (store.clone(), some.to_vec());
            some.reverse();
            tasks.spawn(async move {
                store.redrive(&some, |_| NOW, "grace", now()).await.map(|it| it.moved)
            });
        }
        for some in ids.chunks(15) {
            let (store, some) = (store.clone(), some.to_vec());
            tasks.spawn(async move {
                store.drop_letters(&some[..4], "eve", "a test", now()).await.map(|_| 0)
            });
        }
        for number in 0..LETTERS {
            let store = store.clone();
            let event = event(number, "ada");
            tasks.spawn(async move {
                // Two processes that both have it in hand: a late redelivery, a lease that ran out.
                let mut failed = failed(WORKER, &event, 2);
                failed.attempt.started_at = now();
                match number % 3 {
                    0 => store.finish_retry(WORKER, event.id, now()).await?,
                    1 => drop(store.fail(&failed, |_| AfterFailure::Park).await?),
                    _ => drop(wait(&store, &failed, NOW).await?),
                }
                Ok(0)
            });
        }
    }
    while let Some(outcome) = tasks.join_next().await {
        outcome??;
    }

    consistent(&stores[0]).await?;
    let states = states(&stores[1]).await?;
    for (number, state) in states.iter().enumerate().filter(|(number, _)| number % 3 == 0) {
        assert_eq!(*state, LetterState::Delivered, "{number}");
    }
    assert_eq!(states.len(), ids.len());
    Ok(())
}

pub(crate) async fn letters_of_the_version_before_have_their_history(
    home: &Home,
) -> anyhow::Result<()> {
    let store = home.store().await?;
    // As the version before writes them, which may still run during a roll-out.
    let (blob, time) = match home {
        Home::Sqlite(_) => ("x'7B7D'", "'2026-11-22T10:00:00Z'"),
        Home::Postgres(_) => ("'\\x7B7D'::bytea", "'2026-11-22T10:00:00Z'"),
    };
    for number in 1..=3 {
        let id = event(number, "ada").id;
        let id = match home {
            Home::Sqlite(_) => format!("x'{}'", id.simple()),
            Home::Postgres(_) => format!("'{id}'"),
        };
        home.execute(&format!(
            "INSERT INTO dead_letters (worker, event_id, person, sequence, payload, cause_class,
                 error, parked_at)
             VALUES ('{WORKER}', {id}, 'p', 7, {blob}, 'refused', 'no', {time})"
        ))
        .await?;
    }
    let letters = store.letters(&LetterFilter::default(), None, 10).await?;
    let ids: Vec<_> = letters.iter().rev().map(|it| it.id).collect();
    for letter in &letters {
        assert_eq!((letter.state, letter.changed_at), (LetterState::Parked, letter.parked_at));
        assert_eq!(whole(&store, letter.id).await?.history.len(), 1);
    }

    store.redrive(&ids[..1], |_| NOW, "grace", NOW).await?;
    store.drop_letters(&ids[1..2], "grace", "a test", NOW).await?;
    store.finish_retry(WORKER, event(3, "ada").id, NOW).await?;

    for id in ids {
        let LetterWhole { letter, history, .. } = whole(&store, id).await?;
        let [first, second] = &history[..] else { anyhow::bail!("{history:?}") };
        assert_eq!((first.state, first.at), (LetterState::Parked, letter.parked_at));
        assert_eq!(first.cause_class.as_deref(), Some("refused"));
        assert_eq!((second.state, second.at), (letter.state, NOW));
    }
    Ok(())
}
