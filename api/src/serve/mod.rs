//! The loop that takes connections: how many, how long a header may take, how to stop; with TLS
//! or, behind a proxy that ends it, without.
//!
//! HTTP/1.1 only, which is what platforms speak. To tell the versions apart on a bare connection
//! would mean to wait for its first bytes without a limit.

mod tls;

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use axum::{Router, body::Body, extract::Request};
use hyper::body::Incoming;
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::{
        conn::auto::Builder,
        graceful::{GracefulShutdown, Watcher},
    },
    service::TowerToHyperService,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;
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
    /// When stopping, answers in progress get so long to finish.
    pub drain: Duration,
}

impl Default for ServerLimits {
    fn default() -> Self {
        Self {
            header_timeout: Duration::from_secs(30),
            max_connections: 10_000,
            drain: Duration::from_secs(10),
        }
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
    stop: CancellationToken,
) -> io::Result<()> {
    run(listener, None, router, limits, stop).await
}

/// The same with TLS.
pub async fn serve_tls(
    listener: TcpListener,
    tls: Tls,
    router: Router,
    limits: ServerLimits,
    stop: CancellationToken,
) -> io::Result<()> {
    run(listener, Some(tls), router, limits, stop).await
}

async fn run(
    listener: TcpListener,
    tls: Option<Tls>,
    router: Router,
    limits: ServerLimits,
    stop: CancellationToken,
) -> io::Result<()> {
    let mut http = Builder::new(TokioExecutor::new()).http1_only();
    http.http1().timer(TokioTimer::new()).header_read_timeout(limits.header_timeout);
    let handshake_timeout = limits.header_timeout.min(HANDSHAKE_TIMEOUT);
    let places = Arc::new(Semaphore::new(limits.max_connections));
    let connections = GracefulShutdown::new();

    while let Some((stream, peer, place)) = next(&listener, &places, &stop).await {
        // Answers are small and written whole; to wait for more of them only adds delay.
        if let Err(error) = stream.set_nodelay(true) {
            debug!(%error, "could not turn off the delay of small packets");
        }
        let (http, router, watcher) = (http.clone(), router.clone(), connections.watcher());
        let (tls, stop) = (tls.clone(), stop.clone());
        tokio::spawn(async move {
            match tls {
                None => {
                    let connection = Connection { peer, tls: false, certificates: None };
                    answer(&http, stream, router, connection, watcher).await;
                }
                Some(tls) => {
                    // Nobody has asked for anything yet, so to stop is to hang up.
                    let shaken = tokio::select! {
                        biased;
                        () = stop.cancelled() => None,
                        shaken = tls.accept(stream, handshake_timeout) => shaken,
                    };
                    if let Some((stream, certificates)) = shaken {
                        let connection = Connection { peer, tls: true, certificates };
                        answer(&http, stream, router, connection, watcher).await;
                    }
                }
            }
            drop(place);
        });
    }

    drop(listener);
    if timeout(limits.drain, connections.shutdown()).await.is_err() {
        warn!("stopped with answers still in progress, for they took longer than the drain limit");
    }
    Ok(())
}

/// Answers the requests of one connection, however many.
async fn answer(
    http: &Builder<TokioExecutor>,
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    router: Router,
    connection: Connection,
    watcher: Watcher,
) {
    let service = router.map_request(move |mut request: Request<Incoming>| {
        request.extensions_mut().insert(connection.clone());
        request.map(Body::new)
    });
    let service = TowerToHyperService::new(service);
    let serving = http.serve_connection(TokioIo::new(stream), service).into_owned();
    if let Err(error) = watcher.watch(serving).await {
        debug!(error, "a connection ended early");
    }
}

/// The next connection and its place among the allowed ones, or `None` once told to stop.
async fn next(
    listener: &TcpListener,
    places: &Arc<Semaphore>,
    stop: &CancellationToken,
) -> Option<(TcpStream, SocketAddr, tokio::sync::OwnedSemaphorePermit)> {
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
        () = stop.cancelled() => None,
        accepted = accept => Some(accepted),
    }
}

/// Enough for a slow network, and short of what a caller would wait for an answer.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

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
