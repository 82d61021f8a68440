//! Countries, by ISO 3166-1.

use std::{collections::HashMap, sync::LazyLock};

use cel::{DeclarationError, Env, common::types::CelString};
use celes::{Country, LookupTable};

use super::{TextResult, no_sense, of_text};

/// No country has a longer name.
const BYTES_MAX: usize = 100;

pub(super) fn extension(env: &mut Env) -> Result<(), DeclarationError> {
    of_text!(env, "country_code", country_code -> Result<CelString>);
    of_text!(env, "country_name", country_name -> Result<CelString>);
    Ok(())
}

/// The code of two letters, of a name in English or of another code.
fn country_code(text: &CelString<'_>) -> TextResult {
    let country = country(text).ok_or_else(|| no_sense("country_code", "country"))?;
    Ok(country.alpha2.into())
}

/// The name in English, of a code or of another name.
fn country_name(text: &CelString<'_>) -> TextResult {
    let country = country(text).ok_or_else(|| no_sense("country_name", "country"))?;
    Ok(name(country).into())
}

fn country(text: &str) -> Option<&'static Country> {
    /// By everything that somebody may call them.
    static COUNTRIES: LazyLock<HashMap<String, Country>> = LazyLock::new(|| {
        let all = Country::get_countries();
        let mut countries = HashMap::new();
        // A name that is another's nickname is its own first.
        for country in all {
            for call in [country.alpha2, country.alpha3, country.code, country.long_name] {
                countries.insert(key(call), country);
            }
        }
        for country in all {
            for alias in country.aliases.iter() {
                countries.entry(key(alias)).or_insert(country);
            }
        }
        countries
    });
    if text.len() > BYTES_MAX { None } else { COUNTRIES.get(&key(text)) }
}

/// What is left of a name when nobody cares about its spelling: small letters and digits, without
/// accents, and without "the" and "and", unless that is all there is: AND is a code.
fn key(name: &str) -> String {
    let words = || name.split(|c: char| !c.is_alphanumeric() && c != '\'' && c != '\u{2019}');
    let several = words().filter(|word| !word.is_empty()).nth(1).is_some();
    let mut key = String::with_capacity(name.len());
    for word in words() {
        let word = word.to_lowercase();
        if several && (word == "the" || word == "and") {
            continue;
        }
        key.extend(word.chars().filter_map(|letter| match letter {
            'à'..='å' => Some('a'),
            'ç' => Some('c'),
            'è'..='ë' => Some('e'),
            'ì'..='ï' => Some('i'),
            'ò'..='ö' => Some('o'),
            'ù'..='ü' => Some('u'),
            _ => letter.is_alphanumeric().then_some(letter),
        }));
    }
    key
}

/// The library writes every word large, and an article before some.
fn name(country: &Country) -> String {
    let words = country.long_name.strip_prefix("The ").unwrap_or(country.long_name);
    let small = |word: &str| matches!(word, "Of" | "And" | "The" | "Da");
    let mut name = String::with_capacity(words.len());
    for word in words.split(' ') {
        if !name.is_empty() {
            name.push(' ');
        }
        let is_small = small(word) && !name.is_empty();
        name.push_str(&if is_small { word.to_lowercase() } else { word.to_owned() });
    }
    name
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn code(text: &str) -> Option<String> {
        country_code(&text.into()).ok().map(CelString::into_inner)
    }

    #[test]
    fn a_country_is_known_by_name_and_code() {
        for (text, expected) in [
            ("GB", "GB"),
            ("gbr", "GB"),
            ("826", "GB"),
            ("United Kingdom", "GB"),
            ("the united kingdom", "GB"),
            ("Germany", "DE"),
            ("USA", "US"),
            ("United States", "US"),
            ("United States of America", "US"),
            ("Türkiye", "TR"),
            ("Turkey", "TR"),
            ("Côte d'Ivoire", "CI"),
            ("South Korea", "KR"),
            ("Samoa", "WS"),
            ("Trinidad & Tobago", "TT"),
            ("Netherlands", "NL"),
            ("Russia", "RU"),
            ("AND", "AD"),
            ("Vietnam", "VN"),
        ] {
            assert_eq!(code(text).as_deref(), Some(expected), "{text}");
        }
        for text in ["", "XX", "Atlantis", "the", "and the", &"a".repeat(101)] {
            assert_eq!(code(text), None, "{text}");
        }
    }

    #[test]
    fn every_country_has_a_name_that_leads_back_to_it() {
        for country in Country::get_countries() {
            assert_eq!(code(country.alpha2).as_deref(), Some(country.alpha2));
            assert_eq!(code(country.alpha3).as_deref(), Some(country.alpha2));
            assert_eq!(code(&name(&country)).as_deref(), Some(country.alpha2), "{country:?}");
        }
        let named = |code: &str| country_name(&code.into()).unwrap().into_inner();
        assert_eq!(named("US"), "United States of America");
        assert_eq!(named("France"), "France");
    }

    proptest! {
        #[test]
        fn nothing_makes_it_panic(text in any::<String>()) {
            let _ = code(&text);
        }
    }
}
