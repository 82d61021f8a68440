//! The command line: help, exit codes, messages that say what to do.

use serde_json::Value;

use crate::support::{EXAMPLE, Site};

#[tokio::test]
async fn exit_codes_tell_failed_from_wrong_usage() -> anyhow::Result<()> {
    let site = Site::new("")?;
    for (arguments, code) in [
        (&["check"][..], 0),
        (&["--help"], 0),
        (&["check", "--config", "missing.toml"], 1),
        (&["fly"], 2),
        (&["replay", "--kind", "nonsense"], 2),
    ] {
        let finished = site.run(arguments).await?;
        assert_eq!(finished.code, code, "{arguments:?}: {}", finished.stderr);
    }
    Ok(())
}

#[tokio::test]
async fn check_names_file_line_key_and_the_nearest_name() -> anyhow::Result<()> {
    let site = Site::with_config(&EXAMPLE.replace("deadline =", "deadlin ="))?;

    let check = site.run(&["check"]).await?;

    let line = EXAMPLE[..EXAMPLE.find("deadline =").unwrap()].lines().count() + 1;
    let expected = format!(
        "./vestibule.toml:{line}:1: connectors.partners.deadlin: there is no such key; did you \
         mean `deadline`?"
    );
    assert_eq!(check.code, 1);
    assert!(check.stderr.contains(&expected), "{}", check.stderr);
    Ok(())
}

#[tokio::test]
async fn the_example_credential_does_not_leave_loopback() -> anyhow::Result<()> {
    let site = Site::with_config(&EXAMPLE.replace("127.0.0.1:7171", "0.0.0.0:7171"))?;

    let up = site.run(&["up"]).await?;

    assert_eq!(up.code, 1);
    assert!(up.stderr.contains("set a real one"), "{}", up.stderr);
    assert!(!site.data().exists(), "refused before anything was made");
    Ok(())
}

#[tokio::test]
async fn without_nats_the_scaled_out_commands_say_what_to_run() -> anyhow::Result<()> {
    let site = Site::new("")?;
    for command in ["api", "worker", "relay"] {
        let finished = site.run(&[command]).await?;
        assert_eq!(finished.code, 1);
        assert!(finished.stderr.contains("`vestibule up`"), "{}", finished.stderr);
    }
    Ok(())
}

#[tokio::test]
async fn nothing_listens_is_said_and_fails() -> anyhow::Result<()> {
    let site = Site::new("")?;
    let ready = site.run(&["ready", "--admin", "127.0.0.1:1"]).await?;
    assert_eq!(ready.code, 1);
    assert!(ready.stderr.contains("nobody answers"), "{}", ready.stderr);
    Ok(())
}

#[tokio::test]
async fn completions_are_written_for_every_shell() -> anyhow::Result<()> {
    let site = Site::new("")?;
    for shell in ["bash", "zsh", "fish"] {
        let finished = site.run(&["completions", shell]).await?;
        assert!(finished.code == 0 && finished.stdout.contains("simulate"), "{shell}");
    }
    Ok(())
}

#[tokio::test]
async fn migrate_makes_the_schema_once() -> anyhow::Result<()> {
    let site = Site::new("")?;
    let first = site.run(&["migrate", "--output", "json"]).await?;
    let second = site.run(&["migrate", "--output", "json"]).await?;
    let applied = |stdout: &str| -> anyhow::Result<usize> {
        let json: Value = serde_json::from_str(stdout)?;
        Ok(json["migrations"].as_array().map_or(0, Vec::len))
    };
    assert!(applied(&first.stdout)? > 0, "{}", first.stderr);
    assert_eq!(applied(&second.stdout)?, 0);
    Ok(())
}

/// What compose.yaml mounts into every container.
#[tokio::test]
async fn the_scaled_out_example_is_fine() -> anyhow::Result<()> {
    let site = Site::with_config(include_str!("../docs/examples/scaled-out.toml"))?;

    let check = site.run(&["check"]).await?;

    assert_eq!(check.code, 0, "{}", check.stderr);
    assert!(check.stdout.contains("stream SIGNUPS at nats://nats:4222"), "{}", check.stdout);
    Ok(())
}

#[tokio::test]
async fn mistakes_of_a_configuration_can_be_had_as_json() -> anyhow::Result<()> {
    let site = Site::with_config(&EXAMPLE.replace("deadline =", "deadlin ="))?;

    let check = site.run(&["check", "--output", "json"]).await?;

    assert_eq!(check.code, 1);
    let said: Value = serde_json::from_str(&check.stdout)?;
    assert_eq!(said["ok"], false);
    assert_eq!(said["mistakes"][0]["key"], "connectors.partners.deadlin");
    Ok(())
}

#[tokio::test]
async fn check_names_every_secret_that_is_not_where_it_should_be() -> anyhow::Result<()> {
    let site = Site::with_config(include_str!("../docs/examples/scaled-out.toml"))?;

    let check = site.run(&["check"]).await?;

    for key in ["key: ", "nats.auditor.password: ", "store.url: ", "credentials[0].password: "] {
        assert!(check.stdout.contains(key), "{key} is not in {}", check.stdout);
    }
    Ok(())
}

#[tokio::test]
async fn simulate_refuses_what_is_no_url() -> anyhow::Result<()> {
    let site = Site::new("")?;

    let simulate = site.run(&["simulate", "--url", "partners", "--count", "1"]).await?;

    assert_eq!(simulate.code, 2);
    assert!(simulate.stderr.contains("expected a URL such as"), "{}", simulate.stderr);
    Ok(())
}
