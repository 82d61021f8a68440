//! The worker `notify` against everything it can send to: told once, tried again, parked, and devices
//! that are gone removed.

use std::{
    collections::{BTreeMap, VecDeque},
    net::Ipv4Addr,
    sync::{Arc, Mutex, PoisonError},
};

use anyhow::{Context, ensure};
use axum::{
    Router,
    body::Bytes,
    extract::State,
    http::{HeaderMap, StatusCode, Uri},
};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use vestibule_testkit::{PushCall, PushServices, Smtp, eventually};

use crate::{
    scaled_out::Stack,
    support::{LIMIT, Site, Up, http},
};

/// An ntfy server and a receiver of signed webhooks in one: answers as planned, else 200.
#[derive(Clone, Default)]
pub(crate) struct Receiver {
    plan: Arc<Mutex<VecDeque<u16>>>,
    calls: Arc<Mutex<Vec<Call>>>,
}

#[derive(Clone, Debug)]
pub(crate) struct Call {
    pub(crate) path: String,
    pub(crate) headers: BTreeMap<String, String>,
    body: Vec<u8>,
    status: u16,
}

impl Receiver {
    /// With its address.
    pub(crate) async fn start(plan: &[u16]) -> anyhow::Result<(Self, String)> {
        let receiver = Self::default();
        receiver.plan.lock().unwrap_or_else(PoisonError::into_inner).extend(plan);
        let router = Router::new().fallback(take).with_state(receiver.clone());
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let url = format!("http://{}", listener.local_addr()?);
        tokio::spawn(async move { axum::serve(listener, router).await });
        Ok((receiver, url))
    }

    pub(crate) fn calls(&self) -> Vec<Call> {
        self.calls.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn statuses(&self) -> Vec<u16> {
        self.calls().iter().map(|it| it.status).collect()
    }
}

async fn take(
    State(receiver): State<Receiver>,
    uri: Uri,
    headers: HeaderMap,
    body: Bytes,
) -> StatusCode {
    let plan = receiver.plan.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
    let status = plan.unwrap_or(200);
    let field = |(name, value): (&axum::http::HeaderName, &axum::http::HeaderValue)| {
        (name.as_str().to_owned(), String::from_utf8_lossy(value.as_bytes()).into_owned())
    };
    let headers = headers.iter().map(field).collect();
    let call = Call { path: uri.path().to_owned(), headers, body: body.to_vec(), status };
    receiver.calls.lock().unwrap_or_else(PoisonError::into_inner).push(call);
    StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR)
}

const TEXTS: &str = r#"
subject = "Welcome {{ signup.claims.displayName }}"
body = "Good day, {{ signup.email }}"
[workers.notify.channels.locales.de]
subject = "Willkommen {{ signup.claims.displayName }}"
body = "Guten Tag, {{ signup.email }}"
"#;

/// What failed is tried again soon, and nothing rests because a target is down.
const SOON: &str = r#"
[workers.notify]
retry = { initial = "50ms", max = "200ms" }
breaker = { failures = 1000 }
"#;

pub(crate) fn channel(name: &str, keys: &str) -> String {
    format!("\n[[workers.notify.channels]]\nname = \"{name}\"\n{keys}{TEXTS}")
}

/// Channels that push to devices, which may be registered there.
pub(crate) fn push_channels(services: &PushServices) -> String {
    let url = services.url();
    let vapid = services.vapid_public_key();
    let (key_id, team, topic) = (PushServices::KEY_ID, PushServices::TEAM_ID, PushServices::TOPIC);
    [
        SOON,
        "[devices]\ntoken = \"env:DEVICES_TOKEN\"\npush_services = [\"127.0.0.1\"]\n",
        &channel(
            "browsers",
            &format!(
                "kind = \"web-push\"\ncontact = \"mailto:ops@example.com\"\n\
                 public_key = \"{vapid}\"\nprivate_key = \"env:VAPID_KEY\"\n"
            ),
        ),
        &channel(
            "androids",
            &format!(
                "kind = \"fcm\"\nservice_account = \"env:SERVICE_ACCOUNT\"\nurl = \"{url}\"\n"
            ),
        ),
        &channel(
            "iphones",
            &format!(
                "kind = \"apns\"\nkey = \"env:APPLE_KEY\"\nkey_id = \"{key_id}\"\n\
                 team_id = \"{team}\"\ntopic = \"{topic}\"\nurl = \"{url}\"\n"
            ),
        ),
    ]
    .concat()
}

/// What they need to know.
pub(crate) fn set_push_secrets(site: &mut Site, services: &PushServices) {
    site.set("DEVICES_TOKEN", TOKEN);
    site.set("VAPID_KEY", &services.vapid_private_key());
    site.set("SERVICE_ACCOUNT", &services.service_account());
    site.set("APPLE_KEY", &services.apple_key());
}

/// A site that pushes to devices.
fn pushing(services: &PushServices, more: &str) -> anyhow::Result<Site> {
    let mut site = Site::new(&[&push_channels(services), more].concat())?;
    set_push_secrets(&mut site, services);
    Ok(site)
}

const TOKEN: &str = "of-the-app";
const ADA: &str = "ada.byron@example.com";

/// Registers a device of Ada's; gives its id and her pseudonym.
async fn register(up: &Up, device: Value) -> anyhow::Result<(String, String)> {
    register_for(&up.admin, ADA, device).await
}

pub(crate) async fn register_for(
    admin: &str,
    email: &str,
    device: Value,
) -> anyhow::Result<(String, String)> {
    let mut registration = device;
    registration["person"] = json!({ "email": email });
    // The store opens while the connector answers already.
    let (status, made): (_, Value) = eventually(LIMIT, "devices are registered", async || {
        let call = http().post(format!("{admin}/devices")).bearer_auth(TOKEN).json(&registration);
        let answer = call.send().await?;
        let status = answer.status();
        anyhow::Ok(if status == 503 { None } else { Some((status, answer.json().await?)) })
    })
    .await?;
    ensure!(status == 201, "{status}: {made}");
    let text = |name: &str| made[name].as_str().map(str::to_owned).context("not said");
    Ok((text("id")?, text("person")?))
}

async fn devices(up: &Up, person: &str) -> anyhow::Result<Vec<Value>> {
    let url = format!("{}/devices?person={person}", up.admin);
    let listed: Value = http().get(url).bearer_auth(TOKEN).send().await?.json().await?;
    listed.as_array().cloned().context("no list")
}

async fn sign_up(up: &Up, email: &str) -> anyhow::Result<()> {
    let person = json!({ "email": email, "displayName": "Ada", "ui_locales": "de-AT" });
    let (status, answer) = up.sign_up("before-create", &person).await?;
    ensure!((status, &answer["action"]) == (200, &json!("Continue")), "{status} {answer}");
    Ok(())
}

async fn letters(site: &Site) -> anyhow::Result<Vec<Value>> {
    let list = site.run(&["dead", "list", "--letters", "--output", "json"]).await?;
    Ok(serde_json::from_str(&list.stdout)?)
}

/// Gives the worker every event once more, as a log does that has lost how far it was.
async fn redeliver(site: &Site, up: &mut Up) -> anyhow::Result<Up> {
    up.process.terminate(LIMIT).await?;
    let log = format!("sqlite://{}?mode=rw", site.data().join("events.db").display());
    let log = sqlx::SqlitePool::connect(&log).await?;
    let forgotten =
        sqlx::query("DELETE FROM consumers WHERE name = 'notify'").execute(&log).await?;
    log.close().await;
    ensure!(forgotten.rows_affected() == 1, "the worker has no consumer");
    site.up().await
}

/// Waits until the worker has nothing to do, in the log and in the store.
async fn idle(site: &Site, worker: &str) -> anyhow::Result<()> {
    eventually(LIMIT, "nothing waits for the worker", async || {
        // More than once: between the looks at log and store an event may go from one to the other.
        for _ in 0..3 {
            let list = site.run(&["worker", "list", "--output", "json"]).await?;
            let workers: Value = serde_json::from_str(&list.stdout)?;
            let all = workers.as_array().context("no list")?;
            let of_ours = all.iter().find(|it| it["worker"] == worker).context("no such worker")?;
            let waits = ["waiting", "in_hand", "retries"].map(|it| of_ours[it].as_u64());
            if waits != [Some(0); 3] {
                return Ok(false);
            }
        }
        anyhow::Ok(true)
    })
    .await
}

#[tokio::test]
async fn every_device_is_told_once_in_the_persons_language_whatever_comes_between()
-> anyhow::Result<()> {
    let services = PushServices::start().await?;
    let site = pushing(&services, "")?;
    let mut up = site.up().await?;
    let browser = services.subscribe()?;
    for device in [
        json!({ "kind": "web-push", "subscription": browser, "label": "laptop" }),
        json!({ "kind": "fcm", "token": "android-1" }),
        json!({ "kind": "fcm", "token": "android-2" }),
        json!({ "kind": "apns", "token": "00ff00ff" }),
    ] {
        register(&up, device).await?;
    }
    services.plan(PushCall::Browser, 429, "", Some("0"));
    services.plan(PushCall::Firebase, 503, "", None);
    services.plan(PushCall::Apple, 503, "", None);

    sign_up(&up, ADA).await?;
    sign_up(&up, "without-a-device@example.com").await?;
    idle(&site, "notify").await?;
    let up = redeliver(&site, &mut up).await?;
    idle(&site, "notify").await?;

    let taken = |call| {
        let requests = services.requests(call);
        requests.into_iter().filter(|it| it.status < 300).collect::<Vec<_>>()
    };
    assert_eq!(services.requests(PushCall::Browser).len(), 2, "once in vain");
    assert_eq!(services.requests(PushCall::Firebase).len(), 3, "one of them in vain");
    assert_eq!(services.requests(PushCall::Apple).len(), 2);
    let read = services.read(&browser).context("the browser has read nothing")?;
    assert_eq!(
        (&read["title"], &read["body"]),
        (&json!("Willkommen Ada"), &json!("Guten Tag, ada.byron@example.com"))
    );
    let mut androids: Vec<_> =
        taken(PushCall::Firebase).iter().map(|it| it.json()["message"]["token"].clone()).collect();
    androids.sort_by_key(ToString::to_string);
    assert_eq!(androids, ["android-1", "android-2"]);
    let apple = taken(PushCall::Apple);
    assert_eq!(apple[0].json()["aps"]["alert"]["title"], "Willkommen Ada");
    assert_eq!(letters(&site).await?, [] as [Value; 0]);

    let (_, person) = register(&up, json!({ "kind": "fcm", "token": "android-2" })).await?;
    let devices = devices(&up, &person).await?;
    assert_eq!(devices.len(), 4);
    assert!(devices.iter().all(|it| it["last_used_at"].is_string()), "{devices:?}");
    Ok(())
}

#[tokio::test]
async fn a_device_that_is_gone_is_removed_and_what_is_refused_is_parked() -> anyhow::Result<()> {
    let services = PushServices::start().await?;
    let site = pushing(&services, "")?;
    let up = site.up().await?;
    let browser = services.subscribe()?;
    let (_, person) = register(&up, json!({ "kind": "web-push", "subscription": browser })).await?;
    register(&up, json!({ "kind": "fcm", "token": "token-of-hers" })).await?;
    register(&up, json!({ "kind": "apns", "token": "00ff".repeat(8) })).await?;
    services.plan(PushCall::Browser, 410, "", None);
    let unregistered = r#"{"error":{"details":[{"errorCode":"UNREGISTERED"}]}}"#;
    services.plan(PushCall::Firebase, 404, unregistered, None);
    services.plan(PushCall::Apple, 400, r#"{"reason":"BadTopic"}"#, None);

    sign_up(&up, ADA).await?;
    eventually(LIMIT, "the event is parked", async || {
        anyhow::Ok(!letters(&site).await?.is_empty())
    })
    .await?;

    let letters = letters(&site).await?;
    assert_eq!((letters.len(), &letters[0]["cause"]), (1, &json!("refused")), "{letters:?}");
    let removed: Vec<_> =
        devices(&up, &person).await?.iter().map(|it| it["removed_at"].is_string()).collect();
    assert_eq!(removed, [true, true, false]);

    // Sent back once Apple takes it, only Apple is asked again.
    let sent = site.run(&["dead", "retry", "--all", "--yes", "--by", "grace"]).await?;
    assert_eq!(sent.code, 0, "{sent:?}");
    idle(&site, "notify").await?;
    let calls = [PushCall::Browser, PushCall::Firebase, PushCall::Apple];
    assert_eq!(calls.map(|call| services.requests(call).len()), [1, 1, 2]);

    // What reaches a device, and what it is told, is nowhere to be read.
    let log = format!("{}{}", up.process.stdout(), up.process.stderr());
    for secret in ["token-of-hers", &"00ff".repeat(8), "Willkommen", ADA, "/browser/"] {
        assert!(!log.contains(secret), "{secret} is in\n{log}");
    }
    Ok(())
}

#[tokio::test]
async fn a_connector_of_its_own_registers_devices_without_any_approval() -> anyhow::Result<()> {
    let mut stack = Stack::start_bare("[devices]\ntoken = \"env:DEVICES_TOKEN\"\n").await?;
    stack.site.set("DEVICES_TOKEN", TOKEN);
    stack.migrate().await?;
    let (mut api, _) = stack.api(&["--without-relay"]).await?;
    let line = api.wait_for_line(LIMIT, |line| line.contains("the connector answers")).await?;
    let line: Value = serde_json::from_str(&line)?;
    let admin = format!("http://{}", line["admin"].as_str().context("no address")?);
    let device = json!({ "kind": "fcm", "token": "android-1" });

    // Its store is opened beside the answers.
    eventually(LIMIT, "the device is registered", async || {
        register_for(&admin, ADA, device.clone()).await.is_ok()
    })
    .await?;

    let (id, _) = register_for(&admin, ADA, device).await?;
    let one = http().delete(format!("{admin}/devices/{id}")).bearer_auth(TOKEN);
    assert_eq!(one.send().await?.status(), 204);
    Ok(())
}

#[tokio::test]
async fn ntfy_and_a_signed_webhook_are_told_again_under_the_same_name() -> anyhow::Result<()> {
    let (ntfy, ntfy_url) = Receiver::start(&[503, 429]).await?;
    let (hook, hook_url) = Receiver::start(&[500]).await?;
    let ntfy_keys = "kind = \"ntfy\"\nurl = \"env:NTFY_URL\"\ntoken = \"env:NTFY_TOKEN\"\n\
                     priority = \"high\"\n";
    let hook_keys = "kind = \"webhook\"\nurl = \"env:HOOK_URL\"\nsigning_key = \"env:HOOK_KEY\"\n";
    let config = [SOON, &channel("ops", ntfy_keys), &channel("crm", hook_keys)].concat();
    let mut site = Site::new(&config)?;
    site.set("NTFY_URL", &format!("{ntfy_url}/secret-topic"));
    site.set("NTFY_TOKEN", "tk_secret");
    site.set("HOOK_URL", &format!("{hook_url}/hook"));
    site.set("HOOK_KEY", "whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD");
    let mut up = site.up().await?;

    sign_up(&up, ADA).await?;
    idle(&site, "notify").await?;
    let _up = redeliver(&site, &mut up).await?;
    idle(&site, "notify").await?;

    assert_eq!((ntfy.statuses(), hook.statuses()), (vec![503, 429, 200], vec![500, 200]));
    let calls = ntfy.calls();
    for call in &calls {
        assert_eq!((&*call.path, &*call.headers["authorization"]), ("/", "Bearer tk_secret"));
        assert_eq!(call.headers["x-sequence-id"], calls[0].headers["x-sequence-id"]);
        let body: Value = serde_json::from_slice(&call.body)?;
        assert_eq!(
            body,
            json!({
                "topic": "secret-topic",
                "title": "Willkommen Ada",
                "message": "Guten Tag, ada.byron@example.com",
                "priority": 4,
            })
        );
    }
    let calls = hook.calls();
    assert_eq!(calls[0].headers["webhook-id"], calls[1].headers["webhook-id"]);
    for call in &calls {
        let (id, at) = (&call.headers["webhook-id"], &call.headers["webhook-timestamp"]);
        let signed = [id.as_bytes(), b".", at.as_bytes(), b".", &call.body].concat();
        let key = data_encoding::BASE64.decode(b"C2FVsBQIhrscChlQIMV+b5sSYspob7oD")?;
        let key = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, &key);
        let signature = data_encoding::BASE64.encode(ring::hmac::sign(&key, &signed).as_ref());
        assert_eq!(call.headers["webhook-signature"], format!("v1,{signature}"));
    }
    Ok(())
}

#[tokio::test]
async fn who_holds_a_role_is_written_to_each_on_their_own() -> anyhow::Result<()> {
    let mut smtp = Smtp::start().await?;
    let mail = format!(
        "kind = \"mail\"\nserver = \"{}\"\ntls = \"none\"\nfrom = \"no-reply@vestibule.test\"\n\
         to = [\"role:approver\"]\nkinds = [\"accepted\"]\n",
        smtp.url()
    );
    let rule = "[[workers.permissions.rules]]\nname = \"approvers\"\nrole = \"approver\"\n\
                when = \"signup.email_domain == 'approvers.example'\"\n";
    let site = Site::new(&[SOON, &channel("approvers", &mail), rule].concat())?;
    let mut up = site.up().await?;
    for approver in ["grace", "heidi"] {
        sign_up(&up, &format!("{approver}@approvers.example")).await?;
        for worker in ["permissions", "database", "notify"] {
            idle(&site, worker).await?;
        }
    }
    smtp.refuse_next(vestibule_testkit::SmtpStage::Recipient, "451 later").await?;

    sign_up(&up, ADA).await?;
    idle(&site, "notify").await?;
    let _up = redeliver(&site, &mut up).await?;
    idle(&site, "notify").await?;

    let mails = smtp.mails();
    let about_ada = mails.iter().filter(|it| it.content.contains(ADA));
    let mut to: Vec<_> = about_ada.map(|it| it.recipients.clone()).collect();
    to.sort();
    assert_eq!(to, [["grace@approvers.example"], ["heidi@approvers.example"]]);
    Ok(())
}

#[tokio::test]
async fn try_shows_what_channels_would_say_and_to_whom() -> anyhow::Result<()> {
    let keys = "kind = \"mail\"\nserver = \"smtp://mail.example.com\"\nto = [\"person\"]\n\
                from = \"a@example.com\"\n";
    let devices = "kind = \"fcm\"\nservice_account = \"env:NOT_SET\"\nto = [\"role:approver\"]\n\
                   kinds = [\"accepted\", \"blocked\"]\n";
    let denied = "kind = \"record\"\nkinds = [\"denied\"]\n";
    let channels = [("person", keys), ("approvers", devices), ("denied", denied)];
    let channels = channels.map(|(name, keys)| channel(name, keys));
    let site = Site::new(&channels.concat())?;
    let payload = json!({ "email": ADA, "displayName": "Ada", "ui_locales": "de-CH en" });
    site.write("payload.json", &payload.to_string())?;
    let call = ["try", "--connector", "partners", "--step", "before-create", "payload.json"];

    let tried = site.run(&[&call[..], &["--notify"]].concat()).await?;
    assert_eq!(tried.code, 0, "{tried:?}");
    for part in [
        "notification  person (mail), to the person who signs up (mail)",
        "notification  approvers (fcm), to everybody with the role approver (devices)",
        "notification  kept (record), to nobody: it is kept in the store",
        "  en\n    Welcome Ada\n    Good day, ada.byron@example.com",
        "  de, as this sign-up asks for\n    Willkommen Ada\n    Guten Tag, ada.byron@example.com",
    ] {
        assert!(tried.stdout.contains(part), "{part} is not in\n{}", tried.stdout);
    }
    assert!(!tried.stdout.contains("denied"), "{}", tried.stdout);

    let tried = site.run(&[&call[..], &["--notify", "--output", "json"]].concat()).await?;
    let tried: Value = serde_json::from_str(&tried.stdout)?;
    let names = tried["notifications"].as_array().context("no list")?;
    let names: Vec<_> = names.iter().map(|it| it["channel"].clone()).collect();
    assert_eq!(names, ["kept", "person", "approvers"]);
    let silent = site.run(&[&call[..], &["--output", "json"]].concat()).await?;
    assert_eq!(serde_json::from_str::<Value>(&silent.stdout)?["notifications"], Value::Null);
    Ok(())
}

#[tokio::test]
async fn a_wrong_channel_is_complained_of_with_its_line() -> anyhow::Result<()> {
    for (keys, complaint) in [
        ("kind = \"ntfy\"\n", "needs the key `url`"),
        ("kind = \"webpush\"\n", "did you mean `web-push`?"),
        (
            "kind = \"fcm\"\nservice_account = \"env:A\"\nto = [\"a@b.example\"]\n",
            "devices are those of",
        ),
        (
            "kind = \"apns\"\nkey = \"env:A\"\nkey_id = \"A\"\nteam_id = \"B\"\n",
            "needs the key `topic`",
        ),
        (
            "kind = \"webhook\"\nurl = \"env:A\"\nformat = \"slack\"\nsigning_key = \"env:B\"\n",
            "only the format \"json\" is signed",
        ),
    ] {
        let site = Site::new(&channel("wrong", keys))?;
        let checked = site.run(&["check"]).await?;
        let said = format!("{}{}", checked.stdout, checked.stderr);
        assert_eq!(checked.code, 1, "{keys}: {said}");
        assert!(said.contains(complaint) && said.contains("has 1 mistake"), "{keys}: {said}");
    }
    Ok(())
}
