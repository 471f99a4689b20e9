//! One entry of a layer tar.

use crate::tree::{Extent, Timestamp, Xattr};

/// An owner or group that unpacking leaves as it is: `(uid_t)-1` of `chown(2)`. New files then belong to root.
pub const ID_UNCHANGED: u32 = u32::MAX;

/// One entry, its extension headers applied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Logical offset where the entry begins, including the extension headers that describe it.
    pub header_start: u64,
    /// Logical offset of the first byte of its data; a multiple of 512.
    pub data_start: u64,
    /// Bytes of data in the tar, without padding and without a sparse map.
    pub stored_len_bytes: u64,
    /// Path as it stands in the tar: any bytes.
    pub path: Vec<u8>,
    /// What all kinds have.
    pub metadata: Metadata,
    /// What it is.
    pub kind: EntryKind,
}

/// Owner, mode, time and attributes of an entry.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Metadata {
    /// Permission bits including set-id and sticky: `mode & 0o7777`.
    pub permissions: u16,
    /// Owner, the low 32 bits of what the tar says, as `chown(2)` takes it; [`ID_UNCHANGED`] changes nothing.
    pub uid: u32,
    /// Group, likewise.
    pub gid: u32,
    /// Modification time as it stands in the tar.
    pub mtime: Timestamp,
    /// `SCHILY.xattr.*` records, sorted by name, with whatever names the tar has.
    pub xattrs: Vec<Xattr>,
}

/// The kinds of entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EntryKind {
    /// A directory.
    Directory,
    /// A regular file, whole or sparse.
    Regular {
        /// Size in bytes.
        size_bytes: u64,
        /// Where the bytes are, by the rules of [`Extent`]; the layer number in them is 0.
        extents: Vec<Extent>,
    },
    /// A symbolic link.
    Symlink {
        /// Its target.
        target: Vec<u8>,
    },
    /// One more name of a file.
    HardLink {
        /// Path of the other name as it stands in the tar.
        target: Vec<u8>,
    },
    /// A character device.
    CharDevice {
        /// Major number, 12 bits.
        major: u32,
        /// Minor number, 20 bits.
        minor: u32,
    },
    /// A block device.
    BlockDevice {
        /// Major number, 12 bits.
        major: u32,
        /// Minor number, 20 bits.
        minor: u32,
    },
    /// A named pipe.
    Fifo,
    /// A PAX global header. Its records apply to nothing (Go gives them to the program, and containerd ignores them),
    /// but containerd clears its path like that of any other entry.
    GlobalHeader,
    /// A type that containerd refuses, unless the name makes it a whiteout or the root.
    Unsupported {
        /// The header's type flag.
        type_flag: u8,
    },
}
