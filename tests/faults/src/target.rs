//! Plays whoever is notified, and a subscriber's webhook: in good moods and bad, and with a memory for
//! keys.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use anyhow::Context as _;
use axum::{
    Router,
    extract::State,
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse as _, Response},
    routing::post,
};
use tokio::{net::TcpListener, task::JoinHandle};

use crate::plan::Mood;

/// Longer than anybody waits.
const SILENCE: Duration = Duration::from_secs(20);

/// An HTTP server; ends when dropped.
#[derive(Debug)]
pub(crate) struct Target {
    address: SocketAddr,
    state: Shared,
    server: JoinHandle<()>,
}

type Shared = Arc<Mutex<Memory>>;

#[derive(Debug, Default)]
struct Memory {
    mood: Mood,
    calls: u64,
    /// How often it took something, by key.
    told: HashMap<String, u64>,
}

impl Target {
    pub(crate) async fn start() -> anyhow::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await.context("no port for the target")?;
        let address = listener.local_addr()?;
        let state = Shared::default();
        let router = Router::new().route("/", post(answer)).with_state(Arc::clone(&state));
        let server = tokio::spawn(async move {
            // Ends with the task.
            let _ = axum::serve(listener, router).await;
        });
        Ok(Self { address, state, server })
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    pub(crate) fn set(&self, mood: Mood) {
        lock(&self.state).mood = mood;
    }

    pub(crate) fn told(&self) -> HashMap<String, u64> {
        lock(&self.state).told.clone()
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        self.server.abort();
    }
}

fn lock(state: &Shared) -> MutexGuard<'_, Memory> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn answer(State(state): State<Shared>, headers: HeaderMap) -> Response {
    let key = headers.get("idempotency-key").or(headers.get("webhook-id"));
    let key = key.and_then(|it| it.to_str().ok());
    let Some(key) = key else { return StatusCode::BAD_REQUEST.into_response() };
    let (mood, calls) = {
        let mut memory = lock(&state);
        memory.calls += 1;
        (memory.mood, memory.calls)
    };
    let refusal = match mood {
        Mood::Fine | Mood::Mute => None,
        Mood::Stumbling => (calls % 2 == 0).then_some(StatusCode::INTERNAL_SERVER_ERROR),
        Mood::Down => Some(StatusCode::SERVICE_UNAVAILABLE),
        Mood::Throttling => Some(StatusCode::TOO_MANY_REQUESTS),
        Mood::Refusing => (calls % 4 == 0).then_some(StatusCode::BAD_REQUEST),
    };
    if let Some(status) = refusal {
        let mut response = status.into_response();
        if mood == Mood::Throttling {
            response.headers_mut().insert(header::RETRY_AFTER, header::HeaderValue::from(1));
        }
        return response;
    }
    *lock(&state).told.entry(key.to_owned()).or_default() += 1;
    if mood == Mood::Mute {
        tokio::time::sleep(SILENCE).await;
    }
    StatusCode::OK.into_response()
}
