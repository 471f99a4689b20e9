//! A tree as an EROFS image: three passes, so that the image is allocated once and written in place.
//!
//! 1. [`walk`]: the order of inodes, and whether the tree is one.
//! 2. [`plan`]: what each inode needs and where it goes.
//! 3. [`emit`]: the bytes.

mod chunks;
mod directory;
mod emit;
mod error;
mod plan;
mod space;
mod symlink;
mod walk;
mod xattrs;

pub use error::{FileProblem, WriteError};

use crate::tree::Tree;

/// Largest image, in bytes: ten million inodes. It is made and mapped in memory on every node.
pub const IMAGE_LEN_MAX_BYTES: u64 = 1 << 30;

/// Changes whenever the same tree would give other bytes, so that whatever keeps images by the name of their tree can
/// tell old ones.
pub const WRITER_VERSION: u32 = 1;

/// The EROFS image of `tree`: metadata, in 512-byte blocks, over one external device per layer.
///
/// The same tree gives the same bytes. Inodes that no directory names are left out. Extended attributes outside
/// `user.`, `trusted.`, `security.` and the two POSIX ACLs are left out too, because the kernel's EROFS shows none of
/// them and our readers must agree with it; no local filesystem lets an unpacker set one.
///
/// # Errors
/// When the tree is no tree, or holds what EROFS cannot; the message names the path.
pub fn write(tree: &Tree) -> Result<Vec<u8>, WriteError> {
    let walk = walk::Walk::new(tree)?;
    let shared = xattrs::SharedXattrs::new(tree, &walk)?;
    let plan = plan::Plan::new(tree, &walk, &shared)?;
    emit::image(tree, &walk, &shared, &plan)
}
