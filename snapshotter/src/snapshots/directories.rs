//! The snapshots' directories: `<root>/<number>/fs` holds a layer, `<root>/<number>/work` is the overlay's scratch
//! space of an active one, `<root>/<number>/mapped` has mounts of what is below it with mapped ids, where they are needed.
//!
//! A directory is made as `new-<number>`, renamed when it is whole and durable, and only then gets its record; when the
//! record is gone it is renamed to `removed-<number>` and deleted later. Whatever a crash leaves is thus a directory
//! without a record, which [`Directories::collect`] finds. Numbers are never used again, so a name can only ever be that
//! of one snapshot.

use std::collections::BTreeSet;
use std::fs::{self, DirBuilder, File, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use hermes_store::SnapshotUsage;
use parking_lot::RwLock;
use rustix::mount::UnmountFlags;

use super::error::ServiceError;
use super::mapped;
use super::overlay::can_be_option;

/// Unit of `st_blocks` (stat(2)).
const BLOCK_BYTES: u64 = 512;
/// What a directory is called before it is whole.
const NEW: &str = "new-";
/// What it is called when its snapshot is gone.
const REMOVED: &str = "removed-";

/// The folder with all snapshots' directories.
#[derive(Debug)]
pub(super) struct Directories {
    root: PathBuf,
    /// Read by who makes or retires a directory, written by who looks for directories without a record.
    changing: RwLock<()>,
}

impl Directories {
    /// Opens or makes the folder.
    ///
    /// # Errors
    /// When its path or its filesystem will not do.
    pub(super) fn open(root: &Path) -> Result<Self, ServiceError> {
        let make = DirBuilder::new().recursive(true).mode(0o700).create(root);
        make.map_err(ServiceError::io("make the folder", root))?;
        // containerd puts the path into mounts of its own, so it has to be the real one.
        let root = fs::canonicalize(root).map_err(ServiceError::io("resolve", root))?;
        if !can_be_option(&root) {
            return Err(ServiceError::Path { path: root });
        }
        if !tells_file_types(&root).map_err(ServiceError::io("look into", &root))? {
            return Err(ServiceError::NoFileTypes { path: root });
        }
        Ok(Self { root, changing: RwLock::new(()) })
    }

    fn dir(&self, id: u64) -> PathBuf {
        self.root.join(id.to_string())
    }

    /// A snapshot's layer.
    pub(super) fn layer(&self, id: u64) -> PathBuf {
        self.dir(id).join("fs")
    }

    /// The overlay's scratch directory beside it.
    pub(super) fn work(&self, id: u64) -> PathBuf {
        self.dir(id).join("work")
    }

    /// Makes a snapshot's directory, then has `insert` make its record. Without the record the directory goes again.
    ///
    /// # Errors
    /// When the disk refuses; what `insert` says.
    pub(super) fn make<T, E: From<ServiceError>>(
        &self,
        id: u64,
        with_work: bool,
        owner: Option<(u32, u32)>,
        insert: impl FnOnce() -> Result<T, E>,
    ) -> Result<T, E> {
        let _changing = self.changing.read();
        let temporary = self.root.join(format!("{NEW}{id}"));
        let made = self.fill(&temporary, with_work, owner).and_then(|()| self.publish(&temporary, id));
        if let Err(error) = made {
            let _ = fs::remove_dir_all(&temporary);
            return Err(error.into());
        }
        insert().inspect_err(|_| {
            if let Err(error) = fs::remove_dir_all(self.dir(id)) {
                tracing::warn!(id, %error, "a directory without a snapshot stays until the next cleanup");
            }
        })
    }

    fn fill(&self, dir: &Path, with_work: bool, owner: Option<(u32, u32)>) -> Result<(), ServiceError> {
        make_dir(dir, 0o700)?;
        let layer = dir.join("fs");
        make_dir(&layer, 0o755)?;
        if let Some((user, group)) = owner {
            let chown = std::os::unix::fs::lchown(&layer, Some(user), Some(group));
            chown.map_err(ServiceError::io("change the owner of", &layer))?;
        }
        if with_work {
            make_dir(&dir.join("work"), 0o711)?;
        }
        sync_dir(dir)
    }

    fn publish(&self, temporary: &Path, id: u64) -> Result<(), ServiceError> {
        fs::rename(temporary, self.dir(id)).map_err(ServiceError::io("rename", temporary))?;
        sync_dir(&self.root)
    }

    /// Where the layers below are mounted for it with mapped ids.
    pub(super) fn mapped(&self, id: u64) -> PathBuf {
        self.dir(id).join("mapped")
    }

    /// Takes a snapshot's directory out of the way, once its record is gone.
    pub(super) fn retire(&self, id: u64) {
        let _changing = self.changing.read();
        // Before the tree that they show goes.
        mapped::hide(&self.mapped(id));
        match fs::rename(self.dir(id), self.root.join(format!("{REMOVED}{id}"))) {
            // A remote layer has none.
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(id, %error, "a removed snapshot's directory waits for the next cleanup");
            }
            _ => {}
        }
    }

    /// Takes every directory out of the way that has no record, as `known` tells.
    ///
    /// # Errors
    /// When the folder cannot be read; what `known` says.
    pub(super) fn collect<E: From<ServiceError>>(
        &self,
        known: impl FnOnce() -> Result<BTreeSet<u64>, E>,
    ) -> Result<u64, E> {
        let _nobody_changes_one = self.changing.write();
        let known = known()?;
        let mut collected = 0;
        for name in self.names()? {
            let id = name.parse::<u64>().ok().filter(|id| id.to_string() == name);
            let unfinished = name.strip_prefix(NEW);
            let orphan = id.is_some_and(|id| !known.contains(&id)) || unfinished.is_some();
            if orphan {
                let from = self.root.join(&name);
                let to = self.root.join(format!("{REMOVED}{}", unfinished.unwrap_or(&name)));
                fs::rename(&from, &to).map_err(ServiceError::io("rename", &from))?;
                collected += 1;
            }
        }
        Ok(collected)
    }

    /// Deletes what [`Self::retire`] and [`Self::collect`] took out of the way. What cannot be deleted stays for the
    /// next time.
    ///
    /// # Errors
    /// When the folder or the mount table cannot be read.
    pub(super) fn delete_removed(&self) -> Result<(), ServiceError> {
        let removed: Vec<String> = self.names()?.into_iter().filter(|name| name.starts_with(REMOVED)).collect();
        if removed.is_empty() {
            return Ok(());
        }
        // Never through a mount: its files are not the snapshot's.
        let table = Path::new("/proc/self/mountinfo");
        let mounts = mount_points(&fs::read(table).map_err(ServiceError::io("read", table))?);
        for name in removed {
            let dir = self.root.join(&name);
            let below: Vec<&PathBuf> = mounts.iter().filter(|mount| mount.starts_with(&dir)).collect();
            let detach = |mount: &&PathBuf| {
                let flags = UnmountFlags::DETACH | UnmountFlags::NOFOLLOW;
                rustix::mount::unmount(mount.as_path(), flags).map_err(io::Error::from)
            };
            let deleted = below.iter().rev().try_for_each(detach).and_then(|()| fs::remove_dir_all(&dir));
            match deleted {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    tracing::warn!(dir = %dir.display(), %error, "a removed snapshot cannot be deleted yet");
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Whether a snapshot's directory is there.
    pub(super) fn exists(&self, id: u64) -> bool {
        self.layer(id).is_dir()
    }

    fn names(&self) -> Result<Vec<String>, ServiceError> {
        let failed = || ServiceError::io("list", &self.root);
        let entries = fs::read_dir(&self.root).map_err(failed())?;
        // A name that is no text is not ours.
        let names = entries.map(|entry| entry.map(|entry| entry.file_name().into_string().ok()));
        names.filter_map(Result::transpose).collect::<io::Result<_>>().map_err(failed())
    }
}

fn make_dir(dir: &Path, mode: u32) -> Result<(), ServiceError> {
    let made = fs::create_dir(dir).and_then(|()| fs::set_permissions(dir, Permissions::from_mode(mode)));
    made.map_err(ServiceError::io("make", dir))
}

fn sync_dir(dir: &Path) -> Result<(), ServiceError> {
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(ServiceError::io("sync", dir))
}

/// Whether readdir(3) tells what an entry is; overlayfs shows whiteouts as files where it does not.
fn tells_file_types(root: &Path) -> io::Result<bool> {
    use rustix::fs::{Dir, FileType};
    let probe = root.join(format!("{NEW}probe"));
    fs::create_dir_all(probe.join("entry"))?;
    let told = Dir::read_from(File::open(&probe)?)?
        .all(|entry| entry.is_ok_and(|entry| entry.file_type() != FileType::Unknown));
    fs::remove_dir_all(&probe)?;
    Ok(told)
}

/// The mount points in a mount table, in the order in which they were mounted.
fn mount_points(table: &[u8]) -> Vec<PathBuf> {
    use std::os::unix::ffi::OsStringExt as _;
    let lines = table.split(|&byte| byte == b'\n');
    // Field 5 (proc_pid_mountinfo(5)), with blanks and the like as \ooo; the root's own path is plain digits below a
    // folder that may have some.
    let points = lines.filter_map(|line| line.split(|&byte| byte == b' ').nth(4)).map(unescape);
    points.map(|path| PathBuf::from(std::ffi::OsString::from_vec(path))).collect()
}

fn unescape(field: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, tail)) = rest.split_first() {
        let digits = tail.get(..3).filter(|_| byte == b'\\').and_then(|digits| std::str::from_utf8(digits).ok());
        let value = digits.and_then(|digits| u8::from_str_radix(digits, 8).ok());
        plain.push(value.unwrap_or(byte));
        rest = if value.is_some() { &tail[3..] } else { tail };
    }
    plain
}

/// What the tree at `root` takes on its own filesystem, as du(1) counts: blocks, and each inode once. What goes away
/// while it is counted does not count.
///
/// # Errors
/// When something of it cannot be looked at.
pub(super) fn disk_usage(root: &Path) -> Result<SnapshotUsage, ServiceError> {
    let mut usage = SnapshotUsage::default();
    let top = fs::symlink_metadata(root).map_err(ServiceError::io("look at", root))?;
    let mut linked = BTreeSet::new();
    let mut dirs = Vec::new();
    count(&mut usage, &mut linked, &top);
    if top.is_dir() {
        dirs.push(root.to_owned());
    }
    while let Some(dir) = dirs.pop() {
        let entries = match fs::read_dir(&dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            entries => entries.map_err(ServiceError::io("list", &dir))?,
        };
        for entry in entries {
            let entry = entry.map_err(ServiceError::io("list", &dir))?;
            let metadata = match entry.metadata() {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                metadata => metadata.map_err(ServiceError::io("look at", &entry.path()))?,
            };
            if metadata.dev() != top.dev() {
                continue;
            }
            count(&mut usage, &mut linked, &metadata);
            if metadata.is_dir() {
                dirs.push(entry.path());
            }
        }
    }
    Ok(usage)
}

fn count(usage: &mut SnapshotUsage, linked: &mut BTreeSet<u64>, metadata: &fs::Metadata) {
    let known = !metadata.is_dir() && metadata.nlink() > 1 && !linked.insert(metadata.ino());
    if !known {
        usage.size_bytes += metadata.blocks() * BLOCK_BYTES;
        usage.inodes += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(dir: &tempfile::TempDir) -> Directories {
        Directories::open(&dir.path().join("snapshots")).expect("opens")
    }

    fn made(directories: &Directories, id: u64) {
        directories.make(id, true, None, || Ok::<(), ServiceError>(())).expect("makes");
    }

    #[test]
    fn orphans_go_and_the_rest_stays() {
        let dir = tempfile::tempdir().expect("a folder");
        let directories = open(&dir);
        (1..=4).for_each(|id| made(&directories, id));
        fs::create_dir_all(directories.root.join("new-9/fs")).expect("an unfinished one");
        fs::write(directories.root.join("removed-8"), "no directory").expect("a file");
        fs::create_dir(directories.root.join("someone else's")).expect("a foreign one");
        directories.retire(4);
        let known = || Ok::<_, ServiceError>(BTreeSet::from([1, 4]));
        assert_eq!(directories.collect(known).expect("collects"), 3);
        directories.delete_removed().expect("deletes");
        let mut left = directories.names().expect("lists");
        left.sort();
        assert_eq!(left, ["1", "removed-8", "someone else's"]);
        assert!(directories.exists(1) && !directories.exists(2));
    }

    #[test]
    fn none_is_retired_under_the_eyes_of_who_collects() {
        let dir = tempfile::tempdir().expect("a folder");
        let directories = open(&dir);
        made(&directories, 1);
        std::thread::scope(|scope| {
            let (retired, is_retired) = std::sync::mpsc::sync_channel(1);
            let (directories, moment) = (&directories, std::time::Duration::from_millis(50));
            let known = || {
                scope.spawn(move || {
                    directories.retire(1);
                    let _ = retired.send(());
                });
                is_retired.recv_timeout(moment).expect_err("waits until all are collected");
                Ok::<_, ServiceError>(BTreeSet::new())
            };
            assert_eq!(directories.collect(known).expect("collects"), 1);
        });
        directories.delete_removed().expect("deletes");
        assert_eq!(directories.names().expect("lists"), Vec::<String>::new());
    }

    #[test]
    fn a_directory_without_a_record_does_not_stay() {
        let dir = tempfile::tempdir().expect("a folder");
        let directories = open(&dir);
        let refused: Result<(), _> = directories.make(1, false, None, || Err(ServiceError::Interrupted));
        assert!(matches!(refused, Err(ServiceError::Interrupted)));
        assert_eq!(directories.names().expect("lists"), Vec::<String>::new());
    }

    #[test]
    fn paths_that_break_options_are_refused() {
        let dir = tempfile::tempdir().expect("a folder");
        let wrong = Directories::open(&dir.path().join("a:b"));
        assert!(matches!(wrong, Err(ServiceError::Path { .. })));
    }

    #[test]
    fn usage_is_that_of_du() {
        let dir = tempfile::tempdir().expect("a folder");
        let root = dir.path().join("root");
        fs::create_dir_all(root.join("a/b")).expect("folders");
        fs::write(root.join("a/file"), vec![1; 100_000]).expect("a file");
        fs::hard_link(root.join("a/file"), root.join("a/b/again")).expect("a link");
        std::os::unix::fs::symlink("/etc", root.join("link")).expect("a symbolic link");
        let usage = disk_usage(&root).expect("counts");
        assert_eq!(usage.inodes, 5);
        let du = std::process::Command::new("du").args(["-s", "-B", "512"]).arg(&root).output().expect("du");
        let blocks: u64 =
            String::from_utf8_lossy(&du.stdout).split_whitespace().next().and_then(|n| n.parse().ok()).expect("blocks");
        assert_eq!(usage.size_bytes, blocks * 512);
    }

    #[test]
    fn mount_points_are_unescaped() {
        let table = b"36 35 98:0 /mnt1 /mnt\\0402 rw,noatime master:1 - ext3 /dev/root rw\n";
        assert_eq!(mount_points(table), [PathBuf::from("/mnt 2")]);
    }
}
