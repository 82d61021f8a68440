//! Three nats-servers that are one.

use std::time::Duration;

use anyhow::Context as _;
use serde_json::Value;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use crate::{Nats, eventually, free_port};

const START_LIMIT: Duration = Duration::from_secs(60);

/// A JetStream cluster of three servers on loopback: streams in it may have three replicas.
#[derive(Debug)]
pub struct NatsCluster {
    nodes: Vec<Nats>,
}

impl NatsCluster {
    /// With this configuration for each server; returns when JetStream has a leader.
    ///
    /// The names of the servers, and how they find one another, are ours. They do not tell clients of one
    /// another: a client knows those that it was told of.
    pub async fn start(text: &str, environment: &[(&str, &str)]) -> anyhow::Result<Self> {
        let ports = [free_port(), free_port(), free_port()];
        let routes = ports.map(|port| format!("nats://127.0.0.1:{port}")).join(",");
        let mut nodes = Vec::new();
        for (number, port) in ports.into_iter().enumerate() {
            let listen = format!("nats://127.0.0.1:{port}");
            let name = node_name(number);
            let arguments = ["--name", &name, "--cluster_name", "vestibule", "--cluster", &listen];
            let routes = ["--routes", &routes, "--no_advertise"];
            let arguments = arguments.into_iter().chain(routes).map(str::to_owned).collect();
            nodes.push(Nats::start_with(text, environment, arguments).await?);
        }
        let cluster = Self { nodes };
        eventually(START_LIMIT, "JetStream of all three servers is healthy", async || {
            for node in &cluster.nodes {
                get(node, "/healthz").await?;
            }
            anyhow::Ok(true)
        })
        .await?;
        Ok(cluster)
    }

    pub fn nodes(&self) -> &[Nats] {
        &self.nodes
    }

    pub fn nodes_mut(&mut self) -> &mut [Nats] {
        &mut self.nodes
    }

    /// Which of the servers leads a stream now, as far as those that answer know.
    pub async fn leader(&self, stream: &str) -> anyhow::Result<usize> {
        for node in &self.nodes {
            let Ok(report) = get(node, "/jsz?accounts=true&streams=true").await else { continue };
            let Some(leader) = leader_in(&report, stream) else { continue };
            let leads = |number: &usize| node_name(*number) == leader;
            return (0..self.nodes.len()).find(leads).context("a server that is not ours leads");
        }
        anyhow::bail!("no server knows who leads the stream {stream}")
    }
}

fn node_name(number: usize) -> String {
    format!("node-{}", number + 1)
}

fn leader_in<'a>(report: &'a Value, stream: &str) -> Option<&'a str> {
    let accounts = report["account_details"].as_array()?.iter();
    let mut streams = accounts.filter_map(|it| it["stream_detail"].as_array()).flatten();
    let leader = streams.find(|it| it["name"] == stream)?["cluster"]["leader"].as_str();
    leader.filter(|it| !it.is_empty())
}

/// Asks the monitoring endpoint; whatever is not 200 is an error.
async fn get(node: &Nats, path: &str) -> anyhow::Result<Value> {
    let url = node.http_url()?;
    let address = url.strip_prefix("http://").context("monitoring speaks plain HTTP")?;
    let asking = async {
        let mut stream = TcpStream::connect(address).await?;
        let request = format!("GET {path} HTTP/1.0\r\nHost: {address}\r\n\r\n");
        stream.write_all(request.as_bytes()).await?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await?;
        anyhow::Ok(answer)
    };
    let answer = tokio::time::timeout(Duration::from_secs(2), asking).await??;
    let answer = String::from_utf8(answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").context("no HTTP")?;
    let status = head.lines().next().unwrap_or_default();
    anyhow::ensure!(status.contains(" 200 "), "{path}: {status}");
    Ok(serde_json::from_str(body)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use async_nats::jetstream::{self, stream};

    #[tokio::test]
    async fn a_cluster_goes_on_without_the_leader_of_a_stream() -> anyhow::Result<()> {
        let safe = "jetstream { sync_interval: always }";
        let mut cluster = NatsCluster::start(safe, &[]).await?;
        let urls = cluster.nodes().iter().map(Nats::url).collect::<Vec<_>>();
        let context = jetstream::new(async_nats::connect(urls).await?);
        let config = stream::Config {
            name: "S".to_owned(),
            subjects: vec!["s.>".to_owned()],
            num_replicas: 3,
            ..Default::default()
        };
        context.create_stream(config).await?;
        // A stream that is just made has to elect its leader first.
        let stores = async || anyhow::Ok(context.publish("s.a", "x".into()).await?.await.is_ok());
        eventually(START_LIMIT, "the stream stores", stores).await?;
        let leader =
            eventually(START_LIMIT, "a leader", async || cluster.leader("S").await.map(Some))
                .await?;

        cluster.nodes_mut()[leader].kill();

        eventually(START_LIMIT, "another leads", async || {
            anyhow::Ok(cluster.leader("S").await? != leader)
        })
        .await?;
        eventually(START_LIMIT, "the stream stores again", stores).await?;
        Ok(())
    }
}
