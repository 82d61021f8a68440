//! Reads a TOML document key by key and collects every complaint with its place.
//!
//! Deserialising into structs would stop at the first mistake and could not name the nearest valid
//! key; an operator should see all mistakes of a file at once, each with line, key and remedy.

use std::{cell::RefCell, fmt, ops::Range, path::Path, time::Duration};

use toml::de::{DeTable, DeValue};

use super::values;

/// One mistake in the configuration.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub(crate) struct Complaint {
    pub(crate) line: usize,
    pub(crate) column: usize,
    /// Dotted, as in `connectors.partners.deadline`; empty for a syntax error.
    pub(crate) key: String,
    pub(crate) message: String,
}

/// All mistakes of one file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Complaints {
    pub(crate) file: String,
    pub(crate) complaints: Vec<Complaint>,
}

impl fmt::Display for Complaints {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let count = self.complaints.len();
        let mistakes = if count == 1 { "mistake" } else { "mistakes" };
        write!(f, "the configuration has {count} {mistakes}")?;
        self.lines().try_for_each(|line| write!(f, "\n  {line}"))
    }
}

impl Complaints {
    /// A line for each, with its place.
    pub(crate) fn lines(&self) -> impl Iterator<Item = String> {
        self.complaints.iter().map(|Complaint { line, column, key, message }| {
            let key = if key.is_empty() { String::new() } else { format!("{key}: ") };
            format!("{}:{line}:{column}: {key}{message}", self.file)
        })
    }
}

impl std::error::Error for Complaints {}

/// A parsed document and what was found wrong with it so far.
pub(crate) struct Document<'a> {
    source: &'a str,
    complaints: RefCell<Vec<(usize, Complaint)>>,
}

impl<'a> Document<'a> {
    /// Parses `source` and hands its root to `read`; any complaint makes the whole an error.
    pub(crate) fn read<T>(
        file: &Path,
        source: &'a str,
        read: impl FnOnce(&mut Section<'_>) -> T,
    ) -> Result<T, Complaints> {
        let document = Document { source, complaints: RefCell::default() };
        let (root, errors) = DeTable::parse_recoverable(source);
        for error in errors {
            let place = error.span().unwrap_or_default();
            document.complain(place, String::new(), error.message().to_owned());
        }
        let syntax_is_fine = document.complaints.borrow().is_empty();
        let value = syntax_is_fine.then(|| {
            let mut section = Section {
                document: &document,
                path: String::new(),
                table: Some(root.get_ref()),
                place: 0..0,
                known: Vec::new(),
            };
            let value = read(&mut section);
            section.finish();
            value
        });
        let mut complaints = document.complaints.into_inner();
        complaints.sort_by_key(|(offset, _)| *offset);
        match value {
            Some(value) if complaints.is_empty() => Ok(value),
            _ => Err(Complaints {
                file: file.display().to_string(),
                complaints: complaints.into_iter().map(|(_, complaint)| complaint).collect(),
            }),
        }
    }

    fn complain(&self, place: Range<usize>, key: String, message: String) {
        let (line, column) = line_and_column(self.source, place.start);
        self.complaints.borrow_mut().push((place.start, Complaint { line, column, key, message }));
    }
}

fn line_and_column(source: &str, offset: usize) -> (usize, usize) {
    let before = &source[..offset.min(source.len())];
    let line = before.matches('\n').count() + 1;
    let column = before.chars().rev().take_while(|c| *c != '\n').count() + 1;
    (line, column)
}

/// One table of the document. Each key that is asked for is thereby known; [`Section::finish`]
/// complains of the rest.
pub(crate) struct Section<'a> {
    document: &'a Document<'a>,
    path: String,
    /// `None` where the file does not have the section, so that its defaults hold.
    table: Option<&'a DeTable<'a>>,
    place: Range<usize>,
    known: Vec<&'static str>,
}

impl<'a> Section<'a> {
    /// Whether the file has the section at all.
    pub(crate) fn is_present(&self) -> bool {
        self.table.is_some()
    }

    pub(crate) fn has(&self, key: &str) -> bool {
        self.find(key).is_some()
    }

    /// Whether a key that may be a text or a table is a text.
    pub(crate) fn is_text(&self, key: &str) -> bool {
        self.find(key).is_some_and(|(_, value)| value.is_str())
    }

    /// Where the section begins, from 1.
    pub(crate) fn line(&self) -> usize {
        line_and_column(self.document.source, self.place.start).0
    }

    /// Complains of a key in this section, or of the section where `key` is empty or missing.
    pub(crate) fn complain(&self, key: &str, message: impl Into<String>) {
        let place = self.find(key).map_or_else(|| self.place.clone(), |(place, _)| place);
        self.document.complain(place, self.path_of(key), message.into());
    }

    /// A value read by `read`, or `None` where it is absent or wrong (which is complained of).
    pub(crate) fn value<T>(
        &mut self,
        key: &'static str,
        expected: &str,
        read: impl FnOnce(&DeValue<'_>) -> Result<T, String>,
    ) -> Option<T> {
        self.known.push(key);
        let (place, value) = self.find(key)?;
        match read(value) {
            Ok(value) => Some(value),
            Err(found) => {
                let message = format!("expected {expected}, found {found}");
                self.document.complain(place, self.path_of(key), message);
                None
            }
        }
    }

    pub(crate) fn string(&mut self, key: &'static str) -> Option<String> {
        self.value(key, "a string", |value| text(value).map(str::to_owned))
    }

    /// A string that must be there.
    pub(crate) fn required(&mut self, key: &'static str) -> String {
        if !self.has(key) {
            self.known.push(key);
            self.complain("", format!("needs the key `{key}`"));
            return String::new();
        }
        self.string(key).unwrap_or_default()
    }

    /// A string that `parse` turns into something; its error says what was expected.
    pub(crate) fn parsed<T>(
        &mut self,
        key: &'static str,
        expected: &str,
        parse: impl FnOnce(&str) -> Option<T>,
    ) -> Option<T> {
        self.value(key, expected, |value| {
            let text = text(value)?;
            parse(text).ok_or_else(|| format!("`{text}`"))
        })
    }

    /// Like [`Section::parsed`], and does not repeat a wrong value: it may be the secret itself.
    pub(crate) fn private<T>(
        &mut self,
        key: &'static str,
        expected: &str,
        parse: impl FnOnce(&str) -> Option<T>,
    ) -> Option<T> {
        self.value(key, expected, |value| {
            parse(text(value)?).ok_or_else(|| "something else, not repeated here".to_owned())
        })
    }

    /// One of a few words.
    pub(crate) fn choice<T: Copy>(
        &mut self,
        key: &'static str,
        choices: &[(&str, T)],
        default: T,
    ) -> T {
        let words: Vec<_> = choices.iter().map(|(word, _)| *word).collect();
        let expected = format!("one of {}", quoted(&words));
        self.value(key, &expected, |value| {
            let text = text(value)?;
            let found = choices.iter().find(|(word, _)| *word == text).map(|(_, it)| *it);
            found.ok_or_else(|| format!("`{text}`{}", perhaps(text, &words)))
        })
        .unwrap_or(default)
    }

    /// A list of words, each parsed by `parse`.
    pub(crate) fn list<T>(
        &mut self,
        key: &'static str,
        expected: &str,
        parse: impl Fn(&str) -> Option<T>,
    ) -> Vec<T> {
        self.value(key, &format!("a list of {expected}"), |value| {
            let items = value.as_array().ok_or_else(|| found(value))?;
            let parse = |value: &DeValue<'_>| {
                let text = text(value)?;
                parse(text).ok_or_else(|| format!("`{text}`"))
            };
            items.iter().map(|item| parse(item.get_ref())).collect()
        })
        .unwrap_or_default()
    }

    /// A list of words out of `choices`.
    pub(crate) fn words<T: Copy>(&mut self, key: &'static str, choices: &[(&str, T)]) -> Vec<T> {
        let words: Vec<_> = choices.iter().map(|(word, _)| *word).collect();
        self.value(key, &format!("a list of {}", quoted(&words)), |value| {
            let items = value.as_array().ok_or_else(|| found(value))?;
            let parse = |value: &DeValue<'_>| {
                let text = text(value)?;
                let found = choices.iter().find(|(word, _)| *word == text).map(|(_, it)| *it);
                found.ok_or_else(|| format!("`{text}`{}", perhaps(text, &words)))
            };
            items.iter().map(|item| parse(item.get_ref())).collect()
        })
        .unwrap_or_default()
    }

    pub(crate) fn duration(&mut self, key: &'static str, default: Duration) -> Duration {
        self.parsed(key, "a duration such as \"250ms\", \"10m\" or \"30d\"", |text| {
            humantime::parse_duration(text).ok()
        })
        .unwrap_or(default)
    }

    /// A number of bytes, such as `"64KiB"`.
    pub(crate) fn bytes(&mut self, key: &'static str, default: u64) -> u64 {
        self.parsed(key, "a size such as \"64KiB\" or \"10GiB\"", values::parse_bytes)
            .unwrap_or(default)
    }

    pub(crate) fn integer(&mut self, key: &'static str, within: Range<u64>, default: u64) -> u64 {
        let expected = format!("a whole number from {} to {}", within.start, within.end - 1);
        self.value(key, &expected, |value| {
            let number = value.as_integer().ok_or_else(|| found(value))?;
            let parsed = u64::from_str_radix(number.as_str(), number.radix()).ok();
            parsed.filter(|it| within.contains(it)).ok_or_else(|| number.to_string())
        })
        .unwrap_or(default)
    }

    /// A number from `within`, with or without a decimal point.
    pub(crate) fn number(
        &mut self,
        key: &'static str,
        within: std::ops::RangeInclusive<f64>,
        default: f64,
    ) -> f64 {
        let expected = format!("a number from {} to {}", within.start(), within.end());
        self.value(key, &expected, |value| {
            let text = match value {
                DeValue::Integer(number) => number.as_str(),
                DeValue::Float(number) => number.as_str(),
                _ => return Err(found(value)),
            };
            let parsed = text.parse().ok().filter(|it| within.contains(it));
            parsed.ok_or_else(|| text.to_owned())
        })
        .unwrap_or(default)
    }

    pub(crate) fn boolean(&mut self, key: &'static str, default: bool) -> bool {
        self.value(key, "true or false", |value| value.as_bool().ok_or_else(|| found(value)))
            .unwrap_or(default)
    }

    /// Reads a table below this one; where the file has none, one without keys.
    pub(crate) fn section<T>(
        &mut self,
        key: &'static str,
        read: impl FnOnce(&mut Section<'a>) -> T,
    ) -> T {
        self.known.push(key);
        let found = self.find(key);
        let place = found.as_ref().map_or_else(|| self.place.clone(), |(place, _)| place.clone());
        let table = found.and_then(|(place, value)| {
            let table = value.as_table();
            if table.is_none() {
                let message = format!("expected a table, found {}", self::found(value));
                self.document.complain(place, self.path_of(key), message);
            }
            table
        });
        self.child(key, table, place, read)
    }

    /// Reads each table of an array of tables.
    pub(crate) fn sections<T>(
        &mut self,
        key: &'static str,
        mut read: impl FnMut(&mut Section<'a>) -> T,
    ) -> Vec<T> {
        self.known.push(key);
        let Some((place, value)) = self.find(key) else { return Vec::new() };
        let Some(items) = value.as_array() else {
            let message =
                format!("expected [[{}]] tables, found {}", self.path_of(key), found(value));
            self.document.complain(place, self.path_of(key), message);
            return Vec::new();
        };
        let read_item = |(index, item): (usize, &'a toml::Spanned<DeValue<'a>>)| {
            let name = format!("{key}[{index}]");
            let Some(table) = item.get_ref().as_table() else {
                let message = format!("expected a table, found {}", found(item.get_ref()));
                self.document.complain(item.span(), self.path_of(&name), message);
                return None;
            };
            Some(self.child(&name, Some(table), item.span(), &mut read))
        };
        items.iter().enumerate().filter_map(read_item).collect()
    }

    /// Reads each table of a table of tables, with its name and where that stands.
    pub(crate) fn named_sections<T>(
        &mut self,
        key: &'static str,
        mut read: impl FnMut(&str, &mut Section<'a>) -> T,
    ) -> Vec<T> {
        self.section(key, |parent| {
            let Some(table) = parent.table else { return Vec::new() };
            let mut read_item =
                |name: &'a toml::Spanned<_>, item: &'a toml::Spanned<DeValue<'a>>| {
                    let name: &std::borrow::Cow<'a, str> = name.get_ref();
                    let Some(table) = item.get_ref().as_table() else {
                        let message = format!("expected a table, found {}", found(item.get_ref()));
                        parent.document.complain(item.span(), parent.path_of(name), message);
                        return None;
                    };
                    Some(parent.child(name, Some(table), item.span(), |it| read(name, it)))
                };
            let read = table.iter().filter_map(|(name, item)| read_item(name, item)).collect();
            parent.table = None; // Every key was a name, so none is unknown.
            read
        })
    }

    /// The texts of a table of strings, in the order of their keys.
    pub(crate) fn strings(&mut self, key: &'static str) -> Vec<(String, String)> {
        self.value(key, "a table of strings", |value| {
            let table = value.as_table().ok_or_else(|| found(value))?;
            let entry = |(name, value): (&toml::Spanned<_>, &toml::Spanned<DeValue<'_>>)| {
                let name: &std::borrow::Cow<'_, str> = name.get_ref();
                Ok((name.to_string(), text(value.get_ref())?.to_owned()))
            };
            table.iter().map(entry).collect()
        })
        .unwrap_or_default()
    }

    /// A value of whatever kind, as JSON has it.
    pub(crate) fn json(&mut self, key: &'static str) -> Option<serde_json::Value> {
        self.value(key, "a value", |value| Ok(json(value)))
    }

    /// A table of whatever values.
    pub(crate) fn table(
        &mut self,
        key: &'static str,
    ) -> serde_json::Map<String, serde_json::Value> {
        self.value(key, "a table", |value| match json(value) {
            serde_json::Value::Object(table) => Ok(table),
            _ => Err(found(value)),
        })
        .unwrap_or_default()
    }

    fn child<T>(
        &self,
        name: &str,
        table: Option<&'a DeTable<'a>>,
        place: Range<usize>,
        read: impl FnOnce(&mut Section<'a>) -> T,
    ) -> T {
        let path = self.path_of(name);
        let mut section =
            Section { document: self.document, path, table, place, known: Vec::new() };
        let value = read(&mut section);
        section.finish();
        value
    }

    /// Whether there is a key that nobody has asked for yet: perhaps a missing one, misspelt.
    pub(crate) fn has_unknown(&self) -> bool {
        self.table.into_iter().flatten().any(|(key, _)| !self.is_known(key.get_ref()))
    }

    fn is_known(&self, key: &str) -> bool {
        self.known.contains(&key)
    }

    /// Complains of every key that nobody asked for.
    fn finish(&self) {
        for (key, value) in self.table.into_iter().flatten() {
            let name = key.get_ref();
            if self.is_known(name) {
                continue;
            }
            let message = format!("there is no such key{}", did_you_mean(name, &self.known));
            // A table's own span is its header; a key's is the word itself.
            let place = if value.get_ref().is_table() { value.span() } else { key.span() };
            self.document.complain(place, self.path_of(name), message);
        }
    }

    fn find(&self, key: &str) -> Option<(Range<usize>, &'a DeValue<'a>)> {
        let (_, value) = self.table?.iter().find(|(name, _)| name.get_ref() == key)?;
        Some((value.span(), value.get_ref()))
    }

    fn path_of(&self, key: &str) -> String {
        match (self.path.as_str(), key) {
            (path, "") => path.to_owned(),
            ("", key) => key.to_owned(),
            (path, key) => format!("{path}.{key}"),
        }
    }
}

fn json(value: &DeValue<'_>) -> serde_json::Value {
    match value {
        DeValue::String(text) => text.as_ref().into(),
        DeValue::Integer(number) => {
            let (text, radix) = (number.as_str(), number.radix());
            i64::from_str_radix(text, radix).map_or_else(|_| text.into(), serde_json::Value::from)
        }
        DeValue::Float(number) => number.as_str().parse::<f64>().unwrap_or(f64::NAN).into(),
        DeValue::Boolean(value) => (*value).into(),
        DeValue::Datetime(time) => time.to_string().into(),
        DeValue::Array(items) => items.iter().map(|item| json(item.get_ref())).collect(),
        DeValue::Table(table) => {
            let entry = |(name, value): (
                &toml::Spanned<std::borrow::Cow<'_, str>>,
                &toml::Spanned<DeValue<'_>>,
            )| { (name.get_ref().to_string(), json(value.get_ref())) };
            serde_json::Value::Object(table.iter().map(entry).collect())
        }
    }
}

fn text<'v>(value: &'v DeValue<'_>) -> Result<&'v str, String> {
    value.as_str().ok_or_else(|| found(value))
}

fn found(value: &DeValue<'_>) -> String {
    match value.type_str() {
        "integer" => "a whole number".to_owned(),
        "array" => "a list".to_owned(),
        other => format!("a {other}"),
    }
}

pub(super) fn quoted(words: &[&str]) -> String {
    words.iter().map(|word| format!("\"{word}\"")).collect::<Vec<_>>().join(", ")
}

/// The nearest of the valid names, if one is near enough to be what was meant; otherwise all.
pub(crate) fn did_you_mean(name: &str, valid: &[&str]) -> String {
    match perhaps(name, valid) {
        nothing if nothing.is_empty() && !valid.is_empty() => {
            format!("; valid here: {}", valid.join(", "))
        }
        question => question,
    }
}

/// Asks for the nearest of the valid names, where these have been listed already.
fn perhaps(name: &str, valid: &[&str]) -> String {
    let nearest = valid
        .iter()
        .map(|candidate| (strsim::damerau_levenshtein(name, candidate), *candidate))
        .filter(|(distance, candidate)| *distance <= candidate.len().max(name.len()) / 3)
        .min();
    nearest.map_or_else(String::new, |(_, candidate)| format!("; did you mean `{candidate}`?"))
}
