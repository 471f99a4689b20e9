//! Entries -> the tree that they unpack to.
//!
//! [`LayerTree`] does in memory what containerd does on disk when it unpacks a layer into an empty overlay upper
//! directory, entry by entry and in order, so that a later entry meets what earlier ones left: paths are cleaned as
//! text, symbolic links of the layer are followed on the way to an entry (never out of the root), missing directories
//! are made, directories merge with directories and everything else replaces what was there.
//!
//! Names and inodes are apart, because hard links share inodes. A name costs 24 bytes, its text and about 6 bytes of
//! table, an inode 40: about 70 bytes and the name for each entry.

use std::mem;

use super::arena::{Full, NONE, Names, NodeIndex};
use super::entry::{Entry, EntryKind, ID_UNCHANGED, Metadata};
use super::error::{TarError, shown};
use super::path::{append_cleaned, clean, fits};
use super::xattrs::{CAPABILITY, UserXattrs, XattrSets, admit};
use super::{BLOCK_LEN_BYTES, NAME_LEN_MAX_BYTES, SYMLINK_LEN_MAX_BYTES, SYMLINKS_FOLLOWED_MAX};
use crate::index::toc::{EXTENT_COUNT_MAX, NODE_COUNT_MAX, STRING_LEN_MAX_BYTES, XATTR_LEN_MAX_BYTES};
use crate::tree::{Extent, ExtentSource, Timestamp, Xattr};

const WHITEOUT_PREFIX: &[u8] = b".wh.";
const OPAQUE_MARKER: &[u8] = b".wh..wh..opq";

/// The tree of one layer while its entries are applied.
#[derive(Debug)]
pub struct LayerTree {
    pub(super) names: Names,
    pub(super) inodes: Vec<Inode>,
    pub(super) xattrs: XattrSets,
    /// Extents of the sparse files.
    pub(super) sparse: Vec<Box<[Extent]>>,
    /// Number of extents in `sparse`.
    extent_count: usize,
    /// Names whose hard link target is not there yet, in order.
    pending: Vec<NodeIndex>,
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Inode {
    /// Nanoseconds since 1970: what is left of a time when containerd has bounded it.
    pub(super) mtime_ns: u64,
    pub(super) content: Content,
    pub(super) uid: u32,
    pub(super) gid: u32,
    /// Set in [`LayerTree::xattrs`].
    pub(super) xattrs: u32,
    pub(super) permissions: u16,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Content {
    Directory {
        implied: bool,
        opaque: bool,
    },
    /// Starts at this block of 512 bytes.
    Regular {
        start_block: u32,
        size_bytes: u64,
    },
    /// Has the extents of this number.
    Sparse {
        number: u32,
        size_bytes: u64,
    },
    Symlink {
        start: u32,
        len: u32,
    },
    CharDevice {
        major: u32,
        minor: u32,
    },
    BlockDevice {
        major: u32,
        minor: u32,
    },
    Fifo,
    Whiteout,
    /// A hard link whose target, the text given, is not there yet.
    Pending {
        start: u32,
        len: u32,
    },
}

// What the module says about memory.
const _: () = assert!(size_of::<Inode>() == 40);

/// Where a path leads.
enum Walked {
    /// To this name, which may be absent or not yet exist.
    To(NodeIndex),
    /// Into something that does not exist.
    Missing,
}

/// What to do with directories that are missing on the way.
#[derive(Clone, Copy, PartialEq, Eq)]
enum MissingParents {
    Make,
    Leave,
}

impl Default for LayerTree {
    fn default() -> Self {
        Self::new()
    }
}

impl LayerTree {
    /// The tree of a layer without entries: an implied root directory.
    pub fn new() -> Self {
        let mut tree = Self {
            names: Names::new(NODE_COUNT_MAX, STRING_LEN_MAX_BYTES),
            inodes: Vec::new(),
            xattrs: XattrSets::default(),
            sparse: Vec::new(),
            extent_count: 0,
            pending: Vec::new(),
        };
        tree.make_directory(Names::ROOT, false);
        tree
    }

    /// Applies the next entry.
    ///
    /// # Errors
    /// When containerd would refuse the entry, or the tree is beyond a limit. The tree is then of no more use.
    pub fn apply(&mut self, entry: Entry) -> Result<(), TarError> {
        let Entry { path, metadata, kind, .. } = entry;
        if path.contains(&0) {
            return Err(TarError::NulInPath { entry: shown(&path) });
        }
        let names = clean(&path);
        let Some((base, parents)) = names.split_last() else {
            // containerd leaves its own root alone; a merge takes the root's metadata from here.
            return match kind {
                EntryKind::Directory => self.update_directory(&path, Names::ROOT, metadata),
                _ => Ok(()),
            };
        };
        if !fits(parents) {
            return Err(TarError::PathTooLong { entry: shown(&path) });
        }
        let directory = match self.walk(&path, parents, MissingParents::Make)? {
            Walked::To(directory) => directory,
            Walked::Missing => return Ok(()),
        };
        if *base == OPAQUE_MARKER {
            if let Content::Directory { opaque, .. } = self.content_mut(directory) {
                *opaque = true;
            }
            return Ok(());
        }
        if let Some(hidden) = base.strip_prefix(WHITEOUT_PREFIX) {
            if matches!(hidden, b"" | b"." | b"..") {
                return Err(TarError::InvalidWhiteout { entry: shown(&path) });
            }
            let node = self.node(&path, directory, hidden)?;
            return self.replace(&path, node, Content::Whiteout, Metadata::default());
        }
        if !fits(&names) {
            return Err(TarError::PathTooLong { entry: shown(&path) });
        }
        let node = self.node(&path, directory, base)?;
        self.place(&path, node, kind, metadata)
    }

    fn place(&mut self, path: &[u8], node: NodeIndex, kind: EntryKind, metadata: Metadata) -> Result<(), TarError> {
        let content = match kind {
            EntryKind::Directory => {
                if let Some(Content::Directory { .. }) = self.content(node) {
                    return self.update_directory(path, node, metadata);
                }
                Content::Directory { implied: false, opaque: false }
            }
            EntryKind::Regular { size_bytes, extents } => self.regular(path, size_bytes, extents)?,
            EntryKind::Symlink { target } => {
                if target.is_empty() || target.len() > SYMLINK_LEN_MAX_BYTES {
                    return Err(TarError::SymlinkTarget { entry: shown(path) });
                }
                let start = self.names.add_text(&target).map_err(|full| limit(path, full))?;
                Content::Symlink { start, len: target.len() as u32 }
            }
            EntryKind::HardLink { target } => return self.hard_link(path, node, &target, metadata),
            // overlayfs takes such a device for a whiteout.
            EntryKind::CharDevice { major: 0, minor: 0 } => Content::Whiteout,
            EntryKind::CharDevice { major, minor } => Content::CharDevice { major, minor },
            EntryKind::BlockDevice { major, minor } => Content::BlockDevice { major, minor },
            EntryKind::Fifo => Content::Fifo,
            EntryKind::GlobalHeader => {
                self.names.drop_children(node);
                self.names.set_inode(node, NONE);
                return Ok(());
            }
            EntryKind::Unsupported { type_flag } => {
                return Err(TarError::UnsupportedType { entry: shown(path), type_flag });
            }
        };
        self.replace(path, node, content, metadata)
    }

    fn regular(&mut self, path: &[u8], size_bytes: u64, extents: Vec<Extent>) -> Result<Content, TarError> {
        match extents.as_slice() {
            [] if size_bytes == 0 => return Ok(Content::Regular { start_block: 0, size_bytes }),
            [Extent { file_offset: 0, len_bytes, source: ExtentSource::Layer { offset, .. } }]
                if *len_bytes == size_bytes && offset.0.is_multiple_of(BLOCK_LEN_BYTES) =>
            {
                let start_block = u32::try_from(offset.0 / BLOCK_LEN_BYTES);
                let start_block = start_block.map_err(|_| TarError::TooFar { entry: shown(path) })?;
                return Ok(Content::Regular { start_block, size_bytes });
            }
            _ => {}
        }
        self.extent_count += extents.len();
        if self.extent_count > EXTENT_COUNT_MAX as usize {
            let limit = u64::from(EXTENT_COUNT_MAX);
            return Err(TarError::Limit { entry: shown(path), what: "segments of sparse files", limit });
        }
        let number = self.sparse.len() as u32;
        self.sparse.push(extents.into());
        Ok(Content::Sparse { number, size_bytes })
    }

    /// Makes `node` a new inode, whatever it was.
    fn replace(&mut self, path: &[u8], node: NodeIndex, content: Content, metadata: Metadata) -> Result<(), TarError> {
        let user = match content {
            Content::Directory { .. } | Content::Regular { .. } | Content::Sparse { .. } => UserXattrs::Allowed,
            _ => UserXattrs::LeftOut,
        };
        // A symbolic link's mode cannot be set, and reads as 0o777.
        let permissions = if matches!(content, Content::Symlink { .. }) { 0o777 } else { metadata.permissions };
        let xattrs = if content == Content::Whiteout { 0 } else { self.add_xattrs(path, 0, metadata.xattrs, user)? };
        self.names.drop_children(node);
        self.names.set_inode(node, self.inodes.len() as u32);
        self.inodes.push(Inode {
            mtime_ns: bounded_ns(metadata.mtime),
            content,
            uid: changed(0, metadata.uid),
            gid: changed(0, metadata.gid),
            xattrs,
            permissions,
        });
        Ok(())
    }

    /// An entry for a directory that is already there: its metadata counts, and its attributes are added.
    fn update_directory(&mut self, path: &[u8], node: NodeIndex, metadata: Metadata) -> Result<(), TarError> {
        let set = self.inodes[self.names.inode(node) as usize].xattrs;
        let xattrs = self.add_xattrs(path, set, metadata.xattrs, UserXattrs::Allowed)?;
        let inode = self.inode_mut(node);
        inode.xattrs = xattrs;
        inode.permissions = metadata.permissions;
        inode.uid = changed(inode.uid, metadata.uid);
        inode.gid = changed(inode.gid, metadata.gid);
        inode.mtime_ns = bounded_ns(metadata.mtime);
        if let Content::Directory { implied, .. } = &mut inode.content {
            *implied = false;
        }
        Ok(())
    }

    fn hard_link(&mut self, path: &[u8], node: NodeIndex, target: &[u8], metadata: Metadata) -> Result<(), TarError> {
        // containerd clears the place before it makes the link, even if that is what the link leads to.
        self.names.drop_children(node);
        self.names.set_inode(node, NONE);
        let found = self.find(path, target)?;
        let Some(found) = found.filter(|found| !matches!(self.content(*found), None | Some(Content::Pending { .. })))
        else {
            let start = self.names.add_text(target).map_err(|full| limit(path, full))?;
            let content = Content::Pending { start, len: target.len() as u32 };
            self.pending.push(node);
            return self.replace(path, node, content, Metadata::default());
        };
        self.link(path, node, found, target)?;
        self.update_linked(path, node, metadata)
    }

    fn link(&mut self, path: &[u8], node: NodeIndex, found: NodeIndex, target: &[u8]) -> Result<(), TarError> {
        if let Some(Content::Directory { .. }) = self.content(found) {
            return Err(TarError::HardLinkToDirectory { entry: shown(path), target: shown(target) });
        }
        let inode = self.names.inode(found);
        self.names.set_inode(node, inode);
        Ok(())
    }

    /// A link's own metadata goes to the inode that it shares, as containerd's calls on the new name do.
    fn update_linked(&mut self, path: &[u8], node: NodeIndex, metadata: Metadata) -> Result<(), TarError> {
        let inode = *self.inode_mut(node);
        let user = match inode.content {
            Content::Regular { .. } | Content::Sparse { .. } => UserXattrs::Allowed,
            Content::Whiteout => return Ok(()),
            _ => UserXattrs::LeftOut,
        };
        // The kernel takes file capabilities away when the owner is set, even to the same one.
        let mut kept = self.xattrs.get(inode.xattrs).to_vec();
        kept.retain(|xattr| xattr.name != CAPABILITY);
        let set = self.intern(path, kept)?;
        let xattrs = self.add_xattrs(path, set, metadata.xattrs, user)?;
        let is_symlink = matches!(inode.content, Content::Symlink { .. });
        let linked = self.inode_mut(node);
        linked.xattrs = xattrs;
        linked.uid = changed(linked.uid, metadata.uid);
        linked.gid = changed(linked.gid, metadata.gid);
        linked.mtime_ns = bounded_ns(metadata.mtime);
        if !is_symlink {
            linked.permissions = metadata.permissions;
        }
        Ok(())
    }

    /// The set of what is admitted of `added`, over the attributes of `set`.
    fn add_xattrs(&mut self, path: &[u8], set: u32, added: Vec<Xattr>, user: UserXattrs) -> Result<u32, TarError> {
        let mut admitted = Vec::new();
        for xattr in added {
            match admit(&xattr, user) {
                Ok(true) => admitted.push(xattr),
                Ok(false) => {}
                Err(fault) => {
                    return Err(TarError::Xattr { entry: shown(path), name: shown(&xattr.name), fault });
                }
            }
        }
        if admitted.is_empty() {
            return Ok(set);
        }
        for old in self.xattrs.get(set) {
            if !admitted.iter().any(|xattr| xattr.name == old.name) {
                admitted.push(old.clone());
            }
        }
        admitted.sort_unstable();
        self.intern(path, admitted)
    }

    fn intern(&mut self, path: &[u8], xattrs: Vec<Xattr>) -> Result<u32, TarError> {
        self.xattrs.intern(xattrs, u64::from(XATTR_LEN_MAX_BYTES)).map_err(|_| TarError::Limit {
            entry: shown(path),
            what: "bytes of extended attributes",
            limit: u64::from(XATTR_LEN_MAX_BYTES),
        })
    }

    /// The name that `target` of a hard link leads to: links on the way are followed, a link at its end is not.
    fn find(&mut self, path: &[u8], target: &[u8]) -> Result<Option<NodeIndex>, TarError> {
        let names = clean(target);
        let Some((base, parents)) = names.split_last() else {
            return Ok(Some(Names::ROOT));
        };
        match self.walk(path, parents, MissingParents::Leave)? {
            Walked::To(directory) => Ok(self.names.child(directory, base)),
            Walked::Missing => Ok(None),
        }
    }

    /// Goes to the directory of `names`, following the layer's symbolic links, for the entry `path`.
    fn walk(&mut self, path: &[u8], names: &[&[u8]], missing: MissingParents) -> Result<Walked, TarError> {
        let mut node = Names::ROOT;
        let mut at = 0;
        let mut followed = 0;
        // Names that a link brought in, copied because the arena may grow under them.
        let mut rewritten: Vec<Vec<u8>> = Vec::new();
        loop {
            let name = if followed == 0 { names.get(at).copied() } else { rewritten.get(at).map(Vec::as_slice) };
            let Some(name) = name else {
                return Ok(Walked::To(node));
            };
            let child = match missing {
                MissingParents::Make => Some(self.names.child_or_add(node, name).map_err(|full| limit(path, full))?),
                MissingParents::Leave => self.names.child(node, name),
            };
            let Some(child) = child else {
                return Ok(Walked::Missing);
            };
            match self.content(child) {
                Some(Content::Directory { .. }) => {}
                Some(Content::Symlink { start, len }) => {
                    followed += 1;
                    if followed > SYMLINKS_FOLLOWED_MAX {
                        return Err(TarError::TooManySymlinks { entry: shown(path) });
                    }
                    rewritten = {
                        let whole: Vec<&[u8]> =
                            if followed == 1 { names.to_vec() } else { rewritten.iter().map(Vec::as_slice).collect() };
                        let target = self.names.text(start, len);
                        let mut to = if target.starts_with(b"/") { Vec::new() } else { whole[..at].to_vec() };
                        append_cleaned(&mut to, target);
                        to.extend_from_slice(&whole[at + 1..]);
                        if !fits(&to) {
                            return Err(TarError::PathTooLong { entry: shown(path) });
                        }
                        to.into_iter().map(<[u8]>::to_vec).collect()
                    };
                    (node, at) = (Names::ROOT, 0);
                    continue;
                }
                None if missing == MissingParents::Leave => return Ok(Walked::Missing),
                None => self.make_directory(child, false),
                // What the whiteout hides stays hidden.
                Some(Content::Whiteout) if missing == MissingParents::Make => self.make_directory(child, true),
                Some(_) => {
                    return Err(TarError::NotADirectory { entry: shown(path), parent: shown(&self.path_of(child)) });
                }
            }
            (node, at) = (child, at + 1);
        }
    }

    fn make_directory(&mut self, node: NodeIndex, opaque: bool) {
        self.names.set_inode(node, self.inodes.len() as u32);
        self.inodes.push(Inode {
            mtime_ns: 0,
            content: Content::Directory { implied: true, opaque },
            uid: 0,
            gid: 0,
            xattrs: 0,
            permissions: 0o755,
        });
    }

    fn node(&mut self, path: &[u8], directory: NodeIndex, name: &[u8]) -> Result<NodeIndex, TarError> {
        if name.len() > NAME_LEN_MAX_BYTES {
            return Err(TarError::PathTooLong { entry: shown(path) });
        }
        self.names.child_or_add(directory, name).map_err(|full| limit(path, full))
    }

    pub(super) fn content(&self, node: NodeIndex) -> Option<Content> {
        self.inodes.get(self.names.inode(node) as usize).map(|inode| inode.content)
    }

    /// The inode of a name that is not absent.
    fn inode_mut(&mut self, node: NodeIndex) -> &mut Inode {
        &mut self.inodes[self.names.inode(node) as usize]
    }

    fn content_mut(&mut self, node: NodeIndex) -> &mut Content {
        &mut self.inode_mut(node).content
    }

    fn path_of(&self, mut node: NodeIndex) -> Vec<u8> {
        let mut names = Vec::new();
        while node != Names::ROOT {
            names.push(self.names.name(node));
            node = self.names.parent(node);
        }
        names.reverse();
        names.join(&b'/')
    }

    /// Makes the links whose targets came after them.
    pub(super) fn link_pending(&mut self) -> Result<(), TarError> {
        for node in mem::take(&mut self.pending) {
            // A link may lead to another one that is still pending; all of such a chain get the inode at its end.
            let mut chain = Vec::new();
            let mut end = node;
            let mut first_target = Vec::new();
            while let Some(Content::Pending { start, len }) = self.content(end) {
                let path = self.path_of(node);
                let target = self.names.text(start, len).to_vec();
                if chain.is_empty() {
                    first_target.clone_from(&target);
                }
                chain.push(end);
                // A circle of links never ends at an inode; its length is a bound.
                let found = self.find(&path, &target)?.filter(|found| self.content(*found).is_some());
                match found.filter(|_| chain.len() <= self.inodes.len()) {
                    Some(found) => end = found,
                    None => {
                        return Err(TarError::DanglingHardLink { entry: shown(&path), target: shown(&first_target) });
                    }
                }
            }
            for link in chain {
                let path = self.path_of(link);
                self.link(&path, link, end, &first_target)?;
            }
        }
        Ok(())
    }
}

fn limit(path: &[u8], full: Full) -> TarError {
    let (what, limit) = match full {
        Full::Nodes => ("names", NODE_COUNT_MAX),
        Full::Bytes => ("bytes of names and link targets", STRING_LEN_MAX_BYTES),
    };
    TarError::Limit { entry: shown(path), what, limit: u64::from(limit) }
}

/// An owner or group after `chown(2)` with `to`.
fn changed(from: u32, to: u32) -> u32 {
    if to == ID_UNCHANGED { from } else { to }
}

/// A time as containerd sets it: what is before 1970 or beyond 2^63 nanoseconds after it becomes 1970.
fn bounded_ns(time: Timestamp) -> u64 {
    let ns = i128::from(time.seconds) * 1_000_000_000 + i128::from(time.nanoseconds);
    i64::try_from(ns).ok().and_then(|ns| u64::try_from(ns).ok()).unwrap_or(0)
}
