//! Reads an expression, and says in plain words where it cannot be read.

use std::thread;

use cel::ParseError;

use super::{
    ENV, Fault, Known,
    bounded::SOURCE_MAX,
    checker::{Checked, Checker},
};

/// For the deepest expression that fits into a source. It is only touched as far as it is needed.
const STACK_BYTES: usize = 256 * 1024 * 1024;

/// The expression, without the faults that can be found beforehand.
///
/// The parser calls itself as often as an expression is nested, and only what has been parsed can be
/// refused for that. So it runs where there is room enough.
pub(super) fn read(source: &str, known: &Known) -> Result<Checked, Vec<Fault>> {
    if source.len() > SOURCE_MAX {
        let message =
            format!("this is longer than {SOURCE_MAX} bytes; use a list, or several rules");
        return Err(vec![Fault { message, line: 1, column: 1 }]);
    }
    let unreadable = || {
        let message = "this cannot be read; write it differently".to_owned();
        vec![Fault { message, line: 1, column: 1 }]
    };
    thread::scope(|scope| {
        let reader = thread::Builder::new().name("rules".into()).stack_size(STACK_BYTES);
        let reading = reader.spawn_scoped(scope, || read_here(source, known));
        reading.map_err(|_| unreadable())?.join().unwrap_or_else(|_| Err(unreadable()))
    })
}

fn read_here(source: &str, known: &Known) -> Result<Checked, Vec<Fault>> {
    let program = ENV.compile(source).map_err(|errors| {
        // The first says what is wrong; the others mostly follow from it.
        let first = errors.errors.into_iter().next();
        first.map(|error| vec![fault(source, &error)]).unwrap_or_default()
    })?;
    Checker::check(program.expression().clone(), program.source_info(), known)
}

fn fault(source: &str, error: &ParseError) -> Fault {
    let line = usize::try_from(error.pos.0).unwrap_or(1).max(1);
    let column = usize::try_from(error.pos.1).unwrap_or(1).max(1);
    let message = explain(source, &error.msg);
    // Of what is nested too deep, the place is not told.
    if error.pos.1 < 0 {
        Fault { message, line: 1, column }
    } else {
        Fault { message, line, column }
    }
}

/// The parser's words, such as `mismatched input '<EOF>' expecting {'[', '{', '(', …`, in ours.
fn explain(source: &str, message: &str) -> String {
    let message = message.strip_prefix("Syntax error: ").unwrap_or(message);
    if message.contains("ecursion limit") {
        return "this is nested too deep; split it into several".to_owned();
    }
    let (found, _) = message.split_once(" expecting ").unwrap_or((message, ""));
    if found.contains("<EOF>") {
        return too_early(source);
    }
    let quoted = |prefix: &str| {
        let found = found.strip_prefix(prefix)?.trim_start().strip_prefix('\'')?;
        Some(found.strip_suffix('\'').unwrap_or(found).trim_end())
    };
    if let Some(sign) = quoted("token recognition error at:") {
        return unknown_sign(sign);
    }
    if let Some(word) = found.strip_prefix("reserved identifier: ") {
        return format!("`{word}` is a word that CEL keeps for itself");
    }
    for prefix in ["extraneous input", "mismatched input", "no viable alternative at input"] {
        if let Some(found) = quoted(prefix) {
            return unexpected(found);
        }
    }
    found.lines().next().unwrap_or_default().to_owned()
}

fn too_early(source: &str) -> String {
    if source.trim().is_empty() {
        return "there is nothing here".to_owned();
    }
    if let Some(open) = never_closed(source) {
        return format!("`{open}` is never closed");
    }
    let last = source.trim_end();
    let sign = [
        "==", "!=", "<=", ">=", "&&", "||", "<", ">", "+", "-", "*", "/", "%", "!", "?", ":", ".",
        ",",
    ];
    match sign.into_iter().find(|sign| last.ends_with(sign)) {
        Some(sign) => format!("this ends too early: a value is missing after `{sign}`"),
        None => "this ends too early: a value is missing".to_owned(),
    }
}

/// The bracket that is open at the end, outside of text.
fn never_closed(source: &str) -> Option<char> {
    let mut open = Vec::new();
    let mut quote = None;
    let mut letters = source.chars();
    while let Some(letter) = letters.next() {
        match (quote, letter) {
            (Some(_), '\\') => drop(letters.next()),
            (Some(it), _) if it == letter => quote = None,
            (Some(_), _) => {}
            (None, '\'' | '"') => quote = Some(letter),
            (None, '(' | '[' | '{') => open.push(letter),
            (None, ')' | ']' | '}') => drop(open.pop()),
            _ => {}
        }
    }
    open.pop()
}

fn unknown_sign(sign: &str) -> String {
    match sign.chars().next() {
        Some('\'' | '"') => "this text has no closing quote".to_owned(),
        Some('=') => "`=` means nothing here; to compare, write `==`".to_owned(),
        Some('&') => "`&` means nothing here; for and, write `&&`".to_owned(),
        Some('|') => "`|` means nothing here; for or, write `||`".to_owned(),
        Some('\u{2018}'..='\u{201f}' | '`' | '\u{b4}') => {
            format!("`{sign}` is no quote that CEL knows; write ' or \"")
        }
        _ => format!("`{sign}` means nothing here"),
    }
}

fn unexpected(found: &str) -> String {
    let hint = match found.to_ascii_lowercase().as_str() {
        "and" => "; for and, write `&&`",
        "or" => "; for or, write `||`",
        "not" => "; for not, write `!`",
        "is" | "equals" | "=" => "; to compare, write `==`",
        "like" => "; for patterns, write `x.matches('…')`",
        ")" | "]" | "}" => "; nothing is open that it would close",
        _ => "",
    };
    format!("`{found}` is not expected here{hint}")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_cannot_be_read_is_said_in_words() {
        for (source, message, line, column) in [
            ("", "there is nothing here", 1, 1),
            ("signup.email ==", "this ends too early: a value is missing after `==`", 1, 16),
            ("signup.email == 'x' &&", "this ends too early: a value is missing after `&&`", 1, 23),
            ("(signup.email == 'x'", "`(` is never closed", 1, 21),
            ("signup.email in ['x'", "`[` is never closed", 1, 21),
            ("signup.email.matches('x'", "`(` is never closed", 1, 25),
            (
                "signup.email == 'x')",
                "`)` is not expected here; nothing is open that it would close",
                1,
                20,
            ),
            ("signup.email = 'x'", "`=` means nothing here; to compare, write `==`", 1, 14),
            ("signup.email == 'x", "this text has no closing quote", 1, 17),
            ("signup.email == “x”", "`“` is no quote that CEL knows; write ' or \"", 1, 17),
            ("true and false", "`and` is not expected here; for and, write `&&`", 1, 6),
            ("true\n  or false", "`or` is not expected here; for or, write `||`", 2, 3),
            ("true & false", "`&` means nothing here; for and, write `&&`", 1, 6),
            ("signup.email == 'x' 'y'", "`'y'` is not expected here", 1, 21),
            ("for == 1", "`for` is a word that CEL keeps for itself", 1, 1),
        ] {
            let faults = read(source, &Known::default()).err().unwrap();
            let found = (&*faults[0].message, faults[0].line, faults[0].column);
            assert_eq!(found, (message, line, column), "{source}");
        }
    }

    #[test]
    fn nothing_is_too_deep_to_be_refused() {
        let repeated = |unit: &str| unit.repeat((SOURCE_MAX - 10) / unit.len());
        let too_deep = "this is nested too deep";
        for (source, message) in [
            (format!("{}1", repeated("1+")), too_deep),
            (format!("{}1{}", "(".repeat(8000), ")".repeat(8000)), too_deep),
            (format!("signup{}", repeated(".a")), too_deep),
            (format!("signup{}", repeated("[0]")), too_deep),
            (format!("signup{}", repeated(".trim()")), too_deep),
            (format!("[1]{}", repeated(".map(x,x)")), too_deep),
            (repeated("["), too_deep),
            (repeated("f("), too_deep),
            (repeated("true?1:"), too_deep),
            (repeated("{1:"), too_deep),
            (repeated("true||"), "this ends too early"),
            (repeated("a "), "`a` is not expected here"),
            (repeated("\\"), "`\\` means nothing here"),
            ("x".repeat(SOURCE_MAX + 1), "this is longer than"),
        ] {
            let faults = read(&source, &Known::default()).err().unwrap();
            assert!(faults[0].message.starts_with(message), "{}: {:?}", &source[..9], faults[0]);
        }
        // What is wide and not deep is fine.
        for source in
            [format!("{}true", repeated("false||")), format!("1 in [{}1]", repeated("1,"))]
        {
            assert!(read(&source[..], &Known::default()).is_err() == (source.len() > SOURCE_MAX));
        }
    }

    proptest! {
        #[test]
        fn whatever_is_written_is_read_or_refused(
            source in "(signup|[.]|claims|email|[(]|[)]|[\\[]|\\]|==|&&|!|'|\"|1| |x|in|matches|,|[?]|:|\\{|\\}|[+]|.){0,30}",
        ) {
            if let Err(faults) = read(&source, &Known::default()) {
                prop_assert!(!faults.is_empty() && faults.iter().all(|it| !it.message.is_empty()));
            }
        }
    }
}
