//! A tree as a list of paths, each with everything that can be seen of it: from the tree itself, from an image, and
//! from a directory in the real filesystem.

use std::collections::BTreeMap;
use std::ffi::CStr;
use std::fs;
use std::mem::MaybeUninit;
use std::ops::Range;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use crate::erofs::{FileType, Image, Nid, RangeSource};
use crate::tree::{ExtentSource, InodeKind, Timestamp, Tree};

use super::trees::ramp;

/// What can be seen of one path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) kind: FileType,
    pub(super) permissions: u16,
    pub(super) owner: (u32, u32),
    pub(super) mtime: (i64, u32),
    pub(super) link_count: u64,
    /// Device number; 0:0 for what is none.
    pub(super) rdev: (u32, u32),
    /// Sorted by name.
    pub(super) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// Bytes of a file, target of a symlink.
    pub(super) content: Vec<u8>,
    /// The first path with the same inode.
    pub(super) first_path: Vec<u8>,
}

pub(super) type Entries = BTreeMap<Vec<u8>, Entry>;

fn join(directory: &[u8], name: &[u8]) -> Vec<u8> {
    [directory, name].join(&b'/')
}

/// Replaces the inode number that stands in each `first_path` by the first path that has it.
fn name_links(entries: BTreeMap<Vec<u8>, (u64, Entry)>) -> Entries {
    let mut first = BTreeMap::new();
    entries
        .into_iter()
        .map(|(path, (ino, mut entry))| {
            entry.first_path = first.entry(ino).or_insert_with(|| path.clone()).clone();
            (path, entry)
        })
        .collect()
}

/// What must be seen of `tree`.
pub(super) fn from_tree(tree: &Tree) -> Entries {
    let mut entries = BTreeMap::new();
    let mut waiting = vec![(Vec::new(), 0_u32)];
    while let Some((path, index)) = waiting.pop() {
        let inode = &tree.inodes[index as usize];
        let (kind, rdev, content) = match &inode.kind {
            InodeKind::Directory { entries, .. } => {
                waiting.extend(entries.iter().map(|(name, inode)| (join(&path, name), *inode)));
                (FileType::Directory, (0, 0), Vec::new())
            }
            InodeKind::Regular { size_bytes, extents } => {
                let mut content = vec![0; *size_bytes as usize];
                for extent in extents {
                    let out = &mut content[extent.file_offset as usize..][..extent.len_bytes as usize];
                    match &extent.source {
                        ExtentSource::Layer { layer, offset } => ramp(*layer, offset.0, out),
                        ExtentSource::Inline(bytes) => out.copy_from_slice(bytes),
                    }
                }
                (FileType::Regular, (0, 0), content)
            }
            InodeKind::Symlink { target } => (FileType::Symlink, (0, 0), target.clone()),
            InodeKind::CharDevice { major, minor } => (FileType::CharDevice, (*major, *minor), Vec::new()),
            InodeKind::BlockDevice { major, minor } => (FileType::BlockDevice, (*major, *minor), Vec::new()),
            InodeKind::Fifo => (FileType::Fifo, (0, 0), Vec::new()),
        };
        let Timestamp { seconds, nanoseconds } = inode.mtime;
        let entry = Entry {
            kind,
            permissions: inode.permissions,
            owner: (inode.uid, inode.gid),
            mtime: (seconds, nanoseconds),
            link_count: inode.link_count.into(),
            rdev,
            xattrs: inode.xattrs.iter().map(|xattr| (xattr.name.clone(), xattr.value.clone())).collect(),
            content,
            first_path: Vec::new(),
        };
        entries.insert(path, (index.into(), entry));
    }
    name_links(entries)
}

/// Bytes of a layer: layer, offset, where to.
pub(super) type ReadLayer<'a> = &'a dyn Fn(u16, u64, &mut [u8]);

/// What our reader sees.
pub(super) fn from_image(image: &Image<Vec<u8>>, layer: ReadLayer<'_>) -> Entries {
    let mut entries = BTreeMap::new();
    let mut waiting = vec![(Vec::new(), image.root(), image.root())];
    while let Some((path, nid, parent)) = waiting.pop() {
        let stat = image.stat(nid).expect("a sound inode");
        assert_eq!(stat.ino, nid.0);
        let content = match stat.kind {
            FileType::Directory => {
                for entry in image.readdir(nid, 0).expect("a sound directory") {
                    let entry = entry.expect("a sound entry");
                    assert_eq!(image.lookup(nid, entry.name), Ok(Some(entry.nid)));
                    assert_eq!(image.stat(entry.nid).map(|stat| stat.kind), Ok(entry.kind));
                    match entry.name {
                        b"." => assert_eq!(entry.nid, nid),
                        b".." => assert_eq!(entry.nid, parent),
                        name => waiting.push((join(&path, name), entry.nid, nid)),
                    }
                }
                Vec::new()
            }
            FileType::Regular => content(image, nid, 0..u64::MAX, layer),
            FileType::Symlink => image.readlink(nid).expect("a sound symlink").into_owned(),
            _ => Vec::new(),
        };
        let mut xattrs: Vec<_> = image
            .xattrs(nid)
            .expect("sound attributes")
            .map(|entry| entry.expect("a sound attribute"))
            .map(|entry| (entry.name.to_vec(), entry.value.to_vec()))
            .collect();
        xattrs.sort();
        for (name, value) in &xattrs {
            assert_eq!(image.xattr(nid, name), Ok(Some(value.as_slice())));
        }
        assert_eq!(image.xattr(nid, b"user.not there"), Ok(None));
        let entry = Entry {
            kind: stat.kind,
            permissions: stat.permissions,
            owner: (stat.uid, stat.gid),
            mtime: (stat.mtime.seconds, stat.mtime.nanoseconds),
            link_count: stat.link_count.into(),
            rdev: (stat.rdev.major, stat.rdev.minor),
            xattrs,
            content,
            first_path: Vec::new(),
        };
        entries.insert(path, (nid.0, entry));
    }
    name_links(entries)
}

/// Bytes `range` of a file, from where our reader says that they are.
pub(super) fn content(image: &Image<Vec<u8>>, nid: Nid, range: Range<u64>, layer: ReadLayer<'_>) -> Vec<u8> {
    let mut content = Vec::new();
    for piece in image.extents(nid, range.clone()).expect("a regular file") {
        let piece = piece.expect("a sound range");
        assert_eq!(piece.file_offset, range.start + content.len() as u64);
        let from = content.len();
        content.resize(from + piece.len_bytes as usize, 0);
        match piece.source {
            RangeSource::Hole => {}
            RangeSource::Device { index, offset } => layer(index, offset.0, &mut content[from..]),
            RangeSource::Image { offset } => {
                content[from..].copy_from_slice(&image.bytes()[offset as usize..][..piece.len_bytes as usize]);
            }
        }
    }
    content
}

/// All directories of an image.
pub(super) fn directories(image: &Image<Vec<u8>>) -> Vec<Nid> {
    let mut all = vec![image.root()];
    let mut next = 0;
    while let Some(directory) = all.get(next).copied() {
        next += 1;
        for entry in image.readdir(directory, 0).expect("a sound directory") {
            let entry = entry.expect("a sound entry");
            if entry.kind == FileType::Directory && !matches!(entry.name, b"." | b"..") {
                all.push(entry.nid);
            }
        }
    }
    all
}

/// All regular files of an image by name.
pub(super) fn regular_files(image: &Image<Vec<u8>>) -> Vec<(Vec<u8>, Nid)> {
    directories(image)
        .into_iter()
        .flat_map(|directory| image.readdir(directory, 0).expect("a sound directory"))
        .map(|entry| entry.expect("a sound entry"))
        .filter(|entry| entry.kind == FileType::Regular)
        .map(|entry| (entry.name.to_vec(), entry.nid))
        .collect()
}

/// What the system shows at `root`.
pub(super) fn from_directory(root: &Path) -> Entries {
    let mut entries = BTreeMap::new();
    let mut waiting = vec![Vec::new()];
    while let Some(path) = waiting.pop() {
        let real = root.join(std::ffi::OsStr::from_bytes(path.strip_prefix(b"/").unwrap_or(&path)));
        let meta = if path.is_empty() { fs::metadata(&real) } else { fs::symlink_metadata(&real) }.expect("stat");
        let file_type = meta.file_type();
        let (kind, content) = if file_type.is_dir() {
            for entry in fs::read_dir(&real).expect("readdir") {
                waiting.push(join(&path, entry.expect("an entry").file_name().as_bytes()));
            }
            (FileType::Directory, Vec::new())
        } else if file_type.is_file() {
            (FileType::Regular, fs::read(&real).expect("read"))
        } else if file_type.is_symlink() {
            (FileType::Symlink, fs::read_link(&real).expect("readlink").as_os_str().as_bytes().to_vec())
        } else if file_type.is_char_device() {
            (FileType::CharDevice, Vec::new())
        } else if file_type.is_block_device() {
            (FileType::BlockDevice, Vec::new())
        } else {
            (FileType::Fifo, Vec::new())
        };
        let rdev = (rustix::fs::major(meta.rdev()), rustix::fs::minor(meta.rdev()));
        let entry = Entry {
            kind,
            permissions: (meta.mode() & 0o7777) as u16,
            owner: (meta.uid(), meta.gid()),
            mtime: (meta.mtime(), meta.mtime_nsec() as u32),
            link_count: meta.nlink(),
            rdev,
            xattrs: real_xattrs(&real),
            content,
            first_path: Vec::new(),
        };
        entries.insert(path, (meta.ino(), entry));
    }
    name_links(entries)
}

fn real_xattrs(path: &Path) -> Vec<(Vec<u8>, Vec<u8>)> {
    // The path of a mount is a link to it, which must be followed; everything below must not be.
    let path =
        if path.starts_with("/proc") && path.components().count() == 5 { path.join(".") } else { path.to_owned() };
    let mut names = [MaybeUninit::uninit(); 65_536];
    let (names, _) = rustix::fs::llistxattr(&path, &mut names).expect("llistxattr");
    let mut xattrs: Vec<_> = names
        .split_inclusive(|byte| *byte == 0)
        .map(|name| {
            let name = CStr::from_bytes_with_nul(name).expect("a name");
            let mut value = [MaybeUninit::uninit(); 65_536];
            let (value, _) = rustix::fs::lgetxattr(&path, name, &mut value).expect("lgetxattr");
            (name.to_bytes().to_vec(), value.to_vec())
        })
        .collect();
    xattrs.sort();
    xattrs
}
