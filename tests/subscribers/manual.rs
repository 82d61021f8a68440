//! Does what `docs/subscribers.md` shows, in the order in which it shows it.
//!
//! A block ```` ```sh run=LABEL ```` is run with the others of its label, one that is also `background`
//! beside them; ```` ```… file=NAME ```` is a file to keep.

use std::{path::Path, process::Command};

use anyhow::{Context, ensure};
use vestibule_testkit::{Process, eventually, free_port};

use super::{accept, lag, run};
use crate::{
    scaled_out::Stack,
    support::{LIMIT, Site},
};

const MANUAL: &str = include_str!("../../docs/subscribers.md");

struct Block<'a> {
    /// What follows the language, such as `run=exec` and `background`.
    words: Vec<&'a str>,
    text: String,
}

impl Block<'_> {
    fn value(&self, key: &str) -> Option<&str> {
        self.words.iter().find_map(|it| it.strip_prefix(key)?.strip_prefix('='))
    }
}

fn blocks(manual: &str) -> Vec<Block<'_>> {
    let mut blocks = Vec::new();
    let mut lines = manual.lines();
    while let Some(line) = lines.next() {
        if let Some(info) = line.strip_prefix("```") {
            let text: Vec<_> = lines.by_ref().take_while(|it| *it != "```").collect();
            let words = info.split_whitespace().skip(1).collect();
            blocks.push(Block { words, text: text.join("\n") + "\n" });
        }
    }
    blocks
}

fn shell(site: &Site, script: &str) -> anyhow::Result<Command> {
    let ours = Path::new(env!("CARGO_BIN_EXE_vestibule")).parent().context("it is in a folder")?;
    let path = std::env::var("PATH")?;
    // With what every command of the site has, and another program.
    let template = site.command(&[]);
    let mut command = Command::new("sh");
    command.args(["-e", "-c", script]).current_dir(site.path());
    for (name, value) in template.get_envs() {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    command.env("PATH", format!("{}:{path}", ours.display()));
    Ok(command)
}

/// Runs the blocks of a label; gives what goes on beside them.
async fn follow(site: &Site, label: &str, port: u16) -> anyhow::Result<Vec<Process>> {
    let mut beside = Vec::new();
    for block in blocks(MANUAL) {
        let text = block.text.replace("127.0.0.1:9000", &format!("127.0.0.1:{port}"));
        let text = text.replace("(\"127.0.0.1\", 9000)", &format!("(\"127.0.0.1\", {port})"));
        if let Some(file) = block.value("file") {
            site.write(file, &text)?;
        }
        if block.value("run") != Some(label) {
            continue;
        }
        let is_background = block.words.contains(&"background");
        // In the shell's place, or killing the shell would leave it behind.
        let script = if is_background { format!("exec {text}") } else { text.clone() };
        let mut process = Process::spawn(&shell(site, &script)?)?;
        if is_background {
            eventually(LIMIT, "it listens", async || {
                tokio::net::TcpStream::connect(("127.0.0.1", port)).await.is_ok()
            })
            .await?;
            beside.push(process);
            continue;
        }
        let ended = process.wait(LIMIT).await?;
        ensure!(ended.status.success(), "{text}{}{}", ended.stdout, ended.stderr);
    }
    Ok(beside)
}

async fn wait_until_done(site: &Site, name: &str) -> anyhow::Result<()> {
    eventually(LIMIT, &format!("nothing waits for {name}"), async || {
        let it = lag(site, name).await?;
        let counts = ["waiting", "in_hand", "retries", "dead_letters"].map(|key| &it[key]);
        anyhow::Ok(counts.iter().all(|it| **it == 0))
    })
    .await
}

#[tokio::test]
async fn the_webhook_of_the_manual_takes_events() -> anyhow::Result<()> {
    let site = Site::new("")?;
    let up = site.up().await?;
    let mut beside = follow(&site, "webhook", free_port()).await?;
    let hook = beside.first_mut().context("the manual starts one")?;
    hook.wait_for_line(LIMIT, |line| line.contains("took")).await.context("the sample")?;

    accept(&up.base, "ada@example.com").await?;
    let accepted = "took dev.vestibule.signup.accepted";
    hook.wait_for_line(LIMIT, |line| line.starts_with(accepted)).await?;
    wait_until_done(&site, "crm").await
}

#[tokio::test]
async fn the_command_of_the_manual_takes_events() -> anyhow::Result<()> {
    let site = Site::new("")?;
    let up = site.up().await?;
    follow(&site, "exec", 0).await?;

    accept(&up.base, "ada@example.com").await?;
    eventually(LIMIT, "the sign-up is in the file, beside the sample", async || {
        let audited = std::fs::read_to_string(site.path().join("audit.jsonl"))?;
        anyhow::Ok(audited.lines().count() == 2 && audited.contains("ada@example.com"))
    })
    .await?;
    wait_until_done(&site, "audit").await
}

#[tokio::test]
async fn the_consumer_of_the_manual_is_made_and_granted() -> anyhow::Result<()> {
    let stack = Stack::start("").await?;
    stack.site.write("nats.conf", include_str!("../../nats.conf"))?;
    follow(&stack.site, "nats", 0).await?;

    let conf = std::fs::read_to_string(stack.site.path().join("nats.conf"))?;
    assert!(conf.contains("user: \"warehouse\""), "{conf}");
    let (_api, base) = stack.api(&[]).await?;
    accept(&base, "ada@example.com").await?;
    eventually(LIMIT, "the event waits for its team", async || {
        let it = lag(&stack.site, "warehouse").await?;
        anyhow::Ok(it["waiting"] == 1)
    })
    .await?;
    let remove = ["subscriber", "remove", "warehouse", "--yes", "--by", "grace"];
    let removed = run(&stack.site, &remove).await?.stdout;
    assert!(removed.contains("take the user warehouse out of the account"), "{removed}");
    assert!(!stack.site.path().join("subscribers/warehouse.password").exists());
    Ok(())
}
