//! A mail server that records what it is given.

use std::process::Command;
use std::time::Duration;

use anyhow::Context as _;
use serde_json::{Value, json};

use crate::{Process, eventually, tools};

const LIMIT: Duration = Duration::from_secs(20);

/// A real SMTP server (aiosmtpd) without TLS, on a port it chose itself; gone when dropped.
#[derive(Debug)]
pub struct Smtp {
    process: Process,
    port: u16,
    planned: usize,
}

/// One accepted message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mail {
    /// Of the envelope, as are the recipients.
    pub from: String,
    pub recipients: Vec<String>,
    /// Who had logged in.
    pub login: Option<String>,
    /// Headers and body as they came over the wire.
    pub content: String,
}

/// Where in the conversation to refuse.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SmtpStage {
    Recipient,
    Data,
}

impl Smtp {
    /// Takes mail from anyone.
    pub async fn start() -> anyhow::Result<Self> {
        Self::launch(&[]).await
    }

    /// Takes mail only after this login, which it allows without TLS.
    pub async fn start_with_login(user: &str, password: &str) -> anyhow::Result<Self> {
        Self::launch(&[user, password]).await
    }

    pub fn url(&self) -> String {
        format!("smtp://127.0.0.1:{}", self.port)
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// Gives `reply` (such as `451 4.7.1 later`) instead of the next acceptance at that stage. Several are
    /// given one after the other.
    pub async fn refuse_next(&mut self, stage: SmtpStage, reply: &str) -> anyhow::Result<()> {
        let stage = match stage {
            SmtpStage::Recipient => "rcpt",
            SmtpStage::Data => "data",
        };
        self.process.write_line(&json!({ "stage": stage, "reply": reply }).to_string())?;
        self.planned += 1;
        let wanted = self.planned;
        eventually(LIMIT, "the mail server has taken the plan", async || {
            self.facts().filter(|fact| fact.get("planned").is_some()).count() >= wanted
        })
        .await
    }

    /// All messages accepted so far, oldest first.
    pub fn mails(&self) -> Vec<Mail> {
        self.facts().filter_map(|fact| mail(&fact)).collect()
    }

    /// Waits until at least `count` messages have been accepted, and gives them all.
    pub async fn wait_for_mails(&self, count: usize, limit: Duration) -> anyhow::Result<Vec<Mail>> {
        eventually(limit, &format!("{count} mails have come"), async || {
            Some(self.mails()).filter(|mails| mails.len() >= count)
        })
        .await
    }

    pub fn pause(&self) {
        self.process.pause();
    }

    pub fn resume(&self) {
        self.process.resume();
    }

    async fn launch(login: &[&str]) -> anyhow::Result<Self> {
        let mut command = Command::new(tools::python()?);
        command.args(["-c", include_str!("smtp.py")]).args(login);
        let installed = tools::installed().join("python");
        if installed.exists() {
            command.env("PYTHONPATH", installed);
        }
        let mut process = Process::spawn(&command)?;
        let line = process
            .wait_for_line(LIMIT, |line| line.contains("\"port\""))
            .await
            .context("the mail server did not start: run ./scripts/test, or install the Python package aiosmtpd")?;
        let fact: Value = serde_json::from_str(&line)?;
        let port = fact["port"].as_u64().and_then(|port| port.try_into().ok());
        Ok(Self { process, port: port.context("the mail server told no port")?, planned: 0 })
    }

    fn facts(&self) -> impl Iterator<Item = Value> {
        let output = self.process.stdout();
        let facts: Vec<_> = output.lines().flat_map(serde_json::from_str).collect();
        facts.into_iter()
    }
}

fn mail(fact: &Value) -> Option<Mail> {
    let text = |value: &Value| value.as_str().map(str::to_owned);
    Some(Mail {
        from: text(&fact["mail_from"])?,
        recipients: fact["recipients"].as_array()?.iter().filter_map(text).collect(),
        login: text(&fact["login"]),
        content: text(&fact["content"])?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use lettre::transport::smtp::authentication::Credentials;
    use lettre::{AsyncSmtpTransport, AsyncTransport as _, Message, Tokio1Executor};

    type Transport = AsyncSmtpTransport<Tokio1Executor>;

    fn message() -> anyhow::Result<Message> {
        Ok(Message::builder()
            .from("a@vestibule.test".parse()?)
            .to("b@example.test".parse()?)
            .subject("Hello")
            .body("Grüße\r\n".to_owned())?)
    }

    fn transport(server: &Smtp) -> lettre::transport::smtp::AsyncSmtpTransportBuilder {
        Transport::builder_dangerous("127.0.0.1").port(server.port())
    }

    #[tokio::test]
    async fn mail_is_recorded_after_the_planned_refusals() -> anyhow::Result<()> {
        let mut server = Smtp::start().await?;
        server.refuse_next(SmtpStage::Data, "451 4.7.1 later").await?;
        server.refuse_next(SmtpStage::Recipient, "550 5.1.1 nobody here").await?;
        let transport = transport(&server).build::<Tokio1Executor>();

        let unknown = transport.send(message()?).await.unwrap_err();
        let later = transport.send(message()?).await.unwrap_err();
        transport.send(message()?).await?;

        assert!(unknown.is_permanent() && later.is_transient());
        let mails = server.wait_for_mails(1, LIMIT).await?;
        assert_eq!(mails.len(), 1);
        assert_eq!(mails[0].from, "a@vestibule.test");
        assert_eq!(mails[0].recipients, ["b@example.test"]);
        assert!(mails[0].content.contains("Subject: Hello"), "{}", mails[0].content);
        Ok(())
    }

    #[tokio::test]
    async fn a_login_is_asked_for_and_checked() -> anyhow::Result<()> {
        let server = Smtp::start_with_login("user", "right").await?;
        let send = async |password: &str| -> anyhow::Result<()> {
            let credentials = Credentials::new("user".to_owned(), password.to_owned());
            let transport = transport(&server).credentials(credentials).build::<Tokio1Executor>();
            transport.send(message()?).await?;
            Ok(())
        };

        assert!(send("wrong").await.is_err());
        send("right").await?;

        let mails = server.wait_for_mails(1, LIMIT).await?;
        assert_eq!((mails.len(), mails[0].login.as_deref()), (1, Some("user")));
        Ok(())
    }
}
