//! URLs with places for arguments.

use reqwest::Url;
use serde_json::Value;

/// A URL in whose path and query arguments take their places, percent-encoded.
///
/// An argument cannot leave its place: whatever has a meaning in a URL is encoded, and one that
/// would make a step up the path (`..`) or vanish from it is refused. Scheme, host and port have no
/// places.
#[derive(Debug)]
pub(super) struct Template {
    /// Scheme, host and port, in front of the path.
    origin: String,
    host: String,
    pieces: Vec<Piece>,
}

#[derive(Debug)]
enum Piece {
    Text(String),
    InPath(usize),
    InQuery(usize),
    /// A parameter of its own, left out where there is no value.
    Parameter {
        name: String,
        argument: usize,
    },
}

impl Template {
    /// With `rest_in_query`, arguments that have no place become parameters of the query.
    pub(super) fn parse(
        url: &str,
        arguments: &[String],
        rest_in_query: bool,
    ) -> Result<Self, String> {
        let not_http = || "must be an http or https URL".to_owned();
        let (scheme, after) = url.split_once("://").ok_or_else(not_http)?;
        let authority = after.split(['/', '?', '#']).next().unwrap_or_default();
        if authority.contains(['{', '}']) {
            return Err("must have no arguments in front of its path".to_owned());
        }
        let (origin, rest) = url.split_at(scheme.len() + "://".len() + authority.len());
        let base = Url::parse(origin).map_err(|_| not_http())?;
        let host = match base.host_str() {
            Some(host) if matches!(base.scheme(), "http" | "https") => host.to_owned(),
            _ => return Err(not_http()),
        };
        if !base.username().is_empty() || base.password().is_some() {
            return Err("must hold no user and password: use `headers`".to_owned());
        }
        if rest.contains('#') {
            return Err("must have no fragment".to_owned());
        }

        let mut pieces = pieces(rest, arguments)?;
        if rest_in_query {
            let template = Self { origin: String::new(), host: String::new(), pieces };
            let extra = (0..arguments.len()).filter(|place| !template.holds(*place));
            let extra: Vec<_> = extra
                .map(|argument| Piece::Parameter { name: arguments[argument].clone(), argument })
                .collect();
            pieces = template.pieces;
            pieces.extend(extra);
        }
        let template = Self { origin: origin.to_owned(), host, pieces };
        // With harmless arguments it must be fine, so that later only arguments can be at fault.
        let harmless = vec![Value::from("x"); arguments.len()];
        match template.fill(&harmless) {
            Some(_) => Ok(template),
            None => Err("cannot be read, or its path holds `.` or `..`".to_owned()),
        }
    }

    pub(super) fn host(&self) -> &str {
        &self.host
    }

    /// Whether the argument has a place in here.
    pub(super) fn holds(&self, place: usize) -> bool {
        self.pieces.iter().any(|piece| match piece {
            Piece::InPath(at) | Piece::InQuery(at) | Piece::Parameter { argument: at, .. } => {
                *at == place
            }
            Piece::Text(_) => false,
        })
    }

    /// `None` where an argument cannot stand in its place.
    pub(super) fn fill(&self, arguments: &[Value]) -> Option<Url> {
        let mut rest = String::new();
        for piece in &self.pieces {
            match piece {
                Piece::Text(text) => rest.push_str(text),
                Piece::InPath(place) => {
                    let text = text(arguments.get(*place)?)?.filter(|text| !text.is_empty())?;
                    encode(&text, &mut rest);
                }
                Piece::InQuery(place) => {
                    encode(&text(arguments.get(*place)?)?.unwrap_or_default(), &mut rest);
                }
                Piece::Parameter { name, argument } => {
                    let Some(text) = text(arguments.get(*argument)?)? else { continue };
                    rest.push(if rest.contains('?') { '&' } else { '?' });
                    encode(name, &mut rest);
                    rest.push('=');
                    encode(&text, &mut rest);
                }
            }
        }
        let path = rest.split('?').next().unwrap_or_default();
        if path.split(['/', '\\']).any(is_step) {
            return None;
        }
        Url::parse(&format!("{}{rest}", self.origin)).ok()
    }
}

/// A segment that URLs take for "here" or "one up", however it is written.
fn is_step(segment: &str) -> bool {
    let plain = segment.to_ascii_lowercase().replace("%2e", ".");
    plain == "." || plain == ".."
}

/// The value as it reads; `Some(None)` for none. Lists and objects have no place in a URL.
fn text(value: &Value) -> Option<Option<String>> {
    Some(match value {
        Value::Null => None,
        Value::String(text) => Some(text.clone()),
        Value::Bool(truth) => Some(truth.to_string()),
        Value::Number(number) => Some(number.to_string()),
        Value::Array(_) | Value::Object(_) => return None,
    })
}

/// All but what means nothing but itself in every part of a URL.
fn encode(text: &str, into: &mut String) {
    const HEX: &[u8; 16] = b"0123456789ABCDEF";
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            into.push(char::from(byte));
        } else {
            into.push('%');
            into.push(char::from(HEX[usize::from(byte >> 4)]));
            into.push(char::from(HEX[usize::from(byte & 15)]));
        }
    }
}

fn pieces(mut rest: &str, arguments: &[String]) -> Result<Vec<Piece>, String> {
    let mut pieces = Vec::new();
    let mut in_query = false;
    while let Some((text, after)) = rest.split_once('{') {
        let Some((name, after)) = after.split_once('}') else {
            return Err("has a `{` without its `}`".to_owned());
        };
        let Some(place) = arguments.iter().position(|it| it == name) else {
            return Err(format!("names `{name}`, which is none of the arguments"));
        };
        in_query |= text.contains('?');
        pieces.push(Piece::Text(text.to_owned()));
        pieces.push(if in_query { Piece::InQuery(place) } else { Piece::InPath(place) });
        rest = after;
    }
    if rest.contains('}') {
        return Err("has a `}` without its `{`".to_owned());
    }
    pieces.push(Piece::Text(rest.to_owned()));
    Ok(pieces)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn template(url: &str, arguments: &[&str]) -> Result<Template, String> {
        let arguments: Vec<_> = arguments.iter().map(|it| (*it).to_owned()).collect();
        Template::parse(url, &arguments, true)
    }

    fn filled(url: &str, arguments: &[(&str, Value)]) -> Option<String> {
        let names: Vec<_> = arguments.iter().map(|(name, _)| *name).collect();
        let values: Vec<_> = arguments.iter().map(|(_, value)| value.clone()).collect();
        template(url, &names).unwrap().fill(&values).map(String::from)
    }

    #[test]
    fn arguments_take_their_places_and_the_rest_become_parameters() {
        let ada = ("id", json!("Ada & Co/1?#%"));
        let encoded = "Ada%20%26%20Co%2F1%3F%23%25";
        for (url, expected) in [
            ("https://crm/{id}", format!("https://crm/{encoded}")),
            ("https://crm/p/{id}/x?a=b", format!("https://crm/p/{encoded}/x?a=b")),
            ("https://crm/p?who={id}&z", format!("https://crm/p?who={encoded}&z")),
            ("https://crm:81/p?a=b", format!("https://crm:81/p?a=b&id={encoded}")),
            ("https://crm", format!("https://crm/?id={encoded}")),
        ] {
            assert_eq!(filled(url, std::slice::from_ref(&ada)), Some(expected), "{url}");
        }
        let mixed = [("n", json!(7)), ("b", json!(true)), ("none", Value::Null)];
        assert_eq!(filled("http://a/{n}", &mixed).unwrap(), "http://a/7?b=true");
    }

    #[test]
    fn an_argument_that_would_leave_its_place_is_refused() {
        for (url, value) in [
            ("http://a/p/{x}/q", json!("..")),
            ("http://a/p/{x}", json!(".")),
            ("http://a/p/.{x}", json!(".")),
            ("http://a/p/{x}", json!("")),
            ("http://a/p/{x}", Value::Null),
            ("http://a/p/{x}", json!(["a"])),
            ("http://a/p?x={x}", json!({})),
        ] {
            assert_eq!(filled(url, &[("x", value.clone())]), None, "{url} {value}");
        }
        assert_eq!(filled("http://a/p?x={x}", &[("x", json!(".."))]).unwrap(), "http://a/p?x=..");
    }

    #[test]
    fn a_template_that_cannot_work_is_refused_at_once() {
        for url in [
            "crm",
            "ftp://crm/{x}",
            "http:///{x}",
            "http://{x}/",
            "http://crm:{x}/",
            "http://user:pw@crm/",
            "http://crm/{y}",
            "http://crm/{x",
            "http://crm/x}",
            "http://crm/#{x}",
            "http://crm/../{x}",
        ] {
            assert!(template(url, &["x"]).is_err(), "{url}");
        }
    }

    proptest! {
        #[test]
        fn whatever_an_argument_holds_it_stays_where_it_belongs(path: String, query: String) {
            let template = template("https://crm/people/{a}/card?q={b}&end=1", &["a", "b"]).unwrap();
            let Some(url) = template.fill(&[json!(path), json!(query)]) else {
                prop_assert!(matches!(path.as_str(), "" | "." | ".."));
                return Ok(());
            };
            prop_assert_eq!(url.host_str(), Some("crm"));
            let segments: Vec<_> = url.path_segments().unwrap().collect();
            prop_assert_eq!((segments.len(), segments[0], segments[2]), (3, "people", "card"));
            let pairs: Vec<_> = url.query_pairs().into_owned().collect();
            prop_assert_eq!(pairs, [("q".to_owned(), query), ("end".to_owned(), "1".to_owned())]);
            prop_assert_eq!(url.fragment(), None);
        }
    }
}
