//! Damaged images: every question ends, with an answer or an error.

use proptest::prelude::*;

use super::trees::{any_tree, known_tree};
use crate::erofs::{FileType, Image, Nid, ReadError, write};

/// Directory entries and file ranges that one image is asked for; a damaged directory may hold itself.
const QUESTIONS_MAX: usize = 20_000;

/// Asks every question about everything that can be reached.
fn ask_everything(bytes: &[u8]) {
    let Ok(image) = Image::open(bytes) else { return };
    let _ = image.devices().map(|slot| u64::from(slot.blocks)).sum::<u64>();
    let mut waiting = vec![image.root(), Nid(0), Nid(u64::MAX), Nid(u64::MAX / 32), Nid(bytes.len() as u64 / 32 - 1)];
    let mut asked = 0;
    while let Some(nid) = waiting.pop() {
        asked += 1;
        if asked > QUESTIONS_MAX {
            return;
        }
        if let Ok(stat) = image.stat(nid) {
            assert_eq!(stat.ino, nid.0);
        }
        let _ = image.readlink(nid).map(|target| target.len());
        let _ = image.xattr(nid, b"security.capability");
        if let Ok(names) = image.xattr_names(nid) {
            asked += names.count();
        }
        for range in [0..u64::MAX, 5000..9000, u64::MAX - 5..u64::MAX] {
            if let Ok(extents) = image.extents(nid, range) {
                asked += extents.take(1000).count();
            }
        }
        for offset in [0, 12, 700, u64::MAX] {
            let Ok(entries) = image.readdir(nid, offset) else { continue };
            for entry in entries.map_while(Result::ok) {
                asked += 1;
                let _ = image.lookup(nid, entry.name);
                if offset == 0 && asked < QUESTIONS_MAX && !matches!(entry.name, b"." | b"..") {
                    waiting.push(entry.nid);
                }
            }
        }
        let _ = image.lookup(nid, b"etc");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    #[test]
    fn flipped_bytes_do_no_harm(
        tree in any_tree(),
        flips in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..40),
    ) {
        let mut image = write(&tree).expect("the tree can be written");
        for (at, value) in flips {
            let at = 1024 + at.index(image.len() - 1024);
            image[at] = value;
        }
        ask_everything(&image);
    }

    #[test]
    fn any_superblock_does_no_harm(tree in any_tree(), fields in proptest::collection::vec((8_usize..128, any::<u8>()), 1..20)) {
        let mut image = write(&tree).expect("the tree can be written");
        for (at, value) in fields {
            image[1024 + at] = value;
        }
        ask_everything(&image);
    }
}

#[test]
fn every_byte_of_a_known_image_can_be_anything() {
    let good = write(&known_tree()).expect("the tree can be written");
    for at in 1024..good.len() {
        for value in [0, 0xff, good[at] ^ 1, good[at] ^ 0x80] {
            let mut image = good.clone();
            image[at] = value;
            let Ok(image) = Image::open(image) else { continue };
            // The walk of everything would take a minute; what a byte changes is near the root of some question.
            let _ = image.stat(image.root());
            for entry in image.readdir(image.root(), 0).into_iter().flatten().map_while(Result::ok) {
                let _ = image.lookup(image.root(), entry.name);
                let _ = image.extents(entry.nid, 0..u64::MAX).map(Iterator::count);
                let _ = image.readlink(entry.nid).map(|target| target.len());
                let _ = image.xattrs(entry.nid).map(Iterator::count);
                if entry.kind == FileType::Directory {
                    let _ = image.readdir(entry.nid, 0).map(Iterator::count);
                }
            }
        }
    }
}

#[test]
fn every_prefix_of_an_image_does_no_harm() {
    let good = write(&known_tree()).expect("the tree can be written");
    for len in (0..good.len()).step_by(61).chain([1023, 1024, 1151, 1152, 1535, 1536, good.len() - 1]) {
        ask_everything(&good[..len]);
    }
}

#[test]
fn what_is_no_image_says_why() {
    let good = write(&known_tree()).expect("the tree can be written");
    let open = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut image = good.clone();
        change(&mut image);
        Image::open(image).map(|_| ()).expect_err("the image is damaged")
    };
    assert!(matches!(open(&Vec::clear), ReadError::Truncated { len_bytes: 0, what: "superblock" }));
    assert!(matches!(open(&|image| image.truncate(1200)), ReadError::Truncated { .. }));
    assert_eq!(open(&|image| image[1024] = 0), ReadError::Magic);
    assert!(matches!(open(&|image| image[1024 + 8] |= 1), ReadError::Checksum { .. }));
    assert_eq!(open(&|image| image[1036] = 8), ReadError::BlockSize(8));
    assert_eq!(open(&|image| image[1024 + 80] |= 2), ReadError::Features(2));
    let lost_root = open(&|image| image[1024 + 14..1024 + 16].fill(0xff));
    assert!(matches!(lost_root, ReadError::Damaged { nid: Nid(0xffff), .. }), "{lost_root}");
}

#[test]
fn questions_to_the_wrong_kind_are_refused() {
    let image = Image::open(write(&known_tree()).expect("the tree can be written")).expect("opens");
    let find = |name: &[u8]| image.lookup(image.root(), name).expect("a directory").expect("an entry");
    let (file, root) = (find(b"inline"), image.root());
    assert_eq!(image.lookup(file, b"x"), Err(ReadError::Kind { nid: file, expected: "directory" }));
    assert!(matches!(image.readdir(find(b"null"), 0), Err(ReadError::Kind { .. })));
    assert!(matches!(image.readlink(root), Err(ReadError::Kind { .. })));
    assert!(matches!(image.extents(root, 0..1), Err(ReadError::Kind { .. })));
    for name in [&b""[..], &[b'x'; 256], b"null\0"] {
        assert_eq!(image.lookup(root, name), Ok(None));
    }
}
