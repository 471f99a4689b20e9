//! Metadata of directories that a layer has no entry for.
//!
//! When containerd unpacks a file whose directory is missing from the layer, it makes the directory like the one in the
//! layers below: it looks into each of them, from the top down and each by itself, follows that layer's own symbolic
//! links, and takes owner, mode, time and attributes of the first directory that it finds. Something else than a
//! directory ends the search. What it finds nowhere has mode 0755 and belongs to root, but for the group, which a
//! directory with the set-group-id bit hands down as on any Linux filesystem.

use std::collections::HashMap;

use super::{Source, xattrs};
use crate::index::toc::{Node, NodeKind, NodeNo, ROOT, Toc};
use crate::tar::SYMLINKS_FOLLOWED_MAX;
use crate::tree::{Timestamp, Xattr};

const SET_GROUP_ID: u16 = 0o2000;

/// What a directory has beside its names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct DirectoryMetadata {
    pub(super) permissions: u16,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) mtime: Timestamp,
    pub(super) xattrs: Vec<Xattr>,
}

impl Default for DirectoryMetadata {
    fn default() -> Self {
        Self { permissions: 0o755, uid: 0, gid: 0, mtime: Timestamp::default(), xattrs: Vec::new() }
    }
}

impl DirectoryMetadata {
    pub(super) fn of(node: &Node<'_>) -> Self {
        Self {
            permissions: node.permissions(),
            uid: node.uid(),
            gid: node.gid(),
            mtime: node.mtime(),
            xattrs: xattrs(node),
        }
    }
}

/// Where a path leads in one layer.
enum Found {
    Nothing,
    NoDirectory,
    Directory(NodeNo, Vec<Vec<u8>>),
}

/// Finds the metadata of implied directories, each once.
pub(super) struct Implied<'a> {
    layers: &'a [Toc],
    /// Group and set-group-id bit of implied directories that are known already.
    groups: HashMap<Source, (u32, bool)>,
}

impl<'a> Implied<'a> {
    pub(super) fn new(layers: &'a [Toc]) -> Self {
        Self { layers, groups: HashMap::new() }
    }

    /// The metadata of the implied directory `source`, whose path in its layer is `path`.
    pub(super) fn metadata(&mut self, source: Source, path: &[Vec<u8>]) -> DirectoryMetadata {
        let metadata = self.below(source.0, path).unwrap_or_else(|| {
            let (gid, _) = self.inherited_group(source.0, path);
            DirectoryMetadata { gid, ..DirectoryMetadata::default() }
        });
        self.groups.insert(source, (metadata.gid, metadata.permissions & SET_GROUP_ID != 0));
        metadata
    }

    /// The metadata of the directory at `path` in the layers below `layer`.
    fn below(&self, layer: u16, path: &[Vec<u8>]) -> Option<DirectoryMetadata> {
        let mut path = path.to_vec();
        for toc in self.layers[..usize::from(layer)].iter().rev() {
            match resolve(toc, &path) {
                Found::Nothing => {}
                Found::NoDirectory => return None,
                Found::Directory(no, real) => {
                    let node = toc.node(no);
                    if !super::is_implied(&node) {
                        return Some(DirectoryMetadata::of(&node));
                    }
                    // When that layer was unpacked it took this directory's metadata from further down.
                    path = real;
                }
            }
        }
        None
    }

    /// The group that a new directory at `path` gets from the directory that it is made in.
    fn inherited_group(&mut self, layer: u16, path: &[Vec<u8>]) -> (u32, bool) {
        let toc = &self.layers[usize::from(layer)];
        let mut group = (0, false);
        let mut no = ROOT;
        // From the top down, as a directory can only hand down what it was given.
        for depth in 1..path.len() {
            let Some(node) = toc.child(no, &path[depth - 1]) else {
                return (0, false);
            };
            no = node.no();
            group = if !super::is_implied(&node) {
                (node.gid(), node.permissions() & SET_GROUP_ID != 0)
            } else if let Some(known) = self.groups.get(&(layer, no)) {
                *known
            } else {
                let known = match self.below(layer, &path[..depth]) {
                    Some(metadata) => (metadata.gid, metadata.permissions & SET_GROUP_ID != 0),
                    // A directory that is made afresh gets mode 0755, so it hands its group no further.
                    None => (if group.1 { group.0 } else { 0 }, false),
                };
                self.groups.insert((layer, no), known);
                known
            };
        }
        if group.1 { group } else { (0, false) }
    }
}

/// Goes to `path` in one layer, following its symbolic links, never out of its root.
fn resolve(toc: &Toc, path: &[Vec<u8>]) -> Found {
    let mut names = path.to_vec();
    let (mut no, mut at, mut followed) = (ROOT, 0, 0);
    while let Some(name) = names.get(at) {
        let Some(node) = toc.child(no, name) else {
            return Found::Nothing;
        };
        match node.kind() {
            NodeKind::Directory { .. } => (no, at) = (node.no(), at + 1),
            NodeKind::Symlink { target } => {
                followed += 1;
                if followed > SYMLINKS_FOLLOWED_MAX {
                    return Found::NoDirectory;
                }
                let mut to = if target.starts_with(b"/") { Vec::new() } else { names[..at].to_vec() };
                for name in target.split(|byte| *byte == b'/') {
                    match name {
                        b"" | b"." => {}
                        b".." => {
                            to.pop();
                        }
                        name => to.push(name.to_vec()),
                    }
                }
                to.extend_from_slice(&names[at + 1..]);
                names = to;
                (no, at) = (ROOT, 0);
            }
            _ => return Found::NoDirectory,
        }
    }
    Found::Directory(no, names)
}
