//! What channels would say of an event, to be shown to whoever sets them up. Nothing is sent.

use vestibule_events::SignUpEvent;

use super::{
    Notify,
    channels::{Complaint, templates},
    is_repetition,
    settings::{ChannelKind, NotifySettings, Recipient},
};

/// What one channel would say.
#[derive(Debug)]
pub struct Preview {
    pub channel: String,
    /// As configuration names it.
    pub kind: &'static str,
    /// Whom it would tell, in words.
    pub to: String,
    /// In each of its languages.
    pub texts: Vec<PreviewText>,
}

/// A message in one language. Holds personal data.
pub struct PreviewText {
    pub language: String,
    /// Whether it is the one for this sign-up.
    pub is_chosen: bool,
    /// Or why it cannot be rendered.
    pub message: Result<(String, String), String>,
}

impl std::fmt::Debug for PreviewText {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PreviewText({}, chosen: {})", self.language, self.is_chosen)
    }
}

impl Notify {
    /// What each channel would say that wants this event. The secrets of channels are not needed.
    pub fn preview(
        settings: &NotifySettings,
        event: &SignUpEvent,
    ) -> Result<Vec<Preview>, Vec<Complaint>> {
        let mut previews = Vec::new();
        let mut complaints = Vec::new();
        if is_repetition(event) {
            return Ok(previews);
        }
        for (index, channel) in settings.channels.iter().enumerate() {
            let mut faults = Vec::new();
            let templates = templates(channel, settings.approvals.as_ref(), &mut faults);
            complaints.extend(faults.into_iter().map(|(key, message)| Complaint {
                index,
                channel: channel.name.clone(),
                key,
                message,
            }));
            let Some(templates) = templates.filter(|_| channel.filter.matches(event)) else {
                continue;
            };
            let chosen = templates.language_for(event);
            let text = |(number, language): (usize, &str)| PreviewText {
                language: language.to_owned(),
                is_chosen: number == chosen,
                message: templates
                    .render_in(number, event)
                    .map(|it| (it.subject, it.body))
                    .map_err(|error| error.to_string()),
            };
            previews.push(Preview {
                channel: channel.name.clone(),
                kind: channel.kind.as_str(),
                to: whom(&channel.kind),
                texts: templates.languages().enumerate().map(text).collect(),
            });
        }
        if complaints.is_empty() { Ok(previews) } else { Err(complaints) }
    }
}

fn whom(kind: &ChannelKind) -> String {
    let what = if matches!(kind, ChannelKind::Mail { .. }) { "mail" } else { "devices" };
    match (kind, kind.recipient()) {
        (_, Some(Recipient::Person)) => format!("the person who signs up ({what})"),
        (_, Some(Recipient::Role(role))) => format!("everybody with the role {role} ({what})"),
        (_, Some(Recipient::Fixed(addresses))) => match addresses.len() {
            1 => "1 address".to_owned(),
            many => format!("{many} addresses"),
        },
        (ChannelKind::Record, None) => "nobody: it is kept in the store".to_owned(),
        (_, None) => "whoever reads there".to_owned(),
    }
}
