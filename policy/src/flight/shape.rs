//! How much one ask holds, and the set arithmetic that finds it.

use std::ops::Range;

use hermes_image::ids::ChunkRange;
use hermes_image::runs::Runs;

use crate::geometry::LayerGeometry;

/// The first chunks of `wanted`, up to a number of bytes and of runs, and at least one.
pub(super) fn cut_chunks(geometry: &LayerGeometry, wanted: &Runs, bytes_max: u64, runs_max: usize) -> Runs {
    let mut cut = Runs::new();
    let mut left = bytes_max;
    for run in wanted.iter().take(runs_max) {
        let bytes = geometry.len_bytes(&run);
        if bytes <= left {
            left -= bytes;
            cut.insert(run);
            continue;
        }
        let mut end = geometry.chunk_at(geometry.start_bytes(run.start) + left).clamp(run.start, run.end);
        if end == run.start && cut.is_empty() {
            end += 1;
        }
        cut.insert(run.start..end);
        break;
    }
    cut
}

/// The chunks that an ask beginning with the span of `chunk` can reach: as many whole spans as `bytes_max` compressed
/// bytes hold, and at least one. Empty while spans are not known.
pub(super) fn reach(geometry: &LayerGeometry, chunk: u32, bytes_max: u64) -> ChunkRange {
    let Some(first) = geometry.span_of(chunk) else { return 0..0 };
    let start = geometry.span_bytes(&(first..first + 1)).start;
    let end = geometry.first_span_beyond(first, start.saturating_add(bytes_max)).max(first + 1);
    geometry.span_chunks(&(first..end))
}

/// The span of `chunk` and those after it that end within so many logical bytes of its start. Empty while spans are not known.
pub(super) fn near(geometry: &LayerGeometry, chunk: u32, near_bytes: u64) -> ChunkRange {
    let Some(first) = geometry.span_of(chunk) else { return 0..0 };
    let own = geometry.span_chunks(&(first..first + 1));
    let beyond = geometry.chunk_at(geometry.start_bytes(own.start).saturating_add(near_bytes));
    let after = geometry.span_of(beyond).filter(|_| beyond < geometry.chunk_count());
    let end = after.map_or(geometry.chunk_count(), |span| geometry.span_chunks(&(span..span + 1)).start);
    own.start..end.max(own.end)
}

/// The spans to read together, beginning with the span of the first chunk of `wanted`: neighbouring spans that hold
/// wanted chunks, and the ones between them where they have at most `gap_max` compressed bytes; up to `bytes_max`
/// compressed bytes, and at least one span. `None` while spans are not known, or for an empty set.
pub(super) fn cut_spans(geometry: &LayerGeometry, wanted: &Runs, bytes_max: u64, gap_max: u64) -> Option<Range<u32>> {
    let first = geometry.span_of(wanted.first()?.start)?;
    let start = geometry.span_bytes(&(first..first + 1)).start;
    let mut spans = first..first + 1;
    for run in wanted.iter() {
        let (Some(from), Some(to)) = (geometry.span_of(run.start), geometry.span_of(run.end - 1)) else { break };
        for span in from.max(spans.end)..(to + 1).max(from) {
            let gap = if span > spans.end {
                let between = geometry.span_bytes(&(spans.end..span));
                between.end - between.start
            } else {
                0
            };
            let bytes = geometry.span_bytes(&(span..span + 1)).end.saturating_sub(start);
            if gap > gap_max || bytes > bytes_max {
                return Some(spans);
            }
            spans.end = span + 1;
        }
    }
    Some(spans)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::geometry::Span;

    const CHUNK: u64 = 65_536;

    /// Four chunks to a span, 100 compressed bytes to a span.
    fn layer(spans: u32) -> LayerGeometry {
        let table = (0..spans)
            .map(|no| Span {
                first_chunk: no * 4,
                blob_start: u64::from(no) * 100,
                blob_end: u64::from(no) * 100 + 101,
            })
            .collect();
        LayerGeometry::new(vec![CHUNK; spans as usize * 4]).and_then(|layer| layer.with_spans(table)).expect("valid")
    }

    #[test]
    fn chunks_are_cut_by_bytes_and_runs() {
        let layer = layer(5);
        let wanted = Runs::from_iter([0..3, 5..6, 8..20]);
        for (bytes, runs, expected) in [
            (1, 9, Runs::one(0..1)),
            (2 * CHUNK, 9, Runs::one(0..2)),
            (3 * CHUNK + 1, 9, Runs::one(0..3)),
            (6 * CHUNK, 9, Runs::from_iter([0..3, 5..6, 8..10])),
            (6 * CHUNK, 2, Runs::from_iter([0..3, 5..6])),
            (u64::MAX / 2, 9, wanted.clone()),
        ] {
            assert_eq!(cut_chunks(&layer, &wanted, bytes, runs), expected, "{bytes} bytes, {runs} runs");
        }
        assert!(cut_chunks(&layer, &Runs::new(), 1, 1).is_empty());
    }

    #[test]
    fn spans_are_merged_over_small_gaps_up_to_a_size() {
        let layer = layer(10);
        for (wanted, bytes, gap, expected) in [
            (Runs::one(5..6), 1, 0, 1..2),
            (Runs::from_iter([0..1, 4..5, 8..9]), 1000, 0, 0..3),
            (Runs::from_iter([0..1, 3..9]), 201, 0, 0..2),
            (Runs::from_iter([0..1, 8..9]), 1000, 0, 0..1),
            (Runs::from_iter([0..1, 8..9]), 1000, 101, 0..3),
            (Runs::from_iter([0..1, 12..13]), 1000, 101, 0..1),
            (Runs::one(2..40), 1001, 0, 0..10),
            (Runs::one(2..40), 350, 0, 0..3),
        ] {
            assert_eq!(cut_spans(&layer, &wanted, bytes, gap), Some(expected), "{wanted:?}, {bytes} bytes, gap {gap}");
        }
        assert_eq!(cut_spans(&layer, &Runs::new(), 1000, 0), None);
        assert_eq!(cut_spans(&LayerGeometry::new([512]).expect("valid"), &Runs::one(0..1), 1000, 0), None);
    }

    #[test]
    fn near_is_whole_spans_and_at_least_one() {
        let layer = layer(10);
        for (chunk, bytes, expected) in [
            (5, 0, 4..8),
            (5, 8 * CHUNK - 1, 4..8),
            (5, 8 * CHUNK, 4..12),
            (36, 1, 36..40),
            (30, 100 * CHUNK, 28..40),
            (30, u64::MAX, 28..40),
        ] {
            assert_eq!(near(&layer, chunk, bytes), expected, "{bytes} bytes from chunk {chunk}");
        }
        assert_eq!(near(&LayerGeometry::new([512]).expect("valid"), 0, 1000), 0..0);
    }

    #[test]
    fn reach_is_whole_spans() {
        let layer = layer(10);
        assert_eq!(reach(&layer, 5, 1), 4..8);
        assert_eq!(reach(&layer, 5, 250), 4..12);
        assert_eq!(reach(&layer, 5, 100_000), 4..40);
    }
}
