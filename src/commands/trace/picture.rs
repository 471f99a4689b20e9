//! The trace as a timeline: one lane for each source, a bar for each request.
//!
//! The picture is one SVG file without anything outside of it. Colours say why a source was asked: warm ones are registries,
//! cool ones are peers, and each differs from the others in lightness, so that they can be told apart without colours. Tall
//! bars are readers that waited, low ones prefetch; the pale beginning of a bar is the wait for the first sign. Long pauses are
//! cut. What names and hosts contain is escaped.

use std::fmt::Write as _;

use hermes_snapshotter::status::{AskOutcome, AskReason, ImageTrace, SourceKind, TracedAsk};

use super::timescale::{PAUSE_WIDTH, Timescale};
use super::{reason, source_name, span};
use crate::output;

/// Pixels.
const WIDTH: f64 = 1200.0;
const LEFT: f64 = 200.0;
const RIGHT: f64 = 24.0;
const TOP: f64 = 92.0;
const ROW: f64 = 11.0;
const LANE_MIN: f64 = 44.0;
const LANE_GAP: f64 = 8.0;
/// Narrowest bar.
const BAR_MIN: f64 = 2.0;
/// Requests at once that have rows of their own within a lane; more are drawn over each other.
const ROWS_MAX: usize = 12;
/// Lanes; the sources that gave least have none.
const LANES_MAX: usize = 32;
/// Characters of a host in the margin.
const HOST_SHOWN: usize = 26;

/// The colour of a reason.
fn colour(reason: AskReason) -> &'static str {
    match reason {
        AskReason::OwnTurn => "#7a1010",
        AskReason::NoSwarm => "#a63c06",
        AskReason::Delegated => "#d9660f",
        AskReason::ForOthers => "#f0a03c",
        AskReason::NobodyOwns => "#f7d57e",
        AskReason::Owner => "#0a2f6b",
        AskReason::ZoneOwner => "#235fa8",
        AskReason::Named => "#4fa3dd",
        AskReason::Holder => "#84c8de",
        AskReason::Hedge => "#9c5fd0",
        AskReason::LocalCopy => "#8d99a3",
    }
}

/// `text` as the content of an element or an attribute. Control characters, which XML 1.0 cannot hold, are left out.
pub(in crate::commands) fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&apos;"),
            '\u{fffe}' | '\u{ffff}' => {}
            other if other.is_control() && other != '\n' => {}
            other => out.push(other),
        }
    }
    out
}

/// `text`, cut in its middle when it is longer than `most` characters.
pub(in crate::commands) fn cut(text: &str, most: usize) -> String {
    let characters: Vec<char> = text.chars().collect();
    if characters.len() <= most {
        return text.to_owned();
    }
    let half = most.saturating_sub(1) / 2;
    let (head, tail) = (&characters[..half], &characters[characters.len() - half..]);
    format!("{}…{}", head.iter().collect::<String>(), tail.iter().collect::<String>())
}

/// One source's requests, with the row of each.
struct Lane<'a> {
    source: usize,
    bytes: u64,
    asks: Vec<(usize, &'a TracedAsk)>,
    rows: usize,
}

impl Lane<'_> {
    fn height(&self) -> f64 {
        (self.rows as f64 * ROW + 12.0).max(LANE_MIN)
    }
}

fn ended(trace: &ImageTrace, ask: &TracedAsk) -> u64 {
    ask.ended_us.unwrap_or(trace.now_us).max(ask.sent_us)
}

/// The lanes: registries, then peers, then this node, those that gave most first; and how many have none.
fn lanes<'a>(trace: &'a ImageTrace, scale: &Timescale) -> (Vec<Lane<'a>>, usize) {
    let mut lanes: Vec<Lane<'_>> = (0..trace.sources.len())
        .map(|source| {
            let mut free: Vec<f64> = Vec::new();
            let (mut asks, mut bytes) = (Vec::new(), 0);
            for ask in trace.asks.iter().filter(|ask| ask.source as usize == source) {
                let start = scale.x(ask.sent_us);
                let end = scale.x(ended(trace, ask)).max(start + BAR_MIN) + 1.0;
                let row = free.iter().position(|until| *until <= start).unwrap_or(free.len()).min(ROWS_MAX - 1);
                match free.get_mut(row) {
                    Some(until) => *until = until.max(end),
                    None => free.push(end),
                }
                bytes += ask.bytes;
                asks.push((row, ask));
            }
            Lane { source, bytes, asks, rows: free.len() }
        })
        .collect();
    lanes.retain(|lane| !lane.asks.is_empty());
    let kind = |lane: &Lane<'_>| match trace.sources[lane.source].kind {
        SourceKind::Registry => 0,
        SourceKind::Peer => 1,
        SourceKind::Local => 2,
    };
    lanes.sort_by_key(|lane| (std::cmp::Reverse(lane.bytes), lane.source));
    let without = lanes.len().saturating_sub(LANES_MAX);
    lanes.truncate(LANES_MAX);
    lanes.sort_by_key(kind);
    (lanes, without)
}

/// The picture.
pub(super) fn draw(trace: &ImageTrace) -> String {
    let spans = trace.asks.iter().map(|ask| (ask.sent_us, ended(trace, ask))).collect();
    let scale = Timescale::new(spans, LEFT, WIDTH - LEFT - RIGHT);
    let (lanes, without) = lanes(trace, &scale);
    let total: u64 = trace.asks.iter().map(|ask| ask.bytes).sum();
    let bottom = TOP + lanes.iter().map(|lane| lane.height() + LANE_GAP).sum::<f64>();
    let mut body = String::new();
    axis(&mut body, &scale, bottom);
    let mut y = TOP;
    for lane in &lanes {
        draw_lane(&mut body, trace, &scale, lane, y, total);
        y += lane.height() + LANE_GAP;
    }
    if without > 0 {
        text(
            &mut body,
            "sub",
            16.0,
            bottom + 14.0,
            &format!("{without} further sources, which gave less, are not shown"),
        );
    }
    let height = legend(&mut body, trace, bottom + 40.0);
    let mut out = format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n\
         <svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height:.0}\" viewBox=\"0 0 {WIDTH} {height:.0}\" \
         font-family=\"Inter, 'Segoe UI', Helvetica, Arial, sans-serif\" font-size=\"12\" fill=\"#1d2733\">\n\
         <style>.head{{font-size:17px;font-weight:600}}.sub{{fill:#5b6773}}.name{{font-weight:600}}\
         .tick{{fill:#5b6773;font-size:11px}}</style>\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n"
    );
    heading(&mut out, trace, total);
    out + &body + "</svg>\n"
}

/// A line of text at a place.
pub(in crate::commands) fn text(out: &mut String, class: &str, x: f64, y: f64, content: &str) {
    // Writing to a string cannot fail, here and below.
    let _ = writeln!(out, "<text class=\"{class}\" x=\"{x:.1}\" y=\"{y:.1}\">{}</text>", escaped(content));
}

/// What the picture is of, and what came from where.
fn heading(out: &mut String, trace: &ImageTrace, total: u64) {
    text(out, "head", 16.0, 28.0, &format!("Who gave {}", cut(&trace.image, 100)));
    let from = |kind| {
        let is = |ask: &&TracedAsk| trace.sources.get(ask.source as usize).is_some_and(|source| source.kind == kind);
        let bytes: u64 = trace.asks.iter().filter(is).map(|ask| ask.bytes).sum();
        format!("{} ({})", output::bytes(bytes), output::percent(bytes, total))
    };
    let last = trace.asks.iter().map(|ask| ended(trace, ask)).max().unwrap_or(0);
    let mut line = format!(
        "{} in {} requests over {}: {} from registries, {} from peers, {} from this node's other layers",
        output::bytes(total),
        trace.asks.len(),
        span(last),
        from(SourceKind::Registry),
        from(SourceKind::Peer),
        from(SourceKind::Local)
    );
    if trace.left_out > 0 {
        line += &format!("; {} earlier requests are forgotten", trace.left_out);
    }
    text(out, "sub", 16.0, 50.0, &line);
}

/// Lines at round times, and marks where pauses were cut.
fn axis(out: &mut String, scale: &Timescale, bottom: f64) {
    let top = TOP - 8.0;
    let mut last = f64::MIN;
    for (x, at) in scale.ticks() {
        let _ = writeln!(out, "<line x1=\"{x:.1}\" y1=\"{top}\" x2=\"{x:.1}\" y2=\"{bottom:.1}\" stroke=\"#dfe4ea\"/>");
        // Labels that would lie on each other, on both sides of a pause, are left out.
        if x - last > 52.0 && x < WIDTH - 40.0 {
            let label = if at == 0 { "0".to_owned() } else { tick(at) };
            text(out, "tick", x + 3.0, top + 1.0, &label);
            last = x;
        }
    }
    for (x, pause) in scale.pauses() {
        let height = bottom - top;
        let _ = writeln!(
            out,
            "<g><title>a pause of {}</title><rect x=\"{:.1}\" y=\"{top}\" width=\"{:.1}\" height=\"{height:.1}\" \
             fill=\"#eef1f4\"/><text class=\"tick\" text-anchor=\"middle\" transform=\"translate({:.1} {:.1}) \
             rotate(-90)\">{}</text></g>",
            span(pause),
            x + 4.0,
            PAUSE_WIDTH - 8.0,
            x + PAUSE_WIDTH / 2.0 + 4.0,
            top + height / 2.0,
            span(pause)
        );
    }
}

/// A round time, without the zeros that say nothing.
fn tick(at_us: u64) -> String {
    let (value, unit) = match at_us {
        0..1_000 => (at_us as f64, "us"),
        1_000..1_000_000 => (at_us as f64 / 1e3, "ms"),
        _ => (at_us as f64 / 1e6, "s"),
    };
    let number = format!("{value:.3}");
    format!("{} {unit}", number.trim_end_matches('0').trim_end_matches('.'))
}

fn draw_lane(out: &mut String, trace: &ImageTrace, scale: &Timescale, lane: &Lane<'_>, y: f64, total: u64) {
    let source = &trace.sources[lane.source];
    let (height, width) = (lane.height(), WIDTH - LEFT - RIGHT);
    let _ = writeln!(
        out,
        "<g><title>{}</title><rect x=\"{LEFT}\" y=\"{y:.1}\" width=\"{width}\" height=\"{height:.1}\" fill=\"#5b6773\" \
         fill-opacity=\"0.06\"/>",
        escaped(if source.name.is_empty() { "another layer on this node" } else { &source.name })
    );
    text(out, "name", 16.0, y + 17.0, &cut(&source_name(source), HOST_SHOWN));
    let zone = if source.zone.is_empty() { String::new() } else { format!(" · {}", cut(&source.zone, 12)) };
    let shares = format!("{} · {}{zone}", output::bytes(lane.bytes), output::percent(lane.bytes, total));
    text(out, "sub", 16.0, y + 33.0, &shares);
    out.push_str("</g>\n");
    for (row, ask) in &lane.asks {
        draw_ask(out, trace, scale, ask, y + 6.0 + *row as f64 * ROW);
    }
}

fn draw_ask(out: &mut String, trace: &ImageTrace, scale: &Timescale, ask: &TracedAsk, y: f64) {
    let start = scale.x(ask.sent_us);
    let end = scale.x(ended(trace, ask)).max(start + BAR_MIN);
    let first = ask.first_us.map_or(end, |first| scale.x(first)).clamp(start, end);
    let (y, height) = if ask.demand { (y, ROW - 2.0) } else { (y + 2.5, 4.0) };
    let fill = colour(ask.reason);
    let _ = write!(out, "<g><title>{}</title>", escaped(&tooltip(trace, ask)));
    let mut bar = |x: f64, width: f64, more: &str| {
        let _ = write!(
            out,
            "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{height}\" fill=\"{fill}\"{more}/>"
        );
    };
    // The colour of a bar is never only a hair wide: short ones have it all over.
    let first = if end - first < BAR_MIN { (end - BAR_MIN).max(start) } else { first };
    if ask.bytes == 0 {
        let dashes = if ask.outcome == AskOutcome::UnderWay { "" } else { " stroke-dasharray=\"3 2\"" };
        bar(start, end - start, &format!(" fill-opacity=\"0.15\" stroke=\"{fill}\"{dashes}"));
    } else {
        if first > start {
            bar(start, first - start, " fill-opacity=\"0.3\"");
        }
        bar(first, end - first, "");
    }
    if is_failure(ask.outcome) {
        let (x, middle) = (end, y + height / 2.0);
        let _ = write!(
            out,
            "<path d=\"M{:.1} {:.1}l6 6m0 -6l-6 6\" stroke=\"#d00000\" stroke-width=\"2\" fill=\"none\"/>",
            x - 3.0,
            middle - 3.0
        );
    }
    out.push_str("</g>\n");
}

fn is_failure(outcome: AskOutcome) -> bool {
    match outcome {
        AskOutcome::FailedTransient
        | AskOutcome::FailedPeerFault
        | AskOutcome::FailedNotFound
        | AskOutcome::FailedDenied
        | AskOutcome::FailedLocal => true,
        AskOutcome::UnderWay
        | AskOutcome::Done
        | AskOutcome::Lacks
        | AskOutcome::Referred
        | AskOutcome::Delegated
        | AskOutcome::Busy
        | AskOutcome::NotMine
        | AskOutcome::Cancelled => false,
    }
}

fn tooltip(trace: &ImageTrace, ask: &TracedAsk) -> String {
    let source = trace.sources.get(ask.source as usize).map_or_else(String::new, source_name);
    let layer = trace.layers.get(ask.layer as usize).map_or_else(String::new, |layer| layer.hex()[..12].to_owned());
    let first = ask.first_us.map_or_else(
        || "no sign".to_owned(),
        |first| format!("first sign after {}", span(first.saturating_sub(ask.sent_us))),
    );
    format!(
        "{source}: {}\n{} for {}, {}; {} of {} in {} chunks, layer {layer}\nat {:.3} s for {}, {first}",
        reason(ask),
        ask.outcome.name(),
        if ask.demand { "a reader" } else { "prefetch" },
        if ask.ended_us.is_some() { "over" } else { "not over" },
        output::bytes(ask.bytes),
        output::bytes(ask.asked_bytes),
        ask.chunks,
        ask.sent_us as f64 / 1e6,
        span(ended(trace, ask) - ask.sent_us)
    )
}

/// What colours and shapes mean; gives the height of the picture.
fn legend(out: &mut String, trace: &ImageTrace, top: f64) -> f64 {
    let (mut x, mut y) = (16.0, top);
    for reason in AskReason::ALL.iter().filter(|reason| trace.asks.iter().any(|ask| ask.reason == **reason)) {
        let width = 34.0 + reason.name().len() as f64 * 7.0;
        if x + width > WIDTH - RIGHT {
            (x, y) = (16.0, y + 22.0);
        }
        let _ = writeln!(
            out,
            "<rect x=\"{x:.1}\" y=\"{:.1}\" width=\"14\" height=\"10\" fill=\"{}\"/>",
            y - 9.0,
            colour(*reason)
        );
        text(out, "", x + 20.0, y, reason.name());
        x += width;
    }
    y += 24.0;
    let shape = "#5b6773";
    let _ = writeln!(
        out,
        "<rect x=\"16\" y=\"{0:.1}\" width=\"24\" height=\"9\" fill=\"{shape}\"/>\
         <rect x=\"180\" y=\"{1:.1}\" width=\"24\" height=\"4\" fill=\"{shape}\"/>\
         <rect x=\"290\" y=\"{0:.1}\" width=\"12\" height=\"9\" fill=\"{shape}\" fill-opacity=\"0.3\"/>\
         <rect x=\"302\" y=\"{0:.1}\" width=\"12\" height=\"9\" fill=\"{shape}\"/>\
         <rect x=\"500\" y=\"{0:.1}\" width=\"24\" height=\"9\" fill=\"{shape}\" fill-opacity=\"0.15\" stroke=\"{shape}\" \
         stroke-dasharray=\"3 2\"/>\
         <path d=\"M708 {2:.1}l6 6m0 -6l-6 6\" stroke=\"#d00000\" stroke-width=\"2\" fill=\"none\"/>",
        y - 9.0,
        y - 6.0,
        y - 7.0
    );
    for (x, meaning) in [
        (46.0, "a reader waited"),
        (210.0, "prefetch"),
        (320.0, "pale: until the first sign"),
        (530.0, "brought nothing itself"),
        (722.0, "failed"),
    ] {
        text(out, "sub", x, y, meaning);
    }
    y + 20.0
}

#[cfg(test)]
mod tests {
    use super::super::sample;
    use super::*;

    /// Whether `xml` is well formed, as far as this file uses XML: elements that are closed in order, quoted attributes, the
    /// five entities, no character that XML cannot hold.
    fn assert_well_formed(xml: &str) {
        let mut open: Vec<String> = Vec::new();
        let mut rest = xml.strip_prefix("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n").expect("a declaration");
        while let Some(at) = rest.find('<') {
            check_text(&rest[..at]);
            let end = at + rest[at..].find('>').expect("a tag ends");
            let tag = &rest[at + 1..end];
            rest = &rest[end + 1..];
            if let Some(name) = tag.strip_prefix('/') {
                assert_eq!(open.pop().as_deref(), Some(name), "tags are nested");
                continue;
            }
            let empty = tag.ends_with('/');
            let tag = tag.trim_end_matches('/');
            let (name, attributes) = tag.split_once(' ').unwrap_or((tag, ""));
            assert_eq!(attributes.matches('"').count() % 2, 0, "attributes are quoted: {tag}");
            attributes.split('"').skip(1).step_by(2).for_each(check_text);
            if !empty {
                open.push(name.to_owned());
            }
        }
        assert!(open.is_empty() && rest.trim().is_empty(), "{open:?} {rest}");
    }

    fn check_text(text: &str) {
        for after in text.split('&').skip(1) {
            let known = ["amp;", "lt;", "gt;", "quot;", "apos;"].iter().any(|entity| after.starts_with(entity));
            assert!(known, "an entity: {after}");
        }
        assert!(text.chars().all(|c| !c.is_control() || c == '\n'), "{text:?}");
    }

    #[test]
    fn the_picture_is_well_formed_and_escaped() {
        let trace = sample::trace();
        let svg = draw(&trace);
        assert_well_formed(&svg);
        assert!(!svg.contains("<script") && svg.contains("&lt;script&gt;&amp;&quot;app&quot;:1"), "{svg}");
        for part in
            ["registry.example:5000", "peer …abcdefgh", "zone-&lt;a&gt;", "3.0 MB · 75.0 %", "own turn", "a pause of"]
        {
            assert!(svg.contains(part), "'{part}' is missing in:\n{svg}");
        }
        assert_eq!(svg.matches("for a reader").count() + svg.matches("for prefetch").count(), trace.asks.len());
        assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
    }

    #[test]
    fn an_empty_trace_is_a_picture_too() {
        assert_well_formed(&draw(&ImageTrace::default()));
    }

    #[test]
    fn many_sources_and_requests_are_bounded() {
        let mut trace = sample::trace();
        let peer = trace.sources[1].clone();
        trace.sources = vec![peer; 100];
        trace.asks = (0..4000).map(|at| sample::ask(at % 100, AskReason::Holder, 0, 1000, 1000)).collect();
        let svg = draw(&trace);
        assert_well_formed(&svg);
        assert!(svg.contains("68 further sources"), "lanes are bounded");
    }

    #[test]
    fn colours_differ_in_lightness() {
        let lightness = |reason: &AskReason| {
            let part = |at| f64::from(u8::from_str_radix(&colour(*reason)[at..at + 2], 16).expect("a colour"));
            0.2126 * part(1) + 0.7152 * part(3) + 0.0722 * part(5)
        };
        let registry =
            [AskReason::OwnTurn, AskReason::NoSwarm, AskReason::Delegated, AskReason::ForOthers, AskReason::NobodyOwns];
        let peers = [AskReason::Owner, AskReason::ZoneOwner, AskReason::Hedge, AskReason::Named, AskReason::Holder];
        for kind in [registry, peers] {
            let mut all: Vec<f64> = kind.iter().map(lightness).collect();
            all.sort_by(f64::total_cmp);
            assert!(all.windows(2).all(|pair| pair[1] - pair[0] > 12.0), "{all:?}");
        }
    }
}
