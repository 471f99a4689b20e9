//! A file tree as a reader sees it, taken into memory: names, metadata, links and the hashes of contents.
//!
//! Walks with `lstat`, never follows a symbolic link, and hashes regular files on all cores. Takes a tree as it is:
//! what an unpacker or a mount should have shown is for [`crate::compare`] to say.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::{self, File};
use std::io::{self, Read as _};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use anyhow::{Context as _, Result};
use rustix::io::Errno;

/// How much of a file is read at once, in bytes.
const READ_LEN_BYTES: usize = 1 << 20;
/// First guess of the length of a list of attribute names or of a value, in bytes; the kernel allows 64 KiB of each
/// (XATTR_LIST_MAX, XATTR_SIZE_MAX in linux/limits.h).
const XATTR_MAX_BYTES: usize = 65536;

/// A tree by paths, relative to its root; the root itself is the empty path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// What stands at each path, in byte order of the paths.
    pub nodes: BTreeMap<Vec<u8>, Node>,
    /// Names that a directory lists and that cannot be looked up: overlayfs lists its own whiteouts in directories that
    /// exist in one layer only.
    pub phantoms: BTreeSet<Vec<u8>>,
}

/// One name and the inode behind it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// What it is, with what only this kind has.
    pub kind: Kind,
    /// `mode & 0o7777`.
    pub permissions: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Modification time: seconds since 1970 and nanoseconds after it.
    pub mtime: (i64, u32),
    /// Extended attributes by name.
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// All names of this inode in the tree, this one included.
    pub names: BTreeSet<Vec<u8>>,
    /// The link count that `lstat` gives.
    pub link_count: u64,
}

/// The kinds of file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// A directory.
    Directory,
    /// A regular file: its length in bytes and the BLAKE3 hash of its content.
    Regular {
        /// Length in bytes.
        size_bytes: u64,
        /// BLAKE3 of the content.
        hash: [u8; 32],
    },
    /// A symbolic link and its target.
    Symlink(Vec<u8>),
    /// A character device by its raw number.
    CharDevice(u64),
    /// A block device by its raw number.
    BlockDevice(u64),
    /// A named pipe.
    Fifo,
    /// A socket.
    Socket,
}

impl Kind {
    /// Its name in messages.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Directory => "directory",
            Self::Regular { .. } => "regular file",
            Self::Symlink(_) => "symbolic link",
            Self::CharDevice(_) => "character device",
            Self::BlockDevice(_) => "block device",
            Self::Fifo => "named pipe",
            Self::Socket => "socket",
        }
    }
}

impl Snapshot {
    /// Takes the tree below `root`.
    ///
    /// # Errors
    ///
    /// When a file cannot be read; the message names it. Needs root where files of others are in the tree.
    pub fn take(root: &Path) -> Result<Self> {
        let mut nodes = BTreeMap::new();
        let mut inodes: HashMap<(u64, u64), BTreeSet<Vec<u8>>> = HashMap::new();
        let mut regular = Vec::new();
        let mut pending = vec![(Vec::new(), root.to_owned())];
        let mut phantoms = BTreeSet::new();
        while let Some((name, path)) = pending.pop() {
            let metadata = match fs::symlink_metadata(&path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound && !name.is_empty() => {
                    phantoms.insert(name);
                    continue;
                }
                metadata => metadata.with_context(|| format!("stat {}", path.display()))?,
            };
            if metadata.is_dir() {
                for entry in fs::read_dir(&path).with_context(|| format!("list {}", path.display()))? {
                    let entry = entry.with_context(|| format!("list {}", path.display()))?;
                    let mut child = name.clone();
                    if !child.is_empty() {
                        child.push(b'/');
                    }
                    child.extend_from_slice(entry.file_name().as_bytes());
                    pending.push((child, entry.path()));
                }
            } else {
                inodes.entry((metadata.dev(), metadata.ino())).or_default().insert(name.clone());
            }
            if metadata.is_file() {
                regular.push((name.clone(), path.clone()));
            }
            nodes.insert(name, (node(&path, &metadata)?, (metadata.dev(), metadata.ino())));
        }
        for (name, hash) in hash_all(&regular)? {
            if let Some((Node { kind: Kind::Regular { hash: place, .. }, .. }, _)) = nodes.get_mut(&name) {
                *place = hash;
            }
        }
        let nodes = nodes.into_iter().map(|(name, (mut node, inode))| {
            node.names = inodes.get(&inode).cloned().unwrap_or_else(|| BTreeSet::from([name.clone()]));
            (name, node)
        });
        Ok(Self { nodes: nodes.collect(), phantoms })
    }

    /// The sum of the lengths of all regular files, each name counted, in bytes.
    pub fn content_len_bytes(&self) -> u64 {
        self.nodes
            .values()
            .map(|node| if let Kind::Regular { size_bytes, .. } = node.kind { size_bytes } else { 0 })
            .sum()
    }
}

fn node(path: &Path, metadata: &fs::Metadata) -> Result<Node> {
    let kind = metadata.file_type();
    let kind = if kind.is_dir() {
        Kind::Directory
    } else if kind.is_symlink() {
        let target = fs::read_link(path).with_context(|| format!("read link {}", path.display()))?;
        Kind::Symlink(target.into_os_string().into_vec())
    } else if kind.is_char_device() {
        Kind::CharDevice(metadata.rdev())
    } else if kind.is_block_device() {
        Kind::BlockDevice(metadata.rdev())
    } else if kind.is_fifo() {
        Kind::Fifo
    } else if kind.is_socket() {
        Kind::Socket
    } else {
        // The hash follows when all names are known, on all cores.
        Kind::Regular { size_bytes: metadata.len(), hash: [0; 32] }
    };
    // The kernel gives nanoseconds from 0 to 999,999,999.
    let nanoseconds = u32::try_from(metadata.mtime_nsec()).context("nanoseconds out of range")?;
    Ok(Node {
        kind,
        permissions: metadata.mode() & 0o7777,
        uid: metadata.uid(),
        gid: metadata.gid(),
        mtime: (metadata.mtime(), nanoseconds),
        xattrs: xattrs(path).with_context(|| format!("read the extended attributes of {}", path.display()))?,
        names: BTreeSet::new(),
        link_count: metadata.nlink(),
    })
}

fn xattrs(path: &Path) -> Result<BTreeMap<Vec<u8>, Vec<u8>>> {
    let mut list = vec![0; XATTR_MAX_BYTES];
    let list_len_bytes = match rustix::fs::llistxattr(path, &mut list[..]) {
        Ok(len) => len,
        Err(Errno::OPNOTSUPP) => return Ok(BTreeMap::new()),
        Err(error) => return Err(error.into()),
    };
    let mut found = BTreeMap::new();
    for name in list[..list_len_bytes].split(|&byte| byte == 0).filter(|name| !name.is_empty()) {
        let mut value = vec![0; XATTR_MAX_BYTES];
        match rustix::fs::lgetxattr(path, name, &mut value[..]) {
            Ok(len) => {
                value.truncate(len);
                found.insert(name.to_vec(), value);
            }
            // overlayfs lists what it hides.
            Err(Errno::NODATA) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(found)
}

/// Hashes all files, each thread taking the next one that nobody has.
fn hash_all(files: &[(Vec<u8>, PathBuf)]) -> Result<Vec<(Vec<u8>, [u8; 32])>> {
    let next = AtomicUsize::new(0);
    let threads = thread::available_parallelism().map_or(1, usize::from);
    let work = || -> Result<Vec<(Vec<u8>, [u8; 32])>> {
        let mut buffer = vec![0; READ_LEN_BYTES];
        let mut hashes = Vec::new();
        while let Some((name, path)) = files.get(next.fetch_add(1, Ordering::Relaxed)) {
            hashes.push((name.clone(), hash(path, &mut buffer)?));
        }
        Ok(hashes)
    };
    thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        let mut all = Vec::with_capacity(files.len());
        for worker in workers {
            all.extend(worker.join().expect("hashing does not panic")?);
        }
        Ok(all)
    })
}

fn hash(path: &Path, buffer: &mut [u8]) -> Result<[u8; 32]> {
    let mut file = File::open(path).with_context(|| format!("open {}", path.display()))?;
    let mut hasher = blake3::Hasher::new();
    loop {
        let len = file.read(buffer).with_context(|| format!("read {}", path.display()))?;
        if len == 0 {
            return Ok(*hasher.finalize().as_bytes());
        }
        hasher.update(&buffer[..len]);
    }
}
