//! Every type of file with every kind of metadata, in every dialect.

use super::{OddImage, noise, ramp};
use crate::tarball::{Dialect, Entry, Tarball};

/// Lengths around the block of a tar, the page, and Hermes' chunk of 64 KiB, in bytes.
const LENGTHS: [usize; 22] = [
    0, 1, 2, 511, 512, 513, 1023, 1024, 1025, 4095, 4096, 4097, 8191, 8193, 65_535, 65_536, 65_537, 131_071, 131_072,
    131_073, 200_000, 1_048_577,
];

pub(super) fn images(seed: u64) -> Vec<OddImage> {
    vec![
        OddImage::new("types", [types(seed), dialects(seed)]),
        OddImage::new("lengths", [lengths(seed)]),
        OddImage::new("owners", [owners(seed)]),
        OddImage::new("times", [times(seed)]),
        OddImage::new("modes", [modes(seed)]),
        OddImage::new("xattrs", [xattrs(seed), xattrs_replaced(seed)]),
        OddImage::new("pax-global", [pax_global(seed)]),
        OddImage::new("pax-overrides", [pax_overrides(seed)]),
        OddImage::new("many-files", [many_files(seed)]),
    ]
}

fn types(seed: u64) -> Vec<u8> {
    Tarball::of([
        Entry::directory("dev").mode(0o755),
        Entry::new(b'3', "dev/null").mode(0o666).device(1, 3),
        Entry::new(b'3', "dev/large").mode(0o600).device(4095, 1_048_575),
        Entry::new(b'4', "dev/disk").mode(0o660).owner(0, 6).device(8, 17),
        Entry::new(b'6', "dev/pipe").mode(0o622).owner(7, 8),
        Entry::symlink("dev/fd", "/proc/self/fd"),
        Entry::symlink("dangling", "no/such/file"),
        Entry::symlink("loop", "loop"),
        Entry::symlink("long", "x".repeat(4000)),
        Entry::directory("empty"),
        Entry::file("file", ramp(seed, 3000)),
    ])
}

/// The same names once in each dialect, with what each can say.
fn dialects(seed: u64) -> Vec<u8> {
    let dialects = [Dialect::Old, Dialect::Ustar, Dialect::Gnu, Dialect::Pax];
    let entries = dialects.into_iter().flat_map(|dialect| {
        let top = format!("{dialect:?}");
        let mut entries = vec![
            Entry::directory(&top).mode(0o750).owner(1, 2),
            Entry::file(format!("{top}/file"), ramp(seed, 700)).mode(0o640).owner(3, 4).mtime(1, 0),
            Entry::symlink(format!("{top}/link"), "file"),
            Entry::hard_link(format!("{top}/hard"), format!("{top}/file")).mode(0o640).owner(3, 4).mtime(1, 0),
            // The flag of the seventh edition: zero instead of '0'.
            Entry { flag: 0, ..Entry::file(format!("{top}/zero-flag"), ramp(seed, 100)) },
            // A directory in the old way: a regular file whose name ends with a slash.
            Entry { flag: 0, name: format!("{top}/old-directory/").into_bytes(), ..Entry::directory("x") },
        ];
        if dialect != Dialect::Old {
            entries.push(Entry::new(b'3', format!("{top}/device")).device(5, 6));
        }
        entries.into_iter().map(move |entry| entry.dialect(dialect))
    });
    Tarball::of(entries)
}

fn lengths(seed: u64) -> Vec<u8> {
    let files = LENGTHS.into_iter().zip(0..).flat_map(|(len_bytes, index)| {
        let name = format!("len-{len_bytes}");
        [
            Entry::file(&name, ramp(seed ^ index, len_bytes)),
            Entry::file(name + ".noise", noise(seed ^ index, len_bytes)),
        ]
    });
    Tarball::of(files)
}

fn owners(seed: u64) -> Vec<u8> {
    // Octal, the largest octal of each field, beyond it, and the largest that a kernel knows (2^32 - 1 means "none").
    let ids = [0, 1, 65_534, 65_535, 65_536, 0o777_7777, 0o1000_0000, 1 << 31, u64::from(u32::MAX) - 1];
    let entries = ids.into_iter().flat_map(|id| {
        [Dialect::Gnu, Dialect::Pax].map(|dialect| {
            Entry::file(format!("{dialect:?}-{id}"), ramp(seed, 10)).owner(id, ids[8] - id).dialect(dialect)
        })
    });
    let directory = Entry::directory("directory").owner(4_000_000_000, 3_000_000_000);
    Tarball::of(entries.chain([directory, Entry::symlink("link", "x").owner(4_000_000_001, 1)]))
}

fn times(seed: u64) -> Vec<u8> {
    let times = [
        (0, 0),
        (0, 1),
        (1, 999_999_999),
        (1_600_000_000, 123_456_789),
        (i64::from(i32::MAX), 5),
        (i64::from(i32::MAX) + 1, 6),
        (0o777_7777_7777, 7),
        // Before 1970, where containerd writes 1970.
        (-1, 0),
        (-1, 500_000_000),
        (-1_000_000_000, 250_000_000),
    ];
    let entries = times.into_iter().zip(0..).flat_map(|((seconds, nanoseconds), index)| {
        let name = format!("time-{index}");
        [
            Entry::file(&name, ramp(seed, 20)).mtime(seconds, nanoseconds),
            Entry::file(name.clone() + ".gnu", ramp(seed, 21)).mtime(seconds, 0).dialect(Dialect::Gnu),
            Entry::directory(name.clone() + ".dir").mtime(seconds, nanoseconds),
            Entry::symlink(name + ".link", "target").mtime(seconds, nanoseconds),
        ]
    });
    // PAX times may have any number of digits.
    let digits = ["5", "5.", "5.1", "5.123456789", "5.1234567891234"].into_iter().zip(0..);
    let digits = digits.map(|(text, index)| Entry::file(format!("digits-{index}"), []).record("mtime", text));
    // A time of access after that of modification must not replace it.
    let access = Entry::file("accessed-later", []).mtime(1000, 0).record("atime", "2000").record("ctime", "3000");
    Tarball::of(entries.chain(digits).chain([access]))
}

fn modes(seed: u64) -> Vec<u8> {
    let modes = [0o000, 0o111, 0o444, 0o755, 0o777, 0o1755, 0o2755, 0o4755, 0o6755, 0o7777];
    let entries = modes.into_iter().flat_map(|mode| {
        [
            Entry::file(format!("file-{mode:o}"), ramp(seed, 5)).mode(mode).owner(1000, 1000),
            Entry::directory(format!("dir-{mode:o}")).mode(mode).owner(1000, 1000),
            Entry::new(b'6', format!("pipe-{mode:o}")).mode(mode),
        ]
    });
    // Old writers put the type into the mode field, too.
    let typed = Entry::file("typed", ramp(seed, 6)).mode(0o100_640);
    Tarball::of(entries.chain([typed]))
}

/// A version 2 capability set: `cap_net_raw+ep` (linux/capability.h, `struct vfs_cap_data`).
fn capability() -> Vec<u8> {
    let words: [u32; 5] = [0x0200_0001, 1 << 13, 0, 0, 0];
    words.into_iter().flat_map(u32::to_le_bytes).collect()
}

fn xattrs(seed: u64) -> Vec<u8> {
    let all_bytes: Vec<u8> = (0..=255).collect();
    let long_name = format!("user.{}", "n".repeat(200));
    Tarball::of([
        Entry::file("ping", ramp(seed, 5000)).mode(0o755).xattr("security.capability", capability()),
        Entry::file("plain", ramp(seed, 10)).xattr("user.text", "value").xattr("user.second", "another"),
        Entry::file("binary", ramp(seed, 10)).xattr("user.bytes", &all_bytes).xattr("user.newline", "a\nb=c\n"),
        Entry::file("empty-value", ramp(seed, 10)).xattr("user.empty", ""),
        Entry::file("large", ramp(seed, 10)).xattr("user.large", noise(seed, 3000)),
        Entry::file("long-name", ramp(seed, 10)).xattr(&long_name, "x"),
        Entry::file("not-utf8", ramp(seed, 10)).xattr("user.x", b"\xFF\xFE\x00\x80"),
        Entry::file("trusted", ramp(seed, 10)).xattr("trusted.hermes", "root only"),
        Entry::directory("directory").xattr("user.on", "a directory").xattr("trusted.too", b"\0\x01"),
        Entry::symlink("link", "plain").xattr("trusted.link", "of a link"),
        Entry::new(b'6', "pipe").xattr("trusted.pipe", "of a pipe"),
        Entry::new(b'3', "device").device(1, 5).xattr("security.hermes", "of a device"),
        Entry::file("many", ramp(seed, 10)).xattr("user.a", "1").xattr("user.b", "2").xattr("user.c", "3"),
        // Other writers' spellings, which containerd does not read.
        Entry::file("libarchive", ramp(seed, 10)).record("LIBARCHIVE.xattr.user.x", "dmFsdWU="),
        Entry::file("acl", ramp(seed, 10)).record("SCHILY.acl.access", "user::rw-,group::r--,other::r--"),
        // The last of two equal records counts.
        Entry::file("twice", ramp(seed, 10)).xattr("user.twice", "first").xattr("user.twice", "second"),
    ])
}

/// A file is replaced with its attributes; a directory that one layer names twice has those of both entries.
fn xattrs_replaced(seed: u64) -> Vec<u8> {
    Tarball::of([
        Entry::file("plain", ramp(seed, 11)).xattr("user.third", "only"),
        Entry::directory("twice").xattr("user.one", "1"),
        Entry::directory("twice").xattr("user.two", "2"),
    ])
}

/// A global header holds for all entries by POSIX; containerd ignores it, as git's archives rely on.
fn pax_global(seed: u64) -> Vec<u8> {
    let record = |key: &str, value: &str| (key.as_bytes().to_vec(), value.as_bytes().to_vec());
    let mut tarball = Tarball::new();
    let name = "pax_global_header";
    tarball.add_records(b'g', name, &[record("comment", "0123456789abcdef0123456789abcdef01234567")]);
    tarball.add(&Entry::file("first", ramp(seed, 600)));
    tarball.add_records(b'g', name, &[record("mtime", "1234.5"), record("uid", "77"), record("gname", "staff")]);
    tarball.add(&Entry::file("second", ramp(seed, 601)).owner(5, 6).mtime(99, 0));
    tarball.add_records(b'g', name, &[]);
    tarball.add(&Entry::file("third", ramp(seed, 602)).owner(7, 8).mtime(77, 3));
    tarball.finish()
}

/// Records that say something else than the header's fields: the record counts, and the last of several.
fn pax_overrides(seed: u64) -> Vec<u8> {
    let sized = |name: &str, len_bytes: usize, header: u64| Entry {
        size_bytes: Some(header),
        ..Entry::file(name, ramp(seed, len_bytes)).record("size", len_bytes.to_string())
    };
    Tarball::of([
        Entry::file("header-name", ramp(seed, 30)).record("path", "record-name"),
        Entry::file("two-names", ramp(seed, 31)).record("path", "not-this").record("path", "but-this"),
        Entry::file("ids", ramp(seed, 32)).owner(1, 1).record("uid", "3000000").record("gid", "12"),
        Entry::file("named", ramp(seed, 33)).owner(9, 9).record("uname", "nobody").record("gname", "nogroup"),
        sized("size-record", 1500, 0),
        sized("size-record-less", 10, 10),
        Entry::symlink("link", "header-target").record("linkpath", "record-target"),
        // An empty value takes the record back: the header counts again.
        Entry::file("emptied", ramp(seed, 34)).record("path", "no-such").record("path", ""),
        Entry::file("unknown", ramp(seed, 35)).record("VENDOR.key", "value").record("comment", "ignored"),
        Entry::file("with\u{e9}", ramp(seed, 36)).record("hdrcharset", "BINARY"),
    ])
}

/// More names than one directory block, index level or readdir buffer holds.
fn many_files(seed: u64) -> Vec<u8> {
    let files = (0..10_000_u64).map(|index| Entry {
        dialect: Dialect::Ustar,
        ..Entry::file(
            format!("many/{index:x}-{}", "n".repeat(index as usize % 60)),
            ramp(seed ^ index, index as usize % 40),
        )
    });
    Tarball::of([Entry::directory("many")].into_iter().chain(files))
}
