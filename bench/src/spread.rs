//! A figure that was measured several times.

use std::fmt;

use serde::Serialize;

/// The median, and how far the rounds lie apart.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub(crate) struct Spread {
    pub(crate) median: f64,
    pub(crate) min: f64,
    pub(crate) max: f64,
}

impl Spread {
    pub(crate) fn of(values: impl IntoIterator<Item = f64>) -> Self {
        let mut values: Vec<_> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        let middle = |from_end: bool| {
            let last = values.len().saturating_sub(1);
            values.get(if from_end { last - last / 2 } else { last / 2 }).copied()
        };
        let median = (middle(false).unwrap_or_default() + middle(true).unwrap_or_default()) / 2.0;
        let end = |value: Option<&f64>| value.copied().unwrap_or_default();
        Self { median, min: end(values.first()), max: end(values.last()) }
    }
}

/// `median [min-max]`, with as many decimals as asked for; large numbers in groups of three.
impl fmt::Display for Spread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let decimals = f.precision().unwrap_or(0);
        let number = |value: f64| grouped(&format!("{value:.decimals$}"));
        write!(f, "{} [{}-{}]", number(self.median), number(self.min), number(self.max))
    }
}

fn grouped(number: &str) -> String {
    let (whole, rest) = number.split_at(number.find('.').unwrap_or(number.len()));
    let mut text = String::new();
    for (place, digit) in whole.chars().enumerate() {
        if place > 0 && (whole.len() - place).is_multiple_of(3) {
            text.push(' ');
        }
        text.push(digit);
    }
    text + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_in_the_middle_of_odd_and_even_counts() {
        let odd = Spread::of([3.0, 1.0, 2.0]);
        assert_eq!(odd, Spread { median: 2.0, min: 1.0, max: 3.0 });
        assert_eq!(Spread::of([4.0, 1.0, 2.0, 3.0]).median, 2.5);
        assert_eq!(Spread::of([]), Spread::default());
    }

    #[test]
    fn a_spread_is_written_with_its_ends() {
        let spread = Spread { median: 1234.56, min: 999.0, max: 1_234_567.0 };
        assert_eq!(format!("{spread}"), "1 235 [999-1 234 567]");
        assert_eq!(format!("{spread:.1}"), "1 234.6 [999.0-1 234 567.0]");
    }
}
