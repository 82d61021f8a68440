//! Puts a user into `nats.conf`, as text: comments and layout stay as somebody wrote them. Pure.

use std::ops::Range;

/// The account that has the stream.
pub(super) const ACCOUNT: &str = "VESTIBULE";

/// The file with one user more at the end of the account's `users`.
pub(super) fn with_user(text: &str, name: &str, user: &str) -> Result<String, String> {
    let tokens = tokens(text);
    let users = users(text, &tokens).ok_or_else(|| {
        format!(
            "it has no list of users at accounts {{ {ACCOUNT} {{ users: [ … ] }} }}; without --apply \
             the user is printed, to be put where it belongs"
        )
    })?;
    let inside = tokens.iter().filter(|it| users.contains(&it.start));
    let words: Vec<_> = inside.map(|it| text[it.clone()].trim_matches(['"', '\''])).collect();
    if words.windows(2).any(|it| it == ["user", name]) {
        return Err(format!("it has a user {name} already; take it out first"));
    }
    let line = text[..users.end].rfind('\n').map_or(0, |it| it + 1);
    let before = &text[line..users.end];
    let indent = if before.trim().is_empty() { before } else { "" };
    let user: Vec<_> = user.lines().map(|it| format!("{indent}  {it}")).collect();
    let (place, user) = match before.trim() {
        "" => (line, format!("\n{}\n", user.join("\n"))),
        _ => (users.end, format!("\n{}\n", user.join("\n"))),
    };
    Ok([&text[..place], &user, &text[place..]].concat())
}

/// The environment variables that the file takes values from.
pub(super) fn variables(text: &str) -> impl Iterator<Item = &str> {
    tokens(text).into_iter().filter_map(|it| {
        let name = text[it].strip_prefix('$')?;
        // A hash begins with `$2a$`.
        let is_name = name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
        is_name.then_some(name)
    })
}

/// What is between the brackets of `accounts.VESTIBULE.users`.
fn users(text: &str, tokens: &[Range<usize>]) -> Option<Range<usize>> {
    let mut path: Vec<(&str, usize)> = Vec::new();
    let mut key = "";
    for token in tokens {
        match &text[token.clone()] {
            "{" | "[" => {
                path.push((key, token.end));
                key = "";
            }
            "}" | "]" => {
                let keys: Vec<_> = path.iter().map(|(key, _)| *key).collect();
                let (_, begin) = path.pop()?;
                if keys == ["accounts", ACCOUNT, "users"] {
                    return Some(begin..token.start);
                }
                key = "";
            }
            word => key = word.trim_matches(['"', '\'']),
        }
    }
    None
}

/// Brackets, words and quoted texts. Comments are none, and neither is what only separates.
fn tokens(text: &str) -> Vec<Range<usize>> {
    let bytes = text.as_bytes();
    let until = |from: usize, end: &dyn Fn(u8) -> bool| {
        bytes[from..].iter().position(|b| end(*b)).map_or(bytes.len(), |it| from + it)
    };
    let mut tokens = Vec::new();
    let mut at = 0;
    while let Some(&byte) = bytes.get(at) {
        let end = match byte {
            b'{' | b'}' | b'[' | b']' => at + 1,
            quote @ (b'"' | b'\'') => (until(at + 1, &|b| b == quote) + 1).min(bytes.len()),
            b'#' => {
                at = until(at, &|b| b == b'\n');
                continue;
            }
            b'/' if bytes.get(at + 1) == Some(&b'/') => {
                at = until(at, &|b| b == b'\n');
                continue;
            }
            b if b.is_ascii_whitespace() || b":=,;".contains(&b) => {
                at += 1;
                continue;
            }
            _ => until(at, &|b| b.is_ascii_whitespace() || b":=,;{}[]\"'".contains(&b)),
        };
        tokens.push(at..end);
        at = end;
    }
    tokens
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHIPPED: &str = include_str!("../../../nats.conf");
    const USER: &str = "{\n  user: crm\n}";

    #[test]
    fn a_user_is_put_last_and_the_rest_stays_as_it_was() {
        let changed = with_user(SHIPPED, "crm", USER).unwrap();
        let place = changed.find("user: crm").unwrap();
        assert!(changed.find("user: provisioner").unwrap() < place);
        assert!(place < changed.find("system_account").unwrap());
        assert!(changed.contains("\n      {\n        user: crm\n      }\n    ]\n"), "{changed}");
        assert_eq!(changed.replacen("\n      {\n        user: crm\n      }\n", "", 1), SHIPPED);
    }

    #[test]
    fn a_user_is_there_once() {
        let changed = with_user(SHIPPED, "crm", USER).unwrap();
        assert!(with_user(&changed, "crm", USER).unwrap_err().contains("already"));
        assert!(with_user(SHIPPED, "relay", USER).unwrap_err().contains("already"));
    }

    #[test]
    fn brackets_in_texts_and_comments_do_not_count() {
        let conf = "accounts: {\n OTHER { users: [ {user: x} ] }\n # VESTIBULE { users: [ ] }\n \
                    VESTIBULE = { // }}\n  users = [ { user: 'a]', password: \"b}\" } ]\n } }\n";
        let changed = with_user(conf, "crm", USER).unwrap();
        let (before, after) = changed.split_once("user: crm").unwrap();
        assert!(before.contains("password: \"b}\" }"), "{changed}");
        assert!(after.trim_start_matches(['\n', ' ', '}']).starts_with("]\n } }"), "{changed}");
    }

    #[test]
    fn a_file_without_the_account_is_refused() {
        for conf in ["", "authorization { users: [ ] }", "accounts { VESTIBULE { users: [ "] {
            assert!(
                with_user(conf, "crm", USER).unwrap_err().contains("no list of users"),
                "{conf}"
            );
        }
    }

    #[test]
    fn the_variables_of_a_file_are_known() {
        let names: Vec<_> = variables("a: $A_1\nb: \"$NO\"\nc: $2a$04$x # $C").collect();
        assert_eq!(names, ["A_1"]);
    }
}
