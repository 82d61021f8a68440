//! Names and other text that people typed.

use cel::{DeclarationError, Env, common::types::CelString};

use super::{super::bounded, TextResult, of_text};

pub(super) fn extension(env: &mut Env) -> Result<(), DeclarationError> {
    of_text!(env, "title_case", title_case -> Result<CelString>);
    of_text!(env, "collapse_spaces", collapse_spaces -> Result<CelString>);
    Ok(())
}

/// Takes this many times as long as reading the text.
const EFFORT: u64 = 20;

/// One space between words, and none around them.
fn collapse_spaces(text: &CelString<'_>) -> TextResult {
    bounded::charge(EFFORT * bounded::length(text))?;
    let mut collapsed = String::with_capacity(text.len());
    for word in text.split_whitespace() {
        if !collapsed.is_empty() {
            collapsed.push(' ');
        }
        collapsed.push_str(word);
    }
    Ok(collapsed.into())
}

fn title_case(text: &CelString<'_>) -> TextResult {
    bounded::charge(EFFORT * bounded::length(text))?;
    Ok(title(text).into())
}

/// Words within a name that stay small, in the languages that have them. `di`, `do`, `le` and the
/// like are as often names or syllables of their own, and there a capital is the lesser mistake.
const PARTICLES: [&str; 21] = [
    "af", "al", "av", "bin", "bint", "da", "das", "de", "del", "della", "den", "der", "dos", "du",
    "ibn", "ten", "ter", "van", "von", "y", "zu",
];

/// Writes a name as names are written.
///
/// Who mixes large and small letters knows how his name is written, so such a word stays as it is:
/// McDonald, DeVito, Van Damme. A word in one case only gets a capital for each of its parts,
/// between hyphens and after `O'`, `D'` and `Mc`. Particles are small, except at the beginning.
fn title(text: &str) -> String {
    let mut title = String::with_capacity(text.len());
    let mut first = true;
    for piece in text.split_inclusive(char::is_whitespace) {
        let word = piece.trim_end_matches(char::is_whitespace);
        if !word.is_empty() {
            let small = word.to_lowercase();
            if word.contains(char::is_lowercase) && word.contains(char::is_uppercase) {
                title.push_str(word);
            } else if !first && PARTICLES.contains(&small.as_str()) {
                title.push_str(&small);
            } else {
                capitalise(&small, &mut title);
            }
            first = false;
        }
        title.push_str(&piece[word.len()..]);
    }
    title
}

/// Capitalises each part of a word in small letters.
fn capitalise(word: &str, out: &mut String) {
    let mut wants_capital = true;
    let mut part = 0; // where the part begins
    let mut letters = 0; // of the part, so far
    for (at, letter) in word.char_indices() {
        match letter {
            '-' | '\u{2010}' | '\u{2011}' | '.' | '/' | '&' | '(' => {
                wants_capital = true;
                (part, letters) = (at + letter.len_utf8(), 0);
                out.push(letter);
            }
            // O'Brien and D'Angelo, but not Noor's; and 's-Gravenhage stays small.
            '\'' | '\u{2019}' => {
                wants_capital = letters == 1;
                (part, letters) = (at + letter.len_utf8(), 0);
                out.push(letter);
            }
            _ if letter.is_lowercase() && (wants_capital || &word[part..at] == "mc") => {
                let before = out.len();
                push_capital(letter, out);
                wants_capital = false;
                // Some capitals are two letters.
                letters += out[before..].chars().filter(|it| it.is_alphabetic()).count();
            }
            _ => {
                out.push(letter);
                letters += usize::from(letter.is_alphabetic());
            }
        }
    }
}

/// Some letters have a capital of two letters, of which the second stays small; and some letters
/// that are two in one have a form for this very place.
fn push_capital(letter: char, out: &mut String) {
    let own = match letter {
        '\u{1c4}'..='\u{1c6}' => '\u{1c5}',
        '\u{1c7}'..='\u{1c9}' => '\u{1c8}',
        '\u{1ca}'..='\u{1cc}' => '\u{1cb}',
        '\u{1f1}'..='\u{1f3}' => '\u{1f2}',
        _ => {
            let mut capitals = letter.to_uppercase();
            if let Some(mut capital) = capitals.next() {
                // The first of them need not be a letter: \u{149} is an apostrophe and an n.
                while !capital.is_uppercase() {
                    out.push(capital);
                    let Some(next) = capitals.next() else { return };
                    capital = next;
                }
                out.push(capital);
            }
            return out.extend(capitals.flat_map(char::to_lowercase));
        }
    };
    out.push(own);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn names_are_written_as_names_are() {
        for (typed, written) in [
            ("ada lovelace", "Ada Lovelace"),
            ("ADA LOVELACE", "Ada Lovelace"),
            ("ludwig van beethoven", "Ludwig van Beethoven"),
            ("URSULA VON DER LEYEN", "Ursula von der Leyen"),
            ("van der berg", "Van der Berg"),
            ("Jean-Claude Van Damme", "Jean-Claude Van Damme"),
            ("jean-claude", "Jean-Claude"),
            ("o'brien", "O'Brien"),
            ("\u{149}'a", "\u{2bc}N'a"),
            ("O\u{2019}BRIEN", "O\u{2019}Brien"),
            ("d'angelo", "D'Angelo"),
            ("noor's", "Noor's"),
            ("'s-GRAVENHAGE", "'s-GRAVENHAGE"),
            ("'S-GRAVENHAGE", "'s-Gravenhage"),
            ("McDonald", "McDonald"),
            ("MCDONALD", "McDonald"),
            ("mack", "Mack"),
            ("DeVito", "DeVito"),
            ("j.r.r. tolkien", "J.R.R. Tolkien"),
            ("élodie", "Élodie"),
            ("e\u{301}lodie", "E\u{301}lodie"),
            ("GROSSMANN großmann", "Grossmann Großmann"),
            ("\u{1c6}akula \u{1c4}AKULA", "\u{1c5}akula \u{1c5}akula"),
            ("ΟΔΥΣΣΕΥΣ", "Οδυσσευς"),
            ("  two  spaces ", "  Two  Spaces "),
            ("山田 太郎", "山田 太郎"),
            ("", ""),
        ] {
            assert_eq!(title(typed), written, "{typed}");
        }
    }

    #[test]
    fn spaces_are_collapsed_of_whatever_kind_they_are() {
        let collapsed = collapse_spaces(&" \u{a0}Ada \t\n Love\u{2003}lace ".into()).unwrap();
        assert_eq!(collapsed.inner(), "Ada Love lace");
    }

    proptest! {
        #[test]
        fn what_is_written_right_stays_so(text in any::<String>()) {
            let once = title(&text);
            prop_assert_eq!(title(&once), once);
        }

        #[test]
        fn names_stay_what_they_are(text in "[a-zA-ZäöüÄÖÜéÉñçøåŁłő'’ .-]{0,40}") {
            let once = title(&text);
            prop_assert_eq!(title(&once), once.clone());
            prop_assert_eq!(once.to_lowercase(), text.to_lowercase());
        }

        #[test]
        fn collapsed_stays_collapsed(text in "[ \\t\\na-c]{0,30}") {
            let once = collapse_spaces(&text.as_str().into()).unwrap();
            prop_assert_eq!(collapse_spaces(&once).unwrap(), once.clone());
            prop_assert!(!once.contains("  ") && once.trim() == once.inner());
        }
    }
}
