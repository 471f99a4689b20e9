//! One GET on its way out: chunks are read and compressed in batches on a blocking thread, one batch ahead of the
//! stream.
//!
//! So a transfer holds at most two batches, a slow reader slows its own disk reads, and no thread changes per chunk.

use std::collections::VecDeque;
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

/// What is left of one GET.
pub(crate) struct Upload {
    content: Arc<dyn Content>,
    codecs: Arc<Codecs>,
    layer: DiffId,
    table: ArtifactId,
    accept: Accept,
    /// Until the first batch: everything that was asked for.
    asked: Option<Runs>,
    left: VecDeque<u32>,
    effort: Effort,
}

/// Whole frames, and whether END is among them.
#[derive(Debug)]
pub(crate) struct Batch {
    pub(crate) frames: Vec<u8>,
    pub(crate) last: bool,
}

impl Upload {
    /// The answer to a GET for `chunks`.
    pub(crate) fn new(
        content: Arc<dyn Content>,
        codecs: Arc<Codecs>,
        (layer, table): (DiffId, ArtifactId),
        accept: Accept,
        chunks: Runs,
    ) -> Self {
        let (left, effort) = (VecDeque::new(), Effort::default());
        Self { content, codecs, layer, table, accept, asked: Some(chunks), left, effort }
    }

    /// The next frames. Blocks on disk.
    pub(crate) fn next_batch(mut self) -> (Self, Batch) {
        let mut frames = Vec::new();
        let mut lacks = Runs::new();
        if let Some(asked) = self.asked.take() {
            // Chunks that are missing are said first, so that the asker can turn to another holder at once.
            let have = self.content.have(self.layer, self.table).unwrap_or_default();
            let missing = asked.difference(&have);
            if !missing.is_empty() {
                Answer::Lacks { chunks: missing }.encode(&mut frames);
            }
            // At most `GET_CHUNKS_MAX`.
            self.left = asked.intersection(&have).chunks().collect();
        }
        while frames.len() < BATCH_LEN_BYTES
            && let Some(chunk) = self.left.pop_front()
        {
            match self.read(ChunkNo(chunk)) {
                Some(plain) => {
                    say_lacks(&mut lacks, &mut frames);
                    self.encode(ChunkNo(chunk), &plain, &mut frames);
                }
                None => lacks.insert(chunk..chunk + 1),
            }
        }
        say_lacks(&mut lacks, &mut frames);
        let last = self.left.is_empty();
        if last {
            Answer::End.encode(&mut frames);
        }
        (self, Batch { frames, last })
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

fn say_lacks(lacks: &mut Runs, frames: &mut Vec<u8>) {
    if !lacks.is_empty() {
        Answer::Lacks { chunks: std::mem::take(lacks) }.encode(frames);
    }
}
