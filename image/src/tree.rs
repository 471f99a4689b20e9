//! The merged file tree of a chain of layers, in memory: what [`crate::merge`] makes and [`crate::erofs`] writes.

use bytes::Bytes;

use crate::ids::{DiffId, LogicalOffset};

/// An inode of a [`Tree`], by its place in [`Tree::inodes`]. The root directory is inode 0.
pub type InodeIndex = u32;

/// A file tree with hard links, ready to be written as an EROFS image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tree {
    /// The layers that the tree's extents refer to, lowest first; one EROFS device each, in this order.
    pub layers: Vec<TreeLayer>,
    /// All inodes, the root first, in an order that depends on the layers' TOCs only.
    pub inodes: Vec<Inode>,
}

/// One layer of a tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TreeLayer {
    /// The layer's content.
    pub diff_id: DiffId,
    /// Length of its logical space in bytes.
    pub logical_len_bytes: u64,
}

/// What all kinds of file have, and what one kind has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inode {
    /// Permission bits including set-id and sticky: `mode & 0o7777`.
    pub permissions: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Modification time.
    pub mtime: Timestamp,
    /// Number of names. For a directory 2 plus the number of its subdirectories.
    pub link_count: u32,
    /// Extended attributes with their full names, such as `security.capability`, sorted by name.
    pub xattrs: Vec<Xattr>,
    /// What the inode is.
    pub kind: InodeKind,
}

/// Seconds since 1970-01-01 UTC, and nanoseconds (0 to 999,999,999) after it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Timestamp {
    /// Whole seconds, negative before 1970.
    pub seconds: i64,
    /// Nanoseconds after `seconds`.
    pub nanoseconds: u32,
}

/// One extended attribute.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Xattr {
    /// Full name with its prefix.
    pub name: Vec<u8>,
    /// Value, any bytes.
    pub value: Vec<u8>,
}

/// The kinds of file that a layer can hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum InodeKind {
    /// A directory: its entries sorted by name (bytewise), without `.` and `..`.
    Directory {
        /// Name and inode of each entry.
        entries: Vec<(Vec<u8>, InodeIndex)>,
        /// The directory that holds this one; the root holds itself.
        parent: InodeIndex,
    },
    /// A regular file.
    Regular {
        /// Size in bytes.
        size_bytes: u64,
        /// Where the bytes are: sorted by file offset, disjoint; what no extent covers reads as zeros.
        extents: Vec<Extent>,
    },
    /// A symbolic link.
    Symlink {
        /// Target, as it stands in the layer.
        target: Vec<u8>,
    },
    /// A character device.
    CharDevice {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// A block device.
    BlockDevice {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// A named pipe.
    Fifo,
}

/// A run of bytes of a regular file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Extent {
    /// First byte in the file; a multiple of 512.
    pub file_offset: u64,
    /// Length in bytes; a multiple of 512 unless it is the last of the file.
    pub len_bytes: u64,
    /// Where the bytes stand.
    pub source: ExtentSource,
}

/// Where the bytes of an extent stand.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExtentSource {
    /// In a layer's logical space, at a multiple of 512.
    Layer {
        /// Index into [`Tree::layers`].
        layer: u16,
        /// First byte.
        offset: LogicalOffset,
    },
    /// In the index itself: bytes of a sparse file that stand at no multiple of 512 in the tar stream, which no
    /// EROFS block can point to.
    Inline(Bytes),
}
