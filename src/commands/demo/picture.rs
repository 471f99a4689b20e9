//! The demo's result, for people: a table and bars.

use serde::Serialize;

use crate::output;

/// Longest bar, in characters.
const BAR_WIDTH: usize = 44;

/// One way to start the program.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Start {
    /// What was done.
    pub(super) name: &'static str,
    /// Seconds from the beginning until the root file system was there.
    pub(super) ready_s: f64,
    /// Seconds from the beginning until the first HTTP 200.
    pub(super) answer_s: f64,
    /// Bytes that crossed the link from the registry, layers only.
    pub(super) registry_bytes: u64,
    /// Bytes of chunks that came from the peer.
    pub(super) peer_bytes: u64,
    /// Bytes of chunks copied from another layer on the node.
    pub(super) local_bytes: u64,
    /// Requests for layer data that the registry answered.
    pub(super) registry_requests: u64,
    /// Percent of the image's bytes on the node when the program answered.
    pub(super) present_percent: f64,
}

/// All of it.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Report {
    /// The image.
    pub(super) image: String,
    /// Its layers.
    pub(super) layers: usize,
    /// Compressed bytes.
    pub(super) compressed_bytes: u64,
    /// Uncompressed bytes.
    pub(super) uncompressed_bytes: u64,
    /// The link to the registry.
    pub(super) link: String,
    /// How trees were shown.
    pub(super) way: String,
    /// Seconds that building the index took, once for the image.
    pub(super) index_build_s: f64,
    /// Bytes of the index, in its wire form.
    pub(super) index_bytes: u64,
    /// The starts, in the order in which they were made.
    pub(super) starts: Vec<Start>,
}

/// The table and the bars.
pub(super) fn render(report: &Report) -> String {
    let header = ["start", "root there", "first answer", "from registry", "requests", "from peer", "present"];
    let rows = report.starts.iter().map(|start| {
        vec![
            start.name.to_owned(),
            format!("{:.2} s", start.ready_s),
            format!("{:.2} s", start.answer_s),
            output::bytes(start.registry_bytes),
            start.registry_requests.to_string(),
            output::bytes(start.peer_bytes),
            format!("{:.0} %", start.present_percent),
        ]
    });
    let mut out = format!(
        "\n{}\n  {} layers, {} compressed, {} unpacked; registry behind {}; trees shown as {}\n  index: {} ({:.2} % of the layers), built once in {:.1} s\n\n{}\n\n",
        report.image,
        report.layers,
        output::bytes(report.compressed_bytes),
        output::bytes(report.uncompressed_bytes),
        report.link,
        report.way,
        output::bytes(report.index_bytes),
        report.index_bytes as f64 * 100.0 / report.compressed_bytes.max(1) as f64,
        report.index_build_s,
        output::table(&header, rows.collect()),
    );
    let longest = report.starts.iter().map(|start| start.answer_s).fold(f64::MIN_POSITIVE, f64::max);
    out += "time until the program answers (█ until its root is there, ░ until the first HTTP 200)\n";
    for start in &report.starts {
        let width = |seconds: f64| (seconds / longest * BAR_WIDTH as f64).round() as usize;
        let ready = width(start.ready_s).min(BAR_WIDTH);
        let total = width(start.answer_s).clamp(ready.max(1), BAR_WIDTH);
        out += &format!(
            "  {:<28} {}{} {:.2} s\n",
            start.name,
            "█".repeat(ready),
            "░".repeat(total - ready),
            start.answer_s
        );
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_are_in_proportion() {
        let start = |name, ready_s, answer_s| Start {
            name,
            ready_s,
            answer_s,
            registry_bytes: 0,
            peer_bytes: 0,
            local_bytes: 0,
            registry_requests: 0,
            present_percent: 0.0,
        };
        let report = Report {
            image: "image".to_owned(),
            layers: 1,
            compressed_bytes: 100,
            uncompressed_bytes: 200,
            link: "a link".to_owned(),
            way: "erofs-fuse".to_owned(),
            index_build_s: 1.0,
            index_bytes: 1,
            starts: vec![start("full", 8.0, 10.0), start("lazy", 0.0, 5.0)],
        };
        let text = render(&report);
        let bars: Vec<_> = text.lines().filter(|line| line.contains('░') && line.ends_with('s')).collect();
        assert_eq!(bars[0].chars().filter(|c| "█░".contains(*c)).count(), BAR_WIDTH);
        assert_eq!(bars[1].chars().filter(|c| "█░".contains(*c)).count(), BAR_WIDTH / 2);
    }
}
