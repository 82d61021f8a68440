//! The `[lists]`, `[lookups]` and `[messages]` tables: what rules refer to.

use std::{
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::Context;
use vestibule_api::{
    BreakerSettings, CacheSettings, DatabaseUrl, FileStamp, HttpMethod, HttpSettings, ListSettings,
    ListSource, LookupSettings, LookupSource, Messages,
};
use vestibule_events::expression::{ClaimValue, Known};

use super::{MINUTE, SecretSource, reader::Section, secret};

pub(super) type Stamped = (PathBuf, Option<FileStamp>);

/// What the rules of every connector may refer to.
#[derive(Debug, Default)]
pub(crate) struct ReferenceConfig {
    pub(crate) lists: Vec<ListConfig>,
    pub(crate) lookups: Vec<LookupConfig>,
    pub(crate) messages: Messages,
    /// The files of the messages and their folder, as they were just before they were read: so
    /// that a change is seen, and another language too.
    pub(crate) message_files: Vec<Stamped>,
}

impl ReferenceConfig {
    pub(crate) fn known(&self) -> Known {
        Known {
            lists: self.lists.iter().map(|it| it.name.clone()).collect(),
            lookups: self.lookups.iter().map(|it| it.name.clone()).collect(),
        }
    }
}

/// A named set of values.
#[derive(Debug)]
pub(crate) struct ListConfig {
    pub(crate) name: String,
    source: ListPlace,
    ignore_case: bool,
}

#[derive(Debug)]
enum ListPlace {
    Inline(Vec<String>),
    File(PathBuf),
    Sql { database: SecretSource, query: String, refresh: Duration },
}

impl ListConfig {
    /// What loading it needs, with the secret that a database's URL is.
    pub(crate) fn settings(&self) -> anyhow::Result<ListSettings> {
        let source = match &self.source {
            ListPlace::Inline(entries) => ListSource::Inline(entries.clone()),
            ListPlace::File(path) => ListSource::File(path.clone()),
            ListPlace::Sql { database, query, refresh } => ListSource::Sql {
                database: database_url(database).with_context(|| format!("list {}", self.name))?,
                query: query.clone(),
                refresh: *refresh,
            },
        };
        Ok(ListSettings { name: self.name.clone(), source, ignore_case: self.ignore_case })
    }

    /// The same list with other entries, for trying rules out.
    pub(crate) fn settings_with(&self, entries: Vec<String>) -> ListSettings {
        let source = ListSource::Inline(entries);
        ListSettings { name: self.name.clone(), source, ignore_case: self.ignore_case }
    }

    pub(crate) const fn is_in_database(&self) -> bool {
        matches!(self.source, ListPlace::Sql { .. })
    }

    /// How often a list that is no file is loaded anew.
    pub(crate) const fn refresh(&self) -> Option<Duration> {
        match self.source {
            ListPlace::Sql { refresh, .. } => Some(refresh),
            ListPlace::Inline(_) | ListPlace::File(_) => None,
        }
    }

    pub(crate) fn file(&self) -> Option<&Path> {
        match &self.source {
            ListPlace::File(path) => Some(path),
            ListPlace::Inline(_) | ListPlace::Sql { .. } => None,
        }
    }

    /// Where it comes from, for people.
    pub(crate) fn origin(&self) -> String {
        match &self.source {
            ListPlace::Inline(entries) => format!("{} entries in the configuration", entries.len()),
            ListPlace::File(path) => path.display().to_string(),
            ListPlace::Sql { database, refresh, .. } => {
                format!(
                    "the database in {database}, every {}",
                    humantime::format_duration(*refresh)
                )
            }
        }
    }
}

/// A named query to SQL or HTTP.
#[derive(Debug)]
pub(crate) struct LookupConfig {
    pub(crate) name: String,
    source: LookupPlace,
    /// CEL, in the order in which the lookup takes them.
    pub(crate) arguments: Vec<String>,
    time_limit: Duration,
    cache: CacheSettings,
    concurrency: usize,
    breaker: BreakerSettings,
}

#[derive(Debug)]
enum LookupPlace {
    Sql {
        database: SecretSource,
        query: String,
    },
    Http {
        url: String,
        method: HttpMethod,
        /// Of the arguments, in their order.
        names: Vec<String>,
        headers: Vec<(String, SecretSource)>,
        fields: BTreeMap<String, String>,
        allow_private: bool,
        ca_file: Option<PathBuf>,
    },
}

impl LookupConfig {
    /// What asking it needs, with the secrets.
    pub(crate) fn settings(&self) -> anyhow::Result<LookupSettings> {
        let of = || format!("lookup {}", self.name);
        let source = match &self.source {
            LookupPlace::Sql { database, query } => LookupSource::Sql {
                database: database_url(database).with_context(of)?,
                query: query.clone(),
            },
            LookupPlace::Http { url, method, names, headers, fields, allow_private, ca_file } => {
                let header = |(name, value): &(String, SecretSource)| {
                    Ok((name.clone(), value.fetch().with_context(of)?))
                };
                LookupSource::Http(HttpSettings {
                    url: url.clone(),
                    method: *method,
                    arguments: names.clone(),
                    headers: headers.iter().map(header).collect::<anyhow::Result<_>>()?,
                    fields: fields.clone(),
                    allow_private: *allow_private,
                    ca_file: ca_file.clone(),
                    answer_bytes_max: HttpSettings::ANSWER_BYTES_MAX,
                })
            }
        };
        Ok(LookupSettings {
            name: self.name.clone(),
            source,
            arguments: self.arguments.len(),
            time_limit: self.time_limit,
            cache: self.cache,
            concurrency: self.concurrency,
            breaker: self.breaker,
        })
    }

    /// The secrets that asking it needs.
    pub(crate) fn secrets(&self) -> Vec<&SecretSource> {
        match &self.source {
            LookupPlace::Sql { database, .. } => vec![database],
            LookupPlace::Http { headers, .. } => headers.iter().map(|(_, secret)| secret).collect(),
        }
    }

    /// Where it asks, for people.
    pub(crate) fn origin(&self) -> String {
        match &self.source {
            LookupPlace::Sql { database, .. } => format!("the database in {database}"),
            LookupPlace::Http { url, .. } => url.clone(),
        }
    }
}

fn database_url(source: &SecretSource) -> anyhow::Result<DatabaseUrl> {
    DatabaseUrl::parse(&source.fetch()?).map_err(|error| anyhow::anyhow!("{source}: {error}"))
}

/// `folder`: relative paths start at the configuration file.
pub(super) fn read(root: &mut Section<'_>, folder: &Path) -> ReferenceConfig {
    let lists = root.named_sections("lists", |name, section| {
        check_name(name, section);
        read_list(name, section, folder)
    });
    let lookups = root.named_sections("lookups", |name, section| {
        check_name(name, section);
        read_lookup(name, section, folder)
    });
    let (messages, message_files) =
        root.section("messages", |section| read_messages(section, folder));
    ReferenceConfig {
        lists: lists.into_iter().flatten().collect(),
        lookups: lookups.into_iter().flatten().collect(),
        messages,
        message_files,
    }
}

/// Rules write `lists.NAME`, so a name has to be one in CEL.
fn check_name(name: &str, section: &Section<'_>) {
    let first = name.starts_with(|c: char| c.is_ascii_lowercase());
    let rest = name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_');
    if !first || !rest || name.len() > 63 {
        section.complain(
            "",
            "a name is 1 to 63 lower-case letters, digits and underscores, and starts with a \
             letter: rules write it after `lists.` or `lookups.`",
        );
    }
}

fn read_list(name: &str, section: &mut Section<'_>, folder: &Path) -> Option<ListConfig> {
    let ignore_case = section.boolean("ignore_case", true);
    let entries = section.list("entries", "texts", |text| Some(text.to_owned()));
    let file = section.string("file");
    let database = secret(section, "database");
    let query = section.string("query");
    let refresh = section.duration("refresh", 5 * MINUTE);
    let given = ["entries", "file", "database"].into_iter().filter(|key| section.has(key)).count();
    if given != 1 {
        section.complain("", "needs exactly one of `entries`, `file` and `database`");
        return None;
    }
    if !section.has("database") && (section.has("query") || section.has("refresh")) {
        section.complain("", "`query` and `refresh` go with `database` only");
    }
    if refresh < Duration::from_secs(1) {
        section.complain("refresh", "must be at least 1s");
    }
    let source = match (file, database) {
        (Some(file), _) => ListPlace::File(folder.join(file)),
        (_, Some(database)) => {
            let Some(query) = query else {
                section.complain("", "needs `query`: its first column gives the entries");
                return None;
            };
            ListPlace::Sql { database, query, refresh }
        }
        _ => ListPlace::Inline(entries),
    };
    Some(ListConfig { name: name.to_owned(), source, ignore_case })
}

fn read_lookup(name: &str, section: &mut Section<'_>, folder: &Path) -> Option<LookupConfig> {
    let time_limit = section.duration("time_limit", Duration::from_millis(300));
    if time_limit.is_zero() || time_limit > Duration::from_secs(10) {
        section.complain("time_limit", "must be above 0 and at most 10s");
    }
    let cache = CacheSettings {
        fresh: section.duration("fresh", MINUTE),
        stale: section.duration("stale", 10 * MINUTE),
        entries: size(section.integer("cache_entries", 0..10_000_001, 10_000)),
    };
    let concurrency = size(section.integer("concurrency", 1..1_001, 16));
    let breaker = BreakerSettings {
        failures: u32::try_from(section.integer("breaker_failures", 1..10_001, 5)).unwrap_or(5),
        pause: section.duration("breaker_pause", Duration::from_secs(10)),
    };
    let given = ["database", "url"].into_iter().filter(|key| section.has(key)).count();
    if given != 1 {
        section.complain("", "needs exactly one of `database` (SQL) and `url` (HTTP)");
    }
    let (source, arguments) = if section.has("url") {
        read_http(section, folder)
    } else {
        let database = secret(section, "database");
        let query = if section.has("database") {
            section.required("query")
        } else {
            section.string("query").unwrap_or_default()
        };
        let arguments = section.list("arguments", "CEL expressions", |it| Some(it.to_owned()));
        (database.map(|database| LookupPlace::Sql { database, query }), arguments)
    };
    for argument in &arguments {
        for fault in ClaimValue::compile(argument).err().into_iter().flatten() {
            section.complain("arguments", format!("`{argument}`: {}", fault.message));
        }
    }
    let name = name.to_owned();
    Some(LookupConfig { name, source: source?, arguments, time_limit, cache, concurrency, breaker })
}

fn read_http(section: &mut Section<'_>, folder: &Path) -> (Option<LookupPlace>, Vec<String>) {
    let url = section.parsed("url", "an address such as \"https://crm.example/people\"", |text| {
        let known = ["https://", "http://"].iter().any(|scheme| text.starts_with(scheme));
        known.then(|| text.to_owned())
    });
    let method = section.choice(
        "method",
        &[("get", HttpMethod::Get), ("post", HttpMethod::Post)],
        HttpMethod::Get,
    );
    let (names, arguments): (Vec<_>, Vec<_>) = section.strings("arguments").into_iter().unzip();
    let fields = section.strings("fields").into_iter().collect::<BTreeMap<_, _>>();
    for (name, pointer) in &fields {
        if !pointer.starts_with('/') {
            let message = format!("`{name}`: expected a JSON pointer such as \"/data/status\"");
            section.complain("fields", message);
        }
    }
    let headers = super::secrets(section, "headers");
    let allow_private = section.boolean("allow_private", false);
    let ca_file = section.string("ca_file").map(|file| folder.join(file));
    let http = url.map(|url| LookupPlace::Http {
        url,
        method,
        names,
        headers,
        fields,
        allow_private,
        ca_file,
    });
    (http, arguments)
}

fn size(number: u64) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}

/// One file for each language, `<tag>.toml`, with a text for each key.
fn read_messages(section: &mut Section<'_>, folder: &Path) -> (Messages, Vec<Stamped>) {
    let default = section.string("default").unwrap_or_else(|| "en".into());
    let within = section.string("folder").unwrap_or_else(|| "messages".into());
    if !section.is_present() {
        return Default::default();
    }
    let within = folder.join(within);
    let mut files = vec![(within.clone(), FileStamp::read(&within))];
    let languages = match read_languages(&within) {
        Ok(languages) => languages,
        Err(mistakes) => {
            mistakes.into_iter().for_each(|it| section.complain("folder", it));
            return (Messages::unreadable(), files);
        }
    };
    files.extend(languages.values().map(|(stamped, _)| stamped.clone()));
    let texts = languages.into_iter().map(|(tag, (_, texts))| (tag, texts)).collect();
    match Messages::new(&default, &texts) {
        Ok(messages) => (messages, files),
        Err(errors) => {
            for error in errors {
                section.complain("", format!("{}: {error}", within.display()));
            }
            (Messages::unreadable(), files)
        }
    }
}

type Language = (Stamped, BTreeMap<String, String>);

/// A folder with more than this is not one of messages.
const LANGUAGES_MAX: usize = 500;

fn read_languages(folder: &Path) -> Result<BTreeMap<String, Language>, Vec<String>> {
    let at = |path: &Path, error: &dyn std::fmt::Display| format!("{}: {error}", path.display());
    let files = std::fs::read_dir(folder)
        .and_then(|files| files.take(LANGUAGES_MAX).collect::<io::Result<Vec<_>>>())
        .map_err(|error| vec![at(folder, &error)])?;
    let mut mistakes = Vec::new();
    let mut languages = BTreeMap::new();
    for path in files.into_iter().map(|file| file.path()) {
        if path.extension().is_none_or(|it| it != "toml") {
            continue;
        }
        let tag = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let stamp = FileStamp::read(&path);
        let text = std::fs::read_to_string(&path).map_err(|error| at(&path, &error));
        let texts = text.and_then(|text| {
            toml::from_str::<BTreeMap<String, String>>(&text)
                .map_err(|error| in_place(&path, &text, &error))
        });
        match texts {
            Ok(texts) => drop(languages.insert(tag, ((path, stamp), texts))),
            Err(mistake) => mistakes.push(mistake),
        }
    }
    if mistakes.is_empty() { Ok(languages) } else { Err(mistakes) }
}

/// In one line, as mistakes of the configuration itself are told.
fn in_place(path: &Path, text: &str, error: &toml::de::Error) -> String {
    let start = error.span().map_or(0, |it| it.start);
    let before = text.get(..start).unwrap_or_default();
    let line = before.matches('\n').count() + 1;
    let column = before.rsplit('\n').next().unwrap_or_default().chars().count() + 1;
    format!("{}:{line}:{column}: {}", path.display(), error.message())
}

#[cfg(test)]
mod tests {
    use vestibule_events::Step;

    use crate::config::Config;

    const CONNECTOR: &str =
        "[connectors.c]\n[[connectors.c.credentials]]\nuser = \"u\"\npassword = \"env:P\"\n";

    fn parse(more: &str) -> Result<Config, String> {
        let folder = tempfile::tempdir().expect("there is room");
        std::fs::create_dir(folder.path().join("messages")).expect("it is new");
        for (file, text) in [("en.toml", "no = \"No.\"\n"), ("de.toml", "no = \"Nein.\"\n")] {
            std::fs::write(folder.path().join("messages").join(file), text).expect("it is ours");
        }
        let source = format!("{CONNECTOR}{more}\n");
        Config::parse(&folder.path().join("c.toml"), &source).map_err(|error| error.to_string())
    }

    #[test]
    fn rules_may_name_what_the_file_has() {
        let config = parse(
            r#"
            [lists.partners]
            entries = ["contoso.com"]
            [lists.staff]
            database = "env:CRM"
            query = "SELECT mail FROM staff"
            refresh = "1m"
            [lookups.crm]
            database = "env:CRM"
            query = "SELECT tier FROM customers WHERE domain = $1"
            arguments = ["signup.email_domain"]
            [lookups.idv]
            url = "https://idv.example/people/{id}"
            method = "post"
            arguments = { id = "signup.email", name = "signup.claims.displayName" }
            fields = { verified = "/data/verified" }
            headers = { authorization = "env:IDV" }
            [messages]
            [approvals]
            denied = "message:no"
            reapply_after = "30d"
            [[connectors.c.rules]]
            when = """!(signup.email_domain in lists.partners) && !(signup.email in lists.staff)
              && !lookups.crm.found && !lookups.idv.verified"""
            require_approval = "message:no"
            [[connectors.c.rules]]
            mode = "audit"
            accept = true
            "#,
        );
        let config = config.unwrap_or_else(|it| panic!("{it}"));
        let rules = &config.connectors[0].rules;
        assert_eq!((rules.names().len(), rules.ask_for_approval()), (2, true));
        let steps: Vec<_> = rules.described().map(|it| it.steps.to_vec()).collect();
        let [early, late, token] = Step::ALL;
        assert_eq!(steps, [vec![early, late], vec![early, late, token]]);
        assert!(config.has_approvals());
        assert_eq!(config.approvals.denied.for_locale(Some("de")), "Nein.");
        assert_eq!(config.reference.lookups[1].arguments.len(), 2);
    }

    #[test]
    fn each_mistake_is_told_with_its_key() {
        for (more, complaint) in [
            ("[lists.a]", "lists.a: needs exactly one of `entries`, `file` and `database`"),
            ("[lists.a]\nentries = []\nfile = \"x\"", "lists.a: needs exactly one of"),
            ("[lists.a]\ndatabase = \"env:X\"", "needs `query`"),
            ("[lists.A-b]\nentries = []", "lower-case letters, digits and underscores"),
            ("[lookups.a]", "needs exactly one of `database` (SQL) and `url` (HTTP)"),
            ("[lookups.a]\nurl = \"ftp://x\"", "lookups.a.url: expected an address"),
            (
                "[lookups.a]\nurl = \"https://x\"\narguments = { id = \"signup.mail\" }",
                "lookups.a.arguments: `signup.mail`",
            ),
            ("[lookups.a]\nurl = \"https://x\"\nfields = { a = \"b\" }", "a JSON pointer"),
            ("[lookups.a]\nurl = \"https://x\"\ntime_limit = \"0s\"", "must be above 0"),
            ("[messages]\nfolder = \"nowhere\"", "messages.folder"),
            ("[messages]\ndefault = \"fr\"", "no messages in the default language `fr`"),
            ("[approvals]\ndenied = \"message:nope\"", "there is no message `nope`"),
            ("[approvals]\nlink_base = \"signup.example\"", "approvals.link_base: expected"),
            ("[[connectors.c.rules]]\nblock = \"message:x\"", "there is no message `x`"),
            ("[[connectors.c.rules]]\nwhen = \"'a' in lists.x\"\nblock = \"n\"", "`x`"),
            ("[[connectors.c.rules]]\naccept = true\nblock = \"n\"", "exactly one of"),
            (
                "[[connectors.c.rules]]\nsteps = [\"before-token\"]\nrequire_approval = \"n\"",
                "steps: nobody can be asked to wait at before-token",
            ),
            ("[[connectors.c.rules]]\nmode = \"dry\"\naccept = true", "\"enforce\""),
        ] {
            let complaints = parse(more).expect_err(more);
            assert!(complaints.contains(complaint), "{more}: {complaints}");
            assert!(complaints.contains("1 mistake"), "{more}: {complaints}");
        }
    }
}
