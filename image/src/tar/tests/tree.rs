//! The tree: what containerd's unpack makes of odd orders, paths and duplicates.

use crate::ids::LogicalOffset;
use crate::index::toc::{NodeKind, Toc};
use crate::tar::testing::{RawHeader, TarWriter, listing, paths, toc_of};
use crate::tar::{TarError, XattrFault};
use crate::tree::{Extent, ExtentSource, Timestamp};

fn tar() -> TarWriter {
    TarWriter::default()
}

fn toc(writer: TarWriter) -> Toc {
    toc_of(&writer.end()).expect("accepted")
}

fn refused(writer: TarWriter) -> TarError {
    toc_of(&writer.end()).expect_err("refused")
}

/// Number of the node at `path`.
fn at(toc: &Toc, path: &str) -> u32 {
    let found = paths(toc).iter().position(|found| found == path);
    found.unwrap_or_else(|| panic!("no {path} in {:?}", listing(toc))) as u32
}

fn first_byte(toc: &Toc, path: &str) -> u64 {
    let mut node = toc.node(at(toc, path));
    if let NodeKind::HardLink { node: first } = node.kind() {
        node = toc.node(first);
    }
    match node.kind() {
        NodeKind::Regular { mut extents, .. } => match extents.next().expect("has data").source {
            ExtentSource::Layer { offset, .. } => offset.0,
            ExtentSource::Inline(_) => panic!("{path} is inline"),
        },
        kind => panic!("{path} is {kind:?}"),
    }
}

#[test]
fn trees_come_out_as_containerd_unpacks_them() {
    let cases: Vec<(&str, TarWriter, &[&str])> = vec![
        ("nothing", tar(), &[]),
        (
            "leading dots and slashes",
            tar().file("./a", b"").file("/b", b"").file("././/c", b""),
            &["a file 0", "b file 0", "c file 0"],
        ),
        (
            "dots inside",
            tar().file("a/../../b", b"").file("c/./d/..//e", b""),
            &["b file 0", "c dir implied", "c/e file 0"],
        ),
        ("names of the root", tar().dir("./").dir("/").file("..", b"").file("", b""), &[]),
        ("missing parents", tar().file("a/b/c", b""), &["a dir implied", "a/b dir implied", "a/b/c file 0"]),
        ("parents after children", tar().file("a/b", b"").dir("a/"), &["a dir", "a/b file 0"]),
        ("the last one wins", tar().file("a", b"1").file("a", b"22"), &["a file 2"]),
        ("a file over a directory", tar().file("a/b/c", b"").file("a", b"1"), &["a file 1"]),
        ("a directory over a file", tar().file("a", b"1").dir("a").file("a/b", b""), &["a dir", "a/b file 0"]),
        (
            "a directory over a directory keeps its names",
            tar().file("a/b", b"").dir("a").dir("a"),
            &["a dir", "a/b file 0"],
        ),
        ("a directory again after a file", tar().file("a/b", b"").file("a", b"").dir("a"), &["a dir"]),
        (
            "through symlinks",
            tar().dir("real").symlink("link", "real").file("link/x", b""),
            &["link -> real", "real dir", "real/x file 0"],
        ),
        (
            "through symlinks to nowhere",
            tar().symlink("a/link", "../to/./it").file("a/link/x", b""),
            &["a dir implied", "to dir implied", "a/link -> ../to/./it", "to/it dir implied", "to/it/x file 0"],
        ),
        (
            "symlinks never leave the root",
            tar().symlink("out", "../../../etc").file("out/x", b"").symlink("abs", "/etc").file("abs/y", b""),
            &["abs -> /etc", "etc dir implied", "out -> ../../../etc", "etc/x file 0", "etc/y file 0"],
        ),
        (
            "symlinks to symlinks",
            tar().symlink("a", "b").symlink("b", "c").file("a/x/y", b""),
            &["a -> b", "b -> c", "c dir implied", "c/x dir implied", "c/x/y file 0"],
        ),
        ("a symlink itself is replaced", tar().symlink("a", "b").file("a", b"1"), &["a file 1"]),
        ("a directory replaces a symlink to one", tar().dir("b").symlink("a", "b").dir("a"), &["a dir", "b dir"]),
        (
            "whiteouts",
            tar().file(".wh.a", b"").file("b/.wh.c", b"ignored data"),
            &["a whiteout", "b dir implied", "b/c whiteout"],
        ),
        (
            "opaque directories",
            tar().file("a/x", b"").file("a/.wh..wh..opq", b"").file("b/.wh..wh..opq", b""),
            &["a dir implied opaque", "b dir implied opaque", "a/x file 0"],
        ),
        (
            "opaque twice, then explicit",
            tar().file("a/.wh..wh..opq", b"").file("a/.wh..wh..opq", b"").dir("a"),
            &["a dir opaque"],
        ),
        (
            "other aufs metadata",
            tar().dir(".wh..wh.plnk").file(".wh..wh.aufs", b"").file(".wh..wh.orph/x", b""),
            &[".wh..wh.orph dir implied", ".wh.aufs whiteout", ".wh.plnk whiteout", ".wh..wh.orph/x file 0"],
        ),
        ("a file after its whiteout", tar().file(".wh.a", b"").file("a", b""), &["a file 0"]),
        ("a directory after its whiteout", tar().file(".wh.a", b"").dir("a"), &["a dir"]),
        (
            "an implied directory after its whiteout",
            tar().file(".wh.a", b"").file("a/b", b""),
            &["a dir implied opaque", "a/b file 0"],
        ),
        ("a whiteout after its file", tar().file("a/b", b"").file(".wh.a", b"").file(".wh.a", b""), &["a whiteout"]),
        (
            "a device 0:0",
            tar().put(RawHeader::new(b"a", b'3').device(0, 0), b"").put(RawHeader::new(b"b", b'4').device(0, 0), b""),
            &["a whiteout", "b block 0:0"],
        ),
        (
            "devices and pipes",
            tar().put(RawHeader::new(b"a", b'3').device(1, 3), b"").put(RawHeader::new(b"b", b'6'), b""),
            &["a char 1:3", "b fifo"],
        ),
        (
            "a global header clears its path",
            tar().file("g", b"").put(RawHeader::new(b"g", b'g'), b"").put(RawHeader::new(b"d/g", b'g'), b""),
            &["d dir implied"],
        ),
        (
            "unsupported types as whiteouts and roots",
            tar().put(RawHeader::new(b".wh.a", b'V'), b"").put(RawHeader::new(b"/", b'V'), b""),
            &["a whiteout"],
        ),
        ("contiguous files", tar().put(RawHeader::new(b"a", b'7'), b"12"), &["a file 2"]),
    ];
    for (name, writer, expected) in cases {
        assert_eq!(listing(&toc(writer)), expected, "{name}");
    }
}

#[test]
fn hard_links_share_what_their_target_is_at_that_time() {
    let links: Vec<(&str, TarWriter, &[&str])> = vec![
        ("after", tar().file("b", b"1").hard_link("a", "b"), &["a file 1", "b = a"]),
        ("before", tar().hard_link("a", "b").file("b", b"1"), &["a file 1", "b = a"]),
        (
            "before, through a directory",
            tar().hard_link("a", "./x//b").file("x/b", b"1"),
            &["a file 1", "x dir implied", "x/b = a"],
        ),
        (
            "chains backwards",
            tar().hard_link("a", "b").hard_link("b", "c").file("c", b"1"),
            &["a file 1", "b = a", "c = a"],
        ),
        ("of a link", tar().file("c", b"1").hard_link("b", "c").hard_link("a", "/b"), &["a file 1", "b = a", "c = a"]),
        (
            "through a symlinked directory",
            tar().file("d/f", b"1").symlink("s", "d").hard_link("a", "s/f"),
            &["a file 1", "d dir implied", "s -> d", "d/f = a"],
        ),
        (
            "to a symlink, not through it",
            tar().file("f", b"1").symlink("s", "f").hard_link("t", "s"),
            &["f file 1", "s -> f", "t = s"],
        ),
        (
            "to a device",
            tar().put(RawHeader::new(b"d", b'3').device(1, 3), b"").hard_link("e", "d"),
            &["d char 1:3", "e = d"],
        ),
        ("to a whiteout", tar().file(".wh.a", b"").hard_link("b", "a"), &["a whiteout", "b whiteout"]),
        (
            "its target replaced later",
            tar().file("b", b"1").hard_link("a", "b").file("b", b"22"),
            &["a file 1", "b file 2"],
        ),
        (
            "its target removed later",
            tar().file("b", b"1").hard_link("a", "b").file(".wh.b", b""),
            &["a file 1", "b whiteout"],
        ),
        ("itself replaced while waiting", tar().hard_link("a", "b").file("a", b"1"), &["a file 1"]),
        ("its directory removed while waiting", tar().hard_link("d/a", "b").file("d", b"1"), &["d file 1"]),
    ];
    for (name, writer, expected) in links {
        assert_eq!(listing(&toc(writer)), expected, "{name}");
    }
    let replaced = toc(tar().file("b", b"1").hard_link("a", "b").file("b", b"2"));
    assert_eq!((first_byte(&replaced, "a"), first_byte(&replaced, "b")), (512, 2048));
}

#[test]
fn what_containerd_refuses_is_refused_by_name() {
    let name = |text: &str| text.to_owned();
    let long = "n".repeat(256);
    let cases = vec![
        (tar().hard_link("a", "b"), TarError::DanglingHardLink { entry: name("a"), target: name("b") }),
        (tar().hard_link("a", "a"), TarError::DanglingHardLink { entry: name("a"), target: name("a") }),
        (
            tar().hard_link("a", "b").hard_link("b", "a"),
            TarError::DanglingHardLink { entry: name("a"), target: name("b") },
        ),
        (tar().file("a", b"").hard_link("a", "a"), TarError::DanglingHardLink { entry: name("a"), target: name("a") }),
        (tar().dir("d").hard_link("a", "d"), TarError::HardLinkToDirectory { entry: name("a"), target: name("d") }),
        (tar().hard_link("a", "d").dir("d"), TarError::HardLinkToDirectory { entry: name("a"), target: name("d") }),
        (tar().hard_link("a", "/"), TarError::HardLinkToDirectory { entry: name("a"), target: name("/") }),
        (tar().file("a", b"").file("a/b", b""), TarError::NotADirectory { entry: name("a/b"), parent: name("a") }),
        (tar().symlink("a", "b").symlink("b", "a").file("a/x", b""), TarError::TooManySymlinks { entry: name("a/x") }),
        (tar().put(RawHeader::new(b"x", b'V'), b""), TarError::UnsupportedType { entry: name("x"), type_flag: b'V' }),
        (tar().file(".wh.", b""), TarError::InvalidWhiteout { entry: name(".wh.") }),
        (tar().file("d/.wh..", b""), TarError::InvalidWhiteout { entry: name("d/.wh..") }),
        (tar().file(".wh...", b""), TarError::InvalidWhiteout { entry: name(".wh...") }),
        (tar().symlink("s", ""), TarError::SymlinkTarget { entry: name("s") }),
        (tar().pax(&[("path", long.as_bytes())]).file("x", b""), TarError::PathTooLong { entry: long.clone() }),
        (
            tar()
                .pax(&[("GNU.sparse.name", b"a\0b"), ("GNU.sparse.map", b"0,1"), ("GNU.sparse.numblocks", b"1")])
                .file("x", b"1"),
            TarError::NulInPath { entry: name("a\\x00b") },
        ),
        (
            tar().pax(&[("SCHILY.xattr.security.capability", b"x")]).file("x", b""),
            TarError::Xattr { entry: name("x"), name: name("security.capability"), fault: XattrFault::Capability },
        ),
    ];
    for (writer, error) in cases {
        assert_eq!(refused(writer), error);
    }
    let deep = "d/".repeat(2048) + "x";
    assert!(matches!(refused(tar().pax(&[("path", deep.as_bytes())]).file("x", b"")), TarError::PathTooLong { .. }));
}

#[test]
fn names_may_be_255_bytes_also_behind_a_whiteout() {
    let name = "n".repeat(255);
    let whiteout = format!(".wh.{name}");
    let toc = toc(tar().pax(&[("path", whiteout.as_bytes())]).file("x", b""));
    assert_eq!(listing(&toc), [format!("{name} whiteout")]);
}

#[test]
fn metadata_is_the_last_entry_s() {
    let header = |mode, uid| RawHeader::new(b"d", b'5').mode(mode).owner(uid, uid).mtime(uid);
    let toc = toc(tar()
        .pax(&[("SCHILY.xattr.user.a", b"1"), ("SCHILY.xattr.user.b", b"1")])
        .put(header(0o1777, 1), b"")
        .pax(&[("SCHILY.xattr.user.b", b"2"), ("SCHILY.xattr.trusted.overlay.opaque", b"y")])
        .put(header(0o2750, 2), b"")
        .dir("e"));
    let node = toc.node(at(&toc, "d"));
    assert_eq!((node.permissions(), node.uid(), node.gid()), (0o2750, 2, 2));
    assert_eq!(node.mtime(), Timestamp { seconds: 2, nanoseconds: 0 });
    // A directory keeps the attributes that a later entry does not name.
    let xattrs: Vec<_> = node.xattrs().map(|xattr| (xattr.name, xattr.value)).collect();
    assert_eq!(xattrs, [(&b"user.a"[..], &b"1"[..]), (b"user.b", b"2")]);
    assert!(matches!(node.kind(), NodeKind::Directory { opaque: false, implied: false, .. }));
}

#[test]
fn the_root_s_entry_counts() {
    let explicit = toc(tar().put(RawHeader::new(b"./", b'5').mode(0o700).owner(3, 4), b""));
    let root = explicit.node(0);
    assert_eq!((root.permissions(), root.uid(), root.gid()), (0o700, 3, 4));
    assert!(matches!(root.kind(), NodeKind::Directory { implied: false, .. }));
    assert!(matches!(toc(tar()).node(0).kind(), NodeKind::Directory { implied: true, .. }));
}

#[test]
fn a_hard_link_s_metadata_goes_to_the_shared_inode() {
    let capability = [&[1, 0, 0, 2][..], &[0; 16]].concat();
    let toc = toc(tar()
        .pax(&[("SCHILY.xattr.security.capability", &capability), ("SCHILY.xattr.user.a", b"1")])
        .put(RawHeader::new(b"f", b'0').mode(0o755), b"1")
        .put(RawHeader::new(b"g", b'1').link(b"f").mode(0o600).owner(9, 9).mtime(77), b"")
        .symlink("s", "f")
        .put(RawHeader::new(b"t", b'1').link(b"s").mode(0o600).owner(8, 8), b""));
    let file = toc.node(at(&toc, "f"));
    assert_eq!((file.permissions(), file.uid(), file.mtime().seconds), (0o600, 9, 77));
    // The kernel drops file capabilities when the owner is set.
    assert_eq!(file.xattrs().map(|xattr| xattr.name).collect::<Vec<_>>(), [b"user.a"]);
    let link = toc.node(at(&toc, "s"));
    assert_eq!((link.permissions(), link.uid()), (0o777, 8));
}

#[test]
fn owners_and_times_are_bounded_as_containerd_bounds_them() {
    let owner = |uid: &[u8]| {
        let toc = toc(tar().pax(&[("uid", uid)]).file("x", b""));
        toc.node(1).uid()
    };
    assert_eq!(owner(b"4294967294"), 4_294_967_294);
    assert_eq!(owner(b"4294967295"), 0);
    assert_eq!(owner(b"4294967297"), 1);
    let time = |mtime: &[u8]| {
        let toc = toc(tar().pax(&[("mtime", mtime)]).file("x", b""));
        (toc.node(1).mtime().seconds, toc.node(1).mtime().nanoseconds)
    };
    assert_eq!(time(b"1700000000.123456789"), (1_700_000_000, 123_456_789));
    assert_eq!(time(b"-1"), (0, 0));
    assert_eq!(time(b"-0.5"), (0, 0));
    assert_eq!(time(b"9223372036.854775807"), (9_223_372_036, 854_775_807));
    assert_eq!(time(b"9223372036.854775808"), (0, 0));
}

#[test]
fn sparse_files_keep_their_extents() {
    let writer = tar()
        .pax(&[("GNU.sparse.map", b"0,512,1024,100"), ("GNU.sparse.numblocks", b"2"), ("GNU.sparse.size", b"9000")])
        .file("s", &[3; 612]);
    let toc = toc(writer);
    let NodeKind::Regular { size_bytes, extents } = toc.node(1).kind() else {
        panic!("not a file");
    };
    let mut tail = [0; 512];
    tail[..100].fill(3);
    let expected = [
        Extent {
            file_offset: 0,
            len_bytes: 512,
            source: ExtentSource::Layer { layer: 0, offset: LogicalOffset(1536) },
        },
        Extent { file_offset: 1024, len_bytes: 512, source: ExtentSource::Inline(tail.to_vec().into()) },
    ];
    assert_eq!(size_bytes, 9000);
    assert_eq!(extents.collect::<Vec<_>>(), expected);
}

#[test]
fn order_in_the_tar_does_not_show_in_the_table() {
    let forward = tar().dir("a").symlink("a/s", "t").dir("b").symlink("b/s", "t").end();
    let backward = tar().dir("b").symlink("b/s", "t").dir("a").symlink("a/s", "t").end();
    assert_eq!(toc_of(&forward).expect("accepted").id(), toc_of(&backward).expect("accepted").id());
}

#[test]
fn implied_directories_are_limited() {
    let mut tree = crate::tar::LayerTree::new();
    let mut result = Ok(());
    for number in 0..3000_u32 {
        let path = format!("{number}/{}x", "d/".repeat(2000));
        let tar = tar().pax(&[("path", path.as_bytes())]).file("x", b"").end();
        for entry in crate::tar::testing::walk(&tar).expect("accepted") {
            result = tree.apply(entry);
        }
        if result.is_err() {
            break;
        }
    }
    assert!(matches!(result, Err(TarError::Limit { what: "names", .. })), "{result:?}");
}
