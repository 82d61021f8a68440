//! What `/metrics` says, as Prometheus reads it.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context as _, ensure};

/// Families by the name that `# TYPE` gives them.
#[derive(Clone, Debug, Default)]
pub(super) struct Scrape(pub(super) BTreeMap<String, Family>);

#[derive(Clone, Debug, Default)]
pub(super) struct Family {
    pub(super) kind: String,
    pub(super) help: String,
    pub(super) unit: String,
    /// Without those that belong to the kind, as `le`.
    pub(super) labels: BTreeSet<String>,
    pub(super) values: BTreeSet<String>,
}

impl Scrape {
    pub(super) fn parse(text: &str) -> anyhow::Result<Self> {
        let mut families = BTreeMap::<String, Family>::new();
        let mut lines = text.lines();
        for line in lines.by_ref() {
            if line == "# EOF" {
                break;
            }
            if let Some(comment) = line.strip_prefix("# ") {
                let mut words = comment.splitn(3, ' ');
                let (what, name) = (words.next().unwrap_or_default(), words.next());
                let family = families.entry(name.context("no name")?.to_owned()).or_default();
                let said = words.next().unwrap_or_default().to_owned();
                let place = match what {
                    "HELP" => &mut family.help,
                    "TYPE" => &mut family.kind,
                    "UNIT" => &mut family.unit,
                    _ => anyhow::bail!("{line}"),
                };
                ensure!(place.is_empty(), "said twice: {line}");
                *place = said;
                continue;
            }
            let end = line.find(['{', ' ']).context("a series without a value")?;
            let sample = &line[..end];
            let (_, family) = families
                .iter_mut()
                .find(|(name, it)| it.samples(name).iter().any(|it| it == sample))
                .with_context(|| format!("belongs to nothing: {line}"))?;
            for (label, value) in labels(line)? {
                if !(label == "le" && family.kind == "histogram") {
                    family.labels.insert(label);
                    family.values.insert(value);
                }
            }
        }
        ensure!(lines.next().is_none(), "something after the end");
        Ok(Self(families))
    }

    pub(super) fn merge(&mut self, other: Self) {
        for (name, family) in other.0 {
            let known = self.0.entry(name).or_insert_with(|| Family {
                labels: BTreeSet::new(),
                values: BTreeSet::new(),
                ..family.clone()
            });
            known.labels.extend(family.labels);
            known.values.extend(family.values);
        }
    }

    /// The names that queries use, each with its labels.
    pub(super) fn series(&self) -> BTreeMap<String, BTreeSet<String>> {
        let mut series = BTreeMap::new();
        for (name, family) in &self.0 {
            for sample in family.samples(name) {
                let mut labels = family.labels.clone();
                if sample.ends_with("_bucket") {
                    labels.insert("le".to_owned());
                }
                series.insert(sample, labels);
            }
        }
        series
    }
}

impl Family {
    fn samples(&self, name: &str) -> Vec<String> {
        let endings: &[&str] = match &*self.kind {
            "counter" => &["_total"],
            "histogram" => &["_bucket", "_count", "_sum"],
            "info" => &["_info"],
            _ => &[""],
        };
        endings.iter().map(|ending| format!("{name}{ending}")).collect()
    }
}

/// The labels of a series; ours hold no quotes or backslashes, which is worth knowing too.
fn labels(line: &str) -> anyhow::Result<Vec<(String, String)>> {
    let Some((_, rest)) = line.split_once('{') else { return Ok(Vec::new()) };
    let (inside, _) = rest.rsplit_once('}').context("a brace is open")?;
    ensure!(!inside.contains('\\'), "a label holds a backslash: {line}");
    let mut labels = Vec::new();
    let mut rest = inside;
    while !rest.is_empty() {
        let (name, after) = rest.split_once("=\"").context("a label without a value")?;
        let (value, after) = after.split_once('"').context("a quote is open")?;
        labels.push((name.to_owned(), value.to_owned()));
        rest = after.strip_prefix(',').unwrap_or(after);
    }
    Ok(labels)
}
