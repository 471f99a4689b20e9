//! Where the bytes of a regular file are.

use std::ops::Range;

use super::inode::{FileType, Inode};
use super::{Nid, ReadError, View};
use crate::erofs::layout::{
    CHUNK_FORMAT_BLOCK_BITS_MASK, CHUNK_FORMAT_INDEXES, CHUNK_INDEX_LEN, ChunkIndex, LAYOUT_CHUNK_BASED, NULL_ADDRESS,
};
use crate::ids::LogicalOffset;

/// Bytes of a file that are in one piece.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MappedRange {
    /// First byte in the file.
    pub file_offset: u64,
    /// Length in bytes, at least 1.
    pub len_bytes: u64,
    /// Where they are.
    pub source: RangeSource,
}

/// Where bytes of a file are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RangeSource {
    /// Nowhere: zeros.
    Hole,
    /// In a layer.
    Device {
        /// Which, in the order of [`Image::devices`](super::Image::devices).
        index: u16,
        /// First byte in the layer's logical space.
        offset: LogicalOffset,
    },
    /// In the image itself.
    Image {
        /// First byte.
        offset: u64,
    },
}

impl RangeSource {
    /// The source `len` bytes further on.
    fn after(self, len: u64) -> Self {
        match self {
            Self::Hole => Self::Hole,
            Self::Device { index, offset } => Self::Device { index, offset: LogicalOffset(offset.0 + len) },
            Self::Image { offset } => Self::Image { offset: offset + len },
        }
    }
}

/// The ranges of a file in order, from the first byte asked for. Ends after the first error.
#[derive(Debug, Clone)]
pub struct Extents<'a> {
    map: Map<'a>,
    offset: u64,
    end: u64,
    /// A range that was looked at and did not join the one before it.
    ahead: Option<MappedRange>,
}

#[derive(Debug, Clone, Copy)]
struct Map<'a> {
    inode: Inode<'a>,
    layout: Layout,
}

#[derive(Debug, Clone, Copy)]
enum Layout {
    Flat { in_blocks: u64 },
    Chunks { table_at: u64, chunk_bits: u32, indexes: bool },
}

impl<'a> Extents<'a> {
    pub(super) fn new(view: View<'a>, nid: Nid, range: Range<u64>) -> Result<Self, ReadError> {
        let inode = Inode::read(view, nid)?;
        if inode.file_type()? != FileType::Regular {
            return Err(ReadError::Kind { nid, expected: "regular file" });
        }
        let layout = if inode.layout == LAYOUT_CHUNK_BASED {
            // Only the lower half of the field is the format (`struct erofs_inode_chunk_info`).
            let format = inode.union as u16;
            if format & !(CHUNK_FORMAT_INDEXES | CHUNK_FORMAT_BLOCK_BITS_MASK) != 0 {
                return Err(inode.damaged("its chunk format is not known"));
            }
            let indexes = format & CHUNK_FORMAT_INDEXES != 0;
            let chunk_bits = u32::from(view.geometry.block_bits) + u32::from(format & CHUNK_FORMAT_BLOCK_BITS_MASK);
            let unit = if indexes { CHUNK_INDEX_LEN as u64 } else { 4 };
            Layout::Chunks { table_at: inode.end().next_multiple_of(unit), chunk_bits, indexes }
        } else {
            Layout::Flat { in_blocks: inode.flat_split()?.0 }
        };
        let end = range.end.min(inode.size);
        Ok(Self { map: Map { inode, layout }, offset: range.start, end, ahead: None })
    }

    /// The next range, joined with all that go on where it ends.
    fn advance(&mut self) -> Result<Option<MappedRange>, ReadError> {
        let Some(mut joined) = self.take_piece()? else { return Ok(None) };
        while let Some(piece) = self.take_piece()? {
            if piece.source != joined.source.after(joined.len_bytes) {
                self.ahead = Some(piece);
                break;
            }
            joined.len_bytes += piece.len_bytes;
        }
        Ok(Some(joined))
    }

    /// The next range as the image has it.
    fn take_piece(&mut self) -> Result<Option<MappedRange>, ReadError> {
        if let Some(piece) = self.ahead.take() {
            return Ok(Some(piece));
        }
        if self.offset >= self.end {
            return Ok(None);
        }
        let piece = self.map.piece(self.offset, self.end)?;
        self.offset += piece.len_bytes;
        Ok(Some(piece))
    }
}

impl Iterator for Extents<'_> {
    type Item = Result<MappedRange, ReadError>;

    fn next(&mut self) -> Option<Self::Item> {
        let item = self.advance().transpose();
        if matches!(item, Some(Err(_))) {
            self.offset = self.end;
        }
        item
    }
}

impl Map<'_> {
    /// The piece that holds byte `offset`, cut at `end`, which lies behind it and not behind the file.
    fn piece(&self, offset: u64, end: u64) -> Result<MappedRange, ReadError> {
        let (piece_end, source) = match self.layout {
            Layout::Flat { in_blocks } if offset < in_blocks => {
                let start = u64::from(self.inode.union) << self.inode.view.geometry.block_bits;
                (in_blocks, self.in_image(start, offset, end.min(in_blocks))?)
            }
            Layout::Flat { in_blocks } => {
                let tail = self.in_image(self.inode.end(), offset - in_blocks, end - in_blocks)?;
                (end, tail)
            }
            Layout::Chunks { table_at, chunk_bits, indexes } => {
                let chunk = offset >> chunk_bits;
                let chunk_start = chunk << chunk_bits;
                let chunk_end = chunk_start.saturating_add(1 << chunk_bits);
                let (device_id, block) = self.chunk(table_at, chunk, indexes)?;
                let within = offset - chunk_start..end.min(chunk_end) - chunk_start;
                (chunk_end, self.in_chunk(device_id, block, within)?)
            }
        };
        Ok(MappedRange { file_offset: offset, len_bytes: end.min(piece_end) - offset, source })
    }

    /// Device and block of chunk number `chunk`.
    fn chunk(&self, table_at: u64, chunk: u64, indexes: bool) -> Result<(u16, u32), ReadError> {
        let view = self.inode.view;
        let unit = if indexes { CHUNK_INDEX_LEN as u64 } else { 4 };
        let at = chunk.checked_mul(unit).and_then(|from| from.checked_add(table_at));
        let read = |at| {
            if indexes {
                let index: &ChunkIndex = view.get(at)?;
                Some((index.device_id.get() & view.geometry.device_mask, index.block.get()))
            } else {
                let block: &zerocopy::little_endian::U32 = view.get(at)?;
                Some((0, block.get()))
            }
        };
        at.and_then(read).ok_or_else(|| self.inode.damaged("its chunk indexes lie outside of the image"))
    }

    /// The bytes `within` a chunk that starts at `block` of device `device_id`.
    fn in_chunk(&self, device_id: u16, block: u32, within: Range<u64>) -> Result<RangeSource, ReadError> {
        let view = self.inode.view;
        if block == NULL_ADDRESS {
            return Ok(RangeSource::Hole);
        }
        let start = u64::from(block) << view.geometry.block_bits;
        let Some(index) = device_id.checked_sub(1) else {
            return self.in_image(start, within.start, within.end);
        };
        let device_len = u64::from(view.device_blocks(index).unwrap_or(0)) << view.geometry.block_bits;
        if start.checked_add(within.end).is_none_or(|end| end > device_len) {
            return Err(self.inode.damaged("a chunk lies outside of its device"));
        }
        Ok(RangeSource::Device { index, offset: LogicalOffset(start + within.start) })
    }

    /// The bytes `from..to` of what starts at byte `start` of the image.
    fn in_image(&self, start: u64, from: u64, to: u64) -> Result<RangeSource, ReadError> {
        match start.checked_add(to) {
            Some(end) if end <= self.inode.view.bytes.len() as u64 => Ok(RangeSource::Image { offset: start + from }),
            _ => Err(self.inode.damaged("its data lies outside of the image")),
        }
    }
}
