//! The words of a failure, as they may be kept and logged.

/// Longer than any message of ours; a foreign one is cut.
const LONGEST: usize = 500;

/// The error with its causes, on one line, without what looks like an address.
///
/// Workers promise that their errors hold no personal data. This is the second lock on that door:
/// a mail server's reply or a library's message may quote an address after all.
pub(super) fn of(error: &anyhow::Error) -> String {
    scrub(&format!("{error:#}"))
}

fn scrub(text: &str) -> String {
    let words: Vec<_> =
        text.split_whitespace().map(|word| if word.contains('@') { "…" } else { word }).collect();
    let mut text = words.join(" ");
    if text.len() > LONGEST {
        text.truncate(text.floor_char_boundary(LONGEST));
        text.push('…');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_does_not_pass_and_a_novel_is_cut() {
        let error = anyhow::anyhow!("550 no such user\r\n<ada@example.com>").context("not sent");
        assert_eq!(of(&error), "not sent: 550 no such user …");
        let long = scrub(&"ä ".repeat(1000));
        assert!(long.len() <= LONGEST + '…'.len_utf8() && long.ends_with('…'));
    }
}
