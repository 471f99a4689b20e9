//! Where each section of a table stands, and raw reads from it.

use super::{EXTENT_COUNT_MAX, NODE_COUNT_MAX, STRING_LEN_MAX_BYTES, TocError, XATTR_LEN_MAX_BYTES};
use crate::ids::DiffId;
use crate::tar::{INLINE_LEN_MAX_BYTES, LOGICAL_LEN_MAX_BYTES};

pub(super) const MAGIC: &[u8; 8] = b"HERMTOC\0";
pub(super) const VERSION: u16 = 1;
pub(super) const HEADER_LEN: usize = 80;
pub(super) const NODE_LEN: usize = 48;
pub(super) const EXTENT_LEN: usize = 24;
/// Length of an attribute's two length fields.
pub(super) const XATTR_HEADER_LEN: usize = 5;

/// Marks an extent's place as one in the inline section.
pub(super) const INLINE_FLAG: u64 = 1 << 63;

pub(super) const FLAG_IMPLIED: u64 = 1;
pub(super) const FLAG_OPAQUE: u64 = 2;

pub(super) const KIND_DIRECTORY: u8 = 1;
pub(super) const KIND_REGULAR: u8 = 2;
pub(super) const KIND_SPARSE: u8 = 3;
pub(super) const KIND_SYMLINK: u8 = 4;
pub(super) const KIND_CHAR_DEVICE: u8 = 5;
pub(super) const KIND_BLOCK_DEVICE: u8 = 6;
pub(super) const KIND_FIFO: u8 = 7;
pub(super) const KIND_HARD_LINK: u8 = 8;
pub(super) const KIND_WHITEOUT: u8 = 9;

/// The numbers of a header, and the section starts that follow from them.
#[derive(Debug, Clone, Copy)]
pub(super) struct Layout {
    pub(super) logical_len_bytes: u64,
    pub(super) diff_id: DiffId,
    pub(super) node_count: u32,
    pub(super) extent_count: u32,
    pub(super) set_count: u32,
    pub(super) xattrs_len: u32,
    pub(super) strings_len: u32,
    pub(super) inline_len: u32,
    pub(super) extents: usize,
    pub(super) set_ends: usize,
    pub(super) xattrs: usize,
    pub(super) strings: usize,
    pub(super) inline: usize,
}

impl Layout {
    /// Reads a header and checks that `bytes` have exactly the sections that it declares.
    pub(super) fn read(bytes: &[u8]) -> Result<Self, TocError> {
        if bytes.len() < HEADER_LEN || &bytes[..8] != MAGIC {
            return Err(TocError::Magic);
        }
        let version = u16_at(bytes, 8);
        if version != VERSION {
            return Err(TocError::Version(version));
        }
        if u16_at(bytes, 10) != 0 || u32_at(bytes, 76) != 0 {
            return Err(TocError::Reserved);
        }
        let [node_count, extent_count, set_count] = [12, 56, 60].map(|at| u32_at(bytes, at));
        let [xattrs_len, strings_len, inline_len] = [64, 68, 72].map(|at| u32_at(bytes, at));
        let logical_len_bytes = u64_at(bytes, 16);
        if node_count == 0 {
            return Err(TocError::Node { node: 0, fault: "there is no root" });
        }
        for (section, actual, limit) in [
            ("nodes", u64::from(node_count), u64::from(NODE_COUNT_MAX)),
            ("extents", u64::from(extent_count), u64::from(EXTENT_COUNT_MAX)),
            ("attribute sets", u64::from(set_count), u64::from(node_count)),
            ("bytes of attributes", u64::from(xattrs_len), u64::from(XATTR_LEN_MAX_BYTES)),
            ("bytes of strings", u64::from(strings_len), u64::from(STRING_LEN_MAX_BYTES)),
            ("inline bytes", u64::from(inline_len), INLINE_LEN_MAX_BYTES),
            ("bytes of logical space", logical_len_bytes, LOGICAL_LEN_MAX_BYTES),
        ] {
            if actual > limit {
                return Err(TocError::Limit { section, actual, limit });
            }
        }
        let mut diff_id = [0; 32];
        diff_id.copy_from_slice(&bytes[24..56]);
        // The limits above keep every sum below 2^30.
        let extents = HEADER_LEN + NODE_LEN * node_count as usize;
        let set_ends = extents + EXTENT_LEN * extent_count as usize;
        let xattrs = set_ends + 4 * (set_count as usize + 1);
        let strings = xattrs + xattrs_len as usize;
        let inline = strings + strings_len as usize;
        let expected = inline + inline_len as usize;
        if bytes.len() != expected {
            return Err(TocError::Length { expected: expected as u64, actual: bytes.len() as u64 });
        }
        Ok(Self {
            logical_len_bytes,
            diff_id: DiffId(diff_id),
            node_count,
            extent_count,
            set_count,
            xattrs_len,
            strings_len,
            inline_len,
            extents,
            set_ends,
            xattrs,
            strings,
            inline,
        })
    }
}

pub(super) fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

pub(super) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

pub(super) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}
