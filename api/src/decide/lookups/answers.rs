//! The answers that a lookup remembers: bounded, and found by their arguments.
//!
//! The arguments themselves are not kept. A key is their digest under a secret of this process, so
//! that nobody can choose arguments that are taken for somebody else's.

use std::{fmt, io, sync::Arc, time::Duration};

use quick_cache::{Weighter, sync::Cache};
use rand::Rng;
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};
use tokio::time::Instant;

/// How long answers are good for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheSettings {
    /// For so long an answer is given without asking the source.
    pub fresh: Duration,
    /// For so long after that it is given where the source gives none.
    pub stale: Duration,
    /// How many answers are remembered; one of more than a KiB counts for each KiB. Zero: none.
    pub entries: usize,
}

pub(super) type Answer = Arc<Map<String, Value>>;

/// Arguments of more bytes than this (as JSON) are nothing a source should be asked about.
const ARGUMENT_BYTES_MAX: usize = 16 * 1024;

/// The size of the digest's block, so that the secret is worked in once and for all.
const SECRET_BYTES: usize = 64;

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Key([u8; 32]);

pub(super) struct Answers {
    keyed: Sha256,
    cache: Option<Cache<Key, Kept, Weight>>,
    settings: CacheSettings,
}

impl fmt::Debug for Answers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Answers({})", self.cache.as_ref().map_or(0, Cache::len))
    }
}

#[derive(Clone)]
struct Kept {
    answer: Answer,
    since: Instant,
    weight: u64,
}

#[derive(Clone)]
struct Weight;

impl Weighter<Key, Kept> for Weight {
    fn weight(&self, _: &Key, kept: &Kept) -> u64 {
        kept.weight
    }
}

impl Answers {
    pub(super) fn new(settings: CacheSettings) -> Self {
        let mut secret = [0; SECRET_BYTES];
        rand::rng().fill_bytes(&mut secret);
        let CacheSettings { entries, fresh, stale } = settings;
        let used = entries > 0 && !(fresh + stale).is_zero();
        let cache = used.then(|| {
            let weight = u64::try_from(entries).unwrap_or(u64::MAX);
            // What is expected to be there at once; the bound is the weight.
            Cache::with_weighter(entries.min(100_000), weight, Weight)
        });
        Self { keyed: Sha256::new_with_prefix(secret), cache, settings }
    }

    /// `None` where the arguments are too large to ask about.
    pub(super) fn key(&self, arguments: &[Value]) -> Option<Key> {
        let mut text = Bounded(Vec::with_capacity(256));
        serde_json::to_writer(&mut text, arguments).ok()?;
        let mut digest = self.keyed.clone();
        digest.update(&text.0);
        Some(Key(digest.finalize().into()))
    }

    pub(super) fn fresh(&self, key: &Key, now: Instant) -> Option<Answer> {
        self.younger_than(self.settings.fresh, key, now)
    }

    /// An answer that is good enough if there is no better one.
    pub(super) fn stale(&self, key: &Key, now: Instant) -> Option<Answer> {
        self.younger_than(self.settings.fresh + self.settings.stale, key, now)
    }

    fn younger_than(&self, age: Duration, key: &Key, now: Instant) -> Option<Answer> {
        let kept = self.cache.as_ref()?.get(key)?;
        (now.saturating_duration_since(kept.since) < age).then_some(kept.answer)
    }

    /// `bytes` is about the size of the answer.
    pub(super) fn keep(&self, key: Key, answer: Answer, bytes: usize, now: Instant) {
        if let Some(cache) = &self.cache {
            let weight = 1 + u64::try_from(bytes / 1024).unwrap_or(u64::MAX);
            cache.insert(key, Kept { answer, since: now, weight });
        }
    }
}

/// Takes so many bytes and no more.
struct Bounded(Vec<u8>);

impl io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > ARGUMENT_BYTES_MAX {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    const MINUTE: Duration = Duration::from_secs(60);

    fn answers(entries: usize) -> Answers {
        Answers::new(CacheSettings { fresh: MINUTE, stale: MINUTE * 2, entries })
    }

    fn answer() -> Answer {
        Arc::default()
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_is_fresh_then_stale_then_gone() {
        let (answers, now) = (answers(10), Instant::now());
        let key = answers.key(&[json!("ada")]).unwrap();
        answers.keep(key, answer(), 10, now);
        let seen = |at: Duration| {
            (answers.fresh(&key, now + at).is_some(), answers.stale(&key, now + at).is_some())
        };
        let moment = Duration::from_millis(1);
        assert_eq!(seen(Duration::ZERO), (true, true));
        assert_eq!(seen(MINUTE - moment), (true, true));
        assert_eq!(seen(MINUTE), (false, true));
        assert_eq!(seen(MINUTE * 3 - moment), (false, true));
        assert_eq!(seen(MINUTE * 3), (false, false));
    }

    #[tokio::test(start_paused = true)]
    async fn no_more_is_kept_than_was_said_however_large_the_answers() {
        for (entries, bytes, most) in [(100, 10, 100), (100, 5 * 1024, 20), (0, 10, 0)] {
            let answers = answers(entries);
            for n in 0..1000 {
                let key = answers.key(&[json!(n)]).unwrap();
                answers.keep(key, answer(), bytes, Instant::now());
            }
            let kept = answers.cache.as_ref().map_or(0, Cache::len);
            assert!(kept <= most && (kept > 0 || most == 0), "{kept} of {entries}");
        }
    }

    #[test]
    fn arguments_beyond_the_limit_have_no_key() {
        let answers = answers(1);
        // Two brackets and two quotation marks are counted, too.
        let of = |bytes: usize| answers.key(&[json!("x".repeat(bytes))]);
        assert!(of(ARGUMENT_BYTES_MAX - 4).is_some());
        assert!(of(ARGUMENT_BYTES_MAX - 3).is_none());
    }

    #[test]
    fn a_key_means_something_in_its_own_process_only() {
        let (one, other) = (answers(1), answers(1));
        assert!(one.key(&[json!("ada")]).unwrap().0 != other.key(&[json!("ada")]).unwrap().0);
    }

    proptest! {
        #[test]
        fn different_arguments_have_different_keys(
            one in prop::collection::vec("[a\",\\]\\\\]{0,4}", 0..4),
            other in prop::collection::vec("[a\",\\]\\\\]{0,4}", 0..4),
        ) {
            let answers = answers(1);
            let key = |texts: &[String]| {
                let values: Vec<Value> = texts.iter().map(|it| it.as_str().into()).collect();
                answers.key(&values).unwrap().0
            };
            prop_assert_eq!(one == other, key(&one) == key(&other));
        }
    }
}
