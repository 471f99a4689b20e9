//! The result as text: for a terminal, and for a document.

use super::super::report::Spread;
use super::sample::{NODE_MBIT, Samples, Verdict};
use super::way::Way;
use crate::output;

const HEADER: [&str; 10] = [
    "image",
    "link",
    "start",
    "root there",
    "started",
    "first answer",
    "from registry",
    "from peer",
    "ahead, unused",
    "to reach",
];

/// The rows of the table: every way over every link for every image that there is.
fn rows(samples: &Samples, verdicts: &[Verdict]) -> Vec<Vec<String>> {
    let mut rows = Vec::new();
    for image in samples.facts.keys() {
        for link_mbit in samples.links() {
            for way in Way::ALL {
                rows.extend(row(samples, verdicts, image, link_mbit, way));
            }
        }
    }
    rows
}

fn row(samples: &Samples, verdicts: &[Verdict], image: &str, link_mbit: u64, way: Way) -> Option<Vec<String>> {
    let all = || samples.of(image, link_mbit, way);
    let median =
        |value: fn(&super::sample::Sample) -> f64| Spread::of(all().map(value)).map_or(0.0, |spread| spread.median);
    let answer = samples.answer(image, link_mbit, way)?;
    let bytes = |count: f64| if count < 1000.0 { "0".to_owned() } else { output::bytes(count as u64) };
    let requests = median(|sample| sample.registry_requests as f64);
    let registry = bytes(median(|sample| sample.registry_bytes as f64));
    let unused = Spread::of(all().filter_map(|sample| sample.unused_bytes).map(|count| count as f64));
    let is_of_it = |verdict: &&Verdict| verdict.image == image && verdict.link_mbit == link_mbit && verdict.way == way;
    let reach: Vec<String> = verdicts.iter().filter(is_of_it).map(Verdict::text).collect();
    let seconds = |value: f64| format!("{value:.2} s");
    Some(vec![
        image.to_owned(),
        format!("{link_mbit} Mbit/s"),
        way.title().to_owned(),
        if way.is_cold() { seconds(median(|sample| sample.ready_s)) } else { "-".to_owned() },
        if matches!(way, Way::OddPlain | Way::OddProfile) {
            "-".to_owned()
        } else {
            seconds(median(|sample| sample.started_s))
        },
        format!("{:.2} s ({:.2} to {:.2}, {})", answer.median, answer.min, answer.max, answer.count),
        if registry == "0" { registry } else { format!("{registry} in {requests:.0}") },
        bytes(median(|sample| sample.peer_bytes as f64)),
        unused.map_or_else(|| "-".to_owned(), |spread| bytes(spread.median)),
        reach.join("; "),
    ])
}

/// What no system can be quicker than, for each image: a line each.
fn bounds(samples: &Samples) -> Vec<String> {
    let line = |image: &String, link_mbit: u64| {
        let (bound_s, facts) = (samples.bound_s(image, link_mbit)?, &samples.facts[image]);
        let needed = output::bytes(facts.needed_bytes?);
        Some(format!(
            "{image}: bound {bound_s:.2} s at {link_mbit} Mbit/s (a start reads {needed} of the {} that are its layers)",
            output::bytes(facts.compressed_bytes)
        ))
    };
    let images = samples.facts.keys();
    images.flat_map(|image| samples.links().into_iter().filter_map(move |link| line(image, link))).collect()
}

/// For a terminal.
pub(super) fn text(samples: &Samples, verdicts: &[Verdict]) -> String {
    let mut text = output::table(&HEADER, rows(samples, verdicts));
    for line in bounds(samples) {
        text += &format!("\n{line}");
    }
    let missed = verdicts.iter().filter(|verdict| !verdict.met).count();
    text + &format!("\n{} of {} reached", verdicts.len() - missed, verdicts.len())
}

/// For a document: Markdown, what was missed in bold.
pub(super) fn markdown(samples: &Samples, verdicts: &[Verdict]) -> String {
    let mut text = String::new();
    for (image, facts) in &samples.facts {
        text += &format!(
            "**{image}**: {}; {} layers, {} compressed, {} unpacked.\n",
            facts.title,
            facts.layers,
            output::bytes(facts.compressed_bytes),
            output::bytes(facts.uncompressed_bytes)
        );
    }
    text += &format!("\n| {} |\n|{}\n", HEADER.join(" | "), "---|".repeat(HEADER.len()));
    for mut row in rows(samples, verdicts) {
        if let Some(reach) = row.last_mut() {
            *reach = reach.replace("MISSED", "**missed**");
        }
        text += &format!("| {} |\n", row.join(" | "));
    }
    for line in bounds(samples) {
        text += &format!("\n- {line}");
    }
    if samples.links().iter().any(|link| *link != NODE_MBIT) {
        text += "\n\nWays that do not depend on the registry's link are run at its full speed alone.";
    }
    text + "\n"
}

#[cfg(test)]
mod tests {
    use super::super::sample::{tests::samples, verdicts};
    use super::*;

    #[test]
    fn every_way_that_was_run_has_a_row_with_its_verdict() {
        let samples = samples();
        let verdicts = verdicts(&samples);
        let rows = rows(&samples, &verdicts);
        assert_eq!(rows.len(), 14, "{rows:#?}");
        assert!(rows.iter().all(|row| row.len() == HEADER.len()));
        let unpacked = rows.iter().find(|row| row[2] == Way::Unpacked.title()).expect("a row");
        assert_eq!(unpacked[5], "4.00 s (3.00 to 8.00, 3)");
        assert_eq!(unpacked[3], "-", "nothing is pulled");
        let markdown = markdown(&samples, &verdicts);
        assert!(markdown.contains("**missed**") && markdown.contains("OK"), "{markdown}");
        assert!(markdown.contains("bound 4.60 s at 200 Mbit/s"), "{markdown}");
        let text = text(&samples, &verdicts);
        assert!(text.contains("MISSED") && text.contains(" reached"), "{text}");
    }
}
