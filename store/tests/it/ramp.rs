//! Layers of ramp data: each eight bytes say which content they are of and where in it they stand, so that every
//! misplaced or missing byte shows. No part of it is zeros.

use bytes::Bytes;
use hermes_image::ids::{ChunkId, ChunkNo, DiffId};
use hermes_image::index::chunks::{ChunkTable, ChunkTableBuilder};
use hermes_image::runs::Runs;
use hermes_image::verify::Verified;

/// A layer whose every byte is known.
#[derive(Debug, Clone)]
pub(crate) struct Ramp {
    pub(crate) table: ChunkTable,
    /// Content and length of each chunk.
    chunks: Vec<(u32, u64)>,
}

/// The word at `at` (counted in words) of a content. Never all zeros.
fn word(number: u32, at: u64) -> [u8; 8] {
    (((u64::from(number) << 32) | at) ^ 0x5555_5555_5555_5555).to_le_bytes()
}

fn content(number: u32, len_bytes: u64) -> Bytes {
    let mut bytes: Vec<u8> = (0..len_bytes.div_ceil(8)).flat_map(|at| word(number, at)).collect();
    bytes.truncate(len_bytes as usize);
    Bytes::from(bytes)
}

impl Ramp {
    /// The layer number `name` with chunks of the given contents and lengths.
    pub(crate) fn new(name: u32, chunks: &[(u32, u64)]) -> Self {
        let mut builder = ChunkTableBuilder::default();
        for (number, len_bytes) in chunks {
            builder.push(ChunkId::of(&content(*number, *len_bytes)), *len_bytes).expect("a chunk");
        }
        let mut diff_id = [0; 32];
        diff_id[..4].copy_from_slice(&name.to_be_bytes());
        Self { table: builder.finish(DiffId(diff_id)), chunks: chunks.to_vec() }
    }

    /// The layer number `name` with chunks of the given lengths that no other layer has.
    pub(crate) fn unique(name: u32, lens: &[u64]) -> Self {
        let chunks: Vec<(u32, u64)> = (0..).zip(lens).map(|(no, len)| (name * 65_536 + no + 1, *len)).collect();
        Self::new(name, &chunks)
    }

    /// The bytes of a chunk.
    pub(crate) fn bytes(&self, chunk: u32) -> Bytes {
        let (number, len_bytes) = self.chunks[chunk as usize];
        content(number, len_bytes)
    }

    /// The bytes of a chunk, verified.
    pub(crate) fn verified(&self, chunk: u32) -> Verified<Bytes> {
        self.table.verify(ChunkNo(chunk), self.bytes(chunk)).expect("the chunk's own bytes")
    }

    /// Reads every chunk of `present` and checks its bytes. `read` answers whether it could.
    ///
    /// # Panics
    /// When a byte is wrong.
    pub(crate) fn check(&self, present: &Runs, mut read: impl FnMut(u64, &mut [u8]) -> bool) {
        for chunk in present.chunks() {
            let range = self.table.range(ChunkNo(chunk));
            let mut bytes = vec![0; (range.end - range.start) as usize];
            if read(range.start, &mut bytes) {
                assert!(bytes == self.bytes(chunk), "chunk {chunk} of {} has wrong bytes", self.table.diff_id());
            }
        }
    }
}
