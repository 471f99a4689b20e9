//! Kernel mounts: making them, probing for them, undoing them.
//!
//! [`erofs`] mounts a tree over layer files, [`loops`] lends loop devices to kernels that mount EROFS from block devices
//! only, [`probe`] finds out what this kernel can do by doing it, [`users`] who reads from trees. A [`Mounted`] undoes its mount when it is dropped.

mod apart;
pub mod erofs;
pub mod loops;
pub mod probe;
pub mod users;

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use rustix::mount::{MountAttrFlags, UnmountFlags};
use thiserror::Error;

/// A mount that could not be made.
#[derive(Debug, Error)]
pub enum MountError {
    /// The kernel refused.
    #[error("cannot mount {what} at {}: {source}{}", path.display(), said(log))]
    Refused {
        /// What was to be mounted.
        what: &'static str,
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
        /// What the kernel said in addition.
        log: String,
    },
    /// There is no loop device.
    #[error("cannot attach {} to a loop device: {source}", path.display())]
    Loop {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

fn said(log: &str) -> String {
    if log.is_empty() { String::new() } else { format!(" (the kernel says: {log})") }
}

/// How every tree is mounted. Set-id programs and device nodes of an image have no power here: whoever starts containers
/// mounts an overlay above, which has its own flags.
pub(crate) fn attributes() -> MountAttrFlags {
    MountAttrFlags::MOUNT_ATTR_RDONLY
        | MountAttrFlags::MOUNT_ATTR_NOATIME
        | MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
}

/// A mount point that this process made. Dropping it unmounts, detaching it when it is busy.
#[derive(Debug)]
pub struct Mounted {
    path: PathBuf,
    /// Kept as long as the mount: loop devices under it.
    _devices: Vec<loops::LoopDevice>,
    read_ahead_knob: Option<PathBuf>,
    active: bool,
}

impl Mounted {
    fn new(path: &Path, devices: Vec<loops::LoopDevice>, read_ahead_knob: Option<PathBuf>) -> Self {
        Self { path: path.to_owned(), _devices: devices, read_ahead_knob, active: true }
    }

    /// Sets the kernel's readahead for files that are opened from now on, if the mount has one of its own.
    pub fn set_read_ahead(&self, kib: u32) {
        let Some(knob) = &self.read_ahead_knob else { return };
        if let Err(error) = std::fs::write(knob, kib.to_string()) {
            tracing::debug!(knob = %knob.display(), %error, "readahead stays as it was");
        }
    }

    /// A mount that another process has made at `path`.
    pub(crate) fn adopt(path: &Path) -> Self {
        Self::new(path, Vec::new(), None)
    }

    /// Where.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Lets the mount outlive this value.
    pub(crate) fn leave(&mut self) {
        self.active = false;
    }

    /// Unmounts.
    ///
    /// # Errors
    /// [`io::ErrorKind::ResourceBusy`] while a process has a file of it open; the mount stays.
    pub fn unmount(&mut self) -> io::Result<()> {
        rustix::mount::unmount(&self.path, UnmountFlags::empty())?;
        self.active = false;
        Ok(())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if self.active
            && let Err(error) = rustix::mount::unmount(&self.path, UnmountFlags::DETACH)
        {
            tracing::warn!(path = %self.path.display(), %error, "cannot unmount");
        }
    }
}

/// Whether `path` is the root of a mount, by the kernel's own list.
///
/// # Errors
/// When the list cannot be read.
pub fn is_mount_point(path: &Path) -> io::Result<bool> {
    let wanted = path.canonicalize()?;
    let list = std::fs::read_to_string("/proc/self/mountinfo")?;
    Ok(list.lines().filter_map(|line| line.split(' ').nth(4)).any(|point| unescape(point) == wanted))
}

/// The mount points at and below `dir`, in the order in which they were mounted.
///
/// # Errors
/// When the kernel's list cannot be read.
pub fn below(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let list = std::fs::read_to_string("/proc/self/mountinfo")?;
    let points = list.lines().filter_map(|line| line.split(' ').nth(4)).map(unescape);
    Ok(points.filter(|point| point.starts_with(dir)).collect())
}

/// The type of the topmost file system at each mount point, by the kernel's own list. No mount point is touched.
///
/// # Errors
/// When the list cannot be read.
pub(crate) fn types() -> io::Result<BTreeMap<PathBuf, String>> {
    Ok(types_in(&std::fs::read_to_string("/proc/self/mountinfo")?))
}

/// The same by a list in the form of proc_pid_mountinfo(5).
pub fn types_in(list: &str) -> BTreeMap<PathBuf, String> {
    // The mount point is the fifth field, the type the first after the dash (proc_pid_mountinfo(5)); later lines lie
    // above earlier ones.
    let entry = |line: &str| {
        let (before, after) = line.split_once(" - ")?;
        Some((unescape(before.split(' ').nth(4)?), after.split(' ').next()?.to_owned()))
    };
    list.lines().filter_map(entry).collect()
}

/// The kernel writes space, tab, newline and backslash of mount points in octal.
fn unescape(text: &str) -> PathBuf {
    use std::os::unix::ffi::OsStringExt as _;
    let bytes = text.as_bytes();
    let mut path = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let octal = bytes.get(at + 1..at + 4).filter(|_| bytes[at] == b'\\');
        let value = octal.and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        path.push(value.unwrap_or(bytes[at]));
        at += if value.is_some() { 4 } else { 1 };
    }
    std::ffi::OsString::from_vec(path).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_points_are_unescaped() {
        assert_eq!(unescape("/a\\040b\\134c"), PathBuf::from("/a b\\c"));
        assert_eq!(unescape("/plain\\9"), PathBuf::from("/plain\\9"));
    }

    #[test]
    fn the_root_is_a_mount_point_and_a_new_folder_is_not() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        assert!(is_mount_point(Path::new("/")).expect("readable"));
        assert!(!is_mount_point(folder.path()).expect("readable"));
        let types = types().expect("readable");
        assert_eq!(types.get(Path::new("/proc")).map(String::as_str), Some("proc"));
        assert_eq!(types.get(folder.path()), None);
    }
}
