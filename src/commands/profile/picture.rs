//! A profile as a picture: on the left what the newest start read, over time and by source; on the right the profile, in the
//! order in which it is fetched.
//!
//! The left side is a stack of areas: how many bytes were read so far, by where they had come from, with a mark below the
//! axis for each read that had to wait. The right side has a bar for each step: across its bytes, up to when starts read it;
//! dashed lines say when bytes come over links of two speeds, so that bars above a line are here before they are read.

use std::fmt::Write as _;

use hermes_snapshotter::status::{ProfileReport, RecordedTouch};

use super::table::seconds;
use crate::commands::trace::{cut, text};
use crate::output;

/// Pixels.
const WIDTH: f64 = 1240.0;
const HEIGHT: f64 = 470.0;
const TOP: f64 = 96.0;
const BOTTOM: f64 = 366.0;
const LEFT: Panel = Panel { left: 76.0, right: 596.0 };
const RIGHT: Panel = Panel { left: 712.0, right: 1216.0 };
/// Points of a stack: more than there are pixels would not show.
const POINTS_MAX: usize = 500;
/// Sources from below, with their colours, which differ in lightness: what was here, then by cost.
const SOURCES: [(&str, &str, &str); 4] = [
    ("here", "#c3cad1", "here before the mount"),
    ("local", "#8d99a3", "another layer on this node"),
    ("peer", "#4fa3dd", "peers"),
    ("registry", "#a63c06", "registry"),
];
/// Links whose speed is drawn, in bits per second.
const LINKS: [(f64, &str); 2] = [(1e9, "1 Gbit/s"), (2e8, "200 Mbit/s")];

/// From where to where a panel goes.
#[derive(Debug, Clone, Copy)]
struct Panel {
    left: f64,
    right: f64,
}

impl Panel {
    fn x(&self, share: f64) -> f64 {
        self.left + (self.right - self.left) * share.clamp(0.0, 1.0)
    }
}

fn y(share: f64) -> f64 {
    BOTTOM - (BOTTOM - TOP) * share.clamp(0.0, 1.0)
}

/// The picture.
pub(super) fn draw(report: &ProfileReport) -> String {
    let mut out = format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n\
         <svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{HEIGHT}\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" \
         font-family=\"Inter, 'Segoe UI', Helvetica, Arial, sans-serif\" font-size=\"12\" fill=\"#1d2733\">\n\
         <style>.head{{font-size:17px;font-weight:600}}.sub{{fill:#5b6773}}.name{{font-weight:600}}\
         .tick{{fill:#5b6773;font-size:11px}}</style>\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n"
    );
    text(&mut out, "head", 16.0, 28.0, &format!("What starts of {} read", cut(&report.reference, 100)));
    newest_start(&mut out, report);
    profile(&mut out, report);
    out + "</svg>\n"
}

/// A round number of steps of at least a fifth of `max`, and all of its multiples up to that.
fn ticks(max: f64) -> Vec<f64> {
    let least = (max / 5.0).max(f64::MIN_POSITIVE);
    let power = 10_f64.powf(least.log10().floor());
    let factor = [1.0, 2.0, 5.0].into_iter().find(|factor| factor * power >= least).unwrap_or(10.0);
    let step = factor * power;
    (0..=5).map(|no| f64::from(no) * step).take_while(|tick| *tick <= max * 1.001).collect()
}

/// Lines and numbers of both axes.
fn axes(out: &mut String, panel: Panel, x: (f64, fn(f64) -> String), y_axis: (f64, fn(f64) -> String)) {
    for tick in ticks(x.0) {
        let at = panel.x(tick / x.0);
        let _ = writeln!(out, "<line x1=\"{at:.1}\" y1=\"{TOP}\" x2=\"{at:.1}\" y2=\"{BOTTOM}\" stroke=\"#edf0f3\"/>");
        let label = (x.1)(tick);
        let _ = writeln!(
            out,
            "<text class=\"tick\" x=\"{at:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{label}</text>",
            BOTTOM + 32.0
        );
    }
    for tick in ticks(y_axis.0) {
        let at = y(tick / y_axis.0);
        let (left, right) = (panel.left, panel.right);
        let _ = writeln!(out, "<line x1=\"{left}\" y1=\"{at:.1}\" x2=\"{right}\" y2=\"{at:.1}\" stroke=\"#dfe4ea\"/>");
        let label = (y_axis.1)(tick);
        let _ = writeln!(
            out,
            "<text class=\"tick\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{label}</text>",
            left - 8.0,
            at + 4.0
        );
    }
}

fn as_seconds(value: f64) -> String {
    let digits = if value.fract() == 0.0 { 0 } else { 2 - usize::from(value >= 1.0) };
    format!("{value:.digits$} s")
}

fn as_bytes(value: f64) -> String {
    if value >= 1e7 || value == 0.0 { format!("{:.0} MB", value / 1e6) } else { format!("{:.1} MB", value / 1e6) }
}

fn newest_start(out: &mut String, report: &ProfileReport) {
    let Some(start) = report.starts.first().filter(|_| !report.touches.is_empty()) else {
        text(out, "name", LEFT.left, 58.0, "No start was recorded on this node");
        return;
    };
    text(out, "name", LEFT.left, 58.0, "The newest start: bytes read so far, by where they came from");
    let line = format!(
        "{} over {}; readers waited for {} of it",
        output::bytes(start.bytes),
        seconds(start.length_ms),
        output::percent(start.waited_bytes, start.bytes)
    );
    text(out, "sub", LEFT.left, 76.0, &line);
    let length_s = (f64::from(start.length_ms) / 1000.0).max(0.001);
    let total = report.touches.iter().map(|touch| touch.bytes).sum::<u64>().max(1) as f64;
    axes(out, LEFT, (length_s, as_seconds), (total, as_bytes));
    areas(out, &report.touches, length_s, total);
    for touch in report.touches.iter().filter(|touch| touch.waited) {
        let x = LEFT.x(f64::from(touch.at_ms) / 1000.0 / length_s);
        let colour = colour(&touch.source);
        let (from, to) = (BOTTOM + 4.0, BOTTOM + 16.0);
        let _ = writeln!(
            out,
            "<line x1=\"{x:.1}\" y1=\"{from}\" x2=\"{x:.1}\" y2=\"{to}\" stroke=\"{colour}\" stroke-opacity=\"0.6\"/>"
        );
    }
    legend(out, &report.touches);
}

fn colour(source: &str) -> &'static str {
    SOURCES.iter().find(|(name, ..)| *name == source).map_or("#000000", |(_, colour, _)| colour)
}

/// The stack, from below.
fn areas(out: &mut String, touches: &[RecordedTouch], length_s: f64, total: f64) {
    let points = touches.len().min(POINTS_MAX);
    let mut below = vec![0.0; points + 1];
    for (name, colour, _) in SOURCES {
        let (mut sum, mut next) = (0_u64, 0);
        let mut above = Vec::with_capacity(points + 1);
        for (point, below) in below.iter().enumerate() {
            let until_s = length_s * point as f64 / points as f64;
            while let Some(touch) = touches.get(next).filter(|touch| f64::from(touch.at_ms) / 1000.0 <= until_s + 1e-9)
            {
                sum += if touch.source == name { touch.bytes } else { 0 };
                next += 1;
            }
            above.push(below + sum as f64);
        }
        if sum > 0 {
            let x = |point: usize| LEFT.x(point as f64 / points as f64);
            let edge = above.iter().enumerate().map(|(at, value)| format!("{:.1},{:.1}", x(at), y(value / total)));
            let back =
                below.iter().enumerate().rev().map(|(at, value)| format!("{:.1},{:.1}", x(at), y(value / total)));
            let outline: Vec<String> = edge.chain(back).collect();
            let _ = writeln!(out, "<polygon points=\"{}\" fill=\"{colour}\"/>", outline.join(" "));
        }
        below = above;
    }
}

/// The sources that gave something, with how much, and what the marks are.
fn legend(out: &mut String, touches: &[RecordedTouch]) {
    let mut x = LEFT.left;
    for (name, colour, label) in SOURCES {
        let bytes: u64 = touches.iter().filter(|touch| touch.source == name).map(|touch| touch.bytes).sum();
        if bytes == 0 {
            continue;
        }
        let top = BOTTOM + 50.0;
        let _ = writeln!(out, "<rect x=\"{x:.1}\" y=\"{top}\" width=\"12\" height=\"12\" fill=\"{colour}\"/>");
        let label = format!("{label}, {}", output::bytes(bytes));
        text(out, "sub", x + 18.0, top + 10.0, &label);
        // About six pixels a character.
        x += 36.0 + 6.2 * label.len() as f64;
    }
    text(
        out,
        "sub",
        LEFT.left,
        BOTTOM + 84.0,
        "Marks below the axis: reads that had to wait, in the colour of what they waited for",
    );
}

fn profile(out: &mut String, report: &ProfileReport) {
    let (Some(origin), false) = (report.origin, report.steps.is_empty()) else {
        text(out, "name", RIGHT.left, 58.0, "No profile yet");
        return;
    };
    text(out, "name", RIGHT.left, 58.0, "The profile: when each step is read, in the order of fetching");
    let total = report.steps.iter().map(|step| step.bytes).sum::<u64>().max(1) as f64;
    let starts = if report.records == 1 { "start" } else { "starts" };
    let line = format!(
        "{} in {} steps, from {}, {} {starts}",
        output::bytes(total as u64),
        report.steps.len(),
        origin.name(),
        report.records
    );
    text(out, "sub", RIGHT.left, 76.0, &line);
    let ends = report.steps.iter().map(|step| u64::from(step.at_ms) + u64::from(step.spread_ms) / 2);
    let length_s = (ends.max().unwrap_or(0) as f64 / 1000.0).max(0.001);
    axes(out, RIGHT, (total, as_bytes), (length_s, as_seconds));
    let mut before = 0_u64;
    for step in &report.steps {
        let (from, to) = (RIGHT.x(before as f64 / total), RIGHT.x((before + step.bytes) as f64 / total));
        before += step.bytes;
        let at = f64::from(step.at_ms) / 1000.0;
        let half = f64::from(step.spread_ms) / 2000.0;
        let (upper, lower) = (y((at + half) / length_s), y((at - half).max(0.0) / length_s));
        let (width, height) = ((to - from).max(1.5), (lower - upper).max(2.5));
        let opacity = 0.25 + 0.75 * f64::from(step.weight_percent) / 100.0;
        let _ = writeln!(
            out,
            "<rect x=\"{from:.1}\" y=\"{:.1}\" width=\"{width:.1}\" height=\"{height:.1}\" fill=\"#0a2f6b\" \
             fill-opacity=\"{opacity:.2}\"/>",
            lower - height
        );
    }
    for (bits, name) in LINKS {
        let at_end = total * 8.0 / bits / length_s;
        // Where the line leaves the panel, above or on the right.
        let (x_share, y_share) = if at_end > 1.0 { (1.0 / at_end, 1.0) } else { (1.0, at_end) };
        let (x, top) = (RIGHT.x(x_share), y(y_share));
        let _ = writeln!(
            out,
            "<line x1=\"{}\" y1=\"{BOTTOM}\" x2=\"{x:.1}\" y2=\"{top:.1}\" stroke=\"#d9660f\" stroke-dasharray=\"5 4\"/>",
            RIGHT.left
        );
        let (x, top) = (x.min(RIGHT.right - 4.0), (top - 5.0).max(TOP + 12.0));
        let _ = writeln!(
            out,
            "<text x=\"{x:.1}\" y=\"{top:.1}\" text-anchor=\"end\" font-size=\"11\" fill=\"#a63c06\">{name}</text>"
        );
    }
    let notes = [
        "Paler: in fewer starts. Height: how far starts differ",
        "Steps above a dashed line come before they are read at that speed",
    ];
    for (no, note) in notes.iter().enumerate() {
        text(out, "sub", RIGHT.left, BOTTOM + 60.0 + 18.0 * no as f64, note);
    }
}

#[cfg(test)]
mod tests {
    use hermes_snapshotter::status::ProfileReport;

    use super::super::sample;
    use super::*;

    #[test]
    fn the_picture_has_both_sides_and_no_markup_of_others() {
        let picture = draw(&sample::report());
        assert_eq!(picture.matches("<polygon").count(), 3, "three sources gave something");
        assert!(picture.matches("<rect").count() >= 150, "a bar for each step");
        assert!(picture.contains("registry.example/&lt;b&gt;&amp;&quot;app&quot;:1") && !picture.contains("<b>"));
        assert!(picture.contains("200 Mbit/s") && picture.ends_with("</svg>\n"));
        assert!(!picture.contains("NaN") && !picture.contains("inf"));
    }

    #[test]
    fn a_picture_of_nothing_says_so() {
        let report = sample::report();
        let nothing = ProfileReport {
            origin: None,
            steps: Vec::new(),
            starts: Vec::new(),
            touches: Vec::new(),
            ..report.clone()
        };
        let picture = draw(&nothing);
        assert!(picture.contains("No profile yet") && picture.contains("No start was recorded"));
        // One read, at once.
        let mut moment = report;
        moment.touches.truncate(1);
        moment.steps.truncate(1);
        moment.starts[0].length_ms = 0;
        assert!(!draw(&moment).contains("NaN"));
    }

    #[test]
    fn ticks_are_round_and_few() {
        for max in [0.001, 0.9, 2.587, 115e6, 1e12] {
            let ticks = ticks(max);
            assert!((2..=6).contains(&ticks.len()), "{max}: {ticks:?}");
        }
    }
}
