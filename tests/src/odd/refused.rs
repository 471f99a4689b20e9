//! Layers that containerd refuses. Hermes must refuse them, too, and name the entry.

use super::ramp;
use crate::tarball::{Dialect, Entry, Tarball, header, seal};

/// A layer that cannot be unpacked.
#[derive(Debug, Clone)]
pub struct RefusedLayer {
    /// What is wrong with it: lower-case letters and dashes.
    pub tag: &'static str,
    /// The tar.
    pub tar: Vec<u8>,
}

/// All refused layers.
pub fn refused(seed: u64) -> Vec<RefusedLayer> {
    let file = || Entry::file("file", ramp(seed, 2000));
    let layer = |tag, tar| RefusedLayer { tag, tar };
    let with = |entry: Entry| Tarball::of([file(), entry]);
    let long = Tarball::of([Entry::file("a".repeat(256), [])]);
    vec![
        layer("bad-checksum", bad_checksum(seed)),
        layer("cut-in-content", Tarball::of([file()])[..1500].to_vec()),
        layer("cut-in-header", Tarball::of([file(), file()])[..2560 + 200].to_vec()),
        layer("garbage", ramp(seed, 5120)),
        layer("link-to-nothing", with(Entry::hard_link("link", "no-such"))),
        layer("link-to-directory", Tarball::of([Entry::directory("dir"), Entry::hard_link("link", "dir")])),
        layer("whiteout-of-nothing", with(Entry::file(".wh.", []))),
        layer("whiteout-of-parent", with(Entry::file("dir/.wh...", []))),
        layer("name-too-long", long),
        layer("parent-is-a-file", with(Entry::file("file/inner", []))),
        layer("contiguous-file", with(Entry::new(b'7', "contiguous"))),
        layer("unknown-type", with(Entry::new(b'Z', "unknown"))),
        layer("negative-size", negative_size()),
        layer("pax-record-cut", bad_record(b"30 path=too short\n")),
        layer("pax-record-without-length", bad_record(b"path=x\n")),
        layer("pax-record-without-key", bad_record(b"5 =x\n")),
        layer("pax-record-with-zero-byte", bad_record(b"12 path=a\0b\n")),
        layer("pax-size-is-no-number", with(Entry::file("x", []).record("size", "many"))),
        layer("sparse-overlap", with(sparse(&[(0, 512), (256, 512)], 2000, 1024))),
        layer("sparse-behind-end", with(sparse(&[(1000, 512)], 1200, 512))),
        layer("sparse-lacks-data", with(sparse(&[(0, 512)], 2000, 100))),
        layer("octal-is-no-number", bad_octal()),
        layer("capability-is-malformed", with(Entry::file("ping", []).xattr("security.capability", "short"))),
    ]
}

fn bad_checksum(seed: u64) -> Vec<u8> {
    let mut tar = Tarball::of([Entry::file("file", ramp(seed, 100))]);
    tar[0] ^= 1;
    tar
}

fn negative_size() -> Vec<u8> {
    let mut block = header(&Entry::file("file", []).dialect(Dialect::Gnu));
    block[124..136].fill(0xFF);
    seal(&mut block);
    let mut tarball = Tarball::new();
    tarball.raw(&block);
    tarball.finish()
}

fn bad_octal() -> Vec<u8> {
    let mut block = header(&Entry::file("file", []));
    block[124..136].copy_from_slice(b"00000000089\0");
    seal(&mut block);
    let mut tarball = Tarball::new();
    tarball.raw(&block);
    tarball.finish()
}

fn bad_record(body: &[u8]) -> Vec<u8> {
    let mut tarball = Tarball::new();
    let carrier = Entry { data: body.to_vec(), dialect: Dialect::Ustar, ..Entry::new(b'x', "PaxHeaders/x") };
    tarball.add(&carrier);
    tarball.add(&Entry::file("file", []));
    tarball.finish()
}

/// An entry with a sparse map in the encoding of PAX 0.1.
fn sparse(map: &[(u64, u64)], size_bytes: u64, stored_len_bytes: usize) -> Entry {
    let text: Vec<String> = map.iter().map(|(offset, len)| format!("{offset},{len}")).collect();
    Entry::file("sparse", vec![1; stored_len_bytes])
        .record("GNU.sparse.size", size_bytes.to_string())
        .record("GNU.sparse.numblocks", map.len().to_string())
        .record("GNU.sparse.map", text.join(","))
        .record("GNU.sparse.name", "sparse")
}
