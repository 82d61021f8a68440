//! Lists that hold nothing, and what cannot be reached.

use std::time::Duration;

use anyhow::{Context, bail};
use tokio::{net::TcpStream, time::timeout};
use vestibule_api::{
    DatabaseUrl, List, ListSettings, ListSource, Lookup, LookupMetrics, LookupSource,
};

use super::places::Places;
use crate::config::{Complaint, Config, ListConfig};

/// A server that takes longer to be there is not.
const CONNECT_MAX: Duration = Duration::from_secs(5);

/// What is wrong with lists and lookups: a start would refuse the mistakes. What only this machine may
/// lack, a secret or a server, is a warning.
#[derive(Debug, Default)]
pub(super) struct Findings {
    pub(super) mistakes: Vec<Complaint>,
    pub(super) warnings: Vec<String>,
}

/// `online`: whether databases and servers may be asked.
pub(super) async fn look(config: &Config, places: &Places, online: bool) -> Findings {
    let mut findings = Findings::default();
    for list in &config.reference.lists {
        let path = ["lists", &list.name];
        match entries(list, online).await {
            Ok(Some(0)) => {
                let warning = "it is empty, so that it holds nobody";
                findings.warnings.push(places.about_table(path, warning));
            }
            Ok(_) => {}
            Err(error) if list.is_in_database() => {
                findings.warnings.push(about(places, path, &format!("{error:#}")));
            }
            Err(error) => findings.mistakes.push(places.mistake(path, format!("{error:#}"))),
        }
    }
    for lookup in &config.reference.lookups {
        let path = ["lookups", &lookup.name];
        let settings = match lookup.settings() {
            Ok(settings) => settings,
            Err(error) => {
                findings.warnings.push(about(places, path, &format!("{error:#}")));
                continue;
            }
        };
        let source = settings.source.clone();
        if let Err(error) = Lookup::new(settings, &LookupMetrics::unregistered()) {
            findings.mistakes.push(places.mistake(path, error.to_string()));
        } else if online && let Err(error) = reach(&lookup.name, source).await {
            findings.warnings.push(about(places, path, &format!("{error:#}")));
        }
    }
    findings
}

/// The key says already which list or lookup it is.
fn about(places: &Places, path: [&str; 2], warning: &str) -> String {
    let [table, name] = path;
    let named = format!("{} {name}: ", table.trim_end_matches('s'));
    places.about_table(path, warning.strip_prefix(&named).unwrap_or(warning))
}

/// How many entries a list has; `None` where its database was not to be asked.
async fn entries(list: &ListConfig, online: bool) -> anyhow::Result<Option<usize>> {
    let settings = list.settings()?;
    if list.is_in_database() && !online {
        return Ok(None);
    }
    Ok(Some(List::load(&settings).await?.len()))
}

/// Whether the server of a lookup is there.
async fn reach(name: &str, source: LookupSource) -> anyhow::Result<()> {
    match source {
        LookupSource::Sql { database, .. } => reach_database(name, database).await,
        LookupSource::Http(http) => reach_server(&http.url).await,
    }
}

/// Asks for one row that every database has; the lookup's own query may want arguments.
async fn reach_database(name: &str, database: DatabaseUrl) -> anyhow::Result<()> {
    let query = "SELECT 'here'".to_owned();
    let source = ListSource::Sql { database, query, refresh: CONNECT_MAX };
    let list = ListSettings { name: name.to_owned(), source, ignore_case: false };
    match timeout(CONNECT_MAX, List::load(&list)).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(error)) => bail!("its database does not answer: {}", error.fault),
        Err(_) => bail!("its database does not answer within {}s", CONNECT_MAX.as_secs()),
    }
}

/// Connects and says nothing: any question might be about somebody.
async fn reach_server(url: &str) -> anyhow::Result<()> {
    let url = reqwest::Url::parse(url).context("its `url` is none")?;
    let host = url.host_str().context("its `url` names no server")?;
    let port = url.port_or_known_default().context("its `url` names no port")?;
    // An address of version 6 stands in brackets in a URL, and nowhere else.
    let host = host.trim_start_matches('[').trim_end_matches(']');
    match timeout(CONNECT_MAX, TcpStream::connect((host, port))).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(error)) => bail!("its server {host}:{port} cannot be reached: {error}"),
        Err(_) => {
            bail!("its server {host}:{port} does not answer within {}s", CONNECT_MAX.as_secs())
        }
    }
}
