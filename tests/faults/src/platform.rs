//! Plays the identity platform: calls, waits, calls once more, and writes everything down.
//!
//! As documented for B2C user flows it waits five seconds and then makes one more attempt. A person who
//! is asked to try again does so once. Some calls are repeated although they were answered, as when the
//! answer is lost behind the platform's own proxies.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::Context as _;
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use reqwest::{Client, StatusCode};
use serde_json::{Value, json};
use tokio::{
    sync::{Semaphore, watch},
    task::JoinSet,
    time::Instant,
};

use crate::journal::{Answer, Entry, Journal, Step};

/// How long one attempt may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// Between two attempts. Nothing is documented; at once would only ever meet the same restart.
const PAUSE: Duration = Duration::from_millis(300);

/// So many people at most wait for an answer at the same time; others wait for them.
const PEOPLE_AT_ONCE: usize = 256;

/// What the connector is told to say when an event could not be stored.
pub(crate) const TRY_AGAIN: &str = "Please try again in a moment.";

/// A platform with many people in front of it.
#[derive(Debug)]
pub(crate) struct Platform {
    client: Client,
    /// The connector's own URL; those of the steps lie below it.
    url: String,
    seed: u64,
    journal: Arc<Journal>,
    calls: AtomicU64,
}

/// Somebody who signs up.
struct Person {
    number: u64,
    email: String,
    form: Value,
    is_federated: bool,
    is_repeated: bool,
}

impl Platform {
    pub(crate) fn new(url: String, seed: u64, journal: Arc<Journal>) -> anyhow::Result<Self> {
        // Whoever comes first in this process installs it; plain HTTP wants one too.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let client = Client::builder()
            .timeout(PATIENCE)
            .pool_max_idle_per_host(PEOPLE_AT_ONCE)
            .redirect(reqwest::redirect::Policy::none())
            .no_proxy()
            .build()
            .context("could not make an HTTP client")?;
        Ok(Self { client, url, seed, journal, calls: AtomicU64::new(0) })
    }

    /// Returns when everybody has an answer or has given up; `progress` says how many have begun.
    pub(crate) async fn everybody_signs_up(
        self: &Arc<Self>,
        people: u64,
        rate: f64,
        progress: &watch::Sender<u64>,
    ) -> anyhow::Result<()> {
        let begun = Instant::now();
        let seats = Arc::new(Semaphore::new(PEOPLE_AT_ONCE));
        let mut signing_up = JoinSet::new();
        for number in 0..people {
            #[expect(clippy::cast_precision_loss, reason = "a run has fewer people")]
            let due = Duration::from_secs_f64(number as f64 / rate);
            tokio::time::sleep_until(begun + due).await;
            let seat = Arc::clone(&seats).acquire_owned().await?;
            let platform = Arc::clone(self);
            signing_up.spawn(async move {
                let _seat = seat;
                platform.sign_up(&Person::new(platform.seed, number)).await
            });
            progress.send_replace(number + 1);
            while let Some(ended) = signing_up.try_join_next() {
                ended??;
            }
        }
        while let Some(ended) = signing_up.join_next().await {
            ended??;
        }
        Ok(())
    }

    async fn sign_up(&self, person: &Person) -> anyhow::Result<()> {
        if person.is_federated {
            let body = person.federation();
            let answer = self.deliver(person, Step::AfterFederation, &body).await?;
            if answer != Some(Answer::Continue) {
                return Ok(());
            }
        }
        let answer = self.deliver(person, Step::BeforeCreate, &person.form).await?;
        if answer == Some(Answer::TryAgain) {
            tokio::time::sleep(PAUSE).await;
            self.deliver(person, Step::BeforeCreate, &person.form).await?;
        } else if answer.is_some() && person.is_repeated {
            self.deliver(person, Step::BeforeCreate, &person.form).await?;
        }
        Ok(())
    }

    /// Two attempts; `None` where neither was answered.
    async fn deliver(
        &self,
        person: &Person,
        step: Step,
        body: &Value,
    ) -> anyhow::Result<Option<Answer>> {
        if let Some(answer) = self.call(person, step, body).await? {
            return Ok(Some(answer));
        }
        tokio::time::sleep(PAUSE).await;
        self.call(person, step, body).await
    }

    async fn call(
        &self,
        person: &Person,
        step: Step,
        body: &Value,
    ) -> anyhow::Result<Option<Answer>> {
        let call = self.calls.fetch_add(1, Ordering::Relaxed);
        let (sign_up, email) = (person.number, person.email.clone());
        let at = self.journal.now();
        self.journal.write(&Entry::Call { call, sign_up, step, email, at })?;
        let heard = self.send(step, body).await;
        let at = self.journal.now();
        let (entry, answer) = match heard {
            Ok((status, answer)) => {
                let status = status.as_u16();
                (Entry::Answered { call, at, status, answer }, Some(answer))
            }
            Err(_) => (Entry::NotAnswered { call, at }, None),
        };
        self.journal.write(&entry)?;
        Ok(answer)
    }

    async fn send(&self, step: Step, body: &Value) -> reqwest::Result<(StatusCode, Answer)> {
        let url = format!("{}/{step}", self.url);
        let request = self.client.post(url).basic_auth("entra", Some("try-me")).json(body);
        let response = request.send().await?;
        let status = response.status();
        // A failure of the server is no answer to a platform.
        if status.is_server_error() {
            response.error_for_status_ref()?;
        }
        let body = response.bytes().await?;
        Ok((status, read(status, &serde_json::from_slice(&body).unwrap_or_default())))
    }
}

/// As strictly as a platform: status and action must agree.
fn read(status: StatusCode, body: &Value) -> Answer {
    let message = body["userMessage"].as_str();
    match (status.as_u16(), body["action"].as_str()) {
        (200, Some("Continue")) => Answer::Continue,
        (200, Some("ShowBlockPage")) if message == Some(TRY_AGAIN) => Answer::TryAgain,
        (200, Some("ShowBlockPage")) if message.is_some() => Answer::Block,
        (400, Some("ValidationError")) if message.is_some() => Answer::ValidationError,
        _ => Answer::Unknown,
    }
}

impl Person {
    /// The same seed and number are the same person.
    fn new(seed: u64, number: u64) -> Self {
        let mut rng = StdRng::seed_from_u64(seed ^ number.wrapping_mul(0x9E37_79B9_7F4A_7C15));
        // Those at the last domain are turned away.
        let domains = ["contoso.example", "fabrikam.example", "throwaway.example"];
        let domain = if rng.random_ratio(1, 20) { 2 } else { rng.random_range(0..2) };
        let email = format!("guest-{number}@{}", domains[domain]);
        let postal_code = if rng.random_ratio(1, 20) {
            "not one".to_owned()
        } else {
            format!("{:05}", rng.random_range(501..99951))
        };
        let form = json!({
            "email": email,
            "displayName": format!("Guest {number}"),
            "givenName": "Guest",
            "surname": format!("No. {number}"),
            "country": "United States",
            "postalCode": postal_code,
            "ui_locales": "en-US",
            "step": "PostAttributeCollection",
            "client_id": "93fd07aa-333c-409d-955d-96008fd08dd9",
        });
        let (is_federated, is_repeated) = (rng.random_ratio(1, 8), rng.random_ratio(1, 12));
        Self { number, email, form, is_federated, is_repeated }
    }

    fn federation(&self) -> Value {
        json!({
            "email": self.email,
            "displayName": self.form["displayName"],
            "identities": [{
                "signInType": "federated",
                "issuer": "google.com",
                "issuerAssignedId": format!("1{:020}", self.number),
            }],
            "ui_locales": "en-US",
            "step": "PostFederationSignup",
            "client_id": self.form["client_id"],
        })
    }
}
