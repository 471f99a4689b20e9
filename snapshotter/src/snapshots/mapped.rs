//! Lower directories with mapped ids, for containers in user namespaces.
//!
//! containerd maps the ids of lower directories itself when the mount options ask for it, but not of a tree: it clones the
//! folder that all lower directories have in common, without what is mounted below, and a tree is a mount. So wherever a
//! tree is among them, each lower directory is cloned and mapped here: `<number>/mapped/<place>` is a mount of the same
//! files with other owners, and containerd gets options without a mapping.
//!
//! The mounts are made when a snapshot is made or its mounts are asked for, and go when its directory is retired, before
//! the tree does. What a crash leaves is found like everything below a directory without a record: it is unmounted before
//! the directory is deleted, and being read-only mounts, nothing could be deleted through them. A tree that the next
//! daemon has mounted anew is another file system, by which an old mount of it is known and replaced.
#![allow(unsafe_code, reason = "mount_setattr(2) has no safe form in rustix; a user namespace needs fork(2)")]

use std::fs::{self, File};
use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd as _, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::CWD;
use rustix::mount::{MoveMountFlags, OpenTreeFlags, UnmountFlags, move_mount, open_tree, unmount};

use super::id_map::IdMap;

/// `MOUNT_ATTR_RDONLY` of mount.h.
const READ_ONLY: u64 = 0x1;
/// `MOUNT_ATTR_IDMAP` of mount.h.
const ID_MAPPED: u64 = 0x0010_0000;

/// `struct mount_attr` of mount.h, in its first version.
#[repr(C)]
struct MountAttributes {
    set: u64,
    clear: u64,
    propagation: u64,
    user_namespace: u64,
}

/// Shows each directory of `lower` below `dir`, with the owners that `users` and `groups` say; what is there already stays.
///
/// # Errors
/// When the kernel refuses: one of them is on a file system whose ids cannot be mapped, such as a FUSE tree. Nothing is left
/// mounted then.
pub(super) fn show(dir: &Path, lower: &[PathBuf], users: &IdMap, groups: &IdMap) -> io::Result<Vec<PathBuf>> {
    let mut namespace: Option<OwnedFd> = None;
    let shown = lower.iter().enumerate().map(|(place, source)| {
        let target = dir.join(place.to_string());
        fs::create_dir_all(&target)?;
        if same_directory(source, &target)? {
            return Ok(target);
        }
        if namespace.is_none() {
            namespace = Some(user_namespace(users, groups)?);
        }
        detach(&target)?;
        mount(source, &target, namespace.as_ref().expect("it was just made"))?;
        Ok(target)
    });
    let shown = shown.collect::<io::Result<Vec<_>>>();
    if shown.is_err() {
        hide(dir);
    }
    shown
}

/// Takes away what [`show`] has mounted below `dir`.
pub(super) fn hide(dir: &Path) {
    // Without the folder nothing was mapped.
    let Ok(entries) = fs::read_dir(dir) else { return };
    for entry in entries.flatten() {
        if let Err(error) = detach(&entry.path()) {
            tracing::warn!(dir = %entry.path().display(), %error, "a mapped directory stays mounted until the next cleanup");
        }
    }
}

/// Whether `target` is a mount of `source`: a clone has the same root, an empty folder another.
fn same_directory(source: &Path, target: &Path) -> io::Result<bool> {
    let (source, target) = (fs::metadata(source)?, fs::metadata(target)?);
    Ok((source.dev(), source.ino()) == (target.dev(), target.ino()))
}

fn detach(target: &Path) -> io::Result<()> {
    match unmount(target, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
        // Not a mount point.
        Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOENT) => Ok(()),
        other => Ok(other?),
    }
}

fn mount(source: &Path, target: &Path, namespace: &OwnedFd) -> io::Result<()> {
    let clone = open_tree(CWD, source, OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC)?;
    let attributes = MountAttributes {
        set: READ_ONLY | ID_MAPPED,
        clear: 0,
        propagation: 0,
        user_namespace: namespace.as_raw_fd() as u64,
    };
    // SAFETY: the descriptor is open, the path is an empty text that ends with zero, and the structure is the kernel's, of
    // the length that is given; all of them outlive the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            clone.as_fd().as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const attributes,
            size_of::<MountAttributes>(),
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(move_mount(clone, "", CWD, target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?)
}

/// A user namespace in which nobody is, with these mappings.
///
/// A process has to be in it while they are written: a child that does nothing but stop itself.
fn user_namespace(users: &IdMap, groups: &IdMap) -> io::Result<OwnedFd> {
    // SAFETY: the child of a process with threads may call what is safe in a signal handler, and calls nothing else: four
    // system calls, without memory of its own.
    let pid = match unsafe { libc::fork() } {
        -1 => return Err(io::Error::last_os_error()),
        // SAFETY: this is the child.
        0 => unsafe { child() },
        pid => pid,
    };
    let namespace = namespace_of(pid, users, groups);
    // SAFETY: the process is a child of this one that nobody else waits for, so its number is still its own.
    unsafe {
        libc::kill(pid, libc::SIGKILL);
        libc::waitpid(pid, std::ptr::null_mut(), 0);
    }
    namespace
}

/// What the child does: a namespace of its own, then nothing until it is killed, also with its parent.
///
/// # Safety
/// To be called in a child after fork(2) only.
unsafe fn child() -> ! {
    // SAFETY: system calls with numbers alone.
    unsafe {
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        if libc::unshare(libc::CLONE_NEWUSER) != 0 {
            libc::_exit(*libc::__errno_location());
        }
        libc::kill(libc::getpid(), libc::SIGSTOP);
        libc::_exit(0)
    }
}

fn namespace_of(pid: i32, users: &IdMap, groups: &IdMap) -> io::Result<OwnedFd> {
    let mut status = 0;
    // SAFETY: it is this process' child, and the status is written to a number that outlives the call.
    while unsafe { libc::waitpid(pid, &raw mut status, libc::WUNTRACED) } != pid {
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
    if libc::WIFEXITED(status) {
        return Err(io::Error::from_raw_os_error(libc::WEXITSTATUS(status)));
    }
    if !libc::WIFSTOPPED(status) {
        return Err(io::Error::other("the process that holds a new user namespace was killed"));
    }
    fs::write(format!("/proc/{pid}/uid_map"), users.for_kernel())?;
    fs::write(format!("/proc/{pid}/gid_map"), groups.for_kernel())?;
    Ok(File::open(format!("/proc/{pid}/ns/user"))?.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn owners_are_mapped_and_everything_goes() {
        if !rustix::process::geteuid().is_root() {
            return; // Mounting takes root.
        }
        let scratch = tempfile::tempdir().expect("a folder");
        let (source, dir) = (scratch.path().join("source"), scratch.path().join("mapped"));
        fs::create_dir(&source).expect("a folder");
        for (name, id) in [("root", 0), ("seven", 7), ("far", 5000)] {
            fs::write(source.join(name), name).expect("a file");
            std::os::unix::fs::lchown(source.join(name), Some(id), Some(id)).expect("an owner");
        }
        let (users, groups) = (IdMap::parse("0:1000:100").expect("a map"), IdMap::parse("0:2000:100").expect("a map"));
        let lower = [source.clone()];
        let shown = show(&dir, &lower, &users, &groups).expect("mapped");
        let owner = |name: &str| {
            let found = fs::metadata(shown[0].join(name)).expect("there");
            (found.uid(), found.gid())
        };
        assert_eq!((owner("root"), owner("seven")), ((1000, 2000), (1007, 2007)));
        // The kernel's overflow id stands for what is outside of the mapping.
        assert_eq!(owner("far"), (65534, 65534));
        assert!(fs::remove_file(shown[0].join("root")).is_err(), "read-only");
        assert_eq!(show(&dir, &lower, &users, &groups).expect("again"), shown);
        let mounts = || fs::read_to_string("/proc/self/mountinfo").expect("a table");
        let name = dir.to_str().expect("text").to_owned();
        assert_eq!(mounts().matches(&name).count(), 1);
        hide(&dir);
        assert_eq!(mounts().matches(&name).count(), 0);
        assert!(fs::read(shown[0].join("root")).is_err() && source.join("root").exists());
    }

    #[test]
    fn what_cannot_be_mapped_leaves_nothing() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let scratch = tempfile::tempdir().expect("a folder");
        let users = IdMap::parse("0:1000:100").expect("a map");
        let lower = [scratch.path().to_owned(), "/proc".into()];
        let dir = scratch.path().join("mapped");
        assert!(show(&dir, &lower, &users, &users).is_err());
        let table = fs::read_to_string("/proc/self/mountinfo").expect("a table");
        assert!(!table.contains(dir.to_str().expect("text")));
    }
}
