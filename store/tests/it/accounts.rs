//! Accounts of approved sign-ups, on both dialects.

use std::time::Duration;

use tokio::task::JoinSet;
use vestibule_store::{AccountOrigin, Done, MadeAccount};

use crate::home::{Home, NOW, event};

const WORKER: &str = "accounts";

fn made(object_id: &str) -> MadeAccount {
    MadeAccount {
        origin: AccountOrigin::Invited,
        object_id: object_id.to_owned(),
        invitation_id: Some("invitation".to_owned()),
    }
}

async fn each_step_is_kept_and_the_first_id_stays(home: &Home) -> anyhow::Result<()> {
    let store = home.store().await?;
    let event = event(1, "ada");
    let later = NOW + Duration::from_secs(60);
    assert_eq!(store.account(event.id).await?, None);

    let begun = store.begin_account(WORKER, &event, NOW).await?;
    assert_eq!((begun.tries, begun.begun_at, begun.tried_at), (1, NOW, NOW));
    let again = store.begin_account(WORKER, &event, later).await?;
    assert_eq!((again.tries, again.begun_at, again.tried_at), (2, NOW, later));
    assert_eq!((again.made, again.finished_at), (None, None));

    store.account_made(WORKER, &event, &made("first"), later).await?;
    store.account_made(WORKER, &event, &made("second"), NOW).await?;
    let account = store.account(event.id).await?.expect("it was begun");
    assert_eq!((account.made, account.made_at), (Some(made("first")), Some(later)));
    assert!(!store.is_done(WORKER, event.id).await?);

    assert_eq!(store.finish_account(WORKER, &event, &made("third"), later).await?, Done::Now);
    assert_eq!(store.finish_account(WORKER, &event, &made("third"), NOW).await?, Done::Before);
    let account = store.account(event.id).await?.expect("it was begun");
    assert_eq!((&account.made, account.finished_at), (&Some(made("first")), Some(later)));
    assert!(store.is_done(WORKER, event.id).await?);
    assert_eq!(store.accounts_of(&event.person).await?, [account]);
    Ok(())
}

async fn many_that_finish_at_once_leave_one_account(home: &Home) -> anyhow::Result<()> {
    let store = home.store().await?;
    let event = event(1, "ada");
    let mut tasks = JoinSet::new();
    for number in 0..16 {
        let (store, event) = (store.clone(), event.clone());
        tasks.spawn(async move {
            store.finish_account(WORKER, &event, &made(&number.to_string()), NOW).await
        });
    }
    let mut now = 0;
    while let Some(outcome) = tasks.join_next().await {
        now += u32::from(outcome?? == Done::Now);
    }
    assert_eq!(now, 1);
    assert_eq!(store.accounts_of(&event.person).await?.len(), 1);
    Ok(())
}

#[tokio::test]
async fn sqlite_keeps_each_step_and_the_first_id() -> anyhow::Result<()> {
    each_step_is_kept_and_the_first_id_stays(&Home::sqlite()?).await
}

#[tokio::test]
async fn postgres_keeps_each_step_and_the_first_id() -> anyhow::Result<()> {
    each_step_is_kept_and_the_first_id_stays(&Home::postgres().await?).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sqlite_keeps_one_account_of_many_at_once() -> anyhow::Result<()> {
    many_that_finish_at_once_leave_one_account(&Home::sqlite()?).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn postgres_keeps_one_account_of_many_at_once() -> anyhow::Result<()> {
    many_that_finish_at_once_leave_one_account(&Home::postgres().await?).await
}
