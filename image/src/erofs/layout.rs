//! What stands on disk, as Linux defines it in fs/erofs/erofs_fs.h. Each struct and constant names its source there.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// First four bytes of the superblock (`EROFS_SUPER_MAGIC_V1`, include/uapi/linux/magic.h).
pub(super) const MAGIC: u32 = 0xe0f5_e1e2;
/// Where the superblock stands, in bytes (`EROFS_SUPER_OFFSET`).
pub(super) const SUPERBLOCK_OFFSET: usize = 1024;
/// The smallest block, in bits: a sector and a tar block. What we write.
pub(super) const BLOCK_BITS: u8 = 9;
/// Bytes in a block that we write.
pub(super) const BLOCK_LEN: u64 = 1 << BLOCK_BITS;
/// The largest block that any kernel takes, in bits: a 64 KiB page.
pub(super) const BLOCK_BITS_MAX: u8 = 16;
/// An inode stands at a multiple of this, and its nid counts them (`islotbits`, fs/erofs/super.c).
pub(super) const INODE_SLOT_LEN: u64 = 32;
/// Bytes in a slot of the device table; `devt_slotoff` counts them (`EROFS_DEVT_SLOT_SIZE`).
pub(super) const DEVICE_SLOT_LEN: u64 = 128;
/// Longest name in a directory, in bytes (`EROFS_NAME_LEN`).
pub(super) const NAME_LEN_MAX: usize = 255;
/// A block address that means a hole (`EROFS_NULL_ADDR`).
pub(super) const NULL_ADDRESS: u32 = u32::MAX;

/// The superblock has a checksum (`EROFS_FEATURE_COMPAT_SB_CHKSUM`).
pub(super) const FEATURE_COMPAT_CHECKSUM: u32 = 0x1;
/// Inode times are modification times (`EROFS_FEATURE_COMPAT_MTIME`).
pub(super) const FEATURE_COMPAT_MTIME: u32 = 0x2;
/// Compressed clusters are padded in front; says nothing of uncompressed images, but mkfs.erofs sets it
/// (`EROFS_FEATURE_INCOMPAT_ZERO_PADDING`).
pub(super) const FEATURE_INCOMPAT_ZERO_PADDING: u32 = 0x1;
/// There are chunk-based inodes (`EROFS_FEATURE_INCOMPAT_CHUNKED_FILE`).
pub(super) const FEATURE_INCOMPAT_CHUNKED_FILE: u32 = 0x4;
/// There are external devices (`EROFS_FEATURE_INCOMPAT_DEVICE_TABLE`).
pub(super) const FEATURE_INCOMPAT_DEVICE_TABLE: u32 = 0x8;

/// Data in whole blocks from one address (`EROFS_INODE_FLAT_PLAIN`).
pub(super) const LAYOUT_FLAT_PLAIN: u16 = 0;
/// The same, but the last block's bytes follow the inode (`EROFS_INODE_FLAT_INLINE`).
pub(super) const LAYOUT_FLAT_INLINE: u16 = 2;
/// Chunks of equal size, each with an address of its own (`EROFS_INODE_CHUNK_BASED`).
pub(super) const LAYOUT_CHUNK_BASED: u16 = 4;
/// `i_format`: bit 0 is set for the 64-byte form (`EROFS_I_VERSION_BIT`).
pub(super) const FORMAT_EXTENDED: u16 = 1;
/// `i_format`: the data layout stands from here (`EROFS_I_DATALAYOUT_BIT`).
pub(super) const FORMAT_LAYOUT_SHIFT: u16 = 1;
/// `i_format`: the bits that have a meaning (`EROFS_I_ALL`).
pub(super) const FORMAT_ALL: u16 = 0xf;

/// Chunk format: log2 of the blocks in a chunk (`EROFS_CHUNK_FORMAT_BLKBITS_MASK`).
pub(super) const CHUNK_FORMAT_BLOCK_BITS_MASK: u16 = 0x1f;
/// Chunk format: 8-byte indexes with a device instead of 4-byte addresses (`EROFS_CHUNK_FORMAT_INDEXES`).
pub(super) const CHUNK_FORMAT_INDEXES: u16 = 0x20;

/// File type bits of a mode (`S_IFMT`, include/uapi/linux/stat.h), and their values below.
pub(super) const MODE_TYPE_MASK: u16 = 0o170_000;
pub(super) const MODE_FIFO: u16 = 0o010_000;
pub(super) const MODE_CHAR_DEVICE: u16 = 0o020_000;
pub(super) const MODE_DIRECTORY: u16 = 0o040_000;
pub(super) const MODE_BLOCK_DEVICE: u16 = 0o060_000;
pub(super) const MODE_REGULAR: u16 = 0o100_000;
pub(super) const MODE_SYMLINK: u16 = 0o120_000;
pub(super) const MODE_SOCKET: u16 = 0o140_000;

/// File types in directory entries (`EROFS_FT_*`, the values of `FT_*` in include/linux/fs_types.h).
pub(super) const ENTRY_REGULAR: u8 = 1;
pub(super) const ENTRY_DIRECTORY: u8 = 2;
pub(super) const ENTRY_CHAR_DEVICE: u8 = 3;
pub(super) const ENTRY_BLOCK_DEVICE: u8 = 4;
pub(super) const ENTRY_FIFO: u8 = 5;
pub(super) const ENTRY_SOCKET: u8 = 6;
pub(super) const ENTRY_SYMLINK: u8 = 7;

/// `struct erofs_super_block`.
#[derive(Debug, Clone, Copy, Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct Superblock {
    pub(super) magic: U32,
    pub(super) checksum: U32,
    pub(super) feature_compat: U32,
    /// `blkszbits`
    pub(super) block_bits: u8,
    /// `sb_extslots`
    pub(super) extension_slots: u8,
    pub(super) root_nid: U16,
    /// `inos`
    pub(super) inode_count: U64,
    pub(super) build_time: U64,
    /// `build_time_nsec`
    pub(super) build_time_nanoseconds: U32,
    pub(super) blocks: U32,
    /// `meta_blkaddr`
    pub(super) meta_block: U32,
    /// `xattr_blkaddr`
    pub(super) xattr_block: U32,
    pub(super) uuid: [u8; 16],
    pub(super) volume_name: [u8; 16],
    pub(super) feature_incompat: U32,
    /// `u1`
    pub(super) compression: U16,
    pub(super) extra_devices: U16,
    /// `devt_slotoff`
    pub(super) device_table_slot: U16,
    /// `dirblkbits`
    pub(super) directory_block_bits: u8,
    pub(super) xattr_prefix_count: u8,
    pub(super) xattr_prefix_start: U32,
    pub(super) packed_nid: U64,
    pub(super) xattr_filter_reserved: u8,
    pub(super) reserved: [u8; 23],
}

/// `struct erofs_deviceslot`.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct DeviceTableSlot {
    pub(super) tag: [u8; 64],
    pub(super) blocks: U32,
    /// `mapped_blkaddr`
    pub(super) mapped_block: U32,
    pub(super) reserved: [u8; 56],
}

/// `struct erofs_inode_compact`.
#[derive(Debug, Clone, Copy, Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct CompactInode {
    pub(super) format: U16,
    pub(super) xattr_count: U16,
    pub(super) mode: U16,
    pub(super) link_count: U16,
    pub(super) size: U32,
    pub(super) reserved: U32,
    /// `i_u`: first block, device number, or chunk format
    pub(super) union: U32,
    pub(super) ino: U32,
    pub(super) uid: U16,
    pub(super) gid: U16,
    pub(super) reserved2: U32,
}

/// `struct erofs_inode_extended`.
#[derive(Debug, Clone, Copy, Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct ExtendedInode {
    pub(super) format: U16,
    pub(super) xattr_count: U16,
    pub(super) mode: U16,
    pub(super) reserved: U16,
    pub(super) size: U64,
    /// `i_u`: first block, device number, or chunk format
    pub(super) union: U32,
    pub(super) ino: U32,
    pub(super) uid: U32,
    pub(super) gid: U32,
    pub(super) mtime: U64,
    pub(super) mtime_nanoseconds: U32,
    pub(super) link_count: U32,
    pub(super) reserved2: [u8; 16],
}

/// `struct erofs_xattr_ibody_header`, without the array of shared ids behind it.
#[derive(Debug, Clone, Copy, Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct XattrHeader {
    pub(super) name_filter: U32,
    pub(super) shared_count: u8,
    pub(super) reserved: [u8; 7],
}

/// `struct erofs_xattr_entry`, without the name and the value behind it.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct XattrEntryHeader {
    pub(super) name_len: u8,
    pub(super) name_index: u8,
    pub(super) value_len: U16,
}

/// `struct erofs_inode_chunk_index`.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct ChunkIndex {
    pub(super) advise: U16,
    pub(super) device_id: U16,
    pub(super) block: U32,
}

/// `struct erofs_dirent`.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct Dirent {
    pub(super) nid: U64,
    pub(super) name_offset: U16,
    pub(super) file_type: u8,
    pub(super) reserved: u8,
}

pub(super) const COMPACT_LEN: usize = size_of::<CompactInode>();
pub(super) const EXTENDED_LEN: usize = size_of::<ExtendedInode>();
pub(super) const XATTR_HEADER_LEN: usize = size_of::<XattrHeader>();
pub(super) const XATTR_ENTRY_LEN: usize = size_of::<XattrEntryHeader>();
pub(super) const CHUNK_INDEX_LEN: usize = size_of::<ChunkIndex>();
pub(super) const DIRENT_LEN: usize = size_of::<Dirent>();

// The sizes that erofs_check_ondisk_layout_definitions() demands.
const _: () = assert!(
    size_of::<Superblock>() == 128
        && size_of::<DeviceTableSlot>() as u64 == DEVICE_SLOT_LEN
        && COMPACT_LEN == 32
        && EXTENDED_LEN == 64
        && XATTR_HEADER_LEN == 12
        && XATTR_ENTRY_LEN == 4
        && CHUNK_INDEX_LEN == 8
        && DIRENT_LEN == 12
);

/// Volume name of our images that hold an extended attribute, and of those that hold none: what
/// [`Image::has_any_xattr`](super::Image::has_any_xattr) looks at. Nothing else uses the name, and it ends in a zero
/// as the kernel demands.
pub(super) const VOLUME_WITH_XATTRS: [u8; 16] = *b"hermes xattr\0\0\0\0";
/// See [`VOLUME_WITH_XATTRS`].
pub(super) const VOLUME_WITHOUT_XATTRS: [u8; 16] = *b"hermes\0\0\0\0\0\0\0\0\0\0";

/// A device number as the kernel stores it in 32 bits (`new_encode_dev`, include/linux/kdev_t.h): 12 bits of major,
/// 20 of minor.
pub(super) fn encode_device(major: u32, minor: u32) -> u32 {
    (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)
}

/// The major and minor number in `encoded` (`new_decode_dev`).
pub(super) fn decode_device(encoded: u32) -> (u32, u32) {
    ((encoded & 0xf_ff00) >> 8, (encoded & 0xff) | ((encoded >> 12) & 0xf_ff00))
}
