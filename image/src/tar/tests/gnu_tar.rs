//! Random trees written by GNU tar, read back.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, UNIX_EPOCH};

use proptest::prelude::*;

use crate::index::toc::{Node, NodeKind, Toc};
use crate::tar::LayerTree;
use crate::tar::testing::{TEST_DIFF_ID, paths, walk_in_pieces};
use crate::tree::ExtentSource;

#[derive(Debug, Clone)]
enum What {
    Directory,
    File(Vec<u8>),
    /// Data at each of these places (in units of 4 KiB), and the size in bytes.
    Sparse(Vec<u8>, u32),
    Symlink(String),
    HardLink(prop::sample::Index),
    Fifo,
}

#[derive(Debug, Clone)]
struct Made {
    parent: prop::sample::Index,
    name: String,
    mode: u32,
    mtime_ns: u64,
    what: What,
}

fn made() -> impl Strategy<Value = Made> {
    let what = prop_oneof![
        3 => Just(What::Directory),
        4 => proptest::collection::vec(any::<u8>(), 0..2000).prop_map(What::File),
        1 => (proptest::collection::vec(0_u8..60, 0..6), 1_u32..250_000).prop_map(|(at, size)| What::Sparse(at, size)),
        1 => "[a-z/.]{1,150}".prop_map(What::Symlink),
        1 => any::<prop::sample::Index>().prop_map(What::HardLink),
        1 => Just(What::Fifo),
    ];
    let name = prop_oneof![4 => "[a-zA-Z0-9 _é.-]{1,12}", 1 => "[a-z]{90,120}"];
    let mtime_ns = 0..4_000_000_000_000_000_000_u64;
    (any::<prop::sample::Index>(), name, 0_u32..0o10000, mtime_ns, what)
        .prop_map(|(parent, name, mode, mtime_ns, what)| Made { parent, name, mode: mode | 0o600, mtime_ns, what })
}

/// Makes the tree on disk; gives its directories.
fn make(root: &Path, tree: &[Made]) {
    let mut directories = vec![root.to_path_buf()];
    let mut files = Vec::new();
    let mut finish = Vec::new();
    for made in tree {
        let path = made.parent.get(&directories).join(&made.name);
        if path.symlink_metadata().is_ok() || matches!(made.name.as_str(), "." | "..") || made.name.starts_with(".wh.")
        {
            continue;
        }
        match &made.what {
            What::Directory => {
                fs::create_dir(&path).expect("a new directory");
                directories.push(path.clone());
            }
            What::File(data) => fs::write(&path, data).expect("a new file"),
            What::Sparse(places, size) => {
                use std::os::unix::fs::FileExt;
                let file = fs::File::create(&path).expect("a new file");
                file.set_len(u64::from(*size)).expect("a sparse file");
                for place in places {
                    let at = u64::from(*place) * 4096;
                    let len = u64::from(*size).saturating_sub(at).min(4096);
                    file.write_all_at(&vec![*place + 1; len as usize], at).expect("data");
                }
            }
            What::Symlink(target) => symlink(target, &path).expect("a new link"),
            What::HardLink(of) => {
                if files.is_empty() {
                    continue;
                }
                fs::hard_link(of.get(&files), &path).expect("one more name");
            }
            What::Fifo => {
                let status = Command::new("mkfifo").arg(&path).status().expect("mkfifo runs");
                assert!(status.success());
            }
        }
        // GNU tar writes every name of a pipe as a pipe of its own.
        if !matches!(made.what, What::Directory | What::Symlink(_) | What::Fifo) {
            files.push(path.clone());
        }
        if !matches!(made.what, What::Symlink(_)) {
            finish.push((path, made.mode, made.mtime_ns));
        }
    }
    // Bottom up, as making names changes the time of a directory.
    for (path, mode, mtime_ns) in finish.into_iter().rev() {
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).expect("a mode");
        let time = UNIX_EPOCH + Duration::from_nanos(mtime_ns);
        if fs::metadata(&path).expect("exists").file_type().is_fifo() {
            // Opening a pipe would wait for its other end.
            let at = format!("@{}.{:09}", mtime_ns / 1_000_000_000, mtime_ns % 1_000_000_000);
            assert!(Command::new("touch").arg("-d").arg(at).arg(&path).status().expect("touch runs").success());
        } else {
            fs::File::open(&path).and_then(|file| file.set_modified(time)).expect("a time");
        }
    }
}

/// What a path is, in a form that disk and table can both be brought to.
#[derive(Debug, PartialEq, Eq, Clone)]
struct Seen {
    mode: u32,
    mtime: (i64, u32),
    owner: (u32, u32),
    what: String,
    data: Vec<u8>,
    /// The first of the paths with the same inode.
    first: String,
}

fn on_disk(root: &Path, sub_second: bool) -> BTreeMap<String, Seen> {
    let mut seen = BTreeMap::new();
    let mut stack = vec![root.to_path_buf()];
    while let Some(directory) = stack.pop() {
        for entry in fs::read_dir(&directory).expect("a directory") {
            let path = entry.expect("an entry").path();
            let name = path.strip_prefix(root).expect("below the root").as_os_str();
            let name = std::os::unix::ffi::OsStrExt::as_bytes(name).escape_ascii().to_string();
            let meta = path.symlink_metadata().expect("exists");
            let (what, data) = if meta.is_dir() {
                stack.push(path.clone());
                ("dir".to_owned(), Vec::new())
            } else if meta.is_symlink() {
                (format!("-> {}", fs::read_link(&path).expect("a link").display()), Vec::new())
            } else if meta.is_file() {
                ("file".to_owned(), fs::read(&path).expect("readable"))
            } else {
                ("fifo".to_owned(), Vec::new())
            };
            let mode = if meta.is_symlink() { 0o777 } else { meta.mode() & 0o7777 };
            let nanoseconds = if sub_second { meta.mtime_nsec() as u32 } else { 0 };
            let mtime = (meta.mtime(), nanoseconds);
            let first = if meta.is_dir() { name.clone() } else { format!("inode {}", meta.ino()) };
            seen.insert(name, Seen { mode, mtime, owner: (meta.uid(), meta.gid()), what, data, first });
        }
    }
    with_first_names(seen)
}

/// Replaces what tells inodes apart by the first path of each.
fn with_first_names(mut seen: BTreeMap<String, Seen>) -> BTreeMap<String, Seen> {
    let mut firsts: BTreeMap<String, String> = BTreeMap::new();
    for (path, seen) in &mut seen {
        seen.first = firsts.entry(seen.first.clone()).or_insert_with(|| path.clone()).clone();
    }
    seen
}

fn contents(tar: &[u8], node: &Node<'_>) -> Vec<u8> {
    let NodeKind::Regular { size_bytes, extents } = node.kind() else {
        return Vec::new();
    };
    let mut data = vec![0; size_bytes as usize];
    for extent in extents {
        let part = &mut data[extent.file_offset as usize..(extent.file_offset + extent.len_bytes) as usize];
        match extent.source {
            ExtentSource::Layer { offset, .. } => {
                part.copy_from_slice(&tar[offset.0 as usize..][..extent.len_bytes as usize]);
            }
            ExtentSource::Inline(bytes) => part.copy_from_slice(&bytes),
        }
    }
    data
}

fn in_table(tar: &[u8], toc: &Toc) -> BTreeMap<String, Seen> {
    let paths = paths(toc);
    let mut seen = BTreeMap::new();
    for node in toc.nodes().skip(1) {
        let path = paths[node.no() as usize].clone();
        let first = match node.kind() {
            NodeKind::HardLink { node } => toc.node(node),
            _ => node,
        };
        let what = match first.kind() {
            NodeKind::Directory { implied, .. } => if implied { "implied" } else { "dir" }.to_owned(),
            NodeKind::Regular { .. } => "file".to_owned(),
            NodeKind::Symlink { target } => format!("-> {}", String::from_utf8_lossy(target)),
            NodeKind::Fifo => "fifo".to_owned(),
            kind => format!("{kind:?}"),
        };
        let first_name = format!("node {}", first.no());
        let mtime = (first.mtime().seconds, first.mtime().nanoseconds);
        let owner = (first.uid(), first.gid());
        let mode = u32::from(first.permissions());
        seen.insert(path, Seen { mode, mtime, owner, what, data: contents(tar, &first), first: first_name });
    }
    with_first_names(seen)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn what_gnu_tar_writes_is_what_we_read(tree in proptest::collection::vec(made(), 0..25), piece in 1_usize..5000) {
        let scratch = tempfile::tempdir().expect("a scratch directory");
        let root = scratch.path().join("root");
        fs::create_dir(&root).expect("a root");
        make(&root, &tree);
        for (format, sparse, sub_second) in [
            ("--format=gnu", None, false),
            ("--format=gnu", Some("0.0"), false),
            ("--format=pax", None, true),
            ("--format=pax", Some("0.0"), true),
            ("--format=pax", Some("0.1"), true),
            ("--format=pax", Some("1.0"), true),
            ("--format=ustar", None, false),
        ] {
            let file = scratch.path().join("out.tar");
            let mut command = Command::new("tar");
            command.arg(format).arg("-cf").arg(&file).arg("-C").arg(&root).arg("--sort=inode");
            if let Some(version) = sparse {
                command.arg("--sparse");
                if format == "--format=pax" {
                    command.arg(format!("--sparse-version={version}"));
                }
            }
            let output = command.arg(".").output().expect("tar runs");
            if format == "--format=ustar" && !output.status.success() {
                // ustar cannot hold every name.
                continue;
            }
            prop_assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            let tar = fs::read(&file).expect("a tar");
            let mut layer = LayerTree::new();
            for entry in walk_in_pieces(&tar, piece).expect("accepted") {
                layer.apply(entry).expect("accepted");
            }
            let toc = layer.finish(TEST_DIFF_ID, tar.len() as u64).expect("a table");
            prop_assert_eq!(in_table(&tar, &toc), on_disk(&root, sub_second), "{} {:?}", format, sparse);
        }
    }
}
