//! What a run says at its end.

use std::{collections::BTreeMap, fmt, time::Duration};

use crate::{checker::Verdict, plan::Topology, run::Mutation};

/// So many differences are printed; the others are of the same kinds as a rule.
const SHOWN: usize = 50;

/// What was done and what was found.
#[derive(Clone, Debug)]
pub struct Report {
    pub seed: u64,
    pub topology: Topology,
    pub mutation: Option<Mutation>,
    pub sign_ups: u64,
    pub took: Duration,
    /// Faults by what they were.
    pub injected: BTreeMap<String, u64>,
    /// Faults that cannot be had on this machine.
    pub left_out: BTreeMap<String, u64>,
    /// Starts of processes that had ended by themselves.
    pub mended: u32,
    /// Why the workers were not waited for any longer, where they had something left.
    pub unsettled: Option<String>,
    pub verdict: Verdict,
}

impl Report {
    /// Whether nothing differs.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.unsettled.is_none() && self.verdict.differences.is_empty()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { seed, topology, sign_ups, took, verdict, .. } = self;
        let topology = format!("{topology:?}").to_lowercase();
        writeln!(f, "seed {seed}, {topology}, {sign_ups} sign-ups in {} s", took.as_secs())?;
        if let Some(mutation) = self.mutation {
            writeln!(f, "with the bug {}", mutation.as_str())?;
        }
        let faults: u64 = self.injected.values().sum();
        writeln!(f, "\n{faults:>9}  faults")?;
        for (fault, times) in &self.injected {
            writeln!(f, "{times:>9}    {fault}")?;
        }
        for (fault, times) in &self.left_out {
            writeln!(f, "{times:>9}    {fault}: left out, this machine does not allow it")?;
        }
        writeln!(f, "{:>9}  starts of processes that had ended by themselves", self.mended)?;
        writeln!(f)?;
        for (what, count) in &verdict.counts {
            writeln!(f, "{count:>9}  {what}")?;
        }
        writeln!(f, "\n{:>9}  differences", verdict.differences.len())?;
        for difference in verdict.differences.iter().take(SHOWN) {
            writeln!(f, "           {difference}")?;
        }
        if verdict.differences.len() > SHOWN {
            writeln!(f, "           and {} more", verdict.differences.len() - SHOWN)?;
        }
        if let Some(unsettled) = &self.unsettled {
            writeln!(f, "\nnot settled: {unsettled}")?;
        }
        Ok(())
    }
}
