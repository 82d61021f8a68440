//! Sign-ups that wait for their account, on both dialects.

use std::time::Duration;

use time::OffsetDateTime;
use tokio::task::JoinSet;
use uuid::Uuid;
use vestibule_events::{ConfirmationSource, PseudonymKey, SignUpEvent};
use vestibule_store::{
    ConfirmationRecord, ConfirmationState, Done, Sighted, Store, StoreError, Unconfirmed,
};

use crate::home::{Home, NOW, event, given_up_after, time_of, unknown_event, unpublished};

const WORKER: &str = "confirm";
const LEASE: Duration = Duration::from_secs(60);

fn confirmed(origin: &SignUpEvent, source: ConfirmationSource) -> SignUpEvent {
    let key = PseudonymKey::new(vec![7; 32]);
    SignUpEvent::confirmed(Uuid::now_v7(), time_of(50), origin, "object-1", source, &key)
}

fn by_token(origin: &SignUpEvent) -> SignUpEvent {
    confirmed(origin, ConfirmationSource::Token)
}

fn by_directory(origin: &SignUpEvent) -> SignUpEvent {
    confirmed(origin, ConfirmationSource::Directory)
}

fn given_up(origin: &SignUpEvent) -> SignUpEvent {
    let key = PseudonymKey::new(vec![7; 32]);
    SignUpEvent::given_up(Uuid::now_v7(), time_of(50), origin, &key)
}

/// Due as many seconds after [`NOW`].
async fn wait(store: &Store, event: &SignUpEvent, due: u32) -> Result<Done, StoreError> {
    store.await_account(WORKER, event, time_of(due), NOW).await
}

async fn claim(store: &Store, at: OffsetDateTime) -> anyhow::Result<Vec<Uuid>> {
    let claimed = store.claim_unconfirmed(at, LEASE, 100).await?;
    assert!(claimed.unreadable.is_empty(), "{:?}", claimed.unreadable);
    Ok(claimed.sign_ups.into_iter().map(|it| it.event.id).collect())
}

/// Whether it confirmed a sign-up that an account was seen.
async fn see(store: &Store, event: &SignUpEvent, at: OffsetDateTime) -> anyhow::Result<bool> {
    let connector = &event.sign_up.connector;
    let sighted = store.account_seen(&event.person, connector, "object-1", at, by_token).await?;
    Ok(sighted == Sighted::Confirmed)
}

async fn record(store: &Store, event: &SignUpEvent) -> anyhow::Result<ConfirmationRecord> {
    store.confirmation(event.id).await?.ok_or_else(|| anyhow::anyhow!("it is not noted"))
}

pub(crate) async fn a_sign_up_waits_until_it_is_due_and_is_confirmed_once(
    home: &Home,
) -> anyhow::Result<()> {
    let store = home.store().await?;
    let (ada, eve) = (event(1, "ada"), event(2, "eve"));
    assert_eq!(wait(&store, &ada, 10).await?, Done::Now);
    assert_eq!(wait(&store, &ada, 0).await?, Done::Before);
    wait(&store, &eve, 20).await?;
    assert_eq!(store.next_confirmation().await?, Some(time_of(10)));
    assert_eq!(store.confirmations_waiting().await?, 2);

    assert!(claim(&store, time_of(9)).await?.is_empty());
    let claimed = store.claim_unconfirmed(time_of(10), LEASE, 100).await?.sign_ups;
    assert_eq!(claimed, [Unconfirmed { event: ada.clone(), tries: 0, seen: None }]);
    assert!(claim(&store, time_of(10)).await?.is_empty(), "it is in hand");
    store.wait_on(ada.id, time_of(30), true).await?;
    store.wait_on(eve.id, time_of(31), false).await?;
    store.wait_on(unknown_event(), time_of(31), true).await?;
    assert!(claim(&store, time_of(29)).await?.is_empty());
    let claimed = store.claim_unconfirmed(time_of(31), LEASE, 100).await?.sign_ups;
    let tries: Vec<_> = claimed.iter().map(|it| (it.event.id, it.tries)).collect();
    assert_eq!(tries, [(ada.id, 1), (eve.id, 0)]);
    assert_eq!(claim(&store, time_of(91)).await?, [ada.id, eve.id], "who had them has died");

    let outcome = by_directory(&ada);
    assert!(store.settle(&outcome, time_of(50)).await?);
    assert!(!store.settle(&given_up(&ada), time_of(51)).await?, "it has one outcome");
    assert!(!see(&store, &ada, time_of(52)).await?);
    let ada_now = record(&store, &ada).await?;
    let expected = ConfirmationRecord {
        event_id: ada.id,
        person: ada.person.clone(),
        state: ConfirmationState::Confirmed,
        since: ada.time,
        due_at: ada_now.due_at,
        tries: 1,
        object_id: Some("object-1".to_owned()),
        source: Some(ConfirmationSource::Directory),
        decided_at: Some(time_of(50)),
        decision_event: Some(outcome.id),
    };
    assert_eq!(ada_now, expected);

    let end = given_up(&eve);
    assert!(store.settle(&end, time_of(60)).await?);
    let eve_now = record(&store, &eve).await?;
    assert_eq!((eve_now.state, eve_now.object_id), (ConfirmationState::Abandoned, None));
    assert_eq!(unpublished(&store, 10).await?, [outcome, end]);
    assert_eq!((store.next_confirmation().await?, store.confirmations_waiting().await?), (None, 0));
    assert!(claim(&store, time_of(1_000_000)).await?.is_empty());
    Ok(())
}

pub(crate) async fn a_token_confirms_whoever_waits_and_whoever_comes_later(
    home: &Home,
) -> anyhow::Result<()> {
    let store = home.store().await?;
    let (ada, late, before) = (event(1, "ada"), event(2, "late"), event(1_000, "before"));
    wait(&store, &ada, 10).await?;

    assert!(!see(&store, &event(1, "nobody"), time_of(3)).await?);
    let mut elsewhere = ada.clone();
    elsewhere.sign_up.connector = "suppliers".parse()?;
    assert!(!see(&store, &elsewhere, time_of(3)).await?, "another directory, perhaps");
    assert!(see(&store, &ada, time_of(4)).await?);
    assert!(!see(&store, &ada, time_of(5)).await?, "a later sign-in is nothing new");
    let ada_now = record(&store, &ada).await?;
    assert_eq!(ada_now.source, Some(ConfirmationSource::Token));
    let published = unpublished(&store, 10).await?;
    let about: Vec<_> = published.iter().filter_map(|it| it.confirmation.clone()).collect();
    assert_eq!(about.iter().map(|it| it.of).collect::<Vec<_>>(), [ada.id]);

    // The token was seen before the sign-up came here; or long before the person signed up.
    assert!(!see(&store, &late, time_of(6)).await?);
    assert!(!see(&store, &before, time_of(6)).await?);
    wait(&store, &late, 10).await?;
    wait(&store, &before, 10).await?;
    let claimed = store.claim_unconfirmed(time_of(10), LEASE, 100).await?.sign_ups;
    let seen: Vec<_> = claimed.iter().map(|it| (it.event.id, it.seen.as_deref())).collect();
    assert_eq!(seen, [(late.id, Some("object-1")), (before.id, None)]);

    // A whole second between fractions: as text it would sort otherwise.
    let whole = time_of(6).replace_nanosecond(0)?;
    assert_eq!(store.forget_sightings(whole).await?, 3, "those of second 3 and 5");
    assert_eq!(store.forget_sightings(time_of(7)).await?, 2);
    Ok(())
}

pub(crate) async fn of_several_sign_ups_of_a_person_the_newest_waits(
    home: &Home,
) -> anyhow::Result<()> {
    let store = home.store().await?;
    let [one, two, three] = [1, 2, 3].map(|number| event(number, "ada"));
    let mut elsewhere = event(2, "ada");
    elsewhere.id = unknown_event();
    elsewhere.sign_up.connector = "suppliers".parse()?;
    for event in [&two, &one, &three, &elsewhere] {
        wait(&store, event, 10).await?;
    }
    let state = async |event: &SignUpEvent| anyhow::Ok(record(&store, event).await?.state);
    assert_eq!(state(&one).await?, ConfirmationState::Superseded);
    assert_eq!(state(&two).await?, ConfirmationState::Superseded);
    assert_eq!(state(&three).await?, ConfirmationState::Waiting);
    assert_eq!(state(&elsewhere).await?, ConfirmationState::Waiting);
    assert!(!store.settle(&by_directory(&two), time_of(5)).await?);

    // One that we were late to hear of is stood for by what was confirmed since; a new one is not.
    assert!(see(&store, &three, time_of(20)).await?);
    let (before, after) = (event(19, "ada"), event(21, "ada"));
    wait(&store, &before, 30).await?;
    wait(&store, &after, 30).await?;
    assert_eq!(state(&before).await?, ConfirmationState::Superseded);
    assert_eq!(state(&after).await?, ConfirmationState::Waiting);
    assert_eq!(unpublished(&store, 10).await?.len(), 1);
    Ok(())
}

pub(crate) async fn sign_ups_at_once_leave_the_newest_waiting(home: &Home) -> anyhow::Result<()> {
    let store = home.store().await?;
    let mut tasks = JoinSet::new();
    for number in 0..20 {
        // Stores of their own, as in processes of their own.
        let store = if number % 5 == 0 { home.store().await? } else { store.clone() };
        tasks.spawn(async move { wait(&store, &event(number, "ada"), 10).await });
    }
    while let Some(noted) = tasks.join_next().await {
        assert_eq!(noted??, Done::Now);
    }
    for number in 0..20 {
        let state = record(&store, &event(number, "ada")).await?.state;
        let wanted =
            if number == 19 { ConfirmationState::Waiting } else { ConfirmationState::Superseded };
        assert_eq!(state, wanted, "{number}");
    }
    Ok(())
}

pub(crate) async fn of_all_who_settle_a_sign_up_at_once_one_does(
    home: &Home,
) -> anyhow::Result<()> {
    let store = home.store().await?;
    let ada = event(1, "ada");
    wait(&store, &ada, 10).await?;
    let mut tasks = JoinSet::new();
    for number in 0..20 {
        let store = if number % 5 == 0 { home.store().await? } else { store.clone() };
        let ada = ada.clone();
        tasks.spawn(async move {
            match number % 3 {
                0 => see(&store, &ada, time_of(20 + number)).await,
                1 => Ok(store.settle(&given_up(&ada), time_of(20)).await?),
                _ => Ok(store.settle(&by_directory(&ada), time_of(20)).await?),
            }
        });
    }
    let mut settled = 0;
    while let Some(outcome) = tasks.join_next().await {
        settled += u32::from(outcome??);
    }
    let published = unpublished(&store, 100).await?;
    assert_eq!((settled, published.len()), (1, 1));
    assert_eq!(record(&store, &ada).await?.decision_event, Some(published[0].id));
    Ok(())
}

pub(crate) async fn giving_up_in_the_middle_leaves_no_outcome_without_its_event(
    home: &Home,
) -> anyhow::Result<()> {
    let store = home.store().await?;
    for number in 0..24 {
        let ada = event(number, &format!("n{number}"));
        wait(&store, &ada, 10).await?;
        let _ = given_up_after(number % 8, see(&store, &ada, time_of(20))).await;
    }
    // A commit that nobody waited for may yet come, and a second look settles what is left.
    let mut confirmed_before = 0;
    for number in 0..24 {
        let ada = event(number, &format!("n{number}"));
        confirmed_before += u32::from(!see(&store, &ada, time_of(30)).await?);
        assert_eq!(record(&store, &ada).await?.state, ConfirmationState::Confirmed, "{number}");
    }
    let published = unpublished(&store, 100).await?;
    let mut about: Vec<_> = published.iter().filter_map(|it| it.confirmation.as_ref()).collect();
    about.sort_unstable_by_key(|it| it.of);
    about.dedup_by_key(|it| it.of);
    assert_eq!((published.len(), about.len()), (24, 24), "each has one outcome");
    assert!(confirmed_before < 24, "nothing was interrupted, so nothing was tried");
    Ok(())
}

pub(crate) async fn what_is_no_outcome_settles_nothing(home: &Home) -> anyhow::Result<()> {
    let store = home.store().await?;
    let ada = event(1, "ada");
    wait(&store, &ada, 10).await?;
    let without = SignUpEvent { confirmation: None, ..by_directory(&ada) };
    let accepted = SignUpEvent { kind: ada.kind, ..by_directory(&ada) };
    for outcome in [&ada, &without, &accepted] {
        let refused = store.settle(outcome, NOW).await;
        assert!(matches!(refused, Err(StoreError::Refused(_))), "{refused:?}");
    }
    assert!(!store.settle(&by_directory(&event(2, "eve")), NOW).await?, "nobody waits for it");
    assert_eq!(store.confirmation(unknown_event()).await?, None);
    assert_eq!(unpublished(&store, 1).await?, []);
    Ok(())
}

pub(crate) async fn one_that_cannot_be_read_holds_up_no_other(home: &Home) -> anyhow::Result<()> {
    let store = home.store().await?;
    let (ada, eve) = (event(1, "ada"), event(2, "eve"));
    wait(&store, &ada, 10).await?;
    wait(&store, &eve, 10).await?;
    let as_it_was = store.claim_unconfirmed(time_of(10), LEASE, 1).await?.sign_ups;
    assert_eq!(as_it_was[0].event.id, ada.id);
    let sql = format!(
        "UPDATE confirmations SET event = CAST('x' AS {}) WHERE person = '{}'",
        if matches!(home, Home::Sqlite(_)) { "BLOB" } else { "bytea" },
        ada.person
    );
    home.execute(&sql).await?;
    let claimed = store.claim_unconfirmed(time_of(70), LEASE, 100).await?;
    assert_eq!(claimed.sign_ups.iter().map(|it| it.event.id).collect::<Vec<_>>(), [eve.id]);
    assert_eq!(claimed.unreadable, [ada.id]);
    // Not with every look.
    assert!(claim(&store, time_of(70) + LEASE).await?.contains(&eve.id));

    // Nor does it hold up tokens: what was seen is there for whoever can read it.
    let connector = &ada.sign_up.connector;
    let sighted = store.account_seen(&ada.person, connector, "object-1", NOW, by_token).await?;
    assert_eq!(sighted, Sighted::Unreadable(ada.id));
    assert!(see(&store, &eve, NOW).await?);
    assert_eq!(store.confirmations_waiting().await?, 1, "it waits on");
    let later = time_of(70) + Duration::from_secs(3600);
    assert_eq!(store.claim_unconfirmed(later, LEASE, 100).await?.unreadable, [ada.id]);
    Ok(())
}

pub(crate) async fn what_was_said_at_the_sign_up_is_kept_while_it_waits_only(
    home: &Home,
) -> anyhow::Result<()> {
    let store = home.store().await?;
    let (ada, eve, old, new) =
        (event(1, "ada"), event(2, "eve"), event(3, "finn"), event(4, "finn"));
    for event in [&ada, &eve, &old, &new] {
        wait(&store, event, 10).await?;
    }
    wait(&store, &event(0, "finn"), 10).await?;
    assert!(store.settle(&by_directory(&ada), NOW).await?);
    assert!(store.settle(&given_up(&eve), NOW).await?);
    assert_eq!(record(&store, &event(0, "finn")).await?.state, ConfirmationState::Superseded);
    // The schema holds for every row that there is.
    let kind = if matches!(home, Home::Sqlite(_)) { "BLOB" } else { "bytea" };
    for (state, kept) in
        [("waiting", true), ("confirmed", false), ("abandoned", false), ("superseded", false)]
    {
        let change =
            format!("UPDATE confirmations SET event = CAST('x' AS {kind}) WHERE state = '{state}'");
        assert_eq!(home.execute(&change).await.is_ok(), kept, "{state}");
    }
    Ok(())
}

pub(crate) async fn however_many_older_ones_begin_meanwhile_the_newest_waits(
    home: &Home,
) -> anyhow::Result<()> {
    let store = home.store().await?;
    let ada = event(1, "ada");
    // Each time that it would begin to wait, another process has just let an older one do so.
    let older = "INSERT INTO confirmations
             (event_id, person, connector, state, since, due_at, tries, event)
         SELECT {id}, NEW.person, NEW.connector, 'waiting', NEW.since, NEW.due_at, 1, NEW.event
         FROM confirmations;";
    let sql = match home {
        Home::Sqlite(_) => format!(
            "CREATE TRIGGER meanwhile BEFORE INSERT ON confirmations
             WHEN NEW.state = 'waiting' AND NEW.tries = 0
                 AND (SELECT count(*) FROM confirmations) < 5
             BEGIN {} END",
            older.replace("{id}", "zeroblob(1 + count(*))")
        ),
        Home::Postgres(_) => format!(
            "CREATE FUNCTION begin_meanwhile() RETURNS trigger LANGUAGE plpgsql AS $$
             BEGIN
                 IF NEW.state = 'waiting' AND NEW.tries = 0
                     AND (SELECT count(*) FROM confirmations) < 5
                 THEN {} END IF;
                 RETURN NEW;
             END $$;
             CREATE TRIGGER meanwhile BEFORE INSERT ON confirmations
             FOR EACH ROW EXECUTE FUNCTION begin_meanwhile()",
            older.replace("{id}", "('00000000-0000-0000-0000-00000000000' || count(*))::uuid")
        ),
    };
    home.execute(&sql).await?;
    wait(&store, &ada, 10).await?;
    assert_eq!(record(&store, &ada).await?.state, ConfirmationState::Waiting);
    assert_eq!(store.confirmations_waiting().await?, 1);
    Ok(())
}
