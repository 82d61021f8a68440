//! Reading the file: pages of events, the place of a time, replay.

use std::{collections::VecDeque, path::PathBuf, time::Duration};

use anyhow::anyhow;
use futures_util::stream::{self, BoxStream, StreamExt};
use serde::Deserialize;
use sqlx::SqlitePool;
use time::OffsetDateTime;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::{
    consumer::SavedFilter,
    file,
    held::{Call, Windows},
};
use crate::{Fingerprint, LogError, Replay, SignUpEvent, Start, Stored, Undecodable};

/// Events a page. Small enough that a page of the largest events does no harm in memory.
const PAGE: u32 = 256;

/// Sequences a search looks at in one read. It may pass over much without a hit, and while a read
/// goes on the write-ahead log cannot be taken back.
const SEARCHED_AT_ONCE: u64 = 4096;

/// Events are in the order in which they were appended, and their times nearly so: concurrent calls
/// and a clock set back put one up to so much before its neighbours.
const DISORDER: time::Duration = time::Duration::minutes(1);

/// A row: a sequence and the event as it stands in the log.
pub(super) type Row = (u64, Vec<u8>);

/// Reads the log.
#[derive(Clone, Debug)]
pub(super) struct Reader {
    path: PathBuf,
    pool: SqlitePool,
}

impl Reader {
    pub(super) fn new(path: PathBuf, pool: SqlitePool) -> Self {
        Self { path, pool }
    }

    pub(super) async fn close(&self) {
        self.pool.close().await;
    }

    /// The next events from `from` on.
    pub(super) async fn page(&self, from: u64) -> Result<VecDeque<Row>, LogError> {
        self.page_of(from, u64::MAX, None).await
    }

    /// The same up to `through`, and only those in which `text` occurs.
    async fn page_of(
        &self,
        from: u64,
        through: u64,
        text: Option<&str>,
    ) -> Result<VecDeque<Row>, LogError> {
        let rows: Vec<(i64, Vec<u8>)> = sqlx::query_as(
            "select sequence, event from events
             where sequence between ?1 and ?2 and (?3 is null or instr(event, ?3) > 0)
             order by sequence limit ?4",
        )
        .bind(signed(from))
        .bind(signed(through))
        .bind(text)
        .bind(PAGE)
        .fetch_all(&self.pool)
        .await
        .map_err(file::failed(&self.path))?;
        Ok(rows.into_iter().map(|(sequence, event)| (sequence.cast_unsigned(), event)).collect())
    }

    pub(super) async fn row(&self, sequence: u64) -> Result<Option<Vec<u8>>, LogError> {
        sqlx::query_scalar("select event from events where sequence = ?")
            .bind(signed(sequence))
            .fetch_optional(&self.pool)
            .await
            .map_err(file::failed(&self.path))
    }

    /// The oldest event that is still there.
    pub(super) async fn first(&self) -> Result<Option<u64>, LogError> {
        let first: Option<i64> = sqlx::query_scalar("select min(sequence) from events")
            .fetch_one(&self.pool)
            .await
            .map_err(file::failed(&self.path))?;
        Ok(first.map(i64::cast_unsigned))
    }

    /// The highest sequence that was ever given; 0 where none was.
    pub(super) async fn last(&self) -> Result<u64, LogError> {
        let last: i64 = sqlx::query_scalar(
            "select max(coalesce((select max(sequence) from events), 0),
                        coalesce((select through from trimmed), 0))",
        )
        .fetch_one(&self.pool)
        .await
        .map_err(file::failed(&self.path))?;
        Ok(last.cast_unsigned())
    }

    /// How many events from `from` through `through` a consumer with this filter is to be given.
    pub(super) async fn count(
        &self,
        mut from: u64,
        through: u64,
        filter: &SavedFilter,
    ) -> Result<u64, LogError> {
        from = from.max(self.first().await?.unwrap_or(through + 1));
        if filter.is_empty() {
            // Sequences are without gaps from the first event to the last.
            return Ok((through + 1).saturating_sub(from));
        }
        let mut count = 0;
        while from <= through {
            let end = through.min(from + SEARCHED_AT_ONCE);
            count += self.count_of(from, end, filter).await?;
            from = end + 1;
        }
        Ok(count)
    }

    async fn count_of(
        &self,
        from: u64,
        through: u64,
        filter: &SavedFilter,
    ) -> Result<u64, LogError> {
        // What cannot be read is delivered to everybody, so it counts.
        let count: i64 = sqlx::query_scalar(
            "select count(*) from events where sequence between ?1 and ?2 and (
                 not json_valid(event)
                 or ((?3 = '[]' or event ->> '$.type' in (select value from json_each(?3)))
                 and (?4 = '[]' or event ->> '$.source' in (select value from json_each(?4)))))",
        )
        .bind(signed(from))
        .bind(signed(through))
        .bind(filter.types_json())
        .bind(filter.sources_json())
        .fetch_one(&self.pool)
        .await
        .map_err(file::failed(&self.path))?;
        Ok(count.cast_unsigned())
    }

    pub(super) async fn consumer(
        &self,
        name: &str,
    ) -> Result<Option<(u64, String, String)>, LogError> {
        let row: Option<(i64, String, String)> =
            sqlx::query_as("select cursor, pending, filter from consumers where name = ?")
                .bind(name)
                .fetch_optional(&self.pool)
                .await
                .map_err(file::failed(&self.path))?;
        Ok(row.map(|(cursor, pending, filter)| (cursor.cast_unsigned(), pending, filter)))
    }

    /// Where a reader begins that starts so.
    pub(super) async fn start(&self, start: Start, last: u64) -> Result<u64, LogError> {
        match start {
            Start::Beginning => Ok(self.first().await?.unwrap_or(last + 1)),
            Start::Now => Ok(last + 1),
            Start::Sequence(sequence) => {
                // No log grows so long; but SQLite could not keep a greater one.
                let sequence = sequence.min(i64::MAX.cast_unsigned() - 1);
                Ok(sequence.max(self.first().await?.unwrap_or(last + 1)))
            }
            Start::Time(time) => {
                let mut from = self.place_of(time.saturating_sub(DISORDER), last).await?;
                loop {
                    let page = self.page_of(from, last, None).await?;
                    let Some((end, _)) = page.back() else { return Ok(last + 1) };
                    from = end + 1;
                    let found =
                        page.iter().find(|(_, raw)| time_of(raw).is_some_and(|it| it >= time));
                    if let Some((sequence, _)) = found {
                        return Ok(*sequence);
                    }
                }
            }
        }
    }

    /// The first sequence from which on events are at or after a time, were their times in order.
    pub(super) async fn place_of(&self, time: OffsetDateTime, last: u64) -> Result<u64, LogError> {
        let mut low = self.first().await?.unwrap_or(last + 1);
        let mut high = last + 1;
        while low < high {
            let middle = low + (high - low) / 2;
            // What cannot be read has no time: the next that has one speaks for it.
            let probe: Option<(i64, Option<String>)> = sqlx::query_as(
                "select sequence, event ->> '$.time' from events
                 where sequence between ? and ? and json_valid(event) order by sequence limit 1",
            )
            .bind(signed(middle))
            .bind(signed(high - 1))
            .fetch_optional(&self.pool)
            .await
            .map_err(file::failed(&self.path))?;
            match probe {
                None => high = middle,
                Some((at, probed)) => {
                    let probed = probed.and_then(|it| parse_time(&it));
                    if probed.is_some_and(|it| it >= time) {
                        high = middle;
                    } else {
                        low = at.cast_unsigned() + 1;
                    }
                }
            }
        }
        Ok(low)
    }

    /// The calls that a further one may repeat, in order, the latest `limit` at most.
    pub(super) async fn calls(
        &self,
        windows: Windows,
        last: u64,
        limit: usize,
        each: impl FnMut(Call, u64),
    ) -> Result<(), LogError> {
        let Some(latest) = self.latest_time(last).await? else { return Ok(()) };
        let oldest = before(latest, windows.longest());
        let from = self.place_of(oldest, last).await?;
        self.calls_from(from.max((last + 1).saturating_sub(limit as u64)), last, each).await
    }

    /// The calls of the events from `from` through `last`.
    pub(super) async fn calls_from(
        &self,
        mut from: u64,
        last: u64,
        mut each: impl FnMut(Call, u64),
    ) -> Result<(), LogError> {
        loop {
            let page = self.page_of(from, last, None).await?;
            let Some((end, _)) = page.back() else { return Ok(()) };
            from = end + 1;
            for (sequence, raw) in &page {
                // What cannot be read cannot be repeated: its answer is not known.
                if let Ok(head) = serde_json::from_slice::<Head>(raw) {
                    each(head.call(), *sequence);
                }
            }
        }
    }

    async fn latest_time(&self, last: u64) -> Result<Option<OffsetDateTime>, LogError> {
        let page = self.page_of((last + 1).saturating_sub(u64::from(PAGE)), last, None).await?;
        Ok(page.iter().rev().find_map(|(_, raw)| time_of(raw)))
    }

    /// Past events as a stream; with `follow` it ends when the log is closed.
    pub(super) async fn replay(
        self,
        replay: Replay,
        mut last: watch::Receiver<u64>,
        closed: CancellationToken,
    ) -> Result<BoxStream<'static, Result<Stored, LogError>>, LogError> {
        let end = *last.borrow_and_update();
        let from = self.start(replay.start, end).await?;
        let state =
            Replaying { reader: self, replay, last, closed, from, end, page: VecDeque::new() };
        let stream = stream::unfold(state, |mut state| async move {
            let item = state.next().await?;
            Some((item, state))
        });
        Ok(stream.boxed())
    }
}

struct Replaying {
    reader: Reader,
    replay: Replay,
    last: watch::Receiver<u64>,
    closed: CancellationToken,
    /// The first sequence that was not read yet.
    from: u64,
    /// The last one known to be there.
    end: u64,
    page: VecDeque<Row>,
}

impl Replaying {
    async fn next(&mut self) -> Option<Result<Stored, LogError>> {
        loop {
            while let Some((sequence, raw)) = self.page.pop_front() {
                let event = match Undecodable::decode(&raw) {
                    Ok(event) => event,
                    Err(error) => {
                        let error = anyhow!(error).context(format!("event {sequence} is damaged"));
                        return Some(Err(LogError::Refused(error)));
                    }
                };
                if self
                    .replay
                    .until
                    .is_some_and(|until| event.time >= until.saturating_add(DISORDER))
                {
                    return None;
                }
                if self.wants(&event) {
                    return Some(Ok(Stored { sequence, event }));
                }
            }
            if self.from > self.end {
                if !self.replay.follow {
                    return None;
                }
                tokio::select! {
                    changed = self.last.wait_for(|last| *last >= self.from) => match changed {
                        Ok(last) => self.end = *last,
                        Err(_) => return None,
                    },
                    () = self.closed.cancelled() => return None,
                }
            }
            let person = self.replay.person.as_ref().map(crate::Person::as_str);
            let through = self.end.min(self.from + SEARCHED_AT_ONCE);
            match self.reader.page_of(self.from, through, person).await {
                Ok(page) => {
                    let full = page.len() == PAGE as usize;
                    self.from = match page.back() {
                        Some((sequence, _)) if full => sequence + 1,
                        _ => through + 1,
                    };
                    self.page = page;
                }
                Err(error) => {
                    // The caller may go on asking, but not in a loop that takes the whole core.
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    return Some(Err(error));
                }
            }
        }
    }

    fn wants(&self, event: &SignUpEvent) -> bool {
        let Replay { start, until, filter, person, .. } = &self.replay;
        filter.matches(event)
            && person.as_ref().is_none_or(|person| event.person == *person)
            && until.is_none_or(|until| event.time < until)
            && !matches!(start, Start::Time(start) if event.time < *start)
    }
}

/// What the suppression of repetitions and the search by time need of an event; an eighth of the
/// work of reading it whole.
#[derive(Deserialize)]
struct Head {
    #[serde(with = "time::serde::rfc3339")]
    time: OffsetDateTime,
    fingerprint: Fingerprint,
    data: HeadData,
}

#[derive(Deserialize)]
struct HeadData {
    decision: crate::Decision,
}

impl Head {
    fn call(&self) -> Call {
        Call::new(self.fingerprint, self.time, self.data.decision.outcome.is_refusal())
    }
}

pub(super) fn time_of(raw: &[u8]) -> Option<OffsetDateTime> {
    #[derive(Deserialize)]
    struct Time {
        #[serde(with = "time::serde::rfc3339")]
        time: OffsetDateTime,
    }
    serde_json::from_slice::<Time>(raw).ok().map(|it| it.time)
}

fn parse_time(text: &str) -> Option<OffsetDateTime> {
    OffsetDateTime::parse(text, &time::format_description::well_known::Rfc3339).ok()
}

/// A time so long before another; the earliest there is where that is not far enough back.
pub(super) fn before(time: OffsetDateTime, age: Duration) -> OffsetDateTime {
    time.saturating_sub(time::Duration::try_from(age).unwrap_or(time::Duration::MAX))
}

/// SQLite's integers are signed; no log grows so long that it matters.
pub(super) fn signed(sequence: u64) -> i64 {
    i64::try_from(sequence).unwrap_or(i64::MAX)
}
