//! Whole trees, judged by four readers: the tree itself says what must be seen; our reader, the kernel and
//! `fsck.erofs` must see just that.

mod entries;
mod hostile;
mod judges;
mod kernel;
mod limits;
mod mkfs;
mod trees;

use std::collections::BTreeSet;

use proptest::prelude::*;

use self::entries::{from_image, from_tree};
use self::judges::{LayerFiles, Mount, fsck};
use self::trees::{build, directory, file, ramp};
use super::{FileType, Image, write};
use crate::tree::Tree;

/// Writes `tree` and opens what was written.
fn image_of(tree: &Tree) -> Image<Vec<u8>> {
    Image::open(write(tree).expect("the tree can be written")).expect("the image can be read")
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]

    #[test]
    fn our_reader_sees_the_tree(tree in trees::any_tree()) {
        let image = image_of(&tree);
        prop_assert_eq!(from_image(&image, &ramp), from_tree(&tree));
        prop_assert_eq!(image.has_any_xattr(), from_tree(&tree).values().any(|entry| !entry.xattrs.is_empty()));
        prop_assert_eq!(image.devices().map(|slot| slot.diff_id).collect::<Vec<_>>(),
            tree.layers.iter().map(|layer| Some(layer.diff_id)).collect::<Vec<_>>());
    }

    #[test]
    fn the_same_tree_gives_the_same_bytes(tree in trees::any_tree()) {
        prop_assert!(write(&tree) == write(&tree.clone()));
    }

    #[test]
    fn extents_of_any_range_are_those_of_the_whole_file(
        tree in trees::any_tree(),
        ranges in proptest::collection::vec((0_u64..40_000, 0_u64..40_000), 8),
    ) {
        let image = image_of(&tree);
        for (_, nid) in entries::regular_files(&image) {
            let size = image.stat(nid).expect("a file").size_bytes;
            let whole = entries::content(&image, nid, 0..u64::MAX, &ramp);
            prop_assert_eq!(whole.len() as u64, size);
            for &(from, len) in &ranges {
                let part = entries::content(&image, nid, from..from + len, &ramp);
                let expected = whole.get(from.min(size) as usize..(from + len).min(size) as usize);
                prop_assert_eq!(Some(part.as_slice()), expected);
            }
        }
    }

    #[test]
    fn reading_a_directory_can_go_on_at_any_entry(tree in trees::any_tree()) {
        let image = image_of(&tree);
        for directory in entries::directories(&image) {
            let all: Vec<_> = image.readdir(directory, 0).expect("a directory").map(|entry| entry.expect("sound")).collect();
            for (no, entry) in all.iter().enumerate() {
                let rest: Vec<_> = image.readdir(directory, entry.next_offset).expect("a directory")
                    .map(|entry| entry.expect("sound")).collect();
                prop_assert_eq!(&rest[..], &all[no + 1..]);
                prop_assert_eq!(image.lookup(directory, entry.name), Ok(Some(entry.nid)));
            }
            prop_assert_eq!(image.lookup(directory, b"no such name"), Ok(None));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn the_kernel_and_fsck_see_the_tree(tree in trees::any_tree()) {
        let files = LayerFiles::shared();
        let (image, _guard) = files.store(&write(&tree).expect("the tree can be written"));
        fsck(&image, files.devices());
        let mount = Mount::new(&image, files.devices());
        prop_assert_eq!(entries::from_directory(&mount.path()), from_tree(&tree));
    }
}

#[test]
fn an_empty_tree_is_a_root_directory() {
    let mut tree = build(vec![]);
    tree.layers.clear();
    let image = image_of(&tree);
    let names: Vec<Vec<u8>> =
        image.readdir(image.root(), 0).expect("a root").map(|entry| entry.expect("sound").name.to_vec()).collect();
    assert_eq!(names, [b".".to_vec(), b"..".to_vec()]);
    assert_eq!(image.devices().len(), 0);
    let files = LayerFiles::shared();
    let (stored, _guard) = files.store(image.bytes());
    fsck(&stored, &[]);
    assert_eq!(entries::from_directory(&Mount::new(&stored, &[]).path()), from_tree(&tree));
}

#[test]
fn inodes_of_a_directory_stand_together() {
    // 40 directories of 50 files each.
    let mut nodes = Vec::new();
    for d in 0..40_u16 {
        nodes.push(directory(0, format!("directory-{d:02}").as_bytes()));
    }
    for d in 0..40_u16 {
        for f in 0..50_u16 {
            nodes.push(file(d + 1, format!("file-{f:02}").as_bytes(), &[(0, 1, u64::from(f))], 0));
        }
    }
    let image = image_of(&build(nodes));
    for directory in entries::directories(&image).into_iter().skip(1) {
        let nids: BTreeSet<u64> = image
            .readdir(directory, 0)
            .expect("a directory")
            .map(|entry| entry.expect("sound"))
            .filter(|entry| entry.kind == FileType::Regular)
            .map(|entry| entry.nid.0)
            .collect();
        assert_eq!(nids.len(), 50);
        let span = nids.last().unwrap_or(&0) - nids.first().unwrap_or(&0);
        // A compact file with one index takes two slots; a few may have filled gaps before the directory's own block.
        assert!(span <= 3 * nids.len() as u64, "{} inodes span {span} slots", nids.len());
    }
}

#[test]
fn the_bytes_of_a_known_tree_never_change_unnoticed() {
    let image = write(&trees::known_tree()).expect("the tree can be written");
    assert_eq!(
        blake3::hash(&image).to_hex().as_str(),
        "3b23d1223fd0adc1a074026c222528a8e7f8fa5188062372d90dad1e5b523724",
        "the writer gives other bytes than before: raise WRITER_VERSION, then this hash"
    );
}
