//! Reading nodes in place.

use std::ops::Range;

use super::format::{
    EXTENT_LEN, FLAG_IMPLIED, FLAG_OPAQUE, HEADER_LEN, INLINE_FLAG, KIND_BLOCK_DEVICE, KIND_CHAR_DEVICE,
    KIND_DIRECTORY, KIND_FIFO, KIND_HARD_LINK, KIND_REGULAR, KIND_SPARSE, KIND_SYMLINK, NODE_LEN, XATTR_HEADER_LEN,
    u16_at, u32_at, u64_at,
};
use super::{NodeNo, Toc};
use crate::ids::LogicalOffset;
use crate::tar::BLOCK_LEN_BYTES;
use crate::tree::{Extent, ExtentSource, Timestamp};

/// One name in a layer's tree.
#[derive(Debug, Clone, Copy)]
pub struct Node<'a> {
    toc: &'a Toc,
    no: NodeNo,
    record: &'a [u8],
}

/// What a node is.
#[derive(Debug, Clone)]
pub enum NodeKind<'a> {
    /// A directory.
    Directory {
        /// Its names, sorted bytewise.
        children: Range<NodeNo>,
        /// Whether the layer has no entry of its own for it.
        implied: bool,
        /// Whether it hides what lower layers have in it.
        opaque: bool,
    },
    /// A regular file.
    Regular {
        /// Size in bytes.
        size_bytes: u64,
        /// Where its bytes are.
        extents: Extents<'a>,
    },
    /// A symbolic link.
    Symlink {
        /// Its target.
        target: &'a [u8],
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
    /// One more name of the file at a lower node, which has its metadata.
    HardLink {
        /// That node.
        node: NodeNo,
    },
    /// Not there, whatever lower layers say.
    Whiteout,
}

impl<'a> Node<'a> {
    /// Reads in place; `no` must be a node of `toc`.
    pub(super) fn new(toc: &'a Toc, no: NodeNo) -> Self {
        let at = HEADER_LEN + NODE_LEN * no as usize;
        Self { toc, no, record: &toc.bytes[at..at + NODE_LEN] }
    }

    /// Its place in the table.
    pub fn no(&self) -> NodeNo {
        self.no
    }

    /// Its name in its directory; empty for the root.
    pub fn name(&self) -> &'a [u8] {
        self.toc.string(u32_at(self.record, 0), u32::from(self.record[4]))
    }

    /// Permission bits including set-id and sticky.
    pub fn permissions(&self) -> u16 {
        u16_at(self.record, 6)
    }

    /// Owner.
    pub fn uid(&self) -> u32 {
        u32_at(self.record, 8)
    }

    /// Group.
    pub fn gid(&self) -> u32 {
        u32_at(self.record, 12)
    }

    /// Modification time.
    pub fn mtime(&self) -> Timestamp {
        Timestamp { seconds: u64_at(self.record, 16) as i64, nanoseconds: u32_at(self.record, 24) }
    }

    /// Extended attributes, sorted by name.
    pub fn xattrs(&self) -> Xattrs<'a> {
        match u32_at(self.record, 28) {
            0 => Xattrs { bytes: &[] },
            set => Xattrs { bytes: self.toc.xattr_set(set) },
        }
    }

    /// What it is.
    pub fn kind(&self) -> NodeKind<'a> {
        let (a, b, c) = self.content();
        match self.record[5] {
            KIND_DIRECTORY => {
                NodeKind::Directory { children: a..a + b, implied: c & FLAG_IMPLIED != 0, opaque: c & FLAG_OPAQUE != 0 }
            }
            KIND_REGULAR => NodeKind::Regular { size_bytes: c, extents: Extents::whole(self.toc, a, c) },
            KIND_SPARSE => NodeKind::Regular { size_bytes: c, extents: Extents::sparse(self.toc, a, b) },
            KIND_SYMLINK => NodeKind::Symlink { target: self.toc.string(a, b) },
            KIND_CHAR_DEVICE => NodeKind::CharDevice { major: a, minor: b },
            KIND_BLOCK_DEVICE => NodeKind::BlockDevice { major: a, minor: b },
            KIND_FIFO => NodeKind::Fifo,
            KIND_HARD_LINK => NodeKind::HardLink { node: a },
            // Checked when the table was opened: there is no other kind.
            _ => NodeKind::Whiteout,
        }
    }

    pub(super) fn record(&self) -> &'a [u8] {
        self.record
    }

    /// Fields A, B and C.
    pub(super) fn content(&self) -> (u32, u32, u64) {
        (u32_at(self.record, 32), u32_at(self.record, 36), u64_at(self.record, 40))
    }
}

impl Toc {
    pub(super) fn string(&self, start: u32, len: u32) -> &[u8] {
        let at = self.layout.strings + start as usize;
        &self.bytes[at..at + len as usize]
    }

    /// The bytes of set `set`, from 1.
    pub(super) fn xattr_set(&self, set: u32) -> &[u8] {
        let end_at = self.layout.set_ends + 4 * set as usize;
        let (start, end) = (u32_at(&self.bytes, end_at - 4), u32_at(&self.bytes, end_at));
        &self.bytes[self.layout.xattrs + start as usize..self.layout.xattrs + end as usize]
    }

    /// First byte in the file, length, and place of extent `no`.
    pub(super) fn raw_extent(&self, no: u32) -> (u64, u64, u64) {
        let at = self.layout.extents + EXTENT_LEN * no as usize;
        (u64_at(&self.bytes, at), u64_at(&self.bytes, at + 8), u64_at(&self.bytes, at + 16))
    }
}

/// Where the bytes of a file are, in file order; the layer number in the extents is 0.
#[derive(Debug, Clone)]
pub struct Extents<'a> {
    toc: &'a Toc,
    whole: Option<Extent>,
    sparse: Range<u32>,
}

impl<'a> Extents<'a> {
    fn whole(toc: &'a Toc, start: u32, len_bytes: u64) -> Self {
        let offset = LogicalOffset(u64::from(start) * BLOCK_LEN_BYTES);
        let source = ExtentSource::Layer { layer: 0, offset };
        let extent = Extent { file_offset: 0, len_bytes, source };
        Self { toc, whole: (len_bytes > 0).then_some(extent), sparse: 0..0 }
    }

    fn sparse(toc: &'a Toc, first: u32, count: u32) -> Self {
        Self { toc, whole: None, sparse: first..first + count }
    }
}

impl Iterator for Extents<'_> {
    type Item = Extent;

    fn next(&mut self) -> Option<Extent> {
        if let Some(extent) = self.whole.take() {
            return Some(extent);
        }
        let (file_offset, len_bytes, place) = self.toc.raw_extent(self.sparse.next()?);
        let source = if place & INLINE_FLAG == 0 {
            ExtentSource::Layer { layer: 0, offset: LogicalOffset(place) }
        } else {
            let at = self.toc.layout.inline + (place ^ INLINE_FLAG) as usize;
            ExtentSource::Inline(self.toc.bytes.slice(at..at + len_bytes as usize))
        };
        Some(Extent { file_offset, len_bytes, source })
    }
}

/// One extended attribute, in place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct XattrRef<'a> {
    /// Full name with its prefix.
    pub name: &'a [u8],
    /// Value, any bytes.
    pub value: &'a [u8],
}

/// The extended attributes of a node, sorted by name.
#[derive(Debug, Clone)]
pub struct Xattrs<'a> {
    pub(super) bytes: &'a [u8],
}

impl<'a> Iterator for Xattrs<'a> {
    type Item = XattrRef<'a>;

    /// Ends early on bytes that are no attribute, which the check of a set relies on.
    fn next(&mut self) -> Option<XattrRef<'a>> {
        let (header, rest) = self.bytes.split_at_checked(XATTR_HEADER_LEN)?;
        let (name, rest) = rest.split_at_checked(usize::from(header[0]))?;
        let (value, rest) = rest.split_at_checked(u32_at(header, 1) as usize)?;
        self.bytes = rest;
        Some(XattrRef { name, value })
    }
}
