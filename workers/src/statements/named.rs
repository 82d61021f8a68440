//! Named parameters in SQL: `:email` becomes the placeholder that the database knows.
//!
//! The text is read as the database reads it, so that what stands in quotes, in comments or behind
//! `::` is left alone. Values are never written into the text: whoever runs the statement binds
//! one to each of [`NamedStatement::parameters`], in their order.

/// Whose SQL it is; each quotes and comments in a way of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Dialect {
    Postgres,
    MySql,
    Sqlite,
}

/// How a statement may begin. What changes tables or ends a transaction would break the promise that
/// several statements and our note of the event are done together.
const VERBS: [&str; 8] =
    ["INSERT", "UPDATE", "DELETE", "MERGE", "REPLACE", "WITH", "SELECT", "CALL"];

/// One statement as the database is given it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct NamedStatement {
    /// With `$1` (PostgreSQL), `?1` (SQLite) or `?` (MySQL) where a parameter was named.
    pub(crate) text: String,
    /// The name of each value to bind. MySQL has no numbers, so there a name comes as often as it
    /// is used; elsewhere it comes once.
    pub(crate) parameters: Vec<String>,
}

/// Why a text is not one statement with named parameters.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum NamedError {
    #[error("is empty")]
    Empty,
    #[error("holds more than one statement; give each one of its own")]
    Several,
    #[error("holds a quotation or a comment that begins with {0} and does not end")]
    Unterminated(String),
    #[error("holds the placeholder {0}; name the parameter instead, such as :email")]
    Placeholder(String),
    #[error("holds a NUL character")]
    Nul,
    #[error("begins with {0}; valid here: {verbs}", verbs = VERBS.join(", "))]
    Verb(String),
}

impl Dialect {
    pub(crate) const ALL: [Self; 3] = [Self::Postgres, Self::MySql, Self::Sqlite];
}

impl NamedStatement {
    pub(crate) fn parse(sql: &str, dialect: Dialect) -> Result<Self, NamedError> {
        if sql.contains('\0') {
            return Err(NamedError::Nul);
        }
        let (mut text, mut parameters) = (String::with_capacity(sql.len()), Vec::new());
        let (mut rest, mut has_begun) = (sql, false);
        while !rest.is_empty() {
            let (token, length) = next_token(rest, dialect)?;
            let (this, after) = rest.split_at(length);
            match token {
                Token::Gap => text.push_str(this),
                Token::Text | Token::Parameter if !has_begun && !is_verb(this) => {
                    return Err(NamedError::Verb(this.to_owned()));
                }
                Token::Text => {
                    has_begun = true;
                    text.push_str(this);
                }
                Token::Parameter => {
                    push_placeholder(&mut text, &mut parameters, &this[1..], dialect);
                }
                Token::Foreign => return Err(NamedError::Placeholder(this.to_owned())),
                Token::End if is_gap(after, dialect)? => break,
                Token::End => return Err(NamedError::Several),
            }
            rest = after;
        }
        if has_begun { Ok(Self { text, parameters }) } else { Err(NamedError::Empty) }
    }
}

fn is_verb(word: &str) -> bool {
    VERBS.iter().any(|it| it.eq_ignore_ascii_case(word))
}

fn push_placeholder(text: &mut String, parameters: &mut Vec<String>, name: &str, dialect: Dialect) {
    let mut number = || match parameters.iter().position(|it| it == name) {
        Some(known) => known + 1,
        None => {
            parameters.push(name.to_owned());
            parameters.len()
        }
    };
    match dialect {
        Dialect::Postgres => text.push_str(&format!("${}", number())),
        Dialect::Sqlite => text.push_str(&format!("?{}", number())),
        Dialect::MySql => {
            parameters.push(name.to_owned());
            text.push('?');
        }
    }
}

/// Whether nothing but white space and comments is left.
fn is_gap(mut rest: &str, dialect: Dialect) -> Result<bool, NamedError> {
    while !rest.is_empty() {
        let (token, length) = next_token(rest, dialect)?;
        if token != Token::Gap {
            return Ok(false);
        }
        rest = &rest[length..];
    }
    Ok(true)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Token {
    /// White space or a comment.
    Gap,
    /// To be left as it is.
    Text,
    /// `:name`.
    Parameter,
    /// A placeholder of the database's own.
    Foreign,
    /// `;`.
    End,
}

/// What the text begins with, and how long that is; the text is not empty.
fn next_token(rest: &str, dialect: Dialect) -> Result<(Token, usize), NamedError> {
    use Dialect::{MySql, Postgres, Sqlite};

    let first = rest.chars().next().unwrap_or_default();
    let after = &rest[first.len_utf8()..];
    Ok(match (first, dialect) {
        (it, _) if is_space(it) => (Token::Gap, 1),
        ('-', _) if starts_line_comment(after, dialect) => (Token::Gap, line(rest, dialect)),
        ('#', MySql) => (Token::Gap, line(rest, dialect)),
        ('/', _) if after.starts_with('*') => (Token::Gap, block_comment(rest, dialect)?),
        ('\'' | '"', _) => (Token::Text, quoted(rest, first, dialect == MySql)?),
        ('`', MySql | Sqlite) => (Token::Text, quoted(rest, '`', false)?),
        ('[', Sqlite) => (Token::Text, up_to(rest, 1, "]")?),
        ('E' | 'e', Postgres) if after.starts_with('\'') => {
            (Token::Text, 1 + quoted(after, '\'', true)?)
        }
        ('$', Postgres) => dollar(rest)?,
        ('?', MySql | Sqlite) => (Token::Foreign, 1 + digits(after)),
        ('@' | '$', Sqlite) if name(after) > 0 => (Token::Foreign, 1 + name(after)),
        (':', _) if after.starts_with([':', '=']) => (Token::Text, 2),
        (':', _) if name(after) > 0 => (Token::Parameter, 1 + name(after)),
        (';', _) => (Token::End, 1),
        (it, _) if is_word(it) => (Token::Text, word(rest)),
        (it, _) => (Token::Text, it.len_utf8()),
    })
}

/// To MySQL, `5--1` is a sum.
fn starts_line_comment(after: &str, dialect: Dialect) -> bool {
    after.strip_prefix('-').is_some_and(|after| {
        dialect != Dialect::MySql
            || after.chars().next().is_none_or(|it| is_space(it) || it.is_control())
    })
}

fn line(rest: &str, dialect: Dialect) -> usize {
    let ends: &[char] = if dialect == Dialect::Postgres { &['\n', '\r'] } else { &['\n'] };
    rest.find(ends).unwrap_or(rest.len())
}

/// PostgreSQL's comments may hold others.
fn block_comment(rest: &str, dialect: Dialect) -> Result<usize, NamedError> {
    if dialect != Dialect::Postgres {
        return up_to(rest, 2, "*/");
    }
    let (mut depth, mut at) = (1_u32, 2);
    while depth > 0 {
        let inner = &rest[at..];
        let Some(found) = inner.find(['*', '/']) else { return Err(unterminated("/*")) };
        match inner.get(found..found + 2) {
            Some("/*") => (depth, at) = (depth + 1, at + found + 2),
            Some("*/") => (depth, at) = (depth - 1, at + found + 2),
            _ => at += found + 1,
        }
    }
    Ok(at)
}

/// How long a quotation is, in which the quote stands for itself when doubled.
fn quoted(rest: &str, quote: char, has_escapes: bool) -> Result<usize, NamedError> {
    let mut letters = rest.char_indices().skip(1).peekable();
    while let Some((at, letter)) = letters.next() {
        if letter == '\\' && has_escapes {
            letters.next();
        } else if letter == quote && letters.next_if(|(_, next)| *next == quote).is_none() {
            return Ok(at + 1);
        }
    }
    Err(unterminated(&quote.to_string()))
}

/// `$tag$ … $tag$`, `$1`, or a sign by itself.
fn dollar(rest: &str) -> Result<(Token, usize), NamedError> {
    let after = &rest[1..];
    if digits(after) > 0 {
        return Ok((Token::Foreign, 1 + digits(after)));
    }
    let is_tag = |it: char| is_word(it) && it != '$';
    let tag = after.len() - after.trim_start_matches(is_tag).len();
    if !after[tag..].starts_with('$') {
        return Ok((Token::Text, 1 + tag));
    }
    let fence = &rest[..tag + 2];
    Ok((Token::Text, up_to(rest, fence.len(), fence)?))
}

fn up_to(rest: &str, from: usize, end: &str) -> Result<usize, NamedError> {
    let found = rest[from..].find(end).ok_or_else(|| unterminated(&rest[..from]))?;
    Ok(from + found + end.len())
}

fn unterminated(begin: &str) -> NamedError {
    NamedError::Unterminated(begin.to_owned())
}

/// How long the name is that the text begins with: ASCII letters, digits, `_`.
fn name(text: &str) -> usize {
    if text.starts_with(|it: char| it.is_ascii_digit()) {
        return 0;
    }
    text.len() - text.trim_start_matches(|it: char| it.is_ascii_alphanumeric() || it == '_').len()
}

fn digits(text: &str) -> usize {
    text.len() - text.trim_start_matches(|it: char| it.is_ascii_digit()).len()
}

/// Whether a letter can be part of a word. In one, `$` quotes nothing and `E` begins no string.
fn is_word(letter: char) -> bool {
    letter.is_ascii_alphanumeric() || matches!(letter, '_' | '$') || !letter.is_ascii()
}

fn word(text: &str) -> usize {
    text.len() - text.trim_start_matches(is_word).len()
}

/// To databases, space beyond ASCII is a letter.
fn is_space(letter: char) -> bool {
    letter.is_ascii_whitespace() || letter == '\x0b'
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{Dialect::*, *};

    fn parsed(sql: &str, dialect: Dialect) -> (String, Vec<String>) {
        let statement = NamedStatement::parse(sql, dialect).unwrap();
        (statement.text, statement.parameters)
    }

    #[test]
    fn names_become_what_the_database_knows() {
        let sql = "INSERT INTO t VALUES (:email, :city, lower(:email));";
        for (dialect, text, parameters) in [
            (Postgres, "INSERT INTO t VALUES ($1, $2, lower($1))", &["email", "city"][..]),
            (Sqlite, "INSERT INTO t VALUES (?1, ?2, lower(?1))", &["email", "city"]),
            (MySql, "INSERT INTO t VALUES (?, ?, lower(?))", &["email", "city", "email"]),
        ] {
            let parameters = parameters.iter().map(|it| (*it).to_owned()).collect();
            assert_eq!(parsed(sql, dialect), (text.to_owned(), parameters), "{dialect:?}");
        }
    }

    #[test]
    fn what_only_looks_like_a_parameter_is_left_alone() {
        for (dialect, sql) in [
            (Postgres, "SELECT ':a', \":b\", E'it\\':s', 'x'':y', U&'\\0041:b'"),
            (Postgres, "SELECT '\\', now()::date, a::text, x[1:2], f(a := 1), j ? 'k'"),
            (Postgres, "SELECT $$:a '$$, $t$ :b $$ :c $t$, a$b, $ä$ :a $ä$"),
            (Postgres, "SELECT 1 -- :a '\n, 2 /* :b /* ' */ :c */"),
            (MySql, "SELECT ':a', 'it\\':s', \"x\\\":y\", `:c`, @v := 1, '\\\\'"),
            (MySql, "SELECT 1 # :a '\n, 2 -- :b\n, 3 /* :c /* */, 5--1"),
            (Sqlite, "SELECT ':a', \":b\", `:c`, [:d], '\\', '12:30' /* :e /* */ -- :f"),
        ] {
            assert_eq!(parsed(sql, dialect), (sql.to_owned(), vec![]), "{sql}");
        }
    }

    #[test]
    fn what_stands_beside_a_quotation_is_still_a_parameter() {
        for (dialect, sql, text) in [
            (Postgres, "SELECT '\\':a", "SELECT '\\'$1"),
            (Postgres, "SELECT :a::text", "SELECT $1::text"),
            (Postgres, "SELECT like'x':a", "SELECT like'x'$1"),
            (Postgres, "SELECT 1 /* /* */ */ + :a", "SELECT 1 /* /* */ */ + $1"),
            (Postgres, "SELECT 1 # :a", "SELECT 1 # $1"),
            (MySql, "SELECT 5--:a", "SELECT 5--?"),
            (MySql, "SELECT 1 /* /* */ + :a", "SELECT 1 /* /* */ + ?"),
            (Sqlite, "SELECT 'a\\':b", "SELECT 'a\\'?1"),
            (Sqlite, "SELECT ((:_a1))", "SELECT ((?1))"),
        ] {
            assert_eq!(parsed(sql, dialect).0, text, "{sql}");
        }
    }

    #[test]
    fn what_is_not_one_statement_with_names_is_refused() {
        let unterminated = |it: &str| NamedError::Unterminated(it.to_owned());
        let placeholder = |it: &str| NamedError::Placeholder(it.to_owned());
        for (dialect, sql, error) in [
            (Postgres, " -- nothing\n;", NamedError::Empty),
            (Postgres, "SELECT 1; SELECT 2", NamedError::Several),
            (Postgres, "SELECT 1;;", NamedError::Several),
            (Postgres, "SELECT 'a", unterminated("'")),
            (Postgres, "SELECT E'a\\'", unterminated("'")),
            (Postgres, "SELECT $t$ $$", unterminated("$t$")),
            (Postgres, "SELECT 1 /* /* */", unterminated("/*")),
            (Sqlite, "SELECT [a", unterminated("[")),
            (Postgres, "SELECT $1", placeholder("$1")),
            (MySql, "SELECT ?", placeholder("?")),
            (Sqlite, "SELECT ?12", placeholder("?12")),
            (Sqlite, "SELECT @a", placeholder("@a")),
            (Sqlite, "SELECT $a", placeholder("$a")),
            (Sqlite, "SELECT \0", NamedError::Nul),
            (Postgres, "/* x */ COMMIT", NamedError::Verb("COMMIT".to_owned())),
            (MySql, "create table t (:a)", NamedError::Verb("create".to_owned())),
            (Sqlite, ":a", NamedError::Verb(":a".to_owned())),
        ] {
            assert_eq!(NamedStatement::parse(sql, dialect), Err(error), "{sql}");
        }
        let ended = "SELECT :a; -- and :b\n /* :c */ ";
        assert_eq!(parsed(ended, Postgres), ("SELECT $1".to_owned(), vec!["a".to_owned()]));
    }

    /// A piece of SQL, and whether it names a parameter.
    fn piece(dialect: Dialect) -> impl Strategy<Value = (String, bool)> {
        let text = "[ a-z:;?$'\"`\\\\*/#\\[\\]-]{0,12}";
        let doubled = |text: String, quote: char| {
            let twice = format!("{quote}{quote}");
            format!("{quote}{}{quote}", text.replace(quote, &twice))
        };
        let escaped = move |text: String| match dialect {
            MySql => text.replace('\\', "\\\\"),
            Postgres | Sqlite => text,
        };
        let identifier = if dialect == Postgres { '"' } else { '`' };
        prop_oneof![
            text.prop_map(move |it| (doubled(escaped(it), '\''), false)),
            text.prop_map(move |it| (doubled(it, identifier), false)),
            text.prop_map(|it| (format!("/*{} */", it.replace(['*', '/'], "")), false)),
            text.prop_map(|it| (format!("-- {it}\n"), false)),
            "[a-z][a-z0-9_]{0,5}".prop_map(|it| (it, false)),
            Just(("::".to_owned(), false)),
            "[a-z_][a-z0-9_]{0,3}".prop_map(|it| (format!(":{it}"), true)),
        ]
    }

    fn pieces() -> impl Strategy<Value = (Dialect, Vec<(String, bool)>)> {
        prop_oneof![Just(Postgres), Just(MySql), Just(Sqlite)]
            .prop_flat_map(|it| (Just(it), prop::collection::vec(piece(it), 1..12)))
    }

    proptest! {
        #[test]
        fn exactly_the_parameters_are_replaced((dialect, pieces) in pieces()) {
            let join = |pieces: Vec<&str>| format!("SELECT {}", pieces.join(" "));
            let sql = join(pieces.iter().map(|(text, _)| text.as_str()).collect());
            let (text, parameters) = parsed(&sql, dialect);

            let named: Vec<_> = pieces.iter().filter(|it| it.1).map(|it| &it.0[1..]).collect();
            let mut expected: Vec<&str> = Vec::new();
            for name in &named {
                if dialect == MySql || !expected.contains(name) {
                    expected.push(name);
                }
            }
            prop_assert_eq!(&parameters, &expected);
            let placeholder = |name: &str| {
                let number = expected.iter().position(|it| *it == name).unwrap() + 1;
                match dialect {
                    Postgres => format!("${number}"),
                    Sqlite => format!("?{number}"),
                    MySql => "?".to_owned(),
                }
            };
            let replaced: Vec<_> = pieces
                .iter()
                .map(|(text, is_named)| if *is_named { placeholder(&text[1..]) } else { text.clone() })
                .collect();
            prop_assert_eq!(text, join(replaced.iter().map(String::as_str).collect()));
        }

        #[test]
        fn any_text_is_read_to_its_end_or_refused(sql in ".{0,60}", odd in "[:'\"$a?`/*;\\\\E -]{0,40}") {
            for dialect in [Postgres, MySql, Sqlite] {
                for sql in [&sql, &odd] {
                    let sql = format!("SELECT {sql}");
                    let Ok(read) = NamedStatement::parse(&sql, dialect) else { continue };
                    if read.parameters.is_empty() && !sql.contains(';') {
                        prop_assert_eq!(&read.text, &sql);
                    }
                }
            }
        }
    }
}
