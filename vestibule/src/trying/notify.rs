//! What the channels of the worker `notify` would say of a call that was tried.

use std::fmt::Write as _;

use anyhow::Context;
use serde_json::{Value, json};
use vestibule_events::SignUpEvent;
use vestibule_workers::{Notify, Preview, PreviewText};

use crate::config::{ChannelConfig, Config, EffectConfig};

/// The messages about an event, or why there are none.
pub(super) fn messages(
    config: &Config,
    event: Option<&SignUpEvent>,
) -> anyhow::Result<Result<Vec<Preview>, &'static str>> {
    let worker = config.workers.iter().find_map(|worker| match &worker.effect {
        EffectConfig::Notify(channels) => Some((worker, channels)),
        _ => None,
    });
    let Some((worker, channels)) = worker else {
        return Ok(Err("the configuration has no [workers.notify] that is enabled"));
    };
    let Some(event) = event else { return Ok(Err("this call makes no event to tell of")) };
    if !worker.settings.filter.matches(event) {
        return Ok(Err("the worker `notify` does not take this event; see its `kinds`"));
    }
    let settings = ChannelConfig::without_secrets(channels, &config.approvals);
    let previews = Notify::preview(&settings, event).ok();
    Ok(Ok(previews.context("a template was fine when the file was read, and is not any more")?))
}

pub(super) fn in_json(messages: &Result<Vec<Preview>, &'static str>) -> Value {
    let text = |it: &PreviewText| match &it.message {
        Ok((subject, body)) => json!({
            "language": it.language,
            "chosen": it.is_chosen,
            "subject": subject,
            "body": body,
        }),
        Err(error) => json!({ "language": it.language, "chosen": it.is_chosen, "error": error }),
    };
    let one = |it: &Preview| {
        json!({
            "channel": it.channel,
            "kind": it.kind,
            "to": it.to,
            "texts": it.texts.iter().map(text).collect::<Vec<_>>(),
        })
    };
    json!(messages.as_deref().unwrap_or_default().iter().map(one).collect::<Vec<_>>())
}

pub(super) fn in_words(
    messages: &Result<Vec<Preview>, &'static str>,
    text: &mut String,
) -> std::fmt::Result {
    let previews = match messages {
        Ok(previews) => previews,
        Err(why) => return writeln!(text, "\nno notification: {why}"),
    };
    if previews.is_empty() {
        return writeln!(text, "\nno notification: no channel wants this event");
    }
    for Preview { channel, kind, to, texts } in previews {
        writeln!(text, "\nnotification  {channel} ({kind}), to {to}")?;
        for PreviewText { language, is_chosen, message } in texts {
            let chosen = if *is_chosen { ", as this sign-up asks for" } else { "" };
            writeln!(text, "  {language}{chosen}")?;
            match message {
                Ok((subject, body)) => {
                    for line in std::iter::once(subject.as_str()).chain(body.lines()) {
                        writeln!(text, "    {line}")?;
                    }
                }
                Err(error) => writeln!(text, "    {error}")?,
            }
        }
    }
    Ok(())
}
