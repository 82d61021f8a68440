//! Names of certificates: written by an administrator, or found in a certificate.
//!
//! Both are compared part by part, so that spaces between the parts, ways of quoting and the string
//! type that a certificate authority chose make no difference. The letters of a value do, upper and
//! lower case included.

use std::{collections::BTreeSet, fmt, str::FromStr};

use data_encoding::HEXLOWER_PERMISSIVE;
use x509_cert::{
    attr::AttributeTypeAndValue,
    der::{Encode as _, Tag, Tagged as _},
    name::Name,
};

/// The name of an issuer or a subject.
///
/// Written as in RFC 4514, most particular part first: `CN=caller,O=Contoso\, Ltd,C=DE`. Spaces
/// around the commas and values in double quotes, as several tools print them, are understood too.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DistinguishedName(Vec<Parts>);

/// Attributes that stand side by side (`OU=Sales+CN=J. Smith`), in whatever order.
type Parts = BTreeSet<(String, Value)>;

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Value {
    Text(String),
    /// Of a type that is no string: its encoding.
    Encoded(Vec<u8>),
}

/// Why a text is not a name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    #[error("a name has at least one part, such as CN=caller")]
    Empty,
    #[error("expected a part such as CN=caller and found `{0}`")]
    NotAPart(String),
    #[error(
        "`{0}` is not an attribute of names; there are {KNOWN}, and object identifiers such as \
         2.5.4.3"
    )]
    UnknownAttribute(String),
    #[error("the value of `{0}` ends in the middle of an escape or a quotation, or is not text")]
    BadValue(String),
}

const KNOWN: &str = "CN, SN, SERIALNUMBER, C, L, ST, STREET, O, OU, T, G, DC, UID and E";

/// The first name of each is the one of RFC 4514 or else the usual one; the others are what .NET,
/// OpenSSL and Java write.
const ATTRIBUTES: [(&[&str], &str); 14] = [
    (&["CN"], "2.5.4.3"),
    (&["SN", "SURNAME"], "2.5.4.4"),
    (&["SERIALNUMBER"], "2.5.4.5"),
    (&["C"], "2.5.4.6"),
    (&["L"], "2.5.4.7"),
    (&["ST", "S"], "2.5.4.8"),
    (&["STREET"], "2.5.4.9"),
    (&["O"], "2.5.4.10"),
    (&["OU"], "2.5.4.11"),
    (&["T", "TITLE"], "2.5.4.12"),
    (&["G", "GN", "GIVENNAME"], "2.5.4.42"),
    (&["DC"], "0.9.2342.19200300.100.1.25"),
    (&["UID"], "0.9.2342.19200300.100.1.1"),
    (&["E", "EMAIL", "EMAILADDRESS"], "1.2.840.113549.1.9.1"),
];

impl FromStr for DistinguishedName {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        if text.trim().is_empty() {
            return Err(NameError::Empty);
        }
        let mut parts = split(text, ',')
            .into_iter()
            .map(|part| split(part, '+').into_iter().map(attribute).collect())
            .collect::<Result<Vec<Parts>, _>>()?;
        // In a certificate the most general part is the first.
        parts.reverse();
        Ok(Self(parts))
    }
}

impl From<&Name> for DistinguishedName {
    fn from(name: &Name) -> Self {
        Self(name.iter_rdn().map(|parts| parts.iter().map(found).collect()).collect())
    }
}

impl fmt::Display for DistinguishedName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (place, parts) in self.0.iter().rev().enumerate() {
            for (beside, (oid, value)) in parts.iter().enumerate() {
                let separator = match (place, beside) {
                    (0, 0) => "",
                    (_, 0) => ",",
                    _ => "+",
                };
                let known = ATTRIBUTES.iter().find(|(_, it)| it == oid);
                let attribute = known.map_or(oid.as_str(), |(names, _)| names[0]);
                write!(f, "{separator}{attribute}=")?;
                match value {
                    Value::Text(text) => write_escaped(f, text)?,
                    Value::Encoded(der) => write!(f, "#{}", HEXLOWER_PERMISSIVE.encode(der))?,
                }
            }
        }
        Ok(())
    }
}

fn write_escaped(f: &mut fmt::Formatter<'_>, text: &str) -> fmt::Result {
    let last = text.chars().count().saturating_sub(1);
    for (place, letter) in text.chars().enumerate() {
        match letter {
            '"' | '+' | ',' | ';' | '<' | '>' | '\\' => write!(f, "\\{letter}")?,
            '#' if place == 0 => f.write_str("\\#")?,
            ' ' if place == 0 || place == last => f.write_str("\\ ")?,
            _ if letter.is_control() => {
                let mut bytes = [0; 4];
                for byte in letter.encode_utf8(&mut bytes).bytes() {
                    write!(f, "\\{byte:02x}")?;
                }
            }
            _ => write!(f, "{letter}")?,
        }
    }
    Ok(())
}

/// At each separator that is neither escaped nor quoted.
fn split(text: &str, separator: char) -> Vec<&str> {
    let (mut escaped, mut quoted) = (false, false);
    text.split(|letter| {
        if escaped {
            escaped = false;
            return false;
        }
        match letter {
            '\\' => escaped = true,
            '"' => quoted = !quoted,
            _ => return letter == separator && !quoted,
        }
        false
    })
    .collect()
}

fn attribute(text: &str) -> Result<(String, Value), NameError> {
    let not_a_part = || NameError::NotAPart(text.trim().to_owned());
    let (name, value) = text.split_once('=').ok_or_else(not_a_part)?;
    let name = name.trim();
    if name.is_empty() {
        return Err(not_a_part());
    }
    let oid = oid(name).ok_or_else(|| NameError::UnknownAttribute(name.to_owned()))?;
    let value = value_of(value).ok_or_else(|| NameError::BadValue(name.to_owned()))?;
    Ok((oid, value))
}

fn oid(name: &str) -> Option<String> {
    let known = |names: &[&str]| names.iter().any(|it| it.eq_ignore_ascii_case(name));
    if let Some((_, oid)) = ATTRIBUTES.iter().find(|(names, _)| known(names)) {
        return Some((*oid).to_owned());
    }
    let digits = match name.get(..4) {
        Some(prefix) if prefix.eq_ignore_ascii_case("oid.") => &name[4..],
        _ => name,
    };
    x509_cert::spki::ObjectIdentifier::new(digits).ok().map(|oid| oid.to_string())
}

/// Only the plain space is written around values. Any other kind, such as the one that does not
/// break, is a letter of them.
fn value_of(text: &str) -> Option<Value> {
    let text = text.trim_start_matches(' ');
    let trimmed = text.trim_end_matches(' ');
    if let Some(hex) = trimmed.strip_prefix('#') {
        return HEXLOWER_PERMISSIVE.decode(hex.as_bytes()).ok().map(Value::Encoded);
    }
    if let Some(quoted) = trimmed.strip_prefix('"') {
        return unescape(quoted.strip_suffix('"')?).map(Value::Text);
    }
    // Spaces at the end are no part of the value, unless they are escaped.
    let mut end = trimmed.len();
    let backslashes = text[..end].bytes().rev().take_while(|byte| *byte == b'\\').count();
    if backslashes % 2 == 1 && end < text.len() {
        end += 1;
    }
    unescape(&text[..end]).map(Value::Text)
}

fn unescape(text: &str) -> Option<String> {
    const SPECIAL: &[u8] = b" \"#+,;<=>\\";
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, after @ ..] = rest {
        rest = after;
        if *first != b'\\' {
            bytes.push(*first);
            continue;
        }
        match rest {
            [special, after @ ..] if SPECIAL.contains(special) => {
                bytes.push(*special);
                rest = after;
            }
            [high, low, after @ ..] => {
                bytes.extend(HEXLOWER_PERMISSIVE.decode(&[*high, *low]).ok()?);
                rest = after;
            }
            _ => return None,
        }
    }
    String::from_utf8(bytes).ok()
}

fn found(attribute: &AttributeTypeAndValue) -> (String, Value) {
    let bytes = attribute.value.value();
    let text = match attribute.value.tag() {
        Tag::Utf8String
        | Tag::PrintableString
        | Tag::Ia5String
        | Tag::NumericString
        | Tag::VisibleString => String::from_utf8(bytes.to_vec()).ok(),
        // In practice Latin-1, whatever the standard says.
        Tag::TeletexString => Some(bytes.iter().map(|byte| char::from(*byte)).collect()),
        Tag::BmpString if bytes.len().is_multiple_of(2) => {
            let units: Vec<_> =
                bytes.chunks(2).map(|pair| u16::from_be_bytes([pair[0], pair[1]])).collect();
            String::from_utf16(&units).ok()
        }
        _ => None,
    };
    let value = match text {
        Some(text) => Value::Text(text),
        None => Value::Encoded(attribute.value.to_der().unwrap_or_default()),
    };
    (attribute.oid.to_string(), value)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn name(text: &str) -> DistinguishedName {
        text.parse().unwrap_or_else(|error| panic!("{text}: {error}"))
    }

    #[test]
    fn ways_to_write_the_same_name_are_the_same() {
        let plain = name(r"CN=caller,O=Contoso\, Ltd,C=DE");
        for text in [
            r#"CN=caller, O="Contoso, Ltd", C=DE"#,
            r"cn=caller , o = Contoso\2c Ltd,2.5.4.6=DE",
            r"OID.2.5.4.3=caller,O=Contoso\, Ltd  ,C=DE",
        ] {
            assert_eq!(name(text), plain, "{text}");
        }
        assert_eq!(name("OU=Sales+CN=J"), name("CN=J + OU=Sales"));
        assert_eq!(name(r"CN=a\ "), name("CN=\"a \""));
        assert_ne!(name("CN=\u{a0}a\u{2003}"), name("CN=a"), "no spaces but letters");
        assert_eq!(name(r"CN=L\c3\bcbeck,S=SH"), name("CN=Lübeck,ST=SH"));
        assert_eq!(name("E=a@example.com"), name("emailAddress=a@example.com"));
    }

    #[test]
    fn other_names_are_others() {
        let caller = name("CN=caller,O=Contoso");
        for other in
            ["O=Contoso,CN=caller", "CN=Caller,O=Contoso", "CN=caller", "CN=caller+O=Contoso"]
        {
            assert_ne!(name(other), caller, "{other}");
        }
        assert_ne!(name("CN=a/O=b"), name("CN=a,O=b"), "a slash is a letter");
        assert_ne!(name("CN=#0c0161"), name("CN=a"), "an encoding is not looked into");
    }

    #[test]
    fn what_is_no_name_says_why() {
        let error = |text: &str| text.parse::<DistinguishedName>().unwrap_err();
        assert_eq!(error("  "), NameError::Empty);
        assert_eq!(error("caller"), NameError::NotAPart("caller".into()));
        assert_eq!(error("CN=a,,O=b"), NameError::NotAPart(String::new()));
        assert_eq!(error("=a"), NameError::NotAPart("=a".into()));
        assert_eq!(error("XY=a"), NameError::UnknownAttribute("XY".into()));
        for bad in [r"CN=a\", r"CN=a\x", "CN=\"a", r"CN=\ff", "CN=#0"] {
            assert_eq!(error(bad), NameError::BadValue("CN".into()), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_again(values in prop::collection::vec(".{1,12}", 1..4)) {
            let parts = values
                .into_iter()
                .map(|value| Parts::from([("2.5.4.3".to_owned(), Value::Text(value))]))
                .collect();
            let name = DistinguishedName(parts);
            prop_assert_eq!(name.to_string().parse(), Ok(name));
        }

        #[test]
        fn no_text_is_too_much(text in r##"([CNO=,+"#\\ afü]|.){0,30}"##) {
            let _ = text.parse::<DistinguishedName>();
        }
    }
}
