//! What each inode needs, and where it goes.

use std::cmp::Reverse;
use std::collections::HashMap;

use super::chunks::{FileMap, inline_blocks};
use super::directory::{self, all_entries};
use super::error::{FileProblem, WriteError};
use super::space::{Shape, Space};
use super::walk::{Step, Walk};
use super::xattrs::{Body, SharedXattrs};
use super::{IMAGE_LEN_MAX_BYTES, symlink};
use crate::erofs::layout::{
    BLOCK_LEN, CHUNK_INDEX_LEN, COMPACT_LEN, DEVICE_SLOT_LEN, EXTENDED_LEN, INODE_SLOT_LEN, NULL_ADDRESS,
    SUPERBLOCK_OFFSET, Superblock, encode_device,
};
use crate::tree::{Inode, InodeIndex, InodeKind, Timestamp, Tree};

/// Where the device table starts, in slots: right after the superblock.
pub(super) const DEVICE_TABLE_SLOT: u16 =
    ((SUPERBLOCK_OFFSET + size_of::<Superblock>()) / DEVICE_SLOT_LEN as usize) as u16;

/// How an inode is written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Planned {
    /// Where it starts in the image, in bytes; 0 for an inode without a name.
    pub(super) offset: u64,
    /// Whether it takes the 64-byte form.
    pub(super) extended: bool,
    /// `i_size`.
    pub(super) size: u64,
    /// Where its data is.
    pub(super) data: Data,
}

/// Where an inode's data is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum Data {
    /// Nowhere: an empty file, a device, a pipe.
    #[default]
    None,
    /// In the image: a directory or a symlink target.
    Flat {
        /// First of its whole blocks, if it has any.
        block: u64,
        /// Length of what lies behind the inode, at the end of the data.
        tail_len: u64,
    },
    /// Where chunk indexes say; the file's inline bytes take the image's data area from this block of it on.
    Chunks {
        /// First block, counted from the start of the data area.
        inline_from: u64,
    },
}

/// The whole image before it is written.
#[derive(Debug)]
pub(super) struct Plan {
    /// By inode index.
    pub(super) inodes: Vec<Planned>,
    /// The time that compact inodes have.
    pub(super) epoch: Timestamp,
    /// First block of the shared extended attributes.
    pub(super) xattr_block: u64,
    /// The block that nids count from.
    pub(super) meta_block: u64,
    /// First block of inline file bytes.
    pub(super) data_block: u64,
    /// Length of the image in bytes, a multiple of the block.
    pub(super) len: u64,
}

impl Plan {
    /// Finds a place for everything.
    pub(super) fn new(tree: &Tree, walk: &Walk, shared: &SharedXattrs<'_>) -> Result<Self, WriteError> {
        let device_count =
            u64::from(u16::try_from(tree.layers.len()).map_err(|_| WriteError::LayerCount(tree.layers.len()))?);
        for layer in &tree.layers {
            // The last address means a hole.
            if layer.logical_len_bytes.div_ceil(BLOCK_LEN) >= u64::from(NULL_ADDRESS) {
                let (diff_id, len_bytes) = (layer.diff_id, layer.logical_len_bytes);
                return Err(WriteError::LayerLength { diff_id, len_bytes });
            }
        }
        let devices_end = (u64::from(DEVICE_TABLE_SLOT) + device_count) * DEVICE_SLOT_LEN;
        let xattr_block = devices_end.div_ceil(BLOCK_LEN);
        let first_block = xattr_block + (shared.area.len() as u64).div_ceil(BLOCK_LEN);
        let mut planner = Planner {
            tree,
            shared,
            epoch: most_frequent_time(tree, walk),
            inodes: vec![Planned::default(); tree.inodes.len()],
            space: Space::new(first_block * BLOCK_LEN),
            inline_blocks: 0,
        };
        for step in &walk.steps {
            match *step {
                Step::Inode(index) => {
                    planner.inode(index).map_err(|problem| walk.problem(tree, index, problem))?;
                }
                Step::Entries(index) => planner.entries(index),
            }
        }
        let data_block = planner.space.end().div_ceil(BLOCK_LEN);
        let len = (data_block + planner.inline_blocks) * BLOCK_LEN;
        if len > IMAGE_LEN_MAX_BYTES {
            return Err(WriteError::ImageLength { len_bytes: len });
        }
        // Nids count from one block before the first inode: the root's has to fit in 16 bits however long the device
        // table is, and none may be 0, which readdir(3) takes for a deleted file.
        let meta_block = first_block - 1;
        let Planner { inodes, epoch, .. } = planner;
        Ok(Self { inodes, epoch, xattr_block, meta_block, data_block, len })
    }

    /// The nid of inode `index`.
    pub(super) fn nid(&self, index: InodeIndex) -> u64 {
        (self.inodes[index as usize].offset - self.meta_block * BLOCK_LEN) / INODE_SLOT_LEN
    }
}

struct Planner<'a> {
    tree: &'a Tree,
    shared: &'a SharedXattrs<'a>,
    epoch: Timestamp,
    inodes: Vec<Planned>,
    space: Space,
    inline_blocks: u64,
}

impl Planner<'_> {
    /// Finds a place for an inode and for what lies behind it.
    fn inode(&mut self, index: InodeIndex) -> Result<(), FileProblem> {
        let inode = &self.tree.inodes[index as usize];
        check(inode)?;
        let xattrs = self.shared.body(inode)?;
        let size = size_of_inode(inode, index);
        let extended = inode.mtime != self.epoch || !is_small(inode) || u32::try_from(size).is_err();
        let header_len = if extended { EXTENDED_LEN } else { COMPACT_LEN } as u64;
        let (data, shape) = match &inode.kind {
            InodeKind::Directory { .. } => flat(header_len, &xattrs, size % BLOCK_LEN),
            InodeKind::Symlink { target } => {
                symlink::check(target)?;
                // Never in two pieces, so that every reader can show it without a copy.
                flat(header_len, &xattrs, size)
            }
            InodeKind::Regular { extents, .. } => {
                let map = FileMap::new(&self.tree.layers, size, extents, self.inline_blocks)?;
                let base = header_len + xattrs.len();
                let count = map.chunk_count();
                if count == 0 {
                    (Data::None, Shape { header_len, len: base, ends_inline: false })
                } else {
                    let data = Data::Chunks { inline_from: self.inline_blocks };
                    self.inline_blocks += inline_blocks(extents);
                    let len = chunks_offset(base) + count * CHUNK_INDEX_LEN as u64;
                    (data, Shape { header_len, len, ends_inline: false })
                }
            }
            InodeKind::CharDevice { major, minor } | InodeKind::BlockDevice { major, minor } => {
                if *major > 0xfff || *minor > 0xf_ffff {
                    return Err(FileProblem::DeviceNumber { major: *major, minor: *minor });
                }
                (Data::None, Shape { header_len, len: header_len + xattrs.len(), ends_inline: false })
            }
            InodeKind::Fifo => (Data::None, Shape { header_len, len: header_len + xattrs.len(), ends_inline: false }),
        };
        let offset = self.space.inode(shape);
        let data = match (&inode.kind, data) {
            (InodeKind::Symlink { .. }, Data::Flat { tail_len: 0, .. }) => {
                Data::Flat { block: self.space.blocks(size), tail_len: 0 }
            }
            _ => data,
        };
        self.inodes[index as usize] = Planned { offset, extended, size, data };
        Ok(())
    }

    /// Takes the whole blocks of a directory, in front of the inodes that it names.
    fn entries(&mut self, index: InodeIndex) {
        let planned = &mut self.inodes[index as usize];
        if let Data::Flat { block, tail_len } = &mut planned.data
            && planned.size > *tail_len
        {
            *block = self.space.blocks(planned.size - *tail_len);
        }
    }
}

/// `size` bytes of which the last `tail_len` go behind the inode if they fit in one block with it, else into blocks
/// with the others. The place of blocks is found later.
fn flat(header_len: u64, xattrs: &Body<'_>, tail_len: u64) -> (Data, Shape) {
    let base = header_len + xattrs.len();
    let tail_len = if base + tail_len <= BLOCK_LEN { tail_len } else { 0 };
    (Data::Flat { block: 0, tail_len }, Shape { header_len, len: base + tail_len, ends_inline: tail_len > 0 })
}

/// Where chunk indexes start when `base` bytes of inode and attributes come before (fs/erofs/data.c, `erofs_map_blocks`).
pub(super) fn chunks_offset(base: u64) -> u64 {
    base.next_multiple_of(CHUNK_INDEX_LEN as u64)
}

fn check(inode: &Inode) -> Result<(), FileProblem> {
    if inode.link_count == 0 {
        return Err(FileProblem::LinkCount);
    }
    if inode.mtime.nanoseconds >= 1_000_000_000 {
        return Err(FileProblem::Nanoseconds(inode.mtime.nanoseconds));
    }
    Ok(())
}

/// `i_size`.
fn size_of_inode(inode: &Inode, index: InodeIndex) -> u64 {
    match &inode.kind {
        InodeKind::Directory { entries, parent } => {
            directory::size(all_entries(entries, index, *parent).map(|(name, _)| name))
        }
        InodeKind::Regular { size_bytes, .. } => *size_bytes,
        InodeKind::Symlink { target } => target.len() as u64,
        InodeKind::CharDevice { .. } | InodeKind::BlockDevice { .. } | InodeKind::Fifo => 0,
    }
}

/// Whether all but size and time fit in the compact form.
fn is_small(inode: &Inode) -> bool {
    [inode.uid, inode.gid, inode.link_count].iter().all(|value| u16::try_from(*value).is_ok())
}

/// The time that most inodes have which could be compact; the earliest of several.
fn most_frequent_time(tree: &Tree, walk: &Walk) -> Timestamp {
    let mut counts: HashMap<Timestamp, u32> = HashMap::new();
    for step in &walk.steps {
        if let Step::Inode(index) = step {
            let inode = &tree.inodes[*index as usize];
            if is_small(inode) {
                *counts.entry(inode.mtime).or_default() += 1;
            }
        }
    }
    counts.into_iter().max_by_key(|(time, count)| (*count, Reverse(*time))).map(|(time, _)| time).unwrap_or_default()
}

/// The number that the kernel decodes for a device; 0 for everything else.
pub(super) fn device_number(kind: &InodeKind) -> u32 {
    match kind {
        InodeKind::CharDevice { major, minor } | InodeKind::BlockDevice { major, minor } => {
            encode_device(*major, *minor)
        }
        _ => 0,
    }
}
