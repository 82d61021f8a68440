//! The loop that takes connections: how many, how long a header may take, how to stop; with TLS
//! or, behind a proxy that ends it, without.
//!
//! HTTP/1.1 only, which is what platforms speak. To tell the versions apart on a bare connection
//! would mean to wait for its first bytes without a limit.
//!
//! A stop loses no call. Whoever asks while it leaves is answered and told that this answer is the
//! last of its connection; who has connected by the end is still heard; and a connection is closed
//! unasked only after it has been silent for a while, because a request that is under way to a
//! closing connection has no answer and cannot know whether it was heard.

mod tls;

use std::{
    io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use axum::{
    Router,
    body::Body,
    extract::Request,
    http::{HeaderValue, header::CONNECTION},
    response::Response,
};
use hyper::body::Incoming;
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto::Builder,
    service::TowerToHyperService,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, sleep, sleep_until, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tower::ServiceExt as _;
use tracing::{debug, warn};

use crate::auth::CertificateChain;
pub use tls::{Tls, TlsError, TlsSettings};

/// Limits of a listener.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ServerLimits {
    /// From the opening of a connection, or the end of an answer, to the end of the next header;
    /// so it is also how long an unused connection is kept.
    pub header_timeout: Duration,
    /// At most so many connections; more wait to be accepted.
    pub max_connections: usize,
    /// When stopping, a connection is closed without having been asked anything once it has been
    /// silent for so long.
    pub silence: Duration,
    /// When stopping, answers in progress get so long to finish.
    pub drain: Duration,
}

impl Default for ServerLimits {
    fn default() -> Self {
        Self {
            header_timeout: Duration::from_secs(30),
            max_connections: 10_000,
            silence: Duration::from_millis(250),
            drain: Duration::from_secs(10),
        }
    }
}

/// How a listener is told to stop, in one step or in two.
#[derive(Clone, Debug, Default)]
pub struct Stop {
    /// Calls are taken as before, and each answer says that it is the last of its connection.
    pub leave: CancellationToken,
    /// No more calls are taken.
    pub end: CancellationToken,
}

impl From<CancellationToken> for Stop {
    fn from(stop: CancellationToken) -> Self {
        Self { leave: stop.clone(), end: stop }
    }
}

impl Stop {
    /// Returns when a connection that stays silent from now on is to be closed.
    ///
    /// It may have been given an answer in the moment before the stop, so until then it was not.
    async fn hangs_up(&self, silence: Duration) {
        self.leave.cancelled().await;
        let enough = Instant::now() + silence;
        self.end.cancelled().await;
        sleep_until(enough).await;
    }
}

/// What a request came over; an extension of each request.
#[derive(Clone, Debug)]
pub struct Connection {
    pub peer: SocketAddr,
    /// Whether TLS ends here.
    pub tls: bool,
    /// What the caller presented in the handshake, not yet looked at; read once a connection.
    pub(crate) certificates: Option<Arc<CertificateChain>>,
}

/// Serves until told to stop, then takes no more connections and finishes the answers in progress.
pub async fn serve(
    listener: TcpListener,
    router: Router,
    limits: ServerLimits,
    stop: impl Into<Stop>,
) -> io::Result<()> {
    run(listener, None, router, limits, stop.into()).await
}

/// The same with TLS.
pub async fn serve_tls(
    listener: TcpListener,
    tls: Tls,
    router: Router,
    limits: ServerLimits,
    stop: impl Into<Stop>,
) -> io::Result<()> {
    run(listener, Some(tls), router, limits, stop.into()).await
}

async fn run(
    listener: TcpListener,
    tls: Option<Tls>,
    router: Router,
    limits: ServerLimits,
    stop: Stop,
) -> io::Result<()> {
    let mut http = Builder::new(TokioExecutor::new()).http1_only();
    http.http1().timer(TokioTimer::new()).header_read_timeout(limits.header_timeout);
    let places = Arc::new(Semaphore::new(limits.max_connections));
    let connections = TaskTracker::new();
    let server = Server { http, tls, router, limits, stop };

    while let Some((stream, peer, place)) = next(&listener, &places, &server.stop.end).await {
        connections.spawn(server.clone().take(stream, peer, place));
    }
    // Whoever has connected before we ceased to listen would be hung up on otherwise.
    let listener = listener.into_std()?;
    while let Ok(place) = Arc::clone(&places).try_acquire_owned()
        && let Ok((stream, peer)) = listener.accept()
        && let Ok(()) = stream.set_nonblocking(true)
        && let Ok(stream) = TcpStream::from_std(stream)
    {
        connections.spawn(server.clone().take(stream, peer, place));
    }
    drop(listener);

    connections.close();
    if timeout(limits.drain, connections.wait()).await.is_err() {
        warn!(
            connections = connections.len(),
            "stopped with answers still in progress, for they took longer than the drain limit"
        );
    }
    Ok(())
}

/// What every connection needs.
#[derive(Clone)]
struct Server {
    http: Builder<TokioExecutor>,
    tls: Option<Tls>,
    router: Router,
    limits: ServerLimits,
    stop: Stop,
}

impl Server {
    /// Deals with a connection to its end.
    async fn take(self, stream: TcpStream, peer: SocketAddr, place: OwnedSemaphorePermit) {
        // Answers are small and written whole; to wait for more of them only adds delay.
        if let Err(error) = stream.set_nodelay(true) {
            debug!(%error, "could not turn off the delay of small packets");
        }
        match &self.tls {
            None => {
                let connection = Connection { peer, tls: false, certificates: None };
                self.answer(stream, connection).await;
            }
            Some(tls) => {
                let limit = self.limits.header_timeout.min(HANDSHAKE_TIMEOUT);
                let shaken = tokio::select! {
                    biased;
                    shaken = tls.accept(stream, limit) => shaken,
                    () = self.stop.hangs_up(self.limits.silence) => None,
                };
                if let Some((stream, certificates)) = shaken {
                    let connection = Connection { peer, tls: true, certificates };
                    self.answer(stream, connection).await;
                }
            }
        }
        drop(place);
    }

    /// Answers the requests of one connection, however many.
    async fn answer(
        &self,
        stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
        connection: Connection,
    ) {
        let leave = self.stop.leave.clone();
        let under_way = Arc::new(AtomicUsize::new(0));
        let (begun, ended) = (Arc::clone(&under_way), Arc::clone(&under_way));
        let service = self
            .router
            .clone()
            .map_request(move |mut request: Request<Incoming>| {
                begun.fetch_add(1, Ordering::Relaxed);
                request.extensions_mut().insert(connection.clone());
                request.map(Body::new)
            })
            .map_response(move |mut response: Response| {
                ended.fetch_sub(1, Ordering::Relaxed);
                if leave.is_cancelled() {
                    response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
                }
                response
            });
        let service = TowerToHyperService::new(service);
        let serving = self.http.serve_connection(TokioIo::new(stream), service);
        let mut serving = std::pin::pin!(serving);
        let served = tokio::select! {
            // What has arrived is read before the connection is thought to be silent.
            biased;
            served = serving.as_mut() => served,
            () = self.stop.hangs_up(self.limits.silence) => {
                serving.as_mut().graceful_shutdown();
                loop {
                    match timeout(HALF_SENT, serving.as_mut()).await {
                        Ok(served) => break served,
                        // Nobody waits for an answer here: half a head is all that was sent.
                        Err(_) if under_way.load(Ordering::Relaxed) == 0 => return,
                        Err(_) => {}
                    }
                }
            }
        };
        if let Err(error) = served {
            debug!(error, "a connection ended early");
        }
    }
}

/// The next connection and its place among the allowed ones, or `None` once told to stop.
async fn next(
    listener: &TcpListener,
    places: &Arc<Semaphore>,
    end: &CancellationToken,
) -> Option<(TcpStream, SocketAddr, OwnedSemaphorePermit)> {
    let accept = async {
        let place = Arc::clone(places).acquire_owned().await.expect("nobody closes it");
        loop {
            match listener.accept().await {
                Ok((stream, peer)) => return (stream, peer, place),
                Err(error) if is_of_one_connection(&error) => {}
                Err(error) => {
                    // Out of file handles, most likely: others have to end first, and to try again
                    // at once would only burn the processor.
                    warn!(%error, "could not accept a connection; trying again");
                    sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    };
    tokio::select! {
        biased;
        () = end.cancelled() => None,
        accepted = accept => Some(accepted),
    }
}

/// Enough for a slow network, and short of what a caller would wait for an answer.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// So long a stop waits for the rest of a request's head.
const HALF_SENT: Duration = Duration::from_secs(1);

const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// The connection was gone before it was taken; the next one is fine.
fn is_of_one_connection(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionRefused
            | io::ErrorKind::ConnectionAborted
            | io::ErrorKind::ConnectionReset
    )
}
