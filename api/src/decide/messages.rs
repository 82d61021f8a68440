//! What people are told, in their own language.
//!
//! A text in the configuration is either what it says or, written `message:KEY`, the message of that
//! key in the language that the person reads; where none of theirs is there, in the default one.

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    sync::Arc,
};

use vestibule_events::{for_languages, normal_language};

/// Begins a text that stands for a message.
const PREFIX: &str = "message:";

/// The messages of an installation in all their languages. The default has none.
#[derive(Clone, Debug, Default)]
pub struct Messages {
    by_key: HashMap<String, Text>,
    /// Whether every key passes for one, because the files could not be read.
    unreadable: bool,
    /// What other languages lack of the default one's keys.
    gaps: Vec<MessageGap>,
}

/// A language that lacks a message; the default language's is shown instead.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MessageGap {
    pub language: String,
    pub key: String,
}

impl fmt::Display for MessageGap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { language, key } = self;
        write!(f, "the language {language} lacks the message `{key}`; the default one's is shown")
    }
}

/// Why messages cannot be used, or a text cannot be found among them.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MessageError {
    #[error("there are no messages in the default language `{0}`")]
    NoDefault(String),
    #[error("the language {language} has a message `{key}` that the default language lacks")]
    OnlyThere { language: String, key: String },
    #[error("there is no message `{0}`")]
    Unknown(String),
}

impl Messages {
    /// Stands for messages with a mistake, which has been told: so that it is not followed by one
    /// for each rule that names a message.
    #[must_use]
    pub fn unreadable() -> Self {
        Self { unreadable: true, ..Self::default() }
    }

    /// `languages`: BCP 47 tag, then key, then text. Every key has to be there in the default
    /// language, so that there is always something to show.
    pub fn new(
        default: &str,
        languages: &BTreeMap<String, BTreeMap<String, String>>,
    ) -> Result<Self, Vec<MessageError>> {
        let named = |tag: &str| languages.iter().find(|(it, _)| it.eq_ignore_ascii_case(tag));
        let Some((default, texts)) = named(default) else {
            return Err(vec![MessageError::NoDefault(default.to_owned())]);
        };
        let others = || languages.iter().filter(|(tag, _)| *tag != default);
        let errors: Vec<_> = others()
            .flat_map(|(language, texts)| texts.keys().map(move |key| (language, key)))
            .filter(|(_, key)| !texts.contains_key(*key))
            .map(|(language, key)| MessageError::OnlyThere {
                language: language.clone(),
                key: key.clone(),
            })
            .collect();
        if !errors.is_empty() {
            return Err(errors);
        }
        let mut gaps = Vec::new();
        let mut by_key = HashMap::new();
        for (key, text) in texts {
            let mut translations = Vec::new();
            for (language, texts) in others() {
                match texts.get(key) {
                    Some(text) => translations.push((normal_language(language), text.clone())),
                    None => gaps.push(MessageGap { language: language.clone(), key: key.clone() }),
                }
            }
            let default = (normal_language(default), text.clone());
            by_key.insert(key.clone(), Text(Arc::new(Translations { default, translations })));
        }
        Ok(Self { by_key, unreadable: false, gaps })
    }

    /// What a configured text stands for.
    pub fn text(&self, written: &str) -> Result<Text, MessageError> {
        match written.strip_prefix(PREFIX) {
            None => Ok(Text::plain(written)),
            Some(_) if self.unreadable => Ok(Text::plain(written)),
            Some(key) => self
                .by_key
                .get(key.trim())
                .cloned()
                .ok_or_else(|| MessageError::Unknown(key.trim().to_owned())),
        }
    }

    #[must_use]
    pub fn gaps(&self) -> &[MessageGap] {
        &self.gaps
    }
}

/// A text in one or more languages; cheap to clone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Text(Arc<Translations>);

#[derive(Debug, PartialEq, Eq)]
struct Translations {
    /// Language and text; the language is empty where the text has only one.
    default: (String, String),
    translations: Vec<(String, String)>,
}

impl Text {
    /// The same in every language.
    #[must_use]
    pub fn plain(text: impl Into<String>) -> Self {
        Self(Arc::new(Translations {
            default: (String::new(), text.into()),
            translations: Vec::new(),
        }))
    }

    /// In the first of the wanted languages that there is; `wanted` is a sign-up's `locale`: tags,
    /// separated by spaces or commas.
    #[must_use]
    pub fn for_locale(&self, wanted: Option<&str>) -> &str {
        let Translations { default, translations } = &*self.0;
        let find = |tag: &str| {
            let mut all = std::iter::once(default).chain(translations);
            all.find(|(language, _)| language == tag)
        };
        let found = if translations.is_empty() { None } else { for_languages(wanted, find) };
        &found.unwrap_or(default).1
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn languages(of: &[(&str, &[(&str, &str)])]) -> BTreeMap<String, BTreeMap<String, String>> {
        let texts = |texts: &[(&str, &str)]| {
            texts.iter().map(|(key, text)| ((*key).to_owned(), (*text).to_owned())).collect()
        };
        of.iter().map(|(tag, of)| ((*tag).to_owned(), texts(of))).collect()
    }

    fn messages() -> Messages {
        let languages = languages(&[
            ("en", &[("no", "No."), ("why", "Why?")]),
            ("de", &[("no", "Nein."), ("why", "Warum?")]),
            ("pt-BR", &[("no", "Não.")]),
        ]);
        Messages::new("EN", &languages).unwrap()
    }

    #[test]
    fn a_language_is_found_by_the_longest_beginning_of_a_wanted_tag() {
        let no = messages().text("message:no").unwrap();
        for (wanted, text) in [
            (None, "No."),
            (Some(""), "No."),
            (Some("de"), "Nein."),
            (Some("de-CH-1996"), "Nein."),
            (Some("DE_at"), "Nein."),
            (Some("fr de en"), "Nein."),
            (Some("fr,de;q=0.8"), "Nein."),
            (Some("en-GB de"), "No."),
            (Some("pt-br"), "Não."),
            (Some("pt"), "No."),
            (Some("d"), "No."),
            (Some("-"), "No."),
        ] {
            assert_eq!(no.for_locale(wanted), text, "{wanted:?}");
        }
    }

    #[test]
    fn what_a_language_lacks_is_said_in_the_default_one() {
        let messages = messages();
        assert_eq!(messages.text("message:why").unwrap().for_locale(Some("pt-BR")), "Why?");
        let gap = MessageGap { language: "pt-BR".into(), key: "why".into() };
        assert_eq!(messages.gaps(), [gap]);
    }

    #[test]
    fn a_text_that_names_no_message_is_what_it_says() {
        let plain = Messages::default().text("Not from there.").unwrap();
        assert_eq!(plain.for_locale(Some("de")), "Not from there.");
        let unknown = Messages::default().text("message:nope").unwrap_err();
        assert_eq!(unknown, MessageError::Unknown("nope".into()));
    }

    #[test]
    fn the_default_language_has_every_key() {
        let only_there = languages(&[("en", &[]), ("de", &[("no", "Nein.")])]);
        let error = MessageError::OnlyThere { language: "de".into(), key: "no".into() };
        assert_eq!(Messages::new("en", &only_there).unwrap_err(), [error]);
        let none = Messages::new("fr", &only_there).unwrap_err();
        assert_eq!(none, [MessageError::NoDefault("fr".into())]);
    }

    proptest! {
        #[test]
        fn whatever_is_wanted_there_is_a_text(wanted in ".{0,80}") {
            let text = messages().text("message:no").unwrap();
            prop_assert!(!text.for_locale(Some(&wanted)).is_empty());
        }
    }
}
