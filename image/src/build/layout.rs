//! The step that looks at the tar stream: entries, chunks and their names, spans.

use bytes::Bytes;

use super::plan::{Planner, SpanDraft};
use super::unpack::Piece;
use super::{BuildError, ChunkSink, SpanLimits};
use crate::chunk::{Chunker, EntryShape};
use crate::ids::{ChunkId, ChunkNo};
use crate::index::chunks::ChunkTableBuilder;
use crate::inflate::Compression;
use crate::tar::{Entry, EntryKind, LayerTree, TarWalker};
use crate::verify::Verified;

/// What the step knows in the end.
pub(super) struct LaidOut {
    pub(super) tree: LayerTree,
    pub(super) chunks: ChunkTableBuilder,
    pub(super) entries: u64,
}

/// The step.
pub(super) struct Layout {
    walker: TarWalker,
    tree: LayerTree,
    chunker: Chunker,
    table: ChunkTableBuilder,
    planner: Planner,
    sink: Option<ChunkSink>,
    entries: Vec<Entry>,
    entry_count: u64,
    chunks: Vec<Bytes>,
    /// End of the last chunk.
    chunked_to: u64,
}

impl Layout {
    pub(super) fn new(spans: SpanLimits, sink: Option<ChunkSink>) -> Self {
        Self {
            walker: TarWalker::new(),
            tree: LayerTree::new(),
            chunker: Chunker::default(),
            table: ChunkTableBuilder::default(),
            planner: Planner::new(spans),
            sink,
            entries: Vec::new(),
            entry_count: 0,
            chunks: Vec::new(),
            chunked_to: 0,
        }
    }

    /// Takes the next piece of the tar stream; appends the spans that are certain now.
    pub(super) fn push(&mut self, piece: Piece, drafts: &mut Vec<SpanDraft>) -> Result<(), BuildError> {
        if piece.compression == Compression::Plain {
            self.planner.restart_anywhere();
        }
        self.planner.piece(piece.progress, piece.restarts, piece.restarts_known_to);
        self.walker.push(&piece.bytes, &mut self.entries)?;
        self.take_entries()?;
        self.chunker.push(piece.bytes, &mut self.chunks);
        self.take_chunks(drafts)
    }

    fn take_entries(&mut self) -> Result<(), BuildError> {
        for entry in self.entries.drain(..) {
            self.entry_count += 1;
            self.chunker.entry(EntryShape {
                data_start: entry.data_start,
                stored_len_bytes: entry.stored_len_bytes,
                regular: matches!(entry.kind, EntryKind::Regular { .. }),
                path: &entry.path,
            });
            self.tree.apply(entry)?;
        }
        Ok(())
    }

    /// The stream has ended; appends the last spans.
    pub(super) fn finish(mut self, drafts: &mut Vec<SpanDraft>) -> Result<LaidOut, BuildError> {
        self.walker.finish(&mut self.entries)?;
        self.take_entries()?;
        std::mem::take(&mut self.chunker).finish(&mut self.chunks);
        self.take_chunks(drafts)?;
        self.planner.finish(drafts);
        Ok(LaidOut { tree: self.tree, chunks: self.table, entries: self.entry_count })
    }

    fn take_chunks(&mut self, drafts: &mut Vec<SpanDraft>) -> Result<(), BuildError> {
        for chunk in self.chunks.drain(..) {
            let no = ChunkNo(self.table.count());
            let end = self.chunked_to + chunk.len() as u64;
            // A chunk and an artifact are named by the same hash, and this process has just made the bytes.
            let (name, chunk) = Verified::named(chunk);
            self.table.push(ChunkId(name.0), chunk.len() as u64)?;
            if let Some(sink) = &mut self.sink {
                sink(no, chunk).map_err(BuildError::Sink)?;
            }
            self.planner.chunk(self.chunked_to..end, drafts);
            self.chunked_to = end;
        }
        Ok(())
    }
}
