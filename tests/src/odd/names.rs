//! Names: bytes, lengths, depths, and the many ways to write a path.

use super::{OddImage, ramp};
use crate::tarball::{Dialect, Entry, Tarball};

/// Longest name of one file on Linux (NAME_MAX), in bytes.
const NAME_MAX_BYTES: usize = 255;

pub(super) fn images(seed: u64) -> Vec<OddImage> {
    vec![
        OddImage::new("names", [names(seed)]),
        OddImage::new("long-names", [long_names(seed)]),
        OddImage::new("path-forms", [path_forms(seed)]),
        OddImage::new("deep", [deep(seed), deep_again(seed)]),
    ]
}

/// Names that are not words. Each once raw in the header and once, where that differs, in a PAX record.
fn names(seed: u64) -> Vec<u8> {
    let names: [&[u8]; 16] = [
        b"with blank",
        b" leading and trailing ",
        b"new\nline",
        b"tab\tand\x01control\x7F",
        b"quote\"'`$(x)",
        b"back\\slash",
        b"-rf",
        b"...",
        b"..two",
        b"*?[x]",
        b"\xFF\xFE not utf8",
        b"latin1-\xE9",
        "na\u{ef}ve \u{1F980} \u{202E}".as_bytes(),
        // One name in two normal forms: two files.
        "e\u{301}".as_bytes(),
        "\u{e9}".as_bytes(),
        b".wh",
    ];
    let entries = names.into_iter().zip(0..).flat_map(|(name, index)| {
        [Dialect::Gnu, Dialect::Pax].into_iter().flat_map(move |dialect| {
            let path = [format!("{dialect:?}/").as_bytes(), name].concat();
            let link = [path.as_slice(), b".link"].concat();
            [Entry::file(&path, ramp(seed ^ index, 64)).dialect(dialect), Entry::symlink(link, name).dialect(dialect)]
        })
    });
    let tops = [Entry::directory("Gnu"), Entry::directory("Pax")];
    Tarball::of(tops.into_iter().chain(entries))
}

fn long_names(seed: u64) -> Vec<u8> {
    let mut entries = Vec::new();
    for dialect in [Dialect::Gnu, Dialect::Pax] {
        let top = format!("{dialect:?}");
        entries.push(Entry::directory(&top).dialect(dialect));
        // Around the 100 bytes of the header's field, and the longest that there is.
        for len in [97 - top.len(), 98 - top.len(), 99 - top.len(), 100, 101, 154, 155, 156, NAME_MAX_BYTES] {
            let name = format!("{top}/{}", "l".repeat(len));
            let target = "t".repeat(len);
            entries.push(Entry::file(&name, ramp(seed, len)).dialect(dialect));
            entries.push(Entry::symlink(format!("{top}/s{len}"), target).dialect(dialect));
            entries.push(Entry::hard_link(format!("{top}/h{len}"), name).dialect(dialect));
        }
        let inner = format!("{top}/{}/", "d".repeat(NAME_MAX_BYTES));
        entries.push(Entry::directory(&inner).dialect(dialect));
        entries.push(Entry::file(inner + &"f".repeat(NAME_MAX_BYTES), ramp(seed, 9)).dialect(dialect));
    }
    // Prefix and name of ustar, at the longest.
    let prefix = format!("{}/{}", "p".repeat(77), "q".repeat(77));
    entries.push(Entry::directory("p".repeat(77)).dialect(Dialect::Ustar));
    entries.push(Entry::directory(&prefix).dialect(Dialect::Ustar));
    entries.push(Entry::file(format!("{prefix}/{}", "r".repeat(100)), ramp(seed, 8)).dialect(Dialect::Ustar));
    // A PAX record counts more than a GNU long name before the same entry, in either order of the two.
    let mut tarball = Tarball::new();
    for entry in &entries {
        tarball.add(entry);
    }
    tarball.add_long_text(b'L', b"gnu-name-unused");
    tarball.add(&Entry::file("short", ramp(seed, 7)).record("path", "pax-name-wins"));
    tarball.finish()
}

/// One path may be written in many ways.
fn path_forms(seed: u64) -> Vec<u8> {
    Tarball::of([
        Entry::directory("./"),
        Entry::directory("./dot").mode(0o711),
        Entry::file("./dot/file", ramp(seed, 1)),
        Entry::directory("/slash").mode(0o712),
        Entry::file("/slash/file", ramp(seed, 2)),
        Entry::file("//slash//double", ramp(seed, 3)),
        Entry::file("dot/./inner/./file", ramp(seed, 4)),
        Entry::file("dot/none/../up", ramp(seed, 5)),
        // Above the root is the root.
        Entry::file("../above", ramp(seed, 6)),
        Entry::file("/../../above2", ramp(seed, 7)),
        Entry::directory("many-slashes///"),
        Entry::hard_link("hard-dot", "./dot/file"),
        Entry::hard_link("./hard-slash", "/slash/file"),
        Entry::hard_link("hard-up", "dot/../slash/double"),
    ])
}

/// A path of almost 4,096 bytes is the longest that a program can name.
fn deep(seed: u64) -> Vec<u8> {
    let mut entries = Vec::new();
    let mut path = String::from("deep");
    for level in 0..300 {
        entries.push(Entry::directory(&path).mtime(1000 + level, 0));
        path.push_str(&format!("/{level}"));
    }
    entries.push(Entry::file(path, ramp(seed, 300)));
    let mut wide = String::from("wide");
    for _ in 0..14 {
        entries.push(Entry::directory(&wide));
        wide.push('/');
        wide.push_str(&"w".repeat(NAME_MAX_BYTES));
    }
    entries.push(Entry::file(wide, ramp(seed, 301)));
    Tarball::of(entries)
}

/// The same depths, without a directory being named.
fn deep_again(seed: u64) -> Vec<u8> {
    let path: String = (0..250).map(|level| format!("{level}/")).collect();
    Tarball::of([Entry::file(format!("deep/{path}late"), ramp(seed, 302)).dialect(Dialect::Gnu)])
}
