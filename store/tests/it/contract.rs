//! What holds for both dialects.

use std::{collections::HashSet, time::Duration};

use serde_json::json;
use tokio::task::JoinSet;
use uuid::Uuid;
use vestibule_events::Email;
use vestibule_store::{Begun, Done, Effects, NewGrant, Store, StoreError};
use vestibule_testkit::eventually;

use crate::home::{Home, NOW, event, event_with, unknown_event};

fn role(role: &str, reason: &str) -> NewGrant {
    NewGrant { role: role.to_owned(), reason: reason.to_owned(), expires_at: None }
}

async fn effects_of(store: &Store, event: Uuid) -> anyhow::Result<Effects> {
    Ok(store.effects(&[event]).await?[&event])
}

pub(crate) async fn a_sign_up_makes_a_person_with_the_claims_as_decided(
    home: &Home,
) -> anyhow::Result<()> {
    let store = home.store().await?;
    let claims = json!({ "city": "london", "tags": ["a"], "age": 36, "none": null });
    let event = event_with(1, "ada", claims, json!({ "city": "London" }));

    assert_eq!(store.person(&event.person).await?, None);
    assert_eq!(store.record_sign_up("database", &event, NOW).await?, Done::Now);
    assert_eq!(store.record_sign_up("database", &event, NOW).await?, Done::Before);

    let person = store.person(&event.person).await?.expect("the person was recorded");
    assert_eq!(person.person, event.person);
    assert_eq!(person.email, Some(Email::new("ada@example.com")));
    assert_eq!(
        serde_json::Value::from(person.claims.clone()),
        json!({ "city": "London", "tags": ["a"], "age": 36, "none": null })
    );
    assert_eq!(person.status, "accepted");
    assert_eq!((person.first_event, person.last_event), (event.id, event.id));
    assert_eq!(person.changes, 1);
    assert_eq!((person.created_at, person.updated_at), (NOW, NOW));
    let debug = format!("{person:?} {store:?} {:?}", home.url());
    assert!(!debug.contains("ada@") && !debug.contains("London"), "{debug}");
    assert_eq!(
        effects_of(&store, event.id).await?,
        Effects { sign_ups: 1, person_changes: 1, ..Effects::default() }
    );
    Ok(())
}

pub(crate) async fn the_same_event_from_many_tasks_has_one_effect(
    home: &Home,
) -> anyhow::Result<()> {
    let store = home.store().await?;
    let event = event(1, "ada");
    let mut tasks = JoinSet::new();
    for _ in 0..32 {
        let (store, event) = (store.clone(), event.clone());
        tasks.spawn(async move {
            let recorded = store.record_sign_up("database", &event, NOW).await?;
            let roles = [role("guest", "everybody"), role("buyer", "london")];
            let granted = store.grant("permissions", &event, &roles, NOW).await?;
            let notified =
                store.record_notification("notify", &event, "log", "Hello", "…", NOW).await?;
            Ok::<_, StoreError>([recorded, granted, notified])
        });
    }

    let mut now = [0; 3];
    while let Some(outcome) = tasks.join_next().await {
        for (count, done) in now.iter_mut().zip(outcome??) {
            *count += u32::from(done == Done::Now);
        }
    }

    assert_eq!(now, [1, 1, 1]);
    assert_eq!(
        effects_of(&store, event.id).await?,
        Effects {
            sign_ups: 1,
            person_changes: 1,
            grant_sets: 1,
            notifications: 1,
            dead_letters: 0
        }
    );
    assert_eq!(store.person(&event.person).await?.map(|person| person.changes), Some(1));
    Ok(())
}

pub(crate) async fn events_of_one_person_are_all_counted_and_the_newest_stays(
    home: &Home,
) -> anyhow::Result<()> {
    let store = home.store().await?;
    let mut tasks = JoinSet::new();
    for number in 0..32 {
        let store = store.clone();
        // Neither in order nor in the reverse of it.
        let number = (number * 13) % 32;
        let event = event_with(number, "ada", json!({ "number": number }), json!({}));
        tasks.spawn(async move {
            store.record_sign_up("database", &event, NOW).await?;
            let grants = [role("b", &number.to_string()), role("a", &number.to_string())];
            store.grant("permissions", &event, &grants, NOW).await
        });
    }
    while let Some(outcome) = tasks.join_next().await {
        assert_eq!(outcome??, Done::Now);
    }

    let newest = event(31, "ada");
    let person = store.person(&newest.person).await?.expect("the person was recorded");
    assert_eq!(person.changes, 32);
    assert_eq!(person.first_event, event(0, "ada").id);
    assert_eq!(person.last_event, newest.id);
    assert_eq!(person.claims["number"], 31);
    for grant in store.grants_of(&newest.person).await? {
        assert_eq!((grant.reason.as_str(), grant.event_id), ("31", newest.id), "{}", grant.role);
    }
    Ok(())
}

pub(crate) async fn a_late_older_event_is_counted_and_changes_nothing_else(
    home: &Home,
) -> anyhow::Result<()> {
    let store = home.store().await?;
    let older = event_with(1, "ada", json!({ "city": "Paris" }), json!({}));
    let newer = event_with(2, "ada", json!({ "city": "London" }), json!({}));

    assert_eq!(store.record_sign_up("database", &newer, NOW).await?, Done::Now);
    assert_eq!(store.record_sign_up("database", &older, NOW).await?, Done::Now);

    let person = store.person(&newer.person).await?.expect("the person was recorded");
    assert_eq!(person.claims["city"], "London");
    assert_eq!((person.first_event, person.last_event), (older.id, newer.id));
    assert_eq!(person.changes, 2);
    for event in [older.id, newer.id] {
        let effects = effects_of(&store, event).await?;
        assert_eq!((effects.sign_ups, effects.person_changes), (1, 1));
    }
    Ok(())
}

pub(crate) async fn a_sign_up_is_recorded_once_whoever_records_it(
    home: &Home,
) -> anyhow::Result<()> {
    let store = home.store().await?;
    let event = event(1, "ada");

    assert_eq!(store.record_sign_up("database", &event, NOW).await?, Done::Now);
    assert_eq!(store.record_sign_up("database-2", &event, NOW).await?, Done::Before);

    assert!(store.is_done("database-2", event.id).await?);
    assert_eq!(effects_of(&store, event.id).await?.person_changes, 1);
    assert_eq!(store.person(&event.person).await?.map(|person| person.changes), Some(1));
    Ok(())
}

pub(crate) async fn a_set_of_grants_may_be_empty_and_still_counts(
    home: &Home,
) -> anyhow::Result<()> {
    let store = home.store().await?;
    let event = event(1, "ada");

    assert_eq!(store.grant("permissions", &event, &[], NOW).await?, Done::Now);
    assert_eq!(
        store.grant("permissions", &event, &[role("guest", "everybody")], NOW).await?,
        Done::Before
    );

    assert_eq!(effects_of(&store, event.id).await?.grant_sets, 1);
    assert_eq!(store.grants_of(&event.person).await?, []);
    Ok(())
}

pub(crate) async fn a_late_older_event_does_not_change_a_grant(home: &Home) -> anyhow::Result<()> {
    let store = home.store().await?;
    let (first, older, newer) = (event(1, "ada"), event(2, "ada"), event(3, "ada"));
    let until = NOW + Duration::from_secs(3600);
    let guest = |reason, expires_at| NewGrant { expires_at, ..role("guest", reason) };

    store.grant("permissions", &first, &[guest("first", Some(until))], NOW).await?;
    store.grant("permissions", &newer, &[guest("newer", None)], NOW).await?;
    store
        .grant("permissions", &older, &[guest("older", Some(until)), role("buyer", "older")], NOW)
        .await?;

    let grants = store.grants_of(&newer.person).await?;
    let seen: Vec<_> = grants
        .iter()
        .map(|grant| (grant.role.as_str(), grant.reason.as_str(), grant.event_id, grant.expires_at))
        .collect();
    assert_eq!(seen, [("buyer", "older", older.id, None), ("guest", "newer", newer.id, None)]);
    assert!(grants.iter().all(|grant| grant.granted_at == NOW && grant.revoked_at.is_none()));
    assert_eq!(effects_of(&store, older.id).await?.grant_sets, 1);
    Ok(())
}

pub(crate) async fn a_notification_keeps_its_key_until_it_was_sent(
    home: &Home,
) -> anyhow::Result<()> {
    let store = home.store().await?;
    let event = event(1, "ada");
    let begin = || store.begin_notification("notify", &event, "teams", NOW);

    let first = begin().await?;
    assert_eq!(begin().await?, first, "whoever died in between sends with the same key");
    assert_eq!(effects_of(&store, event.id).await?.notifications, 0);
    let finish = || store.finish_notification("notify", event.id, "teams", Some("id-1"), NOW);
    assert_eq!(finish().await?, Done::Now);
    assert_eq!(finish().await?, Done::Before);

    assert!(matches!(first, Begun::Send { .. }));
    assert_eq!(begin().await?, Begun::SentBefore);
    assert_eq!(effects_of(&store, event.id).await?.notifications, 1);
    Ok(())
}

pub(crate) async fn channels_are_independent_of_each_other(home: &Home) -> anyhow::Result<()> {
    let store = home.store().await?;
    let (one, other) = (event(1, "ada"), event(2, "ada"));
    let mut keys = HashSet::new();
    for (worker, event, channel) in [
        ("notify", &one, "teams"),
        ("notify", &one, "mail"),
        ("notify-2", &one, "teams"),
        ("notify", &other, "teams"),
    ] {
        let Begun::Send { idempotency_key } =
            store.begin_notification(worker, event, channel, NOW).await?
        else {
            anyhow::bail!("{worker} {channel} was never sent");
        };
        assert!(keys.insert(idempotency_key), "each has a key of its own");
    }

    store.finish_notification("notify", one.id, "teams", None, NOW).await?;

    let begun = store.begin_notification("notify", &one, "mail", NOW).await?;
    assert!(matches!(begun, Begun::Send { .. }), "{begun:?}");
    assert_eq!(effects_of(&store, one.id).await?.notifications, 1);
    Ok(())
}

pub(crate) async fn a_recorded_notification_is_kept_once(home: &Home) -> anyhow::Result<()> {
    let store = home.store().await?;
    let event = event(1, "ada");
    let record = |body| store.record_notification("notify", &event, "log", "Hello", body, NOW);

    assert_eq!(record("first").await?, Done::Now);
    assert_eq!(record("second").await?, Done::Before);
    assert_eq!(effects_of(&store, event.id).await?.notifications, 1);

    // A channel that used to send and died on the way is recorded after all.
    store.begin_notification("notify", &event, "teams", NOW).await?;
    assert_eq!(
        store.record_notification("notify", &event, "teams", "Hello", "…", NOW).await?,
        Done::Now
    );
    assert_eq!(effects_of(&store, event.id).await?.notifications, 2);
    Ok(())
}

pub(crate) async fn an_event_is_done_once_for_each_worker(home: &Home) -> anyhow::Result<()> {
    let store = home.store().await?;
    let event = event(1, "ada");

    assert!(!store.is_done("notify", event.id).await?);
    assert_eq!(store.mark_done("notify", event.id, NOW).await?, Done::Now);
    assert_eq!(store.mark_done("notify", event.id, NOW).await?, Done::Before);

    assert!(store.is_done("notify", event.id).await?);
    assert!(!store.is_done("permissions", event.id).await?);
    assert!(!store.is_done("notify", unknown_event()).await?);
    Ok(())
}

pub(crate) async fn effects_are_told_for_any_number_of_events(home: &Home) -> anyhow::Result<()> {
    let store = home.store().await?;
    let events: Vec<_> = (0..2500).map(|number| event(number, "ada").id).collect();
    for number in [0, 999, 1000, 2499] {
        store.grant("permissions", &event(number, "ada"), &[], NOW).await?;
    }

    let effects = store.effects(&events).await?;

    assert_eq!(effects.len(), events.len());
    let acted_on: Vec<_> =
        (0..2500).filter(|number| effects[&events[*number]].grant_sets == 1).collect();
    assert_eq!(acted_on, [0, 999, 1000, 2499]);
    assert!(store.effects(&[]).await?.is_empty());
    Ok(())
}

pub(crate) async fn what_a_platform_may_send_is_kept(home: &Home) -> anyhow::Result<()> {
    let store = home.store().await?;
    let claims = json!({
        "nul\0": "a\0b", "emoji": "👩‍🚀", "quote": "'); DROP TABLE people; --", "big": u64::MAX,
        "fraction": 0.1, "empty": "", "deep": [[[{ "x": [] }]]],
    });
    let mut event = event_with(1, "o'brien", claims.clone(), json!({}));
    event.sign_up.client = Some("\0".to_owned());
    event.sign_up.locale = None;
    event.sign_up.email = None;

    assert_eq!(store.record_sign_up("database", &event, NOW).await?, Done::Now);
    let grant = role("guest\0", "rule\0");
    assert_eq!(store.grant("permissions", &event, &[grant], NOW).await?, Done::Now);
    assert_eq!(
        store.record_notification("notify", &event, "log", "\0", "a\0b", NOW).await?,
        Done::Now
    );

    let mut expected = claims;
    let kept = expected.as_object_mut().expect("an object");
    kept.remove("nul\0");
    kept.insert("nul\u{fffd}".to_owned(), json!("a\u{fffd}b"));
    let person = store.person(&event.person).await?.expect("the person was recorded");
    assert_eq!(serde_json::Value::from(person.claims), expected);
    assert_eq!(person.email, None);
    assert_eq!(store.grants_of(&event.person).await?[0].role, "guest\u{fffd}");
    Ok(())
}

pub(crate) async fn giving_up_in_the_middle_leaves_all_or_nothing(
    home: &Home,
) -> anyhow::Result<()> {
    let store = home.store().await?;
    let events: Vec<_> = (0..60).map(|number| event(number, &format!("n{number}"))).collect();
    let act = |store: Store, event: vestibule_events::SignUpEvent| async move {
        store.record_sign_up("database", &event, NOW).await?;
        store.grant("permissions", &event, &[role("guest", "everybody")], NOW).await
    };

    // Callers give up at every point of the way, while others go on.
    let mut tasks = JoinSet::new();
    for (number, event) in (0_u64..).zip(&events) {
        let limit = Duration::from_micros(number * 150);
        tasks.spawn(tokio::time::timeout(limit, act(store.clone(), event.clone())));
    }
    let mut gave_up = 0;
    while let Some(outcome) = tasks.join_next().await {
        match outcome? {
            Ok(done) => drop(done?),
            Err(_) => gave_up += 1,
        }
    }
    assert!(gave_up > 0, "nobody gave up, so nothing was tried");
    let ids: Vec<_> = events.iter().map(|event| event.id).collect();
    // A commit that somebody gave up waiting for may yet come, between two of our reads even.
    eventually(Duration::from_secs(20), "no event has half of its effect", async || {
        let effects = store.effects(&ids).await;
        effects.is_ok_and(|all| all.values().all(|it| it.sign_ups == it.person_changes))
    })
    .await?;

    // The same events again, as after a redelivery.
    for event in &events {
        act(store.clone(), event.clone()).await?;
    }

    let once = Effects { sign_ups: 1, person_changes: 1, grant_sets: 1, ..Effects::default() };
    for (event, effects) in store.effects(&ids).await? {
        assert_eq!(effects, once, "{event}");
    }
    Ok(())
}

pub(crate) async fn migrating_at_once_applies_everything_once(home: &Home) -> anyhow::Result<()> {
    let store = home.empty_store().await?;
    assert!(!store.schema_is_current().await?);

    let mut tasks = JoinSet::new();
    for _ in 0..4 {
        // Stores of their own, as in processes of their own.
        let store = home.empty_store().await?;
        tasks.spawn(async move { store.migrate().await });
    }
    let mut applied = Vec::new();
    while let Some(outcome) = tasks.join_next().await {
        applied.extend(outcome??.into_iter().map(|migration| migration.version));
    }

    applied.sort_unstable();
    let once: Vec<_> = (1..=i64::try_from(applied.len())?).collect();
    assert!(!applied.is_empty());
    assert_eq!(applied, once);
    assert!(store.schema_is_current().await?);
    assert_eq!(store.migrate().await?, []);
    Ok(())
}

pub(crate) async fn a_newer_database_is_current(home: &Home) -> anyhow::Result<()> {
    let store = home.store().await?;
    home.execute(
        "INSERT INTO _sqlx_migrations (version, description, success, checksum, execution_time)
         VALUES (9999, 'of a later version', TRUE, '', 0)",
    )
    .await?;

    assert!(store.schema_is_current().await?);
    assert_eq!(store.migrate().await?, []);
    Ok(())
}

pub(crate) async fn a_database_without_tables_is_misconfigured(home: &Home) -> anyhow::Result<()> {
    let store = home.empty_store().await?;

    let outcome = store.record_sign_up("database", &event(1, "ada"), NOW).await;
    let error = outcome.expect_err("there are no tables");

    assert!(matches!(error, StoreError::Misconfigured(_)), "{error:?}");
    assert!(error.may_pass(), "it passes once somebody migrates");
    store.migrate().await?;
    assert_eq!(store.record_sign_up("database", &event(1, "ada"), NOW).await?, Done::Now);
    Ok(())
}

pub(crate) async fn refused_data_is_not_in_the_error(home: &Home) -> anyhow::Result<()> {
    let store = home.store().await?;
    // A constraint that an operator added, as one may to a table of one's own.
    home.execute("CREATE UNIQUE INDEX one_person_per_address ON people (email)").await?;
    let ada = event(1, "ada");
    let mut other = event(2, "eve");
    other.sign_up.email.clone_from(&ada.sign_up.email);
    store.record_sign_up("database", &ada, NOW).await?;

    let outcome = store.record_sign_up("database", &other, NOW).await;
    let error = outcome.expect_err("the address is taken");

    assert!(matches!(error, StoreError::Refused(_)), "{error:?}");
    assert!(!error.may_pass());
    let mut told = format!("{error:?}");
    told.push_str(&format!("{:#}", anyhow::Error::from(error)));
    assert!(!told.contains("ada") && !told.contains("London"), "{told}");
    assert!(!store.is_done("database", other.id).await?, "the inbox row went with the effect");
    let third = event(3, "grace");
    assert_eq!(store.record_sign_up("database", &third, NOW).await?, Done::Now);
    Ok(())
}
