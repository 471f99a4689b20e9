//! A profile as text.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use hermes_snapshotter::status::{ProfileReport, ProfileStep};

use crate::output;

/// Steps that are listed unless all are wanted.
const LISTED: usize = 40;

/// What is known of the image's starts.
pub(super) fn show(report: &ProfileReport, all: bool) -> String {
    let mut out = heading(report);
    if !report.starts.is_empty() {
        let rows = report.starts.iter().map(|start| {
            vec![
                ago(start.ended_seconds),
                seconds(start.length_ms),
                output::bytes(start.bytes),
                output::bytes(start.waited_bytes),
                output::percent(start.waited_bytes, start.bytes),
            ]
        });
        let header = ["start", "read for", "bytes", "waited for", "share"];
        out += &format!("\n{}\n", output::table(&header, rows.collect()));
    }
    if report.steps.is_empty() {
        return out;
    }
    let mut total = 0;
    let rows = report.steps.iter().take(listed(report, all)).map(|step| {
        total += step.bytes;
        let mut row = timing(step);
        row.extend([
            output::bytes(step.bytes),
            output::bytes(total),
            step.layer.hex()[..8].to_owned(),
            format!("{}-{}", step.first_chunk, step.first_chunk + step.chunks - 1),
        ]);
        row
    });
    let header = ["read at", "+-", "starts", "bytes", "in all", "layer", "chunks"];
    out += &format!("\n{}\n", output::table(&header, rows.collect()));
    out + &left_out(report, all)
}

/// Which files it is about.
pub(super) fn explain(report: &ProfileReport, all: bool) -> String {
    let mut out = heading(report);
    if report.steps.is_empty() {
        return out;
    }
    let rows = report.steps.iter().take(listed(report, all)).map(|step| {
        let mut row = timing(step);
        let mut files = if step.files.is_empty() { "no file".to_owned() } else { step.files.join(", ") };
        if step.more_files > 0 {
            files += &format!(", and {} more", step.more_files);
        }
        row.extend([output::bytes(step.bytes), files]);
        row
    });
    let header = ["read at", "+-", "starts", "bytes", "of"];
    out += &format!("\n{}\n", output::table(&header, rows.collect()));
    out + &left_out(report, all)
}

fn heading(report: &ProfileReport) -> String {
    let name = &report.reference;
    let Some(origin) = report.origin else {
        return format!("{name}: no profile; one is made when a start of it has settled\n");
    };
    let bytes: u64 = report.steps.iter().map(|step| step.bytes).sum();
    let starts = if report.records == 1 { "start" } else { "starts" };
    format!(
        "{name}: profile from {}, made of {} {starts}, the newest {}: {} of {} ({}) in {} steps; it takes {}\n",
        origin.name(),
        report.records,
        ago(report.newest_seconds),
        output::bytes(bytes),
        output::bytes(report.image_bytes),
        output::percent(bytes, report.image_bytes),
        report.steps.len(),
        // Two digits are a byte.
        output::bytes(report.encoded.len() as u64 / 2),
    )
}

fn timing(step: &ProfileStep) -> Vec<String> {
    vec![seconds(step.at_ms), seconds(step.spread_ms), format!("{} %", step.weight_percent)]
}

fn listed(report: &ProfileReport, all: bool) -> usize {
    if all { report.steps.len() } else { LISTED }
}

fn left_out(report: &ProfileReport, all: bool) -> String {
    match report.steps.len().saturating_sub(listed(report, all)) {
        0 => String::new(),
        more => format!("--all lists {more} more steps\n"),
    }
}

pub(super) fn seconds(ms: u32) -> String {
    format!("{:.3} s", f64::from(ms) / 1000.0)
}

/// How long ago, as people say it.
fn ago(unix_seconds: u64) -> String {
    let then = UNIX_EPOCH + Duration::from_secs(unix_seconds);
    let passed = SystemTime::now().duration_since(then).unwrap_or_default().as_secs();
    match passed {
        0..120 => format!("{passed} s ago"),
        120..7_200 => format!("{} min ago", passed / 60),
        7_200..172_800 => format!("{} h ago", passed / 3600),
        _ => format!("{} days ago", passed / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::super::sample;
    use super::*;

    #[test]
    fn the_tables_tell_starts_steps_and_files() {
        let report = sample::report();
        let text = show(&report, false);
        for part in [
            "profile from own starts, made of 3 starts",
            "19.7 MB of 900.0 MB (2.2 %) in 150 steps; it takes 1.2 kB",
            "2.587 s",
            "20.0 %",
            "100.0 %",
            "66 %",
            "07070707",
            "--all lists 110 more steps",
        ] {
            assert!(text.contains(part), "'{part}' is missing in:\n{text}");
        }
        let text = explain(&report, true);
        assert!(text.contains("/usr/lib/lib<3>.so, and 1 more") && text.contains("lib<149>"), "{text}");
        assert!(!text.contains("--all"), "{text}");
        let nothing = ProfileReport { origin: None, steps: Vec::new(), starts: Vec::new(), ..report };
        assert_eq!(show(&nothing, false).lines().count(), 1);
    }

    #[test]
    fn times_are_said_as_people_do() {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs();
        assert_eq!(ago(now - 600), "10 min ago");
        assert_eq!(ago(now - 3 * 86_400), "3 days ago");
        assert_eq!(ago(now + 100), "0 s ago");
    }
}
