//! The trace as tables: what each source gave for which reason, then the requests.

use std::collections::BTreeMap;

use hermes_snapshotter::status::{AskReason, ImageTrace, TracedAsk};

use super::{reason, source_name, span};
use crate::output;

/// Requests that are listed unless all are wanted.
const LISTED: usize = 40;

/// Both tables.
pub(super) fn render(trace: &ImageTrace, all: bool) -> String {
    if trace.asks.is_empty() {
        return format!("{}: nobody was asked for anything since it was mounted\n", trace.image);
    }
    let total: u64 = trace.asks.iter().map(|ask| ask.bytes).sum();
    let last = trace.asks.iter().map(|ask| ask.ended_us.unwrap_or(trace.now_us)).max().unwrap_or(0);
    let mut out =
        format!("{}: {} requests brought {} in {}\n", trace.image, trace.asks.len(), output::bytes(total), span(last));
    if trace.left_out > 0 {
        out += &format!("{} earlier requests are forgotten\n", trace.left_out);
    }
    out += &format!("\n{}\n\n", summary(trace, total));
    let skipped = if all { 0 } else { trace.asks.len().saturating_sub(LISTED) };
    if skipped > 0 {
        out += &format!("the latest requests; --all lists {skipped} more\n");
    }
    out + &format!("{}\n", requests(trace, skipped))
}

/// One line for each source and reason, the one that gave most first.
fn summary(trace: &ImageTrace, total: u64) -> String {
    let mut groups: BTreeMap<(u32, AskReason), Vec<&TracedAsk>> = BTreeMap::new();
    for ask in &trace.asks {
        groups.entry((ask.source, ask.reason)).or_default().push(ask);
    }
    let brought = |asks: &[&TracedAsk]| asks.iter().map(|ask| ask.bytes).sum::<u64>();
    let mut groups: Vec<_> = groups.into_iter().map(|(key, asks)| (brought(&asks), key, asks)).collect();
    groups.sort_by_key(|(bytes, key, _)| (std::cmp::Reverse(*bytes), *key));
    let rows = groups.into_iter().map(|(bytes, (source, reason), asks)| {
        let source = trace.sources.get(source as usize);
        let mut waits: Vec<u64> =
            asks.iter().filter_map(|ask| Some(ask.first_us?.saturating_sub(ask.sent_us))).collect();
        waits.sort_unstable();
        let at = |percent: usize| percentile(&waits, percent).map_or_else(|| "-".to_owned(), span);
        let zone = source.map(|source| source.zone.as_str()).filter(|zone| !zone.is_empty()).unwrap_or("-");
        vec![
            source.map_or_else(String::new, source_name),
            zone.to_owned(),
            reason.name().to_owned(),
            asks.len().to_string(),
            output::bytes(bytes),
            output::percent(bytes, total),
            at(50),
            at(90),
            at(100),
        ]
    });
    let header = ["source", "zone", "why", "requests", "bytes", "share", "first sign p50", "p90", "max"];
    output::table(&header, rows.collect())
}

/// The value that so many percent do not exceed: the nearest rank.
fn percentile(sorted: &[u64], percent: usize) -> Option<u64> {
    let rank = (sorted.len() * percent).div_ceil(100).max(1);
    sorted.get(rank - 1).copied()
}

fn requests(trace: &ImageTrace, skipped: usize) -> String {
    let rows = trace.asks.iter().skip(skipped).map(|ask| {
        let layer = trace.layers.get(ask.layer as usize).map_or_else(String::new, |layer| layer.hex()[..8].to_owned());
        let took = ask.ended_us.map_or_else(|| "-".to_owned(), |end| span(end.saturating_sub(ask.sent_us)));
        vec![
            format!("{:.3} s", ask.sent_us as f64 / 1e6),
            took,
            trace.sources.get(ask.source as usize).map_or_else(String::new, source_name),
            if ask.demand { "demand" } else { "prefetch" }.to_owned(),
            reason(ask),
            output::bytes(ask.bytes),
            output::bytes(ask.asked_bytes),
            layer,
            ask.outcome.name().to_owned(),
        ]
    });
    let header = ["at", "took", "source", "class", "why", "brought", "of", "layer", "outcome"];
    output::table(&header, rows.collect())
}

#[cfg(test)]
mod tests {
    use hermes_snapshotter::status::ImageTrace;

    use super::super::sample;
    use super::*;

    #[test]
    fn the_tables_tell_sources_and_reasons() {
        let text = render(&sample::trace(), false);
        for part in [
            "4 requests brought 4.0 MB in 10.00 s",
            "3 earlier requests are forgotten",
            "FIRST SIGN P50",
            "registry.example:5000",
            "own turn",
            "75.0 %",
            "zone-b",
            "peer …abcdefgh",
            "owner, rank 1",
            "referred",
            "under way",
            "07070707",
        ] {
            assert!(text.contains(part), "'{part}' is missing in:\n{text}");
        }
        assert_eq!(render(&ImageTrace { image: "a".into(), ..ImageTrace::default() }, true).lines().count(), 1);
    }

    #[test]
    fn long_traces_are_cut_unless_all_is_wanted() {
        let mut trace = sample::trace();
        trace.asks = (0..100).map(|at| sample::ask(0, AskReason::Holder, at, at + 5, 1000 + at)).collect();
        assert!(render(&trace, false).contains("--all lists 60 more"));
        assert_eq!(render(&trace, true).lines().count() - render(&trace, false).lines().count(), 59);
    }

    #[test]
    fn percentiles_are_by_nearest_rank() {
        assert_eq!(percentile(&[], 50), None);
        assert_eq!([50, 90, 100].map(|percent| percentile(&[1, 2, 3, 4], percent)), [Some(2), Some(4), Some(4)]);
    }
}
