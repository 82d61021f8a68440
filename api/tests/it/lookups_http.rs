//! Lookups at an HTTP service: what is asked, what an answer means, and what happens without one.

use std::{
    collections::BTreeMap,
    process::Stdio,
    sync::{
        Arc,
        atomic::{AtomicU16, AtomicUsize, Ordering},
    },
    time::Duration,
};

use axum::{
    Router,
    body::{Body, to_bytes},
    extract::{Request, State},
    http::StatusCode,
    response::{IntoResponse, Response},
};
use futures_util::future::join_all;
use prometheus_client::registry::Registry;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::TcpListener,
    sync::Semaphore,
    time::Instant,
};
use vestibule_api::{
    AnswerFrom, BreakerSettings, CacheSettings, Fetched, HttpMethod, HttpSettings, Lookup,
    LookupFailure, LookupMetrics, LookupSettings, LookupSource,
};

const LONG: Duration = Duration::from_secs(60);
const SHORT: Duration = Duration::from_millis(200);

/// A service on this machine that answers as it is told, and counts.
#[derive(Clone)]
struct Service {
    calls: Arc<AtomicUsize>,
    /// What it answers with.
    status: Arc<AtomicU16>,
    /// One for each answer that it may give; there are plenty unless a test holds it up.
    answers: Arc<Semaphore>,
    url: String,
}

impl Service {
    async fn start() -> anyhow::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let service = Self {
            calls: Arc::default(),
            status: Arc::new(AtomicU16::new(200)),
            answers: Arc::new(Semaphore::new(1000)),
            url: format!("http://{}", listener.local_addr()?),
        };
        let router = Router::new().fallback(serve).with_state(service.clone());
        // The task ends with the runtime of the test.
        tokio::spawn(async move { axum::serve(listener, router).await });
        Ok(service)
    }

    fn answers_with(&self, status: u16) {
        self.status.store(status, Ordering::SeqCst);
    }

    fn hold(&self) {
        self.answers.forget_permits(usize::MAX >> 4);
    }

    fn calls(&self) -> usize {
        self.calls.load(Ordering::SeqCst)
    }

    fn settings(&self, path: &str) -> LookupSettings {
        lookup_settings(&format!("{}{path}", self.url), &["who"])
    }
}

fn lookup_settings(url: &str, arguments: &[&str]) -> LookupSettings {
    LookupSettings {
        name: "idv".into(),
        source: LookupSource::Http(HttpSettings {
            url: url.into(),
            method: HttpMethod::Get,
            arguments: arguments.iter().map(|it| (*it).to_owned()).collect(),
            headers: vec![("x-key".into(), "hunter2".into())],
            fields: BTreeMap::new(),
            allow_private: true,
            ca_file: None,
            answer_bytes_max: HttpSettings::ANSWER_BYTES_MAX,
        }),
        arguments: arguments.len(),
        time_limit: LONG,
        cache: CacheSettings { fresh: LONG, stale: LONG, entries: 100 },
        concurrency: 10,
        breaker: BreakerSettings { failures: 0, pause: LONG },
    }
}

fn http(settings: &mut LookupSettings) -> &mut HttpSettings {
    match &mut settings.source {
        LookupSource::Http(http) => http,
        LookupSource::Sql { .. } => unreachable!("they are made above"),
    }
}

fn lookup(settings: LookupSettings) -> anyhow::Result<Lookup> {
    Ok(Lookup::new(settings, &LookupMetrics::unregistered())?)
}

async fn fetch(lookup: &Lookup, who: &str) -> Result<Fetched, LookupFailure> {
    lookup.fetch(&[json!(who)], Instant::now() + LONG).await
}

async fn failure(lookup: &Lookup, who: &str) -> Option<LookupFailure> {
    fetch(lookup, who).await.err()
}

fn answer(fetched: &Fetched) -> Value {
    Value::Object((*fetched.answer).clone())
}

/// Tells what it was asked; some paths are for misbehaviour.
async fn serve(State(service): State<Service>, request: Request<Body>) -> Response {
    service.calls.fetch_add(1, Ordering::SeqCst);
    match service.answers.acquire().await {
        Ok(permit) => permit.forget(),
        Err(_) => return StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
    let status = service.status.load(Ordering::SeqCst);
    if status != 200 {
        return StatusCode::from_u16(status).unwrap_or(StatusCode::BAD_GATEWAY).into_response();
    }
    let (parts, body) = request.into_parts();
    match parts.uri.path() {
        "/redirect" => (StatusCode::FOUND, [("location", "/elsewhere")]).into_response(),
        "/text" => "verified".into_response(),
        "/array" => "[1]".into_response(),
        "/large" => {
            json!({ "x": "x".repeat(HttpSettings::ANSWER_BYTES_MAX) }).to_string().into_response()
        }
        _ => {
            let body = to_bytes(body, 10_000).await.unwrap_or_default();
            let body: Value = serde_json::from_slice(&body).unwrap_or_default();
            let header = |name: &str| parts.headers.get(name).and_then(|it| it.to_str().ok());
            json!({
                "asked": format!("{} {}", parts.method, parts.uri),
                "key": header("x-key"),
                "type": header("content-type"),
                "body": body,
                "deep": { "score": 87, "none": null },
                "call": service.calls(),
            })
            .to_string()
            .into_response()
        }
    }
}

#[tokio::test]
async fn arguments_go_into_the_url_or_the_body_and_fields_come_out_of_the_answer()
-> anyhow::Result<()> {
    let service = Service::start().await?;
    let mut settings = lookup_settings(&format!("{}/p/{{id}}", service.url), &["id", "born", "n"]);
    let arguments = [json!("a/b"), Value::Null, json!(7)];
    let get = lookup(settings.clone())?.fetch(&arguments, Instant::now() + LONG).await?;
    assert_eq!(get.from, AnswerFrom::Source);
    assert_eq!(get.answer["asked"], "GET /p/a%2Fb?n=7");
    assert_eq!((&get.answer["key"], &get.answer["found"]), (&json!("hunter2"), &json!(true)));

    http(&mut settings).method = HttpMethod::Post;
    http(&mut settings).fields = BTreeMap::from([
        ("body".into(), "/body".into()),
        ("type".into(), "/type".into()),
        ("score".into(), "/deep/score".into()),
        ("none".into(), "/deep/none".into()),
        ("gone".into(), "/deep/gone".into()),
    ]);
    let post = lookup(settings)?.fetch(&arguments, Instant::now() + LONG).await?;
    let expected = json!({
        "found": true, "score": 87, "type": "application/json", "body": { "born": null, "n": 7 },
    });
    assert_eq!(answer(&post), expected);
    Ok(())
}

#[tokio::test]
async fn nothing_found_is_an_answer_and_is_remembered() -> anyhow::Result<()> {
    let service = Service::start().await?;
    service.answers_with(404);
    let lookup = lookup(service.settings("/"))?;
    assert_eq!(answer(&fetch(&lookup, "ada").await?), json!({ "found": false }));
    assert_eq!(fetch(&lookup, "ada").await?.from, AnswerFrom::Cache);
    assert_eq!(lookup.peek(&[json!("ada")]).map(|it| answer(&it)), Some(json!({ "found": false })));
    assert!(lookup.peek(&[json!("eve")]).is_none());
    assert_eq!(service.calls(), 1);
    Ok(())
}

#[tokio::test]
async fn what_is_no_answer_fails_and_redirects_are_not_followed() -> anyhow::Result<()> {
    let service = Service::start().await?;
    for (path, expected) in [
        ("/text", LookupFailure::BadAnswer),
        ("/array", LookupFailure::BadAnswer),
        ("/large", LookupFailure::BadAnswer),
        ("/redirect", LookupFailure::Unavailable),
    ] {
        let lookup = lookup(service.settings(path))?;
        let before = service.calls();
        assert_eq!(failure(&lookup, "ada").await, Some(expected), "{path}");
        assert_eq!(service.calls(), before + 1, "{path}");
    }
    let lookup = lookup(service.settings("/"))?;
    for (status, expected) in [
        (500, LookupFailure::Unavailable),
        (503, LookupFailure::Unavailable),
        (429, LookupFailure::Unavailable),
        (401, LookupFailure::Unavailable),
        (400, LookupFailure::BadAnswer),
        (204, LookupFailure::BadAnswer),
    ] {
        service.answers_with(status);
        assert_eq!(failure(&lookup, "ada").await, Some(expected), "{status}");
    }
    Ok(())
}

#[tokio::test]
async fn nobody_there_is_a_failure_at_once() -> anyhow::Result<()> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let url = format!("http://{}", listener.local_addr()?);
    drop(listener);
    let lookup = lookup(lookup_settings(&url, &["who"]))?;
    assert_eq!(failure(&lookup, "ada").await, Some(LookupFailure::Unavailable));
    Ok(())
}

#[tokio::test]
async fn a_service_that_hangs_costs_the_time_limit_or_the_deadline_and_no_more()
-> anyhow::Result<()> {
    let service = Service::start().await?;
    service.hold();
    let began = Instant::now();
    let limited = lookup(LookupSettings { time_limit: SHORT, ..service.settings("/") })?;
    assert_eq!(failure(&limited, "ada").await, Some(LookupFailure::Late));

    let patient = lookup(service.settings("/"))?;
    let late = patient.fetch(&[json!("ada")], Instant::now() + SHORT).await.unwrap_err();
    assert_eq!(late, LookupFailure::Late);
    assert!(began.elapsed() < LONG / 2, "both limits are far shorter");
    Ok(())
}

#[tokio::test]
async fn a_late_answer_serves_whoever_asks_next() -> anyhow::Result<()> {
    let service = Service::start().await?;
    service.hold();
    let lookup = lookup(service.settings("/"))?;
    let late = lookup.fetch(&[json!("ada")], Instant::now() + SHORT).await.unwrap_err();
    assert_eq!(late, LookupFailure::Late);

    service.answers.add_permits(1);
    fetch(&lookup, "ada").await?;
    assert_eq!(fetch(&lookup, "ada").await?.from, AnswerFrom::Cache);
    assert_eq!(service.calls(), 1);
    Ok(())
}

#[tokio::test]
async fn many_calls_with_the_same_arguments_make_one_request() -> anyhow::Result<()> {
    let service = Service::start().await?;
    service.hold();
    let lookup = lookup(service.settings("/"))?;
    let calls = join_all((0..50).map(|_| fetch(&lookup, "ada")));
    // Polled second, when all fifty wait.
    let (fetched, ()) = tokio::join!(calls, async { service.answers.add_permits(50) });
    for outcome in fetched {
        assert_eq!(outcome?.answer["call"], 1);
    }
    assert_eq!(service.calls(), 1);
    Ok(())
}

#[tokio::test]
async fn no_more_requests_are_under_way_than_allowed() -> anyhow::Result<()> {
    let service = Service::start().await?;
    service.hold();
    let settings = LookupSettings { concurrency: 1, time_limit: SHORT, ..service.settings("/") };
    let lookup = lookup(settings)?;
    let (first, second) = tokio::join!(failure(&lookup, "ada"), failure(&lookup, "eve"));
    // The second may see the limit from inside (it never had its turn) or from outside (its caller
    // stopped waiting at the same moment).
    assert_eq!(first, Some(LookupFailure::Late));
    assert!(matches!(second, Some(LookupFailure::Crowded | LookupFailure::Late)), "{second:?}");
    // On a busy machine the first may not have got through, either.
    assert!(service.calls() <= 1);
    Ok(())
}

#[tokio::test]
async fn a_stale_answer_is_given_while_the_source_fails_and_no_longer() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let settings = service.settings("/");
    let (fresh, stale) = (settings.cache.fresh, settings.cache.stale);
    let lookup = lookup(settings)?;
    let good = fetch(&lookup, "ada").await?;

    pass(fresh).await;
    service.answers_with(500);
    let made_do = fetch(&lookup, "ada").await?;
    assert_eq!(made_do.from, AnswerFrom::Stale);
    assert_eq!(answer(&made_do), answer(&good));
    assert_eq!(failure(&lookup, "eve").await, Some(LookupFailure::Unavailable));

    pass(stale).await;
    assert_eq!(failure(&lookup, "ada").await, Some(LookupFailure::Unavailable));
    service.answers_with(200);
    assert_eq!(fetch(&lookup, "ada").await?.from, AnswerFrom::Source);
    Ok(())
}

/// Time goes by, for us at least.
async fn pass(time: Duration) {
    tokio::time::pause();
    tokio::time::advance(time).await;
    tokio::time::resume();
}

#[tokio::test]
async fn a_source_that_fails_again_and_again_is_left_alone_for_a_while() -> anyhow::Result<()> {
    let service = Service::start().await?;
    service.answers_with(500);
    let breaker = BreakerSettings { failures: 3, pause: LONG };
    let mut registry = Registry::default();
    let metrics = LookupMetrics::register(&mut registry);
    let lookup = Lookup::new(LookupSettings { breaker, ..service.settings("/") }, &metrics)?;
    for _ in 0..3 {
        assert_eq!(failure(&lookup, "ada").await, Some(LookupFailure::Unavailable));
    }
    for who in ["ada", "eve"] {
        assert_eq!(failure(&lookup, who).await, Some(LookupFailure::Open));
    }
    assert_eq!(service.calls(), 3);

    // One call tries, and fails; so nobody else does.
    pass(LONG).await;
    assert_eq!(failure(&lookup, "ada").await, Some(LookupFailure::Unavailable));
    assert_eq!(failure(&lookup, "ada").await, Some(LookupFailure::Open));
    assert_eq!(service.calls(), 4);
    let text = encoded(&registry)?;
    assert!(text.contains("vestibule_lookup_breaker_open{lookup=\"idv\"} 1"), "{text}");

    pass(LONG).await;
    service.answers_with(200);
    for who in ["ada", "eve"] {
        fetch(&lookup, who).await?;
    }
    let text = encoded(&registry)?;
    for line in [
        "vestibule_lookup_breaker_open{lookup=\"idv\"} 0",
        "vestibule_lookup_calls_total{lookup=\"idv\",answer=\"source\"} 2",
        "vestibule_lookup_calls_total{lookup=\"idv\",answer=\"unavailable\"} 4",
        "vestibule_lookup_calls_total{lookup=\"idv\",answer=\"open\"} 3",
        "vestibule_lookup_seconds_count{lookup=\"idv\"} 6",
    ] {
        assert!(text.contains(line), "{line} in {text}");
    }
    Ok(())
}

fn encoded(registry: &Registry) -> anyhow::Result<String> {
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, registry)?;
    Ok(text)
}

#[tokio::test]
async fn arguments_that_a_service_dislikes_do_not_make_it_ill() -> anyhow::Result<()> {
    let service = Service::start().await?;
    service.answers_with(400);
    let breaker = BreakerSettings { failures: 2, pause: LONG };
    let lookup = lookup(LookupSettings { breaker, ..service.settings("/p/{who}") })?;
    for _ in 0..10 {
        assert_eq!(failure(&lookup, "nobody").await, Some(LookupFailure::BadAnswer));
    }
    for who in ["..", "", &"x".repeat(20_000)] {
        assert_eq!(failure(&lookup, who).await, Some(LookupFailure::BadArguments));
    }
    let too_few = lookup.fetch(&[], Instant::now() + LONG).await.unwrap_err();
    assert_eq!(too_few, LookupFailure::BadArguments);
    assert_eq!(service.calls(), 10);
    service.answers_with(200);
    fetch(&lookup, "ada").await?;
    Ok(())
}

#[tokio::test]
async fn a_private_address_is_refused_by_number_and_by_name() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let port = service.url.rsplit(':').next().unwrap_or_default();
    for host in
        ["127.0.0.1", "[::1]", "[::ffff:127.0.0.1]", "0x7f.1", "2130706433", "169.254.169.254"]
    {
        let mut settings = lookup_settings(&format!("http://{host}:{port}/"), &["who"]);
        http(&mut settings).allow_private = false;
        let error = Lookup::new(settings, &LookupMetrics::unregistered()).unwrap_err();
        assert_eq!(error.faults.len(), 1, "{host}: {error}");
    }
    let mut settings = lookup_settings(&format!("http://localhost:{port}/"), &["who"]);
    http(&mut settings).allow_private = false;
    let refusing = lookup(settings.clone())?;
    assert_eq!(failure(&refusing, "ada").await, Some(LookupFailure::PrivateAddress));
    assert_eq!(service.calls(), 0);

    http(&mut settings).allow_private = true;
    fetch(&lookup(settings)?, "ada").await?;
    Ok(())
}

#[tokio::test]
async fn a_certificate_counts_only_if_its_authority_is_trusted() -> anyhow::Result<()> {
    let issued = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()])?;
    let folder = tempfile::tempdir()?;
    let ca_file = folder.path().join("ca.pem");
    std::fs::write(&ca_file, issued.cert.pem())?;
    let port = serve_tls(issued).await?;
    let mut settings = lookup_settings(&format!("https://localhost:{port}/"), &["who"]);
    let stranger = lookup(settings.clone())?;
    assert_eq!(failure(&stranger, "ada").await, Some(LookupFailure::Unavailable));

    http(&mut settings).ca_file = Some(ca_file);
    let fetched = fetch(&lookup(settings)?, "ada").await?;
    assert_eq!(answer(&fetched), json!({ "found": true, "tls": true }));
    Ok(())
}

/// Answers every connection once.
async fn serve_tls(issued: rcgen::CertifiedKey<rcgen::KeyPair>) -> anyhow::Result<u16> {
    let key = rustls::pki_types::PrivateKeyDer::try_from(issued.signing_key.serialize_der())
        .map_err(anyhow::Error::msg)?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(vec![issued.cert.der().clone()], key)?;
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let port = listener.local_addr()?.port();
    tokio::spawn(async move {
        while let Ok((connection, _)) = listener.accept().await {
            // A client that trusts nobody hangs up in the handshake.
            let Ok(mut connection) = acceptor.accept(connection).await else { continue };
            let mut request = [0; 4096];
            let _ = connection.read(&mut request).await;
            let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 13\r\nconnection: close\r\n\r\n{\"tls\": true}";
            let _ = connection.write_all(answer).await;
            let _ = connection.shutdown().await;
        }
    });
    Ok(port)
}

#[tokio::test]
async fn neither_arguments_nor_answers_are_shown() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let lookup = lookup(service.settings("/p/{who}"))?;
    let fetched = fetch(&lookup, "secretive").await?;
    assert_eq!(fetched.answer["asked"], "GET /p/secretive");
    assert!(!format!("{lookup:?} {fetched:?}").contains("secretive"));
    Ok(())
}

#[tokio::test]
async fn the_example_of_the_manual_verifies_who_it_knows() -> anyhow::Result<()> {
    let script =
        concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/examples/identity-verification/service.py");
    let mut service = tokio::process::Command::new("python3")
        .args([script, "--port", "0"])
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()?;
    let output = service.stdout.take().ok_or_else(|| anyhow::anyhow!("it has no output"))?;
    let line = BufReader::new(output).lines().next_line().await?.unwrap_or_default();
    let url = line.strip_prefix("listening on ").ok_or_else(|| anyhow::anyhow!("{line}"))?;
    let mut settings = lookup_settings(&format!("{url}/verify"), &["name", "birth_date"]);
    http(&mut settings).method = HttpMethod::Post;
    http(&mut settings).fields = BTreeMap::from([
        ("verified".into(), "/verified".into()),
        ("score".into(), "/score".into()),
    ]);
    let stranger = lookup(settings.clone())?;
    http(&mut settings).headers = vec![("x-api-key".into(), "try-me".into())];
    let lookup = lookup(settings)?;

    for (name, birth_date, expected) in [
        ("Ada Lovelace", "1815-12-10", json!({ "found": true, "verified": true, "score": 87 })),
        ("Ada Lovelace", "1815-12-11", json!({ "found": true, "verified": false, "score": 0 })),
        ("Charles Babbage", "1791-12-26", json!({ "found": true, "verified": false, "score": 55 })),
        ("Nobody", "1815-12-10", json!({ "found": false })),
    ] {
        let arguments = [json!(name), json!(birth_date)];
        let fetched = lookup.fetch(&arguments, Instant::now() + LONG).await?;
        assert_eq!(answer(&fetched), expected);
    }
    let arguments = [json!("Ada Lovelace"), json!("1815-12-10")];
    let refused = stranger.fetch(&arguments, Instant::now() + LONG).await.unwrap_err();
    assert_eq!(refused, LookupFailure::Unavailable);
    service.kill().await?;
    Ok(())
}
