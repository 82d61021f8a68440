//! The connection: who we are, how fast a dead one is noticed, and that it comes back for ever.

use std::{sync::Weak, time::Duration};

use anyhow::Context as _;
use async_nats::{Client, ClientError, ConnectErrorKind, ConnectOptions, Event, ServerAddr};
use secrecy::ExposeSecret;
use tokio::sync::watch;

use super::{JetStreamConfig, Metrics, NatsCredentials};
use crate::LogError;

/// How long an answer of the server is waited for. Longer than its disk may take under load.
pub(super) const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// At most so many publishes without an answer; the relay has hundreds.
pub(super) const UNANSWERED_MAX: usize = 4096;

/// Two unanswered pings end a connection, so that a dead one is noticed within some ten seconds.
const PING_INTERVAL: Duration = Duration::from_secs(3);

/// The slowest pace of reconnecting.
const RECONNECT_DELAY_MAX: Duration = Duration::from_secs(2);

/// The client library goes on reconnecting although nobody holds the client any more, and notices
/// only once it is connected. Until then it is to disturb nobody.
const ABANDONED_DELAY: Duration = Duration::from_secs(60 * 60);

/// What became of the connection so far; watching it tells of every change.
///
/// A change may go unnoticed under load, so it only hastens what a deadline does too.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct History {
    /// Whatever was unanswered at a loss never will be.
    pub(super) losses: u64,
    /// At the last attempt the server did not accept who we say we are.
    pub(super) is_turned_away: bool,
}

/// Held by whoever uses the connection; without it, it is given up.
#[derive(Debug)]
pub(super) struct InUse;

pub(super) async fn open(
    config: &JetStreamConfig,
    metrics: &Metrics,
    in_use: Weak<InUse>,
) -> Result<(Client, watch::Receiver<History>), LogError> {
    let (history, connection) = watch::channel(History::default());
    let metrics = metrics.clone();
    let (watched, role) = (in_use.clone(), config.role.as_str());
    let options = options(config)
        .await?
        .retry_on_initial_connect()
        .max_reconnects(None)
        .reconnect_delay_callback(move |attempts| match in_use.strong_count() {
            0 => ABANDONED_DELAY,
            _ => reconnect_delay(attempts),
        })
        .ping_interval(PING_INTERVAL)
        .request_timeout(Some(ANSWER_TIMEOUT))
        .event_callback(move |event| {
            match &event {
                Event::Connected => metrics.connects.inc(),
                Event::Disconnected => metrics.disconnects.inc(),
                _ => 0,
            };
            let was_turned_away = history.borrow().is_turned_away;
            let is_turned_away = is_turned_away(&event, was_turned_away);
            // An attempt every two seconds: said once, it is said.
            if is_turned_away && !was_turned_away {
                tracing::error!("{}", turned_away(role));
            } else if !is_turned_away && watched.strong_count() > 0 {
                log(&event);
            }
            let losses = u64::from(matches!(event, Event::Disconnected));
            history.send_modify(|history| {
                history.losses += losses;
                history.is_turned_away = is_turned_away;
            });
            std::future::ready(())
        });
    let client = options
        .connect(addresses(config)?)
        .await
        .context("could not set up the connection to NATS")
        .map_err(LogError::Refused)?;
    Ok((client, connection))
}

/// Who we are, in a form that any client of ours can go on from.
pub(super) async fn options(config: &JetStreamConfig) -> Result<ConnectOptions, LogError> {
    let inbox_prefix = config.inbox_prefix.as_deref().unwrap_or(config.role.inbox_prefix());
    Ok(authenticated(&config.credentials)
        .await
        .map_err(LogError::Refused)?
        .name(format!("vestibule-{}", config.role.as_str()))
        .custom_inbox_prefix(inbox_prefix)
        .connection_timeout(Duration::from_secs(2)))
}

pub(super) fn addresses(config: &JetStreamConfig) -> Result<Vec<ServerAddr>, LogError> {
    let addresses = config.url.split(',').map(|url| url.trim().parse());
    addresses
        .collect::<Result<_, _>>()
        .context("could not read the address of NATS")
        .map_err(LogError::Refused)
}

/// What to do about a server that does not accept who we say we are.
pub(super) fn turned_away(role: &str) -> String {
    format!(
        "NATS does not accept the user or the password of the {role}: nats.{role} must be as the \
         server's configuration has it"
    )
}

/// Whether the server turns us away, by the last thing that happened.
fn is_turned_away(event: &Event, before: bool) -> bool {
    match event {
        // The library hands over the kind of the error in words only.
        Event::ClientError(ClientError::Other(error)) => {
            *error == ConnectErrorKind::AuthorizationViolation.to_string()
        }
        Event::Connected => false,
        _ => before,
    }
}

async fn authenticated(credentials: &NatsCredentials) -> anyhow::Result<ConnectOptions> {
    let options = ConnectOptions::new();
    Ok(match credentials {
        NatsCredentials::None => options,
        NatsCredentials::UserPassword { user, password } => {
            options.user_and_password(user.clone(), password.expose_secret().to_owned())
        }
        NatsCredentials::Nkey(seed) => options.nkey(seed.expose_secret().to_owned()),
        NatsCredentials::File(path) => options
            .credentials_file(path)
            .await
            .with_context(|| format!("could not read NATS credentials from {}", path.display()))?,
    })
}

/// The first attempts come at once, because a restarted server is back in a fifth of a second.
fn reconnect_delay(attempts: usize) -> Duration {
    let doublings = u32::try_from(attempts.saturating_sub(1)).unwrap_or(u32::MAX).min(16);
    (Duration::from_millis(10) * 2_u32.saturating_pow(doublings)).min(RECONNECT_DELAY_MAX)
}

fn log(event: &Event) {
    match event {
        Event::Connected => tracing::info!("connected to NATS"),
        Event::Disconnected => tracing::warn!("lost the connection to NATS; reconnecting"),
        // The server's text names subjects, which hold no personal data.
        Event::ServerError(error) => tracing::error!(%error, "NATS refuses a request"),
        Event::ClientError(error) => tracing::warn!(%error, "could not connect to NATS; trying on"),
        Event::SlowConsumer(_) => tracing::warn!("could not keep up with what NATS delivers"),
        Event::LameDuckMode | Event::Draining | Event::Closed => {
            tracing::info!(%event, "NATS connection");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn being_turned_away_lasts_until_something_else_is_known() {
        let failed = |error: &str| Event::ClientError(ClientError::Other(error.to_owned()));
        assert!(is_turned_away(&failed("authorization violation"), false));
        assert!(!is_turned_away(&failed("IO error"), true), "now it is down");
        assert!(is_turned_away(&Event::Disconnected, true));
        assert!(!is_turned_away(&Event::Connected, true));
    }

    #[test]
    fn attempts_slow_down_up_to_a_limit() {
        let delays: Vec<_> = (1..=10).map(|n| reconnect_delay(n).as_millis()).collect();
        assert_eq!(delays, [10, 20, 40, 80, 160, 320, 640, 1280, 2000, 2000]);
        assert_eq!(reconnect_delay(usize::MAX), RECONNECT_DELAY_MAX);
    }
}
