//! `vestibule try`: one call of a platform, decided and answered as the connector would.
//!
//! The payload is read in the connector's own dialect; the answer is shown in all three. Nothing is
//! appended, kept or sent, apart from the questions of lookups, and these can be left out. What is
//! printed is the author's own payload, and goes to standard output only.

mod notify;

use std::{
    fmt::Write as _,
    io::{IsTerminal, Read},
    path::{Path, PathBuf},
};

use anyhow::{Context, bail};
use axum::http::{HeaderMap, HeaderName, HeaderValue};
use clap::Args;
use comfy_table::{Table, presets::NOTHING};
use serde_json::{Value, json};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};
use tokio::time::Instant;
use uuid::Uuid;
use vestibule_api::{
    BodyKind, Call, Dialect, Problem, Question, Received, Reply, Shape, Standing, Written,
};
use vestibule_events::{
    Claims, Decision, Kind, Outcome, Protocol, PseudonymKey, SignUp, SignUpEvent, Step,
};
use vestibule_workers::Preview;

use crate::{
    cli::Output,
    config::{Config, ConnectorConfig},
    print::say,
    trial::{self, Ask, ListEntries, STANDINGS, StandIns, Trial},
};

const EXAMPLES: &str = "\
Examples:
  vestibule try --connector partners --step before-create payload.json
      What would become of this call, why, and the exact answer in each dialect.
  echo '{\"email\": \"ada@example.org\"}' | vestibule try --connector partners --step before-create
      The same with the payload from standard input.
  vestibule try --connector b2c --step before-create --query 'email=ada@example.org&country=France'
      A call of a custom policy whose claims stand in the URL.
  vestibule try --connector partners --standing denied --step after-federation payload.json
      The same person after an approver has said no.
  vestibule try --connector partners --step before-create --notify payload.json
      What the channels of the worker `notify` would say of it, and to whom.

Lookups are asked as in a sign-up; --without-lookups leaves them unasked. Nothing is recorded.
Exit code 0 means that there is an answer, whatever it is.";

/// A call to try.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct TryArgs {
    /// Which connector of the configuration
    #[arg(long, value_name = "NAME")]
    connector: String,
    /// The step whose URL is called; may be absent where the payload says it
    #[arg(long, value_name = "STEP", value_parser = trial::parse_step)]
    step: Option<Step>,
    /// The body of the call as the platform sends it; `-`, or none, reads standard input
    #[arg(value_name = "PAYLOAD")]
    payload: Option<PathBuf>,
    /// custom-policy: a header of a GET, as in 'email: ada@example.org'; may be given several times
    #[arg(long = "header", value_name = "NAME: VALUE", value_parser = parse_header)]
    headers: Vec<(HeaderName, HeaderValue)>,
    /// custom-policy: the query of a GET, as in 'email=ada@example.org'
    #[arg(long, value_name = "QUERY", conflicts_with = "payload")]
    query: Option<String>,
    /// Leave lookups unasked; what needs one goes by its `on_error`
    #[arg(long)]
    without_lookups: bool,
    /// How the person stands with the approvers: none, pending, approved or denied
    #[arg(long, value_name = "STANDING", default_value = "none", value_parser = parse_standing)]
    standing: Standing,
    /// The time that `now()` and `today()` give; the present one where absent
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    now: Option<OffsetDateTime>,
    /// Show what each channel of the worker `notify` would say, and to whom; nothing is sent
    #[arg(long)]
    notify: bool,
    #[arg(long, value_enum, default_value_t = Output::Table)]
    output: Output,
}

pub(crate) async fn try_call(args: TryArgs, config: &Config) -> anyhow::Result<()> {
    let connector = trial::connector(config, &args.connector)?;
    let call = read(&args, connector)?;
    let trial = Trial::load(config, true).await?;
    let nobody = StandIns::new();
    let ask = if args.without_lookups { Ask::StandIns(&nobody) } else { Ask::Sources };
    let reference = trial.reference(ask, &ListEntries::new()).await;
    let reference = reference.context("could not try; --without-lookups leaves lookups unasked")?;
    let decider = trial.decider(connector, &reference, args.standing);
    // A pseudonym of nobody: any key will do, and the real one is left where it is.
    let key = PseudonymKey::new(rand::random::<[u8; 32]>().to_vec());
    let person = key.person(&call.sign_up);
    let deadline = Instant::now() + connector.deadline;
    let question = Question { sign_up: &call.sign_up, person: &person, deadline, now: args.now };
    let decision = decider.decide(question).await;
    let effects = trial::effects(&decision);
    let answers = answers(connector, &call, &decision.outcome);
    let notes = notes(connector, &call, &trial, &decision);
    let messages = if args.notify {
        let fingerprint = key.fingerprint(&call.sign_up, &person);
        let now = args.now.unwrap_or_else(OffsetDateTime::now_utc);
        let (sign_up, decided) = (call.sign_up.clone(), decision.clone());
        let event = SignUpEvent::decided(Uuid::nil(), now, person, fingerprint, sign_up, decided);
        Some(notify::messages(config, event.as_ref())?)
    } else {
        None
    };
    let sign_up = &call.sign_up;
    let tried =
        Tried { connector, sign_up, decision: &decision, effects, answers, messages, notes };
    match args.output {
        Output::Json => say!("{}", tried.json())?,
        Output::Table => say!("{}", tried.text()?)?,
    }
    Ok(())
}

fn read(args: &TryArgs, connector: &ConnectorConfig) -> anyhow::Result<Call> {
    let dialect = dialect(connector, connector.protocol);
    let mut headers = HeaderMap::new();
    headers.extend(args.headers.iter().cloned());
    let is_get = args.query.is_some() || (args.payload.is_none() && !headers.is_empty());
    if is_get && connector.protocol != Protocol::CustomPolicy {
        bail!(
            "a connector of the protocol {} is called with a body; --query and --header go with \
             custom-policy only",
            connector.protocol.as_str()
        );
    }
    let (from, body) = if is_get { ("the query", Vec::new()) } else { payload(args)? };
    let received = Received {
        connector: &connector.name,
        url_step: args.step,
        path: None,
        query: args.query.as_deref(),
        headers: Some(&headers),
        kind: if is_get { BodyKind::Nothing } else { BodyKind::Json },
        body: &body,
    };
    if body.len() > connector.body_bytes_max {
        bail!("{from} has {} bytes; {}", body.len(), Problem::BodyTooLarge.message());
    }
    dialect.read(&received).map_err(|problem| match problem {
        Problem::NotJson => not_json(from, &body),
        Problem::MissingStep => anyhow::anyhow!(
            "{from} does not say which step it is about; give --step: {}",
            Step::ALL.map(Step::as_str).join(", ")
        ),
        problem => {
            anyhow::anyhow!("{from} would be answered {}: {}", problem.status(), problem.message())
        }
    })
}

fn payload(args: &TryArgs) -> anyhow::Result<(&'static str, Vec<u8>)> {
    if let Some(file) = args.payload.as_deref().filter(|it| *it != Path::new("-")) {
        let body = std::fs::read(file)
            .with_context(|| format!("could not read the payload {}", file.display()))?;
        return Ok(("the payload", body));
    }
    let mut input = std::io::stdin();
    if input.is_terminal() && args.payload.is_none() {
        bail!("there is no payload: name a file, or `-` to type it or to pipe it in");
    }
    let mut body = Vec::new();
    input.read_to_end(&mut body).context("could not read the payload from standard input")?;
    Ok(("the payload", body))
}

/// Says where; what stands there may be about a person, but it is the author who sees it.
fn not_json(from: &str, body: &[u8]) -> anyhow::Error {
    match serde_json::from_slice::<Value>(body) {
        Err(error) => anyhow::anyhow!("{from} is not JSON: {error}"),
        Ok(_) => anyhow::anyhow!("{from} is nested too deeply, or holds a name twice"),
    }
}

fn dialect(connector: &ConnectorConfig, protocol: Protocol) -> Dialect<'_> {
    Dialect { protocol, version: &connector.version, settings: &connector.contract }
}

/// The answers in all dialects, the connector's own first.
fn answers(
    connector: &ConnectorConfig,
    call: &Call,
    outcome: &Outcome,
) -> Vec<(Protocol, Written)> {
    let own = connector.protocol;
    // Where the id of the event goes there is a nil one: this call makes no event.
    let event = Kind::of(call.sign_up.step, outcome).map(|_| Uuid::nil());
    let reply = Reply::new(outcome, event);
    let others = Protocol::ALL.into_iter().filter(|it| *it != own);
    let shape = Shape::of(&call.sign_up);
    let other = |it| (it, dialect(connector, it).write(&shape, &reply));
    let own = (own, dialect(connector, own).write(&call.shape, &reply));
    std::iter::once(own).chain(others.map(other)).collect()
}

/// What an author should know beside the answer.
fn notes(
    connector: &ConnectorConfig,
    call: &Call,
    trial: &Trial<'_>,
    decision: &Decision,
) -> Vec<String> {
    let mut notes = Vec::new();
    if call.contradicts_url {
        notes.push(format!(
            "the payload names another step than --step; {} holds",
            call.sign_up.step
        ));
    }
    let from = |given: &Option<String>| given.clone().unwrap_or_else(|| "none".into());
    let takes = |allowed: &[String], given: &Option<String>| {
        let is = |it: &String| given.as_ref().is_some_and(|given| it.eq_ignore_ascii_case(given));
        allowed.is_empty() || allowed.iter().any(is)
    };
    for (what, allowed, given) in [
        ("tenant", &connector.tenants, &call.tenant),
        ("extension", &connector.extensions, &call.extension),
    ] {
        if !takes(allowed, given) {
            let given = from(given);
            notes.push(format!("a call of the {what} {given} is turned away with 401"));
        }
    }
    if decision.outcome.is_refusal() && Kind::of(call.sign_up.step, &decision.outcome).is_some() {
        notes.push(
            "a `requestId` is the id of the event; nothing is recorded here, so it is zero".into(),
        );
    }
    for (list, reason) in &trial.missing {
        notes.push(format!("the list `{list}` is not there, so rules that ask it fail: {reason}"));
    }
    for lookup in trial::not_asked(decision) {
        notes.push(format!(
            "the lookup `{lookup}` was needed and not asked, so the rule went by its `on_error`"
        ));
    }
    notes
}

/// Everything worth showing.
struct Tried<'a> {
    connector: &'a ConnectorConfig,
    sign_up: &'a SignUp,
    decision: &'a Decision,
    /// One for each reason.
    effects: Vec<String>,
    answers: Vec<(Protocol, Written)>,
    /// What channels would say, where that was asked for; or why none says anything.
    messages: Option<Result<Vec<Preview>, &'static str>>,
    notes: Vec<String>,
}

impl Tried<'_> {
    fn json(&self) -> Value {
        let answer = |(protocol, written): &(Protocol, Written)| {
            json!({
                "protocol": protocol,
                "status": written.status.as_u16(),
                "content_type": "application/json",
                "body": serde_json::from_slice::<Value>(&written.body).unwrap_or_default(),
                "claims_left_out": written.unsaid.claims,
                "refusal_left_out": written.unsaid.refusal,
            })
        };
        let mut tried = json!({
            "connector": self.connector.name,
            "protocol": self.connector.protocol,
            "sign_up": self.sign_up,
            "decision": self.decision,
            "effects": self.effects,
            "answers": self.answers.iter().map(answer).collect::<Vec<_>>(),
            "notes": self.notes,
        });
        if let Some(messages) = &self.messages {
            tried["notifications"] = notify::in_json(messages);
        }
        tried
    }

    fn text(&self) -> anyhow::Result<String> {
        let mut text = String::new();
        writeln!(text, "{}\n", self.sign_up())?;
        writeln!(text, "decision  {}", decided(&self.decision.outcome))?;
        if self.decision.reasons.is_empty() {
            writeln!(text, "\nno rule had a part in it")?;
        } else {
            let rows = self.decision.reasons.iter().zip(&self.effects).map(|(it, effect)| {
                [&it.rule, effect, it.mode.as_str(), &trial::took(it.took_us)].map(str::to_owned)
            });
            writeln!(text, "\n{}", table(["rule", "effect", "mode", "time"], rows))?;
        }
        if !self.decision.lookups.is_empty() {
            let rows = self.decision.lookups.iter().map(|it| {
                let from = it.from.as_deref().unwrap_or("-");
                [&it.lookup, &it.answer, from, &trial::took(it.took_us)].map(str::to_owned)
            });
            writeln!(text, "\n{}", table(["lookup", "answer", "from", "time"], rows))?;
        }
        for note in &self.notes {
            writeln!(text, "\nnote: {note}")?;
        }
        for (index, (protocol, written)) in self.answers.iter().enumerate() {
            let own = if index == 0 { ", as this connector answers" } else { "" };
            let status = written.status;
            writeln!(text, "\n{}{own}: HTTP {status}, application/json", protocol.as_str())?;
            writeln!(text, "{}", String::from_utf8_lossy(&written.body))?;
            if written.unsaid.claims > 0 {
                let claims = written.unsaid.claims;
                writeln!(
                    text,
                    "  {claims} changed claims are left out: it has no way to say them"
                )?;
            }
            if written.unsaid.refusal {
                writeln!(
                    text,
                    "  the person goes on: at this step it has no way to turn them away"
                )?;
            }
        }
        if let Some(messages) = &self.messages {
            notify::in_words(messages, &mut text)?;
        }
        text.truncate(text.trim_end().len());
        Ok(text)
    }

    fn sign_up(&self) -> Table {
        let it = self.sign_up;
        let mut table = Table::new();
        table.load_style(NOTHING);
        let mut row = |name: &str, value: Option<&str>| {
            if let Some(value) = value {
                table.add_row([name, value]);
            }
        };
        row("connector", Some(it.connector.as_str()));
        row("protocol", Some(it.protocol.as_str()));
        row("step", Some(it.step.as_str()));
        row("e-mail", it.email.as_ref().map(vestibule_events::Email::expose));
        for identity in &it.identities {
            row("signs in with", Some(&identity.issuer));
        }
        row("client", it.client.as_deref());
        row("locale", it.locale.as_deref());
        row("ip", it.ip.as_deref());
        row("account", it.object_id.as_deref());
        let claims = claims(&it.claims);
        row("claims", Some(&claims).filter(|it| !it.is_empty()).map(String::as_str));
        table
    }
}

fn decided(outcome: &Outcome) -> String {
    let said = match outcome {
        Outcome::Continue { claims: changed } if changed.is_empty() => "unchanged".to_owned(),
        Outcome::Continue { claims: changed } => format!("with {}", claims(changed)),
        Outcome::Reject { message, field: Some(field) } => format!("{message:?} at {field}"),
        Outcome::Reject { message, .. }
        | Outcome::Block { message }
        | Outcome::Pending { message, .. } => format!("{message:?}"),
    };
    format!("{}: {said}", outcome.as_str())
}

fn claims(claims: &Claims) -> String {
    let claims: Vec<_> = claims.iter().map(|(name, value)| format!("{name} = {value}")).collect();
    claims.join(", ")
}

fn table<const N: usize>(header: [&str; N], rows: impl Iterator<Item = [String; N]>) -> Table {
    let mut table = Table::new();
    table.load_style(NOTHING);
    table.set_header(header);
    table.add_rows(rows);
    table
}

fn parse_header(text: &str) -> Result<(HeaderName, HeaderValue), String> {
    let expected = "expected a name and a value, such as 'email: ada@example.org'";
    let (name, value) = text.split_once(':').ok_or(expected)?;
    let name = name.trim().parse().map_err(|_| expected)?;
    Ok((name, HeaderValue::from_str(value.trim()).map_err(|_| expected)?))
}

fn parse_standing(text: &str) -> Result<Standing, String> {
    let found = STANDINGS.into_iter().find(|(word, _)| *word == text).map(|(_, it)| it);
    found.ok_or_else(|| "expected none, pending, approved or denied".into())
}

fn parse_time(text: &str) -> Result<OffsetDateTime, String> {
    OffsetDateTime::parse(text, &Rfc3339)
        .map_err(|_| "expected a time such as 2026-11-22T10:00:00Z".into())
}
