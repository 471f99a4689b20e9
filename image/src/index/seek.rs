//! The seek table: where a decompressor can begin in a layer's blob, and which chunks it then makes.
//!
//! Two parts. The *directory* is small and fetched whole; the *windows* are one blob beside it, in packs of 32 spans
//! each, of which a reader fetches the one that its span needs, and checks it by the BLAKE3 name in the directory.
//!
//! Directory, version 1, little endian:
//!
//! | offset | size | field |
//! |---|---|---|
//! | 0 | 8 | magic `HERMSEK\0` |
//! | 8 | 2 | version, 1 |
//! | 10 | 1 | compression of the blob: 0 plain tar, 1 gzip, 2 zstd |
//! | 11 | 1 | zero |
//! | 12 | 4 | number of spans *n* |
//! | 16 | 8 | length of the compressed blob in bytes |
//! | 24 | 8 | length of the logical space in bytes |
//! | 32 | 8 | length of the windows in bytes |
//! | 40 | 4 | number of chunks of the layer |
//! | 44 | 4 | zero |
//! | 48 | 32 | sha256 of the compressed blob |
//! | 80 | 32 | diffID of the layer |
//! | 112 | 32 | BLAKE3 of the windows |
//! | 144 | 40 *n* | the spans in logical order |
//! | 144 + 40 *n* | 48 *p* | the window packs, *p* = *n* / 32 rounded up |
//!
//! A span:
//!
//! | offset | size | field |
//! |---|---|---|
//! | 0 | 4 | first chunk; the span ends where the next one starts, the last one with the last chunk |
//! | 4 | 1 | restart: 0 nothing from before is needed (a gzip member, a zstd frame, any byte of a plain tar); 1 + *b*, a deflate block whose first *b* bits (0 to 7) stand in the byte before |
//! | 5 | 1 | those bits, in the low end |
//! | 6 | 2 | length of the window in bytes, 0 to 32,768 |
//! | 8 | 2 | how many bytes of the window are kept |
//! | 10 | 2 | zero |
//! | 12 | 4 | where they start in the unpacked pack |
//! | 16 | 8 | logical offset of the restart, at or before the start of the first chunk |
//! | 24 | 8 | blob offset of the restart: the first whole byte to feed |
//! | 32 | 8 | blob offset of the end: all bytes before it make the last chunk complete |
//!
//! A window pack, for the spans 32 *i* to 32 *i* + 31:
//!
//! | offset | size | field |
//! |---|---|---|
//! | 0 | 8 | where it starts in the windows |
//! | 8 | 4 | its length there in bytes |
//! | 12 | 4 | its length unpacked in bytes |
//! | 16 | 32 | BLAKE3 of its bytes in the windows |
//!
//! A pack is one zstd frame, or nothing if no span of it keeps any byte; unpacked it is the kept bytes of its spans, one
//! after the other. Which bytes of a window are kept, and where they belong, [`crate::inflate::window`] says. Packs stand
//! in the windows one after the other without gaps. The directory is read in place: opening one checks it once.

use std::ops::Range;

use bytes::Bytes;
use thiserror::Error;

use super::chunks::CHUNK_COUNT_MAX;
use crate::ids::{ArtifactId, BlobOffset, ChunkNo, ChunkRange, DiffId, LayerId, LogicalOffset, SpanNo};
use crate::inflate::window::{WINDOW_LEN_MAX_BYTES, pack};
use crate::inflate::{Compression, InflateError, Resume};
use crate::verify::{Mismatch, Verified};

/// Most spans in one layer: a span holds at least one chunk.
pub const SPAN_COUNT_MAX: u32 = CHUNK_COUNT_MAX;

const MAGIC: &[u8; 8] = b"HERMSEK\0";
const VERSION: u16 = 1;
const HEADER_LEN: usize = 144;
/// Length of a span in the directory, in bytes.
pub(crate) const SPAN_ENTRY_LEN_BYTES: usize = 40;
const PACK_ENTRY_LEN: usize = 48;
/// Spans whose windows are packed together. Packed one by one they take a sixth more; a reader that needs one span
/// fetches 40 KB of windows beside some 150 KB of blob (docs/decisions/0002-chunk-and-span-sizes.md).
const SPANS_PER_PACK: u32 = 32;

/// Bytes that are no seek table.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum SeekTableError {
    /// The magic number is missing.
    #[error("not a seek table")]
    Magic,
    /// A version that this build does not know.
    #[error("seek table version {0} is not known; version {VERSION} is")]
    Version(u16),
    /// A kind of compression that this build does not know.
    #[error("seek table names the unknown compression {0}")]
    Compression(u8),
    /// The length does not match the number of spans.
    #[error("seek table has {actual} bytes where its header asks for {expected}")]
    Length {
        /// By the header.
        expected: u64,
        /// That came.
        actual: u64,
    },
    /// More spans or chunks than a layer may have.
    #[error("seek table names {0} spans or chunks, more than {SPAN_COUNT_MAX}")]
    TooMany(u32),
    /// Reserved bytes are not zero.
    #[error("seek table has reserved bytes that are not zero")]
    Reserved,
    /// A span that contradicts the header, itself, or the span before it.
    #[error("span {0} is empty, out of order, out of bounds, or malformed")]
    Span(u32),
    /// A window pack that contradicts the header, its spans, or the pack before it.
    #[error("window pack {0} is out of order, out of bounds, or does not fit its spans")]
    Pack(u32),
    /// Windows could not be packed.
    #[error("windows cannot be packed")]
    Packing(#[source] InflateError),
    /// Spans do not cover the chunks or the windows.
    #[error("the spans do not cover all {chunks} chunks and {windows_len_bytes} bytes of windows")]
    Cover {
        /// Number of chunks by the header.
        chunks: u32,
        /// Length of the windows by the header.
        windows_len_bytes: u64,
    },
}

/// One span, as the directory has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SpanEntry {
    /// The chunks that it holds, never none.
    pub chunks: ChunkRange,
    /// The compressed bytes to feed to a decoder.
    pub blob: Range<u64>,
    /// How a decoder begins.
    pub resume: Resume,
    /// The logical offset of its first output byte, at or before the start of the first chunk.
    pub logical_start: LogicalOffset,
    /// Length of the window in bytes: the output just before the restart that a decoder is given.
    pub window_len_bytes: usize,
    /// Where the kept bytes of the window stand in the unpacked pack; empty when nothing is referred to.
    pub kept: Range<usize>,
}

/// A pack of windows, as the directory has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WindowPack {
    /// Where it stands in the windows.
    pub range: Range<u64>,
    /// Its length unpacked, in bytes.
    pub unpacked_len_bytes: usize,
    /// Its name.
    pub id: ArtifactId,
}

/// What a seek table says of its layer as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SeekHeader {
    /// How the blob is compressed.
    pub compression: Compression,
    /// The blob.
    pub layer: LayerId,
    /// Its content.
    pub diff_id: DiffId,
    /// Length of the compressed blob in bytes.
    pub blob_len_bytes: u64,
    /// Length of the logical space in bytes.
    pub logical_len_bytes: u64,
    /// Number of chunks of the layer.
    pub chunk_count: u32,
}

/// A checked seek table: the directory.
#[derive(Debug, Clone)]
pub struct SeekTable {
    bytes: Bytes,
    id: ArtifactId,
    header: SeekHeader,
    count: u32,
    windows_len_bytes: u64,
    windows_id: ArtifactId,
}

impl SeekTable {
    /// Opens an encoded directory.
    ///
    /// # Errors
    /// When the bytes are no well-formed seek table of this version.
    pub fn decode(bytes: Bytes) -> Result<Self, SeekTableError> {
        if bytes.len() < HEADER_LEN || &bytes[..8] != MAGIC {
            return Err(SeekTableError::Magic);
        }
        let version = u16::from_le_bytes(array(&bytes, 8));
        if version != VERSION {
            return Err(SeekTableError::Version(version));
        }
        let compression = match bytes[10] {
            0 => Compression::Plain,
            1 => Compression::Gzip,
            2 => Compression::Zstd,
            other => return Err(SeekTableError::Compression(other)),
        };
        if bytes[11] != 0 || bytes[44..48] != [0; 4] {
            return Err(SeekTableError::Reserved);
        }
        let count = u32::from_le_bytes(array(&bytes, 12));
        let chunk_count = u32::from_le_bytes(array(&bytes, 40));
        if count.max(chunk_count) > SPAN_COUNT_MAX {
            return Err(SeekTableError::TooMany(count.max(chunk_count)));
        }
        let packs = count.div_ceil(SPANS_PER_PACK) as usize;
        let expected = (HEADER_LEN + SPAN_ENTRY_LEN_BYTES * count as usize + PACK_ENTRY_LEN * packs) as u64;
        if bytes.len() as u64 != expected {
            return Err(SeekTableError::Length { expected, actual: bytes.len() as u64 });
        }
        let header = SeekHeader {
            compression,
            layer: LayerId(array(&bytes, 48)),
            diff_id: DiffId(array(&bytes, 80)),
            blob_len_bytes: u64::from_le_bytes(array(&bytes, 16)),
            logical_len_bytes: u64::from_le_bytes(array(&bytes, 24)),
            chunk_count,
        };
        let table = Self {
            id: ArtifactId::of(&bytes),
            header,
            count,
            windows_len_bytes: u64::from_le_bytes(array(&bytes, 32)),
            windows_id: ArtifactId(array(&bytes, 112)),
            bytes,
        };
        table.check()?;
        Ok(table)
    }

    fn check(&self) -> Result<(), SeekTableError> {
        let mut before: Option<SpanEntry> = None;
        for span in 0..self.count {
            let malformed = || SeekTableError::Span(span);
            let entry = self.entry(span).ok_or_else(malformed)?;
            let is_first_of_pack = span.is_multiple_of(SPANS_PER_PACK);
            let kept_start = before.as_ref().filter(|_| !is_first_of_pack).map_or(0, |before| before.kept.end);
            let in_order = before.as_ref().map_or(entry.chunks.start == 0, |before| {
                before.logical_start <= entry.logical_start
                    && before.blob.start <= entry.blob.start
                    && before.blob.end <= entry.blob.end
            });
            if !in_order || entry.kept.start != kept_start || !self.is_possible(&entry) {
                return Err(malformed());
            }
            before = Some(entry);
        }
        let mut windows_len = 0;
        for no in 0..self.count.div_ceil(SPANS_PER_PACK) {
            let last_span = ((no + 1) * SPANS_PER_PACK).min(self.count) - 1;
            let kept_end = self.entry(last_span).map_or(0, |entry| entry.kept.end);
            let found = self.pack_entry(no).filter(|pack| {
                pack.range.start == windows_len
                    && pack.unpacked_len_bytes == kept_end
                    && (pack.unpacked_len_bytes == 0) == pack.range.is_empty()
            });
            windows_len = found.ok_or(SeekTableError::Pack(no))?.range.end;
        }
        let covered = before.map_or(0, |last| last.chunks.end);
        if covered != self.header.chunk_count || windows_len != self.windows_len_bytes {
            let (chunks, windows_len_bytes) = (self.header.chunk_count, self.windows_len_bytes);
            return Err(SeekTableError::Cover { chunks, windows_len_bytes });
        }
        Ok(())
    }

    /// Whether an entry fits the header and itself.
    fn is_possible(&self, entry: &SpanEntry) -> bool {
        let header = &self.header;
        let needs_nothing = entry.resume == Resume::Start && entry.window_len_bytes == 0;
        let fits_kind = match header.compression {
            Compression::Gzip => needs_nothing || entry.resume != Resume::Start,
            Compression::Zstd => needs_nothing,
            Compression::Plain => needs_nothing && entry.blob.start == entry.logical_start.0,
        };
        fits_kind
            && entry.chunks.start < entry.chunks.end
            && entry.chunks.end <= header.chunk_count
            && entry.blob.start <= entry.blob.end
            && entry.blob.end <= header.blob_len_bytes
            && entry.logical_start.0 < header.logical_len_bytes
            && entry.window_len_bytes <= WINDOW_LEN_MAX_BYTES
            && entry.kept.len() <= entry.window_len_bytes
    }

    fn first_chunk(&self, span: u32) -> u32 {
        if span >= self.count {
            return self.header.chunk_count;
        }
        u32::from_le_bytes(array(&self.bytes, HEADER_LEN + SPAN_ENTRY_LEN_BYTES * span as usize))
    }

    /// The entry of `span`, which must exist; `None` when its restart makes no sense.
    fn entry(&self, span: u32) -> Option<SpanEntry> {
        let at = HEADER_LEN + SPAN_ENTRY_LEN_BYTES * span as usize;
        let number = |offset: usize| u64::from_le_bytes(array(&self.bytes, at + offset));
        let value = self.bytes[at + 5];
        let resume = match self.bytes[at + 4] {
            0 if value == 0 => Resume::Start,
            state @ 1..=8 if u16::from(value) < 1 << (state - 1) => Resume::Block { bits: state - 1, value },
            _ => return None,
        };
        let short = |offset: usize| usize::from(u16::from_le_bytes(array(&self.bytes, at + offset)));
        if short(10) != 0 {
            return None;
        }
        let kept_start = u32::from_le_bytes(array(&self.bytes, at + 12)) as usize;
        Some(SpanEntry {
            chunks: self.first_chunk(span)..self.first_chunk(span + 1),
            blob: number(24)..number(32),
            resume,
            logical_start: LogicalOffset(number(16)),
            window_len_bytes: short(6),
            kept: kept_start..kept_start.checked_add(short(8))?,
        })
    }

    /// The pack `no`, which must exist; `None` when its end makes no sense.
    fn pack_entry(&self, no: u32) -> Option<WindowPack> {
        let at = HEADER_LEN + SPAN_ENTRY_LEN_BYTES * self.count as usize + PACK_ENTRY_LEN * no as usize;
        let start = u64::from_le_bytes(array(&self.bytes, at));
        let len = |offset: usize| u32::from_le_bytes(array(&self.bytes, at + offset));
        Some(WindowPack {
            range: start..start.checked_add(u64::from(len(8)))?,
            unpacked_len_bytes: len(12) as usize,
            id: ArtifactId(array(&self.bytes, at + 16)),
        })
    }

    /// The canonical encoding of the directory.
    pub fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// The name of the directory.
    pub fn id(&self) -> ArtifactId {
        self.id
    }

    /// What the table says of the layer as a whole.
    pub fn header(&self) -> &SeekHeader {
        &self.header
    }

    /// The name of all windows together.
    pub fn windows_id(&self) -> ArtifactId {
        self.windows_id
    }

    /// Length of all windows together, in bytes.
    pub fn windows_len_bytes(&self) -> u64 {
        self.windows_len_bytes
    }

    /// Number of spans.
    pub fn count(&self) -> u32 {
        self.count
    }

    /// The spans in order.
    pub fn spans(&self) -> impl ExactSizeIterator<Item = SpanEntry> + '_ {
        (0..self.count).map(|span| self.span(SpanNo(span)))
    }

    /// A span.
    ///
    /// # Panics
    /// When there is no such span.
    pub fn span(&self, span: SpanNo) -> SpanEntry {
        assert!(span.0 < self.count, "span {span} of {}", self.count);
        self.entry(span.0).expect("decode and the builder checked every entry")
    }

    /// The span that holds `chunk`.
    ///
    /// # Panics
    /// When there is no such chunk.
    pub fn span_of(&self, chunk: ChunkNo) -> SpanNo {
        assert!(chunk.0 < self.header.chunk_count, "chunk {chunk} of {}", self.header.chunk_count);
        let (mut low, mut high) = (0, self.count);
        while high - low > 1 {
            let middle = low + (high - low) / 2;
            if self.first_chunk(middle) <= chunk.0 { low = middle } else { high = middle }
        }
        SpanNo(low)
    }

    /// The pack that holds the window of `span`, together with those of its neighbours.
    ///
    /// # Panics
    /// When there is no such span.
    pub fn window_pack(&self, span: SpanNo) -> WindowPack {
        assert!(span.0 < self.count, "span {span} of {}", self.count);
        self.pack_entry(span.0 / SPANS_PER_PACK).expect("decode and the builder checked every pack")
    }

    /// What of the windows is needed to decode `span`: the range of its pack, or nothing when it keeps no byte. Spans
    /// that are neighbours share packs.
    ///
    /// # Panics
    /// When there is no such span.
    pub fn window_range(&self, span: SpanNo) -> Range<u64> {
        let pack = self.window_pack(span).range;
        if self.span(span).kept.is_empty() { pack.start..pack.start } else { pack }
    }

    /// Checks what was fetched for [`Self::window_range`].
    ///
    /// # Errors
    /// When `packed` is not it.
    ///
    /// # Panics
    /// When there is no such span.
    pub fn verify_window(&self, span: SpanNo, packed: Bytes) -> Result<Verified<Bytes>, Mismatch> {
        let range = self.window_range(span);
        let expected = range.end - range.start;
        if packed.len() as u64 != expected {
            return Err(Mismatch::Length { expected, actual: packed.len() as u64 });
        }
        let id = if range.is_empty() { ArtifactId::of(&[]) } else { self.window_pack(span).id };
        Verified::artifact(id, packed)
    }

    /// The compressed bytes that a run of adjacent spans is decoded from in one go.
    ///
    /// # Panics
    /// When the run is empty or ends beyond the last span.
    pub fn blob_range(&self, spans: Range<u32>) -> Range<u64> {
        assert!(spans.start < spans.end, "no spans in {spans:?}");
        self.span(SpanNo(spans.start)).blob.start..self.span(SpanNo(spans.end - 1)).blob.end
    }
}

/// A span for [`SeekTableBuilder::push`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewSpan<'a> {
    /// Its first chunk.
    pub first_chunk: ChunkNo,
    /// Logical offset of the restart.
    pub logical_start: LogicalOffset,
    /// Blob offset of the restart.
    pub blob_start: BlobOffset,
    /// Blob offset by which its last chunk is complete.
    pub blob_end: BlobOffset,
    /// How a decoder begins.
    pub resume: Resume,
    /// Length of the window in bytes.
    pub window_len_bytes: usize,
    /// The bytes of it that are kept.
    pub kept: &'a [u8],
}

/// Collects spans in order into a table and its windows.
#[derive(Debug, Default)]
pub struct SeekTableBuilder {
    entries: Vec<u8>,
    packs: Vec<u8>,
    windows: Vec<u8>,
    /// Kept bytes of the pack in the making.
    kept: Vec<u8>,
    count: u32,
}

impl SeekTableBuilder {
    /// Adds the next span.
    ///
    /// # Errors
    /// When there are too many, the window is longer than a window can be, or memory is short.
    pub fn push(&mut self, span: &NewSpan<'_>) -> Result<(), SeekTableError> {
        if self.count >= SPAN_COUNT_MAX {
            return Err(SeekTableError::TooMany(self.count + 1));
        }
        if span.window_len_bytes > WINDOW_LEN_MAX_BYTES || span.kept.len() > span.window_len_bytes {
            return Err(SeekTableError::Span(self.count));
        }
        if self.count > 0 && self.count.is_multiple_of(SPANS_PER_PACK) {
            self.close_pack()?;
        }
        let (state, value) = match span.resume {
            Resume::Start => (0, 0),
            Resume::Block { bits, value } => (bits + 1, value),
        };
        self.entries.extend_from_slice(&span.first_chunk.0.to_le_bytes());
        self.entries.extend_from_slice(&[state, value]);
        for short in [span.window_len_bytes as u16, span.kept.len() as u16, 0] {
            self.entries.extend_from_slice(&short.to_le_bytes());
        }
        self.entries.extend_from_slice(&(self.kept.len() as u32).to_le_bytes());
        for number in [span.logical_start.0, span.blob_start.0, span.blob_end.0] {
            self.entries.extend_from_slice(&number.to_le_bytes());
        }
        self.kept.extend_from_slice(span.kept);
        self.count += 1;
        Ok(())
    }

    fn close_pack(&mut self) -> Result<(), SeekTableError> {
        let packed = pack(&self.kept).map_err(SeekTableError::Packing)?;
        self.packs.extend_from_slice(&(self.windows.len() as u64).to_le_bytes());
        self.packs.extend_from_slice(&(packed.len() as u32).to_le_bytes());
        self.packs.extend_from_slice(&(self.kept.len() as u32).to_le_bytes());
        self.packs.extend_from_slice(&ArtifactId::of(&packed).0);
        self.windows.extend_from_slice(&packed);
        self.kept.clear();
        Ok(())
    }

    /// Moves the end of the last span, to which the next chunks are to belong as well. Nothing without a span.
    pub fn extend_last(&mut self, blob_end: BlobOffset) {
        if let Some(last) = self.entries.len().checked_sub(SPAN_ENTRY_LEN_BYTES) {
            self.entries[last + 32..last + 40].copy_from_slice(&blob_end.0.to_le_bytes());
        }
    }

    /// Number of spans so far.
    pub fn count(&self) -> u32 {
        self.count
    }

    /// Length of the windows so far in bytes, the pack in the making as it will be at worst.
    pub fn windows_len_bytes(&self) -> u64 {
        (self.windows.len() + self.kept.len()) as u64
    }

    /// The finished directory and its windows.
    ///
    /// # Errors
    /// When the spans contradict each other or the header, or memory is short.
    pub fn finish(mut self, header: SeekHeader) -> Result<(SeekTable, Bytes), SeekTableError> {
        if self.count > 0 {
            self.close_pack()?;
        }
        let windows = Bytes::from(self.windows);
        let mut bytes = Vec::with_capacity(HEADER_LEN + self.entries.len() + self.packs.len());
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        let compression = match header.compression {
            Compression::Plain => 0,
            Compression::Gzip => 1,
            Compression::Zstd => 2,
        };
        bytes.extend_from_slice(&[compression, 0]);
        bytes.extend_from_slice(&self.count.to_le_bytes());
        for number in [header.blob_len_bytes, header.logical_len_bytes, windows.len() as u64] {
            bytes.extend_from_slice(&number.to_le_bytes());
        }
        bytes.extend_from_slice(&header.chunk_count.to_le_bytes());
        bytes.extend_from_slice(&[0; 4]);
        bytes.extend_from_slice(&header.layer.0);
        bytes.extend_from_slice(&header.diff_id.0);
        bytes.extend_from_slice(&ArtifactId::of(&windows).0);
        bytes.extend_from_slice(&self.entries);
        bytes.extend_from_slice(&self.packs);
        Ok((SeekTable::decode(Bytes::from(bytes))?, windows))
    }
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut array = [0; N];
    array.copy_from_slice(&bytes[at..at + N]);
    array
}

#[cfg(test)]
mod tests;
