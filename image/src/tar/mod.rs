//! Layer tars: stream -> entries -> the tree that they unpack to.
//!
//! [`TarWalker`] takes a layer's uncompressed tar stream in pieces of any size and gives the [`Entry`]s in it, with
//! their places in the stream. [`LayerTree`] applies the entries one after the other, as containerd unpacks them into
//! an empty overlay upper directory, and ends as the layer's table of contents ([`crate::index::toc::Toc`]).
//!
//! containerd is the measure of both: what it accepts is accepted, with the same result, and what it refuses is
//! refused with the entry's name. That means Go's `archive/tar` for the format (v7, ustar, PAX, GNU and star headers,
//! PAX and GNU extensions, sparse files) and containerd's `archive` package for the rest. There are three deliberate
//! differences, all towards accepting more: GNU sparse (`S`) and contiguous (`7`) files are regular files, where
//! containerd knows their format but refuses their type; a hard link may come before its target; and a whiteout may
//! follow the file of the same layer that it hides. In one odd case the result differs: a file that takes the place of a
//! directory of the same layer has its own time here, and the directory's in containerd, which sets the times of
//! directories last and by path.
//!
//! Both parts work in bounded memory: the limits stand below, and are checked before anything is allocated.

mod arena;
mod encode;
mod entry;
mod error;
mod header;
mod number;
mod path;
mod pax;
mod sparse;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
mod tree;
mod walker;
mod xattrs;

pub use entry::{Entry, EntryKind, ID_UNCHANGED, Metadata};
pub use error::{TarError, XattrFault};
pub use tree::LayerTree;
pub use walker::TarWalker;

/// A tar block in bytes; headers and data start at multiples of it.
pub const BLOCK_LEN_BYTES: u64 = 512;
/// Longest extension header (PAX records, GNU long name, GNU sparse map 1.0) in bytes: Go's `maxSpecialFileSize`.
pub const EXTENSION_LEN_MAX_BYTES: u64 = 1 << 20;
/// Most entries in one layer. The largest public images have about 10^6 files; at 512 bytes a header this is 1 GiB of
/// headers.
pub const ENTRY_COUNT_MAX: u32 = 1 << 21;
/// Longest path in bytes, after cleaning: Linux `PATH_MAX`.
pub const PATH_LEN_MAX_BYTES: usize = 4096;
/// Longest component of a path in bytes: Linux `NAME_MAX`.
pub const NAME_LEN_MAX_BYTES: usize = 255;
/// Longest target of a symbolic link in bytes: `PATH_MAX` without the closing NUL.
pub const SYMLINK_LEN_MAX_BYTES: usize = 4095;
/// Most symbolic links followed on the way to one entry: the limit of containerd's `fs.RootPath`.
pub const SYMLINKS_FOLLOWED_MAX: u32 = 255;
/// Most data segments of one sparse file: as many as a map of [`EXTENSION_LEN_MAX_BYTES`] can name.
pub const SPARSE_SEGMENT_COUNT_MAX: usize = 1 << 18;
/// Largest sparse file in bytes: the largest file of ext4 with 4 KiB blocks, 16 TiB.
pub const SPARSE_SIZE_MAX_BYTES: u64 = 1 << 44;
/// Most bytes of sparse files in one layer that no EROFS block can point to and that the index carries itself.
pub const INLINE_LEN_MAX_BYTES: u64 = 16 << 20;
/// Longest value of an extended attribute in bytes: Linux `XATTR_SIZE_MAX`.
pub const XATTR_VALUE_LEN_MAX_BYTES: usize = 65536;
/// Longest logical space in bytes: 2^32 blocks of 512, what the chunk table and EROFS block numbers can name.
pub const LOGICAL_LEN_MAX_BYTES: u64 = 1 << 41;
