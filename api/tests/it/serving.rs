//! The listener: limits and stopping, over real connections.

use std::{net::SocketAddr, time::Duration};

use axum::{Router, routing::get};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    sync::mpsc,
    task::JoinHandle,
    time::timeout,
};
use tokio_util::sync::CancellationToken;
use vestibule_api::{ConnectorSettings, ServerLimits, Stop, serve};

use crate::support::{Endpoint, partners};

const LONG: Duration = Duration::from_secs(20);

struct Server {
    address: SocketAddr,
    stop: CancellationToken,
    running: JoinHandle<std::io::Result<()>>,
}

impl Server {
    async fn start(router: Router, limits: ServerLimits) -> anyhow::Result<Self> {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
        let address = listener.local_addr()?;
        let stop = CancellationToken::new();
        let running = tokio::spawn(serve(listener, router, limits, stop.clone()));
        Ok(Self { address, stop, running })
    }

    async fn connect(&self) -> anyhow::Result<TcpStream> {
        Ok(TcpStream::connect(self.address).await?)
    }

    async fn stopped(self) -> anyhow::Result<()> {
        Ok(timeout(LONG, self.running).await???)
    }
}

/// Reads until the server closes; a reset is as good.
async fn read_to_end(stream: &mut TcpStream) -> anyhow::Result<String> {
    let mut bytes = Vec::new();
    let _ = timeout(LONG, stream.read_to_end(&mut bytes)).await?;
    Ok(String::from_utf8(bytes)?)
}

fn hello() -> Router {
    Router::new().route("/", get(|| async { "hello" }))
}

const GET: &[u8] = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n";

#[tokio::test]
async fn a_sign_up_over_a_real_connection() -> anyhow::Result<()> {
    let endpoint = Endpoint::new(partners()).await?;
    let server = Server::start(endpoint.router.clone(), ServerLimits::default()).await?;
    let mut connection = server.connect().await?;
    connection
        .write_all(
            b"POST /connectors/partners/before-create HTTP/1.1\r\nHost: x\r\n\
              Authorization: Basic ZW50cmE6dHJ5LW1l\r\nContent-Type: application/json\r\n\
              Content-Length: 27\r\nConnection: close\r\n\r\n{\"email\":\"ada@example.com\"}",
        )
        .await?;

    let reply = read_to_end(&mut connection).await?;

    assert!(reply.starts_with("HTTP/1.1 200 OK\r\n"), "{reply}");
    assert!(reply.ends_with(r#"{"version":"1.0.0","action":"Continue"}"#), "{reply}");
    server.stop.cancel();
    server.stopped().await
}

#[tokio::test]
async fn a_caller_with_too_much_to_say_hears_so() -> anyhow::Result<()> {
    // What is too much is taken and thrown away for half of the deadline.
    let patient = ConnectorSettings { deadline: LONG, ..partners() };
    let endpoint = Endpoint::new(patient).await?;
    let server = Server::start(endpoint.router.clone(), ServerLimits::default()).await?;
    let mut connection = server.connect().await?;
    let body = vec![b' '; 900_000];
    let head = format!(
        "POST /connectors/partners/before-create HTTP/1.1\r\nHost: x\r\n\
         Authorization: Basic ZW50cmE6dHJ5LW1l\r\nContent-Type: application/json\r\n\
         Content-Length: {}\r\n\r\n",
        body.len()
    );
    connection.write_all(head.as_bytes()).await?;
    connection.write_all(&body).await?;

    let reply = read_to_end(&mut connection).await?;

    assert!(reply.starts_with("HTTP/1.1 413 "), "{reply}");
    assert!(reply.contains(r#""code":"body-too-large""#), "{reply}");
    server.stop.cancel();
    server.stopped().await
}

#[tokio::test]
async fn a_header_that_does_not_come_to_its_end_is_not_waited_for() -> anyhow::Result<()> {
    let limits =
        ServerLimits { header_timeout: Duration::from_millis(100), ..ServerLimits::default() };
    let server = Server::start(hello(), limits).await?;
    for begun in [&b""[..], b"G", b"GET / HTTP/1.1\r\nHost: x\r\n"] {
        let mut connection = server.connect().await?;
        connection.write_all(begun).await?;
        let reply = read_to_end(&mut connection).await?;
        assert!(!reply.contains("200 OK"), "{reply}");
    }
    server.stop.cancel();
    server.stopped().await
}

#[tokio::test]
async fn a_stop_does_not_wait_for_the_rest_of_a_header() -> anyhow::Result<()> {
    let limits = ServerLimits { header_timeout: LONG * 2, ..ServerLimits::default() };
    let server = Server::start(hello(), limits).await?;
    let mut connection = server.connect().await?;
    connection.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n").await?;
    // What was sent before has been read when this one has its answer.
    let mut other = server.connect().await?;
    other.write_all(GET).await?;
    read_answer(&mut other).await?;

    server.stop.cancel();
    let stopped = std::time::Instant::now();
    server.stopped().await?;
    assert!(stopped.elapsed() < LONG / 2, "{:?}", stopped.elapsed());
    Ok(())
}

#[tokio::test]
async fn more_connections_than_allowed_wait_for_their_turn() -> anyhow::Result<()> {
    let limits = ServerLimits { max_connections: 1, ..ServerLimits::default() };
    let server = Server::start(hello(), limits).await?;
    let mut first = server.connect().await?;
    first.write_all(GET).await?;
    let mut byte = [0; 1];
    first.read_exact(&mut byte).await?;
    let mut second = server.connect().await?;
    second.write_all(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").await?;

    // The first holds the only place for as long as it is open.
    let early = timeout(Duration::from_millis(200), second.read_exact(&mut byte)).await;
    assert!(early.is_err(), "the second was served beside the first");
    drop(first);

    assert!(read_to_end(&mut second).await?.ends_with("hello"));
    server.stop.cancel();
    server.stopped().await
}

#[tokio::test]
async fn stopping_finishes_the_answers_in_progress_and_takes_no_more() -> anyhow::Result<()> {
    let (begun, mut has_begun) = mpsc::channel(1);
    let finish = CancellationToken::new();
    let slow = {
        let finish = finish.clone();
        Router::new().route(
            "/",
            get(move || async move {
                let _ = begun.send(()).await;
                finish.cancelled().await;
                "finished"
            }),
        )
    };
    let server = Server::start(slow, ServerLimits::default()).await?;
    let mut idle = server.connect().await?;
    let mut connection = server.connect().await?;
    connection.write_all(GET).await?;
    has_begun.recv().await;

    server.stop.cancel();
    assert_eq!(read_to_end(&mut idle).await?, "", "a connection that stays unused is closed");
    finish.cancel();

    assert!(read_to_end(&mut connection).await?.ends_with("finished"));
    let address = server.address;
    server.stopped().await?;
    assert!(TcpStream::connect(address).await.is_err(), "still listening");
    Ok(())
}

/// Reads one answer whose body is `hello`.
async fn read_answer(stream: &mut TcpStream) -> anyhow::Result<String> {
    let mut reply = Vec::new();
    while !reply.ends_with(b"hello") {
        let mut bytes = [0; 1024];
        let read = timeout(LONG, stream.read(&mut bytes)).await??;
        anyhow::ensure!(read > 0, "closed after {:?}", String::from_utf8_lossy(&reply));
        reply.extend_from_slice(&bytes[..read]);
    }
    Ok(String::from_utf8(reply)?.to_ascii_lowercase())
}

#[tokio::test]
async fn who_asks_while_it_leaves_is_answered_and_told_to_go() -> anyhow::Result<()> {
    let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
    let address = listener.local_addr()?;
    let stop = Stop::default();
    // So long that it cannot pass here by itself.
    let limits = ServerLimits { silence: LONG, ..ServerLimits::default() };
    let running = tokio::spawn(serve(listener, hello(), limits, stop.clone()));
    let mut kept = TcpStream::connect(address).await?;
    kept.write_all(GET).await?;
    assert!(!read_answer(&mut kept).await?.contains("connection: close"));

    stop.leave.cancel();
    let mut new = TcpStream::connect(address).await?;
    for stream in [&mut kept, &mut new] {
        stream.write_all(GET).await?;
        assert!(read_answer(stream).await?.contains("\r\nconnection: close\r\n"));
        assert_eq!(read_to_end(stream).await?, "", "closed after its answer");
    }

    // These have nothing to say yet when the end comes, and one was not even accepted.
    let mut early = TcpStream::connect(address).await?;
    let mut late = TcpStream::connect(address).await?;
    stop.end.cancel();
    for stream in [&mut early, &mut late] {
        stream.write_all(GET).await?;
        assert!(read_answer(stream).await?.contains("connection: close"));
    }
    timeout(LONG, running).await???;
    assert!(TcpStream::connect(address).await.is_err(), "still listening");
    Ok(())
}

#[tokio::test]
async fn an_answer_that_takes_too_long_does_not_keep_the_process() -> anyhow::Result<()> {
    let (begun, mut has_begun) = mpsc::channel(1);
    let endless = Router::new().route(
        "/",
        get(move || async move {
            let _ = begun.send(()).await;
            std::future::pending::<()>().await;
        }),
    );
    let limits = ServerLimits { drain: Duration::from_millis(50), ..ServerLimits::default() };
    let server = Server::start(endless, limits).await?;
    let mut connection = server.connect().await?;
    connection.write_all(GET).await?;
    has_begun.recv().await;

    server.stop.cancel();

    server.stopped().await
}
