//! What a long-running command may say about an event: a line of JSON.

use std::time::Duration;

use anyhow::anyhow;
use serde::Deserialize;
use uuid::Uuid;

use crate::{Cause, HandleError};

/// What has become of an event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    Done,
    Retry { why: String, after: Option<Duration> },
    Park { why: String },
}

/// Reads a line; `None` if it is no answer.
pub(super) fn parse(line: &[u8]) -> Option<(Uuid, Answer)> {
    let Line { id, ok, retry, park, after } = serde_json::from_slice(line).ok()?;
    let answer = match (ok, retry, park) {
        (Some(true), None, None) => Answer::Done,
        (None | Some(false), Some(why), None) => Answer::Retry { why, after: pause(after) },
        (None | Some(false), None, Some(why)) => Answer::Park { why },
        (Some(false), None, None) => {
            Answer::Retry { why: "it gave no reason".to_owned(), after: pause(after) }
        }
        _ => return None,
    };
    Some((id, answer))
}

/// The event's `id`, and one of `"ok": true`, `"retry": "why"`, `"park": "why"`.
#[derive(Deserialize)]
struct Line {
    id: Uuid,
    ok: Option<bool>,
    retry: Option<String>,
    park: Option<String>,
    after: Option<String>,
}

/// A pause that cannot be read is as if it were not asked for: the answer itself is clear.
fn pause(text: Option<String>) -> Option<Duration> {
    humantime::parse_duration(&text?).ok()
}

impl Answer {
    /// The reason is kept with the attempt: whoever writes the command is told that it must hold no
    /// personal data.
    pub(super) fn outcome(self) -> Result<(), HandleError> {
        match self {
            Self::Done => Ok(()),
            Self::Retry { why, after } => Err(HandleError::Retry {
                source: anyhow!("the command asks to try again: {why}"),
                cause: Cause::Unavailable,
                after,
            }),
            Self::Park { why } => {
                Err(HandleError::park(Cause::Refused, anyhow!("the command gives it up: {why}")))
            }
        }
    }
}

/// Cuts what is read into lines, none longer than a bound.
#[derive(Debug, Default)]
pub(super) struct Lines {
    begun: Vec<u8>,
    /// The line that is being read is longer than the bound, so the rest of it is dropped too.
    is_too_long: bool,
}

impl Lines {
    /// Hands each line that ends in `chunk` to `take`; `None` for one that is too long.
    pub(super) fn feed(
        &mut self,
        chunk: &[u8],
        bytes_max: usize,
        mut take: impl FnMut(Option<&[u8]>),
    ) {
        let mut parts = chunk.split(|byte| *byte == b'\n').peekable();
        while let Some(part) = parts.next() {
            self.is_too_long |= self.begun.len() + part.len() > bytes_max;
            if !self.is_too_long {
                self.begun.extend_from_slice(part);
            }
            if parts.peek().is_some() {
                take((!self.is_too_long).then_some(&self.begun));
                self.begun.clear();
                self.is_too_long = false;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ID: &str = "01890a5d-ac96-774b-bcce-b302099a8057";

    fn said(rest: &str) -> Option<Answer> {
        let (id, answer) = parse(format!("{{\"id\":\"{ID}\"{rest}}}").as_bytes())?;
        assert_eq!(id.to_string(), ID);
        Some(answer)
    }

    #[test]
    fn an_answer_says_one_thing_about_one_event() {
        let retry = |after| Answer::Retry { why: "busy".to_owned(), after };
        let half_a_minute = Some(Duration::from_secs(30));
        assert_eq!(said(r#","ok":true"#), Some(Answer::Done));
        assert_eq!(said(r#","ok":true,"took":"3ms""#), Some(Answer::Done), "more may be said");
        assert_eq!(said(r#","retry":"busy""#), Some(retry(None)));
        assert_eq!(said(r#","retry":"busy","after":"30s""#), Some(retry(half_a_minute)));
        assert_eq!(said(r#","retry":"busy","after":"soon""#), Some(retry(None)));
        assert_eq!(
            said(r#","ok":false,"park":"odd""#),
            Some(Answer::Park { why: "odd".to_owned() })
        );
        assert!(matches!(said(r#","ok":false"#), Some(Answer::Retry { .. })));

        for nonsense in
            ["", r#","ok":true,"retry":"busy""#, r#","retry":"a","park":"b""#, r#","ok":1"#]
        {
            assert_eq!(said(nonsense), None, "{nonsense}");
        }
        for nonsense in ["", "hello", "[]", "{}", r#"{"id":"1","ok":true}"#, "\u{0}"] {
            assert_eq!(parse(nonsense.as_bytes()), None, "{nonsense}");
        }
    }

    proptest! {
        #[test]
        fn lines_are_the_same_however_the_text_is_cut(
            text in "[a\n]{0,60}",
            cuts in proptest::collection::vec(0..60_usize, 0..6),
            bytes_max in 1..10_usize,
        ) {
            let mut cuts: Vec<_> = cuts.into_iter().map(|it| it.min(text.len())).collect();
            cuts.extend([0, text.len()]);
            cuts.sort_unstable();
            let (mut lines, mut found) = (Lines::default(), Vec::new());
            for pair in cuts.windows(2) {
                lines.feed(&text.as_bytes()[pair[0]..pair[1]], bytes_max, |line| {
                    found.push(line.map(<[u8]>::to_vec));
                });
            }
            let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
            let expected = whole.split('\n').map(|it| (it.len() <= bytes_max).then(|| it.as_bytes().to_vec()));
            let expected: Vec<_> = if text.contains('\n') { expected.collect() } else { vec![] };
            prop_assert_eq!(found, expected);
        }

        #[test]
        fn no_line_makes_it_panic(line in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse(&line);
        }
    }
}
