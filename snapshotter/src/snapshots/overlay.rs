//! The mounts that containerd is told to make.
//!
//! The service mounts nothing itself: a snapshot without parents is a bind mount of its directory, a view of one layer
//! a read-only bind mount of that layer, everything else an overlay.

use std::path::{Path, PathBuf};

use hermes_containerd_api::types::Mount;
use hermes_store::SnapshotKind;

/// The label with a container's user ids, and the mount option that asks containerd to map them.
pub(super) const USER_MAPPING: (&str, &str) = ("containerd.io/snapshot/uidmapping", "uidmap");
/// The same for its group ids.
pub(super) const GROUP_MAPPING: (&str, &str) = ("containerd.io/snapshot/gidmapping", "gidmap");

/// The first kernel whose overlay takes id-mapped lower directories.
const ID_MAPPED_LOWER: (u32, u32) = (5, 19);
/// The first kernel whose overlay keeps its attributes in the `user.` namespace when asked, for user namespaces.
const USER_XATTR: (u32, u32) = (5, 11);

/// What the kernel's overlay offers here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Features {
    /// It has an index of hard links, which must be off: it ties an upper directory to one set of lower ones.
    pub(super) index_off: bool,
    /// This process is in a user namespace, where `trusted.` attributes cannot be set.
    pub(super) user_xattr: bool,
    /// It takes id-mapped lower directories.
    pub(super) id_mapped: bool,
}

impl Features {
    /// Asks the kernel.
    pub(super) fn probe() -> Self {
        let release = rustix::system::uname().release().to_string_lossy().into_owned();
        let kernel = kernel_version(&release);
        let in_user_namespace =
            std::fs::read_to_string("/proc/self/uid_map").is_ok_and(|map| !is_initial_namespace(&map));
        Self {
            index_off: Path::new("/sys/module/overlay/parameters/index").exists(),
            user_xattr: in_user_namespace && kernel >= USER_XATTR,
            id_mapped: kernel >= ID_MAPPED_LOWER,
        }
    }
}

/// Major and minor version; zero when the text is none, so that nothing is taken for granted.
fn kernel_version(release: &str) -> (u32, u32) {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|number| number.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

/// Whether a uid_map is that of the initial user namespace: one range with all ids (user_namespaces(7)).
fn is_initial_namespace(map: &str) -> bool {
    map.split_whitespace().eq(["0", "0", "4294967295"])
}

/// What mounts are made of.
#[derive(Debug)]
pub(super) struct Stack {
    /// What the snapshot is for; not committed.
    pub(super) kind: SnapshotKind,
    /// Its own layer.
    pub(super) upper: PathBuf,
    /// The overlay's scratch directory beside it.
    pub(super) work: PathBuf,
    /// The layers below, the nearest first.
    pub(super) lower: Vec<PathBuf>,
    /// Options that map ids, as containerd reads them.
    pub(super) mapping: Vec<String>,
}

impl Stack {
    /// The mounts.
    pub(super) fn mounts(self, features: Features) -> Vec<Mount> {
        let Self { kind, upper, work, lower, mut mapping } = self;
        let bind = |source: &Path, access: &str, mut options: Vec<String>| {
            options.extend([access.to_owned(), "rbind".to_owned()]);
            vec![Mount { r#type: "bind".to_owned(), source: text(source), target: String::new(), options }]
        };
        match (kind, lower.as_slice()) {
            (SnapshotKind::Active, []) => return bind(&upper, "rw", mapping),
            (_, []) => return bind(&upper, "ro", mapping),
            (SnapshotKind::View | SnapshotKind::Committed, [only]) => return bind(only, "ro", mapping),
            _ => {}
        }
        let mut options = Vec::new();
        if features.index_off {
            options.push("index=off".to_owned());
        }
        if features.user_xattr {
            options.push("userxattr".to_owned());
        }
        options.append(&mut mapping);
        if kind == SnapshotKind::Active {
            options.push(format!("workdir={}", work.display()));
            options.push(format!("upperdir={}", upper.display()));
        }
        let lower: Vec<String> = lower.iter().map(|dir| text(dir)).collect();
        options.push(format!("lowerdir={}", lower.join(":")));
        let overlay = "overlay".to_owned();
        vec![Mount { r#type: overlay.clone(), source: overlay, target: String::new(), options }]
    }
}

/// Paths are checked when they are configured: the wire format is text.
fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

/// Whether a path can stand in an overlay's options, where colons and commas separate and a backslash quotes.
pub(super) fn can_be_option(path: &Path) -> bool {
    path.to_str().is_some_and(|path| !path.contains([':', ',', '\\', '\n']))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Features = Features { index_off: false, user_xattr: false, id_mapped: true };

    fn stack(kind: SnapshotKind, lower: &[&str]) -> Stack {
        Stack {
            kind,
            upper: "/s/9/fs".into(),
            work: "/s/9/work".into(),
            lower: lower.iter().map(PathBuf::from).collect(),
            mapping: Vec::new(),
        }
    }

    fn line(mounts: &[Mount]) -> String {
        let [mount] = mounts else { panic!("{mounts:?}") };
        format!("{} {} {}", mount.r#type, mount.source, mount.options.join(","))
    }

    #[test]
    fn every_form_is_containerds() {
        let cases = [
            (SnapshotKind::Active, &[][..], "bind /s/9/fs rw,rbind"),
            (SnapshotKind::View, &[], "bind /s/9/fs ro,rbind"),
            (SnapshotKind::View, &["/s/1/fs"], "bind /s/1/fs ro,rbind"),
            (SnapshotKind::View, &["/s/2/fs", "/s/1/fs"], "overlay overlay lowerdir=/s/2/fs:/s/1/fs"),
            (
                SnapshotKind::Active,
                &["/s/2/fs", "/s/1/fs"],
                "overlay overlay workdir=/s/9/work,upperdir=/s/9/fs,lowerdir=/s/2/fs:/s/1/fs",
            ),
        ];
        for (kind, lower, expected) in cases {
            assert_eq!(line(&stack(kind, lower).mounts(PLAIN)), expected);
        }
    }

    #[test]
    fn features_and_mappings_become_options() {
        let features = Features { index_off: true, user_xattr: true, id_mapped: true };
        let mut active = stack(SnapshotKind::Active, &["/s/1/fs"]);
        active.mapping = vec!["uidmap=0:1:2".to_owned(), "gidmap=0:3:4".to_owned()];
        let expected = "overlay overlay index=off,userxattr,uidmap=0:1:2,gidmap=0:3:4,\
                        workdir=/s/9/work,upperdir=/s/9/fs,lowerdir=/s/1/fs";
        assert_eq!(line(&active.mounts(features)), expected);
    }

    #[test]
    fn the_kernel_is_read_carefully() {
        assert_eq!(kernel_version("6.18.44-fc-v669"), (6, 18));
        assert_eq!(kernel_version("5.4"), (5, 4));
        assert_eq!(kernel_version("nonsense"), (0, 0));
        assert!(is_initial_namespace("         0          0 4294967295\n"));
        assert!(!is_initial_namespace("         0       1000      65536\n"));
        assert!(!can_be_option(Path::new("/a:b")) && can_be_option(Path::new("/a b")));
    }
}
