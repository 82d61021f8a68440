//! Push messages to stand-ins for the services, which check them as the real ones do.

use std::{process::Command, time::Duration};

use anyhow::{Context as _, anyhow};
use serde_json::{Value, json};
use vestibule_events::{Filter, Person, SignUpEvent};
use vestibule_store::{DeviceAddress, NewGrant};
use vestibule_testkit::{Process, PushCall, PushRequest, PushServices};

use super::*;
use crate::{
    Notify, NotifySettings, Task, Worker,
    notify::settings::{ChannelKind, ChannelSettings, Urgency},
    testing::{LIMIT, Stage, sign_up, task},
};

const TTL: Duration = Duration::from_secs(3600);

fn web(services: &PushServices) -> ChannelKind {
    ChannelKind::WebPush(WebPushSettings {
        to: Recipient::Person,
        contact: "mailto:ops@example.com".into(),
        public_key: services.vapid_public_key(),
        private_key: services.vapid_private_key().into(),
        ttl: TTL,
        urgency: Urgency::High,
    })
}

fn fcm(services: &PushServices) -> ChannelKind {
    ChannelKind::Fcm(FcmSettings {
        to: Recipient::Person,
        service_account: services.service_account().into(),
        base_url: services.url(),
        ttl: TTL,
    })
}

fn apns(services: &PushServices) -> ChannelKind {
    ChannelKind::Apns(ApnsSettings {
        to: Recipient::Person,
        key: services.apple_key().into(),
        key_id: PushServices::KEY_ID.into(),
        team_id: PushServices::TEAM_ID.into(),
        topic: PushServices::TOPIC.into(),
        base_url: services.url(),
        ttl: TTL,
    })
}

fn notify(stage: &Stage, kind: ChannelKind) -> anyhow::Result<Notify> {
    notify_of(stage, "phones", "{{ signup.email }}", kind)
}

fn notify_of(stage: &Stage, name: &str, body: &str, kind: ChannelKind) -> anyhow::Result<Notify> {
    let channel = ChannelSettings {
        name: name.into(),
        filter: Filter::default(),
        subject: "Welcome {{ signup.claims.displayName }}".into(),
        body: body.into(),
        language: "en".into(),
        locales: vec![],
        kind,
    };
    let settings = NotifySettings { channels: vec![channel], approvals: None };
    Notify::new(settings, stage.store.clone()).map_err(|complaints| anyhow!("{complaints:?}"))
}

fn browser(subscription: &Value) -> DeviceAddress {
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    DeviceAddress::WebPush {
        endpoint: text(&subscription["endpoint"]).into(),
        public_key: text(&subscription["keys"]["p256dh"]),
        auth: text(&subscription["keys"]["auth"]).into(),
    }
}

fn token(kind: DeviceKind, token: &str) -> DeviceAddress {
    let token = token.to_owned().into();
    match kind {
        DeviceKind::Apns => DeviceAddress::Apns { token },
        DeviceKind::Fcm | DeviceKind::WebPush => DeviceAddress::Fcm { token },
    }
}

async fn register(
    stage: &Stage,
    person: &Person,
    address: &DeviceAddress,
) -> anyhow::Result<uuid::Uuid> {
    Ok(stage.store.register_device(person, address, None, OffsetDateTime::now_utc()).await?)
}

fn statuses(requests: &[PushRequest]) -> Vec<u16> {
    requests.iter().map(|it| it.status).collect()
}

/// Why a device was removed, by the order of registration; `None` while it is there.
async fn removals(stage: &Stage, event: &SignUpEvent) -> anyhow::Result<Vec<Option<String>>> {
    let devices = stage.store.devices_of(&event.person).await?;
    Ok(devices.into_iter().map(|it| it.removed_reason).collect())
}

async fn sent(stage: &Stage, task: &Task) -> anyhow::Result<u32> {
    let id = task.event.id;
    Ok(stage.store.effects(&[id]).await?[&id].notifications)
}

#[tokio::test]
async fn a_browser_reads_its_message_and_each_device_is_told_once() -> anyhow::Result<()> {
    let (stage, services) = (Stage::open().await?, PushServices::start().await?);
    let worker = notify(&stage, web(&services))?;
    let task = task(sign_up("ada"));
    let subscriptions = [services.subscribe()?, services.subscribe()?];
    for subscription in &subscriptions {
        register(&stage, &task.event.person, &browser(subscription)).await?;
    }
    services.plan(PushCall::Browser, 503, "", Some("7"));

    let failed = worker.handle(&task).await;
    let Err(HandleError::Retry { after, cause: Cause::Unavailable, .. }) = failed else {
        panic!("{failed:?}");
    };
    assert_eq!(after, Some(Duration::from_secs(7)));
    for _ in 0..3 {
        worker.handle(&task).await?;
    }

    let requests = services.requests(PushCall::Browser);
    let mut told = statuses(&requests);
    told.sort_unstable();
    assert_eq!(told, [201, 201, 503], "only the one that failed was tried again");
    assert_eq!(sent(&stage, &task).await?, 2);
    for subscription in &subscriptions {
        let read = services.read(subscription).unwrap();
        assert_eq!(
            (&read["title"], &read["body"]),
            (&"Welcome Sample".into(), &"ada@example.com".into())
        );
        assert_eq!(read["data"]["event"], task.event.id.to_string());
        let own = requests
            .iter()
            .filter(|it| subscription["endpoint"].as_str().unwrap().ends_with(&it.path));
        assert!(own.into_iter().all(|it| read["tag"] == it.headers["topic"]), "{requests:?}");
    }
    let first = &requests[0].headers;
    assert_eq!((&*first["ttl"], &*first["urgency"]), ("3600", "high"));
    assert!(requests.iter().all(|it| it.body.len() < 4096 && !it.body.starts_with(b"{")));
    Ok(())
}

/// A browser that is not ours: makes its keys, and shows what it is sent.
const BROWSER: &str = r#"
import base64, json, os, sys
import http_ece
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

def text(data):
    return base64.urlsafe_b64encode(data).decode().rstrip("=")

key, auth = ec.generate_private_key(ec.SECP256R1()), os.urandom(16)
point = key.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
print(json.dumps({"p256dh": text(point), "auth": text(auth)}), flush=True)
for line in sys.stdin:
    sent = base64.b64decode(line)
    read = http_ece.decrypt(sent, private_key=key, auth_secret=auth, version="aes128gcm")
    print(read.decode(), flush=True)
"#;

#[tokio::test]
async fn a_library_of_others_reads_what_browsers_are_sent() -> anyhow::Result<()> {
    let (stage, services) = (Stage::open().await?, PushServices::start().await?);
    let mut python = Command::new(vestibule_testkit::python()?);
    python.args(["-c", BROWSER]).env("PYTHONDONTWRITEBYTECODE", "1");
    python.env("PYTHONPATH", vestibule_testkit::packages("http-ece")?);
    let mut reader = Process::spawn(&python)?;
    let keys = reader.wait_for_line(LIMIT, |line| line.contains("p256dh")).await?;
    let subscription = services.subscribe_with(&serde_json::from_str(&keys)?);
    let task = task(sign_up("ada"));
    register(&stage, &task.event.person, &browser(&subscription)).await?;

    // The longest message is as long as a push service takes it.
    for (name, body) in [("short", "{{ signup.email }}".to_owned()), ("long", "x".repeat(9000))] {
        let worker = notify_of(&stage, name, &body, web(&services))?;
        worker.handle(&task).await?;
        let sent = services.requests(PushCall::Browser).pop().context("nothing was sent")?;
        let tag = sent.headers["topic"].clone();
        reader.write_line(&data_encoding::BASE64.encode(&sent.body))?;
        let read = reader.wait_for_line(LIMIT, |line| line.contains(&tag)).await?;
        let read: Value = serde_json::from_str(&read)?;
        assert_eq!(read["title"], "Welcome Sample");
        match name {
            "short" => assert_eq!(read["body"], "ada@example.com"),
            _ => assert!(sent.body.len() > 4080, "{} bytes", sent.body.len()),
        }
    }
    Ok(())
}

#[tokio::test]
async fn a_browser_that_is_gone_is_removed_and_one_that_is_wrong_is_parked() -> anyhow::Result<()> {
    let (stage, services) = (Stage::open().await?, PushServices::start().await?);
    let worker = notify(&stage, web(&services))?;
    let task = task(sign_up("ada"));
    let subscription = services.subscribe()?;
    let gone = register(&stage, &task.event.person, &browser(&subscription)).await?;
    services.plan(PushCall::Browser, 404, "", None);

    worker.handle(&task).await?;
    worker.handle(&task).await?;

    assert_eq!(statuses(&services.requests(PushCall::Browser)), [404]);
    assert_eq!(sent(&stage, &task).await?, 0);
    let devices = stage.store.devices_of(&task.event.person).await?;
    assert_eq!(
        devices.iter().map(|it| (it.id, it.removed_at.is_some())).collect::<Vec<_>>(),
        [(gone, true)]
    );

    register(&stage, &task.event.person, &browser(&services.subscribe()?)).await?;
    for status in [400, 403, 413] {
        services.plan(PushCall::Browser, status, "", None);
        let outcome = worker.handle(&task).await;
        assert!(
            matches!(outcome, Err(HandleError::Park { cause: Cause::Refused, .. })),
            "{outcome:?}"
        );
    }
    let mut broken = services.subscribe()?;
    broken["keys"]["p256dh"] = "AAAA".into();
    let task = crate::testing::task(sign_up("bob"));
    register(&stage, &task.event.person, &browser(&broken)).await?;
    let outcome = worker.handle(&task).await;
    let Err(HandleError::Park { cause: Cause::InvalidRecipient, source }) = outcome else {
        panic!("{outcome:?}");
    };
    let device = stage.store.devices_of(&task.event.person).await?[0].id;
    let said = format!("channel `phones`: device {device}: the browser's keys are none");
    assert_eq!(format!("{source:#}"), said);
    Ok(())
}

#[tokio::test]
async fn firebase_is_asked_with_a_token_that_is_renewed_once() -> anyhow::Result<()> {
    let (stage, services) = (Stage::open().await?, PushServices::start().await?);
    let worker = notify(&stage, fcm(&services))?;
    let people = ["ada", "bob"].map(|it| task(sign_up(it)));
    for task in &people {
        register(&stage, &task.event.person, &token(DeviceKind::Fcm, &task.event.id.to_string()))
            .await?;
    }

    worker.handle(&people[0]).await?;
    services.plan(PushCall::Firebase, 401, "", None);
    worker.handle(&people[1]).await?;

    assert_eq!(services.requests(PushCall::Token).len(), 2);
    let requests = services.requests(PushCall::Firebase);
    assert_eq!(statuses(&requests), [200, 401, 200]);
    let message = &requests[2].json()["message"];
    assert_eq!(message["token"], people[1].event.id.to_string());
    assert_eq!(message["notification"]["title"], "Welcome Sample");
    assert_eq!(message["android"]["collapse_key"], message["android"]["notification"]["tag"]);
    assert_eq!(requests[1].json(), requests[2].json(), "the same, to be told by");

    services.plan(PushCall::Firebase, 401, "", None);
    services.plan(PushCall::Firebase, 401, "", None);
    let task = task(SignUpEvent { id: uuid::Uuid::now_v7(), ..people[0].event.clone() });
    let outcome = worker.handle(&task).await;
    assert!(
        matches!(outcome, Err(HandleError::Retry { cause: Cause::NotPermitted, .. })),
        "{outcome:?}"
    );
    Ok(())
}

#[tokio::test]
async fn what_firebase_answers_is_understood() -> anyhow::Result<()> {
    let (stage, services) = (Stage::open().await?, PushServices::start().await?);
    let worker = notify(&stage, fcm(&services))?;
    let task = task(sign_up("ada"));
    register(&stage, &task.event.person, &token(DeviceKind::Fcm, "one")).await?;
    let error = |status: &str, code: &str| {
        format!(
            r#"{{"error":{{"status":"{status}","message":"ada@example.com","details":[{{"errorCode":"{code}"}}]}}}}"#
        )
    };

    services.plan(PushCall::Token, 400, r#"{"error":"invalid_grant"}"#, None);
    let outcome = worker.handle(&task).await;
    let Err(HandleError::Retry { source, cause: Cause::NotPermitted, .. }) = outcome else {
        panic!("{outcome:?}");
    };
    assert!(format!("{source:#}").contains("service_account"), "{source:#}");
    for (status, body, expected) in [
        (429, error("RESOURCE_EXHAUSTED", "QUOTA_EXCEEDED"), (true, Cause::Throttled)),
        (503, String::new(), (true, Cause::Unavailable)),
        (403, error("PERMISSION_DENIED", ""), (true, Cause::NotPermitted)),
        (403, error("PERMISSION_DENIED", "SENDER_ID_MISMATCH"), (false, Cause::InvalidRecipient)),
        (400, error("INVALID_ARGUMENT", "INVALID_ARGUMENT"), (false, Cause::Refused)),
        // None of these is certain to mean the device, so none removes it.
        (404, error("NOT_FOUND", ""), (false, Cause::InvalidRecipient)),
        (404, "<html>".to_owned(), (false, Cause::Refused)),
        (400, error("INVALID_ARGUMENT", "UNREGISTERED"), (false, Cause::Refused)),
    ] {
        services.plan(PushCall::Firebase, status, &body, Some("9"));
        let outcome = worker.handle(&task).await;
        let (seen, text) = match outcome {
            Err(HandleError::Retry { cause, source, .. }) => ((true, cause), format!("{source:#}")),
            Err(HandleError::Park { cause, source }) => ((false, cause), format!("{source:#}")),
            other => panic!("{status} {body}: {other:?}"),
        };
        assert_eq!(seen, expected, "{status} {body}");
        assert!(!text.contains("ada@"), "{text}");
        if seen.1 == Cause::InvalidRecipient {
            assert!(text.contains("see that `service_account` is of the app's project"), "{text}");
        }
    }
    assert_eq!(removals(&stage, &task.event).await?, [None]);
    services.plan(PushCall::Firebase, 404, &error("NOT_FOUND", "UNREGISTERED"), None);
    worker.handle(&task).await?;
    assert_eq!(
        removals(&stage, &task.event).await?,
        [Some("Firebase: the device is unregistered".to_owned())]
    );
    Ok(())
}

#[tokio::test]
async fn apple_is_spoken_to_over_http_2_under_names_that_stay() -> anyhow::Result<()> {
    let (stage, services) = (Stage::open().await?, PushServices::start().await?);
    let worker = notify(&stage, apns(&services))?;
    let task = task(sign_up("ada"));
    register(&stage, &task.event.person, &token(DeviceKind::Apns, "00ff")).await?;

    services.plan(PushCall::Apple, 429, r#"{"reason":"TooManyRequests"}"#, Some("3"));
    let outcome = worker.handle(&task).await;
    assert!(
        matches!(outcome, Err(HandleError::Retry { cause: Cause::Throttled, .. })),
        "{outcome:?}"
    );
    for _ in 0..2 {
        worker.handle(&task).await?;
    }

    let requests = services.requests(PushCall::Apple);
    assert_eq!(statuses(&requests), [429, 200]);
    assert!(requests.iter().all(|it| it.is_http2 && it.path == "/3/device/00ff"));
    for name in ["apns-id", "apns-collapse-id", "authorization"] {
        assert_eq!(requests[0].headers[name], requests[1].headers[name], "{name}");
    }
    assert_eq!(requests[1].json()["aps"]["alert"]["body"], "ada@example.com");
    Ok(())
}

#[tokio::test]
async fn what_apple_answers_is_understood() -> anyhow::Result<()> {
    let (stage, services) = (Stage::open().await?, PushServices::start().await?);
    let worker = notify(&stage, apns(&services))?;
    let task = task(sign_up("ada"));
    register(&stage, &task.event.person, &token(DeviceKind::Apns, "00")).await?;
    let milliseconds = |at: OffsetDateTime| at.unix_timestamp_nanos() / 1_000_000;
    let now = OffsetDateTime::now_utc();
    let before = milliseconds(now - Duration::from_secs(60));
    for (status, body, (retries, cause), names) in [
        (403, json!({ "reason": "InvalidProviderToken" }), (true, Cause::NotPermitted), "`key_id`"),
        (
            400,
            json!({ "reason": "BadDeviceToken" }),
            (false, Cause::InvalidRecipient),
            "`environment`",
        ),
        (
            400,
            json!({ "reason": "DeviceTokenNotForTopic" }),
            (false, Cause::InvalidRecipient),
            "`topic`",
        ),
        // Of before it was registered here, and so not of this registration.
        (
            410,
            json!({ "reason": "Unregistered", "timestamp": before }),
            (false, Cause::InvalidRecipient),
            "the token that it has now",
        ),
        (
            410,
            json!({ "reason": "Unregistered" }),
            (false, Cause::InvalidRecipient),
            "the token that it has now",
        ),
        (413, json!({ "reason": "PayloadTooLarge" }), (false, Cause::Refused), "PayloadTooLarge"),
        (503, json!({ "reason": "Shutdown" }), (true, Cause::Unavailable), "503"),
    ] {
        services.plan(PushCall::Apple, status, &body.to_string(), None);
        let (seen, source) = match worker.handle(&task).await {
            Err(HandleError::Retry { cause, source, .. }) => ((true, cause), source),
            Err(HandleError::Park { cause, source }) => ((false, cause), source),
            other => panic!("{body}: {other:?}"),
        };
        assert_eq!(seen, (retries, cause), "{body}");
        assert!(format!("{source:#}").contains(names), "{source:#}");
    }
    assert_eq!(removals(&stage, &task.event).await?, [None], "none of it is certain");

    // Registered before, and gone since.
    let gone = token(DeviceKind::Apns, "01");
    let unregistered = json!({ "reason": "Unregistered", "timestamp": milliseconds(now) });
    let other = crate::testing::task(sign_up("bob"));
    let hour_ago = now - Duration::from_secs(3600);
    stage.store.register_device(&other.event.person, &gone, None, hour_ago).await?;
    services.plan(PushCall::Apple, 410, &unregistered.to_string(), None);
    worker.handle(&other).await?;
    assert_eq!(
        removals(&stage, &other.event).await?,
        [Some("Apple: the device is unregistered".to_owned())]
    );

    // Renewed once, and not again so soon.
    let expired = r#"{"reason":"ExpiredProviderToken"}"#;
    let before = services.requests(PushCall::Apple).len();
    services.plan(PushCall::Apple, 403, expired, None);
    services.plan(PushCall::Apple, 403, expired, None);
    for tries in [2, 3] {
        if tries == 3 {
            services.plan(PushCall::Apple, 403, expired, None);
        }
        let outcome = worker.handle(&task).await;
        let Err(HandleError::Retry { cause: Cause::NotPermitted, source, .. }) = outcome else {
            panic!("{outcome:?}");
        };
        assert!(format!("{source:#}").contains("clock"), "{source:#}");
        assert_eq!(services.requests(PushCall::Apple).len() - before, tries);
    }
    worker.handle(&task).await?;
    assert_eq!(sent(&stage, &task).await?, 1);
    Ok(())
}

#[tokio::test]
async fn who_holds_a_role_is_told_on_their_devices_but_not_of_themselves() -> anyhow::Result<()> {
    let (stage, services) = (Stage::open().await?, PushServices::start().await?);
    let mut kind = apns(&services);
    if let ChannelKind::Apns(settings) = &mut kind {
        settings.to = Recipient::Role("approver".into());
    }
    let worker = notify(&stage, kind)?;
    let people = ["ada", "bob", "eve"].map(sign_up);
    for (event, roles) in people.iter().zip([vec!["approver"], vec!["approver"], vec!["other"]]) {
        let grant = |role: &&str| NewGrant {
            role: (*role).to_owned(),
            reason: "rule".to_owned(),
            expires_at: None,
        };
        let grants: Vec<_> = roles.iter().map(grant).collect();
        stage.store.grant("permissions", event, &grants, OffsetDateTime::now_utc()).await?;
        let address =
            format!("{:02x}", event.sign_up.email.as_ref().unwrap().expose().as_bytes()[0]);
        register(&stage, &event.person, &token(DeviceKind::Apns, &address)).await?;
    }

    worker.handle(&task(people[0].clone())).await?;

    let requests = services.requests(PushCall::Apple);
    assert_eq!(requests.iter().map(|it| it.path.as_str()).collect::<Vec<_>>(), ["/3/device/62"]);
    Ok(())
}

#[test]
fn wrong_keys_and_ids_are_complained_of_at_once_and_not_repeated() {
    let fixed = || Recipient::Fixed(vec!["hidden@example.com".into()]);
    let channel = |name: &str, kind| ChannelSettings {
        name: name.into(),
        filter: Filter::default(),
        subject: "s".into(),
        body: "b".into(),
        language: "en".into(),
        locales: vec![],
        kind,
    };
    let web = WebPushSettings {
        to: fixed(),
        contact: "ops".into(),
        public_key: "hidden".into(),
        private_key: "hidden".into(),
        ttl: Duration::from_secs(40 * 86_400),
        urgency: Urgency::Normal,
    };
    let fcm = FcmSettings {
        to: Recipient::Person,
        service_account: "{\"hidden\":1}".into(),
        base_url: "http://firebase.example".into(),
        ttl: TTL,
    };
    let apns = ApnsSettings {
        to: Recipient::Person,
        key: "hidden".into(),
        key_id: "a b".into(),
        team_id: String::new(),
        topic: "com/example".into(),
        base_url: "https://api.push.apple.com".into(),
        ttl: TTL,
    };
    let settings = NotifySettings {
        channels: vec![
            channel("web", ChannelKind::WebPush(web)),
            channel("fcm", ChannelKind::Fcm(fcm)),
            channel("apns", ChannelKind::Apns(apns)),
        ],
        approvals: None,
    };

    let complaints = Notify::check(&settings).unwrap_err();

    let seen: Vec<_> = complaints.iter().map(|it| (it.index, it.key)).collect();
    assert_eq!(
        seen,
        [
            (0, "to"),
            (0, "contact"),
            (0, "ttl"),
            (0, "public_key"),
            (1, "url"),
            (2, "key_id"),
            (2, "team_id"),
            (2, "topic"),
        ]
    );
    let mut faults = Vec::new();
    for settings in settings.channels {
        match settings.kind {
            ChannelKind::Fcm(it) => assert!(Push::fcm(&it, Secrets::Real, &mut faults).is_none()),
            ChannelKind::Apns(it) => assert!(Push::apns(&it, Secrets::Real, &mut faults).is_none()),
            _ => {}
        }
    }
    let keys: Vec<_> = faults.iter().map(|(key, _)| *key).collect();
    assert_eq!(keys, ["url", "service_account", "key_id", "team_id", "topic", "key"]);
    assert!(!format!("{faults:?} {complaints:?}").contains("hidden"));
}
