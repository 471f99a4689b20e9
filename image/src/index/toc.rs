//! The table of contents: the tree that a layer unpacks to, and where the bytes of its files stand in the layer.
//!
//! Version 1, little endian. Numbers are unsigned unless said otherwise; bytes and fields called zero must be zero.
//!
//! | offset | size | field |
//! |---|---|---|
//! | 0 | 8 | magic `HERMTOC\0` |
//! | 8 | 2 | version, 1 |
//! | 10 | 2 | zero |
//! | 12 | 4 | number of nodes *n*, 1 to 2^22 |
//! | 16 | 8 | length of the logical space in bytes, at most 2^41 |
//! | 24 | 32 | diffID of the layer |
//! | 56 | 4 | number of extents *e*, at most 2^20 |
//! | 60 | 4 | number of attribute sets *s*, at most *n* |
//! | 64 | 4 | length of the attribute section *a* in bytes, at most 2^26 |
//! | 68 | 4 | length of the string section *t* in bytes, at most 2^27 |
//! | 72 | 4 | length of the inline section *i* in bytes, at most 2^24 |
//! | 76 | 4 | zero |
//! | 80 | 48 *n* | nodes |
//! | 80 + 48 *n* | 24 *e* | extents of sparse files |
//! | then | 4 (*s* + 1) | ends of the attribute sets: set *k* (from 1) runs from number *k* - 1 to number *k*, the first number is 0, the last *a* |
//! | then | *a* | attribute sets |
//! | then | *t* | strings: names and symbolic link targets, in node order |
//! | then | *i* | inline bytes of sparse files |
//!
//! A **node** is a name in the tree. Node 0 is the root. Nodes stand in breadth-first order, the names of a directory
//! sorted bytewise, so the children of a directory are a run of nodes, and the runs follow each other in the order of
//! their directories. That order is checked, and rules out cycles, lost nodes and directories with two parents.
//!
//! | offset | size | field |
//! |---|---|---|
//! | 0 | 4 | start of the name in the string section |
//! | 4 | 1 | length of the name: 0 for the root, else 1 to 255 bytes without NUL and `/`, not `.` or `..` |
//! | 5 | 1 | kind |
//! | 6 | 2 | permission bits, `mode & 0o7777` |
//! | 8 | 4 | owner |
//! | 12 | 4 | group |
//! | 16 | 8 | modification time, signed seconds since 1970 |
//! | 24 | 4 | its nanoseconds, below 10^9 |
//! | 28 | 4 | number of its attribute set, 0 for none |
//! | 32 | 4 | A |
//! | 36 | 4 | B |
//! | 40 | 8 | C |
//!
//! | kind | is | A | B | C |
//! |---|---|---|---|---|
//! | 1 | directory | first child | number of children | flags: 1 implied, 2 opaque |
//! | 2 | regular file, whole | start of its data in units of 512 bytes; 0 if empty | zero | size in bytes |
//! | 3 | regular file, sparse | first extent | number of extents | size in bytes, at most 2^44 |
//! | 4 | symbolic link | start of its target in the string section | length, 1 to 4,095 bytes without NUL | zero |
//! | 5 | character device | major number, below 2^12 | minor number, below 2^20 | zero |
//! | 6 | block device | as above | as above | zero |
//! | 7 | named pipe | zero | zero | zero |
//! | 8 | hard link | the first node with the same inode, of kind 2 to 7 and below this node | zero | zero |
//! | 9 | whiteout | zero | zero | zero |
//!
//! Hard links and whiteouts have zero in every field from 6 to 32. A character device 0:0 is a whiteout to overlayfs,
//! so it is one here (kind 9), never kind 5. *Implied* directories have no entry in the layer: they were made because
//! something lies in them, and a merge gives them the metadata of the directory below. *Opaque* directories hide what
//! lower layers have in them.
//!
//! An **extent** of a sparse file: what no extent covers reads as zeros.
//!
//! | offset | size | field |
//! |---|---|---|
//! | 0 | 8 | first byte in the file, a multiple of 512; extents of a file are sorted and disjoint |
//! | 8 | 8 | length in bytes, not 0, a multiple of 512 unless it ends at the end of the file |
//! | 16 | 8 | logical offset, a multiple of 512; or 2^63 plus the place in the inline section |
//!
//! An **attribute set** is a sequence of attributes, sorted by name, each name once:
//!
//! | offset | size | field |
//! |---|---|---|
//! | 0 | 1 | length of the name, 1 to 255 |
//! | 1 | 4 | length of the value, at most 65,536 |
//! | 5 | | name, then value |
//!
//! The table is read in place: opening one checks all of this once, and accessors copy nothing but numbers. Its bytes
//! depend on the layer's content only, so two builders give one layer's table the same name.

mod builder;
mod check;
mod format;
mod node;
#[cfg(test)]
mod tests;

use bytes::Bytes;
use thiserror::Error;

use crate::ids::{ArtifactId, DiffId};

pub(crate) use builder::{ContentRecord, NodeRecord, Text, TocBuilder};
use format::Layout;
pub use node::{Extents, Node, NodeKind, XattrRef, Xattrs};

/// Most nodes in one table: twice the entries of a layer, as directories may be implied.
pub const NODE_COUNT_MAX: u32 = 1 << 22;
/// Most extents of sparse files in one table: 24 MiB of records.
pub const EXTENT_COUNT_MAX: u32 = 1 << 20;
/// Longest attribute section in bytes, equal sets counted once.
pub const XATTR_LEN_MAX_BYTES: u32 = 1 << 26;
/// Longest string section in bytes: 10^6 paths with names of 128 bytes.
pub const STRING_LEN_MAX_BYTES: u32 = 1 << 27;

/// A node of a table, by its place.
pub type NodeNo = u32;

/// The root directory of every table.
pub const ROOT: NodeNo = 0;

/// Bytes that are no table of contents.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum TocError {
    /// The magic number is missing.
    #[error("not a table of contents")]
    Magic,
    /// A version that this build does not know.
    #[error("table of contents version {0} is not known; version {known} is", known = format::VERSION)]
    Version(u16),
    /// Reserved bytes are not zero.
    #[error("table of contents has reserved bytes that are not zero")]
    Reserved,
    /// A section is beyond its limit.
    #[error("table of contents has {actual} {section}, where {limit} are allowed")]
    Limit {
        /// What is counted.
        section: &'static str,
        /// By the header.
        actual: u64,
        /// The limit.
        limit: u64,
    },
    /// The length does not match the sections.
    #[error("table of contents has {actual} bytes where its header asks for {expected}")]
    Length {
        /// By the header.
        expected: u64,
        /// That came.
        actual: u64,
    },
    /// A node is malformed.
    #[error("node {node} of the table of contents: {fault}")]
    Node {
        /// The node.
        node: NodeNo,
        /// What is wrong.
        fault: &'static str,
    },
    /// An attribute set is malformed.
    #[error("attribute set {set} of the table of contents is malformed")]
    XattrSet {
        /// The set, from 1.
        set: u32,
    },
}

/// A checked table of contents.
#[derive(Debug, Clone)]
pub struct Toc {
    bytes: Bytes,
    id: ArtifactId,
    layout: Layout,
}

impl PartialEq for Toc {
    fn eq(&self, other: &Self) -> bool {
        self.id == other.id
    }
}

impl Eq for Toc {}

impl Toc {
    /// Opens an encoded table. Allocates nothing that grows with the table.
    ///
    /// # Errors
    /// When the bytes are no well-formed table of this version.
    pub fn decode(bytes: Bytes) -> Result<Self, TocError> {
        let layout = Layout::read(&bytes)?;
        let toc = Self { id: ArtifactId::of(&bytes), layout, bytes };
        toc.check()?;
        Ok(toc)
    }

    /// The canonical encoding.
    pub fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// The name of the encoding.
    pub fn id(&self) -> ArtifactId {
        self.id
    }

    /// The layer that the table describes.
    pub fn diff_id(&self) -> DiffId {
        self.layout.diff_id
    }

    /// Length of the layer's logical space in bytes.
    pub fn logical_len_bytes(&self) -> u64 {
        self.layout.logical_len_bytes
    }

    /// Number of names in the layer's tree: the root, whiteouts and implied directories count.
    pub fn entry_count(&self) -> u32 {
        self.layout.node_count
    }

    /// Node `no`.
    ///
    /// # Panics
    /// When there is no such node.
    pub fn node(&self, no: NodeNo) -> Node<'_> {
        assert!(no < self.layout.node_count, "node {no} of {}", self.layout.node_count);
        Node::new(self, no)
    }

    /// All nodes in order, the root first.
    pub fn nodes(&self) -> impl ExactSizeIterator<Item = Node<'_>> {
        (0..self.layout.node_count).map(|no| Node::new(self, no))
    }

    /// The child of `directory` called `name`; `None` also when `directory` is none.
    ///
    /// # Panics
    /// When there is no node `directory`.
    pub fn child(&self, directory: NodeNo, name: &[u8]) -> Option<Node<'_>> {
        let NodeKind::Directory { children, .. } = self.node(directory).kind() else {
            return None;
        };
        let (mut low, mut high) = (children.start, children.end);
        while low < high {
            let middle = low + (high - low) / 2;
            let node = Node::new(self, middle);
            match node.name().cmp(name) {
                std::cmp::Ordering::Less => low = middle + 1,
                std::cmp::Ordering::Greater => high = middle,
                std::cmp::Ordering::Equal => return Some(node),
            }
        }
        None
    }
}
