//! Lines of a benchmark: a figure, what it is measured against, their ratio, and what it has to reach.

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
    /// Figure divided by the other, so that more is better; or a fraction of a limit, so that less is better.
    pub(super) ratio: f64,
    /// What the ratio is to reach, such as `>= 0.7`; empty where nothing is asked.
    pub(super) reach: &'static str,
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
