//! Where a regular file's bytes are, as chunk indexes: one address for each of its equal chunks.
//!
//! A chunk lies in one piece, so the largest chunk that a file can have is given by the places where its pieces meet:
//! the largest power of two that divides all of them. A file in one piece, which nearly every file is, has one chunk.

use zerocopy::IntoBytes;

use super::error::FileProblem;
use crate::erofs::layout::{
    BLOCK_LEN, CHUNK_FORMAT_BLOCK_BITS_MASK, CHUNK_FORMAT_INDEXES, CHUNK_INDEX_LEN, ChunkIndex, NULL_ADDRESS,
};
use crate::tree::{Extent, ExtentSource, TreeLayer};

/// Most chunk indexes of one file: 32 MiB of them, a sparse file of 2 GiB cut every 512 bytes. Sparser ones have larger
/// chunks; what goes beyond is made to hurt.
pub(super) const CHUNK_COUNT_MAX: u64 = 1 << 22;

/// A run of blocks of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Run {
    first: u64,
    count: u64,
    place: Place,
}

/// Where a run stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Hole,
    Blocks { device_id: u16, block: u64 },
}

impl Place {
    /// The place `blocks` further on.
    fn after(self, blocks: u64) -> Self {
        match self {
            Self::Hole => Self::Hole,
            Self::Blocks { device_id, block } => Self::Blocks { device_id, block: block + blocks },
        }
    }
}

/// Where all blocks of a file are.
#[derive(Debug)]
pub(super) struct FileMap {
    runs: Vec<Run>,
    block_count: u64,
}

impl FileMap {
    /// Maps a file of `size` bytes; its inline extents stand one after the other from block `inline_from` of the image.
    pub(super) fn new(
        layers: &[TreeLayer],
        size: u64,
        extents: &[Extent],
        inline_from: u64,
    ) -> Result<Self, FileProblem> {
        if size > i64::MAX as u64 {
            return Err(FileProblem::Size(size));
        }
        let block_count = size.div_ceil(BLOCK_LEN);
        let mut map = Self { runs: Vec::with_capacity(extents.len()), block_count };
        let mut inline_block = inline_from;
        let mut covered = 0;
        for extent in extents {
            check(extent, layers, size, covered)?;
            covered = extent.file_offset + extent.len_bytes;
            let count = extent.len_bytes.div_ceil(BLOCK_LEN);
            let place = match &extent.source {
                ExtentSource::Layer { layer, offset } => {
                    Place::Blocks { device_id: layer + 1, block: offset.0 / BLOCK_LEN }
                }
                ExtentSource::Inline(_) => {
                    let block = inline_block;
                    inline_block += count;
                    Place::Blocks { device_id: 0, block }
                }
            };
            let first = extent.file_offset / BLOCK_LEN;
            map.push_hole(first);
            map.push(Run { first, count, place });
        }
        map.push_hole(block_count);
        let count = map.chunk_count();
        if count > CHUNK_COUNT_MAX { Err(FileProblem::ChunkCount(count)) } else { Ok(map) }
    }

    fn end(&self) -> u64 {
        self.runs.last().map_or(0, |run| run.first + run.count)
    }

    /// A hole from the last run to block `until`.
    fn push_hole(&mut self, until: u64) {
        let first = self.end();
        if first < until {
            self.push(Run { first, count: until - first, place: Place::Hole });
        }
    }

    /// Adds a run, to the one before if it goes on there.
    fn push(&mut self, run: Run) {
        match self.runs.last_mut() {
            Some(last) if last.place.after(last.count) == run.place => last.count += run.count,
            _ => self.runs.push(run),
        }
    }

    /// log2 of the blocks in a chunk.
    fn chunk_bits(&self) -> u32 {
        let whole_file = self.block_count.max(1).next_power_of_two().trailing_zeros();
        let between = self.runs.iter().skip(1).map(|run| run.first.trailing_zeros()).min();
        whole_file.min(between.unwrap_or(u32::MAX)).min(u32::from(CHUNK_FORMAT_BLOCK_BITS_MASK))
    }

    /// Number of chunk indexes; 0 for an empty file.
    pub(super) fn chunk_count(&self) -> u64 {
        self.block_count.div_ceil(1 << self.chunk_bits())
    }

    /// The chunk format that the inode carries.
    pub(super) fn chunk_format(&self) -> u16 {
        self.chunk_bits() as u16 | CHUNK_FORMAT_INDEXES
    }

    /// Writes all chunk indexes to the start of `out`.
    pub(super) fn write(&self, out: &mut [u8]) {
        let chunk = 1_u64 << self.chunk_bits();
        let mut slots = out.chunks_exact_mut(CHUNK_INDEX_LEN);
        for run in &self.runs {
            // Runs meet at multiples of the chunk, so every chunk starts in exactly one.
            for (first, slot) in (0..run.count).step_by(chunk as usize).zip(&mut slots) {
                let (device_id, block) = match run.place.after(first) {
                    Place::Hole => (0, NULL_ADDRESS),
                    // Checked against the length of the layer, or of the image, both below 2^32 blocks.
                    Place::Blocks { device_id, block } => (device_id, block as u32),
                };
                let index = ChunkIndex { advise: 0.into(), device_id: device_id.into(), block: block.into() };
                slot.copy_from_slice(index.as_bytes());
            }
        }
    }
}

/// Blocks of the image that the inline extents of a file take.
pub(super) fn inline_blocks(extents: &[Extent]) -> u64 {
    let inline = extents.iter().filter(|extent| matches!(extent.source, ExtentSource::Inline(_)));
    inline.map(|extent| extent.len_bytes.div_ceil(BLOCK_LEN)).sum()
}

/// Checks `extent` against the rules of the tree; the one before it ends at `covered`.
fn check(extent: &Extent, layers: &[TreeLayer], size: u64, covered: u64) -> Result<(), FileProblem> {
    let problem = |reason| Err(FileProblem::Extent { file_offset: extent.file_offset, reason });
    let Some(end) = extent.file_offset.checked_add(extent.len_bytes).filter(|end| *end <= size) else {
        return problem("ends beyond the file");
    };
    if extent.len_bytes == 0 {
        return problem("is empty");
    }
    if extent.file_offset < covered {
        return problem("overlaps the one before it");
    }
    if !extent.file_offset.is_multiple_of(BLOCK_LEN) {
        return problem("does not start at a multiple of 512");
    }
    match &extent.source {
        ExtentSource::Layer { layer, offset } => {
            // What follows in the block belongs to the layer, so it would show where the file has zeros.
            if end != size && !end.is_multiple_of(BLOCK_LEN) {
                return problem("ends inside a block of the layer before the file ends");
            }
            if !offset.0.is_multiple_of(BLOCK_LEN) {
                return problem("does not stand at a multiple of 512 in its layer");
            }
            let Some(layer) = layers.get(usize::from(*layer)) else {
                return problem("stands in a layer that the tree does not have");
            };
            match offset.0.checked_add(extent.len_bytes) {
                Some(end) if end <= layer.logical_len_bytes => Ok(()),
                _ => problem("ends beyond its layer"),
            }
        }
        ExtentSource::Inline(bytes) if bytes.len() as u64 != extent.len_bytes => {
            problem("has inline bytes of another length")
        }
        ExtentSource::Inline(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::ids::{DiffId, LogicalOffset};

    const LAYERS: [TreeLayer; 1] = [TreeLayer { diff_id: DiffId([0; 32]), logical_len_bytes: (1 << 41) - 1024 }];

    fn extent(first: u64, blocks: u64, at: u64) -> Extent {
        Extent {
            file_offset: first * 512,
            len_bytes: blocks * 512,
            source: ExtentSource::Layer { layer: 0, offset: LogicalOffset(at * 512) },
        }
    }

    fn map(blocks: u64, extents: &[Extent]) -> FileMap {
        FileMap::new(&LAYERS, blocks * 512, extents, 0).expect("a valid file")
    }

    #[test]
    fn one_piece_needs_one_index() {
        for blocks in [1, 2, 3, 1000, 1 << 20, (1 << 31) - 1] {
            assert_eq!(map(blocks, &[extent(0, blocks, 5)]).chunk_count(), 1, "{blocks} blocks");
        }
        assert_eq!(map(5, &[extent(0, 2, 8), extent(2, 3, 10)]).chunk_count(), 1);
    }

    #[test]
    fn chunks_are_as_large_as_the_pieces_allow() {
        let cases: [(u64, &[Extent], u64); 5] = [
            (64, &[extent(0, 32, 0), extent(32, 32, 100)], 2),
            (64, &[extent(16, 16, 0)], 4),
            (64, &[extent(63, 1, 0)], 64),
            (64, &[], 1),
            (1 << 33, &[], 4),
        ];
        for (blocks, extents, count) in cases {
            assert_eq!(map(blocks, extents).chunk_count(), count, "{extents:?}");
        }
        assert_eq!(map(0, &[]).chunk_count(), 0);
    }

    #[test]
    fn bad_extents_are_refused() {
        let inline = |len_bytes, bytes: &'static [u8]| Extent {
            file_offset: 0,
            len_bytes,
            source: ExtentSource::Inline(Bytes::from_static(bytes)),
        };
        let cases = [
            vec![extent(0, 0, 0)],
            vec![extent(0, 17, 0)],
            vec![extent(4, 1, 0), extent(3, 1, 9)],
            vec![extent(0, 1, 1 << 32)],
            vec![Extent { file_offset: 1, ..extent(0, 1, 0) }],
            vec![Extent { len_bytes: 100, ..extent(0, 1, 0) }],
            vec![Extent { source: ExtentSource::Layer { layer: 1, offset: LogicalOffset(0) }, ..extent(0, 1, 0) }],
            vec![Extent { source: ExtentSource::Layer { layer: 0, offset: LogicalOffset(7) }, ..extent(0, 1, 0) }],
            vec![inline(3, b"four")],
            vec![Extent { file_offset: u64::MAX - 511, ..extent(0, 1, 0) }],
        ];
        for extents in cases {
            let outcome = FileMap::new(&LAYERS, 16 * 512, &extents, 0);
            assert!(matches!(outcome, Err(FileProblem::Extent { .. })), "{extents:?} gave {outcome:?}");
        }
        assert!(FileMap::new(&LAYERS, 16 * 512, &[inline(3, b"abc")], 0).is_ok());
        assert!(FileMap::new(&LAYERS, 515, &[extent(0, 1, 0), Extent { len_bytes: 3, ..extent(1, 1, 9) }], 0).is_ok());
        assert_eq!(FileMap::new(&LAYERS, 1 << 63, &[], 0).err(), Some(FileProblem::Size(1 << 63)));
    }

    #[test]
    fn a_file_made_to_hurt_is_refused() {
        let extents = [extent((1 << 23) + 1, 1, 0)];
        let outcome = FileMap::new(&LAYERS, 1 << 40, &extents, 0);
        assert!(matches!(outcome, Err(FileProblem::ChunkCount(_))), "{outcome:?}");
    }
}
