//! Names of a layer's tree: nodes of 24 bytes in one arena, their names in another, and a table from (directory, name)
//! to node of about 6 bytes a node.
//!
//! A node that lost its meaning keeps its place: it is *absent* (has no inode) until the name comes back. Only the
//! children of a directory that goes away are taken out of the table, so removing is paid for by adding.

use std::hash::{BuildHasher, RandomState};

/// A name in the tree, by its place in the arena.
pub(super) type NodeIndex = u32;

/// No node, no inode.
pub(super) const NONE: u32 = u32::MAX;

const EMPTY: u32 = u32::MAX;
const REMOVED: u32 = u32::MAX - 1;

#[derive(Debug)]
struct Node {
    parent: NodeIndex,
    name_start: u32,
    inode: u32,
    first_child: NodeIndex,
    next_sibling: NodeIndex,
    name_len: u8,
}

/// An arena is full.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Full {
    /// Of nodes.
    Nodes,
    /// Of bytes of names.
    Bytes,
}

/// The names of a tree; the root is node 0 and has no name.
#[derive(Debug)]
pub(super) struct Names {
    nodes: Vec<Node>,
    bytes: Vec<u8>,
    /// Open addressing, linear probing; a power of two slots, at most three quarters used.
    slots: Vec<u32>,
    /// Slots that are not [`EMPTY`].
    used: usize,
    hasher: RandomState,
    node_limit: usize,
    byte_limit: usize,
}

impl Names {
    pub(super) const ROOT: NodeIndex = 0;

    pub(super) fn new(node_limit: u32, byte_limit: u32) -> Self {
        let root = Node { parent: 0, name_start: 0, inode: NONE, first_child: NONE, next_sibling: NONE, name_len: 0 };
        Self {
            nodes: vec![root],
            bytes: Vec::new(),
            slots: vec![EMPTY; 64],
            used: 0,
            hasher: RandomState::new(),
            node_limit: node_limit as usize,
            byte_limit: byte_limit as usize,
        }
    }

    pub(super) fn name(&self, node: NodeIndex) -> &[u8] {
        let node = &self.nodes[node as usize];
        &self.bytes[node.name_start as usize..node.name_start as usize + usize::from(node.name_len)]
    }

    pub(super) fn parent(&self, node: NodeIndex) -> NodeIndex {
        self.nodes[node as usize].parent
    }

    /// The inode of `node`, or [`NONE`] when the name is absent.
    pub(super) fn inode(&self, node: NodeIndex) -> u32 {
        self.nodes[node as usize].inode
    }

    pub(super) fn set_inode(&mut self, node: NodeIndex, inode: u32) {
        self.nodes[node as usize].inode = inode;
    }

    /// Where the name of `node` stands in the text: start and length.
    pub(super) fn name_place(&self, node: NodeIndex) -> (u32, u32) {
        let node = &self.nodes[node as usize];
        (node.name_start, u32::from(node.name_len))
    }

    /// All names and texts.
    pub(super) fn into_text(self) -> Vec<u8> {
        self.bytes
    }

    /// Keeps `text`, which is no name of a node.
    pub(super) fn add_text(&mut self, text: &[u8]) -> Result<u32, Full> {
        let start = self.bytes.len();
        if text.len() > self.byte_limit - start {
            return Err(Full::Bytes);
        }
        self.bytes.extend_from_slice(text);
        Ok(start as u32)
    }

    /// A text that was kept.
    pub(super) fn text(&self, start: u32, len: u32) -> &[u8] {
        &self.bytes[start as usize..start as usize + len as usize]
    }

    /// The node called `name` in `parent`, absent or not.
    pub(super) fn child(&self, parent: NodeIndex, name: &[u8]) -> Option<NodeIndex> {
        self.find(parent, name).map(|slot| self.slots[slot])
    }

    /// The node called `name` in `parent`, made absent if there is none. `name` has at most 255 bytes.
    pub(super) fn child_or_add(&mut self, parent: NodeIndex, name: &[u8]) -> Result<NodeIndex, Full> {
        if let Some(node) = self.child(parent, name) {
            return Ok(node);
        }
        if self.nodes.len() >= self.node_limit {
            return Err(Full::Nodes);
        }
        let name_start = self.add_text(name)?;
        let node = self.nodes.len() as NodeIndex;
        let next_sibling = std::mem::replace(&mut self.nodes[parent as usize].first_child, node);
        self.nodes.push(Node {
            parent,
            name_start,
            inode: NONE,
            first_child: NONE,
            next_sibling,
            name_len: name.len() as u8,
        });
        if (self.used + 1) * 4 > self.slots.len() * 3 {
            self.grow();
        }
        self.enter(node);
        Ok(node)
    }

    /// Takes everything below `node` away.
    pub(super) fn drop_children(&mut self, node: NodeIndex) {
        let mut stack = vec![node];
        while let Some(parent) = stack.pop() {
            let mut child = std::mem::replace(&mut self.nodes[parent as usize].first_child, NONE);
            while child != NONE {
                if let Some(slot) = self.slot_of(child) {
                    self.slots[slot] = REMOVED;
                }
                let lost = &mut self.nodes[child as usize];
                lost.inode = NONE;
                if lost.first_child != NONE {
                    stack.push(child);
                }
                child = lost.next_sibling;
            }
        }
    }

    /// The nodes in `node` that are not absent, in no particular order.
    pub(super) fn children(&self, node: NodeIndex) -> impl Iterator<Item = NodeIndex> {
        let next = |at: NodeIndex| (at != NONE).then_some(at);
        std::iter::successors(next(self.nodes[node as usize].first_child), move |at| {
            next(self.nodes[*at as usize].next_sibling)
        })
        .filter(|child| self.inode(*child) != NONE)
    }

    /// Frees the table, of which a finished tree has no more use.
    pub(super) fn forget_table(&mut self) {
        self.slots = Vec::new();
    }

    fn start_slot(&self, parent: NodeIndex, name: &[u8]) -> usize {
        self.hasher.hash_one((parent, name)) as usize & (self.slots.len() - 1)
    }

    fn find(&self, parent: NodeIndex, name: &[u8]) -> Option<usize> {
        let mut slot = self.start_slot(parent, name);
        loop {
            match self.slots[slot] {
                EMPTY => return None,
                REMOVED => {}
                node if self.parent(node) == parent && self.name(node) == name => return Some(slot),
                _ => {}
            }
            slot = (slot + 1) & (self.slots.len() - 1);
        }
    }

    fn slot_of(&self, node: NodeIndex) -> Option<usize> {
        self.find(self.parent(node), self.name(node))
    }

    fn enter(&mut self, node: NodeIndex) {
        let mut slot = self.start_slot(self.parent(node), self.name(node));
        while self.slots[slot] != EMPTY {
            slot = (slot + 1) & (self.slots.len() - 1);
        }
        self.slots[slot] = node;
        self.used += 1;
    }

    fn grow(&mut self) {
        let live = self.slots.iter().filter(|node| **node < REMOVED).count();
        let len = ((live + 1) * 2).next_power_of_two().max(64);
        let old = std::mem::replace(&mut self.slots, vec![EMPTY; len]);
        self.used = 0;
        for node in old.into_iter().filter(|node| *node < REMOVED) {
            self.enter(node);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn limits_are_kept() {
        let mut names = Names::new(3, 5);
        let a = names.child_or_add(Names::ROOT, b"ab").expect("fits");
        assert_eq!(names.child_or_add(Names::ROOT, b"ab"), Ok(a));
        assert_eq!(names.child_or_add(a, b"abcd"), Err(Full::Bytes));
        names.child_or_add(a, b"c").expect("fits");
        assert_eq!(names.child_or_add(a, b"d"), Err(Full::Nodes));
    }

    proptest! {
        #[test]
        fn behaves_like_a_map_of_paths(ops in proptest::collection::vec((0_u8..8, 0_u8..8, 0_u8..10), 0..300)) {
            let mut names = Names::new(1 << 20, 1 << 20);
            let mut oracle: BTreeMap<(u8, u8), u32> = BTreeMap::new();
            for (number, (outer, inner, op)) in ops.into_iter().enumerate() {
                let directory = names.child_or_add(Names::ROOT, &[outer]).expect("fits");
                names.set_inode(directory, 0);
                if op == 0 {
                    names.drop_children(directory);
                    oracle.retain(|key, _| key.0 != outer);
                } else {
                    let node = names.child_or_add(directory, &[inner; 3]).expect("fits");
                    names.set_inode(node, number as u32);
                    oracle.insert((outer, inner), number as u32);
                }
                for outer in 0..8 {
                    let directory = names.child(Names::ROOT, &[outer]);
                    for inner in 0..8 {
                        let node = directory.and_then(|directory| names.child(directory, &[inner; 3]));
                        let inode = node.map(|node| names.inode(node)).filter(|inode| *inode != NONE);
                        prop_assert_eq!(inode, oracle.get(&(outer, inner)).copied());
                    }
                    let count = directory.map_or(0, |directory| names.children(directory).count());
                    prop_assert_eq!(count, oracle.keys().filter(|key| key.0 == outer).count());
                }
            }
        }
    }
}
