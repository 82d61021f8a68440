//! The load: connections that each call, wait for the answer, and call again.
//!
//! A closed loop on one thread, as cheap as it can be: it shares the machine with what it measures.
//! Only answers that came between warm-up and end count.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::{Context, bail};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    task::JoinSet,
    time::{Instant, sleep_until},
};

use crate::{
    machine::{Spent, Usage},
    sample::Call,
};

/// One round of load.
#[derive(Debug)]
pub(crate) struct Load<'a> {
    pub(crate) address: SocketAddr,
    pub(crate) path: &'a str,
    pub(crate) connections: usize,
    pub(crate) warm_up: Duration,
    pub(crate) length: Duration,
    /// The process that answers.
    pub(crate) server: u32,
}

/// What came of a round.
#[derive(Debug)]
pub(crate) struct Taken {
    /// In order.
    pub(crate) latencies: Vec<Duration>,
    /// Answers other than to continue, which a benchmark should not get.
    pub(crate) refusals: u64,
    pub(crate) length: Duration,
    pub(crate) spent: Spent,
}

impl Taken {
    pub(crate) fn per_second(&self) -> f64 {
        self.latencies.len() as f64 / self.length.as_secs_f64()
    }

    /// The latency that this share of the answers kept.
    pub(crate) fn quantile(&self, share: f64) -> Duration {
        quantile(&self.latencies, share)
    }
}

/// Of latencies in order.
pub(crate) fn quantile(latencies: &[Duration], share: f64) -> Duration {
    let last = latencies.len().saturating_sub(1);
    let place = (share * last as f64).round() as usize;
    latencies.get(place).copied().unwrap_or_default()
}

impl Load<'_> {
    /// `next_person` counts the people over all rounds, so that no call repeats another.
    pub(crate) fn run(&self, next_person: &Arc<AtomicU64>) -> anyhow::Result<Taken> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(self.take(next_person))
    }

    async fn take(&self, next_person: &Arc<AtomicU64>) -> anyhow::Result<Taken> {
        let call = Call::to(self.path);
        let mut callers = JoinSet::new();
        let mut connected = vec![];
        for _ in 0..self.connections {
            connected.push(Caller::connect(self.address, call.clone()).await?);
        }
        let start = Instant::now() + self.warm_up;
        let end = start + self.length;
        for caller in connected {
            callers.spawn(caller.call_until(start, end, Arc::clone(next_person)));
        }

        sleep_until(start).await;
        let before = Usage::now(self.server)?;
        sleep_until(end).await;
        let spent = Usage::now(self.server)?.since(&before);

        let (mut latencies, mut refusals) = (vec![], 0);
        while let Some(done) = callers.join_next().await {
            let (its_latencies, its_refusals) = done??;
            latencies.extend(its_latencies);
            refusals += its_refusals;
        }
        latencies.sort_unstable();
        Ok(Taken { latencies, refusals, length: self.length, spent })
    }
}

/// Much more than any answer to the sample.
const ANSWER_MAX: usize = 4096;

/// A connection on which one call follows the other.
pub(crate) struct Caller {
    stream: TcpStream,
    call: Call,
    answer: Vec<u8>,
}

impl Caller {
    pub(crate) async fn connect(address: SocketAddr, call: Call) -> anyhow::Result<Self> {
        let stream = TcpStream::connect(address).await.context("could not connect")?;
        stream.set_nodelay(true)?;
        Ok(Self { stream, call, answer: vec![0; ANSWER_MAX] })
    }

    /// One call; says whether the sign-up goes on.
    pub(crate) async fn call(&mut self, person: u64) -> anyhow::Result<bool> {
        let call = self.call.of(person);
        self.stream.write_all(call).await.context("could not send a call")?;
        self.hear().await
    }

    async fn call_until(
        mut self,
        start: Instant,
        end: Instant,
        next_person: Arc<AtomicU64>,
    ) -> anyhow::Result<(Vec<Duration>, u64)> {
        let (mut latencies, mut refusals) = (vec![], 0);
        let mut sent = Instant::now();
        while sent < end {
            let continues = self.call(next_person.fetch_add(1, Ordering::Relaxed)).await?;
            let heard = Instant::now();
            if (start..end).contains(&heard) {
                latencies.push(heard - sent);
                refusals += u64::from(!continues);
            }
            sent = heard;
        }
        Ok((latencies, refusals))
    }

    /// Hears one answer, and says whether the sign-up goes on.
    async fn hear(&mut self) -> anyhow::Result<bool> {
        let mut filled = 0;
        loop {
            let room = &mut self.answer[filled..];
            let read = self.stream.read(room).await.context("could not read an answer")?;
            if read == 0 {
                bail!("an answer was cut off, or is too large to be one");
            }
            filled += read;
            if let Some((head, body)) = whole(&self.answer[..filled])? {
                return Ok(head.starts_with(b"HTTP/1.1 200 ") && contains(body, CONTINUE));
            }
        }
    }
}

const CONTINUE: &[u8] = b"\"action\":\"Continue\"";

/// Head and body, once both are there.
fn whole(answer: &[u8]) -> anyhow::Result<Option<(&[u8], &[u8])>> {
    let Some(end) = find(answer, b"\r\n\r\n") else { return Ok(None) };
    let (head, body) = (&answer[..end], &answer[end + 4..]);
    let length = head
        .split(|byte| *byte == b'\n')
        .find_map(|line| {
            let colon = line.iter().position(|byte| *byte == b':')?;
            let (name, value) = line.split_at(colon);
            let value = std::str::from_utf8(&value[1..]).ok()?;
            name.eq_ignore_ascii_case(b"content-length").then(|| value.trim().parse::<usize>())
        })
        .context("an answer does not say its length")??;
    Ok((body.len() >= length).then_some((head, &body[..length.min(body.len())])))
}

fn contains(text: &[u8], part: &[u8]) -> bool {
    find(text, part).is_some()
}

fn find(text: &[u8], part: &[u8]) -> Option<usize> {
    text.windows(part.len()).position(|window| window == part)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_whole_once_its_body_is() {
        let answer = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nx: y\r\n\r\nhello";
        for cut in 0..answer.len() {
            assert!(whole(&answer[..cut]).unwrap().is_none(), "{cut}");
        }
        let (head, body) = whole(answer).unwrap().unwrap();
        assert!(head.starts_with(b"HTTP/1.1 200 "));
        assert_eq!(body, b"hello");
        assert!(whole(b"HTTP/1.1 200 OK\r\n\r\n").is_err());
    }

    #[test]
    fn a_quantile_is_a_latency_that_occurred() {
        let latencies = (1..=1000).map(Duration::from_micros).collect();
        let taken = Taken {
            latencies,
            refusals: 0,
            length: Duration::from_secs(2),
            spent: Spent::default(),
        };
        let micros = |share| taken.quantile(share).as_micros();
        assert_eq!((micros(0.0), micros(0.5), micros(0.99), micros(1.0)), (1, 501, 990, 1000));
        assert!((taken.per_second() - 500.0).abs() < 1e-9);
    }
}
