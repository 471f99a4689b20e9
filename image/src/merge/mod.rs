//! Tables of contents of a chain -> one tree, as an overlay mount of the unpacked layers shows it.
//!
//! Directories of the same name merge from the topmost layer down, until one is opaque or the name is something else or
//! a whiteout; the topmost directory gives the metadata. Of everything else the topmost layer's file shows. Hard links
//! are counted over the names that are left. Inodes are numbered in breadth-first order of the merged tree, names
//! sorted bytewise, so the same tables always give the same tree.
//!
//! A directory that a layer only implies has the metadata that containerd gives it when it unpacks: that of the same
//! directory in the layers below.
//!
//! Of the root, the topmost layer that names it explicitly gives the metadata; containerd has none of its own for it
//! but 0755 root:root, which stands here when no layer names it. A root that a layer marks opaque still shows the
//! layers below, because overlayfs does not look for the mark there.

mod implied;
#[cfg(test)]
mod tests;

use std::collections::{HashMap, HashSet, VecDeque};

use thiserror::Error;

use crate::index::toc::{Node, NodeKind, NodeNo, ROOT, Toc};
use crate::tree::{Extent, ExtentSource, Inode, InodeIndex, InodeKind, Tree, TreeLayer, Xattr};
use implied::{DirectoryMetadata, Implied};

/// Most layers in one tree: EROFS numbers its devices with 16 bits, and 0 is the image itself.
pub const LAYER_COUNT_MAX: usize = 65_535;

/// Layers that make no tree.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum MergeError {
    /// More than [`LAYER_COUNT_MAX`] layers.
    #[error("an image of {count} layers; {LAYER_COUNT_MAX} are the most that one tree can have")]
    TooManyLayers {
        /// Number of layers.
        count: usize,
    },
    /// More inodes than a number can name.
    #[error("layer {layer} brings the tree over 2^32 - 1 inodes at '{path}'")]
    TooManyInodes {
        /// The layer, from 0 for the lowest.
        layer: usize,
        /// The directory whose names are beyond the limit.
        path: String,
    },
    /// A directory has more subdirectories than a link count can say.
    #[error("directory '{path}' has more than 2^32 - 3 subdirectories")]
    TooManySubdirectories {
        /// The directory.
        path: String,
    },
}

/// Merges a chain, lowest layer first.
///
/// # Errors
/// When there are too many layers or inodes.
pub fn merge(layers: &[Toc]) -> Result<Tree, MergeError> {
    if layers.len() > LAYER_COUNT_MAX {
        return Err(MergeError::TooManyLayers { count: layers.len() });
    }
    let mut merger = Merger {
        layers,
        implied: Implied::new(layers),
        linked: linked_nodes(layers),
        inode_of: HashMap::new(),
        inodes: Vec::new(),
        parents: Vec::new(),
        queue: VecDeque::new(),
    };
    merger.root();
    while let Some(directory) = merger.queue.pop_front() {
        merger.directory(&directory)?;
    }
    let layers = layers
        .iter()
        .map(|toc| TreeLayer { diff_id: toc.diff_id(), logical_len_bytes: toc.logical_len_bytes() })
        .collect();
    Ok(Tree { layers, inodes: merger.inodes })
}

/// A node of one layer. Layer numbers fit: there are at most [`LAYER_COUNT_MAX`].
type Source = (u16, NodeNo);

/// A directory of the merged tree whose names are not merged yet.
struct Directory {
    inode: InodeIndex,
    /// The directories that it merges, topmost layer first.
    sources: Vec<Source>,
}

struct Merger<'a> {
    layers: &'a [Toc],
    implied: Implied<'a>,
    /// Nodes with more than one name in their layer.
    linked: HashSet<Source>,
    /// The inodes of those of them that are in the tree.
    inode_of: HashMap<Source, InodeIndex>,
    inodes: Vec<Inode>,
    /// Of directories: directory and place of their name, to tell their path.
    parents: Vec<Option<(InodeIndex, u32)>>,
    queue: VecDeque<Directory>,
}

fn linked_nodes(layers: &[Toc]) -> HashSet<Source> {
    let mut linked = HashSet::new();
    for (layer, toc) in layers.iter().enumerate() {
        linked.extend(toc.nodes().filter_map(|node| match node.kind() {
            NodeKind::HardLink { node } => Some((layer as u16, node)),
            _ => None,
        }));
    }
    linked
}

impl<'a> Merger<'a> {
    fn node(&self, source: Source) -> Node<'a> {
        self.layers[usize::from(source.0)].node(source.1)
    }

    fn root(&mut self) {
        let top_first = (0..self.layers.len()).rev().map(|layer| (layer as u16, ROOT));
        let explicit = top_first.clone().map(|source| self.node(source)).find(|node| !is_implied(node));
        let metadata = explicit.map_or_else(DirectoryMetadata::default, |node| DirectoryMetadata::of(&node));
        // An opaque root hides nothing: overlayfs stacks the roots of its layers without a look at their attributes.
        let sources = top_first.collect();
        self.inodes.push(directory_inode(metadata, 0));
        self.parents.push(None);
        self.queue.push_back(Directory { inode: 0, sources });
    }

    /// The leading directories of `sources` (topmost first) that show through each other.
    fn down_to_opaque(&self, sources: impl Iterator<Item = Source>) -> Vec<Source> {
        let mut merged = Vec::new();
        for source in sources {
            let NodeKind::Directory { opaque, .. } = self.node(source).kind() else {
                break;
            };
            merged.push(source);
            if opaque {
                break;
            }
        }
        merged
    }

    fn directory(&mut self, directory: &Directory) -> Result<(), MergeError> {
        // All names with their sources; the sort is stable, so those of one name stay topmost first.
        let mut found: Vec<(&'a [u8], Source)> = Vec::new();
        for source in &directory.sources {
            if let NodeKind::Directory { children, .. } = self.node(*source).kind() {
                found.extend(children.map(|child| {
                    let child = (source.0, child);
                    (self.node(child).name(), child)
                }));
            }
        }
        if directory.sources.len() > 1 {
            found.sort_by_key(|(name, _)| *name);
        }
        let mut entries = Vec::new();
        let mut subdirectories = 0_u32;
        for same_name in found.chunk_by(|left, right| left.0 == right.0) {
            let (name, top) = same_name[0];
            let inode = match self.node(top).kind() {
                NodeKind::Whiteout => continue,
                NodeKind::Directory { implied, .. } => {
                    let inode = self.next_inode(directory.inode, top)?;
                    subdirectories += 1;
                    let metadata = if implied {
                        let path = self.path(directory.inode, name);
                        self.implied.metadata(top, &path)
                    } else {
                        DirectoryMetadata::of(&self.node(top))
                    };
                    self.inodes.push(directory_inode(metadata, directory.inode));
                    self.parents.push(Some((directory.inode, entries.len() as u32)));
                    let sources = self.down_to_opaque(same_name.iter().map(|(_, source)| *source));
                    self.queue.push_back(Directory { inode, sources });
                    inode
                }
                NodeKind::HardLink { node } => self.file(directory.inode, (top.0, node))?,
                _ => self.file(directory.inode, top)?,
            };
            entries.push((name.to_vec(), inode));
        }
        let Some(link_count) = subdirectories.checked_add(2) else {
            return Err(MergeError::TooManySubdirectories { path: self.shown_path(directory.inode) });
        };
        let inode = &mut self.inodes[directory.inode as usize];
        inode.link_count = link_count;
        if let InodeKind::Directory { entries: merged, .. } = &mut inode.kind {
            *merged = entries;
        }
        Ok(())
    }

    /// The inode of a file for one more name in `directory`.
    fn file(&mut self, directory: InodeIndex, source: Source) -> Result<InodeIndex, MergeError> {
        if let Some(inode) = self.inode_of.get(&source) {
            self.inodes[*inode as usize].link_count += 1;
            return Ok(*inode);
        }
        let inode = self.next_inode(directory, source)?;
        if self.linked.contains(&source) {
            self.inode_of.insert(source, inode);
        }
        let node = self.node(source);
        self.inodes.push(Inode {
            permissions: node.permissions(),
            uid: node.uid(),
            gid: node.gid(),
            mtime: node.mtime(),
            link_count: 1,
            xattrs: xattrs(&node),
            kind: file_kind(&node, source.0),
        });
        self.parents.push(None);
        Ok(inode)
    }

    fn next_inode(&self, directory: InodeIndex, source: Source) -> Result<InodeIndex, MergeError> {
        InodeIndex::try_from(self.inodes.len())
            .ok()
            .filter(|inode| *inode < InodeIndex::MAX)
            .ok_or_else(|| MergeError::TooManyInodes { layer: usize::from(source.0), path: self.shown_path(directory) })
    }

    /// The names from the root to `name` in `directory`.
    fn path(&self, directory: InodeIndex, name: &'a [u8]) -> Vec<Vec<u8>> {
        let mut names = vec![name.to_vec()];
        let mut at = directory;
        while let Some((parent, entry)) = self.parents[at as usize] {
            // A directory's own entry is known once its parent is merged, which breadth-first order has done.
            if let InodeKind::Directory { entries, .. } = &self.inodes[parent as usize].kind {
                names.push(entries[entry as usize].0.clone());
            }
            at = parent;
        }
        names.reverse();
        names
    }

    fn shown_path(&self, directory: InodeIndex) -> String {
        let names = self.path(directory, b"");
        names.join(&b'/').escape_ascii().to_string()
    }
}

fn is_implied(node: &Node<'_>) -> bool {
    matches!(node.kind(), NodeKind::Directory { implied: true, .. })
}

fn xattrs(node: &Node<'_>) -> Vec<Xattr> {
    node.xattrs().map(|xattr| Xattr { name: xattr.name.to_vec(), value: xattr.value.to_vec() }).collect()
}

fn directory_inode(metadata: DirectoryMetadata, parent: InodeIndex) -> Inode {
    Inode {
        permissions: metadata.permissions,
        uid: metadata.uid,
        gid: metadata.gid,
        mtime: metadata.mtime,
        link_count: 2,
        xattrs: metadata.xattrs,
        kind: InodeKind::Directory { entries: Vec::new(), parent },
    }
}

fn file_kind(node: &Node<'_>, layer: u16) -> InodeKind {
    match node.kind() {
        NodeKind::Regular { size_bytes, extents } => {
            let extents = extents.map(|extent| match extent.source {
                ExtentSource::Layer { offset, .. } => {
                    Extent { source: ExtentSource::Layer { layer, offset }, ..extent }
                }
                ExtentSource::Inline(_) => extent,
            });
            InodeKind::Regular { size_bytes, extents: extents.collect() }
        }
        NodeKind::Symlink { target } => InodeKind::Symlink { target: target.to_vec() },
        NodeKind::CharDevice { major, minor } => InodeKind::CharDevice { major, minor },
        NodeKind::BlockDevice { major, minor } => InodeKind::BlockDevice { major, minor },
        // Hard links lead to files only, which the table's check guarantees.
        NodeKind::Fifo | NodeKind::Directory { .. } | NodeKind::HardLink { .. } | NodeKind::Whiteout => InodeKind::Fifo,
    }
}
