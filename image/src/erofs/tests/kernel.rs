//! What only a few trees have, shown by the kernel.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::Path;

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use super::entries::{from_directory, from_image, from_tree};
use super::image_of;
use super::judges::{LayerFiles, Mount, fsck};
use super::trees::{build, directory, file, known_tree, ramp, ramp_byte};
use crate::erofs::write;
use crate::ids::{DiffId, LogicalOffset};
use crate::tree::{Extent, ExtentSource, InodeKind, Tree, TreeLayer};

fn kind_of_entry<'a>(tree: &'a mut Tree, name: &[u8]) -> &'a mut InodeKind {
    let InodeKind::Directory { entries, .. } = &tree.inodes[0].kind else { panic!("the root is a directory") };
    let index = entries.iter().find(|(entry, _)| entry == name).expect("an entry of the root").1;
    &mut tree.inodes[index as usize].kind
}

#[test]
fn one_of_everything_mounted_the_old_way() {
    struct Mounted<'a>(&'a Path);
    impl Drop for Mounted<'_> {
        fn drop(&mut self) {
            unmount(self.0, UnmountFlags::DETACH).expect("unmounts");
        }
    }
    let tree = known_tree();
    let files = LayerFiles::shared();
    let (image, _guard) = files.store(&write(&tree).expect("the tree can be written"));
    fsck(&image, files.devices());
    let options: Vec<String> = files.devices().iter().map(|path| format!("device={}", path.display())).collect();
    let options = std::ffi::CString::new(options.join(",")).expect("no zero bytes");
    let target = tempfile::tempdir().expect("a mount point");
    mount(&image, target.path(), "erofs", MountFlags::RDONLY, options.as_c_str()).expect("mounts");
    let mounted = Mounted(target.path());
    assert_eq!(from_directory(mounted.0), from_tree(&tree));
}

#[test]
fn sixty_layers() {
    let layer_len = 64 * 512;
    let mut tree = build((0..60).map(|no| file(0, format!("from-{no:02}").as_bytes(), &[(0, 3, 7)], 100)).collect());
    tree.layers = (0..60).map(|no| TreeLayer { diff_id: DiffId([no; 32]), logical_len_bytes: layer_len }).collect();
    let files = LayerFiles::empty([layer_len; 60]);
    for no in 0..60_u16 {
        files.fill(no, 0, layer_len as usize);
        let name = format!("from-{no:02}");
        let InodeKind::Regular { extents, .. } = kind_of_entry(&mut tree, name.as_bytes()) else { panic!("a file") };
        extents[0].source = ExtentSource::Layer { layer: no, offset: LogicalOffset(u64::from(no) * 512) };
    }
    let (image, _guard) = files.store(&write(&tree).expect("the tree can be written"));
    fsck(&image, files.devices());
    assert_eq!(from_directory(&Mount::new(&image, files.devices()).path()), from_tree(&tree));
    assert_eq!(from_image(&image_of(&tree), &ramp), from_tree(&tree));
}

#[test]
fn thousands_of_entries_in_one_directory() {
    let mut nodes = vec![directory(0, b"large")];
    for no in 0..3000_u32 {
        let name = format!("{:0width$}", no * 7919 % 3001, width = 4 + (no % 40) as usize);
        nodes.push(file(1, name.as_bytes(), &[(0, 1, u64::from(no % 500))], no as u64 % 512));
    }
    let tree = build(nodes);
    let files = LayerFiles::shared();
    let (image, _guard) = files.store(&write(&tree).expect("the tree can be written"));
    fsck(&image, files.devices());
    assert_eq!(from_directory(&Mount::new(&image, files.devices()).path()), from_tree(&tree));
    assert_eq!(from_image(&image_of(&tree), &ramp), from_tree(&tree));
}

#[test]
fn the_end_of_a_two_tebibyte_layer_and_a_file_beyond_four_gibibytes() {
    let layer_len = (1_u64 << 41) - 1024;
    let file_len = 5_000_000_100_u64;
    let data = [(0_u64, layer_len - 4096, 4096_u64), (4_999_999_488, 1 << 40, 612)];
    let mut tree = build(vec![file(0, b"far", &[], 0)]);
    tree.layers = vec![TreeLayer { diff_id: DiffId([9; 32]), logical_len_bytes: layer_len }];
    let files = LayerFiles::empty([layer_len]);
    let mut extents = Vec::new();
    for (file_offset, offset, len_bytes) in data {
        files.fill(0, offset, len_bytes as usize);
        let source = ExtentSource::Layer { layer: 0, offset: LogicalOffset(offset) };
        extents.push(Extent { file_offset, len_bytes, source });
    }
    *kind_of_entry(&mut tree, b"far") = InodeKind::Regular { size_bytes: file_len, extents };
    let (image, _guard) = files.store(&write(&tree).expect("the tree can be written"));
    let mount = Mount::new(&image, files.devices());
    let far = File::open(mount.path().join("far")).expect("opens");
    assert_eq!(far.metadata().expect("stat").size(), file_len);
    for (file_offset, offset, len_bytes) in data {
        let mut bytes = vec![0; len_bytes as usize];
        far.read_exact_at(&mut bytes, file_offset).expect("reads");
        assert!((offset..).zip(&bytes).all(|(at, byte)| *byte == ramp_byte(0, at)), "wrong bytes at {file_offset}");
    }
    let mut hole = [1; 8192];
    far.read_exact_at(&mut hole, 1 << 32).expect("reads");
    assert!(hole.iter().all(|byte| *byte == 0));
}

#[test]
fn more_names_than_sixteen_bits_count() {
    let mut tree = build(vec![file(0, b"one", &[(0, 1, 0)], 0)]);
    tree.inodes[1].link_count = 70_000;
    let files = LayerFiles::shared();
    let (image, _guard) = files.store(&write(&tree).expect("the tree can be written"));
    let mount = Mount::new(&image, files.devices());
    assert_eq!(fs::metadata(mount.path().join("one")).expect("stat").nlink(), 70_000);
}
