//! Phone numbers, by the metadata of libphonenumber.

use cel::{
    DeclarationError, Env,
    common::types::{CelBool, CelString},
};
use phonenumber::{Mode, PhoneNumber, country};

use super::{super::bounded, TextResult, no_sense};

/// The longest that anybody writes, with spaces, brackets and an extension.
const BYTES_MAX: usize = 40;

/// The library tries a dozen patterns.
const EFFORT: u64 = 100_000;

pub(super) fn extension(env: &mut Env) -> Result<(), DeclarationError> {
    cel::add_overload!(env, fn phone: (CelString, CelString) -> Result<CelString>)?;
    cel::add_member_overload!(env, fn phone: (CelString, CelString) -> Result<CelString>)?;
    cel::add_overload!(env, fn is_phone: (CelString, CelString) -> Result<CelBool>,
        name = "is_phone")?;
    cel::add_member_overload!(env, fn is_phone: (CelString, CelString) -> Result<CelBool>,
        name = "is_phone")
}

/// The number in E.164, as it is dialled from everywhere; `region` is where it is dialled as it is
/// written.
fn phone(text: &CelString<'_>, region: &CelString<'_>) -> TextResult {
    bounded::charge(EFFORT)?;
    let region = region_of(region).ok_or_else(|| no_sense("phone", "country code"))?;
    let number = number(text, region).ok_or_else(|| no_sense("phone", "phone number"))?;
    Ok(number.format().mode(Mode::E164).to_string().into())
}

fn is_phone(text: &CelString<'_>, region: &CelString<'_>) -> Result<CelBool, cel::ExecutionError> {
    bounded::charge(EFFORT)?;
    let region = region_of(region).ok_or_else(|| no_sense("is_phone", "country code"))?;
    Ok(number(text, region).is_some().into())
}

fn region_of(region: &str) -> Option<country::Id> {
    let plain = region.len() == 2 && region.bytes().all(|b| b.is_ascii_alphabetic());
    if !plain {
        return None;
    }
    region.to_ascii_uppercase().parse().ok()
}

/// The number, if there can be one like that.
///
/// The library is given digits only: what people put between them means nothing, and what else they
/// write (letters, extensions) cannot be dialled in one go.
fn number(text: &str, region: country::Id) -> Option<PhoneNumber> {
    let text = text.trim();
    if text.len() > BYTES_MAX {
        return None;
    }
    let mut digits = String::with_capacity(text.len());
    for (at, letter) in text.char_indices() {
        match letter {
            '0'..='9' => digits.push(letter),
            '+' if at == 0 => digits.push(letter),
            ' ' | '\u{a0}' | '-' | '\u{2010}'..='\u{2013}' | '(' | ')' | '.' | '/' => {}
            _ => return None,
        }
    }
    // +44 (0)20: the zero is for those who dial within the country.
    if digits.starts_with('+') && text.contains("(0)") {
        let bracket = text.find("(0)")?;
        let before = text[..bracket].bytes().filter(|b| b.is_ascii_digit() || *b == b'+').count();
        digits.remove(before);
    }
    let number = phonenumber::parse(Some(region), &digits).ok()?;
    number.is_valid().then_some(number)
}

/// Reads the metadata, so that the first number of all takes no longer than the others.
pub(in crate::expression) fn prepare_phones() {
    let _ = number("+44 20 7946 0018", country::Id::GB);
}

/// Why a written region is none.
pub(super) fn region_fault(region: &str) -> Option<String> {
    let message = || format!("`{region}` is no country code of two letters, such as `GB`");
    region_of(region).is_none().then(message)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn e164(text: &str, region: &str) -> Option<String> {
        phone(&text.into(), &region.into()).ok().map(CelString::into_inner)
    }

    #[test]
    fn numbers_are_dialled_from_everywhere() {
        for (text, region, number) in [
            ("020 7946 0018", "GB", "+442079460018"),
            ("(020) 7946-0018", "gb", "+442079460018"),
            ("+44 20 7946 0018", "US", "+442079460018"),
            ("+44 (0)20 7946 0018", "DE", "+442079460018"),
            ("0044 20 7946 0018", "DE", "+442079460018"),
            ("030/1234567", "DE", "+49301234567"),
            ("212-736-5000", "US", "+12127365000"),
            ("06 12 34 56 78", "FR", "+33612345678"),
            ("02 1234 5678", "IT", "+390212345678"),
        ] {
            assert_eq!(e164(text, region).as_deref(), Some(number), "{text}");
        }
    }

    #[test]
    fn what_cannot_be_dialled_is_no_number() {
        for text in [
            "",
            "+",
            "12",
            "abc",
            "+44",
            "1-800-FLOWERS",
            "+999 123456",
            "020 7946 0018 ext 5",
            &"1".repeat(41),
        ] {
            assert_eq!(e164(text, "GB"), None, "{text}");
        }
        assert!(phone(&"020 7946 0018".into(), &"UK".into()).is_err());
        assert!(region_fault("England").is_some() && region_fault("GB").is_none());
    }

    proptest! {
        #[test]
        fn nothing_makes_it_panic(text in "[+0-9() ./-]{0,42}|.{0,42}", region in "[A-Z]{2}") {
            if let Some(number) = e164(&text, &region) {
                // Dialled from everywhere means from there too.
                prop_assert_eq!(e164(&number, "GB"), Some(number.clone()));
            }
        }
    }
}
