//! How two trees differ.
//!
//! Compares everything that a program can see of a file: path, type, mode, owner, mtime to the nanosecond, extended
//! attributes, symlink target, which names are one inode, link count, device number, size and content. Whatever is
//! *not* compared is an exception that the caller states, with a reason, in [`Exceptions`].

use std::collections::BTreeSet;
use std::fmt::{self, Display, Formatter};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::snapshot::{Kind, Node, Snapshot};

/// How many differences a report prints before it only counts.
const PRINTED_MAX: usize = 40;

/// What is known to differ between two ways of showing the same image, and is therefore not compared.
#[derive(Debug, Clone, Default)]
pub struct Exceptions {
    /// Directories whose mtime in the *expected* tree is at or after this moment were touched by the unpacking itself:
    /// a later layer wrote into them without naming them, or nobody named them at all, and unpackers leave "now" there.
    pub directory_mtimes_since: Option<SystemTime>,
    /// The root's mode, owner, mtime and xattrs: containerd ignores the entry `./` of a layer.
    pub root_metadata: bool,
    /// Link counts of files: overlayfs shows the count of the lower inode, names that an upper layer removed included.
    /// Which names are one inode is compared all the same.
    pub link_counts: bool,
    /// Names that the actual tree lists and cannot look up: overlayfs' own whiteouts.
    pub phantoms: bool,
    /// Paths whose mtime is not compared at all.
    pub mtimes: BTreeSet<Vec<u8>>,
    /// Paths that are not compared at all, with everything below them.
    pub subtrees: BTreeSet<Vec<u8>>,
    /// Extended attributes whose names start with one of these are not compared. Overlayfs' own are never compared.
    pub xattr_prefixes: Vec<Vec<u8>>,
}

/// What two snapshots differ in; prints as a list.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Differences(pub Vec<Difference>);

/// One difference at one path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// Path relative to the root.
    pub path: Vec<u8>,
    /// What differs.
    pub what: What,
    /// What the expected tree has, readable.
    pub expected: String,
    /// What the actual tree has, readable.
    pub actual: String,
}

/// The properties that are compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum What {
    /// The path is in one tree only.
    Existence,
    /// Type of file.
    Type,
    /// Permission bits.
    Permissions,
    /// User or group.
    Owner,
    /// Modification time.
    Mtime,
    /// Extended attributes.
    Xattrs,
    /// Target of a symbolic link.
    Target,
    /// Which names are one inode.
    LinkNames,
    /// Number of names.
    LinkCount,
    /// Device number.
    Device,
    /// Length.
    Size,
    /// Content, with equal length.
    Content,
}

impl Differences {
    /// Whether the trees are equal, exceptions apart.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn add(&mut self, path: &[u8], what: What, expected: impl Display, actual: impl Display) {
        let (expected, actual) = (expected.to_string(), actual.to_string());
        self.0.push(Difference { path: path.to_vec(), what, expected, actual });
    }
}

impl Display for Differences {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        if self.is_empty() {
            return f.write_str("no difference");
        }
        writeln!(f, "{} differences:", self.0.len())?;
        for difference in self.0.iter().take(PRINTED_MAX) {
            writeln!(f, "  {difference}")?;
        }
        match self.0.len().checked_sub(PRINTED_MAX) {
            None | Some(0) => Ok(()),
            Some(more) => writeln!(f, "  and {more} more"),
        }
    }
}

impl Display for Difference {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let Self { path, what, expected, actual } = self;
        write!(f, "/{}: {what:?}: expected {expected}, is {actual}", path.escape_ascii())
    }
}

/// Compares `actual` with `expected`. Names that can only be listed count as differences where `expected` has none.
pub fn compare(expected: &Snapshot, actual: &Snapshot, exceptions: &Exceptions) -> Differences {
    let mut differences = Differences::default();
    let skipped = |path: &[u8]| exceptions.subtrees.iter().any(|top| is_in(path, top));
    for (path, node) in expected.nodes.iter().filter(|(path, _)| !skipped(path)) {
        match actual.nodes.get(path) {
            Some(other) => compare_node(path, node, other, exceptions, &mut differences),
            None => differences.add(path, What::Existence, node.kind.name(), "missing"),
        }
    }
    for (path, node) in actual.nodes.iter().filter(|(path, _)| !skipped(path)) {
        if !expected.nodes.contains_key(path) {
            differences.add(path, What::Existence, "nothing", node.kind.name());
        }
    }
    let phantoms = actual.phantoms.difference(&expected.phantoms);
    for path in phantoms.filter(|path| !exceptions.phantoms && !skipped(path)) {
        differences.add(path, What::Existence, "nothing", "a name that is listed and cannot be looked up");
    }
    differences
}

/// Whether `path` is `top` or below it.
fn is_in(path: &[u8], top: &[u8]) -> bool {
    path.strip_prefix(top).is_some_and(|rest| top.is_empty() || rest.is_empty() || rest[0] == b'/')
}

fn compare_node(path: &[u8], expected: &Node, actual: &Node, exceptions: &Exceptions, found: &mut Differences) {
    compare_kind(path, &expected.kind, &actual.kind, found);
    if !matches!(expected.kind, Kind::Directory) {
        if expected.names != actual.names {
            found.add(path, What::LinkNames, Names(&expected.names), Names(&actual.names));
        }
        // The count of a directory depends on the file system (overlayfs says 1, ext4 counts subdirectories).
        if !exceptions.link_counts && expected.link_count != actual.link_count {
            found.add(path, What::LinkCount, expected.link_count, actual.link_count);
        }
    }
    if path.is_empty() && exceptions.root_metadata {
        return;
    }
    if expected.permissions != actual.permissions {
        let (expected, actual) = (expected.permissions, actual.permissions);
        found.add(path, What::Permissions, format_args!("{expected:04o}"), format_args!("{actual:04o}"));
    }
    if (expected.uid, expected.gid) != (actual.uid, actual.gid) {
        let owner = |node: &Node| format!("{}:{}", node.uid, node.gid);
        found.add(path, What::Owner, owner(expected), owner(actual));
    }
    if expected.mtime != actual.mtime && !mtime_is_excepted(path, expected, exceptions) {
        let time = |(seconds, nanoseconds): (i64, u32)| format!("{seconds}s+{nanoseconds:09}ns");
        found.add(path, What::Mtime, time(expected.mtime), time(actual.mtime));
    }
    let xattrs = |node: &Node| -> Vec<(Vec<u8>, Vec<u8>)> {
        let compared = |name: &[u8]| {
            let is_overlay = name.starts_with(b"trusted.overlay.") || name.starts_with(b"user.overlay.");
            // The label of the machine's security policy is not part of an image.
            let is_label = name == b"security.selinux";
            !is_overlay && !is_label && !exceptions.xattr_prefixes.iter().any(|prefix| name.starts_with(prefix))
        };
        node.xattrs
            .iter()
            .filter(|(name, _)| compared(name))
            .map(|(name, value)| (name.clone(), value.clone()))
            .collect()
    };
    let (expected, actual) = (xattrs(expected), xattrs(actual));
    if expected != actual {
        found.add(path, What::Xattrs, Attributes(&expected), Attributes(&actual));
    }
}

fn compare_kind(path: &[u8], expected: &Kind, actual: &Kind, found: &mut Differences) {
    match (expected, actual) {
        (Kind::Directory, Kind::Directory) | (Kind::Fifo, Kind::Fifo) | (Kind::Socket, Kind::Socket) => {}
        (Kind::Symlink(expected), Kind::Symlink(actual)) => {
            if expected != actual {
                found.add(path, What::Target, expected.escape_ascii(), actual.escape_ascii());
            }
        }
        (Kind::CharDevice(expected), Kind::CharDevice(actual))
        | (Kind::BlockDevice(expected), Kind::BlockDevice(actual)) => {
            if expected != actual {
                found.add(path, What::Device, format_args!("{expected:#x}"), format_args!("{actual:#x}"));
            }
        }
        (
            Kind::Regular { size_bytes: expected_bytes, hash: expected_hash },
            Kind::Regular { size_bytes: actual_bytes, hash: actual_hash },
        ) => {
            if expected_bytes != actual_bytes {
                found.add(path, What::Size, expected_bytes, actual_bytes);
            } else if expected_hash != actual_hash {
                found.add(path, What::Content, short_hex(expected_hash), short_hex(actual_hash));
            }
        }
        _ => found.add(path, What::Type, expected.name(), actual.name()),
    }
}

fn mtime_is_excepted(path: &[u8], expected: &Node, exceptions: &Exceptions) -> bool {
    let touched = exceptions.directory_mtimes_since.is_some_and(|since| {
        // A filesystem's clock ticks in jiffies and may lag behind the precise one by one tick (10 ms at 100 Hz).
        let since = since.duration_since(UNIX_EPOCH).unwrap_or_default().saturating_sub(Duration::from_millis(20));
        let (seconds, nanoseconds) = expected.mtime;
        u64::try_from(seconds).is_ok_and(|seconds| Duration::new(seconds, nanoseconds) >= since)
    });
    exceptions.mtimes.contains(path) || (touched && matches!(expected.kind, Kind::Directory))
}

fn short_hex(hash: &[u8; 32]) -> String {
    format!("content {}", blake3::Hash::from_bytes(*hash).to_hex().split_at(16).0)
}

struct Names<'a>(&'a BTreeSet<Vec<u8>>);

impl Display for Names<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let names: Vec<String> = self.0.iter().take(5).map(|name| name.escape_ascii().to_string()).collect();
        write!(f, "{} names ({}{})", self.0.len(), names.join(", "), if self.0.len() > 5 { ", ..." } else { "" })
    }
}

struct Attributes<'a>(&'a [(Vec<u8>, Vec<u8>)]);

impl Display for Attributes<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let shown = |(name, value): &(Vec<u8>, Vec<u8>)| {
            let start = &value[..value.len().min(16)];
            format!("{}={}({} B)", name.escape_ascii(), start.escape_ascii(), value.len())
        };
        write!(f, "[{}]", self.0.iter().map(shown).collect::<Vec<_>>().join(", "))
    }
}
