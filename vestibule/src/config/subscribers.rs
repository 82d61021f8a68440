//! `subscribers/*.toml` and `[subscribers.NAME]`: the workers that operations teams add.
//!
//! Each file is one subscriber, named after the file, with the keys that a `[subscribers.NAME]`
//! table has as well. A file with a mistake in it costs its own subscriber only: the process starts
//! without it, or goes on with what was in force, and says what is wrong.

mod exec;
mod webhook;

use std::{
    fmt, io,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, bail};
use secrecy::SecretString;
use vestibule_api::FileStamp;
use vestibule_events::{Kind, relay};
use vestibule_workers::{ExecSettings, Filtered, WebhookSettings, WorkerSettings};

use self::{exec::ExecConfig, webhook::WebhookConfig};
use super::{
    BUILT_IN, Complaint, Complaints, Document, EffectConfig, SecretSource, WorkerConfig,
    reader::Section,
    workers::{read_on, read_worker},
};

/// What the configuration says of subscribers.
#[derive(Debug, Default)]
pub(crate) struct SubscribersConfig {
    /// Where their files are; it need not exist.
    pub(crate) folder: PathBuf,
    /// Those that can run, by name.
    pub(crate) subscribers: Vec<WorkerConfig>,
    /// Files that cannot be used, with what is wrong.
    pub(crate) refused: Vec<RefusedFile>,
}

/// Whose file the folder is, where it cannot be read: no subscriber can be called this.
const NOBODY: &str = "";

/// A file that makes no subscriber.
#[derive(Debug)]
pub(crate) struct RefusedFile {
    /// What the subscriber would be called.
    pub(crate) name: String,
    pub(crate) complaints: Complaints,
}

impl RefusedFile {
    fn new(name: &str, file: &Path, message: impl Into<String>) -> Self {
        let complaint =
            Complaint { line: 1, column: 1, key: String::new(), message: message.into() };
        let file = file.display().to_string();
        Self { name: name.to_owned(), complaints: Complaints { file, complaints: vec![complaint] } }
    }

    /// On one line, for it is said in the log, too.
    pub(crate) fn error(&self) -> String {
        self.complaints.lines().collect::<Vec<_>>().join("; ")
    }
}

/// A subscriber, beside what every worker has.
#[derive(Debug)]
pub(crate) struct SubscriberConfig {
    pub(crate) name: String,
    /// Where it stands.
    pub(crate) file: PathBuf,
    /// CEL over the sign-up; what it does not hold for is done without an attempt.
    pub(crate) when: Option<String>,
    pub(crate) way: Way,
}

/// How it is given its events.
#[derive(Debug)]
pub(crate) enum Way {
    /// It is called over HTTP.
    Webhook(WebhookConfig),
    /// It is a command of this machine.
    Exec(ExecConfig),
    /// It takes them itself, from its durable consumer: nothing runs here.
    Nats,
}

/// What a worker of ours needs to give a subscriber its events.
#[derive(Debug)]
pub(crate) enum WaySettings {
    Webhook(WebhookSettings),
    Exec(ExecSettings),
}

impl Way {
    pub(crate) const fn as_str(&self) -> &'static str {
        match self {
            Self::Webhook(_) => "webhook",
            Self::Exec(_) => "exec",
            Self::Nats => "nats",
        }
    }

    /// Where its secrets are.
    pub(crate) fn secrets(&self) -> Vec<&SecretSource> {
        match self {
            Self::Webhook(it) => it.secrets(),
            Self::Exec(it) => it.secrets(),
            Self::Nats => Vec::new(),
        }
    }

    /// What it reads besides its own file.
    pub(crate) fn files(&self) -> impl Iterator<Item = &Path> {
        let authorities = match self {
            Self::Webhook(it) => it.authorities.as_deref(),
            Self::Exec(_) | Self::Nats => None,
        };
        self.secrets().into_iter().filter_map(SecretSource::file).chain(authorities)
    }

    /// What the worker needs, or `None` where none of ours runs. `timeout` is of an attempt.
    pub(crate) fn settings(
        &self,
        name: &str,
        timeout: Duration,
    ) -> anyhow::Result<Option<WaySettings>> {
        Ok(match self {
            Self::Webhook(it) => Some(WaySettings::Webhook(it.settings(name, timeout)?)),
            Self::Exec(it) => Some(WaySettings::Exec(it.settings(name, timeout)?)),
            Self::Nats => None,
        })
    }
}

/// A text, or where one is that is secret.
pub(crate) enum Text {
    Plain(String),
    Secret(SecretSource),
}

impl Text {
    const URL_EXPECTED: &str =
        "a URL, or where one is that holds a secret: \"env:NAME\" or \"file:PATH\"";

    /// Whatever does not say where a secret is, is a text.
    fn of(text: &str) -> Self {
        match SecretSource::parse(text) {
            Some(source @ (SecretSource::Environment(_) | SecretSource::File(_))) => {
                Self::Secret(source)
            }
            _ => Self::Plain(text.to_owned()),
        }
    }

    fn url(text: &str) -> Option<Self> {
        match Self::of(text) {
            Self::Plain(url) if !url.starts_with("http://") && !url.starts_with("https://") => None,
            text => Some(text),
        }
    }

    fn source(&self) -> Option<&SecretSource> {
        match self {
            Self::Secret(source) => Some(source),
            Self::Plain(_) => None,
        }
    }

    fn fetch(
        &self,
        fetch: impl Fn(&SecretSource) -> anyhow::Result<SecretString>,
    ) -> anyhow::Result<SecretString> {
        match self {
            Self::Plain(text) => Ok(text.clone().into()),
            Self::Secret(source) => fetch(source),
        }
    }
}

impl fmt::Debug for Text {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Plain(text) => text.fmt(f),
            Self::Secret(source) => source.fmt(f),
        }
    }
}

/// Whose table is read, and where it stands.
#[derive(Clone, Copy, Debug)]
struct Place<'a> {
    name: &'a str,
    file: &'a Path,
    /// Where relative paths start.
    folder: &'a Path,
}

impl<'a> Place<'a> {
    fn new(name: &'a str, file: &'a Path) -> Self {
        Self { name, file, folder: file.parent().unwrap_or(Path::new("")) }
    }
}

/// What a subscriber is given where its file does not say: a yes, by rules or by an approver.
const KINDS: &[Kind] = &[Kind::Accepted, Kind::Approved];

/// Commands of `vestibule subscriber` and `vestibule worker`, and users of `nats.conf`: each would be
/// taken for the other.
const TAKEN: [&str; 13] = [
    SubscribersConfig::ALL,
    "list",
    "pause",
    "resume",
    "remove",
    "help",
    "add",
    "test",
    "lag",
    "grant",
    "worker",
    "auditor",
    "provisioner",
];

/// How the name of a note ends that a consumer is to be forgotten. An embedded log can be changed by
/// the process only that has it open.
const REMOVE: &str = ".remove";

/// Whether workers of Vestibule's own are called this.
pub(crate) fn is_ours(name: &str) -> bool {
    BUILT_IN.contains(&name) || name.starts_with("statements-")
}

/// Says why a subscriber cannot be called this.
pub(crate) fn check_name(name: &str) -> Result<(), String> {
    let is_plain = name.starts_with(|c: char| c.is_ascii_lowercase())
        && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-_".contains(&b));
    if !is_plain || name.len() > 63 {
        return Err(format!(
            "`{name}` cannot be the name of a subscriber: lower-case letters, digits, `-` and `_`, \
             the first of them a letter, at most 63"
        ));
    }
    if is_ours(name) || name == relay::CONSUMER {
        return Err(format!("`{name}` is a worker of Vestibule's own; choose another name"));
    }
    if TAKEN.contains(&name) {
        return Err(format!(
            "`{name}` means something else on the command line; choose another name"
        ));
    }
    Ok(())
}

/// What the subscribers of one configuration have in common.
#[derive(Clone, Copy, Debug)]
pub(super) struct Around<'a> {
    pub(super) connectors: &'a [&'a str],
    pub(super) has_nats: bool,
    /// Whether anybody finds out of which sign-ups an account comes to be.
    pub(super) has_confirm: bool,
}

impl SubscribersConfig {
    /// By this word a process is told to run every subscriber.
    pub(crate) const ALL: &str = "subscribers";

    /// The `subscribers` of `vestibule.toml`: the name of the folder, or tables. Relative paths
    /// start at `folder`, where that file is.
    pub(super) fn read(root: &mut Section<'_>, file: &Path, around: Around<'_>) -> Self {
        let folder = file.parent().unwrap_or(Path::new(""));
        if root.is_text("subscribers") {
            let path = root.string("subscribers").unwrap_or_default();
            return Self { folder: folder.join(path), ..Self::default() };
        }
        let read = |name: &str, section: &mut Section<'_>| {
            if let Err(message) = check_name(name) {
                section.complain("", message);
            }
            read_subscriber(Place::new(name, file), section, around)
        };
        let subscribers = root.named_sections("subscribers", read).into_iter().flatten().collect();
        Self { folder: folder.join("subscribers"), subscribers, refused: Vec::new() }
    }

    /// Reads the folder, too.
    pub(super) fn read_folder(&mut self, around: Around<'_>) {
        let files = match files(&self.folder) {
            Ok(files) => files,
            Err(error) => {
                let message = format!("could not read the folder of subscribers: {error}");
                return self.refused.push(RefusedFile::new(NOBODY, &self.folder, message));
            }
        };
        for file in files {
            let name = name_of(&file);
            match self.read_file(&name, &file, around) {
                Ok(subscriber) => self.subscribers.extend(subscriber),
                Err(refused) => self.refused.push(refused),
            }
        }
        self.subscribers.sort_by(|one, other| one.name().cmp(other.name()));
    }

    fn read_file(
        &self,
        name: &str,
        file: &Path,
        around: Around<'_>,
    ) -> Result<Option<WorkerConfig>, RefusedFile> {
        let refuse = |message| RefusedFile::new(name, file, message);
        check_name(name).map_err(refuse)?;
        if self.subscribers.iter().any(|it| it.name() == name) {
            let message = format!("the configuration has [subscribers.{name}]; keep one of them");
            return Err(refuse(message));
        }
        let source = std::fs::read_to_string(file)
            .map_err(|error| refuse(format!("could not read it: {error}")))?;
        parse(name, file, &source, around)
            .map_err(|complaints| RefusedFile { name: name.to_owned(), complaints })
    }

    /// Tells the process that has the log open to forget a consumer, and waits until it has: what is
    /// in hand is finished first.
    pub(crate) async fn ask_to_remove(&self, consumer: &str) -> anyhow::Result<()> {
        const LOOK_EVERY: Duration = Duration::from_millis(100);
        let note = self.folder.join(format!(".{consumer}{REMOVE}"));
        let written =
            std::fs::create_dir_all(&self.folder).and_then(|()| std::fs::write(&note, ""));
        written.with_context(|| format!("could not write {}", note.display()))?;
        let gone = tokio::time::timeout(self.removal_limit(consumer), async {
            while note.exists() {
                tokio::time::sleep(LOOK_EVERY).await;
            }
        });
        if gone.await.is_err() {
            drop(std::fs::remove_file(&note));
            bail!(
                "the process that has the log open did not remove the consumer {consumer}: either \
                 it may not write in {}, or an attempt still runs; mend that, or wait, and remove \
                 {consumer} again",
                self.folder.display()
            );
        }
        Ok(())
    }

    /// How long a process may take to let go of a subscriber.
    fn removal_limit(&self, name: &str) -> Duration {
        /// To see that its file is gone, and to let go of what it holds.
        const LET_GO: Duration = Duration::from_secs(30);
        let found = self.subscribers.iter().find(|it| it.name() == name);
        // What is in force of a file that is wrong now, nobody but the process knows.
        let attempt = found.map_or(WorkerSettings::default().timeout, |it| it.settings.timeout);
        attempt + LET_GO
    }

    /// The consumers that are to be forgotten, each with the note that says so.
    pub(crate) fn to_remove(folder: &Path) -> Vec<(String, PathBuf)> {
        let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
        let note = |path: PathBuf| {
            let name = path.file_name()?.to_str()?.strip_prefix('.')?.strip_suffix(REMOVE)?;
            Some((name.to_owned(), path.clone()))
        };
        entries
            .filter_map(|it| note(it.path()))
            .filter(|(name, _)| check_name(name).is_ok())
            .collect()
    }

    /// What they read besides their own files, and may change while they run.
    pub(crate) fn files(&self) -> impl Iterator<Item = &Path> {
        self.subscribers.iter().flat_map(WorkerConfig::files)
    }

    /// The names of all, those that cannot be used among them.
    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        let usable = self.subscribers.iter().map(WorkerConfig::name);
        let refused = self.refused.iter().map(|it| it.name.as_str());
        usable.chain(refused.filter(|it| *it != NOBODY))
    }

    /// Whether one that cannot be used now may be there nevertheless: its file is wrong, or nobody
    /// can tell.
    pub(crate) fn may_still_be(&self, name: &str) -> bool {
        self.refused.iter().any(|it| it.name == name || it.name == NOBODY)
    }
}

/// One file, or everything that is wrong with it.
pub(super) fn parse(
    name: &str,
    file: &Path,
    source: &str,
    around: Around<'_>,
) -> Result<Option<WorkerConfig>, Complaints> {
    Document::read(file, source, |root| read_subscriber(Place::new(name, file), root, around))
}

/// The subscribers' files in a folder, by name; one that is not there has none.
fn files(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = match std::fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut files = Vec::new();
    for entry in entries {
        let path = entry?.path();
        // Editors leave hidden files beside what they write.
        let is_hidden = path.file_name().is_none_or(|it| it.as_encoded_bytes().starts_with(b"."));
        if !is_hidden && path.extension().is_some_and(|it| it == "toml") {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

fn name_of(file: &Path) -> String {
    file.file_stem().unwrap_or_default().to_string_lossy().into_owned()
}

/// The files of a folder as they are now, to see whether one has changed, come or gone.
pub(crate) fn stamps(folder: &Path) -> Vec<(PathBuf, Option<FileStamp>)> {
    let files = files(folder).unwrap_or_default();
    files.into_iter().map(|file| (file.clone(), FileStamp::read(&file))).collect()
}

fn read_subscriber(
    place: Place<'_>,
    section: &mut Section<'_>,
    around: Around<'_>,
) -> Option<WorkerConfig> {
    let when = section.string("when");
    for fault in when.iter().filter_map(|it| Filtered::check(it).err()).flatten() {
        section.complain(fault.key, fault.message);
    }
    let webhook = section.section("webhook", |it| {
        it.is_present().then(|| webhook::read(it, place).map(Way::Webhook))
    });
    let exec = section
        .section("exec", |it| it.is_present().then(|| Some(Way::Exec(exec::read(it, place)))));
    let nats = section.section("nats", |it| it.is_present().then_some(Some(Way::Nats)));
    if nats.is_some() && !around.has_nats {
        section.complain(
            "nats",
            "there is no stream to consume from: the configuration has no [nats] section with a \
             url; [webhook] and [exec] work embedded, too",
        );
    }
    if nats.is_some() && when.is_some() {
        section.complain(
            "when",
            "a consumer of the stream is filtered by `kinds` and `connectors` only: whoever takes \
             its events asks the rest",
        );
    }
    let mut ways: Vec<_> = [webhook, exec, nats].into_iter().flatten().collect();
    let count = ways.len();
    let effect = ways.pop().flatten().map(|way| {
        let (name, file) = (place.name.to_owned(), place.file.to_owned());
        EffectConfig::Subscriber(SubscriberConfig { name, file, when, way })
    });
    let is_exec = matches!(
        &effect,
        Some(EffectConfig::Subscriber(SubscriberConfig { way: Way::Exec(_), .. }))
    );
    let kinds = read_on(section, around.has_confirm).kinds(KINDS);
    let worker = read_worker(section, effect, &kinds, around.connectors);
    // A table that is misspelt is complained of as such.
    if count > 1 || (count == 0 && !section.has_unknown()) {
        section.complain("", "needs exactly one of the tables [webhook], [exec] and [nats]");
    }
    let mut worker = worker?;
    if is_exec {
        // A command that hangs is stopped first, and then the attempt is over.
        worker.settings.timeout += ExecSettings::STOPPING;
    }
    Some(worker)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    const AROUND: Around<'_> =
        Around { connectors: &["partners"], has_nats: false, has_confirm: false };
    const EXEC: &str = "[exec]\ncommand = [\"/usr/bin/true\", \"-v\"]\n";

    fn read(source: &str) -> Result<Option<WorkerConfig>, String> {
        let file = Path::new("subscribers/audit.toml");
        parse("audit", file, source, AROUND).map_err(|it| it.to_string())
    }

    fn complaints(source: &str) -> String {
        read(source).expect_err(source)
    }

    #[test]
    fn a_file_is_a_worker_with_the_name_of_the_file() {
        let worker = read(&format!("kinds = [\"blocked\"]\n{EXEC}")).unwrap().unwrap();
        assert_eq!(worker.name(), "audit");
        assert_eq!(worker.settings.filter.kinds, [Kind::Blocked]);
        assert_eq!(worker.settings.timeout, Duration::from_secs(20) + ExecSettings::STOPPING);
        assert!(worker.runs_here());
        let EffectConfig::Subscriber(SubscriberConfig { way, .. }) = &worker.effect else {
            panic!("{worker:?}")
        };
        let settings = way.settings("audit", worker.settings.timeout).unwrap();
        let Some(WaySettings::Exec(settings)) = settings else { panic!("{settings:?}") };
        assert_eq!(settings.timeout, Duration::from_secs(20));
        assert!(read(&format!("enabled = false\n{EXEC}")).unwrap().is_none());
    }

    #[test]
    fn a_webhook_says_which_files_it_reads() {
        let webhook = "[webhook]\nurl = \"https://crm.example.com/\"\nkeys = [\"env:KEY\"]\n\
                       headers = { x-plain = \"yes\", x-secret = \"file:/run/token\" }\n\
                       authorities = \"ours.pem\"\n";
        let worker = read(webhook).unwrap().unwrap();
        let files: Vec<_> = worker.files().collect();
        assert_eq!(files, [Path::new("/run/token"), Path::new("subscribers/ours.pem")]);
    }

    #[test]
    fn a_mistake_has_its_line_and_the_nearest_name() {
        for (source, complaint) in [
            ("", "1:1: needs exactly one of the tables [webhook], [exec] and [nats]"),
            ("[exec]\n", "exec: needs the key `command`"),
            ("[exec]\ncomand = []\n", "did you mean `command`?"),
            ("[webhook]\nurl = \"https://a.example\"\n", "webhook: needs the key `keys`"),
            (
                "[webhook]\nurl = \"a.example\"\nkeys = [\"env:K\"]\n",
                "2:7: webhook.url: expected a URL",
            ),
            (
                "[webhook]\nurl = \"env:U\"\nkeys = [\"whsec_x\"]\n",
                "webhook.keys: expected at least one secret",
            ),
            (
                "[webhook]\nurl = \"env:U\"\nkeys = []\n",
                "webhook.keys: expected at least one secret",
            ),
            ("[nats]\n", "the configuration has no [nats] section"),
            (&format!("when = \"signup.emial == ''\"\n{EXEC}"), "when: "),
            (
                &format!("kind = []\n{EXEC}"),
                "audit.toml:1:1: kind: there is no such key; did you mean `kinds`?",
            ),
            (
                &format!("connectors = [\"partner\"]\n{EXEC}"),
                "connectors of this file (\"partners\")",
            ),
        ] {
            let complaints = complaints(source);
            assert!(complaints.contains(complaint), "{source} gave {complaints}");
            assert!(!complaints.contains("whsec_x"), "{complaints}");
            assert!(complaints.contains("has 1 mistake\n"), "{source} gave {complaints}");
        }
        let two = format!("{EXEC}[nats]\n");
        assert!(complaints(&two).contains("needs exactly one of"), "{}", complaints(&two));
    }

    #[test]
    fn a_name_that_means_something_else_is_refused() {
        for good in ["crm", "crm-2", "a_b"] {
            assert_eq!(check_name(good), Ok(()), "{good}");
        }
        for bad in [
            "",
            "CRM",
            "1a",
            "a.b",
            "a b",
            "../a",
            "notify",
            "relay",
            "list",
            "subscribers",
            "statements-crm",
        ] {
            assert!(check_name(bad).is_err(), "{bad}");
        }
        assert!(check_name(&"a".repeat(64)).is_err());
    }

    /// The example with files of subscribers.
    fn load(more: &str, files: &[(&str, &str)]) -> Config {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            let file = folder.path().join(name);
            std::fs::create_dir_all(file.parent().unwrap()).unwrap();
            std::fs::write(file, text).unwrap();
        };
        let example = include_str!("../../../vestibule.toml");
        let (top, tables) = more.split_once("---").unwrap_or(("", more));
        write("vestibule.toml", &format!("{top}\n{example}\n{tables}"));
        files.iter().for_each(|(name, text)| write(name, text));
        Config::load(&folder.path().join("vestibule.toml")).unwrap()
    }

    #[test]
    fn files_and_tables_are_subscribers_and_a_wrong_file_costs_only_its_own() {
        let table =
            format!("[subscribers.table]\n{}", EXEC.replace("[exec]", "[subscribers.table.exec]"));
        let config = load(
            &table,
            &[
                ("subscribers/audit.toml", EXEC),
                ("subscribers/table.toml", EXEC),
                ("subscribers/List.toml", EXEC),
                ("subscribers/wrong.toml", "["),
                ("subscribers/.audit.new.toml", "["),
                ("subscribers/audit.key", "no subscriber"),
            ],
        );
        let found = &config.subscribers;
        let usable: Vec<_> = found.subscribers.iter().map(WorkerConfig::name).collect();
        let refused: Vec<_> = found.refused.iter().map(|it| it.name.as_str()).collect();
        assert_eq!(usable, ["audit", "table"]);
        assert_eq!(refused, ["List", "table", "wrong"]);
        assert!(config.all_workers().any(|it| it.name() == "audit"));
        assert!(found.refused[1].error().contains("has [subscribers.table]; keep one"));
    }

    #[test]
    fn whoever_removes_a_subscriber_waits_for_the_longest_attempt() {
        let slow = format!("timeout = \"5m\"\n{EXEC}");
        let config = load("", &[("subscribers/slow.toml", &slow)]);
        let limit = |name| config.subscribers.removal_limit(name);
        assert!(limit("slow") > Duration::from_secs(5 * 60), "{:?}", limit("slow"));
        assert!(limit("gone") > WorkerSettings::default().timeout, "{:?}", limit("gone"));
    }

    #[test]
    fn the_folder_may_be_another_one() {
        let config = load("subscribers = \"teams\"\n---", &[("teams/audit.toml", EXEC)]);
        let names: Vec<_> = config.subscribers.names().collect();
        assert_eq!(names, ["audit"]);
    }

    #[test]
    fn what_is_asked_to_be_removed_is_found_by_its_note() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(".crm.remove"), "").unwrap();
        std::fs::write(folder.path().join(".notify.remove"), "not a subscriber").unwrap();
        std::fs::write(folder.path().join("crm.toml"), "").unwrap();
        let noted = SubscribersConfig::to_remove(folder.path());
        assert_eq!(noted, [("crm".to_owned(), folder.path().join(".crm.remove"))]);
    }
}
