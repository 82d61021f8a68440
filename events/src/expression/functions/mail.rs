//! Parts of e-mail addresses, and domains.

use std::borrow::Cow;

use cel::{
    DeclarationError, Env, ExecutionError,
    common::{
        types::{CelBool, CelString, LIST_TYPE, STRING_TYPE},
        value::{CowVal, Val},
    },
};

use super::{TextResult, no_sense, of_text};

/// RFC 5321, 4.5.3.1.
const LOCAL_BYTES_MAX: usize = 64;
const ADDRESS_BYTES_MAX: usize = 254;

pub(super) fn extension(env: &mut Env) -> Result<(), DeclarationError> {
    of_text!(env, "is_email", is_email -> CelBool);
    of_text!(env, "email_local", email_local -> Result<CelString>);
    of_text!(env, "email_domain", email_domain -> Result<CelString>);
    of_text!(env, "email_canonical", email_canonical -> Result<CelString>);
    for (id, domains) in [("in_domain_text", STRING_TYPE), ("in_domain_list", LIST_TYPE)] {
        let types = vec![STRING_TYPE, domains.to_owned()];
        env.add_overload("in_domain", id, types, in_domain)?;
        env.add_member_overload(
            "in_domain",
            &format!("{id}_of"),
            STRING_TYPE,
            vec![domains],
            in_domain,
        )?;
    }
    Ok(())
}

/// An address in its two parts, as they are written.
fn parts(address: &str) -> Option<(&str, &str)> {
    let address = address.trim();
    if address.len() > ADDRESS_BYTES_MAX {
        return None;
    }
    address.rsplit_once('@')
}

fn is_email(address: &CelString<'_>) -> CelBool {
    parts(address)
        .is_some_and(|(local, name)| {
            is_local(local) && domain(name).is_some_and(|it| it.contains('.'))
        })
        .into()
}

/// As people have it. Quoted ones exist on paper only, and comments not even there.
fn is_local(local: &str) -> bool {
    let part = |part: &str| {
        !part.is_empty()
            && part.chars().all(|c| {
                c.is_ascii_alphanumeric()
                    || "!#$%&'*+-/=?^_`{|}~".contains(c)
                    || (!c.is_ascii() && c.is_alphanumeric())
            })
    };
    local.len() <= LOCAL_BYTES_MAX && local.split('.').all(part)
}

/// A domain as it is compared: lower case, in ASCII; none where it cannot be one.
fn domain(name: &str) -> Option<Cow<'_, str>> {
    let name = name.trim();
    let name = name.strip_suffix('.').unwrap_or(name);
    if name.len() > ADDRESS_BYTES_MAX {
        return None;
    }
    let plain = name
        .bytes()
        .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'.');
    let ascii = if plain && !name.contains("xn--") {
        Cow::Borrowed(name)
    } else {
        idna::domain_to_ascii_cow(name.as_bytes(), idna::AsciiDenyList::STD3).ok()?
    };
    let label =
        |it: &str| (1..=63).contains(&it.len()) && !it.starts_with('-') && !it.ends_with('-');
    (ascii.len() <= 253 && ascii.split('.').all(label)).then_some(ascii)
}

fn email_local(address: &CelString<'_>) -> TextResult {
    match parts(address) {
        Some((local, _)) if !local.is_empty() => Ok(local.to_owned().into()),
        _ => Err(no_sense("email_local", "e-mail address")),
    }
}

fn email_domain(address: &CelString<'_>) -> TextResult {
    parts(address)
        .and_then(|(_, name)| domain(name))
        .map(|domain| domain.into_owned().into())
        .ok_or_else(|| no_sense("email_domain", "e-mail address"))
}

/// The address that stands for all its spellings: lower case, without what follows a `+`, and as
/// Gmail reads its own. To recognise a person by, not to write to.
fn email_canonical(address: &CelString<'_>) -> TextResult {
    let canonical = || {
        let (local, name) = parts(address)?;
        let local = local.split('+').next().filter(|it| !it.is_empty())?.to_lowercase();
        Some(match domain(name)?.as_ref() {
            "gmail.com" | "googlemail.com" => format!("{}@gmail.com", local.replace('.', "")),
            domain => format!("{local}@{domain}"),
        })
    };
    canonical().map(CelString::from).ok_or_else(|| no_sense("email_canonical", "e-mail address"))
}

/// Whether an address or a domain is in a domain, or in one of several: it or one below it.
fn in_domain<'b, 'v>(args: Vec<CowVal<'b, 'v>>) -> Result<CowVal<'b, 'v>, ExecutionError> {
    let [of, domains] = args.as_slice() else {
        return Err(ExecutionError::invalid_argument_count(2, args.len()));
    };
    let of = text(of.as_ref())?.inner();
    let of = parts(of).map_or(of, |(_, name)| name);
    let Some(of) = domain(of) else {
        return Ok(CowVal::owned(CelBool::from(false)));
    };
    let is_in = |wanted: &dyn Val| -> Result<bool, ExecutionError> {
        let wanted = text(wanted)?.inner();
        let wanted = domain(wanted).ok_or_else(|| no_sense("in_domain", "domain"))?;
        Ok(of.strip_suffix(wanted.as_ref()).is_some_and(|it| it.is_empty() || it.ends_with('.')))
    };
    let Some(list) = domains.as_iterable() else {
        return is_in(domains.as_ref()).map(|it| CowVal::owned(CelBool::from(it)));
    };
    let mut domains = list.iter();
    while let Some(wanted) = domains.next() {
        if is_in(wanted)? {
            return Ok(CowVal::owned(CelBool::from(true)));
        }
    }
    Ok(CowVal::owned(CelBool::from(false)))
}

pub(super) fn text<'b, 'v>(value: &'b (dyn Val + 'v)) -> Result<&'b CelString<'v>, ExecutionError> {
    value.downcast_ref::<CelString<'v>>().ok_or_else(|| ExecutionError::UnexpectedType {
        got: value.get_type().name().to_owned(),
        want: "string".into(),
    })
}

/// Why a written domain cannot be one.
pub(super) fn domain_fault(name: &str) -> Option<String> {
    domain(name).is_none().then(|| format!("`{name}` is no domain"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn addresses_are_told_from_what_only_looks_like_one() {
        for good in [
            "ada@example.com",
            " Ada.Lovelace+vestibule@mail.example.co.uk ",
            "o'brien@example.com",
            "jörg@bücher.example",
            "a@xn--bcher-kva.example",
        ] {
            assert!(*is_email(&good.into()).inner(), "{good}");
        }
        let long = format!("{}@example.com", "a".repeat(65));
        for bad in [
            "",
            "@",
            "ada",
            "ada@",
            "@example.com",
            "ada@example",
            "ada@@example.com",
            "a b@example.com",
            ".ada@example.com",
            "ada.@example.com",
            "a..b@example.com",
            "ada@exa mple.com",
            "ada@-example.com",
            "ada@example..com",
            "\"ada\"@example.com",
            "ada@[192.0.2.1]",
            &long,
        ] {
            assert!(!*is_email(&bad.into()).inner(), "{bad}");
        }
    }

    #[test]
    fn spellings_of_one_address_are_one() {
        for (spelling, canonical) in [
            ("Ada@Example.COM", "ada@example.com"),
            ("ada+news@example.com", "ada@example.com"),
            ("A.D.A+x@googlemail.com", "ada@gmail.com"),
            ("a.d.a@example.com", "a.d.a@example.com"),
            ("ada@BÜCHER.example", "ada@xn--bcher-kva.example"),
        ] {
            assert_eq!(email_canonical(&spelling.into()).unwrap().inner(), canonical);
        }
        assert!(email_canonical(&"+ada@example.com".into()).is_err());
    }

    fn is_in(of: &str, domain: &str) -> bool {
        let text = |text: &str| CowVal::owned(CelString::from(text.to_owned()));
        let is_in = in_domain(vec![text(of), text(domain)]).unwrap();
        *is_in.downcast_ref::<CelBool>().unwrap().inner()
    }

    #[test]
    fn a_domain_holds_itself_and_what_is_below_it() {
        for of in [
            "example.com",
            "Example.COM",
            "a.example.com",
            "ada@example.com",
            "ada@a.b.example.com",
            "example.com.",
        ] {
            assert!(is_in(of, "example.com"), "{of}");
        }
        for of in [
            "notexample.com",
            "ada@notexample.com",
            "example.com.evil.test",
            "com",
            "",
            "ada@",
            "@@",
        ] {
            assert!(!is_in(of, "example.com"), "{of}");
        }
        assert!(is_in("ada@bücher.example", "xn--bcher-kva.example"));
    }

    proptest! {
        #[test]
        fn nothing_makes_them_panic(text in any::<String>(), other in any::<String>()) {
            let text = CelString::from(text);
            let _ = (email_local(&text), email_domain(&text), is_email(&text));
            let _ = in_domain(vec![CowVal::owned(text.clone()), CowVal::owned(CelString::from(other))]);
            // What stands for all spellings is itself one of them.
            if let Ok(canonical) = email_canonical(&text) {
                prop_assert_eq!(email_canonical(&canonical).unwrap(), canonical);
            }
        }

        #[test]
        fn below_is_in_and_beside_is_not(
            labels in "[a-z0-9]{1,5}(\\.[a-z0-9]{1,5}){1,3}", below in "[a-z0-9]{1,5}",
        ) {
            let beside = format!("{below}{labels}");
            prop_assert!(is_in(&labels, &labels));
            let below = format!("{below}.{labels}");
            prop_assert!(is_in(&below, &labels));
            prop_assert!(!is_in(&labels, &below));
            prop_assert!(!is_in(&beside, &labels));
        }
    }
}
