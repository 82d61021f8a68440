//! What a run came to, as a table for people or as JSON for programs.

use std::{fmt, time::Duration};

use comfy_table::{Table, presets::NOTHING};
use serde::Serialize;
use serde_json::{Value, json};

use super::{
    platform::{ANSWERS, Tally},
    verify::{Difference, Verified},
};

/// The table stops naming differences after so many; JSON has them all.
const DIFFERENCES_SHOWN: usize = 20;

/// Everything worth knowing about a run.
#[derive(Debug)]
pub(super) struct Summary {
    pub(super) run: String,
    pub(super) seed: u64,
    pub(super) url: String,
    pub(super) sign_ups: u64,
    pub(super) took: Duration,
    pub(super) tally: Tally,
    pub(super) checked: Checked,
    /// Why the run ended early, if it did.
    pub(super) ended_early: Option<String>,
}

/// Whether log and store were compared with the answers.
#[derive(Debug)]
pub(super) enum Checked {
    Yes(Verified),
    /// They cannot be seen from here, or nobody wanted it: nothing is known, for better or worse.
    No(String),
    /// They could be seen at first, and then not.
    Failed(String),
}

/// Latencies of answered calls in microseconds, each one that really occurred.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
struct Latency {
    min: u128,
    p50: u128,
    p90: u128,
    p99: u128,
    p99_9: u128,
    max: u128,
}

impl Summary {
    /// Nothing failed and nothing differs.
    pub(super) fn is_ok(&self) -> bool {
        self.differences().next().is_none()
            && self.tally.failed() == 0
            && self.ended_early.is_none()
            && !matches!(self.checked, Checked::Failed(_))
    }

    pub(super) fn json(&self) -> Value {
        let answers: serde_json::Map<_, _> = ANSWERS
            .iter()
            .map(|answer| ((*answer).to_owned(), self.answers(answer).into()))
            .collect();
        let (verified, why_not) = match &self.checked {
            Checked::Yes(verified) => (Some(verified), None),
            Checked::No(why) | Checked::Failed(why) => (None, Some(why)),
        };
        json!({
            "run": self.run,
            "seed": self.seed,
            "url": self.url,
            "sign_ups": self.sign_ups,
            "seconds": self.took.as_secs_f64(),
            "calls": self.tally.calls,
            "calls_per_second": self.calls_per_second(),
            "answers": answers,
            "latency_us": self.latency(),
            "accepted_answered": self.tally.forms.accepted(),
            "accepted_events": verified.map(|it| it.accepted_events),
            "acted_on": verified.map(|it| &it.acted_on),
            "verified": verified.is_some(),
            "not_verified_because": why_not,
            "ended_early_because": self.ended_early,
            "differences": self.differences().collect::<Vec<_>>(),
            "ok": self.is_ok(),
        })
    }

    fn answers(&self, answer: &str) -> u64 {
        self.tally.answers.get(answer).copied().unwrap_or_default()
    }

    fn differences(&self) -> impl Iterator<Item = &Difference> {
        let verified: &[Difference] = match &self.checked {
            Checked::Yes(verified) => &verified.differences,
            _ => &[],
        };
        self.tally.differences.iter().chain(verified)
    }

    #[expect(clippy::cast_precision_loss, reason = "nobody reads the sixteenth digit")]
    fn calls_per_second(&self) -> f64 {
        self.tally.latencies.len() as f64 / self.took.as_secs_f64().max(f64::MIN_POSITIVE)
    }

    fn latency(&self) -> Option<Latency> {
        let mut sorted: Vec<_> = self.tally.latencies.iter().map(Duration::as_micros).collect();
        sorted.sort_unstable();
        let at = |per_mille| rank(sorted.len(), per_mille).map(|rank| sorted[rank]);
        Some(Latency {
            min: *sorted.first()?,
            p50: at(500)?,
            p90: at(900)?,
            p99: at(990)?,
            p99_9: at(999)?,
            max: *sorted.last()?,
        })
    }

    fn rows(&self) -> Vec<[String; 2]> {
        let mut rows = vec![
            ["run".into(), format!("{} (--seed {})", self.run, self.seed)],
            ["called".into(), self.url.clone()],
            ["sign-ups".into(), self.sign_ups.to_string()],
            [
                "calls".into(),
                format!(
                    "{} in {:.1} s, {:.0} answers/s",
                    self.tally.calls,
                    self.took.as_secs_f64(),
                    self.calls_per_second()
                ),
            ],
        ];
        for answer in ANSWERS {
            let count = self.answers(answer);
            if count > 0 {
                rows.push([format!("  {}", answer.replace('_', " ")), count.to_string()]);
            }
        }
        if let Some(latency) = self.latency() {
            let Latency { min, p50, p90, p99, p99_9, max } = latency;
            let shown = [
                ("min", min),
                ("p50", p50),
                ("p90", p90),
                ("p99", p99),
                ("p99.9", p99_9),
                ("max", max),
            ]
            .map(|(name, micros)| format!("{name} {}", milliseconds(micros)));
            rows.push(["latency".into(), format!("{} ms", shown.join(" · "))]);
        }
        rows.push(["accepted".into(), format!("{} answers", self.tally.forms.accepted())]);
        if let Checked::Yes(verified) = &self.checked {
            rows.push(["".into(), format!("{} events", verified.accepted_events)]);
            for (worker, count) in &verified.acted_on {
                rows.push(["".into(), format!("{count} acted on exactly once by {worker}")]);
            }
        }
        rows
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut table = Table::new();
        table.load_style(NOTHING);
        table.add_rows(self.rows());
        writeln!(f, "{table}")?;
        let count = self.differences().count();
        for difference in self.differences().take(DIFFERENCES_SHOWN) {
            writeln!(f, "difference: {difference}")?;
        }
        if count > DIFFERENCES_SHOWN {
            let more = count - DIFFERENCES_SHOWN;
            writeln!(f, "… and {more} more; --output json has them all")?;
        }
        if let Some(why) = &self.ended_early {
            writeln!(f, "ended early: {why}")?;
        }
        match &self.checked {
            Checked::Yes(Verified { hint: Some(hint), .. }) => writeln!(f, "note: {hint}")?,
            Checked::Yes(_) => {}
            Checked::No(why) | Checked::Failed(why) => {
                writeln!(f, "not verified that it was acted on: {why}")?;
            }
        }
        match (self.is_ok(), &self.checked) {
            (true, Checked::Yes(_)) => {
                f.write_str("ok: every accepted sign-up is one event, acted on exactly once")
            }
            (true, _) => f.write_str("ok: every call was answered"),
            (false, _) if count > 0 => write!(f, "NOT ok: {count} differences"),
            (false, _) => f.write_str("NOT ok"),
        }
    }
}

/// Where in `count` sorted values the given quantile is (nearest rank).
fn rank(count: usize, per_mille: usize) -> Option<usize> {
    (count * per_mille).div_ceil(1000).max(1).checked_sub(1).filter(|rank| *rank < count)
}

fn milliseconds(micros: u128) -> String {
    format!("{}.{:02}", micros / 1000, micros % 1000 / 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn summary(latencies: Vec<Duration>) -> Summary {
        Summary {
            run: "r1".into(),
            seed: 7,
            url: "http://127.0.0.1:7171/connectors/partners".into(),
            sign_ups: 1,
            took: Duration::from_secs(2),
            tally: Tally { latencies, ..Tally::default() },
            checked: Checked::Yes(Verified::default()),
            ended_early: None,
        }
    }

    #[test]
    fn quantiles_are_values_that_occurred() {
        let latencies = (1..=1000).rev().map(Duration::from_micros).collect();
        let expected = Latency { min: 1, p50: 500, p90: 900, p99: 990, p99_9: 999, max: 1000 };
        assert_eq!(summary(latencies).latency(), Some(expected));
        let one = summary(vec![Duration::from_micros(5)]).latency();
        assert_eq!(one, Some(Latency { min: 5, p50: 5, p90: 5, p99: 5, p99_9: 5, max: 5 }));
        assert_eq!(summary(vec![]).latency(), None);
    }

    #[test]
    fn anything_wrong_is_not_ok() {
        assert!(summary(vec![]).is_ok());
        let wrong: [fn(&mut Summary); 5] = [
            |it| it.tally.count("failed"),
            |it| it.tally.differences.push(Difference::MissingEvent { sign_up: 1 }),
            |it| it.ended_early = Some("nobody answers".into()),
            |it| it.checked = Checked::Failed("the store is gone".into()),
            |it| {
                it.checked = Checked::Yes(Verified {
                    differences: vec![Difference::MissingEvent { sign_up: 1 }],
                    ..Verified::default()
                });
            },
        ];
        for (index, spoil) in wrong.iter().enumerate() {
            let mut summary = summary(vec![]);
            spoil(&mut summary);
            assert!(!summary.is_ok(), "{index}");
            assert_eq!(summary.json()["ok"], false, "{index}");
            assert!(summary.to_string().contains("NOT ok"), "{index}");
        }
        let mut unseen = summary(vec![]);
        unseen.checked = Checked::No("there is no store".into());
        assert!(unseen.is_ok());
        assert_eq!(unseen.json()["verified"], false);
    }

    #[test]
    fn json_counts_every_kind_of_answer_also_those_that_did_not_occur() {
        let mut summary = summary(vec![Duration::from_micros(1500)]);
        summary.tally.count("continue");
        let json = summary.json();
        assert_eq!(json["answers"]["continue"], 1);
        assert_eq!(json["answers"]["failed"], 0);
        assert_eq!(json["latency_us"]["p99_9"], 1500);
        assert_eq!(json["accepted_events"], 0);
    }
}
