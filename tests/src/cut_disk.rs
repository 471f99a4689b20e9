//! A disk that can be looked at afterwards as it was when the power went, at any of its writes.
//!
//! A file that this process serves through FUSE stands below a loop device. Everything that the device is told to do
//! comes through here one after the other: a write is carried out and noted with its bytes, a flush is noted. What the
//! disk held when the power went ([`CutDisk::image`]) is built from that: all writes before the last flush, and of the
//! later ones those that a seed chooses, because a disk may carry them out in any order, the last one perhaps in part.
//! The loop device has no writes that are durable by themselves (FUA); the kernel follows them with a flush.
//!
//! What is noted lies in a file beside the disk, so memory is not the bound; [`LOG_MAX_BYTES`] is.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, Result};
use fuser::{
    Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, InitFlags, KernelConfig,
    LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyWrite, Request, Session,
    SessionACL, WriteFlags,
};
use hermes_policy::rng::Rng;
use rustix::mount::MountFlags;

use crate::command::run;
use crate::guard::{LoopGuard, MountGuard};

/// What is noted at most, in bytes; then writes fail as on a broken disk.
const LOG_MAX_BYTES: u64 = 4 << 30;
/// What a disk writes wholly or not at all, in bytes: the loop device's sector.
const SECTOR_LEN_BYTES: u64 = 512;
/// The served file's name and inode.
const NAME: &str = "disk";
const INODE: INodeNo = INodeNo(2);
/// Nothing but this process changes what is served.
const TTL: Duration = Duration::from_secs(3600);

/// What the device was told.
#[derive(Debug, Clone, Copy)]
enum Told {
    Write { offset: u64, len_bytes: u64, logged_at: u64 },
    Flush,
}

#[derive(Debug)]
struct Log {
    told: Vec<Told>,
    len_bytes: u64,
}

/// What the FUSE thread and the disk's owner share.
#[derive(Debug)]
struct Recorded {
    len_bytes: u64,
    /// As it was formatted.
    base: PathBuf,
    /// As it is now.
    now: File,
    /// The bytes of all writes, one after the other.
    bytes: File,
    log: Mutex<Log>,
}

impl Recorded {
    /// Nothing under the lock can break half-way.
    fn log(&self) -> MutexGuard<'_, Log> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self, offset: u64, data: &[u8]) -> std::io::Result<()> {
        let mut log = self.log();
        let logged_at = log.len_bytes;
        if logged_at + data.len() as u64 > LOG_MAX_BYTES {
            return Err(std::io::ErrorKind::StorageFull.into());
        }
        self.bytes.write_all_at(data, logged_at)?;
        self.now.write_all_at(data, offset)?;
        log.len_bytes += data.len() as u64;
        log.told.push(Told::Write { offset, len_bytes: data.len() as u64, logged_at });
        Ok(())
    }
}

/// A disk of its own, and all that was written to it. Drop what is mounted on it first.
#[derive(Debug)]
pub struct CutDisk {
    device: LoopGuard,
    _mounted: MountGuard,
    recorded: Arc<Recorded>,
}

/// When the power goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cut {
    /// So many writes and flushes have come by then.
    pub at: usize,
    /// Chooses what of the writes after the last flush has been carried out.
    pub seed: u64,
}

impl CutDisk {
    /// A disk of `len_bytes` in the folder `dir`, formatted by `format`, a program that takes the file as its last argument.
    ///
    /// # Errors
    /// When it cannot be formatted, or there is no FUSE or no loop device.
    pub fn new(dir: &Path, len_bytes: u64, format: &mut Command) -> Result<Self> {
        let (base, now) = (dir.join("formatted"), dir.join("now"));
        File::create(&base)?.set_len(len_bytes)?;
        run(format.arg(&base))?;
        copy_sparse(&base, &now)?;
        let recorded = Arc::new(Recorded {
            len_bytes,
            base,
            now: File::options().read(true).write(true).open(now)?,
            bytes: File::options().read(true).write(true).create(true).truncate(true).open(dir.join("log"))?,
            log: Mutex::new(Log { told: Vec::new(), len_bytes: 0 }),
        });
        let served = dir.join("served");
        fs::create_dir_all(&served)?;
        let connection = File::options().read(true).write(true).open("/dev/fuse").context("open /dev/fuse")?;
        let options = format!("fd={},rootmode=40700,user_id=0,group_id=0", connection.as_raw_fd());
        let mounted = MountGuard::mount(Path::new("cut-disk"), &served, "fuse", MountFlags::empty(), &options)?;
        let mut config = fuser::Config::default();
        // One after the other: the order in which they come is the order in which they are noted.
        config.n_threads = Some(1);
        let disk = Disk { recorded: Arc::clone(&recorded) };
        let session = Session::from_fd(disk, OwnedFd::from(connection), SessionACL::Owner, config)?;
        // Ends with the mount.
        std::thread::Builder::new().name("cut-disk".to_owned()).spawn(move || session.run())?;
        let device = LoopGuard::attach(&served.join(NAME))?;
        Ok(Self { device, _mounted: mounted, recorded })
    }

    /// The device.
    pub fn device(&self) -> &Path {
        self.device.device()
    }

    /// How many writes and flushes have come so far.
    pub fn told(&self) -> usize {
        self.recorded.log().told.len()
    }

    /// Writes the disk as `cut` has left it to `path`. Says how many writes that were carried out for some time were not
    /// safe then.
    ///
    /// # Errors
    /// When a file cannot be read or written.
    pub fn image(&self, cut: Cut, path: &Path) -> Result<usize> {
        let told: Vec<Told> = self.recorded.log().told.iter().take(cut.at).copied().collect();
        copy_sparse(&self.recorded.base, path)?;
        let image = File::options().write(true).open(path)?;
        let flushed = told.iter().rposition(|told| matches!(told, Told::Flush)).map_or(0, |last| last + 1);
        let (safe, unsafe_writes) = told.split_at(flushed);
        for told in safe {
            self.apply(*told, u64::MAX, &image)?;
        }
        let mut rng = Rng::new(cut.seed);
        // Of the later ones: none, some, or all.
        let some = rng.below(3);
        for (place, told) in unsafe_writes.iter().enumerate() {
            let is_last = place + 1 == unsafe_writes.len();
            let is_done = some == 2 || (some == 1 && rng.one_in(2));
            let sectors = if is_last { rng.below(16) } else { u64::MAX };
            if is_done {
                self.apply(*told, sectors.saturating_mul(SECTOR_LEN_BYTES), &image)?;
            }
        }
        Ok(unsafe_writes.len())
    }

    /// Carries out what the device was told, `first_bytes` of it at most.
    fn apply(&self, told: Told, first_bytes: u64, image: &File) -> Result<()> {
        let Told::Write { offset, len_bytes, logged_at } = told else { return Ok(()) };
        let mut data = vec![0; usize::try_from(len_bytes.min(first_bytes))?];
        self.recorded.bytes.read_exact_at(&mut data, logged_at)?;
        Ok(image.write_all_at(&data, offset)?)
    }
}

fn copy_sparse(from: &Path, to: &Path) -> Result<()> {
    run(Command::new("cp").arg("--sparse=always").args([from, to])).map(drop)
}

/// The file system of one file.
#[derive(Debug)]
struct Disk {
    recorded: Arc<Recorded>,
}

impl Disk {
    fn attributes(&self, inode: INodeNo) -> FileAttr {
        let (kind, perm, size) = match inode {
            INODE => (FileType::RegularFile, 0o600, self.recorded.len_bytes),
            _ => (FileType::Directory, 0o700, 0),
        };
        let never = SystemTime::UNIX_EPOCH;
        FileAttr {
            ino: inode,
            size,
            blocks: size.div_ceil(SECTOR_LEN_BYTES),
            atime: never,
            mtime: never,
            ctime: never,
            crtime: never,
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
}

impl Filesystem for Disk {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        for capability in [InitFlags::FUSE_BIG_WRITES, InitFlags::FUSE_MAX_PAGES] {
            // Without them writes come in more pieces.
            let _ = config.add_capabilities(capability);
        }
        Ok(())
    }

    fn lookup(&self, _req: &Request, _parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match name == NAME {
            true => reply.entry(&TTL, &self.attributes(INODE), Generation(0)),
            false => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _req: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&TTL, &self.attributes(ino));
    }

    fn open(&self, _req: &Request, _ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        reply.opened(FileHandle(0), FopenFlags::FOPEN_KEEP_CACHE);
    }

    fn read(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let len_bytes = self.recorded.len_bytes.saturating_sub(offset).min(u64::from(size));
        let mut data = vec![0; len_bytes as usize];
        match self.recorded.now.read_exact_at(&mut data, offset) {
            Ok(()) => reply.data(&data),
            Err(_) => reply.error(Errno::EIO),
        }
    }

    fn write(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        match self.recorded.write(offset, data) {
            Ok(()) => reply.written(data.len() as u32),
            Err(_) => reply.error(Errno::EIO),
        }
    }

    fn fsync(&self, _req: &Request, _ino: INodeNo, _fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        self.recorded.log().told.push(Told::Flush);
        reply.ok();
    }

    fn flush(&self, _req: &Request, _ino: INodeNo, _fh: FileHandle, _lock_owner: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }
}

#[cfg(test)]
mod tests {
    use anyhow::ensure;

    use super::*;
    use crate::guard::ScratchDir;

    #[test]
    fn what_was_flushed_is_there_and_what_was_not_may_be() -> Result<()> {
        let scratch = ScratchDir::new("cut-disk")?;
        let disk = CutDisk::new(scratch.path(), 1 << 20, &mut Command::new("true"))?;
        let device = File::options().write(true).open(disk.device())?;
        device.write_all_at(&[1; 4096], 0)?;
        device.sync_all()?;
        let safe = disk.told();
        device.write_all_at(&[2; 4096], 0)?;
        device.write_all_at(&[3; 4096], 8192)?;
        device.sync_all()?;
        ensure!(safe >= 2 && disk.told() >= safe + 3, "{safe} and {} commands", disk.told());
        let path = scratch.path().join("image");
        let mut seen = std::collections::BTreeSet::new();
        for seed in 0..64 {
            let at = disk.told() - 1;
            let window = disk.image(Cut { at, seed }, &path)?;
            ensure!(window >= 2, "{window} writes are not safe before the last flush");
            let image = fs::read(&path)?;
            ensure!(image.len() == 1 << 20 && image[4095] != 0, "what was flushed is gone");
            seen.insert((image[0], image[8192]));
            disk.image(Cut { at: disk.told(), seed }, &path)?;
            let image = fs::read(&path)?;
            ensure!(image[..4096] == [2; 4096] && image[8192..12288] == [3; 4096], "the last flush lost something");
        }
        // Either order, and both or none.
        for expected in [(1, 0), (1, 3), (2, 0), (2, 3)] {
            ensure!(seen.contains(&expected), "never {expected:?}: {seen:?}");
        }
        Ok(())
    }
}
