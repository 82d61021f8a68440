//! What waits in the store, on both dialects.

use std::{collections::BTreeMap, time::Duration};

use time::OffsetDateTime;
use tokio::task::JoinSet;
use uuid::Uuid;
use vestibule_events::SignUpEvent;
use vestibule_store::{
    AfterFailure, Failed, FailedEvent, Failures, LetterFilter, LetterState, Retry, SetAside,
    Standing, Store, StoreError,
};
use vestibule_testkit::eventually;

use crate::home::{Home, NOW, event, failed, given_up_after, time_of, unknown_event};

pub(crate) const WORKER: &str = "notify";
const LEASE: Duration = Duration::from_secs(30);

/// How often something is interrupted. At which statement depends on how fast the database answers,
/// so each point is tried several times.
pub(crate) const INTERRUPTIONS: u32 = 48;

fn second(number: u64) -> OffsetDateTime {
    NOW + Duration::from_secs(number)
}

pub(crate) async fn wait(
    store: &Store,
    failed: &FailedEvent,
    due_at: OffsetDateTime,
) -> Result<Failed, StoreError> {
    store.fail(failed, |_| AfterFailure::Retry { due_at }).await
}

pub(crate) async fn park(store: &Store, event: &SignUpEvent) -> Result<Failed, StoreError> {
    store.fail(&failed(WORKER, event, 1), |_| AfterFailure::Park).await
}

async fn claim(store: &Store, now: OffsetDateTime) -> Result<Vec<Uuid>, StoreError> {
    let claimed = store.claim_retries(WORKER, now, LEASE, 100).await?;
    Ok(claimed.into_iter().map(|it| it.event_id).collect())
}

pub(crate) async fn a_failed_event_waits_until_it_is_due(home: &Home) -> anyhow::Result<()> {
    let store = home.store().await?;
    let event = event(1, "ada");
    let failed = failed(WORKER, &event, 1);
    let due_at = second(10) + Duration::from_millis(500);
    assert_eq!(store.standing(WORKER, event.id).await?, Standing::Open);
    assert_eq!(store.next_retry(WORKER).await?, None);

    assert_eq!(wait(&store, &failed, due_at).await?, Failed::Waits { due_at });

    assert_eq!(store.standing(WORKER, event.id).await?, Standing::Waiting);
    assert_eq!(store.standing("permissions", event.id).await?, Standing::Open);
    assert_eq!(store.next_retry(WORKER).await?, Some(due_at));
    assert!(claim(&store, due_at - Duration::from_micros(1)).await?.is_empty());
    let claimed = store.claim_retries(WORKER, due_at, LEASE, 100).await?;
    let expected = Retry {
        event_id: event.id,
        person: event.person.clone(),
        sequence: 1,
        payload: serde_json::to_vec(&event)?,
        tries: 1,
        failing_since: Some(failed.attempt.started_at),
    };
    assert_eq!(claimed, [expected]);
    assert_eq!(store.attempts_of(event.id).await?, std::slice::from_ref(&failed.attempt));
    let debug = format!("{claimed:?} {failed:?}");
    assert!(!debug.contains("ada") && !debug.contains("London"), "{debug}");

    // Whoever claimed it has it until the lease runs out.
    assert_eq!(store.next_retry(WORKER).await?, Some(due_at + LEASE));
    assert!(claim(&store, due_at + LEASE - Duration::from_micros(1)).await?.is_empty());
    assert_eq!(claim(&store, due_at + LEASE).await?, [event.id], "who had it has died");
    store.finish_retry(WORKER, event.id, NOW).await?;
    store.finish_retry(WORKER, event.id, NOW).await?;
    assert_eq!(store.standing(WORKER, event.id).await?, Standing::Open);
    assert!(claim(&store, second(1_000_000)).await?.is_empty());
    Ok(())
}

pub(crate) async fn what_is_due_comes_by_how_long_it_has_been(home: &Home) -> anyhow::Result<()> {
    let store = home.store().await?;
    // Whole seconds among fractions: as text they sort otherwise.
    let due = [(1, 4_000), (2, 3_500), (3, 3_000), (4, 9_999), (5, 1_001), (6, 1_000), (7, 10_000)];
    for (number, milliseconds) in due {
        let due_at = time_of(0).replace_nanosecond(0)? + Duration::from_millis(milliseconds);
        wait(&store, &failed(WORKER, &event(number, "ada"), 1), due_at).await?;
        wait(&store, &failed("permissions", &event(number, "ada"), 1), NOW).await?;
    }
    let claim = async |milliseconds, limit| -> anyhow::Result<Vec<Uuid>> {
        let now = time_of(0).replace_nanosecond(0)? + Duration::from_millis(milliseconds);
        let claimed = store.claim_retries(WORKER, now, LEASE, limit).await?;
        Ok(claimed.into_iter().map(|it| it.event_id).collect())
    };
    let ids = |numbers: &[u32]| -> Vec<Uuid> {
        numbers.iter().map(|number| event(*number, "ada").id).collect()
    };

    assert_eq!(claim(1_000, 10).await?, ids(&[6]));
    assert_eq!(claim(9_000, 2).await?, ids(&[3, 5]), "the two that were due first, in their order");
    assert_eq!(claim(9_000, 10).await?, ids(&[1, 2]));
    assert!(claim(9_000, 10).await?.is_empty());
    assert_eq!(claim(10_000, 10).await?, ids(&[4, 7]));
    Ok(())
}

pub(crate) async fn a_lease_is_extended_or_given_back(home: &Home) -> anyhow::Result<()> {
    let store = home.store().await?;
    let [one, two, three] = [1, 2, 3].map(|number| event(number, "ada"));
    for event in [&one, &two, &three] {
        wait(&store, &failed(WORKER, event, 1), second(1)).await?;
    }
    assert_eq!(claim(&store, second(1)).await?, [one.id, two.id, three.id]);

    store.extend_retries(WORKER, &[one.id, unknown_event()], second(100)).await?;
    store.extend_retries(WORKER, &[], second(100)).await?;
    store.extend_retries("permissions", &[two.id], second(100)).await?;
    store.release_retry(WORKER, two.id, second(2)).await?;
    store.release_retry(WORKER, unknown_event(), second(2)).await?;

    assert_eq!(claim(&store, second(2)).await?, [two.id]);
    assert_eq!(claim(&store, second(99)).await?, [two.id, three.id]);
    let again = store.claim_retries(WORKER, second(100), LEASE, 1).await?;
    assert_eq!((again[0].event_id, again[0].tries), (one.id, 1), "it cost no try");

    // A heartbeat that comes late does not cut the pause short that was chosen meanwhile.
    wait(&store, &failed(WORKER, &one, 2), second(5_000)).await?;
    store.extend_retries(WORKER, &[one.id], second(200)).await?;
    assert!(!claim(&store, second(4_999)).await?.contains(&one.id));
    Ok(())
}

pub(crate) async fn only_failures_that_count_are_counted(home: &Home) -> anyhow::Result<()> {
    let store = home.store().await?;
    let event = event(1, "ada");
    let fail = async |number: u32, counts: bool, fate: AfterFailure| {
        let mut told = None;
        let failed = FailedEvent { counts, ..failed(WORKER, &event, number) };
        store
            .fail(&failed, |failures| {
                told = Some(failures);
                fate
            })
            .await?;
        anyhow::Ok(told)
    };
    let retry = AfterFailure::Retry { due_at: second(1) };
    let told = |count, number| Some(Failures { count, first_at: time_of(number) });

    assert_eq!(fail(1, false, retry).await?, told(0, 1), "a probe");
    assert_eq!(fail(2, true, retry).await?, told(1, 2));
    assert_eq!(fail(3, false, retry).await?, told(1, 2));
    assert_eq!(fail(4, true, retry).await?, told(2, 2));
    assert_eq!(fail(5, true, AfterFailure::Park).await?, told(3, 2));
    let [letter] = &store.letters(&LetterFilter::default(), None, 10).await?[..] else {
        anyhow::bail!("not one letter");
    };
    store.redrive(&[letter.id], |_| NOW, "grace", NOW).await?;
    assert_eq!(fail(6, true, retry).await?, told(1, 6), "since it was sent back");
    // Of another worker, none counts.
    let mut of_other = None;
    let failed = failed("permissions", &event, 9);
    store
        .fail(&failed, |failures| {
            of_other = Some(failures);
            AfterFailure::Park
        })
        .await?;
    assert_eq!(of_other, told(1, 9));

    let attempts: Vec<_> =
        store.attempts_of(event.id).await?.into_iter().map(|it| it.started_at).collect();
    assert_eq!(attempts, [1, 2, 3, 4, 5, 6, 9].map(time_of), "all of them are kept");
    Ok(())
}

pub(crate) async fn nothing_brings_back_what_was_settled(home: &Home) -> anyhow::Result<()> {
    let store = home.store().await?;
    let [parked, dropped, delivered, done] = [1, 2, 3, 4].map(|number| event(number, "ada"));
    let mut letters = Vec::new();
    for event in [&parked, &dropped, &delivered] {
        let Failed::Parked { letter } = park(&store, event).await? else {
            anyhow::bail!("it was not parked");
        };
        letters.push(letter);
    }
    store.drop_letters(&letters[1..2], "grace", "a test", NOW).await?;
    store.redrive(&letters[2..], |_| NOW, "grace", NOW).await?;
    store.finish_retry(WORKER, delivered.id, NOW).await?;
    // An event that waited, and whose effect came before the failure of another attempt.
    wait(&store, &failed(WORKER, &done, 1), NOW).await?;
    store.mark_done(WORKER, done.id, NOW).await?;
    let before = store.letters(&LetterFilter::default(), None, 10).await?;

    for (event, standing) in [
        (&parked, Standing::Parked),
        (&dropped, Standing::Dropped),
        (&delivered, Standing::Done),
        (&done, Standing::Done),
    ] {
        assert_eq!(store.standing(WORKER, event.id).await?, standing);
        let late = failed(WORKER, event, 7);
        let never = |_| panic!("nobody is asked about what is settled");
        assert_eq!(store.fail(&late, never).await?, Failed::Settled(standing));
        assert_eq!(store.attempts_of(event.id).await?.last(), Some(&late.attempt));
        assert_eq!(store.standing(WORKER, event.id).await?, standing);
    }

    assert_eq!(store.letters(&LetterFilter::default(), None, 10).await?, before);
    assert_eq!(store.next_retry(WORKER).await?, None);
    Ok(())
}

pub(crate) async fn of_many_that_claim_at_once_each_event_has_one(
    home: &Home,
) -> anyhow::Result<()> {
    const EVENTS: u32 = 300;
    let store = home.store().await?;
    let mut tasks = JoinSet::new();
    for number in 0..EVENTS {
        let store = store.clone();
        tasks.spawn(async move {
            wait(&store, &failed(WORKER, &event(number, "ada"), 1), second(number.into())).await
        });
    }
    while let Some(outcome) = tasks.join_next().await {
        outcome??;
    }

    // Six workers in two processes, and in between one that lets go again.
    let other = home.store().await?;
    let mut tasks = JoinSet::new();
    for number in 0..6_u32 {
        let store = if number % 2 == 0 { store.clone() } else { other.clone() };
        tasks.spawn(async move {
            let mut claimed = Vec::new();
            let mut released = false;
            loop {
                let some = store.claim_retries(WORKER, second(EVENTS.into()), LEASE, 7).await?;
                let Some(first) = some.first() else { return anyhow::Ok(claimed) };
                if number == 0 && !std::mem::replace(&mut released, true) {
                    for retry in &some {
                        store.release_retry(WORKER, retry.event_id, first_due()).await?;
                    }
                    continue;
                }
                assert!(some.len() <= 7 && first.tries == 1, "{some:?}");
                claimed.extend(some.into_iter().map(|it| it.event_id));
            }
        });
    }
    let mut claimed = Vec::new();
    while let Some(outcome) = tasks.join_next().await {
        claimed.extend(outcome??);
    }

    // Claimers pass by what another has locked, and may end before that one lets go of it.
    claimed.extend(claim(&store, second(EVENTS.into())).await?);
    claimed.sort_unstable();
    let all: Vec<_> = (0..EVENTS).map(|number| event(number, "ada").id).collect();
    assert_eq!(claimed, all);
    Ok(())
}

fn first_due() -> OffsetDateTime {
    second(0)
}

pub(crate) async fn what_is_set_aside_is_counted_for_each_worker(
    home: &Home,
) -> anyhow::Result<()> {
    let store = home.store().await?;
    assert_eq!(store.set_aside_of_all().await?, BTreeMap::new());
    assert_eq!(store.set_aside(WORKER).await?, SetAside::default());
    for (number, due) in [(5, 50), (3, 70), (4, 60)] {
        wait(&store, &failed(WORKER, &event(number, "ada"), 1), second(due)).await?;
    }
    for number in [8, 7] {
        let failed = failed("permissions", &event(number, "ada"), number);
        store.fail(&failed, |_| AfterFailure::Park).await?;
    }
    park(&store, &event(9, "ada")).await?;
    let dropped = store.letters(&LetterFilter::default(), None, 1).await?[0].id;
    store.drop_letters(&[dropped], "grace", "a test", NOW).await?;

    let of_notify = SetAside {
        retries: 3,
        next_due: Some(second(50)),
        oldest_event: Some(event(3, "ada").time),
        ..SetAside::default()
    };
    let of_permissions = SetAside {
        parked: 2,
        oldest_parked: Some(time_of(7) + Duration::from_millis(7)),
        ..SetAside::default()
    };
    assert_eq!(store.set_aside(WORKER).await?, of_notify);
    assert_eq!(store.set_aside("permissions").await?, of_permissions);
    assert_eq!(store.set_aside("nobody").await?, SetAside::default());
    let all = [(WORKER.to_owned(), of_notify), ("permissions".to_owned(), of_permissions)];
    assert_eq!(store.set_aside_of_all().await?, BTreeMap::from(all));
    Ok(())
}

pub(crate) async fn a_failure_interrupted_anywhere_has_happened_or_not(
    home: &Home,
) -> anyhow::Result<()> {
    let store = home.store().await?;
    let retry = AfterFailure::Retry { due_at: second(1) };
    for (round, fate) in (0_u32..).zip([retry, AfterFailure::Park, AfterFailure::Park]) {
        let mut interrupted = 0;
        for number in 0..INTERRUPTIONS {
            let event = event(round * 1_000 + number, "ada");
            let failed = failed(WORKER, &event, 1);
            let mut attempts = 0;
            if round == 2 {
                // It was parked before and sent back.
                let Failed::Parked { letter } = park(&store, &event).await? else {
                    anyhow::bail!("it was not parked");
                };
                store.redrive(&[letter], |_| NOW, "grace", NOW).await?;
                attempts = 1;
            }
            let before = store.standing(WORKER, event.id).await?;
            let after = match fate {
                AfterFailure::Retry { .. } => Standing::Waiting,
                AfterFailure::Park => Standing::Parked,
            };

            let ended = given_up_after(number % 12, store.fail(&failed, |_| fate)).await;

            // A commit that nobody waited for may yet come, between two of our reads even.
            let limit = Duration::from_secs(20);
            eventually(limit, "the failure has happened or not", async || {
                let Ok(now) = store.standing(WORKER, event.id).await else { return false };
                let Ok(kept) = store.attempts_of(event.id).await else { return false };
                (now, kept.len()) == (before, attempts)
                    || (now, kept.len()) == (after, attempts + 1)
            })
            .await?;
            store.fail(&failed, |_| fate).await?;
            assert_eq!(store.standing(WORKER, event.id).await?, after);
            match ended {
                Some(outcome) => drop(outcome?),
                None => interrupted += 1,
            }
        }
        assert!(interrupted > 0, "nothing was interrupted, so nothing was tried");
    }
    consistent(&store).await
}

/// What is on its way back waits in the store, and what is parked does not.
pub(crate) async fn consistent(store: &Store) -> anyhow::Result<()> {
    for letter in store.letters(&LetterFilter::default(), None, 10_000).await? {
        let whole = store.letter(letter.id).await?.expect("a letter stays");
        let history: Vec<_> = whole.history.iter().map(|it| it.state).collect();
        assert_eq!(history.first(), Some(&LetterState::Parked), "{whole:?}");
        assert_eq!(history.last(), Some(&letter.state), "{whole:?}");
        for (before, after) in history.iter().zip(&history[1..]) {
            use LetterState::{Delivered, Dropped, Parked, Retrying};
            let possible = match before {
                Parked => matches!(after, Retrying | Dropped | Delivered),
                Retrying => matches!(after, Parked | Delivered),
                Dropped => matches!(after, Delivered),
                Delivered => false,
            };
            assert!(possible, "{history:?}");
        }
    }
    let all = store.set_aside_of_all().await?;
    for (worker, set_aside) in all {
        let filter = LetterFilter { worker: Some(worker.clone()), ..LetterFilter::default() };
        let letters = store.letters(&filter, None, 10_000).await?;
        let in_state = |state| letters.iter().filter(|it| it.state == state).count();
        assert_eq!(usize::try_from(set_aside.parked)?, in_state(LetterState::Parked), "{worker}");
        let claimed = store.claim_retries(&worker, second(1 << 30), LEASE, 10_000).await?;
        assert_eq!(usize::try_from(set_aside.retries)?, claimed.len(), "{worker}");
        for letter in &letters {
            let waits = claimed.iter().any(|it| Some(it.event_id) == letter.event_id);
            assert_eq!(waits, letter.state == LetterState::Retrying, "{letter:?}");
        }
    }
    Ok(())
}
