//! The comparison finds a planted difference of every kind, and each exception hides its own kind only.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, chown, symlink};
use std::path::Path;
use std::time::{Duration, SystemTime};

use anyhow::Result;
use hermes_tests::compare::{Differences, Exceptions, What, compare};
use hermes_tests::guard::ScratchDir;
use hermes_tests::snapshot::Snapshot;
use rustix::fs::{
    AtFlags, CWD, FileType, Mode, Timespec, Timestamps, XattrFlags, lremovexattr, lsetxattr, makedev, mknodat,
    utimensat,
};

/// The mtime of everything in the tree, in seconds; any moment that is not "now".
const LONG_AGO: i64 = 1_500_000_000;

type Change = fn(&Path) -> Result<()>;

fn device(path: &Path, kind: FileType, minor: u32) -> Result<()> {
    Ok(mknodat(CWD, path, kind, Mode::from_raw_mode(0o600), makedev(9, minor))?)
}

/// A tree with something of everything.
fn build(root: &Path) -> Result<()> {
    fs::create_dir(root.join("dir"))?;
    fs::create_dir(root.join("empty"))?;
    fs::write(root.join("file"), "content")?;
    fs::write(root.join("dir/other"), "other")?;
    fs::hard_link(root.join("file"), root.join("dir/link"))?;
    symlink("target", root.join("symlink"))?;
    device(&root.join("char"), FileType::CharacterDevice, 1)?;
    device(&root.join("block"), FileType::BlockDevice, 2)?;
    device(&root.join("pipe"), FileType::Fifo, 0)?;
    lsetxattr(root.join("file"), "user.key", b"value", XattrFlags::empty())?;
    lsetxattr(root.join("dir"), "trusted.overlay.opaque", b"y", XattrFlags::empty())?;
    Ok(())
}

fn set_mtime(path: &Path, seconds: i64, nanoseconds: i64) -> Result<()> {
    let time = Timespec { tv_sec: seconds, tv_nsec: nanoseconds };
    let times = Timestamps { last_access: time, last_modification: time };
    Ok(utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW)?)
}

/// A tree with `change`, every mtime set back afterwards except those that the change made a point of.
fn snapshot(change: Change) -> Result<Snapshot> {
    let scratch = ScratchDir::new("compare")?;
    build(scratch.path())?;
    set_all_mtimes(scratch.path())?;
    let before = Snapshot::take(scratch.path())?;
    change(scratch.path())?;
    let mut after = Snapshot::take(scratch.path())?;
    // Adding and removing names touches directories: that is no planted difference.
    for (path, node) in &mut after.nodes {
        let moved = before.nodes.get(path).is_some_and(|old| old.mtime != node.mtime);
        if moved && node.mtime.0 != LONG_AGO {
            node.mtime = (LONG_AGO, 7);
        }
    }
    Ok(after)
}

fn set_all_mtimes(root: &Path) -> Result<()> {
    for entry in fs::read_dir(root)? {
        let path = entry?.path();
        if path.is_dir() && !path.is_symlink() {
            set_all_mtimes(&path)?;
        }
        set_mtime(&path, LONG_AGO, 7)?;
    }
    set_mtime(root, LONG_AGO, 7)
}

fn kinds(differences: &Differences) -> Vec<(String, What)> {
    let kinds = differences.0.iter();
    kinds.map(|difference| (String::from_utf8_lossy(&difference.path).into_owned(), difference.what)).collect()
}

#[test]
fn every_kind_of_difference_is_found() -> Result<()> {
    use What::{
        Content, Device, Existence, LinkCount, LinkNames, Mtime, Owner, Permissions, Size, Target, Type, Xattrs,
    };
    let changes: &[(Change, &[(&str, What)])] = &[
        (|_| Ok(()), &[]),
        (|root| Ok(fs::remove_dir(root.join("empty"))?), &[("empty", Existence)]),
        (|root| Ok(fs::write(root.join("added"), "")?), &[("added", Existence)]),
        (
            |root| {
                fs::remove_file(root.join("pipe"))?;
                symlink("x", root.join("pipe"))?;
                fs::set_permissions(root, fs::Permissions::from_mode(0o700))?;
                set_mtime(&root.join("pipe"), LONG_AGO, 7)
            },
            &[("pipe", Type), ("pipe", Permissions)],
        ),
        (
            |root| Ok(fs::set_permissions(root.join("dir/other"), fs::Permissions::from_mode(0o4644))?),
            &[("dir/other", Permissions)],
        ),
        (|root| Ok(chown(root.join("empty"), Some(1), None)?), &[("empty", Owner)]),
        (|root| Ok(chown(root.join("empty"), None, Some(1))?), &[("empty", Owner)]),
        (|root| set_mtime(&root.join("symlink"), LONG_AGO, 8), &[("symlink", Mtime)]),
        (|root| set_mtime(&root.join("empty"), LONG_AGO, 0), &[("empty", Mtime)]),
        (
            |root| Ok(lsetxattr(root.join("file"), "user.key", b"Value", XattrFlags::empty())?),
            &[("dir/link", Xattrs), ("file", Xattrs)],
        ),
        (|root| Ok(lremovexattr(root.join("file"), "user.key")?), &[("dir/link", Xattrs), ("file", Xattrs)]),
        (|root| Ok(lsetxattr(root.join("empty"), "user.new", b"", XattrFlags::empty())?), &[("empty", Xattrs)]),
        // What overlayfs notes for itself is no difference.
        (|root| Ok(lremovexattr(root.join("dir"), "trusted.overlay.opaque")?), &[]),
        (
            |root| {
                fs::remove_file(root.join("symlink"))?;
                Ok(symlink("Target", root.join("symlink"))?)
            },
            &[("symlink", Target)],
        ),
        (
            |root| {
                fs::remove_file(root.join("char"))?;
                device(&root.join("char"), FileType::CharacterDevice, 5)
            },
            &[("char", Device)],
        ),
        (|root| Ok(fs::write(root.join("dir/other"), "longer than it was")?), &[("dir/other", Size)]),
        (|root| Ok(fs::write(root.join("dir/other"), "0ther")?), &[("dir/other", Content)]),
        (
            |root| Ok(fs::hard_link(root.join("block"), root.join("block2"))?),
            &[("block", LinkNames), ("block", LinkCount), ("block2", Existence)],
        ),
        (
            |root| {
                // The same content under the same names, in two inodes.
                fs::remove_file(root.join("dir/link"))?;
                fs::copy(root.join("file"), root.join("dir/link"))?;
                Ok(lsetxattr(root.join("dir/link"), "user.key", b"value", XattrFlags::empty())?)
            },
            &[("dir/link", LinkNames), ("dir/link", LinkCount), ("file", LinkNames), ("file", LinkCount)],
        ),
    ];
    let expected = snapshot(|_| Ok(()))?;
    for (number, (change, wanted)) in changes.iter().enumerate() {
        let exceptions = Exceptions { root_metadata: true, ..Exceptions::default() };
        let found = kinds(&compare(&expected, &snapshot(*change)?, &exceptions));
        let wanted: Vec<(String, What)> = wanted.iter().map(|&(path, what)| (path.to_owned(), what)).collect();
        let (mut found, mut wanted) = (found, wanted);
        found.sort();
        wanted.sort();
        assert_eq!(found, wanted, "change {number}");
    }
    Ok(())
}

#[test]
fn names_that_cannot_be_looked_up_are_found() -> Result<()> {
    let expected = snapshot(|_| Ok(()))?;
    let mut actual = expected.clone();
    actual.phantoms.insert(b"ghost".to_vec());
    assert_eq!(kinds(&compare(&expected, &actual, &Exceptions::default())), [("ghost".to_owned(), What::Existence)]);
    let excepted = Exceptions { phantoms: true, ..Exceptions::default() };
    assert!(compare(&expected, &actual, &excepted).is_empty());
    Ok(())
}

#[test]
fn exceptions_hide_their_own_kind_only() -> Result<()> {
    let now = SystemTime::now();
    let era = SystemTime::UNIX_EPOCH + Duration::from_secs(LONG_AGO as u64);
    let expected = snapshot(|_| Ok(()))?;
    let found = |change: Change, exceptions: &Exceptions| -> Result<Vec<(String, What)>> {
        Ok(kinds(&compare(&expected, &snapshot(change)?, exceptions)))
    };

    // Only directories, and only those touched since.
    let older: Change = |root| set_mtime(&root.join("empty"), LONG_AGO, 0);
    let since = |since| Exceptions { directory_mtimes_since: Some(since), ..Exceptions::default() };
    assert_eq!(found(older, &since(era))?, []);
    assert_eq!(found(older, &since(now))?, [("empty".to_owned(), What::Mtime)]);
    let file: Change = |root| set_mtime(&root.join("dir/other"), LONG_AGO, 0);
    assert_eq!(found(file, &since(era))?, [("dir/other".to_owned(), What::Mtime)]);

    let root_mode: Change = |root| Ok(fs::set_permissions(root, fs::Permissions::from_mode(0o711))?);
    assert_eq!(found(root_mode, &Exceptions::default())?, [(String::new(), What::Permissions)]);
    assert_eq!(found(root_mode, &Exceptions { root_metadata: true, ..Exceptions::default() })?, []);

    let linked: Change = |root| Ok(fs::hard_link(root.join("pipe"), root.join("pipe2"))?);
    let uncounted = Exceptions { link_counts: true, subtrees: [b"pipe2".to_vec()].into(), ..Exceptions::default() };
    assert_eq!(found(linked, &uncounted)?, [("pipe".to_owned(), What::LinkNames)]);

    let below: Change = |root| Ok(fs::write(root.join("dir/new"), "")?);
    let subtree = |name: &[u8]| Exceptions { subtrees: [name.to_vec()].into(), ..Exceptions::default() };
    assert_eq!(found(below, &subtree(b"dir"))?, []);
    assert_eq!(found(below, &subtree(b"di"))?, [("dir/new".to_owned(), What::Existence)]);

    let attribute: Change = |root| Ok(lsetxattr(root.join("dir"), "user.hermes.x", b"1", XattrFlags::empty())?);
    let prefix = Exceptions { xattr_prefixes: vec![b"user.hermes.".to_vec()], ..Exceptions::default() };
    assert_eq!(found(attribute, &prefix)?, []);
    let mtime = Exceptions { mtimes: [b"dir/other".to_vec()].into(), ..Exceptions::default() };
    assert_eq!(found(file, &mtime)?, []);
    Ok(())
}
