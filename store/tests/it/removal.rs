//! A worker that is no more leaves nothing that waits.

use std::time::Duration;

use vestibule_events::SignUpEvent;
use vestibule_store::{AfterFailure, FailedAttempt, FailedEvent, LetterState, Standing};

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

    store.remove_worker("gone", "grace", NOW).await?;

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
