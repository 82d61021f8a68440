//! E-mail over SMTP: who it goes to, and what a server's refusal means.
//!
//! A server's replies quote addresses, so nothing of them is repeated but their numbers.

use std::time::Duration;

use anyhow::anyhow;
use lettre::{
    Address, AsyncSmtpTransport, AsyncTransport, Message as Letter, Tokio1Executor,
    message::{
        Mailbox,
        header::{ContentType, HeaderName, HeaderValue},
    },
    transport::smtp::{
        self,
        authentication::Credentials,
        client::{Tls, TlsParameters},
        extension::ClientId,
    },
};
use reqwest::Url;
use secrecy::ExposeSecret;
use vestibule_events::{Email, SignUpEvent};

use super::{
    channels::Fault,
    settings::{MailLogin, MailTls, Recipient},
    template::Message,
};
use crate::{Cause, HandleError};

/// For each step of the conversation; the attempt as a whole is bounded by the runtime.
const TIMEOUT: Duration = Duration::from_secs(10);

/// The codes with which a server does not let us in (RFC 4954). They are about us and not about
/// the message: once the password is mended, the same event goes through.
const NOT_LET_IN: [u16; 4] = [530, 534, 535, 538];

/// The codes with which a server puts off one message (RFC 5321, and greylisting) while it takes
/// others.
const PUT_OFF: [u16; 2] = [450, 451];

type Transport = AsyncSmtpTransport<Tokio1Executor>;

/// A mail server, and who writes to whom over it.
pub(super) struct Mail {
    transport: Transport,
    from: Mailbox,
    to: To,
}

#[derive(Clone)]
pub(super) enum To {
    Person,
    Role(String),
    Fixed(Vec<Mailbox>),
}

/// A message that can be sent.
pub(super) struct Addressed<'a> {
    transport: &'a Transport,
    letter: Letter,
    /// An address needs more than ASCII, which not every server takes.
    beyond_ascii: bool,
}

impl std::fmt::Debug for Mail {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Mail(…)")
    }
}

impl Mail {
    pub(super) fn new(
        server: &str,
        login: Option<&MailLogin>,
        from: &str,
        to: &Recipient,
        tls: MailTls,
        faults: &mut Vec<Fault>,
    ) -> Option<Self> {
        let from = mailbox("from", from, faults);
        let to = match to {
            Recipient::Person => Some(To::Person),
            Recipient::Role(role) => Some(To::Role(role.clone())),
            Recipient::Fixed(addresses) => {
                if addresses.is_empty() {
                    faults.push(("to", "needs at least one address".to_owned()));
                }
                let boxes =
                    addresses.iter().map(|it| mailbox("to", it, faults)).collect::<Vec<_>>();
                boxes.into_iter().collect::<Option<Vec<_>>>().map(To::Fixed)
            }
        };
        let transport = transport(server, login, tls).map_err(|fault| faults.push(fault)).ok();
        Some(Self { transport: transport?, from: from?, to: to? })
    }

    pub(super) const fn recipients(&self) -> &To {
        &self.to
    }

    /// Addresses a message. `row` is the name under which it is noted that it was sent.
    ///
    /// The message id is made from event and row, so that a mail that is sent twice, because the
    /// first answer was lost, can be told from a second mail.
    pub(super) fn to(
        &self,
        to: Vec<Mailbox>,
        event: &SignUpEvent,
        row: &str,
        message: &Message,
    ) -> Result<Addressed<'_>, HandleError> {
        let beyond_ascii = to.iter().any(|it| !it.email.to_string().is_ascii());
        let id = format!("<{}.{row}@{}>", event.id, self.from.email.domain());
        let automatic = HeaderName::new_from_ascii_str("Auto-Submitted");
        let draft = Letter::builder()
            .from(self.from.clone())
            .message_id(Some(id))
            .subject(message.subject.as_str())
            .header(ContentType::TEXT_PLAIN)
            // Keeps out-of-office replies from answering us.
            .raw_header(HeaderValue::new(automatic, "auto-generated".to_owned()));
        let letter = to
            .into_iter()
            .fold(draft, lettre::message::MessageBuilder::to)
            .body(message.body.clone())
            .map_err(|_| {
                let source = anyhow!("the message cannot be written as a mail");
                HandleError::park(Cause::InvalidRecipient, source)
            })?;
        Ok(Addressed { transport: &self.transport, letter, beyond_ascii })
    }
}

/// An address is parsed, never pasted: it was typed by whoever signs up.
pub(super) fn person(email: &Email) -> Result<Mailbox, HandleError> {
    let address: Address = email.expose().trim().parse().map_err(|_| {
        let source = anyhow!("the person's address is none that mail can go to");
        HandleError::park(Cause::InvalidRecipient, source)
    })?;
    Ok(Mailbox::new(None, address))
}

impl Addressed<'_> {
    pub(super) async fn send(self) -> Result<(), HandleError> {
        match self.transport.send(self.letter).await {
            Ok(_) => Ok(()),
            Err(error) => Err(judge(&error, self.beyond_ascii)),
        }
    }
}

fn judge(error: &smtp::Error, beyond_ascii: bool) -> HandleError {
    if let Some(code) = error.status() {
        let code = u16::from(code);
        let source = anyhow!("the mail server answered {code}");
        return if error.is_permanent() && !NOT_LET_IN.contains(&code) {
            HandleError::park(Cause::Refused, source)
        } else if PUT_OFF.contains(&code) {
            HandleError::retry(Cause::NotYet, source)
        } else {
            HandleError::retry(Cause::Unavailable, source)
        };
    }
    if error.is_timeout() {
        HandleError::retry(Cause::Timeout, anyhow!("the mail server did not answer in time"))
    } else if error.is_tls() {
        HandleError::retry(Cause::Unavailable, anyhow!("no TLS with the mail server"))
    } else if error.is_client() && beyond_ascii {
        let source = anyhow!("the mail server takes no address beyond ASCII");
        HandleError::park(Cause::InvalidRecipient, source)
    } else if error.is_client() {
        // Somebody may be in between and hide it; or the server is not yet set up as it will be.
        let source = anyhow!("the mail server does not offer the TLS or the login that we need");
        HandleError::retry(Cause::Unavailable, source)
    } else {
        HandleError::retry(Cause::Unavailable, anyhow!("could not talk to the mail server"))
    }
}

fn mailbox(key: &'static str, text: &str, faults: &mut Vec<Fault>) -> Option<Mailbox> {
    let parsed = text.parse().ok();
    if parsed.is_none() {
        faults.push((key, "must be an address, or `Name <address>`".to_owned()));
    }
    parsed
}

fn transport(server: &str, login: Option<&MailLogin>, tls: MailTls) -> Result<Transport, Fault> {
    let shape = || ("server", "must be smtp://HOST[:PORT] or smtps://HOST[:PORT]".to_owned());
    let url = Url::parse(server).map_err(|_| shape())?;
    let host = url.host_str().filter(|it| !it.is_empty()).ok_or_else(shape)?;
    let plain = match url.scheme() {
        "smtp" => true,
        "smtps" => false,
        _ => return Err(shape()),
    };
    if !url.username().is_empty() || url.password().is_some() {
        return Err(("server", "a name and password belong under `login`".to_owned()));
    }
    let local = matches!(host, "localhost" | "127.0.0.1" | "[::1]");
    if login.is_some() && plain && tls != MailTls::Required && !local {
        return Err(("login", "a password must not travel in the clear: require TLS".to_owned()));
    }

    let bare_host = host.trim_start_matches('[').trim_end_matches(']');
    let parameters = || {
        TlsParameters::new(bare_host.to_owned()).map_err(|_| {
            ("server", "no TLS: the system has no usable root certificates".to_owned())
        })
    };
    let tls = match (plain, tls) {
        (false, _) => Tls::Wrapper(parameters()?),
        (true, MailTls::Required) => Tls::Required(parameters()?),
        (true, MailTls::Opportunistic) => Tls::Opportunistic(parameters()?),
        (true, MailTls::None) => Tls::None,
    };
    let port = url.port().unwrap_or(if plain { 25 } else { 465 });
    let mut builder = Transport::builder_dangerous(bare_host)
        .port(port)
        .tls(tls)
        .timeout(Some(TIMEOUT))
        .hello_name(ClientId::default());
    if let Some(MailLogin { user, password }) = login {
        let password = password.expose_secret().to_owned();
        builder = builder.credentials(Credentials::new(user.clone(), password));
    }
    Ok(builder.build())
}
