//! What `up` prints: where things are, and a line to try.

use std::{net::SocketAddr, path::Path};

use crate::config::{Config, CredentialConfig, SecretSource, WorkerConfig};

/// Made from the configuration, and printed once the addresses are known.
pub(super) struct Banner {
    text: String,
    scheme: &'static str,
    connector: String,
    credential: String,
    command: String,
}

impl Banner {
    pub(super) fn new(config: &Config, file: &Path) -> Self {
        let first = config.connectors.first();
        let credential = first
            .and_then(|it| it.credentials.iter().find_map(CredentialConfig::basic))
            .map_or_else(
                // Some other credential, which a line of text does not have at hand.
                || "USER".to_owned(),
                |(user, password)| match password {
                    SecretSource::Example(password) => format!("{user}:{password}"),
                    // curl asks for the password.
                    _ => user.to_owned(),
                },
            );
        let scheme = if config.listen.tls.is_some() { "https" } else { "http" };
        let workers: Vec<_> = config.workers.iter().map(WorkerConfig::name).collect();
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
            credential,
            command: if default_data {
                format!("{program} replay")
            } else {
                format!("{program} replay --data {data}")
            },
        }
    }

    pub(super) fn print(&self, connector: SocketAddr, admin: SocketAddr) {
        let Self { text, scheme, connector: name, credential, command } = self;
        let url = format!("{scheme}://{connector}/connectors/{name}/before-create");
        println!(
            "Vestibule is up.\n\n  connector  {url}\n  admin      http://{admin} (/healthz, \
             /readyz, /metrics)\n{text}\nTry a sign-up:\n\n  \
             curl -u {credential} -H 'Content-Type: application/json' \\\n    \
             -d '{{\"email\":\"ada@example.com\",\"givenName\":\"Ada\",\"surname\":\"Lovelace\"}}' \
             \\\n    {url}\n\nand see its event:  {command}\n\nCtrl-C stops.",
        );
    }
}
