//! A command that is started once.

use super::*;

/// Reads events as `event`, with the name before the @ as `name`; `answer` answers one.
const FRAME: &str = "
import json, os, sys, time
starts = open('starts', 'a'); starts.write('x'); starts.flush()
first = os.path.getsize('starts') == 1
def answer(event, **what):
    print(json.dumps({'id': event['id'], **what}), flush=True)
waiting = []
for line in sys.stdin:
    event = json.loads(line)
    name = event['data']['email'].split('@')[0]
";

/// A subscriber whose command does `body`, in Python, with each event.
fn service(place: &Place, body: &str) -> ExecSettings {
    let body: String = body.lines().map(|line| format!("    {line}\n")).collect();
    let script = format!("{FRAME}{body}");
    ExecSettings { mode: ExecMode::LongRunning, ..place.settings(&["python3", "-c", &script]) }
}

async fn ask(worker: &ExecSubscriber, name: &str) -> Result<(), HandleError> {
    worker.handle(&task(sign_up(name))).await
}

#[tokio::test]
async fn answers_come_in_any_order_and_say_what_becomes_of_each_event() -> anyhow::Result<()> {
    let place = Place::new()?;
    let worker = subscriber(service(
        &place,
        "waiting.append((name, event))
if len(waiting) == 4:
    for name, event in reversed(waiting):
        if name == 'done': answer(event, ok=True)
        if name == 'later': answer(event, retry='the desk is closed', after='30s')
        if name == 'never': answer(event, park='odd')
        if name == 'no': answer(event, ok=False)",
    ));

    let (done, later, never, no) = tokio::join!(
        ask(&worker, "done"),
        ask(&worker, "later"),
        ask(&worker, "never"),
        ask(&worker, "no")
    );

    assert_eq!(told(done), Ok(()));
    let half_a_minute = Some(Duration::from_secs(30));
    assert!(matches!(&later, Err(HandleError::Retry { after, .. }) if *after == half_a_minute));
    let words = "retry: the command asks to try again: the desk is closed".to_owned();
    assert_eq!(told(later), Err((Cause::Unavailable, words)));
    let words = "park: the command gives it up: odd".to_owned();
    assert_eq!(told(never), Err((Cause::Refused, words)));
    assert!(matches!(no, Err(HandleError::Retry { .. })));
    assert_eq!(place.read("starts"), "x", "one process for all of them");
    worker.close().await;
    place.is_empty().await
}

#[tokio::test]
async fn what_is_no_answer_changes_nothing() -> anyhow::Result<()> {
    let place = Place::new()?;
    let mut settings = service(
        &place,
        "print('hello'); print('x' * 100000); print('{}')
sys.stdout.buffer.write(b'\\xff\\x00\\n')
sys.stderr.write('y' * 1000000)
print(json.dumps({'id': '01890a5d-ac96-774b-bcce-b302099a8057', 'park': 'of nobody'}))
print(json.dumps({'id': event['id'], 'park': 'x' * 1000}))
answer(event, ok=True); answer(event, park='said before')",
    );
    settings.output_bytes_max = 256;
    let worker = subscriber(settings.clone());
    for name in ["ada", "bob"] {
        assert_eq!(told(ask(&worker, name).await), Ok(()));
    }
    worker.close().await;

    let shown = subscriber(settings).exchange(&sign_up("ada")).await;
    assert!(shown.outcome.is_ok());
    for line in ["stdout: hello", "stdout: … a line that is too long", "stdout: {}"] {
        assert!(shown.received.iter().any(|it| it == line), "{line} {:?}", shown.received);
    }
    place.is_empty().await
}

#[tokio::test]
async fn a_command_that_ends_is_started_again_and_its_events_are_tried_again() -> anyhow::Result<()>
{
    let place = Place::new()?;
    let worker = subscriber(service(
        &place,
        "if first:
    sys.exit(3)
answer(event, ok=True)",
    ));

    let (one, other) = tokio::join!(ask(&worker, "ada"), ask(&worker, "bob"));
    for outcome in [one, other] {
        let (cause, error) = told(outcome).unwrap_err();
        assert_eq!(cause, Cause::Unavailable);
        assert!(error.starts_with("retry: the command ended with exit code 3"), "{error}");
    }

    eventually(LIMIT, "it answers after a rest", async || ask(&worker, "ada").await.is_ok())
        .await?;
    assert_eq!(place.read("starts"), "xx", "it was started once more");
    drop(worker);
    place.is_empty().await
}

#[tokio::test]
async fn a_command_that_had_answered_needs_no_rest() -> anyhow::Result<()> {
    let place = Place::new()?;
    let worker = subscriber(service(&place, "answer(event, ok=True); sys.exit(0)"));
    for starts in ["x", "xx", "xxx"] {
        // The answer is there before the end is: the next event may still meet the old process.
        eventually(LIMIT, "it answers", async || ask(&worker, "ada").await.is_ok()).await?;
        assert!(place.read("starts").len() >= starts.len());
    }
    worker.close().await;
    place.is_empty().await
}

#[tokio::test]
async fn a_command_that_answers_nothing_is_started_again() -> anyhow::Result<()> {
    let place = Place::new()?;
    let mut settings = service(
        &place,
        "if first:
    time.sleep(600)
answer(event, ok=True)",
    );
    settings.timeout = Duration::from_secs(2);
    let worker = subscriber(settings);

    let (cause, error) = told(ask(&worker, "ada").await).unwrap_err();

    assert_eq!(cause, Cause::Timeout);
    assert!(error.contains("it is started again"), "{error}");
    eventually(LIMIT, "it answers", async || ask(&worker, "ada").await.is_ok()).await?;
    worker.close().await;
    place.is_empty().await
}

#[tokio::test]
async fn a_command_that_closes_its_input_is_started_again() -> anyhow::Result<()> {
    let place = Place::new()?;
    let script = "
import json, os, sys, time
if not os.path.exists('second'):
    open('second', 'w').close(); os.close(0); time.sleep(600)
for line in sys.stdin:
    print(json.dumps({'id': json.loads(line)['id'], 'ok': True}), flush=True)
";
    let settings = place.settings(&["python3", "-c", script]);
    let worker = subscriber(ExecSettings { mode: ExecMode::LongRunning, ..settings });
    // Longer than a pipe holds, so that it shows.
    let mut event = sign_up("ada");
    event.sign_up.claims.insert("long".to_owned(), "x".repeat(1_000_000).into());

    let (cause, error) = told(worker.handle(&task(event.clone())).await).unwrap_err();

    assert_eq!(cause, Cause::Unavailable);
    assert!(error.contains("was killed by signal 15 before it had answered"), "{error}");
    eventually(LIMIT, "it answers", async || worker.handle(&task(event.clone())).await.is_ok())
        .await?;
    worker.close().await;
    place.is_empty().await
}

#[tokio::test]
async fn one_event_that_is_never_answered_does_no_harm_to_the_others() -> anyhow::Result<()> {
    let place = Place::new()?;
    let mut settings = service(&place, "if name != 'lost': answer(event, ok=True)");
    settings.timeout = Duration::from_secs(6);
    let worker = subscriber(settings);
    assert_eq!(told(ask(&worker, "ada").await), Ok(()));

    let (lost, ()) = tokio::join!(ask(&worker, "lost"), async {
        for _ in 0..20 {
            assert_eq!(told(ask(&worker, "bob").await), Ok(()));
        }
    });

    let (cause, error) = told(lost).unwrap_err();
    assert!(cause == Cause::Timeout && !error.contains("started again"), "{error}");
    assert_eq!(place.read("starts"), "x");
    worker.close().await;
    place.is_empty().await
}

#[tokio::test]
async fn it_ends_with_its_input_and_is_made_to_if_it_does_not() -> anyhow::Result<()> {
    let place = Place::new()?;
    let polite = subscriber(service(&place, "answer(event, ok=True)"));
    assert_eq!(told(ask(&polite, "ada").await), Ok(()));
    polite.close().await;
    assert_eq!(place.processes(), 0, "gone when close returns");
    polite.close().await;

    let stubborn = "import signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
answer(event, ok=True); time.sleep(600)";
    let stubborn = subscriber(service(&place, stubborn));
    assert_eq!(told(ask(&stubborn, "ada").await), Ok(()));
    stubborn.close().await;
    assert_eq!(place.processes(), 0, "gone when close returns");

    let dropped = subscriber(service(&place, "answer(event, ok=True); time.sleep(600)"));
    assert_eq!(told(ask(&dropped, "ada").await), Ok(()));
    drop(dropped);
    place.is_empty().await
}
