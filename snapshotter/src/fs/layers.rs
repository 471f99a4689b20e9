//! One file per layer: the devices of EROFS mounts.
//!
//! A flat, read-only directory. Each file is a layer's uncompressed tar stream, named by the hexadecimal digits of its
//! diffID. Layers come while the file system is mounted and never change, so names that are not there yet are not
//! cached, and everything else is kept for ever.
//!
//! A file's inode is its layer's number in the store, which outlives the process: a daemon that takes the connection
//! over from another means the same file by the same inode, and so does a listing that is half read.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use fuser::{
    Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, InitFlags, KernelConfig,
    LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyDirectory, ReplyEntry, ReplyOpen, ReplyStatfs, ReplyXattr,
    Request,
};
use hermes_image::ids::DiffId;
use parking_lot::RwLock;

use super::read::{LayerFile, Piece, Plan, Reader};
use super::{TTL, session};

/// Inode 1 is the directory; the layer with number 0 has the next.
const FIRST_LAYER_INO: u64 = 2;

/// How the kernel caches the layer files that EROFS reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LayerCaching {
    #[default]
    /// Each read goes to the daemon; only EROFS's own page cache holds the bytes.
    Direct,
    /// The kernel keeps pages of the layer files too: quicker on present data, but a second copy in memory.
    Cached,
}

/// The layers that are served. Shared by the file system and whoever adds layers.
#[derive(Debug, Default)]
pub struct LayerDirectory {
    table: RwLock<Table>,
}

#[derive(Debug, Default)]
struct Table {
    /// By inode, in the order of a listing.
    files: BTreeMap<u64, Arc<LayerFile>>,
    inodes: BTreeMap<DiffId, u64>,
}

impl LayerDirectory {
    /// Adds a layer; one that is there already is kept.
    pub fn insert(&self, file: Arc<LayerFile>) {
        let mut table = self.table.write();
        let ino = FIRST_LAYER_INO + u64::from(file.layer.number());
        if let Some(old) = table.inodes.insert(file.layer.diff_id(), ino)
            && old != ino
        {
            // The store has the layer anew, with another chunk table: nobody reads the old file any more.
            table.files.remove(&old);
        }
        table.files.entry(ino).or_insert(file);
    }

    /// Serves a layer no more. Nobody may have its file open; one that is added again has the same inode.
    pub fn remove(&self, layer: DiffId) {
        let mut table = self.table.write();
        if let Some(ino) = table.inodes.remove(&layer) {
            table.files.remove(&ino);
        }
    }

    /// How many layers are served.
    pub fn count(&self) -> usize {
        self.table.read().files.len()
    }

    fn by_ino(&self, ino: u64) -> Option<Arc<LayerFile>> {
        self.table.read().files.get(&ino).cloned()
    }

    fn by_name(&self, name: &OsStr) -> Option<(u64, Arc<LayerFile>)> {
        let diff_id: DiffId = format!("sha256:{}", name.to_str()?).parse().ok()?;
        let table = self.table.read();
        let ino = *table.inodes.get(&diff_id)?;
        Some((ino, Arc::clone(table.files.get(&ino)?)))
    }
}

/// The file system.
#[derive(Debug)]
pub struct LayerFs {
    directory: Arc<LayerDirectory>,
    reader: Reader,
    caching: LayerCaching,
}

impl LayerFs {
    /// Serves `directory`.
    pub fn new(directory: Arc<LayerDirectory>, reader: Reader, caching: LayerCaching) -> Self {
        Self { directory, reader, caching }
    }
}

fn attributes(ino: u64, kind: FileType, perm: u16, size: u64) -> FileAttr {
    FileAttr {
        ino: INodeNo(ino),
        size,
        blocks: size.div_ceil(512),
        atime: SystemTime::UNIX_EPOCH,
        mtime: SystemTime::UNIX_EPOCH,
        ctime: SystemTime::UNIX_EPOCH,
        crtime: SystemTime::UNIX_EPOCH,
        kind,
        perm,
        nlink: 1,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: 4096,
        flags: 0,
    }
}

fn file_attributes(ino: u64, file: &LayerFile) -> FileAttr {
    // EROFS reads whole 512-byte blocks, so the file ends at a block even where the stream does not.
    attributes(ino, FileType::RegularFile, 0o400, file.table().logical_len_bytes().next_multiple_of(512))
}

impl Filesystem for LayerFs {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        session::negotiate(config, &[InitFlags::FUSE_ASYNC_DIO, InitFlags::FUSE_PARALLEL_DIROPS]);
        Ok(())
    }

    fn lookup(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match self.directory.by_name(name).filter(|_| parent == INodeNo::ROOT) {
            Some((ino, file)) => reply.entry(&TTL, &file_attributes(ino, &file), Generation(0)),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _req: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        if ino == INodeNo::ROOT {
            // Layers are added, so the directory's attributes are not kept.
            return reply.attr(&Duration::ZERO, &attributes(ino.0, FileType::Directory, 0o500, 0));
        }
        match self.directory.by_ino(ino.0) {
            Some(file) => reply.attr(&TTL, &file_attributes(ino.0, &file)),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn open(&self, _req: &Request, ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        match self.directory.by_ino(ino.0) {
            Some(_) => {
                let flags = match self.caching {
                    LayerCaching::Direct => FopenFlags::FOPEN_DIRECT_IO,
                    LayerCaching::Cached => FopenFlags::FOPEN_KEEP_CACHE,
                };
                reply.opened(FileHandle(0), flags);
            }
            None => reply.error(Errno::ENOENT),
        }
    }

    fn read(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        session::raise_priority();
        let Some(file) = self.directory.by_ino(ino.0) else { return reply.error(Errno::ENOENT) };
        let end = file.table().logical_len_bytes();
        let wanted = offset.saturating_add(u64::from(size)).min(end.next_multiple_of(512));
        let present = wanted.min(end).saturating_sub(offset) as usize;
        let padding = wanted.saturating_sub(offset.max(end)) as usize;
        let mut plan = Plan::default();
        if present > 0 {
            plan.push(Piece::Layer { file, offset, len: present });
        }
        if padding > 0 {
            plan.push(Piece::Hole { len: padding });
        }
        self.reader.answer(plan, reply);
    }

    fn readdir(&self, _req: &Request, ino: INodeNo, _fh: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        if ino != INodeNo::ROOT {
            return reply.error(Errno::ENOTDIR);
        }
        let table = self.directory.table.read();
        // Each entry's offset is where the next one begins: 1 and 2 after the dots, one past its inode after a layer.
        let dots = [(1, ".".to_owned(), FileType::Directory, 1), (2, "..".to_owned(), FileType::Directory, 1)];
        let layers = table
            .files
            .range(offset.max(FIRST_LAYER_INO)..)
            .map(|(ino, file)| (ino + 1, file.layer.diff_id().hex(), FileType::RegularFile, *ino));
        for (next, name, kind, ino) in dots.into_iter().filter(|(next, ..)| *next > offset).chain(layers) {
            if reply.add(INodeNo(ino), next, kind, name) {
                break;
            }
        }
        reply.ok();
    }

    fn getxattr(&self, _req: &Request, _ino: INodeNo, _name: &OsStr, _size: u32, reply: ReplyXattr) {
        // Turns the question off for the whole mount.
        reply.error(Errno::ENOSYS);
    }

    fn statfs(&self, _req: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        reply.statfs(0, 0, 0, self.directory.count() as u64, 0, 4096, 255, 4096);
    }
}
