//! What is answered where an event cannot be stored, or not in time.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use axum::http::StatusCode;
use futures_util::stream::BoxStream;
use serde_json::{Value, json};
use tokio::{
    sync::{mpsc, watch},
    time::Instant,
};
use tokio_util::sync::CancellationToken;
use vestibule_api::{
    AnswerAfter, ConnectorSettings, Durable, OnError, OnStorageFailure, RuleOutcome, RuleSettings,
};
use vestibule_events::{
    AppendError, Appended, Backlog, Consumer, ConsumerSpec, EventLog, LocalLog, LogError, Mode,
    Replay, Stored, WrittenEvent,
};

use crate::support::{BadLog, Endpoint, Misbehaviour, partners, partners_with};

const PATH: &str = "/connectors/partners/before-create";

fn try_again() -> Value {
    json!({
        "version": "1.0.0",
        "action": "ShowBlockPage",
        "userMessage":
            "We cannot take your sign-up at the moment. Please try again in a few minutes.",
    })
}

const MISBEHAVIOURS: [(Misbehaviour, &str); 3] = [
    (Misbehaviour::NotStored, "not-stored"),
    (Misbehaviour::Unknown, "unknown"),
    (Misbehaviour::Hangs, "late"),
];

#[tokio::test(start_paused = true)]
async fn without_storage_a_sign_up_is_refused_within_the_deadline() -> anyhow::Result<()> {
    for (misbehaviour, cause) in MISBEHAVIOURS {
        let endpoint = Endpoint::over(BadLog(misbehaviour), partners());
        for step in ["after-federation", "before-create"] {
            let started = Instant::now();
            let path = format!("/connectors/partners/{step}");
            let reply = endpoint.post(&path, &json!({ "email": "ada@example.com" })).await?;
            assert_eq!((reply.status, reply.body), (StatusCode::OK, try_again()), "{cause} {step}");
            // The clock counts in milliseconds and rounds up.
            let limit = ConnectorSettings::DEADLINE + Duration::from_millis(1);
            assert!(started.elapsed() <= limit, "{cause} {step}: {:?}", started.elapsed());
        }

        let metrics = endpoint.metrics()?;
        for line in [
            format!(r#"storage_failures_total{{connector="partners",cause="{cause}"}} 2"#),
            r#"calls_total{connector="partners",step="before-create",answer="refused-without-storage"} 1"#.to_owned(),
        ] {
            assert!(metrics.contains(&line), "no {line} in\n{metrics}");
        }
    }
    Ok(())
}

#[tokio::test(start_paused = true)]
async fn where_it_is_configured_a_sign_up_is_let_through_but_rules_hold() -> anyhow::Result<()> {
    for (misbehaviour, cause) in MISBEHAVIOURS {
        let rule = RuleSettings {
            name: "domain".to_owned(),
            steps: vec![],
            when: "signup.email_domain == 'spam.test'".to_owned(),
            outcome: RuleOutcome::Block { message: "No.".to_owned() },
            on_error: OnError::Continue,
            mode: Mode::Enforce,
        };
        let settings = ConnectorSettings {
            on_storage_failure: OnStorageFailure::LetThrough,
            ..partners_with(vec![rule])
        };
        let endpoint = Endpoint::over(BadLog(misbehaviour), settings);

        let good = endpoint.post(PATH, &json!({ "email": "ada@example.com" })).await?;
        let bad = endpoint.post(PATH, &json!({ "email": "eve@spam.test" })).await?;

        assert_eq!(good.body, json!({ "version": "1.0.0", "action": "Continue" }), "{cause}");
        assert_eq!(bad.body["action"], "ShowBlockPage", "{cause}");
        let metrics = endpoint.metrics()?;
        let line = r#"answer="let-through"} 2"#;
        assert!(metrics.contains(line), "no {line} in\n{metrics}");
    }
    Ok(())
}

#[tokio::test]
async fn a_sign_in_needs_no_log() -> anyhow::Result<()> {
    let endpoint = Endpoint::over(BadLog(Misbehaviour::Hangs), partners());
    let body = json!({ "email": "ada@example.com", "objectId": "1" });

    let reply = endpoint.post("/connectors/partners/before-token", &body).await?;

    assert_eq!(reply.body["action"], "Continue");
    Ok(())
}

/// The stream has acknowledged everything up to the watched number.
struct Stream(watch::Receiver<u64>);

#[async_trait]
impl Durable for Stream {
    async fn durable(&self, sequence: u64) {
        let mut acknowledged = self.0.clone();
        if acknowledged.wait_for(|it| *it >= sequence).await.is_err() {
            std::future::pending().await
        }
    }
}

#[tokio::test]
async fn an_answer_can_wait_for_the_stream() -> anyhow::Result<()> {
    let (acknowledge, acknowledged) = watch::channel(0);
    let settings = ConnectorSettings {
        answer_after: AnswerAfter::Stream(Arc::new(Stream(acknowledged))),
        deadline: Duration::from_secs(60),
        ..partners()
    };
    let endpoint = Endpoint::new(settings).await?;
    let body = json!({ "email": "ada@example.com" });
    let mut call = std::pin::pin!(endpoint.post(PATH, &body));

    // Stored, and yet not answered.
    while endpoint.events().await?.is_empty() {
        tokio::select! {
            biased;
            _ = &mut call => anyhow::bail!("answered before the stream had the event"),
            () = tokio::task::yield_now() => {}
        }
    }
    acknowledge.send(1)?;

    assert_eq!(call.await?.body["action"], "Continue");
    Ok(())
}

#[tokio::test]
async fn a_stream_that_is_late_is_a_storage_failure_and_the_repetition_is_answered()
-> anyhow::Result<()> {
    let (acknowledge, acknowledged) = watch::channel(0);
    let settings = ConnectorSettings {
        answer_after: AnswerAfter::Stream(Arc::new(Stream(acknowledged))),
        deadline: Duration::from_millis(300),
        ..partners()
    };
    let endpoint = Endpoint::new(settings).await?;
    let body = json!({ "email": "ada@example.com" });

    let first = endpoint.post(PATH, &body).await?;
    acknowledge.send(1)?;
    let again = endpoint.post(PATH, &body).await?;

    assert_eq!(first.body, try_again());
    assert_eq!(again.body["action"], "Continue");
    assert_eq!(endpoint.events().await?.len(), 1);
    let metrics = endpoint.metrics()?;
    let line = r#"storage_failures_total{connector="partners",cause="stream-late"} 1"#;
    assert!(metrics.contains(line), "no {line} in\n{metrics}");
    Ok(())
}

/// Holds appends back until it is told to let them go on, and says how many came to their end.
#[derive(Debug)]
struct Gate {
    log: LocalLog,
    begun: mpsc::UnboundedSender<()>,
    open: CancellationToken,
    done: mpsc::UnboundedSender<()>,
}

#[async_trait]
impl EventLog for Gate {
    async fn append_written(&self, event: WrittenEvent) -> Result<Appended, AppendError> {
        let _ = self.begun.send(());
        self.open.cancelled().await;
        let appended = self.log.append_written(event).await;
        let _ = self.done.send(());
        appended
    }

    async fn consumer(&self, spec: ConsumerSpec) -> Result<Box<dyn Consumer>, LogError> {
        self.log.consumer(spec).await
    }

    async fn replay(
        &self,
        replay: Replay,
    ) -> Result<BoxStream<'static, Result<Stored, LogError>>, LogError> {
        self.log.replay(replay).await
    }

    async fn backlog(&self, consumer: &str) -> Result<Option<Backlog>, LogError> {
        self.log.backlog(consumer).await
    }
}

#[tokio::test]
async fn a_platform_that_hangs_up_does_not_stop_an_append_half_way() -> anyhow::Result<()> {
    let behind = Endpoint::new(partners()).await?;
    let (begun, mut has_begun) = mpsc::unbounded_channel();
    let (done, mut is_done) = mpsc::unbounded_channel();
    let open = CancellationToken::new();
    let log = LocalLog::clone(&behind.log);
    let endpoint = Endpoint::over(Gate { log, begun, open: open.clone(), done }, partners());
    let body = json!({ "email": "ada@example.com" });

    tokio::select! {
        _ = endpoint.post(PATH, &body) => anyhow::bail!("answered without an event"),
        Some(()) = has_begun.recv() => {} // And here the call is dropped.
    }
    open.cancel();
    is_done.recv().await;

    assert_eq!(behind.events().await?.len(), 1);
    Ok(())
}

#[tokio::test(start_paused = true)]
async fn what_waits_for_a_log_that_hangs_is_bounded() -> anyhow::Result<()> {
    let endpoint = Endpoint::over(BadLog(Misbehaviour::Hangs), partners());
    let body = json!({ "email": "ada@example.com" });
    let calls = (0..10_000).map(|_| endpoint.post(PATH, &body));
    for reply in futures_util::future::join_all(calls).await {
        assert_eq!(reply?.body, try_again());
    }
    let started = Instant::now();

    let reply = endpoint.post(PATH, &body).await?;

    assert_eq!(reply.body, try_again());
    assert_eq!(started.elapsed(), Duration::ZERO, "nothing to wait for");
    let metrics = endpoint.metrics()?;
    for line in [r#"cause="late"} 10000"#, r#"cause="crowded"} 1"#] {
        assert!(metrics.contains(line), "no {line} in\n{metrics}");
    }
    Ok(())
}
