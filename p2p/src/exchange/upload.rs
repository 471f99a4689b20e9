//! Chunks on their way out: read and compressed in batches on a blocking thread, one batch ahead of the stream.
//!
//! So a transfer holds at most two batches, a slow reader slows its own disk reads, and no thread changes per chunk.

use std::sync::Arc;

use bytes::Bytes;
use hermes_image::ids::{ArtifactId, ChunkNo, DiffId};
use hermes_image::index::chunks::CHUNK_LEN_MAX_BYTES;
use hermes_image::runs::Runs;

use super::Content;
use super::codec::{Accept, Answer, Encoding, data_frame};
use super::compress::{Codecs, Effort};

/// A batch is full at this many bytes. Large enough to hide a change of threads (10 us), small enough that the first
/// bytes leave early and that a byte rate is kept evenly.
pub(crate) const BATCH_LEN_BYTES: usize = 256 * 1024;

/// Reads chunks of one layer for one asker.
pub(crate) struct Upload {
    content: Arc<dyn Content>,
    codecs: Arc<Codecs>,
    layer: DiffId,
    table: ArtifactId,
    accept: Accept,
    /// What was here at the last look and is not in a batch yet.
    left: Runs,
    effort: Effort,
}

/// Whole frames.
#[derive(Debug, Default)]
pub(crate) struct Batch {
    pub(crate) frames: Vec<u8>,
    /// The chunks that the frames answer for: sent, or lacking because they could not be read after all.
    pub(crate) answered: Runs,
    /// What was here at the last look and comes in later batches.
    pub(crate) rest: Runs,
}

impl Upload {
    /// Nothing yet.
    pub(crate) fn new(
        content: Arc<dyn Content>,
        codecs: Arc<Codecs>,
        (layer, table): (DiffId, ArtifactId),
        accept: Accept,
    ) -> Self {
        Self { content, codecs, layer, table, accept, left: Runs::new(), effort: Effort::default() }
    }

    /// Looks which of `wanted` are here. Gives back the others, and the first of those that are. Blocks on disk.
    pub(crate) fn look(mut self, wanted: &Runs) -> (Self, Runs, Batch) {
        let have = self.content.have(self.layer, self.table).unwrap_or_default();
        self.left = wanted.intersection(&have);
        let (upload, batch) = self.next_batch();
        (upload, wanted.difference(&have), batch)
    }

    /// The next of what was here at the last look. Blocks on disk.
    pub(crate) fn next_batch(mut self) -> (Self, Batch) {
        let (mut frames, mut answered, mut lacks) = (Vec::new(), Runs::new(), Runs::new());
        let left = std::mem::take(&mut self.left);
        for chunk in left.chunks() {
            if frames.len() >= BATCH_LEN_BYTES {
                break;
            }
            match self.read(ChunkNo(chunk)) {
                Some(plain) => self.encode(ChunkNo(chunk), &plain, &mut frames),
                None => lacks.insert(chunk..chunk + 1),
            }
            answered.insert(chunk..chunk + 1);
        }
        if !lacks.is_empty() {
            Answer::Lacks { chunks: lacks }.encode(&mut frames);
        }
        self.left = left.difference(&answered);
        let rest = self.left.clone();
        (self, Batch { frames, answered, rest })
    }

    fn read(&self, chunk: ChunkNo) -> Option<Bytes> {
        match self.content.chunk(self.layer, self.table, chunk) {
            Ok(plain) => {
                let plain = plain?;
                let valid = !plain.is_empty() && plain.len() as u64 <= CHUNK_LEN_MAX_BYTES;
                if !valid {
                    tracing::error!(layer = %self.layer, %chunk, len_bytes = plain.len(), "stored chunk has no valid length");
                }
                valid.then_some(plain)
            }
            Err(error) => {
                tracing::error!(layer = %self.layer, %chunk, %error, "cannot read a chunk that should be here");
                None
            }
        }
    }

    fn encode(&mut self, chunk: ChunkNo, plain: &[u8], frames: &mut Vec<u8>) {
        if self.accept == Accept::Zstd && self.effort.tries() {
            let body = self.codecs.compress(plain);
            self.effort.tried(body.is_some());
            if let Some(body) = body {
                return data_frame(frames, chunk, Encoding::Zstd, &body);
            }
        }
        data_frame(frames, chunk, Encoding::Plain, plain);
    }
}
