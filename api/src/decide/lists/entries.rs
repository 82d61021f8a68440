//! Many short texts, found in constant time and kept in little memory.

use std::{
    borrow::Cow,
    fmt,
    hash::{BuildHasher, RandomState},
};

use hashbrown::HashTable;

/// All entries lie one after the other in one text; the table holds only where each begins and
/// ends: eight bytes an entry instead of an allocation and three words.
pub(super) struct Entries {
    text: String,
    places: HashTable<Span>,
    hasher: RandomState,
    ignore_case: bool,
}

/// Leaves the entries out: they may be people.
impl fmt::Debug for Entries {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Entries({})", self.len())
    }
}

#[derive(Clone, Copy)]
struct Span {
    start: u32,
    end: u32,
}

/// What is wrong with an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EntryFault {
    #[error("it is empty")]
    Empty,
    #[error("it is not UTF-8 text")]
    NotText,
    #[error("it holds a NUL character")]
    Nul,
    #[error("it is longer than {} bytes", Self::BYTES_MAX)]
    TooLong,
    #[error("with it the list would hold more than 4 GiB")]
    TooMuch,
}

impl EntryFault {
    /// Longer than any address or identifier; what is longer is a file of another kind.
    pub const BYTES_MAX: usize = 1024;
}

impl Entries {
    pub(super) fn new(ignore_case: bool) -> Self {
        Self::with_room(ignore_case, 0, 0)
    }

    /// Where it is known how much there may be, filling takes half the time: nothing is moved.
    pub(super) fn with_room(ignore_case: bool, entries: usize, bytes: usize) -> Self {
        Self {
            text: String::with_capacity(bytes),
            places: HashTable::with_capacity(entries),
            hasher: RandomState::new(),
            ignore_case,
        }
    }

    /// Gives back the room that was not needed.
    pub(super) fn shrink(&mut self) {
        self.text.shrink_to_fit();
        let Self { text, places, hasher, .. } = self;
        places.shrink_to_fit(|span| hasher.hash_one(span.of(text)));
    }

    /// Adding what is there already changes nothing.
    pub(super) fn insert(&mut self, entry: &str) -> Result<(), EntryFault> {
        if entry.is_empty() {
            return Err(EntryFault::Empty);
        }
        if entry.len() > EntryFault::BYTES_MAX {
            return Err(EntryFault::TooLong);
        }
        if entry.contains('\0') {
            return Err(EntryFault::Nul);
        }
        let entry = self.folded(entry);
        let hash = self.hasher.hash_one(entry.as_bytes());
        if self.find(hash, &entry) {
            return Ok(());
        }
        let offset = |at: usize| u32::try_from(at).map_err(|_| EntryFault::TooMuch);
        let start = offset(self.text.len())?;
        let end = offset(self.text.len() + entry.len())?;
        self.text.push_str(&entry);
        let Self { text, places, hasher, .. } = self;
        places.insert_unique(hash, Span { start, end }, |span| hasher.hash_one(span.of(text)));
        Ok(())
    }

    pub(super) fn contains(&self, entry: &str) -> bool {
        let entry = self.folded(entry);
        self.find(self.hasher.hash_one(entry.as_bytes()), &entry)
    }

    pub(super) fn len(&self) -> usize {
        self.places.len()
    }

    fn find(&self, hash: u64, entry: &str) -> bool {
        self.places.find(hash, |span| span.of(&self.text) == entry.as_bytes()).is_some()
    }

    /// Letter by letter, so that a letter folds the same wherever it stands.
    fn folded<'a>(&self, entry: &'a str) -> Cow<'a, str> {
        if !self.ignore_case {
            return entry.into();
        }
        if entry.is_ascii() {
            return if entry.bytes().any(|byte| byte.is_ascii_uppercase()) {
                entry.to_ascii_lowercase().into()
            } else {
                entry.into()
            };
        }
        entry.chars().flat_map(char::to_lowercase).collect()
    }
}

impl Span {
    fn of(self, text: &str) -> &[u8] {
        let place = |at: u32| usize::try_from(at).expect("32 bits fit into an address");
        &text.as_bytes()[place(self.start)..place(self.end)]
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn case_counts_unless_it_is_to_be_ignored() {
        let of = |ignore_case| {
            let mut entries = Entries::new(ignore_case);
            for entry in ["Ada", "ada", "ZOË", "ΟΔΟΣ"] {
                entries.insert(entry).unwrap();
            }
            entries
        };
        let (exact, folded) = (of(false), of(true));
        assert_eq!((exact.len(), folded.len()), (4, 3));
        for (entry, is_exact) in [("ADA", false), ("Ada", true), ("zoë", false), ("οδοσ", false)]
        {
            assert_eq!(exact.contains(entry), is_exact, "{entry}");
            assert!(folded.contains(entry), "{entry}");
        }
    }

    proptest! {
        #[test]
        fn upper_and_lower_case_are_found_alike(entry in "[a-zA-Z0-9.@_-]{1,20}") {
            let mut entries = Entries::new(true);
            entries.insert(&entry).unwrap();
            prop_assert!(entries.contains(&entry.to_ascii_uppercase()));
            prop_assert!(entries.contains(&entry.to_ascii_lowercase()));
        }
    }
}
