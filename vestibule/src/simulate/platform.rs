//! Plays the platform over HTTP: calls, waits, hangs up, calls again.
//!
//! An answer counts once it was read to its end, and only then: what a dying connector had begun to
//! say was never said. Who is called with what is left to `people`, and what must follow from the
//! answers to `verify`.

use std::{
    collections::BTreeMap,
    fs::File,
    io::Write,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::Context;
use reqwest::{Client, StatusCode, header};
use secrecy::{ExposeSecret, SecretString};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;
use vestibule_events::Step;

use super::{
    people::{Body, Call, Delivery, Person, Route, form_of},
    verify::{Difference, Form, Forms},
};

/// How long a platform waits for an answer, at the longest (contract 1.4).
const PLATFORM_PATIENCE: Duration = Duration::from_secs(20);

/// Between two tries while nobody listens.
const RECONNECT_PAUSE: Duration = Duration::from_millis(100);

/// A connector that dies again and again over one call is not going to answer it.
const LOST_MAX: u32 = 10;

/// Where to call, and as whom.
pub(super) struct Target {
    /// The connector's own URL; those of the steps lie below it.
    pub(super) url: String,
    pub(super) user: String,
    pub(super) password: SecretString,
    /// What a person is told whose event could not be stored, where that is known. Such a block
    /// page says nothing about the person.
    pub(super) try_again_message: Option<String>,
}

/// A platform with many people in front of it.
pub(super) struct Platform {
    client: Client,
    target: Target,
    run: String,
    answers: Option<Mutex<File>>,
    /// How long nobody may answer before we give up.
    patience: Duration,
    begun: Instant,
    /// When somebody last answered, in milliseconds since `begun`.
    last_answer: AtomicU64,
    /// Cancelled with a reason once going on is of no use.
    pub(super) stop: CancellationToken,
    hopeless: Mutex<Option<String>>,
}

/// What happened, of one caller or of all together.
#[derive(Debug, Default)]
pub(super) struct Tally {
    /// Calls sent, repeated ones and those that failed included.
    pub(super) calls: u64,
    pub(super) answers: BTreeMap<&'static str, u64>,
    pub(super) latencies: Vec<Duration>,
    pub(super) forms: Forms,
    pub(super) differences: Vec<Difference>,
}

/// The names in the summary, all of them shown even where nothing of the kind happened.
pub(super) const ANSWERS: [&str; 9] = [
    "continue",
    "block_page",
    "validation_error",
    "try_again",
    "repeated",
    "hung_up",
    "connection_lost",
    "server_error",
    "failed",
];

impl Tally {
    pub(super) fn count(&mut self, what: &'static str) {
        *self.answers.entry(what).or_default() += 1;
    }

    pub(super) fn add(&mut self, other: Self) {
        self.calls += other.calls;
        for (what, count) in other.answers {
            *self.answers.entry(what).or_default() += count;
        }
        self.latencies.extend(other.latencies);
        self.forms.add(other.forms);
        self.differences.extend(other.differences);
    }

    pub(super) fn failed(&self) -> u64 {
        self.answers.get("failed").copied().unwrap_or_default()
    }
}

/// What an answer tells the platform to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Action {
    Continue,
    BlockPage,
    ValidationError,
    /// A block page because the event could not be stored.
    TryAgain,
}

impl Action {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Continue => "continue",
            Self::BlockPage => "block_page",
            Self::ValidationError => "validation_error",
            Self::TryAgain => "try_again",
        }
    }
}

/// An answer that was read to its end.
#[derive(Clone, Debug, PartialEq)]
struct Answer {
    action: Action,
    status: StatusCode,
    body: Value,
}

/// How one try of a call ended.
enum Tried {
    Answered(Answer),
    /// A whole answer that the contract does not know.
    NotOfTheContract(StatusCode),
    /// Nobody listened: certainly not seen by the connector.
    NotSent,
    /// Sent, at least in part, and no answer.
    Lost,
}

impl Platform {
    pub(super) fn new(
        target: Target,
        run: String,
        answers: Option<File>,
        patience: Duration,
        callers: usize,
    ) -> anyhow::Result<Self> {
        let client = Client::builder()
            .timeout(PLATFORM_PATIENCE)
            .connect_timeout(Duration::from_secs(5))
            .pool_max_idle_per_host(callers)
            .redirect(reqwest::redirect::Policy::none())
            // A proxy between us and the connector would be measured, too.
            .no_proxy()
            .build()
            .context("could not make an HTTP client")?;
        Ok(Self {
            client,
            target,
            run,
            answers: answers.map(Mutex::new),
            patience,
            begun: Instant::now(),
            last_answer: AtomicU64::new(0),
            stop: CancellationToken::new(),
            hopeless: Mutex::new(None),
        })
    }

    /// Why going on was of no use, if so.
    pub(super) fn hopeless(&self) -> Option<String> {
        self.hopeless.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Somebody signs up, as far as they are let.
    pub(super) async fn sign_up(&self, person: Person, tally: &mut Tally) -> anyhow::Result<()> {
        for call in person.journey {
            let answered = self.deliver(person.number, &call, &call.body, tally).await?;
            let action = match (answered, &call.correction) {
                (Some(Action::ValidationError), Some(correction)) => {
                    self.deliver(person.number, &call, correction, tally).await?
                }
                (answered, _) => answered,
            };
            if action != Some(Action::Continue) {
                break;
            }
        }
        Ok(())
    }

    /// Delivers a call as the platform does; `None` where no answer was to be had.
    async fn deliver(
        &self,
        number: u64,
        call: &Call,
        body: &Body,
        tally: &mut Tally,
    ) -> anyhow::Result<Option<Action>> {
        let delivering = Delivering { platform: self, number, call, body };
        if let Delivery::HangUp(after) = call.delivery {
            tally.calls += 1;
            // Dropping the request closes its connection, in the middle of whatever it is in.
            match tokio::time::timeout(after, self.send(call, body, tally)).await {
                // It was faster than we are impatient.
                Ok(Tried::Answered(answer)) => {
                    delivering.keep(&answer, false, tally)?;
                    return Ok(Some(answer.action));
                }
                Ok(Tried::NotSent) => {}
                Ok(_) => delivering.lose(tally),
                Err(_) => {
                    tally.count("hung_up");
                    delivering.lose(tally);
                }
            }
        }
        let Some(answer) = delivering.until_answered(false, tally).await? else { return Ok(None) };
        if call.delivery == Delivery::Again
            && let Some(again) = delivering.until_answered(true, tally).await?
        {
            tally.count("repeated");
            // Whoever was told to try again may well get through now.
            let first_was_stored = answer.action != Action::TryAgain;
            if first_was_stored && (again.status, &again.body) != (answer.status, &answer.body) {
                tally.differences.push(Difference::RepeatDiffers {
                    sign_up: number,
                    step: call.step,
                    first: answer.action.as_str(),
                    then: again.action.as_str(),
                });
            }
        }
        Ok(Some(answer.action))
    }

    /// One try.
    async fn send(&self, call: &Call, body: &Body, tally: &mut Tally) -> Tried {
        let url = match call.route {
            Route::Combined => self.target.url.clone(),
            Route::Step => format!("{}/{}", self.target.url, call.step),
        };
        let begun = Instant::now();
        let sent = self
            .client
            .post(url)
            .basic_auth(&self.target.user, Some(self.target.password.expose_secret()))
            .json(body)
            .send()
            .await;
        let response = match sent {
            Ok(response) => response,
            Err(error) if error.is_connect() => return Tried::NotSent,
            Err(_) => return Tried::Lost,
        };
        let status = response.status();
        let is_json = response.headers().get(header::CONTENT_TYPE).is_some_and(|it| {
            it.to_str().is_ok_and(|it| it.split(';').next() == Some("application/json"))
        });
        let Ok(bytes) = response.bytes().await else { return Tried::Lost };
        let latency = begun.elapsed();
        let now = u64::try_from(self.begun.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.last_answer.fetch_max(now, Ordering::Relaxed);
        let answer = if is_json { serde_json::from_slice(&bytes).ok() } else { None };
        let action = answer
            .as_ref()
            .and_then(|it| read(status, it, call.step, self.target.try_again_message.as_deref()));
        match (answer, action) {
            (Some(body), Some(action)) => {
                tally.latencies.push(latency);
                Tried::Answered(Answer { action, status, body })
            }
            _ => Tried::NotOfTheContract(status),
        }
    }

    /// Whether nobody has answered for so long that nobody will.
    fn gives_up(&self) -> bool {
        let last_answer = Duration::from_millis(self.last_answer.load(Ordering::Relaxed));
        let silent = self.begun.elapsed().saturating_sub(last_answer) > self.patience;
        if silent {
            let patience = humantime::format_duration(self.patience);
            self.stop_because(format!(
                "nobody has answered at {} for {patience}; is the connector running?",
                self.target.url
            ));
        }
        silent
    }

    fn stop_because(&self, reason: String) {
        let mut hopeless = self.hopeless.lock().unwrap_or_else(PoisonError::into_inner);
        hopeless.get_or_insert(reason);
        self.stop.cancel();
    }
}

/// One call of one person with one body.
struct Delivering<'a> {
    platform: &'a Platform,
    number: u64,
    call: &'a Call,
    body: &'a Body,
}

impl Delivering<'_> {
    /// Calls until there is an answer. A platform tries twice; that a restart costs nobody their
    /// sign-up, we wait longer while nobody listens at all.
    async fn until_answered(
        &self,
        again: bool,
        tally: &mut Tally,
    ) -> anyhow::Result<Option<Answer>> {
        let mut is_last_try = false;
        let mut lost = 0;
        loop {
            tally.calls += 1;
            match self.platform.send(self.call, self.body, tally).await {
                Tried::Answered(answer) => {
                    self.keep(&answer, again, tally)?;
                    return Ok(Some(answer));
                }
                Tried::NotOfTheContract(status) if status.is_server_error() && !is_last_try => {
                    tally.count("server_error");
                    self.lose(tally);
                    is_last_try = true;
                }
                Tried::NotOfTheContract(status) => {
                    self.lose(tally);
                    self.refused(status, tally);
                    tally.count("failed");
                    return Ok(None);
                }
                tried @ (Tried::NotSent | Tried::Lost) => {
                    if matches!(tried, Tried::Lost) {
                        lost += 1;
                        tally.count("connection_lost");
                        self.lose(tally);
                    }
                    let stopped = self.platform.stop.is_cancelled();
                    if stopped || lost == LOST_MAX || self.platform.gives_up() {
                        tally.count("failed");
                        return Ok(None);
                    }
                    tokio::time::sleep(RECONNECT_PAUSE).await;
                }
            }
        }
    }

    /// Takes note of an answer.
    fn keep(&self, answer: &Answer, again: bool, tally: &mut Tally) -> anyhow::Result<()> {
        if !again {
            tally.count(answer.action.as_str());
        }
        match answer.action {
            Action::Continue => self.form(tally, |form| form.accepted = true),
            // The event may have been stored after the deadline.
            Action::TryAgain => self.lose(tally),
            Action::BlockPage | Action::ValidationError => {}
        }
        let Some(file) = &self.platform.answers else { return Ok(()) };
        let line = json!({
            "run": self.platform.run,
            "sign_up": self.number,
            "step": self.call.step,
            "email": self.body.get("email"),
            "form": form_of(self.body),
            "action": answer.action.as_str(),
            "status": answer.status.as_u16(),
            "latency_us": tally.latencies.last().map(Duration::as_micros),
            "again": again,
        });
        let mut file = file.lock().unwrap_or_else(PoisonError::into_inner);
        // In one write, so that whoever reads along sees whole lines.
        file.write_all(format!("{line}\n").as_bytes()).context("could not write down an answer")
    }

    /// Nobody can tell whether the connector has stored an event.
    fn lose(&self, tally: &mut Tally) {
        self.form(tally, |form| form.unanswered = true);
    }

    /// Only a form, the last step before the account, can be accepted.
    fn form(&self, tally: &mut Tally, note: impl FnOnce(&mut Form)) {
        let email = self.body.get("email").and_then(Value::as_str);
        if let (Step::BeforeCreate, Some(email), Some(form)) =
            (self.call.step, email, form_of(self.body))
        {
            note(tally.forms.form(self.number, email, form));
        }
    }

    fn refused(&self, status: StatusCode, tally: &mut Tally) {
        match status {
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                self.platform.stop_because(format!(
                    "the connector refuses user `{}` ({status}); give the right one with --user \
                     and --password",
                    self.platform.target.user
                ));
            }
            StatusCode::NOT_FOUND => self.platform.stop_because(format!(
                "there is no connector at {} ({status}); give the right one with --url or \
                 --connector",
                self.platform.target.url
            )),
            status => tally.differences.push(Difference::NotOfTheContract {
                sign_up: self.number,
                step: self.call.step,
                status: status.as_u16(),
            }),
        }
    }
}

/// Reads an answer as strictly as a platform does: status and action must agree, and nobody can be
/// asked to correct a form where there is none.
fn read(
    status: StatusCode,
    body: &Value,
    step: Step,
    try_again_message: Option<&str>,
) -> Option<Action> {
    body.get("version")?.as_str()?;
    let message = || body.get("userMessage")?.as_str().filter(|it| !it.is_empty());
    match (status.as_u16(), body.get("action")?.as_str()?) {
        (200, "Continue") => Some(Action::Continue),
        (200, "ShowBlockPage") => {
            let is_failure = Some(message()?) == try_again_message;
            Some(if is_failure { Action::TryAgain } else { Action::BlockPage })
        }
        (400, "ValidationError") if step == Step::BeforeCreate => {
            let status = body.get("status")?;
            message()?;
            (*status == 400 || *status == "400").then_some(Action::ValidationError)
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpListener,
    };

    use super::*;

    const CONTINUE: &str = r#"{"version":"1.0.0","action":"Continue"}"#;
    const CHANGED: &str = r#"{"version":"1.0.0","action":"Continue","city":"Leeds"}"#;
    const BLOCK: &str = r#"{"version":"1.0.0","action":"ShowBlockPage","userMessage":"No."}"#;
    const AGAIN: &str = r#"{"version":"1.0.0","action":"ShowBlockPage","userMessage":"Later."}"#;
    const INVALID: &str =
        r#"{"version":"1.0.0","status":400,"action":"ValidationError","userMessage":"Code?"}"#;

    #[test]
    fn an_answer_is_read_as_strictly_as_a_platform_does() {
        let form = Step::BeforeCreate;
        let reading = |status: u16, body: &str, step| {
            let body = serde_json::from_str(body).unwrap();
            read(StatusCode::from_u16(status).unwrap(), &body, step, Some("Later."))
        };
        assert_eq!(reading(200, CONTINUE, form), Some(Action::Continue));
        assert_eq!(reading(200, BLOCK, form), Some(Action::BlockPage));
        assert_eq!(reading(200, AGAIN, form), Some(Action::TryAgain));
        assert_eq!(reading(400, INVALID, form), Some(Action::ValidationError));
        for (status, body, step) in [
            (400, CONTINUE, form),
            (200, INVALID, form),
            (400, INVALID, Step::AfterFederation),
            (400, r#"{"version":"1","action":"ValidationError","userMessage":"Code?"}"#, form),
            (200, r#"{"version":"1","action":"ShowBlockPage"}"#, form),
            (200, r#"{"version":"1","action":"Allow"}"#, form),
            (200, r#"{"action":"Continue"}"#, form),
            (200, "[]", form),
        ] {
            assert_eq!(reading(status, body, step), None, "{status} {body} {step}");
        }
    }

    #[tokio::test]
    async fn an_answer_that_breaks_off_is_none() -> anyhow::Result<()> {
        let whole = answer(200, CONTINUE);
        let tally = call(Delivery::Once, &[&whole[..whole.len() - 5], "", &whole]).await?;
        assert_eq!((tally.calls, tally.answers["connection_lost"]), (3, 2));
        assert_eq!((tally.answers["continue"], tally.failed()), (1, 0));
        assert_eq!(tally.latencies.len(), 1);
        let Form { accepted, unanswered, .. } = only_form(tally);
        assert!(accepted && unanswered);
        Ok(())
    }

    #[tokio::test]
    async fn a_server_error_is_tried_once_more_and_then_final() -> anyhow::Result<()> {
        let error = answer(500, "{}");
        let tally = call(Delivery::Once, &[&error, &answer(200, CONTINUE)]).await?;
        assert_eq!((tally.answers["server_error"], tally.answers["continue"]), (1, 1));
        let tally = call(Delivery::Once, &[&error, &error]).await?;
        assert_eq!((tally.calls, tally.failed()), (2, 1));
        let Form { accepted, unanswered, .. } = only_form(tally);
        assert!(!accepted && unanswered);
        Ok(())
    }

    #[tokio::test]
    async fn a_repeated_call_must_get_the_same_answer() -> anyhow::Result<()> {
        let first = answer(200, CONTINUE);
        let same = call(Delivery::Again, &[&first, &first]).await?;
        assert_eq!((same.answers["repeated"], same.differences.len()), (1, 0));
        let other = call(Delivery::Again, &[&first, &answer(200, CHANGED)]).await?;
        assert!(
            matches!(other.differences[..], [Difference::RepeatDiffers { .. }]),
            "{:?}",
            other.differences
        );
        // Nothing was stored the first time, so nothing is repeated.
        let after_failure = call(Delivery::Again, &[&answer(200, AGAIN), &first]).await?;
        assert_eq!(after_failure.differences, []);
        assert!(only_form(after_failure).accepted);
        Ok(())
    }

    #[tokio::test]
    async fn wrong_credentials_end_the_run_with_a_reason() -> anyhow::Result<()> {
        let (platform, server) = platform(&[&answer(401, "{}")]).await?;
        let mut tally = Tally::default();
        platform.sign_up(person(Delivery::Once), &mut tally).await?;
        server.await??;
        assert!(platform.stop.is_cancelled());
        assert!(platform.hopeless().is_some_and(|it| it.contains("--user")));
        assert_eq!(tally.failed(), 1);
        Ok(())
    }

    #[tokio::test]
    async fn nobody_is_waited_for_longer_than_patience() -> anyhow::Result<()> {
        let (mut platform, server) = platform(&[]).await?;
        server.await??;
        platform.patience = Duration::ZERO;
        let mut tally = Tally::default();
        platform.sign_up(person(Delivery::Once), &mut tally).await?;
        assert!(platform.hopeless().is_some_and(|it| it.contains("nobody has answered")));
        assert!(!only_form(tally).accepted);
        Ok(())
    }

    #[tokio::test]
    async fn answers_are_written_down_a_line_each() -> anyhow::Result<()> {
        let file = tempfile::NamedTempFile::new()?;
        let first = answer(200, CONTINUE);
        let (mut platform, server) = platform(&[&first, &first]).await?;
        platform.answers = Some(Mutex::new(file.reopen()?));
        platform.sign_up(person(Delivery::Again), &mut Tally::default()).await?;
        server.await??;
        let text = std::fs::read_to_string(file.path())?;
        let lines: Vec<Value> = text.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
        assert_eq!(lines.len(), 2);
        assert_eq!((&lines[0]["action"], &lines[0]["again"]), (&json!("continue"), &json!(false)));
        assert_eq!((&lines[0]["step"], &lines[0]["run"]), (&json!("before-create"), &json!("r")));
        assert_eq!((&lines[1]["status"], &lines[1]["again"]), (&json!(200), &json!(true)));
        Ok(())
    }

    /// Delivers one form to a server that says this, a connection each.
    async fn call(delivery: Delivery, answers: &[&str]) -> anyhow::Result<Tally> {
        let (platform, server) = platform(answers).await?;
        let mut tally = Tally::default();
        platform.sign_up(person(delivery), &mut tally).await?;
        server.await??;
        Ok(tally)
    }

    type Server = tokio::task::JoinHandle<std::io::Result<()>>;

    async fn platform(answers: &[&str]) -> anyhow::Result<(Platform, Server)> {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let target = Target {
            url: format!("http://{}/connectors/partners", listener.local_addr()?),
            user: "entra".into(),
            password: "try-me".into(),
            try_again_message: Some("Later.".into()),
        };
        let answers: Vec<_> = answers.iter().map(|&answer| answer.to_owned()).collect();
        let server = tokio::spawn(async move {
            for answer in answers {
                let (mut connection, _) = listener.accept().await?;
                let mut request = vec![];
                while !request.ends_with(b"}") {
                    if connection.read_buf(&mut request).await? == 0 {
                        break;
                    }
                }
                connection.write_all(answer.as_bytes()).await?;
                connection.shutdown().await?;
            }
            Ok(())
        });
        Ok((Platform::new(target, "r".into(), None, Duration::from_secs(30), 1)?, server))
    }

    fn answer(status: u16, body: &str) -> String {
        let length = body.len();
        format!(
            "HTTP/1.1 {status} Whatever\r\ncontent-type: application/json\r\n\
             content-length: {length}\r\nconnection: close\r\n\r\n{body}"
        )
    }

    fn person(delivery: Delivery) -> Person {
        let body = json!({ "email": "ada+r-1@contoso.example", "city": "London" });
        let Value::Object(body) = body else { unreachable!("is an object") };
        let step = Step::BeforeCreate;
        let call = Call { step, route: Route::Step, body, correction: None, delivery };
        Person { number: 1, journey: vec![call] }
    }

    fn only_form(mut tally: Tally) -> Form {
        *tally.forms.form(1, "ada+r-1@contoso.example", "London")
    }
}
