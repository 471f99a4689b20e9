//! What can be wrong with a layer's tar.

use thiserror::Error;

use super::{
    ENTRY_COUNT_MAX, EXTENSION_LEN_MAX_BYTES, INLINE_LEN_MAX_BYTES, LOGICAL_LEN_MAX_BYTES, NAME_LEN_MAX_BYTES,
    PATH_LEN_MAX_BYTES, SYMLINK_LEN_MAX_BYTES, SYMLINKS_FOLLOWED_MAX,
};
use crate::index::toc::TocError;

/// Longest part of a name that a message shows, in bytes; extension headers allow 1 MiB.
const SHOWN_LEN_MAX_BYTES: usize = 512;

/// `name` as a message shows it: printable ASCII, the rest escaped, cut when it is very long.
pub(super) fn shown(name: &[u8]) -> String {
    let cut = &name[..name.len().min(SHOWN_LEN_MAX_BYTES)];
    let dots = if cut.len() < name.len() { "..." } else { "" };
    format!("{}{dots}", cut.escape_ascii())
}

/// Why an extended attribute is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum XattrFault {
    /// The name is empty after its prefix, or longer than 255 bytes.
    #[error("its name is empty or longer than 255 bytes")]
    Name,
    /// The value is longer than 64 KiB.
    #[error("its value is longer than 65536 bytes")]
    ValueTooLong,
    /// A file capability that the kernel would not take.
    #[error("its value is no file capability of version 2 or 3")]
    Capability,
}

/// A layer tar that containerd would not unpack, or that is beyond a limit. Paths are shown as they stand in the tar.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum TarError {
    /// A header's checksum is wrong: damaged, or not a tar.
    #[error("no tar header at byte {offset} (after entry '{after}'): its checksum is wrong")]
    Checksum {
        /// Logical offset of the header.
        offset: u64,
        /// The entry before it; empty at the start.
        after: String,
    },
    /// A numeric field is not a number.
    #[error("entry '{entry}' at byte {offset}: the {field} is not a valid number")]
    Number {
        /// Path of the entry.
        entry: String,
        /// Logical offset of the header.
        offset: u64,
        /// The field.
        field: &'static str,
    },
    /// A PAX extended header is malformed.
    #[error("extended header '{entry}' at byte {offset} is malformed")]
    Pax {
        /// Name of the extended header.
        entry: String,
        /// Logical offset of its header block.
        offset: u64,
    },
    /// An extension header is beyond the limit.
    #[error("extension header '{entry}' at byte {offset} has {len_bytes} bytes, more than {EXTENSION_LEN_MAX_BYTES}")]
    ExtensionTooLong {
        /// Name of the extension header.
        entry: String,
        /// Logical offset of its header block.
        offset: u64,
        /// Its length.
        len_bytes: u64,
    },
    /// One block of zeros that is not followed by another one.
    #[error("the zero block before byte {offset} (after entry '{after}') is followed by more data")]
    LoneZeroBlock {
        /// Logical offset of the block after the zero block.
        offset: u64,
        /// The entry before it; empty at the start.
        after: String,
    },
    /// The stream ends inside a header or a file.
    #[error("the tar ends at byte {offset}, inside entry '{entry}' or the header after it")]
    Truncated {
        /// Length of the stream.
        offset: u64,
        /// The last entry that was seen.
        entry: String,
    },
    /// A sparse map is malformed, or does not fit the data.
    #[error("sparse file '{entry}': {fault}")]
    Sparse {
        /// Path of the entry.
        entry: String,
        /// What is wrong.
        fault: &'static str,
    },
    /// The layer's sparse files have too many bytes at odd places.
    #[error(
        "sparse file '{entry}' brings the layer over {INLINE_LEN_MAX_BYTES} bytes of segments that are not aligned to 512 bytes"
    )]
    InlineTooLong {
        /// Path of the entry.
        entry: String,
    },
    /// More entries than [`ENTRY_COUNT_MAX`].
    #[error("the layer has more than {ENTRY_COUNT_MAX} entries; the first beyond is '{entry}'")]
    TooManyEntries {
        /// Path of the first entry beyond the limit.
        entry: String,
    },
    /// The data ends beyond [`LOGICAL_LEN_MAX_BYTES`].
    #[error("entry '{entry}' ends beyond {LOGICAL_LEN_MAX_BYTES} bytes of tar")]
    TooFar {
        /// Path of the entry.
        entry: String,
    },
    /// The layer's tree needs more memory than the limit of one part of it.
    #[error("entry '{entry}' brings the layer over {limit} {what}")]
    Limit {
        /// Path of the entry.
        entry: String,
        /// What is limited, in the plural.
        what: &'static str,
        /// The limit.
        limit: u64,
    },
    /// The path or one component of it is longer than the kernel allows.
    #[error(
        "entry '{entry}': the path is longer than {PATH_LEN_MAX_BYTES} bytes or a name in it longer than {NAME_LEN_MAX_BYTES}"
    )]
    PathTooLong {
        /// Path of the entry.
        entry: String,
    },
    /// The path holds a NUL.
    #[error("entry '{entry}': the path holds a NUL byte")]
    NulInPath {
        /// Path of the entry.
        entry: String,
    },
    /// Something on the way to the entry is no directory.
    #[error("entry '{entry}': '{parent}' on its way is not a directory")]
    NotADirectory {
        /// Path of the entry.
        entry: String,
        /// What is no directory.
        parent: String,
    },
    /// Symbolic links on the way to the entry lead in a circle.
    #[error("entry '{entry}': more than {SYMLINKS_FOLLOWED_MAX} symbolic links on its way")]
    TooManySymlinks {
        /// Path of the entry.
        entry: String,
    },
    /// A type that containerd does not unpack.
    #[error("entry '{entry}' has the unsupported type 0x{type_flag:02x}")]
    UnsupportedType {
        /// Path of the entry.
        entry: String,
        /// The header's type flag.
        type_flag: u8,
    },
    /// A whiteout of no name.
    #[error("entry '{entry}' is a whiteout of no valid name")]
    InvalidWhiteout {
        /// Path of the entry.
        entry: String,
    },
    /// A symbolic link with an empty or too long target.
    #[error("symbolic link '{entry}': its target is empty or longer than {SYMLINK_LEN_MAX_BYTES} bytes")]
    SymlinkTarget {
        /// Path of the entry.
        entry: String,
    },
    /// A hard link to a name that the layer does not have.
    #[error("hard link '{entry}': its target '{target}' is not in the layer")]
    DanglingHardLink {
        /// Path of the entry.
        entry: String,
        /// The target as it stands in the tar.
        target: String,
    },
    /// A hard link to a directory.
    #[error("hard link '{entry}': its target '{target}' is a directory")]
    HardLinkToDirectory {
        /// Path of the entry.
        entry: String,
        /// The target as it stands in the tar.
        target: String,
    },
    /// An extended attribute that the kernel would refuse.
    #[error("entry '{entry}': extended attribute '{name}' is refused")]
    Xattr {
        /// Path of the entry.
        entry: String,
        /// Name of the attribute.
        name: String,
        /// Why.
        #[source]
        fault: XattrFault,
    },
    /// The finished table does not pass its own check: the caller gave a logical length that the entries exceed.
    #[error("the layer's table of contents is not consistent with its logical length")]
    Toc(#[from] TocError),
}
