//! `vestibule replay`: past events, one CloudEvent a line.
//!
//! Reads and changes nothing: no consumer moves, and a log that somebody else has open is only
//! looked at. The events hold personal data; who may read the log may see them.

use std::{
    io::{self, Write},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, bail};
use clap::Args;
use futures_util::StreamExt;
use time::{
    Date, OffsetDateTime,
    format_description::well_known::{Iso8601, Rfc3339},
};
use tracing::warn;
use vestibule_events::{
    Claims, ConnectorName, Email, EventLog, Filter, Kind, LocalLog, LogError, LookupReason, Person,
    Protocol, PseudonymKey, Reason, Replay, Role, SignUp, SignUpEvent, Start, Step, Stored,
};

use crate::{cli::Output, config::Config, wiring};

const EXAMPLES: &str = "\
Examples:
  vestibule replay
      Everything that is recorded.
  vestibule replay --since 2h --kind blocked --kind rejected --output table
      Whom did we turn away in the last two hours?
  vestibule replay --since 2h --explain
      Which rules did it, and which lookup answered what?
  vestibule replay --email ada@example.org
      What happened to this person's sign-up? Only the pseudonym is used and ever written down.
  vestibule replay --follow --connector partners | jq .type
      What happens from the first event on, and goes on with what comes.
  vestibule replay --since 2026-11-01 --until 2026-12-01 > november.jsonl

A time is a date (2026-11-22), a time in RFC 3339 (2026-11-22T10:00:00Z) or so long ago (2h, 30d).
Events hold personal data: take care where the output goes.";

/// How many events are written at once, where so many are there.
const BATCH: usize = 256;

/// How long a server may take until it is there.
const CONNECT_MAX: Duration = Duration::from_secs(10);

/// Which events to print.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct ReplayArgs {
    /// From this time on, or from so long ago
    #[arg(long, value_name = "TIME", value_parser = parse_moment)]
    since: Option<Moment>,
    /// Up to this time, which does not count
    #[arg(long, value_name = "TIME", value_parser = parse_moment, conflicts_with = "follow")]
    until: Option<Moment>,
    /// From this place in the log on
    #[arg(long, value_name = "N", conflicts_with = "since")]
    from_sequence: Option<u64>,
    /// Only events of this kind; may be given several times
    #[arg(long = "kind", value_name = "KIND")]
    kinds: Vec<Kind>,
    /// Only events of this connector; may be given several times
    #[arg(long = "connector", value_name = "NAME")]
    connectors: Vec<ConnectorName>,
    /// Only events of this person, by pseudonym (the `subject` of their events)
    #[arg(long, value_name = "PSEUDONYM", value_parser = parse_pseudonym)]
    person: Option<Person>,
    /// Only events of the person with this address
    #[arg(long, value_name = "ADDRESS", conflicts_with = "person", value_parser = parse_email)]
    email: Option<Email>,
    /// At most so many events
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
    /// Go on with what is recorded from now on, until stopped
    #[arg(long)]
    follow: bool,
    /// A table with the reasons of each decision: rules, lookups, approvers, and how long each took
    #[arg(long, conflicts_with = "output")]
    explain: bool,
    /// JSON: one CloudEvent a line; table: no personal data
    #[arg(long, value_enum, default_value_t = Output::Json)]
    output: Output,
}

/// A time, perhaps told from now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Moment {
    At(OffsetDateTime),
    Ago(Duration),
}

pub(crate) async fn replay(args: ReplayArgs, config: &Config) -> anyhow::Result<()> {
    let log = open_log(config).await?;
    let person = match &args.email {
        Some(email) => Some(pseudonym(&wiring::pseudonym_key(config)?, email.clone())),
        None => args.person.clone(),
    };
    let wanted = wanted(&args, person, OffsetDateTime::now_utc());
    let events = log.replay(wanted).await.context("could not read the log")?;
    let mut events = events.take(args.limit.unwrap_or(usize::MAX)).ready_chunks(BATCH);
    let output = if args.explain { Output::Table } else { args.output };
    let mut lines = Lines { output, out: io::stdout() };
    let mut unreadable = 0_u64;
    if !lines.begin()? {
        return Ok(());
    }
    while let Some(batch) = events.next().await {
        let mut text = Vec::new();
        let mut lost = None;
        for stored in batch {
            match stored {
                Ok(stored) => {
                    line(output, &stored, &mut text)?;
                    if args.explain {
                        explain(&stored.event, &mut text)?;
                    }
                }
                // One damaged event must not hide those behind it.
                Err(LogError::Refused(error)) => {
                    unreadable += 1;
                    warn!("could not read an event and passed over it: {error:#}");
                }
                Err(error @ LogError::Unavailable(_)) if args.follow => {
                    warn!("{:#}; going on as soon as it does", anyhow::Error::from(error));
                }
                Err(error) => {
                    lost = Some(error);
                    break;
                }
            }
        }
        if !lines.write(&text)? {
            return Ok(());
        }
        if let Some(error) = lost {
            return Err(error).context("could not read on in the log");
        }
    }
    if unreadable > 0 {
        bail!("{unreadable} events could not be read; the log lines above say where they are");
    }
    Ok(())
}

/// Opens the log that is the archive to look at it: the stream where there is one, else the local
/// log.
pub(crate) async fn open_log(config: &Config) -> anyhow::Result<Arc<dyn EventLog>> {
    if let Some(nats) = &config.nats {
        let stream = wiring::stream(config, nats, Role::Auditor).await?;
        let asked = tokio::time::timeout(CONNECT_MAX, async {
            // The connection comes about in the background.
            while !stream.is_connected() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            stream.ready().await
        });
        match asked.await {
            Ok(ready) => {
                ready.with_context(|| format!("could not read the stream {}", nats.stream))?;
            }
            Err(_) => bail!(
                "NATS at {} could not be reached as the auditor; is it running, and is the \
                 password right?",
                nats.url
            ),
        }
        return Ok(Arc::new(stream));
    }
    let file = config.log_file();
    if !file.exists() {
        bail!(
            "nothing has been recorded in {}; `vestibule up` records there, and --data names \
             another folder",
            config.data.display()
        );
    }
    let log = LocalLog::open_read_only(&file)
        .await
        .with_context(|| format!("could not open the log {}", file.display()))?;
    Ok(Arc::new(log))
}

fn wanted(args: &ReplayArgs, person: Option<Person>, now: OffsetDateTime) -> Replay {
    let start = match (args.from_sequence, args.since) {
        (Some(sequence), _) => Start::Sequence(sequence),
        (None, Some(since)) => Start::Time(since.resolve(now)),
        (None, None) => Start::Beginning,
    };
    Replay {
        start,
        until: args.until.map(|until| until.resolve(now)),
        filter: Filter { kinds: args.kinds.clone(), connectors: args.connectors.clone() },
        person,
        follow: args.follow,
    }
}

/// Who has this address, whatever the connector.
fn pseudonym(key: &PseudonymKey, email: Email) -> Person {
    key.person(&SignUp {
        connector: "any".parse().expect("is a name"),
        protocol: Protocol::ApiConnector,
        step: Step::BeforeCreate,
        email: Some(email),
        identities: vec![],
        claims: Claims::new(),
        client: None,
        locale: None,
        ip: None,
        object_id: None,
        correlation_id: None,
    })
}

/// Writes an event as a line.
fn line(output: Output, stored: &Stored, text: &mut Vec<u8>) -> anyhow::Result<()> {
    let Stored { sequence, event } = stored;
    match output {
        Output::Json => serde_json::to_writer(&mut *text, event)?,
        Output::Table => {
            let time = event.time.format(&Rfc3339)?;
            let person: String = event.person.as_str().chars().take(12).collect();
            let (kind, connector) = (event.kind.as_str(), event.sign_up.connector.as_str());
            let id = event.id;
            write!(text, "{time:<24} {sequence:>9} {kind:<9} {connector:<16} {person}… {id}")?;
        }
    }
    text.push(b'\n');
    Ok(())
}

/// Writes why it was decided so, a line each.
fn explain(event: &SignUpEvent, text: &mut Vec<u8>) -> io::Result<()> {
    let mut reason = |what: &str, how: &str, mode: &str, took_us: u32| {
        writeln!(text, "    {what:<40} {how:<20} {mode:<8} {took_us:>7} µs")
    };
    for Reason { rule, effect, mode, failure, took_us } in &event.decision.reasons {
        let how = failure.as_ref().map_or(effect.as_str().to_owned(), |failure| {
            format!("{} ({failure})", effect.as_str())
        });
        reason(&format!("rule {rule}"), &how, mode.as_str(), *took_us)?;
    }
    for LookupReason { lookup, answer, from, took_us } in &event.decision.lookups {
        let how = from.as_ref().map_or(answer.clone(), |from| format!("{answer} ({from})"));
        reason(&format!("lookup {lookup}"), &how, "", *took_us)?;
    }
    if let Some(approval) = &event.approval {
        let reason = approval.reason.as_deref().unwrap_or("no reason given");
        writeln!(text, "    request {} by {}: {reason}", approval.request, approval.approver)?;
    }
    // What becomes of a request is told to nobody at once.
    let told = event.decision.outcome.message().filter(|_| event.approval.is_none());
    if let Some(message) = told {
        writeln!(text, "    told: {message}")?;
    }
    Ok(())
}

/// Standard output, whose reader may have had enough.
struct Lines<W> {
    output: Output,
    out: W,
}

impl<W: Write> Lines<W> {
    /// Writes the heading of a table; `false` means that nobody reads any more.
    fn begin(&mut self) -> io::Result<bool> {
        match self.output {
            Output::Json => Ok(true),
            Output::Table => self.write(
                format!(
                    "{:<24} {:>9} {:<9} {:<16} {:<13} {}\n",
                    "time", "sequence", "kind", "connector", "person", "id"
                )
                .as_bytes(),
            ),
        }
    }

    /// Writes at once, so that whoever follows sees it; `false` means that nobody reads any more.
    fn write(&mut self, text: &[u8]) -> io::Result<bool> {
        match self.out.write_all(text).and_then(|()| self.out.flush()) {
            Ok(()) => Ok(true),
            // `| head` has seen what it wanted.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(false),
            Err(error) => Err(error),
        }
    }
}

impl Moment {
    pub(crate) fn resolve(self, now: OffsetDateTime) -> OffsetDateTime {
        match self {
            Self::At(time) => time,
            Self::Ago(ago) => {
                now.saturating_sub(time::Duration::try_from(ago).unwrap_or(time::Duration::MAX))
            }
        }
    }
}

pub(crate) fn parse_moment(text: &str) -> Result<Moment, String> {
    if let Ok(time) = OffsetDateTime::parse(text, &Rfc3339) {
        return Ok(Moment::At(time));
    }
    if let Ok(date) = Date::parse(text, &Iso8601::DATE) {
        return Ok(Moment::At(date.midnight().assume_utc()));
    }
    humantime::parse_duration(text).map(Moment::Ago).map_err(|_| {
        "expected a date such as 2026-11-22, a time such as 2026-11-22T10:00:00Z, or how long ago: \
         2h, 30d"
            .into()
    })
}

pub(crate) fn parse_pseudonym(text: &str) -> Result<Person, String> {
    let is_pseudonym =
        text.len() == 32 && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
    if is_pseudonym {
        Ok(Person::from_pseudonym(text))
    } else if text.contains('@') {
        Err("that is an address; give it with --email".into())
    } else {
        Err("a pseudonym is 32 hexadecimal digits: the `subject` of an event".into())
    }
}

fn parse_email(text: &str) -> Result<Email, String> {
    // Without an address there is no pseudonym to look for; the mistake is not quoted.
    if text.contains('@') { Ok(Email::new(text)) } else { Err("expected an address".into()) }
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use time::macros::datetime;
    use uuid::Uuid;
    use vestibule_events::{Decision, Outcome};

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: ReplayArgs,
    }

    fn args(line: &str) -> Result<ReplayArgs, clap::Error> {
        Line::try_parse_from(std::iter::once("replay").chain(line.split_whitespace()))
            .map(|line| line.args)
    }

    const NOW: OffsetDateTime = datetime!(2026-11-22 12:00 UTC);

    #[test]
    fn a_time_is_a_date_a_time_or_so_long_ago() {
        for (text, expected) in [
            ("2026-11-22", datetime!(2026-11-22 0:00 UTC)),
            ("2026-11-22T10:00:00Z", datetime!(2026-11-22 10:00 UTC)),
            ("2026-11-22T10:00:00.5+02:00", datetime!(2026-11-22 8:00:00.5 UTC)),
            ("2h", datetime!(2026-11-22 10:00 UTC)),
            ("1d", datetime!(2026-11-21 12:00 UTC)),
        ] {
            assert_eq!(parse_moment(text).unwrap().resolve(NOW), expected, "{text}");
        }
        for text in ["", "yesterday", "12:00", "2026-13-01", "-2h"] {
            assert!(parse_moment(text).is_err(), "{text}");
        }
        assert!(parse_moment("99999y").unwrap().resolve(NOW) < NOW);
    }

    #[test]
    fn what_is_asked_for_is_what_the_log_is_asked() {
        let all = wanted(&args("").unwrap(), None, NOW);
        assert_eq!((all.start, all.until, all.follow), (Start::Beginning, None, false));
        assert_eq!(all.filter, Filter::default());
        let some = args("--since 2h --until 1h --kind blocked --kind rejected --connector a");
        let some = wanted(&some.unwrap(), None, NOW);
        assert_eq!(some.start, Start::Time(datetime!(2026-11-22 10:00 UTC)));
        assert_eq!(some.until, Some(datetime!(2026-11-22 11:00 UTC)));
        assert_eq!(some.filter.kinds, [Kind::Blocked, Kind::Rejected]);
        assert_eq!(some.filter.connectors, ["a".parse().unwrap()]);
        let sequence = wanted(&args("--from-sequence 7 --follow").unwrap(), None, NOW);
        assert_eq!((sequence.start, sequence.follow), (Start::Sequence(7), true));
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for line in [
            "--since 2h --from-sequence 7",
            "--until 2h --follow",
            "--kind accept",
            "--connector A.b",
            "--person ada@example.com",
            "--person 1234",
            "--email ada",
            "--person 00112233445566778899aabbccddeeff --email ada@example.com",
        ] {
            assert!(args(line).is_err(), "{line}");
        }
    }

    #[test]
    fn an_address_is_not_shown_among_the_arguments() {
        let args = args("--email ada@example.com").unwrap();
        assert!(!format!("{args:?}").contains("ada"));
    }

    #[test]
    fn an_address_leads_to_the_person_of_the_events() {
        let key = PseudonymKey::new(vec![7; 32]);
        let event = event(&key);
        assert_eq!(pseudonym(&key, Email::new("Ada@Example.com")), event.person);
        assert_ne!(pseudonym(&key, Email::new("eve@example.com")), event.person);
    }

    #[test]
    fn a_line_is_the_event_and_a_row_of_the_table_holds_nothing_personal() {
        let stored = Stored { sequence: 7, event: event(&PseudonymKey::new(vec![7; 32])) };
        let mut json = Vec::new();
        line(Output::Json, &stored, &mut json).unwrap();
        assert_eq!(json.iter().filter(|b| **b == b'\n').count(), 1);
        assert_eq!(serde_json::from_slice::<SignUpEvent>(&json).unwrap(), stored.event);
        let mut row = Vec::new();
        line(Output::Table, &stored, &mut row).unwrap();
        let row = String::from_utf8(row).unwrap();
        assert!(!row.contains("ada") && row.contains("accepted") && row.contains(" 7 "), "{row}");
    }

    #[test]
    fn a_reader_that_has_had_enough_is_no_error() {
        struct Closed(io::ErrorKind);
        impl Write for Closed {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                Err(self.0.into())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let mut lines = Lines { output: Output::Table, out: Closed(io::ErrorKind::BrokenPipe) };
        assert!(!lines.begin().unwrap());
        let mut lines = Lines { output: Output::Table, out: Closed(io::ErrorKind::StorageFull) };
        assert!(lines.begin().is_err());
    }

    fn event(key: &PseudonymKey) -> SignUpEvent {
        let sign_up = SignUp {
            connector: "partners".parse().unwrap(),
            protocol: Protocol::ApiConnector,
            step: Step::BeforeCreate,
            email: Some(Email::new("ada@example.com")),
            identities: vec![],
            claims: Claims::new(),
            client: None,
            locale: None,
            ip: None,
            object_id: None,
            correlation_id: None,
        };
        let person = key.person(&sign_up);
        let fingerprint = key.fingerprint(&sign_up, &person);
        let decision = Decision::new(Outcome::unchanged());
        SignUpEvent::decided(Uuid::from_u128(1), NOW, person, fingerprint, sign_up, decision)
            .unwrap()
    }
}
