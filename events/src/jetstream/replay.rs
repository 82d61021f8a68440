//! Past events, read in pages by direct get: it needs no consumer, moves none, and is the one way to
//! read that gives no right to change anything.

use std::{collections::VecDeque, time::Duration};

use anyhow::{Context as _, anyhow};
use async_nats::{StatusCode, jetstream::message::StreamMessage};
use futures_util::{StreamExt as _, stream, stream::BoxStream};
use serde::Serialize;
use time::{OffsetDateTime, format_description::well_known::Rfc3339};
use tokio::time::{sleep, timeout};

use super::{DENIED_LOOKS_LIKE_SILENCE, JetStream, connection::ANSWER_TIMEOUT, publish};
use crate::{LogError, Replay, Start, Stored, Undecodable};

/// Events to a page, bounded in bytes too so that a page never overruns our buffers.
const PAGE: usize = 256;
const PAGE_BYTES: usize = 8 * 1024 * 1024;

/// The status that ends a page.
const PAGE_END: u16 = 204;

/// How soon a follower sees a new event.
const FOLLOW_PAUSE: Duration = Duration::from_millis(200);

/// An event carries the time of its decision and reaches the stream later. One that was decided
/// before `until` is still found if it came at most so late; clocks may differ by the other.
const LATENESS_MAX: time::Duration = time::Duration::days(1);
const CLOCK_SKEW_MAX: time::Duration = time::Duration::minutes(5);

pub(super) async fn replay(
    log: JetStream,
    replay: Replay,
) -> Result<BoxStream<'static, Result<Stored, LogError>>, LogError> {
    let info = log.stream_info().await?.ok_or_else(|| {
        LogError::Refused(anyhow!(
            "the stream {} does not exist: run `vestibule migrate`",
            log.inner.config.stream
        ))
    })?;
    let next = match replay.start {
        Start::Beginning => Next::Sequence(info.state.first_sequence.max(1)),
        Start::Now => Next::Sequence(info.state.last_sequence + 1),
        Start::Sequence(sequence) => Next::Sequence(sequence.max(1)),
        Start::Time(time) => Next::Time(time - CLOCK_SKEW_MAX),
    };
    let reading = Reading {
        subject: common_subject(&replay),
        log,
        replay,
        next,
        last: info.state.last_sequence,
        page: VecDeque::new(),
        finished: false,
    };
    Ok(stream::unfold(reading, Reading::step).boxed())
}

/// The narrowest subject that covers the filter; the rest is sorted out here.
fn common_subject(replay: &Replay) -> String {
    let connectors = &replay.filter.connectors;
    let kinds = &replay.filter.kinds;
    let connectors = if connectors.len() == 1 { connectors.as_slice() } else { &[] };
    let kinds = if kinds.len() == 1 { kinds.as_slice() } else { &[] };
    publish::subjects(connectors, kinds).remove(0)
}

struct Reading {
    log: JetStream,
    replay: Replay,
    subject: String,
    next: Next,
    /// What the log held at the start.
    last: u64,
    page: VecDeque<Result<Stored, LogError>>,
    finished: bool,
}

#[derive(Clone, Copy)]
enum Next {
    Sequence(u64),
    Time(OffsetDateTime),
}

/// A page of a direct get.
#[derive(Serialize)]
struct Asked<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    seq: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    start_time: Option<String>,
    next_by_subj: &'a str,
    batch: usize,
    max_bytes: usize,
}

impl Reading {
    async fn step(mut self) -> Option<(Result<Stored, LogError>, Self)> {
        loop {
            if let Some(item) = self.page.pop_front() {
                return Some((item, self));
            }
            if self.finished {
                return None;
            }
            match self.read_page().await {
                Ok(0) if self.replay.follow => sleep(FOLLOW_PAUSE).await,
                Ok(0) => return None,
                Ok(_) => {}
                Err(error) => {
                    // A follower goes on; whoever wants an end must not take this for one.
                    self.finished = !self.replay.follow;
                    if self.replay.follow {
                        sleep(FOLLOW_PAUSE).await;
                        self.log.connected().await;
                    }
                    return Some((Err(error), self));
                }
            }
        }
    }

    /// Reads the next page and says how many messages it had, wanted or not.
    async fn read_page(&mut self) -> Result<usize, LogError> {
        if !self.replay.follow
            && matches!(self.next, Next::Sequence(sequence) if sequence > self.last)
        {
            return Ok(0);
        }
        let messages = self.get().await.map_err(LogError::Unavailable)?;
        for message in &messages {
            self.next = Next::Sequence(message.sequence + 1);
            if self.is_over(message) {
                self.finished = true;
                break;
            }
            match Undecodable::decode(&message.payload) {
                Ok(event) if !self.wants(&event) => {}
                Ok(event) => self.page.push_back(Ok(Stored { sequence: message.sequence, event })),
                Err(error) => self.page.push_back(Err(LogError::Refused(
                    anyhow!(error).context(format!("sequence {}", message.sequence)),
                ))),
            }
        }
        Ok(messages.len())
    }

    fn is_over(&self, message: &StreamMessage) -> bool {
        let past_end = !self.replay.follow && message.sequence > self.last;
        let past_time = self.replay.until.is_some_and(|until| message.time > until + LATENESS_MAX);
        past_end || past_time
    }

    fn wants(&self, event: &crate::SignUpEvent) -> bool {
        let Replay { start, until, filter, person, .. } = &self.replay;
        filter.matches(event)
            && person.as_ref().is_none_or(|person| *person == event.person)
            && until.is_none_or(|until| event.time < until)
            && !matches!(start, Start::Time(start) if event.time < *start)
    }

    async fn get(&self) -> anyhow::Result<Vec<StreamMessage>> {
        if !self.log.is_connected() {
            return Err(self.log.not_connected());
        }
        let (seq, start_time) = match self.next {
            Next::Sequence(sequence) => (Some(sequence), None),
            Next::Time(time) => (None, Some(time.format(&Rfc3339)?)),
        };
        let asked = Asked {
            seq,
            start_time,
            next_by_subj: &self.subject,
            batch: PAGE,
            max_bytes: PAGE_BYTES,
        };
        let client = &self.log.inner.client;
        let reply = client.new_inbox();
        let mut inbox = client.subscribe(reply.clone()).await?;
        let stream = &self.log.inner.config.stream;
        let subject = format!("$JS.API.DIRECT.GET.{stream}");
        client.publish_with_reply(subject, reply, serde_json::to_vec(&asked)?.into()).await?;

        let mut messages = vec![];
        loop {
            let message = timeout(ANSWER_TIMEOUT, inbox.next())
                .await
                .with_context(|| {
                    format!("the stream {stream} did not answer; {DENIED_LOOKS_LIKE_SILENCE}")
                })?
                .context("the connection to NATS was closed")?;
            match message.status {
                None => messages.push(StreamMessage::try_from(message)?),
                // The end of the page, or nothing from here on.
                Some(status) if status == StatusCode::NOT_FOUND || status.as_u16() == PAGE_END => {
                    return Ok(messages);
                }
                Some(status) => {
                    let said = message.description.unwrap_or_default();
                    return Err(anyhow!("the stream {stream} answered {status} {said}"));
                }
            }
        }
    }
}
