//! Tables for each overlay rule, and random chains against a simple recursive model.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::merge;
use crate::ids::LogicalOffset;
use crate::index::toc::{Node, NodeKind, Toc};
use crate::tar::testing::{RawHeader, TarWriter, toc_of};
use crate::tree::{ExtentSource, Inode, InodeIndex, InodeKind, Timestamp, Tree};

fn tar() -> TarWriter {
    TarWriter::default()
}

fn merged(layers: Vec<TarWriter>) -> Tree {
    let tocs: Vec<Toc> = layers.into_iter().map(|layer| toc_of(&layer.end()).expect("accepted")).collect();
    let tree = merge(&tocs).expect("merges");
    check(&tree);
    assert_eq!(merge(&tocs).as_ref(), Ok(&tree), "not the same twice");
    tree
}

/// What every tree must keep: order, link counts, no lost inodes.
fn check(tree: &Tree) {
    let mut links = vec![0_u32; tree.inodes.len()];
    let mut next = 1;
    for (no, inode) in tree.inodes.iter().enumerate() {
        let InodeKind::Directory { entries, parent } = &inode.kind else {
            continue;
        };
        assert!(entries.is_sorted_by(|left, right| left.0 < right.0), "names of inode {no}");
        let is_directory = |inode: InodeIndex| matches!(tree.inodes[inode as usize].kind, InodeKind::Directory { .. });
        let subdirectories = entries.iter().filter(|(_, inode)| is_directory(*inode)).count();
        assert_eq!(inode.link_count as usize, 2 + subdirectories);
        assert!(no == 0 || (*parent as usize) < no);
        for (_, entry) in entries {
            links[*entry as usize] += 1;
            // Breadth-first: an inode is either the next one or has been named before.
            assert!(*entry <= next);
            next = next.max(entry + 1);
        }
    }
    assert_eq!(next as usize, tree.inodes.len());
    for (no, inode) in tree.inodes.iter().enumerate().skip(1) {
        match inode.kind {
            InodeKind::Directory { .. } => assert_eq!(links[no], 1),
            _ => assert_eq!(links[no], inode.link_count),
        }
    }
}

/// Path -> inode, without the root.
fn paths(tree: &Tree) -> BTreeMap<String, InodeIndex> {
    let mut paths = BTreeMap::new();
    let mut stack = vec![(String::new(), 0)];
    while let Some((path, inode)) = stack.pop() {
        if let InodeKind::Directory { entries, .. } = &tree.inodes[inode as usize].kind {
            for (name, entry) in entries {
                let name = String::from_utf8_lossy(name);
                let path = if path.is_empty() { name.into_owned() } else { format!("{path}/{name}") };
                stack.push((path.clone(), *entry));
                paths.insert(path, *entry);
            }
        }
    }
    paths
}

fn listing(tree: &Tree) -> Vec<String> {
    let describe = |inode: &Inode| match &inode.kind {
        InodeKind::Directory { .. } => "dir".to_owned(),
        InodeKind::Regular { size_bytes, extents } => {
            let layer = extents.first().map(|extent| match extent.source {
                ExtentSource::Layer { layer, .. } => format!(" in {layer}"),
                ExtentSource::Inline(_) => " inline".to_owned(),
            });
            format!("file {size_bytes}{} links {}", layer.unwrap_or_default(), inode.link_count)
        }
        InodeKind::Symlink { target } => format!("-> {}", String::from_utf8_lossy(target)),
        InodeKind::CharDevice { major, minor } => format!("char {major}:{minor}"),
        InodeKind::BlockDevice { major, minor } => format!("block {major}:{minor}"),
        InodeKind::Fifo => "fifo".to_owned(),
    };
    paths(tree).iter().map(|(path, inode)| format!("{path} {}", describe(&tree.inodes[*inode as usize]))).collect()
}

fn inode<'a>(tree: &'a Tree, path: &str) -> &'a Inode {
    &tree.inodes[paths(tree)[path] as usize]
}

#[test]
fn layers_show_as_overlayfs_shows_them() {
    let cases: Vec<(&str, Vec<TarWriter>, &[&str])> = vec![
        ("no layers", vec![], &[]),
        ("no entries", vec![tar(), tar()], &[]),
        (
            "union",
            vec![tar().file("a/x", b"1"), tar().file("a/y", b"22")],
            &["a dir", "a/x file 1 in 0 links 1", "a/y file 2 in 1 links 1"],
        ),
        ("the upper file shows", vec![tar().file("a", b"1"), tar().file("a", b"22")], &["a file 2 in 1 links 1"]),
        (
            "whiteout",
            vec![tar().file("a/x", b"").file("a/y", b""), tar().file("a/.wh.x", b"")],
            &["a dir", "a/y file 0 links 1"],
        ),
        ("whiteout of a directory", vec![tar().file("a/x", b""), tar().file(".wh.a", b"")], &[]),
        ("whiteout of nothing", vec![tar(), tar().file("a/.wh.x", b"")], &["a dir"]),
        (
            "back after a whiteout",
            vec![tar().file("a/x", b""), tar().file(".wh.a", b""), tar().file("a/y", b"")],
            &["a dir", "a/y file 0 links 1"],
        ),
        ("whiteout in the lowest layer", vec![tar().file(".wh.a", b""), tar().file("b", b"")], &["b file 0 links 1"]),
        (
            "opaque",
            vec![tar().file("a/x", b"").file("a/b/z", b""), tar().file("a/y", b"").file("a/.wh..wh..opq", b"")],
            &["a dir", "a/y file 0 links 1"],
        ),
        (
            "below an opaque one",
            vec![tar().file("a/b/x", b""), tar().file("a/.wh..wh..opq", b""), tar().file("a/b/y", b"")],
            &["a dir", "a/b dir", "a/b/y file 0 links 1"],
        ),
        (
            "an opaque root",
            vec![tar().file("a", b""), tar().file(".wh..wh..opq", b"").file("b", b"")],
            &["a file 0 links 1", "b file 0 links 1"],
        ),
        ("a file over a directory", vec![tar().file("a/x", b""), tar().file("a", b"1")], &["a file 1 in 1 links 1"]),
        (
            "a directory over a file",
            vec![tar().file("a", b"1"), tar().file("a/x", b"")],
            &["a dir", "a/x file 0 links 1"],
        ),
        (
            "a file between directories",
            vec![tar().file("a/x", b""), tar().file("a", b"1"), tar().file("a/y", b"")],
            &["a dir", "a/y file 0 links 1"],
        ),
        (
            "a directory over a symlink",
            vec![tar().dir("b").symlink("a", "b"), tar().file("a/x", b"")],
            &["a dir", "a/x file 0 links 1", "b dir"],
        ),
        ("a device 0:0", vec![tar().file("a", b""), tar().put(RawHeader::new(b"a", b'3'), b"")], &[]),
        (
            "hard links",
            vec![tar().file("a", b"1").hard_link("b", "a").hard_link("c/d", "a")],
            &["a file 1 in 0 links 3", "b file 1 in 0 links 3", "c dir", "c/d file 1 in 0 links 3"],
        ),
        (
            "hidden names are not counted",
            vec![
                tar().file("a", b"1").hard_link("b", "a").hard_link("c/d", "a"),
                tar().file(".wh.a", b"").file("c/d", b"22"),
            ],
            &["b file 1 in 0 links 1", "c dir", "c/d file 2 in 1 links 1"],
        ),
        (
            "all names hidden",
            vec![tar().file("a", b"1").hard_link("b", "a"), tar().file(".wh.a", b"").file(".wh.b", b"")],
            &[],
        ),
        (
            "the other kinds",
            vec![
                tar()
                    .symlink("s", "t")
                    .put(RawHeader::new(b"c", b'3').device(1, 3), b"")
                    .put(RawHeader::new(b"b", b'4').device(8, 1), b"")
                    .put(RawHeader::new(b"p", b'6'), b""),
            ],
            &["b block 8:1", "c char 1:3", "p fifo", "s -> t"],
        ),
    ];
    for (name, layers, expected) in cases {
        assert_eq!(listing(&merged(layers)), expected, "{name}");
    }
}

#[test]
fn extents_name_their_layer() {
    let tree = merged(vec![tar().file("a", b"1"), tar().file("b", b"1").file("c", b"22")]);
    let InodeKind::Regular { extents, .. } = &inode(&tree, "c").kind else {
        panic!("not a file");
    };
    assert_eq!(extents[0].source, ExtentSource::Layer { layer: 1, offset: LogicalOffset(1536) });
    assert_eq!(tree.layers.len(), 2);
    assert_eq!(tree.layers[1].logical_len_bytes, 2048 + 1024);
}

fn owned(name: &str, mode: u64, id: u64) -> RawHeader {
    RawHeader::new(name.as_bytes(), b'5').mode(mode).owner(id, id).mtime(id)
}

fn metadata(inode: &Inode) -> (u16, u32, u32, i64) {
    (inode.permissions, inode.uid, inode.gid, inode.mtime.seconds)
}

#[test]
fn the_topmost_directory_gives_the_metadata() {
    let lower = || tar().pax(&[("SCHILY.xattr.user.a", b"1")]).put(owned("d", 0o1777, 5), b"");
    let over = merged(vec![lower(), tar().put(owned("d", 0o700, 6), b"")]);
    assert_eq!(metadata(inode(&over, "d")), (0o700, 6, 6, 6));
    assert!(inode(&over, "d").xattrs.is_empty());
    // Implied in the upper layers: as below.
    let under = merged(vec![lower(), tar().file("d/x", b""), tar().file("d/y", b"")]);
    assert_eq!(metadata(inode(&under, "d")), (0o1777, 5, 5, 5));
    assert_eq!(inode(&under, "d").xattrs.len(), 1);
    // Opaque hides names, not what containerd copies.
    let opaque = merged(vec![lower(), tar().file("d/.wh..wh..opq", b"")]);
    assert_eq!(metadata(inode(&opaque, "d")), (0o1777, 5, 5, 5));
    // Something else, or nothing, is below.
    let fresh = merged(vec![lower(), tar().file(".wh.d", b""), tar().file("d/x", b"").file("e/x", b"")]);
    assert_eq!(metadata(inode(&fresh, "d")), (0o755, 0, 0, 0));
    assert_eq!(metadata(inode(&fresh, "e")), (0o755, 0, 0, 0));
    let file = merged(vec![lower(), tar().file("d", b""), tar().file("d/x", b"")]);
    assert_eq!(metadata(inode(&file, "d")), (0o755, 0, 0, 0));
}

#[test]
fn implied_directories_look_through_symlinks_of_one_layer() {
    let tree = merged(vec![
        tar().put(owned("usr/lib", 0o750, 7), b"").symlink("lib", "usr/lib").symlink("abs", "/lib/../lib"),
        tar().file("other", b""),
        tar().file("lib/x", b"").file("abs/y", b""),
    ]);
    assert_eq!(metadata(inode(&tree, "lib")), (0o750, 7, 7, 7));
    assert_eq!(metadata(inode(&tree, "abs")), (0o750, 7, 7, 7));
    // Implied in that layer too: its path there counts from then on.
    let tree = merged(vec![
        tar().put(owned("real", 0o711, 3), b""),
        tar().file("real/x", b"").symlink("link", "real"),
        tar().file("link/y", b""),
    ]);
    assert_eq!(metadata(inode(&tree, "link")), (0o711, 3, 3, 3));
}

#[test]
fn the_set_group_id_bit_hands_the_group_down() {
    let tree = merged(vec![
        tar().put(owned("local", 0o2775, 50), b""),
        tar().file("local/new/deeper/x", b""),
        tar().put(owned("explicit", 0o2770, 9), b"").file("explicit/sub/y", b""),
    ]);
    assert_eq!(metadata(inode(&tree, "local")), (0o2775, 50, 50, 50));
    assert_eq!(metadata(inode(&tree, "local/new")), (0o755, 0, 50, 0));
    assert_eq!(metadata(inode(&tree, "local/new/deeper")), (0o755, 0, 0, 0));
    assert_eq!(metadata(inode(&tree, "explicit/sub")), (0o755, 0, 9, 0));
}

#[test]
fn the_topmost_explicit_root_counts() {
    let tree = merged(vec![tar().put(owned("./", 0o711, 4), b""), tar().file("a", b"")]);
    assert_eq!(metadata(&tree.inodes[0]), (0o711, 4, 4, 4));
    let tree = merged(vec![tar().file("a", b"")]);
    assert_eq!(metadata(&tree.inodes[0]), (0o755, 0, 0, 0));
    assert_eq!(tree.inodes[0].mtime, Timestamp::default());
}

/// The model: directories as maps, applied layer by layer and name by name.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Model {
    Directory(BTreeMap<String, Model>),
    /// What a file says of itself: its layer and node.
    File(String),
}

fn apply(below: Option<Model>, toc: &Toc, layer: usize, node: &Node<'_>) -> Option<Model> {
    let described = |node: &Node<'_>| format!("layer {layer} node {}", node.no());
    match node.kind() {
        NodeKind::Whiteout => None,
        NodeKind::Directory { children, opaque, .. } => {
            let mut names = match below {
                Some(Model::Directory(names)) if !opaque || node.no() == 0 => names,
                _ => BTreeMap::new(),
            };
            for child in children {
                let child = toc.node(child);
                let name = String::from_utf8_lossy(child.name()).into_owned();
                let lower = names.remove(&name);
                if let Some(model) = apply(lower, toc, layer, &child) {
                    names.insert(name, model);
                }
            }
            Some(Model::Directory(names))
        }
        NodeKind::HardLink { node } => Some(Model::File(described(&toc.node(node)))),
        _ => Some(Model::File(described(node))),
    }
}

/// The merged tree in the model's form. The test's files tell their layer and node by their extents.
fn as_model(tree: &Tree, tocs: &[Toc], inode: InodeIndex) -> Model {
    match &tree.inodes[inode as usize].kind {
        InodeKind::Directory { entries, .. } => Model::Directory(
            entries
                .iter()
                .map(|(name, inode)| (String::from_utf8_lossy(name).into_owned(), as_model(tree, tocs, *inode)))
                .collect(),
        ),
        InodeKind::Regular { extents, .. } => {
            let ExtentSource::Layer { layer, offset } = extents[0].source else {
                panic!("no sparse files here");
            };
            let toc = &tocs[usize::from(layer)];
            let node = toc.nodes().find(|node| match node.kind() {
                NodeKind::Regular { mut extents, .. } => {
                    extents.next().is_some_and(|extent| extent.source == ExtentSource::Layer { layer: 0, offset })
                }
                _ => false,
            });
            Model::File(format!("layer {layer} node {}", node.expect("from this layer").no()))
        }
        kind => panic!("not in these layers: {kind:?}"),
    }
}

fn layer() -> impl Strategy<Value = TarWriter> {
    let component = prop_oneof![3 => "[ab]", 1 => "c"];
    let path = proptest::collection::vec(component, 1..4).prop_map(|names| names.join("/"));
    proptest::collection::vec((0_u8..12, path.clone(), path), 0..12).prop_map(|entries| {
        entries.into_iter().fold(tar(), |tar, (kind, path, other)| {
            let (parent, base) = path.rsplit_once('/').map_or(("", path.as_str()), |(parent, base)| (parent, base));
            let next = match kind {
                0..4 => tar.clone().file(&path, b"1"),
                4..7 => tar.clone().dir(&path),
                7 | 8 => tar.clone().file(&format!("{parent}/.wh.{base}"), b""),
                9 => tar.clone().file(&format!("{path}/.wh..wh..opq"), b""),
                _ => tar.clone().hard_link(&path, &other),
            };
            // What a layer cannot hold (a file's child, a link to nothing) is left out.
            if toc_of(&next.0).is_ok() { next } else { tar }
        })
    })
}

proptest! {
    #[test]
    fn chains_merge_as_the_model_does(layers in proptest::collection::vec(layer(), 1..6)) {
        let tocs: Vec<Toc> = layers.into_iter().map(|layer| toc_of(&layer.end()).expect("accepted")).collect();
        let mut model = None;
        for (layer, toc) in tocs.iter().enumerate() {
            model = apply(model, toc, layer, &toc.node(0));
        }
        let tree = merge(&tocs).expect("merges");
        check(&tree);
        prop_assert_eq!(Some(as_model(&tree, &tocs, 0)), model);
    }
}
