//! Why a tree cannot be written.

use thiserror::Error;

use super::IMAGE_LEN_MAX_BYTES;
use super::chunks::CHUNK_COUNT_MAX;
use super::symlink::TARGET_LEN_MAX_BYTES;
use crate::erofs::layout::NAME_LEN_MAX;
use crate::ids::DiffId;

/// A tree that no EROFS image can hold.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum WriteError {
    /// There is no inode, or the first one is no directory that holds itself.
    #[error("the tree has no root directory: its first inode must be a directory that is its own parent")]
    Root,
    /// More layers than device numbers.
    #[error("the tree has {0} layers; an EROFS device table names at most {max}", max = u16::MAX)]
    LayerCount(usize),
    /// A layer that block addresses do not span.
    #[error("layer {diff_id} is {len_bytes} bytes long; block addresses of 32 bits reach 2 TiB")]
    LayerLength {
        /// The layer.
        diff_id: DiffId,
        /// Length of its logical space.
        len_bytes: u64,
    },
    /// The image itself would be too large.
    #[error("the image would have {len_bytes} bytes, more than {IMAGE_LEN_MAX_BYTES}")]
    ImageLength {
        /// What the tree needs.
        len_bytes: u64,
    },
    /// One file cannot be written.
    #[error("{path}: {problem}")]
    File {
        /// Path in the tree, from the root, with `\x` escapes for what is not printable ASCII.
        path: String,
        /// What is wrong with it.
        problem: FileProblem,
    },
}

/// What is wrong with one file.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum FileProblem {
    /// A name that no directory can hold.
    #[error(
        "entry '{name}' needs a name of 1 to {NAME_LEN_MAX} bytes, without slash or zero byte, other than . and .."
    )]
    EntryName {
        /// The name, escaped.
        name: String,
    },
    /// Entries that are not sorted, or the same name twice.
    #[error("entry '{name}' does not come after the one before it")]
    EntryOrder {
        /// The name, escaped.
        name: String,
    },
    /// An entry for an inode that the tree does not have.
    #[error("entry '{name}' names inode {inode}, which the tree does not have")]
    EntryInode {
        /// The name, escaped.
        name: String,
        /// The inode's index.
        inode: u32,
    },
    /// A directory with two names, or one that says that another directory holds it.
    #[error("the directory has a second name, or another parent than the one that holds it")]
    Parent,
    /// A link count of zero.
    #[error("the link count is zero")]
    LinkCount,
    /// Nanoseconds of a second or more.
    #[error("the modification time has {0} nanoseconds, more than a second")]
    Nanoseconds(u32),
    /// A symlink target that symlink(2) refuses.
    #[error("the target has {0} bytes; a symlink needs 1 to {TARGET_LEN_MAX_BYTES}, none of them zero")]
    Target(usize),
    /// A device number that has no place in 32 bits.
    #[error("device number {major}:{minor} is beyond 4095:1048575")]
    DeviceNumber {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// An extended attribute that setxattr(2) refuses.
    #[error(
        "extended attribute '{name}' is beyond 255 bytes of name or 65,535 bytes of value, or its name has a zero byte"
    )]
    Xattr {
        /// Full name, escaped.
        name: String,
    },
    /// Too many extended attributes for one inode.
    #[error("the extended attributes take {0} bytes, more than 256 KiB")]
    XattrSpace(u64),
    /// A size that no file can have.
    #[error("a size of {0} bytes is beyond 2^63 - 1")]
    Size(u64),
    /// An extent that breaks the rules of [`Extent`](crate::tree::Extent).
    #[error("the extent at byte {file_offset} {reason}")]
    Extent {
        /// Where it starts in the file.
        file_offset: u64,
        /// Which rule.
        reason: &'static str,
    },
    /// A sparse file with too many, too finely cut pieces.
    #[error("the sparse file needs {0} chunk indexes, more than {CHUNK_COUNT_MAX}")]
    ChunkCount(u64),
}

/// `name` as it can stand in a message.
pub(super) fn printable(name: &[u8]) -> String {
    name.escape_ascii().to_string()
}
