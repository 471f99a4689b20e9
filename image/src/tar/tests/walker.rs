//! The walker: every format and extension, limits, damage, and pieces of any size.

use bytes::Bytes;
use proptest::prelude::*;

use crate::ids::LogicalOffset;
use crate::tar::testing::{RawHeader, TarWriter, record, walk, walk_in_pieces};
use crate::tar::{Entry, EntryKind, TarError, TarWalker};
use crate::tree::{Extent, ExtentSource, Timestamp, Xattr};

fn one(tar: TarWriter) -> Entry {
    let mut entries = walk(&tar.end()).expect("accepted");
    assert_eq!(entries.len(), 1, "{entries:?}");
    entries.remove(0)
}

fn layer(file_offset: u64, len_bytes: u64, offset: u64) -> Extent {
    Extent { file_offset, len_bytes, source: ExtentSource::Layer { layer: 0, offset: LogicalOffset(offset) } }
}

fn inline(file_offset: u64, bytes: &[u8]) -> Extent {
    let source = ExtentSource::Inline(Bytes::copy_from_slice(bytes));
    Extent { file_offset, len_bytes: bytes.len() as u64, source }
}

#[test]
fn a_plain_file_says_where_it_stands() {
    let entry = one(TarWriter::default()
        .put(RawHeader::new(b"etc/hosts", b'0').mode(0o4755).owner(1000, 50).mtime(1_700_000_000), &[1; 700]));
    assert_eq!((entry.header_start, entry.data_start, entry.stored_len_bytes), (0, 512, 700));
    assert_eq!(entry.path, b"etc/hosts");
    assert_eq!((entry.metadata.permissions, entry.metadata.uid, entry.metadata.gid), (0o4755, 1000, 50));
    assert_eq!(entry.metadata.mtime, Timestamp { seconds: 1_700_000_000, nanoseconds: 0 });
    assert_eq!(entry.kind, EntryKind::Regular { size_bytes: 700, extents: vec![layer(0, 700, 512)] });
}

#[test]
fn every_kind_is_known() {
    let device = |flag| RawHeader::new(b"x", flag).device(4099, 1 << 20 | 7);
    let link = |flag| RawHeader::new(b"x", flag).link(b"to");
    let cases = [
        (RawHeader::new(b"x", b'5'), EntryKind::Directory),
        (RawHeader::new(b"x/", 0), EntryKind::Directory),
        (RawHeader::new(b"x", 0), EntryKind::Regular { size_bytes: 0, extents: vec![] }),
        (RawHeader::new(b"x/", b'0'), EntryKind::Regular { size_bytes: 0, extents: vec![] }),
        (RawHeader::new(b"x", b'7'), EntryKind::Regular { size_bytes: 0, extents: vec![] }),
        (link(b'1'), EntryKind::HardLink { target: b"to".to_vec() }),
        (link(b'2'), EntryKind::Symlink { target: b"to".to_vec() }),
        (device(b'3'), EntryKind::CharDevice { major: 3, minor: 7 }),
        (device(b'4'), EntryKind::BlockDevice { major: 3, minor: 7 }),
        (RawHeader::new(b"x", b'6'), EntryKind::Fifo),
        (RawHeader::new(b"x", b'V'), EntryKind::Unsupported { type_flag: b'V' }),
    ];
    for (header, kind) in cases {
        assert_eq!(one(TarWriter::default().put(header, b"")).kind, kind);
    }
}

#[test]
fn header_only_kinds_have_no_data_whatever_their_size_says() {
    for flag in b'1'..=b'6' {
        let tar = TarWriter::default().raw(RawHeader::new(b"x", flag).size(5000), b"").file("y", b"data").end();
        let entries = walk(&tar).expect("accepted");
        assert_eq!(entries[1].path, b"y");
        assert_eq!(entries[0].stored_len_bytes, 0);
    }
}

#[test]
fn prefixes_belong_to_their_formats() {
    let prefixed = |header: RawHeader| one(TarWriter::default().put(header.set(345, b"some/prefix"), b"")).path;
    assert_eq!(prefixed(RawHeader::new(b"name", b'0')), b"some/prefix/name");
    assert_eq!(prefixed(RawHeader::new(b"name", b'0').set(508, b"tar\0")), b"some/prefix/name");
    assert_eq!(prefixed(RawHeader::new(b"name", b'0').v7()), b"name");
    // Go before 1.8 wrote prefixes into GNU headers, over times that this text is none of.
    assert_eq!(prefixed(RawHeader::new(b"name", b'0').gnu()), b"some/prefix/name");
    let times = RawHeader::new(b"name", b'0').gnu().octal(345, 12, 1_700_000_000).octal(357, 12, 1_700_000_000);
    assert_eq!(one(TarWriter::default().put(times, b"")).path, b"name");
}

#[test]
fn names_may_fill_their_field_and_be_no_utf_8() {
    let name = [&[0xff, 0xfe][..], &[b'n'; 98]].concat();
    let entry = one(TarWriter::default().put(RawHeader::new(&name, b'2').link(&[0xe9; 100]), b""));
    assert_eq!(entry.path, name);
    assert_eq!(entry.kind, EntryKind::Symlink { target: vec![0xe9; 100] });
}

#[test]
fn base_256_numbers() {
    let mut size = [0_u8; 12];
    size[0] = 0x80;
    size[11] = 5;
    let header = RawHeader::new(b"x", b'0')
        .set(108, b"\x80\0\0\0\xff\xff\xff\xfe")
        .set(116, b"\xff\xff\xff\xff\xff\xff\xff\xff")
        .set(124, &size)
        .set(136, &[0xff; 12]);
    let entry = one(TarWriter::default().raw(header, b"12345"));
    assert_eq!((entry.metadata.uid, entry.metadata.gid), (u32::MAX - 1, crate::tar::ID_UNCHANGED));
    assert_eq!(entry.metadata.mtime, Timestamp { seconds: -1, nanoseconds: 0 });
    assert_eq!(entry.stored_len_bytes, 5);
}

#[test]
fn pax_records_take_the_place_of_header_fields() {
    let entry = one(TarWriter::default()
        .pax(&[
            ("path", "long/\u{e9}".as_bytes()),
            ("linkpath", b"a target"),
            ("uid", b"4294967295000"),
            ("gid", b"4000000000"),
            ("mtime", b"-1.25"),
            ("atime", b"5"),
            ("comment", b"\0\xff"),
            ("uname", b""),
            ("SCHILY.xattr.user.z", b"\0binary\n\xff"),
            ("SCHILY.xattr.user.a", b""),
        ])
        .put(RawHeader::new(b"short", b'2').owner(5, 6).link(b"x"), b""));
    assert_eq!(entry.header_start, 0);
    assert_eq!(entry.data_start, 1536);
    assert_eq!(entry.path, "long/\u{e9}".as_bytes());
    assert_eq!(entry.kind, EntryKind::Symlink { target: b"a target".to_vec() });
    assert_eq!(u64::from(entry.metadata.uid), 4_294_967_295_000 % (1 << 32));
    assert_eq!(entry.metadata.gid, 4_000_000_000);
    assert_eq!(entry.metadata.mtime, Timestamp { seconds: -2, nanoseconds: 750_000_000 });
    let xattr = |name: &[u8], value: &[u8]| Xattr { name: name.to_vec(), value: value.to_vec() };
    assert_eq!(entry.metadata.xattrs, [xattr(b"user.a", b""), xattr(b"user.z", b"\0binary\n\xff")]);
}

#[test]
fn pax_sizes_count_and_empty_values_do_not() {
    let tar = TarWriter::default()
        .pax(&[("size", b"600"), ("path", b"")])
        .raw(RawHeader::new(b"x", b'0').size(1), &[3; 600])
        .file("y", b"");
    let entries = walk(&tar.end()).expect("accepted");
    assert_eq!((entries[0].path.as_slice(), entries[0].stored_len_bytes), (&b"x"[..], 600));
    assert_eq!(entries[1].header_start, entries[0].data_start + 1024);
}

#[test]
fn a_later_extended_header_takes_the_place_of_an_earlier_one() {
    let entry =
        one(TarWriter::default().pax(&[("path", b"first"), ("uid", b"9")]).pax(&[("gid", b"8")]).file("x", b""));
    assert_eq!((entry.path.as_slice(), entry.metadata.uid, entry.metadata.gid), (&b"x"[..], 0, 8));
}

#[test]
fn global_headers_apply_to_nothing() {
    let records = record("path", b"pax_name");
    let tar = TarWriter::default()
        .pax(&[("path", b"lost")])
        .put(RawHeader::new(b"pax_global_header", b'g'), &records)
        .file("x", b"");
    let entries = walk(&tar.end()).expect("accepted");
    assert_eq!(entries[0].kind, EntryKind::GlobalHeader);
    assert_eq!(entries[0].path, b"pax_name");
    assert_eq!((entries[0].header_start, entries[1].header_start), (0, 2048));
    assert_eq!(entries[1].path, b"x");
}

#[test]
fn gnu_long_names_go_before_pax_and_headers() {
    let long = [&[b'n'; 300][..], b"\0rest"].concat();
    let entry = one(TarWriter::default()
        .put(RawHeader::new(b"././@LongLink", b'L').gnu(), &long)
        .put(RawHeader::new(b"././@LongLink", b'K').gnu(), b"link target\0")
        .pax(&[("path", b"from pax"), ("linkpath", b"from pax")])
        .put(RawHeader::new(b"short", b'2').gnu().link(b"short"), b""));
    assert_eq!(entry.path, [b'n'; 300]);
    assert_eq!(entry.kind, EntryKind::Symlink { target: b"link target".to_vec() });
    assert_eq!(entry.header_start, 0);
}

/// An old GNU sparse file: header with up to four segments, extension blocks with 21 each.
fn old_gnu_sparse(name: &[u8], segments: &[(u64, u64)], real_size: u64, data: &[u8]) -> TarWriter {
    let slot = |(offset, len): &(u64, u64)| format!("{offset:011o}\0{len:011o}\0").into_bytes();
    let (first, rest) = segments.split_at(segments.len().min(4));
    let mut header = RawHeader::new(name, b'S').gnu().size(data.len() as u64).octal(483, 12, real_size);
    for (at, segment) in first.iter().enumerate() {
        header = header.set(386 + 24 * at, &slot(segment));
    }
    if !rest.is_empty() {
        header = header.set(482, b"\x01");
    }
    let mut tar = TarWriter::default().raw(header, b"");
    let blocks = rest.chunks(21).count();
    for (number, block) in rest.chunks(21).enumerate() {
        let mut bytes: Vec<u8> = block.iter().flat_map(slot).collect();
        bytes.resize(512, 0);
        bytes[504] = u8::from(number + 1 < blocks);
        tar.0.extend_from_slice(&bytes);
    }
    tar.0.extend_from_slice(data);
    tar.0.resize(tar.0.len().next_multiple_of(512), 0);
    tar
}

#[test]
fn old_gnu_sparse_files() {
    let entry = one(old_gnu_sparse(b"s", &[(512, 512), (4096, 700), (10_000, 0)], 10_000, &[1; 1212]));
    // 700 bytes do not fill their last block, and the file goes on: that block is inline.
    let mut tail = [0; 512];
    tail[..188].fill(1);
    let extents = vec![layer(512, 512, 512), layer(4096, 512, 1024), inline(4608, &tail)];
    assert_eq!(entry.kind, EntryKind::Regular { size_bytes: 10_000, extents });

    let segments: Vec<(u64, u64)> = (0..30).map(|no| (no * 2048, 512)).collect();
    let data: Vec<u8> = (0..30_u8).flat_map(|no| [no; 512]).collect();
    let entry = one(old_gnu_sparse(b"s", &segments, 29 * 2048 + 512, &data));
    assert_eq!((entry.header_start, entry.data_start, entry.stored_len_bytes), (0, 512 + 2 * 512, 30 * 512));
    let extents = (0..30).map(|no| layer(no * 2048, 512, 1536 + no * 512)).collect();
    assert_eq!(entry.kind, EntryKind::Regular { size_bytes: 29 * 2048 + 512, extents });
}

#[test]
fn pax_sparse_files_of_every_version() {
    let data = [5; 1024];
    let expected =
        |at| EntryKind::Regular { size_bytes: 9000, extents: vec![layer(0, 512, at), layer(4096, 512, at + 512)] };
    let version_0_0 = TarWriter::default()
        .pax(&[
            ("GNU.sparse.size", b"9000"),
            ("GNU.sparse.numblocks", b"3"),
            ("GNU.sparse.offset", b"0"),
            ("GNU.sparse.numbytes", b"512"),
            ("GNU.sparse.offset", b"4096"),
            ("GNU.sparse.numbytes", b"512"),
            ("GNU.sparse.offset", b"9000"),
            ("GNU.sparse.numbytes", b"0"),
        ])
        .file("s", &data);
    assert_eq!(one(version_0_0).kind, expected(1536));

    let version_0_1 = TarWriter::default()
        .pax(&[
            ("GNU.sparse.size", b"9000"),
            ("GNU.sparse.numblocks", b"2"),
            ("GNU.sparse.name", b"real name"),
            ("GNU.sparse.map", b"0,512,4096,512"),
        ])
        .file("GNUSparseFile.0/s", &data);
    let entry = one(version_0_1);
    assert_eq!((entry.path.as_slice(), &entry.kind), (&b"real name"[..], &expected(1536)));

    let mut body = b"2\n0\n512\n4096\n512\n".to_vec();
    body.resize(512, 0);
    body.extend_from_slice(&data);
    let version_1_0 = TarWriter::default()
        .pax(&[
            ("GNU.sparse.major", b"1"),
            ("GNU.sparse.minor", b"0"),
            ("GNU.sparse.name", b"real name"),
            ("GNU.sparse.realsize", b"9000"),
        ])
        .file("GNUSparseFile.0/s", &body);
    let entry = one(version_1_0.file("next", b"").0.into());
    assert_eq!((entry.path.as_slice(), &entry.kind), (&b"real name"[..], &expected(2048)));
    assert_eq!((entry.header_start, entry.data_start, entry.stored_len_bytes), (0, 2048, 1024));
}

impl From<Vec<u8>> for TarWriter {
    /// Without the last header, which stands for what follows.
    fn from(mut tar: Vec<u8>) -> Self {
        tar.truncate(tar.len() - 512);
        Self(tar)
    }
}

#[test]
fn unaligned_segments_come_inline_and_after_their_data() {
    let data: Vec<u8> = (0..=255).cycle().take(2000).collect();
    // 1: aligned in the file, not in the tar; 2 and 3 share a block.
    let segments = [(0, 100), (1024, 1300), (4096 + 10, 100), (4096 + 300, 500)];
    let tar = old_gnu_sparse(b"s", &segments, 6000, &data);
    let entry = one(tar.clone());
    let mut model = vec![0_u8; 6000];
    let mut at = 0;
    for (offset, len) in segments {
        model[offset as usize..(offset + len) as usize].copy_from_slice(&data[at..at + len as usize]);
        at += len as usize;
    }
    let extents = vec![inline(0, &model[..512]), inline(1024, &model[1024..2560]), inline(4096, &model[4096..5120])];
    assert_eq!(entry.kind, EntryKind::Regular { size_bytes: 6000, extents });

    let mut walker = TarWalker::new();
    let mut entries = Vec::new();
    walker.push(&tar.0[..512 + 1999], &mut entries).expect("accepted");
    assert!(entries.is_empty(), "delivered before its data");
    walker.push(&tar.0[512 + 1999..512 + 2000], &mut entries).expect("accepted");
    assert_eq!(entries.len(), 1);
}

#[test]
fn bad_sparse_maps_are_refused_by_name() {
    let tars = [
        old_gnu_sparse(b"bad", &[(512, 512)], 2048, &[0; 511]),
        old_gnu_sparse(b"bad", &[(512, 512)], 2048, &[0; 513]),
        old_gnu_sparse(b"bad", &[(512, 512), (0, 512)], 2048, &[0; 1024]),
        old_gnu_sparse(b"bad", &[(512, 512)], 1000, &[0; 512]),
        TarWriter::default()
            .pax(&[("GNU.sparse.map", b"0,1"), ("GNU.sparse.numblocks", b"1"), ("GNU.sparse.size", b"17592186044417")])
            .file("bad", b"1"),
        TarWriter::default().raw(RawHeader::new(b"bad", b'S'), b""),
        TarWriter::default().pax(&[("GNU.sparse.map", b"0,1"), ("GNU.sparse.numblocks", b"2")]).file("bad", b"1"),
        TarWriter::default().pax(&[("GNU.sparse.map", b"0,x"), ("GNU.sparse.numblocks", b"1")]).file("bad", b"1"),
        TarWriter::default().pax(&[("GNU.sparse.map", b"0,1"), ("GNU.sparse.numblocks", b"1")]).dir("bad"),
        TarWriter::default().pax(&[("GNU.sparse.major", b"1"), ("GNU.sparse.minor", b"0")]).file("bad", b"9\n"),
        TarWriter::default().pax(&[("GNU.sparse.major", b"1"), ("GNU.sparse.minor", b"0")]).file("bad", &[b'1'; 512]),
    ];
    for (number, tar) in tars.into_iter().enumerate() {
        let error = walk(&tar.end()).expect_err("refused");
        assert!(matches!(&error, TarError::Sparse { entry, .. } if entry == "bad"), "{number}: {error}");
    }
}

#[test]
fn unknown_sparse_versions_are_plain_files() {
    let tar = TarWriter::default().pax(&[("GNU.sparse.major", b"2"), ("GNU.sparse.minor", b"0")]).file("x", b"abc");
    assert_eq!(one(tar).kind, EntryKind::Regular { size_bytes: 3, extents: vec![layer(0, 3, 1536)] });
}

#[test]
fn inline_bytes_are_limited() {
    let data = vec![1; 16 << 20];
    let tar = old_gnu_sparse(b"big", &[(1, 16 << 20)], 1 << 25, &data).end();
    assert_eq!(walk(&tar), Err(TarError::InlineTooLong { entry: "big".to_owned() }));
}

#[test]
fn the_end_is_two_zero_blocks_or_the_end_of_the_stream() {
    let file = TarWriter::default().file("x", b"data").0;
    let whole = walk(&file).expect("no end marker");
    let zeros = |count: usize, rest: &[u8]| [&file[..], &vec![0; count], rest].concat();
    for tar in [
        zeros(512, b""),
        zeros(1024, b""),
        zeros(1024, b"garbage"),
        zeros(9000, b""),
        // Padding of the last file may be missing.
        file[..1000].to_vec(),
        file[..516].to_vec(),
    ] {
        assert_eq!(walk(&tar).as_ref(), Ok(&whole), "{} bytes", tar.len());
    }
    for tar in [zeros(511, b""), zeros(513, b""), file[..515].to_vec(), file[..511].to_vec()] {
        assert!(matches!(walk(&tar), Err(TarError::Truncated { .. })), "{} bytes", tar.len());
    }
    let lone = zeros(512, &[1; 512]);
    assert_eq!(walk(&lone), Err(TarError::LoneZeroBlock { offset: 1536, after: "x".to_owned() }));
    assert_eq!(walk(b""), Ok(vec![]));
}

#[test]
fn an_extension_header_before_the_end_means_nothing() {
    assert_eq!(walk(&TarWriter::default().pax(&[("path", b"x")]).end()), Ok(vec![]));
    assert_eq!(walk(&TarWriter::default().pax(&[("path", b"x")]).0), Ok(vec![]));
    assert_eq!(walk(&TarWriter::default().put(RawHeader::new(b"x", b'x'), b"").end()), Ok(vec![]));
}

#[test]
fn damaged_headers_are_refused() {
    let after = TarWriter::default().file("first", b"");
    let mut bad = after.clone().file("second", b"").0;
    bad[600] ^= 1;
    assert_eq!(walk(&bad), Err(TarError::Checksum { offset: 512, after: "first".to_owned() }));
    let numbers = [
        (100, "mode"),
        (108, "owner"),
        (116, "group"),
        (124, "size"),
        (136, "modification time"),
        (329, "device major number"),
        (337, "device minor number"),
    ];
    for (at, field) in numbers {
        let tar = after.clone().raw(RawHeader::new(b"second", b'0').set(at, b"x"), b"").end();
        assert_eq!(walk(&tar), Err(TarError::Number { entry: "second".to_owned(), offset: 512, field }));
    }
    for (key, field) in [("uid", "owner"), ("size", "size"), ("atime", "access time")] {
        let tar = TarWriter::default().pax(&[(key, b"1x")]).file("x", b"").end();
        assert_eq!(walk(&tar), Err(TarError::Number { entry: "x".to_owned(), offset: 1024, field }));
    }
    let negative = TarWriter::default().raw(RawHeader::new(b"x", b'0').set(124, &[0xff; 12]), b"").end();
    assert!(matches!(walk(&negative), Err(TarError::Number { field: "size", .. })));
    let pax = TarWriter::default().put(RawHeader::new(b"px", b'x'), b"5 a=b\n").end();
    assert_eq!(walk(&pax), Err(TarError::Pax { entry: "px".to_owned(), offset: 0 }));
}

#[test]
fn signed_checksums_are_taken_too() {
    let mut block = RawHeader::new(b"\xff\xff", b'0').set(148, b"        ").0;
    let sum: i32 = block.iter().map(|byte| i32::from(*byte as i8)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    assert_eq!(walk(&block).expect("accepted")[0].path, b"\xff\xff");
}

#[test]
fn extension_headers_are_limited() {
    let long = |len: usize| {
        let header = RawHeader::new(b"././@LongLink", b'L').gnu();
        TarWriter::default().put(header, &vec![b'n'; len]).file("x", b"").end()
    };
    assert_eq!(walk(&long(1 << 20)).expect("accepted")[0].path.len(), 1 << 20);
    assert!(matches!(walk(&long((1 << 20) + 1)), Err(TarError::ExtensionTooLong { len_bytes: 1_048_577, .. })));
    // Refused at its header, before anything is kept.
    let huge = RawHeader::new(b"x", b'x').size(1 << 35).sealed();
    assert!(matches!(walk(&huge), Err(TarError::ExtensionTooLong { .. })));
    let far = TarWriter::default().pax(&[("size", b"9000000000000000000")]).file("far", b"").end();
    assert_eq!(walk(&far), Err(TarError::TooFar { entry: "far".to_owned() }));
}

#[test]
fn an_error_stays() {
    let mut walker = TarWalker::new();
    let mut entries = Vec::new();
    let error = walker.push(&[1; 512], &mut entries).expect_err("refused");
    assert_eq!(walker.push(&TarWriter::default().file("x", b"").end(), &mut entries), Err(error.clone()));
    assert_eq!(walker.finish(&mut entries), Err(error));
    assert!(entries.is_empty());
}

/// A stream with every feature in it.
fn everything() -> Vec<u8> {
    let mut tar = TarWriter::default()
        .dir("./")
        .file("a", &[1; 1000])
        .pax(&[("path", b"b"), ("SCHILY.xattr.user.x", b"\0"), ("mtime", b"1.5")])
        .file("x", &[2; 512])
        .put(RawHeader::new(b"././@LongLink", b'L').gnu(), &[b'n'; 200])
        .symlink("s", "a")
        .put(RawHeader::new(b"g", b'g'), &record("comment", b"c"))
        .hard_link("h", "a");
    let mut body = b"2\n0\n512\n4096\n100\n".to_vec();
    body.resize(512, 0);
    body.extend_from_slice(&[9; 612]);
    tar = tar.pax(&[("GNU.sparse.major", b"1"), ("GNU.sparse.minor", b"0"), ("GNU.sparse.realsize", b"9000")]);
    tar = tar.file("sparse", &body);
    let segments: Vec<(u64, u64)> = (0..30).map(|no| (no * 3000, 700)).collect();
    let old = old_gnu_sparse(b"old", &segments, 100_000, &vec![7; 21_000]);
    tar.0.extend_from_slice(&old.0);
    tar.file("last", b"l").end()
}

#[test]
fn bytes_one_by_one_give_the_same_entries() {
    let tar = everything();
    let whole = walk(&tar).expect("accepted");
    assert_eq!(whole.len(), 9);
    assert_eq!(walk_in_pieces(&tar, 1), Ok(whole));
}

proptest! {
    #[test]
    fn pieces_of_any_size_give_the_same_entries(cuts in proptest::collection::vec(1_usize..3000, 1..60)) {
        let tar = everything();
        let mut walker = TarWalker::new();
        let mut entries = Vec::new();
        let mut rest = tar.as_slice();
        for cut in cuts.iter().cycle() {
            let (piece, after) = rest.split_at((*cut).min(rest.len()));
            walker.push(piece, &mut entries).expect("accepted");
            rest = after;
            if rest.is_empty() {
                break;
            }
        }
        walker.finish(&mut entries).expect("accepted");
        prop_assert_eq!(Ok(entries), walk(&tar));
    }

    #[test]
    fn damage_never_panics(edits in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..20),
                           len in any::<prop::sample::Index>(), seal in any::<bool>()) {
        let mut tar = everything();
        for (at, byte) in edits {
            let at = at.index(tar.len());
            tar[at] = byte;
        }
        tar.truncate(len.index(tar.len()));
        if seal {
            // Right checksums let damage through to the parsers behind them.
            for block in tar.chunks_exact_mut(512) {
                if block.iter().any(|byte| *byte != 0) {
                    let raw = RawHeader(block.try_into().expect("512 bytes"));
                    block.copy_from_slice(&raw.sealed());
                }
            }
        }
        let _ = crate::tar::testing::toc_of(&tar);
    }
}
