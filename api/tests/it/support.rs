//! A connector to call, and logs that misbehave.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use axum::{
    Router,
    body::Body,
    http::{HeaderMap, Method, Request, StatusCode, header},
};
use futures_util::{StreamExt as _, stream::BoxStream};
use http_body_util::BodyExt as _;
use prometheus_client::registry::Registry;
use serde_json::Value;
use tower::ServiceExt as _;
use vestibule_api::{
    Api, ConnectorSettings, Credential, CredentialKind, Decider, OnError, RuleOutcome,
    RuleSettings, Rules, router,
};
use vestibule_events::{
    AppendError, Appended, Backlog, Consumer, ConsumerSpec, EventLog, Filter, LocalLog,
    LocalLogConfig, LogError, Mode, PseudonymKey, Replay, Retention, SignUpEvent, Start, Stored,
    WrittenEvent,
};

/// `entra` / `try-me`.
pub(crate) const AUTHORIZATION: &str = "Basic ZW50cmE6dHJ5LW1l";

/// A connector `partners` with a credential and the defaults.
pub(crate) fn partners() -> ConnectorSettings {
    let name = "partners".parse().expect("a valid name");
    let credential = Credential {
        name: "first".to_owned(),
        kind: CredentialKind::Basic { user: "entra".to_owned(), password: "try-me".into() },
    };
    ConnectorSettings { credentials: vec![credential], ..ConnectorSettings::new(name) }
}

/// The same with rules.
pub(crate) fn partners_with(rules: Vec<RuleSettings>) -> ConnectorSettings {
    ConnectorSettings {
        decider: Decider::new(Rules::compile(rules).expect("rules compile")),
        ..partners()
    }
}

/// A connector whose rules look at everything and do everything, and fail a lot.
pub(crate) fn some_of_everything() -> ConnectorSettings {
    let rule = |name: &str, when: &str, outcome, on_error| RuleSettings {
        name: name.to_owned(),
        steps: vec![],
        when: when.to_owned(),
        outcome,
        on_error,
        mode: Mode::Enforce,
    };
    let set = |claim: &str, value: &str| RuleOutcome::Set {
        claims: [(claim.to_owned(), value.to_owned())].into(),
    };
    let reject = || RuleOutcome::Reject { message: "Please correct it.".to_owned(), field: None };
    let block = || RuleOutcome::Block { message: "No.".to_owned() };
    let on_error = || OnError::Reject { message: "Please try again.".to_owned() };
    partners_with(vec![
        rule("number", "signup.claims.age > 1", set("age", "signup.claims.age * 2"), on_error()),
        rule("copy", "has(signup.claims.city)", set("b", "signup.claims.city"), OnError::Continue),
        rule("any", "signup.claims.exists(c, c == 'a')", set("a", "1"), OnError::Continue),
        rule("first", "signup.identities[0].issuer == 'x'", reject(), OnError::Continue),
        rule("domain", "signup.email_domain == 'spam.test'", block(), OnError::Continue),
        rule("nested", "signup.claims.city.a.b == 1", reject(), OnError::Continue),
        rule("size", "size(signup.claims) > 10", reject(), OnError::Continue),
    ])
}

/// A router over a log.
pub(crate) struct Endpoint<L> {
    pub(crate) router: Router,
    pub(crate) log: Arc<L>,
    pub(crate) registry: Registry,
    _folder: Option<tempfile::TempDir>,
}

impl Endpoint<LocalLog> {
    /// Over a real local log, which goes away with it.
    pub(crate) async fn new(settings: ConnectorSettings) -> anyhow::Result<Self> {
        let folder = tempfile::tempdir()?;
        let log = LocalLog::open(LocalLogConfig {
            path: folder.path().join("events.db"),
            duplicate_window: Duration::from_secs(600),
            refusal_window: Duration::from_secs(30),
            retention: Retention::For(Duration::from_secs(86_400)),
        })
        .await?;
        Ok(Self { _folder: Some(folder), ..Endpoint::over(log, settings) })
    }

    /// Every event in the log.
    pub(crate) async fn events(&self) -> anyhow::Result<Vec<SignUpEvent>> {
        let replay = Replay {
            start: Start::Beginning,
            until: None,
            filter: Filter::default(),
            person: None,
            follow: false,
        };
        let mut events = self.log.replay(replay).await?;
        let mut all = Vec::new();
        while let Some(stored) = events.next().await {
            all.push(stored?.event);
        }
        Ok(all)
    }
}

impl<L: EventLog> Endpoint<L> {
    pub(crate) fn over(log: L, settings: ConnectorSettings) -> Self {
        let log = Arc::new(log);
        let mut registry = Registry::default();
        let key = Arc::new(PseudonymKey::new(vec![7; 32]));
        let api =
            Api::new(Arc::clone(&log) as Arc<dyn EventLog>, key, vec![settings], &mut registry)
                .expect("one connector has no duplicate");
        Self { router: router(api), log, registry, _folder: None }
    }

    /// A call with the right credentials.
    pub(crate) async fn post(&self, path: &str, body: &Value) -> anyhow::Result<Reply> {
        self.call(request(path).body(Body::from(body.to_string()))?).await
    }

    pub(crate) async fn call(&self, request: Request<Body>) -> anyhow::Result<Reply> {
        let (head, body) = self.router.clone().oneshot(request).await?.into_parts();
        let body = body.collect().await?.to_bytes();
        let body = serde_json::from_slice(&body)?;
        Ok(Reply { status: head.status, headers: head.headers, body })
    }

    /// The metrics as they are scraped.
    pub(crate) fn metrics(&self) -> anyhow::Result<String> {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry)?;
        Ok(text)
    }
}

pub(crate) struct Reply {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Value,
}

/// A request that is right in everything, to spoil.
pub(crate) fn request(path: &str) -> axum::http::request::Builder {
    Request::builder()
        .method(Method::POST)
        .uri(path)
        .header(header::AUTHORIZATION, AUTHORIZATION)
        .header(header::CONTENT_TYPE, "application/json")
}

/// What a log does with an append in a test.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Misbehaviour {
    NotStored,
    Unknown,
    /// Never comes back.
    Hangs,
}

#[derive(Debug)]
pub(crate) struct BadLog(pub(crate) Misbehaviour);

#[async_trait]
impl EventLog for BadLog {
    async fn append_written(&self, _event: WrittenEvent) -> Result<Appended, AppendError> {
        match self.0 {
            Misbehaviour::NotStored => Err(AppendError::NotStored(anyhow::anyhow!("disk full"))),
            Misbehaviour::Unknown => Err(AppendError::Unknown(anyhow::anyhow!("commit failed"))),
            Misbehaviour::Hangs => std::future::pending().await,
        }
    }

    async fn consumer(&self, _spec: ConsumerSpec) -> Result<Box<dyn Consumer>, LogError> {
        Err(LogError::Refused(anyhow::anyhow!("this log is for appends")))
    }

    async fn replay(
        &self,
        _replay: Replay,
    ) -> Result<BoxStream<'static, Result<Stored, LogError>>, LogError> {
        Err(LogError::Refused(anyhow::anyhow!("this log is for appends")))
    }

    async fn backlog(&self, _consumer: &str) -> Result<Option<Backlog>, LogError> {
        Ok(None)
    }
}
