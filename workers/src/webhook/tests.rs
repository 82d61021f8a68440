//! Against receivers that are there: what arrives, what each answer does, and who is not reached.

use std::{
    collections::VecDeque,
    io::Write as _,
    net::{IpAddr, SocketAddr},
    process::{Command, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use anyhow::Context as _;
use axum::{
    Router,
    body::Bytes,
    extract::State,
    http::{HeaderMap, Method, StatusCode, Uri, header},
    response::{IntoResponse as _, Response},
};
use data_encoding::BASE64;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls::{
    RootCertStore, ServerConfig,
    pki_types::{CertificateDer, PrivateKeyDer},
    server::WebPkiClientVerifier,
};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpListener,
    task::JoinHandle,
};
use tokio_rustls::TlsAcceptor;
use vestibule_testkit::eventually;

use super::*;
use crate::{
    Cause,
    testing::{LIMIT, Stage, settings as worker_settings, sign_up, task},
};

const KEY: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
const OWN_KEY: &str = "whsk_VEVTVFNJR05JTkdLRVlET05PVFVTRVRISVNGT1JBTlk=";

/// Somebody who is posted to; ends when dropped.
struct Receiver {
    address: SocketAddr,
    memory: Arc<Mutex<Memory>>,
    server: JoinHandle<()>,
}

#[derive(Default)]
struct Memory {
    got: Vec<Got>,
    planned: VecDeque<Response>,
    /// Once nothing is planned.
    always: Option<StatusCode>,
}

#[derive(Clone)]
struct Got {
    method: Method,
    path: String,
    headers: HeaderMap,
    body: Bytes,
}

impl Got {
    fn header(&self, name: &str) -> &str {
        self.headers[name].to_str().unwrap()
    }

    fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap()
    }
}

impl Receiver {
    async fn start() -> anyhow::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let memory = Arc::<Mutex<Memory>>::default();
        let router = Router::new().fallback(receive).with_state(Arc::clone(&memory));
        let server = tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        Ok(Self { address, memory, server })
    }

    fn url(&self) -> String {
        format!("http://{}/in?token=hidden", self.address)
    }

    fn plan(&self, answer: impl axum::response::IntoResponse) {
        self.memory.lock().unwrap().planned.push_back(answer.into_response());
    }

    /// From now on; gives how much came before.
    fn always(&self, status: u16) -> usize {
        let mut memory = self.memory.lock().unwrap();
        memory.always = Some(StatusCode::from_u16(status).unwrap());
        memory.got.len()
    }

    fn got(&self) -> Vec<Got> {
        self.memory.lock().unwrap().got.clone()
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.server.abort();
    }
}

async fn receive(
    State(memory): State<Arc<Mutex<Memory>>>,
    method: Method,
    uri: Uri,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    let mut memory = memory.lock().unwrap();
    memory.got.push(Got { method, path: uri.to_string(), headers, body });
    let always = memory.always.unwrap_or(StatusCode::NO_CONTENT);
    memory.planned.pop_front().unwrap_or_else(|| always.into_response())
}

/// A subscriber on this machine, which its operators allow.
fn settings(url: &str) -> WebhookSettings {
    WebhookSettings {
        networks: vec!["127.0.0.1/32".parse().unwrap()],
        ..WebhookSettings::new("crm", url.into(), KEY.into())
    }
}

fn subscriber(settings: WebhookSettings) -> WebhookSubscriber {
    WebhookSubscriber::new(settings).unwrap()
}

async fn deliver(to: &WebhookSubscriber) -> Result<(), HandleError> {
    to.handle(&task(sign_up("ada"))).await
}

/// Its cause, and whether it may go through later; with what it says.
fn failure(outcome: Result<(), HandleError>) -> (Cause, bool, String) {
    match outcome.expect_err("it went through") {
        HandleError::Retry { cause, source, .. } => (cause, true, format!("{source:#}")),
        HandleError::Park { cause, source } => (cause, false, format!("{source:#}")),
        HandleError::StoreUnavailable(_) => unreachable!("there is no store here"),
    }
}

#[tokio::test]
async fn an_event_arrives_signed_and_under_the_same_id_each_time() -> anyhow::Result<()> {
    let receiver = Receiver::start().await?;
    let mut settings = settings(&receiver.url());
    settings.keys.push(OWN_KEY.into());
    settings.headers = vec![("x-tenant".into(), "hidden".into())];
    let subscriber = subscriber(settings);
    let task = task(sign_up("ada"));

    subscriber.handle(&task).await?;
    subscriber.handle(&task).await?;

    let [first, second] = &receiver.got()[..] else { panic!("two were sent") };
    assert_eq!((&first.method, first.path.as_str()), (&Method::POST, "/in?token=hidden"));
    assert_eq!(first.header("content-type"), "application/cloudevents+json");
    assert_eq!(first.header("x-tenant"), "hidden");
    assert!(first.header("user-agent").starts_with("vestibule/"));
    assert_eq!(first.json(), serde_json::to_value(&task.event)?);
    assert_eq!(first.header("webhook-id"), format!("{}:crm", task.event.id));
    assert_eq!(first.header("webhook-id"), second.header("webhook-id"));
    let signatures: Vec<_> = first.header("webhook-signature").split(' ').collect();
    assert!(signatures[0].starts_with("v1,") && signatures[1].starts_with("v1a,"));
    assert_eq!(signatures.len(), 2);
    Ok(())
}

/// Reads what a receiver got, and verifies it as receivers do.
const VERIFY: &str = "
import json, sys
from standardwebhooks import Webhook, WebhookVerificationError
got = json.load(sys.stdin)
def verify(key, headers, body):
    try:
        return Webhook(key).verify(body, headers)
    except WebhookVerificationError as error:
        return str(error)
for case in got:
    print(json.dumps(verify(case['key'], case['headers'], case['body'])))
";

#[tokio::test]
async fn the_official_library_believes_what_we_send() -> anyhow::Result<()> {
    let receiver = Receiver::start().await?;
    let new_key = format!("whsec_{}", BASE64.encode(&[7; 32]));
    let mut settings = settings(&receiver.url());
    settings.keys = vec![new_key.as_str().into(), OWN_KEY.into(), KEY.into()];
    let event = sign_up("ada");
    let told = serde_json::to_value(&event)?;
    subscriber(settings).handle(&task(event)).await?;

    let got = &receiver.got()[0];
    let names = ["webhook-id", "webhook-timestamp", "webhook-signature"];
    let headers: Value = names.iter().map(|name| (*name, got.header(name))).collect();
    let body = str::from_utf8(&got.body)?;
    let forged = body.replace("ada@", "eve@");
    let mut another_id = headers.clone();
    another_id["webhook-id"] = "another".into();
    let case = |key: &str, headers: &Value, body: &str| json!({ "key": key, "headers": headers, "body": body });
    let cases = json!([
        case(&new_key, &headers, body),
        case(KEY, &headers, body),
        case(&format!("whsec_{}", BASE64.encode(&[8; 32])), &headers, body),
        case(KEY, &headers, &forged),
        case(KEY, &another_id, body),
    ]);

    let mut python = Command::new(vestibule_testkit::python()?)
        .args(["-c", VERIFY])
        .env("PYTHONPATH", vestibule_testkit::packages("standardwebhooks")?)
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    python.stdin.take().context("no way in")?.write_all(cases.to_string().as_bytes())?;
    let output = python.wait_with_output()?;
    anyhow::ensure!(output.status.success(), "the library did not run: {}", output.status);
    let lines = str::from_utf8(&output.stdout)?.lines();
    let verdicts: Vec<Value> = lines.map(serde_json::from_str).collect::<Result<_, _>>()?;

    let no = json!("No matching signature found");
    assert_eq!(verdicts, [told.clone(), told, no.clone(), no.clone(), no]);
    Ok(())
}

#[tokio::test]
async fn the_parts_of_an_event_and_what_a_template_makes_are_signed_too() -> anyhow::Result<()> {
    let receiver = Receiver::start().await?;
    let event = sign_up("ada");
    let binary = WebhookSettings { mode: WebhookMode::Binary, ..settings(&receiver.url()) };
    let template = Some(r#"{"who": {{ signup.email }}}"#.to_owned());
    let rendered = WebhookSettings { template, ..settings(&receiver.url()) };
    subscriber(binary).handle(&task(event.clone())).await?;
    subscriber(rendered).handle(&task(event.clone())).await?;

    let [binary, rendered] = &receiver.got()[..] else { panic!("two were sent") };
    assert_eq!(binary.header("ce-id"), event.id.to_string());
    assert_eq!(binary.json(), serde_json::to_value(&event)?["data"]);
    assert_eq!(rendered.json(), json!({ "who": "ada@example.com" }));
    let keys = SigningKeys::parse(&[KEY.into()])?;
    for got in [binary, rendered] {
        let at = OffsetDateTime::from_unix_timestamp(got.header("webhook-timestamp").parse()?)?;
        let headers = keys.headers(&got.headers["webhook-id"], at, &got.body);
        assert_eq!(headers[2].1, got.headers["webhook-signature"]);
    }
    Ok(())
}

#[tokio::test]
async fn each_answer_has_its_meaning() -> anyhow::Result<()> {
    let receiver = Receiver::start().await?;
    let subscriber = subscriber(settings(&receiver.url()));
    for done in [200, 201, 202, 204, 299] {
        receiver.always(done);
        deliver(&subscriber).await?;
    }
    for (status, cause, may_pass) in [
        (408, Cause::Timeout, true),
        (425, Cause::Throttled, true),
        (429, Cause::Throttled, true),
        (500, Cause::Unavailable, true),
        (502, Cause::Unavailable, true),
        (503, Cause::Unavailable, true),
        (504, Cause::Unavailable, true),
        (410, Cause::Gone, true),
        (400, Cause::Refused, false),
        (413, Cause::Refused, false),
        (422, Cause::Refused, false),
        (401, Cause::NotPermitted, false),
        (403, Cause::NotPermitted, false),
        (404, Cause::NotPermitted, false),
        (405, Cause::NotPermitted, false),
        (301, Cause::NotPermitted, false),
        (304, Cause::NotPermitted, false),
    ] {
        receiver.always(status);
        let (got, passes, text) = failure(deliver(&subscriber).await);
        assert_eq!((got, passes), (cause, may_pass), "{status}");
        assert!(text.contains(&status.to_string()) && !text.contains("hidden"), "{text}");
        let named = match status {
            401 | 403 => "`auth`",
            301 | 304 | 404 | 405 => "`url`",
            410 => "`vestibule subscriber resume`",
            _ => "",
        };
        assert!(text.contains(named), "what to look at: {text}");
    }
    receiver.plan((StatusCode::SERVICE_UNAVAILABLE, [(header::RETRY_AFTER, "7")]));
    let outcome = deliver(&subscriber).await;
    assert!(
        matches!(outcome, Err(HandleError::Retry { after: Some(it), .. }) if it.as_secs() == 7)
    );
    Ok(())
}

#[tokio::test]
async fn nobody_is_sent_to_who_was_not_configured() -> anyhow::Result<()> {
    let (receiver, other) = (Receiver::start().await?, Receiver::start().await?);
    let subscriber = subscriber(settings(&receiver.url()));
    for status in [301, 302, 303, 307, 308] {
        receiver.plan((StatusCode::from_u16(status)?, [(header::LOCATION, other.url())]));
        let (_, _, text) = failure(deliver(&subscriber).await);
        assert!(text.contains("redirects are not followed"), "{text}");
    }
    assert_eq!((receiver.got().len(), other.got().len()), (5, 0));
    Ok(())
}

/// Gives one address after the other; the last one for ever. With how often it was asked.
fn names(addresses: &'static [&'static str]) -> (Lookup, Arc<AtomicUsize>) {
    let asked = Arc::<AtomicUsize>::default();
    let counted = Arc::clone(&asked);
    let lookup: Lookup = Arc::new(move |_| {
        let turn = counted.fetch_add(1, Ordering::SeqCst).min(addresses.len() - 1);
        let address: IpAddr = addresses[turn].parse().unwrap();
        Box::pin(async move { Ok(vec![address]) })
    });
    (lookup, asked)
}

#[tokio::test]
async fn a_name_that_changes_its_mind_is_judged_each_time() -> anyhow::Result<()> {
    let receiver = Receiver::start().await?;
    let url = format!("http://subscriber.example.com:{}/", receiver.address.port());
    let (lookup, asked) = names(&["127.0.0.1", "127.0.0.2", "169.254.169.254", "127.0.0.1"]);
    let subscriber = WebhookSubscriber::with_lookup(settings(&url), lookup).unwrap();
    let close = || receiver.plan((StatusCode::OK, [(header::CONNECTION, "close")]));

    close();
    deliver(&subscriber).await?;
    assert_eq!(asked.load(Ordering::SeqCst), 1, "what was judged is what was connected to");
    for what in ["this machine", "link-local"] {
        let (cause, may_pass, text) = failure(deliver(&subscriber).await);
        assert_eq!((cause, may_pass), (Cause::NotPermitted, true));
        assert!(text.contains(what) && text.contains("`networks`"), "{text}");
    }
    close();
    deliver(&subscriber).await?;
    assert_eq!((asked.load(Ordering::SeqCst), receiver.got().len()), (4, 2));
    Ok(())
}

#[tokio::test]
async fn this_machine_is_out_of_reach_unless_it_is_allowed() -> anyhow::Result<()> {
    let receiver = Receiver::start().await?;
    let port = receiver.address.port();
    // An address is refused before anything starts, a name when it is called.
    for host in ["127.0.0.1", "2130706433", "0x7f.1", "[::1]", "[::ffff:127.0.0.1]"] {
        let networks = vec!["10.0.0.0/8".parse()?];
        let url = format!("http://{host}:{port}/");
        let faults = WebhookSubscriber::check(&WebhookSettings { networks, ..settings(&url) });
        let faults = faults.unwrap_err();
        assert!(faults[0].key == "url" && faults[0].message.contains("this machine"), "{faults:?}");
    }
    let public = format!("http://1.1.1.1:{port}/");
    let faults = WebhookSubscriber::check(&settings(&public)).unwrap_err();
    assert!(faults[0].message.contains("without TLS"), "{faults:?}");
    for scheme in ["http", "https"] {
        let networks = vec!["10.0.0.0/8".parse()?];
        let url = format!("{scheme}://localhost:{port}/");
        let subscriber = subscriber(WebhookSettings { networks, ..settings(&url) });
        let (cause, _, text) = failure(deliver(&subscriber).await);
        assert!(cause == Cause::NotPermitted && text.contains("this machine"), "{text}");
    }
    assert!(receiver.got().is_empty());
    Ok(())
}

#[tokio::test]
async fn who_wants_no_more_is_left_alone_and_misses_nothing() -> anyhow::Result<()> {
    let (stage, receiver) = (Stage::open().await?, Receiver::start().await?);
    receiver.always(410);
    stage.sign_ups(5).await?;
    let worker = subscriber(settings(&receiver.url()));
    // One try each: waiting costs none.
    let running = stage.start(worker, worker_settings(1));

    eventually(LIMIT, "the worker is paused", async || {
        Ok::<_, anyhow::Error>(stage.store.paused("crm").await?.is_some())
    })
    .await?;
    let paused = stage.store.paused("crm").await?.context("it is paused")?;
    assert_eq!(paused.paused_by, "vestibule");
    assert!(paused.reason.contains("410"), "{}", paused.reason);
    eventually(LIMIT, "what was in hand is handed back", async || {
        let metrics = running.metrics("crm");
        Ok::<_, anyhow::Error>(metrics.in_hand.get() == 0 && metrics.paused.get() == 1)
    })
    .await?;
    let one_more = stage.sign_up("ada").await?;
    let told = receiver.always(200);
    assert!(stage.store.resume_worker("crm").await?);
    stage.idle("crm").await?;

    let got = receiver.got();
    let mut ids: Vec<_> = got[told..].iter().map(|it| it.header("webhook-id")).collect();
    ids.sort_unstable();
    ids.dedup();
    assert_eq!((got.len() - told, ids.len()), (6, 6), "each is delivered once");
    assert!(ids.contains(&format!("{}:crm", one_more.id).as_str()));
    assert_eq!(stage.store.set_aside("crm").await?.parked, 0);
    running.stop().await
}

/// Hands out `t1`, `t2` and so on, at `/token`; takes posts elsewhere with the token it is told.
#[tokio::test]
async fn a_token_is_fetched_kept_and_renewed_once_when_it_is_not_taken() -> anyhow::Result<()> {
    let (issuer, receiver) = (Receiver::start().await?, Receiver::start().await?);
    let grant = |token: &str| {
        issuer.plan(axum::Json(json!({ "access_token": token, "expires_in": 3600 })));
    };
    let auth = WebhookAuth::ClientCredentials {
        token_url: format!("http://{}/token", issuer.address),
        client_id: "vestibule".into(),
        client_secret: "p&ss hidden".into(),
        scope: Some("events.write".into()),
    };
    let settings = WebhookSettings { auth: Some(auth), ..settings(&receiver.url()) };
    let subscriber = subscriber(settings);

    grant("t1");
    deliver(&subscriber).await?;
    deliver(&subscriber).await?;
    let [asked] = &issuer.got()[..] else { panic!("one token serves") };
    assert_eq!(
        str::from_utf8(&asked.body)?,
        "grant_type=client_credentials&client_id=vestibule&client_secret=p%26ss%20hidden&scope=events%2Ewrite"
    );

    grant("t2");
    receiver.plan(StatusCode::UNAUTHORIZED);
    deliver(&subscriber).await?;
    grant("t3");
    receiver.always(401);
    let (cause, may_pass, _) = failure(deliver(&subscriber).await);
    assert_eq!((cause, may_pass), (Cause::NotPermitted, false));
    let tokens: Vec<_> =
        receiver.got().iter().map(|it| it.header("authorization").to_owned()).collect();
    assert_eq!(tokens, ["t1", "t1", "t1", "t2", "t2", "t3"].map(|it| format!("Bearer {it}")));

    issuer.always(401);
    let told = receiver.got().len();
    let (cause, may_pass, text) = failure(deliver(&subscriber).await);
    // The token that was refused last is still the one we have; it is tried before another is asked for.
    assert_eq!((cause, may_pass), (Cause::NotPermitted, true));
    assert!(text.contains("client_secret") && !text.contains("hidden"), "{text}");
    assert_eq!(receiver.got().len(), told + 1);
    Ok(())
}

/// Takes a TLS connection after the other, answers 200, and says of whom the client's certificate is.
struct TlsReceiver {
    address: SocketAddr,
    authority: String,
    /// The client's certificate with its key.
    client: String,
    server: JoinHandle<()>,
    shown: Arc<Mutex<Vec<CertificateDer<'static>>>>,
}

impl Drop for TlsReceiver {
    fn drop(&mut self) {
        self.server.abort();
    }
}

impl TlsReceiver {
    async fn start() -> anyhow::Result<Self> {
        crate::tls::install_provider();
        let mut params = CertificateParams::new(vec![])?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let authority = CertifiedIssuer::self_signed(params, KeyPair::generate()?)?;
        let key = KeyPair::generate()?;
        let certificate = CertificateParams::new(vec!["subscriber.example.com".to_owned()])?
            .signed_by(&key, &authority)?;
        let client_key = KeyPair::generate()?;
        let client = CertificateParams::new(vec!["vestibule.example.com".to_owned()])?
            .signed_by(&client_key, &authority)?;

        let mut roots = RootCertStore::empty();
        roots.add(authority.der().clone())?;
        let verifier = WebPkiClientVerifier::builder(Arc::new(roots)).build()?;
        let config = ServerConfig::builder().with_client_cert_verifier(verifier).with_single_cert(
            vec![certificate.der().clone()],
            PrivateKeyDer::try_from(key.serialize_der()).map_err(anyhow::Error::msg)?,
        )?;
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let shown = Arc::<Mutex<Vec<_>>>::default();
        let seen = Arc::clone(&shown);
        let server = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                // Who shows no certificate gets no further.
                let Ok(mut stream) = acceptor.accept(stream).await else { continue };
                let of_client = stream.get_ref().1.peer_certificates().unwrap_or_default();
                seen.lock().unwrap().extend(of_client.iter().map(|it| it.clone().into_owned()));
                let mut request = [0; 4096];
                let _ = stream.read(&mut request).await;
                let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
                let _ = stream.write_all(answer).await;
                let _ = stream.shutdown().await;
            }
        });
        let client = format!("{}{}", client.pem(), client_key.serialize_pem());
        Ok(Self { address, authority: authority.pem(), client, server, shown })
    }

    fn subscriber(&self, settings: WebhookSettings) -> WebhookSubscriber {
        let (lookup, _) = names(&["127.0.0.1"]);
        let url = format!("https://subscriber.example.com:{}/", self.address.port()).into();
        WebhookSubscriber::with_lookup(WebhookSettings { url, ..settings }, lookup).unwrap()
    }
}

#[tokio::test]
async fn a_client_certificate_is_shown_to_who_is_trusted() -> anyhow::Result<()> {
    let receiver = TlsReceiver::start().await?;
    let auth = Some(WebhookAuth::Certificate(receiver.client.clone().into()));
    let authorities = Some(receiver.authority.clone());
    let both = WebhookSettings { auth, authorities, ..settings("https://replaced.example.com") };

    deliver(&receiver.subscriber(both.clone())).await?;
    let shown = receiver.shown.lock().unwrap().clone();
    let expected = reqwest::Certificate::from_pem_bundle(receiver.client.as_bytes());
    assert_eq!((shown.len(), expected.is_ok()), (1, true));

    let unknown = receiver.subscriber(WebhookSettings { auth: None, ..both.clone() });
    let (cause, may_pass, _) = failure(deliver(&unknown).await);
    assert_eq!((cause, may_pass), (Cause::Unavailable, true), "no certificate, no delivery");
    let untrusted = receiver.subscriber(WebhookSettings { authorities: None, ..both });
    let (cause, may_pass, _) = failure(deliver(&untrusted).await);
    assert_eq!((cause, may_pass), (Cause::Unavailable, true), "its authority is not known");
    assert_eq!(receiver.shown.lock().unwrap().len(), 1);
    Ok(())
}

#[tokio::test]
async fn who_is_silent_or_never_ends_holds_nobody_up() -> anyhow::Result<()> {
    let silent = TcpListener::bind("127.0.0.1:0").await?;
    let url = format!("http://{}/", silent.local_addr()?);
    let timeout = Duration::from_millis(200);
    let subscriber = subscriber(WebhookSettings { timeout, ..settings(&url) });
    assert_eq!(failure(deliver(&subscriber).await).0, Cause::Timeout);

    // An answer that goes on for ever has said all that counts in its first line.
    let endless = TcpListener::bind("127.0.0.1:0").await?;
    let url = format!("http://{}/", endless.local_addr()?);
    let server = tokio::spawn(async move {
        while let Ok((mut stream, _)) = endless.accept().await {
            let mut request = [0; 4096];
            let _ = stream.read(&mut request).await;
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await;
            while stream.write_all(&[b'x'; 1024]).await.is_ok() {}
        }
    });
    let subscriber = WebhookSubscriber::new(settings(&url)).unwrap();
    tokio::time::timeout(LIMIT, deliver(&subscriber)).await??;
    let exchange = tokio::time::timeout(LIMIT, subscriber.exchange(&sign_up("ada"))).await?;
    assert!(exchange.received.iter().any(|it| it.contains("too long")));
    server.abort();
    Ok(())
}

#[tokio::test]
async fn an_exchange_shows_what_passed_and_no_secret() -> anyhow::Result<()> {
    let (issuer, receiver) = (Receiver::start().await?, Receiver::start().await?);
    issuer.plan(axum::Json(json!({ "access_token": "hidden", "expires_in": 3600 })));
    receiver.plan((
        StatusCode::UNPROCESSABLE_ENTITY,
        // Over a kept connection it might yet answer when it is gone.
        [(header::CONTENT_TYPE, "text/plain"), (header::CONNECTION, "close")],
        "no such\x1b[31m field\nsecond line",
    ));
    let auth = WebhookAuth::ClientCredentials {
        token_url: format!("http://{}/token", issuer.address),
        client_id: "vestibule".into(),
        client_secret: "hidden".into(),
        scope: None,
    };
    let mut settings = WebhookSettings { auth: Some(auth), ..settings(&receiver.url()) };
    settings.headers = vec![("x-key".into(), "hidden".into())];
    settings.keys.push(OWN_KEY.into());
    let subscriber = subscriber(settings);
    let Exchange { sent, received, outcome } = subscriber.exchange(&sign_up("ada")).await;

    assert_eq!(sent[0], format!("POST http://{}/…", receiver.address));
    for line in ["x-key: …", "authorization: …", "content-type: application/cloudevents+json"] {
        assert!(sent.iter().any(|it| it == line), "{line}: {sent:?}");
    }
    let all = sent.join("\n");
    assert!(all.contains("\nwebhook-signature: v1,") && all.contains("ada@example.com"), "{all}");
    assert!(all.contains("whpk_") && !all.contains("hidden") && !all.contains("whsk_"), "{all}");
    assert_eq!(received[0], "HTTP/1.1 422 Unprocessable Entity");
    assert!(received.ends_with(&["no such [31m field".into(), "second line".into()]));
    assert_eq!(failure(outcome).0, Cause::Refused);

    drop(receiver);
    let exchange = subscriber.exchange(&sign_up("ada")).await;
    assert!(exchange.received.is_empty() && !exchange.sent.is_empty());
    let (cause, _, text) = failure(exchange.outcome);
    assert!(cause == Cause::Unavailable && !text.contains("hidden"), "{text}");
    assert!(!format!("{subscriber:?}").contains("127.0.0.1"));
    Ok(())
}

#[test]
fn all_that_is_wrong_is_told_at_once_and_no_secret() {
    let auth = WebhookAuth::ClientCredentials {
        token_url: "http://tokens.example.com/".into(),
        client_id: String::new(),
        client_secret: "hidden".into(),
        scope: None,
    };
    let settings = WebhookSettings {
        name: "c.rm".into(),
        keys: vec!["hidden".into()],
        template: Some("{{ event.id".into()),
        headers: ["Authorization", "Webhook-Id", "ce-id", "a b"]
            .map(|it| (it.to_owned(), "hidden".into()))
            .into(),
        auth: Some(auth),
        timeout: Duration::ZERO,
        authorities: Some("no PEM".into()),
        ..WebhookSettings::new("", "https://subscriber.example.com/hidden".into(), KEY.into())
    };
    let faults = WebhookSubscriber::check(&settings).unwrap_err();
    let keys: Vec<_> = faults.iter().map(|it| it.key).collect();
    assert_eq!(
        keys,
        [
            "name",
            "keys",
            "template",
            "headers",
            "headers",
            "headers",
            "headers",
            "timeout",
            "authorities",
            "token_url"
        ]
    );
    assert!(!format!("{faults:?}{settings:?}").contains("hidden"), "{faults:?}");

    for (url, message) in [
        ("hidden", "an https URL"),
        ("ftp://subscriber.example.com/", "an https URL"),
        ("http://subscriber.example.com/", "`networks`"),
        ("https://10.1.2.3/", "private"),
    ] {
        let settings = WebhookSettings::new("crm", url.into(), KEY.into());
        let faults = WebhookSubscriber::check(&settings).unwrap_err();
        assert!(faults[0].key == "url" && faults[0].message.contains(message), "{faults:?}");
    }
    let none = WebhookSettings { keys: vec![], ..settings };
    let faults = WebhookSubscriber::check(&none).unwrap_err();
    assert!(faults.iter().any(|it| it.key == "keys" && it.message.contains("at least one")));
    let auth = Some(WebhookAuth::Certificate("hidden".into()));
    let bad = WebhookSettings { auth, ..self::settings("http://127.0.0.1/") };
    let faults = WebhookSubscriber::check(&bad).unwrap_err();
    assert_eq!(faults.iter().map(|it| it.key).collect::<Vec<_>>(), ["certificate", "certificate"]);
}
