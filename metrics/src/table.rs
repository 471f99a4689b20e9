//! Tables of metrics: their rows, and the rules that Prometheus' names have.

use std::fmt::Write as _;

/// What a metric does over time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Only grows.
    Counter,
    /// Goes up and down.
    Gauge,
    /// Counts by size.
    Histogram,
}

impl Kind {
    /// As Prometheus calls it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
            Self::Histogram => "histogram",
        }
    }
}

/// A label and all its values.
pub type Label = Option<(&'static str, &'static [&'static str])>;

/// One metric.
#[derive(Debug, Clone, Copy)]
pub struct Metric {
    /// With the prefix of all of them, and the unit at its end.
    pub name: &'static str,
    /// What it does.
    pub kind: Kind,
    /// What is counted.
    pub unit: &'static str,
    /// The label and all its values, if it has one.
    pub label: Label,
    /// What it means, in one sentence without an end.
    pub help: &'static str,
}

/// The metric whose label is the program's version.
pub const BUILD_INFO: &str = "hermes_build_info";

/// A row of a table.
pub const fn metric(name: &'static str, kind: Kind, unit: &'static str, label: Label, help: &'static str) -> Metric {
    Metric { name, kind, unit, label, help }
}

/// The table as one of Markdown.
pub fn rows(table: &[Metric]) -> String {
    let mut out = String::from("| name | type | unit | label | meaning |\n|---|---|---|---|---|\n");
    for metric in table {
        let label =
            metric.label.map_or_else(String::new, |(label, values)| format!("`{label}`: {}", values.join(", ")));
        let (name, kind, unit, help) = (metric.name, metric.kind.name(), metric.unit, metric.help);
        // Writing to a string cannot fail.
        let _ = writeln!(out, "| `{name}` | {kind} | {unit} | {label} | {help} |");
    }
    out
}

/// Which rules of names, units and texts a table breaks; for the tests of tables.
pub fn broken_rules(table: &[Metric]) -> Vec<String> {
    let is_plain = |text: &str| text.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_');
    let mut broken = Vec::new();
    for (at, metric) in table.iter().enumerate() {
        let name = metric.name;
        let has_unit = matches!(metric.unit, "bytes" | "seconds");
        let values = metric.label.map_or(&[] as &[&str], |(_, values)| values);
        let rules = [
            (table[..at].iter().all(|other| other.name != name), "stands twice"),
            (is_plain(name) && name.starts_with("hermes_"), "is not called as metrics are"),
            (name.ends_with("_total") == (metric.kind == Kind::Counter), "ends as another kind does"),
            (!has_unit || name.contains(metric.unit), "does not name its unit"),
            (
                !metric.help.contains(['\n', '|', '\\']) && !metric.help.ends_with('.'),
                "has a help that cannot be shown",
            ),
            (
                values.iter().all(|value| is_plain(&value.replace('-', "_")) && !value.is_empty()),
                "has a label value that is no word",
            ),
        ];
        broken.extend(rules.iter().filter(|(kept, _)| !kept).map(|(_, what)| format!("{name} {what}")));
    }
    broken
}
