//! `vestibule subscriber add`: from a line of a shell to a subscriber that runs.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};
use clap::Args;
use data_encoding::BASE64;
use time::{OffsetDateTime, format_description::well_known::Rfc3339};
use toml::Value;
use vestibule_events::Role;
use vestibule_workers::consumer_spec;

use super::{make_folder, subscriber, write_private};
use crate::{
    config::{Config, Way, WorkerConfig, check_name},
    migrate,
    print::say,
    wiring, workers,
};

const EXAMPLES: &str = "\
Examples:
  vestibule subscriber add crm --webhook https://crm.example.com/hooks/vestibule
  vestibule subscriber add audit --kinds accepted --exec /usr/local/bin/audit --verbose
  vestibule subscriber add warehouse --nats --start beginning";

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct AddArgs {
    /// Its name, and that of its file, its consumer and its metrics
    #[arg(value_name = "NAME")]
    name: String,
    #[command(flatten)]
    way: WayArgs,
    /// Which events, such as `accepted,approved`; a yes where absent
    #[arg(long, value_name = "KINDS", value_delimiter = ',')]
    kinds: Vec<String>,
    /// Only sign-ups of these connectors
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    connectors: Vec<String>,
    /// Only what this holds for: CEL over `signup`, as in rules
    #[arg(long, value_name = "CEL")]
    when: Option<String>,
    /// Where in the log it begins: `beginning` or a time; now where absent
    #[arg(long, value_name = "PLACE")]
    start: Option<String>,
    /// --webhook: a network where it may be called besides the public internet, as in 10.1.0.0/16
    #[arg(long = "network", value_name = "NETWORK", requires = "webhook")]
    networks: Vec<String>,
}

#[derive(Debug, Args)]
#[group(required = false, multiple = false)]
struct WayArgs {
    /// Call this URL with each event
    #[arg(long, value_name = "URL")]
    webhook: Option<String>,
    /// Run this command with each event; everything that follows belongs to it
    #[arg(long, value_name = "COMMAND", num_args = 1.., allow_hyphen_values = true)]
    exec: Vec<String>,
    /// Run nothing: its team takes the events from the stream itself
    #[arg(long)]
    nats: bool,
}

impl WayArgs {
    fn is_said(&self) -> bool {
        self.webhook.is_some() || !self.exec.is_empty() || self.nats
    }
}

pub(super) async fn add(config: &Config, args: &AddArgs) -> anyhow::Result<()> {
    let name = args.name.as_str();
    check_name(name).map_err(anyhow::Error::msg)?;
    let exists = config.subscribers.names().any(|it| it == name);
    if exists && !args.way.is_said() {
        let worker = super::find(config, name)?;
        say!("{}", provisioned(config, worker).await?)?;
        return Ok(());
    }
    ensure!(
        !exists,
        "there is a subscriber `{name}` already: change its file, or choose another name"
    );
    ensure!(
        args.way.is_said(),
        "say how `{name}` is to be given its events: --webhook URL, --exec COMMAND or --nats"
    );
    let folder = &config.subscribers.folder;
    make_folder(folder)?;
    let file = folder.join(format!("{name}.toml"));
    let key = match args.way.webhook {
        Some(_) => Some(make_key(&folder.join(format!("{name}.key")))?),
        None => None,
    };
    let text = text(args, key.as_deref(), OffsetDateTime::now_utc())?;
    let worker = match config.parse_subscriber(name, &file, &text) {
        Ok(worker) => worker.context("a file that is just written is not switched off")?,
        Err(complaints) => {
            // What was made for it is of no use to anybody.
            key.iter().for_each(|it| drop(std::fs::remove_file(it)));
            bail!("nothing was added: {complaints}\n\n{text}");
        }
    };
    // Under another name first: whatever runs takes up what ends in `.toml`.
    let new = folder.join(format!(".{name}.new"));
    drop(std::fs::remove_file(&new));
    write_private(&new, &text)?;
    let consumer = match workers::forget_former(config, &worker).await {
        Ok(()) => provisioned(config, &worker).await,
        Err(error) => Err(error),
    };
    if consumer.is_err() {
        drop(std::fs::remove_file(&new));
        key.iter().for_each(|it| drop(std::fs::remove_file(it)));
    }
    let consumer = consumer.context("nothing was added")?;
    std::fs::rename(&new, &file).with_context(|| format!("could not write {}", file.display()))?;
    tell(&worker, &file, key.as_deref(), &consumer)
}

/// Makes the consumer where there is a stream; says what became of it.
async fn provisioned(config: &Config, worker: &WorkerConfig) -> anyhow::Result<String> {
    let Some(nats) = &config.nats else {
        return Ok("made by the running `vestibule up`".to_owned());
    };
    let stream = wiring::stream(config, nats, Role::Provisioner).await?;
    let spec = consumer_spec(worker.name(), &worker.settings);
    let made = migrate::provision_consumer(nats, &stream, &spec).await?;
    Ok(format!("{} of the stream {}: {made}", spec.name, nats.stream))
}

fn tell(
    worker: &WorkerConfig,
    file: &Path,
    key: Option<&Path>,
    consumer: &str,
) -> anyhow::Result<()> {
    let name = worker.name();
    say!("{name} is added.\n\n  file      {}", file.display())?;
    if let Some(key) = key {
        say!("  key       {} (give it to {name}: signatures are checked by it)", key.display())?;
    }
    say!("  consumer  {consumer}")?;
    if let Some(Way::Nats) = subscriber(worker).map(|it| &it.way) {
        say!("\nNext:  vestibule subscriber grant {name}   a user of NATS for it")?;
    } else {
        say!("\nWhatever runs takes it up within seconds. Next:")?;
        say!("  vestibule subscriber test {name}   a sample event, and what comes back")?;
    }
    say!("  vestibule subscriber lag {name}    how far it is")?;
    Ok(())
}

/// Makes the key by which a webhook is signed, in the way of Standard Webhooks.
fn make_key(path: &Path) -> anyhow::Result<PathBuf> {
    let key = BASE64.encode(&rand::random::<[u8; 32]>());
    write_private(path, &format!("whsec_{key}\n"))?;
    // Secrets' paths start where a process does, and that may be anywhere.
    std::path::absolute(path).context("could not tell where the key is")
}

/// The file as it is to be.
fn text(args: &AddArgs, key: Option<&Path>, now: OffsetDateTime) -> anyhow::Result<String> {
    let quoted = |text: &str| Value::from(text).to_string();
    let list = |items: &[String]| {
        let items: Vec<_> = items.iter().map(|it| quoted(it)).collect();
        format!("[{}]", items.join(", "))
    };
    let mut lines = vec!["# All keys: docs/subscribers.md".to_owned()];
    if !args.kinds.is_empty() {
        lines.push(format!("kinds = {}", list(&args.kinds)));
    }
    if !args.connectors.is_empty() {
        lines.push(format!("connectors = {}", list(&args.connectors)));
    }
    if let Some(when) = &args.when {
        lines.push(format!("when = {}", quoted(when)));
    }
    // Not `now`, which would be when something first takes the file up.
    let start = match &args.start {
        Some(start) => start.clone(),
        None => now.replace_millisecond(now.millisecond())?.format(&Rfc3339)?,
    };
    lines.push(format!("start = {}", quoted(&start)));
    let WayArgs { webhook, exec, nats: _ } = &args.way;
    lines.push(String::new());
    if let (Some(url), Some(key)) = (webhook, key) {
        lines.push("[webhook]".to_owned());
        lines.push(format!("url = {}", quoted(url)));
        lines.push(format!("keys = [{}]", quoted(&format!("file:{}", key.display()))));
        if !args.networks.is_empty() {
            lines.push(format!("networks = {}", list(&args.networks)));
        }
    } else if exec.is_empty() {
        lines.push("[nats]".to_owned());
    } else {
        lines.push("[exec]".to_owned());
        lines.push(format!("command = {}", list(exec)));
    }
    Ok(lines.join("\n") + "\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_typed_stands_in_the_file_as_it_was_typed() {
        let odd = "echo \"it's\" \\ \"\"\" '''\n\t# no comment\n";
        let args = AddArgs {
            name: "audit".to_owned(),
            way: WayArgs { webhook: None, exec: vec!["sh".into(), odd.to_owned()], nats: false },
            kinds: vec![],
            connectors: vec![odd.to_owned()],
            when: Some(odd.to_owned()),
            start: None,
            networks: vec![],
        };
        let text = text(&args, None, OffsetDateTime::UNIX_EPOCH).unwrap();
        let table: toml::Table = text.parse().expect(&text);
        assert_eq!(table["when"].as_str(), Some(odd), "{text}");
        assert_eq!(table["connectors"][0].as_str(), Some(odd), "{text}");
        assert_eq!(table["exec"]["command"][1].as_str(), Some(odd), "{text}");
    }
}
