//! What a node counts, in one table.
//!
//! [`METRICS`] names every metric with its unit, its label and the closed list of the label's values; `docs/metrics.md`
//! and the exposition at `/metrics` are both made from it, so they cannot disagree. Nothing is labelled by image, layer,
//! chunk or peer: the number of series is fixed.
//!
//! What the parts count themselves (store, registry client, credentials) is read from them when somebody asks. The rest is
//! recorded in [`RECORDED`]: one relaxed atomic addition each, no lock, no allocation, so that it may stand in the path of
//! reads. That is why this is not a metrics library: those look a label up behind a lock, and cannot print the table.
//! Counters begin at zero when the process starts.

mod recorded;
pub mod server;
mod table;

use std::collections::BTreeMap;
use std::fmt::Write as _;

pub use recorded::{
    Again, ArrivedFrom, Decision, Denial, Egress, FirstPullEnd, PrefetchedBytes, RECORDED, ReadFailure, Recorded,
    Referrals, RulingGiven, StartRecordEnd,
};
pub use table::{Kind, METRICS, Metric};

/// Upper bounds of the histogram of waits, in seconds: a local copy takes 1 ms, a peer 2 to 10, a registry 20 to 500, and
/// a read fails after 60.
pub const WAIT_BOUNDS_SECONDS: [f64; 12] = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 60.0];

/// Values, by metric and label value (empty for a metric without a label). What is not set counts as zero.
#[derive(Debug, Default)]
pub struct Values {
    numbers: BTreeMap<(&'static str, &'static str), f64>,
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

    fn get(&self, metric: &'static str, label: &'static str) -> f64 {
        self.numbers.get(&(metric, label)).copied().unwrap_or(0.0)
    }
}

/// The exposition in Prometheus' text format 0.0.4, of every metric of the table in its order.
pub fn expose(values: &Values, recorded: &Recorded) -> String {
    let mut out = String::new();
    for metric in METRICS {
        let (name, kind) = (metric.name, metric.kind.name());
        // Writing to a string cannot fail.
        let _ = writeln!(out, "# HELP {name} {}\n# TYPE {name} {kind}", metric.help);
        let labels = metric.label.map_or(&[""] as &[&str], |(_, values)| values);
        for value in labels {
            let label = metric.label.map_or_else(String::new, |(label, _)| format!("{label}=\"{value}\""));
            match metric.kind {
                Kind::Histogram => expose_histogram(&mut out, name, &label, recorded, value),
                _ if name == table::BUILD_INFO => {
                    let _ = writeln!(out, "{name}{{version=\"{}\"}} 1", env!("CARGO_PKG_VERSION"));
                }
                Kind::Counter | Kind::Gauge => {
                    let braces = if label.is_empty() { String::new() } else { format!("{{{label}}}") };
                    let _ = writeln!(out, "{name}{braces} {}", values.get(name, value));
                }
            }
        }
    }
    out
}

fn expose_histogram(out: &mut String, name: &str, label: &str, recorded: &Recorded, value: &str) {
    let (buckets, sum_seconds) = recorded.waits(value);
    let mut count = 0;
    for (at, bucket) in buckets.iter().enumerate() {
        count += bucket;
        let bound = WAIT_BOUNDS_SECONDS.get(at).map_or_else(|| "+Inf".to_owned(), f64::to_string);
        let _ = writeln!(out, "{name}_bucket{{{label},le=\"{bound}\"}} {count}");
    }
    let _ = writeln!(out, "{name}_sum{{{label}}} {sum_seconds}\n{name}_count{{{label}}} {count}");
}

/// `docs/metrics.md`.
pub fn document() -> String {
    let mut out = String::from(
        "<!-- Generated from snapshotter/src/metrics/table.rs; a test writes it anew when HERMES_UPDATE_DOCS is set. -->\n\n\
         # Metrics\n\n\
         `hermes node --metrics-listen ADDR` serves them at `/metrics`, in Prometheus' text format. Counters begin at zero \
         when the daemon starts. No metric is labelled by image, layer, chunk or peer, so the number of series is fixed.\n\n\
         | name | type | unit | label | meaning |\n|---|---|---|---|---|\n",
    );
    for metric in METRICS {
        let label =
            metric.label.map_or_else(String::new, |(label, values)| format!("`{label}`: {}", values.join(", ")));
        let (name, kind, unit, help) = (metric.name, metric.kind.name(), metric.unit, metric.help);
        let _ = writeln!(out, "| `{name}` | {kind} | {unit} | {label} | {help} |");
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_document_is_up_to_date() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/metrics.md");
        if std::env::var_os("HERMES_UPDATE_DOCS").is_some() {
            std::fs::write(path, document()).expect("written");
        }
        let written = std::fs::read_to_string(path).unwrap_or_default();
        assert!(written == document(), "docs/metrics.md is old; run this test with HERMES_UPDATE_DOCS=1");
    }

    #[test]
    fn the_table_keeps_prometheus_rules() {
        let mut names: Vec<_> = METRICS.iter().map(|metric| metric.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), METRICS.len(), "a name stands twice");
        for metric in METRICS {
            let is_plain = |text: &str| text.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_');
            assert!(is_plain(metric.name) && metric.name.starts_with("hermes_"), "{}", metric.name);
            assert_eq!(metric.name.ends_with("_total"), metric.kind == Kind::Counter, "{}", metric.name);
            let has_unit = matches!(metric.unit, "bytes" | "seconds");
            assert!(!has_unit || metric.name.contains(metric.unit), "{} does not name its unit", metric.name);
            assert!(!metric.help.contains(['\n', '|', '\\']) && !metric.help.ends_with('.'), "{}", metric.name);
            for value in metric.label.map_or(&[] as &[&str], |(_, values)| values) {
                assert!(is_plain(&value.replace('-', "_")) && !value.is_empty(), "{} {value}", metric.name);
            }
        }
    }

    #[test]
    fn what_was_recorded_is_exposed() {
        let recorded = Recorded::new();
        recorded.waited(ArrivedFrom::Peer, std::time::Duration::from_millis(7));
        recorded.waited(ArrivedFrom::Peer, std::time::Duration::from_secs(100));
        recorded.read_failed(ReadFailure::Deadline);
        recorded.decided(Decision::Unsigned);
        recorded.arrived(ArrivedFrom::Registry, 300);
        let mut values = Values::default();
        recorded.fill(&mut values);
        values.set("hermes_store_bytes", "", 12_345_678_901);
        let text = expose(&values, &recorded);
        for line in [
            "# TYPE hermes_demand_wait_seconds histogram",
            "hermes_demand_wait_seconds_bucket{source=\"peer\",le=\"0.005\"} 0",
            "hermes_demand_wait_seconds_bucket{source=\"peer\",le=\"0.01\"} 1",
            "hermes_demand_wait_seconds_bucket{source=\"peer\",le=\"+Inf\"} 2",
            "hermes_demand_wait_seconds_count{source=\"peer\"} 2",
            "hermes_demand_wait_seconds_count{source=\"local\"} 0",
            "hermes_read_failures_total{reason=\"deadline\"} 1",
            "hermes_lazy_decisions_total{reason=\"unsigned\"} 1",
            "hermes_chunk_bytes_total{source=\"registry\"} 300",
            "hermes_store_bytes 12345678901",
            concat!("hermes_build_info{version=\"", env!("CARGO_PKG_VERSION"), "\"} 1"),
        ] {
            assert!(text.lines().any(|known| known == line), "'{line}' is missing in:\n{text}");
        }
        let series = text.lines().filter(|line| !line.starts_with('#')).count();
        assert_eq!(
            series,
            expose(&Values::default(), &Recorded::new()).lines().filter(|l| !l.starts_with('#')).count()
        );
    }
}
