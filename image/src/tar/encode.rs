//! A finished tree -> the layer's table of contents.

use super::BLOCK_LEN_BYTES;
use super::arena::{NONE, Names, NodeIndex};
use super::error::TarError;
use super::tree::{Content, LayerTree};
use crate::ids::DiffId;
use crate::index::toc::{ContentRecord, NodeRecord, Text, Toc, TocBuilder};
use crate::tree::Timestamp;

impl LayerTree {
    /// The table of contents of the layer, whose tar has the hash `diff_id` and `logical_len_bytes` bytes.
    ///
    /// # Errors
    /// When a hard link leads to no name of the layer, or an entry's data lies beyond `logical_len_bytes`.
    pub fn finish(mut self, diff_id: DiffId, logical_len_bytes: u64) -> Result<Toc, TarError> {
        self.link_pending()?;
        self.names.forget_table();
        let mut order = vec![Names::ROOT];
        // Child counts of the directories, in order.
        let mut counts = Vec::new();
        let mut at = 0;
        while let Some(node) = order.get(at).copied() {
            if let Some(Content::Directory { .. }) = self.content(node) {
                let first = order.len();
                order.extend(self.names.children(node));
                order[first..].sort_unstable_by(|left, right| self.names.name(*left).cmp(self.names.name(*right)));
                counts.push((order.len() - first) as u32);
            }
            at += 1;
        }
        let mut builder = TocBuilder::new(order.len());
        let mut writer = Writer { tree: &self, sets: Vec::new(), firsts: vec![NONE; self.inodes.len()] };
        let mut counts = counts.into_iter();
        let mut next_child = 1;
        for (no, node) in order.iter().enumerate() {
            writer.write(&mut builder, no as u32, *node, &mut counts, &mut next_child);
        }
        // The strings are copied when nothing but them is left of the tree.
        drop((order, writer));
        let Self { names, .. } = self;
        Ok(builder.finish(&names.into_text(), diff_id, logical_len_bytes)?)
    }
}

/// Writes nodes into a table, with the numbers that the table gives to inodes and attribute sets.
struct Writer<'a> {
    tree: &'a LayerTree,
    /// By set of the tree, from 1: its number in the table, 0 while it has none.
    sets: Vec<u32>,
    /// By inode: the first node that has it.
    firsts: Vec<u32>,
}

impl Writer<'_> {
    fn write(
        &mut self,
        builder: &mut TocBuilder,
        no: u32,
        node: NodeIndex,
        counts: &mut impl Iterator<Item = u32>,
        next_child: &mut u32,
    ) {
        let names = &self.tree.names;
        let (start, len) = names.name_place(node);
        let name = Text { start, len };
        let inode_no = names.inode(node) as usize;
        let inode = &self.tree.inodes[inode_no];
        if inode.content == Content::Whiteout {
            return builder.node(name, NodeRecord::default(), ContentRecord::Whiteout);
        }
        if self.firsts[inode_no] != NONE {
            let first = ContentRecord::HardLink { node: self.firsts[inode_no] };
            return builder.node(name, NodeRecord::default(), first);
        }
        self.firsts[inode_no] = no;
        let content = match inode.content {
            Content::Directory { implied, opaque } => {
                let child_count = counts.next().unwrap_or(0);
                let first_child = *next_child;
                *next_child += child_count;
                ContentRecord::Directory { first_child, child_count, implied, opaque }
            }
            Content::Regular { start_block, size_bytes } => {
                ContentRecord::Regular { start: u64::from(start_block) * BLOCK_LEN_BYTES, size_bytes }
            }
            Content::Sparse { number, size_bytes } => {
                ContentRecord::Sparse { extents: &self.tree.sparse[number as usize], size_bytes }
            }
            Content::Symlink { start, len } => ContentRecord::Symlink { target: Text { start, len } },
            Content::CharDevice { major, minor } => ContentRecord::CharDevice { major, minor },
            Content::BlockDevice { major, minor } => ContentRecord::BlockDevice { major, minor },
            Content::Fifo => ContentRecord::Fifo,
            // Whiteouts were written above, and no link is pending any more.
            Content::Whiteout | Content::Pending { .. } => ContentRecord::Whiteout,
        };
        let record = NodeRecord {
            permissions: inode.permissions,
            uid: inode.uid,
            gid: inode.gid,
            mtime: Timestamp {
                seconds: (inode.mtime_ns / 1_000_000_000) as i64,
                nanoseconds: (inode.mtime_ns % 1_000_000_000) as u32,
            },
            xattr_set: self.set(builder, inode.xattrs),
        };
        builder.node(name, record, content);
    }

    fn set(&mut self, builder: &mut TocBuilder, set: u32) -> u32 {
        if set == 0 {
            return 0;
        }
        if self.sets.len() <= set as usize {
            self.sets.resize(set as usize + 1, 0);
        }
        let number = &mut self.sets[set as usize];
        if *number == 0 {
            *number = builder.xattr_set(self.tree.xattrs.get(set));
        }
        *number
    }
}
