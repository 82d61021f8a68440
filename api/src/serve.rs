//! The loop that takes connections: how many, how long a header may take, how to stop.
//!
//! HTTP/1.1 only. TLS, and HTTP/2 with it, is for the proxy in front; to tell the versions apart on
//! a bare connection would mean to wait for its first bytes without a limit.

use std::{io, sync::Arc, time::Duration};

use axum::{Router, body::Body, extract::Request};
use hyper::body::Incoming;
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::{conn::auto::Builder, graceful::GracefulShutdown},
    service::TowerToHyperService,
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tower::ServiceExt as _;
use tracing::{debug, warn};

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

/// Serves until told to stop, then takes no more connections and finishes the answers in progress.
pub async fn serve(
    listener: TcpListener,
    router: Router,
    limits: ServerLimits,
    stop: CancellationToken,
) -> io::Result<()> {
    let mut http = Builder::new(TokioExecutor::new()).http1_only();
    http.http1().timer(TokioTimer::new()).header_read_timeout(limits.header_timeout);
    let service = router.map_request(|request: Request<Incoming>| request.map(Body::new));
    let places = Arc::new(Semaphore::new(limits.max_connections));
    let connections = GracefulShutdown::new();

    while let Some((stream, place)) = next(&listener, &places, &stop).await {
        // Answers are small and written whole; to wait for more of them only adds delay.
        if let Err(error) = stream.set_nodelay(true) {
            debug!(%error, "could not turn off the delay of small packets");
        }
        let service = TowerToHyperService::new(service.clone());
        let connection =
            connections.watch(http.serve_connection(TokioIo::new(stream), service).into_owned());
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                debug!(error, "a connection ended early");
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

/// The next connection and its place among the allowed ones, or `None` once told to stop.
async fn next(
    listener: &TcpListener,
    places: &Arc<Semaphore>,
    stop: &CancellationToken,
) -> Option<(TcpStream, tokio::sync::OwnedSemaphorePermit)> {
    let accept = async {
        let place = Arc::clone(places).acquire_owned().await.expect("nobody closes it");
        loop {
            match listener.accept().await {
                Ok((stream, _)) => return (stream, place),
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
