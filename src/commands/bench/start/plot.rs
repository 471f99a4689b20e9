//! The result as a picture: a bar for each way, its median with least and greatest, and the bound as a line through those of an
//! image.
//!
//! One SVG file without anything outside of it, which follows the reader's choice of a light or a dark page.

use std::fmt::Write as _;

use super::sample::Samples;
use super::way::Way;
use crate::commands::trace::escaped;

/// Pixels.
const WIDTH: f64 = 1000.0;
const LEFT: f64 = 330.0;
const RIGHT: f64 = 70.0;
const TOP: f64 = 96.0;
const ROW: f64 = 22.0;
const BAR: f64 = 14.0;
const GROUP_HEAD: f64 = 40.0;
const BOTTOM: f64 = 44.0;
/// The ways that are drawn: those that a user has the choice of.
const DRAWN: [Way; 7] = [Way::Containerd, Way::Soci, Way::Cold, Way::Profile, Way::Peer, Way::Unpacked, Way::Complete];
/// Colours of a light and of a dark page.
const STYLE: &str = "\
:root{--page:#ffffff;--ink:#1d2733;--pale:#5b6875;--line:#d9dfe5;--ours:#1769aa;--theirs:#9aa6b2;--local:#5f9e6e;--bound:#c2410c}\
@media (prefers-color-scheme:dark){:root{--page:#0d1117;--ink:#e6edf3;--pale:#9aa7b4;--line:#2b333d;--ours:#58a6ff;--theirs:#6e7a87;\
--local:#6cc084;--bound:#ff9d5c}}\
text{font:13px system-ui,-apple-system,'Segoe UI',Roboto,'DejaVu Sans',sans-serif;fill:var(--ink)}\
.title{font-size:20px;font-weight:600}.group{font-weight:600;font-size:14px}.pale{fill:var(--pale);font-size:12px}\
.grid{stroke:var(--line);stroke-width:1}.whisker{stroke:var(--ink);stroke-width:1.3;opacity:.7}\
.bound{stroke:var(--bound);stroke-width:2;stroke-dasharray:5 3}.key{fill:var(--bound);font-size:12px}";

/// An image over a link, and its bars.
struct Group<'a> {
    image: &'a str,
    link_mbit: u64,
    ways: Vec<Way>,
}

fn groups(samples: &Samples) -> Vec<Group<'_>> {
    let links = samples.links();
    let all = links.iter().flat_map(|link| samples.facts.keys().map(move |image| (image, *link)));
    let groups = all.map(|(image, link_mbit)| {
        let is_there = |way: &Way| samples.answer(image, link_mbit, *way).is_some();
        Group { image, link_mbit, ways: DRAWN.into_iter().filter(is_there).collect() }
    });
    groups.filter(|group| !group.ways.is_empty()).collect()
}

fn colour(way: Way) -> &'static str {
    match way {
        Way::Unpacked | Way::Complete => "var(--local)",
        way if way.is_ours() => "var(--ours)",
        _ => "var(--theirs)",
    }
}

/// Steps of one, two or five that cut `most` into at most eight parts.
fn step(most: f64) -> f64 {
    let decade = 10_f64.powf((most / 8.0).max(1e-3).log10().floor());
    let fit = [1.0, 2.0, 5.0, 10.0].map(|factor| factor * decade).into_iter().find(|step| most / step <= 8.0);
    fit.unwrap_or(decade * 10.0)
}

/// Draws the picture.
pub(super) fn draw(samples: &Samples) -> String {
    let groups = groups(samples);
    let greatest = samples.samples.iter().filter(|sample| DRAWN.contains(&sample.way)).map(|sample| sample.answer_s);
    let most_s = greatest.fold(1.0, f64::max);
    let scale = (WIDTH - LEFT - RIGHT) / most_s;
    let height = TOP + BOTTOM + groups.iter().map(|group| GROUP_HEAD + group.ways.len() as f64 * ROW).sum::<f64>();
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" height=\"{height}\" role=\"img\">\
         <title>Seconds from the pull to the first answer</title><style>{STYLE}</style>\
         <rect width=\"100%\" height=\"100%\" fill=\"var(--page)\"/>\n\
         <text class=\"title\" x=\"24\" y=\"36\">From the pull to the first HTTP 200</text>\n\
         <text class=\"pale\" x=\"24\" y=\"58\">Seconds; medians, least and greatest. Green starts pull nothing. Shorter is better.</text>\n\
         <line class=\"bound\" x1=\"24\" y1=\"76\" x2=\"52\" y2=\"76\"/><text class=\"key\" x=\"60\" y=\"80\">\
         bound: no system can be quicker on this machine and this link</text>\n"
    );
    let mut grid_s = 0.0;
    while grid_s <= most_s {
        let x = LEFT + grid_s * scale;
        let (end, label) = (height - BOTTOM + 6.0, height - BOTTOM + 22.0);
        let _ = writeln!(
            out,
            "<line class=\"grid\" x1=\"{x:.1}\" y1=\"{TOP}\" x2=\"{x:.1}\" y2=\"{end}\"/>\
             <text class=\"pale\" x=\"{x:.1}\" y=\"{label}\" text-anchor=\"middle\">{grid_s} s</text>"
        );
        grid_s += step(most_s);
    }
    let mut y = TOP;
    for group in &groups {
        draw_group(&mut out, samples, group, y, scale);
        y += GROUP_HEAD + group.ways.len() as f64 * ROW;
    }
    out + "</svg>\n"
}

fn draw_group(out: &mut String, samples: &Samples, group: &Group<'_>, top: f64, scale: f64) {
    let title = format!("{}, {} Mbit/s to the registry", samples.facts[group.image].title, group.link_mbit);
    let _ = writeln!(out, "<text class=\"group\" x=\"24\" y=\"{}\">{}</text>", top + 26.0, escaped(&title));
    let first = top + GROUP_HEAD;
    for (place, way) in group.ways.iter().enumerate() {
        let Some(answer) = samples.answer(group.image, group.link_mbit, *way) else { continue };
        let (y, x) = (first + place as f64 * ROW, |seconds: f64| LEFT + seconds * scale);
        let (middle, end) = (y + BAR / 2.0, x(answer.median));
        let _ = writeln!(
            out,
            "<text x=\"{}\" y=\"{}\" text-anchor=\"end\">{}</text>\
             <rect x=\"{LEFT}\" y=\"{y}\" width=\"{:.1}\" height=\"{BAR}\" rx=\"2\" fill=\"{}\"/>",
            LEFT - 10.0,
            y + BAR - 2.5,
            escaped(way.title()),
            end - LEFT,
            colour(*way)
        );
        let _ = writeln!(
            out,
            "<path class=\"whisker\" fill=\"none\" d=\"M{0:.1} {1}V{2}M{0:.1} {middle}H{3:.1}M{3:.1} {1}V{2}\"/>\
             <text class=\"pale\" x=\"{4:.1}\" y=\"{5}\">{6:.2}</text>",
            x(answer.min),
            y + 3.0,
            y + BAR - 3.0,
            x(answer.max),
            x(answer.max) + 7.0,
            y + BAR - 2.5,
            answer.median
        );
    }
    if let Some(bound_s) = samples.bound_s(group.image, group.link_mbit) {
        let (x, end) = (LEFT + bound_s * scale, first + group.ways.len() as f64 * ROW - ROW + BAR);
        let _ = writeln!(
            out,
            "<line class=\"bound\" x1=\"{x:.1}\" y1=\"{}\" x2=\"{x:.1}\" y2=\"{}\"/>",
            first - 5.0,
            end + 4.0
        );
    }
}

#[cfg(test)]
mod tests {
    use super::super::sample::tests::samples;
    use super::*;

    #[test]
    fn the_picture_is_whole_and_escaped() {
        let picture = draw(&samples());
        assert!(picture.starts_with("<svg ") && picture.ends_with("</svg>\n"));
        assert!(picture.contains("Apache Spark &lt;master&gt;") && !picture.contains("<master>"));
        assert_eq!(picture.matches("class=\"bound\"").count(), 3, "one in the key, one for each link");
        for way in [Way::Containerd, Way::Soci, Way::Cold, Way::Peer] {
            assert!(picture.contains(way.title()), "{way:?}");
        }
    }

    #[test]
    fn the_axis_has_few_round_steps() {
        let cases = [(1.0, 0.2), (7.9, 1.0), (13.0, 2.0), (31.0, 5.0), (75.0, 10.0)];
        for (most, expected) in cases {
            assert!((step(most) - expected).abs() < 1e-9, "{most}: {}", step(most));
        }
    }
}
