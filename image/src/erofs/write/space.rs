//! Where things go in the metadata area: inodes in 32-byte slots, and whole blocks between them.

use std::collections::VecDeque;
use std::ops::Range;

use crate::erofs::layout::{BLOCK_LEN, INODE_SLOT_LEN};

/// Holes in front of blocks that are kept for a later inode. Few, so that an inode never lands far behind its
/// neighbours and a search costs nothing.
const GAP_COUNT_MAX: usize = 8;

/// What an inode needs, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Shape {
    /// The fixed part.
    pub(super) header_len: u64,
    /// Everything: the fixed part, extended attributes, and chunk indexes or inline data.
    pub(super) len: u64,
    /// Whether inline data ends it, which must not cross a block's end. Older kernels look for a symlink's target in
    /// the block where the fixed part ends (fs/erofs/inode.c, `erofs_fill_symlink`), so all the rest must lie there.
    pub(super) ends_inline: bool,
}

impl Shape {
    /// Whether it may stand at byte `at` of the image.
    fn fits_at(self, at: u64) -> bool {
        !self.ends_inline || (at + self.header_len - 1) / BLOCK_LEN == (at + self.len - 1) / BLOCK_LEN
    }

    /// The first place from `from` on that it may stand at; `from` is a slot's start.
    fn first_place(self, from: u64) -> u64 {
        let mut at = from;
        // Inline shapes fit in one block, so a block's start is always right and at most 15 slots are tried.
        while !self.fits_at(at) {
            at += INODE_SLOT_LEN;
        }
        at
    }
}

/// The metadata area while it grows.
#[derive(Debug)]
pub(super) struct Space {
    end: u64,
    gaps: VecDeque<Range<u64>>,
}

impl Space {
    /// An empty area from byte `start`, a block's start.
    pub(super) fn new(start: u64) -> Self {
        Self { end: start, gaps: VecDeque::with_capacity(GAP_COUNT_MAX + 1) }
    }

    /// The byte after the last one in use.
    pub(super) fn end(&self) -> u64 {
        self.end
    }

    /// Takes room for an inode; the byte where it starts.
    pub(super) fn inode(&mut self, shape: Shape) -> u64 {
        let fitting = self.gaps.iter().enumerate().find_map(|(no, gap)| {
            let at = shape.first_place(gap.start);
            (at + shape.len <= gap.end).then_some((no, at))
        });
        if let Some((no, at)) = fitting {
            let gap = self.gaps[no].clone();
            // What is skipped in front is smaller than what most inodes need, so only the rest is kept.
            self.gaps[no].start = (at + shape.len).next_multiple_of(INODE_SLOT_LEN);
            if self.gaps[no].start >= gap.end {
                self.gaps.remove(no);
            }
            return at;
        }
        let at = shape.first_place(self.end);
        self.keep(self.end..at);
        self.end = (at + shape.len).next_multiple_of(INODE_SLOT_LEN);
        at
    }

    /// Takes `len` bytes from a block's start; that block's number in the image.
    pub(super) fn blocks(&mut self, len: u64) -> u64 {
        let at = self.end.next_multiple_of(BLOCK_LEN);
        self.keep(self.end..at);
        self.end = (at + len).next_multiple_of(BLOCK_LEN);
        at / BLOCK_LEN
    }

    fn keep(&mut self, gap: Range<u64>) {
        if gap.is_empty() {
            return;
        }
        self.gaps.push_back(gap);
        if self.gaps.len() > GAP_COUNT_MAX {
            self.gaps.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape(header_len: u64, len: u64, ends_inline: bool) -> Shape {
        Shape { header_len, len, ends_inline }
    }

    #[test]
    fn inodes_stand_side_by_side() {
        let mut space = Space::new(1536);
        assert_eq!(space.inode(shape(64, 72, false)), 1536);
        assert_eq!(space.inode(shape(32, 40, false)), 1536 + 96);
        assert_eq!(space.inode(shape(64, 64, false)), 1536 + 160);
    }

    #[test]
    fn a_gap_in_front_of_blocks_is_filled() {
        let mut space = Space::new(0);
        assert_eq!(space.inode(shape(32, 32, false)), 0);
        assert_eq!(space.blocks(700), 1);
        assert_eq!(space.inode(shape(64, 300, true)), 32);
        assert_eq!(space.inode(shape(64, 180, false)), 1536);
        assert_eq!(space.inode(shape(64, 160, false)), 352);
        assert_eq!(space.end(), 1536 + 192);
    }

    #[test]
    fn inline_data_never_leaves_the_block_of_its_inode() {
        let mut space = Space::new(0);
        for no in 0_u64..1000 {
            let len = 65 + (no * 37) % 448;
            let at = space.inode(shape(64, len, true));
            assert_eq!(at % INODE_SLOT_LEN, 0);
            assert_eq!((at + 63) / BLOCK_LEN, (at + len - 1) / BLOCK_LEN, "{len} bytes at {at}");
        }
    }

    #[test]
    fn nothing_overlaps() {
        let mut space = Space::new(0);
        let mut taken: Vec<Range<u64>> = Vec::new();
        for no in 0_u64..2000 {
            let (at, len) = if no % 7 == 0 {
                let len = 1 + (no * 131) % 2000;
                (space.blocks(len) * BLOCK_LEN, len)
            } else {
                let inline = no % 3 == 0;
                let len = 64 + (no * 97) % if inline { 440 } else { 1200 };
                (space.inode(shape(64, len, inline)), len)
            };
            taken.push(at..at + len);
        }
        taken.sort_by_key(|range| range.start);
        assert!(taken.windows(2).all(|pair| pair[0].end <= pair[1].start));
        assert!(taken.last().is_some_and(|last| last.end <= space.end()));
    }
}
