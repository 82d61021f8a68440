//! Answers a second of the connector, each round beside one of a bare handler.
//!
//! On a shared machine the same program runs twice as fast a minute later. So every round of the
//! connector follows at once on a round of the handler, and the ratio is taken of such a pair.

use std::{
    fs,
    path::Path,
    sync::{Arc, atomic::AtomicU64},
    time::Duration,
};

use serde::Serialize;

use crate::{
    cli::Options,
    load::{Load, Taken},
    machine,
    server::{Server, ServerKind, Stored},
    spread::Spread,
};

/// One server under one number of connections.
#[derive(Debug, Serialize)]
pub(crate) struct Row {
    pub(crate) server: ServerKind,
    pub(crate) connections: usize,
    pub(crate) per_second: Spread,
    /// To the handler's rate in the round just before.
    pub(crate) ratio: Option<Spread>,
    pub(crate) p50_ms: Spread,
    pub(crate) p99_ms: Spread,
    pub(crate) p999_ms: Spread,
    /// Processor time of the server, and of the load, for one answer.
    pub(crate) server_us: Spread,
    pub(crate) client_us: Spread,
    /// Cores that somebody else used meanwhile.
    pub(crate) others: Spread,
    pub(crate) events_per_commit: Option<f64>,
    pub(crate) memory_mb: f64,
    /// Answers other than to continue.
    pub(crate) refusals: u64,
}

const CONNECTORS: [ServerKind; 3] =
    [ServerKind::Connector, ServerKind::ConnectorWithRules, ServerKind::ConnectorWithAll];

pub(crate) fn measure(options: &Options, folder: &Path) -> anyhow::Result<Vec<Row>> {
    let next_person = Arc::default();
    let mut rows = vec![];
    for connections in &options.connections {
        rows.extend(with_connections(options, folder, *connections, &next_person)?);
    }
    Ok(rows)
}

fn with_connections(
    options: &Options,
    folder: &Path,
    connections: usize,
    next_person: &Arc<AtomicU64>,
) -> anyhow::Result<Vec<Row>> {
    let start = |kind: ServerKind| {
        let folder = folder.join(format!("{connections}-{kind:?}"));
        fs::create_dir(&folder)?;
        Server::start(kind, options, &folder)
    };
    let load = |server: &Server| {
        let path = match server.kind {
            ServerKind::Hello => "/",
            _ => "/connectors/partners/before-create",
        };
        let length = options.round();
        let load = Load {
            address: server.address,
            path,
            connections,
            warm_up: (length / 4).min(Duration::from_secs(1)),
            length,
            server: server.id(),
        };
        load.run(next_person)
    };

    let hello = start(ServerKind::Hello)?;
    let connectors = CONNECTORS.into_iter().map(start).collect::<anyhow::Result<Vec<_>>>()?;
    let mut hello_rounds = vec![];
    let mut rounds: Vec<Vec<(f64, Taken)>> = connectors.iter().map(|_| vec![]).collect();
    for round in 1..=options.rounds {
        eprintln!("{connections} connections, round {round} of {}", options.rounds);
        for (server, rounds) in connectors.iter().zip(&mut rounds) {
            let ceiling = load(&hello)?;
            let taken = load(server)?;
            rounds.push((taken.per_second() / ceiling.per_second(), taken));
            hello_rounds.push(ceiling);
        }
    }

    let mut rows = vec![row(hello, connections, &hello_rounds.iter().collect::<Vec<_>>(), None)?];
    for (server, rounds) in connectors.into_iter().zip(rounds) {
        let ratio = Spread::of(rounds.iter().map(|(ratio, _)| *ratio));
        let taken: Vec<_> = rounds.iter().map(|(_, taken)| taken).collect();
        rows.push(row(server, connections, &taken, Some(ratio))?);
    }
    Ok(rows)
}

fn row(
    server: Server,
    connections: usize,
    rounds: &[&Taken],
    ratio: Option<Spread>,
) -> anyhow::Result<Row> {
    let of = |figure: fn(&Taken) -> f64| Spread::of(rounds.iter().map(|taken| figure(taken)));
    let kind = server.kind;
    let memory_mb = machine::peak_memory(server.id())?;
    let Stored { events, commits } = server.stop()?;
    Ok(Row {
        server: kind,
        connections,
        per_second: of(Taken::per_second),
        ratio,
        p50_ms: of(|taken| taken.quantile(0.5).as_secs_f64() * 1e3),
        p99_ms: of(|taken| taken.quantile(0.99).as_secs_f64() * 1e3),
        p999_ms: of(|taken| taken.quantile(0.999).as_secs_f64() * 1e3),
        server_us: of(|taken| taken.spent.server * 1e6 / taken.per_second()),
        client_us: of(|taken| taken.spent.client * 1e6 / taken.per_second()),
        others: of(|taken| taken.spent.others),
        events_per_commit: (commits > 0.0).then(|| events / commits),
        memory_mb,
        refusals: rounds.iter().map(|taken| taken.refusals).sum(),
    })
}
