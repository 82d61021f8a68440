//! A network of our own between two processes: it can be cut, silent or slow.

use std::{net::SocketAddr, time::Duration};

use anyhow::Context as _;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream, tcp},
    sync::{oneshot, watch},
};

/// A TCP port that leads to another one, through whatever weather the test makes.
///
/// It carries on a thread of its own, so a test may block. When it is dropped all its connections end.
#[derive(Debug)]
pub struct Proxy {
    port: u16,
    weather: watch::Sender<Weather>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

/// What a network does to those who use it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Weather {
    Fine,
    /// Everything that is sent arrives so much later.
    Slow(Duration),
    /// Half-open: connections stay, or come about, and nothing passes. What was sent meanwhile is lost, so
    /// these connections are reset when the weather changes.
    Silent,
    /// Connections are reset, and new ones too.
    Cut,
}

impl Proxy {
    /// Leads to `target`, which need not listen yet.
    pub fn start(target: SocketAddr) -> anyhow::Result<Self> {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").context("no port for a proxy")?;
        listener.set_nonblocking(true)?;
        let port = listener.local_addr()?.port();
        let (weather, watched) = watch::channel(Weather::Fine);
        let (stop, stopped) = oneshot::channel();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let thread = std::thread::Builder::new().name("proxy".to_owned()).spawn(move || {
            runtime.block_on(async {
                tokio::select! {
                    () = accept(listener, target, watched) => {}
                    _ = stopped => {}
                }
            });
        })?;
        Ok(Self { port, weather, stop: Some(stop), thread: Some(thread) })
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    pub fn set(&self, weather: Weather) {
        self.weather.send_replace(weather);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        if let Some(stop) = self.stop.take() {
            let _ = stop.send(());
        }
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

async fn accept(
    listener: std::net::TcpListener,
    target: SocketAddr,
    weather: watch::Receiver<Weather>,
) {
    let Ok(listener) = TcpListener::from_std(listener) else { return };
    loop {
        match listener.accept().await {
            Ok((client, _)) => drop(tokio::spawn(carry(client, target, weather.clone()))),
            // Too many open files, for one: others may close some.
            Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
        }
    }
}

/// Until one end closes, which closes the other, or the weather resets both.
async fn carry(mut client: TcpStream, target: SocketAddr, weather: watch::Receiver<Weather>) {
    let mut breaking = weather.clone();
    let server = tokio::select! {
        biased;
        () = breaks(&mut breaking) => None,
        connected = TcpStream::connect(target) => connected.ok(),
    };
    let Some(mut server) = server else {
        let _ = client.set_zero_linger();
        return;
    };
    let _ = (client.set_nodelay(true), server.set_nodelay(true));
    let is_reset = {
        let (from_client, to_client) = client.split();
        let (from_server, to_server) = server.split();
        tokio::select! {
            biased;
            () = breaks(&mut breaking) => true,
            () = pump(from_client, to_server, weather.clone()) => false,
            () = pump(from_server, to_client, weather) => false,
        }
    };
    if is_reset {
        let _ = (client.set_zero_linger(), server.set_zero_linger());
    }
}

/// Returns when a connection cannot go on.
async fn breaks(weather: &mut watch::Receiver<Weather>) {
    let mut was_silent = false;
    loop {
        let now = *weather.borrow_and_update();
        if now == Weather::Cut || (was_silent && now != Weather::Silent) {
            return;
        }
        was_silent |= now == Weather::Silent;
        // Without the proxy there is no weather, and the connection ends with its task.
        if weather.changed().await.is_err() {
            return;
        }
    }
}

async fn pump(
    mut from: tcp::ReadHalf<'_>,
    mut to: tcp::WriteHalf<'_>,
    mut weather: watch::Receiver<Weather>,
) {
    let mut bytes = vec![0; 16 * 1024];
    while let Ok(read @ 1..) = from.read(&mut bytes).await {
        let now = *weather.borrow();
        if let Weather::Slow(delay) = now {
            tokio::time::sleep(delay).await;
        }
        // What is on its way when silence falls is lost with the connection.
        let passes = weather.wait_for(|it| *it != Weather::Silent).await.is_ok();
        if !passes || to.write_all(&bytes[..read]).await.is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(10);

    /// Answers each connection with what it is sent.
    async fn echo() -> anyhow::Result<SocketAddr> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                tokio::spawn(async move {
                    let (mut from, mut to) = stream.split();
                    tokio::io::copy(&mut from, &mut to).await
                });
            }
        });
        Ok(address)
    }

    async fn said(stream: &mut TcpStream, text: &str) -> anyhow::Result<String> {
        stream.write_all(text.as_bytes()).await?;
        let mut heard = vec![0; text.len()];
        tokio::time::timeout(LIMIT, stream.read_exact(&mut heard)).await??;
        Ok(String::from_utf8(heard)?)
    }

    #[tokio::test]
    async fn a_cut_resets_what_there_is_and_what_comes_until_it_is_mended() -> anyhow::Result<()> {
        let proxy = Proxy::start(echo().await?)?;
        let mut before = TcpStream::connect(("127.0.0.1", proxy.port())).await?;
        assert_eq!(said(&mut before, "hello").await?, "hello");

        proxy.set(Weather::Cut);
        assert!(said(&mut before, "hello").await.is_err());
        // It may be reset before it knows that it is connected.
        let during = async {
            let mut during = TcpStream::connect(("127.0.0.1", proxy.port())).await?;
            anyhow::Ok(said(&mut during, "hello").await?)
        };
        assert!(during.await.is_err());

        proxy.set(Weather::Fine);
        let mut after = TcpStream::connect(("127.0.0.1", proxy.port())).await?;
        assert_eq!(said(&mut after, "again").await?, "again");
        Ok(())
    }

    #[tokio::test]
    async fn in_silence_connections_stay_and_are_reset_afterwards() -> anyhow::Result<()> {
        let proxy = Proxy::start(echo().await?)?;
        let mut stream = TcpStream::connect(("127.0.0.1", proxy.port())).await?;
        assert_eq!(said(&mut stream, "hello").await?, "hello");

        proxy.set(Weather::Silent);
        stream.write_all(b"anybody there?").await?;
        let mut heard = [0; 1];
        let silent =
            tokio::time::timeout(Duration::from_millis(200), stream.read_exact(&mut heard)).await;
        assert!(silent.is_err(), "a silent network must not answer");

        proxy.set(Weather::Fine);
        let ended = tokio::time::timeout(LIMIT, stream.read(&mut heard)).await?;
        assert!(!matches!(ended, Ok(1..)), "what was sent into the silence is lost");
        Ok(())
    }

    #[tokio::test]
    async fn a_slow_network_carries_everything_later() -> anyhow::Result<()> {
        let proxy = Proxy::start(echo().await?)?;
        let delay = Duration::from_millis(100);
        proxy.set(Weather::Slow(delay));
        let mut stream = TcpStream::connect(("127.0.0.1", proxy.port())).await?;

        let begun = std::time::Instant::now();
        assert_eq!(said(&mut stream, "hello").await?, "hello");

        assert!(begun.elapsed() >= delay * 2, "there and back");
        Ok(())
    }

    #[tokio::test]
    async fn a_server_that_is_away_or_goes_away_is_away_for_the_client() -> anyhow::Result<()> {
        let nobody = SocketAddr::from(([127, 0, 0, 1], crate::free_port()));
        let proxy = Proxy::start(nobody)?;
        let mut stream = TcpStream::connect(("127.0.0.1", proxy.port())).await?;
        let mut heard = [0; 1];

        let ended = tokio::time::timeout(LIMIT, stream.read(&mut heard)).await?;

        assert!(!matches!(ended, Ok(1..)));
        Ok(())
    }
}
