//! What `up` prints: where things are, and a line to try.

use std::{net::SocketAddr, path::Path};

use vestibule_events::Protocol;

use crate::{
    config::{Config, ConnectorConfig, CredentialConfig, SecretSource, WorkerConfig},
    print::say,
};

/// Made from the configuration, and printed once the addresses are known.
pub(super) struct Banner {
    text: String,
    scheme: &'static str,
    connector: String,
    /// What to try, without the URL that ends it; nothing where a line of text cannot say it.
    call: Option<String>,
    command: String,
}

impl Banner {
    pub(super) fn new(config: &Config, file: &Path) -> Self {
        let first = config.connectors.first();
        let scheme = if config.listen.tls.is_some() { "https" } else { "http" };
        let workers = config.all_workers().filter(|it| it.runs_here());
        let workers: Vec<_> = workers.map(WorkerConfig::name).collect();
        let over = config.nats.as_ref().map_or("the local log".to_owned(), |nats| {
            format!("the stream {} at {}", nats.stream, nats.url)
        });
        let data = config.data.display();
        let text = format!(
            "  workers    {} (over {over})\n  data       {data}\n  settings   {}\n",
            if workers.is_empty() { "none".to_owned() } else { workers.join(", ") },
            file.display(),
        );
        let default_data = config.data == Path::new("./data");
        let program = std::env::args().next().unwrap_or_else(|| "vestibule".into());
        Self {
            text,
            scheme,
            connector: first.map_or_else(String::new, |it| it.name.to_string()),
            call: first.and_then(call),
            command: if default_data {
                format!("{program} replay")
            } else {
                format!("{program} replay --data {data}")
            },
        }
    }

    pub(super) fn print(&self, connector: SocketAddr, admin: SocketAddr) {
        let Self { text, scheme, connector: name, call, command } = self;
        let url = format!("{scheme}://{connector}/connectors/{name}/before-create");
        let call = call.as_ref().map_or_else(
            || format!("See the events of sign-ups:  {command}"),
            |call| {
                format!("Try a sign-up:\n\n  {call} \\\n    {url}\n\nand see its event:  {command}")
            },
        );
        // Nobody need listen.
        drop(say!(
            "Vestibule is up.\n\n  connector  {url}\n  admin      http://{admin} (/healthz, \
             /readyz, /metrics)\n{text}\n{call}\n\nCtrl-C stops.",
        ));
    }
}

/// A call of the connector by `curl`; an extension's is too long for a line, and of other
/// credentials than a password there is none at hand.
fn call(connector: &ConnectorConfig) -> Option<String> {
    if connector.protocol == Protocol::CustomExtension {
        return None;
    }
    let (user, password) = connector.credentials.iter().find_map(CredentialConfig::basic)?;
    let credential = match password {
        SecretSource::Example(password) => format!("{user}:{password}"),
        // curl asks for the password.
        _ => user.to_owned(),
    };
    Some(format!(
        "curl -u {credential} -H 'Content-Type: application/json' \\\n    \
         -d '{{\"email\":\"ada@example.com\",\"givenName\":\"Ada\",\"surname\":\"Lovelace\"}}'"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_to_try_is_one_that_is_answered() {
        let of = |protocol: &str, credential: &str| {
            let source = format!(
                "[connectors.a]\nprotocol = \"{protocol}\"\n[[connectors.a.credentials]]\n{credential}\n"
            );
            let file = tempfile::NamedTempFile::new().unwrap();
            std::fs::write(file.path(), source).unwrap();
            let config = Config::load(file.path()).unwrap();
            config.connectors.first().and_then(call)
        };
        let basic = "user = \"entra\"\npassword = \"example:try-me\"";
        assert!(of("api-connector", basic).unwrap().contains("-u entra:try-me "));
        let secret = "user = \"entra\"\npassword = \"env:P\"";
        assert!(of("custom-policy", secret).unwrap().contains("-u entra "));
        assert_eq!(of("custom-extension", basic), None);
        assert_eq!(of("api-connector", "kind = \"token\"\ntoken = \"env:T\""), None);
    }
}
