//! Lists: named sets of values, in memory, asked whether they hold an entry.
//!
//! A list comes from the configuration, from a file or from a database, and is loaded whole or not
//! at all: a mistake in one entry is an error with its place, never a list with a hole. Loading it
//! again, and what is in force meanwhile, is left to the caller; [`ListSettings::stamp`] says
//! cheaply whether a file has changed. Errors say where, never what: entries may be people.

mod entries;

use std::{
    fmt, io,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use self::entries::Entries;
pub use self::entries::EntryFault;
use super::lookups::{
    DatabaseUrl, SqlFault,
    sql::{Limits, Sql},
};

#[derive(Clone, Debug)]
pub struct ListSettings {
    pub name: String,
    pub source: ListSource,
    /// Entries that differ only in upper and lower case are the same.
    pub ignore_case: bool,
}

#[derive(Clone)]
pub enum ListSource {
    Inline(Vec<String>),
    /// One entry a line. Space around it does not count; a `#` at the beginning of a line or after
    /// a space begins a comment.
    File(PathBuf),
    /// The first column of each row.
    Sql {
        database: DatabaseUrl,
        query: String,
        /// How often the caller loads it again.
        refresh: Duration,
    },
}

/// Leaves the entries out.
impl fmt::Debug for ListSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Inline(entries) => write!(f, "Inline({})", entries.len()),
            Self::File(path) => write!(f, "File({})", path.display()),
            Self::Sql { database, query, refresh } => {
                write!(f, "Sql({database:?}, {query:?}, {refresh:?})")
            }
        }
    }
}

/// Millions of rows take a while; more than this is a query that went wrong.
const SQL_TIME_LIMIT: Duration = Duration::from_secs(60);

/// A set of values.
pub struct List {
    name: String,
    entries: Entries,
    stamp: Option<FileStamp>,
}

/// Name and count only: entries may be people.
impl fmt::Debug for List {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "List({}, {})", self.name, self.len())
    }
}

/// A file at one moment. Another stamp means another content, as far as can be told without
/// reading it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileStamp {
    changed: Option<SystemTime>,
    bytes: u64,
    /// A file that was moved into the place of another is another one, however alike they look.
    id: u64,
}

/// A list that could not be loaded.
#[derive(Debug, thiserror::Error)]
#[error("could not load the list `{list}`: {fault}")]
pub struct ListError {
    pub list: String,
    /// Told with the error, so it is not its source as well.
    pub fault: ListFault,
}

#[derive(Debug, thiserror::Error)]
pub enum ListFault {
    #[error("{} cannot be read: {}", .path.display(), .error)]
    Unreadable { path: PathBuf, error: io::Error },
    #[error("{} is not a file", .0.display())]
    NotAFile(PathBuf),
    #[error("{} is larger than 4 GiB", .0.display())]
    TooLarge(PathBuf),
    #[error("{place}: {fault}")]
    Entry { place: Place, fault: EntryFault },
    #[error(transparent)]
    Sql(#[from] SqlFault),
}

/// Where in a list; counted from one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    Entry(usize),
    Line { path: PathBuf, line: usize },
    Row(usize),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Entry(number) => write!(f, "entry {number}"),
            Self::Line { path, line } => write!(f, "{}, line {line}", path.display()),
            Self::Row(number) => write!(f, "row {number}"),
        }
    }
}

impl ListError {
    /// Whether it may be gone tomorrow without anybody changing the configuration.
    #[must_use]
    pub fn is_temporary(&self) -> bool {
        matches!(&self.fault, ListFault::Sql(fault) if fault.is_temporary())
    }
}

impl ListSettings {
    /// The stamp of the file, now; `None` where the list is in no file or there is none.
    ///
    /// A list that was loaded has the stamp that its file had then.
    #[must_use]
    pub fn stamp(&self) -> Option<FileStamp> {
        let ListSource::File(path) = &self.source else { return None };
        FileStamp::read(path)
    }
}

impl FileStamp {
    /// The stamp of a file or folder, now; `None` where there is none to be seen.
    #[must_use]
    pub fn read(path: &Path) -> Option<Self> {
        std::fs::metadata(path).ok().as_ref().map(Self::of)
    }

    fn of(metadata: &std::fs::Metadata) -> Self {
        #[cfg(unix)]
        let id = std::os::unix::fs::MetadataExt::ino(metadata);
        #[cfg(not(unix))]
        let id = 0;
        Self { changed: metadata.modified().ok(), bytes: metadata.len(), id }
    }
}

impl List {
    /// Reads all of it. Files are read on a thread that may block.
    pub async fn load(settings: &ListSettings) -> Result<Self, ListError> {
        let ListSettings { name, source, ignore_case } = settings.clone();
        let loaded = match source {
            ListSource::Inline(given) => from_inline(&given, ignore_case).map(|it| (it, None)),
            ListSource::File(path) => {
                let reading = move || from_file(&path, ignore_case);
                match tokio::task::spawn_blocking(reading).await {
                    Ok(loaded) => loaded.map(|(entries, stamp)| (entries, Some(stamp))),
                    Err(crash) => std::panic::resume_unwind(crash.into_panic()),
                }
            }
            ListSource::Sql { database, query, .. } => {
                from_sql(&database, &query, ignore_case).await.map(|it| (it, None))
            }
        };
        match loaded {
            Ok((entries, stamp)) => Ok(Self { name, entries, stamp }),
            Err(fault) => Err(ListError { list: name, fault }),
        }
    }

    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    #[must_use]
    pub fn contains(&self, entry: &str) -> bool {
        self.entries.contains(entry)
    }

    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// What [`ListSettings::stamp`] said when the list was read.
    #[must_use]
    pub fn stamp(&self) -> Option<FileStamp> {
        self.stamp
    }
}

fn from_inline(given: &[String], ignore_case: bool) -> Result<Entries, ListFault> {
    let mut entries = Entries::new(ignore_case);
    for (number, entry) in given.iter().enumerate() {
        let place = Place::Entry(number + 1);
        entries.insert(entry.trim()).map_err(|fault| ListFault::Entry { place, fault })?;
    }
    Ok(entries)
}

fn from_file(path: &Path, ignore_case: bool) -> Result<(Entries, FileStamp), ListFault> {
    let unreadable = |error| ListFault::Unreadable { path: path.to_owned(), error };
    // Asked first: to open a pipe would be to wait for somebody to write to it.
    if !std::fs::metadata(path).map_err(unreadable)?.is_file() {
        return Err(ListFault::NotAFile(path.to_owned()));
    }
    let mut file = std::fs::File::open(path).map_err(unreadable)?;
    // Before reading, so that a change meanwhile is noticed and not missed.
    let stamp = FileStamp::of(&file.metadata().map_err(unreadable)?);
    if stamp.bytes > u64::from(u32::MAX) {
        return Err(ListFault::TooLarge(path.to_owned()));
    }
    let mut bytes = Vec::new();
    io::Read::read_to_end(&mut file, &mut bytes).map_err(unreadable)?;
    let entries = from_lines(&bytes, ignore_case).map_err(|(line, fault)| ListFault::Entry {
        place: Place::Line { path: path.to_owned(), line },
        fault,
    })?;
    Ok((entries, stamp))
}

fn from_lines(bytes: &[u8], ignore_case: bool) -> Result<Entries, (usize, EntryFault)> {
    let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
    let lines = || bytes.split(|byte| *byte == b'\n');
    let filled = lines().filter(|line| !line.trim_ascii().is_empty()).count();
    let mut entries = Entries::with_room(ignore_case, filled, bytes.len());
    for (number, line) in lines().enumerate() {
        let located = |fault| (number + 1, fault);
        let line = std::str::from_utf8(line).map_err(|_| located(EntryFault::NotText))?;
        let entry = without_comment(line).trim();
        if !entry.is_empty() {
            entries.insert(entry).map_err(located)?;
        }
    }
    entries.shrink();
    Ok(entries)
}

fn without_comment(line: &str) -> &str {
    let mut after_space = true;
    for (at, character) in line.char_indices() {
        if character == '#' && after_space {
            return &line[..at];
        }
        after_space = character.is_whitespace();
    }
    line
}

async fn from_sql(
    database: &DatabaseUrl,
    query: &str,
    ignore_case: bool,
) -> Result<Entries, ListFault> {
    let sql = Sql::new(database, query, Limits { connections: 1, time: SQL_TIME_LIMIT });
    let mut entries = Entries::new(ignore_case);
    let (mut row, mut wrong) = (0, None);
    let mut each = |entry: String| {
        row += 1;
        let entry = entry.trim();
        if entry.is_empty() {
            return true;
        }
        let inserted = entries.insert(entry);
        wrong = inserted.err().map(|fault| ListFault::Entry { place: Place::Row(row), fault });
        wrong.is_none()
    };
    sql.first_column(&mut each).await?;
    entries.shrink();
    wrong.map_or(Ok(entries), Err)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn list(lines: &str) -> Entries {
        from_lines(lines.as_bytes(), false).unwrap()
    }

    #[test]
    fn a_file_may_have_comments_space_and_the_line_ends_of_any_system() {
        let list = list(
            "\u{feff}# people\r\nada@example.com\r\n\n  bob # since May\t\n\tC# developer\n#x\nlast",
        );
        assert_eq!(list.len(), 4);
        for entry in ["ada@example.com", "bob", "C# developer", "last"] {
            assert!(list.contains(entry), "{entry}");
        }
        for other in ["", "# people", "#x", "bob # since May", "ADA@example.com", "x"] {
            assert!(!list.contains(other), "{other}");
        }
    }

    #[test]
    fn a_bad_line_is_told_by_its_number() {
        let long = "x".repeat(EntryFault::BYTES_MAX + 1);
        for (lines, line, fault) in [
            (b"a\n\xff\n".to_vec(), 2, EntryFault::NotText),
            (b"a\n\nb\0c".to_vec(), 3, EntryFault::Nul),
            (format!("{long}\na").into_bytes(), 1, EntryFault::TooLong),
        ] {
            assert_eq!(from_lines(&lines, false).unwrap_err(), (line, fault));
        }
        assert!(from_lines(&long.as_bytes()[1..], false).is_ok(), "the longest that may be");
    }

    #[tokio::test]
    async fn a_list_in_the_configuration_has_no_empty_entries() {
        let settings = |entries: &[&str]| ListSettings {
            name: "vip".into(),
            source: ListSource::Inline(entries.iter().map(|it| (*it).to_owned()).collect()),
            ignore_case: true,
        };
        let list = List::load(&settings(&["Ada", " bob "])).await.unwrap();
        assert!(list.contains("ADA") && list.contains("bob") && !list.contains("eve"));
        assert_eq!(format!("{list:?}"), "List(vip, 2)");
        let error = List::load(&settings(&["a", " "])).await.unwrap_err();
        assert_eq!(error.to_string(), "could not load the list `vip`: entry 2: it is empty");
        assert!(!error.is_temporary());
    }

    #[tokio::test]
    async fn a_file_has_another_stamp_when_it_changed_and_must_be_one_that_fits() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("list");
        let settings = ListSettings {
            name: "l".into(),
            source: ListSource::File(path.clone()),
            ignore_case: false,
        };
        let missing = List::load(&settings).await.unwrap_err();
        assert!(missing.to_string().contains("cannot be read"), "{missing}");
        assert_eq!(settings.stamp(), None);

        std::fs::write(&path, "one").unwrap();
        let list = List::load(&settings).await.unwrap();
        assert!(list.stamp().is_some() && settings.stamp() == list.stamp());

        // As careful people do it: same length, and perhaps within the clock's step.
        let other = folder.path().join("other");
        std::fs::write(&other, "two").unwrap();
        std::fs::rename(&other, &path).unwrap();
        assert_ne!(settings.stamp(), list.stamp());

        std::fs::File::options().write(true).open(&path).unwrap().set_len(1 << 32).unwrap();
        let error = List::load(&settings).await.unwrap_err();
        assert!(matches!(error.fault, ListFault::TooLarge(_)), "{error}");

        let directory = ListSettings { source: ListSource::File(folder.path().into()), ..settings };
        let error = List::load(&directory).await.unwrap_err();
        assert!(matches!(error.fault, ListFault::NotAFile(_)), "{error}");
    }

    proptest! {
        #[test]
        fn a_list_holds_what_was_written_to_it_and_nothing_else(
            entries in prop::collection::hash_set("[a-zA-Zäß.@-]{1,8}", 0..50),
            others in prop::collection::vec("[a-zA-Zäß.@-]{1,8}", 0..50),
        ) {
            let lines: Vec<&str> = entries.iter().map(String::as_str).collect();
            let list = list(&lines.join("\n"));
            prop_assert_eq!(list.len(), entries.len());
            prop_assert!(entries.iter().all(|entry| list.contains(entry)));
            for other in &others {
                prop_assert_eq!(list.contains(other), entries.contains(other));
            }
        }

        #[test]
        fn whatever_bytes_a_file_holds_it_is_a_list_or_an_error(
            bytes in prop::collection::vec(any::<u8>(), 0..200),
        ) {
            let _ = from_lines(&bytes, true);
        }
    }
}
