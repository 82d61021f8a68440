//! Channels against a real HTTP server and a real mail server.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex},
    time::Duration,
};

use anyhow::anyhow;
use axum::{
    Router,
    body::Bytes,
    extract::State,
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse, Response},
    routing::post,
};
use secrecy::SecretString;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use vestibule_events::{Mode, Reason};
use vestibule_store::LetterFilter;
use vestibule_testkit::{Smtp, SmtpStage, free_port};

use super::*;
use crate::testing::{LIMIT, Stage, approved, pending, settings, sign_up, task};

/// A status, with a `Retry-After`, or the `Location` of a redirect.
type Reply = (u16, Option<&'static str>);

/// Answers as told, 200 when told nothing, and remembers what it was sent.
#[derive(Clone, Default)]
struct Provider {
    answers: Arc<Mutex<VecDeque<Reply>>>,
    requests: Arc<Mutex<Vec<(HeaderMap, Value)>>>,
}

impl Provider {
    /// With its URL.
    async fn start(answers: impl IntoIterator<Item = Reply>) -> anyhow::Result<(Self, String)> {
        let provider = Self::default();
        provider.answers.lock().unwrap().extend(answers);
        let router = Router::new().route("/hook", post(take)).with_state(provider.clone());
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let url = format!("http://{}/hook", listener.local_addr()?);
        tokio::spawn(async move { axum::serve(listener, router).await });
        Ok((provider, url))
    }

    fn header(&self, name: &str) -> Vec<String> {
        let requests = self.requests.lock().unwrap();
        let values = requests.iter().filter_map(|(headers, _)| headers.get(name)?.to_str().ok());
        values.map(str::to_owned).collect()
    }
}

async fn take(State(provider): State<Provider>, headers: HeaderMap, body: Bytes) -> Response {
    let body = serde_json::from_slice(&body).unwrap_or_default();
    provider.requests.lock().unwrap().push((headers, body));
    let (status, extra) = provider.answers.lock().unwrap().pop_front().unwrap_or((200, None));
    let status = StatusCode::from_u16(status).unwrap();
    match extra {
        Some(value) if status.is_redirection() => {
            (status, [(header::LOCATION, value)]).into_response()
        }
        Some(value) => (status, [(header::RETRY_AFTER, value)]).into_response(),
        None => (status, "x".repeat(100_000)).into_response(),
    }
}

fn channel(name: &str, kind: ChannelKind) -> ChannelSettings {
    ChannelSettings {
        name: name.into(),
        filter: Filter::default(),
        subject: "Welcome {{ signup.claims.displayName }}".into(),
        body: "{{ signup.email }} came via {{ signup.connector }}. Grüße!".into(),
        language: "en".into(),
        locales: vec![],
        kind,
    }
}

fn webhook(name: &str, url: &str) -> ChannelSettings {
    let headers = vec![("authorization".to_owned(), SecretString::from("Bearer hidden"))];
    let format = WebhookFormat::Json;
    let url = url.to_owned().into();
    channel(name, ChannelKind::Webhook { url, format, headers, signing_key: None })
}

fn mail(name: &str, server: String, to: Recipient) -> ChannelSettings {
    let from = "Vestibule <no-reply@vestibule.test>".to_owned();
    channel(name, ChannelKind::Mail { server, login: None, from, to, tls: MailTls::None })
}

fn notify(stage: &Stage, channels: Vec<ChannelSettings>) -> anyhow::Result<Notify> {
    let notify = Notify::new(NotifySettings { channels, approvals: None }, stage.store.clone());
    notify.map_err(|complaints| anyhow!("{complaints:?}"))
}

#[tokio::test]
async fn a_webhook_that_is_down_is_told_again_under_the_same_key() -> anyhow::Result<()> {
    let stage = Stage::open().await?;
    let event = stage.sign_up("ada").await?;
    let (provider, url) = Provider::start([(503, None), (429, Some("0"))]).await?;
    let channels = vec![webhook("ops", &url), channel("kept", ChannelKind::Record)];

    let running = stage.start(notify(&stage, channels)?, settings(5));
    stage.idle(Notify::NAME).await?;

    let keys = provider.header("idempotency-key");
    assert_eq!(keys.len(), 3);
    assert!(
        keys.iter().all(|key| *key == keys[0] && key.contains(&event.id.to_string())),
        "{keys:?}"
    );
    assert_eq!(provider.header("authorization"), ["Bearer hidden"; 3]);
    assert_eq!(provider.header("content-type"), ["application/cloudevents+json"; 3]);
    let body = provider.requests.lock().unwrap()[2].1.clone();
    assert_eq!(body["data"]["subject"], "Welcome Sample");
    assert_eq!(body["data"]["body"], "ada@example.com came via sample. Grüße!");
    let causes: Vec<_> = stage.store.attempts_of(event.id).await?;
    let causes: Vec<_> = causes.iter().map(|it| &*it.cause_class).collect();
    assert_eq!(causes, ["unavailable", "throttled"]);
    assert_eq!(stage.store.effects(&[event.id]).await?[&event.id].notifications, 2);
    running.stop().await
}

#[tokio::test]
async fn an_event_that_comes_again_tells_nobody_again() -> anyhow::Result<()> {
    let stage = Stage::open().await?;
    let (provider, url) = Provider::start([]).await?;
    let smtp = Smtp::start().await?;
    let worker = notify(
        &stage,
        vec![
            webhook("ops", &url),
            mail("person", smtp.url(), Recipient::Person),
            channel("kept", ChannelKind::Record),
        ],
    )?;
    let task = task(sign_up("ada"));

    for _ in 0..3 {
        worker.handle(&task).await?;
    }

    smtp.wait_for_mails(1, LIMIT).await?;
    assert_eq!((provider.requests.lock().unwrap().len(), smtp.mails().len()), (1, 1));
    let id = task.event.id;
    assert_eq!(stage.store.effects(&[id]).await?[&id].notifications, 3);
    Ok(())
}

#[tokio::test]
async fn one_channel_that_refuses_parks_the_event_once_the_others_are_done() -> anyhow::Result<()> {
    let stage = Stage::open().await?;
    let event = stage.sign_up("ada").await?;
    let (refusing, refusing_url) = Provider::start([(403, None), (403, None)]).await?;
    let (late, late_url) = Provider::start([(500, None)]).await?;
    let (fine, fine_url) = Provider::start([]).await?;
    let channels = vec![
        webhook("refusing", &refusing_url),
        webhook("late", &late_url),
        webhook("fine", &fine_url),
    ];

    let running = stage.start(notify(&stage, channels)?, settings(5));
    stage.idle(Notify::NAME).await?;

    let told = |it: &Provider| it.requests.lock().unwrap().len();
    assert_eq!((told(&refusing), told(&late), told(&fine)), (2, 2, 1));
    let letters = stage.store.letters(&LetterFilter::default(), None, 10).await?;
    assert_eq!(letters.len(), 1);
    assert_eq!((letters[0].event_id, &*letters[0].cause_class), (Some(event.id), "refused"));
    assert_eq!(letters[0].error, "channel `refusing`: the webhook answered 403 Forbidden");
    running.stop().await
}

#[tokio::test]
async fn a_redirect_is_not_followed_and_a_dead_port_is_for_later() -> anyhow::Result<()> {
    let stage = Stage::open().await?;
    let (elsewhere, elsewhere_url) = Provider::start([]).await?;
    let target: &'static str = elsewhere_url.leak();
    let (_provider, url) = Provider::start([(307, Some(target))]).await?;
    let event = sign_up("ada");

    let outcome = notify(&stage, vec![webhook("ops", &url)])?.handle(&task(event.clone())).await;
    assert!(matches!(outcome, Err(HandleError::Park { cause: Cause::Refused, .. })), "{outcome:?}");
    assert!(elsewhere.requests.lock().unwrap().is_empty());

    let dead = format!("http://127.0.0.1:{}/hidden", free_port());
    let outcome = notify(&stage, vec![webhook("ops", &dead)])?.handle(&task(event)).await;
    let Err(HandleError::Retry { source, cause: Cause::Unavailable, .. }) = outcome else {
        panic!("{outcome:?}");
    };
    assert!(!format!("{source:#}").contains("hidden"), "{source:#}");
    Ok(())
}

#[tokio::test]
async fn a_pause_that_the_provider_asks_for_reaches_the_runtime() -> anyhow::Result<()> {
    let stage = Stage::open().await?;
    let (_provider, url) = Provider::start([(503, Some("7"))]).await?;

    let outcome = notify(&stage, vec![webhook("ops", &url)])?.handle(&task(sign_up("ada"))).await;

    let Err(HandleError::Retry { after, .. }) = outcome else {
        panic!("{outcome:?}");
    };
    assert_eq!(after, Some(Duration::from_secs(7)));
    Ok(())
}

#[tokio::test]
async fn a_mail_says_who_sent_it_and_cannot_be_broken_out_of() -> anyhow::Result<()> {
    let stage = Stage::open().await?;
    let smtp = Smtp::start().await?;
    let mut event = sign_up("ada");
    let name = json!("Ada\r\nBcc: eve@example.com\r\n\r\nHello");
    event.sign_up.claims.insert("displayName".into(), name);
    let team =
        Recipient::Fixed(vec!["Team <team@vestibule.test>".into(), "b@vestibule.test".into()]);
    let channels =
        vec![mail("team", smtp.url(), team), mail("person", smtp.url(), Recipient::Person)];

    notify(&stage, channels)?.handle(&task(event.clone())).await?;

    let mut mails = smtp.wait_for_mails(2, LIMIT).await?;
    mails.sort_by_key(|it| it.recipients.len());
    assert_eq!(mails[0].recipients, ["ada@example.com"]);
    assert_eq!(mails[1].recipients, ["team@vestibule.test", "b@vestibule.test"]);
    assert_eq!(mails[0].from, "no-reply@vestibule.test");
    let (headers, body) = mails[0].content.split_once("\r\n\r\n").unwrap();
    let id = format!("Message-ID: <{}.person@vestibule.test>", event.id);
    assert!(headers.contains(&id), "{headers}");
    assert!(headers.contains("Subject: Welcome Ada Bcc: eve@example.com Hello"), "{headers}");
    assert!(!headers.contains("\r\nBcc"), "{headers}");
    assert!(headers.contains("Auto-Submitted: auto-generated"), "{headers}");
    assert!(body.contains("ada@example.com came via sample."), "{body}");
    Ok(())
}

#[tokio::test]
async fn a_mail_server_may_refuse_for_now_or_for_good() -> anyhow::Result<()> {
    let stage = Stage::open().await?;
    let mut smtp = Smtp::start().await?;
    smtp.refuse_next(SmtpStage::Data, "451 4.7.1 greylisted ada@example.com").await?;
    smtp.refuse_next(SmtpStage::Recipient, "550 5.1.1 <ada@example.com> unknown").await?;
    let worker = notify(&stage, vec![mail("person", smtp.url(), Recipient::Person)])?;
    let told = async || worker.handle(&task(sign_up("ada"))).await;

    let unknown = told().await;
    let Err(HandleError::Park { source, cause: Cause::Refused }) = unknown else {
        panic!("{unknown:?}");
    };
    assert_eq!(format!("{source:#}"), "channel `person`: the mail server answered 550");
    let greylisted = told().await;
    let Err(HandleError::Retry { source, cause: Cause::NotYet, .. }) = greylisted else {
        panic!("{greylisted:?}");
    };
    assert_eq!(format!("{source:#}"), "channel `person`: the mail server answered 451");
    told().await?;

    let dead = format!("smtp://127.0.0.1:{}", free_port());
    let worker = notify(&stage, vec![mail("person", dead, Recipient::Person)])?;
    let outcome = worker.handle(&task(sign_up("ada"))).await;
    assert!(
        matches!(outcome, Err(HandleError::Retry { cause: Cause::Unavailable, .. })),
        "{outcome:?}"
    );
    Ok(())
}

#[tokio::test]
async fn a_password_is_used_and_a_wrong_one_blames_no_event() -> anyhow::Result<()> {
    let stage = Stage::open().await?;
    let smtp = Smtp::start_with_login("vestibule", "right").await?;
    let with = |password: &str| {
        let mut settings = mail("person", smtp.url(), Recipient::Person);
        if let ChannelKind::Mail { login, .. } = &mut settings.kind {
            let password = password.to_owned().into();
            *login = Some(MailLogin { user: "vestibule".into(), password });
        }
        notify(&stage, vec![settings])
    };

    let outcome = with("wrong")?.handle(&task(sign_up("ada"))).await;
    assert!(matches!(outcome, Err(HandleError::Retry { .. })), "{outcome:?}");
    with("right")?.handle(&task(sign_up("ada"))).await?;

    let mails = smtp.wait_for_mails(1, LIMIT).await?;
    assert_eq!(mails[0].login.as_deref(), Some("vestibule"));
    Ok(())
}

#[tokio::test]
async fn where_tls_is_required_nothing_travels_in_the_clear() -> anyhow::Result<()> {
    let stage = Stage::open().await?;
    let smtp = Smtp::start().await?;
    let with = |wanted: MailTls| {
        let mut settings = mail("person", smtp.url(), Recipient::Person);
        if let ChannelKind::Mail { tls, .. } = &mut settings.kind {
            *tls = wanted;
        }
        notify(&stage, vec![settings])
    };

    let outcome = with(MailTls::Required)?.handle(&task(sign_up("ada"))).await;
    let Err(HandleError::Retry { source, cause: Cause::Unavailable, .. }) = outcome else {
        panic!("{outcome:?}");
    };
    assert!(format!("{source:#}").contains("TLS"), "{source:#}");
    with(MailTls::Opportunistic)?.handle(&task(sign_up("bob"))).await?;

    let mails = smtp.wait_for_mails(1, LIMIT).await?;
    assert_eq!(mails[0].recipients, ["bob@example.com"]);
    Ok(())
}

#[tokio::test]
async fn without_a_usable_address_no_mail_is_tried() -> anyhow::Result<()> {
    let stage = Stage::open().await?;
    let smtp = Smtp::start().await?;
    let worker = notify(&stage, vec![mail("person", smtp.url(), Recipient::Person)])?;

    let mut event = sign_up("ada");
    event.sign_up.email = None;
    worker.handle(&task(event.clone())).await?;
    for address in
        ["ada", "ädä@example.com", "ada@example.com\r\nRCPT TO:<eve@example.com>", "a@b, c@d"]
    {
        event.sign_up.email = Some(vestibule_events::Email::new(address));
        let outcome = worker.handle(&task(event.clone())).await;
        let parked =
            matches!(outcome, Err(HandleError::Park { cause: Cause::InvalidRecipient, .. }));
        assert!(parked, "{address}: {outcome:?}");
    }
    assert_eq!(smtp.mails(), []);
    Ok(())
}

#[tokio::test]
async fn only_the_channels_that_want_an_event_are_told() -> anyhow::Result<()> {
    let stage = Stage::open().await?;
    let mut blocked_only = channel("blocked-only", ChannelKind::Record);
    blocked_only.filter.kinds = vec![vestibule_events::Kind::Blocked];
    let worker = notify(&stage, vec![blocked_only, channel("all", ChannelKind::Record)])?;
    let event = sign_up("ada");

    worker.handle(&task(event.clone())).await?;

    assert_eq!(stage.store.effects(&[event.id]).await?[&event.id].notifications, 1);
    Ok(())
}

#[tokio::test]
async fn approvers_are_told_once_of_a_request_and_the_person_of_the_decision() -> anyhow::Result<()>
{
    let stage = Stage::open().await?;
    let (approvers, url) = Provider::start([]).await?;
    let smtp = Smtp::start().await?;
    let mut asking = webhook("approvers", &url);
    asking.filter.kinds = vec![Kind::Pending];
    asking.body = "{{ approval.link }} until {{ approval.expires_at }}".into();
    let mut telling = mail("person", smtp.url(), Recipient::Person);
    telling.filter.kinds = vec![Kind::Approved, Kind::Denied];
    telling.body = "{{ event.kind }}: {{ approval.reason }}".into();
    let settings = NotifySettings {
        channels: vec![asking, telling],
        approvals: Some(ApprovalPages::sample()),
    };
    let worker = Notify::new(settings, stage.store.clone()).unwrap();
    let first = pending("ada");
    let mut again = pending("ada");
    let (rule, effect) = ("r".to_owned(), Effect::AlreadyPending);
    again.decision.reasons =
        vec![Reason { rule, effect, mode: Mode::Enforce, failure: None, took_us: 0 }];

    for event in [first, again, approved("ada")] {
        worker.handle(&task(event)).await?;
    }

    let asked = approvers.requests.lock().unwrap().clone();
    assert_eq!(asked.len(), 1);
    let body = asked[0].1["data"]["body"].as_str().unwrap_or_default().to_owned();
    assert!(body.starts_with("https://sign-up.example.com/approvals/"), "{body}");
    let mails = smtp.wait_for_mails(1, LIMIT).await?;
    assert_eq!((mails.len(), mails[0].content.contains("approved: known to us")), (1, true));
    Ok(())
}

#[test]
fn a_worker_takes_what_its_channels_want() {
    let mut filters = [Filter::default(), Filter::default()];
    filters[1].kinds = vec![Kind::Pending, Kind::Approved];
    let wanted = Notify::wanted_kinds(&mut filters);
    assert_eq!(wanted, [Kind::Accepted, Kind::Pending, Kind::Approved]);
    assert_eq!(filters[0].kinds, [Kind::Accepted], "what another channel wants is not for it");
}

/// Within a runtime, which a channel for mail wants where it ends.
#[tokio::test]
async fn nobody_is_sent_the_link_that_decides_about_them() {
    let complaints = |to: Recipient, body: &str| {
        let server = "smtp://localhost".to_owned();
        let channel = ChannelSettings { body: body.into(), ..mail("told", server, to) };
        let approvals = Some(ApprovalPages::sample());
        Notify::check(&NotifySettings { channels: vec![channel], approvals })
    };
    let approvers = || Recipient::Fixed(vec!["approvers@vestibule.test".to_owned()]);
    assert_eq!(complaints(approvers(), "{{ approval.link }}"), Ok(()));
    assert_eq!(complaints(Recipient::Person, "until {{ approval.expires_at }}"), Ok(()));
    let complaints = complaints(Recipient::Person, "{{ approval.link }}").unwrap_err();
    assert_eq!(complaints[0].key, "body");
    assert!(complaints[0].message.contains("never goes to the person"), "{complaints:?}");
}

#[test]
fn all_complaints_come_at_once_without_secrets() {
    let mut wrong = webhook("Wrong Name", "hidden");
    wrong.subject = "{{ nobody }}".into();
    let mut clear =
        mail("mail", "smtp://mail.example.com".into(), Recipient::Fixed(vec!["x".into()]));
    if let ChannelKind::Mail { login, from, .. } = &mut clear.kind {
        *login = Some(MailLogin { user: "u".into(), password: "hidden".into() });
        *from = "nobody".into();
    }
    let settings = NotifySettings {
        channels: vec![wrong, clear, channel("mail", ChannelKind::Record)],
        approvals: None,
    };

    let complaints = Notify::check(&settings).unwrap_err();

    let seen: Vec<_> = complaints.iter().map(|it| (it.index, it.key)).collect();
    assert_eq!(
        seen,
        [
            (0, "name"),
            (0, "subject"),
            (0, "url"),
            (1, "from"),
            (1, "to"),
            (1, "login"),
            (2, "name")
        ]
    );
    assert!(!format!("{complaints:?} {settings:?}").contains("hidden"));
}

#[test]
fn the_way_that_leaves_most_open_decides() {
    let retry = |after| {
        let after = Some(Duration::from_secs(after));
        Err(HandleError::Retry { source: anyhow!("r"), cause: Cause::Throttled, after })
    };
    let park = || Err(HandleError::park(Cause::Refused, anyhow!("p")));
    let store = || Err(HandleError::StoreUnavailable(anyhow!("s")));

    assert!(matches!(worst(Ok(()), park()), Err(HandleError::Park { .. })));
    assert!(matches!(worst(park(), store()), Err(HandleError::StoreUnavailable(_))));
    assert!(matches!(worst(store(), retry(1)), Err(HandleError::StoreUnavailable(_))));
    for both in [worst(park(), retry(2)), worst(retry(2), park()), worst(retry(1), retry(2))] {
        let Err(HandleError::Retry { after, cause: Cause::Throttled, .. }) = both else {
            panic!("{both:?}");
        };
        assert_eq!(after, Some(Duration::from_secs(2)), "the longest pause that was asked for");
    }
}
