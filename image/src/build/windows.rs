//! The step that packs windows: drafts of spans -> the seek table's spans.
//!
//! A draft is joined to the span before it, which then ends later, unless its restart point is cheap.
//!
//! Packed windows are the one thing that grows with the layer and is not an entry or a chunk. Whenever they reach
//! another [`WINDOWS_STEP_BYTES`], spans become twice as long: drafts are joined, cheap or not. An ordinary layer gets
//! there after some 8 GiB of content; one made so that no window can be packed well has at most [`WINDOWS_STEP_BYTES`]
//! for each doubling between 512 KiB and its whole length, 350 MiB at 1 TiB.

use super::plan::SpanDraft;
use super::unpack::RestartPoint;
use super::{BuildError, SpanLimits};
use crate::ids::{BlobOffset, LogicalOffset};
use crate::index::seek::{NewSpan, SPAN_ENTRY_LEN_BYTES, SeekTableBuilder};
use crate::inflate::Boundary;
use crate::inflate::window::UseFinder;

/// Packed windows of this length double the length of the spans to come, in bytes.
const WINDOWS_STEP_BYTES: u64 = 16 << 20;

/// A restart point is cheap when what the index keeps for it is at most one in so many of its span's compressed bytes: 0.5 %,
/// half of what a seek table may have (design, section 4), so that layers where only some are cheap stay within that.
const CHEAP_ONE_IN: u64 = 200;
/// Drafts with at least so many compressed bytes for so many of output are looked at. Of content that compresses by more, the mean
/// window was several times too long (docs/decisions/0002-chunk-and-span-sizes.md), and looking costs two decodes of 32 KiB.
const LOOKED_AT_FROM: (u64, u64) = (2, 3);

impl SpanDraft {
    fn blob_len_bytes(&self) -> u64 {
        self.blob_end.saturating_sub(self.restart.blob)
    }

    /// Whether it is worth finding out what of the window is needed: what compresses well refers to too much of it.
    fn may_be_cheap(&self) -> bool {
        let (blob_len, len) = LOOKED_AT_FROM;
        self.restart.resume == Boundary::Start || len * self.blob_len_bytes() >= blob_len * self.len_bytes
    }

    /// Whether its restart point is cheap when so many bytes of the window are kept.
    fn is_cheap(&self, kept_len: usize) -> bool {
        CHEAP_ONE_IN * (SPAN_ENTRY_LEN_BYTES + kept_len) as u64 <= self.blob_len_bytes()
    }
}

/// The step.
pub(super) struct SpanWriter {
    finder: UseFinder,
    builder: SeekTableBuilder,
    limits: SpanLimits,
    /// Length of the last span's chunks in bytes.
    last_len_bytes: u64,
}

impl SpanWriter {
    pub(super) fn new(limits: SpanLimits) -> Result<Self, BuildError> {
        let finder = UseFinder::new().map_err(|source| BuildError::Inflate { blob_offset: 0, source })?;
        Ok(Self { finder, builder: SeekTableBuilder::default(), limits, last_len_bytes: 0 })
    }

    /// Takes the next span.
    pub(super) fn push(&mut self, draft: &SpanDraft) -> Result<(), BuildError> {
        let doublings = (self.builder.windows_len_bytes() / WINDOWS_STEP_BYTES).min(40);
        let joined_len = self.last_len_bytes.saturating_add(draft.len_bytes);
        let SpanLimits { max_len_bytes, joined_len_bytes, .. } = self.limits;
        let longest = match doublings {
            0 => joined_len_bytes,
            _ => joined_len_bytes.max(max_len_bytes).saturating_mul(1 << doublings),
        };
        let may_join = self.builder.count() > 0 && joined_len <= longest;
        // Finding out what is kept is most of the work.
        let may_stand = !may_join || doublings == 0 && draft.may_be_cheap();
        let kept = if may_stand { Some(self.kept(&draft.restart)?) } else { None };
        let Some(kept) = kept.filter(|kept| !may_join || draft.is_cheap(kept.len())) else {
            self.builder.extend_last(BlobOffset(draft.blob_end));
            self.last_len_bytes = joined_len;
            return Ok(());
        };
        let restart = &draft.restart;
        self.builder.push(&NewSpan {
            first_chunk: draft.first_chunk,
            logical_start: LogicalOffset(restart.logical),
            blob_start: BlobOffset(restart.blob),
            blob_end: BlobOffset(draft.blob_end),
            resume: restart.resume,
            window_len_bytes: restart.window.len(),
            kept: &kept,
        })?;
        self.last_len_bytes = draft.len_bytes;
        Ok(())
    }

    /// The bytes of its window that a restart point needs.
    fn kept(&mut self, restart: &RestartPoint) -> Result<Vec<u8>, BuildError> {
        match restart.resume {
            Boundary::Start => Ok(Vec::new()),
            Boundary::Block { bits, value } => self
                .finder
                .kept(bits, value, &restart.window, &restart.head)
                .map_err(|source| BuildError::Inflate { blob_offset: restart.blob, source }),
        }
    }

    /// The layer has ended.
    pub(super) fn finish(self) -> SeekTableBuilder {
        self.builder
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::ids::{ChunkNo, DiffId, LayerId};
    use crate::index::seek::{SeekHeader, SeekTable};
    use crate::inflate::Compression;
    use crate::inflate::window::WINDOW_LEN_MAX_BYTES;

    const KIB: u64 = 1024;

    /// Of a draft of 128 KiB of output: its compressed bytes, where a decoder begins, and what tells the use of the window.
    type Kind<'a> = (u64, Boundary, &'a [u8]);

    /// The table and the windows of a layer of these lengths.
    fn finish(
        writer: SpanWriter,
        blob_len_bytes: u64,
        logical_len_bytes: u64,
        chunk_count: u32,
    ) -> (SeekTable, bytes::Bytes) {
        let (layer, diff_id, compression) = (LayerId([0; 32]), DiffId([0; 32]), Compression::Gzip);
        let header = SeekHeader { compression, layer, diff_id, blob_len_bytes, logical_len_bytes, chunk_count };
        writer.finish().finish(header).expect("valid spans")
    }

    /// The spans that come of drafts, by their number of drafts.
    fn spans_of(drafts: &[Kind<'_>]) -> Vec<u32> {
        let mut writer = SpanWriter::new(SpanLimits::default()).expect("memory");
        let (mut logical, mut blob, mut first_chunk) = (0, 0, 0);
        for (blob_len_bytes, resume, head) in drafts {
            let window = if *resume == Boundary::Start { Box::default() } else { vec![7; WINDOW_LEN_MAX_BYTES].into() };
            let restart = Arc::new(RestartPoint { logical, blob, resume: *resume, window, head: head.to_vec() });
            blob += blob_len_bytes;
            let draft = SpanDraft { first_chunk: ChunkNo(first_chunk), len_bytes: 128 * KIB, restart, blob_end: blob };
            writer.push(&draft).expect("a valid span");
            logical += 128 * KIB;
            first_chunk += 2;
        }
        let (table, _) = finish(writer, blob, logical, first_chunk);
        table.spans().map(|span| (span.chunks.end - span.chunks.start) / 2).collect()
    }

    #[test]
    fn spans_are_joined_unless_their_restart_points_are_cheap() {
        // A stored block (RFC 1951, 3.2.4) of 33,000 bytes refers to nothing before it.
        let stored = [&[0][..], &33_000_u16.to_le_bytes(), &(!33_000_u16).to_le_bytes(), &[1; 33_000]].concat();
        let block = Boundary::Block { bits: 0, value: 0 };
        // Without a head nothing tells what of the window is needed, so all of it is kept.
        let (cheap, dear) = ((120 * KIB, block, &stored[..]), (120 * KIB, block, &[][..]));
        assert_eq!(spans_of(&[cheap; 9]), [1; 9]);
        assert_eq!(spans_of(&[dear; 9]), [4, 4, 1]);
        assert_eq!(spans_of(&[cheap, dear, dear, cheap, dear, cheap]), [3, 2, 1]);
        assert_eq!(spans_of(&[(20 * KIB, block, &stored[..]); 9]), [4, 4, 1], "compresses well: not looked at");
        assert_eq!(spans_of(&[(20 * KIB, Boundary::Start, &[][..]); 9]), [1; 9], "an entry of 40 bytes alone");
        assert_eq!(spans_of(&[(7 * KIB, Boundary::Start, &[][..]); 9]), [4, 4, 1], "more than half a percent");
    }

    #[test]
    fn windows_that_cannot_be_packed_make_spans_longer() {
        let mut writer = SpanWriter::new(SpanLimits::default()).expect("memory");
        let mut state = 1_u64;
        let mut noise = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 56) as u8
        };
        let drafts = 3000;
        for no in 0..drafts {
            let at = u64::from(no) << 19;
            // No head, so that nothing tells the use of the window; the last ones have none, and would be cheap.
            let (resume, window_len) = if no < drafts - 100 {
                (Boundary::Block { bits: 0, value: 0 }, WINDOW_LEN_MAX_BYTES)
            } else {
                (Boundary::Start, 0)
            };
            let window = (0..window_len).map(|_| noise()).collect();
            let draft = SpanDraft {
                first_chunk: ChunkNo(8 * no),
                len_bytes: 1 << 19,
                restart: Arc::new(RestartPoint { logical: at, blob: at, resume, window, head: Vec::new() }),
                blob_end: at + (1 << 19),
            };
            writer.push(&draft).expect("a valid span");
        }
        let len = u64::from(drafts) << 19;
        let (table, windows) = finish(writer, len, len, 8 * drafts);
        // 512 spans of one draft fill the first step, 512 of two the second, and the rest is in spans of four.
        assert_eq!(table.count(), 512 + 512 + (drafts - 512 - 1024) / 4);
        assert!(windows.len() < 3 * WINDOWS_STEP_BYTES as usize);
        assert!(table.spans().all(|span| span.blob.end == u64::from(span.chunks.end) << 16));
    }
}
