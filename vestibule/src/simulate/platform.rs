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
    outcomes::Outcomes,
    people::{Afterwards, Body, Call, Delivery, Person, Route, form_of},
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
    pub(super) outcomes: Outcomes,
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
        self.outcomes.add(other.outcomes);
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
        let mut accepted = false;
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
            accepted |= call.step == Step::BeforeCreate;
        }
        match person.afterwards {
            Afterwards::NeverComesBack { email } if accepted => {
                tally.outcomes.expect(person.number, &email, false);
            }
            Afterwards::SignsIn { email, call } if accepted => {
                let signed_in = self.deliver(person.number, &call, &call.body, tally).await?;
                signed_in.inspect(|_| tally.outcomes.expect(person.number, &email, true));
            }
            _ => {}
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
mod tests;
