//! EROFS: a [`Tree`](crate::tree::Tree) as a standard read-only filesystem image, and back.
//!
//! One format, three readers: the kernel mounts an image over layer files (`device=`), our FUSE server reads it in
//! place with [`Image`], and `fsck.erofs` judges it. [`write()`](fn@write) makes only what Linux 6.12 reads in a file-backed mount
//! with 512-byte blocks (6.4 on a block device).
//!
//! # What an image holds
//!
//! Metadata only. A file's bytes stay in the layer's uncompressed tar, which is external device *n* for layer *n - 1*;
//! its slot in the device table carries the diffID as 64 hexadecimal digits. The few bytes that no block of a layer
//! can show ([`ExtentSource::Inline`](crate::tree::ExtentSource::Inline)) lie in blocks of the image itself.
//!
//! | from | what |
//! |---|---|
//! | 0 | 1,024 zero bytes |
//! | 1,024 | superblock, 128 bytes; its uuid is the start of the BLAKE3 of all other bytes |
//! | 1,152 | device table, 128 bytes a layer |
//! | `xattr_blkaddr` | extended attributes that several inodes share, each once |
//! | `meta_blkaddr` | inodes in 32-byte slots, whole blocks of directory entries and long symlink targets between them |
//! | after it | inline file bytes, whole blocks |
//!
//! Inodes lie in the order in which a walk looks at them: the entries of a directory side by side, then those of its
//! first subdirectory. The same tree gives the same bytes, on every machine and in every version of this module that
//! has the same [`WRITER_VERSION`].
//!
//! # Trust
//!
//! A node makes its images itself, but [`Image`] still treats every byte as hostile: offsets are checked before they
//! are followed, nothing is allocated for what the image claims, and every loop is bounded by the image's own length.

mod crc32c;
mod layout;
mod read;
mod write;
mod xattr_name;

#[cfg(test)]
mod tests;

pub use read::{
    Attributes, DeviceNumber, DeviceSlot, DirEntry, Extents, FileType, Image, MappedRange, Nid, RangeSource, ReadDir,
    ReadError, XattrEntries, XattrEntry,
};
pub use write::{FileProblem, IMAGE_LEN_MAX_BYTES, WRITER_VERSION, WriteError, write};
pub use xattr_name::XattrName;
