//! Round trips, damage, and each rule of the format broken once.

use bytes::Bytes;
use proptest::prelude::*;

use super::{NodeKind, Toc, TocError};
use crate::tar::testing::{RawHeader, TEST_DIFF_ID, TarWriter, listing, toc_of};

/// A table with every kind of node, and every section.
fn full() -> Toc {
    let tar = TarWriter::default()
        .dir("./")
        .pax(&[("SCHILY.xattr.user.b", b"value"), ("SCHILY.xattr.user.a", b"\0")])
        .dir("d")
        .file("d/file", &[1; 700])
        .file("d/empty", b"")
        .pax(&[("SCHILY.xattr.user.c", b"")])
        .file("d/more", &[2; 512])
        .symlink("s", "d/file")
        .put(RawHeader::new(b"c", b'3').device(1, 3), b"")
        .put(RawHeader::new(b"k", b'4').device(8, 0), b"")
        .put(RawHeader::new(b"p", b'6'), b"")
        .hard_link("z", "d/file")
        .file(".wh.w", b"")
        .file("o/.wh..wh..opq", b"")
        .pax(&[("GNU.sparse.map", b"0,512,1024,100"), ("GNU.sparse.numblocks", b"2"), ("GNU.sparse.size", b"9000")])
        .file("x", &[3; 612]);
    toc_of(&tar.end()).expect("accepted")
}

fn edited(edit: impl FnOnce(&mut Vec<u8>)) -> Result<Toc, TocError> {
    let mut bytes = full().bytes().to_vec();
    edit(&mut bytes);
    Toc::decode(Bytes::from(bytes))
}

fn node_at(toc: &Toc, path: &str) -> usize {
    let found = crate::tar::testing::paths(toc).iter().position(|found| found == path);
    80 + 48 * found.expect("there is such a path")
}

#[test]
fn round_trips() {
    let made = full();
    let read = Toc::decode(made.bytes().clone()).expect("decodes");
    assert_eq!(
        (read.id(), read.diff_id(), read.logical_len_bytes()),
        (made.id(), TEST_DIFF_ID, made.logical_len_bytes())
    );
    assert_eq!(read.entry_count(), 13);
    let lines = [
        "c char 1:3",
        "d dir",
        "k block 8:0",
        "o dir implied opaque",
        "p fifo",
        "s -> d/file",
        "w whiteout",
        "x file 9000",
        "z file 700",
        "d/empty file 0",
        "d/file = z",
        "d/more file 512",
    ];
    assert_eq!(listing(&read), lines);
    let child = read.child(0, b"d").expect("is there");
    assert_eq!(read.child(child.no(), b"more").expect("is there").name(), b"more");
    assert!(read.child(child.no(), b"less").is_none());
    assert!(read.child(read.child(0, b"c").expect("is there").no(), b"x").is_none());
    let names: Vec<_> = child.xattrs().map(|xattr| (xattr.name, xattr.value)).collect();
    assert_eq!(names, [(&b"user.a"[..], &b"\0"[..]), (b"user.b", b"value")]);
}

#[test]
fn the_smallest_table_is_a_root() {
    let toc = toc_of(&TarWriter::default().end()).expect("accepted");
    assert_eq!((toc.entry_count(), toc.bytes().len()), (1, 80 + 48 + 4));
    assert!(matches!(toc.node(0).kind(), NodeKind::Directory { implied: true, opaque: false, .. }));
}

#[test]
fn a_file_costs_48_bytes_and_its_name() {
    let one = toc_of(&TarWriter::default().file("a", b"1").end()).expect("accepted");
    let two = toc_of(&TarWriter::default().file("a", b"1").file("bcd", b"1").end()).expect("accepted");
    assert_eq!(two.bytes().len() - one.bytes().len(), 48 + 3);
}

#[test]
fn each_rule_is_checked() {
    let toc = full();
    let put = |at: usize, bytes: &'static [u8]| edited(move |table| table[at..at + bytes.len()].copy_from_slice(bytes));
    assert_eq!(put(0, b"X"), Err(TocError::Magic));
    assert_eq!(put(8, &[2]), Err(TocError::Version(2)));
    assert_eq!(put(10, &[1]), Err(TocError::Reserved));
    assert_eq!(put(76, &[1]), Err(TocError::Reserved));
    assert!(matches!(put(12, &[0, 0, 0, 0]), Err(TocError::Node { node: 0, .. })));
    assert!(matches!(put(14, &[0xff]), Err(TocError::Limit { section: "nodes", .. })));
    assert!(matches!(put(68, &[0xff; 4]), Err(TocError::Limit { section: "bytes of strings", .. })));
    assert!(matches!(put(72, &[1, 0, 0, 0]), Err(TocError::Length { .. })));
    // A logical space too short for the data.
    assert!(matches!(put(16, &[0; 8]), Err(TocError::Node { .. })));

    let broken: [(&str, usize, &[u8]); 23] = [
        ("root with a name", 80 + 4, &[1]),
        ("root is a file", 80 + 5, &[2]),
        ("root's children", 80 + 32, &[2]),
        ("root's child count", 80 + 36, &[200]),
        ("no name", node_at(&toc, "c") + 4, &[0]),
        ("name outside", node_at(&toc, "c"), &[0xff, 0xff, 0xff, 0x7f]),
        ("names unsorted", node_at(&toc, "c"), &[2]),
        ("unknown kind", node_at(&toc, "c") + 5, &[10]),
        ("mode", node_at(&toc, "c") + 7, &[0x10]),
        ("nanoseconds", node_at(&toc, "c") + 24, &[0xff; 4]),
        ("attribute set", node_at(&toc, "c") + 28, &[3]),
        ("device 0:0", node_at(&toc, "c") + 32, &[0, 0, 0, 0, 0]),
        ("device major", node_at(&toc, "k") + 33, &[0x10]),
        ("directory flags", node_at(&toc, "d") + 40, &[4]),
        ("pipe with content", node_at(&toc, "p") + 40, &[1]),
        ("link target empty", node_at(&toc, "s") + 36, &[0]),
        ("link target outside", node_at(&toc, "s") + 32, &[0xff, 0xff, 0xff, 0x7f]),
        ("whiteout with an owner", node_at(&toc, "w") + 8, &[1]),
        ("sparse extents outside", node_at(&toc, "x") + 36, &[3]),
        ("sparse size too small", node_at(&toc, "x") + 40, &[0, 2]),
        ("file outside", node_at(&toc, "z") + 32, &[0xff]),
        ("hard link to itself", node_at(&toc, "d/file") + 32, &[11]),
        ("hard link to a directory", node_at(&toc, "d/file") + 32, &[2]),
    ];
    for (what, at, bytes) in broken {
        let result = put(at, bytes);
        assert!(matches!(result, Err(TocError::Node { .. })), "{what}: {result:?}");
    }
    let extents = 80 + 48 * 13;
    for (what, at) in [
        ("unaligned", extents),
        ("empty", extents + 9),
        ("unaligned place", extents + 16),
        ("out of order", extents + 24 + 1),
    ] {
        let result = edited(|table| {
            table[at] = table[at].wrapping_add(if what == "out of order" {
                252
            } else if what == "empty" {
                254
            } else {
                1
            })
        });
        assert!(matches!(result, Err(TocError::Node { .. })), "{what}: {result:?}");
    }
    let sets = extents + 48;
    for at in [sets, sets + 4, sets + 8, sets + 12, sets + 13] {
        let result = edited(|table| table[at] ^= 1);
        assert!(matches!(result, Err(TocError::XattrSet { .. })), "{at}: {result:?}");
    }
}

#[test]
fn the_root_has_no_name_at_all() {
    let toc = full();
    // Strings whose first byte no name may have, so that "not a name" does not pass for "no name".
    let strings = toc.layout.strings;
    for first in [0, b'/', b'.', b'a'] {
        let result = edited(|table| {
            table[80 + 4] = 1;
            table[strings] = first;
        });
        assert!(matches!(result, Err(TocError::Node { node: 0, .. })), "{first}: {result:?}");
    }
}

#[test]
fn every_cut_is_refused() {
    let toc = full();
    for len in 0..toc.bytes().len() {
        assert!(Toc::decode(toc.bytes().slice(..len)).is_err());
    }
}

/// Reads everything that a table gives.
fn read_all(toc: &Toc) -> usize {
    let mut read = 0;
    for node in toc.nodes() {
        read += node.name().len() + node.xattrs().map(|xattr| xattr.value.len()).sum::<usize>();
        if let NodeKind::Regular { extents, .. } = node.kind() {
            read += extents.count();
        }
    }
    read + listing(toc).len()
}

#[test]
fn every_damaged_byte_is_an_error_or_another_table() {
    let toc = full();
    for at in 0..toc.bytes().len() {
        for change in [1, 0x80, 0xff] {
            if let Ok(other) = edited(|bytes| bytes[at] ^= change) {
                assert_ne!(other.id(), toc.id());
                read_all(&other);
            }
        }
    }
}

proptest! {
    #[test]
    fn damage_never_panics(edits in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8)) {
        let result = edited(|bytes| {
            for (at, byte) in edits {
                let at = at.index(bytes.len());
                bytes[at] = byte;
            }
        });
        if let Ok(toc) = result {
            read_all(&toc);
        }
    }

    #[test]
    fn any_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let _ = Toc::decode(Bytes::from([&b"HERMTOC\0\x01\0\0\0"[..], &bytes].concat()));
    }
}
