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
    Person { number: 1, journey: vec![call], afterwards: Afterwards::Nothing }
}

fn only_form(mut tally: Tally) -> Form {
    *tally.forms.form(1, "ada+r-1@contoso.example", "London")
}
