//! What a program of Hermes counts, in one table a program.
//!
//! A table names every metric with its unit, its label and the closed list of the label's values; the exposition at
//! `/metrics` and a section of `docs/metrics.md` are both made from it, so they cannot disagree. Nothing is labelled by
//! image, layer, chunk or peer: the number of series is fixed.
//!
//! Whoever has a table fills [`Values`] when somebody asks. What is recorded where it happens is one relaxed atomic addition,
//! no lock and no allocation, so that it may stand in the path of reads. That is why this is not a metrics library: those
//! look a label up behind a lock, and cannot print the table. Counters begin at zero when the process starts.
//!
//! Never: knows what the numbers mean, keeps one over a restart.

mod histogram;
pub mod server;
mod table;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::{SystemTime, UNIX_EPOCH};

pub use histogram::{Distribution, Histogram};
pub use table::{BUILD_INFO, Kind, Label, Metric, broken_rules, metric, rows};

/// Makes an enum out of a closed list of label values, with the place of each in an array of counters.
#[macro_export]
macro_rules! labels {
    ($(#[$doc:meta])* $name:ident { $($(#[$variant_doc:meta])* $variant:ident = $label:literal),* $(,)? }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum $name {
            $($(#[$variant_doc])* $variant,)*
        }

        impl $name {
            /// The label's values, in order.
            pub const NAMES: [&str; [$($label),*].len()] = [$($label),*];

            /// The label's value.
            pub const fn name(self) -> &'static str {
                Self::NAMES[self as usize]
            }
        }
    };
}

/// A series: the metric, and the value of its label (empty for a metric without one).
type Series = (&'static str, &'static str);

/// Values, by metric and label value. What is not set counts as zero.
#[derive(Debug, Default)]
pub struct Values {
    numbers: BTreeMap<Series, f64>,
    distributions: BTreeMap<Series, Distribution>,
}

impl Values {
    /// Sets the value of `metric` for the label value `label`.
    pub fn set(&mut self, metric: &'static str, label: &'static str, value: u64) {
        self.numbers.insert((metric, label), value as f64);
    }

    /// Sets a value that may have a fraction.
    pub fn set_seconds(&mut self, metric: &'static str, label: &'static str, value: f64) {
        self.numbers.insert((metric, label), value);
    }

    /// Sets a histogram.
    pub fn set_distribution(&mut self, metric: &'static str, label: &'static str, value: Distribution) {
        self.distributions.insert((metric, label), value);
    }

    /// The value of `metric` for the label value `label`.
    pub fn get(&self, metric: &'static str, label: &'static str) -> f64 {
        self.numbers.get(&(metric, label)).copied().unwrap_or(0.0)
    }
}

/// The exposition in Prometheus' text format 0.0.4, of every metric of `table` in its order. `version` is that of the program.
pub fn expose(table: &[Metric], version: &str, values: &Values) -> String {
    let mut out = String::new();
    for metric in table {
        let (name, kind) = (metric.name, metric.kind.name());
        // Writing to a string cannot fail.
        let _ = writeln!(out, "# HELP {name} {}\n# TYPE {name} {kind}", metric.help);
        let labels = metric.label.map_or(&[""] as &[&str], |(_, values)| values);
        for value in labels {
            let label = metric.label.map_or_else(String::new, |(label, _)| format!("{label}=\"{value}\""));
            match metric.kind {
                Kind::Histogram => expose_distribution(&mut out, name, &label, values, value),
                _ if name == BUILD_INFO => {
                    let _ = writeln!(out, "{name}{{version=\"{version}\"}} 1");
                }
                Kind::Counter | Kind::Gauge => {
                    let _ = writeln!(out, "{name}{} {}", braced(&label), values.get(name, value));
                }
            }
        }
    }
    out
}

fn braced(labels: &str) -> String {
    if labels.is_empty() { String::new() } else { format!("{{{labels}}}") }
}

fn expose_distribution(out: &mut String, name: &'static str, label: &str, values: &Values, value: &'static str) {
    let Some(distribution) = values.distributions.get(&(name, value)) else { return };
    let mut count = 0;
    let separator = if label.is_empty() { "" } else { "," };
    for (at, bucket) in distribution.buckets.iter().enumerate() {
        count += bucket;
        let bound = distribution.bounds.get(at).map_or_else(|| "+Inf".to_owned(), f64::to_string);
        let _ = writeln!(out, "{name}_bucket{{{label}{separator}le=\"{bound}\"}} {count}");
    }
    let (braces, sum) = (braced(label), distribution.sum_seconds);
    let _ = writeln!(out, "{name}_sum{braces} {sum}\n{name}_count{braces} {count}");
}

/// Seconds since 1970.
pub fn seconds_now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}

/// Resident memory of this process, in bytes; 0 where the kernel does not say.
pub fn resident_bytes() -> u64 {
    let pages = std::fs::read_to_string("/proc/self/statm").ok();
    let resident = pages.as_deref().and_then(|text| text.split(' ').nth(1)?.parse::<u64>().ok());
    resident.unwrap_or(0) * rustix::param::page_size() as u64
}

#[cfg(test)]
#[allow(unreachable_pub, reason = "what the macro makes is for everybody")]
mod tests {
    use std::time::Duration;

    use super::*;

    labels! {
        /// Two of them.
        Side {
            /// One.
            Left = "left",
            /// The other.
            Right = "right",
        }
    }

    static WAITS: Histogram<3> = Histogram::new(&[0.1, 1.0]);

    const TABLE: &[Metric] = &[
        metric(BUILD_INFO, Kind::Gauge, "1", None, "Which build runs"),
        metric("hermes_x_total", Kind::Counter, "things", Some(("side", &Side::NAMES)), "Things, by side"),
        metric("hermes_y_bytes", Kind::Gauge, "bytes", None, "Bytes"),
        metric("hermes_wait_seconds", Kind::Histogram, "seconds", None, "Waits"),
    ];

    #[test]
    fn what_is_set_is_exposed_and_the_rest_is_zero() {
        WAITS.observe(Duration::from_millis(50));
        WAITS.observe(Duration::from_secs(7));
        let mut values = Values::default();
        values.set("hermes_x_total", Side::Left.name(), 0);
        values.set("hermes_x_total", Side::Right.name(), 12_345_678_901);
        values.set_distribution("hermes_wait_seconds", "", WAITS.read());
        let text = expose(TABLE, "1.2.3", &values);
        for line in [
            "hermes_build_info{version=\"1.2.3\"} 1",
            "# TYPE hermes_x_total counter",
            "hermes_x_total{side=\"left\"} 0",
            "hermes_x_total{side=\"right\"} 12345678901",
            "hermes_y_bytes 0",
            "hermes_wait_seconds_bucket{le=\"0.1\"} 1",
            "hermes_wait_seconds_bucket{le=\"1\"} 1",
            "hermes_wait_seconds_bucket{le=\"+Inf\"} 2",
            "hermes_wait_seconds_sum 7.05",
            "hermes_wait_seconds_count 2",
        ] {
            assert!(text.lines().any(|known| known == line), "'{line}' is missing in:\n{text}");
        }
        assert_eq!(broken_rules(TABLE), Vec::<String>::new());
        assert!(
            rows(TABLE).contains("| `hermes_x_total` | counter | things | `side`: left, right | Things, by side |")
        );
    }

    #[test]
    fn rules_are_checked() {
        let wrong = [
            metric("other", Kind::Gauge, "1", None, "No prefix"),
            metric("hermes_a_total", Kind::Gauge, "1", None, "A gauge that ends as a counter"),
            metric("hermes_b", Kind::Gauge, "bytes", None, "Its unit is not in its name"),
            metric("hermes_b", Kind::Gauge, "1", None, "Ends with a dot."),
        ];
        assert_eq!(broken_rules(&wrong).len(), 5, "{:?}", broken_rules(&wrong));
    }
}
