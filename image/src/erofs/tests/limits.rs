//! What no EROFS image can hold is refused, with the path that it is about.

use super::image_of;
use super::trees::{build, directory, file};
use crate::erofs::{FileProblem, WriteError, write};
use crate::ids::DiffId;
use crate::tree::{InodeKind, Tree, TreeLayer, Xattr};

fn tree_of_two() -> Tree {
    build(vec![directory(0, b"etc"), file(1, b"a\nfile", &[(0, 2, 0)], 0)])
}

fn entries_of(tree: &mut Tree, index: usize) -> &mut Vec<(Vec<u8>, u32)> {
    match &mut tree.inodes[index].kind {
        InodeKind::Directory { entries, .. } => entries,
        _ => panic!("inode {index} is a directory"),
    }
}

/// Expects that `change` makes the tree one that is refused, for something at `path`.
fn refused(path: &str, change: impl FnOnce(&mut Tree)) -> FileProblem {
    let mut tree = tree_of_two();
    change(&mut tree);
    match write(&tree) {
        Err(WriteError::File { path: found, problem }) => {
            assert_eq!(found, path, "{problem}");
            problem
        }
        other => panic!("{other:?} for {path}"),
    }
}

#[test]
fn what_a_directory_cannot_hold() {
    for name in [&b""[..], b".", b"..", b"a/b", b"a\0b", &[b'x'; 256]] {
        let problem = refused("/etc", |tree| entries_of(tree, 1)[0].0 = name.to_vec());
        assert!(matches!(problem, FileProblem::EntryName { .. }), "{problem}");
    }
    let problem = refused("/etc", |tree| entries_of(tree, 1).push((b"Z".to_vec(), 2)));
    assert!(matches!(problem, FileProblem::EntryOrder { .. }), "{problem}");
    let problem = refused("/etc", |tree| entries_of(tree, 1)[0].1 = 3);
    assert_eq!(problem, FileProblem::EntryInode { name: "a\\nfile".to_owned(), inode: 3 });
    assert_eq!(refused("/", |tree| entries_of(tree, 1)[0].1 = 0), FileProblem::Parent);
    assert_eq!(refused("/etc", |tree| entries_of(tree, 0).push((b"z".to_vec(), 1))), FileProblem::Parent);
    let problem = refused("/etc", |tree| match &mut tree.inodes[1].kind {
        InodeKind::Directory { parent, .. } => *parent = 1,
        _ => panic!("a directory"),
    });
    assert_eq!(problem, FileProblem::Parent);
}

#[test]
fn what_an_inode_cannot_hold() {
    let file = "/etc/a\\nfile";
    let kind = |kind: InodeKind| refused(file, |tree| tree.inodes[2].kind = kind);
    assert_eq!(kind(InodeKind::Symlink { target: vec![] }), FileProblem::Target(0));
    assert_eq!(kind(InodeKind::Symlink { target: vec![b'x'; 4096] }), FileProblem::Target(4096));
    assert_eq!(kind(InodeKind::Symlink { target: b"a\0".to_vec() }), FileProblem::Target(2));
    let (major, minor) = (4096, 0);
    assert_eq!(kind(InodeKind::CharDevice { major, minor }), FileProblem::DeviceNumber { major, minor });
    let (major, minor) = (0, 1 << 20);
    assert_eq!(kind(InodeKind::BlockDevice { major, minor }), FileProblem::DeviceNumber { major, minor });
    let size_bytes = 1 << 63;
    assert_eq!(kind(InodeKind::Regular { size_bytes, extents: vec![] }), FileProblem::Size(size_bytes));
    assert_eq!(refused(file, |tree| tree.inodes[2].link_count = 0), FileProblem::LinkCount);
    let problem = refused(file, |tree| tree.inodes[2].mtime.nanoseconds = 1_000_000_000);
    assert_eq!(problem, FileProblem::Nanoseconds(1_000_000_000));
}

#[test]
fn what_extended_attributes_cannot_hold() {
    let file = "/etc/a\\nfile";
    let xattr = |name: &[u8], len| Xattr { name: name.to_vec(), value: vec![7; len] };
    for bad in [xattr(&[b'x'; 256], 1), xattr(b"user.a", 65_536), xattr(b"user.\0", 1), xattr(b"", 1)] {
        let problem = refused(file, |tree| tree.inodes[2].xattrs = vec![bad]);
        assert!(matches!(problem, FileProblem::Xattr { .. }), "{problem}");
    }
    let many = (0..5).map(|no| xattr(format!("user.{no}").as_bytes(), 65_535)).collect();
    let problem = refused(file, |tree| tree.inodes[2].xattrs = many);
    assert!(matches!(problem, FileProblem::XattrSpace(_)), "{problem}");
}

#[test]
fn attributes_that_the_kernel_does_not_show_are_left_out() {
    let mut tree = tree_of_two();
    tree.inodes[2].xattrs = vec![Xattr { name: b"system.nfs4_acl".to_vec(), value: b"x".to_vec() }];
    let image = image_of(&tree);
    assert!(!image.has_any_xattr());
    assert_eq!(image.bytes(), image_of(&tree_of_two()).bytes());
}

#[test]
fn three_hundred_shared_attributes_on_one_inode() {
    let mut tree = tree_of_two();
    let xattrs: Vec<Xattr> =
        (0..300).map(|no| Xattr { name: format!("user.{no:03}").into_bytes(), value: vec![1; 9] }).collect();
    tree.inodes[1].xattrs = xattrs.clone();
    tree.inodes[2].xattrs = xattrs;
    let image = image_of(&tree);
    let etc = image.lookup(image.root(), b"etc").expect("a directory").expect("an entry");
    assert_eq!(image.xattr_names(etc).expect("sound").count(), 300);
    assert_eq!(image.xattr(etc, b"user.299"), Ok(Some([1; 9].as_slice())));
}

#[test]
fn trees_that_are_none() {
    let mut tree = tree_of_two();
    tree.inodes.clear();
    assert_eq!(write(&tree), Err(WriteError::Root));
    let mut tree = tree_of_two();
    tree.inodes[0].kind = InodeKind::Fifo;
    assert_eq!(write(&tree), Err(WriteError::Root));
    let mut tree = tree_of_two();
    tree.layers = vec![TreeLayer { diff_id: DiffId([0; 32]), logical_len_bytes: 1 << 20 }; 65_536];
    assert_eq!(write(&tree), Err(WriteError::LayerCount(65_536)));
    let mut tree = tree_of_two();
    let len_bytes = 1 << 41;
    tree.layers[1].logical_len_bytes = len_bytes;
    assert_eq!(write(&tree), Err(WriteError::LayerLength { diff_id: tree.layers[1].diff_id, len_bytes }));
}

#[test]
fn as_many_layers_as_a_device_number_counts() {
    let mut tree = tree_of_two();
    tree.layers = vec![TreeLayer { diff_id: DiffId([3; 32]), logical_len_bytes: 1 << 20 }; 65_535];
    let image = image_of(&tree);
    assert_eq!(image.devices().len(), 65_535);
    assert!(image.devices().all(|slot| slot.diff_id == Some(DiffId([3; 32])) && slot.blocks == 2048));
    assert_eq!(super::entries::regular_files(&image).len(), 1);
}

#[test]
fn inodes_without_a_name_are_left_out() {
    let mut tree = tree_of_two();
    let lost = tree.inodes[2].clone();
    tree.inodes.push(lost);
    assert_eq!(image_of(&tree).bytes(), image_of(&tree_of_two()).bytes());
}
