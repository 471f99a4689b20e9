//! The bytes of a planned image.

use std::borrow::Cow;

use zerocopy::IntoBytes;

use super::chunks::FileMap;
use super::directory::{self, all_entries};
use super::error::WriteError;
use super::plan::{DEVICE_TABLE_SLOT, Data, Plan, Planned, chunks_offset, device_number};
use super::walk::{Step, Walk};
use super::xattrs::SharedXattrs;
use crate::erofs::layout::{
    BLOCK_BITS, BLOCK_LEN, COMPACT_LEN, CompactInode, DEVICE_SLOT_LEN, DeviceTableSlot, ENTRY_BLOCK_DEVICE,
    ENTRY_CHAR_DEVICE, ENTRY_DIRECTORY, ENTRY_FIFO, ENTRY_REGULAR, ENTRY_SYMLINK, EXTENDED_LEN, ExtendedInode,
    FEATURE_COMPAT_MTIME, FEATURE_INCOMPAT_CHUNKED_FILE, FEATURE_INCOMPAT_DEVICE_TABLE, FORMAT_EXTENDED,
    FORMAT_LAYOUT_SHIFT, LAYOUT_CHUNK_BASED, LAYOUT_FLAT_INLINE, LAYOUT_FLAT_PLAIN, MAGIC, MODE_BLOCK_DEVICE,
    MODE_CHAR_DEVICE, MODE_DIRECTORY, MODE_FIFO, MODE_REGULAR, MODE_SYMLINK, SUPERBLOCK_OFFSET, Superblock,
    VOLUME_WITH_XATTRS, VOLUME_WITHOUT_XATTRS,
};
use crate::tree::{ExtentSource, InodeIndex, InodeKind, Tree};

/// Writes everything where `plan` says.
pub(super) fn image(tree: &Tree, walk: &Walk, shared: &SharedXattrs<'_>, plan: &Plan) -> Result<Vec<u8>, WriteError> {
    let mut image = vec![0; plan.len as usize];
    write_devices(tree, &mut image);
    let xattr_area = (plan.xattr_block * BLOCK_LEN) as usize;
    image[xattr_area..xattr_area + shared.area.len()].copy_from_slice(&shared.area);
    let writer = Writer { tree, shared, plan };
    let mut ino = 0;
    for step in &walk.steps {
        if let Step::Inode(index) = *step {
            ino += 1;
            writer.inode(index, ino, &mut image).map_err(|problem| walk.problem(tree, index, problem))?;
        }
    }
    write_superblock(tree, walk, shared, plan, &mut image);
    Ok(image)
}

fn write_devices(tree: &Tree, image: &mut [u8]) {
    for (no, layer) in tree.layers.iter().enumerate() {
        let mut tag = [0; 64];
        tag.copy_from_slice(layer.diff_id.hex().as_bytes());
        let slot = DeviceTableSlot {
            tag,
            // The planner checked that it fits.
            blocks: (layer.logical_len_bytes.div_ceil(BLOCK_LEN) as u32).into(),
            mapped_block: 0.into(),
            reserved: [0; 56],
        };
        let at = (usize::from(DEVICE_TABLE_SLOT) + no) * DEVICE_SLOT_LEN as usize;
        image[at..at + slot.as_bytes().len()].copy_from_slice(slot.as_bytes());
    }
}

/// The superblock comes last, because its uuid is made from all other bytes. It has no checksum: with blocks shorter
/// than what lies in front of the superblock, fsck.erofs 1.8 takes the length to sum for a negative one and dies
/// (docs/decisions/0003-erofs-image.md).
fn write_superblock(tree: &Tree, walk: &Walk, shared: &SharedXattrs<'_>, plan: &Plan, image: &mut [u8]) {
    let devices = if tree.layers.is_empty() { 0 } else { FEATURE_INCOMPAT_DEVICE_TABLE };
    let mut superblock = Superblock {
        magic: MAGIC.into(),
        feature_compat: FEATURE_COMPAT_MTIME.into(),
        block_bits: BLOCK_BITS,
        // Block addresses and the root's nid are bounded by the plan.
        root_nid: (plan.nid(0) as u16).into(),
        inode_count: u64::from(walk.inode_count).into(),
        // Seconds before 1970 are two's complement, as the kernel reads them.
        build_time: (plan.epoch.seconds as u64).into(),
        build_time_nanoseconds: plan.epoch.nanoseconds.into(),
        blocks: ((plan.len / BLOCK_LEN) as u32).into(),
        meta_block: (plan.meta_block as u32).into(),
        xattr_block: (plan.xattr_block as u32).into(),
        volume_name: if shared.any { VOLUME_WITH_XATTRS } else { VOLUME_WITHOUT_XATTRS },
        feature_incompat: (FEATURE_INCOMPAT_CHUNKED_FILE | devices).into(),
        extra_devices: (tree.layers.len() as u16).into(),
        device_table_slot: if tree.layers.is_empty() { 0 } else { DEVICE_TABLE_SLOT }.into(),
        ..Superblock::default()
    };
    let at = SUPERBLOCK_OFFSET..SUPERBLOCK_OFFSET + size_of::<Superblock>();
    image[at.clone()].copy_from_slice(superblock.as_bytes());
    superblock.uuid.copy_from_slice(&blake3::hash(image).as_bytes()[..16]);
    image[at].copy_from_slice(superblock.as_bytes());
}

struct Writer<'a> {
    tree: &'a Tree,
    shared: &'a SharedXattrs<'a>,
    plan: &'a Plan,
}

impl Writer<'_> {
    fn inode(&self, index: InodeIndex, ino: u32, image: &mut [u8]) -> Result<(), super::FileProblem> {
        let inode = &self.tree.inodes[index as usize];
        let planned = self.plan.inodes[index as usize];
        let xattrs = self.shared.body(inode)?;
        let mut union = device_number(&inode.kind);
        let mut layout = LAYOUT_FLAT_PLAIN;
        let header_len = if planned.extended { EXTENDED_LEN } else { COMPACT_LEN };
        let at = planned.offset as usize;
        let xattrs_at = at + header_len;
        let data_at = xattrs_at + xattrs.len() as usize;
        match planned.data {
            Data::None => {}
            Data::Flat { block, tail_len } => {
                layout = if tail_len > 0 { LAYOUT_FLAT_INLINE } else { LAYOUT_FLAT_PLAIN };
                union = block as u32;
                let data = self.flat_data(index, planned.size as usize);
                let (blocks, tail) = data.split_at((planned.size - tail_len) as usize);
                image[(block * BLOCK_LEN) as usize..][..blocks.len()].copy_from_slice(blocks);
                image[data_at..data_at + tail.len()].copy_from_slice(tail);
            }
            Data::Chunks { inline_from } => {
                layout = LAYOUT_CHUNK_BASED;
                if let InodeKind::Regular { size_bytes, extents } = &inode.kind {
                    let inline_from = self.plan.data_block + inline_from;
                    let map = FileMap::new(&self.tree.layers, *size_bytes, extents, inline_from)?;
                    union = u32::from(map.chunk_format());
                    let indexes_at = at + chunks_offset((data_at - at) as u64) as usize;
                    map.write(&mut image[indexes_at..]);
                    let inline = extents.iter().filter_map(|extent| match &extent.source {
                        ExtentSource::Inline(bytes) => Some(bytes),
                        ExtentSource::Layer { .. } => None,
                    });
                    let mut to = (inline_from * BLOCK_LEN) as usize;
                    for bytes in inline {
                        image[to..to + bytes.len()].copy_from_slice(bytes);
                        to += bytes.len().next_multiple_of(BLOCK_LEN as usize);
                    }
                }
            }
        }
        let header = Header { layout, union, ino, xattr_count: xattrs.count(), planned };
        self.header(index, header, &mut image[at..at + header_len]);
        xattrs.write(&mut image[xattrs_at..]);
        Ok(())
    }

    /// The `size` bytes of a directory or a symlink.
    fn flat_data(&self, index: InodeIndex, size: usize) -> Cow<'_, [u8]> {
        match &self.tree.inodes[index as usize].kind {
            InodeKind::Directory { entries, parent } => {
                let named = all_entries(entries, index, *parent).map(|(name, inode)| {
                    (name, self.plan.nid(inode), entry_type(&self.tree.inodes[inode as usize].kind))
                });
                let mut data = vec![0; size];
                directory::write(named, &mut data);
                Cow::Owned(data)
            }
            InodeKind::Symlink { target } => Cow::Borrowed(target),
            _ => Cow::default(),
        }
    }

    fn header(&self, index: InodeIndex, header: Header, out: &mut [u8]) {
        let inode = &self.tree.inodes[index as usize];
        let mode = file_type_bits(&inode.kind) | (inode.permissions & 0o7777);
        let format = header.layout << FORMAT_LAYOUT_SHIFT;
        if header.planned.extended {
            let extended = ExtendedInode {
                format: (format | FORMAT_EXTENDED).into(),
                xattr_count: header.xattr_count.into(),
                mode: mode.into(),
                size: header.planned.size.into(),
                union: header.union.into(),
                ino: header.ino.into(),
                uid: inode.uid.into(),
                gid: inode.gid.into(),
                mtime: (inode.mtime.seconds as u64).into(),
                mtime_nanoseconds: inode.mtime.nanoseconds.into(),
                link_count: inode.link_count.into(),
                ..ExtendedInode::default()
            };
            out.copy_from_slice(extended.as_bytes());
        } else {
            // The planner takes this form only for what fits in it.
            let compact = CompactInode {
                format: format.into(),
                xattr_count: header.xattr_count.into(),
                mode: mode.into(),
                link_count: (inode.link_count as u16).into(),
                size: (header.planned.size as u32).into(),
                union: header.union.into(),
                ino: header.ino.into(),
                uid: (inode.uid as u16).into(),
                gid: (inode.gid as u16).into(),
                ..CompactInode::default()
            };
            out.copy_from_slice(compact.as_bytes());
        }
    }
}

/// What the fixed part says beside the tree's own inode.
struct Header {
    layout: u16,
    union: u32,
    ino: u32,
    xattr_count: u16,
    planned: Planned,
}

fn file_type_bits(kind: &InodeKind) -> u16 {
    match kind {
        InodeKind::Directory { .. } => MODE_DIRECTORY,
        InodeKind::Regular { .. } => MODE_REGULAR,
        InodeKind::Symlink { .. } => MODE_SYMLINK,
        InodeKind::CharDevice { .. } => MODE_CHAR_DEVICE,
        InodeKind::BlockDevice { .. } => MODE_BLOCK_DEVICE,
        InodeKind::Fifo => MODE_FIFO,
    }
}

fn entry_type(kind: &InodeKind) -> u8 {
    match kind {
        InodeKind::Directory { .. } => ENTRY_DIRECTORY,
        InodeKind::Regular { .. } => ENTRY_REGULAR,
        InodeKind::Symlink { .. } => ENTRY_SYMLINK,
        InodeKind::CharDevice { .. } => ENTRY_CHAR_DEVICE,
        InodeKind::BlockDevice { .. } => ENTRY_BLOCK_DEVICE,
        InodeKind::Fifo => ENTRY_FIFO,
    }
}
