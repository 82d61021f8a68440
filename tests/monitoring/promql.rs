//! The metrics and labels that a PromQL expression names.
//!
//! It reads words, not meaning: whether an expression is one is `promtool`'s to say. Every word that
//! is no keyword, function or label must be a metric, so that none is overlooked.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context as _, bail};

const KEYWORDS: [&str; 8] = ["and", "or", "unless", "bool", "offset", "on", "ignoring", "inf"];
/// A list of labels in brackets follows them.
const TAKING_LABELS: [&str; 6] = ["by", "without", "on", "ignoring", "group_left", "group_right"];
/// What Prometheus itself adds to every series.
const OF_PROMETHEUS: [&str; 2] = ["job", "instance"];

#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Names {
    pub(super) metrics: BTreeSet<String>,
    pub(super) labels: BTreeSet<String>,
}

pub(super) fn names(expression: &str) -> anyhow::Result<Names> {
    let mut names = Names::default();
    let mut rest = expression;
    let mut takes_labels = false;
    while let Some(next) = rest.chars().next() {
        match next {
            '"' | '\'' => rest = after(&rest[1..], next)?,
            '{' => {
                let inside = &rest[1..rest.find('}').context("a brace is open")?];
                let mut matchers = inside;
                while let Some((label, value)) = matchers.split_once('=') {
                    let label = label.trim_matches([',', ' ', '!', '\n']);
                    names.labels.insert(label.to_owned());
                    let value = value.trim_start_matches('~').trim_start();
                    let value = value.strip_prefix('"').context("a matcher without a text")?;
                    matchers = after(value, '"')?;
                }
                rest = &rest[inside.len() + 2..];
            }
            // A time range, or a number with its unit.
            '[' => rest = &rest[rest.find(']').context("a bracket is open")? + 1..],
            '0'..='9' => {
                rest = rest.trim_start_matches(|it: char| it.is_ascii_alphanumeric() || it == '.');
            }
            '(' if takes_labels => {
                let inside = &rest[1..rest.find(')').context("a bracket is open")?];
                let labels = inside.split(',').map(str::trim).filter(|it| !it.is_empty());
                names.labels.extend(labels.map(str::to_owned));
                rest = &rest[inside.len() + 2..];
            }
            it if it.is_ascii_alphabetic() || it == '_' => {
                let is_word = |it: char| it.is_ascii_alphanumeric() || matches!(it, '_' | ':');
                let end = rest.find(|it| !is_word(it)).unwrap_or(rest.len());
                let word = &rest[..end];
                rest = rest[end..].trim_start();
                takes_labels = TAKING_LABELS.contains(&word);
                // A function or an aggregation, where `by` may stand before the bracket.
                let is_called = rest.starts_with('(')
                    || rest.starts_with("by ")
                    || rest.starts_with("by(")
                    || rest.starts_with("without ");
                if !takes_labels && !is_called && !KEYWORDS.contains(&word) {
                    names.metrics.insert(word.to_owned());
                }
                continue;
            }
            it if it.is_whitespace() => {
                rest = rest.trim_start();
                continue;
            }
            it if "()+-*/%^=!<>,@".contains(it) => rest = &rest[1..],
            other => bail!("`{other}` in {expression}"),
        }
        takes_labels = false;
    }
    Ok(names)
}

fn after(text: &str, quote: char) -> anyhow::Result<&str> {
    let (_, after) = text.split_once(quote).context("a quote is open")?;
    Ok(after)
}

/// What an expression names and does not exist.
pub(super) fn unknown(
    expression: &str,
    series: &BTreeMap<String, BTreeSet<String>>,
) -> anyhow::Result<Vec<String>> {
    let names = names(expression).with_context(|| expression.to_owned())?;
    let mut unknown = Vec::new();
    let mut labels: BTreeSet<&str> = OF_PROMETHEUS.into();
    for metric in &names.metrics {
        match series.get(metric) {
            Some(its) => labels.extend(its.iter().map(String::as_str)),
            None if metric == "up" => {}
            None => unknown.push(format!("{metric} in {expression}")),
        }
    }
    let missing = names.labels.iter().filter(|it| !labels.contains(it.as_str()));
    unknown.extend(missing.map(|it| format!("the label {it} in {expression}")));
    Ok(unknown)
}

#[test]
fn every_name_in_an_expression_is_found() {
    let found = names(
        "histogram_quantile(0.99, sum by (le, step) (rate(a_seconds_bucket{connector=~\"x{1,2}\", \
         step!=\"none\"}[5m]))) / on(connector) group_left(team) max(b) without (job) > 1.5e3 \
         and c offset 5m unless (time() - d) > 2h",
    );
    // A brace within a text would end the matchers: nothing of ours has one, and it is said.
    assert!(found.is_err());
    let found = names(
        "histogram_quantile(0.99, sum by (le, step) (rate(a_seconds_bucket{connector=~\"x.*\", \
         kind!=\"none\"}[5m]))) / on(connector) group_left(team) max without (job) (b) > 1.5e3 \
         and c offset 5m unless (time() - d) > 2h",
    )
    .unwrap();
    let set = |names: &[&str]| names.iter().map(|it| (*it).to_owned()).collect::<BTreeSet<_>>();
    assert_eq!(found.metrics, set(&["a_seconds_bucket", "b", "c", "d"]));
    assert_eq!(found.labels, set(&["connector", "job", "kind", "le", "step", "team"]));

    let series = BTreeMap::from([("a".to_owned(), set(&["worker"]))]);
    assert_eq!(unknown("sum by (worker) (a) + up", &series).unwrap(), Vec::<String>::new());
    assert_eq!(unknown("sum by (who) (a) + b", &series).unwrap().len(), 2);
}
