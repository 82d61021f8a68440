//! A command that is started for each event.

use std::{collections::BTreeSet, sync::Arc};

use serde_json::json;
use vestibule_events::SignUpEvent;

use super::*;
use crate::{
    Inbox,
    testing::{Shaky, Stage, settings},
};

async fn attempt(settings: ExecSettings) -> Result<(), (Cause, String)> {
    told(subscriber(settings).handle(&task(sign_up("ada"))).await)
}

#[tokio::test]
async fn a_command_reads_its_event_and_is_told_which_it_is() -> anyhow::Result<()> {
    let place = Place::new()?;
    let names =
        "$VESTIBULE_SUBSCRIBER $VESTIBULE_EVENT_ID $VESTIBULE_EVENT_KIND $VESTIBULE_ATTEMPT";
    let settings = place.shell(&format!("cat > event; echo {names} $TRACEPARENT > about"));
    let mut event = sign_up("ada");
    event.traceparent = Some("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".to_owned());
    let mut task = task(event.clone());
    task.attempt = 3;

    assert_eq!(told(subscriber(settings).handle(&task).await), Ok(()));

    assert_eq!(serde_json::from_str::<SignUpEvent>(&place.read("event"))?, event);
    let trace = event.traceparent.as_deref().unwrap();
    assert_eq!(place.read("about"), format!("audit {} accepted 3 {trace}\n", event.id));
    Ok(())
}

#[tokio::test]
async fn its_end_says_whether_the_event_is_done_tried_again_or_parked() -> anyhow::Result<()> {
    let place = Place::new()?;
    for (script, cause, words) in [
        ("exit 65", Cause::Refused, "park: the command ended with exit code 65"),
        ("exit 75", Cause::Unavailable, "retry: the command ended with exit code 75"),
        ("exit 1", Cause::Unavailable, "retry: the command ended with exit code 1;"),
        ("exit 77", Cause::NotPermitted, "retry: the command ended with exit code 77"),
        ("kill -9 $$", Cause::Unavailable, "retry: the command was killed by signal 9"),
    ] {
        let (as_cause, error) = attempt(place.shell(script)).await.unwrap_err();
        assert_eq!(as_cause, cause, "{script}");
        assert!(error.starts_with(words), "{error}");
    }
    Ok(())
}

#[tokio::test]
async fn a_command_that_cannot_be_started_costs_no_event() -> anyhow::Result<()> {
    let place = Place::new()?;
    std::fs::write(place.path().join("notes"), "no program")?;
    for (program, words) in [
        ("no-such-program", "there is no program `no-such-program` on the PATH"),
        ("./gone", "there is no program `./gone`"),
        ("./notes", "`./notes` is not executable"),
    ] {
        let (cause, error) = attempt(place.settings(&[program])).await.unwrap_err();
        assert_eq!(cause, Cause::NotPermitted, "{error}");
        assert!(error.starts_with("retry: could not start the command") && error.contains(words));
    }
    let mut elsewhere = place.shell("true");
    elsewhere.directory = Some(place.path().join("gone"));
    let (cause, error) = attempt(elsewhere).await.unwrap_err();
    assert!(cause == Cause::NotPermitted && error.contains("there is no folder"), "{error}");
    Ok(())
}

#[tokio::test]
async fn of_our_environment_and_our_files_it_gets_only_what_is_listed() -> anyhow::Result<()> {
    let place = Place::new()?;
    let _open = std::fs::File::create(place.path().join("ours"))?;
    assert!(std::env::var_os("CARGO_MANIFEST_DIR").is_some(), "there is something to leak");

    let names = subscriber(place.settings(&["env"])).exchange(&sign_up("ada")).await;
    let names = names.received.iter().filter_map(|it| it.strip_prefix("stdout: ")?.split_once('='));
    let names: BTreeSet<_> = names.map(|(name, _)| name.to_owned()).collect();
    for needed in ["PATH", "MARK", "VESTIBULE_EVENT_ID"] {
        assert!(names.contains(needed), "{names:?}");
    }
    let known = |it: &str| {
        ExecSettings::INHERITED.contains(&it) || it == "MARK" || it.starts_with("VESTIBULE_")
    };
    assert!(names.iter().all(|it| known(it)), "{names:?}");

    let files = place.shell("readlink /proc/$$/fd/*");
    let files = subscriber(files).exchange(&sign_up("ada")).await.received;
    assert!(files.iter().any(|it| it.starts_with("stdout: pipe:")), "{files:?}");
    assert!(!files.iter().any(|it| it.ends_with("/ours")), "{files:?}");
    Ok(())
}

#[tokio::test]
async fn a_command_that_takes_too_long_is_stopped_with_all_that_it_started() -> anyhow::Result<()> {
    let place = Place::new()?;
    for script in
        ["sleep 600 & sleep 600", "trap '' TERM; (trap '' TERM; sleep 600) & sleep 600; wait"]
    {
        let mut settings = place.shell(script);
        settings.timeout = Duration::from_secs(1);
        let (cause, error) = attempt(settings).await.unwrap_err();
        assert_eq!(
            (cause, error.as_str()),
            (Cause::Timeout, "retry: the command took longer than 1s and was stopped")
        );
        place.is_empty().await?;
    }
    Ok(())
}

#[tokio::test]
async fn an_attempt_that_is_cut_off_leaves_nothing_behind() -> anyhow::Result<()> {
    let place = Place::new()?;
    let worker = subscriber(place.shell("trap '' TERM; sleep 600 & sleep 600"));
    let cut_off = tokio::spawn(async move { worker.handle(&task(sign_up("ada"))).await });
    eventually(LIMIT, "all of it runs", async || place.processes() == 3).await?;

    cut_off.abort();

    place.is_empty().await
}

#[tokio::test]
async fn what_a_command_leaves_running_is_not_waited_for_and_ended() -> anyhow::Result<()> {
    let place = Place::new()?;
    // It holds the output open, so the end of the output is not the end of the command.
    assert_eq!(attempt(place.shell("sleep 600 & exit 0")).await, Ok(()));
    place.is_empty().await
}

#[tokio::test]
async fn what_it_writes_is_read_but_not_kept_beyond_a_bound() -> anyhow::Result<()> {
    let place = Place::new()?;
    let mut settings = place
        .shell("head -c 3000000 /dev/zero | tr '\\0' x; echo; echo ada@example.com >&2; exit 65");
    settings.output_bytes_max = 256;
    let (_, error) = attempt(settings.clone()).await.unwrap_err();
    assert!(error.contains("wrote 3000001 bytes to its output and 16 to its error"), "{error}");
    assert!(!error.contains("ada"), "{error}");

    let shown = subscriber(settings).exchange(&sign_up("ada")).await;
    let kept = "x".repeat(256);
    let expected = [
        "ended with exit code 65 (the event's data are wrong)".to_owned(),
        format!("stdout: {kept}"),
        "stdout: … and 2999745 bytes more".to_owned(),
        "stderr: ada@example.com".to_owned(),
    ];
    assert_eq!(shown.received, expected);

    let mut flood = place.shell("exec yes");
    flood.timeout = Duration::from_millis(300);
    assert_eq!(attempt(flood).await.unwrap_err().0, Cause::Timeout);
    Ok(())
}

#[tokio::test]
async fn a_command_need_not_read_its_event() -> anyhow::Result<()> {
    let place = Place::new()?;
    // Longer than a pipe holds.
    let mut event = sign_up("ada");
    event.sign_up.claims.insert("long".to_owned(), json!("x".repeat(1_000_000)));
    for script in ["exit 0", "exec <&-; echo done"] {
        let worker = subscriber(place.shell(script));
        assert_eq!(told(worker.handle(&task(event.clone())).await), Ok(()), "{script}");
    }
    Ok(())
}

#[tokio::test]
async fn an_event_is_given_to_the_command_once_however_often_it_comes() -> anyhow::Result<()> {
    let (place, stage) = (Place::new()?, Stage::open().await?);
    let command = subscriber(place.shell("echo $VESTIBULE_EVENT_ID >> done"));
    let log = Shaky::new(stage.log.clone());
    // Acknowledgements that are lost make the log give the event again.
    log.faults.ack.store(7, std::sync::atomic::Ordering::SeqCst);
    let mut patient = settings(5);
    patient.ack_wait = Duration::from_millis(200);
    let worker = Inbox::new(Arc::new(command), stage.store.clone());
    let running = stage.start_over(Arc::new(log), worker, patient);

    let events = stage.sign_ups(10).await?;
    stage.idle("audit").await?;
    running.stop().await?;

    let mut done: Vec<_> = place.read("done").lines().map(str::to_owned).collect();
    let mut expected: Vec<_> = events.iter().map(|it| it.id.to_string()).collect();
    done.sort_unstable();
    expected.sort_unstable();
    assert_eq!(done, expected);
    Ok(())
}

#[tokio::test]
async fn a_stop_lets_a_command_finish() -> anyhow::Result<()> {
    let (place, stage) = (Place::new()?, Stage::open().await?);
    let script = "echo > begun; while [ ! -e go ]; do sleep 0.01; done; echo > finished";
    let running = stage.start(subscriber(place.shell(script)), settings(1));
    stage.sign_up("ada").await?;
    eventually(LIMIT, "the command has begun", async || !place.read("begun").is_empty()).await?;

    running.stop.cancel();
    std::fs::write(place.path().join("go"), "")?;
    running.stop().await?;

    assert!(!place.read("finished").is_empty());
    stage.acknowledged("audit").await
}
