//! A worker that is no more leaves nothing that waits.

use std::time::Duration;

use vestibule_events::SignUpEvent;
use vestibule_store::{
    AfterFailure, Failed, FailedAttempt, FailedEvent, LetterState, Memory, Standing,
};

use crate::home::{Home, NOW, event};

fn failed(worker: &str, event: &SignUpEvent) -> anyhow::Result<FailedEvent> {
    Ok(FailedEvent {
        attempt: FailedAttempt {
            worker: worker.to_owned(),
            event_id: event.id,
            sequence: 1,
            started_at: NOW,
            took: Duration::from_millis(1),
            cause_class: "refused".to_owned(),
            error: "the webhook answered 404".to_owned(),
        },
        person: event.person.clone(),
        payload: serde_json::to_vec(event)?,
        counts: true,
    })
}

pub(crate) async fn nothing_waits_for_a_worker_that_was_removed(home: &Home) -> anyhow::Result<()> {
    let store = home.store().await?;
    let [parked, retrying, waiting] =
        [(1, "ada"), (2, "eve"), (3, "bob")].map(|(n, it)| event(n, it));
    for worker in ["gone", "here"] {
        for event in [&parked, &retrying] {
            store.fail(&failed(worker, event)?, |_| AfterFailure::Park).await?;
        }
        let retry = AfterFailure::Retry { due_at: NOW };
        store.fail(&failed(worker, &waiting)?, |_| retry).await?;
        store.pause_worker(worker, "grace", "it moves", NOW).await?;
    }
    store.redrive(&[2], |_| NOW, "grace", NOW).await?;

    store.remove_worker("gone", Memory::Kept, "grace", NOW).await?;

    let aside = store.set_aside_of_all().await?;
    assert_eq!(aside.keys().collect::<Vec<_>>(), ["here"]);
    assert_eq!((aside["here"].retries, aside["here"].parked), (1, 2));
    let paused = store.paused_workers().await?;
    assert_eq!(paused.iter().map(|it| it.worker.as_str()).collect::<Vec<_>>(), ["here"]);
    for (id, event, before) in [(1, &parked, 1), (2, &retrying, 2)] {
        let letter = store.letter(id).await?.expect("is kept");
        assert_eq!(
            (letter.letter.worker.as_str(), letter.letter.state),
            ("gone", LetterState::Dropped)
        );
        let last = &letter.history[before];
        assert_eq!((last.state, last.actor.as_deref()), (LetterState::Dropped, Some("grace")));
        assert_eq!(letter.history.len(), before + 1);
        assert_eq!(store.standing("gone", event.id).await?, Standing::Dropped);
    }
    Ok(())
}

pub(crate) async fn a_worker_added_again_is_given_what_the_former_has_done_or_given_up(
    home: &Home,
) -> anyhow::Result<()> {
    let store = home.store().await?;
    let [done, parked, dropped] = [(1, "ada"), (2, "eve"), (3, "bob")].map(|(n, it)| event(n, it));
    for worker in ["again", "here"] {
        store.mark_done(worker, done.id, NOW).await?;
        for event in [&parked, &dropped] {
            store.fail(&failed(worker, event)?, |_| AfterFailure::Park).await?;
        }
    }
    store.drop_letters(&[2], "grace", "a test", NOW).await?;

    // Twice, as somebody may who tries it out.
    for turn in 1..=2_u8 {
        let now = NOW + Duration::from_secs(turn.into());
        store.remove_worker("again", Memory::Lost, "grace", now).await?;
        for event in [&done, &parked, &dropped] {
            assert_eq!(store.standing("again", event.id).await?, Standing::Open);
        }
        let failed = store.fail(&failed("again", &parked)?, |_| AfterFailure::Park).await?;
        assert!(matches!(failed, Failed::Parked { .. }), "{failed:?}");
    }

    let former = store.letter(1).await?.expect("is kept");
    assert_eq!(former.letter.worker, "again, removed 2026-11-22T10:00:01.123456Z");
    assert_eq!(former.letter.state, LetterState::Dropped);
    assert_eq!((former.history.len(), former.attempts.len()), (2, 1), "{former:?}");
    assert_eq!(store.standing("here", done.id).await?, Standing::Done);
    assert_eq!(store.standing("here", parked.id).await?, Standing::Parked);
    Ok(())
}
