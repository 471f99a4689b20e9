//! A layer that is made of a few chunks in memory, again and again, so that no disk is measured.

use std::sync::Arc;

use bytes::Bytes;
use hermes_image::ids::{ArtifactId, ChunkId, ChunkNo, DiffId, Digest};
use hermes_image::index::chunks::{ChunkTable, ChunkTableBuilder};
use hermes_image::runs::Runs;
use hermes_p2p::Content;

/// Bytes that are different: more than a core's own caches hold, so that chunks come from memory as they would.
const DIFFERENT_LEN_BYTES: usize = 8 << 20;

/// A layer whose bytes do not compress.
pub(super) struct Memory {
    chunks: Vec<Bytes>,
    table: ChunkTable,
}

impl Memory {
    /// `len_bytes` in chunks of `chunk_len_bytes`.
    pub(super) fn new(len_bytes: usize, chunk_len_bytes: usize) -> anyhow::Result<Arc<Self>> {
        let mut state = 1_u64;
        let different = DIFFERENT_LEN_BYTES / chunk_len_bytes;
        let chunks: Vec<Bytes> = (0..different)
            .map(|_| {
                let words = (0..chunk_len_bytes / 8).flat_map(|_| {
                    // splitmix64
                    state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
                    let mut word = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
                    word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
                    (word ^ (word >> 31)).to_le_bytes()
                });
                words.collect()
            })
            .collect();
        let ids: Vec<ChunkId> = chunks.iter().map(|chunk| ChunkId::of(chunk)).collect();
        let mut table = ChunkTableBuilder::default();
        for chunk in 0..len_bytes / chunk_len_bytes {
            table.push(ids[chunk % different], chunk_len_bytes as u64)?;
        }
        Ok(Arc::new(Self { chunks, table: table.finish(DiffId([1; 32])) }))
    }

    /// The layer's chunk table.
    pub(super) fn table(&self) -> &ChunkTable {
        &self.table
    }

    /// The bytes that differ, one after the other.
    pub(super) fn bytes(&self) -> Vec<u8> {
        self.chunks.concat()
    }
}

impl Content for Memory {
    fn have(&self, _: DiffId, _: ArtifactId) -> Option<Runs> {
        Some(Runs::one(0..self.table.count()))
    }

    fn chunk(&self, _: DiffId, _: ArtifactId, chunk: ChunkNo) -> std::io::Result<Option<Bytes>> {
        Ok(Some(self.chunks[chunk.0 as usize % self.chunks.len()].clone()))
    }

    fn artifact(&self, _: ArtifactId) -> std::io::Result<Option<Bytes>> {
        Ok(None)
    }

    fn statement(&self, _: Digest) -> Option<Bytes> {
        None
    }
}
