//! The chunk table: where each chunk of a layer begins, and its BLAKE3 name.
//!
//! Version 1, little endian, 36 bytes a chunk:
//!
//! | offset | size | field |
//! |---|---|---|
//! | 0 | 8 | magic `HERMCHK\0` |
//! | 8 | 2 | version, 1 |
//! | 10 | 2 | zero |
//! | 12 | 4 | number of chunks *n* |
//! | 16 | 8 | length of the logical space in bytes |
//! | 24 | 32 | diffID of the layer |
//! | 56 | 8 | zero |
//! | 64 | 4 *n* | start of each chunk, in units of 512 bytes |
//! | 64 + 4 *n* | 32 *n* | BLAKE3 of each chunk |
//!
//! A chunk ends where the next one starts, the last one at the end of the space. The table is read in place: opening
//! one checks it once, and no chunk is ever copied out.

use bytes::Bytes;
use thiserror::Error;

use crate::ids::{ArtifactId, ChunkId, ChunkNo, ChunkRange, DiffId, LogicalOffset};
use crate::verify::{Mismatch, Verified};

/// Longest chunk, in bytes (design, section 2).
pub const CHUNK_LEN_MAX_BYTES: u64 = 128 * 1024;
/// Every chunk starts at a multiple of this: a tar block and an EROFS block.
pub const CHUNK_ALIGN_BYTES: u64 = 512;
/// Most chunks in one layer: 2^24, a layer of 1 TiB at the usual 64 KiB.
pub const CHUNK_COUNT_MAX: u32 = 1 << 24;

const MAGIC: &[u8; 8] = b"HERMCHK\0";
const VERSION: u16 = 1;
const HEADER_LEN: usize = 64;

/// Bytes that are no chunk table.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ChunkTableError {
    /// The magic number is missing.
    #[error("not a chunk table")]
    Magic,
    /// A version that this build does not know.
    #[error("chunk table version {0} is not known; version {VERSION} is")]
    Version(u16),
    /// The length does not match the number of chunks.
    #[error("chunk table has {actual} bytes where its header asks for {expected}")]
    Length {
        /// By the header.
        expected: u64,
        /// That came.
        actual: u64,
    },
    /// More chunks than [`CHUNK_COUNT_MAX`].
    #[error("chunk table names {0} chunks, more than {CHUNK_COUNT_MAX}")]
    TooMany(u32),
    /// A chunk that is empty, too long, or out of order.
    #[error("chunk {0} is empty, longer than {CHUNK_LEN_MAX_BYTES} bytes, or out of order")]
    Chunk(u32),
    /// Reserved bytes are not zero.
    #[error("chunk table has reserved bytes that are not zero")]
    Reserved,
}

/// A checked chunk table.
#[derive(Debug, Clone)]
pub struct ChunkTable {
    bytes: Bytes,
    id: ArtifactId,
    count: u32,
    logical_len_bytes: u64,
    diff_id: DiffId,
}

impl ChunkTable {
    /// Opens an encoded table.
    ///
    /// # Errors
    /// When the bytes are no well-formed table of this version.
    pub fn decode(bytes: Bytes) -> Result<Self, ChunkTableError> {
        if bytes.len() < HEADER_LEN || &bytes[..8] != MAGIC {
            return Err(ChunkTableError::Magic);
        }
        let version = u16::from_le_bytes([bytes[8], bytes[9]]);
        if version != VERSION {
            return Err(ChunkTableError::Version(version));
        }
        if bytes[10..12] != [0; 2] || bytes[56..64] != [0; 8] {
            return Err(ChunkTableError::Reserved);
        }
        let count = u32_at(&bytes, 12);
        if count > CHUNK_COUNT_MAX {
            return Err(ChunkTableError::TooMany(count));
        }
        let expected = HEADER_LEN as u64 + 36 * u64::from(count);
        if bytes.len() as u64 != expected {
            return Err(ChunkTableError::Length { expected, actual: bytes.len() as u64 });
        }
        let mut diff_id = [0; 32];
        diff_id.copy_from_slice(&bytes[24..56]);
        let mut len = [0; 8];
        len.copy_from_slice(&bytes[16..24]);
        let table = Self {
            id: ArtifactId::of(&bytes),
            count,
            logical_len_bytes: u64::from_le_bytes(len),
            diff_id: DiffId(diff_id),
            bytes,
        };
        table.check()?;
        Ok(table)
    }

    fn check(&self) -> Result<(), ChunkTableError> {
        if self.count == 0 {
            return if self.logical_len_bytes == 0 { Ok(()) } else { Err(ChunkTableError::Chunk(0)) };
        }
        if self.start(0) != 0 {
            return Err(ChunkTableError::Chunk(0));
        }
        for chunk in 0..self.count {
            let (start, end) = (self.start(chunk), self.start(chunk + 1));
            if end <= start || end - start > CHUNK_LEN_MAX_BYTES {
                return Err(ChunkTableError::Chunk(chunk));
            }
        }
        Ok(())
    }

    /// Start of `chunk` in bytes; the end of the space for the number after the last chunk.
    fn start(&self, chunk: u32) -> u64 {
        if chunk >= self.count {
            return self.logical_len_bytes;
        }
        u64::from(u32_at(&self.bytes, HEADER_LEN + 4 * chunk as usize)) * CHUNK_ALIGN_BYTES
    }

    /// The canonical encoding.
    pub fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// The name of the encoding.
    pub fn id(&self) -> ArtifactId {
        self.id
    }

    /// The layer that the table describes.
    pub fn diff_id(&self) -> DiffId {
        self.diff_id
    }

    /// Number of chunks.
    pub fn count(&self) -> u32 {
        self.count
    }

    /// Length of the layer's logical space in bytes.
    pub fn logical_len_bytes(&self) -> u64 {
        self.logical_len_bytes
    }

    /// The logical range of `chunk`.
    ///
    /// # Panics
    /// When there is no such chunk.
    pub fn range(&self, chunk: ChunkNo) -> std::ops::Range<u64> {
        assert!(chunk.0 < self.count, "chunk {chunk} of {}", self.count);
        self.start(chunk.0)..self.start(chunk.0 + 1)
    }

    /// The logical range of a run of chunks; empty for an empty run.
    ///
    /// # Panics
    /// When the run ends beyond the last chunk.
    pub fn run_range(&self, run: ChunkRange) -> std::ops::Range<u64> {
        assert!(run.end <= self.count, "chunks {run:?} of {}", self.count);
        self.start(run.start)..self.start(run.end)
    }

    /// The name of `chunk`.
    ///
    /// # Panics
    /// When there is no such chunk.
    pub fn chunk_id(&self, chunk: ChunkNo) -> ChunkId {
        assert!(chunk.0 < self.count, "chunk {chunk} of {}", self.count);
        let at = HEADER_LEN + 4 * self.count as usize + 32 * chunk.0 as usize;
        let mut id = [0; 32];
        id.copy_from_slice(&self.bytes[at..at + 32]);
        ChunkId(id)
    }

    /// The chunk that holds the byte at `offset`; `None` beyond the end.
    pub fn find(&self, offset: LogicalOffset) -> Option<ChunkNo> {
        if offset.0 >= self.logical_len_bytes {
            return None;
        }
        let (mut low, mut high) = (0, self.count);
        while high - low > 1 {
            let middle = low + (high - low) / 2;
            if self.start(middle) <= offset.0 { low = middle } else { high = middle }
        }
        Some(ChunkNo(low))
    }

    /// The chunks that cover a logical range, cut at the end of the space; empty for an empty range.
    pub fn covering(&self, range: std::ops::Range<u64>) -> ChunkRange {
        let end = range.end.min(self.logical_len_bytes);
        if range.start >= end {
            return 0..0;
        }
        let first = self.find(LogicalOffset(range.start)).map_or(0, |chunk| chunk.0);
        let last = self.find(LogicalOffset(end - 1)).map_or(0, |chunk| chunk.0 + 1);
        first..last
    }

    /// Checks `bytes` against the length and name of `chunk`.
    ///
    /// # Errors
    /// When they are another chunk's, or nobody's.
    ///
    /// # Panics
    /// When there is no such chunk.
    pub fn verify(&self, chunk: ChunkNo, bytes: Bytes) -> Result<Verified<Bytes>, Mismatch> {
        let range = self.range(chunk);
        let expected = range.end - range.start;
        if bytes.len() as u64 != expected {
            return Err(Mismatch::Length { expected, actual: bytes.len() as u64 });
        }
        Verified::chunk(self.chunk_id(chunk), bytes)
    }
}

/// Collects chunks in logical order into a table.
#[derive(Debug, Default)]
pub struct ChunkTableBuilder {
    starts: Vec<u32>,
    ids: Vec<ChunkId>,
    len_bytes: u64,
}

impl ChunkTableBuilder {
    /// Adds the next chunk.
    ///
    /// # Errors
    /// When it is empty or too long, does not start at a multiple of 512 (only the last one may end off it), or there
    /// are too many.
    pub fn push(&mut self, id: ChunkId, len_bytes: u64) -> Result<(), ChunkTableError> {
        let chunk = self.ids.len() as u32;
        if chunk >= CHUNK_COUNT_MAX {
            return Err(ChunkTableError::TooMany(chunk + 1));
        }
        let aligned = self.len_bytes.is_multiple_of(CHUNK_ALIGN_BYTES);
        let Some(start) = u32::try_from(self.len_bytes / CHUNK_ALIGN_BYTES).ok().filter(|_| aligned) else {
            return Err(ChunkTableError::Chunk(chunk));
        };
        if len_bytes == 0 || len_bytes > CHUNK_LEN_MAX_BYTES {
            return Err(ChunkTableError::Chunk(chunk));
        }
        self.starts.push(start);
        self.ids.push(id);
        self.len_bytes += len_bytes;
        Ok(())
    }

    /// Number of chunks so far.
    pub fn count(&self) -> u32 {
        self.ids.len() as u32
    }

    /// The finished table of the layer `diff_id`.
    pub fn finish(self, diff_id: DiffId) -> ChunkTable {
        let mut bytes = Vec::with_capacity(HEADER_LEN + 36 * self.ids.len());
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&[0; 2]);
        bytes.extend_from_slice(&(self.ids.len() as u32).to_le_bytes());
        bytes.extend_from_slice(&self.len_bytes.to_le_bytes());
        bytes.extend_from_slice(&diff_id.0);
        bytes.extend_from_slice(&[0; 8]);
        for start in &self.starts {
            bytes.extend_from_slice(&start.to_le_bytes());
        }
        for id in &self.ids {
            bytes.extend_from_slice(&id.0);
        }
        let bytes = Bytes::from(bytes);
        ChunkTable {
            id: ArtifactId::of(&bytes),
            count: self.ids.len() as u32,
            logical_len_bytes: self.len_bytes,
            diff_id,
            bytes,
        }
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(lens: &[u64]) -> ChunkTable {
        let mut builder = ChunkTableBuilder::default();
        for (no, len) in lens.iter().enumerate() {
            builder.push(ChunkId::of(&no.to_le_bytes()), *len).expect("a valid chunk");
        }
        builder.finish(DiffId([7; 32]))
    }

    #[test]
    fn round_trips_and_finds() {
        let made = table(&[512, 65536, 1024, 700]);
        let read = ChunkTable::decode(made.bytes().clone()).expect("decodes");
        assert_eq!(read.id(), made.id());
        assert_eq!(read.logical_len_bytes(), 512 + 65536 + 1024 + 700);
        for chunk in 0..4 {
            let range = read.range(ChunkNo(chunk));
            assert_eq!(read.find(LogicalOffset(range.start)), Some(ChunkNo(chunk)));
            assert_eq!(read.find(LogicalOffset(range.end - 1)), Some(ChunkNo(chunk)));
            assert_eq!(read.chunk_id(ChunkNo(chunk)), ChunkId::of(&(chunk as usize).to_le_bytes()));
        }
        assert_eq!(read.find(LogicalOffset(read.logical_len_bytes())), None);
        assert_eq!(read.covering(511..513), 0..2);
        assert_eq!(read.covering(512..512), 0..0);
        assert_eq!(read.covering(600..u64::MAX), 1..4);
    }

    #[test]
    fn an_empty_layer_has_an_empty_table() {
        let read = ChunkTable::decode(table(&[]).bytes().clone()).expect("decodes");
        assert_eq!((read.count(), read.covering(0..10)), (0, 0..0));
    }

    #[test]
    fn bad_chunks_are_refused_when_pushed() {
        let mut builder = ChunkTableBuilder::default();
        assert!(builder.push(ChunkId([0; 32]), 0).is_err());
        assert!(builder.push(ChunkId([0; 32]), CHUNK_LEN_MAX_BYTES + 1).is_err());
        builder.push(ChunkId([0; 32]), 100).expect("the last may end anywhere");
        assert_eq!(builder.push(ChunkId([0; 32]), 100), Err(ChunkTableError::Chunk(1)));
    }

    #[test]
    fn every_damaged_header_or_start_is_an_error_or_another_table() {
        let good = table(&[512, 512, 65536]);
        for at in 0..good.bytes().len() {
            let mut bytes = good.bytes().to_vec();
            bytes[at] ^= 0xff;
            if let Ok(other) = ChunkTable::decode(Bytes::from(bytes)) {
                assert_ne!(other.id(), good.id());
            }
        }
        for len in 0..good.bytes().len() {
            assert!(ChunkTable::decode(good.bytes().slice(..len)).is_err());
        }
    }
}
