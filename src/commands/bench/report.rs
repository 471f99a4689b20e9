//! Lines of a benchmark: a figure, what it is measured against, their ratio, and what it has to reach; and what several
//! measurements come to.

use serde::Serialize;

use crate::output;

/// One line.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Line {
    /// What was measured.
    pub(super) what: String,
    /// The figure, with its unit.
    pub(super) figure: String,
    /// What it is compared with.
    pub(super) against: String,
    /// Figure divided by the other, so that more is better (for medians of rounds the median of each round's ratio); or a fraction
    /// of a limit, so that less is better.
    pub(super) ratio: f64,
    /// What the ratio is to reach, such as `>= 0.7`; empty where nothing is asked.
    pub(super) reach: &'static str,
}

/// Median, least and greatest of some numbers.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(super) struct Spread {
    /// The middle one, or the mean of the two in the middle.
    pub(super) median: f64,
    /// The least.
    pub(super) min: f64,
    /// The greatest.
    pub(super) max: f64,
    /// How many there are.
    pub(super) count: usize,
}

impl Spread {
    /// `None` when there is no number.
    pub(super) fn of(numbers: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut sorted: Vec<f64> = numbers.into_iter().collect();
        sorted.sort_by(f64::total_cmp);
        let (min, max, count) = (*sorted.first()?, *sorted.last()?, sorted.len());
        let median = (sorted[(count - 1) / 2] + sorted[count / 2]) / 2.0;
        Some(Self { median, min, max, count })
    }
}

/// Prints lines as a table or as JSON, with the conditions.
pub(super) fn print(title: &str, lines: &[Line], json: bool) -> anyhow::Result<()> {
    let conditions = conditions();
    if json {
        println!(
            "{}",
            serde_json::to_string_pretty(
                &serde_json::json!({"benchmark": title, "conditions": conditions, "lines": lines})
            )?
        );
        return Ok(());
    }
    println!("{title}\n{conditions}\n");
    let rows = lines.iter().map(|line| {
        vec![
            line.what.clone(),
            line.figure.clone(),
            line.against.clone(),
            format!("{:.3}", line.ratio),
            line.reach.to_owned(),
        ]
    });
    println!("{}", output::table(&["what", "figure", "against", "ratio", "to reach"], rows.collect()));
    Ok(())
}

/// A rate in `unit`; bytes by the million.
pub(super) fn rate(rate: f64, unit: &str) -> String {
    if unit == "B/s" { format!("{:.0} MB/s", rate / 1e6) } else { format!("{rate:.0} {unit}") }
}

/// The machine, as far as it matters to who reads the figures.
fn conditions() -> String {
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let kernel = rustix::system::uname().release().to_string_lossy().into_owned();
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let load = load.split(' ').next().unwrap_or("?").to_owned();
    let build = if cfg!(debug_assertions) { "debug build (not for quoting)" } else { "release build" };
    format!("{cores} cores, Linux {kernel}, load {load} at the end, {build}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_are_in_the_middle() {
        let cases: [(&[f64], f64); 3] = [(&[3.0], 3.0), (&[4.0, 1.0], 2.5), (&[9.0, 1.0, 2.0], 2.0)];
        for (numbers, median) in cases {
            let spread = Spread::of(numbers.iter().copied()).expect("numbers");
            assert_eq!((spread.median, spread.count), (median, numbers.len()), "{numbers:?}");
            assert!(spread.min <= median && spread.max >= median);
        }
        assert_eq!(Spread::of([]), None);
    }
}
