//! Lists that hold nothing, and what cannot be reached.

use std::time::Duration;

use anyhow::{Context, bail};
use tokio::{net::TcpStream, time::timeout};
use vestibule_api::{
    DatabaseUrl, List, ListSettings, ListSource, Lookup, LookupMetrics, LookupSource,
};

use super::places::Places;
use crate::config::{Config, ListConfig, LookupConfig};

/// A server that takes longer to be there is not.
const CONNECT_MAX: Duration = Duration::from_secs(5);

/// `online`: whether databases and servers may be asked.
pub(super) async fn warnings(config: &Config, places: &Places, online: bool) -> Vec<String> {
    let mut warnings = Vec::new();
    for list in &config.reference.lists {
        let warning = match entries(list, online).await {
            Ok(Some(0)) => "it is empty, so that it holds nobody".to_owned(),
            Ok(_) => continue,
            Err(error) => format!("{error:#}"),
        };
        warnings.push(about(places, ["lists", &list.name], &warning));
    }
    for lookup in &config.reference.lookups {
        if let Err(error) = ask(lookup, online).await {
            warnings.push(about(places, ["lookups", &lookup.name], &format!("{error:#}")));
        }
    }
    warnings
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

/// Whether a lookup has what it needs and, where its server may be asked, that is there.
async fn ask(lookup: &LookupConfig, online: bool) -> anyhow::Result<()> {
    let settings = lookup.settings()?;
    let source = settings.source.clone();
    Lookup::new(settings, &LookupMetrics::unregistered())?;
    if !online {
        return Ok(());
    }
    match source {
        LookupSource::Sql { database, .. } => reach_database(&lookup.name, database).await,
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
