//! Makes channels of their settings, with all complaints at once.

use std::{collections::HashSet, fmt};

use vestibule_events::{ConnectorName, Filter};

use super::{
    mail::Mail,
    ntfy::Ntfy,
    push::Push,
    settings::{ApprovalPages, ChannelKind, ChannelSettings, NotifySettings, Recipient},
    template::Templates,
    webhook::Webhook,
};

/// One way of telling somebody, ready to be used.
#[derive(Debug)]
pub(super) struct Channel {
    pub(super) name: String,
    pub(super) filter: Filter,
    pub(super) templates: Templates,
    pub(super) way: Way,
}

#[derive(Debug)]
pub(super) enum Way {
    Record,
    Webhook(Webhook),
    Ntfy(Ntfy),
    Mail(Mail),
    Push(Push),
}

/// A setting and what is wrong with it.
pub(super) type Fault = (&'static str, String);

/// Whether the secrets in settings are those that will be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Secrets {
    Real,
    /// Good for a URL, a header or a password. A key is not looked into.
    StandIns,
}

/// With stand-ins, channels that need a key are left out.
pub(super) fn channels(
    settings: NotifySettings,
    secrets: Secrets,
) -> Result<Vec<Channel>, Vec<Complaint>> {
    let mut complaints = Vec::new();
    let mut names = HashSet::new();
    let mut channels = Vec::new();
    let pages = settings.approvals.as_ref();
    for (index, settings) in settings.channels.into_iter().enumerate() {
        let name = settings.name.clone();
        let mut faults = Vec::new();
        // The name goes into header fields and file names of mail, so it is kept plain.
        if name.parse::<ConnectorName>().is_err() {
            let rule = "must be lower-case letters, digits and hyphens, a letter first";
            faults.push(("name", rule.to_owned()));
        } else if !names.insert(name.clone()) {
            faults.push(("name", "there is another channel of this name".to_owned()));
        }
        channels.extend(channel(settings, pages, secrets, &mut faults));
        complaints.extend(faults.into_iter().map(|(key, message)| Complaint {
            index,
            channel: name.clone(),
            key,
            message,
        }));
    }
    if complaints.is_empty() { Ok(channels) } else { Err(complaints) }
}

fn channel(
    settings: ChannelSettings,
    pages: Option<&ApprovalPages>,
    secrets: Secrets,
    faults: &mut Vec<Fault>,
) -> Option<Channel> {
    let templates = templates(&settings, pages, faults);
    let way = match settings.kind {
        ChannelKind::Record => Some(Way::Record),
        ChannelKind::Webhook { url, format, headers, signing_key } => {
            let key = signing_key.as_ref();
            Webhook::new(&url, format, &headers, key, secrets, faults).map(Way::Webhook)
        }
        ChannelKind::Ntfy(settings) => Ntfy::new(&settings, faults).map(Way::Ntfy),
        ChannelKind::Mail { server, login, from, to, tls } => {
            Mail::new(&server, login.as_ref(), &from, &to, tls, faults).map(Way::Mail)
        }
        ChannelKind::WebPush(settings) => Push::web(&settings, secrets, faults).map(Way::Push),
        ChannelKind::Fcm(settings) => Push::fcm(&settings, secrets, faults).map(Way::Push),
        ChannelKind::Apns(settings) => Push::apns(&settings, secrets, faults).map(Way::Push),
    };
    Some(Channel { name: settings.name, filter: settings.filter, templates: templates?, way: way? })
}

/// What a channel says.
pub(super) fn templates(
    settings: &ChannelSettings,
    pages: Option<&ApprovalPages>,
    faults: &mut Vec<Fault>,
) -> Option<Templates> {
    // Whoever has the link decides, so it never goes to the one whom the decision is about.
    let is_for_person = settings.kind.recipient() == Some(&Recipient::Person);
    let pages = pages.map(|it| if is_for_person { it.without_links() } else { it.clone() });
    Templates::compile(settings, pages, faults)
}

/// Why a channel cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Complaint {
    /// Which channel, from 0.
    pub index: usize,
    pub channel: String,
    /// The setting that is at fault, such as `name`, `body`, `url` or `to`.
    pub key: &'static str,
    pub message: String,
}

impl fmt::Display for Complaint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "channel `{}`: {}: {}", self.channel, self.key, self.message)
    }
}

impl std::error::Error for Complaint {}
