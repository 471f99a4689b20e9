//! Where drafts of spans begin and end, from the chunks, the restart points and the notes of progress.
//!
//! A draft has between [`SpanLimits::min_len_bytes`] and [`SpanLimits::max_len_bytes`] of output, and the next one
//! begins at that chunk in between whose restart point is nearest before it: what lies between restart point and chunk
//! is read and decoded twice. When there is no restart point in all that length, the span goes on to the next one.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use super::SpanLimits;
use super::unpack::{Progress, RestartPoint};
use crate::ids::ChunkNo;
use crate::inflate::Boundary;
use crate::inflate::window::WINDOW_LEN_MAX_BYTES;

/// A span whose window is not packed yet.
#[derive(Debug)]
pub(super) struct SpanDraft {
    /// Its first chunk.
    pub(super) first_chunk: ChunkNo,
    /// Length of its chunks in bytes.
    pub(super) len_bytes: u64,
    /// Where a decoder begins.
    pub(super) restart: Arc<RestartPoint>,
    /// Compressed bytes before this make the last chunk complete.
    pub(super) blob_end: u64,
}

/// A place at which a span can begin.
#[derive(Debug)]
struct Start {
    chunk: ChunkNo,
    logical: u64,
    restart: Arc<RestartPoint>,
    /// The compressed end of the span before, should this one begin here.
    blob_end_before: u64,
}

impl Start {
    /// Output between the restart point and the first chunk, which is decoded for nothing.
    fn overhead(&self) -> u64 {
        self.logical - self.restart.logical
    }
}

/// Plans the spans of one layer.
pub(super) struct Planner {
    limits: SpanLimits,
    /// For a plain tar every chunk is a restart point of its own.
    restart_anywhere: bool,
    /// Restart points after `latest`.
    restarts: VecDeque<Arc<RestartPoint>>,
    /// The last restart point at or before the chunk at hand.
    latest: Option<Arc<RestartPoint>>,
    restarts_known_to: u64,
    progress: VecDeque<Progress>,
    /// Chunks whose restart points are not all known, as logical ranges.
    waiting: VecDeque<Range<u64>>,
    next_chunk: ChunkNo,
    /// The span in the making.
    current: Option<Start>,
    /// The best place for the next one.
    best: Option<Start>,
    end: u64,
}

impl Planner {
    pub(super) fn new(limits: SpanLimits) -> Self {
        // The use of a window is told by the 32 KiB after the restart point, which its span has to hold.
        let min_len_bytes = limits.min_len_bytes.max(WINDOW_LEN_MAX_BYTES as u64);
        Self {
            limits: SpanLimits { min_len_bytes, ..limits },
            restart_anywhere: false,
            restarts: VecDeque::new(),
            latest: None,
            restarts_known_to: 0,
            progress: VecDeque::new(),
            waiting: VecDeque::new(),
            next_chunk: ChunkNo(0),
            current: None,
            best: None,
            end: 0,
        }
    }

    /// The blob is a plain tar. To be said before the first piece.
    pub(super) fn restart_anywhere(&mut self) {
        self.restart_anywhere = true;
    }

    /// What came with a piece, before the chunks of the piece.
    pub(super) fn piece(&mut self, progress: Vec<Progress>, restarts: Vec<RestartPoint>, restarts_known_to: u64) {
        self.progress.extend(progress);
        self.restarts.extend(restarts.into_iter().map(Arc::new));
        self.restarts_known_to = restarts_known_to;
    }

    /// The next chunk. Appends the spans that are certain now.
    pub(super) fn chunk(&mut self, logical: Range<u64>, drafts: &mut Vec<SpanDraft>) {
        self.waiting.push_back(logical);
        self.advance(drafts);
    }

    fn advance(&mut self, drafts: &mut Vec<SpanDraft>) {
        while let Some(chunk) = self.waiting.front()
            && (chunk.start < self.restarts_known_to || self.restart_anywhere)
            && let Some(chunk) = self.waiting.pop_front()
        {
            self.place(chunk, drafts);
        }
    }

    fn place(&mut self, chunk: Range<u64>, drafts: &mut Vec<SpanDraft>) {
        let no = self.next_chunk;
        self.next_chunk.0 += 1;
        while let Some(next) = self.restarts.front()
            && next.logical <= chunk.start
        {
            self.latest = self.restarts.pop_front();
        }
        let start = self.start_at(no, chunk.start);
        self.end = chunk.end;
        let Some(current) = &self.current else {
            self.current = start;
            return;
        };
        if let Some(start) = start
            && start.logical - current.logical >= self.limits.min_len_bytes
            && start.restart.logical > current.restart.logical
            && self.best.as_ref().is_none_or(|best| start.overhead() <= best.overhead())
        {
            self.best = Some(start);
        }
        if chunk.end - current.logical > self.limits.max_len_bytes
            && let Some(best) = self.best.take()
        {
            self.close(best, drafts);
        }
    }

    /// A span that begins at `chunk`; `None` without a restart point before it, which only wrong use could bring about.
    fn start_at(&mut self, chunk: ChunkNo, logical: u64) -> Option<Start> {
        while self.progress.len() > 1
            && let Some(first) = self.progress.front()
            && first.logical < logical
        {
            self.progress.pop_front();
        }
        let blob_end_before = self.blob_end(logical);
        let restart = if self.restart_anywhere {
            let (window, head) = (Box::default(), Vec::new());
            Arc::new(RestartPoint { logical, blob: logical, resume: Boundary::Start, window, head })
        } else {
            self.latest.clone()?
        };
        Some(Start { chunk, logical, restart, blob_end_before })
    }

    /// By which compressed byte all output before `logical` is there.
    fn blob_end(&self, logical: u64) -> u64 {
        if self.restart_anywhere {
            return logical;
        }
        self.progress.iter().find(|note| note.logical >= logical).or(self.progress.back()).map_or(0, |note| note.blob)
    }

    /// Ends the current span where `next` begins.
    fn close(&mut self, next: Start, drafts: &mut Vec<SpanDraft>) {
        let (end, blob_end) = (next.logical, next.blob_end_before);
        if let Some(done) = self.current.replace(next) {
            drafts.push(draft(done, end, blob_end));
        }
    }

    /// The layer has ended. Appends the last spans.
    pub(super) fn finish(mut self, drafts: &mut Vec<SpanDraft>) {
        self.restarts_known_to = u64::MAX;
        self.advance(drafts);
        let blob_end = self.blob_end(self.end);
        if let Some(last) = self.current.take() {
            drafts.push(draft(last, self.end, blob_end));
        }
    }
}

fn draft(span: Start, end: u64, blob_end: u64) -> SpanDraft {
    SpanDraft { first_chunk: span.chunk, len_bytes: end - span.logical, restart: span.restart, blob_end }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LIMITS: SpanLimits = SpanLimits { min_len_bytes: 64 * 1024, max_len_bytes: 128 * 1024, joined_len_bytes: 0 };

    fn restart(logical: u64) -> RestartPoint {
        let (window, head) = (Box::default(), Vec::new());
        RestartPoint { logical, blob: logical / 2, resume: Boundary::Start, window, head }
    }

    /// The spans of a layer with these chunks and restart points, as (first chunk, length, restart, blob end). Half as
    /// many compressed bytes as output; progress is noted every 10,000 bytes of output, `piece_len` is a multiple of them.
    fn plan(chunk_lens: &[u64], restarts: &[u64], piece_len: u64) -> Vec<(u32, u64, u64, u64)> {
        let end: u64 = chunk_lens.iter().sum();
        let (mut planner, mut drafts) = (Planner::new(LIMITS), Vec::new());
        let mut chunks = chunk_lens.iter().scan(0, |at, len| {
            *at += len;
            Some(*at - len..*at)
        });
        let mut next = chunks.next();
        let mut from = 0;
        while from < end {
            let to = (from + piece_len).min(end);
            let notes = (from + 10_000..to).step_by(10_000).chain([to]);
            let progress = notes.map(|logical| Progress { logical, blob: logical / 2 }).collect();
            let found = restarts.iter().filter(|at| (from..to).contains(*at)).map(|at| restart(*at)).collect();
            planner.piece(progress, found, to);
            while let Some(chunk) = next.take_if(|chunk| chunk.end <= to) {
                planner.chunk(chunk, &mut drafts);
                next = chunks.next();
            }
            from = to;
        }
        planner.finish(&mut drafts);
        drafts
            .iter()
            .map(|draft| (draft.first_chunk.0, draft.len_bytes, draft.restart.logical, draft.blob_end))
            .collect()
    }

    #[test]
    fn the_nearest_restart_wins_and_a_missing_one_makes_a_long_span() {
        let chunks = [32 * 1024; 12];
        // Chunk 3 starts at 98,304, chunk 4 at 131,072: the restart before chunk 3 is nearer.
        assert_eq!(
            plan(&chunks, &[0, 98_000, 110_000, 300_000], 1_000_000),
            [
                (0, 98_304, 0, 50_000),
                (3, 65_536, 98_000, 85_000),
                (5, 163_840, 110_000, 165_000),
                (10, 65_536, 300_000, 196_608)
            ]
        );
        assert_eq!(plan(&chunks, &[0], 1_000_000), [(0, 12 * 32_768, 0, 196_608)]);
        assert_eq!(plan(&[], &[0], 1_000_000), []);
    }

    proptest! {
        #[test]
        fn spans_cover_all_chunks_whatever_the_pieces(
            chunk_lens in proptest::collection::vec((1_u64..150).prop_map(|n| n * 512), 1..200),
            gaps in proptest::collection::vec(1000_u64..300_000, 0..100),
        ) {
            let end: u64 = chunk_lens.iter().sum();
            let mut restarts = vec![0];
            restarts.extend(gaps.iter().scan(0, |at, gap| { *at += gap; Some(*at) }).filter(|at| *at < end));
            let spans = plan(&chunk_lens, &restarts, 1_000_000_000);
            prop_assert_eq!(&plan(&chunk_lens, &restarts, 260_000), &spans);
            prop_assert_eq!(&plan(&chunk_lens, &restarts, 40_000), &spans);
            let mut at = 0;
            for (no, (first, len, restart, blob_end)) in spans.iter().enumerate() {
                let start: u64 = chunk_lens[..*first as usize].iter().sum();
                prop_assert_eq!(start, at);
                at += len;
                prop_assert!(*restart <= start && (no == 0 || *len >= LIMITS.min_len_bytes || no + 1 == spans.len()));
                prop_assert!(*blob_end >= at / 2 && *blob_end <= at / 2 + 5000);
                if *len > LIMITS.max_len_bytes {
                    // Only for want of a restart point: none from the minimum on to the last chunk but one.
                    let last: u64 = chunk_lens[..spans.get(no + 1).map_or(chunk_lens.len(), |next| next.0 as usize) - 1].iter().sum();
                    prop_assert!(!restarts.iter().any(|at| *at > *restart && *at <= last && last - start <= LIMITS.max_len_bytes && last - start >= LIMITS.min_len_bytes));
                }
            }
            prop_assert_eq!(at, end);
        }
    }
}
