//! Which of several languages somebody is addressed in.
//!
//! Chosen as RFC 4647 looks one up: each wanted tag in turn, made shorter from its end.

/// So many wanted languages are looked at; what is sent beyond that changes nothing.
const WANTED_MAX: usize = 16;

/// What `find` has for the first of the wanted languages that it has anything for.
///
/// `wanted` is a sign-up's `locale`: tags, separated by spaces or commas. `find` is asked with tags
/// as [`normal_language`] writes them.
pub fn for_languages<T>(wanted: Option<&str>, find: impl Fn(&str) -> Option<T>) -> Option<T> {
    let tags = wanted.into_iter().flat_map(|it| it.split([' ', ',']));
    for tag in tags.filter(|tag| !tag.is_empty()).take(WANTED_MAX) {
        // Browsers weigh their languages: `de;q=0.8`.
        let tag = normal_language(tag.split(';').next().unwrap_or_default());
        let mut range = tag.as_str();
        loop {
            if let Some(found) = find(range) {
                return Some(found);
            }
            match range.rfind('-') {
                Some(end) => range = &range[..end],
                None => break,
            }
        }
    }
    None
}

/// A language's tag in the one way that tags are compared in: they have no case, and some platforms
/// write an underscore.
#[must_use]
pub fn normal_language(tag: &str) -> String {
    tag.trim().replace('_', "-").to_ascii_lowercase()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_wanted_language_that_there_is_wins_by_its_longest_beginning() {
        let found = |wanted| {
            for_languages(wanted, |tag| ["en", "de", "pt-br"].into_iter().find(|it| *it == tag))
        };
        for (wanted, language) in [
            (None, None),
            (Some(""), None),
            (Some("-"), None),
            (Some("fr"), None),
            (Some("pt"), None),
            (Some("de-CH-1996"), Some("de")),
            (Some("DE_at"), Some("de")),
            (Some("fr,de;q=0.8"), Some("de")),
            (Some("en-GB de"), Some("en")),
            (Some("pt-BR"), Some("pt-br")),
        ] {
            assert_eq!(found(wanted), language, "{wanted:?}");
        }
    }

    #[test]
    fn a_long_list_ends_somewhere() {
        let wanted = format!("{}de", "xx ".repeat(WANTED_MAX));
        assert_eq!(for_languages(Some(&wanted), |tag| (tag == "de").then_some(())), None);
    }
}
