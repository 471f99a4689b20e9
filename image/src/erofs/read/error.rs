//! Why an image, or one inode of it, cannot be read.

use thiserror::Error;

use super::Nid;

/// Bytes that are no EROFS image that this reader knows, or a damaged one, or a question that an inode has no answer to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum ReadError {
    /// Too short for what the superblock says.
    #[error("the EROFS image ends after {len_bytes} bytes, before its {what}")]
    Truncated {
        /// Length of the image.
        len_bytes: u64,
        /// What is missing.
        what: &'static str,
    },
    /// The magic number is missing.
    #[error("not an EROFS image")]
    Magic,
    /// A block size that no kernel has.
    #[error("EROFS blocks of 2^{0} bytes are not known; 2^9 to 2^16 are")]
    BlockSize(u8),
    /// The superblock was changed after it was written.
    #[error("the EROFS superblock has checksum {actual:#010x} where it says {expected:#010x}")]
    Checksum {
        /// What the superblock says.
        expected: u32,
        /// What its bytes give.
        actual: u32,
    },
    /// Features that change the format, such as compression.
    #[error("the EROFS image uses features {0:#x} that this reader does not know")]
    Features(u32),
    /// An inode, or what it points to, that cannot be.
    #[error("inode {nid} of the EROFS image is damaged: {what}")]
    Damaged {
        /// The inode.
        nid: Nid,
        /// What is wrong.
        what: &'static str,
    },
    /// The inode is of another kind than the question is for.
    #[error("inode {nid} is not a {expected}")]
    Kind {
        /// The inode.
        nid: Nid,
        /// What the question is for.
        expected: &'static str,
    },
}
