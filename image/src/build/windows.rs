//! The step that packs windows: drafts of spans -> the seek table's spans.
//!
//! Packed windows are the one thing that grows with the layer and is not an entry or a chunk. Whenever they reach
//! another [`WINDOWS_STEP_BYTES`], spans become twice as long: drafts are joined to the span before them, which then
//! ends later. An ordinary layer gets there after some 8 GiB of content; one made so that no window can be packed well
//! has at most [`WINDOWS_STEP_BYTES`] for each doubling between 512 KiB and its whole length, 350 MiB at 1 TiB.

use super::plan::SpanDraft;
use super::{BuildError, SpanLimits};
use crate::ids::{BlobOffset, LogicalOffset};
use crate::index::seek::{NewSpan, SeekTableBuilder};
use crate::inflate::Boundary;
use crate::inflate::window::UseFinder;

/// Packed windows of this length double the length of the spans to come, in bytes.
const WINDOWS_STEP_BYTES: u64 = 16 << 20;

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
        let doublings = self.builder.windows_len_bytes() / WINDOWS_STEP_BYTES;
        let joined_len = self.last_len_bytes.saturating_add(draft.len_bytes);
        if doublings > 0 && joined_len <= self.limits.max_len_bytes.saturating_mul(1 << doublings.min(40)) {
            self.builder.extend_last(BlobOffset(draft.blob_end));
            self.last_len_bytes = joined_len;
            return Ok(());
        }
        let restart = &draft.restart;
        let kept = match restart.resume {
            Boundary::Start => Vec::new(),
            Boundary::Block { bits, value } => self
                .finder
                .kept(bits, value, &restart.window, &restart.head)
                .map_err(|source| BuildError::Inflate { blob_offset: restart.blob, source })?,
        };
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

    /// The layer has ended.
    pub(super) fn finish(self) -> SeekTableBuilder {
        self.builder
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::build::unpack::RestartPoint;
    use crate::ids::{ChunkNo, DiffId, LayerId};
    use crate::index::seek::SeekHeader;
    use crate::inflate::Compression;
    use crate::inflate::window::WINDOW_LEN_MAX_BYTES;

    #[test]
    fn windows_that_cannot_be_packed_make_spans_longer() {
        let limits = SpanLimits { min_len_bytes: 1 << 19, max_len_bytes: 1 << 19 };
        let mut writer = SpanWriter::new(limits).expect("memory");
        let mut state = 1_u64;
        let mut noise = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 56) as u8
        };
        let drafts = 3000;
        for no in 0..drafts {
            let at = u64::from(no) << 19;
            let draft = SpanDraft {
                first_chunk: ChunkNo(8 * no),
                len_bytes: 1 << 19,
                // No head, so that nothing tells the use of the window.
                restart: Arc::new(RestartPoint {
                    logical: at,
                    blob: at,
                    resume: Boundary::Block { bits: 0, value: 0 },
                    window: (0..WINDOW_LEN_MAX_BYTES).map(|_| noise()).collect(),
                    head: Vec::new(),
                }),
                blob_end: at + (1 << 19),
            };
            writer.push(&draft).expect("a valid span");
        }
        let len = u64::from(drafts) << 19;
        let header = SeekHeader {
            compression: Compression::Gzip,
            layer: LayerId([0; 32]),
            diff_id: DiffId([0; 32]),
            blob_len_bytes: len,
            logical_len_bytes: len,
            chunk_count: 8 * drafts,
        };
        let (table, windows) = writer.finish().finish(header).expect("valid spans");
        // 512 spans of one draft fill the first step, 512 of two the second, and the rest is in spans of four.
        assert_eq!(table.count(), 512 + 512 + (drafts - 512 - 1024) / 4);
        assert!(windows.len() < 3 * WINDOWS_STEP_BYTES as usize);
        assert!(table.spans().all(|span| span.blob.end == u64::from(span.chunks.end) << 16));
    }
}
