//! Devices and recipients, on both dialects.

use std::time::Duration;

use anyhow::Context;
use secrecy::ExposeSecret;
use tokio::task::JoinSet;
use vestibule_events::Email;
use vestibule_store::{
    Begun, Device, DeviceAddress, DeviceKind, DeviceRecord, NewGrant, RoleHolder,
};

use crate::home::{Home, NOW, event, time_of};

fn browser(endpoint: &str, auth: &str) -> DeviceAddress {
    DeviceAddress::WebPush {
        endpoint: endpoint.to_owned().into(),
        public_key: "key".to_owned(),
        auth: auth.to_owned().into(),
    }
}

fn phone(token: &str) -> DeviceAddress {
    DeviceAddress::Apns { token: token.to_owned().into() }
}

fn auth_of(device: &Device) -> Option<&str> {
    match &device.address {
        DeviceAddress::WebPush { auth, .. } => Some(auth.expose_secret()),
        DeviceAddress::Fcm { .. } | DeviceAddress::Apns { .. } => None,
    }
}

pub(crate) async fn a_device_registered_again_is_the_same_one(home: &Home) -> anyhow::Result<()> {
    let store = home.store().await?;
    let (ada, eve) = (event(1, "ada").person, event(2, "eve").person);
    let address = browser("https://push.example/1", "one");

    let id = store.register_device(&ada, &address, Some("laptop"), NOW).await?;
    store.device_used(id, time_of(5)).await?;
    let again = browser("https://push.example/1", "two");
    assert_eq!(store.register_device(&ada, &again, None, time_of(9)).await?, id);

    let expected = DeviceRecord {
        id,
        person: ada.clone(),
        kind: "web-push".to_owned(),
        label: None,
        created_at: NOW,
        last_used_at: Some(time_of(5)),
        removed_at: None,
        removed_reason: None,
    };
    assert_eq!(store.devices_of(&ada).await?, [expected]);
    let devices = store.reachable_devices(&ada, DeviceKind::WebPush, 10).await?;
    assert_eq!(devices.len(), 1);
    assert_eq!((devices[0].id, auth_of(&devices[0])), (id, Some("two")));
    assert_eq!(devices[0].registered_at, time_of(9), "the last time");
    assert!(!format!("{devices:?}").contains("push.example"), "how it is reached is a secret");

    // A browser in which somebody else signs in: no message for the first one goes there.
    let of_eve = store.register_device(&eve, &address, None, time_of(10)).await?;
    assert_ne!(of_eve, id);
    assert_eq!(store.devices_of(&ada).await?, []);
    let of_eve = &store.devices_of(&eve).await?[0];
    assert_eq!((of_eve.created_at, of_eve.last_used_at), (time_of(10), None));
    Ok(())
}

pub(crate) async fn a_removed_device_is_kept_without_its_secrets(
    home: &Home,
) -> anyhow::Result<()> {
    let store = home.store().await?;
    let ada = event(1, "ada").person;
    let id = store.register_device(&ada, &phone("token"), None, NOW).await?;
    let other = store.register_device(&ada, &phone("other"), None, NOW).await?;

    assert!(store.remove_device(id, "410 Unregistered", time_of(3)).await?);
    assert!(!store.remove_device(id, "again", time_of(4)).await?);
    assert!(!store.remove_device(event(1, "ada").id, "no device", time_of(4)).await?);

    let devices = store.devices_of(&ada).await?;
    let removed = devices.iter().find(|it| it.id == id).context("it is kept")?;
    assert_eq!(removed.removed_at, Some(time_of(3)));
    assert_eq!(removed.removed_reason.as_deref(), Some("410 Unregistered"));
    let reachable = store.reachable_devices(&ada, DeviceKind::Apns, 10).await?;
    assert_eq!(reachable.iter().map(|it| it.id).collect::<Vec<_>>(), [other]);
    assert!(store.reachable_devices(&ada, DeviceKind::Fcm, 10).await?.is_empty());

    // Registered once more, it is a new device, and that can be removed as well.
    let anew = store.register_device(&ada, &phone("token"), None, time_of(5)).await?;
    assert_ne!(anew, id);
    assert!(store.remove_device(anew, "unregistered", time_of(6)).await?);
    assert_eq!(store.devices_of(&ada).await?.len(), 3);
    Ok(())
}

pub(crate) async fn registered_from_many_places_at_once_it_is_one_device(
    home: &Home,
) -> anyhow::Result<()> {
    let store = home.store().await?;
    let ada = event(1, "ada").person;
    let mut tasks = JoinSet::new();
    for _ in 0..16 {
        let (store, ada) = (store.clone(), ada.clone());
        let token = DeviceAddress::Fcm { token: "token".to_owned().into() };
        tasks.spawn(async move { store.register_device(&ada, &token, None, NOW).await });
    }
    let mut ids = Vec::new();
    while let Some(id) = tasks.join_next().await {
        ids.push(id??);
    }
    ids.dedup();
    assert_eq!(ids.len(), 1);
    assert_eq!(store.devices_of(&ada).await?.len(), 1);
    Ok(())
}

pub(crate) async fn of_many_devices_the_newest_are_reached(home: &Home) -> anyhow::Result<()> {
    let store = home.store().await?;
    let ada = event(1, "ada").person;
    let mut ids = Vec::new();
    for number in 0..5 {
        let token = phone(&number.to_string());
        ids.push(store.register_device(&ada, &token, None, NOW).await?);
    }
    let reachable = store.reachable_devices(&ada, DeviceKind::Apns, 3).await?;
    let reachable: Vec<_> = reachable.iter().map(|it| it.id).collect();
    assert_eq!(reachable, [ids[4], ids[3], ids[2]]);
    Ok(())
}

pub(crate) async fn a_role_is_held_by_whom_it_is_granted_now(home: &Home) -> anyhow::Result<()> {
    let store = home.store().await?;
    let grant = |role: &str, seconds: Option<u64>| NewGrant {
        role: role.to_owned(),
        reason: "rule".to_owned(),
        expires_at: seconds.map(|it| NOW + Duration::from_secs(it)),
    };
    let people = ["ada", "bob", "eve", "zoe"].map(|name| event(1, name));
    for (person, grants) in people.iter().zip([
        vec![grant("approver", None)],
        vec![grant("approver", Some(60)), grant("auditor", None)],
        vec![grant("approver", Some(5))],
        vec![grant("auditor", None)],
    ]) {
        // Ids tell time; here all are of the same moment, and each is one's own.
        let mut event = person.clone();
        event.id = uuid::Uuid::now_v7();
        store.grant("permissions", &event, &grants, NOW).await?;
    }
    store.record_sign_up("database", &people[0], NOW).await?;

    let mut expected = [
        RoleHolder {
            person: people[0].person.clone(),
            email: Some(Email::new("ada@example.com".to_owned())),
        },
        RoleHolder { person: people[1].person.clone(), email: None },
    ];
    expected.sort_by(|one, other| one.person.cmp(&other.person));
    assert_eq!(store.role_holders("approver", time_of(5), 10).await?, expected);
    assert_eq!(store.role_holders("approver", time_of(5), 1).await?, expected[..1]);
    assert_eq!(store.role_holders("nobody", NOW, 10).await?, []);
    Ok(())
}

pub(crate) async fn what_is_sent_to_nobody_any_more_leaves_no_note(
    home: &Home,
) -> anyhow::Result<()> {
    let store = home.store().await?;
    let event = event(1, "ada");
    for channel in ["phones.1", "phones.2"] {
        let begun = store.begin_notification("notify", &event, channel, NOW).await?;
        assert!(matches!(begun, Begun::Send { .. }), "{channel}: {begun:?}");
    }
    store.finish_notification("notify", event.id, "phones.2", Some("id"), NOW).await?;

    for channel in ["phones.1", "phones.2"] {
        store.forget_notification("notify", event.id, channel).await?;
    }

    assert_eq!(
        store.effects(&[event.id]).await?[&event.id].notifications,
        1,
        "what was sent stays"
    );
    let begun = store.begin_notification("notify", &event, "phones.1", NOW).await?;
    assert!(matches!(begun, Begun::Send { .. }), "{begun:?}");
    let begun = store.begin_notification("notify", &event, "phones.2", NOW).await?;
    assert_eq!(begun, Begun::SentBefore);
    Ok(())
}
