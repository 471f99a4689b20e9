//! Writing a table.

use bytes::Bytes;

use super::format::{
    EXTENT_LEN, FLAG_IMPLIED, FLAG_OPAQUE, HEADER_LEN, INLINE_FLAG, KIND_BLOCK_DEVICE, KIND_CHAR_DEVICE,
    KIND_DIRECTORY, KIND_FIFO, KIND_HARD_LINK, KIND_REGULAR, KIND_SPARSE, KIND_SYMLINK, KIND_WHITEOUT, MAGIC, NODE_LEN,
    VERSION,
};
use super::{NodeNo, Toc, TocError};
use crate::ids::DiffId;
use crate::tar::BLOCK_LEN_BYTES;
use crate::tree::{Extent, ExtentSource, Timestamp, Xattr};

/// What all kinds of node but hard links and whiteouts have.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct NodeRecord {
    pub(crate) permissions: u16,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime: Timestamp,
    /// From [`TocBuilder::xattr_set`]; 0 for none.
    pub(crate) xattr_set: u32,
}

/// A run of bytes of the text that [`TocBuilder::finish`] is given: its start and length.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Text {
    pub(crate) start: u32,
    pub(crate) len: u32,
}

/// What one kind of node has.
#[derive(Debug, Clone, Copy)]
pub(crate) enum ContentRecord<'a> {
    Directory { first_child: NodeNo, child_count: u32, implied: bool, opaque: bool },
    Regular { start: u64, size_bytes: u64 },
    Sparse { extents: &'a [Extent], size_bytes: u64 },
    Symlink { target: Text },
    CharDevice { major: u32, minor: u32 },
    BlockDevice { major: u32, minor: u32 },
    Fifo,
    HardLink { node: NodeNo },
    Whiteout,
}

/// Collects nodes in order. The caller keeps the order and the limits; [`TocBuilder::finish`] checks them.
///
/// Strings are collected as places in the caller's text and copied at the end, when the caller has let go of all else:
/// a table of 10^6 nodes has 48 MB of records, and so has the tree that it is made of.
#[derive(Debug)]
pub(crate) struct TocBuilder {
    /// The header, then the nodes; the other sections are appended at the end.
    bytes: Vec<u8>,
    node_count: u32,
    extents: Vec<u8>,
    set_ends: Vec<u32>,
    xattrs: Vec<u8>,
    strings: Vec<Text>,
    strings_len: u32,
    inline: Vec<u8>,
}

impl TocBuilder {
    /// A table of `node_count` nodes.
    pub(crate) fn new(node_count: usize) -> Self {
        let mut bytes = Vec::with_capacity(HEADER_LEN + NODE_LEN * node_count);
        bytes.resize(HEADER_LEN, 0);
        Self {
            bytes,
            node_count: 0,
            extents: Vec::new(),
            set_ends: vec![0],
            xattrs: Vec::new(),
            strings: Vec::with_capacity(node_count),
            strings_len: 0,
            inline: Vec::new(),
        }
    }

    /// Appends a set of attributes, sorted by name; sets must come in the order of the first nodes that have them.
    pub(crate) fn xattr_set(&mut self, xattrs: &[Xattr]) -> u32 {
        for xattr in xattrs {
            // Names and values are within their limits, which LayerTree checks.
            self.xattrs.push(xattr.name.len() as u8);
            self.xattrs.extend_from_slice(&(xattr.value.len() as u32).to_le_bytes());
            self.xattrs.extend_from_slice(&xattr.name);
            self.xattrs.extend_from_slice(&xattr.value);
        }
        self.set_ends.push(self.xattrs.len() as u32);
        (self.set_ends.len() - 1) as u32
    }

    /// Appends the next node.
    pub(crate) fn node(&mut self, name: Text, node: NodeRecord, content: ContentRecord<'_>) {
        let name_start = self.string(name);
        let (kind, a, b, c) = self.content(content);
        let out = &mut self.bytes;
        out.extend_from_slice(&name_start.to_le_bytes());
        out.extend_from_slice(&[name.len as u8, kind]);
        out.extend_from_slice(&node.permissions.to_le_bytes());
        out.extend_from_slice(&node.uid.to_le_bytes());
        out.extend_from_slice(&node.gid.to_le_bytes());
        out.extend_from_slice(&node.mtime.seconds.to_le_bytes());
        out.extend_from_slice(&node.mtime.nanoseconds.to_le_bytes());
        out.extend_from_slice(&node.xattr_set.to_le_bytes());
        out.extend_from_slice(&a.to_le_bytes());
        out.extend_from_slice(&b.to_le_bytes());
        out.extend_from_slice(&c.to_le_bytes());
        self.node_count += 1;
    }

    fn content(&mut self, content: ContentRecord<'_>) -> (u8, u32, u32, u64) {
        match content {
            ContentRecord::Directory { first_child, child_count, implied, opaque } => {
                let flags = if implied { FLAG_IMPLIED } else { 0 } | if opaque { FLAG_OPAQUE } else { 0 };
                (KIND_DIRECTORY, first_child, child_count, flags)
            }
            ContentRecord::Regular { size_bytes: 0, .. } => (KIND_REGULAR, 0, 0, 0),
            ContentRecord::Regular { start, size_bytes } => {
                (KIND_REGULAR, (start / BLOCK_LEN_BYTES) as u32, 0, size_bytes)
            }
            ContentRecord::Sparse { extents, size_bytes } => {
                let first = (self.extents.len() / EXTENT_LEN) as u32;
                for extent in extents {
                    self.extent(extent);
                }
                (KIND_SPARSE, first, extents.len() as u32, size_bytes)
            }
            ContentRecord::Symlink { target } => (KIND_SYMLINK, self.string(target), target.len, 0),
            ContentRecord::CharDevice { major, minor } => (KIND_CHAR_DEVICE, major, minor, 0),
            ContentRecord::BlockDevice { major, minor } => (KIND_BLOCK_DEVICE, major, minor, 0),
            ContentRecord::Fifo => (KIND_FIFO, 0, 0, 0),
            ContentRecord::HardLink { node } => (KIND_HARD_LINK, node, 0, 0),
            ContentRecord::Whiteout => (KIND_WHITEOUT, 0, 0, 0),
        }
    }

    fn string(&mut self, text: Text) -> u32 {
        self.strings.push(text);
        let start = self.strings_len;
        self.strings_len += text.len;
        start
    }

    fn extent(&mut self, extent: &Extent) {
        let place = match &extent.source {
            ExtentSource::Layer { offset, .. } => offset.0,
            ExtentSource::Inline(bytes) => {
                let at = self.inline.len() as u64;
                self.inline.extend_from_slice(bytes);
                INLINE_FLAG | at
            }
        };
        for number in [extent.file_offset, extent.len_bytes, place] {
            self.extents.extend_from_slice(&number.to_le_bytes());
        }
    }

    /// The finished table; its strings are runs of `text`.
    ///
    /// # Errors
    /// When what was collected is no well-formed table: out of order, beyond a limit, or beyond `logical_len_bytes`.
    pub(crate) fn finish(self, text: &[u8], diff_id: DiffId, logical_len_bytes: u64) -> Result<Toc, TocError> {
        let Self { mut bytes, node_count, extents, set_ends, xattrs, strings, strings_len, inline } = self;
        let extent_count = (extents.len() / EXTENT_LEN) as u32;
        bytes[..8].copy_from_slice(MAGIC);
        bytes[8..10].copy_from_slice(&VERSION.to_le_bytes());
        bytes[12..16].copy_from_slice(&node_count.to_le_bytes());
        bytes[16..24].copy_from_slice(&logical_len_bytes.to_le_bytes());
        bytes[24..56].copy_from_slice(&diff_id.0);
        let lens = [xattrs.len() as u32, strings_len, inline.len() as u32];
        for (at, number) in
            [56, 60, 64, 68, 72].into_iter().zip([extent_count, (set_ends.len() - 1) as u32, lens[0], lens[1], lens[2]])
        {
            bytes[at..at + 4].copy_from_slice(&number.to_le_bytes());
        }
        let rest = extents.len() + 4 * set_ends.len() + xattrs.len() + strings_len as usize + inline.len();
        bytes.reserve_exact(rest);
        bytes.extend_from_slice(&extents);
        for end in set_ends {
            bytes.extend_from_slice(&end.to_le_bytes());
        }
        bytes.extend_from_slice(&xattrs);
        for string in strings {
            bytes.extend_from_slice(&text[string.start as usize..string.start as usize + string.len as usize]);
        }
        bytes.extend_from_slice(&inline);
        Toc::decode(Bytes::from(bytes))
    }
}
