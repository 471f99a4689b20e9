//! One pass over a layer blob: from the compressed stream to the layer index.
//!
//! ```text
//! compressed blocks -> [blob hash]                                   sha256 against the descriptor
//!                   -> [unpack] -> pieces of the tar stream, restart points, progress
//!                         pieces -> [tar hash]                        sha256 against the diffID
//!                                -> [layout]  tar walk, chunks, BLAKE3, table of contents, spans
//!                                      spans -> [windows]             which window bytes a span needs, packed
//! ```
//!
//! Each box is a plain state machine (`unpack`, `layout` with `plan`, `windows`); `pipeline` runs them one after the
//! other, or each on a thread of its own with short bounded queues between them. Nothing is written, nothing is asked
//! of a network: whoever reads the blob pushes it.
//!
//! The index depends on the blob alone, never on how it was pushed or on how many threads worked: the stream is cut
//! into blocks of a fixed length before anything looks at it. This is where trust starts: no index comes out unless the
//! blob has the digest and length of its descriptor and its content the diffID of the image's configuration.
//!
//! Memory: queues and buffers take about 10 MiB; a zstd frame's window up to 128 MiB; 36 bytes per chunk (twice while
//! the table is written); what the table of contents holds per file; and the packed windows, which are kept short by
//! longer spans when there are many (`windows`). Dropping a builder at any point ends its threads and leaves nothing.

mod layout;
mod pipeline;
mod plan;
mod unpack;
mod windows;

use bytes::{Bytes, BytesMut};
use thiserror::Error;

use self::pipeline::{Engine, Outcome};
use crate::ids::{ChunkNo, DiffId, LayerId};
use crate::index::chunks::{ChunkTable, ChunkTableError};
use crate::index::seek::{SeekHeader, SeekTable, SeekTableError};
use crate::index::toc::Toc;
use crate::inflate::{Compression, InflateError};
use crate::tar::TarError;
use crate::verify::Verified;

/// The blob is worked on in blocks of this length, in bytes: long enough that handing one on costs nothing beside
/// inflating it (150 us), short enough that queues stay small.
const BLOCK_LEN_BYTES: usize = 64 * 1024;
/// Default of [`Options::logical_len_max_bytes`]: 1 TiB, what the chunk table can describe at 64 KiB a chunk.
pub const LOGICAL_LEN_MAX_BYTES: u64 = 1 << 40;

/// What the image's manifest and configuration say of the layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Expect {
    /// The descriptor's digest.
    pub layer: LayerId,
    /// The configuration's diffID for it.
    pub diff_id: DiffId,
    /// The descriptor's size in bytes.
    pub compressed_len_bytes: u64,
}

/// How long spans are, in bytes of output. Where a restart point costs next to nothing (plain tars, zstd frames, content that
/// hardly compresses, which refers to little before it) they are short, so that little is read beside what is wanted; else
/// they are joined.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SpanLimits {
    /// A span is not ended before it has this length, at least 32 KiB.
    pub min_len_bytes: u64,
    /// Before it is joined, a span is ended before it exceeds this length, if there is a restart point for the next one. The more it
    /// is above `min_len_bytes`, the more restart points there are to choose from, and the shorter is the mean span.
    pub max_len_bytes: u64,
    /// Spans whose restart points are not cheap are joined up to this length. With 0 none are before windows have reached 16 MiB.
    pub joined_len_bytes: u64,
}

impl Default for SpanLimits {
    /// 96 to 192 KiB, joined up to 512 KiB: docs/decisions/0002-chunk-and-span-sizes.md.
    fn default() -> Self {
        Self { min_len_bytes: 96 * 1024, max_len_bytes: 192 * 1024, joined_len_bytes: 512 * 1024 }
    }
}

/// How to build.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// Cores to use: 1 does all work in [`LayerBuilder::push`], more run the five steps on a thread each.
    pub threads: usize,
    /// Longest tar stream to accept, in bytes: the bound on what a decompression bomb costs.
    pub logical_len_max_bytes: u64,
    /// Length of spans.
    pub spans: SpanLimits,
}

impl Default for Options {
    fn default() -> Self {
        let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        Self { threads, logical_len_max_bytes: LOGICAL_LEN_MAX_BYTES, spans: SpanLimits::default() }
    }
}

/// Why a sink takes no more chunks.
pub type SinkError = Box<dyn std::error::Error + Send + Sync>;

/// Takes every finished chunk, in order. Called on a builder's thread when there is more than one; a slow sink slows
/// the build down, and is how the reader of the blob learns to wait. One that fails ends the build
/// ([`BuildError::Sink`]).
pub type ChunkSink = Box<dyn FnMut(ChunkNo, Verified<Bytes>) -> Result<(), SinkError> + Send>;

/// A layer for which no index can be built.
#[derive(Debug, Error)]
pub enum BuildError {
    /// The blob has another length than its descriptor says.
    #[error("layer {layer} has {actual} bytes or more where its descriptor says {expected}")]
    BlobLength {
        /// The layer.
        layer: LayerId,
        /// Length by the descriptor.
        expected: u64,
        /// Length that came; for a blob that is too long, when that was noticed.
        actual: u64,
    },
    /// The blob has another digest than its descriptor says.
    #[error("the blob of layer {expected} has the digest {actual}; the registry or a proxy gave other bytes")]
    BlobDigest {
        /// By the descriptor.
        expected: LayerId,
        /// Of what came.
        actual: LayerId,
    },
    /// The uncompressed content has another digest than the configuration says.
    #[error("the content of layer {layer} has the digest {actual} where the image's configuration says {expected}")]
    DiffId {
        /// The layer.
        layer: LayerId,
        /// By the configuration.
        expected: DiffId,
        /// Of what came.
        actual: DiffId,
    },
    /// The blob cannot be decompressed.
    #[error("the blob cannot be decompressed at byte {blob_offset}")]
    Inflate {
        /// Where the decoder stood.
        blob_offset: u64,
        /// Why.
        #[source]
        source: InflateError,
    },
    /// The content is longer than the limit.
    #[error("the layer's content is longer than the limit of {limit_bytes} bytes")]
    TooLong {
        /// [`Options::logical_len_max_bytes`].
        limit_bytes: u64,
    },
    /// The content is no tar that containerd would unpack.
    #[error("the layer's content is refused")]
    Tar(#[from] TarError),
    /// The chunk table cannot be made.
    #[error("the chunk table cannot be made")]
    Chunks(#[from] ChunkTableError),
    /// The seek table cannot be made.
    #[error("the seek table cannot be made")]
    Seek(#[from] SeekTableError),
    /// A thread could not be started.
    #[error("cannot start the thread '{name}'")]
    Thread {
        /// Its name.
        name: &'static str,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The chunk sink takes no more.
    #[error("the layer's chunks cannot be kept: {0}")]
    Sink(#[source] SinkError),
    /// A thread, or the chunk sink that it called, panicked.
    #[error("the step '{name}' of the index build panicked")]
    Panicked {
        /// Its name.
        name: &'static str,
    },
    /// A push after an error, or after one had failed.
    #[error("the index build has failed before")]
    Failed,
}

/// What a build saw.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stats {
    /// How the blob is compressed.
    pub compression: Compression,
    /// Length of the blob in bytes.
    pub compressed_len_bytes: u64,
    /// Length of the tar stream in bytes.
    pub logical_len_bytes: u64,
    /// Tar entries, those that later ones replace among them.
    pub entries: u64,
    /// Restart points to choose from.
    pub restart_points: u64,
}

/// The index of one layer.
#[derive(Debug)]
pub struct LayerIndex {
    /// Table of contents.
    pub toc: Toc,
    /// Chunk table.
    pub chunks: ChunkTable,
    /// Seek table: the directory.
    pub seek: SeekTable,
    /// The windows that it names.
    pub windows: Bytes,
    /// What the build saw.
    pub stats: Stats,
}

/// Builds the index of one layer from its compressed bytes.
pub struct LayerBuilder {
    expect: Expect,
    /// `None` after an error.
    engine: Option<Engine>,
    /// The block in the making.
    block: BytesMut,
    received_len_bytes: u64,
}

impl LayerBuilder {
    /// A builder for the layer that `expect` describes.
    ///
    /// # Errors
    /// When memory is short or threads cannot be started.
    pub fn new(expect: Expect, options: Options) -> Result<Self, BuildError> {
        Self::start(expect, options, None)
    }

    /// The same, with a sink for the chunks, so that a node that builds can store what it reads.
    ///
    /// Chunks are right by their names, but until [`Self::finish`] returns it is not known whether the layer is the
    /// one that was expected: what the sink stored must not be used for it before, and be dropped if it is not.
    ///
    /// # Errors
    /// As for [`Self::new`].
    pub fn with_sink(expect: Expect, options: Options, sink: ChunkSink) -> Result<Self, BuildError> {
        Self::start(expect, options, Some(sink))
    }

    fn start(expect: Expect, options: Options, sink: Option<ChunkSink>) -> Result<Self, BuildError> {
        let engine = Some(Engine::new(options, sink)?);
        Ok(Self { expect, engine, block: BytesMut::with_capacity(BLOCK_LEN_BYTES), received_len_bytes: 0 })
    }

    /// Takes the next bytes of the blob, any number. Blocks while the threads are behind.
    ///
    /// # Errors
    /// When the layer is found to be wrong. Later calls give [`BuildError::Failed`].
    pub fn push(&mut self, mut compressed: &[u8]) -> Result<(), BuildError> {
        self.received_len_bytes += compressed.len() as u64;
        if self.received_len_bytes > self.expect.compressed_len_bytes {
            self.engine = None;
            return Err(self.wrong_length());
        }
        while !compressed.is_empty() {
            let len = compressed.len().min(BLOCK_LEN_BYTES - self.block.len());
            self.block.extend_from_slice(&compressed[..len]);
            compressed = &compressed[len..];
            if self.block.len() == BLOCK_LEN_BYTES {
                self.push_block()?;
            }
        }
        Ok(())
    }

    fn push_block(&mut self) -> Result<(), BuildError> {
        let block = std::mem::replace(&mut self.block, BytesMut::with_capacity(BLOCK_LEN_BYTES)).freeze();
        let engine = self.engine.take().ok_or(BuildError::Failed)?;
        self.engine = Some(engine.push(block)?);
        Ok(())
    }

    fn wrong_length(&self) -> BuildError {
        let Expect { layer, compressed_len_bytes: expected, .. } = self.expect;
        BuildError::BlobLength { layer, expected, actual: self.received_len_bytes }
    }

    /// The blob has ended: checks what was expected, and gives the index.
    ///
    /// # Errors
    /// When the layer is not the expected one, or no index can be built for it.
    pub fn finish(mut self) -> Result<LayerIndex, BuildError> {
        if self.received_len_bytes != self.expect.compressed_len_bytes {
            return Err(self.wrong_length());
        }
        if !self.block.is_empty() {
            self.push_block()?;
        }
        let outcome = self.engine.take().ok_or(BuildError::Failed)?.finish()?;
        self.assemble(outcome)
    }

    fn assemble(&self, outcome: Outcome) -> Result<LayerIndex, BuildError> {
        let Outcome { layer, unpacked, diff_id, layout, spans } = outcome;
        let expect = self.expect;
        if layer != expect.layer {
            return Err(BuildError::BlobDigest { expected: expect.layer, actual: layer });
        }
        if diff_id != expect.diff_id {
            return Err(BuildError::DiffId { layer, expected: expect.diff_id, actual: diff_id });
        }
        let chunks = layout.chunks.finish(diff_id);
        let (seek, windows) = spans.finish(SeekHeader {
            compression: unpacked.compression,
            layer,
            diff_id,
            blob_len_bytes: expect.compressed_len_bytes,
            logical_len_bytes: chunks.logical_len_bytes(),
            chunk_count: chunks.count(),
        })?;
        let stats = Stats {
            compression: unpacked.compression,
            compressed_len_bytes: expect.compressed_len_bytes,
            logical_len_bytes: chunks.logical_len_bytes(),
            entries: layout.entries,
            restart_points: unpacked.restart_points,
        };
        let toc = layout.tree.finish(diff_id, chunks.logical_len_bytes())?;
        Ok(LayerIndex { toc, chunks, seek, windows, stats })
    }
}

#[cfg(test)]
mod tests;
