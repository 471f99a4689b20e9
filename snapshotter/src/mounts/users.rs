//! Who uses lazy trees, by the kernel's mount table.
//!
//! A container's root is an overlay mount above a tree. The kernel does not count that as use of the tree's own mount
//! point: unmounting the tree works, and the container keeps reading through the overlay, but the daemon must go on
//! serving it. So use is looked for where it shows: overlays whose `lowerdir` lies below a folder, or is a clone of a tree
//! there, in the mount table of the host, where containerd makes them.

use std::collections::BTreeSet;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// One use of a lazy tree.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct TreeUse {
    /// Where the tree is mounted.
    pub tree: PathBuf,
    /// What uses it: the mount point of a container's root, or what is known of open files.
    pub user: String,
}

impl fmt::Display for TreeUse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (over {})", self.user, self.tree.display())
    }
}

/// The overlays whose lower folders are at or below `folder`, in this process' mount namespace and in that of the
/// machine's first process, where containerd runs.
///
/// # Errors
/// When this process' own mount table cannot be read.
pub fn overlay_users(folder: &Path) -> io::Result<Vec<TreeUse>> {
    let own = std::fs::read_to_string("/proc/self/mountinfo")?;
    // In a container that may not see the host's processes there is only one's own.
    let first = std::fs::read_to_string("/proc/1/mountinfo").unwrap_or_default();
    let found: BTreeSet<TreeUse> = [own, first].iter().flat_map(|table| overlays_over(table, folder)).collect();
    Ok(found.into_iter().collect())
}

/// From one table, in the form of proc_pid_mountinfo(5).
fn overlays_over(table: &str, folder: &Path) -> Vec<TreeUse> {
    let mut found = Vec::new();
    let clones = clones_of(table, folder);
    for mount in table.lines().filter_map(Mount::parse).filter(|mount| mount.kind == "overlay") {
        let lower = lower_folders(mount.options).into_iter();
        for tree in lower.filter(|lower| lower.starts_with(folder) || clones.contains(lower)) {
            found.push(TreeUse { tree, user: mount.point.display().to_string() });
        }
    }
    found
}

/// Where the trees at or below `folder` are mounted once more, with mapped ids for containers in user namespaces.
fn clones_of(table: &str, folder: &Path) -> BTreeSet<PathBuf> {
    let trees = |mount: &Mount<'_>| mount.kind == "erofs" || mount.kind.starts_with("fuse");
    let mounts: Vec<Mount<'_>> = table.lines().filter_map(Mount::parse).filter(trees).collect();
    let (own, others): (Vec<_>, Vec<_>) = mounts.into_iter().partition(|mount| mount.point.starts_with(folder));
    let devices: BTreeSet<&str> = own.iter().map(|mount| mount.device).collect();
    others.into_iter().filter(|mount| devices.contains(mount.device)).map(|mount| mount.point).collect()
}

/// A line of the table.
struct Mount<'a> {
    /// Major and minor number.
    device: &'a str,
    point: PathBuf,
    kind: &'a str,
    options: &'a str,
}

impl<'a> Mount<'a> {
    /// "36 35 98:0 / /mount/point rw,noatime shared:1 - overlay source options"
    fn parse(line: &'a str) -> Option<Self> {
        let (mount, source) = line.split_once(" - ")?;
        let (mut mount, mut source) = (mount.split(' '), source.split(' '));
        let (device, point) = (mount.nth(2)?, mount.nth(1)?);
        Some(Self { device, point: super::unescape(point), kind: source.next()?, options: source.nth(1)? })
    }
}

/// The folders of `lowerdir=a:b` and `lowerdir+=a` (6.8 and later show each layer by itself). A colon or comma that
/// belongs to a name has a backslash before it, which the table writes as `\134`.
fn lower_folders(options: &str) -> Vec<PathBuf> {
    let mut folders = Vec::new();
    for option in split_escaped(options, b',') {
        let Some(value) = option.strip_prefix("lowerdir=").or_else(|| option.strip_prefix("lowerdir+=")) else {
            continue;
        };
        for folder in split_escaped(value, b':') {
            let unescaped = super::unescape(&folder);
            let text = unescaped.to_string_lossy();
            folders.push(PathBuf::from(text.replace("\\:", ":").replace("\\,", ",").replace("\\\\", "\\")));
        }
    }
    folders
}

/// Splits at `separator`, except behind the table's `\134`.
fn split_escaped(text: &str, separator: u8) -> Vec<String> {
    let mut parts = Vec::new();
    let mut start = 0;
    for (at, byte) in text.bytes().enumerate() {
        if byte == separator && !text[..at].ends_with("\\134") {
            parts.push(text[start..at].to_owned());
            start = at + 1;
        }
    }
    parts.push(text[start..].to_owned());
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overlays_over_trees_are_found() {
        let table = "\
36 35 98:0 / / rw,noatime - ext4 /dev/root rw
40 36 0:40 / /run/a\\040b/rootfs rw,relatime shared:9 - overlay overlay rw,lowerdir=/var/lib/hermes/trees/1,upperdir=/u
41 36 0:41 / /run/c/rootfs rw - overlay overlay rw,lowerdir=/var/lib/other/1:/var/lib/hermes/trees/2,upperdir=/u
42 36 0:42 / /run/d/rootfs rw - overlay overlay rw,lowerdir+=/x,lowerdir+=/var/lib/hermes/trees/c\\134:d
43 36 0:43 / /run/e/rootfs rw - overlay overlay rw,lowerdir=/var/lib/hermes2/trees/1
";
        let found = overlays_over(table, Path::new("/var/lib/hermes"));
        let expected = [
            ("/var/lib/hermes/trees/1", "/run/a b/rootfs"),
            ("/var/lib/hermes/trees/2", "/run/c/rootfs"),
            ("/var/lib/hermes/trees/c:d", "/run/d/rootfs"),
        ];
        let expected = expected.map(|(tree, user)| TreeUse { tree: PathBuf::from(tree), user: user.to_owned() });
        assert_eq!(found, expected);
    }

    #[test]
    fn overlays_over_mapped_trees_are_found() {
        let table = "\
36 35 98:0 / / rw,noatime - ext4 /dev/root rw
37 36 0:50 / /s/trees/1 ro - erofs none ro
38 36 0:51 / /s/trees/2 ro - erofs none ro
39 36 0:50 / /s/snapshots/7/mapped/0 ro,idmapped - erofs none ro
40 36 98:0 /s/snapshots/5/fs /s/snapshots/7/mapped/1 ro,idmapped - ext4 /dev/root rw
41 36 0:60 / /run/a/rootfs rw - overlay overlay rw,lowerdir=/s/snapshots/7/mapped/0:/s/snapshots/7/mapped/1
";
        let uses = |folder: &str| overlays_over(table, Path::new(folder));
        let expected = TreeUse { tree: "/s/snapshots/7/mapped/0".into(), user: "/run/a/rootfs".to_owned() };
        assert_eq!((uses("/s/trees/1"), uses("/s/trees/2")), (vec![expected], Vec::new()));
        assert_eq!(uses("/s").len(), 2, "once for each layer");
    }
}
