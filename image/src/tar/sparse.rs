//! Sparse files: their maps, and where an EROFS image can point for each part of them.
//!
//! A sparse file's data segments stand one after the other in the tar. EROFS maps blocks of 512 bytes, so a block of
//! the file can only be pointed to where the segment covers all of it (or runs to the end of the file) and stands at a
//! multiple of 512 in the tar. GNU tar writes such segments. All other blocks are *inline*: the walker copies their
//! bytes while they pass, and the index carries them.

use std::ops::Range;

use bytes::Bytes;

use super::header::{Block, Format, Header};
use super::number::{decimal, numeric};
use super::pax::Pax;
use super::{BLOCK_LEN_BYTES, EXTENSION_LEN_MAX_BYTES, SPARSE_SEGMENT_COUNT_MAX, SPARSE_SIZE_MAX_BYTES};
use crate::ids::LogicalOffset;
use crate::tree::{Extent, ExtentSource};

/// What is wrong with a map.
pub(super) type Fault = &'static str;

const NOT_A_NUMBER: Fault = "its map holds something that is no number";
const TOO_MANY: Fault = "its map has more than 262144 segments";

/// A run of data: where in the file, and how long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Segment {
    pub(super) offset: i64,
    pub(super) len: i64,
}

/// Which sparse format the extended header declares.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum PaxSparse {
    /// Not sparse, or of a version that nobody knows: a regular file.
    None,
    /// Versions 0.0 and 0.1: the map is in the extended header.
    InHeader,
    /// Version 1.0: the map stands before the data.
    BeforeData,
}

impl PaxSparse {
    pub(super) fn of(pax: &Pax) -> Self {
        match (pax.sparse_major.as_slice(), pax.sparse_minor.as_slice()) {
            (b"0", b"0" | b"1") => Self::InHeader,
            (b"1", b"0") => Self::BeforeData,
            (b"", b"") if !pax.sparse_map.is_empty() => Self::InHeader,
            _ => Self::None,
        }
    }
}

/// The map of version 0.1.
pub(super) fn map_in_header(pax: &Pax) -> Result<Vec<Segment>, Fault> {
    let stated = decimal(&pax.sparse_count).ok_or(NOT_A_NUMBER)?;
    let numbers = if pax.sparse_map.is_empty() { 0 } else { pax.sparse_map.split(|byte| *byte == b',').count() };
    if usize::try_from(stated).ok().and_then(|stated| stated.checked_mul(2)) != Some(numbers) {
        return Err("its map has another number of segments than its header says");
    }
    if numbers / 2 > SPARSE_SEGMENT_COUNT_MAX {
        return Err(TOO_MANY);
    }
    segments(pax.sparse_map.split(|byte| *byte == b',').take(numbers), numbers / 2)
}

fn segments<'a>(mut numbers: impl Iterator<Item = &'a [u8]>, count: usize) -> Result<Vec<Segment>, Fault> {
    let mut segments = Vec::with_capacity(count);
    for _ in 0..count {
        let mut number = || numbers.next().and_then(decimal).ok_or(NOT_A_NUMBER);
        segments.push(Segment { offset: number()?, len: number()? });
    }
    Ok(segments)
}

/// The text of a version 1.0 map: the number of segments, then offset and length of each, a line for every number, in
/// as many whole blocks as it takes.
#[derive(Debug, Default)]
pub(super) struct MapText {
    text: Vec<u8>,
    lines: usize,
    count: Option<usize>,
}

impl MapText {
    /// Takes the next block; the map when it is whole.
    pub(super) fn push(&mut self, block: &Block) -> Result<Option<Vec<Segment>>, Fault> {
        if self.text.len() as u64 + BLOCK_LEN_BYTES > EXTENSION_LEN_MAX_BYTES {
            return Err("its map is longer than 1 MiB");
        }
        self.text.extend_from_slice(block);
        self.lines += block.iter().filter(|byte| **byte == b'\n').count();
        if self.lines == 0 {
            return Ok(None);
        }
        let mut numbers = self.text.split(|byte| *byte == b'\n');
        let first = numbers.next().unwrap_or_default();
        let count = match self.count {
            Some(count) => count,
            None => decimal(first).and_then(|count| usize::try_from(count).ok()).ok_or(NOT_A_NUMBER)?,
        };
        if count > SPARSE_SEGMENT_COUNT_MAX {
            return Err(TOO_MANY);
        }
        self.count = Some(count);
        if self.lines < 1 + 2 * count {
            return Ok(None);
        }
        segments(numbers, count).map(Some)
    }
}

/// The map of an old GNU sparse file: four segments in the header, 21 in each extension block.
#[derive(Debug)]
pub(super) struct OldMap {
    segments: Vec<Segment>,
}

/// Whether another block of an old GNU map follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum OldMapNext {
    /// The map is whole.
    Done,
    /// One more extension block follows.
    Extension,
}

impl OldMap {
    /// The part in the header, and the real size of the file.
    pub(super) fn start(header: &Header, block: &Block) -> Result<(Self, i64, OldMapNext), Fault> {
        if header.format != Format::Gnu {
            return Err("it is of GNU's type in a header that is not GNU's");
        }
        let size = numeric(&block[483..495]).ok_or("its real size is no number")?;
        let mut map = Self { segments: Vec::new() };
        let next = map.take(&block[386..482], block[482])?;
        Ok((map, size, next))
    }

    /// Takes one extension block.
    pub(super) fn extend(&mut self, block: &Block) -> Result<OldMapNext, Fault> {
        self.take(&block[..504], block[504])
    }

    fn take(&mut self, table: &[u8], is_extended: u8) -> Result<OldMapNext, Fault> {
        for slot in table.chunks_exact(24) {
            // GNU, BSD and Go all end a block's list at an offset that starts with a NUL.
            if slot[0] == 0 {
                break;
            }
            let offset = numeric(&slot[..12]).ok_or(NOT_A_NUMBER)?;
            let len = numeric(&slot[12..]).ok_or(NOT_A_NUMBER)?;
            if self.segments.len() == SPARSE_SEGMENT_COUNT_MAX {
                return Err(TOO_MANY);
            }
            self.segments.push(Segment { offset, len });
        }
        Ok(if is_extended == 0 { OldMapNext::Done } else { OldMapNext::Extension })
    }

    pub(super) fn into_segments(self) -> Vec<Segment> {
        self.segments
    }
}

/// Bytes to copy while they pass: from a range after the data start into the buffer of an inline extent.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Copy {
    stored: Range<u64>,
    extent: usize,
    at: usize,
}

/// The extents of a sparse file, and the copying that fills the inline ones.
#[derive(Debug, Default)]
pub(super) struct Layout {
    extents: Vec<Extent>,
    /// Buffer of each extent; empty for those in the layer.
    buffers: Vec<Vec<u8>>,
    copies: Vec<Copy>,
    next_copy: usize,
}

/// A part of one segment that is all inline or not at all.
struct Piece {
    file: Range<u64>,
    stored: u64,
    inline: bool,
}

impl Layout {
    /// Lays out a file of `size` bytes whose `stored_len` bytes of segments start at `data_start` in the tar, with at
    /// most `inline_budget` inline bytes. `Ok(None)` when it takes more.
    pub(super) fn new(
        map: &[Segment],
        size: i64,
        data_start: u64,
        stored_len: u64,
        inline_budget: u64,
    ) -> Result<Option<Self>, Fault> {
        let pieces = pieces(map, size, stored_len)?;
        // i64 sizes are checked to be positive by `pieces`.
        let size = size.unsigned_abs();
        let mut layout = Self::default();
        let mut inline_len = 0;
        let mut buffer_lens: Vec<u64> = Vec::new();
        for piece in pieces {
            let len_bytes = piece.file.end - piece.file.start;
            if !piece.inline {
                let offset = LogicalOffset(data_start + piece.stored);
                let source = ExtentSource::Layer { layer: 0, offset };
                layout.extents.push(Extent { file_offset: piece.file.start, len_bytes, source });
                buffer_lens.push(0);
                continue;
            }
            let start = piece.file.start - piece.file.start % BLOCK_LEN_BYTES;
            let end = size.min(piece.file.end.next_multiple_of(BLOCK_LEN_BYTES));
            let joins = layout.extents.last().is_some_and(|last| {
                matches!(last.source, ExtentSource::Inline(_)) && last.file_offset + last.len_bytes >= start
            });
            if !joins {
                let source = ExtentSource::Inline(Bytes::new());
                layout.extents.push(Extent { file_offset: start, len_bytes: 0, source });
                buffer_lens.push(0);
            }
            let extent = layout.extents.len() - 1;
            let last = &mut layout.extents[extent];
            inline_len += end - last.file_offset - last.len_bytes;
            if inline_len > inline_budget {
                return Ok(None);
            }
            last.len_bytes = end - last.file_offset;
            buffer_lens[extent] = last.len_bytes;
            // Within the budget, so it fits a usize.
            let at = (piece.file.start - last.file_offset) as usize;
            layout.copies.push(Copy { stored: piece.stored..piece.stored + len_bytes, extent, at });
        }
        layout.buffers = buffer_lens.into_iter().map(|len| vec![0; len as usize]).collect();
        Ok(Some(layout))
    }

    /// Inline bytes that the file brings.
    pub(super) fn inline_len(&self) -> u64 {
        self.buffers.iter().map(|buffer| buffer.len() as u64).sum()
    }

    /// Whether the data must pass before the extents are whole.
    pub(super) fn has_copies(&self) -> bool {
        !self.copies.is_empty()
    }

    /// Takes what it needs from `bytes`, which stand `position` bytes after the data start. Calls come in order.
    pub(super) fn pass(&mut self, position: u64, bytes: &[u8]) {
        let end = position + bytes.len() as u64;
        while let Some(copy) = self.copies.get(self.next_copy) {
            let from = copy.stored.start.max(position);
            let to = copy.stored.end.min(end);
            if from < to {
                let source = &bytes[(from - position) as usize..(to - position) as usize];
                let at = copy.at + (from - copy.stored.start) as usize;
                self.buffers[copy.extent][at..at + source.len()].copy_from_slice(source);
            }
            if copy.stored.end > end {
                return;
            }
            self.next_copy += 1;
        }
    }

    /// The extents, when all data has passed or nothing needs copying.
    pub(super) fn into_extents(mut self) -> Vec<Extent> {
        for (extent, buffer) in self.extents.iter_mut().zip(self.buffers) {
            if let ExtentSource::Inline(bytes) = &mut extent.source {
                *bytes = Bytes::from(buffer);
            }
        }
        self.extents
    }
}

/// Checks a map as Go does and cuts it into pieces in file order.
fn pieces(map: &[Segment], size: i64, stored_len: u64) -> Result<Vec<Piece>, Fault> {
    if size < 0 {
        return Err("its real size is negative");
    }
    if size.unsigned_abs() > SPARSE_SIZE_MAX_BYTES {
        return Err("its real size is more than 16 TiB");
    }
    let mut pieces = Vec::new();
    // Segments that touch in the file also touch in the tar, so they are one.
    let mut run = 0..0_u64;
    let mut run_stored = 0;
    let mut stored = 0_u64;
    let mut end = 0_i64;
    for segment in map {
        let segment_end = segment.offset.checked_add(segment.len);
        let Some(segment_end) = segment_end.filter(|_| segment.offset >= 0 && segment.len >= 0) else {
            return Err("its map holds a negative or overflowing segment");
        };
        if segment.offset < end || segment_end > size {
            return Err("its map holds segments out of order or beyond its size");
        }
        end = segment_end;
        let file = segment.offset.unsigned_abs()..segment_end.unsigned_abs();
        if file.is_empty() {
            continue;
        }
        if file.start == run.end {
            run.end = file.end;
        } else {
            cut(run, run_stored, size.unsigned_abs(), &mut pieces);
            run = file.clone();
            run_stored = stored;
        }
        stored += file.end - file.start;
    }
    cut(run, run_stored, size.unsigned_abs(), &mut pieces);
    if stored != stored_len {
        return Err("its data is shorter or longer than its map says");
    }
    Ok(pieces)
}

/// Cuts one run into what an EROFS block can point to and what must be inline.
fn cut(file: Range<u64>, stored: u64, size: u64, pieces: &mut Vec<Piece>) {
    let congruent = file.start % BLOCK_LEN_BYTES == stored % BLOCK_LEN_BYTES;
    let first = file.start.next_multiple_of(BLOCK_LEN_BYTES).min(file.end);
    let last = if file.end == size { file.end } else { file.end - file.end % BLOCK_LEN_BYTES };
    let (first, last) = if congruent && first < last { (first, last) } else { (file.end, file.end) };
    for (part, inline) in [(file.start..first, true), (first..last, false), (last..file.end, true)] {
        if !part.is_empty() {
            pieces.push(Piece { stored: stored + (part.start - file.start), file: part, inline });
        }
    }
}
