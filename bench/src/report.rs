//! The figures as a person reads them, or a program.

use comfy_table::{CellAlignment, Table, presets::ASCII_MARKDOWN};
use serde::Serialize;

use crate::{cli::Output, connector, decide, machine::Machine, outage, pipeline, targets, upkeep};

#[derive(Debug, Default, Serialize)]
pub(crate) struct Report {
    pub(crate) machine: Machine,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) decide: Option<decide::Figures>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) connector: Vec<connector::Row>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) pipeline: Vec<pipeline::Row>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) outage: Vec<outage::Row>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) targets: Vec<targets::Row>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) upkeep: Vec<upkeep::Row>,
}

impl Report {
    pub(crate) fn written_as(&self, output: Output) -> serde_json::Result<String> {
        Ok(match output {
            Output::Json => serde_json::to_string_pretty(self)?,
            Output::Table => {
                let mut parts = vec![self.machine()];
                if let Some(figures) = &self.decide {
                    parts.push(decide_table(figures));
                }
                if !self.connector.is_empty() {
                    parts.push(connector_table(&self.connector));
                }
                if !self.pipeline.is_empty() {
                    parts.push(pipeline_table(&self.pipeline));
                }
                if !self.outage.is_empty() {
                    parts.push(outage_table(&self.outage));
                }
                if !self.targets.is_empty() {
                    parts.push(targets_table(&self.targets));
                }
                if !self.upkeep.is_empty() {
                    parts.push(upkeep_table(&self.upkeep));
                }
                parts.join("\n\n")
            }
        })
    }

    fn machine(&self) -> String {
        let Machine { cores, processor, kernel, file_system, load, release_build } = &self.machine;
        let build = if *release_build { "release build" } else { "NOT A RELEASE BUILD" };
        format!(
            "{cores} cores of {processor}, Linux {kernel}, logs on {file_system}, load {load} at \
             the start, {build}"
        )
    }
}

/// What each part adds, beside all that a decision costs with it.
fn decide_table(figures: &decide::Figures) -> String {
    let mut table = table(&["decides by", "us a decision", "adds us", "aim"]);
    for row in &figures.rows {
        table.add_row([
            row.by.as_str().to_owned(),
            format!("{:.2}", row.micros),
            row.adds.map_or_else(String::new, |adds| format!("{adds:.2}")),
            row.aim.map_or_else(String::new, |aim| format!("< {aim}")),
        ]);
    }
    let decide::Figures { list_entries, list_seconds, .. } = figures;
    let list = format!(
        "the list of {list_entries} entries is loaded from its file in {list_seconds:.2} s"
    );
    format!("{}\n\n{list}", aligned(table, &[0]))
}

/// Medians of all rounds, with the least and the most of the rates and ratios.
fn connector_table(rows: &[connector::Row]) -> String {
    let mut table = table(&[
        "connections",
        "server",
        "answers/s",
        "ratio",
        "p50 ms",
        "p99 ms",
        "p99.9 ms",
        "server us",
        "client us",
        "others' cores",
        "events/commit",
        "peak MB",
        "refusals",
    ]);
    for row in rows {
        table.add_row([
            row.connections.to_string(),
            row.server.as_str().to_owned(),
            row.per_second.to_string(),
            row.ratio.map_or_else(|| "1".to_owned(), |ratio| format!("{ratio:.2}")),
            format!("{:.2}", row.p50_ms.median),
            format!("{:.2}", row.p99_ms.median),
            format!("{:.2}", row.p999_ms.median),
            format!("{:.1}", row.server_us.median),
            format!("{:.1}", row.client_us.median),
            format!("{:.2}", row.others.median),
            row.events_per_commit.map_or_else(String::new, |events| format!("{events:.0}")),
            format!("{:.0}", row.memory_mb),
            row.refusals.to_string(),
        ]);
    }
    aligned(table, &[1])
}

fn pipeline_table(rows: &[pipeline::Row]) -> String {
    let mut table = table(&["way", "events", "events/s"]);
    for row in rows {
        table.add_row([row.name.to_owned(), row.events.to_string(), row.per_second.to_string()]);
    }
    aligned(table, &[0])
}

fn outage_table(rows: &[outage::Row]) -> String {
    let mut table =
        table(&["weather", "calls", "p50 ms", "p99 ms", "p99.9 ms", "most ms", "missed"]);
    for row in rows {
        let times = [row.p50_ms, row.p99_ms, row.p999_ms, row.max_ms];
        let mut cells = vec![row.weather.as_str().to_owned(), row.calls.to_string()];
        cells.extend(times.map(|ms| format!("{ms:.1}")));
        cells.push(row.missed.to_string());
        table.add_row(cells);
    }
    aligned(table, &[0])
}

fn targets_table(rows: &[targets::Row]) -> String {
    let mut table = table(&["the tenth target", "deliveries", "p50 ms", "p99 ms", "ratio of p99"]);
    for row in rows {
        table.add_row([
            row.tenth.as_str().to_owned(),
            row.deliveries.to_string(),
            format!("{:.1}", row.p50_ms),
            format!("{:.1}", row.p99_ms),
            row.ratio.map_or_else(|| "1".to_owned(), |ratio| format!("{ratio:.2}")),
        ]);
    }
    aligned(table, &[0])
}

fn upkeep_table(rows: &[upkeep::Row]) -> String {
    let mut table = table(&["beside", "appends", "p50 ms", "p99 ms", "most ms", "seconds"]);
    for row in rows {
        table.add_row([
            row.beside.to_owned(),
            row.appends.to_string(),
            format!("{:.1}", row.p50_ms),
            format!("{:.1}", row.p99_ms),
            format!("{:.1}", row.max_ms),
            format!("{:.1}", row.seconds),
        ]);
    }
    aligned(table, &[0])
}

fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(ASCII_MARKDOWN).set_header(header);
    table
}

/// Figures to the right; `names` are the columns that hold none.
fn aligned(mut table: Table, names: &[usize]) -> String {
    for (place, column) in table.column_iter_mut().enumerate() {
        if !names.contains(&place) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table.to_string()
}
