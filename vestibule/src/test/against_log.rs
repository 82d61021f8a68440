//! `vestibule test --against-log`: recorded sign-ups, decided again by the rules of now.
//!
//! Each is decided as of its own time, and as its person stood with the approvers then. Nobody is
//! named: a difference says the event and the pseudonym, and which rule; never an address or the
//! value of a claim. All differences are counted, and no more are kept than are listed.

use std::{
    collections::{BTreeMap, HashMap},
    fmt::Write as _,
};

use anyhow::{Context, bail};
use comfy_table::{Table, presets::NOTHING};
use futures_util::StreamExt;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use serde_json::{Value, json};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};
use tokio::time::Instant;
use tracing::warn;
use uuid::Uuid;
use vestibule_api::{Decider, Question, Standing};
use vestibule_events::{
    ConnectorName, Decision, Effect, Filter, Kind, LogError, Outcome, Person, Replay, SignUpEvent,
    Start, Step, Stored,
};

use super::TestArgs;
use crate::{
    cli::Output,
    config::Config,
    print::say,
    replay::{self, Moment},
    trial::{self, Ask, ListEntries, STANDINGS, StandIns, Trial},
};

/// What decisions make; the others are made by approvers and workers.
const DECIDED: [Kind; 5] =
    [Kind::Screened, Kind::Accepted, Kind::Rejected, Kind::Blocked, Kind::Pending];

/// Returns whether all is well, as far as that was asked for.
pub(super) async fn test(args: &TestArgs, since: Moment, config: &Config) -> anyhow::Result<bool> {
    for name in &args.connectors {
        trial::connector(config, name.as_str())?;
    }
    let judges = Judges::load(config, args.ask_lookups).await?;
    let log = replay::open_log(config).await?;
    let wanted = Replay {
        start: Start::Time(since.resolve(OffsetDateTime::now_utc())),
        until: None,
        filter: Filter { kinds: DECIDED.to_vec(), connectors: args.connectors.clone() },
        person: None,
        follow: false,
    };
    let mut events = log.replay(wanted).await.context("could not read the log")?;
    let mut tally = Tally { limit: args.limit as usize, ..Tally::default() };
    let progress = progress();
    while let Some(stored) = events.next().await {
        match stored {
            Ok(Stored { event, .. }) => tally.add(judges.judge(&event).await, &event),
            // One damaged event must not hide those behind it.
            Err(LogError::Refused(error)) => {
                tally.unreadable += 1;
                warn!("could not read an event and passed over it: {error:#}");
            }
            Err(error) => return Err(error).context("could not read on in the log"),
        }
        progress.inc(1);
    }
    progress.finish_and_clear();
    match args.output {
        Output::Json => say!("{}", tally.json())?,
        Output::Table => say!("{}", tally.text()?)?,
    }
    if tally.unreadable > 0 {
        bail!("{} events could not be read; the log lines above say where", tally.unreadable);
    }
    Ok(tally.different() == 0 || !args.fail_on_difference)
}

/// A count on standard error; it hides itself where that is no terminal.
fn progress() -> ProgressBar {
    let style = ProgressStyle::with_template("{prefix:>11} {human_pos} {per_sec}")
        .expect("the template is valid");
    ProgressBar::new_spinner().with_style(style).with_prefix("deciding")
}

/// The deciders of each connector, one for each way to stand with the approvers.
struct Judges<'a> {
    config: &'a Config,
    by_connector: HashMap<ConnectorName, Vec<Decider>>,
}

/// What came of deciding again.
enum Judged {
    Same,
    /// Only the words differ that the person is told.
    OtherWords,
    NeedsLookup,
    /// The configuration has no such connector any more.
    NoConnector,
    Different(Difference),
}

impl<'a> Judges<'a> {
    async fn load(config: &'a Config, ask_lookups: bool) -> anyhow::Result<Self> {
        let trial = Trial::load(config, true).await?;
        if let Some((list, reason)) = trial.missing.first() {
            bail!("the list `{list}` is not there, so rules that ask it would fail: {reason}");
        }
        let nobody = StandIns::new();
        let ask = if ask_lookups { Ask::Sources } else { Ask::StandIns(&nobody) };
        let reference = trial.reference(ask, &ListEntries::new()).await?;
        let of = |connector| {
            let standings = STANDINGS.iter();
            standings.map(|(_, it)| trial.decider(connector, &reference, *it)).collect()
        };
        let by_connector = config.connectors.iter().map(|it| (it.name.clone(), of(it))).collect();
        Ok(Self { config, by_connector })
    }

    async fn judge(&self, event: &SignUpEvent) -> Judged {
        let sign_up = &event.sign_up;
        let connector = self.config.connectors.iter().find(|it| it.name == sign_up.connector);
        let deciders = self.by_connector.get(&sign_up.connector);
        let (Some(connector), Some(deciders)) = (connector, deciders) else {
            return Judged::NoConnector;
        };
        let stood = STANDINGS.iter().position(|(_, it)| same(*it, standing(&event.decision)));
        let question = Question {
            sign_up,
            person: &event.person,
            deadline: Instant::now() + connector.deadline,
            now: Some(event.time),
        };
        let decision = deciders[stood.unwrap_or_default()].decide(question).await;
        compare(event, &decision)
    }
}

/// How the person stood, as far as the decision had to know.
fn standing(decision: &Decision) -> Standing {
    let stood = decision.reasons.iter().find_map(|reason| match reason.effect {
        Effect::AlreadyPending => Some(Standing::Pending),
        Effect::Approved => Some(Standing::Approved),
        Effect::Denied => Some(Standing::Denied { at: OffsetDateTime::UNIX_EPOCH }),
        _ => None,
    });
    stood.unwrap_or(Standing::None)
}

fn same(one: Standing, other: Standing) -> bool {
    std::mem::discriminant(&one) == std::mem::discriminant(&other)
}

/// Somebody who would be decided differently.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Difference {
    event: Uuid,
    #[serde(with = "time::serde::rfc3339")]
    time: OffsetDateTime,
    connector: ConnectorName,
    step: Step,
    person: Person,
    was: &'static str,
    would_be: &'static str,
    /// Whoever decides it now or, where nobody turns them away any more, who did.
    #[serde(skip_serializing_if = "Option::is_none")]
    rule: Option<String>,
    /// The claims that would be changed otherwise; never their values.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    claims: Vec<String>,
}

fn compare(event: &SignUpEvent, decision: &Decision) -> Judged {
    if trial::not_asked(decision).next().is_some() {
        return Judged::NeedsLookup;
    }
    let (was, would_be) = (&event.decision.outcome, &decision.outcome);
    let kind = Kind::of(event.sign_up.step, would_be).map_or(would_be.as_str(), Kind::as_str);
    let claims = other_claims(was, would_be);
    let field = |it: &Outcome| match it {
        Outcome::Reject { field, .. } => field.clone(),
        _ => None,
    };
    if kind == event.kind.as_str() && claims.is_empty() && field(was) == field(would_be) {
        let same = was.message() == would_be.message();
        return if same { Judged::Same } else { Judged::OtherWords };
    }
    let rule = trial::decisive(decision).or_else(|| trial::decisive(&event.decision));
    Judged::Different(Difference {
        event: event.id,
        time: event.time,
        connector: event.sign_up.connector.clone(),
        step: event.sign_up.step,
        person: event.person.clone(),
        was: event.kind.as_str(),
        would_be: kind,
        rule: rule.map(|it| it.rule.clone()),
        claims,
    })
}

/// The claims that one of the two changes and the other does not, or otherwise. Where one of them
/// changes none because it turns the person away, that is no difference of its own.
fn other_claims(was: &Outcome, would_be: &Outcome) -> Vec<String> {
    let (Some(was), Some(would_be)) = (was.changed_claims(), would_be.changed_claims()) else {
        return Vec::new();
    };
    let names = was.keys().chain(would_be.keys().filter(|name| !was.contains_key(*name)));
    names.filter(|name| was.get(*name) != would_be.get(*name)).cloned().collect()
}

/// All that was found, in bounded memory.
#[derive(Debug, Default)]
struct Tally {
    limit: usize,
    same: u64,
    other_words: u64,
    needs_lookup: u64,
    no_connector: u64,
    unreadable: u64,
    /// How often what became what.
    changes: BTreeMap<String, u64>,
    listed: Vec<Difference>,
}

impl Tally {
    fn add(&mut self, judged: Judged, event: &SignUpEvent) {
        match judged {
            Judged::Same => self.same += 1,
            Judged::OtherWords => self.other_words += 1,
            Judged::NeedsLookup => self.needs_lookup += 1,
            Judged::NoConnector => {
                if self.no_connector == 0 {
                    let connector = &event.sign_up.connector;
                    warn!(%connector, "the configuration lacks a connector that the log has");
                }
                self.no_connector += 1;
            }
            Judged::Different(difference) => {
                *self.changes.entry(difference.change()).or_default() += 1;
                if self.listed.len() < self.limit {
                    self.listed.push(difference);
                }
            }
        }
    }

    fn different(&self) -> u64 {
        self.changes.values().sum()
    }

    fn json(&self) -> Value {
        json!({
            "same": self.same,
            "different": self.different(),
            "only_other_words": self.other_words,
            "needs_a_lookup": self.needs_lookup,
            "connector_is_gone": self.no_connector,
            "unreadable": self.unreadable,
            "changes": self.changes,
            "differences": self.listed,
        })
    }

    fn text(&self) -> anyhow::Result<String> {
        let mut text = String::new();
        if !self.listed.is_empty() {
            let mut table = Table::new();
            table.load_style(NOTHING);
            table.set_header(["time", "step", "change", "rule", "person", "event"]);
            for it in &self.listed {
                table.add_row([
                    it.time.format(&Rfc3339)?,
                    it.step.to_string(),
                    it.change(),
                    it.rule.clone().unwrap_or_else(|| "-".into()),
                    it.person.to_string(),
                    it.event.to_string(),
                ]);
            }
            writeln!(text, "{table}\n")?;
        }
        let different = self.different();
        let listed = self.listed.len() as u64;
        if listed < different {
            writeln!(text, "… and {} more; --limit lists up to 10000\n", different - listed)?;
        }
        writeln!(text, "{:>9}  decided the same", self.same)?;
        for (change, count) in &self.changes {
            writeln!(text, "{count:>9}  {change}")?;
        }
        for (count, what) in [
            (self.other_words, "decided the same, in other words"),
            (self.needs_lookup, "need a lookup; --ask-lookups asks"),
            (self.no_connector, "of connectors that the configuration lacks"),
            (self.unreadable, "could not be read"),
        ] {
            if count > 0 {
                writeln!(text, "{count:>9}  {what}")?;
            }
        }
        text.truncate(text.trim_end().len());
        Ok(text)
    }
}

impl Difference {
    fn change(&self) -> String {
        let Self { was, would_be, claims, .. } = self;
        match (was == would_be, claims.as_slice()) {
            (true, []) => format!("{was} → {would_be}, another field"),
            (_, []) => format!("{was} → {would_be}"),
            (_, claims) => format!("{was} → {would_be}, other {}", claims.join(", ")),
        }
    }
}

#[cfg(test)]
mod tests {
    use time::macros::datetime;
    use vestibule_api::StandIn;
    use vestibule_events::{Claims, LookupReason, Mode, Protocol, PseudonymKey, Reason, SignUp};

    use super::*;

    fn event(outcome: Outcome) -> SignUpEvent {
        let sign_up = SignUp {
            connector: "partners".parse().unwrap(),
            protocol: Protocol::ApiConnector,
            step: Step::BeforeCreate,
            email: None,
            identities: vec![],
            claims: Claims::new(),
            client: None,
            locale: None,
            ip: None,
            object_id: None,
            correlation_id: None,
        };
        let key = PseudonymKey::new(vec![7; 32]);
        let person = key.person(&sign_up);
        let fingerprint = key.fingerprint(&sign_up, &person);
        let now = datetime!(2026-11-22 12:00 UTC);
        let decision = because(outcome, "before", Effect::Reject);
        SignUpEvent::decided(Uuid::from_u128(1), now, person, fingerprint, sign_up, decision)
            .unwrap()
    }

    fn because(outcome: Outcome, rule: &str, effect: Effect) -> Decision {
        let reason =
            Reason { rule: rule.into(), effect, mode: Mode::Enforce, failure: None, took_us: 1 };
        Decision { reasons: vec![reason], ..Decision::new(outcome) }
    }

    fn reject(message: &str, field: &str) -> Outcome {
        Outcome::Reject { message: message.into(), field: Some(field.into()) }
    }

    fn set(value: &str) -> Outcome {
        let claims = json!({ "city": value, "same": 1 }).as_object().unwrap().clone();
        Outcome::Continue { claims }
    }

    /// The change and its rule, or a word for what is none.
    fn judged(was: Outcome, would_be: &Decision) -> (String, String) {
        let word = match compare(&event(was), would_be) {
            Judged::Different(it) => return (it.change(), it.rule.unwrap_or_default()),
            Judged::Same => "same",
            Judged::OtherWords => "other words",
            Judged::NeedsLookup => "needs a lookup",
            Judged::NoConnector => "no connector",
        };
        (word.into(), String::new())
    }

    #[test]
    fn a_difference_says_what_became_what_and_by_which_rule() {
        let after = |outcome| because(outcome, "after", Effect::Block);
        for (was, would_be, change, rule) in [
            (reject("no", "a"), after(reject("no", "a")), "same", ""),
            (reject("no", "a"), after(reject("No!", "a")), "other words", ""),
            (
                reject("no", "a"),
                after(reject("no", "b")),
                "rejected → rejected, another field",
                "after",
            ),
            (Outcome::unchanged(), after(reject("no", "a")), "accepted → rejected", "after"),
            // Nobody turns them away any more, so it is told who did.
            (reject("no", "a"), after(Outcome::unchanged()), "rejected → accepted", "before"),
            (set("Köln"), after(set("Bonn")), "accepted → accepted, other city", ""),
        ] {
            assert_eq!(judged(was, &would_be), (change.into(), rule.into()));
        }
    }

    #[test]
    fn what_needs_a_lookup_is_no_difference() {
        let lookup = LookupReason {
            lookup: "crm".into(),
            answer: StandIn::NOT_ASKED.into(),
            from: None,
            took_us: 1,
        };
        let decision =
            Decision { lookups: vec![lookup], ..because(reject("no", "a"), "x", Effect::Reject) };
        assert_eq!(judged(Outcome::unchanged(), &decision).0, "needs a lookup");
    }

    #[test]
    fn the_person_stands_as_then() {
        for (effect, stood) in [
            (Effect::AlreadyPending, "pending"),
            (Effect::Approved, "approved"),
            (Effect::Denied, "denied"),
            (Effect::RequireApproval, "none"),
        ] {
            let stands = standing(&because(Outcome::unchanged(), "x", effect));
            let found = STANDINGS.iter().find(|(_, it)| same(*it, stands)).map(|(word, _)| *word);
            assert_eq!(found, Some(stood));
        }
    }

    #[test]
    fn all_are_counted_and_no_more_are_kept_than_are_listed() {
        let mut tally = Tally { limit: 2, ..Tally::default() };
        let event = event(Outcome::unchanged());
        for _ in 0..5 {
            let decision = because(reject("no", "a"), "x", Effect::Reject);
            tally.add(compare(&event, &decision), &event);
        }
        assert_eq!((tally.different(), tally.listed.len()), (5, 2));
        assert!(tally.text().unwrap().contains("and 3 more"));
    }
}
